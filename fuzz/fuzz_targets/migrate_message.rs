//! What one side of a migration says, whoever it is: a message or an error, and what is understood is said again alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::migrate::wire::parse;

fuzz_target!(|body: &[u8]| {
    let Ok(message) = parse(body) else { return };
    let again = serde_json::to_vec(&message).unwrap();
    assert_eq!(parse(&again).unwrap(), message);
});
