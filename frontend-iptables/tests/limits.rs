//! Every bound on the text, at its edge: what just fits is read, what is one more gets a finding that names the bound.

use std::fmt::Write as _;

use polc_frontend_iptables::{Mode, ParseOptions, ipset, parse};
use polc_ir::diag::{Diagnostic, Severity};
use polc_ir::hook::Semantics;
use polc_ir::limits::{
    CHAIN_NAME_BYTES_MAX, CHAINS_MAX, DIAGNOSTICS_MAX, JUMP_DEPTH_MAX, LINE_BYTES_MAX, MATCHES_MAX,
    NFT_JUMP_DEPTH_MAX, RULES_MAX, RULES_PASSED_MAX, WORD_BYTES_MAX,
};
use polc_ir::source::SourceMap;

fn findings(text: &str) -> Vec<Diagnostic> {
    let mut sources = SourceMap::new();
    let file = sources.add("rules.v4", text);
    parse(&sources, file, &ParseOptions::default()).1
}

fn findings_as(text: &str, mode: Mode, semantics: Semantics) -> Vec<Diagnostic> {
    let mut sources = SourceMap::new();
    let file = sources.add("rules.v4", text);
    let options = ParseOptions { mode, semantics: Some(semantics), ..ParseOptions::default() };
    parse(&sources, file, &options).1
}

fn errors(text: &str) -> Vec<String> {
    let errors = findings(text).into_iter().filter(|found| found.severity == Severity::Error);
    errors.map(|found| found.message).collect()
}

/// A filter table with these lines.
fn table(lines: &str) -> String {
    format!("*filter\n{lines}COMMIT\n")
}

#[test]
fn lines() {
    let line = |len: usize| {
        let start = "-A INPUT -j ACCEPT";
        table(&format!("{start}{}\n", " ".repeat(len - start.len())))
    };
    assert_eq!(errors(&line(LINE_BYTES_MAX)), Vec::<String>::new());
    assert_eq!(
        errors(&line(LINE_BYTES_MAX + 1)),
        [format!("the line is longer than {LINE_BYTES_MAX} bytes")]
    );
}

#[test]
fn words() {
    let word = |len: usize| table(&format!("-A INPUT -i {} -j ACCEPT\n", "x".repeat(len)));
    let [short, long] = [WORD_BYTES_MAX, WORD_BYTES_MAX + 1].map(|len| errors(&word(len)));
    assert!(!short.iter().any(|error| error.contains(&WORD_BYTES_MAX.to_string())), "{short:?}");
    assert!(long.iter().any(|error| error.contains(&WORD_BYTES_MAX.to_string())), "{long:?}");
}

#[test]
fn chain_names() {
    let chain = |len: usize| table(&format!(":{} - [0:0]\n", "c".repeat(len)));
    assert_eq!(errors(&chain(CHAIN_NAME_BYTES_MAX)), Vec::<String>::new());
    let long = errors(&chain(CHAIN_NAME_BYTES_MAX + 1));
    assert!(matches!(&long[..], [error] if error.contains("is longer than")), "{long:?}");
}

#[test]
fn chains() {
    // INPUT is there already, and FORWARD and OUTPUT.
    let chains = |count: usize| {
        let mut text = String::new();
        for chain in 0..count {
            _ = writeln!(text, ":c{chain} - [0:0]");
        }
        table(&text)
    };
    assert_eq!(errors(&chains(CHAINS_MAX - 3)), Vec::<String>::new());
    let many = errors(&chains(CHAINS_MAX + 1));
    assert!(many[0].contains(&format!("more than {CHAINS_MAX} chains")), "{}", many[0]);
}

/// Most addresses that a word has room for.
const ADDRESSES: usize = WORD_BYTES_MAX.div_ceil(2);

fn addresses() -> String {
    vec!["1"; ADDRESSES].join(",")
}

#[test]
fn rules() {
    let most = format!("-A INPUT -s {0} -d {0}\n", addresses()).repeat(RULES_MAX / ADDRESSES / ADDRESSES);
    assert_eq!(errors(&table(&most)), Vec::<String>::new());
    assert_eq!(
        errors(&table(&format!("{most}-A INPUT -j DROP\n"))),
        [format!("more than {RULES_MAX} rules")]
    );
}

#[test]
fn matches() {
    const MATCHES: usize = 64;
    let line = format!("-A INPUT -s {} -p tcp {}\n", addresses(), "-m tcp ".repeat(MATCHES));
    let most = line.repeat(MATCHES_MAX / ADDRESSES / MATCHES);
    assert_eq!(errors(&table(&most)), Vec::<String>::new());
    // Rules without matches still fit.
    assert_eq!(
        errors(&table(&format!("{most}-A INPUT -j DROP\n-A INPUT -p tcp -m tcp\n"))),
        [format!("more than {MATCHES_MAX} matches")]
    );
}

#[test]
fn nesting() {
    // INPUT is the first of the chains that a packet is in.
    let nested = |depth: usize| {
        let mut text = String::new();
        for chain in 1..depth {
            _ = writeln!(text, ":c{chain} - [0:0]");
        }
        text.push_str("-A INPUT -j c1\n");
        for chain in 1..depth - 1 {
            _ = writeln!(text, "-A c{chain} -j c{}", chain + 1);
        }
        table(&text)
    };
    assert_eq!(errors(&nested(JUMP_DEPTH_MAX)), Vec::<String>::new());
    assert_eq!(
        errors(&nested(JUMP_DEPTH_MAX + 1)),
        [format!("chains are nested more than {JUMP_DEPTH_MAX} deep")]
    );
    for mode in [Mode::Tolerant, Mode::Strict] {
        let found = |depth| findings_as(&nested(depth), mode, Semantics::Nft);
        assert_eq!(found(NFT_JUMP_DEPTH_MAX), []);
        let deeper = found(NFT_JUMP_DEPTH_MAX + 1);
        let [one] = &deeper[..] else { panic!("{deeper:?}") };
        assert_eq!(one.message, format!("chains are nested more than {NFT_JUMP_DEPTH_MAX} deep"));
        assert!(one.span.is_some_and(|span| !span.is_empty()), "it has a place");
    }
}

/// Chains that are each jumped to twice by the one before.
#[test]
fn rules_that_a_packet_is_tried_against() {
    let doubling = |chains: usize| {
        let mut text = String::new();
        for chain in 0..chains {
            _ = writeln!(text, ":c{chain} - [0:0]");
        }
        for chain in 1..chains {
            for _ in 0..2 {
                _ = writeln!(text, "-A c{} -j c{chain}", chain - 1);
            }
        }
        table(&format!("{text}-A c{} -j DROP\n-A INPUT -j c0\n", chains - 1))
    };
    // 2^n for the last chain's rule, as many less 2 for the jumps, and the one in INPUT.
    let fits = RULES_PASSED_MAX.ilog2() as usize - 1;
    let most = format!("a packet may be tried against more than {RULES_PASSED_MAX} rules");
    assert_eq!(errors(&doubling(fits)), Vec::<String>::new());
    assert_eq!(errors(&doubling(60)).first(), Some(&most));
}

#[test]
fn diagnostics() {
    let wrong = |count: usize| table(&"-A INPUT --no-such-option\n".repeat(count));
    assert_eq!(findings(&wrong(DIAGNOSTICS_MAX)).len(), DIAGNOSTICS_MAX);
    let more = findings(&wrong(DIAGNOSTICS_MAX + 7));
    assert_eq!(more.len(), DIAGNOSTICS_MAX + 1);
    assert!(more[DIAGNOSTICS_MAX].message.contains('7'), "{}", more[DIAGNOSTICS_MAX].message);
    let mut sources = SourceMap::new();
    let file = sources.add("sets", "nonsense\n".repeat(DIAGNOSTICS_MAX + 7));
    assert_eq!(ipset::parse(&sources, file).1.len(), DIAGNOSTICS_MAX + 1);
}
