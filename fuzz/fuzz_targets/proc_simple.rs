//! The small files: every function reads every text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::simple;

fuzz_target!(|text: &[u8]| {
    let _ = simple::children(text);
    let _ = simple::comm(text);
    assert!(simple::strings(text).map(|string| string.len() + 1).sum::<usize>() <= text.len() + 1);
    if let Ok(ranges) = simple::id_map(text) {
        assert!(ranges.iter().all(|range| range.inside.checked_add(range.count).is_some()));
    }
    let _ = simple::setgroups(text);
    let _ = simple::syscall(text);
    let _ = simple::hex::<u32>("personality", text);
    let _ = simple::unsigned::<u64>("timerslack_ns", text);
    let _ = simple::signed::<i16>("oom_score_adj", text);
    let _ = simple::numbers::<i64>("sem", text);
    let _ = simple::loginuid(text);
    let _ = simple::timens_offsets(text);
    let _ = simple::autogroup_nice(text);
});
