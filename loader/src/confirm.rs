//! Keeping a change that goes back by itself unless somebody says so.
//!
//! What is written down is that nothing waits any more: the process that would take the change back, and whichever polc
//! comes first after the time is over, look for that. It is written into the note beside one slot's pins, for which a full
//! disk has room, and thereby holds for all that were changed at once with it ([`crate::repair`]).

use std::time::Instant;

use crate::error::Error;
use crate::repair::{Repaired, attached, repair};
use crate::state::SlotName;
use crate::store::Store;
use crate::swap::may_change;
use crate::sys::Sys;

/// What confirming found.
#[derive(Debug)]
pub enum Confirmed {
    /// A change that waited.
    Kept {
        /// The slots at which it is kept: what was changed together is confirmed together.
        slots: Vec<SlotName>,
        /// What could not be tidied up; the next polc will.
        untidy: Option<Error>,
    },
    /// The last change, which had been confirmed.
    Before,
    /// Nothing that was to be confirmed, or no more.
    Nothing,
}

/// Confirms what a slot waits for, and what was changed together with it. Waits for another polc until then.
///
/// Where the slot's state is damaged, the note beside its pins does for this.
///
/// # Errors
/// [`Error::NotApplied`] if nothing is applied (any more), [`Error::Locked`].
pub fn confirm(sys: &Sys, store: &Store, name: &SlotName, until: Instant) -> Result<Confirmed, Error> {
    may_change(sys)?;
    let slot = store.slot(name);
    let _lock = slot.lock_until(sys, until)?;
    let (mut state, current, damaged) = match repair(sys, &slot) {
        Ok(Some(Repaired { state, current, .. })) => (state, current, false),
        Ok(None) => {
            slot.remove(sys)?;
            store.tidy(sys);
            return Err(Error::NotApplied(name.to_string()));
        }
        Err(error) => {
            let noted = match (&error, slot.noted(sys)?) {
                (Error::Corrupt { .. }, Some(noted)) => attached(sys, &slot, &noted)?.map(|now| (noted, now)),
                _ => None,
            };
            let (noted, current) = noted.ok_or(error)?;
            (noted, current, true)
        }
    };
    if state.unconfirmed(current).is_none() {
        let before = state.confirmed == Some(current);
        return Ok(if before { Confirmed::Before } else { Confirmed::Nothing });
    }
    let mut with = Vec::new();
    if let Some(intent) = &mut state.intent {
        intent.confirm = None;
        with = std::mem::take(&mut intent.with);
    }
    state.confirmed = Some(current);
    slot.write_note(sys, &state)?;
    // From here on all of it is confirmed. What can't be tidied up the next polc does.
    let untidy = if damaged { None } else { repair(sys, &slot).err() };
    let mut slots = vec![name.clone()];
    slots.extend(with.into_iter().filter_map(|(name, generation)| {
        let there = match repair(sys, &slot.other(&name)) {
            Ok(repaired) => repaired.is_some_and(|repaired| repaired.current == generation),
            Err(_) => true,
        };
        there.then_some(name)
    }));
    Ok(Confirmed::Kept { slots, untidy })
}
