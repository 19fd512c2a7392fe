//! Rows of options, each read strictly and printed as iptables-legacy 1.8.9 saves it, or refused where it refuses it.
//!
//! That the table says what iptables does is for the test `iptables_rows` of the whole to show.

use polc_frontend_iptables::{Mode, ParseOptions, parse, print};
use polc_ir::diag::Severity;
use polc_ir::hook::Family;
use polc_ir::source::SourceMap;

#[test]
fn rows_are_read_and_printed_as_iptables_does() {
    let rows = include_str!("rows.tsv").lines().filter(|line| !line.starts_with('#'));
    let (mut wrong, mut count) = (Vec::new(), 0);
    for row in rows {
        count += 1;
        let columns: Vec<&str> = row.split('\t').collect();
        let [family, table, chain, options, expected] = columns[..] else {
            panic!("{row}: not five columns")
        };
        let family = if family == "6" { Family::V6 } else { Family::V4 };
        let mut sources = SourceMap::new();
        let text = format!("*{table}\n:user - [0:0]\n-A {chain} {options}\nCOMMIT\n");
        let file = sources.add("row", text);
        let parse_options =
            ParseOptions { mode: Mode::Strict, family: Some(family), ..ParseOptions::default() };
        let (dump, findings) = parse(&sources, file, &parse_options);
        let error = findings.iter().find(|finding| finding.severity == Severity::Error);
        let printed = print(&dump, false);
        let rule = printed.lines().find_map(|line| line.strip_prefix(&format!("-A {chain}")));
        let ours = match (error, rule) {
            (Some(_), _) => "refused",
            (None, Some(rule)) => rule.trim(),
            (None, None) => "nothing",
        };
        if ours != expected {
            let why = error.map_or("", |error| &error.message);
            wrong.push(format!("{options}\n  ours   {ours} {why}\n  theirs {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {count} rows:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count > 500, "{count} rows");
}
