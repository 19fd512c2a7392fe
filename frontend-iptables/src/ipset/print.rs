//! Prints sets as `ipset save` does: options in its order, defaults written out, host bits cleared.
//!
//! Elements keep the file's order, since the kernel's depends on its hash. Ranges stay, but those that reading made
//! prefixes of, for the kernel alone would write out every address.

use std::fmt::Write;
use std::net::IpAddr;

use polc_ir::hook::Family;

use super::element::{AddressForm, ICMP, ICMPV6, Part, is_backwards};
use super::parse::single_prefix;
use super::{ElementAst, SetAst, Sets};
use crate::names;
use crate::value::Ip;

/// The sets as a save file, each with its elements.
pub fn print(sets: &Sets) -> String {
    let mut out = String::new();
    for set in sets.iter() {
        create(set, &mut out);
        for element in &set.elements {
            add(set, element, &mut out);
        }
    }
    out
}

/// The line that creates a set.
pub(super) fn create_line(set: &SetAst) -> String {
    let mut line = String::new();
    create(set, &mut line);
    line
}

fn create(set: &SetAst, out: &mut String) {
    let _ = write!(out, "create {} {}", set.name, set.kind.name);
    let options = &set.options;
    for &name in set.kind.create {
        let mut value = |value: String| {
            let _ = write!(out, " {name} {value}");
        };
        let number = |number: Option<u32>| number.map(|number| number.to_string());
        let text = match name {
            "family" => {
                set.family.map(|family| if family == Family::V4 { "inet" } else { "inet6" }.to_string())
            }
            "hashsize" => number(options.hash_size.or(Some(1_024))),
            "maxelem" => number(options.elements_max.or(Some(65_536))),
            "netmask" => number(options.netmask.map(u32::from)),
            "bitmask" => options.bitmask.map(|mask| Ip(mask).to_string()),
            "markmask" => options.mark_mask.map(|mask| format!("0x{mask:08x}")),
            "timeout" => number(options.timeout),
            "size" => number(options.size.or(Some(8))),
            "bucketsize" => number(options.bucket_size.map(u32::from)),
            "initval" => options.seed.map(|seed| format!("0x{seed:08x}")),
            "range" => match (options.addresses, options.ports) {
                (Some((first, last)), _) => Some(format!("{}-{}", Ip(first), Ip(last))),
                (None, Some((first, last))) => Some(format!("{first}-{last}")),
                (None, None) => None,
            },
            flag => {
                let given = match flag {
                    "counters" => options.counters,
                    "comment" => options.comment,
                    "forceadd" => options.force_add,
                    _ => options.skbinfo,
                };
                if given {
                    out.push(' ');
                    out.push_str(flag);
                }
                continue;
            }
        };
        if let Some(text) = text {
            value(text);
        }
    }
    out.push('\n');
}

fn add(set: &SetAst, element: &ElementAst, out: &mut String) {
    let _ = write!(out, "add {}", set.name);
    for (part, at) in element.parts.iter().zip(0..) {
        out.push(if at == 0 { ' ' } else { ',' });
        out.push_str(&text(part, set));
    }
    options(element, out);
    out.push('\n');
}

fn options(element: &ElementAst, out: &mut String) {
    let extra = element.extra.as_deref();
    if let Some(timeout) = extra.and_then(|extra| extra.timeout) {
        let _ = write!(out, " timeout {timeout}");
    }
    out.push_str(if element.nomatch { " nomatch" } else { "" });
    out.push_str(if element.wildcard { " wildcard" } else { "" });
    let Some(extra) = extra else { return };
    if let Some(packets) = extra.packets {
        let _ = write!(out, " packets {packets}");
    }
    if let Some(bytes) = extra.bytes {
        let _ = write!(out, " bytes {bytes}");
    }
    if let Some(comment) = &extra.comment {
        let _ = write!(out, " comment \"{comment}\"");
    }
    if let Some(mark) = extra.mark {
        let _ = write!(out, " skbmark {mark}");
    }
    if let Some(priority) = extra.priority {
        let _ = write!(out, " skbprio {:x}:{:x}", priority >> 16, priority & 0xffff);
    }
    if let Some(queue) = extra.queue {
        let _ = write!(out, " skbqueue {queue}");
    }
}

fn prefix(address: IpAddr, length: u8) -> String {
    let full = if address.is_ipv4() { 32 } else { 128 };
    if length == full { Ip(address).to_string() } else { format!("{}/{length}", Ip(address)) }
}

fn text(part: &Part, set: &SetAst) -> String {
    match part {
        Part::Address { first, last, form } => match form {
            AddressForm::Prefix(length) => prefix(*first, *length),
            AddressForm::Range => match single_prefix(*first, *last) {
                Some(AddressForm::Prefix(length)) => prefix(*first, length),
                _ if is_backwards(set, *first) => format!("{}-{}", Ip(*last), Ip(*first)),
                _ => format!("{}-{}", Ip(*first), Ip(*last)),
            },
        },
        Part::Port { protocol, first, last } => {
            let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
            let Some(protocol) = *protocol else { return range };
            let name = names::system_protocol_name(protocol.into());
            let name = name.map_or_else(|| protocol.to_string(), ToOwned::to_owned);
            let icmp = match protocol {
                1 => Some(ICMP),
                58 => Some(ICMPV6),
                _ => None,
            };
            match icmp {
                Some(table) => match table.iter().find(|row| row.1 == *first) {
                    Some((kind, _)) => format!("{name}:{kind}"),
                    None => format!("{name}:{}/{}", first >> 8, first & 0xff),
                },
                None => format!("{name}:{range}"),
            }
        }
        Part::Mac(mac) => mac.to_string().to_uppercase(),
        Part::Mark(mark) => format!("0x{:08x}", mark & set.options.mark_mask.unwrap_or(u32::MAX)),
        Part::Device { name, physical } => format!("{}{name}", if *physical { "physdev:" } else { "" }),
        Part::Set(name) => name.to_string(),
    }
}
