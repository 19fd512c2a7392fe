//! Words of the packet, masked, shifted and compared: the `u32` match.

use polc_ir::derived::{DerivedData, U32Op, U32Program, U32Test};
use polc_ir::field::Field;
use polc_ir::interval::IntervalSet;

use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base};
use crate::lower::Body;
use crate::value;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[Opt::not("u32", Arg::Custom { words: 1, parse: parse_u32, print: print_u32 }).must()],
    ..base("u32", Meaning::Match(u32_match), "Words of the packet, masked, shifted and compared.")
}];

/// Reads a `u32` program; `None` if it isn't one (extensions/libxt_u32.c in iptables).
fn u32_program(text: &str) -> Option<U32Program> {
    /// How many tests, values of one, and operands there can be (include/uapi/linux/netfilter/xt_u32.h). The word that a
    /// test starts from is an operand.
    const MAX: usize = 10;
    fn number<'a>(text: &mut &'a str) -> Option<u32> {
        let trimmed: &'a str = text.trim_start();
        let (value, rest) = value::strtoul(trimmed, 0)?;
        *text = rest.trim_start();
        u32::try_from(value).ok()
    }
    let mut tests = Vec::new();
    for test in text.split("&&") {
        let mut rest = test.trim();
        let start = number(&mut rest)?;
        let mut ops = Vec::new();
        while !rest.starts_with('=') {
            let (op, after): (fn(u32) -> U32Op, &str) = if let Some(after) = rest.strip_prefix("<<") {
                (U32Op::ShiftLeft, after)
            } else if let Some(after) = rest.strip_prefix(">>") {
                (U32Op::ShiftRight, after)
            } else if let Some(after) = rest.strip_prefix('&') {
                (U32Op::And, after)
            } else if let Some(after) = rest.strip_prefix('@') {
                (U32Op::At, after)
            } else {
                return None;
            };
            rest = after;
            let op = op(number(&mut rest)?);
            // Word-wide shifts and wider ones the kernel refuses (net/netfilter/xt_u32.c, `u32_mt_checkentry`).
            if matches!(op, U32Op::ShiftLeft(32..) | U32Op::ShiftRight(32..)) {
                return None;
            }
            ops.push(op);
        }
        rest = rest.strip_prefix('=')?;
        let mut ranges = Vec::new();
        loop {
            let first = number(&mut rest)?;
            let last = match rest.strip_prefix(':') {
                Some(after) => {
                    rest = after;
                    number(&mut rest)?
                }
                None => first,
            };
            ranges.push((first, last));
            match rest.strip_prefix(',') {
                Some(after) => rest = after,
                None => break,
            }
        }
        if !rest.is_empty() || ops.len() >= MAX || ranges.len() > MAX {
            return None;
        }
        tests.push(U32Test { start, ops, ranges });
    }
    (tests.len() <= MAX).then_some(U32Program { tests })
}

fn parse_u32(words: &[&str], _: &Context) -> Result<Value, String> {
    let program = u32_program(words[0]).ok_or_else(|| format!("`{}` is no u32 program", words[0]))?;
    let tests: Vec<String> = program.tests.iter().map(u32_text).collect();
    Ok(Value::Text(tests.join("&&").as_str().into()))
}

fn u32_text(test: &U32Test) -> String {
    let mut text = format!("{:#x}", test.start);
    for op in &test.ops {
        text += &match op {
            U32Op::And(value) => format!("&{value:#x}"),
            U32Op::ShiftLeft(value) => format!("<<{value:#x}"),
            U32Op::ShiftRight(value) => format!(">>{value:#x}"),
            U32Op::At(value) => format!("@{value:#x}"),
        };
    }
    let ranges: Vec<String> = test
        .ranges
        .iter()
        .map(
            |(first, last)| {
                if first == last { format!("{first:#x}") } else { format!("{first:#x}:{last:#x}") }
            },
        )
        .collect();
    text + "=" + &ranges.join(",")
}

fn print_u32(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        out.push_str(&format!(" \"{text}\""));
    }
}

fn u32_match(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Text(text), negated)) = options.value("u32")
        && let Some(program) = u32_program(text)
    {
        let field = Field::Derived(body.ruleset.derive(DerivedData::U32(program)));
        body.require_values(field, negated, IntervalSet::point(1));
    }
}
