//! Lowers sets to the IR: elements in the order in which the kernel looks them up.
//!
//! In `net` types the kernel tries prefix lengths from long to short, so a longer prefix decides before a shorter one
//! (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`); only `nomatch` makes the order matter.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use polc_ir::entities::Set;
use polc_ir::field::DeviceName;
use polc_ir::hook::Family;
use polc_ir::interval::Interval;
use polc_ir::ruleset::Ruleset;
use polc_ir::set::{
    DIMENSIONS_MAX, DimensionKind, DimensionValue, ElementList, SetContents, SetData, hides_shorter,
};
use polc_ir::source::Span;
use smallvec::SmallVec;

use super::element::{AddressForm, Part, bits, prefix_ends};
use super::kind::Dimension;
use super::{ElementAst, SetAst, Sets, print};
use crate::value::prefix_length;

/// Adds a file's sets to a rule set: those without addresses, and those of its family. Sets whose contents the IR can't
/// say are added with unknown contents; parsing has warned of them.
pub fn lower(sets: &Sets, family: Family, ruleset: &mut Ruleset) {
    let mut by_name: HashMap<&str, Set> = HashMap::new();
    let mut lists: Vec<(Set, &SetAst)> = Vec::new();
    let of_family = |set: &&SetAst| set.family.is_none_or(|own| own == family);
    for ast in sets.iter().filter(of_family) {
        let (dimensions, contents) = if is_list(ast) {
            (Vec::new(), SetContents::Sets(Vec::new()))
        } else {
            match elements(ast) {
                Some(elements) => (
                    ast.kind.dimensions.iter().filter_map(dimension_kind).collect(),
                    SetContents::Elements(elements.into()),
                ),
                None => (Vec::new(), SetContents::Unknown),
            }
        };
        let data = SetData {
            name: ast.name.clone(),
            family: ast.family,
            dimensions,
            netmask: mask(ast),
            mark_mask: ast.options.mark_mask.unwrap_or(u32::MAX),
            elements_max: ast.elements_max(),
            expires: ast.options.timeout.is_some(),
            changed: false,
            live: false,
            fixed: fixed(ast),
            contents,
            create: print::create_line(ast),
            span: ast.span,
        };
        let set = ruleset.sets.push(data);
        by_name.insert(&ast.name, set);
        if is_list(ast) {
            lists.push((set, ast));
        }
    }
    // A list may be created before what it gets.
    for (list, ast) in lists {
        // Members of the other family hold nothing of this one.
        let members = ast.elements.iter().filter_map(|element| match element.parts.first() {
            Some(Part::Set(name)) => by_name.get(&**name).copied(),
            _ => None,
        });
        ruleset.sets[list].contents = SetContents::Sets(members.collect());
    }
}

/// Why a program's table of the set can't change by single elements, if so.
fn fixed(set: &SetAst) -> Option<&'static str> {
    match set.kind.dimensions {
        [Dimension::SingleHost, Dimension::Mac] => Some("an address has one Ethernet address in it"),
        [Dimension::Net, Dimension::Device] => Some("a prefix of one device hides shorter ones of others"),
        _ => None,
    }
}

fn is_list(set: &SetAst) -> bool {
    set.kind.dimensions == [Dimension::Set]
}

fn dimension_kind(dimension: &Dimension) -> Option<DimensionKind> {
    match dimension {
        Dimension::Host | Dimension::SingleHost => Some(DimensionKind::Address),
        Dimension::Net => Some(DimensionKind::Net),
        Dimension::Port | Dimension::TcpUdpPort => Some(DimensionKind::Port),
        Dimension::Mac => Some(DimensionKind::Mac),
        Dimension::Mark => Some(DimensionKind::Mark),
        Dimension::Device => Some(DimensionKind::Device),
        Dimension::Set => None,
    }
}

/// Whether the IR can say what is in a set; if not, why, and where.
pub(super) fn can_say(set: &SetAst) -> Result<(), (String, Span)> {
    let bitmask = set.options.bitmask;
    if !set.elements.is_empty() && bitmask.is_some_and(|mask| prefix_length(mask).is_none()) {
        return Err(("its `bitmask` is not a prefix".into(), set.elements[0].span));
    }
    // Elements of all other types are as long as they are, and have no devices.
    if !set.kind.dimensions.iter().any(|dimension| matches!(dimension, Dimension::Device | Dimension::Mac)) {
        return Ok(());
    }
    for element in &set.elements {
        for at in 0..set.kind.dimensions.len() {
            let why = match element.parts.get(at) {
                Some(Part::Device { physical: true, .. }) => "it names bridge ports",
                Some(Part::Device { .. }) if element.wildcard => "it names devices by prefix",
                Some(Part::Device { name, .. }) if DeviceName::new(name).is_none() => {
                    return Err((format!("`{name}` is no device name"), element.span));
                }
                None => "an element without Ethernet address takes the first it meets",
                Some(_) => continue,
            };
            return Err((why.into(), element.span));
        }
    }
    if set.kind.dimensions == [Dimension::Net, Dimension::Device]
        && let Some(element) = hiding(set)
    {
        let why = "it keeps shorter prefixes of other devices from being looked at";
        return Err((why.into(), element.span));
    }
    Ok(())
}

/// An element of a `hash:net,iface` that hides others.
fn hiding(set: &SetAst) -> Option<&ElementAst> {
    let mut elements = Vec::new();
    let mut of = Vec::new();
    for element in &set.elements {
        let [Part::Address { first, form: AddressForm::Prefix(length), .. }, Part::Device { name, .. }] =
            &element.parts[..]
        else {
            continue;
        };
        let Some(device) = DeviceName::new(name) else { continue };
        elements.push((bits(*first), *length, device));
        of.push(element);
    }
    let width = set.family.unwrap_or(Family::V4).address_bits();
    hides_shorter(&elements, width).map(|at| of[at])
}

/// The elements of a set in the kernel's order of look-up, none for a list; `None` if the IR can't say them.
fn elements(set: &SetAst) -> Option<ElementList> {
    if is_list(set) {
        return Some(ElementList::default());
    }
    can_say(set).ok()?;
    // By the lengths of their prefixes, the longest first; those of no prefixes are of one length.
    let mut by_lengths: Vec<(Lengths, ElementList)> = Vec::new();
    let mut last = 0;
    let mut give = |lengths, values: &[DimensionValue], nomatch| {
        // Mostly those of the element before.
        if by_lengths.get(last).is_none_or(|(known, _)| *known != lengths) {
            let known = by_lengths.iter().position(|(known, _)| *known == lengths);
            last = known.unwrap_or(by_lengths.len());
            if known.is_none() {
                by_lengths.push((lengths, ElementList::default()));
            }
        }
        by_lengths[last].1.push(values, nomatch);
    };
    let mask = mask(set);
    for ast in &set.elements {
        match &ast.parts[..] {
            // Most elements of large sets are this.
            [Part::Address { first, last, form: AddressForm::Prefix(length) }] if mask.is_none() => {
                let is_net = set.kind.dimensions[0] == Dimension::Net;
                let lengths = [if is_net { *length } else { 0 }, 0, 0];
                give(lengths, &[DimensionValue::Address(interval((*first, *last)))], ast.nomatch);
            }
            parts if mask.is_some_and(|length| is_never_found(set, parts, length)) => {}
            _ => {
                let (lengths, values) = values(set, ast)?;
                give(lengths, &values, ast.nomatch);
            }
        }
    }
    by_lengths.sort_by_key(|(lengths, _)| Reverse(*lengths));
    let mut all = ElementList::default();
    by_lengths.into_iter().for_each(|(_, list)| all.append(list));
    Some(all)
}

/// How many leading bits of addresses count, if not all.
fn mask(set: &SetAst) -> Option<u8> {
    set.options.netmask.or(set.options.bitmask.and_then(prefix_length))
}

/// Where the first whole block of a range of hosts begins. Most ranges begin with one; of those that were written
/// backwards the set holds the addresses from the last on. `None` if there is none.
fn first_block(set: &SetAst, first: IpAddr, length: u8) -> Option<IpAddr> {
    let (start, end) = prefix_ends(first, length);
    if start == first || set.kind.is_bitmap() {
        return Some(start);
    }
    match end {
        IpAddr::V4(end) => end.to_bits().checked_add(1).map(|next| Ipv4Addr::from_bits(next).into()),
        IpAddr::V6(end) => end.to_bits().checked_add(1).map(|next| Ipv6Addr::from_bits(next).into()),
    }
}

/// Whether no packet's address, of which so many bits count, is one that the set holds of an element.
fn is_never_found(set: &SetAst, parts: &[Part], length: u8) -> bool {
    parts.iter().zip(set.kind.dimensions).any(|(part, dimension)| match part {
        Part::Address { first, last, .. } if *dimension == Dimension::Host => {
            first_block(set, *first, length).is_none_or(|first| first > *last)
        }
        _ => false,
    })
}

type Lengths = [u8; DIMENSIONS_MAX];
type Values = SmallVec<[DimensionValue; DIMENSIONS_MAX]>;

/// What an element is in each dimension, and the lengths of its prefixes.
fn values(set: &SetAst, ast: &ElementAst) -> Option<(Lengths, Values)> {
    let (mut lengths, mut values) = ([0; DIMENSIONS_MAX], Values::new());
    for (at, &dimension) in set.kind.dimensions.iter().enumerate() {
        values.push(match ast.parts.get(at)? {
            Part::Address { first, last, form: AddressForm::Prefix(length) }
                if dimension == Dimension::Net =>
            {
                lengths[at] = *length;
                DimensionValue::Address(interval((*first, *last)))
            }
            Part::Address { first, last, .. } => {
                let (first, last) = (*first, set.last_taken(*first, *last));
                // The packet's address is masked, so the element covers whole prefixes.
                DimensionValue::Address(interval(match mask(set) {
                    Some(length) => (first_block(set, first, length)?, prefix_ends(last, length).1),
                    None => (first, last),
                }))
            }
            Part::Port { protocol, first, last } => {
                DimensionValue::Port { proto: *protocol, ports: between((*first).into(), (*last).into()) }
            }
            Part::Mac(mac) => {
                DimensionValue::Mac(mac.0.iter().fold(0, |bits, &byte| bits << 8 | u64::from(byte)))
            }
            Part::Mark(mark) => {
                let mask = set.options.mark_mask.unwrap_or(u32::MAX);
                DimensionValue::Mark { mask, value: mark & mask }
            }
            Part::Device { name, .. } => DimensionValue::Device(DeviceName::new(name)?),
            Part::Set(_) => return None,
        });
    }
    Some((lengths, values))
}

/// Both ends are of one family, the first no higher than the last.
fn interval((first, last): (IpAddr, IpAddr)) -> Interval {
    between(bits(first), bits(last))
}

fn between(first: u128, last: u128) -> Interval {
    Interval::new(first, last).expect("parsing puts the ends of ranges in order")
}
