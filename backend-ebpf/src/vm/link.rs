//! Turns an object's program into one that rbpf can run.
//!
//! The loader's part: map references become addresses in the arena or handles, calls of kernel functions become calls
//! of helpers that emulate them. The kernel's part: recorded loads of packet pointers become 64 bits wide. And what rbpf
//! lacks is woven in: `tail_call` ends the program when it succeeds, and, since rbpf has no step limit, each backward
//! jump asks a helper first whether the run may go on.
//! A program without backward jumps ends after at most as many steps as it has instructions and is left as it is.
//!
//! What is woven in, `X` being the instruction at hand:
//!
//! ```text
//! at entry, if a helper takes pointers    tail call              backward jump
//!   r2 = r10                                call tail_call         *(u64 *)(r10 -512) = r0
//!   call ENTER  (where the stack is)        if w0 == 0 goto +1     call STEP
//!                                           exit                   if w0 == 0 goto +1
//!                                                                  exit
//!                                                                  r0 = *(u64 *)(r10 -512)
//!                                                                  X
//! ```
//!
//! rbpf keeps `r1`-`r5` over calls, so nothing else has to be saved.

use polc_ir::limits::{STACK_BYTES_MAX, VERIFIER_PROCESSED_MAX};

use super::{VmError, context, helpers, maps};
use crate::asm;
use crate::budget::stack_bytes;
use crate::insn::{AluOp, Cond, Helper, Insn, Operand, Reg, Size, Width};
use crate::kernel_api::KernelItem;
use crate::object::{Program, ProgramKind};

/// The scratch place of a backward jump: the last 8 bytes of the stack, which no program with loops may use.
const SCRATCH: i16 = -(STACK_BYTES_MAX as i16);

/// A program ready for rbpf.
#[derive(Debug)]
pub(crate) struct Linked {
    pub(crate) kind: ProgramKind,
    /// Encoded instructions.
    pub(crate) bytes: Vec<u8>,
    /// How many backward jumps a run may take, so that it makes no more steps than the kernel's verifier would
    /// follow.
    pub(crate) back_jumps_max: u32,
    /// Whether it may call `skb_pull_data`, which moves `data_end`.
    pub(crate) pulls: bool,
}

/// Links `program`; `value_base` gives the address of a map's first value by the map's index.
pub(crate) fn link(program: &Program, value_base: impl Fn(usize) -> u64) -> Result<Linked, VmError> {
    let refuse = |at: u32, why: String| VmError::Refused { program: program.name.clone(), at, why };
    let code = &program.code;
    asm::check(code).map_err(|error| refuse(0, error.to_string()))?;
    let insns = code.insns().map_err(|(at, why)| refuse(at, why.to_string()))?;
    let has_loops = insns.iter().any(|(_, insn)| insn.jump_offset().is_some_and(|off| off < 0));
    if has_loops && stack_bytes(&insns) > STACK_BYTES_MAX - 8 {
        return Err(refuse(0, "a loop, and no stack left to watch it".to_string()));
    }

    // New instructions, and for each old slot the new slot it became.
    let mut new: Vec<Insn> = Vec::with_capacity(insns.len());
    let mut new_slots = 0u32;
    let mut became = vec![0u32; code.slots.len() + 1];
    // Jumps to fix: index in `new`, its new slot, its old target.
    let mut jumps: Vec<(usize, u32, u32)> = Vec::new();
    let (mut relocs, mut ctx_loads) = (code.relocs.iter().peekable(), code.ctx_loads.iter().peekable());
    // Fields need nothing: what the VM lays out is where unrelocated programs look for it.
    let mut kernel =
        code.kernel.iter().filter(|used| matches!(used.item, KernelItem::Function(_))).peekable();
    let mut longest_back = 0u32;
    let mut pulls = false;
    let takes_pointers = insns
        .iter()
        .any(|(_, insn)| matches!(insn, Insn::Call { helper } if helpers::takes_pointers(*helper)))
        || !code.kernel.is_empty();
    let mut push = |insn: Insn, new: &mut Vec<Insn>| {
        let at = new_slots;
        new_slots += insn.slots() as u32;
        new.push(insn);
        at
    };
    if takes_pointers {
        push(mov(Reg::R2, Reg::FP), &mut new);
        push(Insn::Call { helper: helpers::ENTER }, &mut new);
    }
    for &(at, insn) in &insns {
        let woven: &[Insn] = match insn {
            Insn::Ja { off } | Insn::Jump { off, .. } if off < 0 => &BACK_JUMP,
            _ => &[],
        };
        let mut start = None;
        for &insn in woven {
            start.get_or_insert(push(insn, &mut new));
        }
        let linked = match insn {
            Insn::LoadMap { dst, .. } | Insn::LoadMapValue { dst, .. } => {
                let reloc = relocs
                    .next_if(|reloc| reloc.slot == at)
                    .ok_or_else(|| refuse(at, "a map reference without a relocation".to_string()))?;
                let imm = match reloc.kind {
                    asm::RelocKind::Fd => maps::handle(reloc.map),
                    asm::RelocKind::Value { offset } => {
                        value_base(reloc.map.as_u32() as usize).wrapping_add(u64::from(offset))
                    }
                };
                Insn::LoadImm64 { dst, imm }
            }
            Insn::Load { size, dst, base, off } if ctx_loads.next_if_eq(&&at).is_some() => {
                let wide =
                    context::widen(program.kind, off).filter(|_| size == Size::W).ok_or_else(|| {
                        refuse(at, format!("offset {off} of the context holds no packet pointer"))
                    })?;
                Insn::Load { size: Size::Dw, dst, base, off: wide }
            }
            Insn::Call { helper } if !helpers::is_known(helper) => {
                return Err(refuse(at, format!("the check VM has no helper {helper}")));
            }
            Insn::CallKernel { .. } => {
                let used = kernel
                    .next_if(|used| used.slot == at)
                    .ok_or_else(|| refuse(at, "a kernel function without a name".to_string()))?;
                match used.item {
                    KernelItem::Function(function) => {
                        Insn::Call { helper: helpers::of_kernel_function(function) }
                    }
                    KernelItem::Field(_) => unreachable!("left out above"),
                }
            }
            Insn::Call { helper } => {
                pulls |= helper == Helper::SKB_PULL_DATA;
                insn
            }
            other => other,
        };
        let slot = push(linked, &mut new);
        became[at as usize] = start.unwrap_or(slot);
        if let Some(off) = insn.jump_offset() {
            let target = (i64::from(at) + 1 + i64::from(off)) as u32;
            jumps.push((new.len() - 1, slot, target));
            if off < 0 {
                longest_back = longest_back.max(at + 1 - target);
            }
        }
        if matches!(insn, Insn::Call { helper: Helper::TAIL_CALL }) {
            push(
                Insn::Jump { width: Width::W32, cond: Cond::Eq, dst: Reg::R0, src: Operand::Imm(0), off: 1 },
                &mut new,
            );
            push(Insn::Exit, &mut new);
        }
    }
    for (index, slot, target) in jumps {
        let target = became[target as usize];
        // rbpf computes targets in 16 bits: beyond them it would panic or land elsewhere.
        let reaches = |slot: u32| i16::try_from(slot).is_ok();
        let off = i16::try_from(i64::from(target) - i64::from(slot) - 1).ok();
        match off.filter(|_| reaches(slot + 1) && reaches(target)) {
            Some(off) => new[index] = new[index].with_jump_offset(off),
            None => return Err(refuse(slot, "a jump beyond what the check VM can follow".to_string())),
        }
    }
    let mut slots = Vec::with_capacity(new_slots as usize);
    new.iter().for_each(|insn| insn.encode(&mut slots));
    Ok(Linked {
        kind: program.kind,
        bytes: slots.iter().flat_map(|slot| slot.to_le_bytes()).collect(),
        back_jumps_max: VERIFIER_PROCESSED_MAX as u32 / longest_back.max(1),
        pulls,
    })
}

const fn mov(dst: Reg, src: Reg) -> Insn {
    Insn::Alu { width: Width::W64, op: AluOp::Mov, dst, src: Operand::Reg(src) }
}

/// What comes before a backward jump.
const BACK_JUMP: [Insn; 5] = [
    Insn::Store { size: Size::Dw, base: Reg::FP, off: SCRATCH, src: Operand::Reg(Reg::R0) },
    Insn::Call { helper: helpers::STEP },
    Insn::Jump { width: Width::W32, cond: Cond::Eq, dst: Reg::R0, src: Operand::Imm(0), off: 1 },
    Insn::Exit,
    Insn::Load { size: Size::Dw, dst: Reg::R0, base: Reg::FP, off: SCRATCH },
];
