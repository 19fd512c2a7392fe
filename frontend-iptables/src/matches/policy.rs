//! The packet's IPsec policy: the `policy` match.
//!
//! A rule describes up to four transformations, divided by `--next`; iptables-save prints the options of each in an
//! order of its own (extensions/libxt_policy.c in iptables; net/netfilter/xt_policy.c).

use polc_ir::hook::Hook;

use crate::extension::{Arg, Context, Extension, Given, Meaning, Opt, Options, Site, Value, base};
use crate::names;
use crate::value::Spelling;

/// The matches of this group.
pub(super) const ALL: &[Extension] = &[Extension {
    options: &[
        Opt::new("dir", Arg::Name(&[("in", 1), ("out", 2)], Spelling::Exact)).must(),
        Opt::new("pol", Arg::Name(&[("none", 0), ("ipsec", 1)], Spelling::Exact)),
        Opt::new("strict", Arg::Flag),
        Opt::not("reqid", Arg::Number(0, u32::MAX as u64)).again(),
        Opt::not("spi", Arg::Hex(u32::MAX as u64)).again(),
        Opt::not("proto", Arg::Custom { words: 1, parse: parse_protocol, print: print_protocol }).again(),
        Opt::not("mode", Arg::Name(&[("transport", TRANSPORT), ("tunnel", TUNNEL)], Spelling::Exact)).again(),
        Opt::not("tunnel-dst", Arg::Host).again(),
        Opt::not("tunnel-src", Arg::Host).again(),
        Opt::new("next", Arg::Flag).again().requires(&["strict"]),
    ],
    finish: Some(policy),
    place: Some(direction),
    print: Some(|options, out| options.given.iter().for_each(|given| options.print_given(given, out))),
    ..base(
        "policy",
        Meaning::Match(|_, body| body.opaque("policy", "asks for the packet's IPsec policy")),
        "The packet's IPsec policy.",
    )
}];

const TRANSPORT: u64 = 1;
const TUNNEL: u64 = 2;

/// How many transformations a rule can describe (include/uapi/linux/netfilter/xt_policy.h, `XT_POLICY_MAX_ELEM`).
const ELEMENTS_MAX: usize = 4;

/// The protocols of IPsec.
const PROTOCOLS: [u16; 3] = [50, 51, 108];

fn parse_protocol(words: &[&str], _: &Context) -> Result<Value, String> {
    names::protocol(words[0])
        .filter(|protocol| PROTOCOLS.contains(protocol))
        .map(|protocol| Value::Number(protocol.into()))
        .ok_or_else(|| format!("`{}` is none of ah, esp, ipcomp", words[0]))
}

fn print_protocol(value: &Value, out: &mut String) {
    out.push(' ');
    out.push_str(value.number().and_then(|protocol| names::protocol_name(protocol as u16)).unwrap_or(""));
}

/// Puts the options into the order in which they are printed.
fn policy(options: &mut Options, _: &Context) -> Result<(), String> {
    options.default("pol", Value::Number(1));
    let strict = options.has("strict");
    let name = |given: &Given| options.extension.options[given.option as usize].name;
    let (mut head, described): (Vec<Given>, Vec<Given>) =
        options.given.iter().cloned().partition(|given| matches!(name(given), "dir" | "pol" | "strict"));
    head.sort_by_key(|given| given.option);
    let mut elements: Vec<&[Given]> = described.split(|given| name(given) == "next").collect();
    if elements.len() > ELEMENTS_MAX {
        return Err(format!("more than {ELEMENTS_MAX} transformations"));
    }
    if options.number("pol") == Some(0) {
        if strict {
            return Err("`--pol none` and `--strict` exclude each other".into());
        }
        elements.clear();
    }
    for element in &elements {
        for (at, given) in element.iter().enumerate() {
            if element[..at].iter().any(|earlier| earlier.option == given.option) {
                return Err(format!("`--{}` is given twice without `--next` between", name(given)));
            }
        }
        let find = |wanted| element.iter().find(|given| name(given) == wanted);
        let tunnel = find("mode").is_some_and(|mode| (mode.value == Value::Number(TUNNEL)) != mode.negated);
        if let Some(end) = find("tunnel-src").or(find("tunnel-dst")).filter(|_| !tunnel) {
            return Err(format!("`--{}` needs `--mode tunnel`", name(end)));
        }
        if element.is_empty() && strict {
            return Err(
                "`--strict` needs at least one of `--reqid`, `--spi`, `--proto`, `--mode`, `--tunnel-src` \
                 and `--tunnel-dst`, before and after each `--next`"
                    .into(),
            );
        }
    }
    let next = options.extension.options.iter().position(|option| option.name == "next");
    let next = Given { option: next.unwrap_or(0) as u8, negated: false, value: Value::None, span: None };
    for (number, element) in elements.into_iter().enumerate() {
        head.extend((number > 0).then(|| next.clone()));
        let mut element = element.to_vec();
        element.sort_by_key(|given| given.option);
        head.extend(element);
    }
    options.given = head;
    Ok(())
}

/// A packet has no policy of the way out before it is routed, and none of the way in when it was made here.
fn direction(options: &Options, site: &Site<'_>) -> Result<(), String> {
    let (word, hooks) = match options.number("dir") {
        Some(1) => ("in", [Hook::Postrouting, Hook::Output]),
        _ => ("out", [Hook::Prerouting, Hook::Input]),
    };
    match site.reached_from(&hooks) {
        Some(hook) => Err(format!("`--dir {word}` can't be asked of packets in {}", hook.chain_name())),
        None => Ok(()),
    }
}
