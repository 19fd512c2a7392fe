//! What the kernel made of a program: its rewritten instructions and its machine code, beside the rules they come from.
//!
//! Both are read back from the kernel, with the line information that the program was loaded with, so any program that
//! carries line information can be shown, whoever loaded it. Names of kernel functions come from /proc/kallsyms, names
//! of maps from the kernel.
//!
//! A line's cost is the sum over its pieces: a rule's code need not be in one place. What stands under no line is the
//! program's own: reading headers, counting, returning.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::AsFd;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter as _, Instruction, IntelFormatter};
use polc_backend_ebpf::insn::Insn;

use crate::error::Error;
use crate::sys::{LineInfo, ProgramCode, Sys};

/// A line of the user's text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceLine {
    /// The file.
    pub file: String,
    /// The line's number, from 1.
    pub line: u32,
    /// The line.
    pub text: String,
}

/// An instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instr {
    /// Where it is: for bytecode the slot, for machine code the byte from the program's start.
    pub at: u64,
    /// Its bytes.
    pub bytes: u32,
    /// Its text.
    pub text: String,
}

/// Instructions of one line that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The line; `None` for the program's own part.
    pub line: Option<SourceLine>,
    /// The instructions.
    pub instrs: Vec<Instr>,
}

/// What a line costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Instructions.
    pub instrs: usize,
    /// Bytes.
    pub bytes: u64,
}

/// A program's code in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The program's name and number.
    pub title: String,
    /// What kind of code it is: `xlated` or `jited`.
    pub kind: &'static str,
    /// The code in its order.
    pub pieces: Vec<Piece>,
}

impl Listing {
    /// What each line costs, the program's own part first, then by file and line.
    pub fn costs(&self) -> Vec<(Option<&SourceLine>, Cost)> {
        let mut costs: BTreeMap<Option<&SourceLine>, Cost> = BTreeMap::new();
        for piece in &self.pieces {
            let cost = costs.entry(piece.line.as_ref()).or_default();
            cost.instrs += piece.instrs.len();
            cost.bytes += piece.instrs.iter().map(|instr| u64::from(instr.bytes)).sum::<u64>();
        }
        costs.into_iter().collect()
    }

    /// What all of it costs.
    pub fn total(&self) -> Cost {
        self.costs().iter().fold(Cost::default(), |all, (_, cost)| Cost {
            instrs: all.instrs + cost.instrs,
            bytes: all.bytes + cost.bytes,
        })
    }

    fn push(&mut self, line: Option<&SourceLine>, instr: Instr) {
        match self.pieces.last_mut() {
            Some(last) if last.line.as_ref() == line => last.instrs.push(instr),
            _ => self.pieces.push(Piece { line: line.cloned(), instrs: vec![instr] }),
        }
    }
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cost { instrs, bytes } = self.total();
        writeln!(f, "{} {}: {instrs} instructions, {bytes} bytes", self.kind, self.title)?;
        for piece in &self.pieces {
            match &piece.line {
                Some(SourceLine { file, line, text }) => writeln!(f, "; {text} @ {file}:{line}")?,
                None => writeln!(f, ";")?,
            }
            for Instr { at, text, .. } in &piece.instrs {
                match self.kind {
                    XLATED => writeln!(f, "{at:5}: {text}")?,
                    _ => writeln!(f, "{at:5x}: {text}")?,
                }
            }
        }
        writeln!(f, "\ninstructions  bytes  line")?;
        for (line, Cost { instrs, bytes }) in self.costs() {
            match line {
                Some(SourceLine { file, line, text }) => {
                    writeln!(f, "{instrs:12} {bytes:6}  {file}:{line}: {text}")?;
                }
                None => writeln!(f, "{instrs:12} {bytes:6}  (no rule)")?,
            }
        }
        Ok(())
    }
}

const XLATED: &str = "xlated";
const JITED: &str = "jited";

/// Instructions of a loaded program as the verifier rewrote them.
///
/// # Errors
/// The kernel does not tell.
pub fn xlated(sys: &Sys, program: impl AsFd) -> Result<Listing, Error> {
    let program = program.as_fd();
    let code = sys.prog_code(program).map_err(Error::call("read a program's code back"))?;
    let lines = Lines::new(sys, &code)?;
    let maps: BTreeMap<u32, String> = map_ids(&code.xlated)
        .into_iter()
        .filter_map(|id| Some((id, sys.map_by_id(id).ok()?.info().name.clone())))
        .collect();
    // A call's target is told as its distance from `__bpf_call_base` (kernel/bpf/syscall.c, `insn_prepare_dump`).
    let symbols = Symbols::read();
    let base = symbols.address("__bpf_call_base");
    let mut listing = Listing { title: title(sys, program)?, kind: XLATED, pieces: Vec::new() };
    let mut at = 0;
    while at < code.xlated.len() {
        let slot = code.xlated[at];
        let (text, slots) = xlated_text(&code.xlated[at..], &maps, |distance| {
            let address = base?.wrapping_add_signed(distance);
            symbols.name(address).map(str::to_string)
        });
        let text = format!("({:02x}) {text}", slot as u8);
        let line = lines.at_slot(at as u32);
        listing.push(line, Instr { at: at as u64, bytes: 8 * slots as u32, text });
        at += slots;
    }
    Ok(listing)
}

/// Machine code of a loaded program.
///
/// # Errors
/// The kernel does not tell, or the machine's instructions are not x86-64's.
pub fn jited(sys: &Sys, program: impl AsFd) -> Result<Listing, Error> {
    let program = program.as_fd();
    let code = sys.prog_code(program).map_err(Error::call("read a program's machine code back"))?;
    let untold = |why| Err(Error::Call { what: "read a program's machine code back".into(), source: why });
    if !cfg!(target_arch = "x86_64") {
        return untold(std::io::Error::other("only x86-64 machine code can be disassembled"));
    }
    if code.jited.is_empty() || code.addresses.len() != code.lengths.len() {
        return untold(std::io::Error::other(
            "the kernel does not show it: net.core.bpf_jit_enable is 0, or the process lacks CAP_SYSLOG",
        ));
    }
    let lines = Lines::new(sys, &code)?;
    let symbols = Symbols::read();
    let mut listing = Listing { title: title(sys, program)?, kind: JITED, pieces: Vec::new() };
    let mut rest = code.jited.as_slice();
    let mut start = 0;
    for (&address, &length) in code.addresses.iter().zip(&code.lengths) {
        let (own, after) = rest.split_at(rest.len().min(length as usize));
        let name = |address| symbols.name(address);
        for instr in disassemble(own, address, &name) {
            let line = lines.at_address(address + instr.at);
            listing.push(line, Instr { at: start + instr.at, ..instr });
        }
        start += own.len() as u64;
        rest = after;
    }
    Ok(listing)
}

fn title(sys: &Sys, program: impl AsFd) -> Result<String, Error> {
    let info = sys.prog_info(program).map_err(Error::call("ask about a program"))?;
    Ok(format!("{} (program {})", info.name, info.id))
}

/// The text of the first instruction of `slots`, and how many slots it takes.
fn xlated_text(
    slots: &[u64],
    maps: &BTreeMap<u32, String>,
    function: impl Fn(i64) -> Option<String>,
) -> (String, usize) {
    let slot = slots[0];
    let (dst, src) = (slot >> 8 & 15, slot >> 12 & 15);
    let (offset, imm) = ((slot >> 16) as i16, (slot >> 32) as i32);
    // Instructions that only the verifier writes (include/linux/filter.h).
    match slot as u8 {
        0xbf if offset == -1 => return (format!("r{dst} = &(void __percpu *)(r{src})"), 1),
        0xc0 => return ("nospec".to_string(), 1),
        0x85 if src == 0 => {
            let name = function(i64::from(imm)).unwrap_or_else(|| format!("helper{imm:+}"));
            return (format!("call {name}"), 1);
        }
        _ => {}
    }
    let name = |id: i32| maps.get(&(id as u32)).map_or_else(|| format!("#{id}"), Clone::clone);
    match Insn::decode(slots) {
        Ok(Insn::LoadMap { dst, map }) => (format!("{dst} = map {}", name(map)), 2),
        Ok(Insn::LoadMapValue { dst, map, offset }) => (format!("{dst} = &{}[{offset}]", name(map)), 2),
        Ok(insn) => (insn.to_string(), insn.slots()),
        Err(why) => (format!(".quad {slot:#018x} ({why})"), 1),
    }
}

/// Numbers of the maps that instructions refer to.
fn map_ids(slots: &[u64]) -> BTreeSet<u32> {
    let mut ids = BTreeSet::new();
    let mut at = 0;
    while at < slots.len() {
        let decoded = Insn::decode(&slots[at..]);
        if let Ok(Insn::LoadMap { map, .. } | Insn::LoadMapValue { map, .. }) = decoded {
            ids.insert(map as u32);
        }
        at += decoded.map_or(1, |insn| insn.slots());
    }
    ids
}

/// The instructions of a function's machine code; `at` counts from its start.
fn disassemble<'n>(bytes: &[u8], address: u64, name: &dyn Fn(u64) -> Option<&'n str>) -> Vec<Instr> {
    let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    options.set_space_after_operand_separator(true);
    let (mut instruction, mut instrs) = (Instruction::default(), Vec::new());
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let mut text = String::new();
        // Targets inside are shown as offsets, as instructions are.
        let target = instruction.near_branch_target();
        let inside = target.wrapping_sub(address);
        let is_jump = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        if is_jump && inside < bytes.len() as u64 {
            let mnemonic = format!("{:?}", instruction.mnemonic()).to_lowercase();
            text = format!("{mnemonic} {inside:x}");
        } else if let Some(name) = name(target).filter(|_| instruction.flow_control() == FlowControl::Call) {
            text = format!("call {name}");
        } else {
            formatter.format(&instruction, &mut text);
        }
        instrs.push(Instr { at: instruction.ip() - address, bytes: instruction.len() as u32, text });
    }
    instrs
}

/// Which line each instruction comes from.
struct Lines {
    /// First slot of each piece, ascending.
    slots: Vec<(u32, usize)>,
    /// First address of each piece, ascending.
    addresses: Vec<(u64, usize)>,
    /// The lines; `None` for those without text, with which polc marks the program's own part.
    lines: Vec<Option<SourceLine>>,
}

impl Lines {
    fn new(sys: &Sys, code: &ProgramCode) -> Result<Lines, Error> {
        let mut lines = Lines { slots: Vec::new(), addresses: Vec::new(), lines: Vec::new() };
        if code.btf == 0 || code.lines.is_empty() {
            return Ok(lines);
        }
        let what = || Error::call("read a program's line information back");
        let btf = sys.btf_by_id(code.btf).map_err(what())?;
        let btf = sys.btf_bytes(btf).map_err(what())?;
        for (index, LineInfo { slot, file, text, line_column }) in code.lines.iter().enumerate() {
            let line = SourceLine {
                file: btf_string(&btf, *file),
                line: line_column >> 10,
                text: btf_string(&btf, *text),
            };
            lines.lines.push((!line.text.is_empty()).then_some(line));
            lines.slots.push((*slot, index));
            if let Some(address) = code.line_addresses.get(index) {
                lines.addresses.push((*address, index));
            }
        }
        // A line whose instructions are gone has the address of the next; what counts is the last.
        lines.slots.sort_by_key(|(slot, _)| *slot);
        lines.addresses.sort_by_key(|(address, _)| *address);
        Ok(lines)
    }

    fn at_slot(&self, slot: u32) -> Option<&SourceLine> {
        let after = self.slots.partition_point(|(first, _)| *first <= slot);
        self.lines[self.slots.get(after.checked_sub(1)?)?.1].as_ref()
    }

    fn at_address(&self, address: u64) -> Option<&SourceLine> {
        let after = self.addresses.partition_point(|(first, _)| *first <= address);
        self.lines[self.addresses.get(after.checked_sub(1)?)?.1].as_ref()
    }
}

/// A string of a BTF (Documentation/bpf/btf.rst, `struct btf_header`); empty if the offset is none.
fn btf_string(btf: &[u8], offset: u32) -> String {
    let word = |at: usize| Some(u32::from_ne_bytes(btf.get(at..at + 4)?.try_into().ok()?) as usize);
    let find = || {
        let strings = word(4)?.checked_add(word(16)?)?;
        let tail = btf.get(strings.checked_add(offset as usize)?..)?;
        let end = tail.iter().position(|byte| *byte == 0)?;
        Some(String::from_utf8_lossy(&tail[..end]).into_owned())
    };
    find().unwrap_or_default()
}

/// The kernel's functions by address.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// What /proc/kallsyms says; nothing if it hides addresses.
    fn read() -> Symbols {
        let text = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
        let mut symbols: Vec<(u64, String)> = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_ascii_whitespace();
                let address = u64::from_str_radix(words.next()?, 16).ok()?;
                let name = words.nth(1)?;
                (address != 0).then(|| (address, name.to_string()))
            })
            .collect();
        symbols.sort();
        Symbols(symbols)
    }

    fn name(&self, address: u64) -> Option<&str> {
        let at = self.0.partition_point(|(other, _)| *other < address);
        self.0.get(at).filter(|(other, _)| *other == address).map(|(_, name)| name.as_str())
    }

    fn address(&self, name: &str) -> Option<u64> {
        self.0.iter().find(|(_, other)| other == name).map(|(address, _)| *address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_is_named_and_measured() {
        // push rbp; je +2; call to 0x2000; ret
        let bytes = [0x55, 0x74, 0x05, 0xe8, 0xf8, 0x0f, 0, 0, 0xc3];
        let name = |address: u64| (address == 0x2000).then_some("the_helper");
        let instrs = disassemble(&bytes, 0x1000, &name);
        let texts: Vec<(u64, u32, &str)> =
            instrs.iter().map(|instr| (instr.at, instr.bytes, instr.text.as_str())).collect();
        assert_eq!(texts, [(0, 1, "push rbp"), (1, 2, "je 8"), (3, 5, "call the_helper"), (8, 1, "ret")]);
    }

    #[test]
    fn a_line_in_pieces_is_summed() {
        let line = SourceLine { file: "rules.v4".into(), line: 3, text: "-A INPUT -j DROP".into() };
        let mut listing = Listing { title: "polc".into(), kind: JITED, pieces: Vec::new() };
        let instr = |at| Instr { at, bytes: 2, text: "nop".into() };
        for (line, at) in [(None, 0), (Some(&line), 2), (Some(&line), 4), (None, 6), (Some(&line), 8)] {
            listing.push(line, instr(at));
        }
        assert_eq!(listing.pieces.len(), 4);
        let costs = listing.costs();
        assert_eq!(costs[0], (None, Cost { instrs: 2, bytes: 4 }));
        assert_eq!(costs[1], (Some(&line), Cost { instrs: 3, bytes: 6 }));
        assert_eq!(listing.total(), Cost { instrs: 5, bytes: 10 });
        let text = listing.to_string();
        assert!(text.starts_with("jited polc: 5 instructions, 10 bytes\n;\n    0: nop\n"), "{text}");
        assert!(text.ends_with("           3      6  rules.v4:3: -A INPUT -j DROP\n"), "{text}");
    }

    #[test]
    fn strings_out_of_bounds_are_empty() {
        let mut btf = vec![0; 24];
        btf[4] = 24;
        btf.extend(b"\0name\0cut");
        assert_eq!(btf_string(&btf, 1), "name");
        assert_eq!(btf_string(&btf, 6), "");
        assert_eq!(btf_string(&btf, 99), "");
        assert_eq!(btf_string(&[], 0), "");
    }

    #[test]
    fn what_only_the_verifier_writes_is_named() {
        let maps = BTreeMap::from([(7, "counters".to_string())]);
        let text = |slots: &[u64]| {
            let function = |distance| (distance == 96).then(|| "bpf_map_lookup_elem".to_string());
            xlated_text(slots, &maps, function)
        };
        assert_eq!(text(&[0x0000_0000_ffff_00bf]), ("r0 = &(void __percpu *)(r0)".to_string(), 1));
        assert_eq!(text(&[96 << 32 | 0x85]), ("call bpf_map_lookup_elem".to_string(), 1));
        assert_eq!(text(&[95 << 32 | 0x85]), ("call helper+95".to_string(), 1));
        assert_eq!(text(&[7 << 32 | 0x1118, 0]), ("r1 = map counters".to_string(), 2));
        assert_eq!(text(&[7 << 32 | 0x2118, 4 << 32]), ("r1 = &counters[4]".to_string(), 2));
        assert_eq!(text(&[u64::MAX]).1, 1);
    }
}
