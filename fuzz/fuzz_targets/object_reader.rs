//! Any bytes are read as an object without a panic; what was read is written and read again the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| polc_tests::fuzz::object_reader(bytes));
