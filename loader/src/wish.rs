//! Whose packets a watcher wants, kept beside the program that reports them, so that reports go on from the first packet
//! that another generation decides.
//!
//! Which of its slots a program reports is a table by the numbers of its own ([`polc_backend_ebpf::trace`]), and another
//! generation has others. So a watcher leaves its wish in words beside the generation's pins, and who exchanges
//! generations switches the new one's reports on as the old one's are, before packets meet it. The watcher finds them in
//! the new one's own ring buffer when it gets there.

use std::borrow::Cow;
use std::collections::BTreeMap;

use polc_backend_ebpf::manifest::{CounterKind, CounterSlot, Manifest};
use polc_backend_ebpf::trace::{CONFIG_MAP, Tally};
use serde::{Deserialize, Serialize};

use crate::attach;
use crate::error::Error;
use crate::events::{self, TraceMaps};
use crate::store::Slot;
use crate::sys::{Map, Sys};

/// Whose packets a watcher wants. What the packets are like is in the program's own filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Wish {
    /// Verdicts; none for any.
    pub verdicts: Vec<String>,
    /// The chain of who decided.
    pub chain: Option<String>,
    /// The line of who decided.
    pub line: Option<u32>,
    /// The generation that the wish was handed on from; none if a watcher left it.
    pub after: Option<u32>,
    /// What the generation had reported before that.
    pub start: Tally,
}

impl Wish {
    /// Whether packets counted in a slot are wanted. Frames that are let on because they are none of the policy's business
    /// (not IP, or the other family's) never are.
    pub fn wants(&self, slot: &CounterSlot) -> bool {
        let Some(verdict) = &slot.verdict else { return false };
        !(slot.kind == CounterKind::Frame && verdict == "accept")
            && (self.verdicts.is_empty() || self.verdicts.contains(verdict))
            && self.chain.as_ref().is_none_or(|chain| slot.chain.as_ref() == Some(chain))
            && self.line.is_none_or(|line| slot.line == Some(line))
    }

    /// Whether it is for the same packets.
    pub fn is_like(&self, other: &Wish) -> bool {
        let of = |wish: &Wish| (wish.verdicts.clone(), wish.chain.clone(), wish.line);
        of(self) == of(other)
    }

    /// The wish beside a generation's pins. One that can't be understood is none.
    pub(crate) fn read(sys: &Sys, slot: &Slot, generation: u32) -> Result<Option<Wish>, Error> {
        let path = slot.wish(generation);
        let text = sys.read_symlink(&path).map_err(Error::disk(&path))?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Leaves it beside a generation's pins.
    pub(crate) fn write(&self, sys: &Sys, slot: &Slot, generation: u32) -> Result<(), Error> {
        let path = slot.wish(generation);
        let new = path.with_file_name("wish-new");
        let text = serde_json::to_string(self).expect("plain data serializes");
        sys.write_symlink(&path, &new, &text).map_err(Error::disk(&path))
    }
}

/// Makes generation `to` report what `from` does, if that does. It is about to take the other's place.
///
/// # Errors
/// A call failed. The watcher will see that the reports were not switched on as it wants them.
pub(crate) fn hand_on<'m>(
    sys: &Sys,
    slot: &Slot,
    from: u32,
    to: u32,
    manifest: impl FnOnce() -> Result<Cow<'m, Manifest>, Error>,
) -> Result<(), Error> {
    let Some(config) = open(sys, slot, from, CONFIG_MAP)? else { return Ok(()) };
    let config = events::value(sys, &config)?;
    let wish = if events::switches_on(&config) { Wish::read(sys, slot, from)? } else { None };
    let Some(wish) = wish else { return Ok(()) };
    let manifest = manifest()?;
    let Some(trace) = &manifest.trace else { return Ok(()) };
    let mut found: BTreeMap<&str, Map> = BTreeMap::new();
    for name in [&trace.config, &trace.wanted, &trace.state, &trace.events] {
        found.extend(open(sys, slot, to, name)?.map(|map| (name.as_str(), map)));
    }
    let Some(maps) = TraceMaps::of(&manifest, |name| found.get(name)) else { return Ok(()) };
    let wish = Wish { after: Some(from), start: events::tally(sys, maps)?, ..wish };
    wish.write(sys, slot, to)?;
    let wanted = |index: usize| manifest.counters.get(index).is_some_and(|slot| wish.wants(slot));
    events::switch(sys, maps, &config, wanted)
}

/// A generation's map, if it has one of that name.
fn open(sys: &Sys, slot: &Slot, generation: u32, name: &str) -> Result<Option<Map>, Error> {
    let path = slot.map(generation, name);
    attach::open_pin(sys, &path)?.map(|fd| sys.map(fd).map_err(Error::disk(&path))).transpose()
}
