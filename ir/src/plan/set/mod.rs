//! Set tables: a large set as cells in buckets, so that a packet finds out in a few loads that wait for nothing.
//!
//! An element is a number under a prefix in each dimension ([`Pattern`]). Six neighbouring prefix lengths of one
//! dimension, the *cell dimension*, make a *level*: the part of the number before them, and the numbers of the other
//! dimensions, are a *key*; what the next five bits say is a *cell*, one 64-bit word with a bit for each of the 63
//! prefixes that the five bits and their beginnings are. So a host costs one key, 32 neighbours cost no more, and one
//! load answers for six prefix lengths. The bits that cover a packet lie on a path through the cell, which is in a
//! table; the highest of them is the longest prefix.
//!
//! ```text
//! words  0..32   the path of each of the 32 values of five bits
//! word   32      which levels have cells
//! word   33      how many patterns there are
//! words  512..   groups of buckets of four slots; a slot is a key, its cell and, where elements may be `nomatch`, a
//!                second cell that says which of them are
//! ```
//!
//! A hash chooses a group, and in it two buckets; a key lies in one of them. Groups are built by several threads without
//! waiting for each other. A group is a few pages of memory: the more, the closer to the average chance fills each, and
//! the less room there is for nothing; but one stays in a CPU's own cache while it is built. Keys are made of 32-bit halves, the cell dimension's last half
//! first: its low five bits are 0 before a cell, and hold the level's number, from 1, so that a key's first word is
//! never 0 and a slot whose first word is 0 has no key.
//!
//! **A running program sees every change whole.** An element is one bit of a word, once its key is there. A key is
//! written into a slot that no program can have read a key from, its first word last ([`change`]).

mod build;
pub mod change;

use std::ops::Range;
use std::panic::resume_unwind;
use std::thread::available_parallelism;

use serde::{Deserialize, Serialize};

pub use build::{Shaped, build, shape};

use crate::hook::Family;
use crate::set::{DIMENSIONS_MAX, DimensionKind, Pattern, SetContents, SetData, patterns_of};

/// Bits of a number that a cell tells apart.
pub const CELL_BITS: u8 = 5;
/// Prefix lengths that a level has: from before the cell's bits to behind them.
const LENGTHS: u8 = CELL_BITS + 1;
/// Slots of a bucket.
pub const SLOTS: usize = 4;
/// Words of a page.
const PAGE_WORDS: usize = 512;
/// Words before the groups.
pub const HEADER_WORDS: usize = PAGE_WORDS;
/// The word that has a bit for each level with cells.
pub const USED_WORD: usize = 32;
/// The word that counts patterns.
pub const COUNT_WORD: usize = 33;
/// What hashing multiplies by.
pub const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
/// Words of the largest key: two IPv6 addresses and a port.
pub const KEY_WORDS: usize = 5;

/// The words of a table, wherever they are.
pub trait Words {
    /// A word.
    fn word(&self, at: usize) -> u64;
}

impl Words for [u64] {
    fn word(&self, at: usize) -> u64 {
        self[at]
    }
}

/// All that code depends on: two tables of one shape are read by the same instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SetShape {
    /// Bits of the number in each dimension; 0 for dimensions that the set does not have.
    pub widths: [u8; DIMENSIONS_MAX],
    /// Which dimension is the cell dimension.
    pub cell: u8,
    /// The levels in the order of look-up: how many bits of each number are in the key. In the cell dimension the cell's
    /// follow.
    pub levels: Vec<[u8; DIMENSIONS_MAX]>,
    /// Slots have a second cell, for `nomatch`.
    pub nomatch: bool,
    /// Levels may be without cells, as word 32 says, and are skipped then.
    pub live: bool,
    /// How many groups of buckets there are.
    pub groups: u32,
    /// Pages of a group, of 4,096 bytes: a power of two.
    pub group_pages: u32,
}

/// A table and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetTable {
    /// Its shape.
    pub shape: SetShape,
    /// Its words.
    pub words: Vec<u64>,
    /// What building it put in.
    pub contents: Contents,
}

/// Patterns, told apart from others without keeping them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// How many.
    pub count: u64,
    /// The sum of their hashes.
    pub digest: u64,
}

impl Contents {
    /// Counts other patterns in.
    fn join(&mut self, other: Contents) {
        self.count += other.count;
        self.digest = self.digest.wrapping_add(other.digest);
    }

    /// Counts a pattern in.
    pub fn add(&mut self, pattern: &Pattern) {
        self.count += 1;
        let mut hash = u64::from(pattern.nomatch);
        let parts = pattern.values.iter().zip(pattern.lengths);
        let words = parts.flat_map(|(value, length)| [*value as u64, (*value >> 64) as u64, length.into()]);
        // Most words of most patterns are 0; each place multiplies by another number.
        for (place, word) in words.enumerate().filter(|(_, word)| *word != 0) {
            hash = (hash ^ word).wrapping_mul(MULTIPLIER + 2 * place as u64);
            hash ^= hash >> 32;
        }
        self.digest = self.digest.wrapping_add(hash);
    }
}

/// Threads that work on a table, and groups that each has at least.
const THREADS_MAX: usize = 8;
const GROUPS_MIN: usize = 16;

/// Consecutive parts of `0..count`, of `least` at least: one for each CPU, so it must not matter how many there are.
fn parts(count: usize, least: usize) -> Vec<Range<usize>> {
    let cpus = available_parallelism().map_or(1, |cpus| cpus.get());
    let parts = cpus.min(THREADS_MAX).min(count / least).max(1);
    (0..parts).map(|at| at * count / parts..(at + 1) * count / parts).collect()
}

/// What is made of each, on threads of their own.
fn on_threads<P: Send, T: Send>(all: Vec<P>, make: impl Fn(P) -> T + Sync) -> Vec<T> {
    if all.len() == 1 {
        return all.into_iter().map(make).collect();
    }
    let make = &make;
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.into_iter().map(|one| scope.spawn(move || make(one))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// What is made of consecutive parts of `0..count`.
fn in_parts<T: Send>(count: usize, least: usize, make: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    on_threads(parts(count, least), make)
}

/// A 32-bit piece of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half {
    /// Of which dimension's number.
    pub dimension: u8,
    /// Which 32 bits of it, from the least significant.
    pub index: u8,
}

/// A packet's or pattern's key in one level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The words. Those beyond the shape's are 0.
    pub words: [u64; KEY_WORDS],
    /// The five bits behind it.
    pub bits: u8,
}

/// The path to the five bits `bits` in a cell: a bit for each prefix that covers them. Prefix `1` followed by the
/// beginning of the bits, as a number, is its place.
pub const fn path(bits: u8) -> u64 {
    let mut path = 0;
    let mut cut = 0;
    while cut <= CELL_BITS {
        path |= 1 << ((1 << CELL_BITS | bits) >> cut);
        cut += 1;
    }
    path
}

/// Where the level begins that a prefix length belongs to. Levels are the same for every set of a width, counted from
/// the longest prefix.
pub fn level_start(width: u8, length: u8) -> u8 {
    let top = width - CELL_BITS;
    top.saturating_sub(top.saturating_sub(length).div_ceil(LENGTHS) * LENGTHS)
}

impl SetShape {
    /// The pieces of a key in order.
    pub fn halves(&self) -> Vec<Half> {
        let cell = usize::from(self.cell);
        let others = (0..DIMENSIONS_MAX).filter(|at| *at != cell);
        let mut halves = Vec::new();
        for at in std::iter::once(cell).chain(others) {
            let count = self.widths[at].div_ceil(32);
            halves.extend((0..count).map(|index| Half { dimension: at as u8, index }));
        }
        halves
    }

    /// Words of a key.
    pub fn key_words(&self) -> usize {
        self.widths.iter().map(|width| usize::from(width.div_ceil(32))).sum::<usize>().div_ceil(2)
    }

    /// Words of a slot.
    pub fn slot_words(&self) -> usize {
        self.key_words() + 1 + usize::from(self.nomatch)
    }

    /// Words of the table.
    pub fn words(&self) -> usize {
        HEADER_WORDS + self.groups as usize * self.group_words()
    }

    /// Words from a group to the next.
    pub fn group_words(&self) -> usize {
        self.group_pages as usize * PAGE_WORDS
    }

    /// Buckets of a group.
    pub fn group_buckets(&self) -> usize {
        self.group_words() / self.bucket_words()
    }

    /// How many cells there is room for.
    pub fn slots_count(&self) -> usize {
        self.groups as usize * self.group_buckets() * SLOTS
    }

    /// Words of a bucket.
    pub fn bucket_words(&self) -> usize {
        SLOTS * self.slot_words()
    }

    /// The bits of a dimension's number that are in a level's key.
    pub fn mask(&self, level: usize, dimension: usize) -> u128 {
        let (width, length) = (self.widths[dimension], self.levels[level][dimension]);
        if length == 0 { 0 } else { u128::MAX >> (128 - length) << (width - length) }
    }

    /// The key of numbers in a level.
    pub fn key(&self, level: usize, numbers: &[u128; DIMENSIONS_MAX]) -> Key {
        let mut key = Key { words: [0; KEY_WORDS], bits: 0 };
        let cell = usize::from(self.cell);
        let behind = self.widths[cell] - self.levels[level][cell] - CELL_BITS;
        key.bits = (numbers[cell] >> behind) as u8 & ((1 << CELL_BITS) - 1);
        if self.widths.iter().enumerate().all(|(at, width)| at == cell || *width == 0) {
            // Most sets have one dimension.
            let number = numbers[cell] & self.mask(level, cell);
            key.words[0] = number as u64 | (level as u64 + 1);
            key.words[1] = (number >> 64) as u64;
            return key;
        }
        let mut at = 0;
        for dimension in std::iter::once(cell).chain((0..DIMENSIONS_MAX).filter(|at| *at != cell)) {
            let number = numbers[dimension] & self.mask(level, dimension);
            for index in 0..self.widths[dimension].div_ceil(32) {
                key.words[at / 2] |= u64::from((number >> (32 * index)) as u32) << (at % 2 * 32);
                at += 1;
            }
        }
        key.words[0] |= level as u64 + 1;
        key
    }

    /// The two buckets that a key may be in, by their first words.
    pub fn places(&self, key: &[u64]) -> [usize; 2] {
        let mut hash = 0u64;
        for word in &key[..self.key_words()] {
            hash = (hash ^ word).wrapping_mul(MULTIPLIER);
            hash ^= hash >> 32;
        }
        hash = hash.wrapping_mul(MULTIPLIER);
        let group = ((hash >> 32) * u64::from(self.groups)) >> 32;
        let first = HEADER_WORDS + group as usize * self.group_words();
        let place = |bits: u64| {
            let bucket = ((bits & 0xffff) * self.group_buckets() as u64) >> 16;
            first + bucket as usize * self.bucket_words()
        };
        [place(hash >> 16), place(hash)]
    }

    /// The slots of buckets.
    fn slots(&self, buckets: impl IntoIterator<Item = usize>) -> impl Iterator<Item = usize> {
        let words = self.slot_words();
        buckets.into_iter().flat_map(move |first| (first..).step_by(words).take(SLOTS))
    }

    /// The buckets of groups.
    fn buckets(&self, groups: Range<usize>) -> impl Iterator<Item = usize> {
        let (all, words, group_words) = (self.group_buckets(), self.bucket_words(), self.group_words());
        groups.flat_map(move |group| (HEADER_WORDS + group * group_words..).step_by(words).take(all))
    }

    /// The slot that has a key.
    pub fn find(&self, words: &(impl Words + ?Sized), key: &Key) -> Option<usize> {
        self.slots(self.places(&key.words)).find(|slot| self.has(words, *slot, key))
    }

    fn has(&self, words: &(impl Words + ?Sized), slot: usize, key: &Key) -> bool {
        (0..self.key_words()).all(|at| words.word(slot + at) == key.words[at])
    }

    /// Whether the patterns cover numbers: `None` if none does, `Some(true)` if the one that decides is `nomatch`.
    pub fn covers(&self, words: &(impl Words + ?Sized), numbers: &[u128; DIMENSIONS_MAX]) -> Option<bool> {
        for level in 0..self.levels.len() {
            if self.live && words.word(USED_WORD) >> level & 1 == 0 {
                continue;
            }
            let key = self.key(level, numbers);
            let Some(slot) = self.find(words, &key) else { continue };
            let cell = slot + self.key_words();
            let found = words.word(cell) & words.word(key.bits.into());
            if found == 0 {
                continue;
            }
            // The highest bit found is in one of the two numbers, and makes it the larger.
            let nomatch = if self.nomatch { words.word(cell + 1) & found } else { 0 };
            return Some(nomatch > found ^ nomatch);
        }
        None
    }

    /// Where a pattern is: its level, its key there, and its bit in the cell. `None` if there is no such level.
    pub fn locate(&self, pattern: &Pattern) -> Option<(usize, Key, u32)> {
        let cell = usize::from(self.cell);
        let (width, length) = (self.widths[cell], pattern.lengths[cell]);
        let mut lengths = pattern.lengths;
        lengths[cell] = level_start(width, length);
        let level = self.levels.iter().position(|level| *level == lengths)?;
        let beyond = length - lengths[cell];
        let beginning = (pattern.values[cell] >> (width - length)) as u32 & ((1 << beyond) - 1);
        Some((level, self.key(level, &pattern.values), 1 << beyond | beginning))
    }

    /// Gives every pattern in a table.
    pub fn decode(&self, words: &(impl Words + ?Sized), give: &mut impl FnMut(Pattern)) {
        self.decode_groups(words, 0..self.groups as usize, give);
    }

    /// Gives every pattern in groups of a table.
    fn decode_groups(
        &self,
        words: &(impl Words + ?Sized),
        groups: Range<usize>,
        give: &mut impl FnMut(Pattern),
    ) {
        let (count, cell, halves) = (self.key_words(), usize::from(self.cell), self.halves());
        for slot in self.slots(self.buckets(groups)) {
            let first = words.word(slot);
            let mut bits = words.word(slot + count);
            if first == 0 || bits == 0 {
                continue;
            }
            let level = (first & 31) as usize - 1;
            let mut values = [0; DIMENSIONS_MAX];
            for (at, half) in halves.iter().enumerate() {
                let word = words.word(slot + at / 2) & if at == 0 { !31 } else { !0 };
                let piece = u128::from((word >> (at % 2 * 32)) as u32);
                values[usize::from(half.dimension)] |= piece << (32 * half.index);
            }
            let nomatch = if self.nomatch { words.word(slot + count + 1) } else { 0 };
            while bits != 0 {
                let place = bits.trailing_zeros();
                bits &= bits - 1;
                let beyond = place.ilog2() as u8;
                let mut pattern = Pattern { values, lengths: self.levels[level], nomatch: false };
                pattern.lengths[cell] += beyond;
                let shift = self.widths[cell] - pattern.lengths[cell];
                pattern.values[cell] |= u128::from(place ^ 1 << beyond) << shift;
                pattern.nomatch = nomatch >> place & 1 == 1;
                give(pattern);
            }
        }
    }

    /// Everything wrong with the shape.
    pub fn verify(&self, name: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        let cell = usize::from(self.cell);
        if self.widths.get(cell).is_none_or(|width| *width < CELL_BITS) {
            return vec![format!("{name} has no cell dimension")];
        }
        if self.levels.is_empty() || self.levels.len() > crate::limits::SET_LEVELS_MAX {
            wrong.push(format!("{name} has {} levels", self.levels.len()));
        }
        for level in &self.levels {
            let fits = level.iter().zip(self.widths).all(|(length, width)| *length <= width);
            if !fits || level[cell] > self.widths[cell] - CELL_BITS {
                wrong.push(format!("{name} has a level of more bits than its numbers have"));
            }
        }
        if self.groups == 0 || self.slots_count() > crate::limits::SET_CELLS_MAX {
            wrong.push(format!("{name} has {} groups of buckets", self.groups));
        }
        wrong
    }
}

impl SetTable {
    /// A pattern that only one of the table and the set's elements has, if there is any. All are compared.
    pub fn difference(&self, data: &SetData, family: Family) -> Option<Pattern> {
        let SetContents::Elements(elements) = &data.contents else { return None };
        let name = |pattern: &Pattern| (pattern.values, pattern.lengths);
        let (mut wanted, mut has) = (Vec::new(), Vec::new());
        patterns_of(data, family, elements, 0..elements.len(), &mut |pattern| wanted.push(pattern));
        self.shape.decode(self.words.as_slice(), &mut |pattern| has.push(pattern));
        // Of equal ones the first counts.
        wanted.sort_by_key(name);
        wanted.dedup_by_key(|pattern| name(pattern));
        has.sort_unstable_by_key(name);
        let differs = wanted.iter().zip(&has).find(|(wanted, has)| wanted != has);
        let differs = differs.map(|(wanted, has)| wanted.min(has));
        let more = || wanted.get(has.len()).or(has.get(wanted.len()));
        differs.or_else(more).copied()
    }

    /// The table's bytes, as programs read them.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 * self.words.len());
        self.words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// Everything wrong with the table: its shape, its header, or that what can be read back from it is not what was
    /// put in.
    pub fn verify(&self, name: &str) -> Vec<String> {
        let mut wrong = self.shape.verify(name);
        if !wrong.is_empty() {
            return wrong;
        }
        if self.words.len() != self.shape.words() {
            return vec![format!("{name} has {} words instead of {}", self.words.len(), self.shape.words())];
        }
        if (0..1 << CELL_BITS).any(|bits| self.words[usize::from(bits)] != path(bits)) {
            wrong.push(format!("{name} has wrong paths"));
        }
        let parts = in_parts(self.shape.groups as usize, GROUPS_MIN, |groups| {
            let mut found = Contents::default();
            self.shape.decode_groups(self.words.as_slice(), groups, &mut |pattern| found.add(&pattern));
            found
        });
        let mut found = Contents::default();
        parts.into_iter().for_each(|part| found.join(part));
        if found != self.contents || self.words[COUNT_WORD] != found.count {
            wrong.push(format!("{name} does not hold the elements that were put in"));
        }
        wrong
    }
}

/// The dimension whose neighbours share cells: the last with prefixes, else the last with addresses, else the last.
pub fn cell_dimension(data: &SetData) -> usize {
    let last = |kind: DimensionKind| data.dimensions.iter().rposition(|have| *have == kind);
    last(DimensionKind::Net)
        .or_else(|| last(DimensionKind::Address))
        .unwrap_or(data.dimensions.len().saturating_sub(1))
}

/// The prefix lengths that a level of a live set starts at although no element has them yet.
fn live_starts(data: &SetData, family: Family) -> Vec<u8> {
    let width = crate::set::widths(data, family)[cell_dimension(data)];
    let prefixes = data.dimensions.contains(&DimensionKind::Net);
    let mut starts: Vec<u8> =
        if prefixes { (0..=width).collect() } else { vec![data.netmask.unwrap_or(width)] };
    starts.iter_mut().for_each(|length| *length = level_start(width, *length));
    starts.dedup();
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_one_level() {
        for width in [24, 32, 48, 128] {
            for length in 0..=width {
                let start = level_start(width, length);
                assert!(start <= length && length <= start + CELL_BITS && start + CELL_BITS <= width);
            }
        }
        assert_eq!(
            [32, 27, 26, 24, 3, 2, 0].map(|length| level_start(32, length)),
            [27, 27, 21, 21, 3, 0, 0]
        );
    }

    #[test]
    fn paths_are_the_prefixes_of_five_bits() {
        for bits in 0..32 {
            let path = path(bits);
            assert_eq!(path.count_ones(), 6);
            assert_eq!(63 - path.leading_zeros(), 32 + u32::from(bits));
            assert_eq!(path & 3, 2);
        }
    }
}
