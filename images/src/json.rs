//! Images as JSON, as crit prints and reads them: `{"magic": NAME, "entries": [{…, "extra": …}, …]}`.
//!
//! The conversion is driven by the table of fields, not by the Rust types, and follows the bytes: a field is there if it
//! was encoded, in the order of the numbers. So decode, then encode gives the same bytes. Three things go beyond crit:
//! - Fields (and enum values) that our messages lack are kept, as base64 in `_unknown`, and put at the end of their message
//!   again. crit drops them.
//! - Text that is not UTF-8 is `{"base64": …}`.
//! - A name in the JSON that is none of the message's fields is an error. crit ignores it.

use serde_json::{Map, Value};

use crate::error::{Error, JsonFault, Malformed, Result};
use crate::framing;
use crate::schema::{self, Message};
use crate::table::Payload;

mod decode;
mod encode;
mod encoding;
mod extra;
mod names;
mod text;

pub use decode::decode;
pub use encode::encode;
pub(crate) use encoding::quoted;

/// How an image is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Numbers as people read them: hexadecimal addresses, names of flags, devices, IP addresses.
    pub pretty: bool,
    /// What follows an entry, as text; otherwise its size only.
    pub payload: bool,
}

/// Key of what follows an entry.
const EXTRA: &str = "extra";
/// Key of fields that we do not know.
const UNKNOWN: &str = "_unknown";
/// Key of text that is not UTF-8.
const BASE64: &str = "base64";

type Part<T> = std::result::Result<T, Malformed>;

/// The kind of an image and how many entries it has (without the head of a pagemap).
///
/// # Errors
/// If it is no image, or malformed.
pub fn info(name: &str, bytes: &[u8]) -> Result<Value> {
    let image = decode(name, bytes, Style { pretty: false, payload: false })?;
    let kind = framing::kind_of(name, bytes)?;
    let count = image["entries"].as_array().map_or(0, Vec::len);
    let heads = usize::from(kind.payload() == Payload::Pagemap);
    let mut info = Map::new();
    info.insert("magic".to_owned(), kind.name().into());
    info.insert("count".to_owned(), count.saturating_sub(heads).into());
    Ok(info.into())
}

/// JSON as crit writes it: on one line, or with four spaces a level.
#[must_use]
pub fn to_text(value: &Value, lines: bool) -> String {
    let mut out = String::new();
    text::write(value, lines.then_some(4), &mut out);
    out
}

/// An image from its JSON as text; `name` is for errors only.
///
/// # Errors
/// If it is not JSON, or not that of an image.
pub fn encode_text(name: &str, text: &[u8]) -> Result<Vec<u8>> {
    let value: Value = serde_json::from_slice(text).map_err(|error| fault(name, 0, error.into()))?;
    encode(name, &value)
}

fn fault(name: &str, entry: usize, source: Malformed) -> Error {
    Error::Malformed { image: name.to_owned(), entry, offset: 0, source }
}

fn json(path: &str, reason: JsonFault) -> Malformed {
    Malformed::Json { path: path.to_owned(), reason }
}

fn known(entry: Option<&'static str>) -> Part<&'static Message> {
    entry.and_then(schema::message).ok_or(Malformed::Raw)
}

#[cfg(test)]
mod tests;
