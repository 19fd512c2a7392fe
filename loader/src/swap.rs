//! Applying, taking back and repairing: every change of a slot, in an order that a crash can't spoil.
//!
//! A change is made in seven steps: lock; repair; load and test the new program; pin it and write its files; write down
//! what is about to happen; swap; tidy. Only the swap changes what packets meet, and it is one call of the kernel's. Up
//! to it a crash leaves the old policy, after it the new one, and what else is left over is for [`repair`], which every
//! change begins with: it asks the kernel which generation is attached and removes the others.
//!
//! Counters are not copied between maps, which would race with the programs: a new generation remembers what its
//! predecessors counted for the same rules ([`crate::carry`]).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::object::Object;
use polc_ir::env::{Attach, Mode};

use crate::attach::{self, How};
use crate::carry;
use crate::coexist::{self, Order};
use crate::dispatch;
use crate::error::Error;
use crate::load::{Loaded, load};
use crate::net;
use crate::state::{Confirm, Generation, Intent, STATE_VERSION, Slot, SlotName, SlotState, Store, Via};
use crate::sys::{LinkKind, Map, Sys, TestRun};

/// Name of a generation's object among its files.
pub const OBJECT_FILE: &str = "object.o";

/// A policy to be applied.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Where.
    pub slot: &'a SlotName,
    /// The object.
    pub object: &'a Object,
    /// What it was compiled from, for people.
    pub source: &'a str,
    /// Files to be kept with it, by name.
    pub files: &'a [(&'a str, &'a [u8])],
    /// Contents of maps that the object leaves empty.
    pub contents: &'a [Contents],
    /// Test runs of the loaded program that have to come out as said before it is attached.
    pub checks: &'a [Check],
    /// XDP in generic mode.
    pub generic: bool,
    /// The `clsact` qdisc even where the kernel has tcx.
    pub clsact: bool,
    /// Where among others' tcx programs.
    pub order: Order,
    /// Where among a netfilter hook's functions.
    pub hook_order: dispatch::Order,
    /// Go back after this time unless confirmed.
    pub confirm: Option<Duration>,
    /// Packets and bytes that rules start with, by the manifest's `counted`, if nothing was applied before.
    pub initial: &'a [(u64, u64)],
}

/// Elements of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// The map's name.
    pub map: String,
    /// Keys and values.
    pub elements: Vec<crate::tables::Element>,
}

/// A test run and what it has to return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The packet, for people.
    pub text: String,
    /// The frame.
    pub frame: Vec<u8>,
    /// The context's bytes.
    pub context: Vec<u8>,
    /// The return value.
    pub returns: i32,
}

/// What applying did.
#[derive(Debug)]
pub struct Applied {
    /// The new generation.
    pub generation: u32,
    /// Its program's number in the kernel.
    pub program_id: u32,
    /// The generation it replaced.
    pub replaced: Option<u32>,
    /// How it is attached.
    pub via: Via,
    /// When the change goes back unless confirmed.
    pub confirm: Option<Confirm>,
    /// What could not be tidied up; the next polc will.
    pub untidy: Option<Error>,
    /// When packets began to meet it.
    pub attached: Instant,
    /// Time that the kernel's attaching call took.
    pub attach_time: Duration,
}

/// Applies a policy. `watch` is called before a change that has to be confirmed: what it starts takes the change back
/// if this process doesn't live to.
///
/// # Errors
/// Nothing was changed.
pub fn apply(
    sys: &Sys,
    store: &Store,
    request: &Request<'_>,
    watch: &mut dyn FnMut(&Confirm) -> Result<(), Error>,
) -> Result<Applied, Error> {
    if !sys.is_root() {
        return Err(Error::NotRoot);
    }
    store.prepare(sys)?;
    let slot = store.slot(request.slot);
    let _lock = slot.lock(sys, false)?;
    let applied = change(sys, store, &slot, request, watch);
    if applied.is_err() {
        // What is attached tells what is left over. If even that fails, the next polc has another try.
        if repair(sys, &slot).is_ok_and(|left| left.is_none()) {
            let _ = slot.remove(sys);
            store.tidy(sys);
        }
    }
    applied
}

fn change(
    sys: &Sys,
    store: &Store,
    slot: &Slot,
    request: &Request<'_>,
    watch: &mut dyn FnMut(&Confirm) -> Result<(), Error>,
) -> Result<Applied, Error> {
    let device = device(sys, request)?;
    let (mut state, from) = match repair(sys, slot)? {
        Some(Repaired { state, unconfirmed: Some(_), .. }) => {
            return Err(Error::Unconfirmed(state.slot.to_string()));
        }
        Some(Repaired { state, current, .. }) => {
            if request.slot.device.is_some() && state.ifindex != device.ifindex {
                return Err(Error::OtherDevice {
                    place: state.slot.to_string(),
                    applied: state.ifindex,
                    named: device.ifindex,
                });
            }
            keeps_place(&state, request)?;
            (state, Some(current))
        }
        None => (fresh(sys, store, slot, &device, request)?, None),
    };
    let present = slot.generations_present(sys)?;
    let to = present.iter().chain(state.generations.keys()).max().map_or(1, |last| last + 1);
    install(sys, slot, &mut state, from, to, request, watch)?;
    let began = Instant::now();
    match from {
        Some(from) => attach::swap(sys, slot, &state, to, from)?,
        None => {
            let program = attach::program(sys, slot, to)?;
            let how = How { device: &device, generic: request.generic, order: request.order };
            attach::first(sys, slot, &state, to, program.as_fd(), how)?;
        }
    }
    let attached = Instant::now();
    let confirm = state.intent.as_ref().and_then(|intent| intent.confirm.clone());
    let (program_id, via) = (state.generations[&to].program_id, state.via);
    // The change is made; from here on nothing fails it.
    let untidy = settle(sys, slot, &mut state, to, from, Some(&request.object.manifest))
        .and_then(|()| prune(sys, slot, &mut state, to))
        .err();
    let attach_time = attached - began;
    Ok(Applied { generation: to, program_id, replaced: from, via, confirm, untidy, attached, attach_time })
}

/// Refuses to change where among a hook's functions an applied policy is: that takes a new link, and until the old one is
/// gone packets would meet both.
fn keeps_place(state: &SlotState, request: &Request<'_>) -> Result<(), Error> {
    let Via::Dispatch { priority, defrag } = state.via else { return Ok(()) };
    let wanted = request.hook_order;
    // In accelerate mode it has to stay ahead of the kernel's own rules, which may have got an earlier table.
    let accelerates = request.object.manifest.mode == Some(Mode::Accelerate);
    let stays = match wanted.priority {
        Some(wanted) => wanted == priority,
        None => !accelerates || priority < wanted.before,
    };
    if wanted.defrag == defrag && stays {
        return Ok(());
    }
    Err(Error::OtherPlace { place: state.slot.to_string(), priority, defrag })
}

fn device(sys: &Sys, request: &Request<'_>) -> Result<net::Device, Error> {
    let Some(name) = &request.slot.device else { return Ok(net::Device::default()) };
    let devices = net::devices(sys)?;
    let device = net::find(&devices, name)?;
    coexist::refuse_lower(device, &devices)?;
    Ok(device.clone())
}

/// The state of a slot where nothing is attached.
fn fresh(
    sys: &Sys,
    store: &Store,
    slot: &Slot,
    device: &net::Device,
    request: &Request<'_>,
) -> Result<SlotState, Error> {
    let via = attach::choose(sys, slot.name.attach, request.clsact)?;
    // A policy for the other family may share a list of programs, not the one place of XDP.
    let mut own = BTreeSet::new();
    if slot.name.attach != Attach::Xdp {
        for (_, state) in store.slots(sys)? {
            own.extend(state.generations.values().map(|generation| generation.program_id));
        }
    }
    attach::check_occupants(sys, slot, via, device, request.order, &own)?;
    let via = match via {
        Via::Clsact { .. } => attach::clsact_place(sys, device, slot.name.attach == Attach::TcEgress)?,
        Via::Dispatch { .. } => dispatch::choose(sys, slot, request.hook_order)?,
        via @ Via::Link => via,
    };
    Ok(SlotState {
        version: STATE_VERSION,
        slot: slot.name.clone(),
        ifindex: device.ifindex,
        via,
        generations: Default::default(),
        intent: None,
    })
}

/// Loads, tests and pins generation `to`, writes its files, and writes down what is about to happen.
fn install(
    sys: &Sys,
    slot: &Slot,
    state: &mut SlotState,
    from: Option<u32>,
    to: u32,
    request: &Request<'_>,
    watch: &mut dyn FnMut(&Confirm) -> Result<(), Error>,
) -> Result<(), Error> {
    let loaded = load(sys, request.object)?;
    fill(sys, &loaded, request.contents)?;
    check(sys, &loaded, request.checks)?;
    if let Some(counters) = loaded.map(COUNTERS_MAP).filter(|_| !request.checks.is_empty()) {
        crate::tables::clear_array(sys, counters)?;
    }
    let program = loaded.program().ok_or_else(|| Error::NoProgram("the object has no program".into()))?;
    let info = sys.prog_info(&program.fd).map_err(Error::call("ask about the loaded program"))?;

    let pins = slot.generation_pins(to);
    sys.make_dirs(&pins).map_err(Error::disk(&pins))?;
    for (name, map) in loaded.named_maps() {
        let path = slot.map(to, name);
        sys.obj_pin(map, &path).map_err(Error::disk(&path))?;
    }
    let path = slot.program(to);
    sys.obj_pin(&program.fd, &path).map_err(Error::disk(&path))?;

    let folder = slot.generation_files(to);
    sys.make_dirs(&folder).map_err(Error::disk(&folder))?;
    let object = request.object.write().map_err(|error| Error::NoProgram(error.to_string()))?;
    let files = [&[(OBJECT_FILE, object.as_slice())], request.files].concat();
    sys.write_new(&folder, &files).map_err(Error::disk(&folder))?;

    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let generation = Generation {
        program_id: info.id,
        applied: now,
        mode: request.object.manifest.mode,
        source: request.source.to_string(),
        carried: if from.is_none() { request.initial.to_vec() } else { Vec::new() },
        settled: from.is_none(),
    };
    state.generations.insert(to, generation);
    let confirm = match request.confirm {
        Some(time) => {
            let uptime = sys.uptime_ms().map_err(Error::call("read the clock"))?;
            let token = format!("{}-{to}-{uptime}", std::process::id());
            Some(Confirm { deadline_ms: uptime.saturating_add(time.as_millis() as u64), token })
        }
        None => None,
    };
    state.intent = Some(Intent { from, to: Some(to), confirm: confirm.clone() });
    slot.write(sys, state)?;
    confirm.map_or(Ok(()), |confirm| watch(&confirm))
}

fn fill(sys: &Sys, loaded: &Loaded, contents: &[Contents]) -> Result<(), Error> {
    for contents in contents {
        let Some(map) = loaded.map(&contents.map) else {
            return Err(Error::NoProgram(format!("the object has no map `{}`", contents.map)));
        };
        crate::tables::fill(sys, map, &contents.elements)?;
    }
    Ok(())
}

/// Runs the loaded program on test packets.
///
/// # Errors
/// [`Error::TestRun`] for the first that does not come out as said.
pub fn check(sys: &Sys, loaded: &Loaded, checks: &[Check]) -> Result<(), Error> {
    let Some(program) = loaded.program() else { return Ok(()) };
    for check in checks {
        let run = TestRun { frame: &check.frame, context: &check.context, repeat: 1 };
        let result = match sys.test_run(&program.fd, &run) {
            // A frame that the kernel makes no packet of for this kind of program.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
            result => result.map_err(Error::call("run the loaded program"))?,
        };
        if result.return_value as i32 != check.returns {
            return Err(Error::TestRun {
                packet: check.text.clone(),
                kernel: result.return_value as i32,
                vm: check.returns,
            });
        }
    }
    Ok(())
}

/// A slot after its repair.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// Its state.
    pub state: SlotState,
    /// The generation attached.
    pub current: u32,
    /// What has to be confirmed, if anything.
    pub unconfirmed: Option<Confirm>,
}

/// Makes a slot whole again, whatever happened before: finds the generation attached, takes an overdue change back,
/// and removes everything else. `None`: nothing is attached, and nothing is left over. The slot has to be locked.
pub fn repair(sys: &Sys, slot: &Slot) -> Result<Option<Repaired>, Error> {
    let Some(mut state) = read_or_rebuild(sys, slot)? else {
        // Pins and files of a change that was never written down.
        for generation in slot.generations_present(sys)? {
            slot.remove_generation(sys, generation)?;
        }
        return Ok(None);
    };
    let mut current = attached(sys, slot, &state)?;
    let mut unconfirmed = None;
    if let Some(Intent { from, to, confirm: Some(confirm) }) = state.intent.clone()
        && current.is_some()
        && current == to
    {
        if sys.uptime_ms().map_err(Error::call("read the clock"))? < confirm.deadline_ms {
            unconfirmed = Some(confirm);
        } else {
            go_back(sys, slot, &mut state, from, to)?;
            current = attached(sys, slot, &state)?;
        }
    }
    let Some(current) = current else {
        // Links of devices that are gone, filters whose device is.
        attach::detach(sys, slot, &state)?;
        slot.remove_all_but_lock(sys)?;
        return Ok(None);
    };
    if unconfirmed.is_none() {
        let from = state.intent.as_ref().and_then(|intent| intent.from);
        if !state.generations[&current].settled {
            settle(sys, slot, &mut state, current, from, None)?;
        }
        prune(sys, slot, &mut state, current)?;
    }
    Ok(Some(Repaired { state, current, unconfirmed }))
}

/// The generation attached.
fn attached(sys: &Sys, slot: &Slot, state: &SlotState) -> Result<Option<u32>, Error> {
    let Some(id) = attach::current(sys, slot, state)? else { return Ok(None) };
    let found = state.generations.iter().find(|(_, generation)| generation.program_id == id);
    match found {
        Some((number, _)) => Ok(Some(*number)),
        None => Err(Error::Replaced(slot.name.to_string())),
    }
}

/// The state, or what the pins tell if it was lost.
fn read_or_rebuild(sys: &Sys, slot: &Slot) -> Result<Option<SlotState>, Error> {
    if let Some(state) = slot.read(sys)? {
        return Ok(Some(state));
    }
    let Some(link) = attach::open_pin(sys, &slot.link())? else { return Ok(None) };
    let info = sys.link_info(&link).map_err(Error::call("ask about the pinned link"))?;
    let via = match info.kind {
        LinkKind::Netfilter { priority, defrag, .. } => Via::Dispatch { priority, defrag },
        LinkKind::Xdp { .. } | LinkKind::Tcx { .. } | LinkKind::Other(_) => Via::Link,
    };
    let mut state = SlotState {
        version: STATE_VERSION,
        slot: slot.name.clone(),
        ifindex: 0,
        via,
        generations: Default::default(),
        intent: None,
    };
    for number in slot.generations_present(sys)? {
        let Some(program) = attach::open_pin(sys, &slot.program(number))? else { continue };
        let info = sys.prog_info(&program).map_err(Error::call("ask about a pinned program"))?;
        let generation = Generation {
            program_id: info.id,
            applied: 0,
            mode: None,
            source: "unknown: the state was lost".to_string(),
            carried: Vec::new(),
            settled: true,
        };
        state.generations.insert(number, generation);
    }
    Ok(Some(state))
}

/// Takes a change back: generation `from` in place of `to`, or nothing.
fn go_back(
    sys: &Sys,
    slot: &Slot,
    state: &mut SlotState,
    from: Option<u32>,
    to: Option<u32>,
) -> Result<(), Error> {
    match (from, to) {
        (Some(from), Some(to)) => {
            attach::swap(sys, slot, state, from, to)?;
            // What the new rules counted meanwhile is not lost on the old ones.
            if let Ok(counted) = carry::own(sys, slot, to)
                && let Ok(manifest) = carry::manifest(sys, slot, from)
                && let Some(generation) = state.generations.get_mut(&from)
            {
                carry::add(&mut generation.carried, &manifest, &counted);
            }
            Ok(())
        }
        _ => attach::detach(sys, slot, state),
    }
}

/// Makes the counters of generation `to` go on where those of `from` ended. `manifest` is that of `to`, if it is known.
fn settle(
    sys: &Sys,
    slot: &Slot,
    state: &mut SlotState,
    to: u32,
    from: Option<u32>,
    manifest: Option<&Manifest>,
) -> Result<(), Error> {
    if let Some(from) = from.filter(|_| !state.generations[&to].settled) {
        // The old program may still be deciding a packet.
        sys.wait_for_runs().map_err(Error::call("wait for the old program to end"))?;
        let before = state.generations.get(&from).map(|generation| generation.carried.clone());
        // Counters of a generation whose files were lost are lost with it; that must not keep the new one from settling.
        let counted = carry::totals(sys, slot, from, &before.unwrap_or_default());
        let manifest = match manifest {
            Some(manifest) => Ok(Cow::Borrowed(manifest)),
            None => carry::manifest(sys, slot, to).map(Cow::Owned),
        };
        if let (Ok(counted), Ok(manifest), Some(generation)) =
            (counted, manifest, state.generations.get_mut(&to))
        {
            generation.carried = Vec::new();
            carry::add(&mut generation.carried, &manifest, &counted);
        }
    }
    if let Some(generation) = state.generations.get_mut(&to) {
        generation.settled = true;
    }
    if state.intent.as_ref().is_some_and(|intent| intent.confirm.is_none()) {
        state.intent = None;
    }
    slot.write(sys, state)
}

/// Removes every generation but `current`, unless a change waits for its confirmation.
fn prune(sys: &Sys, slot: &Slot, state: &mut SlotState, current: u32) -> Result<(), Error> {
    let waits =
        state.intent.as_ref().is_some_and(|intent| intent.confirm.is_some() && intent.to == Some(current));
    if waits {
        return Ok(());
    }
    if state.intent.is_some() || state.generations.len() > 1 {
        state.intent = None;
        state.generations.retain(|number, _| *number == current);
        slot.write(sys, state)?;
    }
    for number in slot.generations_present(sys)? {
        if number != current {
            slot.remove_generation(sys, number)?;
        }
    }
    Ok(())
}

/// Takes a slot's policy away: what is attached, its pins and its files. Whether there was one.
///
/// # Errors
/// What could not be removed; the rest may be gone.
pub fn flush(sys: &Sys, store: &Store, name: &SlotName) -> Result<bool, Error> {
    if !sys.is_root() {
        return Err(Error::NotRoot);
    }
    let slot = store.slot(name);
    let _lock = slot.lock(sys, false)?;
    let state = match slot.read(sys) {
        // What can't be read can't be confirmed either; what the pins hold is enough to take it away.
        Err(Error::Corrupt { .. }) => {
            slot.remove_state(sys)?;
            read_or_rebuild(sys, &slot)?
        }
        _ => read_or_rebuild(sys, &slot)?,
    };
    let had = state.is_some();
    if let Some(mut state) = state {
        // Another's program is not ours to detach.
        attached(sys, &slot, &state)?;
        state.intent =
            Some(Intent { from: state.generations.keys().next_back().copied(), to: None, confirm: None });
        slot.write(sys, &state)?;
        attach::detach(sys, &slot, &state)?;
    }
    slot.remove(sys)?;
    store.tidy(sys);
    Ok(had)
}

/// Confirms what a slot waits for. Whether it waited.
///
/// # Errors
/// [`Error::NotApplied`] if nothing is applied (any more).
pub fn confirm(sys: &Sys, store: &Store, name: &SlotName) -> Result<bool, Error> {
    if !sys.is_root() {
        return Err(Error::NotRoot);
    }
    let slot = store.slot(name);
    let _lock = slot.lock(sys, true)?;
    match repair(sys, &slot)? {
        Some(Repaired { mut state, current, unconfirmed: Some(_) }) => {
            state.intent = None;
            slot.write(sys, &state)?;
            prune(sys, &slot, &mut state, current)?;
            Ok(true)
        }
        Some(_) => Ok(false),
        None => {
            slot.remove(sys)?;
            store.tidy(sys);
            Err(Error::NotApplied(name.to_string()))
        }
    }
}

/// What a watchdog holds, so that it can take a change back whatever happens to files and pins.
#[derive(Debug)]
pub struct Held {
    slot: Slot,
    store: Store,
    link: Option<std::os::fd::OwnedFd>,
    /// At a netfilter hook, the map that says which program it goes on with.
    place: Option<Map>,
    old: Option<std::os::fd::OwnedFd>,
}

impl Held {
    /// Opens what taking the slot's change back needs. The change has been written down, and not been made yet.
    pub fn new(sys: &Sys, store: &Store, name: &SlotName) -> Result<Held, Error> {
        let slot = store.slot(name);
        let from = slot.read(sys)?.and_then(|state| state.intent).and_then(|intent| intent.from);
        let old = from.map(|from| attach::program(sys, &slot, from)).transpose()?;
        let link = attach::open_pin(sys, &slot.link())?;
        let place = attach::place(sys, &slot)?;
        Ok(Held { slot, store: store.clone(), link, place, old })
    }

    /// Whether the change still waits for its confirmation. What can't be read does.
    pub fn waits(&self, sys: &Sys, token: &str) -> bool {
        match self.slot.read(sys) {
            Ok(Some(state)) => is_of(&state, token),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// Takes the change back if it has not been confirmed.
    pub fn go_back(&self, sys: &Sys, token: &str) -> Result<(), Error> {
        let _lock = self.slot.lock(sys, true)?;
        let repaired = match self.slot.read(sys) {
            Ok(Some(state)) if is_of(&state, token) => repair(sys, &self.slot),
            Ok(_) => return Ok(()),
            Err(error) => Err(error),
        };
        match repaired {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                self.slot.remove(sys)?;
                self.store.tidy(sys);
                Ok(())
            }
            // The files are of no use; the link and the old program are.
            Err(error) => {
                let pinned = attach::open_pin(sys, &self.slot.link())?;
                if let (Some(place), Some(old)) = (&self.place, &self.old) {
                    return dispatch::put(sys, place, old).map_err(Error::call("go back to the old program"));
                }
                match (self.link.as_ref().or(pinned.as_ref()), &self.old) {
                    (Some(link), Some(old)) => {
                        sys.link_update(link, old, None).map_err(Error::call("go back to the old program"))
                    }
                    (Some(link), None) => {
                        sys.link_detach(link).map_err(Error::call("detach the new program"))
                    }
                    (None, _) => Err(error),
                }
            }
        }
    }
}

fn is_of(state: &SlotState, token: &str) -> bool {
    let confirm = state.intent.as_ref().and_then(|intent| intent.confirm.as_ref());
    confirm.is_some_and(|confirm| confirm.token == token)
}
