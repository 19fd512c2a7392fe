//! Packets to measure with: many different headers that reach deep into a rule set, in random order.
//!
//! Branch predictors learn: with 2,000 headers repeated, a classifier that takes 33 ns reads as 6 ns. So there are at
//! least [`DISTINCT`] different headers, drawn into a pool of [`POOL`] packets. Headers are 60 % random points of a
//! random rule, 20 % source, destination and service of three different rules, 15 % a rule's point with one field just
//! outside it, 5 % random. *Uniform* draws each header alike; *Zipf* draws header k of a random permutation with
//! probability proportional to 1/k, as a few busy flows and a long tail.

use std::collections::HashSet;

use crate::random::Random;
use crate::rules::{Header, Rule, RuleSet, address_bits};

/// Packets in a pool: what the driver goes through.
pub(crate) const POOL: usize = 65_536;

/// Different headers, at least.
pub(crate) const DISTINCT: usize = 32_768;

/// How packets are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Traffic {
    /// Each header alike.
    Uniform,
    /// Header k with probability proportional to 1/k.
    Zipf,
}

impl Traffic {
    /// Both.
    pub(crate) const ALL: [Traffic; 2] = [Traffic::Uniform, Traffic::Zipf];
}

impl std::fmt::Display for Traffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Traffic::Uniform => "uniform",
            Traffic::Zipf => "Zipf",
        })
    }
}

fn point_in(random: &mut Random, range: (u128, u128)) -> u128 {
    let size = (range.1 - range.0).wrapping_add(1);
    let bits = u128::from(random.bits()) << 64 | u128::from(random.bits());
    if size == 0 { bits } else { range.0 + bits % size }
}

fn port_in(random: &mut Random, ports: (u16, u16)) -> u16 {
    ports.0 + random.below(u64::from(ports.1 - ports.0) + 1) as u16
}

/// A random point of a rule.
fn point(random: &mut Random, set: &RuleSet, rule: &Rule) -> Header {
    let src = point_in(random, rule.src.range(set.family));
    let dst = point_in(random, rule.dst.range(set.family));
    let (sport, dport) = (port_in(random, rule.sport), port_in(random, rule.dport));
    let proto = rule.proto.unwrap_or_else(|| [6, 17, 1][random.weighted(&[70, 25, 5])]);
    Header { src, dst, sport, dport, proto }
}

/// `count` different headers for a rule set that has rules; fewer if the rule set leaves too little choice.
pub(crate) fn headers(set: &RuleSet, count: usize, random: &mut Random) -> Vec<Header> {
    let mut seen = HashSet::new();
    let mut out = Vec::with_capacity(count);
    let mut tries = 0;
    while out.len() < count && tries < 20 * count {
        tries += 1;
        let rule = &set.rules[random.index(set.rules.len())];
        let mut header = point(random, set, rule);
        match random.weighted(&[60, 20, 15, 5]) {
            1 => {
                let (dst, service) =
                    (set.rules[random.index(set.rules.len())], set.rules[random.index(set.rules.len())]);
                header.dst = point(random, set, &dst).dst;
                let service = point(random, set, &service);
                (header.sport, header.dport, header.proto) = (service.sport, service.dport, service.proto);
            }
            2 => {
                let last = (1u128 << (address_bits(set.family) - 1)) - 1;
                let last = last << 1 | 1;
                match random.index(4) {
                    0 => header.src = rule.src.range(set.family).1.wrapping_add(1) & last,
                    1 => header.dst = rule.dst.range(set.family).1.wrapping_add(1) & last,
                    2 => header.sport = rule.sport.1.wrapping_add(1),
                    _ => header.dport = rule.dport.1.wrapping_add(1),
                }
            }
            3 => {
                // The upper half of random IPv6 addresses stays: else all would be outside every prefix at once.
                let mask = u128::MAX >> (128 - address_bits(set.family).min(64));
                header.src = header.src & !mask | u128::from(random.bits()) & mask;
                header.dst = header.dst & !mask | u128::from(random.bits()) & mask;
                (header.sport, header.dport) = (random.bits() as u16, random.bits() as u16);
                header.proto = [6, 17, 1, 47][random.weighted(&[60, 25, 10, 5])];
            }
            _ => {}
        }
        if header.proto != 6 && header.proto != 17 {
            (header.sport, header.dport) = (0, 0);
        }
        if seen.insert(header) {
            out.push(header);
        }
    }
    out
}

/// Draws [`POOL`] packets: indices into a list of `count` headers.
pub(crate) fn draw(traffic: Traffic, count: usize, random: &mut Random) -> Vec<u32> {
    match traffic {
        Traffic::Uniform => (0..POOL).map(|_| random.index(count) as u32).collect(),
        Traffic::Zipf => {
            let mut permutation: Vec<u32> = (0..count as u32).collect();
            random.shuffle(&mut permutation);
            let mut sum = 0.0;
            let cumulated: Vec<f64> = (1..=count)
                .map(|rank| {
                    sum += 1.0 / rank as f64;
                    sum
                })
                .collect();
            (0..POOL)
                .map(|_| {
                    let at = (random.bits() >> 11) as f64 / (1u64 << 53) as f64 * sum;
                    permutation[cumulated.partition_point(|&end| end < at).min(count - 1)]
                })
                .collect()
        }
    }
}
