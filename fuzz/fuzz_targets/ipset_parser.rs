//! Any text is read as ipset's without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polc_ir::source::SourceMap;

fuzz_target!(|text: &str| {
    let mut sources = SourceMap::new();
    let file = sources.add("fuzz", text);
    let _ = polc_frontend_iptables::ipset::parse(&sources, file);
});
