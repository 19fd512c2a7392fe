//! `-j REDIRECT`: translates the destination to this host.

use polc_ir::hook::{Hook, TableKind};

use super::nat::NatRange;
use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};

/// The options of `-j REDIRECT`.
#[derive(Clone, Debug, PartialEq)]
pub struct Redirect {
    /// `--to-ports`: ports only.
    pub to_ports: Option<Given<NatRange>>,
    /// `--random`: choose ports at random.
    pub random: bool,
}

const TO_PORTS: u8 = 0;
const RANDOM: u8 = 1;

const OPTIONS: &[OptionSpec] =
    &[OptionSpec::value(TO_PORTS, "to-ports", "port[-port]"), OptionSpec::switch(RANDOM, "random")];

impl Extension for Redirect {
    const SPEC: Spec = Spec::new(
        "REDIRECT",
        Families::Both,
        OPTIONS,
        "Translates the destination to the first address of the device the packet came in by, or to localhost for \
         packets made here.",
    )
    .tables(&[TableKind::Nat])
    .hooks(&[Hook::Prerouting, Hook::Output]);

    fn parse(options: &Options<'_>) -> Result<Redirect, Fault> {
        Ok(Redirect {
            to_ports: options.optional(TO_PORTS, |option| {
                let range = NatRange::parse_ports(option, option.argument.text)?;
                Ok(NatRange { base: range.base.map(|_| 0), ..range })
            })?,
            random: options.has(RANDOM),
        })
    }

    fn print(&self, out: &mut Printer<'_>) {
        if let Some(ports) = &self.to_ports {
            out.option("to-ports", ports.value.ports_text());
        }
        out.switch_if("random", self.random);
    }
}
