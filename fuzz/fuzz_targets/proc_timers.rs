//! `/proc/PID/timers`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::timers;

fuzz_target!(|text: &[u8]| {
    let _ = timers::parse(text);
});
