//! A stage as columns: for each field and mask that its entries test, the distinct sets they test for.
//!
//! Columns are independent of each other, and of how they will be looked up. A device's column holds classes of
//! devices, so that names under several masks are one column.

use std::hash::{Hash, Hasher};

use polc_ir::classifier::Exit;
use polc_ir::entities::Entry;
use polc_ir::field::Field;
use polc_ir::interval::{Interval, IntervalSet, max_value};
use polc_ir::outcome::Count;
use polc_ir::plan::KeySlot;

use super::Selector;
use super::classes::{FastMap, Same};
use super::room::Room;

/// Tests that most entries have at the most.
const TESTS: usize = 5;

/// A field under a mask.
#[derive(Clone, Copy, Debug)]
pub(super) struct Masked {
    /// Where the field is in the key.
    pub(super) slot: KeySlot,
    /// The bits that count.
    pub(super) mask: u128,
    /// How many bits the field has.
    pub(super) field_bits: u8,
    /// How many bits masked values have.
    pub(super) bits: u8,
}

/// What entries test one field under one mask for.
#[derive(Clone, Debug)]
pub(super) struct Column {
    /// What is looked at.
    pub(super) field: Masked,
    /// The distinct sets, over masked values.
    pub(super) predicates: Vec<IntervalSet>,
}

/// What each entry tests: columns and the set of each, ascending by column.
#[derive(Clone, Debug, Default)]
pub(super) struct Entries {
    tests: Vec<(u32, u32)>,
    /// Where each entry's end in `tests`.
    ends: Vec<u32>,
}

impl Entries {
    /// None, with room for so many of so many tests.
    pub(super) fn with_capacity(entries: usize, tests: usize) -> Entries {
        Entries { tests: Vec::with_capacity(entries * tests), ends: Vec::with_capacity(entries) }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds one.
    pub(super) fn push(&mut self, tests: &[(u32, u32)]) {
        self.tests.extend_from_slice(tests);
        self.ends.push(self.tests.len() as u32);
    }

    /// The tests of each.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[(u32, u32)]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, &end)| &self.tests[begin as usize..end as usize])
    }
}

/// A stage as columns.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    /// The columns.
    pub(super) columns: Vec<Column>,
    /// The entries that can hold.
    pub(super) entries: Entries,
    /// For each entry, its exit as an index into `exits`.
    pub(super) exit_of: Vec<u32>,
    /// The distinct exits, what is counted there included, each by an entry that has it.
    pub(super) exits: Vec<Entry>,
    /// What finding a structure for it may take.
    pub(super) room: Room,
}

/// A value from which on a set holds (true) or does not any more, by its number.
pub(super) type Event = (u128, u32, bool);

/// A run of values, from `start` to before the next run's, that no set tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first value.
    pub(super) start: u128,
    /// The class.
    pub(super) class: u32,
}

impl Problem {
    /// A stage's entries as columns, or some of them; the last one's cube always holds. `None` if they are more columns
    /// than there is room for.
    pub(super) fn new(selector: &Selector<'_>, entries: &[Entry], room: Room) -> Option<Problem> {
        let classifier = selector.classifier;
        let mut problem = Problem {
            columns: Vec::new(),
            entries: Entries::with_capacity(entries.len(), TESTS),
            exit_of: Vec::with_capacity(entries.len()),
            exits: Vec::with_capacity(entries.len()),
            room,
        };
        let mut known = Known { entries: entries.len(), ..Known::default() };
        let mut exit_of: FastMap<(&Exit, &[Count]), u32> =
            FastMap::with_capacity_and_hasher(entries.len(), Default::default());
        let mut tests: Vec<(u32, u32)> = Vec::new();
        for &entry in entries {
            let data = &classifier.entries[entry];
            tests.clear();
            let mut possible = true;
            let mut devices: Vec<(Field, IntervalSet)> = Vec::new();
            for test in data.cube.tests() {
                let device = matches!(test.field, Field::InDevice | Field::OutDevice);
                let (mask, values) = if device {
                    let classes = selector.device_classes(test);
                    if let Some((_, known)) = devices.iter_mut().find(|(field, _)| *field == test.field) {
                        *known = known.intersect(&classes);
                    } else {
                        devices.push((test.field, classes));
                    }
                    continue;
                } else {
                    let bits = selector.slot(test.field).bits(test.field.bits(classifier.family));
                    let mask = test.mask & max_value(bits);
                    let within = test.values.intervals().last().is_none_or(|last| last.hi() <= mask);
                    let values = if within {
                        test.values.clone()
                    } else {
                        test.values.intersect(&IntervalSet::range(0, mask))
                    };
                    (mask, values)
                };
                possible &= !values.is_empty();
                tests.push(problem.predicate(selector, &mut known, test.field, mask, values));
            }
            for (field, classes) in devices {
                possible &= !classes.is_empty();
                let mask = u128::from(u16::MAX);
                tests.push(problem.predicate(selector, &mut known, field, mask, classes));
            }
            if problem.columns.len() > room.columns {
                return None;
            }
            if !possible {
                continue;
            }
            tests.sort_unstable();
            let exit = *exit_of.entry((&data.exit, &data.counts)).or_insert_with(|| {
                problem.exits.push(entry);
                problem.exits.len() as u32 - 1
            });
            problem.exit_of.push(exit);
            problem.entries.push(&tests);
            if data.cube.is_all() {
                break;
            }
        }
        Some(problem)
    }

    fn predicate(
        &mut self,
        selector: &Selector<'_>,
        known: &mut Known,
        field: Field,
        mask: u128,
        values: IntervalSet,
    ) -> (u32, u32) {
        let place = known.columns.iter().position(|&column| column == (field, mask));
        let column = place.unwrap_or_else(|| {
            known.columns.push((field, mask));
            let slot = selector.slot(field);
            let bits = (128 - mask.leading_zeros()) as u8;
            let field_bits = match field {
                Field::InDevice | Field::OutDevice => 16,
                field => slot.bits(field.bits(selector.classifier.family)),
            };
            let field = Masked { slot, mask, field_bits, bits: bits.max(1) };
            self.columns.push(Column { field, predicates: Vec::with_capacity(known.entries) });
            known.predicates.push(Predicates::with_capacity(known.entries));
            known.columns.len() - 1
        });
        let predicates = &mut self.columns[column].predicates;
        (column as u32, known.predicates[column].number(predicates, values))
    }
}

/// What a problem has so far: the fields and masks of its columns, and the sets of each.
#[derive(Default)]
struct Known {
    /// Entries of the stage, and so sets of a column at the most.
    entries: usize,
    columns: Vec<(Field, u128)>,
    predicates: Vec<Predicates>,
}

/// No set.
const NONE: u32 = u32::MAX;

/// The sets of a column, by hash.
struct Predicates {
    /// The last set with that hash.
    last: FastMap<u64, u32>,
    /// For each set, the one before it with the same hash.
    before: Vec<u32>,
}

impl Predicates {
    /// None, with room for so many.
    fn with_capacity(predicates: usize) -> Predicates {
        let last = FastMap::with_capacity_and_hasher(predicates, Default::default());
        Predicates { last, before: Vec::with_capacity(predicates) }
    }

    /// The number of a set among a column's, to which it is added if it is new.
    fn number(&mut self, predicates: &mut Vec<IntervalSet>, values: IntervalSet) -> u32 {
        let mut hasher = Same::default();
        values.hash(&mut hasher);
        let last = self.last.entry(hasher.finish()).or_insert(NONE);
        let mut at = *last;
        while at != NONE {
            if predicates[at as usize] == values {
                return at;
            }
            at = self.before[at as usize];
        }
        let number = predicates.len() as u32;
        self.before.push(std::mem::replace(last, number));
        predicates.push(values);
        number
    }
}

impl Column {
    /// Where sets begin to hold (true) and end to, ascending by value.
    pub(super) fn events(&self) -> Vec<Event> {
        let top = self.top();
        let events = || {
            (0..).zip(&self.predicates).flat_map(move |(predicate, set)| {
                set.intervals().iter().flat_map(move |interval| {
                    let ends = (interval.hi() < top).then(|| (interval.hi() + 1, predicate, false));
                    std::iter::once((interval.lo(), predicate, true)).chain(ends)
                })
            })
        };
        if self.field.bits <= 32 {
            // As one number each, they are sorted in half the time.
            let pack = |(value, predicate, begins): Event| {
                (value as u64) << 32 | u64::from(predicate) << 1 | u64::from(begins)
            };
            let mut packed: Vec<u64> = Vec::with_capacity(2 * self.predicates.len());
            packed.extend(events().map(pack));
            packed.sort_unstable();
            let unpack = |event: u64| (u128::from(event >> 32), event as u32 >> 1, event & 1 != 0);
            return packed.into_iter().map(unpack).collect();
        }
        let mut events: Vec<Event> = events().collect();
        events.sort_unstable();
        events
    }

    /// The largest value.
    pub(super) fn top(&self) -> u128 {
        max_value(self.field.bits)
    }
}

impl Selector<'_> {
    /// The classes of devices for which a test of a device's name holds.
    pub(super) fn device_classes(&self, test: &polc_ir::cube::Test) -> IntervalSet {
        (1..self.keys.class_values.len())
            .filter(|&class| test.holds(self.keys.class_values[class]))
            .map(|class| Interval::point(class as u128))
            .collect()
    }
}
