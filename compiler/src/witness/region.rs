//! Regions: what packets can be like under tests of any masks, one field at a time.
//!
//! A [`Cube`](polc_ir::cube::Cube) sees that two tests of a field exclude each other only if they have the same mask. A
//! region also knows which bits of a field every value has, and asks of each test whether its values leave one with those
//! bits. So a field under tests that share no bits is exact; where several tests share bits, `settle` searches
//! for a value. What a write did to a field is undone exactly: `(value & !clear) ^ xor` moves from the value to
//! the test's mask and another `xor`, whatever values the test has.

use std::borrow::Cow;

use polc_ir::cube::Test;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::{IntervalSet, max_value};
use polc_ir::ruleset::Write;

use super::random::Random;

/// Bits that a search for a field's value decides at the most.
const GUESSES_MAX: usize = 1 << 12;
/// Values that are told apart of what a demand leaves out.
const HOLES_MAX: usize = 16;

/// Whether `(field & mask) ^ xor` lies in `values`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Literal<'a> {
    pub(super) field: Field,
    pub(super) mask: u128,
    pub(super) xor: u128,
    pub(super) values: &'a IntervalSet,
}

/// What becomes of a test, or of something made of tests, before a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before<T> {
    /// It is as good as this one.
    Asks(T),
    /// It holds or fails whatever the packet is like.
    Known(bool),
}

impl<'a> Literal<'a> {
    pub(super) fn new(test: &'a Test) -> Literal<'a> {
        Literal { field: test.field, mask: test.mask, xor: 0, values: &test.values }
    }

    /// The test before a write.
    pub(super) fn before(self, write: &Write) -> Before<Literal<'a>> {
        if write.field != self.field {
            return Before::Asks(self);
        }
        let mask = self.mask & !write.clear;
        let xor = self.xor ^ (write.xor & self.mask);
        if mask == 0 {
            return Before::Known(self.values.contains(xor));
        }
        Before::Asks(Literal { mask, xor, ..self })
    }
}

/// That a field's masked value, with some bits inverted, lies in a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Demand<'a> {
    mask: u128,
    xor: u128,
    values: Cow<'a, IntervalSet>,
}

/// What is known of a field.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Part<'a> {
    field: Field,
    /// Bits that all values have in common, and those bits. Bits beyond the field's width are known to be 0.
    known: u128,
    value: u128,
    /// By mask and `xor`, each pair once. None follows from the known bits alone.
    demands: Vec<Demand<'a>>,
}

/// What packets are like: fields in order, without those of which nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) struct Region<'a> {
    parts: Vec<Part<'a>>,
}

/// Values whose bits under a mask are these.
#[derive(Clone, Copy)]
struct Fixed {
    mask: u128,
    value: u128,
}

impl Fixed {
    /// The smallest such value from `from` on.
    fn first_from(self, from: u128) -> Option<u128> {
        let differing = (from ^ self.value) & self.mask;
        if differing == 0 {
            return Some(from);
        }
        let at = differing.ilog2();
        let upto = |bit: u32| u128::MAX >> (127 - bit);
        let below = |kept: u128, bit: u32| kept & !upto(bit) | self.value & self.mask & upto(bit);
        if self.value >> at & 1 == 1 {
            return Some(below(from, at));
        }
        // A free bit above has to grow for it.
        let free = !self.mask & !from & !upto(at);
        (free != 0).then(|| {
            let bit = free.trailing_zeros();
            below(from, bit) | 1 << bit
        })
    }

    /// The largest such value up to `upto`.
    fn last_upto(self, upto: u128) -> Option<u128> {
        let mirrored = Fixed { mask: self.mask, value: !self.value };
        mirrored.first_from(!upto).map(|value| !value)
    }
}

/// The smallest value of a set from `from` on.
fn first_inside(values: &IntervalSet, from: u128) -> Option<u128> {
    let intervals = values.intervals();
    let at = intervals.partition_point(|interval| interval.hi() < from);
    intervals.get(at).map(|interval| interval.lo().max(from))
}

/// The smallest number from `from` on that is not in a set.
fn first_outside(values: &IntervalSet, from: u128) -> Option<u128> {
    let intervals = values.intervals();
    let at = intervals.partition_point(|interval| interval.hi() < from);
    match intervals.get(at) {
        // Between intervals there is a gap.
        Some(interval) if interval.lo() <= from => interval.hi().checked_add(1),
        _ => Some(from),
    }
}

/// The largest value of a set up to `upto`.
fn last_inside(values: &IntervalSet, upto: u128) -> Option<u128> {
    let intervals = values.intervals();
    let after = intervals.partition_point(|interval| interval.lo() <= upto);
    after.checked_sub(1).map(|at| intervals[at].hi().min(upto))
}

/// A number that two rules both lead from to itself, found by following them in turn.
fn common(
    mut at: u128,
    one: impl Fn(u128) -> Option<u128>,
    other: impl Fn(u128) -> Option<u128>,
) -> Option<u128> {
    loop {
        let next = one(at)?;
        at = other(next)?;
        if at == next {
            return Some(at);
        }
    }
}

/// The smallest and the largest value of a set with these bits.
fn ends(values: &IntervalSet, fixed: Fixed) -> Option<(u128, u128)> {
    let first = common(0, |from| fixed.first_from(from), |from| first_inside(values, from))?;
    let last = common(u128::MAX, |upto| fixed.last_upto(upto), |upto| last_inside(values, upto))?;
    Some((first, last))
}

impl<'a> Part<'a> {
    fn new(field: Field, family: Family) -> Part<'a> {
        Part { field, known: !max_value(field.bits(family)), value: 0, demands: Vec::new() }
    }

    /// Whether nothing is known.
    fn is_free(&self, family: Family) -> bool {
        self.demands.is_empty() && self.known & max_value(self.field.bits(family)) == 0
    }

    /// What is known of a field's value under a mask, with these bits inverted.
    fn fixed(&self, mask: u128, xor: u128) -> Fixed {
        Fixed { mask: !mask | self.known, value: self.value & mask ^ xor }
    }

    /// What is asked of it under the same mask.
    fn demand(&self, mask: u128, xor: u128) -> Result<usize, usize> {
        self.demands.binary_search_by(|own| (own.mask, own.xor).cmp(&(mask, xor)))
    }

    /// Whether a value with the known bits satisfies, or does not, a literal and what was asked under its mask before.
    fn leaves(&self, literal: &Literal<'_>, holds: bool) -> bool {
        let fixed = self.fixed(literal.mask, literal.xor);
        let own = self.demand(literal.mask, literal.xor).ok().map(|at| &self.demands[at].values);
        let next = if holds { first_inside } else { first_outside };
        let asked = |from| own.map_or(Some(from), |own| first_inside(own, from));
        let fixed = |from| common(from, |from| fixed.first_from(from), asked);
        common(0, fixed, |from| next(literal.values, from)).is_some()
    }

    /// Asks for one thing more; false if that leaves nothing.
    fn and(&mut self, mask: u128, xor: u128, values: Cow<'a, IntervalSet>) -> bool {
        match self.demand(mask, xor) {
            Ok(at) => {
                let own = &mut self.demands[at].values;
                *own = Cow::Owned(own.intersect(&values));
            }
            Err(at) => self.demands.insert(at, Demand { mask, xor, values }),
        }
        self.settle()
    }

    /// Works out which bits are known; false if a demand leaves nothing.
    fn settle(&mut self) -> bool {
        loop {
            let before = self.known;
            let mut at = 0;
            while at < self.demands.len() {
                let Demand { mask, xor, .. } = self.demands[at];
                let fixed = self.fixed(mask, xor);
                let Some((first, last)) = ends(&self.demands[at].values, fixed) else { return false };
                let differing = first ^ last;
                let open = if differing == 0 { 0 } else { u128::MAX >> differing.leading_zeros() };
                let told = mask & !open;
                self.known |= told;
                self.value = self.value & !told | (first ^ xor) & told;
                let (fixed, values) = (self.fixed(mask, xor), &self.demands[at].values);
                let missing = common(0, |from| fixed.first_from(from), |from| first_outside(values, from));
                let lasting = missing.is_some();
                if lasting {
                    at += 1;
                } else {
                    self.demands.remove(at);
                }
            }
            if self.known == before {
                return true;
            }
        }
    }

    /// A value, at random but for what is asked; `Ok(None)` if there is none, an error if the search became too long.
    fn pick(&self, random: &mut Random) -> Result<Option<u128>, TooLong> {
        /// One bit that was guessed, and the part as it was before, if the other value is still to be tried.
        struct Guess<'a> {
            bit: u128,
            is_set: bool,
            before: Part<'a>,
        }
        let mut guesses: Vec<Guess<'a>> = Vec::new();
        let mut part = self.clone();
        let mut left = GUESSES_MAX;
        let mut holds = part.settle();
        loop {
            if !holds {
                // The last guess was wrong.
                let Some(Guess { bit, is_set, before }) = guesses.pop() else { return Ok(None) };
                part = before;
                holds = part.guess(bit, !is_set);
                continue;
            }
            let open = part.demands.iter().fold(0, |bits, demand| bits | demand.mask) & !part.known;
            if open == 0 {
                let free = !part.known;
                return Ok(Some(part.value & part.known | random.next_u128() & free));
            }
            left = left.checked_sub(1).ok_or(TooLong)?;
            let bit = 1 << open.ilog2();
            let is_set = random.one_in(2);
            guesses.push(Guess { bit, is_set, before: part.clone() });
            holds = part.guess(bit, is_set);
        }
    }

    fn guess(&mut self, bit: u128, is_set: bool) -> bool {
        self.known |= bit;
        self.value = self.value & !bit | if is_set { bit } else { 0 };
        self.settle()
    }

    /// Whether demands share bits, so that each may have values while no value has all.
    fn is_tangled(&self) -> bool {
        let mut asked = 0;
        self.demands.iter().any(|demand| {
            let shares = asked & demand.mask != 0;
            asked |= demand.mask;
            shares
        })
    }
}

/// A search was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// A part that has both in it: what bits they share, and their values under no mask as far as `intervals_max` go.
fn join<'a>(one: Part<'a>, other: &Part<'a>, intervals_max: usize, family: Family) -> Option<Part<'a>> {
    let full = max_value(one.field.bits(family));
    let values = |part: &Part<'_>| match part.demand(full, 0) {
        Ok(at) => part.demands[at].values.clone().into_owned(),
        Err(_) => IntervalSet::range(part.value, part.value | !part.known),
    };
    let mut both = values(&one).union(&values(other));
    if let [first, .., last] = both.intervals()
        && both.intervals().len() > intervals_max
    {
        both = IntervalSet::range(first.lo(), last.hi());
    }
    let known = one.known & other.known & !(one.value ^ other.value);
    let mut joined = Part { field: one.field, known, value: one.value & known, demands: Vec::new() };
    let holds = joined.and(full, 0, Cow::Owned(both));
    debug_assert!(holds, "both have values");
    (!joined.is_free(family)).then_some(joined)
}

impl<'a> Region<'a> {
    fn part(&self, field: Field) -> Option<&Part<'a>> {
        let at = self.parts.binary_search_by_key(&field, |part| part.field).ok()?;
        Some(&self.parts[at])
    }

    /// The number of a field's part, which is made if there is none.
    fn place(&mut self, field: Field, family: Family) -> usize {
        self.parts.binary_search_by_key(&field, |part| part.field).unwrap_or_else(|at| {
            self.parts.insert(at, Part::new(field, family));
            at
        })
    }

    /// The fields of which something is known.
    pub(super) fn fields(&self) -> impl Iterator<Item = Field> {
        self.parts.iter().map(|part| part.field)
    }

    /// Whether a packet may be like this for which the literal holds, or fails. True may be wrong where literals of other
    /// masks share bits.
    pub(super) fn leaves(&self, literal: &Literal<'_>, holds: bool, family: Family) -> bool {
        match self.part(literal.field) {
            Some(part) => part.leaves(literal, holds),
            None => Part::new(literal.field, family).leaves(literal, holds),
        }
    }

    /// Narrows the region to where the literal holds, or fails; false if that leaves nothing.
    #[must_use]
    pub(super) fn and(&mut self, literal: &Literal<'a>, holds: bool, family: Family) -> bool {
        let field = literal.field;
        if literal.mask == 0 {
            return literal.values.contains(literal.xor) == holds;
        }
        let at = self.place(field, family);
        let values = if holds {
            Cow::Borrowed(literal.values)
        } else {
            Cow::Owned(literal.values.complement(field.bits(family)))
        };
        let leaves = self.parts[at].and(literal.mask, literal.xor, values);
        if self.parts[at].is_free(family) {
            self.parts.remove(at);
        }
        leaves
    }

    /// Narrows the region to where both are; false if that leaves nothing.
    #[must_use]
    pub(super) fn and_region(&mut self, other: &Region<'a>, family: Family) -> bool {
        other.parts.iter().all(|part| {
            let at = self.place(part.field, family);
            let own = &mut self.parts[at];
            if (own.value ^ part.value) & own.known & part.known != 0 {
                return false;
            }
            own.known |= part.known;
            own.value |= part.value;
            own.settle()
                && part.demands.iter().all(|demand| own.and(demand.mask, demand.xor, demand.values.clone()))
        })
    }

    /// The region where a field has one of these values; `None` if nothing is there.
    pub(super) fn narrowed(&self, field: Field, values: IntervalSet, family: Family) -> Option<Region<'a>> {
        let mut narrower = self.clone();
        let at = narrower.place(field, family);
        narrower.parts[at].and(max_value(field.bits(family)), 0, Cow::Owned(values)).then_some(narrower)
    }

    /// The region before a write; `None` if none leads here.
    pub(super) fn before(mut self, write: &Write, family: Family) -> Option<Region<'a>> {
        let Ok(at) = self.parts.binary_search_by_key(&write.field, |part| part.field) else {
            return Some(self);
        };
        let part = self.parts.remove(at);
        let full = max_value(write.field.bits(family));
        if (part.value ^ write.xor) & part.known & write.clear & full != 0 {
            return None;
        }
        let known = part.known & !(write.clear & full);
        let mut before = Part {
            field: part.field,
            known,
            value: (part.value ^ write.xor & full) & known,
            demands: Vec::new(),
        };
        for demand in part.demands {
            let mask = demand.mask & !write.clear;
            let xor = demand.xor ^ (write.xor & demand.mask);
            if mask == 0 {
                if !demand.values.contains(xor) {
                    return None;
                }
            } else if !before.and(mask, xor, demand.values) {
                return None;
            }
        }
        if !before.is_free(family) {
            self.parts.insert(at, before);
        }
        Some(self)
    }

    /// What is sure of the region behind a write.
    pub(super) fn behind(mut self, write: &Write, family: Family) -> Region<'a> {
        let full = max_value(write.field.bits(family));
        let mut part = match self.parts.binary_search_by_key(&write.field, |part| part.field) {
            Ok(at) => self.parts.remove(at),
            Err(_) => Part::new(write.field, family),
        };
        part.known |= write.clear & full;
        part.value = write.apply(part.value) & part.known;
        part.demands.clear();
        if !part.is_free(family) {
            let at = self.parts.partition_point(|own| own.field < part.field);
            self.parts.insert(at, part);
        }
        self
    }

    /// Widens the region to one that has the other in it, as near as a bounded number of intervals tells.
    pub(super) fn join(&mut self, other: &Region<'a>, intervals_max: usize, family: Family) {
        let parts = std::mem::take(&mut self.parts);
        self.parts = parts
            .into_iter()
            .filter_map(|part| {
                let other = other.part(part.field)?;
                join(part, other, intervals_max, family)
            })
            .collect();
    }

    /// Fields that are asked for under masks that share bits.
    pub(super) fn tangled(&self) -> impl Iterator<Item = Field> {
        self.parts.iter().filter(|part| part.is_tangled()).map(|part| part.field)
    }

    /// The masks under which something is asked, by field.
    pub(super) fn masks(&self) -> impl Iterator<Item = (Field, u128)> {
        self.parts.iter().flat_map(|part| part.demands.iter().map(|demand| (part.field, demand.mask)))
    }

    /// What fields must not be under masks for which `asked` holds, where that is few values: field, mask and value.
    pub(super) fn holes(&self, asked: &dyn Fn(Field, u128) -> bool) -> Vec<(Field, u128, u128)> {
        let mut holes = Vec::new();
        for part in &self.parts {
            for Demand { mask, xor, values } in &part.demands {
                if !asked(part.field, *mask) {
                    continue;
                }
                let fixed = part.fixed(*mask, *xor);
                let missing =
                    |from| common(from, |from| fixed.first_from(from), |from| first_outside(values, from));
                let next = |last: &u128| last.checked_add(1).and_then(missing);
                let all: Vec<u128> = std::iter::successors(missing(0), next).take(HOLES_MAX + 1).collect();
                if all.len() <= HOLES_MAX {
                    holes.extend(all.into_iter().map(|value| (part.field, *mask, (value ^ xor) & mask)));
                }
            }
        }
        holes
    }

    /// A value of a field, at random but for what is known; `None` if there is none.
    pub(super) fn pick(
        &self,
        field: Field,
        family: Family,
        random: &mut Random,
    ) -> Result<Option<u128>, TooLong> {
        match self.part(field) {
            Some(part) => part.pick(random),
            None => Part::new(field, family).pick(random),
        }
    }
}

#[cfg(test)]
mod tests {
    use polc_ir::interval::Interval;

    use super::*;

    const FAMILY: Family = Family::V4;
    /// A field of eight bits, all of whose values are looked at.
    const FIELD: Field = Field::Tos;

    fn values(random: &mut Random) -> IntervalSet {
        let one = |random: &mut Random| {
            let lo = random.below(256) as u128;
            let hi = if random.one_in(2) { lo } else { lo + random.below(40) as u128 };
            Interval::new(lo, hi.min(255)).expect("ordered")
        };
        let set: IntervalSet = (0..1 + random.below(3)).map(|_| one(random)).collect();
        if random.one_in(3) { set.complement(8) } else { set }
    }

    fn mask(random: &mut Random) -> u128 {
        match random.below(4) {
            0 => 0xff,
            1 => 1 << random.below(8),
            _ => 1 + random.below(255) as u128,
        }
    }

    fn holds(literal: &Literal<'_>, value: u128) -> bool {
        literal.values.contains(value & literal.mask ^ literal.xor)
    }

    fn has(region: &Region<'_>, value: u128) -> bool {
        region.narrowed(FIELD, IntervalSet::point(value), FAMILY).is_some()
    }

    /// A region has the values for which all of its tests hold; what it leaves, and what it picks, are among them.
    #[test]
    fn regions_agree_with_values_one_by_one() {
        let mut random = Random::new(1);
        for _ in 0..3_000 {
            let sets: Vec<IntervalSet> = (0..1 + random.below(4)).map(|_| values(&mut random)).collect();
            let literals: Vec<(Literal<'_>, bool)> = sets
                .iter()
                .map(|values| {
                    let (mask, xor) =
                        (mask(&mut random), if random.one_in(2) { 0 } else { random.below(256) as u128 });
                    (Literal { field: FIELD, mask, xor, values }, random.one_in(2))
                })
                .collect();
            let (last, asked) = literals.split_last().expect("there is one");
            let mut region = Region::default();
            let narrowed = asked.iter().all(|(literal, wanted)| region.and(literal, *wanted, FAMILY));
            let all = |value: &u128| asked.iter().all(|(literal, wanted)| holds(literal, *value) == *wanted);
            let left: Vec<u128> = (0..256).filter(all).collect();
            if !narrowed {
                assert_eq!(left, [], "{asked:?}");
                continue;
            }
            assert!((0..256).all(|value| has(&region, value) == left.contains(&value)), "{asked:?}");
            let picked = region.pick(FIELD, FAMILY, &mut random).expect("eight bits are few");
            assert!(picked.map_or(left.is_empty(), |picked| left.contains(&picked)), "{asked:?}: {picked:?}");
            for wanted in [false, true] {
                let leaves = region.leaves(&last.0, wanted, FAMILY);
                let is_left = left.iter().any(|value| holds(&last.0, *value) == wanted);
                // One mask at a time is exact.
                assert!(
                    if asked.is_empty() { leaves == is_left } else { leaves || !is_left },
                    "{literals:?}"
                );
            }
        }
    }

    #[test]
    fn writes_are_undone_value_by_value() {
        let mut random = Random::new(2);
        for _ in 0..2_000 {
            let sets = [values(&mut random), values(&mut random)];
            let literals = sets.each_ref().map(|values| Literal {
                field: FIELD,
                mask: mask(&mut random),
                xor: 0,
                values,
            });
            let write = Write { field: FIELD, clear: mask(&mut random), xor: random.below(256) as u128 };
            let mut behind = Region::default();
            if !literals.iter().all(|literal| behind.and(literal, true, FAMILY)) {
                continue;
            }
            let expected = |value: u128| literals.iter().all(|literal| holds(literal, write.apply(value)));
            let before = behind.clone().before(&write, FAMILY);
            let found = |value: u128| before.as_ref().is_some_and(|before| has(before, value));
            assert!((0..256).all(|value| expected(value) == found(value)), "{literals:?} before {write:?}");
            for literal in &literals {
                match literal.before(&write) {
                    Before::Known(holds_always) => {
                        assert!((0..256).all(|value| holds(literal, write.apply(value)) == holds_always));
                    }
                    Before::Asks(before) => {
                        assert!(
                            (0..256).all(|value| holds(literal, write.apply(value)) == holds(&before, value))
                        );
                    }
                }
            }
            // What is sure behind a write has all that comes of it.
            let region = behind.clone().behind(&write, FAMILY);
            let come = (0..256).filter(|value| has(&behind, *value));
            assert!(come.map(|value| write.apply(value)).all(|value| has(&region, value)));
        }
    }

    #[test]
    fn joined_regions_have_both() {
        let mut random = Random::new(3);
        for _ in 0..2_000 {
            let sets = [values(&mut random), values(&mut random)];
            let [one, other] = sets.each_ref().map(|values| {
                let mut region = Region::default();
                let literal = Literal { field: FIELD, mask: mask(&mut random), xor: 0, values };
                region.and(&literal, true, FAMILY).then_some(region)
            });
            let (Some(one), Some(other)) = (one, other) else { continue };
            let mut both = one.clone();
            both.join(&other, 1 + random.below(3), FAMILY);
            assert!((0..256).all(|value| has(&both, value) || !has(&one, value) && !has(&other, value)));
        }
    }

    #[test]
    fn the_widest_field_has_no_overflow() {
        let top = IntervalSet::point(u128::MAX);
        let literal = Literal { field: Field::InDevice, mask: u128::MAX, xor: 0, values: &top };
        let mut region = Region::default();
        assert!(region.leaves(&literal, true, FAMILY) && region.leaves(&literal, false, FAMILY));
        assert!(region.and(&literal, true, FAMILY));
        assert_eq!(region.pick(Field::InDevice, FAMILY, &mut Random::new(1)), Ok(Some(u128::MAX)));
        assert!(!region.leaves(&literal, false, FAMILY));
        assert!(!region.and(&literal, false, FAMILY));
    }
}
