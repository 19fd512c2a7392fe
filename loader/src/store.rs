//! Where polc keeps what it knows about applied policies, and how two polcs keep out of each other's way.
//!
//! ```text
//! BPFFS/polc/NETNS/eth0-xdp-4/                the slot's pins; who changes the slot has the directory locked
//! BPFFS/polc/NETNS/eth0-xdp-4/note            a symbolic link whose text is the state, in short
//! BPFFS/polc/NETNS/eth0-xdp-4/link            the link, the same for all generations
//! BPFFS/polc/NETNS/input-netfilter-4/dispatch the map of the programs that a hook goes on with
//! BPFFS/polc/NETNS/eth0-xdp-4/gen-7/prog      a generation's program
//! BPFFS/polc/NETNS/eth0-xdp-4/gen-7/map_NAME  and its maps
//! BPFFS/polc/NETNS/eth0-xdp-4/gen-7/wish      a symbolic link whose text says whose packets are reported
//! BPFFS/polc/NETNS/hooks-4/                   what netfilter hooks share; who changes one has the directory locked
//! BPFFS/polc/NETNS/clsact-2/                  says that polc made the qdisc of device 2
//! STATE/NETNS/eth0-xdp-4/state.json           the slot's state
//! STATE/NETNS/eth0-xdp-4/gen-7/object.o       a generation's object, and what its maker wants kept
//! ```
//!
//! Pins do not outlive the machine, so the state directory is one that does not either: `/run/polc`. Its files may be
//! lost, damaged, or have no room while the pins, which hold the programs, can't: so what a roll-back needs is noted
//! beside them, in what a bpffs takes besides BPF objects, directories and symbolic links. A rename puts a new note in
//! place of the old one at once. For the same reason locks are flock(2)s on directories of pins, and leave no files.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use polc_ir::env::Attach;
use polc_ir::hook::Family;

use crate::error::Error;
use crate::state::{SlotName, SlotState};
use crate::sys::Sys;

/// Where pins are kept unless the user names another bpffs.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";
/// Where state is kept unless the user names another directory.
pub const DEFAULT_STATE: &str = "/run/polc";

/// The calling thread's network namespace.
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// How long a polc that waits for another one to end does so.
pub const LOCK_WAIT: Duration = Duration::from_secs(10);
/// How long one does that does not wait. A process that another thread is about to start has copies of all descriptors
/// until it runs its own program (execve(2)), and so keeps a lock for a moment after it was dropped.
const LOCK_MOMENT: Duration = Duration::from_millis(100);
/// How often the directory of a lock is made again after another polc removed it.
const LOCK_TRIES: usize = 16;
const STATE_FILE: &str = "state.json";
/// bpffs takes no dots in names.
const NOTE: &str = "note";
const NEW_NOTE: &str = "note-new";
const QDISC_MARK: &str = "clsact-";
const HOOKS: &str = "hooks-";

/// The two directories that everything is kept under, for one network namespace.
#[derive(Clone, Debug)]
pub struct Store {
    bpffs: PathBuf,
    pins: PathBuf,
    state: PathBuf,
}

impl Store {
    /// The store of the calling thread's network namespace.
    pub fn new(bpffs: &Path, state: &Path) -> Result<Store, Error> {
        let namespace = std::fs::metadata(NAMESPACE).map_err(Error::disk(NAMESPACE))?;
        let inode = namespace.ino().to_string();
        Ok(Store {
            bpffs: bpffs.to_path_buf(),
            pins: bpffs.join("polc").join(&inode),
            state: state.join(&inode),
        })
    }

    /// The store of another network namespace, by its number.
    pub(crate) fn of_namespace(&self, namespace: u64) -> Store {
        let namespace = namespace.to_string();
        Store {
            bpffs: self.bpffs.clone(),
            pins: self.pins.with_file_name(&namespace),
            state: self.state.with_file_name(&namespace),
        }
    }

    /// Numbers of other network namespaces of which something is kept.
    pub(crate) fn other_namespaces(&self, sys: &Sys) -> Result<BTreeSet<u64>, Error> {
        let mut found = BTreeSet::new();
        for path in [&self.pins, &self.state] {
            let (own, all) = (path.file_name(), path.parent().expect("it was joined"));
            let names = sys.list(all).map_err(Error::disk(all))?;
            let others = names.iter().filter(|name| own != Some(name.as_ref()));
            found.extend(others.filter_map(|name| name.parse::<u64>().ok()));
        }
        Ok(found)
    }

    /// Removes what says that polc made qdiscs.
    pub(crate) fn remove_marks(&self, sys: &Sys) -> Result<(), Error> {
        for name in sys.list(&self.pins).map_err(Error::disk(&self.pins))? {
            if name.starts_with(QDISC_MARK) {
                let mark = self.pins.join(name);
                sys.remove_dir(&mark).map_err(Error::disk(&mark))?;
            }
        }
        Ok(())
    }

    /// Makes sure that there is a bpffs to pin in; mounts one if there is none.
    ///
    /// # Errors
    /// [`Error::NoBpffs`], also where a mount would hide files or end with the command.
    pub fn prepare(&self, sys: &Sys) -> Result<(), Error> {
        let unmounted =
            |error: io::Error| self.no_bpffs(sys, &format!(", and none can be mounted there: {error}"));
        if !self.bpffs.exists() {
            sys.make_dirs(&self.bpffs).map_err(unmounted)?;
        }
        if sys.is_bpffs(&self.bpffs).map_err(unmounted)? {
            return Ok(());
        }
        if !sys.list(&self.bpffs).map_err(unmounted)?.is_empty() {
            return Err(self.no_bpffs(sys, ", and to mount one there would hide its files"));
        }
        if sys.has_own_mounts() {
            return Err(
                self.no_bpffs(sys, ", and one that is mounted there by this process would end with it")
            );
        }
        sys.mount_bpffs(&self.bpffs).map_err(unmounted)
    }

    fn no_bpffs(&self, sys: &Sys, why: &str) -> Error {
        Error::NoBpffs { path: self.bpffs.clone(), why: why.to_string(), own_mounts: sys.has_own_mounts() }
    }

    /// A slot of the store.
    pub fn slot(&self, name: &SlotName) -> Slot {
        let directory = name.directory();
        Slot { name: name.clone(), pins: self.pins.join(&directory), state: self.state.join(&directory) }
    }

    /// The slots that have state, whatever has become of it, or pins, in order.
    ///
    /// # Errors
    /// The directories can't be listed, or pins can't be seen.
    pub fn names(&self, sys: &Sys) -> Result<Vec<SlotName>, Error> {
        let named = |path: &Path| -> Result<BTreeSet<SlotName>, Error> {
            let names = sys.list(path).map_err(Error::disk(path))?;
            Ok(names.iter().filter_map(|name| SlotName::of_directory(name)).collect())
        };
        let mut names = named(&self.state)?;
        // Without its pins what is applied would look as if it were not.
        if !names.is_empty() && !sys.is_bpffs(&self.bpffs).unwrap_or(false) {
            return Err(self.no_bpffs(sys, ", so what is applied here can't be seen"));
        }
        names.append(&mut named(&self.pins)?);
        Ok(names.into_iter().collect())
    }

    /// Numbers of the programs that all slots have pinned.
    ///
    /// # Errors
    /// The directories can't be listed, or the kernel does not tell.
    pub fn programs(&self, sys: &Sys) -> Result<BTreeSet<u32>, Error> {
        let mut found = BTreeSet::new();
        for name in self.names(sys)? {
            found.extend(self.slot(&name).programs(sys)?);
        }
        Ok(found)
    }

    /// Removes the store's directories if they are empty.
    pub fn tidy(&self, sys: &Sys) {
        // One that was locked is left by who was killed before removing it.
        let names = sys.list(&self.pins).unwrap_or_default();
        for hooks in names.iter().filter(|name| name.starts_with(HOOKS)).map(|name| self.pins.join(name)) {
            if sys.list(&hooks).is_ok_and(|pins| pins.is_empty())
                && let Ok(_lock) = sys.lock_file(&hooks, moment())
            {
                let _ = sys.remove_dir(&hooks);
            }
        }
        // Whoever finds them in use leaves them.
        for path in [&self.pins, &self.state] {
            let _ = sys.remove_dir(path);
        }
        let _ = sys.remove_dir(&self.bpffs.join("polc"));
    }
}

/// A slot's directories.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The slot.
    pub name: SlotName,
    pins: PathBuf,
    state: PathBuf,
}

/// Held while a slot is being changed, or its reports are watched.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Slot {
    /// Keeps every other polc from changing the slot until the result is dropped. Slots at hooks of one family have a lock
    /// in common: who needs several takes [`lock_all`].
    ///
    /// # Errors
    /// [`Error::Locked`] if another has it.
    pub fn lock(&self, sys: &Sys) -> Result<Lock, Error> {
        self.lock_until(sys, moment())
    }

    /// The same, waiting for whoever has it.
    ///
    /// # Errors
    /// [`Error::Locked`] if another has it all the time.
    pub fn lock_until(&self, sys: &Sys, until: Instant) -> Result<Lock, Error> {
        lock(sys, &self.locked(), until)
    }

    /// The directory that who changes the slot has locked.
    pub(crate) fn locked(&self) -> PathBuf {
        if self.name.attach == Attach::Netfilter { self.hooks() } else { self.pins.clone() }
    }

    /// Removes the directory that was locked, if nothing is in it.
    pub(crate) fn remove_locked(&self, sys: &Sys) {
        let _ = sys.remove_dir(&self.locked());
    }

    /// The directory of what the hooks of the slot's family share.
    fn hooks(&self) -> PathBuf {
        let family = if self.name.family == Family::V4 { 4 } else { 6 };
        self.pins.with_file_name(format!("{HOOKS}{family}"))
    }

    /// The pin of the word that says which of their programs packets meet at all hooks of the slot's family.
    pub(crate) fn hooks_word(&self) -> PathBuf {
        self.hooks().join("word")
    }

    /// The pin of the program that stands for none at a hook.
    pub(crate) fn hooks_none(&self) -> PathBuf {
        self.hooks().join("none")
    }

    /// The slots at other hooks of the family that have pins.
    pub(crate) fn at_other_hooks(&self, sys: &Sys) -> Result<Vec<Slot>, Error> {
        let all = self.pins.parent().expect("a slot is in a store");
        let names = sys.list(all).map_err(Error::disk(all))?;
        let beside = |name: &SlotName| {
            (name.attach, name.family) == (Attach::Netfilter, self.name.family) && *name != self.name
        };
        let names = names.iter().filter_map(|name| SlotName::of_directory(name)).filter(beside);
        Ok(names.map(|name| self.other(&name)).collect())
    }

    /// Numbers of the programs that the slot has pinned.
    fn programs(&self, sys: &Sys) -> Result<Vec<u32>, Error> {
        let mut found = Vec::new();
        for generation in self.generations_present(sys)? {
            // Another polc may be taking it away.
            let Ok(program) = sys.obj_get(&self.program(generation)) else { continue };
            let info = sys.prog_info(&program).map_err(Error::call("ask about a pinned program"))?;
            found.push(info.id);
        }
        Ok(found)
    }

    /// Numbers of the programs that the store's other slots have pinned.
    ///
    /// # Errors
    /// The directories can't be listed, or the kernel does not tell.
    pub(crate) fn programs_beside(&self, sys: &Sys) -> Result<BTreeSet<u32>, Error> {
        let all = self.pins.parent().expect("a slot is in a store");
        let mut found = BTreeSet::new();
        for name in sys.list(all).map_err(Error::disk(all))? {
            if let Some(name) = SlotName::of_directory(&name).filter(|name| *name != self.name) {
                found.extend(self.other(&name).programs(sys)?);
            }
        }
        Ok(found)
    }

    /// Keeps every other polc from watching a generation's reports until the result is dropped.
    ///
    /// # Errors
    /// [`Error::Watched`] if another does.
    pub fn lock_reports(&self, sys: &Sys, generation: u32) -> Result<Lock, Error> {
        let path = self.generation_pins(generation);
        let directory = sys.lock_file(&path, moment()).map_err(|source| match source.kind() {
            ErrorKind::WouldBlock => Error::Watched(self.name.to_string()),
            ErrorKind::NotFound => Error::NotApplied(self.name.to_string()),
            _ => Error::Disk { path, source },
        })?;
        Ok(Lock { _file: directory })
    }

    /// Another slot of the same store.
    pub(crate) fn other(&self, name: &SlotName) -> Slot {
        let directory = name.directory();
        let (pins, state) = (self.pins.with_file_name(&directory), self.state.with_file_name(&directory));
        Slot { name: name.clone(), pins, state }
    }

    /// The directory of the slot's pins.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// The directory of the slot's files.
    pub fn files(&self) -> &Path {
        &self.state
    }

    /// The pin of the link that all generations share.
    pub fn link(&self) -> PathBuf {
        self.pins.join("link")
    }

    /// The directory of a generation's pins.
    pub fn generation_pins(&self, generation: u32) -> PathBuf {
        self.pins.join(format!("gen-{generation}"))
    }

    /// The pin of a generation's program.
    pub fn program(&self, generation: u32) -> PathBuf {
        self.generation_pins(generation).join("prog")
    }

    /// The symbolic link whose text says whose packets a generation reports ([`crate::wish`]).
    pub(crate) fn wish(&self, generation: u32) -> PathBuf {
        self.generation_pins(generation).join("wish")
    }

    /// The pin of the map that holds the programs of a netfilter hook.
    pub fn dispatch(&self) -> PathBuf {
        self.pins.join("dispatch")
    }

    /// The directory that says whether polc made the qdisc of a device.
    pub fn qdisc_mark(&self, ifindex: u32) -> PathBuf {
        self.pins.with_file_name(format!("{QDISC_MARK}{ifindex}"))
    }

    /// The pin of a generation's map.
    pub fn map(&self, generation: u32, name: &str) -> PathBuf {
        self.generation_pins(generation).join(format!("map_{name}"))
    }

    /// The directory of a generation's files.
    pub fn generation_files(&self, generation: u32) -> PathBuf {
        self.state.join(format!("gen-{generation}"))
    }

    /// The state, if there is any. The note is written first, so of a change that waits, or was confirmed, it has the last
    /// word: the file may be from before, for want of room or because somebody put an old one back.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is damaged or another slot's, [`Error::Disk`] if it or the note can't be read.
    pub fn read(&self, sys: &Sys) -> Result<Option<SlotState>, Error> {
        let path = self.state.join(STATE_FILE);
        let Some(bytes) = sys.read(&path).map_err(Error::disk(&path))? else { return Ok(None) };
        let mut state = SlotState::read(&bytes, &self.name).map_err(|why| Error::Corrupt { path, why })?;
        if let Some(noted) = self.noted(sys)? {
            (state.intent, state.confirmed) = (noted.intent, noted.confirmed);
        }
        Ok(Some(state))
    }

    /// What the note beside the pins tells of the state, for when that is damaged or lost.
    ///
    /// # Errors
    /// The call failed. A note that can't be understood is none.
    pub fn noted(&self, sys: &Sys) -> Result<Option<SlotState>, Error> {
        Ok(self.note(sys)?.and_then(|text| SlotState::read(text.as_bytes(), &self.name).ok()))
    }

    /// The note's text.
    pub(crate) fn note(&self, sys: &Sys) -> Result<Option<String>, Error> {
        let path = self.pins.join(NOTE);
        sys.read_symlink(&path).map_err(Error::disk(&path))
    }

    /// What the state tells, or the note beside the pins where it is damaged or lost; `None` if neither does.
    ///
    /// # Errors
    /// The note can't be read.
    pub fn known(&self, sys: &Sys) -> Result<Option<SlotState>, Error> {
        match self.read(sys) {
            Ok(Some(state)) => Ok(Some(state)),
            Ok(None) | Err(_) => self.noted(sys),
        }
    }

    /// The failure that there are pins but no state.
    pub(crate) fn lost(&self) -> Error {
        Error::Corrupt {
            path: self.state.join(STATE_FILE),
            why: "it is not there, and what is applied is".into(),
        }
    }

    /// The failure that the state does not tell of what is applied, and the note does.
    pub(crate) fn outdated(&self) -> Error {
        Error::Corrupt {
            path: self.state.join(STATE_FILE),
            why: "it is from before what is applied, which the note beside the pins tells of".into(),
        }
    }

    /// Writes the state: whoever reads it later finds the old one or this one, whole.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn write(&self, sys: &Sys, state: &SlotState) -> Result<(), Error> {
        self.write_note(sys, state)?;
        self.write_file(sys, state)
    }

    /// Writes the state's file alone, where the note tells the same.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub(crate) fn write_file(&self, sys: &Sys, state: &SlotState) -> Result<(), Error> {
        let path = self.state.join(STATE_FILE);
        sys.make_dirs(&self.state).map_err(Error::disk(&self.state))?;
        sys.write_whole(&path, state.text().as_bytes()).map_err(Error::disk(&path))
    }

    /// Writes the note alone, which says what became of a change.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub(crate) fn write_note(&self, sys: &Sys, state: &SlotState) -> Result<(), Error> {
        let path = self.pins.join(NOTE);
        let noted = sys.write_symlink(&path, &self.pins.join(NEW_NOTE), &state.note());
        noted.map_err(Error::disk(&path))
    }

    /// Removes a generation's pins and files.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn remove_generation(&self, sys: &Sys, generation: u32) -> Result<(), Error> {
        let pins = self.generation_pins(generation);
        remove_pins(sys, &pins)?;
        sys.remove_dir(&pins).map_err(Error::disk(&pins))?;
        let files = self.generation_files(generation);
        sys.remove_tree(&files).map_err(Error::disk(&files))
    }

    /// The numbers of generations that have pins or files, whatever the state says.
    ///
    /// # Errors
    /// The directories can't be listed.
    pub fn generations_present(&self, sys: &Sys) -> Result<Vec<u32>, Error> {
        let mut found = Vec::new();
        for path in [&self.pins, &self.state] {
            for name in sys.list(path).map_err(Error::disk(path))? {
                found.extend(name.strip_prefix("gen-").and_then(|number| number.parse::<u32>().ok()));
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Removes everything of the slot's but its locked directory: pins first, which hold programs, whatever then keeps
    /// files from being removed.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn clear(&self, sys: &Sys) -> Result<(), Error> {
        for generation in self.generations_present(sys)? {
            let pins = self.generation_pins(generation);
            remove_pins(sys, &pins)?;
            sys.remove_dir(&pins).map_err(Error::disk(&pins))?;
        }
        remove_pins(sys, &self.pins)?;
        sys.remove_tree(&self.state).map_err(Error::disk(&self.state))
    }

    /// Removes everything of the slot's.
    ///
    /// # Errors
    /// [`Error::Disk`].
    pub fn remove(&self, sys: &Sys) -> Result<(), Error> {
        let cleared = self.clear(sys);
        let last = self.name.attach == Attach::Netfilter && self.at_other_hooks(sys)?.is_empty();
        let hooks = self.hooks();
        if last {
            remove_pins(sys, &hooks)?;
        }
        cleared.and(sys.remove_dir(&self.pins).map_err(Error::disk(&self.pins)))?;
        if last {
            sys.remove_dir(&hooks).map_err(Error::disk(&hooks))?;
        }
        Ok(())
    }
}

/// Locks of several slots.
pub type Locks = Vec<Lock>;

/// Keeps every other polc from changing any of these slots until the result is dropped; waits for `time` at most.
///
/// # Errors
/// [`Error::Locked`] if another has one all the time.
pub fn lock_all<'a>(
    sys: &Sys,
    slots: impl IntoIterator<Item = &'a Slot>,
    time: Duration,
) -> Result<Locks, Error> {
    let until = Instant::now() + time.max(LOCK_MOMENT);
    // In order, so that two that wait don't wait for each other.
    let directories: BTreeSet<PathBuf> = slots.into_iter().map(Slot::locked).collect();
    directories.iter().map(|directory| lock(sys, directory, until)).collect()
}

/// Keeps every other polc, wherever it keeps its files, from adding and removing qdiscs and filters of the network
/// namespace until the result is dropped; waits for them.
///
/// # Errors
/// [`Error::Locked`] if another has it all the time.
pub fn lock_qdiscs(sys: &Sys) -> Result<Lock, Error> {
    let locked = sys.lock_file(NAMESPACE.as_ref(), Instant::now() + LOCK_WAIT);
    locked.map(|file| Lock { _file: file }).map_err(|source| not_locked(NAMESPACE.as_ref(), source))
}

/// Until when one tries that does not wait for another polc.
fn moment() -> Instant {
    Instant::now() + LOCK_MOMENT
}

/// Locks a directory, which is made if it is not there.
fn lock(sys: &Sys, path: &Path, until: Instant) -> Result<Lock, Error> {
    let locked = || sys.make_dirs(path).and_then(|()| sys.lock_file(path, until));
    let mut tries = 0;
    loop {
        match locked() {
            Ok(directory) => return Ok(Lock { _file: directory }),
            // Whoever ends a slot takes its directories along, and may just have done so.
            Err(error) if error.kind() == ErrorKind::NotFound && tries < LOCK_TRIES => tries += 1,
            Err(source) => return Err(not_locked(path, source)),
        }
    }
}

/// Why a lock can't be had.
fn not_locked(path: &Path, source: io::Error) -> Error {
    match source.kind() {
        ErrorKind::WouldBlock => Error::Locked(path.into()),
        _ => Error::Disk { path: path.into(), source },
    }
}

/// Removes the pins in a directory, and the notes.
fn remove_pins(sys: &Sys, path: &Path) -> Result<(), Error> {
    for name in sys.list(path).map_err(Error::disk(path))? {
        let pin = path.join(name);
        sys.remove_file(&pin).map_err(Error::disk(&pin))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::state::{Generation, Intent, STATE_VERSION, Via};

    /// Directories of ordinary files do as well.
    fn slot(name: &str) -> (PathBuf, Slot) {
        let folder = std::env::temp_dir().join(format!("polc-{name}-{}", std::process::id()));
        let store = Store::new(&folder.join("pins"), &folder.join("state")).unwrap();
        let name =
            SlotName { device: Some("eth0".into()), attach: Attach::Xdp, hook: None, family: Family::V4 };
        (folder, store.slot(&name))
    }

    fn state(slot: &Slot) -> SlotState {
        let generation = Generation {
            program_id: 7,
            applied: 1,
            mode: None,
            source: "rules.v4".into(),
            carried: vec![(1, 2); 1_000],
            settled: true,
        };
        SlotState {
            version: STATE_VERSION,
            slot: slot.name.clone(),
            ifindex: 2,
            via: Via::Clsact { priority: 1 },
            generations: BTreeMap::from([(1, generation)]),
            intent: Some(Intent { from: None, to: Some(1), confirm: None, with: Vec::new() }),
            confirmed: None,
        }
    }

    #[test]
    fn damaged_state_is_told_from_none() {
        let (folder, slot) = slot("state");
        let (sys, state) = (Sys::new(), state(&slot));
        assert!(slot.read(&sys).unwrap().is_none());
        let _lock = slot.lock(&sys).unwrap();
        slot.write(&sys, &state).unwrap();
        assert_eq!(slot.read(&sys).unwrap(), Some(state.clone()));
        let path = slot.files().join(STATE_FILE);
        let bytes = std::fs::read(&path).unwrap();
        // The counters are most of it, and alike.
        for cut in (0..600).chain(bytes.len() - 600..bytes.len()) {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(matches!(slot.read(&sys), Err(Error::Corrupt { .. })), "cut at {cut}");
        }
        slot.write(&sys, &SlotState { version: 9, ..state }).unwrap();
        assert!(matches!(slot.read(&sys), Err(Error::Corrupt { .. })));
        slot.remove(&sys).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_going_back_needs_is_noted_beside_the_pins() {
        let (folder, slot) = slot("noted");
        let (sys, state) = (Sys::new(), state(&slot));
        let _lock = slot.lock(&sys).unwrap();
        assert_eq!(slot.noted(&sys).unwrap(), None);
        slot.write(&sys, &state).unwrap();
        std::fs::remove_dir_all(slot.files()).unwrap();
        let noted = slot.noted(&sys).unwrap().expect("it was noted");
        assert_eq!((noted.via, noted.ifindex, &noted.intent), (state.via, state.ifindex, &state.intent));
        assert_eq!(noted.generation_of(7), Some(1));
        // A path takes 4,096 bytes.
        assert!(noted.note().len() < 1_000, "{} bytes", noted.note().len());
        slot.remove(&sys).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn who_changes_a_slot_keeps_others_out() {
        let (folder, slot) = slot("locked");
        let sys = Sys::new();
        let lock = slot.lock(&sys).unwrap();
        assert!(matches!(slot.lock(&sys), Err(Error::Locked(_))));
        lock_qdiscs(&sys).unwrap();
        slot.remove(&sys).unwrap();
        // What is made anew is another directory.
        let again = slot.lock(&sys).unwrap();
        drop((lock, again));
        slot.remove(&sys).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
