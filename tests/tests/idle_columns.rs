//! Rules on devices that a program's place can't have leave columns that tell nothing apart: what is looked at besides
//! still decides.

use polc::place::{attach_for, place};
use polc::runner::{Level, run};
use polc::select::{Devices, Prefer};
use polc::witness::Witnesses;
use polc_frontend_iptables::{ParseOptions, lower, parse};
use polc_ir::env::{Device, Env, Mode};
use polc_ir::field::DeviceName;
use polc_ir::hook::{Hook, Semantics};
use polc_ir::source::SourceMap;
use polc_ir::state::State;

#[test]
fn a_column_that_tells_nothing_apart_is_not_the_result() {
    let text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -s 198.51.100.0/24 -j DROP\n-A INPUT -s 203.0.113.9/32 -j DROP\n\
                -A INPUT -i eth1 -j DROP\nCOMMIT\n";
    let mut sources = SourceMap::new();
    let file = sources.add("idle.v4", text);
    let ruleset = lower(&parse(&sources, file, &ParseOptions::default()).0, &[], Semantics::Legacy);
    let place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Replace, false);
    let other = DeviceName::new("other").expect("a name");
    let devices = Devices {
        declared: vec![Device { ifindex: 2, name: other }],
        fixed_in: Some(other),
        fixed_out: None,
    };
    let env = Env::default();
    for prefer in [Prefer::Matrix, Prefer::Cheapest, Prefer::Linear, Prefer::Parts, Prefer::Walk] {
        let compiled = polc::compile_with(&ruleset, &place, &env, &devices, prefer);
        let mut dropped = 0;
        for mut input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(1_000) {
            input.in_device = Some(other);
            let decide =
                |level| run(level, &ruleset, &compiled, &env, &input, &mut State::new(1)).ending.verdict;
            assert_eq!(decide(Level::Plan), decide(Level::Ruleset), "{prefer:?} {input:02x?}");
            dropped += usize::from(decide(Level::Ruleset).word() == "drop");
        }
        assert!(dropped > 0, "some packets come from where packets are dropped");
    }
}
