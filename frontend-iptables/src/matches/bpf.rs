//! A program of the rule's own: the `bpf` match.
//!
//! The text is what `nfbpf_compile` writes: the number of instructions, then `code jt jf k` of each
//! (extensions/libxt_bpf.c in iptables). What is no program the kernel refuses (net/core/filter.c,
//! `bpf_check_classic`).

use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base};
use crate::value::strtoul_negating;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[Opt::new("bytecode", Arg::Custom { words: 1, parse, print }).must()],
    ..base(
        "bpf",
        Meaning::Match(|_: &Options, body| body.opaque("bpf", "runs a program of its own")),
        "A program of classic BPF.",
    )
}];

/// How many instructions a program has at most (include/uapi/linux/netfilter/xt_bpf.h, `XT_BPF_MAX_NUM_INSTR`).
const INSTRUCTIONS_MAX: usize = 64;

/// How many words of memory a program has (include/uapi/linux/filter.h, `BPF_MEMWORDS`).
const MEMORY_WORDS: u32 = 16;

/// Where loads that read no packet begin (include/uapi/linux/filter.h, `SKF_AD_OFF`), and the last of them.
const ANCILLARY: u32 = 0xffff_f000;
const ANCILLARY_LAST: u32 = 60;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    operand: u32,
}

/// A number as `sscanf` reads one, off the front of a text; of a larger one, the lower bits count.
fn scan(text: &mut &str) -> Option<u64> {
    let (number, rest) = strtoul_negating(text, 10)?;
    *text = rest;
    Some(number)
}

fn program(text: &str) -> Result<Vec<Instruction>, String> {
    let mut rest = text;
    let count = scan(&mut rest).filter(|_| rest.starts_with(','));
    let count = count.ok_or("a program begins with the number of its instructions and a comma")? as usize;
    if count == 0 || count > INSTRUCTIONS_MAX {
        return Err(format!("a program has 1 to {INSTRUCTIONS_MAX} instructions"));
    }
    let items = rest[1..].split_terminator(',');
    let instructions: Option<Vec<Instruction>> = items
        .map(|mut item| {
            Some(Instruction {
                code: scan(&mut item)? as u16,
                jump_true: scan(&mut item)? as u8,
                jump_false: scan(&mut item)? as u8,
                operand: scan(&mut item)? as u32,
            })
        })
        .collect();
    let instructions = instructions.ok_or("an instruction is `code jt jf k`")?;
    if instructions.len() != count {
        return Err(format!("there are {} instructions, not {count}", instructions.len()));
    }
    Ok(instructions)
}

/// Whether the kernel takes the program: known instructions, jumps forward that stay within, memory written before it is
/// read, and a verdict at the end.
fn is_sound(program: &[Instruction]) -> bool {
    // The words of memory that are written on every way to each instruction.
    let mut written = vec![u16::MAX; program.len()];
    let mut now = 0u16;
    for (at, &Instruction { code, jump_true, jump_false, operand }) in program.iter().enumerate() {
        now &= written[at];
        let behind = program.len() - at - 1;
        match code {
            // Loads from the packet, or of what is known about it.
            0x20 | 0x28 | 0x30 => {
                let known = operand.wrapping_sub(ANCILLARY);
                if operand >= ANCILLARY && (known % 4 != 0 || known > ANCILLARY_LAST) {
                    return false;
                }
            }
            0x40 | 0x48 | 0x50 | 0x80 | 0x00 | 0x81 | 0xb1 | 0x01 => {}
            // Loads from memory, and stores to it.
            0x60 | 0x61 | 0x02 | 0x03 => {
                let Some(word) = (operand < MEMORY_WORDS).then(|| 1 << operand) else { return false };
                if matches!(code, 0x02 | 0x03) {
                    now |= word;
                } else if now & word == 0 {
                    return false;
                }
            }
            // Arithmetic with the operand, where some are none.
            0x34 | 0x94 if operand == 0 => return false,
            0x64 | 0x74 if operand >= u32::BITS => return false,
            0x04 | 0x14 | 0x24 | 0x34 | 0x44 | 0x54 | 0x64 | 0x74 | 0x84 | 0x94 | 0xa4 => {}
            0x0c | 0x1c | 0x2c | 0x3c | 0x4c | 0x5c | 0x6c | 0x7c | 0x9c | 0xac => {}
            // Copies between the registers, and verdicts.
            0x07 | 0x87 | 0x06 | 0x16 => {}
            0x05 => {
                if operand as usize >= behind {
                    return false;
                }
                written[at + 1 + operand as usize] &= now;
                now = u16::MAX;
            }
            0x15 | 0x1d | 0x25 | 0x2d | 0x35 | 0x3d | 0x45 | 0x4d => {
                for jump in [jump_true, jump_false].map(usize::from) {
                    if jump >= behind {
                        return false;
                    }
                    written[at + 1 + jump] &= now;
                }
                now = u16::MAX;
            }
            _ => return false,
        }
    }
    program.last().is_some_and(|last| matches!(last.code, 0x06 | 0x16))
}

fn parse(words: &[&str], _: &Context) -> Result<Value, String> {
    let program = program(words[0])?;
    if !is_sound(&program) {
        return Err(
            "the kernel does not take this program: it has an instruction or a jump that can't be, reads \
             memory that it did not write, or does not end in a verdict"
                .into(),
        );
    }
    let mut text = program.len().to_string();
    for Instruction { code, jump_true, jump_false, operand } in program {
        text += &format!(",{code} {jump_true} {jump_false} {operand}");
    }
    Ok(Value::Text(text.as_str().into()))
}

fn print(value: &Value, out: &mut String) {
    Arg::Quoted(0).print(value, out);
}
