//! `-m tcp`: ports, flags and options of TCP headers.

use std::fmt;

use crate::ast::Given;
use crate::codes;
use crate::ext::{
    Argument, Extension, Families, Fault, GivenOption, OptionSpec, Options, Printer, Spec, set_of,
};
use crate::value::PortRange;

/// The options of `-m tcp`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tcp {
    /// `--sport`.
    pub source_ports: Option<Given<PortRange>>,
    /// `--dport`.
    pub destination_ports: Option<Given<PortRange>>,
    /// `--tcp-flags` or `--syn`.
    pub flags: Option<Given<TcpFlags>>,
    /// `--tcp-option`: the kind of an option that must be present, 1-255.
    pub option: Option<Given<u8>>,
}

/// Flags that are looked at, and those among them that must be set. Bits as in byte 13 of the header: FIN is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TcpFlags {
    /// The flags that are looked at.
    pub mask: u8,
    /// The flags that must be set; all others in the mask must be clear.
    pub set: u8,
}

/// Names of the flags; `ALL` and `NONE` are read but `ALL` is never printed.
const FLAGS: &[(&str, u8)] = &[
    ("FIN", 0x01),
    ("SYN", 0x02),
    ("RST", 0x04),
    ("PSH", 0x08),
    ("ACK", 0x10),
    ("URG", 0x20),
    ("ALL", 0x3f),
    ("NONE", 0x00),
];

const SOURCE: u8 = 0;
const DESTINATION: u8 = 1;
const SYN: u8 = 2;
const TCP_FLAGS: u8 = 3;
const OPTION: u8 = 4;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(SOURCE, "source-port", "port[:port]").invertible(),
    OptionSpec::value(SOURCE, "sport", "port[:port]").invertible(),
    OptionSpec::value(DESTINATION, "destination-port", "port[:port]").invertible(),
    OptionSpec::value(DESTINATION, "dport", "port[:port]").invertible(),
    OptionSpec::switch(SYN, "syn").invertible().excludes(set_of(TCP_FLAGS)),
    OptionSpec::pair(TCP_FLAGS, "tcp-flags", "mask set").invertible().excludes(set_of(SYN)),
    OptionSpec::value(OPTION, "tcp-option", "number").invertible(),
];

impl Extension for Tcp {
    const SPEC: Spec = Spec::new(
        "tcp",
        Families::Both,
        OPTIONS,
        "Matches TCP segments by source and destination port, by flags (`--tcp-flags` names the flags to look at and \
         those that must be set; `--syn` stands for `FIN,SYN,RST,ACK SYN`), and by the presence of an option. \
         A segment too short for its header is dropped, whatever the rule says; fragments other than the first never \
         match.",
    )
    .protocols(&[6]);

    fn parse(options: &Options<'_>) -> Result<Tcp, Fault> {
        let syn = TcpFlags { mask: 0x17, set: 0x02 };
        let flags = match options.get(SYN) {
            Some(option) => Some(option.given(syn)),
            None => options.optional(TCP_FLAGS, |option| {
                Ok(TcpFlags { mask: parse_flags(option.argument)?, set: parse_flags(option.second)? })
            })?,
        };
        Ok(Tcp {
            source_ports: options.optional(SOURCE, |option| port_range(option, "tcp"))?,
            destination_ports: options.optional(DESTINATION, |option| port_range(option, "tcp"))?,
            flags,
            option: options.number(OPTION, 1, 255)?.map(|given| given.map(|number| number as u8)),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        print_ports(out, "sport", &self.source_ports);
        print_ports(out, "dport", &self.destination_ports);
        out.given_if("tcp-option", &self.option);
        if let Some(flags) = self.flags.filter(|flags| flags.value.mask != 0 || flags.negated) {
            out.given("tcp-flags", &flags);
        }
    }
}

/// Reads `port[:port]`, in order, each port looked up for `protocol`.
pub(super) fn port_range(option: &GivenOption<'_>, protocol: &str) -> Result<PortRange, Fault> {
    let argument = &option.argument;
    let read = |text: &str, default| {
        if text.is_empty() { Ok(default) } else { argument.port(text, Some(protocol)) }
    };
    let Some((first, last)) = argument.text.split_once(':') else {
        let port = argument.port(argument.text, Some(protocol))?;
        return Ok(PortRange { first: port, last: port });
    };
    let range = PortRange { first: read(first, 0)?, last: read(last, u16::MAX)? };
    if range.first > range.last {
        return Err(Fault::new(codes::BAD_VALUE, format!("port range `{}` runs backwards", argument.text))
            .at(argument.span)
            .hint("put the smaller port first"));
    }
    Ok(range)
}

/// Prints a port option; every port is the same as none, even negated, as saving has it.
pub(super) fn print_ports(out: &mut Printer<'_>, name: &str, ports: &Option<Given<PortRange>>) {
    if let Some(given) = ports.filter(|given| given.value != PortRange::ALL) {
        out.given(name, &given);
    }
}

fn parse_flags(argument: Argument<'_>) -> Result<u8, Fault> {
    let mut flags = 0;
    for item in argument.text.split(',').filter(|item| !item.is_empty()) {
        match FLAGS.iter().find(|(name, _)| name.eq_ignore_ascii_case(item)) {
            Some((_, bits)) => flags |= bits,
            None => {
                return Err(argument
                    .bad_part(item, format!("`{item}` is no TCP flag"))
                    .hint("the flags are FIN, SYN, RST, PSH, ACK, URG, ALL and NONE"));
            }
        }
    }
    Ok(flags)
}

/// Prints `FIN,SYN,RST,ACK SYN`.
impl fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bits, end) in [(self.mask, " "), (self.set, "")] {
            let names: Vec<&str> =
                FLAGS[..6].iter().filter(|(_, flag)| bits & flag != 0).map(|(name, _)| *name).collect();
            write!(f, "{}{end}", if names.is_empty() { "NONE".into() } else { names.join(",") })?;
        }
        Ok(())
    }
}
