//! What polc keeps about an applied policy: where, as which files and pins, and what it was about to do.
//!
//! A *slot* is a place that one policy can be applied to: an attach point of a device for one address family, in one
//! network namespace. A *generation* is one applied object. The kernel is the truth: a slot's generation is the one whose
//! program is attached, whatever the file says. So no two things ever have to change at once, and whoever comes after a
//! crash only asks the kernel which generation won and removes the rest ([`crate::swap`]).
//!
//! ```text
//! BPFFS/polc/NETNS/eth0-xdp-4/link            the link, the same for all generations
//! BPFFS/polc/NETNS/input-netfilter-4/dispatch the map that says which generation's program a hook goes on with
//! BPFFS/polc/NETNS/eth0-xdp-4/gen-7/prog      a generation's program
//! BPFFS/polc/NETNS/eth0-xdp-4/gen-7/map_NAME  and its maps
//! STATE/NETNS/eth0-xdp-4/state.json           this file's `SlotState`
//! STATE/NETNS/eth0-xdp-4/gen-7/object.o       a generation's object, and what its maker wants kept
//! ```
//!
//! Pins do not outlive the machine, so the state directory is one that does not either: `/run/polc`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use polc_ir::env::{Attach, Mode};
use polc_ir::hook::{Family, Hook};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::sys::Sys;

/// Where pins are kept unless the user names another bpffs.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";
/// Where state is kept unless the user names another directory.
pub const DEFAULT_STATE: &str = "/run/polc";
/// Version of the state file. A file of another version is not touched.
pub const STATE_VERSION: u32 = 1;

/// A place that one policy can be applied to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotName {
    /// The device; none for hooks, which see those of all devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The attach point.
    pub attach: Attach,
    /// The hook of a netfilter program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<Hook>,
    /// The family whose packets it decides.
    pub family: Family,
}

impl SlotName {
    /// The name of its directories. bpffs takes no dots in names.
    pub fn directory(&self) -> String {
        let place = match (&self.device, self.hook) {
            (Some(device), _) => device.replace('%', "%25").replace('.', "%2e"),
            (None, Some(hook)) => hook.to_string(),
            (None, None) => "all".to_string(),
        };
        format!("{place}-{}-{}", self.attach, if self.family == Family::V4 { 4 } else { 6 })
    }

    /// The slot whose directories have a name, if it is one of [`Self::directory`].
    fn of_directory(directory: &str) -> Option<SlotName> {
        let (rest, family) = directory.rsplit_once('-')?;
        let family = match family {
            "4" => Family::V4,
            "6" => Family::V6,
            _ => return None,
        };
        let places = [Attach::Xdp, Attach::TcIngress, Attach::TcEgress, Attach::Netfilter];
        let (place, attach) = places.into_iter().find_map(|attach| {
            let place = rest.strip_suffix(&attach.to_string())?.strip_suffix('-')?;
            Some((place, attach))
        })?;
        let name = if attach == Attach::Netfilter {
            let hook = Hook::ALL.into_iter().find(|hook| hook.to_string() == place);
            SlotName { device: None, attach, hook, family }
        } else {
            let device = place.replace("%2e", ".").replace("%25", "%");
            SlotName { device: Some(device), attach, hook: None, family }
        };
        (name.directory() == directory).then_some(name)
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {}", self.attach)?;
        if let Some(hook) = self.hook {
            write!(f, " {hook}")?;
        }
        if let Some(device) = &self.device {
            write!(f, " of `{device}`")?;
        }
        write!(f, " for {}", self.family)
    }
}

/// How a generation's program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// By a link that all generations share.
    Link,
    /// By a filter on the `clsact` qdisc.
    Clsact {
        /// The filter's priority.
        priority: u16,
        /// Whether polc made the qdisc, and has to remove it.
        own_qdisc: bool,
    },
    /// By a link that all generations share, to a program that goes on with the current one's ([`crate::dispatch`]).
    Dispatch {
        /// The link's priority among the hook's functions.
        priority: i32,
        /// Whether fragments are reassembled first.
        defrag: bool,
    },
}

/// One applied object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Generation {
    /// The program's number in the kernel.
    pub program_id: u32,
    /// When it was applied, in seconds since 1970.
    pub applied: u64,
    /// How it is deployed.
    pub mode: Option<Mode>,
    /// What it was compiled from, for people.
    pub source: String,
    /// Packets and bytes to add to what the program counted, by the manifest's `counted`: what earlier generations
    /// counted for the same rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<(u64, u64)>,
    /// Whether `carried` is final. Until then the generation before is kept.
    #[serde(default)]
    pub settled: bool,
}

/// A change that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Intent {
    /// The generation attached before; none if nothing was.
    pub from: Option<u32>,
    /// The one to be attached; none to attach nothing.
    pub to: Option<u32>,
    /// When to go back unless confirmed; none if the change needs no confirmation.
    pub confirm: Option<Confirm>,
}

/// A change that goes back by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Confirm {
    /// When it goes back, in milliseconds since boot.
    pub deadline_ms: u64,
    /// Tells this change from every other.
    pub token: String,
}

/// What is kept about a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// The slot.
    pub slot: SlotName,
    /// Number of the device when it was attached.
    pub ifindex: u32,
    /// How it is attached.
    pub via: Via,
    /// Its generations: the one attached, and those about to come or go.
    pub generations: BTreeMap<u32, Generation>,
    /// A change that was begun and not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intent: Option<Intent>,
}

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
        let namespace = "/proc/thread-self/ns/net";
        let inode = std::fs::metadata(namespace).map_err(Error::disk(namespace))?.ino().to_string();
        Ok(Store {
            bpffs: bpffs.to_path_buf(),
            pins: bpffs.join("polc").join(&inode),
            state: state.join(&inode),
        })
    }

    /// Makes sure that there is a bpffs to pin in; mounts one if there is none.
    pub fn prepare(&self, sys: &Sys) -> Result<(), Error> {
        let no_bpffs = |source| Error::NoBpffs { path: self.bpffs.clone(), source };
        if !self.bpffs.exists() {
            sys.make_dirs(&self.bpffs).map_err(no_bpffs)?;
        }
        if !sys.is_bpffs(&self.bpffs).map_err(no_bpffs)? {
            sys.mount_bpffs(&self.bpffs).map_err(no_bpffs)?;
        }
        sys.make_dirs(&self.state).map_err(Error::disk(&self.state))
    }

    /// A slot of the store.
    pub fn slot(&self, name: &SlotName) -> Slot {
        let directory = name.directory();
        Slot { name: name.clone(), pins: self.pins.join(&directory), state: self.state.join(&directory) }
    }

    /// The slots with state, in the order of their directories' names.
    pub fn slots(&self, sys: &Sys) -> Result<Vec<(Slot, SlotState)>, Error> {
        let mut found = Vec::new();
        for name in sys.list(&self.state).map_err(Error::disk(&self.state))? {
            if name.ends_with(LOCK_SUFFIX) {
                continue;
            }
            let path = self.state.join(&name).join(STATE_FILE);
            if let Some(state) = read_state(sys, &path)? {
                found.push((self.slot(&state.slot), state));
            }
        }
        Ok(found)
    }

    /// The slots that have state, whatever has become of it, or pins, in order.
    ///
    /// # Errors
    /// The directories can't be listed.
    pub fn names(&self, sys: &Sys) -> Result<Vec<SlotName>, Error> {
        let mut names = BTreeSet::new();
        for path in [&self.state, &self.pins] {
            names.extend(sys.list(path).map_err(Error::disk(path))?);
        }
        Ok(names.iter().filter_map(|name| SlotName::of_directory(name)).collect())
    }

    /// Removes the store's directories if they are empty.
    pub fn tidy(&self, sys: &Sys) {
        // Whoever finds them in use leaves them.
        for path in [&self.pins, &self.state] {
            let _ = sys.remove_dir(path);
        }
        let _ = sys.remove_dir(&self.bpffs.join("polc"));
    }
}

/// How often the directory of a lock is made again after another polc removed it.
const LOCK_TRIES: usize = 16;
const STATE_FILE: &str = "state.json";
/// Slots' directories have no dots in their names.
const LOCK_SUFFIX: &str = ".lock";

/// Held by whoever watches a slot's reports.
const REPORTS_LOCK: &str = "reports.lock";

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
    /// Keeps every other polc from changing the slot until the result is dropped.
    ///
    /// # Errors
    /// [`Error::Locked`] if another has it, and `wait` is not given.
    pub fn lock(&self, sys: &Sys, wait: bool) -> Result<Lock, Error> {
        let make = || sys.make_dirs(&self.state).map_err(Error::disk(&self.state));
        let path = self.state.with_extension("lock");
        let mut tries = 0;
        let file = loop {
            make()?;
            match sys.lock_file(&path, wait) {
                Ok(file) => break file,
                // Whoever ends a slot takes its directories along, and may just have done so.
                Err(error) if error.kind() == ErrorKind::NotFound && tries < LOCK_TRIES => tries += 1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(Error::Locked(path)),
                Err(source) => return Err(Error::Disk { path, source }),
            }
        };
        make()?;
        Ok(Lock { _file: file })
    }

    /// Keeps every other polc from watching the slot's reports until the result is dropped.
    ///
    /// # Errors
    /// [`Error::Watched`] if another does.
    pub fn lock_reports(&self, sys: &Sys) -> Result<Lock, Error> {
        let path = self.state.join(REPORTS_LOCK);
        let file = sys.lock_file(&path, false).map_err(|source| match source.kind() {
            ErrorKind::WouldBlock => Error::Watched(self.name.to_string()),
            _ => Error::Disk { path, source },
        })?;
        Ok(Lock { _file: file })
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

    /// The pin of the map that holds the current program of a netfilter hook.
    pub fn dispatch(&self) -> PathBuf {
        self.pins.join("dispatch")
    }

    /// The pin of a generation's map.
    pub fn map(&self, generation: u32, name: &str) -> PathBuf {
        self.generation_pins(generation).join(format!("map_{name}"))
    }

    /// The directory of a generation's files.
    pub fn generation_files(&self, generation: u32) -> PathBuf {
        self.state.join(format!("gen-{generation}"))
    }

    /// The state, if there is any.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn read(&self, sys: &Sys) -> Result<Option<SlotState>, Error> {
        read_state(sys, &self.state.join(STATE_FILE))
    }

    /// Writes the state: whoever reads it later finds the old one or this one, whole.
    pub fn write(&self, sys: &Sys, state: &SlotState) -> Result<(), Error> {
        let path = self.state.join(STATE_FILE);
        let text = serde_json::to_vec_pretty(state).expect("plain data serializes");
        sys.write_whole(&path, &text).map_err(Error::disk(&path))
    }

    /// Removes a generation's pins and files.
    pub fn remove_generation(&self, sys: &Sys, generation: u32) -> Result<(), Error> {
        let pins = self.generation_pins(generation);
        remove_pins(sys, &pins)?;
        let files = self.generation_files(generation);
        sys.remove_tree(&files).map_err(Error::disk(&files))
    }

    /// The numbers of generations that have pins or files, whatever the state says.
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

    /// Removes the state file alone.
    pub fn remove_state(&self, sys: &Sys) -> Result<(), Error> {
        let path = self.state.join(STATE_FILE);
        sys.remove_file(&path).map_err(Error::disk(&path))
    }

    /// Removes everything of the slot's but its lock.
    pub fn remove_all_but_lock(&self, sys: &Sys) -> Result<(), Error> {
        for generation in self.generations_present(sys)? {
            self.remove_generation(sys, generation)?;
        }
        remove_pins(sys, &self.pins)?;
        sys.remove_tree(&self.state).map_err(Error::disk(&self.state))
    }

    /// Removes everything of the slot's.
    pub fn remove(&self, sys: &Sys) -> Result<(), Error> {
        self.remove_all_but_lock(sys)?;
        let lock = self.state.with_extension("lock");
        sys.remove_file(&lock).map_err(Error::disk(&lock))
    }
}

/// Removes a directory of pins. Pins are files; there are no directories in it by now.
fn remove_pins(sys: &Sys, path: &Path) -> Result<(), Error> {
    for name in sys.list(path).map_err(Error::disk(path))? {
        let pin = path.join(name);
        sys.remove_file(&pin).map_err(Error::disk(&pin))?;
    }
    sys.remove_dir(path).map_err(Error::disk(path))
}

fn read_state(sys: &Sys, path: &Path) -> Result<Option<SlotState>, Error> {
    let Some(bytes) = sys.read(path).map_err(Error::disk(path))? else { return Ok(None) };
    let corrupt = |why: String| Error::Corrupt { path: path.to_path_buf(), why };
    let state: SlotState = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    if state.version != STATE_VERSION {
        return Err(corrupt(format!(
            "it has version {}, and this polc reads {STATE_VERSION}",
            state.version
        )));
    }
    Ok(Some(state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(device: &str) -> SlotName {
        SlotName { device: Some(device.into()), attach: Attach::Xdp, hook: None, family: Family::V4 }
    }

    #[test]
    fn directories_name_their_slots() {
        let of = |device: Option<&str>, attach, hook, family| SlotName {
            device: device.map(String::from),
            attach,
            hook,
            family,
        };
        for name in [
            of(Some("eth0"), Attach::Xdp, None, Family::V4),
            of(Some("a-tc-ingress-4"), Attach::TcEgress, None, Family::V6),
            of(Some("eth0.7%2e"), Attach::TcIngress, None, Family::V4),
            of(None, Attach::Netfilter, Some(Hook::Forward), Family::V6),
            of(None, Attach::Netfilter, None, Family::V4),
        ] {
            assert_eq!(SlotName::of_directory(&name.directory()), Some(name));
        }
        for other in ["eth0-xdp-4.lock", "eth0-xdp", "eth0-tap-4", "nowhere-netfilter-4", "eth0.1-xdp-4"] {
            assert_eq!(SlotName::of_directory(other), None, "{other}");
        }
    }

    #[test]
    fn directories_have_no_dots_and_stay_apart() {
        assert_eq!(name("eth0").directory(), "eth0-xdp-4");
        assert_eq!(name("eth0.5").directory(), "eth0%2e5-xdp-4");
        assert_ne!(name("eth0%2e5").directory(), name("eth0.5").directory());
    }

    #[test]
    fn damaged_state_is_told_from_none() {
        let folder = std::env::temp_dir().join(format!("polc-state-{}", std::process::id()));
        let store = Store::new(&folder, &folder).unwrap();
        let (sys, slot) = (Sys::new(), store.slot(&name("eth0")));
        assert!(slot.read(&sys).unwrap().is_none());
        sys.make_dirs(slot.files()).unwrap();
        let state = SlotState {
            version: STATE_VERSION,
            slot: name("eth0"),
            ifindex: 2,
            via: Via::Clsact { priority: 1, own_qdisc: true },
            generations: BTreeMap::new(),
            intent: Some(Intent { from: None, to: Some(1), confirm: None }),
        };
        slot.write(&sys, &state).unwrap();
        assert_eq!(slot.read(&sys).unwrap(), Some(state.clone()));
        let path = slot.files().join(STATE_FILE);
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(matches!(slot.read(&sys), Err(Error::Corrupt { .. })), "cut at {cut}");
        }
        slot.write(&sys, &SlotState { version: 9, ..state }).unwrap();
        assert!(matches!(slot.read(&sys), Err(Error::Corrupt { .. })));
        slot.remove(&sys).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
