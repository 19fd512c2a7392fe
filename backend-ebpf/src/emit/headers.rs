//! Headers: from the context and the frame to the key's words.
//!
//! The order and the meaning are `polc_ir`'s for frames: runts, VLAN tags, EtherType, the checks of `ip_rcv` and
//! `ipv6_rcv`, trimming to the packet's own length, then the fields. All key words are 0 at first, and a field is
//! stored only if all its bytes are in the packet.
//!
//! Every read needs two checks that look alike: one against the packet's length, which decides what the bytes mean,
//! and one against the end of what can be read directly, which the kernel's verifier asks for. At XDP they are one. At tc
//! a packet may have parts that can't be read directly; the headers are pulled in first
//! (`bpf_skb_pull_data`), and should even that not bring the bytes, the program fails safe. At netfilter nothing is read
//! directly (`netfilter`).
//!
//! What nearly every packet is comes first and without a jump: no tags, and a transport header with all that rules ask
//! for. The rest lies behind.

use polc_ir::env::{Attach, Fragments};
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::outcome::FrameKind;

use super::transport::of_transport;
use super::{Emitter, netfilter};
use crate::abi::{self, CTX, sk_buff, xdp_md};
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Helper, Operand, Reg, Size};
use crate::kernel_api::KernelField;

/// Most bytes before the transport header that a tc packet is pulled in for: Ethernet, two priority tags, the largest
/// IPv4 header; and as many again for the transport header and IPv6 extension headers.
const PULL_BYTES: i32 = 2 * (14 + 8 + 60);

/// EtherTypes of VLAN tags (IEEE 802.1Q, 802.1ad).
pub(super) const VLAN_TYPES: [u16; 2] = [0x8100, 0x88a8];

/// A number of two bytes as a load from the packet gives it.
fn stored(number: u16) -> i32 {
    number.to_be().into()
}

/// Where a device's number is.
#[derive(Clone, Copy)]
enum Number {
    /// At this offset of the context.
    Context(i16),
    /// In the device that this field points to.
    Kernel(KernelField),
}

impl Emitter<'_> {
    /// From the start of the program to a complete key, derived words aside.
    pub(super) fn headers(&mut self) {
        if self.target.attach == Attach::Netfilter {
            self.packet();
        } else {
            self.prologue();
            self.ethernet();
        }
        match self.plan.family {
            Family::V4 => self.ipv4(),
            Family::V6 => self.ipv6(),
        }
        self.devices();
        self.given();
    }

    /// Makes the verifier forget what it knows of the key's words. It ties a word stored at a multiple of eight to the
    /// register it came from until another part of the eight bytes is written (kernel/bpf/verifier.c,
    /// `check_stack_write_fixed_off`); the word behind is written again. Whole, because a processor that writes a byte
    /// and reads the word around it waits until the byte is in its cache.
    pub(super) fn forget_key(&mut self) {
        if self.layout.sparse() {
            return;
        }
        self.asm.comment("what the verifier knows of the key");
        for word in (0..self.layout.words()).step_by(2) {
            self.forget_word(word as u8);
        }
    }

    /// The same for one word. `r5` is lost.
    pub(super) fn forget_word(&mut self, word: u8) {
        if word.is_multiple_of(2) && !self.layout.sparse() {
            let behind = self.layout.word(word + 1);
            self.asm.load(Size::W, Reg::R5, Reg::FP, behind);
            self.asm.store(Size::W, Reg::FP, behind, Reg::R5);
        }
    }

    /// The same for the only word of a field, if the key has the field.
    pub(super) fn forget_field(&mut self, field: Field) {
        if let Some(slot) = self.slot(field) {
            self.forget_word(slot.word);
        }
    }

    fn prologue(&mut self) {
        let xdp = self.target.attach == Attach::Xdp;
        let a = &mut self.asm;
        a.comment("context");
        a.mov64(CTX, Reg::R1);
        if xdp {
            a.load_ctx_pointer(Reg::R7, CTX, xdp_md::DATA);
            a.load_ctx_pointer(Reg::R8, CTX, xdp_md::DATA_END);
        } else {
            let linear = a.label();
            let small = a.label();
            a.load_ctx_pointer(Reg::R7, CTX, sk_buff::DATA);
            a.load_ctx_pointer(Reg::R8, CTX, sk_buff::DATA_END);
            a.load(Size::W, Reg::R2, CTX, sk_buff::LEN);
            a.jump32(Cond::Le, Reg::R2, PULL_BYTES, small);
            a.mov32(Reg::R2, PULL_BYTES);
            a.bind(small);
            a.mov64(Reg::R3, Reg::R8);
            a.alu64(AluOp::Sub, Reg::R3, Reg::R7);
            a.jump64(Cond::Ge, Reg::R3, Reg::R2, linear);
            a.comment("headers outside the linear part");
            a.mov64(Reg::R1, CTX);
            a.call(Helper::SKB_PULL_DATA);
            a.load_ctx_pointer(Reg::R7, CTX, sk_buff::DATA);
            a.load_ctx_pointer(Reg::R8, CTX, sk_buff::DATA_END);
            a.bind(linear);
            a.load(Size::W, Reg::R3, CTX, sk_buff::LEN);
        }
        self.clear_key();
        if !xdp && let Some(slot) = self.slot(Field::Mark) {
            // Frames that no rule sees have one, too, and keep it.
            self.asm.load(Size::W, Reg::R0, CTX, sk_buff::MARK);
            self.asm.store(Size::W, Reg::FP, self.layout.word(slot.word), Reg::R0);
        }
    }

    /// Zeros in all words of the key that may be read before they are stored. `r3` is the packet's length, at XDP not yet
    /// known.
    pub(super) fn clear_key(&mut self) {
        let by_walk = self.is_read_by_walk();
        let sparse = self.layout.sparse();
        let mut places: Vec<i16> = (self.layout.base()..-abi::SCRATCH_BYTES).step_by(8).collect();
        // Where two words share eight bytes, both would have to be stored.
        if sparse && !by_walk {
            let open = self.plan.key.iter().filter(|slot| !self.is_always_stored(slot.field));
            let open = open.flat_map(|slot| slot.word..slot.word + slot.words);
            places = open.map(|word| self.layout.word(word) - 4).collect();
            places.dedup();
        }
        if places.is_empty() {
            return;
        }
        let xdp = self.target.attach == Attach::Xdp;
        let a = &mut self.asm;
        a.comment("key: zeros, and the verifier does not know: a frame has less than 2^31 bytes");
        if xdp {
            a.mov64(Reg::R0, Reg::R8);
            a.alu64(AluOp::Sub, Reg::R0, Reg::R7);
        } else {
            a.mov64(Reg::R0, Reg::R3);
        }
        a.alu32(AluOp::Rsh, Reg::R0, 31);
        for at in places {
            if by_walk || !sparse {
                a.store(Size::Dw, Reg::FP, at, Reg::R0);
            }
            // Else the eight bytes would be followed wherever the word is not stored later.
            if sparse {
                a.store(Size::W, Reg::FP, at + 4, Reg::R0);
            }
        }
    }

    /// Whether the walk reads the key: any word, and on its way to it all bytes between.
    pub(super) fn is_read_by_walk(&self) -> bool {
        !self.plan.walk.exits.is_empty()
    }

    /// Whether every packet that comes to a stage has the field stored, whatever its headers are.
    fn is_always_stored(&self, field: Field) -> bool {
        match field {
            Field::Length | Field::Tos | Field::Ttl | Field::SrcAddr | Field::DstAddr => true,
            Field::Fragment => self.plan.family == Family::V4,
            Field::Proto | Field::L4Len => self.plan.family == Family::V4 || self.clears_transport(),
            field => self.clears_transport() && of_transport(field).is_some(),
        }
    }

    /// Zeros in words of the key, as [`Self::clear`].
    pub(super) fn clear_words(&mut self, words: &[u8]) {
        let places: Vec<i16> = words.iter().map(|&word| self.layout.word(word)).collect();
        self.clear(&places);
    }

    /// Zeros in four bytes at each place on the stack, of which the verifier doesn't know that they are: it tells memory
    /// that is zero from other memory, and would follow paths on which either is apart for as long as it is of use
    /// (kernel/bpf/verifier.c, `stacksafe`). A packet has less than 2^31 bytes. `r1` is lost.
    pub(super) fn clear(&mut self, places: &[i16]) {
        self.asm.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
        self.asm.alu32(AluOp::Rsh, Reg::R1, 31);
        for &place in places {
            self.asm.store(Size::W, Reg::FP, place, Reg::R1);
        }
    }

    /// Whether a word of the key is read by what follows the headers.
    pub(super) fn is_read(&self, word: u8) -> bool {
        self.read_words.as_ref().is_none_or(|words| words.contains(&word))
    }

    /// Goes to the label unless there are `bytes`. At tc `r3` are the bytes left, and the program returns safely if they
    /// can't be read.
    fn need(&mut self, base: Reg, bytes: i32, absent: Label) {
        let unreadable = match self.target.attach {
            Attach::Xdp => absent,
            _ => {
                self.asm.jump64(Cond::Lt, Reg::R3, bytes, absent);
                self.bail_label()
            }
        };
        self.readable(base, bytes, unreadable);
    }

    /// Goes to the label unless `bytes` can be read directly.
    pub(super) fn readable(&mut self, base: Reg, bytes: i32, unreadable: Label) {
        let a = &mut self.asm;
        a.mov64(Reg::R4, base);
        a.alu64(AluOp::Add, Reg::R4, bytes);
        a.jump64(Cond::Gt, Reg::R4, Reg::R8, unreadable);
    }

    /// The Ethernet header and VLAN tags. Leaves the network header in `r9` and the bytes from there on in `r3`.
    fn ethernet(&mut self) {
        let runt = self.frame_end(FrameKind::Runt);
        let vlan = self.frame_end(FrameKind::Vlan);
        let not_ip = self.frame_end(FrameKind::NotIp);
        let other = self.frame_end(FrameKind::OtherFamily);
        let xdp = self.target.attach == Attach::Xdp;
        self.asm.comment("Ethernet");
        self.need(Reg::R7, 14, runt);
        for (field, offset) in [(Field::DstMac, 0), (Field::SrcMac, 6)] {
            if let Some(slot) = self.slot(field) {
                self.copy_be(Reg::R7, offset, 2, slot.word);
                self.copy_be(Reg::R7, offset + 2, 4, slot.word + 1);
            }
        }
        if xdp && self.slot(Field::PacketType).is_some() {
            self.packet_type();
        }
        let network = self.asm.label();
        self.asm.load(Size::H, Reg::R0, Reg::R7, 12);
        self.asm.mov64(Reg::R9, Reg::R7);
        self.asm.alu64(AluOp::Add, Reg::R9, 14);
        let (own, others) = match self.plan.family {
            Family::V4 => (Family::V4, Family::V6),
            Family::V6 => (Family::V6, Family::V4),
        };
        let ours = self.asm.label();
        let a = &mut self.asm;
        if xdp {
            a.jump32(Cond::Eq, Reg::R0, stored(own.ether_type()), ours);
            a.mov64(Reg::R3, Reg::R8);
            a.alu64(AluOp::Sub, Reg::R3, Reg::R7);
        }
        a.alu64(AluOp::Sub, Reg::R3, 14);
        a.store(Size::W, Reg::FP, abi::LENGTH, Reg::R3);
        for _ in 0..2 {
            let tag = self.asm.label();
            self.asm.jump32(Cond::Eq, Reg::R0, stored(VLAN_TYPES[0]), tag);
            self.asm.jump32(Cond::Ne, Reg::R0, stored(VLAN_TYPES[1]), network);
            self.asm.bind(tag);
            self.need(Reg::R9, 4, vlan);
            self.load_be(Reg::R1, Reg::R9, 0, 2);
            self.asm.alu32(AluOp::And, Reg::R1, 0xfff);
            self.asm.jump32(Cond::Ne, Reg::R1, 0, vlan);
            self.asm.load(Size::H, Reg::R0, Reg::R9, 2);
            self.asm.alu64(AluOp::Add, Reg::R9, 4);
            self.asm.alu64(AluOp::Sub, Reg::R3, 4);
        }
        for kind in VLAN_TYPES {
            self.asm.jump32(Cond::Eq, Reg::R0, stored(kind), vlan);
        }
        let a = &mut self.asm;
        a.bind(network);
        if !xdp {
            a.comment("a tag that the kernel took out");
            let none = a.label();
            a.load(Size::W, Reg::R1, CTX, sk_buff::VLAN_PRESENT);
            a.jump32(Cond::Eq, Reg::R1, 0, none);
            a.load(Size::W, Reg::R1, CTX, sk_buff::VLAN_TCI);
            a.alu32(AluOp::And, Reg::R1, 0xfff);
            a.jump32(Cond::Ne, Reg::R1, 0, vlan);
            a.bind(none);
        }
        a.store(Size::W, Reg::FP, abi::LENGTH, Reg::R3);
        a.jump32(Cond::Eq, Reg::R0, stored(own.ether_type()), ours);
        a.jump32(Cond::Eq, Reg::R0, stored(others.ether_type()), other);
        a.goto(not_ip);
        a.bind(ours);
        if xdp {
            a.mov64(Reg::R3, Reg::R8);
            a.alu64(AluOp::Sub, Reg::R3, Reg::R9);
        }
    }

    /// Works the packet type out from the destination address, as `eth_type_trans` does for a device's own address
    /// (net/ethernet/eth.c): broadcast, multicast, else for this host.
    fn packet_type(&mut self) {
        self.load_be(Reg::R1, Reg::R7, 0, 2);
        self.load_be(Reg::R2, Reg::R7, 2, 4);
        let a = &mut self.asm;
        let (host, group, store) = (a.label(), a.label(), a.label());
        a.jump32(Cond::Set, Reg::R1, 0x100, group);
        a.comment("0, for this host, is what the word has");
        a.goto(host);
        a.bind(group);
        a.mov32(Reg::R0, 2);
        a.jump32(Cond::Ne, Reg::R1, 0xffff, store);
        a.jump32(Cond::Ne, Reg::R2, -1, store);
        a.mov32(Reg::R0, 1);
        a.bind(store);
        self.store_field(Field::PacketType, Reg::R0);
        self.forget_field(Field::PacketType);
        self.asm.bind(host);
    }

    /// The IPv4 header (net/ipv4/ip_input.c, `ip_rcv_core`) and what follows.
    fn ipv4(&mut self) {
        let malformed = self.frame_end(FrameKind::Malformed);
        self.asm.comment("IPv4");
        self.network_header(20, malformed);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R0, Reg::R9, 0);
        a.comment("version 4, and a header of 5 to 15 words");
        a.alu64(AluOp::Sub, Reg::R0, 0x45);
        a.jump64(Cond::Gt, Reg::R0, 10, malformed);
        a.alu64(AluOp::Lsh, Reg::R0, 2);
        a.alu64(AluOp::Add, Reg::R0, 20);
        self.load_be(Reg::R1, Reg::R9, 2, 2);
        let a = &mut self.asm;
        a.jump64(Cond::Gt, Reg::R1, Reg::R3, malformed);
        a.jump64(Cond::Lt, Reg::R1, Reg::R0, malformed);
        a.store(Size::W, Reg::FP, abi::LENGTH, Reg::R1);
        a.mov64(Reg::R2, Reg::R1);
        a.alu64(AluOp::Sub, Reg::R2, Reg::R0);
        self.store_field(Field::Length, Reg::R1);
        for (field, offset, bytes) in [
            (Field::Tos, 1, 1),
            (Field::Ttl, 8, 1),
            (Field::Proto, 9, 1),
            (Field::SrcAddr, 12, 4),
            (Field::DstAddr, 16, 4),
        ] {
            if let Some(slot) = self.slot(field) {
                self.copy_be(Reg::R9, offset, bytes, slot.word);
            }
        }
        let as_seen = self.plan.place.fragments == Fragments::AsSeen;
        let offset = self.slot(Field::FragOffset).filter(|_| as_seen);
        if offset.is_some() {
            self.load_be(Reg::R4, Reg::R9, 6, 2);
            self.asm.alu32(AluOp::And, Reg::R4, 0x1fff);
            self.store_field(Field::FragOffset, Reg::R4);
        }
        if self.slot(Field::Fragment).is_some() {
            // MF or an offset: the negative of anything but 0 has the top bit set.
            self.asm.load(Size::H, Reg::R4, Reg::R9, 6);
            self.asm.alu32(AluOp::And, Reg::R4, stored(0x3fff));
            self.asm.neg32(Reg::R4);
            self.asm.alu32(AluOp::Rsh, Reg::R4, 31);
            self.store_field(Field::Fragment, Reg::R4);
        }
        let netfilter = self.target.attach == Attach::Netfilter;
        if self.needs_offsets() || netfilter {
            let a = &mut self.asm;
            a.store(Size::W, Reg::FP, abi::L4_OFFSET, Reg::R0);
            a.store(Size::W, Reg::FP, abi::L4_LENGTH, Reg::R2);
        }
        if self.needs_offsets() {
            self.keep_network_offset();
            let a = &mut self.asm;
            a.load(Size::B, Reg::R4, Reg::R9, 9);
            a.store(Size::W, Reg::FP, abi::PROTOCOL, Reg::R4);
        }
        if !netfilter {
            self.asm.alu64(AluOp::Add, Reg::R9, Reg::R0);
        }
        self.transport();
    }

    /// Keeps where the network header is in the frame. At netfilter it is where everything begins.
    pub(super) fn keep_network_offset(&mut self) {
        if self.target.attach != Attach::Netfilter {
            let a = &mut self.asm;
            a.mov64(Reg::R4, Reg::R9);
            a.alu64(AluOp::Sub, Reg::R4, Reg::R7);
            a.store(Size::W, Reg::FP, abi::L3_OFFSET, Reg::R4);
        }
    }

    /// Makes the first `bytes` of the packet readable at `r9`. `r3`: bytes left. `r4` is lost.
    pub(super) fn network_header(&mut self, bytes: i32, malformed: Label) {
        if self.target.attach == Attach::Netfilter {
            self.copy_network_header(bytes, malformed);
        } else {
            self.need(Reg::R9, bytes, malformed);
        }
    }

    /// Whether later parts copy bytes out of the packet and so need its offsets.
    pub(super) fn needs_offsets(&self) -> bool {
        self.plan.key.iter().any(|slot| matches!(slot.field, Field::Derived(_)))
    }

    /// Device classes. An undeclared device ends the packet.
    fn devices(&mut self) {
        let attach = self.target.attach;
        let (input, output) = match attach {
            Attach::Xdp => (Some(Number::Context(xdp_md::INGRESS_IFINDEX)), None),
            Attach::TcIngress => (Some(Number::Context(sk_buff::IFINDEX)), None),
            Attach::TcEgress => {
                (Some(Number::Context(sk_buff::INGRESS_IFINDEX)), Some(Number::Context(sk_buff::IFINDEX)))
            }
            Attach::Netfilter => {
                (Some(Number::Kernel(KernelField::STATE_IN)), Some(Number::Kernel(KernelField::STATE_OUT)))
            }
        };
        let classes = &self.plan.devices;
        for (field, fixed, number) in
            [(Field::InDevice, classes.fixed_in, input), (Field::OutDevice, classes.fixed_out, output)]
        {
            let Some(slot) = self.slot(field) else { continue };
            let word = self.layout.word(slot.word);
            self.asm.comment(format!("{field}"));
            match (fixed, number, self.devices) {
                (Some(0), ..) => {
                    let unknown = self.frame_end(FrameKind::UnknownDevice);
                    // A device nobody declared, fixed: no packet goes on, but the rest must stay reachable.
                    self.asm.load(Size::W, Reg::R0, Reg::FP, word);
                    self.asm.jump32(Cond::Eq, Reg::R0, 0, unknown);
                }
                (Some(class), ..) => self.asm.store(Size::W, Reg::FP, word, i32::from(class)),
                (None, Some(number), Some(map)) => {
                    let unknown = self.frame_end(FrameKind::UnknownDevice);
                    let numbers = self.maps[map].contents().map_or(0, |bytes| bytes.len() / 2);
                    let a = &mut self.asm;
                    match number {
                        Number::Context(offset) => a.load(Size::W, Reg::R1, CTX, offset),
                        Number::Kernel(device) => netfilter::device_number(a, device),
                    }
                    a.jump32(Cond::Ge, Reg::R1, numbers as i32, unknown);
                    a.alu64(AluOp::Lsh, Reg::R1, 1);
                    a.load_map_value(Reg::R2, map, 0);
                    a.alu64(AluOp::Add, Reg::R2, Reg::R1);
                    a.load(Size::H, Reg::R0, Reg::R2, 0);
                    a.jump32(Cond::Eq, Reg::R0, 0, unknown);
                    a.store(Size::W, Reg::FP, word, Reg::R0);
                }
                // `check_fields` refuses what has no device here.
                (None, ..) => {}
            }
        }
    }

    /// What the context alone knows, but for the mark.
    fn given(&mut self) {
        match self.target.attach {
            Attach::Xdp => return,
            Attach::Netfilter => return self.given_by_kernel(),
            Attach::TcIngress | Attach::TcEgress => {}
        }
        if let Some(slot) = self.slot(Field::PacketType) {
            self.asm.load(Size::W, Reg::R0, CTX, sk_buff::PKT_TYPE);
            self.asm.store(Size::W, Reg::FP, self.layout.word(slot.word), Reg::R0);
        }
    }

    /// `dst` = the number of 1 to 4 bytes at `base + offset`, the first the most significant. `r5` is scratch.
    pub(super) fn load_be(&mut self, dst: Reg, base: Reg, offset: i16, bytes: u8) {
        let a = &mut self.asm;
        match bytes {
            1 => a.load(Size::B, dst, base, offset),
            2 => {
                a.load(Size::H, dst, base, offset);
                a.be(16, dst);
            }
            3 => {
                a.load(Size::H, Reg::R5, base, offset);
                a.be(16, Reg::R5);
                a.alu64(AluOp::Lsh, Reg::R5, 8);
                a.load(Size::B, dst, base, offset + 2);
                a.alu64(AluOp::Or, dst, Reg::R5);
            }
            _ => {
                a.load(Size::W, dst, base, offset);
                a.be(32, dst);
            }
        }
    }

    /// Copies a number from the packet to a key word, through `r4`.
    pub(super) fn copy_be(&mut self, base: Reg, offset: i16, bytes: u8, word: u8) {
        self.load_be(Reg::R4, base, offset, bytes);
        self.asm.store(Size::W, Reg::FP, self.layout.word(word), Reg::R4);
    }

    /// Copies `bytes` packet bytes to the buffer, `at` bytes into it. `r2` holds their offset from the network header,
    /// and they are in the packet; `r0`-`r5` are lost.
    pub(super) fn copy_bytes(&mut self, bytes: i32, at: i16) {
        self.copy_bytes_of(bytes.into(), at);
    }

    /// The same with a number of bytes in a register, which the verifier has to know the bounds of.
    pub(super) fn copy_bytes_of(&mut self, bytes: Operand, at: i16) {
        let bail = self.bail_label();
        if self.target.attach != Attach::Netfilter {
            self.asm.load(Size::W, Reg::R1, Reg::FP, abi::L3_OFFSET);
            self.asm.alu64(AluOp::Add, Reg::R2, Reg::R1);
        }
        self.load_bytes(bytes, abi::BUFFER + at, bail);
    }

    /// Copies bytes of the frame (at netfilter, of the packet) to the stack at `to`, or jumps if it does not have them.
    /// `r2` holds their offset; `r0`-`r5` are lost.
    pub(super) fn load_bytes(&mut self, bytes: Operand, to: i16, absent: Label) {
        let helper = match self.target.attach {
            Attach::Xdp => Helper::XDP_LOAD_BYTES,
            Attach::TcIngress | Attach::TcEgress => Helper::SKB_LOAD_BYTES,
            Attach::Netfilter => return self.load_packet_bytes(bytes, to, absent),
        };
        let a = &mut self.asm;
        a.mov64(Reg::R1, CTX);
        a.mov64(Reg::R3, Reg::FP);
        a.alu64(AluOp::Add, Reg::R3, i32::from(to));
        a.mov64(Reg::R4, bytes);
        a.call(helper);
        a.jump64(Cond::Ne, Reg::R0, 0, absent);
    }
}
