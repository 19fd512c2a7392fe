//! `save`: a rule set's canonical text with other counters.
//!
//! Counters are put into the text line by line, without parsing it again: the canonical text has a line for each chain
//! and for each rule, the rules of a chain in their order, and it is written with the counters in two places that never
//! move. So ten thousand rules cost what copying their text costs.

use std::collections::{BTreeMap, HashMap};

/// Packets and bytes of a chain's rules and of its policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainCounts {
    /// Of its policy.
    pub policy: (u64, u64),
    /// Of its rules by their number in the chain, from 1.
    pub rules: BTreeMap<u32, (u64, u64)>,
}

/// Packets and bytes by table and chain.
pub type Counts = HashMap<(String, String), ChainCounts>;

/// `canonical`, which [`polc_frontend_iptables::print`] wrote, with `counts` in place of its own counters. What is not
/// counted has zeros. As iptables-save has it, the lines of base chains always have theirs, those of user chains never
/// have any, and rules have theirs only if `rules` says so (iptables/iptables-save.c, `do_output`; `print_rule4`).
pub fn with_counts(canonical: &str, counts: &Counts, rules: bool) -> String {
    let mut out = String::with_capacity(canonical.len() + canonical.len() / 4);
    let none = ChainCounts::default();
    let mut table = "";
    // The chain whose rules are being read; they stand together.
    let (mut chain, mut of_chain, mut number) = ("", &none, 0u32);
    for line in canonical.split_inclusive('\n') {
        let counts_of = |name: &str| counts.get(&(table.to_string(), name.to_string())).unwrap_or(&none);
        if let Some(name) = line.strip_prefix('*') {
            (table, chain) = (name.trim_end(), "");
            out.push_str(line);
        } else if let Some(declaration) = line.strip_prefix(':') {
            let mut words = declaration.split_ascii_whitespace();
            let (name, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let (packets, bytes) = if policy == "-" { (0, 0) } else { counts_of(name).policy };
            out.push_str(&format!(":{name} {policy} [{packets}:{bytes}]\n"));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let name = rule.split_ascii_whitespace().next().unwrap_or_default();
            if name != chain {
                (chain, of_chain, number) = (name, counts_of(name), 0);
            }
            number += 1;
            if rules {
                let (packets, bytes) = of_chain.rules.get(&number).copied().unwrap_or_default();
                out.push_str(&format!("[{packets}:{bytes}] "));
            }
            out.push_str(line);
        } else {
            out.push_str(line);
        }
    }
    out
}

/// The lines of the rules in a canonical text by table and chain, in the order of their numbers from 1.
pub(crate) fn rule_lines(canonical: &str) -> HashMap<(&str, &str), Vec<&str>> {
    let mut lines: HashMap<(&str, &str), Vec<&str>> = HashMap::new();
    let mut table = "";
    for line in canonical.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix("-A ").and_then(|rule| rule.split(' ').next()) {
            lines.entry((table, chain)).or_default().push(line);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_by_their_numbers() {
        let lines = rule_lines(TEXT);
        assert_eq!(lines[&("filter", "INPUT")], ["-A INPUT -s 192.0.2.1/32 -j LOGS", "-A INPUT -j ACCEPT"]);
        assert_eq!((lines[&("mangle", "INPUT")].len(), lines.len()), (1, 3));
    }

    const TEXT: &str = "*filter\n:INPUT DROP [0:0]\n:LOGS - [0:0]\n-A INPUT -s 192.0.2.1/32 -j LOGS\n\
                        -A INPUT -j ACCEPT\n-A LOGS -m comment --comment \"-A INPUT [1:2]\"\nCOMMIT\n\
                        *mangle\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\nCOMMIT\n";

    fn counts() -> Counts {
        let mut counts = Counts::new();
        let filter = |chain: &str| ("filter".to_string(), chain.to_string());
        let rules = BTreeMap::from([(1, (3, 180)), (2, (4, 240)), (0, (9, 9))]);
        counts.insert(filter("INPUT"), ChainCounts { policy: (5, 300), rules });
        counts.insert(filter("LOGS"), ChainCounts { policy: (7, 7), rules: BTreeMap::from([(1, (3, 180))]) });
        counts
    }

    #[test]
    fn every_line_gets_its_own() {
        assert_eq!(
            with_counts(TEXT, &counts(), true),
            "*filter\n:INPUT DROP [5:300]\n:LOGS - [0:0]\n[3:180] -A INPUT -s 192.0.2.1/32 -j LOGS\n\
             [4:240] -A INPUT -j ACCEPT\n[3:180] -A LOGS -m comment --comment \"-A INPUT [1:2]\"\nCOMMIT\n\
             *mangle\n:INPUT ACCEPT [0:0]\n[0:0] -A INPUT -j ACCEPT\nCOMMIT\n"
        );
    }

    #[test]
    fn without_rules_only_policies() {
        assert_eq!(with_counts(TEXT, &counts(), false), TEXT.replacen("DROP [0:0]", "DROP [5:300]", 1));
    }
}
