//! `/proc/PID/fdinfo/N`, of every kind.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::fdinfo::{self, FdDetail};

fuzz_target!(|text: &[u8]| {
    if let Ok(info) = fdinfo::parse(text) {
        assert!(info.locks.len() + info.other.len() <= text.len());
        if let FdDetail::IoUring(ring) = info.detail {
            let _ = ring.is_idle();
        }
    }
});
