//! Looks a column up: from the key's words to what a run of values stands for.
//!
//! Up to 63 bits are one number. A longer field (an IPv6 address) is searched word by word: the runs of the first word
//! stand for what is left to search, and the number searched next is that, followed by the next word. Where what is left
//! is a host at most, its last 64 bits are compared.

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
    if field.slot.flag.is_some() {
        let flag = |line: &mut Line<'_>| {
            let word = line.word(field.slot.word);
            let flag = line.with(AluKind::And, word, field.slot.own().into());
            line.with(AluKind::Shr, flag, field.slot.shift().into())
        };
        return search(line, &flag, 1, &narrow(&runs));
    }
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
        if let Some(label) = state
            && words - index == 2
            && let Some(points) = labels.iter().map(|runs| Point::of(runs)).collect::<Option<Vec<_>>>()
        {
            let high = word(line, index);
            let high = line.with(AluKind::Shl, high, 32);
            let low = word(line, index + 1);
            let number = line.alu(AluKind::Or, high, low);
            return by_point(line, label, number, &points);
        }
        let rest = 32 * u32::from(words - 1 - index);
        // Where the number searched now is from, and what is left to search there.
        let mut parts: Vec<(u64, Vec<(u128, u64)>)> = Vec::new();
        for (label, runs) in (0u64..).zip(&labels) {
            by_word(runs, rest, |start, left| parts.push((label << 32 | start, left.to_vec())));
        }
        let is_last = parts.iter().all(|(_, left)| left.len() == 1);
        let mut next: Vec<Vec<(u128, u64)>> = Vec::new();
        let mut known: FastMap<Vec<(u128, u64)>, u64> = FastMap::default();
        let mut label_of = |left: Vec<(u128, u64)>| -> u64 {
            if is_last {
                return left[0].1;
            }
            *known.entry(left).or_insert_with_key(|left| {
                next.push(left.clone());
                next.len() as u64 - 1
            })
        };
        let runs = merged(parts.into_iter().map(|(number, left)| (number.into(), label_of(left))));
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
        let found = search(line, number, bits, &narrow(&runs));
        if is_last {
            return found;
        }
        state = Some(found);
        labels = next;
    }
    unreachable!("behind the last word nothing is left to search")
}

/// What a number of 64 bits stands for, if that is one thing but for one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    number: u64,
    there: u64,
    elsewhere: u64,
}

impl Point {
    fn of(runs: &[(u128, u64)]) -> Option<Point> {
        let point = |number: u128, there: u64, elsewhere: u64| {
            Some(Point { number: number as u64, there, elsewhere })
        };
        match *runs {
            [(_, value)] => point(0, value, value),
            [(_, first), (1, elsewhere)] => point(0, first, elsewhere),
            [(_, elsewhere), (start, last)] if start == u64::MAX.into() => point(start, last, elsewhere),
            [(_, elsewhere), (start, there), (behind, last)] if behind == start + 1 && last == elsewhere => {
                point(start, there, elsewhere)
            }
            _ => None,
        }
    }
}

/// Compares the number with that of the label's point.
fn by_point(line: &mut Line<'_>, label: Value, number: Value, points: &[Point]) -> Value {
    let numbers = points.iter().map(|point| point.number).max().unwrap_or(0);
    let numbers = line.table_of(points.len(), numbers, || points.iter().map(|point| point.number).collect());
    let values = points.iter().flat_map(|point| [point.there, point.elsewhere]);
    let largest = values.clone().max().unwrap_or(0);
    let values = line.table_of(2 * points.len(), largest, || values.collect());
    let point = line.index(numbers, label);
    // 1 if they differ: a number or its negative has the top bit set unless it is 0.
    let differs = line.alu(AluKind::Xor, number, point);
    let zero = line.constant(0);
    let negative = line.alu(AluKind::Sub, zero, differs);
    let differs = line.alu(AluKind::Or, differs, negative);
    let differs = line.with(AluKind::Shr, differs, 63);
    let twice = line.with(AluKind::Shl, label, 1);
    let place = line.alu(AluKind::Add, twice, differs);
    line.index(values, place)
}

/// Runs over a word and `rest` bits below it, as runs over the word: gives `each` from which word on, and what is left to
/// search there.
pub(super) fn by_word(runs: &[(u128, u64)], rest: u32, mut each: impl FnMut(u64, &[(u128, u64)])) {
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
    let mut left = Vec::new();
    let mut at = 0;
    for word in words {
        let begin = word << rest;
        while at + 1 < runs.len() && runs[at + 1].0 <= begin {
            at += 1;
        }
        left.clear();
        left.push((0, runs[at].1));
        let within = runs[at + 1..].iter().take_while(|&&(start, _)| start >> rest == word);
        left.extend(within.map(|&(start, value)| (start - begin, value)));
        each(word as u64, &left);
    }
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
    use polc_ir::field::Field;
    use polc_ir::plan::KeySlot;

    use super::super::line::Tables;
    use super::*;

    #[test]
    fn runs_that_begin_within_one_word_are_one_label() {
        let at = |high: u128, low: u128| high << 32 | low;
        let runs = [(0, 1), (at(5, 7), 2), (at(5, 9), 3), (at(6, 0), 4), (at(8, 1), 5)];
        let mut found = Vec::new();
        by_word(&runs, 32, |word, left| found.push((word, left.to_vec())));
        let expected = [
            (0, vec![(0, 1)]),
            (5, vec![(0, 1), (7, 2), (9, 3)]),
            (6, vec![(0, 4)]),
            (8, vec![(0, 4), (1, 5)]),
            (9, vec![(0, 5)]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_point_is_one_number_that_stands_for_something_else() {
        let point = |number, there, elsewhere| Some(Point { number, there, elsewhere });
        assert_eq!(Point::of(&[(0, 7)]), point(0, 7, 7));
        assert_eq!(Point::of(&[(0, 7), (1, 8)]), point(0, 7, 8));
        assert_eq!(Point::of(&[(0, 7), (5, 8), (6, 7)]), point(5, 8, 7));
        assert_eq!(Point::of(&[(0, 7), (u64::MAX.into(), 8)]), point(u64::MAX, 8, 7));
        assert_eq!(Point::of(&[(0, 7), (5, 8)]), None);
        assert_eq!(Point::of(&[(0, 7), (5, 8), (6, 9)]), None);
        assert_eq!(Point::of(&[(0, 7), (5, 8), (7, 7)]), None);
    }

    #[test]
    fn every_value_of_four_words_is_found() {
        let net = 0x2001_0db8u128 << 96;
        // Hosts, prefixes, several hosts of one prefix, ranges across words.
        let hosts: Vec<u128> =
            (1..40u128).map(|host| net | ((host * 0x9e37_79b9) << 64) | (host * 0xdead_beef)).collect();
        let prefixes: Vec<u128> = (1..40u128).map(|prefix| net | ((prefix * 0x0101_0101) << 64)).collect();
        let near: Vec<u128> = (1..40u128).map(|host| net | (5 << 64) | (host * 3)).collect();
        let far: Vec<u128> =
            (1..40u128).map(|host| host * 0x0123_4567_89ab_cdef_0011_2233_4455_6677).collect();
        for (points, length) in [(&hosts, 0), (&prefixes, 64), (&near, 0), (&far, 3), (&far, 100)] {
            let mut bounds: Vec<(u128, u32)> = vec![(0, 0)];
            for (class, &point) in (1..).zip(points.iter()) {
                bounds.push((point, class));
                bounds.push((point + (1 << length), 0));
            }
            bounds.sort_unstable();
            bounds.dedup_by_key(|bound| bound.0);
            let runs: Vec<Run> = bounds.iter().map(|&(start, class)| Run { start, class }).collect();
            let slot = KeySlot { field: Field::SrcAddr, word: 0, words: 4, flag: None };
            let field = Masked { slot, mask: u128::MAX, field_bits: 128, bits: 128 };
            let mut tables = Tables::new();
            let mut line = Line::new(&mut tables);
            let result = look_up(&mut line, field, &runs, &|class| u64::from(class) * 3);
            let step = line.step(result);
            let near =
                |start: u128| [start, start.wrapping_sub(1), start + 1, start ^ 1 << 64, start ^ 1 << 96];
            for value in bounds.iter().flat_map(|&(start, _)| near(start)).chain([0, u128::MAX]) {
                let key = [96, 64, 32, 0].map(|shift| (value >> shift) as u32);
                let class = runs[runs.partition_point(|run| run.start <= value) - 1].class;
                assert_eq!(step.eval(tables.all(), &key), u64::from(class) * 3, "{value:#x} {length}");
            }
        }
    }
}
