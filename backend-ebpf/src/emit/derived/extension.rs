//! Searches for IPv6 extension headers and tests of what they hold. What they mean is in `polc_ir::derived`.
//!
//! Tests of one kind of header share the search for it.

use polc_ir::derived::{DerivedData, Ipv6HeaderTest};
use polc_ir::field::Field;
use polc_ir::limits::IPV6_EXT_HEADERS_MAX;
use polc_ir::packet::extension::{EXTENSIONS, kind};

use crate::abi;
use crate::asm::Label;
use crate::emit::Emitter;
use crate::insn::{AluOp, Cond, Operand, Reg, Size, Width};

/// A header that is dropped for being malformed.
const HOTDROP: i32 = 2;

/// Most addresses a routing header has room for: 256 units of 8 bytes, less the first.
const ADDRESSES_MAX: i32 = 127;
/// How many there are, behind one of them in the buffer.
const ADDRESSES: i16 = abi::BUFFER + 20;
/// The header's length, likewise.
const LENGTH: i16 = abi::BUFFER + 28;

impl Emitter<'_> {
    /// All tests of extension headers that the key has.
    pub(super) fn extension_header_tests(&mut self) {
        let plan = self.plan;
        for target in EXTENSIONS {
            let tests: Vec<(u8, &Ipv6HeaderTest)> = plan
                .key
                .iter()
                .filter_map(|slot| match slot.field {
                    Field::Derived(derived) => match plan.derived.get(derived) {
                        Some(DerivedData::Ipv6Header(test)) if test.header() == target => {
                            Some((slot.word, test))
                        }
                        _ => None,
                    },
                    _ => None,
                })
                .collect();
            if tests.is_empty() {
                continue;
            }
            let (absent, malformed) = (self.asm.label(), self.asm.label());
            self.asm.comment(format!("extension header {target}"));
            self.find_header(target, absent, malformed);
            for &(word, test) in &tests {
                let (fails, hotdrop) = (self.asm.label(), self.asm.label());
                self.header_test(word, test, fails, hotdrop);
                self.set_word(word, 1);
                self.asm.goto(fails);
                self.asm.bind(hotdrop);
                self.set_word(word, HOTDROP);
                self.asm.bind(fails);
            }
            self.asm.goto(absent);
            self.asm.bind(malformed);
            for &(word, _) in &tests {
                self.set_word(word, HOTDROP);
            }
            self.asm.bind(absent);
        }
    }

    /// `ipv6_find_hdr` (net/ipv6/exthdrs_core.c): leaves the offset of the first such header, from the network header
    /// on, at [`abi::FOUND`], or jumps. The walk to the transport header has been here before, so the bound holds.
    fn find_header(&mut self, target: u8, absent: Label, malformed: Label) {
        let bail = self.bail_label();
        self.asm.mov64(Reg::R2, 6);
        self.copy_bytes(1, 0);
        let a = &mut self.asm;
        let (top, found, advance, lengths) = (a.label(), a.label(), a.label(), a.label());
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.mov64(Reg::R9, 0);
        a.store(Size::W, Reg::FP, abi::FOUND, 40);
        a.bind(top);
        a.load(Size::W, Reg::R7, Reg::FP, abi::FOUND);
        self.jump_unless_extension(Reg::R8, absent);
        self.copy_header_bytes(0, 2, 0, malformed);
        self.routing_header(malformed);
        self.asm.jump32(Cond::Ne, Reg::R8, i32::from(kind::FRAGMENT), lengths);
        self.copy_header_bytes(2, 2, 2, malformed);
        if target != kind::FRAGMENT {
            self.load_be(Reg::R1, Reg::FP, abi::BUFFER + 2, 2);
            self.asm.alu64(AluOp::Rsh, Reg::R1, 3);
            self.asm.comment("a later fragment ends the walk");
            self.asm.jump32(Cond::Ne, Reg::R1, 0, absent);
        }
        self.asm.mov64(Reg::R1, 8);
        self.asm.goto(advance);
        self.asm.bind(lengths);
        self.header_length(advance);
        let a = &mut self.asm;
        a.bind(advance);
        a.jump32(Cond::Eq, Reg::R8, i32::from(target), found);
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        a.store(Size::W, Reg::FP, abi::FOUND, Reg::R7);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, IPV6_EXT_HEADERS_MAX as i32, top, IPV6_EXT_HEADERS_MAX);
        a.goto(bail);
        a.bind(found);
    }

    /// Goes on if the header at [`abi::FOUND`] is as asked.
    fn header_test(&mut self, word: u8, test: &Ipv6HeaderTest, fails: Label, hotdrop: Label) {
        match test {
            Ipv6HeaderTest::Ah { spi, spi_negate, len, len_negate, reserved } => {
                self.header_bytes(12, hotdrop);
                self.auth_length();
                let a = &mut self.asm;
                a.mov64(Reg::R2, Reg::R7);
                a.alu64(AluOp::Add, Reg::R2, Reg::R1);
                a.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
                a.jump64(Cond::Gt, Reg::R2, Reg::R1, hotdrop);
                self.within((Size::W, 4), *spi, *spi_negate, fails);
                if *len != 0 {
                    self.auth_length();
                    self.equal(*len, *len_negate, fails);
                }
                if *reserved {
                    self.asm.load(Size::H, Reg::R1, Reg::FP, abi::BUFFER + 2);
                    self.asm.jump32(Cond::Ne, Reg::R1, 0, fails);
                }
            }
            Ipv6HeaderTest::Frag { id, id_negate, reserved, first, more, last, .. } => {
                self.header_bytes(8, hotdrop);
                self.within((Size::W, 4), *id, *id_negate, fails);
                self.load_be(Reg::R1, Reg::FP, abi::BUFFER + 2, 2);
                let a = &mut self.asm;
                if *reserved {
                    a.load(Size::B, Reg::R2, Reg::FP, abi::BUFFER + 1);
                    a.jump32(Cond::Ne, Reg::R2, 0, fails);
                    a.jump32(Cond::Set, Reg::R1, 6, fails);
                }
                if *first {
                    a.jump32(Cond::Set, Reg::R1, 0xfff8, fails);
                }
                if *last {
                    a.jump32(Cond::Set, Reg::R1, 1, fails);
                }
                if *more {
                    a.alu64(AluOp::And, Reg::R1, 1);
                    a.jump32(Cond::Eq, Reg::R1, 0, fails);
                }
            }
            Ipv6HeaderTest::Options { len, len_negate, options, .. } => {
                self.whole_header(hotdrop);
                self.options(options, fails);
                if let Some(len) = len {
                    self.asm.load(Size::W, Reg::R1, Reg::FP, LENGTH);
                    self.equal(*len, *len_negate, fails);
                }
            }
            Ipv6HeaderTest::Rt { .. } => self.routing_test(word, test, fails, hotdrop),
        }
    }

    /// Copies the first bytes of the header at [`abi::FOUND`], or jumps if the packet does not have them.
    fn header_bytes(&mut self, bytes: i32, absent: Label) {
        self.asm.load(Size::W, Reg::R7, Reg::FP, abi::FOUND);
        self.copy_header_bytes(0, bytes, 0, absent);
    }

    /// Copies the first 8 bytes of a header that has a length in units of 8 bytes, and keeps its length at [`LENGTH`]
    /// and in `r8`; jumps if the packet does not have all of it.
    fn whole_header(&mut self, absent: Label) {
        self.header_bytes(2, absent);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R8, Reg::FP, abi::BUFFER + 1);
        a.alu64(AluOp::Add, Reg::R8, 1);
        a.alu64(AluOp::Lsh, Reg::R8, 3);
        a.load(Size::W, Reg::R1, Reg::FP, abi::LENGTH);
        a.mov64(Reg::R2, Reg::R7);
        a.alu64(AluOp::Add, Reg::R2, Reg::R8);
        a.jump64(Cond::Gt, Reg::R2, Reg::R1, absent);
        a.store(Size::W, Reg::FP, LENGTH, Reg::R8);
        self.header_bytes(8, absent);
    }

    /// `r1` = length of the authentication header in the buffer.
    fn auth_length(&mut self) {
        let a = &mut self.asm;
        a.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER + 1);
        a.alu64(AluOp::Add, Reg::R1, 2);
        a.alu64(AluOp::Lsh, Reg::R1, 2);
    }

    /// Fails unless `r1` is (or with `negate` is not) this.
    fn equal(&mut self, asked: u32, negate: bool, fails: Label) {
        let cond = if negate { Cond::Eq } else { Cond::Ne };
        self.asm.jump32(cond, Reg::R1, Operand::bits(asked), fails);
    }

    /// Fails unless a number in the buffer is in a range, or with `negate` outside. `r1` and `r5` are lost.
    fn within(&mut self, at: (Size, i16), (first, last): (u32, u32), negate: bool, fails: Label) {
        if first > last {
            if !negate {
                // No number is in the range. The jump has a condition because code that none leads to is refused.
                self.asm.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER);
                self.asm.jump32(Cond::Le, Reg::R1, 255, fails);
            }
            return;
        }
        match at {
            (Size::B, at) => self.asm.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER + at),
            (_, at) => self.load_be(Reg::R1, Reg::FP, abi::BUFFER + at, 4),
        }
        if first != 0 {
            self.asm.alu32(AluOp::Sub, Reg::R1, Operand::bits(first));
        }
        let cond = if negate { Cond::Le } else { Cond::Gt };
        self.asm.jump32(cond, Reg::R1, Operand::bits(last - first), fails);
    }

    /// The options that the header starts with (`hbh_mt6`): `r7` where the next is, `r8` bytes left of the header.
    fn options(&mut self, options: &[(u8, Option<u8>)], fails: Label) {
        self.asm.alu64(AluOp::Add, Reg::R7, 2);
        self.asm.alu64(AluOp::Sub, Reg::R8, 2);
        for (at, &(kind, len)) in options.iter().enumerate() {
            self.asm.comment(format!("option {kind}"));
            self.asm.jump64(Cond::Eq, Reg::R8, 0, fails);
            self.asm.mov64(Reg::R2, Reg::R7);
            self.copy_bytes(1, 0);
            self.asm.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER);
            self.asm.jump32(Cond::Ne, Reg::R1, i32::from(kind), fails);
            if kind == 0 {
                self.asm.alu64(AluOp::Add, Reg::R7, 1);
                self.asm.alu64(AluOp::Sub, Reg::R8, 1);
                continue;
            }
            self.asm.jump64(Cond::Lt, Reg::R8, 2, fails);
            self.asm.mov64(Reg::R2, Reg::R7);
            self.asm.alu64(AluOp::Add, Reg::R2, 1);
            self.copy_bytes(1, 0);
            let a = &mut self.asm;
            a.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER);
            if let Some(len) = len {
                a.jump32(Cond::Ne, Reg::R1, i32::from(len), fails);
            }
            if at + 1 == options.len() {
                break;
            }
            a.alu64(AluOp::Add, Reg::R1, 2);
            a.jump64(Cond::Gt, Reg::R1, Reg::R8, fails);
            a.alu64(AluOp::Add, Reg::R7, Reg::R1);
            a.alu64(AluOp::Sub, Reg::R8, Reg::R1);
        }
    }

    /// net/ipv6/netfilter/ip6t_rt.c, `rt_mt6`.
    fn routing_test(&mut self, word: u8, test: &Ipv6HeaderTest, fails: Label, hotdrop: Label) {
        let Ipv6HeaderTest::Rt {
            kind,
            kind_negate,
            segments_left,
            segments_left_negate,
            len,
            len_negate,
            reserved,
            addresses,
            not_strict,
        } = test
        else {
            return;
        };
        self.whole_header(hotdrop);
        self.within((Size::B, 3), *segments_left, *segments_left_negate, fails);
        if let Some(len) = len {
            self.asm.mov64(Reg::R1, Reg::R8);
            self.equal(*len, *len_negate, fails);
        }
        if let Some(kind) = kind {
            self.asm.load(Size::B, Reg::R1, Reg::FP, abi::BUFFER + 2);
            self.equal(*kind, *kind_negate, fails);
        }
        if *reserved {
            self.asm.load(Size::W, Reg::R1, Reg::FP, abi::BUFFER + 4);
            self.asm.jump32(Cond::Ne, Reg::R1, 0, fails);
        }
        if addresses.is_empty() {
            return;
        }
        self.asm.comment("addresses");
        self.asm.alu64(AluOp::Sub, Reg::R8, 8);
        self.asm.alu64(AluOp::Rsh, Reg::R8, 4);
        if *not_strict {
            self.addresses_in_order(word, addresses, fails);
        } else {
            self.asm.jump64(Cond::Ne, Reg::R8, addresses.len() as i32, fails);
            for (index, address) in addresses.iter().enumerate() {
                self.asm.load(Size::W, Reg::R2, Reg::FP, abi::FOUND);
                self.asm.alu64(AluOp::Add, Reg::R2, 8 + 16 * index as i32);
                self.copy_bytes(16, 0);
                for (at, half) in address.to_be_bytes().chunks_exact(8).enumerate() {
                    let half = half.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
                    self.asm.load(Size::Dw, Reg::R1, Reg::FP, abi::BUFFER + 8 * at as i16);
                    self.asm.load_imm64(Reg::R2, half);
                    self.asm.jump64(Cond::Ne, Reg::R1, Reg::R2, fails);
                }
            }
        }
    }

    /// Fails unless the header's `r8` addresses hold these in this order. How many were found is kept at
    /// [`abi::HANDOVER`]; `r9` counts the header's.
    fn addresses_in_order(&mut self, word: u8, addresses: &[u128], fails: Label) {
        let mut table: Vec<u8> = addresses.iter().flat_map(|address| address.to_be_bytes()).collect();
        let entries = addresses.len().next_power_of_two();
        table.resize(16 * entries, 0);
        let (top, holds) = (self.asm.label(), self.asm.label());
        let a = &mut self.asm;
        a.store(Size::W, Reg::FP, ADDRESSES, Reg::R8);
        a.store(Size::W, Reg::FP, abi::HANDOVER, 0);
        a.mov64(Reg::R9, 0);
        a.bind(top);
        a.load(Size::W, Reg::R1, Reg::FP, ADDRESSES);
        a.jump64(Cond::Ge, Reg::R9, Reg::R1, fails);
        a.load(Size::W, Reg::R2, Reg::FP, abi::FOUND);
        a.mov64(Reg::R1, Reg::R9);
        a.alu64(AluOp::Lsh, Reg::R1, 4);
        a.alu64(AluOp::Add, Reg::R2, Reg::R1);
        a.alu64(AluOp::Add, Reg::R2, 8);
        self.copy_bytes(16, 0);
        self.load_table(Reg::R2, "addresses", word, table);
        let a = &mut self.asm;
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.mov64(Reg::R1, Reg::R7);
        a.alu64(AluOp::And, Reg::R1, entries as i32 - 1);
        a.alu64(AluOp::Lsh, Reg::R1, 4);
        a.alu64(AluOp::Add, Reg::R2, Reg::R1);
        a.load(Size::Dw, Reg::R3, Reg::FP, abi::BUFFER);
        a.load(Size::Dw, Reg::R1, Reg::R2, 0);
        a.alu64(AluOp::Xor, Reg::R3, Reg::R1);
        a.load(Size::Dw, Reg::R4, Reg::FP, abi::BUFFER + 8);
        a.load(Size::Dw, Reg::R1, Reg::R2, 8);
        a.alu64(AluOp::Xor, Reg::R4, Reg::R1);
        a.alu64(AluOp::Or, Reg::R3, Reg::R4);
        a.comment(
            "one more if they are equal: the top bit of neither the difference nor its negative is set",
        );
        a.mov64(Reg::R4, 0);
        a.alu64(AluOp::Sub, Reg::R4, Reg::R3);
        a.alu64(AluOp::Or, Reg::R3, Reg::R4);
        a.alu64(AluOp::Rsh, Reg::R3, 63);
        a.alu64(AluOp::Xor, Reg::R3, 1);
        a.alu64(AluOp::Add, Reg::R7, Reg::R3);
        a.store(Size::W, Reg::FP, abi::HANDOVER, Reg::R7);
        a.load(Size::W, Reg::R7, Reg::FP, abi::HANDOVER);
        a.jump64(Cond::Eq, Reg::R7, addresses.len() as i32, holds);
        a.alu64(AluOp::Add, Reg::R9, 1);
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, ADDRESSES_MAX, top, ADDRESSES_MAX as u32);
        a.goto(fails);
        a.bind(holds);
    }
}
