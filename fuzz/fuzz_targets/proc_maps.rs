//! `/proc/PID/maps` and `smaps`: no panic, and areas that make sense.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::maps;

fuzz_target!(|text: &[u8]| {
    if let Ok(areas) = maps::parse(text) {
        let paths: usize = areas.iter().filter_map(|area| area.path.as_ref()).map(Vec::len).sum();
        assert!(paths <= text.len());
        for area in &areas {
            assert!(area.start < area.end && area.size() > 0);
            let _ = (area.name(), format!("{:?}", area.vm_flags));
        }
    }
});
