//! Any text is read without a panic, and what is printed prints the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| polc_tests::fuzz::dump_parser(text));
