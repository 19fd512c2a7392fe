//! `-m limit`: a token bucket per rule.

use std::fmt;

use crate::ast::Given;
use crate::codes;
use crate::ext::{Argument, Extension, Families, Fault, OptionSpec, Options, Place, Printer, Spec};
use crate::value::abbreviates;

/// The options of `-m limit`.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// `--limit`; 3 an hour if not given.
    pub rate: Rate,
    /// `--limit-burst`: how many packets match at once from a full bucket; 5 if not given.
    pub burst: u32,
}

/// An average rate, as the time between two packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    /// The time between packets, in units of 100 microseconds; what the kernel is given, rounded down from the rate.
    pub period: u32,
}

/// Units of a period in a second (include/uapi/linux/netfilter/xt_limit.h, `XT_LIMIT_SCALE`).
const SCALE: u32 = 10_000;

const BURST_DEFAULT: u32 = 5;

const UNITS: &[(&str, u32)] = &[("second", 1), ("minute", 60), ("hour", 3_600), ("day", 86_400)];

impl Rate {
    /// `n[/unit]`, the unit abbreviated as you like; seconds by default.
    pub(crate) fn parse(argument: Argument<'_>) -> Result<Rate, Fault> {
        let bad = || {
            argument
                .bad(format!("`{}` is no rate", argument.text))
                .hint("write a rate such as `3/hour` or `10/s`")
        };
        let (number, unit) = match argument.text.split_once('/') {
            Some((number, unit)) => (number, Some(unit)),
            None => (argument.text, None),
        };
        let seconds = match unit {
            None => 1,
            Some("") => return Err(bad()),
            Some(unit) => UNITS.iter().find(|(name, _)| abbreviates(unit, name)).ok_or_else(bad)?.1,
        };
        // The number is read by atoi, which stops at the first other character and wraps a negative one around.
        let number = atoi(number) as u32;
        if number == 0 {
            return Err(bad());
        }
        match SCALE * seconds / number {
            0 => Err(argument.bad(format!("rate `{}` is too fast to be limited", argument.text))),
            period => Ok(Rate { period }),
        }
    }
}

/// `atoi`: blanks, a sign, digits; anything else ends the number, nothing is 0, overflow saturates before it wraps.
pub(crate) fn atoi(text: &str) -> i32 {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let magnitude = digits[..end]
        .bytes()
        .fold(0i64, |value, digit| value.saturating_mul(10).saturating_add(i64::from(digit - b'0')));
    (if negative { magnitude.wrapping_neg() } else { magnitude }) as i32
}

/// Prints the rate in the largest unit that keeps it near: `3/hour`.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("day", 86_400), ("hour", 3_600), ("min", 60), ("sec", 1)];
        let period = self.period.max(1);
        let fitting = units[1..].iter().take_while(|(_, seconds)| {
            let scale = SCALE * seconds;
            period <= scale && scale / period >= scale % period
        });
        let (name, seconds) = fitting.last().copied().unwrap_or(units[0]);
        write!(f, "{}/{name}", SCALE * seconds / period)
    }
}

const LIMIT: u8 = 0;
const BURST: u8 = 1;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(LIMIT, "limit", "rate[/second|/minute|/hour|/day]"),
    OptionSpec::value(BURST, "limit-burst", "number"),
];

impl Extension for Limit {
    const SPEC: Spec = Spec::new(
        "limit",
        Families::Both,
        OPTIONS,
        "Matches until a bucket of `--limit-burst` packets (5) is empty; it fills again at `--limit` (3/hour). Each \
         packet that reaches the match in its rule spends a token if there is one.",
    );

    fn parse(options: &Options<'_>) -> Result<Limit, Fault> {
        let rate = options.optional(LIMIT, |option| Rate::parse(option.argument))?;
        let burst = options.number(BURST, 0, 10_000)?;
        Ok(Limit {
            rate: rate.map_or(Rate { period: SCALE * 3_600 / 3 }, |Given { value, .. }| value),
            burst: burst.map_or(BURST_DEFAULT, |Given { value, .. }| value as u32),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.option("limit", self.rate);
        if self.burst != BURST_DEFAULT {
            out.option("limit-burst", self.burst);
        }
    }

    fn check(&self, _place: &Place) -> Result<(), Fault> {
        // net/netfilter/xt_limit.c, `limit_mt_check`: no burst, or a full bucket that overflows 32 bits of credit.
        if self.burst == 0 {
            return Err(Fault::new(codes::BAD_VALUE, "a burst of 0 never matches; the kernel refuses it"));
        }
        Ok(())
    }
}
