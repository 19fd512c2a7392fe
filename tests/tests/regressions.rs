//! Inputs that once crashed something, or were made to, do so no more: each goes where its fuzz target would send it.

use std::fs;
use std::path::{Path, PathBuf};

use polc_tests::{corpus, fuzz};

fn folder() -> PathBuf {
    corpus::repository().join("tests/regressions")
}

/// The files for one target, by name.
fn files(target: &str) -> Vec<PathBuf> {
    let folder = folder().join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("can be listed").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{}", folder.display());
    files
}

fn replay(target: &str, check: impl Fn(&Path)) {
    for file in files(target) {
        eprintln!("{}", file.display());
        check(&file);
    }
}

#[test]
fn dump_parser() {
    replay("dump_parser", |file| fuzz::dump_parser(&corpus::read(file)));
}

#[test]
fn ipset_parser() {
    replay("ipset_parser", |file| fuzz::ipset_parser(&corpus::read(file)));
}

#[test]
fn object_reader() {
    replay("object_reader", |file| fuzz::object_reader(&fs::read(file).expect("can be read")));
}

#[test]
fn levels_agree() {
    replay("levels_agree", |file| {
        assert!(fuzz::levels_agree(&corpus::read(file)) > 0, "{}: no packet was compared", file.display());
    });
}

#[test]
fn every_target_has_a_folder_and_every_file_a_line() {
    let mut targets: Vec<String> = fs::read_dir(corpus::repository().join("fuzz/fuzz_targets"))
        .expect("can be listed")
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_string()))
        .collect();
    targets.sort();
    let mut expected = String::new();
    for target in &targets {
        expected += &format!("## {target}\n");
        for file in files(target) {
            expected += &format!("{}\n", file.file_name().expect("a file").to_string_lossy());
        }
    }
    let listed: String = corpus::read(&folder().join("README.md"))
        .lines()
        .filter_map(|line| {
            let row = line.strip_prefix("| `").and_then(|row| row.split('`').next());
            row.or(line.starts_with("## ").then_some(line)).map(|line| format!("{line}\n"))
        })
        .collect();
    assert_eq!(listed, expected);
}
