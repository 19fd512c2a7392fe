//! What evaluation remembers from packet to packet: counters of stateful tests, rule counters, randomness.
//!
//! Each level starts from an equal `State` and consumes it in the same order, so that two levels agree on random and
//! stateful tests too.

use cranelift_entity::SecondaryMap;

use crate::entities::{Chain, EffectTest, Rule};
use crate::outcome::Count;
use crate::ruleset::{Counters, EffectTestKind};

/// The state of one rule set.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Seed and position of the random numbers.
    random: u64,
    /// xt_statistic's nth counters; `None` until first used.
    nth: SecondaryMap<EffectTest, Option<u32>>,
    /// What the packet that is being evaluated is counted for so far.
    pub(crate) counted: Vec<Count>,
    /// Packets and bytes that matched each rule. Kept by `Ruleset::eval` alone.
    pub rules: SecondaryMap<Rule, Counters>,
    /// Packets and bytes that took each base chain's policy. Kept by `Ruleset::eval` alone.
    pub policies: SecondaryMap<Chain, Counters>,
    /// Rules that packets were tried against. Kept by `Ruleset::eval` alone.
    pub tried: u64,
}

impl State {
    /// A fresh state; equal seeds give equal random numbers.
    pub fn new(seed: u64) -> State {
        State {
            random: seed,
            nth: SecondaryMap::new(),
            counted: Vec::new(),
            rules: SecondaryMap::new(),
            policies: SecondaryMap::new(),
            tried: 0,
        }
    }

    /// The next random number (splitmix64, Steele et al. 2014, upper half), which stands for
    /// `get_random_u32()`.
    pub fn random_u32(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 32) as u32
    }

    /// Runs a stateful or random test once. `None` if its kind needs a clock, which no `State` has.
    pub fn effect_test(&mut self, test: EffectTest, kind: EffectTestKind) -> Option<bool> {
        match kind {
            EffectTestKind::Random { probability } => Some(self.random_u32() & 0x7fff_ffff < probability),
            EffectTestKind::Nth { every, initial } => {
                let count = self.nth[test].unwrap_or(initial);
                let holds = count == every;
                self.nth[test] = Some(if holds { 0 } else { count.wrapping_add(1) });
                Some(holds)
            }
            EffectTestKind::Limit { .. } => None,
        }
    }
}

impl Counters {
    /// Counts one packet.
    pub fn count(&mut self, bytes: u64) {
        self.packets += 1;
        self.bytes += bytes;
    }
}
