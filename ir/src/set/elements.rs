//! A set's elements, kept by dimension: a million addresses are eight megabytes, and none of them is an allocation.

use std::fmt;
use std::sync::{Arc, OnceLock};

use smallvec::SmallVec;

use super::{DIMENSIONS_MAX, DimensionValue, Index};
use crate::interval::Interval;

/// An element: one value for each dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// One value for each dimension, in the type's order.
    pub values: SmallVec<[DimensionValue; DIMENSIONS_MAX]>,
    /// The element takes what it covers out of the set.
    pub nomatch: bool,
}

/// Elements in the order the kernel looks them up, so the first that covers a packet decides: for `net` dimensions
/// longer prefixes come first (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`). Copies share the elements.
#[derive(Clone, Default)]
pub struct Elements(Arc<Shared>);

#[derive(Default)]
struct Shared {
    list: ElementList,
    /// Made when a large set is first asked.
    index: OnceLock<Index>,
}

impl Elements {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.list.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element at a place; panics beyond the end.
    pub fn get(&self, at: usize) -> Element {
        self.0.list.get(at)
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = Element> {
        (0..self.len()).map(|at| self.get(at))
    }

    /// The addresses of the element at a place, if addresses are all it has, and whether it is `nomatch`.
    pub(super) fn addresses(&self, at: usize) -> Option<(Interval, bool)> {
        let list = &self.0.list;
        let interval = match &list.columns[..] {
            [Column::Short(short)] => address(short[at]),
            [Column::Long(long)] => long[at],
            _ => return None,
        };
        Some((interval, list.nomatch.get(at).copied().unwrap_or(false)))
    }

    /// What finds the element that covers a packet, made when it is first asked for.
    pub(super) fn index(&self, make: impl FnOnce() -> Index) -> &Index {
        self.0.index.get_or_init(make)
    }
}

impl From<ElementList> for Elements {
    fn from(list: ElementList) -> Elements {
        Elements(Arc::new(Shared { list, index: OnceLock::new() }))
    }
}

impl From<Vec<Element>> for Elements {
    fn from(elements: Vec<Element>) -> Elements {
        let mut list = ElementList::default();
        elements.iter().for_each(|element| list.push(&element.values, element.nomatch));
        list.into()
    }
}

impl PartialEq for Elements {
    fn eq(&self, other: &Elements) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.iter().eq(other.iter())
    }
}

impl Eq for Elements {}

impl fmt::Debug for Elements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Elements that are being put together.
#[derive(Clone, Debug, Default)]
pub struct ElementList {
    len: usize,
    columns: SmallVec<[Column; DIMENSIONS_MAX]>,
    /// Which are `nomatch`; empty as long as none is.
    nomatch: Vec<bool>,
}

/// The values of one dimension.
#[derive(Clone, Debug)]
enum Column {
    /// Addresses of 32 bits, lowest and highest.
    Short(Vec<(u32, u32)>),
    /// Addresses.
    Long(Vec<Interval>),
    /// A protocol or both, lowest and highest port.
    Ports(Vec<(Option<u8>, u16, u16)>),
    /// Any values.
    Any(Vec<DimensionValue>),
}

impl ElementList {
    /// Adds an element behind the others, which have as many dimensions.
    pub fn push(&mut self, values: &[DimensionValue], nomatch: bool) {
        if self.len == 0 {
            self.columns = values.iter().map(Column::for_value).collect();
        }
        assert_eq!(self.columns.len(), values.len(), "elements of a set have the same dimensions");
        for (column, value) in self.columns.iter_mut().zip(values) {
            column.push(value);
        }
        if nomatch || !self.nomatch.is_empty() {
            self.nomatch.resize(self.len, false);
            self.nomatch.push(nomatch);
        }
        self.len += 1;
    }

    /// Adds the elements of another list behind its own.
    pub fn append(&mut self, other: ElementList) {
        if self.len == 0 {
            *self = other;
            return;
        }
        assert_eq!(self.columns.len(), other.columns.len(), "elements of a set have the same dimensions");
        if !self.nomatch.is_empty() || !other.nomatch.is_empty() {
            self.nomatch.resize(self.len, false);
            self.nomatch.extend(other.nomatch);
            self.nomatch.resize(self.len + other.len, false);
        }
        for (column, other) in self.columns.iter_mut().zip(other.columns) {
            column.append(other);
        }
        self.len += other.len;
    }

    fn get(&self, at: usize) -> Element {
        Element {
            values: self.columns.iter().map(|column| column.get(at)).collect(),
            nomatch: self.nomatch.get(at).copied().unwrap_or(false),
        }
    }
}

impl Column {
    fn for_value(value: &DimensionValue) -> Column {
        match value {
            DimensionValue::Address(_) => Column::Short(Vec::new()),
            DimensionValue::Port { .. } => Column::Ports(Vec::new()),
            _ => Column::Any(Vec::new()),
        }
    }

    fn push(&mut self, value: &DimensionValue) {
        match (&mut *self, *value) {
            (Column::Short(short), DimensionValue::Address(interval)) => {
                match (u32::try_from(interval.lo()), u32::try_from(interval.hi())) {
                    (Ok(lo), Ok(hi)) => short.push((lo, hi)),
                    _ => {
                        let mut long: Vec<Interval> = short.iter().map(|ends| address(*ends)).collect();
                        long.push(interval);
                        *self = Column::Long(long);
                    }
                }
            }
            (Column::Long(long), DimensionValue::Address(interval)) => long.push(interval),
            (Column::Ports(list), DimensionValue::Port { proto, ports }) => {
                list.push((proto, ports.lo() as u16, ports.hi() as u16));
            }
            (Column::Any(values), value) => values.push(value),
            (Column::Short(_) | Column::Long(_) | Column::Ports(_), _) => {
                panic!("elements of a set have the same dimensions")
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Column::Short(short) => short.len(),
            Column::Long(long) => long.len(),
            Column::Ports(list) => list.len(),
            Column::Any(values) => values.len(),
        }
    }

    fn append(&mut self, other: Column) {
        match (&mut *self, other) {
            (Column::Short(own), Column::Short(other)) => own.extend(other),
            (Column::Long(own), Column::Long(other)) => own.extend(other),
            (Column::Ports(own), Column::Ports(other)) => own.extend(other),
            (Column::Any(own), Column::Any(other)) => own.extend(other),
            (own, other) => (0..other.len()).for_each(|at| own.push(&other.get(at))),
        }
    }

    fn get(&self, at: usize) -> DimensionValue {
        match self {
            Column::Short(short) => DimensionValue::Address(address(short[at])),
            Column::Long(long) => DimensionValue::Address(long[at]),
            Column::Ports(list) => {
                let (proto, lo, hi) = list[at];
                DimensionValue::Port { proto, ports: between(lo.into(), hi.into()) }
            }
            Column::Any(values) => values[at],
        }
    }
}

fn address((lo, hi): (u32, u32)) -> Interval {
    between(lo.into(), hi.into())
}

fn between(lo: u128, hi: u128) -> Interval {
    Interval::new(lo, hi).expect("it was made of an interval")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_comes_out() {
        let range = |lo, hi| DimensionValue::Address(Interval::new(lo, hi).unwrap());
        let port = |proto, lo, hi| DimensionValue::Port { proto, ports: Interval::new(lo, hi).unwrap() };
        let element = |values: [DimensionValue; 3], nomatch| Element { values: values.into(), nomatch };
        let elements = vec![
            element([range(1, 2), port(Some(6), 80, 90), DimensionValue::Mac(7)], false),
            element([range(3, 3), port(None, 0, 65_535), DimensionValue::Mac(8)], true),
            // Addresses become long, and an element behind one that is `nomatch` is none.
            element([range(4, u128::MAX), port(Some(17), 1, 1), DimensionValue::Mac(9)], false),
            element([range(5, 5), port(Some(1), 0x800, 0x800), DimensionValue::Mac(1)], false),
        ];
        let list = Elements::from(elements.clone());
        assert_eq!(list.iter().collect::<Vec<_>>(), elements);
        let mut joined = ElementList::default();
        for part in elements.chunks(1) {
            let mut one = ElementList::default();
            one.push(&part[0].values, part[0].nomatch);
            joined.append(one);
        }
        assert_eq!(Elements::from(joined), list);
        assert_ne!(Elements::from(elements[1..].to_vec()), list);
    }
}
