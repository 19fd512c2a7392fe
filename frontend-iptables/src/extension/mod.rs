//! What an extension is: its options, its text, its meaning and its documentation, in one table entry.
//!
//! An extension is data. Its options say which arguments they take ([`Arg`] parses them into a typed [`Value`] and
//! prints them back in iptables-save's spelling), and the order of the options in the table is the order in which
//! iptables-save prints them. What no table can say (defaults, options that exclude each other, odd spellings) is a
//! function of the entry. Adding an extension is adding one entry.

mod arg;
pub(crate) mod unsaid;

use polc_ir::hook::{Family, Hook, TableKind};
use polc_ir::ruleset::Action;
use polc_ir::source::Span;

pub(crate) use arg::print_word;
pub use arg::{Arg, Names, Value};

use crate::ast::RuleAst;
use crate::codes;
use crate::ext::{self, Fault, OptionSpec, Spec, set_of};
use crate::lower::Body;

/// What surrounds an extension's options: what their meaning and validity may depend on.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// The dump's address family.
    pub family: Family,
    /// The rule's `-p` and whether it is negated.
    pub protocol: Option<(u16, bool)>,
}

impl Context {
    /// Whether the rule is for exactly one of these protocols.
    pub fn is_protocol(&self, protocols: &[u16]) -> bool {
        matches!(self.protocol, Some((protocol, false)) if protocols.contains(&protocol))
    }
}

/// An option of an extension.
#[derive(Debug)]
pub struct Opt {
    /// The name without its dashes; iptables-save prints it.
    pub name: &'static str,
    /// Other names it goes by.
    pub aliases: &'static [&'static str],
    /// What it takes.
    pub arg: Arg,
    /// Whether `!` may stand before it.
    pub invert: bool,
    /// Whether it may be given more than once.
    pub repeat: bool,
    /// Whether its argument may be left out; it is an empty text then.
    pub optional: bool,
    /// Whether it must be given.
    pub must: bool,
    /// Whether its argument may hold no newline, as a quote that is left open makes it.
    pub one_line: bool,
    /// Options of the extension that may not be given with it.
    pub excludes: &'static [&'static str],
    /// Options of the extension that must be given with it.
    pub requires: &'static [&'static str],
    /// Which values, negated or not, iptables-save leaves out.
    pub unsaid: fn(&Value, bool) -> bool,
}

impl Opt {
    /// An option that can't be negated.
    pub const fn new(name: &'static str, arg: Arg) -> Opt {
        Opt {
            name,
            aliases: &[],
            arg,
            invert: false,
            repeat: false,
            optional: false,
            must: false,
            one_line: false,
            excludes: &[],
            requires: &[],
            unsaid: |_, _| false,
        }
    }

    /// An option that may stand after `!`.
    pub const fn not(name: &'static str, arg: Arg) -> Opt {
        Opt { invert: true, ..Opt::new(name, arg) }
    }

    /// The same option under other names too.
    pub const fn or(self, aliases: &'static [&'static str]) -> Opt {
        Opt { aliases, ..self }
    }

    /// The same option, which may be given again.
    pub const fn again(self) -> Opt {
        Opt { repeat: true, ..self }
    }

    /// The same option, whose argument may be left out.
    pub const fn optional(self) -> Opt {
        Opt { optional: true, ..self }
    }

    /// The same option, which must be given.
    pub const fn must(self) -> Opt {
        Opt { must: true, ..self }
    }

    /// The same option, whose argument may hold no newline.
    pub const fn one_line(self) -> Opt {
        Opt { one_line: true, ..self }
    }

    /// The same option, which may not be given with these.
    pub const fn excludes(self, others: &'static [&'static str]) -> Opt {
        Opt { excludes: others, ..self }
    }

    /// The same option, which needs these.
    pub const fn requires(self, others: &'static [&'static str]) -> Opt {
        Opt { requires: others, ..self }
    }

    /// The same option, of which iptables-save leaves out the values, negated or not, for which `unsaid` holds. They
    /// keep their meaning.
    pub const fn unsaid(self, unsaid: fn(&Value, bool) -> bool) -> Opt {
        Opt { unsaid, ..self }
    }
}

/// Which address families have an extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// iptables and ip6tables.
    Both,
    /// iptables alone.
    V4,
    /// ip6tables alone.
    V6,
}

impl Families {
    /// Whether a dump of this family may use the extension.
    pub fn has(self, family: Family) -> bool {
        match self {
            Families::Both => true,
            Families::V4 => family == Family::V4,
            Families::V6 => family == Family::V6,
        }
    }
}

/// What an extension means.
#[derive(Clone, Copy, Debug)]
pub enum Meaning {
    /// A match: adds its clauses to the rule.
    Match(fn(&Options, &mut Body<'_>)),
    /// A target: the rule's action.
    Target(fn(&Options) -> Action),
}

/// Checks options as a whole and fills in defaults; the error says what is wrong.
pub type Finish = fn(&mut Options, &Context) -> Result<(), String>;

/// Where a rule stands, for what depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// The dump's address family.
    pub family: Family,
    /// Whether the rules are iptables-nft's, through which the kernel asks less of some places.
    pub nft: bool,
    /// The rule's table.
    pub table: TableKind,
    /// The hooks from which packets reach the rule; none for a rule that no packet can reach.
    pub hooks: &'a [Hook],
    /// The rule.
    pub rule: &'a RuleAst,
}

impl Site<'_> {
    /// The first of `hooks` from which packets reach the rule.
    pub fn reached_from(&self, hooks: &[Hook]) -> Option<Hook> {
        self.hooks.iter().copied().find(|hook| hooks.contains(hook))
    }
}

/// Checks options against the place of their rule; the error says what is wrong.
pub type Place = fn(&Options, &Site<'_>) -> Result<(), String>;

/// An extension: a match or a target.
#[derive(Debug)]
pub struct Extension {
    /// The name after `-m` or `-j`.
    pub name: &'static str,
    /// Which families have it.
    pub families: Families,
    /// Protocols of which `-p` must name one; empty if it needn't.
    pub protocols: &'static [u16],
    /// Whether `-p` must stand before the options: iptables asks for the protocol when it reads their arguments, not at
    /// the line's end.
    pub protocol_first: bool,
    /// Tables it is allowed in; empty for all.
    pub tables: &'static [TableKind],
    /// Hooks from which packets may reach it; empty for all.
    pub hooks: &'static [Hook],
    /// Checks the rest of what the kernel asks of the place.
    pub place: Option<Place>,
    /// The options, in the order iptables-save prints them.
    pub options: &'static [Opt],
    /// Checks what the table can't say and fills in defaults. An error names the problem.
    pub finish: Option<Finish>,
    /// Prints the options where the table's order and spelling don't do.
    pub print: Option<fn(&Options, &mut String)>,
    /// What it means.
    pub meaning: Meaning,
    /// What it is for, in a sentence or two.
    pub doc: &'static str,
}

impl PartialEq for Extension {
    fn eq(&self, other: &Extension) -> bool {
        std::ptr::eq(self, other)
    }
}

/// An extension's template: everything allowed, nothing checked.
pub const fn base(name: &'static str, meaning: Meaning, doc: &'static str) -> Extension {
    Extension {
        name,
        families: Families::Both,
        protocols: &[],
        protocol_first: false,
        tables: &[],
        hooks: &[],
        place: None,
        options: &[],
        finish: None,
        print: None,
        meaning,
        doc,
    }
}

/// An extension as the line parser sees it.
#[derive(Debug)]
pub struct Entry {
    /// Its name, options and restrictions.
    pub spec: Spec,
    extension: &'static Extension,
}

impl Entry {
    /// The entries of a table of extensions. They live as long as the program.
    pub fn table(groups: &'static [&'static [Extension]]) -> Vec<Entry> {
        groups.iter().flat_map(|group| group.iter()).map(Entry::new).collect()
    }

    fn new(extension: &'static Extension) -> Entry {
        let mut options = Vec::new();
        let id_of = |name: &str| {
            let found = extension.options.iter().position(|option| option.name == name);
            found.expect("an entry names its own options") as u8
        };
        let set = |names: &[&str]| names.iter().fold(0, |set, name| set | set_of(id_of(name)));
        for (id, option) in extension.options.iter().enumerate() {
            for name in std::iter::once(&option.name).chain(option.aliases) {
                options.push(OptionSpec {
                    id: id as u8,
                    name,
                    metavar: option.arg.metavar(),
                    arguments: option.arg.words() as u8,
                    invertible: option.invert,
                    optional: option.optional,
                    mandatory: option.must,
                    repeatable: option.repeat,
                    excludes: set(option.excludes),
                    requires: set(option.requires),
                });
            }
        }
        let families = match extension.families {
            Families::Both => ext::Families::Both,
            Families::V4 => ext::Families::V4,
            Families::V6 => ext::Families::V6,
        };
        let spec = Spec::new(extension.name, families, options.leak(), extension.doc)
            .protocols(extension.protocols)
            .tables(extension.tables)
            .hooks(extension.hooks);
        Entry { spec, extension }
    }

    /// Reads the options that the line parser collected for one clause.
    pub(crate) fn parse(&self, options: &ext::Options<'_>, context: &Context) -> Result<Options, Fault> {
        let last_argument = || options.iter().filter(|option| option.spec.arguments > 0).last();
        let context = &match self.extension.protocol_first {
            true => Context { protocol: last_argument().and_then(|option| option.protocol), ..*context },
            false => *context,
        };
        let mut given: Vec<Given> = Vec::new();
        for option in options.iter() {
            // A switch that is set again says nothing new.
            let same = |given: &Given| (given.option, given.negated) == (option.spec.id, option.negated);
            if option.spec.arguments == 0 && option.spec.name != "next" && given.iter().any(same) {
                continue;
            }
            let Opt { arg, one_line, .. } = self.extension.options[option.spec.id as usize];
            if one_line && option.argument.text.contains('\n') {
                let message = format!("the argument of `--{}` holds a newline", option.spec.name);
                return Err(Fault::new(codes::BAD_VALUE, message)
                    .at(option.argument.span)
                    .hint("close the quote on the same line"));
            }
            let words = [option.argument.text, option.second.text];
            if let (Arg::SetEnds, Some(sets)) = (arg, options.sets) {
                let name = option.argument.text;
                let wrong = match sets.get(name) {
                    None => Some(("does not exist".to_string(), "give the sets with --ipset FILE")),
                    Some(Some(family)) if *family != context.family => {
                        Some((format!("holds {family} addresses"), "name a set of the rules' own family"))
                    }
                    Some(_) => None,
                };
                if let Some((what, hint)) = wrong {
                    return Err(Fault::new(codes::UNKNOWN_NAME, format!("set `{name}` {what}"))
                        .at(option.argument.span)
                        .hint(hint));
                }
            }
            let value = arg.parse(&words[..arg.words().min(2)], context).map_err(|message| {
                Fault::new(codes::BAD_VALUE, message).at(if arg.words() == 0 {
                    option.span
                } else {
                    option.argument.span
                })
            })?;
            given.push(Given {
                option: option.spec.id,
                negated: option.negated,
                value,
                span: Some(option.span),
            });
        }
        if !self.extension.protocols.is_empty() && !context.is_protocol(self.extension.protocols) {
            let names: Vec<String> = self
                .extension
                .protocols
                .iter()
                .map(|&number| crate::names::protocol_name(number).map_or(number.to_string(), Into::into))
                .collect();
            let before = if self.extension.protocol_first { " before it" } else { "" };
            let message =
                format!("`{}` works only with `-p {}`{before}", self.extension.name, names.join("` or `-p "));
            return Err(Fault::new(codes::WRONG_PROTOCOL, message).hint("name the protocol, without `!`"));
        }
        let mut parsed = Options { extension: self.extension, given };
        if let Some(finish) = self.extension.finish {
            finish(&mut parsed, context)
                .map_err(|message| Fault::new(codes::CONFLICTING_OPTIONS, message))?;
        }
        parsed.given.shrink_to_fit();
        Ok(parsed)
    }
}

/// An option as given.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// Index in the extension's options.
    pub option: u8,
    /// Whether `!` stood before it.
    pub negated: bool,
    /// Its argument.
    pub value: Value,
    /// From the `!` or the name to the end of the last argument; `None` for defaults.
    pub span: Option<Span>,
}

/// An extension's options as given.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The extension.
    pub extension: &'static Extension,
    /// The options, in the order given.
    pub given: Vec<Given>,
}

impl Options {
    /// The option of this name, if it was given.
    ///
    /// # Panics
    /// If the extension has no such option: names are the table's own.
    pub fn get(&self, name: &str) -> Option<&Given> {
        let index = self.index(name);
        self.given.iter().find(|given| given.option == index)
    }

    /// The option's value and whether it was negated.
    pub fn value(&self, name: &str) -> Option<(&Value, bool)> {
        self.get(name).map(|given| (&given.value, given.negated))
    }

    /// Whether the option was given.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// How many of these options were given.
    pub fn count(&self, names: &[&str]) -> usize {
        names.iter().filter(|name| self.has(name)).count()
    }

    /// Sets an option that was not given.
    pub fn default(&mut self, name: &str, value: Value) {
        if !self.has(name) {
            let option = self.index(name);
            self.given.push(Given { option, negated: false, value, span: None });
        }
    }

    /// Takes an option away: it says nothing.
    pub fn remove(&mut self, name: &str) {
        let index = self.index(name);
        self.given.retain(|given| given.option != index);
    }

    fn index(&self, name: &str) -> u8 {
        let found = self.extension.options.iter().position(|option| option.name == name);
        found.expect("an entry names its own options") as u8
    }

    /// Prints ` [! ]--name value` for each option, in the table's order.
    pub fn print(&self, out: &mut String) {
        if let Some(print) = self.extension.print {
            return print(self, out);
        }
        for option in self.extension.options {
            self.print_option(option.name, out);
        }
    }

    /// Prints one option, if it was given.
    pub fn print_option(&self, name: &str, out: &mut String) {
        let index = self.index(name);
        self.given
            .iter()
            .filter(|given| given.option == index)
            .for_each(|given| self.print_given(given, out));
    }

    /// Prints an option as it was given, unless iptables-save leaves it out.
    pub fn print_given(&self, given: &Given, out: &mut String) {
        if self.is_unsaid(given) {
            return;
        }
        let option = &self.extension.options[given.option as usize];
        out.push_str(if given.negated { " ! --" } else { " --" });
        out.push_str(option.name);
        option.arg.print(&given.value, out);
    }

    /// Whether iptables-save leaves this option out.
    pub(crate) fn is_unsaid(&self, given: &Given) -> bool {
        (self.extension.options[given.option as usize].unsaid)(&given.value, given.negated)
    }

    /// The number given to an option of this name.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.0.number()
    }

    /// The option of this name, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Given> {
        let index = self.index(name);
        self.given.iter_mut().find(|given| given.option == index)
    }

    /// Sets an option, whether it was given or not.
    pub fn set(&mut self, name: &str, value: Value) {
        match self.get_mut(name) {
            Some(given) => given.value = value,
            None => self.default(name, value),
        }
    }
}
