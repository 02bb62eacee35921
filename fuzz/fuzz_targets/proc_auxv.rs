//! `/proc/PID/auxv`: its words come back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::auxv;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(vector) = auxv::parse(bytes) {
        let words: Vec<u8> = vector.words().iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(auxv::parse(&words), Ok(vector));
    }
});
