//! `Classifier::eval`: entries tried one after another.

use super::{Classifier, Exit};
use crate::derived::DerivedData;
use crate::entities::{Derived, Entry, Stage};
use crate::env::Fragments;
use crate::field::Field;
use crate::outcome::{Ending, Outcome, Verdict};
use crate::set;
use crate::state::State;

/// A packet's fields: those given, and those written on the way.
pub struct Fields<'a> {
    given: &'a dyn Fn(Field) -> u128,
    written: Vec<(Field, u128)>,
}

impl<'a> Fields<'a> {
    /// The fields that `given` gives.
    pub fn new(given: &'a dyn Fn(Field) -> u128) -> Fields<'a> {
        Fields { given, written: Vec::new() }
    }

    /// A field's value now.
    pub fn get(&self, field: Field) -> u128 {
        let written = self.written.iter().rev().find(|(written, _)| *written == field);
        written.map_or_else(|| (self.given)(field), |(_, value)| *value)
    }

    /// Changes a field.
    pub fn set(&mut self, field: Field, value: u128) {
        self.written.push((field, value));
    }
}

impl std::fmt::Debug for Fields<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fields").field("written", &self.written).finish_non_exhaustive()
    }
}

impl Classifier {
    /// The value of a field of [`Self::members`] for a packet whose other fields `value` gives; `None` for other fields.
    pub fn member(&self, field: Derived, value: &mut impl FnMut(Field) -> u128) -> Option<u32> {
        let DerivedData::Member { set, ends, return_nomatch } = &self.derived[field] else { return None };
        let is_given = self.members.contains(&field);
        let as_seen = self.place.fragments == Fragments::AsSeen;
        // To rules that see reassembled packets, no packet has an offset.
        let mut value = |field| if field == Field::FragOffset && !as_seen { 0 } else { value(field) };
        is_given.then(|| set::holds(&self.sets, self.family, *set, ends, *return_nomatch, &mut value).into())
    }

    /// What becomes of a packet with these fields.
    pub fn eval(&self, given: &dyn Fn(Field) -> u128, state: &mut State) -> Outcome {
        self.eval_noting(given, state, &mut |_| ())
    }

    /// The same, and tells `note` each entry that the packet takes.
    pub fn eval_noting(
        &self,
        given: &dyn Fn(Field) -> u128,
        state: &mut State,
        note: &mut dyn FnMut(Entry),
    ) -> Outcome {
        self.eval_by(given, state, |stage, fields| {
            let first = self.first_of(&self.stages[stage].entries, fields);
            let taken = first.expect("a stage's last entry always holds");
            note(taken);
            taken
        })
    }

    /// The first of these entries that holds for a packet with these fields.
    pub fn first_of(&self, entries: &[Entry], fields: &Fields<'_>) -> Option<Entry> {
        let holds = |entry: &&Entry| self.entries[**entry].cube.holds(|field| fields.get(field));
        entries.iter().find(holds).copied()
    }

    /// The same, with each stage decided by `decide`.
    pub fn eval_by(
        &self,
        given: &dyn Fn(Field) -> u128,
        state: &mut State,
        decide: impl FnMut(Stage, &Fields<'_>) -> Entry,
    ) -> Outcome {
        let mut fields = Fields::new(given);
        let ending = self.eval_with(&mut fields, state, decide);
        let counted = std::mem::take(&mut state.counted);
        Outcome { ending, mark: fields.get(Field::Mark) as u32, counted }
    }

    /// Runs stages, each decided by `decide`, to the ending.
    pub fn eval_with(
        &self,
        fields: &mut Fields<'_>,
        state: &mut State,
        mut decide: impl FnMut(Stage, &Fields<'_>) -> Entry,
    ) -> Ending {
        let mut stage = self.root;
        loop {
            let entry = &self.entries[decide(stage, fields)];
            state.counted.extend(&entry.counts);
            match &entry.exit {
                Exit::End(ending) => return *ending,
                Exit::EndIfAbsent(ending) => {
                    let absent = fields.get(Field::CtAbsent) != 0;
                    return Ending {
                        verdict: if absent { ending.verdict } else { Verdict::Defer },
                        ..*ending
                    };
                }
                Exit::Then { writes, stage: next } => {
                    for write in writes {
                        let value = write.apply(fields.get(write.field));
                        fields.set(write.field, value);
                    }
                    stage = *next;
                }
                Exit::Test { test, yes, no } => {
                    let kind = self.effect_tests[*test].kind;
                    let holds = state.effect_test(*test, kind);
                    stage = if holds.expect("only tests without a clock are compiled") { *yes } else { *no };
                }
            }
        }
    }

    /// Everything wrong with the classifier's shape: stages that are not total or lead upwards.
    pub fn verify(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (stage, data) in self.stages.iter() {
            if !data.entries.last().is_some_and(|&entry| self.entries[entry].cube.is_all()) {
                wrong.push(format!("{stage} does not decide every packet"));
            }
            for &entry in &data.entries {
                let data = &self.entries[entry];
                if data.stage != stage {
                    wrong.push(format!("{entry} of {stage} says it is in {}", data.stage));
                }
                if data.exit.successors().any(|next| next >= stage) {
                    wrong.push(format!("{entry} of {stage} leads to {}, which is not below", data.exit));
                }
            }
        }
        wrong
    }
}
