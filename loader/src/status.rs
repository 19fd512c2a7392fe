//! Reading back what is applied: the attached generation of each slot, opened.
//!
//! Readers open pins only after comparing what is there with what the object says: type, lengths and size of each map,
//! and the program's number. A pin that is something else is an error, not a surprise in the counters.

use std::path::Path;

use polc_backend_ebpf::emit::COUNTERS_MAP;
use polc_backend_ebpf::object::Object;

use crate::attach;
use crate::carry;
use crate::error::Error;
use crate::load::map_spec;
use crate::state::{Confirm, Generation, Slot, SlotName, Store, Via};
use crate::sys::{Map, ProgramInfo, Sys};

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
    /// The object.
    pub object: Object,
    /// What the kernel says about the program.
    pub program: ProgramInfo,
    /// Names of the object's maps and the maps.
    pub maps: Vec<(String, Map)>,
    files: Slot,
}

impl Open {
    /// The map of that name.
    pub fn map(&self, name: &str) -> Option<&Map> {
        self.maps.iter().find(|(own, _)| own == name).map(|(_, map)| map)
    }

    /// Packets and bytes of each of the manifest's counter slots, as the attached program counted them.
    pub fn slots(&self, sys: &Sys) -> Result<Vec<(u64, u64)>, Error> {
        self.map(COUNTERS_MAP).map_or_else(|| Ok(Vec::new()), |map| carry::slots(sys, map))
    }

    /// Packets and bytes of each of the manifest's `counted`, earlier generations included.
    pub fn counted(&self, sys: &Sys) -> Result<Vec<(u64, u64)>, Error> {
        Ok(carry::by_counted(&self.object.manifest, &self.slots(sys)?, &self.generation.carried))
    }

    /// A file kept with the generation.
    pub fn file(&self, sys: &Sys, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let path = self.files.generation_files(self.number).join(name);
        sys.read(&path).map_err(Error::disk(&path))
    }

    /// The files kept with it whose names start so, in the order of their names.
    pub fn files(&self, sys: &Sys, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let folder = self.files.generation_files(self.number);
        let mut found = Vec::new();
        for name in sys.list(&folder).map_err(Error::disk(&folder))? {
            if name.starts_with(prefix)
                && let Some(bytes) = self.file(sys, &name)?
            {
                found.push((name, bytes));
            }
        }
        Ok(found)
    }
}

/// Opens the policy applied to a slot.
///
/// # Errors
/// [`Error::NotApplied`] if none is.
pub fn open(sys: &Sys, store: &Store, name: &SlotName) -> Result<Open, Error> {
    let slot = store.slot(name);
    let state = slot.read(sys)?.ok_or_else(|| Error::NotApplied(name.to_string()))?;
    let id = attach::current(sys, &slot, &state)?.ok_or_else(|| Error::NotApplied(name.to_string()))?;
    let found = state.generations.iter().find(|(_, generation)| generation.program_id == id);
    let Some((&number, generation)) = found else { return Err(Error::Replaced(name.to_string())) };
    let object = carry::object(sys, &slot, number)?;
    let program = attach::program(sys, &slot, number)?;
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
    let unconfirmed = state.intent.as_ref().filter(|intent| intent.to == Some(number));
    let unconfirmed = unconfirmed.and_then(|intent| intent.confirm.clone());
    let (generation, via) = (generation.clone(), state.via);
    Ok(Open { slot: name.clone(), number, generation, via, unconfirmed, object, program, maps, files: slot })
}

/// Opens every applied policy, in the order of the slots' directories. Slots whose device is gone are left out.
pub fn open_all(sys: &Sys, store: &Store) -> Result<Vec<Open>, Error> {
    let mut found = Vec::new();
    for (slot, _) in store.slots(sys)? {
        match open(sys, store, &slot.name) {
            Err(Error::NotApplied(_)) => {}
            result => found.push(result?),
        }
    }
    Ok(found)
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
