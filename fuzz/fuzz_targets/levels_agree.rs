//! Rules that are accepted mean the same at every level.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    polc_tests::fuzz::levels_agree(text);
});
