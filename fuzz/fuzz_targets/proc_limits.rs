//! `/proc/PID/limits`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::limits;

fuzz_target!(|text: &[u8]| {
    let _ = limits::parse(text);
});
