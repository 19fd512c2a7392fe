//! Object to ELF. Everything is laid out in the order of the object's own lists, so equal objects give equal bytes.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use cranelift_entity::{EntityRef, SecondaryMap};
use object::elf::{R_BPF_64_32, R_BPF_64_64};
use object::write::{Object as Elf, Relocation, SectionId, Symbol, SymbolId, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolKind,
    SymbolScope,
};
use polc_ir::entities::Map;
use polc_ir::limits::BTF_BYTES_MAX;

use super::{
    BTF, BTF_EXT, CORE_FIELD_BYTE_OFFSET, CORE_RELO_BYTES, EXTERN_CALL, FUNC_INFO_BYTES, KSYMS, LICENSE,
    LINE_INFO_BYTES, LINE_SHIFT, MANIFEST, MAP_ATTRIBUTES, MAP_BYTES, MAPS, Notes, ProgramNotes,
    without_repeats,
};
use crate::asm::{Code, KernelRef, RelocKind};
use crate::btf;
use crate::insn::{Insn, Reg};
use crate::kernel_api::{CType, KernelFunction, KernelItem, MemberType, STRUCTURES};
use crate::object::{DataSection, MapKind, Object, ObjectError, Program, ProgramKind};

/// The ELF file of a verified object.
pub(crate) fn write(object: &Object) -> Result<Vec<u8>, ObjectError> {
    let mut elf = Elf::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let mut license = object.license.clone().into_bytes();
    license.push(0);
    add_section(&mut elf, LICENSE, SectionKind::Data, &license, 1);

    let mut types = btf::Builder::default();
    let int = types.int();
    let symbols = Symbols {
        maps: add_maps(&mut elf, &mut types, int, object),
        functions: add_functions(&mut elf, &mut types, int, object),
        structures: add_structures(&mut types, int, object),
    };

    let mut ext = Ext::default();
    for kind in ProgramKind::ALL {
        let programs: Vec<&Program> = object.programs.iter().filter(|program| program.kind == kind).collect();
        if !programs.is_empty() {
            add_programs(&mut elf, &mut types, &mut ext, int, kind, &programs, &symbols)?;
        }
    }

    let types = types.finish();
    if types.len() > BTF_BYTES_MAX {
        let why = format!("{} bytes; the kernel takes {}", types.len(), BTF_BYTES_MAX);
        return Err(ObjectError::Section { section: BTF.to_string(), why });
    }
    add_section(&mut elf, BTF, SectionKind::Other, &types, 8);
    add_section(&mut elf, BTF_EXT, SectionKind::Other, &ext.finish(), 8);

    let (manifest, deciders) = without_repeats(&object.manifest);
    let notes = Notes {
        manifest: Cow::Owned(manifest),
        deciders,
        maps: object.maps.values().map(|def| def.symbol()).collect(),
        programs: object.programs.iter().map(notes_of).collect(),
    };
    let notes = serde_json::to_vec(&notes).map_err(|error| ObjectError::Manifest(error.to_string()))?;
    add_section(&mut elf, MANIFEST, SectionKind::Other, &notes, 1);
    elf.write().map_err(|error| ObjectError::Elf(error.to_string()))
}

fn notes_of(program: &Program) -> ProgramNotes {
    ProgramNotes {
        name: program.name.clone(),
        ctx_loads: program.code.ctx_loads.clone(),
        loops: program.code.loops.iter().map(|l| (l.back_jump, l.trips)).collect(),
        fields: program
            .code
            .kernel
            .iter()
            .filter(|used| matches!(used.item, KernelItem::Field(_)))
            .map(|used| (used.slot, used.item.to_string()))
            .collect(),
    }
}

fn add_section(elf: &mut Elf<'_>, name: &str, kind: SectionKind, data: &[u8], align: u64) -> SectionId {
    let section = elf.add_section(Vec::new(), name.as_bytes().to_vec(), kind);
    elf.append_section_data(section, data, align);
    section
}

fn add_symbol(
    elf: &mut Elf<'_>,
    name: &str,
    kind: SymbolKind,
    section: SectionId,
    value: u64,
    size: u64,
) -> SymbolId {
    elf.add_symbol(Symbol {
        name: name.as_bytes().to_vec(),
        value,
        size,
        kind,
        // Global and of default visibility: libbpf treats hidden functions as static ones.
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    })
}

/// Writes `.maps` and the data sections; gives the symbol that references to each map use.
fn add_maps(
    elf: &mut Elf<'_>,
    types: &mut btf::Builder,
    int: u32,
    object: &Object,
) -> SecondaryMap<Map, Option<SymbolId>> {
    let mut symbols = SecondaryMap::new();
    let mut declared = None;
    let mut vars = Vec::new();
    for (map, def) in object.maps.iter() {
        match &def.kind {
            MapKind::Declared { map_type, key_bytes, value_bytes, max_entries, flags } => {
                let section = *declared.get_or_insert_with(|| {
                    elf.add_section(Vec::new(), MAPS.as_bytes().to_vec(), SectionKind::Data)
                });
                let at = elf.append_section_data(section, &[0; MAP_BYTES as usize], 8);
                let symbol = add_symbol(elf, &def.name, SymbolKind::Data, section, at, u64::from(MAP_BYTES));
                symbols[map] = Some(symbol);

                let values = [map_type.0, *key_bytes, *value_bytes, *max_entries, *flags];
                let members: Vec<(&str, u32)> = MAP_ATTRIBUTES
                    .into_iter()
                    .zip(values)
                    .map(|(name, value)| {
                        let array = types.array(int, int, value);
                        (name, types.ptr(array))
                    })
                    .collect();
                let layout = types.struct_of_ptrs(&members);
                vars.push([types.var(&def.name, layout), at as u32, MAP_BYTES]);
            }
            MapKind::Data { section, contents } => {
                let name = def.symbol().into_bytes();
                let id = match section {
                    DataSection::Rodata => elf.add_section(Vec::new(), name, SectionKind::ReadOnlyData),
                    DataSection::Data => elf.add_section(Vec::new(), name, SectionKind::Data),
                    DataSection::Bss => elf.add_section(Vec::new(), name, SectionKind::UninitializedData),
                };
                if *section == DataSection::Bss {
                    elf.append_section_bss(id, contents.len() as u64, 8);
                } else {
                    elf.append_section_data(id, contents, 8);
                }
                symbols[map] = Some(elf.section_symbol(id));
            }
        }
    }
    if !vars.is_empty() {
        types.datasec(MAPS, vars.len() as u32 * MAP_BYTES, &vars);
    }
    symbols
}

/// What relocations refer to.
struct Symbols {
    maps: SecondaryMap<Map, Option<SymbolId>>,
    functions: BTreeMap<KernelFunction, SymbolId>,
    /// Types of the kernel's structures, by name.
    structures: BTreeMap<&'static str, u32>,
}

/// Describes the kernel's structures in the local layout, if the object's programs read them.
fn add_structures(types: &mut btf::Builder, int: u32, object: &Object) -> BTreeMap<&'static str, u32> {
    let mut known = BTreeMap::new();
    let mut used = object.programs.iter().flat_map(|program| &program.code.kernel);
    if !used.any(|used| matches!(used.item, KernelItem::Field(_))) {
        return known;
    }
    let (byte, word) = (types.unsigned("unsigned char", 1), types.unsigned("unsigned int", 4));
    let long = types.unsigned("unsigned long", 8);
    let place = types.array(byte, int, 0);
    let mut pointers: BTreeMap<&str, u32> = BTreeMap::new();
    for structure in &STRUCTURES {
        let members: Vec<(&str, u32, u32)> = structure
            .members
            .iter()
            .map(|member| {
                let of = match member.of {
                    MemberType::U32 => word,
                    MemberType::Long => long,
                    MemberType::Device => pointers["net_device"],
                    MemberType::Place => place,
                };
                (member.field.name, of, member.offset as u32)
            })
            .collect();
        let id = types.struct_of(structure.name, structure.bytes, &members);
        known.insert(structure.name, id);
        pointers.insert(structure.name, types.ptr(id));
    }
    known
}

/// Names the kernel functions that the object's programs call, with their prototypes.
fn add_functions(
    elf: &mut Elf<'_>,
    types: &mut btf::Builder,
    int: u32,
    object: &Object,
) -> BTreeMap<KernelFunction, SymbolId> {
    let mut symbols = BTreeMap::new();
    let used = object.programs.iter().flat_map(|program| &program.code.kernel);
    let functions: BTreeSet<KernelFunction> = used
        .filter_map(|used| match used.item {
            KernelItem::Function(function) => Some(function),
            KernelItem::Field(_) => None,
        })
        .collect();
    if functions.is_empty() {
        return symbols;
    }
    let mut structs: BTreeMap<&str, u32> = BTreeMap::new();
    let (word, wide) = (types.unsigned("unsigned int", 4), types.unsigned("unsigned long long", 8));
    let mut type_of = |types: &mut btf::Builder, of: CType| match of {
        CType::Void => 0,
        CType::Int => int,
        CType::U32 => word,
        CType::U64 => wide,
        CType::Struct(name) => *structs.entry(name).or_insert_with(|| {
            let opaque = types.opaque_struct(name, 0);
            types.ptr(opaque)
        }),
    };
    let mut externs = Vec::new();
    for function in functions {
        let (result, params) = function.prototype();
        let result = type_of(types, result);
        let params: Vec<(&str, u32)> = params.iter().map(|&(name, of)| (name, type_of(types, of))).collect();
        let proto = types.func_proto(result, &params);
        externs.push([types.extern_func(function.name(), proto), 0, 0]);
        let symbol = elf.add_symbol(Symbol {
            name: function.name().as_bytes().to_vec(),
            value: 0,
            size: 0,
            kind: SymbolKind::Unknown,
            scope: SymbolScope::Dynamic,
            weak: false,
            section: SymbolSection::Undefined,
            flags: SymbolFlags::None,
        });
        symbols.insert(function, symbol);
    }
    types.datasec(KSYMS, 0, &externs);
    symbols
}

/// Writes the section of one kind of programs, its relocations, symbols and source lines.
fn add_programs(
    elf: &mut Elf<'_>,
    types: &mut btf::Builder,
    ext: &mut Ext,
    int: u32,
    kind: ProgramKind,
    programs: &[&Program],
    symbols: &Symbols,
) -> Result<(), ObjectError> {
    let section = elf.add_section(Vec::new(), kind.section().as_bytes().to_vec(), SectionKind::Text);
    let context = types.opaque_struct(kind.context(), kind.context_bytes());
    let pointer = types.ptr(context);
    let proto = types.func_proto(int, &[("ctx", pointer)]);
    let name = types.string(kind.section());
    let infos = ext.sections.entry(name).or_default();
    for program in programs {
        let bytes: Vec<u8> = file_slots(&program.code).iter().flat_map(|slot| slot.to_le_bytes()).collect();
        let base = elf.append_section_data(section, &bytes, 8);
        add_symbol(elf, &program.name, SymbolKind::Text, section, base, bytes.len() as u64);
        for reloc in &program.code.relocs {
            let offset = base + u64::from(reloc.slot) * 8;
            let symbol = symbols.maps[reloc.map]
                .ok_or_else(|| ObjectError::Relocation { section: kind.section().to_string(), offset })?;
            let flags = RelocationFlags::Elf { r_type: R_BPF_64_64 };
            elf.add_relocation(section, Relocation { offset, symbol, addend: 0, flags })
                .map_err(|error| ObjectError::Elf(error.to_string()))?;
        }
        for &KernelRef { slot, item } in &program.code.kernel {
            let offset = base + u64::from(slot) * 8;
            match item {
                KernelItem::Function(function) => {
                    let symbol = symbols.functions[&function];
                    let flags = RelocationFlags::Elf { r_type: R_BPF_64_32 };
                    elf.add_relocation(section, Relocation { offset, symbol, addend: 0, flags })
                        .map_err(|error| ObjectError::Elf(error.to_string()))?;
                }
                KernelItem::Field(field) => {
                    let (structure, member, _) = field.place();
                    let access = types.string(&format!("0:{member}"));
                    let of = symbols.structures[structure.name];
                    infos.fields.push([offset as u32, of, access, CORE_FIELD_BYTE_OFFSET]);
                }
            }
        }
        infos.funcs.push([base as u32, types.func(&program.name, proto)]);
        add_lines(types, &mut infos.lines, base as u32, &program.code);
    }
    Ok(())
}

/// The slots as they are in the file: a map reference is a plain `ld_imm64` of its offset, a call of a kernel function
/// is [`EXTERN_CALL`].
fn file_slots(code: &Code) -> Vec<u64> {
    let mut slots = code.slots.clone();
    for reloc in &code.relocs {
        let at = reloc.slot as usize;
        let dst = Reg::new((slots[at] >> 8) as u8 & 15).unwrap_or(Reg::R0);
        let imm = match reloc.kind {
            RelocKind::Fd => 0,
            RelocKind::Value { offset } => u64::from(offset),
        };
        let mut plain = Vec::with_capacity(2);
        Insn::LoadImm64 { dst, imm }.encode(&mut plain);
        slots[at..at + 2].copy_from_slice(&plain);
    }
    for used in code.kernel.iter().filter(|used| matches!(used.item, KernelItem::Function(_))) {
        slots[used.slot as usize] = EXTERN_CALL;
    }
    slots
}

/// A record for each change of line. The kernel wants one at each function's first instruction.
pub(crate) fn add_lines(types: &mut btf::Builder, out: &mut Vec<[u32; 4]>, base: u32, code: &Code) {
    let mut push = |slot: u32, line: Option<usize>| {
        let (file, text, number) = match line.map(|line| &code.lines[line]) {
            Some(line) => (code.files[line.file.index()].as_str(), line.text.as_str(), line.line),
            None => ("", "", 0),
        };
        out.push([base + slot * 8, types.string(file), types.string(text), number << LINE_SHIFT]);
    };
    if code.line_marks.first().is_none_or(|&(slot, _)| slot != 0) {
        push(0, None);
    }
    for (slot, line) in &code.line_marks {
        push(*slot, line.expand().map(|line| line.index()));
    }
}

/// The records of `.BTF.ext`, by the string offset of the section they are about.
#[derive(Default)]
struct Ext {
    sections: BTreeMap<u32, Infos>,
}

#[derive(Default)]
struct Infos {
    funcs: Vec<[u32; 2]>,
    lines: Vec<[u32; 4]>,
    fields: Vec<[u32; 4]>,
}

impl Ext {
    fn finish(self) -> Vec<u8> {
        let (mut funcs, mut lines) = (vec![FUNC_INFO_BYTES], vec![LINE_INFO_BYTES]);
        for (section, infos) in &self.sections {
            funcs.extend([*section, infos.funcs.len() as u32]);
            funcs.extend_from_slice(infos.funcs.as_flattened());
            lines.extend([*section, infos.lines.len() as u32]);
            lines.extend_from_slice(infos.lines.as_flattened());
        }
        let mut fields = Vec::new();
        for (section, infos) in self.sections.iter().filter(|(_, infos)| !infos.fields.is_empty()) {
            if fields.is_empty() {
                fields.push(CORE_RELO_BYTES);
            }
            fields.extend([*section, infos.fields.len() as u32]);
            fields.extend_from_slice(infos.fields.as_flattened());
        }
        let [func_bytes, line_bytes, field_bytes] =
            [&funcs, &lines, &fields].map(|words| words.len() as u32 * 4);
        let mut parts = vec![0, func_bytes, func_bytes, line_bytes];
        if field_bytes > 0 {
            parts.extend([func_bytes + line_bytes, field_bytes]);
        }
        let mut out = btf::header(&parts);
        for word in funcs.iter().chain(&lines).chain(&fields) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out
    }
}
