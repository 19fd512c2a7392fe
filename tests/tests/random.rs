//! Random rule sets: every level and rbpf agree on random packets.
//!
//! Rules draw from small pools of values, so that they meet. Where connections are looked up, nothing is dropped that
//! the kernel, which knows each packet's state, might not drop. `POLC_LONG` makes it ten times the packets.

use std::fmt::Write as _;

use polc::place::{attach_for, devices_of, place};
use polc::runner::{Level, Program, run};
use polc::select::{Devices, Prefer};
use polc::witness::{Random, Witnesses};
use polc_backend_ebpf::emit::{RuleLine, Target, emit};
use polc_frontend_iptables::{ParseOptions, lower, parse};
use polc_ir::diag::Severity;
use polc_ir::env::{Connection, Connections, Env, Input, Mode, Place, ct_state};
use polc_ir::field::Field;
use polc_ir::hook::{Family, Hook, Semantics};
use polc_ir::outcome::Verdict;
use polc_ir::packet::View;
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;
use polc_ir::state::State;

const RULE_SETS: usize = 1_000;
const PACKETS: usize = 1_000;

fn pick<'a>(random: &mut Random, from: &[&'a str]) -> &'a str {
    from[random.below(from.len())]
}

/// A filter table with base chain and a few user chains that lead forward only.
fn rules(random: &mut Random, chain: &str) -> String {
    let users = random.below(4);
    let mut text = format!("*filter\n:{chain} {} [0:0]\n", pick(random, &["ACCEPT", "DROP"]));
    for user in 0..users {
        writeln!(text, ":u{user} - [0:0]").expect("strings take text");
    }
    for from in 0..=users {
        let name = if from == 0 { chain.to_string() } else { format!("u{}", from - 1) };
        for _ in 0..random.below(7) {
            write!(text, "-A {name}").expect("strings take text");
            for _ in 0..random.below(3) {
                let one = pick(
                    random,
                    &[
                        " -s 10.0.0.0/8",
                        " ! -s 10.1.0.0/16",
                        " -d 192.0.2.0/255.255.0.255",
                        " -i eth0",
                        " ! -i eth+",
                        " -m mark --mark 0x1/0x3",
                        " -m ttl --ttl-gt 63",
                        " -m length --length 0:60",
                        " -m dscp --dscp 0x2e",
                        " -m iprange --src-range 10.0.0.5-10.3.0.7",
                        " -m state --state ESTABLISHED",
                        " -m state --state RELATED,ESTABLISHED",
                        " -m conntrack ! --ctstate ESTABLISHED",
                        " -m conntrack --ctstate NEW",
                        " -m conntrack --ctstate INVALID,UNTRACKED",
                        " -m limit --limit 1/s",
                        " -m string --algo bm --string x",
                        " -m statistic --mode random --probability 0.5",
                        " -m u32 --u32 0>>22&0x3C@0&0xFFFF=0:1024",
                        " -m pkttype --pkt-type multicast",
                        " -m comment --comment x",
                    ],
                );
                // Addresses and devices can be given once.
                let line = text.lines().last().unwrap_or("");
                let again =
                    ["-s ", "-d ", "-i "].iter().any(|option| one.contains(option) && line.contains(option));
                if !again && !text.ends_with(one) {
                    text.push_str(one);
                }
            }
            text.push_str(pick(
                random,
                &[
                    "",
                    " -p tcp",
                    " ! -p udp",
                    " -p tcp -m tcp --dport 22",
                    " -p tcp -m tcp --sport 1024:65535 ! --dport 80",
                    " -p tcp -m tcp --syn",
                    " -p tcp -m tcp --tcp-option 8",
                    " -p udp -m udp --dport 53",
                    " -p udp -m multiport --ports 53,123,1000:2000",
                    " -p tcp -m multiport ! --dports 22,80",
                    " -p icmp -m icmp --icmp-type 8",
                    " -p esp -m esp --espspi 1:9",
                    " -p sctp -m sctp --dport 5",
                ],
            ));
            let target = random.below(10 + 2 * (users - from));
            match target {
                0 | 1 => text.push_str(" -j ACCEPT"),
                2..=4 => text.push_str(" -j DROP"),
                5 => text.push_str(" -j RETURN"),
                6 => text.push_str(" -j MARK --set-xmark 0x1/0x3"),
                7 => text.push_str(" -j REJECT"),
                8 => text.push_str(" -j LOG"),
                9 => {}
                jump => {
                    let to = from + (jump - 10) / 2;
                    write!(text, " {} u{to}", if jump % 2 == 0 { "-j" } else { "-g" })
                        .expect("strings take text");
                }
            }
            text.push('\n');
        }
    }
    text + "COMMIT\n"
}

#[test]
fn random_rule_sets_mean_the_same_at_every_level() {
    let packets = if std::env::var_os("POLC_LONG").is_some() { PACKETS * 10 } else { PACKETS };
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for seed in (thread..RULE_SETS).step_by(threads) {
                    one(seed as u64, packets);
                }
            });
        }
    });
}

fn one(seed: u64, packets: usize) {
    let mut random = Random::new(seed);
    let hook = [Hook::Input, Hook::Forward][random.below(2)];
    let text = rules(&mut random, hook.chain_name());
    let mut sources = SourceMap::new();
    let file = sources.add("random.v4", text.as_str());
    let (dump, diagnostics) = parse(&sources, file, &ParseOptions::default());
    let error = diagnostics.iter().find(|diagnostic| diagnostic.severity == Severity::Error);
    assert!(error.is_none(), "seed {seed}: {error:?}\n{text}");
    let semantics = [Semantics::Legacy, Semantics::Nft][random.below(2)];
    let ruleset = lower(&dump, &[], semantics);
    let mode = [Mode::Accelerate, Mode::Replace][random.below(2)];
    let mut place = place(&[hook], attach_for(hook), mode, false);
    if mode == Mode::Accelerate {
        place.connections = [
            Connections::Unknown,
            Connections::LookedUp { expectations: false },
            Connections::LookedUp { expectations: true },
        ][random.below(3)];
    }
    let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
    let env = Env::default();
    // Every structure gets its share of small rule sets, whatever the cost model thinks of it.
    let prefer =
        [Prefer::Matrix, Prefer::Linear, Prefer::Cheapest, Prefer::Groups, Prefer::Walk][seed as usize % 5];
    let compiled = polc::compile_with(&ruleset, &place, &env, &devices, prefer);
    assert!(compiled.diagnostics.is_empty(), "seed {seed}: {:?}", compiled.diagnostics);
    let attach = attach_for(hook);
    let target = Target {
        attach,
        name: "polc".into(),
        rule: &|_| None::<RuleLine>,
        chain: &|_| None,
        semantics,
        trace: false,
        suspend: false,
    };
    let object = emit(&compiled.plan, &target).unwrap_or_else(|found| panic!("seed {seed}: {found:?}"));
    let mut program = Program::new(&compiled.plan, attach, &object).expect("the check VM takes it");
    program.set_random_seed(seed);
    let mut states = [(); 4].map(|()| State::new(seed));
    for input in Witnesses::new(&compiled.classifier, &devices.declared, seed).take(packets) {
        let [reference, classifier, decision, plan] = &mut states;
        let expected = run(Level::Ruleset, &ruleset, &compiled, &env, &input, reference);
        for (level, state) in
            [(Level::Classifier, classifier), (Level::Decision, decision), (Level::Plan, plan)]
        {
            let outcome = run(level, &ruleset, &compiled, &env, &input, state);
            assert_eq!(outcome, expected, "seed {seed} {level} {semantics:?} {mode}: {input:02x?}\n{text}");
        }
        if expected.ending.verdict == Verdict::Drop {
            dropped_in_every_state(&ruleset, &place, &env, &input, &text);
        }
        let said = program.run(&compiled.plan, &input);
        assert!(
            said.as_ref().is_ok_and(|(ending, counted)| expected.is(*ending, counted)),
            "seed {seed} rbpf {semantics:?} {mode}: {said:?} instead of {expected:?} for {input:02x?}\n{text}"
        );
    }
}

/// With whatever state the kernel may find a packet in that was dropped, its rules don't let it on.
fn dropped_in_every_state(ruleset: &Ruleset, place: &Place, env: &Env, input: &Input, text: &str) {
    let Connections::LookedUp { expectations } = place.connections else { return };
    let Ok(view) = View::new(ruleset.family, place, input) else { return };
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
        assert!(
            !matches!(verdict, Verdict::Accept | Verdict::Reject(_)),
            "{:?} in state {state:#x}: {verdict} for {input:02x?}\n{text}",
            place.connections
        );
    }
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
        let target = Target {
            attach,
            name: "polc".into(),
            rule: &|_| None::<RuleLine>,
            chain: &|_| None,
            semantics: Semantics::Legacy,
            trace: false,
            suspend: false,
        };
        let object = emit(&compiled.plan, &target).expect("it is small");
        let mut program = Program::new(&compiled.plan, attach, &object).expect("the check VM takes it");
        for input in Witnesses::new(&compiled.classifier, &[], seed).take(PACKETS) {
            let of = |level| run(level, &ruleset, &compiled, &env, &input, &mut State::new(seed));
            let expected = of(Level::Ruleset);
            assert_eq!(of(Level::Plan), expected, "{family}: {input:02x?}");
            let said = program.run(&compiled.plan, &input);
            assert!(
                said.as_ref().is_ok_and(|(ending, counted)| expected.is(*ending, counted)),
                "{family} rbpf: {said:?} instead of {expected:?} for {input:02x?}"
            );
        }
    }
}
