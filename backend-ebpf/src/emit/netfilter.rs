//! Packets at netfilter hooks: no frame to point into, but a handle to the packet and the kernel's own structures.
//!
//! The context holds pointers to `struct sk_buff` and `struct nf_hook_state`, which may be read field by field, at the
//! running kernel's offsets ([`crate::kernel_api`]). The packet's bytes, paged ones too, are copied through a dynptr that
//! is made at the start and kept on the stack: the network header once, the transport header once, both to the buffer.
//! Offsets count from the network header.

use polc_ir::env::ct_state;
use polc_ir::field::Field;

use super::Emitter;
use crate::abi::{self, CTX, nf_ctx};
use crate::asm::{Asm, Label};
use crate::insn::{AluOp, Cond, Helper, Operand, Reg, Size};
use crate::kernel_api::{KernelField, KernelFunction};

/// The bits of a packet's type in their byte (include/linux/skbuff.h, `PKT_TYPE_MAX`).
const PACKET_TYPE_MASK: i32 = 7;

/// The bits of `skb->_nfct` that say what a packet is to its connection (include/linux/skbuff.h, `NFCT_INFOMASK`), and
/// those of one that rules exempt, which has none (`IP_CT_UNTRACKED`).
const CONNECTION_INFO_MASK: i32 = 7;
const CONNECTION_UNTRACKED: i32 = 7;

/// The state for each value of these bits, four bits each (`XT_CONNTRACK_STATE_BIT`): ESTABLISHED, RELATED and NEW, then the
/// same for replies.
const CONNECTION_STATES: i32 = 0x0284_2842;

impl Emitter<'_> {
    /// From the start of the program to a handle to the packet; its length is in `r3`.
    pub(super) fn packet(&mut self) {
        let bail = self.bail_label();
        let dynptr = i32::from(self.layout.dynptr());
        let a = &mut self.asm;
        a.comment("context");
        a.mov64(CTX, Reg::R1);
        a.load(Size::Dw, Reg::R1, CTX, nf_ctx::SKB);
        a.mov64(Reg::R2, 0);
        a.mov64(Reg::R3, Reg::FP);
        a.alu64(AluOp::Add, Reg::R3, dynptr);
        a.call_kernel(KernelFunction::DynptrFromSkb);
        a.jump32(Cond::Ne, Reg::R0, 0, bail);
        a.load(Size::Dw, Reg::R1, CTX, nf_ctx::SKB);
        a.load_kernel_field(Size::W, Reg::R3, Reg::R1, KernelField::SKB_LEN);
        a.store(Size::W, Reg::FP, abi::LENGTH, Reg::R3);
        self.clear_key();
    }

    /// Copies the first `bytes` of the packet to the buffer, where `r9` then points. `r3`: the packet's length, kept.
    pub(super) fn copy_network_header(&mut self, bytes: i32, malformed: Label) {
        let bail = self.bail_label();
        self.asm.jump64(Cond::Lt, Reg::R3, bytes, malformed);
        self.asm.mov64(Reg::R2, 0);
        self.load_packet_bytes(bytes.into(), abi::BUFFER, bail);
        self.point_at_buffer();
        self.asm.load(Size::W, Reg::R3, Reg::FP, abi::LENGTH);
    }

    /// Copies what the loads that end at `ends` read of the transport header to the buffer, as far as it fits and the
    /// packet has it. `r2`: how much there is, kept; `r9` then points at the buffer.
    pub(super) fn copy_transport_header(&mut self, ends: impl Iterator<Item = i32>, done: Label) {
        let Some(window) = ends.filter(|end| *end <= i32::from(abi::BUFFER_BYTES)).max() else { return };
        let bail = self.bail_label();
        let a = &mut self.asm;
        let whole = a.label();
        a.jump64(Cond::Eq, Reg::R2, 0, done);
        a.mov64(Reg::R8, Reg::R2);
        a.jump64(Cond::Le, Reg::R8, window, whole);
        a.mov64(Reg::R8, window);
        a.bind(whole);
        a.load(Size::W, Reg::R2, Reg::FP, abi::L4_OFFSET);
        self.load_packet_bytes(Reg::R8.into(), abi::BUFFER, bail);
        self.point_at_buffer();
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_LENGTH);
    }

    /// `r1` = the number that `bytes` bytes at `offset` of the transport header spell, which lie beyond the buffer. `r2`:
    /// how much of the header there is, kept.
    pub(super) fn copy_far_bytes(&mut self, offset: i16, bytes: u8) {
        let bail = self.bail_label();
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_OFFSET);
        self.asm.alu64(AluOp::Add, Reg::R2, i32::from(offset));
        self.load_packet_bytes(i32::from(bytes).into(), abi::BUFFER, bail);
        self.load_be(Reg::R1, Reg::FP, abi::BUFFER, bytes);
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_LENGTH);
    }

    fn point_at_buffer(&mut self) {
        self.asm.mov64(Reg::R9, Reg::FP);
        self.asm.alu64(AluOp::Add, Reg::R9, i32::from(abi::BUFFER));
    }

    /// Copies bytes at `r2` of the packet to the stack at `to`, or jumps if it does not have them. `r0`-`r5` are lost.
    pub(super) fn load_packet_bytes(&mut self, bytes: Operand, to: i16, absent: Label) {
        let dynptr = i32::from(self.layout.dynptr());
        let a = &mut self.asm;
        a.mov64(Reg::R4, Reg::R2);
        a.mov64(Reg::R1, Reg::FP);
        a.alu64(AluOp::Add, Reg::R1, i32::from(to));
        a.mov64(Reg::R2, bytes);
        a.mov64(Reg::R3, Reg::FP);
        a.alu64(AluOp::Add, Reg::R3, dynptr);
        a.mov64(Reg::R5, 0);
        a.call(Helper::DYNPTR_READ);
        a.jump64(Cond::Ne, Reg::R0, 0, absent);
    }

    /// What `struct sk_buff` alone knows.
    pub(super) fn given_by_kernel(&mut self) {
        let fields = [
            (Field::Mark, Size::W, KernelField::SKB_MARK),
            (Field::PacketType, Size::B, KernelField::SKB_PACKET_TYPE),
        ];
        for (field, size, known) in fields {
            let Some(slot) = self.slot(field) else { continue };
            let word = self.layout.word(slot.word);
            let a = &mut self.asm;
            a.load(Size::Dw, Reg::R1, CTX, nf_ctx::SKB);
            a.load_kernel_field(size, Reg::R0, Reg::R1, known);
            if field == Field::PacketType {
                a.alu32(AluOp::And, Reg::R0, PACKET_TYPE_MASK);
            }
            a.store(Size::W, Reg::FP, word, Reg::R0);
        }
        self.connection_state();
    }

    /// The state of the packet's connection, as xt_conntrack works it out (net/netfilter/xt_conntrack.c, `conntrack_mt`).
    fn connection_state(&mut self) {
        let Some(slot) = self.slot(Field::CtState) else { return };
        let word = self.layout.word(slot.word);
        let a = &mut self.asm;
        let (tracked, done) = (a.label(), a.label());
        a.load(Size::Dw, Reg::R1, CTX, nf_ctx::SKB);
        a.load_kernel_field(Size::Dw, Reg::R2, Reg::R1, KernelField::SKB_CONNECTION);
        a.mov64(Reg::R1, Reg::R2);
        a.alu64(AluOp::And, Reg::R1, CONNECTION_INFO_MASK);
        a.alu64(AluOp::And, Reg::R2, !CONNECTION_INFO_MASK);
        a.jump64(Cond::Ne, Reg::R2, 0, tracked);
        a.mov32(Reg::R0, i32::from(ct_state::INVALID));
        a.jump64(Cond::Ne, Reg::R1, CONNECTION_UNTRACKED, done);
        a.mov32(Reg::R0, i32::from(ct_state::UNTRACKED));
        a.goto(done);
        a.bind(tracked);
        a.mov32(Reg::R0, CONNECTION_STATES);
        a.alu32(AluOp::Lsh, Reg::R1, 2);
        a.alu32(AluOp::Rsh, Reg::R0, Reg::R1);
        a.alu32(AluOp::And, Reg::R0, 0xf);
        a.bind(done);
        a.store(Size::W, Reg::FP, word, Reg::R0);
    }
}

/// `r1` = number of the device that a field of `struct nf_hook_state` points to; 0 if there is none. `r2` is lost.
pub(super) fn device_number(a: &mut Asm, device: KernelField) {
    let none = a.label();
    a.load(Size::Dw, Reg::R1, CTX, nf_ctx::STATE);
    a.load_kernel_field(Size::Dw, Reg::R2, Reg::R1, device);
    a.mov64(Reg::R1, 0);
    a.jump64(Cond::Eq, Reg::R2, 0, none);
    a.load_kernel_field(Size::W, Reg::R1, Reg::R2, KernelField::DEVICE_NUMBER);
    a.bind(none);
}
