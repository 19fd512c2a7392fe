//! `polc check`: read, account, lint.

use std::process::ExitCode;

use polc::flatten::flatten;
use polc::lint::lint;
use polc::place::{attach_for, best_attach, place as place_of};
use polc::report::{Report, Scope};
use polc::session::Session;
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::{Attach, Mode, Place};
use polc_ir::hook::Hook;
use serde::Serialize;

use super::{FOUND, counted, place, show, worst};
use crate::cli::{CheckArgs, ReportFormat};
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::render::{json, sarif};

/// The account and the findings, as docs/check-schema.json describes them.
#[derive(Debug, Serialize)]
struct CheckResult<'a> {
    file: &'a str,
    family: u8,
    semantics: polc_ir::hook::Semantics,
    rules: usize,
    compiled: usize,
    deferred: usize,
    rejected: usize,
    diagnostics: Vec<json::Finding<'a>>,
}

pub(super) fn run(args: &CheckArgs, output: &Output) -> Result<ExitCode, Failure> {
    let session = input::session(&args.file, &args.input)?;
    let mode = args.place.mode();
    let given = given_place(args)?;
    let scope = match &given {
        Some(place) => Scope::At(place),
        None => Scope::Everywhere { mode, local_addresses: !args.input.local.is_empty() },
    };
    let mut report = Report::new(&session, scope);
    let bounded = bounded(args, &session, given.as_ref());
    let deferrals = match args.format {
        ReportFormat::Human if !args.verbose => report.grouped_diagnostics(mode),
        _ => report.diagnostics(mode),
    };
    let mut findings = session.diagnostics.clone();
    findings.extend(deferrals);
    findings.extend(bounded.iter().cloned());
    findings.extend(lint(&session));
    sort(&mut findings);
    // These findings say why already.
    report.defer_bounded(&session, &bounded);

    let name = session.sources.file(session.rules_file).name();
    match args.format {
        ReportFormat::Human => {
            show(output, &session.sources, &findings);
            output.result(&format!("{name}: {}{}\n", account(&report), summary(&findings)));
        }
        ReportFormat::Json => {
            let result = CheckResult {
                file: name,
                family: family_number(&session),
                semantics: session.ruleset.semantics,
                rules: report.rules(),
                compiled: report.compiled(),
                deferred: report.deferred(),
                rejected: report.rejected(),
                diagnostics: json::findings(&session.sources, &findings),
            };
            output.result(&format!(
                "{}\n",
                serde_json::to_string_pretty(&result).expect("plain data serializes")
            ));
        }
        ReportFormat::Sarif => {
            let log = sarif::log(&session.sources, &findings);
            output
                .result(&format!("{}\n", serde_json::to_string_pretty(&log).expect("plain data serializes")));
        }
    }
    let denied = worst(&findings).is_some_and(|worst| worst >= args.deny.into());
    Ok(if denied { FOUND.into() } else { ExitCode::SUCCESS })
}

/// Where bounds end what is compiled at the place asked about, or at any hook. Such findings are errors where nothing may
/// be deferred.
fn bounded(args: &CheckArgs, session: &Session, given: Option<&Place>) -> Vec<Diagnostic> {
    // What is read in part is not compiled.
    if session.has_errors() {
        return Vec::new();
    }
    let mode = args.place.mode();
    let env = input::env(&args.input, session.family());
    let local = !args.input.local.is_empty();
    let at_hooks = || Hook::ALL.map(|hook| place_of(&[hook], attach_for(hook), mode, local)).to_vec();
    let places = given.map_or_else(at_hooks, |place| vec![place.clone()]);
    let mut all: Vec<Diagnostic> = Vec::new();
    for place in places.iter().filter(|place| !session.ruleset.path_chains(place).is_empty()) {
        let mut found = Vec::new();
        flatten(&session.ruleset, place, &env, &mut found);
        for mut finding in found {
            if mode == Mode::Replace {
                finding.severity = finding.severity.max(Severity::Error);
            }
            // The same bound at several hooks is one finding.
            if !all.contains(&finding) {
                all.push(finding);
            }
        }
    }
    all
}

/// The place the user asked about, if they named an attach point or a hook.
fn given_place(args: &CheckArgs) -> Result<Option<Place>, Failure> {
    let attach: Attach = match (args.attach, args.place.path()) {
        (Some(attach), _) => attach.into(),
        (None, Some(path)) => best_attach(path[0]),
        (None, None) => return Ok(None),
    };
    place::of(attach, &args.place, &args.input).map(Some)
}

/// Orders findings as the text is read; those about no text come last.
pub(super) fn sort(findings: &mut [Diagnostic]) {
    findings.sort_by_key(|finding| {
        (finding.span.is_none(), finding.span.map(|span| (span.file, span.start)), finding.code)
    });
}

/// `12 rules: 9 compiled, 2 deferred, 1 rejected`.
pub(super) fn account(report: &Report) -> String {
    format!(
        "{}: {} compiled, {} deferred, {} rejected",
        counted(report.rules(), "rule"),
        report.compiled(),
        report.deferred(),
        report.rejected()
    )
}

fn summary(findings: &[Diagnostic]) -> String {
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let parts: Vec<String> =
        [(Severity::Error, "error"), (Severity::Warning, "warning"), (Severity::Note, "note")]
            .into_iter()
            .filter(|(severity, _)| count(*severity) > 0)
            .map(|(severity, word)| counted(count(severity), word))
            .collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

/// 4 or 6.
pub(super) fn family_number(session: &Session) -> u8 {
    match session.family() {
        polc_ir::hook::Family::V4 => 4,
        polc_ir::hook::Family::V6 => 6,
    }
}
