//! Derived fields: emitted searches find what `polc_ir::derived` says, in the check VM and in the kernel, in packets
//! that are as they should be and in damaged ones.

use polc_ir::derived::{self, DerivedData, SctpFlags, SctpRule};
use polc_ir::entities::Derived;
use polc_ir::env::{Attach, Input};
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::limits::{DCCP_OPTIONS_MAX, SCTP_CHUNKS_MAX};
use polc_ir::outcome::Decider;
use polc_ir::packet::View;

mod common;

use common::frames::{Dice, ethernet, ipv4};
use common::plans::{Pair, all, eq, linear, plan, rule};

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
                0 => options.extend([self.next() as u8, 2]),
                2.. => options.push(self.pick(&[1, 1, 1, 0])),
                1 => options.extend([self.pick(&[32, 38, 44]), self.pick(&[0, 2, 3, 4, 200]), 5]),
            }
        }
        let kind = self.below(16) as u8;
        let long = self.below(2) as u8;
        let own = 3 + usize::from(long) + usize::from(derived::DCCP_TYPE_WORDS[usize::from(kind)]);
        let words = own + options.len().div_ceil(4);
        let mut header = vec![0; 12];
        header[4] = if self.one_in(6) { self.next() as u8 } else { words as u8 };
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
