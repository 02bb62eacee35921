//! JSON to an image: no panic, and an image that was made can be shown, and shown it makes the same image.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_images::json::{self, Style};

fuzz_target!(|text: &[u8]| {
    let Ok(image) = json::encode_text("image", text) else { return };
    let shown = json::decode("image", &image, Style { pretty: true, payload: true });
    let shown = shown.expect("what was encoded can be shown");
    let again = json::encode("image", &shown).expect("what was shown can be encoded");
    let second = json::decode("image", &again, Style { pretty: true, payload: true });
    assert_eq!(shown, second.expect("what was encoded can be shown"));
});
