//! Sets of entries, interned: values of a field that the entries do not tell apart are one class.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A hasher for keys that are hashes already.
#[derive(Debug, Default)]
pub(super) struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.write_u64(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        if !rest.is_empty() {
            self.write_u64(u64::from_le_bytes(last));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0, value);
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u128(&mut self, value: u128) {
        self.write_u64(value as u64);
        self.write_u64((value >> 64) as u64);
    }
}

/// A map whose keys hash by one multiplication a word. Not for keys that an adversary would make collide at length:
/// what goes in is the compiler's own numbering.
pub(super) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<Same>>;

/// A hash and one more value as a hash.
pub(super) fn mix(hash: u64, value: u64) -> u64 {
    let wide = u128::from(hash ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
    (wide ^ (wide >> 64)) as u64
}

/// A set of numbers, as those words of a bit set that are not 0, ascending, each with its place.
pub(super) type Sparse = [(u32, u64)];

/// Distinct lists, numbered from 0 in the order they came.
#[derive(Clone, Debug)]
pub(super) struct Interned<T> {
    flat: Vec<T>,
    /// Where each list ends in `flat`.
    ends: Vec<u32>,
    /// By hash, the last list that has it.
    last: FastMap<u64, u32>,
    /// For each list, the one before it with the same hash.
    before: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl<T: Copy + PartialEq> Interned<T> {
    /// No lists.
    pub(super) fn new() -> Interned<T> {
        Interned { flat: Vec::new(), ends: Vec::new(), last: FastMap::default(), before: Vec::new() }
    }

    /// How many lists there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The list of a number.
    pub(super) fn get(&self, list: u32) -> &[T] {
        &self.flat[self.begin(list) as usize..self.ends[list as usize] as usize]
    }

    /// Where a list begins in [`Self::flat`].
    pub(super) fn begin(&self, list: u32) -> u32 {
        if list == 0 { 0 } else { self.ends[list as usize - 1] }
    }

    /// All of them, one after another.
    pub(super) fn flat(&self) -> &[T] {
        &self.flat
    }

    /// The same, and nothing else.
    pub(super) fn into_flat(self) -> Vec<T> {
        self.flat
    }

    /// All of them.
    pub(super) fn lists(&self) -> impl Iterator<Item = &[T]> {
        (0..self.len() as u32).map(|list| self.get(list))
    }

    /// The number of a list, whose hash is any function of it.
    pub(super) fn intern(&mut self, list: &[T], hash: u64) -> u32 {
        let number = self.len() as u32;
        let last = self.last.entry(hash).or_insert(NONE);
        let mut at = *last;
        while at != NONE {
            let begin = if at == 0 { 0 } else { self.ends[at as usize - 1] };
            if &self.flat[begin as usize..self.ends[at as usize] as usize] == list {
                return at;
            }
            at = self.before[at as usize];
        }
        self.before.push(std::mem::replace(last, number));
        self.push(list)
    }

    /// The number of a list that is known to be none of the others. Only if all come so, for it is not found again.
    fn push(&mut self, list: &[T]) -> u32 {
        self.flat.extend_from_slice(list);
        self.ends.push(self.flat.len() as u32);
        self.ends.len() as u32 - 1
    }
}

/// Distinct sets over numbers below `64 * words`, numbered from 0 in the order they came. Most have few numbers.
#[derive(Clone, Debug)]
pub(super) struct Sets {
    words: usize,
    sets: Interned<(u32, u64)>,
}

impl Sets {
    /// No sets, of numbers below `size`.
    pub(super) fn new(size: usize) -> Sets {
        Sets { words: size.div_ceil(64).max(1), sets: Interned::new() }
    }

    /// No sets, of the numbers that these are of.
    pub(super) fn none(&self) -> Sets {
        Sets { words: self.words, sets: Interned::new() }
    }

    /// Words of a bit set.
    pub(super) fn words(&self) -> usize {
        self.words
    }

    /// How many sets there are.
    pub(super) fn len(&self) -> usize {
        self.sets.len()
    }

    /// How many words all sets have together.
    pub(super) fn stored(&self) -> usize {
        self.sets.flat.len()
    }

    /// The set of a number.
    pub(super) fn get(&self, set: u32) -> &Sparse {
        self.sets.get(set)
    }

    /// The number of a set.
    pub(super) fn intern(&mut self, set: &Sparse) -> u32 {
        let hash = set.iter().fold(0u64, |hash, &(at, word)| {
            (hash.rotate_left(5) ^ word.rotate_left(at)).wrapping_mul(0xd6e8_feb8_6659_fd93)
        });
        self.sets.intern(set, hash)
    }

    /// The number of a set that is known to be none of the others. Only if all come so, for it is not found again.
    pub(super) fn push(&mut self, set: &Sparse) -> u32 {
        self.sets.push(set)
    }
}

/// A bit set's words that are not 0.
pub(super) fn sparse(set: &[u64]) -> impl Iterator<Item = (u32, u64)> {
    (0..).zip(set.iter().copied()).filter(|&(_, word)| word != 0)
}

/// The numbers in a set, ascending.
pub(super) fn numbers(set: &Sparse) -> impl Iterator<Item = usize> {
    set.iter().flat_map(|&(at, word)| numbers_of(at, word))
}

/// The numbers of the word at a place of a bit set, ascending.
pub(super) fn numbers_of(at: u32, word: u64) -> impl Iterator<Item = usize> {
    let bits = std::iter::successors(Some(word), |bits| Some(bits & bits.wrapping_sub(1)));
    bits.take_while(|&bits| bits != 0).map(move |bits| 64 * at as usize + bits.trailing_zeros() as usize)
}

/// The numbers that are in one of two sets alone.
pub(super) fn differing<'a>(a: &'a Sparse, b: &'a Sparse) -> impl Iterator<Item = (u32, u64)> + 'a {
    let (mut a, mut b) = (a, b);
    std::iter::from_fn(move || {
        loop {
            let found = match (a, b) {
                ([], []) => return None,
                ([first, rest @ ..], []) => {
                    a = rest;
                    *first
                }
                ([], [first, rest @ ..]) => {
                    b = rest;
                    *first
                }
                ([first, a_rest @ ..], [second, b_rest @ ..]) => {
                    let (in_a, in_b) = (first.0 <= second.0, second.0 <= first.0);
                    if in_a {
                        a = a_rest;
                    }
                    if in_b {
                        b = b_rest;
                    }
                    let word = if in_a { first.1 } else { 0 } ^ if in_b { second.1 } else { 0 };
                    (first.0.min(second.0), word)
                }
            };
            if found.1 != 0 {
                return Some(found);
            }
        }
    })
}

/// The smallest number in both sets.
pub(super) fn first_of_both(a: &[u64], b: &Sparse) -> Option<usize> {
    b.iter().find_map(|&(at, word)| {
        let both = a[at as usize] & word;
        (both != 0).then(|| 64 * at as usize + both.trailing_zeros() as usize)
    })
}

/// Adds a number to a set.
pub(super) fn insert(set: &mut [u64], number: usize) {
    set[number / 64] |= 1 << (number % 64);
}

/// Takes the numbers above `last` out of a set.
pub(super) fn cut_after(set: &mut [u64], last: usize) {
    let word = last / 64;
    set[word] &= u64::MAX >> (63 - last % 64);
    set[word + 1..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(set: &[u64]) -> Vec<(u32, u64)> {
        sparse(set).collect()
    }

    #[test]
    fn sets_are_numbered_once() {
        let mut sets = Sets::new(130);
        assert_eq!(sets.words(), 3);
        let mut a = vec![0; 3];
        insert(&mut a, 129);
        insert(&mut a, 3);
        assert_eq!(sets.intern(&of(&a)), 0);
        let mut b = a.clone();
        cut_after(&mut b, 3);
        assert_eq!(b, [8, 0, 0]);
        assert_eq!([sets.intern(&of(&b)), sets.intern(&of(&a)), sets.intern(&of(&b))], [1, 0, 1]);
        assert_eq!(first_of_both(&[0, 0, 2], sets.get(0)), Some(129));
        assert_eq!(first_of_both(&[0, 0, 2], sets.get(1)), None);
        assert_eq!(differing(sets.get(0), sets.get(1)).collect::<Vec<_>>(), [(2, 2)]);
        assert_eq!(differing(sets.get(1), sets.get(1)).count(), 0);
        assert_eq!(numbers(sets.get(0)).collect::<Vec<_>>(), [3, 129]);
        cut_after(&mut a, 129);
        assert_eq!(a, [8, 0, 2]);
        cut_after(&mut a, 128);
        assert_eq!(a, [8, 0, 0]);
    }
}
