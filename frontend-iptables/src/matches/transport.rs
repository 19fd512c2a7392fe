//! Matches on transport headers: tcp, udp, icmp, icmp6, multiport, sctp, dccp, esp, ah, ecn.

use std::collections::BTreeMap;

use polc_ir::derived::{SctpFlags, SctpRule};
use polc_ir::hook::Family;

use crate::extension::{Arg, Extension, Families, Meaning, Opt, Options, Value, base, unsaid};
use crate::lower::Body;
use crate::lower::network;
use crate::lower::transport::{self as meaning, Asked, MultiportEnd, Tcp};
use crate::value::{PortRange, Spelling};

const TCP: u16 = 6;
const UDP: u16 = 17;
const UDPLITE: u16 = 136;
const SCTP: u16 = 132;
const DCCP: u16 = 33;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        protocols: &[TCP],
        options: &[
            Opt::not("sport", Arg::Ports(Some("tcp"))).or(&["source-port"]).unsaid(unsaid::every_port),
            Opt::not("dport", Arg::Ports(Some("tcp"))).or(&["destination-port"]).unsaid(unsaid::every_port),
            Opt::not("tcp-option", Arg::Number(1, 255)),
            Opt::not("tcp-flags", Arg::TcpFlags)
                .excludes(&["syn"])
                .unsaid(|flags, negated| !negated && matches!(flags, Value::Range(0, _))),
            Opt::not("syn", Arg::Flag),
        ],
        finish: Some(|options, _| ports_in_order(options)),
        print: Some(|options, out| {
            for name in ["sport", "dport", "tcp-option", "tcp-flags"] {
                options.print_option(name, out);
            }
            if let Some((_, negated)) = options.value("syn") {
                out.push_str(if negated { " ! --tcp-flags" } else { " --tcp-flags" });
                Arg::TcpFlags.print(&Value::Range(SYN.0.into(), SYN.1.into()), out);
            }
        }),
        ..base("tcp", Meaning::Match(tcp), "TCP ports, flags and options.")
    },
    Extension {
        protocols: &[UDP],
        options: &[
            Opt::not("sport", Arg::Ports(None)).or(&["source-port"]).unsaid(unsaid::every_port),
            Opt::not("dport", Arg::Ports(None)).or(&["destination-port"]).unsaid(unsaid::every_port),
        ],
        ..base("udp", Meaning::Match(udp), "UDP ports.")
    },
    Extension {
        families: Families::V4,
        protocols: &[1],
        options: &[Opt::not("icmp-type", Arg::Icmp(Family::V4)).must()],
        ..base("icmp", Meaning::Match(icmp), "The type and code of ICMP messages.")
    },
    Extension {
        families: Families::V6,
        protocols: &[58],
        options: &[Opt::not("icmpv6-type", Arg::Icmp(Family::V6)).must()],
        ..base("icmp6", Meaning::Match(icmp6), "The type and code of ICMPv6 messages.")
    },
    Extension {
        protocols: &[TCP, UDP, UDPLITE, SCTP, DCCP],
        protocol_first: true,
        options: &[
            Opt::not("sports", Arg::PortList).or(&["source-ports"]),
            Opt::not("dports", Arg::PortList).or(&["destination-ports"]),
            Opt::not("ports", Arg::PortList),
        ],
        finish: Some(|options, _| match options.given.len() {
            1 => Ok(()),
            0 => Err("one of `--sports`, `--dports` and `--ports` is needed".into()),
            _ => Err("`--sports`, `--dports` and `--ports` exclude each other".into()),
        }),
        ..base("multiport", Meaning::Match(multiport), "A list of up to 15 ports; a range counts for two.")
    },
    Extension {
        protocols: &[SCTP],
        options: &[
            Opt::not("sport", Arg::Ports(Some("sctp"))).or(&["source-port"]),
            Opt::not("dport", Arg::Ports(Some("sctp"))).or(&["destination-port"]),
            Opt::not("chunk-types", Arg::Custom { words: 2, parse: parse_chunks, print: print_chunks }),
        ],
        finish: Some(|options, _| ports_in_order(options)),
        ..base("sctp", Meaning::Match(sctp), "SCTP ports and chunks.")
    },
    Extension {
        protocols: &[DCCP],
        options: &[
            Opt::not("sport", Arg::Ports(None)).or(&["source-port"]),
            Opt::not("dport", Arg::Ports(None)).or(&["destination-port"]),
            Opt::not("dccp-types", Arg::Items(DCCP_TYPES, Spelling::AnyCase)),
            Opt::not("dccp-option", Arg::Number(1, 255)),
        ],
        ..base("dccp", Meaning::Match(dccp), "DCCP ports, packet types and options.")
    },
    Extension {
        protocols: &[50],
        options: &[Opt::not("espspi", Arg::Range(':', u32::MAX as u64)).unsaid(unsaid::every_u32)],
        ..base("esp", Meaning::Match(esp), "A range of ESP SPIs.")
    },
    Extension {
        families: Families::V4,
        protocols: &[51],
        options: &[Opt::not("ahspi", Arg::Range(':', u32::MAX as u64)).unsaid(unsaid::every_u32)],
        ..base("ah", Meaning::Match(ah), "A range of AH SPIs.")
    },
    Extension {
        options: &[
            Opt::not("ecn-tcp-ece", Arg::Flag),
            Opt::not("ecn-tcp-cwr", Arg::Flag),
            Opt::not("ecn-ip-ect", Arg::Number(0, 3)),
        ],
        finish: Some(|options, context| {
            if options.given.is_empty() {
                return Err("some option is needed".into());
            }
            if options.count(&["ecn-tcp-cwr", "ecn-tcp-ece"]) > 0 && !context.is_protocol(&[TCP]) {
                return Err("TCP's flags need `-p tcp`".into());
            }
            Ok(())
        }),
        ..base(
            "ecn",
            Meaning::Match(ecn),
            "Explicit congestion notification: the bits of the IP header and of TCP's.",
        )
    },
];

/// `--syn`: of SYN, RST, ACK and FIN, SYN alone is set.
const SYN: (u8, u8) = (0x17, 0x02);

const DCCP_TYPES: &[(&str, u64)] = &[
    ("REQUEST", 0),
    ("RESPONSE", 1),
    ("DATA", 2),
    ("ACK", 3),
    ("DATAACK", 4),
    ("CLOSEREQ", 5),
    ("CLOSE", 6),
    ("RESET", 7),
    ("SYNC", 8),
    ("SYNCACK", 9),
    ("INVALID", DCCP_INVALID),
];

/// The first reserved type of DCCP packets. `INVALID` stands for all of them, not for the first alone.
const DCCP_INVALID: u64 = 10;

fn ports_in_order(options: &Options) -> Result<(), String> {
    for given in &options.given {
        if let Value::Ports(PortRange { first, last }) = given.value
            && first > last
        {
            return Err(format!("the ports `{first}:{last}` end below their start"));
        }
    }
    Ok(())
}

fn asked_ports(options: &Options, name: &str) -> Asked<PortRange> {
    match options.value(name)? {
        (Value::Ports(ports), negated) => Some((*ports, negated)),
        _ => None,
    }
}

fn asked_byte(options: &Options, name: &str) -> Asked<u8> {
    options.value(name).and_then(|(value, negated)| Some((value.number()? as u8, negated)))
}

fn tcp(options: &Options, body: &mut Body<'_>) {
    let flags = match (options.value("tcp-flags"), options.value("syn")) {
        (Some((Value::Range(mask, set), negated)), _) => Some(((*mask as u8, *set as u8), negated)),
        (_, Some((_, negated))) => Some((SYN, negated)),
        _ => None,
    };
    let asked = Tcp {
        source: asked_ports(options, "sport"),
        destination: asked_ports(options, "dport"),
        flags,
        option: asked_byte(options, "tcp-option"),
    };
    meaning::tcp(&asked, body);
}

fn udp(options: &Options, body: &mut Body<'_>) {
    meaning::udp(asked_ports(options, "sport"), asked_ports(options, "dport"), body);
}

fn icmp(options: &Options, body: &mut Body<'_>) {
    match options.value("icmp-type") {
        Some((Value::Icmp(icmp), negated)) => {
            let kind = (icmp.kind != 255).then_some(icmp.kind);
            meaning::icmp(kind, (icmp.code_first, icmp.code_last), negated, body);
        }
        _ => meaning::icmp(None, (0, 255), false, body),
    }
}

fn icmp6(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Icmp(icmp), negated)) = options.value("icmpv6-type") {
        meaning::icmp(Some(icmp.kind), (icmp.code_first, icmp.code_last), negated, body);
    }
}

fn multiport(options: &Options, body: &mut Body<'_>) {
    let ends = [
        ("sports", MultiportEnd::Source),
        ("dports", MultiportEnd::Destination),
        ("ports", MultiportEnd::Either),
    ];
    for (name, end) in ends {
        if let Some((Value::PortList(list), negated)) = options.value(name) {
            meaning::multiport(end, list.iter().copied(), negated, body);
        }
    }
}

fn sctp(options: &Options, body: &mut Body<'_>) {
    let chunks = match options.value("chunk-types") {
        Some((Value::Text(text), negated)) => decode_chunks(text).map(|chunks| (chunks, negated)),
        _ => None,
    };
    meaning::sctp(asked_ports(options, "sport"), asked_ports(options, "dport"), chunks, body);
}

fn dccp(options: &Options, body: &mut Body<'_>) {
    let types = match options.value("dccp-types") {
        Some((Value::List(list), negated)) => {
            let bits = |kind: u64| if kind == DCCP_INVALID { u16::MAX << kind } else { 1 << kind };
            Some((list.iter().fold(0u16, |sum, &kind| sum | bits(kind)), negated))
        }
        _ => None,
    };
    let option = asked_byte(options, "dccp-option");
    meaning::dccp(asked_ports(options, "sport"), asked_ports(options, "dport"), types, option, body);
}

fn spis(options: &Options, name: &str) -> ((u32, u32), bool) {
    match options.value(name) {
        Some((Value::Range(first, last), negated)) => ((*first as u32, *last as u32), negated),
        _ => ((0, u32::MAX), false),
    }
}

fn esp(options: &Options, body: &mut Body<'_>) {
    let (spis, negated) = spis(options, "espspi");
    meaning::esp(spis, negated, body);
}

fn ah(options: &Options, body: &mut Body<'_>) {
    let (spis, negated) = spis(options, "ahspi");
    meaning::ah(spis, negated, body);
}

fn ecn(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Number(bits), negated)) = options.value("ecn-ip-ect") {
        network::ecn_bits(*bits as u8, negated, body);
    }
    for (name, flag) in [("ecn-tcp-ece", 0x40), ("ecn-tcp-cwr", 0x80)] {
        if let Some((_, negated)) = options.value(name) {
            network::ecn_flag(flag, negated, body);
        }
    }
}

/// SCTP's chunk types by name (RFC 9260 section 3.2, RFC 3758, RFC 4820, RFC 5061, RFC 6525, RFC 8260), with the flags
/// that some have: a letter for each bit from the highest on, `-` for none.
const CHUNKS: &[(&str, u8, &str)] = &[
    ("DATA", 0, "----IUBE"),
    ("INIT", 1, ""),
    ("INIT_ACK", 2, ""),
    ("SACK", 3, ""),
    ("HEARTBEAT", 4, ""),
    ("HEARTBEAT_ACK", 5, ""),
    ("ABORT", 6, "-------T"),
    ("SHUTDOWN", 7, ""),
    ("SHUTDOWN_ACK", 8, ""),
    ("ERROR", 9, ""),
    ("COOKIE_ECHO", 10, ""),
    ("COOKIE_ACK", 11, ""),
    ("ECN_ECNE", 12, ""),
    ("ECN_CWR", 13, ""),
    ("SHUTDOWN_COMPLETE", 14, "-------T"),
    ("I_DATA", 64, "----IUBE"),
    ("RE_CONFIG", 130, ""),
    ("PAD", 132, ""),
    ("ASCONF", 193, ""),
    ("ASCONF_ACK", 128, ""),
    ("FORWARD_TSN", 192, ""),
    ("I_FORWARD_TSN", 194, ""),
];

/// `any|all|only CHUNK[:flags],...`: kept as `rule type:mask:value ...`, ascending by type.
fn parse_chunks(words: &[&str], _: &crate::extension::Context) -> Result<Value, String> {
    let rule = words[0].to_ascii_lowercase();
    if !matches!(&*rule, "any" | "all" | "only") {
        return Err(format!("`{rule}` is none of any, all, only"));
    }
    let mut chunks: BTreeMap<u8, (u8, u8)> = BTreeMap::new();
    match &*words[1].to_ascii_uppercase() {
        "ALL" => chunks.extend((0..=255).map(|kind| (kind, (0, 0)))),
        "NONE" => {}
        _ => {
            for item in words[1].split(',').filter(|item| !item.is_empty()) {
                let (name, flags) = item.split_once(':').unwrap_or((item, ""));
                let &(name, kind, letters) = CHUNKS
                    .iter()
                    .find(|(known, ..)| known.eq_ignore_ascii_case(name))
                    .ok_or_else(|| format!("`{name}` is no SCTP chunk type"))?;
                let (mask, value) = chunks.entry(kind).or_default();
                for flag in flags.chars() {
                    let at = letters
                        .find(flag.to_ascii_uppercase())
                        .filter(|_| flag != '-')
                        .ok_or_else(|| format!("`{name}` has no flag `{flag}`"))?;
                    let bit = 0x80 >> at;
                    *mask |= bit;
                    if flag.is_ascii_uppercase() {
                        *value |= bit;
                    }
                }
            }
        }
    }
    let text: Vec<String> =
        chunks.iter().map(|(kind, (mask, value))| format!("{kind}:{mask}:{value}")).collect();
    Ok(Value::Text(format!("{rule} {}", text.join(" ")).as_str().into()))
}

fn chunk_items(text: &str) -> impl Iterator<Item = (u8, u8, u8)> + '_ {
    text.split(' ').skip(1).filter_map(|item| {
        let mut parts = item.split(':').map_while(|part| part.parse().ok());
        Some((parts.next()?, parts.next()?, parts.next()?))
    })
}

fn print_chunks(value: &Value, out: &mut String) {
    let Value::Text(text) = value else { return };
    let rule = text.split(' ').next().unwrap_or("");
    out.push(' ');
    out.push_str(rule);
    out.push(' ');
    let items: Vec<String> = chunk_items(text)
        .map(|(kind, mask, value)| {
            let Some(&(name, _, letters)) = CHUNKS.iter().find(|(_, known, _)| *known == kind) else {
                return kind.to_string();
            };
            let flags: String = letters
                .chars()
                .enumerate()
                .filter(|(at, _)| mask & 0x80 >> at != 0)
                .map(|(at, c)| if value & 0x80 >> at != 0 { c } else { c.to_ascii_lowercase() })
                .collect();
            if flags.is_empty() { name.to_string() } else { format!("{name}:{flags}") }
        })
        .collect();
    out.push_str(
        match items.len() {
            0 => "NONE".into(),
            256 => "ALL".into(),
            _ => items.join(","),
        }
        .as_str(),
    );
}

fn decode_chunks(text: &str) -> Option<(SctpRule, [u32; 8], Vec<SctpFlags>)> {
    let rule = match text.split(' ').next()? {
        "any" => SctpRule::Any,
        "all" => SctpRule::All,
        _ => SctpRule::Only,
    };
    let mut chunks = [0; 8];
    let mut flags = Vec::new();
    for (kind, mask, value) in chunk_items(text) {
        chunks[usize::from(kind) / 32] |= 1 << (kind % 32);
        if mask != 0 {
            flags.push(SctpFlags { chunk: kind, mask, value });
        }
    }
    Some((rule, chunks, flags))
}

#[cfg(test)]
mod tests {
    use polc_ir::field::Field;
    use polc_ir::hook::Semantics;
    use polc_ir::ruleset::ClauseKind;
    use polc_ir::source::SourceMap;

    use crate::{ParseOptions, lower, parse};

    #[test]
    fn invalid_is_every_reserved_type_of_dccp() {
        let mut sources = SourceMap::new();
        let rule = "-A INPUT -p dccp -m dccp --dccp-types DATA,INVALID";
        let file = sources.add("rules", format!("*filter\n{rule}\nCOMMIT\n"));
        let (dump, findings) = parse(&sources, file, &ParseOptions::default());
        assert!(findings.is_empty(), "{findings:?}");
        let ruleset = lower(&dump, &[], Semantics::Legacy);
        let clauses = ruleset.rules.values().flat_map(|rule| &rule.clauses);
        let mut tests = clauses.filter_map(|clause| match &clause.kind {
            ClauseKind::Any(tests) => {
                tests.iter().find(|test| test.field == Field::L4Bytes { offset: 8, len: 1 })
            }
            _ => None,
        });
        let test = tests.next().expect("the type is asked for");
        let held: Vec<u128> = (0..16).filter(|kind| test.holds(kind << 1)).collect();
        assert_eq!(held, [2, 10, 11, 12, 13, 14, 15]);
    }
}
