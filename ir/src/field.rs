//! Fields: what a rule can test of a packet, each a number of fixed width.
//!
//! All pure tests are of one kind, "is `field & mask` in this set of intervals", so a new match extension is new only
//! if it needs a new field. Numbers are in the usual order of significance: the first byte on the wire is the most
//! significant one of an address, a port or an SPI.
//!
//! **A field whose bytes a packet does not have reads as 0.** Whether the bytes are there is itself a field
//! ([`Field::L4Len`], [`Field::ExtHeaders`]), and lowering puts the guards before the tests, since what netfilter does
//! with a header it can't read differs from match to match.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::entities::Derived;
use crate::hook::Family;
use crate::source::bytes::of_text;

/// Which of a packet's two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// The sender.
    Src,
    /// The receiver.
    Dst,
}

/// A number that a rule can test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Field {
    /// Whether reassembly may change the packet (1) or not (0): IPv4 MF set or offset not 0; IPv6 any Fragment header,
    /// which reassembly takes out. Never tested by a rule; passes use it to treat fragments apart.
    Fragment,
    /// Name of the input device: 16 bytes, padded with NUL, as one number; 0 where there is none. `eth+` is a masked
    /// test.
    InDevice,
    /// Name of the output device, likewise.
    OutDevice,
    /// Source MAC address; 0 where the link has none.
    SrcMac,
    /// Destination MAC address; 0 where the link has none.
    DstMac,
    /// `PACKET_*` of include/uapi/linux/if_packet.h: 0 host, 1 broadcast, 2 multicast, 3 other host, 5 loopback.
    PacketType,
    /// Source address.
    SrcAddr,
    /// Destination address.
    DstAddr,
    /// Transport protocol: the IPv4 header's protocol; for IPv6 the protocol that `ipv6_find_hdr(.., -1, ..)` finds
    /// behind the extension headers (net/ipv6/exthdrs_core.c), 0 when [`Field::ExtHeaders`] says that it found none.
    Proto,
    /// Offset of a fragment's data in units of 8 bytes; 0 for first fragments and whole packets.
    FragOffset,
    /// How the walk over IPv6 extension headers went: bit 0 if it came to one that is malformed or cut short, bit 1 if
    /// it came past an authentication header before. Always 0 for IPv4.
    ExtHeaders,
    /// Which IPv6 extension headers the packet has, as xt_ipv6header sees them (net/ipv6/netfilter/ip6t_ipv6header.c):
    /// bits of `MASK_*` in include/uapi/linux/netfilter_ipv6/ip6t_ipv6header.h. [`EXT_HEADERS_CUT`] alone if one is cut
    /// short, so that no test holds; [`EXT_HEADERS_BEYOND`] alone if there are more than
    /// [`crate::limits::IPV6_EXT_HEADERS_MAX`]. 0 for IPv4.
    ExtHeaderMask,
    /// Length in bytes from the network header on, as xt_length sees it: IPv4 total length; IPv6 payload length + 40, or
    /// where that length is 0 and a hop-by-hop header follows, as many bytes as there are (`skb->len`, since Linux 6.3).
    Length,
    /// IPv4 type of service or IPv6 traffic class: the six bits of DSCP, then the two of ECN.
    Tos,
    /// Time to live or hop limit.
    Ttl,
    /// How many bytes of the packet can be read from the start of the transport header on; the link's padding doesn't
    /// count. 0 for later fragments' absent headers is *not* implied: netfilter reads whatever is there.
    L4Len,
    /// Bytes 0 and 1 of the transport header: the source port of TCP, UDP, UDP-Lite, SCTP and DCCP.
    SrcPort,
    /// Bytes 2 and 3 of the transport header: the destination port.
    DstPort,
    /// Byte 13 of the transport header: TCP's flags, CWR the highest bit, FIN the lowest.
    TcpFlags,
    /// TCP's data offset: the high four bits of byte 12 of the transport header, in units of 4 bytes.
    TcpDataOffset,
    /// Byte 0 of the transport header: ICMP or ICMPv6 type.
    IcmpType,
    /// Byte 1 of the transport header: ICMP or ICMPv6 code.
    IcmpCode,
    /// `len` bytes (1 to 4) at `offset` of the transport header, where no other field names them (an ESP SPI, a DCCP
    /// packet type).
    L4Bytes {
        /// Offset of the first byte from the start of the transport header.
        offset: u8,
        /// How many bytes.
        len: u8,
    },
    /// The packet's mark (`skb->mark`).
    Mark,
    /// Connection state as bits of xt_conntrack (include/uapi/linux/netfilter/xt_conntrack.h): INVALID 0x01,
    /// ESTABLISHED 0x02, RELATED 0x04, NEW 0x08, SNAT 0x40, DNAT 0x80, UNTRACKED 0x100. Given with the packet.
    CtState,
    /// Connection status bits, `enum ip_conntrack_status` of include/uapi/linux/netfilter/nf_conntrack_common.h.
    CtStatus,
    /// 0 for a packet in its connection's original direction, 1 for a reply.
    CtDirection,
    /// The connection's mark.
    CtMark,
    /// Whether the kernel's table has no connection for the packet (1), as a program learns by asking
    /// (`bpf_xdp_ct_lookup`), or has one or doesn't tell (0): it looks up whole packets of TCP and UDP. Never tested by a
    /// rule; passes use it at places that are [`crate::env::Connections::LookedUp`].
    CtAbsent,
    /// A value that takes more than one load to compute; see `DerivedData` for its meaning and width.
    Derived(Derived),
}

impl Field {
    /// Width in bits. Derived values have 32.
    pub const fn bits(self, family: Family) -> u8 {
        match self {
            Field::Fragment | Field::CtDirection | Field::CtAbsent => 1,
            Field::ExtHeaders => 2,
            Field::PacketType => 3,
            Field::TcpDataOffset => 4,
            Field::ExtHeaderMask => 10,
            Field::Proto | Field::Tos | Field::Ttl | Field::TcpFlags | Field::IcmpType | Field::IcmpCode => 8,
            Field::FragOffset => 13,
            Field::SrcPort | Field::DstPort | Field::CtState | Field::L4Len => 16,
            Field::Length => 17,
            Field::Mark | Field::CtMark | Field::CtStatus | Field::Derived(_) => 32,
            Field::L4Bytes { len, .. } => len * 8,
            Field::SrcMac | Field::DstMac => 48,
            Field::SrcAddr | Field::DstAddr => family.address_bits(),
            Field::InDevice | Field::OutDevice => 128,
        }
    }

    /// The address field of an end.
    pub const fn address(end: End) -> Field {
        match end {
            End::Src => Field::SrcAddr,
            End::Dst => Field::DstAddr,
        }
    }

    /// The port field of an end.
    pub const fn port(end: End) -> Field {
        match end {
            End::Src => Field::SrcPort,
            End::Dst => Field::DstPort,
        }
    }

    /// Whether reassembling fragments can change the value, or bring it into being: the transport header's fields,
    /// the lengths, and what IPv6's later fragments hide.
    pub const fn changes_with_reassembly(self, family: Family) -> bool {
        match self {
            Field::Length
            | Field::FragOffset
            | Field::L4Len
            | Field::SrcPort
            | Field::DstPort
            | Field::TcpFlags
            | Field::TcpDataOffset
            | Field::IcmpType
            | Field::IcmpCode
            | Field::L4Bytes { .. }
            | Field::ExtHeaderMask
            | Field::ExtHeaders => true,
            Field::Proto => matches!(family, Family::V6),
            _ => false,
        }
    }
}

/// [`Field::ExtHeaderMask`]: a header is cut short.
pub const EXT_HEADERS_CUT: u16 = 0x100;
/// [`Field::ExtHeaderMask`]: there are more headers than are followed.
pub const EXT_HEADERS_BEYOND: u16 = 0x200;

/// Prints as the text form of the levels writes it: `dst_port`, `l4[4..8]`, `derived2`.
impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Field::Fragment => "fragment",
            Field::InDevice => "in_device",
            Field::OutDevice => "out_device",
            Field::SrcMac => "src_mac",
            Field::DstMac => "dst_mac",
            Field::PacketType => "packet_type",
            Field::SrcAddr => "src",
            Field::DstAddr => "dst",
            Field::Proto => "proto",
            Field::FragOffset => "frag_offset",
            Field::ExtHeaders => "ext_headers",
            Field::ExtHeaderMask => "ext_header_mask",
            Field::Length => "length",
            Field::Tos => "tos",
            Field::Ttl => "ttl",
            Field::L4Len => "l4_len",
            Field::SrcPort => "src_port",
            Field::DstPort => "dst_port",
            Field::TcpFlags => "tcp_flags",
            Field::TcpDataOffset => "tcp_data_offset",
            Field::IcmpType => "icmp_type",
            Field::IcmpCode => "icmp_code",
            Field::L4Bytes { offset, len } => {
                return write!(f, "l4[{offset}..{}]", u32::from(offset) + u32::from(len));
            }
            Field::Mark => "mark",
            Field::CtState => "ct_state",
            Field::CtStatus => "ct_status",
            Field::CtDirection => "ct_direction",
            Field::CtMark => "ct_mark",
            Field::CtAbsent => "ct_absent",
            Field::Derived(derived) => return write!(f, "{derived}"),
        };
        f.write_str(name)
    }
}

/// A device name: up to 15 bytes, padded with NUL to `IFNAMSIZ` (include/uapi/linux/if.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct DeviceName([u8; 16]);

impl DeviceName {
    /// The name as 16 bytes; `None` if it is empty, longer than 15 bytes, or holds NUL.
    pub fn new(name: &str) -> Option<DeviceName> {
        let name = of_text(name);
        if name.is_empty() || name.len() > 15 || name.contains(&0) {
            return None;
        }
        let mut bytes = [0; 16];
        bytes[..name.len()].copy_from_slice(&name);
        Some(DeviceName(bytes))
    }

    /// The value of [`Field::InDevice`] for this device.
    pub fn value(self) -> u128 {
        u128::from_be_bytes(self.0)
    }

    /// The name that a value of [`Field::InDevice`] stands for.
    pub fn from_value(value: u128) -> DeviceName {
        DeviceName(value.to_be_bytes())
    }

    /// The mask under which names that start like this one (`eth+`) are equal: all ones over the name's bytes.
    pub fn prefix_mask(len: usize) -> u128 {
        if len == 0 { 0 } else { u128::MAX << (128 - 8 * len.min(16)) }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.0.iter().position(|&byte| byte == 0).unwrap_or(16);
        f.write_str(&String::from_utf8_lossy(&self.0[..len]))
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}
