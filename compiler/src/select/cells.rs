//! The cells of a table of two: what entries each class of one has in common with each class of another.
//!

use super::classes::{Sets, Sparse, differing, insert, numbers, numbers_of, sparse};

/// Words of the bit sets that say which classes have an entry.
const HAVING_WORDS_MAX: usize = 1 << 21;

/// No class.
const NONE: u32 = u32::MAX;

/// Rows that another may be made like.
const LIKE_MAX: usize = 6;

/// The classes of cells, row by row, and the sets of entries that they stand for: those in both, up to the first of
/// `done`. `None` if there are more than so many classes, or their sets have more than so many words.
///
/// A row is made like the last, or like one that this was made like, whichever has the most entries in common with it:
/// hosts follow one another and are all like the prefix that they are in. Only columns that have one of the entries by
/// which the two differ are looked at.
pub(super) fn in_both(
    left: &Sets,
    right: &Sets,
    done: &[u64],
    classes_max: usize,
    words_max: usize,
) -> Option<(Vec<u32>, Sets)> {
    let having = Having::new(right)?;
    let (width, words) = (right.len(), right.words());
    let mut columns = vec![0; width * words];
    for b in 0..width {
        for &(at, word) in right.get(b as u32) {
            columns[b * words + at as usize] = word;
        }
    }
    let mut classes = left.none();
    let mut cells: Vec<u32> = Vec::with_capacity(left.len() * width);
    // For each row, the one that it was made like.
    let mut likes: Vec<u32> = Vec::with_capacity(left.len());
    let mut looked_at = having.all();
    let mut both: Vec<(u32, u64)> = Vec::new();
    for a in 0..left.len() as u32 {
        let row = left.get(a);
        let begin = cells.len();
        if a == 0 {
            likes.push(0);
            cells.resize(width, NONE);
        } else {
            let like = like(left, row, a - 1, &likes);
            likes.push(like);
            looked_at.fill(0);
            for entry in differing(row, left.get(like)).flat_map(|(at, word)| numbers_of(at, word)) {
                looked_at.iter_mut().zip(having.of(entry)).for_each(|(all, more)| *all |= more);
            }
            cells.extend_from_within(like as usize * width..(like as usize + 1) * width);
        }
        for b in sparse(&looked_at).flat_map(|(at, word)| numbers_of(at, word)) {
            let column = &columns[b * words..][..words];
            both.clear();
            for &(at, word) in row {
                let word = word & column[at as usize];
                if word == 0 {
                    continue;
                }
                let finished = word & done[at as usize];
                if finished != 0 {
                    // Up to the lowest that is finished.
                    both.push((at, word & (finished ^ (finished - 1))));
                    break;
                }
                both.push((at, word));
            }
            let cell = &mut cells[begin + b];
            // It may be what is there in the other row all the same.
            if *cell == NONE || classes.get(*cell) != both {
                *cell = classes.intern(&both);
            }
        }
        if classes.len() > classes_max || classes.stored() > words_max {
            return None;
        }
    }
    Some((cells, classes))
}

/// The cells, row by row, each as `class` has the first entry that is in both. Where there is none, no packet comes.
pub(super) fn firsts(left: &Sets, right: &Sets, mut class: impl FnMut(usize) -> u32) -> Option<Vec<u32>> {
    let having = Having::new(right)?;
    let all = having.all();
    let mut open = all.clone();
    let mut cells: Vec<u32> = Vec::with_capacity(left.len() * right.len());
    for a in 0..left.len() as u32 {
        let row = left.get(a);
        let last = numbers(row).last().unwrap_or(0);
        let begin = cells.len();
        // What no earlier entry takes is the last one's.
        cells.resize(begin + right.len(), class(last));
        open.copy_from_slice(&all);
        for entry in numbers(row).take_while(|&entry| entry != last) {
            let class = class(entry);
            let mut left = 0;
            for (at, (open, having)) in (0..).zip(open.iter_mut().zip(having.of(entry))) {
                numbers_of(at, *open & having).for_each(|b| cells[begin + b] = class);
                *open &= !having;
                left |= *open;
            }
            if left == 0 {
                break;
            }
        }
    }
    Some(cells)
}

/// The row to make one like, of the one before and those that this was made like.
fn like(rows: &Sets, row: &Sparse, before: u32, likes: &[u32]) -> u32 {
    let unlike =
        |&other: &u32| differing(row, rows.get(other)).map(|(_, word)| word.count_ones()).sum::<u32>();
    let before = std::iter::successors(Some(before), |&row| Some(likes[row as usize]));
    before.take(LIKE_MAX).min_by_key(unlike).expect("there is one before")
}

/// For each entry, the classes that have it, as a bit set.
struct Having {
    words: usize,
    classes: usize,
    bits: Vec<u64>,
}

impl Having {
    /// `None` if they are too many.
    fn new(sets: &Sets) -> Option<Having> {
        let (entries, words) = (64 * sets.words(), sets.len().div_ceil(64));
        if entries * words > HAVING_WORDS_MAX {
            return None;
        }
        let mut having = Having { words, classes: sets.len(), bits: vec![0; entries * words] };
        for class in 0..sets.len() {
            for entry in numbers(sets.get(class as u32)) {
                insert(&mut having.bits[entry * words..][..words], class);
            }
        }
        Some(having)
    }

    fn of(&self, entry: usize) -> &[u64] {
        &self.bits[entry * self.words..][..self.words]
    }

    /// All classes.
    fn all(&self) -> Vec<u64> {
        let mut all = vec![u64::MAX; self.words];
        if !self.classes.is_multiple_of(64) {
            all[self.words - 1] = (1 << (self.classes % 64)) - 1;
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(of: &[&[usize]]) -> Sets {
        let mut sets = Sets::new(130);
        for entries in of {
            let mut set = vec![0; sets.words()];
            entries.iter().for_each(|&entry| insert(&mut set, entry));
            sets.push(&sparse(&set).collect::<Vec<_>>());
        }
        sets
    }

    #[test]
    fn cells_are_what_classes_have_in_common() {
        let rows: [&[usize]; 4] = [&[1, 64, 129], &[1, 2, 64, 129], &[129], &[2, 70, 129]];
        let columns: [&[usize]; 4] = [&[1, 2, 129], &[64, 70, 129], &[129], &[1, 64, 70, 129]];
        let (left, right) = (sets(&rows), sets(&columns));
        let mut done = vec![0; left.words()];
        insert(&mut done, 64);
        let (cells, classes) = in_both(&left, &right, &done, usize::MAX, usize::MAX).expect("there is room");
        let first = firsts(&left, &right, |entry| entry as u32).expect("there is room");
        for (a, row) in rows.iter().enumerate() {
            for (b, column) in columns.iter().enumerate() {
                let mut common: Vec<usize> =
                    row.iter().copied().filter(|entry| column.contains(entry)).collect();
                let end = common.iter().position(|&entry| entry == 64).map_or(common.len(), |at| at + 1);
                assert_eq!(first[4 * a + b] as usize, common[0], "{a} {b}");
                common.truncate(end);
                let class = numbers(classes.get(cells[4 * a + b]));
                assert_eq!(class.collect::<Vec<usize>>(), common, "{a} {b}");
            }
        }
        // Those of equal cells are one.
        let distinct: std::collections::BTreeSet<u32> = cells.iter().copied().collect();
        assert_eq!(classes.len(), distinct.len());
        assert!(in_both(&left, &right, &done, classes.len() - 1, usize::MAX).is_none());
        assert!(in_both(&left, &right, &done, usize::MAX, classes.stored() - 1).is_none());
    }
}
