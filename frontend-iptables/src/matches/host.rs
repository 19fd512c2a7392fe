//! Matches on what the host knows of a packet and the packet does not carry: sockets, devices, routes, processors.
//!
//! What the kernel alone evaluates says why in its own entry.

use polc_ir::hook::{Hook, TableKind};

use crate::extension::{
    Arg, Context, Extension, Families, Meaning, Opt, Options, Site, Value, base, print_word,
};
use crate::names;
use crate::value;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[
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
];

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

/// A packet made here that goes to a bridge has no port yet (net/netfilter/xt_physdev.c, `physdev_mt_check`).
fn bridge_port(options: &Options, site: &Site<'_>) -> Result<(), String> {
    let bridged = matches!(options.value("physdev-is-bridged"), Some((_, false)));
    let out = options.count(&["physdev-out", "physdev-is-out"]) > 0;
    if out && !bridged && site.reached_from(&[Hook::Output]).is_some() {
        return Err("packets in OUTPUT have no port of a bridge to go out by".into());
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
