//! Living beside others: what is attached where polc would go, by name.
//!
//! polc changes nothing that it did not make. At XDP a device has room for one program, so another's is a reason to
//! refuse; at tcx programs form a list, and the user may say at which end polc's goes. Filters on `clsact` and rules of
//! iptables or nft never conflict: they run beside polc's program.

use std::collections::BTreeSet;

use polc_ir::hook::{Family, Hook};

use crate::dispatch::{family_number, hook_number};
use crate::error::Error;
use crate::net::Device;
use crate::sys::{LinkKind, QueryPoint, Sys};

/// Kinds of devices that take packets from the device they are on by the packets' addresses.
const TAKERS: [&str; 4] = ["macvlan", "macvtap", "ipvlan", "ipvtap"];

/// Where polc's program goes if others are at the same attach point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Nowhere: it is applied only if it is alone.
    #[default]
    Alone,
    /// Before all others.
    First,
    /// After all others.
    Last,
}

/// Others' XDP programs on a device.
pub fn xdp(sys: &Sys, device: &Device, own: &BTreeSet<u32>) -> Vec<String> {
    device.xdp.iter().filter(|id| !own.contains(id)).map(|&id| name(sys, id)).collect()
}

/// Others' tcx programs on one side of a device.
pub fn tcx(sys: &Sys, device: &Device, egress: bool, own: &BTreeSet<u32>) -> Result<Vec<String>, Error> {
    let point = if egress { QueryPoint::TcxEgress } else { QueryPoint::TcxIngress };
    let attached = sys
        .prog_query(device.ifindex, point)
        .map_err(Error::call(format!("ask what is attached to `{}`", device.name)))?;
    Ok(attached.iter().filter(|(id, _)| !own.contains(id)).map(|&(id, _)| name(sys, id)).collect())
}

/// Programs linked to a netfilter hook at a priority, in whichever network namespace: links don't tell theirs.
pub fn netfilter(sys: &Sys, family: Family, hook: Hook, priority: i32) -> Vec<String> {
    let wanted = (family_number(family), hook_number(hook), priority);
    let mut found = Vec::new();
    let mut id = 0;
    while let Ok(Some(next)) = sys.link_next_id(id) {
        id = next;
        // A link that is gone by now is in nobody's way.
        let Ok(info) = sys.link_by_id(id).and_then(|link| sys.link_info(&link)) else { continue };
        if let LinkKind::Netfilter { family, hook, priority, .. } = info.kind
            && (family, hook, priority) == wanted
        {
            found.push(format!("{} by link {id}", name(sys, info.program_id)));
        }
    }
    found
}

/// The device that takes another's packets over before IP sees them: bridges, bonds, teams and VRFs those of their ports,
/// macvlans and ipvlans theirs from the device that they are on.
pub fn upper<'d>(device: &Device, devices: &'d [Device]) -> Option<&'d Device> {
    let takes = |upper: &&Device| {
        upper.lower == Some(device.ifindex)
            && upper.kind.as_deref().is_some_and(|kind| TAKERS.contains(&kind))
    };
    match device.master {
        Some(master) => devices.iter().find(|upper| upper.ifindex == master),
        None => devices.iter().find(takes),
    }
}

/// Refuses a device whose packets rules see as another's ([`upper`]). `mode` is not asked: it would be wrong in both.
pub fn refuse_lower(device: &Device, devices: &[Device]) -> Result<(), Error> {
    match upper(device, devices) {
        Some(upper) => Err(Error::LowerDevice {
            device: device.name.clone(),
            upper: upper.name.clone(),
            kind: upper.kind.clone().unwrap_or_else(|| "device".to_string()),
        }),
        None => Ok(()),
    }
}

fn name(sys: &Sys, id: u32) -> String {
    let name = sys.prog_by_id(id).and_then(|program| sys.prog_info(&program)).map(|info| info.name);
    match name {
        Ok(name) if !name.is_empty() => format!("program `{name}` (id {id})"),
        _ => format!("program {id}"),
    }
}
