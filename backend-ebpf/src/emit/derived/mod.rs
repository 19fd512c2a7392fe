//! Derived words: fields that take more than a load, computed before the first stage.
//!
//! Set membership and address types are decided by stages, which write their words; they start as 0. The rest is read
//! from the packet here, copied to the stack by a helper, so that offsets need no proof beyond the packet's length.
//! Each search is a loop whose bound is named in `polc_ir::limits`; where a search is in the packet is kept where the
//! verifier forgets it (see [`crate::abi`]), so that the ways through one turn of a loop meet before the next.

mod extension;
mod program;
mod transport;

use polc_ir::derived::{DCCP, DerivedData, SCTP, TCP};
use polc_ir::field::Field;
use polc_ir::hook::Family;

use super::Emitter;
use crate::abi;
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Reg, Size};
use crate::object::{DataSection, MapDef};

impl Emitter<'_> {
    /// Computes the derived words of the key.
    pub(super) fn derived(&mut self) {
        let plan = self.plan;
        for slot in &plan.key {
            let Field::Derived(derived) = slot.field else { continue };
            self.asm.comment(format!("{derived}"));
            let done = self.asm.label();
            match plan.derived.get(derived) {
                None | Some(DerivedData::Member { .. } | DerivedData::AddressType { .. }) => {}
                Some(DerivedData::TcpOption { kind }) => {
                    self.unless_protocol(TCP, done);
                    self.tcp_option(slot.word, *kind, done);
                }
                Some(DerivedData::U32(program)) => self.u32_program(slot.word, program, done),
                Some(DerivedData::DccpOption { kind }) => {
                    self.unless_protocol(DCCP, done);
                    self.dccp_option(slot.word, *kind, done);
                }
                Some(DerivedData::SctpChunks { rule, chunks, flags }) => {
                    self.unless_protocol(SCTP, done);
                    self.sctp_chunks(slot.word, *rule, chunks, flags, done);
                }
                // All of them below.
                Some(DerivedData::Ipv6Header(_)) => {}
            }
            self.asm.bind(done);
        }
        if plan.family == Family::V6 {
            self.extension_header_tests();
        }
    }

    fn unless_protocol(&mut self, protocol: u8, done: Label) {
        self.asm.load(Size::W, Reg::R1, Reg::FP, abi::PROTOCOL);
        self.asm.jump32(Cond::Ne, Reg::R1, i32::from(protocol), done);
    }

    /// Stores what a search found. `r5` is lost.
    fn set_word(&mut self, word: u8, value: i32) {
        self.asm.store(Size::W, Reg::FP, self.layout.word(word), value);
        self.forget_word(word);
    }

    /// Copies `bytes` bytes that lie `offset` behind the start of the transport header to the buffer. The packet has
    /// them; `r0` to `r5` are lost.
    fn copy_transport(&mut self, offset: i32, bytes: i32) {
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_OFFSET);
        self.asm.alu64(AluOp::Add, Reg::R2, offset);
        self.copy_bytes(bytes, 0);
    }

    /// The same at the offset in `r7`.
    fn copy_transport_at(&mut self, bytes: i32) {
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_OFFSET);
        self.asm.alu64(AluOp::Add, Reg::R2, Reg::R7);
        self.copy_bytes(bytes, 0);
    }

    /// Adds a table that searches look bytes up in, and loads its address.
    fn load_table(&mut self, into: Reg, name: &str, word: u8, contents: Vec<u8>) {
        let map = self.maps.push(MapDef::data(format!("{name}{word}"), DataSection::Rodata, contents));
        self.asm.load_map_value(into, map, 0);
    }
}
