//! What ARCHITECTURE.md and CONTRIBUTING.md say of the source is true of it: who knows whom, where `unsafe` is, that
//! nothing is left unfinished, that every file says what it is, and that every bound is kept and tested.

use std::fs;
use std::path::Path;

use polc_tests::corpus::{self, repository};

/// The crates of polc that each crate may know, tests aside.
const KNOWS: &[(&str, &[&str])] = &[
    ("ir", &[]),
    ("frontend-iptables", &["polc-ir"]),
    ("frontend-k8s", &["polc-ir"]),
    ("backend-ebpf", &["polc-ir"]),
    ("loader", &["polc-backend-ebpf", "polc-ir"]),
    (
        "compiler",
        &["polc-backend-ebpf", "polc-frontend-iptables", "polc-frontend-k8s", "polc-ir", "polc-loader"],
    ),
];

/// Where `unsafe` may stand.
const UNSAFE: &[&str] = &["backend-ebpf/src/vm/", "loader/src/sys/"];

/// Where the compiler's library may name the loader: what the feature `kernel` is for.
const NAMES_LOADER: &[&str] = &["compiler/src/bin/", "compiler/src/netfilter"];

/// Bounds whose edge no test reaches, and why.
const UNREACHED: &[(&str, &str)] = &[
    ("BTF_BYTES_MAX", "a program of the largest size, every line of the longest kept, stays below it"),
    ("CLASSIFIER_ENTRIES_MAX", "only a quarter of a million rules get there, in more than a gigabyte"),
    ("SET_CELLS_MAX", "only sets of millions of elements get there: 2.6 million if the set is live"),
    ("VERIFIER_LOG_BYTES_MAX", "the kernel's verifier would have to write 16 MiB about one program"),
    ("WALK_TURNS_CAUTIOUS", "turns are counted cautiously, so no rule set is known to lie at the edge"),
];

/// A file of Rust.
struct Source {
    /// From the repository's root.
    path: String,
    text: String,
}

impl Source {
    fn is_below(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }

    /// The text without comments, up to the tests in it.
    fn code(&self) -> String {
        if self.is_test() {
            return String::new();
        }
        without_comments(self.text.split(TESTS).next().expect("a split has a first part"))
    }

    /// The tests in the text, without comments.
    fn tests(&self) -> String {
        if self.is_test() {
            return without_comments(&self.text);
        }
        without_comments(self.text.split_once(TESTS).map_or("", |(_, tests)| tests))
    }

    fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.contains("/tests/")
    }
}

/// What the unit tests of a file begin with; they come last.
const TESTS: &str = "#[cfg(test)]\nmod tests";

fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("").to_string() + "\n").collect()
}

fn sources() -> Vec<Source> {
    let root = repository();
    let crates = KNOWS.iter().map(|(name, _)| *name).chain(["benches", "fuzz", "tests"]);
    let mut pending: Vec<_> = crates.map(|name| root.join(name)).collect();
    let mut sources = Vec::new();
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("can be listed").path();
            if path.is_dir() && !path.ends_with("target") {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(&root).expect("it is in the repository");
                sources.push(Source { path: inside.display().to_string(), text: corpus::read(&path) });
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(sources.len() > 100, "{} files", sources.len());
    sources
}

/// Whether a text has a word, as Rust counts words.
fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

fn nothing(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn crates_know_only_whom_they_may() {
    let mut wrong = Vec::new();
    for (name, may) in KNOWS {
        let manifest = corpus::read(&repository().join(name).join("Cargo.toml"));
        let dependencies = manifest.split("\n[dependencies]\n").nth(1).expect("every crate has dependencies");
        let dependencies = dependencies.split("\n[").next().expect("a split has a first part");
        let knows = dependencies.lines().filter_map(|line| line.split([' ', '.', '=']).next());
        for known in knows.filter(|known| known.starts_with("polc") && !may.contains(known)) {
            wrong.push(format!("{name} knows {known}"));
        }
    }
    for source in sources() {
        let code = source.code();
        if source.is_below(&["compiler/src/"])
            && !source.is_below(NAMES_LOADER)
            && has_word(&code, "polc_loader")
        {
            wrong.push(format!("{} names the loader", source.path));
        }
    }
    nothing(&wrong);
}

#[test]
fn unsafe_stands_only_where_it_may() {
    let all = sources();
    let has = |source: &&Source| has_word(&(source.code() + &source.tests()), concat!("un", "safe"));
    let (fit, unfit): (Vec<_>, Vec<_>) = all.iter().filter(has).partition(|source| source.is_below(UNSAFE));
    assert!(!fit.is_empty(), "the places named are where it is");
    nothing(&unfit.iter().map(|source| source.path.clone()).collect::<Vec<_>>());
}

#[test]
fn nothing_is_left_unfinished() {
    let marks = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("db", "g!("),
        concat!("#[ig", "nore"),
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ];
    let mut wrong = Vec::new();
    for source in sources() {
        for (number, line) in (1..).zip(source.text.lines()) {
            for mark in marks.iter().filter(|mark| line.contains(**mark)) {
                wrong.push(format!("{}:{number}: {mark}", source.path));
            }
        }
    }
    nothing(&wrong);
}

#[test]
fn every_file_opens_with_a_sentence() {
    let mut wrong = Vec::new();
    for source in sources() {
        let paragraph: String =
            source.text.lines().map_while(|line| line.strip_prefix("//! ")).collect::<Vec<_>>().join(" ");
        if !paragraph.contains(['.', ':']) {
            wrong.push(format!("{}: {paragraph}", source.path));
        }
    }
    nothing(&wrong);
}

#[test]
fn every_bound_is_kept_and_tested() {
    let limits = Path::new("ir/src/limits.rs");
    let bounds: Vec<String> = corpus::read(&repository().join(limits))
        .lines()
        .filter_map(|line| Some(line.strip_prefix("pub const ")?.split(':').next()?.to_string()))
        .collect();
    assert!(bounds.len() > 20, "{bounds:?}");
    let sources: Vec<_> = sources()
        .into_iter()
        .filter(|source| Path::new(&source.path) != limits && !source.path.ends_with("tidy.rs"))
        .collect();
    let (code, tests): (String, String) =
        sources.iter().map(|source| (source.code(), source.tests())).unzip();
    let mut wrong = Vec::new();
    for bound in &bounds {
        if !has_word(&code, bound) {
            wrong.push(format!("nothing keeps to {bound}"));
        }
        let excuse = UNREACHED.iter().find(|(name, _)| name == bound);
        match (has_word(&tests, bound), excuse) {
            (true, None) => {}
            (false, Some((_, why))) => eprintln!("no test reaches {bound}: {why}"),
            (false, None) => wrong.push(format!("no test names {bound}")),
            (true, Some(_)) => wrong.push(format!("{bound} is tested, and listed as if it weren't")),
        }
    }
    let gone = UNREACHED.iter().filter(|(name, _)| !bounds.iter().any(|bound| bound == name));
    wrong.extend(gone.map(|(name, _)| format!("{name} is no bound any more")));
    nothing(&wrong);
}

/// A code stands for one thing.
#[test]
fn codes_are_given_once() {
    let mut given: Vec<(String, String)> = Vec::new();
    for source in sources() {
        let code = source.code();
        // The loader's are a table of one enum.
        let words = if source.path.ends_with("loader/src/error.rs") { "=> " } else { "Code(" };
        for (at, word) in code.match_indices(words) {
            let digits = code[at + word.len()..].chars().take_while(char::is_ascii_digit);
            let number: String = digits.collect();
            if !number.is_empty() {
                given.push((number, source.path.clone()));
            }
        }
    }
    given.sort();
    assert!(given.len() > 30, "only {} codes", given.len());
    let twice = given.windows(2).filter(|pair| pair[0].0 == pair[1].0);
    let twice = twice.map(|pair| format!("{} in {} and {}", pair[0].0, pair[0].1, pair[1].1));
    nothing(&twice.collect::<Vec<_>>());
}
