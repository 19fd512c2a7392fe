//! The rates that `RATEEST` targets measure, compared: the `rateest` match (extensions/libxt_rateest.c in iptables).
//!
//! Rates may be left out after their options, and are 0 then. Whether the estimators exist is the host's matter.

use std::fmt::Write as _;

use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base};
use crate::value::{number, strtod};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::new("rateest-delta", Arg::Flag),
        Opt::new("rateest1", Arg::CutWord(NAME_BYTES_MAX)).or(&["rateest"]).must(),
        Opt::not("rateest-lt", Arg::Flag).excludes(&["rateest-gt", "rateest-eq"]),
        Opt::not("rateest-gt", Arg::Flag).excludes(&["rateest-eq"]),
        Opt::not("rateest-eq", Arg::Flag),
        Opt::new("rateest-bps1", BITS).optional(),
        Opt::new("rateest-bps2", BITS).or(&["rateest-bps"]).optional(),
        Opt::new("rateest-pps1", PACKETS).optional(),
        Opt::new("rateest-pps2", PACKETS).or(&["rateest-pps"]).optional(),
        Opt::new("rateest2", Arg::CutWord(NAME_BYTES_MAX)),
    ],
    finish: Some(|options, _| {
        if options.count(&COMPARISONS) == 0 {
            return Err("one of `--rateest-lt`, `--rateest-gt` and `--rateest-eq` is needed".into());
        }
        if options.count(&["rateest-bps1", "rateest-bps2", "rateest-pps1", "rateest-pps2"]) == 0 {
            return Err("one of `--rateest-bps` and `--rateest-pps` is needed".into());
        }
        Ok(())
    }),
    print: Some(print),
    ..base(
        "rateest",
        Meaning::Match(|_, body| body.opaque("rateest", "compares rates that are measured")),
        "A measured rate.",
    )
}];

/// The longest name of an estimator; a longer one is cut.
const NAME_BYTES_MAX: usize = 15;

const COMPARISONS: [&str; 3] = ["rateest-lt", "rateest-gt", "rateest-eq"];

const BITS: Arg = Arg::Custom { words: 1, parse: parse_bits, print: |_, _| {} };
const PACKETS: Arg = Arg::Custom { words: 1, parse: parse_packets, print: |_, _| {} };

/// Units of a rate, in bits.
const UNITS: &[(&str, f64)] = &[
    ("bit", 1.0),
    ("kibit", 1024.0),
    ("kbit", 1e3),
    ("mibit", 1_048_576.0),
    ("mbit", 1e6),
    ("gibit", 1_073_741_824.0),
    ("gbit", 1e9),
    ("tibit", 1_099_511_627_776.0),
    ("tbit", 1e12),
    ("bps", 8.0),
    ("kibps", 8192.0),
    ("kbps", 8e3),
    ("mibps", 8_388_608.0),
    ("mbps", 8e6),
    ("gibps", 8_589_934_592.0),
    ("gbps", 8e9),
    ("tibps", 8_796_093_022_208.0),
    ("tbps", 8e12),
];

/// A rate in bytes a second, of which 32 bits count; bits if no unit is named.
fn parse_bits(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    if text.is_empty() {
        return Ok(Value::Number(0));
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let scale = match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
        Some((_, scale)) => Some(*scale),
        None => unit.is_empty().then_some(1.0),
    };
    let rate = strtod(digits).zip(scale).map(|(rate, scale)| rate * scale / 8.0);
    rate.filter(|rate| *rate >= 0.0)
        .map(|rate| Value::Number((rate as u64 as u32).into()))
        .ok_or_else(|| format!("`{text}` is no rate like 8bit or 5kbps"))
}

fn parse_packets(words: &[&str], _: &Context) -> Result<Value, String> {
    match words[0] {
        "" => Ok(Value::Number(0)),
        text => number(text, 0, u32::MAX.into())
            .map(Value::Number)
            .ok_or_else(|| format!("`{text}` is not a number of packets")),
    }
}

fn print(options: &Options, out: &mut String) {
    let (delta, two) = (options.has("rateest-delta"), options.has("rateest2"));
    options.print_option("rateest-delta", out);
    if let Some(name) = options.value("rateest1").and_then(|(name, _)| name.text()) {
        let _ = write!(out, " --rateest{} {name}", if two { "1" } else { "" });
    }
    for (what, one, other) in
        [("bps", "rateest-bps1", "rateest-bps2"), ("pps", "rateest-pps1", "rateest-pps2")]
    {
        if options.count(&[one, other]) == 0 {
            continue;
        }
        let rate = |name| match (what, options.number(name).unwrap_or(0)) {
            ("pps", packets) => packets.to_string(),
            (_, bytes) => match bytes * 8 {
                bits @ 1_000_000_000.. => format!("{:.0}Mbit", bits as f64 / 1e6),
                bits @ 1_000_000.. => format!("{:.0}Kbit", bits as f64 / 1e3),
                bits => format!("{bits}bit"),
            },
        };
        if delta {
            let _ = write!(out, " --{one} {}", rate(one));
        }
        COMPARISONS.into_iter().for_each(|comparison| options.print_option(comparison, out));
        let _ = match (delta, two) {
            (true, _) => write!(out, " --{other} {}", rate(other)),
            (false, false) => write!(out, " --rateest-{what} {}", rate(other)),
            (false, true) => write!(out, " --rateest-{what}"),
        };
    }
    options.print_option("rateest2", out);
}
