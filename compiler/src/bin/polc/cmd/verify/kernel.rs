//! `verify --kernel`: the loaded program decides packets as the plan says, in the running kernel.

use polc::build::object;
use polc::runner::{Level, mark_left, run};
use polc::select::Devices;
use polc::session::Session;
use polc::verify::Said;
use polc::witness::Witnesses;
use polc_ir::env::{Attach, Env, Input, Place};
use polc_ir::outcome::Verdict;
use polc_ir::state::State;
use serde::Serialize;

use super::super::test_run::{KernelProgram, Tested};
use super::said_text;
use crate::failure::Failure;

/// Bound on packets times counters, all of which are read after each packet.
const WORK_MAX: usize = 20_000_000;

/// What running one place's program in the kernel gave.
#[derive(Debug, Default, Serialize)]
pub(super) struct KernelRun {
    /// Packets that the kernel decided.
    pub packets: usize,
    /// Packets that no program can be tested with: tags and devices that a test run can't have.
    pub not_run: usize,
    /// Why nothing was run, if so.
    pub skipped: Option<String>,
    /// The first packet that the kernel decides otherwise, what the plan says, and what the kernel said.
    #[serde(skip)]
    pub disagreement: Option<(Input, String, String)>,
}

/// Runs `packets` packets of the same sequence as [`polc::verify::verify`].
pub(super) fn verify(
    session: &Session,
    place: &Place,
    env: &Env,
    devices: &Devices,
    seed: u64,
    packets: usize,
) -> Result<KernelRun, Failure> {
    let mut ran = KernelRun::default();
    let compiled = polc::compile(&session.ruleset, place, env, devices);
    if !compiled.plan.effect_tests.is_empty() {
        ran.skipped = Some("the kernel draws its own random numbers".into());
        return Ok(ran);
    }
    let Ok((object, _)) = object(session, &compiled) else {
        ran.skipped = Some("no program is made".into());
        return Ok(ran);
    };
    let plan = &compiled.plan;
    let mut program = KernelProgram::new(plan, &object, devices)?;
    let packets = packets.min(WORK_MAX / plan.traces.len().max(1));
    let mut state = State::new(seed);
    for input in Witnesses::new(&compiled.classifier, &devices.declared, seed).take(packets) {
        let Some(Tested { input, result, mark }) = program.run(plan, &input)? else {
            ran.not_run += 1;
            continue;
        };
        ran.packets += 1;
        let expected = run(Level::Plan, &session.ruleset, &compiled, env, &input, &mut state);
        // A dropped packet has no mark that anybody could see, and only at tc is there a context to have one.
        let unseen = !matches!(place.attach, Some(Attach::TcIngress | Attach::TcEgress))
            || matches!(expected.ending.verdict, Verdict::Drop | Verdict::Reject(_));
        let attach = place.attach.expect("programs are made for an attach point");
        let agrees = result.as_ref().is_ok_and(|told| told.is(&expected, plan, attach))
            && (unseen || mark == mark_left(plan, attach, &input, &expected));
        if !agrees {
            let said = match result {
                Ok(told) => format!("{}, mark {mark:#x}", said_text(session, &Said::Told(told))),
                Err(error) => said_text(session, &Said::Wrong(error)),
            };
            let expected = said_text(session, &Said::Outcome(expected));
            ran.disagreement = Some((input, expected, said));
            break;
        }
    }
    Ok(ran)
}
