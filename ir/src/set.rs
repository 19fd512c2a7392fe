//! Sets: what ipset calls a set, as an ordered list of elements over the dimensions of its type.

mod elements;
pub mod port;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::ops::Range;

use cranelift_entity::PrimaryMap;
use serde::{Deserialize, Serialize};

pub use elements::{Element, ElementList, Elements};

use crate::cube::{Cube, Test};
use crate::entities::Set;
use crate::field::{DeviceName, End, Field};
use crate::hook::Family;
use crate::interval::{Interval, IntervalSet, max_value};
use crate::set::port::PortReading;
use crate::source::Span;

/// Most dimensions a set type has: `hash:ip,port,ip`.
pub const DIMENSIONS_MAX: usize = 3;

/// One dimension of a set's type: `hash:net,port` has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DimensionKind {
    /// A host's address (`ip`).
    Address,
    /// A prefix (`net`). Elements of types with such a dimension may be marked `nomatch`.
    Net,
    /// A protocol and a port; for ICMP, the type and code as `type << 8 | code`.
    Port,
    /// A device name (`iface`).
    Device,
    /// A MAC address. Only the source MAC is ever compared (net/netfilter/ipset/ip_set_hash_mac.c).
    Mac,
    /// The packet's mark.
    Mark,
}

/// What an element has in one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DimensionValue {
    /// Addresses from lowest to highest, of hosts or of a prefix.
    Address(Interval),
    /// Ports of one protocol. A protocol of `None` means TCP and UDP alike, as bitmap:port has it
    /// (net/netfilter/ipset/ip_set_bitmap_port.c, `ip_set_get_ip_port`).
    Port {
        /// IP protocol number.
        proto: Option<u8>,
        /// Ports from lowest to highest.
        ports: Interval,
    },
    /// A device by name.
    Device(DeviceName),
    /// A MAC address, in the low 48 bits.
    Mac(u64),
    /// A mark, equal under the set's mark mask.
    Mark {
        /// Bits that count.
        mask: u32,
        /// Their value.
        value: u32,
    },
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetContents {
    /// Elements.
    Elements(Elements),
    /// `list:set`: a packet is in the set if it is in any of these.
    Sets(Vec<Set>),
    /// The set is named by a rule, but its contents were not given.
    Unknown,
}

/// A named set.
#[derive(Clone, Debug)]
pub struct SetData {
    /// The user's name for it.
    pub name: String,
    /// Family of its addresses; `None` where it has none (bitmap:port).
    pub family: Option<Family>,
    /// The type's dimensions, in order. Empty for `list:set` and unknown sets.
    pub dimensions: Vec<DimensionKind>,
    /// How many leading bits of a host's address count (`netmask`, or a `bitmask` that is a prefix).
    pub netmask: Option<u8>,
    /// The bits of a mark that count, where the type has marks.
    pub mark_mask: u32,
    /// Most elements that it may get (`maxelem`; for bitmaps, their range).
    pub elements_max: usize,
    /// Elements leave it by themselves (`timeout`).
    pub expires: bool,
    /// Rules change its elements (`SET --add-set`, `--del-set`).
    pub changed: bool,
    /// Its elements change while a program runs.
    pub live: bool,
    /// Why they can't, if so.
    pub fixed: Option<&'static str>,
    /// What is in it.
    pub contents: SetContents,
    /// The line that creates it, as `ipset save` writes it; empty for sets that are only mentioned.
    pub create: String,
    /// Where it is created, or the first mention of a set whose contents are unknown.
    pub span: Span,
}

impl SetData {
    /// Whether elements may be marked `nomatch`.
    pub fn takes_nomatch(&self) -> bool {
        self.dimensions.contains(&DimensionKind::Net)
    }
}

impl fmt::Display for DimensionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DimensionKind::Address => "address",
            DimensionKind::Net => "net",
            DimensionKind::Port => "port",
            DimensionKind::Device => "device",
            DimensionKind::Mac => "mac",
            DimensionKind::Mark => "mark",
        })
    }
}

/// The sets that membership in a set is asked of, in order: the set itself, or those of a list. The first that a packet
/// is in decides.
///
/// Lists hold no lists (net/netfilter/ipset/ip_set_list_set.c).
pub fn leaves(sets: &PrimaryMap<Set, SetData>, set: Set) -> Vec<Set> {
    match &sets[set].contents {
        SetContents::Sets(members) => members
            .iter()
            .copied()
            .filter(|member| !matches!(sets[*member].contents, SetContents::Sets(_)))
            .collect(),
        _ => vec![set],
    }
}

/// Whether a packet is in a set. With `return_nomatch`, whether an element marked `nomatch` decides.
///
/// `value` gives the packet's fields. Ends beyond a set's dimensions are ignored; a set with more dimensions than ends
/// holds nothing. Each set of a list is asked by itself, and types whose elements take no `nomatch` know nothing of
/// `return_nomatch` (net/netfilter/ipset/ip_set_core.c, `ip_set_test`).
pub fn holds(
    sets: &PrimaryMap<Set, SetData>,
    family: Family,
    set: Set,
    ends: &[End],
    return_nomatch: bool,
    value: &mut impl FnMut(Field) -> u128,
) -> bool {
    leaves(sets, set).into_iter().any(|leaf| {
        let data = &sets[leaf];
        covers(data, family, ends, value) == Some(return_nomatch && data.takes_nomatch())
    })
}

/// Whether a packet is covered by a set's elements: `None` if by none, `Some(true)` if by one marked `nomatch`.
fn covers(
    data: &SetData,
    family: Family,
    ends: &[End],
    value: &mut impl FnMut(Field) -> u128,
) -> Option<bool> {
    let SetContents::Elements(elements) = &data.contents else { return None };
    if ends.len() < data.dimensions.len() {
        return None;
    }
    if elements.len() <= SCANNED_MAX {
        let covers = |element: &Element, value: &mut dyn FnMut(Field) -> u128| {
            element_cubes(family, element, ends).iter().any(|cube| cube.holds(&mut *value))
        };
        return elements.iter().find(|element| covers(element, value)).map(|element| element.nomatch);
    }
    let index = elements.index(|| Index::new(data, family, elements));
    index.get(&numbers(data, family, ends, value))
}

/// Elements of a set whose members are found by looking at one after another.
const SCANNED_MAX: usize = 64;

/// A large set's elements in the order of their numbers, for each combination of prefix lengths that occurs, in the
/// kernel's order. Files mostly have them in order, and then sorting costs next to nothing.
struct Index(Vec<(ByDimension<u8>, Sorted)>);

type ByDimension<T> = [T; DIMENSIONS_MAX];
/// Numbers, each with `nomatch`.
type Sorted = Vec<(ByDimension<u128>, bool)>;

impl Index {
    fn new(data: &SetData, family: Family, elements: &Elements) -> Index {
        let mut index: Vec<(ByDimension<u8>, Sorted)> = Vec::new();
        let widths = widths(data, family);
        patterns_of(data, family, elements, 0..elements.len(), &mut |pattern| {
            // Neighbours have the same lengths, since elements are in order of them.
            let at = index.iter().rposition(|(lengths, _)| *lengths == pattern.lengths);
            let at = at.unwrap_or_else(|| {
                index.push((pattern.lengths, Vec::new()));
                index.len() - 1
            });
            index[at].1.push((pattern.values, pattern.nomatch));
        });
        for (lengths, elements) in &mut index {
            // Of equal ones the first counts.
            elements.sort_by_key(|(values, _)| *values);
            elements.dedup_by_key(|(values, _)| *values);
            // Kept beside each length: how far to shift.
            for (length, width) in lengths.iter_mut().zip(widths) {
                *length = width - *length;
            }
        }
        Index(index)
    }

    fn get(&self, numbers: &[u128; DIMENSIONS_MAX]) -> Option<bool> {
        self.0.iter().find_map(|(shifts, elements)| {
            let mut under = *numbers;
            for (number, &shift) in under.iter_mut().zip(shifts) {
                let shift = u32::from(shift);
                *number = number.checked_shr(shift).and_then(|it| it.checked_shl(shift)).unwrap_or(0);
            }
            let at = elements.binary_search_by_key(&under, |(values, _)| *values).ok()?;
            Some(elements[at].1)
        })
    }
}

/// A prefix of one device, and a shorter prefix around it that has a device of which the longer has no element: then a
/// `hash:net,iface` is not what its elements say one by one. The kernel's look-up ends at the first prefix that has an
/// element of any device (net/netfilter/ipset/ip_set_hash_netiface.c, `hash_netiface4_data_equal` counts them in `multi`,
/// and `mtype_test_cidrs` of ip_set_hash_gen.h goes on while there are none).
///
/// Elements are prefixes of addresses of `width` bits, each a value, a length and a device; gives the number of one that
/// stands in the way of a shorter one.
pub fn hides_shorter(elements: &[(u128, u8, DeviceName)], width: u8) -> Option<usize> {
    let mut devices: HashMap<(u128, u8), BTreeSet<DeviceName>> = HashMap::new();
    for &(value, length, device) in elements {
        devices.entry((value, length)).or_default().insert(device);
    }
    let lengths: BTreeSet<u8> = elements.iter().map(|&(_, length, _)| length).collect();
    elements.iter().position(|&(value, length, _)| {
        let own = &devices[&(value, length)];
        lengths.range(..length).any(|&shorter| {
            let host = max_value(width - shorter);
            devices.get(&(value & !host, shorter)).is_some_and(|others| !others.is_subset(own))
        })
    })
}

/// A set's elements as cubes over the packet's fields, in the kernel's order of look-up, each with its `nomatch`. For
/// one of [`leaves`].
pub fn cubes(data: &SetData, family: Family, ends: &[End]) -> Vec<(Cube, bool)> {
    let SetContents::Elements(elements) = &data.contents else { return Vec::new() };
    if ends.len() < data.dimensions.len() {
        return Vec::new();
    }
    let cubes = |element: Element| {
        let nomatch = element.nomatch;
        element_cubes(family, &element, ends).into_iter().map(move |cube| (cube, nomatch))
    };
    elements.iter().flat_map(cubes).collect()
}

/// The packets that one element covers, as cubes over their fields.
pub fn element_cubes(family: Family, element: &Element, ends: &[End]) -> Vec<Cube> {
    let mut cubes = vec![Cube::all()];
    for (value, &end) in element.values.iter().zip(ends) {
        let alternatives: Vec<Vec<Test>> = match *value {
            DimensionValue::Address(interval) => {
                vec![vec![Test::new(Field::address(end), family, interval.into())]]
            }
            DimensionValue::Port { proto, ports } => {
                let protos = proto.map_or(BITMAP_PROTOS.to_vec(), |proto| vec![proto]);
                protos.into_iter().filter_map(|proto| port_tests(family, proto, ports, end)).collect()
            }
            DimensionValue::Device(name) => {
                vec![vec![Test::new(device_field(end), family, IntervalSet::point(name.value()))]]
            }
            DimensionValue::Mac(mac) => {
                vec![vec![Test::new(mac_field(end), family, IntervalSet::point(mac.into()))]]
            }
            DimensionValue::Mark { mask, value } => {
                vec![vec![Test::masked(Field::Mark, family, value.into(), mask.into())]]
            }
        };
        cubes = cubes
            .iter()
            .flat_map(|cube| {
                alternatives.iter().filter_map(move |tests| {
                    let mut cube = cube.clone();
                    tests.iter().all(|test| cube.and(test, family)).then_some(cube)
                })
            })
            .collect();
    }
    cubes
}

/// The packets of a protocol that have one of the ports.
fn port_tests(family: Family, proto: u8, ports: Interval, end: End) -> Option<Vec<Test>> {
    let reading = PortReading::of(family, proto)?;
    let mut tests = vec![Test::new(Field::Proto, family, IntervalSet::point(proto.into()))];
    match reading.compared.field(end) {
        Some(field) => tests.push(Test::new(field, family, ports.into())),
        None if ports.lo() == 0 => {}
        None => return None,
    }
    if reading.header_bytes > 0 {
        let enough = IntervalSet::range(reading.header_bytes.into(), max_value(Field::L4Len.bits(family)));
        tests.push(Test::new(Field::L4Len, family, enough));
    }
    if !reading.of_later_fragments {
        tests.push(Test::new(Field::FragOffset, family, IntervalSet::point(0)));
    }
    Some(tests)
}

/// Protocols that a port without one stands for.
const BITMAP_PROTOS: [u8; 2] = [6, 17];

/// The field of a device.
pub fn device_field(end: End) -> Field {
    if end == End::Src { Field::InDevice } else { Field::OutDevice }
}

/// The field of a MAC address.
pub fn mac_field(end: End) -> Field {
    if end == End::Src { Field::SrcMac } else { Field::DstMac }
}

/// An element, or a part of one, as a number under a prefix for each dimension: what tables are made of. A port is
/// `proto << 16 | port` ([`port::number`]). Dimensions that the set does not have are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern {
    /// The numbers; bits beyond the length are 0.
    pub values: [u128; DIMENSIONS_MAX],
    /// How many leading bits count.
    pub lengths: [u8; DIMENSIONS_MAX],
    /// It takes what it covers out of the set.
    pub nomatch: bool,
}

/// How many bits the numbers of each dimension have.
pub fn widths(data: &SetData, family: Family) -> [u8; DIMENSIONS_MAX] {
    let mut widths = [0; DIMENSIONS_MAX];
    for (width, dimension) in widths.iter_mut().zip(&data.dimensions) {
        *width = match dimension {
            DimensionKind::Address | DimensionKind::Net => family.address_bits(),
            DimensionKind::Port => 24,
            DimensionKind::Device => 128,
            DimensionKind::Mac => 48,
            DimensionKind::Mark => 32,
        };
    }
    widths
}

/// A packet's numbers in a set's dimensions.
pub fn numbers(
    data: &SetData,
    family: Family,
    ends: &[End],
    value: &mut impl FnMut(Field) -> u128,
) -> [u128; DIMENSIONS_MAX] {
    let mut numbers = [0; DIMENSIONS_MAX];
    for ((number, dimension), &end) in numbers.iter_mut().zip(&data.dimensions).zip(ends) {
        *number = match dimension {
            DimensionKind::Address | DimensionKind::Net => value(Field::address(end)),
            DimensionKind::Port => port::number(family, end, value),
            DimensionKind::Device => value(device_field(end)),
            DimensionKind::Mac => value(mac_field(end)),
            DimensionKind::Mark => value(Field::Mark) & u128::from(data.mark_mask),
        };
    }
    numbers
}

/// Gives the patterns that together are an element: prefixes for a range of hosts, or of ports if they are all there is.
/// Where elements may be deleted one by one, or be `nomatch`, and for ports beside other dimensions, a range is given one
/// by one, as the kernel adds it.
pub fn patterns(data: &SetData, family: Family, element: &Element, give: &mut impl FnMut(Pattern)) {
    let widths = widths(data, family);
    let mut pattern =
        Pattern { values: [0; DIMENSIONS_MAX], lengths: [0; DIMENSIONS_MAX], nomatch: element.nomatch };
    // The common case is one pattern: what has several is done dimension by dimension.
    let mut several: Vec<(usize, Vec<(u128, u8)>)> = Vec::new();
    for (at, value) in element.values.iter().enumerate() {
        let width = widths[at];
        (pattern.values[at], pattern.lengths[at]) = match *value {
            DimensionValue::Address(interval) => {
                let hosts = one_by_one(data) && data.dimensions[at] == DimensionKind::Address;
                let length = data.netmask.filter(|_| hosts).unwrap_or(width);
                match single(interval, width) {
                    Some((value, whole)) if !hosts || whole >= length => (value, whole.min(length)),
                    _ if hosts => {
                        let step = 1u128 << (width - length);
                        let hosts = (interval.lo()..=interval.hi()).step_by(step as usize);
                        several.push((at, hosts.map(|host| (host, length)).collect()));
                        continue;
                    }
                    _ => {
                        several.push((at, prefixes(interval, width)));
                        continue;
                    }
                }
            }
            DimensionValue::Port { proto: Some(proto), ports } if ports.lo() == ports.hi() => {
                (u128::from(proto) << 16 | ports.lo(), width)
            }
            DimensionValue::Port { proto, ports } => {
                let protos = proto.map_or(BITMAP_PROTOS.to_vec(), |proto| vec![proto]);
                let all = protos.into_iter().flat_map(|proto| {
                    let high = u128::from(proto) << 16;
                    if !one_by_one(data) && data.dimensions.len() == 1 {
                        let range = Interval::new(high | ports.lo(), high | ports.hi());
                        prefixes(range.expect("ports are in order"), width)
                    } else {
                        (ports.lo()..=ports.hi()).map(|port| (high | port, width)).collect()
                    }
                });
                several.push((at, all.collect()));
                continue;
            }
            DimensionValue::Device(name) => (name.value(), width),
            DimensionValue::Mac(mac) => (mac.into(), width),
            DimensionValue::Mark { value, .. } => (u128::from(value & data.mark_mask), width),
        };
    }
    let total: usize = several.iter().map(|(_, list)| list.len()).product();
    for mut which in 0..total {
        for (at, list) in &several {
            let (value, length) = list[which % list.len()];
            which /= list.len();
            pattern.values[*at] = value;
            pattern.lengths[*at] = length;
        }
        give(pattern);
    }
}

/// Gives the patterns of elements by their places, one element after another.
pub fn patterns_of(
    data: &SetData,
    family: Family,
    elements: &Elements,
    places: Range<usize>,
    give: &mut impl FnMut(Pattern),
) {
    let width = family.address_bits();
    let host = data.netmask.unwrap_or(width);
    for at in places {
        // Most large sets are single addresses and prefixes.
        let short = elements.addresses(at).and_then(|(interval, nomatch)| {
            let (value, length) = single(interval, width)?;
            let is_one = !one_by_one(data) || data.dimensions[0] == DimensionKind::Net || length >= host;
            is_one.then_some((value, length, nomatch))
        });
        match short {
            Some((value, length, nomatch)) if data.netmask.is_none() => {
                give(Pattern { values: [value, 0, 0], lengths: [length, 0, 0], nomatch });
            }
            _ => patterns(data, family, &elements.get(at), give),
        }
    }
}

/// How many patterns [`patterns`] gives at most for the element at a place; without making them.
pub fn patterns_count(data: &SetData, family: Family, elements: &Elements, at: usize) -> u128 {
    let is_one =
        |interval: Interval| data.dimensions[0] == DimensionKind::Net || interval.lo() == interval.hi();
    if elements.addresses(at).is_some_and(|(interval, _)| is_one(interval)) {
        return 1;
    }
    let of = |(at, value): (usize, &DimensionValue)| match *value {
        DimensionValue::Address(interval)
            if data.dimensions[at] == DimensionKind::Net || interval.lo() == interval.hi() =>
        {
            1
        }
        DimensionValue::Address(interval)
            if one_by_one(data) && data.dimensions[at] == DimensionKind::Address =>
        {
            let step = family.address_bits() - data.netmask.unwrap_or(family.address_bits());
            ((interval.hi() - interval.lo()).checked_shr(step.into()).unwrap_or(0)).saturating_add(1)
        }
        // A range of 2^n addresses is at most 2n prefixes.
        DimensionValue::Address(_) => 2 * u128::from(family.address_bits()),
        DimensionValue::Port { proto, ports } => {
            let each = ports.hi() - ports.lo() + 1;
            let whole = !one_by_one(data) && data.dimensions.len() == 1;
            let each = if whole { each.min(32) } else { each };
            if proto.is_some() { each } else { each * BITMAP_PROTOS.len() as u128 }
        }
        _ => 1,
    };
    elements.get(at).values.iter().enumerate().map(of).fold(1, u128::saturating_mul)
}

fn one_by_one(data: &SetData) -> bool {
    data.live || data.takes_nomatch()
}

/// The prefix that an interval is, with its length, if it is one.
fn single(interval: Interval, width: u8) -> Option<(u128, u8)> {
    let (lo, hi) = (interval.lo(), interval.hi());
    let differ = lo ^ hi;
    let host = 128 - differ.leading_zeros();
    let whole = differ == 0 || differ == max_value(host as u8) && lo & differ == 0;
    whole.then(|| (lo, width - host as u8))
}

/// The prefixes that together are an interval, in ascending order, each with its length.
fn prefixes(interval: Interval, width: u8) -> Vec<(u128, u8)> {
    let mut found = Vec::new();
    let mut from = Some(interval.lo());
    while let Some(lo) = from.filter(|lo| *lo <= interval.hi()) {
        // As large as alignment and the end allow.
        let last = |host: u32| lo | if host == 0 { 0 } else { max_value(host as u8) };
        let mut host = lo.trailing_zeros().min(width.into());
        while last(host) > interval.hi() {
            host -= 1;
        }
        found.push((lo, width - host as u8));
        from = last(host).checked_add(1);
    }
    found
}
