//! User chains that no packet can reach: no rule jumps there, or only rules of chains that are themselves unused.

use cranelift_entity::SecondaryMap;
use polc_ir::diag::Diagnostic;
use polc_ir::entities::Chain;
use polc_ir::ruleset::{Action, Ruleset};
use polc_ir::source::Span;

use super::UNUSED_CHAIN;

pub(super) fn find(ruleset: &Ruleset) -> impl Iterator<Item = Diagnostic> {
    let mut used: SecondaryMap<Chain, bool> = SecondaryMap::new();
    let mut pending: Vec<Chain> =
        ruleset.chains.iter().filter(|(_, data)| data.base.is_some()).map(|(chain, _)| chain).collect();
    while let Some(chain) = pending.pop() {
        if std::mem::replace(&mut used[chain], true) {
            continue;
        }
        for &rule in &ruleset.chains[chain].rules {
            if let Action::Jump(next) | Action::Goto(next) = ruleset.rules[rule].action {
                pending.push(next);
            }
        }
    }
    let mut mention: SecondaryMap<Chain, Option<Span>> = SecondaryMap::new();
    for rule in ruleset.rules.values() {
        if let Action::Jump(next) | Action::Goto(next) = rule.action {
            mention[next].get_or_insert(rule.action_span);
        }
    }
    let unused = ruleset.chains.iter().filter(move |(chain, data)| !used[*chain] && data.base.is_none());
    unused.map(move |(chain, data)| {
        let finding =
            Diagnostic::warning(UNUSED_CHAIN, format!("no packet reaches chain `{}`", data.name), data.span);
        match mention[chain] {
            None => finding.with_hint("remove the chain, or jump to it"),
            Some(span) => finding.with_label(span, "only chains that are unused themselves come here"),
        }
    })
}
