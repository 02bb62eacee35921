//! `/proc/devices`, and paths that may be GPUs.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_gpu::{holds, CharMajors, Place, Thing, What};

fuzz_target!(|text: &[u8]| {
    let majors = CharMajors::parse(text).unwrap_or_default();
    for what in [What::Unknown, What::NotCharacter, What::Character { major: 195, minor: 0 }] {
        for holding in holds(&majors, [Thing { place: Place::Descriptor(0), path: text, what }]) {
            let _ = holding.to_string();
        }
    }
});
