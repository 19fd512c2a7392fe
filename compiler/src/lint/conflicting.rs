//! Rules with the same condition and different verdicts: only the first counts, and one of the two is a mistake.

use polc_ir::diag::Diagnostic;

use super::cover::Covers;
use super::{CONFLICTING, action_name};
use crate::session::Session;

pub(super) fn find(session: &Session, covers: &Covers) -> impl Iterator<Item = Diagnostic> {
    let ruleset = &session.ruleset;
    let covered =
        ruleset.rules.iter().filter_map(move |(rule, data)| Some((rule, data, covers.cover(rule)?)));
    covered
        .filter(move |&(rule, data, by)| {
            data.action != ruleset.rules[by].action && covers.condition(by).equals(covers.condition(rule))
        })
        .map(move |(_, data, by)| {
            let first = &ruleset.rules[by];
            let (now, before) = (action_name(ruleset, &data.action), action_name(ruleset, &first.action));
            let message = format!(
                "{now} is never taken: line {} says {before} for the same packets",
                session.line_of(by)
            );
            Diagnostic::warning(CONFLICTING, message, data.span)
                .with_label(first.span, "the same conditions")
                .with_hint("keep the one that is meant")
        })
}
