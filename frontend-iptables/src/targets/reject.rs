//! `-j REJECT`: drops the packet and answers with an error.

use polc_ir::hook::{Hook, TableKind};

use crate::ast::Given;
use crate::codes;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Place, Printer, Spec};
use crate::value::abbreviates;

/// The options of `-j REJECT` for IPv4.
#[derive(Clone, Debug, PartialEq)]
pub struct Reject4 {
    /// `--reject-with`; port unreachable if not given.
    pub with: Given<RejectWith>,
}

/// The options of `-j REJECT` for IPv6.
#[derive(Clone, Debug, PartialEq)]
pub struct Reject6 {
    /// `--reject-with`; port unreachable if not given.
    pub with: Given<RejectWith>,
}

/// The answer to a rejected packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RejectWith {
    /// ICMP destination unreachable (type 3 for IPv4, 1 for IPv6) with this code.
    Unreachable(u8),
    /// A TCP segment with RST.
    TcpReset,
}

type Row = (&'static str, &'static str, RejectWith);

/// Names and aliases for IPv4, in the order in which abbreviations are matched.
const ANSWERS_V4: &[Row] = &[
    ("icmp-net-unreachable", "net-unreach", RejectWith::Unreachable(0)),
    ("icmp-host-unreachable", "host-unreach", RejectWith::Unreachable(1)),
    ("icmp-proto-unreachable", "proto-unreach", RejectWith::Unreachable(2)),
    ("icmp-port-unreachable", "port-unreach", RejectWith::Unreachable(3)),
    ("icmp-net-prohibited", "net-prohib", RejectWith::Unreachable(9)),
    ("icmp-host-prohibited", "host-prohib", RejectWith::Unreachable(10)),
    ("tcp-reset", "tcp-rst", RejectWith::TcpReset),
    ("icmp-admin-prohibited", "admin-prohib", RejectWith::Unreachable(13)),
];

/// Names and aliases for IPv6.
const ANSWERS_V6: &[Row] = &[
    ("icmp6-no-route", "no-route", RejectWith::Unreachable(0)),
    ("icmp6-adm-prohibited", "adm-prohibited", RejectWith::Unreachable(1)),
    ("icmp6-addr-unreachable", "addr-unreach", RejectWith::Unreachable(3)),
    ("icmp6-port-unreachable", "port-unreach", RejectWith::Unreachable(4)),
    ("tcp-reset", "tcp-reset", RejectWith::TcpReset),
    ("icmp6-policy-fail", "policy-fail", RejectWith::Unreachable(5)),
    ("icmp6-reject-route", "reject-route", RejectWith::Unreachable(6)),
];

const WITH: u8 = 0;

const OPTIONS: &[OptionSpec] = &[OptionSpec::value(WITH, "reject-with", "type")];

const HOOKS: &[Hook] = &[Hook::Input, Hook::Forward, Hook::Output];

impl Extension for Reject4 {
    const SPEC: Spec = Spec::new(
        "REJECT",
        Families::V4,
        OPTIONS,
        "Drops the packet and answers with an ICMP error (`icmp-net-unreachable`, `icmp-host-unreachable`, \
         `icmp-proto-unreachable`, `icmp-port-unreachable`, `icmp-net-prohibited`, `icmp-host-prohibited`, \
         `icmp-admin-prohibited`) or, for TCP, with a reset (`tcp-reset`). Broadcasts, ICMP errors and fragments other \
         than the first are dropped without an answer.",
    )
    .tables(&[TableKind::Filter])
    .hooks(HOOKS);

    fn parse(options: &Options<'_>) -> Result<Reject4, Fault> {
        Ok(Reject4 { with: parse(options, ANSWERS_V4, RejectWith::Unreachable(3))? })
    }

    fn print(&self, out: &mut Printer<'_>) {
        print(out, ANSWERS_V4, self.with.value);
    }

    fn check(&self, place: &Place) -> Result<(), Fault> {
        check(self.with, place)
    }
}

impl Extension for Reject6 {
    const SPEC: Spec = Spec::new(
        "REJECT",
        Families::V6,
        OPTIONS,
        "Drops the packet and answers with an ICMPv6 error (`icmp6-no-route`, `icmp6-adm-prohibited`, \
         `icmp6-addr-unreachable`, `icmp6-port-unreachable`, `icmp6-policy-fail`, `icmp6-reject-route`) or, for TCP, \
         with a reset (`tcp-reset`).",
    )
    .tables(&[TableKind::Filter])
    .hooks(HOOKS);

    fn parse(options: &Options<'_>) -> Result<Reject6, Fault> {
        Ok(Reject6 { with: parse(options, ANSWERS_V6, RejectWith::Unreachable(4))? })
    }

    fn print(&self, out: &mut Printer<'_>) {
        print(out, ANSWERS_V6, self.with.value);
    }

    fn check(&self, place: &Place) -> Result<(), Fault> {
        check(self.with, place)
    }
}

fn parse(options: &Options<'_>, answers: &[Row], default: RejectWith) -> Result<Given<RejectWith>, Fault> {
    let given = options.optional(WITH, |option| {
        let text = option.argument.text;
        let row = answers.iter().find(|(name, alias, _)| abbreviates(text, name) || abbreviates(text, alias));
        row.map(|&(_, _, with)| with).ok_or_else(|| {
            let names: Vec<&str> = answers.iter().map(|row| row.0).collect();
            option
                .argument
                .bad(format!("`{text}` is no way to reject"))
                .hint(format!("they are {}", names.join(", ")))
        })
    })?;
    Ok(given.unwrap_or(Given { value: default, negated: false, span: options.span }))
}

fn print(out: &mut Printer<'_>, answers: &[Row], with: RejectWith) {
    if let Some((name, ..)) = answers.iter().find(|row| row.2 == with) {
        out.option("reject-with", name);
    }
}

/// net/ipv4/netfilter/ipt_REJECT.c and net/ipv6/netfilter/ip6t_REJECT.c: only TCP can be reset.
fn check(with: Given<RejectWith>, place: &Place) -> Result<(), Fault> {
    if with.value == RejectWith::TcpReset && place.protocol != Some(6) {
        return Err(Fault::new(codes::WRONG_PROTOCOL, "`tcp-reset` needs `-p tcp`").at(with.span));
    }
    Ok(())
}
