//! What every rule can ask of a packet without a match: addresses, devices, protocol, fragment.
//!
//! The order is `ip_packet_match`'s (net/ipv4/netfilter/ip_tables.c) and `ip6_packet_match`'s
//! (net/ipv6/netfilter/ip6_tables.c).

use std::net::IpAddr;

use polc_ir::cube::Test;
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Semantics};
use polc_ir::interval::IntervalSet;
use polc_ir::source::bytes;

use super::Body;
use crate::ast::{Given, RuleAst};
use crate::value::{AddressMask, Interface};

/// Adds the clauses of a rule's own options.
pub(super) fn lower(ast: &RuleAst, body: &mut Body<'_>) {
    address(Field::SrcAddr, ast.source.as_deref(), body);
    address(Field::DstAddr, ast.destination.as_deref(), body);
    device(Field::InDevice, ast.in_interface.as_ref(), body);
    device(Field::OutDevice, ast.out_interface.as_ref(), body);
    if let Some(protocol) = ast.protocol {
        body.span = protocol.span;
        // `-p all` walks the headers as well, but for nft, which then asks for nothing.
        let walks =
            body.family() == Family::V6 && (protocol.value != 0 || body.semantics() == Semantics::Legacy);
        if walks {
            readable_extension_headers(body);
        }
    }
    if let Some(protocol) = ast.protocol.filter(|protocol| protocol.value != 0) {
        if body.family() == Family::V6 && body.semantics() == Semantics::Nft {
            nft_protocol(protocol.value, protocol.negated, body);
        } else {
            body.require_values(Field::Proto, protocol.negated, IntervalSet::point(protocol.value.into()));
        }
    }
    if let Some(fragment) = ast.fragment {
        body.span = fragment.span;
        body.require_values(Field::FragOffset, fragment.negated, IntervalSet::range(1, 0x1fff));
    }
}

/// `-p` walks the extension headers. x_tables drops a packet whose chain is malformed (`ip6_packet_match`, hotdrop);
/// nft_meta has no value for it, so the rule does not match (net/netfilter/nft_meta.c, `NFT_META_L4PROTO`).
fn readable_extension_headers(body: &mut Body<'_>) {
    match body.semantics() {
        Semantics::Legacy => {
            let malformed = Test { field: Field::ExtHeaders, mask: 1, values: IntervalSet::point(1) };
            body.hotdrop(vec![malformed]);
        }
        // What comes after an authentication header is not looked at.
        Semantics::Nft => body.require_values(Field::ExtHeaders, true, IntervalSet::point(1)),
    }
}

/// nftables' walk over IPv6's extension headers stops at an authentication header, which is then the protocol
/// (include/net/netfilter/nf_tables_ipv6.h, `__nft_set_pktinfo_ipv6_validate`, with `IP6_FH_F_AUTH`).
fn nft_protocol(protocol: u16, negated: bool, body: &mut Body<'_>) {
    const AUTHENTICATION: u16 = 51;
    let authenticated = Test { field: Field::ExtHeaders, mask: 2, values: IntervalSet::point(2) };
    let equal = Test::new(Field::Proto, Family::V6, IntervalSet::point(protocol.into()));
    match (protocol == AUTHENTICATION, negated) {
        (true, _) => body.require_unless(negated, authenticated),
        (false, false) => {
            body.require_unless(true, authenticated);
            body.require(equal);
        }
        (false, true) => body.require_any(&[authenticated, equal.negated(Family::V6)]),
    }
}

fn address(field: Field, given: Option<&Given<AddressMask>>, body: &mut Body<'_>) {
    let Some(given) = given else { return };
    body.span = given.span;
    let test = Test::masked(field, body.family(), bits(given.value.address), bits(given.value.mask));
    body.require_unless(given.negated, test);
}

/// An address as a number, the first byte on the wire the most significant.
pub(crate) fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// A device name is compared byte by byte under a mask: a whole name with its final NUL, a wildcard without
/// (include/linux/netfilter/x_tables.h, `ifname_compare_aligned`).
fn device(field: Field, given: Option<&Given<Interface>>, body: &mut Body<'_>) {
    let Some(given) = given else { return };
    if given.value.is_any() && !given.negated {
        return;
    }
    body.span = given.span;
    let name = given.value.name();
    // The parser holds names to 15 bytes; an empty prefix fits every device.
    let value = DeviceName::new(name).map_or(0, DeviceName::value);
    let len = if given.value.is_wildcard() { bytes::count(name) } else { 16 };
    let test = Test::masked(field, body.family(), value, DeviceName::prefix_mask(len));
    body.require_unless(given.negated, test);
}
