//! Whether a packet is for this host: polc's table of the host's addresses, or the kernel's routing asked for each.
//!
//! The same rules are compiled with and without the rules that tell packets for this host from others
//! ([`polc::guard::split_local`]), for hosts of few and of many addresses; beside them stands a program that reads the
//! headers and calls `bpf_fib_lookup`, against one that reads the headers only. The namespace has the addresses and a
//! default route; half of the packets are for the host, the others for anybody.

use cranelift_entity::PrimaryMap;
use polc::build::object_with;
use polc::guard::split_local;
use polc::place::place;
use polc::select::Devices;
use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::{AluOp, Helper, Reg, Size};
use polc_backend_ebpf::object::{Object, ProgramKind};
use polc_ir::env::{Env, Mode};
use polc_ir::hook::{Family, Hook};
use polc_ir::interval::Interval;

use crate::baseline::{empty, parse, parse_only, pass};
use crate::classify::noise;
use crate::context::{Context, NOISY, progress};
use crate::driver::Pool;
use crate::kernel::{Loaded, object};
use crate::machine::{run, run_with};
use crate::packet::Form;
use crate::random::Random;
use crate::report::{Section, Table, ns};
use crate::rules::Header;
use crate::subject::{attach, session};
use crate::trace::{DISTINCT, Traffic, draw};

/// `bpf_fib_lookup` (include/uapi/linux/bpf.h), the bytes of its `struct bpf_fib_lookup`, and `BPF_FIB_LOOKUP_SKIP_NEIGH`:
/// the question is where a packet goes, not how.
const FIB_LOOKUP: Helper = Helper(69);
const FIB_BYTES: i16 = 64;
const FIB_SKIP_NEIGH: i32 = 1 << 2;

/// The device of the addresses and the default route.
const DEVICE: &str = "fib0";
const PEER: &str = "fib1";

/// 10.0.0.1, 10.0.1.1, ...: addresses of the host, each in a network of its own.
const FIRST: u32 = 0x0a00_0001;

/// How many addresses hosts have.
const ADDRESSES: [u32; 3] = [4, 64, 1_024];

/// Rules that do not decide by themselves, on both hooks.
const RULES: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j DROP
-A FORWARD -p tcp -m tcp --dport 23 -j DROP
COMMIT
";

fn address(index: u32) -> u32 {
    FIRST + (index << 8)
}

/// The rules' program, which tells packets for the host's addresses from others if there are any.
fn rules(kind: ProgramKind, addresses: &[u128]) -> Result<Object, String> {
    let mut session = session("rules", RULES, None, Family::V4);
    let path = [Hook::Prerouting, Hook::Input, Hook::Forward];
    let place = place(&path, attach(kind), Mode::Replace, true);
    let points = addresses.iter().map(|&address| Interval::point(address));
    let local = (!addresses.is_empty()).then(|| points.collect());
    let env = Env { local, ..Env::default() };
    split_local(&mut session.ruleset, &place, &env);
    let compiled = polc::compile(&session.ruleset, &place, &env, &Devices::default());
    let made = object_with(&session, &compiled, Default::default());
    made.map(|(object, _)| object)
        .map_err(|findings| findings.first().map_or_else(String::new, |first| first.message.clone()))
}

/// Reads the headers and asks where the packet goes.
fn routed(kind: ProgramKind, ifindex: u32) -> Result<Object, String> {
    let mut a = Asm::new();
    let other = a.label();
    a.mov64(Reg::R6, Reg::R1);
    let fields = parse(&mut a, kind, Family::V4, other);
    let at = -FIB_BYTES;
    a.mov64(Reg::R0, 0);
    for word in 0..FIB_BYTES / 8 {
        a.store(Size::Dw, Reg::FP, at + 8 * word, Reg::R0);
    }
    // family (AF_INET), l4_protocol, ifindex, ipv4_src, ipv4_dst.
    a.store(Size::B, Reg::FP, at, 2);
    a.store(Size::B, Reg::FP, at + 1, fields.proto);
    a.store(Size::W, Reg::FP, at + 8, ifindex as i32);
    for (field, offset) in [(16, 12), (32, 16)] {
        a.load(Size::W, Reg::R0, fields.l3, offset);
        a.store(Size::W, Reg::FP, at + field, Reg::R0);
    }
    a.mov64(Reg::R1, Reg::R6);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(at));
    a.mov64(Reg::R3, i32::from(FIB_BYTES));
    a.mov64(Reg::R4, FIB_SKIP_NEIGH);
    a.call(FIB_LOOKUP);
    a.bind(other);
    a.mov32(Reg::R0, pass(kind));
    a.exit();
    Ok(object(kind, PrimaryMap::new(), a.finish().map_err(|error| error.to_string())?))
}

/// Packets of which half are for one of `addresses`.
fn headers(addresses: &[u128], random: &mut Random) -> Vec<Header> {
    let mut header = |index: usize| {
        let local = addresses.get(random.below(addresses.len() as u64) as usize).copied();
        // Not multicast, and not of a network of the host's.
        let anybody = 0x2000_0000 + u128::from(random.below(0x8000_0000));
        Header {
            src: 0x2000_0000 + u128::from(random.below(0x8000_0000)),
            dst: local.filter(|_| index.is_multiple_of(2)).unwrap_or(anybody),
            sport: random.below(1 << 16) as u16,
            dport: random.below(1 << 16) as u16,
            proto: 6,
        }
    };
    (0..DISTINCT).map(&mut header).collect()
}

/// Runs it.
///
/// # Errors
/// What polc or the kernel says.
pub(crate) fn run_all(context: &mut Context) -> Result<Section, String> {
    let mut section = Section::new("local", "For this host, or to be forwarded?");
    run(&["ip", "link", "add", DEVICE, "type", "veth", "peer", "name", PEER])?;
    let measured = measure(context);
    run(&["ip", "link", "del", DEVICE])?;
    section.text(
        "ns a packet, random destinations, half of them for the host: what polc's table of the host's addresses adds to two \
         rules on INPUT and FORWARD, and what `bpf_fib_lookup` (without the neighbour) adds to reading the headers.",
    );
    section.table(measured?);
    if context.spread > NOISY {
        section.text(noise(context.spread));
    }
    Ok(section)
}

fn measure(context: &mut Context) -> Result<Table, String> {
    std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "1")
        .map_err(|error| format!("forwarding: {error}"))?;
    for device in [DEVICE, PEER, "lo"] {
        run(&["ip", "link", "set", device, "up"])?;
    }
    let shown = run(&["ip", "-o", "link", "show", "dev", DEVICE])?;
    let ifindex = shown.split(':').next().and_then(|number| number.trim().parse().ok());
    let ifindex: u32 = ifindex.ok_or_else(|| format!("no number in {shown}"))?;
    let mut table = Table::new(&["addresses", "at", "table, ns", "fib_lookup, ns", "times"]);
    let mut made = 0;
    for count in ADDRESSES {
        let addresses: Vec<u128> = (0..count).map(|index| u128::from(address(index))).collect();
        let mut batch = String::new();
        for index in made..count {
            let text = std::net::Ipv4Addr::from(address(index));
            batch += &format!("addr add {text}/24 dev {DEVICE}\n");
        }
        if made == 0 {
            batch += &format!("route add default dev {DEVICE}\n");
        }
        run_with(&["ip", "-batch", "-"], &batch)?;
        made = count;
        let mut random = Random::new(context.options.seed);
        let headers = headers(&addresses, &mut random);
        let pool = Pool::new(Family::V4, &headers, &draw(Traffic::Uniform, headers.len(), &mut random));
        for (kind, at) in [(ProgramKind::Xdp, "XDP"), (ProgramKind::Classifier, "tc")] {
            let objects = [
                empty(kind)?,
                rules(kind, &[])?,
                rules(kind, &addresses)?,
                parse_only(kind, Family::V4)?,
                routed(kind, ifindex)?,
            ];
            let loaded: Vec<Loaded> = objects.iter().map(Loaded::load).collect::<Result<_, _>>()?;
            let programs: Vec<&Loaded> = loaded.iter().collect();
            let rounds = context.options.rounds;
            let driver = context.driver(kind, Form::Fields(Family::V4))?;
            let times = driver.measure(&programs, std::slice::from_ref(&pool), rounds)?;
            context.note(times.spread);
            let added = |with: usize, without: usize| times.ns[with][0] - times.ns[without][0];
            let (by_table, by_routing) = (added(2, 1), added(4, 3));
            let cells = vec![
                count.to_string(),
                at.to_string(),
                ns(by_table),
                ns(by_routing),
                format!("{:.0}", by_routing / by_table.max(0.1)),
            ];
            progress(&format!("  {}", cells.join("  ")));
            table.row(cells);
        }
    }
    Ok(table)
}
