//! `manifest.json`: what a checkpoint in storage consists of.
//!
//! ```json
//! {"format": "standstill storage 1", "piece": 4194304, "images": [{"name": "…", "size": 5, "sha256": ["…"]}]}
//! ```
//!
//! It may come from anyone: what does not fit together is refused.

use std::collections::BTreeMap;

use serde_json::{json, Value};
use standstill_images::store::check_name;

use crate::{Sum, PIECE};

const FORMAT: &str = "standstill storage 1";

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) size: u64,
    /// Of each piece.
    pub(crate) sums: Vec<Sum>,
}

pub(crate) fn encode(images: &BTreeMap<String, Object>) -> Vec<u8> {
    let hex = |sum: &Sum| sum.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let image = |(name, object): (&String, &Object)| json!({"name": name, "size": object.size, "sha256": object.sums.iter().map(hex).collect::<Vec<_>>()});
    let images: Vec<Value> = images.iter().map(image).collect();
    let mut text = json!({"format": FORMAT, "piece": PIECE, "images": images}).to_string().into_bytes();
    text.push(b'\n');
    text
}

pub(crate) fn decode(text: &[u8]) -> Option<BTreeMap<String, Object>> {
    let value: Value = serde_json::from_slice(text).ok()?;
    if value.get("format")?.as_str()? != FORMAT || value.get("piece")?.as_u64()? != PIECE as u64 {
        return None;
    }
    let mut images = BTreeMap::new();
    for image in value.get("images")?.as_array()? {
        let name = image.get("name")?.as_str()?;
        check_name(name).ok()?;
        let size = image.get("size")?.as_u64()?;
        let sums =
            image.get("sha256")?.as_array()?.iter().map(|sum| digest(sum.as_str()?)).collect::<Option<Vec<_>>>()?;
        if size > 1 << 60 || sums.len() as u64 != size.div_ceil(PIECE as u64) {
            return None;
        }
        if images.insert(name.to_owned(), Object { size, sums }).is_some() {
            return None;
        }
    }
    Some(images)
}

fn digest(text: &str) -> Option<Sum> {
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut sum = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in sum.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_and_nothing_else() {
        let object = |size: u64| Object { size, sums: vec![[7; 32]; size.div_ceil(PIECE as u64) as usize] };
        let images: BTreeMap<_, _> =
            [0, 1, PIECE as u64, PIECE as u64 + 1].map(|n| (format!("{n}.img"), object(n))).into();
        let text = encode(&images);
        assert_eq!(decode(&text), Some(images));
        for size in 0..text.len() - 1 {
            assert_eq!(decode(&text[..size]), None, "{size}");
        }
        let text = String::from_utf8(text).unwrap();
        for (from, to) in [
            ("\"size\":1,", "\"size\":4194305,"),
            ("\"size\":1,", "\"size\":-1,"),
            ("0707", "070"),
            ("0707", "07x7"),
            ("1.img", "../1"),
            ("\"0.img", "\"1.img"),
            ("storage 1", "storage 2"),
            ("\"piece\":4194304", "\"piece\":0"),
        ] {
            assert!(text.contains(from));
            assert_eq!(decode(text.replacen(from, to, 1).as_bytes()), None, "{from} → {to}");
        }
    }
}
