//! Look-up steps: a stage as a straight line of arithmetic and table reads that ends in the number of an exit.
//!
//! Every data structure that decides a stage (class tables, tries, searches, matrices) is written in these few
//! operations, so that one evaluator, one verifier and one emitter serve all of them. There are no jumps: the cost of
//! a packet is the length of the line, whatever the packet and however many entries. A read takes its offset modulo
//! the table's size, a power of two, so no value can lead out of a table.

use std::fmt;

use cranelift_entity::PrimaryMap;

use super::PlanExit;
use crate::entities::{Data, Stage, Value};
use crate::limits::{LOOKUP_OPS_MAX, OBJECT_DATA_BYTES_MAX};

/// A stage as operations over tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupStep {
    /// The stage it decides.
    pub stage: Stage,
    /// What the structure is, for people: `matrix 40 x 31`.
    pub structure: String,
    /// The operations, in order. An operation refers only to earlier ones.
    pub ops: PrimaryMap<Value, Op>,
    /// The value that is the index of the exit.
    pub result: Value,
    /// The exits.
    pub exits: Vec<PlanExit>,
    /// What the cost model expects it to take, in tenths of a nanosecond.
    pub modelled: u32,
}

/// A table: as many elements as a power of two, each of the same width, the CPU's own byte order being little-endian.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DataTable {
    /// Bytes of an element: 1, 2, 4 or 8.
    pub width: u8,
    /// The elements, little-endian; their bytes are a power of two, at least 8.
    pub bytes: Vec<u8>,
}

impl DataTable {
    /// A table of these elements, padded to a power of two with its last element, so that no reader sees a value that
    /// none of the elements has. The width is the least that holds all of them.
    pub fn new(elements: &[u64]) -> DataTable {
        DataTable::of(elements.iter().copied(), elements.iter().copied().max().unwrap_or(0))
    }

    /// The same, where it is known that no element is larger than `largest`.
    pub fn of(elements: impl ExactSizeIterator<Item = u64>, largest: u64) -> DataTable {
        let (width, bytes) = DataTable::size(elements.len(), largest);
        let mut bytes = vec![0; bytes];
        match width {
            1 => fill(&mut bytes, elements.map(|element| [element as u8])),
            2 => fill(&mut bytes, elements.map(|element| (element as u16).to_le_bytes())),
            4 => fill(&mut bytes, elements.map(|element| (element as u32).to_le_bytes())),
            _ => fill(&mut bytes, elements.map(u64::to_le_bytes)),
        }
        DataTable { width, bytes }
    }

    /// Bytes of an element, and of all, in a table of `count` elements of which `largest` is the largest.
    pub fn size(count: usize, largest: u64) -> (u8, usize) {
        let width = match largest {
            0..=0xff => 1u8,
            0x100..=0xffff => 2,
            0x1_0000..=0xffff_ffff => 4,
            _ => 8,
        };
        let count = count.next_power_of_two().max(8 / usize::from(width));
        (width, count * usize::from(width))
    }

    /// The bits of an offset that count: those of a whole element inside the table.
    pub fn mask(&self) -> u64 {
        (self.bytes.len() as u64 - 1) & !(u64::from(self.width) - 1)
    }

    /// What all elements have in common.
    pub fn known(&self) -> Known {
        let (max, bits) = match self.width {
            1 => summary(self.bytes.iter().copied()),
            2 => summary(self.bytes.as_chunks().0.iter().copied().map(u16::from_le_bytes)),
            4 => summary(self.bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes)),
            _ => summary(self.bytes.as_chunks().0.iter().copied().map(u64::from_le_bytes)),
        };
        Known { max, zeros: bits.trailing_zeros().min(63) }
    }

    /// The element at an offset in bytes, taken modulo the table's size and rounded down to an element.
    pub fn read(&self, offset: u64) -> u64 {
        let at = (offset & self.mask()) as usize;
        let mut value = [0; 8];
        value[..usize::from(self.width)].copy_from_slice(&self.bytes[at..at + usize::from(self.width)]);
        u64::from_le_bytes(value)
    }
}

/// The largest of some numbers, and the bits that any of them has: many at a time, since they stay as narrow as they are.
fn summary<T>(elements: impl Iterator<Item = T>) -> (u64, u64)
where
    T: Copy + Default + Ord + std::ops::BitOr<Output = T> + Into<u64>,
{
    let (max, bits) = elements
        .fold((T::default(), T::default()), |(max, bits), element| (element.max(max), bits | element));
    (max.into(), bits.into())
}

/// Fills a table's bytes with elements, and what is behind them with the last.
fn fill<const WIDTH: usize>(bytes: &mut [u8], elements: impl ExactSizeIterator<Item = [u8; WIDTH]>) {
    let (places, _) = bytes.as_chunks_mut::<WIDTH>();
    let (own, padding) = places.split_at_mut(elements.len());
    own.iter_mut().zip(elements).for_each(|(place, element)| *place = element);
    padding.fill(own.last().copied().unwrap_or([0; WIDTH]));
}

/// An operation on 64-bit values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A word of the key.
    Word(u8),
    /// A constant.
    Const(u64),
    /// Arithmetic, modulo 2^64.
    Alu(AluKind, Value, Operand),
    /// The element of a table at an offset in bytes.
    Read(Data, Value),
}

/// A second operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// A value.
    Value(Value),
    /// A constant below 2^31.
    Const(u32),
}

/// What arithmetic there is. Shifts take their distance modulo 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AluKind {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Bits in both.
    And,
    /// Bits in either.
    Or,
    /// Bits in one.
    Xor,
    /// Shift to the left.
    Shl,
    /// Shift to the right, zeros coming in.
    Shr,
    /// Shift to the right, the sign coming in.
    Sar,
}

impl AluKind {
    /// The result.
    pub fn apply(self, a: u64, b: u64) -> u64 {
        match self {
            AluKind::Add => a.wrapping_add(b),
            AluKind::Sub => a.wrapping_sub(b),
            AluKind::Mul => a.wrapping_mul(b),
            AluKind::And => a & b,
            AluKind::Or => a | b,
            AluKind::Xor => a ^ b,
            AluKind::Shl => a << (b & 63),
            AluKind::Shr => a >> (b & 63),
            AluKind::Sar => ((a as i64) >> (b & 63)) as u64,
        }
    }
}

/// What is known of a value without running anything: as much as the kernel's verifier works out
/// (kernel/bpf/verifier.c, `scalar_min_max_*`), so that a bound which follows from it need not be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// No value is larger.
    pub max: u64,
    /// So many low bits are 0.
    pub zeros: u32,
}

/// A value that needs no other: it is made where it is used instead of being kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// A constant.
    Const(u64),
    /// Bytes of a word of the key as one number: the first of them, 0 being the lowest of the word, and how many.
    Bytes {
        /// The word.
        word: u8,
        /// The first byte.
        first: u8,
        /// How many.
        count: u8,
    },
}

impl Given {
    /// Whether one instruction makes it.
    pub fn is_loaded(self) -> bool {
        !matches!(self, Given::Bytes { count: 3, .. })
    }
}

/// For each operation, what it gives if that needs no other value: shifts and masks that leave whole bytes of a word are
/// a load of these bytes.
pub fn given(ops: &PrimaryMap<Value, Op>) -> Vec<Option<Given>> {
    let mut all: Vec<Option<Given>> = Vec::with_capacity(ops.len());
    for op in ops.values() {
        all.push(match *op {
            Op::Word(word) => Some(Given::Bytes { word, first: 0, count: 4 }),
            Op::Const(value) => Some(Given::Const(value)),
            Op::Alu(kind, a, Operand::Const(b)) => match (all[a.as_u32() as usize], kind, b) {
                (Some(Given::Bytes { word, first, count }), AluKind::Shr, by)
                    if by % 8 == 0 && by / 8 < count.into() =>
                {
                    let by = (by / 8) as u8;
                    Some(Given::Bytes { word, first: first + by, count: count - by })
                }
                (Some(Given::Bytes { word, first, count }), AluKind::And, 0xff | 0xffff) => {
                    let kept = if b == 0xff { 1 } else { 2 };
                    Some(Given::Bytes { word, first, count: count.min(kept) })
                }
                _ => None,
            },
            Op::Alu(..) | Op::Read(..) => None,
        });
    }
    all
}

impl LookupStep {
    /// The index of the exit that a key leads to.
    pub fn eval(&self, tables: &PrimaryMap<Data, DataTable>, key: &[u32]) -> u64 {
        let mut values: Vec<u64> = Vec::with_capacity(self.ops.len());
        let at = |values: &[u64], value: Value| values[value.as_u32() as usize];
        for op in self.ops.values() {
            let value = match *op {
                Op::Word(word) => u64::from(key[usize::from(word)]),
                Op::Const(value) => value,
                Op::Alu(kind, a, Operand::Value(b)) => kind.apply(at(&values, a), at(&values, b)),
                Op::Alu(kind, a, Operand::Const(b)) => kind.apply(at(&values, a), b.into()),
                Op::Read(table, offset) => tables[table].read(at(&values, offset)),
            };
            values.push(value);
        }
        at(&values, self.result)
    }

    /// What is known of every value by those who don't look into tables.
    pub fn known(&self, tables: &PrimaryMap<Data, DataTable>) -> Vec<Known> {
        self.known_by(&|table| Known { max: u64::MAX >> (64 - 8 * u32::from(tables[table].width)), zeros: 0 })
    }

    /// What is known of every value, by what the elements of a table are.
    pub fn known_by(&self, element: &dyn Fn(Data) -> Known) -> Vec<Known> {
        let mut all: Vec<Known> = Vec::with_capacity(self.ops.len());
        for op in self.ops.values() {
            let known = match *op {
                Op::Word(_) => Known { max: u32::MAX.into(), zeros: 0 },
                Op::Const(value) => Known { max: value, zeros: value.trailing_zeros().min(63) },
                Op::Read(table, _) => element(table),
                Op::Alu(kind, a, b) => {
                    let a = all[a.as_u32() as usize];
                    let (b, constant) = match b {
                        Operand::Value(b) => (all[b.as_u32() as usize], None),
                        Operand::Const(b) => {
                            (Known { max: b.into(), zeros: b.trailing_zeros().min(63) }, Some(b))
                        }
                    };
                    let any = Known { max: u64::MAX, zeros: 0 };
                    match (kind, constant) {
                        (AluKind::Add, _) => a
                            .max
                            .checked_add(b.max)
                            .map_or(any, |max| Known { max, zeros: a.zeros.min(b.zeros) }),
                        (AluKind::Mul, Some(_)) => a
                            .max
                            .checked_mul(b.max)
                            .map_or(any, |max| Known { max, zeros: (a.zeros + b.zeros).min(63) }),
                        (AluKind::And, Some(_)) => {
                            Known { max: a.max.min(b.max), zeros: a.zeros.max(b.zeros) }
                        }
                        (AluKind::Shl, Some(by)) if by < 64 && a.max <= u64::MAX >> by => {
                            Known { max: a.max << by, zeros: (a.zeros + by).min(63) }
                        }
                        (AluKind::Shr, Some(by)) if by < 64 => {
                            Known { max: a.max >> by, zeros: a.zeros.saturating_sub(by) }
                        }
                        _ => any,
                    }
                }
            };
            all.push(known);
        }
        all
    }

    /// Most values that are needed at one time.
    pub fn pressure(&self) -> usize {
        let last = self.last_uses();
        let (mut live, mut most) = (0usize, 0);
        let mut ends = vec![0usize; self.ops.len()];
        for &use_at in &last {
            ends[use_at] += 1;
        }
        for &end in &ends {
            live += 1;
            most = most.max(live);
            live -= end;
        }
        most
    }

    /// For each value, the operation that uses it last; its own number if none does. The result is used at the end.
    pub fn last_uses(&self) -> Vec<usize> {
        let mut last: Vec<usize> = (0..self.ops.len()).collect();
        for (at, op) in self.ops.iter() {
            let at = at.as_u32() as usize;
            for operand in op.operands() {
                last[operand.as_u32() as usize] = at;
            }
        }
        last[self.result.as_u32() as usize] = self.ops.len() - 1;
        last
    }

    /// Everything wrong with the step's shape; `name` is what to call it.
    pub fn verify(&self, name: &str, tables: &PrimaryMap<Data, DataTable>, words: usize) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.ops.len() > LOOKUP_OPS_MAX {
            wrong.push(format!("{name} has {} operations", self.ops.len()));
        }
        for (at, op) in self.ops.iter() {
            if op.operands().any(|operand| operand >= at) {
                wrong.push(format!("{name}: {at} uses a later value"));
                return wrong;
            }
            match *op {
                Op::Word(word) if usize::from(word) >= words => {
                    wrong.push(format!("{name}: {at} reads word {word}, which the key does not have"));
                }
                Op::Read(table, _) if table.as_u32() as usize >= tables.len() => {
                    wrong.push(format!("{name}: {at} reads {table}, which does not exist"));
                    return wrong;
                }
                Op::Alu(_, _, Operand::Const(value)) if value > i32::MAX as u32 => {
                    wrong.push(format!("{name}: {at} has a constant of more than 31 bits"));
                }
                _ => {}
            }
        }
        if self.result.as_u32() as usize >= self.ops.len() {
            wrong.push(format!("{name} has no result"));
            return wrong;
        }
        if self.pressure() > PRESSURE_MAX {
            wrong.push(format!("{name} needs {} values at one time", self.pressure()));
        }
        if self.exits.is_empty() {
            wrong.push(format!("{name} has no exits"));
        }
        wrong
    }
}

/// Values that may be needed at one time: what room there is in registers and on the stack.
pub const PRESSURE_MAX: usize = 13;

impl DataTable {
    /// Everything wrong with the table's shape.
    pub fn verify(&self, name: Data) -> Vec<String> {
        let mut wrong = Vec::new();
        if !matches!(self.width, 1 | 2 | 4 | 8) {
            wrong.push(format!("{name} has elements of {} bytes", self.width));
        }
        let bytes = self.bytes.len();
        if !bytes.is_power_of_two() || !(8..=OBJECT_DATA_BYTES_MAX).contains(&bytes) {
            wrong.push(format!("{name} has {bytes} bytes"));
        }
        wrong
    }
}

impl Op {
    /// The values it uses.
    pub fn operands(&self) -> impl Iterator<Item = Value> {
        let pair = match *self {
            Op::Word(_) | Op::Const(_) => [None, None],
            Op::Alu(_, a, Operand::Value(b)) => [Some(a), Some(b)],
            Op::Alu(_, a, Operand::Const(_)) | Op::Read(_, a) => [Some(a), None],
        };
        pair.into_iter().flatten()
    }
}

/// Prints as `w3`, `0x10`, `v1 + v2`, `data0[v3]`.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Word(word) => write!(f, "w{word}"),
            Op::Const(value) => write!(f, "{value:#x}"),
            Op::Alu(kind, a, b) => {
                let sign = match kind {
                    AluKind::Add => "+",
                    AluKind::Sub => "-",
                    AluKind::Mul => "*",
                    AluKind::And => "&",
                    AluKind::Or => "|",
                    AluKind::Xor => "^",
                    AluKind::Shl => "<<",
                    AluKind::Shr => ">>",
                    AluKind::Sar => ">>>",
                };
                match b {
                    Operand::Value(b) => write!(f, "{a} {sign} {b}"),
                    Operand::Const(b) => write!(f, "{a} {sign} {b:#x}"),
                }
            }
            Op::Read(table, offset) => write!(f, "{table}[{offset}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(ops: &[Op]) -> LookupStep {
        LookupStep {
            stage: Stage::from_u32(0),
            structure: String::new(),
            ops: ops.iter().copied().collect(),
            result: Value::from_u32(ops.len() as u32 - 1),
            exits: vec![PlanExit::End(0)],
            modelled: 0,
        }
    }

    #[test]
    fn tables_pad_with_their_last_element_and_never_lead_out() {
        let table = DataTable::new(&[1, 2, 300]);
        assert_eq!((table.width, table.bytes.len()), (2, 8));
        assert_eq!([0, 2, 4, 6, 8, 9, u64::MAX].map(|at| table.read(at)), [1, 2, 300, 300, 1, 1, 300]);
        assert_eq!(DataTable::new(&[]).bytes.len(), 8);
        assert_eq!(DataTable::new(&[u64::MAX]).width, 8);
    }

    #[test]
    fn a_step_has_as_many_operations_as_its_bound_says() {
        let wrong = |ops: usize| step(&vec![Op::Word(0); ops]).verify("step0", &PrimaryMap::new(), 1);
        assert_eq!(wrong(LOOKUP_OPS_MAX), Vec::<String>::new());
        assert_eq!(wrong(LOOKUP_OPS_MAX + 1), ["step0 has 4097 operations"]);
    }

    #[test]
    fn values_are_within_what_is_known_of_them() {
        let v = Value::from_u32;
        let mut tables = PrimaryMap::new();
        let table = tables.push(DataTable::new(&[7, 9]));
        let step = step(&[
            Op::Word(0),
            Op::Alu(AluKind::Shr, v(0), Operand::Const(24)),
            Op::Alu(AluKind::Shl, v(1), Operand::Const(2)),
            Op::Read(table, v(2)),
            Op::Alu(AluKind::Mul, v(3), Operand::Const(12)),
            Op::Alu(AluKind::Add, v(4), Operand::Value(v(2))),
            Op::Alu(AluKind::Sub, v(5), Operand::Value(v(0))),
            Op::Alu(AluKind::And, v(6), Operand::Const(0xf0)),
        ]);
        assert_eq!(step.verify("step0", &tables, 1), Vec::<String>::new());
        let known = step.known(&tables);
        assert_eq!(known[2], Known { max: 255 << 2, zeros: 2 });
        assert_eq!(known[4], Known { max: 255 * 12, zeros: 2 });
        assert_eq!(known[6].max, u64::MAX);
        assert_eq!(known[7], Known { max: 0xf0, zeros: 4 });
        for word in [0, 1, 0x0100_0000, 0xdead_beef, u32::MAX] {
            let result = step.eval(&tables, &[word]);
            assert!(result <= 0xf0 && result & 15 == 0);
        }
    }

    #[test]
    fn whole_bytes_of_a_word_are_given() {
        let v = Value::from_u32;
        let mut tables = PrimaryMap::new();
        let table = tables.push(DataTable::new(&[4, 12]));
        let step = step(&[
            Op::Word(2),
            Op::Alu(AluKind::Shr, v(0), Operand::Const(8)),
            Op::Alu(AluKind::And, v(1), Operand::Const(0xff)),
            Op::Alu(AluKind::Shr, v(0), Operand::Const(16)),
            Op::Alu(AluKind::Shr, v(0), Operand::Const(7)),
            Op::Alu(AluKind::And, v(0), Operand::Const(0x7f)),
            Op::Read(table, v(2)),
        ]);
        let bytes = |first, count| Some(Given::Bytes { word: 2, first, count });
        let found = given(&step.ops);
        assert_eq!(found, [bytes(0, 4), bytes(1, 3), bytes(1, 1), bytes(2, 2), None, None, None]);
        let loaded: Vec<bool> = found.iter().flatten().map(|given| given.is_loaded()).collect();
        assert_eq!(loaded, [true, false, true, true]);
        // Who looks into the table knows more of its elements.
        assert_eq!(step.known(&tables)[6], Known { max: 0xff, zeros: 0 });
        assert_eq!(step.known_by(&|table| tables[table].known())[6], Known { max: 12, zeros: 2 });
    }

    #[test]
    fn what_is_malformed_is_named() {
        let v = Value::from_u32;
        let tables = PrimaryMap::new();
        let later = step(&[Op::Alu(AluKind::Add, v(0), Operand::Const(1))]);
        assert_eq!(later.verify("s", &tables, 1), ["s: v0 uses a later value"]);
        assert_eq!(
            step(&[Op::Word(3)]).verify("s", &tables, 3),
            ["s: v0 reads word 3, which the key does not have"]
        );
        let missing = step(&[Op::Word(0), Op::Read(Data::from_u32(0), v(0))]);
        assert_eq!(missing.verify("s", &tables, 1), ["s: v1 reads data0, which does not exist"]);
        let mut wide: Vec<Op> = (0..14).map(Op::Word).collect();
        for at in 0..13 {
            wide.push(Op::Alu(AluKind::Add, v(at), Operand::Value(v(at + 1))));
        }
        assert_eq!(step(&wide).verify("s", &tables, 14), ["s needs 15 values at one time"]);
    }
}
