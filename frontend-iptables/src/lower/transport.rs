//! What the matches on transport headers mean: ports, TCP flags and options, ICMP types, SPIs.
//!
//! Each function adds the clauses of one kernel match in the order the kernel evaluates it. Sources: xt_tcpudp.c,
//! xt_multiport.c, xt_sctp.c, xt_dccp.c, xt_esp.c (net/netfilter), ipt_ah.c (net/ipv4/netfilter).

use polc_ir::cube::Test;
use polc_ir::derived::{DerivedData, SctpFlags, SctpRule};
use polc_ir::field::{End, Field};
use polc_ir::hook::Semantics;
use polc_ir::interval::{Interval, IntervalSet};

use super::Body;
use super::guards::{self, size};
use crate::value::PortRange;

/// A condition and whether it was negated.
pub(crate) type Asked<T> = Option<(T, bool)>;

/// The ports of a range. A range whose last port is below its first holds none.
pub(crate) fn ports(range: PortRange) -> IntervalSet {
    IntervalSet::range(range.first.into(), range.last.into())
}

/// What a TCP match asks.
#[derive(Default)]
pub(crate) struct Tcp {
    pub(crate) source: Asked<PortRange>,
    pub(crate) destination: Asked<PortRange>,
    /// Mask, then the bits that must be set.
    pub(crate) flags: Asked<(u8, u8)>,
    pub(crate) option: Asked<u8>,
}

/// xt_tcpudp's TCP match; under nft semantics the payload expressions it is translated to, unless it has `--tcp-option`
/// or asks nothing (iptables 1.8.9, iptables/nft.c, `add_nft_tcp`, `tcp_all_zero`).
pub(crate) fn tcp(asked: &Tcp, body: &mut Body<'_>) {
    let any_flags = matches!(asked.flags, None | Some(((0, 0), false)));
    let nothing = any_port(asked.source) && any_port(asked.destination) && any_flags;
    if body.semantics() == Semantics::Nft && asked.option.is_none() && !nothing {
        native_ports(asked.source, asked.destination, body);
        // Without a mask no expression is made, not even of the negation.
        if let Some(((mask, set), negated)) = asked.flags.filter(|((mask, _), _)| *mask != 0) {
            guards::bytes_or_no_match(14, body);
            tcp_flags(mask, set, negated, body);
        }
        return;
    }
    guards::tcp_header(body);
    compare_ports(asked.source, asked.destination, body);
    if let Some(((mask, set), negated)) = asked.flags {
        tcp_flags(mask, set, negated, body);
    }
    if let Some((kind, negated)) = asked.option {
        // A data offset below the header itself, or options that can't be read, drop the packet.
        let family = body.family();
        body.hotdrop(vec![Test::new(Field::TcpDataOffset, family, IntervalSet::range(0, 4))]);
        let option = Field::Derived(body.ruleset.derive(DerivedData::TcpOption { kind }));
        body.hotdrop(vec![Test::new(option, family, IntervalSet::point(2))]);
        body.require_values(option, negated, IntervalSet::point(1));
    }
}

fn tcp_flags(mask: u8, set: u8, negated: bool, body: &mut Body<'_>) {
    if set & !mask != 0 {
        // Bits that must be set outside the mask never are.
        if !negated {
            body.never();
        }
        return;
    }
    let test = Test { field: Field::TcpFlags, mask: mask.into(), values: IntervalSet::point(set.into()) };
    body.require_unless(negated, test);
}

/// xt_tcpudp's UDP match, which UDP-Lite shares; nft's payload expressions as for [`tcp`] (`add_nft_udp`).
pub(crate) fn udp(source: Asked<PortRange>, destination: Asked<PortRange>, body: &mut Body<'_>) {
    let nothing = any_port(source) && any_port(destination);
    if body.semantics() == Semantics::Nft && !nothing {
        return native_ports(source, destination, body);
    }
    guards::transport_header(size::UDP, body);
    compare_ports(source, destination, body);
}

/// Whether ports are as they are where a rule does not ask for them.
fn any_port(asked: Asked<PortRange>) -> bool {
    asked.is_none_or(|(range, negated)| range == PortRange::ALL && !negated)
}

/// nft's payload expressions for ports: each loads its own two bytes, but one source and one destination port are compared
/// in one go, so that negating both means a packet that has not both. A range over all ports isn't translated, and
/// neither is its negation, so that a rule which asks for no port at all matches them all (iptables 1.8.9,
/// iptables/nft.c, `add_nft_tcpudp`).
fn native_ports(source: Asked<PortRange>, destination: Asked<PortRange>, body: &mut Body<'_>) {
    let is_one = |range: PortRange| range.first == range.last && range.first != 0;
    if let (Some((from, true)), Some((to, true))) = (source, destination)
        && is_one(from)
        && is_one(to)
    {
        guards::bytes_or_no_match(4, body);
        let family = body.family();
        let other = |end, range| Test::new(Field::port(end), family, ports(range)).negated(family);
        return body.require_any(&[other(End::Src, from), other(End::Dst, to)]);
    }
    for (end, asked) in [(End::Src, source), (End::Dst, destination)] {
        let Some((range, negated)) = asked else { continue };
        if range == PortRange::ALL {
            continue;
        }
        guards::bytes_or_no_match(if end == End::Src { 2 } else { 4 }, body);
        body.require_values(Field::port(end), negated, ports(range));
    }
}

pub(crate) fn compare_ports(source: Asked<PortRange>, destination: Asked<PortRange>, body: &mut Body<'_>) {
    for (end, asked) in [(End::Src, source), (End::Dst, destination)] {
        if let Some((range, negated)) = asked {
            body.require_values(Field::port(end), negated, ports(range));
        }
    }
}

/// Which ports a multiport match compares.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum MultiportEnd {
    Source,
    Destination,
    Either,
}

/// xt_multiport.
pub(crate) fn multiport(
    end: MultiportEnd,
    ranges: impl Iterator<Item = PortRange>,
    negated: bool,
    body: &mut Body<'_>,
) {
    guards::transport_header(size::PORTS, body);
    let values: IntervalSet =
        ranges.filter_map(|range| Interval::new(range.first.into(), range.last.into())).collect();
    match end {
        MultiportEnd::Source => body.require_values(Field::SrcPort, negated, values),
        MultiportEnd::Destination => body.require_values(Field::DstPort, negated, values),
        MultiportEnd::Either if negated => {
            body.require_values(Field::SrcPort, true, values.clone());
            body.require_values(Field::DstPort, true, values);
        }
        MultiportEnd::Either => {
            let family = body.family();
            let either =
                [Field::SrcPort, Field::DstPort].map(|field| Test::new(field, family, values.clone()));
            body.require_any(&either);
        }
    }
}

/// xt_tcpudp's ICMP and ICMPv6 matches. `kind` of `None` is any type (255 for IPv4).
pub(crate) fn icmp(kind: Option<u8>, codes: (u8, u8), negated: bool, body: &mut Body<'_>) {
    guards::transport_header(size::ICMP, body);
    let family = body.family();
    let Some(kind) = kind else {
        if negated {
            body.never();
        }
        return;
    };
    let kind = Test::new(Field::IcmpType, family, IntervalSet::point(kind.into()));
    let code = Test::new(Field::IcmpCode, family, IntervalSet::range(codes.0.into(), codes.1.into()));
    if negated {
        body.require_any(&[kind.negated(family), code.negated(family)]);
    } else {
        body.require(kind);
        body.require(code);
    }
}

/// xt_sctp's ports and chunks.
pub(crate) fn sctp(
    source: Asked<PortRange>,
    destination: Asked<PortRange>,
    chunks: Asked<(SctpRule, [u32; 8], Vec<SctpFlags>)>,
    body: &mut Body<'_>,
) {
    guards::transport_header(size::SCTP, body);
    compare_ports(source, destination, body);
    if let Some(((rule, chunks, flags), negated)) = chunks {
        body.search(DerivedData::SctpChunks { rule, chunks, flags }, negated);
    }
}

/// xt_dccp's ports, packet types (a mask of `1 << type`) and option.
pub(crate) fn dccp(
    source: Asked<PortRange>,
    destination: Asked<PortRange>,
    types: Asked<u16>,
    option: Asked<u8>,
    body: &mut Body<'_>,
) {
    guards::transport_header(size::DCCP, body);
    compare_ports(source, destination, body);
    if let Some((types, negated)) = types {
        // The type is bits 4 to 1 of byte 8 (include/uapi/linux/dccp.h, `struct dccp_hdr`).
        let values = (0..16u128).filter(|kind| types >> kind & 1 == 1).map(|kind| Interval::point(kind << 1));
        let test = Test { field: Field::L4Bytes { offset: 8, len: 1 }, mask: 0x1e, values: values.collect() };
        body.require_unless(negated, test);
    }
    if let Some((kind, negated)) = option {
        body.search(DerivedData::DccpOption { kind }, negated);
    }
}

/// xt_esp: a range of SPIs.
pub(crate) fn esp(spis: (u32, u32), negated: bool, body: &mut Body<'_>) {
    guards::transport_header(size::ESP, body);
    let values = IntervalSet::range(spis.0.into(), spis.1.into());
    body.require_values(Field::L4Bytes { offset: 0, len: 4 }, negated, values);
}

/// ipt_ah: a range of SPIs. IPv6 looks for the header among the extension headers instead.
pub(crate) fn ah(spis: (u32, u32), negated: bool, body: &mut Body<'_>) {
    guards::transport_header(size::AH, body);
    let values = IntervalSet::range(spis.0.into(), spis.1.into());
    body.require_values(Field::L4Bytes { offset: 4, len: 4 }, negated, values);
}
