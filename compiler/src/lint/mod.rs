//! Lints: rules that can't be meant, found without running a packet.
//!
//! Each lint is a file, with one function that reads the rule set and returns findings. A lint says only what is
//! certain: a rule with a clause that nothing here evaluates is never said to cover another. All of them together look
//! at tens of thousands of rules in a fraction of a second: candidates come from indices, and what indices can't
//! narrow is bounded by a constant.

mod conflicting;
mod contradictory;
mod cover;
mod empty_set;
mod redundant;
mod shadowed;
mod unreachable;
mod unused_chain;

use std::collections::BTreeMap;

use polc_ir::diag::{Code, Diagnostic};
use polc_ir::limits;
use polc_ir::ruleset::{Action, Ruleset};
use polc_ir::source::Span;

use crate::session::Session;
use cover::Covers;

/// A rule that never matches: an earlier rule of its chain ends the traversal for every packet it could match.
pub const SHADOWED: Code = Code(401);
/// Rules behind one that matches everything and ends the traversal.
pub const UNREACHABLE: Code = Code(402);
/// A rule whose clauses no packet can satisfy together.
pub const CONTRADICTORY: Code = Code(403);
/// A rule that changes nothing: what follows decides its packets in the same way.
pub const REDUNDANT: Code = Code(404);
/// A rule that asks for membership in a set without elements.
pub const EMPTY_SET: Code = Code(405);
/// A user chain that no packet can reach.
pub const UNUSED_CHAIN: Code = Code(406);
/// Two rules with the same condition and different verdicts; the second never matches.
pub const CONFLICTING: Code = Code(407);
/// More findings than are shown.
pub const TOO_MANY: Code = Code(499);

/// Every lint's code, its name, and what it finds.
pub const ALL: &[(Code, &str, &str)] = &[
    (SHADOWED, "shadowed", "an earlier rule decides every packet that this one matches"),
    (UNREACHABLE, "unreachable", "a rule that matches everything stands before it"),
    (CONTRADICTORY, "contradictory", "no packet satisfies all of its conditions"),
    (REDUNDANT, "redundant", "without it, every packet is decided in the same way"),
    (EMPTY_SET, "empty-set", "the set it asks for has no elements"),
    (UNUSED_CHAIN, "unused-chain", "no packet can reach the chain"),
    (CONFLICTING, "conflicting-verdict", "an earlier rule has the same conditions and another verdict"),
    (TOO_MANY, "too-many", "more findings than are shown"),
];

/// Runs every lint. Findings are in the order of the text.
pub fn lint(session: &Session) -> Vec<Diagnostic> {
    let ruleset = &session.ruleset;
    let covers = Covers::new(ruleset);
    let mut shown = Shown::default();
    contradictory::find(ruleset, &covers).for_each(|finding| shown.add(finding));
    empty_set::find(ruleset).for_each(|finding| shown.add(finding));
    unused_chain::find(ruleset).for_each(|finding| shown.add(finding));
    unreachable::find(ruleset, &covers).for_each(|finding| shown.add(finding));
    shadowed::find(session, &covers).for_each(|finding| shown.add(finding));
    conflicting::find(session, &covers).for_each(|finding| shown.add(finding));
    redundant::find(session, &covers).for_each(|finding| shown.add(finding));
    let mut findings: Vec<Diagnostic> = shown.findings.into_values().collect();
    if shown.more > 0 {
        let message = format!("{} more findings are not shown", shown.more);
        findings.push(Diagnostic::note(TOO_MANY, message, None));
    }
    findings
}

/// The findings that come first in the text, and how many more there are. The rules that a line's address lists make are
/// one rule to the user.
#[derive(Default)]
struct Shown {
    findings: BTreeMap<(Option<Span>, Code), Diagnostic>,
    more: usize,
    last: Option<(Option<Span>, Code)>,
}

impl Shown {
    fn add(&mut self, finding: Diagnostic) {
        let key = (finding.span, finding.code);
        if self.last == Some(key) || self.findings.contains_key(&key) {
            return;
        }
        self.last = Some(key);
        self.findings.insert(key, finding);
        if self.findings.len() > limits::DIAGNOSTICS_MAX {
            self.findings.pop_last();
            self.more += 1;
        }
    }
}

/// Whether no packet that matches a rule with this action is looked at by a later rule of the same chain.
fn ends_chain(action: &Action) -> bool {
    action.ends() || matches!(action, Action::Goto(_) | Action::Return)
}

/// The action as iptables writes it.
fn action_name(ruleset: &Ruleset, action: &Action) -> String {
    match action {
        Action::Continue => "no action".into(),
        Action::Accept | Action::Pass => "ACCEPT".into(),
        Action::Drop => "DROP".into(),
        Action::Reject(_) => "REJECT".into(),
        Action::Jump(chain) => format!("a jump to {}", ruleset.chains[*chain].name),
        Action::Goto(chain) => format!("a goto to {}", ruleset.chains[*chain].name),
        Action::Return => "RETURN".into(),
        Action::Write(_) => "a change".into(),
        Action::Effect { what, .. } | Action::Steal(what) => what.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::ReadOptions;
    use polc_ir::source::SourceMap;

    /// Findings as `code line`, for a filter table with these lines from line 2 on.
    fn findings(lines: &str) -> Vec<(u16, u32)> {
        findings_in("filter", "", lines)
    }

    /// The same for any table, with ipset files' text.
    fn findings_in(table: &str, sets: &str, lines: &str) -> Vec<(u16, u32)> {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", format!("*{table}\n{lines}\nCOMMIT\n"));
        let sets = sources.add("sets", sets);
        let session = Session::read(sources, file, &[sets], &ReadOptions::default());
        assert!(!session.has_errors(), "{:?}", session.diagnostics);
        lint(&session)
            .into_iter()
            .map(|finding| {
                (finding.code.0, session.sources.line_column(finding.span.expect("lints point at text")).line)
            })
            .collect()
    }

    #[test]
    fn circles_that_no_packet_comes_to_end() {
        let found =
            findings(":a - [0:0]\n:b - [0:0]\n-A a -j b\n-A b -j a\n-A INPUT -j ACCEPT\n-A INPUT -j a");
        // The rule behind the one that takes all packets.
        assert!(found.iter().any(|(_, line)| *line == 7), "{found:?}");
    }

    #[test]
    fn a_wider_rule_with_the_same_verdict_shadows() {
        assert_eq!(
            findings(
                "-A INPUT -s 10.0.0.0/8 -j DROP\n-A INPUT -s 10.1.0.0/16 -p tcp -m tcp --dport 22 -j DROP"
            ),
            [(401, 3)]
        );
        assert_eq!(findings("-A INPUT -s 10.1.0.0/16 -j DROP\n-A INPUT -s 10.0.0.0/8 -p tcp -j ACCEPT"), []);
    }

    #[test]
    fn the_same_condition_with_another_verdict_conflicts() {
        assert_eq!(
            findings(
                "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j DROP\n\
                 -A INPUT -p tcp -m tcp --dport 23 -j DROP"
            ),
            [(407, 3)]
        );
    }

    #[test]
    fn nothing_is_reached_behind_a_rule_that_matches_all() {
        assert_eq!(
            findings("-A INPUT -j ACCEPT\n-A INPUT -s 10.0.0.1 -j DROP\n-A INPUT -s 10.0.0.2 -j DROP"),
            [(402, 3)]
        );
    }

    #[test]
    fn nothing_is_reached_behind_a_chain_that_ends_all() {
        let chains = ":USED - [0:0]\n:DEEP - [0:0]\n-A INPUT -p tcp -j USED\n-A INPUT -j USED\n-A INPUT -s 10.0.0.1 -j DROP\n";
        let findings = |rules: &str| findings(&format!("{chains}{rules}"));
        // Behind the jump, in line 6.
        assert_eq!(findings("-A USED -j DROP\n-A DEEP -j USED\n-A FORWARD -j DEEP"), [(402, 6)]);
        assert_eq!(findings("-A USED -p udp -j ACCEPT\n-A USED -g DEEP\n-A DEEP -j DROP"), [(402, 6)]);
        // Some packets come back.
        assert_eq!(findings("-A USED -p udp -j RETURN\n-A USED -j DEEP\n-A DEEP -j DROP"), []);
        assert_eq!(findings("-A USED -p udp -g DEEP\n-A USED -j ACCEPT\n-A DEEP -p udp -j DROP"), []);
        assert_eq!(findings("-A USED -m connlimit --connlimit-above 3 -j DROP\n-A FORWARD -j DEEP"), []);
    }

    #[test]
    fn conditions_that_exclude_each_other_contradict() {
        assert_eq!(findings("-A INPUT -m mark --mark 1 -m mark --mark 2 -j DROP"), [(403, 2)]);
    }

    #[test]
    fn a_rule_before_a_wider_one_with_the_same_verdict_is_redundant() {
        assert_eq!(findings("-A INPUT -s 10.0.0.1 -j DROP\n-A INPUT -s 10.0.0.0/8 -j DROP"), [(404, 2)]);
        // What stands between may decide otherwise.
        assert_eq!(
            findings(
                "-A INPUT -s 10.0.0.1 -j DROP\n-A INPUT -p tcp -j ACCEPT\n-A INPUT -s 10.0.0.0/8 -j DROP"
            ),
            []
        );
    }

    #[test]
    fn a_rule_that_drops_what_it_can_not_read_is_not_redundant() {
        // Without the first rule, a TCP packet of four bytes would be accepted.
        let first = "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT";
        assert_eq!(findings(&format!("{first}\n-A INPUT -p tcp -j ACCEPT")), []);
        // The same match stands in the second.
        let wider = "-A INPUT -p tcp -m tcp --dport 20:30 -j ACCEPT";
        assert_eq!(findings(&format!("{first}\n{wider}")), [(404, 2)]);
        // The second sees no packets from elsewhere, so the first is not redundant; the second itself is.
        let narrow = "-A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 20:30 -j ACCEPT";
        assert_eq!(findings(&format!("{first}\n{narrow}\n{wider}")), [(404, 3)]);
    }

    #[test]
    fn a_rule_before_one_that_drops_what_it_can_not_read_is_not_redundant() {
        // Without the first rule, the second drops a TCP packet of four bytes.
        let first = "-A INPUT -s 10.0.0.1 -j ACCEPT";
        let last = "-A INPUT -s 10.0.0.0/8 -j ACCEPT";
        let between = "-p tcp -m tcp --dport 22 -j ACCEPT";
        assert_eq!(findings(&format!("{first}\n-A INPUT {between}\n{last}")), []);
        assert_eq!(findings(&format!("{first}\n-A INPUT -s 11.0.0.0/8 {between}\n{last}")), [(404, 2)]);
        // The rule itself drops it, or all.
        assert_eq!(
            findings(&format!("{first}\n-A INPUT {between}\n{last}").replace("ACCEPT", "DROP")),
            [(404, 2)]
        );
        let same = "-A INPUT -s 10.0.0.1 -p tcp -m tcp --dport 23 -j ACCEPT";
        let wide = "-A INPUT -p tcp -m tcp --dport 20:23 -j ACCEPT";
        assert_eq!(findings(&format!("{same}\n{wide}")), [(404, 2)]);
    }

    #[test]
    fn what_changes_in_between_covers_nothing() {
        let third = |table: &str, sets: &str, test: &str, change: &str| {
            let tests = |verdict: &str| format!("-A PREROUTING {test} -j {verdict}");
            let lines = format!("{}\n{change}\n{}", tests("ACCEPT"), tests("RETURN"));
            findings_in(table, sets, &lines)
        };
        for (test, change) in [
            ("-m mark --mark 0x1", "-A PREROUTING -p tcp -j MARK --set-xmark 0x1/0xffffffff"),
            (
                "-m mark --mark 0x1",
                ":m - [0:0]\n-A PREROUTING -p tcp -j m\n-A m -j MARK --set-xmark 0x1/0xffffffff",
            ),
            ("-m tos --tos 0x10/0xff", "-A PREROUTING -p udp -j TOS --set-tos 0x10/0xff"),
            ("-m ttl --ttl-eq 5", "-A PREROUTING -j TTL --ttl-dec 1"),
            ("-m connmark --mark 0x5", "-A PREROUTING -p tcp -j CONNMARK --set-xmark 0x5/0xffffffff"),
            ("-m u32 --u32 \"5&0xff=1\"", "-A PREROUTING -j TTL --ttl-dec 1"),
        ] {
            assert_eq!(third("mangle", "", test, change), [], "{test}");
        }
        let untracked = "-m conntrack --ctstate UNTRACKED";
        assert_eq!(third("raw", "", untracked, "-A PREROUTING -p tcp -j CT --notrack"), []);
        assert_eq!(third("raw", "", untracked, "-A PREROUTING -p tcp -j NOTRACK"), []);
        let set = "create b hash:ip\nadd b 1.1.1.1";
        let added = "-A PREROUTING -p tcp -j SET --add-set b src";
        assert_eq!(third("raw", set, "-m set --match-set b src", added), []);
        // What changes something else covers.
        let other = "-A PREROUTING -p tcp -j MARK --set-xmark 0x1/0xffffffff";
        assert_eq!(third("mangle", "", "-m ttl --ttl-eq 5", other), [(407, 4)]);
        assert_eq!(third("mangle", "", "-m ttl --ttl-eq 5", "-A PREROUTING -p tcp -j LOG"), [(407, 4)]);
    }

    #[test]
    fn a_set_that_rules_fill_is_not_empty() {
        let rules = "-A INPUT -m set --match-set s src -j ACCEPT\n";
        assert_eq!(findings_in("filter", "create s hash:ip", rules), [(405, 2)]);
        let fill = "-A INPUT -p tcp -m tcp --dport 1 -j SET --add-set s src";
        assert_eq!(findings_in("filter", "create s hash:ip", &format!("{rules}{fill}")), []);
    }

    #[test]
    fn a_list_of_the_other_familys_sets_is_said_to_be_that() {
        let rules = "-A INPUT -m set --match-set l src -j ACCEPT\n";
        let sets = "create v hash:ip family inet6\nadd v ::1\ncreate l list:set\nadd l v\n";
        assert_eq!(findings_in("filter", sets, rules), [(405, 2)]);
        let own = format!("{sets}create e hash:ip\nadd l e\n");
        assert_eq!(findings_in("filter", &own, rules), []);
    }

    #[test]
    fn chains_that_only_unused_chains_use_are_unused() {
        assert_eq!(
            findings(
                ":a - [0:0]\n:b - [0:0]\n:c - [0:0]\n-A INPUT -j c\n-A c -p tcp -j DROP\n-A a -j b\n-A b -j DROP"
            ),
            [(406, 2), (406, 3)]
        );
    }

    #[test]
    fn what_is_not_evaluated_covers_nothing() {
        assert_eq!(
            findings(
                "-A INPUT -m limit --limit 1/s -j ACCEPT\n-A INPUT -m limit --limit 1/s -j DROP\n\
                 -A INPUT -m recent --name x --rcheck -j DROP\n-A INPUT -m recent --name y --rcheck -j DROP"
            ),
            []
        );
    }

    #[test]
    fn many_rules_take_little_time() {
        let lines: Vec<String> = (0..40_000u32)
            .map(|n| {
                format!(
                    "-A INPUT -s 10.{}.{}.{} -p tcp -m tcp --dport {} -j DROP",
                    n >> 16,
                    n >> 8 & 255,
                    n & 255,
                    1 + n % 5000
                )
            })
            .collect();
        let start = std::time::Instant::now();
        assert_eq!(findings(&lines.join("\n")), []);
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    }

    #[test]
    fn findings_past_the_bound_are_counted() {
        let rules = "-A INPUT -p tcp -j ACCEPT\n".repeat(2 * limits::DIAGNOSTICS_MAX);
        let mut sources = SourceMap::new();
        let file = sources.add("rules", format!("*filter\n{rules}COMMIT\n"));
        let found = lint(&Session::read(sources, file, &[], &ReadOptions::default()));
        assert_eq!(found.len(), limits::DIAGNOSTICS_MAX + 1);
        let (rest, shown) = found.split_last().expect("there are findings");
        // The second rule is shadowed by the first, which is redundant for the second's sake.
        assert_eq!((shown[0].code, shown[1].code), (REDUNDANT, SHADOWED));
        assert!(shown.is_sorted_by_key(|finding| finding.span));
        assert!(rest.message.starts_with(&format!("{} more", limits::DIAGNOSTICS_MAX)), "{}", rest.message);
    }
}
