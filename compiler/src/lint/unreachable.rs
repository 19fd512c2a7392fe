//! Rules behind one that matches everything and lets nothing pass.

use polc_ir::diag::Diagnostic;
use polc_ir::ruleset::Ruleset;

use super::cover::Covers;
use super::{UNREACHABLE, action_name};

pub(super) fn find(ruleset: &Ruleset, covers: &Covers) -> impl Iterator<Item = Diagnostic> {
    let barriers =
        ruleset.chains.iter().filter_map(move |(chain, data)| Some((data, covers.barrier(chain)?)));
    barriers.filter_map(move |(data, barrier)| {
        let at = data.rules.iter().position(|&rule| rule == barrier)?;
        let first = *data.rules.get(at + 1)?;
        let rest = data.rules.len() - at - 2;
        let message = match rest {
            0 => "the rule is never reached".to_string(),
            _ => format!("the rule and the {rest} behind it in chain `{}` are never reached", data.name),
        };
        let barrier = &ruleset.rules[barrier];
        let label = format!("every packet that comes here takes {}", action_name(ruleset, &barrier.action));
        Some(
            Diagnostic::warning(UNREACHABLE, message, ruleset.rules[first].span)
                .with_label(barrier.span, label)
                .with_hint(
                    "remove what is never reached, or move it before the rule that matches everything",
                ),
        )
    })
}
