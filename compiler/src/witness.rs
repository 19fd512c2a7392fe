//! `witness`: packets that show what a classifier does.
//!
//! A packet is made for entries, for elements of sets that are looked up in tables, and for the values at which their tests change their mind: for each interval its ends
//! and the values just beyond. Fields of several entries are mixed, since a packet passes several stages, and frames
//! are then cut, tagged, fragmented or bent, because rules meet packets they did not foresee. The sequence depends on
//! the seed alone.

use std::borrow::Cow;
use std::collections::BTreeMap;

use polc_ir::classifier::Classifier;
use polc_ir::cube::Cube;
use polc_ir::derived::DerivedData;
use polc_ir::env::{Attach, Connection, Connections, Device, Input, ct_state};
use polc_ir::field::{DeviceName, Field};
use polc_ir::hook::{Family, Hook};
use polc_ir::interval::max_value;
use polc_ir::set::{self, SetContents};

/// Random numbers (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Equal seeds give equal numbers.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// An endless sequence of packets for a classifier.
#[derive(Debug)]
pub struct Witnesses<'a> {
    classifier: &'a Classifier,
    devices: &'a [Device],
    random: Random,
    cubes: Vec<Cow<'a, Cube>>,
    next: usize,
}

/// Elements of a set in a table that packets are made for.
const ELEMENTS_MAX: usize = 256;

/// Cubes of elements of the sets that have tables: the first, the last, and some between.
fn member_cubes(classifier: &Classifier) -> Vec<Cube> {
    let mut cubes = Vec::new();
    for &field in &classifier.members {
        let DerivedData::Member { set, ends, .. } = &classifier.derived[field] else { continue };
        for leaf in set::leaves(&classifier.sets, *set) {
            let data = &classifier.sets[leaf];
            let SetContents::Elements(elements) = &data.contents else { continue };
            if elements.is_empty() || data.dimensions.len() > ends.len() {
                continue;
            }
            let count = elements.len().min(ELEMENTS_MAX);
            for at in 0..count {
                let element = &elements[at * (elements.len() - 1) / (count - 1).max(1)];
                cubes.extend(set::element_cubes(classifier.family, element, ends));
            }
        }
    }
    cubes
}

impl<'a> Witnesses<'a> {
    /// Packets for `classifier` that come and go by `devices`.
    pub fn new(classifier: &'a Classifier, devices: &'a [Device], seed: u64) -> Witnesses<'a> {
        let entries = classifier.entries.values().map(|entry| &entry.cube).filter(|cube| !cube.is_all());
        let cubes = entries.map(Cow::Borrowed).chain(member_cubes(classifier).into_iter().map(Cow::Owned));
        let cubes = cubes.collect();
        Witnesses { classifier, devices, random: Random::new(seed), cubes, next: 0 }
    }

    fn packet(&mut self) -> Input {
        let mut fields = BTreeMap::new();
        if !self.cubes.is_empty() {
            // Every cube in turn, mixed with others.
            let mixed = self.random.below(3);
            for _ in 0..mixed {
                let other = self.random.below(self.cubes.len());
                self.satisfy(other, &mut fields);
            }
            let cube = self.next % self.cubes.len();
            self.next += 1;
            self.satisfy(cube, &mut fields);
        }
        let mut input = frame(self.classifier.family, &fields, &mut self.random);
        self.surroundings(&fields, &mut input);
        self.bend(&mut input);
        input
    }

    fn satisfy(&mut self, cube: usize, fields: &mut BTreeMap<Field, u128>) {
        for test in self.cubes[cube].tests() {
            let intervals = test.values.intervals();
            if intervals.is_empty() {
                continue;
            }
            let interval = intervals[self.random.below(intervals.len())];
            let top = max_value(test.field.bits(self.classifier.family));
            let value = match self.random.below(16) {
                0 => interval.lo().wrapping_sub(1) & top,
                1 => interval.hi().wrapping_add(1) & top,
                2..=5 => interval.hi(),
                6..=8 => {
                    let width = interval.hi() - interval.lo();
                    interval.lo() + u128::from(self.random.next_u64()) % width.saturating_add(1).max(1)
                }
                _ => interval.lo(),
            };
            let noise = u128::from(self.random.next_u64()) << 64 | u128::from(self.random.next_u64());
            fields.insert(test.field, value | noise & !test.mask & top);
        }
    }

    fn surroundings(&mut self, fields: &BTreeMap<Field, u128>, input: &mut Input) {
        let attach = self.classifier.place.attach;
        let mut device = |field: Field| {
            let wanted = fields.get(&field).map(|value| DeviceName::from_value(*value));
            let known = wanted.filter(|name| self.devices.iter().any(|device| device.name == *name));
            known.or_else(|| {
                (!self.devices.is_empty()).then(|| self.devices[self.random.below(self.devices.len())].name)
            })
        };
        let (input_device, output_device) = (device(Field::InDevice), device(Field::OutDevice));
        match attach {
            Some(Attach::TcEgress) => {
                input.out_device = output_device;
                if self.random.one_in(2) {
                    input.in_device = input_device;
                }
            }
            Some(Attach::Netfilter) => {
                let at = |has: fn(Hook) -> bool| self.classifier.place.path.iter().any(|hook| has(*hook));
                input.in_device = input_device.filter(|_| at(Hook::has_in_device));
                input.out_device = output_device.filter(|_| at(Hook::has_out_device));
            }
            _ => input.in_device = input_device,
        }
        if matches!(self.classifier.place.connections, Connections::LookedUp { .. }) && self.random.one_in(2)
        {
            input.connection = Some(Connection { state: ct_state::ESTABLISHED, ..Connection::default() });
        }
        if attach != Some(Attach::Xdp) {
            input.mark = fields.get(&Field::Mark).map_or(0, |mark| *mark as u32);
            input.packet_type = fields.get(&Field::PacketType).map(|kind| *kind as u8);
        }
    }

    /// Cuts, tags or damages some frames.
    fn bend(&mut self, input: &mut Input) {
        let frame = &mut input.frame;
        match self.random.below(32) {
            0 => {
                let len = self.random.below(frame.len() + 1);
                frame.truncate(len);
            }
            1 | 2 => {
                // A short transport header: the packet's own length is cut too.
                let network = 14;
                let keep = network + 20 + self.random.below(44);
                if keep < frame.len() {
                    frame.truncate(keep);
                    set_length(self.classifier.family, frame);
                }
            }
            3 => {
                let tag = self.random.next_u64() as u16 & if self.random.one_in(2) { 0xe000 } else { 0xffff };
                let tag = tag.to_be_bytes();
                frame.splice(12..12, [0x81, 0, tag[0], tag[1]]);
            }
            4 => frame[12..14].copy_from_slice(&[8, 6]),
            5 => {
                let other: [u8; 2] = if self.classifier.family == Family::V4 { [0x86, 0xdd] } else { [8, 0] };
                frame[12..14].copy_from_slice(&other);
            }
            6 => {
                let at = 14 + self.random.below(frame.len() - 14);
                frame[at] ^= 1 << self.random.below(8);
            }
            7 => frame.extend([0; 7]),
            _ => {}
        }
    }
}

impl Iterator for Witnesses<'_> {
    type Item = Input;

    fn next(&mut self) -> Option<Input> {
        Some(self.packet())
    }
}

fn set_length(family: Family, frame: &mut [u8]) {
    let len = frame.len() - 14;
    match family {
        Family::V4 => frame[16..18].copy_from_slice(&(len as u16).to_be_bytes()),
        Family::V6 if len >= 40 => frame[18..20].copy_from_slice(&(len as u16 - 40).to_be_bytes()),
        Family::V6 => {}
    }
}

/// A frame with these fields; the rest is random but plausible.
fn frame(family: Family, fields: &BTreeMap<Field, u128>, random: &mut Random) -> Input {
    let get = |field: Field| fields.get(&field).copied();
    let mut bytes = Vec::with_capacity(128);
    let mac = |value: Option<u128>, default: [u8; 6]| {
        value.map_or(default, |value| value.to_be_bytes()[10..].try_into().expect("six bytes"))
    };
    bytes.extend(mac(get(Field::DstMac), [2, 0, 0, 0, 0, 2]));
    if let Some(kind) = get(Field::PacketType) {
        match kind {
            1 => bytes[..6].fill(255),
            2 => bytes[0] |= 1,
            _ => {}
        }
    }
    bytes.extend(mac(get(Field::SrcMac), [2, 0, 0, 0, 0, 1]));
    bytes.extend(family.ether_type().to_be_bytes());
    let protos: [u8; 8] = [6, 6, 6, 17, 17, if family == Family::V4 { 1 } else { 58 }, 47, 132];
    let proto = get(Field::Proto).map_or_else(|| protos[random.below(protos.len())], |proto| proto as u8);
    let l4 = transport(fields, random);
    let address = |field: Field, random: &mut Random| {
        get(field).unwrap_or_else(|| u128::from(random.next_u64()) << 64 | u128::from(random.next_u64()))
    };
    let fragment = get(Field::Fragment).map_or_else(|| random.one_in(24), |fragment| fragment == 1);
    let offset = if fragment && random.one_in(2) { 1 + random.below(200) as u16 } else { 0 };
    let tos = get(Field::Tos).unwrap_or(0) as u8;
    let ttl = get(Field::Ttl).unwrap_or(64) as u8;
    match family {
        Family::V4 => {
            let options = if random.one_in(8) { random.below(11) } else { 0 };
            let header = 20 + 4 * options;
            let mut total = header + l4.len();
            let padding =
                get(Field::Length).map_or(0, |length| (length as usize).min(1500).saturating_sub(total));
            total += padding;
            let mut ip = vec![0u8; header];
            ip[0] = 0x40 | (header / 4) as u8;
            ip[1] = tos;
            ip[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            let more = if fragment && (offset == 0 || random.one_in(2)) { 0x2000 } else { 0 };
            ip[6..8].copy_from_slice(&(more | offset).to_be_bytes());
            ip[8] = ttl;
            ip[9] = proto;
            ip[12..16].copy_from_slice(&(address(Field::SrcAddr, random) as u32).to_be_bytes());
            ip[16..20].copy_from_slice(&(address(Field::DstAddr, random) as u32).to_be_bytes());
            ip[20..].fill(1);
            let checksum =
                ip.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
            let folded = (checksum & 0xffff) + (checksum >> 16);
            let checksum = !(((folded & 0xffff) + (folded >> 16)) as u16);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            bytes.extend(ip);
            bytes.extend(&l4);
            bytes.extend(std::iter::repeat_n(0, padding));
        }
        Family::V6 => {
            let mut chain: Vec<(u8, Vec<u8>)> = Vec::new();
            if random.one_in(8) {
                for _ in 0..1 + random.below(3) {
                    let kind = [0, 43, 60, 51][random.below(4)];
                    let words = random.below(2);
                    let len = if kind == 51 { (words + 2) * 4 } else { (words + 1) * 8 };
                    let mut header = vec![0u8; len.max(8)];
                    header[1] = words as u8;
                    chain.push((kind, header));
                }
            }
            if fragment {
                let mut header = vec![0u8; 8];
                let more = u16::from(offset == 0 || random.one_in(2));
                header[2..4].copy_from_slice(&(offset << 3 | more).to_be_bytes());
                chain.push((44, header));
            }
            let kinds: Vec<u8> = chain.iter().map(|(kind, _)| *kind).chain([proto]).collect();
            let mut payload = Vec::new();
            for (index, (_, mut header)) in chain.into_iter().enumerate() {
                header[0] = kinds[index + 1];
                payload.extend(header);
            }
            payload.extend(&l4);
            let padding = get(Field::Length)
                .map_or(0, |length| (length as usize).min(1500).saturating_sub(40 + payload.len()));
            payload.extend(std::iter::repeat_n(0, padding));
            let mut ip = vec![0u8; 40];
            ip[0] = 0x60 | tos >> 4;
            ip[1] = tos << 4;
            ip[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
            ip[6] = kinds[0];
            ip[7] = ttl;
            ip[8..24].copy_from_slice(&address(Field::SrcAddr, random).to_be_bytes());
            ip[24..40].copy_from_slice(&address(Field::DstAddr, random).to_be_bytes());
            bytes.extend(ip);
            bytes.extend(payload);
        }
    }
    Input { frame: bytes, ..Input::default() }
}

/// Forty bytes that serve as any transport header.
fn transport(fields: &BTreeMap<Field, u128>, random: &mut Random) -> Vec<u8> {
    let mut l4: Vec<u8> = (0..40).map(|_| random.next_u64() as u8).collect();
    l4[12] = 0x50 | (random.below(6) as u8) << 4;
    // Plausible TCP options.
    l4[20..40].copy_from_slice(&[2, 4, 5, 180, 1, 3, 3, 7, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
    for (&field, &value) in fields {
        match field {
            Field::SrcPort => l4[..2].copy_from_slice(&(value as u16).to_be_bytes()),
            Field::DstPort => l4[2..4].copy_from_slice(&(value as u16).to_be_bytes()),
            Field::TcpFlags => l4[13] = value as u8,
            Field::TcpDataOffset => l4[12] = (value as u8) << 4,
            Field::IcmpType => l4[0] = value as u8,
            Field::IcmpCode => l4[1] = value as u8,
            Field::L4Bytes { offset, len } => {
                let (offset, len) = (usize::from(offset), usize::from(len));
                l4[offset..offset + len].copy_from_slice(&value.to_be_bytes()[16 - len..]);
            }
            Field::L4Len => l4.truncate((value as usize).clamp(1, 40)),
            _ => {}
        }
        if l4.len() < 40 {
            break;
        }
    }
    l4
}
