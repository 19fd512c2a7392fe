//! Probes: fields around a packet's own on which a plan and its classifier are compared directly.
//!
//! A comparison of fields costs a small part of what a packet costs in all levels and the check VM, so many more can be
//! made. They take values at which rules change their mind, in combinations that no entry asks for, and values at which
//! the plan's tables change though no rule does. Where the two differ, a packet with these fields shows it to everybody.

use std::collections::{BTreeMap, BTreeSet};

use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::entities::{Derived, Value};
use polc_ir::env::Input;
use polc_ir::field::Field;
use polc_ir::interval::max_value;
use polc_ir::plan::{LookupStep, Op, Operand, Plan, StepData};
use polc_ir::state::State;

use super::frame::{Frames, Wanted};
use super::random::Random;

/// Probes made around each packet.
const PROBES: usize = 24;
/// Values kept for each field.
const VALUES_MAX: usize = 1 << 16;
/// Values of one word that a look-up step is swept over, and in all steps together.
const SWEEP_MAX: usize = 1 << 16;
const SWEEPS_MAX: usize = 1 << 22;

/// Compares a plan with its classifier.
#[derive(Debug)]
pub(super) struct Probes<'a> {
    classifier: &'a Classifier,
    plan: &'a Plan,
    /// For each field of the key that probes change, the values they take.
    values: Vec<(Field, Vec<u128>)>,
    /// Values of a field at which tables change though no rule does.
    suspects: Vec<(Field, u128)>,
}

impl<'a> Probes<'a> {
    pub(super) fn new(
        classifier: &'a Classifier,
        plan: &'a Plan,
        elements: &BTreeMap<Derived, Vec<Cube>>,
    ) -> Probes<'a> {
        let mut edges: BTreeMap<Field, BTreeSet<u128>> = BTreeMap::new();
        for entry in classifier.entries.values() {
            add_edges(classifier, &entry.cube, &mut edges);
        }
        let mut suspects = BTreeSet::new();
        let mut left = SWEEPS_MAX;
        for step in plan.steps.values() {
            if let StepData::Lookup(step) = step {
                sweep(plan, step, &edges, &mut suspects, &mut left);
            }
        }
        // Steps are told what is in a set: its elements are no edges of theirs.
        for cube in elements.values().flatten() {
            add_edges(classifier, cube, &mut edges);
        }
        let values = edges
            .into_iter()
            .map(|(field, values)| (field, values.into_iter().take(VALUES_MAX).collect()))
            .collect();
        Probes { classifier, plan, values, suspects: suspects.into_iter().collect() }
    }

    /// Fields like those of a packet on which the two differ, if a few attempts find any.
    pub(super) fn differing(
        &self,
        frames: &Frames<'_>,
        input: &Input,
        random: &mut Random,
    ) -> Option<Wanted> {
        if self.values.is_empty() || !self.plan.effect_tests.is_empty() {
            return None;
        }
        let mut found = None;
        frames.given(self.classifier, input, &mut |given| {
            // A plan for one device is not told of others.
            let devices = &self.plan.devices;
            let fixed = [(Field::InDevice, devices.fixed_in), (Field::OutDevice, devices.fixed_out)];
            if fixed.iter().any(|(field, of)| of.is_some_and(|of| devices.class(given(*field)) != of)) {
                return;
            }
            for _ in 0..PROBES {
                let mut changed = Wanted::new();
                if !self.suspects.is_empty() && random.one_in(2) {
                    let (field, value) = self.suspects[random.below(self.suspects.len())];
                    changed.insert(field, value);
                }
                for _ in 0..1 + random.below(2) {
                    let (field, values) = &self.values[random.below(self.values.len())];
                    changed.entry(*field).or_insert_with(|| values[random.below(values.len())]);
                }
                let plain = |field: Field| changed.get(&field).copied().unwrap_or_else(|| given(field));
                let fields = |field: Field| match field {
                    // What is in a set follows from the other fields.
                    Field::Derived(id) => self
                        .classifier
                        .member(id, &mut |field| plain(field))
                        .map_or_else(|| plain(field), u128::from),
                    field => plain(field),
                };
                let plan = self.plan.eval(&fields, &mut State::new(1));
                if plan != self.classifier.eval(&fields, &mut State::new(1)) {
                    let own = self.plan.key.iter().filter(|slot| slot.field != Field::ExtHeaders);
                    found = Some(own.map(|slot| (slot.field, fields(slot.field))).collect());
                    return;
                }
            }
        });
        found
    }
}

/// Adds the values at which a cube's tests change their mind, and those just beyond.
fn add_edges(classifier: &Classifier, cube: &Cube, edges: &mut BTreeMap<Field, BTreeSet<u128>>) {
    for test in cube.tests() {
        let looked_up = matches!(test.field, Field::Derived(id) if classifier.members.contains(&id));
        if looked_up || matches!(test.field, Field::InDevice | Field::OutDevice | Field::Fragment) {
            continue;
        }
        let top = max_value(test.field.bits(classifier.family));
        let values = edges.entry(test.field).or_default();
        for interval in test.values.intervals() {
            let outside = [interval.lo().checked_sub(1), interval.hi().checked_add(1)];
            let all = [interval.lo(), interval.hi()].into_iter().chain(outside.into_iter().flatten());
            values.extend(all.filter(|value| *value <= top));
        }
    }
}

/// Which words of the key a value is computed from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Nothing,
    Word(u8),
    Several,
}

impl From {
    fn and(self, other: From) -> From {
        match (self, other) {
            (From::Nothing, from) | (from, From::Nothing) => from,
            (one, other) if one == other => one,
            _ => From::Several,
        }
    }
}

/// Looks for values of single words at which what a step computes of the word alone changes, but no rule does.
fn sweep(
    plan: &Plan,
    step: &LookupStep,
    edges: &BTreeMap<Field, BTreeSet<u128>>,
    suspects: &mut BTreeSet<(Field, u128)>,
    left: &mut usize,
) {
    let mut from: Vec<From> = Vec::with_capacity(step.ops.len());
    let mut used_with_others: Vec<bool> = vec![false; step.ops.len()];
    for op in step.ops.values() {
        let own = match op {
            Op::Word(word) => From::Word(*word),
            Op::Const(_) => From::Nothing,
            _ => op.operands().fold(From::Nothing, |sum, operand| sum.and(from[operand.as_u32() as usize])),
        };
        if own == From::Several {
            op.operands().for_each(|operand| used_with_others[operand.as_u32() as usize] = true);
        }
        from.push(own);
    }
    used_with_others[step.result.as_u32() as usize] = true;
    for slot in plan.key.iter().filter(|slot| slot.words == 1) {
        let Some(edges) = edges.get(&slot.field) else { continue };
        let word = From::Word(slot.word);
        let last = (0..from.len()).rev().find(|&at| from[at] == word && used_with_others[at]);
        let Some(last) = last else { continue };
        let watched: Vec<usize> = (0..=last).filter(|&at| from[at] == word && used_with_others[at]).collect();
        let bits = slot.field.bits(plan.family);
        let shift = u32::from(bits).saturating_sub(SWEEP_MAX.ilog2());
        let mut before: Option<Vec<u64>> = None;
        let mut values = Vec::new();
        for index in 0..SWEEP_MAX.min(1 << bits.min(16)) as u128 {
            if *left == 0 {
                return;
            }
            *left -= 1;
            let value = index << shift;
            alone(plan, step, &from, word, value as u32, last, &mut values);
            let classes: Vec<u64> = watched.iter().map(|&at| values[at]).collect();
            if before.as_ref().is_some_and(|before| *before != classes) {
                // Rules change between this value and the one before?
                let earlier = (index - 1) << shift;
                if edges.range(earlier..=value).next().is_none() {
                    suspects.extend([(slot.field, value), (slot.field, earlier)]);
                }
            }
            before = Some(classes);
        }
    }
}

/// Computes the values that depend on one word alone, up to `last`.
fn alone(
    plan: &Plan,
    step: &LookupStep,
    from: &[From],
    word: From,
    input: u32,
    last: usize,
    values: &mut Vec<u64>,
) {
    values.clear();
    for (at, op) in step.ops.values().enumerate().take(last + 1) {
        let of = |value: Value| values[value.as_u32() as usize];
        let value = if from[at] != word && from[at] != From::Nothing {
            0
        } else {
            match *op {
                Op::Word(_) => input.into(),
                Op::Const(value) => value,
                Op::Alu(kind, a, Operand::Value(b)) => kind.apply(of(a), of(b)),
                Op::Alu(kind, a, Operand::Const(b)) => kind.apply(of(a), b.into()),
                Op::Read(table, offset) => plan.tables[table].read(of(offset)),
            }
        };
        values.push(value);
    }
}
