//! Packets as `polc trace` writes them: for people, or as JSON, to a reader who may not read.

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use polc::guard::GUARD_NUMBER;
use polc_backend_ebpf::trace::{Event, EventTransport, Tally};
use polc_frontend_iptables::names;
use polc_ir::env::Attach;
use polc_ir::hook::Hook;
use polc_ir::source::bytes::of_text;
use polc_loader::sys::{Signals, Sys};
use serde::Serialize;

use super::super::counted;
use super::{Devices, Watched};
use crate::cli::{TextFormat, TraceArgs};
use crate::failure::Failure;

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
pub(super) struct Stream<'s> {
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
    pub(super) fn new(args: &TraceArgs, sys: &'s Sys, signals: &'s Signals) -> Stream<'s> {
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

    /// What asks it to end.
    pub(super) fn signals(&self) -> &'s Signals {
        self.signals
    }

    /// Whether nobody wants more.
    pub(super) fn is_over(&self) -> bool {
        self.broken || self.left == Some(0)
    }

    pub(super) fn packet(
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
    pub(super) fn not_reported(&mut self, tally: Tally) -> Result<(), Failure> {
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
    pub(super) fn finish_round(&mut self, tally: Tally) {
        self.before = self.before + tally;
        self.told = Tally::default();
    }

    pub(super) fn summary(&self) -> String {
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
    pub(super) fn flush(&mut self) -> Result<(), Failure> {
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
