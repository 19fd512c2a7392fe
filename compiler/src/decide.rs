//! `decide`: how each stage's first matching entry is found.
//!
//! A stage that a structure of its own decides is a list, and so is a short one. A longer one is cut in two at a value of the field that divides it best, until the parts
//! are short or cutting would copy too many entries into both.

use cranelift_entity::SecondaryMap;
use polc_ir::classifier::Classifier;
use polc_ir::decision::{Decision, NodeData};
use polc_ir::entities::{Entry, Node, Stage};
use polc_ir::field::Field;
use polc_ir::interval::{IntervalSet, max_value};

/// Entries that are scanned rather than cut.
const LIST_ENTRIES_MAX: usize = 8;

/// Entries in all lists of a stage, as a multiple of its own.
const COPIES_MAX: usize = 4;

/// Cuts on the way to a list.
const DEPTH_MAX: usize = 40;

/// Decides every stage, those that are `walked` by few steps.
pub fn decide(classifier: &Classifier, walked: &SecondaryMap<Stage, bool>) -> Decision {
    let mut decision = Decision::default();
    for (stage, data) in classifier.stages.iter() {
        if !walked[stage] {
            let list = decision.nodes.push(NodeData::List { entries: data.entries.clone() });
            decision.roots[stage] = Some(list);
            continue;
        }
        let root = decide_walked(classifier, data.entries.clone(), &mut decision);
        decision.roots[stage] = Some(root);
    }
    decision
}

/// Adds how entries are decided by few steps, of which the last holds for all packets.
pub(crate) fn decide_walked(classifier: &Classifier, entries: Vec<Entry>, decision: &mut Decision) -> Node {
    let budget = COPIES_MAX * entries.len() + 64;
    Cutter { classifier, decision, budget }.cut(entries, 0)
}

struct Cutter<'a> {
    classifier: &'a Classifier,
    decision: &'a mut Decision,
    /// Entries that lists may still take.
    budget: usize,
}

impl Cutter<'_> {
    /// Depth is bounded by [`DEPTH_MAX`].
    fn cut(&mut self, entries: Vec<Entry>, depth: usize) -> Node {
        let short = entries.len() <= LIST_ENTRIES_MAX || depth == DEPTH_MAX;
        let best = if short { None } else { self.best(&entries) };
        let Some((field, cut)) = best else { return self.list(entries) };
        let top = max_value(field.bits(self.classifier.family));
        let low = self.part(&entries, field, &IntervalSet::range(0, cut));
        let high = self.part(&entries, field, &IntervalSet::range(cut + 1, top));
        let copies = low.len() + high.len() - entries.len();
        if copies > self.budget {
            return self.list(entries);
        }
        self.budget -= copies;
        let low = self.cut(low, depth + 1);
        let high = self.cut(high, depth + 1);
        self.decision.nodes.push(NodeData::Test { field, mask: top, edges: vec![(cut, low), (top, high)] })
    }

    fn list(&mut self, entries: Vec<Entry>) -> Node {
        self.decision.nodes.push(NodeData::List { entries })
    }

    /// The entries that can hold for a value in `values`, up to the first that holds for the whole part.
    fn part(&self, entries: &[Entry], field: Field, values: &IntervalSet) -> Vec<Entry> {
        let mask = max_value(field.bits(self.classifier.family));
        entries
            .iter()
            .copied()
            .filter(|&entry| {
                self.classifier.entries[entry]
                    .cube
                    .test(field, mask)
                    .is_none_or(|test| test.values.intersects(values))
            })
            .collect()
    }

    /// The field and value whose cut leaves the smaller larger part.
    fn best(&self, entries: &[Entry]) -> Option<(Field, u128)> {
        let family = self.classifier.family;
        let mut fields: Vec<Field> = entries
            .iter()
            .flat_map(|&entry| self.classifier.entries[entry].cube.tests())
            .filter(|test| test.mask == max_value(test.field.bits(family)))
            .map(|test| test.field)
            .collect();
        fields.sort_unstable();
        fields.dedup();
        let mut best: Option<(usize, Field, u128)> = None;
        for field in fields {
            let mask = max_value(field.bits(family));
            let mut cuts: Vec<u128> = Vec::new();
            for &entry in entries {
                let Some(test) = self.classifier.entries[entry].cube.test(field, mask) else { continue };
                for interval in test.values.intervals() {
                    cuts.extend(interval.lo().checked_sub(1));
                    cuts.extend(Some(interval.hi()).filter(|&hi| hi < mask));
                }
            }
            if cuts.is_empty() {
                continue;
            }
            let middle = cuts.len() / 2;
            let cut = *cuts.select_nth_unstable(middle).1;
            let low = self.part(entries, field, &IntervalSet::range(0, cut)).len();
            let high = self.part(entries, field, &IntervalSet::range(cut + 1, mask)).len();
            let larger = low.max(high);
            if best.is_none_or(|(size, ..)| larger < size) {
                best = Some((larger, field, cut));
            }
        }
        // A cut that leaves nearly all entries in one part only costs.
        best.filter(|(larger, ..)| larger * 10 <= entries.len() * 9).map(|(_, field, cut)| (field, cut))
    }
}
