//! The options of a rule line as the line parser collects them.
//!
//! The rule parser collects an extension's options as iptables' `getopt_long` would,
//! checks them against the declared [`OptionSpec`]s (may it be negated, repeated, left out; what does it exclude or
//! require), and hands them over all at once; so an extension only turns texts into values. This follows the division
//! of labour in libxtables (`xt_option_entry` and its flags, libxtables/xtoptions.c).

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;

use polc_ir::diag::{Code, Diagnostic};
use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::source::{Span, bytes};

use crate::ast::Text;
use crate::codes;
use crate::parse::SetFamilies;
use crate::value::{self, BadAddress, INTERFACE_BYTES_MAX, Interface};

/// The number of an option within its extension, below 32. Synonyms share a number.
pub(crate) type OptionId = u8;

/// The set that holds one option, for [`OptionSpec::excludes`] and [`OptionSpec::requires`]; join sets with `|`.
pub(crate) const fn set_of(id: OptionId) -> u32 {
    1 << id
}

/// One option of an extension.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its number.
    pub id: OptionId,
    /// Its name, without the dashes.
    pub name: &'static str,
    /// What its argument looks like, for documentation; empty for a switch. Two words mean two arguments.
    pub metavar: &'static str,
    /// How many arguments it takes, 0 to 2.
    pub arguments: u8,
    /// Whether `!` may stand before it.
    pub invertible: bool,
    /// Whether the argument may be left out, if the next word begins with `-` or `!` or there is none.
    pub optional: bool,
    /// Whether it must be given.
    pub mandatory: bool,
    /// Whether it may be given more than once.
    pub repeatable: bool,
    /// Options that may not be given with it.
    pub excludes: u32,
    /// Options that must be given with it.
    pub requires: u32,
}

impl OptionSpec {
    const fn new(id: OptionId, name: &'static str, metavar: &'static str, arguments: u8) -> OptionSpec {
        assert!(id < 32, "options are counted in a 32-bit set");
        OptionSpec {
            id,
            name,
            metavar,
            arguments,
            invertible: false,
            optional: false,
            mandatory: false,
            repeatable: false,
            excludes: 0,
            requires: 0,
        }
    }

    /// An option without argument.
    pub const fn switch(id: OptionId, name: &'static str) -> OptionSpec {
        OptionSpec::new(id, name, "", 0)
    }

    /// An option with one argument.
    pub const fn value(id: OptionId, name: &'static str, metavar: &'static str) -> OptionSpec {
        OptionSpec::new(id, name, metavar, 1)
    }

    /// An option with two arguments (`--tcp-flags mask comp`).
    pub const fn pair(id: OptionId, name: &'static str, metavar: &'static str) -> OptionSpec {
        OptionSpec::new(id, name, metavar, 2)
    }

    /// `!` may stand before it.
    pub const fn invertible(self) -> OptionSpec {
        OptionSpec { invertible: true, ..self }
    }

    /// It must be given.
    pub const fn mandatory(self) -> OptionSpec {
        OptionSpec { mandatory: true, ..self }
    }

    /// It may be given more than once.
    pub const fn repeatable(self) -> OptionSpec {
        OptionSpec { repeatable: true, ..self }
    }

    /// None of `options` may be given with it.
    pub const fn excludes(self, options: u32) -> OptionSpec {
        OptionSpec { excludes: options, ..self }
    }

    /// All of `options` must be given with it.
    pub const fn requires(self, options: u32) -> OptionSpec {
        OptionSpec { requires: options, ..self }
    }
}

/// Which address families an extension exists for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// Both.
    Both,
    /// iptables only.
    V4,
    /// ip6tables only.
    V6,
}

impl Families {
    /// Whether `family` is among them.
    pub fn contains(self, family: Family) -> bool {
        match self {
            Families::Both => true,
            Families::V4 => family == Family::V4,
            Families::V6 => family == Family::V6,
        }
    }
}

/// All that is declared about an extension.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The name after `-m` or `-j`.
    pub name: &'static str,
    /// Other names it is found by.
    pub aliases: &'static [&'static str],
    /// The families it exists for.
    pub families: Families,
    /// Its options. Synonyms are rows of their own.
    pub options: &'static [OptionSpec],
    /// The protocols one of which the rule must name with `-p`, not negated; empty if any will do. The kernel checks
    /// it (net/netfilter/x_tables.c, `xt_check_match`).
    pub protocols: &'static [u16],
    /// The tables it may be in; empty for all.
    pub tables: &'static [TableKind],
    /// The hooks from which its chain may be reached; empty for all.
    pub hooks: &'static [Hook],
    /// What it does, in a few sentences, for the manual.
    pub summary: &'static str,
}

impl Spec {
    /// An extension without restrictions.
    pub const fn new(
        name: &'static str,
        families: Families,
        options: &'static [OptionSpec],
        summary: &'static str,
    ) -> Spec {
        Spec { name, aliases: &[], families, options, protocols: &[], tables: &[], hooks: &[], summary }
    }

    /// Found by these names too.
    pub const fn aliases(self, aliases: &'static [&'static str]) -> Spec {
        Spec { aliases, ..self }
    }

    /// Needs one of these protocols.
    pub const fn protocols(self, protocols: &'static [u16]) -> Spec {
        Spec { protocols, ..self }
    }

    /// Only in these tables.
    pub const fn tables(self, tables: &'static [TableKind]) -> Spec {
        Spec { tables, ..self }
    }

    /// Only reached from these hooks.
    pub const fn hooks(self, hooks: &'static [Hook]) -> Spec {
        Spec { hooks, ..self }
    }

    /// The options as a manual lists them, one a line, synonyms joined: `[!] --source-port, --sport port[:port]`.
    pub fn usage(&self) -> String {
        let mut out = String::new();
        let mut seen = 0;
        for option in self.options.iter().filter(|option| {
            let first = seen & set_of(option.id) == 0;
            seen |= set_of(option.id);
            first
        }) {
            let names: Vec<String> = self
                .options
                .iter()
                .filter(|it| it.id == option.id)
                .map(|it| format!("--{}", it.name))
                .collect();
            let negation = if option.invertible { "[!] " } else { "" };
            let _ = write!(out, "{negation}{}", names.join(", "));
            if !option.metavar.is_empty() {
                let _ = write!(out, " {}", option.metavar);
            }
            out.push('\n');
        }
        out
    }
}

/// Why a line is not accepted: a [`Diagnostic`] in the making.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fault {
    /// Its code.
    pub code: Code,
    /// What is wrong.
    pub message: String,
    /// Where; if `None`, the whole clause.
    pub span: Option<Span>,
    /// What to do.
    pub hint: Option<String>,
}

impl Fault {
    /// A fault of the whole clause.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Fault {
        Fault { code, message: message.into(), span: None, hint: None }
    }

    /// Says where.
    pub(crate) fn at(self, span: Span) -> Fault {
        Fault { span: Some(span), ..self }
    }

    /// Says what to do.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Fault {
        Fault { hint: Some(hint.into()), ..self }
    }

    /// The diagnostic, an error, at `otherwise` if the fault has no place of its own.
    pub(crate) fn into_diagnostic(self, otherwise: Span) -> Diagnostic {
        let diagnostic = Diagnostic::error(self.code, self.message, self.span.unwrap_or(otherwise));
        match self.hint {
            Some(hint) => diagnostic.with_hint(hint),
            None => diagnostic,
        }
    }
}

/// An argument of an option.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Argument<'a> {
    /// Its text, unquoted.
    pub text: &'a str,
    /// Where it stands.
    pub span: Span,
    /// Whether `text` stands at `span` letter by letter, so that parts of it can be pointed at.
    pub verbatim: bool,
}

impl<'a> Argument<'a> {
    /// Where `part`, a slice of the argument's text, stands; the whole argument if that can't be told.
    pub(crate) fn span_of(&self, part: &str) -> Span {
        let offset = (part.as_ptr() as usize).wrapping_sub(self.text.as_ptr() as usize);
        if self.verbatim && offset <= self.text.len() && offset + part.len() <= self.text.len() {
            let start = self.span.start + offset as u32;
            return Span::new(self.span.file, start, start + part.len() as u32);
        }
        self.span
    }

    /// The argument is not what the option takes.
    pub(crate) fn bad(&self, message: impl Into<String>) -> Fault {
        Fault::new(codes::BAD_VALUE, message).at(self.span)
    }

    /// A number in base 0.
    pub(crate) fn number(&self, min: u64, max: u64) -> Result<u64, Fault> {
        value::number(self.text, min, max)
            .ok_or_else(|| self.bad(format!("`{}` is not a number from {min} to {max}", self.text)))
    }

    /// A device name or a prefix with `+`.
    pub(crate) fn interface(&self, text: Text) -> Result<Interface, Fault> {
        if bytes::count(&text) > INTERFACE_BYTES_MAX {
            return Err(self.bad(format!("device name `{text}` is longer than {INTERFACE_BYTES_MAX} bytes")));
        }
        Ok(Interface { pattern: text })
    }

    /// A protocol by number or name.
    pub(crate) fn protocol(&self) -> Result<u16, Fault> {
        crate::names::protocol(self.text).ok_or_else(|| {
            Fault::new(codes::UNKNOWN_NAME, format!("`{}` is no known protocol", self.text))
                .at(self.span)
                .hint("protocol names are those of Debian's /etc/protocols, in lower case")
        })
    }
}

/// Explains a bad address.
pub(crate) fn address_fault(bad: BadAddress<'_>, family: Family) -> Fault {
    match bad {
        BadAddress::Mask(mask) => {
            Fault::new(codes::BAD_VALUE, format!("`{mask}` is not an {family} mask or prefix length"))
        }
        BadAddress::Address(text) => {
            let other = match family {
                Family::V4 => text.parse::<std::net::Ipv6Addr>().is_ok(),
                Family::V6 => text.parse::<std::net::Ipv4Addr>().is_ok(),
            };
            if other {
                Fault::new(codes::WRONG_FAMILY, format!("`{text}` is not an {family} address"))
                    .hint("a dump holds the rules of one address family; choose it with --family")
            } else {
                Fault::new(codes::UNKNOWN_NAME, format!("host or network `{text}` not found"))
                    .hint("write the address: names would have to be resolved, with a result that can change")
            }
        }
    }
}

/// An option as it was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GivenOption<'a> {
    /// Which option.
    pub spec: &'static OptionSpec,
    /// Whether `!` stood before it.
    pub negated: bool,
    /// From the `!` or the name to the end of the last argument.
    pub span: Span,
    /// The first argument; empty for a switch.
    pub argument: Argument<'a>,
    /// The second argument of an option with two; otherwise empty.
    pub second: Argument<'a>,
    /// What `-p` before it says, and whether it is negated.
    pub protocol: Option<(u16, bool)>,
    pub(crate) instance: u32,
}

impl GivenOption<'_> {}

/// Texts already seen, so that equal ones share memory, and warnings that came up on the way.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    pub(crate) texts: HashSet<Arc<str>>,
    pub(crate) warnings: Vec<Diagnostic>,
}

impl Shelf {
    pub(crate) fn text(&mut self, text: &str) -> Text {
        if let Some(known) = self.texts.get(text) {
            return Text::from(known.clone());
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        Text::from(text)
    }
}

/// The options of one extension clause.
pub(crate) struct Options<'a> {
    /// The sets that exist, if that is known.
    pub sets: Option<&'a SetFamilies>,
    pub(crate) all: &'a [GivenOption<'a>],
    pub(crate) instance: u32,
}

impl<'a> Options<'a> {
    /// The options, in the order given.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a GivenOption<'a>> {
        let instance = self.instance;
        self.all.iter().filter(move |option| option.instance == instance)
    }

    /// The option `id`, the last time it was given.
    pub(crate) fn get(&self, id: OptionId) -> Option<&'a GivenOption<'a>> {
        self.iter().filter(|option| option.spec.id == id).last()
    }

    /// The set of the options that were given.
    pub(crate) fn given(&self) -> u32 {
        self.iter().fold(0, |set, option| set | set_of(option.spec.id))
    }
}
