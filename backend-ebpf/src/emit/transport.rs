//! The transport header: its fields, as far as the packet has them.
//!
//! What nearly every packet has comes first: all the fields that belong together, with one check. Only where a header is cut
//! short are they taken one at a time, and the words of those that are not there cleared.

use polc_ir::env::Attach;
use polc_ir::field::Field;
use polc_ir::hook::Family;

use super::Emitter;
use crate::abi;
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Reg, Size};

/// Where parts of transport headers end that packets have whole or not at all, unless they are malformed: ports, or ICMP's
/// type and code; TCP's up to its flags.
const HEADER_PARTS: [i32; 2] = [4, 14];

/// A field of the transport header to be loaded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct TransportLoad {
    /// Bytes of the header that it needs.
    end: i32,
    offset: i16,
    bytes: u8,
    /// Low bits that are not the field's.
    shift: u8,
    word: u8,
}

/// Where a field is in the transport header: its offset, its bytes, and how many of their low bits are not its own.
pub(super) fn of_transport(field: Field) -> Option<(i16, u8, u8)> {
    match field {
        Field::SrcPort => Some((0, 2, 0)),
        Field::DstPort => Some((2, 2, 0)),
        Field::IcmpType => Some((0, 1, 0)),
        Field::IcmpCode => Some((1, 1, 0)),
        Field::TcpDataOffset => Some((12, 1, 4)),
        Field::TcpFlags => Some((13, 1, 0)),
        Field::L4Bytes { offset, len } => Some((offset.into(), len, 0)),
        _ => None,
    }
}

impl Emitter<'_> {
    /// Fields of the transport header at `r9` (at netfilter, at [`abi::L4_OFFSET`]), of which the packet has `r2` bytes.
    pub(super) fn transport(&mut self) {
        if self.slot(Field::L4Len).is_some() {
            let mut length = Reg::R2;
            if self.plan.family == Family::V6 {
                // A jumbogram has more than the field's 16 bits hold.
                length = Reg::R1;
                let fits = self.asm.label();
                self.asm.mov64(length, Reg::R2);
                self.asm.jump64(Cond::Le, length, 0xffff, fits);
                self.asm.mov64(length, 0xffff);
                self.asm.bind(fits);
            }
            self.store_field(Field::L4Len, length);
        }
        let mut loads: Vec<TransportLoad> = Vec::new();
        for slot in &self.plan.key {
            let Some((offset, bytes, shift)) = of_transport(slot.field) else { continue };
            let end = i32::from(offset) + i32::from(bytes);
            loads.push(TransportLoad { end, offset, bytes, shift, word: slot.word });
        }
        loads.sort_unstable();
        let done = self.asm.label();
        self.asm.comment("transport header");
        if self.target.attach == Attach::Netfilter {
            self.copy_transport_header(loads.iter().map(|load| load.end), done);
        }
        let mut left = loads.as_slice();
        while let Some(first) = left.first() {
            // Packets that have any of these have all of them, but for headers that are cut short.
            let together = HEADER_PARTS.into_iter().find(|end| first.end <= *end).unwrap_or(first.end);
            let (now, later) = left.split_at(left.partition_point(|load| load.end <= together));
            let end = now.last().map_or(0, |load| load.end);
            if now.iter().any(|load| load.end < end) || self.clears_transport() {
                let whole = self.asm.label();
                self.asm.jump64(Cond::Ge, Reg::R2, end, whole);
                self.cut_transport(now, left, done);
                self.asm.goto(done);
                self.asm.bind(whole);
            } else {
                self.asm.jump64(Cond::Lt, Reg::R2, end, done);
            }
            self.readable_transport(end);
            now.iter().for_each(|load| self.load_transport(load));
            left = later;
        }
        self.asm.bind(done);
    }

    /// Loads what a header that is cut short has of the fields `now`, and clears it and those behind if nobody has.
    fn cut_transport(&mut self, now: &[TransportLoad], left: &[TransportLoad], done: Label) {
        if self.clears_transport() {
            let words: Vec<u8> = left.iter().map(|load| load.word).collect();
            self.clear_words(&words);
        }
        let whole = now.last().map_or(0, |load| load.end);
        let mut checked = 0;
        for load in now.iter().filter(|load| load.end < whole) {
            if load.end > checked {
                checked = load.end;
                self.asm.jump64(Cond::Lt, Reg::R2, load.end, done);
                self.readable_transport(load.end);
            }
            self.load_transport(load);
        }
    }

    /// Makes `end` bytes of the transport header readable at `r9`, which the packet has.
    fn readable_transport(&mut self, end: i32) {
        if self.target.attach != Attach::Netfilter {
            let bail = self.bail_label();
            self.readable(Reg::R9, end, bail);
        }
    }

    /// A field of the transport header into its word, through `r1`.
    fn load_transport(&mut self, load: &TransportLoad) {
        let TransportLoad { end, offset, bytes, shift, word } = *load;
        if self.target.attach == Attach::Netfilter && end > i32::from(abi::BUFFER_BYTES) {
            self.copy_far_bytes(offset, bytes);
        } else {
            self.load_be(Reg::R1, Reg::R9, offset, bytes);
        }
        if shift != 0 {
            self.asm.alu32(AluOp::Rsh, Reg::R1, i32::from(shift));
        }
        self.asm.store(Size::W, Reg::FP, self.layout.word(word), Reg::R1);
    }

    /// Whether what follows the network header is cleared only where the packet does not have it.
    pub(super) fn clears_transport(&self) -> bool {
        let quick = match self.plan.family {
            Family::V4 => true,
            Family::V6 => self.passes_extensions(),
        };
        quick && self.target.attach != Attach::Netfilter && self.layout.sparse() && !self.is_read_by_walk()
    }

    /// Clears what follows the network header. `r1` is lost.
    pub(super) fn clear_transport(&mut self) {
        let fields = self.plan.key.iter().filter(|slot| {
            matches!(slot.field, Field::Proto | Field::L4Len) || of_transport(slot.field).is_some()
        });
        let words: Vec<u8> = fields.map(|slot| slot.word).collect();
        self.clear_words(&words);
    }
}
