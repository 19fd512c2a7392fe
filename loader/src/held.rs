//! Going back when nobody confirms, whatever became of files and pins: what a watchdog holds in its memory.
//!
//! A change that has to be confirmed is watched by a process that was started before it was made. Mostly it goes back as
//! any polc would, by [`repair`]. Where state is damaged or lost, or pins are, it has what it takes open: the link, the
//! map that a hook goes on with, the old program, and the state as it was.

use std::os::fd::OwnedFd;
use std::time::Instant;

use polc_ir::env::Attach;

use crate::attach;
use crate::clsact;
use crate::dispatch;
use crate::error::Error;
use crate::repair::{in_force_with, repair};
use crate::state::{Confirm, SlotName, SlotState, Via};
use crate::store::{Slot, Store};
use crate::sys::{Map, Sys};

/// What taking a change back needs.
#[derive(Debug)]
pub struct Held {
    slot: Slot,
    store: Store,
    token: String,
    state: SlotState,
    link: Option<OwnedFd>,
    /// At a netfilter hook, the map of the programs that it goes on with.
    place: Option<Map>,
    old: Option<OwnedFd>,
}

impl Held {
    /// Opens what taking the slot's change with that token back needs. The change has been written down, and not been
    /// made yet.
    ///
    /// # Errors
    /// [`Error::NotApplied`] if it has not been written down, or what can't be opened.
    pub fn new(sys: &Sys, store: &Store, name: &SlotName, token: &str) -> Result<Held, Error> {
        let slot = store.slot(name);
        let state = slot.read(sys)?.filter(|state| confirm_of(state, token).is_some());
        let state = state.ok_or_else(|| Error::NotApplied(name.to_string()))?;
        let from = state.intent.as_ref().and_then(|intent| intent.from);
        let old = from.map(|from| attach::program(sys, &slot, from)).transpose()?;
        let link = attach::open_link(sys, &slot)?;
        let place = attach::place(sys, &slot)?;
        Ok(Held { slot, store: store.clone(), token: token.into(), state, link, place, old })
    }

    /// When the change goes back, in milliseconds since boot; `None` if it does not wait for its confirmation any more,
    /// which who confirms writes down, and who flushes removes. Where state and note are damaged or lost both, it waits as
    /// long as its program is pinned.
    pub fn deadline(&self, sys: &Sys) -> Option<u64> {
        let own = |state: &SlotState| confirm_of(state, &self.token).map(|confirm| confirm.deadline_ms);
        match self.slot.known(sys) {
            Ok(Some(state)) => own(&state),
            Ok(None) | Err(_) => self.is_pinned(sys).then(|| own(&self.state)).flatten(),
        }
    }

    /// Whether the program that waits is where it was put, as far as that can be told.
    fn is_pinned(&self, sys: &Sys) -> bool {
        let Some(to) = self.state.intent.as_ref().and_then(|intent| intent.to) else { return false };
        let id = self.state.generations.get(&to).map(|generation| generation.program_id);
        match attach::program(sys, &self.slot, to) {
            Ok(program) => sys.prog_info(&program).map_or(true, |info| Some(info.id) == id),
            Err(Error::Pin { .. }) => false,
            Err(_) => true,
        }
    }

    /// Takes the change back if its time is over and it has not been confirmed; whether nothing is left to wait for. Where
    /// another polc has the slot until then, the old program is put back all the same, and the rest is left for later.
    ///
    /// # Errors
    /// What kept it from going back.
    pub fn go_back(&self, sys: &Sys, until: Instant) -> Result<bool, Error> {
        let lock = self.slot.lock_until(sys, until);
        let Some(deadline) = self.deadline(sys) else {
            if lock.is_ok() {
                // Of a slot that was flushed, the lock made the directory anew.
                self.slot.remove_locked(sys);
            }
            drop(lock);
            self.store.tidy(sys);
            return Ok(true);
        };
        // Whoever makes the change may have put it off until packets met it.
        if sys.uptime_ms().is_ok_and(|now| now < deadline) {
            return Ok(false);
        }
        if matches!(lock, Err(Error::Locked(_))) {
            if !self.is_confirmed_elsewhere(sys) {
                self.put_back(sys)?;
            }
            return Ok(false);
        }
        let is_known = lock.is_ok() && matches!(self.slot.known(sys), Ok(Some(_)));
        match is_known.then(|| repair(sys, &self.slot)) {
            Some(Ok(Some(_))) => Ok(true),
            Some(Ok(None)) => {
                self.slot.remove(sys)?;
                self.store.tidy(sys);
                Ok(true)
            }
            Some(Err(_)) | None if self.is_confirmed_elsewhere(sys) => Ok(true),
            Some(Err(_)) | None => self.put_back(sys).map(|()| true),
        }
    }

    /// Whether the change was confirmed at another hook, and so at this one.
    fn is_confirmed_elsewhere(&self, sys: &Sys) -> bool {
        let with = in_force_with(sys, &self.slot, &self.state);
        with.is_ok_and(|with| with.iter().any(|other| other.confirmed))
    }

    /// Puts the old program back by what is held.
    fn put_back(&self, sys: &Sys) -> Result<(), Error> {
        let Held { slot, state, .. } = self;
        let Some(old) = &self.old else { return attach::detach(sys, slot, state) };
        let gone = || Error::NotApplied(slot.name.to_string());
        let put = match state.via {
            Via::Link => sys.link_update(self.link.as_ref().ok_or_else(gone)?, old, None),
            Via::Dispatch { .. } => dispatch::put_everywhere(sys, self.place.as_ref().ok_or_else(gone)?, old),
            Via::Clsact { priority } => {
                // One that was flushed meanwhile would be added anew.
                if attach::current(sys, slot, state)?.is_none() {
                    return Ok(());
                }
                let egress = slot.name.attach == Attach::TcEgress;
                let name = attach::filter_name(sys, slot, state.ifindex)?;
                clsact::set_filter(sys, state.ifindex, egress, priority, old, name, true)
            }
        };
        put.map_err(Error::call("go back to the old program"))
    }
}

fn confirm_of<'a>(state: &'a SlotState, token: &str) -> Option<&'a Confirm> {
    let confirm = state.intent.as_ref()?.confirm.as_ref()?;
    (confirm.token == token).then_some(confirm)
}
