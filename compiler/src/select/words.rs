//! Ranges of a field's values as tests of key words.

use polc_ir::interval::Interval;
use polc_ir::plan::{KeySlot, WordTest};

/// A range of a field's masked values as alternatives of word tests.
pub(super) fn word_ranges(slot: KeySlot, mask: u128, range: Interval) -> Vec<Vec<WordTest>> {
    let words = usize::from(slot.words);
    let word = |value: u128, index: usize| (value >> (32 * (words - 1 - index))) as u32;
    let shift = slot.shift();
    let test = |index: usize, lo: u32, hi: u32| -> Option<WordTest> {
        let mask = word(mask, index);
        let word = slot.word + index as u8;
        // The whole word holds: nothing to ask.
        (lo != 0 || hi != mask).then_some(WordTest {
            word,
            mask: mask << shift,
            lo: lo << shift,
            hi: hi << shift,
        })
    };
    let (lo, hi) = (range.lo(), range.hi());
    let split = (0..words).find(|&index| word(lo, index) != word(hi, index));
    let equal = |until: usize, value: u128| -> Vec<WordTest> {
        (0..until).filter_map(|index| test(index, word(value, index), word(value, index))).collect()
    };
    let Some(split) = split else { return vec![equal(words, lo)] };
    let low_is_least = (split + 1..words).all(|index| word(lo, index) == 0);
    let high_is_most = (split + 1..words).all(|index| word(hi, index) == word(mask, index));
    let mut alternatives = Vec::new();
    let first = word(lo, split) + u32::from(!low_is_least);
    let last = word(hi, split) - u32::from(!high_is_most);
    if first <= last {
        let mut all = equal(split, lo);
        all.extend(test(split, first, last));
        alternatives.push(all);
    }
    if !low_is_least {
        // Equal to the lower bound so far, then above it at some word, or equal to its end.
        for above in split + 1..=words {
            let mut all = equal(above.min(words), lo);
            if above < words {
                if word(lo, above) == u32::MAX {
                    continue;
                }
                all.extend(test(above, word(lo, above) + 1, word(mask, above)));
            }
            alternatives.push(all);
        }
    }
    if !high_is_most {
        for below in split + 1..=words {
            let mut all = equal(below.min(words), hi);
            if below < words {
                let Some(last) = word(hi, below).checked_sub(1) else { continue };
                all.extend(test(below, 0, last));
            }
            alternatives.push(all);
        }
    }
    alternatives
}
