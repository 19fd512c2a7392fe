//! What a set holds already, so that what is added again is told as `ipset restore` tells it.
//!
//! The kernel adds every address and port of a range one by one, and refuses the first that the set has. Here ranges
//! stay ranges: single elements are compared through a hash table, and once a set has a range, all that it holds through
//! intervals of addresses, a map of them for each block of ports.

use std::collections::{BTreeMap, HashSet};
use std::hash::BuildHasher as _;
use std::net::{IpAddr, Ipv4Addr};

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use polc_ir::hook::Family;

use super::element::{Part, bits, blocks};
use super::kind::{Dimension, SetKind};
use super::{ElementAst, SetAst};

/// What a set holds: its elements by the parts that tell them apart.
pub(super) struct Seen {
    kind: &'static SetKind,
    /// Places among the elements: of the first so many.
    table: HashTable<u32>,
    indexed: usize,
    pub(super) hasher: DefaultHashBuilder,
    /// Sets of a list, whose places change.
    moving: HashSet<Box<[Part]>>,
    /// All that is held, if some of it is ranges.
    ranges: Option<Ranges>,
    /// How many elements the kernel has of it, at least.
    pub(super) held: u128,
    /// Some elements have options.
    pub(super) with_extra: bool,
    /// Some elements say `nomatch`.
    pub(super) with_nomatch: bool,
}

/// What a set has of an element.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing.
    New,
    /// The same was added.
    Same,
    /// Some of the addresses and ports that it stands for were.
    Partly,
}

impl Seen {
    pub(super) fn new(kind: &'static SetKind) -> Seen {
        Seen {
            kind,
            table: HashTable::new(),
            indexed: 0,
            hasher: DefaultHashBuilder::default(),
            moving: HashSet::new(),
            ranges: None,
            held: 0,
            with_extra: false,
            with_nomatch: false,
        }
    }

    pub(super) fn hash(&self, parts: &[Part]) -> u64 {
        self.hasher.hash_one(self.kind.key(parts))
    }

    pub(super) fn clear(&mut self) {
        self.table.clear();
        self.indexed = 0;
        self.moving.clear();
        self.ranges = None;
        self.held = 0;
    }

    /// Where an element with these parts is.
    pub(super) fn find(&mut self, elements: &[ElementAst], parts: &[Part], hash: u64) -> Option<usize> {
        if self.moving.contains(parts) {
            return elements.iter().position(|element| *element.parts == *parts);
        }
        self.index(elements);
        let key = self.kind.key(parts);
        let found = self.table.find(hash, |at| self.kind.key(&elements[*at as usize].parts) == key);
        found.map(|at| *at as usize)
    }

    /// Whether a set has an element with these parts.
    pub(super) fn knows(&mut self, set: &SetAst, parts: &[Part], hash: u64) -> Known {
        if is_list(parts) {
            return if self.moving.contains(parts) { Known::Same } else { Known::New };
        }
        if self.find(&set.elements, parts, hash).is_some() {
            return Known::Same;
        }
        if self.ranges.is_none() && !is_one(self.kind, parts) {
            self.ranges = Some(Ranges::of(set));
        }
        match &self.ranges {
            Some(ranges) if ranges.overlap(&Piece::of(set, parts)) => Known::Partly,
            _ => Known::New,
        }
    }

    /// Adds what is about to become an element of a set, mostly the last, which is `known` so far.
    pub(super) fn insert(&mut self, set: &SetAst, parts: &[Part], hash: u64, known: Known) {
        if is_list(parts) {
            self.moving.insert(parts.into());
            return;
        }
        if let Some(ranges) = &mut self.ranges {
            ranges.insert(&Piece::of(set, parts));
        }
        self.held += if known == Known::New { size(set, parts) } else { 0 };
        self.put(&set.elements, parts, hash, set.elements.len());
        self.indexed += 1;
    }

    /// Adds single elements, those from `before` on, which have these hashes; false, and none is added, if one is there
    /// or two are alike. Many are compared by sorting their hashes, without a table: most sets are read in one go. Should
    /// two that differ have the same hash, that may be false, too; and so it is where ranges are to be compared.
    pub(super) fn insert_all(&mut self, elements: &[ElementAst], before: usize, hashes: Vec<u64>) -> bool {
        if self.ranges.is_some() {
            return false;
        }
        let more = hashes.len() as u128;
        let is_new = if hashes.len() >= before {
            let mut all = hashes;
            all.extend(elements[..before].iter().map(|element| self.hash(&element.parts)));
            all.sort_unstable();
            all.array_windows().all(|[a, b]| a != b)
        } else {
            self.index(&elements[..before]);
            let is_new = hashes
                .iter()
                .zip(before..)
                .all(|(&hash, at)| self.put(&elements[..=at], &elements[at].parts, hash, at));
            if is_new {
                self.indexed = elements.len();
            } else {
                self.table.retain(|at| (*at as usize) < before);
            }
            is_new
        };
        self.held += if is_new { more } else { 0 };
        is_new
    }

    /// Brings the table up to date.
    fn index(&mut self, elements: &[ElementAst]) {
        for at in self.indexed..elements.len() {
            let hash = self.hash(&elements[at].parts);
            self.put(elements, &elements[at].parts, hash, at);
        }
        self.indexed = elements.len();
    }

    /// Puts the element of a place into the table; false if one like it is there.
    fn put(&mut self, elements: &[ElementAst], parts: &[Part], hash: u64, at: usize) -> bool {
        let key = |parts| self.kind.key(parts);
        let entry = self.table.entry(
            hash,
            |at| key(&elements[*at as usize].parts) == key(parts),
            |at| self.hasher.hash_one(key(&elements[*at as usize].parts)),
        );
        match entry {
            Entry::Occupied(_) => false,
            Entry::Vacant(vacant) => {
                vacant.insert(at as u32);
                true
            }
        }
    }
}

/// Whether the parts are those of an element of a list.
fn is_list(parts: &[Part]) -> bool {
    matches!(parts, [Part::Set(_)])
}

/// Whether the kernel adds one element for these parts, and not one for each address and port of a range.
pub(super) fn is_one(kind: &SetKind, parts: &[Part]) -> bool {
    parts.iter().zip(kind.dimensions).all(|(part, dimension)| match part {
        Part::Address { first, last, .. } => *dimension == Dimension::Net || first == last,
        Part::Port { first, last, .. } => first == last,
        _ => true,
    })
}

/// How many elements a set gets by these parts.
pub(super) fn size(set: &SetAst, parts: &[Part]) -> u128 {
    if is_one(set.kind, parts) { 1 } else { Piece::of(set, parts).size() }
}

/// What an element stands for: ranges of addresses and of ports, and one of everything else.
struct Piece<'p> {
    rest: Vec<&'p Part>,
    protocol: Option<u8>,
    ports: (u16, u16),
    /// In units of what the set tells apart.
    addresses: (u128, u128),
}

impl<'p> Piece<'p> {
    fn of(set: &SetAst, parts: &'p [Part]) -> Piece<'p> {
        let mut piece = Piece { rest: Vec::new(), protocol: None, ports: (0, u16::MAX), addresses: (0, 0) };
        for (part, dimension) in parts.iter().zip(set.kind.dimensions) {
            match part {
                Part::Address { first, last, .. } if *dimension == Dimension::Host => {
                    let unit = set.unit_bits();
                    piece.addresses = (bits(*first) >> unit, bits(set.last_taken(*first, *last)) >> unit);
                }
                Part::Port { protocol, first, last } => {
                    piece.protocol = *protocol;
                    piece.ports = (*first, *last);
                }
                part => piece.rest.push(part),
            }
        }
        piece
    }

    fn size(&self) -> u128 {
        let (first, last) = self.addresses;
        let ports = match self.ports {
            // Of a type without ports.
            (0, u16::MAX) if self.protocol.is_none() => 1,
            (first, last) => u128::from(last - first) + 1,
        };
        (last - first).saturating_add(1).saturating_mul(ports)
    }

    /// What has blocks of its own.
    fn group(&self) -> Group {
        (self.rest.iter().map(|part| (*part).clone()).collect(), self.protocol)
    }

    /// The blocks that its ports are.
    fn blocks(&self) -> Vec<Block> {
        let (first, last) = self.ports;
        let blocks = blocks(first.into(), last.into(), u16::BITS);
        blocks.map(|(first, power)| Block { first: first as u16, power }).collect()
    }
}

/// Everything but addresses and ports.
type Group = (Box<[Part]>, Option<u8>);

/// Ports from a multiple of a power of two on, as many as that.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Block {
    first: u16,
    power: u32,
}

impl Block {
    const ALL: Block = Block { first: 0, power: u16::BITS };

    /// The block of this size that holds it.
    fn within(self, power: u32) -> Block {
        Block { first: (u32::from(self.first) >> power << power) as u16, power }
    }
}

/// Ranges of addresses, the last of each by its first. They neither overlap nor touch.
type Spans = BTreeMap<u128, u128>;

/// The addresses that a set holds with ports of each block.
#[derive(Default)]
struct Ports {
    /// With exactly this block of ports.
    exact: HashMap<Block, Spans>,
    /// With a smaller block that lies in this one.
    smaller: HashMap<Block, Spans>,
}

impl Ports {
    fn overlap(&self, blocks: &[Block], (first, last): (u128, u128)) -> bool {
        let holds = |spans: Option<&Spans>| {
            let known = spans.and_then(|spans| spans.range(..=last).next_back());
            known.is_some_and(|(_, end)| *end >= first)
        };
        // Mostly the set has the addresses with no port at all.
        if !holds(self.exact.get(&Block::ALL)) && !holds(self.smaller.get(&Block::ALL)) {
            return false;
        }
        blocks.iter().any(|&block| {
            holds(self.smaller.get(&block))
                || (block.power..=u16::BITS).any(|power| holds(self.exact.get(&block.within(power))))
        })
    }

    fn insert(&mut self, blocks: &[Block], addresses: (u128, u128)) {
        for &block in blocks {
            join(self.exact.entry(block).or_default(), addresses);
        }
        for power in 1..=u16::BITS {
            let smaller = blocks.iter().filter(|block| block.power < power);
            let mut holding: Vec<Block> = smaller.map(|block| block.within(power)).collect();
            holding.dedup();
            for block in holding {
                join(self.smaller.entry(block).or_default(), addresses);
            }
        }
    }
}

/// All that a set holds, as ranges.
#[derive(Default)]
struct Ranges {
    groups: HashMap<Group, Ports>,
}

impl Ranges {
    fn of(set: &SetAst) -> Ranges {
        let mut ranges = Ranges::default();
        for element in &set.elements {
            ranges.insert(&Piece::of(set, &element.parts));
        }
        ranges
    }

    /// Whether something that a piece stands for is held.
    fn overlap(&self, piece: &Piece<'_>) -> bool {
        let group = self.groups.get(&piece.group());
        group.is_some_and(|ports| ports.overlap(&piece.blocks(), piece.addresses))
    }

    fn insert(&mut self, piece: &Piece<'_>) {
        self.groups.entry(piece.group()).or_default().insert(&piece.blocks(), piece.addresses);
    }
}

/// Adds a range to others, joined with those that it overlaps or touches.
fn join(spans: &mut Spans, (mut first, mut last): (u128, u128)) {
    while let Some((&start, &end)) = spans.range(..=last.saturating_add(1)).next_back() {
        if end.saturating_add(1) < first {
            break;
        }
        spans.remove(&start);
        (first, last) = (first.min(start), last.max(end));
    }
    spans.insert(first, last);
}

impl SetAst {
    /// How many lower bits of hosts' addresses make no other element.
    pub(super) fn unit_bits(&self) -> u32 {
        match (self.options.netmask, self.kind.dimensions) {
            (Some(netmask), [Dimension::Host]) => {
                u32::from(self.family.unwrap_or(Family::V4).address_bits() - netmask)
            }
            _ => 0,
        }
    }

    /// The last address of a range of hosts that a set takes in. A bitmap goes from the first in steps of its netmask, so
    /// that the last may be left out (net/netfilter/ipset/ip_set_bitmap_ip.c, `bitmap_ip_uadt`).
    pub(super) fn last_taken(&self, first: IpAddr, last: IpAddr) -> IpAddr {
        match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) if self.kind.is_bitmap() => {
                let (first, unit) = (first.to_bits(), self.unit_bits());
                Ipv4Addr::from_bits(first + ((last.to_bits() - first) >> unit << unit)).into()
            }
            _ => last,
        }
    }
}
