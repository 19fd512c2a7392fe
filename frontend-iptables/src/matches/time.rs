//! The time of day and the date: the `time` match.
//!
//! Times, days and dates are kept as the kernel keeps them; iptables-save prints them back in one form (extensions/
//! libxt_time.c in iptables).

use std::fmt::Write as _;

use jiff::ToSpan as _;
use jiff::civil::{Date, DateTime, date};

use crate::extension::{Arg, Context, Extension, Meaning, Opt, Options, Value, base, unsaid};
use crate::value::{strtoul, strtoul_negating};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::new("timestart", Arg::Custom { words: 1, parse: parse_time, print: |_, _| {} }),
        Opt::new("timestop", Arg::Custom { words: 1, parse: parse_time, print: |_, _| {} }),
        Opt::not("monthdays", Arg::Custom { words: 1, parse: parse_month_days, print: print_month_days })
            .unsaid(unsaid::number::<MONTH>),
        Opt::not("weekdays", Arg::Custom { words: 1, parse: parse_week_days, print: print_week_days })
            .unsaid(unsaid::number::<WEEK>),
        Opt::new("datestart", Arg::Custom { words: 1, parse: parse_date, print: print_date })
            .unsaid(unsaid::number::<0>),
        Opt::new("datestop", Arg::Custom { words: 1, parse: parse_date, print: print_date })
            .unsaid(unsaid::number::<0>),
        Opt::new("kerneltz", Arg::Flag).or(&["localtz"]),
        Opt::new("contiguous", Arg::Flag),
        Opt::new("utc", Arg::Flag).excludes(&["kerneltz"]).unsaid(|_, _| true),
    ],
    finish: Some(time),
    print: Some(print),
    ..base(
        "time",
        Meaning::Match(|_, body| body.opaque("time", "asks for the time of day")),
        "The time of day.",
    )
}];

/// All days of a month, as bits 1 to 31.
const MONTH: u64 = 0xffff_fffe;

/// All days of a week, Monday to Sunday as bits 1 to 7.
const WEEK: u64 = 0xfe;

const WEEK_DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

/// The last second of a day.
const DAY_END: u64 = 24 * 3600 - 1;

/// The date up to which a rule holds if it does not say.
const DATE_END: u64 = i32::MAX as u64;

/// The years that dates may be of.
const YEARS: std::ops::RangeInclusive<u64> = 1970..=2038;

/// A decimal number, 0 if there is none, and what follows: what `strtoul` makes of a text.
fn digits(text: &str) -> (u64, &str) {
    strtoul(text, 10).unwrap_or((0, text))
}

/// `hh:mm[:ss]` up to the end of the text, in seconds; of a date, `hh` alone will do.
fn clock(text: &str, of_date: bool) -> Option<u64> {
    let (hour, rest) = digits(text);
    let (minute, rest) = match rest.strip_prefix(':') {
        Some(rest) => digits(rest),
        None if of_date => (0, rest),
        None => return None,
    };
    let (second, rest) = rest.strip_prefix(':').map_or((0, rest), digits);
    (rest.is_empty() && hour < 24 && minute < 60 && second < 60).then(|| (hour * 60 + minute) * 60 + second)
}

fn parse_time(words: &[&str], _: &Context) -> Result<Value, String> {
    clock(words[0], false)
        .map(Value::Number)
        .ok_or_else(|| format!("`{}` is no time of day like 08:30 or 08:30:15", words[0]))
}

/// `YYYY[-MM[-DD[Thh[:mm[:ss]]]]]`, in seconds since 1970, of which 32 bits count. A month or day of 0 is the one before
/// the first.
fn seconds(text: &str) -> Option<u32> {
    let (year, mut rest) = digits(text);
    let (mut month, mut day, mut of_day) = (1, 1, 0);
    if let Some(after) = rest.strip_prefix('-') {
        (month, rest) = digits(after);
        if let Some(after) = rest.strip_prefix('-') {
            (day, rest) = digits(after);
            if let Some(after) = rest.strip_prefix('T') {
                (of_day, rest) = (clock(after, true)?, "");
            }
        }
    }
    if !rest.is_empty() || !YEARS.contains(&year) || month > 12 || day > 31 {
        return None;
    }
    let month = date(year as i16, 1, 1).checked_add((month as i64 - 1).months()).ok()?;
    let date = month.checked_add((day as i64 - 1).days()).ok()?;
    let days = date.since((jiff::Unit::Day, EPOCH)).ok()?.get_days();
    Some((i64::from(days) * 24 * 3600 + of_day as i64) as u32)
}

fn parse_date(words: &[&str], _: &Context) -> Result<Value, String> {
    seconds(words[0])
        .map(|seconds| Value::Number(seconds.into()))
        .ok_or_else(|| format!("`{}` is no date YYYY[-MM[-DD[Thh[:mm[:ss]]]]] from 1970 to 2038", words[0]))
}

const EPOCH: Date = date(1970, 1, 1);

fn print_date(value: &Value, out: &mut String) {
    let seconds = value.number().unwrap_or(0) as i64;
    let when: DateTime = EPOCH.at(0, 0, 0, 0).saturating_add(seconds.seconds());
    let _ = write!(out, " {}", when.strftime("%Y-%m-%dT%H:%M:%S"));
}

fn parse_month_days(words: &[&str], _: &Context) -> Result<Value, String> {
    let mut days = 0u32;
    for item in items(words[0], 2) {
        // No digits are day 0, which is none.
        match strtoul(item, 0).unwrap_or((0, item)) {
            (day, "") if day <= 31 => days |= 1 << day,
            _ => return Err(format!("`{item}` is no day of a month")),
        }
    }
    Ok(Value::Number(days.into()))
}

fn print_month_days(value: &Value, out: &mut String) {
    let days = value.number().unwrap_or(0);
    let days: Vec<String> = (1..32).filter(|day| days >> day & 1 == 1).map(|day| day.to_string()).collect();
    out.push(' ');
    out.push_str(&days.join(","));
}

/// Days of the week by number, Monday being 1, or by name, of which two letters count. Numbers past Sunday are no day.
fn parse_week_days(words: &[&str], _: &Context) -> Result<Value, String> {
    let mut days = 0u8;
    for item in items(words[0], 3) {
        let number = if item.is_empty() { Some((0, "")) } else { strtoul_negating(item, 0) };
        let named = || WEEK_DAYS.iter().position(|day| item.get(..2) == day.get(..2));
        let day = match number {
            Some((0, "")) => return Err("days of the week are numbered from 1, for Monday, to 7".into()),
            Some((number, "")) => number as u32 % 32,
            _ => 1 + named().ok_or_else(|| format!("`{item}` is none of {}", WEEK_DAYS.join(", ")))? as u32,
        };
        days |= 1u8.checked_shl(day).unwrap_or(0);
    }
    Ok(Value::Number(days.into()))
}

fn print_week_days(value: &Value, out: &mut String) {
    let days = value.number().unwrap_or(0);
    let names = WEEK_DAYS.iter().zip(1..).filter(|(_, bit)| days >> bit & 1 == 1);
    out.push(' ');
    out.push_str(&names.map(|(name, _)| *name).collect::<Vec<_>>().join(","));
}

/// The items between commas, of each of which so many letters count. Nothing follows a last comma.
fn items(text: &str, letters: usize) -> impl Iterator<Item = &str> {
    text.split_terminator(',').map(move |item| item.get(..letters).unwrap_or(item))
}

fn time(options: &mut Options, _: &Context) -> Result<(), String> {
    // All days but some are the others.
    for (name, all) in [("monthdays", MONTH), ("weekdays", WEEK)] {
        if let Some((Value::Number(days), true)) = options.value(name) {
            let others = days ^ all;
            options.remove(name);
            options.default(name, Value::Number(others));
        }
    }
    options.default("datestop", Value::Number(DATE_END));
    let (start, stop) = hours(options);
    if options.has("contiguous") && start < stop {
        return Err("`--contiguous` is for times that stop on the next day".into());
    }
    Ok(())
}

fn hours(options: &Options) -> (u64, u64) {
    (options.number("timestart").unwrap_or(0), options.number("timestop").unwrap_or(DAY_END))
}

fn print(options: &Options, out: &mut String) {
    let (start, stop) = hours(options);
    if (start, stop) != (0, DAY_END) {
        for (name, time) in [("timestart", start), ("timestop", stop)] {
            let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
            let _ = write!(out, " --{name} {hour:02}:{minute:02}:{second:02}");
        }
    }
    for option in &options.extension.options[2..] {
        options.print_option(option.name, out);
    }
}
