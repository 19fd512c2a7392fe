//! Puts the entries of grouped classes in groups: by whether what they ask of each side is wide.
//!
//! How wide is told by what else is asked: a predicate is as wide as the number of ranges within it that the group's
//! predicates tell apart. A group's entries are crossed, each with as many pairs of classes as its two widths
//! multiplied. Several thresholds are tried, and the one with the fewest pairs taken; more groups have to pay for
//! themselves.

use super::groups::Asked;
use super::problem::{Column, Event};

/// Most groups: wide or not on each of two sides.
pub(super) const GROUPS: usize = 4;

/// Entries of a group, ascending.
pub(super) type Group = Vec<u32>;

/// Widths from which on a predicate is wide; the last is beyond all.
const THRESHOLDS: [u32; 6] = [8, 32, 128, 512, 2_048, u32::MAX];

/// Pairs that a group more has to save.
const GROUP_PAIRS: u64 = 1 << 14;

/// The entries of each group, by the column of each side and its events.
pub(super) fn partition(sides: [Option<(&Column, &[Event])>; 2], asked: &[Asked]) -> [Group; GROUPS] {
    let entries = asked.len() as u32;
    let sides = sides.map(|side| side.map(|(column, events)| Ranges::new(column, events)));
    let sides = [0, 1].map(|side: usize| sides[side].as_ref());
    let all = [0, 1].map(|side| widths(sides[side], asked.iter().map(|asked| asked.sides[side])));
    let mut best: Option<(u64, [Group; GROUPS])> = None;
    let widest = |side: usize| {
        let wide = asked.iter().map(|asked| all[side].of(asked.sides[side]));
        wide.max().unwrap_or(0)
    };
    let widest = widest(0).max(widest(1));
    let mut before = 0;
    for threshold in THRESHOLDS {
        // Nothing is wide, as with the threshold before.
        if std::mem::replace(&mut before, threshold) > widest {
            break;
        }
        let mut parts: [Group; GROUPS] = Default::default();
        for entry in 0..entries {
            let wide = [0, 1].map(|side| {
                let predicate = asked[entry as usize].sides[side];
                usize::from(all[side].of(predicate) >= threshold)
            });
            parts[wide[0] + 2 * wide[1]].push(entry);
        }
        // As with the threshold before.
        if best.as_ref().is_some_and(|(_, known)| *known == parts) {
            continue;
        }
        let pairs: u64 = parts.iter().map(|part| crossed(part, sides, asked)).sum();
        if best.as_ref().is_none_or(|(known, _)| pairs < *known) {
            best = Some((pairs, parts));
        }
    }
    let (_, parts) = best.expect("thresholds were tried");
    joined(parts, sides, asked)
}

/// Joins the smallest group with another as long as that costs less than a group more.
fn joined(mut parts: [Group; GROUPS], sides: [Option<&Ranges>; 2], asked: &[Asked]) -> [Group; GROUPS] {
    let mut costs = [0, 1, 2, 3].map(|part: usize| crossed(&parts[part], sides, asked));
    loop {
        let used = || (0..GROUPS).filter(|&part| !parts[part].is_empty());
        let Some(smallest) = used().min_by_key(|&part| parts[part].len()) else { return parts };
        let join = |other: usize| {
            let mut both = [parts[smallest].as_slice(), &parts[other]].concat();
            both.sort_unstable();
            (crossed(&both, sides, asked), other, both)
        };
        let best = used().filter(|&other| other != smallest).map(join).min_by_key(|(cost, ..)| *cost);
        match best {
            Some((cost, other, both)) if cost < costs[smallest] + costs[other] => {
                parts[smallest].clear();
                costs[smallest] = 0;
                parts[other] = both;
                costs[other] = cost;
            }
            _ => return parts,
        }
    }
}

/// Pairs of classes that a group has at the most, and what a group costs at all.
fn crossed(part: &Group, sides: [Option<&Ranges>; 2], asked: &[Asked]) -> u64 {
    if part.is_empty() {
        return 0;
    }
    let widths =
        [0, 1].map(|side| widths(sides[side], part.iter().map(|&entry| asked[entry as usize].sides[side])));
    let pairs = part.iter().map(|&entry| {
        let [a, b] = [0, 1].map(|side| u64::from(widths[side].of(asked[entry as usize].sides[side])));
        a * b
    });
    GROUP_PAIRS + pairs.sum::<u64>()
}

/// How many ranges each predicate of a column holds for.
struct Widths {
    by_predicate: Vec<u32>,
    /// Ranges of the whole column.
    all: u32,
}

impl Widths {
    fn of(&self, predicate: Option<u32>) -> u32 {
        predicate.map_or(self.all, |predicate| self.by_predicate[predicate as usize])
    }
}

/// A column's predicates as ranges between bounds, the values at which any of them begins or ended just before.
struct Ranges {
    /// How many bounds there are.
    bounds: usize,
    /// For each predicate, where its ranges end in `ranges`.
    ends: Vec<u32>,
    /// The numbers of the bounds where a range begins and where the next begins.
    ranges: Vec<(u32, u32)>,
}

impl Ranges {
    /// By a column's events.
    fn new(column: &Column, events: &[Event]) -> Ranges {
        let mut end = 0;
        let ends = column.predicates.iter().map(|set| {
            end += set.intervals().len() as u32;
            end
        });
        let ends: Vec<u32> = ends.collect();
        // Where each predicate's next range is that begins, and that ends.
        let begins: Vec<u32> = std::iter::once(0).chain(ends.iter().copied()).take(ends.len()).collect();
        let mut next = [begins.clone(), begins];
        let mut ranges = vec![(0, u32::MAX); end as usize];
        let (mut bound, mut at) = (0, 0);
        for &(value, predicate, begins) in events {
            bound += u32::from(value != at);
            at = value;
            let next = &mut next[usize::from(begins)][predicate as usize];
            let range: &mut (u32, u32) = &mut ranges[*next as usize];
            *(if begins { &mut range.0 } else { &mut range.1 }) = bound;
            *next += 1;
        }
        let bounds = bound + 1;
        // What does not end before the largest value.
        ranges.iter_mut().for_each(|(_, to)| *to = bounds.min(*to));
        Ranges { ends, ranges, bounds: bounds as usize }
    }

    fn of(&self, predicate: usize) -> &[(u32, u32)] {
        let begin = if predicate == 0 { 0 } else { self.ends[predicate - 1] };
        &self.ranges[begin as usize..self.ends[predicate] as usize]
    }
}

/// Widths among the ranges that these predicates tell apart.
fn widths(side: Option<&Ranges>, asked: impl Iterator<Item = Option<u32>>) -> Widths {
    let Some(side) = side else { return Widths { by_predicate: Vec::new(), all: 1 } };
    let mut used = vec![false; side.ends.len()];
    for predicate in asked.flatten() {
        used[predicate as usize] = true;
    }
    let used_predicates = || (0..used.len()).filter(|&predicate| used[predicate]);
    // Which bounds count, then how many do below each.
    let mut below = vec![0u32; side.bounds + 1];
    below[0] = 1;
    for &(from, to) in used_predicates().flat_map(|predicate| side.of(predicate)) {
        below[from as usize] = 1;
        if (to as usize) < side.bounds {
            below[to as usize] = 1;
        }
    }
    let mut all = 0;
    for bound in &mut below {
        all += std::mem::replace(bound, all);
    }
    let mut by_predicate = vec![0; used.len()];
    for predicate in used_predicates() {
        let within = side.of(predicate).iter().map(|&(from, to)| below[to as usize] - below[from as usize]);
        by_predicate[predicate] = within.sum();
    }
    Widths { by_predicate, all }
}
