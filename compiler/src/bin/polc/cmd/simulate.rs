//! `polc simulate`: what becomes of the packets of a capture or a list, at any level.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;

use polc::decider::{Named, describe, named};
use polc::deciding::deciding;
use polc::place::{best_attach, place as place_of, refusal};
use polc::runner::{Level as RunLevel, Program, run as run_level};
use polc::select::Devices;
use polc::session::Session;
#[cfg(feature = "kernel")]
use polc_backend_ebpf::emit::Told;
use polc_ir::diag::Severity;
use polc_ir::env::{Connections, Counting, Device, Env, Input, Place};
use polc_ir::hook::Hook;
use polc_ir::limits::VM_PACKET_BYTES_MAX;
use polc_ir::outcome::{Decider, Ending};
use polc_ir::ruleset::Ruleset;
use polc_ir::state::State;
use serde::Serialize;

use super::compile::refuse;
#[cfg(feature = "kernel")]
use super::test_run::KernelProgram;
use super::{FOUND, counted, place, show, worst};
use crate::cli::{Level, SimulateArgs, TextFormat};
use crate::failure::Failure;
use crate::input;
use crate::output::Output;
use crate::packets::{capture, list};

/// Seed of the random numbers that `statistic` draws.
const SEED: u64 = 1;

/// Text held back before it is written.
const BUFFER_BYTES: usize = 1 << 16;

/// What became of a packet. One line each.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// The packet's place in its file, from 0.
    index: usize,
    /// `accept`, `drop`, `reject` or `defer`; null for a packet that is too long, or that the kernel tests no program
    /// with.
    verdict: Option<&'a str>,
    /// The rule or policy that decided; null where none did.
    rule: Option<Named>,
    /// Which kind of thing decided: `rule`, `policy`, `hotdrop`, or why the frame reached no rule; `untested` beside a
    /// null verdict.
    by: String,
    /// The mark on arrival.
    mark_in: u32,
    /// The mark afterwards.
    mark: u32,
}

pub(super) fn run(args: &SimulateArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut session = input::session(&args.file, &args.input)?;
    show(output, &session.sources, &session.diagnostics);
    if session.has_errors() {
        return Ok(FOUND.into());
    }
    let packets = packets(args, &mut session, output)?;
    let place = place::as_compiled(&mut session, simulated_place(args)?);
    let env = input::env(&args.input, session.family());
    let devices = devices(args, &session, &packets.inputs)?;
    let Some(mut decide) = Decide::new(&session, args.level, place, env, &devices, output)? else {
        return Ok(FOUND.into());
    };

    let write = |text: &str| match args.format {
        TextFormat::Human => output.result(text),
        TextFormat::Json => output.json_text(text),
    };
    let mut text = String::new();
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut untested, mut too_long) = (0, 0);
    for (index, packet) in packets.inputs.iter().enumerate() {
        let fits = packet.frame.len() <= VM_PACKET_BYTES_MAX;
        let decided = match fits {
            true => decide.packet(&session, packet).map_err(|failure| failure.at_packet(index))?,
            false => None,
        };
        match decided {
            Some((ending, _)) => *verdicts.entry(ending.verdict.word()).or_default() += 1,
            None if fits => untested += 1,
            None => too_long += 1,
        }
        match args.format {
            TextFormat::Human => {
                let what = decided.map_or("not tested".into(), |(ending, _)| describe(&session, ending));
                let _ = writeln!(text, "{index}: {what}");
            }
            TextFormat::Json => {
                let ending = decided.map(|(ending, _)| ending);
                let line = Line {
                    index,
                    verdict: ending.map(|ending| ending.verdict.word()),
                    rule: ending.and_then(|ending| named(&session, ending.by)),
                    by: ending.map_or("untested".into(), |ending| by(ending.by)),
                    mark_in: packet.mark,
                    mark: decided.map_or(packet.mark, |(_, mark)| mark),
                };
                text += &serde_json::to_string(&line).expect("plain data serializes");
                text.push('\n');
            }
        }
        if text.len() > BUFFER_BYTES {
            write(&text)?;
            text.clear();
        }
    }
    write(&text)?;
    let parts: Vec<String> = verdicts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
    let level = decide.name();
    output.remark(&format!(
        "{}: {} at {} ({level})\n",
        counted(packets.inputs.len(), "packet"),
        if parts.is_empty() { "nothing".to_string() } else { parts.join(", ") },
        place::describe(&decide.place)
    ));
    if too_long > 0 {
        output.remark(&format!(
            "{} not tested: longer than {VM_PACKET_BYTES_MAX} bytes, which no IP packet is that came by a wire\n",
            counted(too_long, "packet")
        ));
    }
    if untested > 0 {
        output.remark(&format!(
            "{} not tested: the kernel tests no program with a packet that is tagged, longer than 1,500 bytes, cut to \
             less than a header, or comes by no device that a rule or an option names\n",
            counted(untested, "packet")
        ));
    }
    match packets.broken {
        // The packets before it were decided.
        Some(why) => Err(Failure::Input(why)),
        None if untested + too_long > 0 => Ok(FOUND.into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// What is decided.
struct Packets {
    inputs: Vec<Input>,
    /// Why the rest of their file can't be read.
    broken: Option<String>,
}

fn by(by: Decider) -> String {
    match by {
        Decider::Rule(_) => "rule".into(),
        Decider::Hotdrop(_) => "hotdrop".into(),
        Decider::Policy(_) => "policy".into(),
        Decider::Frame(kind) => kind.to_string(),
        Decider::Nothing => "nothing".into(),
    }
}

/// The packets, with the devices of the command line where they have none of their own.
fn packets(args: &SimulateArgs, session: &mut Session, output: &Output) -> Result<Packets, Failure> {
    let mut broken = None;
    let mut inputs = match (&args.pcap, &args.packets) {
        (Some(path), _) => {
            let capture = capture::read(path)?;
            if capture.cut > 0 {
                let (packets, what) = (counted(capture.cut, "packet"), path.display());
                output.remark(&format!("{what}: {packets} captured in part; zeros stand for the rest\n"));
            }
            broken = capture.broken;
            capture.packets
        }
        (None, Some(path)) => {
            let mut findings = Vec::new();
            let packets = list::read(&mut session.sources, path, args.attach.map(Into::into), &mut findings)?;
            show(output, &session.sources, &findings);
            if worst(&findings) == Some(Severity::Error) {
                let lines = counted(findings.len(), "line");
                return Err(Failure::Input(format!("{lines} of `{}` can't be simulated", path.display())));
            }
            packets
        }
        (None, None) => return Err(Failure::Usage("no packets were given: --pcap or --packets".into())),
    };
    let in_device = args.devices.in_interface.as_deref().map(place::device_name).transpose()?;
    let out_device = args.devices.out_interface.as_deref().map(place::device_name).transpose()?;
    for packet in &mut inputs {
        packet.in_device = packet.in_device.or(in_device);
        packet.out_device = packet.out_device.or(out_device);
    }
    Ok(Packets { inputs, broken })
}

/// The place that was named. Without an attach point, the rules themselves are asked on their hooks with everything
/// given, and programs where the first hook is best served.
fn simulated_place(args: &SimulateArgs) -> Result<Place, Failure> {
    if let Some(attach) = args.attach {
        return place::of(attach.into(), &args.place, &args.input);
    }
    let path = args.place.path().unwrap_or_else(|| vec![Hook::Input]);
    let attach = if args.level == Level::Ruleset { None } else { Some(best_attach(path[0])) };
    if let Some(why) = refusal(&path, attach, false) {
        return Err(Failure::Usage(why));
    }
    let local_addresses = !args.input.local.is_empty();
    Ok(Place { attach, ..place_of(&path, best_attach(path[0]), args.place.mode(), local_addresses) })
}

/// The devices of rules, options and packets; none is fixed, since each packet says where it comes and goes.
fn devices(args: &SimulateArgs, session: &Session, packets: &[Input]) -> Result<Devices, Failure> {
    let mut devices = place::all(session, &args.devices)?;
    devices.fixed_in = None;
    devices.fixed_out = None;
    let mut names: Vec<_> =
        packets.iter().flat_map(|packet| [packet.in_device, packet.out_device]).flatten().collect();
    names.sort_unstable();
    names.dedup();
    let mut number = devices.declared.last().map_or(1, |device| device.ifindex + 1);
    for name in names {
        if !devices.declared.iter().any(|device| device.name == name) {
            devices.declared.push(Device { ifindex: number, name });
            number += 1;
        }
    }
    Ok(devices)
}

/// Decides packets at one level.
struct Decide {
    level: RunLevel,
    place: Place,
    /// At no attach point: the rules without what they record.
    deciding: Option<Ruleset>,
    env: Env,
    state: State,
    compiled: Option<polc::Compiled>,
    program: Option<Program>,
    #[cfg(feature = "kernel")]
    kernel: Option<KernelProgram>,
}

impl Decide {
    /// `None` if the level can't be made; the findings are shown.
    fn new(
        session: &Session,
        level: Level,
        place: Place,
        env: Env,
        devices: &Devices,
        output: &Output,
    ) -> Result<Option<Decide>, Failure> {
        #[cfg(feature = "kernel")]
        let in_kernel = level == Level::Kernel;
        let level = match level {
            Level::Ruleset => RunLevel::Ruleset,
            Level::Classifier => RunLevel::Classifier,
            Level::Decision => RunLevel::Decision,
            Level::Plan => RunLevel::Plan,
            Level::Rbpf => RunLevel::Rbpf,
            // The same object, run elsewhere.
            #[cfg(feature = "kernel")]
            Level::Kernel => RunLevel::Rbpf,
        };
        if level == RunLevel::Rbpf && place.counters == Counting::Off {
            let message =
                "a program without counters tells verdicts alone; simulate it with --counters exact";
            return Err(Failure::Usage(message.into()));
        }
        let mut decide = Decide {
            level,
            deciding: place.attach.is_none().then(|| deciding(&session.ruleset, place.mode)),
            place,
            env,
            state: State::new(SEED),
            compiled: None,
            program: None,
            #[cfg(feature = "kernel")]
            kernel: None,
        };
        if level == RunLevel::Ruleset {
            return Ok(Some(decide));
        }
        let compiled = polc::compile(&session.ruleset, &decide.place, &decide.env, devices);
        if refuse(session, &compiled.diagnostics, decide.place.mode, output) {
            return Ok(None);
        }
        if level == RunLevel::Rbpf {
            let (object, _) = match polc::build::object(session, &compiled) {
                Ok(made) => made,
                Err(findings) => {
                    show(output, &session.sources, &findings);
                    return Ok(None);
                }
            };
            #[cfg(feature = "kernel")]
            if in_kernel {
                decide.kernel = Some(KernelProgram::new(&compiled.plan, &object, devices)?);
                decide.compiled = Some(compiled);
                return Ok(Some(decide));
            }
            let attach = decide.place.attach.expect("a simulated place has an attach point");
            let mut program = Program::new(&compiled.plan, attach, &object)
                .map_err(|error| Failure::Input(format!("the program can't be run: {error}")))?;
            program.set_random_seed(SEED);
            decide.program = Some(program);
        }
        decide.compiled = Some(compiled);
        Ok(Some(decide))
    }

    fn name(&self) -> String {
        #[cfg(feature = "kernel")]
        if self.kernel.is_some() {
            return "kernel".into();
        }
        self.level.to_string()
    }

    /// What becomes of a packet, and its mark; `None` for one that the kernel tests no program with.
    fn packet(&mut self, session: &Session, packet: &Input) -> Result<Option<(Ending, u32)>, Failure> {
        let Some(compiled) = &self.compiled else {
            // The rules' own meaning uses the connection state that a packet gives; a program has none.
            let mut place = self.place.clone();
            if packet.connection.is_some() {
                place.connections = Connections::Given;
            }
            let ruleset = self.deciding.as_ref().unwrap_or(&session.ruleset);
            let outcome = ruleset.eval(&place, &self.env, packet, &mut self.state);
            return Ok(Some((outcome.ending, outcome.mark)));
        };
        #[cfg(feature = "kernel")]
        if let Some(program) = &mut self.kernel {
            let Some(tested) = program.run(&compiled.plan, packet)? else { return Ok(None) };
            let wrong = |error| Failure::Input(format!("the program went wrong: {error}"));
            let ending = tested.result.and_then(Told::counted).map_err(wrong)?.0;
            return Ok(Some((ending, tested.mark)));
        }
        if let Some(program) = &mut self.program {
            let ending = program
                .run(&compiled.plan, packet)
                .map_err(|error| Failure::Input(format!("the program went wrong: {error}")))?;
            return Ok(Some((ending.0, program.mark())));
        }
        let outcome = run_level(self.level, &session.ruleset, compiled, &self.env, packet, &mut self.state);
        Ok(Some((outcome.ending, outcome.mark)))
    }
}
