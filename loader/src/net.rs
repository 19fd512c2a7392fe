//! What the host's network looks like to a program: devices, what runs on them, and the host's own addresses.
//!
//! Asked over rtnetlink(7), not through /sys: a /sys that was mounted in another network namespace shows the devices of
//! that one. Attribute numbers are those of include/uapi/linux/if_link.h and rtnetlink.h.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use polc_ir::hook::Family;
use polc_ir::interval::Interval;

use crate::error::Error;
use crate::sys::{NetlinkRequest, Sys};

const RTM_GETLINK: u16 = 18;
const RTM_NEWLINK: u16 = 16;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETRULE: u16 = 34;
const RTM_NEWRULE: u16 = 32;
const LINK_HEADER_BYTES: usize = 16;
const ROUTE_HEADER_BYTES: usize = 12;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_XDP_MODE_IDS: [u16; 3] = [5, IFLA_XDP_SKB_PROG_ID, 7];
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const RULE_HEADER_BYTES: usize = 12;
const RTA_DST: u16 = 1;
const RTA_TABLE: u16 = 15;
const FRA_TABLE: u16 = 15;
const RT_TABLE_LOCAL: u32 = 255;
const RTN_LOCAL: u8 = 2;
const RTN_BROADCAST: u8 = 3;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Attributes carry two flags in their type (include/uapi/linux/netlink.h, `NLA_TYPE_MASK`).
const NLA_TYPE_MASK: u16 = 0x3fff;

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// The device it is part of.
    pub master: Option<u32>,
    /// The device of this namespace that it is on.
    pub lower: Option<u32>,
    /// What kind of device it is, where the kernel says: `bridge`, `bond`, `veth`.
    pub kind: Option<String>,
    /// Its hardware address.
    pub address: Vec<u8>,
    /// Numbers of the XDP programs on it.
    pub xdp: Vec<u32>,
    /// Whether one of them runs without the driver's help.
    pub xdp_is_generic: bool,
    /// Packets that it has received (`rx_packets`). With an XDP program on it, a veth counts those that it has dealt
    /// with, whatever became of them (drivers/net/veth.c, `veth_xdp_rcv`).
    pub received: u64,
}

/// The addresses that the kernel takes as its own, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Local addresses, ascending.
    pub local: Vec<Interval>,
    /// Broadcast addresses, ascending.
    pub broadcast: Vec<Interval>,
    /// Addresses that another table calls local, with its number, where routing rules (`ip rule`) lead to that table.
    pub by_policy: Option<(Interval, u32)>,
}

/// All devices of the network namespace, by ascending number.
pub fn devices(sys: &Sys) -> Result<Vec<Device>, Error> {
    let request =
        NetlinkRequest { kind: RTM_GETLINK, flags: NetlinkRequest::DUMP, body: vec![0; LINK_HEADER_BYTES] };
    let answers = sys.netlink(&request).map_err(Error::call("list the devices"))?;
    let mut devices: Vec<Device> = answers
        .iter()
        .filter(|answer| answer.kind == RTM_NEWLINK)
        .filter_map(|answer| device(&answer.body))
        .collect();
    devices.sort_by_key(|device| device.ifindex);
    Ok(devices)
}

/// The device of that name.
///
/// # Errors
/// [`Error::NoDevice`].
pub fn find<'d>(devices: &'d [Device], name: &str) -> Result<&'d Device, Error> {
    devices.iter().find(|device| device.name == name).ok_or_else(|| Error::NoDevice {
        name: name.to_string(),
        there: devices.iter().map(|device| device.name.clone()).collect(),
    })
}

/// The name of the device of that number, if there is one.
pub fn name(devices: &[Device], ifindex: u32) -> Option<&str> {
    devices.iter().find(|device| device.ifindex == ifindex).map(|device| device.name.as_str())
}

/// The host's own addresses, as its local routing table has them: that is what decides between INPUT and FORWARD unless
/// routing rules lead some packets to other tables that call more addresses local, as transparent proxies have it. Some addresses are what they are whatever the table
/// says (net/ipv4/fib_frontend.c, `__inet_dev_addr_type`; net/ipv6/addrconf_core.c, `__ipv6_addr_type`).
pub fn addresses(sys: &Sys, family: Family) -> Result<Addresses, Error> {
    let mut found = Addresses::default();
    let mut others = Vec::new();
    let routes = dump(sys, RTM_GETROUTE, ROUTE_HEADER_BYTES, family)
        .map_err(Error::call("list the host's addresses"))?;
    for body in routes.iter().filter(|(kind, _)| *kind == RTM_NEWROUTE).map(|(_, body)| body) {
        let Some((kind, table, interval)) = route(body, family) else { continue };
        match (kind, table) {
            (RTN_LOCAL, RT_TABLE_LOCAL) => found.local.push(interval),
            (RTN_BROADCAST, RT_TABLE_LOCAL) => found.broadcast.push(interval),
            (RTN_LOCAL, _) => others.push((interval, table)),
            _ => {}
        }
    }
    others.retain(|(other, _)| !found.local.iter().any(|local| local.intersect(*other) == Some(*other)));
    if !others.is_empty() {
        let rules = dump(sys, RTM_GETRULE, RULE_HEADER_BYTES, family)
            .map_err(Error::call("list the routing rules"))?;
        let tables: Vec<u32> = rules
            .iter()
            .filter(|(kind, _)| *kind == RTM_NEWRULE)
            .filter_map(|(_, body)| table(body, 4, FRA_TABLE))
            .collect();
        found.by_policy = others.into_iter().find(|(_, table)| tables.contains(table));
    }
    let unicast = match family {
        // Beside 0.0.0.0, multicast (224.0.0.0/4) and 255.255.255.255.
        Family::V4 => [Interval::new(1, 0xdfff_ffff), Interval::new(0xf000_0000, 0xffff_fffe)],
        // Below multicast (ff00::/8).
        Family::V6 => [Interval::new(0, (0xff << 120) - 1), None],
    };
    let part = |local: &Interval, range: Interval| {
        Interval::new(local.lo().max(range.lo()), local.hi().min(range.hi()))
    };
    let parts = found
        .local
        .iter()
        .flat_map(|local| unicast.into_iter().flatten().map(move |range| part(local, range)));
    found.local = parts.flatten().collect();
    for list in [&mut found.local, &mut found.broadcast] {
        list.sort_unstable();
        list.dedup();
    }
    Ok(found)
}

fn device(body: &[u8]) -> Option<Device> {
    let ifindex = u32_at(body, 4)?;
    let mut device = Device { ifindex, ..Device::default() };
    let mut in_other = false;
    for (kind, value) in attributes(body.get(LINK_HEADER_BYTES..)?) {
        match kind {
            IFLA_ADDRESS => device.address = value.to_vec(),
            IFLA_IFNAME => device.name = text(value),
            IFLA_MTU => device.mtu = u32_at(value, 0)?,
            IFLA_MASTER => device.master = u32_at(value, 0),
            IFLA_LINK => device.lower = u32_at(value, 0).filter(|lower| *lower != ifindex),
            IFLA_LINK_NETNSID => in_other = true,
            // include/uapi/linux/if_link.h, `struct rtnl_link_stats64`: received packets come first.
            IFLA_STATS64 => device.received = u64_at(value, 0)?,
            IFLA_LINKINFO => {
                device.kind =
                    attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND).map(|(_, v)| text(v));
            }
            IFLA_XDP => {
                // One number if one mode is in use, else one for each mode.
                let ids = attributes(value)
                    .filter(|(kind, _)| *kind == IFLA_XDP_PROG_ID || IFLA_XDP_MODE_IDS.contains(kind))
                    .filter_map(|(kind, value)| Some((kind, u32_at(value, 0).filter(|&id| id != 0)?)));
                for (kind, id) in ids {
                    device.xdp.push(id);
                    device.xdp_is_generic |= kind == IFLA_XDP_SKB_PROG_ID;
                }
                device.xdp.sort_unstable();
                device.xdp.dedup();
            }
            _ => {}
        }
    }
    // The number is one of another namespace's.
    device.lower = device.lower.filter(|_| !in_other);
    Some(device)
}

/// What the kernel has of a kind and family: types and bodies of its answers.
fn dump(sys: &Sys, kind: u16, header: usize, family: Family) -> io::Result<Vec<(u16, Vec<u8>)>> {
    let mut body = vec![0; header];
    body[0] = match family {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    };
    match sys.netlink(&NetlinkRequest { kind, flags: NetlinkRequest::DUMP, body }) {
        // A kernel without IPv6, or without routing rules, has none.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(Vec::new()),
        answers => Ok(answers?.into_iter().map(|answer| (answer.kind, answer.body)).collect()),
    }
}

/// The table of a route or routing rule: an attribute, or where there is none a byte of the header.
fn table(body: &[u8], at: usize, attribute: u16) -> Option<u32> {
    // Both headers are of the same length.
    let wide = attributes(body.get(ROUTE_HEADER_BYTES..)?).find(|(kind, _)| *kind == attribute);
    wide.map_or_else(|| body.get(at).map(|&table| table.into()), |(_, value)| u32_at(value, 0))
}

/// Type and table of a route, and the addresses it is about.
fn route(body: &[u8], family: Family) -> Option<(u8, u32, Interval)> {
    let (length, kind) = (*body.get(1)?, *body.get(7)?);
    let table = table(body, 4, RTA_TABLE)?;
    let bits = family.address_bits();
    let destination = attributes(body.get(ROUTE_HEADER_BYTES..)?).find(|(kind, _)| *kind == RTA_DST);
    let first = match destination.map(|(_, value)| value) {
        Some(value) => value.iter().take(usize::from(bits / 8)).fold(0, |sum, &b| sum << 8 | u128::from(b)),
        None => 0,
    };
    let host_bits = u32::from(bits.checked_sub(length)?);
    let span = 1u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1);
    Some((kind, table, Interval::new(first & !span, first | span)?))
}

/// The attributes in a message: type, without flags, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & NLA_TYPE_MASK, value))
    })
}

/// Adds an attribute to a message.
pub(crate) fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Text that may end in NUL.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// An address of a family by its number.
pub fn address(value: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(value as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(value).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_device_and_its_addresses_are_there() {
        let devices = devices(&Sys::new()).unwrap();
        assert_eq!(find(&devices, "lo").unwrap().ifindex, 1);
        assert!(matches!(find(&devices, "no such device"), Err(Error::NoDevice { .. })));
    }

    #[test]
    fn attributes_cut_short_end_the_list() {
        let mut body = Vec::new();
        put(&mut body, 7, b"abc");
        put(&mut body, 0x8009, &[1]);
        assert_eq!(attributes(&body).collect::<Vec<_>>(), [(7, &b"abc"[..]), (9, &[1][..])]);
        for cut in 0..body.len() {
            assert!(attributes(&body[..cut]).count() <= 1 || cut >= 13);
        }
        assert_eq!(attributes(&[0; 8]).count(), 0);
    }
}
