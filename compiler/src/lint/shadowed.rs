//! Rules that never match because an earlier one, with a wider condition, decides all of their packets.

use polc_ir::diag::Diagnostic;

use super::cover::Covers;
use super::{SHADOWED, action_name};
use crate::session::Session;

pub(super) fn find(session: &Session, covers: &Covers) -> impl Iterator<Item = Diagnostic> {
    let ruleset = &session.ruleset;
    let covered =
        ruleset.rules.iter().filter_map(move |(rule, data)| Some((rule, data, covers.cover(rule)?)));
    covered
        .filter(move |&(rule, data, by)| {
            data.action == ruleset.rules[by].action || !covers.condition(by).equals(covers.condition(rule))
        })
        // Two rules of one line's address lists repeat each other harmlessly.
        .filter(move |(_, data, by)| data.span != ruleset.rules[*by].span)
        .map(move |(_, data, by)| {
            let other = &ruleset.rules[by];
            let line = session.line_of(by);
            let name = action_name(ruleset, &other.action);
            Diagnostic::warning(
                SHADOWED,
                format!("the rule never matches: line {line} comes first"),
                data.span,
            )
            .with_label(other.span, format!("takes every packet that the later rule could match: {name}"))
            .with_hint("remove the rule, or move it before the one that shadows it")
        })
}
