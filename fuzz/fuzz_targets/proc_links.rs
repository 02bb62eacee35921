//! Targets of `/proc/PID/fd/N` and `/proc/PID/ns/…`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::links;

fuzz_target!(|target: &[u8]| {
    let _ = links::parse(target);
    let _ = links::parse_namespace(target);
});
