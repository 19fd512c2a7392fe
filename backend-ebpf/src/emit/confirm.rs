//! Connections, asked for at the very end: for packets that are about to be dropped because they seem to have none.
//!
//! Rules are run as for a packet without a connection ([`polc_ir::env::Connections::LookedUp`]), so everything that is let
//! on either way costs nothing. What is left is asked for by address and port in the network namespace of the device,
//! in the default zone, and the reference that the kernel gives is given back at once.

use polc_ir::env::Attach;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::outcome::Verdict;

use super::{Emitter, return_code};
use crate::abi::{self, CTX, lookup};
use crate::insn::{AluOp, Cond, Reg, Size};
use crate::kernel_api::KernelFunction;

/// TCP and UDP: the kernel's functions look up no other.
const PROTOCOLS: [i32; 2] = [6, 17];

impl Emitter<'_> {
    /// If the return code in `r9` is [`abi::CONFIRM`], asks, and puts the slot into `r8` and the return code into `r9`.
    pub(super) fn confirm(&mut self) {
        if !self.plan.traces.iter().any(|trace| trace.if_absent) {
            return;
        }
        let look_up = match self.target.attach {
            Attach::Xdp => KernelFunction::XdpCtLookup,
            Attach::TcIngress | Attach::TcEgress => KernelFunction::SkbCtLookup,
            // `check_fields` refuses the plan.
            Attach::Netfilter => return,
        };
        let (asks, known, release) = (self.asm.label(), self.asm.label(), self.asm.label());
        let counted = self.asm.label();
        let verdict = |verdict| return_code(self.target.attach, self.plan.place.mode, verdict);
        let (dropped, deferred) = (verdict(Verdict::Drop), verdict(Verdict::Defer));
        self.asm.jump32(Cond::Ne, Reg::R9, abi::CONFIRM, counted);
        self.asm.comment("has the packet a connection?");
        self.load_field(Reg::R1, Field::Fragment);
        self.asm.jump32(Cond::Ne, Reg::R1, 0, known);
        self.load_field(Reg::R1, Field::L4Len);
        self.asm.jump32(Cond::Lt, Reg::R1, 4, known);
        self.load_field(Reg::R1, Field::Proto);
        self.asm.jump32(Cond::Eq, Reg::R1, PROTOCOLS[0], asks);
        self.asm.jump32(Cond::Ne, Reg::R1, PROTOCOLS[1], known);
        self.asm.bind(asks);
        // The namespace of the device, no error yet; the direction and what is reserved are 0.
        let a = &mut self.asm;
        a.store(Size::W, Reg::FP, lookup::OPTS, -1);
        a.store(Size::W, Reg::FP, lookup::OPTS + lookup::OPTS_ERROR, 0);
        a.store(Size::W, Reg::FP, lookup::OPTS + lookup::OPTS_PROTOCOL, Reg::R1);
        let bytes = self.tuple();
        let a = &mut self.asm;
        a.mov64(Reg::R1, CTX);
        a.mov64(Reg::R2, Reg::FP);
        a.alu64(AluOp::Add, Reg::R2, i32::from(lookup::TUPLE));
        a.mov64(Reg::R3, i32::from(bytes));
        a.mov64(Reg::R4, Reg::FP);
        a.alu64(AluOp::Add, Reg::R4, i32::from(lookup::OPTS));
        a.mov64(Reg::R5, i32::from(lookup::OPTS_BYTES));
        a.call_kernel(look_up);
        a.jump64(Cond::Ne, Reg::R0, 0, release);
        a.load(Size::W, Reg::R1, Reg::FP, lookup::OPTS + lookup::OPTS_ERROR);
        a.jump32(Cond::Ne, Reg::R1, -lookup::ENOENT, known);
        a.mov32(Reg::R9, dropped);
        a.goto(counted);
        a.bind(release);
        a.mov64(Reg::R1, Reg::R0);
        a.call_kernel(KernelFunction::CtRelease);
        a.bind(known);
        a.comment("it has one, or the kernel does not tell");
        a.alu64(AluOp::Add, Reg::R8, 1);
        a.mov32(Reg::R9, deferred);
        a.bind(counted);
    }

    /// Writes the packet's `struct bpf_sock_tuple`; its bytes.
    fn tuple(&mut self) -> i16 {
        let mut at = lookup::TUPLE;
        for field in [Field::SrcAddr, Field::DstAddr] {
            let slot = self.slot(field);
            for word in slot.iter().flat_map(|slot| slot.word..slot.word + slot.words) {
                self.asm.load(Size::W, Reg::R1, Reg::FP, self.layout.word(word));
                self.asm.be(32, Reg::R1);
                self.asm.store(Size::W, Reg::FP, at, Reg::R1);
                at += 4;
            }
        }
        for field in [Field::SrcPort, Field::DstPort] {
            self.load_field(Reg::R1, field);
            self.asm.be(16, Reg::R1);
            self.asm.store(Size::H, Reg::FP, at, Reg::R1);
            at += 2;
        }
        match self.plan.family {
            Family::V4 => lookup::TUPLE_V4_BYTES,
            Family::V6 => lookup::TUPLE_V6_BYTES,
        }
    }

    /// The only word of a field; 0 if the key has no such field, which a plan that looks connections up always has.
    fn load_field(&mut self, into: Reg, field: Field) {
        match self.slot(field) {
            Some(slot) => self.asm.load(Size::W, into, Reg::FP, self.layout.word(slot.word)),
            None => self.asm.mov32(into, 0),
        }
    }
}
