//! Sets: what ipset calls a set, as an ordered list of elements over the dimensions of its type.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cube::{Cube, Test};
use crate::entities::Set;
use crate::field::{DeviceName, End, Field};
use crate::hook::Family;
use crate::interval::{Interval, IntervalSet};
use crate::source::Span;

/// One dimension of a set's type: `hash:net,port` has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DimensionKind {
    /// An address or prefix (`ip`, `net`).
    Address,
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
    /// Addresses from lowest to highest.
    Address(Interval),
    /// Ports of one protocol. A protocol of `None` means TCP, UDP, UDP-Lite, SCTP and ICMP alike, as bitmap:port has it.
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

/// An element: one value for each dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// One value for each dimension, in the type's order.
    pub values: Vec<DimensionValue>,
    /// The element takes what it covers out of the set.
    pub nomatch: bool,
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetContents {
    /// Elements in the order the kernel looks them up, so the first that covers a packet decides: for `net`
    /// dimensions longer prefixes come first (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`).
    Elements(Vec<Element>),
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
    /// What is in it.
    pub contents: SetContents,
    /// Where it is created, or the first mention of a set whose contents are unknown.
    pub span: Span,
}

impl fmt::Display for DimensionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DimensionKind::Address => "address",
            DimensionKind::Port => "port",
            DimensionKind::Device => "device",
            DimensionKind::Mac => "mac",
            DimensionKind::Mark => "mark",
        })
    }
}

/// Whether a packet is covered by a set: `None` if by no element, `Some(true)` if by one marked `nomatch`.
///
/// `value` gives the packet's fields. Evaluates element by element, in the kernel's order of look-up.
pub fn member(
    ruleset: &crate::ruleset::Ruleset,
    set: Set,
    ends: &[End],
    value: &mut impl FnMut(Field) -> u128,
) -> Option<bool> {
    cubes(ruleset, set, ends)
        .into_iter()
        .find(|(cube, _)| cube.holds(&mut *value))
        .map(|(_, nomatch)| nomatch)
}

/// A set's elements as cubes over the packet's fields, in the kernel's order of look-up, each with its `nomatch`.
///
/// Ends beyond the set's dimensions are ignored; a set with more dimensions than ends holds nothing
/// (net/netfilter/ipset/ip_set_core.c, `ip_set_test`).
pub fn cubes(ruleset: &crate::ruleset::Ruleset, set: Set, ends: &[End]) -> Vec<(Cube, bool)> {
    let data = &ruleset.sets[set];
    match &data.contents {
        SetContents::Unknown => Vec::new(),
        // Lists hold no lists (net/netfilter/ipset/ip_set_list_set.c).
        SetContents::Sets(members) => members
            .iter()
            .filter(|member| !matches!(ruleset.sets[**member].contents, SetContents::Sets(_)))
            .flat_map(|&member| cubes(ruleset, member, ends))
            .collect(),
        SetContents::Elements(elements) => {
            if ends.len() < data.dimensions.len() {
                return Vec::new();
            }
            elements
                .iter()
                .flat_map(|element| {
                    let nomatch = element.nomatch;
                    element_cubes(ruleset.family, element, ends).into_iter().map(move |cube| (cube, nomatch))
                })
                .collect()
        }
    }
}

fn element_cubes(family: Family, element: &Element, ends: &[End]) -> Vec<Cube> {
    let mut cubes = vec![Cube::all()];
    for (value, &end) in element.values.iter().zip(ends) {
        let alternatives: Vec<Vec<Test>> = match *value {
            DimensionValue::Address(interval) => {
                vec![vec![Test::new(Field::address(end), family, interval.into())]]
            }
            DimensionValue::Port { proto, ports } => {
                // net/netfilter/ipset/ip_set_getport.c: TCP, UDP, SCTP and UDP-Lite have ports; ICMP has type and code.
                let protos: Vec<u8> = match proto {
                    Some(proto) => vec![proto],
                    None => vec![6, 17, 132, 136],
                };
                protos
                    .into_iter()
                    .map(|proto| {
                        let mut tests =
                            vec![Test::new(Field::Proto, family, IntervalSet::point(proto.into()))];
                        if matches!(proto, 6 | 17 | 132 | 136 | 33) {
                            tests.push(Test::new(Field::port(end), family, ports.into()));
                        } else if matches!(proto, 1 | 58) {
                            let icmp = Field::L4Bytes { offset: 0, len: 2 };
                            tests.push(Test::new(icmp, family, ports.into()));
                        }
                        tests
                    })
                    .collect()
            }
            DimensionValue::Device(name) => {
                let field = if end == End::Src { Field::InDevice } else { Field::OutDevice };
                vec![vec![Test::new(field, family, IntervalSet::point(name.value()))]]
            }
            DimensionValue::Mac(mac) => {
                let field = if end == End::Src { Field::SrcMac } else { Field::DstMac };
                vec![vec![Test::new(field, family, IntervalSet::point(mac.into()))]]
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
