//! The account of a rule set: for every rule line, whether it is compiled, deferred or rejected.
//!
//! A line counts once, however many rules its address lists make, and every line that asks for a rule (`-A`, `-I`,
//! however they are spelled) counts, so the three numbers add up to what a reader of the file counts. A line is
//! *rejected* if it was not accepted, be it where it stands (a match that its chain does not allow); *deferred* if a
//! clause or action of it needs what its place does not offer, so that packets which get as far are left to the kernel's
//! own rules, or if it is for the other address family, whose packets are left to another object; *compiled* otherwise.
//! Lines that were read and leave no rule (a section that a later one replaces, a rule that `-D` or `-F` removes again)
//! are compiled: an object without them decides as the kernel does.

use std::collections::{BTreeMap, BTreeSet};

use cranelift_entity::SecondaryMap;
use polc_ir::derived::TCP;
use polc_ir::diag::{Code, Diagnostic, Severity};
use polc_ir::entities::{Chain, Rule};
use polc_ir::env::{Attach, Connections, Mode, Place};
use polc_ir::field::Field;
use polc_ir::hook::Hook;
use polc_ir::ruleset::deferral::{clause_deferral, drops_undecided, rule_deferral};
use polc_ir::ruleset::{Action, ClauseKind, Policy, RuleData, Ruleset};
use polc_ir::source::Span;

use crate::place::{best_attach, place};
use crate::reach::{Reach, behind_bounds};
use crate::session::Session;

/// Code of deferred rules, and of rules that replace mode can't do without.
pub const DEFERRED: Code = Code(301);

/// Code of the warning that fragments are dropped which rules can't decide.
pub const FRAGMENTS: Code = Code(305);

/// Code of the note that rules decide segments where the kernel's would decide what they are merged to.
pub const SEGMENTS: Code = Code(306);

/// Code of the note that says how many rules a place does not reach.
pub const ELSEWHERE: Code = Code(302);

/// Why rules are deferred that no program comes to for a bound.
const BEHIND_BOUND: &str = "packets are deferred before they come to it, where a bound of the program is met";

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
    /// The line is for the other address family: another object, or the kernel, decides. Counts as deferred.
    OtherFamily,
    /// Not accepted; a diagnostic at the line says why.
    Rejected,
}

/// The account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Each rule line (counted from 1) and what became of it.
    pub lines: BTreeMap<u32, Status>,
    /// What becomes of fragments where nobody else decides them.
    fragments: Option<Diagnostic>,
    /// What becomes of segments that the kernel would merge first.
    segments: Option<Diagnostic>,
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
        let lines_of = |spans: &[Span]| -> BTreeSet<u32> {
            let file = session.sources.file(session.rules_file);
            spans.iter().map(|span| file.line(span.start)).collect()
        };
        let asked = lines_of(&session.dump.rule_lines);
        let other_family = lines_of(&session.dump.other_family);
        let tables = || session.dump.replaced.iter().chain(&session.dump.tables);
        let rejected: BTreeSet<u32> = tables().flat_map(|table| lines_of(&table.rejected)).collect();
        let read = tables().flat_map(|table| table.rules.iter().map(|rule| rule.span)).collect::<Vec<_>>();
        let read = lines_of(&read);
        lines.retain(|line, _| asked.contains(line) && !rejected.contains(line));
        let fragments = deferrals.fragments(session);
        for line in asked {
            lines.entry(line).or_insert(match () {
                () if other_family.contains(&line) => Status::OtherFamily,
                () if read.contains(&line) && !rejected.contains(&line) => Status::Compiled,
                () => Status::Rejected,
            });
        }
        Report { lines, fragments, segments: deferrals.segments(session) }
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

    /// Defers the lines that findings of the passes point at: where a bound ends what a program decides; and what is
    /// behind.
    pub fn defer_bounded(&mut self, session: &Session, findings: &[Diagnostic], places: &[(&Place, &Reach)]) {
        for (span, finding) in findings.iter().filter_map(|finding| Some((finding.span?, finding))) {
            let line = session.sources.file(span.file).line(span.start);
            if let Some(status @ Status::Compiled) = self.lines.get_mut(&line) {
                *status = Status::Deferred { span, reason: finding.message.clone(), hint: None };
            }
        }
        let behind = behind_bounds(session, self, places);
        if !behind.is_empty() {
            let line = |span: Span| session.sources.file(span.file).line(span.start);
            self.defer(session, BEHIND_BOUND, |rule| behind.contains(&line(rule.span)));
        }
    }

    /// Makes this the account of what is put at its place and at another's, each with a program of its own: a line is
    /// compiled if it is wherever one of them is reached by its packets.
    pub fn join(&mut self, other: &Report) {
        for (line, status) in &other.lines {
            let own = self.lines.entry(*line).or_insert(Status::Elsewhere);
            if *own == Status::Elsewhere || *own == Status::Compiled && *status != Status::Elsewhere {
                *own = status.clone();
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
        self.count(|status| {
            matches!(status, Status::Deferred { .. } | Status::Elsewhere | Status::OtherFamily)
        })
    }

    /// How many could not be read.
    pub fn rejected(&self) -> usize {
        self.count(|status| *status == Status::Rejected)
    }

    fn count(&self, which: impl Fn(&Status) -> bool) -> usize {
        self.lines.values().filter(|status| which(status)).count()
    }

    /// A finding for each deferred line: a warning, or an error in replace mode. Lines that the place does not reach are
    /// [`Report::elsewhere`]'s.
    pub fn diagnostics(&self, mode: Mode) -> Vec<Diagnostic> {
        let severity = if mode == Mode::Replace { Severity::Error } else { Severity::Warning };
        let deferred = self.lines.values().filter_map(|status| match status {
            Status::Deferred { span, reason, hint } => Some((*span, reason, *hint)),
            Status::Compiled | Status::Elsewhere | Status::OtherFamily | Status::Rejected => None,
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
        findings.extend(self.fragments.iter().chain(&self.segments).cloned());
        findings
    }

    /// A note of how many rules the place does not reach, if any.
    pub fn elsewhere(&self) -> Option<Diagnostic> {
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

    /// What is not in force once programs for `hooks` stand in for the kernel's rules: rules of other hooks, and policies
    /// there that drop. A note each; errors where the user did not name the hooks, and so wants all of it.
    pub fn left_out(&self, session: &Session, hooks: &[Hook], severity: Severity) -> Vec<Diagnostic> {
        let ruleset = &session.ruleset;
        let by_line = session.rules_by_line();
        let of = |(line, status): (&u32, &Status)| {
            let rule = by_line.get(line).filter(|_| *status == Status::Elsewhere)?.first()?;
            Some(ruleset.rules[*rule].span)
        };
        let first = self.lines.iter().find_map(of);
        let mut findings: Vec<Diagnostic> =
            self.elsewhere().into_iter().map(|finding| Diagnostic { span: first, ..finding }).collect();
        for data in ruleset.chains.values() {
            let Some(base) = data.base.filter(|base| base.policy == Policy::Drop) else { continue };
            if !hooks.contains(&base.hook) {
                let message =
                    format!("policy DROP of a chain that no packet passes at this place: {}", data.name);
                findings.push(Diagnostic::note(ELSEWHERE, message, data.span));
            }
        }
        if severity == Severity::Error {
            for finding in &mut findings {
                finding.severity = severity;
            }
            let hooks: Vec<String> = hooks.iter().map(|hook| format!("--hook {hook}")).collect();
            let hint = format!(
                "in replace mode the kernel's own rules are gone: `--attach netfilter` has every hook, and `{}` says that the others are to be without rules",
                hooks.join(" ")
            );
            if let Some(last) = findings.last_mut() {
                last.hint = Some(hint);
            }
        }
        findings
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
            .chain(self.fragments.iter().chain(&self.segments).cloned())
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

/// The places at which each chain's rules are judged.
struct Deferrals {
    places: Vec<(u8, Place)>,
    reached: SecondaryMap<Chain, u8>,
}

impl Deferrals {
    fn new(ruleset: &Ruleset, scope: Scope<'_>) -> Deferrals {
        match scope {
            Scope::At(place) => Deferrals {
                places: vec![(place.path.iter().fold(0, |bits, hook| bits | bit(*hook)), place.clone())],
                reached: hooks_reaching(ruleset),
            },
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

    /// The places where packets reach a chain.
    fn places(&self, chain: Chain) -> impl Iterator<Item = &Place> {
        let hooks = match self.reached[chain] {
            // A chain that nothing reaches decides nothing; it is judged where most is known.
            0 if self.places.len() == 1 => self.places[0].0,
            0 => bit(Hook::Forward),
            hooks => hooks,
        };
        self.places.iter().filter(move |(at, _)| hooks & at != 0).map(|(_, place)| place)
    }

    fn of(&self, ruleset: &Ruleset, rule: Rule) -> Option<Status> {
        let data = &ruleset.rules[rule];
        let mut places = self.places(data.chain).peekable();
        if places.peek().is_none() {
            return Some(Status::Elsewhere);
        }
        places.find_map(|place| {
            let (span, deferral) = rule_deferral(ruleset, place, data)?;
            Some(Status::Deferred { span, reason: deferral.to_string(), hint: deferral.hint() })
        })
    }

    /// Rules at which fragments are dropped, since only the whole packet would tell.
    fn fragments(&self, session: &Session) -> Option<Diagnostic> {
        let ruleset = &session.ruleset;
        let undecided = |data: &RuleData| {
            self.places(data.chain).filter(|place| drops_undecided(place, true)).find_map(|place| {
                let whole = clause_deferral(ruleset, place, data, false);
                clause_deferral(ruleset, place, data, true).filter(|_| whole.is_none())
            })
        };
        let mut found = ruleset.rules.values().filter_map(undecided);
        let (span, deferral) = found.next()?;
        let message = format!("fragments that get as far as this are dropped: {deferral}");
        let finding = Diagnostic::warning(FRAGMENTS, message, span);
        Some(
            same_for_more(finding, found.count())
                .with_hint("at netfilter hooks (`--attach netfilter`) a program meets what the rules would"),
        )
    }

    /// Rules that may tell TCP segments from the packet that a device with GRO makes of them behind XDP: by its length,
    /// or by PSH and FIN, which it has if one of them has (net/ipv4/tcp_offload.c, `tcp_gro_receive`).
    fn segments(&self, session: &Session) -> Option<Diagnostic> {
        let ruleset = &session.ruleset;
        let before = |data: &RuleData| self.places(data.chain).any(|place| place.attach == Some(Attach::Xdp));
        let told = |data: &RuleData| {
            let tests = data.clauses.iter().filter_map(|clause| match &clause.kind {
                ClauseKind::Any(tests) => Some((clause.span, tests)),
                _ => None,
            });
            // Segments that are merged have ACK, and none of SYN, RST and URG.
            const ACK: u128 = 0x10;
            const PSH: u128 = 0x08;
            const FIN: u128 = 0x01;
            let mut found = None;
            for (span, tests) in tests {
                let is = |field: Field| tests.iter().all(|test| test.field == field);
                let holds = |value: u128| tests.iter().any(|test| test.holds(value));
                if is(Field::Proto) && !holds(TCP.into()) {
                    return None;
                }
                let flags = [ACK, ACK | PSH, ACK | FIN, ACK | PSH | FIN].map(holds);
                if is(Field::Length) || is(Field::TcpFlags) && flags.iter().any(|&one| one != flags[0]) {
                    found = found.or(Some(span));
                }
            }
            found
        };
        let mut found = ruleset.rules.values().filter(|data| before(data)).filter_map(told);
        let span = found.next()?;
        let message = "each TCP segment is decided here; iptables decides the packet that a device with GRO merges them to";
        Some(
            same_for_more(Diagnostic::note(SEGMENTS, message, span), found.count())
                .with_hint("tc (`--attach tc-ingress`) and netfilter's hooks are behind GRO; `ethtool -K DEV gro off` turns it off"),
        )
    }
}

/// The finding, with a note of how many more rules it is about.
fn same_for_more(finding: Diagnostic, rules: usize) -> Diagnostic {
    match rules {
        0 => finding,
        1 => finding.with_note("the same holds for one more rule"),
        others => finding.with_note(format!("the same holds for {others} more rules")),
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

    fn session(text: &str) -> Session {
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", text);
        Session::read(sources, file, &[], &ReadOptions::default())
    }

    fn report(text: &str) -> Report {
        Report::new(&session(text), EVERYWHERE)
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
    fn rules_that_tell_segments_from_what_they_are_merged_to_are_named() {
        let about = |rule: &str, attach: Attach| {
            let session =
                session(&format!("*filter\n-A INPUT -s 10.0.0.1 -j DROP\n-A INPUT {rule} -j DROP\nCOMMIT\n"));
            assert!(!session.has_errors(), "{rule}: {:?}", session.diagnostics);
            let place = place(&[Hook::Input], attach, Mode::Accelerate, false);
            let found = Report::new(&session, Scope::At(&place)).diagnostics(Mode::Accelerate);
            assert!(found.iter().all(|finding| finding.code == SEGMENTS), "{rule}: {found:?}");
            found.len()
        };
        for (rule, findings) in [
            ("-m length --length 100:1500", 1),
            ("-p tcp -m length --length 40", 1),
            ("-p udp -m length --length 100", 0),
            ("-p tcp -m tcp --tcp-flags ALL ACK", 1),
            ("-p tcp -m tcp --tcp-flags PSH PSH", 1),
            ("-p tcp -m tcp ! --tcp-flags FIN,ACK ACK", 1),
            ("-p tcp -m tcp --syn", 0),
            ("-p tcp -m tcp ! --syn", 0),
            ("-p tcp -m tcp --tcp-flags ALL NONE", 0),
            ("-p tcp -m tcp --tcp-flags FIN,SYN FIN,SYN", 0),
            ("-p tcp -m tcp --dport 22", 0),
        ] {
            assert_eq!(about(rule, Attach::Xdp), findings, "{rule}");
            assert_eq!(about(rule, Attach::TcIngress), 0, "{rule}");
        }
    }

    /// What becomes of a line that two programs meet is what becomes of it at worst.
    #[test]
    fn accounts_of_several_places_join() {
        let session = session(
            "*filter\n:OWN - [0:0]\n-A INPUT -j OWN\n-A FORWARD -j OWN\n-A OUTPUT -j DROP\n\
             -A OWN -m mac --mac-source 02:00:00:00:00:01 -j DROP\n-A INPUT --nosuch\nCOMMIT\n",
        );
        let at =
            |hook, attach| Report::new(&session, Scope::At(&place(&[hook], attach, Mode::Accelerate, false)));
        let (input, forward) = (at(Hook::Input, Attach::TcIngress), at(Hook::Forward, Attach::Netfilter));
        assert_eq!((input.compiled(), input.deferred(), input.rejected()), (2, 2, 1));
        assert_eq!((forward.compiled(), forward.deferred(), forward.rejected()), (1, 3, 1));
        for (one, other) in [(&input, &forward), (&forward, &input)] {
            let mut both = one.clone();
            both.join(other);
            // OUTPUT's is elsewhere, and OWN's compiled at one of the two only.
            assert_eq!((both.compiled(), both.deferred(), both.rejected()), (2, 2, 1));
            assert!(both.elsewhere().is_some_and(|note| note.message.starts_with("1 rule is")));
        }
    }

    #[test]
    fn lines_count_however_they_are_spelled() {
        let report = report(
            "*filter\n--app INPUT -j ACCEPT\n-vA INPUT -j DROP\n--ins=INPUT --nosuch\n-4 --append INPUT -j NOSUCH\n\
             -D INPUT 1\n-R INPUT 1 -m comment --comment -A -j DROP\n-D INPUT -m comment --comment -A\nCOMMIT\n\
             --app INPUT -j DROP\n",
        );
        assert_eq!((report.rules(), report.compiled(), report.rejected()), (5, 2, 3));
    }

    #[test]
    fn lines_of_the_other_family_are_left_to_another_object() {
        let report =
            report("*filter\n-6 -A INPUT -j DROP\n-A INPUT -6\n-6 -D INPUT 1\n-4 -A INPUT -j DROP\nCOMMIT\n");
        assert_eq!((report.rules(), report.compiled(), report.deferred()), (3, 1, 2));
        let many =
            format!("*filter\n{}COMMIT\n", "-6 -A INPUT\n".repeat(2 * polc_ir::limits::DIAGNOSTICS_MAX));
        assert_eq!(self::report(&many).deferred(), 2 * polc_ir::limits::DIAGNOSTICS_MAX);
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
    fn what_no_packet_of_the_place_comes_to_is_elsewhere() {
        let text = "*filter\n:user - [0:0]\n-A INPUT -j user\n-A FORWARD -j DROP\n-A user -j DROP\nCOMMIT\n";
        let session = session(text);
        let place = place(&[Hook::Input], Attach::Xdp, Mode::Accelerate, false);
        let report = Report::new(&session, Scope::At(&place));
        assert_eq!((report.rules(), report.compiled(), report.deferred()), (3, 2, 1));
        assert_eq!(report.diagnostics(Mode::Accelerate), []);
        let note = report.elsewhere().map(|note| note.message);
        assert_eq!(note.as_deref(), Some("1 rule is in a chain that no packet passes at this place"));
    }

    /// A policy that drops is as much of the rules as a rule is.
    #[test]
    fn what_replace_mode_leaves_out_is_told() {
        let text = "*filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT DROP [0:0]\n-A FORWARD -j DROP\nCOMMIT\n";
        let session = session(text);
        let place = place(&[Hook::Input], Attach::Xdp, Mode::Replace, true);
        let report = Report::new(&session, Scope::At(&place));
        let told = |hooks, severity| -> Vec<(Severity, String)> {
            let found = report.left_out(&session, hooks, severity);
            found.into_iter().map(|finding| (finding.severity, finding.message)).collect()
        };
        let rule = "1 rule is in a chain that no packet passes at this place";
        let policy = "policy DROP of a chain that no packet passes at this place: OUTPUT";
        for severity in [Severity::Note, Severity::Error] {
            let expected = [(severity, rule.to_string()), (severity, policy.to_string())];
            assert_eq!(told(&[Hook::Input], severity), expected);
        }
        assert_eq!(told(&[Hook::Input, Hook::Output], Severity::Note).len(), 1);
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
