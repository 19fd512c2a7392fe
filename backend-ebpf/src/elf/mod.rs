//! The ELF file of an object: what is in which section.
//!
//! | section | contents |
//! | --- | --- |
//! | `license` | NUL-terminated licence |
//! | `.maps` | zeros; the declarations are in `.BTF` |
//! | `.rodata.*` `.data.*` `.bss` | a data map each |
//! | `xdp`, `classifier`, `netfilter` | programs of that kind, one after the other, a global function symbol each |
//! | `.relxdp`, `.relclassifier`, `.relnetfilter` | `R_BPF_64_64` for each map reference, `R_BPF_64_32` for each call of a kernel function |
//! | `.BTF` | types of maps and programs, strings |
//! | `.BTF.ext` | functions, source lines, and loads of fields of the kernel's structures (CO-RE) |
//! | `polc.manifest` | [`Notes`] as JSON |
//!
//! A reference to a declared map points at its variable's symbol; a reference into a data map at the section's
//! symbol, with the offset in the first immediate of the `ld_imm64`. That is what clang writes and what libbpf, aya
//! and iproute2 expect. A call of a kernel function points at an undefined symbol of that name, which libbpf alone
//! resolves.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::manifest::{Counted, CounterSlot, Manifest};

pub(crate) mod read;
pub(crate) mod write;

const LICENSE: &str = "license";
const MAPS: &str = ".maps";
/// The BTF section that lists kernel functions. It has no bytes.
const KSYMS: &str = ".ksyms";

/// A call that a relocation resolves, as clang writes it: of local function -1.
const EXTERN_CALL: u64 = 0xffff_ffff_0000_1085;

const BTF: &str = ".BTF";
const BTF_EXT: &str = ".BTF.ext";
const MANIFEST: &str = "polc.manifest";

/// The attributes of a declared map, in the order they are written.
const MAP_ATTRIBUTES: [&str; 5] = ["type", "key_size", "value_size", "max_entries", "map_flags"];

/// Bytes of a map's variable in `.maps`: a pointer an attribute.
const MAP_BYTES: u32 = MAP_ATTRIBUTES.len() as u32 * 8;

/// Bytes of a record of function and of line information.
pub(crate) const FUNC_INFO_BYTES: u32 = 8;
pub(crate) const LINE_INFO_BYTES: u32 = 16;

/// Bytes of a record of a field relocation, and its kind: the field's offset in bytes (include/uapi/linux/bpf.h,
/// `struct bpf_core_relo` and `BPF_CORE_FIELD_BYTE_OFFSET`).
const CORE_RELO_BYTES: u32 = 16;
const CORE_FIELD_BYTE_OFFSET: u32 = 0;

/// Line numbers take 22 bits of a record, columns the lower 10 (include/uapi/linux/bpf.h).
const LINE_SHIFT: u32 = 10;

/// What section `polc.manifest` holds: the manifest, and the side tables of the code that ELF has no place for.
#[derive(Serialize, Deserialize)]
struct Notes<'a> {
    /// For people and loaders. What tells a counter slot's rule or policy is left out where `deciders` says which it is.
    manifest: Cow<'a, Manifest>,
    /// For each counter slot the rule or policy, by its index among what is counted, that the slot names, if it does.
    #[serde(default)]
    deciders: Vec<Option<u32>>,
    /// Maps by symbol, in the order of their numbers.
    maps: Vec<String>,
    /// Programs in order.
    programs: Vec<ProgramNotes>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ProgramNotes {
    name: String,
    /// Slots of `ldxw` that load packet pointers.
    ctx_loads: Vec<u32>,
    /// Backward jumps: slot, trips.
    loops: Vec<(u32, u32)>,
    /// Loads of fields of the kernel's structures: slot, field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    fields: Vec<(u32, String)>,
}

/// The manifest without what its counter slots repeat, and what they repeat. Of a large rule set it is half of the bytes,
/// and reading them is most of what `polc save` takes.
fn without_repeats(manifest: &Manifest) -> (Manifest, Vec<Option<u32>>) {
    let mut manifest = manifest.clone();
    let Manifest { counters, counted, .. } = &mut manifest;
    // A match that drops what it can't read has a slot, too, in which its rule is not counted.
    let places = counted.iter().map(|counted| (&*counted.table, &*counted.chain, counted.rule));
    let by_place: HashMap<(&str, &str, Option<u32>), u32> = places.zip(0..).collect();
    let named = |slot: &CounterSlot| {
        by_place.get(&(slot.table.as_deref()?, slot.chain.as_deref()?, slot.rule)).copied()
    };
    let repeats = |slot: &CounterSlot, index: &u32| {
        counted.get(*index as usize).is_some_and(|counted| {
            let mut other = slot.clone();
            name_decider(&mut other, counted);
            other == *slot
        })
    };
    let mut deciders = Vec::with_capacity(counters.len());
    for slot in counters {
        let decider = slot.counts.iter().rev().copied().chain(named(slot)).find(|index| repeats(slot, index));
        if decider.is_some() {
            slot.text.clear();
            (slot.table, slot.chain, slot.rule, slot.file, slot.line) = (None, None, None, None, None);
        }
        deciders.push(decider);
    }
    (manifest, deciders)
}

/// The other way round. Deciders that are nowhere are left out; the object is verified afterwards.
fn with_repeats(manifest: &mut Manifest, deciders: &[Option<u32>]) {
    let Manifest { counters, counted, .. } = manifest;
    for (slot, decider) in counters.iter_mut().zip(deciders) {
        if let Some(counted) = decider.and_then(|index| counted.get(index as usize)) {
            name_decider(slot, counted);
        }
    }
}

fn name_decider(slot: &mut CounterSlot, counted: &Counted) {
    slot.text.clone_from(&counted.text);
    slot.table = Some(counted.table.clone());
    slot.chain = Some(counted.chain.clone());
    slot.rule = counted.rule;
    slot.file.clone_from(&counted.file);
    slot.line = counted.line;
}
