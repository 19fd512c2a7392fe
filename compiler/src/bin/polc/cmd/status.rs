//! `polc status`: what is applied where, since when, and what it does.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_ir::env::{Attach, Mode};
use polc_ir::hook::{Family, Hook};
use polc_loader::Error;
use polc_loader::state::Via;
use polc_loader::status::{Open, open};
use polc_loader::sys::Sys;
use serde::Serialize;

use super::{counted, live};
use crate::cli::{StatusArgs, TextFormat};
use crate::failure::Failure;
use crate::output::Output;

/// One applied policy, as docs/live.md describes it.
#[derive(Debug, Serialize)]
struct Policy {
    attach: Attach,
    device: Option<String>,
    hook: Option<Hook>,
    family: Family,
    mode: Option<Mode>,
    source: String,
    generation: u32,
    /// Seconds since 1970.
    applied: u64,
    via: &'static str,
    program: u32,
    tag: String,
    instructions: u32,
    machine_code_bytes: u32,
    /// Milliseconds until it goes back unless confirmed.
    goes_back_in_ms: Option<u64>,
    rules: usize,
    maps: Vec<Map>,
    verdicts: BTreeMap<String, Rate>,
}

#[derive(Debug, Serialize)]
struct Map {
    name: String,
    id: u32,
    bytes: u64,
    entries: u32,
}

#[derive(Debug, Default, Serialize)]
struct Rate {
    packets: u64,
    bytes: u64,
    /// None without --sample.
    packets_per_second: Option<f64>,
}

pub(super) fn run(args: &StatusArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    let store = live::store(&args.slots.store)?;
    let mut opened = Vec::new();
    for slot in live::slots(&sys, &args.slots)? {
        match open(&sys, &store, &slot) {
            Err(Error::NotApplied(_)) => {
                output.remark(&format!(
                    "{slot}: nothing is attached any more; `polc flush` removes what is left\n"
                ));
            }
            result => opened.push(result?),
        }
    }
    let before: Vec<BTreeMap<String, (u64, u64)>> =
        opened.iter().map(|policy| verdicts(&sys, policy)).collect::<Result<_, _>>()?;
    let began = Instant::now();
    let sample = args.sample > 0 && !opened.is_empty();
    if sample {
        std::thread::sleep(Duration::from_millis(args.sample.into()));
    }
    let mut policies = Vec::new();
    for (policy, before) in opened.iter().zip(&before) {
        let after = verdicts(&sys, policy)?;
        let seconds = began.elapsed().as_secs_f64();
        let rates = after.iter().map(|(verdict, &(packets, bytes))| {
            let grown = packets.saturating_sub(before.get(verdict).map_or(0, |before| before.0));
            let packets_per_second = sample.then(|| grown as f64 / seconds);
            (verdict.clone(), Rate { packets, bytes, packets_per_second })
        });
        policies.push(describe(&sys, policy, rates.collect())?);
    }
    match args.format {
        TextFormat::Json => output.result(&format!(
            "{}\n",
            serde_json::to_string_pretty(&policies).expect("plain data serializes")
        )),
        TextFormat::Human => {
            let text: String =
                policies.iter().zip(&opened).map(|(policy, open)| human(policy, open)).collect();
            output.result(if text.is_empty() { "nothing is applied\n" } else { &text });
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Packets and bytes by verdict, of the attached program alone.
fn verdicts(sys: &Sys, policy: &Open) -> Result<BTreeMap<String, (u64, u64)>, Failure> {
    let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (slot, (packets, bytes)) in policy.object.manifest.counters.iter().zip(policy.slots(sys)?) {
        if let Some(verdict) = &slot.verdict {
            let sum = sums.entry(verdict.clone()).or_default();
            sum.0 += packets;
            sum.1 += bytes;
        }
    }
    Ok(sums)
}

fn describe(sys: &Sys, policy: &Open, verdicts: BTreeMap<String, Rate>) -> Result<Policy, Failure> {
    let goes_back_in_ms = match &policy.unconfirmed {
        Some(confirm) => {
            let now = sys.uptime_ms().map_err(Error::call("read the clock"))?;
            Some(confirm.deadline_ms.saturating_sub(now))
        }
        None => None,
    };
    let maps = policy.maps.iter().filter(|(name, _)| name != COUNTERS_MAP).map(|(name, map)| {
        let info = map.info();
        Map {
            name: name.clone(),
            id: info.id,
            bytes: u64::from(info.max_entries) * u64::from(info.key_bytes + info.value_bytes),
            entries: info.max_entries,
        }
    });
    let rules =
        policy.object.manifest.counted.iter().filter(|counted| counted.rule.is_some_and(|rule| rule > 0));
    Ok(Policy {
        attach: policy.slot.attach,
        device: policy.slot.device.clone(),
        hook: policy.slot.hook,
        family: policy.slot.family,
        mode: policy.generation.mode,
        source: policy.generation.source.clone(),
        generation: policy.number,
        applied: policy.generation.applied,
        via: match policy.via {
            Via::Link if policy.slot.attach == Attach::Xdp => "xdp link",
            Via::Link => "tcx link",
            Via::Clsact { .. } => "clsact filter",
            Via::OwnLink => "netfilter link",
        },
        program: policy.program.id,
        tag: policy.program.tag.iter().map(|byte| format!("{byte:02x}")).collect(),
        instructions: policy.program.xlated_bytes / 8,
        machine_code_bytes: policy.program.jited_bytes,
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
    let _ = writeln!(
        text,
        "  since {} ago, generation {}, {}, program {} tag {}, {}",
        ago(now.saturating_sub(policy.applied)),
        policy.generation,
        policy.via,
        policy.program,
        policy.tag,
        counted(policy.instructions as usize, "instruction"),
    );
    if let Some(left) = policy.goes_back_in_ms {
        let _ = writeln!(text, "  goes back in {:.0} s unless confirmed", left as f64 / 1e3);
    }
    for (verdict, rate) in &policy.verdicts {
        let _ = write!(text, "  {verdict:<7} {:>12} packets {:>15} bytes", rate.packets, rate.bytes);
        if let Some(rate) = rate.packets_per_second {
            let _ = write!(text, "   {rate:.0} packets/s");
        }
        text.push('\n');
    }
    for map in &policy.maps {
        let _ = writeln!(
            text,
            "  map {:<15} id {}, {} bytes, {}",
            map.name,
            map.id,
            map.bytes,
            entries(map.entries)
        );
    }
    text
}

fn entries(count: u32) -> String {
    if count == 1 { "1 entry".into() } else { format!("{count} entries") }
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
