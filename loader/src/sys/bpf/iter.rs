//! Programs that go over what the kernel has (Documentation/bpf/bpf_iterators.rst): loaded, run once, and read.
//!
//! Such a program is attached to nothing: a link only says what it goes over, and reading a descriptor made of the link
//! runs it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd;

use super::{LINK_CREATE, LinkCreateAttr, PROG_LOAD, ProgLoadAttr, Sys, c_string, fd, name16, ptr};

const ITER_CREATE: i32 = 33;
/// `BPF_PROG_TYPE_TRACING` of `enum bpf_prog_type`, `BPF_TRACE_ITER` of `enum bpf_attach_type`.
const TRACING: u32 = 26;
const ATTACH_TRACE_ITER: u32 = 28;

#[repr(C)]
#[derive(Default)]
struct IterCreateAttr {
    link_fd: u32,
    flags: u32,
}

impl Sys {
    /// What a program writes, going over what the iterator whose function has the type number `over` goes over.
    ///
    /// # Errors
    /// The kernel refuses the program, or has no such iterator.
    pub fn iterate(&self, name: &str, slots: &[u64], over: u32) -> io::Result<Vec<u8>> {
        let license = c_string(b"GPL")?;
        let mut attr = ProgLoadAttr {
            prog_type: TRACING,
            insn_cnt: slots.len() as u32,
            insns: ptr(slots),
            license: license.as_ptr() as u64,
            prog_name: name16(name),
            expected_attach_type: ATTACH_TRACE_ITER,
            attach_btf_id: over,
            ..ProgLoadAttr::default()
        };
        // SAFETY: all buffers live, and the lengths beside them are theirs.
        let program = unsafe { self.bpf_fd("prog_load", PROG_LOAD, &mut attr) }?;
        let mut attr = LinkCreateAttr {
            prog_fd: fd(&program),
            attach_type: ATTACH_TRACE_ITER,
            ..LinkCreateAttr::default()
        };
        // SAFETY: no addresses.
        let link = unsafe { self.bpf_fd("iter_link_create", LINK_CREATE, &mut attr) }?;
        let mut attr = IterCreateAttr { link_fd: fd(link.as_fd()), flags: 0 };
        // SAFETY: no addresses.
        let iterator = unsafe { self.bpf_fd("iter_create", ITER_CREATE, &mut attr) }?;
        self.enter("read")?;
        let mut bytes = Vec::new();
        File::from(iterator).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}
