//! `-j SNAT`: translates the source.

use polc_ir::hook::{Hook, TableKind};

use super::nat::NatRange;
use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};

/// The options of `-j SNAT`.
#[derive(Clone, Debug, PartialEq)]
pub struct Snat {
    /// `--to-source`.
    pub to: Given<NatRange>,
    /// `--random`: choose ports at random.
    pub random: bool,
    /// `--random-fully`: choose ports by a random generator, not by a hash.
    pub random_fully: bool,
    /// `--persistent`: give a client the same address each time.
    pub persistent: bool,
}

const TO: u8 = 0;
const RANDOM: u8 = 1;
const RANDOM_FULLY: u8 = 2;
const PERSISTENT: u8 = 3;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(TO, "to-source", "[address[-address]][:port[-port]]").mandatory(),
    OptionSpec::switch(RANDOM, "random"),
    OptionSpec::switch(RANDOM_FULLY, "random-fully"),
    OptionSpec::switch(PERSISTENT, "persistent"),
];

impl Extension for Snat {
    const SPEC: Spec = Spec::new(
        "SNAT",
        Families::Both,
        OPTIONS,
        "Translates the source of a connection's first packet, and with it of the whole connection, to an address and \
         port of the range.",
    )
    .tables(&[TableKind::Nat])
    .hooks(&[Hook::Input, Hook::Postrouting]);

    fn parse(options: &Options<'_>) -> Result<Snat, Fault> {
        Ok(Snat {
            to: options.required(TO, |option| {
                let range = NatRange::parse(option, options.family)?;
                // The shift is read but can't be stored: it is saved as 0.
                Ok(NatRange { base: range.base.map(|_| 0), ..range })
            })?,
            random: options.has(RANDOM),
            random_fully: options.has(RANDOM_FULLY),
            persistent: options.has(PERSISTENT),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given("to-source", &self.to);
        out.switch_if("random", self.random);
        out.switch_if("random-fully", self.random_fully);
        out.switch_if("persistent", self.persistent);
    }
}
