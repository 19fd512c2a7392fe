//! Taking policies away: what is attached, its pins and its files, whatever became of some of them.
//!
//! Policies at netfilter hooks of one family are changed at once, and so they go at once: which there are is asked, all
//! of them are taken out of force by one store, and each is removed, under one lock. Nothing is written, for which there
//! may be no room: that nothing is attached tells the next polc what was going on, should this one be killed.

use std::collections::BTreeMap;

use crate::attach::{self, AtHook};
use crate::error::Error;
use crate::repair::{attached, recall};
use crate::state::{SlotName, SlotState};
use crate::store::{Slot, Store};
use crate::swap::may_change;
use crate::sys::Sys;

/// A slot, and whether there was a policy that was taken away, or what could not be removed; the rest may be gone.
pub type Flushed = (SlotName, Result<bool, Error>);

/// Takes a slot's policy away; whether there was one.
///
/// # Errors
/// What could not be removed; the rest may be gone.
pub fn flush(sys: &Sys, store: &Store, name: &SlotName) -> Result<bool, Error> {
    let flushed = flush_all(sys, store, &|other| other == name)?.pop();
    flushed.map_or(Ok(false), |(_, flushed)| flushed)
}

/// Takes away the policies of all slots that are `wanted`. What fails for some does not keep the others.
///
/// # Errors
/// Nothing was changed. [`Error::Locked`], if another polc is at work on a slot, is that slot's.
pub fn flush_all(
    sys: &Sys,
    store: &Store,
    wanted: &dyn Fn(&SlotName) -> bool,
) -> Result<Vec<Flushed>, Error> {
    may_change(sys)?;
    let slots = || -> Result<Vec<Slot>, Error> {
        Ok(store.names(sys)?.into_iter().filter(wanted).map(|name| store.slot(&name)).collect())
    };
    let mut by_lock = BTreeMap::new();
    for slot in slots()? {
        by_lock.entry(slot.locked()).or_insert(slot);
    }
    let mut flushed = Vec::new();
    for (lock, first) in &by_lock {
        let taken = first.lock(sys).and_then(|_lock| {
            // Until it was locked another polc may have applied something, or taken it away.
            let slots: Vec<Slot> = slots()?.into_iter().filter(|slot| slot.locked() == *lock).collect();
            if slots.is_empty() {
                first.remove_locked(sys);
            }
            take_away(sys, &slots)
        });
        match taken {
            Ok(taken) => flushed.extend(taken),
            Err(error) => flushed.push((first.name.clone(), Err(error))),
        }
    }
    store.tidy(sys);
    Ok(flushed)
}

/// Takes away what there is of slots that have a lock in common, which is held.
fn take_away(sys: &Sys, slots: &[Slot]) -> Result<Vec<Flushed>, Error> {
    let found: Vec<(&Slot, Result<Option<SlotState>, Error>)> =
        slots.iter().map(|slot| (slot, known(sys, slot))).collect();
    if slots.len() > 1 {
        match withdraw(sys, &found) {
            // What hooks share is damaged or lost, and nothing is left but to detach one after the other.
            Err(Error::Pin { .. }) => {}
            withdrawn => withdrawn?,
        }
    }
    let remove = |(slot, state): (&Slot, Result<Option<SlotState>, Error>)| {
        (slot.name.clone(), state.and_then(|state| remove(sys, slot, state)))
    };
    Ok(found.into_iter().map(remove).collect())
}

/// What is known about a slot's policy. What is damaged or lost can't be confirmed either, and what the pins tell is enough
/// to take it away; `None` if even they don't.
fn known(sys: &Sys, slot: &Slot) -> Result<Option<SlotState>, Error> {
    if let Ok(Some(state)) = slot.known(sys)
        && !matches!(attached(sys, slot, &state), Err(Error::Corrupt { .. }))
    {
        return Ok(Some(state));
    }
    match recall(sys, slot) {
        Err(Error::Pin { .. }) => Ok(None),
        recalled => recalled,
    }
}

/// Makes packets meet none of the policies at hooks of a family, at all of them at once.
fn withdraw(sys: &Sys, found: &[(&Slot, Result<Option<SlotState>, Error>)]) -> Result<(), Error> {
    let mut changes = Vec::new();
    for (slot, state) in found {
        // Of what can't be told, or is another's, the removal tells.
        if let Ok(Some(state)) = state
            && let Ok(Some(from)) = attached(sys, slot, state)
        {
            changes.push(AtHook { slot, state, from: Some(from), to: None });
        }
    }
    attach::at_hooks(sys, &changes)
}

/// Removes what is attached at a slot, its pins and its files; whether there was a policy.
fn remove(sys: &Sys, slot: &Slot, state: Option<SlotState>) -> Result<bool, Error> {
    if let Some(state) = &state {
        match attached(sys, slot, state) {
            // The map that a hook goes on with is not needed to take the link away.
            Err(Error::Pin { .. }) => {}
            // Another's program is not ours to detach.
            attached => drop(attached?),
        }
        match attach::detach(sys, slot, state) {
            // What is pinned in place of the link goes as a pin, and the link that lost its own has gone.
            Err(Error::Pin { .. }) => {}
            detached => detached?,
        }
    }
    slot.remove(sys)?;
    Ok(state.is_some())
}
