//! Prints packets and what the rules make of them, for comparison with a real netfilter.
//!
//! `cargo run -p polc-tests --example meaning -- RULES COUNT [nft]` prints a line for each packet: the packet from the
//! network header on in hexadecimal, the verdict, and who decided it. The rules' FORWARD path is evaluated, from eth0
//! to eth1, fragments as they are.

use std::io::Write;

use polc::witness::Witnesses;
use polc_frontend_iptables::{ParseOptions, lower, parse};
use polc_ir::env::{Connections, Counting, Device, Env, Fragments, Mode, Place};
use polc_ir::field::DeviceName;
use polc_ir::hook::{Hook, Semantics};
use polc_ir::source::SourceMap;
use polc_ir::state::State;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, rules, count, rest @ ..] = &arguments[..] else {
        eprintln!("usage: meaning RULES COUNT [nft]");
        std::process::exit(2);
    };
    let semantics = if rest.iter().any(|word| word == "nft") { Semantics::Nft } else { Semantics::Legacy };
    let mut sources = SourceMap::new();
    let file = sources.add(rules.as_str(), polc_tests::corpus::read(rules.as_ref()));
    let (dump, _) = parse(&sources, file, &ParseOptions::default());
    let ruleset = lower(&dump, &[], semantics);
    let place = Place {
        path: vec![Hook::Prerouting, Hook::Forward],
        attach: None,
        mode: Mode::Accelerate,
        fragments: Fragments::AsSeen,
        connections: Connections::Given,
        local_addresses: true,
        counters: Counting::Exact,
    };
    let name = |name| DeviceName::new(name).expect("a short name");
    let devices = [Device { ifindex: 1, name: name("eth0") }];
    let env = Env::default();
    let classifier = polc::flatten::flatten(&ruleset, &place, &env, &mut Vec::new());
    let mut out = std::io::stdout().lock();
    for mut input in Witnesses::new(&classifier, &devices, 7).take(count.parse().expect("a count")) {
        if input.frame.len() < 15 {
            continue;
        }
        input.in_device = Some(name("eth0"));
        input.out_device = Some(name("eth1"));
        input.mark = 0;
        input.packet_type = Some(0);
        input.frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        input.frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 0x99]);
        if u16::from_be_bytes([input.frame[12], input.frame[13]]) != ruleset.family.ether_type() {
            continue;
        }
        let outcome = ruleset.eval(&place, &env, &input, &mut State::new(1));
        let hex: String = input.frame[14..].iter().map(|byte| format!("{byte:02x}")).collect();
        let verdict = outcome.ending.verdict.word();
        if writeln!(out, "{hex} {verdict} {:#x} {}", outcome.mark, outcome.ending.by).is_err() {
            return;
        }
    }
}
