//! Derived words: fields that take more than a load, computed before the first stage.
//!
//! Set membership and address types are decided by stages, which write their words; they start as 0. The rest is read
//! from the packet here, copied to the stack by a helper, so that offsets need no proof beyond the packet's length.

use polc_ir::derived::{DerivedData, U32Op, U32Program, U32Test};
use polc_ir::diag::Diagnostic;
use polc_ir::field::Field;

use super::{DERIVED_UNAVAILABLE, Emitter};
use crate::abi;
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Operand, Reg, Size, Width};

/// Most bytes of TCP options: a header of 15 words of 4 bytes, less the 20 that are fixed.
const TCP_OPTION_BYTES_MAX: i32 = 40;

impl Emitter<'_> {
    /// Computes the derived words of the key.
    pub(super) fn derived(&mut self) {
        let plan = self.plan;
        for slot in &plan.key {
            let Field::Derived(derived) = slot.field else { continue };
            self.asm.comment(format!("{derived}"));
            match plan.derived.get(derived) {
                None | Some(DerivedData::Member { .. } | DerivedData::AddressType { .. }) => {}
                Some(DerivedData::TcpOption { kind }) => self.tcp_option(slot.word, *kind),
                Some(DerivedData::U32(program)) => self.u32_program(slot.word, program),
                Some(DerivedData::DccpOption { .. }) => self.unavailable("a search of DCCP options"),
                Some(DerivedData::SctpChunks { .. }) => self.unavailable("a search of SCTP chunks"),
                Some(DerivedData::Ipv6Header(_)) => self.unavailable("a test of IPv6 extension headers"),
            }
        }
    }

    fn unavailable(&mut self, what: &str) {
        let message = format!("{what} has no form in a program yet");
        self.diagnostics.push(Diagnostic::error(DERIVED_UNAVAILABLE, message, None));
    }

    fn set_word(&mut self, word: u8, value: i32) {
        self.asm.store(Size::W, Reg::FP, self.layout.word(word), value);
    }

    /// net/netfilter/xt_tcpudp.c, `tcp_find_option`: 1 present, 0 absent, 2 the options are cut short.
    fn tcp_option(&mut self, word: u8, kind: u8) {
        let (done, cut, found, top) =
            (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        self.asm.jump64(Cond::Lt, Reg::R1, 13, done);
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_OFFSET);
        self.asm.alu64(AluOp::Add, Reg::R2, 12);
        self.copy_bytes(1, 0);
        let a = &mut self.asm;
        a.comment("r8 = bytes of options");
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.alu64(AluOp::Rsh, Reg::R8, 4);
        a.alu64(AluOp::Lsh, Reg::R8, 2);
        a.jump64(Cond::Le, Reg::R8, 20, done);
        a.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        a.jump64(Cond::Gt, Reg::R8, Reg::R1, cut);
        a.alu64(AluOp::Sub, Reg::R8, 20);
        a.load(Size::W, Reg::R2, Reg::FP, abi::L4_OFFSET);
        a.alu64(AluOp::Add, Reg::R2, 20);
        self.copy_bytes_of(Reg::R8.into(), 0);
        let a = &mut self.asm;
        a.store(Size::W, Reg::FP, abi::HANDOVER, 0);
        a.mov64(Reg::R9, 0);
        a.bind(top);
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.jump64(Cond::Ge, Reg::R7, Reg::R8, done);
        a.mov64(Reg::R4, Reg::FP);
        a.alu64(AluOp::Add, Reg::R4, Reg::R7);
        a.load(Size::B, Reg::R1, Reg::R4, abi::BUFFER);
        a.load(Size::B, Reg::R2, Reg::R4, abi::BUFFER + 1);
        a.jump32(Cond::Eq, Reg::R1, i32::from(kind), found);
        a.comment("an option's length: 1 for kinds 0 and 1, else what it says but at least 1");
        a.mov64(Reg::R3, Reg::R2);
        a.alu64(AluOp::Sub, Reg::R3, 1);
        a.alu64(AluOp::Rsh, Reg::R3, 63);
        a.alu64(AluOp::Add, Reg::R2, Reg::R3);
        a.alu64(AluOp::Sub, Reg::R1, 2);
        a.alu64(AluOp::Arsh, Reg::R1, 63);
        a.mov64(Reg::R3, Reg::R2);
        a.alu64(AluOp::Xor, Reg::R3, 1);
        a.alu64(AluOp::And, Reg::R3, Reg::R1);
        a.alu64(AluOp::Xor, Reg::R2, Reg::R3);
        a.alu64(AluOp::Add, Reg::R7, Reg::R2);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R7);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, TCP_OPTION_BYTES_MAX, top, TCP_OPTION_BYTES_MAX as u32);
        a.goto(done);
        a.bind(cut);
        self.set_word(word, 2);
        self.asm.goto(done);
        self.asm.bind(found);
        self.set_word(word, 1);
        self.asm.bind(done);
    }

    /// net/netfilter/xt_u32.c, `u32_match_it`. `r7` is the origin, `r8` the value.
    fn u32_program(&mut self, word: u8, program: &U32Program) {
        let fails = self.asm.label();
        for test in &program.tests {
            self.u32_test(test, fails);
        }
        self.set_word(word, 1);
        self.asm.bind(fails);
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
