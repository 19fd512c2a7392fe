//! Targets of the nat table: DNAT, SNAT, MASQUERADE, REDIRECT, NETMAP.

use polc_ir::hook::{Hook, TableKind};
use polc_ir::ruleset::Action;

use super::kernel;
use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base};
use crate::value;

const NAT: &[TableKind] = &[TableKind::Nat];
const RANDOM: Opt = Opt::new("random", Arg::Flag);
const RANDOM_FULLY: Opt = Opt::new("random-fully", Arg::Flag);
const PERSISTENT: Opt = Opt::new("persistent", Arg::Flag);
/// Protocols that have ports to translate.
const WITH_PORTS: &[u16] = &[6, 17, 132, 33, 1, 58, 136];

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        tables: NAT,
        hooks: &[Hook::Prerouting, Hook::Output],
        options: &[
            Opt::new("to-destination", Arg::Custom { words: 1, parse: parse_range, print: print_word }),
            RANDOM,
            PERSISTENT,
        ],
        finish: Some(|options, context| needs_ports(options, "to-destination", context)),
        ..base("DNAT", Meaning::Target(|_| translate("DNAT")), "Rewrites the destination of a connection.")
    },
    Extension {
        tables: NAT,
        hooks: &[Hook::Postrouting, Hook::Input],
        options: &[
            Opt::new("to-source", Arg::Custom { words: 1, parse: parse_range, print: print_word }),
            RANDOM,
            RANDOM_FULLY,
            PERSISTENT,
        ],
        finish: Some(|options, context| needs_ports(options, "to-source", context)),
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
        finish: Some(|options, context| {
            if options.has("to-ports") && !context.is_protocol(WITH_PORTS) {
                return Err("`--to-ports` needs `-p tcp`, `udp`, `sctp`, `dccp` or `icmp`".into());
            }
            Ok(())
        }),
        ..base(
            "REDIRECT",
            Meaning::Target(|_| translate("REDIRECT")),
            "Rewrites the destination to this host.",
        )
    },
    Extension {
        tables: NAT,
        options: &[Opt::new("to", Arg::Address)],
        ..base("NETMAP", Meaning::Target(|_| translate("NETMAP")), "Maps a network to another.")
    },
];

fn translate(name: &str) -> Action {
    Action::Steal(kernel(name, "translates addresses, which needs connection tracking"))
}

fn needs_ports(options: &mut Options, name: &str, context: &Context) -> Result<(), String> {
    let Some((Value::Text(text), _)) = options.value(name) else {
        return Err(format!("`--{name}` is needed"));
    };
    let ports = match text.rsplit_once(']') {
        Some((_, after)) => after.starts_with(':'),
        None => !text.contains("::") && text.matches(':').count() == 1,
    };
    if ports && !context.is_protocol(WITH_PORTS) {
        return Err("a port needs `-p tcp`, `udp`, `sctp`, `dccp` or `icmp`".into());
    }
    Ok(())
}

/// `[address[-address]][:port[-port[/base]]]`, addresses of IPv6 in brackets where ports follow; kept canonical.
fn parse_range(words: &[&str], context: &Context) -> Result<Value, String> {
    let text = words[0];
    let (addresses, ports) = if let Some(rest) = text.strip_prefix('[') {
        let (inside, after) = rest.split_once(']').ok_or_else(|| format!("`{text}` lacks a `]`"))?;
        match after.strip_prefix(':') {
            Some(ports) => (inside, Some(ports)),
            None if after.is_empty() => (inside, None),
            None => return Err(format!("`{after}` after the addresses; ports follow a `:`")),
        }
    } else if context.family == polc_ir::hook::Family::V4 {
        match text.split_once(':') {
            Some((addresses, ports)) => (addresses, Some(ports)),
            None => (text, None),
        }
    } else {
        (text, None)
    };
    let mut out = String::new();
    if !addresses.is_empty() {
        let one = |text: &str| {
            value::address(text, context.family).ok_or_else(|| format!("`{text}` is not an address"))
        };
        let (first, last) = addresses.split_once('-').unwrap_or((addresses, addresses));
        let (first, last) = (value::Ip(one(first)?), value::Ip(one(last)?));
        out = if first == last { first.to_string() } else { format!("{first}-{last}") };
        if ports.is_some() && context.family == polc_ir::hook::Family::V6 {
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
        Some((range, shift)) => {
            (range, Some(value::port(shift, None).filter(|&port| port > 0).ok_or_else(bad)?))
        }
        None => (text, None),
    };
    // A service name may hold a `-`, so the whole is tried first.
    let (first, last) = match (value::port(range, None), range.split_once('-')) {
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

fn parse_ports(words: &[&str], _: &Context) -> Result<Value, String> {
    if words[0].contains('/') {
        return Err(format!("`{}`: a base port is for DNAT alone", words[0]));
    }
    Ok(Value::Text(port_range(words[0])?.as_str().into()))
}

fn print_word(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        out.push(' ');
        out.push_str(text);
    }
}
