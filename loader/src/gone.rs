//! Network namespaces that are gone, and what is kept of the policies that were applied in them.
//!
//! A device goes with its namespace, and so do programs on it, but pins and files stay. A pinned netfilter link even keeps
//! its namespace alive (net/netfilter/nf_bpf_link.c, `bpf_nf_link_attach`), with nobody left who could enter it. So links
//! are detached from outside, and everything else is removed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::attach;
use crate::error::Error;
use crate::store::Store;
use crate::sys::Sys;

/// Numbers of other network namespaces of which something is kept and to which nothing leads: no process that may be
/// asked is in them, and they are mounted nowhere.
///
/// # Errors
/// The directories can't be listed.
pub fn namespaces(sys: &Sys, store: &Store) -> Result<Vec<u64>, Error> {
    let mut kept = store.other_namespaces(sys)?;
    if !kept.is_empty() {
        let alive = alive().map_err(Error::call("look for network namespaces"))?;
        kept.retain(|namespace| !alive.contains(namespace));
    }
    Ok(kept.into_iter().collect())
}

/// Takes away what is kept of the policies in one of [`namespaces`]; their number.
///
/// # Errors
/// [`Error::NotApplied`] if it is none of them, or what could not be removed.
pub fn flush(sys: &Sys, store: &Store, namespace: u64) -> Result<usize, Error> {
    if !namespaces(sys, store)?.contains(&namespace) {
        return Err(Error::NotApplied(format!("in a network namespace {namespace} that is gone")));
    }
    let store = store.of_namespace(namespace);
    let names = store.names(sys)?;
    for name in &names {
        let slot = store.slot(name);
        let _lock = slot.lock(sys)?;
        if let Some(link) = attach::open_link(sys, &slot)? {
            match sys.link_detach(&link) {
                // The device is gone already.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                result => result.map_err(Error::call(format!("detach the program {name}")))?,
            }
        }
        slot.remove(sys)?;
    }
    store.remove_marks(sys)?;
    store.tidy(sys);
    Ok(names.len())
}

/// Numbers of the network namespaces that a process or a mount leads to.
fn alive() -> io::Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    // `42 32 0:4 net:[4026532281] /run/netns/blue rw - nsfs nsfs rw` (proc_pid_mountinfo(5)).
    let roots = mounts.lines().filter_map(|line| line.split(' ').nth(3));
    let number = |root: &str| root.strip_prefix("net:[")?.strip_suffix(']')?.parse::<u64>().ok();
    found.extend(roots.filter_map(number));
    for process in fs::read_dir("/proc")? {
        // Processes come and go, and what is no process has no threads.
        let Ok(threads) = fs::read_dir(process?.path().join("task")) else { continue };
        let namespace = |thread: &Path| fs::metadata(thread.join("ns/net")).map(|namespace| namespace.ino());
        found.extend(threads.flatten().filter_map(|thread| namespace(&thread.path()).ok()));
    }
    Ok(found)
}
