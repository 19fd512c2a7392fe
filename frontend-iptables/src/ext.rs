//! What an extension is: its options, its documentation, where it may stand, and how it is read and printed.
//!
//! A match or target lives in one file under `matches/` or `targets/`, as a typed struct that implements [`Extension`],
//! and in one row of the table there. The rule parser collects an extension's options as iptables' `getopt_long` would,
//! checks them against the declared [`OptionSpec`]s (may it be negated, repeated, left out; what does it exclude or
//! require), and hands them over all at once; so an extension only turns texts into values. This follows the division
//! of labour in libxtables (`xt_option_entry` and its flags, libxtables/xtoptions.c).

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::{self, Display, Write};
use std::net::IpAddr;
use std::sync::Arc;

use polc_ir::diag::{Code, Diagnostic};
use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::source::Span;

use crate::ast::{Given, Text};
use crate::codes;
use crate::parse::Existing;
use crate::value::{self, AddressMask, BadAddress, INTERFACE_BYTES_MAX, Interface, Masked};

/// The number of an option within its extension, below 32. Synonyms share a number.
pub type OptionId = u8;

/// The set that holds one option, for [`OptionSpec::excludes`] and [`OptionSpec::requires`]; join sets with `|`.
pub const fn set_of(id: OptionId) -> u32 {
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

/// A match or target extension.
pub trait Extension: Sized {
    /// What is declared about it.
    const SPEC: Spec;

    /// Reads its options, which already agree with [`Extension::SPEC`].
    fn parse(options: &Options<'_>) -> Result<Self, Fault>;

    /// Appends its options as iptables-legacy-save prints them, each after a space.
    fn print(&self, out: &mut Printer<'_>);

    /// The name iptables-legacy-save prints for it.
    fn save_name(&self) -> &'static str {
        Self::SPEC.name
    }

    /// What the kernel checks beyond [`Extension::SPEC`] when the table is committed.
    fn check(&self, _place: &Place) -> Result<(), Fault> {
        Ok(())
    }
}

/// Where a rule stands, for checks that need it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: TableKind,
    /// The hooks its chain is reached from.
    pub hooks: HookSet,
    /// The rule's protocol; `None` if it has none or a negated one.
    pub protocol: Option<u16>,
}

/// A set of hooks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HookSet(u8);

impl HookSet {
    /// The set of `hooks`.
    pub fn of(hooks: &[Hook]) -> HookSet {
        HookSet(hooks.iter().fold(0, |set, &hook| set | 1 << hook as u8))
    }

    /// Whether `hook` is in the set.
    pub fn contains(self, hook: Hook) -> bool {
        self.0 & 1 << hook as u8 != 0
    }

    /// The hooks of either set.
    #[must_use]
    pub fn union(self, other: HookSet) -> HookSet {
        HookSet(self.0 | other.0)
    }

    /// The hooks, in a packet's order.
    pub fn iter(self) -> impl Iterator<Item = Hook> {
        Hook::ALL.into_iter().filter(move |&hook| self.contains(hook))
    }
}

/// Why a line is not accepted: a [`Diagnostic`] in the making.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
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
    pub fn new(code: Code, message: impl Into<String>) -> Fault {
        Fault { code, message: message.into(), span: None, hint: None }
    }

    /// Says where.
    pub fn at(self, span: Span) -> Fault {
        Fault { span: Some(span), ..self }
    }

    /// Says what to do.
    pub fn hint(self, hint: impl Into<String>) -> Fault {
        Fault { hint: Some(hint.into()), ..self }
    }

    /// The diagnostic, an error, at `otherwise` if the fault has no place of its own.
    pub fn into_diagnostic(self, otherwise: Span) -> Diagnostic {
        let diagnostic = Diagnostic::error(self.code, self.message, self.span.unwrap_or(otherwise));
        match self.hint {
            Some(hint) => diagnostic.with_hint(hint),
            None => diagnostic,
        }
    }
}

/// An argument of an option.
#[derive(Clone, Copy, Debug)]
pub struct Argument<'a> {
    /// Its text, unquoted.
    pub text: &'a str,
    /// Where it stands.
    pub span: Span,
    /// Whether `text` stands at `span` letter by letter, so that parts of it can be pointed at.
    pub verbatim: bool,
}

impl<'a> Argument<'a> {
    /// Where `part`, a slice of the argument's text, stands; the whole argument if that can't be told.
    pub fn span_of(&self, part: &str) -> Span {
        let offset = (part.as_ptr() as usize).wrapping_sub(self.text.as_ptr() as usize);
        if self.verbatim && offset <= self.text.len() && offset + part.len() <= self.text.len() {
            let start = self.span.start + offset as u32;
            return Span::new(self.span.file, start, start + part.len() as u32);
        }
        self.span
    }

    /// The argument is not what the option takes.
    pub fn bad(&self, message: impl Into<String>) -> Fault {
        Fault::new(codes::BAD_VALUE, message).at(self.span)
    }

    /// A part of the argument is not what the option takes.
    pub fn bad_part(&self, part: &str, message: impl Into<String>) -> Fault {
        Fault::new(codes::BAD_VALUE, message).at(self.span_of(part))
    }

    /// A number in base 0.
    pub fn number(&self, min: u64, max: u64) -> Result<u64, Fault> {
        value::number(self.text, min, max)
            .ok_or_else(|| self.bad(format!("`{}` is not a number from {min} to {max}", self.text)))
    }

    /// `n[:m]` in base 0; a missing end is the smallest or largest number. The second value is absent without colon.
    pub fn number_range(&self, max: u64) -> Result<(u64, Option<u64>), Fault> {
        let number = |text: &'a str, default| {
            if text.is_empty() {
                return Ok(default);
            }
            value::number(text, 0, max)
                .ok_or_else(|| self.bad_part(text, format!("`{text}` is not a number from 0 to {max}")))
        };
        match self.text.split_once(':') {
            None => Ok((number(self.text, 0)?, None)),
            Some((first, last)) => Ok((number(first, 0)?, Some(number(last, max)?))),
        }
    }

    /// `value[/mask]`.
    pub fn masked(&self) -> Result<Masked, Fault> {
        Masked::parse(self.text)
            .ok_or_else(|| self.bad(format!("`{}` is not a 32-bit value[/mask]", self.text)))
    }

    /// An address with an optional mask, host bits kept, as `XTTYPE_HOSTMASK` takes it.
    pub fn host_mask(&self, family: Family) -> Result<AddressMask, Fault> {
        let (host, mask) = match self.text.split_once('/') {
            Some((host, mask)) => (host, Some(mask)),
            None => (self.text, None),
        };
        let address = self.host_part(host, family)?;
        let mask = match mask {
            None => value::mask_of_length(family.address_bits(), family),
            Some(mask) => value::number(mask, 0, family.address_bits().into())
                .map(|length| value::mask_of_length(length as u8, family))
                .or_else(|| value::address(mask, family))
                .ok_or_else(|| {
                    self.bad_part(mask, format!("`{mask}` is not an {family} mask or prefix length"))
                })?,
        };
        Ok(AddressMask { address, mask })
    }

    /// A host address without mask.
    pub fn host(&self, family: Family) -> Result<IpAddr, Fault> {
        self.host_part(self.text, family)
    }

    fn host_part(&self, text: &str, family: Family) -> Result<IpAddr, Fault> {
        value::host(text, family)
            .ok_or_else(|| address_fault(BadAddress::Address(text), family).at(self.span_of(text)))
    }

    /// A device name or a prefix with `+`.
    pub fn interface(&self, text: Text) -> Result<Interface, Fault> {
        if text.len() > INTERFACE_BYTES_MAX {
            return Err(self.bad(format!("device name `{text}` is longer than {INTERFACE_BYTES_MAX} bytes")));
        }
        Ok(Interface { pattern: text })
    }

    /// A port by number or name.
    pub fn port(&self, text: &str, protocol: Option<&str>) -> Result<u16, Fault> {
        value::port(text, protocol).ok_or_else(|| self.unknown_port(text, protocol))
    }

    /// No such port.
    pub fn unknown_port(&self, text: &str, protocol: Option<&str>) -> Fault {
        let whose = protocol.map_or(String::new(), |protocol| format!("{protocol} "));
        let fault = Fault::new(codes::BAD_VALUE, format!("`{text}` is no {whose}port or service"))
            .at(self.span_of(text));
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            fault.hint("ports are 0 to 65535")
        } else {
            fault.hint("service names are those of Debian's /etc/services")
        }
    }

    /// A protocol by number or name.
    pub fn protocol(&self) -> Result<u16, Fault> {
        crate::names::protocol(self.text).ok_or_else(|| {
            Fault::new(codes::UNKNOWN_NAME, format!("`{}` is no known protocol", self.text))
                .at(self.span)
                .hint("protocol names are those of Debian's /etc/protocols, in lower case")
        })
    }
}

/// Explains a bad address.
pub fn address_fault(bad: BadAddress<'_>, family: Family) -> Fault {
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
pub struct GivenOption<'a> {
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
    /// The rule's `-p` as far as it had been read when the option came, and whether it is negated. Extensions that
    /// look up service names depend on the order.
    pub protocol: (u16, bool),
    pub(crate) instance: u32,
}

impl GivenOption<'_> {
    /// Wraps a value read from this option.
    pub fn given<T>(&self, value: T) -> Given<T> {
        Given { value, negated: self.negated, span: self.span }
    }

    /// The protocol so far if it is not negated.
    pub fn plain_protocol(&self) -> Option<u16> {
        Some(self.protocol.0).filter(|&protocol| protocol != 0 && !self.protocol.1)
    }
}

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
pub struct Options<'a> {
    /// The family of the dump.
    pub family: Family,
    /// The clause.
    pub span: Span,
    /// What is known of the kernel objects a rule may name.
    pub existing: &'a Existing,
    pub(crate) all: &'a [GivenOption<'a>],
    pub(crate) instance: u32,
    pub(crate) shelf: &'a RefCell<Shelf>,
}

impl<'a> Options<'a> {
    /// The options, in the order given.
    pub fn iter(&self) -> impl Iterator<Item = &'a GivenOption<'a>> {
        let instance = self.instance;
        self.all.iter().filter(move |option| option.instance == instance)
    }

    /// The option `id`, the last time it was given.
    pub fn get(&self, id: OptionId) -> Option<&'a GivenOption<'a>> {
        self.iter().filter(|option| option.spec.id == id).last()
    }

    /// Whether the option was given.
    pub fn has(&self, id: OptionId) -> bool {
        self.get(id).is_some()
    }

    /// The set of the options that were given.
    pub fn given(&self) -> u32 {
        self.iter().fold(0, |set, option| set | set_of(option.spec.id))
    }

    /// A switch.
    pub fn switch(&self, id: OptionId) -> Option<Given<()>> {
        self.get(id).map(|option| option.given(()))
    }

    /// An option's value, read by `read`; `None` if it was not given.
    pub fn optional<T>(
        &self,
        id: OptionId,
        read: impl FnOnce(&'a GivenOption<'a>) -> Result<T, Fault>,
    ) -> Result<Option<Given<T>>, Fault> {
        self.get(id).map(|option| Ok(option.given(read(option)?))).transpose()
    }

    /// A mandatory option's value.
    pub fn required<T>(
        &self,
        id: OptionId,
        read: impl FnOnce(&'a GivenOption<'a>) -> Result<T, Fault>,
    ) -> Result<Given<T>, Fault> {
        self.optional(id, read)?
            .ok_or_else(|| Fault::new(codes::MISSING_OPTION, "a mandatory option is missing"))
    }

    /// A number option.
    pub fn number(&self, id: OptionId, min: u64, max: u64) -> Result<Option<Given<u64>>, Fault> {
        self.optional(id, |option| option.argument.number(min, max))
    }

    /// A text, shared with equal ones.
    pub fn text(&self, text: &str) -> Text {
        self.shelf.borrow_mut().text(text)
    }

    /// Reports something that is accepted but worth a warning.
    pub fn warn(&self, diagnostic: Diagnostic) {
        self.shelf.borrow_mut().warnings.push(diagnostic);
    }
}

/// Writes canonical text.
pub struct Printer<'a> {
    pub(crate) out: &'a mut String,
    /// The family of the dump.
    pub family: Family,
}

impl Printer<'_> {
    /// Appends a space and `word`.
    pub fn word(&mut self, word: impl Display) {
        let _ = write!(self.out, " {word}");
    }

    /// Appends ` !` if `negated`.
    pub fn negation(&mut self, negated: bool) {
        if negated {
            self.out.push_str(" !");
        }
    }

    /// Appends ` --name`.
    pub fn switch(&mut self, name: &str) {
        self.out.push_str(" --");
        self.out.push_str(name);
    }

    /// Appends ` --name` if the switch is given.
    pub fn switch_if(&mut self, name: &str, given: bool) {
        if given {
            self.switch(name);
        }
    }

    /// Appends ` --name value`.
    pub fn option(&mut self, name: &str, value: impl Display) {
        self.switch(name);
        self.word(value);
    }

    /// Appends ` [!] --name value`.
    pub fn given<T: Display>(&mut self, name: &str, given: &Given<T>) {
        self.negation(given.negated);
        self.option(name, &given.value);
    }

    /// Appends ` [!] --name value` if there is one.
    pub fn given_if<T: Display>(&mut self, name: &str, given: &Option<Given<T>>) {
        if let Some(given) = given {
            self.given(name, given);
        }
    }

    /// Appends a space and `text`, in quotes unless it consists of letters, digits, `_` and `-` only
    /// (libxtables/xtables.c, `xtables_save_string`).
    pub fn quoted(&mut self, text: &str) {
        self.out.push(' ');
        if !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-') {
            self.out.push_str(text);
            return;
        }
        self.out.push('"');
        for c in text.chars() {
            if matches!(c, '"' | '\\' | '\'') {
                self.out.push('\\');
            }
            self.out.push(c);
        }
        self.out.push('"');
    }
}

impl fmt::Write for Printer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.out.push_str(text);
        Ok(())
    }
}

/// Defines the enum of a table of extensions, and the table.
macro_rules! extension_table {
    (
        $(#[$kind_doc:meta])* enum $kind:ident;
        $(#[$entry_doc:meta])* struct $entry:ident;
        $(#[$table_doc:meta])* static $table:ident;
        $($variant:ident($path:path),)*
    ) => {
        $(#[$kind_doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $kind {
            $(#[doc = concat!("See [`", stringify!($path), "`].")] $variant(std::sync::Arc<$path>),)*
        }

        $(#[$entry_doc])*
        pub struct $entry {
            /// What is declared about it.
            pub spec: &'static crate::ext::Spec,
            pub(crate) parse: fn(&crate::ext::Options<'_>) -> Result<$kind, crate::ext::Fault>,
        }

        $(#[$table_doc])*
        pub static $table: &[$entry] = &[$($entry {
            spec: &<$path as crate::ext::Extension>::SPEC,
            parse: |options| {
                Ok($kind::$variant(std::sync::Arc::new(<$path as crate::ext::Extension>::parse(options)?)))
            },
        },)*];

        impl $kind {
            /// What is declared about the extension.
            pub fn spec(&self) -> &'static crate::ext::Spec {
                match self { $($kind::$variant(_) => &<$path as crate::ext::Extension>::SPEC,)* }
            }

            /// The name iptables-legacy-save prints.
            pub fn save_name(&self) -> &'static str {
                match self { $($kind::$variant(it) => crate::ext::Extension::save_name(&**it),)* }
            }

            pub(crate) fn print(&self, out: &mut crate::ext::Printer<'_>) {
                match self { $($kind::$variant(it) => crate::ext::Extension::print(&**it, out),)* }
            }

            pub(crate) fn check(&self, place: &crate::ext::Place) -> Result<(), crate::ext::Fault> {
                match self { $($kind::$variant(it) => crate::ext::Extension::check(&**it, place),)* }
            }
        }

        impl $entry {
            /// The extension of this name for this family.
            pub fn find(name: &str, family: polc_ir::hook::Family) -> Option<&'static $entry> {
                use std::collections::HashMap;
                use std::sync::LazyLock;
                static BY_NAME: LazyLock<HashMap<(&'static str, polc_ir::hook::Family), &'static $entry>> =
                    LazyLock::new(|| {
                        let mut map = HashMap::new();
                        for entry in $table {
                            for family in [polc_ir::hook::Family::V4, polc_ir::hook::Family::V6] {
                                if entry.spec.families.contains(family) {
                                    map.insert((entry.spec.name, family), entry);
                                    for alias in entry.spec.aliases {
                                        map.insert((alias, family), entry);
                                    }
                                }
                            }
                        }
                        map
                    });
                BY_NAME.get(&(name, family)).copied()
            }
        }
    };
}
pub(crate) use extension_table;
