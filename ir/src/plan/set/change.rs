//! Changes of a table that programs are reading: as stores of single words, in an order that none of them shows half a
//! change.
//!
//! A program that decides a packet compares a slot's key, then reads its cell. So a key never changes under it: a slot
//! whose key was taken out stays unused until every run that may have read the key has ended ([`Store::Wait`]). Slots
//! that never had a key need no such wait, and a table has many; only where both buckets of a key have none left does a
//! change wait, or move another key.
//!
//! Cells are written before keys, and the first word of a key last. Where the CPU may show stores in another order
//! (all but x86-64), whoever makes the stores waits between them and the last.

use super::{COUNT_WORD, Key, SetShape, USED_WORD, Words};
use crate::set::Pattern;

/// One step of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Write a word, in one piece.
    Word {
        /// Which.
        at: usize,
        /// What.
        value: u64,
    },
    /// What comes next makes a key visible: all before has to be visible by then.
    Publish,
    /// Wait until every program run that has begun has ended.
    Wait,
}

/// Why a table can't be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The pattern is in it already.
    Present,
    /// It is not in it.
    Absent,
    /// There is no place left for its key.
    Full,
    /// Nothing looks for prefixes of its length.
    NoLevel,
}

/// The stores that add a pattern. With `exist` one that is there takes the pattern's `nomatch`.
///
/// # Errors
/// [`Refusal`]; never [`Refusal::Absent`].
pub fn add(
    shape: &SetShape,
    words: &(impl Words + ?Sized),
    pattern: &Pattern,
    exist: bool,
) -> Result<Vec<Store>, Refusal> {
    let (level, key, bit) = shape.locate(pattern).ok_or(Refusal::NoLevel)?;
    if pattern.nomatch && !shape.nomatch {
        return Err(Refusal::NoLevel);
    }
    let mut stores = Vec::new();
    let used = words.word(USED_WORD);
    if used >> level & 1 == 0 {
        stores.push(Store::Word { at: USED_WORD, value: used | 1 << level });
    }
    let count = Store::Word { at: COUNT_WORD, value: words.word(COUNT_WORD) + 1 };
    let second = |slot: usize| slot + shape.key_words() + 1;
    if let Some(slot) = shape.find(words, &key) {
        let cell = slot + shape.key_words();
        let (have, nomatch) = (words.word(cell), if shape.nomatch { words.word(second(slot)) } else { 0 });
        let wanted = nomatch & !(1 << bit) | u64::from(pattern.nomatch) << bit;
        if have >> bit & 1 == 1 && !exist {
            return Err(Refusal::Present);
        }
        if wanted != nomatch {
            stores.push(Store::Word { at: second(slot), value: wanted });
            stores.push(Store::Publish);
        }
        if have >> bit & 1 == 0 {
            stores.extend([Store::Word { at: cell, value: have | 1 << bit }, count]);
        }
        return Ok(stores);
    }
    let slot = free(shape, words, &key, &mut stores).ok_or(Refusal::Full)?;
    let mut contents = key.words[..shape.key_words()].to_vec();
    contents.push(1 << bit);
    if shape.nomatch {
        contents.push(u64::from(pattern.nomatch) << bit);
    }
    fill(slot, &contents, &mut stores);
    stores.push(count);
    Ok(stores)
}

/// The stores that take a pattern out.
///
/// # Errors
/// [`Refusal::Absent`].
pub fn remove(
    shape: &SetShape,
    words: &(impl Words + ?Sized),
    pattern: &Pattern,
) -> Result<Vec<Store>, Refusal> {
    let (_, key, bit) = shape.locate(pattern).ok_or(Refusal::Absent)?;
    // The key stays, with an empty cell, until another needs the slot. There may be two of it if a move ended early: the
    // second is read once the first is gone.
    let cells = shape.slots(shape.places(&key.words)).filter(|slot| shape.has(words, *slot, &key));
    let cells = cells.map(|slot| slot + shape.key_words());
    let mut stores: Vec<Store> = cells
        .filter(|cell| words.word(*cell) >> bit & 1 == 1)
        .map(|cell| Store::Word { at: cell, value: words.word(cell) & !(1 << bit) })
        .collect();
    if stores.is_empty() {
        return Err(Refusal::Absent);
    }
    // The second first: what is read changes last, and at once.
    stores.reverse();
    stores.push(Store::Word { at: COUNT_WORD, value: words.word(COUNT_WORD).saturating_sub(1) });
    Ok(stores)
}

/// Whether a pattern is in the table, and if so whether it is `nomatch`.
pub fn test(shape: &SetShape, words: &(impl Words + ?Sized), pattern: &Pattern) -> Option<bool> {
    let (_, key, bit) = shape.locate(pattern)?;
    let cell = shape.find(words, &key)? + shape.key_words();
    let present = words.word(cell) >> bit & 1 == 1;
    present.then(|| shape.nomatch && words.word(cell + 1) >> bit & 1 == 1)
}

/// Writes a slot's words, the first last.
fn fill(slot: usize, contents: &[u64], stores: &mut Vec<Store>) {
    for (at, &value) in contents.iter().enumerate().skip(1) {
        stores.push(Store::Word { at: slot + at, value });
    }
    stores.push(Store::Publish);
    stores.push(Store::Word { at: slot, value: contents[0] });
}

/// A slot for a key that no program reads, and the stores that make it so. `None` if the table is full there.
fn free(
    shape: &SetShape,
    words: &(impl Words + ?Sized),
    key: &Key,
    stores: &mut Vec<Store>,
) -> Option<usize> {
    let places = shape.places(&key.words);
    if let Some(slot) = shape.slots(places).find(|slot| words.word(*slot) == 0) {
        return Some(slot);
    }
    let retired = |slot: &usize| words.word(slot + shape.key_words()) == 0;
    let clear = |slot: usize, stores: &mut Vec<Store>| {
        stores.extend([Store::Word { at: slot, value: 0 }, Store::Wait]);
    };
    if let Some(slot) = shape.slots(places).find(retired) {
        clear(slot, stores);
        return Some(slot);
    }
    // A key that can go to its other bucket: it is in both until no run looks for it in the first.
    for slot in shape.slots(places) {
        let other: Vec<u64> = (0..shape.slot_words()).map(|at| words.word(slot + at)).collect();
        let mut moved = [0; super::KEY_WORDS];
        moved[..shape.key_words()].copy_from_slice(&other[..shape.key_words()]);
        let to = shape.slots(shape.places(&moved)).find(|to| *to != slot && words.word(*to) == 0);
        if let Some(to) = to {
            fill(to, &other, stores);
            stores.push(Store::Wait);
            clear(slot, stores);
            return Some(slot);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::HEADER_WORDS;
    use super::super::{SLOTS, build, shape};
    use super::*;
    use crate::hook::Family;
    use crate::interval::Interval;
    use crate::set::{DimensionKind, DimensionValue, Element, SetContents, SetData, patterns};
    use std::collections::BTreeMap;

    fn data(dimensions: &[DimensionKind], elements: Vec<Element>, live: bool) -> SetData {
        SetData {
            name: "s".into(),
            family: Some(Family::V4),
            dimensions: dimensions.to_vec(),
            netmask: None,
            mark_mask: u32::MAX,
            elements_max: 65_536,
            expires: false,
            changed: false,
            fixed: None,
            live,
            contents: SetContents::Elements(elements.into()),
            create: String::new(),
            span: crate::source::Span::new(crate::source::File::from_u32(0), 0, 0),
        }
    }

    fn number(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state >> 33
    }

    /// A program reads at any moment: between any two stores each of its answers must be the one before or after.
    #[test]
    fn a_change_is_seen_whole() {
        let set = data(&[DimensionKind::Net], Vec::new(), true);
        let mut shape = shape(&set, Family::V4).unwrap();
        // One small group, so that keys move and slots are used again.
        (shape.groups, shape.group_pages) = (1, 1);
        let mut words = build(&set, Family::V4, &shape).words;
        let mut have: BTreeMap<Pattern, bool> = BTreeMap::new();
        let (mut state, mut full, mut waits) = (1, 0, 0);
        for _ in 0..3_000 {
            let length = [16, 20, 24, 28, 32][number(&mut state) as usize % 5];
            let value = u128::from(
                (number(&mut state) as u32 % 512).wrapping_mul(0x0203_0507) & (u32::MAX << (32 - length)),
            );
            let nomatch = number(&mut state).is_multiple_of(4);
            let pattern = Pattern { values: [value, 0, 0], lengths: [length, 0, 0], nomatch };
            let name = Pattern { nomatch: false, ..pattern };
            let result = if number(&mut state).is_multiple_of(2) {
                let result = add(&shape, words.as_slice(), &pattern, false);
                assert_eq!(result == Err(Refusal::Present), have.contains_key(&name));
                if result.is_ok() {
                    have.insert(name, nomatch);
                }
                result
            } else {
                let result = remove(&shape, words.as_slice(), &pattern);
                assert_eq!(result.is_ok(), have.remove(&name).is_some());
                result
            };
            full += usize::from(result == Err(Refusal::Full));
            let Ok(stores) = result else { continue };
            let asked: Vec<[u128; 3]> =
                (0..512).step_by(7).map(|at: u128| [(at * 0x0203_0507) & 0xffff_ffff, 0, 0]).collect();
            let answers = |words: &[u64]| -> Vec<_> {
                asked.iter().map(|numbers| shape.covers(words, numbers)).collect()
            };
            let before = answers(&words);
            let mut seen = Vec::new();
            for store in stores {
                match store {
                    Store::Word { at, value } => words[at] = value,
                    Store::Wait => waits += 1,
                    Store::Publish => {}
                }
                seen.push(answers(&words));
            }
            let after = answers(&words);
            for seen in seen {
                assert!((0..asked.len()).all(|at| seen[at] == before[at] || seen[at] == after[at]));
            }
            let mut left = Vec::new();
            shape.decode(words.as_slice(), &mut |it| {
                left.push((Pattern { nomatch: false, ..it }, it.nomatch))
            });
            left.sort_unstable();
            assert_eq!(left, have.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>());
            assert_eq!(words[COUNT_WORD], have.len() as u64);
        }
        assert!(full > 0 && waits > 0, "{full} {waits}");
    }

    /// Tables say what elements looked at one after another say, whatever their prefixes.
    #[test]
    fn tables_cover_what_elements_cover() {
        let mut state = 7;
        for (live, nomatch) in [(false, false), (false, true), (true, true)] {
            let mut elements = Vec::new();
            for _ in 0..3_000 {
                let length = number(&mut state) as u32 % 33;
                let value = (number(&mut state) as u32 ^ (number(&mut state) as u32) << 8) & 0x3f0f_ff7f;
                let host = u32::MAX.checked_shr(length).unwrap_or(0);
                let range = Interval::new((value & !host).into(), (value | host).into()).unwrap();
                let nomatch = nomatch && number(&mut state).is_multiple_of(3);
                elements.push((
                    length,
                    Element { values: [DimensionValue::Address(range)].into_iter().collect(), nomatch },
                ));
            }
            elements.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
            let mut seen = std::collections::BTreeSet::new();
            elements.retain(|(_, element)| match element.values[0] {
                DimensionValue::Address(range) => seen.insert((range.lo(), range.hi())),
                _ => false,
            });
            let elements: Vec<Element> = elements.into_iter().map(|(_, element)| element).collect();
            let set = data(&[DimensionKind::Net], elements.clone(), live);
            let shape = shape(&set, Family::V4).unwrap();
            let mut table = build(&set, Family::V4, &shape);
            assert_eq!(table.verify("t"), Vec::<String>::new());
            assert_eq!(table.difference(&set, Family::V4), None);
            let cell = (HEADER_WORDS..table.words.len()).rev().find(|at| table.words[*at] != 0).unwrap();
            let lost = std::mem::take(&mut table.words[cell]);
            assert!(table.difference(&set, Family::V4).is_some(), "{lost:x}");
            table.words[cell] = lost;
            let mut all = Vec::new();
            for element in &elements {
                patterns(&set, Family::V4, element, &mut |pattern| all.push(pattern));
            }
            for pattern in all.iter().step_by(7) {
                let bits = u32::from(32 - pattern.lengths[0]);
                let (lo, hi) = (pattern.values[0], pattern.values[0] | ((1u128 << bits) - 1));
                for at in [lo.wrapping_sub(1) & 0xffff_ffff, lo, (lo + hi) / 2, hi, (hi + 1) & 0xffff_ffff] {
                    let covering = |pattern: &&Pattern| {
                        let shift = 32 - u32::from(pattern.lengths[0]);
                        at.checked_shr(shift) == pattern.values[0].checked_shr(shift)
                    };
                    let expected = all.iter().find(covering).map(|pattern| pattern.nomatch);
                    assert_eq!(table.shape.covers(table.words.as_slice(), &[at, 0, 0]), expected, "{at:#x}");
                }
            }
        }
        assert_eq!(SLOTS, 4);
    }
}
