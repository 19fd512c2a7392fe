//! IPv6: the header and the walk over extension headers.
//!
//! The walk is `ipv6_find_hdr(skb, .., -1, ..)` (net/ipv6/exthdrs_core.c), which is what ip6tables goes by. The kernel
//! follows headers to the packet's end; a program needs a bound, [`IPV6_EXT_HEADERS_MAX`], which no packet with a purpose
//! comes near (RFC 8200, section 4.1, has six kinds, all but one at most once). A packet beyond it ends as a frame of its
//! own kind, at every level, so every packet is walked, whether rules ask for what follows or not.

use polc_ir::env::{Attach, Fragments};
use polc_ir::field::{EXT_HEADERS_BEYOND, EXT_HEADERS_CUT, Field};
use polc_ir::limits::IPV6_EXT_HEADERS_MAX;
use polc_ir::outcome::FrameKind;
use polc_ir::packet::extension::{EXTENSIONS, kind};

use super::Emitter;
use crate::abi::{self, CTX, sk_buff, xdp_md};
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Reg, Size, Width};

/// Largest offset of a transport header that is read directly; the verifier bounds packet offsets by 65,535.
const L4_OFFSET_MAX: i32 = 0x7fff;

/// What holds the network header's offset: an Ethernet header and two tags.
const L3_OFFSET_MASK: i32 = 31;

/// Set beside the bits of [`Field::ExtHeaders`] while headers are walked: the verifier tells memory that is zero from
/// other memory, and would follow either.
const WALKED: i32 = 4;

impl Emitter<'_> {
    /// The IPv6 header (net/ipv6/ip6_input.c, `ip6_rcv_core`) and what follows.
    pub(super) fn ipv6(&mut self) {
        let malformed = self.frame_end(FrameKind::Malformed);
        self.asm.comment("IPv6");
        self.network_header(40, malformed);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R0, Reg::R9, 0);
        a.alu64(AluOp::Rsh, Reg::R0, 4);
        a.jump32(Cond::Ne, Reg::R0, 6, malformed);
        self.load_be(Reg::R1, Reg::R9, 4, 2);
        let a = &mut self.asm;
        let (sized, trimmed) = (a.label(), a.label());
        a.load(Size::B, Reg::R2, Reg::R9, 6);
        a.mov64(Reg::R4, Reg::R1);
        a.alu64(AluOp::Add, Reg::R4, 40);
        a.comment("no length and a hop-by-hop header may be a jumbogram: it is as long as the frame");
        a.jump32(Cond::Ne, Reg::R2, 0, sized);
        a.comment("anew, since the verifier knows what it was compared with");
        a.load(Size::B, Reg::R2, Reg::R9, 6);
        a.jump32(Cond::Eq, Reg::R1, 0, trimmed);
        a.bind(sized);
        a.jump64(Cond::Gt, Reg::R4, Reg::R3, malformed);
        a.mov64(Reg::R3, Reg::R4);
        a.bind(trimmed);
        a.store(Size::W, Reg::FP, abi::LENGTH, Reg::R3);
        self.store_field(Field::Length, Reg::R3);
        for (field, offset) in [(Field::SrcAddr, 8), (Field::DstAddr, 24)] {
            if let Some(slot) = self.slot(field) {
                for word in (0..4).filter(|word| self.is_read(slot.word + word)).collect::<Vec<_>>() {
                    self.copy_be(Reg::R9, offset + 4 * i16::from(word), 4, slot.word + word);
                }
            }
        }
        if let Some(slot) = self.slot(Field::Ttl) {
            self.copy_be(Reg::R9, 7, 1, slot.word);
        }
        if self.slot(Field::Tos).is_some() {
            self.load_be(Reg::R4, Reg::R9, 0, 2);
            self.asm.alu32(AluOp::Rsh, Reg::R4, 4);
            self.asm.alu32(AluOp::And, Reg::R4, 0xff);
            self.store_field(Field::Tos, Reg::R4);
        }
        self.extension_headers();
    }

    /// From the network header in `r9` and the next header in `r2` to the transport header and its fields.
    fn extension_headers(&mut self) {
        let bail = self.bail_label();
        let many = self.frame_end(FrameKind::ManyHeaders);
        let netfilter = self.target.attach == Attach::Netfilter;
        let none = self.asm.label();
        let looks = !self.passes_extensions();
        if !netfilter && !looks {
            self.jump_unless_extension(Reg::R2, none);
        }
        self.keep_network_offset();
        if self.clears_transport() {
            self.clear_transport();
        }
        self.forget_key();
        if self.slot(Field::ExtHeaderMask).is_some() {
            self.asm.store(Size::W, Reg::FP, abi::L4_LENGTH, Reg::R2);
            self.header_mask();
            self.asm.load(Size::W, Reg::R2, Reg::FP, abi::L4_LENGTH);
        }
        let a = &mut self.asm;
        let (top, found, bad, done) = (a.label(), a.label(), a.label(), a.label());
        let (not_fragment, whole, advance) = (a.label(), a.label(), a.label());
        a.comment("extension headers: r7 offset, r8 next header, r9 headers seen");
        a.mov64(Reg::R7, 40);
        a.mov64(Reg::R8, Reg::R2);
        a.mov64(Reg::R9, 0);
        a.store(Size::W, Reg::FP, abi::HANDOVER, WALKED);
        a.bind(top);
        self.jump_unless_extension(Reg::R8, found);
        self.copy_header_bytes(0, 2, 0, bad);
        self.asm.jump32(Cond::Ne, Reg::R8, i32::from(kind::FRAGMENT), not_fragment);
        self.copy_header_bytes(2, 2, 2, bad);
        self.load_be(Reg::R1, Reg::FP, abi::BUFFER + 2, 2);
        self.asm.mov64(Reg::R0, 1);
        self.store_field(Field::Fragment, Reg::R0);
        self.forget_field(Field::Fragment);
        let a = &mut self.asm;
        a.alu64(AluOp::Rsh, Reg::R1, 3);
        a.jump32(Cond::Eq, Reg::R1, 0, whole);
        a.comment("a later fragment: what follows its header is the end, or nothing is");
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.alu64(AluOp::Add, Reg::R7, 8);
        let later = a.label();
        // Kept for after the check, whose scratch is r1.
        a.mov64(Reg::R3, Reg::R1);
        self.jump_unless_extension(Reg::R8, later);
        self.asm.goto(bad);
        self.asm.bind(later);
        if self.plan.place.fragments == Fragments::AsSeen {
            self.store_field(Field::FragOffset, Reg::R3);
            self.forget_field(Field::FragOffset);
        }
        let a = &mut self.asm;
        a.goto(found);
        a.bind(whole);
        a.mov64(Reg::R1, 8);
        a.goto(advance);
        a.bind(not_fragment);
        if self.slot(Field::ExtHeaders).is_some() {
            let next = self.asm.label();
            self.asm.jump32(Cond::Ne, Reg::R8, i32::from(kind::AUTHENTICATION), next);
            self.asm.store(Size::W, Reg::FP, abi::HANDOVER, WALKED | 2);
            self.asm.bind(next);
        }
        self.routing_header(bad);
        self.header_length(advance);
        let a = &mut self.asm;
        a.bind(advance);
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        self.forget_offset();
        let a = &mut self.asm;
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, IPV6_EXT_HEADERS_MAX as i32, top, IPV6_EXT_HEADERS_MAX);
        a.goto(many);

        a.bind(bad);
        a.store(Size::W, Reg::FP, abi::L4_OFFSET, 40);
        self.clear(&[abi::L4_LENGTH, abi::PROTOCOL]);
        if self.slot(Field::ExtHeaders).is_some() {
            self.asm.load(Size::W, Reg::R1, Reg::FP, abi::HANDOVER);
            self.asm.alu64(AluOp::Xor, Reg::R1, WALKED | 1);
            self.store_field(Field::ExtHeaders, Reg::R1);
        }
        let a = &mut self.asm;
        a.goto(done);

        a.bind(found);
        if self.slot(Field::ExtHeaders).is_some() {
            self.asm.load(Size::W, Reg::R1, Reg::FP, abi::HANDOVER);
            self.asm.alu64(AluOp::Xor, Reg::R1, WALKED);
            self.store_field(Field::ExtHeaders, Reg::R1);
        }
        self.store_field(Field::Proto, Reg::R8);
        let a = &mut self.asm;
        a.store(Size::W, Reg::FP, abi::PROTOCOL, Reg::R8);
        let there = a.label();
        a.store(Size::W, Reg::FP, abi::L4_OFFSET, Reg::R7);
        self.clear(&[abi::L4_LENGTH]);
        let a = &mut self.asm;
        a.load(Size::W, Reg::R1, Reg::FP, abi::L4_OFFSET);
        a.load(Size::W, Reg::R2, Reg::FP, abi::LENGTH);
        a.jump64(Cond::Gt, Reg::R2, Reg::R1, there);
        a.goto(done);
        a.bind(there);
        a.alu64(AluOp::Sub, Reg::R2, Reg::R1);
        a.store(Size::W, Reg::FP, abi::L4_LENGTH, Reg::R2);
        a.load(Size::W, Reg::R2, Reg::FP, abi::L4_LENGTH);
        if !netfilter {
            a.jump64(Cond::Gt, Reg::R1, L4_OFFSET_MAX, bail);
            self.packet_at();
        }
        self.transport();
        if !netfilter && !looks {
            self.asm.goto(done);
            self.asm.bind(none);
            self.asm.comment("no extension headers, as in nearly all packets");
            self.store_field(Field::Proto, Reg::R2);
            if self.needs_offsets() {
                self.keep_network_offset();
                self.asm.store(Size::W, Reg::FP, abi::PROTOCOL, Reg::R2);
            }
            let a = &mut self.asm;
            a.mov64(Reg::R2, Reg::R3);
            a.alu64(AluOp::Sub, Reg::R2, 40);
            if self.needs_offsets() {
                self.asm.store(Size::W, Reg::FP, abi::L4_OFFSET, 40);
                self.asm.store(Size::W, Reg::FP, abi::L4_LENGTH, Reg::R2);
            }
            if !self.clears_transport() {
                self.asm.jump64(Cond::Eq, Reg::R2, 0, done);
            }
            self.asm.alu64(AluOp::Add, Reg::R9, 40);
            self.transport();
        }
        self.asm.bind(done);
    }

    /// `r8` = the packet's end, `r9` = its byte at `r1` behind the network header's start. The headers' lengths and VLAN
    /// tags are forgotten, which a pointer kept from before would have told apart. `r1` is at most [`L4_OFFSET_MAX`] and
    /// is lost.
    fn packet_at(&mut self) {
        let a = &mut self.asm;
        a.load(Size::W, Reg::R9, Reg::FP, abi::L3_OFFSET);
        a.alu64(AluOp::And, Reg::R9, L3_OFFSET_MASK);
        a.alu64(AluOp::Add, Reg::R1, Reg::R9);
        let (data, end) = match self.target.attach {
            Attach::Xdp => (xdp_md::DATA, xdp_md::DATA_END),
            _ => (sk_buff::DATA, sk_buff::DATA_END),
        };
        a.load_ctx_pointer(Reg::R9, CTX, data);
        a.load_ctx_pointer(Reg::R8, CTX, end);
        a.alu64(AluOp::Add, Reg::R9, Reg::R1);
    }

    /// Whether packets without extension headers, nearly all, need not go the way of the others.
    pub(super) fn passes_extensions(&self) -> bool {
        self.slot(Field::ExtHeaderMask).is_none()
    }

    /// Has the verifier forget what it knew about `r7`, an offset that each header's length takes on in another way: else
    /// it would follow every sequence of headers apart.
    fn forget_offset(&mut self) {
        self.asm.store(Size::W, Reg::FP, abi::L4_OFFSET, Reg::R7);
        self.asm.load(Size::W, Reg::R7, Reg::FP, abi::L4_OFFSET);
    }

    /// Jumps unless `reg` is the number of an extension header with a next header. `r1` is lost.
    pub(super) fn jump_unless_extension(&mut self, reg: Reg, label: Label) {
        let bits = EXTENSIONS.iter().fold(0u64, |bits, header| bits | 1 << header);
        self.jump_unless_in(reg, bits, label);
    }

    /// Jumps unless bit `reg` of `bits` is set. `r1` is lost.
    fn jump_unless_in(&mut self, reg: Reg, bits: u64, label: Label) {
        let a = &mut self.asm;
        a.jump64(Cond::Gt, reg, 63, label);
        a.load_imm64(Reg::R1, bits);
        a.alu64(AluOp::Rsh, Reg::R1, reg);
        a.alu64(AluOp::And, Reg::R1, 1);
        a.jump64(Cond::Eq, Reg::R1, 0, label);
    }

    /// Copies bytes at `offset` of the header at `r7` to the buffer, or jumps if the packet does not have them.
    pub(super) fn copy_header_bytes(&mut self, offset: i32, bytes: i32, at: i16, absent: Label) {
        let a = &mut self.asm;
        a.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
        a.mov64(Reg::R2, Reg::R7);
        a.alu64(AluOp::Add, Reg::R2, offset + bytes);
        a.jump64(Cond::Gt, Reg::R2, Reg::R1, absent);
        a.alu64(AluOp::Sub, Reg::R2, bytes);
        self.copy_bytes(bytes, at);
    }

    /// `r1` = length in bytes of the header of kind `r8` whose first two bytes are in the buffer; goes to `advance` or
    /// falls through to it.
    pub(super) fn header_length(&mut self, advance: Label) {
        let a = &mut self.asm;
        let options = a.label();
        a.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER + 1);
        a.jump32(Cond::Ne, Reg::R8, i32::from(kind::AUTHENTICATION), options);
        a.alu64(AluOp::Add, Reg::R1, 2);
        a.alu64(AluOp::Lsh, Reg::R1, 2);
        a.goto(advance);
        a.bind(options);
        a.alu64(AluOp::Add, Reg::R1, 1);
        a.alu64(AluOp::Lsh, Reg::R1, 3);
    }

    /// `ipv6_find_hdr` reads 4 bytes of a routing header: jumps if the packet does not have them. `r1` and `r2` are
    /// lost.
    pub(super) fn routing_header(&mut self, absent: Label) {
        let a = &mut self.asm;
        let next = a.label();
        a.jump32(Cond::Ne, Reg::R8, i32::from(kind::ROUTING), next);
        a.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
        a.mov64(Reg::R2, Reg::R7);
        a.alu64(AluOp::Add, Reg::R2, 4);
        a.jump64(Cond::Gt, Reg::R2, Reg::R1, absent);
        a.bind(next);
    }

    /// Which extension headers there are, as xt_ipv6header sees them
    /// (net/ipv6/netfilter/ip6t_ipv6header.c, `ipv6header_mt6`). The next header is in `r2`.
    fn header_mask(&mut self) {
        let Some(slot) = self.slot(Field::ExtHeaderMask) else { return };
        let word = self.layout.word(slot.word);
        let a = &mut self.asm;
        let (top, last, cut, done, advance) = (a.label(), a.label(), a.label(), a.label(), a.label());
        a.comment("xt_ipv6header: r7 offset, r8 next header, r9 headers seen");
        self.clear(&[abi::HANDOVER]);
        let a = &mut self.asm;
        a.mov64(Reg::R7, 40);
        a.mov64(Reg::R8, Reg::R2);
        a.mov64(Reg::R9, 0);
        a.bind(top);
        let seen = EXTENSIONS.iter().chain([&kind::ESP]).fold(0u64, |bits, header| bits | 1 << header);
        self.jump_unless_in(Reg::R8, seen, last);
        self.copy_header_bytes(0, 2, 0, cut);
        self.asm.load(Size::W, Reg::R2, Reg::FP, abi::HANDOVER);
        for (header, bit) in MASKS {
            let next = self.asm.label();
            self.asm.jump32(Cond::Ne, Reg::R8, i32::from(header), next);
            self.asm.alu64(AluOp::Or, Reg::R2, bit);
            self.asm.bind(next);
        }
        let a = &mut self.asm;
        let lengths = a.label();
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R2);
        a.jump32(Cond::Eq, Reg::R8, i32::from(kind::ESP), done);
        a.jump32(Cond::Ne, Reg::R8, i32::from(kind::FRAGMENT), lengths);
        a.mov64(Reg::R1, 8);
        a.goto(advance);
        a.bind(lengths);
        self.header_length(advance);
        let a = &mut self.asm;
        let on = a.label();
        a.bind(advance);
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        self.forget_offset();
        let a = &mut self.asm;
        a.comment("beyond the packet's end only what ends a chain by itself is known");
        a.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
        a.jump64(Cond::Le, Reg::R7, Reg::R1, on);
        a.load(Size::W, Reg::R2, Reg::FP, abi::HANDOVER);
        a.jump32(Cond::Eq, Reg::R8, i32::from(kind::ESP), done);
        a.jump32(Cond::Eq, Reg::R8, i32::from(kind::NONE), done);
        a.alu64(AluOp::Or, Reg::R2, 1);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R2);
        a.goto(done);
        a.bind(on);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, IPV6_EXT_HEADERS_MAX as i32, top, IPV6_EXT_HEADERS_MAX);
        a.store(Size::W, Reg::FP, abi::HANDOVER, i32::from(EXT_HEADERS_BEYOND));
        a.goto(done);
        a.bind(cut);
        a.store(Size::W, Reg::FP, abi::HANDOVER, i32::from(EXT_HEADERS_CUT));
        a.goto(done);
        a.bind(last);
        let (none, ended) = (a.label(), a.label());
        a.load(Size::W, Reg::R2, Reg::FP, abi::HANDOVER);
        a.jump32(Cond::Eq, Reg::R8, i32::from(kind::NONE), none);
        a.alu64(AluOp::Or, Reg::R2, 1);
        a.goto(ended);
        a.bind(none);
        a.alu64(AluOp::Or, Reg::R2, 2);
        a.bind(ended);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R2);
        a.bind(done);
        a.load(Size::W, Reg::R2, Reg::FP, abi::HANDOVER);
        a.store(Size::W, Reg::FP, word, Reg::R2);
    }
}

/// `MASK_*` of include/uapi/linux/netfilter_ipv6/ip6t_ipv6header.h.
const MASKS: [(u8, i32); 6] = [
    (kind::HOP_BY_HOP, 128),
    (kind::DESTINATION, 64),
    (kind::ROUTING, 32),
    (kind::FRAGMENT, 16),
    (kind::AUTHENTICATION, 8),
    (kind::ESP, 4),
];
