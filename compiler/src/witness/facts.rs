//! Facts: what is so of every packet, whatever the rules are.
//!
//! Fields are not chosen freely: some are the same bytes, those of a header are 0 where it is not there, a computed field
//! has few values. What is no packet is not looked for, and that no packet comes somewhere is often proven by it.

use std::collections::BTreeSet;

use polc_ir::classifier::Classifier;
use polc_ir::cube::{Cube, Test};
use polc_ir::derived::{DCCP, DerivedData, Ipv6HeaderTest, SCTP, TCP};
use polc_ir::entities::Derived;
use polc_ir::field::{EXT_HEADERS_BEYOND, EXT_HEADERS_CUT, Field};
use polc_ir::hook::Family;
use polc_ir::interval::{Interval, IntervalSet, max_value};
use polc_ir::packet::extension::EXTENSIONS;

use super::region::Literal;
use super::solve::Clause;

/// What is known of all packets.
#[derive(Debug)]
pub(super) struct Facts {
    /// What every packet is like.
    pub(super) always: Cube,
    /// What none is like.
    never: Vec<Cube>,
}

impl Facts {
    /// The facts about the fields that a classifier's entries and `others` test, of packets that are like `domain`.
    pub(super) fn new<'a>(
        classifier: &'a Classifier,
        domain: &Cube,
        others: impl Iterator<Item = &'a Cube>,
    ) -> Facts {
        let family = classifier.family;
        let cubes = classifier.entries.values().map(|entry| &entry.cube).chain(others);
        let fields: BTreeSet<Field> = cubes.flat_map(|cube| cube.tests()).map(|test| test.field).collect();
        let mut facts = Facts { always: domain.clone(), never: Vec::new() };
        for &field in &fields {
            if let Some(values) = values(classifier, field) {
                // Where nothing is left, there are no packets, and the domain says so.
                _ = facts.always.and(&Test::new(field, family, values), family);
            }
        }
        let mut never = |tests: &[Test]| {
            let mut cube = Cube::all();
            if tests.iter().all(|test| cube.and(test, family)) {
                facts.never.push(cube);
            }
        };
        let is = |field: Field, values: IntervalSet| Test::new(field, family, values);
        let some = |field: Field| is(field, IntervalSet::range(1, max_value(field.bits(family))));
        let shorter = |bytes: u32| is(Field::L4Len, IntervalSet::range(0, u128::from(bytes) - 1));
        never(&[some(Field::FragOffset), is(Field::Fragment, IntervalSet::point(0))]);
        if family == Family::V6 {
            // A walk over extension headers that does not come to a protocol leaves 0 for it, and no transport header;
            // one that does comes to no extension header, and 0 is one.
            let lost = |is_lost: u128| Test::masked(Field::ExtHeaders, family, is_lost, 1);
            never(&[lost(0), is(Field::Proto, IntervalSet::point(0))]);
            for field in [Field::Proto, Field::L4Len, Field::FragOffset] {
                never(&[lost(1), some(field)]);
            }
        }
        for &field in &fields {
            if let Some((first, bits)) = place(field) {
                never(&[some(field), shorter((first + bits).div_ceil(8))]);
            }
            let Field::Derived(id) = field else { continue };
            let data = &classifier.derived[id];
            if let DerivedData::Ipv6Header(test) = data
                && family == Family::V6
            {
                let came_through = Test::masked(Field::ExtHeaders, family, 0, 1);
                let (holds, is_cut) = (is(field, IntervalSet::point(1)), is(field, IntervalSet::point(2)));
                let whole = is(Field::Fragment, IntervalSet::point(0));
                // Who finds a Fragment header finds a fragment; who finds half of a header finds nothing behind it.
                match test {
                    Ipv6HeaderTest::Frag { .. } => {
                        never(&[holds, whole.clone()]);
                        never(&[is_cut.clone(), whole, came_through.clone()]);
                        never(&[is_cut, came_through, some(Field::L4Len)]);
                    }
                    Ipv6HeaderTest::Rt { .. } => never(&[is_cut, came_through, some(Field::L4Len)]),
                    // Its own length may be less than is read of it, and options have lengths of their own.
                    Ipv6HeaderTest::Ah { .. } | Ipv6HeaderTest::Options { .. } => {}
                }
            }
            if let Some(proto) = protocol(data) {
                let other = IntervalSet::point(proto.into()).complement(Field::Proto.bits(family));
                never(&[some(field), is(Field::Proto, other)]);
            }
        }
        if fields.contains(&Field::CtAbsent) {
            // See `Field::CtAbsent`: whole packets of TCP and UDP that have ports.
            let asked: IntervalSet = [6, 17].into_iter().map(Interval::point).collect();
            never(&[some(Field::CtAbsent), is(Field::Proto, asked.complement(Field::Proto.bits(family)))]);
            never(&[some(Field::CtAbsent), some(Field::Fragment)]);
            never(&[some(Field::CtAbsent), shorter(4)]);
        }
        // Fields of the transport header that are the same bits, where there are as many bytes.
        for (at, &one) in fields.iter().enumerate() {
            for &other in fields.iter().skip(at + 1) {
                let (Some(own), Some(others)) = (place(one), place(other)) else { continue };
                let end = (own.0 + own.1).max(others.0 + others.1).div_ceil(8);
                let long = is(Field::L4Len, IntervalSet::range(end.into(), max_value(16)));
                for bit in own.0.max(others.0)..(own.0 + own.1).min(others.0 + others.1) {
                    let of = |field: Field, (first, bits): (u32, u32), is_set: bool| {
                        let mask = 1 << (first + bits - 1 - bit);
                        Test::masked(field, family, if is_set { mask } else { 0 }, mask)
                    };
                    for is_set in [false, true] {
                        never(&[of(one, own, is_set), of(other, others, !is_set), long.clone()]);
                    }
                }
            }
        }
        facts
    }

    /// What no packet is like, as clauses.
    pub(super) fn clauses(&self) -> impl Iterator<Item = Clause<'_>> {
        self.never.iter().map(|cube| cube.tests().iter().map(Literal::new).collect())
    }
}

/// The values that a field has in packets, where they are fewer than its bits have room for.
fn values(classifier: &Classifier, field: Field) -> Option<IntervalSet> {
    let v4 = classifier.family == Family::V4;
    let upto = |last: u128| Some(IntervalSet::range(0, last));
    match field {
        Field::ExtHeaders | Field::ExtHeaderMask if v4 => upto(0),
        Field::ExtHeaderMask => {
            let alone = [EXT_HEADERS_CUT, EXT_HEADERS_BEYOND].map(|bit| Interval::point(bit.into()));
            Some(Interval::new(0, 0xff).into_iter().chain(alone).collect())
        }
        Field::Proto if !v4 => {
            let extensions = EXTENSIONS.into_iter().filter(|kind| *kind != 0);
            let all: IntervalSet = extensions.map(|kind| Interval::point(kind.into())).collect();
            Some(all.complement(field.bits(classifier.family)))
        }
        Field::Length if v4 => Some(IntervalSet::range(20, 0xffff)),
        Field::Length => Some(IntervalSet::range(40, 40 + 0xffff)),
        Field::Derived(id) => upto(last_value(classifier, id)),
        _ => None,
    }
}

/// The last value that a computed field has at the root.
fn last_value(classifier: &Classifier, id: Derived) -> u128 {
    match classifier.derived[id] {
        // What is not looked up, stages compute.
        DerivedData::Member { .. } => classifier.members.contains(&id).into(),
        DerivedData::AddressType { .. } => 0,
        DerivedData::U32(_) => 1,
        DerivedData::TcpOption { .. } => 2,
        DerivedData::DccpOption { .. } | DerivedData::SctpChunks { .. } => 3,
        DerivedData::Ipv6Header(_) if classifier.family == Family::V4 => 0,
        DerivedData::Ipv6Header(_) => 2,
    }
}

/// The protocol without which a computed field is 0.
fn protocol(data: &DerivedData) -> Option<u8> {
    match data {
        DerivedData::TcpOption { .. } => Some(TCP),
        DerivedData::DccpOption { .. } => Some(DCCP),
        DerivedData::SctpChunks { .. } => Some(SCTP),
        _ => None,
    }
}

/// The first bit of the transport header that a field is made of, and how many it has.
fn place(field: Field) -> Option<(u32, u32)> {
    Some(match field {
        Field::SrcPort => (0, 16),
        Field::DstPort => (16, 16),
        Field::TcpFlags => (104, 8),
        Field::TcpDataOffset => (96, 4),
        Field::IcmpType => (0, 8),
        Field::IcmpCode => (8, 8),
        Field::L4Bytes { offset, len } => (8 * u32::from(offset), 8 * u32::from(len)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use polc_ir::env::Attach;

    use super::super::Witnesses;
    use super::super::tests::classified;

    /// The facts hold of all packets that are made, the odd ones among them, whatever their bytes are.
    #[test]
    fn packets_are_as_the_facts_say() {
        let both = "-A INPUT -p tcp -m tcp --sport 7 --dport 1:99 --tcp-flags SYN,ACK SYN --tcp-option 8 -j DROP\n\
            -A INPUT -p sctp -m sctp --dport 9 --chunk-types any INIT -j DROP\n\
            -A INPUT -p dccp -m dccp --dport 9 --dccp-types DATA --dccp-option 5 -j DROP\n\
            -A INPUT -p esp -m esp --espspi 1:9 -j DROP\n\
            -A INPUT -m length --length 40:60 -j DROP\n\
            -A INPUT -m u32 --u32 \"0&0xff=0x1\" -j DROP\n-A INPUT -i eth0 -m pkttype --pkt-type multicast -j DROP\n";
        let v4 = "-A INPUT -s 10.0.0.0/8 -p icmp -m icmp --icmp-type 3/1 -j DROP\n-A INPUT -f -j DROP\n\
            -A INPUT -p ah -m ah --ahspi 5 -j DROP\n";
        let v6 = "-A INPUT -s 2001:db8::/32 -p ipv6-icmp -m icmp6 --icmpv6-type 3/1 -j DROP\n\
            -A INPUT -m frag --fragid 1 --fragfirst -j DROP\n-A INPUT -m ipv6header --header frag --soft -j DROP\n\
            -A INPUT -m rt --rt-type 0 -j DROP\n-A INPUT -m ah --ahspi 5 -j DROP\n";
        for (attach, own) in
            [(Attach::Xdp, v4), (Attach::TcIngress, v6), (Attach::TcEgress, v6), (Attach::Netfilter, v4)]
        {
            let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{own}{both}COMMIT\n");
            let (classifier, devices) = classified(&text, attach);
            let witnesses = Witnesses::new(&classifier, &devices, 1);
            let (directed, facts) = (&witnesses.directed, witnesses.facts());
            assert!(facts.never.len() > 10, "{facts:?}");
            for input in Witnesses::new(&classifier, &devices, 2).take(witnesses.enough()) {
                directed.frames().given(&classifier, &input, &mut |given| {
                    for test in facts.always.tests() {
                        assert!(test.holds(given(test.field)), "{test}: {input:?}");
                    }
                    for cube in &facts.never {
                        assert!(!cube.holds(given), "{cube}: {input:?}");
                    }
                });
            }
        }
    }
}
