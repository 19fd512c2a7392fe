//! Targets that end a packet's way or record it: REJECT, LOG, NFLOG, NFQUEUE, TPROXY, ...

use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::ruleset::{Action, RejectWith};
use polc_ir::source::bytes;

use super::kernel;
use crate::extension::{Arg, Context, Extension, Families, Meaning, Names, Opt, Options, Value, base};
use crate::names::LOG_LEVELS;
use crate::value;

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
            Opt::new("log-prefix", Arg::Custom { words: 1, parse: parse_prefix, print: print_quoted }),
            Opt::new("log-level", Arg::Custom { words: 1, parse: parse_level, print: print_number }),
            Opt::new("log-tcp-sequence", Arg::Flag),
            Opt::new("log-tcp-options", Arg::Flag),
            Opt::new("log-ip-options", Arg::Flag),
            Opt::new("log-uid", Arg::Flag),
            Opt::new("log-macdecode", Arg::Flag),
        ],
        finish: Some(|options, _| {
            if let Some((Value::Number(4), _)) = options.value("log-level") {
                options.remove("log-level");
            }
            if options.value("log-prefix").is_some_and(|(value, _)| value.text() == Some("")) {
                options.remove("log-prefix");
            }
            Ok(())
        }),
        ..base(
            "LOG",
            Meaning::Target(|_| record("LOG", "writes to the kernel's log")),
            "Writes the packet to the kernel's log.",
        )
    },
    Extension {
        options: &[
            Opt::new(
                "nflog-prefix",
                Arg::Custom { words: 1, parse: parse_nflog_prefix, print: print_quoted },
            ),
            Opt::new("nflog-group", Arg::Number(0, 65_535)),
            Opt::new("nflog-range", Arg::Number(0, u32::MAX as u64)),
            Opt::new("nflog-size", Arg::Number(0, u32::MAX as u64)),
            Opt::new("nflog-threshold", Arg::Number(0, 65_535)),
        ],
        finish: Some(|options, _| {
            if options.value("nflog-group").is_some_and(|(value, _)| value.number() == Some(0)) {
                options.remove("nflog-group");
            }
            if options.has("nflog-range") && options.has("nflog-size") {
                return Err("`--nflog-range` and `--nflog-size` exclude each other".into());
            }
            Ok(())
        }),
        ..base(
            "NFLOG",
            Meaning::Target(|_| record("NFLOG", "hands a copy of the packet to user space")),
            "Hands a copy of the packet to user space.",
        )
    },
    Extension {
        options: &[
            Opt::new("ulog-nlgroup", Arg::Number(1, 32)),
            Opt::new("ulog-prefix", Arg::Text(31)),
            Opt::new("ulog-cprange", Arg::Number(0, u32::MAX as u64)),
            Opt::new("ulog-qthreshold", Arg::Number(1, 50)),
        ],
        families: Families::V4,
        ..base(
            "ULOG",
            Meaning::Target(|_| record("ULOG", "hands a copy of the packet to user space")),
            "The older NFLOG.",
        )
    },
    Extension {
        options: &[
            Opt::new("queue-num", Arg::Number(0, 65_535)),
            Opt::new("queue-balance", Arg::Range(':', 65_535)),
            Opt::new("queue-bypass", Arg::Flag),
            Opt::new("queue-cpu-fanout", Arg::Flag),
        ],
        finish: Some(|options, _| {
            if !options.has("queue-balance") {
                options.default("queue-num", Value::Number(0));
            }
            Ok(())
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
            Opt::new("on-port", Arg::Number(0, 65_535)),
            Opt::new("on-ip", Arg::Custom { words: 1, parse: parse_address, print: print_word }),
            Opt::new(
                "tproxy-mark",
                Arg::Custom { words: 1, parse: parse_tproxy_mark, print: print_tproxy_mark },
            ),
        ],
        finish: Some(|options, context| {
            if !options.has("on-port") {
                return Err("`--on-port` is needed".into());
            }
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
        tables: &[TableKind::Raw],
        ..base(
            "TRACE",
            Meaning::Target(|_| record("TRACE", "traces the packet through the rules")),
            "Traces the packet through the rules.",
        )
    },
    Extension {
        options: &[Opt::new("type", Arg::Name(&[("accept", 0), ("drop", 1), ("reject", 2)]))],
        finish: Some(
            |options, _| if options.has("type") { Ok(()) } else { Err("`--type` is needed".into()) },
        ),
        ..base(
            "AUDIT",
            Meaning::Target(|_| record("AUDIT", "writes an audit record")),
            "Writes an audit record.",
        )
    },
    Extension {
        options: &[Opt::new("gateway", Arg::Custom { words: 1, parse: parse_address, print: print_word })],
        tables: &[TableKind::Mangle],
        ..base(
            "TEE",
            Meaning::Target(|_| record("TEE", "sends a copy of the packet elsewhere")),
            "Sends a copy of the packet elsewhere.",
        )
    },
    Extension {
        options: &[
            Opt::new("add-set", Arg::SetEnds).again(),
            Opt::new("del-set", Arg::SetEnds).again(),
            Opt::new("map-set", Arg::SetEnds).again(),
            Opt::new("exist", Arg::Flag),
            Opt::new("timeout", Arg::Number(0, u32::MAX as u64)),
            Opt::new("map-mark", Arg::Flag),
            Opt::new("map-prio", Arg::Flag),
            Opt::new("map-queue", Arg::Flag),
        ],
        ..base(
            "SET",
            Meaning::Target(|_| record("SET", "changes a set")),
            "Adds the packet's addresses to a set, or takes them out.",
        )
    },
    Extension {
        options: &[
            Opt::new("timeout", Arg::Number(1, u32::MAX as u64)),
            Opt::new("label", Arg::Word(27)),
            Opt::new("alarm", Arg::Flag),
            Opt::new("send_nl_msg", Arg::Number(0, 1)),
        ],
        finish: Some(|options, _| {
            if options.has("timeout") && options.has("label") {
                Ok(())
            } else {
                Err("`--timeout` and `--label` are needed".into())
            }
        }),
        ..base("IDLETIMER", Meaning::Target(|_| record("IDLETIMER", "restarts a timer")), "Restarts a timer.")
    },
];

fn record(name: &str, reason: &str) -> Action {
    Action::Effect { what: kernel(name, reason), writes: Vec::new() }
}

fn steal(name: &str, reason: &str) -> Action {
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
        .find(|(name, _)| value::abbreviates(words[0], name) && !words[0].is_empty())
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

/// The kernel's log takes 29 bytes of prefix, and no newline.
fn parse_prefix(words: &[&str], _: &Context) -> Result<Value, String> {
    prefix(words[0], 29)
}

fn parse_nflog_prefix(words: &[&str], _: &Context) -> Result<Value, String> {
    if words[0].is_empty() {
        return Err("the prefix is empty".into());
    }
    if words[0].contains('\n') {
        return Err("the prefix holds a newline".into());
    }
    // A longer prefix is cut, with a warning of iptables' own.
    let text = words[0].get(..63).unwrap_or(words[0]);
    Ok(Value::Text(text.into()))
}

fn prefix(text: &str, max: usize) -> Result<Value, String> {
    if bytes::count(text) > max {
        return Err(format!("the prefix is longer than {max} bytes"));
    }
    if text.contains('\n') {
        return Err("the prefix holds a newline".into());
    }
    Ok(Value::Text(text.into()))
}

fn print_quoted(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        crate::extension::save_string(text, out);
    }
}

fn parse_level(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    if let Some(level) = value::number(text, 0, 7) {
        return Ok(Value::Number(level));
    }
    let mut fitting =
        LOG_LEVELS.iter().filter(|(name, _)| value::abbreviates(text, name) && !text.is_empty());
    match (fitting.next(), fitting.next()) {
        (Some(&(_, level)), None) => Ok(Value::Number(level.into())),
        (Some((one, _)), Some((other, _))) => Err(format!("`{text}` is ambiguous: `{one}` or `{other}`")),
        (None, _) => Err(format!("`{text}` is no log level")),
    }
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

fn print_word(value: &Value, out: &mut String) {
    if let Value::Text(text) = value {
        out.push(' ');
        out.push_str(text);
    }
}

fn parse_tproxy_mark(words: &[&str], context: &Context) -> Result<Value, String> {
    Arg::Mark.parse(words, context)
}

fn print_tproxy_mark(value: &Value, out: &mut String) {
    if let Value::Masked(mark) = value {
        out.push_str(&format!(" {:#x}/{:#x}", mark.value, mark.mask));
    }
}
