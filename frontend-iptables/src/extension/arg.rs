//! The kinds of arguments that options take: how each is read into a typed value and printed back.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use polc_ir::hook::Family;
use polc_ir::source::bytes;

use super::Context;
use crate::ast::Text;
use crate::names::{self, icmp, icmp::IcmpType};
use crate::value::{self, AddressMask, BadAddress, HostMask, Ip, Mac, Masked, PortRange, Rate, Spelling};

/// A typed argument.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// The option takes none.
    None,
    /// A number.
    Number(u64),
    /// A closed range of numbers.
    Range(u64, u64),
    /// A value under a mask.
    Masked(Masked),
    /// Ports from first to last.
    Ports(PortRange),
    /// A list of ports and port ranges.
    PortList(Vec<PortRange>),
    /// Text.
    Text(Text),
    /// Named numbers, in the order given.
    List(Vec<u64>),
    /// An address under a mask.
    Address(AddressMask),
    /// A host and how much of its address counts.
    Host(HostMask),
    /// Bytes.
    Bytes(Arc<[u8]>),
    /// A rate.
    Rate(Rate),
    /// Addresses from first to last.
    Addresses(IpAddr, IpAddr),
    /// An Ethernet address.
    Mac(Mac),
    /// An ICMP type and its codes.
    Icmp(IcmpType),
}

impl Value {
    /// The number, of a [`Value::Number`].
    pub fn number(&self) -> Option<u64> {
        if let Value::Number(number) = *self { Some(number) } else { None }
    }

    /// The text, of a [`Value::Text`].
    pub fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }
}

/// Names and the numbers they stand for. The first name of a number is the one printed.
pub type Names = &'static [(&'static str, u64)];

/// What an option takes.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// Nothing.
    Flag,
    /// A number between the bounds, printed in decimal.
    Number(u64, u64),
    /// A number up to the bound, printed in hexadecimal.
    Hex(u64),
    /// A number, or a range of two joined by this character; an end left out is the least or greatest number, nothing
    /// at all is 0. A range may end below its start: it holds nothing.
    Range(char, u64),
    /// `value[/mask]` of 32 bits.
    Mark,
    /// `port[:port]` of one of these protocols.
    Ports(Option<&'static str>),
    /// One port by number or service name, printed in decimal.
    Service,
    /// Up to 15 ports and port ranges.
    PortList,
    /// Text of at most so many bytes, printed in quotes where iptables-save does.
    Text(usize),
    /// Text of at most so many bytes, printed always in quotes.
    Quoted(usize),
    /// Text of at most so many bytes, printed as it is.
    Word(usize),
    /// As [`Arg::Text`], but longer text is cut.
    CutText(usize),
    /// As [`Arg::Word`], but longer text is cut.
    CutWord(usize),
    /// One of these names.
    Name(Names, Spelling),
    /// A list of names, joined by commas.
    Names(Names, Spelling),
    /// As [`Arg::Names`], but nothing between commas is no name at all.
    Items(Names, Spelling),
    /// `host[/length]`, host bits kept, a full length not printed.
    Host,
    /// `host[/length]`, host bits cleared, the length always printed.
    Network,
    /// The length of a prefix, or a mask.
    Length,
    /// `host/length`, the length not left out, and no host bits.
    Prefix,
    /// `first[-last]`.
    Addresses,
    /// An Ethernet address.
    Mac,
    /// An ICMP type of this family.
    Icmp(Family),
    /// Two words: a mask of TCP flags and the flags that are set.
    TcpFlags,
    /// Two words: a set's name and which ends are looked up.
    SetEnds,
    /// What no kind above does: a parser (which may read more words than one) and a printer.
    Custom {
        /// How many words it takes.
        words: u8,
        /// Reads them.
        parse: fn(&[&str], &Context) -> Result<Value, String>,
        /// Prints the value, with a blank before it.
        print: fn(&Value, &mut String),
    },
}

/// TCP's flags, in the order iptables-save prints them.
pub(super) const TCP_FLAGS: &[(&str, u8)] =
    &[("FIN", 0x01), ("SYN", 0x02), ("RST", 0x04), ("PSH", 0x08), ("ACK", 0x10), ("URG", 0x20)];

impl Arg {
    /// How many words it takes.
    pub fn words(self) -> usize {
        match self {
            Arg::Flag => 0,
            Arg::TcpFlags | Arg::SetEnds => 2,
            Arg::Custom { words, .. } => words.into(),
            _ => 1,
        }
    }

    /// What it looks like, for documentation.
    pub fn metavar(self) -> &'static str {
        match self {
            Arg::Flag => "",
            Arg::Number(..) | Arg::Hex(_) => "number",
            Arg::Range(..) => "number[:number]",
            Arg::Mark => "value[/mask]",
            Arg::Ports(_) => "port[:port]",
            Arg::Service => "port",
            Arg::PortList => "port[,port|,port:port]...",
            Arg::Text(_) | Arg::Quoted(_) | Arg::Word(_) | Arg::CutText(_) | Arg::CutWord(_) => "text",
            Arg::Name(..) => "name",
            Arg::Names(..) | Arg::Items(..) => "name[,name]...",
            Arg::Host | Arg::Network => "address[/mask]",
            Arg::Length => "length",
            Arg::Prefix => "address/mask",
            Arg::Addresses => "address[-address]",
            Arg::Mac => "xx:xx:xx:xx:xx:xx",
            Arg::Icmp(_) => "type[/code]",
            Arg::TcpFlags => "mask flags",
            Arg::SetEnds => "set src|dst[,src|,dst]...",
            Arg::Custom { words: 2, .. } => "value value",
            Arg::Custom { .. } => "value",
        }
    }

    /// Reads the argument; the error says what is wrong with it.
    pub fn parse(self, words: &[&str], context: &Context) -> Result<Value, String> {
        let text = words.first().copied().unwrap_or("");
        match self {
            Arg::Flag => Ok(Value::None),
            Arg::Number(min, max) => value::number(text, min, max)
                .map(Value::Number)
                .ok_or_else(|| format!("`{text}` is not a number from {min} to {max}")),
            Arg::Hex(max) => value::number(text, 0, max)
                .map(Value::Number)
                .ok_or_else(|| format!("`{text}` is not a number up to {max:#x}")),
            Arg::Range(separator, max) => range(text, separator, max),
            Arg::Mark => Masked::parse(text)
                .map(Value::Masked)
                .ok_or_else(|| format!("`{text}` is not a mark or `mark/mask`")),
            Arg::Ports(protocol) => PortRange::parse(text, protocol)
                .map(Value::Ports)
                .ok_or_else(|| format!("`{text}` is not a port, a service name or a range of them")),
            Arg::Service => value::resolved_port(text)
                .map(|port| Value::Number(port.into()))
                .ok_or_else(|| format!("`{text}` is not a port or service name")),
            Arg::PortList => port_list(text, context),
            Arg::Text(max) | Arg::Quoted(max) | Arg::Word(max) => {
                if bytes::count(text) > max {
                    return Err(format!("the text is longer than {max} bytes"));
                }
                Ok(Value::Text(text.into()))
            }
            Arg::CutText(max) | Arg::CutWord(max) => Ok(Value::Text((&*value::cut(text, max)).into())),
            Arg::Name(names, spelling) => names
                .iter()
                .find(|(name, _)| spelling.fits(text, name))
                .map(|&(_, number)| Value::Number(number))
                .ok_or_else(|| format!("`{text}` is none of {}", list_names(names))),
            Arg::Names(names, spelling) => value::name_list(text, names, spelling)
                .map(Value::List)
                .map_err(|item| format!("`{item}` is none of {}", list_names(names))),
            Arg::Items(names, spelling) => {
                let items: Vec<&str> = text.split(',').filter(|item| !item.is_empty()).collect();
                match items.is_empty() {
                    true => Ok(Value::List(Vec::new())),
                    false => Arg::Names(names, spelling).parse(&[&items.join(",")], context),
                }
            }
            Arg::Host => host(text, context.family).map(Value::Host),
            Arg::Network => Ok(Value::Host(host(text, context.family)?.without_host_bits())),
            Arg::Length => value::length(text, context.family)
                .map(|length| Value::Number(length.into()))
                .ok_or_else(|| format!("`{text}` is not the length of a prefix")),
            Arg::Prefix => {
                if !text.contains('/') {
                    return Err(format!("`{text}` lacks the length of a prefix"));
                }
                let prefix = host(text, context.family)?;
                if prefix != prefix.without_host_bits() {
                    return Err(format!("`{text}` has bits set behind its prefix"));
                }
                Ok(Value::Host(prefix))
            }
            Arg::Addresses => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let one = |text| {
                    value::loose_address(text, context.family)
                        .ok_or_else(|| format!("`{text}` is not an address"))
                };
                Ok(Value::Addresses(one(first)?, one(last)?))
            }
            Arg::Mac => {
                Mac::parse(text).map(Value::Mac).ok_or_else(|| format!("`{text}` is not an Ethernet address"))
            }
            Arg::Icmp(Family::V6) => icmp::parse(text, icmp::ICMPV6).map(Value::Icmp),
            Arg::Icmp(Family::V4) => {
                let found = icmp::parse(text, icmp::ICMP)?;
                // Of every type, codes can't be told apart.
                let any = IcmpType { kind: 255, code_first: 0, code_last: 255 };
                Ok(Value::Icmp(if found.kind == 255 { any } else { found }))
            }
            Arg::TcpFlags => {
                let flags = |text: &str| {
                    text.split(',').filter(|name| !name.is_empty()).try_fold(0u8, |sum, name| {
                        let bits = match name.to_ascii_uppercase().as_str() {
                            "ALL" => 0x3f,
                            "NONE" => 0,
                            name => TCP_FLAGS
                                .iter()
                                .find(|(known, _)| *known == name)
                                .map(|&(_, bit)| bit)
                                .ok_or_else(|| {
                                format!("`{name}` is none of FIN, SYN, RST, PSH, ACK, URG, ALL, NONE")
                            })?,
                        };
                        Ok::<u8, String>(sum | bits)
                    })
                };
                Ok(Value::Range(flags(text)?.into(), flags(words.get(1).copied().unwrap_or(""))?.into()))
            }
            Arg::SetEnds => {
                let ends = words.get(1).copied().unwrap_or("");
                let valid =
                    ends.split(',').all(|end| matches!(end, "src" | "dst")) && ends.split(',').count() <= 6;
                if !valid {
                    return Err(format!("`{ends}` is not a list of up to six `src` and `dst`"));
                }
                if text.len() > 31 {
                    return Err("a set's name has at most 31 bytes".into());
                }
                Ok(Value::Text(format!("{text} {ends}").as_str().into()))
            }
            Arg::Custom { parse, .. } => parse(words, context),
        }
    }

    /// Prints the argument with a blank before it.
    pub fn print(self, value: &Value, out: &mut String) {
        let result = match (self, value) {
            (Arg::Custom { print, .. }, value) => {
                print(value, out);
                Ok(())
            }
            (Arg::Hex(_), Value::Number(number)) => write!(out, " {number:#x}"),
            (Arg::Name(names, _), Value::Number(number)) => {
                let name = names.iter().find(|(_, known)| known == number).map_or("", |(name, _)| name);
                write!(out, " {name}")
            }
            (Arg::Names(names, _) | Arg::Items(names, _), Value::List(list)) => {
                let text: Vec<&str> = names
                    .iter()
                    .enumerate()
                    .filter(|(at, (_, number))| {
                        list.contains(number) && !names[..*at].iter().any(|(_, earlier)| earlier == number)
                    })
                    .map(|(_, (name, _))| *name)
                    .collect();
                write!(out, " {}", text.join(","))
            }
            (Arg::Range(separator, _), Value::Range(first, last)) if first != last => {
                write!(out, " {first}{separator}{last}")
            }
            (Arg::TcpFlags, Value::Range(mask, set)) => {
                out.push(' ');
                tcp_flags(*mask as u8, out);
                out.push(' ');
                tcp_flags(*set as u8, out);
                Ok(())
            }
            (Arg::Quoted(_), Value::Text(text)) => {
                quote(text, out);
                Ok(())
            }
            (Arg::Text(_) | Arg::CutText(_), Value::Text(text)) => {
                save_string(text, out);
                Ok(())
            }
            (Arg::Host, Value::Host(host)) if host.is_whole() => write!(out, " {}", Ip(host.address)),
            (_, Value::Host(host)) => write!(out, " {}/{}", Ip(host.address), host.length),
            (_, Value::None) => Ok(()),
            (_, Value::Number(number) | Value::Range(number, _)) => write!(out, " {number}"),
            (_, Value::Masked(masked)) => write!(out, " {masked}"),
            (_, Value::Ports(ports)) => write!(out, " {ports}"),
            (_, Value::PortList(list)) => {
                let text: Vec<String> = list.iter().map(ToString::to_string).collect();
                write!(out, " {}", text.join(","))
            }
            (_, Value::Text(text)) => write!(out, " {text}"),
            (_, Value::Address(address)) => write!(out, " {}{}", Ip(address.address), address.mask_text()),
            (_, Value::Addresses(first, last)) => write!(out, " {}-{}", Ip(*first), Ip(*last)),
            (_, Value::Bytes(_) | Value::Rate(_)) => unreachable!("who reads bytes or rates prints them"),
            (_, Value::Mac(mac)) => write!(out, " {mac}"),
            (Arg::Icmp(Family::V4), Value::Icmp(icmp)) if icmp.kind == 255 => out.write_str(" any"),
            (_, Value::Icmp(icmp)) => print_icmp(*icmp, out),
            (_, Value::List(list)) => {
                let text: Vec<String> = list.iter().map(ToString::to_string).collect();
                write!(out, " {}", text.join(","))
            }
        };
        result.expect("writing to a string succeeds");
    }
}

fn list_names(names: Names) -> String {
    names.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn host(text: &str, family: Family) -> Result<HostMask, String> {
    HostMask::parse(text, family).map_err(|bad| match bad {
        BadAddress::Address(text) => format!("`{text}` is not an {family} address or a built-in name"),
        BadAddress::Mask(text) => format!("`{text}` is not a mask"),
    })
}

fn range(text: &str, separator: char, max: u64) -> Result<Value, String> {
    let bad = || format!("`{text}` is not a number or range up to {max}");
    let end = |text: &str, default: u64| {
        if text.is_empty() { Some(default) } else { value::number(text, 0, max) }
    };
    let (first, last) = match text.split_once(separator) {
        None => {
            let one = end(text, 0).ok_or_else(bad)?;
            (one, one)
        }
        Some((first, last)) => (end(first, 0).ok_or_else(bad)?, end(last, max).ok_or_else(bad)?),
    };
    Ok(Value::Range(first, last))
}

/// How many port slots a multiport match has; a range takes two (include/uapi/linux/netfilter/xt_multiport.h).
const MULTIPORT_SLOTS: usize = 15;

fn port_list(text: &str, context: &Context) -> Result<Value, String> {
    let protocol = context.protocol.and_then(|(protocol, _)| names::protocol_name(protocol)).unwrap_or("tcp");
    let mut slots = 0;
    let list: Result<Vec<PortRange>, String> = text
        .split(',')
        .map(|item| {
            let port = |text: &str| {
                value::port(text, Some(protocol))
                    .ok_or_else(|| format!("`{text}` is not a port or service name"))
            };
            slots += 1 + usize::from(item.contains(':'));
            match item.split_once(':') {
                None => port(item).map(|port| PortRange { first: port, last: port }),
                Some((first, last)) => {
                    let (first, last) = (port(first)?, port(last)?);
                    if first >= last {
                        return Err(format!("`{item}` ends at or below its start"));
                    }
                    Ok(PortRange { first, last })
                }
            }
        })
        .collect();
    let list = list?;
    if slots > MULTIPORT_SLOTS {
        return Err(format!("more than {MULTIPORT_SLOTS} ports; a range counts for two"));
    }
    Ok(Value::PortList(list))
}

fn tcp_flags(flags: u8, out: &mut String) {
    let names: Vec<&str> =
        TCP_FLAGS.iter().filter(|(_, bit)| flags & bit != 0).map(|(name, _)| *name).collect();
    out.push_str(if names.is_empty() { "NONE".into() } else { names.join(",") }.as_str());
}

/// Of a range of codes, iptables-save prints the first.
fn print_icmp(icmp: IcmpType, out: &mut String) -> std::fmt::Result {
    match icmp {
        IcmpType { kind, code_first: 0, code_last: 255 } => write!(out, " {kind}"),
        IcmpType { kind, code_first, .. } => write!(out, " {kind}/{code_first}"),
    }
}

/// Prints text as it is, with a blank before it.
pub(crate) fn print_word(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        out.push(' ');
        out.push_str(text);
    }
}

/// Text as iptables-save writes it: in quotes unless it is made of letters, digits, `_` and `-` alone
/// (libxtables/xtables.c, `xtables_save_string`).
fn save_string(text: &str, out: &mut String) {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !text.is_empty() && text.chars().all(plain) {
        out.push(' ');
        out.push_str(text);
    } else {
        quote(text, out);
    }
}

/// Text in quotes, after a blank, with `\` before quotes and backslashes.
fn quote(text: &str, out: &mut String) {
    out.push_str(" \"");
    for c in text.chars() {
        if matches!(c, '"' | '\\' | '\'') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
}
