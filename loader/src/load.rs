//! An object into the kernel: maps made and filled, programs verified and translated. Nothing is attached.
//!
//! Everything lives as long as the returned descriptors, so whatever fails afterwards leaves nothing behind. polc's own
//! objects need no CO-RE and no subprograms, so the raw calls are shorter than a general loader would be, and each
//! failure can be told in the user's words: a refusal of the verifier is traced back to the rule whose code it is about.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use cranelift_entity::PrimaryMap;
use polc_backend_ebpf::asm::{Code, KernelRef};
use polc_backend_ebpf::debug_info::DebugInfo;
use polc_backend_ebpf::kernel_api::KernelItem;
use polc_backend_ebpf::object::{DataSection, MapDef, MapKind, MapType, Object, Program, ProgramKind};
use polc_ir::entities::Map;
use polc_ir::limits::VERIFIER_LOG_BYTES_MAX;

use crate::error::{Error, Refusal};
use crate::kernel_types::KernelTypes;
use crate::sys::{self, BtfBlob, MapFlags, MapSpec, ProgramSpec, ProgramType, Sys};

/// `BPF_XDP` of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;
/// `BPF_NETFILTER`.
const ATTACH_NETFILTER: u32 = 45;

/// An object's programs and maps in the kernel.
#[derive(Debug)]
pub struct Loaded {
    /// The programs, in the object's order.
    pub programs: Vec<LoadedProgram>,
    /// The maps, by the object's numbers.
    pub maps: PrimaryMap<Map, sys::Map>,
    /// Time that the kernel took for it.
    pub kernel_time: Duration,
    names: Vec<(String, Map)>,
}

/// A program in the kernel.
#[derive(Debug)]
pub struct LoadedProgram {
    /// Its name.
    pub name: String,
    /// What it is attached to.
    pub kind: ProgramKind,
    /// The program.
    pub fd: OwnedFd,
}

impl Loaded {
    /// The map of that name.
    pub fn map(&self, name: &str) -> Option<&sys::Map> {
        self.names.iter().find(|(own, _)| own == name).map(|(_, map)| &self.maps[*map])
    }

    /// The maps with their names, in the object's order.
    pub fn named_maps(&self) -> impl Iterator<Item = (&str, &sys::Map)> {
        self.names.iter().map(|(name, map)| (name.as_str(), &self.maps[*map]))
    }

    /// The program to attach: the first.
    pub fn program(&self) -> Option<&LoadedProgram> {
        self.programs.first()
    }
}

/// Makes an object's maps, fills those with contents, and loads its programs.
///
/// # Errors
/// [`Error::MapMemory`], [`Error::Verifier`], or the call that failed. Nothing stays in the kernel.
pub fn load(sys: &Sys, object: &Object) -> Result<Loaded, Error> {
    // Kernels before 5.11 count maps as locked memory, within a limit that is mostly too small. Not being allowed to
    // raise it shows soon enough.
    let _ = sys.raise_memlock();
    let began = Instant::now();
    let mut maps = PrimaryMap::new();
    let mut names = Vec::new();
    for (map, def) in &object.maps {
        maps.push(make_map(sys, def)?);
        names.push((def.name.clone(), map));
    }
    let mut kernel_time = began.elapsed();
    let needed = object.programs.iter().any(|program| !program.code.kernel.is_empty());
    let types = if needed { Some(KernelTypes::read().map_err(Error::KernelTypes)?) } else { None };
    let mut programs = Vec::new();
    for program in &object.programs {
        let fds = |map: Map| maps[map].as_fd();
        let (program, time) = load_program(sys, program, &object.license, &fds, types)?;
        programs.push(program);
        kernel_time += time;
    }
    Ok(Loaded { programs, maps, kernel_time, names })
}

/// What a map of an object is in the kernel.
pub fn map_spec(def: &MapDef) -> MapSpec<'_> {
    match &def.kind {
        MapKind::Data { section, contents } => MapSpec {
            map_type: MapType::ARRAY.0,
            key_bytes: 4,
            value_bytes: contents.len() as u32,
            max_entries: 1,
            // As libbpf makes them: data may be changed word by word while programs run.
            flags: if *section == DataSection::Rodata { MapFlags::RDONLY_PROG } else { MapFlags::MMAPABLE },
            name: &def.name,
        },
        MapKind::Declared { map_type, key_bytes, value_bytes, max_entries, flags } => MapSpec {
            map_type: map_type.0,
            key_bytes: *key_bytes,
            value_bytes: *value_bytes,
            max_entries: *max_entries,
            flags: *flags,
            name: &def.name,
        },
    }
}

fn make_map(sys: &Sys, def: &MapDef) -> Result<sys::Map, Error> {
    let spec = map_spec(def);
    let map = sys.map_create(&spec).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOMEM | libc::E2BIG | libc::EPERM) => Error::MapMemory {
            map: def.name.clone(),
            bytes: u64::from(spec.max_entries) * (u64::from(spec.value_bytes) + u64::from(spec.key_bytes)),
            source,
        },
        _ => Error::Call { what: format!("make map `{}`", def.name), source },
    })?;
    if let MapKind::Data { section, contents } = &def.kind {
        let fill = Error::call(format!("fill map `{}`", def.name));
        if contents.iter().any(|&byte| byte != 0) {
            sys.map_update(&map, &0u32.to_ne_bytes(), contents).map_err(fill)?;
        }
        if *section == DataSection::Rodata {
            sys.map_freeze(&map).map_err(Error::call(format!("freeze map `{}`", def.name)))?;
        }
    }
    Ok(map)
}

/// Loads a program; how long the kernel took.
fn load_program<'m>(
    sys: &Sys,
    program: &Program,
    license: &str,
    map: &dyn Fn(Map) -> BorrowedFd<'m>,
    types: Option<&KernelTypes>,
) -> Result<(LoadedProgram, Duration), Error> {
    let mut slots = program.code.slots.clone();
    for reloc in &program.code.relocs {
        // The instruction has the kind of reference already; its upper half is the descriptor.
        let slot = &mut slots[reloc.slot as usize];
        *slot = *slot & 0xffff_ffff | (map(reloc.map).as_raw_fd() as u64) << 32;
    }
    resolve(&program.code, &mut slots, types)?;
    let debug = DebugInfo::of(program);
    let began = Instant::now();
    // A kernel that does not take the type information runs the program all the same.
    let btf = sys.btf_load(&debug.btf).ok();
    let (kind, attach_type) = match program.kind {
        ProgramKind::Xdp => (ProgramType::XDP, ATTACH_XDP),
        ProgramKind::Classifier => (ProgramType::SCHED_CLS, 0),
        ProgramKind::Netfilter => (ProgramType::NETFILTER, ATTACH_NETFILTER),
    };
    let spec = ProgramSpec {
        kind,
        attach_type,
        name: &program.name,
        license,
        slots: &slots,
        btf: btf.as_ref().map(|fd| BtfBlob {
            fd: fd.as_fd(),
            func_info: &debug.func_info,
            func_info_bytes: DebugInfo::FUNC_INFO_BYTES,
            line_info: &debug.line_info,
            line_info_bytes: DebugInfo::LINE_INFO_BYTES,
        }),
    };
    let fd = match sys.prog_load(&spec, &mut []) {
        Ok(fd) => fd,
        Err(source) => {
            let log = log_of(sys, &spec);
            return Err(refusal(program, &log, source));
        }
    };
    let loaded = LoadedProgram { name: program.name.clone(), kind: program.kind, fd };
    Ok((loaded, began.elapsed()))
}

/// Gives calls of kernel functions the numbers that the functions have in this kernel, and loads of fields of its
/// structures the offsets.
fn resolve(code: &Code, slots: &mut [u64], types: Option<&KernelTypes>) -> Result<(), Error> {
    let Some(types) = types else { return Ok(()) };
    for &KernelRef { slot, item } in &code.kernel {
        let slot = &mut slots[slot as usize];
        match item {
            KernelItem::Function(function) => {
                let id = types.function(function.name()).map_err(Error::KernelTypes)?;
                *slot = *slot & 0xffff_ffff | u64::from(id) << 32;
            }
            KernelItem::Field(field) => {
                let found = types.field_offset(field.structure, field.name).map_err(Error::KernelTypes)?;
                *slot = *slot & !0xffff_0000 | u64::from(found as u16) << 16;
            }
        }
    }
    Ok(())
}

/// The verifier's log of a program that it refuses: the buffer grows until the log fits.
fn log_of(sys: &Sys, spec: &ProgramSpec<'_>) -> String {
    let mut bytes = 1 << 16;
    loop {
        let mut log = vec![0u8; bytes];
        let result = sys.prog_load(spec, &mut log);
        let full = result.is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC));
        if full && bytes < VERIFIER_LOG_BYTES_MAX {
            bytes *= 4;
            continue;
        }
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        return String::from_utf8_lossy(&log[..end]).into_owned();
    }
}

fn refusal(program: &Program, log: &str, source: std::io::Error) -> Error {
    let (message, slot) = last_words(log);
    let rule = slot.and_then(|slot| rule_at(&program.code, slot));
    let lines: Vec<&str> = log.lines().collect();
    let tail = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
    Error::Verifier(Box::new(Refusal { program: program.name.clone(), message, rule, log: tail, source }))
}

/// Lines of the verifier's log that an error keeps.
const LOG_LINES_SHOWN: usize = 12;

/// What the verifier says at the end, statistics aside, and the slot of the last instruction it looked at.
fn last_words(log: &str) -> (String, Option<u32>) {
    let statistics = |line: &str| {
        ["processed ", "verification time", "stack depth"].iter().any(|start| line.starts_with(start))
    };
    let said = log.lines().rev().find(|line| !line.trim().is_empty() && !statistics(line));
    // An instruction is printed as `17: (85) call ...`.
    let slot = log.lines().rev().find_map(|line| {
        let (number, rest) = line.split_once(": (")?;
        rest.get(2..3).filter(|end| *end == ")")?;
        number.parse().ok()
    });
    (said.unwrap_or("without a word").trim().to_string(), slot)
}

/// The user's line that a slot's instruction comes from.
fn rule_at(code: &Code, slot: u32) -> Option<(String, u32, String)> {
    let line = code.line_at(slot)?;
    let file = code.files.get(line.file.as_u32() as usize)?;
    Some((file.clone(), line.line, line.text.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_last_words_are_found() {
        let log = "0: R1=ctx() R10=fp0\n; -A INPUT -j DROP @ rules.v4:7\n0: (61) r0 = *(u32 *)(r1 +200)\n\
                   invalid bpf_context access off=200 size=4\nprocessed 1 insns (limit 1000000) max_states 0\n";
        assert_eq!(last_words(log), ("invalid bpf_context access off=200 size=4".to_string(), Some(0)));
        assert_eq!(last_words(""), ("without a word".to_string(), None));
    }

    fn object(ctx_offset: i16) -> Object {
        use polc_backend_ebpf::asm::Asm;
        use polc_backend_ebpf::insn::{Reg, Size};
        let mut object = Object::new(Default::default());
        object.maps.push(MapDef::percpu_array("counts", 16, 1_000));
        let mut a = Asm::new();
        let file = a.file("rules.v4");
        let line = a.line(file, 7, "-A INPUT -j DROP");
        a.set_line(Some(line));
        a.load(Size::W, Reg::R0, Reg::R1, ctx_offset);
        a.exit();
        let code = a.finish().expect("assembles");
        object.programs.push(Program { name: "polc".into(), kind: ProgramKind::Classifier, code });
        object
    }

    #[test]
    fn maps_that_memory_does_not_hold_are_named() {
        let sys = Sys::with_hook(|call| match call {
            "map_create" => Err(std::io::Error::from_raw_os_error(libc::ENOMEM)),
            _ => Ok(()),
        });
        let error = load(&sys, &object(8)).expect_err("no memory");
        assert!(matches!(&error, Error::MapMemory { map, bytes: 20_000, .. } if map == "counts"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("free memory")));
    }

    #[test]
    fn the_verifiers_refusal_names_the_rule() {
        let sys = Sys::new();
        if !sys.missing_capabilities().is_empty() {
            eprintln!("skipped the_verifiers_refusal_names_the_rule: needs root");
            return;
        }
        assert!(load(&sys, &object(8)).is_ok());
        // Beyond the end of `struct __sk_buff`.
        let error = load(&sys, &object(200)).expect_err("refused");
        let Error::Verifier(refusal) = &error else { panic!("{error}") };
        let rule = ("rules.v4".to_string(), 7, "-A INPUT -j DROP".to_string());
        assert_eq!(refusal.rule, Some(rule));
        let text = error.to_string();
        assert!(text.contains("invalid bpf_context access") && text.contains("rules.v4:7"), "{text}");
        assert!(error.hint().is_some());
    }
}
