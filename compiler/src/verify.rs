//! `verify`: every level and the emitted program decide packets as the rules do, shown on packets made for the purpose.
//!
//! Packets come from [`Witnesses`]: for each entry of the classifier, at the edges of its intervals and just beyond; cut,
//! tagged, fragmented and bent in every way there is; and mixed ones; and where the plan's tables
//! are found to decide otherwise. Each goes through the reference evaluator, the
//! classifier, the decision, the plan and the program under rbpf; the first packet on which two of them differ ends the
//! run. Equal seeds give equal runs.

use std::collections::BTreeMap;

use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::emit::Told;
use polc_ir::diag::{Code, Diagnostic, Severity};
use polc_ir::env::{Env, Input, Place};
use polc_ir::outcome::{Outcome, Verdict};
use polc_ir::state::State;

use crate::build;
use crate::compile;
use crate::runner::{Level, Program, run};
use crate::select::Devices;
use crate::session::Session;
use crate::witness::Witnesses;

/// Code of a program that the check VM can't run.
pub const NOT_RUN: Code = Code(531);

/// Bound on packets times entries, since the reference levels look at entries one by one.
const WORK_MAX: usize = 400_000_000;

/// Packets at each place however many entries there are.
const PACKETS_MIN: usize = 1_000;

/// What one level made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A verdict, who gave it, and the mark (which the program's return does not tell).
    Outcome(Outcome),
    /// What a program tells.
    Told(Told),
    /// Something went wrong.
    Wrong(String),
}

/// A packet on which levels differ.
#[derive(Clone, Debug)]
pub struct Disagreement {
    /// The packet.
    pub input: Input,
    /// What each level said, the reference first.
    pub levels: Vec<(Level, Said)>,
}

/// What verifying one place gave.
#[derive(Debug)]
pub struct Verified {
    /// The place.
    pub place: Place,
    /// How many packets went through all levels.
    pub packets: usize,
    /// How many of them got each verdict.
    pub verdicts: BTreeMap<&'static str, usize>,
    /// Entries of the classifier.
    pub entries: usize,
    /// The verifier's budget of each program; empty if nothing was emitted.
    pub budgets: Vec<Budget>,
    /// What compiling found.
    pub diagnostics: Vec<Diagnostic>,
    /// What kept the program from being emitted; then the levels above it were verified alone.
    pub not_emitted: Vec<Diagnostic>,
    /// The first packet on which levels differ, if any.
    pub disagreement: Option<Disagreement>,
}

/// Verifies one place. `progress` is told the packets done and all packets.
pub fn verify(
    session: &Session,
    place: &Place,
    env: &Env,
    devices: &Devices,
    seed: u64,
    random: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Verified {
    let ruleset = &session.ruleset;
    let compiled = compile(ruleset, place, env, devices);
    let mut verified = Verified {
        place: place.clone(),
        packets: 0,
        verdicts: BTreeMap::new(),
        entries: compiled.classifier.entries.len(),
        budgets: Vec::new(),
        diagnostics: compiled.diagnostics.clone(),
        not_emitted: Vec::new(),
        disagreement: None,
    };
    let mut program = None;
    match build::object(session, &compiled) {
        Err(findings) => verified.not_emitted = findings,
        Ok((object, budgets)) => {
            verified.budgets = budgets;
            let attach = place.attach.expect("programs are made for an attach point");
            match Program::new(&compiled.plan, attach, &object) {
                Ok(mut made) => {
                    made.set_random_seed(seed);
                    program = Some(made);
                }
                Err(error) => {
                    let message = format!("the program can't be checked: {error}");
                    verified.not_emitted.push(Diagnostic::error(NOT_RUN, message, None));
                }
            }
        }
    }
    let entries = verified.entries.max(1);
    let witnesses = Witnesses::of_plan(&compiled.classifier, &compiled.plan, &devices.declared, seed);
    let total = (witnesses.enough() + random).min((WORK_MAX / entries).max(PACKETS_MIN));
    // State (counters of `nth`, random numbers) lives as long as the rule set: each level has its own.
    let mut states = [(); 4].map(|()| State::new(seed));
    let bounded = compiled.diagnostics.iter().any(|found| found.severity != Severity::Note);
    for mut input in witnesses.take(total) {
        // Where the program sits, every packet comes or leaves by the one device.
        input.in_device = devices.fixed_in.or(input.in_device);
        input.out_device = devices.fixed_out.or(input.out_device);
        let mut levels = Vec::with_capacity(5);
        for (level, state) in
            [Level::Ruleset, Level::Classifier, Level::Decision, Level::Plan].into_iter().zip(&mut states)
        {
            levels.push((level, Said::Outcome(run(level, ruleset, &compiled, env, &input, state))));
        }
        // Beyond the bound on entries the rules could tell, and the object leaves it to the kernel.
        let reference = match (&levels[0].1, &levels[1].1) {
            (_, Said::Outcome(classified)) if bounded && classified.ending.verdict == Verdict::Defer => {
                classified.clone()
            }
            (Said::Outcome(reference), _) => reference.clone(),
            _ => unreachable!("levels above the object give outcomes"),
        };
        if let Some(program) = &mut program {
            levels.push((
                Level::Rbpf,
                match program.tell(&compiled.plan, &input) {
                    Ok(told) => Said::Told(told),
                    Err(error) => Said::Wrong(error),
                },
            ));
        }
        let agree = levels[1..].iter().all(|(_, said)| match said {
            Said::Outcome(outcome) => *outcome == reference,
            Said::Told(told) => {
                place.attach.is_some_and(|attach| told.is(&reference, &compiled.plan, attach))
            }
            Said::Wrong(_) => false,
        });
        verified.packets += 1;
        *verified.verdicts.entry(reference.ending.verdict.word()).or_default() += 1;
        if !agree {
            verified.disagreement = Some(Disagreement { input, levels });
            break;
        }
        if verified.packets.is_multiple_of(256) {
            progress(verified.packets, total);
        }
    }
    verified
}
