//! What IPv6 extension headers hold: net/ipv6/netfilter/ip6t_{ah,frag,hbh,rt}.c.
//!
//! Each match looks for the first header of its kind (`ipv6_find_hdr`). A packet without one is not matched; a chain
//! that is malformed before it, and a header that the packet has only a part of, are hotdrops.

use super::Ipv6HeaderTest;
use crate::packet::extension::{ExtensionHeaders, kind, length};

const FAILS: u32 = 0;
const HOLDS: u32 = 1;
const HOTDROP: u32 = 2;

impl Ipv6HeaderTest {
    /// The header that is looked for.
    pub fn header(&self) -> u8 {
        match self {
            Ipv6HeaderTest::Ah { .. } => kind::AUTHENTICATION,
            Ipv6HeaderTest::Frag { .. } => kind::FRAGMENT,
            Ipv6HeaderTest::Options { destination: false, .. } => kind::HOP_BY_HOP,
            Ipv6HeaderTest::Options { destination: true, .. } => kind::DESTINATION,
            Ipv6HeaderTest::Rt { .. } => kind::ROUTING,
        }
    }
}

/// A test of the packet, given from its IPv6 header on.
pub(super) fn ipv6_header(test: &Ipv6HeaderTest, packet: &[u8]) -> u32 {
    let at = match ExtensionHeaders::new(packet).find(test.header()) {
        Ok(at) => at,
        Err(false) => return FAILS,
        Err(true) => return HOTDROP,
    };
    let header = &packet[at..];
    let holds = match test {
        Ipv6HeaderTest::Ah { spi, spi_negate, len, len_negate, reserved } => {
            ah(header, (*spi, *spi_negate), (*len, *len_negate), *reserved)
        }
        Ipv6HeaderTest::Frag { .. } => frag(test, header),
        Ipv6HeaderTest::Options { destination, len, len_negate, options } => {
            let kind = if *destination { kind::DESTINATION } else { kind::HOP_BY_HOP };
            whole(kind, header).map(|header| {
                len.is_none_or(|len| (len as usize == header.len()) != *len_negate)
                    && options_in_order(options, &header[2..])
            })
        }
        Ipv6HeaderTest::Rt { .. } => whole(kind::ROUTING, header).map(|header| rt(test, header)),
    };
    match holds {
        Some(true) => HOLDS,
        Some(false) => FAILS,
        None => HOTDROP,
    }
}

/// The header by its own length; `None` if the packet ends before.
fn whole(kind: u8, header: &[u8]) -> Option<&[u8]> {
    header.get(..length(kind, *header.get(1)?))
}

fn within((first, last): (u32, u32), negate: bool, value: u32) -> bool {
    (first <= value && value <= last) != negate
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// `ah_mt6`. An asked length of 0 asks nothing. A packet that ends before the header does by its own length is dropped
/// whatever is asked (as Linux 6.18.44 does).
fn ah(header: &[u8], spi: ((u32, u32), bool), len: (u32, bool), reserved: bool) -> Option<bool> {
    let fixed = header.get(..12)?;
    let length = whole(kind::AUTHENTICATION, header)?.len() as u32;
    Some(
        within(spi.0, spi.1, be32(fixed, 4))
            && (len.0 == 0 || (len.0 == length) != len.1)
            && !(reserved && fixed[2..4] != [0, 0]),
    )
}

/// `frag_mt6`: the offset and bits of byte 3 are reserved (bits 1 and 2) and "more fragments" (bit 0).
fn frag(test: &Ipv6HeaderTest, header: &[u8]) -> Option<bool> {
    let header = header.get(..8)?;
    let Ipv6HeaderTest::Frag { id, id_negate, reserved, first, more, last, .. } = test else {
        return Some(false);
    };
    let offset = u16::from_be_bytes([header[2], header[3]]);
    let follows = offset & 1 == 1;
    Some(
        within(*id, *id_negate, be32(header, 4))
            && !(*reserved && (header[1] != 0 || offset & 6 != 0))
            && !(*first && offset >> 3 != 0)
            && (follows || !*more)
            && !(*last && follows),
    )
}

/// `hbh_mt6`: the options that a header starts with. Nothing is behind an option that reaches beyond the header; of the
/// last one that is asked for, nobody looks where it ends.
fn options_in_order(asked: &[(u8, Option<u8>)], mut rest: &[u8]) -> bool {
    let Some(last) = asked.len().checked_sub(1) else { return true };
    for (at, &(kind, len)) in asked.iter().enumerate() {
        let takes = match *rest {
            [found, ..] if found != kind => return false,
            [0, ..] => 1,
            [_, has, ..] if len.is_none_or(|len| len == has) => usize::from(has) + 2,
            _ => return false,
        };
        match rest.get(takes..) {
            Some(behind) => rest = behind,
            None => return at == last,
        }
    }
    true
}

/// `rt_mt6`, of a whole header: its length, type, segments left, and for type 0 a reserved word and the addresses
/// (include/uapi/linux/ipv6.h, `struct rt0_hdr`).
fn rt(test: &Ipv6HeaderTest, header: &[u8]) -> bool {
    let Ipv6HeaderTest::Rt {
        kind,
        kind_negate,
        segments_left,
        segments_left_negate,
        len,
        len_negate,
        reserved,
        addresses,
        not_strict,
    } = test
    else {
        return false;
    };
    let plain = within(*segments_left, *segments_left_negate, header[3].into())
        && len.is_none_or(|len| (len as usize == header.len()) != *len_negate)
        && kind.is_none_or(|kind| (kind == u32::from(header[2])) != *kind_negate)
        && !(*reserved && header[4..8] != [0; 4]);
    if !plain || addresses.is_empty() {
        return plain;
    }
    let mut there = header[8..]
        .chunks_exact(16)
        .map(|bytes| bytes.iter().fold(0, |sum, &byte| sum << 8 | u128::from(byte)));
    if *not_strict {
        addresses.iter().all(|address| there.any(|found| found == *address))
    } else {
        there.eq(addresses.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of these headers, each given without its first byte, the next header's number.
    fn packet(headers: &[(u8, &[u8])], last: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[6] = headers.first().map_or(last, |header| header.0);
        for (index, (_, bytes)) in headers.iter().enumerate() {
            packet.push(headers.get(index + 1).map_or(last, |header| header.0));
            packet.extend(*bytes);
        }
        packet
    }

    fn ah_test() -> Ipv6HeaderTest {
        Ipv6HeaderTest::Ah { spi: (5, 9), spi_negate: false, len: 0, len_negate: false, reserved: false }
    }

    #[test]
    fn authentication_headers() {
        let with = |spi: u8, words: u8, reserved: u8| {
            let mut bytes = vec![words, 0, reserved, 0, 0, 0, spi, 0, 0, 0, 0];
            bytes.resize(usize::from(words) * 4 + 7, 0);
            packet(&[(60, &[0; 7]), (51, &bytes)], 6)
        };
        assert_eq!(ipv6_header(&ah_test(), &with(5, 1, 0)), HOLDS);
        assert_eq!(ipv6_header(&ah_test(), &with(4, 1, 0)), FAILS);
        assert_eq!(ipv6_header(&ah_test(), &packet(&[], 6)), FAILS);
        let negated =
            Ipv6HeaderTest::Ah { spi: (5, 9), spi_negate: true, len: 16, len_negate: true, reserved: true };
        assert_eq!(ipv6_header(&negated, &with(4, 1, 0)), HOLDS);
        assert_eq!(ipv6_header(&negated, &with(4, 2, 0)), FAILS, "16 bytes");
        assert_eq!(ipv6_header(&negated, &with(4, 1, 7)), FAILS, "reserved");
        assert_eq!(ipv6_header(&negated, &packet(&[], 6)), FAILS, "negation needs the header too");
        let whole = with(5, 1, 0);
        assert_eq!(ipv6_header(&ah_test(), &whole[..whole.len() - 1]), HOTDROP, "12 bytes are read");
        let long = with(4, 2, 0);
        assert_eq!(ipv6_header(&ah_test(), &long), FAILS);
        assert_eq!(ipv6_header(&ah_test(), &long[..long.len() - 1]), HOTDROP, "shorter than its header says");
        assert_eq!(ipv6_header(&ah_test(), &whole[..41]), HOTDROP, "the chain is cut before");
    }

    #[test]
    fn fragment_headers() {
        let test = |first, more, last, reserved| Ipv6HeaderTest::Frag {
            id: (7, 7),
            id_negate: false,
            len: None,
            reserved,
            first,
            more,
            last,
        };
        let with = |reserved: u8, bits: u8| packet(&[(44, &[reserved, 0, bits, 0, 0, 0, 7])], 6);
        assert_eq!(ipv6_header(&test(true, true, false, true), &with(0, 1)), HOLDS);
        assert_eq!(ipv6_header(&test(true, false, false, false), &with(0, 8)), FAILS, "not the first");
        assert_eq!(ipv6_header(&test(false, false, false, false), &with(0, 8)), HOLDS, "a later fragment");
        assert_eq!(ipv6_header(&test(false, true, false, false), &with(0, 8)), FAILS);
        assert_eq!(ipv6_header(&test(false, false, true, false), &with(0, 9)), FAILS);
        assert_eq!(ipv6_header(&test(false, false, false, true), &with(0, 2)), FAILS, "a reserved bit");
        assert_eq!(ipv6_header(&test(false, false, false, true), &with(1, 0)), FAILS, "a reserved byte");
        let whole = with(0, 1);
        assert_eq!(ipv6_header(&test(false, false, false, false), &whole[..47]), HOTDROP);
        // What follows a later fragment is no header.
        let later = packet(&[(44, &[0, 0, 8, 0, 0, 0, 7]), (51, &[1; 15])], 6);
        assert_eq!(ipv6_header(&ah_test(), &later), FAILS);
    }

    #[test]
    fn options() {
        let test = |options: &[(u8, Option<u8>)], len: Option<u32>| Ipv6HeaderTest::Options {
            destination: false,
            len,
            len_negate: false,
            options: options.to_vec(),
        };
        let hop = packet(&[(0, &[0, 5, 2, 0, 0, 0, 0])], 6);
        assert_eq!(ipv6_header(&test(&[], None), &hop), HOLDS);
        assert_eq!(ipv6_header(&test(&[], Some(8)), &hop), HOLDS);
        assert_eq!(ipv6_header(&test(&[], Some(16)), &hop), FAILS);
        assert_eq!(ipv6_header(&test(&[(5, None), (0, None)], None), &hop), HOLDS);
        assert_eq!(
            ipv6_header(&test(&[(5, Some(2)), (0, Some(9)), (0, None)], None), &hop),
            HOLDS,
            "Pad1 has none"
        );
        assert_eq!(ipv6_header(&test(&[(5, Some(3))], None), &hop), FAILS);
        assert_eq!(ipv6_header(&test(&[(0, None)], None), &hop), FAILS);
        assert_eq!(
            ipv6_header(&test(&[(5, None), (0, None), (0, None), (0, None)], None), &hop),
            FAILS,
            "too few"
        );
        let long = packet(&[(0, &[0, 5, 9, 0, 0, 0, 0])], 6);
        assert_eq!(ipv6_header(&test(&[(5, None)], None), &long), HOLDS, "nobody looks where the last ends");
        assert_eq!(ipv6_header(&test(&[(5, None), (0, None)], None), &long), FAILS, "beyond the header");
        assert_eq!(ipv6_header(&test(&[(5, Some(2))], None), &long), FAILS, "compared before");
        assert_eq!(ipv6_header(&test(&[(5, None)], Some(99)), &long), FAILS, "another length");
        let end = packet(&[(0, &[0, 1, 3, 0, 0, 0, 7])], 6);
        assert_eq!(ipv6_header(&test(&[(1, None), (7, None)], None), &end), FAILS, "no room for a length");
        assert_eq!(
            ipv6_header(&test(&[], None), &packet(&[(0, &[1, 5, 2, 0, 0, 0, 0])], 6)),
            HOTDROP,
            "cut short"
        );
        assert_eq!(ipv6_header(&test(&[], None), &packet(&[(60, &[0; 7])], 6)), FAILS, "another header");
    }

    #[test]
    fn routing_headers() {
        let (a, b, c) = ([1; 16], [2; 16], [3; 16]);
        let test = |addresses: &[[u8; 16]], not_strict| Ipv6HeaderTest::Rt {
            kind: Some(0),
            kind_negate: false,
            segments_left: (0, 2),
            segments_left_negate: false,
            len: None,
            len_negate: false,
            reserved: true,
            addresses: addresses.iter().map(|bytes| u128::from_be_bytes(*bytes)).collect(),
            not_strict,
        };
        let with = |kind: u8, left: u8, addresses: &[[u8; 16]]| {
            let mut bytes = vec![2 * addresses.len() as u8, kind, left, 0, 0, 0, 0];
            bytes.extend(addresses.iter().flatten());
            packet(&[(43, &bytes)], 6)
        };
        assert_eq!(ipv6_header(&test(&[], false), &with(0, 2, &[a])), HOLDS);
        assert_eq!(ipv6_header(&test(&[], false), &with(0, 3, &[a])), FAILS);
        assert_eq!(ipv6_header(&test(&[], false), &with(2, 2, &[a])), FAILS);
        assert_eq!(ipv6_header(&test(&[a, b], false), &with(0, 0, &[a, b])), HOLDS);
        assert_eq!(ipv6_header(&test(&[a, b], false), &with(0, 0, &[a, b, c])), FAILS, "strict: no more");
        assert_eq!(ipv6_header(&test(&[a, c], true), &with(0, 0, &[a, b, c])), HOLDS);
        assert_eq!(ipv6_header(&test(&[c, a], true), &with(0, 0, &[a, b, c])), FAILS, "in order");
        assert_eq!(ipv6_header(&test(&[a, a], true), &with(0, 0, &[a, b])), FAILS, "each once");
        let whole = with(0, 0, &[a]);
        assert_eq!(ipv6_header(&test(&[], false), &whole[..whole.len() - 1]), HOTDROP);
        assert_eq!(ipv6_header(&test(&[], false), &whole[..43]), HOTDROP);
        let mut reserved = whole;
        reserved[45] = 1;
        assert_eq!(ipv6_header(&test(&[], false), &reserved), FAILS);
    }
}
