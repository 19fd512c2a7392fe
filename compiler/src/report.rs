//! The account of a rule set: for every rule line, whether it is compiled, deferred or rejected.
//!
//! A line counts once, however many rules its address lists make, and every line that asks for a rule (`-A`, `-I`)
//! counts, so the three numbers add up to what a reader of the file counts. A line is *rejected* if it was not accepted,
//! be it where it stands (a match that its chain does not allow); *deferred* if a clause or action of it needs what its
//! place does not offer, so that packets which get as far are left to the kernel's own rules; *compiled* otherwise.
//! Lines that were read and have no effect (a section that a later one replaces, a line for the other address family, a
//! rule that `-D` or `-F` removes again) are compiled: an object without them decides as the kernel does.

use std::collections::{BTreeMap, BTreeSet};

use cranelift_entity::SecondaryMap;
use polc_frontend_iptables::codes::OTHER_FAMILY_LINE;
use polc_ir::diag::{Code, Diagnostic, Severity};
use polc_ir::entities::{Chain, Rule};
use polc_ir::env::{Attach, Connections, Mode, Place};
use polc_ir::hook::Hook;
use polc_ir::ruleset::deferral::rule_deferral;
use polc_ir::ruleset::{Action, RuleData, Ruleset};
use polc_ir::source::Span;

use crate::place::{best_attach, place};
use crate::session::Session;

/// Code of deferred rules, and of rules that replace mode can't do without.
pub const DEFERRED: Code = Code(301);

/// Code of the note that says how many rules a place does not reach.
pub const ELSEWHERE: Code = Code(302);

/// What became of a rule line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Decided by the object.
    Compiled,
    /// Packets that get as far as what the span covers are left to the kernel.
    Deferred {
        /// What needs more than there is.
        span: Span,
        /// What it needs, as a sentence's end.
        reason: String,
        /// How to give it.
        hint: Option<&'static str>,
    },
    /// No packet of the place passes its chain: another object, or the kernel, decides. Counts as deferred.
    Elsewhere,
    /// Not accepted; a diagnostic at the line says why.
    Rejected,
}

/// The account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Each rule line (counted from 1) and what became of it.
    pub lines: BTreeMap<u32, Status>,
}

/// Where the rules are judged.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// Each rule where the hooks that reach it are best served ([`best_attach`]).
    Everywhere {
        /// How the objects would be deployed.
        mode: Mode,
        /// Whether the host's addresses are given.
        local_addresses: bool,
        /// What is known of connections where packets arrive.
        connections: Connections,
    },
    /// At one place.
    At(&'a Place),
}

impl Report {
    /// Accounts for every rule line.
    pub fn new(session: &Session, scope: Scope<'_>) -> Report {
        let ruleset = &session.ruleset;
        let deferrals = Deferrals::new(ruleset, scope);
        let mut lines: BTreeMap<u32, Status> = BTreeMap::new();
        for (line, rules) in session.rules_by_line() {
            let deferred = rules.into_iter().find_map(|rule| deferrals.of(ruleset, rule));
            lines.insert(line, deferred.unwrap_or(Status::Compiled));
        }
        let rejected = rejected_lines(session);
        lines.retain(|line, _| !rejected.contains(line));
        let harmless = &lines_without_effect(session) - &rejected;
        let file = session.sources.file(session.rules_file);
        let asked: BTreeSet<u32> = (1..)
            .zip(file.text().lines())
            .filter(|(_, text)| asks_for_a_rule(text))
            .map(|(line, _)| line)
            .collect();
        lines.retain(|line, _| asked.contains(line));
        for line in asked {
            let status = if harmless.contains(&line) { Status::Compiled } else { Status::Rejected };
            lines.entry(line).or_insert(status);
        }
        Report { lines }
    }

    /// Defers the lines whose rules only these hooks reach: no program is made there, for the reason given.
    pub fn defer_hooks(&mut self, session: &Session, hooks: &[Hook], reason: &str) {
        let without = hooks.iter().fold(0, |bits, hook| bits | bit(*hook));
        let reached = hooks_reaching(&session.ruleset);
        self.defer(session, reason, |rule| {
            let hooks = reached[rule.chain];
            hooks != 0 && hooks & !without == 0
        });
    }

    /// Defers all lines: no program is made, for the reason given.
    pub fn defer_all(&mut self, session: &Session, reason: &str) {
        self.defer(session, reason, |_| true);
    }

    /// Defers the lines of which all rules are `which`.
    fn defer(&mut self, session: &Session, reason: &str, which: impl Fn(&RuleData) -> bool) {
        for (line, rules) in session.rules_by_line() {
            let mut data = rules.iter().map(|rule| &session.ruleset.rules[*rule]);
            let all = data.clone().all(&which);
            let (Some(status), Some(first)) = (self.lines.get_mut(&line), data.next()) else {
                continue;
            };
            if all && *status == Status::Compiled {
                *status = Status::Deferred { span: first.span, reason: reason.to_string(), hint: None };
            }
        }
    }

    /// Defers the lines that findings of the passes point at: where a bound ends what a program decides.
    pub fn defer_bounded(&mut self, session: &Session, findings: &[Diagnostic]) {
        for (span, finding) in findings.iter().filter_map(|finding| Some((finding.span?, finding))) {
            let line = session.sources.file(span.file).line(span.start);
            if let Some(status @ Status::Compiled) = self.lines.get_mut(&line) {
                *status = Status::Deferred { span, reason: finding.message.clone(), hint: None };
            }
        }
    }

    /// How many rule lines there are.
    pub fn rules(&self) -> usize {
        self.lines.len()
    }

    /// How many are decided by the object.
    pub fn compiled(&self) -> usize {
        self.count(|status| *status == Status::Compiled)
    }

    /// How many are left to the kernel, or to nobody in replace mode.
    pub fn deferred(&self) -> usize {
        self.count(|status| matches!(status, Status::Deferred { .. } | Status::Elsewhere))
    }

    /// How many could not be read.
    pub fn rejected(&self) -> usize {
        self.count(|status| *status == Status::Rejected)
    }

    fn count(&self, which: impl Fn(&Status) -> bool) -> usize {
        self.lines.values().filter(|status| which(status)).count()
    }

    /// A finding for each deferred line: a warning, or an error in replace mode. One note for all lines that the place
    /// does not reach.
    pub fn diagnostics(&self, mode: Mode) -> Vec<Diagnostic> {
        let severity = if mode == Mode::Replace { Severity::Error } else { Severity::Warning };
        let deferred = self.lines.values().filter_map(|status| match status {
            Status::Deferred { span, reason, hint } => Some((*span, reason, *hint)),
            Status::Compiled | Status::Elsewhere | Status::Rejected => None,
        });
        let mut findings: Vec<Diagnostic> = deferred
            .map(|(span, reason, hint)| {
                let finding = Diagnostic::new(severity, DEFERRED, format!("not compiled: {reason}"), span);
                let finding = match mode {
                    Mode::Accelerate => finding.with_note(
                        "packets that get as far as this are left to the kernel's own rules, which still decide them",
                    ),
                    Mode::Replace if hint.is_some() => {
                        finding.with_note("in replace mode the kernel's own rules are gone")
                    }
                    Mode::Replace => finding.with_hint(
                        "in replace mode the kernel's own rules are gone; remove the rule, or compile with `--mode accelerate`",
                    ),
                };
                match hint {
                    Some(hint) => finding.with_hint(hint),
                    None => finding,
                }
            })
            .collect();
        findings.extend(self.elsewhere());
        findings
    }

    fn elsewhere(&self) -> Option<Diagnostic> {
        let count = self.count(|status| *status == Status::Elsewhere);
        let (rules, chains) = if count == 1 { ("rule is", "a chain") } else { ("rules are", "chains") };
        (count > 0).then(|| {
            Diagnostic::note(
                ELSEWHERE,
                format!("{count} {rules} in {chains} that no packet passes at this place"),
                None,
            )
        })
    }

    /// As [`Report::diagnostics`], with one finding for each reason rather than each line: people read the reason once.
    pub fn grouped_diagnostics(&self, mode: Mode) -> Vec<Diagnostic> {
        let mut lines_of: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for (line, status) in &self.lines {
            if let Status::Deferred { reason, .. } = status {
                lines_of.entry(reason).or_default().push(*line);
            }
        }
        let mut first_lines: BTreeMap<u32, &[u32]> = BTreeMap::new();
        for lines in lines_of.values() {
            first_lines.insert(lines[0], &lines[1..]);
        }
        let deferred = self.lines.iter().filter(|(_, status)| matches!(status, Status::Deferred { .. }));
        deferred
            .zip(self.diagnostics(mode))
            .filter_map(|((line, _), finding)| {
                let others = *first_lines.get(line)?;
                Some(if others.is_empty() { finding } else { finding.with_note(same_for(others)) })
            })
            .chain(self.elsewhere())
            .collect()
    }
}

/// `the same holds for lines 7, 9 and 12 more`.
fn same_for(lines: &[u32]) -> String {
    /// Line numbers shown before the rest is only counted.
    const SHOWN: usize = 8;
    let shown: Vec<String> = lines.iter().take(SHOWN).map(u32::to_string).collect();
    let rest = lines.len() - shown.len();
    let tail = if rest == 0 { String::new() } else { format!(" and {rest} more") };
    format!("the same holds for line{} {}{tail}", if lines.len() == 1 { "" } else { "s" }, shown.join(", "))
}

/// Whether a line asks for a rule: `-A` or `-I`, after counters and an address family, if any.
fn asks_for_a_rule(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace();
    let mut word = words.next();
    if word.is_some_and(|word| word.starts_with('[') && word.ends_with(']')) {
        word = words.next();
    }
    if matches!(word, Some("-4" | "-6" | "--ipv4" | "--ipv6")) {
        word = words.next();
    }
    word.is_some_and(|word| {
        word.starts_with("-A") || word.starts_with("-I") || word == "--append" || word == "--insert"
    })
}

/// Lines that were read but leave no rule behind.
fn lines_without_effect(session: &Session) -> BTreeSet<u32> {
    let file = session.sources.file(session.rules_file);
    let tables = session.dump.replaced.iter().chain(&session.dump.tables);
    let rules = tables.flat_map(|table| table.rules.iter().map(|rule| rule.span.start));
    let skipped = session
        .diagnostics
        .iter()
        .filter(|finding| finding.code == OTHER_FAMILY_LINE && finding.severity == Severity::Note)
        .filter_map(|finding| finding.span.map(|span| span.start));
    rules.chain(skipped).map(|start| file.line(start)).collect()
}

/// Lines that were not accepted.
fn rejected_lines(session: &Session) -> BTreeSet<u32> {
    let file = session.sources.file(session.rules_file);
    let tables = session.dump.replaced.iter().chain(&session.dump.tables);
    tables.flat_map(|table| table.rejected.iter().map(|span| file.line(span.start))).collect()
}

/// The places at which each chain's rules are judged.
struct Deferrals {
    places: Vec<(u8, Place)>,
    reached: SecondaryMap<Chain, u8>,
}

impl Deferrals {
    fn new(ruleset: &Ruleset, scope: Scope<'_>) -> Deferrals {
        match scope {
            Scope::At(place) => {
                Deferrals { places: vec![(1, place.clone())], reached: SecondaryMap::with_default(1) }
            }
            Scope::Everywhere { mode, local_addresses, connections } => {
                let at = |hook| {
                    let attach = best_attach(hook);
                    let arrives = attach == Attach::TcIngress;
                    let connections = if arrives { connections } else { Connections::Unknown };
                    Place { connections, ..place(&[hook], attach, mode, local_addresses) }
                };
                Deferrals {
                    places: Hook::ALL.map(|hook| (bit(hook), at(hook))).to_vec(),
                    reached: hooks_reaching(ruleset),
                }
            }
        }
    }

    fn of(&self, ruleset: &Ruleset, rule: Rule) -> Option<Status> {
        let data = &ruleset.rules[rule];
        let hooks = match self.reached[data.chain] {
            // A chain that nothing reaches decides nothing; it is judged where most is known.
            0 if self.places.len() == 1 => self.places[0].0,
            0 => bit(Hook::Forward),
            hooks => hooks,
        };
        let mut places = self.places.iter().filter(|(at, _)| hooks & at != 0).peekable();
        if places.peek().is_none() {
            return Some(Status::Elsewhere);
        }
        places.find_map(|(_, place)| {
            let (span, deferral) = rule_deferral(ruleset, place, data)?;
            Some(Status::Deferred { span, reason: deferral.to_string(), hint: deferral.hint() })
        })
    }
}

fn bit(hook: Hook) -> u8 {
    1 << hook as u8
}

/// For each chain, the hooks whose base chains lead to it, as bits.
fn hooks_reaching(ruleset: &Ruleset) -> SecondaryMap<Chain, u8> {
    let mut reached: SecondaryMap<Chain, u8> = SecondaryMap::new();
    let mut pending: Vec<(Chain, u8)> = Vec::new();
    for (chain, data) in &ruleset.chains {
        if let Some(base) = data.base {
            pending.push((chain, bit(base.hook)));
        }
    }
    while let Some((chain, hooks)) = pending.pop() {
        if reached[chain] & hooks == hooks {
            continue;
        }
        reached[chain] |= hooks;
        for &rule in &ruleset.chains[chain].rules {
            if let Action::Jump(next) | Action::Goto(next) = ruleset.rules[rule].action {
                pending.push((next, reached[chain]));
            }
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::ReadOptions;
    use polc_ir::source::SourceMap;

    const EVERYWHERE: Scope<'_> = Scope::Everywhere {
        mode: Mode::Accelerate,
        local_addresses: false,
        connections: Connections::Unknown,
    };

    fn report(text: &str) -> Report {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        Report::new(&session, EVERYWHERE)
    }

    #[test]
    fn every_rule_line_counts_once() {
        let report = report(
            "*filter\n-A INPUT -s 10.0.0.1,10.0.0.2 -j DROP\n[1:2] -A INPUT -m conntrack --ctstate NEW -j DROP\n\
             -A INPUT --dprot 5 -j DROP\n-A NOWHERE -j DROP\nCOMMIT\n-A INPUT -j DROP\n",
        );
        assert_eq!(report.rules(), 5);
        assert_eq!((report.compiled(), report.deferred(), report.rejected()), (1, 1, 3));
    }

    #[test]
    fn what_its_chain_does_not_allow_is_rejected() {
        let report = report(
            "*filter\n-A INPUT -s 10.0.0.1,10.0.0.2 -m owner --uid-owner 0 -j DROP\n-A INPUT -j MASQUERADE\n\
             -A OUTPUT -m owner --uid-owner 0 -j DROP\n-A OUTPUT -j DROP\nCOMMIT\n",
        );
        let statuses: Vec<&Status> = report.lines.values().collect();
        assert!(
            matches!(
                statuses[..],
                [Status::Rejected, Status::Rejected, Status::Deferred { .. }, Status::Compiled]
            ),
            "{statuses:?}"
        );
    }

    #[test]
    fn jumps_that_netfilter_refuses_are_rejected() {
        let circle = report(
            "*filter\n:a - [0:0]\n:b - [0:0]\n-A INPUT -j a\n-A a -j b\n-A b -s 10.0.0.1,10.0.0.2 -j a\n-A b -j DROP\nCOMMIT\n",
        );
        assert_eq!((circle.rules(), circle.compiled(), circle.rejected()), (4, 3, 1));
        let depth = polc_ir::limits::JUMP_DEPTH_MAX + 1;
        let chains: String = (0..depth).map(|chain| format!(":c{chain} - [0:0]\n")).collect();
        let jumps: String = (1..depth).map(|to| format!("-A c{} -j c{to}\n", to - 1)).collect();
        let deep = report(&format!("*filter\n{chains}-A INPUT -j c0\n{jumps}COMMIT\n"));
        assert_eq!((deep.rules(), deep.rejected()), (depth, 1));
    }

    #[test]
    fn a_replaced_section_is_accounted_for() {
        let report = report("*filter\n-A INPUT -j DROP\nCOMMIT\n*filter\n-A INPUT -j ACCEPT\nCOMMIT\n");
        assert_eq!((report.rules(), report.compiled()), (2, 2));
    }

    #[test]
    fn reasons_are_said_once_for_people() {
        let text = "*filter\n-A INPUT -m conntrack --ctstate NEW -j DROP\n".to_string()
            + &"-A INPUT -m conntrack --ctstate NEW -j ACCEPT\n".repeat(12)
            + "COMMIT\n";
        let report = report(&text);
        assert_eq!(report.diagnostics(Mode::Accelerate).len(), 13);
        let grouped = report.grouped_diagnostics(Mode::Accelerate);
        assert_eq!(grouped.len(), 1);
        assert!(
            grouped[0].notes[1].ends_with("lines 3, 4, 5, 6, 7, 8, 9, 10 and 4 more"),
            "{:?}",
            grouped[0].notes
        );
    }
}
