//! Messages to a page server, and names in certificates.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::transfer::tls::common_names;
use standstill::transfer::wire::{Message, Target, LEN};

fuzz_target!(|input: &[u8]| {
    for bytes in input.chunks_exact(LEN) {
        let Ok(bytes) = bytes.try_into() else { continue };
        let Ok(message) = Message::decode(bytes) else { continue };
        assert_eq!(Message::decode(&message.encode()), Ok(message));
        if let Some(target) = Target::from_wire(message.target) {
            assert_eq!(Target::from_wire(target.to_wire()), Some(target));
        }
    }
    for name in common_names(input) {
        assert!(name.len() <= input.len());
    }
});
