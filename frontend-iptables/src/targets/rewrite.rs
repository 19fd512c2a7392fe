//! Targets that change the packet, its mark or its connection: MARK, CONNMARK, DSCP, TOS, TTL, HL, TCPMSS, CT, ...

use polc_ir::field::Field;
use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::ruleset::{Action, Write};

use super::kernel;
use crate::extension::{
    Arg, Context, Extension, Families, Given, Meaning, Names, Opt, Options, Site, Value, base, print_word,
};
use crate::names::dscp;
use crate::value::{self, Masked, Spelling};

const MANGLE: &[TableKind] = &[TableKind::Mangle];
const RAW: &[TableKind] = &[TableKind::Raw];

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: MARK_OPTIONS,
        finish: Some(mark_options),
        print: Some(|options, out| print_xmark(options, "set-xmark", out)),
        ..base("MARK", Meaning::Target(mark), "Sets the packet's mark.")
    },
    Extension {
        options: &[
            Opt::new("set-xmark", Arg::Mark),
            Opt::new("set-mark", Arg::Mark),
            Opt::new("and-mark", Arg::Hex(u32::MAX as u64)),
            Opt::new("or-mark", Arg::Hex(u32::MAX as u64)),
            Opt::new("xor-mark", Arg::Hex(u32::MAX as u64)),
            Opt::new("save-mark", Arg::Flag),
            Opt::new("restore-mark", Arg::Flag),
            Opt::new("nfmask", Arg::Hex(u32::MAX as u64)),
            Opt::new("ctmask", Arg::Hex(u32::MAX as u64)),
            Opt::new("mask", Arg::Hex(u32::MAX as u64)),
        ],
        finish: Some(connmark_options),
        print: Some(|options, out| {
            for name in ["save-mark", "restore-mark"] {
                if options.has(name) {
                    out.push_str(&format!(" --{name}"));
                    options.print_option("nfmask", out);
                    options.print_option("ctmask", out);
                }
            }
            print_xmark(options, "set-xmark", out);
        }),
        ..base(
            "CONNMARK",
            Meaning::Target(connmark),
            "Sets the connection's mark, or copies it from or to the packet's.",
        )
    },
    Extension {
        tables: MANGLE,
        options: &[
            Opt::new("set-dscp", Arg::Hex(63)),
            Opt::new("set-dscp-class", Arg::Custom { words: 1, parse: parse_class, print: |_, _| {} }),
        ],
        finish: Some(|options, _| match options.given.len() {
            1 => Ok(()),
            0 => Err("one of `--set-dscp` and `--set-dscp-class` is needed".into()),
            _ => Err("`--set-dscp` and `--set-dscp-class` exclude each other".into()),
        }),
        print: Some(|options, out| out.push_str(&format!(" --set-dscp 0x{:02x}", class(options)))),
        ..base(
            "DSCP",
            Meaning::Target(|options| {
                Action::Write(Write { field: Field::Tos, clear: 0xfc, xor: u128::from(class(options)) << 2 })
            }),
            "Sets the differentiated services code point.",
        )
    },
    Extension {
        tables: MANGLE,
        options: &[
            Opt::new("set-tos", Arg::Custom { words: 1, parse: crate::matches::parse_tos, print: print_tos }),
            Opt::new("and-tos", Arg::Hex(255)),
            Opt::new("or-tos", Arg::Hex(255)),
            Opt::new("xor-tos", Arg::Hex(255)),
        ],
        finish: Some(tos_options),
        print: Some(|options, out| {
            if let Some((value, _)) = options.value("set-tos") {
                out.push_str(" --set-tos");
                print_tos(value, out);
            }
        }),
        ..base("TOS", Meaning::Target(tos), "Sets the type of service.")
    },
    Extension {
        families: Families::V4,
        tables: MANGLE,
        options: &[
            Opt::new("ttl-set", Arg::Number(0, 255)),
            Opt::new("ttl-dec", Arg::Number(1, 255)),
            Opt::new("ttl-inc", Arg::Number(1, 255)),
        ],
        finish: Some(one),
        ..base("TTL", Meaning::Target(|options| hops("TTL", options, "ttl-set")), "Changes the time to live.")
    },
    Extension {
        families: Families::V6,
        tables: MANGLE,
        options: &[
            Opt::new("hl-set", Arg::Number(0, 255)),
            Opt::new("hl-dec", Arg::Number(1, 255)),
            Opt::new("hl-inc", Arg::Number(1, 255)),
        ],
        finish: Some(one),
        ..base("HL", Meaning::Target(|options| hops("HL", options, "hl-set")), "Changes the hop limit.")
    },
    Extension {
        protocols: &[6],
        options: &[Opt::new("set-mss", Arg::Number(0, 65_535)), Opt::new("clamp-mss-to-pmtu", Arg::Flag)],
        finish: Some(segment_size),
        place: Some(answers_syn),
        ..base(
            "TCPMSS",
            Meaning::Target(|_| {
                change("TCPMSS", "changes TCP's options", &[Field::Length, Field::TcpDataOffset])
            }),
            "Changes TCP's maximum segment size.",
        )
    },
    Extension {
        tables: MANGLE,
        protocols: &[6],
        options: &[Opt::new(
            "strip-options",
            Arg::Custom { words: 1, parse: parse_strip, print: print_word },
        )],
        ..base(
            "TCPOPTSTRIP",
            Meaning::Target(|_| change("TCPOPTSTRIP", "removes TCP's options", &[])),
            "Removes TCP options.",
        )
    },
    Extension {
        families: Families::V4,
        tables: MANGLE,
        options: &[
            Opt::new("ecn-tcp-remove", Arg::Flag).excludes(&["ecn-tcp-cwr", "ecn-tcp-ece"]),
            Opt::new("ecn-tcp-ece", Arg::Number(0, 1)),
            Opt::new("ecn-tcp-cwr", Arg::Number(0, 1)),
            Opt::new("ecn-ip-ect", Arg::Number(0, 3)),
        ],
        finish: Some(congestion),
        ..base(
            "ECN",
            Meaning::Target(|_| change("ECN", "changes TCP's flags", &[Field::TcpFlags])),
            "Clears TCP's ECN flags.",
        )
    },
    Extension {
        tables: MANGLE,
        options: &[Opt::new("checksum-fill", Arg::Flag)],
        finish: Some(one),
        ..base(
            "CHECKSUM",
            Meaning::Target(|_| change("CHECKSUM", "fills in checksums", &[])),
            "Fills in checksums that offloading left out.",
        )
    },
    Extension {
        options: &[Opt::new(
            "set-class",
            Arg::Custom { words: 1, parse: parse_tc_class, print: print_tc_class },
        )
        .must()],
        hooks: &[Hook::Forward, Hook::Output, Hook::Postrouting],
        ..base(
            "CLASSIFY",
            Meaning::Target(|_| change("CLASSIFY", "sets the packet's traffic class", &[])),
            "Sets the packet's traffic class.",
        )
    },
    Extension {
        tables: RAW,
        options: &[
            Opt::new("notrack", Arg::Flag),
            Opt::new("helper", Arg::CutWord(15)).unsaid(no_name),
            Opt::new("timeout", Arg::CutWord(31)).unsaid(no_name),
            Opt::new("ctevents", Arg::Names(EVENTS, Spelling::Exact)),
            Opt::new("expevents", Arg::Names(&[("new", 0)], Spelling::Exact)),
            Opt::new("zone-orig", ZONE).unsaid(no_zone),
            Opt::new("zone-reply", ZONE).unsaid(no_zone),
            Opt::new("zone", ZONE).unsaid(no_zone),
        ],
        finish: Some(connection),
        ..base(
            "CT",
            Meaning::Target(|_| change("CT", "sets up the packet's connection tracking", &[Field::CtState])),
            "Sets up the packet's connection tracking.",
        )
    },
    Extension {
        tables: RAW,
        ..base(
            "NOTRACK",
            Meaning::Target(|_| change("NOTRACK", "switches connection tracking off", &[Field::CtState])),
            "Switches connection tracking off; the same as `CT --notrack`.",
        )
    },
    Extension {
        families: Families::V6,
        tables: MANGLE,
        hooks: &[Hook::Input, Hook::Postrouting],
        options: &[Opt::new("src-pfx", Arg::Prefix).must(), Opt::new("dst-pfx", Arg::Prefix).must()],
        finish: Some(prefixes),
        ..base(
            "SNPT",
            Meaning::Target(|_| change("SNPT", "translates prefixes", &[Field::SrcAddr])),
            "Translates the source's prefix, without state.",
        )
    },
    Extension {
        families: Families::V6,
        tables: MANGLE,
        hooks: &[Hook::Prerouting, Hook::Output],
        options: &[Opt::new("src-pfx", Arg::Prefix).must(), Opt::new("dst-pfx", Arg::Prefix).must()],
        finish: Some(prefixes),
        ..base(
            "DNPT",
            Meaning::Target(|_| change("DNPT", "translates prefixes", &[Field::DstAddr])),
            "Translates the destination's prefix, without state.",
        )
    },
    Extension {
        tables: &[TableKind::Mangle, TableKind::Security],
        options: &[Opt::new("selctx", Arg::CutWord(255)).must()],
        ..base(
            "SECMARK",
            Meaning::Target(|_| change("SECMARK", "sets a security mark", &[])),
            "Sets a security mark.",
        )
    },
    Extension {
        tables: &[TableKind::Mangle, TableKind::Security],
        options: &[Opt::new("save", Arg::Flag), Opt::new("restore", Arg::Flag)],
        finish: Some(one),
        ..base(
            "CONNSECMARK",
            Meaning::Target(|_| change("CONNSECMARK", "copies a security mark", &[])),
            "Copies the security mark from or to the connection.",
        )
    },
];

/// A connection's events, in the order in which they are printed.
const EVENTS: Names = &[
    ("new", 0),
    ("related", 1),
    ("destroy", 2),
    ("reply", 3),
    ("assured", 4),
    ("protoinfo", 5),
    ("helper", 6),
    ("mark", 7),
    ("natseqinfo", 8),
    ("secmark", 9),
];

/// A helper is one of a protocol. A zone of one direction is kept as such, and one of both is one of the connection:
/// there is one number, the last that was given.
fn connection(options: &mut Options, context: &Context) -> Result<(), String> {
    let helper = options.value("helper").is_some_and(|(name, _)| name.text() != Some(""));
    if helper && !options.has("notrack") && !matches!(context.protocol, Some((1.., false))) {
        return Err("`--helper` needs a `-p` without `!`".into());
    }
    const ZONES: [&str; 3] = ["zone", "zone-orig", "zone-reply"];
    let name = |given: &Given| options.extension.options[given.option as usize].name;
    let Some(last) = options.given.iter().rev().find(|given| ZONES.contains(&name(given))) else {
        return Ok(());
    };
    let value = last.value.clone();
    let name = match (options.has("zone-orig"), options.has("zone-reply")) {
        (true, false) => "zone-orig",
        (false, true) => "zone-reply",
        _ => "zone",
    };
    ZONES.into_iter().for_each(|name| options.remove(name));
    options.default(name, value);
    Ok(())
}

/// The largest segment leaves room for a header of IP in a packet of 65535 bytes. Of the two ways, the last one counts.
fn segment_size(options: &mut Options, context: &Context) -> Result<(), String> {
    if options.given.is_empty() {
        return Err("one of `--set-mss` and `--clamp-mss-to-pmtu` is needed".into());
    }
    let header = if context.family == Family::V4 { 20 } else { 40 };
    if options.number("set-mss").is_some_and(|size| size > 65_535 - header) {
        return Err(format!("`--set-mss` is at most {}", 65_535 - header));
    }
    let last = options.given.len() - 1;
    options.given.drain(..last);
    Ok(())
}

/// The size is announced in the first packet of each side, and the path is known on the way out
/// (net/netfilter/xt_TCPMSS.c, `tcpmss_tg4_check`).
fn answers_syn(options: &Options, site: &Site<'_>) -> Result<(), String> {
    if options.has("clamp-mss-to-pmtu")
        && let Some(hook) = site.reached_from(&[Hook::Prerouting, Hook::Input])
    {
        return Err(format!("`--clamp-mss-to-pmtu` can't know the path of packets in {}", hook.chain_name()));
    }
    // Through nft the kernel can't look at the rule's matches.
    let syn = site.nft || site.rule.matches.iter().any(|one| {
        one.options.extension.name == "tcp"
            && (matches!(one.options.value("syn"), Some((_, false)))
                || matches!(one.options.value("tcp-flags"), Some((Value::Range(_, set), false)) if set & 2 != 0))
    });
    if syn { Ok(()) } else { Err("`TCPMSS` needs a match like `-p tcp --syn` in its rule".into()) }
}

/// ECN's bits of TCP need TCP, those of IP are their own matter.
fn congestion(options: &mut Options, context: &Context) -> Result<(), String> {
    if options.given.is_empty() {
        return Err("an option is needed".into());
    }
    if options.count(&["ecn-tcp-remove", "ecn-tcp-ece", "ecn-tcp-cwr"]) > 0 && !context.is_protocol(&[6]) {
        return Err("TCP's flags need `-p tcp`".into());
    }
    // To remove TCP's part is to clear both flags, whatever was asked before, and is printed so if nothing else is asked.
    let remove = options.get("ecn-tcp-remove").map(|given| given.option);
    if let Some(at) = options.given.iter().position(|given| Some(given.option) == remove) {
        options.given.drain(..=at);
        options.default("ecn-tcp-ece", Value::Number(0));
        options.default("ecn-tcp-cwr", Value::Number(0));
    }
    let cleared = ["ecn-tcp-ece", "ecn-tcp-cwr"].iter().all(|name| options.number(name) == Some(0));
    if cleared && !options.has("ecn-ip-ect") {
        options.given.clear();
        options.default("ecn-tcp-remove", Value::None);
    }
    Ok(())
}

const MARK_OPTIONS: &[Opt] = &[
    Opt::new("set-xmark", Arg::Mark),
    Opt::new("set-mark", Arg::Mark),
    Opt::new("and-mark", Arg::Hex(u32::MAX as u64)),
    Opt::new("or-mark", Arg::Hex(u32::MAX as u64)),
    Opt::new("xor-mark", Arg::Hex(u32::MAX as u64)),
];

pub(super) fn change(name: &str, reason: &str, writes: &[Field]) -> Action {
    Action::Effect { what: kernel(name, reason), writes: writes.to_vec(), sets: Vec::new() }
}

fn one(options: &mut Options, _: &Context) -> Result<(), String> {
    match options.given.len() {
        1 => Ok(()),
        0 => Err("an option is needed".into()),
        _ => Err("only one option may be given".into()),
    }
}

/// Turns every form of setting a mark into `--set-xmark value/mask` (extensions/libxt_MARK.c in iptables).
fn normalise_mark(options: &mut Options) -> Result<(), String> {
    let forms = ["set-xmark", "set-mark", "and-mark", "or-mark", "xor-mark"];
    if options.count(&forms) > 1 {
        return Err("the mark may be set in one way only".into());
    }
    let number = |name| options.value(name).and_then(|(value, _)| value.number()).map(|value| value as u32);
    let mark = if let Some((Value::Masked(mark), _)) = options.value("set-mark") {
        Some(Masked { value: mark.value, mask: mark.value | mark.mask })
    } else if let Some(value) = number("and-mark") {
        Some(Masked { value: 0, mask: !value })
    } else if let Some(value) = number("or-mark") {
        Some(Masked { value, mask: value })
    } else {
        number("xor-mark").map(|value| Masked { value, mask: 0 })
    };
    if let Some(mark) = mark {
        for name in &forms[1..] {
            options.remove(name);
        }
        options.default("set-xmark", Value::Masked(mark));
    }
    Ok(())
}

fn mark_options(options: &mut Options, _: &Context) -> Result<(), String> {
    normalise_mark(options)?;
    if options.has("set-xmark") { Ok(()) } else { Err("an option is needed".into()) }
}

fn print_xmark(options: &Options, name: &str, out: &mut String) {
    if let Some((Value::Masked(mark), _)) = options.value(name) {
        out.push_str(&format!(" --{name} {:#x}/{:#x}", mark.value, mark.mask));
    }
}

fn mark(options: &Options) -> Action {
    match options.value("set-xmark") {
        Some((Value::Masked(mark), _)) => {
            Action::Write(Write { field: Field::Mark, clear: mark.mask.into(), xor: mark.value.into() })
        }
        _ => Action::Continue,
    }
}

fn connmark_options(options: &mut Options, _: &Context) -> Result<(), String> {
    // A mask after a mark takes the place of the mark's own; one before it counts for nothing.
    let name = |given: &Given| options.extension.options[given.option as usize].name;
    let sets_mark = |given: &Given| MARK_OPTIONS.iter().any(|form| form.name == name(given));
    let after = options.given.iter().skip_while(|given| !sets_mark(given));
    let mask = after.filter(|given| matches!(name(given), "mask" | "ctmask")).last();
    let mask = mask.and_then(|given| given.value.number());
    normalise_mark(options)?;
    match options.count(&["set-xmark", "save-mark", "restore-mark"]) {
        1 => {}
        0 => return Err("an option is needed".into()),
        _ => return Err("only one of setting, saving and restoring the mark can be asked".into()),
    }
    let both = options.number("mask");
    if both.is_some() && options.count(&["nfmask", "ctmask"]) > 0 {
        return Err("`--mask` excludes `--nfmask` and `--ctmask`".into());
    }
    if let Some((Value::Masked(mark), _)) = options.value("set-xmark") {
        let mark = *mark;
        if let Some(mask) = mask {
            options.set("set-xmark", Value::Masked(Masked { mask: mask as u32, ..mark }));
        }
        ["mask", "nfmask", "ctmask"].into_iter().for_each(|name| options.remove(name));
        return Ok(());
    }
    options.remove("mask");
    for name in ["nfmask", "ctmask"] {
        options.default(name, Value::Number(both.unwrap_or(u32::MAX.into())));
    }
    Ok(())
}

fn connmark(options: &Options) -> Action {
    let writes = if options.has("restore-mark") { Field::Mark } else { Field::CtMark };
    change("CONNMARK", "keeps a mark with the connection", &[writes])
}

fn parse_class(words: &[&str], _: &Context) -> Result<Value, String> {
    dscp::class(words[0])
        .map(|class| Value::Number(class.into()))
        .ok_or_else(|| format!("`{}` is no DSCP class", words[0]))
}

fn class(options: &Options) -> u64 {
    ["set-dscp", "set-dscp-class"]
        .iter()
        .find_map(|name| options.value(name).and_then(|(value, _)| value.number()))
        .unwrap_or(0)
}

fn print_tos(value: &Value, out: &mut String) {
    if let Value::Masked(Masked { value, mask }) = value {
        out.push_str(&format!(" 0x{value:02x}/0x{mask:02x}"));
    }
}

fn tos_options(options: &mut Options, _: &Context) -> Result<(), String> {
    if options.given.len() != 1 {
        return Err("exactly one option is needed".into());
    }
    let number = |name| options.value(name).and_then(|(value, _)| value.number()).map(|value| value as u32);
    let tos = if let Some((Value::Masked(tos), _)) = options.value("set-tos") {
        *tos
    } else if let Some(value) = number("and-tos") {
        Masked { value: 0, mask: !value & 0xff }
    } else if let Some(value) = number("or-tos") {
        Masked { value, mask: value }
    } else {
        Masked { value: number("xor-tos").unwrap_or(0), mask: 0 }
    };
    options.given.clear();
    options.default("set-tos", Value::Masked(tos));
    Ok(())
}

fn tos(options: &Options) -> Action {
    match options.value("set-tos") {
        Some((Value::Masked(tos), _)) => {
            Action::Write(Write { field: Field::Tos, clear: tos.mask.into(), xor: tos.value.into() })
        }
        _ => Action::Continue,
    }
}

fn hops(name: &str, options: &Options, set: &str) -> Action {
    match options.value(set) {
        Some((Value::Number(value), _)) => {
            Action::Write(Write { field: Field::Ttl, clear: 0xff, xor: u128::from(*value) })
        }
        _ => change(name, "counts hops up or down", &[Field::Ttl]),
    }
}

/// TCP options by name (extensions/libxt_TCPOPTSTRIP.c in iptables).
const TCP_OPTIONS: &[(&str, u64)] =
    &[("wscale", 3), ("mss", 2), ("sack-permitted", 4), ("sack", 5), ("timestamp", 8), ("md5", 19)];

fn parse_strip(words: &[&str], _: &Context) -> Result<Value, String> {
    let mut kinds: Vec<u64> = words[0]
        .split(',')
        .map(|item| {
            TCP_OPTIONS
                .iter()
                .find(|(name, _)| *name == item)
                .map(|&(_, kind)| kind)
                .or_else(|| value::number(item, 2, 255))
                .ok_or_else(|| format!("`{item}` is no TCP option"))
        })
        .collect::<Result<_, _>>()?;
    kinds.sort_unstable();
    if let Some(twice) = kinds.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("option {} is given twice", twice[0]));
    }
    let text: Vec<String> = kinds.iter().map(ToString::to_string).collect();
    Ok(Value::Text(text.join(",").as_str().into()))
}

fn parse_tc_class(words: &[&str], _: &Context) -> Result<Value, String> {
    let bad = || format!("`{}` is not MAJOR:MINOR in hexadecimal", words[0]);
    // `sscanf` with `%x:%x`: what follows is not looked at, and of each number the last 16 bits count.
    let (major, rest) = value::strtoul(words[0], 16).ok_or_else(bad)?;
    let (minor, _) = rest.strip_prefix(':').and_then(|rest| value::strtoul(rest, 16)).ok_or_else(bad)?;
    Ok(Value::Number((major & 0xffff) << 16 | minor & 0xffff))
}

fn print_tc_class(value: &Value, out: &mut String) {
    if let Some(class) = value.number() {
        out.push_str(&format!(" {:04x}:{:04x}", class >> 16, class & 0xffff));
    }
}

const ZONE: Arg = Arg::Custom { words: 1, parse: parse_zone, print: print_word };

fn no_name(name: &Value, _: bool) -> bool {
    name.text() == Some("")
}

fn no_zone(zone: &Value, _: bool) -> bool {
    zone.text() == Some("0")
}

fn parse_zone(words: &[&str], _: &Context) -> Result<Value, String> {
    if words[0] == "mark" {
        return Ok(Value::Text("mark".into()));
    }
    value::number(words[0], 0, 65_535)
        .map(|zone| Value::Text(zone.to_string().as_str().into()))
        .ok_or_else(|| format!("`{}` is not a zone", words[0]))
}

/// Prefixes of at most 64 bits (net/ipv6/netfilter/ip6t_NPT.c, `ip6t_npt_checkentry`).
fn prefixes(options: &mut Options, _: &Context) -> Result<(), String> {
    for name in ["src-pfx", "dst-pfx"] {
        if let Some((Value::Host(prefix), _)) = options.value(name)
            && prefix.length > 64
        {
            return Err(format!("`--{name}` is longer than 64 bits"));
        }
    }
    Ok(())
}
