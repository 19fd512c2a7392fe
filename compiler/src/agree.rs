//! `agree`: whether a rule set is what the kernel has.
//!
//! A program that drops what the kernel's rules would drop is right only as long as they are the rules it was compiled
//! from. Both are read by the same parser and printed in the one canonical form, table by table, without counters; what
//! differs in no more than spelling, order of options or order of tables is the same. A table without rules whose
//! policies accept does nothing, and is the same as none.

use std::collections::BTreeSet;
use std::fmt;

use polc_frontend_iptables::ast::{ChainAst, Dump, Policy, TableAst};
use polc_frontend_iptables::ipset::{self, Sets};
use polc_frontend_iptables::print;
use polc_ir::hook::TableKind;

/// The first thing in which they differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where: `table filter`, `sets`.
    pub place: String,
    /// What the rule set has there, if anything.
    pub given: Option<String>,
    /// What the kernel has there, if anything.
    pub live: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { place, given, live } = self;
        match (given, live) {
            (Some(given), Some(live)) => {
                write!(f, "{place}: `{given}` is given, and the kernel has `{live}`")
            }
            (Some(given), None) => write!(f, "{place}: the kernel does not have `{given}`"),
            (None, Some(live)) => write!(f, "{place}: the kernel has `{live}`, which is not given"),
            (None, None) => write!(f, "{place}: the same"),
        }
    }
}

/// The first difference between the rules that were given and those that the kernel has.
pub fn rules(given: &Dump, live: &Dump) -> Option<Difference> {
    let kinds = [TableKind::Raw, TableKind::Mangle, TableKind::Nat, TableKind::Filter, TableKind::Security];
    kinds.into_iter().find_map(|kind| {
        let text = |dump: &Dump| {
            let table = dump.tables.iter().find(|table| table.kind == kind && has_effect(table));
            table.map_or_else(String::new, |table| canonical(dump, table))
        };
        first_difference(&format!("table {kind}"), &text(given), &text(live))
    })
}

/// The first thing a dump does at all.
pub fn anything(dump: &Dump) -> Option<Difference> {
    rules(&Dump { tables: Vec::new(), replaced: Vec::new(), ..dump.clone() }, dump)
}

/// The first difference between sets that were given and those of the same names that the kernel has: types and
/// elements. The kernel keeps elements in an order of its own, and sizes of hash tables change nothing.
pub fn sets(given: &Sets, live: &Sets) -> Option<Difference> {
    let names: Vec<&str> = given.iter().map(|set| set.name.as_str()).collect();
    let sorted = |sets: &Sets| {
        let text = ipset::print(sets);
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| line.split(' ').nth(1).is_some_and(|name| names.contains(&name)))
            .map(|line| match line.starts_with("create ") {
                true => line.split(' ').take(3).collect::<Vec<_>>().join(" "),
                false => line.to_string(),
            })
            .collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    let (given, live) = (sorted(given), sorted(live));
    let lacks = |lines: &str, others: &str| {
        let others: BTreeSet<&str> = others.lines().collect();
        lines.lines().find(|line| !others.contains(line)).map(str::to_string)
    };
    let (given, live) = match lacks(&given, &live) {
        Some(line) => (Some(line), None),
        None => (None, Some(lacks(&live, &given)?)),
    };
    Some(Difference { place: "sets".to_string(), given, live })
}

/// Whether a table does anything with packets.
fn has_effect(table: &TableAst) -> bool {
    let drops = |chain: &ChainAst| chain.hook.is_some() && chain.policy == Policy::Drop;
    table.chains.iter().any(|chain| !chain.deleted && (!chain.rules.is_empty() || drops(chain)))
}

fn canonical(dump: &Dump, table: &TableAst) -> String {
    print(&Dump { tables: vec![table.clone()], replaced: Vec::new(), ..dump.clone() }, false)
}

fn first_difference(place: &str, given: &str, live: &str) -> Option<Difference> {
    let (mut given, mut live) = (given.lines(), live.lines());
    loop {
        let (one, other) = (given.next(), live.next());
        if one != other {
            let own = |line: Option<&str>| line.map(str::to_string);
            return Some(Difference { place: place.to_string(), given: own(one), live: own(other) });
        }
        one?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polc_frontend_iptables::{ParseOptions, parse};
    use polc_ir::source::SourceMap;

    fn dump(text: &str) -> Dump {
        let mut sources = SourceMap::new();
        let file = sources.add("rules", text);
        let (dump, found) = parse(&sources, file, &ParseOptions::default());
        assert!(found.is_empty(), "{found:?}");
        dump
    }

    const GIVEN: &str = "*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp --dport ssh -j ACCEPT\nCOMMIT\n";

    #[test]
    fn spelling_counters_and_empty_tables_make_no_difference() {
        let live = "*mangle\n:PREROUTING ACCEPT [5:6]\nCOMMIT\n*filter\n:INPUT DROP [7:8]\n:FORWARD ACCEPT [0:0]\n\
                    :OUTPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\nCOMMIT\n";
        assert_eq!(rules(&dump(GIVEN), &dump(live)), None);
        assert_eq!(anything(&dump("*nat\n:PREROUTING ACCEPT [1:1]\nCOMMIT\n")), None);
    }

    #[test]
    fn sets_differ_by_what_one_side_lacks() {
        let read = |text: &str| {
            let mut sources = SourceMap::new();
            let file = sources.add("sets", text);
            ipset::parse(&sources, file).0
        };
        let (hosts, nets) = ("create hs hash:ip\n", "create net hash:net\nadd net 10.0.0.0/8\n");
        let given = format!("{hosts}add hs 10.0.0.1\n{nets}");
        let said = |given: &str, live: &str| sets(&read(given), &read(live)).map(|found| found.to_string());
        assert_eq!(said(&given, &given), None);
        let lacks = said(&given, &format!("{hosts}{nets}"));
        assert_eq!(lacks.as_deref(), Some("sets: the kernel does not have `add hs 10.0.0.1`"));
        let more = said(&given, &format!("{given}add hs 10.0.0.2\n"));
        assert_eq!(more.as_deref(), Some("sets: the kernel has `add hs 10.0.0.2`, which is not given"));
    }

    #[test]
    fn the_first_difference_is_told() {
        let other = GIVEN.replace("ssh", "80");
        let found = rules(&dump(GIVEN), &dump(&other)).expect("they differ").to_string();
        assert_eq!(
            found,
            "table filter: `-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT` is given, and the kernel has \
             `-A INPUT -p tcp -m tcp --dport 80 -j ACCEPT`"
        );
        let nat = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j REDIRECT\nCOMMIT\n";
        let both = format!("{nat}{GIVEN}");
        let found = rules(&dump(GIVEN), &dump(&both)).expect("they differ");
        assert_eq!((found.place.as_str(), found.given), ("table nat", None));
        assert!(rules(&dump(GIVEN), &dump("")).expect("they differ").live.is_none());
    }
}
