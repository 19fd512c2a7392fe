//! Looks a column up: from the key's words to what a run of values stands for.
//!
//! Up to 63 bits are one number. A longer field (an IPv6 address) is searched word by word: the runs of the first word
//! stand for what is left to search, and the number searched next is that, followed by the next word.

use polc_ir::entities::Value;
use polc_ir::plan::AluKind;

use super::classes::FastMap;
use super::line::Line;
use super::problem::{Masked, Run};
use super::search::search;

/// Writes the search of a column whose values make these runs; a class stands for what `map` gives.
pub(super) fn look_up(line: &mut Line<'_>, field: Masked, runs: &[Run], map: &dyn Fn(u32) -> u64) -> Value {
    let runs = merged(runs.iter().map(|run| (run.start, map(run.class))));
    let words = field.slot.words;
    let mask = |index: u8| (field.mask >> (32 * u32::from(words - 1 - index))) as u32;
    let word = |line: &mut Line<'_>, index: u8| {
        let value = line.word(field.slot.word + index);
        // A word holds no bits above the field's own, so a mask of all of those changes nothing.
        let whole = u32::from(field.field_bits.saturating_sub(32 * (words - 1 - index)).min(32));
        let all = u64::from(u32::MAX) >> (32 - whole.max(1));
        if u64::from(mask(index)) == all { value } else { line.with(AluKind::And, value, mask(index).into()) }
    };
    if words == 1 {
        return search(line, &|line| word(line, 0), field.bits.into(), &narrow(&runs));
    }
    if words == 2 && field.bits <= 63 {
        let number = |line: &mut Line<'_>| {
            let high = word(line, 0);
            let high = line.with(AluKind::Shl, high, 32);
            let low = word(line, 1);
            line.alu(AluKind::Or, high, low)
        };
        return search(line, &number, field.bits.into(), &narrow(&runs));
    }
    let mut labels: Vec<Vec<(u128, u64)>> = vec![runs];
    let mut state: Option<Value> = None;
    for index in 0..words {
        let rest = 32 * u32::from(words - 1 - index);
        let last = rest == 0;
        let mut next: Vec<Vec<(u128, u64)>> = Vec::new();
        let mut known: FastMap<Vec<(u128, u64)>, u64> = FastMap::default();
        let mut numbers: Vec<(u64, u64)> = Vec::new();
        for (label, runs) in (0u64..).zip(&labels) {
            let mut label_of = |left: Vec<(u128, u64)>| -> u64 {
                if last {
                    return left[0].1;
                }
                *known.entry(left).or_insert_with_key(|left| {
                    next.push(left.clone());
                    next.len() as u64 - 1
                })
            };
            for (start, left) in by_word(runs, rest) {
                numbers.push((label << 32 | start, label_of(left)));
            }
        }
        let runs = merged(numbers.into_iter().map(|(start, value)| (start.into(), value)));
        let bits = 32 + u64::BITS - (labels.len() as u64 - 1).leading_zeros();
        let before = state;
        let number = |line: &mut Line<'_>| match before {
            None => word(line, index),
            Some(before) => {
                let high = line.with(AluKind::Shl, before, 32);
                let low = word(line, index);
                line.alu(AluKind::Or, high, low)
            }
        };
        let one = labels.len() == 1;
        let number: &dyn Fn(&mut Line<'_>) -> Value = if one { &|line| word(line, index) } else { &number };
        state = Some(search(line, number, bits, &narrow(&runs)));
        labels = next;
        if labels.is_empty() {
            break;
        }
    }
    state.expect("a field has words")
}

/// Runs over a word and `rest` bits below it, as runs over the word: from which word on, and what is left to search
/// there.
pub(super) fn by_word(runs: &[(u128, u64)], rest: u32) -> Vec<(u64, Vec<(u128, u64)>)> {
    let low = (1u128 << rest) - 1;
    // Words where a run begins, and those behind them if it begins within.
    let mut words: Vec<u128> = Vec::with_capacity(runs.len() + 1);
    for &(start, _) in runs {
        words.push(start >> rest);
        if start & low != 0 && start >> rest < u128::from(u32::MAX) {
            words.push((start >> rest) + 1);
        }
    }
    // The word behind one run's is pushed before the next run's own.
    words.sort_unstable();
    words.dedup();
    let mut found = Vec::with_capacity(words.len());
    let mut at = 0;
    for word in words {
        let begin = word << rest;
        while at + 1 < runs.len() && runs[at + 1].0 <= begin {
            at += 1;
        }
        let mut left = vec![(0, runs[at].1)];
        let within = runs[at + 1..].iter().take_while(|&&(start, _)| start >> rest == word);
        left.extend(within.map(|&(start, value)| (start - begin, value)));
        found.push((word as u64, left));
    }
    found
}

/// Runs without neighbours that stand for the same.
fn merged(runs: impl Iterator<Item = (u128, u64)>) -> Vec<(u128, u64)> {
    let mut merged: Vec<(u128, u64)> = Vec::new();
    for (start, value) in runs {
        if merged.last().is_none_or(|&(_, last)| last != value) {
            merged.push((start, value));
        }
    }
    merged
}

fn narrow(runs: &[(u128, u64)]) -> Vec<(u64, u64)> {
    runs.iter().map(|&(start, value)| (start as u64, value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_begin_within_one_word_are_one_label() {
        let at = |high: u128, low: u128| high << 32 | low;
        let runs = [(0, 1), (at(5, 7), 2), (at(5, 9), 3), (at(6, 0), 4), (at(8, 1), 5)];
        let found = by_word(&runs, 32);
        let expected = [
            (0, vec![(0, 1)]),
            (5, vec![(0, 1), (7, 2), (9, 3)]),
            (6, vec![(0, 4)]),
            (8, vec![(0, 4), (1, 5)]),
            (9, vec![(0, 5)]),
        ];
        assert_eq!(found, expected);
    }
}
