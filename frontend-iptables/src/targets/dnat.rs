//! `-j DNAT`: translates the destination.

use polc_ir::hook::{Hook, TableKind};

use super::nat::NatRange;
use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};

/// The options of `-j DNAT`.
#[derive(Clone, Debug, PartialEq)]
pub struct Dnat {
    /// `--to-destination`.
    pub to: Given<NatRange>,
    /// `--random`: choose ports at random.
    pub random: bool,
    /// `--persistent`: give a client the same address each time.
    pub persistent: bool,
}

const TO: u8 = 0;
const RANDOM: u8 = 1;
const PERSISTENT: u8 = 2;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(TO, "to-destination", "[address[-address]][:port[-port[/port]]]").mandatory(),
    OptionSpec::switch(RANDOM, "random"),
    OptionSpec::switch(PERSISTENT, "persistent"),
];

impl Extension for Dnat {
    const SPEC: Spec = Spec::new(
        "DNAT",
        Families::Both,
        OPTIONS,
        "Translates the destination of a connection's first packet, and with it of the whole connection, to an address \
         and port of the range. `/port` after a port range shifts the range: the port that it names becomes the \
         first.",
    )
    .tables(&[TableKind::Nat])
    .hooks(&[Hook::Prerouting, Hook::Output]);

    fn parse(options: &Options<'_>) -> Result<Dnat, Fault> {
        Ok(Dnat {
            to: options.required(TO, |option| NatRange::parse(option, options.family))?,
            random: options.has(RANDOM),
            persistent: options.has(PERSISTENT),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given("to-destination", &self.to);
        out.switch_if("random", self.random);
        out.switch_if("persistent", self.persistent);
    }
}
