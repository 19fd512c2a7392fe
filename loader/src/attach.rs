//! A program onto its attach point, off it, and in place of another.
//!
//! Each way keeps one promise: at any moment, and after a crash at any moment, a packet meets the old program or the new
//! one. Links that can be updated are swapped by compare-and-swap; filters are replaced in place by the kernel; netfilter
//! links take no other program, so what they lead to is exchanged, at several hooks at once ([`crate::dispatch`]).

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use polc_ir::env::Attach;

use crate::clsact::{self, Qdisc};
use crate::coexist::{self, Order};
use crate::dispatch;
use crate::error::Error;
use crate::net::{self, Device};
use crate::probe::{Feature, missing};
use crate::state::{SlotState, Via};
use crate::store::{Slot, lock_qdiscs};
use crate::sys::{LinkKind, LinkSpec, Map, Sys};

/// The way to attach at a place of this kernel.
///
/// # Errors
/// [`Error::Kernel`] if there is none.
pub fn choose(sys: &Sys, attach: Attach, force_clsact: bool) -> Result<Via, Error> {
    match attach {
        Attach::Xdp => match missing(sys, &[Feature::XdpLink]) {
            missing if missing.is_empty() => Ok(Via::Link),
            missing => Err(Error::Kernel(missing)),
        },
        Attach::TcIngress | Attach::TcEgress => {
            let old = force_clsact || !missing(sys, &[Feature::Tcx]).is_empty();
            Ok(if old { Via::Clsact { priority: 0 } } else { Via::Link })
        }
        Attach::Netfilter => match missing(sys, &[Feature::NetfilterLink]) {
            missing if missing.is_empty() => Ok(Via::Dispatch { priority: 0, defrag: false }),
            missing => Err(Error::Kernel(missing)),
        },
    }
}

/// Number of the program that a slot's generations have attached, if any of them is.
pub fn current(sys: &Sys, slot: &Slot, state: &SlotState) -> Result<Option<u32>, Error> {
    let ask = || Error::call(format!("ask what is attached {}", slot.name));
    match state.via {
        Via::Link => match open_link(sys, slot)? {
            Some(link) => {
                let info = sys.link_info(&link).map_err(ask())?;
                Ok(is_attached(info.kind).then_some(info.program_id))
            }
            None => Ok(None),
        },
        Via::Dispatch { .. } => {
            let Some(link) = open_link(sys, slot)? else { return Ok(None) };
            let link = sys.link_info(&link).map_err(ask())?.id;
            if !dispatch::is_linked(sys, slot, link)? {
                return Ok(None);
            }
            match place(sys, slot)? {
                Some(place) => dispatch::current(sys, slot, &place),
                // It forgets its programs with its last pin, and the link stays.
                None => Err(Error::Pin { path: slot.dispatch(), why: LEADS_NOWHERE.to_string() }),
            }
        }
        Via::Clsact { priority } => {
            let filters = filters(sys, state.ifindex, is_egress(slot)).map_err(ask())?;
            let own = filters.iter().find(|filter| filter.priority == priority && filter.is_polcs());
            // A first filter that could not be added, because another got the priority, was never there.
            let is_added = |filter: &&clsact::Filter| {
                !is_first(state) || state.generation_of(filter.program_id).is_some()
            };
            Ok(own.filter(is_added).map(|filter| filter.program_id))
        }
    }
}

/// What packets meet at a hook whose map of programs was lost ([`dispatch`]).
const LEADS_NOWHERE: &str = "it is not there, so the hook's link leads to no program: every packet is dropped, or left to the kernel's own rules if a policy in accelerate mode was the first";

/// Where the filter with one of these programs is, at the side of whichever device: the device's number and the filter's
/// priority.
pub(crate) fn filter(
    sys: &Sys,
    slot: &Slot,
    is_one: impl Fn(u32) -> bool,
) -> Result<Option<(u32, u16)>, Error> {
    if !matches!(slot.name.attach, Attach::TcIngress | Attach::TcEgress) {
        return Ok(None);
    }
    for device in net::devices(sys)? {
        let filters = filters(sys, device.ifindex, is_egress(slot));
        let filters = filters.map_err(Error::call(format!("list the filters of `{}`", device.name)))?;
        let found = filters.iter().find(|filter| filter.is_polcs() && is_one(filter.program_id));
        if let Some(filter) = found {
            return Ok(Some((device.ifindex, filter.priority)));
        }
    }
    Ok(None)
}

/// Whether a slot's first program was about to be attached, or has to be confirmed.
fn is_first(state: &SlotState) -> bool {
    state.intent.as_ref().is_some_and(|intent| intent.from.is_none() && intent.to.is_some())
}

fn is_egress(slot: &Slot) -> bool {
    slot.name.attach == Attach::TcEgress
}

/// The filters of one side of a device; none if it is gone.
fn filters(sys: &Sys, ifindex: u32, egress: bool) -> io::Result<Vec<clsact::Filter>> {
    match clsact::filters(sys, ifindex, egress) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        filters => filters,
    }
}

/// Whether a link's device is still there.
fn is_attached(kind: LinkKind) -> bool {
    match kind {
        LinkKind::Xdp { ifindex } | LinkKind::Tcx { ifindex, .. } => ifindex != 0,
        LinkKind::Netfilter { .. } | LinkKind::Other(_) => true,
    }
}

/// What is pinned at a path, if anything is.
///
/// # Errors
/// [`Error::Disk`] if it can't be opened.
pub(crate) fn open_pin(sys: &Sys, path: &std::path::Path) -> Result<Option<OwnedFd>, Error> {
    match sys.obj_get(path) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::disk(path)(error)),
    }
}

/// A slot's link, if it is pinned.
///
/// # Errors
/// [`Error::Pin`] if what is pinned in its place is something else.
pub(crate) fn open_link(sys: &Sys, slot: &Slot) -> Result<Option<OwnedFd>, Error> {
    let path = slot.link();
    let Some(link) = open_pin(sys, &path)? else { return Ok(None) };
    match sys.is_link(&link) {
        Ok(true) => Ok(Some(link)),
        Ok(false) => Err(Error::Pin { path, why: "it is no link".to_string() }),
        Err(source) => Err(Error::Call { what: format!("ask what `{}` is", path.display()), source }),
    }
}

/// How a first program is attached.
#[derive(Clone, Copy, Debug)]
pub struct How<'d> {
    /// The device.
    pub device: &'d Device,
    /// XDP in generic mode.
    pub generic: bool,
    /// Where among tcx programs.
    pub order: Order,
}

/// Attaches a program where none of polc's is. For a filter, qdiscs are locked.
pub fn first(
    sys: &Sys,
    slot: &Slot,
    state: &SlotState,
    generation: u32,
    program: BorrowedFd<'_>,
    how: How<'_>,
) -> Result<(), Error> {
    let device = how.device;
    let fail = |source: io::Error| refused(slot, device, how.generic, source);
    match (state.via, slot.name.attach) {
        (Via::Link, attach) => {
            let spec = match attach {
                Attach::Xdp => LinkSpec::Xdp { ifindex: device.ifindex, generic: how.generic },
                _ => LinkSpec::Tcx {
                    ifindex: device.ifindex,
                    egress: attach == Attach::TcEgress,
                    first: how.order == Order::First,
                },
            };
            // The pin of a link whose device is gone is in the way.
            let pin = slot.link();
            sys.remove_file(&pin).map_err(Error::disk(&pin))?;
            let link = sys.link_create(program, &spec).map_err(fail)?;
            // Unpinned it would go with this process, and so it does if pinning fails.
            sys.obj_pin(&link, &pin).map_err(Error::disk(&pin))
        }
        (Via::Clsact { priority }, _) => {
            let name = clsact::filter_name(ensure_qdisc(sys, slot, device)?);
            let added =
                clsact::set_filter(sys, device.ifindex, is_egress(slot), priority, program, name, false);
            added.map_err(fail)
        }
        (Via::Dispatch { .. }, _) => {
            at_hooks(sys, &[AtHook { slot, state, from: None, to: Some(generation) }])
        }
    }
}

/// Gives a device a qdisc for filters if it has none; whether a polc made the one that it has, which is marked then. Where
/// that polc keeps its files elsewhere, its filters tell. Qdiscs are locked.
fn ensure_qdisc(sys: &Sys, slot: &Slot, device: &Device) -> Result<bool, Error> {
    let (name, ifindex) = (&device.name, device.ifindex);
    let mark = slot.qdisc_mark(ifindex);
    let is_marked = sys.is_there(&mark).map_err(Error::disk(&mark))?;
    let ask = Error::call(format!("list the qdiscs of `{name}`"));
    if clsact::qdisc(sys, ifindex).map_err(ask)?.is_none() {
        // That it is polc's is said first: nobody else removes it.
        sys.make_dirs(&mark).map_err(Error::disk(&mark))?;
        match clsact::add_qdisc(sys, ifindex) {
            // Somebody else came first.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                sys.remove_dir(&mark).map_err(Error::disk(&mark))?;
                return Ok(false);
            }
            added => added.map_err(Error::call(format!("add a clsact qdisc to `{name}`")))?,
        }
        return Ok(true);
    }
    let mut there = Vec::new();
    for egress in [false, true] {
        let ask = Error::call(format!("list the filters of `{name}`"));
        there.extend(filters(sys, ifindex, egress).map_err(ask)?);
    }
    let (made, not_made) = (
        there.iter().any(clsact::Filter::tells_made),
        there.iter().any(|filter| filter.is_polcs() && !filter.tells_made()),
    );
    // A polc that was killed before it added its filter left a mark and no filter.
    let made = made || is_marked && !not_made;
    let marked = if made { sys.make_dirs(&mark) } else { sys.remove_dir(&mark) };
    marked.map_err(Error::disk(&mark))?;
    Ok(made)
}

/// The name that a slot's filter has on its device.
pub(crate) fn filter_name(sys: &Sys, slot: &Slot, ifindex: u32) -> Result<&'static str, Error> {
    let mark = slot.qdisc_mark(ifindex);
    Ok(clsact::filter_name(sys.is_there(&mark).map_err(Error::disk(&mark))?))
}

/// A change of what packets meet at a netfilter hook.
#[derive(Clone, Copy, Debug)]
pub struct AtHook<'a> {
    /// The hook's slot.
    pub slot: &'a Slot,
    /// Its state.
    pub state: &'a SlotState,
    /// The generation that is attached; none if nothing is.
    pub from: Option<u32>,
    /// The one to be attached; none to let every packet on.
    pub to: Option<u32>,
}

/// Makes changes at hooks of one family, all of them at once.
///
/// # Errors
/// [`Error::Replaced`] if another program is at one of them by now, or the call that failed. None was made.
pub fn at_hooks(sys: &Sys, changes: &[AtHook<'_>]) -> Result<(), Error> {
    let mut new = Vec::new();
    for change in changes {
        let AtHook { slot, state, from, to } = *change;
        match (from, to) {
            (None, Some(to)) => dispatch::attach(sys, slot, state.generations[&to].mode, state.via)?,
            _ => {
                let not_applied = || Error::NotApplied(slot.name.to_string());
                let places = place(sys, slot)?.ok_or_else(not_applied)?;
                let by = dispatch::current(sys, slot, &places)?.ok_or_else(not_applied)?;
                if state.generation_of(by) != from {
                    return Err(Error::Replaced { place: slot.name.to_string(), by });
                }
            }
        }
        new.push((slot, to.map(|to| program(sys, slot, to)).transpose()?));
    }
    dispatch::exchange(sys, &new)
}

/// The map of the programs that a hook goes on with, if it is there.
pub(crate) fn place(sys: &Sys, slot: &Slot) -> Result<Option<Map>, Error> {
    let pin = slot.dispatch();
    let wrong = |error: io::Error| Error::Pin { path: pin.clone(), why: format!("is no map: {error}") };
    open_pin(sys, &pin)?.map(|fd| sys.map(fd).map_err(wrong)).transpose()
}

/// Puts the program of generation `to` in place of that of generation `from`, which is attached.
///
/// # Errors
/// [`Error::Replaced`] if another program is there by now.
pub fn swap(sys: &Sys, slot: &Slot, state: &SlotState, to: u32, from: u32) -> Result<(), Error> {
    let new = program(sys, slot, to)?;
    match state.via {
        Via::Link => {
            let old = program(sys, slot, from)?;
            let link = open_link(sys, slot)?.ok_or_else(|| Error::NotApplied(slot.name.to_string()))?;
            let updated = sys.link_update(&link, &new, Some(old.as_fd()));
            updated.map_err(|source| match source.raw_os_error() {
                Some(libc::EPERM | libc::ENOENT) => {
                    let by = sys.link_info(&link).map_or(0, |info| info.program_id);
                    Error::Replaced { place: slot.name.to_string(), by }
                }
                Some(libc::ENOLINK | libc::ENODEV) => {
                    Error::DeviceGone(slot.name.device.clone().unwrap_or_default())
                }
                _ => Error::Call { what: format!("replace the program {}", slot.name), source },
            })
        }
        Via::Dispatch { .. } => at_hooks(sys, &[AtHook { slot, state, from: Some(from), to: Some(to) }]),
        Via::Clsact { priority } => {
            let name = filter_name(sys, slot, state.ifindex)?;
            clsact::set_filter(sys, state.ifindex, is_egress(slot), priority, &new, name, true)
                .map_err(Error::call(format!("replace the program {}", slot.name)))
        }
    }
}

/// Detaches what the slot has attached. Nothing happens if nothing is.
pub fn detach(sys: &Sys, slot: &Slot, state: &SlotState) -> Result<(), Error> {
    let fail = || Error::call(format!("detach the program {}", slot.name));
    match state.via {
        Via::Link | Via::Dispatch { .. } => {
            let pin = slot.link();
            if let Some(link) = open_link(sys, slot)? {
                match sys.link_detach(&link) {
                    // The device is gone already.
                    Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                    result => result.map_err(fail())?,
                }
            }
            // The map that a link leads to goes after it.
            for pin in [pin, slot.dispatch()] {
                sys.remove_file(&pin).map_err(Error::disk(&pin))?;
            }
            Ok(())
        }
        Via::Clsact { priority } => remove_filter(sys, slot, state, priority),
    }
}

/// Takes a slot's filter away, and with the last of polc's the qdisc, if polc made it and nobody else has a filter on
/// it.
fn remove_filter(sys: &Sys, slot: &Slot, state: &SlotState, priority: u16) -> Result<(), Error> {
    let fail = || Error::call(format!("detach the program {}", slot.name));
    let _lock = lock_qdiscs(sys)?;
    let ifindex = state.ifindex;
    let attached = current(sys, slot, state)?.is_some();
    let mut others = Vec::new();
    for egress in [false, true] {
        let own = |filter: &clsact::Filter| {
            attached && egress == is_egress(slot) && filter.priority == priority && filter.is_polcs()
        };
        others
            .extend(filters(sys, ifindex, egress).map_err(fail())?.into_iter().filter(|filter| !own(filter)));
    }
    let mark = slot.qdisc_mark(ifindex);
    let made = sys.is_there(&mark).map_err(Error::disk(&mark))?;
    // Where polc's filter is gone without polc, so is the qdisc that it was on, and one that is there is another's; but
    // for a first filter that polc did not come to add.
    let removed = if made && others.is_empty() && (attached || is_first(state)) {
        // With the filter, at once.
        clsact::remove_qdisc(sys, ifindex)
    } else if attached {
        clsact::remove_filter(sys, ifindex, is_egress(slot), priority)
    } else {
        Ok(())
    };
    match removed {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {}
        removed => removed.map_err(fail())?,
    }
    // Filters of a polc that keeps its files elsewhere have a mark there.
    let own = slot.programs_beside(sys)?;
    if !others.iter().any(|filter| filter.is_polcs() && own.contains(&filter.program_id)) {
        sys.remove_dir(&mark).map_err(Error::disk(&mark))?;
    }
    Ok(())
}

/// The priority for a filter of polc's that no other filter has, nor one of those that are about to be added beside it.
/// Qdiscs have to be locked for it to stay so.
pub fn clsact_place(sys: &Sys, device: &Device, egress: bool, beside: &[u16]) -> Result<u16, Error> {
    let ask = || Error::call(format!("list the filters of `{}`", device.name));
    let taken = match clsact::qdisc(sys, device.ifindex).map_err(ask())? {
        None => Vec::new(),
        Some(Qdisc { has_egress: false, .. }) if egress => {
            return Err(Error::IngressQdisc(device.name.clone()));
        }
        Some(Qdisc { blocks, .. }) => {
            if let Some(block) = blocks[usize::from(egress)] {
                return Err(Error::SharedBlock { device: device.name.clone(), block });
            }
            clsact::filters(sys, device.ifindex, egress).map_err(ask())?
        }
    };
    let is_free = |priority: &u16| {
        taken.iter().all(|filter| filter.priority != *priority) && !beside.contains(priority)
    };
    Ok((1..u16::MAX).find(is_free).unwrap_or(u16::MAX))
}

fn refused(slot: &Slot, device: &Device, generic: bool, source: io::Error) -> Error {
    let xdp = slot.name.attach == Attach::Xdp;
    match source.raw_os_error() {
        Some(libc::ENODEV) => Error::DeviceGone(device.name.clone()),
        Some(libc::EBUSY | libc::EEXIST) => Error::Occupied {
            place: format!("{} of `{}`", slot.name.attach, device.name),
            by: vec!["another program".to_string()],
            may_chain: !xdp,
        },
        // veth says ERANGE (drivers/net/veth.c, `veth_xdp_set`), most others EINVAL or EOPNOTSUPP.
        Some(libc::ERANGE) if xdp => {
            Error::MtuTooLarge { device: device.name.clone(), mtu: device.mtu, source }
        }
        Some(libc::EINVAL) if xdp && !generic && device.mtu > ETHERNET_MTU => {
            Error::MtuTooLarge { device: device.name.clone(), mtu: device.mtu, source }
        }
        Some(libc::EINVAL | libc::EOPNOTSUPP) if xdp && !generic => {
            Error::NoNativeXdp { device: device.name.clone(), source }
        }
        _ => Error::Call { what: format!("attach the program {}", slot.name), source },
    }
}

/// The MTU that every driver with XDP takes.
const ETHERNET_MTU: u32 = 1_500;

/// Refuses an attach point that others have, unless the user chose an order.
pub fn check_occupants(
    sys: &Sys,
    slot: &Slot,
    via: Via,
    device: &Device,
    order: Order,
    own: &std::collections::BTreeSet<u32>,
) -> Result<(), Error> {
    let (by, may_chain) = match (slot.name.attach, via) {
        (Attach::Xdp, _) => (coexist::xdp(sys, device, own), false),
        (Attach::TcIngress | Attach::TcEgress, Via::Link) => {
            let by = coexist::tcx(sys, device, slot.name.attach == Attach::TcEgress, own)?;
            (if order == Order::Alone { by } else { Vec::new() }, true)
        }
        // Filters form a list by priority; none is ever displaced.
        (Attach::TcIngress | Attach::TcEgress, _) => (Vec::new(), true),
        // Functions of a hook form a list; `dispatch::choose` finds a place in it.
        (Attach::Netfilter, _) => (Vec::new(), true),
    };
    if by.is_empty() {
        return Ok(());
    }
    Err(Error::Occupied { place: format!("{} of `{}`", slot.name.attach, device.name), by, may_chain })
}

/// A program, by its pin.
pub(crate) fn program(sys: &Sys, slot: &Slot, generation: u32) -> Result<OwnedFd, Error> {
    let path = slot.program(generation);
    open_pin(sys, &path)?.ok_or_else(|| Error::Pin { path, why: "it is not there".to_string() })
}
