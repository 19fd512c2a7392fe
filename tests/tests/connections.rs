//! Looking connections up: every level and rbpf agree on every dump that tests connection state, and more is dropped.
//!
//! The figures that the test prints (`cargo test -p polc-tests --test connections -- --nocapture`) say how many real
//! INPUT chains drop anything early without looking connections up, and with.

use polc::place::{attach_for, devices_of, place};
use polc::runner::Program;
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::emit::emit;
use polc_ir::env::{Connections, Env, Mode, Place};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::outcome::{Decider, Verdict};
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;
use polc_tests::corpus;
use polc_tests::levels::{Levels, target};

const PACKETS: usize = 100;

/// Packets that rules drop, and all packets.
fn dropped(name: &str, ruleset: &Ruleset, place: &Place) -> (usize, usize) {
    let env = Env::default();
    let devices = Devices { declared: devices_of(ruleset), ..Devices::default() };
    let compiled = polc::compile(ruleset, place, &env, &devices);
    let attach = attach_for(Hook::Input);
    let program = emit(&compiled.plan, &target(attach))
        .ok()
        .map(|object| Program::new(&compiled.plan, attach, &object).expect("the check VM takes it"));
    let mut levels = Levels { ruleset, compiled: &compiled, env: &env, program };
    let mut drops = 0;
    for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(PACKETS) {
        let outcome = levels.agree(&input).unwrap_or_else(|why| panic!("{name} {why}"));
        let by_rules = !matches!(outcome.ending.by, Decider::Frame(_));
        drops += usize::from(by_rules && outcome.ending.verdict == Verdict::Drop);
    }
    (drops, PACKETS)
}

#[test]
fn connections_are_looked_up_in_every_dump_that_tests_them() {
    let ways = [
        Connections::Unknown,
        Connections::LookedUp { expectations: true },
        Connections::LookedUp { expectations: false },
    ];
    let (mut chains, mut active, mut drops, mut packets) = (0, [0; 3], [0; 3], 0);
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        let ruleset = dump.ruleset(&mut SourceMap::new(), Semantics::Legacy);
        let mut place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Accelerate, false);
        let text = dump.text();
        let tests_state = ["--state ", "--ctstate "].iter().any(|option| text.contains(option));
        if ruleset.path_chains(&place).is_empty() || !tests_state {
            continue;
        }
        chains += 1;
        for (index, connections) in ways.into_iter().enumerate() {
            place.connections = connections;
            let (dropped, all) = dropped(&dump.name, &ruleset, &place);
            active[index] += usize::from(dropped > 0);
            drops[index] += dropped;
            packets += all;
        }
    }
    let share = |drops: usize| 100.0 * drops as f64 / (packets / ways.len()) as f64;
    for (index, way) in ways.iter().enumerate() {
        eprintln!(
            "{way:?}: of {chains} INPUT chains in dumps that test connection state, {} drop early; {:.1} % of packets",
            active[index],
            share(drops[index])
        );
    }
    // Packets are made for each way by itself, and one that can't be looked up is left to the kernel though all its
    // states may drop it: chains are what to compare.
    assert!(
        active[0] <= active[1] && active[1] <= active[2],
        "{active:?}: who knows more drops in more chains"
    );
    assert!(chains == 0 || drops[2] > drops[0]);
}
