//! The programs that put frames into a namespace's stack and see how far they come.
//!
//! A frame is recognised by a number in its own header, since nothing else of it is the same at every hook: the
//! identification of IPv4, the flow label of IPv6 (of which the lowest 20 bits are free to use). Probes sit before
//! and after all chains of a hook and leave a bit in the frame's result; the last of a hook also keeps the mark.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use polc_backend_ebpf::asm::Asm;
use polc_backend_ebpf::insn::{AluOp, Cond, Helper, Reg, Size};
use polc_ir::entities::Map as MapId;
use polc_ir::hook::Family;

use super::NetfilterError;
use crate::kernel_types::KernelTypes;
use crate::sys::{Map, ProgramSpec, ProgramType, Sys};

/// `bpf_redirect`, `bpf_xdp_adjust_tail`, `bpf_probe_read_kernel` and `bpf_xdp_store_bytes`
/// (include/uapi/linux/bpf.h).
const REDIRECT: Helper = Helper(23);
const XDP_ADJUST_TAIL: Helper = Helper(65);
const PROBE_READ_KERNEL: Helper = Helper(113);
const XDP_STORE_BYTES: Helper = Helper(190);

const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
const NF_DROP: i32 = 0;
const NF_ACCEPT: i32 = 1;

/// `BPF_NETFILTER` of `enum bpf_attach_type`.
const ATTACH_NETFILTER: u32 = 45;
/// Offset of `skb` in `struct bpf_nf_ctx` (include/net/netfilter/nf_bpf_link.h).
const CTX_SKB: i16 = 8;

/// Bytes of a frame's result: stages, the mark after PREROUTING, the mark after the last hook, connection state, and
/// length after defragmentation.
pub(super) const RESULT_BYTES: u32 = 24;
/// Bytes of a frame in the pool, after its length and the device it is sent by.
pub(super) const FRAME_BYTES_MAX: usize = 2_048;
/// Bytes of a frame before the injector fills it.
pub(super) const TEMPLATE_BYTES: usize = 64;

/// What a probe does beside noting its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notes {
    /// Nothing.
    Stage,
    /// The packet's length.
    Length,
    /// The mark and the connection state, at this offset of the result for the mark.
    Mark(i16),
}

/// Offsets in `struct sk_buff`.
#[derive(Clone, Copy, Debug)]
pub(super) struct SkbFields {
    data: i16,
    len: i16,
    mark: i16,
    nfct: i16,
}

impl SkbFields {
    pub(super) fn read() -> Result<SkbFields, NetfilterError> {
        let types = KernelTypes::read()?;
        let field = |name| types.field_offset("sk_buff", name);
        Ok(SkbFields {
            data: field("data")?,
            len: field("len")?,
            mark: field("mark")?,
            nfct: field("_nfct")?,
        })
    }
}

/// Assembles and loads; map numbers in the code are indices into `maps`.
fn load(
    sys: &Sys,
    asm: Asm,
    kind: ProgramType,
    attach_type: u32,
    maps: &[&Map],
) -> Result<OwnedFd, NetfilterError> {
    let mut code = asm.finish().expect("a fixed program assembles");
    for reloc in &code.relocs {
        let fd = maps[reloc.map.as_u32() as usize].as_fd().as_raw_fd();
        // `BPF_PSEUDO_MAP_FD` in the source register's four bits, the descriptor as the immediate.
        code.slots[reloc.slot as usize] |= 1 << 12 | u64::from(fd as u32) << 32;
    }
    let spec =
        ProgramSpec { kind, attach_type, name: "polc_probe", license: "GPL", slots: &code.slots, btf: None };
    sys.prog_load(&spec, &mut []).or_else(|error| {
        let mut log = vec![0; 1 << 16];
        match sys.prog_load(&spec, &mut log) {
            Ok(program) => Ok(program),
            Err(_) => {
                let end = log.iter().position(|&byte| byte == 0).unwrap_or(0);
                let text = String::from_utf8_lossy(&log[..end]).into_owned();
                Err(NetfilterError::Kernel(format!("loading a probe ({})", text.trim()), error))
            }
        }
    })
}

/// A program that notes `stage` for a frame, and lets it on or drops it.
pub(super) fn probe(
    sys: &Sys,
    family: Family,
    results: &Map,
    fields: &SkbFields,
    stage: u32,
    notes: Notes,
    drops: bool,
) -> Result<OwnedFd, NetfilterError> {
    const HEADER: i16 = -24;
    const KEY: i16 = -32;
    let mut a = Asm::new();
    let out = a.label();
    a.load(Size::Dw, Reg::R6, Reg::R1, CTX_SKB);
    a.load(Size::Dw, Reg::R3, Reg::R6, fields.data);
    a.mov64(Reg::R1, Reg::FP);
    a.alu64(AluOp::Add, Reg::R1, i32::from(HEADER));
    a.mov64(Reg::R2, 8);
    a.call(PROBE_READ_KERNEL);
    match family {
        Family::V4 => {
            a.load(Size::H, Reg::R7, Reg::FP, HEADER + 4);
            a.be(16, Reg::R7);
        }
        Family::V6 => {
            a.load(Size::W, Reg::R7, Reg::FP, HEADER);
            a.be(32, Reg::R7);
            a.alu64(AluOp::And, Reg::R7, 0xf_ffff);
        }
    }
    a.store(Size::W, Reg::FP, KEY, Reg::R7);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(KEY));
    a.load_map(Reg::R1, MapId::from_u32(0));
    a.call(Helper::MAP_LOOKUP_ELEM);
    a.jump64(Cond::Eq, Reg::R0, 0, out);
    a.load(Size::W, Reg::R1, Reg::R0, 0);
    a.alu64(AluOp::Or, Reg::R1, stage as i32);
    a.store(Size::W, Reg::R0, 0, Reg::R1);
    if notes == Notes::Length {
        a.load(Size::W, Reg::R1, Reg::R6, fields.len);
        a.store(Size::W, Reg::R0, 16, Reg::R1);
    }
    if let Notes::Mark(at) = notes {
        a.load(Size::W, Reg::R1, Reg::R6, fields.mark);
        a.store(Size::W, Reg::R0, at, Reg::R1);
        // The lowest three bits are the connection's state, the rest is its address; 0: no connection
        // (include/linux/skbuff.h, `_nfct`). Kept as 8 + state if there is a connection.
        let none = a.label();
        a.load(Size::Dw, Reg::R1, Reg::R6, fields.nfct);
        a.mov64(Reg::R2, Reg::R1);
        a.alu64(AluOp::And, Reg::R2, 7);
        a.jump64(Cond::Le, Reg::R1, 7, none);
        a.alu64(AluOp::Or, Reg::R2, 8);
        a.bind(none);
        a.store(Size::W, Reg::R0, 12, Reg::R2);
    }
    a.bind(out);
    a.mov64(Reg::R0, if drops { NF_DROP } else { NF_ACCEPT });
    a.exit();
    load(sys, a, ProgramType::NETFILTER, ATTACH_NETFILTER, &[results])
}

/// A program that drops every packet of its hook.
pub(super) fn drop_all(sys: &Sys) -> Result<OwnedFd, NetfilterError> {
    let mut a = Asm::new();
    a.mov64(Reg::R0, NF_DROP);
    a.exit();
    load(sys, a, ProgramType::NETFILTER, ATTACH_NETFILTER, &[])
}

/// An XDP program whose run number k makes frame k of the pool of its frame, and lets it on into the stack or sends it
/// by the device that the pool names. `next` holds the number.
pub(super) fn injector(sys: &Sys, pool: &Map, next: &Map) -> Result<OwnedFd, NetfilterError> {
    const KEY: i16 = -8;
    let mut a = Asm::new();
    let out = a.label();
    a.mov64(Reg::R6, Reg::R1);
    a.store(Size::W, Reg::FP, KEY, 0);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(KEY));
    a.load_map(Reg::R1, MapId::from_u32(1));
    a.call(Helper::MAP_LOOKUP_ELEM);
    a.jump64(Cond::Eq, Reg::R0, 0, out);
    a.load(Size::Dw, Reg::R1, Reg::R0, 0);
    a.mov64(Reg::R2, Reg::R1);
    a.alu64(AluOp::Add, Reg::R2, 1);
    a.store(Size::Dw, Reg::R0, 0, Reg::R2);
    a.store(Size::W, Reg::FP, KEY, Reg::R1);
    a.mov64(Reg::R2, Reg::FP);
    a.alu64(AluOp::Add, Reg::R2, i32::from(KEY));
    a.load_map(Reg::R1, MapId::from_u32(0));
    a.call(Helper::MAP_LOOKUP_ELEM);
    a.jump64(Cond::Eq, Reg::R0, 0, out);
    a.mov64(Reg::R7, Reg::R0);
    a.load(Size::W, Reg::R8, Reg::R7, 0);
    a.jump64(Cond::Lt, Reg::R8, 14, out);
    a.jump64(Cond::Gt, Reg::R8, FRAME_BYTES_MAX as i32, out);
    a.mov64(Reg::R1, Reg::R6);
    a.mov64(Reg::R2, Reg::R8);
    a.alu64(AluOp::Sub, Reg::R2, TEMPLATE_BYTES as i32);
    a.call(XDP_ADJUST_TAIL);
    a.jump64(Cond::Ne, Reg::R0, 0, out);
    a.mov64(Reg::R1, Reg::R6);
    a.mov64(Reg::R2, 0);
    a.mov64(Reg::R3, Reg::R7);
    a.alu64(AluOp::Add, Reg::R3, 8);
    a.mov64(Reg::R4, Reg::R8);
    a.call(XDP_STORE_BYTES);
    a.jump64(Cond::Ne, Reg::R0, 0, out);
    let pass = a.label();
    a.load(Size::W, Reg::R1, Reg::R7, 4);
    a.jump64(Cond::Eq, Reg::R1, 0, pass);
    a.mov64(Reg::R2, 0);
    a.call(REDIRECT);
    a.exit();
    a.bind(pass);
    a.mov64(Reg::R0, XDP_PASS);
    a.exit();
    a.bind(out);
    a.mov64(Reg::R0, XDP_DROP);
    a.exit();
    load(sys, a, ProgramType::XDP, 0, &[pool, next])
}

/// Turns a failed call into an error that says what was being done.
pub(super) fn during(what: &str) -> impl FnOnce(io::Error) -> NetfilterError + '_ {
    move |error| NetfilterError::Kernel(what.to_string(), error)
}
