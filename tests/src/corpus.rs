//! Where the rule sets are that polc is tested with.
//!
//! The repository ships the ones that tools made (`tests/corpora`). A larger corpus of third parties' dumps may lie
//! beside the checkout, in `../shared/corpus`, or where `POLC_SHARED` says; tests use it when it is there and say so
//! when it isn't.

use std::fs;
use std::path::{Path, PathBuf};

use polc_frontend_iptables::{ParseOptions, ipset, lower, parse};
use polc_ir::hook::Semantics;
use polc_ir::ruleset::Ruleset;
use polc_ir::source::SourceMap;

/// A rule set and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// The file's name, which is the case's name.
    pub name: String,
    /// The iptables-save file.
    pub rules: PathBuf,
    /// The ipset file of the same name, if there is one.
    pub ipset: Option<PathBuf>,
    /// iptables-legacy-save's own text of the rule set, if there is one.
    pub canonical: Option<PathBuf>,
    /// Whether iptables-legacy-restore 1.8.9 accepts the file.
    pub valid: bool,
}

impl Dump {
    /// The text of the rule set.
    ///
    /// # Panics
    /// If the file can't be read: the corpus is part of the test.
    pub fn text(&self) -> String {
        read(&self.rules)
    }

    /// iptables-legacy-save's text of it.
    pub fn canonical_text(&self) -> Option<String> {
        self.canonical.as_deref().map(read)
    }

    /// The text of its sets.
    pub fn ipset_text(&self) -> Option<String> {
        self.ipset.as_deref().map(read)
    }

    /// What the rules and sets mean. Their texts are added to `sources`.
    pub fn ruleset(&self, sources: &mut SourceMap, semantics: Semantics) -> Ruleset {
        let file = sources.add(self.name.as_str(), self.text());
        let (ast, _) = parse(sources, file, &ParseOptions::default());
        let sets = self.ipset_text().map(|text| {
            let file = sources.add("sets", text);
            ipset::parse(sources, file).0
        });
        lower(&ast, &Vec::from_iter(sets), semantics)
    }
}

/// The file's text; bytes that are no UTF-8 are replaced.
///
/// # Panics
/// If the file can't be read.
pub fn read(path: &Path) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the repository").to_path_buf()
}

/// The folder of shared test data, if it is there.
pub fn shared() -> Option<PathBuf> {
    let given = std::env::var_os("POLC_SHARED").map(PathBuf::from);
    let beside = repository().parent().map(|parent| parent.join("shared"));
    given.into_iter().chain(beside).find(|path| path.join("corpus/iptables").is_dir())
}

/// The dumps that ship with the repository, by name.
pub fn own() -> Vec<Dump> {
    let folder = repository().join("tests/corpora/iptables");
    dumps(&folder, &folder.join("canonical"), |_| true)
}

/// The dumps beside the checkout, by name; empty if there are none, which is said on stderr.
pub fn third_party() -> Vec<Dump> {
    let Some(shared) = shared() else {
        eprintln!("skipped third-party dumps: no ../shared/corpus and no POLC_SHARED");
        return Vec::new();
    };
    let folder = shared.join("corpus/iptables");
    let manifest = read(&folder.join("MANIFEST.tsv"));
    let accepted: Vec<&str> = manifest
        .lines()
        .map(|line| line.split('\t').collect::<Vec<_>>())
        .filter(|columns| columns.get(8) == Some(&"ok"))
        .map(|columns| columns[0])
        .collect();
    dumps(&folder, &folder.join("canonical-legacy"), |name| accepted.contains(&name))
}

/// All dumps there are.
pub fn all() -> Vec<Dump> {
    let mut all = own();
    all.extend(third_party());
    all
}

fn dumps(folder: &Path, canonical: &Path, valid: impl Fn(&str) -> bool) -> Vec<Dump> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".rules"))
        .collect();
    names.sort();
    let existing = |path: PathBuf| path.exists().then_some(path);
    names
        .into_iter()
        .map(|name| Dump {
            rules: folder.join(&name),
            ipset: existing(folder.join(name.replace(".rules", ".ipset"))),
            canonical: existing(canonical.join(&name)),
            valid: valid(&name),
            name,
        })
        .collect()
}
