//! Every level and rbpf agree on every dump.

use polc::place::{attach_for, devices_of, place};
use polc::runner::Program;
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::emit::{GENERATOR_FAULT, Target, emit};
use polc_ir::env::{Env, Mode};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::source::SourceMap;
use polc_tests::corpus;
use polc_tests::levels::{Levels, target};

/// Packets for each program.
const PACKETS: usize = 400;

/// Disagreements after which the test stops.
const WRONG_MAX: usize = 12;

#[test]
fn levels_agree_on_every_dump() {
    let mut wrong = Vec::new();
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        let ruleset = dump.ruleset(&mut SourceMap::new(), Semantics::Legacy);
        let env = Env::default();
        let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
        for hook in Hook::ALL {
            let place = place(&[hook], attach_for(hook), Mode::Accelerate, false);
            if ruleset.path_chains(&place).is_empty() {
                continue;
            }
            let started = std::time::Instant::now();
            let compiled = polc::compile(&ruleset, &place, &env, &devices);
            let took = started.elapsed();
            let attach = attach_for(hook);
            let name = |chain| {
                let data: &polc_ir::ruleset::ChainData = &ruleset.chains[chain];
                Some((ruleset.tables[data.table].kind.to_string(), data.name.clone()))
            };
            let target = Target { chain: &name, ..target(attach) };
            let object = emit(&compiled.plan, &target);
            let program = match &object {
                Ok(object) => match Program::new(&compiled.plan, attach, object) {
                    Ok(program) => Some(program),
                    Err(error) => {
                        wrong.push(format!("{} {hook}: {error}", dump.name));
                        None
                    }
                },
                // A budget that the kernel sets, named; nothing is emitted then.
                Err(diagnostics) => {
                    assert_ne!(diagnostics[0].code, GENERATOR_FAULT, "{} {hook}: {diagnostics:?}", dump.name);
                    eprintln!("{} {hook}: not emitted: {}", dump.name, diagnostics[0].message);
                    None
                }
            };
            if took.as_millis() > 1000 {
                eprintln!("{} {hook}: {took:?}", dump.name);
            }
            let mut verdicts = std::collections::BTreeMap::new();
            let mut levels = Levels { ruleset: &ruleset, compiled: &compiled, env: &env, program };
            for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(PACKETS) {
                match levels.agree(&input) {
                    Ok(outcome) => *verdicts.entry(outcome.ending.verdict.word()).or_insert(0) += 1,
                    Err(why) => wrong.push(format!("{} {hook} {why}", dump.name)),
                }
                assert!(wrong.len() <= WRONG_MAX, "{}", wrong.join("\n"));
            }
            eprintln!("{} {hook}: {} entries, {verdicts:?}", dump.name, compiled.classifier.entries.len());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
