//! Whole texts, read as iptables-restore 1.8.9 reads them: what is left of the table, or that they are refused.
//!
//! That the table of texts says what iptables does is for the test `iptables_rows` of the whole to show.

use polc_frontend_iptables::{Mode, ParseOptions, parse, print};
use polc_ir::diag::Severity;
use polc_ir::hook::{Family, Semantics};
use polc_ir::source::SourceMap;

/// The table's lines of what is saved, without counters and accepting policies, joined by `\n`.
fn left(printed: &str, table: &str) -> String {
    let start = format!("*{table}\n");
    let section = printed.split_inclusive("COMMIT\n").find_map(|section| section.strip_prefix(&start));
    let lines = section.unwrap_or("").lines().filter(|line| !matches!(*line, "" | "COMMIT"));
    let lines = lines.map(|line| line.strip_suffix(" [0:0]").unwrap_or(line));
    let lines = lines.filter(|line| !(line.starts_with(':') && line.ends_with(" ACCEPT")));
    lines.collect::<Vec<_>>().join("\\n")
}

#[test]
fn texts_leave_what_iptables_leaves() {
    let mut wrong = Vec::new();
    for row in include_str!("texts.tsv").lines().filter(|line| !line.starts_with('#')) {
        let columns: Vec<&str> = row.split('\t').collect();
        let [tool, table, text, expected] = columns[..] else { panic!("{row}: not four columns") };
        let (mode, semantics) = match tool.starts_with("nft") {
            true => (Mode::Tolerant, Semantics::Nft),
            false => (Mode::Strict, Semantics::Legacy),
        };
        let family = if tool.ends_with('6') { Family::V6 } else { Family::V4 };
        let options = ParseOptions { mode, family: Some(family), semantics: Some(semantics), sets: None };
        let mut sources = SourceMap::new();
        let file = sources.add("text", text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t"));
        let (dump, findings) = parse(&sources, file, &options);
        let error = findings.iter().find(|finding| finding.severity == Severity::Error);
        let ours = if error.is_some() { "refused".into() } else { left(&print(&dump, false), table) };
        if ours != expected {
            let why = error.map_or("", |error| &error.message);
            wrong.push(format!("{text}\n  ours   {ours} {why}\n  theirs {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{} texts:\n{}", wrong.len(), wrong.join("\n"));
}
