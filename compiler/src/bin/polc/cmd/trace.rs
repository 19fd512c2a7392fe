//! `polc trace`: packets as applied policies decide them, through the programs' ring buffers.
//!
//! A program reports only while somebody watches, so whatever ends this command (a signal, a reader that goes away, a
//! policy that is replaced or removed) ends in switching reports off again. What was not reported is counted in the
//! kernel; since counts are read after the last program run has ended, packets shown and packets not shown are all there
//! were. A policy that takes another's place reports from its first packet on ([`polc_loader::wish`]), so that holds for
//! both together.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polc::guard::GUARD_NUMBER;
use polc::watch;
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::trace::{Config, Event, EventTransport, Pattern, Tally};
use polc_frontend_iptables::names;
use polc_ir::env::Attach;
use polc_ir::hook::Hook;
use polc_ir::source::bytes::of_text;
use polc_loader::events::{self, Ends, TraceMaps, Watch};
use polc_loader::state::SlotName;
use polc_loader::status::Open;
use polc_loader::store::Lock;
use polc_loader::sys::{Signals, Sys};
use polc_loader::wish::Wish;
use polc_loader::{Error, net};
use serde::Serialize;

use super::applied::{self, Opened};
use super::{counted, live};
use crate::cli::{TextFormat, TraceArgs};
use crate::failure::Failure;
use crate::output::Output;

/// How often is told what was not reported, and asked whether the policies are still there.
const CHECK: Duration = Duration::from_secs(1);
/// How often is looked whether something was changed, so that it has to be asked.
const LOOK: Duration = Duration::from_millis(50);
/// Reports of one policy that are taken at once, to be put in order with those of the others: more than its buffer holds.
const BATCH_MAX: usize = 4_096;

pub(super) fn run(args: &TraceArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let Opened { mut policies, failed, .. } = applied::open_some(&sys, &args.slots, output)?;
    let mut devices = Devices::new(&sys)?;
    let patterns = watch::filter(&args.filter, &|name| devices.number(name)).map_err(Failure::Usage)?;
    let signals = sys.signals().map_err(Error::call("wait for signals"))?;
    let mut stream = Stream::new(args, &sys, &signals);
    let asked = Asked::new(&sys, args, patterns, output);
    let mut held = BTreeMap::new();
    let result = loop {
        match asked.watch_policies(&policies, &mut held, &mut devices, &mut stream) {
            Ok(End::Asked) => break Ok(()),
            Ok(End::Changed) => {}
            Err(failure) => break Err(failure),
        }
        policies = match applied::open_all(&sys, &args.slots, output) {
            Ok(Opened { policies, failed, .. }) if policies.is_empty() && failed.is_empty() => {
                output.remark("what was watched is not applied any more\n");
                break Ok(());
            }
            // Of those that can't be opened the last one is told, at the end.
            Ok(Opened { policies, failed, .. }) if policies.is_empty() => {
                break live::all_well(failed, output).map(|_| ());
            }
            Ok(opened) => opened.policies,
            Err(failure) => break Err(failure),
        };
        output.remark("a policy was replaced or removed; going on with what is applied now\n");
    };
    // Some may have been left on for another look that did not come.
    for policy in policies.iter().filter(|policy| Held::of(&held, policy).is_some()) {
        if let Some(maps) = TraceMaps::of(&policy.object.manifest, |name| policy.map(name)) {
            events::switch_off(&sys, maps);
        }
    }
    output.remark(&stream.summary());
    result.and_then(|()| live::all_well(failed, output))
}

/// Why watching ended.
enum End {
    /// Somebody wants it, or nobody reads any more.
    Asked,
    /// A policy is no longer attached.
    Changed,
}

/// The generation of a slot that was watched last; nobody else watches it meanwhile.
struct Held {
    number: u32,
    _lock: Lock,
    /// If it was left reporting while others are looked at again, what it had reported by then.
    left_on: Option<Tally>,
}

impl Held {
    fn of<'h>(held: &'h BTreeMap<SlotName, Held>, policy: &Open) -> Option<&'h Held> {
        held.get(&policy.slot).filter(|held| held.number == policy.number)
    }
}

/// What is asked for.
struct Asked<'a> {
    sys: &'a Sys,
    args: &'a TraceArgs,
    wish: Wish,
    config: Config,
    output: &'a Output,
}

impl<'a> Asked<'a> {
    fn new(sys: &'a Sys, args: &'a TraceArgs, patterns: Vec<Pattern>, output: &'a Output) -> Asked<'a> {
        let verdicts = args.verdict.iter().map(|verdict| verdict.word().to_string()).collect();
        let wish = Wish { verdicts, chain: args.chain.clone(), line: args.line, ..Wish::default() };
        let config = Config { on: true, patterns, rate: args.rate, burst: args.rate };
        Asked { sys, args, wish, config, output }
    }

    /// Watches policies until somebody wants it to end, or one of them is no longer attached.
    fn watch_policies(
        &self,
        policies: &[Open],
        held: &mut BTreeMap<SlotName, Held>,
        devices: &mut Devices<'_>,
        stream: &mut Stream<'_>,
    ) -> Result<End, Failure> {
        let (sys, output) = (self.sys, self.output);
        let (mut watched, mut watches) = (Vec::new(), Vec::new());
        let (mut any, mut changed) = (false, false);
        for policy in policies {
            let manifest = &policy.object.manifest;
            let Some(maps) = TraceMaps::of(manifest, |name| policy.map(name)) else { continue };
            any |= manifest.counters.iter().any(|slot| self.wish.wants(slot));
            match self.watch(policy, maps, held) {
                Ok(watch) => watches.push(watch),
                // It may have been replaced since it was opened.
                Err(_) if !policy.is_attached(sys)? => {
                    changed = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            watched.push(Watched::new(policy));
        }
        if watches.is_empty() && !changed {
            let first = policies.first().map_or_else(String::new, |policy| policy.slot.to_string());
            return Err(Error::NoReports(first).into());
        }
        if !any {
            return Err(Failure::Usage(nobody_decides(self.args)));
        }
        for policy in policies.iter().filter(|policy| policy.object.manifest.trace.is_none()) {
            output.remark(&format!("{}: applied without reports, so not shown\n", policy.slot));
        }
        for Watched { policy, .. } in &watched {
            output.remark(&format!("watching {}: {}\n", policy.slot, policy.generation.source));
        }
        let end = if changed { Ok(End::Changed) } else { show(sys, &mut watches, &watched, devices, stream) };
        // Whatever the end was: switch off, show what is still there, and only then count. What is still in force goes on
        // reporting while the others are looked at again.
        let mut tally = Tally::default();
        for (watch, Watched { policy, .. }) in watches.iter_mut().zip(&watched) {
            let stays = matches!(end, Ok(End::Changed)) && policy.is_attached(sys)?;
            if !stays {
                watch.stop()?;
            }
            let told = watch.tally()?;
            if let Some(held) = held.get_mut(&policy.slot).filter(|_| stays) {
                held.left_on = Some(watch.leave_on(told));
            }
            tally = tally + told;
        }
        if end.is_ok() {
            take(&mut watches, &watched, devices, stream)?;
        }
        stream.not_reported(tally)?;
        stream.finish_round(tally);
        end
    }

    /// Watches a policy's reports: goes on with them where the policy was watched before, or took the place of one that
    /// was, else switches them on.
    fn watch<'o>(
        &self,
        policy: &'o Open,
        maps: TraceMaps<'o>,
        held: &mut BTreeMap<SlotName, Held>,
    ) -> Result<Watch<'o>, Error>
    where
        'a: 'o,
    {
        let sys = self.sys;
        let counters = &policy.object.manifest.counters;
        let wanted = |slot: usize| counters.get(slot).is_some_and(|slot| self.wish.wants(slot));
        let before = held.get(&policy.slot).map(|held| (held.number, held.left_on));
        let is_new = before.is_none_or(|(number, _)| number != policy.number);
        if is_new {
            let _lock = policy.lock_reports(sys)?;
            held.insert(policy.slot.clone(), Held { number: policy.number, _lock, left_on: None });
        }
        let handed_on = policy.wish(sys)?.filter(|wish| wish.is_like(&self.wish) && wish.after.is_some());
        let start = match before {
            Some((_, left_on)) if !is_new => left_on,
            Some(_) => handed_on.as_ref().map(|wish| wish.start),
            None => None,
        };
        let watch = match start {
            Some(start) => Watch::take_over(sys, maps, &self.config, wanted, start)?,
            None => None,
        };
        let is_next = handed_on.and_then(|wish| wish.after) == before.map(|(number, _)| number);
        if is_new && before.is_some() && !(watch.is_some() && is_next) {
            self.output.remark(&format!(
                "{}: what was decided between the two policies that were watched is neither shown nor counted as not reported\n",
                policy.slot
            ));
        }
        match watch {
            Some(watch) => Ok(watch),
            None => {
                policy.leave_wish(sys, &self.wish)?;
                Watch::start(sys, maps, &self.config, wanted)
            }
        }
    }
}

/// Shows packets until something ends it.
fn show(
    sys: &Sys,
    watches: &mut [Watch<'_>],
    watched: &[Watched<'_>],
    devices: &mut Devices<'_>,
    stream: &mut Stream<'_>,
) -> Result<End, Failure> {
    let stdout = io::stdout();
    let ends = Ends { signals: Some(stream.signals), output: Some(stdout.as_fd()) };
    let mut checked = Instant::now();
    let mut notes: Vec<Option<String>> = vec![None; watched.len()];
    loop {
        let ended = events::wait(sys, watches, ends, LOOK)?;
        take(watches, watched, devices, stream)?;
        if ended || stream.is_over() {
            return Ok(End::Asked);
        }
        let is_due = checked.elapsed() >= CHECK;
        if is_due {
            checked = Instant::now();
            let mut tally = Tally::default();
            for watch in watches.iter() {
                tally = tally + watch.tally()?;
            }
            stream.not_reported(tally)?;
        }
        for (Watched { policy, .. }, before) in watched.iter().zip(&mut notes) {
            let note = policy.note(sys)?;
            if (is_due || note != *before) && !policy.is_attached(sys)? {
                return Ok(End::Changed);
            }
            *before = note;
        }
    }
}

/// Shows reports of each policy, no more than [`BATCH_MAX`], in the order of their times.
fn take(
    watches: &mut [Watch<'_>],
    watched: &[Watched<'_>],
    devices: &mut Devices<'_>,
    stream: &mut Stream<'_>,
) -> Result<(), Failure> {
    let mut batch = Vec::new();
    for (watch, policy) in watches.iter_mut().zip(watched) {
        batch.extend(std::iter::from_fn(|| watch.take()).take(BATCH_MAX).map(|event| (event, policy)));
    }
    batch.sort_by_key(|(event, _)| event.time_ns);
    for (event, policy) in batch {
        if stream.is_over() {
            break;
        }
        stream.packet(&event, policy, devices)?;
    }
    stream.flush()
}

fn nobody_decides(args: &TraceArgs) -> String {
    let mut wanted = Vec::new();
    if !args.verdict.is_empty() {
        let words: Vec<&str> = args.verdict.iter().map(|verdict| verdict.word()).collect();
        wanted.push(format!("with verdict {}", words.join(" or ")));
    }
    wanted.extend(args.chain.as_ref().map(|chain| format!("in chain `{chain}`")));
    wanted.extend(args.line.map(|line| format!("by a rule in line {line}")));
    format!("no packet is ever decided {}; `polc save` prints the applied rules", wanted.join(", "))
}

/// A policy being watched.
struct Watched<'o> {
    policy: &'o Open,
    manifest: &'o Manifest,
    /// By counter slot.
    hooks: Vec<Option<Hook>>,
}

impl Watched<'_> {
    fn new(policy: &Open) -> Watched<'_> {
        let manifest = &policy.object.manifest;
        let hooks = manifest.counters.iter().map(|slot| applied::hook_of(manifest, slot)).collect();
        Watched { policy, manifest, hooks }
    }
}

/// Names of devices by number.
struct Devices<'s> {
    sys: &'s Sys,
    names: BTreeMap<u32, String>,
    asked: Instant,
}

impl Devices<'_> {
    fn new(sys: &Sys) -> Result<Devices<'_>, Error> {
        let names = net::devices(sys)?.into_iter().map(|device| (device.ifindex, device.name)).collect();
        Ok(Devices { sys, names, asked: Instant::now() })
    }

    fn number(&self, name: &str) -> Option<u32> {
        self.names.iter().find(|(_, own)| *own == name).map(|(number, _)| *number)
    }

    /// The device's name; `#7` if the kernel has none.
    fn name(&mut self, number: u32) -> String {
        if !self.names.contains_key(&number)
            && self.asked.elapsed() >= CHECK
            && let Ok(again) = Devices::new(self.sys)
        {
            *self = Devices { ..again };
        }
        self.names.get(&number).cloned().unwrap_or_else(|| format!("#{number}"))
    }
}

/// A packet as docs/trace-schema.json describes it.
#[derive(Debug, Serialize)]
struct Packet<'a> {
    time: String,
    attach: Attach,
    #[serde(skip_serializing_if = "Option::is_none")]
    hook: Option<Hook>,
    device: String,
    verdict: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    text: &'a str,
    ether_type: u16,
    #[serde(flatten)]
    ip: Option<Ip>,
    length: u32,
    mark: u32,
}

/// What only IP packets have.
#[derive(Debug, Serialize)]
struct Ip {
    proto: String,
    src: std::net::IpAddr,
    dst: std::net::IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    sport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_type: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp_code: Option<u8>,
    later_fragment: bool,
}

/// A line that stands for packets that were not reported.
#[derive(Debug, Serialize)]
struct Gap {
    not_reported: NotReported,
}

#[derive(Debug, Serialize)]
struct NotReported {
    over_rate: u64,
    buffer_full: u64,
}

/// Where packets are written, and how many were.
struct Stream<'s> {
    format: TextFormat,
    rate: u32,
    left: Option<u64>,
    sys: &'s Sys,
    signals: &'s Signals,
    /// What is still to be written.
    out: Vec<u8>,
    /// Wall-clock time less the programs' clock, in nanoseconds.
    offset_ns: i128,
    broken: bool,
    /// The reader did not read all in time.
    unread: bool,
    shown: u64,
    /// Told since the round began, and by all rounds before it.
    told: Tally,
    before: Tally,
}

impl<'s> Stream<'s> {
    fn new(args: &TraceArgs, sys: &'s Sys, signals: &'s Signals) -> Stream<'s> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128);
        Stream {
            format: args.format,
            rate: args.rate,
            left: args.count,
            sys,
            signals,
            out: Vec::new(),
            offset_ns: now - i128::from(sys.monotonic_ns()),
            broken: false,
            unread: false,
            shown: 0,
            told: Tally::default(),
            before: Tally::default(),
        }
    }

    /// Whether nobody wants more.
    fn is_over(&self) -> bool {
        self.broken || self.left == Some(0)
    }

    fn packet(
        &mut self,
        event: &Event,
        watched: &Watched<'_>,
        devices: &mut Devices<'_>,
    ) -> Result<(), Failure> {
        let slot = event.slot as usize;
        let Some(decided) = watched.manifest.counters.get(slot) else { return Ok(()) };
        let time = jiff::Timestamp::from_nanosecond(self.offset_ns + i128::from(event.time_ns));
        let time = time.unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let packet = Packet {
            time: format!("{time:.9}"),
            attach: watched.policy.slot.attach,
            hook: watched.hooks[slot],
            device: devices.name(event.ifindex),
            verdict: decided.verdict.as_deref().unwrap_or_default(),
            table: decided.table.as_deref(),
            chain: decided.chain.as_deref(),
            rule: decided.rule.filter(|rule| *rule != GUARD_NUMBER),
            // What polc adds to a chain is in no line.
            file: decided.file.as_deref().filter(|_| decided.rule != Some(GUARD_NUMBER)),
            line: decided.line.filter(|_| decided.rule != Some(GUARD_NUMBER)),
            text: decided.text.trim(),
            ether_type: event.ether_type,
            ip: ip(event),
            length: event.length,
            mark: event.mark,
        };
        let text = match self.format {
            TextFormat::Json => serde_json::to_string(&packet).expect("plain data serializes"),
            TextFormat::Human => human(&packet, time),
        };
        self.line(&text)?;
        self.shown += 1;
        self.left = self.left.map(|left| left - 1);
        Ok(())
    }

    /// Tells how many packets were not reported since it was last told.
    fn not_reported(&mut self, tally: Tally) -> Result<(), Failure> {
        let not_reported = NotReported {
            over_rate: tally.limited.saturating_sub(self.told.limited),
            buffer_full: tally.full.saturating_sub(self.told.full),
        };
        self.told = tally;
        if not_reported.over_rate + not_reported.buffer_full == 0 {
            return Ok(());
        }
        let text = match self.format {
            TextFormat::Json => serde_json::to_string(&Gap { not_reported }).expect("plain data serializes"),
            TextFormat::Human => format!("... {}", self.missing(&not_reported)),
        };
        self.line(&text)?;
        self.flush()
    }

    fn missing(&self, NotReported { over_rate, buffer_full }: &NotReported) -> String {
        let mut parts = Vec::new();
        if *over_rate > 0 {
            parts.push(format!("{over_rate} over {} a second on a CPU (--rate)", self.rate));
        }
        if *buffer_full > 0 {
            parts.push(format!("{buffer_full} because the buffer was full"));
        }
        format!("{} not reported: {}", packets(over_rate + buffer_full), parts.join(", "))
    }

    /// What is told from now on is told of the next round's watches.
    fn finish_round(&mut self, tally: Tally) {
        self.before = self.before + tally;
        self.told = Tally::default();
    }

    fn summary(&self) -> String {
        let Tally { reported, limited, full } = self.before;
        let mut text = format!("{} shown", packets(self.shown));
        if self.unread {
            text += ", not all of which were read";
        }
        if reported > self.shown {
            text += &format!(", {} reported after the last one wanted", packets(reported - self.shown));
        }
        if limited + full > 0 {
            text += &format!(", {}", self.missing(&NotReported { over_rate: limited, buffer_full: full }));
        }
        text + "\n"
    }

    fn line(&mut self, text: &str) -> Result<(), Failure> {
        match self.format {
            TextFormat::Json => self.out.extend_from_slice(text.as_bytes()),
            TextFormat::Human => self.out.extend_from_slice(&of_text(text)),
        }
        self.out.push(b'\n');
        if self.out.len() < OUT_BYTES { Ok(()) } else { self.flush() }
    }

    /// Writes what there is as its reader takes it. A reader that goes away is no failure; one that does not read keeps
    /// nobody from ending the command.
    fn flush(&mut self) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::write("standard output".as_ref(), error);
        // Without the standard library's buffer, which writes when it likes.
        let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        let mut stdout = std::fs::File::from(stdout);
        let mut out = std::mem::take(&mut self.out);
        let mut rest = out.as_slice();
        while !rest.is_empty() && !self.broken {
            let ready =
                self.sys.wait_writable(&[self.signals.as_fd()], stdout.as_fd(), None).map_err(failed)?;
            let takes = ready[1]
                || ready[0]
                    && self.sys.wait_writable(&[], stdout.as_fd(), Some(LAST_WORDS)).map_err(failed)?[0];
            self.unread |= ready[0] && !takes;
            self.broken |= self.unread;
            if takes {
                let part = &rest[..rest.len().min(PART_BYTES)];
                match stdout.write(part) {
                    Ok(written) => rest = &rest[written..],
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.broken = true,
                    Err(error)
                        if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                    }
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        out.clear();
        self.out = out;
        Ok(())
    }
}

/// How long a reader that does not read is waited for once the command is to end.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// What is gathered before it is written.
const OUT_BYTES: usize = 16 << 10;
/// What a pipe takes without blocking once it takes anything: a page (fs/pipe.c, `pipe_poll`).
const PART_BYTES: usize = 4_096;

fn packets(count: u64) -> String {
    counted(count as usize, "packet")
}

fn ip(event: &Event) -> Option<Ip> {
    let ip = event.ip?;
    let proto = names::protocol_name(ip.proto.into()).map_or_else(|| ip.proto.to_string(), str::to_string);
    let mut found = Ip {
        proto,
        src: ip.src,
        dst: ip.dst,
        sport: None,
        dport: None,
        icmp_type: None,
        icmp_code: None,
        later_fragment: ip.transport == EventTransport::LaterFragment,
    };
    match ip.transport {
        EventTransport::Ports(sport, dport) => (found.sport, found.dport) = (Some(sport), Some(dport)),
        EventTransport::Icmp(kind, code) => (found.icmp_type, found.icmp_code) = (Some(kind), Some(code)),
        EventTransport::None | EventTransport::LaterFragment => {}
    }
    Some(found)
}

/// A packet in one line: when, where, the verdict, the packet, and who decided.
fn human(packet: &Packet<'_>, time: jiff::Timestamp) -> String {
    let clock = time.to_zoned_datetime(jiff::tz::TimeZone::system()).strftime("%H:%M:%S.%6f").to_string();
    let mut text = format!("{clock} {} {} ", packet.device, packet.attach);
    if let Some(hook) = packet.hook {
        text += &format!("{hook} ");
    }
    text += &format!("{:<6} ", packet.verdict);
    match &packet.ip {
        Some(ip) => {
            let end = |address: std::net::IpAddr, port: Option<u16>| match port {
                Some(port) => std::net::SocketAddr::new(address, port).to_string(),
                None => address.to_string(),
            };
            text += &format!("{} {} > {}", ip.proto, end(ip.src, ip.sport), end(ip.dst, ip.dport));
            if let (Some(kind), Some(code)) = (ip.icmp_type, ip.icmp_code) {
                text += &format!(" type {kind} code {code}");
            }
            if ip.later_fragment {
                text += " later fragment";
            }
        }
        None => text += &format!("ether type {:#06x}", packet.ether_type),
    }
    text += &format!(" length {}", packet.length);
    if packet.mark != 0 {
        text += &format!(" mark {:#x}", packet.mark);
    }
    match (packet.file, packet.line) {
        (Some(file), Some(line)) => text + &format!("  {file}:{line}: {}", packet.text),
        _ => text + &format!("  {}", packet.text),
    }
}
