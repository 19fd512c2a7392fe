//! Rule sets made up by the benchmark, for when none lie beside the checkout.
//!
//! They follow what the literature reports of real filters (Taylor and Turner: ClassBench, a packet classification
//! benchmark, IEEE/ACM Transactions on Networking 2007, sections III and IV): access lists name servers exactly and
//! clients by prefix, firewalls leave one of the addresses open in a third of their rules or more, IP chains are in
//! between; destination ports are mostly one number, source ports mostly any; few different prefixes occur again and
//! again, and longer ones lie inside shorter ones. Two sets of each kind, with a seed each that is printed with the
//! results.

use polc_ir::hook::Family;

use crate::random::Random;
use crate::rules::{PORTS, Prefix, Rule, RuleSet};

/// What kind of filter a set is like. Weights are per mille or relative.
struct Profile {
    name: &'static str,
    /// Rules with any source, any destination; per mille.
    any: [u64; 2],
    /// Relative frequency of the lengths 8, 16, 20, 24, 28, 32; for source and destination.
    lengths: [[u64; 6]; 2],
    /// How often a prefix is one that an earlier rule has; per mille.
    again: u64,
    /// Relative frequency of tcp, udp, icmp, any.
    protocols: [u64; 4],
    /// Relative frequency of any port, 1024 and above, one port, a range; for source and destination.
    ports: [[u64; 4]; 2],
}

const PROFILES: [Profile; 6] = [
    Profile {
        name: "acl-a",
        any: [20, 5],
        lengths: [[0, 10, 20, 160, 60, 750], [0, 5, 5, 90, 50, 850]],
        again: 700,
        protocols: [800, 120, 20, 60],
        ports: [[1_000, 0, 0, 0], [60, 40, 850, 50]],
    },
    Profile {
        name: "acl-b",
        any: [120, 60],
        lengths: [[20, 120, 120, 440, 100, 200], [10, 60, 60, 300, 120, 450]],
        again: 550,
        protocols: [640, 220, 40, 100],
        ports: [[900, 60, 30, 10], [200, 100, 560, 140]],
    },
    Profile {
        name: "fw-a",
        any: [450, 350],
        lengths: [[10, 40, 30, 240, 80, 600], [5, 30, 30, 200, 100, 635]],
        again: 800,
        protocols: [600, 250, 70, 80],
        ports: [[600, 200, 150, 50], [260, 180, 450, 110]],
    },
    Profile {
        name: "fw-b",
        any: [250, 550],
        lengths: [[40, 160, 80, 360, 60, 300], [20, 60, 60, 260, 100, 500]],
        again: 850,
        protocols: [480, 330, 60, 130],
        ports: [[450, 250, 260, 40], [330, 220, 380, 70]],
    },
    Profile {
        name: "ipc-a",
        any: [100, 80],
        lengths: [[10, 60, 60, 300, 120, 450], [10, 50, 60, 280, 120, 480]],
        again: 650,
        protocols: [620, 240, 60, 80],
        ports: [[780, 90, 100, 30], [300, 120, 500, 80]],
    },
    Profile {
        name: "ipc-b",
        any: [300, 300],
        lengths: [[30, 200, 100, 470, 50, 150], [30, 200, 100, 470, 50, 150]],
        again: 400,
        protocols: [300, 300, 50, 350],
        ports: [[1_000, 0, 0, 0], [1_000, 0, 0, 0]],
    },
];

/// The sets' names.
pub(crate) fn sets() -> impl Iterator<Item = &'static str> {
    PROFILES.iter().map(|profile| profile.name)
}

/// Ports that rules name, most frequent first.
const SERVICES: [u16; 24] = [
    80, 443, 22, 53, 25, 123, 110, 143, 21, 23, 161, 389, 636, 993, 995, 3306, 3389, 5432, 8080, 8443, 179,
    514, 1433, 5060,
];

/// The rule set of that profile and size.
pub(crate) fn generate(name: &str, rules: usize, seed: u64) -> Option<RuleSet> {
    let profile = PROFILES.iter().find(|profile| profile.name == name)?;
    let mut random = Random::new(seed);
    // Where addresses lie: a few networks hold most hosts.
    let sites: Vec<u32> = (0..(rules / 40).clamp(4, 400)).map(|_| site(&mut random)).collect();
    let mut known: [Vec<Prefix>; 2] = [Vec::new(), Vec::new()];
    let mut out = Vec::with_capacity(rules);
    for _ in 0..rules {
        let mut prefixes = [Prefix::ANY; 2];
        for (side, chosen) in prefixes.iter_mut().enumerate() {
            if random.permille(profile.any[side]) {
                continue;
            }
            *chosen = if !known[side].is_empty() && random.permille(profile.again) {
                known[side][random.index(known[side].len())]
            } else {
                let length = [8, 16, 20, 24, 28, 32][random.weighted(&profile.lengths[side])];
                let site = sites[random.index(sites.len()).min(random.index(sites.len()))];
                let address = site & 0xffff_0000 | random.bits() as u32 & 0xffff;
                let prefix = Prefix::new(Family::V4, address.into(), length);
                known[side].push(prefix);
                prefix
            };
        }
        let proto = [Some(6), Some(17), Some(1), None][random.weighted(&profile.protocols)];
        let [sport, dport] = profile.ports.map(|weights| match proto {
            Some(6 | 17) => ports(&mut random, &weights),
            _ => PORTS,
        });
        let accept = random.permille(600);
        out.push(Rule { src: prefixes[0], dst: prefixes[1], sport, dport, proto, accept });
    }
    // What is open on both sides comes last, as people write it; in front it would hide everything.
    out.sort_by_key(|rule| rule.src == Prefix::ANY && rule.dst == Prefix::ANY);
    Some(RuleSet { name: format!("{name}_{rules}"), family: Family::V4, rules: out, policy_accepts: false })
}

/// A network of 16 bits that hosts may be in: not 0, loopback, link local or multicast.
fn site(random: &mut Random) -> u32 {
    loop {
        let address = random.bits() as u32;
        if matches!(address >> 24, 1..=126 | 128..=223) && address >> 16 != 0xa9fe {
            return address;
        }
    }
}

fn ports(random: &mut Random, weights: &[u64; 4]) -> (u16, u16) {
    match random.weighted(weights) {
        0 => PORTS,
        1 => (1_024, u16::MAX),
        2 if random.permille(700) => {
            let rank = random.index(SERVICES.len()).min(random.index(SERVICES.len()));
            (SERVICES[rank], SERVICES[rank])
        }
        2 => {
            let port = 1 + random.below(65_534) as u16;
            (port, port)
        }
        _ => {
            let lo = 1 + random.below(60_000) as u16;
            (lo, lo + 1 + random.below(4_000) as u16)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{generate, sets};
    use crate::random::Random;
    use crate::rules::RuleSet;
    use crate::trace::headers;

    #[test]
    fn text_reads_back_and_seeds_repeat() {
        for name in sets() {
            let set = generate(name, 300, 7).expect("a profile");
            let read = RuleSet::parse(name, &set.iptables_text("INPUT")).expect("own text");
            assert_eq!(read.rules, set.rules, "{name}");
            assert_eq!(read.policy_accepts, set.policy_accepts);
            assert_eq!(generate(name, 300, 7).expect("a profile").rules, set.rules);
            assert_ne!(generate(name, 300, 8).expect("a profile").rules, set.rules);
        }
    }

    #[test]
    fn ipv6_counterparts_match_alike() {
        for name in sets() {
            let set = generate(name, 400, 3).expect("a profile");
            let headers = headers(&set, 3_000, &mut Random::new(5));
            let first = set.first_matches(&headers);
            let scan = |set: &RuleSet, header| {
                set.rules.iter().position(|rule| rule.fits(set.family, header)).map_or(0, |at| at as u32 + 1)
            };
            let slow: Vec<u32> = headers.iter().map(|header| scan(&set, header)).collect();
            assert_eq!(first, slow, "{name}: the scan by buckets is the scan");
            let v6: Vec<_> = headers.iter().map(|header| header.to_v6()).collect();
            assert_eq!(first, set.to_v6().first_matches(&v6), "{name}");
            assert!(first.iter().any(|&number| number > 100), "{name}: packets reach deep rules");
        }
    }
}
