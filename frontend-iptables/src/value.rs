//! Typed option values, their parsers and their canonical text.
//!
//! The parsers take what the C library functions take that iptables calls (`strtoul` with base 0, `inet_pton`, the
//! dotted quads of libxtables), because the same dump has to be accepted and rejected alike. The canonical text is
//! what iptables-legacy-save prints.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use polc_ir::hook::Family;
use polc_ir::source::bytes;

use crate::ast::Text;
use crate::names;

/// What `isspace` holds for in the C locale.
pub(crate) const WHITE_SPACE: [char; 6] = [' ', '\t', '\n', '\x0b', '\x0c', '\r'];

/// A number as `strtoul(text, &end, base)` reads it: leading white space, a `+`, then with base 0 `0x` for hexadecimal
/// or `0` for octal. Returns the value and the rest. A minus sign and overflow are refused, as `xtables_strtoul` does.
pub fn strtoul(text: &str, base: u32) -> Option<(u64, &str)> {
    let text = text.trim_start_matches(WHITE_SPACE);
    if text.starts_with('-') {
        return None;
    }
    let digits = text.strip_prefix('+').unwrap_or(text);
    let hex = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
        .filter(|rest| rest.starts_with(|c: char| c.is_ascii_hexdigit()));
    let (base, digits) = match (base, hex) {
        (0 | 16, Some(hex)) => (16, hex),
        (0, None) if digits.starts_with('0') => (8, digits),
        (0, None) => (10, digits),
        (base, _) => (base, digits),
    };
    let end = digits.find(|c: char| !c.is_digit(base)).unwrap_or(digits.len());
    if end == 0 {
        return None;
    }
    Some((u64::from_str_radix(&digits[..end], base).ok()?, &digits[end..]))
}

/// A number as `strtoul` itself reads it, where no one looks at the sign: a minus negates within 64 bits.
pub fn strtoul_negating(text: &str, base: u32) -> Option<(u64, &str)> {
    let text = text.trim_start_matches(WHITE_SPACE);
    match text.strip_prefix('-').filter(|digits| digits.starts_with(|c: char| c.is_ascii_digit())) {
        Some(digits) => strtoul(digits, base).map(|(number, rest)| (number.wrapping_neg(), rest)),
        None => strtoul(text, base),
    }
}

/// A number as `strtod` reads one, up to the end of the text: leading white space, decimal or hexadecimal digits with an
/// exponent, or `nan` or `inf` in any case.
pub fn strtod(text: &str) -> Option<f64> {
    let text = text.trim_start_matches(WHITE_SPACE);
    let unsigned = text.trim_start_matches(['+', '-']);
    if text.len() - unsigned.len() > 1 {
        return None;
    }
    let Some(hex) = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X")) else {
        return text.parse().ok();
    };
    let (mantissa, exponent) = hex.split_once(['p', 'P']).unwrap_or((hex, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = u64::from_str_radix(&format!("{whole}{fraction}"), 16).ok()?;
    let exponent: i32 = exponent.parse().ok()?;
    let scale = exponent.checked_sub(4 * i32::try_from(fraction.len()).ok()?)?;
    let value = digits as f64 * f64::from(scale).exp2();
    Some(if text.starts_with('-') { -value } else { value })
}

/// A whole number between `min` and `max`, as `xtables_strtoul` with base 0 reads one.
pub fn number(text: &str, min: u64, max: u64) -> Option<u64> {
    match strtoul(text, 0)? {
        (value, "") if (min..=max).contains(&value) => Some(value),
        _ => None,
    }
}

/// A contiguous range of ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port. Some extensions accept a range whose last port is below its first; it holds no port.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: PortRange = PortRange { first: 0, last: u16::MAX };

    /// `port[:port]` for one protocol ([`port`]) or, without one, for any ([`resolved_port`]); the ends optional, by
    /// number or name; `None` if a port is unknown.
    pub fn parse(text: &str, protocol: Option<&str>) -> Option<PortRange> {
        let port = |text: &str| match protocol {
            Some(_) => port(text, protocol),
            None => resolved_port(text),
        };
        let port_only = |text: &str| port(text).map(|port| PortRange { first: port, last: port });
        let port = |text: &str, default| {
            if text.is_empty() { Some(default) } else { port(text) }
        };
        match text.split_once(':') {
            None => port_only(text),
            Some((first, last)) => Some(PortRange { first: port(first, 0)?, last: port(last, u16::MAX)? }),
        }
    }
}

/// A port by number (base 0) or service name, as `xtables_parse_port` reads it.
pub fn port(text: &str, protocol: Option<&str>) -> Option<u16> {
    number(text, 0, u16::MAX.into()).map(|port| port as u16).or_else(|| names::service(text, protocol))
}

/// A port as `getaddrinfo` resolves one, for extensions that ask it: a decimal number, of which the lower 16 bits count,
/// nothing for 0, or the name of a service of any protocol. What is negative as an `int` is taken for a name.
pub fn resolved_port(text: &str) -> Option<u16> {
    if text.is_empty() {
        return Some(0);
    }
    match strtoul_negating(text, 10) {
        Some((number, "")) if number as i32 >= 0 => Some(number as u16),
        _ => names::service(text, None),
    }
}

/// Prints `80` or `80:90`.
impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}:{}", self.first, self.last)
        }
    }
}

/// A value under a mask. Which bits of the value lie outside the mask, and what that means, is the extension's matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Masked {
    /// The value.
    pub value: u32,
    /// The mask.
    pub mask: u32,
}

impl Masked {
    /// `value[/mask]`, as `xtables_parse_mark_mask` reads it.
    pub fn parse(text: &str) -> Option<Masked> {
        let (value, rest) = strtoul(text, 0)?;
        let value = u32::try_from(value).ok()?;
        let mask = match rest.strip_prefix('/') {
            Some(mask) => number(mask, 0, u32::MAX.into())? as u32,
            None if rest.is_empty() => u32::MAX,
            None => return None,
        };
        Some(Masked { value, mask })
    }
}

/// Prints `0x1` or `0x1/0xff`.
impl fmt::Display for Masked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.value)?;
        if self.mask != u32::MAX { write!(f, "/{:#x}", self.mask) } else { Ok(()) }
    }
}

/// An address and a mask, which need not be contiguous. Both are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressMask {
    /// The address. `-s` and `-d` clear the bits outside the mask; other options keep them.
    pub address: IpAddr,
    /// The mask.
    pub mask: IpAddr,
}

impl AddressMask {
    /// `address[/mask]` as `-s` and `-d` take it: the address may have fewer than four parts (`10.1` is 10.1.0.0 under
    /// a full mask), or else is what [`host`] takes (`256` is 0.0.1.0); the mask may be a length or an address, and host
    /// bits are cleared. On failure, the part at fault.
    pub fn parse(text: &str, family: Family) -> Result<AddressMask, BadAddress<'_>> {
        let (address, mask) = match text.rsplit_once('/') {
            Some((address, mask)) => (address, parse_mask(mask, family).ok_or(BadAddress::Mask(mask))?),
            None => (text, mask_of_length(family.address_bits(), family)),
        };
        // With a null mask the name is not even looked at (`any/0`).
        let address = if mask.is_unspecified() {
            mask
        } else {
            let loose = match family {
                Family::V4 => loose_ipv4(address).map(IpAddr::V4),
                Family::V6 => None,
            };
            loose.or_else(|| host(address, family)).ok_or(BadAddress::Address(address))?
        };
        Ok(AddressMask { address: and(address, mask), mask })
    }

    /// The mask's length if it is contiguous.
    pub fn prefix_length(&self) -> Option<u8> {
        prefix_length(self.mask)
    }

    /// Prints `/24` or `/255.0.255.0`.
    pub fn mask_text(&self) -> impl fmt::Display {
        MaskText(self.mask)
    }
}

/// A rate of packets or bytes, as the kernel counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rate {
    /// One packet in so many microseconds.
    Packets {
        /// The microseconds.
        period: u64,
        /// The seconds of the unit that it was written in.
        unit: u64,
    },
    /// Bytes, 16 of which cost so much.
    Bytes {
        /// The cost.
        cost: u32,
    },
}

impl Rate {
    /// What 16 bytes cost at so many bytes a second (extensions/libxt_hashlimit.c in iptables, `bytes_to_cost`, whose
    /// 32 bits wrap around); `None` where iptables would divide by zero.
    pub fn cost_of(bytes: u64) -> Option<u32> {
        u32::MAX.checked_div(((bytes >> 4) as u32).wrapping_add(1))
    }

    /// The bytes a second of a cost above 0 (`cost_to_bytes`).
    pub fn bytes_of(cost: u32) -> u64 {
        u64::from(u32::MAX / cost - 1) << 4
    }
}

/// A host's address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostMask {
    /// The address, host bits and all.
    pub address: IpAddr,
    /// How many bits count.
    pub length: u8,
}

impl HostMask {
    /// `host[/length]` as `xtopt_parse_hostmask` reads it: unlike with [`AddressMask::parse`], the host is what
    /// `getaddrinfo` takes for one, and a mask that is no prefix counts for none. On failure, the part at fault.
    pub fn parse(text: &str, family: Family) -> Result<HostMask, BadAddress<'_>> {
        let bits = family.address_bits();
        let (address, length) = match text.split_once('/') {
            Some((address, mask)) => (address, length(mask, family).ok_or(BadAddress::Mask(mask))?.min(bits)),
            None => (text, bits),
        };
        let address = host(address, family).ok_or(BadAddress::Address(address))?;
        Ok(HostMask { address, length })
    }

    /// Whether all bits count.
    pub fn is_whole(&self) -> bool {
        self.length == if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// The same with host bits cleared.
    pub fn without_host_bits(self) -> HostMask {
        let family = if self.address.is_ipv4() { Family::V4 } else { Family::V6 };
        HostMask { address: and(self.address, mask_of_length(self.length, family)), ..self }
    }
}

/// The length of a prefix, by number or as a mask; [`u8::MAX`] for a mask that is no prefix, as `xtopt_parse_plen` has
/// it.
pub fn length(text: &str, family: Family) -> Option<u8> {
    if let Some(length) = number(text, 0, family.address_bits().into()) {
        return Some(length as u8);
    }
    host(text, family).map(|mask| prefix_length(mask).unwrap_or(u8::MAX))
}

/// What is wrong with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadAddress<'a> {
    /// The part before the slash is no address of the family and no known name.
    Address(&'a str),
    /// The part after the slash is no mask.
    Mask(&'a str),
}

struct MaskText(IpAddr);

impl fmt::Display for MaskText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match prefix_length(self.0) {
            Some(length) => write!(f, "/{length}"),
            None => write!(f, "/{}", Ip(self.0)),
        }
    }
}

/// The length of a contiguous mask.
pub fn prefix_length(mask: IpAddr) -> Option<u8> {
    let (ones, rest) = match mask {
        IpAddr::V4(mask) => (mask.to_bits().leading_ones(), mask.to_bits().count_ones()),
        IpAddr::V6(mask) => (mask.to_bits().leading_ones(), mask.to_bits().count_ones()),
    };
    (ones == rest).then_some(ones as u8)
}

/// The mask with `length` leading ones.
pub fn mask_of_length(length: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => {
            IpAddr::V4(Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)))
        }
        Family::V6 => {
            IpAddr::V6(Ipv6Addr::from_bits(u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)))
        }
    }
}

fn and(address: IpAddr, mask: IpAddr) -> IpAddr {
    match (address, mask) {
        (IpAddr::V4(address), IpAddr::V4(mask)) => IpAddr::V4(address & mask),
        (IpAddr::V6(address), IpAddr::V6(mask)) => IpAddr::V6(address & mask),
        (address, _) => address,
    }
}

/// A mask: a full address or a length.
pub fn parse_mask(text: &str, family: Family) -> Option<IpAddr> {
    let bits = family.address_bits();
    match family {
        Family::V4 => match text.matches('.').count() {
            0 => None,
            _ => loose_ipv4(text).filter(|_| text.matches('.').count() >= 3).map(IpAddr::V4),
        },
        Family::V6 => text.parse().ok().map(IpAddr::V6),
    }
    .or_else(|| Some(mask_of_length(number(text, 0, bits.into())? as u8, family)))
}

/// A dotted quad as libxtables reads it (`xtables_numeric_to_ipaddr`): parts in base 0, missing ones are zero, so
/// `10.1` is 10.1.0.0; unlike `inet_aton`, which fills from the right.
pub fn loose_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    // The text is cut to 19 characters before it is read.
    let mut parts = text.get(..19).unwrap_or(text).splitn(4, '.');
    for (octet, part) in octets.iter_mut().zip(&mut parts) {
        *octet = number(part, 0, 255)? as u8;
    }
    Some(octets.into())
}

/// An address as `xtables_numeric_to_ipaddr` and its IPv6 twin read it.
pub fn loose_address(text: &str, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => loose_ipv4(text).map(IpAddr::V4),
        Family::V6 => address(text, family),
    }
}

/// An address of the family in standard notation (`inet_pton`).
pub fn address(text: &str, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => text.parse().ok().map(IpAddr::V4),
        Family::V6 => text.parse().ok().map(IpAddr::V6),
    }
}

/// A host address as `getaddrinfo` resolves one without asking anybody: standard notation, the classful forms of
/// `inet_aton`, or a built-in name.
pub fn host(text: &str, family: Family) -> Option<IpAddr> {
    address(text, family).or_else(|| match family {
        Family::V4 => inet_aton(text).or_else(|| names::ipv4_host(text)).map(IpAddr::V4),
        Family::V6 => scoped(text).map(IpAddr::V6),
    })
}

/// An IPv6 address with a scope, which does not outlive the reading: a number, or for addresses of a link a device
/// (glibc's inet/inet6_scopeid_pton.c). The loopback device is on every system.
fn scoped(text: &str) -> Option<Ipv6Addr> {
    let (address, scope) = text.split_once('%')?;
    let address: Ipv6Addr = address.parse().ok()?;
    let of_link = address.is_unicast_link_local() || address.is_multicast() && address.octets()[1] & 15 == 2;
    let is_number = scope.bytes().all(|byte| byte.is_ascii_digit()) && scope.parse::<u32>().is_ok();
    (is_number || of_link && scope == "lo").then_some(address)
}

/// An IPv4 address with one to four parts, the last one filling the rest (`inet_aton`): `127.1` is 127.0.0.1.
pub fn inet_aton(text: &str) -> Option<Ipv4Addr> {
    let parts: Vec<&str> = text.split('.').collect();
    let (last, firsts) = parts.split_last()?;
    if firsts.len() > 3 {
        return None;
    }
    if !parts.iter().all(|part| part.starts_with(|c: char| c.is_ascii_digit())) {
        return None;
    }
    let mut bits: u64 = 0;
    for part in firsts {
        bits = bits << 8 | number(part, 0, 255)?;
    }
    let width = 8 * (4 - firsts.len() as u32);
    let value = bits << width | number(last, 0, (1 << width) - 1)?;
    Some(Ipv4Addr::from_bits(value as u32))
}

/// Prints an address as glibc's `inet_ntop` does, which differs from Rust's for IPv4-compatible addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip(pub IpAddr);

impl fmt::Display for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V6(address) if address.segments()[..6] == [0; 6] && address.segments()[6] != 0 => {
                write!(f, "::{}", Ipv4Addr::from_bits(address.to_bits() as u32))
            }
            address => write!(f, "{address}"),
        }
    }
}

/// A device name, or with a final `+` all names that start with what is before it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Interface {
    /// The name as written, with the `+`.
    pub pattern: Text,
}

impl Interface {
    /// The exact name, or the prefix of a wildcard.
    pub fn name(&self) -> &str {
        self.pattern.strip_suffix('+').unwrap_or(&self.pattern)
    }

    /// Whether the name ends in `+`.
    pub fn is_wildcard(&self) -> bool {
        self.pattern.ends_with('+')
    }

    /// Whether every name matches: a lone `+`. It is not even saved.
    pub fn is_any(&self) -> bool {
        &*self.pattern == "+"
    }
}

/// Longest device name, in bytes: `IFNAMSIZ` less the terminating NUL (include/uapi/linux/if.h).
pub const INTERFACE_BYTES_MAX: usize = 15;

/// An Ethernet address, in transmission order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// `xx:xx:xx:xx:xx:xx`, one or two digits each, as libxtables reads it.
    pub fn parse(text: &str) -> Option<Mac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next()?;
            // `strtoul` makes 0 of an empty part.
            *byte = if part.is_empty() {
                0
            } else {
                u8::from_str_radix(part, 16).ok().filter(|_| part.len() <= 2)?
            };
        }
        parts.next().is_none().then_some(Mac(bytes))
    }
}

/// Prints `00:1b:2c:3d:4e:5f`.
impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The text up to so many bytes, in the middle of a character if need be.
pub fn cut(text: &str, bytes_max: usize) -> Cow<'_, str> {
    match bytes::of_text(text).get(..bytes_max) {
        Some(start) if bytes::count(text) > bytes_max => Cow::Owned(bytes::to_text(start.to_vec())),
        _ => Cow::Borrowed(text),
    }
}

/// How a name may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// Letter by letter.
    Exact,
    /// In any case.
    AnyCase,
    /// In any case and cut short, as `strncasecmp` takes it; of several names that fit, the first counts.
    Abbreviated,
}

impl Spelling {
    /// Whether `given` stands for `name`.
    pub fn fits(self, given: &str, name: &str) -> bool {
        match self {
            Spelling::Exact => given == name,
            Spelling::AnyCase => given.eq_ignore_ascii_case(name),
            Spelling::Abbreviated => !given.is_empty() && abbreviates(given, name),
        }
    }
}

/// Whether `given` abbreviates `name` in any case, as the extensions that use `strncasecmp` accept it. Nothing at all
/// abbreviates everything.
pub fn abbreviates(given: &str, name: &str) -> bool {
    name.get(..given.len()).is_some_and(|start| start.eq_ignore_ascii_case(given))
}

/// A list of names joined by commas, as values of a table. On failure, the item at fault.
pub fn name_list<'a, T: Copy>(
    text: &'a str,
    table: &[(&str, T)],
    spelling: Spelling,
) -> Result<Vec<T>, &'a str> {
    text.split(',')
        .map(|item| {
            let found = table.iter().find(|(name, _)| spelling.fits(item, name));
            found.map(|&(_, value)| value).ok_or(item)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_strtouls() {
        assert_eq!(number("0x1F", 0, 255), Some(31));
        assert_eq!(number("010", 0, 255), Some(8));
        assert_eq!(number(" +7", 0, 255), Some(7));
        for bad in ["", "-1", "08", "1x", "0x", "256", "99999999999999999999"] {
            assert_eq!(number(bad, 0, 255), None, "{bad}");
        }
    }

    #[test]
    fn addresses_follow_libxtables() {
        let v4 = |text| {
            AddressMask::parse(text, Family::V4).map(|it| format!("{}{}", Ip(it.address), it.mask_text()))
        };
        assert_eq!(v4("10.1").as_deref(), Ok("10.1.0.0/32"));
        assert_eq!(v4("10.1.2.3/8").as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(v4("1.2.3.4/255.0.255.0").as_deref(), Ok("1.0.3.0/255.0.255.0"));
        assert_eq!(v4("anything/0").as_deref(), Ok("0.0.0.0/0"));
        assert_eq!(v4("1.2.3.4/33"), Err(BadAddress::Mask("33")));
        assert_eq!(v4("no.such.host"), Err(BadAddress::Address("no.such.host")));
        let v6 = |text| {
            AddressMask::parse(text, Family::V6).map(|it| format!("{}{}", Ip(it.address), it.mask_text()))
        };
        assert_eq!(v6("2001:db8::1/32").as_deref(), Ok("2001:db8::/32"));
        assert_eq!(v6("::/0").as_deref(), Ok("::/0"));
        assert_eq!(v6("::1.2.3.4").as_deref(), Ok("::1.2.3.4/128"));
        assert_eq!(v6("dead::beef/ffff::ffff").as_deref(), Ok("dead::beef/ffff::ffff"));
    }

    #[test]
    fn inet_aton_fills_from_the_right() {
        assert_eq!(inet_aton("127.1"), Some(Ipv4Addr::new(127, 0, 0, 1)));
        assert_eq!(inet_aton("1.2.3.4.5"), None);
        assert_eq!(inet_aton("1.2.65536"), None);
    }
}
