//! `/proc/PID/cgroup`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::cgroup;

fuzz_target!(|text: &[u8]| {
    let _ = cgroup::parse(text);
});
