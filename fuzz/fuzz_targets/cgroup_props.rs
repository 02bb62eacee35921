//! `--cgroup-props`: CRIU's notation of properties.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::cgroups::props::Props;

fuzz_target!(|text: &str| {
    let _ = Props::default().change(text);
});
