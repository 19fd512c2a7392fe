//! The part of a rule set that programs decide without a kernel behind them: its stateless filter table.
//!
//! What is left out is left out of the *text*, so that iptables and polc are given the same one: other tables than
//! `filter`, and the lines that replace mode does not compile at an attach point (connection state, limits, logs).
//! `REJECT` stands as `DROP`: the answer is not what is compared. Lines keep their numbers.

use polc::place::place;
use polc::report::{Report, Scope, Status};
use polc::session::{ReadOptions, Session};
use polc_ir::env::{Attach, Mode, Place};
use polc_ir::hook::{Hook, Semantics};
use polc_ir::ruleset::ClauseKind;
use polc_ir::source::SourceMap;

/// How often lines are taken out: taking one out may show the next.
const ROUNDS_MAX: usize = 4;

/// A rule set of which replace mode compiles every line.
#[derive(Clone, Debug)]
pub struct Stateless {
    /// The rule set.
    pub session: Session,
    /// Its text.
    pub text: String,
    /// Lines that were taken out or changed.
    pub lines_changed: usize,
}

/// What `polc apply --mode replace` compiles for packets that arrive.
pub fn arriving(attach: Attach) -> Place {
    place(&[Hook::Prerouting, Hook::Input, Hook::Forward], attach, Mode::Replace, true)
}

/// The stateless filter table of a rule set.
///
/// # Errors
/// Why there is none: the text can't be read, or has no rules then.
pub fn stateless(
    name: &str,
    text: &str,
    sets: &[String],
    semantics: Semantics,
    attach: Attach,
) -> Result<Stateless, String> {
    let mut lines: Vec<String> = filter_table(text);
    let mut lines_changed = 0;
    for line in &mut lines {
        // The target ends the line.
        if let Some(at) = line.find(" -j REJECT") {
            line.replace_range(at.., " -j DROP");
            lines_changed += 1;
        }
    }
    for _ in 0..ROUNDS_MAX {
        let text = lines.join("\n") + "\n";
        let session = read(name, &text, sets, semantics);
        if session.has_errors() {
            return Err(format!("not read: {}", session.diagnostics[0].message));
        }
        let unfit = unfit(&session, attach);
        if unfit.is_empty() {
            if !session.ruleset.rules.keys().any(|_| true) {
                return Err("no rule is left".to_string());
            }
            return Ok(Stateless { session, text, lines_changed });
        }
        for line in unfit {
            lines[line as usize - 1].clear();
            lines_changed += 1;
        }
    }
    Err(format!("lines are still not compiled after {ROUNDS_MAX} rounds"))
}

/// The lines of the filter table; all others are empty.
fn filter_table(text: &str) -> Vec<String> {
    let mut inside = false;
    let keep = |line: &str| {
        if let Some(table) = line.trim_start().strip_prefix('*') {
            inside = table.trim() == "filter";
        }
        let kept = if inside { line.to_string() } else { String::new() };
        inside &= line.trim() != "COMMIT";
        kept
    };
    text.lines().map(keep).collect()
}

fn read(name: &str, text: &str, sets: &[String], semantics: Semantics) -> Session {
    let mut sources = SourceMap::new();
    let rules = sources.add(name, text);
    let files: Vec<_> = sets.iter().map(|text| sources.add("sets", text.as_str())).collect();
    Session::read(
        sources,
        rules,
        &files,
        &ReadOptions { semantics: Some(semantics), ..ReadOptions::default() },
    )
}

/// Numbers of the lines that replace mode does not compile for packets that arrive, or whose outcome depends on packets before or on chance.
fn unfit(session: &Session, attach: Attach) -> Vec<u32> {
    let report = Report::new(session, Scope::At(&arriving(attach)));
    let by_line = session.rules_by_line();
    let stateful = |line: &u32| {
        let rules = by_line.get(line).into_iter().flatten();
        let mut clauses = rules.flat_map(|rule| &session.ruleset.rules[*rule].clauses);
        clauses.any(|clause| matches!(clause.kind, ClauseKind::Effect(_)))
    };
    let unfit = report.lines.iter().filter(|(line, status)| match status {
        // What no arriving packet comes to may still make the kernel track connections.
        Status::Deferred { .. } | Status::Rejected | Status::Elsewhere => true,
        Status::Compiled => stateful(line),
        Status::OtherFamily => false,
    });
    unfit.map(|(line, _)| *line).collect()
}
