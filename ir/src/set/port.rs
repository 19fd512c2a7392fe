//! What sets take for a packet's port (net/netfilter/ipset/ip_set_getport.c), and which packets have none, so that they
//! are in no set with ports: those whose transport header is cut short, and later fragments.

use crate::field::{End, Field};
use crate::hook::Family;
use crate::packet::extension::kind;

/// What a set compares with its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The port.
    Port,
    /// ICMP's type and code, as `type << 8 | code`.
    TypeAndCode,
    /// 0: the protocol has no ports.
    Zero,
}

/// How sets read the port of a protocol's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortReading {
    /// What is compared.
    pub compared: Compared,
    /// Bytes that there have to be from the transport header on, or the packet has no port.
    pub header_bytes: u16,
    /// Later fragments have a port, too.
    pub of_later_fragments: bool,
}

/// Protocols whose header has to be there: number, bytes, what is compared.
pub const WITH_HEADER: [(u8, u16, Compared); 6] = [
    (17, 8, Compared::Port),
    (136, 8, Compared::Port),
    (1, 8, Compared::TypeAndCode),
    (58, 8, Compared::TypeAndCode),
    (6, 20, Compared::Port),
    (132, 12, Compared::Port),
];

/// Where ICMP has in place of a port, in both directions.
pub const TYPE_AND_CODE: Field = Field::L4Bytes { offset: 0, len: 2 };

impl PortReading {
    /// How the port is read of packets of a protocol; `None` if they have none.
    pub fn of(family: Family, proto: u8) -> Option<PortReading> {
        let with_header = WITH_HEADER.iter().find(|(number, ..)| *number == proto);
        if let Some(&(_, header_bytes, compared)) = with_header {
            return Some(PortReading { compared, header_bytes, of_later_fragments: false });
        }
        // `ipv6_skip_exthdr` finds no header behind "no next header", and IPv6's later fragments are all refused.
        let none = family == Family::V6 && proto == kind::NONE;
        let of_later_fragments = family == Family::V4;
        (!none).then_some(PortReading { compared: Compared::Zero, header_bytes: 0, of_later_fragments })
    }

    /// Whether a packet has a port.
    pub fn reads(self, l4_len: u128, frag_offset: u128) -> bool {
        l4_len >= self.header_bytes.into() && (self.of_later_fragments || frag_offset == 0)
    }
}

impl Compared {
    /// The field that is compared; `None` where it is 0.
    pub fn field(self, end: End) -> Option<Field> {
        match self {
            Compared::Port => Some(Field::port(end)),
            Compared::TypeAndCode => Some(TYPE_AND_CODE),
            Compared::Zero => None,
        }
    }
}

/// A packet's port as a number of 24 bits, `proto << 16 | port`; 0, which no element is, if it has none.
pub fn number(family: Family, end: End, value: &mut impl FnMut(Field) -> u128) -> u128 {
    let proto = value(Field::Proto);
    let reading = PortReading::of(family, proto as u8)
        .filter(|reading| reading.reads(value(Field::L4Len), value(Field::FragOffset)));
    reading.map_or(0, |reading| proto << 16 | reading.compared.field(end).map_or(0, value))
}
