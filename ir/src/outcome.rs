//! What became of a packet.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::entities::{Chain, Rule};
use crate::ruleset::RejectWith;

/// A packet's fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes on.
    Accept,
    /// It is dropped.
    Drop,
    /// It is dropped and answered.
    Reject(RejectWith),
    /// Not decided here: the kernel's own rules do.
    Defer,
}

impl Verdict {
    /// The verdict in one word: `accept`, `drop`, `reject`, `defer`.
    pub const fn word(self) -> &'static str {
        match self {
            Verdict::Accept => "accept",
            Verdict::Drop => "drop",
            Verdict::Reject(_) => "reject",
            Verdict::Defer => "defer",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Reject(RejectWith::TcpReset) => f.write_str("reject with tcp-reset"),
            Verdict::Reject(RejectWith::Icmp { kind, code }) => write!(f, "reject with icmp {kind}/{code}"),
            _ => f.write_str(self.word()),
        }
    }
}

/// Why a frame never reached the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// Shorter than an Ethernet header.
    Runt,
    /// Not IPv4 or IPv6 (ARP, LLDP, ...): no table of iptables sees it. Accepted.
    NotIp,
    /// IP, but not of the rule set's family. Accepted: the other family's rules decide it.
    OtherFamily,
    /// It carries a VLAN tag with an id other than 0, so it belongs to another device. Deferred in accelerate mode,
    /// dropped in replace mode.
    Vlan,
    /// A network header that `ip_rcv` or `ipv6_rcv` drops before the first hook: version, header length, total length
    /// (net/ipv4/ip_input.c, net/ipv6/ip6_input.c). Dropped.
    Malformed,
    /// It came by, or leaves by, a device that the object was not told about, and the rules tell devices apart.
    /// Deferred in accelerate mode, dropped in replace mode.
    UnknownDevice,
    /// It has more IPv6 extension headers than [`crate::limits::IPV6_EXT_HEADERS_MAX`], which no packet with a purpose
    /// has. Deferred in accelerate mode, dropped in replace mode.
    ManyHeaders,
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FrameKind::Runt => "runt frame",
            FrameKind::NotIp => "not IP",
            FrameKind::OtherFamily => "other address family",
            FrameKind::Vlan => "VLAN tag",
            FrameKind::Malformed => "malformed network header",
            FrameKind::UnknownDevice => "undeclared device",
            FrameKind::ManyHeaders => "too many extension headers",
        })
    }
}

/// Who decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decider {
    /// A rule's action. For [`Verdict::Defer`], the rule whose clause or action can't be evaluated, or that would
    /// have let the packet on if an earlier rule that can't be evaluated hadn't possibly dropped it, or that would have
    /// dropped it if it had no connection ([`crate::env::Connections::LookedUp`]).
    Rule(Rule),
    /// A clause of the rule that drops packets it can't read.
    Hotdrop(Rule),
    /// A base chain's policy.
    Policy(Chain),
    /// No rule: the path has no base chain, or the frame never reaches one.
    Frame(FrameKind),
    /// No base chain of the path has a rule, and none has a policy other than accept.
    Nothing,
}

impl fmt::Display for Decider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decider::Rule(rule) => write!(f, "{rule}"),
            Decider::Hotdrop(rule) => write!(f, "hotdrop in {rule}"),
            Decider::Policy(chain) => write!(f, "policy of {chain}"),
            Decider::Frame(kind) => write!(f, "{kind}"),
            Decider::Nothing => f.write_str("no rule"),
        }
    }
}

/// What a packet is counted for on its way: the numbers that `iptables-save -c` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Count {
    /// A rule all of whose clauses hold, whether or not its action ends the way (net/ipv4/netfilter/ip_tables.c,
    /// `ipt_do_table`: `ADD_COUNTER` before the target runs).
    Rule(Rule),
    /// A base chain's policy, which was taken.
    Policy(Chain),
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Count::Rule(rule) => write!(f, "{rule}"),
            Count::Policy(chain) => write!(f, "policy of {chain}"),
        }
    }
}

/// A verdict and who gave it: what every level has to agree on, and what the object counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ending {
    /// The packet's fate.
    pub verdict: Verdict,
    /// Who decided it.
    pub by: Decider,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.verdict, self.by)
    }
}

/// What became of a packet and of its mark, and what it was counted for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Outcome {
    /// Verdict and decider.
    pub ending: Ending,
    /// The packet's mark afterwards.
    pub mark: u32,
    /// What it was counted for, in order. A rule that it met twice is here twice.
    pub counted: Vec<Count>,
}

impl Outcome {
    /// Whether an object's ending and counts, which have no order, are this.
    pub fn is(&self, ending: Ending, counted: &[Count]) -> bool {
        let sorted = |counts: &[Count]| {
            let mut counts = counts.to_vec();
            counts.sort_unstable();
            counts
        };
        self.ending == ending && sorted(&self.counted) == sorted(counted)
    }
}
