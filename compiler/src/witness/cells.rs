//! Cells: combinations of values that a step of a plan or the stage it decides tells apart, on which the two are
//! compared exit by exit.
//!
//! The values of each field fall into parts within which all that the step computes of the field alone stays the same,
//! and every test of the stage. For fields of one word the parts are worked out exactly, from the tables themselves:
//! ranges are halved until nothing in them changes. A cell is a part of each field. Where there are more than
//! an [`Effort`] allows, as many are drawn. So a table that is wrong anywhere is found by its contents, which packets made for
//! rules seldom reach; whether a packet shows it is for the levels to say.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use polc_ir::at_once::both;
use polc_ir::classifier::{Classifier, EntryData, Exit};
use polc_ir::cube::{Cube, Test};
use polc_ir::entities::{Entry, Step, Value};
use polc_ir::field::Field;
use polc_ir::interval::{Interval, IntervalSet, max_value};
use polc_ir::plan::{
    AluKind, KeySlot, LinearStep, LookupStep, Op, Operand, Plan, PlanExit, StepData, Target, WordTest,
};
use smallvec::SmallVec;

use super::random::Random;
use crate::select::trace;

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Cells for a step.
    cells: usize,
    /// Cells for all steps of a plan.
    cells_of_all: usize,
    /// Ranges that a field's values are halved into.
    ranges: usize,
    /// Tests on the ends of a field's ranges.
    tests: usize,
}

impl Effort {
    /// All cells of most rule sets of hundreds of rules: seconds at most.
    pub const THOROUGH: Effort =
        Effort { cells: 1 << 17, cells_of_all: 1 << 20, ranges: 1 << 16, tests: 1 << 22 };
    /// A sample, in milliseconds.
    pub const QUICK: Effort =
        Effort { cells: 1 << 10, cells_of_all: 1 << 12, ranges: 1 << 8, tests: 1 << 17 };
}

/// Differences that are reported for a step, and packets for each: not all values of a part go together.
const DIFFERENCES_MAX: usize = 64;
const OF_DIFFERENCE: usize = 8;
/// Entries of a stage whose fields are looked at by two threads.
const ENTRIES_FOR_A_THREAD: usize = 256;
/// Runs of values that are kept of a part.
const RUNS_OF_PART_MAX: usize = 64;
/// Runs of values of one field that packets are made for at a step, and packets for all fields at all steps.
const RUNS_MAX: usize = 64;
const BOUNDARIES_MAX: usize = 4_096;

/// What a packet is to be like that shows something.
#[derive(Clone, Debug)]
pub(super) struct Aim {
    /// The entry that it takes.
    pub(super) entry: Entry,
    /// The fields it has there.
    pub(super) fields: Cube,
}

/// What comparing the steps of a plan with the stages they decide gave.
#[derive(Clone, Debug)]
pub(super) struct Compared {
    /// Where a step's exit is not that of the entry that its stage takes.
    pub(super) differences: Vec<Aim>,
    /// Whether every cell of every stage was looked at.
    pub(super) is_complete: bool,
    /// Around the boundaries that the tables of look-up steps have: all, or as many as [`BOUNDARIES_MAX`] drawn.
    pub(super) boundaries: Vec<Aim>,
}

/// Compares the plan's steps with the stages they decide.
pub(super) fn compare(classifier: &Classifier, plan: &Plan, effort: Effort, random: &mut Random) -> Compared {
    let is_complete = plan.walk.nodes.is_empty();
    let mut compared = Compared { differences: Vec::new(), is_complete, boundaries: Vec::new() };
    let mut left = effort.cells_of_all;
    for (step, data) in &plan.steps {
        let cells = Cells::new(classifier, plan, data, effort);
        left -= cells.compare(step, left.min(effort.cells), random, &mut compared);
        if let StepData::Lookup(_) = data {
            cells.boundaries(random, &mut compared.boundaries);
        }
    }
    draw(&mut compared.boundaries, BOUNDARIES_MAX, random);
    compared
}

/// Leaves so many of all.
fn draw<T>(all: &mut Vec<T>, most: usize, random: &mut Random) {
    for at in 0..most.min(all.len()) {
        let other = at + random.below(all.len() - at);
        all.swap(at, other);
    }
    all.truncate(most);
}

/// A part of a field's values.
struct Part {
    /// The values, or the first [`RUNS_OF_PART_MAX`] runs of them.
    values: Vec<Interval>,
    /// The words of the key that hold the first value, without bits of others.
    words: Vec<u32>,
    /// For each entry of the stage, a bit: whether its tests of the field hold.
    holds: Vec<u64>,
}

/// Values of a field that are in one part, between others that are not.
struct Run {
    lo: u128,
    hi: u128,
    /// The part's entries.
    holds: Vec<u64>,
}

struct Cells<'a> {
    classifier: &'a Classifier,
    plan: &'a Plan,
    data: &'a StepData,
    entries: &'a [Entry],
    /// The fields, and the parts and the runs of each.
    fields: Vec<(KeySlot, Vec<Part>, Vec<Run>)>,
    /// Whether these are all the parts there are.
    is_complete: bool,
}

impl<'a> Cells<'a> {
    fn new(classifier: &'a Classifier, plan: &'a Plan, data: &'a StepData, effort: Effort) -> Cells<'a> {
        let entries = &classifier.stages[data.stage()].entries;
        let mut cells = Cells { classifier, plan, data, entries, fields: Vec::new(), is_complete: true };
        let of = |first: usize| -> Vec<_> {
            plan.key.iter().skip(first).step_by(2).map(|&slot| cells.parts(slot, effort)).collect()
        };
        let (even, odd) =
            if entries.len() < ENTRIES_FOR_A_THREAD { (of(0), of(1)) } else { both(|| of(0), || of(1)) };
        let (mut even, mut odd) = (even.into_iter(), odd.into_iter());
        for (at, &slot) in plan.key.iter().enumerate() {
            let parts = if at % 2 == 0 { even.next() } else { odd.next() };
            let (parts, runs, is_complete) = parts.expect("each field was looked at");
            // A field that nobody asks for has none.
            if !parts.is_empty() {
                cells.fields.push((slot, parts, runs));
                cells.is_complete &= is_complete;
            }
        }
        cells
    }

    /// Compares at most so many cells. How many it were.
    fn compare(&self, step: Step, most: usize, random: &mut Random, compared: &mut Compared) -> usize {
        let all = self.fields.iter().try_fold(1usize, |all, (_, parts, _)| all.checked_mul(parts.len()));
        let count = all.unwrap_or(usize::MAX).min(most);
        let exhaustive = all == Some(count);
        compared.is_complete &= exhaustive && self.is_complete;
        let words = self.plan.key.iter().map(|slot| usize::from(slot.word + slot.words)).max().unwrap_or(0);
        let mut key = vec![0; words];
        let mut chosen = vec![0; self.fields.len()];
        let mut values = Vec::new();
        let exits = exits(self.data);
        let mut same: BTreeMap<(usize, usize), bool> = BTreeMap::new();
        let found = &mut compared.differences;
        let room = found.len() + OF_DIFFERENCE * DIFFERENCES_MAX;
        for number in 0..count {
            let mut rest = number;
            for (chosen, (slot, parts, _)) in chosen.iter_mut().zip(&self.fields) {
                *chosen = if exhaustive { rest % parts.len() } else { random.below(parts.len()) };
                rest /= parts.len();
                for (word, own) in key[usize::from(slot.word)..].iter_mut().zip(&parts[*chosen].words) {
                    *word = *word & !slot.own() | own;
                }
            }
            let entry = self.entry(&chosen);
            let exit = exit_of(self.data, self.plan, &key, &mut values);
            let is_same = *same.entry((exit, entry)).or_insert_with(|| {
                self.is_same(step, exits[exit], &self.classifier.entries[self.entries[entry]])
            });
            if !is_same {
                let mut fields = Cube::all();
                for (&chosen, (slot, parts, _)) in chosen.iter().zip(&self.fields) {
                    let values = parts[chosen].values.iter().copied().collect();
                    let test = Test::new(slot.field, self.classifier.family, values);
                    assert!(fields.and(&test, self.classifier.family), "each field is there once");
                }
                let aim = Aim { entry: self.entries[entry], fields };
                found.extend(std::iter::repeat_n(aim, OF_DIFFERENCE));
                if found.len() == room {
                    return number + 1;
                }
            }
        }
        count
    }

    /// Packets at the ends of runs, and one inside, with an entry that takes such values.
    fn boundaries(&self, random: &mut Random, aims: &mut Vec<Aim>) {
        for (slot, _, runs) in &self.fields {
            let mut runs: Vec<&Run> = runs.iter().collect();
            draw(&mut runs, RUNS_MAX, random);
            for Run { lo, hi, holds } in runs {
                let inside = lo + random.next_u128() % (hi - lo + 1);
                for value in [*lo, *hi, inside] {
                    let count = holds.iter().map(|word| word.count_ones() as usize).sum::<usize>();
                    let number = random.below(count.max(1));
                    let mut holding =
                        (0..self.entries.len()).filter(|at| holds[at / 64] >> (at % 64) & 1 == 1);
                    let Some(entry) = holding.nth(number).map(|at| self.entries[at]) else { continue };
                    let mut fields = self.classifier.entries[entry].cube.clone();
                    let family = self.classifier.family;
                    if fields.and(&Test::new(slot.field, family, IntervalSet::point(value)), family) {
                        aims.push(Aim { entry, fields });
                    }
                }
            }
        }
    }

    /// The index of the first entry that holds for these parts.
    fn entry(&self, chosen: &[usize]) -> usize {
        for word in 0..self.entries.len().div_ceil(64) {
            let parts = self.fields.iter().zip(chosen).map(|((_, parts, _), &chosen)| &parts[chosen]);
            let holding = parts.fold(u64::MAX, |holding, part| holding & part.holds[word]);
            if holding != 0 {
                return 64 * word + holding.trailing_zeros() as usize;
            }
        }
        self.entries.len() - 1
    }

    /// Whether a plan's exit does what an entry does. What the walk table goes on with is not looked at here.
    fn is_same(&self, step: Step, exit: &PlanExit, entry: &EntryData) -> bool {
        let plan = self.plan;
        let counted =
            |slot: Option<u32>| slot.map(|slot| &plan.traces[slot as usize]) == trace(entry).as_ref();
        let leads = |target: &Target, stage| match *target {
            Target::Step(next) => next < step && plan.steps[next].stage() == stage,
            Target::Walk(_) => true,
        };
        match (exit, &entry.exit) {
            (PlanExit::End(slot), Exit::End(_) | Exit::EndIfAbsent(_)) => counted(Some(*slot)),
            (PlanExit::Then { count, writes, next }, Exit::Then { writes: wanted, stage }) => {
                let written = writes.len() == wanted.len()
                    && writes.iter().zip(wanted).all(|(write, wanted)| {
                        let slot = plan.key.iter().find(|slot| slot.field == wanted.field);
                        slot.is_some_and(|slot| {
                            let own = |bits: u128| (bits as u32) << slot.shift() & slot.own();
                            slot.word == write.word
                                && (write.clear, write.xor) == (own(wanted.clear), own(wanted.xor))
                        })
                    });
                counted(*count) && written && leads(next, *stage)
            }
            (
                PlanExit::Test { count, test, yes, no },
                Exit::Test { test: wanted, yes: wanted_yes, no: wanted_no },
            ) => counted(*count) && test == wanted && leads(yes, *wanted_yes) && leads(no, *wanted_no),
            _ => false,
        }
    }

    /// The parts of a field's values, the runs of values of one part, and whether these are all; none if neither the
    /// stage nor the step asks for the field.
    fn parts(&self, slot: KeySlot, effort: Effort) -> (Vec<Part>, Vec<Run>, bool) {
        let family = self.classifier.family;
        // The entries' tests of the field, each with the place of its entry.
        let mut asked: Vec<(&Test, usize)> = Vec::new();
        for (at, &entry) in self.entries.iter().enumerate() {
            let tests = self.classifier.entries[entry].cube.tests();
            asked.extend(tests.iter().filter(|test| test.field == slot.field).map(|test| (test, at)));
        }
        let alone = Alone::new(self.data, slot);
        if alone.is_nothing() && asked.is_empty() {
            return (Vec::new(), Vec::new(), true);
        }
        let is_device = matches!(slot.field, Field::InDevice | Field::OutDevice);
        asked.sort_unstable();
        let mut distinct: Vec<&Test> = Vec::new();
        let mut tests: Vec<SmallVec<[usize; 1]>> = vec![SmallVec::new(); self.entries.len()];
        for (test, at) in asked {
            if distinct.last().is_none_or(|last| *last != test) {
                distinct.push(test);
            }
            tests[at].push(distinct.len() - 1);
        }
        // Rules share their tests, and most have one of a field or none.
        let mut untested = vec![0u64; self.entries.len().div_ceil(64)];
        let mut with_one: Vec<Vec<usize>> = vec![Vec::new(); distinct.len()];
        let mut with_more: Vec<(usize, &[usize])> = Vec::new();
        for (entry, tests) in tests.iter().enumerate() {
            match tests[..] {
                [] => untested[entry / 64] |= 1 << (entry % 64),
                [test] => with_one[test].push(entry),
                _ => with_more.push((entry, tests)),
            }
        }
        let (values, mut is_complete) = if is_device {
            (self.devices(slot.field), true)
        } else if slot.flag.is_some() {
            (vec![0, 1], true)
        } else if slot.words == 1 {
            alone.representatives(self.plan, slot.field.bits(family), &distinct, effort.ranges)
        } else {
            (edges(&distinct, slot.field.bits(family)), false)
        };
        let most = (effort.tests / self.entries.len().max(1)).max(2);
        is_complete &= values.len() <= most;
        let top = max_value(slot.bits(slot.field.bits(family)));
        let mut parts: BTreeMap<(Vec<u64>, Vec<u64>), Part> = BTreeMap::new();
        let mut runs: Vec<Run> = Vec::new();
        let mut last = None;
        // Of a field of one word, what is true of a value is true of all up to the next.
        let is_exact = slot.words == 1 && !is_device;
        for (at, &value) in values.iter().enumerate().take(most) {
            let end = if is_exact { values.get(at + 1).map_or(top, |next| next - 1) } else { value };
            let words: Vec<u32> = if is_device {
                vec![self.plan.devices.class(value).into()]
            } else {
                slot.spread(value).collect()
            };
            let held: Vec<bool> = distinct.iter().map(|test| test.holds(value)).collect();
            let one = with_one.iter().zip(&held).filter(|(_, held)| **held).flat_map(|(entries, _)| entries);
            let more = with_more.iter().filter(|(_, tests)| tests.iter().all(|&test| held[test]));
            let mut holds = untested.clone();
            for entry in one.copied().chain(more.map(|(entry, _)| *entry)) {
                holds[entry / 64] |= 1 << (entry % 64);
            }
            let part = (alone.computed(self.plan, &words), holds.clone());
            if is_exact {
                match runs.last_mut() {
                    Some(run) if last.as_ref() == Some(&part) => run.hi = end,
                    _ => runs.push(Run { lo: value, hi: end, holds: holds.clone() }),
                }
                last = Some(part.clone());
            }
            let part = parts.entry(part).or_insert(Part { values: Vec::new(), words, holds });
            if part.values.len() < RUNS_OF_PART_MAX {
                part.values.extend(Interval::new(value, end));
            }
        }
        (parts.into_values().collect(), runs, is_complete)
    }

    /// A device of each class that packets can come or go by here.
    fn devices(&self, field: Field) -> Vec<u128> {
        let devices = &self.plan.devices;
        let fixed = if field == Field::InDevice { devices.fixed_in } else { devices.fixed_out };
        let mut of_class: BTreeMap<u16, u128> = BTreeMap::new();
        for (device, class) in &devices.devices {
            if fixed.is_none_or(|fixed| fixed == *class) {
                of_class.entry(*class).or_insert(device.name.value());
            }
        }
        of_class.into_values().collect()
    }
}

/// The exits of a step, by the number that [`exit_of`] gives.
fn exits(data: &StepData) -> Vec<&PlanExit> {
    data.exits().collect()
}

/// The number of the exit that a step takes.
fn exit_of(data: &StepData, plan: &Plan, key: &[u32], values: &mut Vec<u64>) -> usize {
    match data {
        StepData::Linear(step) => {
            let holds = |test: &WordTest| test.holds(key);
            let entry = step.entries.iter().position(|entry| {
                entry.tests.iter().all(|test| test.any.iter().any(|all| all.iter().all(holds)))
            });
            entry.expect("a step's last entry has no tests")
        }
        StepData::Lookup(step) => {
            values.clear();
            for op in step.ops.values() {
                let value = op_value(op, plan, key, values);
                values.push(value);
            }
            let exit = values[step.result.as_u32() as usize] as usize;
            (exit & (step.exits.len().next_power_of_two() - 1)).min(step.exits.len() - 1)
        }
    }
}

fn op_value(op: &Op, plan: &Plan, key: &[u32], values: &[u64]) -> u64 {
    let of = |value: Value| values[value.as_u32() as usize];
    match *op {
        Op::Word(word) => key[usize::from(word)].into(),
        Op::Const(value) => value,
        Op::Alu(kind, a, Operand::Value(b)) => kind.apply(of(a), of(b)),
        Op::Alu(kind, a, Operand::Const(b)) => kind.apply(of(a), b.into()),
        Op::Read(table, offset) => plan.tables[table].read(of(offset)),
    }
}

/// Values at which tests of a wide field change their mind, and those beside them; then those beside them in some byte, for
/// a field is searched in parts of whole bytes.
fn edges(tests: &[&Test], bits: u8) -> Vec<u128> {
    let top = max_value(bits);
    let beside = |value: u128, by: u128| {
        let both = [value.checked_sub(by), value.checked_add(by)];
        both.into_iter().flatten().filter(move |value| *value <= top)
    };
    let ends: Vec<u128> = tests
        .iter()
        .flat_map(|test| test.values.intervals())
        .flat_map(|interval| [interval.lo(), interval.hi()])
        .filter(|value| *value <= top)
        .collect();
    let mut known = BTreeSet::from([0]);
    known.extend(ends.iter().flat_map(|&end| [end].into_iter().chain(beside(end, 1))));
    let mut edges: Vec<u128> = known.iter().copied().collect();
    for byte in 1..bits.div_ceil(8) {
        let more = ends.iter().flat_map(|&end| beside(end, 1 << (8 * byte)));
        edges.extend(more.filter(|value| known.insert(*value)));
    }
    edges
}

/// What a step computes of one field alone.
struct Alone<'a> {
    slot: KeySlot,
    by: By<'a>,
}

enum By<'a> {
    /// Tests of its words.
    Tests(Vec<&'a WordTest>),
    /// The operations that depend on the field alone (or on nothing), as far as they are needed, with operands that are
    /// their places; and those whose values are used together with others, or are the result.
    Ops { ops: Vec<Op>, watched: Vec<usize> },
}

/// What the value of an operation depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Nothing,
    Field,
    Others,
}

impl<'a> Alone<'a> {
    fn new(data: &'a StepData, slot: KeySlot) -> Alone<'a> {
        let own = slot.word..slot.word + slot.words;
        let by = match data {
            StepData::Linear(LinearStep { entries, .. }) => {
                let tests = entries.iter().flat_map(|entry| &entry.tests);
                let tests = tests.flat_map(|test| test.any.iter().flatten());
                let of_it = |test: &&WordTest| own.contains(&test.word) && test.mask & slot.own() != 0;
                let mut tests: Vec<&WordTest> = tests.filter(of_it).collect();
                tests.sort_unstable();
                tests.dedup();
                By::Tests(tests)
            }
            StepData::Lookup(step) => {
                let mut on: Vec<On> = Vec::with_capacity(step.ops.len());
                let mut with_others = vec![false; step.ops.len()];
                // A word that flags share depends on all of them, until one is masked out.
                let is_shared = |op: &Op| slot.flag.is_some() && *op == Op::Word(slot.word);
                for op in step.ops.values() {
                    let mut sum = match op {
                        Op::Alu(AluKind::And, word, Operand::Const(mask))
                            if is_shared(&step.ops[*word]) && mask & !slot.own() == 0 =>
                        {
                            on.push(On::Field);
                            continue;
                        }
                        Op::Word(word) if own.contains(word) && slot.flag.is_none() => On::Field,
                        Op::Word(_) => On::Others,
                        _ => On::Nothing,
                    };
                    for operand in op.operands() {
                        sum = match (sum, on[operand.as_u32() as usize]) {
                            (On::Nothing, on) | (on, On::Nothing) => on,
                            (On::Field, On::Field) => On::Field,
                            _ => On::Others,
                        };
                    }
                    if sum == On::Others {
                        op.operands().for_each(|operand| with_others[operand.as_u32() as usize] = true);
                    }
                    on.push(sum);
                }
                with_others[step.result.as_u32() as usize] = true;
                needed(step, |at| on[at] == On::Field && with_others[at])
            }
        };
        Alone { slot, by }
    }

    fn is_nothing(&self) -> bool {
        match &self.by {
            By::Tests(tests) => tests.is_empty(),
            By::Ops { watched, .. } => watched.is_empty(),
        }
    }

    /// What the step computes of the field's words.
    fn computed(&self, plan: &Plan, words: &[u32]) -> Vec<u64> {
        let first = usize::from(self.slot.word);
        let mut key = vec![0; first];
        key.extend(words);
        match &self.by {
            By::Tests(tests) => tests.iter().map(|test| test.holds(&key).into()).collect(),
            By::Ops { ops, watched } => {
                let mut values = Vec::with_capacity(ops.len());
                for op in ops {
                    values.push(op_value(op, plan, &key, &values));
                }
                watched.iter().map(|&at| values[at]).collect()
            }
        }
    }

    /// A value of each range within which nothing changes, and whether these are all ranges.
    fn representatives(&self, plan: &Plan, bits: u8, tests: &[&Test], most: usize) -> (Vec<u128>, bool) {
        let top = max_value(bits) as u64;
        let own = |test: &WordTest| Test {
            field: self.slot.field,
            mask: test.mask.into(),
            values: IntervalSet::range(test.lo.into(), test.hi.into()),
        };
        let own: Vec<Test> = match &self.by {
            By::Tests(tests) => tests.iter().map(|test| own(test)).collect(),
            By::Ops { .. } => Vec::new(),
        };
        let open: Vec<&Test> = tests.iter().copied().chain(&own).collect();
        let mut values = Vec::new();
        let mut ranges = VecDeque::from([(Range { lo: 0, hi: top }, open)]);
        let mut known = Vec::new();
        let mut is_complete = true;
        while let Some((range, mut open)) = ranges.pop_front() {
            open.retain(|test| !is_settled(test, range));
            let is_split =
                range.lo < range.hi && (!open.is_empty() || !self.is_settled(plan, range, &mut known));
            let is_full = values.len() + ranges.len() >= most;
            if !is_split || is_full {
                is_complete &= !is_split;
                values.push(range.lo.into());
                continue;
            }
            let middle = range.lo + (range.hi - range.lo) / 2;
            ranges.push_back((Range { hi: middle, ..range }, open.clone()));
            ranges.push_back((Range { lo: middle + 1, ..range }, open));
        }
        values.sort_unstable();
        (values, is_complete)
    }

    /// Whether what is computed is the same for all of a range.
    fn is_settled(&self, plan: &Plan, range: Range, known: &mut Vec<Range>) -> bool {
        let By::Ops { ops, watched } = &self.by else { return true };
        let mut watched = watched.iter().copied().peekable();
        known.clear();
        for (at, op) in ops.iter().enumerate() {
            let of = |value: Value| known[value.as_u32() as usize];
            known.push(match *op {
                Op::Word(_) => range,
                Op::Const(value) => Range::point(value),
                Op::Alu(kind, a, Operand::Value(b)) => Range::apply(kind, of(a), of(b)),
                Op::Alu(kind, a, Operand::Const(b)) => Range::apply(kind, of(a), Range::point(b.into())),
                Op::Read(table, offset) => match of(offset).as_point() {
                    Some(offset) => Range::point(plan.tables[table].read(offset)),
                    None => Range::ANY,
                },
            });
            // Most ranges are not, and the first of the values says so.
            if watched.next_if_eq(&at).is_some() && known[at].as_point().is_none() {
                return false;
            }
        }
        true
    }
}

/// The operations that those are made of which are watched, and themselves.
fn needed(step: &LookupStep, is_watched: impl Fn(usize) -> bool) -> By<'_> {
    let mut is_needed: Vec<bool> = (0..step.ops.len()).map(&is_watched).collect();
    for (value, op) in step.ops.iter().rev() {
        if is_needed[value.as_u32() as usize] {
            op.operands().for_each(|operand| is_needed[operand.as_u32() as usize] = true);
        }
    }
    let (mut ops, mut watched) = (Vec::new(), Vec::new());
    let mut places: Vec<Value> = Vec::with_capacity(step.ops.len());
    for (at, op) in step.ops.values().enumerate() {
        let place = |value: Value| places[value.as_u32() as usize];
        let own = Value::from_u32(ops.len() as u32);
        if is_needed[at] {
            if is_watched(at) {
                watched.push(ops.len());
            }
            ops.push(match *op {
                Op::Alu(kind, a, Operand::Value(b)) => Op::Alu(kind, place(a), Operand::Value(place(b))),
                Op::Alu(kind, a, b) => Op::Alu(kind, place(a), b),
                Op::Read(table, offset) => Op::Read(table, place(offset)),
                given => given,
            });
        }
        places.push(own);
    }
    By::Ops { ops, watched }
}

/// Whether a test gives the same for all of a range.
fn is_settled(test: &Test, range: Range) -> bool {
    let masked = Range::apply(AluKind::And, range, Range::point(test.mask as u64));
    let (lo, hi) = (u128::from(masked.lo), u128::from(masked.hi));
    let intervals = test.values.intervals();
    let at = intervals.partition_point(|interval| interval.hi() < lo);
    intervals.get(at).is_none_or(|first| hi < first.lo() || first.lo() <= lo && hi <= first.hi())
}

/// Values from `lo` to `hi`, of which a result may be any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    lo: u64,
    hi: u64,
}

impl Range {
    const ANY: Range = Range { lo: 0, hi: u64::MAX };

    fn point(value: u64) -> Range {
        Range { lo: value, hi: value }
    }

    fn as_point(self) -> Option<u64> {
        (self.lo == self.hi).then_some(self.lo)
    }

    /// The bits that are the same in all values, and those that may differ.
    fn bits(self) -> (u64, u64) {
        let open = u64::MAX.checked_shr((self.lo ^ self.hi).leading_zeros()).unwrap_or(0);
        (self.lo & !open, open)
    }

    /// What arithmetic may give.
    fn apply(kind: AluKind, a: Range, b: Range) -> Range {
        let (a_bits, a_open) = a.bits();
        let (b_bits, b_open) = b.bits();
        let by_bits = |sure: u64, open: u64| Range { lo: sure & !open, hi: sure | open };
        let found = match kind {
            AluKind::Add => {
                let ((lo, low), (hi, high)) = (a.lo.overflowing_add(b.lo), a.hi.overflowing_add(b.hi));
                (low == high).then_some(Range { lo, hi })
            }
            AluKind::Sub => {
                let ((lo, low), (hi, high)) = (a.lo.overflowing_sub(b.hi), a.hi.overflowing_sub(b.lo));
                (low == high).then_some(Range { lo, hi })
            }
            AluKind::Mul => {
                a.lo.checked_mul(b.lo).zip(a.hi.checked_mul(b.hi)).map(|(lo, hi)| Range { lo, hi })
            }
            AluKind::And => {
                Some(by_bits(a_bits & b_bits, a_open & (b_bits | b_open) | b_open & (a_bits | a_open)))
            }
            AluKind::Or => Some(by_bits(a_bits | b_bits, (a_open | b_open) & !(a_bits | b_bits))),
            AluKind::Xor => Some(by_bits(a_bits ^ b_bits, a_open | b_open)),
            AluKind::Shl => b
                .as_point()
                .filter(|by| a.hi <= u64::MAX >> (by & 63))
                .map(|by| Range { lo: a.lo << (by & 63), hi: a.hi << (by & 63) }),
            AluKind::Shr | AluKind::Sar => b
                .as_point()
                .filter(|_| kind == AluKind::Shr || (a.lo ^ a.hi) >> 63 == 0)
                .map(|by| Range { lo: kind.apply(a.lo, by), hi: kind.apply(a.hi, by) }),
        };
        // Points stay exact whatever wraps.
        match (a.as_point(), b.as_point()) {
            (Some(a), Some(b)) => Range::point(kind.apply(a, b)),
            _ => found.unwrap_or(Range::ANY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever arithmetic gives of values in two ranges lies in what it may give.
    #[test]
    fn results_lie_in_their_range() {
        let kinds = [
            AluKind::Add,
            AluKind::Sub,
            AluKind::Mul,
            AluKind::And,
            AluKind::Or,
            AluKind::Xor,
            AluKind::Shl,
            AluKind::Shr,
            AluKind::Sar,
        ];
        let mut random = Random::new(1);
        let mut exact = 0;
        for _ in 0..20_000 {
            let mut range = || {
                let lo = random.next_u64() >> random.below(64);
                Range { lo, hi: lo.saturating_add(random.next_u64() >> random.below(64)) }
            };
            let (a, b) = (range(), range());
            let b = if random.one_in(2) { Range::point(b.lo & 63) } else { b };
            for kind in kinds {
                let result = Range::apply(kind, a, b);
                exact += usize::from(result != Range::ANY);
                let mut of = |range: Range| match (range.hi - range.lo).checked_add(1) {
                    Some(width) => range.lo + random.next_u64() % width,
                    None => random.next_u64(),
                };
                for (a, b) in [(a.lo, b.lo), (a.lo, b.hi), (a.hi, b.lo), (a.hi, b.hi), (of(a), of(b))] {
                    let value = kind.apply(a, b);
                    assert!(result.lo <= value && value <= result.hi, "{kind:?} {a:#x} {b:#x}: {result:x?}");
                }
            }
        }
        assert!(exact > 20_000, "{exact}");
    }
}
