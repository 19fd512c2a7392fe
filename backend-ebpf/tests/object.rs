//! Objects survive the way through their file, the file is always the same, and damaged files are refused by name.

use std::io::Cursor;

use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::Reg;
use polc_backend_ebpf::manifest::{Counted, Manifest};
use polc_backend_ebpf::object::{
    BSS, DataSection, MapDef, MapKind, Object, ObjectError, Program, ProgramKind,
};
use polc_ir::limits::{BPF_NAME_BYTES_MAX, OBJECT_BSS_BYTES_MAX, OBJECT_DATA_BYTES_MAX};
use polc_tests::programs::{FRAME_KINDS, looks_up_connections, sample, without_comments};

#[test]
fn read_gives_back_what_was_written() {
    for kinds in [&FRAME_KINDS[..], &[ProgramKind::Xdp], &[ProgramKind::Classifier]] {
        let object = sample(kinds);
        let bytes = object.write().expect("writes");
        assert_eq!(bytes, object.write().expect("writes"), "the same bytes each time");
        let again = Object::read(&bytes).expect("reads");
        assert_eq!(again, without_comments(object));
        assert_eq!(again.write().expect("writes"), bytes);
    }
}

/// A counter slot names its rule in full; the file has it once.
#[test]
fn what_slots_repeat_is_written_once() {
    let mut object = sample(&[ProgramKind::Xdp]);
    let text = "-A INPUT -p tcp -j DROP";
    let counted = Counted {
        table: "filter".into(),
        chain: "INPUT".into(),
        rule: Some(7),
        file: Some("rules.v4".into()),
        line: Some(12),
        text: text.into(),
        canonical: None,
    };
    let slot = &mut object.manifest.counters[0];
    (slot.table, slot.chain) = (Some("filter".into()), Some("INPUT".into()));
    (slot.rule, slot.file, slot.line) = (Some(7), Some("rules.v4".into()), Some(12));
    (slot.text, slot.counts) = (text.into(), vec![0]);
    object.manifest.counted = vec![counted];
    let written = |object: &Object| {
        let bytes = object.write().expect("writes");
        assert_eq!(Object::read(&bytes).expect("reads"), without_comments(object.clone()));
        bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count()
    };
    let once = written(&object);
    // Another rule's text is kept beside what is counted.
    object.manifest.counted[0].line = Some(13);
    assert_eq!(written(&object), once + 1);
}

/// An outline is the object with zeros for data.
#[test]
fn outlines_have_no_contents() {
    let object = sample(&[ProgramKind::Xdp]);
    let bytes = object.write().expect("writes");
    let outline = Object::read_outline(Cursor::new(&bytes)).expect("reads");
    let mut expected = without_comments(object.clone());
    for map in expected.maps.values_mut() {
        if let MapKind::Data { contents, .. } = &mut map.kind {
            contents.fill(0);
        }
    }
    assert_eq!(outline, expected);
    assert_ne!(outline, without_comments(object), "it has data");
}

#[test]
fn several_programs_share_a_section() {
    let mut object = Object::new(Manifest::default());
    let data = object.maps.push(MapDef::data(BSS, DataSection::Bss, vec![0; 64]));
    for (name, value) in [("one", 1), ("two", 2), ("three", 3)] {
        let mut a = Asm::new();
        let file = a.file(format!("{name}.rules"));
        let line = a.line(file, value as u32, name);
        a.mov32(Reg::R0, value);
        a.set_line(Some(line));
        a.load_map_value(Reg::R1, data, value as u32);
        a.exit();
        let code = a.finish().expect("assembles");
        object.programs.push(Program { name: name.to_string(), kind: ProgramKind::Xdp, code });
    }
    let bytes = object.write().expect("writes");
    assert_eq!(Object::read(&bytes).expect("reads"), object);
}

#[test]
fn calls_of_kernel_functions_keep_their_names() {
    let object = looks_up_connections(ProgramKind::Xdp);
    let calls = |object: &Object| object.programs[0].code.kernel.clone();
    assert_eq!(calls(&object).len(), 2);
    let bytes = object.write().expect("writes");
    assert_eq!(Object::read(&bytes).expect("reads"), without_comments(object.clone()));
    let unnamed = |change: fn(&mut Object)| {
        let mut object = object.clone();
        change(&mut object);
        object.write().expect_err("refused")
    };
    assert!(matches!(unnamed(|o| _ = o.programs[0].code.kernel.pop()), ObjectError::Insn { .. }));
    assert!(matches!(unnamed(|o| o.programs[0].code.kernel[0].slot += 1), ObjectError::Insn { .. }));
}

#[test]
fn malformed_objects_are_not_written() {
    let with = |change: fn(&mut Object)| {
        let mut object = sample(&[ProgramKind::Xdp]);
        change(&mut object);
        object.write().expect_err("refused")
    };
    assert!(matches!(with(|o| o.programs[0].name = "a-b".to_string()), ObjectError::Malformed(_)));
    assert!(matches!(
        with(|o| o.programs[0].name = "sixteen_letters_".to_string()),
        ObjectError::Malformed(_)
    ));
    assert!(matches!(with(|o| o.programs.push(o.programs[0].clone())), ObjectError::Malformed(_)));
    assert!(matches!(with(|o| o.programs[0].code.slots.clear()), ObjectError::Insn { at: 0, .. }));
    assert!(matches!(with(|o| o.programs[0].code.slots[0] = u64::MAX), ObjectError::Insn { at: 0, .. }));
    assert!(matches!(with(|o| _ = o.programs[0].code.relocs.pop()), ObjectError::Insn { .. }));
    assert!(matches!(with(|o| o.programs[0].code.ctx_loads.push(9)), ObjectError::Insn { at: 9, .. }));
    assert!(matches!(with(|o| _ = o.maps.push(MapDef::percpu_array("x", 8, 0))), ObjectError::Malformed(_)));
    let bss = |o: &mut Object| _ = o.maps.push(MapDef::data("x", DataSection::Bss, vec![0]));
    assert!(matches!(with(bss), ObjectError::Malformed(_)));
    let empty = |o: &mut Object| _ = o.maps.push(MapDef::data("x", DataSection::Data, Vec::new()));
    assert!(matches!(with(empty), ObjectError::Malformed(_)));
}

#[test]
fn limits_hold_at_their_edges() {
    let with_bss = |bytes: usize| {
        let mut object = sample(&[ProgramKind::Xdp]);
        let bss = object.map(BSS).expect("named");
        object.maps[bss] = MapDef::data(BSS, DataSection::Bss, vec![0; bytes]);
        object.write()
    };
    let largest = with_bss(OBJECT_BSS_BYTES_MAX).expect("writes");
    assert!(largest.len() < 100_000, "zeros take no space");
    assert!(Object::read(&largest).is_ok());
    assert!(matches!(with_bss(OBJECT_BSS_BYTES_MAX + 1), Err(ObjectError::Malformed(_))));

    // Written, it would be a large file; verifying reads no contents.
    let with_data = |bytes: usize| {
        let mut object = sample(&[ProgramKind::Xdp]);
        object.maps.push(MapDef::data("large", DataSection::Data, vec![0; bytes]));
        object.verify()
    };
    assert_eq!(with_data(OBJECT_DATA_BYTES_MAX), Ok(()));
    assert!(matches!(with_data(OBJECT_DATA_BYTES_MAX + 1), Err(ObjectError::Malformed(_))));

    let named = |bytes: usize| {
        let mut object = sample(&[ProgramKind::Xdp]);
        object.programs[0].name = "n".repeat(bytes);
        object.write().map(drop)
    };
    assert_eq!(named(BPF_NAME_BYTES_MAX), Ok(()));
    assert!(named(BPF_NAME_BYTES_MAX + 1).is_err());
    assert!(named(0).is_err());
}

#[test]
fn damaged_files_are_refused_without_a_panic() {
    let bytes = sample(&FRAME_KINDS).write().expect("writes");
    assert!(matches!(Object::read(b""), Err(ObjectError::Elf(_))));
    assert!(matches!(Object::read(b"#!/bin/sh\n"), Err(ObjectError::Elf(_))));
    for length in 0..bytes.len() {
        assert!(Object::read(&bytes[..length]).is_err(), "cut to {length} bytes");
        assert!(Object::read_outline(Cursor::new(&bytes[..length])).is_err(), "cut to {length} bytes");
    }
    let mut machine = bytes.clone();
    machine[18] = 62; // EM_X86_64
    assert_eq!(Object::read(&machine), Err(ObjectError::Machine));
    // Every byte, with its bits inverted one at a time and all together: an error or another object.
    for at in 0..bytes.len() {
        for flip in [0x01, 0x04, 0x10, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            if let Ok(object) = Object::read(&damaged) {
                let again = object.write().expect("what was read can be written");
                assert_eq!(Object::read(&again).expect("and read"), object);
            }
        }
    }
}
