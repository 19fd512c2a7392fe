//! Writes look-up steps: operations and tables, each made once.

use std::hash::{Hash, Hasher};

use cranelift_entity::PrimaryMap;
use cranelift_entity::packed_option::ReservedValue;
use polc_ir::entities::{Data, Value};
use polc_ir::plan::{AluKind, DataTable, Op, Operand};

use super::classes::{FastMap, Same};

/// Bytes of an element of a table, and of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Of an element.
    pub(super) width: u8,
    /// Of all.
    pub(super) bytes: usize,
}

/// The sizes of tables.
pub(super) type Sizes = PrimaryMap<Data, Size>;

/// Bytes of a table that are hashed at once, and how often.
const SAMPLE: usize = 64;
const SAMPLES: usize = 64;

/// The tables of a plan. Equal tables are one.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Their contents; empty where only sizes count.
    all: PrimaryMap<Data, DataTable>,
    sizes: Sizes,
    /// By hash, the tables that have it; none where only sizes count.
    known: Option<FastMap<u64, Vec<Data>>>,
    /// Whether small tables are worth more than quick ones.
    frugal: bool,
}

impl Tables {
    /// No tables yet, to be filled.
    pub(super) fn new() -> Tables {
        Tables { known: Some(FastMap::default()), ..Tables::sketch() }
    }

    /// The same, for a look-up that hardly a packet needs.
    pub(super) fn frugal() -> Tables {
        Tables { frugal: true, ..Tables::new() }
    }

    /// No tables yet, of which only the sizes will be asked.
    pub(super) fn sketch() -> Tables {
        Tables::default()
    }

    fn add(&mut self, table: DataTable) -> Data {
        let size = Size { width: table.width, bytes: table.bytes.len() };
        let Some(known) = &mut self.known else { return self.sizes.push(size) };
        let same = known.entry(hash(&table)).or_default();
        if let Some(&data) = same.iter().find(|&&data| self.all[data] == table) {
            return data;
        }
        let data = self.all.push(table);
        self.sizes.push(size);
        same.push(data);
        data
    }

    /// All of them.
    #[cfg(test)]
    pub(super) fn all(&self) -> &PrimaryMap<Data, DataTable> {
        &self.all
    }

    /// The sizes of all of them.
    pub(super) fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// All of them, for the plan.
    pub(super) fn finish(self) -> PrimaryMap<Data, DataTable> {
        self.all
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> usize {
        self.sizes.values().map(|size| size.bytes).sum()
    }

    /// Takes the tables over that operations read.
    pub(super) fn adopt(&mut self, own: Tables, ops: &mut PrimaryMap<Value, Op>) {
        let number: Vec<Data> = own.all.into_iter().map(|(_, table)| self.add(table)).collect();
        for op in ops.values_mut() {
            if let Op::Read(table, _) = op {
                *table = number[table.as_u32() as usize];
            }
        }
    }
}

/// A hash of a table's size and of some of its bytes: few tables are alike in these and in nothing else.
fn hash(table: &DataTable) -> u64 {
    let mut hasher = Same::default();
    (table.width, table.bytes.len()).hash(&mut hasher);
    let apart = (table.bytes.len() / SAMPLES).next_multiple_of(SAMPLE).max(SAMPLE);
    table.bytes.chunks(SAMPLE).step_by(apart / SAMPLE).for_each(|sample| hasher.write(sample));
    hasher.finish()
}

/// A line of operations being written.
#[derive(Debug)]
pub(super) struct Line<'a> {
    ops: PrimaryMap<Value, Op>,
    tables: &'a mut Tables,
}

impl<'a> Line<'a> {
    /// An empty line, whose tables are added to `tables`.
    pub(super) fn new(tables: &'a mut Tables) -> Line<'a> {
        Line { ops: PrimaryMap::new(), tables }
    }

    /// The step that gives `result`, on its own.
    #[cfg(test)]
    pub(super) fn step(self, result: Value) -> polc_ir::plan::LookupStep {
        let (ops, result) = self.finish(result);
        polc_ir::plan::LookupStep {
            stage: polc_ir::entities::Stage::from_u32(0),
            structure: String::new(),
            ops,
            result,
            exits: vec![polc_ir::plan::PlanExit::End(0)],
            modelled: 0,
        }
    }

    /// The operations that `result` is made of, and its number among them.
    pub(super) fn finish(self, result: Value) -> (PrimaryMap<Value, Op>, Value) {
        let mut used = vec![false; self.ops.len()];
        used[result.as_u32() as usize] = true;
        for (value, op) in self.ops.iter().rev() {
            if used[value.as_u32() as usize] {
                op.operands().for_each(|operand| used[operand.as_u32() as usize] = true);
            }
        }
        let mut kept: PrimaryMap<Value, Op> = PrimaryMap::new();
        let mut number: Vec<Value> = Vec::with_capacity(self.ops.len());
        for (value, op) in self.ops.iter() {
            let new = |old: Value| number[old.as_u32() as usize];
            let op = match *op {
                _ if !used[value.as_u32() as usize] => {
                    number.push(Value::reserved_value());
                    continue;
                }
                Op::Alu(kind, a, Operand::Value(b)) => Op::Alu(kind, new(a), Operand::Value(new(b))),
                Op::Alu(kind, a, b) => Op::Alu(kind, new(a), b),
                Op::Read(table, offset) => Op::Read(table, new(offset)),
                given => given,
            };
            number.push(kept.push(op));
        }
        (kept, number[result.as_u32() as usize])
    }

    /// A word of the key.
    pub(super) fn word(&mut self, word: u8) -> Value {
        self.ops.push(Op::Word(word))
    }

    /// `count` bits of a value of `total` bits, from bit `from` on, times 2^`scale`. They are taken from what the value
    /// was made of, where it was put together of other bits.
    pub(super) fn bits(&mut self, value: Value, from: u32, count: u32, scale: u32, total: u32) -> Value {
        let (mut value, mut from, mut total) = (value, from, total);
        loop {
            let wanted = ((1u64 << count) - 1) << from;
            (value, from, total) = match self.ops[value] {
                Op::Alu(AluKind::Shr, inner, Operand::Const(by)) => (inner, from + by, total + by),
                Op::Alu(AluKind::And, inner, Operand::Const(mask)) if wanted & !u64::from(mask) == 0 => {
                    (inner, from, u64::BITS)
                }
                Op::Alu(AluKind::Or, high, Operand::Value(low)) => match (self.ops[high], self.ops[low]) {
                    (Op::Alu(AluKind::Shl, _, Operand::Const(32)), Op::Word(_)) if from + count <= 32 => {
                        (low, from, 32)
                    }
                    (Op::Alu(AluKind::Shl, high, Operand::Const(32)), Op::Word(_)) if from >= 32 => {
                        (high, from - 32, total - 32)
                    }
                    _ => break,
                },
                _ => break,
            };
        }
        // Whole bytes of a word are loaded as they are.
        if matches!(self.ops[value], Op::Word(_)) && from % 8 == 0 && matches!(count, 8 | 16) {
            let bytes = self.with(AluKind::Shr, value, from.into());
            let bytes = self.with(AluKind::And, bytes, (1 << count) - 1);
            return self.with(AluKind::Shl, bytes, scale.into());
        }
        let shifted = if from >= scale {
            self.with(AluKind::Shr, value, (from - scale).into())
        } else {
            self.with(AluKind::Shl, value, (scale - from).into())
        };
        if scale == 0 && from + count >= total {
            shifted
        } else {
            self.with(AluKind::And, shifted, ((1u64 << count) - 1) << scale)
        }
    }

    /// A constant.
    pub(super) fn constant(&mut self, value: u64) -> Value {
        self.ops.push(Op::Const(value))
    }

    /// Arithmetic on two values.
    pub(super) fn alu(&mut self, kind: AluKind, a: Value, b: Value) -> Value {
        self.ops.push(Op::Alu(kind, a, Operand::Value(b)))
    }

    /// Arithmetic with a constant; what changes nothing is left out.
    pub(super) fn with(&mut self, kind: AluKind, a: Value, b: u64) -> Value {
        let neutral = match kind {
            AluKind::Add
            | AluKind::Sub
            | AluKind::Or
            | AluKind::Xor
            | AluKind::Shl
            | AluKind::Shr
            | AluKind::Sar => b == 0,
            AluKind::Mul => b == 1,
            AluKind::And => b == u64::MAX,
        };
        if neutral {
            return a;
        }
        if b <= i32::MAX as u64 {
            return self.ops.push(Op::Alu(kind, a, Operand::Const(b as u32)));
        }
        let b = self.constant(b);
        self.alu(kind, a, b)
    }

    /// `value` where the top bit of `difference` is set, otherwise 0. Nothing is masked: a constant that masks "all ones
    /// or nothing" makes the kernel's verifier follow either on its own (kernel/bpf/verifier.c, `maybe_fork_scalars`),
    /// and twenty of them a million states.
    pub(super) fn where_negative(&mut self, difference: Value, value: u64) -> Value {
        let (sign, magnitude) = match (value as i64) < 0 {
            true => (AluKind::Sar, value.wrapping_neg()),
            false => (AluKind::Shr, value),
        };
        let sign = self.with(sign, difference, 63);
        match magnitude.is_power_of_two() {
            true => self.with(AluKind::Shl, sign, magnitude.trailing_zeros().into()),
            false => self.with(AluKind::Mul, sign, magnitude),
        }
    }

    /// The smaller of two values below 2^63.
    pub(super) fn min(&mut self, a: Value, b: Value) -> Value {
        // b + (a - b if that is negative)
        let less = self.alu(AluKind::Sub, a, b);
        let sign = self.with(AluKind::Sar, less, 63);
        let less = self.alu(AluKind::And, less, sign);
        self.alu(AluKind::Add, less, b)
    }

    /// A table to read.
    pub(super) fn table(&mut self, table: DataTable) -> Data {
        self.tables.add(table)
    }

    /// A table of `count` elements of which `largest` is the largest, made only if its contents count.
    pub(super) fn table_of(
        &mut self,
        count: usize,
        largest: u64,
        elements: impl FnOnce() -> Vec<u64>,
    ) -> Data {
        if self.is_sketch() {
            let (width, bytes) = DataTable::size(count, largest);
            return self.tables.sizes.push(Size { width, bytes });
        }
        self.tables.add(DataTable::new(&elements()))
    }

    /// Whether small tables are worth more than quick ones.
    pub(super) fn is_frugal(&self) -> bool {
        self.tables.frugal
    }

    /// Whether only the sizes of tables count.
    fn is_sketch(&self) -> bool {
        self.tables.known.is_none()
    }

    /// Bytes of a table's elements.
    pub(super) fn width(&self, table: Data) -> u64 {
        self.tables.sizes[table].width.into()
    }

    /// The element that begins at `offset` bytes of a table.
    pub(super) fn read(&mut self, table: Data, offset: Value) -> Value {
        self.ops.push(Op::Read(table, offset))
    }

    /// The element of this index.
    pub(super) fn index(&mut self, table: Data, index: Value) -> Value {
        let shift = self.width(table).trailing_zeros();
        let offset = self.with(AluKind::Shl, index, shift.into());
        self.read(table, offset)
    }
}
