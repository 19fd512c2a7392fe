//! Reports of packets as they are decided: what a program that reports and the program's reader agree on.
//!
//! A program emitted with [`crate::emit::Target::trace`] looks at one word of a data map after it has counted a packet.
//! While that word is 0, nothing else happens. Otherwise the packet is reported through a ring buffer if its counter
//! slot is wanted, one of up to [`PATTERNS_MAX`] patterns fits it, and its CPU's token bucket holds enough; packets that
//! are wanted and fit and are not reported all the same are counted. Whatever depends on who decided (rule, chain,
//! verdict) is asked through the table of wanted slots, so that a program need not know what its slots stand for.
//!
//! | map | what it is |
//! | --- | --- |
//! | [`CONFIG_MAP`] | the switch, the token bucket's parameters, the patterns: [`Config::encode`] |
//! | [`WANTED_MAP`] | a byte for each counter slot, not 0 if its packets are wanted |
//! | [`STATE_MAP`] | for each CPU what [`Tally`] holds, behind the token bucket's state |
//! | [`EVENTS_MAP`] | the ring buffer of [`Event`] records |
//!
//! The address, protocol and ports come from the frame as it is when the packet was decided, read once more only for
//! packets whose slot is wanted: what a program parses to decide depends on the rules, and keeping it for a report would
//! cost every packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// The ring buffer.
pub const EVENTS_MAP: &str = "polc_events";
/// The data map of the switch and the patterns.
pub const CONFIG_MAP: &str = "trace";
/// The data map of wanted slots, padded to a power of two.
pub const WANTED_MAP: &str = "wanted";
/// The per-CPU array, of one entry, of the token bucket and what was counted.
pub const STATE_MAP: &str = "polc_trace";

/// Bytes of the ring buffer: room for 3,640 reports.
pub const EVENTS_BYTES: u32 = 256 << 10;

/// Most patterns of a filter.
pub const PATTERNS_MAX: usize = 4;

/// IPv6 extension headers that a report's protocol and ports are looked for behind. What lies deeper is reported with
/// the protocol of the header where the search ended.
pub const EXT_HEADERS_MAX: u32 = 8;

/// Protocols of which ports are reported, and asked for: TCP, UDP, DCCP, SCTP, UDP-Lite.
pub const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// A record, in bytes from its start; numbers in the CPU's order, addresses as the packet has them.
pub mod record {
    /// Nanoseconds since boot, suspend excluded (`CLOCK_MONOTONIC`), 64 bits.
    pub const TIME: i16 = 0;
    /// The counter slot, 32 bits.
    pub const SLOT: i16 = 8;
    /// Number of the device the program runs for, 32 bits.
    pub const IFINDEX: i16 = 12;
    /// What counters add for the packet, 32 bits.
    pub const LENGTH: i16 = 16;
    /// The mark after the rules, 32 bits.
    pub const MARK: i16 = 20;
    /// Source address, 16 bytes; IPv4 takes the first four.
    pub const SRC: i16 = 24;
    /// Destination address, likewise.
    pub const DST: i16 = 40;
    /// Source port, or ICMP type, 16 bits.
    pub const SRC_PORT: i16 = 56;
    /// Destination port, or ICMP code, 16 bits.
    pub const DST_PORT: i16 = 58;
    /// EtherType behind VLAN tags, 16 bits.
    pub const ETHER_TYPE: i16 = 60;
    /// IP protocol, 8 bits.
    pub const PROTO: i16 = 62;
    /// The bits of [`super::flag`], 8 bits.
    pub const FLAGS: i16 = 63;
    /// Bytes of a record.
    pub const BYTES: usize = 64;
}

/// What a record holds.
pub mod flag {
    /// Addresses and a protocol.
    pub const IP: u8 = 1;
    /// The addresses are IPv6's.
    pub const V6: u8 = 2;
    /// Ports.
    pub const PORTS: u8 = 4;
    /// An ICMP type and code in place of ports.
    pub const ICMP: u8 = 8;
    /// The packet is a fragment that does not start with a transport header.
    pub const LATER_FRAGMENT: u8 = 16;
}

/// The configuration, in bytes from the start of its map; numbers in the CPU's order.
pub mod config {
    /// Not 0 while packets are to be reported, 32 bits.
    pub const SWITCH: i16 = 0;
    /// Nanoseconds that pay for one report on one CPU, 64 bits.
    pub const COST: i16 = 8;
    /// Most nanoseconds that are saved up, 64 bits.
    pub const BURST: i16 = 16;
    /// The first pattern.
    pub const PATTERNS: i16 = 32;
    /// Bytes of a pattern.
    pub const PATTERN_BYTES: i16 = 112;
    /// Bytes of all.
    pub const BYTES: usize = PATTERNS as usize + super::PATTERNS_MAX * PATTERN_BYTES as usize;
}

/// A pattern, in bytes from its start, all numbers 32 bits. `X_MASK` says which bits of `X` have to be equal, `X_SPAN`
/// by how much the packet's may be larger.
pub mod pattern {
    /// 1 if the pattern is one.
    pub const USED: i16 = 0;
    /// Protocol.
    pub const PROTO: i16 = 4;
    /// Its mask.
    pub const PROTO_MASK: i16 = 8;
    /// Lowest source port.
    pub const SRC_PORT: i16 = 12;
    /// Its span.
    pub const SRC_PORT_SPAN: i16 = 16;
    /// Lowest destination port.
    pub const DST_PORT: i16 = 20;
    /// Its span.
    pub const DST_PORT_SPAN: i16 = 24;
    /// Flags.
    pub const FLAGS: i16 = 28;
    /// Their mask.
    pub const FLAGS_MASK: i16 = 32;
    /// Device.
    pub const IFINDEX: i16 = 36;
    /// Its mask.
    pub const IFINDEX_MASK: i16 = 40;
    /// Source address, 16 bytes.
    pub const SRC: i16 = 44;
    /// Its mask.
    pub const SRC_MASK: i16 = 60;
    /// Destination address, 16 bytes.
    pub const DST: i16 = 76;
    /// Its mask.
    pub const DST_MASK: i16 = 92;
}

/// A CPU's state, in bytes from its start, all numbers 64 bits.
pub mod state {
    /// When the bucket was last filled.
    pub const LAST: i16 = 0;
    /// Nanoseconds saved up.
    pub const CREDIT: i16 = 8;
    /// Packets reported.
    pub const REPORTED: i16 = 16;
    /// Packets that fitted and were not reported because the bucket was empty.
    pub const LIMITED: i16 = 24;
    /// The same because the ring buffer was full.
    pub const FULL: i16 = 32;
    /// Bytes of all.
    pub const BYTES: usize = 40;
}

/// Where a record's value is, for readers that don't know polc.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RecordField {
    /// What it is.
    pub name: String,
    /// Its first byte.
    pub offset: u16,
    /// How many bytes it has.
    pub bytes: u16,
    /// Whether its bytes are as in the packet; else it is a number in the CPU's order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network_order: bool,
}

/// What the manifest says of a program that reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TraceManifest {
    /// The ring buffer's name.
    pub events: String,
    /// The data map of switch and patterns.
    pub config: String,
    /// The data map of wanted slots.
    pub wanted: String,
    /// The per-CPU array of the token bucket.
    pub state: String,
    /// A record's fields.
    pub record: Vec<RecordField>,
}

impl TraceManifest {
    /// What every program of this version says.
    pub fn current() -> TraceManifest {
        let fields: [(&str, i16, u16, bool); 12] = [
            ("time-ns", record::TIME, 8, false),
            ("slot", record::SLOT, 4, false),
            ("ifindex", record::IFINDEX, 4, false),
            ("length", record::LENGTH, 4, false),
            ("mark", record::MARK, 4, false),
            ("source", record::SRC, 16, true),
            ("destination", record::DST, 16, true),
            ("source-port", record::SRC_PORT, 2, false),
            ("destination-port", record::DST_PORT, 2, false),
            ("ether-type", record::ETHER_TYPE, 2, false),
            ("protocol", record::PROTO, 1, false),
            ("flags", record::FLAGS, 1, false),
        ];
        TraceManifest {
            events: EVENTS_MAP.to_string(),
            config: CONFIG_MAP.to_string(),
            wanted: WANTED_MAP.to_string(),
            state: STATE_MAP.to_string(),
            record: fields
                .into_iter()
                .map(|(name, offset, bytes, network_order)| RecordField {
                    name: name.to_string(),
                    offset: offset as u16,
                    bytes,
                    network_order,
                })
                .collect(),
        }
    }
}

/// One report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds since boot, suspend excluded.
    pub time_ns: u64,
    /// The counter slot that the packet was counted in.
    pub slot: u32,
    /// Number of the device the program runs for.
    pub ifindex: u32,
    /// Bytes counted.
    pub length: u32,
    /// The mark after the rules; 0 at XDP, unless rules set one.
    pub mark: u32,
    /// EtherType behind VLAN tags; 0 for runts.
    pub ether_type: u16,
    /// What the IP header says.
    pub ip: Option<EventIp>,
}

/// The part of a report that only IP packets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventIp {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Protocol; for IPv6 the one behind the extension headers.
    pub proto: u8,
    /// What the transport header says.
    pub transport: EventTransport,
}

/// The transport header's part of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventTransport {
    /// Nothing is known: another protocol, or the header is cut short.
    None,
    /// Source and destination port.
    Ports(u16, u16),
    /// ICMP or ICMPv6 type and code.
    Icmp(u8, u8),
    /// The packet is a fragment without the transport header's start.
    LaterFragment,
}

impl Event {
    /// Reads a record; `None` if it has another length.
    pub fn decode(bytes: &[u8]) -> Option<Event> {
        let bytes: &[u8; record::BYTES] = bytes.try_into().ok()?;
        let part = |at: i16| &bytes[at as usize..];
        let u16_at = |at| u16::from_ne_bytes([part(at)[0], part(at)[1]]);
        let u32_at = |at| u32::from_ne_bytes([part(at)[0], part(at)[1], part(at)[2], part(at)[3]]);
        let flags = part(record::FLAGS)[0];
        let address = |at| -> IpAddr {
            let mut octets = [0; 16];
            octets.copy_from_slice(&part(at)[..16]);
            match flags & flag::V6 {
                0 => Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into(),
                _ => Ipv6Addr::from(octets).into(),
            }
        };
        let (first, second) = (u16_at(record::SRC_PORT), u16_at(record::DST_PORT));
        let transport = if flags & flag::LATER_FRAGMENT != 0 {
            EventTransport::LaterFragment
        } else if flags & flag::PORTS != 0 {
            EventTransport::Ports(first, second)
        } else if flags & flag::ICMP != 0 {
            EventTransport::Icmp(first as u8, second as u8)
        } else {
            EventTransport::None
        };
        let ip = EventIp {
            src: address(record::SRC),
            dst: address(record::DST),
            proto: part(record::PROTO)[0],
            transport,
        };
        let mut time = [0; 8];
        time.copy_from_slice(&part(record::TIME)[..8]);
        Some(Event {
            time_ns: u64::from_ne_bytes(time),
            slot: u32_at(record::SLOT),
            ifindex: u32_at(record::IFINDEX),
            length: u32_at(record::LENGTH),
            mark: u32_at(record::MARK),
            ether_type: u16_at(record::ETHER_TYPE),
            ip: (flags & flag::IP != 0).then_some(ip),
        })
    }
}

/// Packets to report: those that fit all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pattern {
    /// Protocol.
    pub proto: Option<u8>,
    /// Source address and the bits of it that count, at most those it has.
    pub src: Option<(IpAddr, u8)>,
    /// Destination, likewise.
    pub dst: Option<(IpAddr, u8)>,
    /// Source ports.
    pub src_port: Option<RangeInclusive<u16>>,
    /// Destination ports.
    pub dst_port: Option<RangeInclusive<u16>>,
    /// Device number.
    pub ifindex: Option<u32>,
}

/// What to report and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Whether packets are reported at all.
    pub on: bool,
    /// A packet is reported if it fits one of these; more than [`PATTERNS_MAX`] are not looked at.
    pub patterns: Vec<Pattern>,
    /// Most reports a second on one CPU; 0 for no limit.
    pub rate: u32,
    /// Reports that may come at once on one CPU after a pause.
    pub burst: u32,
}

impl Config {
    /// Nothing is reported: what a program starts with.
    pub const OFF: Config = Config { on: false, patterns: Vec::new(), rate: 0, burst: 0 };

    /// The bytes of [`CONFIG_MAP`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; config::BYTES];
        let cost = 1_000_000_000u64.checked_div(u64::from(self.rate)).unwrap_or(0);
        let burst = cost * u64::from(self.burst.max(1));
        out[config::SWITCH as usize..][..4].copy_from_slice(&u32::from(self.on).to_ne_bytes());
        out[config::COST as usize..][..8].copy_from_slice(&cost.to_ne_bytes());
        out[config::BURST as usize..][..8].copy_from_slice(&burst.to_ne_bytes());
        let places = out[config::PATTERNS as usize..].chunks_exact_mut(config::PATTERN_BYTES as usize);
        for (pattern, place) in self.patterns.iter().zip(places) {
            pattern.encode(place);
        }
        out
    }
}

impl Pattern {
    fn encode(&self, out: &mut [u8]) {
        let mut put = |at: i16, bytes: &[u8]| out[at as usize..][..bytes.len()].copy_from_slice(bytes);
        let (mut flags, mut flags_mask) = (0, 0);
        put(pattern::USED, &1u32.to_ne_bytes());
        if let Some(proto) = self.proto {
            put(pattern::PROTO, &u32::from(proto).to_ne_bytes());
            put(pattern::PROTO_MASK, &0xffu32.to_ne_bytes());
            flags |= flag::IP;
            flags_mask |= flag::IP;
        }
        for (prefix, at, mask_at) in
            [(self.src, pattern::SRC, pattern::SRC_MASK), (self.dst, pattern::DST, pattern::DST_MASK)]
        {
            let Some((address, bits)) = prefix else { continue };
            flags |= flag::IP;
            flags_mask |= flag::IP | flag::V6;
            let ones = |width: u8| match u32::from(width.saturating_sub(bits)) {
                0 => u128::MAX,
                free => u128::MAX.checked_shl(free).unwrap_or(0),
            };
            match address {
                IpAddr::V4(address) => {
                    put(at, &address.octets());
                    put(mask_at, &(ones(32) as u32).to_be_bytes());
                }
                IpAddr::V6(address) => {
                    flags |= flag::V6;
                    put(at, &address.octets());
                    put(mask_at, &ones(128).to_be_bytes());
                }
            }
        }
        for (ports, at, span_at) in [
            (&self.src_port, pattern::SRC_PORT, pattern::SRC_PORT_SPAN),
            (&self.dst_port, pattern::DST_PORT, pattern::DST_PORT_SPAN),
        ] {
            let (low, span) = match ports {
                None => (0, 0xffff),
                Some(ports) => {
                    flags |= flag::PORTS;
                    flags_mask |= flag::PORTS;
                    (u32::from(*ports.start()), u32::from(ports.end().saturating_sub(*ports.start())))
                }
            };
            put(at, &low.to_ne_bytes());
            put(span_at, &span.to_ne_bytes());
        }
        if let Some(ifindex) = self.ifindex {
            put(pattern::IFINDEX, &ifindex.to_ne_bytes());
            put(pattern::IFINDEX_MASK, &u32::MAX.to_ne_bytes());
        }
        put(pattern::FLAGS, &u32::from(flags).to_ne_bytes());
        put(pattern::FLAGS_MASK, &u32::from(flags_mask).to_ne_bytes());
    }
}

/// What became of the packets that were wanted and fitted a pattern, on one CPU or several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Packets reported.
    pub reported: u64,
    /// Packets not reported because too many came.
    pub limited: u64,
    /// Packets not reported because nobody emptied the ring buffer in time.
    pub full: u64,
}

impl Tally {
    /// Reads a CPU's value of [`STATE_MAP`]; `None` if it has another length.
    pub fn decode(bytes: &[u8]) -> Option<Tally> {
        let bytes: &[u8; state::BYTES] = bytes.try_into().ok()?;
        let word = |at: i16| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at as usize..][..8]);
            u64::from_ne_bytes(word)
        };
        Some(Tally {
            reported: word(state::REPORTED),
            limited: word(state::LIMITED),
            full: word(state::FULL),
        })
    }

    /// Packets that fitted and were not reported.
    pub fn missed(self) -> u64 {
        self.limited + self.full
    }
}

impl std::ops::Add for Tally {
    type Output = Tally;

    fn add(self, other: Tally) -> Tally {
        Tally {
            reported: self.reported + other.reported,
            limited: self.limited + other.limited,
            full: self.full + other.full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_covers_the_record() {
        let mut at = 0;
        for field in TraceManifest::current().record {
            assert_eq!(field.offset, at, "{}", field.name);
            at += field.bytes;
        }
        assert_eq!(usize::from(at), record::BYTES);
    }

    #[test]
    fn the_limits_of_prefixes_and_ports() {
        let encoded = |pattern: Pattern| {
            let mut out = vec![0; config::PATTERN_BYTES as usize];
            pattern.encode(&mut out);
            out
        };
        let mask = |bits| {
            let src = Some((Ipv4Addr::new(10, 0, 0, 1).into(), bits));
            encoded(Pattern { src, ..Pattern::default() })[pattern::SRC_MASK as usize..][..16].to_vec()
        };
        assert_eq!(mask(0), [0; 16]);
        assert_eq!(mask(9)[..5], [0xff, 0x80, 0, 0, 0]);
        assert_eq!(mask(32)[..5], [0xff, 0xff, 0xff, 0xff, 0]);
        let mask = |bits| {
            let dst = Some((Ipv6Addr::LOCALHOST.into(), bits));
            encoded(Pattern { dst, ..Pattern::default() })[pattern::DST_MASK as usize..][..16].to_vec()
        };
        assert_eq!(mask(0), [0; 16]);
        assert_eq!(mask(65), [vec![0xff; 8], vec![0x80], vec![0; 7]].concat());
        assert_eq!(mask(128), [0xff; 16]);
        let any = encoded(Pattern::default());
        assert_eq!(any[pattern::DST_PORT_SPAN as usize..][..4], 0xffffu32.to_ne_bytes());
    }

    #[test]
    fn no_rate_means_no_limit() {
        let config = Config { on: true, rate: 0, burst: 5, patterns: vec![] }.encode();
        assert_eq!(config[config::COST as usize..][..16], [0; 16]);
        assert_eq!(Config::OFF.encode(), vec![0; config::BYTES]);
        assert_eq!(config::BYTES, 480);
    }

    #[test]
    fn records_of_another_length_are_none() {
        assert_eq!(Event::decode(&[0; record::BYTES + 1]), None);
        assert_eq!(Tally::decode(&[0; state::BYTES - 1]), None);
        assert_eq!(Event::decode(&[0; record::BYTES]).unwrap().ip, None);
    }
}
