//! Writes look-up steps: operations and tables, each made once.

use cranelift_entity::PrimaryMap;
use cranelift_entity::packed_option::ReservedValue;
use polc_ir::entities::{Data, Value};
use polc_ir::plan::{AluKind, DataTable, Op, Operand};

use super::classes::FastMap;

/// The tables of a plan. Equal tables are one.
#[derive(Debug, Default)]
pub(super) struct Tables {
    all: PrimaryMap<Data, DataTable>,
    known: FastMap<DataTable, Data>,
}

impl Tables {
    fn add(&mut self, table: DataTable) -> Data {
        if let Some(&known) = self.known.get(&table) {
            return known;
        }
        let data = self.all.push(table.clone());
        self.known.insert(table, data);
        data
    }

    /// All of them.
    pub(super) fn all(&self) -> &PrimaryMap<Data, DataTable> {
        &self.all
    }

    /// All of them, for the plan.
    pub(super) fn finish(self) -> PrimaryMap<Data, DataTable> {
        self.all
    }

    /// How many there are, to come back to with [`Tables::truncate`].
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Forgets all but the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        if len == self.all.len() {
            return;
        }
        let all = std::mem::take(&mut self.all);
        for (data, table) in all {
            if (data.as_u32() as usize) < len {
                self.all.push(table);
            } else {
                self.known.remove(&table);
            }
        }
    }
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

    /// `count` bits of a value of `total` bits, from bit `from` on, times 2^`scale`.
    pub(super) fn bits(&mut self, value: Value, from: u32, count: u32, scale: u32, total: u32) -> Value {
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

    /// Bytes of a table's elements.
    pub(super) fn width(&self, table: Data) -> u64 {
        self.tables.all[table].width.into()
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
