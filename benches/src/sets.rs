//! Big sets: 1,000 to 1,000,000 hosts, prefixes, hosts with ports, as one rule on an ipset.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use aya::Pod;
use aya::maps::{HashMap, LpmTrie, lpm_trie};
use polc_backend_ebpf::object::ProgramKind;
use polc_ir::hook::Family;

use crate::baseline::{Lookup, SET_MAP, empty, member, parse_only};
use crate::classify::noise;
use crate::context::{Context, NOISY, progress};
use crate::driver::Pool;
use crate::kernel::Loaded;
use crate::machine::on_all_cpus;
use crate::packet::Form;
use crate::plot::Plot;
use crate::random::Random;
use crate::report::{Section, Table, mb, ms, ns};
use crate::rules::{Header, Prefix, address_bits};
use crate::subject::Subject;
use crate::trace::{DISTINCT, POOL};
use crate::wire::Lane;

/// A compilation that took this long is not tried with ten times the elements.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hosts,
    Prefixes,
    HostPorts,
}

/// A workload.
#[derive(Clone, Copy, Debug)]
struct Workload {
    name: &'static str,
    kind: Kind,
    family: Family,
}

const WORKLOADS: [Workload; 5] = [
    Workload { name: "hosts, IPv4", kind: Kind::Hosts, family: Family::V4 },
    Workload { name: "prefixes, IPv4", kind: Kind::Prefixes, family: Family::V4 },
    Workload { name: "hosts with ports, IPv4", kind: Kind::HostPorts, family: Family::V4 },
    Workload { name: "hosts, IPv6", kind: Kind::Hosts, family: Family::V6 },
    Workload { name: "prefixes, IPv6", kind: Kind::Prefixes, family: Family::V6 },
];

/// An element. The port counts in [`Kind::HostPorts`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Element {
    prefix: Prefix,
    port: u16,
}

/// A set and packets for it.
struct Input {
    workload: Workload,
    elements: Vec<Element>,
    /// Packets from anywhere: half of them members.
    scattered: Vec<Header>,
    /// Packets of 1,024 neighbourhoods: half of them members.
    clustered: Vec<Header>,
    members: HashSet<Element>,
    lengths: Vec<u8>,
}

/// Elements in a neighbourhood: neighbours in the order of addresses.
const NEIGHBOURS: usize = 16;

fn random_address(random: &mut Random, family: Family) -> u128 {
    match family {
        // Unicast: 1.0.0.0 to 223.255.255.255.
        Family::V4 => u128::from(0x0100_0000 + random.below(0xdf00_0000) as u32),
        // 2000::/3, of which sixteen bits are in use, so that neighbours are neighbours.
        Family::V6 => {
            let high =
                0x2000 << 48 | u64::from(random.bits() as u32 & 0x0fff_ffff) << 32 | random.bits() >> 32;
            u128::from(high) << 64 | u128::from(random.bits())
        }
    }
}

fn element(random: &mut Random, workload: Workload) -> Element {
    let family = workload.family;
    let length = match workload.kind {
        Kind::Hosts | Kind::HostPorts => address_bits(family),
        // Of the kind that routing tables and block lists have: most are /24s (IPv6: /48s).
        Kind::Prefixes => match family {
            Family::V4 => [16, 18, 20, 22, 24, 28, 32][random.weighted(&[1, 2, 6, 14, 55, 7, 15])],
            Family::V6 => [32, 40, 44, 48, 56, 64, 128][random.weighted(&[4, 6, 8, 45, 10, 17, 10])],
        },
    };
    let port = match workload.kind {
        Kind::HostPorts => [22, 25, 80, 443, 3306, 8080][random.index(6)],
        _ => 0,
    };
    Element { prefix: Prefix::new(family, random_address(random, family), length), port }
}

impl Input {
    fn new(workload: Workload, count: usize, seed: u64) -> Input {
        let mut random = Random::new(seed ^ count as u64);
        let mut members = HashSet::with_capacity(count);
        while members.len() < count {
            members.insert(element(&mut random, workload));
        }
        let mut elements: Vec<Element> = members.iter().copied().collect();
        elements.sort_unstable();
        let mut lengths: Vec<u8> = elements.iter().map(|element| element.prefix.length).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut input =
            Input { workload, elements, scattered: Vec::new(), clustered: Vec::new(), members, lengths };
        let anywhere = |random: &mut Random, _: usize| random.index(count);
        input.scattered = input.headers(&mut random, anywhere);
        let starts: Vec<usize> = (0..1_024).map(|_| random.index(count)).collect();
        let near = |random: &mut Random, at: usize| {
            (starts[at % starts.len()] + random.index(NEIGHBOURS)).min(count - 1)
        };
        input.clustered = input.headers(&mut random, near);
        input
    }

    /// Different headers, every other one a member that `choose` chooses, the others beside one or anywhere.
    fn headers(&self, random: &mut Random, choose: impl Fn(&mut Random, usize) -> usize) -> Vec<Header> {
        let family = self.workload.family;
        let mut seen = HashSet::new();
        let mut out = Vec::new();
        for at in 0..8 * DISTINCT {
            if out.len() == DISTINCT {
                break;
            }
            let element = self.elements[choose(random, at)];
            let (lo, hi) = element.prefix.range(family);
            let inside = lo + u128::from(random.bits()) % (hi - lo + 1).min(1 << 63);
            let src = match at % 4 {
                0 | 1 => inside,
                2 => {
                    hi.wrapping_add(1 + u128::from(random.below(4_096)))
                        & (u128::MAX >> (128 - address_bits(family)))
                }
                _ => inside ^ (1 << random.below(u64::from(address_bits(family)))),
            };
            let header = Header {
                src,
                dst: random_address(random, family),
                sport: 1_024 + random.below(60_000) as u16,
                dport: if element.port == 0 { random.bits() as u16 } else { element.port },
                proto: 6,
            };
            if seen.insert(header) {
                out.push(header);
            }
        }
        random.shuffle(&mut out);
        out
    }

    fn is_member(&self, header: &Header) -> bool {
        let port = if self.workload.kind == Kind::HostPorts { header.dport } else { 0 };
        self.lengths.iter().any(|&length| {
            let prefix = Prefix::new(self.workload.family, header.src, length);
            self.members.contains(&Element { prefix, port })
        })
    }

    fn accepts(&self, headers: &[Header]) -> Vec<bool> {
        headers.iter().map(|header| !self.is_member(header)).collect()
    }

    fn address(&self, address: u128) -> String {
        match self.workload.family {
            Family::V4 => Ipv4Addr::from(address as u32).to_string(),
            Family::V6 => Ipv6Addr::from(address).to_string(),
        }
    }

    /// The set for `ipset restore`.
    fn ipset_text(&self) -> String {
        let family = if self.workload.family == Family::V4 { "inet" } else { "inet6" };
        let set_type = match self.workload.kind {
            Kind::Hosts => "hash:ip",
            Kind::Prefixes => "hash:net",
            Kind::HostPorts => "hash:ip,port",
        };
        let size = (self.elements.len() * 2).next_power_of_two();
        let mut out =
            format!("create s {set_type} family {family} hashsize {size} maxelem {}\n", self.elements.len());
        for element in &self.elements {
            _ = write!(out, "add s {}", self.address(element.prefix.address));
            _ = match self.workload.kind {
                Kind::Hosts => writeln!(out),
                Kind::Prefixes => writeln!(out, "/{}", element.prefix.length),
                Kind::HostPorts => writeln!(out, ",tcp:{}", element.port),
            };
        }
        out
    }

    /// The rule on the set, in a chain of a table.
    fn rule_text(&self, table: &str, chain: &str) -> String {
        let flags = if self.workload.kind == Kind::HostPorts { "src,dst" } else { "src" };
        format!("*{table}\n:{chain} ACCEPT [0:0]\n-A {chain} -m set --match-set s {flags} -j DROP\nCOMMIT\n")
    }

    /// The set and its rule for nft, or as a verdict map.
    fn nft_text(&self, verdicts: bool) -> String {
        let mut out = String::from("table ip bench {\n");
        let (key, fields) = match self.workload.kind {
            Kind::HostPorts => ("ipv4_addr . inet_service", "ip saddr . tcp dport"),
            _ => ("ipv4_addr", "ip saddr"),
        };
        let to = if verdicts { " : verdict" } else { "" };
        _ = write!(out, "{} s {{\ntype {key}{to}\n", if verdicts { "map" } else { "set" });
        if self.workload.kind == Kind::Prefixes {
            out.push_str("flags interval\nauto-merge\n");
        }
        out.push_str("elements = {");
        for element in &self.elements {
            out.push_str(&self.address(element.prefix.address));
            _ = match self.workload.kind {
                Kind::Hosts => Ok(()),
                Kind::Prefixes => write!(out, "/{}", element.prefix.length),
                Kind::HostPorts => write!(out, " . {}", element.port),
            };
            out.push_str(if verdicts { " : drop," } else { "," });
        }
        let rule = if verdicts { format!("{fields} vmap @s") } else { format!("{fields} @s drop") };
        _ = write!(
            out,
            "}}\n}}\nchain pre {{\ntype filter hook prerouting priority raw; policy accept;\n{rule}\n}}\n}}\n"
        );
        out
    }

    fn lookup(&self) -> Lookup {
        match self.workload.kind {
            Kind::Hosts => Lookup::Hash,
            Kind::Prefixes => Lookup::Trie,
            Kind::HostPorts => Lookup::HashPort,
        }
    }

    /// A program with the set in one of the kernel's own maps, how long filling it took, and the map's bytes.
    fn kernel_map(&self, lookup: Lookup) -> Result<(Loaded, Duration, usize), String> {
        let family = self.workload.family;
        let object = member(ProgramKind::Xdp, family, lookup, self.elements.len() as u32)?;
        let mut loaded = Loaded::load(&object)?;
        let start = Instant::now();
        match family {
            Family::V4 if lookup == Lookup::HashPort => self.fill_hash::<8>(&mut loaded)?,
            Family::V4 if lookup == Lookup::Trie => self.fill_trie::<4>(&mut loaded)?,
            Family::V6 if lookup == Lookup::Trie => self.fill_trie::<16>(&mut loaded)?,
            Family::V4 => self.fill_hash::<4>(&mut loaded)?,
            Family::V6 => self.fill_hash::<16>(&mut loaded)?,
        }
        let time = start.elapsed();
        let bytes = map_bytes(&loaded)?;
        Ok((loaded, time, bytes))
    }

    fn key<const N: usize>(&self, element: &Element) -> [u8; N] {
        let address = element.prefix.address.to_be_bytes();
        let bytes = usize::from(address_bits(self.workload.family) / 8);
        let mut key = [0; N];
        key[..bytes].copy_from_slice(&address[16 - bytes..]);
        if N > bytes {
            key[bytes..bytes + 2].copy_from_slice(&element.port.to_be_bytes());
        }
        key
    }

    fn fill_hash<const N: usize>(&self, loaded: &mut Loaded) -> Result<(), String>
    where
        [u8; N]: Pod,
    {
        let map = loaded.ebpf.map_mut(SET_MAP).ok_or("no set")?;
        let mut map = HashMap::<_, [u8; N], u32>::try_from(map).map_err(|error| format!("{error:?}"))?;
        for element in &self.elements {
            map.insert(self.key::<N>(element), 1, 0).map_err(|error| format!("{error:?}"))?;
        }
        Ok(())
    }

    fn fill_trie<const N: usize>(&self, loaded: &mut Loaded) -> Result<(), String>
    where
        [u8; N]: Pod,
    {
        let map = loaded.ebpf.map_mut(SET_MAP).ok_or("no set")?;
        let mut map = LpmTrie::<_, [u8; N], u32>::try_from(map).map_err(|error| format!("{error:?}"))?;
        for element in &self.elements {
            let key = lpm_trie::Key::new(u32::from(element.prefix.length), self.key::<N>(element));
            map.insert(&key, 1, 0).map_err(|error| format!("{error:?}"))?;
        }
        Ok(())
    }
}

/// Bytes that the kernel accounts for the set's map.
fn map_bytes(loaded: &Loaded) -> Result<usize, String> {
    let map = loaded.ebpf.map(SET_MAP).ok_or("no set")?;
    let fd = match map {
        aya::maps::Map::HashMap(data) | aya::maps::Map::LpmTrie(data) => data.fd().as_fd().as_raw_fd(),
        _ => return Err("the set is of another type".into()),
    };
    let text =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(|error| error.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    line.and_then(|value| value.trim().parse().ok()).ok_or_else(|| "no size of the map".into())
}

/// A contestant's numbers; `None` where there is none.
#[derive(Clone, Debug, Default)]
struct Row {
    name: String,
    scattered: Option<f64>,
    clustered: Option<f64>,
    wire: Option<f64>,
    bytes: Option<usize>,
    load: Option<Duration>,
}

impl Row {
    fn cells(&self, count: usize) -> Vec<String> {
        let or = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        vec![
            count.to_string(),
            self.name.clone(),
            or(self.scattered.map(ns)),
            or(self.clustered.map(ns)),
            or(self.wire.map(ns)),
            or(self.wire.map(|ns| format!("{:.2}", 1e3 / ns))),
            or(self.bytes.map(mb)),
            or(self.load.map(ms)),
        ]
    }
}

/// Measures one set; what could not be measured goes to `failures`.
fn measure(
    context: &mut Context,
    input: &Input,
    with_polc: bool,
    failures: &mut Vec<String>,
) -> Result<Vec<Row>, String> {
    let Workload { name, family, kind } = input.workload;
    let count = input.elements.len();
    let mut fail = |who: &str, error: String| {
        progress(&format!("  {count} {name}, {who}: {error}"));
        failures.push(format!("{count} {name}, {who}: {error}"));
    };
    let mut rows: Vec<Row> = Vec::new();
    let mut programs: Vec<Loaded> = Vec::new();
    if with_polc {
        let (rules, sets) = (input.rule_text("filter", "INPUT"), input.ipset_text());
        match on_all_cpus(|| Subject::new(name, &rules, Some(&sets), family, ProgramKind::Xdp))? {
            Ok(subject) => {
                for headers in [&input.scattered, &input.clustered] {
                    subject.check(ProgramKind::Xdp, headers, &input.accepts(headers), count)?;
                }
                let load = subject.cost.read + subject.cost.compile + subject.cost.load;
                rows.push(Row {
                    name: "polc, XDP".into(),
                    bytes: Some(subject.cost.table_bytes),
                    load: Some(load),
                    ..Row::default()
                });
                programs.push(subject.loaded);
            }
            Err(error) => fail("polc", error),
        }
    }
    let mut lookups = vec![input.lookup()];
    if kind == Kind::Hosts {
        lookups.push(Lookup::Trie);
    }
    for lookup in lookups {
        let map = if lookup == Lookup::Trie { "BPF LPM_TRIE, XDP" } else { "BPF HASH, XDP" };
        match input.kernel_map(lookup) {
            Ok((program, load, bytes)) => {
                rows.push(Row { name: map.into(), bytes: Some(bytes), load: Some(load), ..Row::default() });
                programs.push(program);
            }
            Err(error) => fail(map, error),
        }
    }
    let (nothing, parser) =
        (Loaded::load(&empty(ProgramKind::Xdp)?)?, Loaded::load(&parse_only(ProgramKind::Xdp, family)?)?);
    let mut random = Random::new(context.options.seed ^ 0x7365_7473);
    let mut order = || -> Vec<u32> {
        (0..POOL).map(|_| random.index(input.scattered.len().min(input.clustered.len())) as u32).collect()
    };
    let scattered = order();
    let pools =
        [Pool::new(family, &input.scattered, &scattered), Pool::new(family, &input.clustered, &order())];
    let rounds = context.options.rounds;
    let mut all = vec![&nothing, &parser];
    all.extend(&programs);
    let times = context.driver(ProgramKind::Xdp, Form::Fields(family))?.measure(&all, &pools, rounds)?;
    context.note(times.spread);
    for (row, ns) in rows.iter_mut().zip(&times.ns[2..]) {
        row.scattered = Some(ns[0] - times.ns[1][0]);
        row.clustered = Some(ns[1] - times.ns[1][1]);
    }
    if family == Family::V4 {
        let accepts: Vec<bool> =
            scattered.iter().map(|&at| !input.is_member(&input.scattered[at as usize])).collect();
        wire(context, input, &mut rows, programs, &pools[0], &accepts, &mut fail)?;
    }
    Ok(rows)
}

/// Adds end-to-end times, of the kernel's own sets too.
fn wire(
    context: &mut Context,
    input: &Input,
    rows: &mut Vec<Row>,
    programs: Vec<Loaded>,
    pool: &Pool,
    accepts: &[bool],
    fail: &mut dyn FnMut(&str, String),
) -> Result<(), String> {
    let rounds = context.options.rounds;
    let (wire, home) = context.wire()?;
    let mut lanes: Vec<(Lane, usize)> = Vec::new();
    for (at, program) in programs.into_iter().enumerate() {
        let mut lane = wire.lane(&rows[at].name)?;
        lane.attach(program, home)?;
        lanes.push((lane, at));
    }
    if rows.first().is_some_and(|row| row.name.starts_with("polc")) {
        let (rules, sets) = (input.rule_text("filter", "INPUT"), input.ipset_text());
        let subject = Subject::new("tc", &rules, Some(&sets), Family::V4, ProgramKind::Classifier)?;
        let mut lane = wire.lane("polc, tc")?;
        lane.attach(subject.loaded, home)?;
        lanes.push((lane, rows.len()));
        rows.push(Row { name: "polc, tc".into(), ..Row::default() });
    }
    let set_type = match input.workload.kind {
        Kind::Hosts => "hash:ip",
        Kind::Prefixes => "hash:net",
        Kind::HostPorts => "hash:ip,port",
    };
    let interval = if input.workload.kind == Kind::Prefixes { "interval " } else { "" };
    // An interval map refuses prefixes inside prefixes; a set merges them.
    let kinds = if input.workload.kind == Kind::Prefixes { 2 } else { 3 };
    for which in 0..kinds {
        let name = match which {
            0 => format!("iptables, ipset {set_type}"),
            1 => format!("nft {interval}set"),
            _ => "nft verdict map".into(),
        };
        let lane = wire.lane(&name)?;
        let start = Instant::now();
        let done = match which {
            0 => lane.run(&["ipset", "restore"], &input.ipset_text()).map(|_| start.elapsed()).and_then(
                |time| {
                    let rules = input.rule_text("raw", "PREROUTING");
                    lane.run(&["iptables-legacy-restore", "-w", "-n"], &rules).map(|_| time)
                },
            ),
            _ => lane.run(&["nft", "-f", "-"], &input.nft_text(which == 2)).map(|_| start.elapsed()),
        };
        match done {
            Ok(time) => {
                let bytes = if which == 0 { ipset_bytes(&lane) } else { None };
                lanes.push((lane, rows.len()));
                rows.push(Row { name, load: Some(time), bytes, ..Row::default() });
            }
            Err(error) => fail(&name, error),
        }
    }
    let (mut lanes, places): (Vec<Lane>, Vec<usize>) = lanes.into_iter().unzip();
    let times = wire.measure(&mut lanes, pool, accepts, rounds)?;
    for ((timed, at), lane) in times.iter().zip(places).zip(&lanes) {
        if !timed.is_right() {
            let (found, expected) = timed.accepted;
            return Err(format!(
                "WRONG VERDICTS: {} elements, {}: accepted {found} packets instead of {expected}",
                input.elements.len(),
                lane.name
            ));
        }
        rows[at].wire = Some(timed.ns);
    }
    context.note(times.iter().map(|timed| timed.spread).fold(1.0, f64::max));
    Ok(())
}

fn ipset_bytes(lane: &Lane) -> Option<usize> {
    let text = lane.run(&["ipset", "list", "-t", "s"], "").ok()?;
    text.lines().find_map(|line| line.strip_prefix("Size in memory: "))?.trim().parse().ok()
}

/// Runs it.
///
/// # Errors
/// A wrong verdict, or the kernel's word.
pub(crate) fn run(context: &mut Context) -> Result<Section, String> {
    let mut section = Section::new("sets", "Big sets: hosts, prefixes, hosts with ports");
    section.text(format!(
        "One rule, `-m set --match-set s src -j DROP`. *Scattered*, *clustered*: ns over parsing at XDP; {DISTINCT} \
         different packets, half of them members, of the whole set or of 1,024 runs of {NEIGHBOURS} neighbours. *Wire*: \
         ns a packet end to end (scattered), kernel rules in the raw table's PREROUTING. *Load*: from the set's text \
         (BPF maps: element by element) to a program in place, ms, with all CPUs. Goals at 1M: 250 ns scattered, 50 ns \
         clustered, 40 MB, 300 ms."
    ));
    let quick = context.options.quick;
    let mut failures = Vec::new();
    for workload in WORKLOADS.iter().take(if quick { 2 } else { WORKLOADS.len() }) {
        let mut table = Table::new(&[
            "elements",
            "contestant",
            "scattered",
            "clustered",
            "wire",
            "Mpps",
            "memory, MB",
            "load, ms",
        ]);
        let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        let mut with_polc = true;
        for count in [1_000, 10_000, 100_000, 1_000_000] {
            let skipped = quick && (count == 10_000 || count == 1_000_000);
            if context.options.size.map_or(skipped, |size| size != count) {
                continue;
            }
            let input = Input::new(*workload, count, context.options.seed);
            if !with_polc {
                failures.push(format!("{count} {}, polc: a tenth took too long", workload.name));
            }
            let rows = measure(context, &input, with_polc, &mut failures)?;
            with_polc &= rows.first().is_some_and(|row| {
                row.name.starts_with("polc") && row.load.is_some_and(|time| time < PATIENCE)
            });
            for row in rows {
                let cells = row.cells(count);
                progress(&format!("  {}: {}", workload.name, cells.join("  ")));
                table.row(cells);
                if let Some(time) = row.scattered {
                    match lines.iter_mut().find(|(name, _)| *name == row.name) {
                        Some((_, points)) => points.push((count as f64, time)),
                        None => lines.push((row.name.clone(), vec![(count as f64, time)])),
                    }
                }
            }
        }
        section.text(format!("### {}", workload.name));
        section.table(table);
        lines.retain(|(_, points)| points.len() > 1);
        if !lines.is_empty() {
            section.plot(Plot {
                name: format!("sets-{}", workload.name.replace(", ", "-").replace(' ', "-").to_lowercase()),
                title: format!("{}: ns over parsing, scattered packets", workload.name),
                x: "elements".into(),
                y: "ns a packet".into(),
                lines,
            });
        }
    }
    if !failures.is_empty() {
        section.text(format!("Not measured: {}.", failures.join("; ")));
    }
    if context.spread > NOISY {
        section.text(noise(context.spread));
    }
    Ok(section)
}
