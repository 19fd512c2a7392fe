//! Sets of unsigned integers as sorted, disjoint, closed intervals.
//!
//! Every pure test of the IR asks whether a (masked) field value lies in an [`IntervalSet`]. A set rather than one
//! interval, because negation, port lists and address lists then stay one test: nothing is expanded into a cross
//! product before a pass decides to.

use std::fmt;

use smallvec::{SmallVec, smallvec};

/// A closed interval `lo..=hi`, never empty.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interval {
    lo: u128,
    hi: u128,
}

impl Interval {
    /// The interval `lo..=hi`; `None` if it is empty.
    pub fn new(lo: u128, hi: u128) -> Option<Interval> {
        (lo <= hi).then_some(Interval { lo, hi })
    }

    /// The interval that holds `value` alone.
    pub fn point(value: u128) -> Interval {
        Interval { lo: value, hi: value }
    }

    /// The smallest value.
    pub fn lo(self) -> u128 {
        self.lo
    }

    /// The largest value.
    pub fn hi(self) -> u128 {
        self.hi
    }

    /// Whether `value` lies inside.
    pub fn contains(self, value: u128) -> bool {
        self.lo <= value && value <= self.hi
    }

    /// The values in both.
    pub fn intersect(self, other: Interval) -> Option<Interval> {
        Interval::new(self.lo.max(other.lo), self.hi.min(other.hi))
    }
}

/// The largest value of an integer `bits` wide.
///
/// # Panics
/// If `bits` is 0 or above 128.
pub fn max_value(bits: u8) -> u128 {
    assert!((1..=128).contains(&bits), "fields are 1 to 128 bits wide");
    u128::MAX >> (128 - u32::from(bits))
}

/// A set of values: sorted, disjoint intervals with a gap between neighbours, so that equal sets are equal values.
/// Nearly all sets are one interval, which takes no memory of its own.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct IntervalSet {
    intervals: Intervals,
}

type Intervals = SmallVec<[Interval; 1]>;

impl IntervalSet {
    /// The set without values.
    pub fn empty() -> IntervalSet {
        IntervalSet::default()
    }

    /// All values of an integer `bits` wide.
    pub fn full(bits: u8) -> IntervalSet {
        IntervalSet { intervals: smallvec![Interval { lo: 0, hi: max_value(bits) }] }
    }

    /// The set that holds `value` alone.
    pub fn point(value: u128) -> IntervalSet {
        IntervalSet { intervals: smallvec![Interval::point(value)] }
    }

    /// The values `lo..=hi`; empty if `lo > hi`.
    pub fn range(lo: u128, hi: u128) -> IntervalSet {
        IntervalSet { intervals: Interval::new(lo, hi).into_iter().collect() }
    }

    /// The intervals, ascending.
    pub fn intervals(&self) -> &[Interval] {
        &self.intervals
    }

    /// Whether no value is inside.
    pub fn is_empty(&self) -> bool {
        self.intervals.is_empty()
    }

    /// Whether every value of an integer `bits` wide is inside.
    pub fn is_full(&self, bits: u8) -> bool {
        self.intervals[..] == [Interval { lo: 0, hi: max_value(bits) }]
    }

    /// The only value, if there is exactly one.
    pub fn as_point(&self) -> Option<u128> {
        match self.intervals[..] {
            [Interval { lo, hi }] if lo == hi => Some(lo),
            _ => None,
        }
    }

    /// Whether `value` is inside.
    pub fn contains(&self, value: u128) -> bool {
        let after = self.intervals.partition_point(|interval| interval.lo <= value);
        after > 0 && self.intervals[after - 1].hi >= value
    }

    /// Whether every value of `other` is inside.
    pub fn is_superset(&self, other: &IntervalSet) -> bool {
        if let ([outer], [inner]) = (&self.intervals[..], &other.intervals[..]) {
            return outer.lo <= inner.lo && inner.hi <= outer.hi;
        }
        other.intervals.iter().all(|inner| {
            let after = self.intervals.partition_point(|outer| outer.lo <= inner.lo);
            after > 0 && self.intervals[after - 1].hi >= inner.hi
        })
    }

    /// The values in both.
    pub fn intersect(&self, other: &IntervalSet) -> IntervalSet {
        let (mut left, mut right) = (self.intervals.iter().peekable(), other.intervals.iter().peekable());
        let mut intervals = Intervals::new();
        while let (Some(&&a), Some(&&b)) = (left.peek(), right.peek()) {
            intervals.extend(a.intersect(b));
            if a.hi < b.hi {
                left.next();
            } else {
                right.next();
            }
        }
        IntervalSet { intervals }
    }

    /// Whether a value is in both.
    pub fn intersects(&self, other: &IntervalSet) -> bool {
        if let ([a], [b]) = (&self.intervals[..], &other.intervals[..]) {
            return a.lo <= b.hi && b.lo <= a.hi;
        }
        let (mut left, mut right) = (self.intervals.iter().peekable(), other.intervals.iter().peekable());
        while let (Some(&&a), Some(&&b)) = (left.peek(), right.peek()) {
            if a.intersect(b).is_some() {
                return true;
            }
            if a.hi < b.hi {
                left.next();
            } else {
                right.next();
            }
        }
        false
    }

    /// The values in either.
    pub fn union(&self, other: &IntervalSet) -> IntervalSet {
        self.intervals.iter().chain(&other.intervals).copied().collect()
    }

    /// The values of an integer `bits` wide that are not inside.
    pub fn complement(&self, bits: u8) -> IntervalSet {
        let mut intervals = Intervals::new();
        let mut next = Some(0u128);
        for interval in &self.intervals {
            if let Some(lo) = next
                && let Some(below) = interval.lo.checked_sub(1)
            {
                intervals.extend(Interval::new(lo, below));
            }
            next = interval.hi.checked_add(1);
        }
        if let Some(lo) = next {
            intervals.extend(Interval::new(lo, max_value(bits)));
        }
        IntervalSet { intervals }
    }
}

impl FromIterator<Interval> for IntervalSet {
    fn from_iter<I: IntoIterator<Item = Interval>>(iter: I) -> IntervalSet {
        let mut sorted: Intervals = iter.into_iter().collect();
        sorted.sort_unstable();
        let mut intervals = Intervals::new();
        for interval in sorted {
            match intervals.last_mut() {
                Some(last) if interval.lo <= last.hi.saturating_add(1) => last.hi = last.hi.max(interval.hi),
                _ => intervals.push(interval),
            }
        }
        IntervalSet { intervals }
    }
}

impl From<Interval> for IntervalSet {
    fn from(interval: Interval) -> IntervalSet {
        IntervalSet { intervals: smallvec![interval] }
    }
}

impl fmt::Debug for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lo == self.hi {
            write!(f, "{:#x}", self.lo)
        } else {
            write!(f, "{:#x}-{:#x}", self.lo, self.hi)
        }
    }
}

impl fmt::Debug for IntervalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Prints as `{0x50, 0x1bb-0x1bc}`.
impl fmt::Display for IntervalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (index, interval) in self.intervals.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{interval}")?;
        }
        f.write_str("}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every subset of a 4-bit field, checked against plain bit operations.
    #[test]
    fn operations_agree_with_bit_sets() {
        let set = |bits: u16| -> IntervalSet {
            (0..16u32)
                .filter(|value| bits >> value & 1 == 1)
                .map(|value| Interval::point(value.into()))
                .collect()
        };
        let bits =
            |set: &IntervalSet| (0..16u16).fold(0, |sum, v| sum | u16::from(set.contains(v.into())) << v);
        for a in (0..=u16::MAX).step_by(7) {
            assert_eq!(bits(&set(a)), a);
            assert_eq!(set(a).complement(4), set(!a));
            for b in (0..=u16::MAX).step_by(4099) {
                assert_eq!(set(a).intersect(&set(b)), set(a & b));
                assert_eq!(set(a).union(&set(b)), set(a | b));
                assert_eq!(set(a).is_superset(&set(b)), a & b == b);
                assert_eq!(set(a).intersects(&set(b)), a & b != 0);
            }
        }
    }

    #[test]
    fn the_widest_field_has_no_overflow() {
        let top = IntervalSet::point(u128::MAX);
        assert_eq!(top.complement(128), IntervalSet::range(0, u128::MAX - 1));
        assert_eq!(IntervalSet::full(128).complement(128), IntervalSet::empty());
        assert!(top.union(&top.complement(128)).is_full(128));
    }
}
