//! A rule set compiled by polc and loaded, with what that took.

use std::time::{Duration, Instant};

use polc::build::build;
use polc::place::{default_path, devices_of, place};
use polc::select::{Devices, longest_tenths_ns};
use polc::session::{ReadOptions, Session};
use polc_backend_ebpf::object::{MapKind, Object, ProgramKind};
use polc_ir::diag::Diagnostic;
use polc_ir::env::{Attach, Env, Input, Mode, Place};
use polc_ir::hook::Family;
use polc_ir::outcome::Verdict;
use polc_ir::source::SourceMap;
use polc_ir::state::State;
use polc_loader::sys::Sys;

use crate::baseline;
use crate::kernel::Loaded;
use crate::machine::on_all_cpus;
use crate::packet::frame;
use crate::rules::Header;

/// Rules times packets that polc's own reference evaluates for one rule set; more packets than that are checked
/// against the benchmark's scan only.
const REFERENCE_WORK: usize = 10_000_000;

/// What compiling a rule set took, and its program.
pub(crate) struct Subject {
    session: Session,
    place: Place,
    /// The program in the kernel.
    pub(crate) loaded: Loaded,
    /// What it cost.
    pub(crate) cost: Cost,
}

/// What a rule set costs besides time on a packet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// From text to a typed rule set.
    pub(crate) read: Duration,
    /// From a rule set to an object in memory, with all CPUs.
    pub(crate) compile: Duration,
    /// From an object in memory to a loaded program by polc's own loader: maps, verification, JIT.
    pub(crate) load: Duration,
    /// What the cost model expects of a packet, in tenths of a nanosecond.
    pub(crate) predicted_tenths_ns: u32,
    /// Bytes of tables.
    pub(crate) table_bytes: usize,
    /// Bytes of counters on one CPU.
    pub(crate) counter_bytes: usize,
    /// Instructions.
    pub(crate) insns: usize,
    /// Instructions that the kernel's verifier went through.
    pub(crate) verified: u32,
    /// Bytes of machine code.
    pub(crate) jited_bytes: u32,
}

/// The attach point that a kind of program is for.
pub(crate) const fn attach(kind: ProgramKind) -> Attach {
    match kind {
        ProgramKind::Xdp => Attach::Xdp,
        ProgramKind::Classifier => Attach::TcIngress,
        ProgramKind::Netfilter => Attach::Netfilter,
    }
}

fn explain(findings: &[Diagnostic]) -> String {
    let text = findings.first().map_or_else(String::new, |finding| finding.message.clone());
    if findings.len() > 1 { format!("{text} (and {} more)", findings.len() - 1) } else { text }
}

/// Reads iptables-save text, and ipset text if any.
pub(crate) fn session(name: &str, text: &str, sets: Option<&str>, family: Family) -> Session {
    let mut sources = SourceMap::new();
    let rules = sources.add(name, text.to_string());
    let sets: Vec<_> = sets.map(|text| sources.add("sets", text.to_string())).into_iter().collect();
    Session::read(
        sources,
        rules,
        &sets,
        &ReadOptions { family: Some(family), semantics: None, strict: false },
    )
}

impl Subject {
    /// Compiles and loads in replace mode, so that every rule is the program's to decide.
    ///
    /// # Errors
    /// What polc or the kernel says.
    pub(crate) fn new(
        name: &str,
        text: &str,
        sets: Option<&str>,
        family: Family,
        kind: ProgramKind,
    ) -> Result<Subject, String> {
        Subject::in_mode(name, text, sets, family, kind, Mode::Replace)
    }

    /// Compiles and loads in a mode.
    ///
    /// # Errors
    /// What polc or the kernel says.
    pub(crate) fn in_mode(
        name: &str,
        text: &str,
        sets: Option<&str>,
        family: Family,
        kind: ProgramKind,
        mode: Mode,
    ) -> Result<Subject, String> {
        let start = Instant::now();
        let session = session(name, text, sets, family);
        let read = start.elapsed();
        if mode == Mode::Replace && session.has_errors() {
            return Err(explain(&session.diagnostics));
        }
        let attach = attach(kind);
        let place = place(&default_path(attach), attach, mode, false);
        let devices = Devices { declared: devices_of(&session.ruleset), ..Devices::default() };
        let start = Instant::now();
        let built = on_all_cpus(|| build(&session, &place, &Env::default(), &devices))?
            .map_err(|findings| explain(&findings))?;
        let compile = start.elapsed();
        if mode == Mode::Replace && !built.compiled.diagnostics.is_empty() {
            return Err(explain(&built.compiled.diagnostics));
        }
        let start = Instant::now();
        let placed = polc_loader::load::load(&Sys::new(), &built.object);
        let load = start.elapsed();
        placed.map_err(|error| error.to_string())?;
        let loaded = Loaded::load(&built.object)?;
        let (table_bytes, counter_bytes) = map_bytes(&built.object);
        let cost = Cost {
            read,
            compile,
            load,
            predicted_tenths_ns: longest_tenths_ns(&built.compiled.plan),
            table_bytes,
            counter_bytes,
            insns: built.object.programs[0].code.slots.len(),
            verified: loaded.verified_insns(),
            jited_bytes: loaded.jited_bytes(),
        };
        Ok(Subject { session, place, loaded, cost })
    }

    /// What polc's reference says of a frame: whether it goes on. `None`: the kernel's own rules decide it.
    pub(crate) fn reference(&self, frame: Vec<u8>) -> Option<bool> {
        let input = Input { frame, ..Input::default() };
        let outcome = self.session.ruleset.eval(&self.place, &Env::default(), &input, &mut State::new(0));
        match outcome.ending.verdict {
            Verdict::Accept => Some(true),
            Verdict::Drop => Some(false),
            _ => None,
        }
    }

    /// Runs a packet of each header, and compares what the program returned with `accepts`, which was found without
    /// polc, and with polc's reference for as many as time allows: `steps` is about how many steps that takes for a
    /// packet. Headers must be in random order.
    ///
    /// # Errors
    /// The first packet that came out differently.
    pub(crate) fn check(
        &self,
        kind: ProgramKind,
        headers: &[Header],
        accepts: &[bool],
        steps: usize,
    ) -> Result<(), String> {
        let referenced = (REFERENCE_WORK / steps.max(1)).max(64);
        let family = self.session.family();
        for (index, (header, &accept)) in headers.iter().zip(accepts).enumerate() {
            let expected = if accept { baseline::pass(kind) } else { baseline::drop(kind) };
            let frame = frame(family, header);
            let returned = self.loaded.run(&frame, 1, None)?.return_value as i32;
            if returned != expected {
                return Err(format!(
                    "WRONG VERDICT: {header:?} should return {expected}, and returned {returned}"
                ));
            }
            if index < referenced && self.reference(frame) != Some(accept) {
                return Err(format!("WRONG REFERENCE: {header:?} should be accepted: {accept}"));
            }
        }
        Ok(())
    }
}

/// Bytes of tables, and of counters on one CPU.
fn map_bytes(object: &Object) -> (usize, usize) {
    let (mut tables, mut counters) = (0, 0);
    for map in object.maps.values() {
        match &map.kind {
            MapKind::Data { contents, .. } => tables += contents.len(),
            MapKind::Declared { value_bytes, max_entries, .. } => {
                counters += *value_bytes as usize * *max_entries as usize;
            }
        }
    }
    (tables, counters)
}
