//! `Plan::eval`: the steps as a program takes them, on key words.

use super::{DeviceClasses, Plan, PlanExit, StepData, Target, WalkNode, WalkRef, WordTest, WordWrite};
use crate::field::{DeviceName, Field};
use crate::outcome::{Ending, FrameKind, Outcome, Verdict};
use crate::packet::frame_ending;
use crate::state::State;

impl DeviceClasses {
    /// The class of a device; 0 for one that was not declared.
    pub fn class(&self, value: u128) -> u16 {
        if value == 0 {
            return 1;
        }
        let name = DeviceName::from_value(value);
        self.devices.iter().find(|(device, _)| device.name == name).map_or(0, |(_, class)| *class)
    }
}

impl DeviceClasses {
    /// The name of the device of a class, as a number, where each device has a class of its own; 0 if there is none.
    pub fn name(&self, class: u32) -> u128 {
        let names = self.names.get(class as usize);
        names.and_then(|names| DeviceName::new(names.first()?)).map_or(0, DeviceName::value)
    }
}

impl WordTest {
    /// Whether the test holds for a key.
    pub fn holds(&self, key: &[u32]) -> bool {
        let value = key[usize::from(self.word)] & self.mask;
        self.lo <= value && value <= self.hi
    }
}

impl WordWrite {
    fn apply(&self, key: &mut [u32]) {
        let word = &mut key[usize::from(self.word)];
        *word = (*word & !self.clear) ^ self.xor;
    }
}

impl Plan {
    /// The key of a packet, or its end if it comes by a device that was not declared. `given` gives what the program
    /// computes from the frame; what it computes from tables of sets is computed here.
    pub fn key(&self, given: &dyn Fn(Field) -> u128) -> Result<Vec<u32>, Ending> {
        let words = self.key.iter().map(|slot| usize::from(slot.word + slot.words)).max().unwrap_or(0);
        let mut key = vec![0; words];
        for slot in &self.key {
            let fixed = match slot.field {
                Field::InDevice => self.devices.fixed_in,
                Field::OutDevice => self.devices.fixed_out,
                _ => None,
            };
            let value = match slot.field {
                Field::InDevice | Field::OutDevice => {
                    let class = fixed.unwrap_or_else(|| self.devices.class(given(slot.field)));
                    if class == 0 {
                        return Err(frame_ending(FrameKind::UnknownDevice, self.place.mode));
                    }
                    class.into()
                }
                field => given(field),
            };
            slot.put(value, &mut key);
        }
        for step in &self.members {
            let holds = step.holds(&self.set_tables, &self.devices, &key);
            step.slot.put(holds.into(), &mut key);
        }
        Ok(key)
    }

    /// What becomes of a packet with these fields.
    pub fn eval(&self, given: &dyn Fn(Field) -> u128, state: &mut State) -> Outcome {
        let mut key = match self.key(given) {
            Ok(key) => key,
            Err(ending) => {
                return Outcome { ending, mark: given(Field::Mark) as u32, counted: Vec::new() };
            }
        };
        let ending = self.run(&mut key, given, state);
        let mark = self.key.iter().find(|slot| slot.field == Field::Mark);
        let mark = mark.map_or_else(|| given(Field::Mark) as u32, |slot| key[usize::from(slot.word)]);
        Outcome { ending, mark, counted: std::mem::take(&mut state.counted) }
    }

    /// Runs the steps on a key.
    fn run(&self, key: &mut [u32], given: &dyn Fn(Field) -> u128, state: &mut State) -> Ending {
        let mut target = self.root;
        loop {
            let exit = match target {
                Target::Step(step) => match &self.steps[step] {
                    StepData::Linear(step) => {
                        let entry = step.entries.iter().find(|entry| {
                            entry
                                .tests
                                .iter()
                                .all(|test| test.any.iter().any(|all| all.iter().all(|test| test.holds(key))))
                        });
                        &entry.expect("a stage's last entry has no tests").exit
                    }
                    StepData::Lookup(step) => {
                        // As programs do: of numbers beyond the exits, those that a power of two allows are the last.
                        let exit = step.eval(&self.tables, key) as usize;
                        let exit = exit & (step.exits.len().next_power_of_two() - 1);
                        &step.exits[exit.min(step.exits.len() - 1)]
                    }
                },
                Target::Walk(from) => &self.walk.exits[self.walk_from(from, key) as usize],
            };
            target = match exit {
                PlanExit::End(slot) => {
                    let defers = self.traces[*slot as usize].if_absent && given(Field::CtAbsent) == 0;
                    let trace = &self.traces[*slot as usize + usize::from(defers)];
                    state.counted.extend(&trace.counts);
                    return trace.ending.expect("an end's trace has an ending");
                }
                PlanExit::Then { count, writes, next } => {
                    self.count(*count, state);
                    for write in writes {
                        write.apply(key);
                    }
                    *next
                }
                PlanExit::Test { count, test, yes, no } => {
                    self.count(*count, state);
                    let holds = state.effect_test(*test, self.effect_tests[*test]);
                    if holds.expect("only tests without a clock are compiled") { *yes } else { *no }
                }
            };
        }
    }

    fn count(&self, slot: Option<u32>, state: &mut State) {
        if let Some(slot) = slot {
            state.counted.extend(&self.traces[slot as usize].counts);
        }
    }

    fn walk_from(&self, from: WalkRef, key: &[u32]) -> u32 {
        let (mut at, mut best, mut pending) = (from, None::<u32>, None);
        loop {
            match at {
                WalkRef::Node(node) => match self.walk.nodes[node as usize] {
                    WalkNode::Test { test, yes, no } => at = if test.holds(key) { yes } else { no },
                    WalkNode::Fork { first, rest } => {
                        pending = Some(rest);
                        at = first;
                    }
                },
                WalkRef::Exit(_) | WalkRef::None => {
                    if let WalkRef::Exit(exit) = at {
                        best = Some(best.map_or(exit, |best| best.min(exit)));
                    }
                    match pending.take() {
                        Some(rest) => at = rest,
                        None => return best.expect("a stage gives an exit"),
                    }
                }
            }
        }
    }

    /// Everything wrong with the plan's shape.
    pub fn verify(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (index, node) in self.walk.nodes.iter().enumerate() {
            let (WalkNode::Test { yes: a, no: b, .. } | WalkNode::Fork { first: a, rest: b }) = node;
            for reference in [a, b] {
                match *reference {
                    WalkRef::Node(to) if to as usize >= index => {
                        wrong.push(format!("node {index} leads upwards"))
                    }
                    WalkRef::Exit(to) if to as usize >= self.walk.exits.len() => {
                        wrong.push(format!("node {index} leads to no exit"));
                    }
                    _ => {}
                }
            }
        }
        let words = self.key.iter().map(|slot| usize::from(slot.word + slot.words)).max().unwrap_or(0);
        for (step, data) in self.steps.iter() {
            match data {
                StepData::Linear(data) => {
                    if !data.entries.last().is_some_and(|entry| entry.tests.is_empty()) {
                        wrong.push(format!("{step} does not decide every packet"));
                    }
                }
                StepData::Lookup(data) => {
                    wrong.extend(data.verify(&step.to_string(), &self.tables, words));
                }
            }
            let upwards = |target: &Target| matches!(target, Target::Step(next) if *next >= step);
            for exit in data.exits() {
                let leads_up = match exit {
                    PlanExit::End(_) => false,
                    PlanExit::Then { next, .. } => upwards(next),
                    PlanExit::Test { yes, no, .. } => upwards(yes) || upwards(no),
                };
                if leads_up {
                    wrong.push(format!("{step} leads upwards"));
                }
            }
        }
        for (table, data) in self.tables.iter() {
            wrong.extend(data.verify(table));
        }
        for (set, table) in &self.set_tables {
            wrong.extend(table.verify(&set.to_string()));
        }
        for step in &self.members {
            wrong.extend(step.verify(&self.set_tables, words));
        }
        for exit in self.walk.exits.iter().chain(self.steps.values().flat_map(StepData::exits)) {
            let (slot, ends) = match exit {
                PlanExit::End(slot) => (Some(*slot), true),
                PlanExit::Then { count, .. } | PlanExit::Test { count, .. } => (*count, false),
            };
            if let Some(slot) = slot
                && self.traces.get(slot as usize).is_none_or(|trace| trace.ending.is_some() != ends)
            {
                wrong.push(format!("`{exit}` counts in a slot that is not for it"));
            }
        }
        for (slot, trace) in self.traces.iter().enumerate().filter(|(_, trace)| trace.if_absent) {
            let deferred = self.traces.get(slot + 1).and_then(|next| next.ending);
            let same = |by| Some(Ending { verdict: Verdict::Defer, by });
            if trace.ending.is_none() || deferred != trace.ending.and_then(|ending| same(ending.by)) {
                wrong.push(format!("slot {slot} depends on a connection, and the next does not defer"));
            }
        }
        wrong
    }
}
