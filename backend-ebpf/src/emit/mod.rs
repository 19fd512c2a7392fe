//! `emit`: a plan becomes an object.
//!
//! One program is emitted, in the order a packet meets its parts: the context and the frame's headers (`headers`),
//! fields that take more than a load (`derived`), membership in sets (`set`), stages decided by code (`steps`, `lookup`), the loop that reads
//! tables (`walk`), and the one place that counts and returns. Jumps go forward only, marked loops aside. What each register
//! and stack slot holds is written in [`crate::abi`].
//!
//! The program fails safe: where it finds what can't be (a reference out of a table, a read that fails although the
//! length says it can't), it returns without counting, and lets the packet on in accelerate mode and drops it in
//! replace mode.

use std::collections::{BTreeMap, BTreeSet};

use cranelift_entity::PrimaryMap;
use polc_ir::diag::{Code as DiagCode, Diagnostic};
use polc_ir::entities::{Map, Rule, Set, Step};
use polc_ir::env::{Attach, Connections, Counting, Mode};
use polc_ir::field::Field;
use polc_ir::hook::Semantics;
use polc_ir::limits::{DEVICE_NUMBER_MAX, KEY_WORDS_MAX, NETFILTER_KEY_WORDS_MAX};
use polc_ir::outcome::{Count, Decider, Ending, FrameKind, Outcome, Verdict};
use polc_ir::plan::{KeySlot, Known, Op, Plan, PlanExit, StepData, Target as PlanTarget, Trace};

use self::shortcut::Shortcuts;
use crate::abi::{self, CTX, KeyLayout};
use crate::asm::{Asm, Label, Line};
use crate::budget::Budget;
use crate::insn::{AluOp, Cond, Helper, Operand, Reg, Size};
use crate::manifest::{Counted, CounterKind, CounterSlot, KernelVersion, Manifest, Needs, SetManifest};
use crate::object::{DataSection, MapDef, Object, Program, ProgramKind};
use crate::trace::TraceManifest;

mod confirm;
mod derived;
mod headers;
mod ipv6;
mod lookup;
mod netfilter;
mod set;
mod shortcut;
mod steps;
mod trace;
mod transport;
mod values;
mod walk;

/// The counter map: packets and bytes as two 64-bit numbers, a slot for each of `Plan::traces`.
pub const COUNTERS_MAP: &str = "polc_counters";
/// The data map from device number to device class, 16 bits each.
pub const DEVICES_MAP: &str = "devices";
/// The data map from device class to the device's name, 16 bytes each, where sets are asked for names.
pub const DEVICE_NAMES_MAP: &str = "device_names";
/// The data map of `statistic nth` counters, 32 bits each, by effect test.
pub const NTH_MAP: &str = "nth";
/// The data map of one 32-bit word: while it is not 0, the program leaves every packet to the kernel and counts none.
pub const SUSPEND_MAP: &str = "suspend";
/// The data map of walk nodes.
pub const WALK_MAP: &str = "walk";
/// The data map of all tables that look-up steps read.
pub const TABLES_MAP: &str = "tables";

/// What the names of data maps of sets' tables start with, before the set's number.
pub const SET_MAP_PREFIX: &str = "set";

/// The data map [`SUSPEND_MAP`], at 0.
pub fn suspend_map() -> MapDef {
    MapDef::data(SUSPEND_MAP, DataSection::Data, vec![0; 8])
}

/// Most words of the key of a program there.
pub fn key_words_max(attach: Attach) -> usize {
    if attach == Attach::Netfilter { NETFILTER_KEY_WORDS_MAX } else { KEY_WORDS_MAX }
}

/// Diagnostic code: the rules test more fields than a program's stack holds.
pub const KEY_TOO_LARGE: DiagCode = DiagCode(560);
/// Diagnostic code: a packet may visit more table nodes than the kernel's verifier follows.
pub const WALK_TOO_DEEP: DiagCode = DiagCode(561);
/// Diagnostic code: a field that no program has at its place.
pub const FIELD_UNAVAILABLE: DiagCode = DiagCode(562);
/// Diagnostic code: a device number is too large for the table of devices.
pub const DEVICE_NUMBER: DiagCode = DiagCode(563);
/// Diagnostic code: the code generator made what can't be a program, whatever the rules: a fault of polc.
pub const GENERATOR_FAULT: DiagCode = DiagCode(569);

/// Device numbers the table has room for at least, so that a loader can add devices that appear later.
const DEVICE_NUMBERS_MIN: usize = 1_024;

/// Where a rule is in the user's text, for line information and the manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleLine {
    /// The file's name as the user knows it.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
    /// The line's text.
    pub text: String,
    /// The table's name.
    pub table: String,
    /// The chain's name.
    pub chain: String,
    /// The rule's number in its chain, from 1.
    pub number: u32,
}

/// What a program is emitted for.
pub struct Target<'a> {
    /// Where it will sit.
    pub attach: Attach,
    /// Its name: a C identifier of at most [`polc_ir::limits::BPF_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Where a rule is in the user's text; `None` if it is in no file.
    pub rule: &'a dyn Fn(Rule) -> Option<RuleLine>,
    /// Name of the table and the chain of a base chain whose policy is an ending.
    pub chain: &'a dyn Fn(polc_ir::entities::Chain) -> Option<(String, String)>,
    /// Whose corner cases the rules were lowered for; for the manifest.
    pub semantics: Semantics,
    /// Whether it can report packets as it decides them, see [`crate::trace`].
    pub trace: bool,
    /// Whether it can be told to decide nothing, through [`SUSPEND_MAP`].
    pub suspend: bool,
}

impl std::fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("attach", &self.attach)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Makes the object that decides packets as `plan` does.
///
/// # Errors
/// What keeps the plan from becoming a program the kernel accepts: limits and fields that the place does not have.
pub fn emit(plan: &Plan, target: &Target<'_>) -> Result<Object, Vec<Diagnostic>> {
    let mut emitter = Emitter::new(plan, target)?;
    emitter.program();
    emitter.finish()
}

/// The program's return code for a verdict.
pub fn return_code(attach: Attach, mode: Mode, verdict: Verdict) -> i32 {
    let drops = match verdict {
        Verdict::Drop => true,
        Verdict::Accept => false,
        // Nothing behind the program would decide the packet in replace mode.
        Verdict::Reject(_) | Verdict::Defer => mode == Mode::Replace,
    };
    match (attach, drops) {
        (Attach::Xdp, true) => abi::xdp::DROP,
        (Attach::Xdp, false) => abi::xdp::PASS,
        (Attach::TcIngress | Attach::TcEgress, true) => abi::tc::SHOT,
        (Attach::TcIngress | Attach::TcEgress, false) => abi::tc::UNSPEC,
        (Attach::Netfilter, true) => abi::netfilter::DROP,
        (Attach::Netfilter, false) => abi::netfilter::ACCEPT,
    }
}

/// What became of one packet, from by how much each counter's packets grew and what the program returned: its ending,
/// and what it was counted for, in ascending order.
///
/// # Errors
/// Not exactly one counter with an ending grew by one, or the return code is not that ending's: the program failed
/// safe, or is wrong.
pub fn ending_of(
    plan: &Plan,
    attach: Attach,
    grown: &[u64],
    returned: i32,
) -> Result<(Ending, Vec<Count>), String> {
    let mut endings = Vec::new();
    let mut counted = Vec::new();
    for (slot, &by) in grown.iter().enumerate().filter(|(_, by)| **by != 0) {
        let trace = plan.traces.get(slot).ok_or_else(|| format!("counter {slot} stands for nothing"))?;
        endings.extend(trace.ending.map(|ending| (ending, by)));
        for _ in 0..by.min(u64::from(u16::MAX)) {
            counted.extend(&trace.counts);
        }
    }
    counted.sort_unstable();
    let &[(ending, 1)] = endings.as_slice() else {
        let endings: Vec<String> = endings.iter().map(|(ending, by)| format!("`{ending}` by {by}")).collect();
        return Err(format!(
            "counters of [{}] grew, and the program returned {returned}",
            endings.join(", ")
        ));
    };
    let expected = return_code(attach, plan.place.mode, ending.verdict);
    if returned != expected {
        return Err(format!("`{ending}` returned {returned} instead of {expected}"));
    }
    Ok((ending, counted))
}

/// What the run of a program tells of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// By the counters that grew: its ending, and what it was counted for, in ascending order.
    Counted(Ending, Vec<Count>),
    /// What the program returned, which is all that one without counters tells ([`Counting::Off`]).
    Returned(i32),
}

impl Told {
    /// What became of a packet of a program for `plan`. `grown` says by how much each counter's packets grew; what it is
    /// for a program without counters does not matter.
    ///
    /// # Errors
    /// As [`ending_of`].
    pub fn new(plan: &Plan, attach: Attach, grown: &[u64], returned: i32) -> Result<Told, String> {
        if plan.place.counters == Counting::Off {
            return Ok(Told::Returned(returned));
        }
        ending_of(plan, attach, grown, returned).map(|(ending, counted)| Told::Counted(ending, counted))
    }

    /// Whether a program for `plan` tells this of a packet with that outcome.
    pub fn is(&self, outcome: &Outcome, plan: &Plan, attach: Attach) -> bool {
        match self {
            Told::Counted(ending, counted) => outcome.is(*ending, counted),
            Told::Returned(code) => *code == return_code(attach, plan.place.mode, outcome.ending.verdict),
        }
    }

    /// The ending and the counts.
    ///
    /// # Errors
    /// The program does not count.
    pub fn counted(self) -> Result<(Ending, Vec<Count>), String> {
        match self {
            Told::Counted(ending, counted) => Ok((ending, counted)),
            Told::Returned(code) => Err(format!("the program counts nothing; it returned {code}")),
        }
    }
}

/// Whether a program for `plan` gives packets the mark that the rules leave: in replace mode at tc, if any rule changes it.
/// Elsewhere the kernel's rules write it.
pub fn writes_mark(plan: &Plan, attach: Attach) -> bool {
    let Some(slot) = plan.key.iter().find(|slot| slot.field == Field::Mark) else { return false };
    let mut exits = plan.steps.values().flat_map(StepData::exits).chain(&plan.walk.exits);
    let is_written = |exit: &PlanExit| match exit {
        PlanExit::Then { writes, .. } => writes.iter().any(|write| write.word == slot.word),
        _ => false,
    };
    plan.place.mode == Mode::Replace
        && matches!(attach, Attach::TcIngress | Attach::TcEgress)
        && exits.any(is_written)
}

/// The code generator's state.
struct Emitter<'a> {
    asm: Asm,
    plan: &'a Plan,
    target: &'a Target<'a>,
    layout: KeyLayout,
    maps: PrimaryMap<Map, MapDef>,
    /// The counters, if packets are counted.
    counters: Option<Map>,
    devices: Option<Map>,
    device_names: Option<Map>,
    nth: Option<Map>,
    trace: Option<trace::Trace>,
    /// The word that suspends the program.
    suspend: Option<Map>,
    /// The map of all tables, where each of the plan's tables begins in it, where the exit words and the return codes of
    /// look-up steps do, and where a register points while they run.
    tables: Option<Map>,
    table_offsets: Vec<u32>,
    /// The words of the key that are read; `None` if any may be.
    read_words: Option<BTreeSet<u8>>,
    /// What is known of the elements of each of the plan's tables.
    exactly: Vec<Known>,
    exit_offsets: BTreeMap<Step, u32>,
    code_offsets: BTreeMap<Step, u32>,
    tables_midst: u32,
    /// Which exits of the walk table are left out.
    shortcuts: Shortcuts,
    /// The map of each set's table.
    sets: BTreeMap<Set, Map>,
    set_manifests: Vec<SetManifest>,
    /// Where the header parts jump to end a frame, with the kind that ends there.
    frame_ends: BTreeMap<FrameKind, Label>,
    /// Counts `r8` and returns `r9`.
    count: Label,
    /// Returns the safe code without counting.
    bail: Label,
    bail_used: bool,
    lines: BTreeMap<Rule, Option<Line>>,
    files: BTreeMap<String, crate::asm::File>,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Emitter<'a> {
    fn new(plan: &'a Plan, target: &'a Target<'a>) -> Result<Emitter<'a>, Vec<Diagnostic>> {
        let words =
            plan.key.iter().map(|slot| usize::from(slot.word) + usize::from(slot.words)).max().unwrap_or(0);
        let words_max = key_words_max(target.attach);
        let Some(layout) = KeyLayout::new(words).filter(|_| words <= words_max) else {
            let message = format!(
                "the rules test more fields than a program's stack at {} has room for: {words_max} words",
                target.attach
            );
            let hint = "split the rule set, or test fewer different fields (`-m u32` and options of headers are one each)";
            return Err(vec![Diagnostic::error(KEY_TOO_LARGE, message, None).with_hint(hint)]);
        };
        let mut maps = PrimaryMap::new();
        let counters = (plan.place.counters != Counting::Off)
            .then(|| maps.push(MapDef::percpu_array(COUNTERS_MAP, 16, plan.traces.len().max(1) as u32)));
        let mut asm = Asm::new();
        let (count, bail) = (asm.label(), asm.label());
        let mut emitter = Emitter {
            asm,
            plan,
            target,
            layout,
            maps,
            counters,
            devices: None,
            device_names: None,
            nth: None,
            trace: None,
            suspend: None,
            tables: None,
            table_offsets: Vec::new(),
            exactly: Vec::new(),
            read_words: read_words(plan),
            exit_offsets: BTreeMap::new(),
            code_offsets: BTreeMap::new(),
            tables_midst: 0,
            shortcuts: Shortcuts::new(&plan.walk),
            sets: BTreeMap::new(),
            set_manifests: Vec::new(),
            frame_ends: BTreeMap::new(),
            count,
            bail,
            bail_used: false,
            lines: BTreeMap::new(),
            files: BTreeMap::new(),
            diagnostics: Vec::new(),
        };
        emitter.check_fields();
        emitter.add_devices();
        if !plan.effect_tests.is_empty() {
            let contents = plan
                .effect_tests
                .values()
                .map(|test| match test {
                    polc_ir::ruleset::EffectTestKind::Nth { initial, .. } => *initial,
                    _ => 0,
                })
                .map(u32::to_le_bytes);
            let mut contents: Vec<u8> = contents.flatten().collect();
            contents.resize((plan.effect_tests.len() * 4).next_power_of_two(), 0);
            emitter.nth = Some(emitter.maps.push(MapDef::data(NTH_MAP, DataSection::Data, contents)));
        }
        emitter.add_tables();
        emitter.add_sets();
        if target.trace {
            emitter.add_trace();
        }
        if target.suspend {
            emitter.suspend = Some(emitter.maps.push(suspend_map()));
        }
        if emitter.diagnostics.is_empty() { Ok(emitter) } else { Err(emitter.diagnostics) }
    }

    /// Refuses fields that packets do not have where the program sits.
    fn check_fields(&mut self) {
        // The kernel gives programs at its hooks no function for it (net/netfilter/nf_conntrack_bpf.c).
        if self.target.attach == Attach::Netfilter && self.plan.traces.iter().any(|trace| trace.if_absent) {
            let message = "connections can't be looked up by a program at netfilter".to_string();
            self.diagnostics.push(Diagnostic::error(FIELD_UNAVAILABLE, message, None));
        }
        for slot in &self.plan.key {
            let available = match slot.field {
                Field::CtState => {
                    self.target.attach == Attach::Netfilter
                        && self.plan.place.connections == Connections::State
                }
                Field::CtStatus | Field::CtDirection | Field::CtMark | Field::CtAbsent => false,
                Field::OutDevice => {
                    matches!(self.target.attach, Attach::TcEgress | Attach::Netfilter)
                        || self.plan.devices.fixed_out.is_some()
                }
                Field::SrcMac | Field::DstMac => self.target.attach != Attach::Netfilter,
                _ => true,
            };
            if !available {
                let message = format!("`{}` is not known to a program at {}", slot.field, self.target.attach);
                self.diagnostics.push(Diagnostic::error(FIELD_UNAVAILABLE, message, None));
            }
        }
    }

    /// Makes the table of devices if the program looks devices up.
    fn add_devices(&mut self) {
        let looked_up = self.slot(Field::InDevice).is_some() && self.plan.devices.fixed_in.is_none()
            || self.slot(Field::OutDevice).is_some() && self.plan.devices.fixed_out.is_none();
        if !looked_up {
            return;
        }
        let largest = self.plan.devices.devices.iter().map(|(device, _)| device.ifindex).max().unwrap_or(0);
        if largest > DEVICE_NUMBER_MAX {
            let message = format!(
                "device number {largest} is above {DEVICE_NUMBER_MAX}, which the table of devices ends at"
            );
            self.diagnostics.push(Diagnostic::error(DEVICE_NUMBER, message, None));
            return;
        }
        let numbers = (largest as usize + 1).next_power_of_two().max(DEVICE_NUMBERS_MIN);
        let mut contents = vec![0; 2 * numbers];
        // "No device" has number 0 and class 1.
        contents[..2].copy_from_slice(&1u16.to_le_bytes());
        for (device, class) in &self.plan.devices.devices {
            let at = 2 * device.ifindex as usize;
            contents[at..at + 2].copy_from_slice(&class.to_le_bytes());
        }
        self.devices = Some(self.maps.push(MapDef::data(DEVICES_MAP, DataSection::Data, contents)));
    }

    fn program(&mut self) {
        self.suspended();
        self.headers();
        self.forget_key();
        self.derived();
        self.members();
        self.steps();
        self.endings();
    }

    /// Leaves the packet to the kernel if the program is told to: before anything else, so that it holds from the next
    /// packet on.
    fn suspended(&mut self) {
        let Some(map) = self.suspend else { return };
        let a = &mut self.asm;
        let goes_on = a.label();
        a.comment("is it suspended?");
        a.load_map_value(Reg::R2, map, 0);
        a.load(Size::W, Reg::R2, Reg::R2, 0);
        a.jump32(Cond::Eq, Reg::R2, 0, goes_on);
        a.mov32(Reg::R0, return_code(self.target.attach, self.plan.place.mode, Verdict::Defer));
        a.exit();
        a.bind(goes_on);
    }

    /// The ends of frames that no rule sees, the one place that counts, and the safe return.
    fn endings(&mut self) {
        self.asm.set_line(None);
        for (kind, label) in self.frame_ends.clone() {
            self.asm.bind(label);
            self.asm.comment(format!("{kind}"));
            match (kind, self.target.attach) {
                (FrameKind::Runt, _) => self.asm.store(Size::W, Reg::FP, abi::LENGTH, 0),
                (FrameKind::Malformed, Attach::Xdp) => {
                    self.asm.store(Size::W, Reg::FP, abi::LENGTH, Reg::R3);
                }
                _ => {}
            }
            let by = Decider::Frame(kind);
            match self.plan.traces.iter().position(|trace| trace.ending.is_some_and(|end| end.by == by)) {
                Some(slot) => self.end(slot as u32),
                // The plan says that this can't happen.
                None => self.goto_bail(),
            }
        }
        self.asm.bind(self.count);
        self.confirm();
        self.asm.comment("count in slot r8, return r9");
        self.bump(Operand::Reg(Reg::R8));
        self.write_mark_back();
        self.trace_switch();
        self.asm.mov64(Reg::R0, Reg::R9);
        self.leave();
        if self.bail_used {
            self.asm.bind(self.bail);
            self.asm.comment("what can't be: the safe return");
            let code = return_code(self.target.attach, self.plan.place.mode, Verdict::Defer);
            self.asm.mov32(Reg::R0, code);
            self.asm.exit();
        }
        self.trace_report();
    }

    /// Ends the program with `r0`. At netfilter the verifier asks for proof that it is one of the two verdicts.
    fn leave(&mut self) {
        if self.target.attach == Attach::Netfilter {
            self.asm.alu64(AluOp::And, Reg::R0, abi::netfilter::ACCEPT);
        }
        self.asm.exit();
    }

    /// Adds the packet to a counter slot, if packets are counted. `r0` to `r5` are lost.
    fn bump(&mut self, slot: Operand) {
        let Some(counters) = self.counters else { return };
        let a = &mut self.asm;
        let done = a.label();
        a.store(Size::W, Reg::FP, abi::COUNTER_KEY, slot);
        a.load_map(Reg::R1, counters);
        a.mov64(Reg::R2, Reg::FP);
        a.alu64(AluOp::Add, Reg::R2, i32::from(abi::COUNTER_KEY));
        a.call(Helper::MAP_LOOKUP_ELEM);
        a.jump64(Cond::Eq, Reg::R0, 0, done);
        a.load(Size::Dw, Reg::R1, Reg::R0, 0);
        a.alu64(AluOp::Add, Reg::R1, 1);
        a.store(Size::Dw, Reg::R0, 0, Reg::R1);
        a.load(Size::W, Reg::R2, Reg::FP, abi::LENGTH);
        a.load(Size::Dw, Reg::R1, Reg::R0, 8);
        a.alu64(AluOp::Add, Reg::R1, Reg::R2);
        a.store(Size::Dw, Reg::R0, 8, Reg::R1);
        a.bind(done);
    }

    /// Writes the packet's mark, if that is the program's to do.
    fn write_mark_back(&mut self) {
        let Some(slot) = self.slot(Field::Mark) else { return };
        if writes_mark(self.plan, self.target.attach) {
            self.asm.load(Size::W, Reg::R1, Reg::FP, self.layout.word(slot.word));
            self.asm.store(Size::W, CTX, abi::sk_buff::MARK, Reg::R1);
        }
    }

    /// Ends with an ending's slot.
    fn end(&mut self, slot: u32) {
        let code = self.return_code(slot);
        self.asm.mov32(Reg::R8, slot as i32);
        self.asm.mov32(Reg::R9, code);
        self.asm.goto(self.count);
    }

    /// The return code of a slot's ending; [`abi::CONFIRM`] if it depends on a connection.
    fn return_code(&self, slot: u32) -> i32 {
        let trace = self.plan.traces.get(slot as usize);
        if trace.is_some_and(|trace| trace.if_absent) {
            return abi::CONFIRM;
        }
        let ending = trace.and_then(|trace| trace.ending);
        let verdict = ending.map_or(Verdict::Defer, |ending| ending.verdict);
        return_code(self.target.attach, self.plan.place.mode, verdict)
    }

    fn goto_bail(&mut self) {
        let bail = self.bail_label();
        self.asm.goto(bail);
    }

    fn bail_label(&mut self) -> Label {
        self.bail_used = true;
        self.bail
    }

    /// The label where frames of a kind end.
    fn frame_end(&mut self, kind: FrameKind) -> Label {
        let asm = &mut self.asm;
        *self.frame_ends.entry(kind).or_insert_with(|| asm.label())
    }

    fn slot(&self, field: Field) -> Option<KeySlot> {
        self.plan.key.iter().find(|slot| slot.field == field).copied()
    }

    /// Stores `reg` as the only word of a field, if the key has the field.
    fn store_field(&mut self, field: Field, reg: Reg) {
        if let Some(slot) = self.slot(field) {
            self.asm.store(Size::W, Reg::FP, self.layout.word(slot.word), reg);
        }
    }

    /// Attributes what follows to a rule.
    fn set_rule(&mut self, rule: Option<Rule>) {
        let line = rule.and_then(|rule| {
            if let Some(line) = self.lines.get(&rule) {
                return *line;
            }
            let line = (self.target.rule)(rule).map(|found| {
                let file = match self.files.get(&found.file) {
                    Some(file) => *file,
                    None => {
                        let file = self.asm.file(found.file.clone());
                        self.files.insert(found.file.clone(), file);
                        file
                    }
                };
                self.asm.line(file, found.line, found.text)
            });
            self.lines.insert(rule, line);
            line
        });
        self.asm.set_line(line);
    }

    fn finish(self) -> Result<Object, Vec<Diagnostic>> {
        if !self.diagnostics.is_empty() {
            return Err(self.diagnostics);
        }
        let mut manifest = Manifest { sets: self.set_manifests, ..manifest(self.plan, self.target) };
        let code = match self.asm.finish() {
            Ok(code) => code,
            Err(error) => {
                let diagnostic = match error.code() {
                    Some(code) => Diagnostic::error(code, error.to_string(), None)
                        .with_hint("fewer stages decided by code make a shorter program"),
                    None => Diagnostic::error(GENERATOR_FAULT, error.to_string(), None)
                        .with_note("this is a fault of polc, not of the rules")
                        .with_hint("please report it with the rule set"),
                };
                return Err(vec![diagnostic]);
            }
        };
        // The estimate is never above what the kernel does, so nothing that would load is refused.
        if let Ok(budget) = Budget::of(&code)
            && let Err(over) = budget.enforce()
        {
            let diagnostic = Diagnostic::error(over.code, over.to_string(), None)
                .with_note(budget.to_string())
                .with_hint("split the rule set");
            return Err(vec![diagnostic]);
        }
        manifest.needs.kernel = code.kernel.iter().map(|used| used.item.to_string()).collect();
        manifest.needs.kernel.sort_unstable();
        manifest.needs.kernel.dedup();
        let kind = match self.target.attach {
            Attach::Xdp => ProgramKind::Xdp,
            Attach::TcIngress | Attach::TcEgress => ProgramKind::Classifier,
            Attach::Netfilter => ProgramKind::Netfilter,
        };
        let mut object = Object::new(manifest);
        object.maps = self.maps;
        object.programs.push(Program { name: self.target.name.clone(), kind, code });
        Ok(object)
    }
}

/// The words of the key that a plan's steps read; `None` if others than steps read it: the walk, look-ups in sets and of
/// connections.
fn read_words(plan: &Plan) -> Option<BTreeSet<u8>> {
    if !plan.walk.exits.is_empty()
        || !plan.members.is_empty()
        || plan.traces.iter().any(|trace| trace.if_absent)
    {
        return None;
    }
    let mut words = BTreeSet::new();
    for step in plan.steps.values() {
        match step {
            StepData::Linear(step) => {
                let tests = step.entries.iter().flat_map(|entry| &entry.tests);
                words.extend(tests.flat_map(|test| test.any.iter().flatten()).map(|test| test.word));
            }
            StepData::Lookup(step) => words.extend(step.ops.values().filter_map(|op| match op {
                Op::Word(word) => Some(*word),
                _ => None,
            })),
        }
    }
    Some(words)
}

/// Whether a target of the plan is in code.
fn step_of(target: PlanTarget) -> Option<Step> {
    match target {
        PlanTarget::Step(step) => Some(step),
        PlanTarget::Walk(_) => None,
    }
}

fn manifest(plan: &Plan, target: &Target<'_>) -> Manifest {
    let mut counted: Vec<Count> = plan.traces.iter().flat_map(|trace| trace.counts.iter().copied()).collect();
    counted.sort_unstable();
    counted.dedup();
    Manifest {
        polc: env!("CARGO_PKG_VERSION").to_string(),
        attach: Some(target.attach),
        path: plan.place.path.clone(),
        mode: Some(plan.place.mode),
        family: Some(plan.family),
        semantics: Some(target.semantics),
        counters: plan.traces.iter().map(|trace| counter_slot(trace, &counted, target)).collect(),
        counted: counted.iter().map(|count| counted_as(*count, target)).collect(),
        devices: plan.devices.devices.iter().map(|(device, _)| *device).collect(),
        trace: target.trace.then(TraceManifest::current),
        sets: Vec::new(),
        needs: Needs::default(),
        kernel_min: match target.attach {
            // Direct access to the stack at a variable offset.
            Attach::Xdp | Attach::TcIngress | Attach::TcEgress => KernelVersion(5, 18),
            // Programs at netfilter hooks.
            Attach::Netfilter => KernelVersion(6, 4),
        },
    }
}

fn counter_slot(trace: &Trace, counted: &[Count], target: &Target<'_>) -> CounterSlot {
    let index = |count: &Count| counted.binary_search(count).expect("every trace's counts are listed") as u32;
    let mut slot = CounterSlot {
        kind: CounterKind::OnTheWay,
        table: None,
        chain: None,
        rule: None,
        file: None,
        line: None,
        text: "on the way".to_string(),
        verdict: None,
        counts: trace.counts.iter().map(index).collect(),
    };
    let Some(ending) = trace.ending else { return slot };
    slot.kind = match (ending.by, ending.verdict) {
        (Decider::Frame(_), _) => CounterKind::Frame,
        (_, Verdict::Defer) => CounterKind::Defer,
        (Decider::Rule(_), _) => CounterKind::Rule,
        (Decider::Hotdrop(_), _) => CounterKind::Hotdrop,
        (Decider::Policy(_), _) => CounterKind::Policy,
        (Decider::Nothing, _) => CounterKind::Nothing,
    };
    slot.verdict = Some(ending.verdict.word().to_string());
    let by = match ending.by {
        Decider::Rule(rule) | Decider::Hotdrop(rule) => counted_as(Count::Rule(rule), target),
        Decider::Policy(chain) => counted_as(Count::Policy(chain), target),
        Decider::Frame(_) | Decider::Nothing => Counted::default(),
    };
    if !by.chain.is_empty() {
        slot.text = by.text;
        slot.table = Some(by.table);
        slot.chain = Some(by.chain);
        slot.rule = by.rule;
        slot.file = by.file;
        slot.line = by.line;
    } else {
        slot.text = ending.by.to_string();
    }
    slot
}

fn counted_as(count: Count, target: &Target<'_>) -> Counted {
    let named = match count {
        Count::Rule(rule) => (target.rule)(rule).map(|found| Counted {
            table: found.table,
            chain: found.chain,
            rule: Some(found.number),
            file: Some(found.file),
            line: Some(found.line),
            text: found.text,
            canonical: None,
        }),
        Count::Policy(chain) => (target.chain)(chain).map(|(table, chain)| Counted {
            text: format!("policy of {chain}"),
            table,
            chain,
            ..Counted::default()
        }),
    };
    named.unwrap_or_else(|| Counted { text: count.to_string(), ..Counted::default() })
}
