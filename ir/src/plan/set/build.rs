//! Building a set's table: its shape from its elements, and its words, each key in one of its two buckets.
//!
//! A key that finds both buckets full moves another to that one's other bucket (Pagh and Rodler, "Cuckoo hashing").
//! With four slots a bucket that fills nearly all of a group. Keys spread over groups as chance has it, so there is room
//! for some more in each than it has on average; should a key find no place all the same, the table gets larger. The
//! same elements give the same words, however many threads there are: each has groups of its own.

use std::ops::Range;

use super::{
    CELL_BITS, COUNT_WORD, Contents, GROUPS_MIN, HEADER_WORDS, Key, MULTIPLIER, SLOTS, SetShape, SetTable,
    USED_WORD, cell_dimension, in_parts, level_start, live_starts, on_threads, parts, path,
};
use crate::hook::Family;
use crate::limits::{SET_CELLS_MAX, SET_ELEMENTS_MAX, SET_LEVELS_MAX};
use crate::set::{
    DIMENSIONS_MAX, DimensionKind, Elements, Pattern, SetContents, SetData, patterns_count, patterns_of,
    widths,
};

/// By how many standard deviations of what chance puts into a group its room exceeds the average. Beyond that are the
/// keys of one group in 3.5 million.
const DEVIATIONS: f64 = 5.0;
/// What part of a group's slots keys fill, without a move failing.
const FILLED: f64 = 0.94;
/// Slots of a table that changes, for 100 cells: in nearly all cases a new key finds a free one.
const LIVE_ROOM: usize = 160;
/// Cells that a live table has room for beyond twice those it starts with.
const LIVE_CELLS_MIN: usize = 65_536;

/// Groups that a table has at least before its groups get larger than need be.
const GROUPS_WANTED: usize = 32;
/// Most pages of a group: 256 KB, which second-level caches hold.
const GROUP_PAGES_MAX: usize = 64;

/// A set's shape, or why it has none.
pub type Shaped = Result<SetShape, &'static str>;

/// The shape of a set's table.
pub fn shape(data: &SetData, family: Family) -> Shaped {
    let SetContents::Elements(elements) = &data.contents else {
        return Err("its elements are not known");
    };
    if data.dimensions.is_empty() {
        return Err("its elements have no parts");
    }
    let cell = cell_dimension(data);
    let widths = widths(data, family);
    let starts: Vec<u8> = (0..=widths[cell]).map(|length| level_start(widths[cell], length)).collect();
    let chunks = in_parts(elements.len().div_ceil(CHUNK), 1, |chunks| {
        let chunk = |at: usize| {
            let places = at * CHUNK..elements.len().min((at + 1) * CHUNK);
            measure(data, family, cell, &starts, elements, places)
        };
        chunks.map(chunk).collect::<Vec<_>>()
    });
    let mut levels: Vec<[u8; DIMENSIONS_MAX]> = Vec::new();
    let (mut count, mut cells) = (0u128, 0);
    for measured in chunks.into_iter().flatten() {
        let measured = measured?;
        count += measured.count;
        cells += measured.cells;
        for level in measured.levels {
            if !levels.contains(&level) {
                levels.push(level);
            }
        }
    }
    if count > SET_ELEMENTS_MAX as u128 {
        return Err(TOO_MANY);
    }
    if levels.len() > SET_LEVELS_MAX {
        return Err(TOO_DIFFERENT);
    }
    if data.live || levels.is_empty() {
        let mut bases = levels.clone();
        let mut longest = widths;
        for (length, dimension) in longest.iter_mut().zip(&data.dimensions) {
            if *dimension == DimensionKind::Address {
                *length = data.netmask.unwrap_or(*length);
            }
        }
        bases.push(longest);
        for mut base in bases {
            for start in live_starts(data, family) {
                base[cell] = start;
                if !levels.contains(&base) && levels.len() < SET_LEVELS_MAX {
                    levels.push(base);
                }
            }
        }
    }
    // The kernel tries longer prefixes first, those of the first dimension before those of the second
    // (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`).
    levels.sort_unstable_by_key(|lengths| {
        let mut order = [0; 2 * DIMENSIONS_MAX];
        for (at, &length) in lengths.iter().enumerate() {
            let prefixes = data.dimensions.get(at) == Some(&DimensionKind::Net);
            order[at + if prefixes { 0 } else { DIMENSIONS_MAX }] = length;
        }
        std::cmp::Reverse(order)
    });
    let mut shape = SetShape {
        widths,
        cell: cell as u8,
        levels,
        nomatch: data.takes_nomatch() && (data.live || elements.iter().any(|element| element.nomatch)),
        live: data.live,
        groups: 1,
        group_pages: 1,
    };
    let cells = cells.max(1);
    let room =
        if data.live { (2 * cells).max(LIVE_CELLS_MIN).min(data.elements_max.max(cells)) } else { cells };
    // Groups enough for every thread to have some, and no larger than that.
    let pages = room.div_ceil(GROUPS_WANTED * shape.slots_count()).next_power_of_two();
    // Of slots so large that few fit into a page.
    let pages_min = if shape.slot_words() > 2 { 2 } else { 1 };
    shape.group_pages = pages.clamp(pages_min, GROUP_PAGES_MAX) as u32;
    let slots = (shape.group_buckets() * SLOTS) as f64;
    // The average is such that it and its deviations are what can be filled.
    let root = (DEVIATIONS.mul_add(DEVIATIONS, 4.0 * FILLED * slots).sqrt() - DEVIATIONS) / 2.0;
    let average = root * root;
    let groups = if data.live {
        ((room * LIVE_ROOM) as f64 / 100.0 / slots).max(room as f64 / average)
    } else if cells as f64 <= FILLED * slots {
        // Chance has nothing to do with one group.
        1.0
    } else {
        cells as f64 / average
    };
    shape.groups = groups.ceil() as u32;
    if shape.slots_count() > SET_CELLS_MAX {
        return Err("it is too large");
    }
    Ok(shape)
}

/// Elements that are measured together. The number of cells depends on it.
const CHUNK: usize = 1 << 16;

const TOO_MANY: &str = "its ranges are too many elements";
const TOO_DIFFERENT: &str = "its prefixes have too many different lengths";

/// What elements take.
struct Measured {
    /// How many patterns they are, or a few more.
    count: u128,
    /// How many different cells there are, or a few more: elements are in order of their lengths, and mostly of their
    /// values, so neighbours that share a cell are together.
    cells: usize,
    /// The levels.
    levels: Vec<[u8; DIMENSIONS_MAX]>,
}

/// Measures elements. `starts` has the start of the level of each length in the cell dimension.
fn measure(
    data: &SetData,
    family: Family,
    cell: usize,
    starts: &[u8],
    elements: &Elements,
    places: Range<usize>,
) -> Result<Measured, &'static str> {
    let width = widths(data, family)[cell];
    let mut measured = Measured { count: 0, cells: 0, levels: Vec::new() };
    let mut last = None;
    let mut give = |Pattern { mut values, mut lengths, .. }: Pattern| {
        lengths[cell] = starts[usize::from(lengths[cell])];
        values[cell] = values[cell].checked_shr((width - lengths[cell]).into()).unwrap_or(0);
        let at = (lengths, values);
        if last.is_none_or(|last| last != at) {
            measured.cells += 1;
            if last.is_none_or(|(last, _)| last != lengths) && !measured.levels.contains(&lengths) {
                measured.levels.push(lengths);
            }
            last = Some(at);
        }
    };
    let mut count = 0u128;
    for at in places {
        count = count.saturating_add(patterns_count(data, family, elements, at));
        if count > SET_ELEMENTS_MAX as u128 {
            return Err(TOO_MANY);
        }
        patterns_of(data, family, elements, at..at + 1, &mut give);
    }
    measured.count = count;
    if measured.levels.len() > SET_LEVELS_MAX {
        return Err(TOO_DIFFERENT);
    }
    Ok(measured)
}

/// The table of a set that has the shape.
pub fn build(data: &SetData, family: Family, shape: &SetShape) -> SetTable {
    let mut shape = shape.clone();
    loop {
        if let Some(table) = try_build(data, family, &shape) {
            return table;
        }
        shape.groups += shape.groups / 8 + 1;
    }
}

fn try_build(data: &SetData, family: Family, shape: &SetShape) -> Option<SetTable> {
    let SetContents::Elements(elements) = &data.contents else { return None };
    let mut words = vec![0; shape.words()];
    let (header, mut rest) = words.split_at_mut(HEADER_WORDS);
    let mut builders = Vec::new();
    for groups in parts(shape.groups as usize, GROUPS_MIN) {
        let own;
        (own, rest) = rest.split_at_mut(groups.len() * shape.group_words());
        builders.push(Builder {
            shape,
            base: HEADER_WORDS + groups.start * shape.group_words(),
            words: own,
            key_words: shape.key_words(),
            slot_words: shape.slot_words(),
            used: 0,
            contents: Contents::default(),
        });
    }
    let built = on_threads(builders, |mut builder| {
        let mut fits = true;
        let mut batch: Vec<Placed> = Vec::with_capacity(BATCH);
        patterns_of(data, family, elements, 0..elements.len(), &mut |pattern| {
            batch.extend(builder.placed(&pattern));
            if batch.len() == BATCH {
                fits = fits && builder.add_all(&batch);
                batch.clear();
            }
        });
        (fits && builder.add_all(&batch)).then_some((builder.used, builder.contents))
    });
    for (bits, word) in (0..1 << CELL_BITS).zip(header.iter_mut()) {
        *word = path(bits);
    }
    let mut contents = Contents::default();
    for part in built {
        let (used, own) = part?;
        header[USED_WORD] |= used;
        contents.join(own);
    }
    header[COUNT_WORD] = contents.count;
    Some(SetTable { shape: shape.clone(), words, contents })
}

/// Builds some of a table's groups.
struct Builder<'a> {
    shape: &'a SetShape,
    /// The groups' words, and which of the table's is their first.
    words: &'a mut [u64],
    base: usize,
    key_words: usize,
    slot_words: usize,
    /// The levels that have cells.
    used: u64,
    contents: Contents,
}

/// Keys that may give way for one.
const MOVES_MAX: usize = 1_000;

/// Patterns whose buckets are brought into the cache together: a large table is not in it, and loads that do not wait
/// for one another overlap.
const BATCH: usize = 16;

/// A pattern and where it goes.
struct Placed {
    level: usize,
    key: Key,
    bit: u32,
    nomatch: bool,
    /// The key's buckets among the builder's words.
    places: [usize; 2],
    /// The pattern alone.
    contents: Contents,
}

/// Where a key is, or a slot that is free for it.
enum Found {
    Key(usize),
    Free(usize),
    Nothing,
}

impl Builder<'_> {
    /// Where a pattern goes, if it is in these groups.
    fn placed(&self, pattern: &Pattern) -> Option<Placed> {
        let (level, key, bit) = self.shape.locate(pattern).expect("the shape has every element's level");
        let places = self.places(&key.words);
        (places[0] < self.words.len()).then(|| {
            let mut contents = Contents::default();
            contents.add(pattern);
            Placed { level, key, bit, nomatch: pattern.nomatch, places, contents }
        })
    }

    /// A key's buckets among these words. A key of other groups is beyond them.
    fn places(&self, key: &[u64]) -> [usize; 2] {
        self.shape.places(key).map(|place| place.wrapping_sub(self.base))
    }

    /// Adds patterns; false if there is no room.
    fn add_all(&mut self, batch: &[Placed]) -> bool {
        let touched = batch.iter().flat_map(|placed| placed.places);
        std::hint::black_box(touched.fold(0, |sum, bucket| sum ^ self.words[bucket]));
        batch.iter().all(|placed| self.add(placed))
    }

    /// Adds a pattern, unless it is there; false if there is no room.
    fn add(&mut self, placed: &Placed) -> bool {
        let Placed { level, key, bit, nomatch, places, contents } = placed;
        let slot = match self.find(key, *places) {
            Found::Key(slot) => slot,
            Found::Free(slot) => self.put(slot, key),
            Found::Nothing => match self.make_room(key, *places) {
                Some(slot) => self.put(slot, key),
                None => return false,
            },
        };
        let cell = slot + self.key_words;
        if self.words[cell] >> bit & 1 == 1 {
            return true;
        }
        self.words[cell] |= 1 << bit;
        if *nomatch {
            self.words[cell + 1] |= 1 << bit;
        }
        self.used |= 1 << level;
        self.contents.join(*contents);
        true
    }

    /// A bucket's slots.
    fn slots(&self, bucket: usize) -> impl Iterator<Item = usize> + use<> {
        (bucket..).step_by(self.slot_words).take(SLOTS)
    }

    /// Where a key is in its buckets, or could go: to the first free slot of the emptier one.
    fn find(&self, key: &Key, places: [usize; 2]) -> Found {
        let mut best = (Found::Nothing, 0);
        for bucket in places {
            let (mut free, mut count) = (Found::Nothing, 0);
            for slot in self.slots(bucket) {
                let first = self.words[slot];
                if first == key.words[0]
                    && (1..self.key_words).all(|at| self.words[slot + at] == key.words[at])
                {
                    return Found::Key(slot);
                }
                if first == 0 {
                    if count == 0 {
                        free = Found::Free(slot);
                    }
                    count += 1;
                }
            }
            if count > best.1 {
                best = (free, count);
            }
        }
        best.0
    }

    /// Writes a key into a free slot. Others move before it comes.
    fn put(&mut self, free: usize, key: &Key) -> usize {
        self.words[free..free + self.key_words].copy_from_slice(&key.words[..self.key_words]);
        free
    }

    /// Makes a slot of a key's two full buckets free.
    fn make_room(&mut self, key: &Key, places: [usize; 2]) -> Option<usize> {
        // A chain of slots, each to be filled from the next, until one is free.
        let mut chain: Vec<usize> = Vec::new();
        // Which slot gives way depends on the key alone, not on what other groups have.
        let mut turn = key.words[0] ^ key.words[1];
        let mut bucket = places[0];
        for _ in 0..MOVES_MAX {
            turn = turn.wrapping_mul(MULTIPLIER).wrapping_add(1);
            let slot = bucket + (turn >> 62) as usize * self.slot_words;
            if chain.contains(&slot) {
                continue;
            }
            chain.push(slot);
            let [first, second] = self.places(&self.words[slot..]);
            let other = if first == bucket { second } else { first };
            if let Some(free) = self.slots(other).find(|slot| self.words[*slot] == 0) {
                let mut to = free;
                for &from in chain.iter().rev() {
                    self.words.copy_within(from..from + self.slot_words, to);
                    to = from;
                }
                self.words[to..to + self.slot_words].fill(0);
                return Some(to);
            }
            bucket = other;
        }
        None
    }
}

const _: () = assert!(HEADER_WORDS > COUNT_WORD && HEADER_WORDS > USED_WORD);
