//! Names that stand for numbers: services, protocols, and the few host and network names of a bare system.
//!
//! They are built in so that a dump means the same everywhere; names that only a resolver could know are refused with
//! a diagnostic. ICMP types, DSCP classes and the like belong to one extension each and are found there, or in
//! [`icmp`] and [`dscp`] where two share them.

pub mod dscp;
pub mod icmp;
mod tables;

use std::net::Ipv4Addr;

/// The port of a service, for `protocol` or, if that is `None`, for whichever protocol the table names first
/// (`getservbyname`).
pub fn service(name: &str, protocol: Option<&str>) -> Option<u16> {
    tables::SERVICES
        .iter()
        .find(|service| {
            service.names.contains(&name) && protocol.is_none_or(|wanted| wanted == service.protocol)
        })
        .map(|service| service.port)
}

/// The protocol names that libxtables knows without the system's table (libxtables/xtables.c,
/// `xtables_chain_protos`); the first name of a number is the one it prints.
const CHAIN_PROTOCOLS: &[(&str, u16)] = &[
    ("tcp", 6),
    ("sctp", 132),
    ("udp", 17),
    ("udplite", 136),
    ("icmp", 1),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("esp", 50),
    ("ah", 51),
    ("mobility-header", 135),
    ("ipv6-mh", 135),
    ("mh", 135),
    ("all", 0),
];

/// A protocol by number (base 0) or name, as `xtables_parse_protocol` reads it.
pub fn protocol(text: &str) -> Option<u16> {
    if let Some(number) = crate::value::number(text, 0, 255) {
        return Some(number as u16);
    }
    CHAIN_PROTOCOLS.iter().find(|(name, _)| *name == text).map(|&(_, number)| number).or_else(|| {
        tables::PROTOCOLS
            .iter()
            .find(|protocol| protocol.names.contains(&text))
            .map(|protocol| protocol.number)
    })
}

/// A protocol by a name of the system's table alone (`getprotobyname`).
pub fn system_protocol(name: &str) -> Option<u16> {
    tables::PROTOCOLS.iter().find(|protocol| protocol.names.contains(&name)).map(|protocol| protocol.number)
}

/// The system's own name for a protocol (`getprotobynumber`).
pub fn system_protocol_name(number: u16) -> Option<&'static str> {
    tables::PROTOCOLS.iter().find(|protocol| protocol.number == number).map(|protocol| protocol.names[0])
}

/// The name iptables-save prints for a protocol, if there is one.
pub fn protocol_name(number: u16) -> Option<&'static str> {
    if let Some((name, _)) = CHAIN_PROTOCOLS.iter().find(|(_, known)| *known == number) {
        return Some(name);
    }
    tables::PROTOCOLS.iter().find(|protocol| protocol.number == number).map(|protocol| protocol.names[0])
}

/// The IPv4 names of a bare Debian system: `/etc/networks` of netbase, and `localhost`.
pub(crate) fn ipv4_host(name: &str) -> Option<Ipv4Addr> {
    match name {
        "default" => Some(Ipv4Addr::UNSPECIFIED),
        "loopback" => Some(Ipv4Addr::new(127, 0, 0, 0)),
        "link-local" => Some(Ipv4Addr::new(169, 254, 0, 0)),
        "localhost" => Some(Ipv4Addr::LOCALHOST),
        _ => None,
    }
}

/// The number of a user that every Debian system has (base-passwd).
pub(crate) fn user(name: &str) -> Option<u32> {
    tables::USERS.iter().find(|(known, _)| *known == name).map(|&(_, number)| number)
}

/// The number of a group that every Debian system has (base-passwd).
pub(crate) fn group(name: &str) -> Option<u32> {
    tables::GROUPS.iter().find(|(known, _)| *known == name).map(|&(_, number)| number)
}

/// The syslog levels iptables knows, and their numbers (libxtables/xtoptions.c, `xtopt_parse_sysloglevel`).
pub const LOG_LEVELS: &[(&str, u8)] = &[
    ("alert", 1),
    ("crit", 2),
    ("debug", 7),
    ("emerg", 0),
    ("error", 3),
    ("info", 6),
    ("notice", 5),
    ("panic", 0),
    ("warning", 4),
];

/// The type-of-service names of `-m tos` and `-j TOS` (RFC 1349).
pub const TOS_NAMES: &[(&str, u8)] = &[
    ("Minimize-Delay", 0x10),
    ("Maximize-Throughput", 0x08),
    ("Maximize-Reliability", 0x04),
    ("Minimize-Cost", 0x02),
    ("Normal-Service", 0x00),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_as_on_debian() {
        assert_eq!(service("domain", Some("udp")), Some(53));
        assert_eq!(service("www", Some("tcp")), Some(80));
        assert_eq!(service("http", Some("sctp")), None);
        assert_eq!(service("ftp-data", None), Some(20));
        assert_eq!(protocol("gre"), Some(47));
        assert_eq!(protocol("0x11"), Some(17));
        assert_eq!(protocol("icmp6"), None);
        assert_eq!(protocol_name(58), Some("ipv6-icmp"));
        assert_eq!(protocol_name(0), Some("all"));
        assert_eq!(protocol_name(144), None);
    }

    /// The tables equal the files they were made from, where those files are Debian's.
    #[test]
    fn tables_equal_the_systems_files() {
        let Ok(services) = std::fs::read_to_string("/etc/services") else { return };
        if !services.contains("# Network services, Internet style") {
            return;
        }
        let mut count = 0;
        for line in services.lines() {
            let mut words = line.split('#').next().unwrap_or("").split_whitespace();
            let (Some(name), Some((port, protocol))) =
                (words.next(), words.next().and_then(|it| it.split_once('/')))
            else {
                continue;
            };
            let row = &tables::SERVICES[count];
            assert_eq!((row.names[0], row.port.to_string().as_str(), row.protocol), (name, port, protocol));
            assert!(words.eq(row.names[1..].iter().copied()));
            count += 1;
        }
        assert_eq!(count, tables::SERVICES.len());
    }
}
