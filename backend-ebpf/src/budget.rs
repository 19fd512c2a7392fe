//! What the kernel's verifier will make of a program, computed before it is asked.

use crate::insn::{AluOp, Insn, Operand, Reg, Width};

/// Bytes of stack a program touches, counted from the frame pointer down.
pub fn stack_bytes(insns: &[(u32, Insn)]) -> usize {
    let mut deepest = 0i64;
    // Offset below the frame pointer that a register may hold, following moves and additions in program order.
    let mut offsets: [Option<i64>; 11] = [None; 11];
    offsets[usize::from(Reg::FP.number())] = Some(0);
    for (_, insn) in insns {
        match *insn {
            Insn::Load { base, off, dst, .. } => {
                if let Some(at) = offsets[usize::from(base.number())] {
                    deepest = deepest.min(at + i64::from(off));
                }
                offsets[usize::from(dst.number())] = None;
            }
            Insn::Store { base, off, .. } => {
                if let Some(at) = offsets[usize::from(base.number())] {
                    deepest = deepest.min(at + i64::from(off));
                }
            }
            Insn::Alu { width: Width::W64, op, dst, src } => {
                let before = offsets[usize::from(dst.number())];
                let after = match (op, src) {
                    (AluOp::Mov, Operand::Reg(src)) => offsets[usize::from(src.number())],
                    (AluOp::Add, Operand::Imm(imm)) => before.map(|at| at + i64::from(imm)),
                    (AluOp::Sub, Operand::Imm(imm)) => before.map(|at| at - i64::from(imm)),
                    _ => None,
                };
                offsets[usize::from(dst.number())] = after;
                deepest = deepest.min(after.unwrap_or(0));
            }
            Insn::Alu { dst, .. } | Insn::Neg { dst, .. } | Insn::Endian { dst, .. } => {
                offsets[usize::from(dst.number())] = None;
            }
            Insn::LoadImm64 { dst, .. } | Insn::LoadMap { dst, .. } | Insn::LoadMapValue { dst, .. } => {
                offsets[usize::from(dst.number())] = None;
            }
            Insn::Ja { .. } | Insn::Jump { .. } | Insn::Call { .. } | Insn::Exit => {}
        }
    }
    deepest.unsigned_abs() as usize
}
