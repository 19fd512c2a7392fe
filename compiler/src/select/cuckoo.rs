//! A table of two hash functions: a key is in one of two buckets of two elements, so that a packet reads two cache
//! lines, neither waiting for the other.
//!
//! An element is a key and what it stands for, in one word. What no key stands for is 0.

use polc_ir::entities::Value;
use polc_ir::plan::{AluKind, DataTable};

use super::line::Line;

/// Elements of a bucket.
const BUCKET: usize = 2;

/// Of a hundred elements, so many may be taken.
const LOAD_MAX: usize = 85;

/// Elements moved to make room for one, before other hash functions are tried.
const MOVES_MAX: usize = 500;

/// Pairs of hash functions tried for a size.
const TRIES: usize = 4;

/// Sizes tried, each twice the one before.
const SIZES: usize = 4;

/// An element that no key is.
const FREE: u64 = u64::MAX;

/// A filled table.
#[derive(Debug)]
pub(super) struct Cuckoo {
    elements: Vec<u64>,
    /// Buckets, as bits.
    bits: u32,
    factors: [u64; 2],
    value_bits: u32,
}

impl Cuckoo {
    /// Elements that a table of so many keys begins with.
    pub(super) fn elements(keys: usize) -> usize {
        (keys * 100 / LOAD_MAX + 1).next_power_of_two().max(2 * BUCKET)
    }

    /// Fills a table. A key is below 2^(63 - `value_bits`), a value below 2^`value_bits`. `None` if no table takes the
    /// keys.
    pub(super) fn new(items: &[(u64, u64)], value_bits: u32) -> Option<Cuckoo> {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            // Numbers as good as random, the same every time (xorshift).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for size in 0..SIZES {
            let count = Cuckoo::elements(items.len()) << size;
            let bits = (count / BUCKET).trailing_zeros();
            for _ in 0..TRIES {
                let mut table = Cuckoo {
                    elements: vec![FREE; count],
                    bits,
                    factors: [next() | 1, next() | 1],
                    value_bits,
                };
                if items.iter().all(|&(key, value)| table.insert(key << value_bits | value, &mut next)) {
                    return Some(table);
                }
            }
        }
        None
    }

    /// The first elements of a key's buckets.
    fn buckets(&self, key: u64) -> [usize; 2] {
        self.factors.map(|factor| BUCKET * (key.wrapping_mul(factor) >> (64 - self.bits)) as usize)
    }

    fn insert(&mut self, element: u64, next: &mut impl FnMut() -> u64) -> bool {
        let mut element = element;
        for _ in 0..MOVES_MAX {
            let [one, other] = self.buckets(element >> self.value_bits);
            let places = [one, other, one + 1, other + 1];
            if let Some(&free) = places.iter().find(|&&place| self.elements[place] == FREE) {
                self.elements[free] = element;
                return true;
            }
            let place = places[(next() >> 62) as usize];
            element = std::mem::replace(&mut self.elements[place], element);
        }
        false
    }

    /// Writes the look-up of a key.
    pub(super) fn write(&self, line: &mut Line<'_>, key: Value) -> Value {
        let table = line.table(DataTable::new(&self.elements));
        let mut found: Option<Value> = None;
        for factor in self.factors {
            let hash = line.with(AluKind::Mul, key, factor);
            let hash = line.with(AluKind::Shr, hash, (64 - self.bits).into());
            let offset = line.with(AluKind::Shl, hash, 4);
            for place in 0..BUCKET as u64 {
                let offset = line.with(AluKind::Add, offset, 8 * place);
                let element = line.read(table, offset);
                // All ones if the keys are equal: only 0 less 1 is negative.
                let other = line.with(AluKind::Shr, element, self.value_bits.into());
                let other = line.alu(AluKind::Xor, other, key);
                let equal = line.with(AluKind::Sub, other, 1);
                let equal = line.with(AluKind::Sar, equal, 63);
                let mine = line.alu(AluKind::And, element, equal);
                found = Some(match found {
                    None => mine,
                    Some(found) => line.alu(AluKind::Or, found, mine),
                });
            }
        }
        let found = found.expect("there are buckets");
        let keep = u64::from(64 - self.value_bits);
        if self.value_bits < 32 {
            line.with(AluKind::And, found, (1 << self.value_bits) - 1)
        } else {
            let found = line.with(AluKind::Shl, found, keep);
            line.with(AluKind::Shr, found, keep)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::Tables;
    use super::*;

    #[test]
    fn keys_are_found_and_others_are_not() {
        for (count, factor) in [(1u64, 1u64), (7, 5), (1000, 0x1_0001), (20_000, 3)] {
            let items: Vec<(u64, u64)> = (0..count).map(|at| (at * factor, at + 1)).collect();
            let mut tables = Tables::new();
            let mut line = Line::new(&mut tables);
            let word = line.word(0);
            let result = Cuckoo::new(&items, 16).expect("they fit").write(&mut line, word);
            let step = line.step(result);
            for key in 0..(count * factor + 10).min(70_000) {
                let expected = if key % factor == 0 && key / factor < count { key / factor + 1 } else { 0 };
                assert_eq!(step.eval(tables.all(), &[key as u32]), expected, "{count} {key}");
            }
        }
    }
}
