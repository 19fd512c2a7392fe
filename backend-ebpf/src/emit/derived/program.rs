//! `u32` programs: tests unrolled, since a program's size is what the user wrote.

use polc_ir::derived::{U32Op, U32Program, U32Test};

use crate::abi;
use crate::asm::Label;
use crate::emit::Emitter;
use crate::insn::{AluOp, Cond, Operand, Reg, Size};

impl Emitter<'_> {
    /// net/netfilter/xt_u32.c, `u32_match_it`. `r7` is the origin, `r8` the value.
    pub(super) fn u32_program(&mut self, word: u8, program: &U32Program, fails: Label) {
        for test in &program.tests {
            self.u32_test(test, fails);
        }
        self.set_word(word, 1);
    }

    fn u32_test(&mut self, test: &U32Test, fails: Label) {
        self.asm.mov64(Reg::R7, 0);
        self.u32_load(test.start, fails);
        for op in &test.ops {
            match *op {
                U32Op::And(mask) => self.asm.alu32(AluOp::And, Reg::R8, Operand::bits(mask)),
                U32Op::ShiftLeft(by @ 0..32) => self.asm.alu32(AluOp::Lsh, Reg::R8, by as i32),
                U32Op::ShiftRight(by @ 0..32) => self.asm.alu32(AluOp::Rsh, Reg::R8, by as i32),
                U32Op::ShiftLeft(_) | U32Op::ShiftRight(_) => self.asm.mov32(Reg::R8, 0),
                U32Op::At(offset) => {
                    self.asm.alu64(AluOp::Add, Reg::R7, Reg::R8);
                    self.u32_load(offset, fails);
                }
            }
        }
        let holds = self.asm.label();
        for &(first, last) in &test.ranges {
            self.asm.mov32(Reg::R1, Reg::R8);
            self.asm.alu32(AluOp::Sub, Reg::R1, Operand::bits(first));
            if first <= last {
                self.asm.jump32(Cond::Le, Reg::R1, Operand::bits(last - first), holds);
            }
        }
        self.asm.goto(fails);
        self.asm.bind(holds);
    }

    /// `r8` = the word at `r7 + offset` of the packet, or fails.
    fn u32_load(&mut self, offset: u32, fails: Label) {
        let a = &mut self.asm;
        a.mov32(Reg::R2, Operand::bits(offset));
        a.alu64(AluOp::Add, Reg::R2, Reg::R7);
        a.mov64(Reg::R3, Reg::R2);
        a.alu64(AluOp::Add, Reg::R3, 4);
        a.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
        a.jump64(Cond::Gt, Reg::R3, Reg::R1, fails);
        self.copy_bytes(4, 0);
        self.load_be(Reg::R8, Reg::FP, abi::BUFFER, 4);
    }
}
