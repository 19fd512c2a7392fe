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
use polc_ir::set::{DimensionKind, DimensionValue, Element, SetContents, SetData};
use polc_ir::source::Span;

use super::element::{Part, prefix_ends, prefixes};
use super::kind::Dimension;
use super::{ElementAst, SetAst, Sets};
use crate::value::prefix_length;

/// Adds a file's sets to a rule set: those without addresses, and those of its family. Sets whose contents the IR can't
/// say are added with unknown contents; parsing has warned of them.
pub fn lower(sets: &Sets, family: Family, ruleset: &mut Ruleset) {
    let mut by_name: HashMap<&str, Set> = HashMap::new();
    let of_family = |set: &&SetAst| set.family.is_none_or(|own| own == family);
    for ast in sets.iter().filter(of_family) {
        let (dimensions, contents) = if is_list(ast) {
            // Members of the other family hold nothing of this one.
            let members = ast.elements.iter().filter_map(|element| match element.parts.first() {
                Some(Part::Set(name)) => by_name.get(&**name).copied(),
                _ => None,
            });
            (Vec::new(), SetContents::Sets(members.collect()))
        } else {
            match elements(ast) {
                Ok(elements) => (
                    ast.kind.dimensions.iter().filter_map(dimension_kind).collect(),
                    SetContents::Elements(elements),
                ),
                Err(_) => (Vec::new(), SetContents::Unknown),
            }
        };
        let data =
            SetData { name: ast.name.clone(), family: ast.family, dimensions, contents, span: ast.span };
        by_name.insert(&ast.name, ruleset.sets.push(data));
    }
}

fn is_list(set: &SetAst) -> bool {
    set.kind.dimensions == [Dimension::Set]
}

fn dimension_kind(dimension: &Dimension) -> Option<DimensionKind> {
    match dimension {
        Dimension::Host | Dimension::SingleHost | Dimension::Net => Some(DimensionKind::Address),
        Dimension::Port | Dimension::TcpUdpPort => Some(DimensionKind::Port),
        Dimension::Mac => Some(DimensionKind::Mac),
        Dimension::Mark => Some(DimensionKind::Mark),
        Dimension::Device => Some(DimensionKind::Device),
        Dimension::Set => None,
    }
}

/// The elements of a set in the kernel's order of look-up, none for a list; or why the IR can't say them, and where.
pub(super) fn elements(set: &SetAst) -> Result<Vec<Element>, (String, Span)> {
    if is_list(set) {
        return Ok(Vec::new());
    }
    // Each with the lengths of its prefixes, which order the elements.
    let mut elements: Vec<(Vec<Reverse<u8>>, Element)> = Vec::new();
    for ast in &set.elements {
        let mut variants = vec![(Vec::new(), Vec::new())];
        for (index, &dimension) in set.kind.dimensions.iter().enumerate() {
            let values = values(ast.parts.get(index), dimension, set, ast).map_err(|why| (why, ast.span))?;
            variants = variants
                .iter()
                .flat_map(|(lengths, earlier)| {
                    values.iter().map(move |&(length, value)| {
                        let (mut lengths, mut values): (Vec<_>, Vec<_>) = (lengths.clone(), earlier.clone());
                        lengths.extend(length.map(Reverse));
                        values.push(value);
                        (lengths, values)
                    })
                })
                .collect();
        }
        let nomatch = ast.nomatch;
        elements.extend(variants.into_iter().map(|(lengths, values)| (lengths, Element { values, nomatch })));
    }
    elements.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(elements.into_iter().map(|(_, element)| element).collect())
}

/// The values of a part; a range in a dimension of prefixes is several, each with its length.
fn values(
    part: Option<&Part>,
    dimension: Dimension,
    set: &SetAst,
    element: &ElementAst,
) -> Result<Vec<(Option<u8>, DimensionValue)>, String> {
    let one = |value| Ok(vec![(None, value)]);
    match part {
        Some(Part::Address { first, last, .. }) => {
            let mask = match (set.options.netmask, set.options.bitmask) {
                (Some(length), _) => Some(length),
                (None, Some(mask)) => Some(prefix_length(mask).ok_or("its `bitmask` is not a prefix")?),
                (None, None) => None,
            };
            // Both the element and the packet's address are masked, so the element covers whole prefixes.
            let ends = match mask {
                Some(length) => (prefix_ends(*first, length).0, prefix_ends(*last, length).1),
                None => (*first, *last),
            };
            if dimension != Dimension::Net {
                return one(DimensionValue::Address(interval(ends)));
            }
            let prefixes = prefixes(*first, *last);
            Ok(prefixes
                .iter()
                .map(|&(address, length)| {
                    let covered = prefix_ends(address, mask.map_or(length, |mask| mask.min(length)));
                    (Some(length), DimensionValue::Address(interval(covered)))
                })
                .collect())
        }
        Some(Part::Port { protocol, first, last }) => {
            one(DimensionValue::Port { proto: *protocol, ports: between((*first).into(), (*last).into()) })
        }
        Some(Part::Mac(mac)) => {
            one(DimensionValue::Mac(mac.0.iter().fold(0, |bits, &byte| bits << 8 | u64::from(byte))))
        }
        Some(Part::Mark(mark)) => {
            let mask = set.options.mark_mask.unwrap_or(u32::MAX);
            one(DimensionValue::Mark { mask, value: mark & mask })
        }
        Some(Part::Device { physical: true, .. }) => Err("it names bridge ports".into()),
        Some(Part::Device { .. }) if element.wildcard => Err("it names devices by prefix".into()),
        Some(Part::Device { name, .. }) => {
            let name = DeviceName::new(name).ok_or_else(|| format!("`{name}` is no device name"))?;
            one(DimensionValue::Device(name))
        }
        Some(Part::Set(name)) => Err(format!("`{name}` is a set")),
        None => Err("an element without Ethernet address takes the first it meets".into()),
    }
}

/// Both ends are of one family, and parsing refuses ranges that run backwards.
fn interval((first, last): (IpAddr, IpAddr)) -> Interval {
    let bits = |address| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    between(bits(first), bits(last))
}

fn between(first: u128, last: u128) -> Interval {
    Interval::new(first, last).expect("parsing refuses ranges that run backwards")
}
