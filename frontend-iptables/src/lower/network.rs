//! What the matches on network headers and packet metadata mean.
//!
//! Sources: xt_iprange.c, xt_length.c, xt_dscp.c, xt_ecn.c, xt_hl.c, xt_mac.c, xt_mark.c, xt_pkttype.c, xt_addrtype.c,
//! xt_conntrack.c, xt_set.c (net/netfilter), and the ip6t_* matches of net/ipv6/netfilter.

use polc_ir::cube::Test;
use polc_ir::derived::{DerivedData, DeviceLimit, Ipv6HeaderTest};
use polc_ir::field::{EXT_HEADERS_BEYOND, EXT_HEADERS_CUT, End, Field};
use polc_ir::hook::Family;
use polc_ir::interval::{Interval, IntervalSet};
use polc_ir::ruleset::ClauseKind;

use super::Body;
use super::guards;

/// A closed range of a field's values.
pub(crate) fn range(field: Field, lo: u128, hi: u128, negated: bool, body: &mut Body<'_>) {
    body.require_values(field, negated, IntervalSet::range(lo, hi));
}

/// A value under a mask. A value with bits outside the mask never occurs.
pub(crate) fn masked(field: Field, value: u128, mask: u128, negated: bool, body: &mut Body<'_>) {
    if value & !mask != 0 {
        if !negated {
            body.never();
        }
        return;
    }
    let test = Test::masked(field, body.family(), value, mask);
    body.require_unless(negated, test);
}

/// Any of these bits is set.
pub(crate) fn any_bit(field: Field, bits: u128, negated: bool, body: &mut Body<'_>) {
    let test = Test { field, mask: bits, values: IntervalSet::range(1, u128::MAX >> 1) };
    let none = Test { field, mask: bits, values: IntervalSet::point(0) };
    body.require(if negated { none } else { test });
}

/// DSCP is the upper six bits of the type of service.
pub(crate) fn dscp(class: u8, negated: bool, body: &mut Body<'_>) {
    let test = Test { field: Field::Tos, mask: 0xfc, values: IntervalSet::point(u128::from(class) << 2) };
    body.require_unless(negated, test);
}

/// xt_ecn: the two bits of the network header.
pub(crate) fn ecn_bits(value: u8, negated: bool, body: &mut Body<'_>) {
    let test = Test { field: Field::Tos, mask: 3, values: IntervalSet::point(value.into()) };
    body.require_unless(negated, test);
}

/// xt_ecn: a TCP flag (ECE 0x40, CWR 0x80). A header cut short does not match (net/netfilter/xt_ecn.c, `match_tcp`).
///
/// Fragments are not looked at. IPv6 has no offset of a transport header for later ones (net/ipv6/exthdrs_core.c,
/// `ipv6_find_hdr`), and so the match reads its byte 13 of the packet, which is the source address's byte 5.
pub(crate) fn ecn_flag(flag: u8, negated: bool, body: &mut Body<'_>) {
    const SOURCE_SHIFT: u32 = 8 * (15 - 5);
    let family = body.family();
    let is = |field, shift: u32| {
        let bit = u128::from(flag) << shift;
        let test = Test { field, mask: bit, values: IntervalSet::point(bit) };
        if negated { test.negated(family) } else { test }
    };
    if family == Family::V4 {
        guards::bytes_or_no_match(guards::size::TCP, body);
        return body.require(is(Field::TcpFlags, 0));
    }
    let first = Test::new(Field::FragOffset, family, IntervalSet::point(0));
    let later = first.negated(family);
    body.require_any(&[guards::shorter_than(guards::size::TCP, body).negated(family), later.clone()]);
    body.require_any(&[is(Field::TcpFlags, 0), later]);
    body.require_any(&[is(Field::SrcAddr, SOURCE_SHIFT), first]);
}

/// xt_addrtype: the address is of one of the types, bits of `1 << RTN_*`; for IPv6 see [`address_type_v6`].
pub(crate) fn address_type(
    of: End,
    types: u16,
    device: Option<DeviceLimit>,
    negated: bool,
    body: &mut Body<'_>,
) {
    if body.family() == Family::V6 {
        return address_type_v6(of, types, device, negated, body);
    }
    let field = Field::Derived(body.ruleset.derive(DerivedData::AddressType { of, device }));
    let values: IntervalSet =
        (0..16u128).filter(|kind| types >> kind & 1 == 1).map(Interval::point).collect();
    body.require_values(field, negated, values);
}

/// xt_addrtype for IPv6 (net/netfilter/xt_addrtype.c, `match_type6`): multicast, unicast and unspecified are what an
/// address looks like (net/ipv6/addrconf_core.c, `__ipv6_addr_type`), a local one among them; each of them that is named
/// has to hold, and then one of those that a route tells.
fn address_type_v6(of: End, types: u16, device: Option<DeviceLimit>, negated: bool, body: &mut Body<'_>) {
    const UNSPEC: u16 = 1 << 0;
    const UNICAST: u16 = 1 << 1;
    const LOCAL: u16 = 1 << 2;
    const ANYCAST: u16 = 1 << 4;
    const MULTICAST: u16 = 1 << 5;
    const UNREACHABLE: u16 = 1 << 7;
    const MULTICASTS: (u128, u128) = (0xff << 120, u128::MAX);
    /// IPv4's addresses in sockets.
    const MAPPED: (u128, u128) = (0xffff << 32, 0xffff_ffff_ffff);
    let address = Field::address(of);
    let test = |values: IntervalSet| Test::new(address, Family::V6, values);
    let mut tests = Vec::new();
    if types & MULTICAST != 0 {
        tests.push(test(IntervalSet::range(MULTICASTS.0, MULTICASTS.1)));
    }
    if types & UNICAST != 0 {
        let others = [(0, 0), MAPPED, MULTICASTS];
        let others: IntervalSet = others.iter().filter_map(|&(lo, hi)| Interval::new(lo, hi)).collect();
        tests.push(test(others).negated(Family::V6));
    }
    if types & UNSPEC != 0 {
        tests.push(test(IntervalSet::point(0)));
    }
    let asks_routes = types & (ANYCAST | UNREACHABLE) != 0;
    if types & LOCAL != 0 && !asks_routes {
        let field = Field::Derived(body.ruleset.derive(DerivedData::AddressType { of, device }));
        tests.push(Test::new(field, Family::V6, IntervalSet::point(2)));
    }
    if negated && !asks_routes {
        let tests: Vec<Test> = tests.iter().map(|test| test.negated(Family::V6)).collect();
        return body.require_any(&tests);
    }
    if !negated {
        tests.into_iter().for_each(|test| body.require(test));
    }
    if asks_routes {
        body.opaque("addrtype", "asks the routes of IPv6 for anycast or unreachable addresses");
    }
}

/// xt_set's membership.
pub(crate) fn member(name: &str, ends: Vec<End>, return_nomatch: bool, negated: bool, body: &mut Body<'_>) {
    let set = body.set(name);
    let field = Field::Derived(body.ruleset.derive(DerivedData::Member { set, ends, return_nomatch }));
    body.require_values(field, negated, IntervalSet::point(1));
}

/// xt_ipv6header: of the headers in `mask` (`MASK_*` of include/uapi/linux/netfilter_ipv6/ip6t_ipv6header.h), exactly
/// these, or with `soft` at least these; negated, not exactly these or with `soft` none of these. Nothing holds for a
/// chain that is cut short.
pub(crate) fn ipv6_headers(mask: u8, soft: bool, negated: bool, body: &mut Body<'_>) {
    const FIELD: Field = Field::ExtHeaderMask;
    let bits = u128::from(mask);
    let (cut, beyond) = (u128::from(EXT_HEADERS_CUT), u128::from(EXT_HEADERS_BEYOND));
    body.push(ClauseKind::Beyond(Box::new(Test {
        field: FIELD,
        mask: beyond,
        values: IntervalSet::point(beyond),
    })));
    body.require(Test { field: FIELD, mask: cut, values: IntervalSet::point(0) });
    let asked = |value| Test {
        field: FIELD,
        mask: if soft { bits } else { 0xff },
        values: IntervalSet::point(value),
    };
    match (soft, negated) {
        (true, true) => body.require(asked(0)),
        (false, true) => body.require_unless(true, asked(bits)),
        (_, false) => body.require(asked(bits)),
    }
}

/// ip6t_mh: mobility headers of these types. One that something follows is dropped.
pub(crate) fn mobility(kinds: (u8, u8), negated: bool, body: &mut Body<'_>) {
    const NOTHING_FOLLOWS: u128 = 59;
    guards::transport_header(guards::size::MH, body);
    let followed =
        Test::new(Field::L4Bytes { offset: 0, len: 1 }, body.family(), IntervalSet::point(NOTHING_FOLLOWS));
    body.hotdrop(vec![followed.negated(body.family())]);
    let values = IntervalSet::range(kinds.0.into(), kinds.1.into());
    body.require_values(Field::L4Bytes { offset: 2, len: 1 }, negated, values);
}

/// An IPv6 extension header and its contents.
pub(crate) fn ipv6_header(test: Ipv6HeaderTest, body: &mut Body<'_>) {
    let family = body.family();
    let field = Field::Derived(body.ruleset.derive(DerivedData::Ipv6Header(test)));
    body.hotdrop(vec![Test::new(field, family, IntervalSet::point(2))]);
    body.require_values(field, false, IntervalSet::point(1));
}
