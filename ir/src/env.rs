//! What surrounds a packet: the place where it is decided, the devices and addresses of the host, and the packet
//! itself as an input.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::field::DeviceName;
use crate::hook::Hook;
use crate::interval::Interval;

/// Where a program sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attach {
    /// XDP, on a device's receive path.
    Xdp,
    /// tc or tcx ingress.
    TcIngress,
    /// tc or tcx egress.
    TcEgress,
    /// A hook of netfilter, between the kernel's own chains.
    Netfilter,
}

impl fmt::Display for Attach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Attach::Xdp => "xdp",
            Attach::TcIngress => "tc-ingress",
            Attach::TcEgress => "tc-egress",
            Attach::Netfilter => "netfilter",
        })
    }
}

/// How an object is deployed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The kernel's own rules stay; the program drops early only what they would certainly drop.
    Accelerate,
    /// The kernel's own rules go; every rule has to be compiled.
    Replace,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Accelerate => "accelerate",
            Mode::Replace => "replace",
        })
    }
}

/// How fragments are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fragments {
    /// The rules may see the reassembled packet, so what reassembly changes
    /// ([`crate::field::Field::changes_with_reassembly`]) is unknown for every fragment. Where they always do, at IPv4's
    /// INPUT, no packet has an offset.
    Unresolved,
    /// The rules see each fragment as it is (no defragmentation at this hook).
    AsSeen,
}

/// What is known of the connection that a packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Connections {
    /// Nothing.
    Unknown,
    /// Whether the kernel's table has one for it, before the kernel itself looks
    /// (`bpf_xdp_ct_lookup`, net/netfilter/nf_conntrack_bpf.c): [`crate::field::Field::CtAbsent`].
    ///
    /// A packet without a connection is not ESTABLISHED, and which of the other states it will have is open. What has a
    /// connection may still become INVALID (a TCP window, a checksum), so its state is unknown. Rules are evaluated as
    /// for a packet without one; a drop that relied on that holds only where there is none.
    LookedUp {
        /// Whether the first packet of a connection may be RELATED: a helper (`-j CT --helper`) announces connections to
        /// come, `/proc/net/nf_conntrack_expect`.
        expectations: bool,
    },
    /// Its state, which a packet carries from connection tracking on (`skb->_nfct`), but neither its status nor whether
    /// its addresses are translated.
    State,
    /// Everything, given with the packet.
    Given,
}

/// What packets are counted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Counting {
    /// All that iptables' counters count: every rule that a packet meets and fits, and the policy that it comes to.
    #[default]
    Exact,
    /// Rules that accept, drop or reject it, and policies: what ends its way through a base chain.
    Terminal,
    /// Nothing.
    Off,
}

impl Counting {
    /// Whether a packet is counted for what ends its way through a base chain, or does not (`ends`).
    pub fn counts(self, ends: bool) -> bool {
        match self {
            Counting::Exact => true,
            Counting::Terminal => ends,
            Counting::Off => false,
        }
    }
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Counting::Exact => "exact",
            Counting::Terminal => "terminal",
            Counting::Off => "off",
        })
    }
}

/// What a program can know and do where it sits: which fields are given, which effects it may have.
///
/// A clause or action that needs more is *deferred*: its truth is unknown, and three-valued evaluation takes over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The hooks whose base chains are run, in order.
    pub path: Vec<Hook>,
    /// Where the program sits; `None` for the rule set's own meaning, where everything in `Env` is given.
    pub attach: Option<Attach>,
    /// How the object is deployed.
    pub mode: Mode,
    /// How fragments are decided.
    pub fragments: Fragments,
    /// What is known of the connection that a packet belongs to.
    pub connections: Connections,
    /// Whether the host's local addresses are given.
    pub local_addresses: bool,
    /// What packets are counted for.
    pub counters: Counting,
}

/// A network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its number.
    pub ifindex: u32,
    /// Its name.
    pub name: DeviceName,
}

/// What the host is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Env {
    /// The devices, in ascending order of number.
    pub devices: Vec<Device>,
    /// The host's own addresses, in the rule set's family; `None` if they aren't known.
    pub local: Option<Vec<Interval>>,
    /// The host's broadcast addresses beyond 255.255.255.255.
    pub broadcast: Vec<Interval>,
}

/// Connection state given with a packet, in the encoding of the `Ct*` fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Connection {
    /// See [`crate::field::Field::CtState`].
    pub state: u16,
    /// See [`crate::field::Field::CtStatus`].
    pub status: u32,
    /// See [`crate::field::Field::CtDirection`].
    pub reply: bool,
    /// See [`crate::field::Field::CtMark`].
    pub mark: u32,
}

impl Connection {
    /// Whether the kernel's table has the connection before it sees the packet. A connection gets there when its first
    /// packet has passed every hook (`__nf_conntrack_confirm`, net/netfilter/nf_conntrack_core.c).
    pub fn is_in_table(&self) -> bool {
        self.state & ct_state::ESTABLISHED != 0 || self.status & IPS_CONFIRMED != 0
    }
}

/// Bits of [`crate::field::Field::CtState`] (include/uapi/linux/netfilter/xt_conntrack.h).
pub mod ct_state {
    /// The kernel could not make sense of it.
    pub const INVALID: u16 = 0x01;
    /// It belongs to a connection that has seen packets both ways.
    pub const ESTABLISHED: u16 = 0x02;
    /// It begins a connection that another announced, or is an ICMP error about one.
    pub const RELATED: u16 = 0x04;
    /// It begins a connection.
    pub const NEW: u16 = 0x08;
    /// The connection's source address is translated.
    pub const SNAT: u16 = 0x40;
    /// The connection's destination address is translated.
    pub const DNAT: u16 = 0x80;
    /// Rules exempt it.
    pub const UNTRACKED: u16 = 0x100;
    /// The states of which a packet has one.
    pub const ALL: [u16; 5] = [INVALID, ESTABLISHED, RELATED, NEW, UNTRACKED];
}

/// Bit of [`crate::field::Field::CtStatus`] for connections in the table
/// (include/uapi/linux/netfilter/nf_conntrack_common.h).
pub const IPS_CONFIRMED: u32 = 1 << 3;

/// A packet and what the kernel knows about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Input {
    /// The frame, from the Ethernet header on, without its checksum.
    pub frame: Vec<u8>,
    /// Input device.
    pub in_device: Option<DeviceName>,
    /// Output device.
    pub out_device: Option<DeviceName>,
    /// The packet's mark on arrival.
    pub mark: u32,
    /// VLAN tag that the kernel took out of the frame, as the 16 bits of TCI.
    pub vlan: Option<u16>,
    /// Packet type; `None`: worked out from the destination MAC address.
    pub packet_type: Option<u8>,
    /// Connection state, if given.
    pub connection: Option<Connection>,
}
