//! The front end's tables of rows and texts, against iptables itself: each is loaded, and saved or refused as it says.
//! Extensions that this kernel lacks are only read.

use std::process::Command;

use polc_tests::kernel::{Namespace, feed, has_tools, may_run};

use polc_ir::hook::TableKind;

const ROWS: &str = include_str!("../../frontend-iptables/tests/rows.tsv");
const TEXTS: &str = include_str!("../../frontend-iptables/tests/texts.tsv");

/// A row: the family's tools, the table, the chain, the rule's options, and the text that is saved, or none.
type Row = (&'static str, &'static str, &'static str, &'static str, Option<&'static str>);

fn rows() -> Vec<Row> {
    let rows = ROWS.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let columns: Vec<&str> = line.split('\t').collect();
        let [family, table, chain, options, saved] = columns[..] else { panic!("{line}: not five columns") };
        let tool = if family == "6" { "ip6tables-legacy" } else { "iptables-legacy" };
        (tool, table, chain, options, (saved != "refused").then_some(saved))
    });
    rows.collect()
}

/// Loads a table; whether it was taken.
fn restore(tool: &str, table: &str, lines: &str) -> bool {
    restore_text(tool, &format!("*{table}\n:user - [0:0]\n{lines}COMMIT\n"))
}

fn restore_text(tool: &str, text: &str) -> bool {
    feed(&format!("{tool}-restore"), &[], text).0
}

/// Extensions that many kernels lack: one was taken out of Linux 6.3, the others ask for more than a packet filter.
const RARE: [&str; 3] = ["-j CLUSTERIP", "-j LED", "-m ipvs"];

/// Whether the kernel lacks a row's extension, so that only what the tool reads can be seen; then whether that is so.
fn read_alone(row: &Row) -> Option<bool> {
    if !RARE.iter().any(|rare| row.3.contains(rare)) {
        return None;
    }
    let (tool, table) = (row.0, row.1);
    let text = format!("*{table}\n:user - [0:0]\n{}COMMIT\n", line(row));
    let (taken, said) = feed(&format!("{tool}-restore"), &["--test"], &text);
    said.contains("missing kernel module").then_some(taken)
}

fn saved(tool: &str, table: &str) -> Vec<String> {
    let output =
        Command::new(format!("{tool}-save")).args(["-t", table]).output().expect("the tool runs").stdout;
    let text = String::from_utf8_lossy(&output);
    text.lines().filter(|line| line.starts_with("-A")).map(String::from).collect()
}

#[test]
fn rows_are_what_iptables_makes_of_them() {
    let name = "rows_are_what_iptables_makes_of_them";
    if !may_run(name) || !has_tools(name, &["iptables-legacy-restore", "ip6tables-legacy-restore", "ip"]) {
        return;
    }
    let _namespace = Namespace::enter("rows");
    let (rows, mut wrong) = (rows(), Vec::new());
    let mut whole = Vec::new();
    for row in &rows {
        match read_alone(row) {
            None => whole.push(row),
            Some(taken) if taken == row.4.is_some() => {}
            Some(_) => wrong.push(format!("{} reads `{}` otherwise", row.0, row.3)),
        }
    }
    for tool in ["iptables-legacy", "ip6tables-legacy"] {
        for table in ["raw", "mangle", "nat", "filter", "security"] {
            let here = whole.iter().copied().filter(|row| row.0 == tool && row.1 == table);
            let (taken, refused): (Vec<&Row>, Vec<&Row>) = here.partition(|row| row.4.is_some());
            // A rule that decides for every packet would end its chain: the kernel looks no further.
            for options in refused.iter().filter(|row| restore(tool, table, &line(row))).map(|row| row.3) {
                wrong.push(format!("{tool} takes `{options}` in {table}"));
            }
            let lines: String = taken.iter().map(|row| line(row)).collect();
            if !restore(tool, table, &lines) {
                let alone = taken.iter().filter(|row| !restore(tool, table, &line(row)));
                wrong.extend(alone.map(|row| format!("{tool} refuses `{}` in {table}", row.3)));
                continue;
            }
            let saved = saved(tool, table);
            assert_eq!(saved.len(), taken.len(), "{tool} {table}: one rule from each row");
            let expected = |row: &Row| format!("-A {} {}", row.2, row.4.unwrap_or("")).trim_end().to_string();
            let in_order = |chain: &str| {
                let rows = taken.iter().filter(|row| row.2 == chain);
                rows.map(|row| expected(row)).collect::<Vec<_>>()
            };
            for chain in ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "user"] {
                let own = saved.iter().filter(|line| line.split(' ').nth(1) == Some(chain));
                for (saved, expected) in own.zip(in_order(chain)) {
                    if saved.trim_end() != expected {
                        wrong.push(format!("{tool} {table}: saved {saved}\n  not {expected}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
}

fn line(row: &Row) -> String {
    format!("-A {} {}\n", row.2, row.3)
}

#[test]
fn texts_are_what_iptables_makes_of_them() {
    let name = "texts_are_what_iptables_makes_of_them";
    let tools = ["iptables-legacy-restore", "ip6tables-legacy-restore", "iptables-nft-restore", "ip"];
    if !may_run(name) || !has_tools(name, &tools) {
        return;
    }
    let _namespace = Namespace::enter("texts");
    let mut wrong = Vec::new();
    for row in TEXTS.lines().filter(|line| !line.starts_with('#')) {
        let columns: Vec<&str> = row.split('\t').collect();
        let [tool, table, text, expected] = columns[..] else { panic!("{row}: not four columns") };
        let tool = match tool {
            "legacy4" => "iptables-legacy",
            "legacy6" => "ip6tables-legacy",
            "nft4" => "iptables-nft",
            other => panic!("{other} is no tool"),
        };
        let kind: TableKind = table.parse().expect("a table");
        let accepting = kind.hooks().iter().map(|hook| format!(":{} ACCEPT [0:0]\n", hook.chain_name()));
        let empty = format!("*{table}\n{}COMMIT\n", accepting.collect::<String>());
        assert!(restore_text(tool, &empty), "{tool} empties {table}");
        let text = text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t");
        let theirs = match restore_text(tool, &text) {
            true => left(tool, table),
            false => "refused".into(),
        };
        if theirs != expected {
            wrong.push(format!("{tool}: {text:?}\n  theirs   {theirs}\n  expected {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{} texts:\n{}", wrong.len(), wrong.join("\n"));
}

/// What is saved of a table, without counters and accepting policies.
fn left(tool: &str, table: &str) -> String {
    let output =
        Command::new(format!("{tool}-save")).args(["-t", table]).output().expect("the tool runs").stdout;
    let text = String::from_utf8_lossy(&output);
    let lines = text.lines().filter(|line| !line.starts_with(['#', '*']) && !matches!(*line, "" | "COMMIT"));
    let lines = lines.map(|line| line.strip_suffix(" [0:0]").unwrap_or(line));
    let lines = lines.filter(|line| !(line.starts_with(':') && line.ends_with(" ACCEPT")));
    lines.collect::<Vec<_>>().join("\\n")
}
