//! `-j MARK`: changes the packet's mark.

use crate::ast::Given;
use crate::codes;
use crate::ext::{Extension, Families, Fault, OptionSpec, Options, Printer, Spec, set_of};
use crate::value::Masked;

/// The options of `-j MARK`, all of which come down to one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct SetMark {
    /// Clear the bits of the mask, then XOR the value. `--set-mark v/m` is v/(v|m), `--or-mark v` is v/v, `--and-mark v`
    /// is 0/!v, `--xor-mark v` is v/0.
    pub operation: Given<Masked>,
}

const SET_XMARK: u8 = 0;
const SET_MARK: u8 = 1;
const AND_MARK: u8 = 2;
const OR_MARK: u8 = 3;
const XOR_MARK: u8 = 4;
const ANY: u32 = set_of(SET_XMARK) | set_of(SET_MARK) | set_of(AND_MARK) | set_of(OR_MARK) | set_of(XOR_MARK);

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::value(SET_XMARK, "set-xmark", "value[/mask]").excludes(ANY),
    OptionSpec::value(SET_MARK, "set-mark", "value[/mask]").excludes(ANY),
    OptionSpec::value(AND_MARK, "and-mark", "bits").excludes(ANY),
    OptionSpec::value(OR_MARK, "or-mark", "bits").excludes(ANY),
    OptionSpec::value(XOR_MARK, "xor-mark", "bits").excludes(ANY),
];

impl Extension for SetMark {
    const SPEC: Spec = Spec::new(
        "MARK",
        Families::Both,
        OPTIONS,
        "Sets the packet's mark and goes on. `--set-xmark v/m` clears the bits of m, then XORs v; `--set-mark v/m` \
         clears the bits of m and v, then XORs v; the others combine bits.",
    );

    fn parse(options: &Options<'_>) -> Result<SetMark, Fault> {
        let Some(option) = options.iter().last() else {
            return Err(
                Fault::new(codes::MISSING_OPTION, "`MARK` needs an option").hint("such as `--set-mark 1`")
            );
        };
        let bits = || option.argument.number(0, u32::MAX.into()).map(|bits| bits as u32);
        let value = match option.spec.id {
            SET_XMARK => option.argument.masked()?,
            SET_MARK => {
                let Masked { value, mask } = option.argument.masked()?;
                Masked { value, mask: value | mask }
            }
            AND_MARK => Masked { value: 0, mask: !bits()? },
            OR_MARK => Masked { value: bits()?, mask: bits()? },
            _ => Masked { value: bits()?, mask: 0 },
        };
        Ok(SetMark { operation: option.given(value) })
    }

    fn print(&self, out: &mut Printer<'_>) {
        let Masked { value, mask } = self.operation.value;
        out.option("set-xmark", format_args!("{value:#x}/{mask:#x}"));
    }
}
