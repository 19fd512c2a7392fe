//! Matches on the packet's connection: state, conntrack, connmark, ipvs.

use polc_ir::field::Field;
use polc_ir::interval::IntervalSet;

use crate::extension::{Arg, Context, Extension, Given, Meaning, Opt, Options, Value, base};
use crate::lower::{Body, network as meaning};
use crate::value::Spelling;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
    Extension {
        options: &[Opt::not("state", Arg::Names(&STATES_OF_STATE, Spelling::Abbreviated)).must()],
        ..base(
            "state",
            Meaning::Match(state),
            "The connection's state; the older form of `conntrack --ctstate`.",
        )
    },
    Extension {
        options: &[
            Opt::not("ctstate", Arg::Names(&STATES, Spelling::Abbreviated)),
            Opt::not("ctproto", Arg::Custom { words: 1, parse: parse_protocol, print: print_protocol }),
            Opt::not("ctorigsrc", Arg::Host),
            Opt::not("ctorigdst", Arg::Host),
            Opt::not("ctreplsrc", Arg::Host),
            Opt::not("ctrepldst", Arg::Host),
            Opt::not("ctorigsrcport", Arg::Ports(None)),
            Opt::not("ctorigdstport", Arg::Ports(None)),
            Opt::not("ctreplsrcport", Arg::Ports(None)),
            Opt::not("ctrepldstport", Arg::Ports(None)),
            Opt::not("ctstatus", Arg::Names(STATUSES, Spelling::Abbreviated)),
            Opt::not("ctexpire", Arg::Range(':', u32::MAX as u64)),
            Opt::new("ctdir", Arg::Name(&[("ORIGINAL", 0), ("REPLY", 1)], Spelling::AnyCase)),
        ],
        finish: Some(tracked),
        ..base(
            "conntrack",
            Meaning::Match(conntrack),
            "What connection tracking knows of the packet's connection.",
        )
    },
    Extension {
        options: &[Opt::not("mark", Arg::Mark).must()],
        ..base("connmark", Meaning::Match(connmark), "The connection's mark, under a mask.")
    },
    Extension {
        options: &[
            Opt::not("ipvs", Arg::Flag),
            Opt::not("vproto", Arg::Custom { words: 1, parse: parse_protocol, print: print_protocol }),
            Opt::not("vaddr", Arg::Host),
            Opt::not("vport", Arg::Service),
            Opt::new("vdir", Arg::Name(&[("ORIGINAL", 0), ("REPLY", 1)], Spelling::AnyCase)),
            Opt::not("vmethod", Arg::Name(&[("GATE", 0), ("IPIP", 1), ("MASQ", 2)], Spelling::AnyCase)),
            Opt::not("vportctl", Arg::Service),
        ],
        finish: Some(virtual_server),
        ..base(
            "ipvs",
            Meaning::Match(|_, body| body.opaque("ipvs", "asks IPVS for the packet's connection")),
            "What IPVS knows of the packet's connection.",
        )
    },
];

const INVALID: (&str, u64) = ("INVALID", 0x01);
const NEW: (&str, u64) = ("NEW", 0x08);
const RELATED: (&str, u64) = ("RELATED", 0x04);
const ESTABLISHED: (&str, u64) = ("ESTABLISHED", 0x02);
const UNTRACKED: (&str, u64) = ("UNTRACKED", 0x100);

/// States and their bits in `Field::CtState`, in the order iptables-save prints them.
const STATES_OF_STATE: [(&str, u64); 5] = [INVALID, NEW, RELATED, ESTABLISHED, UNTRACKED];
const STATES: [(&str, u64); 7] =
    [INVALID, NEW, RELATED, ESTABLISHED, UNTRACKED, ("SNAT", 0x40), ("DNAT", 0x80)];

/// `enum ip_conntrack_status` of include/uapi/linux/netfilter/nf_conntrack_common.h.
const STATUSES: &[(&str, u64)] =
    &[("NONE", 0), ("EXPECTED", 1), ("SEEN_REPLY", 2), ("ASSURED", 4), ("CONFIRMED", 8)];

fn tracked(options: &mut Options, _: &Context) -> Result<(), String> {
    if options.given.is_empty() {
        return Err("some option is needed".into());
    }
    // extensions/libxt_conntrack.c takes `XT_CONNTRACK_STATUS`, which is set by then, for `XT_INV_PROTO`.
    let place = |name: &str| options.get(name).map(|given| options.given.iter().position(|one| one == given));
    if let (Some((_, true)), Some((Value::Number(0), _))) =
        (options.value("ctstatus"), options.value("ctproto"))
        && place("ctstatus") < place("ctproto")
    {
        return Err("`--ctproto` can't ask for all protocols behind `! --ctstatus`".into());
    }
    // Next to others, `NONE` asks for nothing.
    if let Some(Given { value: Value::List(bits), .. }) = options.get_mut("ctstatus")
        && bits.iter().any(|&bit| bit != 0)
    {
        bits.retain(|&bit| bit != 0);
    }
    Ok(())
}

fn parse_protocol(words: &[&str], _: &Context) -> Result<Value, String> {
    crate::names::protocol(words[0])
        .map(|protocol| Value::Number((protocol & 0xff).into()))
        .ok_or_else(|| format!("`{}` is no protocol", words[0]))
}

fn print_protocol(value: &Value, out: &mut String) {
    if let Some(protocol) = value.number() {
        out.push_str(&format!(" {protocol}"));
    }
}

/// Any other option implies `--ipvs`, which is then not printed.
fn virtual_server(options: &mut Options, _: &Context) -> Result<(), String> {
    match options.value("ipvs") {
        None if options.given.is_empty() => Err("some option is needed".into()),
        Some(_) if options.given.len() == 1 => Ok(()),
        Some((_, true)) => Err("`! --ipvs` contradicts any other option".into()),
        _ => {
            options.remove("ipvs");
            Ok(())
        }
    }
}

fn bits(list: &[u64]) -> u128 {
    list.iter().fold(0, |sum, &bit| sum | u128::from(bit))
}

fn state(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::List(states), negated)) = options.value("state") {
        meaning::any_bit(Field::CtState, bits(states), negated, body);
    }
}

fn conntrack(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::List(states), negated)) = options.value("ctstate") {
        meaning::any_bit(Field::CtState, bits(states), negated, body);
    }
    if let Some((Value::Number(direction), _)) = options.value("ctdir") {
        body.require_values(Field::CtDirection, false, IntervalSet::point((*direction).into()));
    }
    if let Some((Value::List(statuses), negated)) = options.value("ctstatus") {
        if bits(statuses) == 0 {
            // `NONE`: no bit at all (net/netfilter/xt_conntrack.c compares `status & mask` with 0).
            if !negated {
                body.never();
            }
        } else {
            meaning::any_bit(Field::CtStatus, bits(statuses), negated, body);
        }
    }
    let known = options.count(&["ctstate", "ctdir", "ctstatus"]);
    if options.given.len() > known {
        body.opaque("conntrack", "asks for more of the connection than its state, status and direction");
    }
}

fn connmark(options: &Options, body: &mut Body<'_>) {
    if let Some((Value::Masked(mark), negated)) = options.value("mark") {
        meaning::masked(Field::CtMark, mark.value.into(), mark.mask.into(), negated, body);
    }
}
