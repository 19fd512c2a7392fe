//! `-m mark`: the packet's mark.

use crate::ast::Given;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec};
use crate::value::Masked;

/// The options of `-m mark`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// `--mark`: matches if the mark under the mask equals the value. A value with bits outside the mask never does.
    pub mark: Given<Masked>,
}

const MARK: u8 = 0;

const OPTIONS: &[OptionSpec] = &[OptionSpec::value(MARK, "mark", "value[/mask]").invertible().mandatory()];

impl Extension for Mark {
    const SPEC: Spec = Spec::new(
        "mark",
        Families::Both,
        OPTIONS,
        "Matches packets whose mark, under the mask if there is one, equals the value.",
    );

    fn parse(options: &Options<'_>) -> Result<Mark, Fault> {
        Ok(Mark { mark: options.required(MARK, |option| option.argument.masked())? })
    }

    fn print(&self, out: &mut Printer<'_>) {
        out.given("mark", &self.mark);
    }
}
