//! Reading a BPF ring buffer: its pages mapped into the process.
//!
//! The layout is that of kernel/bpf/ringbuf.c: a page with the consumer's position, which the reader writes, a page with
//! the producers', and the records, mapped twice in a row so that none is ever cut in two. A record starts with its
//! length, whose top bits say that it is still being written or was given up, and is padded to 8 bytes. This file is
//! the one consumer of a map, so positions only grow.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::Sys;
use super::bpf::Map;
use super::mapped::{Mapped, page_bytes};

/// `BPF_MAP_TYPE_RINGBUF` of `enum bpf_map_type`.
const RINGBUF: u32 = 27;
/// `BPF_RINGBUF_BUSY_BIT`: the record is being written.
const BUSY: u32 = 1 << 31;
/// `BPF_RINGBUF_DISCARD_BIT`: the record was given up.
const DISCARD: u32 = 1 << 30;
/// `BPF_RINGBUF_HDR_SZ`: bytes before a record.
const HEADER_BYTES: u64 = 8;

/// A ring buffer that is being read.
pub struct Ring<'a> {
    map: &'a Map,
    consumer: Mapped,
    /// The producers' page and, twice, the records.
    producer: Mapped,
    page: usize,
    /// The buffer's bytes, less one.
    mask: u64,
}

impl std::fmt::Debug for Ring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("map", self.map.info()).finish_non_exhaustive()
    }
}

impl<'a> Ring<'a> {
    /// Maps a ring buffer. There must be no other reader.
    pub fn new(sys: &Sys, map: &'a Map) -> io::Result<Ring<'a>> {
        sys.enter("ring")?;
        let bytes = map.info().max_entries as usize;
        if map.info().map_type != RINGBUF || !bytes.is_power_of_two() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let page = page_bytes()?;
        Ok(Ring {
            map,
            consumer: Mapped::new(map, page, 0, libc::PROT_READ | libc::PROT_WRITE)?,
            producer: Mapped::new(map, page + 2 * bytes, page, libc::PROT_READ)?,
            page,
            mask: bytes as u64 - 1,
        })
    }

    fn consumer_position(&self) -> &AtomicU64 {
        // SAFETY: the page starts with the position, aligned, and lives as long as `self`; the kernel too accesses it
        // atomically.
        unsafe { self.consumer.at.cast::<AtomicU64>().as_ref() }
    }

    fn producer_position(&self) -> u64 {
        // SAFETY: as above, for the second page.
        unsafe { self.producer.at.cast::<AtomicU64>().as_ref() }.load(Ordering::Acquire)
    }

    /// The next record, if one is there; it is taken out of the buffer when `read` returns.
    pub fn take<T>(&mut self, mut read: impl FnMut(&[u8]) -> T) -> Option<T> {
        loop {
            let position = self.consumer_position().load(Ordering::Relaxed);
            if position >= self.producer_position() {
                return None;
            }
            let at = self.page + (position & self.mask) as usize;
            // SAFETY: records start at multiples of 8 within the first copy of the buffer, so their length is inside
            // the mapping and aligned.
            let header = unsafe { self.producer.at.byte_add(at).cast::<AtomicU32>().as_ref() };
            let header = header.load(Ordering::Acquire);
            if header & BUSY != 0 {
                return None;
            }
            let bytes = u64::from(header & !(BUSY | DISCARD));
            let next = position + (HEADER_BYTES + bytes).next_multiple_of(8);
            let record = (header & DISCARD == 0 && bytes <= self.mask).then(|| {
                let start = at + HEADER_BYTES as usize;
                // SAFETY: the record starts in the first copy and is shorter than a copy, so it ends in the second at
                // the latest. No program writes to it before the position below passes it.
                unsafe {
                    std::slice::from_raw_parts(
                        self.producer.at.byte_add(start).cast::<u8>().as_ptr(),
                        bytes as usize,
                    )
                }
            });
            let result = record.map(&mut read);
            self.consumer_position().store(next, Ordering::Release);
            if result.is_some() {
                return result;
            }
        }
    }
}

impl AsFd for Ring<'_> {
    /// What can be read once there is a record.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}
