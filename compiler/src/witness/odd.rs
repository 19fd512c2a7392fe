//! Odd frames: packets that rules did not foresee, made of one that they did by cutting, tagging, fragmenting or bending
//! it in one way of many.

use polc_ir::env::Input;
use polc_ir::hook::Family;
use polc_ir::limits::IPV6_EXT_HEADERS_MAX;
use polc_ir::packet::extension::kind;

use super::frame::LINK_BYTES;
use super::random::Random;

/// Lengths a frame is cut to, whatever its headers say, and bytes of the network packet that its headers are made to
/// agree with: all up to the end of any header.
const CUTS: usize = 100;
/// Values of the first byte of the network header: each version with each header length would be 256.
const FIRST_BYTES: usize = 32;
const LENGTHS: usize = 12;
const TYPES: usize = 18;
const TAGS: usize = 19;
/// Frames with one or two tags are cut within the tags, and up to where the network header has begun.
const TAGGED_CUTS: std::ops::Range<usize> = 12..28;
const FRAGMENTS: usize = 8;
const CHAINS: usize = 9 * 5;
const OFFSETS: usize = 16;
const PADDINGS: usize = 3;
const OPTIONS: usize = 10;

/// How many ways there are.
pub const ODD_FRAMES: usize = 2 * CUTS
    + FIRST_BYTES
    + LENGTHS
    + TYPES
    + TAGS
    + 2 * (TAGGED_CUTS.end - TAGGED_CUTS.start)
    + FRAGMENTS
    + CHAINS
    + OFFSETS
    + PADDINGS
    + OPTIONS
    + 8;

/// Changes a frame in the way of this number, below [`ODD_FRAMES`]. A frame without a network header stays as it is.
pub(super) fn bend(family: Family, number: usize, input: &mut Input, random: &mut Random) {
    let header = if family == Family::V4 { 20 } else { 40 };
    let frame = &mut input.frame;
    if frame.len() < LINK_BYTES + header {
        return;
    }
    let mut left = number;
    let mut is = |count: usize| {
        let here = left < count;
        if !here {
            left -= count;
        }
        here.then_some(left)
    };
    if let Some(len) = is(CUTS) {
        frame.truncate(len);
    } else if let Some(len) = is(CUTS) {
        if len >= header {
            frame.truncate(LINK_BYTES + len);
            set_length(family, frame);
        }
    } else if let Some(nibble) = is(FIRST_BYTES) {
        let first = &mut frame[LINK_BYTES];
        let nibble_value = nibble as u8 & 15;
        *first = if nibble < 16 { nibble_value << 4 | *first & 15 } else { *first & 0xf0 | nibble_value };
    } else if let Some(of) = is(LENGTHS) {
        lie_about_length(family, of, frame);
    } else if let Some(bit) = is(TYPES) {
        match bit {
            0..16 => frame[12 + bit / 8] ^= 1 << (bit % 8),
            16 => frame[12..14].copy_from_slice(&[8, 6]),
            _ => {
                let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
                frame[12..14].copy_from_slice(&other.ether_type().to_be_bytes());
            }
        }
    } else if let Some(tags) = is(TAGS) {
        tag(tags, input, random);
    } else if let Some(of) = is(2 * TAGGED_CUTS.len()) {
        // One tag without an id, or two.
        tag(if of % 2 == 0 { 0 } else { 5 }, input, random);
        input.frame.truncate(TAGGED_CUTS.start + of / 2);
    } else if let Some(of) = is(FRAGMENTS) {
        let fields: [u16; FRAGMENTS] = [0x2000, 1, 0x2001, 0x4000, 0x8000, 0x1fff, 0x3fff, 0x100];
        fragment(family, fields[of], frame);
    } else if let Some(of) = is(CHAINS) {
        if family == Family::V6 {
            extend(of, frame);
        }
    } else if let Some(words) = is(OFFSETS) {
        if let Some(byte) = frame.get_mut(LINK_BYTES + header + 12) {
            *byte = (words as u8) << 4 | *byte & 15;
        }
    } else if let Some(of) = is(PADDINGS) {
        let len = frame.len() + [1, 7, 46][of];
        frame.resize(len, 0xa5);
    } else if let Some(words) = is(OPTIONS) {
        if family == Family::V4 && frame[LINK_BYTES] & 15 == 5 {
            let options = 4 * (words + 1);
            frame.splice(LINK_BYTES + 20..LINK_BYTES + 20, std::iter::repeat_n(1, options));
            frame[LINK_BYTES] += words as u8 + 1;
            set_length(family, frame);
        }
    } else {
        let at = random.below(frame.len());
        frame[at] ^= 1 << random.below(8);
    }
}

/// Makes the packet's own length that of the frame.
fn set_length(family: Family, frame: &mut [u8]) {
    let len = (frame.len() - LINK_BYTES) as u16;
    let (at, len) = match family {
        Family::V4 => (LINK_BYTES + 2, Some(len)),
        Family::V6 => (LINK_BYTES + 4, len.checked_sub(40)),
    };
    if let Some(len) = len {
        frame[at..at + 2].copy_from_slice(&len.to_be_bytes());
    }
}

/// A length of the packet that is not the frame's.
fn lie_about_length(family: Family, of: usize, frame: &mut [u8]) {
    let whole = (frame.len() - LINK_BYTES) as u16;
    let (at, least) = match family {
        Family::V4 => (LINK_BYTES + 2, u16::from(frame[LINK_BYTES] & 15) * 4),
        Family::V6 => (LINK_BYTES + 4, 0),
    };
    let true_len = if family == Family::V4 { whole } else { whole - 40 };
    let lens: [u16; LENGTHS] = [
        0,
        1,
        19,
        20,
        least.wrapping_sub(1),
        least,
        least + 1,
        true_len.wrapping_sub(1),
        true_len,
        true_len.wrapping_add(1),
        256,
        u16::MAX,
    ];
    frame[at..at + 2].copy_from_slice(&lens[of].to_be_bytes());
}

/// VLAN tags: in the frame, and taken out by the kernel.
fn tag(of: usize, input: &mut Input, random: &mut Random) {
    let id = 1 + random.below(4095) as u16;
    let (dot1q, dot1ad) = (0x8100u16, 0x88a8u16);
    let tags: &[(u16, u16)] = match of {
        0 => &[(dot1q, 0)],
        1 => &[(dot1ad, 0)],
        2 => &[(dot1q, 0xe000)],
        3 => &[(dot1q, id)],
        4 => &[(dot1ad, id)],
        5 => &[(dot1q, 0), (dot1q, 0)],
        6 => &[(dot1ad, 0xf000), (dot1q, 0)],
        7 => &[(dot1q, 0), (dot1q, id)],
        8 => &[(dot1ad, 0), (dot1ad, 1)],
        9 => &[(dot1q, 0), (dot1q, 0), (dot1q, 0)],
        10 => &[(dot1q, 0x800)],
        11 => &[(dot1q, 1)],
        12 => &[(dot1q, 0), (dot1q, 1)],
        13 => &[(dot1q, 0), (dot1ad, 0)],
        14 => &[(dot1q, 0), (dot1q, 0), (dot1ad, 0)],
        15 => &[(dot1ad, 0), (dot1ad, 0), (dot1ad, 0)],
        _ => &[],
    };
    match of {
        16 => input.vlan = Some(0),
        17 => input.vlan = Some(0xe000),
        18 => input.vlan = Some(0x6000 | id),
        _ => {}
    }
    for &(kind, tci) in tags.iter().rev() {
        let own = [input.frame[12], input.frame[13]];
        input.frame[12..14].copy_from_slice(&kind.to_be_bytes());
        let tci = tci.to_be_bytes();
        input.frame.splice(14..14, [tci[0], tci[1], own[0], own[1]]);
    }
}

/// Makes the packet a fragment; for IPv6 by a header that says so.
fn fragment(family: Family, field: u16, frame: &mut Vec<u8>) {
    match family {
        Family::V4 => frame[LINK_BYTES + 6..LINK_BYTES + 8].copy_from_slice(&field.to_be_bytes()),
        Family::V6 => {
            let next = frame[LINK_BYTES + 6];
            let field = (field << 3 | field >> 13 & 1).to_be_bytes();
            let header = [next, 0, field[0], field[1], 0, 0, 0, 1];
            frame[LINK_BYTES + 6] = kind::FRAGMENT;
            frame.splice(LINK_BYTES + 40..LINK_BYTES + 40, header);
            set_length(family, frame);
        }
    }
}

/// Puts extension headers in front of what an IPv6 packet carries.
fn extend(of: usize, frame: &mut Vec<u8>) {
    let kinds = [
        kind::HOP_BY_HOP,
        kind::ROUTING,
        kind::FRAGMENT,
        kind::ESP,
        kind::AUTHENTICATION,
        kind::NONE,
        kind::DESTINATION,
        // Mobility and the experimental 253, which `ipv6_find_hdr` takes for protocols.
        135,
        253,
    ];
    let (of, shape) = (kinds[of / 5], of % 5);
    let (count, words, len) = match shape {
        0 => (1, 0u8, 8),
        1 => (2, 1, 16),
        2 => (1, 255, 8),
        3 => (IPV6_EXT_HEADERS_MAX as usize, 0, 8),
        _ => (IPV6_EXT_HEADERS_MAX as usize + 1, 0, 8),
    };
    for _ in 0..count {
        let mut header = vec![0u8; len];
        header[0] = frame[LINK_BYTES + 6];
        header[1] = words;
        frame[LINK_BYTES + 6] = of;
        frame.splice(LINK_BYTES + 40..LINK_BYTES + 40, header);
    }
    set_length(Family::V6, frame);
}
