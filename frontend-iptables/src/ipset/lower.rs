//! Lowers sets to the IR: elements in the order in which the kernel looks them up.
//!
//! In `net` types the kernel tries prefix lengths from long to short, so a longer prefix decides before a shorter one
//! (net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`); only `nomatch` makes the order matter.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;

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

use super::element::{AddressForm, Part, prefix_ends, prefixes};
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
        let [Part::Address { first, last, form }, Part::Device { name, .. }] = &element.parts[..] else {
            continue;
        };
        let Some(device) = DeviceName::new(name) else { continue };
        let prefixes = match form {
            AddressForm::Prefix(length) => vec![(*first, *length)],
            AddressForm::Range => prefixes(*first, *last),
        };
        for (address, length) in prefixes {
            elements.push((bits(address), length, device));
            of.push(element);
        }
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
    let mut values = Values::new();
    let mask = mask(set);
    for ast in &set.elements {
        match &ast.parts[..] {
            // Most elements of large sets are this.
            [Part::Address { first, last, form: AddressForm::Prefix(length) }] if mask.is_none() => {
                let is_net = set.kind.dimensions[0] == Dimension::Net;
                let lengths = [if is_net { *length } else { 0 }, 0, 0];
                give(lengths, &[DimensionValue::Address(interval((*first, *last)))], ast.nomatch);
            }
            _ => add(set, ast, &mut values, [0; DIMENSIONS_MAX], &mut give)?,
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

type Lengths = [u8; DIMENSIONS_MAX];
type Values = SmallVec<[DimensionValue; DIMENSIONS_MAX]>;

/// Gives the elements that an element is, once the parts before have become `values`: a range in a dimension of prefixes
/// is several.
fn add(
    set: &SetAst,
    ast: &ElementAst,
    values: &mut Values,
    lengths: Lengths,
    give: &mut dyn FnMut(Lengths, &[DimensionValue], bool),
) -> Option<()> {
    let at = values.len();
    let Some(&dimension) = set.kind.dimensions.get(at) else {
        give(lengths, values, ast.nomatch);
        return Some(());
    };
    let one = match ast.parts.get(at)? {
        Part::Address { first, last, form } => {
            let mask = mask(set);
            // Both the element and the packet's address are masked, so the element covers whole prefixes.
            let under = |ends: (IpAddr, IpAddr), mask: Option<u8>| match mask {
                Some(length) => interval((prefix_ends(ends.0, length).0, prefix_ends(ends.1, length).1)),
                None => interval(ends),
            };
            if dimension == Dimension::Net {
                let whole: SmallVec<[(IpAddr, u8); 1]> = match form {
                    AddressForm::Prefix(length) => [(*first, *length)].into_iter().collect(),
                    AddressForm::Range => prefixes(*first, *last).into(),
                };
                for (address, length) in whole {
                    let covered = mask.map_or(length, |mask| mask.min(length));
                    let range = under((address, address), Some(covered));
                    values.push(DimensionValue::Address(range));
                    let mut lengths = lengths;
                    lengths[at] = length;
                    add(set, ast, values, lengths, give)?;
                    values.pop();
                }
                return Some(());
            }
            DimensionValue::Address(under((*first, *last), mask))
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
    };
    values.push(one);
    let added = add(set, ast, values, lengths, give);
    values.pop();
    added
}

/// Both ends are of one family, and parsing refuses ranges that run backwards.
fn interval((first, last): (IpAddr, IpAddr)) -> Interval {
    between(bits(first), bits(last))
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn between(first: u128, last: u128) -> Interval {
    Interval::new(first, last).expect("parsing refuses ranges that run backwards")
}
