//! Random rule sets: every level and rbpf agree on the packets made for them.
//!
//! What fails is shrunk, printed, and its seed kept in `tests/regressions/random.txt`. `POLC_LONG` makes it ten times
//! the rule sets. Where connections are looked up, nothing is dropped that the kernel, which knows each packet's state,
//! might not drop.

use std::fmt::Write as _;

use polc::place::{attach_for, devices_of, place};
use polc::runner::{Level, Program, run};
use polc::select::{Devices, Prefer};
use polc::witness::{Random, Witnesses};
use polc_backend_ebpf::emit::{Target, emit};
use polc_frontend_iptables::{ParseOptions, ipset, lower, parse};
use polc_ir::diag::Severity;
use polc_ir::env::{Connection, Connections, Env, Input, Mode, Place, ct_state};
use polc_ir::field::Field;
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::outcome::Verdict;
use polc_ir::packet::View;
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_tests::generate::{Case, case};
use polc_tests::levels::{Levels, target};
use proptest::test_runner::{
    Config, FileFailurePersistence, RngAlgorithm, TestCaseError, TestRng, TestRunner,
};

const RULE_SETS: u32 = 1_000;
const PACKETS: usize = 1_000;
const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/regressions/random.txt");

#[test]
fn random_rule_sets_mean_the_same_at_every_level() {
    let long = std::env::var_os("POLC_LONG").is_some();
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get() as u32);
    let cases = if long { 10 * RULE_SETS } else { RULE_SETS }.div_ceil(threads);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let config = Config {
                    cases,
                    failure_persistence: Some(Box::new(FileFailurePersistence::Direct(SEEDS))),
                    max_shrink_iters: 2_000,
                    ..Config::default()
                };
                // Equal runs make equal rule sets.
                let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[thread as u8; 32]);
                let mut runner = TestRunner::new_with_rng(config, rng);
                if let Err(failure) = runner.run(&case(), |case| one(&case)) {
                    panic!("{failure}");
                }
            });
        }
    });
}

fn one(case: &Case) -> Result<(), TestCaseError> {
    let text = case.dump();
    let fail = |what: String| Err(TestCaseError::fail(format!("{what}\n{text}")));
    let mut sources = SourceMap::new();
    let file = sources.add("random", text.as_str());
    let options = ParseOptions { family: Some(case.family), ..ParseOptions::default() };
    let (dump, diagnostics) = parse(&sources, file, &options);
    let set_file = sources.add("sets", case.sets());
    let (sets, set_diagnostics) = ipset::parse(&sources, set_file);
    let mut found = diagnostics.iter().chain(&set_diagnostics);
    if let Some(error) = found.find(|diagnostic| diagnostic.severity == Severity::Error) {
        return fail(format!("{error:?}"));
    }
    let ruleset = lower(&dump, &[sets], case.semantics);
    let attach = attach_for(case.hook);
    let mut place = place(&[case.hook], attach, case.mode, false);
    place.connections = case.connections;
    place.counters = case.counters;
    let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
    let env = Env::default();
    let compiled = polc::compile_with(&ruleset, &place, &env, &devices, case.prefer);
    let bounded = compiled.diagnostics.iter().any(|found| found.severity != Severity::Note);
    let target = Target { semantics: case.semantics, ..target(attach) };
    let object = match emit(&compiled.plan, &target) {
        Ok(object) => object,
        Err(found) => return fail(format!("not emitted: {found:?}")),
    };
    let mut program = Program::new(&compiled.plan, attach, &object).expect("the check VM takes it");
    program.set_random_seed(1);
    let mut states = [(); 4].map(|()| State::new(1));
    for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(PACKETS) {
        let mut outcomes = [Level::Ruleset, Level::Classifier, Level::Decision, Level::Plan]
            .into_iter()
            .zip(&mut states)
            .map(|(level, state)| (level, run(level, &ruleset, &compiled, &env, &input, state)));
        let (_, mut expected) = outcomes.next().expect("the rules' own meaning");
        for (level, outcome) in outcomes {
            // Beyond the bound on entries, packets are deferred although the rules could tell.
            if bounded && level == Level::Classifier && outcome.ending.verdict == Verdict::Defer {
                expected = outcome;
            } else if outcome != expected {
                return fail(format!("{level}: {outcome:?} instead of {expected:?} for {input:02x?}"));
            }
        }
        if expected.ending.verdict == Verdict::Drop
            && let Err(error) = dropped_in_every_state(&ruleset, &place, &env, &input)
        {
            return fail(error.to_string());
        }
        let said = program.tell(&compiled.plan, &input);
        if !said.as_ref().is_ok_and(|told| told.is(&expected, &compiled.plan, attach)) {
            return fail(format!("rbpf: {said:?} instead of {expected:?} for {input:02x?}"));
        }
    }
    Ok(())
}

/// With whatever state the kernel may find a packet in that was dropped, its rules don't let it on.
fn dropped_in_every_state(
    ruleset: &Ruleset,
    place: &Place,
    env: &Env,
    input: &Input,
) -> Result<(), TestCaseError> {
    let Connections::LookedUp { expectations } = place.connections else { return Ok(()) };
    let Ok(view) = View::new(ruleset.family, place, input) else { return Ok(()) };
    let absent = view.get(Field::CtAbsent) == 1;
    let known = Place { connections: Connections::Given, ..place.clone() };
    let may_be = |state: u16| match state {
        ct_state::ESTABLISHED => !absent,
        ct_state::RELATED => !absent || expectations,
        _ => true,
    };
    let states =
        [ct_state::NEW, ct_state::ESTABLISHED, ct_state::RELATED, ct_state::INVALID, ct_state::UNTRACKED];
    for state in states.into_iter().filter(|state| may_be(*state)) {
        let connection = Some(Connection { state, ..Connection::default() });
        let input = Input { connection, ..input.clone() };
        let verdict = ruleset.eval(&known, env, &input, &mut State::new(1)).ending.verdict;
        if matches!(verdict, Verdict::Accept | Verdict::Reject(_)) {
            return Err(TestCaseError::fail(format!(
                "{:?} in state {state:#x}: {verdict} for {input:02x?}",
                place.connections
            )));
        }
    }
    Ok(())
}

fn pick<'a>(random: &mut Random, from: &[&'a str]) -> &'a str {
    from[random.below(from.len())]
}

/// A chain of many rules whose addresses, prefixes and services meet often enough that most packets match.
fn many(random: &mut Random, family: Family, count: usize) -> String {
    let address = |random: &mut Random| -> String {
        let (a, b, c) = (random.below(40), random.below(30), random.below(200));
        let (text, lengths) = match family {
            Family::V4 => (format!("10.{a}.{b}.{c}"), [0, 8, 16, 24, 30, 32, 32, 32]),
            Family::V6 => (format!("2001:db8:{a:x}::{b:x}:{c:x}"), [0, 32, 48, 64, 112, 128, 128, 128]),
        };
        format!("{text}/{}", lengths[random.below(lengths.len())])
    };
    let mut text = String::from("*filter\n:INPUT DROP [0:0]\n");
    for _ in 0..count {
        write!(text, "-A INPUT -s {} -d {}", address(random), address(random)).expect("strings take text");
        match random.below(4) {
            0 => {}
            1 => write!(text, " -p udp -m udp --dport {}", random.below(30)).expect("strings take text"),
            2 => write!(text, " -p tcp -m tcp --dport {}:65535", random.below(9) * 1_000)
                .expect("strings take text"),
            _ => text.push_str(" -p tcp -m tcp --syn"),
        }
        text.push_str(pick(random, &[" -j ACCEPT\n", " -j DROP\n"]));
    }
    text + "COMMIT\n"
}

#[test]
fn large_rule_sets_are_decided_by_groups() {
    for (seed, family) in [(1, Family::V4), (2, Family::V6)] {
        let text = many(&mut Random::new(seed), family, 1_500);
        let mut sources = SourceMap::new();
        let file = sources.add("many", text.as_str());
        let options = ParseOptions { family: Some(family), ..ParseOptions::default() };
        let (dump, _) = parse(&sources, file, &options);
        let ruleset = lower(&dump, &[], Semantics::Legacy);
        assert_eq!(ruleset.rules.len(), 1_500);
        let place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Replace, false);
        let (env, devices) = (Env::default(), Devices::default());
        let compiled = polc::compile_with(&ruleset, &place, &env, &devices, Prefer::Groups);
        assert!(compiled.plan.walk.nodes.is_empty(), "{family}: nothing is left to the walk");
        let structure = compiled.plan.to_string();
        assert!(structure.contains(" groups, "), "{family}: {structure}");
        let attach = attach_for(Hook::Input);
        let object = emit(&compiled.plan, &target(attach)).expect("it is small");
        let program = Some(Program::new(&compiled.plan, attach, &object).expect("the check VM takes it"));
        let mut levels = Levels { ruleset: &ruleset, compiled: &compiled, env: &env, program };
        for input in Witnesses::new(&compiled.classifier, &[], seed).take(PACKETS) {
            levels.agree(&input).unwrap_or_else(|why| panic!("{family} {why}"));
        }
    }
}
