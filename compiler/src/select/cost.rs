//! What a line of operations takes, in tenths of a nanosecond.
//!
//! The model is that of a processor that executes out of order: every instruction takes a share of its width, and the
//! longest chain of operations that wait for each other takes its latencies; most of the shorter of the two is hidden
//! behind the longer, and some of the waiting behind other packets'. A read waits as long as a table of its
//! size does when packets come in random order. The constants were fitted to measurements on x86-64 (`./bench` prints
//! what the model predicts beside what it measures).

use cranelift_entity::PrimaryMap;
use polc_ir::entities::Value;
use polc_ir::plan::{Given, LinearTest, Op, Operand, given};

use super::line::Sizes;

/// Hundredths of a nanosecond that an instruction takes of the processor's width.
const INSN: u64 = 4;

/// Hundredths of a nanosecond from an arithmetic operation's inputs to its result.
const ALU: u64 = 20;

/// Of the shorter of waiting and issuing, one part in so many is not hidden.
const SHOWN: u64 = 4;

/// What starting and ending a look-up takes, in hundredths: from its result to the return code.
const LOOKUP_ENDS: u64 = 150;

/// Hundredths of a nanosecond of waiting that are hidden behind what comes before a look-up, and behind it.
const HIDDEN: u64 = 800;

/// The same for a part of a look-up, which has other parts beside it; of what is hidden, one part in so many is not.
const HIDDEN_BESIDE: u64 = 400;
const SHOWN_BESIDE: u64 = 8;

/// Hundredths of a nanosecond for each word test of code that compares.
const WORD_TEST: u64 = 20;

/// Hundredths of a nanosecond that code which compares loses to branches that went another way than foreseen, for each
/// entry but one up to so many.
const MISPREDICTED: u64 = 90;
const MISPREDICTED_ENTRIES: u64 = 8;

/// Hundredths of a nanosecond from an offset to the element of a table of so many bytes.
pub(super) fn read(bytes: usize) -> u64 {
    match bytes {
        0..=0x4000 => 110,
        0x4001..=0x1_0000 => 170,
        0x1_0001..=0x4_0000 => 350,
        0x4_0001..=0x10_0000 => 550,
        0x10_0001..=0x40_0000 => 1_100,
        0x40_0001..=0x200_0000 => 4_000,
        _ => 9_000,
    }
}

/// What a look-up takes.
pub(super) fn line(ops: &PrimaryMap<Value, Op>, tables: &Sizes, result: Value) -> u32 {
    let (waiting, issuing) = parts(ops, tables, result);
    ((LOOKUP_ENDS + together(waiting.saturating_sub(HIDDEN), issuing)) / 10) as u32
}

/// What a part of a look-up takes up to its result, beside other parts.
pub(super) fn part(ops: &PrimaryMap<Value, Op>, tables: &Sizes, result: Value) -> u32 {
    let (waiting, issuing) = parts(ops, tables, result);
    let beside = together(waiting.saturating_sub(HIDDEN_BESIDE), issuing);
    // What a table takes of the caches is lacking elsewhere.
    let sizes = ops.values().filter_map(|op| match op {
        Op::Read(table, _) => Some(read(tables[*table].bytes) - read(0)),
        _ => None,
    });
    ((beside + waiting / SHOWN_BESIDE + sizes.sum::<u64>() / SHOWN) / 10) as u32
}

/// The least that a part may take of so many instructions, some of them one read after another, the first from a table of
/// so many bytes: what is not worth writing to know what it takes.
pub(super) fn least_part(instructions: u64, reads: u64, first_bytes: usize) -> u32 {
    let table = read(first_bytes) - read(0);
    let waiting = if reads == 0 { 0 } else { reads * (2 * ALU + read(0)) + table };
    let beside = together(waiting.saturating_sub(HIDDEN_BESIDE), INSN * instructions);
    ((beside + waiting / SHOWN_BESIDE + table / SHOWN) / 10) as u32
}

fn together(waiting: u64, issuing: u64) -> u64 {
    waiting.max(issuing) + waiting.min(issuing) / SHOWN
}

/// What the longest chain up to the result waits, and what all operations take of the processor's width.
fn parts(ops: &PrimaryMap<Value, Op>, tables: &Sizes, result: Value) -> (u64, u64) {
    let mut ready: Vec<u64> = Vec::with_capacity(ops.len());
    let mut instructions = 0;
    let given = given(ops);
    for (value, op) in ops.iter() {
        let at = |value: Value| ready[value.as_u32() as usize];
        let when = match *op {
            // What it is made of counts.
            Op::Alu(..) if given[value.as_u32() as usize].is_some_and(Given::is_loaded) => 0,
            Op::Word(_) | Op::Const(_) => {
                instructions += 1;
                0
            }
            Op::Alu(_, a, b) => {
                instructions += 2;
                let b = match b {
                    Operand::Value(b) => at(b),
                    Operand::Const(_) => 0,
                };
                at(a).max(b) + ALU
            }
            Op::Read(table, offset) => {
                instructions += 4;
                at(offset) + 2 * ALU + read(tables[table].bytes)
            }
        };
        ready.push(when);
    }
    (ready[result.as_u32() as usize], INSN * instructions)
}

/// What entries tried one after another take, if packets match any of them alike.
pub(super) fn linear<'a>(entries: impl Iterator<Item = &'a [LinearTest]>) -> u32 {
    let (mut tests, mut count) = (0, 0);
    for entry in entries {
        count += 1;
        tests += 1 + entry.iter().flat_map(|test| &test.any).map(Vec::len).sum::<usize>() as u64;
    }
    let mispredicted = MISPREDICTED * MISPREDICTED_ENTRIES.min(u64::saturating_sub(count, 1));
    ((mispredicted + WORD_TEST * tests) / 10) as u32
}
