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
const LINK_HEADER_BYTES: usize = 16;
const ROUTE_HEADER_BYTES: usize = 12;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_XDP_MODE_IDS: [u16; 3] = [5, IFLA_XDP_SKB_PROG_ID, 7];
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const RTA_DST: u16 = 1;
const RT_TABLE_LOCAL: u8 = 255;
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
    /// What kind of device it is, where the kernel says: `bridge`, `bond`, `veth`.
    pub kind: Option<String>,
    /// Its hardware address.
    pub address: Vec<u8>,
    /// Numbers of the XDP programs on it.
    pub xdp: Vec<u32>,
    /// Whether one of them runs without the driver's help.
    pub xdp_is_generic: bool,
}

/// The addresses that the kernel takes as its own, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Local addresses, ascending.
    pub local: Vec<Interval>,
    /// Broadcast addresses, ascending.
    pub broadcast: Vec<Interval>,
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
    devices.iter().find(|device| device.name == name).ok_or_else(|| Error::NoDevice(name.to_string()))
}

/// The host's own addresses, as its local routing table has them: that is what decides between INPUT and FORWARD. Other
/// tables may call addresses local for packets of some marks only. Some addresses are what they are whatever the table
/// says (net/ipv4/fib_frontend.c, `__inet_dev_addr_type`; net/ipv6/addrconf_core.c, `__ipv6_addr_type`).
pub fn addresses(sys: &Sys, family: Family) -> Result<Addresses, Error> {
    let mut body = vec![0; ROUTE_HEADER_BYTES];
    body[0] = match family {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    };
    let request = NetlinkRequest { kind: RTM_GETROUTE, flags: NetlinkRequest::DUMP, body };
    let answers = match sys.netlink(&request) {
        // A kernel without IPv6 has no such addresses.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Vec::new(),
        answers => answers.map_err(Error::call("list the host's addresses"))?,
    };
    let mut found = Addresses::default();
    for answer in answers.iter().filter(|answer| answer.kind == RTM_NEWROUTE) {
        let Some((kind, interval)) = route(&answer.body, family) else { continue };
        match kind {
            RTN_LOCAL => found.local.push(interval),
            RTN_BROADCAST => found.broadcast.push(interval),
            _ => {}
        }
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
    for (kind, value) in attributes(body.get(LINK_HEADER_BYTES..)?) {
        match kind {
            IFLA_ADDRESS => device.address = value.to_vec(),
            IFLA_IFNAME => device.name = text(value),
            IFLA_MTU => device.mtu = u32_at(value, 0)?,
            IFLA_MASTER => device.master = u32_at(value, 0),
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
    Some(device)
}

/// Type of a route of the local table, and the addresses it is about.
fn route(body: &[u8], family: Family) -> Option<(u8, Interval)> {
    let (length, table, kind) = (*body.get(1)?, *body.get(4)?, *body.get(7)?);
    if table != RT_TABLE_LOCAL {
        return None;
    }
    let bits = family.address_bits();
    let destination = attributes(body.get(ROUTE_HEADER_BYTES..)?).find(|(kind, _)| *kind == RTA_DST);
    let first = match destination.map(|(_, value)| value) {
        Some(value) => value.iter().take(usize::from(bits / 8)).fold(0, |sum, &b| sum << 8 | u128::from(b)),
        None => 0,
    };
    let host_bits = u32::from(bits.checked_sub(length)?);
    let span = 1u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1);
    Some((kind, Interval::new(first & !span, first | span)?))
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
        assert!(matches!(find(&devices, "no such device"), Err(Error::NoDevice(_))));
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
