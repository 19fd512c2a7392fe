//! Entries that no packet takes, because earlier ones of their stage take all of theirs, or nothing leads to their stage
//! but such entries. What only the whole way to a stage rules out is not looked at.

use cranelift_entity::{EntitySet, SecondaryMap};
use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::entities::{Entry, Stage};
use polc_ir::hook::Family;

/// Cubes that are kept of what earlier entries leave of one; with more it counts as not hidden.
const LEFT_MAX: usize = 64;

/// Those among the entries for which `asked` holds.
pub(crate) fn hidden(classifier: &Classifier, asked: impl Fn(Entry) -> bool) -> EntitySet<Entry> {
    let mut hidden = EntitySet::new();
    let mut is_led_to: SecondaryMap<Stage, bool> = SecondaryMap::new();
    is_led_to[classifier.root] = true;
    // Stages lead to smaller numbers.
    for (stage, data) in classifier.stages.iter().rev() {
        for (at, &entry) in data.entries.iter().enumerate() {
            let is_hidden =
                asked(entry) && (!is_led_to[stage] || leaves_nothing(classifier, &data.entries[..at], entry));
            if is_hidden {
                hidden.insert(entry);
            } else {
                classifier.entries[entry].exit.successors().for_each(|next| is_led_to[next] = true);
            }
        }
    }
    hidden
}

/// Whether these entries take whatever a later one would.
fn leaves_nothing(classifier: &Classifier, earlier: &[Entry], entry: Entry) -> bool {
    let mut left = vec![classifier.entries[entry].cube.clone()];
    for &entry in earlier {
        let by = &classifier.entries[entry].cube;
        if !left.iter().any(|cube| cube.intersect(by, classifier.family).is_some()) {
            continue;
        }
        left = left.into_iter().flat_map(|cube| without(cube, by, classifier.family)).collect();
        if left.len() > LEFT_MAX {
            return false;
        }
    }
    left.is_empty()
}

/// What is left of a cube without another: cubes that have nothing in common.
fn without(mut cube: Cube, by: &Cube, family: Family) -> Vec<Cube> {
    if cube.intersect(by, family).is_none() {
        return vec![cube];
    }
    let mut left = Vec::new();
    for test in by.tests() {
        let mut outside = cube.clone();
        if outside.and(&test.negated(family), family) {
            left.push(outside);
        }
        if !cube.and(test, family) {
            break;
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use polc_frontend_iptables::{ParseOptions, lower, parse};
    use polc_ir::env::{Attach, Env, Mode};
    use polc_ir::hook::{Hook, Semantics};
    use polc_ir::ruleset::Ruleset;
    use polc_ir::source::SourceMap;

    use super::*;
    use crate::flatten::flatten;
    use crate::place::place;

    fn read(text: &str) -> Ruleset {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        lower(&parse(&sources, file, &ParseOptions::default()).0, &[], Semantics::Legacy)
    }

    /// The numbers of rules all of whose entries are hidden.
    fn hidden_rules(rules: &str) -> Vec<u32> {
        let ruleset = read(&format!("*filter\n:INPUT ACCEPT [0:0]\n:to - [0:0]\n{rules}\nCOMMIT\n"));
        let place = place(&[Hook::Input], Attach::Netfilter, Mode::Accelerate, false);
        let classifier = flatten(&ruleset, &place, &Env::default(), &mut Vec::new());
        let hidden = hidden(&classifier, |_| true);
        let entries_of = |rule| classifier.entries.iter().filter(move |(_, data)| data.rule == Some(rule));
        let all_hidden = |rule| entries_of(rule).all(|(entry, _)| hidden.contains(entry));
        ruleset.rules.keys().filter(|rule| all_hidden(*rule)).map(|rule| rule.as_u32() + 1).collect()
    }

    #[test]
    fn what_earlier_rules_take_together_is_hidden() {
        let halves = "-A INPUT -s 10.0.0.0/9 -j DROP\n-A INPUT -s 10.128.0.0/9 -j DROP\n";
        assert_eq!(hidden_rules(&format!("{halves}-A INPUT -s 10.1.0.0/8 -p udp -j ACCEPT")), [3]);
        assert!(hidden_rules(&format!("{halves}-A INPUT -s 10.0.0.0/7 -p udp -j ACCEPT")).is_empty());
        let one = "-A INPUT -s 10.0.0.0/9 -p udp -j DROP\n-A INPUT -s 10.0.0.0/8 -j ACCEPT";
        assert!(hidden_rules(one).is_empty());
    }

    #[test]
    fn what_only_hidden_rules_lead_to_is_hidden() {
        let rules = "-A INPUT -s 10.0.0.0/8 -j DROP\n-A INPUT -s 10.1.0.0/16 -j to\n-A to -p tcp -j ACCEPT";
        assert_eq!(hidden_rules(rules), [2, 3]);
        assert!(hidden_rules(&rules.replace("10.1.", "11.1.")).is_empty());
    }
}
