//! From a number to what its run of values stands for: the structures that search one column.
//!
//! Each is a straight line. Few runs are counted by subtraction; more are searched by halving, in a table laid out so
//! that the search goes from an element to one at twice its place (the order of a breadth-first walk, which keeps the
//! first elements together); or the number's bits are taken a few at a time through a trie. An element of a trie says
//! where the next level's elements begin. Every path is equally long, so that nothing has to be asked on the way: where a
//! whole range stands for one thing, the next level has either as many elements that say so as any node, or one, and then
//! the element before says that no bits of the number count there. Where runs are few, the number is cut in two, both
//! parts are searched at once, and a table of their classes says what the number stands for.
//!
//! What a structure costs follows from the sizes of its tables; so each that comes into question is written with empty
//! tables first, and only the one that is chosen is filled.

use std::rc::Rc;

use polc_ir::entities::{Data, Value};
use polc_ir::plan::{AluKind, DataTable};

use super::classes::{FastMap, Interned, mix};
use super::column::by_word;
use super::cost;
use super::line::{Line, Tables};

/// Runs of values of a number: a first value each, ascending from 0, and what it stands for. No two neighbours stand
/// for the same.
pub(super) type Runs = [(u64, u64)];

/// Runs that are counted by subtraction.
const COUNTED_MAX: usize = 7;

/// Runs that are searched by halving: more take longer than any trie.
const HALVED_MAX: usize = 1 << 21;

/// Elements that a trie's root may have in any case, and for each run.
const ROOT_ELEMENTS: usize = 1 << 8;
const ROOT_ELEMENTS_PER_RUN: usize = 8;

/// Elements for each run that a table of first bits may have.
const FIRST_ELEMENTS_PER_RUN: usize = 8;

/// Bytes that a processor fetches at once.
const CACHE_LINE: usize = 64;

/// Elements of a trie that is worth building: larger ones lose to sorted runs.
const TRIE_ELEMENTS_MAX: usize = 1 << 16;

/// Bytes of tables that are worth a tenth of a nanosecond where small tables are worth more than quick ones.
const FRUGAL_BYTES: usize = 1 << 9;

/// Bits of the lower part of a number that is cut in two.
const CUTS: [u32; 3] = [8, CUT_MIDDLE, 24];
const CUT_MIDDLE: u32 = 16;

/// Runs up to which a number is cut anywhere: more have too many different rests elsewhere than in the middle.
const CUT_ANYWHERE_RUNS_MAX: usize = 64;

/// Most bits of a number that is cut in two: a word, and a few labels of those before.
const CUT_BITS_MAX: u32 = 40;

/// Elements of the table of two parts' classes, before equal columns are one.
const CUT_ELEMENTS_MAX: usize = 1 << 16;

/// Instructions that a level of a trie takes at least: a word's bytes, their place, the read.
const LEVEL_INSNS: u64 = 5;

/// Instructions that a number which is cut in two takes at least: two parts of two runs each, counted, and the read.
const CUT_INSNS: u64 = 16;

/// First bits that are looked up before runs are halved.
const FIRST_BITS: [u32; 5] = [8, 11, 14, 16, 18];

/// How to search.
#[derive(Debug)]
pub(super) enum Search {
    /// Count the runs that begin at or below the number.
    Count,
    /// Halve.
    Halve,
    /// Look so many first bits up, then halve the runs that begin with them.
    First(u32),
    /// Take a few bits at a time.
    Trie(Rc<Trie>, Alone),
    /// Search the low bits and the others apart: the others by the first of two ways, these by the second.
    Cut(Box<Parted>, Box<[Search; 2]>),
}

/// What a level of a trie has where all numbers that come there stand for one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alone {
    /// One element: small.
    Element,
    /// A whole node: quick.
    Node,
}

/// The tries worth trying for numbers of `bits` bits. What a longer number has beyond a word are few labels of the words
/// before, which the root takes.
fn strides(bits: u32) -> Vec<Vec<u32>> {
    let of_word: &[&[u32]] = match bits {
        0..=8 => &[&[8]],
        9..=16 => &[&[8, 8], &[10, 6], &[16]],
        17..=24 => &[&[8, 8, 8], &[12, 6, 6], &[16, 8]],
        25..=32 => &[&[8, 8, 8, 8], &[12, 8, 6, 6], &[13, 7, 6, 6], &[14, 6, 6, 6], &[16, 8, 8], &[20, 6, 6]],
        33..=40 => {
            let labels = bits - 32;
            return vec![vec![8 + labels, 8, 8, 8], vec![12 + labels, 8, 6, 6], vec![16 + labels, 8, 8]];
        }
        _ => &[],
    };
    of_word.iter().map(|strides| strides.to_vec()).collect()
}

/// Writes the structure that the cost model likes best, and gives the value that a number's run stands for. `number`
/// writes the number, below 2^`bits`; `bits` is at most 63.
pub(super) fn search(
    line: &mut Line<'_>,
    number: &dyn Fn(&mut Line<'_>) -> Value,
    bits: u32,
    runs: &Runs,
) -> Value {
    let how = choose(bits, runs, line.is_frugal(), true);
    write(line, number, bits, runs, &how).expect("it was written before")
}

/// The structure that the cost model likes best. `frugal`: small tables are worth more than quick ones.
fn choose(bits: u32, runs: &Runs, frugal: bool, may_cut: bool) -> Search {
    let mut choice = Choice { bits, runs, frugal, best: None };
    if runs.len() <= COUNTED_MAX {
        choice.consider(Search::Count);
    }
    if runs.len() <= HALVED_MAX {
        choice.consider(Search::Halve);
    }
    if runs.len() > 2 {
        let worthwhile =
            |&&first: &&u32| first < bits && 1usize << first <= FIRST_ELEMENTS_PER_RUN * runs.len();
        // Whatever comes before the last word is a label, which may leave few runs.
        let labels = bits.saturating_sub(32);
        for &first in FIRST_BITS.iter().chain([&labels]).filter(|first| **first > 0).filter(worthwhile) {
            choice.consider(Search::First(first));
        }
    }
    // Sorted starts are about as small as tables get.
    if runs.len() > 2 && !frugal {
        // A root with many more elements than runs mostly repeats itself.
        let root_max = (ROOT_ELEMENTS_PER_RUN * runs.len()).max(ROOT_ELEMENTS);
        let alone = alone(runs);
        for strides in strides(bits).into_iter().filter(|strides| 1 << strides[0] <= root_max) {
            let levels = strides.len() as u64;
            if !choice.is_open(cost::least_part(LEVEL_INSNS * levels, levels, 1 << strides[0]))
                || least_elements(runs, &alone, &strides) > TRIE_ELEMENTS_MAX
            {
                continue;
            }
            let Some(trie) = Trie::new(runs, strides).map(Rc::new) else { continue };
            for alone in [Alone::Element, Alone::Node] {
                choice.consider(Search::Trie(trie.clone(), alone));
            }
        }
        let few = runs.len() <= CUT_ANYWHERE_RUNS_MAX;
        for low in CUTS.into_iter().filter(|&low| may_cut && low < bits && bits <= CUT_BITS_MAX) {
            if (few || low == CUT_MIDDLE) && choice.is_open(cost::least_part(CUT_INSNS, 1, 0)) {
                choice.consider_cut(low);
            }
        }
    }
    choice.best.expect("there is a search for every number of runs").1
}

/// A number, where it does not matter which: what it is made of costs every structure alike.
fn any(line: &mut Line<'_>) -> Value {
    line.word(0)
}

/// The structure that the cost model likes best so far.
struct Choice<'a> {
    bits: u32,
    runs: &'a Runs,
    frugal: bool,
    best: Option<(u32, Search)>,
}

impl Choice<'_> {
    /// Whether what takes so much at least may be the best.
    fn is_open(&self, least: u32) -> bool {
        self.best.as_ref().is_none_or(|(known, _)| least < *known)
    }

    fn consider_cut(&mut self, low: u32) {
        let (bits, frugal) = (self.bits, self.frugal);
        let Some(parts) = Parted::new(bits, self.runs, low) else { return };
        let how = [choose(bits - low, &parts.upper, frugal, false), choose(low, &parts.lower, frugal, false)];
        self.consider(Search::Cut(Box::new(parts), Box::new(how)));
    }

    fn consider(&mut self, how: Search) {
        let mut tables = Tables::sketch();
        let mut trial = Line::new(&mut tables);
        let Some(result) = write(&mut trial, &any, self.bits, self.runs, &how) else { return };
        let (ops, result) = trial.finish(result);
        let near = near(&tables, &how, self.bits, self.runs) / 10;
        let mut cost = cost::part(&ops, tables.sizes(), result).saturating_sub(near);
        if self.frugal {
            cost += (tables.bytes() / FRUGAL_BYTES) as u32;
        }
        if self.is_open(cost) {
            self.best = Some((cost, how));
        }
    }
}

/// Writes one structure; `None` if it grows too large.
pub(super) fn write(
    line: &mut Line<'_>,
    number: &dyn Fn(&mut Line<'_>) -> Value,
    bits: u32,
    runs: &Runs,
    how: &Search,
) -> Option<Value> {
    match how {
        Search::Count => Some(count(line, number, runs)),
        Search::Halve => Some(halve(line, number, runs)),
        Search::First(first) => Some(first_bits(line, number, bits, runs, *first)),
        Search::Trie(made, alone) => trie(line, number, bits, made, *alone),
        Search::Cut(parts, how) => parts.write(line, number, bits, how),
    }
}

/// `last + Σ (difference where the number is below the next run) + Σ (difference where the number is the only one of its
/// run, between two that stand for the same)`.
fn count(line: &mut Line<'_>, number: &dyn Fn(&mut Line<'_>) -> Value, runs: &Runs) -> Value {
    let mut sum: Option<Value> = None;
    let mut left = runs;
    while let [(_, before), (start, after), rest @ ..] = left {
        let x = number(line);
        // Numbers are below 2^63: what is negative then is so because of the subtraction.
        let (negative, difference) = match rest.first() {
            Some((next, last)) if *next == start + 1 && last == before => {
                left = rest;
                let differs = line.with(AluKind::Xor, x, *start);
                (line.with(AluKind::Sub, differs, 1), after.wrapping_sub(*before))
            }
            _ => {
                left = &left[1..];
                (line.with(AluKind::Sub, x, *start), before.wrapping_sub(*after))
            }
        };
        let term = line.where_negative(negative, difference);
        sum = Some(match sum {
            None => term,
            Some(sum) => line.alu(AluKind::Add, sum, term),
        });
    }
    let last = runs.last().map_or(0, |&(_, value)| value);
    match sum {
        None => line.constant(last),
        Some(sum) => line.with(AluKind::Add, sum, last),
    }
}

/// Searches by halving.
fn halve(line: &mut Line<'_>, number: &dyn Fn(&mut Line<'_>) -> Value, runs: &Runs) -> Value {
    let starts = &runs[1..];
    if starts.is_empty() {
        return line.constant(runs[0].1);
    }
    let levels = usize::BITS - starts.len().leading_zeros();
    let size = 1usize << levels;
    // The k-th smallest start goes where a breadth-first walk of the search tree has it. Starts that pad are beyond
    // every number.
    let last = starts.last().map_or(0, |&(start, _)| start);
    let width = DataTable::new(&[last]).width;
    let beyond = if width == 8 { i64::MAX as u64 } else { (1u64 << (8 * u32::from(width))) - 1 };
    let laid_out = || {
        let mut laid_out = vec![beyond; size];
        for (place, slot) in laid_out.iter_mut().enumerate().skip(1) {
            let level = place.ilog2();
            let across = place - (1 << level);
            // Numbers of starts below this one in the full tree.
            let rank = (2 * across + 1) * (size >> (level + 1)) - 1;
            if let Some(&(start, _)) = starts.get(rank) {
                *slot = start;
            }
        }
        laid_out
    };
    // A number equal to `beyond` would count as at or above the padding: "below" is then 0 as it should be for a
    // number that no start exceeds, and the values that follow are those of the last run.
    let table = line.table_of(size, beyond, laid_out);
    let mut place = line.constant(1);
    for _ in 0..levels {
        let start = line.index(table, place);
        let x = number(line);
        // 1 where the number is below the start.
        let below = line.alu(AluKind::Sub, x, start);
        let below = line.with(AluKind::Shr, below, 63);
        let twice = line.with(AluKind::Shl, place, 1);
        let twice = line.with(AluKind::Add, twice, 1);
        place = line.alu(AluKind::Sub, twice, below);
    }
    // At the end the place is 2^levels and the number of starts at or below the number.
    let leaves = line.table_of(size, largest(runs), || padded(runs.iter().map(|run| run.1), size));
    let index = line.with(AluKind::Sub, place, size as u64);
    line.index(leaves, index)
}

/// The largest value that a run stands for.
fn largest(runs: &Runs) -> u64 {
    runs.iter().map(|&(_, value)| value).max().unwrap_or(0)
}

/// Elements, the last one repeated up to `size`.
fn padded(elements: impl Iterator<Item = u64>, size: usize) -> Vec<u64> {
    let mut elements: Vec<u64> = elements.collect();
    elements.resize(size, elements.last().copied().unwrap_or(0));
    elements
}

/// For every value of the first bits, the run that the first number with them is in.
fn by_first_bits(bits: u32, runs: &Runs, first: u32) -> Vec<usize> {
    let mut run = 0;
    let begin = (0..1u64 << first).map(|high| {
        while runs.get(run + 1).is_some_and(|&(start, _)| start <= high << (bits - first)) {
            run += 1;
        }
        run
    });
    begin.collect()
}

/// Into how many parts halving may have to cut the runs of numbers with the same first bits.
fn halvings(bits: u32, runs: &Runs, first: u32) -> u32 {
    let shift = bits - first;
    // A run that begins with the first number is not one to be found.
    let within = |&&(start, _): &&(u64, u64)| start & ((1 << shift) - 1) != 0;
    let (mut most, mut count, mut last) = (0usize, 0usize, None);
    for (start, _) in runs.iter().filter(within) {
        count = if last == Some(start >> shift) { count + 1 } else { 1 };
        last = Some(start >> shift);
        most = most.max(count);
    }
    usize::BITS - most.leading_zeros()
}

/// Looks the first bits up, then halves. All runs' starts are in one ascending table, so that a step which goes beyond
/// the runs of these first bits finds starts above the number, and nothing has to be padded.
fn first_bits(
    line: &mut Line<'_>,
    number: &dyn Fn(&mut Line<'_>) -> Value,
    bits: u32,
    runs: &Runs,
    first: u32,
) -> Value {
    let steps = halvings(bits, runs, first);
    // A number equal to the padding goes on in it, and there is the value of the last run.
    let size = runs.len() + (1 << steps);
    let last = runs.last().map_or(0, |&(start, _)| start);
    let beyond = u64::MAX >> (64 - 8 * u32::from(DataTable::new(&[last]).width));
    let beyond = beyond.min(i64::MAX as u64);
    let starts = line.table_of(size.next_power_of_two(), beyond, || {
        let mut starts: Vec<u64> = runs.iter().map(|&(start, _)| start).collect();
        starts.resize(size.next_power_of_two(), beyond);
        starts
    });
    let width = line.width(starts);
    let begin = line.table_of(1 << first, (runs.len() as u64 - 1) * width, || {
        by_first_bits(bits, runs, first).into_iter().map(|run| run as u64 * width).collect()
    });
    let scale = line.width(begin).trailing_zeros();
    let high = number(line);
    let high = line.bits(high, bits - first, first, scale, bits);
    let mut at = line.read(begin, high);
    let mut left = steps;
    while left > 0 {
        // Halving twice at once: of three starts that do not wait for each other, as many are above the number as the
        // last is to be gone back from.
        let probes = if left == 1 { 1 } else { 3 };
        left -= if left == 1 { 1 } else { 2 };
        let mut ahead = at;
        let mut above: Option<Value> = None;
        for probe in 1..=probes {
            ahead = line.with(AluKind::Add, at, (probe * width) << left);
            let start = line.read(starts, ahead);
            let x = number(line);
            let below = line.alu(AluKind::Sub, x, start);
            let below = line.with(AluKind::Shr, below, 63);
            above = Some(match above {
                None => below,
                Some(above) => line.alu(AluKind::Add, above, below),
            });
        }
        let above = above.expect("there is a probe");
        let back = line.with(AluKind::Shl, above, u64::from(width.trailing_zeros() + left));
        at = line.alu(AluKind::Sub, ahead, back);
    }
    let values = line.table_of(size, largest(runs), || padded(runs.iter().map(|run| run.1), size));
    let (from, to) = (width.trailing_zeros(), line.width(values).trailing_zeros());
    let offset = if to >= from {
        line.with(AluKind::Shl, at, u64::from(to - from))
    } else {
        line.with(AluKind::Shr, at, u64::from(from - to))
    };
    line.read(values, offset)
}

/// What the cost model takes too much for a search whose reads are close together, in hundredths of a nanosecond.
fn near(tables: &Tables, how: &Search, bits: u32, runs: &Runs) -> u32 {
    let size = |table: usize| tables.sizes().values().nth(table).map_or(0, |size| size.bytes);
    let width = DataTable::new(&[runs.last().map_or(0, |&(start, _)| start)]).width;
    let saved = match how {
        Search::Count | Search::Trie(..) | Search::Cut(..) => 0,
        Search::Halve if runs.len() == 1 => 0,
        // The first levels of the tree are read by every packet.
        Search::Halve => {
            let all = size(0);
            let levels = (all / usize::from(width)).ilog2();
            (0..levels).map(|level| cost::read(all) - cost::read(usize::from(width) << level)).sum()
        }
        // The last steps stay within what is there already.
        Search::First(first) => {
            let all = size(0);
            let near =
                halvings(bits, runs, *first).min((CACHE_LINE / usize::from(width)).ilog2()).div_ceil(2);
            u64::from(near) * (cost::read(all) - cost::read(CACHE_LINE))
        }
    };
    saved as u32
}

/// A node of a level of a trie while it is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Part {
    /// All numbers stand for this.
    Same(u64),
    /// The node of the next level with this number.
    Node(u32),
}

/// Takes bits from the top.
fn trie(
    line: &mut Line<'_>,
    number: &dyn Fn(&mut Line<'_>) -> Value,
    bits: u32,
    Trie { strides, levels }: &Trie,
    alone: Alone,
) -> Option<Value> {
    let total: u32 = strides.iter().sum();
    // The last level first: an element needs to know where its node begins below.
    let mut tables: Vec<(Data, u64)> = Vec::new();
    let mut places: FastMap<Part, u64> = FastMap::default();
    for (level, (nodes, &stride)) in levels.iter().zip(strides).enumerate().rev() {
        let below = tables.last().map(|&(table, _)| u64::from(line.width(table).trailing_zeros()));
        let element = |part: Part| match (below, part) {
            (None, Part::Same(value)) => value,
            (None, Part::Node(_)) => unreachable!("the last level has no nodes below"),
            (Some(width), part) if alone == Alone::Node => places[&part] << width,
            (Some(width), part) => {
                let stride = strides[level + 1];
                let mask = match part {
                    Part::Same(_) => 0,
                    Part::Node(_) => ((1u64 << stride) - 1) << width,
                };
                (places[&part] << (u64::from(stride) + 2 * width)) | mask
            }
        };
        let of_nodes = nodes.nodes.len() << stride;
        // Nobody comes to the root but from outside.
        let of_same = if alone == Alone::Node && level > 0 { 1usize << stride } else { 1 };
        let count = of_nodes + nodes.same.len() * of_same;
        if count > TRIE_ELEMENTS_MAX {
            return None;
        }
        let parts = nodes.nodes.iter().flatten().map(|&(_, part)| part);
        let all = parts.chain(nodes.same.iter().map(|&value| Part::Same(value)));
        let largest = all.map(element).max().unwrap_or(0);
        let table = line.table_of(count, largest, || {
            let mut elements: Vec<u64> = Vec::with_capacity(count);
            for parts in &nodes.nodes {
                let end = elements.len() + (1 << stride);
                let until = parts.iter().skip(1).map(|&(from, _)| end - (1 << stride) + from as usize);
                for (&(_, part), until) in parts.iter().zip(until.chain([end])) {
                    elements.resize(until, element(part));
                }
            }
            for &value in &nodes.same {
                elements.resize(elements.len() + of_same, element(Part::Same(value)));
            }
            elements
        });
        let own_nodes = (0..nodes.nodes.len()).map(|node| (Part::Node(node as u32), (node << stride) as u64));
        let places_of_same = (of_nodes as u64..).step_by(of_same);
        let own_values = nodes.same.iter().zip(places_of_same).map(|(&value, at)| (Part::Same(value), at));
        let own = own_nodes.chain(own_values).collect();
        tables.push((table, below.map_or(0, |width| u64::from(strides[level + 1]) + width)));
        places = own;
    }
    tables.reverse();
    let mut from = total;
    let mut element: Option<(Value, u64)> = None;
    for ((table, mask_bits), &stride) in tables.into_iter().zip(strides) {
        from -= stride;
        let x = number(line);
        // The bits of this level, as an offset.
        let scale = line.width(table).trailing_zeros();
        let part = line.bits(x, from, stride, scale, bits);
        let offset = match element {
            None => part,
            Some((element, _)) if alone == Alone::Node => line.alu(AluKind::Add, element, part),
            Some((element, bits_below)) => {
                let part = line.alu(AluKind::And, part, element);
                let base = line.with(AluKind::Shr, element, bits_below);
                line.alu(AluKind::Add, base, part)
            }
        };
        element = Some((line.read(table, offset), mask_bits));
    }
    element.map(|(value, _)| value)
}

/// The parts of a node, each with the first element that it is.
type Parts = Vec<(u32, Part)>;

/// A level of a trie: its nodes, and the values that stand alone.
#[derive(Debug, Default)]
struct Level {
    nodes: Vec<Parts>,
    same: Vec<u64>,
}

/// For each run but the first, whether it or the one before stands for something that no other run does.
fn alone(runs: &Runs) -> Vec<bool> {
    let mut count: FastMap<u64, u32> = FastMap::default();
    runs.iter().for_each(|&(_, value)| *count.entry(value).or_default() += 1);
    runs.windows(2).map(|pair| pair.iter().any(|(_, value)| count[value] == 1)).collect()
}

/// Elements that a trie has at least: where a run begins within a node, and stands for something that no other does (or
/// the one before it), no other node is equal.
fn least_elements(runs: &Runs, alone: &[bool], strides: &[u32]) -> usize {
    let mut bits: u32 = strides.iter().sum();
    let mut elements = 0;
    for stride in strides {
        let mut nodes = 0;
        let mut last = None;
        for (&(start, _), _) in runs[1..].iter().zip(alone).filter(|&(_, alone)| *alone) {
            let node = Some(start >> bits);
            if start & ((1 << bits) - 1) != 0 && last != node {
                last = node;
                nodes += 1;
            }
        }
        elements += nodes << stride;
        bits -= stride;
    }
    elements
}

/// The nodes of all levels, equal ones once.
#[derive(Debug)]
pub(super) struct Trie {
    /// The bits that each level takes.
    strides: Vec<u32>,
    levels: Vec<Level>,
}

impl Trie {
    /// `None` if there are too many nodes.
    fn new(runs: &Runs, strides: Vec<u32>) -> Option<Trie> {
        build(runs, &strides).map(|levels| Trie { strides, levels })
    }
}

fn build(runs: &Runs, strides: &[u32]) -> Option<Vec<Level>> {
    let bits: u32 = strides.iter().sum();
    let mut levels: Vec<Level> = strides.iter().map(|_| Level::default()).collect();
    let mut known: Vec<FastMap<Parts, u32>> = strides.iter().map(|_| FastMap::default()).collect();
    let mut same: Vec<FastMap<u64, ()>> = strides.iter().map(|_| FastMap::default()).collect();
    let mut elements = 0usize;
    // A node being filled: its level, the shift of its bits, its first number, the run that it is at, its parts so far
    // and how many elements they are.
    struct Open {
        level: usize,
        shift: u32,
        low: u64,
        run: usize,
        parts: Parts,
        filled: u32,
    }
    impl Open {
        fn push(&mut self, part: Part, count: u32) {
            if self.parts.last().is_none_or(|&(_, last)| last != part) {
                self.parts.push((self.filled, part));
            }
            self.filled += count;
        }
    }
    let root = Open { level: 0, shift: bits - strides[0], low: 0, run: 0, parts: Vec::new(), filled: 0 };
    let mut open = vec![root];
    loop {
        let node = open.last_mut().expect("the root is open until the end");
        if node.filled == 1 << strides[node.level] {
            let done = open.pop().expect("it is the last");
            let level = &mut levels[done.level];
            let number = match known[done.level].get(&done.parts) {
                Some(&number) => number,
                None => {
                    let number = level.nodes.len() as u32;
                    elements += 1 << strides[done.level];
                    if elements > TRIE_ELEMENTS_MAX {
                        return None;
                    }
                    known[done.level].insert(done.parts.clone(), number);
                    level.nodes.push(done.parts);
                    number
                }
            };
            match open.last_mut() {
                None => return Some(levels),
                Some(above) => above.push(Part::Node(number), 1),
            }
            continue;
        }
        let low = node.low + (u64::from(node.filled) << node.shift);
        let high = low + ((1u64 << node.shift) - 1);
        while node.run + 1 < runs.len() && runs[node.run + 1].0 <= low {
            node.run += 1;
        }
        if node.run + 1 == runs.len() || runs[node.run + 1].0 > high {
            let value = runs[node.run].1;
            for (level, same) in same.iter_mut().enumerate().skip(node.level + 1) {
                if same.insert(value, ()).is_none() {
                    levels[level].same.push(value);
                }
            }
            // As many parts as the run covers whole.
            let until = runs.get(node.run + 1).map_or(1 << bits, |&(start, _)| start);
            let rest = (1 << strides[node.level]) - node.filled;
            let covered = ((until - low) >> node.shift).min(rest.into()) as u32;
            node.push(Part::Same(value), covered);
        } else {
            let (level, shift, run) = (node.level + 1, node.shift - strides[node.level + 1], node.run);
            open.push(Open { level, shift, low, run, parts: Vec::new(), filled: 0 });
        }
    }
}

/// A number cut in two: what its two parts stand for, and what both together do.
#[derive(Debug)]
pub(super) struct Parted {
    /// The bits of the lower part.
    low: u32,
    /// Runs of the bits above: where the row of their class begins.
    upper: Vec<(u64, u64)>,
    /// Runs of the low bits: where the column of theirs is in a row.
    lower: Vec<(u64, u64)>,
    /// The columns, in the order of their places.
    columns: Interned<u64>,
    /// How many rows there are.
    rows: usize,
    /// The largest element.
    largest: u64,
}

impl Parted {
    /// Cuts numbers above their `low` bits. `None` if the parts' classes are too many.
    fn new(bits: u32, runs: &Runs, low: u32) -> Option<Parted> {
        let wide: Vec<(u128, u64)> = runs.iter().map(|&(start, value)| (start.into(), value)).collect();
        // What is left to search behind the upper part, once each.
        let mut rests: Interned<(u128, u64)> = Interned::new();
        let mut upper: Vec<(u64, u64)> = Vec::new();
        let mut longest = 0;
        by_word(&wide, low, |start, rest| {
            // A rest's runs begin at as many numbers.
            longest = rest.len().max(longest);
            if start >> (bits - low) != 0 || rests.len() * longest > CUT_ELEMENTS_MAX {
                return;
            }
            let hash = rest.iter().fold(0, |hash, &(start, value)| mix(mix(hash, start as u64), value));
            let label = rests.intern(rest, hash).into();
            if upper.last().is_none_or(|&(_, last)| last != label) {
                upper.push((start, label));
            }
        });
        let mut starts: Vec<u128> = rests.lists().flatten().map(|&(start, _)| start).collect();
        starts.sort_unstable();
        starts.dedup();
        if starts.len() * rests.len() > CUT_ELEMENTS_MAX {
            return None;
        }
        // Lower parts that no rest tells apart are one class.
        let mut columns: Interned<u64> = Interned::new();
        let mut column: Vec<u64> = Vec::with_capacity(rests.len());
        let mut lower: Vec<(u64, u64)> = Vec::new();
        let mut at = vec![0; rests.len()];
        for start in starts {
            column.clear();
            column.extend(rests.lists().zip(&mut at).map(|(rest, at)| {
                while rest.get(*at + 1).is_some_and(|next| next.0 <= start) {
                    *at += 1;
                }
                rest[*at].1
            }));
            let hash = column.iter().fold(0, |hash, &value| mix(hash, value));
            let class = columns.intern(&column, hash).into();
            if lower.last().is_none_or(|&(_, last)| last != class) {
                lower.push((start as u64, class));
            }
        }
        let (rows, largest) = (rests.len(), largest(runs));
        let element = u64::from(DataTable::size(rows * columns.len(), largest).0);
        let row = columns.len() as u64 * element;
        upper.iter_mut().for_each(|(_, class)| *class *= row);
        lower.iter_mut().for_each(|(_, class)| *class *= element);
        Some(Parted { low, upper, lower, columns, rows, largest })
    }

    /// Searches both parts, and reads what they stand for together.
    fn write(
        &self,
        line: &mut Line<'_>,
        number: &dyn Fn(&mut Line<'_>) -> Value,
        bits: u32,
        how: &[Search; 2],
    ) -> Option<Value> {
        let low = self.low;
        let width = self.columns.len();
        let count = self.rows * width;
        let table = line.table_of(count, self.largest, || {
            let mut elements = vec![0; count];
            for (class, column) in self.columns.lists().enumerate() {
                for (label, &value) in column.iter().enumerate() {
                    elements[label * width + class] = value;
                }
            }
            elements
        });
        let upper_bits = |line: &mut Line<'_>| {
            let x = number(line);
            line.bits(x, low, bits - low, 0, bits)
        };
        let lower_bits = |line: &mut Line<'_>| {
            let x = number(line);
            line.bits(x, 0, low, 0, bits)
        };
        let row = write(line, &upper_bits, bits - low, &self.upper, &how[0])?;
        let column = write(line, &lower_bits, low, &self.lower, &how[1])?;
        let offset = line.alu(AluKind::Add, row, column);
        Some(line.read(table, offset))
    }
}

#[cfg(test)]
mod tests {
    use polc_ir::plan::LookupStep;

    use super::*;
    use crate::witness::Random;

    /// What a structure says of a number of `bits` bits.
    fn asked(tables: &mut Tables, bits: u32, runs: &Runs, how: &Search) -> Option<LookupStep> {
        let number = |line: &mut Line<'_>| {
            if bits <= 32 {
                return line.word(0);
            }
            let high = line.word(1);
            let high = line.with(AluKind::Shl, high, 32);
            let low = line.word(0);
            line.alu(AluKind::Or, high, low)
        };
        let mut line = Line::new(tables);
        let result = write(&mut line, &number, bits, runs, how)?;
        Some(line.step(result))
    }

    #[test]
    fn every_search_finds_the_run_of_every_number() {
        let mut random = Random::new(7);
        for bits in [5u32, 8, 13, 16, 32, 40, 63] {
            for count in [1usize, 2, 3, 5, 17, 200, 3_000] {
                let top = u64::MAX >> (64 - bits);
                let below =
                    |random: &mut Random, bound: u64| random.below(bound.min(1 << 40) as usize) as u64;
                // Some starts lie close together, some at the ends.
                let mut starts: Vec<u64> = (1..count)
                    .map(|_| match random.below(4) {
                        0 => top - below(&mut random, 9.min(top)),
                        1 => 1 + below(&mut random, 40.min(top)),
                        _ => 1 + below(&mut random, top) * (top / (1 << 40)).max(1),
                    })
                    .filter(|start| (1..=top).contains(start))
                    .collect();
                starts.push(0);
                starts.sort_unstable();
                starts.dedup();
                let runs: Vec<(u64, u64)> =
                    (0..).zip(&starts).map(|(index, &start)| (start, 3 + index * 7 % 1_000)).collect();
                let mut numbers = vec![0, top];
                for &start in &starts {
                    numbers.extend([start, start.saturating_sub(1), (start + 1).min(top)]);
                }
                numbers.extend((0..200).map(|_| below(&mut random, top)));
                let mut ways = vec![Search::Count, Search::Halve];
                ways.extend([3, 8, 11].into_iter().filter(|&first| first < bits).map(Search::First));
                for trie in strides(bits).into_iter().filter_map(|strides| Trie::new(&runs, strides)) {
                    let trie = Rc::new(trie);
                    ways.extend([Alone::Element, Alone::Node].map(|alone| Search::Trie(trie.clone(), alone)));
                }
                let cuts = CUTS.into_iter().filter(|&cut| cut < bits && bits <= CUT_BITS_MAX);
                let parted = cuts.filter_map(|cut| Parted::new(bits, &runs, cut)).map(Box::new);
                ways.extend(parted.map(|parts| Search::Cut(parts, Box::new([Search::Halve, Search::Halve]))));
                for how in ways {
                    if matches!(how, Search::Count) && runs.len() > COUNTED_MAX {
                        continue;
                    }
                    let mut tables = Tables::new();
                    let Some(step) = asked(&mut tables, bits, &runs, &how) else { continue };
                    for &number in &numbers {
                        let run = runs.partition_point(|&(start, _)| start <= number) - 1;
                        let found = step.eval(tables.all(), &[number as u32, (number >> 32) as u32]);
                        assert_eq!(found, runs[run].1, "{how:?}: {number:#x} of {bits} bits, {count} runs");
                    }
                }
            }
        }
    }
}
