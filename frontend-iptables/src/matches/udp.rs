//! `-m udp`: ports of UDP headers.

use super::tcp::{port_range, print_ports};
use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};
use crate::value::PortRange;

/// The options of `-m udp`.
#[derive(Clone, Debug, PartialEq)]
pub struct Udp {
    /// `--sport`.
    pub source_ports: Option<Given<PortRange>>,
    /// `--dport`.
    pub destination_ports: Option<Given<PortRange>>,
}

const SOURCE: u8 = 0;
const DESTINATION: u8 = 1;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(SOURCE, "source-port", "port[:port]").invertible(),
    OptionSpec::value(SOURCE, "sport", "port[:port]").invertible(),
    OptionSpec::value(DESTINATION, "destination-port", "port[:port]").invertible(),
    OptionSpec::value(DESTINATION, "dport", "port[:port]").invertible(),
];

impl Extension for Udp {
    const SPEC: Spec = Spec::new(
        "udp",
        Families::Both,
        OPTIONS,
        "Matches UDP datagrams by source and destination port. A datagram too short for its header is dropped, \
         whatever the rule says; fragments other than the first never match.",
    )
    .protocols(&[17]);

    fn parse(options: &Options<'_>) -> Result<Udp, Fault> {
        Ok(Udp {
            source_ports: options.optional(SOURCE, |option| port_range(option, "udp"))?,
            destination_ports: options.optional(DESTINATION, |option| port_range(option, "udp"))?,
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        print_ports(out, "sport", &self.source_ports);
        print_ports(out, "dport", &self.destination_ports);
    }
}
