//! Emitted programs do what their plans say, and the check VM and the kernel agree on every frame.

mod common;

use common::plans::{FIRST, Pair, all, eq, linear, plan, range, rule};
use polc_backend_ebpf::vm::Context;
use polc_ir::env::Attach;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::outcome::{Decider, FrameKind};
use polc_ir::plan::{Plan, PlanExit, Target as PlanTarget, WalkNode, WalkRef, WordWrite};
use polc_ir::ruleset::EffectTestKind;

fn ethernet(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(proto: u8, frag: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let ihl = 5 + options.len() / 4;
    let total = ihl * 4 + payload.len();
    let mut packet = vec![0x40 | ihl as u8, 0x12];
    packet.extend((total as u16).to_be_bytes());
    packet.extend([0, 7]);
    packet.extend(frag.to_be_bytes());
    packet.extend([63, proto, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2]);
    packet.extend(options);
    packet.extend(payload);
    packet
}

fn tcp(source: u16, destination: u16, options: &[u8]) -> Vec<u8> {
    let mut header = source.to_be_bytes().to_vec();
    header.extend(destination.to_be_bytes());
    header.extend([0; 8]);
    header.push(((5 + options.len() / 4) << 4) as u8);
    header.push(0x12);
    header.extend([0; 6]);
    header.extend(options);
    header
}

const ATTACHES: [Attach; 3] = [Attach::Xdp, Attach::TcIngress, Attach::TcEgress];

#[test]
fn a_few_rules_in_code() {
    for attach in ATTACHES {
        let fields = [Field::SrcAddr, Field::Proto, Field::DstPort, Field::FragOffset];
        let mut plan = plan(Family::V4, attach, &fields, 4);
        linear(
            &mut plan,
            vec![
                vec![all(&[eq(1, 6), eq(2, 22)]), all(&[eq(3, 0)])],
                vec![all(&[range(2, 1000, 2000)]), all(&[range(0, 0xc000_0000, 0xc000_02ff), eq(1, 6)])],
                vec![all(&[eq(1, 17)])],
                vec![],
            ],
        );
        let mut pair = Pair::new("a few rules", plan);
        let by = |number| Decider::Rule(rule(number));
        let frame = |proto, port, frag| ethernet(0x0800, &ipv4(proto, frag, &[], &tcp(1024, port, &[])));
        assert_eq!(pair.decides(&frame(6, 22, 0)), by(0));
        assert_eq!(pair.decides(&frame(6, 22, 0x2000)), by(0));
        assert_eq!(pair.decides(&frame(6, 22, 5)), by(3));
        assert_eq!(pair.decides(&frame(6, 1000, 0)), by(1));
        assert_eq!(pair.decides(&frame(6, 2000, 0)), by(1));
        assert_eq!(pair.decides(&frame(6, 2001, 0)), by(3));
        assert_eq!(pair.decides(&frame(6, 999, 0)), by(3));
        assert_eq!(pair.decides(&frame(17, 22, 0)), by(2));
        assert_eq!(pair.decides(&ethernet(0x0806, &[0; 40])), Decider::Frame(FrameKind::NotIp));
        assert_eq!(pair.decides(&ethernet(0x86dd, &[0; 40])), Decider::Frame(FrameKind::OtherFamily));
        assert_eq!(pair.decides(&[0; 13]), Decider::Frame(FrameKind::Runt));
        let context = Context { ingress_ifindex: 1, ifindex: 1, ..Context::default() };
        let mut padded = frame(6, 22, 0);
        padded.extend([0; 20]);
        let (ending, bytes) = pair.run_counted(&padded, &context);
        assert_eq!((ending.map(|ending| ending.by), bytes), (Ok(by(0)), 40), "padding is not counted");
    }
}

/// A chain of tests in the table: port `i` leads to exit `i % 2`, any other to the last exit.
fn chain(attach: Attach, tests: u32) -> Plan {
    let mut plan = plan(Family::V4, attach, &[Field::SrcAddr, Field::Proto, Field::DstPort], 3);
    plan.walk.exits = vec![PlanExit::End(FIRST), PlanExit::End(FIRST + 1), PlanExit::End(FIRST + 2)];
    let mut next = WalkRef::Exit(2);
    for port in (0..tests).rev() {
        plan.walk.nodes.push(WalkNode::Test { test: eq(2, port), yes: WalkRef::Exit(port % 2), no: next });
        next = WalkRef::Node(plan.walk.nodes.len() as u32 - 1);
    }
    plan.walk.visits_max = tests + 1;
    plan.root = PlanTarget::Walk(next);
    plan
}

#[test]
fn a_walk_of_many_tests() {
    for attach in [Attach::Xdp, Attach::TcIngress] {
        for tests in [2, 99, 999, 4_999] {
            let started = std::time::Instant::now();
            let mut pair = Pair::new("a walk", chain(attach, tests));
            if let Some(verified) = pair.verified() {
                let took = started.elapsed();
                eprintln!("{attach}: {tests} tests: {verified} instructions processed, {took:?}");
                assert!(verified < 1_000_000);
            }
            let frame = |port| ethernet(0x0800, &ipv4(6, 0, &[], &tcp(1024, port, &[])));
            for port in [0, 1, tests as u16 - 1] {
                assert_eq!(pair.decides(&frame(port)), Decider::Rule(rule(u32::from(port) % 2)));
            }
            assert_eq!(pair.decides(&frame(tests as u16)), Decider::Rule(rule(2)));
        }
    }
}

#[test]
fn a_walk_that_is_too_deep_is_refused() {
    let plan = chain(Attach::Xdp, 5_000);
    let diagnostics = common::plans::try_object(&plan).unwrap_err();
    assert_eq!(diagnostics[0].code, polc_backend_ebpf::emit::WALK_TOO_DEEP);
}

#[test]
fn a_walk_with_forks_writes_and_tests() {
    for attach in ATTACHES {
        let fields = [Field::SrcAddr, Field::Proto, Field::DstPort, Field::Mark, Field::Ttl, Field::Tos];
        let mut plan = plan(Family::V4, attach, &fields, 4);
        let nth = plan.effect_tests.push(EffectTestKind::Nth { every: 2, initial: 0 });
        let always = plan.effect_tests.push(EffectTestKind::Random { probability: 1 << 31 });
        let never = plan.effect_tests.push(EffectTestKind::Random { probability: 0 });
        let write = |word, clear, xor| WordWrite { word, clear, xor };
        let walk = &mut plan.walk;
        // The second stage: marked 7 by three writes, every third packet rule 1, else rule 2; not marked, rule 3.
        walk.nodes.push(WalkNode::Test { test: eq(3, 7), yes: WalkRef::Exit(4), no: WalkRef::Exit(3) });
        // The first: TCP in one part, port 80 in the other; TCP is exit 1, port 80 exit 0.
        walk.nodes.push(WalkNode::Test { test: eq(1, 6), yes: WalkRef::Exit(1), no: WalkRef::None });
        walk.nodes.push(WalkNode::Test { test: eq(2, 80), yes: WalkRef::Exit(0), no: WalkRef::Exit(2) });
        walk.nodes.push(WalkNode::Fork { first: WalkRef::Node(1), rest: WalkRef::Node(2) });
        let to = |reference| PlanTarget::Walk(reference);
        walk.exits = vec![
            PlanExit::End(FIRST),
            PlanExit::Then {
                writes: vec![write(3, u32::MAX, 1), write(3, 0, 2), write(3, 1, 5)],
                next: to(WalkRef::Exit(5)),
            },
            PlanExit::Then { writes: vec![], next: to(WalkRef::Node(0)) },
            PlanExit::End(FIRST + 3),
            PlanExit::Test { test: nth, yes: to(WalkRef::Exit(6)), no: to(WalkRef::Exit(7)) },
            PlanExit::Test { test: always, yes: to(WalkRef::Exit(8)), no: to(WalkRef::Exit(0)) },
            PlanExit::End(FIRST + 1),
            PlanExit::End(FIRST + 2),
            PlanExit::Test { test: never, yes: to(WalkRef::Exit(0)), no: to(WalkRef::Node(0)) },
        ];
        plan.root = to(WalkRef::Node(3));
        let mut pair = Pair::new("forks", plan);
        let by = |number| Decider::Rule(rule(number));
        let frame = |proto, port| ethernet(0x0800, &ipv4(proto, 0, &[], &tcp(1024, port, &[])));
        assert_eq!(pair.decides(&frame(6, 80)), by(0), "the smaller exit wins");
        assert_eq!(pair.decides(&frame(17, 80)), by(0));
        assert_eq!(pair.decides(&frame(17, 81)), by(3));
        let seen: Vec<_> = (0..6).map(|_| pair.decides(&frame(6, 81))).collect();
        assert_eq!(seen, [by(2), by(2), by(1), by(2), by(2), by(1)], "1 ^ 2 = 3; (3 & !1) ^ 5 = 7");
    }
}
