//! Every rule line of every dump is accounted for, and what needs no state is compiled.

use polc::report::{Report, Scope, Status};
use polc::session::{ReadOptions, Session};
use polc_ir::env::{Connections, Mode};
use polc_ir::source::SourceMap;
use polc_tests::corpus::{self, Dump};

/// Matches that ask for nothing but the packet, its devices, its mark and tables. Not `mac`: rules in FORWARD
/// are judged where packets leave, and the addresses they came with are gone by then.
const STATELESS_MATCHES: &[&str] = &[
    "ah",
    "comment",
    "dccp",
    "dscp",
    "dst",
    "ecn",
    "eui64",
    "frag",
    "hbh",
    "hl",
    "icmp",
    "icmp6",
    "iprange",
    "length",
    "mark",
    "mh",
    "multiport",
    "pkttype",
    "rt",
    "sctp",
    "tcp",
    "tos",
    "ttl",
    "u32",
    "udp",
    "udplite",
];

/// Targets that end in a verdict which a program gives. REJECT is not among them: the kernel answers.
const VERDICTS: &[&str] = &["ACCEPT", "DROP", "RETURN"];

fn read(dump: &Dump) -> Session {
    let mut sources = SourceMap::new();
    let file = sources.add(dump.name.as_str(), dump.text());
    let sets: Vec<_> = dump.ipset_text().map(|text| sources.add("sets", text)).into_iter().collect();
    Session::read(sources, file, &sets, &ReadOptions::default())
}

fn report(session: &Session) -> Report {
    let (mode, connections) = (Mode::Accelerate, Connections::Unknown);
    Report::new(session, Scope::Everywhere { mode, local_addresses: true, connections })
}

/// The word of a line that asks for a rule and those after it; `None` for other lines.
fn rule_words(line: &str) -> Option<Vec<&str>> {
    let line = line.trim_start();
    let line = if line.starts_with('[') { line.split_once(']')?.1 } else { line };
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    matches!(words.first(), Some(&("-A" | "-I"))).then_some(words)
}

#[test]
fn compiled_deferred_and_rejected_add_up_to_the_rule_lines() {
    let mut wrong = Vec::new();
    for dump in corpus::all() {
        let lines = dump.text().lines().filter(|line| rule_words(line).is_some()).count();
        let report = report(&read(&dump));
        let (compiled, deferred, rejected) = (report.compiled(), report.deferred(), report.rejected());
        if compiled + deferred + rejected != lines || (dump.valid && rejected > 0) {
            wrong.push(format!("{}: {compiled} + {deferred} + {rejected} of {lines}", dump.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Judged by the words of the line alone, so that what the compiler thinks of them has no say.
#[test]
fn rules_of_filter_tables_that_need_no_state_are_compiled() {
    let (mut wrong, mut tables_whole) = (Vec::new(), 0);
    for dump in corpus::all().iter().filter(|dump| dump.valid) {
        let text = dump.text();
        let report = report(&read(dump));
        let chains: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix(':')?.split_ascii_whitespace().next()).collect();
        let (mut table, mut stateless, mut rules) = ("", 0, 0);
        for (number, line) in (1..).zip(text.lines()) {
            if let Some(name) = line.strip_prefix('*') {
                table = name.trim_end();
            }
            let Some(words) = rule_words(line).filter(|_| table == "filter") else { continue };
            rules += 1;
            let follows = |option: &[&str], known: &dyn Fn(&str) -> bool| {
                words.windows(2).filter(|pair| option.contains(&pair[0])).all(|pair| known(pair[1]))
            };
            let matches = follows(&["-m", "--match"], &|name| STATELESS_MATCHES.contains(&name));
            let target = follows(&["-j", "-g", "--jump", "--goto"], &|name| {
                VERDICTS.contains(&name) || chains.contains(&name)
            });
            // Several hooks may share a chain of the user's, of which some know no device to go out by.
            let devices = words[1].starts_with(|c: char| c.is_lowercase()) && words.contains(&"-o");
            if !(matches && target) || devices {
                continue;
            }
            stateless += 1;
            match &report.lines[&number] {
                Status::Compiled => {}
                other => wrong.push(format!("{}:{number}: {other:?}: {line}", dump.name)),
            }
        }
        tables_whole += usize::from(rules > 0 && rules == stateless);
    }
    eprintln!("{tables_whole} filter tables need no state at all");
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong[..wrong.len().min(30)].join("\n"));
    assert!(tables_whole > 0);
}
