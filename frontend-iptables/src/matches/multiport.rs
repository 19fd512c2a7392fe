//! `-m multiport`: up to 15 ports or port ranges.

use std::fmt;

use crate::ast::Given;
use crate::codes;
use crate::ext::{Extension, Families, Fault, GivenOption, OptionSpec, Options, Printer, Spec, set_of};
use crate::value::PortRange;

/// The options of `-m multiport`.
#[derive(Clone, Debug, PartialEq)]
pub struct Multiport {
    /// Which of the packet's ports is compared.
    pub side: PortSide,
    /// The ports; a packet matches if one range holds its port.
    pub ports: Given<PortList>,
}

/// Which of a packet's ports is compared with a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortSide {
    /// `--sports`.
    Source,
    /// `--dports`.
    Destination,
    /// `--ports`: either one.
    Either,
}

/// A list of port ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortList(pub Box<[PortRange]>);

/// Most ports in one list, where a range counts twice (include/uapi/linux/netfilter/xt_multiport.h).
const PORTS_MAX: usize = 15;

const SOURCE: u8 = 0;
const DESTINATION: u8 = 1;
const EITHER: u8 = 2;
const ANY: u32 = set_of(SOURCE) | set_of(DESTINATION) | set_of(EITHER);

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(SOURCE, "source-ports", "port[:port][,...]").invertible().excludes(ANY),
    OptionSpec::value(SOURCE, "sports", "port[:port][,...]").invertible().excludes(ANY),
    OptionSpec::value(DESTINATION, "destination-ports", "port[:port][,...]").invertible().excludes(ANY),
    OptionSpec::value(DESTINATION, "dports", "port[:port][,...]").invertible().excludes(ANY),
    OptionSpec::value(EITHER, "ports", "port[:port][,...]").invertible().excludes(ANY),
];

impl Extension for Multiport {
    const SPEC: Spec = Spec::new(
        "multiport",
        Families::Both,
        OPTIONS,
        "Matches a list of up to 15 source ports, destination ports, or ports on either side; a range counts as two. \
         Needs `-p` tcp, udp, udplite, sctp or dccp before it. A packet too short to have ports is dropped, whatever \
         the rule says.",
    )
    .protocols(&[6, 17, 136, 132, 33]);

    fn parse(options: &Options<'_>) -> Result<Multiport, Fault> {
        let sides =
            [(SOURCE, PortSide::Source), (DESTINATION, PortSide::Destination), (EITHER, PortSide::Either)];
        for (id, side) in sides {
            if let Some(ports) = options.optional(id, parse_ports)? {
                return Ok(Multiport { side, ports });
            }
        }
        Err(Fault::new(codes::MISSING_OPTION, "`multiport` needs `--sports`, `--dports` or `--ports`"))
    }

    fn print(&self, out: &mut Printer<'_>) {
        let name = match self.side {
            PortSide::Source => "sports",
            PortSide::Destination => "dports",
            PortSide::Either => "ports",
        };
        out.given(name, &self.ports);
    }
}

/// The name under which service names are looked up, for the protocols that have ports.
pub(crate) fn port_protocol(number: u16) -> Option<&'static str> {
    match number {
        6 => Some("tcp"),
        17 => Some("udp"),
        136 => Some("udplite"),
        132 => Some("sctp"),
        33 => Some("dccp"),
        _ => None,
    }
}

fn parse_ports(option: &GivenOption<'_>) -> Result<PortList, Fault> {
    let Some(protocol) = option.plain_protocol().and_then(port_protocol) else {
        let message = "`multiport` needs a protocol with ports before it";
        return Err(Fault::new(codes::WRONG_PROTOCOL, message)
            .at(option.span)
            .hint("put `-p tcp` (or udp, udplite, sctp, dccp) before `-m multiport`"));
    };
    let argument = &option.argument;
    let mut ranges = Vec::new();
    let mut count = 0;
    for item in argument.text.split(',') {
        let (first, last) = match item.split_once(':') {
            Some((first, last)) => (first, Some(last)),
            None => (item, None),
        };
        count += 1 + usize::from(last.is_some());
        if count > PORTS_MAX {
            return Err(argument
                .bad_part(item, format!("more than {PORTS_MAX} ports; a range counts as two"))
                .hint("split the rule"));
        }
        let first = argument.port(first, Some(protocol))?;
        let last = last.map(|last| argument.port(last, Some(protocol))).transpose()?;
        if last.is_some_and(|last| first >= last) {
            return Err(argument.bad_part(item, format!("port range `{item}` does not run upwards")));
        }
        ranges.push(PortRange { first, last: last.unwrap_or(first) });
    }
    Ok(PortList(ranges.into()))
}

/// Prints `22,80:90`.
impl fmt::Display for PortList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, range) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(",")?;
            }
            write!(f, "{range}")?;
        }
        Ok(())
    }
}
