//! The assembler: instructions with labels in, position-fixed code with its side tables out.
//!
//! Labels are typed numbers, so a wrong one does not compile, and everything that a verifier or the check VM would
//! reject later for a reason that has nothing to do with the policy is rejected here, by [`Asm::finish`], with a name:
//! an unbound label, a jump too far, unreachable code, a backward jump without a trip count, an instruction that the
//! check VM runs differently from the kernel. Each is a bug of the code generator, except the size limit, which a
//! large policy can reach; see [`AsmError::code`].
//!
//! Besides the instructions, [`Code`] records what later stages could only guess: which `ld_imm64` refer to maps,
//! which kernel function a call is of, which field of the kernel's structures a load is of, which 32-bit context loads are packet pointers (the kernel widens those; the check VM has to do the same), which
//! source rule each instruction comes from, and how often a loop runs at most.
//!
//! ```
//! use polc_backend_ebpf::{asm::Asm, insn::{Cond, Reg}};
//!
//! let mut a = Asm::new();
//! let drop = a.label();
//! a.mov32(Reg::R0, 2); // XDP_PASS
//! a.jump32(Cond::Eq, Reg::R0, 1, drop);
//! a.exit();
//! a.bind(drop);
//! a.mov32(Reg::R0, 1);
//! a.exit();
//! assert_eq!(a.finish().unwrap().slots.len(), 5);
//! ```

use std::collections::BTreeMap;
use std::fmt;

use cranelift_entity::{EntityRef, PrimaryMap, entity_impl, packed_option::PackedOption};
use polc_ir::diag::Code as DiagCode;
use polc_ir::entities::Map;
use polc_ir::limits::{OBJECT_LINE_NUMBER_MAX, OBJECT_LINE_TEXT_BYTES_MAX, PROGRAM_INSNS_MAX};

use crate::insn::{AluOp, ByteOrder, Cond, Helper, Insn, Operand, Reg, Size, Unsupported, Width, decode_all};
use crate::kernel_api::{KernelField, KernelFunction, KernelItem};

/// A place in a program that jumps can name before it exists. Prints as `label4`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(u32);
entity_impl!(Label, "label");

/// A source file of a program's lines. Prints as `file0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct File(u32);
entity_impl!(File, "file");

/// A source line of a program. Prints as `line9`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Line(u32);
entity_impl!(Line, "line");

/// A line of the user's text that instructions come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineRef {
    /// The file, an index into [`Code::files`].
    pub file: File,
    /// The line's number, from 1; 0 for text that no file holds.
    pub line: u32,
    /// The line's text, without its end.
    pub text: String,
}

/// What an `ld_imm64` asks of the map it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RelocKind {
    /// The map itself, for a helper.
    Fd,
    /// The address of the byte at `offset` in the map's only value.
    Value {
        /// Bytes from the value's start.
        offset: u32,
    },
}

/// An `ld_imm64` that needs a map's address when the program is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reloc {
    /// The first of the instruction's two slots.
    pub slot: u32,
    /// The map, an index into the object's maps.
    pub map: Map,
    /// Which address.
    pub kind: RelocKind,
}

/// A backward jump and how often it is taken at most each time the loop is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BoundedLoop {
    /// The backward jump's slot.
    pub back_jump: u32,
    /// Times the jump is taken, at most.
    pub trips: u32,
}

/// An instruction that uses something of the running kernel's, and has to be put right when the program is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelRef {
    /// The instruction's slot: a call for a function, a load for a field.
    pub slot: u32,
    /// What it uses.
    pub item: KernelItem,
}

/// A finished program: position-fixed instructions and what is known about them. Positions are slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code {
    /// The encoded instructions. Map references hold no address yet: file descriptor 0.
    pub slots: Vec<u64>,
    /// References to maps, ascending.
    pub relocs: Vec<Reloc>,
    /// Uses of the kernel's own functions and structures, ascending.
    pub kernel: Vec<KernelRef>,
    /// `ldxw` of packet pointers from the context, ascending.
    pub ctx_loads: Vec<u32>,
    /// Marked loops, ascending.
    pub loops: Vec<BoundedLoop>,
    /// Source files of `lines`.
    pub files: Vec<String>,
    /// Source lines, in the order of first use.
    pub lines: Vec<LineRef>,
    /// From which slot on which line applies (`None`: no line), ascending by slot, no two adjacent equal.
    pub line_marks: Vec<(u32, PackedOption<Line>)>,
    /// Remarks for dumps, ascending by slot. They are not written to objects.
    pub comments: Vec<(u32, String)>,
}

impl Code {
    /// The source line that the instruction at `slot` comes from.
    pub fn line_at(&self, slot: u32) -> Option<&LineRef> {
        let mark = self.line_marks.partition_point(|&(from, _)| from <= slot).checked_sub(1)?;
        let line = self.line_marks[mark].1.expand()?;
        self.lines.get(line.index())
    }

    /// Drops files and lines that nothing refers to, merges equal ones, and numbers them in the order of first use:
    /// the one form that survives a round trip through a file.
    fn tidy_lines(&mut self) {
        let (old_files, old_lines) = (std::mem::take(&mut self.files), std::mem::take(&mut self.lines));
        let mut files = BTreeMap::new();
        let mut lines = BTreeMap::new();
        let mut marks: Vec<(u32, PackedOption<Line>)> = Vec::new();
        for (slot, line) in std::mem::take(&mut self.line_marks) {
            let line = line.expand().map(|line| {
                let LineRef { file, line, text } = &old_lines[line.index()];
                let name = &old_files[file.index()];
                let file = *files.entry(name).or_insert_with(|| {
                    self.files.push(name.clone());
                    File::new(self.files.len() - 1)
                });
                *lines.entry((file, *line, text)).or_insert_with(|| {
                    self.lines.push(LineRef { file, line: *line, text: text.clone() });
                    Line::new(self.lines.len() - 1)
                })
            });
            if marks.last().map_or(PackedOption::default(), |last| last.1) != line.into() {
                marks.push((slot, line.into()));
            }
        }
        self.line_marks = marks;
    }

    /// The program as `(slot, instruction)` pairs.
    pub fn insns(&self) -> Result<Vec<(u32, Insn)>, (u32, Unsupported)> {
        decode_all(&self.slots)
    }
}

/// An instruction that exists in the typed form and that the check VM (rbpf 0.4) runs differently from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnsafeInsn {
    /// A 64-bit unsigned or equality comparison with an immediate whose top bit is set: the kernel sign-extends the
    /// immediate, the VM zero-extends it. Use a 32-bit comparison or a register.
    CompareImm64,
    /// A 32-bit modulo: by zero, the VM keeps the upper half of the register where the kernel clears it.
    Mod32,
    /// A 64-bit negation: the VM's build with overflow checks panics on `i64::MIN`. Subtract from zero instead.
    Neg64,
}

impl fmt::Display for UnsafeInsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            UnsafeInsn::CompareImm64 => "64-bit comparison with an immediate whose top bit is set",
            UnsafeInsn::Mod32 => "32-bit modulo",
            UnsafeInsn::Neg64 => "64-bit negation",
        })
    }
}

impl UnsafeInsn {
    /// Why `insn` must not be emitted, if so.
    pub fn of(insn: &Insn) -> Option<UnsafeInsn> {
        match insn {
            Insn::Jump { width: Width::W64, cond, src: Operand::Imm(imm), .. } if *imm < 0 => match cond {
                Cond::Eq | Cond::Ne | Cond::Gt | Cond::Ge | Cond::Lt | Cond::Le => {
                    Some(UnsafeInsn::CompareImm64)
                }
                Cond::Set | Cond::Sgt | Cond::Sge | Cond::Slt | Cond::Sle => None,
            },
            Insn::Alu { width: Width::W32, op: AluOp::Mod, .. } => Some(UnsafeInsn::Mod32),
            Insn::Neg { width: Width::W64, .. } => Some(UnsafeInsn::Neg64),
            _ => None,
        }
    }
}

/// Diagnostic code: a program is longer than [`PROGRAM_INSNS_MAX`], or a jump in it does not reach.
pub const PROGRAM_TOO_LONG: DiagCode = DiagCode(550);

/// Why a program can't be assembled. All but `TooLong` and `JumpTooFar` are bugs of the code generator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AsmError {
    /// A jump names a label that was never bound.
    UnboundLabel {
        /// The label.
        label: Label,
        /// The jump's slot.
        at: u32,
    },
    /// A label was bound twice.
    BoundTwice {
        /// The label.
        label: Label,
    },
    /// A jump's distance does not fit 16 bits.
    JumpTooFar {
        /// The jump's slot.
        at: u32,
        /// The distance, slots.
        distance: i64,
    },
    /// More than [`PROGRAM_INSNS_MAX`] slots.
    TooLong {
        /// The program's length.
        slots: usize,
    },
    /// No path leads to this instruction; the kernel would refuse the program.
    Unreachable {
        /// The first such slot.
        at: u32,
        /// The instruction.
        insn: Insn,
    },
    /// Control can run past the last instruction.
    FallsOffEnd,
    /// A backward jump without a trip count.
    UnmarkedLoop {
        /// The jump's slot.
        at: u32,
    },
    /// The check VM would run this differently from the kernel.
    Unsafe {
        /// The instruction's slot.
        at: u32,
        /// Why.
        why: UnsafeInsn,
    },
    /// `r10` is written.
    FramePointerWritten {
        /// The instruction's slot.
        at: u32,
    },
}

impl AsmError {
    /// The diagnostic's code when a large policy, not a bug, is the cause.
    pub fn code(&self) -> Option<DiagCode> {
        match self {
            AsmError::TooLong { .. } | AsmError::JumpTooFar { .. } => Some(PROGRAM_TOO_LONG),
            _ => None,
        }
    }
}

impl fmt::Display for AsmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AsmError::UnboundLabel { label, at } => {
                write!(f, "jump at {at} to {label}, which is bound nowhere")
            }
            AsmError::BoundTwice { label } => write!(f, "{label} is bound twice"),
            AsmError::JumpTooFar { at, distance } => {
                write!(f, "jump at {at} over {distance} instructions; at most 32767 can be encoded")
            }
            AsmError::TooLong { slots } => {
                write!(f, "program of {slots} instructions; the limit is {PROGRAM_INSNS_MAX}")
            }
            AsmError::Unreachable { at, insn } => write!(f, "instruction {at} (`{insn}`) is unreachable"),
            AsmError::FallsOffEnd => f.write_str("control can run past the last instruction"),
            AsmError::UnmarkedLoop { at } => write!(f, "backward jump at {at} has no trip count"),
            AsmError::Unsafe { at, why } => {
                write!(f, "instruction {at}: {why}, which the check VM runs wrongly")
            }
            AsmError::FramePointerWritten { at } => write!(f, "instruction {at} writes the frame pointer"),
        }
    }
}

impl std::error::Error for AsmError {}

/// An assembler for one program.
#[derive(Clone, Debug, Default)]
pub struct Asm {
    code: Code,
    labels: PrimaryMap<Label, Option<u32>>,
    bound_twice: Option<Label>,
    /// Jumps whose distance is filled in at the end.
    fixups: Vec<(u32, Label)>,
    line: PackedOption<Line>,
}

impl Asm {
    /// An empty program.
    pub fn new() -> Asm {
        Asm::default()
    }

    /// The slot of the next instruction.
    pub fn here(&self) -> u32 {
        self.code.slots.len() as u32
    }

    /// A new label, not bound yet.
    pub fn label(&mut self) -> Label {
        self.labels.push(None)
    }

    /// A new label, bound to the next instruction.
    pub fn label_here(&mut self) -> Label {
        self.labels.push(Some(self.here()))
    }

    /// Binds `label` to the next instruction.
    pub fn bind(&mut self, label: Label) {
        let here = self.here();
        if self.labels[label].replace(here).is_some() {
            self.bound_twice.get_or_insert(label);
        }
    }

    /// Whether `label` is bound.
    pub fn is_bound(&self, label: Label) -> bool {
        self.labels[label].is_some()
    }

    /// Registers a source file by the name that users know.
    pub fn file(&mut self, name: impl Into<String>) -> File {
        self.code.files.push(name.into().replace('\0', "\u{fffd}"));
        File::new(self.code.files.len() - 1)
    }

    /// Registers a source line. Registering is separate from [`Asm::set_line`] so that a rule whose code is in many
    /// places is stored once.
    /// Text is cut at [`OBJECT_LINE_TEXT_BYTES_MAX`], a number above [`OBJECT_LINE_NUMBER_MAX`] becomes that: the object file holds
    /// no more.
    pub fn line(&mut self, file: File, line: u32, text: impl Into<String>) -> Line {
        let mut text = text.into().replace('\0', "\u{fffd}");
        text.truncate(text.floor_char_boundary(OBJECT_LINE_TEXT_BYTES_MAX));
        self.code.lines.push(LineRef { file, line: line.min(OBJECT_LINE_NUMBER_MAX), text });
        Line::new(self.code.lines.len() - 1)
    }

    /// From here on, instructions come from `line`, or from no rule in particular.
    pub fn set_line(&mut self, line: Option<Line>) {
        self.line = line.into();
    }

    /// Attaches a remark to the next instruction. It shows in dumps only.
    pub fn comment(&mut self, text: impl Into<String>) {
        let here = self.here();
        match self.code.comments.last_mut() {
            Some((at, before)) if *at == here => {
                before.push_str("; ");
                before.push_str(&text.into());
            }
            _ => self.code.comments.push((here, text.into())),
        }
    }

    /// Appends any instruction. Jumps go through [`Asm::jump`] and [`Asm::goto`], map references through
    /// [`Asm::load_map`] and [`Asm::load_map_value`]; this is for the rest.
    pub fn push(&mut self, insn: Insn) {
        let here = self.here();
        if self.code.line_marks.last().map_or(PackedOption::default(), |&(_, line)| line) != self.line {
            self.code.line_marks.push((here, self.line));
        }
        insn.encode(&mut self.code.slots);
    }

    /// `dst OP= src`, 64 bits wide.
    pub fn alu64(&mut self, op: AluOp, dst: Reg, src: impl Into<Operand>) {
        self.push(Insn::Alu { width: Width::W64, op, dst, src: src.into() });
    }

    /// `dst OP= src`, 32 bits wide; the upper half becomes 0.
    pub fn alu32(&mut self, op: AluOp, dst: Reg, src: impl Into<Operand>) {
        self.push(Insn::Alu { width: Width::W32, op, dst, src: src.into() });
    }

    /// `dst = src`; an immediate is sign-extended.
    pub fn mov64(&mut self, dst: Reg, src: impl Into<Operand>) {
        self.alu64(AluOp::Mov, dst, src);
    }

    /// `dst = src`, the lower half; the upper becomes 0.
    pub fn mov32(&mut self, dst: Reg, src: impl Into<Operand>) {
        self.alu32(AluOp::Mov, dst, src);
    }

    /// `dst = -dst`, 32 bits wide.
    pub fn neg32(&mut self, dst: Reg) {
        self.push(Insn::Neg { width: Width::W32, dst });
    }

    /// Converts the lower `bits` (16, 32 or 64) of `dst` between host and network order and clears the rest.
    pub fn be(&mut self, bits: u8, dst: Reg) {
        self.push(Insn::Endian { order: ByteOrder::Be, bits, dst });
    }

    /// `dst = imm`, any 64 bits.
    pub fn load_imm64(&mut self, dst: Reg, imm: u64) {
        self.push(Insn::LoadImm64 { dst, imm });
    }

    /// `dst = *(size *)(base + off)`.
    pub fn load(&mut self, size: Size, dst: Reg, base: Reg, off: i16) {
        self.push(Insn::Load { size, dst, base, off });
    }

    /// `*(size *)(base + off) = src`.
    pub fn store(&mut self, size: Size, base: Reg, off: i16, src: impl Into<Operand>) {
        self.push(Insn::Store { size, base, off, src: src.into() });
    }

    /// Loads a packet pointer (`data`, `data_end`, `data_meta`) from the 32-bit field at `off` of the context. The
    /// kernel turns the load into one of 64 bits; it is recorded, so that the check VM can.
    pub fn load_ctx_pointer(&mut self, dst: Reg, ctx: Reg, off: i16) {
        self.code.ctx_loads.push(self.here());
        self.load(Size::W, dst, ctx, off);
    }

    /// `dst = map`, an argument for helpers.
    pub fn load_map(&mut self, dst: Reg, map: Map) {
        self.code.relocs.push(Reloc { slot: self.here(), map, kind: RelocKind::Fd });
        self.push(Insn::LoadMap { dst, map: 0 });
    }

    /// `dst = &value[offset]` of a map with one value (a data section).
    pub fn load_map_value(&mut self, dst: Reg, map: Map, offset: u32) {
        self.code.relocs.push(Reloc { slot: self.here(), map, kind: RelocKind::Value { offset } });
        self.push(Insn::LoadMapValue { dst, map: 0, offset });
    }

    /// Calls a helper. `r1`-`r5` are lost, `r0` is the result.
    pub fn call(&mut self, helper: Helper) {
        self.push(Insn::Call { helper });
    }

    /// Calls a kernel function. `r1`-`r5` are lost, `r0` is the result.
    pub fn call_kernel(&mut self, function: KernelFunction) {
        self.code.kernel.push(KernelRef { slot: self.here(), item: KernelItem::Function(function) });
        self.push(Insn::CallKernel { function: 0 });
    }

    /// `dst` = a field of the kernel's structure at `base`.
    pub fn load_kernel_field(&mut self, size: Size, dst: Reg, base: Reg, field: KernelField) {
        self.code.kernel.push(KernelRef { slot: self.here(), item: KernelItem::Field(field) });
        self.load(size, dst, base, field.local_offset());
    }

    /// Ends the program with `r0`.
    pub fn exit(&mut self) {
        self.push(Insn::Exit);
    }

    /// `goto label`, forward.
    pub fn goto(&mut self, label: Label) {
        self.fixups.push((self.here(), label));
        self.push(Insn::Ja { off: 0 });
    }

    /// `if dst COND src goto label`, forward.
    pub fn jump(&mut self, width: Width, cond: Cond, dst: Reg, src: impl Into<Operand>, label: Label) {
        self.fixups.push((self.here(), label));
        self.push(Insn::Jump { width, cond, dst, src: src.into(), off: 0 });
    }

    /// `if dst COND src goto label`, comparing lower halves. The form to use for fields of up to 32 bits.
    pub fn jump32(&mut self, cond: Cond, dst: Reg, src: impl Into<Operand>, label: Label) {
        self.jump(Width::W32, cond, dst, src, label);
    }

    /// `if dst COND src goto label`, comparing whole registers.
    pub fn jump64(&mut self, cond: Cond, dst: Reg, src: impl Into<Operand>, label: Label) {
        self.jump(Width::W64, cond, dst, src, label);
    }

    /// `if dst COND src goto label`, backward, taken at most `trips` times each time the loop is entered.
    pub fn loop_jump(
        &mut self,
        width: Width,
        cond: Cond,
        dst: Reg,
        src: impl Into<Operand>,
        label: Label,
        trips: u32,
    ) {
        self.code.loops.push(BoundedLoop { back_jump: self.here(), trips });
        self.jump(width, cond, dst, src, label);
    }

    /// Fixes all jumps and checks everything this module's introduction lists.
    pub fn finish(mut self) -> Result<Code, AsmError> {
        if let Some(label) = self.bound_twice {
            return Err(AsmError::BoundTwice { label });
        }
        // Distances are computed from the same slots for a program that is too long; its size is the better message.
        let slots = self.code.slots.len();
        if slots > PROGRAM_INSNS_MAX {
            return Err(AsmError::TooLong { slots });
        }
        for &(at, label) in &self.fixups {
            let target = self.labels[label].ok_or(AsmError::UnboundLabel { label, at })?;
            let distance = i64::from(target) - i64::from(at) - 1;
            let off = i16::try_from(distance).map_err(|_| AsmError::JumpTooFar { at, distance })?;
            // `off` occupies bits 16 to 31 of a slot (see `insn`).
            self.code.slots[at as usize] |= u64::from(off as u16) << 16;
        }
        self.code.tidy_lines();
        check(&self.code)?;
        Ok(self.code)
    }
}

/// Checks what holds for any program polc emits; see [`AsmError`] for the list. Also used on programs read back.
pub fn check(code: &Code) -> Result<(), AsmError> {
    let insns = match code.insns() {
        Ok(insns) => insns,
        // Only what the typed form holds was encoded, so it decodes.
        Err((at, _)) => return Err(AsmError::Unreachable { at, insn: Insn::Exit }),
    };
    if code.slots.len() > PROGRAM_INSNS_MAX {
        return Err(AsmError::TooLong { slots: code.slots.len() });
    }
    for (at, insn) in &insns {
        if let Some(why) = UnsafeInsn::of(insn) {
            return Err(AsmError::Unsafe { at: *at, why });
        }
        if writes(insn) == Some(Reg::FP) {
            return Err(AsmError::FramePointerWritten { at: *at });
        }
        if let Some(off) = insn.jump_offset()
            && off < 0
            && code.loops.binary_search_by_key(at, |l| l.back_jump).is_err()
        {
            return Err(AsmError::UnmarkedLoop { at: *at });
        }
    }
    check_flow(code.slots.len(), &insns)
}

/// The register an instruction sets, calls aside.
fn writes(insn: &Insn) -> Option<Reg> {
    match *insn {
        Insn::Alu { dst, .. }
        | Insn::Neg { dst, .. }
        | Insn::Endian { dst, .. }
        | Insn::LoadImm64 { dst, .. }
        | Insn::LoadMap { dst, .. }
        | Insn::LoadMapValue { dst, .. }
        | Insn::Load { dst, .. } => Some(dst),
        _ => None,
    }
}

/// Every instruction must be reachable and none may be the last of a path unless it exits (kernel/bpf/verifier.c,
/// `check_cfg`).
fn check_flow(slots: usize, insns: &[(u32, Insn)]) -> Result<(), AsmError> {
    let mut index_of_slot = vec![usize::MAX; slots];
    for (index, (slot, _)) in insns.iter().enumerate() {
        index_of_slot[*slot as usize] = index;
    }
    let mut reached = vec![false; insns.len()];
    let mut todo = vec![0usize];
    while let Some(slot) = todo.pop() {
        let index = match index_of_slot.get(slot) {
            Some(&index) if index != usize::MAX => index,
            _ => return Err(AsmError::FallsOffEnd),
        };
        if std::mem::replace(&mut reached[index], true) {
            continue;
        }
        let insn = &insns[index].1;
        if insn.falls_through() {
            todo.push(slot + insn.slots());
        }
        if let Some(off) = insn.jump_offset() {
            let target = slot as i64 + 1 + i64::from(off);
            todo.push(usize::try_from(target).map_err(|_| AsmError::FallsOffEnd)?);
        }
    }
    match reached.iter().position(|reached| !reached) {
        Some(index) => Err(AsmError::Unreachable { at: insns[index].0, insn: insns[index].1 }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit_with(value: i32) -> Asm {
        let mut a = Asm::new();
        a.mov32(Reg::R0, value);
        a.exit();
        a
    }

    #[test]
    fn jumps_forward_and_marked_loops_are_fixed() {
        let mut a = Asm::new();
        let end = a.label();
        a.mov32(Reg::R0, 0);
        a.jump32(Cond::Eq, Reg::R0, 5, end);
        a.load_imm64(Reg::R2, 1 << 40);
        let again = a.label_here();
        a.alu32(AluOp::Add, Reg::R0, 1);
        a.loop_jump(Width::W32, Cond::Lt, Reg::R0, 3, again, 3);
        a.bind(end);
        a.exit();
        let code = a.finish().expect("assembles");
        let offsets: Vec<_> = code.insns().unwrap().iter().filter_map(|(_, i)| i.jump_offset()).collect();
        assert_eq!(offsets, [4, -2]);
        assert_eq!(code.loops, [BoundedLoop { back_jump: 5, trips: 3 }]);
    }

    #[test]
    fn faults_are_named() {
        let mut a = exit_with(1);
        let nowhere = a.label();
        a.goto(nowhere);
        assert_eq!(a.finish(), Err(AsmError::UnboundLabel { label: nowhere, at: 2 }));

        let mut a = exit_with(1);
        a.mov32(Reg::R0, 2);
        a.exit();
        assert!(matches!(a.finish(), Err(AsmError::Unreachable { at: 2, .. })));

        let mut a = Asm::new();
        a.mov32(Reg::R0, 0);
        assert_eq!(a.finish(), Err(AsmError::FallsOffEnd));
        assert_eq!(Asm::new().finish(), Err(AsmError::FallsOffEnd));

        let mut a = Asm::new();
        let end = a.label();
        a.mov32(Reg::R0, 0);
        a.jump32(Cond::Eq, Reg::R0, 1, end);
        a.exit();
        a.bind(end);
        assert_eq!(a.finish(), Err(AsmError::FallsOffEnd), "a label at the very end");

        let mut a = Asm::new();
        let top = a.label_here();
        a.mov32(Reg::R0, 0);
        a.jump32(Cond::Eq, Reg::R0, 1, top);
        a.exit();
        assert_eq!(a.finish(), Err(AsmError::UnmarkedLoop { at: 1 }));

        let mut a = Asm::new();
        let top = a.label_here();
        a.bind(top);
        a.exit();
        assert_eq!(a.finish(), Err(AsmError::BoundTwice { label: top }));

        let mut a = Asm::new();
        a.mov64(Reg::FP, 0);
        a.exit();
        assert_eq!(a.finish(), Err(AsmError::FramePointerWritten { at: 0 }));
    }

    #[test]
    fn what_the_vm_runs_wrongly_is_refused() {
        let refused = |insn: Insn| {
            let mut a = Asm::new();
            a.mov32(Reg::R0, 0);
            a.push(insn);
            a.exit();
            match a.finish() {
                Err(AsmError::Unsafe { at: 1, why }) => Some(why),
                _ => None,
            }
        };
        let compare =
            |width, cond, imm| Insn::Jump { width, cond, dst: Reg::R0, src: Operand::Imm(imm), off: 0 };
        assert_eq!(refused(compare(Width::W64, Cond::Eq, -1)), Some(UnsafeInsn::CompareImm64));
        assert_eq!(refused(compare(Width::W64, Cond::Le, i32::MIN)), Some(UnsafeInsn::CompareImm64));
        assert_eq!(refused(compare(Width::W64, Cond::Sgt, -1)), None);
        assert_eq!(refused(compare(Width::W64, Cond::Eq, i32::MAX)), None);
        assert_eq!(refused(compare(Width::W32, Cond::Eq, -1)), None);
        let mod32 = Insn::Alu { width: Width::W32, op: AluOp::Mod, dst: Reg::R0, src: Operand::Imm(7) };
        assert_eq!(refused(mod32), Some(UnsafeInsn::Mod32));
        assert_eq!(refused(Insn::Neg { width: Width::W64, dst: Reg::R0 }), Some(UnsafeInsn::Neg64));
        assert_eq!(refused(Insn::Neg { width: Width::W32, dst: Reg::R0 }), None);
    }

    #[test]
    fn size_is_limited_exactly() {
        let of_length = |slots: usize| {
            let mut a = Asm::new();
            for _ in 0..slots - 1 {
                a.mov32(Reg::R0, 0);
            }
            a.exit();
            a.finish()
        };
        assert_eq!(of_length(PROGRAM_INSNS_MAX).map(|code| code.slots.len()), Ok(PROGRAM_INSNS_MAX));
        let error = of_length(PROGRAM_INSNS_MAX + 1).unwrap_err();
        assert_eq!(error, AsmError::TooLong { slots: PROGRAM_INSNS_MAX + 1 });
        assert_eq!(error.code(), Some(PROGRAM_TOO_LONG));
    }

    #[test]
    fn lines_are_cut_to_what_objects_hold() {
        let mut a = Asm::new();
        let file = a.file("rules");
        // The limit falls inside the last character that begins before it.
        let long = "x".repeat(OBJECT_LINE_TEXT_BYTES_MAX - 1) + "é" + "\0";
        let line = a.line(file, u32::MAX, long);
        a.set_line(Some(line));
        a.exit();
        let code = a.finish().unwrap();
        assert_eq!(code.lines[0].text.len(), OBJECT_LINE_TEXT_BYTES_MAX - 1);
        assert_eq!(code.lines[0].line, OBJECT_LINE_NUMBER_MAX);
    }

    #[test]
    fn lines_apply_until_the_next() {
        let mut a = Asm::new();
        let file = a.file("rules.v4");
        let rule = a.line(file, 7, "-A FORWARD -j DROP");
        a.mov32(Reg::R0, 0);
        a.set_line(Some(rule));
        a.comment("verdict");
        a.mov32(Reg::R0, 1);
        a.mov32(Reg::R0, 2);
        a.set_line(None);
        a.exit();
        let code = a.finish().unwrap();
        let lines: Vec<_> = (0..4).map(|slot| code.line_at(slot).map(|line| line.line)).collect();
        assert_eq!(lines, [None, Some(7), Some(7), None]);
        assert_eq!(code.line_marks.len(), 2);
        assert_eq!(code.comments, [(1, "verdict".to_string())]);
    }
}
