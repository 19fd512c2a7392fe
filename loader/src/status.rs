//! Reading back what is applied: the attached generation of each slot, opened.
//!
//! Readers open pins only after comparing what is there with what the object says: type, lengths and size of each map,
//! and the program's number. A pin that is something else is an error, not a surprise in the counters.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use polc_backend_ebpf::emit::{COUNTERS_MAP, SUSPEND_MAP};
use polc_backend_ebpf::object::{MapType, Object};
use polc_ir::source::bytes::to_text;

use crate::attach;
use crate::carry;
use crate::error::Error;
use crate::events::TraceMaps;
use crate::load::map_spec;
use crate::net::{self, Device};
use crate::repair::{recall, unknown};
use crate::sets::LiveSets;
use crate::state::{Confirm, Generation, SlotName, SlotState, Via};
use crate::store::{Lock, Slot, Store};
use crate::sys::{Map, ProgramInfo, Sys};
use crate::wish::Wish;

/// An applied policy, opened for reading.
#[derive(Debug)]
pub struct Open {
    /// Where it is applied.
    pub slot: SlotName,
    /// The attached generation's number.
    pub number: u32,
    /// What is kept about it.
    pub generation: Generation,
    /// How it is attached.
    pub via: Via,
    /// What has to be confirmed, if anything.
    pub unconfirmed: Option<Confirm>,
    /// The object, without what is in its data maps.
    pub object: Object,
    /// What the kernel says about the program.
    pub program: ProgramInfo,
    /// Names of the object's maps and the maps.
    pub maps: Vec<(String, Map)>,
    state: SlotState,
    files: Slot,
}

impl Open {
    /// The map of that name.
    pub fn map(&self, name: &str) -> Option<&Map> {
        self.maps.iter().find(|(own, _)| own == name).map(|(_, map)| map)
    }

    /// What each map holds and takes.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn fills(&self, sys: &Sys) -> Result<Vec<Fill<'_>>, Error> {
        self.maps
            .iter()
            .map(|(name, map)| Ok(Fill { name, entries: self.entries(sys, name, map)?, map }))
            .collect()
    }

    /// Elements in use: of a hash or trie those that are there, of the counters those that count something. Tables that
    /// are one element, which the program reads whole, and ring buffers have none.
    fn entries(&self, sys: &Sys, name: &str, map: &Map) -> Result<Option<u32>, Error> {
        let info = map.info();
        Ok(match MapType(info.map_type) {
            MapType::HASH | MapType::LPM_TRIE => Some(crate::tables::list(sys, map)?.len() as u32),
            MapType::RINGBUF => None,
            _ if name == COUNTERS_MAP => Some(self.object.manifest.counters.len() as u32),
            _ => (info.max_entries > 1).then_some(info.max_entries),
        })
    }

    /// Whether the program reports packets at the moment; `None` if it never does.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn reports(&self, sys: &Sys) -> Result<Option<bool>, Error> {
        TraceMaps::of(&self.object.manifest, |name| self.map(name))
            .map(|maps| crate::events::is_on(sys, maps))
            .transpose()
    }

    /// Whether the program leaves every packet to the kernel at the moment; `None` if it can't be told to.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn is_suspended(&self, sys: &Sys) -> Result<Option<bool>, Error> {
        let Some(map) = self.map(SUSPEND_MAP) else { return Ok(None) };
        let word =
            sys.map_lookup(map, &[0; 4]).map_err(Error::call("ask whether the program is suspended"))?;
        Ok(Some(word.is_some_and(|word| word.iter().any(|byte| *byte != 0))))
    }

    /// Packets and bytes of each of the manifest's counter slots, as the attached program counted them.
    pub fn slots(&self, sys: &Sys) -> Result<Vec<(u64, u64)>, Error> {
        self.map(COUNTERS_MAP).map_or_else(|| Ok(Vec::new()), |map| carry::slots(sys, map))
    }

    /// Packets and bytes of each of the manifest's `counted`, earlier generations included.
    pub fn counted(&self, sys: &Sys) -> Result<Vec<(u64, u64)>, Error> {
        Ok(carry::by_counted(&self.object.manifest, &self.slots(sys)?, &self.generation.carried))
    }

    /// Whether it is still what is attached: not replaced, not removed, and its device still there.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn is_attached(&self, sys: &Sys) -> Result<bool, Error> {
        Ok(attach::current(sys, &self.files, &self.state)? == Some(self.program.id))
    }

    /// The name that its device has now, if that is another than the policy was applied by.
    pub fn renamed<'d>(&self, devices: &'d [Device]) -> Option<&'d str> {
        let own = self.slot.device.as_deref()?;
        net::name(devices, self.state.ifindex).filter(|name| *name != own)
    }

    /// The policy's sets. Somebody may change them meanwhile.
    ///
    /// # Errors
    /// What is kept can't be read.
    pub fn sets(&self, sys: &Sys) -> Result<LiveSets, Error> {
        LiveSets::of(sys, self.files.clone(), self.number, self.generation.mode)
    }

    /// The program, to ask the kernel more about it.
    ///
    /// # Errors
    /// [`Error::Pin`] if it is not there any more.
    pub fn open_program(&self, sys: &Sys) -> Result<OwnedFd, Error> {
        attach::program(sys, &self.files, self.number)
    }

    /// Keeps every other watcher away until the result is dropped: a program has one switch and one filter.
    ///
    /// # Errors
    /// [`Error::Watched`] if somebody watches already.
    pub fn lock_reports(&self, sys: &Sys) -> Result<Lock, Error> {
        self.files.lock_reports(sys, self.number)
    }

    /// Whose packets it reports, if it was left or handed on.
    ///
    /// # Errors
    /// It can't be read.
    pub fn wish(&self, sys: &Sys) -> Result<Option<Wish>, Error> {
        Wish::read(sys, &self.files, self.number)
    }

    /// Leaves a wish for the generation that takes this one's place.
    ///
    /// # Errors
    /// It can't be written.
    pub fn leave_wish(&self, sys: &Sys, wish: &Wish) -> Result<(), Error> {
        wish.write(sys, &self.files, self.number)
    }

    /// The directory of its pins: its names change whenever the policy does.
    pub fn pins(&self) -> &Path {
        self.files.pins()
    }

    /// What is noted of the slot: another text, should it be changed. Whoever asks often asks this before
    /// [`Open::is_attached`].
    ///
    /// # Errors
    /// It can't be read.
    pub fn note(&self, sys: &Sys) -> Result<Option<String>, Error> {
        self.files.note(sys)
    }

    /// Where a file kept with the generation is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.files.generation_files(self.number).join(name)
    }

    /// A file kept with the generation.
    pub fn file(&self, sys: &Sys, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path(name);
        sys.read(&path).map_err(Error::disk(&path))
    }

    /// A text that has to be kept with the generation.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is not there.
    pub fn kept_text(&self, sys: &Sys, name: &str) -> Result<String, Error> {
        let corrupt = |why: &str| Error::Corrupt { path: self.path(name), why: why.to_string() };
        let bytes = self.file(sys, name)?.ok_or_else(|| corrupt("it is not there"))?;
        Ok(to_text(bytes))
    }
}

/// What a map holds and takes.
#[derive(Clone, Copy, Debug)]
pub struct Fill<'o> {
    /// Its name in the object.
    pub name: &'o str,
    /// Elements in use; `None` where the map has no elements of its own.
    pub entries: Option<u32>,
    /// The map.
    pub map: &'o Map,
}

impl Fill<'_> {
    /// Bytes of its keys and values, for all CPUs.
    pub fn bytes(&self) -> u64 {
        let info = self.map.info();
        // A ring buffer's size is in bytes.
        let element = if MapType(info.map_type) == MapType::RINGBUF {
            1
        } else {
            u64::from(info.key_bytes) + self.map.stride() as u64
        };
        u64::from(info.max_entries) * element
    }
}

/// Opens the policy applied to a slot.
///
/// # Errors
/// [`Error::NotApplied`] if none is.
pub fn open(sys: &Sys, store: &Store, name: &SlotName) -> Result<Open, Error> {
    let slot = store.slot(name);
    let not_applied = || Error::NotApplied(name.to_string());
    let attached = || -> Result<(SlotState, u32), Error> {
        let state = match slot.read(sys)? {
            Some(state) => state,
            None => return Err(if is_pinned(sys, &slot)? { slot.lost() } else { not_applied() }),
        };
        let id = attach::current(sys, &slot, &state)?.ok_or_else(not_applied)?;
        Ok((state, id))
    };
    let mut found = attached()?;
    loop {
        let result = open_program(sys, &slot, &found.0, found.1);
        if result.is_ok() {
            return result;
        }
        // A policy that is replaced while it is being opened takes its pins and files along.
        let now = attached()?;
        if now == found {
            return result;
        }
        found = now;
    }
}

/// Opens the generation of a slot whose program has that number.
fn open_program(sys: &Sys, slot: &Slot, state: &SlotState, id: u32) -> Result<Open, Error> {
    let name = &slot.name;
    let number = state.generation_of(id).ok_or_else(|| unknown(sys, slot, id))?;
    let object = carry::object(sys, slot, number)?;
    let program = attach::program(sys, slot, number)?;
    let program = sys.prog_info(&program).map_err(Error::call("ask about the pinned program"))?;
    if program.id != id {
        let why = format!("it is program {}, and {id} is attached", program.id);
        return Err(Error::Pin { path: slot.program(number), why });
    }
    let mut maps = Vec::new();
    for def in object.maps.values() {
        let map = pinned_map(sys, &slot.map(number, &def.name), &map_spec(def))?;
        maps.push((def.name.clone(), map));
    }
    Ok(Open {
        slot: name.clone(),
        number,
        generation: state.generations[&number].clone(),
        via: state.via,
        unconfirmed: state.unconfirmed(number).cloned(),
        state: state.clone(),
        object,
        program,
        maps,
        files: slot.clone(),
    })
}

/// Whether a program of a slot without state is attached, as far as its pins tell.
fn is_pinned(sys: &Sys, slot: &Slot) -> Result<bool, Error> {
    let Some(state) = recall(sys, slot)? else { return Ok(false) };
    Ok(attach::current(sys, slot, &state)?.is_some())
}

/// A pinned map, if it is what an object's map has to be.
///
/// # Errors
/// [`Error::Pin`] if it has another type, key, value or size.
pub fn pinned_map(sys: &Sys, path: &Path, spec: &crate::sys::MapSpec<'_>) -> Result<Map, Error> {
    let wrong = |why: String| Error::Pin { path: path.to_path_buf(), why };
    let fd = attach::open_pin(sys, path)?.ok_or_else(|| wrong("it is not there".to_string()))?;
    let map = sys.map(fd).map_err(|error| wrong(format!("is no map: {error}")))?;
    let info = map.info();
    for (what, have, want) in [
        ("type", info.map_type, spec.map_type),
        ("bytes of a key", info.key_bytes, spec.key_bytes),
        ("bytes of a value", info.value_bytes, spec.value_bytes),
        ("entries", info.max_entries, spec.max_entries),
    ] {
        if have != want {
            return Err(wrong(format!("it has {what} {have}, and the object's map has {want}")));
        }
    }
    Ok(map)
}
