//! A finished object in memory: programs, maps, a licence, a manifest.
//!
//! [`Object::write`] makes the one ELF file that aya, libbpf (bpftool), `ip` and `tc` load unchanged; [`Object::read`]
//! takes it apart again. What holds for a well-formed object is checked on both sides of the file, by
//! [`Object::verify`], so that a bug of the writer and a damaged file are told apart.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{Read, Seek};

use cranelift_entity::{EntityRef, PrimaryMap};
use object::ReadCache;
use polc_ir::diag::Code as DiagCode;
use polc_ir::entities::Map;
use polc_ir::limits::{BPF_NAME_BYTES_MAX, OBJECT_BSS_BYTES_MAX, OBJECT_DATA_BYTES_MAX};

use crate::asm::{Code, RelocKind};
use crate::elf;
use crate::insn::{Insn, Size};
use crate::kernel_api::KernelItem;
use crate::manifest::Manifest;

/// The licence polc's programs declare: some helpers are for GPL-compatible programs only.
pub const LICENSE: &str = "GPL";

/// Programs, the maps they share, and what is known about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// The programs. The first of a kind is the one to attach; the others are reached by tail calls.
    pub programs: Vec<Program>,
    /// The maps, by the numbers that relocations use.
    pub maps: PrimaryMap<Map, MapDef>,
    /// What the object says about itself.
    pub manifest: Manifest,
    /// The licence declared to the kernel.
    pub license: String,
}

/// One program of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name: a C identifier of at most [`BPF_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// What it is attached to.
    pub kind: ProgramKind,
    /// Its instructions.
    pub code: Code,
}

/// What a program is attached to, and so which context it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProgramKind {
    /// XDP: `struct xdp_md`, section `xdp`.
    Xdp,
    /// tc and tcx: `struct __sk_buff`, section `classifier` (aya does not know the name `tc`).
    Classifier,
    /// A netfilter hook: `struct bpf_nf_ctx`, section `netfilter`.
    Netfilter,
}

impl ProgramKind {
    /// Every kind, in the order their sections are written.
    pub const ALL: [ProgramKind; 3] = [ProgramKind::Xdp, ProgramKind::Classifier, ProgramKind::Netfilter];

    /// The ELF section that loaders know this kind by.
    pub const fn section(self) -> &'static str {
        match self {
            ProgramKind::Xdp => "xdp",
            ProgramKind::Classifier => "classifier",
            ProgramKind::Netfilter => "netfilter",
        }
    }

    /// The kind that a section's name stands for.
    pub fn from_section(name: &str) -> Option<ProgramKind> {
        ProgramKind::ALL.into_iter().find(|kind| kind.section() == name)
    }

    /// The C name of the context structure.
    pub const fn context(self) -> &'static str {
        match self {
            ProgramKind::Xdp => "xdp_md",
            ProgramKind::Classifier => "__sk_buff",
            ProgramKind::Netfilter => "bpf_nf_ctx",
        }
    }
}

impl ProgramKind {
    /// Size of the context structure, in bytes.
    pub const fn context_bytes(self) -> u32 {
        match self {
            ProgramKind::Xdp => 24,
            ProgramKind::Classifier => 192,
            ProgramKind::Netfilter => 16,
        }
    }
}

impl fmt::Display for ProgramKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.section())
    }
}

/// A map and, for data, its contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapDef {
    /// Its name: a C identifier of at most [`BPF_NAME_BYTES_MAX`] bytes, unique in the object.
    pub name: String,
    /// What it is.
    pub kind: MapKind,
}

/// The two ways to declare a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// A section of bytes: loaders make an array map with one value of it, which code addresses directly.
    Data {
        /// Which section.
        section: DataSection,
        /// The bytes. All 0 for [`DataSection::Bss`].
        contents: Vec<u8>,
    },
    /// A map declared through BTF in section `.maps`, empty when loaded.
    Declared {
        /// Type.
        map_type: MapType,
        /// Bytes of a key.
        key_bytes: u32,
        /// Bytes of a value.
        value_bytes: u32,
        /// Most elements.
        max_entries: u32,
        /// `BPF_F_*`.
        flags: u32,
    },
}

/// Where a data map's bytes are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataSection {
    /// `.rodata.NAME`: frozen when loaded, so the verifier may treat bytes as constants.
    Rodata,
    /// `.data.NAME`: writable by programs and from userspace.
    Data,
    /// `.bss`: like data, all zero and not stored in the file. There is at most one, named `bss`: libbpf before 1.2
    /// does not know `.bss.NAME`.
    Bss,
}

/// The name of the map that section `.bss` makes.
pub const BSS: &str = "bss";

impl DataSection {
    const ALL: [DataSection; 3] = [DataSection::Rodata, DataSection::Data, DataSection::Bss];

    /// What section names of this kind start with, before the map's name.
    const fn prefix(self) -> &'static str {
        match self {
            DataSection::Rodata => ".rodata.",
            DataSection::Data => ".data.",
            DataSection::Bss => ".",
        }
    }

    /// Splits a section name into kind and map name.
    pub(crate) fn split(name: &str) -> Option<(DataSection, &str)> {
        DataSection::ALL.into_iter().find_map(|kind| {
            let map = name.strip_prefix(kind.prefix())?;
            (kind != DataSection::Bss || map == BSS).then_some((kind, map))
        })
    }
}

/// A map type, by its number in `include/uapi/linux/bpf.h` (`enum bpf_map_type`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MapType(pub u32);

impl MapType {
    /// Hash table.
    pub const HASH: MapType = MapType(1);
    /// Array.
    pub const ARRAY: MapType = MapType(2);
    /// Array of programs, for tail calls.
    pub const PROG_ARRAY: MapType = MapType(3);
    /// Hash table with a value for each CPU.
    pub const PERCPU_HASH: MapType = MapType(5);
    /// Array with a value for each CPU.
    pub const PERCPU_ARRAY: MapType = MapType(6);
    /// Hash table that forgets the least recently used.
    pub const LRU_HASH: MapType = MapType(9);
    /// Longest-prefix match.
    pub const LPM_TRIE: MapType = MapType(11);
    /// Ring buffer.
    pub const RINGBUF: MapType = MapType(27);

    /// The type's name, as in the kernel without `BPF_MAP_TYPE_`, if polc knows it.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            MapType::HASH => "hash",
            MapType::ARRAY => "array",
            MapType::PROG_ARRAY => "prog_array",
            MapType::PERCPU_HASH => "percpu_hash",
            MapType::PERCPU_ARRAY => "percpu_array",
            MapType::LRU_HASH => "lru_hash",
            MapType::LPM_TRIE => "lpm_trie",
            MapType::RINGBUF => "ringbuf",
            _ => return None,
        })
    }
}

impl fmt::Display for MapType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "map type {}", self.0),
        }
    }
}

impl fmt::Debug for MapType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl MapDef {
    /// A data map.
    pub fn data(name: impl Into<String>, section: DataSection, contents: Vec<u8>) -> MapDef {
        MapDef { name: name.into(), kind: MapKind::Data { section, contents } }
    }

    /// An array with one value of `value_bytes` for each CPU and index: what counters are kept in.
    pub fn percpu_array(name: impl Into<String>, value_bytes: u32, max_entries: u32) -> MapDef {
        MapDef {
            name: name.into(),
            kind: MapKind::Declared {
                map_type: MapType::PERCPU_ARRAY,
                key_bytes: 4,
                value_bytes,
                max_entries,
                flags: 0,
            },
        }
    }

    /// The ELF section of a data map, the variable's name of a declared one. Unique in an object.
    pub fn symbol(&self) -> String {
        match &self.kind {
            MapKind::Data { section, .. } => format!("{}{}", section.prefix(), self.name),
            MapKind::Declared { .. } => self.name.clone(),
        }
    }

    /// The contents of a data map.
    pub fn contents(&self) -> Option<&[u8]> {
        match &self.kind {
            MapKind::Data { contents, .. } => Some(contents),
            MapKind::Declared { .. } => None,
        }
    }
}

/// Why a file is not an object of polc's, or an object can't be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectError {
    /// Not a 64-bit little-endian relocatable ELF file, or damaged.
    Elf(String),
    /// An ELF file for another machine than BPF.
    Machine,
    /// A section is missing.
    MissingSection(&'static str),
    /// A section's contents make no sense.
    Section {
        /// Its name.
        section: String,
        /// What is wrong.
        why: String,
    },
    /// The type information is damaged.
    Btf(String),
    /// The manifest is not the JSON expected.
    Manifest(String),
    /// A symbol or relocation refers to nothing.
    Relocation {
        /// Section the relocation is in.
        section: String,
        /// Where, in bytes.
        offset: u64,
    },
    /// An instruction that polc does not emit.
    Insn {
        /// The program.
        program: String,
        /// The instruction's slot.
        at: u32,
        /// What is wrong.
        why: String,
    },
    /// A rule of [`Object::verify`] does not hold.
    Malformed(String),
}

impl ObjectError {
    /// The diagnostic's code.
    pub const fn code(&self) -> DiagCode {
        DiagCode(match self {
            ObjectError::Elf(_) => 600,
            ObjectError::Machine => 601,
            ObjectError::MissingSection(_) => 602,
            ObjectError::Section { .. } => 603,
            ObjectError::Btf(_) => 604,
            ObjectError::Manifest(_) => 605,
            ObjectError::Relocation { .. } => 606,
            ObjectError::Insn { .. } => 607,
            ObjectError::Malformed(_) => 608,
        })
    }
}

impl fmt::Display for ObjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectError::Elf(why) => write!(f, "not a BPF object file: {why}"),
            ObjectError::Machine => f.write_str("an ELF file for another machine than BPF"),
            ObjectError::MissingSection(name) => write!(f, "section `{name}` is missing"),
            ObjectError::Section { section, why } => write!(f, "section `{section}`: {why}"),
            ObjectError::Btf(why) => write!(f, "type information: {why}"),
            ObjectError::Manifest(why) => write!(f, "manifest: {why}"),
            ObjectError::Relocation { section, offset } => {
                write!(f, "relocation at byte {offset} of section `{section}` refers to nothing known")
            }
            ObjectError::Insn { program, at, why } => {
                write!(f, "program `{program}`, instruction {at}: {why}")
            }
            ObjectError::Malformed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for ObjectError {}

impl Object {
    /// An object without programs and maps.
    pub fn new(manifest: Manifest) -> Object {
        Object { programs: Vec::new(), maps: PrimaryMap::new(), manifest, license: LICENSE.to_string() }
    }

    /// The ELF file. The same object always gives the same bytes. Comments of the code are left out.
    pub fn write(&self) -> Result<Vec<u8>, ObjectError> {
        self.verify()?;
        elf::write::write(self)
    }

    /// Reads what [`Object::write`] wrote. Any bytes may be given.
    pub fn read(bytes: &[u8]) -> Result<Object, ObjectError> {
        let object = elf::read::read(bytes, elf::read::Contents::Bytes)?;
        object.verify()?;
        Ok(object)
    }

    /// The same without what is in the data maps, which are all zeros: for whoever asks about an object that the kernel
    /// has loaded. Only what it takes is read of the file.
    pub fn read_outline(file: impl Read + Seek) -> Result<Object, ObjectError> {
        let object = elf::read::read(&ReadCache::new(file), elf::read::Contents::Lengths)?;
        object.verify()?;
        Ok(object)
    }

    /// The map of that name.
    pub fn map(&self, name: &str) -> Option<Map> {
        self.maps.iter().find(|(_, def)| def.name == name).map(|(map, _)| map)
    }

    /// Checks: names are identifiers, short enough and unique; maps have a size; every instruction decodes; side
    /// tables are ascending and point at instructions of the kind they are about; every reference to a map has a
    /// relocation, and it points into an existing map; every call of a kernel function says of which.
    pub fn verify(&self) -> Result<(), ObjectError> {
        let mut names = BTreeSet::new();
        for def in self.maps.values() {
            check_name("map", &def.name)?;
            if !names.insert(&def.name) {
                return Err(ObjectError::Malformed(format!("two maps are named `{}`", def.name)));
            }
            match &def.kind {
                MapKind::Data { section, contents } => {
                    if contents.is_empty() || contents.len() > OBJECT_DATA_BYTES_MAX {
                        let why = format!("data map `{}` of {} bytes", def.name, contents.len());
                        return Err(ObjectError::Malformed(why));
                    }
                    if *section == DataSection::Bss && def.name != BSS {
                        let why = format!("map `{}` is .bss; only one may be, named `{BSS}`", def.name);
                        return Err(ObjectError::Malformed(why));
                    }
                    if *section == DataSection::Bss && contents.len() > OBJECT_BSS_BYTES_MAX {
                        let why = format!(
                            "`{}` is past the limit of {OBJECT_BSS_BYTES_MAX} bytes of .bss",
                            def.name
                        );
                        return Err(ObjectError::Malformed(why));
                    }
                    if *section == DataSection::Bss && contents.iter().any(|&byte| byte != 0) {
                        return Err(ObjectError::Malformed(format!("`{}` is .bss and not zero", def.name)));
                    }
                }
                MapKind::Declared { max_entries, .. } => {
                    if *max_entries == 0 {
                        return Err(ObjectError::Malformed(format!("map `{}` has no entries", def.name)));
                    }
                }
            }
        }
        let mut names = BTreeSet::new();
        for program in &self.programs {
            check_name("program", &program.name)?;
            if !names.insert(&program.name) {
                return Err(ObjectError::Malformed(format!("two programs are named `{}`", program.name)));
            }
            self.verify_program(program)?;
        }
        if self.license.contains('\0') {
            return Err(ObjectError::Malformed("the licence contains a NUL".to_string()));
        }
        Ok(())
    }

    fn verify_program(&self, program: &Program) -> Result<(), ObjectError> {
        let fail = |at: u32, why: &str| {
            Err(ObjectError::Insn { program: program.name.clone(), at, why: why.to_string() })
        };
        let code = &program.code;
        let insns = match code.insns() {
            Ok(insns) if insns.is_empty() => return fail(0, "the program is empty"),
            Ok(insns) => insns,
            Err((at, why)) => return fail(at, &why.to_string()),
        };
        let insn_at =
            |slot: u32| insns.binary_search_by_key(&slot, |&(at, _)| at).ok().map(|index| insns[index].1);
        let mut relocs = code.relocs.iter().peekable();
        for &(at, insn) in &insns {
            let (wanted, fd) = match insn {
                Insn::LoadMap { map, .. } => (Some(RelocKind::Fd), map),
                Insn::LoadMapValue { map, offset, .. } => (Some(RelocKind::Value { offset }), map),
                _ => (None, 0),
            };
            let Some(wanted) = wanted else { continue };
            match relocs.next() {
                Some(reloc) if reloc.slot == at && reloc.kind == wanted && fd == 0 => {
                    let Some(def) = self.maps.get(reloc.map) else {
                        return fail(at, "refers to a map that does not exist");
                    };
                    match (reloc.kind, &def.kind) {
                        (RelocKind::Value { offset }, MapKind::Data { contents, .. }) => {
                            if offset as usize >= contents.len() {
                                return fail(at, "refers past the end of a data map");
                            }
                        }
                        (RelocKind::Fd, MapKind::Declared { .. }) => {}
                        _ => return fail(at, "refers to a map in a way the map does not allow"),
                    }
                }
                _ => return fail(at, "refers to a map without a matching relocation"),
            }
        }
        if let Some(reloc) = relocs.next() {
            return fail(reloc.slot, "a relocation of something that is no map reference");
        }
        let mut kernel = code.kernel.iter().peekable();
        for &(at, insn) in &insns {
            let used = kernel.next_if(|used| used.slot == at).map(|used| used.item);
            match (insn, used) {
                (Insn::CallKernel { function: 0 }, Some(KernelItem::Function(_))) => {}
                (Insn::CallKernel { .. }, _) => {
                    return fail(at, "calls a kernel function that nothing names");
                }
                (Insn::Load { off, .. }, Some(KernelItem::Field(field))) if off == field.local_offset() => {}
                (_, None) => {}
                _ => return fail(at, "recorded as a use of the kernel's own, and isn't one"),
            }
        }
        if let Some(used) = kernel.next() {
            return fail(used.slot, "recorded as a use of the kernel's own, and is no instruction in order");
        }
        if !code.ctx_loads.is_sorted_by(|a, b| a < b)
            || !code.loops.is_sorted_by(|a, b| a.back_jump < b.back_jump)
        {
            return fail(0, "a side table is out of order");
        }
        for &at in &code.ctx_loads {
            if !matches!(insn_at(at), Some(Insn::Load { size: Size::W, .. })) {
                return fail(at, "recorded as a load of a packet pointer, and isn't one");
            }
        }
        for l in &code.loops {
            if insn_at(l.back_jump).and_then(|insn| insn.jump_offset()).is_none_or(|off| off >= 0) {
                return fail(l.back_jump, "recorded as a backward jump, and isn't one");
            }
        }
        if !code.line_marks.is_sorted_by(|a, b| a.0 < b.0 && a.1 != b.1) {
            return fail(0, "the line table is out of order");
        }
        for (at, line) in &code.line_marks {
            let line = line.expand().map(|line| code.lines.get(line.index()));
            let known = line.is_none_or(|line| line.is_some_and(|line| line.file.index() < code.files.len()));
            if insn_at(*at).is_none() || !known {
                return fail(*at, "a source line for something that is no instruction");
            }
        }
        Ok(())
    }
}

fn check_name(what: &str, name: &str) -> Result<(), ObjectError> {
    let mut bytes = name.bytes();
    let starts = bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_');
    if starts
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.len() <= BPF_NAME_BYTES_MAX
    {
        Ok(())
    } else {
        Err(ObjectError::Malformed(format!(
            "`{name}` can't name a {what}: a C identifier of at most {BPF_NAME_BYTES_MAX} bytes is needed"
        )))
    }
}
