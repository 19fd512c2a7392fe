//! Which rules of a chain cover which later ones: the index that most lints share.
//!
//! A rule's condition is a conjunction of disjunctions of tests. One covers another if each of its conjuncts follows
//! from one of the other's; that is sufficient, not necessary, so a finding is certain and a miss is possible.
//! Conjuncts of one test each are first merged by field, as [`Cube`] does.
//!
//! Rules change packets on their way through a chain (marks, TOS, the elements of sets): a rule that tests what was changed
//! in between covers none.
//!
//! To find a covering rule among tens of thousands, two ways are combined. Rules are indexed by their whole condition,
//! and a rule looks up each subset of its own conjuncts: that finds every cover that is made of the same conjuncts. And
//! rules with a range or a list somewhere, of which there are few, are kept in a bounded list that is scanned.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use cranelift_entity::SecondaryMap;
use polc_ir::cube::{Cube, Test, TestLists};
use polc_ir::entities::{Chain, Rule};
use polc_ir::field::Field;
use polc_ir::ruleset::{Action, ClauseKind, RuleData, Ruleset};
use polc_ir::source::Span;

use super::ends_chain;

/// Rules with wide conditions that each rule is compared with, nearest first.
const WIDE_RULES_COMPARED_MAX: usize = 128;

/// Conjuncts of which all subsets are looked up; rules with more are only compared with wide ones.
const SUBSET_CONJUNCTS_MAX: usize = 8;

/// A rule's condition, as far as it is evaluated here.
#[derive(Clone, Debug, Default)]
pub(super) struct Condition {
    /// Each a disjunction of tests, sorted.
    conjuncts: Vec<Arc<[Test]>>,
    /// Whether the condition holds exactly where all conjuncts do. Not so with clauses that nothing here evaluates.
    exact: bool,
    /// Two clauses that no packet satisfies together, or one twice.
    contradiction: Option<(Span, Span)>,
}

impl Condition {
    fn new(ruleset: &Ruleset, rule: &RuleData, lists: &mut TestLists) -> Condition {
        let family = ruleset.family;
        let mut cube = Cube::all();
        let mut single: Vec<(&Test, Span)> = Vec::new();
        let mut condition = Condition { exact: true, ..Condition::default() };
        for clause in &rule.clauses {
            match &clause.kind {
                ClauseKind::Any(tests) => match &**tests {
                    [test] => {
                        if condition.contradiction.is_none() && !cube.and(test, family) {
                            let other = single
                                .iter()
                                .rev()
                                .find(|(before, _)| (before.field, before.mask) == (test.field, test.mask));
                            condition.contradiction =
                                Some((other.map_or(clause.span, |(_, span)| *span), clause.span));
                        }
                        single.push((test, clause.span));
                    }
                    tests if tests.iter().all(|test| test.values.is_empty()) => {
                        condition.contradiction.get_or_insert((clause.span, clause.span));
                    }
                    tests => {
                        let mut tests = tests.to_vec();
                        tests.sort_unstable();
                        condition.conjuncts.push(lists.list(&tests));
                    }
                },
                // The packet goes no further whether a hotdrop or the rule's action takes it.
                ClauseKind::Hotdrop(_) | ClauseKind::Doom(_) => {}
                // The kernel itself follows to the end.
                ClauseKind::Beyond(_) => {}
                ClauseKind::Effect(_) | ClauseKind::Opaque(_) => condition.exact = false,
            }
        }
        let singles = cube.tests().iter().map(|test| lists.list(std::slice::from_ref(test)));
        condition.conjuncts.extend(singles);
        condition.conjuncts.sort_unstable();
        condition.conjuncts.dedup();
        condition.conjuncts.shrink_to_fit();
        condition
    }

    /// Whether every packet that satisfies `other` satisfies this. Certain if true.
    pub(super) fn covers(&self, other: &Condition) -> bool {
        self.exact
            && self.conjuncts.iter().all(|wide| {
                other.conjuncts.iter().any(|narrow| {
                    narrow.iter().all(|narrow| {
                        wide.iter().any(|wide| {
                            (wide.field, wide.mask) == (narrow.field, narrow.mask)
                                && wide.values.is_superset(&narrow.values)
                        })
                    })
                })
            })
    }

    /// Whether both hold for the same packets. Certain if true.
    pub(super) fn equals(&self, other: &Condition) -> bool {
        self.exact && other.exact && self.conjuncts == other.conjuncts
    }

    /// Whether no packet satisfies both. Certain if true.
    pub(super) fn excludes(&self, other: &Condition) -> bool {
        self.conjuncts.iter().filter(|tests| tests.len() == 1).any(|one| {
            other.conjuncts.iter().filter(|tests| tests.len() == 1).any(|two| {
                (one[0].field, one[0].mask) == (two[0].field, two[0].mask)
                    && !one[0].values.intersects(&two[0].values)
            })
        })
    }

    /// Whether no packet for which the test holds satisfies it. Certain if true.
    pub(super) fn excludes_test(&self, test: &Test) -> bool {
        let of_field = |own: &Test| (own.field, own.mask) == (test.field, test.mask);
        self.conjuncts
            .iter()
            .any(|tests| tests.iter().all(|own| of_field(own) && !own.values.intersects(&test.values)))
    }

    /// Whether every packet satisfies it.
    pub(super) fn is_always(&self) -> bool {
        self.exact && self.conjuncts.is_empty()
    }

    /// The clauses that contradict each other.
    pub(super) fn contradiction(&self) -> Option<(Span, Span)> {
        self.contradiction
    }

    /// Whether a range, a prefix, a list or a disjunction is among the conjuncts, so that a narrower condition need not
    /// contain the same conjuncts.
    fn is_wide(&self) -> bool {
        self.conjuncts.iter().any(|tests| tests.len() > 1 || tests[0].values.as_point().is_none())
    }
}

/// What a packet may not have any more what it had before.
#[derive(Clone, Debug, Default)]
struct Changes {
    fields: BTreeSet<Field>,
    /// What follows from fields or from sets' elements: membership, what programs read.
    derived: bool,
}

impl Changes {
    fn add(&mut self, other: &Changes) {
        self.fields.extend(&other.fields);
        self.derived |= other.derived;
    }
}

/// Where in a chain each field was last changed: behind so many rules.
#[derive(Default)]
struct Changed {
    fields: BTreeMap<Field, usize>,
    derived: usize,
}

impl Changed {
    fn note(&mut self, changes: &Changes, behind: usize) {
        self.fields.extend(changes.fields.iter().map(|&field| (field, behind)));
        if changes.derived {
            self.derived = behind;
        }
    }

    /// Whether all that a condition tests is as it was at this place of the chain.
    fn none_of(&self, condition: &Condition, at: usize) -> bool {
        condition.conjuncts.iter().flat_map(|tests| tests.iter()).all(|test| match test.field {
            Field::Derived(_) => self.derived <= at,
            field => self.fields.get(&field).is_none_or(|&changed| changed <= at),
        })
    }
}

/// The conditions of all rules, and the nearest earlier rule that covers each.
#[derive(Debug)]
pub(super) struct Covers {
    conditions: SecondaryMap<Rule, Condition>,
    cover: SecondaryMap<Rule, Option<Rule>>,
    barrier: SecondaryMap<Chain, Option<Rule>>,
    /// Chains that no packet comes back from.
    ends: SecondaryMap<Chain, bool>,
    /// What a packet may have otherwise behind a chain.
    changes: SecondaryMap<Chain, Changes>,
}

impl Covers {
    pub(super) fn new(ruleset: &Ruleset) -> Covers {
        let mut covers = Covers {
            conditions: SecondaryMap::new(),
            cover: SecondaryMap::new(),
            barrier: SecondaryMap::new(),
            ends: SecondaryMap::new(),
            changes: SecondaryMap::new(),
        };
        let mut lists = TestLists::default();
        for (rule, data) in &ruleset.rules {
            covers.conditions[rule] = Condition::new(ruleset, data, &mut lists);
        }
        covers.follow_chains(ruleset);
        for (chain, data) in &ruleset.chains {
            covers.chain(ruleset, chain, &data.rules);
        }
        covers
    }

    /// A rule's condition.
    pub(super) fn condition(&self, rule: Rule) -> &Condition {
        &self.conditions[rule]
    }

    /// An earlier rule of the same chain that decides every packet this rule could match. Rules behind one that
    /// matches everything have none: [`Covers::barrier`] has them all.
    pub(super) fn cover(&self, rule: Rule) -> Option<Rule> {
        self.cover[rule]
    }

    /// The first rule of a chain that matches everything and lets nothing pass.
    pub(super) fn barrier(&self, chain: Chain) -> Option<Rule> {
        self.barrier[chain]
    }

    /// Which chains decide every packet, and what they change: callees first. Jumps lead in a circle only where no packet
    /// comes to; which chain of one is last does not matter.
    fn follow_chains(&mut self, ruleset: &Ruleset) {
        let mut entered: SecondaryMap<Chain, bool> = SecondaryMap::new();
        let mut known: SecondaryMap<Chain, bool> = SecondaryMap::new();
        for root in ruleset.chains.keys() {
            let mut pending = vec![root];
            while let Some(&chain) = pending.last() {
                if known[chain] {
                    pending.pop();
                    continue;
                }
                if !std::mem::replace(&mut entered[chain], true) {
                    let actions = ruleset.chains[chain].rules.iter().map(|rule| &ruleset.rules[*rule].action);
                    let callees = actions.filter_map(|action| match action {
                        Action::Jump(to) | Action::Goto(to) => Some(*to),
                        _ => None,
                    });
                    pending.extend(callees.filter(|callee| !entered[*callee]));
                    continue;
                }
                self.ends[chain] = self.decides_all(ruleset, chain);
                let mut changes = Changes::default();
                for &rule in &ruleset.chains[chain].rules {
                    self.add_changes(&ruleset.rules[rule].action, &mut changes);
                }
                self.changes[chain] = changes;
                known[chain] = true;
            }
        }
    }

    /// Adds what an action changes, given what chains do.
    fn add_changes(&self, action: &Action, changes: &mut Changes) {
        let written = match action {
            Action::Jump(to) | Action::Goto(to) => return changes.add(&self.changes[*to]),
            Action::Write(write) => std::slice::from_ref(&write.field),
            Action::Effect { writes, sets, .. } => {
                changes.derived |= !sets.is_empty();
                writes
            }
            _ => return,
        };
        changes.derived |= !written.is_empty();
        changes.fields.extend(written);
    }

    /// Whether no packet comes back from a chain, given those that it leads to.
    fn decides_all(&self, ruleset: &Ruleset, chain: Chain) -> bool {
        for &rule in &ruleset.chains[chain].rules {
            let condition = &self.conditions[rule];
            if condition.contradiction.is_some() {
                continue;
            }
            let ends = match ruleset.rules[rule].action {
                Action::Return => return false,
                Action::Goto(to) if !self.ends[to] => return false,
                Action::Goto(_) => true,
                Action::Jump(to) => self.ends[to],
                ref action => action.ends(),
            };
            if ends && condition.is_always() {
                return true;
            }
        }
        false
    }

    /// Whether no packet that matches a rule with this action is looked at by a later rule of the same chain.
    fn lets_none_on(&self, action: &Action) -> bool {
        ends_chain(action) || matches!(action, Action::Jump(to) if self.ends[*to])
    }

    fn chain(&mut self, ruleset: &Ruleset, chain: Chain, rules: &[Rule]) {
        let mut before = Before { exact: HashMap::new(), wide: Vec::new(), changed: Changed::default() };
        let mut subset: Vec<Arc<[Test]>> = Vec::new();
        for (at, &rule) in rules.iter().enumerate() {
            let condition = &self.conditions[rule];
            let action = &ruleset.rules[rule].action;
            if condition.contradiction.is_some() {
                continue;
            }
            self.cover[rule] = before.find(&self.conditions, condition, &mut subset);
            if condition.exact && self.lets_none_on(action) {
                if condition.is_always() {
                    self.barrier[chain] = Some(rule);
                    return;
                }
                before.add(&self.conditions, at, rule);
            }
            let mut changes = Changes::default();
            self.add_changes(action, &mut changes);
            before.changed.note(&changes, at + 1);
        }
    }
}

/// The rules of a chain that let none of their packets on, up to some place.
struct Before<'a> {
    /// By their conditions; with each its place.
    exact: HashMap<&'a [Arc<[Test]>], (usize, Rule)>,
    /// Those with wide conditions.
    wide: Vec<(usize, Rule)>,
    changed: Changed,
}

impl<'a> Before<'a> {
    fn add(&mut self, conditions: &'a SecondaryMap<Rule, Condition>, at: usize, rule: Rule) {
        let condition = &conditions[rule];
        let first = self.exact.entry(&condition.conjuncts).or_insert((at, rule));
        if !self.changed.none_of(condition, first.0) {
            *first = (at, rule);
        }
        if condition.is_wide() {
            self.wide.push((at, rule));
        }
    }

    /// A rule that every packet of the condition would have matched.
    fn find(
        &self,
        conditions: &SecondaryMap<Rule, Condition>,
        condition: &Condition,
        subset: &mut Vec<Arc<[Test]>>,
    ) -> Option<Rule> {
        let holds = |&&(at, rule): &&(usize, Rule)| self.changed.none_of(&conditions[rule], at);
        let count = condition.conjuncts.len();
        if count <= SUBSET_CONJUNCTS_MAX {
            // From the whole condition down, so that a rule with the same condition is found first.
            for chosen in (1u32..1 << count).rev() {
                subset.clear();
                let members = condition.conjuncts.iter().enumerate().filter(|(at, _)| chosen >> at & 1 == 1);
                subset.extend(members.map(|(_, conjunct)| conjunct.clone()));
                if let Some((_, found)) = self.exact.get(subset.as_slice()).filter(holds) {
                    return Some(*found);
                }
            }
        }
        let compared = self.wide.iter().rev().take(WIDE_RULES_COMPARED_MAX).filter(holds);
        compared.map(|(_, rule)| *rule).find(|&rule| conditions[rule].covers(condition))
    }
}
