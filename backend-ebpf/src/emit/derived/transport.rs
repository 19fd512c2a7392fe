//! Searches in transport headers: TCP and DCCP options, SCTP chunks. What they mean is in `polc_ir::derived`.

use polc_ir::derived::{BEYOND, DCCP_TYPE_WORDS, SctpFlags, SctpRule};
use polc_ir::limits::{DCCP_OPTIONS_MAX, SCTP_CHUNKS_MAX};

use crate::abi;
use crate::asm::Label;
use crate::emit::Emitter;
use crate::insn::{AluOp, Cond, Reg, Size, Width};

/// Most bytes of TCP options: a header of 15 words of 4 bytes, less the 20 that are fixed.
const TCP_OPTION_BYTES_MAX: i32 = 40;

/// SCTP: where the map of chunk types not seen yet is in the buffer, behind a chunk's header.
const MISSING: i16 = abi::BUFFER + 8;
/// Bytes of that map.
const MISSING_BYTES: i16 = 32;
const _: () = assert!(MISSING + MISSING_BYTES <= abi::BUFFER + abi::BUFFER_BYTES);

impl Emitter<'_> {
    /// net/netfilter/xt_tcpudp.c, `tcp_find_option`: 1 present, 0 absent, 2 the options are cut short.
    pub(super) fn tcp_option(&mut self, word: u8, kind: u8, done: Label) {
        let (cut, found, top) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        self.asm.jump64(Cond::Lt, Reg::R1, 13, done);
        self.copy_transport(12, 1);
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
        self.option_length();
        let a = &mut self.asm;
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
    }

    /// `r2` = how many bytes the option of kind `r1` takes whose second byte is `r2`: 1 for kinds 0 and 1, else what
    /// it says but at least 1. `r1` and `r3` are lost.
    fn option_length(&mut self) {
        let a = &mut self.asm;
        a.comment("an option's length");
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
    }

    /// net/netfilter/xt_dccp.c, `dccp_find_option`: 1 present, 0 absent, 2 the header is malformed, or [`BEYOND`].
    pub(super) fn dccp_option(&mut self, word: u8, kind: u8, done: Label) {
        let (malformed, found, top) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        self.asm.jump64(Cond::Lt, Reg::R1, 12, done);
        self.copy_transport(0, 12);
        let types = (0..16).fold(0u64, |sum, kind| sum | u64::from(DCCP_TYPE_WORDS[kind]) << (4 * kind));
        let a = &mut self.asm;
        a.comment("r7 = start of the options, r8 = their end");
        a.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER + 8);
        a.mov64(Reg::R2, Reg::R1);
        a.alu64(AluOp::And, Reg::R1, 1);
        a.alu64(AluOp::Rsh, Reg::R2, 1);
        a.alu64(AluOp::And, Reg::R2, 15);
        a.alu64(AluOp::Lsh, Reg::R2, 2);
        a.load_imm64(Reg::R7, types);
        a.alu64(AluOp::Rsh, Reg::R7, Reg::R2);
        a.alu64(AluOp::And, Reg::R7, 15);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        a.alu64(AluOp::Add, Reg::R7, 3);
        a.alu64(AluOp::Lsh, Reg::R7, 2);
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER + 4);
        a.alu64(AluOp::Lsh, Reg::R8, 2);
        a.jump64(Cond::Lt, Reg::R8, Reg::R7, malformed);
        a.jump64(Cond::Eq, Reg::R8, Reg::R7, done);
        a.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        a.jump64(Cond::Gt, Reg::R8, Reg::R1, malformed);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R7);
        a.mov64(Reg::R9, 0);
        a.bind(top);
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.jump64(Cond::Ge, Reg::R7, Reg::R8, done);
        self.copy_transport_at(1);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER);
        a.jump32(Cond::Eq, Reg::R1, i32::from(kind), found);
        let (single, last) = (a.label(), a.label());
        a.comment("the length, unless this is the last byte");
        a.mov64(Reg::R2, 1);
        a.store(Size::W, Reg::FP, abi::BUFFER + 4, Reg::R2);
        a.jump32(Cond::Lt, Reg::R1, 2, single);
        a.alu64(AluOp::Add, Reg::R7, 1);
        a.jump64(Cond::Ge, Reg::R7, Reg::R8, last);
        self.copy_transport_at(1);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R2, Reg::FP, abi::BUFFER);
        a.comment("at least 1");
        a.mov64(Reg::R3, Reg::R2);
        a.alu64(AluOp::Sub, Reg::R3, 1);
        a.alu64(AluOp::Rsh, Reg::R3, 63);
        a.alu64(AluOp::Add, Reg::R2, Reg::R3);
        a.store(Size::W, Reg::FP, abi::BUFFER + 4, Reg::R2);
        a.bind(last);
        a.bind(single);
        a.load(Size::W, Reg::R1, Reg::FP, abi::BUFFER + 4);
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R7);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, DCCP_OPTIONS_MAX as i32, top, DCCP_OPTIONS_MAX);
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.jump64(Cond::Ge, Reg::R7, Reg::R8, done);
        self.set_word(word, BEYOND as i32);
        self.asm.goto(done);
        self.asm.bind(malformed);
        self.set_word(word, 2);
        self.asm.goto(done);
        self.asm.bind(found);
        self.set_word(word, 1);
    }

    /// net/netfilter/xt_sctp.c, `match_packet`: 1 the chunks are as asked, 0 they are not, 2 malformed, or [`BEYOND`].
    /// A table says for each chunk type which flags must be how, or, by a bit that no flag is, that it is not asked for.
    pub(super) fn sctp_chunks(
        &mut self,
        word: u8,
        rule: SctpRule,
        chunks: &[u32; 8],
        flags: &[SctpFlags],
        done: Label,
    ) {
        let table = (0..=255u8).flat_map(|kind| {
            let asked = chunks[usize::from(kind / 32)] >> (kind % 32) & 1 == 1;
            let flags = flags.iter().find(|flags| flags.chunk == kind);
            let (mask, value) = flags.map_or((0, 0), |flags| (flags.mask, flags.value));
            (u32::from(mask) << 16 | u32::from(!asked) << 8 | u32::from(value)).to_le_bytes()
        });
        let table: Vec<u8> = table.collect();
        let (malformed, holds, top) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        self.asm.jump64(Cond::Lt, Reg::R1, 12, done);
        if rule == SctpRule::All {
            self.asm.comment("chunk types not seen yet");
            for (index, &types) in chunks.iter().enumerate() {
                let at = MISSING + 4 * index as i16;
                self.asm.store(Size::W, Reg::FP, at, types as i32);
            }
        }
        let a = &mut self.asm;
        a.store(Size::W, Reg::FP, abi::HANDOVER, 12);
        a.mov64(Reg::R9, 0);
        a.bind(top);
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        a.mov64(Reg::R2, Reg::R7);
        a.alu64(AluOp::Add, Reg::R2, 4);
        a.jump64(Cond::Gt, Reg::R2, Reg::R1, malformed);
        self.copy_transport_at(4);
        self.load_be(Reg::R1, Reg::FP, abi::BUFFER + 2, 2);
        let a = &mut self.asm;
        a.jump32(Cond::Eq, Reg::R1, 0, malformed);
        a.alu64(AluOp::Add, Reg::R1, 3);
        a.alu64(AluOp::And, Reg::R1, -4);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R7);
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.mov64(Reg::R1, Reg::R8);
        a.alu64(AluOp::Lsh, Reg::R1, 2);
        self.load_table(Reg::R2, "chunks", word, table);
        let a = &mut self.asm;
        a.alu64(AluOp::Add, Reg::R2, Reg::R1);
        a.load(Size::W, Reg::R2, Reg::R2, 0);
        a.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER + 1);
        a.comment("r1 = 0 if the chunk is one asked for");
        a.mov64(Reg::R3, Reg::R2);
        a.alu64(AluOp::Rsh, Reg::R3, 16);
        a.alu64(AluOp::And, Reg::R1, Reg::R3);
        a.alu64(AluOp::And, Reg::R2, 0x1ff);
        a.alu64(AluOp::Xor, Reg::R1, Reg::R2);
        match rule {
            SctpRule::Any => a.jump32(Cond::Eq, Reg::R1, 0, holds),
            SctpRule::Only => a.jump32(Cond::Ne, Reg::R1, 0, done),
            SctpRule::All => {
                a.alu64(AluOp::Sub, Reg::R1, 1);
                a.alu64(AluOp::Arsh, Reg::R1, 63);
                a.mov64(Reg::R2, Reg::R8);
                a.alu64(AluOp::And, Reg::R2, 31);
                a.mov64(Reg::R3, 1);
                a.alu64(AluOp::Lsh, Reg::R3, Reg::R2);
                a.alu64(AluOp::And, Reg::R3, Reg::R1);
                a.alu64(AluOp::Xor, Reg::R3, -1);
                a.alu64(AluOp::Rsh, Reg::R8, 5);
                a.alu64(AluOp::Lsh, Reg::R8, 2);
                a.mov64(Reg::R4, Reg::FP);
                a.alu64(AluOp::Add, Reg::R4, Reg::R8);
                a.load(Size::W, Reg::R1, Reg::R4, MISSING);
                a.alu64(AluOp::And, Reg::R1, Reg::R3);
                a.store(Size::W, Reg::R4, MISSING, Reg::R1);
            }
        }
        let (more, end) = (a.label(), a.label());
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.load(Size::W, Reg::R1, Reg::FP, abi::L4_LENGTH);
        a.jump64(Cond::Lt, Reg::R7, Reg::R1, more);
        a.goto(end);
        a.bind(more);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, SCTP_CHUNKS_MAX as i32, top, SCTP_CHUNKS_MAX);
        self.set_word(word, BEYOND as i32);
        self.asm.goto(done);
        self.asm.bind(malformed);
        self.set_word(word, 2);
        self.asm.goto(done);
        let a = &mut self.asm;
        a.bind(end);
        match rule {
            SctpRule::Any => a.goto(done),
            SctpRule::Only => {}
            SctpRule::All => {
                a.mov64(Reg::R1, 0);
                for index in 0..8 {
                    a.load(Size::W, Reg::R2, Reg::FP, MISSING + 4 * index);
                    a.alu64(AluOp::Or, Reg::R1, Reg::R2);
                }
                a.jump64(Cond::Ne, Reg::R1, 0, done);
            }
        }
        if rule == SctpRule::Any {
            self.asm.bind(holds);
        }
        self.set_word(word, 1);
    }
}
