//! Guards: what each match does with packets whose header it can't read.
//!
//! x_tables' matches look at the fragment offset first and then ask for as many bytes of the transport header as their
//! struct has; where those aren't there they set hotdrop. iptables-nft 1.8.9 translates `tcp`, `udp` and `mark` to nft
//! expressions (iptables/nft.c, `add_match`), whose payload loads don't look at the fragment offset and fail quietly
//! where bytes are missing (net/netfilter/nft_core.c, `nft_payload_fast_eval`); every other match runs x_tables' code
//! behind nft_compat, hotdrop included.

use polc_ir::cube::Test;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::interval::IntervalSet;

use super::Body;

/// Sizes of headers, in bytes, as the kernel's matches ask for them.
pub(super) mod size {
    /// `struct tcphdr`.
    pub(crate) const TCP: u16 = 20;
    /// `struct udphdr`.
    pub(crate) const UDP: u16 = 8;
    /// `struct icmphdr` and `struct icmp6hdr`.
    pub(crate) const ICMP: u16 = 8;
    /// `struct sctphdr`.
    pub(crate) const SCTP: u16 = 12;
    /// `struct dccp_hdr`.
    pub(crate) const DCCP: u16 = 12;
    /// `struct ip_esp_hdr`.
    pub(crate) const ESP: u16 = 8;
    /// `struct ip_auth_hdr`.
    pub(crate) const AH: u16 = 12;
    /// `struct ip6_mh`.
    pub(crate) const MH: u16 = 6;
    /// Two ports.
    pub(crate) const PORTS: u16 = 4;
}

/// Later fragments don't match, and a header cut short drops the packet.
pub(super) fn transport_header(bytes: u16, body: &mut Body<'_>) {
    body.require_values(Field::FragOffset, false, IntervalSet::point(0));
    let short = shorter_than(bytes, body);
    body.hotdrop(vec![short]);
}

/// A header cut short doesn't match; fragments are not looked at.
pub(super) fn bytes_or_no_match(bytes: u16, body: &mut Body<'_>) {
    body.require_values(Field::L4Len, true, IntervalSet::range(0, u128::from(bytes) - 1));
}

/// xt_tcpudp's TCP match drops fragments at offset 1, which overwrite the flags (RFC 1858), before anything else
/// (net/netfilter/xt_tcpudp.c, `tcp_mt`).
pub(super) fn tcp_header(body: &mut Body<'_>) {
    // For IPv6 the kernel compares an offset in bytes with 1, which never holds.
    if body.family() == Family::V4 {
        let overlap = Test::new(Field::FragOffset, Family::V4, IntervalSet::point(1));
        body.hotdrop(vec![overlap]);
    }
    transport_header(size::TCP, body);
}

/// The header is cut short.
pub(super) fn shorter_than(bytes: u16, body: &Body<'_>) -> Test {
    Test::new(Field::L4Len, body.family(), IntervalSet::range(0, u128::from(bytes) - 1))
}
