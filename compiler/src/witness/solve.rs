//! Whether a packet can be like one thing and like none of others, and what it is like then.
//!
//! What has to hold is a [`Region`]; what must not is a list of *clauses*, tests that must not hold together. A test that
//! cannot hold in the region settles its clause, one that always holds is no way out of it, and a clause with one
//! way out narrows the region, which is repeated until nothing changes. Then a clause with the fewest ways out is
//! branched on, the branches having nothing in common. (Davis, Logemann, Loveland: A machine program for theorem-proving,
//! 1962, with tests in place of variables.) Work is counted in tests that are looked at, so that equal questions get equal
//! answers everywhere.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::LazyLock;

use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::{IntervalSet, max_value};
use polc_ir::ruleset::Write;
use smallvec::SmallVec;

use super::random::Random;
use super::region::{Before, Literal, Region, TooLong};

/// Work that is left to do, in tests looked at.
#[derive(Debug)]
pub(super) struct Budget {
    left: usize,
}

impl Budget {
    pub(super) fn new(tests: usize) -> Budget {
        Budget { left: tests }
    }

    pub(super) fn left(&self) -> usize {
        self.left
    }

    pub(super) fn spend(&mut self, tests: usize) -> Result<(), TooLong> {
        self.left = self.left.checked_sub(tests).ok_or(TooLong).inspect_err(|_| self.left = 0)?;
        Ok(())
    }
}

/// Tests of which at least one has to fail.
pub(super) type Clause<'a> = Rc<[Literal<'a>]>;

/// What a packet has to be like, and what it must not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Problem<'a> {
    pub(super) region: Region<'a>,
    pub(super) clauses: Vec<Clause<'a>>,
}

/// The fields that changed since clauses were looked at; `None` if they never were.
type Changed = Option<SmallVec<[Field; 4]>>;

/// What a clause asks of a region.
enum Asked<'a> {
    /// One of its tests cannot hold.
    Nothing,
    /// What cannot be: all of its tests always hold.
    TooMuch,
    /// That this test fails.
    One(Literal<'a>),
    /// That one of several fails: all of the clause's, or these.
    Several(Option<Clause<'a>>),
}

fn asked<'a>(clause: &Clause<'a>, region: &Region<'a>, family: Family) -> Asked<'a> {
    let mut open: SmallVec<[Literal<'a>; 8]> = SmallVec::new();
    for literal in clause.iter() {
        if !region.leaves(literal, true, family) {
            return Asked::Nothing;
        }
        if region.leaves(literal, false, family) {
            open.push(*literal);
        }
    }
    match open[..] {
        [] => Asked::TooMuch,
        [one] => Asked::One(one),
        _ => Asked::Several((open.len() < clause.len()).then(|| open[..].into())),
    }
}

impl<'a> Problem<'a> {
    /// Narrows the region to what the clauses leave of it, and leaves out those that ask nothing more; false if nothing
    /// is left.
    pub(super) fn propagate(&mut self, family: Family, budget: &mut Budget) -> Result<bool, TooLong> {
        self.propagate_from(None, family, budget)
    }

    fn propagate_from(
        &mut self,
        mut changed: Changed,
        family: Family,
        budget: &mut Budget,
    ) -> Result<bool, TooLong> {
        loop {
            let mut next: SmallVec<[Field; 4]> = SmallVec::new();
            let mut kept = Vec::with_capacity(self.clauses.len());
            for clause in std::mem::take(&mut self.clauses) {
                let is_touched = |changed: &[Field]| clause.iter().any(|own| changed.contains(&own.field));
                budget.spend(1)?;
                if changed.as_ref().is_some_and(|changed| !is_touched(changed) && !is_touched(&next)) {
                    kept.push(clause);
                    continue;
                }
                budget.spend(clause.len())?;
                match asked(&clause, &self.region, family) {
                    Asked::Nothing => {}
                    Asked::TooMuch => return Ok(false),
                    Asked::One(literal) => {
                        if !self.region.and(&literal, false, family) {
                            return Ok(false);
                        }
                        if !next.contains(&literal.field) {
                            next.push(literal.field);
                        }
                    }
                    Asked::Several(open) => kept.push(open.unwrap_or(clause)),
                }
            }
            self.clauses = kept;
            if next.is_empty() {
                return Ok(true);
            }
            changed = Some(next);
        }
    }

    /// The same before writes, in the order in which they are done; `None` if they lead to nothing that is asked for.
    pub(super) fn before(&self, writes: &[Write], family: Family) -> Option<Problem<'a>> {
        let mut before = self.clone();
        for write in writes.iter().rev() {
            before.region = before.region.before(write, family)?;
            let mut clauses = Vec::with_capacity(before.clauses.len());
            for clause in before.clauses {
                if clause.iter().all(|literal| literal.field != write.field) {
                    clauses.push(clause);
                    continue;
                }
                let mut literals = Vec::with_capacity(clause.len());
                let mut is_settled = false;
                for literal in clause.iter() {
                    match literal.before(write) {
                        Before::Asks(literal) => literals.push(literal),
                        Before::Known(true) => {}
                        Before::Known(false) => is_settled = true,
                    }
                }
                if is_settled {
                    continue;
                }
                if literals.is_empty() {
                    return None;
                }
                clauses.push(literals.into());
            }
            before.clauses = clauses;
        }
        Some(before)
    }

    /// Has clauses ask of single bits what they ask of several that other tests share. Whether a test
    /// fails is then the question of one bit, as in the branches that other clauses lead to.
    fn split(&mut self, family: Family) {
        static ZERO: LazyLock<IntervalSet> = LazyLock::new(|| IntervalSet::point(0));
        let mut masks: BTreeMap<Field, Vec<u128>> = BTreeMap::new();
        let literals = self.clauses.iter().flat_map(|clause| clause.iter());
        let asked = literals.map(|literal| (literal.field, literal.mask)).chain(self.region.masks());
        for (field, mask) in asked {
            let own = masks.entry(field).or_default();
            if !own.contains(&mask) {
                own.push(mask);
            }
        }
        let is_split = |field: Field, mask: u128| {
            mask.count_ones() > 1
                && mask != max_value(field.bits(family))
                && masks
                    .get(&field)
                    .is_some_and(|own| own.iter().any(|other| *other != mask && other & mask != 0))
        };
        // A value under a mask, bit by bit.
        let bits =
            |field: Field, mask: u128, value: u128| {
                (0..u128::BITS)
                    .map(move |bit| mask & 1 << bit)
                    .filter(|bit| *bit != 0)
                    .map(move |mask| Literal { field, mask, xor: value & mask, values: &ZERO })
            };
        let mut clauses = Vec::with_capacity(self.clauses.len());
        for clause in std::mem::take(&mut self.clauses) {
            let of_bits = |literal: &Literal<'_>| {
                let point = literal.values.as_point().filter(|_| is_split(literal.field, literal.mask))?;
                // Bits beyond the mask that differ make it a test that never holds.
                Some(point ^ literal.xor).filter(|value| value & !literal.mask == 0)
            };
            if clause.iter().all(|literal| of_bits(literal).is_none()) {
                clauses.push(clause);
                continue;
            }
            let mut split: Vec<Literal<'a>> = Vec::new();
            for literal in clause.iter() {
                match of_bits(literal) {
                    Some(value) => split.extend(bits(literal.field, literal.mask, value)),
                    None => split.push(*literal),
                }
            }
            clauses.push(split.into());
        }
        // What is asked for but for a few values is as good as a clause for each.
        for (field, mask, value) in self.region.holes(&is_split) {
            clauses.push(bits(field, mask, value).collect());
        }
        self.clauses = clauses;
    }
}

/// A part of what is left to search, and what of it changed since it was looked at.
#[derive(Debug)]
struct Branch<'a> {
    problem: Problem<'a>,
    changed: Changed,
}

/// A search for regions in which everything is like a problem asks, one after another; they have nothing in common.
#[derive(Debug)]
pub(super) struct Search<'a> {
    family: Family,
    left: Vec<Branch<'a>>,
}

impl<'a> Search<'a> {
    pub(super) fn new(mut problem: Problem<'a>, family: Family) -> Search<'a> {
        problem.split(family);
        Search { family, left: vec![Branch { problem, changed: None }] }
    }

    /// The next region; `None` if there is no other.
    pub(super) fn next(
        &mut self,
        budget: &mut Budget,
        random: &mut Random,
    ) -> Result<Option<Region<'a>>, TooLong> {
        while let Some(Branch { mut problem, changed }) = self.left.pop() {
            if !problem.propagate_from(changed, self.family, budget)? {
                continue;
            }
            let fewest = (0..problem.clauses.len()).min_by_key(|at| problem.clauses[*at].len());
            let Some(fewest) = fewest else {
                if self.has_values(&problem.region, random)? {
                    return Ok(Some(problem.region));
                }
                continue;
            };
            let clause = problem.clauses.swap_remove(fewest);
            budget.spend(clause.len() * (1 + problem.clauses.len()))?;
            self.branch(problem, &clause);
        }
        Ok(None)
    }

    /// Goes on where the first test of a clause fails, where it holds and the second fails, and so on; the first first.
    fn branch(&mut self, mut rest: Problem<'a>, clause: &Clause<'a>) {
        let first = self.left.len();
        let mut changed = SmallVec::new();
        for literal in clause.iter() {
            if !changed.contains(&literal.field) {
                changed.push(literal.field);
            }
            let mut problem = rest.clone();
            if problem.region.and(literal, false, self.family) {
                self.left.push(Branch { problem, changed: Some(changed.clone()) });
            }
            if !rest.region.and(literal, true, self.family) {
                break;
            }
        }
        self.left[first..].reverse();
    }

    /// Whether each field has a value that is as asked under all masks at once.
    fn has_values(&self, region: &Region<'a>, random: &mut Random) -> Result<bool, TooLong> {
        for field in region.tangled() {
            if region.pick(field, self.family, random)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use polc_ir::interval::Interval;

    use super::*;

    const FAMILY: Family = Family::V4;
    const FIELDS: [Field; 2] = [Field::Tos, Field::ExtHeaders];
    const ENOUGH: usize = 1 << 24;

    /// Sets of values, some of which leave out one.
    fn sets(random: &mut Random) -> Vec<IntervalSet> {
        let set = |random: &mut Random| match random.below(6) {
            0 => IntervalSet::range(random.below(128) as u128, 128 + random.below(128) as u128),
            1 => IntervalSet::point(random.below(256) as u128).complement(8),
            2 => [random.below(256), random.below(256)]
                .map(|value| Interval::point(value as u128))
                .into_iter()
                .collect(),
            _ => IntervalSet::point(random.below(4) as u128 * 0x11),
        };
        (0..32).map(|_| set(random)).collect()
    }

    fn literal<'a>(sets: &'a [IntervalSet], random: &mut Random) -> Literal<'a> {
        let field = FIELDS[usize::from(random.one_in(4))];
        let full = max_value(field.bits(FAMILY));
        let mask = if random.one_in(4) { full } else { (1 + random.below(255) as u128) & full };
        let mask = if mask == 0 { full } else { mask };
        Literal { field, mask, xor: 0, values: &sets[random.below(sets.len())] }
    }

    /// A search finds every packet that fits, each in one region, and no other.
    #[test]
    fn searches_agree_with_packets_one_by_one() {
        let mut random = Random::new(1);
        for _ in 0..300 {
            let sets = sets(&mut random);
            let count = 1 + random.below(12);
            let clauses: Vec<Clause<'_>> = (0..count)
                .map(|_| (0..1 + random.below(3)).map(|_| literal(&sets, &mut random)).collect())
                .collect();
            let fits = |packet: [u128; 2]| {
                let holds = |literal: &Literal<'_>| {
                    literal.values.contains(packet[usize::from(literal.field == FIELDS[1])] & literal.mask)
                };
                clauses.iter().all(|clause| !clause.iter().all(holds))
            };
            let all = || (0..256).flat_map(|tos| (0..4).map(move |headers| [tos, headers]));
            let problem = Problem { region: Region::default(), clauses: clauses.clone() };
            let mut search = Search::new(problem, FAMILY);
            let mut budget = Budget::new(ENOUGH);
            let mut found = BTreeSet::new();
            while let Some(region) = search.next(&mut budget, &mut random).expect("it is small") {
                let has = |packet: &[u128; 2]| {
                    let narrowed = region.narrowed(FIELDS[0], IntervalSet::point(packet[0]), FAMILY);
                    narrowed.is_some_and(|one| {
                        one.narrowed(FIELDS[1], IntervalSet::point(packet[1]), FAMILY).is_some()
                    })
                };
                for packet in all().filter(has) {
                    assert!(found.insert(packet), "{packet:?} is in two regions: {clauses:?}");
                }
            }
            let expected: BTreeSet<[u128; 2]> = all().filter(|packet| fits(*packet)).collect();
            assert_eq!(found, expected, "{clauses:?}");
        }
    }

    /// Which of rules that ask for three bits of 24 can match: hard enough that trying values finds too few, and no
    /// more than some hundred thousand tests to find out.
    #[test]
    fn many_clauses_of_scattered_bits_are_decided() {
        const BITS: usize = 24;
        let mut random = Random::new(2);
        let zero = IntervalSet::point(0);
        let mut clauses: Vec<Clause<'_>> = Vec::new();
        let (mut taken, mut hidden) = (0, 0);
        for _ in 0..150 {
            let mut mask = 0u128;
            while mask.count_ones() < 3 {
                mask |= 1 << random.below(BITS);
            }
            let own = Literal { field: Field::SrcAddr, mask, xor: random.next_u128() & mask, values: &zero };
            let mut region = Region::default();
            assert!(region.and(&own, true, FAMILY));
            let problem = Problem { region, clauses: clauses.clone() };
            let mut budget = Budget::new(1 << 19);
            let found =
                Search::new(problem, FAMILY).next(&mut budget, &mut random).expect("it does not take long");
            if let Some(region) = found {
                let value = region.pick(Field::SrcAddr, FAMILY, &mut random).expect("bits are known");
                let value = value.expect("a region has values");
                let holds = |literal: &Literal<'_>| value & literal.mask ^ literal.xor == 0;
                assert!(holds(&own) && clauses.iter().all(|clause| !clause.iter().all(holds)));
                taken += 1;
            } else {
                hidden += 1;
            }
            clauses.push([own].into());
        }
        assert!(taken > 90 && hidden > 40, "{taken} {hidden}");
    }
}
