//! The iptables front end against iptables-legacy itself: what it accepts, and the text it saves.

use std::collections::BTreeMap;

use polc_frontend_iptables::{Mode, ParseOptions, parse, print};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::hook::Family;
use polc_ir::source::SourceMap;
use polc_tests::corpus;

/// Tables by name, each as its lines with policy counters at zero.
fn tables(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut tables = BTreeMap::new();
    let mut current: Vec<String> = Vec::new();
    let mut name = String::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        if let Some(table) = line.strip_prefix('*') {
            name = table.to_string();
        } else if line == "COMMIT" {
            tables.insert(std::mem::take(&mut name), std::mem::take(&mut current));
        } else if line.starts_with(':') {
            let head = line.rsplit_once(" [").map_or(line, |(head, _)| head);
            current.push(format!("{head} [0:0]"));
        } else {
            current.push(line.to_string());
        }
    }
    tables
}

fn read(text: &str, name: &str, mode: Mode, family: Option<Family>) -> (String, Vec<Diagnostic>, SourceMap) {
    let mut sources = SourceMap::new();
    let file = sources.add(name, text);
    let sets = (name == "row").then(Default::default);
    let (dump, diagnostics) =
        parse(&sources, file, &ParseOptions { mode, family, sets: sets.as_ref(), ..ParseOptions::default() });
    (print(&dump, false), diagnostics, sources)
}

fn errors(diagnostics: &[Diagnostic], sources: &SourceMap) -> Vec<String> {
    diagnostics
        .iter()
        .filter(|diagnostic| diagnostic.severity == Severity::Error)
        .map(|diagnostic| {
            let line = diagnostic.span.map_or(0, |span| sources.line_column(span).line);
            format!("line {line}: {}", diagnostic.message)
        })
        .collect()
}

#[test]
fn valid_dumps_print_as_iptables_legacy_saves_them() {
    let mut wrong = Vec::new();
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        let (text, diagnostics, sources) = read(&dump.text(), &dump.name, Mode::Tolerant, None);
        for error in errors(&diagnostics, &sources).iter().take(3) {
            wrong.push(format!("{}: {error}", dump.name));
        }
        if let Some(canonical) = dump.canonical_text() {
            let (ours, theirs) = (tables(&text), tables(&canonical));
            for (name, lines) in &theirs {
                let Some(own) = ours.get(name) else {
                    wrong.push(format!("{}: table {name} is missing", dump.name));
                    continue;
                };
                if let Some((ours, theirs)) = own.iter().zip(lines).find(|(ours, theirs)| ours != theirs) {
                    wrong.push(format!("{}:\n  ours   {ours}\n  theirs {theirs}", dump.name));
                } else if own.len() != lines.len() {
                    wrong.push(format!(
                        "{}: table {name}: {} lines, not {}",
                        dump.name,
                        own.len(),
                        lines.len()
                    ));
                }
            }
        }
        let (again, ..) = read(
            &text,
            &dump.name,
            Mode::Strict,
            Some(if dump.name.contains(".v6.") { Family::V6 } else { Family::V4 }),
        );
        if again != text {
            wrong.push(format!("{}: printing twice differs", dump.name));
        }
    }
    assert!(wrong.is_empty(), "{} findings:\n{}", wrong.len(), wrong.join("\n"));
}

/// The dumps that iptables-legacy-restore 1.8.9 rejects, the line at fault, and what our first finding says of it.
///
/// The line is the one of the tool's own "Error occurred at line", with one exception: what only the kernel refuses,
/// when the table is committed, the tool reports as `line 11 failed`, where the COMMIT is; the rule at fault is on 10.
const REJECTED: &[(&str, u32, &str)] = &[
    ("academic__parser-test.v4", 12, "`--something-else`"),
    ("academic__tum-2014-07-25.v4", 1443, "`XX:XX:XX:XX:XX:XX` is not an Ethernet address"),
    ("cloud__oracle-cloud-truncated.v4", 25, "`$` is neither a chain of this table nor a known target"),
    ("fail2ban__id774-fail2ban.v4", 58, "`99999` is not a port"),
    ("host__8none1-multipath.v4", 34, "`voip.canonical.com` not found"),
    ("host__fediuk.v4", 19, "COMMIT has no newline"),
    ("host__jvehent.v4", 61, "`ntp.example.net` not found"),
    ("host__kabaos.v4", 16, "`$I2PD_ID` is not a number"),
    ("host__linux-gda-pl.v4", 6, "unknown option `--days`"),
    ("host__qwivan-ipset.v4", 27, "`x.x.x.x` not found"),
    ("host__tor-router.v6", 40, "`127.0.0.1` is not an IPv6 address"),
    (
        "k8s__antrea-route-c.v4",
        35,
        "`AWS-CONNMARK-CHAIN-0` is neither a chain of this table nor a known target",
    ),
    (
        "ufw__securetux-before.v4",
        30,
        "`ufw-logging-deny` is neither a chain of this table nor a known target",
    ),
    (
        "ufw__securetux-before6.v6",
        39,
        "`ufw6-logging-deny` is neither a chain of this table nor a known target",
    ),
    ("upstream__batfish-unsupported-opts.v4", 10, "`tcp` works only with `-p tcp`"),
];

#[test]
fn dumps_that_iptables_rejects_are_rejected_at_the_line_at_fault() {
    let rejected: Vec<_> = corpus::all().into_iter().filter(|dump| !dump.valid).collect();
    let mut wrong = Vec::new();
    for dump in &rejected {
        let (_, diagnostics, sources) = read(&dump.text(), &dump.name, Mode::Strict, None);
        let expected = REJECTED.iter().find(|(name, ..)| dump.name.strip_suffix(".rules") == Some(name));
        let Some((_, line, words)) = expected else {
            wrong.push(format!("{}: no expectation", dump.name));
            continue;
        };
        match errors(&diagnostics, &sources).first() {
            Some(error) if error.starts_with(&format!("line {line}: ")) && error.contains(words) => {}
            first => wrong.push(format!("{}: {first:?}, not `{words}` on line {line}", dump.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(rejected.is_empty() || rejected.len() == REJECTED.len(), "{} dumps", rejected.len());
}

#[test]
fn extension_rows_save_as_iptables_legacy_saves_them() {
    let Some(shared) = corpus::shared() else {
        eprintln!("skipped extension_rows_save_as_iptables_legacy_saves_them: no shared corpus");
        return;
    };
    let rows = corpus::read(&shared.join("corpus/iptables-ext.tsv"));
    let (mut wrong, mut count) = (Vec::new(), 0);
    for row in rows.lines().skip(1) {
        let columns: Vec<&str> = row.split('\t').collect();
        let [extension, file, number, family, table, chains, args, ..] = columns[..] else { continue };
        let (here, saved) = (columns[11], columns.get(13).copied().unwrap_or(""));
        // Which accounting objects exist is the machine's matter.
        if !matches!(here, "OK" | "FAIL") || extension == "nfacct" {
            continue;
        }
        count += 1;
        let chain = chains.split(',').next().unwrap_or("INPUT");
        let family = if family == "v6" { Family::V6 } else { Family::V4 };
        let text = format!("*{table}\n-A {chain} {args}\nCOMMIT\n");
        let (printed, diagnostics, sources) = read(&text, "row", Mode::Strict, Some(family));
        let errors = errors(&diagnostics, &sources);
        let ours =
            printed.lines().find_map(|line| line.strip_prefix(&format!("-A {chain}"))).unwrap_or("").trim();
        match here {
            "FAIL" if errors.is_empty() => {
                wrong.push(format!("{extension} {file}:{number}: accepted `{args}`"))
            }
            "OK" if !errors.is_empty() => {
                wrong.push(format!("{extension} {file}:{number}: `{args}`: {}", errors[0]))
            }
            "OK" if ours != saved.trim() => {
                wrong.push(format!(
                    "{extension} {file}:{number}: `{args}`\n  ours   {ours}\n  theirs {saved}"
                ));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{} of {count} rows:\n{}", wrong.len(), wrong.join("\n"));
}
