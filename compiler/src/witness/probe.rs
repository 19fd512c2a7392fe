//! Probes: fields around a packet's own on which a plan and its classifier are compared directly.
//!
//! A comparison of fields costs a small part of what a packet costs in all levels and the check VM, so many more can be
//! made. They take values at which rules change their mind, in combinations that no entry asks for. Where the two
//! differ, a packet with these fields shows it to everybody.

use std::collections::{BTreeMap, BTreeSet};

use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::entities::Derived;
use polc_ir::env::Input;
use polc_ir::field::Field;
use polc_ir::interval::max_value;
use polc_ir::plan::Plan;
use polc_ir::state::State;

use super::frame::{Frames, Wanted};
use super::random::Random;

/// Probes made around each packet, and bound on probes times entries, which the reference looks at one by one.
const PROBES: usize = 24;
const WORK_MAX: usize = 4_096;
/// Probes where sets are looked up: the reference compares a packet with each element.
const PROBES_OF_SETS: usize = 2;
/// Values kept for each field.
const VALUES_MAX: usize = 1 << 16;

/// Compares a plan with its classifier.
#[derive(Debug)]
pub(super) struct Probes<'a> {
    classifier: &'a Classifier,
    plan: &'a Plan,
    /// For each field of the key that probes change, the values they take.
    values: Vec<(Field, Vec<u128>)>,
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
        for cube in elements.values().flatten() {
            add_edges(classifier, cube, &mut edges);
        }
        let values = edges
            .into_iter()
            .map(|(field, values)| (field, values.into_iter().take(VALUES_MAX).collect()))
            .collect();
        Probes { classifier, plan, values }
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
            let most = if self.classifier.members.is_empty() { PROBES } else { PROBES_OF_SETS };
            let probes = most.min(WORK_MAX / self.classifier.entries.len().max(1));
            for _ in 0..probes {
                let mut changed = Wanted::new();
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
