//! Tests and cubes: the one kind of pure test, and conjunctions of it.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use crate::field::Field;
use crate::hook::Family;
use crate::interval::{IntervalSet, max_value};

/// Whether `field & mask` lies in `values`.
///
/// The mask selects bits of the field; it is all ones of the field's width for a plain test. A contiguous prefix is
/// written as a range under the full mask, so a mask other than all ones means a test that no range can express.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Test {
    /// What is tested.
    pub field: Field,
    /// Which bits of it.
    pub mask: u128,
    /// The masked values for which the test holds.
    pub values: IntervalSet,
}

impl Test {
    /// Whether the whole field lies in `values`.
    pub fn new(field: Field, family: Family, values: IntervalSet) -> Test {
        Test { field, mask: max_value(field.bits(family)), values }
    }

    /// Whether `field & mask == value & mask`. A mask that is a prefix becomes a range under the full mask; a mask of
    /// 0 always holds.
    pub fn masked(field: Field, family: Family, value: u128, mask: u128) -> Test {
        let bits = field.bits(family);
        let full = max_value(bits);
        let (value, mask) = (value & mask & full, mask & full);
        let low = full & !mask;
        if low & low.wrapping_add(1) == 0 {
            Test { field, mask: full, values: IntervalSet::range(value, value | low) }
        } else {
            Test { field, mask, values: IntervalSet::point(value) }
        }
    }

    /// The test that holds exactly where this one doesn't. Values that the mask makes impossible stay out.
    pub fn negated(&self, family: Family) -> Test {
        let bits = self.field.bits(family);
        Test { values: self.values.complement(bits), ..self.clone() }
    }

    /// Whether the test holds for this field value.
    pub fn holds(&self, value: u128) -> bool {
        self.values.contains(value & self.mask)
    }

    /// Whether the test holds for every value of the field.
    pub fn is_always(&self, family: Family) -> bool {
        let top = self.mask & max_value(self.field.bits(family));
        self.values.intervals().first().is_some_and(|first| first.lo() == 0 && first.hi() >= top)
    }
}

/// Prints as `dst_port in {0x50}` or `src & 0xff00ff in {0xa}`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mask & self.mask.wrapping_add(1) == 0 {
            write!(f, "{} in {}", self.field, self.values)
        } else {
            write!(f, "{} & {:#x} in {}", self.field, self.mask, self.values)
        }
    }
}

/// Tests that a cube has room for once it has any, and by how many the room grows.
const FIRST_TESTS: usize = 4;
const MORE_TESTS: usize = 2;

/// Lists of tests of which each is kept once, however many rules have it.
#[derive(Debug, Default)]
pub struct TestLists {
    lists: HashSet<Arc<[Test]>>,
}

impl TestLists {
    /// The list of these tests.
    pub fn list(&mut self, tests: &[Test]) -> Arc<[Test]> {
        if let Some(known) = self.lists.get(tests) {
            return known.clone();
        }
        let list: Arc<[Test]> = tests.into();
        self.lists.insert(list.clone());
        list
    }
}

/// A conjunction of tests, at most one for each field and mask, sorted by them. Without tests it always holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cube {
    tests: Vec<Test>,
}

impl Cube {
    /// The cube that always holds.
    pub fn all() -> Cube {
        Cube::default()
    }

    /// The tests, sorted by field, then mask.
    pub fn tests(&self) -> &[Test] {
        &self.tests
    }

    /// Whether the cube always holds because it tests nothing.
    pub fn is_all(&self) -> bool {
        self.tests.is_empty()
    }

    /// Narrows the cube by one more test. Returns false, and leaves the cube in an unspecified state, if nothing can
    /// satisfy both.
    #[must_use]
    pub fn and(&mut self, test: &Test, family: Family) -> bool {
        if test.is_always(family) {
            return true;
        }
        let place = self.tests.binary_search_by(|have| (have.field, have.mask).cmp(&(test.field, test.mask)));
        match place {
            Ok(at) => {
                let both = self.tests[at].values.intersect(&test.values);
                let empty = both.is_empty();
                self.tests[at].values = both;
                !empty
            }
            Err(at) => {
                if self.tests.len() == self.tests.capacity() {
                    // Cubes are many and stay small: what doubling would hold ready is most of their memory.
                    self.tests.reserve_exact(if self.tests.is_empty() { FIRST_TESTS } else { MORE_TESTS });
                }
                self.tests.insert(at, test.clone());
                !test.values.is_empty()
            }
        }
    }

    /// The cube of both, or `None` where no value satisfies some field and mask of both.
    pub fn intersect(&self, other: &Cube, family: Family) -> Option<Cube> {
        let mut both = self.clone();
        for test in &other.tests {
            if !both.and(test, family) {
                return None;
            }
        }
        Some(both)
    }

    /// Has it ask nothing of a field.
    pub fn forget(&mut self, field: Field) {
        self.tests.retain(|test| test.field != field);
    }

    /// Whether every value that satisfies `other` satisfies this cube, judged field by field (sufficient; under
    /// several masks of one field not necessary).
    pub fn is_superset(&self, other: &Cube) -> bool {
        // Both are sorted: what the other asks before this one's next test is passed over.
        let mut others = other.tests.iter();
        self.tests.len() <= other.tests.len()
            && self.tests.iter().all(|test| {
                others
                    .find(|own| (own.field, own.mask) == (test.field, test.mask))
                    .is_some_and(|narrower| test.values.is_superset(&narrower.values))
            })
    }

    /// The test of a field under a mask.
    pub fn test(&self, field: Field, mask: u128) -> Option<&Test> {
        // There are few, so that looking at all takes less than searching.
        self.tests.iter().find(|have| have.field == field && have.mask == mask)
    }

    /// Whether the cube holds for a packet whose fields `value` gives.
    pub fn holds(&self, mut value: impl FnMut(Field) -> u128) -> bool {
        self.tests.iter().all(|test| test.holds(value(test.field)))
    }
}

/// The tests have to be sorted by field, then mask, each pair once.
impl FromIterator<Test> for Cube {
    fn from_iter<I: IntoIterator<Item = Test>>(tests: I) -> Cube {
        let tests: Vec<Test> = tests.into_iter().collect();
        debug_assert!(tests.is_sorted_by_key(|test| (test.field, test.mask)), "tests are in order");
        Cube { tests }
    }
}

/// Prints as `proto in {0x6}, dst_port in {0x50}`; the cube that always holds prints as `any`.
impl fmt::Display for Cube {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.tests.is_empty() {
            return f.write_str("any");
        }
        for (index, test) in self.tests.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{test}")?;
        }
        Ok(())
    }
}
