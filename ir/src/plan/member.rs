//! Membership steps: a key word that says whether a packet is in a set, by looking its numbers up in tables.

use std::collections::BTreeMap;

use super::set::SetTable;
use super::{DeviceClasses, KeySlot};
use crate::entities::{Derived, Set};
use crate::hook::Family;
use crate::set::DIMENSIONS_MAX;
use crate::set::port::{Compared, PortReading};

/// How a field that says whether a packet is in a set comes about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStep {
    /// The field.
    pub derived: Derived,
    /// Its place: 1 if the packet is in the set, else 0.
    pub slot: KeySlot,
    /// The sets that are asked, in order, until one says yes.
    pub parts: Vec<MemberPart>,
}

/// A set that is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberPart {
    /// Whose table.
    pub set: Set,
    /// The set says yes if an element of this `nomatch` decides.
    pub nomatch: bool,
    /// Where the number of each dimension is in the key.
    pub numbers: Vec<NumberWords>,
}

/// Where a packet's number in one dimension is in the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberWords {
    /// Words, the most significant first, less the bits that do not count.
    Words {
        /// The first.
        word: u8,
        /// How many.
        words: u8,
        /// The bits of the last that count.
        mask: u32,
    },
    /// The name of a device, by its class; 0 if there is none.
    Device {
        /// The word of the class.
        word: u8,
    },
    /// `proto << 16 | port`, or 0 for packets that have none: [`crate::set::port`].
    Port {
        /// Whose packets.
        family: Family,
        /// The word of the protocol.
        proto: u8,
        /// Of the port.
        port: u8,
        /// Of ICMP's type and code.
        icmp: u8,
        /// Of how many bytes there are from the transport header on.
        l4_len: u8,
        /// Of the fragment's offset, where the rules see fragments as they are.
        frag_offset: Option<u8>,
    },
}

impl NumberWords {
    /// The number.
    pub fn number(&self, devices: &DeviceClasses, key: &[u32]) -> u128 {
        let word = |at: u8| u128::from(key[usize::from(at)]);
        match *self {
            NumberWords::Words { word: first, words, mask } => {
                let all = (first..first + words).fold(0, |number, at| number << 32 | word(at));
                all & (u128::MAX << 32 | u128::from(mask))
            }
            NumberWords::Device { word } => devices.name(key[usize::from(word)]),
            NumberWords::Port { family, proto, port, icmp, l4_len, frag_offset } => {
                let number = key[usize::from(proto)] as u8;
                let reading = PortReading::of(family, number)
                    .filter(|reading| reading.reads(word(l4_len), frag_offset.map_or(0, word)));
                let Some(reading) = reading else { return 0 };
                let compared = match reading.compared {
                    Compared::Port => word(port),
                    Compared::TypeAndCode => word(icmp),
                    Compared::Zero => 0,
                };
                u128::from(number) << 16 | compared
            }
        }
    }

    /// The words that are read.
    fn words(&self) -> Vec<u8> {
        match *self {
            NumberWords::Words { word, words, .. } => (word..word + words).collect(),
            NumberWords::Device { word } => vec![word],
            NumberWords::Port { proto, port, icmp, l4_len, frag_offset, .. } => {
                [proto, port, icmp, l4_len].into_iter().chain(frag_offset).collect()
            }
        }
    }
}

impl MemberStep {
    /// Whether a packet with this key is in the set.
    pub fn holds(&self, tables: &BTreeMap<Set, SetTable>, devices: &DeviceClasses, key: &[u32]) -> bool {
        self.parts.iter().any(|part| {
            let table = &tables[&part.set];
            let mut numbers = [0; DIMENSIONS_MAX];
            for (number, words) in numbers.iter_mut().zip(&part.numbers) {
                *number = words.number(devices, key);
            }
            table.shape.covers(table.words.as_slice(), &numbers) == Some(part.nomatch)
        })
    }

    /// Everything wrong with the step's shape, in a plan whose key has so many words.
    pub fn verify(&self, tables: &BTreeMap<Set, SetTable>, words: usize) -> Vec<String> {
        let mut wrong = Vec::new();
        let read = self.parts.iter().flat_map(|part| part.numbers.iter().flat_map(NumberWords::words));
        if read.chain([self.slot.word]).any(|word| usize::from(word) >= words) {
            wrong.push(format!("{} uses a word that the key does not have", self.derived));
        }
        for part in &self.parts {
            match tables.get(&part.set) {
                None => wrong.push(format!("{} asks {}, which has no table", self.derived, part.set)),
                Some(table) => {
                    let dimensions = table.shape.widths.iter().filter(|width| **width > 0).count();
                    if part.numbers.len() != dimensions {
                        wrong.push(format!("{} has not a number for each dimension", self.derived));
                    }
                }
            }
        }
        wrong
    }
}
