//! Going back when nobody confirms, whatever became of files and pins: what a watchdog holds in its memory.
//!
//! A change that has to be confirmed is watched by a process that was started before it was made. Mostly it goes back as
//! any polc would, by [`repair`]. Where state is damaged or lost, or pins are, it has what it takes open: the link, the
//! map that a hook goes on with, the old program, and the state as it was.

use std::os::fd::OwnedFd;

use polc_ir::env::Attach;

use crate::attach;
use crate::clsact;
use crate::dispatch;
use crate::error::Error;
use crate::repair::repair;
use crate::state::{SlotName, SlotState, Via};
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
        let state = slot.read(sys)?.filter(|state| is_of(state, token));
        let state = state.ok_or_else(|| Error::NotApplied(name.to_string()))?;
        let from = state.intent.as_ref().and_then(|intent| intent.from);
        let old = from.map(|from| attach::program(sys, &slot, from)).transpose()?;
        let link = attach::open_link(sys, &slot)?;
        let place = attach::place(sys, &slot)?;
        Ok(Held { slot, store: store.clone(), token: token.into(), state, link, place, old })
    }

    /// Whether the change still waits for its confirmation. Where its state is damaged or lost, the note beside the pins
    /// tells, which who confirms changes and who flushes removes.
    pub fn waits(&self, sys: &Sys) -> bool {
        let of = |state: &SlotState| is_of(state, &self.token);
        match self.slot.read(sys) {
            Ok(Some(state)) => of(&state),
            Ok(None) | Err(_) => self.slot.noted(sys).map_or(true, |noted| noted.as_ref().is_some_and(of)),
        }
    }

    /// Takes the change back if it has not been confirmed.
    ///
    /// # Errors
    /// What kept it from going back.
    pub fn go_back(&self, sys: &Sys) -> Result<(), Error> {
        let lock = self.slot.lock(sys, true);
        if !self.waits(sys) {
            // Of a slot that was flushed, the lock made the directory anew.
            self.slot.remove_locked(sys);
            self.store.tidy(sys);
            return Ok(());
        }
        let (_lock, repaired) = match lock {
            Ok(lock) => (Some(lock), repair(sys, &self.slot)),
            Err(error) => (None, Err(error)),
        };
        match repaired {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                self.slot.remove(sys)?;
                self.store.tidy(sys);
                Ok(())
            }
            Err(_) => self.put_back(sys),
        }
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
                let egress = slot.name.attach == Attach::TcEgress;
                clsact::set_filter(sys, state.ifindex, egress, priority, old, true)
            }
        };
        put.map_err(Error::call("go back to the old program"))
    }
}

fn is_of(state: &SlotState, token: &str) -> bool {
    let confirm = state.intent.as_ref().and_then(|intent| intent.confirm.as_ref());
    confirm.is_some_and(|confirm| confirm.token == token)
}
