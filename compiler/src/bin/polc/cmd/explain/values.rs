//! What a packet has, as the options of rules are written: `eth0`, `NEW`, `SYN,ACK`.

use std::net::{Ipv4Addr, Ipv6Addr};

use polc_frontend_iptables::names::protocol_name;
use polc_ir::env::ct_state;
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::Family;

/// States as `--ctstate` names them.
const STATES: [(u16, &str); 7] = [
    (ct_state::INVALID, "INVALID"),
    (ct_state::NEW, "NEW"),
    (ct_state::RELATED, "RELATED"),
    (ct_state::ESTABLISHED, "ESTABLISHED"),
    (ct_state::UNTRACKED, "UNTRACKED"),
    (ct_state::SNAT, "SNAT"),
    (ct_state::DNAT, "DNAT"),
];

/// Status bits as `--ctstatus` names them (include/uapi/linux/netfilter/nf_conntrack_common.h).
const STATUSES: [(u32, &str); 4] = [(1, "EXPECTED"), (2, "SEEN_REPLY"), (4, "ASSURED"), (8, "CONFIRMED")];

/// TCP's flags as `--tcp-flags` names them.
const TCP_FLAGS: [(u8, &str); 6] =
    [(0x02, "SYN"), (0x10, "ACK"), (0x01, "FIN"), (0x04, "RST"), (0x20, "URG"), (0x08, "PSH")];

/// Packet types as `--pkt-type` names them (include/uapi/linux/if_packet.h).
const PACKET_TYPES: [&str; 4] = ["unicast", "broadcast", "multicast", "one for another host"];

/// A value of a field, so that "the packet has" can stand before it.
pub(super) fn words(field: Field, family: Family, value: u128) -> String {
    match field {
        Field::SrcAddr | Field::DstAddr => match family {
            Family::V4 => Ipv4Addr::from(value as u32).to_string(),
            Family::V6 => Ipv6Addr::from(value).to_string(),
        },
        Field::InDevice | Field::OutDevice if value == 0 => "no such device".into(),
        Field::InDevice | Field::OutDevice => DeviceName::from_value(value).to_string(),
        Field::SrcMac | Field::DstMac => {
            let bytes = value.to_be_bytes();
            bytes[10..].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
        }
        Field::PacketType => match PACKET_TYPES.get(value as usize) {
            Some(name) => format!("the type of {name}"),
            None => format!("packet type {value}"),
        },
        Field::Proto => match protocol_name(value as u16) {
            Some(name) => name.to_string(),
            None => format!("protocol {value}"),
        },
        Field::FragOffset if value == 0 => "no data of a later fragment".into(),
        Field::FragOffset => format!("data of a later fragment, at byte {}", 8 * value),
        Field::L4Len => format!("{value} bytes of its transport header and data"),
        Field::ExtHeaders if value & 1 != 0 => "an extension header that can't be read".into(),
        Field::ExtHeaders => "extension headers in order".into(),
        Field::ExtHeaderMask => format!("extension headers {value:#x}"),
        Field::Length => format!("a length of {value}"),
        Field::IcmpType => format!("type {value}"),
        Field::IcmpCode => format!("code {value}"),
        Field::TcpFlags => named(&TCP_FLAGS.map(|(bit, name)| (bit.into(), name)), value),
        Field::TcpDataOffset => format!("a header of {} bytes", 4 * value),
        Field::CtState => named(&STATES.map(|(bit, name)| (bit.into(), name)), value),
        Field::CtStatus => named(&STATUSES.map(|(bit, name)| (bit.into(), name)), value),
        Field::CtDirection => if value == 0 { "ORIGINAL" } else { "REPLY" }.into(),
        Field::Mark | Field::CtMark | Field::Tos => format!("{value:#x}"),
        Field::Ttl | Field::SrcPort | Field::DstPort | Field::L4Bytes { .. } => value.to_string(),
        // What no rule asks for by itself.
        Field::Fragment | Field::CtAbsent | Field::Derived(_) => format!("another {field}"),
    }
}

/// The names of the bits that are set, and the rest as a number.
fn named(names: &[(u128, &str)], value: u128) -> String {
    let mut rest = value;
    let mut words: Vec<String> = Vec::new();
    for (bit, name) in names.iter().filter(|(bit, _)| value & bit != 0) {
        rest &= !bit;
        words.push((*name).to_string());
    }
    if rest != 0 {
        words.push(format!("{rest:#x}"));
    }
    if words.is_empty() { "NONE".into() } else { words.join(",") }
}
