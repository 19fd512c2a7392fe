//! From which hooks packets reach each rule of a table, and what rules may not do there.
//!
//! The kernel asks when a table is loaded (net/ipv4/netfilter/ip_tables.c, `mark_source_chains` and
//! `find_check_entry`). It follows the chains from the base chains on, each up to the first rule that ends it for every
//! packet, refuses jumps that lead back to where they come from, and lets each match and target look at the hooks that
//! lead to it. What no packet can reach it lets stand. nf_tables follows each chain to its end, and not as many jumps
//! (net/netfilter/nf_tables_api.c, `nft_chain_validate`).

use std::collections::BTreeSet;

use polc_ir::diag::Diagnostic;
use polc_ir::hook::{Family, Hook, Semantics, TableKind};
use polc_ir::limits;

use crate::ast::{RuleAst, TableAst, TargetVerdict};
use crate::codes;
use crate::extension::{Options, Site};

/// Who follows the chains of a table.
#[derive(Clone, Copy)]
pub(crate) struct Loading {
    pub(crate) family: Family,
    /// Whether matches and targets are judged as iptables-nft loads them.
    pub(crate) nft: bool,
    /// Whose rules they become.
    pub(crate) semantics: Semantics,
}

/// Takes the rules that are not accepted out of their chains, and says why.
pub(crate) fn check(ast: &mut TableAst, loading: Loading) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    let refused = loops(ast, loading, &mut diagnostics);
    reject(ast, &refused);
    let misplaced = places(ast, loading, &mut diagnostics);
    reject(ast, &misplaced);
    // The rules that a line's address lists make share what is said of the line.
    diagnostics.dedup();
    diagnostics
}

/// Takes rules that are not accepted out of their chains.
fn reject(ast: &mut TableAst, refused: &BTreeSet<u32>) {
    if refused.is_empty() {
        return;
    }
    for chain in &mut ast.chains {
        chain.rules.retain(|index| !refused.contains(index));
    }
    ast.rejected.extend(refused.iter().map(|&index| ast.rules[index as usize].span));
}

/// Where a rule leads to.
fn leads_to(rule: &RuleAst) -> Option<usize> {
    match rule.target.verdict {
        TargetVerdict::Jump(to) | TargetVerdict::Goto(to) => Some(to.0 as usize),
        _ => None,
    }
}

/// Whether no packet gets past the rule: it asks for nothing and decides.
fn ends_chain(rule: &RuleAst, family: Family) -> bool {
    let address = |given: &Option<Box<crate::ast::Given<crate::value::AddressMask>>>| {
        given.as_ref().is_some_and(|given| given.negated || given.value.prefix_length() != Some(0))
    };
    let asks = address(&rule.source)
        || address(&rule.destination)
        || rule.in_interface.is_some()
        || rule.out_interface.is_some()
        // IPv6 notes that a protocol was named, even if it is `all`.
        || rule.protocol.is_some_and(|protocol| protocol.value != 0 || family == Family::V6)
        || rule.fragment.is_some()
        || !rule.matches.is_empty();
    let decides = matches!(
        rule.target.verdict,
        TargetVerdict::Accept | TargetVerdict::Drop | TargetVerdict::Queue | TargetVerdict::Return
    );
    decides && !asks
}

/// The rules of a chain that are followed: those that packets can come to, or all.
fn live(ast: &TableAst, loading: Loading, chain: usize) -> &[u32] {
    let rules = &ast.chains[chain].rules;
    let ends = |rule: &u32| ends_chain(&ast.rules[*rule as usize], loading.family);
    let end = match loading.semantics {
        Semantics::Legacy => rules.iter().position(ends),
        Semantics::Nft => None,
    };
    &rules[..end.map_or(rules.len(), |end| end + 1)]
}

/// Chains that packets can come to may not lead back to themselves, nor nest deeper than is followed. The jumps that
/// would.
fn loops(ast: &TableAst, loading: Loading, diagnostics: &mut Vec<Diagnostic>) -> BTreeSet<u32> {
    let (depth_max, code, hint) = match loading.semantics {
        Semantics::Legacy => (
            limits::JUMP_DEPTH_MAX,
            codes::LIMIT,
            "end some of the chains in a verdict, or put their rules in the chains that jump to them",
        ),
        Semantics::Nft => (
            limits::NFT_JUMP_DEPTH_MAX,
            codes::CHAIN_DEPTH,
            "nf_tables loads none of the rules then; put some of the chains' rules in the chains that jump to them",
        ),
    };
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let mut refused = BTreeSet::new();
    let mut marks = vec![Mark::New; ast.chains.len()];
    // Each chain behind those that it leads to.
    let mut done = Vec::new();
    let bases = ast.chains.iter().enumerate().filter(|(_, chain)| chain.hook.is_some());
    let bases: Vec<usize> = bases.map(|(base, _)| base).collect();
    for &start in &bases {
        if marks[start] != Mark::New {
            continue;
        }
        marks[start] = Mark::Open;
        let mut path = vec![(start, live(ast, loading, start).iter())];
        while let Some((chain, rest)) = path.last_mut() {
            let chain = *chain;
            let Some(&index) = rest.next() else {
                marks[chain] = Mark::Done;
                done.push(chain);
                path.pop();
                continue;
            };
            let rule = &ast.rules[index as usize];
            let Some(to) = leads_to(rule) else { continue };
            match marks[to] {
                Mark::New => {
                    marks[to] = Mark::Open;
                    path.push((to, live(ast, loading, to).iter()));
                }
                Mark::Open => {
                    let message = format!("chain `{}` leads back to itself", ast.chains[to].name);
                    diagnostics.push(
                        Diagnostic::error(codes::CHAIN_LOOP, message, rule.target.span)
                            .with_label(ast.chains[to].span, "this chain")
                            .with_hint("netfilter refuses loops; break the circle"),
                    );
                    refused.insert(index);
                }
                Mark::Done => {}
            }
        }
    }
    // How many rules a packet may be tried against from each rule on, where both what it leads to and what follows it are.
    let mut tried = vec![0u64; ast.chains.len()];
    for &chain in &done {
        for &index in live(ast, loading, chain).iter().rev() {
            let rule = &ast.rules[index as usize];
            let from_here = tried[chain] + 1;
            let to = leads_to(rule).filter(|_| !refused.contains(&index)).map_or(0, |to| tried[to]);
            // A rule that leads nowhere adds one, and is not what makes them many.
            if to == 0 || from_here + to <= limits::RULES_PASSED_MAX {
                tried[chain] = from_here + to;
                continue;
            }
            tried[chain] = from_here;
            refused.insert(index);
            let message =
                format!("a packet may be tried against more than {} rules", limits::RULES_PASSED_MAX);
            diagnostics.push(Diagnostic::error(codes::LIMIT, message, rule.target.span).with_hint(
                "chains that are jumped to more than once multiply; jump once, or end them in a verdict",
            ));
        }
    }
    // How many chains a packet may be in at once, once it comes to each.
    let mut depths = vec![0; ast.chains.len()];
    bases.iter().for_each(|&base| depths[base] = 1);
    for chain in done.into_iter().rev() {
        if depths[chain] == 0 {
            continue;
        }
        for &index in live(ast, loading, chain) {
            let rule = &ast.rules[index as usize];
            let Some(to) = leads_to(rule).filter(|_| !refused.contains(&index)) else { continue };
            if depths[chain] < depth_max {
                depths[to] = depths[to].max(depths[chain] + 1);
                continue;
            }
            refused.insert(index);
            let message = format!("chains are nested more than {depth_max} deep");
            diagnostics.push(Diagnostic::error(code, message, rule.target.span).with_hint(hint));
        }
    }
    refused
}

/// The hooks from which packets come to each chain. There are no loops among what they can reach.
fn hooks(ast: &TableAst, loading: Loading) -> Vec<Vec<Hook>> {
    let mut hooks = vec![Vec::new(); ast.chains.len()];
    for (start, base) in ast.chains.iter().enumerate() {
        let Some(hook) = base.hook else { continue };
        let mut open = vec![start];
        while let Some(chain) = open.pop() {
            if hooks[chain].contains(&hook) {
                continue;
            }
            hooks[chain].push(hook);
            let rules = live(ast, loading, chain).iter().map(|&index| &ast.rules[index as usize]);
            open.extend(rules.filter_map(leads_to));
        }
    }
    hooks
}

/// Matches and targets that their table or the hooks that lead to them do not allow; the rules they are in.
fn places(ast: &TableAst, loading: Loading, diagnostics: &mut Vec<Diagnostic>) -> BTreeSet<u32> {
    let Loading { family, nft, .. } = loading;
    let mut misplaced = BTreeSet::new();
    for (chain, hooks) in hooks(ast, loading).iter().enumerate() {
        let live = live(ast, loading, chain).len();
        for (at, &index) in ast.chains[chain].rules.iter().enumerate() {
            let rule = &ast.rules[index as usize];
            let hooks = if at < live { &hooks[..] } else { &[] };
            let site = Site { family, nft, table: ast.kind, hooks, rule };
            let matches = rule.matches.iter().map(|one| ("match", &one.options, one.span));
            let target = match &rule.target.verdict {
                TargetVerdict::Extension(options) => Some(("target", &**options, rule.target.span)),
                _ => None,
            };
            for (kind, options, span) in matches.chain(target) {
                if let Err(message) = place(kind, options, &site) {
                    misplaced.insert(index);
                    diagnostics.push(Diagnostic::error(codes::WRONG_PLACE, message, span));
                }
            }
        }
    }
    misplaced
}

fn place(kind: &str, options: &Options, site: &Site<'_>) -> Result<(), String> {
    let extension = options.extension;
    let named = |table: &TableKind| format!("`{table}`");
    if !extension.tables.is_empty() && !extension.tables.contains(&site.table) {
        let tables: Vec<String> = extension.tables.iter().map(named).collect();
        return Err(format!("{kind} `{}` works only in table {}", extension.name, tables.join(" or ")));
    }
    let wrong = |hook: &&Hook| !extension.hooks.is_empty() && !extension.hooks.contains(hook);
    if site.hooks.iter().any(|hook| wrong(&hook)) {
        let hooks: Vec<&str> = extension.hooks.iter().map(|hook| hook.chain_name()).collect();
        return Err(format!("{kind} `{}` works only in {}", extension.name, hooks.join(", ")));
    }
    extension.place.map_or(Ok(()), |place| place(options, site))
}
