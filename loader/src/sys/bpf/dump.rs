//! A loaded program's code as the kernel gives it back: rewritten instructions, machine code, and which source line
//! each came from.
//!
//! `BPF_OBJ_GET_INFO_BY_FD` is asked twice, for the lengths and for the contents (kernel/bpf/syscall.c,
//! `bpf_prog_get_info_by_fd`). What the kernel does not tell, because the process lacks CAP_SYSLOG or the program has no
//! line information, is empty.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::{ProgInfoBytes, Sys};

const BTF_GET_FD_BY_ID: i32 = 19;

/// `struct bpf_line_info` of include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LineInfo {
    /// Slot of the first instruction of the line, in the rewritten program.
    pub slot: u32,
    /// The file's name: an offset into the strings of the program's BTF.
    pub file: u32,
    /// The line's text, likewise.
    pub text: u32,
    /// The line's number, above 10 bits of column.
    pub line_column: u32,
}

/// A program's code. A program of several functions has them one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramCode {
    /// Instruction slots as the verifier rewrote them. Map references hold the map's number.
    pub xlated: Vec<u64>,
    /// Machine code.
    pub jited: Vec<u8>,
    /// Address of each function's machine code.
    pub addresses: Vec<u64>,
    /// Bytes of each function's machine code.
    pub lengths: Vec<u32>,
    /// Where source lines begin, in ascending order of slots.
    pub lines: Vec<LineInfo>,
    /// For each of `lines`, the address of its machine code.
    pub line_addresses: Vec<u64>,
    /// Number of the BTF that holds names; 0 for none.
    pub btf: u32,
}

#[repr(C)]
#[derive(Default)]
struct BtfInfoBytes {
    btf: u64,
    btf_size: u32,
    id: u32,
    name: u64,
    name_len: u32,
    kernel_btf: u32,
}

impl Sys {
    /// A program's code.
    pub fn prog_code(&self, program: impl AsFd) -> io::Result<ProgramCode> {
        let program = program.as_fd();
        let mut sizes = ProgInfoBytes::default();
        // SAFETY: no addresses.
        unsafe { self.info("prog_code", program, &mut sizes) }?;
        let mut code = ProgramCode {
            xlated: vec![0; sizes.xlated_prog_len as usize / size_of::<u64>()],
            jited: vec![0; sizes.jited_prog_len as usize],
            addresses: vec![0; sizes.nr_jited_ksyms as usize],
            lengths: vec![0; sizes.nr_jited_func_lens as usize],
            lines: vec![LineInfo::default(); sizes.nr_line_info as usize],
            line_addresses: vec![0; sizes.nr_jited_line_info as usize],
            btf: sizes.btf_id,
        };
        let mut info = ProgInfoBytes {
            xlated_prog_len: (code.xlated.len() * size_of::<u64>()) as u32,
            xlated_prog_insns: code.xlated.as_mut_ptr() as u64,
            jited_prog_len: code.jited.len() as u32,
            jited_prog_insns: code.jited.as_mut_ptr() as u64,
            nr_jited_ksyms: code.addresses.len() as u32,
            jited_ksyms: code.addresses.as_mut_ptr() as u64,
            nr_jited_func_lens: code.lengths.len() as u32,
            jited_func_lens: code.lengths.as_mut_ptr() as u64,
            nr_line_info: code.lines.len() as u32,
            line_info: code.lines.as_mut_ptr() as u64,
            line_info_rec_size: size_of::<LineInfo>() as u32,
            nr_jited_line_info: code.line_addresses.len() as u32,
            jited_line_info: code.line_addresses.as_mut_ptr() as u64,
            jited_line_info_rec_size: size_of::<u64>() as u32,
            ..ProgInfoBytes::default()
        };
        // SAFETY: each buffer is exclusively borrowed and has room for what the count or length beside it says, in
        // records of the size given.
        unsafe { self.info("prog_code", program, &mut info) }?;
        // What the kernel keeps to itself has its address or count set to 0.
        let told = |address: u64, count: u32| if address == 0 { 0 } else { count as usize };
        code.xlated.truncate(told(info.xlated_prog_insns, info.xlated_prog_len) / size_of::<u64>());
        code.jited.truncate(told(info.jited_prog_insns, info.jited_prog_len));
        code.addresses.truncate(told(info.jited_ksyms, info.nr_jited_ksyms));
        code.lengths.truncate(told(info.jited_func_lens, info.nr_jited_func_lens));
        code.lines.truncate(told(info.line_info, info.nr_line_info));
        code.line_addresses.truncate(told(info.jited_line_info, info.nr_jited_line_info));
        Ok(code)
    }

    /// Opens a BTF by its number.
    pub fn btf_by_id(&self, id: u32) -> io::Result<OwnedFd> {
        self.by_id("btf_by_id", BTF_GET_FD_BY_ID, id)
    }

    /// The bytes of a BTF, header included.
    pub fn btf_bytes(&self, btf: impl AsFd) -> io::Result<Vec<u8>> {
        let btf = btf.as_fd();
        let mut info = BtfInfoBytes::default();
        // SAFETY: no addresses.
        unsafe { self.info("btf_bytes", btf, &mut info) }?;
        let mut bytes = vec![0u8; info.btf_size as usize];
        let mut info = BtfInfoBytes {
            btf: bytes.as_mut_ptr() as u64,
            btf_size: bytes.len() as u32,
            ..BtfInfoBytes::default()
        };
        // SAFETY: the buffer is exclusively borrowed and as long as said.
        unsafe { self.info("btf_bytes", btf, &mut info) }?;
        bytes.truncate(info.btf_size as usize);
        Ok(bytes)
    }
}
