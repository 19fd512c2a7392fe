//! ipset save files: read into typed sets, printed back, and lowered to the IR's sets.
//!
//! A save file is a script of `create` and `add` lines (ipset(8), "restore"). Reading checks what ipset and the kernel
//! check when they run it: names, types, families, options, and whether elements fit. What it can't know is the order in
//! which the kernel's hash tables would list elements, so printing keeps the file's.
//!
//! ```
//! use polc_frontend_iptables::ipset;
//! use polc_ir::source::SourceMap;
//!
//! let mut sources = SourceMap::new();
//! let file = sources.add("sets", "create bad hash:net\nadd bad 198.51.100.7/24\n");
//! let (sets, diagnostics) = ipset::parse(&sources, file);
//! assert!(diagnostics.is_empty());
//! assert!(ipset::print(&sets).ends_with("\nadd bad 198.51.100.0/24\n"));
//! ```

mod bulk;
mod element;
mod kind;
mod live;
mod lower;
mod parse;
mod print;
mod seen;

use std::net::IpAddr;

use polc_ir::hook::Family;
use polc_ir::source::Span;
use smallvec::SmallVec;

pub use element::{AddressForm, Part};
pub use kind::{Dimension, SetKind};
pub use live::add_line;
pub use lower::lower;
pub use parse::parse;
pub use print::print;

use crate::ast::Text;
use crate::value::Masked;

/// The sets of one file, in the order of their creation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sets {
    sets: Vec<SetAst>,
}

impl Sets {
    /// The sets, in the order of their creation.
    pub fn iter(&self) -> impl Iterator<Item = &SetAst> {
        self.sets.iter()
    }
}

/// A set: its `create` line and its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct SetAst {
    /// Its name.
    pub name: String,
    /// The `create` line.
    pub span: Span,
    /// Its type.
    pub kind: &'static SetKind,
    /// The family of its addresses; `None` for types that have none.
    pub family: Option<Family>,
    /// The options of `create`.
    pub options: CreateOptions,
    /// The elements, in the order they were added; for `list:set`, in the list's order.
    pub elements: Vec<ElementAst>,
}

/// Elements of a hash if `maxelem` is not given.
const ELEMENTS_MAX_DEFAULT: usize = 65_536;

impl SetAst {
    /// Most elements that the set may get: a hash's `maxelem`, as many as a bitmap's range has.
    pub fn elements_max(&self) -> usize {
        match (self.options.addresses, self.options.ports) {
            (Some((IpAddr::V4(first), IpAddr::V4(last))), _) => {
                let shift = 32 - self.options.netmask.unwrap_or(32);
                ((last.to_bits() - first.to_bits()) >> shift) as usize + 1
            }
            (_, Some((first, last))) => usize::from(last - first) + 1,
            _ => self.options.elements_max.map_or(ELEMENTS_MAX_DEFAULT, |max| max as usize),
        }
    }

    /// Whether a hash has no room for so many elements.
    fn is_exceeded(&self, elements: u128) -> bool {
        self.kind.name.starts_with("hash:")
            && elements > self.elements_max() as u128
            && !self.options.force_add
    }
}

/// The options of `create`. What is not given is `None`, and the kernel chooses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// `hashsize`: buckets at first.
    pub hash_size: Option<u32>,
    /// `maxelem`: most elements; 65,536 if not given.
    pub elements_max: Option<u32>,
    /// `bucketsize`: most elements in a bucket.
    pub bucket_size: Option<u8>,
    /// `initval`: the seed of the hash.
    pub seed: Option<u32>,
    /// `timeout`: how long elements stay, in seconds; 0 for ever.
    pub timeout: Option<u32>,
    /// `counters`: elements count packets.
    pub counters: bool,
    /// `comment`: elements have comments.
    pub comment: bool,
    /// `skbinfo`: elements carry a mark, priority and queue.
    pub skbinfo: bool,
    /// `forceadd`: a full set loses an element for a new one.
    pub force_add: bool,
    /// `netmask`: addresses are compared under a prefix of this length.
    pub netmask: Option<u8>,
    /// `bitmask`: addresses are compared under this mask.
    pub bitmask: Option<IpAddr>,
    /// `markmask`: marks are compared under this mask.
    pub mark_mask: Option<u32>,
    /// `range` of a bitmap of addresses.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// `range` of a bitmap of ports.
    pub ports: Option<(u16, u16)>,
    /// `size` of a list; has no effect any more.
    pub size: Option<u32>,
}

impl CreateOptions {
    /// Whether a set with the other options is the same but for its room and its seed
    /// (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_same_set`).
    fn holds_as(&self, other: &CreateOptions) -> bool {
        let comparable = |options: &CreateOptions| CreateOptions {
            hash_size: None,
            elements_max: Some(options.elements_max.map_or(ELEMENTS_MAX_DEFAULT, |max| max as usize) as u32),
            bucket_size: None,
            seed: None,
            force_add: false,
            size: None,
            ..options.clone()
        };
        comparable(self) == comparable(other)
    }
}

/// The parts of an element, mostly one.
pub type Parts = SmallVec<[Part; 1]>;

/// An element.
#[derive(Clone, Debug, PartialEq)]
pub struct ElementAst {
    /// The element, without its options.
    pub span: Span,
    /// One part for each dimension; `bitmap:ip,mac` may lack the second.
    pub parts: Parts,
    /// `nomatch`: what the element covers is not in the set.
    pub nomatch: bool,
    /// `wildcard`: the device is a prefix of names.
    pub wildcard: bool,
    /// Options that don't change what the element covers.
    pub extra: Option<Box<ElementExtra>>,
}

impl ElementAst {
    /// An element without options.
    fn plain(span: Span, parts: Parts) -> ElementAst {
        ElementAst { span, parts, nomatch: false, wildcard: false, extra: None }
    }
}

/// Options of an element that don't change what it covers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElementExtra {
    /// `timeout`: how long it stays, in seconds; 0 for ever.
    pub timeout: Option<u32>,
    /// `packets`.
    pub packets: Option<u64>,
    /// `bytes`.
    pub bytes: Option<u64>,
    /// `comment`.
    pub comment: Option<Text>,
    /// `skbmark`.
    pub mark: Option<Masked>,
    /// `skbprio`: the major number in the upper 16 bits.
    pub priority: Option<u32>,
    /// `skbqueue`.
    pub queue: Option<u16>,
}
