//! What a program sees where it is attached is not always what the rules see: forwarding counts hops, the kernel
//! reassembles fragments, rules rewrite headers and change sets. Each case was first seen to differ from netfilter.

use polc::guard::leave_rewritten;
use polc::place::{devices_of, place, whole_way};
use polc::runner::Program;
use polc::select::Devices;
use polc_backend_ebpf::emit::emit;
use polc_frontend_iptables::{ParseOptions, ipset, lower, parse};
use polc_ir::env::{Attach, Connections, Env, Mode, Place};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::outcome::Verdict;
use polc_ir::packet::text;
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_tests::levels::{Levels, target};

use Hook::{Forward, Input, Output, Postrouting, Prerouting};
use Mode::{Accelerate, Replace};
use Verdict::{Accept, Defer, Drop};

/// What all levels, and the object, say of packets by a table's rules, at XDP and tc's ingress.
fn says(table: &str, rules: &str, sets: &str, path: &[Hook], mode: Mode, cases: &[(&str, Verdict)]) {
    let dump = format!("*{table}\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n{rules}\nCOMMIT\n");
    let ruleset = read(&dump, sets);
    for attach in [Attach::Xdp, Attach::TcIngress] {
        say(&ruleset, &place(path, attach, mode, false), cases);
    }
}

fn read(dump: &str, sets: &str) -> Ruleset {
    read_as(Semantics::Legacy, dump, sets)
}

fn read_as(semantics: Semantics, dump: &str, sets: &str) -> Ruleset {
    let mut sources = SourceMap::new();
    let file = sources.add("rules", dump);
    let (dump, found) = parse(&sources, file, &ParseOptions::default());
    assert!(found.is_empty(), "{found:?}");
    let file = sources.add("sets", sets);
    lower(&dump, &[ipset::parse(&sources, file).0], semantics)
}

fn say(ruleset: &Ruleset, place: &Place, cases: &[(&str, Verdict)]) {
    let devices = Devices { declared: devices_of(ruleset), ..Devices::default() };
    let (env, attach) = (Env::default(), place.attach.expect("a program is somewhere"));
    let compiled = polc::compile(ruleset, place, &env, &devices);
    let object = emit(&compiled.plan, &target(attach)).expect("it is small");
    let program = Some(Program::new(&compiled.plan, attach, &object).expect("the check VM takes it"));
    let mut levels = Levels { ruleset, compiled: &compiled, env: &env, program };
    for (packet, verdict) in cases {
        let input = text::parse(packet).expect("a packet").input().expect("a packet");
        let said = levels.agree(&input).unwrap_or_else(|why| panic!("{packet}: {why}"));
        assert_eq!(said.ending.verdict, *verdict, "at {attach}: {packet}\n{ruleset}");
    }
}

const WHOLE: &str = "udp 192.0.2.1:5000 > 198.51.100.1:53";
const LATER: &str = "udp 192.0.2.1 > 198.51.100.1 frag=100 len=60";

/// IPv4 is reassembled before INPUT whatever else there is; before other hooks only where connections are tracked.
#[test]
fn later_fragments_may_come_to_forward_as_they_are() {
    let rule = "-A FORWARD -f -j ACCEPT";
    says("filter", rule, "", &[Forward], Accelerate, &[(WHOLE, Drop), (LATER, Defer)]);
    let whole = "-A FORWARD ! -f -j ACCEPT";
    says("filter", whole, "", &[Forward], Accelerate, &[(WHOLE, Accept), (LATER, Defer)]);
    // Nobody else decides it then, and an accept would pass a policy that drops.
    says("filter", whole, "", &[Forward], Replace, &[(WHOLE, Accept), (LATER, Drop)]);
    for protocol in ["udp", "tcp"] {
        let rule = format!("-A FORWARD -p {protocol} -m {protocol} -j DROP\n-A FORWARD -j ACCEPT");
        let later = LATER.replace("udp", protocol);
        says("filter", &rule, "", &[Forward], Accelerate, &[(&later, Defer)]);
    }
    let rule = "-A INPUT -f -j ACCEPT";
    says("filter", rule, "", &[Input], Accelerate, &[(WHOLE, Drop), (LATER, Drop)]);
    says("filter", rule, "", &[Prerouting, Input], Accelerate, &[(WHOLE, Drop), (LATER, Defer)]);
}

/// `ip_forward` counts the hop before the rules of FORWARD see it.
#[test]
fn u32_reads_the_hop_count_that_forwarding_leaves() {
    let hops = "-A FORWARD -m u32 --u32 \"0x8>>0x18=0x40\" -j ACCEPT";
    says("filter", hops, "", &[Forward], Accelerate, &[("udp 192.0.2.1:1 > 198.51.100.1:2 ttl=65", Defer)]);
    let at_home = hops.replace("FORWARD", "INPUT");
    let packets = [("udp 192.0.2.1:1 > 198.51.100.1:2 ttl=65", Drop), (WHOLE, Accept)];
    says("filter", &at_home, "", &[Input], Accelerate, &packets);
    // The protocol stands beside it, and stays.
    let protocol = "-A FORWARD -m u32 --u32 \"0x6&0xff=0x11\" -j ACCEPT";
    says(
        "filter",
        protocol,
        "",
        &[Forward],
        Accelerate,
        &[(WHOLE, Accept), ("tcp 192.0.2.1:1 > 192.0.2.2:2", Drop)],
    );
    let port = "-A FORWARD -m u32 --u32 \"0x0>>0x16&0x3c@0x0&0xffff=0x35\" -j ACCEPT";
    says(
        "filter",
        port,
        "",
        &[Forward],
        Accelerate,
        &[(WHOLE, Accept), ("udp 192.0.2.1:1 > 192.0.2.2:2", Drop)],
    );
}

/// A program has the packet before the rules rewrite it.
#[test]
fn u32_reads_what_rules_wrote() {
    let tos = "-A INPUT -j TOS --set-tos 0x10/0xff\n-A INPUT -m u32 --u32 \"0x0>>0x10&0xff=0x10\" -j ACCEPT";
    says("mangle", tos, "", &[Input], Accelerate, &[(WHOLE, Defer)]);
    let length = tos.replace("0x0>>0x10&0xff=0x10", "0x0&0xffff=0x1c");
    says("mangle", &length, "", &[Input], Accelerate, &[(WHOLE, Accept)]);
}

/// Who knocked is in the kernel's set, not in the one that was compiled.
#[test]
fn sets_that_rules_change_are_the_kernels() {
    let knock = "-A INPUT -p tcp -m tcp --dport 1234 -j SET --add-set knock src\n\
                 -A INPUT -p tcp -m tcp --dport 22 -m set --match-set knock src -j ACCEPT";
    let packets = [
        ("tcp 192.0.2.1:5000 > 192.0.2.2:1234", Defer),
        ("tcp 192.0.2.1:5000 > 192.0.2.2:22", Defer),
        (WHOLE, Drop),
    ];
    says("filter", knock, "create knock hash:ip", &[Input], Accelerate, &packets);
    // What is added to a list goes to a set in it.
    let listed = knock.replace("--add-set knock", "--add-set all");
    let sets = "create knock hash:ip\ncreate all list:set\nadd all knock";
    says("filter", &listed, sets, &[Input], Accelerate, &packets);
}

const ROUTER: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
    -A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2\n\
    -A POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n\
    *filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
    -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n-A FORWARD -d 10.0.0.0/8 -j ACCEPT\n\
    -A OUTPUT -s 203.0.113.1 -j DROP\nCOMMIT\n";
/// Either of a new connection, or the answer to one whose source was translated.
const UDP: &str = "udp 198.51.100.1:53 > 203.0.113.1:40000";

/// An answer is for the router by its address, and for somebody behind it by its connection.
#[test]
fn answers_to_translated_connections_are_the_kernels() {
    let masquerade =
        ROUTER.replace("-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2\n", "");
    for dump in [ROUTER, &masquerade] {
        let ruleset = read(dump, "");
        for (attach, last) in [(Attach::Xdp, Input), (Attach::TcIngress, Forward)] {
            let way = whole_way(&ruleset, &[last], attach);
            assert_eq!(way, [Prerouting, last]);
            say(&ruleset, &place(&way, attach, Accelerate, false), &[(UDP, Defer)]);
        }
    }
}

/// What has no connection, and no rule translates, has the addresses that the rules see.
#[test]
fn packets_without_connection_are_not_translated() {
    let ruleset = read(ROUTER, "");
    let place = place(&[Prerouting, Input], Attach::Xdp, Accelerate, false);
    let looked_up =
        |expectations| Place { connections: Connections::LookedUp { expectations }, ..place.clone() };
    let established = format!("{UDP} ct=established");
    let fragment = "udp 198.51.100.1 > 203.0.113.1 frag=100 len=60";
    let web = "tcp 198.51.100.1:4000 > 203.0.113.1:80";
    let ssh = "tcp 198.51.100.1:4000 > 203.0.113.1:22";
    let cases = [(UDP, Drop), (&established, Defer), (fragment, Defer), (web, Defer), (ssh, Accept)];
    say(&ruleset, &looked_up(false), &cases);
    // The kernel may translate what another connection announced.
    say(&ruleset, &looked_up(true), &[(UDP, Defer), (ssh, Defer)]);
}

/// A program at tc's egress sees the router's address, which no rule saw.
#[test]
fn what_leaves_was_decided_before_it_was_rewritten() {
    for path in [&[Output, Postrouting][..], &[Forward]] {
        let mut ruleset = read(ROUTER, "");
        let place = place(path, Attach::TcEgress, Accelerate, false);
        leave_rewritten(&mut ruleset, &place);
        say(&ruleset, &place, &[("udp 203.0.113.1:53 > 198.51.100.1:40000", Defer)]);
    }
}

/// iptables-nft compares one source and one destination port in one go (iptables/nft.c, `add_nft_tcpudp`).
#[test]
fn nft_negates_two_ports_together() {
    let said = |semantics, ports: &str| {
        let rules = format!("-A INPUT -p udp -m udp {ports} -j ACCEPT");
        let ruleset = read_as(semantics, &format!("*filter\n:INPUT DROP [0:0]\n{rules}\nCOMMIT\n"), "");
        let place = place(&[Input], Attach::TcIngress, Replace, false);
        [(1000, 22), (1000, 6), (5, 22), (5, 6)].map(|(from, to)| {
            let packet = format!("udp 192.0.2.1:{from} > 198.51.100.1:{to}");
            let input = text::parse(&packet).expect("a packet").input().expect("a packet");
            let verdict = ruleset.eval(&place, &Env::default(), &input, &mut State::new(1)).ending.verdict;
            say(&ruleset, &place, &[(&packet, verdict)]);
            verdict == Accept
        })
    };
    let both = "! --sport 1000 ! --dport 22";
    assert_eq!(said(Semantics::Nft, both), [false, true, true, true]);
    assert_eq!(said(Semantics::Legacy, both), [false, false, false, true]);
    assert_eq!(said(Semantics::Nft, "! --sport 1000:1001 ! --dport 22"), [false, false, false, true]);
    assert_eq!(said(Semantics::Nft, "--sport 1000 ! --dport 22"), [false, true, false, false]);
}
