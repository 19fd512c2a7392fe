//! `-m icmp`: type and code of ICMP messages.

use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};
use crate::names::icmp::{ICMP, IcmpType, parse};

/// The options of `-m icmp`.
#[derive(Clone, Debug, PartialEq)]
pub struct Icmp {
    /// `--icmp-type`. Type 255 matches every type, and then the code is not looked at
    /// (net/netfilter/xt_tcpudp.c, `icmp_type_code_match`).
    pub kind: Given<IcmpType>,
}

const TYPE: u8 = 0;

const OPTIONS: &[OptionSpec] =
    &[OptionSpec::value(TYPE, "icmp-type", "type[/code]").invertible().mandatory()];

impl Extension for Icmp {
    const SPEC: Spec = Spec::new(
        "icmp",
        Families::V4,
        OPTIONS,
        "Matches ICMP messages by type and code, by number or name (`echo-request`, `host-unreachable`); `any` and \
         type 255 match every message. A message too short for its header is dropped, whatever the rule says.",
    )
    .protocols(&[1]);

    fn parse(options: &Options<'_>) -> Result<Icmp, Fault> {
        let kind = options.required(TYPE, |option| {
            parse(option.argument.text, ICMP).map_err(|why| option.argument.bad(why))
        })?;
        Ok(Icmp { kind })
    }

    fn print(&self, out: &mut Printer<'_>) {
        let Given { value, negated, .. } = self.kind;
        out.negation(negated);
        if value.kind == 255 {
            out.option("icmp-type", "any");
        } else if (value.code_first, value.code_last) == (0, 255) {
            out.option("icmp-type", value.kind);
        } else {
            out.option("icmp-type", format_args!("{}/{}", value.kind, value.code_first));
        }
    }
}
