//! Bounds that only several crates together reach, at their edges.

use std::fmt::Write as _;

use polc::flatten::{TOO_MANY_CUBES, TOO_MANY_ENTRIES, flatten};
use polc::place::{attach_for, place};
use polc::session::{ReadOptions, Session};
use polc_ir::classifier::Classifier;
use polc_ir::diag::Diagnostic;
use polc_ir::env::{Env, Mode};
use polc_ir::hook::{Family, Hook};
use polc_ir::limits::{
    ENTRIES_BASE, ENTRIES_PER_RULE_MAX, RULE_CUBES_MAX, SET_ELEMENTS_MAX, SET_LEVELS_MAX, WORDS_MAX,
};
use polc_ir::plan::set::shape;
use polc_ir::source::SourceMap;

fn read(rules: &str) -> Session {
    let mut sources = SourceMap::new();
    let file = sources.add("rules.v4", format!("*filter\n{rules}COMMIT\n"));
    Session::read(sources, file, &[], &ReadOptions::default())
}

/// The INPUT hook's rules as a classifier, and what was found.
fn flat(rules: &str) -> (Classifier, Vec<Diagnostic>) {
    let session = read(rules);
    assert_eq!(session.diagnostics, []);
    let mut findings = Vec::new();
    let place = place(&[Hook::Input], attach_for(Hook::Input), Mode::Accelerate, false);
    let classifier = flatten(&session.ruleset, &place, &Env::default(), &mut findings);
    (classifier, findings)
}

#[test]
fn words_of_a_line() {
    let is_refused = |words: usize| {
        let line = format!("-A INPUT{}\n", " x".repeat(words - 2));
        let findings = read(&line).diagnostics;
        findings.iter().any(|finding| finding.message == format!("more than {WORDS_MAX} words on the line"))
    };
    assert_eq!([WORDS_MAX, WORDS_MAX + 1].map(is_refused), [false, true]);
}

/// Either port in a range, several times over: each doubles the combinations.
#[test]
fn combinations_of_a_rule() {
    let rule = |times: usize| {
        let either = |at| format!(" -m multiport --ports {}:{}", 100 - at, 1000 + at);
        format!("-A INPUT -p tcp{} -j DROP\n", (0..times).map(either).collect::<String>())
    };
    let times = RULE_CUBES_MAX.ilog2() as usize;
    assert_eq!(1 << times, RULE_CUBES_MAX);
    assert_eq!(flat(&rule(times)).1, []);
    let (_, findings) = flat(&rule(times + 1));
    assert!(matches!(&findings[..], [finding] if finding.code == TOO_MANY_CUBES), "{findings:?}");
}

/// Rules that all jump to the same chain, which comes back: as many entries as the product.
#[test]
fn ways_through_the_rules() {
    let rules = |jumps: usize| {
        let mut text = ":c - [0:0]\n".to_string();
        for port in 1..=jumps {
            writeln!(text, "-A INPUT -p tcp -m tcp --sport {port} -j c").expect("a string takes it");
            writeln!(text, "-A c -p tcp -m tcp --dport {port} -j DROP").expect("a string takes it");
        }
        text
    };
    let edge = ENTRIES_BASE.isqrt();
    let few = edge - 20;
    let (classifier, findings) = flat(&rules(few));
    assert_eq!(findings, []);
    assert!(classifier.entries.len() > few * few);
    let many = edge + 20;
    let (classifier, findings) = flat(&rules(many));
    assert!(matches!(&findings[..], [finding] if finding.code == TOO_MANY_ENTRIES), "{findings:?}");
    let entries_max = ENTRIES_BASE + ENTRIES_PER_RULE_MAX * 2 * many;
    assert!(classifier.entries.len() < entries_max + 2 * many, "{}", classifier.entries.len());
}

/// Networks of ever more combinations of lengths, until there are more than a table takes.
#[test]
fn combinations_of_prefix_lengths() {
    let mut text = "create a hash:net,net\n".to_string();
    let mut levels = 0;
    for length in 0..32 * 32 {
        let (first, second) = (1 + length / 32, 1 + length % 32);
        writeln!(text, "add a 128.0.0.0/{first},128.0.0.0/{second}").expect("a string takes it");
        let mut sources = SourceMap::new();
        let rules = "*filter\n-A INPUT -m set --match-set a src,dst -j DROP\nCOMMIT\n";
        let (rules, sets) = (sources.add("rules.v4", rules), sources.add("sets", text.as_str()));
        let session = Session::read(sources, rules, &[sets], &ReadOptions::default());
        let data = session.ruleset.sets.values().next().expect("the rule names it");
        match shape(data, Family::V4) {
            Ok(shape) => levels = shape.levels.len(),
            Err(why) => {
                assert_eq!(why, "its prefixes have too many different lengths");
                assert_eq!(levels, SET_LEVELS_MAX);
                return;
            }
        }
    }
    panic!("{levels} levels, and no end");
}

/// Four million lines, so only in the long runs.
#[test]
fn elements_of_sets() {
    if std::env::var_os("POLC_LONG").is_none() {
        eprintln!("skipped elements_of_sets: POLC_LONG is not set");
        return;
    }
    let mut text = format!("create a hash:ip maxelem {}\n", SET_ELEMENTS_MAX + 1);
    for address in 0..=SET_ELEMENTS_MAX as u32 {
        let [a, b, c, d] = (address + (1 << 24)).to_be_bytes();
        writeln!(text, "add a {a}.{b}.{c}.{d}").expect("a string takes it");
    }
    let mut sources = SourceMap::new();
    let file = sources.add("sets", text);
    let (sets, findings) = polc_frontend_iptables::ipset::parse(&sources, file);
    assert_eq!(sets.iter().map(|set| set.elements.len()).sum::<usize>(), SET_ELEMENTS_MAX);
    let messages: Vec<&str> = findings.iter().map(|finding| finding.message.as_str()).collect();
    assert_eq!(messages, [format!("more than {SET_ELEMENTS_MAX} elements")]);
}
