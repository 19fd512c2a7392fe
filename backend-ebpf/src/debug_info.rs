//! What the kernel is told about a program beside its instructions: types, functions, source lines.
//!
//! A loader that reads ELF files takes them from `.BTF` and `.BTF.ext`. One that holds an
//! [`Object`](crate::object::Object) in memory gets the same here, for one program, in the form that `BPF_BTF_LOAD` and
//! `BPF_PROG_LOAD` take (include/uapi/linux/bpf.h, `struct bpf_func_info` and `struct bpf_line_info`): positions are
//! counted in instruction slots from the program's start, not in bytes from the section's.

use crate::btf::Builder;
use crate::elf::write::add_lines;
use crate::object::Program;

/// Types, functions and lines of one program, as bytes for the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugInfo {
    /// The BTF blob.
    pub btf: Vec<u8>,
    /// Records of [`DebugInfo::FUNC_INFO_BYTES`] each.
    pub func_info: Vec<u8>,
    /// Records of [`DebugInfo::LINE_INFO_BYTES`] each.
    pub line_info: Vec<u8>,
}

impl DebugInfo {
    /// Bytes of a record of function information.
    pub const FUNC_INFO_BYTES: u32 = crate::elf::FUNC_INFO_BYTES;
    /// Bytes of a record of line information.
    pub const LINE_INFO_BYTES: u32 = crate::elf::LINE_INFO_BYTES;

    /// What is known about a program.
    pub fn of(program: &Program) -> DebugInfo {
        let mut types = Builder::default();
        let int = types.int();
        let context = types.opaque_struct(program.kind.context(), program.kind.context_bytes());
        let pointer = types.ptr(context);
        let proto = types.func_proto(int, &[("ctx", pointer)]);
        let func = types.func(&program.name, proto);
        let mut lines = Vec::new();
        add_lines(&mut types, &mut lines, 0, &program.code);
        for record in &mut lines {
            record[0] /= 8;
        }
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        DebugInfo {
            btf: types.finish(),
            func_info: bytes(&[0, func]),
            line_info: bytes(lines.as_flattened()),
        }
    }
}
