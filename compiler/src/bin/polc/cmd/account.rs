//! Where a rule set is judged, and the account of what is compiled there: what `check` and `verify` share, so that both
//! count as compiled what `compile` makes a program of.

use polc::guard;
use polc::place::{attach_for, best_attach, place as place_of};
use polc::reach::{Reach, never_reached};
use polc::report::{Report, Scope};
use polc::session::Session;
use polc::verify::{NOT_RUN, WRONG_TABLE};
use polc_backend_ebpf::emit::GENERATOR_FAULT;
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::{Attach, Connections, Mode, Place};
use polc_ir::hook::Hook;

use super::{counted, place};
use crate::cli::{AttachChoice, InputArgs, PlaceArgs};
use crate::failure::Failure;

/// Why rules are deferred that only such hooks reach for which no program can be made.
const NO_PROGRAM: &str = "no program is made for its hook";

/// The places at which rules are judged.
#[derive(Debug)]
pub(super) struct Judged {
    /// The place that the user named; else every hook with rules, where its packets are seen first and where most of what
    /// its rules ask for is known, each hook alone (so that a hook that defers everything does not hide the next) and as
    /// the default paths.
    pub places: Vec<Place>,
    /// The user named it.
    is_named: bool,
    mode: Mode,
    local_addresses: bool,
    /// What is asked of connections where packets arrive.
    connections: Connections,
    /// The account by the rules alone.
    report: Report,
}

impl Judged {
    /// At a named place the rules get what `compile` puts in front of them.
    pub(super) fn new(
        session: &mut Session,
        attach: Option<AttachChoice>,
        args: &PlaceArgs,
        input: &InputArgs,
    ) -> Result<Judged, Failure> {
        let named: Option<Attach> = match (attach, args.path()) {
            (Some(attach), _) => Some(attach.into()),
            (None, Some(path)) => Some(best_attach(path[0])),
            (None, None) => None,
        };
        let mut judged = Judged {
            places: Vec::new(),
            is_named: named.is_some(),
            mode: args.mode(),
            local_addresses: !input.local.is_empty(),
            connections: Connections::Unknown,
            report: Report::default(),
        };
        match named {
            Some(attach) => judged.places.push(place::whole(session, place::of(attach, args, input)?)),
            None => {
                if args.connections.is_some() {
                    judged.connections = args.connections(Attach::Xdp)?;
                }
                judged.places = judged.everywhere(session, args);
            }
        }
        judged.report = Report::new(session, judged.scope());
        if named.is_some() {
            judged.places.iter().for_each(|place| guard::leave_rewritten(&mut session.ruleset, place));
        }
        Ok(judged)
    }

    fn everywhere(&self, session: &Session, args: &PlaceArgs) -> Vec<Place> {
        let at = |path: &[Hook], attach| {
            // What is asked of connections is asked where packets arrive.
            let arrives = attach != Attach::TcEgress;
            let connections = if arrives { self.connections } else { Connections::Unknown };
            let place = place_of(path, attach, self.mode, self.local_addresses);
            Place { connections, counters: args.counters.into(), ..place }
        };
        let mut wanted: Vec<(Vec<Hook>, Attach)> =
            Hook::ALL.map(|hook| (vec![hook], attach_for(hook))).to_vec();
        wanted.push((vec![Hook::Forward], Attach::TcEgress));
        wanted.push((vec![Hook::Prerouting, Hook::Input], Attach::Xdp));
        wanted.push((vec![Hook::Output, Hook::Postrouting], Attach::TcEgress));
        let mut places: Vec<Place> = Vec::new();
        for (path, attach) in wanted {
            let place = at(&path, attach);
            // A path that adds nothing to a hook alone is that hook.
            let adds =
                path.len() == 1 || path.iter().all(|hook| session.ruleset.bears_on(&at(&[*hook], attach)));
            if !adds || !session.ruleset.bears_on(&place) {
                continue;
            }
            places.push(place.clone());
            // Rules are accounted for where most is known: a program is judged there, too, if it decides more.
            let best = at(&path, best_attach(path[0]));
            let compiled = |place| Report::new(session, Scope::At(place)).compiled();
            if attach == Attach::Xdp
                && best.attach == Some(Attach::TcIngress)
                && compiled(&best) > compiled(&place)
            {
                places.push(best);
            }
        }
        places
    }

    fn scope(&self) -> Scope<'_> {
        match self.places.as_slice() {
            [one] if self.is_named => Scope::At(one),
            _ => Scope::Everywhere {
                mode: self.mode,
                local_addresses: self.local_addresses,
                connections: self.connections,
            },
        }
    }

    /// Whether packets are left to the kernel where rules are too large for a program: unless there are no others, or
    /// the user asked for that very program.
    fn may_defer(&self) -> bool {
        self.mode == Mode::Accelerate && !self.is_named
    }
}

/// The account of a rule set at the places where it is judged, and what there is to say about it.
#[derive(Debug)]
pub(super) struct Account<'a> {
    session: &'a Session,
    judged: &'a Judged,
    report: Report,
    findings: Vec<Diagnostic>,
    /// What the passes found: where bounds end what a program decides.
    bounded: Vec<Diagnostic>,
    /// The places so far, and whether there is a program.
    places: Vec<(&'a Place, bool)>,
    /// How far packets get at those with a program.
    reached: Vec<(&'a Place, &'a Reach)>,
}

/// What there is to say of a rule set.
#[derive(Debug)]
pub(super) struct Accounted {
    pub report: Report,
    /// Lines that count as compiled and that no program comes to.
    pub never_reached: usize,
    pub findings: Vec<Diagnostic>,
}

impl<'a> Account<'a> {
    /// The account by the rules alone.
    pub(super) fn new(session: &'a Session, judged: &'a Judged) -> Account<'a> {
        Account {
            session,
            judged,
            report: judged.report.clone(),
            findings: session.diagnostics.clone(),
            bounded: Vec::new(),
            places: Vec::new(),
            reached: Vec::new(),
        }
    }

    /// Adds what compiling for a place found, and what kept it from becoming a program.
    pub(super) fn add(
        &mut self,
        place: &'a Place,
        found: &[Diagnostic],
        not_emitted: &[Diagnostic],
        reach: &'a Reach,
    ) {
        for finding in found {
            let mut finding = finding.clone();
            // Nothing may be deferred where there is nobody to defer to.
            if self.judged.mode == Mode::Replace && finding.severity == Severity::Warning {
                finding.severity = Severity::Error;
            }
            // The same bound at several places is one finding.
            if !self.findings.contains(&finding) {
                self.findings.push(finding.clone());
            }
            self.bounded.push(finding);
        }
        for finding in not_emitted {
            let excused =
                self.judged.may_defer() && ![GENERATOR_FAULT, NOT_RUN, WRONG_TABLE].contains(&finding.code);
            let severity = if excused { Severity::Warning } else { finding.severity };
            let note = format!("no program is made at {}", place::describe(place));
            self.findings.push(Diagnostic { severity, ..finding.clone().with_note(note) });
        }
        self.places.push((place, not_emitted.is_empty()));
        if not_emitted.is_empty() {
            self.reached.push((place, reach));
        }
    }

    /// The counts and all findings, those about deferred rules once for each rule or once for each reason (`grouped`).
    pub(super) fn finish(self, grouped: bool) -> Accounted {
        let Account { session, judged, mut report, mut findings, bounded, places, reached } = self;
        if !judged.is_named {
            report.defer_hooks(session, &hooks_without_program(&places), NO_PROGRAM);
        } else if places.iter().any(|(_, has_program)| !has_program) {
            report.defer_all(session, NO_PROGRAM);
        }
        findings.extend(match grouped {
            true => report.grouped_diagnostics(judged.mode),
            false => report.diagnostics(judged.mode),
        });
        findings.extend(report.elsewhere());
        // The passes' findings say why already.
        report.defer_bounded(session, &bounded, &reached);
        let (lines, stops) = never_reached(session, &report, &reached);
        findings.extend(stops);
        Accounted { report, never_reached: lines.len(), findings }
    }
}

/// The hooks that have a place of their own, but no program at any.
fn hooks_without_program(places: &[(&Place, bool)]) -> Vec<Hook> {
    let alone = |hook: Hook| places.iter().filter(move |(place, _)| place.path == [hook]);
    Hook::ALL
        .into_iter()
        .filter(|&hook| alone(hook).next().is_some() && alone(hook).all(|(_, has_program)| !has_program))
        .collect()
}

/// Orders findings as the text is read; those about no text come last.
pub(super) fn sort(findings: &mut [Diagnostic]) {
    findings.sort_by_key(|finding| {
        (finding.span.is_none(), finding.span.map(|span| (span.file, span.start)), finding.code)
    });
}

/// `12 rules: 9 compiled, 2 deferred, 1 rejected`.
pub(super) fn text(report: &Report) -> String {
    format!(
        "{}: {} compiled, {} deferred, {} rejected",
        counted(report.rules(), "rule"),
        report.compiled(),
        report.deferred(),
        report.rejected()
    )
}

/// 4 or 6.
pub(super) fn family_number(session: &Session) -> u8 {
    match session.family() {
        polc_ir::hook::Family::V4 => 4,
        polc_ir::hook::Family::V6 => 6,
    }
}
