//! Sets of an applied policy: read and changed in the tables that the attached program looks them up in.
//!
//! The table is the truth: there is no second copy of a set's elements that could differ from what packets meet. What an
//! element is, and in which order the words of a table may be written, is [`polc_ir::plan::set`]'s; here the stores are
//! made, while the slot is locked against every other polc.

use polc_backend_ebpf::manifest::SetManifest;
use polc_backend_ebpf::object::{MapKind, Object};
use polc_ir::env::Mode;
use polc_ir::plan::set::{Words, change::Store};
use polc_ir::set::Pattern;

use crate::attach;
use crate::error::Error;
use crate::repair::{Repaired, repair};
use crate::state::SlotName;
use crate::store::{LOCK_WAIT, Locks, Slot, Store as StateStore, lock_all};
use crate::swap::OBJECT_FILE;
use crate::sys::{Map, MapWords, Sys};

/// Name of the file among a generation's that says which sets have tables: [`SetManifest`]s as JSON. The object says the
/// same, and may be a hundred times as large.
pub const SETS_FILE: &str = "sets.json";

/// The sets of a slot's policy.
#[derive(Debug)]
pub struct LiveSets {
    /// The slot.
    pub name: SlotName,
    /// How the policy is deployed.
    pub mode: Option<Mode>,
    /// The sets that have tables.
    pub sets: Vec<SetManifest>,
    /// Those of the policy that comes back unless the last change is confirmed, if one does, or why they can't be told.
    pub before: Option<Box<Result<LiveSets, Error>>>,
    slot: Slot,
    generation: u32,
}

/// The sets of a slot's policy, or why they can't be told.
pub type Opened = Result<LiveSets, (SlotName, Error)>;

impl LiveSets {
    /// The sets of the policies that are attached at slots, which are locked as long as the locks live. What fails for some
    /// does not keep the others.
    ///
    /// # Errors
    /// [`Error::Locked`] if another polc has a slot all the time.
    pub fn open_all(
        sys: &Sys,
        store: &StateStore,
        names: &[SlotName],
    ) -> Result<(Vec<Opened>, Locks), Error> {
        let slots: Vec<Slot> = names.iter().map(|name| store.slot(name)).collect();
        let locks = lock_all(sys, &slots, LOCK_WAIT)?;
        let open = |slot: Slot| {
            let name = slot.name.clone();
            LiveSets::open(sys, store, slot).map_err(|error| (name, error)).transpose()
        };
        Ok((slots.into_iter().filter_map(open).collect(), locks))
    }

    /// The sets of the policy that is attached at a locked slot; `None` if none is.
    fn open(sys: &Sys, store: &StateStore, slot: Slot) -> Result<Option<LiveSets>, Error> {
        let Some(Repaired { state, current, unconfirmed }) = repair(sys, &slot)? else {
            slot.remove(sys)?;
            store.tidy(sys);
            return Ok(None);
        };
        let of = |generation: u32| {
            let mode = state.generations.get(&generation).and_then(|generation| generation.mode);
            LiveSets::of(sys, slot.clone(), generation, mode)
        };
        let from = state.intent.as_ref().and_then(|intent| intent.from).filter(|_| unconfirmed.is_some());
        let before = from.map(|from| Box::new(of(from)));
        Ok(Some(LiveSets { before, ..of(current)? }))
    }

    /// The sets of a generation.
    pub(crate) fn of(sys: &Sys, slot: Slot, generation: u32, mode: Option<Mode>) -> Result<LiveSets, Error> {
        let path = slot.generation_files(generation).join(SETS_FILE);
        let sets = match sys.read(&path).map_err(Error::disk(&path))? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| Error::Corrupt { path: path.clone(), why: error.to_string() })?,
            None => Vec::new(),
        };
        Ok(LiveSets { name: slot.name.clone(), mode, sets, before: None, slot, generation })
    }

    /// The sets whose elements are others than those that the generation was applied with, each with its table's words.
    ///
    /// # Errors
    /// What is kept about the generation can't be read, or the kernel refuses.
    pub fn changed(&self, sys: &Sys) -> Result<Vec<(&SetManifest, Vec<u64>)>, Error> {
        let mut live = self.sets.iter().filter(|set| set.live).peekable();
        if live.peek().is_none() {
            return Ok(Vec::new());
        }
        let path = self.slot.generation_files(self.generation).join(OBJECT_FILE);
        let corrupt = |why: String| Error::Corrupt { path: path.clone(), why };
        let bytes = sys.read(&path).map_err(Error::disk(&path))?;
        let bytes = bytes.ok_or_else(|| corrupt("it is not there".into()))?;
        let object = Object::read(&bytes).map_err(|error| corrupt(error.to_string()))?;
        let mut changed = Vec::new();
        for set in live {
            let applied = table_words(&object, set)
                .ok_or_else(|| corrupt(format!("it has no table of set `{}`", set.name)))?;
            let words = read(sys, &self.table(sys, set)?)?;
            if words != applied {
                changed.push((set, words));
            }
        }
        Ok(changed)
    }

    /// The table of a set.
    ///
    /// # Errors
    /// [`Error::Pin`] if what is pinned is not the table.
    pub fn table(&self, sys: &Sys, set: &SetManifest) -> Result<Map, Error> {
        let path = self.slot.map(self.generation, &set.map);
        let pin = |why: &str| Error::Pin { path: path.clone(), why: why.to_string() };
        let fd = attach::open_pin(sys, &path)?.ok_or_else(|| pin("it is gone"))?;
        let map = sys.map(fd).map_err(Error::disk(&path))?;
        if set.shape.verify(&set.name).is_empty() && map.info().value_bytes as usize == 8 * set.shape.words()
        {
            Ok(map)
        } else {
            Err(pin("it is not the table that the policy was applied with"))
        }
    }
}

/// The name of a set of a generation that was changed since it was applied, and whose elements an object does not have,
/// if there is one.
///
/// # Errors
/// What is kept about the generation can't be read, or the kernel refuses.
pub(crate) fn lost(
    sys: &Sys,
    slot: &Slot,
    generation: u32,
    object: &Object,
) -> Result<Option<String>, Error> {
    let sets = LiveSets::of(sys, slot.clone(), generation, None)?;
    let lost = sets.changed(sys)?.into_iter().find(|(set, words)| {
        let other = object.manifest.sets.iter().find(|other| other.name == set.name);
        let given = other.and_then(|other| Some(elements(other, &table_words(object, other)?)));
        given != Some(elements(set, words))
    });
    Ok(lost.map(|(set, _)| set.name.clone()))
}

/// The words of a set's table as an object has them.
fn table_words(object: &Object, set: &SetManifest) -> Option<Vec<u64>> {
    let map = object.maps.values().find(|map| map.name == set.map)?;
    let MapKind::Data { contents, .. } = &map.kind else { return None };
    let words = contents.chunks_exact(8);
    Some(words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect())
}

/// The elements of a table, ascending.
pub fn elements(set: &SetManifest, words: &[u64]) -> Vec<Pattern> {
    let mut patterns = Vec::new();
    set.shape.decode(words, &mut |pattern| patterns.push(pattern));
    patterns.sort_unstable();
    patterns.dedup();
    patterns
}

/// A table that is being read and changed.
#[derive(Debug)]
pub struct LiveTable<'a> {
    words: MapWords<'a>,
    name: String,
}

impl<'a> LiveTable<'a> {
    /// The table in a map of [`LiveSets::table`].
    ///
    /// # Errors
    /// Its memory can't be mapped.
    pub fn new(sys: &Sys, map: &'a Map) -> Result<LiveTable<'a>, Error> {
        let name = map.info().name.clone();
        let words = MapWords::new(sys, map).map_err(Error::call(format!("map table `{name}`")))?;
        Ok(LiveTable { words, name })
    }

    /// Makes the stores of a change. Every packet meets the table as it was before or as it is after.
    ///
    /// # Errors
    /// A word could not be read when the change was worked out, or a store can't be made.
    pub fn make(&self, sys: &Sys, stores: &[Store]) -> Result<(), Error> {
        self.check()?;
        let fail = || Error::call(format!("change table `{}`", self.name));
        for store in stores {
            match *store {
                Store::Word { at, value } => self.words.set(at, value).map_err(fail())?,
                Store::Wait => sys.wait_for_runs().map_err(fail())?,
                // Stores are seen in their order there.
                Store::Publish if cfg!(target_arch = "x86_64") => {}
                Store::Publish => sys.wait_for_runs().map_err(fail())?,
            }
        }
        Ok(())
    }

    /// Whether every word that was asked for could be read.
    ///
    /// # Errors
    /// It could not.
    pub fn check(&self) -> Result<(), Error> {
        match self.words.failure() {
            Some(source) => Err(Error::Call { what: format!("read table `{}`", self.name), source }),
            None => Ok(()),
        }
    }
}

impl Words for LiveTable<'_> {
    fn word(&self, at: usize) -> u64 {
        self.words.get(at)
    }
}

/// The words of a whole table, for reading all of it.
///
/// # Errors
/// The map can't be read.
pub fn read(sys: &Sys, map: &Map) -> Result<Vec<u64>, Error> {
    let fail = || Error::call(format!("read table `{}`", map.info().name));
    let bytes = sys.map_lookup(map, &0u32.to_ne_bytes()).map_err(fail())?.unwrap_or_default();
    Ok(bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect())
}
