//! Matches with state, chance or knowledge that a packet does not carry, and `comment` and `u32`.
//!
//! What the kernel alone evaluates says why in its own entry.

use polc_ir::derived::{DerivedData, U32Op, U32Program, U32Test};
use polc_ir::field::Field;
use polc_ir::hook::Hook;
use polc_ir::interval::IntervalSet;
use polc_ir::ruleset::EffectTestKind;

use super::transport::required;
use crate::extension::{Arg, Context, Extension, Families, Meaning, Opt, Options, Value, base};
use crate::lower::{Body, network};
use crate::value;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: &[Opt::new("comment", Arg::Text(255))],
        finish: Some(|options, _| required(options, "comment")),
        ..base("comment", Meaning::Match(|_, _| ()), "Text for people; it holds for every packet.")
    },
    Extension {
        options: &[
            Opt::new("limit", Arg::Custom { words: 1, parse: parse_rate, print: print_rate }),
            Opt::new("limit-burst", Arg::Number(0, 10_000)),
        ],
        finish: Some(|options, _| {
            options.default("limit", Value::Number(LIMIT_SCALE * 3600 / 3));
            if let Some((Value::Number(LIMIT_BURST), _)) = options.value("limit-burst") {
                options.remove("limit-burst");
            }
            Ok(())
        }),
        ..base("limit", Meaning::Match(limit), "At most so many packets in a time, by a token bucket.")
    },
    Extension {
        options: &[
            Opt::new("mode", Arg::Name(&[("random", 0), ("nth", 1)])),
            Opt::not(
                "probability",
                Arg::Custom { words: 1, parse: parse_probability, print: print_probability },
            ),
            Opt::not("every", Arg::Number(1, u32::MAX as u64)),
            Opt::new("packet", Arg::Number(0, u32::MAX as u64)),
        ],
        finish: Some(|options, _| {
            required(options, "mode")?;
            let nth = matches!(options.value("mode"), Some((Value::Number(1), _)));
            if nth {
                if options.has("probability") {
                    return Err("`--probability` needs `--mode random`".into());
                }
                required(options, "every")?;
                required(options, "packet")?;
                let number = |name| options.value(name).and_then(|(value, _)| value.number()).unwrap_or(0);
                if number("packet") >= number("every") {
                    return Err("the `--packet` must be below `--every`".into());
                }
                Ok(())
            } else if options.count(&["every", "packet"]) > 0 {
                Err("`--every` and `--packet` need `--mode nth`".into())
            } else {
                required(options, "probability")
            }
        }),
        ..base("statistic", Meaning::Match(statistic), "A share of the packets, at random or every nth.")
    },
    Extension {
        options: &[Opt::not("u32", Arg::Custom { words: 1, parse: parse_u32, print: print_u32 })],
        finish: Some(|options, _| required(options, "u32")),
        ..base("u32", Meaning::Match(u32_match), "Words of the packet, masked, shifted and compared.")
    },
    Extension {
        options: &[
            Opt::not("set", Arg::Flag),
            Opt::not("rcheck", Arg::Flag),
            Opt::not("update", Arg::Flag),
            Opt::not("remove", Arg::Flag),
            Opt::new("seconds", Arg::Number(1, u32::MAX as u64)),
            Opt::new("reap", Arg::Flag),
            Opt::new("hitcount", Arg::Number(1, 65_535)),
            Opt::new("rttl", Arg::Flag),
            Opt::new("name", Arg::Word(199)),
            Opt::new("mask", Arg::Custom { words: 1, parse: parse_mask, print: print_word }),
            Opt::new("rsource", Arg::Flag),
            Opt::new("rdest", Arg::Flag),
        ],
        finish: Some(recent),
        ..base(
            "recent",
            Meaning::Match(|_, body| body.observable("recent", "keeps a list of addresses")),
            "Addresses seen lately.",
        )
    },
    Extension {
        options: &[
            Opt::new(
                "hashlimit-upto",
                Arg::Custom { words: 1, parse: parse_hash_rate, print: print_hash_rate },
            )
            .or(&["hashlimit"]),
            Opt::new(
                "hashlimit-above",
                Arg::Custom { words: 1, parse: parse_hash_rate, print: print_hash_rate },
            ),
            Opt::new("hashlimit-burst", Arg::Number(1, 1_000_000)),
            Opt::new(
                "hashlimit-mode",
                Arg::Names(&[("srcip", 2), ("srcport", 8), ("dstip", 1), ("dstport", 4)]),
            ),
            Opt::new("hashlimit-name", Arg::Word(254)),
            Opt::new("hashlimit-htable-size", Arg::Number(0, u32::MAX as u64)),
            Opt::new("hashlimit-htable-max", Arg::Number(0, u32::MAX as u64)),
            Opt::new("hashlimit-htable-gcinterval", Arg::Number(0, u32::MAX as u64)),
            Opt::new("hashlimit-htable-expire", Arg::Number(0, u32::MAX as u64)),
            Opt::new("hashlimit-srcmask", Arg::Number(0, 128)),
            Opt::new("hashlimit-dstmask", Arg::Number(0, 128)),
        ],
        finish: Some(|options, _| {
            if options.count(&["hashlimit-upto", "hashlimit-above"]) != 1 {
                return Err("one of `--hashlimit-upto` and `--hashlimit-above` is needed".into());
            }
            required(options, "hashlimit-name")?;
            options.default("hashlimit-burst", Value::Number(LIMIT_BURST));
            Ok(())
        }),
        ..base(
            "hashlimit",
            Meaning::Match(|_, body| body.observable("hashlimit", "keeps a rate for each group of packets")),
            "A token bucket for each group of packets.",
        )
    },
    Extension {
        options: &[
            Opt::not("uid-owner", Arg::Custom { words: 1, parse: parse_id, print: print_word }),
            Opt::not("gid-owner", Arg::Custom { words: 1, parse: parse_id, print: print_word }),
            Opt::not("socket-exists", Arg::Flag),
            Opt::new("suppl-groups", Arg::Flag),
        ],
        hooks: &[Hook::Output, Hook::Postrouting],
        finish: Some(|options, _| {
            if let Some(groups) = options.get("suppl-groups") {
                let Some(owner) = options.get("gid-owner") else {
                    return Err("`--suppl-groups` needs `--gid-owner`".into());
                };
                // A range is refused only if it comes after (extensions/libxt_owner.c in iptables).
                let range = owner.value.text().is_some_and(|group| group.contains('-'));
                let after =
                    owner.span.zip(groups.span).is_some_and(|(owner, groups)| owner.start > groups.start);
                if range && after {
                    return Err("`--suppl-groups` needs a single `--gid-owner`".into());
                }
            }
            Ok(())
        }),
        ..base(
            "owner",
            Meaning::Match(|_, body| body.opaque("owner", "asks who owns the local socket")),
            "The user or group of the local socket.",
        )
    },
    Extension {
        options: &[
            Opt::not("string", Arg::Quoted(128)),
            Opt::not("hex-string", Arg::Quoted(512)),
            Opt::new("algo", Arg::Word(16)),
            Opt::new("from", Arg::Number(0, 65_535)),
            Opt::new("to", Arg::Number(0, 65_535)),
            Opt::new("icase", Arg::Flag),
        ],
        finish: Some(|options, _| {
            required(options, "algo")?;
            if options.count(&["string", "hex-string"]) != 1 {
                return Err("one of `--string` and `--hex-string` is needed".into());
            }
            for (name, default) in [("from", 0), ("to", 65_535)] {
                if options.value(name).is_some_and(|(value, _)| value.number() == Some(default)) {
                    options.remove(name);
                }
            }
            Ok(())
        }),
        ..base(
            "string",
            Meaning::Match(|_, body| {
                body.opaque("string", "searches the payload, which no hook here can do in bounded time");
            }),
            "Text in the payload.",
        )
    },
    Extension {
        options: &[
            Opt::new("timestart", Arg::Word(8)),
            Opt::new("timestop", Arg::Word(8)),
            Opt::not("monthdays", Arg::Word(128)),
            Opt::not("weekdays", Arg::Word(64)),
            Opt::new("datestart", Arg::Word(32)),
            Opt::new("datestop", Arg::Word(32)),
            Opt::new("kerneltz", Arg::Flag),
            Opt::new("contiguous", Arg::Flag),
            Opt::new("utc", Arg::Flag),
            Opt::new("localtz", Arg::Flag),
        ],
        ..base(
            "time",
            Meaning::Match(|_, body| body.opaque("time", "asks for the time of day")),
            "The time of day.",
        )
    },
    Extension {
        options: &[
            Opt::new("dir", Arg::Name(&[("in", 1), ("out", 2)])),
            Opt::new("pol", Arg::Name(&[("none", 0), ("ipsec", 1)])),
            Opt::new("strict", Arg::Flag),
            Opt::not("reqid", Arg::Number(0, u32::MAX as u64)).again(),
            Opt::not("spi", Arg::Hex(u32::MAX as u64)).again(),
            Opt::not("proto", Arg::Word(16)).again(),
            Opt::not("mode", Arg::Name(&[("transport", 1), ("tunnel", 2)])).again(),
            Opt::not("tunnel-src", Arg::Address).again(),
            Opt::not("tunnel-dst", Arg::Address).again(),
            Opt::new("next", Arg::Flag).again(),
        ],
        ..base(
            "policy",
            Meaning::Match(|_, body| body.opaque("policy", "asks for the packet's IPsec policy")),
            "The packet's IPsec policy.",
        )
    },
    Extension {
        options: &[
            Opt::not("connlimit-upto", Arg::Number(0, u32::MAX as u64)),
            Opt::not("connlimit-above", Arg::Number(0, u32::MAX as u64)),
            Opt::new("connlimit-mask", Arg::Number(0, 128)),
            Opt::new("connlimit-saddr", Arg::Flag),
            Opt::new("connlimit-daddr", Arg::Flag),
        ],
        finish: Some(|options, context| {
            options.default("connlimit-mask", Value::Number(context.family.address_bits().into()));
            if !options.has("connlimit-daddr") {
                options.default("connlimit-saddr", Value::None);
            }
            Ok(())
        }),
        ..base(
            "connlimit",
            Meaning::Match(|_, body| body.observable("connlimit", "counts connections")),
            "How many connections an address has.",
        )
    },
    Extension {
        options: &[
            Opt::not("physdev-in", Arg::Word(15)),
            Opt::not("physdev-is-in", Arg::Flag),
            Opt::not("physdev-out", Arg::Word(15)),
            Opt::not("physdev-is-out", Arg::Flag),
            Opt::not("physdev-is-bridged", Arg::Flag),
        ],
        ..base(
            "physdev",
            Meaning::Match(|_, body| body.opaque("physdev", "asks for the ports of a bridge")),
            "The ports of a bridge.",
        )
    },
    Extension {
        options: &[Opt::not("helper", Arg::Text(30))],
        ..base(
            "helper",
            Meaning::Match(|_, body| body.opaque("helper", "asks for the connection's helper")),
            "The helper of the packet's connection.",
        )
    },
    Extension {
        options: &[
            Opt::new("loose", Arg::Flag),
            Opt::new("validmark", Arg::Flag),
            Opt::new("accept-local", Arg::Flag),
            Opt::new("invert", Arg::Flag),
        ],
        ..base(
            "rpfilter",
            Meaning::Match(|_, body| body.opaque("rpfilter", "looks up the route back to the sender")),
            "Whether the route back to the sender uses the same device.",
        )
    },
    Extension {
        options: &[
            Opt::new("transparent", Arg::Flag),
            Opt::new("nowildcard", Arg::Flag),
            Opt::new("restore-skmark", Arg::Flag),
        ],
        ..base(
            "socket",
            Meaning::Match(|_, body| body.observable("socket", "looks up the local socket")),
            "Whether a local socket takes the packet.",
        )
    },
    Extension {
        options: &[Opt::not("cgroup", Arg::Number(0, u32::MAX as u64)), Opt::not("path", Arg::Quoted(4095))],
        finish: Some(|options, _| match options.given.len() {
            1 => Ok(()),
            0 => Err("one of `--cgroup` and `--path` is needed".into()),
            _ => Err("`--cgroup` and `--path` exclude each other".into()),
        }),
        ..base(
            "cgroup",
            Meaning::Match(|_, body| body.opaque("cgroup", "asks for the cgroup of a local socket")),
            "The cgroup of the local socket.",
        )
    },
    Extension {
        options: &[
            Opt::not("connbytes", Arg::Custom { words: 1, parse: parse_amount, print: print_amount }),
            Opt::new("connbytes-mode", Arg::Name(&[("packets", 0), ("bytes", 1), ("avgpkt", 2)])),
            Opt::new("connbytes-dir", Arg::Name(&[("original", 0), ("reply", 1), ("both", 2)])),
        ],
        finish: Some(|options, _| {
            for name in ["connbytes", "connbytes-mode", "connbytes-dir"] {
                required(options, name)?;
            }
            Ok(())
        }),
        ..base(
            "connbytes",
            Meaning::Match(|_, body| body.opaque("connbytes", "reads the connection's counters")),
            "How much a connection has carried.",
        )
    },
    Extension {
        options: &[
            Opt::not("label", Arg::Custom { words: 1, parse: parse_label, print: print_quoted }),
            Opt::new("set", Arg::Flag),
        ],
        finish: Some(|options, _| required(options, "label")),
        ..base(
            "connlabel",
            Meaning::Match(|_, body| body.observable("connlabel", "reads or writes the connection's labels")),
            "A label of the connection.",
        )
    },
    Extension {
        options: &[Opt::new("nfacct-name", Arg::Word(31))],
        finish: Some(|options, _| required(options, "nfacct-name")),
        ..base(
            "nfacct",
            Meaning::Match(|_, body| body.observable("nfacct", "counts in a named kernel object")),
            "Counts in a named kernel object; it holds for every packet.",
        )
    },
    Extension {
        families: Families::V6,
        hooks: &[Hook::Prerouting, Hook::Input, Hook::Forward],
        ..base(
            "eui64",
            Meaning::Match(|_, body| {
                body.opaque("eui64", "compares the address with the sender's Ethernet address")
            }),
            "Whether the source address holds the sender's Ethernet address.",
        )
    },
    Extension {
        families: Families::V6,
        options: &[Opt::not("header", Arg::Names(IPV6_HEADERS)), Opt::new("soft", Arg::Flag)],
        finish: Some(|options, _| required(options, "header")),
        ..base("ipv6header", Meaning::Match(ipv6_headers), "Which extension headers a packet has.")
    },
    Extension {
        options: &[Opt::not("realm", Arg::Mark)],
        ..base(
            "realm",
            Meaning::Match(|_, body| body.opaque("realm", "asks for the route's realm")),
            "The route's realm.",
        )
    },
    Extension {
        options: &[Opt::not("quota", Arg::Number(0, u64::MAX))],
        ..base(
            "quota",
            Meaning::Match(|_, body| body.observable("quota", "spends a byte quota")),
            "A byte quota.",
        )
    },
];

fn ipv6_headers(options: &Options, body: &mut Body<'_>) {
    let Some((Value::List(headers), negated)) = options.value("header") else { return };
    let mask = headers.iter().fold(0, |mask, header| mask | ipv6_header_bit(*header));
    network::ipv6_headers(mask, options.has("soft"), negated, body);
}

/// `MASK_*` of include/uapi/linux/netfilter_ipv6/ip6t_ipv6header.h.
fn ipv6_header_bit(header: u64) -> u8 {
    match header {
        0 => 128,
        60 => 64,
        43 => 32,
        44 => 16,
        51 => 8,
        50 => 4,
        59 => 2,
        _ => 1,
    }
}

const IPV6_HEADERS: &[(&str, u64)] = &[
    ("hop-by-hop", 0),
    ("hop", 0),
    ("ipv6-opts", 60),
    ("dst", 60),
    ("ipv6-route", 43),
    ("route", 43),
    ("ipv6-frag", 44),
    ("frag", 44),
    ("ah", 51),
    ("auth", 51),
    ("esp", 50),
    ("ipv6-nonxt", 59),
    ("none", 59),
    ("prot", 255),
];

/// `XT_LIMIT_SCALE`: rates are times for one packet, in units of 0.1 ms (include/uapi/linux/netfilter/xt_limit.h).
const LIMIT_SCALE: u64 = 10_000;

/// The burst of `limit` and `hashlimit` if none is given.
const LIMIT_BURST: u64 = 5;

/// The scale of hashlimit's rates (include/uapi/linux/netfilter/xt_hashlimit.h, `XT_HASHLIMIT_SCALE_v2`).
const HASHLIMIT_SCALE: u64 = 1_000_000;

const UNITS: [(&str, &str, u64); 4] =
    [("second", "sec", 1), ("minute", "min", 60), ("hour", "hour", 3600), ("day", "day", 86_400)];

fn rate(text: &str, scale: u64) -> Result<Value, String> {
    let bad = || format!("`{text}` is not a rate like 3/hour");
    let (count, unit) = text.split_once('/').unwrap_or((text, "second"));
    let (_, _, seconds) =
        UNITS.iter().find(|(name, ..)| !unit.is_empty() && value::abbreviates(unit, name)).ok_or_else(bad)?;
    let digits = count.find(|c: char| !c.is_ascii_digit()).unwrap_or(count.len());
    let count: u64 = count[..digits].parse().ok().filter(|&count| count > 0).ok_or_else(bad)?;
    match scale * seconds / count {
        0 => Err(format!("the rate `{text}` is too fast")),
        period => Ok(Value::Number(period)),
    }
}

/// Prints a period as the rate iptables-save shows: in the largest unit that loses nothing worth keeping.
fn print_period(period: u64, scale: u64, out: &mut String) {
    let mut at = 1;
    while at < UNITS.len() {
        let unit = UNITS[UNITS.len() - 1 - at].2 * scale;
        if period > unit || unit / period < unit % period {
            break;
        }
        at += 1;
    }
    let (_, name, seconds) = UNITS[UNITS.len() - at];
    out.push_str(&format!(" {}/{name}", seconds * scale / period));
}

fn parse_rate(words: &[&str], _: &Context) -> Result<Value, String> {
    rate(words[0], LIMIT_SCALE)
}

fn print_rate(value: &Value, out: &mut String) {
    print_period(value.number().unwrap_or(1), LIMIT_SCALE, out);
}

fn parse_hash_rate(words: &[&str], _: &Context) -> Result<Value, String> {
    // What iptables tells a rate in bytes by (extensions/libxt_hashlimit.c, `parse_bytes`).
    if words[0].contains("b/s") {
        return Err(format!("`{}` is a rate in bytes; only rates in packets are read", words[0]));
    }
    rate(words[0], HASHLIMIT_SCALE)
}

fn print_hash_rate(value: &Value, out: &mut String) {
    print_period(value.number().unwrap_or(1), HASHLIMIT_SCALE, out);
}

fn limit(options: &Options, body: &mut Body<'_>) {
    let number = |name| options.value(name).and_then(|(value, _)| value.number());
    let average = number("limit").unwrap_or(LIMIT_SCALE) as u32;
    let burst = number("limit-burst").unwrap_or(LIMIT_BURST) as u32;
    body.effect(EffectTestKind::Limit { average, burst }, false);
}

/// A probability in units of 2^-31 (include/uapi/linux/netfilter/xt_statistic.h).
fn parse_probability(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => {
            Ok(Value::Number((share * f64::from(1u32 << 31)).round_ties_even() as u64))
        }
        _ => Err(format!("`{text}` is not a number from 0 to 1")),
    }
}

fn print_probability(value: &Value, out: &mut String) {
    let share = value.number().unwrap_or(0) as f64 / f64::from(1u32 << 31);
    out.push_str(&format!(" {share:.11}"));
}

fn statistic(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Number(probability), negated)) = options.value("probability") {
        body.effect(EffectTestKind::Random { probability: *probability as u32 }, negated);
    }
    if let Some((Value::Number(every), negated)) = options.value("every") {
        let every = *every as u32 - 1;
        let packet = options.value("packet").and_then(|(value, _)| value.number()).unwrap_or(0) as u32;
        // The counter starts so that `packet` more packets pass first (extensions/libxt_statistic.c in iptables
        // stores `every - packet - 1`).
        body.effect(EffectTestKind::Nth { every, initial: every - packet }, negated);
    }
}

/// Labels are bits 0 to 127; names for them are a matter of the machine's connlabel.conf.
fn parse_label(words: &[&str], _: &Context) -> Result<Value, String> {
    value::number(words[0], 0, 127)
        .map(|label| Value::Text(label.to_string().as_str().into()))
        .ok_or_else(|| format!("`{}` is not a label from 0 to 127; names depend on the machine", words[0]))
}

fn print_quoted(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        out.push_str(&format!(" \"{text}\""));
    }
}

/// An amount or a range of them. No end, and an end that is the largest number, are the same.
fn parse_amount(words: &[&str], context: &Context) -> Result<Value, String> {
    let value = Arg::Range(':', u64::MAX).parse(words, context)?;
    match (value, words[0].contains(':')) {
        (Value::Range(first, _), false) => Ok(Value::Range(first, u64::MAX)),
        (value, _) => Ok(value),
    }
}

fn print_amount(value: &Value, out: &mut String) {
    match value {
        Value::Range(first, u64::MAX) => out.push_str(&format!(" {first}")),
        Value::Range(first, last) => out.push_str(&format!(" {first}:{last}")),
        _ => {}
    }
}

fn parse_mask(words: &[&str], context: &Context) -> Result<Value, String> {
    let mask =
        value::address(words[0], context.family).ok_or_else(|| format!("`{}` is not a mask", words[0]))?;
    Ok(Value::Text(value::Ip(mask).to_string().as_str().into()))
}

fn print_word(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        out.push(' ');
        out.push_str(text);
    }
}

fn recent(options: &mut Options, context: &Context) -> Result<(), String> {
    if options.count(&["set", "rcheck", "update", "remove"]) != 1 {
        return Err("one of `--set`, `--rcheck`, `--update` and `--remove` is needed".into());
    }
    if options.count(&["seconds", "hitcount", "rttl"]) > 0 && options.count(&["set", "remove"]) > 0 {
        return Err("`--seconds`, `--hitcount` and `--rttl` need `--rcheck` or `--update`".into());
    }
    if options.has("reap") && !options.has("seconds") {
        return Err("`--reap` needs `--seconds`".into());
    }
    if options.has("rsource") && options.has("rdest") {
        return Err("`--rsource` and `--rdest` exclude each other".into());
    }
    options.default("name", Value::Text("DEFAULT".into()));
    let bits = context.family.address_bits();
    let full = value::Ip(value::mask_of_length(bits, context.family)).to_string();
    options.default("mask", Value::Text(full.as_str().into()));
    if !options.has("rdest") {
        options.default("rsource", Value::None);
    }
    Ok(())
}

/// A user or group: a number, a range, or `root`, the one name every system has.
fn parse_id(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    if text == "root" {
        return Ok(Value::Text("0".into()));
    }
    let one = |text: &str| {
        value::number(text, 0, u64::from(u32::MAX) - 1)
            .ok_or_else(|| format!("`{text}` is not a number; names depend on the machine"))
    };
    let text = match text.split_once('-') {
        Some((first, last)) => {
            let (first, last) = (one(first)?, one(last)?);
            if first == last { first.to_string() } else { format!("{first}-{last}") }
        }
        None => one(text)?.to_string(),
    };
    Ok(Value::Text(text.as_str().into()))
}

/// Reads a `u32` program; `None` if it isn't one (extensions/libxt_u32.c in iptables).
fn u32_program(text: &str) -> Option<U32Program> {
    /// Limits of include/uapi/linux/netfilter/xt_u32.h.
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
            ops.push(op(number(&mut rest)?));
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
        if !rest.is_empty() || ops.len() > MAX || ranges.len() > MAX {
            return None;
        }
        tests.push(U32Test { start, ops, ranges });
    }
    (tests.len() <= MAX + 1).then_some(U32Program { tests })
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
