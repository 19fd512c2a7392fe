//! Elements of a set that a program looks up, as text: from the patterns that its table holds.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use polc_ir::field::DeviceName;
use polc_ir::hook::Family;
use polc_ir::set::Pattern;

use super::SetAst;
use super::kind::Dimension;
use crate::value::Ip;

/// The `add` line that gives an element of the set this pattern; reading and printing it makes it canonical. `None` for
/// all but one of several patterns that are one element: a port of a `bitmap:port` counts for several protocols.
pub fn add_line(set: &SetAst, pattern: &Pattern) -> Option<String> {
    let family = set.family.unwrap_or(Family::V4);
    let mut line = format!("add {} ", set.name);
    for (at, dimension) in set.kind.dimensions.iter().enumerate() {
        if at > 0 {
            line.push(',');
        }
        let (value, length) = (pattern.values[at], pattern.lengths[at]);
        _ = match dimension {
            Dimension::Host | Dimension::SingleHost => write!(line, "{}", Ip(address(value, family))),
            Dimension::Net if length == family.address_bits() => {
                write!(line, "{}", Ip(address(value, family)))
            }
            Dimension::Net => write!(line, "{}/{length}", Ip(address(value, family))),
            Dimension::Port => match value >> 16 {
                proto @ (1 | 58) => write!(line, "{proto}:{}/{}", value >> 8 & 0xff, value & 0xff),
                proto => write!(line, "{proto}:{}", value & 0xffff),
            },
            Dimension::TcpUdpPort if value >> 16 != 6 => return None,
            Dimension::TcpUdpPort => write!(line, "{}", value & 0xffff),
            Dimension::Mac => {
                let bytes = (value as u64).to_be_bytes();
                let bytes: Vec<String> = bytes[2..].iter().map(|byte| format!("{byte:02x}")).collect();
                write!(line, "{}", bytes.join(":"))
            }
            Dimension::Mark => write!(line, "{value:#x}"),
            Dimension::Device => write!(line, "{}", DeviceName::from_value(value)),
            // A list has no table of its own.
            Dimension::Set => return None,
        };
    }
    if pattern.nomatch {
        line.push_str(" nomatch");
    }
    line.push('\n');
    Some(line)
}

fn address(value: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(value as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(value).into(),
    }
}
