//! Derived fields: emitted searches find what `polc_ir::derived` says, in the check VM and in the kernel, in packets
//! that are as they should be and in damaged ones.

use polc_ir::derived::{self, DerivedData, Ipv6HeaderTest, SctpFlags, SctpRule};
use polc_ir::entities::Derived;
use polc_ir::env::{Attach, Input};
use polc_ir::field::{EXT_HEADERS_BEYOND, EXT_HEADERS_CUT, Field};
use polc_ir::hook::Family;
use polc_ir::limits::{DCCP_OPTIONS_MAX, IPV6_EXT_HEADERS_MAX, SCTP_CHUNKS_MAX};
use polc_ir::outcome::{Decider, FrameKind};
use polc_ir::packet::View;

use polc_tests::programs::frames::{Dice, ethernet, ipv4};
use polc_tests::programs::plans::{Pair, all, eq, linear, plan, rule};

/// Makes packets of the protocols that are searched.
trait Packets {
    fn dccp(&mut self) -> Vec<u8>;
    fn sctp(&mut self) -> Vec<u8>;
    fn frame(&mut self, family: Family, protocol: u8) -> Vec<u8>;
}

impl Packets for Dice {
    fn dccp(&mut self) -> Vec<u8> {
        let mut options = Vec::new();
        let most = DCCP_OPTIONS_MAX as usize;
        let many = if self.one_in(4) { most - 8 + self.below(16) } else { self.below(6) };
        for _ in 0..many {
            match self.below(if many > 6 { 120 } else { 8 }) {
                0 => options.extend([self.number() as u8, 2]),
                2.. => options.push(self.pick(&[1, 1, 1, 0])),
                1 => options.extend([self.pick(&[32, 38, 44]), self.pick(&[0, 2, 3, 4, 200]), 5]),
            }
        }
        let kind = self.below(16) as u8;
        let long = self.below(2) as u8;
        let own = 3 + usize::from(long) + usize::from(derived::DCCP_TYPE_WORDS[usize::from(kind)]);
        let words = own + options.len().div_ceil(4);
        let mut header = vec![0; 12];
        header[4] = if self.one_in(6) { self.number() as u8 } else { words as u8 };
        header[8] = kind << 1 | long;
        header.resize(own * 4, 9);
        header.extend(options);
        header.resize(words * 4, 0);
        header
    }

    fn sctp(&mut self) -> Vec<u8> {
        let mut packet = vec![0; 12];
        let most = SCTP_CHUNKS_MAX as usize;
        let many = if self.one_in(4) { most - 4 + self.below(8) } else { self.below(5) };
        let common = self.pick(&[0, 1, 193]);
        for _ in 0..many {
            let kind = if self.one_in(20) { self.pick(&[0, 1, 3, 14, 64, 192, 193]) } else { common };
            let len = self.pick(&[4usize, 4, 5, 8, 16]);
            packet.extend([kind, self.pick(&[0, 3, 7, 255]), 0, len as u8]);
            packet.resize(packet.len() + len.next_multiple_of(4) - 4, 7);
        }
        if self.one_in(8) {
            let at = self.below(packet.len());
            packet[at] = self.pick(&[0, 1, 255]);
        }
        packet
    }

    fn frame(&mut self, family: Family, protocol: u8) -> Vec<u8> {
        let mut payload = match protocol {
            33 => self.dccp(),
            132 => self.sctp(),
            _ => self.bytes(40),
        };
        if self.one_in(6) {
            payload.truncate(self.below(payload.len() + 1));
        }
        let packet = match family {
            Family::V4 => ipv4(protocol, self.pick(&[0, 0, 0x2000, 7]), &[], &payload),
            Family::V6 => {
                let mut packet = vec![0x60, 0, 0, 0];
                packet.extend((payload.len() as u16).to_be_bytes());
                packet.extend([protocol, 64]);
                packet.extend(self.bytes(32));
                packet.extend(payload);
                packet
            }
        };
        let mut frame = ethernet(family.ether_type(), &packet);
        if self.one_in(6) {
            let padding = self.below(20);
            frame.extend(self.bytes(padding));
        }
        frame
    }
}

/// Runs `count` frames through a program that says a derived field's value, and through [`derived::eval`]. Returns how
/// often each value was seen.
fn compare(
    name: &str,
    family: Family,
    attach: Attach,
    data: &DerivedData,
    count: usize,
    mut frame: impl FnMut(&mut Dice) -> Vec<u8>,
) -> [u32; 4] {
    let field = Field::Derived(Derived::from_u32(0));
    let mut plan = plan(family, attach, &[field], 5);
    plan.derived.push(data.clone());
    linear(&mut plan, (0..4).map(|value| vec![all(&[eq(0, value)])]).chain([vec![]]).collect());
    let place = plan.place.clone();
    let mut pair = Pair::new(name, plan);
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut seen = [0; 4];
    for _ in 0..count {
        let frame = frame(&mut dice);
        let input = Input { frame: frame.clone(), ..Input::default() };
        let expected = match View::new(family, &place, &input) {
            Ok(view) => {
                let value = derived::eval(data, &view);
                seen[value as usize] += 1;
                Decider::Rule(rule(value))
            }
            Err(ending) => ending.by,
        };
        let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(pair.decides(&frame), expected, "{name} {family} {attach} {data:?}: {hex}");
    }
    seen
}

/// A chain of extension headers, many of them as tests ask, some damaged.
fn chain(dice: &mut Dice) -> Vec<u8> {
    let (mut next, mut packet) = (dice.pick(&[6, 17, 58, 59, 50, 0]), dice.bytes(24));
    let many = match dice.below(30) {
        0 => IPV6_EXT_HEADERS_MAX as usize - 2 + dice.below(4),
        _ => dice.below(5),
    };
    for _ in 0..many {
        let kind = dice.pick(&[0, 43, 43, 44, 51, 51, 60, 60]);
        let mut header = match kind {
            44 => [0, dice.pick(&[0, 0, 1]), 0, dice.pick(&[0, 1, 1, 6, 8, 9]), 0, 0, 0, dice.pick(&[7, 8])]
                .to_vec(),
            51 => {
                let words = dice.pick(&[1u8, 1, 2, 4]);
                let reserved = dice.pick(&[0, 0, 1]);
                let mut header =
                    vec![0, words, 0, reserved, 0, 0, dice.pick(&[0, 1]), dice.pick(&[5, 9, 10])];
                header.resize((usize::from(words) + 2) * 4, 3);
                header
            }
            43 => {
                let addresses = dice.pick(&[0usize, 1, 2, 2, 3, 5]);
                let odd = usize::from(dice.one_in(8));
                let units = 2 * addresses + odd;
                let kind = dice.pick(&[0, 0, 0, 2, 4]);
                let mut header =
                    vec![0, units as u8, kind, dice.pick(&[0, 1, 2, 3]), dice.pick(&[0, 0, 0, 1]), 0, 0, 0];
                for _ in 0..addresses {
                    header.extend(dice.pick(&[[1; 16], [1; 16], [2; 16], [2; 16], [3; 16]]));
                }
                header.resize(8 * (units + 1), 0);
                header
            }
            _ => {
                let units = dice.pick(&[0usize, 0, 1, 2]);
                let mut header = vec![0, units as u8];
                while header.len() < 8 * (units + 1) {
                    match dice.below(6) {
                        0 | 1 => header.push(0),
                        2 => header.extend([1, 0]),
                        3 => header.extend([1, 1, 0]),
                        4 => header.extend([5, dice.pick(&[2, 2, 3]), 0, 0]),
                        _ => header.extend([dice.number() as u8, dice.pick(&[0, 1, 4, 60])]),
                    }
                }
                header.truncate(8 * (units + 1));
                header
            }
        };
        header[0] = next;
        header.extend(packet);
        packet = header;
        next = kind;
    }
    if dice.one_in(5) && !packet.is_empty() {
        packet.truncate(dice.below(packet.len().min(80)));
    }
    if dice.one_in(6) && !packet.is_empty() {
        let at = dice.below(packet.len());
        packet[at] = dice.pick(&[0, 1, 2, 43, 44, 59, 60, 255]);
    }
    let mut all = vec![0x60, 0, 0, 0];
    all.extend((packet.len() as u16).to_be_bytes());
    all.extend([next, 64]);
    all.extend(dice.bytes(32));
    all.extend(packet);
    let mut frame = ethernet(0x86dd, &all);
    if dice.one_in(6) {
        let padding = dice.below(20);
        frame.extend(dice.bytes(padding));
    }
    frame
}

/// What the walks over headers say of the packet as a whole.
#[test]
fn extension_header_fields() {
    let fields = [Field::ExtHeaderMask, Field::ExtHeaders, Field::Fragment, Field::FragOffset, Field::Proto];
    for attach in [Attach::Xdp, Attach::TcEgress] {
        let mut dice = Dice(0x2545_f491_4f6c_dd1d);
        let place = plan(Family::V6, attach, &fields, 0).place;
        let frames: Vec<Vec<u8>> = (0..1500).map(|_| chain(&mut dice)).collect();
        // A rule for each combination of values.
        let mut values: Vec<Vec<u32>> = Vec::new();
        let mut expected = Vec::new();
        for frame in &frames {
            let input = Input { frame: frame.clone(), ..Input::default() };
            expected.push(match View::new(Family::V6, &place, &input) {
                Ok(view) => {
                    let found: Vec<u32> = fields.iter().map(|field| view.get(*field) as u32).collect();
                    let known = values.iter().position(|values| *values == found);
                    let number = known.unwrap_or(values.len());
                    if known.is_none() {
                        values.push(found);
                    }
                    Decider::Rule(rule(number as u32))
                }
                Err(ending) => ending.by,
            });
        }
        assert!(values.len() > 100 && expected.contains(&Decider::Frame(FrameKind::ManyHeaders)));
        for bit in [EXT_HEADERS_CUT, EXT_HEADERS_BEYOND] {
            assert!(values.iter().any(|values| values[0] == u32::from(bit)), "{bit:#x}");
        }
        let mut plan = plan(Family::V6, attach, &fields, values.len() as u32);
        let tests =
            |values: &Vec<u32>| (0..).zip(values).map(|(word, value)| all(&[eq(word, *value)])).collect();
        linear(&mut plan, values.iter().map(tests).collect());
        let mut pair = Pair::new("extension header fields", plan);
        for (frame, expected) in frames.iter().zip(expected) {
            let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(pair.decides(frame), expected, "{attach}: {hex}");
        }
    }
}

#[test]
fn extension_headers() {
    let frag = |id_negate, reserved, first, more, last| Ipv6HeaderTest::Frag {
        id: (7, 7),
        id_negate,
        len: Some(8),
        reserved,
        first,
        more,
        last,
    };
    let ah = |spi, spi_negate, len, len_negate, reserved| Ipv6HeaderTest::Ah {
        spi,
        spi_negate,
        len,
        len_negate,
        reserved,
    };
    let options = |destination, len, options: &[(u8, Option<u8>)]| Ipv6HeaderTest::Options {
        destination,
        len,
        len_negate: len == Some(16),
        options: options.to_vec(),
    };
    let rt = |kind, segments_left, len, addresses: &[u8], not_strict| Ipv6HeaderTest::Rt {
        kind,
        kind_negate: kind == Some(2),
        segments_left,
        segments_left_negate: segments_left.1 == 3,
        len,
        len_negate: len == Some(8),
        reserved: kind == Some(0),
        addresses: addresses.iter().map(|&byte| u128::from_be_bytes([byte; 16])).collect(),
        not_strict,
    };
    let all = (0, u32::MAX);
    let tests = [
        ah(all, false, 0, false, false),
        ah((5, 9), false, 12, false, true),
        ah((0x105, 0x109), true, 12, true, false),
        ah((9, 5), false, 0, false, false),
        ah((9, 5), true, 0, false, false),
        frag(false, false, false, false, false),
        frag(true, true, false, false, true),
        frag(false, false, true, true, false),
        options(false, None, &[]),
        options(false, Some(8), &[(5, Some(2))]),
        options(true, Some(16), &[(0, None), (1, None)]),
        options(true, None, &[(1, Some(1)), (0, None), (5, None), (0, None)]),
        rt(None, all, None, &[], false),
        rt(Some(0), (1, 2), Some(40), &[], false),
        rt(Some(2), (2, 3), Some(8), &[], false),
        rt(Some(0), all, None, &[1, 2], false),
        rt(Some(0), all, None, &[1, 2], true),
        rt(Some(0), all, None, &[1, 1, 2], true),
    ];
    for attach in [Attach::Xdp, Attach::TcIngress] {
        let mut seen = [0; 4];
        for test in &tests {
            let data = DerivedData::Ipv6Header(test.clone());
            let now = compare("extension headers", Family::V6, attach, &data, 400, chain);
            seen.iter_mut().zip(now).for_each(|(sum, now)| *sum += now);
        }
        assert!(seen[..3].iter().all(|&count| count > 50), "{seen:?}");
    }
}

const WHERE: [(Family, Attach); 3] =
    [(Family::V4, Attach::Xdp), (Family::V6, Attach::Xdp), (Family::V4, Attach::TcIngress)];

#[test]
fn dccp_options() {
    for (family, attach) in WHERE {
        for kind in [38, 0, 1] {
            let data = DerivedData::DccpOption { kind };
            let seen = compare("dccp", family, attach, &data, 600, |dice| {
                let protocol = dice.pick(&[33, 33, 33, 33, 33, 6]);
                dice.frame(family, protocol)
            });
            assert!(kind != 38 || seen.iter().all(|&count| count > 5), "{seen:?}");
        }
    }
}

#[test]
fn sctp_chunks() {
    let map = |kinds: &[u8]| {
        let mut map = [0; 8];
        for kind in kinds {
            map[usize::from(kind / 32)] |= 1 << (kind % 32);
        }
        map
    };
    let flags =
        vec![SctpFlags { chunk: 0, mask: 7, value: 3 }, SctpFlags { chunk: 193, mask: 128, value: 0 }];
    for (family, attach) in WHERE {
        let mut seen = [0; 4];
        for rule in [SctpRule::Any, SctpRule::All, SctpRule::Only] {
            for (kinds, flags) in [
                (map(&[0, 1]), vec![]),
                (map(&[3, 64, 193]), vec![]),
                (map(&[0, 193]), flags.clone()),
                (map(&[]), vec![]),
                ([u32::MAX; 8], vec![]),
            ] {
                let data = DerivedData::SctpChunks { rule, chunks: kinds, flags };
                let now = compare("sctp", family, attach, &data, 300, |dice| {
                    let protocol = dice.pick(&[132, 132, 132, 132, 132, 17]);
                    dice.frame(family, protocol)
                });
                seen.iter_mut().zip(now).for_each(|(sum, now)| *sum += now);
            }
        }
        assert!(seen.iter().all(|&count| count > 20), "{seen:?}");
    }
}
