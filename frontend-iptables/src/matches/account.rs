//! Matches that keep accounts of addresses, connections and rules, or read them.
//!
//! What the kernel alone evaluates says why in its own entry.

use super::rates::table_name;
use crate::extension::{
    Arg, Context, Extension, Given, Meaning, Opt, Options, Value, base, print_word, unsaid,
};
use crate::value::{self, Spelling};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
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
            Opt::new("name", Arg::CutWord(199)),
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
        options: &[Opt::not("helper", Arg::CutText(29)).must()],
        ..base(
            "helper",
            Meaning::Match(|_, body| body.opaque("helper", "asks for the connection's helper")),
            "The helper of the packet's connection.",
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
        options: &[Opt::new("nfacct-name", Arg::CutWord(31)).one_line().must()],
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
        options: &[Opt::not("quota", Arg::Number(0, u64::MAX)).must()],
        ..base(
            "quota",
            Meaning::Match(|_, body| body.observable("quota", "spends a byte quota")),
            "A byte quota.",
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
];

/// How many nodes a cluster has at most (include/uapi/linux/netfilter/xt_cluster.h, `XT_CLUSTER_NODES_MAX`).
const NODES_MAX: u64 = 32;

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

fn parse_seconds(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Number(1, u32::MAX.into()).parse(words, context)
}

/// Seconds past 2^31 are printed as a negative number.
fn print_seconds(value: &Value, out: &mut String) {
    out.push_str(&format!(" {}", value.number().unwrap_or(0) as u32 as i32));
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
