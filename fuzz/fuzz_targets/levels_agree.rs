//! Rules that parse mean the same at every level.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polc::place::devices_of;
use polc::runner::{Level, run};
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_frontend_iptables::{ParseOptions, lower, parse};
use polc_ir::diag::Severity;
use polc_ir::env::{Attach, Connections, Env, Fragments, Mode, Place};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::source::SourceMap;
use polc_ir::state::State;

fuzz_target!(|text: &str| {
    let mut sources = SourceMap::new();
    let file = sources.add("fuzz", text);
    let (dump, diagnostics) = parse(&sources, file, &ParseOptions::default());
    if diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
        return;
    }
    let ruleset = lower(&dump, &[], Semantics::Legacy);
    let devices = Devices { declared: devices_of(&ruleset), ..Devices::default() };
    let env = Env::default();
    for hook in Hook::ALL {
        let place = Place {
            path: vec![hook],
            attach: Some(if hook.has_out_device() { Attach::TcEgress } else { Attach::Xdp }),
            mode: Mode::Accelerate,
            fragments: Fragments::Unresolved,
            connections: Connections::Unknown,
            local_addresses: false,
        };
        let compiled = polc::compile(&ruleset, &place, &env, &devices);
        if !compiled.diagnostics.is_empty() {
            continue;
        }
        for input in Witnesses::new(&compiled.classifier, &devices.declared, 1).take(16) {
            let of = |level| run(level, &ruleset, &compiled, &env, &input, &mut State::new(1));
            for level in [Level::Classifier, Level::Decision, Level::Plan] {
                assert_eq!(of(level), of(Level::Ruleset), "{level} for {input:02x?}");
            }
        }
    }
});
