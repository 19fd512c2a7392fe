//! Frames with wanted fields: what a test asks for is put where a program reads it, the rest is plausible.

use std::collections::BTreeMap;

use cranelift_entity::PrimaryMap;
use polc_ir::classifier::Classifier;
use polc_ir::derived::{DCCP, DCCP_TYPE_WORDS, SCTP};
use polc_ir::derived::{DerivedData, Ipv6HeaderTest, SctpRule, TCP, U32Op, U32Program, eval};
use polc_ir::entities::Derived;
use polc_ir::env::Input;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::packet::View;
use polc_ir::packet::extension::kind;

use super::random::Random;

/// What a frame should be like: values of fields.
pub(super) type Wanted = BTreeMap<Field, u128>;

/// The fields that rules see.
pub(super) type Given<'a> = dyn Fn(Field) -> u128 + 'a;

/// Bytes of a transport header that serves as any.
const L4_BYTES: usize = 40;
/// Longest packet that is made because a test of the length asks for it: as long as the kernel's test run takes in one
/// piece (net/bpf/test_run.c, `bpf_prog_test_run_xdp`).
const PACKET_BYTES_MAX: usize = 3_000;
/// Bytes of the Ethernet header.
pub(super) const LINK_BYTES: usize = 14;

/// Makes frames for one family and the rule set's computed fields.
#[derive(Debug)]
pub(super) struct Frames<'a> {
    pub(super) family: Family,
    pub(super) derived: &'a PrimaryMap<Derived, DerivedData>,
}

impl Frames<'_> {
    /// A frame with these fields. `odd` ones have IP options, extension headers or are fragments more often than
    /// packets are.
    pub(super) fn frame(&self, wanted: &Wanted, odd: bool, random: &mut Random) -> Vec<u8> {
        let get = |field: Field| wanted.get(&field).copied();
        let mut bytes = link(self.family, wanted);
        let protos: [u8; 8] =
            [TCP, TCP, TCP, 17, 17, if self.family == Family::V4 { 1 } else { 58 }, 47, SCTP];
        let proto = get(Field::Proto).map_or_else(|| protos[random.below(protos.len())], |proto| proto as u8);
        let l4 = self.transport(proto, wanted, random);
        let fragment = get(Field::Fragment).map_or_else(|| odd && random.one_in(24), |value| value == 1);
        let offset = match get(Field::FragOffset) {
            Some(offset) => offset as u16,
            None if fragment && random.one_in(2) => 1 + random.below(200) as u16,
            None => 0,
        };
        let more = fragment && (offset == 0 || random.one_in(2));
        match self.family {
            Family::V4 => {
                let options = if odd && random.one_in(8) { random.below(11) } else { 0 };
                bytes.extend(ipv4(wanted, proto, &l4, 4 * options, offset, more, random));
            }
            Family::V6 => {
                let chain = self.chain(wanted, odd, fragment.then_some((offset, more)), random);
                bytes.extend(ipv6(wanted, proto, &l4, chain, random));
            }
        }
        for (field, value) in wanted {
            if let Field::Derived(id) = field
                && let DerivedData::U32(program) = &self.derived[*id]
            {
                self.steer(program, *value != 0, &mut bytes);
            }
        }
        bytes
    }

    /// A transport header of the protocol.
    fn transport(&self, proto: u8, wanted: &Wanted, random: &mut Random) -> Vec<u8> {
        let mut l4: Vec<u8> = (0..L4_BYTES).map(|_| random.next_u64() as u8).collect();
        match proto {
            SCTP => {
                l4.truncate(12);
                l4.extend(self.sctp_chunks(wanted, random));
            }
            DCCP => self.dccp_options(wanted, &mut l4),
            _ => {
                self.tcp_options(wanted, &mut l4, random);
                // Not all packets are of even length.
                l4.extend(std::iter::repeat_n(0xa5, random.below(4)));
            }
        }
        for (&field, &value) in wanted {
            let (offset, len) = match field {
                Field::SrcPort => (0, 2),
                Field::DstPort => (2, 2),
                Field::TcpFlags => (13, 1),
                Field::TcpDataOffset => {
                    l4[12] = (value as u8) << 4;
                    continue;
                }
                Field::IcmpType => (0, 1),
                Field::IcmpCode => (1, 1),
                Field::L4Bytes { offset, len } => (usize::from(offset), usize::from(len)),
                _ => continue,
            };
            if offset + len <= l4.len() {
                l4[offset..offset + len].copy_from_slice(&value.to_be_bytes()[16 - len..]);
            }
        }
        if let Some(len) = wanted.get(&Field::L4Len) {
            l4.resize((*len as usize).min(PACKET_BYTES_MAX - 60), 0);
        }
        l4
    }

    /// The wanted TCP options, or some; the length of the header fits them.
    fn tcp_options(&self, wanted: &Wanted, l4: &mut [u8], random: &mut Random) {
        /// A kind that no test names: RFC 6994, section 3.
        const EXPERIMENT: u8 = 253;
        l4[12] = 0x50 | (random.below(6) as u8) << 4;
        // Maximum segment size, window scale, selective acknowledgement, timestamps.
        l4[20..].copy_from_slice(&[2, 4, 5, 180, 1, 3, 3, 7, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut asked = false;
        let mut options: Vec<u8> = Vec::new();
        for (field, &value) in wanted {
            let Field::Derived(id) = field else { continue };
            let DerivedData::TcpOption { kind } = self.derived[*id] else { continue };
            asked = true;
            match value {
                0 => {}
                1 if kind < 2 => options.push(kind),
                1 => options.extend([kind, 2]),
                _ => {
                    // More options than the packet has.
                    l4[12] = 0xf0;
                    return;
                }
            }
        }
        if asked && options.len() <= 18 {
            let rest = 20 - options.len();
            options.extend([EXPERIMENT, rest as u8]);
            options.resize(20, 0);
            l4[20..].copy_from_slice(&options);
            l4[12] = 0xa0;
        }
    }

    /// A DCCP header with the wanted options.
    fn dccp_options(&self, wanted: &Wanted, l4: &mut [u8]) {
        let own = usize::from(3 + (l4[8] & 1) + DCCP_TYPE_WORDS[usize::from(l4[8] >> 1 & 15)]) * 4;
        l4[4] = (L4_BYTES / 4) as u8;
        // An option of a kind for senders that no test names takes what is left (RFC 4340, section 5.8).
        let mut options: Vec<u8> = Vec::new();
        for (field, &value) in wanted {
            let Field::Derived(id) = field else { continue };
            let DerivedData::DccpOption { kind } = self.derived[*id] else { continue };
            match value {
                0 => {}
                1 if kind < 2 => options.push(kind),
                1 => options.extend([kind, 2]),
                _ => l4[4] = 2,
            }
        }
        let room = L4_BYTES - own;
        if options.len() + 2 <= room {
            options.extend([127, (room - options.len()) as u8]);
        }
        options.resize(room, 0);
        l4[own..].copy_from_slice(&options);
    }

    /// SCTP chunks, those that are asked for if any are.
    fn sctp_chunks(&self, wanted: &Wanted, random: &mut Random) -> Vec<u8> {
        let mut bytes = Vec::new();
        let chunk = |bytes: &mut Vec<u8>, kind: u8, flags: u8| bytes.extend([kind, flags, 0, 4]);
        for (field, &value) in wanted {
            let Field::Derived(id) = field else { continue };
            let DerivedData::SctpChunks { rule, chunks, flags } = &self.derived[*id] else { continue };
            let named: Vec<u8> =
                (0..=255u8).filter(|kind| chunks[usize::from(kind / 32)] >> (kind % 32) & 1 == 1).collect();
            let other = (0..=255u8).find(|kind| !named.contains(kind));
            match (value, rule) {
                (1, SctpRule::Any) => {
                    named.first().into_iter().for_each(|&kind| chunk(&mut bytes, kind, has(flags, kind)));
                }
                (1, _) => named.iter().for_each(|&kind| chunk(&mut bytes, kind, has(flags, kind))),
                (0, _) => other.into_iter().for_each(|kind| chunk(&mut bytes, kind, 0)),
                _ => bytes.extend([0, 0, 0, 0]),
            }
        }
        if bytes.is_empty() {
            chunk(&mut bytes, random.below(16) as u8, random.next_u64() as u8 & 7);
            chunk(&mut bytes, random.below(16) as u8, 0);
        }
        return bytes;

        fn has(flags: &[polc_ir::derived::SctpFlags], kind: u8) -> u8 {
            flags.iter().find(|flags| flags.chunk == kind).map_or(0, |flags| flags.value)
        }
    }

    /// IPv6 extension headers: those that the fields ask for, or a few if the frame is to be odd.
    fn chain(
        &self,
        wanted: &Wanted,
        odd: bool,
        fragment: Option<(u16, bool)>,
        random: &mut Random,
    ) -> Vec<(u8, Vec<u8>)> {
        let mut chain: Vec<(u8, Vec<u8>)> = Vec::new();
        if odd && random.one_in(8) {
            for _ in 0..1 + random.below(3) {
                let kinds = [kind::HOP_BY_HOP, kind::ROUTING, kind::DESTINATION, kind::AUTHENTICATION];
                chain.push(extension(kinds[random.below(kinds.len())], random.below(2)));
            }
        }
        let mask = wanted.get(&Field::ExtHeaderMask).map_or(0, |mask| *mask as u16);
        // ip6t_ipv6header.h, `MASK_*`.
        let bits = [
            (128, kind::HOP_BY_HOP),
            (64, kind::DESTINATION),
            (32, kind::ROUTING),
            (8, kind::AUTHENTICATION),
        ];
        chain.extend(bits.iter().filter(|(bit, _)| mask & bit != 0).map(|(_, of)| extension(*of, 0)));
        let is_lost = wanted.get(&Field::ExtHeaders).is_some_and(|value| value & 1 != 0);
        for (field, &value) in wanted {
            let Field::Derived(id) = field else { continue };
            let DerivedData::Ipv6Header(test) = &self.derived[*id] else { continue };
            match value {
                // What a malformed header comes before is a matter of those that were found.
                0 if is_lost => chain.extend(unasked(test)),
                0 => {}
                1 => chain.push(asked(test)),
                _ => {
                    // Longer than the packet.
                    let (of, mut header) = asked(test);
                    header[1] = 255;
                    chain.push((of, header));
                }
            }
        }
        if let Some((offset, more)) = fragment.or((mask & 16 != 0).then_some((0, true))) {
            let mut header = vec![0u8; 8];
            header[2..4].copy_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
            chain.push((kind::FRAGMENT, header));
        }
        if mask & 4 != 0 {
            chain.push((kind::ESP, vec![0; 8]));
        } else if mask & 2 != 0 {
            chain.push((kind::NONE, Vec::new()));
        }
        if let Some(&value) = wanted.get(&Field::ExtHeaders) {
            if value & 2 != 0 {
                chain.push(extension(kind::AUTHENTICATION, 1));
            }
            if value & 1 != 0 {
                // Leads past the end of the packet, to another that is not there.
                let (of, mut header) = extension(kind::DESTINATION, 0);
                header[1] = 255;
                chain.extend([(of, header), extension(kind::DESTINATION, 0)]);
            }
        }
        chain
    }

    /// Changes the words that a `u32` program ends at so that it holds, or doesn't.
    fn steer(&self, program: &U32Program, holds: bool, frame: &mut [u8]) {
        let packet = &mut frame[LINK_BYTES..];
        let load = |packet: &[u8], at: u64| {
            let at = usize::try_from(at).ok()?;
            Some(u32::from_be_bytes(packet.get(at..at.checked_add(4)?)?.try_into().ok()?))
        };
        for test in &program.tests {
            let (mut origin, mut at) = (0u64, u64::from(test.start));
            let Some(mut value) = load(packet, at) else { return };
            let mut behind = 0;
            for (index, op) in test.ops.iter().enumerate() {
                match *op {
                    U32Op::And(mask) => value &= mask,
                    U32Op::ShiftLeft(by) => value = value.checked_shl(by).unwrap_or(0),
                    U32Op::ShiftRight(by) => value = value.checked_shr(by).unwrap_or(0),
                    U32Op::At(offset) => {
                        origin += u64::from(value);
                        at = origin + u64::from(offset);
                        behind = index + 1;
                        match load(packet, at) {
                            Some(loaded) => value = loaded,
                            None => return,
                        }
                    }
                }
            }
            let Some(&(first, last)) = test.ranges.first() else { continue };
            let goal = if holds { first } else { last.wrapping_add(1) };
            let mut word = goal;
            for op in test.ops[behind..].iter().rev() {
                word = match *op {
                    U32Op::ShiftLeft(by) => word.checked_shr(by).unwrap_or(0),
                    U32Op::ShiftRight(by) => word.checked_shl(by).unwrap_or(0),
                    U32Op::And(_) | U32Op::At(_) => word,
                };
            }
            let at = at as usize;
            // The header's first word keeps the packet readable.
            if at >= 4 && at + 4 <= packet.len() {
                packet[at..at + 4].copy_from_slice(&word.to_be_bytes());
            }
            if !holds {
                return;
            }
        }
    }

    /// The fields that rules see of a frame; `None` if none see it.
    pub(super) fn given(&self, classifier: &Classifier, input: &Input, use_them: &mut dyn FnMut(&Given<'_>)) {
        if let Ok(view) = View::new(self.family, &classifier.place, input) {
            use_them(&|field| match field {
                Field::Derived(id) => {
                    let member = classifier.member(id, &mut |field| view.get(field));
                    member.unwrap_or_else(|| eval(&self.derived[id], &view)).into()
                }
                field => view.get(field),
            });
        }
    }
}

/// The Ethernet header.
fn link(family: Family, wanted: &Wanted) -> Vec<u8> {
    let get = |field: Field| wanted.get(&field).copied();
    let mac = |value: Option<u128>, default: [u8; 6]| {
        value.map_or(default, |value| value.to_be_bytes()[10..].try_into().expect("six bytes"))
    };
    let mut bytes = Vec::with_capacity(128);
    bytes.extend(mac(get(Field::DstMac), [2, 0, 0, 0, 0, 2]));
    match get(Field::PacketType) {
        Some(1) => bytes[..6].fill(255),
        Some(2) => bytes[0] |= 1,
        _ => {}
    }
    bytes.extend(mac(get(Field::SrcMac), [2, 0, 0, 0, 0, 1]));
    bytes.extend(family.ether_type().to_be_bytes());
    bytes
}

fn address(wanted: &Wanted, field: Field, random: &mut Random) -> u128 {
    wanted.get(&field).copied().unwrap_or_else(|| random.next_u128())
}

/// An IPv4 packet; the length cuts or pads what it carries.
fn ipv4(
    wanted: &Wanted,
    proto: u8,
    l4: &[u8],
    options: usize,
    offset: u16,
    more: bool,
    random: &mut Random,
) -> Vec<u8> {
    let header = 20 + options;
    let length = wanted.get(&Field::Length).map_or(header + l4.len(), |length| *length as usize);
    let total = length.clamp(header, PACKET_BYTES_MAX);
    let mut ip = vec![0u8; header];
    ip[0] = 0x40 | (header / 4) as u8;
    ip[1] = wanted.get(&Field::Tos).map_or(0, |tos| *tos as u8);
    ip[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    ip[6..8].copy_from_slice(&(if more { 0x2000 } else { 0 } | offset).to_be_bytes());
    ip[8] = wanted.get(&Field::Ttl).map_or(64, |ttl| *ttl as u8);
    ip[9] = proto;
    ip[12..16].copy_from_slice(&(address(wanted, Field::SrcAddr, random) as u32).to_be_bytes());
    ip[16..20].copy_from_slice(&(address(wanted, Field::DstAddr, random) as u32).to_be_bytes());
    ip[20..].fill(1);
    let checksum = checksum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    ip.extend(l4);
    ip.resize(total, 0);
    ip
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

/// An IPv6 packet; the length cuts or pads what it carries.
fn ipv6(wanted: &Wanted, proto: u8, l4: &[u8], chain: Vec<(u8, Vec<u8>)>, random: &mut Random) -> Vec<u8> {
    let kinds: Vec<u8> = chain.iter().map(|(kind, _)| *kind).chain([proto]).collect();
    let mut payload = Vec::new();
    for (index, (_, mut header)) in chain.into_iter().enumerate() {
        if let Some(next) = header.first_mut() {
            *next = kinds[index + 1];
        }
        payload.extend(header);
    }
    payload.extend(l4);
    if let Some(length) = wanted.get(&Field::Length) {
        payload.resize((*length as usize).clamp(40, PACKET_BYTES_MAX) - 40, 0);
    }
    let tos = wanted.get(&Field::Tos).map_or(0, |tos| *tos as u8);
    let mut ip = vec![0u8; 40];
    ip[0] = 0x60 | tos >> 4;
    ip[1] = tos << 4;
    ip[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
    ip[6] = kinds[0];
    ip[7] = wanted.get(&Field::Ttl).map_or(64, |ttl| *ttl as u8);
    ip[8..24].copy_from_slice(&address(wanted, Field::SrcAddr, random).to_be_bytes());
    ip[24..40].copy_from_slice(&address(wanted, Field::DstAddr, random).to_be_bytes());
    ip.extend(payload);
    ip
}

/// An extension header with this length byte, its contents zero.
fn extension(of: u8, words: usize) -> (u8, Vec<u8>) {
    let len = if of == kind::AUTHENTICATION { (words + 2) * 4 } else { (words + 1) * 8 };
    let mut header = vec![0u8; len.max(8)];
    header[1] = words as u8;
    (of, header)
}

/// An extension header of the kind that a test asks for, but another one, where that is simple to say.
fn unasked(test: &Ipv6HeaderTest) -> Option<(u8, Vec<u8>)> {
    let (of, mut header) = asked(test);
    match test {
        Ipv6HeaderTest::Rt { kind: Some(_), kind_negate: false, .. } => header[2] ^= 1,
        Ipv6HeaderTest::Rt { kind: Some(_), .. } => {}
        _ => return None,
    }
    Some((of, header))
}

/// An extension header as a test asks for it.
fn asked(test: &Ipv6HeaderTest) -> (u8, Vec<u8>) {
    match test {
        Ipv6HeaderTest::Ah { spi, len, .. } => {
            let words = (*len as usize / 4).clamp(3, 257) - 2;
            let (of, mut header) = extension(kind::AUTHENTICATION, words);
            header[4..8].copy_from_slice(&spi.0.to_be_bytes());
            (of, header)
        }
        Ipv6HeaderTest::Frag { id, first, more, .. } => {
            let mut header = vec![0u8; 8];
            let offset = if *first { 0 } else { 8u16 };
            header[2..4].copy_from_slice(&(offset | u16::from(*more)).to_be_bytes());
            header[4..8].copy_from_slice(&id.0.to_be_bytes());
            (kind::FRAGMENT, header)
        }
        Ipv6HeaderTest::Options { destination, len, options, .. } => {
            let mut contents: Vec<u8> = Vec::new();
            for &(of, len) in options {
                contents.push(of);
                if of != 0 {
                    let len = len.unwrap_or(0);
                    contents.push(len);
                    contents.resize(contents.len() + usize::from(len), 0);
                }
            }
            let bytes = len.map_or(0, |len| len as usize).max(2 + contents.len());
            let of = if *destination { kind::DESTINATION } else { kind::HOP_BY_HOP };
            let (of, mut header) = extension(of, bytes.div_ceil(8).clamp(1, 256) - 1);
            contents.truncate(header.len() - 2);
            header[2..2 + contents.len()].copy_from_slice(&contents);
            (of, header)
        }
        Ipv6HeaderTest::Rt { kind: of, segments_left, len, addresses, .. } => {
            let bytes = len.map_or(0, |len| len as usize).max(8 + 16 * addresses.len());
            let (kind, mut header) = extension(kind::ROUTING, bytes.div_ceil(8).clamp(1, 256) - 1);
            header[2] = of.unwrap_or(0) as u8;
            header[3] = segments_left.0 as u8;
            for (address, room) in addresses.iter().zip(header[8..].chunks_exact_mut(16)) {
                room.copy_from_slice(&address.to_be_bytes());
            }
            (kind, header)
        }
    }
}
