//! Applying: changes of slots, in an order that a crash can't spoil.
//!
//! A change is made in seven steps: lock; repair; load and test the new program; pin it and write its files; write down
//! what is about to happen; swap; tidy. Only the swap changes what packets meet, and it is one call of the kernel's. Up
//! to it a crash leaves the old policy, after it the new one, and what else is left over is for [`repair`], which every
//! change begins with: it asks the kernel which generation is attached and removes the others. Changes of several slots
//! take each step for all of them before the next. Those at netfilter hooks of one family are made by one store, so there
//! the step is one, too; others are swapped one after the other, and if one fails, those made before it are taken back.
//!
//! Counters are not copied between maps, which would race with the programs: a new generation remembers what its
//! predecessors counted for the same rules ([`crate::carry`]).

use std::borrow::Cow;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_backend_ebpf::object::Object;
use polc_ir::at_once::both;
use polc_ir::env::{Attach, Mode};
use polc_ir::hook::Family;

use crate::attach::{self, AtHook, How};
use crate::coexist::{self, Order};
use crate::dispatch;
use crate::error::Error;
use crate::load::{Loaded, load};
use crate::net;
use crate::repair::{Repaired, attached, go_back, prune, repair, settle};
use crate::sets;
use crate::state::{Confirm, Generation, Intent, STATE_VERSION, SlotName, SlotState, Via};
use crate::store::{Lock, Locks, Slot, Store, lock_all, lock_qdiscs};
use crate::sys::{Sys, TestRun};
use crate::wish;

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
    /// Numbers of programs, of one of which it takes the place, its sets being what they were when that was applied; none
    /// if it takes that of any, or is the first.
    pub over: &'a [u32],
    /// Whether no policy may stand at other hooks of the family than those that are changed at once with it.
    pub alone: bool,
    /// Go back after this time unless confirmed.
    pub confirm: Option<Duration>,
    /// Packets and bytes that rules start with, by the manifest's `counted`; none for what they had before.
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
    /// Time that the kernel took to make the maps and to verify and translate the program.
    pub load_time: Duration,
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
    let mut watch = |_: &SlotName, confirm: &Confirm| watch(confirm);
    let mut applied = apply_all(sys, store, std::slice::from_ref(request), &mut watch)?;
    Ok(applied.pop().expect("one for each request"))
}

/// Applies several policies, to a slot each: all of them or none.
///
/// # Errors
/// Nothing was changed, unless it is [`Error::HalfDone`].
pub fn apply_all(
    sys: &Sys,
    store: &Store,
    requests: &[Request<'_>],
    watch: &mut dyn FnMut(&SlotName, &Confirm) -> Result<(), Error>,
) -> Result<Vec<Applied>, Error> {
    may_change(sys)?;
    store.prepare(sys)?;
    let slots: Vec<Slot> = requests.iter().map(|request| store.slot(request.slot)).collect();
    let locks = lock_all(sys, &slots, Duration::ZERO)?;
    let mut changes = Changes { slots, installed: Vec::new(), qdiscs: None, _locks: locks };
    match changes.make(sys, store, requests, watch) {
        Ok(()) => Ok(changes.end(sys, requests)),
        Err(error) => Err(changes.take_back(sys, store, error)),
    }
}

/// Refuses to go on without the capabilities that changes take.
pub fn may_change(sys: &Sys) -> Result<(), Error> {
    match sys.missing_capabilities() {
        missing if missing.is_empty() => Ok(()),
        missing => Err(Error::Capabilities(missing)),
    }
}

/// Changes of several slots, each as far as it has come.
struct Changes {
    slots: Vec<Slot>,
    installed: Vec<Change>,
    /// Held from when filters get their priorities until they are there.
    qdiscs: Option<Lock>,
    _locks: Locks,
}

/// A change that is written down.
struct Change {
    slot: Slot,
    state: SlotState,
    from: Option<u32>,
    to: u32,
    device: net::Device,
    /// How long the kernel took to load it.
    load_time: Duration,
    /// Whether packets meet it.
    made: bool,
    /// When packets began to meet it, and how long the call took.
    attached: (Instant, Duration),
}

impl Changes {
    fn make(
        &mut self,
        sys: &Sys,
        store: &Store,
        requests: &[Request<'_>],
        watch: &mut dyn FnMut(&SlotName, &Confirm) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut begun = Vec::new();
        for (request, slot) in requests.iter().zip(&self.slots) {
            begun.push(Change::begin(sys, store, slot, request)?);
        }
        let all: Vec<(SlotName, u32)> =
            begun.iter().map(|change| (change.slot.name.clone(), change.to)).collect();
        for slot in
            requests.iter().zip(&self.slots).filter(|(request, _)| request.alone).map(|(_, slot)| slot)
        {
            stands_alone(sys, slot, &all)?;
        }
        for (request, mut change) in requests.iter().zip(begun) {
            change.install(sys, request)?;
            self.installed.push(change);
        }
        self.place_filters(sys)?;
        for (request, change) in requests.iter().zip(&mut self.installed) {
            let with = all.iter().filter(|(name, _)| at_once(name, &change.slot.name)).cloned().collect();
            change.announce(sys, request, with, watch)?;
        }
        for (request, change) in requests.iter().zip(&self.installed) {
            if let Some(from) = change.from {
                let manifest = || Ok(Cow::Borrowed(&request.object.manifest));
                // A watcher for whom this fails says so; nothing else depends on it.
                let _ = wish::hand_on(sys, &change.slot, from, change.to, manifest);
            }
        }
        for (request, change) in requests.iter().zip(&mut self.installed) {
            if change.slot.name.attach != Attach::Netfilter {
                change.swap(sys, request)?;
            }
        }
        self.qdiscs = None;
        for family in [Family::V4, Family::V6] {
            self.swap_at_hooks(sys, family)?;
        }
        Ok(())
    }

    /// Gives first filters their priorities, which no other polc gives away until they are there.
    fn place_filters(&mut self, sys: &Sys) -> Result<(), Error> {
        let mut given: Vec<(u32, Attach, u16)> = Vec::new();
        let is_first =
            |change: &&mut Change| change.from.is_none() && matches!(change.state.via, Via::Clsact { .. });
        for Change { slot, state, device, .. } in self.installed.iter_mut().filter(is_first) {
            if self.qdiscs.is_none() {
                self.qdiscs = Some(lock_qdiscs(sys)?);
            }
            let (ifindex, attach) = (device.ifindex, slot.name.attach);
            let beside = given.iter().filter(|(other, at, _)| (*other, *at) == (ifindex, attach));
            let beside: Vec<u16> = beside.map(|(.., priority)| *priority).collect();
            let priority = attach::clsact_place(sys, device, attach == Attach::TcEgress, &beside)?;
            state.via = Via::Clsact { priority };
            given.push((ifindex, attach, priority));
        }
        Ok(())
    }

    /// Changes what packets meet at the hooks of a family.
    fn swap_at_hooks(&mut self, sys: &Sys, family: Family) -> Result<(), Error> {
        let is_one = |change: &&mut Change| {
            (change.slot.name.attach, change.slot.name.family) == (Attach::Netfilter, family)
        };
        let mut at_hooks: Vec<&mut Change> = self.installed.iter_mut().filter(is_one).collect();
        let began = Instant::now();
        let changes: Vec<AtHook<'_>> = at_hooks
            .iter()
            .map(|change| {
                let Change { slot, state, from, to, .. } = &**change;
                AtHook { slot, state, from: *from, to: Some(*to) }
            })
            .collect();
        attach::at_hooks(sys, &changes)?;
        for change in &mut at_hooks {
            (change.made, change.attached) = (true, (Instant::now(), began.elapsed()));
        }
        Ok(())
    }

    /// What the changes did; from here on nothing fails them.
    fn end(self, sys: &Sys, requests: &[Request<'_>]) -> Vec<Applied> {
        // The time for a confirmation is from when packets meet all of it.
        let uptime = sys.uptime_ms();
        let end = |(change, request): (Change, &Request<'_>)| {
            let Change { slot, mut state, from, to, load_time, attached: (attached, attach_time), .. } =
                change;
            if let (Ok(uptime), Some(time)) = (&uptime, request.confirm)
                && let Some(confirm) = state.intent.as_mut().and_then(|intent| intent.confirm.as_mut())
            {
                confirm.deadline_ms = deadline(*uptime, time);
            }
            let confirm = state.unconfirmed(to).cloned();
            let (program_id, via) = (state.generations[&to].program_id, state.via);
            let settled = settle(sys, &slot, &mut state, to, from, Some(&request.object.manifest));
            let untidy = settled.and_then(|()| prune(sys, &slot, &mut state, to)).err();
            Applied {
                generation: to,
                program_id,
                replaced: from,
                via,
                confirm,
                untidy,
                attached,
                load_time,
                attach_time,
            }
        };
        self.installed.into_iter().zip(requests).map(end).collect()
    }

    /// Takes back what was made and clears what was begun; the failure to report.
    fn take_back(mut self, sys: &Sys, store: &Store, error: Error) -> Error {
        // To take a filter away takes the lock.
        self.qdiscs = None;
        let mut in_force = Vec::new();
        for Change { slot, state, from, to, .. } in self.installed.iter().rev().filter(|change| change.made) {
            if go_back(sys, slot, state, *from, *to, &[]).is_err() {
                in_force.push(slot.name.to_string());
            }
        }
        for slot in &self.slots {
            // What is attached tells what is left over. If even that fails, the next polc has another try.
            if repair(sys, slot).is_ok_and(|left| left.is_none()) {
                let _ = slot.remove(sys);
            }
        }
        store.tidy(sys);
        if in_force.is_empty() { error } else { Error::HalfDone { in_force, error: Box::new(error) } }
    }
}

impl Change {
    /// Repairs the slot, and finds out what is to change.
    fn begin(sys: &Sys, store: &Store, slot: &Slot, request: &Request<'_>) -> Result<Change, Error> {
        let device = device(sys, request)?;
        let (state, from) = match repair(sys, slot)? {
            Some(Repaired { state, unconfirmed: Some(_), .. }) => {
                return Err(Error::Unconfirmed(state.slot.to_string()));
            }
            Some(Repaired { state, current, .. }) => {
                if request.slot.device.is_some() && state.ifindex != device.ifindex {
                    let now = net::name(&net::devices(sys)?, state.ifindex).map(str::to_string);
                    return Err(Error::OtherDevice {
                        place: state.slot.to_string(),
                        applied: state.ifindex,
                        now,
                        named: device.ifindex,
                    });
                }
                keeps_place(&state, &device, request)?;
                (state, Some(current))
            }
            None => (fresh(sys, store, slot, &device, request)?, None),
        };
        let before =
            from.and_then(|from| state.generations.get(&from)).map(|generation| generation.program_id);
        let is_as_seen = match from {
            _ if request.over.is_empty() => true,
            Some(from) if before.is_some_and(|program| request.over.contains(&program)) => {
                sets::lost(sys, slot, from, request.object)?.is_none()
            }
            _ => false,
        };
        if !is_as_seen {
            return Err(Error::Overtaken(request.slot.to_string()));
        }
        let present = slot.generations_present(sys)?;
        let to = present.iter().chain(state.generations.keys()).max().map_or(1, |last| last + 1);
        let attached = (Instant::now(), Duration::ZERO);
        let load_time = Duration::ZERO;
        Ok(Change { slot: slot.clone(), state, from, to, device, load_time, made: false, attached })
    }

    /// Makes everything ready.
    fn install(&mut self, sys: &Sys, request: &Request<'_>) -> Result<(), Error> {
        let Change { slot, state, from, to, load_time, .. } = self;
        let (generation, kernel_time) = install(sys, slot, *to, from.is_none(), request)?;
        state.generations.insert(*to, generation);
        *load_time = kernel_time;
        Ok(())
    }

    /// Writes down what is about to happen, and in which other slots, and has it watched.
    fn announce(
        &mut self,
        sys: &Sys,
        request: &Request<'_>,
        with: Vec<(SlotName, u32)>,
        watch: &mut dyn FnMut(&SlotName, &Confirm) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Change { slot, state, from, to, .. } = self;
        let confirm = match request.confirm {
            Some(time) => {
                let uptime = sys.uptime_ms().map_err(Error::call("read the clock"))?;
                let token = format!("{}-{to}-{uptime}", std::process::id());
                Some(Confirm { deadline_ms: deadline(uptime, time), token })
            }
            None => None,
        };
        state.intent = Some(Intent { from: *from, to: Some(*to), confirm: confirm.clone(), with });
        state.confirmed = None;
        slot.write(sys, state)?;
        confirm.map_or(Ok(()), |confirm| watch(&slot.name, &confirm))
    }

    /// Changes what packets meet at a device.
    fn swap(&mut self, sys: &Sys, request: &Request<'_>) -> Result<(), Error> {
        let Change { slot, state, from, to, device, made, attached, .. } = self;
        let began = Instant::now();
        match *from {
            Some(from) => attach::swap(sys, slot, state, *to, from)?,
            None => {
                let program = attach::program(sys, slot, *to)?;
                let how = How { device, generic: request.generic, order: request.order };
                attach::first(sys, slot, state, *to, program.as_fd(), how)?;
            }
        }
        (*made, *attached) = (true, (Instant::now(), began.elapsed()));
        Ok(())
    }
}

/// Refuses to change a hook's policy while one stands at a hook of the family that is not to be changed: who lists them
/// does so before they are locked.
fn stands_alone(sys: &Sys, slot: &Slot, changed: &[(SlotName, u32)]) -> Result<(), Error> {
    for other in slot.at_other_hooks(sys)? {
        if changed.iter().all(|(name, _)| *name != other.name)
            && let Some(state) = other.known(sys)?
            && matches!(attached(sys, &other, &state), Ok(Some(_)))
        {
            return Err(Error::Overtaken(other.name.to_string()));
        }
    }
    Ok(())
}

/// Whether what packets meet changes at two slots at once.
fn at_once(one: &SlotName, other: &SlotName) -> bool {
    (one.attach, one.family) == (Attach::Netfilter, other.family)
        && other.attach == one.attach
        && one != other
}

/// Refuses to change how a policy is attached, or where among a hook's functions it is: that takes a new link, and until
/// the old one is gone packets would meet both.
fn keeps_place(state: &SlotState, device: &net::Device, request: &Request<'_>) -> Result<(), Error> {
    let other = |way: &'static str| Err(Error::OtherWay { place: state.slot.to_string(), way });
    if request.generic && !device.xdp_is_generic {
        return other("by the driver");
    }
    if request.clsact && state.via == Via::Link {
        return other("by a tcx link");
    }
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
    refuse_other_name(sys, store, slot, device)?;
    let via = attach::choose(sys, slot.name.attach, request.clsact)?;
    let own = store.programs(sys)?;
    if slot.name.attach == Attach::Xdp {
        // A policy for the other family may share a list of programs, not the one place of XDP.
        if device.xdp.iter().any(|program| own.contains(program)) {
            return Err(Error::OtherFamily(slot.name.to_string()));
        }
    }
    attach::check_occupants(sys, slot, via, device, request.order, &own)?;
    let via = match via {
        // Which it is, is said once qdiscs are locked; that there is one, before anything is loaded.
        Via::Clsact { .. } => {
            let priority = attach::clsact_place(sys, device, slot.name.attach == Attach::TcEgress, &[])?;
            Via::Clsact { priority }
        }
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
        confirmed: None,
    })
}

/// Refuses a device that a policy was applied to under a name which it had before: packets would meet both.
fn refuse_other_name(sys: &Sys, store: &Store, slot: &Slot, device: &net::Device) -> Result<(), Error> {
    let Some(now) = &slot.name.device else { return Ok(()) };
    for name in store.names(sys)? {
        let other = store.slot(&name);
        if (name.attach, name.family) == (slot.name.attach, slot.name.family)
            && name != slot.name
            && let Some(state) = other.known(sys)?
            && state.ifindex == device.ifindex
            && matches!(attached(sys, &other, &state), Ok(Some(_)))
        {
            return Err(Error::OtherName { place: name.to_string(), now: now.clone() });
        }
    }
    Ok(())
}

/// When a change goes back that has this time from now on.
fn deadline(uptime_ms: u64, time: Duration) -> u64 {
    uptime_ms.saturating_add(time.as_millis() as u64)
}

/// Loads, tests and pins generation `to`, and writes its files. What is to be kept of it, and how long the kernel took to
/// load it.
fn install(
    sys: &Sys,
    slot: &Slot,
    to: u32,
    is_first: bool,
    request: &Request<'_>,
) -> Result<(Generation, Duration), Error> {
    // The kernel's verifier takes as long as writing the object down.
    let (loaded, object) = both(|| load(sys, request.object), || request.object.write());
    let loaded = loaded?;
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
    let object = object.map_err(|error| Error::NoProgram(error.to_string()))?;
    let files = [&[(OBJECT_FILE, object.as_slice())], request.files].concat();
    sys.write_new(&folder, &files).map_err(Error::disk(&folder))?;

    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let generation = Generation {
        program_id: info.id,
        applied: now,
        mode: request.object.manifest.mode,
        source: request.source.to_string(),
        carried: request.initial.to_vec(),
        settled: is_first || !request.initial.is_empty(),
    };
    Ok((generation, loaded.kernel_time))
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
