//! `/proc/locks`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::locks;

fuzz_target!(|text: &[u8]| {
    if let Ok(locks) = locks::parse(text) {
        assert!(locks.iter().all(|lock| lock.end.is_none_or(|end| end >= lock.start)));
    }
});
