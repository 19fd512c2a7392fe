//! Derived fields: values that take more than one load to compute, each tested like any other field.

use crate::entities::Set;
use crate::env::Env;
use crate::field::End;
use crate::hook::Family;
use crate::interval::Interval;
use crate::packet::View;

mod extension;
mod program;
mod transport;

pub use transport::DCCP_TYPE_WORDS;

/// How a derived field's value comes about. All are 32 bits wide.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DerivedData {
    /// 1 if the packet is in the set, 0 if not. `ends` says for each dimension of the set which end of the packet is
    /// looked up (`--match-set NAME src,dst`).
    Member {
        /// The set.
        set: Set,
        /// One end for each dimension, as the user gave them. The kernel ignores ends beyond the set's dimensions.
        ends: Vec<End>,
        /// `--return-nomatch`: hold for elements marked `nomatch` instead.
        return_nomatch: bool,
    },
    /// The kind of an address, `RTN_*` of include/uapi/linux/rtnetlink.h: 1 unicast, 2 local, 3 broadcast,
    /// 4 anycast, 5 multicast.
    AddressType {
        /// Whose address.
        of: End,
        /// Only addresses of this device count as local.
        device: Option<DeviceLimit>,
    },
    /// TCP options: 0 the option is absent, 1 present, 2 the options are cut short (net/netfilter/xt_tcpudp.c,
    /// `tcp_find_option`).
    TcpOption {
        /// The option's kind.
        kind: u8,
    },
    /// DCCP options: 0 the option is absent, 1 present, 2 the header is malformed, [`BEYOND`] not among the first
    /// [`crate::limits::DCCP_OPTIONS_MAX`] (net/netfilter/xt_dccp.c, `dccp_find_option`).
    DccpOption {
        /// The option's kind.
        kind: u8,
    },
    /// SCTP chunks: 0 the condition fails, 1 holds, 2 the packet is malformed, [`BEYOND`] the first
    /// [`crate::limits::SCTP_CHUNKS_MAX`] do not tell (net/netfilter/xt_sctp.c, `match_packet`).
    SctpChunks {
        /// Which chunks, and how many of them, make it hold.
        rule: SctpRule,
        /// The chunk types, as a 256-bit map of eight words, type 0 the lowest bit of word 0.
        chunks: [u32; 8],
        /// Flags to compare for some chunk types, each once.
        flags: Vec<SctpFlags>,
    },
    /// xt_u32: 1 if the program holds, 0 if not (net/netfilter/xt_u32.c).
    U32(U32Program),
    /// An IPv6 extension header and its contents: 1 present and as asked, 0 not, 2 malformed, which the kernel's match
    /// drops (net/ipv6/netfilter/ip6t_{ah,frag,hbh,rt}.c).
    Ipv6Header(Ipv6HeaderTest),
}

/// Which device's addresses count as local (`--limit-iface-in`, `--limit-iface-out`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceLimit {
    /// The input device's.
    In,
    /// The output device's.
    Out,
}

/// How many of the named chunks must be there (include/uapi/linux/netfilter/xt_sctp.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SctpRule {
    /// Any of them.
    Any,
    /// All of them.
    All,
    /// None but them.
    Only,
}

/// Flags to compare in chunks of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SctpFlags {
    /// The chunk type.
    pub chunk: u8,
    /// Which flag bits count.
    pub mask: u8,
    /// Their value.
    pub value: u8,
}

/// A `u32` program: all tests must hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct U32Program {
    /// The tests, joined by `&&`.
    pub tests: Vec<U32Test>,
}

/// One test of a `u32` program.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct U32Test {
    /// Where the first word is loaded from, in bytes from the network header.
    pub start: u32,
    /// What is done with it.
    pub ops: Vec<U32Op>,
    /// Closed ranges; the result must lie in one.
    pub ranges: Vec<(u32, u32)>,
}

/// An operation of a `u32` program on the value so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum U32Op {
    /// `&`
    And(u32),
    /// `<<`
    ShiftLeft(u32),
    /// `>>`
    ShiftRight(u32),
    /// `@`: move the origin by the value, and load the word at this offset from it.
    At(u32),
}

/// What is asked of an IPv6 extension header.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ipv6HeaderTest {
    /// xt_ah for IPv6: SPI range, length in bytes (0: any), reserved field zero (net/ipv6/netfilter/ip6t_ah.c).
    Ah {
        /// Closed range of SPIs.
        spi: (u32, u32),
        /// `--ahspi` was negated.
        spi_negate: bool,
        /// Header length in bytes; 0 asks nothing.
        len: u32,
        /// `--ahlen` was negated.
        len_negate: bool,
        /// The reserved field must be zero.
        reserved: bool,
    },
    /// A Fragment header (net/ipv6/netfilter/ip6t_frag.c).
    Frag {
        /// Closed range of identifications.
        id: (u32, u32),
        /// `--fragid` was negated.
        id_negate: bool,
        /// `--fraglen`: bytes; `None` asks nothing. The kernel never reads it.
        len: Option<u32>,
        /// The reserved fields must be zero.
        reserved: bool,
        /// Offset 0.
        first: bool,
        /// More fragments follow.
        more: bool,
        /// No more follow.
        last: bool,
    },
    /// Hop-by-hop or destination options (net/ipv6/netfilter/ip6t_hbh.c).
    Options {
        /// Destination options rather than hop-by-hop.
        destination: bool,
        /// Header length in bytes; `None` asks nothing.
        len: Option<u32>,
        /// The length was negated.
        len_negate: bool,
        /// Option types, each with its length if asked, in the order they must appear.
        options: Vec<(u8, Option<u8>)>,
    },
    /// A routing header (net/ipv6/netfilter/ip6t_rt.c).
    Rt {
        /// The routing type.
        kind: Option<u32>,
        /// The type was negated.
        kind_negate: bool,
        /// Closed range of segments left.
        segments_left: (u32, u32),
        /// The range was negated.
        segments_left_negate: bool,
        /// Header length in bytes; `None` asks nothing.
        len: Option<u32>,
        /// The length was negated.
        len_negate: bool,
        /// The reserved field must be zero.
        reserved: bool,
        /// Addresses a type 0 header must hold, in order.
        addresses: Vec<u128>,
        /// The addresses may have others between them.
        not_strict: bool,
    },
}

/// What a search found that could not go on to its end: more than the bounds of [`crate::limits`] allow. Lowering leaves
/// such packets to the kernel ([`crate::ruleset::ClauseKind::Beyond`]).
pub const BEYOND: u32 = 3;

/// The value of a derived field that depends on the packet's bytes alone. Membership and address types depend on more
/// and are 0 here. Transport headers are searched only in packets of their protocol; for others the value is 0.
pub fn eval(data: &DerivedData, view: &View<'_>) -> u32 {
    match data {
        DerivedData::Member { .. } | DerivedData::AddressType { .. } => 0,
        DerivedData::TcpOption { .. } if view.protocol() != TCP => 0,
        DerivedData::TcpOption { kind } => transport::tcp_option(*kind, view.l4()),
        DerivedData::DccpOption { .. } if view.protocol() != DCCP => 0,
        DerivedData::DccpOption { kind } => transport::dccp_option(*kind, view.l4()),
        DerivedData::SctpChunks { .. } if view.protocol() != SCTP => 0,
        DerivedData::SctpChunks { rule, chunks, flags } => {
            transport::sctp_chunks(*rule, chunks, flags, view.l4())
        }
        DerivedData::U32(program) => program::u32_program(program, view.packet()).into(),
        DerivedData::Ipv6Header(_) if view.family() == Family::V4 => 0,
        DerivedData::Ipv6Header(test) => extension::ipv6_header(test, view.packet()),
    }
}

/// Protocol numbers of the transport headers that are searched.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const DCCP: u8 = 33;
/// See [`TCP`].
pub const SCTP: u8 = 132;

/// `RTN_*` of an address: multicast and the limited broadcast by themselves, local and broadcast by `env`.
pub fn address_type(family: Family, env: &Env, address: u128) -> u8 {
    address_types(family, env).iter().find(|(range, _)| range.contains(address)).map_or(1, |(_, kind)| *kind)
}

/// Ranges of addresses that are not unicast, with their `RTN_*`; the first that holds an address decides.
pub fn address_types(family: Family, env: &Env) -> Vec<(Interval, u8)> {
    let mut types: Vec<(Interval, u8)> = Vec::new();
    types.extend(env.broadcast.iter().map(|&range| (range, 3)));
    types.extend(env.local.iter().flatten().map(|&range| (range, 2)));
    let fixed: &[(u128, u128, u8)] = match family {
        Family::V4 => &[
            (0x7fff_ffff, 0x7fff_ffff, 3),
            (0x7f00_0000, 0x7fff_ffff, 2),
            (0xffff_ffff, 0xffff_ffff, 3),
            (0, 0, 3),
            (0xe000_0000, 0xefff_ffff, 5),
        ],
        Family::V6 => &[(1, 1, 2), (0xff00 << 112, u128::MAX, 5)],
    };
    types.extend(fixed.iter().filter_map(|&(lo, hi, kind)| Some((Interval::new(lo, hi)?, kind))));
    types
}
