//! Sets of every type as tables: every level, rbpf and the kernel say what the elements say.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polc::netfilter::{Comparison, compare};
use polc::place::{devices_of, place};
use polc::runner::Program;
use polc::select::Devices;
use polc::session::{ReadOptions, Session};
use polc::verify::verify;
use polc::witness::{Random, Witnesses};
use polc_backend_ebpf::abi;
use polc_backend_ebpf::emit::return_code;
use polc_ir::env::{Attach, Env, Mode};
use polc_ir::hook::{Family, Hook};
use polc_ir::plan::set::change;
use polc_ir::set::Pattern;
use polc_ir::source::SourceMap;
use polc_loader::netfilter::Route;
use polc_loader::sets::LiveTable;
use polc_loader::sys::{Sys, TestRun};
use polc_tests::kernel::{Namespace, TempDir, may_run, run};

/// A set type, the options of its `create`, and the ends that are asked.
struct Kind {
    name: &'static str,
    options: &'static str,
    family: Family,
    ends: &'static str,
}

const fn kind(name: &'static str, options: &'static str, family: Family, ends: &'static str) -> Kind {
    Kind { name, options, family, ends }
}

const KINDS: &[Kind] = &[
    kind("hash:ip", "", Family::V4, "src"),
    kind("hash:ip", "netmask 24", Family::V4, "dst"),
    kind("hash:ip", "", Family::V6, "src"),
    kind("hash:net", "", Family::V4, "src"),
    kind("hash:net", "", Family::V6, "dst"),
    kind("hash:ip,port", "", Family::V4, "src,dst"),
    kind("hash:ip,port", "", Family::V6, "dst,dst"),
    kind("hash:ip,mark", "markmask 0xff00", Family::V4, "src,src"),
    kind("hash:ip,mac", "", Family::V4, "src,src"),
    kind("hash:mac", "", Family::V4, "src"),
    kind("hash:ip,port,ip", "", Family::V4, "src,dst,dst"),
    kind("hash:ip,port,ip", "", Family::V6, "src,dst,dst"),
    kind("hash:ip,port,net", "", Family::V4, "src,dst,dst"),
    kind("hash:ip,port,net", "", Family::V6, "src,src,dst"),
    kind("hash:net,port", "", Family::V4, "src,src"),
    kind("hash:net,port", "", Family::V6, "dst,dst"),
    kind("hash:net,net", "", Family::V4, "src,dst"),
    kind("hash:net,port,net", "", Family::V4, "src,dst,dst"),
    kind("hash:net,port,net", "", Family::V6, "src,dst,dst"),
    kind("hash:net,iface", "", Family::V4, "src,src"),
    kind("hash:net,iface", "", Family::V6, "dst,src"),
    kind("bitmap:ip", "range 10.0.0.0/20", Family::V4, "src"),
    kind("bitmap:ip,mac", "range 10.0.0.0/20", Family::V4, "src,src"),
    kind("bitmap:port", "range 0-65535", Family::V4, "dst"),
];

fn address(random: &mut Random, family: Family) -> String {
    // Few values, so that elements neighbour and cover one another.
    let low = random.next_u64();
    match family {
        Family::V4 => format!("10.0.{}.{}", low & 15, low >> 8 & 255),
        Family::V6 => format!("2001:db8:{:x}::{:x}", low & 7, low >> 8 & 0x3ff),
    }
}

fn part(random: &mut Random, what: &str, kind: &Kind, bitmap: bool) -> String {
    match what {
        "ip" => address(random, kind.family),
        "net" => {
            let lengths: [u8; 5] =
                if kind.family == Family::V4 { [32, 30, 28, 24, 20] } else { [128, 126, 120, 64, 48] };
            // Longer prefixes of a device would hide the shorter ones of others.
            let length = if kind.name == "hash:net,iface" { lengths[2] } else { lengths[random.below(5)] };
            format!("{}/{length}", address(random, kind.family))
        }
        "port" if bitmap => (random.below(4_000) * 3).to_string(),
        "port" => match random.below(4) {
            0 => format!("udp:{}", random.below(64)),
            1 if kind.family == Family::V4 => format!("icmp:{}/{}", random.below(16), random.below(4)),
            1 => format!("icmpv6:{}/{}", 128 + random.below(4), random.below(4)),
            2 => format!("{}:0", [47, 50, 33][random.below(3)]),
            _ => format!("tcp:{}-{}", 20 + random.below(8), 28 + random.below(8)),
        },
        "mark" => format!("{:#x}", random.below(1 << 16)),
        "iface" => ["lo", "eth0", "veth-of-15-byte"][random.below(3)].to_string(),
        "mac" => format!("02:00:00:00:{:02x}:{:02x}", random.below(4), random.below(256)),
        other => unreachable!("{other}"),
    }
}

/// A file with one set, and a list that holds it.
fn file(kind: &Kind, count: usize, seed: u64) -> String {
    let random = &mut Random::new(seed);
    let family = match (kind.name.starts_with("bitmap") || kind.name == "hash:mac", kind.family) {
        (true, _) => "",
        (_, Family::V4) => "family inet",
        (_, Family::V6) => "family inet6",
    };
    let (form, parts) = kind.name.split_once(':').unwrap();
    let mut text = format!("create s {} {family} {}\n", kind.name, kind.options);
    for _ in 0..count {
        let parts: Vec<String> =
            parts.split(',').map(|what| part(random, what, kind, form == "bitmap")).collect();
        let nomatch = kind.name.contains("net") && random.below(4) == 0;
        _ = writeln!(text, "add s {}{}", parts.join(","), if nomatch { " nomatch" } else { "" });
    }
    text + "create l list:set\nadd l s\n"
}

fn session(kind: &Kind, sets: &str) -> Session {
    let mut sources = SourceMap::new();
    let ends = kind.ends;
    let mut rules = String::from("*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n");
    for chain in ["INPUT", "FORWARD"] {
        _ = write!(
            rules,
            "-A {chain} -p tcp -m set --match-set l {ends} -j ACCEPT\n\
             -A {chain} -m set --match-set s {ends} --return-nomatch -p udp -j ACCEPT\n\
             -A {chain} -m set --match-set s {ends} -j DROP\n"
        );
    }
    rules += "COMMIT\n";
    let rules = sources.add("rules", rules);
    let sets = sources.add("sets", sets);
    let options = ReadOptions { family: Some(kind.family), ..ReadOptions::default() };
    Session::read(sources, rules, &[sets], &options)
}

#[test]
fn tables_agree_at_every_level() {
    let root = may_run("tables_agree_at_every_level, in the kernel");
    for (at, kind) in KINDS.iter().enumerate() {
        for (count, live) in [(1_200, false), (60, true), (0, true)] {
            if count == 0 && at > 0 {
                // An empty set is the same for every type.
                continue;
            }
            let name = format!("{} {} {} of {count}, live {live}", kind.name, kind.options, kind.family);
            let mut session = session(kind, &file(kind, count, at as u64));
            for set in session.ruleset.sets.values_mut() {
                set.live = live;
            }
            let attach = if kind.name.contains("mark") { Attach::TcIngress } else { Attach::Xdp };
            let place = place(&[Hook::Input], attach, Mode::Replace, true);
            let env = Env { local: Some(Vec::new()), ..Env::default() };
            let devices = Devices { declared: devices_of(&session.ruleset), ..Devices::default() };
            let compiled = polc::compile(&session.ruleset, &place, &env, &devices);
            assert!(compiled.diagnostics.is_empty(), "{name}: {:?}", compiled.diagnostics);
            assert!(!live || compiled.plan.members.len() == 3, "{name}: no table");
            let verified = verify(&session, &place, &env, &devices, 1, 100, &mut |_, _| {});
            assert!(verified.disagreement.is_none(), "{name}: {:?}", verified.disagreement);
            assert!(verified.not_emitted.is_empty(), "{name}: {:?}", verified.not_emitted);
            if count > 0 {
                assert!(verified.verdicts["drop"] > 20, "{name}: {:?}", verified.verdicts);
            }
            if !root {
                continue;
            }
            let (object, _) = polc::build::object(&session, &compiled).unwrap();
            let sys = Sys::new();
            let loaded = polc_loader::load::load(&sys, &object).unwrap_or_else(|error| {
                let polc_loader::Error::Verifier(refusal) = &error else { panic!("{name}: {error}") };
                panic!("{name}: {error}\n{}", refusal.log)
            });
            let mut program = Program::new(&compiled.plan, attach, &object).unwrap();
            // In the kernel test packets come by the first device.
            for input in Witnesses::new(&compiled.classifier, &devices.declared[..1], 2).take(100) {
                if input.frame.len() <= 14 || input.frame.len() > 1_500 || input.vlan.is_some() {
                    continue;
                }
                let mut context = vec![0; object.programs[0].kind.context_bytes() as usize];
                if attach == Attach::Xdp {
                    context[4..8].copy_from_slice(&(input.frame.len() as u32).to_ne_bytes());
                } else {
                    context[8..12].copy_from_slice(&input.mark.to_ne_bytes());
                }
                let (ending, _) = program.run(&compiled.plan, &input).unwrap();
                let run = TestRun { frame: &input.frame, context: &context, repeat: 1 };
                let Ok(result) = sys.test_run(&loaded.program().unwrap().fd, &run) else { continue };
                let expected = return_code(attach, place.mode, ending.verdict);
                assert_eq!(result.return_value as i32, expected, "{name}: {:02x?}", input.frame);
            }
        }
    }
}

/// What `ipset save` makes of a file; nothing if the kernel was built without the type.
fn saved(text: &str) -> Option<String> {
    let mut text = text.replace("\nadd s ", "\nadd -exist s ");
    // ipset gives the elements of a bitmap of ports no protocol.
    if text.starts_with("create s bitmap:port") {
        text = text.replace("tcp:", "").replace("udp:", "");
    }
    let _namespace = Namespace::enter("sets");
    let directory = TempDir::new("sets");
    let file = directory.file("sets", text.as_bytes());
    match run("ipset", &["-file", &file, "restore"]) {
        Ok(_) => Some(run("ipset", &["save"]).expect("ipset saves")),
        Err(said) if said.contains("set type not supported") => None,
        Err(said) => panic!("{said}"),
    }
}

#[test]
fn the_kernels_sets_say_the_same() {
    if !may_run("the_kernels_sets_say_the_same") {
        return;
    }
    let mut dropped = 0;
    for (at, kind) in KINDS.iter().enumerate() {
        let name = format!("{} {} {}", kind.name, kind.options, kind.family);
        let Some(sets) = saved(&file(kind, 200, at as u64)) else {
            eprintln!("skipped {name}: not in this kernel");
            continue;
        };
        let session = session(kind, &sets);
        for route in [Route::Forward, Route::Local] {
            let sets = std::slice::from_ref(&sets);
            let comparison = Comparison { session: &session, sets, route, packets: 2_000, seed: 5 };
            let compared =
                compare(&comparison, &mut |_| ()).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(compared.difference.is_none(), "{name} {route:?}: {:?}", compared.difference);
            dropped += compared.counters_hit;
        }
    }
    assert!(dropped > 100, "{dropped}");
}

/// A frame from an address.
fn frame_from(address: u32) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0]);
    frame.extend(address.to_be_bytes());
    frame.extend([198, 51, 100, 2, 4, 0, 0, 22]);
    frame.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
    frame
}

#[test]
fn a_set_of_100k_changes_under_packets() {
    if !may_run("a_set_of_100k_changes_under_packets") {
        return;
    }
    let random = &mut Random::new(3);
    let mut text = String::from("create s hash:net family inet maxelem 100100\n");
    let mut hosts: Vec<u32> = (0..100_000).map(|_| random.next_u64() as u32 & 0x7fff_ffff | 1).collect();
    hosts.sort_unstable();
    hosts.dedup();
    for host in &hosts {
        _ = writeln!(text, "add s {}", std::net::Ipv4Addr::from_bits(*host));
    }
    let mut sources = SourceMap::new();
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set --match-set s src -j DROP\nCOMMIT\n";
    let (rules, sets) = (sources.add("rules", rules), sources.add("sets", text));
    let mut session = Session::read(sources, rules, &[sets], &ReadOptions::default());
    session.ruleset.sets.values_mut().for_each(|set| set.live = true);
    let place = place(&[Hook::Input], Attach::Xdp, Mode::Replace, false);
    let compiled = polc::compile(&session.ruleset, &place, &Env::default(), &Devices::default());
    let (object, _) = polc::build::object(&session, &compiled).unwrap();
    let sys = Sys::new();
    let loaded = polc_loader::load::load(&sys, &object).unwrap();
    let set = &object.manifest.sets[0];
    let table = LiveTable::new(&sys, loaded.map(&set.map).unwrap()).unwrap();

    // Addresses whose membership never changes: some of them share cells and buckets with what does.
    let steady: Vec<(Vec<u8>, u32)> = hosts
        .iter()
        .step_by(997)
        .flat_map(|host| [(*host, abi::xdp::DROP), (*host ^ 0x8000_0000, abi::xdp::PASS)])
        .map(|(host, returns)| (frame_from(host), returns as u32))
        .collect();
    let done = AtomicBool::new(false);
    let mut times = Vec::new();
    let packets = std::thread::scope(|scope| {
        let packets = scope.spawn(|| {
            let mut packets = 0u64;
            while !done.load(Ordering::Relaxed) {
                for (frame, returns) in &steady {
                    let run = TestRun { frame, context: &[], repeat: 1 };
                    let result = sys.test_run(&loaded.program().unwrap().fd, &run).unwrap();
                    assert_eq!(result.return_value, *returns, "{frame:02x?}");
                    packets += 1;
                }
            }
            packets
        });
        let mut change = |stores: Result<Vec<change::Store>, change::Refusal>| {
            let began = Instant::now();
            let result = stores.map(|stores| table.make(&sys, &stores).unwrap());
            times.push(began.elapsed());
            result
        };
        for round in 0..20_000u32 {
            // Neighbours of steady addresses, and new ones that take keys' slots one after another.
            let host = hosts[round as usize * 7 % hosts.len()] ^ if round % 2 == 0 { 2 } else { round << 9 };
            if hosts.binary_search(&host).is_ok() || host >= 0x8000_0000 {
                continue;
            }
            let pattern = Pattern { values: [host.into(), 0, 0], lengths: [32, 0, 0], nomatch: false };
            match change(change::add(&set.shape, &table, &pattern, false)) {
                Ok(()) => change(change::remove(&set.shape, &table, &pattern)).unwrap(),
                Err(refusal) => assert_eq!(refusal, change::Refusal::Full),
            }
        }
        done.store(true, Ordering::Relaxed);
        packets.join().expect("every packet was decided right")
    });
    times.sort_unstable();
    let (median, last) = (times[times.len() / 2], times[times.len() - 1]);
    eprintln!("{} changes under {packets} packets: median {median:?}, slowest {last:?}", times.len());
    assert!(median < Duration::from_millis(1), "{median:?}");
    // What was added was taken out again.
    let words = polc_loader::sets::read(&sys, loaded.map(&set.map).unwrap()).unwrap();
    let mut left = Vec::new();
    set.shape.decode(words.as_slice(), &mut |pattern| left.push(pattern.values[0] as u32));
    left.sort_unstable();
    assert_eq!(left, hosts);
}
