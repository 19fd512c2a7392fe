//! Prints a dump as iptables-legacy-save does (iptables/iptables.c, `print_rule4` and `print_iface`).

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::ast::{ChainAst, ChainIndex, Counters, Dump, Given, Policy, RuleAst, TableAst, TargetVerdict};
use crate::names;
use crate::value::{AddressMask, Interface, Ip};

/// The canonical text of a dump. Tables keep the file's order; with `counters`, every rule carries its own.
pub fn print(dump: &Dump, counters: bool) -> String {
    let mut out = String::new();
    for table in &dump.tables {
        table_text(table, counters, &mut out).expect("writing to a string succeeds");
    }
    out
}

fn table_text(table: &TableAst, counters: bool, out: &mut String) -> std::fmt::Result {
    writeln!(out, "*{}", table.kind)?;
    let shown = |given: Option<Counters>| {
        let Counters { packets, bytes } =
            if counters { given.unwrap_or_default() } else { Counters::default() };
        format!("[{packets}:{bytes}]")
    };
    // libiptc keeps user chains sorted by name (libiptc/libiptc.c, `iptc_insert_chain`).
    let mut chains: Vec<&ChainAst> = table.chains.iter().filter(|chain| !chain.deleted).collect();
    chains.sort_by_key(|chain| (chain.hook.is_none(), if chain.hook.is_none() { &*chain.name } else { "" }));
    for chain in &chains {
        let policy = match (chain.hook, chain.policy) {
            (None, _) => "-",
            (Some(_), Policy::Accept) => "ACCEPT",
            (Some(_), Policy::Drop) => "DROP",
        };
        writeln!(out, ":{} {policy} {}", chain.name, shown(chain.counters))?;
    }
    for chain in chains {
        for &rule in &chain.rules {
            let rule = &table.rules[rule as usize];
            if counters {
                write!(out, "{} ", shown(rule.counters))?;
            }
            write!(out, "-A {}", chain.name)?;
            conditions(rule, "", out)?;
            target(&rule.target.verdict, |index| &table.chains[index.0 as usize].name, out)?;
            out.push('\n');
        }
    }
    out.push_str("COMMIT\n");
    Ok(())
}

/// What the rule asks of a packet as it is saved, `before` standing before each match.
pub(crate) fn conditions(rule: &RuleAst, before: &str, out: &mut String) -> std::fmt::Result {
    address('s', rule.source.as_deref(), out)?;
    address('d', rule.destination.as_deref(), out)?;
    device('i', rule.in_interface.as_ref(), out)?;
    device('o', rule.out_interface.as_ref(), out)?;
    if let Some(protocol) = rule.protocol.filter(|protocol| protocol.value != 0) {
        let bang = if protocol.negated { " !" } else { "" };
        match names::protocol_name(protocol.value) {
            Some(name) => write!(out, "{bang} -p {name}")?,
            None => write!(out, "{bang} -p {}", protocol.value)?,
        }
    }
    if let Some(fragment) = rule.fragment {
        out.push_str(if fragment.negated { " ! -f" } else { " -f" });
    }
    for one in rule.matches.iter() {
        write!(out, "{before} -m {}", one.options.extension.name)?;
        one.options.print(out);
    }
    Ok(())
}

/// What a rule does as it is saved.
pub(crate) fn target<'a>(
    verdict: &TargetVerdict,
    name: impl Fn(&ChainIndex) -> &'a str,
    out: &mut String,
) -> std::fmt::Result {
    match verdict {
        TargetVerdict::Continue => {}
        TargetVerdict::Accept => out.push_str(" -j ACCEPT"),
        TargetVerdict::Drop => out.push_str(" -j DROP"),
        TargetVerdict::Queue => out.push_str(" -j QUEUE"),
        TargetVerdict::Return => out.push_str(" -j RETURN"),
        TargetVerdict::Jump(chain) => write!(out, " -j {}", name(chain))?,
        TargetVerdict::Goto(chain) => write!(out, " -g {}", name(chain))?,
        TargetVerdict::Extension(options) => {
            write!(out, " -j {}", options.extension.name)?;
            options.print(out);
        }
    }
    Ok(())
}

fn address(letter: char, given: Option<&Given<AddressMask>>, out: &mut String) -> std::fmt::Result {
    let Some(given) = given else { return Ok(()) };
    let any = match given.value.mask {
        IpAddr::V4(mask) => mask.is_unspecified(),
        IpAddr::V6(mask) => mask.is_unspecified(),
    };
    if any && !given.negated {
        return Ok(());
    }
    let bang = if given.negated { " !" } else { "" };
    write!(out, "{bang} -{letter} {}{}", Ip(given.value.address), given.value.mask_text())
}

fn device(letter: char, given: Option<&Given<Interface>>, out: &mut String) -> std::fmt::Result {
    match given {
        Some(given) if !given.value.is_any() => {
            let bang = if given.negated { " !" } else { "" };
            write!(out, "{bang} -{letter} {}", given.value.pattern)
        }
        _ => Ok(()),
    }
}
