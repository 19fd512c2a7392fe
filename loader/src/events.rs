//! Watching an applied policy: switches a program's reports on, reads them, and switches them off again.
//!
//! What a report is and how filters are encoded is [`polc_backend_ebpf::trace`]'s. A program has one switch and one
//! filter, so one watcher at a time ([`crate::status::Open::lock_reports`]). The switch goes off when a
//! [`Watch`] is dropped; if the process is killed first, the program goes on reporting, at the cost of the reports,
//! until the ring buffer is full, and then at that of reading packets' headers, until the next watcher leaves. So does
//! one that takes its place ([`crate::wish`]).

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::trace::{Config, Event, Tally, TraceManifest, config, state};

use crate::error::Error;
use crate::sys::{Map, NameChanges, Ring, Signals, Sys};

/// The maps of a program that reports.
#[derive(Clone, Copy, Debug)]
pub struct TraceMaps<'a> {
    /// The switch and the filter.
    pub config: &'a Map,
    /// Wanted slots.
    pub wanted: &'a Map,
    /// Token buckets and counts, for each CPU.
    pub state: &'a Map,
    /// The ring buffer.
    pub events: &'a Map,
}

impl<'a> TraceMaps<'a> {
    /// Finds the maps by their names in the object; `None` if the program was compiled without reports.
    pub fn of(manifest: &Manifest, map: impl Fn(&str) -> Option<&'a Map>) -> Option<TraceMaps<'a>> {
        let TraceManifest { events, config, wanted, state, .. } = manifest.trace.as_ref()?;
        Some(TraceMaps {
            config: map(config)?,
            wanted: map(wanted)?,
            state: map(state)?,
            events: map(events)?,
        })
    }
}

/// Reports that are being read.
#[derive(Debug)]
pub struct Watch<'a> {
    sys: &'a Sys,
    maps: TraceMaps<'a>,
    ring: Ring<'a>,
    start: Tally,
    stays_on: bool,
}

impl<'a> Watch<'a> {
    /// Switches reports on: of packets counted in a slot that is `wanted` and that `config` lets through. Reports that
    /// an earlier watcher left behind are thrown away.
    ///
    /// # Errors
    /// A call failed.
    pub fn start(
        sys: &'a Sys,
        maps: TraceMaps<'a>,
        config: &Config,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Watch<'a>, Error> {
        let what = || Error::call("switch reports on");
        set(sys, maps.config, &Config::OFF.encode()).map_err(what())?;
        let mut ring = Ring::new(sys, maps.events).map_err(what())?;
        while ring.take(|_| ()).is_some() {}
        let start = tally(sys, maps)?;
        // From here on the switch goes off again, whatever happens.
        let watch = Watch { sys, maps, ring, start, stays_on: false };
        switch(sys, maps, &config.encode(), wanted)?;
        Ok(watch)
    }

    /// Takes reports over that were switched on in this way by somebody else, when the program had reported `start`:
    /// nothing of it is thrown away. `None` if they were not.
    ///
    /// # Errors
    /// A call failed.
    pub fn take_over(
        sys: &'a Sys,
        maps: TraceMaps<'a>,
        config: &Config,
        wanted: impl Fn(usize) -> bool,
        start: Tally,
    ) -> Result<Option<Watch<'a>>, Error> {
        let as_wanted = value(sys, maps.config)? == config.encode()
            && value(sys, maps.wanted)? == wanted_bytes(maps, wanted);
        if !as_wanted {
            return Ok(None);
        }
        let ring = Ring::new(sys, maps.events).map_err(Error::call("read reports"))?;
        Ok(Some(Watch { sys, maps, ring, start, stays_on: false }))
    }

    /// Leaves reports on for who takes them over next; what the program had reported by then, of which `told` since the
    /// start.
    pub fn leave_on(&mut self, told: Tally) -> Tally {
        self.stays_on = true;
        self.start + told
    }

    /// The next report, if one is there. Records of another length are skipped.
    pub fn take(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ring.take(Event::decode)? {
                return Some(event);
            }
        }
    }

    /// What was reported and what was not since the start.
    ///
    /// # Errors
    /// The call failed.
    pub fn tally(&self) -> Result<Tally, Error> {
        let now = tally(self.sys, self.maps)?;
        Ok(Tally {
            reported: now.reported.saturating_sub(self.start.reported),
            limited: now.limited.saturating_sub(self.start.limited),
            full: now.full.saturating_sub(self.start.full),
        })
    }

    /// Switches reports off. What is in the ring buffer can still be read; nothing comes any more.
    ///
    /// # Errors
    /// The call failed: reports may go on.
    pub fn stop(&mut self) -> Result<(), Error> {
        let what = || Error::call("switch reports off");
        set(self.sys, self.maps.config, &Config::OFF.encode()).map_err(what())?;
        // A program that found the switch on may still be at its report.
        self.sys.wait_for_runs().map_err(what())
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if !self.stays_on {
            switch_off(self.sys, self.maps);
        }
    }
}

/// Switches reports off that nobody watches.
pub fn switch_off(sys: &Sys, maps: TraceMaps<'_>) {
    // Nobody is left to tell.
    let _ = set(sys, maps.config, &Config::OFF.encode());
}

/// What else is waited for beside reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ends<'a> {
    /// What has to be looked at, and ends nothing by itself.
    pub changes: Option<&'a NameChanges>,
    /// Signals that ask to end.
    pub signals: Option<&'a Signals>,
    /// Where reports are written to: once nobody reads them there any more, it is over.
    pub output: Option<BorrowedFd<'a>>,
}

/// Waits until one of the watches has a report or something ends it all, for at most `timeout`; whether it ends.
///
/// # Errors
/// The call failed.
pub fn wait(sys: &Sys, watches: &[Watch<'_>], ends: Ends<'_>, timeout: Duration) -> Result<bool, Error> {
    let mut files: Vec<BorrowedFd<'_>> = watches.iter().map(|watch| watch.ring.as_fd()).collect();
    files.extend(ends.changes.map(AsFd::as_fd));
    let others = files.len();
    files.extend(ends.signals.map(AsFd::as_fd));
    let ready = sys.wait_readable(&files, ends.output, timeout).map_err(Error::call("wait for reports"))?;
    Ok(ready[others..].contains(&true))
}

/// Whether a program's reports are switched on.
///
/// # Errors
/// The call failed.
pub fn is_on(sys: &Sys, maps: TraceMaps<'_>) -> Result<bool, Error> {
    value(sys, maps.config).map(|config| switches_on(&config))
}

/// Whether a configuration switches reports on.
pub(crate) fn switches_on(config: &[u8]) -> bool {
    config.iter().skip(config::SWITCH as usize).take(4).any(|byte| *byte != 0)
}

/// The only value of one of the maps.
pub(crate) fn value(sys: &Sys, map: &Map) -> Result<Vec<u8>, Error> {
    let value =
        sys.map_lookup(map, &0u32.to_ne_bytes()).map_err(Error::call("ask whether somebody watches"))?;
    Ok(value.unwrap_or_default())
}

/// The table of wanted slots.
fn wanted_bytes(maps: TraceMaps<'_>, wanted: impl Fn(usize) -> bool) -> Vec<u8> {
    (0..maps.wanted.info().value_bytes as usize).map(|slot| u8::from(wanted(slot))).collect()
}

/// Makes a program report as `config` says what is counted in wanted slots.
pub(crate) fn switch(
    sys: &Sys,
    maps: TraceMaps<'_>,
    config: &[u8],
    wanted: impl Fn(usize) -> bool,
) -> Result<(), Error> {
    let what = || Error::call("switch reports on");
    set(sys, maps.wanted, &wanted_bytes(maps, wanted)).map_err(what())?;
    set(sys, maps.config, config).map_err(what())
}

/// The only value of a data map.
fn set(sys: &Sys, map: &Map, value: &[u8]) -> std::io::Result<()> {
    sys.map_update(map, &0u32.to_ne_bytes(), value)
}

/// What a program reported and did not report on all CPUs since it was loaded.
///
/// # Errors
/// The call failed.
pub fn tally(sys: &Sys, maps: TraceMaps<'_>) -> Result<Tally, Error> {
    let found =
        sys.map_lookup(maps.state, &0u32.to_ne_bytes()).map_err(Error::call("read what was reported"))?;
    let bytes = found.unwrap_or_default();
    Ok(bytes.chunks_exact(state::BYTES).filter_map(Tally::decode).fold(Tally::default(), |a, b| a + b))
}
