//! The set types: their dimensions and the options their sets and elements take.
//!
//! One table, from ipset 7.17 (lib/ipset_*.c, the highest revision of each type). The order of a set's options is the
//! one in which ipset saves them.

use super::element::Part;

/// A set type.
#[derive(Debug, PartialEq, Eq)]
pub struct SetKind {
    /// Its name: `hash:net,port`.
    pub name: &'static str,
    /// What an element consists of.
    pub dimensions: &'static [Dimension],
    /// Options of `create`, in the order they are saved.
    pub(super) create: &'static [&'static str],
    /// Whether elements may be marked `nomatch`.
    pub nomatch: bool,
    /// Whether a prefix of length 0 is an element.
    pub(super) zero_prefix: bool,
    /// Whether the kernel refuses the address of all zeros (net/netfilter/ipset/ip_set_hash_ip.c, ip_set_hash_ipport.c).
    pub(super) refuses_null: bool,
}

/// What an element has in one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// A host address; for IPv4 sets also a prefix or range, which adds every address in it.
    Host,
    /// One host address.
    SingleHost,
    /// A prefix; for IPv4 sets also a range.
    Net,
    /// A protocol and port.
    Port,
    /// A port of TCP and UDP alike.
    TcpUdpPort,
    /// An Ethernet address.
    Mac,
    /// A packet mark.
    Mark,
    /// A device.
    Device,
    /// A set.
    Set,
}

/// Options of every hash type.
const HASH_TAIL: [&str; 7] =
    ["timeout", "counters", "comment", "forceadd", "skbinfo", "bucketsize", "initval"];

macro_rules! hash_options {
    ([$($before:literal),*] [$($after:literal),*]) => {
        &[
            "family", $($before,)* "hashsize", "maxelem", $($after,)*
            HASH_TAIL[0], HASH_TAIL[1], HASH_TAIL[2], HASH_TAIL[3], HASH_TAIL[4], HASH_TAIL[5], HASH_TAIL[6],
        ]
    };
    (then [$($last:literal),*]) => {
        &[
            "family", "hashsize", "maxelem",
            HASH_TAIL[0], HASH_TAIL[1], HASH_TAIL[2], HASH_TAIL[3], HASH_TAIL[4], HASH_TAIL[5], HASH_TAIL[6],
            $($last,)*
        ]
    };
}

const HASH: &[&str] = hash_options!([] []);

const fn hash(
    name: &'static str,
    dimensions: &'static [Dimension],
    create: &'static [&'static str],
) -> SetKind {
    SetKind { name, dimensions, create, nomatch: false, zero_prefix: true, refuses_null: false }
}

const fn net(name: &'static str, dimensions: &'static [Dimension], zero_prefix: bool) -> SetKind {
    SetKind { name, dimensions, create: HASH, nomatch: true, zero_prefix, refuses_null: false }
}

use Dimension::{Device, Host, Mac, Mark, Net, Port, Set, SingleHost, TcpUdpPort};

/// Every set type.
pub(super) static KINDS: &[SetKind] = &[
    hash("bitmap:ip", &[Host], &["range", "netmask", "timeout", "counters", "comment", "skbinfo"]),
    hash("bitmap:ip,mac", &[SingleHost, Mac], &["range", "timeout", "counters", "comment", "skbinfo"]),
    hash("bitmap:port", &[TcpUdpPort], &["range", "timeout", "counters", "comment", "skbinfo"]),
    SetKind { refuses_null: true, ..hash("hash:ip", &[Host], hash_options!([] ["netmask", "bitmask"])) },
    hash("hash:ip,mac", &[Host, Mac], HASH),
    hash("hash:ip,mark", &[Host, Mark], hash_options!(["markmask"][])),
    SetKind {
        refuses_null: true,
        ..hash("hash:ip,port", &[Host, Port], hash_options!(then ["netmask", "bitmask"]))
    },
    hash("hash:ip,port,ip", &[Host, Port, SingleHost], HASH),
    net("hash:ip,port,net", &[Host, Port, Net], false),
    hash(
        "hash:mac",
        &[Mac],
        &[
            "hashsize",
            "maxelem",
            "timeout",
            "counters",
            "comment",
            "forceadd",
            "skbinfo",
            "bucketsize",
            "initval",
        ],
    ),
    net("hash:net", &[Net], false),
    net("hash:net,iface", &[Net, Device], true),
    SetKind { create: hash_options!(then ["bitmask", "netmask"]), ..net("hash:net,net", &[Net, Net], true) },
    net("hash:net,port", &[Net, Port], false),
    net("hash:net,port,net", &[Net, Port, Net], true),
    hash("list:set", &[Set], &["size", "timeout", "counters", "comment", "skbinfo"]),
];

/// Names of types in ipset 4 and before, which ipset still takes.
const OLD_NAMES: &[(&str, &str)] = &[
    ("ipmap", "bitmap:ip"),
    ("macipmap", "bitmap:ip,mac"),
    ("portmap", "bitmap:port"),
    ("iphash", "hash:ip"),
    ("ipporthash", "hash:ip,port"),
    ("ipportiphash", "hash:ip,port,ip"),
    ("ipportnethash", "hash:ip,port,net"),
    ("nethash", "hash:net"),
    ("netporthash", "hash:net,port"),
    ("setlist", "list:set"),
];

impl SetKind {
    /// The type of this name.
    pub fn find(name: &str) -> Option<&'static SetKind> {
        let name = OLD_NAMES.iter().find(|row| row.0 == name).map_or(name, |row| row.1);
        KINDS.iter().find(|kind| kind.name == name)
    }

    /// Whether its elements have addresses.
    pub fn has_addresses(&self) -> bool {
        self.dimensions.iter().any(|it| matches!(it, Host | SingleHost | Net))
    }

    /// The parts that tell an element from others: a `bitmap:ip,mac` has one Ethernet address for each address
    /// (net/netfilter/ipset/ip_set_bitmap_ipmac.c), other types tell by all.
    pub(super) fn key<'p>(&self, parts: &'p [Part]) -> &'p [Part] {
        if self.dimensions == [SingleHost, Mac] { &parts[..1] } else { parts }
    }

    /// Whether it is a bitmap, which has a range and IPv4 addresses only.
    pub fn is_bitmap(&self) -> bool {
        self.name.starts_with("bitmap:")
    }
}
