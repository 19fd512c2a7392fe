//! The names of ICMP and ICMPv6 types and codes, and the syntax `type[/code]`.
//!
//! Names may be abbreviated in any case, but not ambiguously; numbers may be ranges in the syntax, of which the
//! extensions take only those that are no range of types (extensions/libxt_icmp.h in iptables).

use crate::value::strtoul;

/// An ICMP type and a range of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IcmpType {
    /// The type. For ICMPv4, 255 under any code stands for every type (`any`).
    pub kind: u8,
    /// The first code.
    pub code_first: u8,
    /// The last code.
    pub code_last: u8,
}

/// A name, its type, first and last code.
type Row = (&'static str, u8, u8, u8);

/// The ICMP names of `--icmp-type` (RFC 792, RFC 950, RFC 1256, RFC 1812).
pub const ICMP: &[Row] = &[
    ("any", 255, 0, 255),
    ("echo-reply", 0, 0, 255),
    ("pong", 0, 0, 255),
    ("destination-unreachable", 3, 0, 255),
    ("network-unreachable", 3, 0, 0),
    ("host-unreachable", 3, 1, 1),
    ("protocol-unreachable", 3, 2, 2),
    ("port-unreachable", 3, 3, 3),
    ("fragmentation-needed", 3, 4, 4),
    ("source-route-failed", 3, 5, 5),
    ("network-unknown", 3, 6, 6),
    ("host-unknown", 3, 7, 7),
    ("network-prohibited", 3, 9, 9),
    ("host-prohibited", 3, 10, 10),
    ("TOS-network-unreachable", 3, 11, 11),
    ("TOS-host-unreachable", 3, 12, 12),
    ("communication-prohibited", 3, 13, 13),
    ("host-precedence-violation", 3, 14, 14),
    ("precedence-cutoff", 3, 15, 15),
    ("source-quench", 4, 0, 255),
    ("redirect", 5, 0, 255),
    ("network-redirect", 5, 0, 0),
    ("host-redirect", 5, 1, 1),
    ("TOS-network-redirect", 5, 2, 2),
    ("TOS-host-redirect", 5, 3, 3),
    ("echo-request", 8, 0, 255),
    ("ping", 8, 0, 255),
    ("router-advertisement", 9, 0, 255),
    ("router-solicitation", 10, 0, 255),
    ("time-exceeded", 11, 0, 255),
    ("ttl-exceeded", 11, 0, 255),
    ("ttl-zero-during-transit", 11, 0, 0),
    ("ttl-zero-during-reassembly", 11, 1, 1),
    ("parameter-problem", 12, 0, 255),
    ("ip-header-bad", 12, 0, 0),
    ("required-option-missing", 12, 1, 1),
    ("timestamp-request", 13, 0, 255),
    ("timestamp-reply", 14, 0, 255),
    ("address-mask-request", 17, 0, 255),
    ("address-mask-reply", 18, 0, 255),
];

/// The ICMPv6 names of `--icmpv6-type` (RFC 4443, RFC 4861).
pub const ICMPV6: &[Row] = &[
    ("destination-unreachable", 1, 0, 255),
    ("no-route", 1, 0, 0),
    ("communication-prohibited", 1, 1, 1),
    ("beyond-scope", 1, 2, 2),
    ("address-unreachable", 1, 3, 3),
    ("port-unreachable", 1, 4, 4),
    ("failed-policy", 1, 5, 5),
    ("reject-route", 1, 6, 6),
    ("packet-too-big", 2, 0, 255),
    ("time-exceeded", 3, 0, 255),
    ("ttl-exceeded", 3, 0, 255),
    ("ttl-zero-during-transit", 3, 0, 0),
    ("ttl-zero-during-reassembly", 3, 1, 1),
    ("parameter-problem", 4, 0, 255),
    ("bad-header", 4, 0, 0),
    ("unknown-header-type", 4, 1, 1),
    ("unknown-option", 4, 2, 2),
    ("echo-request", 128, 0, 255),
    ("ping", 128, 0, 255),
    ("echo-reply", 129, 0, 255),
    ("pong", 129, 0, 255),
    ("router-solicitation", 133, 0, 255),
    ("router-advertisement", 134, 0, 255),
    ("neighbour-solicitation", 135, 0, 255),
    ("neighbor-solicitation", 135, 0, 255),
    ("neighbour-advertisement", 136, 0, 255),
    ("neighbor-advertisement", 136, 0, 255),
    ("redirect", 137, 0, 255),
];

/// Reads a type by name or as `type[/code]`; the error says what is wrong with it.
pub fn parse(text: &str, table: &[Row]) -> Result<IcmpType, String> {
    let mut fitting = table.iter().filter(|row| crate::value::abbreviates(text, row.0));
    if let Some(&(name, kind, code_first, code_last)) = fitting.next() {
        return match fitting.next() {
            Some(other) => Err(format!("`{text}` is ambiguous: `{name}` or `{}`", other.0)),
            None => Ok(IcmpType { kind, code_first, code_last }),
        };
    }
    let unknown = || format!("`{text}` is no known type");
    let ((kind, kind_last), rest) = byte_range(text).ok_or_else(unknown)?;
    if kind != kind_last {
        return Err("a range of types is not supported".into());
    }
    let (code_first, code_last) = match rest.strip_prefix('/') {
        None if rest.is_empty() => (0, 255),
        None => return Err(format!("`{rest}` after the type; a code follows a slash")),
        Some(code) => match byte_range(code) {
            Some((codes, "")) => codes,
            _ => return Err(format!("`{code}` is no code")),
        },
    };
    Ok(IcmpType { kind, code_first, code_last })
}

/// `n` or `n:m`, each up to 255, and the rest of the text.
fn byte_range(text: &str) -> Option<((u8, u8), &str)> {
    let byte = |text| {
        let (value, rest) = strtoul(text, 0)?;
        Some((u8::try_from(value).ok()?, rest))
    };
    let (first, rest) = byte(text)?;
    match rest.strip_prefix(':') {
        None => Some(((first, first), rest)),
        Some(last) => byte(last).map(|(last, rest)| ((first, last), rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_by_name_number_and_abbreviation() {
        let of = |kind, code_first, code_last| Ok(IcmpType { kind, code_first, code_last });
        assert_eq!(parse("echo-request", ICMP), of(8, 0, 255));
        assert_eq!(parse("PING", ICMP), of(8, 0, 255));
        assert_eq!(parse("host-unr", ICMP), of(3, 1, 1));
        assert_eq!(parse("3/4", ICMP), of(3, 4, 4));
        assert_eq!(parse("255/255", ICMP), of(255, 255, 255));
        assert!(parse("echo", ICMP).is_err());
        assert!(parse("3:5", ICMP).is_err());
        assert!(parse("any", ICMPV6).is_err());
        assert!(parse("", ICMP).is_err());
    }
}
