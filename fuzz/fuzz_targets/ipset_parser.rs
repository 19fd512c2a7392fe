//! Any text is read as ipset's without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| polc_tests::fuzz::ipset_parser(text));
