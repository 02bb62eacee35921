//! JSON to entries, driven by the table of fields.

use serde_json::Value;

use super::extra::Extra;
use super::{encoding, fault, json, known, names, Part, BASE64, EXTRA, UNKNOWN};
use crate::error::{JsonFault, Malformed, Result};
use crate::framing::Entry;
use crate::payload::{self, Cursor};
use crate::proto::{
    BpfmapDataEntry, GhostChunkEntry, GhostFileEntry, IpcMsgEntry, IpcSemEntry, IpcShmEntry, PipeDataEntry,
    SkPacketEntry, TcpStreamEntry,
};
use crate::schema::{self, Field, Kind, Label, Message};
use crate::table::{Header, ImageKind, Payload, MAGIC_COMMON, MAGIC_SERVICE};
use crate::wire::{bits, put_bytes, put_tag, put_varint, Fields};

/// An image from its JSON; `name` is for errors only.
///
/// # Errors
/// If it is not that of an image.
pub fn encode(name: &str, image: &Value) -> Result<Vec<u8>> {
    let at_top = |reason| fault(name, 0, json("image", reason));
    let magic = image.get("magic").and_then(Value::as_str).ok_or_else(|| at_top(JsonFault::Wanted("a \"magic\"")))?;
    let kind = ImageKind::from_name(magic).filter(|kind| !kind.is_raw());
    let kind = kind.ok_or_else(|| at_top(JsonFault::Magic(magic.to_owned())))?;
    let entries = image.get("entries").and_then(Value::as_array);
    let entries = entries.ok_or_else(|| at_top(JsonFault::Wanted("an array of \"entries\"")))?;

    let mut out = Vec::new();
    match kind.header() {
        Header::Common => out.extend_from_slice(&MAGIC_COMMON.to_le_bytes()),
        Header::Service => out.extend_from_slice(&MAGIC_SERVICE.to_le_bytes()),
        Header::Own | Header::Raw => {}
    }
    out.extend_from_slice(&kind.magic().to_le_bytes());
    let mut chunked = false;
    for (place, entry) in entries.iter().enumerate() {
        let put = match kind.payload() {
            Payload::None => put_entry(kind.entry(), entry, None, &mut out),
            Payload::Pagemap if place == 0 => put_entry(Some("pagemap_head"), entry, None, &mut out),
            Payload::Pagemap => put_entry(kind.entry(), entry, None, &mut out),
            Payload::PipeData => put_with_payload::<PipeDataEntry>(entry, &mut out),
            Payload::SocketQueue => put_with_payload::<SkPacketEntry>(entry, &mut out),
            Payload::IpcShm => put_with_payload::<IpcShmEntry>(entry, &mut out),
            Payload::IpcMsg => put_with_payload::<IpcMsgEntry>(entry, &mut out),
            Payload::IpcSem => put_with_payload::<IpcSemEntry>(entry, &mut out),
            Payload::TcpStream => put_with_payload::<TcpStreamEntry>(entry, &mut out),
            Payload::BpfMap => put_with_payload::<BpfmapDataEntry>(entry, &mut out),
            Payload::Ghost if place == 0 => put_ghost(entry, &mut chunked, &mut out),
            Payload::Ghost if chunked => put_chunk(entry, &mut out),
            Payload::Ghost => Err(json("entries", JsonFault::Wanted("one entry, as `chunks` is not set"))),
        };
        put.map_err(|source| fault(name, place, source))?;
    }
    Ok(out)
}

/// Appends an entry; `out` ends with its message.
fn put_entry(entry: Option<&'static str>, value: &Value, ignore: Option<&str>, out: &mut Vec<u8>) -> Part<()> {
    let message = known(entry)?;
    let mut bytes = Vec::new();
    put_fields(message, value, ignore, message.name, schema::DEPTH, &mut bytes)?;
    put_sized(&bytes, out)
}

fn put_sized(bytes: &[u8], out: &mut Vec<u8>) -> Part<()> {
    let size = u32::try_from(bytes.len()).map_err(|_| Malformed::PayloadSize { size: bytes.len() as u64 })?;
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(bytes);
    Ok(())
}

/// Appends an entry that something follows, and reads it back.
pub(super) fn put_typed<T: Entry>(value: &Value, out: &mut Vec<u8>) -> Part<T> {
    let begin = out.len();
    put_entry(Some(T::NAME), value, Some(EXTRA), out)?;
    let mut cursor = Cursor::new(out.get(begin..).unwrap_or(&[]));
    payload::decode(cursor.take_sized()?)
}

fn put_with_payload<T: Extra>(value: &Value, out: &mut Vec<u8>) -> Part<()> {
    let entry: T = put_typed(value, out)?;
    entry.put(value.get(EXTRA).unwrap_or(&Value::Null), out)
}

fn put_ghost(value: &Value, chunked: &mut bool, out: &mut Vec<u8>) -> Part<()> {
    let entry: GhostFileEntry = put_typed(value, out)?;
    *chunked = entry.chunks.unwrap_or(false);
    if !*chunked {
        out.extend_from_slice(&raw_bytes(value.get(EXTRA).unwrap_or(&Value::Null))?);
    }
    Ok(())
}

fn put_chunk(value: &Value, out: &mut Vec<u8>) -> Part<()> {
    let entry: GhostChunkEntry = put_typed(value, out)?;
    let bytes = raw_bytes(value.get(EXTRA).unwrap_or(&Value::Null))?;
    if bytes.len() as u64 != entry.len {
        return Err(json(EXTRA, JsonFault::Wanted("as many bytes as `len` says")));
    }
    out.extend_from_slice(&bytes);
    Ok(())
}

/// Bytes as base64, none at all if the value is missing.
pub(super) fn raw_bytes(value: &Value) -> Part<Vec<u8>> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => encoding::from_base64(text).ok_or_else(|| json(EXTRA, JsonFault::Base64)),
        _ => Err(json(EXTRA, JsonFault::Wanted("base64"))),
    }
}

fn put_fields(
    message: &'static Message,
    value: &Value,
    ignore: Option<&str>,
    path: &str,
    depth: usize,
    out: &mut Vec<u8>,
) -> Part<()> {
    let deeper = depth.checked_sub(1).ok_or_else(|| json(path, JsonFault::Depth))?;
    let shown = value.as_object().ok_or_else(|| json(path, JsonFault::Wanted("an object")))?;
    for name in shown.keys() {
        let known = message.fields.iter().any(|field| field.name == name);
        if !known && name != UNKNOWN && Some(name.as_str()) != ignore {
            return Err(json(&format!("{path}.{name}"), JsonFault::Field(message.name)));
        }
    }
    for field in message.fields {
        let path = || format!("{path}.{}", field.name);
        match (field.label, shown.get(field.name)) {
            (Label::Required, None) => return Err(json(&path(), JsonFault::Required(field.name))),
            (_, None) => {}
            (Label::Repeated, Some(value)) => {
                let values = value.as_array().ok_or_else(|| json(&path(), JsonFault::Wanted("an array")))?;
                if let Some(words) = values.first().and_then(|text| from_address(field, text)) {
                    for word in words {
                        put_tag(out, field.number, 0);
                        put_varint(out, word.into());
                    }
                    continue;
                }
                if field.packed {
                    let mut packed = Vec::new();
                    for value in values {
                        put_number(field, value, &path(), &mut packed)?;
                    }
                    put_bytes(out, field.number, &packed);
                    continue;
                }
                for value in values {
                    put_value(field, value, &path(), deeper, out)?;
                }
            }
            (_, Some(value)) => put_value(field, value, &path(), deeper, out)?,
        }
    }
    if let Some(unknown) = shown.get(UNKNOWN) {
        let bytes = raw_bytes(unknown)?;
        // It must at least be a message, or what follows it could not be read.
        for item in Fields::new(message.name, &bytes) {
            item?;
        }
        out.extend_from_slice(&bytes);
    }
    Ok(())
}

fn put_value(field: &'static Field, value: &Value, path: &str, depth: usize, out: &mut Vec<u8>) -> Part<()> {
    let wanted = |what| json(path, JsonFault::Wanted(what));
    match field.kind {
        Kind::Message(_) => {
            let mut bytes = Vec::new();
            if let Some(inner) = field.kind.message() {
                put_fields(inner, value, None, path, depth, &mut bytes)?;
            }
            put_bytes(out, field.number, &bytes);
        }
        Kind::Text => match value.as_str() {
            Some(text) => put_bytes(out, field.number, text.as_bytes()),
            None => {
                let raw = value.get(BASE64).and_then(Value::as_str).ok_or_else(|| wanted("text"))?;
                let bytes = encoding::from_base64(raw).ok_or_else(|| json(path, JsonFault::Base64))?;
                put_bytes(out, field.number, &bytes);
            }
        },
        Kind::Bytes => {
            let text = value.as_str().ok_or_else(|| wanted("text"))?;
            let bytes = match field.print.conv {
                "unix_name" => encoding::from_quoted(text),
                _ => encoding::from_base64(text).ok_or_else(|| json(path, JsonFault::Base64))?,
            };
            put_bytes(out, field.number, &bytes);
        }
        Kind::Fixed32 | Kind::Sfixed32 => {
            put_tag(out, field.number, 5);
            put_number(field, value, path, out)?;
        }
        Kind::Fixed64 | Kind::Sfixed64 => {
            put_tag(out, field.number, 1);
            put_number(field, value, path, out)?;
        }
        Kind::Int32
        | Kind::Int64
        | Kind::Uint32
        | Kind::Uint64
        | Kind::Sint32
        | Kind::Sint64
        | Kind::Bool
        | Kind::Enum(_) => {
            put_tag(out, field.number, 0);
            put_number(field, value, path, out)?;
        }
    }
    Ok(())
}

/// Appends a number, without its tag.
fn put_number(field: &'static Field, value: &Value, path: &str, out: &mut Vec<u8>) -> Part<()> {
    let range = |_| json(path, JsonFault::Range);
    let number = if let Value::Bool(value) = value { i128::from(*value) } else { from_number(field, value, path)? };
    let signed32 = || i32::try_from(number).map_err(range);
    let signed64 = || i64::try_from(number).map_err(range);
    let unsigned32 = || u32::try_from(number).map_err(range);
    let unsigned64 = || u64::try_from(number).map_err(range);
    match field.kind {
        Kind::Int32 | Kind::Enum(_) => put_varint(out, bits(signed32()?.into())),
        Kind::Int64 => put_varint(out, bits(signed64()?)),
        Kind::Uint32 => put_varint(out, unsigned32()?.into()),
        Kind::Uint64 => put_varint(out, unsigned64()?),
        Kind::Sint32 => {
            let value = signed32()?;
            put_varint(out, bits((value << 1 ^ value >> 31).into()) & u64::from(u32::MAX));
        }
        Kind::Sint64 => {
            let value = signed64()?;
            put_varint(out, bits(value << 1 ^ value >> 63));
        }
        Kind::Fixed32 => out.extend_from_slice(&unsigned32()?.to_le_bytes()),
        Kind::Fixed64 => out.extend_from_slice(&unsigned64()?.to_le_bytes()),
        Kind::Sfixed32 => out.extend_from_slice(&signed32()?.to_le_bytes()),
        Kind::Sfixed64 => out.extend_from_slice(&signed64()?.to_le_bytes()),
        Kind::Bool => match number {
            0 | 1 => put_varint(out, u64::from(number == 1)),
            _ => return Err(json(path, JsonFault::Wanted("true or false"))),
        },
        Kind::Text | Kind::Bytes | Kind::Message(_) => return Err(json(path, JsonFault::Wanted("no number"))),
    }
    Ok(())
}

fn from_number(field: &'static Field, value: &Value, path: &str) -> Part<i128> {
    if let Some(number) = value.as_i64() {
        return Ok(number.into());
    }
    if let Some(number) = value.as_u64() {
        return Ok(number.into());
    }
    let text = value.as_str().ok_or_else(|| json(path, JsonFault::Wanted("a number")))?;
    if let Some(number) = names::number(text).filter(|_| !text.contains(':')) {
        return Ok(number);
    }
    let print = &field.print;
    let unknown = |text: &str| json(path, JsonFault::Name(text.to_owned()));
    if let Some(values) = field.kind.values() {
        values.value_of(text).map(i128::from).ok_or_else(|| unknown(text))
    } else if print.dev {
        names::from_device(text, print.odev).map(i128::from).ok_or_else(|| unknown(text))
    } else if let Some(bits) = names::bits(print.flags) {
        names::from_flags(text, bits).map(i128::from).map_err(|part| unknown(&part))
    } else {
        let values = names::values(print.dict, field.name).unwrap_or(&[]);
        let value = values.iter().find(|(_, name)| *name == text).map(|(value, _)| i128::from(*value));
        value.ok_or_else(|| unknown(text))
    }
}

/// The words of an IP address, in the order of the network.
pub(super) fn from_address(field: &Field, value: &Value) -> Option<Vec<u32>> {
    if !field.print.address {
        return None;
    }
    let word = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).unwrap_or(0);
    Some(match value.as_str()?.parse().ok()? {
        std::net::IpAddr::V4(address) => vec![word(&address.octets())],
        std::net::IpAddr::V6(address) => address.octets().chunks(4).map(word).collect(),
    })
}
