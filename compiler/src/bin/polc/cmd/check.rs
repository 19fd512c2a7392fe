//! `polc check`: read, compile without keeping a program, account, lint.

use std::process::ExitCode;

use polc::lint::lint;
use polc::place::devices_of;
use polc::reach::Reach;
use polc::select::Devices;
use polc::session::Session;
use polc_ir::at_once::each;
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::Place;
use serde::Serialize;

use super::account::{self, Account, Accounted, Judged, family_number, sort};
use super::{FOUND, counted, show, worst};
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
    never_reached: usize,
    diagnostics: Vec<json::Finding<'a>>,
}

pub(super) fn run(args: &CheckArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut session = input::session(&args.file, &args.input)?;
    let lints = lint(&session);
    let judged = Judged::new(&mut session, args.attach, &args.place, &args.input)?;
    // A rule set that was read in part is another one than the user's, and not compiled.
    let places: &[Place] = if session.has_errors() { &[] } else { &judged.places };
    let tried = try_all(&session, places, args);
    let mut account = Account::new(&session, &judged);
    for (place, tried) in places.iter().zip(&tried) {
        account.add(place, &tried.found, &tried.not_emitted, &tried.reach);
    }
    let grouped = args.format == ReportFormat::Human && !args.verbose;
    let Accounted { report, never_reached, mut findings } = account.finish(grouped);
    findings.extend(lints);
    sort(&mut findings);

    let name = session.sources.file(session.rules_file).name();
    match args.format {
        ReportFormat::Human => {
            show(output, &session.sources, &findings);
            output.result(&format!("{name}: {}{}\n", account::text(&report), summary(&findings)))?;
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
                never_reached,
                diagnostics: json::findings(&session.sources, &findings),
            };
            output.json(&result)?;
        }
        ReportFormat::Sarif => {
            output.json(&sarif::log(&session.sources, &findings))?;
        }
    }
    let denied = worst(&findings).is_some_and(|worst| worst >= args.deny.into());
    Ok(if denied { FOUND.into() } else { ExitCode::SUCCESS })
}

/// What compiling for a place gives beside a program.
#[derive(Debug, Default)]
struct Tried {
    found: Vec<Diagnostic>,
    not_emitted: Vec<Diagnostic>,
    reach: Reach,
}

/// Compiles for each place, several at a time, and says what that found, in the places' order.
fn try_all(session: &Session, places: &[Place], args: &CheckArgs) -> Vec<Tried> {
    let env = input::env(&args.input, session.family());
    let devices = Devices { declared: devices_of(&session.ruleset), ..Devices::default() };
    let attempt = |place: &Place| {
        let compiled = polc::compile(&session.ruleset, place, &env, &devices);
        let not_emitted = polc::build::object(session, &compiled).err().unwrap_or_default();
        Tried { found: compiled.diagnostics, not_emitted, reach: compiled.reach }
    };
    each(places, attempt)
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
