//! What to watch, in words: `tcp src 192.0.2.0/24 dport 22 or icmp`.
//!
//! The words are those of tcpdump where it has them, and mean what fits into a report's pattern
//! ([`polc_backend_ebpf::trace::Pattern`]), so that the kernel evaluates the whole of a filter and what is not reported
//! can be counted exactly.
//!
//! ```text
//! filter  := packet { "or" packet }
//! packet  := word { [ "and" ] word }
//! word    := PROTOCOL | "proto" ( NAME | NUMBER )
//!          | ( "src" | "dst" ) ADDRESS [ "/" LENGTH ]
//!          | ( "sport" | "dport" ) PORT [ "-" PORT ]
//!          | "dev" DEVICE
//! ```

use std::net::IpAddr;
use std::ops::RangeInclusive;

use polc_backend_ebpf::trace::{PATTERNS_MAX, Pattern, WITH_PORTS};
use polc_frontend_iptables::names;

/// The words of a filter, as its help shows them.
pub const FILTER_HELP: &str = "PROTOCOL, proto NAME|NUMBER, src|dst ADDRESS[/LENGTH], sport|dport PORT[-PORT], dev DEVICE; \
                               `or` between alternatives, 4 at most";

/// The same, with an example each.
pub const FILTER_LONG_HELP: &str = "\
Packets to show; all of them if no filter is given. Words stand for what a packet has to have; `or` stands between
alternatives, of which there are at most 4; `and` may stand between words and changes nothing.

  tcp, udp, icmp, icmpv6, sctp, dccp, udplite, gre    the protocol
  proto NAME|NUMBER                                   the same for any other: proto esp, proto 50
  src ADDRESS[/LENGTH], dst ADDRESS[/LENGTH]          an address or prefix: src 192.0.2.0/24, dst 2001:db8::1
  sport PORT[-PORT], dport PORT[-PORT]                a port or range: dport 22, sport 1024-65535
  dev DEVICE                                          the device that the program runs on

The kernel evaluates all of it, so packets that do not fit cost no report: polc trace tcp dport 22 or icmp";

/// Protocols that are words by themselves.
const PROTOCOLS: [&str; 8] = ["tcp", "udp", "icmp", "icmpv6", "sctp", "dccp", "udplite", "gre"];

/// Reads a filter; no words let every packet through. `device` gives the number of a device.
///
/// # Errors
/// What is wrong with which word.
pub fn filter(words: &[String], device: &dyn Fn(&str) -> Option<u32>) -> Result<Vec<Pattern>, String> {
    let words: Vec<&str> = words.iter().flat_map(|word| word.split_ascii_whitespace()).collect();
    if words.is_empty() {
        return Ok(vec![Pattern::default()]);
    }
    let alternatives: Vec<&[&str]> = words.split(|word| *word == "or").collect();
    if alternatives.len() > PATTERNS_MAX {
        return Err(format!("{} alternatives; a filter has {PATTERNS_MAX} at most", alternatives.len()));
    }
    alternatives.into_iter().map(|words| packet(words, device)).collect()
}

fn packet(words: &[&str], device: &dyn Fn(&str) -> Option<u32>) -> Result<Pattern, String> {
    let mut pattern = Pattern::default();
    let mut words = words.iter().copied().filter(|word| *word != "and").peekable();
    if words.peek().is_none() {
        return Err("`or` needs a packet on either side".to_string());
    }
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("`{word}` needs a value"));
        match word {
            "proto" => once(word, &mut pattern.proto, protocol(value()?)?)?,
            "src" => once(word, &mut pattern.src, prefix(value()?)?)?,
            "dst" => once(word, &mut pattern.dst, prefix(value()?)?)?,
            "sport" => once(word, &mut pattern.src_port, ports(value()?)?)?,
            "dport" => once(word, &mut pattern.dst_port, ports(value()?)?)?,
            "dev" => {
                let name = value()?;
                let number = device(name).ok_or_else(|| format!("there is no device `{name}`"))?;
                once(word, &mut pattern.ifindex, number)?;
            }
            name if PROTOCOLS.contains(&name) => once(name, &mut pattern.proto, protocol(name)?)?,
            other => return Err(format!("`{other}` is no word of a filter: {FILTER_HELP}")),
        }
    }
    let families = [pattern.src, pattern.dst].map(|prefix| prefix.map(|(address, _)| address.is_ipv4()));
    if let Some(proto) = pattern.proto.filter(|proto| !WITH_PORTS.contains(proto))
        && (pattern.src_port.is_some() || pattern.dst_port.is_some())
    {
        let name = names::protocol_name(proto.into()).map_or_else(|| proto.to_string(), str::to_string);
        return Err(format!("packets of protocol `{name}` have no ports"));
    }
    if let [Some(src), Some(dst)] = families
        && src != dst
    {
        return Err("a packet's addresses are both IPv4's or both IPv6's".to_string());
    }
    Ok(pattern)
}

/// Sets what is not set yet.
fn once<T>(word: &str, place: &mut Option<T>, value: T) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("`{word}`: this is set twice; `or` stands between alternatives")),
    }
}

fn protocol(text: &str) -> Result<u8, String> {
    names::protocol(text)
        .and_then(|number| u8::try_from(number).ok())
        .ok_or_else(|| format!("`{text}` is no protocol"))
}

fn prefix(text: &str) -> Result<(IpAddr, u8), String> {
    let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
    let wrong = || format!("`{text}` is no address or prefix");
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let width = if address.is_ipv4() { 32 } else { 128 };
    let bits = bits.map_or(Ok(width), |bits| bits.parse::<u8>().map_err(|_| wrong()))?;
    if bits <= width { Ok((address, bits)) } else { Err(wrong()) }
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (low, high) = text.split_once(['-', ':']).unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok();
    match (port(low), port(high)) {
        (Some(low), Some(high)) if low <= high => Ok(low..=high),
        _ => Err(format!("`{text}` is no port or range of ports")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Pattern>, String> {
        filter(&[text.to_string()], &|name| (name == "eth0").then_some(2))
    }

    #[test]
    fn words_become_patterns() {
        assert_eq!(read("").unwrap(), [Pattern::default()]);
        assert_eq!(
            read("tcp and src 192.0.2.0/24 dport 22 or proto 132 dev eth0 sport 1-1024").unwrap(),
            [
                Pattern {
                    proto: Some(6),
                    src: Some(([192, 0, 2, 0].into(), 24)),
                    dst_port: Some(22..=22),
                    ..Pattern::default()
                },
                Pattern {
                    proto: Some(132),
                    ifindex: Some(2),
                    src_port: Some(1..=1024),
                    ..Pattern::default()
                },
            ]
        );
        assert_eq!(read("dst 2001:db8::1").unwrap()[0].dst, Some(("2001:db8::1".parse().unwrap(), 128)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("or", "either side"),
            ("tcp or", "either side"),
            ("tcp udp", "`udp`: this is set twice"),
            ("dport", "`dport` needs a value"),
            ("dport 9-1", "`9-1` is no port"),
            ("dport 65536", "`65536` is no port"),
            ("src 192.0.2.0/33", "no address or prefix"),
            ("src host.example", "no address or prefix"),
            ("src 192.0.2.1 dst ::1", "both"),
            ("dev eth1", "no device `eth1`"),
            ("proto 256", "no protocol"),
            ("host 1.2.3.4", "no word of a filter"),
            ("icmp dport 3", "`icmp` have no ports"),
            ("sport 1 proto esp", "`esp` have no ports"),
            ("tcp or tcp or tcp or tcp or tcp", "5 alternatives"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
