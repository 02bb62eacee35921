//! `/proc/PID/mountinfo`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::mountinfo;

fuzz_target!(|text: &[u8]| {
    let _ = mountinfo::parse(text);
});
