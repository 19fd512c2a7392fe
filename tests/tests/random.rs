//! Random rule sets: every level and rbpf agree on the packets made for them.
//!
//! What fails is shrunk, printed, and its seed kept in `tests/regressions/random.txt`. `POLC_LONG` makes it ten times
//! the rule sets. Where connections are looked up, nothing is dropped that the kernel, which knows each packet's state,
//! might not drop.

use std::fmt::Write as _;

use polc::Compiled;
use polc::place::{attach_for, devices_of, place};
use polc::runner::{Level, Program, run};
use polc::select::{Devices, Prefer};
use polc::witness::{Random, Witnesses};
use polc_backend_ebpf::emit::emit;
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
use polc_tests::generate::{Built, Case, case};
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
    let Built { ruleset, place, devices, compiled, object } = match case.build() {
        Ok(built) => built,
        Err(error) => return fail(error),
    };
    let object = match object {
        Ok(object) => object,
        Err(found) => return fail(format!("not emitted: {found:?}")),
    };
    let attach = attach_for(case.hook);
    let env = Env::default();
    let bounded = compiled.diagnostics.iter().any(|found| found.severity != Severity::Note);
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
        if let Err(error) = program.left_marked(&compiled.plan, &input, &expected) {
            return fail(format!("rbpf: {error} for {input:02x?}"));
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
        all_levels_agree(&ruleset, &compiled, &env, seed);
    }
}

/// A chain of many rules of which each asks for something of everything: classes of them all together are without end.
fn unlike(random: &mut Random, family: Family, count: usize) -> String {
    let host = |random: &mut Random| {
        let host = random.below(400) * 163;
        let (high, low) = (host >> 8, host & 0xff);
        match family {
            Family::V4 => format!("10.7.{high}.{low}/32"),
            Family::V6 => format!("2001:db8::{high:x}:{low:x}/128"),
        }
    };
    let mut text = String::from("*filter\n:INPUT DROP [0:0]\n");
    for rule in 0..count {
        let (from, to) = (host(random), host(random));
        write!(text, "-A INPUT -s {from}").expect("strings take text");
        if random.below(3) > 0 {
            write!(text, " -d {to}").expect("strings take text");
        }
        if rule % 20 == 3 {
            write!(text, " -i eth{}", random.below(4)).expect("strings take text");
        }
        let protocol = pick(random, &["tcp", "udp"]);
        write!(text, " -p {protocol} -m {protocol}").expect("strings take text");
        for option in ["--sport", "--dport"] {
            let port = random.below(60_000);
            match random.below(3) {
                0 => write!(text, " {option} {port}"),
                1 => write!(text, " {option} {port}:{}", port + random.below(5_000)),
                _ => Ok(()),
            }
            .expect("strings take text");
        }
        if rule % 20 == 7 {
            write!(text, " -m length --length {}:{}", random.below(100), 100 + random.below(1_900))
                .expect("strings take text");
        }
        text.push_str(pick(random, &[" -j ACCEPT\n", " -j DROP\n"]));
    }
    text + "COMMIT\n"
}

#[test]
fn large_rule_sets_with_nothing_in_common_are_decided_in_parts() {
    for (seed, family) in [(1, Family::V4), (2, Family::V6)] {
        let text = unlike(&mut Random::new(seed), family, 2_000);
        let mut sources = SourceMap::new();
        let file = sources.add("unlike", text.as_str());
        let options = ParseOptions { family: Some(family), ..ParseOptions::default() };
        let (dump, found) = parse(&sources, file, &options);
        assert!(found.is_empty(), "{found:?}");
        let ruleset = lower(&dump, &[], Semantics::Legacy);
        let place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Replace, false);
        let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
        let env = Env::default();
        let compiled = polc::compile_with(&ruleset, &place, &env, &devices, Prefer::Cheapest);
        assert!(compiled.diagnostics.is_empty(), "{family}: {:?}", compiled.diagnostics);
        assert!(compiled.plan.walk.nodes.is_empty(), "{family}: nothing is left to the walk");
        all_levels_agree(&ruleset, &compiled, &env, seed);
    }
}

/// A rule set at INPUT, compiled in replace mode, and what all levels say of packets made for it.
fn agreed(text: &str) -> (Ruleset, Compiled) {
    let mut sources = SourceMap::new();
    let file = sources.add("rules", text);
    let (dump, found) = parse(&sources, file, &ParseOptions::default());
    assert!(found.is_empty(), "{found:?}");
    let ruleset = lower(&dump, &[], Semantics::Legacy);
    let place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Replace, false);
    let compiled = polc::compile(&ruleset, &place, &Env::default(), &Devices::default());
    all_levels_agree(&ruleset, &compiled, &Env::default(), 1);
    (ruleset, compiled)
}

/// An exit that counts and writes on its way is many instructions, and prefixes that overlap make many of them.
#[test]
fn rules_that_mark_overlapping_prefixes_have_room() {
    let mut text = String::from("*mangle\n:INPUT ACCEPT [0:0]\n");
    for net in 0..1_000 {
        let (c, d, length) = (net / 256, net % 256, 24 + net % 9);
        writeln!(text, "-A INPUT -s 10.0.{c}.{d}/{length} -j MARK --set-xmark {net}")
            .expect("strings take text");
    }
    let (_, compiled) = agreed(&(text + "COMMIT\n"));
    assert!(compiled.diagnostics.is_empty(), "{:?}", compiled.diagnostics);
}

/// Every chain is jumped to from the two before it and comes back, so that ways double. What lies far is left out.
#[test]
fn ways_without_end_are_cut_off_at_their_ends() {
    const CHAINS: usize = 20;
    let (mut chains, mut rules) = (String::new(), String::new());
    for chain in 0..CHAINS {
        writeln!(chains, ":C{chain} - [0:0]").expect("strings take text");
        for next in chain + 1..CHAINS.min(chain + 3) {
            writeln!(rules, "-A C{chain} -p tcp -m tcp --dport {chain}{next} -j C{next}")
                .expect("strings take text");
        }
        writeln!(rules, "-A C{chain} -s 10.{chain}.0.0/16 -j DROP").expect("strings take text");
    }
    let head = "-A INPUT -s 192.0.2.0/24 -j DROP\n-A INPUT -s 10.0.0.0/8 -j C0\n";
    let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{chains}{head}{rules}COMMIT\n");
    let (ruleset, compiled) = agreed(&text);
    let [finding] = &compiled.diagnostics[..] else { panic!("{:?}", compiled.diagnostics) };
    assert_eq!(finding.code, polc::flatten::TOO_MANY_ENTRIES);
    // Only what jumps to chain after chain is left to the kernel.
    let devices = devices_of(&ruleset);
    let deferred = Witnesses::new(&compiled.classifier, &devices, 1).take(PACKETS).filter(|input| {
        let (env, state) = (Env::default(), &mut State::new(1));
        run(Level::Plan, &ruleset, &compiled, &env, input, state).ending.verdict == Verdict::Defer
    });
    let deferred = deferred.count();
    assert!(deferred < PACKETS / 3, "{deferred}");
}

/// Fields that say whether a packet is in a set share words of the key then, those of stages and of tables alike.
#[test]
fn a_hundred_and_fifty_sets_are_asked_on_one_path() {
    for (prefer, sets) in [(Prefer::Cheapest, 150), (Prefer::Walk, 40)] {
        let mut random = Random::new(3);
        let (text, contents) = asking(&mut random, sets);
        let mut sources = SourceMap::new();
        let file = sources.add("asking", text);
        let (dump, _) = parse(&sources, file, &ParseOptions::default());
        let file = sources.add("sets", contents);
        let (contents, found) = ipset::parse(&sources, file);
        assert!(found.is_empty(), "{found:?}");
        let ruleset = lower(&dump, &[contents], Semantics::Legacy);
        let place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Replace, false);
        let (env, devices) = (Env::default(), Devices::default());
        let compiled = polc::compile_with(&ruleset, &place, &env, &devices, prefer);
        assert!(compiled.diagnostics.is_empty(), "{prefer:?}: {:?}", compiled.diagnostics);
        let shared = compiled.plan.key.iter().filter(|slot| slot.flag.is_some()).count();
        assert_eq!(shared, sets, "{prefer:?}");
        assert_eq!(compiled.plan.members.len(), sets / 10, "{prefer:?}: what tables give");
        all_levels_agree(&ruleset, &compiled, &env, 4);
    }
}

/// A chain in which each of so many sets is asked, beside another one, and the sets. One in ten becomes a table.
fn asking(random: &mut Random, sets: usize) -> (String, String) {
    let mut text = String::from("*filter\n:INPUT DROP [0:0]\n");
    let mut contents = String::new();
    for set in 0..sets {
        let is_table = set % 10 == 7;
        let kind = if is_table { "hash:ip,port" } else { "hash:ip" };
        writeln!(contents, "create s{set} {kind}").expect("strings take text");
        for element in 0..if is_table { 80 } else { 3 } {
            let port = if is_table { format!(",tcp:{element}") } else { String::new() };
            let net = random.below(40);
            writeln!(contents, "add s{set} 10.0.{net}.{element}{port}").expect("strings take text");
        }
        let (not, verdict) = (pick(random, &["", "! "]), pick(random, &["ACCEPT", "DROP"]));
        let other = random.below(sets);
        write!(text, "-A INPUT -m set --match-set s{set} src,dst ").expect("strings take text");
        writeln!(text, "-m set {not}--match-set s{other} src,dst -j {verdict}").expect("strings take text");
    }
    (text + "COMMIT\n", contents)
}

/// All levels of a rule set at INPUT, and the object under rbpf, agree on packets made for it.
fn all_levels_agree(ruleset: &Ruleset, compiled: &Compiled, env: &Env, seed: u64) {
    let attach = attach_for(Hook::Input);
    let object = emit(&compiled.plan, &target(attach)).expect("it is small");
    let program = Some(Program::new(&compiled.plan, attach, &object).expect("the check VM takes it"));
    let mut levels = Levels { ruleset, compiled, env, program };
    for input in Witnesses::new(&compiled.classifier, &devices_of(ruleset), seed).take(PACKETS) {
        levels.agree(&input).unwrap_or_else(|why| panic!("{} {why}", ruleset.family));
    }
}
