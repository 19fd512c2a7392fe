//! Any text is read without a panic, and what is printed prints the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polc_frontend_iptables::{Mode, ParseOptions, lower, parse, print};
use polc_ir::hook::Semantics;
use polc_ir::source::SourceMap;

fuzz_target!(|text: &str| {
    let mut sources = SourceMap::new();
    let file = sources.add("fuzz", text);
    let (dump, _) = parse(&sources, file, &ParseOptions::default());
    let printed = print(&dump, true);
    let again = sources.add("again", printed.as_str());
    let options = ParseOptions { mode: Mode::Strict, family: Some(dump.family), sets: None };
    let (dump_again, diagnostics) = parse(&sources, again, &options);
    if diagnostics.is_empty() {
        assert_eq!(print(&dump_again, true), printed, "printing is a fixpoint");
        lower(&dump_again, &[], Semantics::Legacy);
    }
});
