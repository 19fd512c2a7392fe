//! Emitted programs do what their plans say, and the check VM and the kernel agree on every frame.

use polc_backend_ebpf::vm::Context;
use polc_ir::derived::{self, DerivedData, U32Op, U32Program, U32Test};
use polc_ir::entities::{Derived, Stage};
use polc_ir::env::{Attach, Device, Mode};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::Family;
use polc_ir::limits::{DEVICE_NUMBER_MAX, WALK_TURNS_MAX};
use polc_ir::outcome::{Decider, FrameKind};
use polc_ir::packet::View;
use polc_ir::plan::{
    KeySlot, LinearEntry, LinearStep, LinearTest, Plan, PlanExit, StepData, Target as PlanTarget, WalkNode,
    WalkRef, WordWrite,
};
use polc_ir::ruleset::EffectTestKind;
use polc_tests::kernel::{BpfFs, TempDir, VethPair, has_tools, may_run, run};
use polc_tests::programs::frames::{Dice, ethernet, ipv4, tcp};
use polc_tests::programs::plans::{FIRST, Pair, all, eq, linear, object, plan, range, rule, try_object};

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

/// Tests of a [`chain`] that take all turns there are: five steps each, of which the last ends the walk.
const TESTS_MAX: u32 = 5 * WALK_TURNS_MAX - 1;

#[test]
fn a_walk_of_many_tests() {
    for attach in [Attach::Xdp, Attach::TcIngress] {
        for tests in [2, 99, 999, TESTS_MAX] {
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

/// Stages of one test each, of which every packet that fits counts and comes to the next, and every other one comes there
/// at once: as many turns as stages, whatever they would be if the longest parts of all ways were one.
#[test]
fn turns_are_those_of_one_way() {
    const STAGES: u32 = WALK_TURNS_MAX - 1;
    let mut plan = plan(Family::V4, Attach::Xdp, &[Field::SrcAddr, Field::Proto, Field::DstPort], 3);
    plan.traces[FIRST as usize].ending = None;
    plan.walk.exits = vec![PlanExit::End(FIRST + 1)];
    let mut next = WalkRef::Exit(0);
    for port in 0..STAGES {
        plan.walk.exits.push(PlanExit::Then {
            count: Some(FIRST),
            writes: vec![],
            next: PlanTarget::Walk(next),
        });
        let yes = WalkRef::Exit(plan.walk.exits.len() as u32 - 1);
        plan.walk.nodes.push(WalkNode::Test { test: eq(2, port), yes, no: next });
        next = WalkRef::Node(plan.walk.nodes.len() as u32 - 1);
    }
    plan.walk.visits_max = 2 * STAGES + 1;
    plan.root = PlanTarget::Walk(next);
    let mut pair = Pair::new("stages that count", plan);
    if let Some(verified) = pair.verified() {
        eprintln!("{STAGES} stages: {verified} instructions processed");
        assert!(verified < 1_000_000);
    }
    let frame = ethernet(0x0800, &ipv4(6, 0, &[], &tcp(1024, 7, &[])));
    assert_eq!(pair.decides(&frame), Decider::Rule(rule(1)));
}

#[test]
fn a_walk_that_is_too_deep_is_refused() {
    let plan = chain(Attach::Xdp, TESTS_MAX + 1);
    let diagnostics = try_object(&plan).unwrap_err();
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
                count: None,
                writes: vec![write(3, u32::MAX, 1), write(3, 0, 2), write(3, 1, 5)],
                next: to(WalkRef::Exit(5)),
            },
            PlanExit::Then { count: None, writes: vec![], next: to(WalkRef::Node(0)) },
            PlanExit::End(FIRST + 3),
            PlanExit::Test { count: None, test: nth, yes: to(WalkRef::Exit(6)), no: to(WalkRef::Exit(7)) },
            PlanExit::Test { count: None, test: always, yes: to(WalkRef::Exit(8)), no: to(WalkRef::Exit(0)) },
            PlanExit::End(FIRST + 1),
            PlanExit::End(FIRST + 2),
            PlanExit::Test { count: None, test: never, yes: to(WalkRef::Exit(0)), no: to(WalkRef::Node(0)) },
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

/// Makes frames.
trait Frames {
    fn tcp(&mut self) -> Vec<u8>;
    fn frame(&mut self, family: Family) -> Vec<u8>;
    fn ipv6(&mut self, proto: u8, payload: Vec<u8>) -> Vec<u8>;
}

impl Frames for Dice {
    fn tcp(&mut self) -> Vec<u8> {
        let mut options = Vec::new();
        for _ in 0..self.below(4) {
            match self.below(4) {
                0 => options.push(1),
                1 => options.extend([2, 4, 5, 0xb4]),
                2 => options.extend([8, 10, 0, 0, 0, 1, 0, 0, 0, 2]),
                _ => options.extend([self.number() as u8, self.below(6) as u8, 0, 0]),
            }
        }
        options.resize(options.len().next_multiple_of(4), 0);
        let mut header = tcp(self.pick(&[22, 80, 1024]), self.pick(&[22, 80, 443]), &options);
        if self.one_in(8) {
            header[12] = self.number() as u8;
        }
        header
    }

    fn frame(&mut self, family: Family) -> Vec<u8> {
        let mut payload = if self.one_in(3) {
            let len = self.below(40);
            self.bytes(len)
        } else {
            self.tcp()
        };
        if self.one_in(4) {
            payload.truncate(self.below(24));
        }
        let proto = self.pick(&[6, 6, 17, 1, 58]);
        let mut packet = match family {
            Family::V4 => {
                let options = self.below(3) * 4;
                let options = self.bytes(options);
                let frag = self.pick(&[0, 0, 0, 0x4000, 0x2000, 0x2001, 5, 100]);
                ipv4(proto, frag, &options, &payload)
            }
            Family::V6 => self.ipv6(proto, payload),
        };
        if self.one_in(6) {
            let at = self.below(packet.len().min(48));
            packet[at] = self.number() as u8;
        }
        if self.one_in(8) {
            packet.truncate(self.below(packet.len()));
        }
        if self.one_in(4) {
            let padding = self.below(20);
            packet.extend(self.bytes(padding));
        }
        let kind = match self.below(12) {
            0 => 0x0806,
            1 => 0x0800,
            2 => 0x86dd,
            _ => family.ether_type(),
        };
        let mut frame = ethernet(kind, &packet);
        while self.one_in(5) {
            let tci = self.pick(&[0u16, 0, 0xe000, 5]);
            let tag = self.pick(&[0x8100u16, 0x88a8]);
            let kind = [frame[12], frame[13]];
            let mut tagged = frame[..12].to_vec();
            tagged.extend(tag.to_be_bytes());
            tagged.extend(tci.to_be_bytes());
            tagged.extend(kind);
            tagged.extend(&frame[14..]);
            frame = tagged;
        }
        if self.one_in(6) {
            frame[..6].copy_from_slice(&self.pick(&[[255; 6], [1, 0, 0x5e, 0, 0, 1]]));
        }
        if self.one_in(15) {
            frame.truncate(self.below(frame.len()));
        }
        frame
    }

    fn ipv6(&mut self, proto: u8, payload: Vec<u8>) -> Vec<u8> {
        let (mut next, mut packet) = (proto, payload);
        for _ in 0..self.below(4) {
            let kind = self.pick(&[0, 43, 44, 44, 51, 60, 50, 59]);
            let mut header = match kind {
                44 => {
                    let bits: u16 = self.pick(&[0, 1, 8, 0x321, 6]);
                    [vec![0, self.number() as u8], bits.to_be_bytes().to_vec(), vec![0, 0, 0, 9]].concat()
                }
                51 => [vec![0, 2], self.bytes(14)].concat(),
                _ => {
                    let units = self.below(3);
                    [vec![0, units as u8], self.bytes(6 + 8 * units)].concat()
                }
            };
            header[0] = next;
            header.extend(packet);
            packet = header;
            next = kind;
        }
        let mut all = vec![0x6a, 0xb0, 0, 0];
        let len = if self.one_in(20) { 0 } else { packet.len() as u16 };
        all.extend(len.to_be_bytes());
        all.extend([next, 64]);
        all.extend(self.bytes(32));
        all.extend(packet);
        all
    }
}

/// Every field of random frames, damaged and cut ones too, is what `View` says.
#[test]
fn keys_are_what_views_say() {
    for (family, attach) in [
        (Family::V4, Attach::Xdp),
        (Family::V6, Attach::Xdp),
        (Family::V4, Attach::TcIngress),
        (Family::V6, Attach::TcEgress),
    ] {
        let mut fields = vec![
            Field::SrcAddr,
            Field::DstAddr,
            Field::SrcMac,
            Field::DstMac,
            Field::Fragment,
            Field::Proto,
            Field::FragOffset,
            Field::ExtHeaders,
            Field::ExtHeaderMask,
            Field::Length,
            Field::Tos,
            Field::Ttl,
            Field::L4Len,
            Field::SrcPort,
            Field::DstPort,
            Field::TcpFlags,
            Field::TcpDataOffset,
            Field::IcmpType,
            Field::IcmpCode,
            Field::L4Bytes { offset: 4, len: 4 },
            Field::L4Bytes { offset: 5, len: 3 },
            Field::Mark,
        ];
        if attach == Attach::Xdp {
            fields.push(Field::PacketType);
        }
        let derived = [
            DerivedData::TcpOption { kind: 2 },
            DerivedData::TcpOption { kind: 8 },
            DerivedData::TcpOption { kind: 0 },
            DerivedData::U32(U32Program {
                tests: vec![
                    U32Test {
                        start: 6,
                        ops: vec![U32Op::And(0xff)],
                        ranges: vec![(0, 1), (6, 6), (17, 255)],
                    },
                    U32Test {
                        start: 0,
                        ops: vec![
                            U32Op::ShiftRight(22),
                            U32Op::And(0x3c),
                            U32Op::At(0),
                            U32Op::ShiftRight(16),
                        ],
                        ranges: vec![(80, 80), (1024, 0xffff)],
                    },
                ],
            }),
            DerivedData::U32(U32Program {
                tests: vec![U32Test {
                    start: 0,
                    ops: vec![U32Op::At(0), U32Op::ShiftLeft(32)],
                    ranges: vec![(0, u32::MAX)],
                }],
            }),
        ];
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let (mut reached, mut frames) = (0, Vec::new());
        while reached < 30 {
            let frame = dice.frame(family);
            frames.push(frame.clone());
            let mut all_fields = fields.clone();
            all_fields
                .extend((0..derived.len() as u32).map(|index| Field::Derived(Derived::from_u32(index))));
            let mut plan = plan(family, attach, &all_fields, all_fields.len() as u32 + 1);
            for data in &derived {
                plan.derived.push(data.clone());
            }
            let input = polc_ir::env::Input { frame: frame.clone(), ..Default::default() };
            let view = View::new(family, &plan.place, &input);
            // Rule `n` takes packets whose field `n` is something else; the last takes those that are right.
            let mut entries: Vec<_> = plan
                .key
                .iter()
                .map(|slot| {
                    let value = match (&view, slot.field) {
                        (Err(_), _) => 0,
                        (Ok(view), Field::Derived(index)) => derived::eval(&plan.derived[index], view).into(),
                        (Ok(view), field) => view.get(field),
                    };
                    let mut any = Vec::new();
                    for word in 0..slot.words {
                        let value = (value >> (32 * (slot.words - 1 - word))) as u32;
                        let word = slot.word + word;
                        any.extend(value.checked_sub(1).map(|below| vec![range(word, 0, below)]));
                        any.extend(value.checked_add(1).map(|above| vec![range(word, above, u32::MAX)]));
                    }
                    vec![LinearTest { any }]
                })
                .collect();
            entries.push(vec![]);
            let right = Decider::Rule(rule(all_fields.len() as u32));
            linear(&mut plan, entries);
            let expected = match view {
                Ok(_) => right,
                Err(ending) => ending.by,
            };
            let mut pair = Pair::new("keys", plan);
            let found = pair.decides(&frame);
            let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
            let field = match found {
                Decider::Rule(number) => all_fields.get(number.as_u32() as usize),
                _ => None,
            };
            assert_eq!(found, expected, "{family} at {attach}, field {field:?}: {hex}");
            reached += u32::from(expected == right);
            // The kernel and the VM agree on others too.
            if reached.is_multiple_of(10) {
                for frame in &frames {
                    pair.decides(frame);
                }
            }
        }
    }
}

fn device(ifindex: u32, name: &str) -> Device {
    Device { ifindex, name: DeviceName::new(name).unwrap() }
}

#[test]
fn devices_are_looked_up_by_number() {
    for attach in ATTACHES {
        let mut plan = plan(Family::V4, attach, &[Field::InDevice], 3);
        plan.devices.devices = vec![(device(1, "lo"), 2), (device(7, "eth0"), 1), (device(900, "eth1"), 3)];
        linear(&mut plan, vec![vec![all(&[eq(0, 2)])], vec![all(&[eq(0, 1)])], vec![]]);
        let mut pair = Pair::vm_only(plan.clone());
        let frame = ethernet(0x0800, &ipv4(6, 0, &[], &tcp(1, 2, &[])));
        let mut by = |ifindex| {
            let context = Context { ingress_ifindex: ifindex, ifindex, ..Context::default() };
            pair.run(&frame, &context).by
        };
        assert_eq!(by(1), Decider::Rule(rule(0)));
        assert_eq!(by(7), Decider::Rule(rule(1)));
        assert_eq!(by(900), Decider::Rule(rule(2)));
        for unknown in [2, 901, 1023, 1024, 70_000, u32::MAX] {
            assert_eq!(by(unknown), Decider::Frame(FrameKind::UnknownDevice), "{unknown}");
        }
        assert_eq!(by(0), Decider::Rule(rule(1)), "no device is like one that no rule names");
        // In the kernel, packets are on the loopback device, which is number 1 in every namespace.
        let mut pair = Pair::new("devices", plan.clone());
        assert_eq!(pair.decides(&frame), Decider::Rule(rule(0)));
        plan.devices.fixed_in = Some(3);
        let mut pair = Pair::new("a fixed device", plan.clone());
        assert_eq!(pair.decides(&frame), Decider::Rule(rule(2)));
        plan.devices.fixed_in = None;
        plan.devices.devices.push((device(DEVICE_NUMBER_MAX, "far"), 1));
        try_object(&plan).expect("its number is the largest");
        plan.devices.devices.push((device(DEVICE_NUMBER_MAX + 1, "farther"), 1));
        let diagnostics = try_object(&plan).unwrap_err();
        assert_eq!(diagnostics[0].code, polc_backend_ebpf::emit::DEVICE_NUMBER);
    }
}

/// In replace mode the mark that rules leave becomes the packet's, by code and by table; in accelerate mode the
/// kernel's rules write it.
#[test]
fn marks_are_written_back_in_replace_mode() {
    for (mode, by_table) in [(Mode::Replace, false), (Mode::Replace, true), (Mode::Accelerate, false)] {
        let mut plan = plan(Family::V4, Attach::TcIngress, &[Field::Proto, Field::Mark], 2);
        plan.place.mode = mode;
        let writes = vec![WordWrite { word: 1, clear: 0xff, xor: 0x35 }];
        if by_table {
            plan.walk.exits = vec![
                PlanExit::End(FIRST + 1),
                PlanExit::Then { count: None, writes, next: PlanTarget::Walk(WalkRef::Exit(0)) },
            ];
            plan.root = PlanTarget::Walk(WalkRef::Exit(1));
        } else {
            linear(&mut plan, vec![vec![all(&[eq(1, 0x1235)])], vec![]]);
            let PlanTarget::Step(next) = plan.root else { unreachable!("linear makes a step") };
            if let StepData::Linear(step) = &mut plan.steps[next] {
                step.entries[0].exit = PlanExit::End(FIRST + 1);
            }
            let entry = LinearEntry {
                tests: vec![],
                exit: PlanExit::Then { count: None, writes, next: plan.root },
                rule: Some(rule(0)),
            };
            let step = plan
                .steps
                .push(StepData::Linear(LinearStep { stage: Stage::from_u32(1), entries: vec![entry] }));
            plan.root = PlanTarget::Step(step);
        }
        let mut pair = Pair::new("marks", plan);
        let frame = ethernet(0x0800, &ipv4(6, 0, &[], &tcp(1, 2, &[])));
        let context = Context { mark: 0x12ff, ..Context::default() };
        assert_eq!(pair.run(&frame, &context).by, Decider::Rule(rule(1)));
        assert_eq!(pair.mark, if mode == Mode::Replace { 0x1235 } else { 0x12ff });
    }
}

#[test]
fn a_tag_that_the_kernel_took_out() {
    let mut plan = plan(Family::V4, Attach::TcIngress, &[Field::Proto], 1);
    linear(&mut plan, vec![vec![]]);
    let mut pair = Pair::vm_only(plan);
    let frame = ethernet(0x0800, &ipv4(6, 0, &[], &tcp(1, 2, &[])));
    for (tag, by) in [
        (None, Decider::Rule(rule(0))),
        (Some(0xe000), Decider::Rule(rule(0))),
        (Some(0xe001), Decider::Frame(FrameKind::Vlan)),
    ] {
        let context = Context { vlan_tci: tag, vlan_protocol: 0x8100, ..Context::default() };
        assert_eq!(pair.run(&frame, &context).by, by);
    }
}

/// At tc the headers may lie outside the part of the packet that can be read directly.
#[test]
fn headers_are_pulled_in() {
    let mut plan = plan(Family::V4, Attach::TcIngress, &[Field::DstPort], 2);
    linear(&mut plan, vec![vec![all(&[eq(0, 80)])], vec![]]);
    let mut pair = Pair::vm_only(plan);
    let frame = ethernet(0x0800, &ipv4(6, 0, &[], &[tcp(1, 80, &[]), vec![0; 400]].concat()));
    for linear in [0, 13, 14, 20, 34, 37, 38, 60, frame.len()] {
        assert_eq!(pair.run_partly(&frame, linear).by, Decider::Rule(rule(0)), "{linear} bytes at hand");
    }
}

/// A plan with every part: devices, code, a table with writes and both tests.
fn with_everything(attach: Attach) -> Plan {
    let mut plan = chain(attach, 20);
    plan.key.push(KeySlot { field: Field::InDevice, word: 3, words: 1, flag: None });
    plan.devices.devices = vec![(device(1, "lo"), 1)];
    let random = plan.effect_tests.push(EffectTestKind::Random { probability: 1 << 30 });
    let nth = plan.effect_tests.push(EffectTestKind::Nth { every: 3, initial: 1 });
    let walk = plan.root;
    for test in [random, nth] {
        let exit = PlanExit::Test { count: None, test, yes: walk, no: walk };
        let tested =
            LinearEntry { tests: vec![all(&[range(2, 5, 80), eq(1, 6)])], exit, rule: Some(rule(0)) };
        let other = LinearEntry {
            tests: vec![],
            exit: PlanExit::Then {
                count: None,
                writes: vec![WordWrite { word: 2, clear: 1, xor: 0 }],
                next: plan.root,
            },
            rule: Some(rule(1)),
        };
        let step = plan
            .steps
            .push(StepData::Linear(LinearStep { stage: Stage::from_u32(0), entries: vec![tested, other] }));
        plan.root = PlanTarget::Step(step);
    }
    plan
}

#[test]
fn every_loader_takes_an_emitted_object() {
    const NAME: &str = "every_loader_takes_an_emitted_object";
    if !may_run(NAME) || !has_tools(NAME, &["bpftool", "ip", "tc", "mount", "nsenter"]) {
        return;
    }
    let (dir, fs, ns) = (TempDir::new("emit"), BpfFs::new("emit-fs"), VethPair::new("emit"));
    let xdp = object(&with_everything(Attach::Xdp)).write().expect("writes");
    let tc_bytes = object(&with_everything(Attach::TcIngress)).write().expect("writes");
    let (xdp, tc_file) = (dir.file("xdp.o", &xdp), dir.file("tc.o", &tc_bytes));
    for (file, pin) in [(&xdp, "one"), (&tc_file, "two")] {
        let pin = fs.join(pin);
        run("bpftool", &["prog", "load", file, &pin]).expect("it runs");
        let dump = run("bpftool", &["prog", "dump", "xlated", "pinned", &pin, "linum"]).expect("it runs");
        assert!(dump.contains("; -A INPUT rule rule1 [file:rules.v4 line_num:4"), "{dump}");
    }
    ns.run("ip", &["link", "set", "dev", "in0", "xdp", "obj", &xdp, "sec", "xdp"]);
    ns.run("tc", &["qdisc", "add", "dev", "in0", "clsact"]);
    ns.run(
        "tc",
        &["filter", "add", "dev", "in0", "ingress", "bpf", "da", "obj", &tc_file, "sec", "classifier"],
    );
    assert!(ns.run("ip", &["link", "show", "dev", "in0"]).contains("prog/xdp"));
    assert!(ns.run("tc", &["filter", "show", "dev", "in0", "ingress"]).contains("direct-action"));
    let mut pair = Pair::new(NAME, with_everything(Attach::Xdp));
    // Random tests differ between VM and kernel; packets that reach none do not.
    let frame = ethernet(0x0800, &ipv4(17, 0, &[], &tcp(1, 6, &[])));
    pair.decides(&frame);
}

/// The largest walk allowed, behind all that costs the verifier most, is still accepted.
#[test]
fn the_largest_walk_loads_with_everything() {
    for attach in ATTACHES {
        let mut fields = vec![
            Field::SrcAddr,
            Field::DstAddr,
            Field::ExtHeaderMask,
            Field::Proto,
            Field::Fragment,
            Field::L4Len,
            Field::TcpFlags,
            Field::InDevice,
        ];
        fields.extend((0..70).map(|index| Field::Derived(Derived::from_u32(index))));
        let mut plan = plan(Family::V6, attach, &fields, 3);
        for kind in 0..4 {
            plan.derived.push(DerivedData::TcpOption { kind });
        }
        plan.devices.devices = vec![(device(1, "lo"), 1)];
        let random = plan.effect_tests.push(EffectTestKind::Random { probability: 1 });
        let nth = plan.effect_tests.push(EffectTestKind::Nth { every: 3, initial: 1 });
        let deep = chain(attach, 4_975).walk;
        plan.walk = deep;
        let root = WalkRef::Node(plan.walk.nodes.len() as u32 - 1);
        for test in [random, nth] {
            let to = PlanTarget::Walk(WalkRef::Exit(0));
            plan.walk.exits.push(PlanExit::Test { count: None, test, yes: to, no: to });
        }
        plan.root = PlanTarget::Walk(root);
        let mut pair = Pair::new("the largest walk", plan);
        if let Some(verified) = pair.verified() {
            eprintln!("{attach}: {verified} instructions processed");
        }
        assert_eq!(pair.decides(&ethernet(0x0806, &[0; 60])), Decider::Frame(FrameKind::NotIp));
    }
}
