//! Address families, hooks and tables, in netfilter's own words and order.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address family of a rule set: iptables (IPv4) or ip6tables (IPv6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "4")]
    V4,
    /// IPv6.
    #[serde(rename = "6")]
    V6,
}

impl Family {
    /// Width of an address, in bits.
    pub const fn address_bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }

    /// The EtherType, in host byte order.
    pub const fn ether_type(self) -> u16 {
        match self {
            Family::V4 => 0x0800,
            Family::V6 => 0x86dd,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A netfilter hook: where a base chain sits on a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Every received packet, before routing.
    Prerouting,
    /// Received packets for this host.
    Input,
    /// Received packets for other hosts.
    Forward,
    /// Packets this host makes.
    Output,
    /// Every packet that leaves, after routing.
    Postrouting,
}

impl Hook {
    /// All hooks, in a packet's order.
    pub const ALL: [Hook; 5] =
        [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

    /// The name of the base chain on this hook: `INPUT`.
    pub const fn chain_name(self) -> &'static str {
        match self {
            Hook::Prerouting => "PREROUTING",
            Hook::Input => "INPUT",
            Hook::Forward => "FORWARD",
            Hook::Output => "OUTPUT",
            Hook::Postrouting => "POSTROUTING",
        }
    }

    /// Whether the packet's input device is known at this hook.
    pub const fn has_in_device(self) -> bool {
        matches!(self, Hook::Prerouting | Hook::Input | Hook::Forward)
    }

    /// Whether the packet's output device is known at this hook.
    pub const fn has_out_device(self) -> bool {
        matches!(self, Hook::Forward | Hook::Output | Hook::Postrouting)
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        })
    }
}

impl FromStr for Hook {
    type Err = String;

    fn from_str(text: &str) -> Result<Hook, String> {
        Hook::ALL.into_iter().find(|hook| hook.to_string() == text || hook.chain_name() == text).ok_or_else(
            || format!("`{text}` is not a hook; known: prerouting, input, forward, output, postrouting"),
        )
    }
}

/// A table, which decides where its base chains run among those of the same hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableKind {
    /// Before connection tracking.
    Raw,
    /// Packet and mark rewriting.
    Mangle,
    /// Address translation; sees a connection's first packet only.
    Nat,
    /// Filtering.
    Filter,
    /// Mandatory access control marks.
    Security,
}

impl TableKind {
    /// All tables, in the order of their priorities.
    pub const ALL: [TableKind; 5] =
        [TableKind::Raw, TableKind::Mangle, TableKind::Nat, TableKind::Filter, TableKind::Security];

    /// The hooks on which this table has base chains, in hook order (net/ipv4/netfilter/iptable_*.c,
    /// `valid_hooks`).
    pub const fn hooks(self) -> &'static [Hook] {
        match self {
            TableKind::Raw => &[Hook::Prerouting, Hook::Output],
            TableKind::Mangle => &Hook::ALL,
            TableKind::Nat => &[Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting],
            TableKind::Filter | TableKind::Security => &[Hook::Input, Hook::Forward, Hook::Output],
        }
    }

    /// The priority of this table's base chain on `hook`; lower runs first
    /// (include/uapi/linux/netfilter_ipv4.h, `enum nf_ip_hook_priorities`).
    pub const fn priority(self, hook: Hook) -> i32 {
        match self {
            TableKind::Raw => -300,
            TableKind::Mangle => -150,
            TableKind::Nat => match hook {
                Hook::Prerouting | Hook::Output => -100,
                Hook::Input | Hook::Forward | Hook::Postrouting => 100,
            },
            TableKind::Filter => 0,
            TableKind::Security => 50,
        }
    }
}

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TableKind::Raw => "raw",
            TableKind::Mangle => "mangle",
            TableKind::Nat => "nat",
            TableKind::Filter => "filter",
            TableKind::Security => "security",
        })
    }
}

impl FromStr for TableKind {
    type Err = String;

    fn from_str(text: &str) -> Result<TableKind, String> {
        TableKind::ALL
            .into_iter()
            .find(|table| table.to_string() == text)
            .ok_or_else(|| format!("`{text}` is not a table; known: raw, mangle, nat, filter, security"))
    }
}

/// Whose corner cases a rule set follows where iptables-legacy and iptables-nft differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Semantics {
    /// iptables-legacy: x_tables, with hotdrop.
    #[default]
    Legacy,
    /// iptables-nft: matches translated to nftables expressions; nothing is dropped by a match.
    Nft,
}
