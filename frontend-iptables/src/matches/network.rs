//! Matches on network headers, addresses, devices and the packet itself.

use polc_ir::derived::{DeviceLimit, Ipv6HeaderTest};
use polc_ir::field::{End, Field};
use polc_ir::hook::{Family, Hook};
use polc_ir::interval::IntervalSet;

use crate::extension::{
    Arg, Context, Extension, Families, Meaning, Opt, Options, Site, Value, base, print_word, unsaid,
};
use crate::lower::{Body, header, network as meaning};
use crate::names::dscp;
use crate::value::{self, Masked, Spelling};

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: &[Opt::not("src-range", Arg::Addresses), Opt::not("dst-range", Arg::Addresses)],
        finish: Some(|options, _| match options.given.len() {
            0 => Err("one of `--src-range` and `--dst-range` is needed".into()),
            _ => Ok(()),
        }),
        ..base(
            "iprange",
            Meaning::Match(iprange),
            "Source or destination addresses from a first to a last one.",
        )
    },
    Extension {
        options: &[Opt::not("length", Arg::Range(':', 0xffff)).must()],
        ..base("length", Meaning::Match(length), "The packet's length, from the IP header on.")
    },
    Extension {
        families: Families::V4,
        options: &[
            Opt::not("ttl-eq", Arg::Number(0, 255)).or(&["ttl"]),
            Opt::new("ttl-lt", Arg::Number(0, 255)),
            Opt::new("ttl-gt", Arg::Number(0, 255)),
        ],
        finish: Some(one_of),
        ..base("ttl", Meaning::Match(|options, body| hops(options, "ttl", body)), "The time to live.")
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("hl-eq", Arg::Number(0, 255)).or(&["hl"]),
            Opt::new("hl-lt", Arg::Number(0, 255)),
            Opt::new("hl-gt", Arg::Number(0, 255)),
        ],
        finish: Some(one_of),
        ..base("hl", Meaning::Match(|options, body| hops(options, "hl", body)), "The hop limit.")
    },
    Extension {
        options: &[
            Opt::not("dscp", Arg::Hex(63)),
            Opt::not("dscp-class", Arg::Custom { words: 1, parse: parse_class, print: |_, _| {} }),
        ],
        finish: Some(one_of),
        print: Some(|options, out| {
            for name in ["dscp", "dscp-class"] {
                if let Some((value, negated)) = options.value(name) {
                    out.push_str(if negated { " ! --dscp" } else { " --dscp" });
                    let class = value.number().unwrap_or(0);
                    out.push_str(&format!(" 0x{class:02x}"));
                }
            }
        }),
        ..base("dscp", Meaning::Match(dscp_match), "The six bits of the differentiated services code point.")
    },
    Extension {
        options: &[Opt::not("tos", Arg::Custom { words: 1, parse: parse_tos, print: print_tos }).must()],
        ..base("tos", Meaning::Match(tos), "The type of service byte, under a mask.")
    },
    Extension {
        hooks: &[Hook::Prerouting, Hook::Input, Hook::Forward],
        options: &[Opt::not("mac-source", Arg::Mac).must()],
        ..base("mac", Meaning::Match(mac), "The sender's Ethernet address.")
    },
    Extension {
        options: &[Opt::not("mark", Arg::Mark).must()],
        ..base("mark", Meaning::Match(mark), "The packet's mark, under a mask.")
    },
    Extension {
        options: &[Opt::not("pkt-type", Arg::Name(PACKET_TYPES, Spelling::AnyCase)).must()],
        ..base(
            "pkttype",
            Meaning::Match(packet_type),
            "Whether the link sent the packet to us, to all or to a group.",
        )
    },
    Extension {
        options: &[
            Opt::not("src-type", Arg::Names(ADDRESS_TYPES, Spelling::Abbreviated)),
            Opt::not("dst-type", Arg::Names(ADDRESS_TYPES, Spelling::Abbreviated)),
            Opt::new("limit-iface-in", Arg::Flag).excludes(&["limit-iface-out"]),
            Opt::new("limit-iface-out", Arg::Flag),
        ],
        finish: Some(|options, context| {
            if options.count(&["src-type", "dst-type"]) == 0 {
                return Err("one of `--src-type` and `--dst-type` is needed".into());
            }
            if context.family == Family::V6 { types_of_ipv6(options) } else { Ok(()) }
        }),
        place: Some(limited_device),
        ..base(
            "addrtype",
            Meaning::Match(address_type),
            "Whether an address is local, broadcast, multicast, ...",
        )
    },
    Extension {
        options: &[
            Opt::not("match-set", Arg::SetEnds).or(&["set"]).must(),
            Opt::new("return-nomatch", Arg::Flag).again(),
            Opt::not("update-counters", Arg::Flag).again().unsaid(|_, negated| !negated),
            Opt::not("update-subcounters", Arg::Flag).again().unsaid(|_, negated| !negated),
            Opt::not("packets-eq", Arg::Number(0, u64::MAX)).excludes(&["packets-lt", "packets-gt"]),
            Opt::new("packets-lt", Arg::Number(0, u64::MAX)).excludes(&["packets-gt"]),
            Opt::new("packets-gt", Arg::Number(0, u64::MAX)),
            Opt::not("bytes-eq", Arg::Number(0, u64::MAX)).excludes(&["bytes-lt", "bytes-gt"]),
            Opt::new("bytes-lt", Arg::Number(0, u64::MAX)).excludes(&["bytes-gt"]),
            Opt::new("bytes-gt", Arg::Number(0, u64::MAX)),
        ],
        ..base("set", Meaning::Match(set), "Whether the packet is in an ipset.")
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("ahspi", Arg::Range(':', u32::MAX as u64)).unsaid(unsaid::every_u32),
            Opt::not("ahlen", Arg::Number(0, u32::MAX as u64)).unsaid(unsaid::zero),
            Opt::new("ahres", Arg::Flag),
        ],
        ..base("ah", Meaning::Match(ah6), "IPv6's authentication header.")
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("fragid", Arg::Range(':', u32::MAX as u64)).unsaid(unsaid::every_u32),
            Opt::not("fraglen", Arg::Number(0, u32::MAX as u64)),
            Opt::new("fragres", Arg::Flag),
            Opt::new("fragfirst", Arg::Flag),
            Opt::new("fragmore", Arg::Flag).excludes(&["fraglast"]),
            Opt::new("fraglast", Arg::Flag),
        ],
        ..base("frag", Meaning::Match(frag), "IPv6's fragment header.")
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("hbh-len", Arg::Number(0, u32::MAX as u64)),
            Opt::new("hbh-opts", Arg::Custom { words: 1, parse: parse_options, print: print_options }),
        ],
        ..base(
            "hbh",
            Meaning::Match(|options, body| options_header(options, false, body)),
            "IPv6's hop-by-hop options.",
        )
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("dst-len", Arg::Number(0, u32::MAX as u64)),
            Opt::new("dst-opts", Arg::Custom { words: 1, parse: parse_options, print: print_options }),
        ],
        ..base(
            "dst",
            Meaning::Match(|options, body| options_header(options, true, body)),
            "IPv6's destination options.",
        )
    },
    Extension {
        families: Families::V6,
        options: &[
            Opt::not("rt-type", Arg::Number(0, u32::MAX as u64)),
            Opt::not("rt-segsleft", Arg::Range(':', u32::MAX as u64)).unsaid(unsaid::every_u32),
            Opt::not("rt-len", Arg::Number(0, u32::MAX as u64)),
            Opt::new("rt-0-res", Arg::Flag),
            Opt::new("rt-0-addrs", Arg::Custom { words: 1, parse: parse_addresses, print: print_word }),
            Opt::new("rt-0-not-strict", Arg::Flag).requires(&["rt-0-addrs"]),
        ],
        finish: Some(routing),
        ..base("rt", Meaning::Match(rt), "IPv6's routing header.")
    },
    Extension {
        families: Families::V6,
        protocols: &[135],
        options: &[Opt::not("mh-type", Arg::Custom { words: 1, parse: parse_mh, print: print_mh })
            .unsaid(|kinds, _| *kinds == Value::Range(0, 255))],
        ..base("mh", Meaning::Match(mh), "The type of mobility headers.")
    },
];

/// `RTN_*` of include/uapi/linux/rtnetlink.h, as bits.
const ADDRESS_TYPES: &[(&str, u64)] = &[
    ("UNSPEC", 0),
    ("UNICAST", 1),
    ("LOCAL", 2),
    ("BROADCAST", 3),
    ("ANYCAST", 4),
    ("MULTICAST", 5),
    ("BLACKHOLE", 6),
    ("UNREACHABLE", 7),
    ("PROHIBIT", 8),
    ("THROW", 9),
    ("NAT", 10),
    ("XRESOLVE", 11),
];

fn one_of(options: &mut Options, _: &Context) -> Result<(), String> {
    let names = || options.extension.options.iter().map(|option| format!("`--{}`", option.name));
    match options.given.len() {
        1 => Ok(()),
        0 => Err(format!("one of {} is needed", names().collect::<Vec<_>>().join(", "))),
        _ => Err(format!("{} exclude each other", names().collect::<Vec<_>>().join(", "))),
    }
}

fn number(options: &Options, name: &str) -> Option<(u64, bool)> {
    options.value(name).and_then(|(value, negated)| Some((value.number()?, negated)))
}

fn range(options: &Options, name: &str) -> Option<((u64, u64), bool)> {
    match options.value(name)? {
        (Value::Range(first, last), negated) => Some(((*first, *last), negated)),
        _ => None,
    }
}

fn iprange(options: &Options, body: &mut Body<'_>) {
    for (name, field) in [("src-range", Field::SrcAddr), ("dst-range", Field::DstAddr)] {
        if let Some((Value::Addresses(first, last), negated)) = options.value(name) {
            meaning::range(field, header::bits(*first), header::bits(*last), negated, body);
        }
    }
}

fn length(options: &Options, body: &mut Body<'_>) {
    if let Some(((first, last), negated)) = range(options, "length") {
        meaning::range(Field::Length, first.into(), last.into(), negated, body);
    }
}

fn hops(options: &Options, prefix: &str, body: &mut Body<'_>) {
    if let Some((value, negated)) = number(options, &format!("{prefix}-eq")) {
        meaning::range(Field::Ttl, value.into(), value.into(), negated, body);
    }
    if let Some((value, _)) = number(options, &format!("{prefix}-lt")) {
        body.require_values(
            Field::Ttl,
            false,
            value.checked_sub(1).map_or(IntervalSet::empty(), |last| IntervalSet::range(0, last.into())),
        );
    }
    if let Some((value, _)) = number(options, &format!("{prefix}-gt")) {
        body.require_values(Field::Ttl, false, IntervalSet::range(u128::from(value) + 1, 255));
    }
}

fn parse_class(words: &[&str], _: &Context) -> Result<Value, String> {
    dscp::class(words[0])
        .map(|class| Value::Number(class.into()))
        .ok_or_else(|| format!("`{}` is no DSCP class", words[0]))
}

fn dscp_match(options: &Options, body: &mut Body<'_>) {
    for name in ["dscp", "dscp-class"] {
        if let Some((class, negated)) = number(options, name) {
            meaning::dscp(class as u8, negated, body);
        }
    }
}

/// A type of service: a name (under the mask of the four TOS bits) or `value[/mask]`.
pub(crate) fn parse_tos(words: &[&str], _: &Context) -> Result<Value, String> {
    let text = words[0];
    if let Some((_, value)) =
        crate::names::TOS_NAMES.iter().find(|(name, _)| Spelling::AnyCase.fits(text, name))
    {
        return Ok(Value::Masked(Masked { value: (*value).into(), mask: 0x3f }));
    }
    let bad = || format!("`{text}` is no type of service");
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (value, value::number(mask, 0, 255).ok_or_else(bad)?),
        None => (text, 255),
    };
    let value = value::number(value, 0, 255).ok_or_else(bad)?;
    Ok(Value::Masked(Masked { value: value as u32, mask: mask as u32 }))
}

fn print_tos(value: &Value, out: &mut String) {
    if let Value::Masked(Masked { value, mask }) = value {
        out.push_str(&format!(" 0x{value:02x}/0x{mask:02x}"));
    }
}

fn tos(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Masked(tos), negated)) = options.value("tos") {
        meaning::masked(Field::Tos, tos.value.into(), tos.mask.into(), negated, body);
    }
}

fn mac(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Mac(mac), negated)) = options.value("mac-source") {
        let value = mac.0.iter().fold(0u128, |sum, byte| sum << 8 | u128::from(*byte));
        body.require_values(Field::SrcMac, negated, IntervalSet::point(value));
    }
}

fn mark(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Masked(mark), negated)) = options.value("mark") {
        meaning::masked(Field::Mark, mark.value.into(), mark.mask.into(), negated, body);
    }
}

/// `PACKET_*` of include/uapi/linux/if_packet.h.
const PACKET_TYPES: &[(&str, u64)] = &[
    ("unicast", 0),
    ("broadcast", 1),
    ("multicast", 2),
    ("otherhost", 3),
    ("bcast", 1),
    ("mcast", 2),
    ("host", 0),
];

fn packet_type(options: &Options, body: &mut Body<'_>) {
    if let Some((kind, negated)) = number(options, "pkt-type") {
        body.require_values(Field::PacketType, negated, IntervalSet::point(kind.into()));
    }
}

/// The types that IPv6 has no routes of (net/netfilter/xt_addrtype.c, `addrtype_mt_checkentry_v1`).
fn types_of_ipv6(options: &mut Options) -> Result<(), String> {
    for name in ["src-type", "dst-type"] {
        let Some((Value::List(types), _)) = options.value(name) else { continue };
        if let Some((name, _)) =
            ADDRESS_TYPES.iter().find(|(_, kind)| types.contains(kind) && matches!(kind, 3 | 6 | 8..))
        {
            return Err(format!("IPv6 has no addresses of type {name}"));
        }
    }
    Ok(())
}

/// A device to look at is one that the packet has by then.
fn limited_device(options: &Options, site: &Site<'_>) -> Result<(), String> {
    for (name, hooks) in [
        ("limit-iface-in", [Hook::Postrouting, Hook::Output]),
        ("limit-iface-out", [Hook::Prerouting, Hook::Input]),
    ] {
        if let Some(hook) = site.reached_from(&hooks).filter(|_| options.has(name)) {
            return Err(format!("`--{name}` asks for a device that packets in {} lack", hook.chain_name()));
        }
    }
    Ok(())
}

fn address_type(options: &Options, body: &mut Body<'_>) {
    let device = if options.has("limit-iface-in") {
        Some(DeviceLimit::In)
    } else {
        options.has("limit-iface-out").then_some(DeviceLimit::Out)
    };
    for (name, end) in [("src-type", End::Src), ("dst-type", End::Dst)] {
        if let Some((Value::List(types), negated)) = options.value(name) {
            let bits = types.iter().fold(0u16, |sum, kind| sum | 1 << kind);
            meaning::address_type(end, bits, device, negated, body);
        }
    }
}

fn set(options: &Options, body: &mut Body<'_>) {
    let counters = ["packets-eq", "packets-lt", "packets-gt", "bytes-eq", "bytes-lt", "bytes-gt"];
    if options.count(&counters) > 0 {
        return body.observable("set", "reads the counters of a set's elements");
    }
    if let Some((Value::Text(text), negated)) = options.value("match-set")
        && let Some((name, ends)) = text.split_once(' ')
    {
        let ends = ends.split(',').map(|end| if end == "src" { End::Src } else { End::Dst }).collect();
        meaning::member(name, ends, options.has("return-nomatch"), negated, body);
    }
}

fn ah6(options: &Options, body: &mut Body<'_>) {
    let ((first, last), spi_negate) = range(options, "ahspi").unwrap_or(((0, u32::MAX.into()), false));
    let (len, len_negate) = number(options, "ahlen").unwrap_or((0, false));
    let test = Ipv6HeaderTest::Ah {
        spi: (first as u32, last as u32),
        spi_negate,
        len: len as u32,
        len_negate,
        reserved: options.has("ahres"),
    };
    meaning::ipv6_header(test, body);
}

fn frag(options: &Options, body: &mut Body<'_>) {
    let ((first, last), id_negate) = range(options, "fragid").unwrap_or(((0, u32::MAX.into()), false));
    let test = Ipv6HeaderTest::Frag {
        id: (first as u32, last as u32),
        id_negate,
        len: number(options, "fraglen").map(|(len, _)| len as u32),
        reserved: options.has("fragres"),
        first: options.has("fragfirst"),
        more: options.has("fragmore"),
        last: options.has("fraglast"),
    };
    meaning::ipv6_header(test, body);
}

/// `type[:len],...`.
fn parse_options(words: &[&str], _: &Context) -> Result<Value, String> {
    let list: Result<Vec<u64>, String> = words[0]
        .split(',')
        .map(|item| {
            // Of larger numbers, the last eight bits count.
            let byte = |text| {
                value::strtoul_negating(text, 0)
                    .filter(|(_, rest)| rest.is_empty())
                    .map(|(number, _)| number & 0xff)
                    .ok_or_else(|| format!("`{item}` is no option type or `type:length`"))
            };
            match item.split_once(':') {
                Some((kind, len)) => Ok(byte(kind)? << 16 | byte(len)?),
                None => Ok(byte(item)? << 16 | NO_LENGTH),
            }
        })
        .collect();
    let list = list?;
    if list.len() > 16 {
        return Err("more than 16 options".into());
    }
    Ok(Value::List(list))
}

/// What the kernel takes for no length (net/ipv6/netfilter/ip6t_hbh.c, `hbh_mt6`).
const NO_LENGTH: u64 = 255;

fn print_options(value: &Value, out: &mut String) {
    let Value::List(list) = value else { return };
    let items: Vec<String> = list
        .iter()
        .map(|item| match item & 0xffff {
            NO_LENGTH => (item >> 16).to_string(),
            len => format!("{}:{len}", item >> 16),
        })
        .collect();
    out.push(' ');
    out.push_str(&items.join(","));
}

fn options_header(options: &Options, destination: bool, body: &mut Body<'_>) {
    let (len_name, options_name) =
        if destination { ("dst-len", "dst-opts") } else { ("hbh-len", "hbh-opts") };
    let asked = match options.value(options_name) {
        Some((Value::List(list), _)) => list
            .iter()
            .map(|item| ((item >> 16) as u8, (item & 0xffff != NO_LENGTH).then_some((item & 0xff) as u8)))
            .collect(),
        _ => Vec::new(),
    };
    let len = number(options, len_name);
    let test = Ipv6HeaderTest::Options {
        destination,
        len: len.map(|(len, _)| len as u32),
        len_negate: len.is_some_and(|(_, negated)| negated),
        options: asked,
    };
    meaning::ipv6_header(test, body);
}

fn parse_addresses(words: &[&str], context: &Context) -> Result<Value, String> {
    let list: Result<Vec<String>, String> = words[0]
        .split(',')
        .map(|item| {
            let address =
                value::address(item, context.family).ok_or_else(|| format!("`{item}` is not an address"))?;
            Ok(value::Ip(address).to_string())
        })
        .collect();
    let list = list?;
    if list.len() > 16 {
        return Err("more than 16 addresses".into());
    }
    Ok(Value::Text(list.join(",").as_str().into()))
}

/// What asks for routing headers of type 0 comes after what says that they are of type 0.
fn routing(options: &mut Options, _: &Context) -> Result<(), String> {
    let mut zero = false;
    for given in &options.given {
        match options.extension.options[given.option as usize].name {
            "rt-type" => zero = !given.negated && given.value == Value::Number(0),
            name if name.starts_with("rt-0-") && !zero => {
                return Err(format!("`--{name}` needs `--rt-type 0` before it"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn rt(options: &Options, body: &mut Body<'_>) {
    let kind = number(options, "rt-type");
    let ((first, last), segments_left_negate) =
        range(options, "rt-segsleft").unwrap_or(((0, u32::MAX.into()), false));
    let len = number(options, "rt-len");
    let addresses = match options.value("rt-0-addrs") {
        Some((Value::Text(text), _)) => text
            .split(',')
            .filter_map(|item| item.parse::<std::net::Ipv6Addr>().ok())
            .map(|address| address.to_bits())
            .collect(),
        _ => Vec::new(),
    };
    let test = Ipv6HeaderTest::Rt {
        kind: kind.map(|(kind, _)| kind as u32),
        kind_negate: kind.is_some_and(|(_, negated)| negated),
        segments_left: (first as u32, last as u32),
        segments_left_negate,
        len: len.map(|(len, _)| len as u32),
        len_negate: len.is_some_and(|(_, negated)| negated),
        reserved: options.has("rt-0-res"),
        addresses,
        not_strict: options.has("rt-0-not-strict"),
    };
    meaning::ipv6_header(test, body);
}

/// Mobility header types by name (RFC 6275 section 6.1).
const MH_TYPES: &[(&str, u8)] = &[
    ("binding-refresh-request", 0),
    ("brr", 0),
    ("home-test-init", 1),
    ("hoti", 1),
    ("careof-test-init", 2),
    ("coti", 2),
    ("home-test", 3),
    ("hot", 3),
    ("careof-test", 4),
    ("cot", 4),
    ("binding-update", 5),
    ("bu", 5),
    ("binding-acknowledgement", 6),
    ("ba", 6),
    ("binding-error", 7),
    ("be", 7),
];

fn parse_mh(words: &[&str], _: &Context) -> Result<Value, String> {
    let one = |text: &str, default: u8| {
        if text.is_empty() {
            return Ok(default);
        }
        // A whole name goes before those that it begins.
        let whole = MH_TYPES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        whole
            .or_else(|| MH_TYPES.iter().find(|(name, _)| value::abbreviates(text, name)))
            .map(|&(_, kind)| kind)
            .or_else(|| value::number(text, 0, 255).map(|kind| kind as u8))
            .ok_or_else(|| format!("`{text}` is no mobility header type"))
    };
    let (first, last) = match words[0].split_once(':') {
        Some((first, last)) => {
            let (first, last) = (one(first, 0)?, one(last, 255)?);
            if first > last {
                return Err(format!("`{}` ends before it begins", words[0]));
            }
            (first, last)
        }
        None => {
            let kind = one(words[0], 0)?;
            (kind, kind)
        }
    };
    Ok(Value::Range(first.into(), last.into()))
}

fn print_mh(value: &Value, out: &mut String) {
    if let Value::Range(first, last) = value {
        out.push_str(&if first == last { format!(" {first}") } else { format!(" {first}:{last}") });
    }
}

fn mh(options: &Options, body: &mut Body<'_>) {
    let ((first, last), negate) = range(options, "mh-type").unwrap_or(((0, 255), false));
    meaning::mobility((first as u8, last as u8), negate, body);
}
