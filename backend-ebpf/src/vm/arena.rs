//! The one block of memory that a checked program may touch besides its stack.
//!
//! rbpf knows a program's memory by address: two slices for context and packet, and a set of further ranges that it
//! scans for every access and compares with the access's first byte only. So everything lives in one allocation that
//! never moves, map values lie together in one range, and a guard behind them absorbs the rest of an access that
//! starts on the last byte. Addresses are plain `u64`, as the program sees them.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;

/// Bytes before the context, so that no address in the arena is near another allocation.
const MARGIN_BYTES: usize = 64;

/// A block of zeroed memory with interior mutability: programs, helpers and the host all write to it.
pub(crate) struct Arena {
    words: Box<[UnsafeCell<u64>]>,
    used: usize,
}

impl Arena {
    /// An arena of that many bytes, all zero; pages are only touched when written.
    pub(crate) fn new(bytes: usize) -> Arena {
        let words = vec![0u64; bytes.div_ceil(8) + 2 * MARGIN_BYTES / 8].into_boxed_slice();
        // SAFETY: `UnsafeCell<u64>` has the layout of `u64` (`repr(transparent)`), and the box is owned.
        let words = unsafe { Box::from_raw(Box::into_raw(words) as *mut [UnsafeCell<u64>]) };
        Arena { words, used: MARGIN_BYTES }
    }

    /// Sets aside `bytes`, aligned to 8; the address. Asking for more than the arena was made for is a bug.
    pub(crate) fn take(&mut self, bytes: usize) -> u64 {
        let at = self.used;
        self.used += bytes.next_multiple_of(8);
        assert!(
            self.used + MARGIN_BYTES <= self.words.len() * 8,
            "an arena is made for what is taken from it"
        );
        self.words.as_ptr() as u64 + at as u64
    }

    fn offset(&self, address: u64, bytes: usize) -> usize {
        let offset = address.wrapping_sub(self.words.as_ptr() as u64) as usize;
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.words.len() * 8), "an access inside the arena");
        offset
    }

    /// The `bytes` at `address`, to read. No program may run while the slice is in use.
    pub(crate) fn slice(&self, address: u64, bytes: usize) -> &[u8] {
        let offset = self.offset(address, bytes);
        // SAFETY: inside the allocation (checked by `offset`), initialised since made of zeros, and any byte is a
        // `u8`. Writers are `copy_in` and `fill`, which need `&mut self`, and programs; `Vm` hands the slice out
        // under `&self` and runs programs under `&mut self`. The slices given to rbpf itself are the exception: it
        // uses their addresses and lengths and reads memory through pointers only.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>().add(offset), bytes) }
    }

    /// Writes bytes from the host.
    pub(crate) fn copy_in(&mut self, address: u64, bytes: &[u8]) {
        let offset = self.offset(address, bytes.len());
        // SAFETY: inside the allocation (checked by `offset`), and `bytes` is borrowed while `self` is exclusive, so
        // they don't overlap.
        unsafe {
            let to = UnsafeCell::raw_get(self.words.as_ptr()).cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Zeroes a range.
    pub(crate) fn clear(&mut self, address: u64, bytes: usize) {
        let offset = self.offset(address, bytes);
        // SAFETY: inside the allocation (checked by `offset`), and `self` is exclusive.
        unsafe { UnsafeCell::raw_get(self.words.as_ptr()).cast::<u8>().add(offset).write_bytes(0, bytes) };
    }
}
