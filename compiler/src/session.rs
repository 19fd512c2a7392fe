//! A rule set being worked on: its text, its syntax tree, its meaning, and what there is to say about it so far.
//!
//! Every command starts here, so that all of them read the same text in the same way. Nothing here does I/O: texts come
//! in, already in the [`SourceMap`].

use std::collections::BTreeMap;

use polc_frontend_iptables::ast::Dump;
use polc_frontend_iptables::ipset::{self, Sets};
use polc_frontend_iptables::{Mode, ParseOptions, SetFamilies, lower, parse};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::entities::Rule;
use polc_ir::hook::{Family, Semantics};
use polc_ir::ruleset::Ruleset;
use polc_ir::source::{File, SourceMap};

/// How a rule set is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOptions {
    /// Read as iptables-legacy-restore does, without tolerance, and without sets other than those given.
    pub strict: bool,
    /// The address family; `None` to work it out from the save tool's header, the file's name and the addresses.
    pub family: Option<Family>,
    /// Whose corner cases hold; `None` to follow the save tool's header, and legacy without one.
    pub semantics: Option<Semantics>,
}

/// A rule set that was read.
#[derive(Clone, Debug)]
pub struct Session {
    /// All texts.
    pub sources: SourceMap,
    /// Which of them holds the rules.
    pub rules_file: File,
    /// Which of them hold the sets.
    pub set_files: Vec<File>,
    /// The syntax tree.
    pub dump: Dump,
    /// The meaning. Rules that were not accepted are not in it.
    pub ruleset: Ruleset,
    /// Findings of reading, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
}

impl Session {
    /// Reads the rules in `rules` and the sets in `set_files`.
    pub fn read(sources: SourceMap, rules: File, set_files: &[File], options: &ReadOptions) -> Session {
        let mode = if options.strict { Mode::Strict } else { Mode::Tolerant };
        let (sets, findings): (Vec<Sets>, Vec<Vec<Diagnostic>>) =
            set_files.iter().map(|file| ipset::parse(&sources, *file)).unzip();
        let mut diagnostics: Vec<Diagnostic> = findings.into_iter().flatten().collect();
        let families: SetFamilies =
            sets.iter().flat_map(Sets::iter).map(|set| (set.name.clone(), set.family)).collect();
        let known = options.strict || !sets.is_empty();
        let parse_options = ParseOptions {
            mode,
            family: options.family,
            semantics: options.semantics,
            sets: known.then_some(&families),
        };
        let (dump, findings) = parse(&sources, rules, &parse_options);
        diagnostics.extend(findings);
        let semantics = options.semantics.unwrap_or(dump.generator.semantics());
        let ruleset = lower(&dump, &sets, semantics);
        let set_files = set_files.to_vec();
        Session { sources, rules_file: rules, set_files, dump, ruleset, diagnostics }
    }

    /// The address family that the rules were read for.
    pub fn family(&self) -> Family {
        self.dump.family
    }

    /// Whether any finding so far is an error.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// Number of the source line of a rule, from 1.
    pub fn line_of(&self, rule: Rule) -> u32 {
        let span = self.ruleset.rules[rule].span;
        self.sources.file(span.file).line(span.start)
    }

    /// The rules of each source line that has any.
    pub fn rules_by_line(&self) -> BTreeMap<u32, Vec<Rule>> {
        let mut by_line: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
        for rule in self.ruleset.rules.keys() {
            by_line.entry(self.line_of(rule)).or_default().push(rule);
        }
        by_line
    }
}
