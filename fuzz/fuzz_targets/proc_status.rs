//! `/proc/PID/status`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::status;

fuzz_target!(|text: &[u8]| {
    if let Ok(status) = status::parse(text) {
        assert!(status.name.len() <= text.len() && status.groups.len() <= text.len());
    }
});
