//! Every loader takes the object of every dump, and the object then decides packets without polc.
//!
//! For each valid dump and attach point the object for the default path is written to a file, and bpftool (libbpf), aya
//! and `ip` or `tc` load it. What each of them loaded runs packets (`BPF_PROG_TEST_RUN`) that rbpf ran before; then a
//! real packet crosses a pair of devices with the program attached, and has to be counted where rbpf counts it. Threads
//! share the work, each in a network namespace of its own.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, MapInfo, PerCpuArray};
use aya::programs::{ProgramInfo, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use polc::build::{Built, build};
use polc::place::{default_path, devices_of, place};
use polc::runner::Program;
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc::witness::Witnesses;
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::emit::{COUNTERS_MAP, ending_of};
use polc_backend_ebpf::insn::{AluOp, Reg};
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::object::{self, Object, ProgramKind};
use polc_ir::env::{Attach, Env, Input, Mode};
use polc_ir::hook::Family;
use polc_ir::outcome::{Count, Ending};
use polc_ir::source::SourceMap;
use polc_tests::corpus::{self, Dump};
use polc_tests::kernel::{BpfFs, Namespace, TempDir, has_tools, load, loopback_type, may_run, run};

/// Packets for each program and loader.
const PACKETS: usize = 24;

/// How long a packet may take from one device of a pair to the other.
const CROSSING_MAX: Duration = Duration::from_secs(5);

const ATTACH: [Attach; 3] = [Attach::Xdp, Attach::TcIngress, Attach::TcEgress];
/// Why these tests have none for netfilter hooks.
const NETFILTER: &str = "ip, tc and aya load no netfilter programs";

/// The pair of devices: programs are attached to the first.
const DEVICES: [&str; 2] = ["in0", "out0"];
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
/// The IPv4 and IPv6 network of each device; it has address 1 there, and whoever has 2 is behind the other device.
const NETWORKS: [[&str; 2]; 2] = [["198.51.100.", "2001:db8:1::"], ["192.0.2.", "2001:db8:2::"]];
/// The number of the first device, which stands for the second that a rule set names: tunnels of the kernel's own take
/// small numbers in every namespace.
const IFINDEX: u32 = 100;
/// A packet's ports.
const PORTS: [u16; 2] = [5_000, 33_000];

#[test]
fn every_loader_takes_every_object() {
    const NAME: &str = "every_loader_takes_every_object";
    if !may_run(NAME) || !has_tools(NAME, &["bpftool", "ip", "tc", "mount"]) {
        return;
    }
    let dumps: Vec<Dump> = corpus::all().into_iter().filter(|dump| dump.valid).collect();
    let work: Vec<(&Dump, Attach)> =
        dumps.iter().flat_map(|dump| ATTACH.map(|attach| (dump, attach))).collect();
    let (next, wrong, packets) = (AtomicUsize::new(0), Mutex::new(Vec::new()), AtomicUsize::new(0));
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (next, wrong, packets, work) = (&next, &wrong, &packets, &work);
            scope.spawn(move || {
                let bench = Bench::new(thread);
                while let Some((dump, attach)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match bench.check(dump, *attach) {
                        Ok(ran) => _ = packets.fetch_add(ran, Ordering::Relaxed),
                        Err(why) => wrong
                            .lock()
                            .expect("no thread panics here")
                            .push(format!("{} {attach}: {why}", dump.name)),
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no thread panicked");
    eprintln!("{} objects, {} packets", work.len(), packets.into_inner());
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}

/// A program that takes the verifier some milliseconds is loaded at the first try, whatever processes end meanwhile.
#[test]
fn loading_is_not_interrupted_by_processes_that_end() {
    const NAME: &str = "loading_is_not_interrupted_by_processes_that_end";
    const LOADS: usize = 20;
    if !may_run(NAME) {
        return;
    }
    let mut asm = Asm::new();
    asm.mov64(Reg::R0, 0);
    for _ in 0..30_000 {
        asm.alu64(AluOp::Add, Reg::R0, 1);
    }
    asm.mov64(Reg::R0, 2);
    asm.exit();
    let code = asm.finish().expect("it has an end");
    let mut object = Object::new(Manifest::default());
    object.programs.push(object::Program { name: "polc".into(), kind: ProgramKind::Xdp, code });
    let bytes = object.write().expect("a program and nothing else");
    let done = AtomicBool::new(false);
    let offers = std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    run("true", &[]).expect("it does nothing");
                }
            });
        }
        let mut offers = 0;
        for _ in 0..LOADS {
            let mut ebpf = aya::EbpfLoader::new().load(&bytes).expect("no maps");
            let program: &mut Xdp = ebpf.program_mut("polc").expect("named").try_into().expect("XDP");
            load(|| {
                offers += 1;
                program.load()
            })
            .expect("accepted");
        }
        done.store(true, Ordering::Relaxed);
        offers
    });
    // Only what stops the whole process interrupts it.
    assert!(offers < 2 * LOADS, "{offers} offers for {LOADS} programs");
}

/// A thread's place to work: a namespace with a pair of devices, a bpffs, a folder.
struct Bench {
    dir: TempDir,
    pins: BpfFs,
    _namespace: Namespace,
}

impl Bench {
    fn new(thread: usize) -> Bench {
        let bench = Bench {
            dir: TempDir::new(&format!("loaders-{thread}")),
            pins: BpfFs::new(&format!("loaders-fs-{thread}")),
            _namespace: Namespace::enter(&format!("loaders-{thread}")),
        };
        let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
        let [near, far] = MACS.map(mac);
        let ip = |line: &str| run("ip", &line.split(' ').collect::<Vec<_>>()).expect("root may");
        ip(&format!("link add in0 index {IFINDEX} address {near} type veth peer name out0 address {far}"));
        for (device, peer, [v4, v6]) in [(DEVICES[0], &far, NETWORKS[0]), (DEVICES[1], &near, NETWORKS[1])] {
            ip(&format!("link set dev {device} addrgenmode none"));
            ip(&format!("link set dev {device} up"));
            ip(&format!("addr add {v4}1/24 dev {device}"));
            ip(&format!("addr add {v6}1/64 dev {device} nodad"));
            ip(&format!("neigh add {v4}2 lladdr {peer} dev {device} nud permanent"));
            ip(&format!("neigh add {v6}2 lladdr {peer} dev {device} nud permanent"));
        }
        run("tc", &["qdisc", "add", "dev", DEVICES[0], "clsact"]).expect("root may");
        bench
    }

    /// Loads a dump's object through every loader; how many packets agreed.
    fn check(&self, dump: &Dump, attach: Attach) -> Result<usize, String> {
        let case = Case::new(dump, attach)?;
        let bytes = case.built.object.write().map_err(|error| error.to_string())?;
        let file = self.dir.file("x.o", &bytes);
        let mut ran = 0;

        let pin = self.pins.join("bpftool");
        run("bpftool", &["prog", "load", &file, &pin])?;
        let result = self.judge(&case, "bpftool", &pin);
        _ = std::fs::remove_file(&pin);
        ran += result?;

        let mut ebpf = aya::EbpfLoader::new().load(&bytes).map_err(|error| format!("aya: {error:?}"))?;
        let program = ebpf.program_mut("polc").ok_or("aya finds no program")?;
        let pin = self.pins.join("aya");
        load(|| match attach {
            Attach::Xdp => <&mut Xdp>::try_from(&mut *program).expect("XDP").load(),
            _ => <&mut SchedClassifier>::try_from(&mut *program).expect("tc").load(),
        })
        .map_err(|error| format!("aya: {error:?}"))?;
        program.pin(&pin).map_err(|error| format!("aya: {error}"))?;
        let result = self.judge(&case, "aya", &pin);
        _ = std::fs::remove_file(&pin);
        ran += result?;

        let device = DEVICES[0];
        let pin = self.pins.join("attached");
        let (said, shown, marker) = match attach {
            Attach::Xdp => (
                run("ip", &["link", "set", "dev", device, "xdp", "obj", &file, "sec", "xdp"])?,
                run("ip", &["link", "show", "dev", device])?,
                "prog/xdp id ",
            ),
            Attach::TcIngress | Attach::TcEgress => {
                let direction = if attach == Attach::TcIngress { "ingress" } else { "egress" };
                let filter = ["filter", "add", "dev", device, direction, "bpf", "da", "obj", &file];
                (
                    run("tc", &[filter.as_slice(), &["sec", "classifier"]].concat())?,
                    run("tc", &["filter", "show", "dev", device, direction])?,
                    "direct-action not_in_hw id ",
                )
            }
            Attach::Netfilter => unreachable!("{NETFILTER}"),
        };
        let crossed = if said.is_empty() {
            self.crosses(&case, &shown, marker, &pin)
        } else {
            Err(format!("complaints: {said}"))
        };
        match attach {
            Attach::Xdp => run("ip", &["link", "set", "dev", device, "xdp", "off"])?,
            Attach::TcIngress => run("tc", &["filter", "del", "dev", device, "ingress"])?,
            Attach::TcEgress => run("tc", &["filter", "del", "dev", device, "egress"])?,
            Attach::Netfilter => unreachable!("{NETFILTER}"),
        };
        // The pin keeps the program, which no packet of the kernel's own passes any more.
        let result = crossed.and_then(|()| self.judge(&case, "ip or tc", &pin));
        _ = std::fs::remove_file(&pin);
        Ok(ran + 1 + result?)
    }

    /// What `ip` or `tc` attached, pinned here, decides a packet that really crosses.
    fn crosses(&self, case: &Case, shown: &str, marker: &str, pin: &str) -> Result<(), String> {
        let id: String = shown
            .split(marker)
            .nth(1)
            .map(|rest| rest.chars().take_while(char::is_ascii_digit).collect())
            .ok_or_else(|| format!("no `{marker}` in: {shown}"))?;
        run("bpftool", &["prog", "pin", "id", &id, pin])?;
        let counters = Counters::of(pin)?;
        let before = counters.read()?;
        let (ending, counted) = case.expect(&send(case)?)?;
        let traces = &case.built.compiled.plan.traces;
        let waiting = Instant::now();
        loop {
            let after = counters.read()?;
            let grown =
                || traces.iter().zip(before.iter().zip(&after)).filter(|(_, (before, after))| after > before);
            // The kernel's own packets (multicast reports) may be counted beside it.
            let ended = grown().any(|(trace, _)| trace.ending == Some(ending));
            if (ended && counted.iter().all(|count| grown().any(|(trace, _)| trace.counts.contains(count))))
                || case.varies
            {
                return Ok(());
            }
            if waiting.elapsed() > CROSSING_MAX {
                return Err(format!(
                    "a packet crossed and was not counted as `{ending}`, {counted:?}: {after:?}"
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs the case's packets through a pinned program; how many the kernel took.
    fn judge(&self, case: &Case, loader: &str, pin: &str) -> Result<usize, String> {
        let counters = Counters::of(pin)?;
        let program = Pinned::open(case.attach, pin)?;
        let mut ran = 0;
        let mut before = counters.read()?;
        for (input, expected) in &case.packets {
            let Some(returned) = program.run(input) else { continue };
            ran += 1;
            let after = counters.read()?;
            let grown: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
            before = after;
            match ending_of(&case.built.compiled.plan, case.attach, &grown, returned) {
                Ok(outcome) if outcome == *expected || case.varies => {}
                other => {
                    return Err(format!(
                        "{loader}: {other:?} instead of {expected:?} for {:02x?}",
                        input.frame
                    ));
                }
            }
        }
        Ok(ran)
    }
}

/// A dump compiled for an attach point, and packets with what rbpf makes of them.
struct Case {
    attach: Attach,
    family: Family,
    devices: Devices,
    built: Built,
    packets: Vec<(Input, (Ending, Vec<Count>))>,
    /// Chance or a count decides some packets, so that two runs may differ.
    varies: bool,
}

impl Case {
    fn new(dump: &Dump, attach: Attach) -> Result<Case, String> {
        let mut sources = SourceMap::new();
        let rules = sources.add(dump.name.as_str(), dump.text());
        let sets: Vec<_> = dump.ipset_text().map(|text| sources.add("sets", text)).into_iter().collect();
        let session = Session::read(sources, rules, &sets, &ReadOptions::default());
        let mut declared = devices_of(&session.ruleset);
        if let Some(second) = declared.get_mut(1) {
            second.ifindex = IFINDEX;
        }
        let devices = Devices { declared, ..Devices::default() };
        let place = place(&default_path(attach), attach, Mode::Accelerate, false);
        let built =
            build(&session, &place, &Env::default(), &devices).map_err(|found| format!("{found:?}"))?;
        let mut case = Case {
            attach,
            family: session.family(),
            devices,
            varies: !built.compiled.plan.effect_tests.is_empty(),
            built,
            packets: Vec::new(),
        };
        let witnesses = Witnesses::new(&case.built.compiled.classifier, &[], 7);
        // Test packets are on the loopback device, number 1.
        let inputs: Vec<Input> = witnesses.take(PACKETS).map(|input| case.place_at(input, 1)).collect();
        let mut program = case.program()?;
        for input in inputs {
            let expected = program.run(&case.built.compiled.plan, &input)?;
            case.packets.push((input, expected));
        }
        Ok(case)
    }

    fn program(&self) -> Result<Program, String> {
        Program::new(&self.built.compiled.plan, self.attach, &self.built.object)
            .map_err(|error| error.to_string())
    }

    /// What rbpf makes of a packet.
    fn expect(&self, input: &Input) -> Result<(Ending, Vec<Count>), String> {
        self.program()?.run(&self.built.compiled.plan, input)
    }

    /// A frame as the program sees it on the device with a number.
    fn place_at(&self, mut input: Input, ifindex: u32) -> Input {
        let declared = self.devices.declared.iter().find(|device| device.ifindex == ifindex);
        let name = declared.map(|device| device.name);
        (input.in_device, input.out_device) =
            if self.attach == Attach::TcEgress { (None, name) } else { (name, None) };
        if self.attach != Attach::Xdp {
            input.packet_type = Some(loopback_type(&input.frame));
        }
        input
    }
}

/// A program that another loader pinned.
enum Pinned {
    Xdp(Xdp),
    Classifier(SchedClassifier),
}

impl Pinned {
    fn open(attach: Attach, pin: &str) -> Result<Pinned, String> {
        let result = match attach {
            Attach::Xdp => Xdp::from_pin(pin, XdpAttachType::Interface).map(Pinned::Xdp),
            Attach::TcIngress | Attach::TcEgress => SchedClassifier::from_pin(pin).map(Pinned::Classifier),
            Attach::Netfilter => unreachable!("{NETFILTER}"),
        };
        result.map_err(|error| format!("{pin}: {error}"))
    }

    /// The return code; `None` for packets that the kernel does not test programs with.
    fn run(&self, input: &Input) -> Option<i32> {
        if input.frame.len() < 14 || input.vlan.is_some() {
            return None;
        }
        let mut context = match self {
            Pinned::Xdp(_) => vec![0; 24],
            Pinned::Classifier(_) => vec![0; 192],
        };
        match self {
            // `data_end`, and `mark`.
            Pinned::Xdp(_) => context[4..8].copy_from_slice(&(input.frame.len() as u32).to_ne_bytes()),
            Pinned::Classifier(_) => context[8..12].copy_from_slice(&input.mark.to_ne_bytes()),
        }
        let mut options = TestRunOptions::new();
        options.data_in = Some(&input.frame);
        options.ctx_in = Some(&context);
        let result = match self {
            Pinned::Xdp(program) => program.test_run(options),
            Pinned::Classifier(program) => program.test_run(options),
        };
        result.ok().map(|result| result.return_value as i32)
    }
}

/// The counters of a pinned program, found through the kernel as any tool finds them.
struct Counters(PerCpuArray<MapData, [u64; 2]>, u32);

impl Counters {
    fn of(pin: &str) -> Result<Counters, String> {
        let fail = |error: &dyn std::fmt::Display| format!("{pin}: {error}");
        let info = ProgramInfo::from_pin(pin).map_err(|error| fail(&error))?;
        let ids = info.map_ids().map_err(|error| fail(&error))?.unwrap_or_default();
        for id in ids {
            let info = MapInfo::from_id(id).map_err(|error| fail(&error))?;
            if info.name_as_str() == Some(COUNTERS_MAP) {
                let data = MapData::from_id(id).map_err(|error| fail(&error))?;
                let slots = info.max_entries();
                let map = PerCpuArray::try_from(Map::PerCpuArray(data)).map_err(|error| fail(&error))?;
                return Ok(Counters(map, slots));
            }
        }
        Err(format!("{pin}: no map `{COUNTERS_MAP}`"))
    }

    /// Packets by slot.
    fn read(&self) -> Result<Vec<u64>, String> {
        let slot = |slot| self.0.get(&slot, 0).map(|values| values.iter().map(|value| value[0]).sum());
        (0..self.1).map(slot).collect::<Result<_, _>>().map_err(|error| error.to_string())
    }
}

/// Sends a packet past the attached program; the packet as it does so.
fn send(case: &Case) -> Result<Input, String> {
    // To the program's device, or from it.
    let from = usize::from(case.attach != Attach::TcEgress);
    let family = usize::from(case.family == Family::V6);
    let address =
        |host: u8| -> IpAddr { format!("{}{host}", NETWORKS[from][family]).parse().expect("an address") };
    let [source, target] =
        [(1, PORTS[0]), (2, PORTS[1])].map(|(host, port)| SocketAddr::new(address(host), port));
    let payload = [0x5a; 18];
    UdpSocket::bind(source)
        .and_then(|socket| socket.send_to(&payload, target))
        .map_err(|error| format!("{source} > {target}: {error}"))?;
    let mut udp: Vec<u8> = PORTS.iter().flat_map(|port| port.to_be_bytes()).collect();
    udp.extend([0, 8 + payload.len() as u8, 0, 0]);
    udp.extend(payload);
    let mut frame = [MACS[1 - from], MACS[from]].concat();
    frame.extend(case.family.ether_type().to_be_bytes());
    match (source.ip(), target.ip()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            frame.extend([0x45, 0, 0, 20 + udp.len() as u8, 0, 0, 0x40, 0, 64, 17, 0, 0]);
            frame.extend(source.octets());
            frame.extend(target.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            frame.extend([0x60, 0, 0, 0, 0, udp.len() as u8, 17, 64]);
            frame.extend(source.octets());
            frame.extend(target.octets());
        }
        _ => unreachable!("both are of the case's family"),
    }
    frame.extend(udp);
    let mut input = case.place_at(Input { frame, ..Input::default() }, IFINDEX);
    // For the device itself on receive; on transmit the type is still that of a packet for this host.
    input.packet_type = Some(0);
    Ok(input)
}
