//! Elements of sets, by type.

use polc_ir::field::DeviceName;
use polc_ir::hook::Family;
use polc_ir::interval::{Interval, max_value};
use polc_ir::set::{DimensionKind, DimensionValue};

use super::SetAst;
use crate::names;
use crate::value::{Mac, address, number};

/// Reads an element. A wildcard device makes it one without that dimension's restriction, so several values may come
/// of one text; each covers what one look-up covers.
pub(super) fn parse(set: &SetAst, text: &str, wildcard: bool) -> Result<Vec<Vec<DimensionValue>>, String> {
    let parts: Vec<&str> = text.split(',').collect();
    let optional = set.kind == "bitmap:ip,mac";
    if parts.len() != set.dimensions.len() && !(optional && parts.len() == 1) {
        return Err(format!("`{text}` has {} parts; {} has {}", parts.len(), set.kind, set.dimensions.len()));
    }
    if wildcard {
        return Err("device prefixes (`wildcard`) are not read".into());
    }
    let mut values = Vec::new();
    for (part, dimension) in parts.iter().zip(&set.dimensions) {
        values.push(match dimension {
            DimensionKind::Address => DimensionValue::Address(addresses(set, part)?),
            DimensionKind::Port => port(set, part)?,
            DimensionKind::Device => {
                let name = part
                    .strip_prefix("physdev:")
                    .map_or(Ok(*part), |_| Err(format!("`{part}`: ports of a bridge are not read")))?;
                let name = DeviceName::new(name).ok_or_else(|| format!("`{name}` is no device name"))?;
                DimensionValue::Device(name)
            }
            DimensionKind::Mac => {
                let mac = Mac::parse(part).ok_or_else(|| format!("`{part}` is not a MAC address"))?;
                DimensionValue::Mac(mac.0.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
            }
            DimensionKind::Mark => {
                let value =
                    number(part, 0, u32::MAX.into()).ok_or_else(|| format!("`{part}` is not a mark"))?;
                DimensionValue::Mark { mask: set.markmask, value: value as u32 & set.markmask }
            }
        });
    }
    if optional && parts.len() == 1 {
        return Err(format!("`{text}`: an element whose MAC address is still to be learnt is not read"));
    }
    Ok(vec![values])
}

/// `address`, `address/length` or `first-last`.
fn addresses(set: &SetAst, text: &str) -> Result<Interval, String> {
    let family = set.family.unwrap_or(Family::V4);
    let bits = family.address_bits();
    let one = |text: &str| {
        address(text, family)
            .map(crate::lower::header::bits)
            .ok_or_else(|| format!("`{text}` is not an {family} address"))
    };
    let network = |address: u128, length: u8| {
        let host = if length == bits { 0 } else { max_value(bits - length) };
        Interval::new(address & !host, address | host).ok_or_else(|| format!("`{text}` holds no address"))
    };
    if let Some((address, length)) = text.split_once('/') {
        let length =
            number(length, 0, bits.into()).ok_or_else(|| format!("`{length}` is not a prefix length"))?;
        return network(one(address)?, length as u8);
    }
    if let Some((first, last)) = text.split_once('-') {
        let range = Interval::new(one(first)?, one(last)?);
        return range.ok_or_else(|| format!("`{text}` ends below its start"));
    }
    network(one(text)?, set.netmask.unwrap_or(bits).min(bits))
}

/// `[protocol:]port[-port]`, or for ICMP `type/code`. TCP if no protocol is named; a bitmap has none.
fn port(set: &SetAst, text: &str) -> Result<DimensionValue, String> {
    let (proto, ports) = match text.split_once(':') {
        Some((proto, ports)) => {
            let number = names::protocol(proto).filter(|&number| number < 256);
            (number.ok_or_else(|| format!("`{proto}` is no protocol"))? as u8, ports)
        }
        None => (6, text),
    };
    let name = names::protocol_name(proto.into());
    let bad = || format!("`{ports}` is not a port or a range of ports");
    let one = |text: &str| crate::value::port(text, name).map(u128::from).ok_or_else(bad);
    let ports = if matches!(proto, 1 | 58) {
        let icmp = match ports.split_once('/') {
            Some((kind, code)) => {
                Option::zip(number(kind, 0, 255), number(code, 0, 255)).map(|(kind, code)| kind << 8 | code)
            }
            None => {
                let table = if proto == 1 { names::icmp::ICMP } else { names::icmp::ICMPV6 };
                names::icmp::parse(ports, table)
                    .ok()
                    .map(|icmp| u64::from(icmp.kind) << 8 | u64::from(icmp.code_first))
            }
        };
        Interval::point(icmp.ok_or_else(|| format!("`{ports}` is not an ICMP type/code"))?.into())
    } else {
        match ports.split_once('-') {
            Some((first, last)) if one(ports).is_err() => {
                Interval::new(one(first)?, one(last)?).ok_or_else(bad)?
            }
            _ => Interval::point(one(ports)?),
        }
    };
    Ok(DimensionValue::Port { proto: (set.kind != "bitmap:port").then_some(proto), ports })
}
