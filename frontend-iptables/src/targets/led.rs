//! A lamp that shows packets: the `LED` target (extensions/libxt_LED.c in iptables; net/netfilter/xt_LED.c).

use super::terminal::record;
use crate::extension::{Arg, Context, Extension, Meaning, Opt, Value, base, unsaid};
use crate::value;

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::new("led-trigger-id", Arg::Custom { words: 1, parse: parse_trigger, print: print_trigger })
            .must(),
        Opt::new("led-delay", Arg::Custom { words: 1, parse: parse_delay, print: print_delay })
            .unsaid(unsaid::zero),
        Opt::new("led-always-blink", Arg::Flag),
    ],
    ..base("LED", Meaning::Target(|_| record("LED", "lights a lamp")), "Lights a lamp of the host.")
}];

/// The longest name of a trigger, which the kernel keeps with `netfilter-` before it.
const TRIGGER_BYTES_MAX: usize = 16;

fn parse_trigger(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Text(TRIGGER_BYTES_MAX).parse(words, context)
}

/// Always in quotes, of which other text in quotes escapes one kind more.
fn print_trigger(trigger: &Value, out: &mut String) {
    let trigger = trigger.text().unwrap_or_default();
    out.push_str(&format!(" \"{}\"", trigger.replace('\\', r"\\").replace('"', r#"\""#)));
}

/// A time in milliseconds; the longest is none, and stays on.
fn parse_delay(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    let stays = text.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("inf"));
    match stays {
        true => Some(u32::MAX.into()),
        false => value::number(text, 0, u32::MAX.into()),
    }
    .map(Value::Number)
    .ok_or_else(|| format!("`{text}` is neither a number of milliseconds nor `inf`"))
}

/// iptables-save prints the upper half of the numbers as negative ones, which it does not read.
fn print_delay(delay: &Value, out: &mut String) {
    out.push_str(&format!(" {}", delay.number().unwrap_or(0) as u32 as i32));
}
