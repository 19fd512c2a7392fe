//! Puts the entries of grouped classes in groups: by whether what they ask of each side is wide.
//!
//! How wide is told by what else is asked: a predicate is as wide as the number of ranges within it that the group's
//! predicates tell apart. A group's entries are crossed, each with as many pairs of classes as its two widths
//! multiplied. Several thresholds are tried, and the one with the fewest pairs taken; more groups have to pay for
//! themselves.

use super::groups::Asked;
use super::problem::{Column, Problem};

/// Most groups: wide or not on each of two sides.
pub(super) const GROUPS: usize = 4;

/// Entries of a group, ascending.
pub(super) type Group = Vec<u32>;

/// Widths from which on a predicate is wide; the last is beyond all.
const THRESHOLDS: [u32; 6] = [8, 32, 128, 512, 2_048, u32::MAX];

/// Pairs that a group more has to save.
const GROUP_PAIRS: u64 = 1 << 14;

/// The entries of each group.
pub(super) fn partition(problem: &Problem, columns: [Option<usize>; 2], asked: &[Asked]) -> [Group; GROUPS] {
    let entries = asked.len() as u32;
    let column = |side: usize| columns[side].map(|column| &problem.columns[column]);
    let all = [0, 1].map(|side| widths(column(side), asked.iter().map(|asked| asked.sides[side])));
    let mut best: Option<(u64, [Group; GROUPS])> = None;
    for threshold in THRESHOLDS {
        let mut parts: [Group; GROUPS] = Default::default();
        for entry in 0..entries {
            let wide = [0, 1].map(|side| {
                let predicate = asked[entry as usize].sides[side];
                usize::from(all[side].of(predicate) >= threshold)
            });
            parts[wide[0] + 2 * wide[1]].push(entry);
        }
        let pairs: u64 = parts.iter().map(|part| crossed(part, [column(0), column(1)], asked)).sum();
        if best.as_ref().is_none_or(|(known, _)| pairs < *known) {
            best = Some((pairs, parts));
        }
    }
    let (_, parts) = best.expect("thresholds were tried");
    joined(parts, [column(0), column(1)], asked)
}

/// Joins the smallest group with another as long as that costs less than a group more.
fn joined(mut parts: [Group; GROUPS], columns: [Option<&Column>; 2], asked: &[Asked]) -> [Group; GROUPS] {
    let mut costs = [0, 1, 2, 3].map(|part: usize| crossed(&parts[part], columns, asked));
    loop {
        let used = || (0..GROUPS).filter(|&part| !parts[part].is_empty());
        let Some(smallest) = used().min_by_key(|&part| parts[part].len()) else { return parts };
        let join = |other: usize| {
            let mut both = [parts[smallest].as_slice(), &parts[other]].concat();
            both.sort_unstable();
            (crossed(&both, columns, asked), other, both)
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
fn crossed(part: &Group, columns: [Option<&Column>; 2], asked: &[Asked]) -> u64 {
    if part.is_empty() {
        return 0;
    }
    let widths =
        [0, 1].map(|side| widths(columns[side], part.iter().map(|&entry| asked[entry as usize].sides[side])));
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

/// Widths among the ranges that these predicates tell apart.
fn widths(column: Option<&Column>, asked: impl Iterator<Item = Option<u32>>) -> Widths {
    let Some(column) = column else { return Widths { by_predicate: Vec::new(), all: 1 } };
    let mut used = vec![false; column.predicates.len()];
    for predicate in asked.flatten() {
        used[predicate as usize] = true;
    }
    let mut bounds: Vec<u128> = vec![0];
    let sets = || column.predicates.iter().zip(&used).filter(|(_, used)| **used).map(|(set, _)| set);
    for set in sets() {
        for range in set.intervals() {
            bounds.push(range.lo());
            bounds.extend(range.hi().checked_add(1));
        }
    }
    bounds.sort_unstable();
    bounds.dedup();
    let by_predicate = column.predicates.iter().zip(&used).map(|(set, &used)| {
        let within = |range: &polc_ir::interval::Interval| {
            let from = bounds.partition_point(|&bound| bound < range.lo());
            let to = bounds.partition_point(|&bound| bound <= range.hi());
            (to - from) as u32
        };
        if used { set.intervals().iter().map(within).sum() } else { 0 }
    });
    Widths { by_predicate: by_predicate.collect(), all: bounds.len() as u32 }
}
