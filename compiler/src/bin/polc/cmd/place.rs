//! From options to a place and its devices: what compile, verify, simulate, explain and dump share.

use polc::guard;
use polc::place::{default_path, devices_of, place, refusal, whole_way};
use polc::select::Devices;
use polc::session::Session;
use polc_ir::env::{Attach, Device, Place};
use polc_ir::field::DeviceName;

use crate::cli::{DeviceArgs, InputArgs, PlaceArgs};
use crate::failure::Failure;

/// The place that options describe at an attach point.
///
/// # Errors
/// What does not go together.
pub(super) fn of(attach: Attach, place_args: &PlaceArgs, input: &InputArgs) -> Result<Place, Failure> {
    let path = place_args.path().unwrap_or_else(|| default_path(attach));
    if let Some(why) = refusal(&path, Some(attach), false) {
        return Err(Failure::Usage(why));
    }
    let connections = place_args.connections(attach)?;
    let counters = place_args.counters.into();
    Ok(Place { connections, counters, ..place(&path, attach, place_args.mode(), !input.local.is_empty()) })
}

/// A place with the hooks that packets pass before those that are named, where that matters.
pub(super) fn whole(session: &Session, place: Place) -> Place {
    let Some(attach) = place.attach else { return place };
    Place { path: whole_way(&session.ruleset, &place.path, attach), ..place }
}

/// The place of a program as `compile` makes it; the rules get what it puts in front of them.
pub(super) fn as_compiled(session: &mut Session, place: Place) -> Place {
    let place = whole(session, place);
    guard::leave_rewritten(&mut session.ruleset, &place);
    place
}

/// The devices that options declare.
pub(super) fn declared(args: &DeviceArgs) -> Result<Devices, Failure> {
    let mut declared = Vec::new();
    for (name, ifindex) in &args.device {
        declared.push(Device { ifindex: *ifindex, name: device_name(name)? });
    }
    declared.sort_by_key(|device| (device.ifindex, device.name));
    declared.dedup();
    if let Some(pair) = declared.windows(2).find(|pair| pair[0].ifindex == pair[1].ifindex) {
        return Err(Failure::Usage(format!(
            "device number {} is given to both `{}` and `{}`",
            pair[0].ifindex, pair[0].name, pair[1].name
        )));
    }
    Ok(Devices {
        declared,
        fixed_in: args.in_interface.as_deref().map(device_name).transpose()?,
        fixed_out: args.out_interface.as_deref().map(device_name).transpose()?,
    })
}

/// The devices that options declare and, beside them, one with a made-up number for every name that rules mention: for
/// commands whose packets never meet a kernel.
pub(super) fn all(session: &Session, args: &DeviceArgs) -> Result<Devices, Failure> {
    let mut devices = declared(args)?;
    let mut names: Vec<DeviceName> = devices_of(&session.ruleset).iter().map(|device| device.name).collect();
    names.extend(devices.fixed_in);
    names.extend(devices.fixed_out);
    let mut number = 1;
    for name in names {
        if devices.declared.iter().any(|device| device.name == name) {
            continue;
        }
        while devices.declared.iter().any(|device| device.ifindex == number) {
            number += 1;
        }
        devices.declared.push(Device { ifindex: number, name });
    }
    devices.declared.sort_by_key(|device| device.ifindex);
    Ok(devices)
}

/// A device name as an option gives it.
pub(super) fn device_name(name: &str) -> Result<DeviceName, Failure> {
    DeviceName::new(name)
        .ok_or_else(|| Failure::Usage(format!("`{name}` is not a device name: it has 1 to 15 bytes")))
}

/// `xdp, prerouting and input`.
pub(super) fn describe(place: &Place) -> String {
    let hooks: Vec<String> = place.path.iter().map(ToString::to_string).collect();
    let attach = place.attach.map_or_else(|| "no attach point".to_string(), |attach| attach.to_string());
    format!("{attach} for {}", hooks.join(", "))
}
