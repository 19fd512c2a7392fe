//! The first entry of a stage, or of a decision's list, that holds for a packet, without a look at each.
//!
//! [`Classifier::eval`] tries entries one after another: that is what they mean, and takes milliseconds where there are a
//! hundred thousand. Packets are made for each of those, and shown to all. So here entries are taken in blocks, in their
//! order, and of the fields that most of them ask it is kept which blocks a value leaves anything of. What all of
//! these fields leave is looked at as ever, so the entry that is found is the same.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use cranelift_entity::{PrimaryMap, SecondaryMap};
use polc_ir::classifier::{Classifier, Fields};
use polc_ir::decision::Decision;
use polc_ir::entities::{Entry, Node, Stage};
use polc_ir::field::Field;
use polc_ir::interval::{Interval, IntervalSet};
use smallvec::SmallVec;

/// Entries from which on blocks are made, and how many blocks are made at most.
const ENTRIES_MIN: usize = 256;
const BLOCKS_MAX: usize = 1_024;
/// Entries that a block has at least.
const BLOCK_MIN: usize = 16;
/// Fields that are kept of them, and bits of each, in words.
const COLUMNS_MAX: usize = 4;
const COLUMN_WORDS_MAX: usize = 1 << 21;

/// Finds the first entries of a classifier's stages.
#[derive(Debug)]
pub(crate) struct First<'a> {
    classifier: &'a Classifier,
    /// Made when a packet comes to the stage.
    stages: PrimaryMap<Stage, OnceCell<Blocks>>,
    /// Where in its stage an entry is.
    places: SecondaryMap<Entry, u32>,
}

/// Finds the first entries of a decision's lists.
#[derive(Debug)]
pub(crate) struct FirstOfList<'a> {
    classifier: &'a Classifier,
    /// Made when a packet comes to the list.
    lists: PrimaryMap<Node, OnceCell<Blocks>>,
}

/// Entries in blocks; without columns they are tried one after another.
#[derive(Debug, Default)]
struct Blocks {
    size: usize,
    columns: Vec<Column>,
}

/// For each value of a field under a mask, the blocks of which some entry may hold.
#[derive(Debug)]
struct Column {
    field: Field,
    mask: u128,
    /// The first value of each row, in order from 0.
    starts: Vec<u128>,
    /// A bit for each block in each row, in so many words.
    bits: Vec<u64>,
    words: usize,
}

impl<'a> First<'a> {
    pub(crate) fn new(classifier: &'a Classifier) -> First<'a> {
        let mut places = SecondaryMap::new();
        for data in classifier.stages.values() {
            for (place, &entry) in (0..).zip(&data.entries) {
                places[entry] = place;
            }
        }
        let stages = classifier.stages.keys().map(|_| OnceCell::new()).collect();
        First { classifier, stages, places }
    }

    /// The entry of a stage that a packet with these fields takes.
    pub(crate) fn of(&self, stage: Stage, fields: &Fields<'_>) -> Entry {
        self.find(stage, self.classifier.stages[stage].entries.len(), fields)
            .expect("a stage's last entry always holds")
    }

    /// The first entry before this one, in its stage, that holds for a packet with these fields.
    pub(crate) fn before(&self, entry: Entry, fields: &Fields<'_>) -> Option<Entry> {
        self.find(self.classifier.entries[entry].stage, self.places[entry] as usize, fields)
    }

    /// The first of a stage's first `count` entries that holds.
    fn find(&self, stage: Stage, count: usize, fields: &Fields<'_>) -> Option<Entry> {
        let entries = &self.classifier.stages[stage].entries;
        let blocks = self.stages[stage].get_or_init(|| Blocks::of(self.classifier, entries));
        blocks.first(self.classifier, &entries[..count], fields)
    }
}

impl<'a> FirstOfList<'a> {
    pub(crate) fn new(classifier: &'a Classifier, decision: &Decision) -> FirstOfList<'a> {
        let lists = decision.nodes.keys().map(|_| OnceCell::new()).collect();
        FirstOfList { classifier, lists }
    }

    /// The first of a list's entries that holds for a packet with these fields.
    pub(crate) fn of(&self, list: Node, entries: &[Entry], fields: &Fields<'_>) -> Option<Entry> {
        let blocks = self.lists[list].get_or_init(|| Blocks::of(self.classifier, entries));
        blocks.first(self.classifier, entries, fields)
    }
}

impl Blocks {
    fn of(classifier: &Classifier, entries: &[Entry]) -> Blocks {
        if entries.len() < ENTRIES_MIN {
            return Blocks::default();
        }
        let size = entries.len().div_ceil(BLOCKS_MAX).max(BLOCK_MIN);
        let tests = |entry: &Entry| classifier.entries[*entry].cube.tests();
        let mut asked: BTreeMap<(Field, u128), usize> = BTreeMap::new();
        for test in entries.iter().flat_map(tests) {
            *asked.entry((test.field, test.mask)).or_default() += 1;
        }
        asked.retain(|_, count| *count >= entries.len() / 2);
        let column = |(field, mask)| {
            let values = |entry: &Entry| classifier.entries[*entry].cube.test(field, mask);
            let blocks = entries.chunks(size).map(|block| {
                let tests: Option<Vec<_>> = block.iter().map(values).collect();
                Some(
                    tests?
                        .into_iter()
                        .flat_map(|test| test.values.intervals())
                        .copied()
                        .collect::<IntervalSet>(),
                )
            });
            Column::new(field, mask, blocks.collect())
        };
        let mut columns: Vec<Column> = asked.into_keys().filter_map(column).collect();
        // Those first that tell most values apart.
        columns.sort_by_key(|column| std::cmp::Reverse(column.starts.len()));
        columns.truncate(COLUMNS_MAX);
        Blocks { size, columns }
    }

    /// The first that holds of the entries that these blocks were made of, or of so many of them.
    fn first(&self, classifier: &Classifier, entries: &[Entry], fields: &Fields<'_>) -> Option<Entry> {
        let rows: SmallVec<[&[u64]; COLUMNS_MAX]> =
            self.columns.iter().map(|column| column.row(fields.get(column.field))).collect();
        if rows.is_empty() {
            return classifier.first_of(entries, fields);
        }
        let mut parts = entries.chunks(self.size).enumerate();
        parts.find_map(|(at, part)| {
            let may_hold = rows.iter().all(|row| row[at / 64] >> (at % 64) & 1 == 1);
            if may_hold { classifier.first_of(part, fields) } else { None }
        })
    }
}

impl Column {
    /// Of the values that each block asks for, if all its entries do; `None` if that would be too much.
    fn new(field: Field, mask: u128, blocks: Vec<Option<IntervalSet>>) -> Option<Column> {
        let all = || blocks.iter().flatten().flat_map(IntervalSet::intervals);
        let ends = all().flat_map(|interval| [Some(interval.lo()), interval.hi().checked_add(1)]);
        let mut starts: Vec<u128> = ends.flatten().chain([0]).collect();
        starts.sort_unstable();
        starts.dedup();
        let words = blocks.len().div_ceil(64);
        if starts.len() * words > COLUMN_WORDS_MAX {
            return None;
        }
        let mut bits = vec![0; starts.len() * words];
        let everything = IntervalSet::full(128);
        for (at, values) in blocks.iter().enumerate() {
            for interval in values.as_ref().unwrap_or(&everything).intervals() {
                for row in rows(&starts, *interval) {
                    bits[row * words + at / 64] |= 1 << (at % 64);
                }
            }
        }
        Some(Column { field, mask, starts, bits, words })
    }

    fn row(&self, value: u128) -> &[u64] {
        let row = rows(&self.starts, Interval::point(value & self.mask)).start;
        &self.bits[row * self.words..][..self.words]
    }
}

/// The rows that an interval's values are in.
fn rows(starts: &[u128], interval: Interval) -> std::ops::Range<usize> {
    let row = |value: u128| starts.partition_point(|&start| start <= value) - 1;
    row(interval.lo())..row(interval.hi()) + 1
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use polc_ir::env::Attach;
    use polc_ir::interval::max_value;

    use super::super::random::Random;
    use super::super::tests::classified;
    use super::*;

    #[test]
    fn the_entry_found_is_the_first_that_holds() {
        let mut random = Random::new(3);
        let mut rules = String::from("*filter\n:INPUT ACCEPT [0:0]\n");
        for rule in 0..2_000 {
            let (net, length) = (random.below(1 << 16) << 8, 12 + random.below(17));
            let address = std::net::Ipv4Addr::from_bits((10 << 24 | net) as u32);
            let ports = match rule % 3 {
                0 => String::new(),
                1 => format!(" -p udp --dport {}:", random.below(65_536)),
                _ => format!(" ! -d 10.{}.0.0/16", random.below(256)),
            };
            _ = writeln!(rules, "-A INPUT -s {address}/{length}{ports} -j DROP");
        }
        let (classifier, _) = classified(&(rules + "COMMIT\n"), Attach::Netfilter);
        let first = First::new(&classifier);
        let (mut found, mut skipped) = (0, 0);
        for (stage, data) in &classifier.stages {
            for _ in 0..300 {
                let seed = random.next_u128();
                let given = |field: Field| {
                    let near = if field == Field::SrcAddr { 10 << 24 | seed & 0xff_ffff } else { seed >> 32 };
                    near & max_value(field.bits(classifier.family))
                };
                let fields = Fields::new(&given);
                let holds = |entry: &&Entry| classifier.entries[**entry].cube.holds(given);
                let mut holding = data.entries.iter().filter(holds).copied();
                let one = holding.next().expect("a stage is total");
                assert_eq!(first.of(stage, &fields), one);
                assert_eq!(first.before(one, &fields), None);
                // What only comes to light behind the first.
                let next = holding.next();
                assert!(next.is_none_or(|next| first.before(next, &fields) == Some(one)));
                found += usize::from(next.is_some());
            }
            skipped += first.stages[stage].get().map_or(0, |blocks| blocks.columns.len());
        }
        assert!(found > 100 && skipped > 0, "{found} {skipped}");
    }
}
