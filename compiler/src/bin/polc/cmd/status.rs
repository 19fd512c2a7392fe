//! `polc status`: what is applied where, since when, and what it does.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polc_ir::env::{Attach, Mode};
use polc_ir::hook::{Family, Hook};
use polc_loader::Error;
use polc_loader::counters::{self, Verdicts};
use polc_loader::net::{self, Device};
use polc_loader::state::Via;
use polc_loader::status::Open;
use polc_loader::sys::Sys;
use serde::Serialize;

use super::applied::{self, Opened};
use super::{counted, live};
use crate::cli::{StatusArgs, TextFormat};
use crate::failure::Failure;
use crate::output::Output;

/// One applied policy, as docs/status-schema.json describes it.
#[derive(Debug, Serialize)]
struct Policy {
    attach: Attach,
    device: Option<String>,
    /// What the device is called now, if it was renamed.
    device_now: Option<String>,
    hook: Option<Hook>,
    family: u8,
    mode: Option<Mode>,
    source: String,
    path: Vec<Hook>,
    generation: u32,
    /// RFC 3339, in UTC.
    since: String,
    /// Seconds since 1970.
    applied: u64,
    via: &'static str,
    program: u32,
    tag: String,
    instructions: u32,
    machine_code_bytes: u32,
    /// Whether packets are being reported to `polc trace`; none if the program can't.
    reports: Option<bool>,
    /// Whether `polc watch` makes it leave every packet to the kernel; none if that can't be.
    suspended: Option<bool>,
    /// Milliseconds until it goes back unless confirmed.
    goes_back_in_ms: Option<u64>,
    rules: usize,
    maps: Vec<Map>,
    verdicts: BTreeMap<&'static str, Rate>,
}

#[derive(Debug, Serialize)]
struct Map {
    name: String,
    id: u32,
    /// In use; none for tables that are one element, and ring buffers.
    entries: Option<u32>,
    entries_max: Option<u32>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Rate {
    packets: u64,
    bytes: u64,
    /// None without --sample.
    packets_per_second: Option<f64>,
    bytes_per_second: Option<f64>,
}

pub(super) fn run(args: &StatusArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let Opened { policies: opened, failed, .. } = applied::open_all(&sys, &args.slots, output)?;
    if opened.is_empty() && failed.is_empty() {
        live::device_exists(&sys, &args.slots)?;
    }
    let read = |policy: &Open| -> Result<(Instant, Verdicts), Error> {
        let slots = counters::by_slot(&sys, policy)?;
        Ok((Instant::now(), counters::by_verdict(&policy.object.manifest, &slots)))
    };
    let before = opened.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let sample = args.sample > 0 && !opened.is_empty();
    if sample {
        std::thread::sleep(Duration::from_millis(args.sample.into()));
    }
    let devices = net::devices(&sys)?;
    let mut policies = Vec::new();
    for (policy, (began, before)) in opened.iter().zip(before) {
        let (ended, after) = read(policy)?;
        let seconds = (ended - began).as_secs_f64();
        let rates = after.named().into_iter().zip(before.named()).map(|((verdict, after), (_, before))| {
            let grown = after.since(before);
            let rate = Rate {
                packets: after.packets,
                bytes: after.bytes,
                packets_per_second: sample.then(|| grown.packets as f64 / seconds),
                bytes_per_second: sample.then(|| grown.bytes as f64 / seconds),
            };
            (verdict, rate)
        });
        policies.push(describe(&sys, policy, &devices, rates.collect())?);
    }
    match args.format {
        TextFormat::Json => output.json(&policies)?,
        TextFormat::Human => {
            let text: String =
                policies.iter().zip(&opened).map(|(policy, open)| human(policy, open)).collect();
            let nothing = text.is_empty() && failed.is_empty();
            output.result(if nothing { "nothing is applied\n" } else { &text })?;
        }
    }
    live::tell_of_gone(&sys, &args.slots.store, output)?;
    live::all_well(failed, output)
}

/// How a policy's program is attached.
pub(super) fn via(policy: &Open) -> &'static str {
    match policy.via {
        Via::Link if policy.slot.attach == Attach::Xdp => "xdp link",
        Via::Link => "tcx link",
        Via::Clsact { .. } => "clsact filter",
        Via::Dispatch { .. } => "netfilter link",
    }
}

/// The program's tag, in hexadecimal digits as bpftool prints it.
pub(super) fn tag(policy: &Open) -> String {
    policy.program.tag.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A point in time, in seconds since 1970.
fn time(seconds: u64) -> jiff::Timestamp {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX)
}

fn describe(
    sys: &Sys,
    policy: &Open,
    devices: &[Device],
    verdicts: BTreeMap<&'static str, Rate>,
) -> Result<Policy, Error> {
    let goes_back_in_ms = match &policy.unconfirmed {
        Some(confirm) => {
            let now = sys.uptime_ms().map_err(Error::call("read the clock"))?;
            Some(confirm.deadline_ms.saturating_sub(now))
        }
        None => None,
    };
    let maps = policy.fills(sys)?.into_iter().map(|fill| {
        let info = fill.map.info();
        Map {
            name: fill.name.to_string(),
            id: info.id,
            entries: fill.entries,
            entries_max: fill.entries.map(|_| info.max_entries),
            bytes: fill.bytes(),
        }
    });
    let rules = policy
        .object
        .manifest
        .counted
        .iter()
        .filter(|counted| counted.rule.is_some() && applied::is_users(counted));
    Ok(Policy {
        attach: policy.slot.attach,
        device: policy.slot.device.clone(),
        device_now: policy.renamed(devices).map(str::to_string),
        hook: policy.slot.hook,
        family: if policy.slot.family == Family::V4 { 4 } else { 6 },
        mode: policy.generation.mode,
        source: policy.generation.source.clone(),
        path: policy.object.manifest.path.clone(),
        generation: policy.number,
        since: time(policy.generation.applied).to_string(),
        applied: policy.generation.applied,
        via: via(policy),
        program: policy.program.id,
        tag: tag(policy),
        instructions: policy.program.xlated_bytes / 8,
        machine_code_bytes: policy.program.jited_bytes,
        reports: policy.reports(sys)?,
        suspended: policy.is_suspended(sys)?,
        goes_back_in_ms,
        rules: rules.count(),
        maps: maps.collect(),
        verdicts,
    })
}

fn human(policy: &Policy, open: &Open) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut text = format!("{}: {}", open.slot, policy.source);
    if let Some(mode) = policy.mode {
        let _ = write!(text, ", {mode} mode");
    }
    let _ = writeln!(text, ", {}", counted(policy.rules, "rule"));
    let since = time(policy.applied).to_zoned_datetime(jiff::tz::TimeZone::system());
    let hooks: Vec<String> = policy.path.iter().map(ToString::to_string).collect();
    let _ = writeln!(
        text,
        "  since {} ({} ago), generation {}, by {} for {}",
        since.strftime("%Y-%m-%d %H:%M:%S"),
        ago(now.saturating_sub(policy.applied)),
        policy.generation,
        policy.via,
        hooks.join(", "),
    );
    let reports = match policy.reports {
        None => "no reports",
        Some(false) => "reports off",
        Some(true) => "reports on",
    };
    let _ = writeln!(
        text,
        "  program {} tag {}, {}, {} bytes of machine code, {reports}",
        policy.program,
        policy.tag,
        counted(policy.instructions as usize, "instruction"),
        policy.machine_code_bytes,
    );
    if let Some(name) = &policy.device_now {
        let _ = writeln!(text, "  its device is called `{name}` now");
    }
    if policy.suspended == Some(true) {
        text += "  suspended: every packet is left to the kernel's own rules; `polc watch --once` says why\n";
    }
    if let Some(left) = policy.goes_back_in_ms {
        let _ = writeln!(text, "  goes back in {:.0} s unless confirmed", left as f64 / 1e3);
    }
    let shown = |(verdict, rate): &(&&str, &Rate)| rate.packets > 0 || ["accept", "drop"].contains(*verdict);
    for (verdict, rate) in policy.verdicts.iter().filter(shown) {
        let _ = write!(text, "  {verdict:<7} {:>12} packets {:>15} bytes", rate.packets, rate.bytes);
        if let Some(rate) = rate.packets_per_second {
            let _ = write!(text, "   {rate:.0} packets/s");
        }
        text.push('\n');
    }
    for Map { name, id, entries, entries_max, bytes } in &policy.maps {
        let fill = match (entries, entries_max) {
            (Some(entries), Some(most)) => format!(", {entries} of {most} entries"),
            _ => String::new(),
        };
        let _ = writeln!(text, "  map {name:<14} id {id:<6} {bytes:>10} bytes{fill}");
    }
    text
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
