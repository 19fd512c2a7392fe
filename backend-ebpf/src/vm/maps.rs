//! Maps, emulated: where each value lives in the arena and how keys find it.
//!
//! Arrays and hash tables behave as kernel/bpf/arraymap.c and hashtab.c do for one CPU. A per-CPU map has one value
//! an index here, as if there were one CPU. A value's address never changes while it is in the map.

use std::collections::BTreeMap;

use polc_ir::entities::Map;
use polc_ir::limits::VM_MAP_BYTES_MAX;

use super::VmError;
use super::arena::Arena;
use crate::object::{MapDef, MapKind, MapType, Object};

/// `BPF_NOEXIST` and `BPF_EXIST` of map updates.
const NOEXIST: u64 = 1;
const EXIST: u64 = 2;

const ENOENT: i64 = 2;
const E2BIG: i64 = 7;
const EEXIST: i64 = 17;
const EINVAL: i64 = 22;
const EAGAIN: i64 = 11;

/// What a ring buffer puts before each record (include/uapi/linux/bpf.h, `BPF_RINGBUF_HDR_SZ`).
const RING_HEADER_BYTES: usize = 8;

/// Bytes of bookkeeping for an entry of a hash table or program array, at most.
const ENTRY_BYTES: usize = 64;

/// How keys find values.
enum Lookup {
    /// The key is a `u32` index.
    Array,
    /// The key is looked up; free slots are taken from the end of the list.
    Hash { slots: BTreeMap<Vec<u8>, u32>, free: Vec<u32> },
    /// No values: programs by index.
    Programs(Vec<Option<usize>>),
    /// No values: records that nobody took yet, and the bytes they take.
    Ring { records: Vec<Vec<u8>>, used: usize },
}

/// One emulated map.
pub(crate) struct MapState {
    pub(crate) key_bytes: usize,
    pub(crate) value_bytes: usize,
    /// Distance between values.
    stride: usize,
    pub(crate) entries: u32,
    /// Address of the first value.
    pub(crate) base: u64,
    lookup: Lookup,
}

impl MapState {
    /// Makes the map, its contents as when just loaded. `arena` is fresh, so what is zero is not touched.
    pub(crate) fn new(def: &MapDef, arena: &mut Arena) -> Result<MapState, VmError> {
        let unsupported = || VmError::UnsupportedMap { map: def.name.clone() };
        let (key_bytes, value_bytes, entries) = sizes(def);
        let lookup = match &def.kind {
            MapKind::Data { .. } => Lookup::Array,
            MapKind::Declared { map_type, .. } => match *map_type {
                MapType::ARRAY | MapType::PERCPU_ARRAY if key_bytes == 4 => Lookup::Array,
                MapType::HASH | MapType::PERCPU_HASH => {
                    Lookup::Hash { slots: BTreeMap::new(), free: (0..entries).rev().collect() }
                }
                MapType::RINGBUF => Lookup::Ring { records: Vec::new(), used: 0 },
                MapType::PROG_ARRAY => Lookup::Programs(vec![None; entries as usize]),
                _ => return Err(unsupported()),
            },
        };
        let stride = value_bytes.next_multiple_of(8);
        let base = arena.take(stride * entries as usize);
        if let Some(contents) = def.contents() {
            arena.copy_in(base, contents);
        }
        Ok(MapState { key_bytes, value_bytes, stride, entries, base, lookup })
    }

    /// Puts the contents back to what they are when just loaded. Programs stay.
    pub(crate) fn reset(&mut self, def: &MapDef, arena: &mut Arena) {
        match def.contents() {
            Some(contents) => arena.copy_in(self.base, contents),
            None => arena.clear(self.base, self.stride * self.entries as usize),
        }
        match &mut self.lookup {
            Lookup::Hash { slots, free } => {
                slots.clear();
                *free = (0..self.entries).rev().collect();
            }
            Lookup::Ring { records, used } => {
                records.clear();
                *used = 0;
            }
            Lookup::Array | Lookup::Programs(_) => {}
        }
    }

    fn value_at(&self, slot: u32) -> u64 {
        self.base + slot as u64 * self.stride as u64
    }

    /// The address of the value for `key`, `key_bytes` long.
    pub(crate) fn lookup(&self, key: &[u8]) -> Option<u64> {
        match &self.lookup {
            Lookup::Array => {
                index(key).filter(|index| *index < self.entries).map(|index| self.value_at(index))
            }
            Lookup::Hash { slots, .. } => slots.get(key).map(|slot| self.value_at(*slot)),
            Lookup::Programs(_) | Lookup::Ring { .. } => None,
        }
    }

    /// Finds or makes room for the value of `key`; the address to write it to, or `-errno`.
    pub(crate) fn update(&mut self, key: &[u8], flags: u64) -> Result<u64, i64> {
        if flags > EXIST {
            return Err(-EINVAL);
        }
        let (base, stride) = (self.base, self.stride as u64);
        match &mut self.lookup {
            Lookup::Array => match index(key) {
                Some(index) if index >= self.entries => Err(-E2BIG),
                Some(_) if flags == NOEXIST => Err(-EEXIST),
                Some(index) => Ok(self.value_at(index)),
                None => Err(-EINVAL),
            },
            Lookup::Hash { slots, free } => {
                let slot = match slots.get(key) {
                    Some(_) if flags == NOEXIST => return Err(-EEXIST),
                    Some(slot) => *slot,
                    None if flags == EXIST => return Err(-ENOENT),
                    None => {
                        let slot = free.pop().ok_or(-E2BIG)?;
                        slots.insert(key.to_vec(), slot);
                        slot
                    }
                };
                Ok(base + u64::from(slot) * stride)
            }
            Lookup::Programs(_) | Lookup::Ring { .. } => Err(-EINVAL),
        }
    }

    /// Removes `key`; 0 or `-errno`.
    pub(crate) fn delete(&mut self, key: &[u8]) -> i64 {
        match &mut self.lookup {
            Lookup::Hash { slots, free } => match slots.remove(key) {
                Some(slot) => {
                    free.push(slot);
                    0
                }
                None => -ENOENT,
            },
            Lookup::Array | Lookup::Programs(_) | Lookup::Ring { .. } => -EINVAL,
        }
    }

    /// Appends a record to a ring buffer, or gives `-errno`. Like the kernel's, the buffer is full when less than a
    /// header of 8 bytes and the record, rounded up to 8, and one byte more are free (kernel/bpf/ringbuf.c,
    /// `__bpf_ringbuf_reserve`).
    pub(crate) fn append(&mut self, record: Vec<u8>) -> Result<(), i64> {
        let Lookup::Ring { records, used } = &mut self.lookup else { return Err(-EINVAL) };
        let bytes = RING_HEADER_BYTES + record.len().next_multiple_of(8);
        if *used + bytes >= self.entries as usize {
            return Err(-EAGAIN);
        }
        *used += bytes;
        records.push(record);
        Ok(())
    }

    /// Takes the records of a ring buffer, which is empty then.
    pub(crate) fn take_records(&mut self) -> Vec<Vec<u8>> {
        match &mut self.lookup {
            Lookup::Ring { records, used } => {
                *used = 0;
                std::mem::take(records)
            }
            _ => Vec::new(),
        }
    }

    /// The program that a tail call to `index` reaches.
    pub(crate) fn program(&self, index: u32) -> Option<usize> {
        match &self.lookup {
            Lookup::Programs(programs) => programs.get(index as usize).copied().flatten(),
            _ => None,
        }
    }

    /// Sets the program at `index`; whether the map has such a place.
    pub(crate) fn set_program(&mut self, index: u32, program: usize) -> bool {
        match &mut self.lookup {
            Lookup::Programs(programs) => match programs.get_mut(index as usize) {
                Some(place) => {
                    *place = Some(program);
                    true
                }
                None => false,
            },
            _ => false,
        }
    }
}

/// Bytes of key and value, and entries.
fn sizes(def: &MapDef) -> (usize, usize, u32) {
    match &def.kind {
        MapKind::Data { contents, .. } => (4, contents.len(), 1),
        MapKind::Declared { map_type: MapType::PROG_ARRAY, max_entries, .. } => (4, 0, *max_entries),
        MapKind::Declared { map_type: MapType::RINGBUF, max_entries, .. } => (0, 0, *max_entries),
        MapKind::Declared { key_bytes, value_bytes, max_entries, .. } => {
            (*key_bytes as usize, *value_bytes as usize, *max_entries)
        }
    }
}

fn index(key: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(key.try_into().ok()?))
}

/// Bytes of arena for all maps of an object.
pub(crate) fn arena_bytes(object: &Object) -> Result<usize, VmError> {
    let (mut arena, mut all) = (0usize, 0usize);
    for def in object.maps.values() {
        let (_, value, entries) = sizes(def);
        let values = value.next_multiple_of(8).saturating_mul(entries as usize);
        let bookkeeping = match def.kind {
            MapKind::Data { .. } => 0,
            MapKind::Declared { map_type: MapType::RINGBUF, .. } => 4 * entries as usize,
            MapKind::Declared { .. } if is_array(def) => 0,
            MapKind::Declared { .. } => ENTRY_BYTES.saturating_mul(entries as usize),
        };
        all = all.saturating_add(values).saturating_add(bookkeeping);
        if all > VM_MAP_BYTES_MAX {
            return Err(VmError::TooLarge { map: def.name.clone() });
        }
        arena += values;
    }
    Ok(arena)
}

fn is_array(def: &MapDef) -> bool {
    matches!(def.kind, MapKind::Declared { map_type: MapType::ARRAY | MapType::PERCPU_ARRAY, .. })
}

/// The handle that stands for a map in `ld_imm64`: not an address, so that a program that follows it faults.
pub(crate) fn handle(map: Map) -> u64 {
    HANDLE_BASE + u64::from(map.as_u32())
}

/// The index of the map a handle stands for.
pub(crate) fn from_handle(handle: u64) -> Option<usize> {
    usize::try_from(handle.checked_sub(HANDLE_BASE)?).ok()
}

/// rbpf gives `ld_imm64` of a map its plain number; small ones could be confused with lengths and indices.
const HANDLE_BASE: u64 = 0x4d41_5000;
