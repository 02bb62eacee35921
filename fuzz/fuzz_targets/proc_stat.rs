//! `/proc/PID/stat`: a name made of anything comes back as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::stat;

fuzz_target!(|text: &[u8]| {
    if let Ok(stat) = stat::parse(text) {
        let start = text.iter().position(|&b| b == b'(').expect("parsed");
        assert!(text[start + 1..].starts_with(&stat.comm));
    }
    let whole = [b"1 (", text, b") R", &b" 1".repeat(49)].concat();
    assert_eq!(stat::parse(&whole).map(|stat| stat.comm).as_deref(), Ok(text));
});
