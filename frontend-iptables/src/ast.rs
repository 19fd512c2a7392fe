//! The typed syntax tree of an iptables-save dump.
//!
//! It holds what the text says, resolved as far as the text alone allows: names are numbers, chains are indices,
//! option values are typed, and every clause keeps the span it was read from, so that diagnostics, `explain` and
//! lowering can point at the user's own words. It does not hold netfilter's meaning; lowering adds that.
//!
//! What the rules of one line share is shared, so that a rule costs a few hundred bytes even in dumps of tens of
//! thousands of rules.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use polc_ir::hook::{Family, Hook, Semantics, TableKind};
use polc_ir::source::{File, Span};

use crate::extension::Options;
use crate::value::{AddressMask, Interface};

/// A shared, immutable text. Cloning it does not copy the characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text(Arc<str>);

impl Text {
    /// The characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn shared(&self) -> Arc<str> {
        self.0.clone()
    }
}

impl From<Arc<str>> for Text {
    fn from(text: Arc<str>) -> Text {
        Text(text)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Text {
        Text(text.into())
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// A value the user gave, whether it was negated, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given<T> {
    /// The value.
    pub value: T,
    /// Whether `!` stood before the option.
    pub negated: bool,
    /// From the `!` or the option's name to the end of its last argument.
    pub span: Span,
}

impl<T> Given<T> {
    /// The same clause with another value.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Given<U> {
        Given { value: f(self.value), negated: self.negated, span: self.span }
    }
}

/// What wrote a dump, as far as its header tells; the default of `--semantics` follows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Generator {
    /// iptables-legacy-save, or any iptables-save from before there was another.
    Legacy,
    /// iptables-nft-save.
    Nft,
    /// No header, or another program's.
    #[default]
    Unknown,
}

impl Generator {
    /// Whose corner cases hold if nobody says.
    pub fn semantics(self) -> Semantics {
        match self {
            Generator::Nft => Semantics::Nft,
            Generator::Legacy | Generator::Unknown => Semantics::Legacy,
        }
    }
}

/// A whole dump.
#[derive(Clone, Debug, PartialEq)]
pub struct Dump {
    /// The source it was read from.
    pub file: File,
    /// IPv4 or IPv6.
    pub family: Family,
    /// What wrote it.
    pub generator: Generator,
    /// The tables, in file order. Each kind occurs once.
    pub tables: Vec<TableAst>,
    /// Sections that a later section for the same table replaces, in file order: iptables-restore loads them, then
    /// flushes their rules and user chains. Policies that stay are the later section's, too.
    pub replaced: Vec<TableAst>,
    /// Every line that asks for a rule (`-A` or `-I`, however it is spelled), read or not.
    pub rule_lines: Vec<Span>,
    /// Those of them that `-4` or `-6` makes lines of the other address family.
    pub other_family: Vec<Span>,
}

/// Packet and byte counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counters {
    /// Packets.
    pub packets: u64,
    /// Bytes, from the IP header on.
    pub bytes: u64,
}

/// One table's section, from `*NAME` to `COMMIT`.
#[derive(Clone, Debug, PartialEq)]
pub struct TableAst {
    /// Which table.
    pub kind: TableKind,
    /// The `*NAME` line.
    pub span: Span,
    /// The base chains in hook order, whether declared or not, then the user chains in the order of their declaration.
    pub chains: Vec<ChainAst>,
    /// The rules in source order. A line with address lists makes several. [`ChainAst::rules`] has the order in which
    /// they are tried.
    pub rules: Vec<RuleAst>,
    /// The rule lines (`-A`, `-I`) that were not accepted, each with a diagnostic; no rule of theirs is in a chain.
    pub rejected: Vec<Span>,
}

impl TableAst {
    /// The chain of this name.
    pub fn chain(&self, name: &str) -> Option<ChainIndex> {
        let found = self.chains.iter().position(|chain| !chain.deleted && &*chain.name == name)?;
        Some(ChainIndex(found as u32))
    }

    /// The rules of a chain, in the order they are tried.
    pub fn rules_of(&self, chain: ChainIndex) -> impl Iterator<Item = &RuleAst> {
        self.chains[chain.0 as usize].rules.iter().map(|&rule| &self.rules[rule as usize])
    }
}

/// A chain of one table: an index into [`TableAst::chains`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainIndex(pub u32);

/// What a base chain does with packets that no rule decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Let the packet pass; what an undeclared base chain does.
    #[default]
    Accept,
    /// Drop the packet.
    Drop,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Accept => "ACCEPT",
            Policy::Drop => "DROP",
        })
    }
}

/// A chain.
#[derive(Clone, Debug, PartialEq)]
pub struct ChainAst {
    /// Its name.
    pub name: Text,
    /// The name in its declaration; the table's line for a base chain that is not declared.
    pub span: Span,
    /// The hook of a base chain; `None` for a user chain.
    pub hook: Option<Hook>,
    /// The policy. User chains have none that matters.
    pub policy: Policy,
    /// The counters of the declaration, if there are any.
    pub counters: Option<Counters>,
    /// The chain's rules, as indices into [`TableAst::rules`], in the order they are tried.
    pub rules: Vec<u32>,
    /// Whether `-X` removed the chain again.
    pub deleted: bool,
}

/// A rule. A line whose `-s` or `-d` lists several addresses makes one rule for each pair of them.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleAst {
    /// The whole line, without blanks around it.
    pub span: Span,
    /// Which of the line's rules this is, from 0.
    pub copy: u32,
    /// The chain the rule is in.
    pub chain: ChainIndex,
    /// The counters before the rule or after `-c`.
    pub counters: Option<Counters>,
    /// `-s`; boxed, as many rules have none.
    pub source: Option<Box<Given<AddressMask>>>,
    /// `-d`.
    pub destination: Option<Box<Given<AddressMask>>>,
    /// `-i`.
    pub in_interface: Option<Given<Interface>>,
    /// `-o`.
    pub out_interface: Option<Given<Interface>>,
    /// `-p`: the protocol number. 0 means any. Numbers above 255 come from names (`mptcp`) and match nothing.
    pub protocol: Option<Given<u16>>,
    /// `-f`: second and further fragments of IPv4 packets.
    pub fragment: Option<Given<()>>,
    /// The matches in the order they are tested; shared by the rules of one line.
    pub matches: Arc<[MatchAst]>,
    /// The target.
    pub target: TargetAst,
}

/// A match extension with its options.
#[derive(Clone, Debug, PartialEq)]
pub struct MatchAst {
    /// From `-m` to the end of the extension's last option. For a match that `-p` loaded, its options alone.
    pub span: Span,
    /// Which match, with its options.
    pub options: Options,
}

/// A rule's target.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetAst {
    /// From `-j` or `-g` to the end of the target's last option; the rule's end if there is no target.
    pub span: Span,
    /// What to do.
    pub verdict: TargetVerdict,
}

/// What a rule does with the packets it matches.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetVerdict {
    /// No `-j`: count the packet and go on.
    Continue,
    /// `-j ACCEPT`.
    Accept,
    /// `-j DROP`.
    Drop,
    /// `-j QUEUE`: hand the packet to userspace, queue 0.
    Queue,
    /// `-j RETURN`.
    Return,
    /// `-j CHAIN`.
    Jump(ChainIndex),
    /// `-g CHAIN`: like a jump, but a RETURN there returns past this chain.
    Goto(ChainIndex),
    /// A target extension; shared by the rules of one line.
    Extension(Arc<Options>),
}
