//! What the address-translating targets share: ranges of addresses and ports.

use std::fmt;
use std::net::IpAddr;

use polc_ir::hook::Family;

use crate::codes;
use crate::ext::{Argument, Fault, GivenOption};
use crate::names;
use crate::value::{Ip, address, number, strtoul};

/// The addresses and ports a translation may choose from (`struct nf_nat_range2`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NatRange {
    /// First and last address; `None` keeps the address.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// First and last port; `None` leaves the choice to the kernel.
    pub ports: Option<(u16, u16)>,
    /// With `ports`, the port to which the first of the range corresponds: the new port is the old one less this, plus
    /// the first.
    pub base: Option<u16>,
}

impl NatRange {
    /// `[address[-address]][:port[-port[/port]]]`; an IPv6 address before a port stands in brackets.
    pub(crate) fn parse(option: &GivenOption<'_>, family: Family) -> Result<NatRange, Fault> {
        let argument = option.argument;
        let text = argument.text;
        let (addresses, ports) = match text.find('[') {
            None => match text.split_once(':') {
                Some((addresses, ports)) if !ports.contains(':') => (addresses, Some(ports)),
                _ => (text, None),
            },
            Some(open) => {
                let inside = &text[open + 1..];
                let close = inside.find(']').filter(|_| family == Family::V6);
                let close =
                    close.ok_or_else(|| argument.bad(format!("`{text}` is no range of addresses")))?;
                (&inside[..close], inside[close + 1..].split_once(':').map(|(_, ports)| ports))
            }
        };
        let mut range = match ports {
            Some(ports) => NatRange::parse_ports(option, ports)?,
            None => NatRange::default(),
        };
        if ports.is_some() && (addresses.is_empty()) {
            return Ok(range);
        }
        let read = |text: &str| {
            address(text, family)
                .ok_or_else(|| argument.bad_part(text, format!("`{text}` is not an {family} address")))
        };
        range.addresses = Some(match addresses.split_once('-') {
            Some((first, last)) => (read(first)?, read(last)?),
            None => {
                let only = read(addresses)?;
                (only, only)
            }
        });
        Ok(range)
    }

    /// `port[-port[/port]]`; a lone port may be a service name.
    pub(crate) fn parse_ports(option: &GivenOption<'_>, text: &str) -> Result<NatRange, Fault> {
        let argument = &option.argument;
        // TCP, UDP, SCTP, DCCP; ICMP too, whose id counts as a port.
        if !matches!(option.protocol.0, 6 | 17 | 132 | 33 | 1) {
            let fault = Fault::new(codes::WRONG_PROTOCOL, "ports need a protocol that has them");
            return Err(fault
                .at(argument.span_of(text))
                .hint("put `-p tcp` (or udp, sctp, dccp) before the target"));
        }
        let (first, rest) = match number_prefix(text) {
            Some(split) => split,
            None => (service(argument, text)?, ""),
        };
        let Some(range) = rest.strip_prefix('-') else {
            if rest.is_empty() {
                return Ok(NatRange { ports: Some((first, first)), ..NatRange::default() });
            }
            let fault = argument.bad_part(rest, format!("`{rest}` after the port"));
            return Err(if rest.starts_with(':') {
                fault.hint("a port range is written with a dash")
            } else {
                fault
            });
        };
        let (last, rest) = number_prefix(range)
            .ok_or_else(|| argument.bad_part(range, format!("`{range}` is no port number")))?;
        if last < first {
            return Err(argument.bad_part(text, format!("port range `{text}` runs backwards")));
        }
        let base = match rest.strip_prefix('/') {
            None if rest.is_empty() => None,
            None => return Err(argument.bad_part(rest, format!("`{rest}` after the port range"))),
            Some(base) => Some(match number(base, 1, u16::MAX.into()) {
                Some(port) => port as u16,
                None => service(argument, base)?,
            }),
        };
        Ok(NatRange { ports: Some((first, last)), base, addresses: None })
    }

    /// The ports alone, as `--to-ports` prints them.
    pub(crate) fn ports_text(&self) -> impl fmt::Display {
        PortsText(*self)
    }
}

fn number_prefix(text: &str) -> Option<(u16, &str)> {
    let (value, rest) = strtoul(text, 0)?;
    Some((u16::try_from(value).ok()?, rest))
}

fn service(argument: &Argument<'_>, text: &str) -> Result<u16, Fault> {
    names::service(text, None).ok_or_else(|| argument.unknown_port(text, None))
}

struct PortsText(NatRange);

impl fmt::Display for PortsText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, last)) = self.0.ports else { return Ok(()) };
        write!(f, "{first}")?;
        if first != last {
            write!(f, "-{last}")?;
        }
        match self.0.base {
            Some(base) => write!(f, "/{base}"),
            None => Ok(()),
        }
    }
}

/// Prints `10.0.0.1-10.0.0.9:80-90/8080`.
impl fmt::Display for NatRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((first, last)) = self.addresses {
            let brackets = first.is_ipv6() && self.ports.is_some();
            f.write_str(if brackets { "[" } else { "" })?;
            write!(f, "{}", Ip(first))?;
            if first != last {
                write!(f, "-{}", Ip(last))?;
            }
            f.write_str(if brackets { "]" } else { "" })?;
        }
        if self.ports.is_some() {
            write!(f, ":{}", self.ports_text())?;
        }
        Ok(())
    }
}
