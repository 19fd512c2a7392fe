//! Rules of five fields, the only kind that every contestant understands, and the benchmark's own idea of what they
//! mean: the first rule that a header fits.
//!
//! The linear scan here shares nothing with polc, so a verdict that polc's reference, polc's program and this scan
//! agree on is right for three reasons.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use polc_ir::hook::Family;

use crate::random::mix;

/// A prefix of an address; IPv4 addresses are the lower 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Prefix {
    /// The address, host bits 0.
    pub(crate) address: u128,
    /// Length in bits.
    pub(crate) length: u8,
}

/// Bits of a family's addresses.
pub(crate) const fn address_bits(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

impl Prefix {
    /// Every address.
    pub(crate) const ANY: Prefix = Prefix { address: 0, length: 0 };

    /// The prefix of that length which holds the address.
    pub(crate) fn new(family: Family, address: u128, length: u8) -> Prefix {
        let host = u32::from(address_bits(family) - length);
        Prefix { address: address.checked_shr(host).map_or(0, |kept| kept << host), length }
    }

    /// First and last address.
    pub(crate) fn range(self, family: Family) -> (u128, u128) {
        let host = u32::from(address_bits(family) - self.length);
        (self.address, self.address | 1u128.checked_shl(host).map_or(u128::MAX, |size| size - 1))
    }
}

/// A rule. Ports are only meaningful with protocol 6 or 17.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rule {
    /// Source address.
    pub(crate) src: Prefix,
    /// Destination address.
    pub(crate) dst: Prefix,
    /// First and last source port.
    pub(crate) sport: (u16, u16),
    /// First and last destination port.
    pub(crate) dport: (u16, u16),
    /// Protocol; `None`: every one.
    pub(crate) proto: Option<u8>,
    /// Whether it accepts; otherwise it drops.
    pub(crate) accept: bool,
}

/// Every port.
pub(crate) const PORTS: (u16, u16) = (0, u16::MAX);

/// The fields of a packet that rules test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Header {
    /// Source address.
    pub(crate) src: u128,
    /// Destination address.
    pub(crate) dst: u128,
    /// Source port, or the first two bytes of another protocol's header.
    pub(crate) sport: u16,
    /// Destination port.
    pub(crate) dport: u16,
    /// Protocol.
    pub(crate) proto: u8,
}

/// Rules in order, and what happens to packets that none fits.
#[derive(Clone, Debug)]
pub(crate) struct RuleSet {
    /// Its name.
    pub(crate) name: String,
    /// Its family.
    pub(crate) family: Family,
    /// The rules.
    pub(crate) rules: Vec<Rule>,
    /// Whether the policy accepts.
    pub(crate) policy_accepts: bool,
}

impl Rule {
    /// Whether a header fits.
    pub(crate) fn fits(&self, family: Family, header: &Header) -> bool {
        let inside = |prefix: Prefix, address: u128| {
            let host = u32::from(address_bits(family) - prefix.length);
            (prefix.address ^ address).checked_shr(host).unwrap_or(0) == 0
        };
        inside(self.src, header.src)
            && inside(self.dst, header.dst)
            && self.proto.is_none_or(|proto| proto == header.proto)
            && (self.sport.0..=self.sport.1).contains(&header.sport)
            && (self.dport.0..=self.dport.1).contains(&header.dport)
    }
}

/// The protocol numbers that iptables-save writes as names.
const PROTOCOLS: [(&str, u8); 12] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ggp", 3),
    ("ipencap", 4),
    ("st", 5),
    ("tcp", 6),
    ("udp", 17),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ospf", 89),
    ("ipv6-icmp", 58),
];

fn ports_text(ports: (u16, u16)) -> String {
    if ports.0 == ports.1 { ports.0.to_string() } else { format!("{}:{}", ports.0, ports.1) }
}

impl RuleSet {
    /// The address as text.
    pub(crate) fn address_text(&self, address: u128) -> String {
        match self.family {
            Family::V4 => Ipv4Addr::from(address as u32).to_string(),
            Family::V6 => Ipv6Addr::from(address).to_string(),
        }
    }

    /// The rules as iptables-save writes them, all in the filter table's chain `chain`.
    pub(crate) fn iptables_text(&self, chain: &str) -> String {
        let mut out = String::from("*filter\n");
        for name in ["INPUT", "FORWARD", "OUTPUT"] {
            let policy = if name == chain && !self.policy_accepts { "DROP" } else { "ACCEPT" };
            _ = writeln!(out, ":{name} {policy} [0:0]");
        }
        for rule in &self.rules {
            self.rule_text(&mut out, chain, rule, if rule.accept { "ACCEPT" } else { "DROP" });
        }
        out.push_str("COMMIT\n");
        out
    }

    /// The rules in the raw table's PREROUTING, the earliest chain there is.
    pub(crate) fn raw_text(&self) -> String {
        let policy = if self.policy_accepts { "ACCEPT" } else { "DROP" };
        let mut out = format!("*raw\n:PREROUTING {policy} [0:0]\n:OUTPUT ACCEPT [0:0]\n");
        for rule in &self.rules {
            self.rule_text(&mut out, "PREROUTING", rule, if rule.accept { "ACCEPT" } else { "DROP" });
        }
        out.push_str("COMMIT\n");
        out
    }

    /// The rules for nft, in a chain at the same place as [`RuleSet::raw_text`]'s, without counters.
    pub(crate) fn nft_text(&self) -> String {
        let policy = if self.policy_accepts { "accept" } else { "drop" };
        let mut out = format!(
            "table ip bench {{\nchain pre {{\ntype filter hook prerouting priority raw; policy {policy};\n"
        );
        for rule in &self.rules {
            for (field, prefix) in [("saddr", rule.src), ("daddr", rule.dst)] {
                if prefix.length != 0 {
                    _ = write!(out, "ip {field} {}/{} ", self.address_text(prefix.address), prefix.length);
                }
            }
            match rule.proto {
                Some(proto @ (6 | 17)) if rule.sport != PORTS || rule.dport != PORTS => {
                    let name = if proto == 6 { "tcp" } else { "udp" };
                    for (field, (lo, hi)) in [("sport", rule.sport), ("dport", rule.dport)] {
                        match (lo, hi) {
                            PORTS => {}
                            _ if lo == hi => _ = write!(out, "{name} {field} {lo} "),
                            _ => _ = write!(out, "{name} {field} {lo}-{hi} "),
                        }
                    }
                }
                Some(proto) => _ = write!(out, "ip protocol {proto} "),
                None => {}
            }
            out.push_str(if rule.accept { "accept\n" } else { "drop\n" });
        }
        out.push_str("}\n}\n");
        out
    }

    /// `count` of the rules, evenly spaced.
    pub(crate) fn thinned(&self, count: usize) -> RuleSet {
        let step = (self.rules.len() / count).max(1);
        RuleSet {
            name: format!("{}/{count}", self.name),
            rules: self.rules.iter().copied().step_by(step).take(count).collect(),
            ..self.clone()
        }
    }

    /// One rule as iptables-save writes it.
    pub(crate) fn rule_text(&self, out: &mut String, chain: &str, rule: &Rule, target: &str) {
        _ = write!(out, "-A {chain}");
        for (option, prefix) in [("-s", rule.src), ("-d", rule.dst)] {
            if prefix.length != 0 {
                _ = write!(out, " {option} {}/{}", self.address_text(prefix.address), prefix.length);
            }
        }
        if let Some(proto) = rule.proto {
            let name = PROTOCOLS.iter().find(|(_, number)| *number == proto);
            let name = name.map_or_else(|| proto.to_string(), |(name, _)| (*name).to_string());
            _ = write!(out, " -p {name}");
            if rule.sport != PORTS || rule.dport != PORTS {
                _ = write!(out, " -m {name}");
                for (option, ports) in [("--sport", rule.sport), ("--dport", rule.dport)] {
                    if ports != PORTS {
                        _ = write!(out, " {option} {}", ports_text(ports));
                    }
                }
            }
        }
        _ = writeln!(out, " -j {target}");
    }

    /// Reads back text of the form that [`RuleSet::iptables_text`] writes, of any one chain.
    ///
    /// # Errors
    /// The first line that is of another form.
    pub(crate) fn parse(name: &str, text: &str) -> Result<RuleSet, String> {
        let mut set =
            RuleSet { name: name.to_string(), family: Family::V4, rules: Vec::new(), policy_accepts: true };
        for line in text.lines() {
            if line.starts_with(':') && line.contains(" DROP ") {
                set.policy_accepts = false;
            } else if line.starts_with("-A ") {
                set.rules.push(parse_rule(line).ok_or_else(|| format!("{name}: `{line}`"))?);
            }
        }
        Ok(set)
    }

    /// The number of the first rule that each header fits, from 1; 0 if none.
    pub(crate) fn first_matches(&self, headers: &[Header]) -> Vec<u32> {
        // Rules by the first byte of a source prefix; shorter prefixes are in every bucket they cover.
        let shift = address_bits(self.family) - 8;
        // All addresses of the IPv6 mapping share their first 32 bits.
        let shift = if self.family == Family::V6 { shift - 32 } else { shift };
        let mut buckets = vec![Vec::new(); 256];
        for (number, rule) in self.rules.iter().enumerate() {
            let (lo, hi) = rule.src.range(self.family);
            let (lo, hi) = if hi - lo >= 1 << (shift + 8) || rule.src.length == 0 {
                (0, 255)
            } else {
                ((lo >> shift & 255) as usize, (hi >> shift & 255) as usize)
            };
            for bucket in &mut buckets[lo..=hi] {
                bucket.push(number as u32);
            }
        }
        let first = |header: &Header| {
            let bucket = &buckets[(header.src >> shift & 255) as usize];
            let found = bucket.iter().find(|&&number| self.rules[number as usize].fits(self.family, header));
            found.map_or(0, |number| number + 1)
        };
        headers.iter().map(first).collect()
    }

    /// Whether packets whose first rule is `number` (0: none) are accepted.
    pub(crate) fn accepts(&self, number: u32) -> bool {
        match number.checked_sub(1) {
            Some(index) => self.rules[index as usize].accept,
            None => self.policy_accepts,
        }
    }

    /// The rule set as an IPv6 one, see [`address_to_v6`] and [`proto_to_v6`]. A prefix of length L becomes one of
    /// 32 + L, whole addresses and the empty prefix stay what they are. A header fits a rule if and only if its
    /// counterpart fits the rule's counterpart.
    pub(crate) fn to_v6(&self) -> RuleSet {
        let prefix = |prefix: Prefix| match prefix.length {
            0 => Prefix::ANY,
            32 => Prefix { address: address_to_v6(prefix.address), length: 128 },
            length => Prefix::new(Family::V6, address_to_v6(prefix.address), 32 + length),
        };
        let rule = |rule: &Rule| Rule {
            src: prefix(rule.src),
            dst: prefix(rule.dst),
            proto: rule.proto.map(proto_to_v6),
            ..*rule
        };
        RuleSet {
            name: format!("{}_v6", self.name),
            family: Family::V6,
            rules: self.rules.iter().map(rule).collect(),
            policy_accepts: self.policy_accepts,
        }
    }
}

impl Header {
    /// The header's IPv6 counterpart.
    pub(crate) fn to_v6(self) -> Header {
        Header {
            src: address_to_v6(self.src),
            dst: address_to_v6(self.dst),
            proto: proto_to_v6(self.proto),
            ..self
        }
    }
}

/// The IPv6 address that stands for an IPv4 address: 2001:db8:, its 32 bits, and 64 bits that are a random function of
/// it, as interface identifiers are.
pub(crate) fn address_to_v6(address: u128) -> u128 {
    0x2001_0db8 << 96 | address << 64 | u128::from(mix(address as u64))
}

/// ICMP becomes ICMPv6; numbers of extension headers, which are no protocol in IPv6, become unassigned ones.
pub(crate) fn proto_to_v6(proto: u8) -> u8 {
    match proto {
        1 => 58,
        58 => 1,
        0 => 200,
        43 => 201,
        44 => 202,
        51 => 203,
        59 => 204,
        60 => 205,
        135 => 206,
        other => other,
    }
}

fn parse_rule(line: &str) -> Option<Rule> {
    let mut words = line.split(' ').skip(2);
    let mut rule =
        Rule { src: Prefix::ANY, dst: Prefix::ANY, sport: PORTS, dport: PORTS, proto: None, accept: false };
    while let Some(option) = words.next() {
        let value = words.next()?;
        let prefix = || {
            let (address, length) = value.split_once('/')?;
            let address: Ipv4Addr = address.parse().ok()?;
            Some(Prefix::new(Family::V4, u32::from(address).into(), length.parse().ok()?))
        };
        let ports = || {
            let (lo, hi) = value.split_once(':').unwrap_or((value, value));
            Some((lo.parse().ok()?, hi.parse().ok()?))
        };
        match option {
            "-s" => rule.src = prefix()?,
            "-d" => rule.dst = prefix()?,
            "-p" => {
                let number = PROTOCOLS.iter().find(|(name, _)| *name == value).map(|(_, number)| *number);
                rule.proto = Some(number.or_else(|| value.parse().ok())?);
            }
            "--sport" => rule.sport = ports()?,
            "--dport" => rule.dport = ports()?,
            "-j" => rule.accept = value == "ACCEPT",
            "-m" => {}
            _ => return None,
        }
    }
    Some(rule)
}
