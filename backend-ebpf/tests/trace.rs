//! Reports of packets: the same records from the check VM and the kernel, filters that let through what they say, and a
//! count of everything that was not reported.

use std::net::IpAddr;

use aya::maps::{Array, PerCpuArray, RingBuf};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use polc_backend_ebpf::budget::Budget;
use polc_backend_ebpf::object::{Object, ProgramKind};
use polc_backend_ebpf::trace::{
    CONFIG_MAP, Config, EVENTS_BYTES, EVENTS_MAP, Event, EventTransport, Pattern, STATE_MAP, Tally,
    WANTED_MAP, config, record, state,
};
use polc_backend_ebpf::vm::{Context, Input, Vm};
use polc_ir::env::Attach;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::plan::{Plan, PlanExit, Target, WordWrite};
use polc_tests::kernel::may_run;
use polc_tests::programs::plans::{FIRST, all, eq, linear, load, plan, range, traced};

/// Slots of the test plans, padded as the map of wanted slots is.
const SLOTS: usize = 16;

/// A program that reports, in the check VM and, as root, in the kernel.
struct Traced {
    vm: Vm,
    kernel: Option<aya::Ebpf>,
    kind: ProgramKind,
}

impl Traced {
    fn new(name: &str, plan: &Plan) -> Traced {
        let object = traced(plan);
        Budget::of(&object.programs[0].code).unwrap().enforce().unwrap();
        let kernel = may_run(&format!("{name} in the kernel")).then(|| load(&object));
        let mut made = Traced { vm: Vm::new(&object).unwrap(), kernel, kind: object.programs[0].kind };
        made.want(|_| true);
        made
    }

    fn configure(&mut self, config: &Config) {
        self.set::<{ config::BYTES }>(CONFIG_MAP, config.encode());
    }

    fn want(&mut self, wanted: impl Fn(usize) -> bool) {
        self.set::<SLOTS>(WANTED_MAP, (0..SLOTS).map(|slot| u8::from(wanted(slot))).collect());
    }

    fn set<const BYTES: usize>(&mut self, map: &str, value: Vec<u8>) {
        let in_vm = self.vm.map(map).unwrap();
        assert!(self.vm.set_value(in_vm, &0u32.to_ne_bytes(), &value));
        if let Some(kernel) = &mut self.kernel {
            let map = kernel.map_mut(&format!(".data.{map}")).unwrap();
            let value: [u8; BYTES] = value.try_into().unwrap();
            Array::<_, [u8; BYTES]>::try_from(map).unwrap().set(0, value, 0).unwrap();
        }
    }

    /// The frame's reports, on which VM and kernel agree; their times are 0.
    fn run(&mut self, frame: &[u8], context: &Context) -> Vec<Event> {
        self.vm.run(0, &Input { packet: frame, context: context.clone(), ..Input::default() }).unwrap();
        let events = self.vm.map(EVENTS_MAP).unwrap();
        let records = self.vm.take_records(events);
        if self.kernel.is_some() {
            self.run_in_kernel(frame, context);
            let mut ring =
                RingBuf::try_from(self.kernel.as_mut().unwrap().map_mut(EVENTS_MAP).unwrap()).unwrap();
            let mut in_kernel = Vec::new();
            while let Some(item) = ring.next() {
                in_kernel.push(item.to_vec());
            }
            let timeless =
                |records: &[Vec<u8>]| records.iter().map(|one| one[8..].to_vec()).collect::<Vec<_>>();
            assert_eq!(timeless(&in_kernel), timeless(&records), "kernel (left) and VM on {frame:02x?}");
            assert!(in_kernel.iter().all(|record| Event::decode(record).unwrap().time_ns > 0));
        }
        records.iter().map(|record| Event { time_ns: 0, ..Event::decode(record).unwrap() }).collect()
    }

    fn run_in_kernel(&mut self, frame: &[u8], context: &Context) {
        let mut given = vec![0; if self.kind == ProgramKind::Xdp { 24 } else { 192 }];
        let mut put = |at: usize, value: u32| given[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        match self.kind {
            ProgramKind::Xdp => {
                put(4, frame.len() as u32);
                put(12, context.ingress_ifindex);
            }
            ProgramKind::Classifier => {
                put(8, context.mark);
                put(40, context.ifindex);
            }
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        }
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.ctx_in = Some(&given);
        let program = self.kernel.as_mut().unwrap().program_mut("main").unwrap();
        match self.kind {
            ProgramKind::Xdp => <&mut Xdp>::try_from(program).unwrap().test_run(options),
            ProgramKind::Classifier => <&mut SchedClassifier>::try_from(program).unwrap().test_run(options),
            ProgramKind::Netfilter => unreachable!("aya loads no netfilter programs"),
        }
        .expect("a test run");
    }

    /// What was counted in the VM.
    fn tally(&self) -> Tally {
        let map = self.vm.map(STATE_MAP).unwrap();
        Tally::decode(&self.vm.values(map)[..state::BYTES]).unwrap()
    }

    /// What was counted in the kernel, on all CPUs.
    fn kernel_tally(&self) -> Option<Tally> {
        let map = self.kernel.as_ref()?.map(STATE_MAP).unwrap();
        let map = PerCpuArray::<_, [u8; state::BYTES]>::try_from(map).unwrap();
        let values = map.get(&0, 0).unwrap();
        Some(values.iter().map(|value| Tally::decode(value).unwrap()).fold(Tally::default(), |a, b| a + b))
    }
}

/// Rule 0 takes TCP to port 22, rule 1 UDP, rule 2 the rest.
fn three_rules(family: Family, attach: Attach) -> Plan {
    let mut plan = plan(family, attach, &[Field::Proto, Field::DstPort], 3);
    linear(&mut plan, vec![vec![all(&[eq(0, 6), eq(1, 22)])], vec![all(&[eq(0, 17)])], vec![]]);
    plan
}

fn on(patterns: &[Pattern]) -> Config {
    Config { on: true, patterns: patterns.to_vec(), rate: 0, burst: 1 }
}

fn frame(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(proto: u8, frag: u16, options: usize, payload: &[u8]) -> Vec<u8> {
    let header = 20 + options;
    let mut packet = vec![0x40 | (header / 4) as u8, 0];
    packet.extend((header as u16 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 7]);
    packet.extend(frag.to_be_bytes());
    packet.extend([63, proto, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2]);
    packet.extend(vec![1; options]);
    packet.extend(payload);
    packet
}

fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    packet.extend(payload);
    packet
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    let mut header = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    header.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
    header
}

fn device() -> Context {
    Context { ingress_ifindex: 1, ifindex: 1, ..Context::default() }
}

fn transport(event: &Event) -> (u8, EventTransport) {
    let ip = event.ip.expect("an IP packet");
    (ip.proto, ip.transport)
}

const ATTACHES: [Attach; 3] = [Attach::Xdp, Attach::TcIngress, Attach::TcEgress];

#[test]
fn off_reports_nothing() {
    for attach in ATTACHES {
        let mut traced = Traced::new("off", &three_rules(Family::V4, attach));
        let syn = frame(0x0800, &ipv4(6, 0, 0, &ports(1024, 22)));
        assert_eq!(traced.run(&syn, &device()), []);
        traced.configure(&on(&[Pattern::default()]));
        assert_eq!(traced.run(&syn, &device()).len(), 1);
        traced.want(|slot| slot != FIRST as usize);
        assert_eq!(traced.run(&syn, &device()), []);
        traced.want(|_| true);
        traced.configure(&Config::OFF);
        assert_eq!(traced.run(&syn, &device()), []);
        assert_eq!(traced.tally(), Tally { reported: 1, limited: 0, full: 0 });
        assert!(traced.kernel_tally().is_none_or(|tally| tally == traced.tally()));
    }
}

#[test]
fn ipv4_records() {
    for attach in ATTACHES {
        let mut traced = Traced::new("IPv4 records", &three_rules(Family::V4, attach));
        traced.configure(&on(&[Pattern::default()]));
        let mut one = |frame: &[u8]| {
            let events = traced.run(frame, &device());
            assert_eq!(events.len(), 1, "{frame:02x?}");
            events[0]
        };
        let event = one(&frame(0x0800, &ipv4(6, 0, 8, &ports(1024, 22))));
        let ip = event.ip.unwrap();
        assert_eq!((event.slot, event.ifindex, event.length), (FIRST, 1, 48));
        assert_eq!((ip.src, ip.dst), ([192, 0, 2, 1].into(), [198, 51, 100, 2].into()));
        assert_eq!(transport(&event), (6, EventTransport::Ports(1024, 22)));
        let event = one(&frame(0x0800, &ipv4(17, 0, 0, &ports(53, 5353))));
        assert_eq!((event.slot, transport(&event)), (FIRST + 1, (17, EventTransport::Ports(53, 5353))));
        let event = one(&frame(0x0800, &ipv4(1, 0, 0, &[8, 3, 0, 0, 0, 0, 0, 0])));
        assert_eq!((event.slot, transport(&event)), (FIRST + 2, (1, EventTransport::Icmp(8, 3))));
        // Fragments, other protocols, and transport headers that are cut short.
        let event = one(&frame(0x0800, &ipv4(6, 3, 0, &ports(1024, 22))));
        assert_eq!(transport(&event), (6, EventTransport::LaterFragment));
        let event = one(&frame(0x0800, &ipv4(6, 0x2000, 0, &ports(1024, 22))));
        assert_eq!(transport(&event), (6, EventTransport::Ports(1024, 22)));
        let event = one(&frame(0x0800, &ipv4(47, 0, 0, &[1, 2, 3, 4])));
        assert_eq!(transport(&event), (47, EventTransport::None));
        let event = one(&frame(0x0800, &ipv4(17, 0, 0, &[1, 2, 3])));
        assert_eq!(transport(&event), (17, EventTransport::None));
        // Frames that are not this family's.
        let event = one(&frame(0x0806, &[0; 40]));
        assert_eq!((event.ether_type, event.ip), (0x0806, None));
        let event = one(&frame(0x86dd, &ipv6(17, &ports(1, 2))));
        assert_eq!(transport(&event), (17, EventTransport::Ports(1, 2)));
        let mut tagged = vec![0, 0, 0x08, 0];
        tagged.extend(ipv4(6, 0, 0, &ports(7, 8)));
        let event = one(&frame(0x8100, &tagged));
        assert_eq!((event.ether_type, transport(&event)), (0x0800, (6, EventTransport::Ports(7, 8))));
    }
}

#[test]
fn ipv6_records() {
    for attach in ATTACHES {
        let mut traced = Traced::new("IPv6 records", &three_rules(Family::V6, attach));
        traced.configure(&on(&[Pattern::default()]));
        let mut one = |next: u8, headers: &[&[u8]]| {
            let events = traced.run(&frame(0x86dd, &ipv6(next, &headers.concat())), &device());
            assert_eq!(events.len(), 1, "{next} {headers:02x?}");
            let ip = events[0].ip.unwrap();
            assert_eq!(ip.src, "2001:db8::1".parse::<IpAddr>().unwrap());
            assert_eq!(ip.dst, "2001:db8::2".parse::<IpAddr>().unwrap());
            transport(&events[0])
        };
        let tcp = ports(1024, 22);
        let syn = (6, EventTransport::Ports(1024, 22));
        assert_eq!(one(6, &[&tcp]), syn);
        assert_eq!(one(58, &[&[128, 0, 0, 0]]), (58, EventTransport::Icmp(128, 0)));
        let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(one(0, &[&options(60), &options(6), &tcp]), syn);
        let auth = [6, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2];
        assert_eq!(one(51, &[&auth, &tcp]), syn);
        assert_eq!(one(44, &[&[6, 0, 0, 1, 0, 0, 0, 9], &tcp]), syn);
        assert_eq!(one(44, &[&[6, 0, 0, 9, 0, 0, 0, 9], &tcp]), (6, EventTransport::LaterFragment));
        // Eight extension headers are followed, not nine.
        let chain = |count: usize| {
            let mut headers: Vec<[u8; 8]> = vec![options(60); count - 1];
            headers.push(options(6));
            [headers.concat(), tcp.clone()].concat()
        };
        assert_eq!(one(60, &[&chain(7)]), syn);
        assert_eq!(one(60, &[&chain(8)]), syn);
        assert_eq!(one(60, &[&chain(9)]), (60, EventTransport::None));
        // The chain ends in the middle of a header.
        assert_eq!(one(60, &[&options(60), &[6]]), (60, EventTransport::None));
    }
}

#[test]
fn marks_are_those_after_the_rules() {
    let mut plan = plan(Family::V4, Attach::TcIngress, &[Field::Mark], 3);
    plan.place.mode = polc_ir::env::Mode::Replace;
    linear(&mut plan, vec![vec![]]);
    let step = plan.steps.keys().next().unwrap();
    let first = plan.steps.push(plan.steps[step].clone());
    plan.steps[first].linear_mut().expect("it compares").entries[0].exit = PlanExit::Then {
        count: None,
        writes: vec![WordWrite { word: 0, clear: 0xff, xor: 0x21 }],
        next: Target::Step(step),
    };
    plan.root = Target::Step(first);
    let mut traced = Traced::new("marks", &plan);
    traced.configure(&on(&[Pattern::default()]));
    let context = Context { mark: 0x1234, ..device() };
    let events = traced.run(&frame(0x0800, &ipv4(6, 0, 0, &ports(1, 2))), &context);
    assert_eq!(events[0].mark, 0x1221);
}

/// Whether a pattern fits, as its documentation says.
fn fits(pattern: &Pattern, event: &Event) -> bool {
    let prefix = |wanted: Option<(IpAddr, u8)>, got: Option<IpAddr>| match (wanted, got) {
        (None, _) => true,
        (Some((IpAddr::V4(wanted), bits)), Some(IpAddr::V4(got))) => {
            (wanted.to_bits() ^ got.to_bits()).leading_zeros() >= u32::from(bits)
        }
        (Some((IpAddr::V6(wanted), bits)), Some(IpAddr::V6(got))) => {
            (wanted.to_bits() ^ got.to_bits()).leading_zeros() >= u32::from(bits)
        }
        _ => false,
    };
    let port = |wanted: &Option<std::ops::RangeInclusive<u16>>, got: Option<u16>| {
        wanted.as_ref().is_none_or(|wanted| got.is_some_and(|got| wanted.contains(&got)))
    };
    let both = match event.ip.map(|ip| ip.transport) {
        Some(EventTransport::Ports(source, destination)) => Some((source, destination)),
        _ => None,
    };
    pattern.proto.is_none_or(|proto| event.ip.is_some_and(|ip| ip.proto == proto))
        && prefix(pattern.src, event.ip.map(|ip| ip.src))
        && prefix(pattern.dst, event.ip.map(|ip| ip.dst))
        && port(&pattern.src_port, both.map(|ports| ports.0))
        && port(&pattern.dst_port, both.map(|ports| ports.1))
        && pattern.ifindex.is_none_or(|ifindex| ifindex == event.ifindex)
}

#[test]
fn filters_report_what_they_say() {
    let mut traced = Traced::new("filters", &three_rules(Family::V4, Attach::Xdp));
    let frames: Vec<Vec<u8>> = [
        frame(0x0806, &[0; 40]),
        frame(0x0800, &ipv4(6, 0, 0, &ports(0, 0))),
        frame(0x0800, &ipv4(6, 0, 0, &ports(1024, 22))),
        frame(0x0800, &ipv4(6, 0, 0, &ports(0xffff, 23))),
        frame(0x0800, &ipv4(17, 0, 0, &ports(1025, 22))),
        frame(0x0800, &ipv4(6, 9, 0, &ports(1024, 22))),
        frame(0x0800, &ipv4(1, 0, 0, &[8, 0, 0, 0, 0, 0, 0, 0])),
        frame(0x0800, &ipv4(47, 0, 0, &[0, 22, 0, 22])),
        frame(0x86dd, &ipv6(6, &ports(1024, 22))),
    ]
    .into();
    let prefixes = ["192.0.2.1/32", "192.0.2.0/24", "192.0.2.2/32", "0.0.0.0/0", "2001:db8::1/128", "::/0"];
    let prefixes: Vec<Option<(IpAddr, u8)>> = prefixes
        .iter()
        .map(|text| {
            let (address, bits) = text.split_once('/').unwrap();
            Some((address.parse().unwrap(), bits.parse().unwrap()))
        })
        .chain([None])
        .collect();
    let spans = [None, Some(22..=22), Some(1024..=65535), Some(0..=23), Some(0..=0), Some(65535..=65535)];
    let mut patterns = Vec::new();
    for proto in [None, Some(6), Some(17), Some(0)] {
        patterns.push(Pattern { proto, ..Pattern::default() });
        for prefix in &prefixes {
            patterns.push(Pattern { proto, src: *prefix, ..Pattern::default() });
            patterns.push(Pattern { proto, dst: *prefix, ..Pattern::default() });
        }
        for span in &spans {
            patterns.push(Pattern { proto, src_port: span.clone(), ..Pattern::default() });
            patterns.push(Pattern { proto, dst_port: span.clone(), src: prefixes[1], ..Pattern::default() });
        }
    }
    for ifindex in [0, 1, 2] {
        patterns.push(Pattern { ifindex: Some(ifindex), ..Pattern::default() });
    }
    traced.configure(&on(&[Pattern::default()]));
    let known: Vec<Event> = frames.iter().map(|frame| traced.run(frame, &device())[0]).collect();
    let mut reported = 0;
    // Groups of up to four, so that any of them suffices.
    for group in patterns.iter().map(std::slice::from_ref).chain(patterns.chunks(4)) {
        traced.configure(&on(group));
        for (frame, event) in frames.iter().zip(&known) {
            let expected = group.iter().any(|pattern| fits(pattern, event));
            let got = traced.run(frame, &device());
            assert_eq!(got.as_slice(), if expected { std::slice::from_ref(event) } else { &[] }, "{group:?}");
            reported += got.len();
        }
    }
    assert!(reported > 100 && reported < frames.len() * patterns.len());
    traced.configure(&on(&[]));
    assert!(frames.iter().all(|frame| traced.run(frame, &device()).is_empty()));
}

#[test]
fn too_many_are_counted_exactly() {
    let mut traced = Traced::new("limits", &three_rules(Family::V4, Attach::Xdp));
    let syn = frame(0x0800, &ipv4(6, 0, 0, &ports(1024, 22)));
    // Ten a second, three at once.
    traced.configure(&Config { on: true, patterns: vec![Pattern::default()], rate: 10, burst: 3 });
    let run = |traced: &mut Traced, ns: u64, times: usize| {
        traced.vm.set_time_ns(ns);
        let events = traced.vm.map(EVENTS_MAP).unwrap();
        for _ in 0..times {
            traced.vm.run(0, &Input { packet: &syn, context: device(), ..Input::default() }).unwrap();
        }
        traced.vm.take_records(events).len()
    };
    let second = 1_000_000_000;
    assert_eq!(run(&mut traced, 5 * second, 100), 3);
    assert_eq!(run(&mut traced, 5 * second + 99_999_999, 1), 0);
    assert_eq!(run(&mut traced, 5 * second + 100_000_000, 2), 1);
    assert_eq!(run(&mut traced, 60 * second, 5), 3);
    assert_eq!(traced.tally(), Tally { reported: 7, limited: 101, full: 0 });
    // Nobody reads: the ring fills up.
    traced.configure(&on(&[Pattern::default()]));
    let room = (EVENTS_BYTES as usize - 1) / (record::BYTES + 8);
    assert_eq!(run(&mut traced, 60 * second, room + 9), room);
    assert_eq!(traced.tally(), Tally { reported: 7 + room as u64, limited: 101, full: 9 });
    if traced.kernel.is_some() {
        for _ in 0..room + 9 {
            traced.run_in_kernel(&syn, &device());
        }
        let tally = traced.kernel_tally().unwrap();
        assert_eq!(tally, Tally { reported: room as u64, limited: 0, full: 9 });
        traced.configure(&Config { on: true, patterns: vec![Pattern::default()], rate: 1, burst: 2 });
        let before = std::time::Instant::now();
        for _ in 0..100 {
            traced.run_in_kernel(&syn, &device());
        }
        // The bucket holds two, for each CPU that the test ran on, and one more for each second that passed.
        let cpus = std::thread::available_parallelism().unwrap().get() as u64;
        let most = cpus * (3 + before.elapsed().as_secs());
        let after = traced.kernel_tally().unwrap();
        assert_eq!(after.reported + after.missed(), room as u64 + 109);
        // The ring is still full, so what the bucket paid for was counted as full.
        assert!(after.full - 9 <= most && after.limited >= 100 - most, "{after:?}");
    }
}

/// The largest key and the walk: the record lies over what they needed.
#[test]
fn the_largest_key_leaves_room() {
    let fields = [Field::SrcAddr, Field::Proto, Field::DstPort, Field::FragOffset];
    for attach in ATTACHES {
        let mut plan = plan(Family::V6, attach, &fields, 3);
        linear(&mut plan, vec![vec![all(&[eq(4, 6), range(5, 22, 80)])], vec![all(&[eq(4, 17)])], vec![]]);
        for (at, slot) in plan.key.iter_mut().enumerate().skip(1) {
            slot.word = polc_ir::limits::KEY_WORDS_MAX as u8 - 4 + at as u8;
        }
        let first = polc_ir::limits::KEY_WORDS_MAX as u8 - 3;
        for step in plan.steps.values_mut() {
            for test in step
                .linear_mut()
                .into_iter()
                .flat_map(|step| &mut step.entries)
                .flat_map(|entry| &mut entry.tests)
            {
                test.any.iter_mut().flatten().for_each(|test| test.word = first + test.word - 4);
            }
        }
        let mut traced = Traced::new("the largest key", &plan);
        traced.configure(&on(&[Pattern::default()]));
        let events = traced.run(&frame(0x86dd, &ipv6(6, &ports(9, 80))), &device());
        assert_eq!((events[0].slot, transport(&events[0])), (FIRST, (6, EventTransport::Ports(9, 80))));
    }
}

#[test]
fn objects_keep_what_they_say_about_reports() {
    let object = traced(&three_rules(Family::V4, Attach::Xdp));
    let read = Object::read(&object.write().unwrap()).unwrap();
    assert_eq!(read.manifest.trace, object.manifest.trace);
    assert!(read.manifest.trace.is_some());
}
