//! The parts of a set's elements: addresses, ports, Ethernet addresses, marks, devices.
//!
//! The syntax is ipset's (lib/parse.c): numbers in base 0, ranges with `-`, prefixes with `/`, brackets around names
//! that hold a dash, `proto:port`, and `type/code` or a name for ICMP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use polc_ir::hook::Family;
use smallvec::{SmallVec, smallvec};

use super::kind::{Dimension, SetKind};
use super::{Parts, SetAst};
use crate::ast::Text;
use crate::names;
use crate::value::{self, INTERFACE_BYTES_MAX, Mac};

/// One part of an element.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Addresses from first to last; both ends belong to a prefix if it was written as one.
    Address {
        /// The first address.
        first: IpAddr,
        /// The last address.
        last: IpAddr,
        /// How it was written.
        form: AddressForm,
    },
    /// Ports from first to last; for ICMP, `type << 8 | code`; for protocols without ports, 0.
    Port {
        /// The protocol; `None` for TCP and UDP alike.
        protocol: Option<u8>,
        /// The first port.
        first: u16,
        /// The last port.
        last: u16,
    },
    /// An Ethernet address.
    Mac(Mac),
    /// A packet mark.
    Mark(u32),
    /// A device.
    Device {
        /// Its name.
        name: Text,
        /// It is a bridge port (`physdev:`).
        physical: bool,
    },
    /// A set of a list.
    Set(Text),
}

impl Part {
    /// Whether it is a range of addresses that was written as one.
    pub(super) fn is_range(&self) -> bool {
        matches!(self, Part::Address { form: AddressForm::Range, .. })
    }
}

/// How addresses were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressForm {
    /// A prefix of this length; the full length for a single address.
    Prefix(u8),
    /// First and last address.
    Range,
}

/// What surrounds a part.
#[derive(Clone, Copy)]
pub(super) struct PartContext {
    pub(super) kind: &'static SetKind,
    pub(super) family: Family,
    /// What of hosts' addresses the set stores.
    mask: Option<IpAddr>,
    /// Of a range it takes one address in each block of the mask.
    steps: bool,
}

impl PartContext {
    pub(super) fn of(set: &SetAst) -> PartContext {
        let family = set.family.unwrap_or(Family::V4);
        let ones = match family {
            Family::V4 => IpAddr::from(Ipv4Addr::BROADCAST),
            Family::V6 => IpAddr::from(Ipv6Addr::from_bits(u128::MAX)),
        };
        let netmask = set.options.netmask.map(|length| prefix_ends(ones, length).0);
        let mask = netmask.or(set.options.bitmask);
        PartContext { kind: set.kind, family, mask, steps: set.unit_bits() > 0 }
    }

    /// That of an option of `create`.
    pub(super) fn of_option(kind: &'static SetKind, family: Family) -> PartContext {
        PartContext { kind, family, mask: None, steps: false }
    }
}

/// Types and codes of ICMP by name (lib/icmp.c); the first name is printed.
pub(super) const ICMP: &[(&str, u16)] = &[
    ("echo-reply", 0x0000),
    ("pong", 0x0000),
    ("network-unreachable", 0x0300),
    ("host-unreachable", 0x0301),
    ("protocol-unreachable", 0x0302),
    ("port-unreachable", 0x0303),
    ("fragmentation-needed", 0x0304),
    ("source-route-failed", 0x0305),
    ("network-unknown", 0x0306),
    ("host-unknown", 0x0307),
    ("network-prohibited", 0x0309),
    ("host-prohibited", 0x030a),
    ("TOS-network-unreachable", 0x030b),
    ("TOS-host-unreachable", 0x030c),
    ("communication-prohibited", 0x030d),
    ("host-precedence-violation", 0x030e),
    ("precedence-cutoff", 0x030f),
    ("source-quench", 0x0400),
    ("network-redirect", 0x0500),
    ("host-redirect", 0x0501),
    ("TOS-network-redirect", 0x0502),
    ("TOS-host-redirect", 0x0503),
    ("echo-request", 0x0800),
    ("ping", 0x0800),
    ("router-advertisement", 0x0900),
    ("router-solicitation", 0x0a00),
    ("ttl-zero-during-transit", 0x0b00),
    ("ttl-zero-during-reassembly", 0x0b01),
    ("ip-header-bad", 0x0c00),
    ("required-option-missing", 0x0c01),
    ("timestamp-request", 0x0d00),
    ("timestamp-reply", 0x0e00),
    ("address-mask-request", 0x1100),
    ("address-mask-reply", 0x1200),
];

/// Types and codes of ICMPv6 by name (lib/icmpv6.c).
pub(super) const ICMPV6: &[(&str, u16)] = &[
    ("no-route", 0x0100),
    ("communication-prohibited", 0x0101),
    ("address-unreachable", 0x0103),
    ("port-unreachable", 0x0104),
    ("packet-too-big", 0x0200),
    ("ttl-zero-during-transit", 0x0300),
    ("ttl-zero-during-reassembly", 0x0301),
    ("bad-header", 0x0400),
    ("unknown-header-type", 0x0401),
    ("unknown-option", 0x0402),
    ("echo-request", 0x8000),
    ("ping", 0x8000),
    ("echo-reply", 0x8100),
    ("pong", 0x8100),
    ("router-solicitation", 0x8500),
    ("router-advertisement", 0x8600),
    ("neighbour-solicitation", 0x8700),
    ("neigbour-solicitation", 0x8700),
    ("neighbour-advertisement", 0x8800),
    ("neigbour-advertisement", 0x8800),
    ("redirect", 0x8900),
];

/// Longest set name, in bytes (include/uapi/linux/netfilter/ipset/ip_set.h, `IPSET_MAXNAMELEN` less the NUL).
pub(super) const SET_NAME_BYTES_MAX: usize = 31;

/// Reads one part; the error says what is wrong with it.
pub(super) fn part(text: &str, dimension: Dimension, cx: &PartContext) -> Result<Part, String> {
    match dimension {
        Dimension::Host | Dimension::SingleHost | Dimension::Net => addresses(text, dimension, cx),
        Dimension::Port => port(text, cx.family),
        Dimension::TcpUdpPort => match port(text, cx.family)? {
            Part::Port { protocol: Some(6 | 17), first, last } => {
                Ok(Part::Port { protocol: None, first, last })
            }
            _ => Err(format!("`{text}`: only TCP and UDP have ports in a {}", cx.kind.name)),
        },
        Dimension::Mac => Mac::parse(text)
            .filter(|_| text.len() <= 17)
            .map(Part::Mac)
            .ok_or_else(|| format!("`{text}` is not an Ethernet address")),
        Dimension::Mark => number(text, u32::MAX.into()).map(|mark| Part::Mark(mark as u32)),
        Dimension::Device => {
            let (name, physical) = match text.strip_prefix("physdev:") {
                Some(name) => (name, true),
                None => (text, false),
            };
            if name.is_empty() {
                return Err("the device is missing".into());
            }
            if name.len() > INTERFACE_BYTES_MAX {
                return Err(format!("device name `{name}` is longer than {INTERFACE_BYTES_MAX} bytes"));
            }
            Ok(Part::Device { name: name.into(), physical })
        }
        Dimension::Set => {
            if text.len() > SET_NAME_BYTES_MAX {
                return Err(format!("set name `{text}` is longer than {SET_NAME_BYTES_MAX} bytes"));
            }
            Ok(Part::Set(text.into()))
        }
    }
}

pub(super) fn number(text: &str, max: u64) -> Result<u64, String> {
    value::number(text, 0, max).ok_or_else(|| format!("`{text}` is not a number up to {max}"))
}

/// Splits `first-last` at its dash; a bracketed name may hold dashes of its own.
fn split_range(text: &str) -> Result<(&str, Option<&str>), String> {
    if !text.starts_with('[') {
        return Ok(match text.split_once('-') {
            Some((first, last)) => (first, Some(last)),
            None => (text, None),
        });
    }
    let (inside, rest) =
        text[1..].split_once(']').ok_or_else(|| format!("`{text}` lacks a closing bracket"))?;
    match rest.strip_prefix('-') {
        None if rest.is_empty() => Ok((inside, None)),
        None => Err(format!("`{rest}` after the bracket")),
        Some(last) => Ok((inside, Some(unbracket(last)))),
    }
}

fn unbracket(text: &str) -> &str {
    text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text)
}

/// Addresses of an element: what is allowed depends on the dimension and the family.
fn addresses(text: &str, dimension: Dimension, cx: &PartContext) -> Result<Part, String> {
    let bits = cx.family.address_bits();
    let (first, last, form) = address_range(text, cx.family)?;
    let allowed = match (dimension, cx.family) {
        (Dimension::SingleHost, _) | (Dimension::Host, Family::V6) => form == AddressForm::Prefix(bits),
        (Dimension::Net, Family::V6) => form != AddressForm::Range,
        _ => true,
    };
    if !allowed {
        return Err(format!(
            "`{text}`: a {} takes no {} here",
            cx.kind.name,
            match form {
                AddressForm::Range => "range",
                AddressForm::Prefix(_) => "prefix",
            }
        ));
    }
    if dimension == Dimension::Net && form == AddressForm::Prefix(0) && !cx.kind.zero_prefix {
        return Err(format!("`{text}`: a {} can't hold a prefix of length 0", cx.kind.name));
    }
    if dimension == Dimension::Host && form == AddressForm::Prefix(0) {
        return Err(format!("`{text}`: a {} can't hold all addresses", cx.kind.name));
    }
    if form == AddressForm::Range
        && dimension == Dimension::Net
        && cidrs(self::bits(first), self::bits(last), bits.into()).nth(RANGE_PREFIXES_MAX).is_some()
    {
        return Err(format!(
            "`{text}`: the kernel makes more than {RANGE_PREFIXES_MAX} elements of a range that long; write prefixes"
        ));
    }
    if form == AddressForm::Range && dimension == Dimension::Net && prefixes(first, last)[0].1 == 0 {
        return Err(format!("`{text}` is a range of all addresses"));
    }
    // A range of one address is one.
    let form = if first == last { AddressForm::Prefix(bits) } else { form };
    // The first address is stored under the mask, and a prefix with it; of what a bitmap takes in, lowering knows.
    let masked = dimension == Dimension::Host && (first == last || !cx.kind.is_bitmap());
    let (first, last) = match (cx.mask.filter(|_| masked), form) {
        (Some(mask), AddressForm::Prefix(length)) => prefix_ends(and(first, mask), length),
        // The kernel masks the address that is written first, and swaps the ends then.
        (Some(mask), AddressForm::Range) => {
            let (begin, end) = if runs_backwards(text, cx.family) { (last, first) } else { (first, last) };
            let begin = and(begin, mask);
            if begin > end && cx.steps && and(end, mask) != end {
                return Err(format!(
                    "`{text}` runs backwards, of which ipset makes elements that no address is; write it forwards"
                ));
            }
            (begin.min(end), begin.max(end))
        }
        (None, _) => (first, last),
    };
    let form = if first == last { AddressForm::Prefix(bits) } else { form };
    if dimension == Dimension::Host && cx.kind.refuses_null && first.is_unspecified() {
        return Err(format!("`{text}`: a {} can't hold the address {first}", cx.kind.name));
    }
    Ok(Part::Address { first, last, form })
}

/// Whether a range of hosts has to be written from its end for a set to hold it: its first address is none that the set
/// would begin with.
pub(super) fn is_backwards(set: &SetAst, first: IpAddr) -> bool {
    let mask = PartContext::of(set).mask;
    !set.kind.is_bitmap() && mask.is_some_and(|mask| and(first, mask) != first)
}

/// An address under a mask of its family.
fn and(address: IpAddr, mask: IpAddr) -> IpAddr {
    match (address, mask) {
        (IpAddr::V4(address), IpAddr::V4(mask)) => (address & mask).into(),
        (IpAddr::V6(address), IpAddr::V6(mask)) => (address & mask).into(),
        _ => address,
    }
}

/// Whether the end of a range lies before its beginning.
fn runs_backwards(text: &str, family: Family) -> bool {
    let first = split_range(text).ok().and_then(|(first, _)| host(first, family));
    address_range(text, family).is_ok_and(|(low, _, _)| first != Some(low))
}

/// A host address; ipset takes none with a scope.
fn host(text: &str, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => value::host(text, family),
        Family::V6 => value::address(text, family),
    }
}

/// `address`, `address/length` or `address-address`, whose ends the kernel swaps if it runs backwards.
pub(super) fn address_range(text: &str, family: Family) -> Result<(IpAddr, IpAddr, AddressForm), String> {
    let bits = family.address_bits();
    let read = |text: &str| host(text, family).ok_or_else(|| format!("`{text}` is not an {family} address"));
    if let Some((address, length)) = text.split_once('/') {
        let length = value::number(length, 0, bits.into());
        let length =
            length.ok_or_else(|| format!("`{text}`: the prefix length is not from 0 to {bits}"))? as u8;
        let address = read(unbracket(address))?;
        let (first, last) = prefix_ends(address, length);
        return Ok((first, last, AddressForm::Prefix(length)));
    }
    let (first, last) = split_range(text)?;
    let first = read(first)?;
    match last {
        Some(last) => {
            let last = read(last)?;
            Ok((first.min(last), first.max(last), AddressForm::Range))
        }
        None => Ok((first, first, AddressForm::Prefix(bits))),
    }
}

/// The first and last address of a prefix.
pub(super) fn prefix_ends(address: IpAddr, length: u8) -> (IpAddr, IpAddr) {
    match address {
        IpAddr::V4(address) => {
            let host = u32::MAX.checked_shr(length.into()).unwrap_or(0);
            let bits = address.to_bits();
            (Ipv4Addr::from_bits(bits & !host).into(), Ipv4Addr::from_bits(bits | host).into())
        }
        IpAddr::V6(address) => {
            let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
            let bits = address.to_bits();
            (Ipv6Addr::from_bits(bits & !host).into(), Ipv6Addr::from_bits(bits | host).into())
        }
    }
}

/// `[proto:]port[-port]`; for ICMP a name or `type/code`; 0 for protocols without ports.
fn port(text: &str, family: Family) -> Result<Part, String> {
    let (protocol_name, ports) = match text.split_once(':') {
        Some((protocol, ports)) => (protocol, ports),
        None => ("tcp", text),
    };
    let protocol = protocol(protocol_name)?;
    let icmp = |names: &[(&str, u16)]| {
        let named = names.iter().find(|(name, _)| *name == ports).map(|row| row.1);
        let numbered = || {
            let (kind, code) = ports.split_once('/')?;
            let byte = |text| value::number(text, 0, 255).map(|value| value as u16);
            Some(byte(kind)? << 8 | byte(code)?)
        };
        named.or_else(numbered).ok_or_else(|| format!("`{ports}` is no ICMP type/code"))
    };
    let (first, last) = match (protocol, family) {
        (6 | 17 | 132 | 136, _) => {
            let service = names::protocol_name(protocol.into()).unwrap_or(protocol_name);
            let read = |text: &str| {
                value::number(text, 0, u16::MAX.into())
                    .map(|port| port as u16)
                    .or_else(|| names::service(text, Some(service)))
                    .ok_or_else(|| format!("`{text}` is no {service} port or service"))
            };
            let (first, last) = split_range(ports)?;
            let first = read(first)?;
            let last = last.map_or(Ok(first), read)?;
            // The kernel swaps the ends of a range that runs backwards.
            (first.min(last), first.max(last))
        }
        (1, Family::V4) => icmp(ICMP).map(|code| (code, code))?,
        (58, Family::V6) => icmp(ICMPV6).map(|code| (code, code))?,
        (1, _) => return Err("ICMP belongs to family inet".into()),
        (58, _) => return Err("ICMPv6 belongs to family inet6".into()),
        _ if ports == "0" => (0, 0),
        _ => return Err(format!("protocol `{protocol_name}` has no ports; write `{protocol_name}:0`")),
    };
    Ok(Part::Port { protocol: Some(protocol), first, last })
}

fn protocol(text: &str) -> Result<u8, String> {
    if let Some(number) = value::number(text, 0, 255) {
        return Ok(number as u8);
    }
    let name = if text.eq_ignore_ascii_case("icmpv6") { "ipv6-icmp" } else { text };
    let number =
        names::system_protocol(name).and_then(|number| u8::try_from(number).ok()).filter(|&it| it != 0);
    number.ok_or_else(|| format!("`{text}` is no known protocol"))
}

/// Prefixes that a range may have.
const RANGE_PREFIXES_MAX: usize = 1 << 16;

/// The prefixes that the kernel makes of a range of addresses, in ascending order.
pub(super) fn prefixes(first: IpAddr, last: IpAddr) -> Vec<(IpAddr, u8)> {
    let width = if first.is_ipv4() { 32 } else { 128 };
    let prefix = |(from, host): (u128, u32)| {
        let address = match first {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(from as u32)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(from)),
        };
        (address, (width - host) as u8)
    };
    cidrs(bits(first), bits(last), width).map(prefix).collect()
}

/// The same as [`blocks`], but that the kernel compares where IPv4 prefixes end as signed numbers: as long as the range ends
/// 2^31 addresses or more behind the block, it takes one address alone (net/netfilter/ipset/pfxlen.c,
/// `ip_set_range_to_cidr`).
fn cidrs(first: u128, last: u128, width: u32) -> impl Iterator<Item = (u128, u32)> {
    let mut rest = blocks(first, last, width).peekable();
    let mut single = None;
    std::iter::from_fn(move || {
        if let Some(from) = single.take() {
            rest = blocks(from, last, width).peekable();
        }
        let &(from, power) = rest.peek()?;
        if width == 32 && last - (from + (1 << power) - 1) >= 1 << 31 {
            single = Some(from + 1);
            return Some((from, 0));
        }
        rest.next()
    })
}

/// The aligned blocks that together are a range of numbers of so many bits, in ascending order: the first number of each,
/// and its size as a power of two.
pub(super) fn blocks(first: u128, last: u128, width: u32) -> impl Iterator<Item = (u128, u32)> {
    let mut rest = (first <= last).then_some(first);
    std::iter::from_fn(move || {
        let from = rest?;
        // As large as alignment and the end allow.
        let more = (last - from).checked_add(1);
        let power = from.trailing_zeros().min(width).min(more.map_or(width, u128::ilog2));
        let size = 1u128.checked_shl(power);
        rest = size.and_then(|size| from.checked_add(size)).filter(|next| *next <= last);
        Some((from, power))
    })
}

pub(super) fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The elements that a set gets by these parts: of a range in a dimension of prefixes, one for each prefix.
pub(super) fn prefix_by_prefix(kind: &SetKind, parts: Parts) -> SmallVec<[Parts; 1]> {
    let mut all: SmallVec<[Parts; 1]> = smallvec![parts];
    for (at, dimension) in kind.dimensions.iter().enumerate() {
        let Some(Part::Address { first, last, form: AddressForm::Range }) = all[0].get(at).cloned() else {
            continue;
        };
        if *dimension != Dimension::Net {
            continue;
        }
        let prefixes = prefixes(first, last);
        all = all
            .iter()
            .flat_map(|parts| {
                prefixes.iter().map(|&(address, length)| {
                    let (first, last) = prefix_ends(address, length);
                    let mut parts = parts.clone();
                    parts[at] = Part::Address { first, last, form: AddressForm::Prefix(length) };
                    parts
                })
            })
            .collect();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_split_into_prefixes() {
        let v4 = |first: &str, last: &str| {
            let list = prefixes(first.parse().unwrap(), last.parse().unwrap());
            list.iter().map(|(address, length)| format!("{address}/{length}")).collect::<Vec<_>>()
        };
        assert_eq!(v4("1.2.3.0", "1.2.3.9"), ["1.2.3.0/29", "1.2.3.8/31"]);
        assert_eq!(v4("0.0.0.0", "255.255.255.255"), ["0.0.0.0/0"]);
        assert_eq!(v4("255.255.255.255", "255.255.255.255"), ["255.255.255.255/32"]);
        // Whose first half is too far from its end for a prefix.
        let far = v4("9.255.255.254", "138.0.0.1");
        let expected = ["9.255.255.254/32", "9.255.255.255/32", "10.0.0.0/7", "12.0.0.0/6", "16.0.0.0/4"];
        assert_eq!(far[..5], expected);
        assert_eq!(v4("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), ["::/0"]);
    }
}
