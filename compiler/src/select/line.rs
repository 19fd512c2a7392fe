//! Writes look-up steps: operations and tables, each made once.

use std::collections::HashMap;

use cranelift_entity::PrimaryMap;
use polc_ir::entities::{Data, Value};
use polc_ir::plan::{AluKind, DataTable, Op, Operand};

/// The tables of a plan. Equal tables are one.
#[derive(Debug, Default)]
pub(super) struct Tables {
    all: PrimaryMap<Data, DataTable>,
    known: HashMap<DataTable, Data>,
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

    /// The operations.
    pub(super) fn finish(self) -> PrimaryMap<Value, Op> {
        self.ops
    }

    /// A word of the key.
    pub(super) fn word(&mut self, word: u8) -> Value {
        self.ops.push(Op::Word(word))
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

    /// The element that begins at `offset` bytes of a table of these elements.
    pub(super) fn read(&mut self, table: DataTable, offset: Value) -> Value {
        let table = self.tables.add(table);
        self.ops.push(Op::Read(table, offset))
    }
}
