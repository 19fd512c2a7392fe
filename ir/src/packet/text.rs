//! Packets as people write them: `tcp 10.0.0.1:5000 > 10.0.0.2:22 in=eth0 flags=syn`.
//!
//! A text names a protocol, two ends and, as `key=value`, whatever else matters; what it leaves out is plausible (a TCP
//! packet without `flags` is a SYN, ttl is 64). The frame that comes of it has right lengths and a right IPv4 header
//! checksum. [`PacketSpec`] is the same as data, one JSON object a packet, or a whole frame in hexadecimal.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::env::{Connection, Input};
use crate::field::DeviceName;
use crate::hook::Family;

/// Why a packet's text is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketError {
    /// Offset of the word at fault in the text, in bytes; 0 if it is not one word's fault.
    pub at: usize,
    /// What is wrong.
    pub message: String,
}

impl std::fmt::Display for PacketError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for PacketError {}

/// A packet as data. Everything is optional but, unless there is a whole `frame`, the two addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PacketSpec {
    /// The whole frame from the Ethernet header on, in hexadecimal; then only the metadata below is looked at.
    pub frame: Option<String>,
    /// `tcp`, `udp`, `icmp`, `icmp6`, `sctp`, `dccp`, `udplite`, `esp`, `ah`, `gre`, or a number.
    pub proto: Option<String>,
    /// Source address.
    pub src: Option<IpAddr>,
    /// Destination address.
    pub dst: Option<IpAddr>,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// TCP's flags, by name, joined by commas (`syn,ack`).
    pub flags: Option<String>,
    /// ICMP or ICMPv6 type.
    #[serde(rename = "type")]
    pub kind: u8,
    /// ICMP or ICMPv6 code.
    pub code: u8,
    /// Time to live or hop limit.
    pub ttl: Option<u8>,
    /// Type of service or traffic class.
    pub tos: u8,
    /// Length from the network header on, if longer than the headers.
    pub len: Option<u16>,
    /// Fragment offset in units of 8 bytes.
    pub frag: u16,
    /// More fragments follow.
    pub more: bool,
    /// Source MAC address, `02:00:00:00:00:01`.
    pub smac: Option<String>,
    /// Destination MAC address.
    pub dmac: Option<String>,
    /// Input device.
    #[serde(rename = "in")]
    pub in_device: Option<String>,
    /// Output device.
    #[serde(rename = "out")]
    pub out_device: Option<String>,
    /// The packet's mark.
    pub mark: u32,
    /// VLAN id of a tag that the kernel took out.
    pub vlan: Option<u16>,
    /// Connection state: `new`, `established`, `related`, `invalid` or `untracked`.
    pub ct: Option<String>,
}

const PROTOCOLS: &[(&str, u8)] = &[
    ("icmp", 1),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("icmp6", 58),
    ("icmpv6", 58),
    ("sctp", 132),
    ("udplite", 136),
];

const FLAGS: &[(&str, u8)] = &[
    ("fin", 0x01),
    ("syn", 0x02),
    ("rst", 0x04),
    ("psh", 0x08),
    ("ack", 0x10),
    ("urg", 0x20),
    ("ece", 0x40),
    ("cwr", 0x80),
    ("none", 0),
];

/// Bits of `Field::CtState`.
const STATES: &[(&str, u16)] =
    &[("invalid", 0x01), ("established", 0x02), ("related", 0x04), ("new", 0x08), ("untracked", 0x100)];

/// Reads `PROTO SRC[:PORT] > DST[:PORT] [key=value]...`; IPv6 addresses with a port stand in brackets. `hex=FRAME`
/// gives a whole frame instead.
///
/// # Errors
/// The first word that is not understood.
pub fn parse(text: &str) -> Result<PacketSpec, PacketError> {
    let mut spec = PacketSpec::default();
    let mut ends = 0;
    let mut arrow = false;
    for word in text.split_whitespace() {
        let at = word.as_ptr() as usize - text.as_ptr() as usize;
        let fault = |message: String| PacketError { at, message };
        if let Some((key, value)) = word.split_once('=') {
            set(&mut spec, key, value).map_err(fault)?;
        } else if word == ">" || word == "->" {
            arrow = true;
        } else if spec.proto.is_none() && ends == 0 && protocol(word).is_some() {
            spec.proto = Some(word.to_string());
        } else {
            let (address, port) = end(word).ok_or_else(|| {
                fault(format!("`{word}` is neither a protocol, an address nor `key=value`"))
            })?;
            match (ends, arrow) {
                (0, false) => (spec.src, spec.sport) = (Some(address), port),
                (1, true) if spec.src.is_some_and(|src| src.is_ipv4() != address.is_ipv4()) => {
                    return Err(fault(MIXED_FAMILIES.into()));
                }
                (1, true) => (spec.dst, spec.dport) = (Some(address), port),
                _ => return Err(fault("a packet has a source, a `>` and a destination".into())),
            }
            ends += 1;
        }
    }
    if spec.frame.is_none() && ends != 2 {
        let message =
            "a packet is written `PROTO SOURCE > DESTINATION`, like `tcp 10.0.0.1:5000 > 10.0.0.2:22`";
        return Err(PacketError { at: 0, message: message.into() });
    }
    Ok(spec)
}

const MIXED_FAMILIES: &str = "the two addresses are of different families";

/// Takes `key=value`, if it is what [`PacketSpec::input`] makes a packet of.
fn set(spec: &mut PacketSpec, key: &str, value: &str) -> Result<(), String> {
    fn number<T: TryFrom<u64>>(value: &str) -> Result<T, String> {
        let parsed = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => value.parse(),
        };
        parsed
            .ok()
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| format!("`{value}` is not a number that fits"))
    }
    let text = || Some(value.to_string());
    match key {
        "hex" | "frame" => from_hex(value).map(drop)?,
        "proto" => protocol(value).map(drop).ok_or_else(|| no_protocol(value))?,
        "flags" => tcp_flags(value).map(drop)?,
        "smac" | "dmac" => mac(value).map(drop)?,
        "in" | "out" => device(value).map(drop)?,
        "ct" => connection(value).map(drop)?,
        _ => {}
    }
    match key {
        "hex" | "frame" => spec.frame = text(),
        "proto" => spec.proto = text(),
        "sport" => spec.sport = number(value)?,
        "dport" => spec.dport = number(value)?,
        "flags" => spec.flags = text(),
        "type" => spec.kind = number(value)?,
        "code" => spec.code = number(value)?,
        "ttl" => spec.ttl = Some(number(value)?),
        "tos" => spec.tos = number(value)?,
        "len" => spec.len = Some(number(value)?),
        "frag" => spec.frag = number(value)?,
        "more" => spec.more = value != "0" && value != "false",
        "smac" => spec.smac = text(),
        "dmac" => spec.dmac = text(),
        "in" => spec.in_device = text(),
        "out" => spec.out_device = text(),
        "mark" => spec.mark = number(value)?,
        "vlan" => spec.vlan = Some(number(value)?),
        "ct" => spec.ct = text(),
        _ => {
            let known = "proto, sport, dport, flags, type, code, ttl, tos, len, frag, more, smac, dmac, in, out, mark, vlan, ct, hex";
            return Err(format!("`{key}` is no key; known: {known}"));
        }
    }
    Ok(())
}

fn protocol(text: &str) -> Option<u8> {
    PROTOCOLS.iter().find(|(name, _)| *name == text).map(|&(_, number)| number).or_else(|| text.parse().ok())
}

/// An address with an optional port.
fn end(word: &str) -> Option<(IpAddr, u16)> {
    if let Ok(address) = word.parse() {
        return Some((address, 0));
    }
    let (address, port) = match word.strip_prefix('[') {
        Some(rest) => {
            rest.split_once(']').and_then(|(address, port)| Some((address, port.strip_prefix(':')?)))?
        }
        None => word.rsplit_once(':')?,
    };
    Some((address.parse().ok()?, port.parse().ok()?))
}

fn no_protocol(text: &str) -> String {
    format!("`{text}` is no protocol")
}

fn tcp_flags(text: &str) -> Result<u8, String> {
    text.split(',').try_fold(0, |sum, name| {
        let known = FLAGS.iter().find(|(flag, _)| flag.eq_ignore_ascii_case(name));
        known.map(|(_, bit)| sum | bit).ok_or_else(|| format!("`{name}` is no TCP flag"))
    })
}

fn connection(text: &str) -> Result<Connection, String> {
    let known = STATES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
    let (_, state) = known.ok_or_else(|| format!("`{text}` is no connection state"))?;
    Ok(Connection { state: *state, ..Connection::default() })
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() <= 2)).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| format!("`{text}` is not a MAC address"))
}

fn device(text: &str) -> Result<DeviceName, String> {
    DeviceName::new(text).ok_or_else(|| format!("`{text}` is not a device name of 1 to 15 bytes"))
}

fn from_hex(text: &str) -> Result<Vec<u8>, String> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| (byte as char).to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()
        .ok_or("the frame is not hexadecimal")?;
    if digits.len() % 2 == 1 {
        return Err("the frame has half a byte".into());
    }
    Ok(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

impl PacketSpec {
    /// The packet with its frame.
    ///
    /// # Errors
    /// A value that no packet has.
    pub fn input(&self) -> Result<Input, String> {
        Ok(Input {
            frame: match &self.frame {
                Some(hex) => from_hex(hex)?,
                None => self.build()?,
            },
            in_device: self.in_device.as_deref().map(device).transpose()?,
            out_device: self.out_device.as_deref().map(device).transpose()?,
            mark: self.mark,
            vlan: self.vlan,
            packet_type: None,
            connection: self.ct.as_deref().map(connection).transpose()?,
        })
    }

    fn build(&self) -> Result<Vec<u8>, String> {
        let (Some(src), Some(dst)) = (self.src, self.dst) else {
            return Err("a packet needs `src` and `dst`, or a whole `frame`".into());
        };
        let family = match (src, dst) {
            (IpAddr::V4(_), IpAddr::V4(_)) => Family::V4,
            (IpAddr::V6(_), IpAddr::V6(_)) => Family::V6,
            _ => return Err(MIXED_FAMILIES.into()),
        };
        let proto = match self.proto.as_deref() {
            None => 6,
            Some(text) => protocol(text).ok_or_else(|| no_protocol(text))?,
        };
        let mut frame = Vec::new();
        frame.extend(self.dmac.as_deref().map_or(Ok([2, 0, 0, 0, 0, 2]), mac)?);
        frame.extend(self.smac.as_deref().map_or(Ok([2, 0, 0, 0, 0, 1]), mac)?);
        frame.extend(family.ether_type().to_be_bytes());
        let mut payload = self.transport(proto)?;
        let header = if family == Family::V4 { 20 } else { 40 };
        let fragment = self.frag != 0 || self.more;
        if family == Family::V6 && fragment {
            let bits = (self.frag << 3 | u16::from(self.more)).to_be_bytes();
            payload.splice(0..0, [proto, 0, bits[0], bits[1], 0, 0, 0, 1]);
        }
        let wanted = usize::from(self.len.unwrap_or(0));
        if wanted > header + payload.len() {
            payload.resize(wanted - header, 0);
        }
        let ttl = self.ttl.unwrap_or(64);
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut ip = [0u8; 20];
                ip[0] = 0x45;
                ip[1] = self.tos;
                ip[2..4].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
                let bits = u16::from(self.more) << 13 | self.frag & 0x1fff;
                ip[6..8].copy_from_slice(&bits.to_be_bytes());
                ip[8] = ttl;
                ip[9] = proto;
                ip[12..16].copy_from_slice(&src.octets());
                ip[16..20].copy_from_slice(&dst.octets());
                let checksum = checksum(&ip);
                ip[10..12].copy_from_slice(&checksum.to_be_bytes());
                frame.extend(ip);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut ip = [0u8; 40];
                ip[0] = 0x60 | self.tos >> 4;
                ip[1] = self.tos << 4;
                ip[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
                ip[6] = if fragment { 44 } else { proto };
                ip[7] = ttl;
                ip[8..24].copy_from_slice(&src.octets());
                ip[24..40].copy_from_slice(&dst.octets());
                frame.extend(ip);
            }
            _ => return Err(MIXED_FAMILIES.into()),
        }
        frame.extend(payload);
        Ok(frame)
    }

    fn transport(&self, proto: u8) -> Result<Vec<u8>, String> {
        let mut header = match proto {
            6 => vec![0u8; 20],
            1 | 58 => vec![self.kind, self.code, 0, 0, 0, 0, 0, 0],
            132 | 33 | 51 => vec![0u8; 16],
            _ => vec![0u8; 8],
        };
        if matches!(proto, 6 | 17 | 33 | 132 | 136) {
            header[..2].copy_from_slice(&self.sport.to_be_bytes());
            header[2..4].copy_from_slice(&self.dport.to_be_bytes());
        }
        match proto {
            6 => {
                header[12] = 0x50;
                header[13] = self.flags.as_deref().map_or(Ok(0x02), tcp_flags)?;
            }
            17 | 136 => header[4..6].copy_from_slice(&8u16.to_be_bytes()),
            _ => {}
        }
        Ok(header)
    }
}

fn checksum(header: &[u8]) -> u16 {
    let sum =
        header.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::{Connections, Counting, Fragments, Mode, Place};
    use crate::field::Field;
    use crate::packet::View;

    fn place() -> Place {
        Place {
            path: vec![],
            attach: None,
            mode: Mode::Accelerate,
            fragments: Fragments::AsSeen,
            connections: Connections::Given,
            local_addresses: true,
            counters: Counting::Exact,
        }
    }

    fn field(text: &str, family: Family, field: Field) -> u128 {
        let input = parse(text).expect("it parses").input().expect("it is a packet");
        View::new(family, &place(), &input).expect("it reaches the rules").get(field)
    }

    /// net/ipv6/ip6_input.c, `ip6_rcv_core`, does not cut such a packet, and xt_length asks for the bytes that there are.
    #[test]
    fn a_hop_by_hop_header_behind_no_length_leaves_the_length_of_the_frame() {
        let mut input =
            parse("udp fe80::1:1 > fe80::2:2 len=60").expect("it parses").input().expect("a packet");
        let (length, next) = (14 + 4, 14 + 6);
        input.frame[length..length + 2].fill(0);
        input.frame[next] = 0;
        input.frame[14 + 40..14 + 48].copy_from_slice(&[59, 0, 1, 4, 0, 0, 0, 0]);
        assert_eq!(
            View::new(Family::V6, &place(), &input).expect("it reaches the rules").get(Field::Length),
            60
        );
    }

    #[test]
    fn what_is_written_is_what_rules_see() {
        let tcp = "tcp 10.0.0.1:5000 > 10.0.0.2:22 in=eth0 flags=syn,ack mark=0x10 tos=8";
        assert_eq!(field(tcp, Family::V4, Field::DstPort), 22);
        assert_eq!(field(tcp, Family::V4, Field::SrcAddr), 0x0a00_0001);
        assert_eq!(field(tcp, Family::V4, Field::TcpFlags), 0x12);
        assert_eq!(field(tcp, Family::V4, Field::Mark), 0x10);
        assert_eq!(field(tcp, Family::V4, Field::Length), 40);
        let udp = "udp [2001:db8::1]:53 > [2001:db8::2]:99 ttl=255 len=100";
        assert_eq!(field(udp, Family::V6, Field::SrcPort), 53);
        assert_eq!(field(udp, Family::V6, Field::Ttl), 255);
        assert_eq!(field(udp, Family::V6, Field::Length), 100);
        assert_eq!(field("icmp 1.2.3.4 > 5.6.7.8 type=3 code=4", Family::V4, Field::IcmpCode), 4);
        let piece = "udp fe80::1 > fe80::2 frag=10 more=1";
        assert_eq!(field(piece, Family::V6, Field::FragOffset), 10);
        assert_eq!(field(piece, Family::V6, Field::Fragment), 1);
        assert_eq!(field("47 1.1.1.1 > 2.2.2.2", Family::V4, Field::Proto), 47);
    }

    #[test]
    fn errors_point_at_the_word() {
        assert_eq!(parse("tcp 10.0.0.1:80 > 10.0.0:22").expect_err("no address").at, 18);
        assert_eq!(parse("tcp 1.1.1.1 > 2.2.2.2 colour=red").expect_err("no key").at, 22);
        assert!(parse("tcp 1.1.1.1").is_err());
        assert!(parse("hex=0800").expect("a frame").input().is_ok());
        for (text, at) in [
            ("hex=080", 0),
            ("tcp 1.1.1.1 > ::2", 14),
            ("tcp 1.1.1.1 > 2.2.2.2 in=abcdefghijklmnop", 22),
            ("tcp 1.1.1.1 > 2.2.2.2 mark=1 flags=syn,fun", 29),
            ("tcp 1.1.1.1 > 2.2.2.2 ct=old", 22),
            ("tcp 1.1.1.1 > 2.2.2.2 smac=02", 22),
            ("1.1.1.1 > 2.2.2.2 proto=tpc", 18),
        ] {
            assert_eq!(parse(text).expect_err(text).at, at, "{text}");
        }
    }
}
