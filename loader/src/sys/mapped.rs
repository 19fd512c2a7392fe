//! Maps' memory in the process: what programs read and write while they run, word by word.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bpf::Map;
use super::{Sys, checked};

/// Memory that a file is mapped to.
pub(super) struct Mapped {
    pub(super) at: NonNull<libc::c_void>,
    bytes: usize,
}

impl Mapped {
    pub(super) fn new(map: &Map, bytes: usize, offset: usize, protection: i32) -> io::Result<Mapped> {
        let fd = map.as_fd().as_raw_fd();
        // SAFETY: the kernel picks the address, so nothing that is in use is mapped over.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, offset as libc::off_t)
        };
        match NonNull::new(at) {
            Some(at) if at.as_ptr() != libc::MAP_FAILED => Ok(Mapped { at, bytes }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the memory was mapped by `new`, and references into it live no longer than `self`.
        unsafe { libc::munmap(self.at.as_ptr(), self.bytes) };
    }
}

/// Bytes of a page.
pub(super) fn page_bytes() -> io::Result<usize> {
    // SAFETY: the call touches no memory.
    Ok(checked(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })? as usize)
}

/// The value of a data map as 64-bit words, each read and written in one piece. Pages are mapped when first touched, so
/// that a change of a large table costs as little as one of a small one.
pub struct MapWords<'a> {
    map: &'a Map,
    page: usize,
    words: usize,
    pages: RefCell<BTreeMap<usize, Mapped>>,
    failed: Cell<Option<io::Error>>,
}

impl std::fmt::Debug for MapWords<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MapWords").field("map", self.map.info()).finish_non_exhaustive()
    }
}

impl<'a> MapWords<'a> {
    /// The words of an array of one value that may be mapped (`BPF_F_MMAPABLE`).
    pub fn new(sys: &Sys, map: &'a Map) -> io::Result<MapWords<'a>> {
        sys.enter("mmap")?;
        let words = map.info().value_bytes as usize / 8;
        Ok(MapWords {
            map,
            page: page_bytes()?,
            words,
            pages: RefCell::new(BTreeMap::new()),
            failed: Cell::new(None),
        })
    }

    /// How many words there are.
    pub fn count(&self) -> usize {
        self.words
    }

    /// A word; 0 if it can't be read, which [`Self::failure`] tells.
    ///
    /// # Panics
    /// Beyond the last word.
    pub fn get(&self, at: usize) -> u64 {
        self.with(at, |word| word.load(Ordering::Acquire)).unwrap_or(0)
    }

    /// Writes a word, behind all that was written before.
    ///
    /// # Errors
    /// Its page can't be mapped.
    ///
    /// # Panics
    /// Beyond the last word.
    pub fn set(&self, at: usize, value: u64) -> io::Result<()> {
        match self.with(at, |word| word.store(value, Ordering::Release)) {
            Some(()) => Ok(()),
            None => Err(self.failure().unwrap_or_else(|| io::Error::from(io::ErrorKind::Other))),
        }
    }

    /// Why a word could not be read, if one could not since this was last asked.
    pub fn failure(&self) -> Option<io::Error> {
        self.failed.take()
    }

    fn with<T>(&self, at: usize, act: impl FnOnce(&AtomicU64) -> T) -> Option<T> {
        assert!(at < self.words, "word {at} of {}", self.words);
        let (page, offset) = (at * 8 / self.page, at * 8 % self.page);
        let mut pages = self.pages.borrow_mut();
        let mapped = match pages.entry(page) {
            Entry::Occupied(mapped) => mapped.into_mut(),
            Entry::Vacant(vacant) => {
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                match Mapped::new(self.map, self.page, page * self.page, protection) {
                    Ok(mapped) => vacant.insert(mapped),
                    Err(error) => {
                        self.failed.set(Some(error));
                        return None;
                    }
                }
            }
        };
        // SAFETY: the page is mapped as long as `mapped` lives; the word is inside it, aligned, and both this process and
        // programs access it in one piece.
        let word = unsafe { mapped.at.byte_add(offset).cast::<AtomicU64>().as_ref() };
        Some(act(word))
    }
}
