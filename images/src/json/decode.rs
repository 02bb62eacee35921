//! Entries to JSON, driven by the table of fields.

use prost::Name as _;
use serde_json::{Map, Value};

use super::extra::Extra;
use super::{encoding, known, names, Part, Style, BASE64, EXTRA, UNKNOWN};
use crate::error::{Malformed, Result};
use crate::framing::{self, Reader};
use crate::proto::{
    BpfmapDataEntry, GhostChunkEntry, GhostFileEntry, IpcMsgEntry, IpcSemEntry, IpcShmEntry, PipeDataEntry,
    SkPacketEntry, TcpStreamEntry,
};
use crate::schema::{self, Field, Kind, Label, Message};
use crate::table::Payload;
use crate::wire::{bits, put_tag, put_varint, Fields, Scalar};

/// An image as JSON. Its kind is told by its magics; `name` is for errors only.
///
/// # Errors
/// If it is no image, or malformed.
pub fn decode(name: &str, bytes: &[u8], style: Style) -> Result<Value> {
    let kind = framing::kind_of(name, bytes)?;
    let mut reader = Reader::new(kind, name, bytes)?;
    let mut entries = Vec::new();
    match kind.payload() {
        Payload::None => plain(&mut reader, kind.entry(), style, &mut entries)?,
        Payload::Pagemap => pagemap(&mut reader, style, &mut entries)?,
        Payload::PipeData => with_payload::<PipeDataEntry>(&mut reader, style, &mut entries)?,
        Payload::SocketQueue => with_payload::<SkPacketEntry>(&mut reader, style, &mut entries)?,
        Payload::IpcShm => with_payload::<IpcShmEntry>(&mut reader, style, &mut entries)?,
        Payload::IpcMsg => with_payload::<IpcMsgEntry>(&mut reader, style, &mut entries)?,
        Payload::IpcSem => with_payload::<IpcSemEntry>(&mut reader, style, &mut entries)?,
        Payload::TcpStream => with_payload::<TcpStreamEntry>(&mut reader, style, &mut entries)?,
        Payload::BpfMap => with_payload::<BpfmapDataEntry>(&mut reader, style, &mut entries)?,
        Payload::Ghost => ghost(&mut reader, style, &mut entries)?,
    }
    let mut image = Map::new();
    image.insert("magic".to_owned(), kind.name().into());
    image.insert("entries".to_owned(), entries.into());
    Ok(image.into())
}

fn plain(reader: &mut Reader<'_>, entry: Option<&'static str>, style: Style, entries: &mut Vec<Value>) -> Result<()> {
    while let Some(fields) = next(reader, entry, style)? {
        entries.push(fields.into());
    }
    Ok(())
}

/// The next entry's fields.
fn next(reader: &mut Reader<'_>, entry: Option<&'static str>, style: Style) -> Result<Option<Map<String, Value>>> {
    let mut shown = reader.clone();
    let Some(bytes) = reader.next_bytes()? else { return Ok(None) };
    // The entry is counted once it is read, and an error names the one it is in.
    let fields = shown.with_cursor(|_| fields(known(entry)?, bytes, style.pretty, false, schema::DEPTH))?;
    Ok(Some(fields))
}

fn pagemap(reader: &mut Reader<'_>, style: Style, entries: &mut Vec<Value>) -> Result<()> {
    if let Some(head) = next(reader, Some("pagemap_head"), style)? {
        entries.push(head.into());
    }
    plain(reader, Some("pagemap_entry"), style, entries)
}

fn ghost(reader: &mut Reader<'_>, style: Style, entries: &mut Vec<Value>) -> Result<()> {
    let mut ahead = reader.clone();
    let Some(mut head) = next(reader, Some(GhostFileEntry::NAME), style)? else { return Ok(()) };
    let entry: Option<GhostFileEntry> = ahead.next_entry()?;
    if !entry.and_then(|entry| entry.chunks).unwrap_or(false) {
        let content = reader.rest();
        if style.payload {
            head.insert(EXTRA.to_owned(), encoding::base64(content).into());
        }
        entries.push(head.into());
        return Ok(());
    }
    entries.push(head.into());
    loop {
        let mut ahead = reader.clone();
        let Some(mut chunk) = next(reader, Some(GhostChunkEntry::NAME), style)? else { return Ok(()) };
        let entry: Option<GhostChunkEntry> = ahead.next_entry()?;
        let content = reader.take(entry.map_or(0, |entry| entry.len))?;
        if style.payload {
            chunk.insert(EXTRA.to_owned(), encoding::base64(content).into());
        }
        entries.push(chunk.into());
    }
}

fn with_payload<T: Extra>(reader: &mut Reader<'_>, style: Style, entries: &mut Vec<Value>) -> Result<()> {
    loop {
        let mut ahead = reader.clone();
        let Some(mut shown) = next(reader, Some(T::NAME), style)? else { return Ok(()) };
        let Some((entry, payload)) = ahead.next_with_payload::<T>()? else { return Ok(()) };
        *reader = ahead;
        let extra = if style.payload {
            reader.with_cursor(|_| entry.show(&payload))?
        } else {
            format!("... <{}>", size_for_people(entry.size(&payload))).into()
        };
        shown.insert(EXTRA.to_owned(), extra);
        entries.push(shown.into());
    }
}

/// A size with a unit, rounded to a tenth of it.
#[allow(clippy::cast_precision_loss)] // Sizes past 2^53 are not shown to the byte.
pub(super) fn size_for_people(size: u64) -> String {
    let mut size = size as f64;
    for unit in ["", "K", "M", "G", "T", "P"] {
        if size < 1024.0 {
            return if size.fract() == 0.0 { format!("{size:.0}{unit}B") } else { format!("{size:.1}{unit}B") };
        }
        size /= 1024.0;
    }
    format!("{size:.1}EB")
}

/// The fields of a message as JSON. `hex` is inherited from the field that holds the message.
pub(super) fn fields(
    message: &'static Message,
    bytes: &[u8],
    pretty: bool,
    hex: bool,
    depth: usize,
) -> Part<Map<String, Value>> {
    let deeper = depth.checked_sub(1).ok_or(Malformed::Depth { limit: schema::DEPTH })?;
    let mut found: Vec<Vec<Scalar<'_>>> = message.fields.iter().map(|_| Vec::new()).collect();
    let mut unknown = Vec::new();
    for item in Fields::new(message.name, bytes) {
        let item = item?;
        let Some((place, field)) = message.field(item.number) else {
            unknown.extend_from_slice(item.whole);
            continue;
        };
        item.scalars(message, field, |scalar| {
            if let (Some(values), Scalar::Signed(value)) = (field.kind.values(), scalar) {
                if i32::try_from(value).ok().and_then(|value| values.name_of(value)).is_none() {
                    put_tag(&mut unknown, field.number, 0);
                    put_varint(&mut unknown, bits(value));
                    return Ok(());
                }
            }
            found[place].push(scalar);
            Ok(())
        })?;
    }

    let mut shown = Map::new();
    for (field, values) in message.fields.iter().zip(found) {
        let hex = hex || field.print.hex;
        let value = match (field.label, values.last()) {
            (Label::Required, None) => {
                return Err(Malformed::Required { message: message.name, field: field.name });
            }
            (_, None) => continue,
            (Label::Repeated, Some(_)) => match address(field, &values).filter(|_| pretty) {
                Some(address) => vec![Value::from(address)].into(),
                None => {
                    let values = values.iter().map(|value| self::value(field, *value, pretty, hex, deeper));
                    values.collect::<Part<Vec<Value>>>()?.into()
                }
            },
            // A message that is there twice is both put together.
            (_, Some(Scalar::Bytes(_))) if values.len() > 1 && field.kind.message().is_some() => {
                let parts = values.iter().filter_map(|value| match value {
                    Scalar::Bytes(bytes) => Some(*bytes),
                    _ => None,
                });
                let whole = parts.collect::<Vec<_>>().concat();
                self::value(field, Scalar::Bytes(&whole), pretty, hex, deeper)?
            }
            (_, Some(last)) => self::value(field, *last, pretty, hex, deeper)?,
        };
        shown.insert(field.name.to_owned(), value);
    }
    if !unknown.is_empty() {
        shown.insert(UNKNOWN.to_owned(), encoding::base64(&unknown).into());
    }
    Ok(shown)
}

fn value(field: &'static Field, scalar: Scalar<'_>, pretty: bool, hex: bool, depth: usize) -> Part<Value> {
    Ok(match scalar {
        Scalar::Bytes(bytes) => match field.kind {
            Kind::Message(_) => match field.kind.message() {
                Some(inner) => fields(inner, bytes, pretty, hex, depth)?.into(),
                None => Value::Null,
            },
            Kind::Text => text_value(bytes),
            _ if field.print.conv == "unix_name" => encoding::quoted(bytes).into(),
            _ => encoding::base64(bytes).into(),
        },
        Scalar::Bool(value) => value.into(),
        Scalar::Signed(value) => match field.kind.values() {
            Some(values) => i32::try_from(value).ok().and_then(|value| values.name_of(value)).into(),
            None if pretty && hex => match value {
                ..0 => format!("-{:#x}", value.unsigned_abs()).into(),
                0.. => format!("{value:#x}").into(),
            },
            None => match u64::try_from(value) {
                Ok(value) if pretty => number(field, value, hex),
                _ => value.into(),
            },
        },
        Scalar::Unsigned(value) if pretty => number(field, value, hex),
        Scalar::Unsigned(value) => value.into(),
    })
}

fn text_value(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => {
            let mut raw = Map::new();
            raw.insert(BASE64.to_owned(), encoding::base64(bytes).into());
            raw.into()
        }
    }
}

/// A number as its field is shown to people.
fn number(field: &Field, value: u64, hex: bool) -> Value {
    if hex {
        format!("{value:#x}").into()
    } else if field.print.dev {
        names::device(value, field.print.odev).into()
    } else if !field.print.flags.is_empty() {
        match names::bits(field.print.flags) {
            Some(bits) => names::flags(value, bits).into(),
            None => format!("{value:#x}").into(),
        }
    } else {
        let name = names::values(field.print.dict, field.name)
            .and_then(|values| values.iter().find(|(known, _)| *known == value));
        name.map_or_else(|| value.into(), |(_, name)| (*name).into())
    }
}

/// An IP address, whose words are in the order of the network.
pub(super) fn address(field: &Field, values: &[Scalar<'_>]) -> Option<String> {
    if !field.print.address {
        return None;
    }
    let mut bytes = Vec::new();
    for value in values {
        let Scalar::Unsigned(value) = value else { return None };
        bytes.extend_from_slice(&u32::try_from(*value).ok()?.to_le_bytes());
    }
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some(std::net::Ipv4Addr::from(bytes).to_string());
    }
    Some(show_ipv6(<[u8; 16]>::try_from(bytes).ok()?))
}

/// An IPv6 address in words only: crit never writes the last 32 bits as those of an IPv4 address.
fn show_ipv6(bytes: [u8; 16]) -> String {
    let address = std::net::Ipv6Addr::from(bytes);
    match address.to_string() {
        text if !text.contains('.') => text,
        _ => {
            // Only ::ffff:a.b.c.d and ::a.b.c.d are written with dots: leading zero words and at most three others.
            let words: Vec<String> =
                address.segments().iter().skip_while(|word| **word == 0).map(|word| format!("{word:x}")).collect();
            format!("::{}", words.join(":"))
        }
    }
}
