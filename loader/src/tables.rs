//! Contents of maps: filled before a program is attached, changed while it runs.
//!
//! A change of one element is one call of the kernel's, atomic for every packet, and reloads no program.

use crate::error::Error;
use crate::sys::{Map, Sys};

/// A key and its value.
pub type Element = (Vec<u8>, Vec<u8>);

/// Puts elements into a map that no program reads yet, many with each call.
pub fn fill(sys: &Sys, map: &Map, elements: &[Element]) -> Result<(), Error> {
    let fail = || {
        let info = map.info().clone();
        move |source: std::io::Error| match source.raw_os_error() {
            Some(libc::ENOMEM | libc::E2BIG) => Error::MapMemory {
                map: info.name,
                bytes: u64::from(info.max_entries) * u64::from(info.key_bytes + info.value_bytes),
                source,
            },
            _ => Error::Call { what: format!("fill map `{}`", info.name), source },
        }
    };
    for elements in elements.chunks(BATCH) {
        let keys: Vec<u8> = elements.iter().flat_map(|(key, _)| key).copied().collect();
        let values: Vec<u8> = elements.iter().flat_map(|(_, value)| value).copied().collect();
        match sys.map_update_batch(map, &keys, &values, elements.len()) {
            // Not every type of map takes many at once on every kernel.
            Err(error) if matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EINVAL)) => {
                for (key, value) in elements {
                    sys.map_update(map, key, value).map_err(fail())?;
                }
            }
            result => result.map_err(fail())?,
        }
    }
    Ok(())
}

/// The kernel's own error number for "not supported" (include/linux/errno.h).
const ENOTSUPP: i32 = 524;

/// Elements that one call takes.
const BATCH: usize = 4_096;

/// Sets every value of an array, or of a per-CPU array, to zeros.
pub fn clear_array(sys: &Sys, map: &Map) -> Result<(), Error> {
    let zeros = vec![0u8; map.stride()];
    let elements: Vec<Element> =
        (0..map.info().max_entries).map(|index| (index.to_ne_bytes().to_vec(), zeros.clone())).collect();
    fill(sys, map, &elements)
}

/// The keys and values in a map, in its own order.
pub fn list(sys: &Sys, map: &Map) -> Result<Vec<Element>, Error> {
    let fail = || Error::call(format!("read map `{}`", map.info().name));
    let mut found = Vec::new();
    let mut key = sys.map_next_key(map, None).map_err(fail())?;
    while let Some(at) = key {
        // An element removed meanwhile is none.
        if let Some(value) = sys.map_lookup(map, &at).map_err(fail())? {
            found.push((at.clone(), value));
        }
        if found.len() > map.info().max_entries as usize {
            break;
        }
        key = sys.map_next_key(map, Some(&at)).map_err(fail())?;
    }
    Ok(found)
}
