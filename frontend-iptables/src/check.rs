//! What the kernel checks when a section is committed.
//!
//! Every rule that a base chain can reach is checked with the hooks it is reached from; loops are found on the way. As
//! in the kernel (net/ipv4/netfilter/ip_tables.c, `mark_source_chains`), nothing after an unconditional verdict is
//! reached, and what is not reached may loop and stand anywhere. iptables-restore only says that the COMMIT line
//! failed; we point at the clause.

use polc_ir::diag::Diagnostic;
use polc_ir::hook::{Family, Hook};
use polc_ir::source::Span;

use crate::ast::{ChainIndex, RuleAst, TableAst, TargetVerdict};
use crate::codes;
use crate::ext::{Fault, HookSet, Place, Spec};

/// Checks a complete table.
pub(crate) fn table(table: &TableAst, family: Family) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    let reached = reach(table, &mut diagnostics);
    for chain in &table.chains {
        for &index in &chain.rules {
            let rule = &table.rules[index as usize];
            // The rules of one line are alike: one finding is enough.
            if rule.copy > 0 {
                continue;
            }
            let protocol =
                rule.protocol.filter(|given| !given.negated && given.value != 0).map(|given| given.value);
            let place = Place { family, table: table.kind, hooks: reached[index as usize], protocol };
            let clauses = rule
                .matches
                .iter()
                .map(|clause| (clause.span, clause.kind.spec(), clause.kind.check(&place)));
            let target = match &rule.target.verdict {
                TargetVerdict::Extension(kind) => Some((rule.target.span, kind.spec(), kind.check(&place))),
                _ => None,
            };
            for (span, spec, own) in clauses.chain(target) {
                if let Err(fault) = check_place(spec, &place).and(own) {
                    diagnostics.push(explain(fault, span, table, rule));
                }
            }
        }
    }
    diagnostics
}

fn explain(fault: Fault, span: Span, table: &TableAst, rule: &RuleAst) -> Diagnostic {
    let chain = &table.chains[rule.chain.0 as usize];
    let diagnostic = fault.into_diagnostic(span);
    match chain.hook {
        Some(_) => diagnostic,
        None => diagnostic.with_label(chain.span, "the rule's chain"),
    }
}

fn check_place(spec: &Spec, place: &Place) -> Result<(), Fault> {
    let name = spec.name;
    if !spec.protocols.is_empty()
        && !place.protocol.is_some_and(|protocol| spec.protocols.contains(&protocol))
    {
        let names: Vec<String> = spec
            .protocols
            .iter()
            .map(|&number| format!("`-p {}`", crate::names::protocol_name(number).unwrap_or("?")))
            .collect();
        let message = format!("`{name}` needs {}", names.join(" or "));
        return Err(Fault::new(codes::WRONG_PROTOCOL, message).hint("add it before the match, not negated"));
    }
    if !spec.tables.is_empty() && !spec.tables.contains(&place.table) {
        let tables: Vec<String> = spec.tables.iter().map(ToString::to_string).collect();
        let message =
            format!("`{name}` is allowed in table {} only, this is {}", tables.join(" or "), place.table);
        return Err(Fault::new(codes::WRONG_PLACE, message));
    }
    if !spec.hooks.is_empty()
        && let Some(wrong) = place.hooks.iter().find(|hook| !spec.hooks.contains(hook))
    {
        return Err(wrong_hook(name, spec.hooks, wrong));
    }
    Ok(())
}

/// `name` is allowed only on `hooks`, but reached from `wrong`.
pub(crate) fn wrong_hook(name: &str, hooks: &[Hook], wrong: Hook) -> Fault {
    let hooks: Vec<&str> = hooks.iter().map(|hook| hook.chain_name()).collect();
    let message =
        format!("`{name}` is reached from {}, but allowed in {} only", wrong.chain_name(), hooks.join(", "));
    Fault::new(codes::WRONG_PLACE, message)
}

/// How far a walk from a base chain has come with a chain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    Not,
    /// On the path from the base chain: a jump here is a loop.
    Open,
    Done,
}

/// The hooks each rule is reached from, by rule index.
fn reach(table: &TableAst, diagnostics: &mut Vec<Diagnostic>) -> Vec<HookSet> {
    let mut reached = vec![HookSet::default(); table.rules.len()];
    let mut looped = vec![false; table.rules.len()];
    for (base, chain) in table.chains.iter().enumerate() {
        let Some(hook) = chain.hook else { continue };
        let here = HookSet::of(&[hook]);
        let mut visits = vec![Visit::Not; table.chains.len()];
        // The chains on the path, each with the position of its next rule.
        let mut path: Vec<(usize, usize)> = vec![(base, 0)];
        visits[base] = Visit::Open;
        while let Some((chain, position)) = path.last_mut() {
            let Some(&index) = table.chains[*chain].rules.get(*position) else {
                visits[*chain] = Visit::Done;
                path.pop();
                continue;
            };
            *position += 1;
            let rule = &table.rules[index as usize];
            reached[index as usize] = reached[index as usize].union(here);
            if ends_chain(rule) {
                *position = usize::MAX;
            }
            let (TargetVerdict::Jump(ChainIndex(to)) | TargetVerdict::Goto(ChainIndex(to))) =
                rule.target.verdict
            else {
                continue;
            };
            let to = to as usize;
            match visits[to] {
                Visit::Not => {
                    visits[to] = Visit::Open;
                    path.push((to, 0));
                }
                Visit::Open if !looped[index as usize] => {
                    looped[index as usize] = true;
                    let names: Vec<&str> = path
                        .iter()
                        .skip_while(|(chain, _)| *chain != to)
                        .map(|(chain, _)| &*table.chains[*chain].name)
                        .collect();
                    let message = format!(
                        "chains jump in a circle: {} -> {}",
                        names.join(" -> "),
                        table.chains[to].name
                    );
                    diagnostics.push(
                        Diagnostic::error(codes::CHAIN_LOOP, message, rule.target.span)
                            .with_label(table.chains[to].span, "this chain is reached again")
                            .with_hint("remove one of the jumps"),
                    );
                }
                Visit::Open | Visit::Done => {}
            }
        }
    }
    reached
}

/// Whether no packet gets past a rule: it has no condition and a verdict of its own.
fn ends_chain(rule: &RuleAst) -> bool {
    let verdict = matches!(
        rule.target.verdict,
        TargetVerdict::Accept | TargetVerdict::Drop | TargetVerdict::Queue | TargetVerdict::Return
    );
    let any_address = |given: &Option<crate::ast::Given<crate::value::AddressMask>>| {
        given.is_none_or(|given| given.value.mask.is_unspecified() && !given.negated)
    };
    let any_device = |given: &Option<crate::ast::Given<crate::value::Interface>>| {
        given.as_ref().is_none_or(|given| given.value.is_any() && !given.negated)
    };
    verdict
        && rule.matches.is_empty()
        && any_address(&rule.source)
        && any_address(&rule.destination)
        && any_device(&rule.in_interface)
        && any_device(&rule.out_interface)
        && rule.protocol.is_none_or(|given| given.value == 0)
        && rule.fragment.is_none()
}
