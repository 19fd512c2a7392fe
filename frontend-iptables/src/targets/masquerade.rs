//! `-j MASQUERADE`: translates the source to the output device's address.

use polc_ir::hook::{Hook, TableKind};

use super::nat::NatRange;
use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};

/// The options of `-j MASQUERADE`.
#[derive(Clone, Debug, PartialEq)]
pub struct Masquerade {
    /// `--to-ports`: ports only.
    pub to_ports: Option<Given<NatRange>>,
    /// `--random`: choose ports at random.
    pub random: bool,
    /// `--random-fully`: choose ports by a random generator, not by a hash.
    pub random_fully: bool,
}

const TO_PORTS: u8 = 0;
const RANDOM: u8 = 1;
const RANDOM_FULLY: u8 = 2;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(TO_PORTS, "to-ports", "port[-port]"),
    OptionSpec::switch(RANDOM, "random"),
    OptionSpec::switch(RANDOM_FULLY, "random-fully"),
];

impl Extension for Masquerade {
    const SPEC: Spec = Spec::new(
        "MASQUERADE",
        Families::Both,
        OPTIONS,
        "Translates the source to the address of the device the packet leaves by; connections are forgotten when the \
         device goes down.",
    )
    .tables(&[TableKind::Nat])
    .hooks(&[Hook::Postrouting]);

    fn parse(options: &Options<'_>) -> Result<Masquerade, Fault> {
        Ok(Masquerade {
            to_ports: options.optional(TO_PORTS, |option| {
                let range = NatRange::parse_ports(option, option.argument.text)?;
                Ok(NatRange { base: range.base.map(|_| 0), ..range })
            })?,
            random: options.has(RANDOM),
            random_fully: options.has(RANDOM_FULLY),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        if let Some(ports) = &self.to_ports {
            out.option("to-ports", ports.value.ports_text());
        }
        out.switch_if("random", self.random);
        out.switch_if("random-fully", self.random_fully);
    }
}
