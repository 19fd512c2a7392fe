//! Policies are exchanged under a flood of packets, and every packet meets the old one or the new one.
//!
//! Frames come in by one end of a pair of devices as fast as a CPU sends them, while another thread swaps two policies:
//! by the kernel's call alone, with both loaded, and by whole applies. Each policy drops a port of its own, and both a
//! third. Behind them iptables counts what was let through. So a packet that met no policy would show in three
//! ways: of the third port it arrives, the policies count fewer packets than the device received, and iptables counts
//! others than the policies let through. Without root the tests say that they are skipped; `POLC_LONG` makes the
//! slow swaps as many as the others.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use polc::build::build;
use polc::place::place;
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size};
use polc_backend_ebpf::manifest::{CounterKind, Manifest};
use polc_backend_ebpf::object::Object;
use polc_ir::env::{Attach, Env, Mode};
use polc_ir::hook::{Family, Hook};
use polc_ir::source::SourceMap;
use polc_loader::coexist::Order;
use polc_loader::flush::flush;
use polc_loader::load::load;
use polc_loader::netfilter::counter_lines;
use polc_loader::state::SlotName;
use polc_loader::status;
use polc_loader::store::Store;
use polc_loader::swap::{Request, apply};
use polc_loader::sys::{LinkSpec, LiveFrames, Map, ProgramSpec, ProgramType, Sys};
use polc_loader::{carry, net};
use polc_tests::kernel::{BpfFs, Namespace, TempDir, has_tools, may_run, run, uninterrupted};

/// Swaps by the kernel's call, and the pause between two, in which packets are decided.
const SWAPS: usize = 10_000;
const PAUSE: Duration = Duration::from_micros(40);

/// As many where a swap waits until no CPU runs the old program: at XDP, whose dispatcher is rewritten
/// (kernel/bpf/dispatcher.c, `bpf_dispatcher_change_prog`), and when all of applying is done.
const SLOW_SWAPS: usize = 150;

/// Cycles of apply and flush: in all, and at each place but XDP, where attaching and detaching wait longest.
const CYCLES: usize = 1_000;
const CYCLES_EACH: usize = 238;

/// Ports: what the first policy drops, what the second does, what both do.
const PORTS: [u16; 3] = [1_001, 1_002, 1_003];

/// Frames sent by one call, and how many of them at a time: the receiving device's ring has room for 256.
const FRAMES: u32 = 30_000;
const BATCH: u32 = 64;

/// Where a frame has its destination port.
const PORT_AT: i16 = 14 + 20 + 2;

/// Generations whose counters may still grow after they were replaced: a packet is decided by one program to its end.
const SETTLING: usize = 8;

/// When the last packets have arrived.
const QUIET: Duration = Duration::from_millis(200);

/// `bpf_redirect` (include/uapi/linux/bpf.h).
const REDIRECT: Helper = Helper(23);
const XDP_PASS: i32 = 2;
const TC_OK: i32 = 0;

/// The end that receives, and its peer.
const DEVICE: &str = "in0";
const PEER: &str = "out0";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

const BEHIND: &str = "\
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p udp -m udp --dport 1001 -j DROP
-A INPUT -p udp -m udp --dport 1002 -j DROP
-A INPUT -p udp -m udp --dport 1003 -j DROP
COMMIT
";

/// A namespace with the devices, and where polc keeps things there.
struct Host {
    sys: Sys,
    store: Store,
    ifindex: u32,
    /// Sends frames by the peer.
    injector: OwnedFd,
    /// Lets frames that were redirected come in by the device, where no policy sits on its driver
    /// (drivers/net/veth.c, `veth_xdp_xmit`).
    receiver: OwnedFd,
    peer: u32,
    dirs: (BpfFs, TempDir),
    _namespace: Namespace,
}

impl Host {
    /// Moves the calling thread into the host; `None` if the test can't run.
    fn new(test: &str, name: &str, tools: &[&str]) -> Option<Host> {
        if !may_run(test) || !has_tools(test, &[&["ip", "mount"], tools].concat()) {
            return None;
        }
        let dirs = (BpfFs::new(&format!("{name}-fs")), TempDir::in_memory(name));
        let namespace = Namespace::enter(name);
        let ip = |line: &str| run("ip", &line.split(' ').collect::<Vec<_>>()).expect("root may");
        // No packets of the kernel's own.
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("root may");
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        ip(&format!("link add name {DEVICE} address {mac} type veth peer name {PEER}"));
        ip("link set lo up");
        ip(&format!("link set {DEVICE} up"));
        ip(&format!("link set {PEER} up"));
        ip(&format!("addr add 192.0.2.1/24 dev {DEVICE}"));
        let sys = Sys::new();
        let devices = net::devices(&sys).expect("a list");
        let number = |name| net::find(&devices, name).expect("it was made").ifindex;
        let (ifindex, peer) = (number(DEVICE), number(PEER));
        let store = Store::new(&PathBuf::from(dirs.0.join("")), dirs.1.path()).expect("a namespace");
        let injector = program(&sys, ProgramType::XDP, |a| inject(a, peer));
        let receiver = program(&sys, ProgramType::XDP, |a| a.mov64(Reg::R0, XDP_PASS));
        let host = Host { sys, store, ifindex, injector, receiver, peer, dirs, _namespace: namespace };
        Some(host)
    }

    /// Packets that the device received.
    fn received(&self) -> u64 {
        let shown = run("ip", &["-s", "-j", "link", "show", "dev", DEVICE]).expect("it is there");
        let rx = shown.split("\"rx\":").nth(1).and_then(|rest| rest.split("\"packets\":").nth(1));
        let number = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>();
        rx.map(number).and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("no count in {shown}"))
    }

    /// Packets of each port that came to the rules behind.
    fn arrived(&self) -> [u64; 3] {
        let saved = run("iptables-legacy-save", &["-c"]).expect("root may");
        let lines = counter_lines(&saved);
        [1, 2, 3].map(|rule| {
            let line = lines.iter().find(|line| line.chain == "INPUT" && line.number == rule);
            line.unwrap_or_else(|| panic!("no rule {rule} in {saved}")).packets
        })
    }

    /// Lets `swaps` run while frames come in, and holds what was counted against what it returns: what each policy
    /// let through and dropped.
    fn flood(&self, what: &str, swaps: impl FnOnce() -> ([Decided; 2], Times)) {
        run("iptables-legacy-restore", &[&self.behind()]).expect("root may");
        let before = self.received();
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let began = Instant::now();
        let ([old, new], times, took) = thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let live =
                        LiveFrames { ifindex: self.peer, template: &frame(), count: FRAMES, batch: BATCH };
                    uninterrupted(|| self.sys.run_live_frames(&self.injector, &live)).expect("sent");
                    sent.fetch_add(FRAMES.into(), Ordering::Relaxed);
                }
            });
            let (decided, times) = swaps();
            let took = began.elapsed();
            stop.store(true, Ordering::Relaxed);
            (decided, times, took)
        });
        thread::sleep(QUIET);
        let decided = [old, new].map(|decided| decided.read(&self.sys));
        let (received, arrived) = (self.received() - before, self.arrived());
        let sent = sent.load(Ordering::Relaxed);
        let sum: u64 = decided.iter().map(|(passed, dropped)| passed + dropped).sum();
        eprintln!(
            "{what}: {} swaps in {:.2} s, each {:.1} us and at most {:.1} us; {sent} packets sent, {received} received, \
             {} decided by one policy, {} by the other, {} by neither; {} and {} let through",
            times.count,
            took.as_secs_f64(),
            times.sum.as_secs_f64() * 1e6 / times.count as f64,
            times.most.as_secs_f64() * 1e6,
            decided[0].0 + decided[0].1,
            decided[1].0 + decided[1].1,
            received.abs_diff(sum),
            decided[0].0,
            decided[1].0,
        );
        assert!(decided.iter().all(|(passed, dropped)| *passed > 0 && *dropped > 0), "{what}: both decide");
        assert_eq!(sum, received, "{what}: every packet is decided once");
        assert_eq!(arrived, [decided[1].0, decided[0].0, 0], "{what}: what arrives was let through");
    }

    fn behind(&self) -> String {
        self.dirs.1.file("behind", BEHIND.as_bytes())
    }

    fn apply(&self, slot: &SlotName, object: &Object, clsact: bool) {
        let request = Request {
            slot,
            object,
            source: "rules",
            files: &[],
            contents: &[],
            checks: &[],
            generic: false,
            clsact,
            order: Order::Alone,
            hook_order: Default::default(),
            over: &[],
            alone: false,
            confirm: None,
            initial: &[],
        };
        let applied = apply(&self.sys, &self.store, &request, &mut |_| Ok(())).expect("applied");
        assert!(applied.untidy.is_none(), "{:?}", applied.untidy);
    }
}

/// How long swaps took.
#[derive(Default)]
struct Times {
    count: usize,
    sum: Duration,
    most: Duration,
}

impl Times {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.sum += took;
        self.most = self.most.max(took);
    }
}

/// Where what a policy decided is counted: read by now, and still to be read.
#[derive(Default)]
struct Decided {
    read: (u64, u64),
    open: VecDeque<(Manifest, Map)>,
}

impl Decided {
    fn add(&mut self, sys: &Sys, manifest: &Manifest, counters: Option<&Map>) {
        let map = counters.expect("every program counts");
        let map = sys.map_by_id(map.info().id).expect("it is there");
        self.open.push_back((manifest.clone(), map));
        if self.open.len() > SETTLING {
            self.settle(sys);
        }
    }

    fn settle(&mut self, sys: &Sys) {
        let Some((manifest, map)) = self.open.pop_front() else { return };
        let slots = carry::slots(sys, &map).expect("readable");
        for (slot, (packets, _)) in manifest.counters.iter().zip(slots) {
            // Frames that no rule sees are the kernel's own.
            if matches!(slot.kind, CounterKind::Rule | CounterKind::Policy) {
                match slot.verdict.as_deref() {
                    Some("drop") => self.read.1 += packets,
                    _ => self.read.0 += packets,
                }
            }
        }
    }

    /// Packets let through and dropped.
    fn read(mut self, sys: &Sys) -> (u64, u64) {
        while !self.open.is_empty() {
            self.settle(sys);
        }
        self.read
    }
}

/// A small program.
fn program(sys: &Sys, kind: ProgramType, body: impl FnOnce(&mut Asm)) -> OwnedFd {
    let mut a = Asm::new();
    body(&mut a);
    a.exit();
    let code = a.finish().expect("assembles");
    let spec =
        ProgramSpec { kind, attach_type: 0, name: "test", license: "GPL", slots: &code.slots, btf: None };
    sys.prog_load(&spec, &mut []).expect("accepted")
}

/// Sends a frame by a device, to one of the ports.
fn inject(a: &mut Asm, device: u32) {
    let short = a.label();
    a.mov64(Reg::R6, Reg::R1);
    a.call(Helper::GET_PRANDOM_U32);
    a.alu64(AluOp::Mod, Reg::R0, PORTS.len() as i32);
    a.alu32(AluOp::Add, Reg::R0, i32::from(PORTS[0]));
    a.be(16, Reg::R0);
    a.load_ctx_pointer(Reg::R1, Reg::R6, 0);
    a.load_ctx_pointer(Reg::R2, Reg::R6, 4);
    a.mov64(Reg::R3, Reg::R1);
    a.alu64(AluOp::Add, Reg::R3, i32::from(PORT_AT) + 2);
    a.jump64(Cond::Gt, Reg::R3, Reg::R2, short);
    a.store(Size::H, Reg::R1, PORT_AT, Reg::R0);
    a.bind(short);
    a.mov64(Reg::R1, device as i32);
    a.mov64(Reg::R2, 0);
    a.call(REDIRECT);
}

/// UDP to the host.
fn frame() -> Vec<u8> {
    let mut frame = MAC.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    let mut header = [0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1];
    let words = header.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let check = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&check.to_be_bytes());
    frame.extend(header);
    frame.extend([4, 0, 0, 0, 0, 26, 0, 0]);
    frame.resize(60, 0);
    frame
}

/// The two policies at an attach point.
fn policies(attach: Attach) -> [Object; 2] {
    [PORTS[0], PORTS[1]].map(|own| {
        let rules = format!(
            "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport {own} -j DROP\n\
             -A INPUT -p udp -m udp --dport {} -j DROP\nCOMMIT\n",
            PORTS[2]
        );
        let mut sources = SourceMap::new();
        let file = sources.add("rules.v4", rules);
        let session = Session::read(sources, file, &[], &ReadOptions::default());
        let place = place(&[Hook::Input], attach, Mode::Replace, false);
        build(&session, &place, &Env::default(), &Devices::default()).expect("it compiles").object
    })
}

fn slot(attach: Attach) -> SlotName {
    let at_hook = attach == Attach::Netfilter;
    SlotName {
        device: (!at_hook).then(|| DEVICE.into()),
        attach,
        hook: at_hook.then_some(Hook::Input),
        family: Family::V4,
    }
}

#[test]
fn every_packet_meets_the_old_policy_or_the_new() {
    const NAME: &str = "every_packet_meets_the_old_policy_or_the_new";
    let tools = ["iptables-legacy-restore", "iptables-legacy-save"];
    let Some(host) = Host::new(NAME, "swaps", &tools) else { return };
    let (sys, ifindex) = (&host.sys, host.ifindex);
    let driver = LinkSpec::Xdp { ifindex, generic: false };
    let tcx = LinkSpec::Tcx { ifindex, egress: false, first: true };
    let slow = if std::env::var_os("POLC_LONG").is_some() { SWAPS } else { SLOW_SWAPS };
    for (attach, spec) in [(Attach::Xdp, driver), (Attach::TcIngress, tcx)] {
        let objects = policies(attach);
        let loaded = [0, 1].map(|policy| load(sys, &objects[policy]).expect("accepted"));
        let _receiver = (attach != Attach::Xdp).then(|| sys.link_create(&host.receiver, &driver));
        let [old, new] = [0, 1].map(|policy| &loaded[policy].program().expect("one").fd);
        let link = sys.link_create(old, &spec).expect("nothing else is there");
        let mut times = Times::default();
        let swaps = if attach == Attach::Xdp { slow } else { SWAPS };
        host.flood(&format!("{attach}, the link's program"), || {
            for swap in 0..swaps {
                let [from, to] = if swap % 2 == 0 { [old, new] } else { [new, old] };
                let began = Instant::now();
                sys.link_update(&link, to, Some(from.as_fd())).expect("swapped");
                times.add(began.elapsed());
                thread::sleep(PAUSE);
            }
            let mut decided: [Decided; 2] = Default::default();
            for ((decided, loaded), object) in decided.iter_mut().zip(&loaded).zip(&objects) {
                decided.add(sys, &object.manifest, loaded.map(COUNTERS_MAP));
            }
            (decided, times)
        });
    }
    for attach in [Attach::Xdp, Attach::TcIngress, Attach::Netfilter] {
        let (objects, slot) = (policies(attach), slot(attach));
        let _receiver = (attach != Attach::Xdp).then(|| sys.link_create(&host.receiver, &driver));
        host.apply(&slot, &objects[0], false);
        let keep = |decided: &mut [Decided; 2], policy: usize| {
            let open = status::open(sys, &host.store, &slot).expect("applied");
            decided[policy].add(sys, &objects[policy].manifest, open.map(COUNTERS_MAP));
        };
        let (mut decided, mut times) = (<[Decided; 2]>::default(), Times::default());
        keep(&mut decided, 0);
        host.flood(&format!("{attach}, whole applies"), || {
            for swap in 0..slow {
                let policy = (swap + 1) % 2;
                let began = Instant::now();
                host.apply(&slot, &objects[policy], false);
                times.add(began.elapsed());
                keep(&mut decided, policy);
            }
            (decided, times)
        });
        flush(sys, &host.store, &slot).expect("flushed");
    }
}

/// What tools show of devices, filters and rules, and what is left of polc's own.
fn shown(host: &Host) -> BTreeMap<&'static str, String> {
    let show = |command: &str, args: &[&str]| {
        let text = run(command, args).expect("root may");
        // iptables-save tells the time.
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.flat_map(|line| [line, "\n"]).collect::<String>()
    };
    BTreeMap::from([
        ("ip link", show("ip", &["-d", "link"])),
        ("tc qdisc", show("tc", &["qdisc"])),
        ("tc filter ingress", show("tc", &["filter", "show", "dev", DEVICE, "ingress"])),
        ("tc filter egress", show("tc", &["filter", "show", "dev", DEVICE, "egress"])),
        ("iptables-save", show("iptables-legacy-save", &[])),
        ("bpftool net", show("bpftool", &["net"])),
        ("slots", format!("{:?}", host.store.names(&host.sys).expect("readable"))),
    ])
}

#[test]
fn a_flush_leaves_the_host_as_it_was() {
    const NAME: &str = "a_flush_leaves_the_host_as_it_was";
    let tools = ["tc", "iptables-legacy-restore", "iptables-legacy-save", "bpftool"];
    let Some(host) = Host::new(NAME, "cycles", &tools) else { return };
    run("iptables-legacy-restore", &[&host.behind()]).expect("root may");
    // A qdisc and a filter of somebody else's stay.
    let tc = |line: &str| run("tc", &line.split(' ').collect::<Vec<_>>()).expect("root may");
    tc(&format!("qdisc add dev {PEER} clsact"));
    let theirs = program(&host.sys, ProgramType::SCHED_CLS, |a| a.mov64(Reg::R0, TC_OK));
    let pin = host.dirs.0.join("theirs");
    host.sys.obj_pin(&theirs, Path::new(&pin)).expect("pinned");
    tc(&format!("filter add dev {PEER} ingress bpf da pinned {pin}"));
    let before = shown(&host);
    let ways = [(Attach::Xdp, false), (Attach::TcIngress, true), (Attach::TcIngress, false)];
    let ways = ways.into_iter().chain([(Attach::Netfilter, false), (Attach::TcEgress, false)]);
    let mut summary = Vec::new();
    for (attach, clsact) in ways {
        let [object, _] = policies(attach);
        let slot = slot(attach);
        let cycles = if attach == Attach::Xdp { CYCLES - 4 * CYCLES_EACH } else { CYCLES_EACH };
        let began = Instant::now();
        for _ in 0..cycles {
            host.apply(&slot, &object, clsact);
            assert!(flush(&host.sys, &host.store, &slot).expect("flushed"), "{attach}: it was applied");
        }
        let way = if clsact { "tc-ingress through clsact".to_string() } else { attach.to_string() };
        summary.push(format!("{way} {cycles} in {:.1} s", began.elapsed().as_secs_f64()));
        for (what, now) in shown(&host) {
            assert_eq!(now, before[what], "`{what}` after {cycles} cycles at {way}");
        }
    }
    eprintln!("apply and flush: {}", summary.join(", "));
}
