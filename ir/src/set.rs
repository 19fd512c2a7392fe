//! Sets: what ipset calls a set, as an ordered list of elements over the dimensions of its type.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::entities::Set;
use crate::field::DeviceName;
use crate::hook::Family;
use crate::interval::Interval;
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
