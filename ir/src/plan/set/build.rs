//! Building a set's table: its shape from its elements, and its words, each key in one of its two buckets.
//!
//! A key that finds both buckets full moves another to that one's other bucket (Pagh and Rodler, "Cuckoo hashing").
//! With four slots a bucket that fills tables to well above what is asked of them here; should a key find no place all
//! the same, the table gets larger. The same elements give the same words.

use super::{
    COUNT_WORD, Contents, HEADER_WORDS, Key, SLOTS, SetShape, SetTable, USED_WORD, cell_dimension,
    level_start, live_starts, path,
};
use crate::hook::Family;
use crate::limits::{SET_CELLS_MAX, SET_ELEMENTS_MAX, SET_LEVELS_MAX};
use crate::set::{
    DIMENSIONS_MAX, DimensionKind, Pattern, SetContents, SetData, patterns, patterns_count, widths,
};

/// Slots of a table that does not change, for 100 cells.
const FIXED_ROOM: usize = 118;
/// Slots of a table that changes, for 100 cells: in nearly all cases a new key finds a free one.
const LIVE_ROOM: usize = 160;
/// Cells that a live table has room for beyond twice those it starts with.
const LIVE_CELLS_MIN: usize = 65_536;

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
    let mut levels: Vec<[u8; DIMENSIONS_MAX]> = Vec::new();
    // How many different cells there are, or a few more: elements are in order of their lengths, and mostly of their
    // values, so neighbours that share a cell are together.
    let (mut cells, mut last) = (0usize, None);
    let mut count = 0u128;
    for element in elements.iter() {
        count = count.saturating_add(patterns_count(data, family, &element));
        if count > SET_ELEMENTS_MAX as u128 {
            return Err("its ranges are too many elements");
        }
        patterns(data, family, &element, &mut |Pattern { mut values, mut lengths, .. }| {
            lengths[cell] = starts[usize::from(lengths[cell])];
            let behind = widths[cell] - lengths[cell];
            values[cell] = values[cell].checked_shr(behind.into()).unwrap_or(0);
            let at = (lengths, values);
            if last.is_none_or(|last| last != at) {
                cells += 1;
                if last.is_none_or(|(last, _)| last != lengths) && !levels.contains(&lengths) {
                    levels.push(lengths);
                }
                last = Some(at);
            }
        });
        if levels.len() > SET_LEVELS_MAX {
            return Err("its prefixes have too many different lengths");
        }
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
        buckets: 1,
    };
    let cells = cells.max(1);
    let room = if data.live {
        let room = (2 * cells).max(LIVE_CELLS_MIN).min(data.elements_max.max(cells));
        room * LIVE_ROOM
    } else {
        cells * FIXED_ROOM
    };
    shape.buckets = (room / 100).div_ceil(SLOTS).max(1) as u32;
    if shape.buckets as usize * SLOTS > SET_CELLS_MAX {
        return Err("it is too large");
    }
    Ok(shape)
}

/// The table of a set that has the shape.
pub fn build(data: &SetData, family: Family, shape: &SetShape) -> SetTable {
    let mut shape = shape.clone();
    loop {
        if let Some(table) = try_build(data, family, &shape) {
            return table;
        }
        shape.buckets += shape.buckets / 4 + 1;
    }
}

fn try_build(data: &SetData, family: Family, shape: &SetShape) -> Option<SetTable> {
    let mut builder = Builder {
        shape,
        words: vec![0; shape.words()],
        moves: 0,
        key_words: shape.key_words(),
        slot_words: shape.slot_words(),
        contents: Contents::default(),
    };
    for bits in 0..32 {
        builder.words[usize::from(bits)] = path(bits);
    }
    let SetContents::Elements(elements) = &data.contents else { return None };
    let mut fits = true;
    let mut batch: Vec<Pattern> = Vec::with_capacity(BATCH);
    for element in elements.iter() {
        patterns(data, family, &element, &mut |pattern| {
            batch.push(pattern);
            if batch.len() == BATCH {
                fits &= builder.add_all(&batch);
                batch.clear();
            }
        });
        if !fits {
            return None;
        }
    }
    if !builder.add_all(&batch) {
        return None;
    }
    builder.words[COUNT_WORD] = builder.contents.count;
    Some(SetTable { shape: shape.clone(), words: builder.words, contents: builder.contents })
}

struct Builder<'a> {
    shape: &'a SetShape,
    words: Vec<u64>,
    /// Counts moves: which slot of a bucket gives way.
    moves: usize,
    key_words: usize,
    slot_words: usize,
    contents: Contents,
}

/// Keys that may give way for one.
const MOVES_MAX: usize = 1_000;

/// Patterns whose buckets are brought into the cache together: a large table is not in it, and loads that do not wait
/// for one another overlap.
const BATCH: usize = 16;

/// Where a key is, or a slot that is free for it.
enum Found {
    Key(usize),
    Free(usize),
    Nothing,
}

/// Where a pattern goes: it, its level, its key and its bit, and the key's buckets.
type Placed<'p> = (&'p Pattern, (usize, Key, u32), [usize; 2]);

impl Builder<'_> {
    /// Adds patterns; false if there is no room.
    fn add_all(&mut self, patterns: &[Pattern]) -> bool {
        let place = |pattern| {
            let located = self.shape.locate(pattern).expect("the shape has every element's level");
            (pattern, located, self.shape.places(&located.1.words))
        };
        let placed: Vec<Placed<'_>> = patterns.iter().map(place).collect();
        let touched = placed.iter().flat_map(|(_, _, places)| places);
        std::hint::black_box(touched.fold(0, |sum, &bucket| sum ^ self.words[self.shape.slot(bucket, 0)]));
        placed.into_iter().all(|placed| self.add(placed))
    }

    /// Adds a pattern, unless it is there; false if there is no room.
    fn add(&mut self, (pattern, (level, key, bit), places): Placed<'_>) -> bool {
        let slot = match self.find(&key, places) {
            Found::Key(slot) => slot,
            Found::Free(slot) => self.put(slot, &key),
            Found::Nothing => match self.make_room(places) {
                Some(slot) => self.put(slot, &key),
                None => return false,
            },
        };
        let cell = slot + self.key_words;
        if self.words[cell] >> bit & 1 == 1 {
            return true;
        }
        self.words[cell] |= 1 << bit;
        if pattern.nomatch {
            self.words[cell + 1] |= 1 << bit;
        }
        self.words[USED_WORD] |= 1 << level;
        self.contents.add(pattern);
        true
    }

    /// A bucket's slots.
    fn slots(&self, bucket: usize) -> impl Iterator<Item = usize> + use<> {
        let first = HEADER_WORDS + bucket * SLOTS * self.slot_words;
        (first..).step_by(self.slot_words).take(SLOTS)
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

    /// Makes a slot of two full buckets free.
    fn make_room(&mut self, places: [usize; 2]) -> Option<usize> {
        // A chain of slots, each to be filled from the next, until one is free.
        let mut chain: Vec<usize> = Vec::new();
        let mut bucket = places[self.moves % 2];
        for _ in 0..MOVES_MAX {
            self.moves += 1;
            let slot = self.shape.slot(bucket, (self.moves.wrapping_mul(0x9e37_79b9) >> 16) % SLOTS);
            if chain.contains(&slot) {
                continue;
            }
            chain.push(slot);
            let [first, second] = self.shape.places(&self.words[slot..]);
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
