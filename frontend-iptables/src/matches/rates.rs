//! Token buckets: `limit` for all packets of a rule, `hashlimit` for each group of them, in packets or in bytes.
//!
//! Rates are kept as the kernel keeps them, as a time or a cost, because that is what iptables-save turns back into
//! text, in units of its own choice. Sources: extensions/libxt_limit.c and libxt_hashlimit.c in iptables; xt_limit.c and
//! xt_hashlimit.c (net/netfilter).

use std::fmt::Write as _;

use polc_ir::ruleset::EffectTestKind;

use crate::extension::{Arg, Context, Extension, Meaning, Names, Opt, Options, Value, base, unsaid};
use crate::lower::Body;
use crate::value::{self, Rate, Spelling};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: &[
            Opt::new("limit", Arg::Custom { words: 1, parse: parse_limit, print: print_limit }),
            Opt::new("limit-burst", Arg::Number(0, 10_000)).unsaid(unsaid::number::<BURST>),
        ],
        finish: Some(|options, _| {
            options.default("limit", Value::Number(LIMIT.scale * 3600 / 3));
            LIMIT.holds(
                options.number("limit").unwrap_or(LIMIT.scale),
                options.number("limit-burst").unwrap_or(BURST),
            )
        }),
        ..base("limit", Meaning::Match(limit), "At most so many packets in a time, by a token bucket.")
    },
    Extension {
        options: &[
            Opt::not("hashlimit-upto", RATE).or(&["hashlimit"]).excludes(&["hashlimit-above"]),
            Opt::not("hashlimit-above", RATE),
            Opt::new("hashlimit-burst", Arg::Custom { words: 1, parse: parse_burst, print: |_, _| {} }),
            Opt::new("hashlimit-mode", Arg::Items(MODES, Spelling::Exact))
                .unsaid(|mode, _| *mode == Value::List(Vec::new())),
            Opt::new("hashlimit-name", Arg::CutWord(NAME_BYTES_MAX)).must(),
            Opt::new("hashlimit-htable-size", Arg::Number(0, u32::MAX as u64)).unsaid(unsaid::zero),
            Opt::new("hashlimit-htable-max", Arg::Number(0, u32::MAX as u64)).unsaid(unsaid::zero),
            Opt::new("hashlimit-htable-gcinterval", Arg::Number(0, u32::MAX as u64))
                .unsaid(unsaid::number::<1000>),
            Opt::new("hashlimit-htable-expire", Arg::Number(0, u32::MAX as u64)),
            Opt::new("hashlimit-srcmask", Arg::Length),
            Opt::new("hashlimit-dstmask", Arg::Length),
            Opt::new("hashlimit-rate-match", Arg::Flag),
            Opt::new(
                "hashlimit-rate-interval",
                Arg::Custom { words: 1, parse: parse_interval, print: print_number },
            )
            .unsaid(unsaid::number::<1>),
        ],
        finish: Some(hashlimit),
        print: Some(print_hashlimit),
        ..base(
            "hashlimit",
            Meaning::Match(|_, body| body.observable("hashlimit", "keeps a rate for each group of packets")),
            "A token bucket for each group of packets.",
        )
    },
];

/// The burst, in packets, if none is given.
const BURST: u64 = 5;

/// The longest burst that hashlimit takes in packets.
const HASHLIMIT_BURST_MAX: u64 = 1_000_000;

/// The longest name of a hash table; a longer one is cut (include/uapi/linux/netfilter/xt_hashlimit.h, `name`).
const NAME_BYTES_MAX: usize = 254;

/// The largest hash table the kernel makes, and the most entries it holds; a larger one becomes this (net/netfilter/xt_hashlimit.c,
/// `HASHLIMIT_MAX_SIZE`).
const TABLE_SIZE_MAX: u64 = 1_048_576;

const RATE: Arg = Arg::Custom { words: 1, parse: parse_rate, print: |_, _| {} };

/// What hash tables may tell packets apart by.
const MODES: Names = &[("srcip", 2), ("srcport", 8), ("dstip", 1), ("dstport", 4)];

/// Units of time: the name that may be abbreviated, the one that is printed, and the seconds.
const UNITS: [(&str, &str, u64); 4] =
    [("second", "sec", 1), ("minute", "min", 60), ("hour", "hour", 3600), ("day", "day", 86_400)];

/// Units of bytes, the largest first.
const BYTE_UNITS: [(&str, u64); 3] = [("m", 1 << 20), ("k", 1 << 10), ("", 1)];

/// The kernel's arithmetic of a token bucket.
struct Bucket {
    /// Parts of a second that periods are counted in (`XT_LIMIT_SCALE`, `XT_HASHLIMIT_SCALE_v2`).
    scale: u64,
    /// The credits of a period (`user2credits`), which may overflow.
    credits: fn(u64) -> u64,
}

/// Credits are of 32 bits, and 32,000 (`HZ * CREDITS_PER_JIFFY`, the same for an HZ of 250 and of 1000) come in a second.
const LIMIT: Bucket = Bucket {
    scale: 10_000,
    credits: |period| {
        const A_SECOND: u32 = 32_000;
        let period = period as u32;
        // Where credits would overflow, precision goes first.
        u64::from(match period.checked_mul(A_SECOND) {
            Some(credits) => credits / 10_000,
            None => (period / 10_000).wrapping_mul(A_SECOND),
        })
    },
};

/// Credits are of 64 bits, and 1000 * 2^37 come in a second.
const HASHLIMIT: Bucket =
    Bucket { scale: 1_000_000, credits: |period| period.wrapping_mul((1000 << 37) / 1_000_000) };

impl Bucket {
    /// Whether the bucket holds a burst of packets that come in this period: the kernel's own test, which an overflow
    /// may pass.
    fn holds(&self, period: u64, burst: u64) -> Result<(), String> {
        if burst == 0 {
            return Err("a burst of 0 lets no packet through".into());
        }
        if (self.credits)(period.wrapping_mul(burst)) < (self.credits)(period) {
            return Err(format!(
                "the kernel can't count a burst of {burst} at so low a rate; lower it, or raise the rate"
            ));
        }
        Ok(())
    }

    /// The period of one packet and the seconds of the unit, of `count[/unit]`.
    fn parse(&self, text: &str) -> Result<(u64, u64), String> {
        let bad = || format!("`{text}` is not a rate like 3/hour");
        let (count, unit) = text.split_once('/').unwrap_or((text, "second"));
        let unit = UNITS.iter().find(|(name, ..)| Spelling::Abbreviated.fits(unit, name));
        let &(.., seconds) = unit.ok_or_else(bad)?;
        let (count, _) = value::strtoul(count, 10).filter(|&(count, _)| count > 0).ok_or_else(bad)?;
        match self.scale * seconds / count {
            0 => Err(format!("the rate `{text}` is too fast")),
            period => Ok((period, seconds)),
        }
    }

    /// Prints a period as the rate iptables-save shows, in the largest unit that loses nothing worth keeping; the seconds
    /// of the unit.
    fn print(&self, period: u64, out: &mut String) -> u64 {
        let mut at = 1;
        while at < UNITS.len() {
            let unit = UNITS[UNITS.len() - 1 - at].2 * self.scale;
            if period > unit || unit / period < unit % period {
                break;
            }
            at += 1;
        }
        let (_, name, seconds) = UNITS[UNITS.len() - at];
        let _ = write!(out, " {}/{name}", seconds * self.scale / period);
        seconds
    }
}

fn parse_limit(words: &[&str], _: &Context) -> Result<Value, String> {
    LIMIT.parse(words[0]).map(|(period, _)| Value::Number(period))
}

fn print_limit(value: &Value, out: &mut String) {
    LIMIT.print(value.number().unwrap_or(1), out);
}

fn limit(options: &Options, body: &mut Body<'_>) {
    let average = options.number("limit").unwrap_or(LIMIT.scale) as u32;
    let burst = options.number("limit-burst").unwrap_or(BURST) as u32;
    body.effect(EffectTestKind::Limit { average, burst }, false);
}

/// The unit of bytes that a letter begins; any other letter means single bytes.
fn byte_unit(letter: Option<char>) -> u64 {
    match letter {
        Some('m') => 1 << 20,
        Some('k') => 1 << 10,
        _ => 1,
    }
}

fn parse_rate(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    // A rate in bytes is told by what follows its unit.
    let Some((head, _)) = text.split_once("b/s").filter(|(head, _)| !head.is_empty()) else {
        let (period, unit) = HASHLIMIT.parse(text)?;
        return Ok(Value::Rate(Rate::Packets { period, unit }));
    };
    let (count, _) = value::strtoul(text, 10)
        .filter(|&(count, _)| count > 0)
        .ok_or_else(|| format!("`{text}` is not a rate like 512kb/s"))?;
    let bytes = count.wrapping_mul(byte_unit(head.chars().last()));
    match Rate::cost_of(bytes) {
        // Less than two is no credit at all (net/netfilter/xt_hashlimit.c, `user2credits_byte`).
        None | Some(0 | 1) => Err(format!("the rate `{text}` is too fast")),
        Some(cost) => Ok(Value::Rate(Rate::Bytes { cost })),
    }
}

/// A burst in packets, or in bytes if a unit follows; which it is depends on the rate.
fn parse_burst(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    let bad = || format!("`{text}` is not a burst from 1 to {HASHLIMIT_BURST_MAX}, or one like 512kb");
    let (count, rest) = value::strtoul(text, 0).filter(|&(count, _)| count > 0).ok_or_else(bad)?;
    if rest.is_empty() && count > HASHLIMIT_BURST_MAX {
        return Err(bad());
    }
    Ok(Value::Number(count.checked_mul(byte_unit(rest.chars().next())).ok_or_else(bad)?))
}

/// Seconds; what follows the digits is not looked at.
fn parse_interval(words: &[&str], _: &Context) -> Result<Value, String> {
    value::strtoul(words[0], 10)
        .filter(|&(seconds, _)| (1..=i32::MAX as u64).contains(&seconds))
        .map(|(seconds, _)| Value::Number(seconds))
        .ok_or_else(|| format!("`{}` is not a number of seconds", words[0]))
}

fn print_number(value: &Value, out: &mut String) {
    let _ = write!(out, " {}", value.number().unwrap_or(0));
}

fn rate(options: &Options) -> Option<Rate> {
    ["hashlimit-upto", "hashlimit-above"].iter().find_map(|name| match options.value(name)? {
        (Value::Rate(rate), _) => Some(*rate),
        _ => None,
    })
}

fn hashlimit(options: &mut Options, context: &Context) -> Result<(), String> {
    let Some(mut rate) = rate(options) else {
        return Err("one of `--hashlimit-upto` and `--hashlimit-above` is needed".into());
    };
    let burst = options.number("hashlimit-burst");
    match &mut rate {
        Rate::Packets { period, unit } => {
            if options.has("hashlimit-rate-match") {
                // The rate is one of its interval, and printed as one of a second.
                options.default("hashlimit-rate-interval", Value::Number(*unit));
                *period = (*period / *unit).max(1);
            }
            let burst = burst.unwrap_or(BURST);
            if burst > HASHLIMIT_BURST_MAX {
                return Err(format!("a burst of packets is at most {HASHLIMIT_BURST_MAX}"));
            }
            HASHLIMIT.holds(*period, burst)?;
            options.set("hashlimit-burst", Value::Number(burst));
            options.default("hashlimit-htable-expire", Value::Number(*unit * 1000));
        }
        Rate::Bytes { cost } => {
            let unit = Rate::bytes_of(*cost);
            if let Some(burst) = burst {
                if burst < unit {
                    return Err(format!("the burst is below the rate, {unit} bytes"));
                }
                // Rounded up to what comes in a second; iptables divides the lower 32 bits alone.
                let units = u64::from(burst as u32).checked_div(unit).unwrap_or(0);
                let more = burst.checked_rem(unit).is_some_and(|rest| rest != 0);
                options.set("hashlimit-burst", Value::Number(units + u64::from(more)));
            }
            options.default("hashlimit-htable-expire", Value::Number(byte_expiry(burst.is_some())));
        }
    }
    for name in ["hashlimit-upto", "hashlimit-above"] {
        if options.has(name) {
            options.set(name, Value::Rate(rate));
        }
    }
    if !options.has("hashlimit-rate-match") {
        options.remove("hashlimit-rate-interval");
    }
    for name in ["hashlimit-htable-size", "hashlimit-htable-max"] {
        if let Some(size) = options.number(name) {
            options.set(name, Value::Number(size.min(TABLE_SIZE_MAX)));
        }
    }
    for name in ["hashlimit-htable-gcinterval", "hashlimit-htable-expire"] {
        if options.number(name) == Some(0) {
            return Err(format!("`--{name}` can't be 0"));
        }
    }
    let bits = u64::from(context.family.address_bits());
    for name in ["hashlimit-srcmask", "hashlimit-dstmask"] {
        match options.number(name) {
            Some(length) if length > bits => return Err(format!("`--{name}` takes a mask that is a prefix")),
            Some(length) if length == bits => options.remove(name),
            _ => {}
        }
    }
    table_name(options.value("hashlimit-name").and_then(|(name, _)| name.text()).unwrap_or(""))
}

/// Whether the kernel can make a file of this name under /proc.
pub(super) fn table_name(name: &str) -> Result<(), String> {
    if matches!(name, "" | "." | "..") || name.contains('/') {
        return Err(format!("`{name}` can't be a table's name: it names a file under /proc"));
    }
    Ok(())
}

/// How long, in milliseconds, entries of a table live that counts bytes.
fn byte_expiry(burst: bool) -> u64 {
    if burst { 60_000 } else { 15_000 }
}

/// The largest unit that keeps the cost, and the amount in it.
fn in_bytes(bytes: u64, keeps: impl Fn(u64) -> bool) -> (u64, &'static str) {
    let fits = |&&(_, size): &&(&str, u64)| size == 1 || bytes >= size && keeps(bytes & !(size - 1));
    let &(unit, size) = BYTE_UNITS.iter().find(fits).unwrap_or(&("", 1));
    (bytes / size, unit)
}

fn print_hashlimit(options: &Options, out: &mut String) {
    let mut expiry = 0;
    // Up to a rate is not above it, and the other way round.
    let given =
        ["hashlimit-upto", "hashlimit-above"].iter().find_map(|name| Some((*name, options.value(name)?)));
    if let Some((name, (Value::Rate(rate), negated))) = given {
        let above = (name == "hashlimit-above") != negated;
        out.push_str(if above { " --hashlimit-above" } else { " --hashlimit-upto" });
        let burst = options.number("hashlimit-burst");
        match *rate {
            Rate::Packets { period, .. } => {
                expiry = HASHLIMIT.print(period, out) * 1000;
                let _ = write!(out, " --hashlimit-burst {}", burst.unwrap_or(BURST));
            }
            Rate::Bytes { cost } => {
                let bytes = Rate::bytes_of(cost);
                // iptables compares the lower 32 bits.
                let keeps = |less: u64| Rate::cost_of(u64::from(less as u32)) == Some(cost);
                let (count, unit) = in_bytes(bytes, keeps);
                let _ = write!(out, " {count}{unit}b/s");
                if let Some(burst) = burst.filter(|&burst| burst > 0) {
                    let (count, unit) = in_bytes(bytes.wrapping_mul(burst), |_| true);
                    let _ = write!(out, " --hashlimit-burst {count}{unit}b");
                }
                expiry = byte_expiry(burst.is_some());
            }
        }
    }
    for option in &options.extension.options[3..] {
        if option.name != "hashlimit-htable-expire" || options.number(option.name) != Some(expiry) {
            options.print_option(option.name, out);
        }
    }
}
