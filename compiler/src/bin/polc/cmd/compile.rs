//! `polc compile`: a rule set to an object.

use std::process::ExitCode;

use polc::build::{Extras, object_with};
use polc::guard;
use polc::reach::never_reached;
use polc::report::{Report, Scope};
use polc::select::{longest_tenths_ns, stage_costs};
use polc::session::Session;
use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::disasm::disassemble;
use polc_backend_ebpf::object::Object;
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::{Attach, Mode, Place};
use polc_ir::limits::{
    PROGRAM_INSNS_MAX, STACK_BYTES_MAX, VERIFIER_PENDING_JUMPS_MAX, VERIFIER_PROCESSED_MAX,
};
use polc_ir::plan::Plan;
use polc_ir::ruleset::Ruleset;

use super::{FOUND, account, place, show, worst};
use crate::cli::{CompileArgs, Emit};
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::write;

pub(super) fn run(args: &CompileArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut session = input::session(&args.file, &args.input)?;
    let named = place::of(args.attach.into(), &args.place, &args.input)?;
    let place = place::whole(&session, named.clone());
    let devices = place::declared(&args.devices)?;
    let Some(mut report) = accept(&session, &place, output) else { return Ok(FOUND.into()) };
    guard::leave_rewritten(&mut session.ruleset, &place);
    let env = input::env(&args.input, session.family());
    let compiled = polc::compile(&session.ruleset, &place, &env, &devices);
    if refuse(&session, &compiled.diagnostics, place.mode, output) {
        return Ok(FOUND.into());
    }
    let reached = [(&place, &compiled.reach)];
    report.defer_bounded(&session, &compiled.diagnostics, &reached);
    show(output, &session.sources, &never_reached(&session, &report, &reached).1);
    let mut emitted = String::new();
    for level in &args.emit {
        emitted += &match level {
            Emit::Ruleset => session.ruleset.to_string(),
            Emit::Classifier => compiled.classifier.to_string(),
            Emit::Decision => compiled.decision.to_string(),
            Emit::Plan => compiled.plan.to_string(),
            Emit::Asm => continue,
        };
    }
    if args.explain_cost {
        emitted += &cost_text(&compiled.plan);
    }
    output.result(&emitted)?;
    if args.output.is_none() && !args.emit.contains(&Emit::Asm) && !args.explain_cost {
        return Ok(ExitCode::SUCCESS);
    }
    let (object, budgets) =
        match object_with(&session, &compiled, Extras { trace: args.trace, suspend: false }) {
            Ok(made) => made,
            Err(findings) => {
                show(output, &session.sources, &findings);
                return Ok(FOUND.into());
            }
        };
    if args.emit.contains(&Emit::Asm) {
        output.result(&disassemble(&object))?;
    }
    if let Some(path) = &args.output {
        write_object(path, &object, output)?;
    }
    output.remark(&format!("{} at {}\n", account::text(&report), place::describe(&place)));
    if place.path != named.path {
        output.remark(
            "packets pass PREROUTING first, and the rules rewrite some: its chains are compiled, too\n",
        );
    }
    remarks(&session, &place, devices.declared.is_empty(), output);
    for (program, budget) in object.programs.iter().zip(&budgets) {
        output.remark(&format!("program `{}`: {}\n", program.name, budget_text(budget)));
    }
    Ok(ExitCode::SUCCESS)
}

/// What decides each stage, and what that is expected to take.
fn cost_text(plan: &Plan) -> String {
    let tenths = |tenths: u32| format!("{}.{} ns", tenths / 10, tenths % 10);
    let mut text = String::new();
    for cost in stage_costs(plan) {
        text += &format!("{}: {}: {}", cost.stage, cost.structure, tenths(cost.tenths_ns));
        text += &match cost.table_bytes {
            0 => "\n".to_string(),
            bytes => format!(", tables of {bytes} bytes\n"),
        };
    }
    let walk = &plan.walk;
    if !walk.exits.is_empty() {
        text += &format!("walk table: {} nodes, {} visits at the most\n", walk.nodes.len(), walk.visits_max);
    }
    let longest = tenths(longest_tenths_ns(plan));
    let bytes: usize = plan.tables.values().map(|table| table.bytes.len()).sum();
    text + &format!("in all: {longest} on the longest way through code, tables of {bytes} bytes\n")
}

/// Shows what reading and the account found; `None` if the rule set can't be compiled as asked.
pub(super) fn accept(session: &Session, place: &Place, output: &Output) -> Option<Report> {
    let report = accept_part(session, place, output)?;
    show(output, &session.sources, report.elsewhere().as_slice());
    Some(report)
}

/// The same where other places have programs, too: rules that this one does not reach are not told of.
pub(super) fn accept_part(session: &Session, place: &Place, output: &Output) -> Option<Report> {
    let report = Report::new(session, Scope::At(place));
    let mut findings = session.diagnostics.clone();
    if place.mode == Mode::Replace {
        findings.extend(report.diagnostics(place.mode));
    }
    account::sort(&mut findings);
    show(output, &session.sources, &findings);
    let errors = findings.iter().any(|finding| finding.severity == Severity::Error);
    (!errors).then_some(report)
}

/// Shows what a pass found; whether that stops the compilation. In replace mode nothing is left to the kernel, so
/// whatever a pass defers does.
pub(super) fn refuse(session: &Session, findings: &[Diagnostic], mode: Mode, output: &Output) -> bool {
    let severity = |finding: &Diagnostic| match (mode, finding.severity) {
        (Mode::Replace, Severity::Warning) => Severity::Error,
        (_, severity) => severity,
    };
    let findings: Vec<Diagnostic> = findings
        .iter()
        .map(|finding| Diagnostic { severity: severity(finding), ..finding.clone() })
        .collect();
    show(output, &session.sources, &findings);
    worst(&findings) == Some(Severity::Error)
}

fn write_object(path: &std::path::Path, object: &Object, output: &Output) -> Result<(), Failure> {
    let bytes =
        object.write().map_err(|error| Failure::Input(format!("the object can't be written: {error}")))?;
    if input::is_stdin(path) {
        return output.bytes(&bytes);
    }
    write::atomically(path, &bytes)
}

/// What is assumed about the host, where it matters.
fn remarks(session: &Session, place: &Place, no_devices: bool, output: &Output) {
    let arrives = matches!(place.attach, Some(Attach::Xdp | Attach::TcIngress));
    if arrives && place.path.last() == Some(&polc_ir::hook::Hook::Input) {
        output.remark(
            "every arriving packet is taken to be for this host; on a router, name the hooks with --hook\n",
        );
    }
    if no_devices && tests_devices(&session.ruleset) {
        output.remark(
            "the rules tell devices apart, and no --device NAME=IFINDEX was given: packets of unknown devices are deferred\n",
        );
    }
}

fn tests_devices(ruleset: &Ruleset) -> bool {
    polc::place::devices_of(ruleset).len() > 1
}

/// A program's cost and its limits.
pub(super) fn budget_text(budget: &Budget) -> String {
    format!(
        "{} of {PROGRAM_INSNS_MAX} instructions, {} of {VERIFIER_PROCESSED_MAX} processed by the verifier, \
         {} of {VERIFIER_PENDING_JUMPS_MAX} pending jumps, {} of {STACK_BYTES_MAX} bytes of stack",
        budget.insns, budget.processed, budget.pending_jumps, budget.stack_bytes
    )
}
