//! ELF to object, for any bytes whatever: what is not understood is an error, never a guess or a panic.

use std::collections::BTreeMap;

use cranelift_entity::{EntityRef, PrimaryMap, packed_option::PackedOption};
use object::elf::{R_BPF_64_32, R_BPF_64_64};
use object::read::elf::ElfFile64;
use object::{
    Architecture, Endianness, LittleEndian, Object as _, ObjectKind, ObjectSection, ObjectSymbol, ReadRef,
    RelocationFlags, RelocationTarget, SectionIndex, SymbolKind,
};
use polc_ir::entities::Map;
use polc_ir::limits::{OBJECT_BSS_BYTES_MAX, OBJECT_DATA_BYTES_MAX};

use super::{
    BTF, BTF_EXT, EXTERN_CALL, LICENSE, LINE_INFO_BYTES, LINE_SHIFT, MANIFEST, MAP_ATTRIBUTES, MAPS, Notes,
    ProgramNotes, with_repeats,
};
use crate::asm::{BoundedLoop, Code, File, KernelRef, Line, LineRef, Reloc, RelocKind};
use crate::btf::{self, Btf};
use crate::insn::{Insn, Reg};
use crate::kernel_api::{KernelFunction, KernelItem};
use crate::object::{DataSection, MapDef, MapKind, MapType, Object, ObjectError, Program, ProgramKind};

type ElfFile<'a, R> = ElfFile64<'a, LittleEndian, R>;

fn elf_error(error: object::Error) -> ObjectError {
    ObjectError::Elf(error.to_string())
}

fn bad_section(section: &str, why: impl Into<String>) -> ObjectError {
    ObjectError::Section { section: section.to_string(), why: why.into() }
}

/// What of a file's data sections is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Their bytes.
    Bytes,
    /// Their lengths: they are all zeros, which nobody makes before they are read.
    Lengths,
}

/// Takes a file apart. The result still has to be verified.
pub(crate) fn read<'a>(file: impl ReadRef<'a>, of_data: Contents) -> Result<Object, ObjectError> {
    let elf: ElfFile<'a, _> = ElfFile64::parse(file).map_err(elf_error)?;
    if elf.architecture() != Architecture::Bpf || elf.endianness() != Endianness::Little {
        return Err(ObjectError::Machine);
    }
    if elf.kind() != ObjectKind::Relocatable {
        return Err(ObjectError::Elf("not relocatable".to_string()));
    }
    let notes: Notes<'_> = serde_json::from_slice(contents(&elf, MANIFEST)?)
        .map_err(|error| ObjectError::Manifest(error.to_string()))?;
    let license = contents(&elf, LICENSE)?;
    let license = license
        .strip_suffix(&[0])
        .and_then(|text| std::str::from_utf8(text).ok())
        .ok_or_else(|| bad_section(LICENSE, "not a NUL-terminated text"))?;
    let types = Btf::parse(contents(&elf, BTF)?).map_err(ObjectError::Btf)?;
    let lines = read_lines(&types, contents(&elf, BTF_EXT)?)?;

    let found = FoundMaps::read(&elf, &types, of_data)?;
    let (maps, places) = found.in_order(&notes.maps)?;
    let mut programs = Vec::with_capacity(notes.programs.len());
    for note in &notes.programs {
        programs.push(read_program(&elf, note, &places, &lines)?);
    }
    let mut manifest = notes.manifest.into_owned();
    with_repeats(&mut manifest, &notes.deciders);
    Ok(Object { programs, maps, manifest, license: license.to_string() })
}

fn contents<'a>(elf: &ElfFile<'a, impl ReadRef<'a>>, name: &'static str) -> Result<&'a [u8], ObjectError> {
    let section = elf.section_by_name(name).ok_or(ObjectError::MissingSection(name))?;
    section.data().map_err(elf_error)
}

/// Where a reference to a map points: a section, and for declared maps the variable's offset.
type Place = (usize, Option<u64>);

/// The map at each place.
type Places = BTreeMap<Place, Map>;

/// The maps of a file, by symbol.
#[derive(Default)]
struct FoundMaps {
    maps: BTreeMap<String, (MapDef, Place)>,
}

impl FoundMaps {
    fn read<'a>(
        elf: &ElfFile<'a, impl ReadRef<'a>>,
        types: &Btf<'_>,
        of_data: Contents,
    ) -> Result<FoundMaps, ObjectError> {
        let mut found = FoundMaps::default();
        for section in elf.sections() {
            let name = section.name().map_err(elf_error)?;
            if name == MAPS {
                found.read_declared(section.index(), types)?;
            } else if let Some((kind, map)) = DataSection::split(name) {
                let contents = match kind {
                    DataSection::Bss => {
                        if section.size() > OBJECT_BSS_BYTES_MAX as u64 {
                            return Err(bad_section(name, "more zeros than polc ever asks for"));
                        }
                        vec![0; section.size() as usize]
                    }
                    _ => match of_data {
                        Contents::Bytes => section.data().map_err(elf_error)?.to_vec(),
                        Contents::Lengths if section.size() <= OBJECT_DATA_BYTES_MAX as u64 => {
                            vec![0; section.size() as usize]
                        }
                        Contents::Lengths => return Err(bad_section(name, "more than polc ever writes")),
                    },
                };
                found.insert(MapDef::data(map, kind, contents), (section.index().0, None))?;
            }
        }
        Ok(found)
    }

    fn read_declared(&mut self, section: SectionIndex, types: &Btf<'_>) -> Result<(), ObjectError> {
        let bad = |what: &str| ObjectError::Btf(format!("{MAPS}: {what}"));
        let datasec = types.datasec(MAPS).ok_or_else(|| bad("not described"))?;
        for index in 0..datasec.words() / 3 {
            let word = |n: usize| datasec.word(index * 3 + n);
            let var =
                word(0).and_then(|id| types.get(id, btf::KIND_VAR)).ok_or_else(|| bad("not a variable"))?;
            let layout =
                types.get(var.size_or_type, btf::KIND_STRUCT).ok_or_else(|| bad("not a structure"))?;
            let mut values = [0; MAP_ATTRIBUTES.len()];
            for member in 0..layout.words() / 3 {
                let word = |n: usize| layout.word(member * 3 + n);
                let name =
                    word(0).and_then(|offset| types.string(offset)).ok_or_else(|| bad("nameless member"))?;
                let attribute = MAP_ATTRIBUTES
                    .iter()
                    .position(|known| *known == name)
                    .ok_or_else(|| bad(&format!("unknown attribute `{name}`")))?;
                values[attribute] = word(1)
                    .and_then(|id| types.get(id, btf::KIND_PTR))
                    .and_then(|pointer| types.get(pointer.size_or_type, btf::KIND_ARRAY))
                    .and_then(|array| array.word(2))
                    .ok_or_else(|| bad("an attribute is not a number"))?;
            }
            let [map_type, key_bytes, value_bytes, max_entries, flags] = values;
            let kind =
                MapKind::Declared { map_type: MapType(map_type), key_bytes, value_bytes, max_entries, flags };
            let offset = word(1).map(u64::from);
            self.insert(MapDef { name: var.name.to_string(), kind }, (section.0, offset))?;
        }
        Ok(())
    }

    fn insert(&mut self, def: MapDef, place: Place) -> Result<(), ObjectError> {
        match self.maps.insert(def.symbol(), (def, place)) {
            None => Ok(()),
            Some((before, _)) => {
                Err(ObjectError::Malformed(format!("two maps are named `{}`", before.symbol())))
            }
        }
    }

    /// The maps in the order of their numbers, and the number at each place.
    fn in_order(mut self, order: &[String]) -> Result<(PrimaryMap<Map, MapDef>, Places), ObjectError> {
        let mut maps = PrimaryMap::new();
        let mut places = BTreeMap::new();
        for symbol in order {
            let (def, place) = self
                .maps
                .remove(symbol)
                .ok_or_else(|| ObjectError::Manifest(format!("map `{symbol}` is listed and isn't there")))?;
            places.insert(place, maps.push(def));
        }
        match self.maps.pop_first() {
            None => Ok((maps, places)),
            Some((symbol, _)) => {
                Err(ObjectError::Manifest(format!("map `{symbol}` is there and isn't listed")))
            }
        }
    }
}

/// A line record: byte offset in its section, file, text, line number.
type LineInfo<'a> = (u32, &'a str, &'a str, u32);

/// Line records by section name.
type Lines<'a> = BTreeMap<&'a str, Vec<LineInfo<'a>>>;

/// The line records of `.BTF.ext`.
fn read_lines<'a>(types: &Btf<'a>, ext: &[u8]) -> Result<Lines<'a>, ObjectError> {
    let bad = || ObjectError::Btf("line records are damaged".to_string());
    let [_, mut records] = btf::parts(ext).map_err(ObjectError::Btf)?;
    if btf::word(records, 0) != Some(LINE_INFO_BYTES) {
        return Err(bad());
    }
    records = &records[4..];
    let mut sections = BTreeMap::new();
    while !records.is_empty() {
        let (Some(name), Some(count)) = (btf::word(records, 0), btf::word(records, 4)) else {
            return Err(bad());
        };
        let name = types.string(name).ok_or_else(bad)?;
        let bytes = (count as usize).checked_mul(LINE_INFO_BYTES as usize).ok_or_else(bad)?;
        let body = records.get(8..).and_then(|rest| rest.get(..bytes)).ok_or_else(bad)?;
        let mut lines = Vec::with_capacity(count as usize);
        for record in body.chunks_exact(LINE_INFO_BYTES as usize) {
            let [Some(at), Some(file), Some(text), Some(line)] =
                [0, 4, 8, 12].map(|at| btf::word(record, at))
            else {
                return Err(bad());
            };
            let (file, text) = (types.string(file).ok_or_else(bad)?, types.string(text).ok_or_else(bad)?);
            lines.push((at, file, text, line >> LINE_SHIFT));
        }
        sections.insert(name, lines);
        records = &records[8 + bytes..];
    }
    Ok(sections)
}

fn read_program<'a>(
    elf: &ElfFile<'a, impl ReadRef<'a>>,
    note: &ProgramNotes,
    places: &Places,
    lines: &Lines<'_>,
) -> Result<Program, ObjectError> {
    let missing = || ObjectError::Manifest(format!("program `{}` is listed and isn't there", note.name));
    let symbol = elf
        .symbols()
        .find(|symbol| symbol.kind() == SymbolKind::Text && symbol.name() == Ok(&note.name))
        .ok_or_else(missing)?;
    let section =
        symbol.section_index().and_then(|index| elf.section_by_index(index).ok()).ok_or_else(missing)?;
    let section_name = section.name().map_err(elf_error)?;
    let kind = ProgramKind::from_section(section_name)
        .ok_or_else(|| bad_section(section_name, "not a kind of program that polc knows"))?;
    let (base, size) = (symbol.address(), symbol.size());
    let bytes = section
        .data()
        .map_err(elf_error)?
        .get(base as usize..)
        .and_then(|rest| rest.get(..size as usize))
        .filter(|_| base % 8 == 0 && size % 8 == 0)
        .ok_or_else(|| bad_section(section_name, format!("program `{}` is not inside", note.name)))?;
    let mut slots: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|slot| u64::from_le_bytes(*slot)).collect();

    let (mut relocs, mut kernel) = (Vec::new(), Vec::new());
    for (offset, relocation) in section.relocations() {
        let Some(slot) = offset.checked_sub(base).filter(|at| *at < size) else { continue };
        let bad = || ObjectError::Relocation { section: section_name.to_string(), offset };
        let RelocationTarget::Symbol(target) = relocation.target() else { return Err(bad()) };
        let target = elf.symbol_by_index(target).map_err(|_| bad())?;
        match relocation.flags() {
            RelocationFlags::Elf { r_type: R_BPF_64_64 } => {}
            RelocationFlags::Elf { r_type: R_BPF_64_32 } => {
                let function = target.name().ok().and_then(KernelFunction::from_name).ok_or_else(bad)?;
                let at = (slot / 8) as usize;
                let place = slots.get_mut(at).filter(|call| **call == EXTERN_CALL && slot % 8 == 0);
                let mut call = Vec::with_capacity(1);
                Insn::CallKernel { function: 0 }.encode(&mut call);
                *place.ok_or_else(bad)? = call[0];
                kernel.push(KernelRef { slot: at as u32, item: KernelItem::Function(function) });
                continue;
            }
            _ => return Err(bad()),
        }
        let index = target.section_index().ok_or_else(bad)?;
        let data = places.get(&(index.0, None)).filter(|_| target.address() == 0);
        let declared = places.get(&(index.0, Some(target.address())));
        let at = (slot / 8) as usize;
        let pair = slots.get(at..).filter(|_| slot % 8 == 0).ok_or_else(bad)?;
        let Ok(Insn::LoadImm64 { dst, imm }) = Insn::decode(pair) else { return Err(bad()) };
        let (map, kind) = match (data, declared) {
            (Some(map), _) => (*map, RelocKind::Value { offset: u32::try_from(imm).map_err(|_| bad())? }),
            (None, Some(map)) if imm == 0 => (*map, RelocKind::Fd),
            _ => return Err(bad()),
        };
        restore(&mut slots[at..at + 2], dst, kind);
        relocs.push(Reloc { slot: at as u32, map, kind });
    }
    for (slot, name) in &note.fields {
        let unknown = || ObjectError::Manifest(format!("`{name}` is no field that polc reads"));
        let item = KernelItem::from_text(name).filter(|item| matches!(item, KernelItem::Field(_)));
        kernel.push(KernelRef { slot: *slot, item: item.ok_or_else(unknown)? });
    }
    relocs.sort_by_key(|reloc| reloc.slot);
    kernel.sort_by_key(|used| used.slot);

    let mut code = Code {
        slots,
        relocs,
        kernel,
        ctx_loads: note.ctx_loads.clone(),
        loops: note.loops.iter().map(|&(back_jump, trips)| BoundedLoop { back_jump, trips }).collect(),
        ..Code::default()
    };
    let lines = lines.get(section_name).map_or(&[][..], |lines| lines);
    place_lines(&mut code, base, size, lines);
    Ok(Program { name: note.name.clone(), kind, code })
}

/// Turns a plain `ld_imm64` back into the map reference it stands for.
fn restore(slots: &mut [u64], dst: Reg, kind: RelocKind) {
    let mut pair = Vec::with_capacity(2);
    match kind {
        RelocKind::Fd => Insn::LoadMap { dst, map: 0 },
        RelocKind::Value { offset } => Insn::LoadMapValue { dst, map: 0, offset },
    }
    .encode(&mut pair);
    slots.copy_from_slice(&pair);
}

/// Fills the line table from the records of the program's bytes `base..base + size` of its section.
fn place_lines(code: &mut Code, base: u64, size: u64, records: &[LineInfo<'_>]) {
    let mut files = BTreeMap::new();
    let mut lines = BTreeMap::new();
    let mut last = PackedOption::<Line>::default();
    for &(at, file, text, number) in records {
        let Some(at) = u64::from(at).checked_sub(base).filter(|at| *at < size) else { continue };
        let line = if (file, text, number) == ("", "", 0) {
            PackedOption::default()
        } else {
            let file = *files.entry(file).or_insert_with(|| {
                code.files.push(file.to_string());
                File::new(code.files.len() - 1)
            });
            let line = *lines.entry((file, number, text)).or_insert_with(|| {
                code.lines.push(LineRef { file, line: number, text: text.to_string() });
                Line::new(code.lines.len() - 1)
            });
            line.into()
        };
        if line != last {
            code.line_marks.push(((at / 8) as u32, line));
            last = line;
        }
    }
}
