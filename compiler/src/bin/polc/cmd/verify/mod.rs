//! `polc verify`: shows that every level and the bytecode decide packets as the rules say.

#[cfg(feature = "kernel")]
mod kernel;
#[cfg(feature = "kernel")]
mod netfilter;

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use polc::decider::{Named, describe, named};
#[cfg(feature = "kernel")]
use polc::netfilter::{NotCompared, not_compared};
use polc::report::Report;
use polc::session::Session;
use polc::verify::{Disagreement, Said, Verified, verify};
use polc_backend_ebpf::emit::Told;
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::env::{Attach, Input, Mode, Place};
use polc_ir::hook::Hook;
use polc_ir::outcome::{Count, Decider, Outcome};
use serde::Serialize;

use super::account::{self, Account, Accounted, Judged, family_number, sort};
use super::compile::budget_text;
use super::{FOUND, counted, place, show};
use crate::cli::{TextFormat, VerifyArgs};
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::render::json;

/// Packets sent through netfilter for each rule, beside the random ones, and most of them.
#[cfg(feature = "kernel")]
const PACKETS_PER_RULE: usize = 64;
#[cfg(feature = "kernel")]
const NETFILTER_PACKETS_MAX: usize = 100_000;

/// What was verified, as docs/verify-schema.json describes it.
#[derive(Debug, Serialize)]
struct VerifyResult<'a> {
    file: &'a str,
    family: u8,
    semantics: polc_ir::hook::Semantics,
    rules: usize,
    compiled: usize,
    deferred: usize,
    rejected: usize,
    never_reached: usize,
    packets: usize,
    agree: bool,
    places: Vec<PlaceResult>,
    disagreements: Vec<DisagreementResult>,
    #[cfg(feature = "kernel")]
    #[serde(skip_serializing_if = "Option::is_none")]
    netfilter: Option<Vec<netfilter::NetfilterRun>>,
    #[cfg(feature = "kernel")]
    #[serde(skip_serializing_if = "Option::is_none")]
    not_compared: Option<NotCompared>,
    diagnostics: Vec<json::Finding<'a>>,
}

#[derive(Debug, Serialize)]
struct PlaceResult {
    attach: Option<Attach>,
    path: Vec<Hook>,
    mode: Mode,
    packets: usize,
    verdicts: BTreeMap<&'static str, usize>,
    entries: usize,
    not_taken: usize,
    insns: usize,
    processed: usize,
    pending_jumps: usize,
    stack_bytes: usize,
    #[cfg(feature = "kernel")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<KernelResult>,
}

/// What the running kernel made of a place's program.
#[cfg(feature = "kernel")]
#[derive(Debug, Serialize)]
struct KernelResult {
    #[serde(flatten)]
    run: kernel::KernelRun,
    agree: bool,
}

#[derive(Debug, Serialize)]
struct DisagreementResult {
    attach: Option<Attach>,
    path: Vec<Hook>,
    /// The frame in hexadecimal, and what is known beside it.
    frame: String,
    #[serde(rename = "in")]
    in_device: Option<String>,
    #[serde(rename = "out")]
    out_device: Option<String>,
    mark: u32,
    vlan: Option<u16>,
    levels: BTreeMap<String, String>,
    /// The rule or policy that decides by the rules' own meaning.
    rule: Option<Named>,
}

pub(super) fn run(args: &VerifyArgs, output: &Output) -> Result<ExitCode, Failure> {
    #[cfg(feature = "kernel")]
    if args.kernel || args.netfilter {
        polc_loader::swap::may_change(&polc_loader::sys::Sys::new())?;
    }
    let mut session = input::session(&args.file, &args.input)?;
    // The kernel's packet filter gets the user's rules alone.
    #[cfg(feature = "kernel")]
    let as_read = args.netfilter.then(|| session.clone());
    #[cfg(not(feature = "kernel"))]
    let as_read: Option<Session> = None;
    let devices = place::all(&session, &args.devices)?;
    let env = input::env(&args.input, session.family());
    let judged = Judged::new(&mut session, args.attach, &args.place, &args.input)?;
    // A rule set that was read in part is another one than the user's.
    let places: &[Place] = if session.has_errors() { &[] } else { &judged.places };
    let bar = progress_bar();
    let mut verified = Vec::new();
    for (index, place) in places.iter().enumerate() {
        bar.set_message(place::describe(place));
        let random = args.random as usize;
        verified.push(verify(&session, place, &env, &devices, args.seed, random, &mut |done, all| {
            bar.set_length((all * places.len()) as u64);
            bar.set_position((all * index + done) as u64);
        }));
    }
    bar.finish_and_clear();
    let mut outside = Outside::ask(args, &session, as_read.as_ref(), &env, &devices, &verified)?;
    let mut account = Account::new(&session, &judged);
    for (place, result) in places.iter().zip(&verified) {
        account.add(place, &result.diagnostics, &result.not_emitted, &result.reach);
    }
    let grouped = args.format == TextFormat::Human && args.place.mode() == Mode::Accelerate;
    let Accounted { report, never_reached, mut findings } = account.finish(grouped);
    sort(&mut findings);

    let agree = verified.iter().all(|result| result.disagreement.is_none()) && outside.agrees();
    let failed = !agree || findings.iter().any(|finding| finding.severity == Severity::Error);
    match args.format {
        TextFormat::Human => human(&session, &report, &verified, &outside, &findings, output)?,
        TextFormat::Json => {
            let result = VerifyResult {
                file: session.sources.file(session.rules_file).name(),
                family: family_number(&session),
                semantics: session.ruleset.semantics,
                rules: report.rules(),
                compiled: report.compiled(),
                deferred: report.deferred(),
                rejected: report.rejected(),
                never_reached,
                packets: verified.iter().map(|result| result.packets).sum(),
                agree,
                places: verified
                    .iter()
                    .enumerate()
                    .map(|(index, result)| place_result(result, index, &mut outside))
                    .collect(),
                disagreements: verified
                    .iter()
                    .filter_map(|result| disagreement_result(&session, result))
                    .collect(),
                #[cfg(feature = "kernel")]
                netfilter: outside.netfilter.take(),
                #[cfg(feature = "kernel")]
                not_compared: outside.not_compared.take(),
                diagnostics: json::findings(&session.sources, &findings),
            };
            output.json(&result)?;
        }
    }
    Ok(if failed { FOUND.into() } else { ExitCode::SUCCESS })
}

/// What the running kernel was asked, beside polc's own levels.
#[cfg(feature = "kernel")]
struct Outside {
    /// For each place, in their order; empty if not asked.
    kernel: Vec<kernel::KernelRun>,
    netfilter: Option<Vec<netfilter::NetfilterRun>>,
    /// Of the rules, what those runs can't compare.
    not_compared: Option<NotCompared>,
}

#[cfg(feature = "kernel")]
impl Outside {
    fn ask(
        args: &VerifyArgs,
        session: &Session,
        as_read: Option<&Session>,
        env: &polc_ir::env::Env,
        devices: &polc::select::Devices,
        verified: &[Verified],
    ) -> Result<Outside, Failure> {
        let mut outside = Outside { kernel: Vec::new(), netfilter: None, not_compared: None };
        if args.kernel {
            for result in verified {
                let (place, packets) = (&result.place, result.packets);
                outside.kernel.push(kernel::verify(session, place, env, devices, args.seed, packets)?);
            }
        }
        if let Some(session) = as_read.filter(|session| !session.has_errors()) {
            let mut sets = Vec::new();
            for path in &args.input.ipset {
                sets.push(std::fs::read_to_string(path).map_err(|error| Failure::read(path, error))?);
            }
            let packets = args.random as usize + PACKETS_PER_RULE * session.ruleset.rules.len();
            let packets = packets.min(NETFILTER_PACKETS_MAX.max(args.random as usize));
            outside.not_compared = Some(not_compared(&session.ruleset));
            outside.netfilter = Some(netfilter::verify(session, &sets, args.seed, packets)?);
        }
        Ok(outside)
    }

    fn agrees(&self) -> bool {
        self.kernel.iter().all(|run| run.disagreement.is_none())
            && self.netfilter.iter().flatten().all(|run| run.difference.is_none())
    }

    fn kernel_text(&self, index: usize) -> String {
        let Some(run) = self.kernel.get(index) else { return String::new() };
        match (&run.skipped, &run.disagreement) {
            (Some(why), _) => format!("  kernel: nothing run, since {why}\n"),
            (None, None) => format!(
                "  kernel: agrees on {}, {} can't be tested\n",
                counted(run.packets, "packet"),
                run.not_run
            ),
            (None, Some((input, expected, said))) => format!(
                "  the kernel differs on packet {}\n    packet: {}\n    plan:   {expected}\n    kernel: {said}\n",
                run.packets,
                input_text(input)
            ),
        }
    }

    fn netfilter_text(&self) -> String {
        let mut text: String = self.netfilter.iter().flatten().map(netfilter::text).collect();
        text.extend(self.not_compared.as_ref().and_then(netfilter::not_compared_text));
        text
    }
}

/// Without the feature there is no kernel to ask.
#[cfg(not(feature = "kernel"))]
struct Outside;

#[cfg(not(feature = "kernel"))]
impl Outside {
    fn ask(
        _: &VerifyArgs,
        _: &Session,
        _: Option<&Session>,
        _: &polc_ir::env::Env,
        _: &polc::select::Devices,
        _: &[Verified],
    ) -> Result<Outside, Failure> {
        Ok(Outside)
    }

    fn agrees(&self) -> bool {
        true
    }

    fn kernel_text(&self, _: usize) -> String {
        String::new()
    }

    fn netfilter_text(&self) -> String {
        String::new()
    }
}

fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent}% {msg}") {
        bar.set_style(style);
    }
    bar
}

fn human(
    session: &Session,
    report: &Report,
    verified: &[Verified],
    outside: &Outside,
    findings: &[Diagnostic],
    output: &Output,
) -> Result<(), Failure> {
    show(output, &session.sources, findings);
    let name = session.sources.file(session.rules_file).name();
    let mut text = String::new();
    for (index, result) in verified.iter().enumerate() {
        text += &format!("{}: ", place::describe(&result.place));
        match &result.disagreement {
            None => {
                let levels =
                    if result.budgets.is_empty() { "all levels but the object" } else { "all levels" };
                let verdicts: Vec<String> =
                    result.verdicts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
                text += &format!(
                    "{levels} agree on {} ({})\n",
                    counted(result.packets, "packet"),
                    verdicts.join(", ")
                );
                if result.not_taken > 0 {
                    text += &format!(
                        "  {} of {} were taken by none of them\n",
                        result.not_taken,
                        format_args!("{} entries", result.entries)
                    );
                }
            }
            Some(disagreement) => text += &disagreement_text(session, result, disagreement),
        }
        for budget in &result.budgets {
            text += &format!("  {}\n", budget_text(budget));
        }
        text += &outside.kernel_text(index);
    }
    text += &outside.netfilter_text();
    text += &format!("{name}: {}\n", account::text(report));
    output.result(&text)
}

fn disagreement_text(session: &Session, result: &Verified, disagreement: &Disagreement) -> String {
    let mut text = format!("levels differ on packet {}\n", result.packets);
    text += &format!("  packet: {}\n", input_text(&disagreement.input));
    for (level, said) in &disagreement.levels {
        text += &format!("  {:<11}{}\n", format!("{level}:"), said_text(session, said));
    }
    text
}

fn said_text(session: &Session, said: &Said) -> String {
    match said {
        Said::Outcome(Outcome { ending, mark, counted }) => {
            format!("{}, mark {mark:#x}{}", describe(session, *ending), counted_text(session, counted))
        }
        Said::Told(Told::Counted(ending, counted)) => {
            format!("{}{}", describe(session, *ending), counted_text(session, counted))
        }
        Said::Told(Told::Returned(code)) => format!("returned {code}"),
        Said::Wrong(error) => format!("failed: {error}"),
    }
}

/// What a packet was counted for, by line.
fn counted_text(session: &Session, counted: &[Count]) -> String {
    let mut text = String::new();
    for (index, count) in counted.iter().enumerate() {
        let by = match *count {
            Count::Rule(rule) => Decider::Rule(rule),
            Count::Policy(chain) => Decider::Policy(chain),
        };
        let what = match named(session, by) {
            Some(Named { table, chain, number: Some(number), .. }) => format!("{table} {chain} {number}"),
            Some(Named { table, chain, .. }) => format!("{table} {chain} policy"),
            None => count.to_string(),
        };
        text += &format!("{}{what}", if index == 0 { ", counted for " } else { ", " });
    }
    text
}

/// A packet as `explain --packet` takes it.
fn input_text(input: &Input) -> String {
    let mut text = format!("hex={}", hex(&input.frame));
    if let Some(device) = input.in_device {
        text += &format!(" in={device}");
    }
    if let Some(device) = input.out_device {
        text += &format!(" out={device}");
    }
    if input.mark != 0 {
        text += &format!(" mark={:#x}", input.mark);
    }
    if let Some(vlan) = input.vlan {
        text += &format!(" vlan={}", vlan & 0xfff);
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg_attr(not(feature = "kernel"), allow(unused_variables))]
fn place_result(result: &Verified, index: usize, outside: &mut Outside) -> PlaceResult {
    let sum = |of: fn(&polc_backend_ebpf::budget::Budget) -> usize| result.budgets.iter().map(of).sum();
    PlaceResult {
        attach: result.place.attach,
        path: result.place.path.clone(),
        mode: result.place.mode,
        packets: result.packets,
        verdicts: result.verdicts.clone(),
        entries: result.entries,
        not_taken: result.not_taken,
        insns: sum(|budget| budget.insns),
        processed: sum(|budget| budget.processed),
        pending_jumps: result.budgets.iter().map(|budget| budget.pending_jumps).max().unwrap_or(0),
        stack_bytes: result.budgets.iter().map(|budget| budget.stack_bytes).max().unwrap_or(0),
        #[cfg(feature = "kernel")]
        kernel: outside.kernel.get_mut(index).map(|run| {
            let run = std::mem::take(run);
            KernelResult { agree: run.disagreement.is_none(), run }
        }),
    }
}

fn disagreement_result(session: &Session, result: &Verified) -> Option<DisagreementResult> {
    let Disagreement { input, levels } = result.disagreement.as_ref()?;
    let rule = match &levels.first()?.1 {
        Said::Outcome(outcome) => named(session, outcome.ending.by),
        Said::Told(_) | Said::Wrong(_) => None,
    };
    Some(DisagreementResult {
        attach: result.place.attach,
        path: result.place.path.clone(),
        frame: hex(&input.frame),
        in_device: input.in_device.map(|device| device.to_string()),
        out_device: input.out_device.map(|device| device.to_string()),
        mark: input.mark,
        vlan: input.vlan,
        levels: levels.iter().map(|(level, said)| (level.to_string(), said_text(session, said))).collect(),
        rule,
    })
}
