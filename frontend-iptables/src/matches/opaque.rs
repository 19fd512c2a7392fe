//! Text for people, chance, and headers most of which the kernel alone reads.
//!
//! What the kernel alone evaluates says why in its own entry.

use polc_ir::hook::Hook;
use polc_ir::ruleset::EffectTestKind;

use crate::extension::{
    Arg, Context, Extension, Families, Given, Meaning, Opt, Options, Value, base, unsaid,
};
use crate::lower::{Body, network};
use crate::names;
use crate::value::{self, Spelling};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: &[Opt::new("comment", Arg::CutText(255)).must()],
        ..base("comment", Meaning::Match(|_, _| ()), "Text for people; it holds for every packet.")
    },
    Extension {
        options: &[
            Opt::new("mode", Arg::Name(&[("random", 0), ("nth", 1)], Spelling::Exact)).must(),
            Opt::not(
                "probability",
                Arg::Custom { words: 1, parse: parse_probability, print: print_probability },
            )
            .excludes(&["every", "packet"]),
            Opt::not("every", Arg::Number(1, u32::MAX as u64)).requires(&["packet"]),
            Opt::new("packet", Arg::Number(0, u32::MAX as u64)).requires(&["every"]),
        ],
        finish: Some(|options, _| {
            let nth = options.number("mode") == Some(1);
            let name = if nth { "every" } else { "probability" };
            if !options.has(name) {
                return Err(format!("`--mode {}` needs `--{name}`", if nth { "nth" } else { "random" }));
            }
            if nth && options.number("packet") >= options.number("every") {
                return Err("the `--packet` must be below `--every`".into());
            }
            Ok(())
        }),
        ..base("statistic", Meaning::Match(statistic), "A share of the packets, at random or every nth.")
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("header", Arg::Custom { words: 1, parse: parse_headers, print: print_headers }).must(),
            Opt::new("soft", Arg::Flag),
        ],
        ..base("ipv6header", Meaning::Match(ipv6_headers), "Which extension headers a packet has.")
    },
    Extension {
        protocols: &[TCP],
        options: &[Opt::not("mss", Arg::Range(':', 0xffff)).must()],
        finish: Some(|options, _| match options.value("mss") {
            Some((Value::Range(first, last), _)) if first > last => {
                Err("`--mss` ends below its start".into())
            }
            _ => Ok(()),
        }),
        ..base(
            "tcpmss",
            Meaning::Match(|_, body| body.opaque("tcpmss", "reads TCP's maximum segment size")),
            "TCP's maximum segment size.",
        )
    },
    Extension {
        protocols: &[IPCOMP],
        options: &[
            Opt::not("ipcompspi", Arg::Range(':', u32::MAX as u64)).unsaid(unsaid::every_u32),
            Opt::new("compres", Arg::Flag),
        ],
        finish: Some(|options, _| {
            options.default("ipcompspi", Value::Range(0, 0));
            Ok(())
        }),
        ..base(
            "ipcomp",
            Meaning::Match(|_, body| body.opaque("ipcomp", "reads the header of compressed packets")),
            "A range of IPComp parameter indices.",
        )
    },
    Extension {
        families: Families::V4,
        protocols: &[TCP],
        hooks: &[Hook::Prerouting, Hook::Input, Hook::Forward],
        options: &[
            Opt::not("genre", Arg::CutWord(31)).must(),
            Opt::new("ttl", Arg::Number(0, 2)),
            Opt::new("log", Arg::Number(0, 2)),
        ],
        ..base(
            "osf",
            Meaning::Match(|_, body| body.observable("osf", "guesses the sender's operating system")),
            "The sender's operating system, by its SYN packets.",
        )
    },
    Extension {
        families: Families::V6,
        options: SEGMENTS,
        finish: Some(segments),
        ..base(
            "srh",
            Meaning::Match(|_, body| body.opaque("srh", "reads the segment routing header")),
            "IPv6's segment routing header.",
        )
    },
];

/// Of comparisons with one field, the last number given is that of all.
const SEGMENTS: &[Opt] = &[
    Opt::not("srh-next-hdr", Arg::Number(0, 255)),
    Opt::not("srh-hdr-len-eq", Arg::Number(0, 255)),
    Opt::not("srh-hdr-len-gt", Arg::Number(0, 255)),
    Opt::not("srh-hdr-len-lt", Arg::Number(0, 255)),
    Opt::not("srh-segs-left-eq", Arg::Number(0, 255)),
    Opt::not("srh-segs-left-gt", Arg::Number(0, 255)),
    Opt::not("srh-segs-left-lt", Arg::Number(0, 255)),
    Opt::not("srh-last-entry-eq", Arg::Number(0, 255)),
    Opt::not("srh-last-entry-gt", Arg::Number(0, 255)),
    Opt::not("srh-last-entry-lt", Arg::Number(0, 255)),
    Opt::not("srh-tag", Arg::Number(0, 65_535)),
    Opt::not("srh-psid", SEGMENT),
    Opt::not("srh-nsid", SEGMENT),
    Opt::not("srh-lsid", SEGMENT),
];

/// An address with its length, which is always printed.
const SEGMENT: Arg = Arg::Custom {
    words: 1,
    parse: |words, context| Arg::Host.parse(words, context),
    print: |value, out| Arg::Network.print(value, out),
};

fn segments(options: &mut Options, _: &Context) -> Result<(), String> {
    for field in ["srh-hdr-len", "srh-segs-left", "srh-last-entry"] {
        let of_field = |given: &Given| SEGMENTS[given.option as usize].name.starts_with(field);
        let last = options.given.iter().rev().find(|given| of_field(given)).map(|given| given.value.clone());
        if let Some(last) = last {
            options
                .given
                .iter_mut()
                .filter(|given| of_field(given))
                .for_each(|given| given.value = last.clone());
        }
    }
    Ok(())
}

const TCP: u16 = 6;

const IPCOMP: u16 = 108;

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
    ("protocol", ANY_PROTOCOL),
    ("prot", ANY_PROTOCOL),
];

/// What stands for every protocol that is no extension header.
const ANY_PROTOCOL: u64 = 255;

/// Headers by name, or as protocols: by name, or by number spelled as it is printed.
fn parse_headers(words: &[&str], _: &Context) -> Result<Value, String> {
    let number = |item: &str| {
        let is_name = value::number(item, 0, u64::MAX).is_none();
        let named = IPV6_HEADERS.iter().find(|(name, _)| *name == item).map(|&(_, number)| number);
        named
            .or_else(|| {
                names::protocol(item).filter(|number| is_name || number.to_string() == item).map(u64::from)
            })
            .filter(|number| IPV6_HEADERS.iter().any(|(_, known)| known == number))
            .ok_or_else(|| format!("`{item}` is no extension header"))
    };
    let list: Result<Vec<u64>, _> = words[0].split(',').filter(|item| !item.is_empty()).map(number).collect();
    match list? {
        list if list.is_empty() => Err("no header is named".into()),
        list => Ok(Value::List(list)),
    }
}

fn print_headers(value: &Value, out: &mut String) {
    Arg::Names(IPV6_HEADERS, Spelling::Exact).print(value, out);
}

/// A probability in units of 2^-31 (include/uapi/linux/netfilter/xt_statistic.h).
fn parse_probability(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    match value::strtod(text) {
        // What is no number is no more out of bounds than it is within, and becomes 0.
        Some(share) if share.is_nan() => Ok(Value::Number(0)),
        Some(share) if (0.0..=1.0).contains(&share) => {
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
