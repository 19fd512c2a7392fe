//! `View`: a packet's fields, read from its frame as netfilter sees them.
//!
//! The frame is judged first, as the kernel does before any hook; what is left has a network header that holds
//! together, cut to the packet's own length. Programs read the same bytes in the same order
//! (`backend-ebpf/src/emit/headers.rs`) and are compared with this.

pub mod extension;
pub mod text;

use crate::env::{Connections, Input, Mode, Place, ct_state};
use crate::field::{DeviceName, EXT_HEADERS_BEYOND, EXT_HEADERS_CUT, Field};
use crate::hook::Family;
use crate::limits::IPV6_EXT_HEADERS_MAX;
use crate::outcome::{Decider, Ending, FrameKind, Verdict};
use extension::{ExtensionHeaders, Walked, kind};

/// A packet that reached the rules.
#[derive(Clone, Debug)]
pub struct View<'a> {
    input: &'a Input,
    family: Family,
    /// The packet from the network header on, without what the link added behind it.
    packet: &'a [u8],
    /// Offset of the transport header in `packet`, which may lie at its end.
    l4_offset: usize,
    proto: u8,
    fragment: bool,
    frag_offset: u16,
    ext_headers: u8,
    length: u32,
    /// The state of a packet that no connection is given of.
    state: u16,
}

/// What became of a frame that never reaches the rules.
pub fn frame_ending(kind: FrameKind, mode: Mode) -> Ending {
    let verdict = match kind {
        FrameKind::Runt | FrameKind::NotIp | FrameKind::OtherFamily => Verdict::Accept,
        FrameKind::Malformed => Verdict::Drop,
        FrameKind::Vlan | FrameKind::UnknownDevice | FrameKind::ManyHeaders => match mode {
            Mode::Accelerate => Verdict::Defer,
            Mode::Replace => Verdict::Drop,
        },
    };
    Ending { verdict, by: Decider::Frame(kind) }
}

impl<'a> View<'a> {
    /// Reads a frame's headers.
    ///
    /// # Errors
    /// The ending of a frame that never reaches the rules of `family`.
    pub fn new(family: Family, place: &Place, input: &'a Input) -> Result<View<'a>, Ending> {
        network_packet(family, input)
            .and_then(|packet| match family {
                Family::V4 => View::ipv4(input, packet),
                Family::V6 => View::ipv6(input, packet),
            })
            .map(|view| match place.connections {
                // What tracking made nothing of.
                Connections::State => View { state: ct_state::INVALID, ..view },
                _ => view,
            })
            .map_err(|kind| frame_ending(kind, place.mode))
    }

    fn ipv4(input: &'a Input, packet: &'a [u8]) -> Result<View<'a>, FrameKind> {
        // net/ipv4/ip_input.c, `ip_rcv_core`.
        let (&first, rest) = packet.split_first().ok_or(FrameKind::Malformed)?;
        let header = usize::from(first & 15) * 4;
        if rest.len() < 19 || first >> 4 != 4 || header < 20 || header > packet.len() {
            return Err(FrameKind::Malformed);
        }
        let total = usize::from(be16(packet, 2));
        if total > packet.len() || total < header {
            return Err(FrameKind::Malformed);
        }
        let fragment = be16(packet, 6);
        Ok(View {
            input,
            family: Family::V4,
            packet: &packet[..total],
            l4_offset: header,
            proto: packet[9],
            fragment: fragment & 0x3fff != 0,
            frag_offset: fragment & 0x1fff,
            ext_headers: 0,
            length: total as u32,
            state: 0,
        })
    }

    fn ipv6(input: &'a Input, packet: &'a [u8]) -> Result<View<'a>, FrameKind> {
        // net/ipv6/ip6_input.c, `ip6_rcv_core`.
        if packet.len() < 40 || packet[0] >> 4 != 6 {
            return Err(FrameKind::Malformed);
        }
        let payload = usize::from(be16(packet, 4));
        // No length and a hop-by-hop header may be a jumbogram: it is as long as the frame.
        let jumbo = payload == 0 && packet[6] == 0;
        if !jumbo && payload + 40 > packet.len() {
            return Err(FrameKind::Malformed);
        }
        let packet = if jumbo { packet } else { &packet[..payload + 40] };
        let mut view = View {
            input,
            family: Family::V6,
            packet,
            l4_offset: packet.len(),
            proto: 0,
            fragment: false,
            frag_offset: 0,
            ext_headers: 0,
            length: packet.len() as u32,
            state: 0,
        };
        view.extension_headers()?;
        Ok(view)
    }

    /// `ipv6_find_hdr(skb, .., -1, ..)` (net/ipv6/exthdrs_core.c): the transport protocol and where its header is.
    fn extension_headers(&mut self) -> Result<(), FrameKind> {
        let mut headers = ExtensionHeaders::new(self.packet);
        for _ in 0..IPV6_EXT_HEADERS_MAX {
            match headers.step() {
                Walked::Header { kind: kind::AUTHENTICATION, .. } => self.ext_headers |= 2,
                Walked::Header { kind: kind::FRAGMENT, .. } => self.fragment = true,
                Walked::Header { .. } => {}
                Walked::Later { next, at, offset } => {
                    self.fragment = true;
                    if extension::EXTENSIONS.contains(&next) {
                        self.ext_headers |= 1;
                    } else {
                        self.frag_offset = offset;
                        self.proto = next;
                        self.l4_offset = at.min(self.packet.len());
                    }
                    return Ok(());
                }
                Walked::Transport { protocol, at } => {
                    self.proto = protocol;
                    self.l4_offset = at.min(self.packet.len());
                    return Ok(());
                }
                Walked::Malformed => {
                    self.ext_headers |= 1;
                    return Ok(());
                }
            }
        }
        Err(FrameKind::ManyHeaders)
    }

    /// The packet from the network header on, without what the link added behind it.
    pub fn packet(&self) -> &'a [u8] {
        self.packet
    }

    /// The packet from the transport header on; empty if there is none.
    pub fn l4(&self) -> &'a [u8] {
        self.packet.get(self.l4_offset..).unwrap_or(&[])
    }

    /// The rules' address family, which is the packet's.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The transport protocol; 0 if the extension headers lead to none.
    pub fn protocol(&self) -> u8 {
        self.proto
    }

    /// Whether the packet is a fragment.
    pub fn is_fragment(&self) -> bool {
        self.fragment
    }

    /// Bytes from the network header on, as counters count them.
    pub fn bytes(&self) -> u64 {
        self.packet.len() as u64
    }

    /// The value of a field; derived fields are 0 here.
    pub fn get(&self, field: Field) -> u128 {
        let packet = self.packet;
        let connection = self.input.connection.unwrap_or_default();
        let l4 = |offset: usize, len: usize| number(self.l4().get(offset..offset + len).unwrap_or(&[]));
        match field {
            Field::Fragment => u128::from(self.fragment),
            Field::InDevice => self.input.in_device.map_or(0, DeviceName::value),
            Field::OutDevice => self.input.out_device.map_or(0, DeviceName::value),
            Field::DstMac => number(&self.input.frame[..6]),
            Field::SrcMac => number(&self.input.frame[6..12]),
            Field::PacketType => self.input.packet_type.unwrap_or_else(|| self.link_type()).into(),
            Field::SrcAddr => match self.family {
                Family::V4 => number(&packet[12..16]),
                Family::V6 => number(&packet[8..24]),
            },
            Field::DstAddr => match self.family {
                Family::V4 => number(&packet[16..20]),
                Family::V6 => number(&packet[24..40]),
            },
            Field::Proto => self.proto.into(),
            Field::FragOffset => self.frag_offset.into(),
            Field::ExtHeaders => self.ext_headers.into(),
            Field::ExtHeaderMask => self.header_mask().into(),
            Field::Length => self.length.into(),
            Field::Tos => match self.family {
                Family::V4 => packet[1].into(),
                Family::V6 => (be16(packet, 0) >> 4 & 0xff).into(),
            },
            Field::Ttl => match self.family {
                Family::V4 => packet[8].into(),
                Family::V6 => packet[7].into(),
            },
            Field::L4Len => self.l4().len().min(0xffff) as u128,
            Field::SrcPort => l4(0, 2),
            Field::DstPort => l4(2, 2),
            Field::TcpFlags => l4(13, 1),
            Field::TcpDataOffset => l4(12, 1) >> 4,
            Field::IcmpType => l4(0, 1),
            Field::IcmpCode => l4(1, 1),
            Field::L4Bytes { offset, len } => l4(offset.into(), len.into()),
            Field::Mark => self.input.mark.into(),
            Field::CtState => self.input.connection.map_or(self.state, |connection| connection.state).into(),
            Field::CtStatus => connection.status.into(),
            Field::CtDirection => connection.reply.into(),
            Field::CtMark => connection.mark.into(),
            Field::CtAbsent => self.is_without_connection().into(),
            Field::Derived(_) => 0,
        }
    }

    /// See [`Field::CtAbsent`].
    fn is_without_connection(&self) -> bool {
        let asks = matches!(self.proto, 6 | 17) && !self.fragment && self.l4().len() >= 4;
        asks && !self.input.connection.is_some_and(|connection| connection.is_in_table())
    }

    /// The packet type by the destination's Ethernet address: broadcast, multicast, else for this host
    /// (net/ethernet/eth.c, `eth_type_trans`).
    fn link_type(&self) -> u8 {
        match &self.input.frame[..6] {
            [255, 255, 255, 255, 255, 255] => 1,
            [first, ..] if first & 1 == 1 => 2,
            _ => 0,
        }
    }

    /// Which extension headers there are (net/ipv6/netfilter/ip6t_ipv6header.c, `ipv6header_mt6`).
    fn header_mask(&self) -> u16 {
        if self.family == Family::V4 {
            return 0;
        }
        let (mut next, mut at, mut mask) = (self.packet[6], 40, 0);
        for _ in 0..IPV6_EXT_HEADERS_MAX {
            let bit = match next {
                kind::HOP_BY_HOP => 128,
                kind::DESTINATION => 64,
                kind::ROUTING => 32,
                kind::FRAGMENT => 16,
                kind::AUTHENTICATION => 8,
                kind::ESP => 4,
                kind::NONE => return mask | 2,
                _ => return mask | 1,
            };
            let Some(bytes) = self.packet.get(at..at + 2) else { return EXT_HEADERS_CUT };
            mask |= bit;
            if next == kind::ESP {
                return mask;
            }
            at += extension::length(next, bytes[1]);
            next = bytes[0];
            if at > self.packet.len() {
                let protocol = !matches!(next, kind::NONE | kind::ESP);
                return mask | u16::from(protocol);
            }
        }
        EXT_HEADERS_BEYOND
    }
}

/// The packet behind Ethernet header and priority tags: what netfilter sees of a frame, link padding included.
///
/// # Errors
/// What the frame is, if it is none of the family's packets on this device.
pub fn network_packet(family: Family, input: &Input) -> Result<&[u8], FrameKind> {
    let frame = &input.frame[..];
    if frame.len() < 14 {
        return Err(FrameKind::Runt);
    }
    let (mut kind, mut rest) = (be16(frame, 12), &frame[14..]);
    for _ in 0..2 {
        if !matches!(kind, 0x8100 | 0x88a8) {
            break;
        }
        if rest.len() < 4 || be16(rest, 0) & 0xfff != 0 {
            return Err(FrameKind::Vlan);
        }
        kind = be16(rest, 2);
        rest = &rest[4..];
    }
    if matches!(kind, 0x8100 | 0x88a8) || input.vlan.is_some_and(|tag| tag & 0xfff != 0) {
        return Err(FrameKind::Vlan);
    }
    match kind {
        _ if kind == family.ether_type() => Ok(rest),
        0x0800 | 0x86dd => Err(FrameKind::OtherFamily),
        _ => Err(FrameKind::NotIp),
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The number that bytes spell, the first the most significant; 0 for none.
fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |sum, &byte| sum << 8 | u128::from(byte))
}
