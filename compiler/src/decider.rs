//! Who decided a packet, in the user's terms: table, chain, number in the chain, line.

use std::path::Path;

use polc_backend_ebpf::emit::RuleLine;
use polc_ir::entities::{Chain, Rule};
use polc_ir::outcome::{Decider, Ending};
use serde::Serialize;

use crate::guard::{self, GUARD_NUMBER};
use crate::session::Session;

/// The rule or policy that decided. A policy has no number, and the line that declares its chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Named {
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's number in its chain, from 1, as `iptables -L --line-numbers` shows it; `None` for a policy.
    pub number: Option<u32>,
    /// The source line, from 1.
    pub line: u32,
}

/// The rule or policy behind a decider; `None` for frames that reach no rule, and where there is no rule.
pub fn named(session: &Session, by: Decider) -> Option<Named> {
    match by {
        Decider::Rule(rule) | Decider::Hotdrop(rule) => Some(named_rule(session, rule)),
        Decider::Policy(chain) => {
            let data = &session.ruleset.chains[chain];
            let (table, name) = chain_name(session, chain);
            let line = session.sources.file(data.span.file).line(data.span.start);
            Some(Named { table, chain: name, number: None, line })
        }
        Decider::Frame(_) | Decider::Nothing => None,
    }
}

/// A rule.
pub fn named_rule(session: &Session, rule: Rule) -> Named {
    let data = &session.ruleset.rules[rule];
    let (table, chain) = chain_name(session, data.chain);
    Named { table, chain, number: Some(data.number), line: session.line_of(rule) }
}

/// The names of a chain's table and of the chain.
pub fn chain_name(session: &Session, chain: Chain) -> (String, String) {
    let data = &session.ruleset.chains[chain];
    (session.ruleset.tables[data.table].kind.to_string(), data.name.clone())
}

/// A rule's place and text, as line information and the manifest hold them.
pub fn rule_line(session: &Session, rule: Rule) -> RuleLine {
    let data = &session.ruleset.rules[rule];
    let file = session.sources.file(data.span.file);
    let named = named_rule(session, rule);
    let text = match data.number {
        GUARD_NUMBER => guard::what(data),
        _ => file.line_text(named.line).trim(),
    };
    RuleLine {
        file: object_name(file.name()),
        line: named.line,
        text: text.to_string(),
        table: named.table,
        chain: named.chain,
        number: data.number,
    }
}

/// The name of a file in objects: as it was given, or its last part where that begins at the root. Where a file lies on
/// the machine that compiles is nobody's business, and would make other bytes of the same rules.
fn object_name(name: &str) -> String {
    let path = Path::new(name);
    let last = path.file_name().filter(|_| path.is_absolute());
    last.map_or_else(|| name.to_string(), |last| last.to_string_lossy().into_owned())
}

/// A verdict and who gave it, for people: ``drop by filter INPUT rule 3, line 12: `-A INPUT -j DROP` ``.
pub fn describe(session: &Session, ending: Ending) -> String {
    let how = match ending.by {
        Decider::Hotdrop(_) => " (a match that drops what it can't read)",
        _ => "",
    };
    match named(session, ending.by) {
        Some(Named { table, chain, number: Some(number), line }) => {
            let text = session.sources.file(session.rules_file).line_text(line).trim();
            format!("{} by {table} {chain} rule {number}{how}, line {line}: `{text}`", ending.verdict)
        }
        Some(Named { table, chain, number: None, .. }) => {
            format!("{} by the policy of {table} {chain}", ending.verdict)
        }
        None => format!("{}: {}", ending.verdict, ending.by),
    }
}
