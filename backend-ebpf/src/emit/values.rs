//! Where the values of a look-up step are: in registers, and on the stack if there are more of them.
//!
//! A line has no jumps, so it is known when each value is needed next; the one that is needed last gives its register
//! up. Bytes of the key and constants are not kept but made where they are used.

use polc_ir::entities::Value;
use polc_ir::plan::{Given, LookupStep, given};

use crate::abi::{self, KeyLayout};
use crate::asm::Asm;
use crate::insn::{Operand, Reg, Size};

/// The register that points into the map of tables.
pub(super) const TABLES: Reg = Reg::R7;

/// Registers that hold values. `r0` is scratch, `r6` the context, [`TABLES`] taken.
const REGISTERS: [Reg; 7] = [Reg::R1, Reg::R2, Reg::R3, Reg::R4, Reg::R5, Reg::R8, Reg::R9];

/// Bytes of a value on the stack.
const SLOT_BYTES: i16 = 8;

/// Values that the stack has room for.
const SLOTS: usize = (abi::BUFFER_BYTES / SLOT_BYTES) as usize;

const _: () = assert!(REGISTERS.len() + SLOTS == polc_ir::plan::PRESSURE_MAX);

/// Where values are.
pub(super) struct Values {
    /// For each register the value it holds.
    registers: [Option<Value>; REGISTERS.len()],
    /// For each slot the value it holds.
    slots: [Option<Value>; SLOTS],
    /// For each value the operations that use it, the last first.
    uses: Vec<Vec<u32>>,
    /// For each value what it is, if it needs no other.
    given: Vec<Option<Given>>,
}

impl Values {
    /// Nothing is anywhere yet.
    pub(super) fn new(step: &LookupStep) -> Values {
        let mut uses: Vec<Vec<u32>> = vec![Vec::new(); step.ops.len()];
        // The result is used behind the end.
        if let Some(uses) = uses.get_mut(step.result.as_u32() as usize) {
            uses.push(step.ops.len() as u32);
        }
        let given = given(&step.ops);
        let given: Vec<Option<Given>> =
            given.into_iter().map(|given| given.filter(|given| given.is_loaded())).collect();
        for (at, op) in step.ops.iter().rev() {
            let index = at.as_u32() as usize;
            if uses[index].is_empty() || given[index].is_some() {
                continue;
            }
            for operand in op.operands() {
                uses[operand.as_u32() as usize].push(at.as_u32());
            }
        }
        Values { registers: Default::default(), slots: Default::default(), uses, given }
    }

    /// What a value is, if it needs no other.
    pub(super) fn given(&self, value: Value) -> Option<Given> {
        self.given[value.as_u32() as usize]
    }

    /// Whether the operation that makes a value has to be written: something uses it, and it can't be made there.
    pub(super) fn is_written(&self, value: Value) -> bool {
        self.given(value).is_none() && !self.uses[value.as_u32() as usize].is_empty()
    }

    /// The operation that uses a value next.
    fn next_use(&self, value: Value) -> Option<u32> {
        self.uses[value.as_u32() as usize].last().copied()
    }

    /// The register of a value, brought back from the stack if it is there. `None` if there is no room.
    pub(super) fn bring(&mut self, asm: &mut Asm, layout: KeyLayout, value: Value) -> Option<Reg> {
        if let Some(at) = self.registers.iter().position(|held| *held == Some(value)) {
            return Some(REGISTERS[at]);
        }
        let at = self.room(asm)?;
        let into = REGISTERS[at];
        self.registers[at] = Some(value);
        match self.slots.iter().position(|held| *held == Some(value)) {
            Some(slot) => asm.load(Size::Dw, into, Reg::FP, offset(slot)),
            None => make(asm, layout, self.given(value)?, into),
        }
        Some(into)
    }

    /// A register for a new value: that of `reuse`, if this is the last operation that uses it.
    pub(super) fn define(&mut self, asm: &mut Asm, value: Value, reuse: Option<Value>) -> Option<Reg> {
        let now = value.as_u32();
        let last = |values: &Values, of: Value| values.uses[of.as_u32() as usize].iter().all(|&at| at <= now);
        if let Some(reuse) = reuse
            && last(self, reuse)
            && let Some(at) = self.registers.iter().position(|held| *held == Some(reuse))
        {
            self.registers[at] = Some(value);
            return Some(REGISTERS[at]);
        }
        let at = self.room(asm)?;
        self.registers[at] = Some(value);
        Some(REGISTERS[at])
    }

    /// A register that holds nothing, or nothing that this operation or the next ones need.
    fn room(&mut self, asm: &mut Asm) -> Option<usize> {
        if let Some(at) = self.registers.iter().position(Option::is_none) {
            return Some(at);
        }
        let at = (0..REGISTERS.len())
            .max_by_key(|&at| self.registers[at].and_then(|value| self.next_use(value)))?;
        let value = self.registers[at].take()?;
        let saved = self.given(value).is_some()
            || self.slots.contains(&Some(value))
            || self.next_use(value).is_none();
        if !saved {
            let slot = self.slots.iter().position(Option::is_none)?;
            self.slots[slot] = Some(value);
            asm.store(Size::Dw, Reg::FP, offset(slot), REGISTERS[at]);
        }
        Some(at)
    }

    /// The operation is written: what it used last is forgotten.
    pub(super) fn done(&mut self, step: &LookupStep, value: Value) {
        for operand in step.ops[value].operands() {
            let uses = &mut self.uses[operand.as_u32() as usize];
            if uses.last() == Some(&value.as_u32()) {
                uses.pop();
            }
        }
        let uses = &self.uses;
        let unused = |held: &Option<Value>| held.is_some_and(|held| uses[held.as_u32() as usize].is_empty());
        for held in self.registers.iter_mut().chain(&mut self.slots) {
            if unused(held) {
                *held = None;
            }
        }
    }
}

/// Where a slot is on the stack.
fn offset(slot: usize) -> i16 {
    abi::BUFFER + SLOT_BYTES * slot as i16
}

/// Writes a value that needs no other.
pub(super) fn make(asm: &mut Asm, layout: KeyLayout, given: Given, into: Reg) {
    match given {
        Given::Bytes { word, first, count } => {
            let size = match count {
                1 => Size::B,
                2 => Size::H,
                _ => Size::W,
            };
            // Words are in the CPU's own order, which is little-endian as the tables are.
            asm.load(size, into, Reg::FP, layout.word(word) + i16::from(first));
        }
        Given::Const(value) => match (i32::try_from(value), u32::try_from(value)) {
            (Ok(value), _) => asm.mov64(into, value),
            (_, Ok(value)) => asm.mov32(into, Operand::bits(value)),
            _ => asm.load_imm64(into, value),
        },
    }
}
