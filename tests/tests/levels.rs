//! Every level and rbpf agree on every dump.

use polc::place::{attach_for, devices_of, place};
use polc::runner::{Level, Program, run};
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::emit::{GENERATOR_FAULT, RuleLine, Target, emit};
use polc_frontend_iptables::{ParseOptions, lower, parse};
use polc_ir::env::{Env, Mode};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::outcome::Verdict;
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_tests::corpus;

const PACKETS: usize = 400;

#[test]
fn levels_agree_on_every_dump() {
    let mut wrong = Vec::new();
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        let mut sources = SourceMap::new();
        let file = sources.add(dump.name.as_str(), dump.text());
        let (ast, _) = parse(&sources, file, &ParseOptions::default());
        let sets: Vec<_> = dump
            .ipset_text()
            .map(|text| {
                let file = sources.add("sets", text);
                polc_frontend_iptables::ipset::parse(&sources, file).0
            })
            .into_iter()
            .collect();
        let ruleset = lower(&ast, &sets, Semantics::Legacy);
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
            let line = |_| None::<RuleLine>;
            let target = Target {
                attach,
                name: "polc".into(),
                rule: &line,
                chain: &name,
                semantics: Semantics::Legacy,
                trace: false,
                suspend: false,
            };
            let object = emit(&compiled.plan, &target);
            let mut program = match &object {
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
            for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(PACKETS) {
                let of = |level| run(level, &ruleset, &compiled, &env, &input, &mut State::new(1));
                let mut expected = of(Level::Ruleset);
                // Beyond the bound on entries, packets are deferred although the rules could tell.
                let classified = of(Level::Classifier);
                if !compiled.diagnostics.is_empty() && classified.ending.verdict == Verdict::Defer {
                    expected = classified;
                }
                *verdicts.entry(expected.ending.verdict.word()).or_insert(0) += 1;
                for level in [Level::Classifier, Level::Decision, Level::Plan] {
                    let outcome = of(level);
                    if outcome != expected {
                        wrong.push(format!(
                            "{} {hook} {level}: {outcome:?} instead of {expected:?} for {:02x?}",
                            dump.name, input
                        ));
                        break;
                    }
                }
                if let Some(program) = &mut program {
                    match program.run(&compiled.plan, &input) {
                        Ok((ending, counted)) if expected.is(ending, &counted) => {}
                        other => wrong.push(format!(
                            "{} {hook} rbpf: {other:?} instead of {expected:?} for {:02x?}",
                            dump.name, input
                        )),
                    }
                }
                if wrong.len() > 12 {
                    panic!("{}", wrong.join("\n"));
                }
            }
            eprintln!("{} {hook}: {} entries, {verdicts:?}", dump.name, compiled.classifier.entries.len());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
