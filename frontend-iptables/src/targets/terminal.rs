//! Targets that end a packet's way or record it: REJECT, LOG, NFLOG, NFQUEUE, TPROXY, ...

use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::ruleset::{Action, RejectWith};

use super::kernel;
use crate::extension::{
    Arg, Context, Extension, Families, Meaning, Names, Opt, Options, Site, Value, base, print_word, unsaid,
};
use crate::names::LOG_LEVELS;
use crate::value::{self, Spelling};

const FILTER_HOOKS: &[Hook] = &[Hook::Input, Hook::Forward, Hook::Output];

/// The targets of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        families: Families::V4,
        tables: &[TableKind::Filter],
        hooks: FILTER_HOOKS,
        options: &[Opt::new(
            "reject-with",
            Arg::Custom { words: 1, parse: parse_reject, print: print_reject4 },
        )],
        finish: Some(|options, context| {
            options.default("reject-with", Value::Number(3 << 8 | 3));
            reset_needs_tcp(options, context)
        }),
        ..base(
            "REJECT",
            Meaning::Target(reject),
            "Drops the packet and answers with an ICMP error or a TCP reset.",
        )
    },
    Extension {
        families: Families::V6,
        tables: &[TableKind::Filter],
        hooks: FILTER_HOOKS,
        options: &[Opt::new(
            "reject-with",
            Arg::Custom { words: 1, parse: parse_reject, print: print_reject6 },
        )],
        finish: Some(|options, context| {
            options.default("reject-with", Value::Number(1 << 8 | 4));
            reset_needs_tcp(options, context)
        }),
        ..base(
            "REJECT",
            Meaning::Target(reject),
            "Drops the packet and answers with an ICMPv6 error or a TCP reset.",
        )
    },
    Extension {
        options: &[
            Opt::new("log-prefix", Arg::CutText(29)).one_line(),
            Opt::new("log-level", Arg::Custom { words: 1, parse: parse_level, print: print_number })
                .unsaid(unsaid::number::<4>),
            Opt::new("log-tcp-sequence", Arg::Flag),
            Opt::new("log-tcp-options", Arg::Flag),
            Opt::new("log-ip-options", Arg::Flag),
            Opt::new("log-uid", Arg::Flag),
            Opt::new("log-macdecode", Arg::Flag),
        ],
        finish: Some(|options, _| prefix(options, "log-prefix")),
        ..base(
            "LOG",
            Meaning::Target(|_| record("LOG", "writes to the kernel's log")),
            "Writes the packet to the kernel's log.",
        )
    },
    Extension {
        options: &[
            Opt::new("nflog-prefix", Arg::CutText(63)).one_line(),
            Opt::new("nflog-group", Arg::Number(0, 65_535)).unsaid(unsaid::zero),
            Opt::new("nflog-range", Arg::Number(0, u32::MAX as u64))
                .excludes(&["nflog-size"])
                .unsaid(unsaid::zero),
            Opt::new("nflog-size", Arg::Number(0, u32::MAX as u64)),
            Opt::new("nflog-threshold", Arg::Number(0, 65_535)).unsaid(unsaid::zero),
        ],
        finish: Some(|options, _| prefix(options, "nflog-prefix")),
        ..base(
            "NFLOG",
            Meaning::Target(|_| record("NFLOG", "hands a copy of the packet to user space")),
            "Hands a copy of the packet to user space.",
        )
    },
    Extension {
        options: &[
            Opt::new("ulog-nlgroup", Arg::Number(1, 32)),
            Opt::new("ulog-prefix", Arg::CutText(31)),
            Opt::new("ulog-cprange", Arg::Number(0, u32::MAX as u64)),
            Opt::new("ulog-qthreshold", Arg::Number(1, 50)),
        ],
        families: Families::V4,
        finish: Some(|_, _| Err("the kernel has had no `ULOG` since Linux 3.17; use `NFLOG`".into())),
        ..base(
            "ULOG",
            Meaning::Target(|_| record("ULOG", "hands a copy of the packet to user space")),
            "The older NFLOG.",
        )
    },
    Extension {
        options: &[
            Opt::new("queue-num", Arg::Number(0, 65_535)).excludes(&["queue-balance"]),
            Opt::new("queue-balance", Arg::Range(':', 65_535)),
            Opt::new("queue-bypass", Arg::Flag),
            Opt::new("queue-cpu-fanout", Arg::Flag).requires(&["queue-balance"]),
        ],
        finish: Some(|options, _| match options.value("queue-balance") {
            None => {
                options.default("queue-num", Value::Number(0));
                Ok(())
            }
            // The kernel counts them in 16 bits.
            Some((Value::Range(0, 65_535), _)) => Err("65536 queues are one too many".into()),
            Some((Value::Range(first, last), _)) if first < last => Ok(()),
            Some(_) => Err("`--queue-balance` needs a range of queues, `first:last`".into()),
        }),
        ..base(
            "NFQUEUE",
            Meaning::Target(|_| steal("NFQUEUE", "hands the packet to a program in user space")),
            "Lets a program in user space decide.",
        )
    },
    Extension {
        tables: &[TableKind::Mangle],
        hooks: &[Hook::Prerouting],
        protocols: &[6, 17],
        options: &[
            Opt::new("on-port", Arg::Service).must(),
            Opt::new("on-ip", Arg::Custom { words: 1, parse: parse_address, print: print_word }),
            Opt::new(
                "tproxy-mark",
                Arg::Custom { words: 1, parse: parse_tproxy_mark, print: print_tproxy_mark },
            ),
        ],
        finish: Some(|options, context| {
            options.default(
                "on-ip",
                Value::Text(if context.family == Family::V4 { "0.0.0.0" } else { "::" }.into()),
            );
            options.default("tproxy-mark", Value::Masked(value::Masked { value: 0, mask: 0 }));
            Ok(())
        }),
        ..base(
            "TPROXY",
            Meaning::Target(|_| steal("TPROXY", "hands the packet to a local socket")),
            "Hands the packet to a local socket.",
        )
    },
    Extension {
        protocols: &[6],
        hooks: &[Hook::Input, Hook::Forward],
        options: &[
            Opt::new("sack-perm", Arg::Flag),
            Opt::new("timestamp", Arg::Flag),
            Opt::new("wscale", Arg::Custom { words: 1, parse: parse_low::<0xff>, print: print_number }),
            Opt::new("mss", Arg::Custom { words: 1, parse: parse_low::<0xffff>, print: print_number }),
            Opt::new("ecn", Arg::Flag),
        ],
        ..base(
            "SYNPROXY",
            Meaning::Target(|_| {
                steal("SYNPROXY", "answers in the server's place until a connection is made")
            }),
            "Lets connections through once they are made.",
        )
    },
    Extension {
        tables: &[TableKind::Raw],
        ..base(
            "TRACE",
            Meaning::Target(|_| record("TRACE", "traces the packet through the rules")),
            "Traces the packet through the rules.",
        )
    },
    Extension {
        options: &[Opt::new(
            "type",
            Arg::Name(&[("accept", 0), ("drop", 1), ("reject", 2)], Spelling::AnyCase),
        )
        .must()],
        ..base(
            "AUDIT",
            Meaning::Target(|_| record("AUDIT", "writes an audit record")),
            "Writes an audit record.",
        )
    },
    Extension {
        options: &[
            Opt::new("gateway", Arg::Custom { words: 1, parse: parse_address, print: print_word }).must(),
            Opt::new("oif", Arg::CutWord(value::INTERFACE_BYTES_MAX))
                .unsaid(|device, _| device.text() == Some("")),
        ],
        finish: Some(|options, _| match options.value("gateway").and_then(|(value, _)| value.text()) {
            Some("0.0.0.0" | "::") => Err("`--gateway` needs the address of a host".into()),
            _ => Ok(()),
        }),
        ..base(
            "TEE",
            Meaning::Target(|_| record("TEE", "sends a copy of the packet elsewhere")),
            "Sends a copy of the packet elsewhere.",
        )
    },
    Extension {
        options: &[
            Opt::not("add-set", Arg::SetEnds),
            Opt::not("del-set", Arg::SetEnds),
            Opt::not("map-set", Arg::SetEnds),
            Opt::new("exist", Arg::Flag).requires(&["add-set"]),
            Opt::new("timeout", Arg::Number(0, u32::MAX as u64 - 1)).requires(&["add-set"]),
            Opt::new("map-mark", Arg::Flag).requires(&["map-set"]),
            Opt::new("map-prio", Arg::Flag).requires(&["map-set"]),
            Opt::new("map-queue", Arg::Flag).requires(&["map-set"]),
        ],
        finish: Some(|options, _| {
            // iptables reads a `!` here and takes no notice of it.
            options.given.iter_mut().for_each(|given| given.negated = false);
            if options.count(&["add-set", "del-set", "map-set"]) == 0 {
                return Err("one of `--add-set`, `--del-set` and `--map-set` is needed".into());
            }
            if options.has("map-set") && options.count(&["map-mark", "map-prio", "map-queue"]) == 0 {
                return Err("`--map-set` needs one of `--map-mark`, `--map-prio` and `--map-queue`".into());
            }
            Ok(())
        }),
        place: Some(mapped_set),
        ..base(
            "SET",
            Meaning::Target(|options| {
                let given = ["add-set", "del-set"].into_iter().filter_map(|option| options.value(option));
                let sets = given.filter_map(|(value, _)| Some(value.text()?.split_once(' ')?.0.into()));
                let sets = sets.collect();
                Action::Effect { what: kernel("SET", "changes a set"), writes: Vec::new(), sets }
            }),
            "Adds the packet's addresses to a set, or takes them out.",
        )
    },
    Extension {
        options: &[
            Opt::new("timeout", Arg::Number(1, IDLE_SECONDS_MAX)).must(),
            Opt::new("label", Arg::CutWord(27)).must(),
            Opt::new("alarm", Arg::Flag),
        ],
        finish: Some(|options, _| match options.value("label").and_then(|(value, _)| value.text()) {
            Some(label) if label.is_empty() || label.contains('/') => {
                Err(format!("`{label}` can't be a label: it names a file under /sys"))
            }
            _ => Ok(()),
        }),
        ..base("IDLETIMER", Meaning::Target(|_| record("IDLETIMER", "restarts a timer")), "Restarts a timer.")
    },
];

/// The longest time of an idle timer (net/netfilter/xt_IDLETIMER.c, `idletimer_tg_helper`).
const IDLE_SECONDS_MAX: u64 = i32::MAX as u64 / 1000 - 1;

/// A prefix has at least one byte and no newline. A longer one is cut.
fn prefix(options: &mut Options, name: &str) -> Result<(), String> {
    match options.value(name).and_then(|(value, _)| value.text()) {
        Some("") => Err(format!("the `--{name}` is empty")),
        Some(text) if text.contains('\n') => Err(format!("the `--{name}` holds a newline")),
        _ => Ok(()),
    }
}

/// What a set maps packets to is for mangle, and priorities and queues are for packets on their way out
/// (net/netfilter/xt_set.c, `set_target_v3_checkentry`).
fn mapped_set(options: &Options, site: &Site<'_>) -> Result<(), String> {
    if !options.has("map-set") {
        return Ok(());
    }
    if site.table != TableKind::Mangle {
        return Err("`--map-set` works only in table `mangle`".into());
    }
    match site.reached_from(&[Hook::Prerouting, Hook::Input]) {
        Some(hook) if options.count(&["map-prio", "map-queue"]) > 0 => {
            Err(format!("`--map-prio` and `--map-queue` mean nothing to packets in {}", hook.chain_name()))
        }
        _ => Ok(()),
    }
}

pub(super) fn record(name: &str, reason: &str) -> Action {
    Action::Effect { what: kernel(name, reason), writes: Vec::new(), sets: Vec::new() }
}

pub(super) fn steal(name: &str, reason: &str) -> Action {
    Action::Steal(kernel(name, reason))
}

/// The answer as `type << 8 | code`, or this for a TCP reset.
const TCP_RESET: u64 = 1 << 16;

/// Names of answers, the printed one first for each (extensions/libipt_REJECT.c and libip6t_REJECT.c in iptables).
const REJECT4: Names = &[
    ("icmp-net-unreachable", 3 << 8),
    ("net-unreach", 3 << 8),
    ("icmp-host-unreachable", 3 << 8 | 1),
    ("host-unreach", 3 << 8 | 1),
    ("icmp-proto-unreachable", 3 << 8 | 2),
    ("proto-unreach", 3 << 8 | 2),
    ("icmp-port-unreachable", 3 << 8 | 3),
    ("port-unreach", 3 << 8 | 3),
    ("icmp-net-prohibited", 3 << 8 | 9),
    ("net-prohib", 3 << 8 | 9),
    ("icmp-host-prohibited", 3 << 8 | 10),
    ("host-prohib", 3 << 8 | 10),
    ("tcp-reset", TCP_RESET),
    ("tcp-rst", TCP_RESET),
    ("icmp-admin-prohibited", 3 << 8 | 13),
    ("admin-prohib", 3 << 8 | 13),
];

const REJECT6: Names = &[
    ("icmp6-no-route", 1 << 8),
    ("no-route", 1 << 8),
    ("icmp6-adm-prohibited", 1 << 8 | 1),
    ("adm-prohibited", 1 << 8 | 1),
    ("icmp6-addr-unreachable", 1 << 8 | 3),
    ("addr-unreach", 1 << 8 | 3),
    ("icmp6-port-unreachable", 1 << 8 | 4),
    ("port-unreach", 1 << 8 | 4),
    ("tcp-reset", TCP_RESET),
    ("icmp6-policy-fail", 1 << 8 | 5),
    ("policy-fail", 1 << 8 | 5),
    ("icmp6-reject-route", 1 << 8 | 6),
    ("reject-route", 1 << 8 | 6),
];

fn parse_reject(words: &[&str], context: &Context) -> Result<Value, String> {
    let names = if context.family == Family::V4 { REJECT4 } else { REJECT6 };
    names
        .iter()
        .find(|(name, _)| value::abbreviates(words[0], name))
        .map(|&(_, answer)| Value::Number(answer))
        .ok_or_else(|| format!("`{}` is no known answer", words[0]))
}

fn print_reject4(value: &Value, out: &mut String) {
    print_reject(value, REJECT4, out);
}

fn print_reject6(value: &Value, out: &mut String) {
    print_reject(value, REJECT6, out);
}

fn print_reject(value: &Value, names: Names, out: &mut String) {
    if let Some((name, _)) = names.iter().find(|(_, answer)| Some(*answer) == value.number()) {
        out.push(' ');
        out.push_str(name);
    }
}

fn reset_needs_tcp(options: &mut Options, context: &Context) -> Result<(), String> {
    match options.value("reject-with") {
        Some((Value::Number(TCP_RESET), _)) if !context.is_protocol(&[6]) => {
            Err("`tcp-reset` needs `-p tcp`".into())
        }
        _ => Ok(()),
    }
}

fn reject(options: &Options) -> Action {
    let answer = options.value("reject-with").and_then(|(value, _)| value.number()).unwrap_or(TCP_RESET);
    Action::Reject(if answer == TCP_RESET {
        RejectWith::TcpReset
    } else {
        RejectWith::Icmp { kind: (answer >> 8) as u8, code: answer as u8 }
    })
}

fn parse_level(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    if let Some(level) = value::number(text, 0, 7) {
        return Ok(Value::Number(level));
    }
    LOG_LEVELS
        .iter()
        .find(|(name, _)| *name == text)
        .map(|&(_, level)| Value::Number(level.into()))
        .ok_or_else(|| format!("`{text}` is no log level"))
}

/// A number of which the lower bits count.
fn parse_low<const BITS: u64>(words: &[&str], context: &Context) -> Result<Value, String> {
    let value = Arg::Number(0, u32::MAX.into()).parse(words, context)?;
    Ok(Value::Number(value.number().unwrap_or(0) & BITS))
}

fn print_number(value: &Value, out: &mut String) {
    if let Some(number) = value.number() {
        out.push_str(&format!(" {number}"));
    }
}

fn parse_address(words: &[&str], context: &Context) -> Result<Value, String> {
    let address =
        value::host(words[0], context.family).ok_or_else(|| format!("`{}` is not an address", words[0]))?;
    Ok(Value::Text(value::Ip(address).to_string().as_str().into()))
}

fn parse_tproxy_mark(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Mark.parse(words, context)
}

fn print_tproxy_mark(value: &Value, out: &mut String) {
    if let Value::Masked(mark) = value {
        out.push_str(&format!(" {:#x}/{:#x}", mark.value, mark.mask));
    }
}
