//! Real dumps: from text to a loaded program, and the price of packets made for the rules.
//!
//! Packets are witnesses: for each entry of the compiled rules and for its boundaries. Dumps are compiled as `polc
//! compile` does by default, in accelerate mode, where rules that a program can't decide are left to the kernel, so a
//! verdict is to accept, to drop, or to leave.

use std::time::{Duration, Instant};

use polc::build::{Built, build};
use polc::place::{default_path, devices_of, place};
use polc::select::Devices;
use polc::witness::Witnesses;
use polc_backend_ebpf::emit::return_code;
use polc_backend_ebpf::object::ProgramKind;
use polc_ir::env::{Attach, Env, Input, Mode, Place};
use polc_ir::hook::{Family, Hook};
use polc_ir::state::State;
use polc_loader::sys::Sys;
use polc_tests::corpus;

use crate::baseline::{empty, parse_only, pass};
use crate::classify::noise;
use crate::context::{Context, NOISY, progress};
use crate::driver::Pool;
use crate::kernel::Loaded;
use crate::machine::on_all_cpus;
use crate::packet::{FRAME, Form};
use crate::random::Random;
use crate::report::{Section, Table, mb, ms, ns};
use crate::subject::session;
use crate::trace::{Traffic, draw};

/// Different packets for a dump.
const PACKETS: usize = 32_768;

/// Witnesses that are looked at for them; some are too long for the pool or need a VLAN tag beside the frame.
const WITNESSES: usize = 4 * PACKETS;

/// How long the reference may work on one dump; packets that are left are not checked, and the table says how many
/// were.
const REFERENCE_TIME: Duration = Duration::from_secs(10);

/// A dump's numbers.
struct Row {
    name: String,
    rules: usize,
    packets: usize,
    checked: usize,
    ns: f64,
    bytes: usize,
    insns: usize,
    read: Duration,
    compile: Duration,
    load: Duration,
}

/// The dumps with most rules.
fn largest(count: usize) -> Vec<corpus::Dump> {
    let mut dumps: Vec<(usize, corpus::Dump)> = corpus::all()
        .into_iter()
        .filter(|dump| dump.valid)
        .map(|dump| (dump.text().lines().filter(|line| line.starts_with("-A")).count(), dump))
        .collect();
    dumps.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.name.cmp(&b.1.name)));
    dumps.truncate(count);
    dumps.into_iter().map(|(_, dump)| dump).collect()
}

fn row(context: &mut Context, dump: &corpus::Dump) -> Result<Row, String> {
    let (kind, attach) = (ProgramKind::Xdp, Attach::Xdp);
    let text = dump.text();
    let family = if dump.name.contains(".v6.") { Family::V6 } else { Family::V4 };
    let start = Instant::now();
    let session = session(&dump.name, &text, dump.ipset_text().as_deref(), family);
    let read = start.elapsed();
    // Routers' rules are in FORWARD; the path with most entries is the one to measure.
    let hooks = [default_path(attach), vec![Hook::Prerouting, Hook::Forward]];
    let devices = Devices { declared: devices_of(&session.ruleset), ..Devices::default() };
    let env = Env::default();
    let mut best: Option<(usize, Place, Built, Duration)> = None;
    for path in hooks {
        let place = place(&path, attach, Mode::Accelerate, false);
        let start = Instant::now();
        let Ok(built) = on_all_cpus(|| build(&session, &place, &env, &devices))? else { continue };
        let compile = start.elapsed();
        let entries = built.compiled.classifier.entries.len();
        if best.as_ref().is_none_or(|(most, ..)| entries > *most) {
            best = Some((entries, place, built, compile));
        }
    }
    let (_, place, built, compile) = best.ok_or("it can't be compiled for XDP")?;
    let start = Instant::now();
    let placed = polc_loader::load::load(&Sys::new(), &built.object);
    let load = start.elapsed();
    placed.map_err(|error| error.to_string())?;
    let loaded = Loaded::load(&built.object)?;
    // Test packets come in by the loopback device, number 1.
    let here = devices.declared.iter().find(|device| device.ifindex == 1).map(|device| device.name);
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut checked = 0;
    let started = Instant::now();
    for witness in Witnesses::new(&built.compiled.classifier, &[], context.options.seed).take(WITNESSES) {
        if frames.len() == PACKETS {
            break;
        }
        if witness.frame.len() > FRAME || witness.vlan.is_some() {
            continue;
        }
        let mut frame = witness.frame;
        frame.resize(FRAME, 0);
        if started.elapsed() < REFERENCE_TIME {
            let input = Input { frame: frame.clone(), in_device: here, ..Input::default() };
            let outcome = session.ruleset.eval(&place, &env, &input, &mut State::new(0));
            let expected = return_code(attach, place.mode, outcome.ending.verdict);
            let returned = loaded.run(&frame, 1, None)?.return_value as i32;
            // What lies deeper than a program may look is left to the kernel, and said so.
            let left = !built.compiled.diagnostics.is_empty() && returned == pass(kind);
            if returned != expected && !left {
                return Err(format!(
                    "WRONG VERDICT: {}: {frame:02x?} should return {expected}, and returned {returned}",
                    dump.name
                ));
            }
            checked += 1;
        }
        frames.push(frame);
    }
    if frames.is_empty() {
        return Err("no packets".into());
    }
    let mut random = Random::new(context.options.seed ^ 0x6475_6d70);
    random.shuffle(&mut frames);
    let pool = Pool::of_frames(&frames, &draw(Traffic::Uniform, frames.len(), &mut random));
    let (nothing, parser) = (Loaded::load(&empty(kind)?)?, Loaded::load(&parse_only(kind, family)?)?);
    let rounds = context.options.rounds;
    let driver = context.driver(kind, Form::Frames)?;
    let times = driver.measure(&[&nothing, &parser, &loaded], &[pool], rounds)?;
    context.note(times.spread);
    Ok(Row {
        name: dump.name.clone(),
        rules: session.ruleset.rules.len(),
        packets: frames.len(),
        checked,
        ns: times.ns[2][0] - times.ns[1][0],
        bytes: built.object.maps.values().filter_map(|map| map.contents()).map(<[u8]>::len).sum(),
        insns: built.object.programs[0].code.slots.len(),
        read,
        compile,
        load,
    })
}

/// Runs it.
///
/// # Errors
/// A wrong verdict, or no driver.
pub(crate) fn run(context: &mut Context) -> Result<Section, String> {
    let mut section = Section::new("dumps", "Real dumps");
    section.text(format!(
        "The dumps with most rules of {}, at XDP in accelerate mode, for INPUT or FORWARD, whichever has more. \
         Packets: up to {PACKETS} different witnesses for entries and boundaries. *ns* are a packet's mean over parsing; \
         times in ms, of compiling with all CPUs. Goals for the largest: 1.5 s from text to loaded, 100 ns a packet.",
        if corpus::shared().is_some() { "the corpus beside the checkout" } else { "those that come with polc" }
    ));
    let mut table = Table::new(&[
        "dump",
        "rules",
        "packets",
        "checked",
        "ns",
        "tables, MB",
        "insns",
        "read",
        "compile",
        "load",
        "in all",
    ]);
    let mut failures = Vec::new();
    for dump in largest(if context.options.quick { 5 } else { 16 }) {
        if context.options.set.as_ref().is_some_and(|part| !dump.name.contains(part.as_str())) {
            continue;
        }
        match row(context, &dump) {
            Ok(row) => {
                let cells = vec![
                    row.name,
                    row.rules.to_string(),
                    row.packets.to_string(),
                    row.checked.to_string(),
                    ns(row.ns),
                    mb(row.bytes),
                    row.insns.to_string(),
                    ms(row.read),
                    ms(row.compile),
                    ms(row.load),
                    ms(row.read + row.compile + row.load),
                ];
                progress(&format!("  {}", cells.join("  ")));
                table.row(cells);
            }
            Err(error) if error.starts_with("WRONG") => return Err(error),
            Err(error) => {
                progress(&format!("  {}: {error}", dump.name));
                failures.push(format!("{}: {error}", dump.name));
            }
        }
    }
    section.table(table);
    if !failures.is_empty() {
        section.text(format!("Not measured: {}.", failures.join("; ")));
    }
    if context.spread > NOISY {
        section.text(noise(context.spread));
    }
    Ok(section)
}
