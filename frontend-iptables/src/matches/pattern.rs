//! Bytes in the payload: the `string` match.
//!
//! A pattern may be written as text or, between bars, in hexadecimal; iptables-save chooses for itself
//! (extensions/libxt_string.c in iptables).

use std::fmt::Write as _;

use polc_ir::source::bytes;

use crate::extension::{Arg, Context, Extension, Meaning, Names, Opt, Options, Value, base, unsaid};
use crate::value::Spelling;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::not("string", Arg::Custom { words: 1, parse: parse_text, print: |_, _| {} })
            .excludes(&["hex-string"]),
        Opt::not("hex-string", Arg::Custom { words: 1, parse: parse_hexadecimal, print: |_, _| {} }),
        Opt::new("algo", Arg::Name(ALGORITHMS, Spelling::Exact)).must(),
        Opt::new("from", Arg::Number(0, 65_535)).unsaid(unsaid::number::<0>),
        Opt::new("to", Arg::Number(0, 65_535)).unsaid(unsaid::number::<65_535>),
        Opt::new("icase", Arg::Flag),
    ],
    finish: Some(|options, _| {
        if options.count(&["string", "hex-string"]) != 1 {
            return Err("one of `--string` and `--hex-string` is needed".into());
        }
        if options.number("from").unwrap_or(0) > options.number("to").unwrap_or(65_535) {
            return Err("`--to` is before `--from`".into());
        }
        Ok(())
    }),
    print: Some(print),
    ..base(
        "string",
        Meaning::Match(|_, body| {
            body.opaque("string", "searches the payload, which no hook here can do in bounded time");
        }),
        "Text in the payload.",
    )
}];

/// The kernel's searches that work within a packet (net/netfilter/xt_string.c asks for no other).
const ALGORITHMS: Names = &[("bm", 0), ("kmp", 1)];

/// The longest pattern (include/uapi/linux/netfilter/xt_string.h, `XT_STRING_MAX_PATTERN_SIZE`).
const BYTES_MAX: usize = 128;

fn pattern(bytes: Vec<u8>) -> Result<Value, String> {
    match bytes.len() {
        0 => Err("the pattern is empty".into()),
        1..=BYTES_MAX => Ok(Value::Bytes(bytes.into())),
        len => Err(format!("the pattern has {len} bytes, more than {BYTES_MAX}")),
    }
}

fn parse_text(words: &[&str], _: &Context) -> Result<Value, String> {
    pattern(bytes::of_text(words[0]).into_owned())
}

/// Text with bytes between bars, `a|0d 0a|b`, where `\` takes the byte after it as it is. Behind a bar that closes,
/// one byte is taken as it is.
fn parse_hexadecimal(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = &*bytes::of_text(words[0]);
    let (mut at, mut hexadecimal, mut found) = (0, false, Vec::new());
    let digit = |at: usize| match text.get(at).map(|&byte| (byte, (byte as char).to_digit(16))) {
        Some((_, Some(digit))) => Ok(digit as u8),
        Some((byte, None)) => Err(format!("`{}` is no hexadecimal digit", char::from(byte))),
        None => Err("an odd number of hexadecimal digits".to_string()),
    };
    while at < text.len() {
        let literal = text[at] == b'\\';
        if literal && hexadecimal {
            return Err("a `\\` between bars".into());
        }
        if text[at] == b'|' {
            hexadecimal = !hexadecimal;
            if hexadecimal {
                at += text[at + 1..].iter().take_while(|&&byte| byte == b' ').count();
            }
            at += 1;
            if at == text.len() {
                break;
            }
        }
        if literal {
            found.push(*text.get(at + 1).ok_or("a `\\` at the end")?);
            at += 2;
        } else if hexadecimal {
            let (high, low) = (digit(at), digit(at + 1));
            found.push(if at + 1 < text.len() { high? << 4 | low? } else { low? });
            match text.get(at + 2) {
                None => return Err("a bar is not closed".into()),
                Some(b' ') => at += 3,
                Some(_) => at += 2,
            }
        } else {
            found.push(text[at]);
            at += 1;
        }
    }
    pattern(found)
}

/// Whether a pattern is printed in hexadecimal: it can't be printed as text, or would end in a `\`.
fn needs_hexadecimal(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| !matches!(byte, b' '..=b'~')) || bytes.last() == Some(&b'\\')
}

fn print(options: &Options, out: &mut String) {
    for name in ["string", "hex-string"] {
        let Some((Value::Bytes(bytes), negated)) = options.value(name) else { continue };
        out.push_str(if negated { " !" } else { "" });
        if needs_hexadecimal(bytes) {
            out.push_str(" --hex-string \"|");
            for byte in bytes.iter() {
                let _ = write!(out, "{byte:02x}");
            }
            out.push_str("|\"");
            continue;
        }
        out.push_str(" --string \"");
        for &byte in bytes.iter() {
            if matches!(byte, b'"' | b'\\') {
                out.push('\\');
            }
            out.push(byte.into());
        }
        out.push('"');
    }
    for option in &options.extension.options[2..] {
        options.print_option(option.name, out);
    }
}
