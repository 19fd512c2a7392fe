//! Rules whose clauses no packet satisfies together: two marks, two protocols, an address in and out of a prefix.

use polc_ir::diag::Diagnostic;
use polc_ir::ruleset::{Clause, Ruleset};

use super::CONTRADICTORY;
use super::cover::Covers;

pub(super) fn find(ruleset: &Ruleset, covers: &Covers) -> impl Iterator<Item = Diagnostic> {
    let contradictions =
        ruleset.rules.keys().filter_map(move |rule| Some((rule, covers.condition(rule).contradiction()?)));
    contradictions.map(move |(rule, (first, second))| {
        let finding = if first == second {
            Diagnostic::warning(CONTRADICTORY, "the rule never matches: no packet satisfies this", second)
        } else {
            Diagnostic::warning(
                CONTRADICTORY,
                "the rule never matches: this contradicts an earlier condition",
                second,
            )
            .with_label(first, "no packet satisfies both")
        };
        let drops = |clause: &Clause| clause.kind.drops_if().is_some();
        if ruleset.rules[rule].clauses.iter().any(drops) {
            finding.with_hint(
                "remove the condition that is not meant; without the rule, packets that it can't read would go on",
            )
        } else {
            finding.with_hint("remove the rule, or the condition that is not meant")
        }
    })
}
