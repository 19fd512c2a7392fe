//! Derived fields: values that take more than one load to compute, each tested like any other field.

use crate::entities::Set;
use crate::field::End;

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
    /// TCP options: 0 the option is absent, 1 present (net/netfilter/xt_tcpudp.c, `tcp_find_option`).
    TcpOption {
        /// The option's kind.
        kind: u8,
    },
    /// DCCP options: 0 the option is absent, 1 present, 2 the header is malformed (net/netfilter/xt_dccp.c).
    DccpOption {
        /// The option's kind.
        kind: u8,
    },
    /// SCTP chunks: 0 the condition fails, 1 holds, 2 the packet is malformed (net/netfilter/xt_sctp.c,
    /// `match_packet`).
    SctpChunks {
        /// Which chunks, and how many of them, make it hold.
        rule: SctpRule,
        /// The chunk types, as a 256-bit map of eight words, type 0 the lowest bit of word 0.
        chunks: [u32; 8],
        /// Flags to compare for some chunk types.
        flags: Vec<SctpFlags>,
    },
    /// xt_u32: 1 if the program holds, 0 if not (net/netfilter/xt_u32.c).
    U32(U32Program),
    /// An IPv6 extension header and its contents: 0 absent or cut short (see `malformed` per kind in `eval`),
    /// 1 present and as asked, 2 malformed.
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
    /// A mobility header's type (net/ipv6/netfilter/ip6t_mh.c).
    Mh {
        /// Closed range of types.
        kinds: (u8, u8),
        /// The range was negated.
        negate: bool,
    },
}
