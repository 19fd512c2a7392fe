//! Making a slot whole again, whatever happened before: every change begins with it.
//!
//! The kernel is asked which generation is attached; that one stays, unless it had to be confirmed by now, and everything
//! else goes. What is kept about the slot may be damaged or lost: then the note beside the pins tells, or the pins do.

use std::borrow::Cow;
use std::collections::BTreeMap;

use polc_backend_ebpf::manifest::Manifest;

use crate::attach::{self, AtHook};
use crate::carry;
use crate::error::Error;
use crate::state::{Confirm, Generation, Intent, LOST, STATE_VERSION, SlotName, SlotState, Via};
use crate::store::{Slot, Store};
use crate::sys::{LinkKind, Sys};
use crate::wish;

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
///
/// # Errors
/// [`Error::Corrupt`] if the state is damaged; an overdue change was taken back all the same.
pub fn repair(sys: &Sys, slot: &Slot) -> Result<Option<Repaired>, Error> {
    let read = slot.read(sys).and_then(|state| {
        state.map(|state| attached(sys, slot, &state).map(|current| (state, current))).transpose()
    });
    let (mut state, mut current, lost) = match read {
        Ok(Some((state, current))) => (state, current, false),
        Ok(None) => match recall(sys, slot)? {
            Some(state) => {
                let current = attached(sys, slot, &state)?;
                (state, current, true)
            }
            None => {
                // Pins and files of a change that was never written down.
                for generation in slot.generations_present(sys)? {
                    slot.remove_generation(sys, generation)?;
                }
                return Ok(None);
            }
        },
        Err(error) => {
            if let Some(mut noted) = slot.noted(sys)?
                && let Some(current) = attached(sys, slot, &noted)?
            {
                keep_or_go_back(sys, slot, &mut noted, current)?;
            }
            return Err(error);
        }
    };
    let mut unconfirmed = None;
    if let Some(now) = current {
        match keep_or_go_back(sys, slot, &mut state, now)? {
            Confirmation::NotNeeded => {}
            Confirmation::Awaited(confirm) => unconfirmed = Some(confirm),
            Confirmation::Overdue => current = attached(sys, slot, &state)?,
        }
    }
    let Some(current) = current else {
        // Links of devices that are gone, filters whose device is.
        attach::detach(sys, slot, &state)?;
        slot.clear(sys)?;
        return Ok(None);
    };
    if lost {
        slot.write(sys, &state)?;
    }
    count_on(sys, slot, &mut state, current)?;
    if unconfirmed.is_none() {
        let from = state.intent.as_ref().and_then(|intent| intent.from);
        if !state.generations[&current].settled {
            settle(sys, slot, &mut state, current, from, None)?;
        }
        prune(sys, slot, &mut state, current)?;
    }
    Ok(Some(Repaired { state, current, unconfirmed }))
}

/// What became of a change that has to be confirmed.
enum Confirmation {
    /// There is none.
    NotNeeded,
    /// It still waits.
    Awaited(Confirm),
    /// Its time is over, and it was taken back.
    Overdue,
}

/// Takes the change to the generation attached back if it had to be confirmed by now, and with it those at other hooks.
fn keep_or_go_back(
    sys: &Sys,
    slot: &Slot,
    state: &mut SlotState,
    current: u32,
) -> Result<Confirmation, Error> {
    let Some(confirm) = state.unconfirmed(current).cloned() else { return Ok(Confirmation::NotNeeded) };
    let with = in_force_with(sys, slot, state)?;
    if with.iter().any(|other| other.confirmed) {
        // Confirmed at one of its hooks, it is at all of them: who was confirming it was killed in between.
        if let Some(intent) = &mut state.intent {
            intent.confirm = None;
        }
        state.confirmed = Some(current);
        return Ok(Confirmation::NotNeeded);
    }
    if sys.uptime_ms().map_err(Error::call("read the clock"))? < confirm.deadline_ms {
        return Ok(Confirmation::Awaited(confirm));
    }
    let from = state.intent.as_ref().and_then(|intent| intent.from);
    go_back(sys, slot, state, from, current, &with)?;
    Ok(Confirmation::Overdue)
}

/// A slot that was changed together with another, and has not gone back.
pub(crate) struct Other {
    slot: Slot,
    state: SlotState,
    current: u32,
    /// Whether that change, if not a later one, was confirmed.
    pub(crate) confirmed: bool,
}

/// The slots that were changed together with a slot and have not gone back. Those that can't be read see to themselves.
pub(crate) fn in_force_with(sys: &Sys, slot: &Slot, state: &SlotState) -> Result<Vec<Other>, Error> {
    let mut found = Vec::new();
    for (name, generation) in state.intent.iter().flat_map(|intent| &intent.with) {
        let slot = slot.other(name);
        if let Some(state) = slot.known(sys)?
            && let Ok(Some(current)) = attached(sys, &slot, &state)
            && current >= *generation
        {
            let confirmed = current > *generation || state.unconfirmed(current).is_none();
            found.push(Other { slot, state, current, confirmed });
        }
    }
    Ok(found)
}

/// Takes a change back whose time is over, as the process that was to do it did not. Whether it did.
///
/// # Errors
/// [`Error::Locked`] if a polc is at it, or what kept it from going back.
pub fn take_back_overdue(sys: &Sys, store: &Store, name: &SlotName) -> Result<bool, Error> {
    let slot = store.slot(name);
    let confirm = slot.known(sys)?.and_then(|state| state.intent).and_then(|intent| intent.confirm);
    let Some(confirm) = confirm else { return Ok(false) };
    let now = sys.uptime_ms().map_err(Error::call("read the clock"))?;
    if now < confirm.deadline_ms.saturating_add(OVERDUE_MS) {
        return Ok(false);
    }
    let _lock = slot.lock(sys)?;
    // Of what was flushed since, only a file may be left, which could not be removed.
    let in_force = |state: SlotState| {
        let to = state.intent.as_ref().and_then(|intent| intent.to);
        to.is_some() && matches!(attached(sys, &slot, &state), Ok(now) if now == to)
    };
    let waits = slot.known(sys)?.is_some_and(in_force);
    match repair(sys, &slot)? {
        // Whoever made it was only then writing down when its time is over.
        Some(Repaired { unconfirmed: Some(_), .. }) => Ok(false),
        Some(_) => Ok(waits),
        None => {
            slot.remove(sys)?;
            store.tidy(sys);
            Ok(waits)
        }
    }
}

/// Time that the process which is to take a change back has for it, in milliseconds.
const OVERDUE_MS: u64 = 1_000;

/// The generation attached.
pub(crate) fn attached(sys: &Sys, slot: &Slot, state: &SlotState) -> Result<Option<u32>, Error> {
    let Some(id) = attach::current(sys, slot, state)? else { return Ok(None) };
    match state.generation_of(id) {
        Some(number) => Ok(Some(number)),
        None => Err(unknown(sys, slot, id)),
    }
}

/// Why a slot's state does not tell of the program that is attached: it is another's, or the state is not the last one.
pub(crate) fn unknown(sys: &Sys, slot: &Slot, id: u32) -> Error {
    match slot.noted(sys) {
        Ok(Some(noted)) if noted.generation_of(id).is_some() => slot.outdated(),
        _ => Error::Replaced { place: slot.name.to_string(), by: id },
    }
}

/// What the pins tell of a state that was lost.
pub(crate) fn recall(sys: &Sys, slot: &Slot) -> Result<Option<SlotState>, Error> {
    if let Some(noted) = slot.noted(sys)? {
        return Ok(Some(noted));
    }
    let mut generations = BTreeMap::new();
    for number in slot.generations_present(sys)? {
        let Some(program) = attach::open_pin(sys, &slot.program(number))? else { continue };
        let info = sys.prog_info(&program).map_err(Error::call("ask about a pinned program"))?;
        let generation = Generation {
            program_id: info.id,
            applied: 0,
            mode: None,
            source: LOST.to_string(),
            carried: Vec::new(),
            settled: true,
        };
        generations.insert(number, generation);
    }
    let (via, ifindex) = match attach::open_link(sys, slot)? {
        Some(link) => {
            let info = sys.link_info(&link).map_err(Error::call("ask about the pinned link"))?;
            match info.kind {
                LinkKind::Netfilter { priority, defrag, .. } => (Via::Dispatch { priority, defrag }, 0),
                LinkKind::Xdp { ifindex } | LinkKind::Tcx { ifindex, .. } => (Via::Link, ifindex),
                LinkKind::Other(_) => (Via::Link, 0),
            }
        }
        None => {
            let is_own = |program| generations.values().any(|generation| generation.program_id == program);
            let Some((ifindex, priority)) = attach::filter(sys, slot, is_own)? else { return Ok(None) };
            (Via::Clsact { priority }, ifindex)
        }
    };
    Ok(Some(SlotState {
        version: STATE_VERSION,
        slot: slot.name.clone(),
        ifindex,
        via,
        generations,
        intent: None,
        confirmed: None,
    }))
}

/// Takes a change back: generation `from` in place of `to`, or nothing; and with it unconfirmed ones at other hooks.
pub(crate) fn go_back(
    sys: &Sys,
    slot: &Slot,
    state: &SlotState,
    from: Option<u32>,
    to: u32,
    with: &[Other],
) -> Result<(), Error> {
    let intended = |state: &SlotState| state.intent.as_ref().and_then(|intent| intent.from);
    let others = with.iter().filter_map(|other| Some((&other.slot, intended(&other.state)?, other.current)));
    for (slot, from, to) in from.map(|from| (slot, from, to)).into_iter().chain(others) {
        // A watcher for whom this fails says so; nothing else depends on it.
        let _ = wish::hand_on(sys, slot, to, from, || carry::manifest(sys, slot, from).map(Cow::Owned));
    }
    if matches!(state.via, Via::Dispatch { .. }) {
        let mut changes = vec![AtHook { slot, state, from: Some(to), to: from }];
        changes.extend(with.iter().map(|Other { slot, state, current, .. }| AtHook {
            slot,
            state,
            from: Some(*current),
            to: intended(state),
        }));
        attach::at_hooks(sys, &changes)?;
    } else if let Some(from) = from {
        attach::swap(sys, slot, state, from, to)?;
    }
    if from.is_some() { Ok(()) } else { attach::detach(sys, slot, state) }
}

/// Keeps what the rules of a change that was taken back counted meanwhile: it is not lost on the old ones.
fn count_on(sys: &Sys, slot: &Slot, state: &mut SlotState, current: u32) -> Result<(), Error> {
    let Some(Intent { from: Some(from), to: Some(to), .. }) = state.intent else { return Ok(()) };
    if from != current || !state.generations.contains_key(&to) {
        return Ok(());
    }
    // The program may still be deciding a packet.
    sys.wait_for_runs().map_err(Error::call("wait for the program to end"))?;
    if let Ok(counted) = carry::own(sys, slot, to)
        && let Ok(manifest) = carry::manifest(sys, slot, from)
        && let Some(generation) = state.generations.get_mut(&from)
    {
        carry::add(&mut generation.carried, &manifest, &counted);
    }
    Ok(())
}

/// Makes the counters of generation `to` go on where those of `from` ended. `manifest` is that of `to`, if it is known.
pub(crate) fn settle(
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

/// Removes every generation but `current`, unless a change waits for its confirmation. Where there is no room to write that
/// down, the note beside the pins says it, and what is removed may make the room.
pub(crate) fn prune(sys: &Sys, slot: &Slot, state: &mut SlotState, current: u32) -> Result<(), Error> {
    let waits =
        state.intent.as_ref().is_some_and(|intent| intent.confirm.is_some() && intent.to == Some(current));
    if waits {
        return Ok(());
    }
    let mut written = Ok(());
    if state.intent.is_some() || state.generations.len() > 1 {
        state.intent = None;
        state.generations.retain(|number, _| *number == current);
        slot.write_note(sys, state)?;
        written = slot.write_file(sys, state);
    }
    for number in slot.generations_present(sys)? {
        if number != current {
            slot.remove_generation(sys, number)?;
        }
    }
    written.or_else(|_| slot.write_file(sys, state))
}
