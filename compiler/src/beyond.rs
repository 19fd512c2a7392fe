//! `beyond`: which rules a bound leaves to the kernel.
//!
//! Where a bound ends a program's way through the rules, packets that come so far are left to the kernel. Others may never
//! come there, and rules far behind may decide them: what counts is whether some packet that takes a rule is decided in the
//! end.

use std::collections::{BTreeMap, BTreeSet};

use cranelift_entity::SecondaryMap;
use polc_ir::classifier::{Classifier, EntryData, Exit, Origin};
use polc_ir::entities::{Rule, Stage};
use polc_ir::outcome::Count;

use crate::select::is_rare;

/// What packets don't get to because of bounds.
#[derive(Clone, Debug, Default)]
pub struct Beyond {
    /// Where ways end that begin there: how many rules of the chain are before.
    ends: BTreeMap<Origin, u32>,
    /// The rules that entries were made of.
    listed: SecondaryMap<Rule, bool>,
    /// Those of them whose packets are all left to the kernel.
    left: BTreeSet<Rule>,
}

impl Beyond {
    /// Whether no bound was met.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty() && self.left.is_empty()
    }

    /// How many rules of its chain are before the end of a way that begins at `origin`, if a bound ends it.
    pub fn end(&self, origin: Origin) -> Option<u32> {
        self.ends.get(&origin).copied()
    }

    /// Where ways end: a chain, and how many of its rules are before.
    pub fn ends(&self) -> impl Iterator<Item = Origin> {
        self.ends.iter().map(|(&(chain, _), &end)| (chain, end))
    }

    /// The rules whose packets are all left to the kernel because of a bound.
    pub fn left(&self) -> impl Iterator<Item = Rule> {
        self.left.iter().copied()
    }

    /// Whether a rule's packets are all left to the kernel; `None` if there are no entries of the rule to tell by.
    pub fn is_left(&self, rule: Rule) -> Option<bool> {
        self.listed[rule].then(|| self.left.contains(&rule))
    }

    /// Adds that ways which begin at `origin` end where so many rules of the chain are before.
    pub fn add_end(&mut self, origin: Origin, end: u32) {
        let known = self.ends.entry(origin).or_insert(end);
        *known = end.min(*known);
    }

    /// Adds the rules of a classifier in which bounds leave only the first entries of stages, as many as `kept` says.
    ///
    /// A rule that only rare packets take, such as fragments, is judged by them; all others by packets that are not.
    pub fn add_rules(&mut self, classifier: &Classifier, kept: impl Fn(Stage) -> usize) {
        // Stages lead to smaller numbers.
        let mut decides: SecondaryMap<Stage, bool> = SecondaryMap::new();
        for (stage, data) in &classifier.stages {
            decides[stage] = data
                .entries
                .iter()
                .take(kept(stage))
                .any(|&entry| is_decided(&classifier.entries[entry], &decides));
        }
        let mut usual: SecondaryMap<Rule, Option<bool>> = SecondaryMap::new();
        let mut rare: SecondaryMap<Rule, Option<bool>> = SecondaryMap::new();
        let mut ways: SecondaryMap<Stage, Ways> = SecondaryMap::new();
        ways[classifier.root] = Ways { listed: Met::ByUsual, kept: Met::ByUsual };
        for stage in classifier.stages.keys().rev().filter(|&stage| stage <= classifier.root) {
            let way = ways[stage];
            let own_kept = kept(stage);
            for (at, &entry) in classifier.stages[stage].entries.iter().enumerate() {
                let entry = &classifier.entries[entry];
                let most = if entry.cube.tests().iter().any(is_rare) { Met::ByRare } else { Met::ByUsual };
                let listed = way.listed.min(most);
                let kept = if at < own_kept { way.kept.min(most) } else { Met::Never };
                for next in entry.exit.successors() {
                    ways[next].listed = listed.max(ways[next].listed);
                    ways[next].kept = kept.max(ways[next].kept);
                }
                let rules = match listed {
                    Met::Never => continue,
                    Met::ByRare => &mut rare,
                    Met::ByUsual => &mut usual,
                };
                let is_decided = kept == listed && is_decided(entry, &decides);
                for rule in rules_of(entry) {
                    *rules[rule].get_or_insert(false) |= is_decided;
                }
            }
        }
        let rules: Vec<Rule> = usual.keys().chain(rare.keys()).collect();
        for rule in rules {
            if let Some(is_decided) = usual[rule].or(rare[rule]) {
                self.listed[rule] = true;
                if !is_decided {
                    self.left.insert(rule);
                }
            }
        }
    }
}

/// Which packets meet a stage or an entry.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Met {
    #[default]
    Never,
    /// Rare ones alone: fragments, and those that are cut short.
    ByRare,
    ByUsual,
}

/// Which packets come to a stage.
#[derive(Clone, Copy, Default)]
struct Ways {
    /// Were there no bounds.
    listed: Met,
    /// Within the bounds.
    kept: Met,
}

/// Whether packets that take an entry may be decided, as stages decide that it leads to.
fn is_decided(entry: &EntryData, decides: &SecondaryMap<Stage, bool>) -> bool {
    match entry.exit {
        Exit::End(_) | Exit::EndIfAbsent(_) => true,
        Exit::Then { .. } | Exit::Test { .. } => entry.exit.successors().any(|next| decides[next]),
    }
}

/// The rules that packets take with an entry.
fn rules_of(entry: &EntryData) -> impl Iterator<Item = Rule> {
    let counted = entry.counts.iter().filter_map(|count| match count {
        Count::Rule(rule) => Some(*rule),
        Count::Policy(_) => None,
    });
    entry.rule.into_iter().chain(counted)
}
