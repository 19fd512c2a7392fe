//! Any bytes are read as an object without a panic; what was read is written and read again the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polc_backend_ebpf::object::Object;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(object) = Object::read(bytes)
        && let Ok(written) = object.write()
    {
        assert_eq!(Object::read(&written).expect("what is written can be read"), object);
    }
});
