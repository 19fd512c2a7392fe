//! Reads the words of one rule line as iptables' command line parser does.
//!
//! The grammar is `getopt_long`'s: long options may be abbreviated as far as they stay unique among the options loaded
//! so far, take `=value`, and an option's argument is whatever word follows. Which options exist changes on the way:
//! `-m` and `-j` load theirs, and an unknown option makes `-p tcp` load the tcp match. Base options win over
//! extensions', later extensions over earlier ones (iptables/xshared.c, `do_parse` and `command_default`).

mod clause;
mod command;
mod finish;
mod suggest;

use std::cell::RefCell;
use std::collections::HashSet;

use polc_ir::diag::Diagnostic;
use polc_ir::hook::{Family, TableKind};
use polc_ir::source::Span;

use crate::ast::{Counters, Given, MatchAst, Text};
use crate::codes;
use crate::ext::{Argument, Fault, GivenOption, OptionSpec, Shelf};
use crate::extension::{self, Entry};
use crate::lexer::Word;
use crate::parse::{Mode, SetFamilies};
use crate::value::{AddressMask, Interface};

/// What a rule line needs to know of its surroundings.
pub(crate) struct LineContext<'a> {
    pub(crate) family: Family,
    pub(crate) table: TableKind,
    pub(crate) mode: Mode,
    pub(crate) sets: Option<&'a SetFamilies>,
    pub(crate) shelf: &'a RefCell<Shelf>,
    /// Whether the table has a chain of this name now.
    pub(crate) is_chain: &'a dyn Fn(&str) -> bool,
    /// The whole line.
    pub(crate) line: Span,
}

/// What a rule line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Append,
    /// Before rule number, from 1.
    Insert(u32),
    Replace(u32),
    DeleteNumber(u32),
    DeleteRule,
    Check,
    NewChain,
    DeleteChain,
    RenameChain,
    Policy,
    Flush,
    /// All counters of a chain, or those of rule number, from 1.
    Zero(Option<u32>),
    List,
    ListRules,
}

impl Command {
    fn letter(self) -> char {
        match self {
            Command::Append => 'A',
            Command::Insert(_) => 'I',
            Command::Replace(_) => 'R',
            Command::DeleteNumber(_) | Command::DeleteRule => 'D',
            Command::Check => 'C',
            Command::NewChain => 'N',
            Command::DeleteChain => 'X',
            Command::RenameChain => 'E',
            Command::Policy => 'P',
            Command::Flush => 'F',
            Command::Zero(_) => 'Z',
            Command::List => 'L',
            Command::ListRules => 'S',
        }
    }

    /// Whether the line describes a rule.
    pub(crate) fn has_rule(self) -> bool {
        matches!(
            self,
            Command::Append | Command::Insert(_) | Command::Replace(_) | Command::DeleteRule | Command::Check
        )
    }
}

/// The target of a line, chains still by name.
#[derive(Debug)]
pub(crate) enum LineTarget<'a> {
    None,
    Accept,
    Drop,
    Queue,
    Return,
    Jump(Argument<'a>),
    Goto(Argument<'a>),
    Extension(extension::Options),
}

/// A rule line, read.
pub(crate) struct RuleLine<'a> {
    pub(crate) command: Command,
    pub(crate) chain: Option<Argument<'a>>,
    /// The new name of `-E`, the policy of `-P`.
    pub(crate) operand: Option<Argument<'a>>,
    pub(crate) counters: Option<Counters>,
    pub(crate) sources: Vec<Given<AddressMask>>,
    pub(crate) destinations: Vec<Given<AddressMask>>,
    pub(crate) in_interface: Option<Given<Interface>>,
    pub(crate) out_interface: Option<Given<Interface>>,
    pub(crate) protocol: Option<Given<u16>>,
    pub(crate) fragment: Option<Given<()>>,
    pub(crate) matches: Vec<MatchAst>,
    pub(crate) target: LineTarget<'a>,
    pub(crate) target_span: Span,
}

/// Whether a line was read or is for the other family.
pub(crate) enum Outcome<'a> {
    Line(Box<RuleLine<'a>>),
    /// `-4` or `-6` for the other family: the line is skipped.
    OtherFamily(Span),
}

/// What to do about a value that is attached to its option.
const WHOLE_WORD: &str = "iptables-restore takes the whole word for the value: put a blank between the two";

/// How many arguments a base option takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arity {
    None,
    One,
    /// Only when attached: `-Fchain`, `--flush=chain`.
    Optional,
}

/// The options every rule line has: long name, letter, arguments (iptables/iptables.c, `original_opts`).
const BASE: &[(&str, char, Arity)] = &[
    ("append", 'A', Arity::One),
    ("delete", 'D', Arity::One),
    ("check", 'C', Arity::One),
    ("insert", 'I', Arity::One),
    ("replace", 'R', Arity::One),
    ("list", 'L', Arity::Optional),
    ("list-rules", 'S', Arity::Optional),
    ("flush", 'F', Arity::Optional),
    ("zero", 'Z', Arity::Optional),
    ("new-chain", 'N', Arity::One),
    ("delete-chain", 'X', Arity::Optional),
    ("rename-chain", 'E', Arity::One),
    ("policy", 'P', Arity::One),
    ("source", 's', Arity::One),
    ("destination", 'd', Arity::One),
    ("src", 's', Arity::One),
    ("dst", 'd', Arity::One),
    ("protocol", 'p', Arity::One),
    ("in-interface", 'i', Arity::One),
    ("jump", 'j', Arity::One),
    ("table", 't', Arity::One),
    ("match", 'm', Arity::One),
    ("numeric", 'n', Arity::None),
    ("out-interface", 'o', Arity::One),
    ("verbose", 'v', Arity::None),
    ("wait", 'w', Arity::Optional),
    ("wait-interval", 'W', Arity::Optional),
    ("exact", 'x', Arity::None),
    ("fragments", 'f', Arity::None),
    ("version", 'V', Arity::None),
    ("help", 'h', Arity::Optional),
    ("line-numbers", '0', Arity::None),
    ("modprobe", 'M', Arity::One),
    ("set-counters", 'c', Arity::One),
    ("goto", 'g', Arity::One),
    ("ipv4", '4', Arity::None),
    ("ipv6", '6', Arity::None),
];

fn base_letter(letter: char) -> Option<Arity> {
    // `--line-numbers` has no letter of its own.
    if letter == '0' {
        return None;
    }
    BASE.iter().find(|row| row.1 == letter).map(|row| row.2)
}

fn base_name(letter: char) -> String {
    match letter {
        '0' => "--line-numbers".into(),
        letter => format!("-{letter}"),
    }
}

/// Who an option belongs to.
#[derive(Clone, Copy)]
enum Found {
    Base(char, Arity),
    Extension { table: usize, spec: &'static OptionSpec },
}

impl Found {
    /// Whether two candidates for an abbreviation are the same option to getopt.
    fn same(self, other: Found) -> bool {
        match (self, other) {
            (Found::Base(a, x), Found::Base(b, y)) => a == b && x == y,
            (Found::Extension { table: a, spec: x }, Found::Extension { table: b, spec: y }) => {
                a == b && x.id == y.id && (x.arguments == 0) == (y.arguments == 0)
            }
            _ => false,
        }
    }
}

enum Lookup {
    Found(Found),
    Unknown,
    Ambiguous(Vec<String>),
}

/// Options that a `-m` or `-j` loaded.
struct Loaded {
    options: &'static [OptionSpec],
    /// The clause that now receives them.
    instance: u32,
}

/// A clause being read. The target is one too.
struct Instance {
    entry: Option<&'static Entry>,
    span: Span,
}

struct LineParser<'a, 'c> {
    cx: &'c LineContext<'c>,
    words: &'a [Word<'a>],
    at: usize,
    /// Each table of options once: a second `-m tcp` takes over the first one's options.
    loaded: Vec<Loaded>,
    instances: Vec<Instance>,
    target: Option<(&'static Entry, u32)>,
    options: Vec<GivenOption<'a>>,
    protocol: Option<(Argument<'a>, Given<u16>)>,
    protocol_used: bool,
    seen: HashSet<char>,
    command: Option<Command>,
    chain: Option<Argument<'a>>,
    operand: Option<Argument<'a>>,
    source: Option<Given<Argument<'a>>>,
    destination: Option<Given<Argument<'a>>>,
    jump: Option<(Given<Argument<'a>>, bool)>,
    line: RuleLine<'a>,
    /// A `!` that waits for its option.
    pending: Option<Span>,
}

/// Reads a line.
pub(crate) fn parse_line<'a>(cx: &LineContext<'_>, words: &'a [Word<'a>]) -> Result<Outcome<'a>, Fault> {
    let mut parser = LineParser {
        cx,
        words,
        at: 0,
        loaded: Vec::new(),
        instances: Vec::new(),
        target: None,
        options: Vec::new(),
        protocol: None,
        protocol_used: false,
        seen: HashSet::new(),
        command: None,
        chain: None,
        operand: None,
        source: None,
        destination: None,
        jump: None,
        line: RuleLine {
            command: Command::Append,
            chain: None,
            operand: None,
            counters: None,
            sources: Vec::new(),
            destinations: Vec::new(),
            in_interface: None,
            out_interface: None,
            protocol: None,
            fragment: None,
            matches: Vec::new(),
            target: LineTarget::None,
            target_span: cx.line.at_end(),
        },
        pending: None,
    };
    if let Some(other) = parser.read()? {
        return Ok(Outcome::OtherFamily(other));
    }
    parser.finish().map(|line| Outcome::Line(Box::new(line)))
}

/// Whether a line asks for a rule, as far as can be told of one that can't be read: whether `-A` or `-I` is the first
/// command in it.
pub(crate) fn asks_for_rule(text: &str) -> bool {
    let counted = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let words = counted.map_or(text, |(_, rest)| rest).split([' ', '\t']);
    matches!(words.filter_map(command_in).next(), Some('A' | 'I'))
}

/// The command that a word gives.
fn command_in(word: &str) -> Option<char> {
    let letter = match word.strip_prefix("--") {
        Some(long) => {
            let name = long.split_once('=').map_or(long, |(name, _)| name);
            let whole = BASE.iter().find(|row| row.0 == name);
            let mut begun = BASE.iter().filter(|row| !name.is_empty() && row.0.starts_with(name));
            let begun = begun.next().filter(|first| begun.all(|other| other.1 == first.1));
            whole.or(begun)?.1
        }
        // Letters without arguments may stand before one that has some.
        None => word.strip_prefix('-')?.chars().find(|&letter| base_letter(letter) != Some(Arity::None))?,
    };
    letter.is_ascii_uppercase().then_some(letter).filter(|letter| !matches!(letter, 'M' | 'V' | 'W'))
}

fn argument<'a>(word: &'a Word<'a>) -> Argument<'a> {
    Argument { text: &word.text, span: word.span, verbatim: word.text.len() == word.span.len() as usize }
}

/// The part of a word from byte `from` on.
fn tail<'a>(word: &'a Word<'a>, from: usize) -> Argument<'a> {
    let whole = argument(word);
    let text = &whole.text[from..];
    Argument { text, span: whole.span_of(text), verbatim: whole.verbatim }
}

impl<'a> LineParser<'a, '_> {
    /// Reads all words; `Some` if the line is for the other family.
    fn read(&mut self) -> Result<Option<Span>, Fault> {
        while let Some(word) = self.words.get(self.at) {
            let text = &*word.text;
            self.at += 1;
            if text == "--" {
                if let Some(next) = self.words.get(self.at) {
                    return Err(
                        Fault::new(codes::STRAY_WORD, format!("`{}` follows `--`", next.text)).at(next.span)
                    );
                }
            } else if let Some(long) = text.strip_prefix("--") {
                if let Some(other) = self.long(word, long)? {
                    return Ok(Some(other));
                }
            } else if text.len() > 1 && text.starts_with('-') {
                if let Some(other) = self.short(word)? {
                    return Ok(Some(other));
                }
            } else if text == "!" {
                if self.pending.is_some() {
                    return Err(Fault::new(codes::NEGATION, "`!` twice in a row").at(word.span));
                }
                self.pending = Some(word.span);
            } else {
                return Err(self.stray(word));
            }
        }
        Ok(None)
    }

    fn stray(&self, word: &Word<'_>) -> Fault {
        let fault =
            Fault::new(codes::STRAY_WORD, format!("`{}` belongs to no option", word.text)).at(word.span);
        match &*word.text {
            text if text.starts_with('\'') => fault.hint("only double quotes quote in a restore file"),
            text if text.starts_with('#') => fault.hint("a comment starts at the beginning of its line"),
            "COMMIT" => fault.hint("COMMIT stands alone on its line"),
            _ => fault.hint("an option starts with `-`"),
        }
    }

    fn lookup(&self, name: &str) -> Lookup {
        let base = || {
            BASE.iter()
                .filter(|row| row.1 != 'f' || self.cx.family == Family::V4)
                .map(|&(name, letter, arity)| (name, Found::Base(letter, arity)))
        };
        let loaded = || {
            self.loaded.iter().enumerate().rev().flat_map(|(table, loaded)| {
                loaded.options.iter().map(move |spec| (spec.name, Found::Extension { table, spec }))
            })
        };
        if let Some((_, found)) = base().chain(loaded()).find(|(known, _)| *known == name) {
            return Lookup::Found(found);
        }
        let mut first: Option<Found> = None;
        let mut candidates = Vec::new();
        for (known, found) in base().chain(loaded()).filter(|(known, _)| known.starts_with(name)) {
            if first.is_none_or(|first| !first.same(found)) {
                candidates.push(format!("--{known}"));
            }
            first = first.or(Some(found));
        }
        match first {
            None => Lookup::Unknown,
            Some(found) if candidates.len() == 1 => Lookup::Found(found),
            Some(_) => Lookup::Ambiguous(candidates),
        }
    }

    fn long(&mut self, word: &'a Word<'a>, long: &'a str) -> Result<Option<Span>, Fault> {
        let (name, attached) = match long.find('=') {
            Some(equals) => (&long[..equals], Some(tail(word, equals + 3))),
            None => (long, None),
        };
        let found = match self.lookup(name) {
            Lookup::Found(found) => found,
            missing => match self.load_protocol()? {
                true => match self.lookup(name) {
                    Lookup::Found(found) => found,
                    missing => return Err(self.unknown_option(word, name, missing)),
                },
                false => return Err(self.unknown_option(word, name, missing)),
            },
        };
        match found {
            Found::Base(letter, arity) => {
                if let (Arity::None, Some(extra)) = (arity, attached) {
                    return Err(Fault::new(codes::UNKNOWN_OPTION, format!("`--{name}` takes no argument"))
                        .at(extra.span));
                }
                let value = if arity == Arity::One { Some(self.value(word, attached)?) } else { attached };
                self.attached(word, letter, value, attached.is_some())
            }
            Found::Extension { table, spec } => {
                if let (0, Some(extra)) = (spec.arguments, attached) {
                    return Err(Fault::new(codes::UNKNOWN_OPTION, format!("`--{name}` takes no argument"))
                        .at(extra.span));
                }
                self.extension_option(word, table, spec, attached)?;
                Ok(None)
            }
        }
    }

    fn short(&mut self, word: &'a Word<'a>) -> Result<Option<Span>, Fault> {
        let letters = word.text.char_indices().skip(1);
        for (position, letter) in letters {
            let rest = position + letter.len_utf8();
            let Some(arity) = base_letter(letter) else {
                // As with a long option, an unknown letter makes the protocol's match load, in vain.
                return Err(self.unknown_option(word, &word.text[position..rest], Lookup::Unknown));
            };
            let attached = (arity != Arity::None && rest < word.text.len()).then(|| tail(word, rest));
            let value = if arity == Arity::One { Some(self.value(word, attached)?) } else { attached };
            if let Some(other) = self.attached(word, letter, value, attached.is_some())? {
                return Ok(Some(other));
            }
            if attached.is_some() || arity != Arity::None {
                break;
            }
        }
        Ok(None)
    }

    /// A base option whose value may be attached to it. Of some, iptables takes the whole word for the value, so that
    /// `-s1.1.1.1` asks for a host of this name (iptables/xshared.c, `do_parse` with `argv[optind - 1]`); only strict
    /// reading goes along.
    fn attached(
        &mut self,
        word: &'a Word<'a>,
        letter: char,
        value: Option<Argument<'a>>,
        attached: bool,
    ) -> Result<Option<Span>, Fault> {
        let whole =
            attached && self.cx.mode == Mode::Strict && matches!(letter, 's' | 'd' | 'i' | 'o' | 'p' | 'j');
        if !whole {
            return self.base(word, letter, value);
        }
        self.base(word, letter, Some(argument(word))).map_err(|fault| fault.hint(WHOLE_WORD))
    }

    /// The argument of an option: what is attached to it, or the next word, whatever it is.
    fn value(&mut self, word: &Word<'_>, attached: Option<Argument<'a>>) -> Result<Argument<'a>, Fault> {
        if let Some(attached) = attached {
            return Ok(attached);
        }
        let Some(next) = self.words.get(self.at) else {
            return Err(Fault::new(codes::MISSING_ARGUMENT, format!("`{}` needs an argument", word.text))
                .at(word.span));
        };
        self.at += 1;
        Ok(argument(next))
    }

    /// The next word as an operand of a command, unless it looks like an option or a negation.
    fn operand(&mut self) -> Option<Argument<'a>> {
        let next = self.words.get(self.at).filter(|word| !word.text.starts_with(['-', '!']))?;
        self.at += 1;
        Some(argument(next))
    }

    /// In tolerant mode, `--option ! value` is read as `! --option value`: true if `value` is that `!`.
    fn old_negation(&mut self, option: Span, value: &mut Argument<'a>) -> Result<bool, Fault> {
        let next = self.words.get(self.at);
        if self.cx.mode != Mode::Tolerant || value.text != "!" {
            return Ok(false);
        }
        let Some(next) = next.filter(|next| !next.text.starts_with('-')) else { return Ok(false) };
        if self.pending.is_some() {
            return Err(Fault::new(codes::NEGATION, "negated twice").at(value.span));
        }
        self.at += 1;
        self.cx.shelf.borrow_mut().warnings.push(
            Diagnostic::warning(codes::OLD_NEGATION, "`!` after the option it negates", value.span)
                .with_label(option, "this option")
                .with_note("iptables reads this form no more since 1.8.9; it was deprecated in 1.4.3")
                .with_hint("put the `!` before the option"),
        );
        *value = argument(next);
        Ok(true)
    }

    /// Takes the pending `!`: whether there is one, and the span with it.
    fn negation(&mut self, span: Span) -> (bool, Span) {
        match self.pending.take() {
            Some(bang) => (true, bang.to(span)),
            None => (false, span),
        }
    }

    /// A base option that may be given once.
    fn once(&mut self, word: &Word<'_>, letter: char) -> Result<(), Fault> {
        if self.seen.insert(letter) {
            return Ok(());
        }
        Err(Fault::new(codes::REPEATED_OPTION, format!("`{}` is given twice", base_name(letter)))
            .at(word.span))
    }

    fn not_negated(&self, word: &Word<'_>) -> Result<(), Fault> {
        match self.pending {
            Some(bang) => {
                let message = format!("`{}` can't be negated", word.text);
                Err(Fault::new(codes::NEGATION, message).at(bang.to(word.span)))
            }
            None => Ok(()),
        }
    }

    /// A negatable base option with a value.
    fn negatable(
        &mut self,
        word: &Word<'_>,
        letter: char,
        value: Option<Argument<'a>>,
    ) -> Result<Given<Argument<'a>>, Fault> {
        self.once(word, letter)?;
        let mut value = value.expect("the option takes an argument");
        let old = self.old_negation(word.span, &mut value)?;
        let (negated, span) = self.negation(word.span.to(value.span));
        Ok(Given { value, negated: negated || old, span })
    }

    fn base(
        &mut self,
        word: &'a Word<'a>,
        letter: char,
        value: Option<Argument<'a>>,
    ) -> Result<Option<Span>, Fault> {
        match letter {
            'A' | 'C' | 'D' | 'E' | 'I' | 'N' | 'P' | 'R' | 'F' | 'L' | 'S' | 'X' | 'Z' => {
                self.not_negated(word)?;
                self.command(word, letter, value)?;
            }
            's' => self.source = Some(self.negatable(word, letter, value)?),
            'd' => self.destination = Some(self.negatable(word, letter, value)?),
            'p' => {
                let given = self.negatable(word, letter, value)?;
                let lower = given.value.text.to_ascii_lowercase();
                let number = Argument { text: &lower, ..given.value }.protocol()?;
                if number == 0 && given.negated {
                    return Err(Fault::new(codes::NEGATION, "no packet has a protocol other than `all`")
                        .at(given.span));
                }
                if self.cx.family == Family::V6 && !given.negated && matches!(number, 43 | 44 | 51 | 60) {
                    self.warn(
                        Diagnostic::warning(
                            codes::SUSPICIOUS,
                            format!("`-p {}` matches no packet: it is an extension header", given.value.text),
                            given.span,
                        )
                        .with_hint("use the extension's match instead, such as `-m frag` or `-m ah`"),
                    );
                }
                self.protocol = Some((given.value, given.map(|_| number)));
            }
            'i' | 'o' => {
                let given = self.negatable(word, letter, value)?;
                if given.value.text.is_empty() {
                    return Err(given.value.bad("the device name is empty"));
                }
                let text = self.text(given.value.text);
                let interface = given.value.interface(text)?;
                if interface.pattern.contains(['/', ' ']) {
                    self.warn(Diagnostic::warning(
                        codes::SUSPICIOUS,
                        "`/` and blanks don't occur in device names",
                        given.value.span,
                    ));
                }
                let given = Some(given.map(|_| interface));
                if letter == 'i' {
                    self.line.in_interface = given;
                } else {
                    self.line.out_interface = given;
                }
            }
            'f' => {
                if self.cx.family == Family::V6 {
                    return Err(Fault::new(codes::WRONG_FAMILY, "IPv6 has no `-f`")
                        .at(word.span)
                        .hint("use `-m frag`"));
                }
                self.once(word, letter)?;
                let (negated, span) = self.negation(word.span);
                self.line.fragment = Some(Given { value: (), negated, span });
            }
            'j' | 'g' => {
                if !self.seen.insert('j') {
                    return Err(Fault::new(codes::REPEATED_OPTION, "the rule has two targets").at(word.span));
                }
                self.not_negated(word)?;
                self.jump(word, value.expect("the option takes an argument"), letter == 'g')?;
            }
            'm' => {
                self.not_negated(word)?;
                self.load_match(word, value.expect("the option takes an argument"))?;
            }
            'c' => {
                self.not_negated(word)?;
                self.once(word, letter)?;
                self.set_counters(word, value.expect("the option takes an argument"))?;
            }
            '4' | '6' => {
                self.pending = None;
                let family = if letter == '4' { Family::V4 } else { Family::V6 };
                if family != self.cx.family {
                    return Ok(Some(word.span));
                }
            }
            'n' | 'x' | '0' => {
                let message = format!("`{}` is for listing, not for a restore file", base_name(letter));
                return Err(Fault::new(codes::COMMAND, message).at(word.span));
            }
            'v' => {
                // The first `-v` goes through the check that forbids negation, later ones don't.
                if self.seen.insert('v') {
                    self.not_negated(word)?;
                }
                self.pending = None;
            }
            'M' => self.pending = None,
            't' => {
                return Err(Fault::new(codes::COMMAND, "`-t` can't be used in a restore file")
                    .at(word.span)
                    .hint("the table is the one of the section's `*` line"));
            }
            'w' | 'W' => {
                let message = format!("`-{letter}` can't be used in a restore file");
                return Err(Fault::new(codes::COMMAND, message).at(word.span));
            }
            _ => {
                let message = format!("`{}` would only print a text and end the restore", word.text);
                return Err(Fault::new(codes::COMMAND, message).at(word.span));
            }
        }
        Ok(None)
    }

    /// What `-p` has said so far, and whether it is negated.
    fn protocol(&self) -> Option<(u16, bool)> {
        self.protocol.as_ref().map(|(_, given)| (given.value, given.negated))
    }

    fn text(&self, text: &str) -> Text {
        self.cx.shelf.borrow_mut().text(text)
    }

    fn warn(&self, diagnostic: Diagnostic) {
        self.cx.shelf.borrow_mut().warnings.push(diagnostic);
    }
}
