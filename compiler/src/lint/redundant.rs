//! Rules that change nothing: a later rule of the chain does the same with all of their packets, and nothing between
//! could do otherwise.
//!
//! Counters differ with and without such a rule, verdicts don't. A match that can't read its header drops the packet
//! whatever the rule says (hotdrop); so a rule with such a match is redundant only if the next one drops the same.

use polc_ir::diag::Diagnostic;
use polc_ir::entities::Rule;
use polc_ir::ruleset::{Action, Clause, ClauseKind, RuleData};

use super::cover::{Condition, Covers};
use super::{REDUNDANT, ends_chain};
use crate::session::Session;

/// How many of the following rules are looked at.
const LOOKED_AT_MAX: usize = 64;

pub(super) fn find(session: &Session, covers: &Covers) -> impl Iterator<Item = Diagnostic> {
    session.ruleset.chains.iter().flat_map(move |(chain, data)| {
        let end = match covers.barrier(chain) {
            Some(barrier) => data.rules.iter().position(|&rule| rule == barrier).map_or(0, |at| at + 1),
            None => data.rules.len(),
        };
        let rules = &data.rules[..end];
        (0..end).filter_map(move |at| redundant(session, covers, &rules[at..]))
    })
}

/// What is said of the first of these rules of a chain, if one behind it makes it redundant.
fn redundant(session: &Session, covers: &Covers, rules: &[Rule]) -> Option<Diagnostic> {
    let ruleset = &session.ruleset;
    let (&rule, behind) = rules.split_first()?;
    let this = &ruleset.rules[rule];
    let condition = covers.condition(rule);
    let plain = matches!(this.action, Action::Accept | Action::Drop | Action::Reject(_) | Action::Return);
    if !plain || !is_pure(this) || covers.cover(rule).is_some() || condition.contradiction().is_some() {
        return None;
    }
    if !drops_unread_as(&ruleset.rules[*behind.first()?], this) {
        return None;
    }
    for &later in behind.iter().take(LOOKED_AT_MAX) {
        let other = &ruleset.rules[later];
        // It may drop what this rule lets by unread.
        if this.action != Action::Drop && !drops_no_more(other, this, condition) {
            return None;
        }
        if other.action == this.action && other.span != this.span && covers.condition(later).covers(condition)
        {
            let line = session.line_of(later);
            let message = format!("without this rule, line {line} decides its packets in the same way");
            return Some(
                Diagnostic::warning(REDUNDANT, message, this.span)
                    .with_label(other.span, "the same verdict for these packets and more")
                    .with_hint("remove the rule, unless its counters are wanted"),
            );
        }
        // Another verdict, or a change that can be seen, for packets of this rule's.
        let harmless = other.action == this.action && ends_chain(&other.action) && is_pure(other);
        if !harmless && !covers.condition(later).excludes(condition) {
            return None;
        }
    }
    None
}

/// Whether a rule drops every packet that `rule` would have dropped because it can't be read: for each of its drops it has
/// the same, behind no more conditions.
fn drops_unread_as(next: &RuleData, rule: &RuleData) -> bool {
    let has = |clauses: &[Clause], wanted: &Clause| {
        clauses.iter().any(|clause| match (&clause.kind, &wanted.kind) {
            (ClauseKind::Any(own), ClauseKind::Any(other))
            | (ClauseKind::Hotdrop(own), ClauseKind::Hotdrop(other)) => own == other,
            _ => false,
        })
    };
    let drops =
        rule.clauses.iter().enumerate().filter(|(_, clause)| matches!(clause.kind, ClauseKind::Hotdrop(_)));
    drops.into_iter().all(|(at, drop)| {
        (0..next.clauses.len()).any(|same| {
            has(&next.clauses[same..=same], drop)
                && next.clauses[..same].iter().all(|before| has(&rule.clauses[..at], before))
        })
    })
}

/// Whether a rule behind drops none of the packets that a rule matches because it can't read them: each of its drops
/// stands behind a condition that they do not satisfy, or is one that the rule itself has.
fn drops_no_more(other: &RuleData, rule: &RuleData, condition: &Condition) -> bool {
    let excluded = |clauses: &[Clause]| {
        clauses.iter().any(|clause| match &clause.kind {
            ClauseKind::Any(tests) => tests.iter().all(|test| condition.excludes_test(test)),
            _ => false,
        })
    };
    other.clauses.iter().enumerate().all(|(at, clause)| match clause.kind.drops_if() {
        Some(drop) => {
            let same = |own: &Clause| own.kind.drops_if() == Some(drop);
            rule.clauses.iter().any(same) || excluded(&other.clauses[..at])
        }
        None => true,
    })
}

/// Whether evaluating the rule's clauses neither drops packets nor leaves a trace.
fn is_pure(rule: &RuleData) -> bool {
    rule.clauses.iter().all(|clause| match &clause.kind {
        ClauseKind::Any(_) | ClauseKind::Hotdrop(_) | ClauseKind::Beyond(_) => true,
        // What is doomed still meets the rule's action.
        ClauseKind::Doom(_) | ClauseKind::Effect(_) => false,
        ClauseKind::Opaque(opaque) => !opaque.observable,
    })
}
