//! Reporting decided packets while somebody watches: one load and one branch that is never taken otherwise.
//!
//! The code is out of the way behind the program's exit. It runs after the packet is counted, so nothing of the key but
//! the mark is needed any more, and what it keeps on the stack lies over the places of the walk and the buffer. The
//! layouts are [`crate::trace`]'s; what can't be read of the frame stays 0 in the record.

use polc_ir::env::Attach;
use polc_ir::field::Field;

use super::headers::VLAN_TYPES;
use super::{Emitter, netfilter};
use crate::abi::{self, CTX, nf_ctx, sk_buff, trace as place, xdp_md};
use crate::asm::Label;
use crate::insn::{AluOp, Cond, Helper, Operand, Reg, Size, Width};
use crate::kernel_api::KernelField;
use crate::object::{DataSection, MapDef, MapKind, MapType};
use crate::trace::{self, WITH_PORTS, config, flag, pattern, record, state};
use polc_ir::entities::Map;

/// What reporting needs.
#[derive(Clone, Copy)]
pub(super) struct Trace {
    config: Map,
    wanted: Map,
    state: Map,
    events: Map,
    /// The out-of-the-way part.
    report: Label,
}

/// ICMP and ICMPv6.
const ICMP: [i32; 2] = [1, 58];

impl Emitter<'_> {
    /// Makes the maps that reporting needs.
    pub(super) fn add_trace(&mut self) {
        let declared = |name: &str, map_type, key_bytes, value_bytes, max_entries| MapDef {
            name: name.to_string(),
            kind: MapKind::Declared { map_type, key_bytes, value_bytes, max_entries, flags: 0 },
        };
        let slots = self.plan.traces.len().next_power_of_two().max(8);
        let data = |name: &str, bytes: usize| MapDef::data(name, DataSection::Data, vec![0; bytes]);
        self.trace = Some(Trace {
            config: self.maps.push(data(trace::CONFIG_MAP, config::BYTES)),
            wanted: self.maps.push(data(trace::WANTED_MAP, slots)),
            state: self.maps.push(MapDef::percpu_array(trace::STATE_MAP, state::BYTES as u32, 1)),
            events: self.maps.push(declared(trace::EVENTS_MAP, MapType::RINGBUF, 0, 0, trace::EVENTS_BYTES)),
            report: self.asm.label(),
        });
    }

    /// Leaves the straight way if somebody watches. The counter slot is at [`abi::COUNTER_KEY`], the return code in `r9`.
    pub(super) fn trace_switch(&mut self) {
        let Some(Trace { config, report, .. }) = self.trace else { return };
        let a = &mut self.asm;
        a.comment("does somebody watch?");
        a.load_map_value(Reg::R1, config, config::SWITCH as u32);
        a.load(Size::W, Reg::R1, Reg::R1, 0);
        a.jump32(Cond::Ne, Reg::R1, 0, report);
    }

    /// The out-of-the-way part, up to an exit of its own.
    pub(super) fn trace_report(&mut self) {
        let Some(trace) = self.trace else { return };
        let out = self.asm.label();
        let a = &mut self.asm;
        a.bind(trace.report);
        a.comment("is the slot wanted?");
        a.store(Size::W, Reg::FP, place::RETURN, Reg::R9);
        a.load(Size::W, Reg::R1, Reg::FP, abi::COUNTER_KEY);
        let slots = self.maps[trace.wanted].contents().map_or(1, <[u8]>::len);
        a.alu64(AluOp::And, Reg::R1, (slots - 1) as i32);
        a.load_map_value(Reg::R2, trace.wanted, 0);
        a.alu64(AluOp::Add, Reg::R2, Reg::R1);
        a.load(Size::B, Reg::R1, Reg::R2, 0);
        a.jump32(Cond::Eq, Reg::R1, 0, out);
        self.trace_known();
        self.trace_frame();
        self.trace_filter(trace.config, out);
        self.trace_output(trace, out);
        let a = &mut self.asm;
        a.bind(out);
        a.load(Size::W, Reg::R0, Reg::FP, place::RETURN);
        self.leave();
    }

    /// The record's part that needs no look at the frame; the rest becomes 0.
    fn trace_known(&mut self) {
        let (mark, attach) = (self.slot(Field::Mark), self.target.attach);
        let layout = self.layout;
        let a = &mut self.asm;
        a.comment("what is known");
        for at in (0..record::BYTES as i16).step_by(8) {
            a.store(Size::Dw, Reg::FP, place::RECORD + at, 0);
        }
        for (from, to) in [(abi::COUNTER_KEY, record::SLOT), (abi::LENGTH, record::LENGTH)] {
            a.load(Size::W, Reg::R1, Reg::FP, from);
            a.store(Size::W, Reg::FP, place::RECORD + to, Reg::R1);
        }
        match attach {
            Attach::Xdp => a.load(Size::W, Reg::R1, CTX, xdp_md::INGRESS_IFINDEX),
            Attach::TcIngress | Attach::TcEgress => a.load(Size::W, Reg::R1, CTX, sk_buff::IFINDEX),
            Attach::Netfilter => {
                let known = a.label();
                netfilter::device_number(a, KernelField::STATE_IN);
                a.jump32(Cond::Ne, Reg::R1, 0, known);
                netfilter::device_number(a, KernelField::STATE_OUT);
                a.bind(known);
            }
        }
        a.store(Size::W, Reg::FP, place::RECORD + record::IFINDEX, Reg::R1);
        match (mark, attach) {
            (Some(slot), _) => a.load(Size::W, Reg::R1, Reg::FP, layout.word(slot.word)),
            (None, Attach::Xdp) => return,
            (None, Attach::TcIngress | Attach::TcEgress) => a.load(Size::W, Reg::R1, CTX, sk_buff::MARK),
            (None, Attach::Netfilter) => {
                a.load(Size::Dw, Reg::R1, CTX, nf_ctx::SKB);
                a.load_kernel_field(Size::W, Reg::R1, Reg::R1, KernelField::SKB_MARK);
            }
        }
        a.store(Size::W, Reg::FP, place::RECORD + record::MARK, Reg::R1);
    }

    /// Copies `bytes` of the frame (at netfilter, of the packet), from `r7 + offset` on, to the stack. `r0`-`r5` are lost.
    fn trace_copy(&mut self, offset: i16, bytes: i32, to: i16, fail: Label) {
        self.asm.mov64(Reg::R2, Reg::R7);
        self.asm.alu64(AluOp::Add, Reg::R2, i32::from(offset));
        self.load_bytes(bytes.into(), to, fail);
    }

    fn trace_flags(&mut self, flags: u8) {
        let a = &mut self.asm;
        a.load(Size::B, Reg::R1, Reg::FP, place::RECORD + record::FLAGS);
        a.alu32(AluOp::Or, Reg::R1, i32::from(flags));
        a.store(Size::B, Reg::FP, place::RECORD + record::FLAGS, Reg::R1);
    }

    /// Addresses, protocol and ports. `r7`: offset in the frame; `r8`: protocol.
    fn trace_frame(&mut self) {
        let done = self.asm.label();
        let (v4, v6, transport, later) =
            (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        let network = self.asm.label();
        if self.target.attach == Attach::Netfilter {
            self.asm.comment("the packet once more");
            self.asm.mov64(Reg::R7, 0);
            self.asm.mov32(Reg::R8, i32::from(self.plan.family.ether_type()));
        } else {
            self.asm.comment("the frame once more");
            self.asm.mov64(Reg::R7, 12);
            self.trace_copy(0, 2, place::SCRATCH, done);
            self.load_be(Reg::R8, Reg::FP, place::SCRATCH, 2);
            for _ in 0..2 {
                let tag = self.asm.label();
                self.asm.jump32(Cond::Eq, Reg::R8, i32::from(VLAN_TYPES[0]), tag);
                self.asm.jump32(Cond::Ne, Reg::R8, i32::from(VLAN_TYPES[1]), network);
                self.asm.bind(tag);
                self.asm.alu64(AluOp::Add, Reg::R7, 4);
                self.trace_copy(0, 2, place::SCRATCH, done);
                self.load_be(Reg::R8, Reg::FP, place::SCRATCH, 2);
            }
            self.asm.bind(network);
            self.asm.alu64(AluOp::Add, Reg::R7, 2);
        }
        let a = &mut self.asm;
        a.store(Size::H, Reg::FP, place::RECORD + record::ETHER_TYPE, Reg::R8);
        a.jump32(Cond::Eq, Reg::R8, 0x0800, v4);
        a.jump32(Cond::Eq, Reg::R8, 0x86dd, v6);
        a.goto(done);

        a.bind(v4);
        self.trace_copy(0, 12, place::SCRATCH, done);
        self.trace_copy(12, 4, place::RECORD + record::SRC, done);
        self.trace_copy(16, 4, place::RECORD + record::DST, done);
        self.trace_flags(flag::IP);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R8, Reg::FP, place::SCRATCH + 9);
        a.load(Size::B, Reg::R2, Reg::FP, place::SCRATCH);
        a.alu64(AluOp::And, Reg::R2, 15);
        a.alu64(AluOp::Lsh, Reg::R2, 2);
        a.alu64(AluOp::Add, Reg::R7, Reg::R2);
        self.load_be(Reg::R1, Reg::FP, place::SCRATCH + 6, 2);
        self.asm.alu32(AluOp::And, Reg::R1, 0x1fff);
        self.asm.jump32(Cond::Ne, Reg::R1, 0, later);
        self.asm.goto(transport);

        self.asm.bind(v6);
        self.trace_copy(6, 1, place::SCRATCH, done);
        self.trace_copy(8, 16, place::RECORD + record::SRC, done);
        self.trace_copy(24, 16, place::RECORD + record::DST, done);
        self.trace_flags(flag::IP | flag::V6);
        self.asm.load(Size::B, Reg::R8, Reg::FP, place::SCRATCH);
        self.asm.alu64(AluOp::Add, Reg::R7, 40);
        self.trace_extension_headers(transport, later);

        self.asm.bind(later);
        self.trace_flags(flag::LATER_FRAGMENT);
        self.asm.store(Size::B, Reg::FP, place::RECORD + record::PROTO, Reg::R8);
        self.asm.goto(done);

        self.asm.bind(transport);
        let (ports, icmp) = (self.asm.label(), self.asm.label());
        let a = &mut self.asm;
        a.store(Size::B, Reg::FP, place::RECORD + record::PROTO, Reg::R8);
        for proto in WITH_PORTS {
            a.jump32(Cond::Eq, Reg::R8, i32::from(proto), ports);
        }
        for proto in ICMP {
            a.jump32(Cond::Eq, Reg::R8, proto, icmp);
        }
        a.goto(done);
        a.bind(ports);
        self.trace_copy(0, 4, place::SCRATCH, done);
        for (from, to) in [(0, record::SRC_PORT), (2, record::DST_PORT)] {
            self.load_be(Reg::R1, Reg::FP, place::SCRATCH + from, 2);
            self.asm.store(Size::H, Reg::FP, place::RECORD + to, Reg::R1);
        }
        self.trace_flags(flag::PORTS);
        self.asm.goto(done);
        self.asm.bind(icmp);
        self.trace_copy(0, 2, place::SCRATCH, done);
        for (from, to) in [(0, record::SRC_PORT), (1, record::DST_PORT)] {
            self.load_be(Reg::R1, Reg::FP, place::SCRATCH + from, 1);
            self.asm.store(Size::H, Reg::FP, place::RECORD + to, Reg::R1);
        }
        self.trace_flags(flag::ICMP);
        self.asm.bind(done);
    }

    /// From an IPv6 extension header at `r7` of kind `r8` to the transport header (RFC 8200, section 4). A header that
    /// is cut short counts as the transport header.
    fn trace_extension_headers(&mut self, transport: Label, later: Label) {
        let a = &mut self.asm;
        let (top, fragment, auth, other, next) = (a.label(), a.label(), a.label(), a.label(), a.label());
        a.mov64(Reg::R9, 0);
        a.bind(top);
        a.jump32(Cond::Eq, Reg::R8, 44, fragment);
        a.jump32(Cond::Eq, Reg::R8, 51, auth);
        for kind in [0, 43, 60] {
            a.jump32(Cond::Eq, Reg::R8, kind, other);
        }
        a.goto(transport);
        a.bind(other);
        self.trace_copy(0, 2, place::SCRATCH, transport);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R8, Reg::FP, place::SCRATCH);
        a.load(Size::B, Reg::R1, Reg::FP, place::SCRATCH + 1);
        a.alu64(AluOp::Add, Reg::R1, 1);
        a.alu64(AluOp::Lsh, Reg::R1, 3);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        a.goto(next);
        a.bind(auth);
        self.trace_copy(0, 2, place::SCRATCH, transport);
        let a = &mut self.asm;
        a.load(Size::B, Reg::R8, Reg::FP, place::SCRATCH);
        a.load(Size::B, Reg::R1, Reg::FP, place::SCRATCH + 1);
        a.alu64(AluOp::Add, Reg::R1, 2);
        a.alu64(AluOp::Lsh, Reg::R1, 2);
        a.alu64(AluOp::Add, Reg::R7, Reg::R1);
        a.goto(next);
        a.bind(fragment);
        self.trace_copy(0, 4, place::SCRATCH, transport);
        self.asm.load(Size::B, Reg::R8, Reg::FP, place::SCRATCH);
        self.asm.alu64(AluOp::Add, Reg::R7, 8);
        self.load_be(Reg::R1, Reg::FP, place::SCRATCH + 2, 2);
        let a = &mut self.asm;
        a.alu32(AluOp::And, Reg::R1, 0xfff8);
        a.jump32(Cond::Ne, Reg::R1, 0, later);
        a.bind(next);
        a.alu64(AluOp::Add, Reg::R9, 1);
        let turns = trace::EXT_HEADERS_MAX;
        a.loop_jump(Width::W64, Cond::Lt, Reg::R9, turns as i32, top, turns);
        a.goto(transport);
    }

    /// Goes on if a pattern fits the record.
    fn trace_filter(&mut self, config: Map, out: Label) {
        let a = &mut self.asm;
        let (top, fits) = (a.label(), a.label());
        a.comment("does a pattern fit? r5 is 0 if so");
        a.mov64(Reg::R7, 0);
        a.bind(top);
        a.load_map_value(Reg::R1, config, config::PATTERNS as u32);
        a.alu64(AluOp::Add, Reg::R1, Reg::R7);
        a.load(Size::W, Reg::R5, Reg::R1, pattern::USED);
        a.alu64(AluOp::Xor, Reg::R5, 1);
        let words = (0..4).map(|word| 4 * word);
        let masked = words
            .clone()
            .map(|at| (Size::W, record::SRC + at, pattern::SRC + at, pattern::SRC_MASK + at))
            .chain(words.map(|at| (Size::W, record::DST + at, pattern::DST + at, pattern::DST_MASK + at)))
            .chain([
                (Size::B, record::PROTO, pattern::PROTO, pattern::PROTO_MASK),
                (Size::B, record::FLAGS, pattern::FLAGS, pattern::FLAGS_MASK),
                (Size::W, record::IFINDEX, pattern::IFINDEX, pattern::IFINDEX_MASK),
            ]);
        for (size, from, value, mask) in masked {
            a.load(size, Reg::R2, Reg::FP, place::RECORD + from);
            a.load(Size::W, Reg::R3, Reg::R1, value);
            a.alu64(AluOp::Xor, Reg::R2, Reg::R3);
            a.load(Size::W, Reg::R3, Reg::R1, mask);
            a.alu64(AluOp::And, Reg::R2, Reg::R3);
            a.alu64(AluOp::Or, Reg::R5, Reg::R2);
        }
        for (from, low, span) in [
            (record::SRC_PORT, pattern::SRC_PORT, pattern::SRC_PORT_SPAN),
            (record::DST_PORT, pattern::DST_PORT, pattern::DST_PORT_SPAN),
        ] {
            a.load(Size::H, Reg::R2, Reg::FP, place::RECORD + from);
            a.load(Size::W, Reg::R3, Reg::R1, low);
            a.alu32(AluOp::Sub, Reg::R2, Reg::R3);
            a.load(Size::W, Reg::R3, Reg::R1, span);
            // The top bit is set if the distance is larger than the span.
            a.alu64(AluOp::Sub, Reg::R3, Reg::R2);
            a.alu64(AluOp::Rsh, Reg::R3, 63);
            a.alu64(AluOp::Or, Reg::R5, Reg::R3);
        }
        a.jump64(Cond::Eq, Reg::R5, 0, fits);
        a.alu64(AluOp::Add, Reg::R7, i32::from(config::PATTERN_BYTES));
        let all = i32::from(config::PATTERN_BYTES) * trace::PATTERNS_MAX as i32;
        a.loop_jump(Width::W64, Cond::Lt, Reg::R7, all, top, trace::PATTERNS_MAX as u32);
        a.goto(out);
        a.bind(fits);
    }

    /// Pays for the report and makes it, or counts that it was not made.
    fn trace_output(&mut self, trace: Trace, out: Label) {
        let a = &mut self.asm;
        let (enough, limited, full) = (a.label(), a.label(), a.label());
        a.comment("the token bucket");
        a.store(Size::W, Reg::FP, place::SCRATCH, 0);
        a.load_map(Reg::R1, trace.state);
        a.mov64(Reg::R2, Reg::FP);
        a.alu64(AluOp::Add, Reg::R2, i32::from(place::SCRATCH));
        a.call(Helper::MAP_LOOKUP_ELEM);
        a.jump64(Cond::Eq, Reg::R0, 0, out);
        a.mov64(Reg::R7, Reg::R0);
        a.call(Helper::KTIME_GET_NS);
        a.store(Size::Dw, Reg::FP, place::RECORD + record::TIME, Reg::R0);
        a.load_map_value(Reg::R1, trace.config, 0);
        a.load(Size::Dw, Reg::R2, Reg::R1, config::BURST);
        a.load(Size::Dw, Reg::R3, Reg::R1, config::COST);
        a.load(Size::Dw, Reg::R4, Reg::R7, state::LAST);
        a.store(Size::Dw, Reg::R7, state::LAST, Reg::R0);
        a.alu64(AluOp::Sub, Reg::R0, Reg::R4);
        a.load(Size::Dw, Reg::R4, Reg::R7, state::CREDIT);
        a.alu64(AluOp::Add, Reg::R4, Reg::R0);
        a.jump64(Cond::Le, Reg::R4, Reg::R2, enough);
        a.mov64(Reg::R4, Reg::R2);
        a.bind(enough);
        a.store(Size::Dw, Reg::R7, state::CREDIT, Reg::R4);
        a.jump64(Cond::Lt, Reg::R4, Reg::R3, limited);
        a.alu64(AluOp::Sub, Reg::R4, Reg::R3);
        a.store(Size::Dw, Reg::R7, state::CREDIT, Reg::R4);
        a.comment("the report");
        a.load_map(Reg::R1, trace.events);
        a.mov64(Reg::R2, Reg::FP);
        a.alu64(AluOp::Add, Reg::R2, i32::from(place::RECORD));
        a.mov64(Reg::R3, record::BYTES as i32);
        a.mov64(Reg::R4, 0);
        a.call(Helper::RINGBUF_OUTPUT);
        a.jump64(Cond::Ne, Reg::R0, 0, full);
        let bump = |a: &mut crate::asm::Asm, at: i16| {
            a.load(Size::Dw, Reg::R1, Reg::R7, at);
            a.alu64(AluOp::Add, Reg::R1, Operand::Imm(1));
            a.store(Size::Dw, Reg::R7, at, Reg::R1);
        };
        bump(a, state::REPORTED);
        a.goto(out);
        a.bind(limited);
        bump(a, state::LIMITED);
        a.goto(out);
        a.bind(full);
        bump(a, state::FULL);
    }
}
