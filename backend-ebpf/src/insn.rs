//! The eBPF instruction: a sum type with one constructor, one printer, one encoder and one decoder for each kind.
//!
//! Only what polc emits exists here. An instruction that the check VM runs wrongly or not at all (sign-extending moves
//! and loads, signed division, 32-bit modulo, atomics, byte swaps, long jumps) has no constructor or
//! is refused by the assembler, and the decoder names it ([`Unsupported`]) instead of guessing. The encoding is
//! RFC 9669 (BPF Instruction Set Architecture), section 3: an instruction is one 64-bit *slot*, little-endian on the
//! wire, `opcode:8 dst:4 src:4 offset:16 imm:32`; `ld_imm64` alone takes two slots. Positions and jump offsets count
//! slots, as the kernel does.

use std::fmt;

/// A register. `r0` holds results, `r1`-`r5` arguments (lost in a call), `r6`-`r9` are kept over calls, `r10` is the
/// frame pointer and can't be written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reg(u8);

impl Reg {
    /// The result of calls and of the program.
    pub const R0: Reg = Reg(0);
    /// First argument; the context when a program starts.
    pub const R1: Reg = Reg(1);
    /// Second argument.
    pub const R2: Reg = Reg(2);
    /// Third argument.
    pub const R3: Reg = Reg(3);
    /// Fourth argument.
    pub const R4: Reg = Reg(4);
    /// Fifth argument.
    pub const R5: Reg = Reg(5);
    /// Kept over calls.
    pub const R6: Reg = Reg(6);
    /// Kept over calls.
    pub const R7: Reg = Reg(7);
    /// Kept over calls.
    pub const R8: Reg = Reg(8);
    /// Kept over calls.
    pub const R9: Reg = Reg(9);
    /// The frame pointer: the end of the stack, read-only.
    pub const FP: Reg = Reg(10);

    /// The register of that number, or `None` above 10.
    pub const fn new(number: u8) -> Option<Reg> {
        if number <= 10 { Some(Reg(number)) } else { None }
    }

    /// The register's number, 0 to 10.
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Reg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

impl fmt::Debug for Reg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How much of its operands an arithmetic or jump instruction uses. A 32-bit arithmetic result is zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// The lower half; comparisons are `JMP32`.
    W32,
    /// The whole register.
    W64,
}

/// A two-operand arithmetic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AluOp {
    /// `dst += src`, wrapping.
    Add,
    /// `dst -= src`, wrapping.
    Sub,
    /// `dst *= src`, wrapping.
    Mul,
    /// `dst /= src`, unsigned; 0 when `src` is 0.
    Div,
    /// `dst |= src`.
    Or,
    /// `dst &= src`.
    And,
    /// `dst <<= src`; the count is taken modulo the width.
    Lsh,
    /// `dst >>= src`, filling with zeros.
    Rsh,
    /// `dst %= src`, unsigned; `dst` when `src` is 0.
    Mod,
    /// `dst ^= src`.
    Xor,
    /// `dst = src`.
    Mov,
    /// `dst >>= src`, filling with the sign.
    Arsh,
}

impl AluOp {
    const ALL: [AluOp; 12] = [
        AluOp::Add,
        AluOp::Sub,
        AluOp::Mul,
        AluOp::Div,
        AluOp::Or,
        AluOp::And,
        AluOp::Lsh,
        AluOp::Rsh,
        AluOp::Mod,
        AluOp::Xor,
        AluOp::Mov,
        AluOp::Arsh,
    ];

    /// The operation's bits of the opcode.
    const fn code(self) -> u8 {
        match self {
            AluOp::Add => 0x00,
            AluOp::Sub => 0x10,
            AluOp::Mul => 0x20,
            AluOp::Div => 0x30,
            AluOp::Or => 0x40,
            AluOp::And => 0x50,
            AluOp::Lsh => 0x60,
            AluOp::Rsh => 0x70,
            AluOp::Mod => 0x90,
            AluOp::Xor => 0xa0,
            AluOp::Mov => 0xb0,
            AluOp::Arsh => 0xc0,
        }
    }

    fn from_code(code: u8) -> Option<AluOp> {
        AluOp::ALL.into_iter().find(|op| op.code() == code)
    }

    const fn symbol(self) -> &'static str {
        match self {
            AluOp::Add => "+=",
            AluOp::Sub => "-=",
            AluOp::Mul => "*=",
            AluOp::Div => "/=",
            AluOp::Or => "|=",
            AluOp::And => "&=",
            AluOp::Lsh => "<<=",
            AluOp::Rsh => ">>=",
            AluOp::Mod => "%=",
            AluOp::Xor => "^=",
            AluOp::Mov => "=",
            AluOp::Arsh => "s>>=",
        }
    }
}

/// The condition of a jump: `dst COND src`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cond {
    /// Equal.
    Eq,
    /// Unsigned greater.
    Gt,
    /// Unsigned greater or equal.
    Ge,
    /// `dst & src` is not zero.
    Set,
    /// Not equal.
    Ne,
    /// Signed greater.
    Sgt,
    /// Signed greater or equal.
    Sge,
    /// Unsigned less.
    Lt,
    /// Unsigned less or equal.
    Le,
    /// Signed less.
    Slt,
    /// Signed less or equal.
    Sle,
}

impl Cond {
    const ALL: [Cond; 11] = [
        Cond::Eq,
        Cond::Gt,
        Cond::Ge,
        Cond::Set,
        Cond::Ne,
        Cond::Sgt,
        Cond::Sge,
        Cond::Lt,
        Cond::Le,
        Cond::Slt,
        Cond::Sle,
    ];

    const fn code(self) -> u8 {
        match self {
            Cond::Eq => 0x10,
            Cond::Gt => 0x20,
            Cond::Ge => 0x30,
            Cond::Set => 0x40,
            Cond::Ne => 0x50,
            Cond::Sgt => 0x60,
            Cond::Sge => 0x70,
            Cond::Lt => 0xa0,
            Cond::Le => 0xb0,
            Cond::Slt => 0xc0,
            Cond::Sle => 0xd0,
        }
    }

    fn from_code(code: u8) -> Option<Cond> {
        Cond::ALL.into_iter().find(|cond| cond.code() == code)
    }

    const fn symbol(self) -> &'static str {
        match self {
            Cond::Eq => "==",
            Cond::Gt => ">",
            Cond::Ge => ">=",
            Cond::Set => "&",
            Cond::Ne => "!=",
            Cond::Sgt => "s>",
            Cond::Sge => "s>=",
            Cond::Lt => "<",
            Cond::Le => "<=",
            Cond::Slt => "s<",
            Cond::Sle => "s<=",
        }
    }

    /// Whether the comparison `lhs COND rhs` holds, as the kernel computes it.
    pub const fn holds(self, width: Width, lhs: u64, rhs: u64) -> bool {
        let (lhs, rhs, slhs, srhs) = match width {
            Width::W64 => (lhs, rhs, lhs as i64, rhs as i64),
            Width::W32 => (lhs as u32 as u64, rhs as u32 as u64, lhs as i32 as i64, rhs as i32 as i64),
        };
        match self {
            Cond::Eq => lhs == rhs,
            Cond::Gt => lhs > rhs,
            Cond::Ge => lhs >= rhs,
            Cond::Set => lhs & rhs != 0,
            Cond::Ne => lhs != rhs,
            Cond::Sgt => slhs > srhs,
            Cond::Sge => slhs >= srhs,
            Cond::Lt => lhs < rhs,
            Cond::Le => lhs <= rhs,
            Cond::Slt => slhs < srhs,
            Cond::Sle => slhs <= srhs,
        }
    }
}

/// The width of a memory access. Loads zero-extend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Size {
    /// One byte.
    B,
    /// Two bytes.
    H,
    /// Four bytes.
    W,
    /// Eight bytes.
    Dw,
}

impl Size {
    /// The number of bytes accessed.
    pub const fn bytes(self) -> usize {
        match self {
            Size::B => 1,
            Size::H => 2,
            Size::W => 4,
            Size::Dw => 8,
        }
    }

    const fn code(self) -> u8 {
        match self {
            Size::W => 0x00,
            Size::H => 0x08,
            Size::B => 0x10,
            Size::Dw => 0x18,
        }
    }

    const fn from_code(opcode: u8) -> Size {
        match opcode & 0x18 {
            0x00 => Size::W,
            0x08 => Size::H,
            0x10 => Size::B,
            _ => Size::Dw,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Size::B => "u8",
            Size::H => "u16",
            Size::W => "u32",
            Size::Dw => "u64",
        }
    }
}

/// The second operand of arithmetic, jumps and stores. Immediates are 32 bits, sign-extended where the operation is
/// 64 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operand {
    /// A register.
    Reg(Reg),
    /// An immediate.
    Imm(i32),
}

impl Operand {
    /// The immediate whose lower 32 bits are `bits`: for 32-bit operations, where the sign is only notation.
    pub const fn bits(bits: u32) -> Operand {
        Operand::Imm(bits as i32)
    }

    const fn source_bit(self) -> u8 {
        match self {
            Operand::Reg(_) => 0x08,
            Operand::Imm(_) => 0x00,
        }
    }

    const fn src_imm(self) -> (u8, i32) {
        match self {
            Operand::Reg(reg) => (reg.0, 0),
            Operand::Imm(imm) => (0, imm),
        }
    }
}

impl From<Reg> for Operand {
    fn from(reg: Reg) -> Operand {
        Operand::Reg(reg)
    }
}

impl From<i32> for Operand {
    fn from(imm: i32) -> Operand {
        Operand::Imm(imm)
    }
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operand::Reg(reg) => reg.fmt(f),
            Operand::Imm(imm) if *imm < -0xffff || *imm > 0xffff => write!(f, "{:#x}", *imm as u32),
            Operand::Imm(imm) => imm.fmt(f),
        }
    }
}

/// The byte order an endianness conversion converts to or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ByteOrder {
    /// Little-endian: on the machines polc runs on, a truncation.
    Le,
    /// Big-endian, network order.
    Be,
}

/// A kernel helper, by its number in `include/uapi/linux/bpf.h` (`___BPF_FUNC_MAPPER`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Helper(pub u32);

macro_rules! helpers {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        impl Helper {
            $($(#[$doc])* pub const $name: Helper = Helper($number);)*

            /// The helper's name without `bpf_`, if polc knows it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

helpers! {
    /// `(to, bytes, kernel address) -> 0 or -errno`.
    PROBE_READ_KERNEL = 113, "probe_read_kernel";
    /// `(seq_file, from, bytes) -> 0 or -errno`.
    SEQ_WRITE = 127, "seq_write";
    /// `(map, key) -> value or null`.
    MAP_LOOKUP_ELEM = 1, "map_lookup_elem";
    /// `(map, key, value, flags) -> 0 or -errno`.
    MAP_UPDATE_ELEM = 2, "map_update_elem";
    /// `(map, key) -> 0 or -errno`.
    MAP_DELETE_ELEM = 3, "map_delete_elem";
    /// `() -> ns since boot, suspend excluded`.
    KTIME_GET_NS = 5, "ktime_get_ns";
    /// `() -> u32`.
    GET_PRANDOM_U32 = 7, "get_prandom_u32";
    /// `() -> u32`.
    GET_SMP_PROCESSOR_ID = 8, "get_smp_processor_id";
    /// `(ctx, prog array, index)`: on success the other program runs and this one never goes on.
    TAIL_CALL = 12, "tail_call";
    /// `(skb, offset, to, len) -> 0 or -EFAULT`: copies packet bytes, paged ones too.
    SKB_LOAD_BYTES = 26, "skb_load_bytes";
    /// `(skb, len) -> 0 or -errno`: makes `len` bytes readable through `data`; packet pointers must be reloaded.
    SKB_PULL_DATA = 39, "skb_pull_data";
    /// `() -> ns since boot, suspend included`.
    KTIME_GET_BOOT_NS = 125, "ktime_get_boot_ns";
    /// `(ring buffer, data, len, flags) -> 0 or -EAGAIN`: appends a record.
    RINGBUF_OUTPUT = 130, "ringbuf_output";
    /// `(xdp, offset, to, len) -> 0 or -EINVAL`: copies packet bytes, fragments too.
    XDP_LOAD_BYTES = 189, "xdp_load_bytes";
    /// `(to, len, dynptr, offset, flags) -> 0 or -E2BIG`: copies bytes that a handle stands for.
    DYNPTR_READ = 201, "dynptr_read";
}

impl fmt::Display for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name}#{}", self.0),
            None => write!(f, "helper#{}", self.0),
        }
    }
}

impl fmt::Debug for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One eBPF instruction. Jump offsets count slots from the next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Insn {
    /// `dst OP= src`.
    Alu {
        /// Operand width.
        width: Width,
        /// Operation.
        op: AluOp,
        /// First operand and result.
        dst: Reg,
        /// Second operand.
        src: Operand,
    },
    /// `dst = -dst`. The 64-bit form is refused by the assembler (see `UnsafeInsn::Neg64`).
    Neg {
        /// Operand width.
        width: Width,
        /// Operand and result.
        dst: Reg,
    },
    /// `dst = beN dst` or `leN dst`: converts the lower `bits` and clears the rest.
    Endian {
        /// Target order.
        order: ByteOrder,
        /// 16, 32 or 64.
        bits: u8,
        /// Operand and result.
        dst: Reg,
    },
    /// `dst = imm ll`. Two slots.
    LoadImm64 {
        /// Result.
        dst: Reg,
        /// Value.
        imm: u64,
    },
    /// `dst = map[id]`: a map's address, for helpers. Two slots.
    LoadMap {
        /// Result.
        dst: Reg,
        /// File descriptor, or 0 before relocation.
        map: i32,
    },
    /// `dst = map[id][0] + offset`: the address of a byte in an array map's first value. Two slots.
    LoadMapValue {
        /// Result.
        dst: Reg,
        /// File descriptor, or 0 before relocation.
        map: i32,
        /// Byte offset into the value.
        offset: u32,
    },
    /// `dst = *(size *)(base + off)`.
    Load {
        /// Access width.
        size: Size,
        /// Result.
        dst: Reg,
        /// Address.
        base: Reg,
        /// Displacement, bytes.
        off: i16,
    },
    /// `*(size *)(base + off) = src`.
    Store {
        /// Access width.
        size: Size,
        /// Address.
        base: Reg,
        /// Displacement, bytes.
        off: i16,
        /// Value; an immediate is sign-extended to the width.
        src: Operand,
    },
    /// `goto +off`.
    Ja {
        /// Distance, slots.
        off: i16,
    },
    /// `if dst COND src goto +off`.
    Jump {
        /// Comparison width.
        width: Width,
        /// Condition.
        cond: Cond,
        /// Left operand.
        dst: Reg,
        /// Right operand.
        src: Operand,
        /// Distance, slots.
        off: i16,
    },
    /// `call helper`.
    Call {
        /// Which helper.
        helper: Helper,
    },
    /// `call` of a function of the kernel's; [`crate::asm::Code::kernel`] says of which.
    CallKernel {
        /// The function's type in the kernel's BTF; 0 until loaded.
        function: i32,
    },
    /// `exit`, with `r0`.
    Exit,
}

const CLASS_LD: u8 = 0x00;
const CLASS_LDX: u8 = 0x01;
const CLASS_ST: u8 = 0x02;
const CLASS_STX: u8 = 0x03;
const CLASS_ALU: u8 = 0x04;
const CLASS_JMP: u8 = 0x05;
const CLASS_JMP32: u8 = 0x06;
const CLASS_ALU64: u8 = 0x07;

const MODE_MEM: u8 = 0x60;
const MODE_MEMSX: u8 = 0x80;
const MODE_ATOMIC: u8 = 0xc0;
const MODE_MASK: u8 = 0xe0;

const OP_LD_IMM64: u8 = 0x18;
const OP_NEG: u8 = 0x80;
const OP_END: u8 = 0xd0;
const OP_JA: u8 = 0x05;
const OP_JA32: u8 = 0x06;
const OP_CALL: u8 = 0x85;
const OP_CALL_REG: u8 = 0x8d;
const OP_EXIT: u8 = 0x95;

const PSEUDO_MAP_FD: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;
const PSEUDO_KERNEL_CALL: u8 = 2;

/// An instruction that exists in eBPF and that polc neither emits nor reads, with the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unsupported {
    /// `movsx`: the check VM forgets the sign extension.
    MovSx,
    /// `sdiv`: the check VM divides unsigned.
    Sdiv,
    /// `smod`: the check VM divides unsigned.
    Smod,
    /// `bswap`: the check VM rejects it.
    Bswap,
    /// `ldsx`: the check VM rejects it.
    LoadSx,
    /// `lock` operations: the check VM rejects them.
    Atomic,
    /// `gotol`: the check VM rejects it.
    GotoL,
    /// `may_goto` and the like.
    MayGoto,
    /// A call of a local function, through a register, or of a function in a kernel module.
    CallKind,
    /// `ld_abs`, `ld_ind`: the packet access of classic BPF.
    LoadPacket,
    /// A form of `ld_imm64` other than plain, map and map value.
    LoadImm64Kind,
    /// No instruction has this opcode, or a field that must be zero is not.
    Reserved,
    /// A register above `r10`.
    Register,
    /// The second slot of `ld_imm64` is missing or malformed.
    HalfLoadImm64,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unsupported::MovSx => "movsx: the check VM does not sign-extend",
            Unsupported::Sdiv => "sdiv: the check VM divides unsigned",
            Unsupported::Smod => "smod: the check VM divides unsigned",
            Unsupported::Bswap => "bswap: the check VM has none",
            Unsupported::LoadSx => "ldsx: the check VM has none",
            Unsupported::Atomic => "atomic operation: the check VM has none",
            Unsupported::GotoL => "gotol: the check VM has none",
            Unsupported::MayGoto => "may_goto: the check VM has none",
            Unsupported::CallKind => "call of neither a helper nor a function of the kernel",
            Unsupported::LoadPacket => "ld_abs or ld_ind",
            Unsupported::LoadImm64Kind => "unknown kind of ld_imm64",
            Unsupported::Reserved => "reserved opcode or field",
            Unsupported::Register => "register above r10",
            Unsupported::HalfLoadImm64 => "ld_imm64 without its second slot",
        })
    }
}

fn slot(opcode: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    u64::from(opcode)
        | u64::from(dst) << 8
        | u64::from(src) << 12
        | u64::from(off as u16) << 16
        | u64::from(imm as u32) << 32
}

impl Insn {
    /// Slots taken: 2 for the `ld_imm64` family, else 1.
    pub const fn slots(&self) -> usize {
        match self {
            Insn::LoadImm64 { .. } | Insn::LoadMap { .. } | Insn::LoadMapValue { .. } => 2,
            _ => 1,
        }
    }

    /// Appends the instruction's slots.
    pub fn encode(&self, out: &mut Vec<u64>) {
        let wide = |dst: Reg, src: u8, low: u32, high: u32| {
            [slot(OP_LD_IMM64, dst.0, src, 0, low as i32), slot(0, 0, 0, 0, high as i32)]
        };
        out.push(match *self {
            Insn::Alu { width, op, dst, src } => {
                let class = if width == Width::W64 { CLASS_ALU64 } else { CLASS_ALU };
                let (src_reg, imm) = src.src_imm();
                slot(class | op.code() | src.source_bit(), dst.0, src_reg, 0, imm)
            }
            Insn::Neg { width, dst } => {
                let class = if width == Width::W64 { CLASS_ALU64 } else { CLASS_ALU };
                slot(class | OP_NEG, dst.0, 0, 0, 0)
            }
            Insn::Endian { order, bits, dst } => {
                let order = if order == ByteOrder::Be { 0x08 } else { 0 };
                slot(CLASS_ALU | OP_END | order, dst.0, 0, 0, i32::from(bits))
            }
            Insn::LoadImm64 { dst, imm } => {
                return out.extend(wide(dst, 0, imm as u32, (imm >> 32) as u32));
            }
            Insn::LoadMap { dst, map } => return out.extend(wide(dst, PSEUDO_MAP_FD, map as u32, 0)),
            Insn::LoadMapValue { dst, map, offset } => {
                return out.extend(wide(dst, PSEUDO_MAP_VALUE, map as u32, offset));
            }
            Insn::Load { size, dst, base, off } => {
                slot(CLASS_LDX | MODE_MEM | size.code(), dst.0, base.0, off, 0)
            }
            Insn::Store { size, base, off, src } => {
                let class = if matches!(src, Operand::Reg(_)) { CLASS_STX } else { CLASS_ST };
                let (src_reg, imm) = src.src_imm();
                slot(class | MODE_MEM | size.code(), base.0, src_reg, off, imm)
            }
            Insn::Ja { off } => slot(OP_JA, 0, 0, off, 0),
            Insn::Jump { width, cond, dst, src, off } => {
                let class = if width == Width::W64 { CLASS_JMP } else { CLASS_JMP32 };
                let (src_reg, imm) = src.src_imm();
                slot(class | cond.code() | src.source_bit(), dst.0, src_reg, off, imm)
            }
            Insn::Call { helper } => slot(OP_CALL, 0, 0, 0, helper.0 as i32),
            Insn::CallKernel { function } => slot(OP_CALL, 0, PSEUDO_KERNEL_CALL, 0, function),
            Insn::Exit => slot(OP_EXIT, 0, 0, 0, 0),
        });
    }

    /// Reads the instruction that starts `slots`.
    pub fn decode(slots: &[u64]) -> Result<Insn, Unsupported> {
        let Some(&raw) = slots.first() else { return Err(Unsupported::Reserved) };
        let opcode = raw as u8;
        let dst = Reg::new((raw >> 8) as u8 & 15).ok_or(Unsupported::Register)?;
        let src_bits = (raw >> 12) as u8 & 15;
        let off = (raw >> 16) as u16 as i16;
        let imm = (raw >> 32) as u32 as i32;
        let insn = match opcode & 7 {
            CLASS_LD => decode_ld(slots, opcode, dst, src_bits, imm)?,
            CLASS_LDX => match opcode & MODE_MASK {
                MODE_MEM => {
                    let base = Reg::new(src_bits).ok_or(Unsupported::Register)?;
                    Insn::Load { size: Size::from_code(opcode), dst, base, off }
                }
                MODE_MEMSX => return Err(Unsupported::LoadSx),
                _ => return Err(Unsupported::Reserved),
            },
            class @ (CLASS_ST | CLASS_STX) => match opcode & MODE_MASK {
                MODE_MEM => {
                    let src = if class == CLASS_ST {
                        Operand::Imm(imm)
                    } else {
                        Operand::Reg(Reg::new(src_bits).ok_or(Unsupported::Register)?)
                    };
                    Insn::Store { size: Size::from_code(opcode), base: dst, off, src }
                }
                MODE_ATOMIC if class == CLASS_STX => return Err(Unsupported::Atomic),
                _ => return Err(Unsupported::Reserved),
            },
            CLASS_ALU | CLASS_ALU64 => decode_alu(opcode, dst, src_bits, off, imm)?,
            _ => decode_jump(opcode, dst, src_bits, off, imm)?,
        };
        // What the typed form can't hold (a set field that must be zero) would otherwise be lost silently.
        let mut again = Vec::with_capacity(2);
        insn.encode(&mut again);
        if slots.get(..again.len()) != Some(&again[..]) {
            return Err(Unsupported::Reserved);
        }
        Ok(insn)
    }

    /// The jump's distance in slots, when the instruction is a jump.
    pub const fn jump_offset(&self) -> Option<i16> {
        match self {
            Insn::Ja { off } | Insn::Jump { off, .. } => Some(*off),
            _ => None,
        }
    }

    /// The same jump over another distance; other instructions are returned as they are.
    pub const fn with_jump_offset(self, distance: i16) -> Insn {
        match self {
            Insn::Ja { .. } => Insn::Ja { off: distance },
            Insn::Jump { width, cond, dst, src, .. } => Insn::Jump { width, cond, dst, src, off: distance },
            other => other,
        }
    }

    /// Whether the next instruction can run after this one.
    pub const fn falls_through(&self) -> bool {
        !matches!(self, Insn::Ja { .. } | Insn::Exit)
    }
}

fn decode_ld(slots: &[u64], opcode: u8, dst: Reg, src: u8, imm: i32) -> Result<Insn, Unsupported> {
    if opcode != OP_LD_IMM64 {
        let mode = opcode & MODE_MASK;
        return Err(if mode == 0x20 || mode == 0x40 {
            Unsupported::LoadPacket
        } else {
            Unsupported::Reserved
        });
    }
    let high = match slots.get(1) {
        Some(&next) if next as u32 == 0 => (next >> 32) as u32,
        _ => return Err(Unsupported::HalfLoadImm64),
    };
    match src {
        0 => Ok(Insn::LoadImm64 { dst, imm: u64::from(imm as u32) | u64::from(high) << 32 }),
        PSEUDO_MAP_FD => Ok(Insn::LoadMap { dst, map: imm }),
        PSEUDO_MAP_VALUE => Ok(Insn::LoadMapValue { dst, map: imm, offset: high }),
        _ => Err(Unsupported::LoadImm64Kind),
    }
}

fn decode_alu(opcode: u8, dst: Reg, src_bits: u8, off: i16, imm: i32) -> Result<Insn, Unsupported> {
    let width = if opcode & 7 == CLASS_ALU64 { Width::W64 } else { Width::W32 };
    match opcode & 0xf0 {
        OP_NEG => Ok(Insn::Neg { width, dst }),
        OP_END if width == Width::W64 => Err(Unsupported::Bswap),
        OP_END => {
            let order = if opcode & 8 != 0 { ByteOrder::Be } else { ByteOrder::Le };
            match imm {
                16 | 32 | 64 => Ok(Insn::Endian { order, bits: imm as u8, dst }),
                _ => Err(Unsupported::Reserved),
            }
        }
        code => {
            let op = AluOp::from_code(code).ok_or(Unsupported::Reserved)?;
            match (op, off) {
                (_, 0) => {}
                (AluOp::Div, 1) => return Err(Unsupported::Sdiv),
                (AluOp::Mod, 1) => return Err(Unsupported::Smod),
                (AluOp::Mov, 8 | 16 | 32) => return Err(Unsupported::MovSx),
                _ => return Err(Unsupported::Reserved),
            }
            let src = if opcode & 8 != 0 {
                Operand::Reg(Reg::new(src_bits).ok_or(Unsupported::Register)?)
            } else {
                Operand::Imm(imm)
            };
            Ok(Insn::Alu { width, op, dst, src })
        }
    }
}

fn decode_jump(opcode: u8, dst: Reg, src_bits: u8, off: i16, imm: i32) -> Result<Insn, Unsupported> {
    match opcode {
        OP_JA => return Ok(Insn::Ja { off }),
        OP_JA32 => return Err(Unsupported::GotoL),
        OP_CALL if src_bits == 0 => return Ok(Insn::Call { helper: Helper(imm as u32) }),
        OP_CALL if src_bits == PSEUDO_KERNEL_CALL && off == 0 => {
            return Ok(Insn::CallKernel { function: imm });
        }
        OP_CALL | OP_CALL_REG => return Err(Unsupported::CallKind),
        OP_EXIT => return Ok(Insn::Exit),
        0xe5 => return Err(Unsupported::MayGoto),
        _ => {}
    }
    let cond = Cond::from_code(opcode & 0xf0).ok_or(Unsupported::Reserved)?;
    let width = if opcode & 7 == CLASS_JMP { Width::W64 } else { Width::W32 };
    let src = if opcode & 8 != 0 {
        Operand::Reg(Reg::new(src_bits).ok_or(Unsupported::Register)?)
    } else {
        Operand::Imm(imm)
    };
    Ok(Insn::Jump { width, cond, dst, src, off })
}

/// Decodes a program into `(slot, instruction)` pairs; on failure, the slot and the reason.
pub fn decode_all(slots: &[u64]) -> Result<Vec<(u32, Insn)>, (u32, Unsupported)> {
    let mut insns = Vec::with_capacity(slots.len());
    let mut at = 0;
    while at < slots.len() {
        let insn = Insn::decode(&slots[at..]).map_err(|why| (at as u32, why))?;
        insns.push((at as u32, insn));
        at += insn.slots();
    }
    Ok(insns)
}

impl fmt::Display for Insn {
    /// The pseudo-C notation of the kernel's verifier and of `bpftool prog dump xlated`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let half = |width: Width| if width == Width::W32 { 'w' } else { 'r' };
        match *self {
            Insn::Alu { width, op, dst, src } => {
                let r = half(width);
                write!(f, "{r}{} {} ", dst.0, op.symbol())?;
                match src {
                    Operand::Reg(src) => write!(f, "{r}{}", src.0),
                    imm => imm.fmt(f),
                }
            }
            Insn::Neg { width, dst } => {
                let r = half(width);
                write!(f, "{r}{} = -{r}{}", dst.0, dst.0)
            }
            Insn::Endian { order, bits, dst } => {
                let name = if order == ByteOrder::Be { "be" } else { "le" };
                write!(f, "{dst} = {name}{bits} {dst}")
            }
            Insn::LoadImm64 { dst, imm } => write!(f, "{dst} = {imm:#x} ll"),
            Insn::LoadMap { dst, map } => write!(f, "{dst} = map[id:{map}]"),
            Insn::LoadMapValue { dst, map, offset } => write!(f, "{dst} = map[id:{map}][0]+{offset}"),
            Insn::Load { size, dst, base, off } => {
                write!(f, "{dst} = *({} *)({base} {off:+})", size.name())
            }
            Insn::Store { size, base, off, src } => {
                write!(f, "*({} *)({base} {off:+}) = {src}", size.name())
            }
            Insn::Ja { off } => write!(f, "goto {off:+}"),
            Insn::Jump { width, cond, dst, src, off } => {
                let r = half(width);
                write!(f, "if {r}{} {} ", dst.0, cond.symbol())?;
                match src {
                    Operand::Reg(src) => write!(f, "{r}{}", src.0)?,
                    imm => imm.fmt(f)?,
                }
                write!(f, " goto {off:+}")
            }
            Insn::Call { helper } => write!(f, "call {helper}"),
            Insn::CallKernel { function } => write!(f, "call kernel-function#{function}"),
            Insn::Exit => f.write_str("exit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of every kind, in every width, size and operand form.
    fn every_insn() -> Vec<Insn> {
        let mut all = vec![
            Insn::Exit,
            Insn::Ja { off: -3 },
            Insn::Call { helper: Helper::TAIL_CALL },
            Insn::CallKernel { function: 65_670 },
        ];
        let operands = [Operand::Reg(Reg::R7), Operand::Imm(-5), Operand::Imm(i32::MAX)];
        for width in [Width::W32, Width::W64] {
            all.push(Insn::Neg { width, dst: Reg::R3 });
            for src in operands {
                all.extend(AluOp::ALL.map(|op| Insn::Alu { width, op, dst: Reg::R2, src }));
                all.extend(Cond::ALL.map(|cond| Insn::Jump { width, cond, dst: Reg::R9, src, off: 300 }));
            }
        }
        for bits in [16, 32, 64] {
            all.extend([ByteOrder::Le, ByteOrder::Be].map(|order| Insn::Endian {
                order,
                bits,
                dst: Reg::R4,
            }));
        }
        for size in [Size::B, Size::H, Size::W, Size::Dw] {
            all.push(Insn::Load { size, dst: Reg::R1, base: Reg::FP, off: -8 });
            all.extend(operands.map(|src| Insn::Store { size, base: Reg::FP, off: -512, src }));
        }
        all.push(Insn::LoadImm64 { dst: Reg::R5, imm: 0xdead_beef_8000_0001 });
        all.push(Insn::LoadMap { dst: Reg::R1, map: 7 });
        all.push(Insn::LoadMapValue { dst: Reg::R1, map: 7, offset: 0x8000_0000 });
        all
    }

    #[test]
    fn encoding_round_trips() {
        let all = every_insn();
        let mut slots = Vec::new();
        all.iter().for_each(|insn| insn.encode(&mut slots));
        let decoded: Vec<Insn> =
            decode_all(&slots).expect("all decode").into_iter().map(|(_, i)| i).collect();
        assert_eq!(decoded, all);
    }

    #[test]
    fn every_raw_slot_decodes_to_itself_or_not_at_all() {
        // All opcodes with a few field patterns: whatever decodes must encode to the same bytes.
        for opcode in 0..=255u8 {
            for (regs, off, imm) in
                [(0, 0, 0), (0x21, 0, 16), (0x1a, 5, 0), (0xb0, 1, 1), (0x0b, 0, 0), (0x10, 8, 9)]
            {
                let raw = [u64::from(opcode) | regs << 8 | off << 16 | imm << 32, 0];
                if let Ok(insn) = Insn::decode(&raw) {
                    let mut again = Vec::new();
                    insn.encode(&mut again);
                    assert_eq!(again, raw[..insn.slots()], "{insn}");
                }
            }
        }
    }

    #[test]
    fn unsupported_instructions_are_named() {
        let raw = |opcode, src, off, imm| Insn::decode(&[slot(opcode, 1, src, off, imm), 0]);
        assert_eq!(raw(0xbf, 2, 8, 0), Err(Unsupported::MovSx));
        assert_eq!(raw(0x3f, 2, 1, 0), Err(Unsupported::Sdiv));
        assert_eq!(raw(0x9f, 2, 1, 0), Err(Unsupported::Smod));
        assert_eq!(raw(0xd7, 0, 0, 16), Err(Unsupported::Bswap));
        assert_eq!(raw(0x91, 2, 0, 0), Err(Unsupported::LoadSx));
        assert_eq!(raw(0xdb, 2, 0, 0), Err(Unsupported::Atomic));
        assert_eq!(raw(0x06, 0, 0, 9), Err(Unsupported::GotoL));
        assert_eq!(raw(0x85, 1, 0, 9), Err(Unsupported::CallKind));
        assert_eq!(raw(0x85, 2, 1, 9), Err(Unsupported::CallKind));
        assert_eq!(raw(0x18, 4, 0, 0), Err(Unsupported::LoadImm64Kind));
        assert_eq!(raw(0x20, 0, 0, 0), Err(Unsupported::LoadPacket));
        assert_eq!(raw(0xbf, 11, 0, 0), Err(Unsupported::Register));
        assert_eq!(Insn::decode(&[slot(0x18, 1, 0, 0, 0)]), Err(Unsupported::HalfLoadImm64));
    }

    #[test]
    fn prints_like_the_kernel() {
        let text: Vec<String> = [
            Insn::Alu { width: Width::W32, op: AluOp::Mov, dst: Reg::R0, src: Operand::Imm(2) },
            Insn::Alu { width: Width::W64, op: AluOp::Add, dst: Reg::R2, src: Operand::Reg(Reg::R3) },
            Insn::Load { size: Size::W, dst: Reg::R2, base: Reg::R1, off: 4 },
            Insn::Store { size: Size::Dw, base: Reg::FP, off: -8, src: Operand::Reg(Reg::R1) },
            Insn::Jump {
                width: Width::W32,
                cond: Cond::Ne,
                dst: Reg::R1,
                src: Operand::bits(0xc0a8_0101),
                off: 12,
            },
            Insn::Endian { order: ByteOrder::Be, bits: 16, dst: Reg::R1 },
            Insn::Call { helper: Helper::MAP_LOOKUP_ELEM },
        ]
        .iter()
        .map(Insn::to_string)
        .collect();
        assert_eq!(
            text,
            [
                "w0 = 2",
                "r2 += r3",
                "r2 = *(u32 *)(r1 +4)",
                "*(u64 *)(r10 -8) = r1",
                "if w1 != 0xc0a80101 goto +12",
                "r1 = be16 r1",
                "call map_lookup_elem#1",
            ]
        );
    }
}
