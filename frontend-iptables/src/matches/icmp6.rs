//! `-m icmp6`: type and code of ICMPv6 messages.

use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};
use crate::names::icmp::{ICMPV6, IcmpType, parse};

/// The options of `-m icmp6`.
#[derive(Clone, Debug, PartialEq)]
pub struct Icmp6 {
    /// `--icmpv6-type`.
    pub kind: Given<IcmpType>,
}

const TYPE: u8 = 0;

const OPTIONS: &[OptionSpec] =
    &[OptionSpec::value(TYPE, "icmpv6-type", "type[/code]").invertible().mandatory()];

impl Extension for Icmp6 {
    const SPEC: Spec = Spec::new(
        "icmp6",
        Families::V6,
        OPTIONS,
        "Matches ICMPv6 messages by type and code, by number or name (`echo-request`, `neighbour-solicitation`). \
         A message too short for its header is dropped, whatever the rule says.",
    )
    .aliases(&["icmpv6", "ipv6-icmp"])
    .protocols(&[58]);

    fn parse(options: &Options<'_>) -> Result<Icmp6, Fault> {
        let kind = options.required(TYPE, |option| {
            parse(option.argument.text, ICMPV6).map_err(|why| option.argument.bad(why))
        })?;
        Ok(Icmp6 { kind })
    }

    fn print(&self, out: &mut Printer<'_>) {
        let Given { value, negated, .. } = self.kind;
        out.negation(negated);
        if (value.code_first, value.code_last) == (0, 255) {
            out.option("icmpv6-type", value.kind);
        } else {
            out.option("icmpv6-type", format_args!("{}/{}", value.kind, value.code_first));
        }
    }
}
