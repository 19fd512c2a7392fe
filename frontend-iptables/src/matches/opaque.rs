//! Matches with state, chance or knowledge that a packet does not carry, and `comment`.
//!
//! What the kernel alone evaluates says why in its own entry.

use polc_ir::hook::{Hook, TableKind};
use polc_ir::ruleset::EffectTestKind;

use super::rates::table_name;
use crate::extension::{
    Arg, Context, Extension, Families, Given, Meaning, Opt, Options, Site, Value, base, unsaid,
};
use crate::lower::{Body, network};
use crate::names;
use crate::value::{self, Spelling};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: &[Opt::new("comment", Arg::Text(255)).must()],
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
        options: &[
            Opt::not("set", Arg::Flag),
            Opt::not("rcheck", Arg::Flag),
            Opt::not("update", Arg::Flag),
            Opt::not("remove", Arg::Flag),
            Opt::new("seconds", Arg::Custom { words: 1, parse: parse_seconds, print: print_seconds }),
            Opt::new("reap", Arg::Flag).requires(&["seconds"]),
            Opt::new("hitcount", Arg::Number(0, 65_535)).unsaid(unsaid::zero),
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
            Opt::not("socket-exists", Arg::Flag),
            Opt::not("uid-owner", Arg::Custom { words: 1, parse: parse_user, print: print_word }),
            Opt::not("gid-owner", Arg::Custom { words: 1, parse: parse_group, print: print_word }),
            Opt::new("suppl-groups", Arg::Flag).requires(&["gid-owner"]),
        ],
        hooks: &[Hook::Output, Hook::Postrouting],
        finish: Some(|options, _| {
            let place = |name| options.given.iter().position(|given| Some(given) == options.get(name));
            if options.given.is_empty() {
                return Err("one of `--uid-owner`, `--gid-owner` and `--socket-exists` is needed".into());
            }
            if options.has("suppl-groups") && place("gid-owner") > place("suppl-groups") {
                return Err("`--suppl-groups` needs `--gid-owner` before it".into());
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
            Opt::not("connlimit-upto", Arg::Number(0, u32::MAX as u64)).excludes(&["connlimit-above"]),
            Opt::not("connlimit-above", Arg::Number(0, u32::MAX as u64)),
            Opt::new("connlimit-mask", Arg::Length),
            Opt::new("connlimit-saddr", Arg::Flag).excludes(&["connlimit-daddr"]),
            Opt::new("connlimit-daddr", Arg::Flag),
        ],
        finish: Some(|options, context| {
            // Not above a number is up to it, and the other way round.
            for (name, other) in
                [("connlimit-upto", "connlimit-above"), ("connlimit-above", "connlimit-upto")]
            {
                if let Some((value, true)) = options.value(name) {
                    let value = value.clone();
                    options.remove(name);
                    options.default(other, value);
                    break;
                }
            }
            if options.count(&["connlimit-upto", "connlimit-above"]) == 0 {
                return Err("one of `--connlimit-upto` and `--connlimit-above` is needed".into());
            }
            let bits = u64::from(context.family.address_bits());
            let length = options.number("connlimit-mask").unwrap_or(bits).min(bits);
            options.set("connlimit-mask", Value::Number(length));
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
            Opt::not("physdev-is-in", Arg::Flag),
            Opt::not("physdev-in", Arg::Word(15)),
            Opt::not("physdev-is-out", Arg::Flag),
            Opt::not("physdev-out", Arg::Word(15)),
            Opt::not("physdev-is-bridged", Arg::Flag),
        ],
        finish: Some(|options, _| match options.given.len() {
            0 => Err("some option is needed".into()),
            _ => Ok(()),
        }),
        place: Some(bridge_port),
        ..base(
            "physdev",
            Meaning::Match(|_, body| body.opaque("physdev", "asks for the ports of a bridge")),
            "The ports of a bridge.",
        )
    },
    Extension {
        options: &[Opt::not("helper", Arg::CutText(29)).must()],
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
        tables: &[TableKind::Raw, TableKind::Mangle],
        hooks: &[Hook::Prerouting],
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
        hooks: &[Hook::Prerouting, Hook::Input],
        ..base(
            "socket",
            Meaning::Match(|_, body| body.observable("socket", "looks up the local socket")),
            "Whether a local socket takes the packet.",
        )
    },
    Extension {
        options: &[Opt::not("cgroup", Arg::Number(0, u32::MAX as u64)), Opt::not("path", Arg::Quoted(4095))],
        hooks: &[Hook::Input, Hook::Output, Hook::Postrouting],
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
            Opt::not("connbytes", Arg::Custom { words: 1, parse: parse_amount, print: print_amount }).must(),
            Opt::new(
                "connbytes-mode",
                Arg::Name(&[("packets", 0), ("bytes", 1), ("avgpkt", 2)], Spelling::Exact),
            )
            .must(),
            Opt::new(
                "connbytes-dir",
                Arg::Name(&[("original", 0), ("reply", 1), ("both", 2)], Spelling::Exact),
            )
            .must(),
        ],
        finish: Some(|options, _| {
            // `!` is kept by turning the range round, which a single amount hides.
            if let Some(given) = options.get_mut("connbytes")
                && matches!(given.value, Value::Range(first, last) if first == last)
            {
                given.negated = false;
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
            Opt::not("label", Arg::Custom { words: 1, parse: parse_label, print: print_quoted }).must(),
            Opt::new("set", Arg::Flag),
        ],
        ..base(
            "connlabel",
            Meaning::Match(|_, body| body.observable("connlabel", "reads or writes the connection's labels")),
            "A label of the connection.",
        )
    },
    Extension {
        options: &[Opt::new("nfacct-name", Arg::Word(31)).must()],
        finish: Some(|options, _| match options.value("nfacct-name").and_then(|(name, _)| name.text()) {
            Some("") => Err("the `--nfacct-name` is empty".into()),
            _ => Ok(()),
        }),
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
        options: &[
            Opt::not("header", Arg::Custom { words: 1, parse: parse_headers, print: print_headers }).must(),
            Opt::new("soft", Arg::Flag),
        ],
        ..base("ipv6header", Meaning::Match(ipv6_headers), "Which extension headers a packet has.")
    },
    Extension {
        families: Families::V4,
        hooks: &[Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting],
        options: &[Opt::not("realm", REALM).must()],
        ..base(
            "realm",
            Meaning::Match(|_, body| body.opaque("realm", "asks for the route's realm")),
            "The route's realm.",
        )
    },
    Extension {
        options: &[Opt::not("quota", Arg::Number(0, u64::MAX)).must()],
        ..base(
            "quota",
            Meaning::Match(|_, body| body.observable("quota", "spends a byte quota")),
            "A byte quota.",
        )
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
        options: &[Opt::not("cpu", Arg::Number(0, u32::MAX as u64)).must()],
        ..base(
            "cpu",
            Meaning::Match(|_, body| body.opaque("cpu", "asks which processor handles the packet")),
            "The processor that handles the packet.",
        )
    },
    Extension {
        options: &[Opt::not("src-group", GROUP), Opt::not("dst-group", GROUP)],
        finish: Some(|options, _| match options.given.len() {
            0 => Err("one of `--src-group` and `--dst-group` is needed".into()),
            _ => Ok(()),
        }),
        place: Some(device_group),
        ..base(
            "devgroup",
            Meaning::Match(|_, body| body.opaque("devgroup", "asks for the device's group")),
            "The group of the device that a packet comes from or goes to.",
        )
    },
    Extension {
        options: &[
            Opt::not(
                "cluster-local-nodemask",
                Arg::Custom { words: 1, parse: parse_node, print: print_hex8 },
            ),
            Opt::not("cluster-local-node", Arg::Custom { words: 1, parse: parse_node, print: |_, _| {} })
                .excludes(&["cluster-local-nodemask"]),
            Opt::new("cluster-total-nodes", Arg::Number(1, NODES_MAX)).must(),
            Opt::new("cluster-hash-seed", Arg::Custom { words: 1, parse: parse_seed, print: print_hex8 })
                .must(),
        ],
        finish: Some(cluster),
        ..base(
            "cluster",
            Meaning::Match(|_, body| body.opaque("cluster", "hashes the connection's source")),
            "Whether a node of a cluster is to handle the packet.",
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

/// How many nodes a cluster has at most (include/uapi/linux/netfilter/xt_cluster.h, `XT_CLUSTER_NODES_MAX`).
const NODES_MAX: u64 = 32;

/// A group of devices.
const GROUP: Arg = Arg::Custom {
    words: 1,
    parse: |words, context| parse_named(words, "default", context),
    print: |value, out| print_named(value, "default", out),
};

/// A realm.
const REALM: Arg = Arg::Custom {
    words: 1,
    parse: |words, context| parse_named(words, "cosmos", context),
    print: |value, out| print_named(value, "cosmos", out),
};

/// 0, the one number that has a name on every system (iproute2's group and rt_realms).
const NAMED: value::Masked = value::Masked { value: 0, mask: u32::MAX };

/// A value under a mask, or the name of 0.
fn parse_named(words: &[&str], name: &str, context: &Context) -> Result<Value, String> {
    if words[0] == name { Ok(Value::Masked(NAMED)) } else { Arg::Mark.parse(words, context) }
}

fn print_named(value: &Value, name: &str, out: &mut String) {
    match value {
        Value::Masked(NAMED) => out.extend([" ", name]),
        value => Arg::Mark.print(value, out),
    }
}

/// A group is one of a device that the packet has by then.
fn device_group(options: &Options, site: &Site<'_>) -> Result<(), String> {
    for (name, hooks) in
        [("src-group", [Hook::Output, Hook::Postrouting]), ("dst-group", [Hook::Prerouting, Hook::Input])]
    {
        if let Some(hook) = site.reached_from(&hooks).filter(|_| options.has(name)) {
            return Err(format!("`--{name}` asks for a device that packets in {} lack", hook.chain_name()));
        }
    }
    Ok(())
}

/// A node's number, or a mask of so many nodes; neither is larger than the number of nodes.
fn parse_node(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Number(1, NODES_MAX).parse(words, context)
}

fn parse_seed(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Number(0, u32::MAX.into()).parse(words, context)
}

fn print_hex8(value: &Value, out: &mut String) {
    out.push_str(&format!(" 0x{:08x}", value.number().unwrap_or(0)));
}

/// The node becomes its mask.
fn cluster(options: &mut Options, _: &Context) -> Result<(), String> {
    let total = options.number("cluster-total-nodes").unwrap_or(1);
    if let Some((Value::Number(node), negated)) = options.value("cluster-local-node") {
        let node = *node;
        if node > total {
            return Err("`--cluster-local-node` is above `--cluster-total-nodes`".into());
        }
        options.remove("cluster-local-node");
        options.default("cluster-local-nodemask", Value::Number(1 << (node - 1)));
        if let Some(given) = options.get_mut("cluster-local-nodemask") {
            given.negated = negated;
        }
    }
    match options.number("cluster-local-nodemask") {
        None => Err("one of `--cluster-local-node` and `--cluster-local-nodemask` is needed".into()),
        Some(mask) if mask >> total != 0 => {
            Err("`--cluster-local-nodemask` has nodes above `--cluster-total-nodes`".into())
        }
        Some(_) => Ok(()),
    }
}

/// A packet made here that goes to a bridge has no port yet (net/netfilter/xt_physdev.c, `physdev_mt_check`).
fn bridge_port(options: &Options, site: &Site<'_>) -> Result<(), String> {
    let bridged = matches!(options.value("physdev-is-bridged"), Some((_, false)));
    let out = options.count(&["physdev-out", "physdev-is-out"]) > 0;
    if out && !bridged && site.reached_from(&[Hook::Output]).is_some() {
        return Err("packets in OUTPUT have no port of a bridge to go out by".into());
    }
    Ok(())
}

fn parse_seconds(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Number(1, u32::MAX.into()).parse(words, context)
}

/// Seconds past 2^31 are printed as a negative number.
fn print_seconds(value: &Value, out: &mut String) {
    out.push_str(&format!(" {}", value.number().unwrap_or(0) as u32 as i32));
}

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

/// Headers by name, or by number as protocols.
fn parse_headers(words: &[&str], _: &Context) -> Result<Value, String> {
    let number = |item: &str| {
        let named = IPV6_HEADERS.iter().find(|(name, _)| *name == item).map(|&(_, number)| number);
        named
            .or_else(|| names::protocol(item).map(u64::from))
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

/// Labels are bits 0 to 127; names for them are a matter of the machine's connlabel.conf.
fn parse_label(words: &[&str], _: &Context) -> Result<Value, String> {
    value::number(words[0], 0, u64::MAX)
        .map(|label| label & 0xffff)
        .filter(|label| *label <= 127)
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
        (Value::Range(first, last), true) if first > last => {
            Err(format!("`{}` ends below its start", words[0]))
        }
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
        value::host(words[0], context.family).ok_or_else(|| format!("`{}` is not a mask", words[0]))?;
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
    // Of `--rsource` and `--rdest`, the last one counts.
    let ends = ["rsource", "rdest"];
    let end = |given: &&Given| ends.contains(&options.extension.options[given.option as usize].name);
    if let Some(last) = options.given.iter().rev().find(end).map(|given| given.option)
        && options.count(&ends) == 2
    {
        options.remove(if options.extension.options[last as usize].name == ends[0] {
            ends[1]
        } else {
            ends[0]
        });
    }
    table_name(options.value("name").and_then(|(name, _)| name.text()).unwrap_or("DEFAULT"))?;
    options.default("name", Value::Text("DEFAULT".into()));
    let bits = context.family.address_bits();
    let full = value::Ip(value::mask_of_length(bits, context.family)).to_string();
    options.default("mask", Value::Text(full.as_str().into()));
    if !options.has("rdest") {
        options.default("rsource", Value::None);
    }
    Ok(())
}

fn parse_user(words: &[&str], _: &Context) -> Result<Value, String> {
    parse_id(words[0], names::user)
}

fn parse_group(words: &[&str], _: &Context) -> Result<Value, String> {
    parse_id(words[0], names::group)
}

/// A user or group: a number, a range, or one of the names that every Debian system has.
fn parse_id(text: &str, named: fn(&str) -> Option<u32>) -> Result<Value, String> {
    if let Some(id) = named(text) {
        return Ok(Value::Text(id.to_string().as_str().into()));
    }
    let one = |text: &str| {
        value::number(text, 0, u64::from(u32::MAX) - 1)
            .ok_or_else(|| format!("`{text}` is not a number or a name that every system has"))
    };
    let text = match text.split_once(['-', ':']) {
        Some((first, last)) => {
            let (first, last) = (one(first)?, one(last)?);
            if first > last {
                return Err(format!("`{text}` ends below its start"));
            }
            if first == last { first.to_string() } else { format!("{first}-{last}") }
        }
        None => one(text)?.to_string(),
    };
    Ok(Value::Text(text.as_str().into()))
}
