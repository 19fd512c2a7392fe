//! What of a rule set no packet is sent through: the chains of hooks that packets from outside don't come to here, and
//! those of `nat`.

use std::collections::BTreeSet;

use polc_ir::entities::Chain;
use polc_ir::hook::{Hook, TableKind};
use polc_ir::ruleset::{Action, Policy, Ruleset};
use serde::Serialize;

/// What is not compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NotCompared {
    /// Base chains, each with its table, that have rules or don't let everything on.
    pub chains: Vec<String>,
    /// Rule lines that only these chains lead to.
    pub rules: usize,
}

/// What no packet is sent through.
pub fn not_compared(ruleset: &Ruleset) -> NotCompared {
    let bases = ruleset.chains.iter().filter_map(|(id, chain)| Some((id, chain.base?)));
    let is_compared = |chain: Chain, hook: Hook| {
        let from_outside = matches!(hook, Hook::Prerouting | Hook::Input | Hook::Forward);
        from_outside && ruleset.tables[ruleset.chains[chain].table].kind != TableKind::Nat
    };
    let (compared, left): (Vec<_>, Vec<_>) = bases.partition(|(chain, base)| is_compared(*chain, base.hook));
    let lines = |from: &[(Chain, _)]| lines(ruleset, from.iter().map(|(chain, _)| *chain).collect());
    let rules = lines(&left).difference(&lines(&compared)).count();
    let matters = left
        .iter()
        .filter(|(chain, base)| !ruleset.chains[*chain].rules.is_empty() || base.policy != Policy::Accept);
    let named = matters.map(|(chain, _)| {
        let chain = &ruleset.chains[*chain];
        format!("{} {}", ruleset.tables[chain.table].kind, chain.name)
    });
    NotCompared { chains: named.collect(), rules }
}

/// Where the lines of the rules begin that these chains lead to.
fn lines(ruleset: &Ruleset, mut left: Vec<Chain>) -> BTreeSet<u32> {
    let mut seen: BTreeSet<Chain> = left.iter().copied().collect();
    let mut lines = BTreeSet::new();
    while let Some(chain) = left.pop() {
        for &rule in &ruleset.chains[chain].rules {
            let rule = &ruleset.rules[rule];
            lines.insert(rule.span.start);
            if let Action::Jump(next) | Action::Goto(next) = rule.action
                && seen.insert(next)
            {
                left.push(next);
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::hook::Semantics;
    use polc_ir::source::SourceMap;

    use super::*;

    #[test]
    fn chains_that_no_packet_comes_to_are_named() {
        let text = "*nat\n-A PREROUTING -p tcp -j REDIRECT\n-A POSTROUTING\nCOMMIT\n\
            *filter\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:both -\n:out -\n-A INPUT -j both\n-A OUTPUT -j both\n\
            -A OUTPUT -s 10.0.0.1,10.0.0.2 -j out\n-A both -j DROP\n-A out -j DROP\nCOMMIT\n\
            *mangle\n:POSTROUTING DROP\n:OUTPUT ACCEPT\nCOMMIT\n";
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        let ruleset = lower(&parse(&sources, file, &ParseOptions::default()).0, &[], Semantics::Legacy);
        let found = not_compared(&ruleset);
        let chains = ["nat PREROUTING", "nat POSTROUTING", "filter OUTPUT", "mangle POSTROUTING"];
        assert_eq!((&found.chains[..], found.rules), (&chains.map(String::from)[..], 5));
    }
}
