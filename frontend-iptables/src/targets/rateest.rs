//! A measure of the rate of what passes: the `RATEEST` target (extensions/libxt_RATEEST.c in iptables).
//!
//! The kernel takes an interval of 2^n times 250 ms and a smoothing of 1 - 2^-n; iptables finds those next to what is
//! asked and prints them back as times.

use super::terminal::record;
use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base};
use crate::value::strtod;

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::new("rateest-name", Arg::CutWord(15)).must(),
        Opt::new("rateest-interval", TIME).must(),
        Opt::new("rateest-ewmalog", TIME).must(),
    ],
    finish: Some(estimator),
    ..base(
        "RATEEST",
        Meaning::Target(|_| record("RATEEST", "measures the rate of what passes")),
        "Measures the rate of what passes.",
    )
}];

const TIME: Arg = Arg::Custom { words: 1, parse: parse_time, print: print_time };

/// The shortest interval, in microseconds.
const INTERVAL_MIN: u32 = 250_000;

/// Units of time, in microseconds.
const UNITS: &[(&str, f64)] = &[
    ("s", 1e6),
    ("sec", 1e6),
    ("secs", 1e6),
    ("ms", 1e3),
    ("msec", 1e3),
    ("msecs", 1e3),
    ("us", 1.0),
    ("usec", 1.0),
    ("usecs", 1.0),
];

/// A time in microseconds, of which 32 bits count.
fn parse_time(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let scale = match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
        Some((_, scale)) => *scale,
        None if unit.is_empty() => 1.0,
        None => return Err(format!("`{text}` is no time like 500ms or 2s")),
    };
    strtod(digits)
        .filter(|time| *time >= 0.0)
        .map(|time| Value::Number(((time * scale) as u64 as u32).into()))
        .ok_or_else(|| format!("`{text}` is no time like 500ms or 2s"))
}

fn print_time(value: &Value, out: &mut String) {
    let time = value.number().unwrap_or(0);
    out.push_str(&match time {
        1_000_000.. => format!(" {:.1}s", time as f64 / 1e6),
        1_000.. => format!(" {:.1}ms", time as f64 / 1e3),
        _ => format!(" {time}us"),
    });
}

fn estimator(options: &mut Options, _: &Context) -> Result<(), String> {
    let number = |name| options.number(name).unwrap_or(0) as u32;
    let (asked, average) = (number("rateest-interval"), number("rateest-ewmalog"));
    let interval = (0..=5).map(|power| INTERVAL_MIN << power).find(|&interval| asked <= interval);
    let interval = interval.ok_or("the interval is at most 8 seconds")?;
    let smooths = |power: &u32| {
        let weight = 1.0 - 1.0 / f64::from(1u32 << power);
        f64::from(asked) / -weight.ln() > f64::from(average)
    };
    let power = (1..32).find(smooths).unwrap_or(32) - 1;
    if power == 0 || power >= 31 {
        return Err("`--rateest-ewmalog` is out of proportion to the interval".into());
    }
    options.set("rateest-interval", Value::Number(interval.into()));
    options.set("rateest-ewmalog", Value::Number(interval.wrapping_shl(power).into()));
    Ok(())
}
