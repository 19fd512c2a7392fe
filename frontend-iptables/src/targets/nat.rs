//! Targets of the nat table: DNAT, SNAT, MASQUERADE, REDIRECT, NETMAP.

use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::ruleset::Action;

use super::kernel;
use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base, print_word};
use crate::{names, value};

const NAT: &[TableKind] = &[TableKind::Nat];
const RANDOM: Opt = Opt::new("random", Arg::Flag);
const RANDOM_FULLY: Opt = Opt::new("random-fully", Arg::Flag);
const PERSISTENT: Opt = Opt::new("persistent", Arg::Flag);
/// Protocols that have ports, or what stands for them, to translate (extensions/libxt_NAT.c in iptables).
const WITH_PORTS: &[u16] = &[6, 17, 132, 33, 1];

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        tables: NAT,
        hooks: &[Hook::Prerouting, Hook::Output],
        options: &[
            Opt::new("to-destination", Arg::Custom { words: 1, parse: parse_range, print: print_word })
                .must(),
            RANDOM,
            PERSISTENT,
        ],
        protocol_first: true,
        finish: Some(|options, context| address_ports(options, "to-destination", context)),
        ..base("DNAT", Meaning::Target(|_| translate("DNAT")), "Rewrites the destination of a connection.")
    },
    Extension {
        tables: NAT,
        hooks: &[Hook::Postrouting, Hook::Input],
        options: &[
            Opt::new("to-source", Arg::Custom { words: 1, parse: parse_source, print: print_word }).must(),
            RANDOM,
            RANDOM_FULLY,
            PERSISTENT,
        ],
        protocol_first: true,
        finish: Some(|options, context| address_ports(options, "to-source", context)),
        ..base("SNAT", Meaning::Target(|_| translate("SNAT")), "Rewrites the source of a connection.")
    },
    Extension {
        tables: NAT,
        hooks: &[Hook::Postrouting],
        options: &[
            Opt::new("to-ports", Arg::Custom { words: 1, parse: parse_ports, print: print_word }),
            RANDOM,
            RANDOM_FULLY,
        ],
        protocol_first: true,
        finish: Some(|options, context| needs_ports(options.has("to-ports"), context)),
        ..base(
            "MASQUERADE",
            Meaning::Target(|_| translate("MASQUERADE")),
            "Rewrites the source to the output device's address.",
        )
    },
    Extension {
        tables: NAT,
        hooks: &[Hook::Prerouting, Hook::Output],
        options: &[
            Opt::new("to-ports", Arg::Custom { words: 1, parse: parse_ports, print: print_word }),
            RANDOM,
        ],
        protocol_first: true,
        finish: Some(|options, context| needs_ports(options.has("to-ports"), context)),
        ..base(
            "REDIRECT",
            Meaning::Target(|_| translate("REDIRECT")),
            "Rewrites the destination to this host.",
        )
    },
    Extension {
        tables: NAT,
        options: &[Opt::new("to", Arg::Network).must()],
        ..base("NETMAP", Meaning::Target(|_| translate("NETMAP")), "Maps a network to another.")
    },
];

fn translate(name: &str) -> Action {
    Action::Steal(kernel(name, "translates addresses, which needs connection tracking"))
}

fn needs_ports(ports: bool, context: &Context) -> Result<(), String> {
    // iptables looks at the protocol alone, not at what negates it.
    if ports && !context.protocol.is_some_and(|(protocol, _)| WITH_PORTS.contains(&protocol)) {
        return Err("a port needs `-p tcp`, `udp`, `sctp`, `dccp` or `icmp`".into());
    }
    Ok(())
}

fn address_ports(options: &mut Options, name: &str, context: &Context) -> Result<(), String> {
    let text = options.value(name).and_then(|(value, _)| value.text()).unwrap_or("");
    let ports = match text.rsplit_once(']') {
        Some((_, after)) => after.starts_with(':'),
        None => text.starts_with(':') && !text.starts_with("::") || text.matches(':').count() == 1,
    };
    needs_ports(ports, context)
}

/// As [`parse_range`]; what would be shifted to is lost.
fn parse_source(words: &[&str], context: &Context) -> Result<Value, String> {
    let value = parse_range(words, context)?;
    match value.text().and_then(|text| text.split_once('/')) {
        Some((range, _)) => Ok(Value::Text(format!("{range}/0").as_str().into())),
        None => Ok(value),
    }
}

/// `[address[-address]][:port[-port[/base]]]`, addresses of IPv6 in brackets where ports follow; kept canonical.
fn parse_range(words: &[&str], context: &Context) -> Result<Value, String> {
    let text = words[0];
    let (addresses, ports) = match (context.family, text.strip_prefix('[')) {
        (Family::V4, _) => match text.split_once(':') {
            Some((addresses, ports)) => (addresses, Some(ports)),
            None => (text, None),
        },
        // What follows the bracket counts from its first colon on.
        (Family::V6, Some(rest)) => {
            let (inside, after) = rest.split_once(']').ok_or_else(|| format!("`{text}` lacks a `]`"))?;
            (inside, after.split_once(':').map(|(_, ports)| ports))
        }
        // A single colon is no part of an address.
        (Family::V6, None) => match text.strip_prefix(':').filter(|rest| !rest.contains(':')) {
            Some(ports) => ("", Some(ports)),
            None => (text, None),
        },
    };
    if addresses.is_empty() && ports.is_none() {
        return Err("neither an address nor a port".into());
    }
    let mut out = String::new();
    if !addresses.is_empty() {
        let one = |text: &str| {
            value::address(text, context.family).ok_or_else(|| format!("`{text}` is not an address"))
        };
        let (first, last) = addresses.split_once('-').unwrap_or((addresses, addresses));
        let (first, last) = (value::Ip(one(first)?), value::Ip(one(last)?));
        out = if first == last { first.to_string() } else { format!("{first}-{last}") };
        if ports.is_some() && context.family == Family::V6 {
            out = format!("[{out}]");
        }
    }
    if let Some(ports) = ports {
        out.push(':');
        out.push_str(&port_range(ports)?);
    }
    Ok(Value::Text(out.as_str().into()))
}

fn port_range(text: &str) -> Result<String, String> {
    let bad = || format!("`{text}` is not a port or a range of ports");
    let (range, shift) = match text.split_once('/') {
        Some((range, shift)) => (range, Some(base_port(shift).ok_or_else(bad)?)),
        None => (text, None),
    };
    // A service name may hold a `-`, so the whole is tried first.
    let (first, last) = match (value::port(range, None), range.split_once('-')) {
        (Some(_), _) if shift.is_some() => {
            return Err(format!("`{text}`: a base port is for a range of ports"));
        }
        (Some(port), _) => (port, port),
        // In a range only numbers will do.
        (None, Some((first, last))) => {
            let number = |text| value::number(text, 0, 65_535).map(|port| port as u16).ok_or_else(bad);
            (number(first)?, number(last)?)
        }
        (None, None) => return Err(bad()),
    };
    if first > last {
        return Err(format!("`{text}` ends below its start"));
    }
    let mut out = if first == last { first.to_string() } else { format!("{first}-{last}") };
    if let Some(shift) = shift {
        out = format!("{out}/{shift}");
    }
    Ok(out)
}

/// A port that is not 0: a number, with anything behind it (extensions/libxt_NAT.c), or a service's name.
fn base_port(text: &str) -> Option<u16> {
    let number = value::strtoul(text, 0).map(|(number, _)| number);
    let port = number.and_then(|number| number.try_into().ok()).filter(|&port| port > 0);
    port.or_else(|| names::service(text, None)).filter(|&port| port > 0)
}

fn parse_ports(words: &[&str], _: &Context) -> Result<Value, String> {
    if words[0].contains('/') {
        return Err(format!("`{}`: a base port is for DNAT alone", words[0]));
    }
    Ok(Value::Text(port_range(words[0])?.as_str().into()))
}
