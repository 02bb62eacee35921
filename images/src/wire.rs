//! Protobuf's wire format, as far as the check of entries and the JSON form need it: fields one after another, without
//! allocation, each bounded by what is there.

use crate::error::Malformed;
use crate::schema::{Field, Kind, Message};

/// One encoded field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Item<'a> {
    pub(crate) number: u32,
    pub(crate) value: Raw<'a>,
    /// The field with its tag, as it was encoded.
    pub(crate) whole: &'a [u8],
}

/// A value, by how it is encoded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Raw<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

/// A value, as its field's type has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar<'a> {
    Signed(i64),
    Unsigned(u64),
    Bool(bool),
    /// Text, bytes or a message.
    Bytes(&'a [u8]),
}

/// The fields of an encoded message.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(message: &'static str, bytes: &'a [u8]) -> Self {
        Self { message, rest: bytes }
    }

    fn item(&mut self) -> Option<Item<'a>> {
        let begin = self.rest;
        let tag = varint(&mut self.rest)?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| (1..1 << 29).contains(number))?;
        let value = match tag & 7 {
            0 => Raw::Varint(varint(&mut self.rest)?),
            1 => Raw::Fixed64(u64::from_le_bytes(take(&mut self.rest, 8)?.try_into().ok()?)),
            2 => {
                let size = varint(&mut self.rest)?;
                Raw::Bytes(take(&mut self.rest, usize::try_from(size).ok()?)?)
            }
            5 => Raw::Fixed32(u32::from_le_bytes(take(&mut self.rest, 4)?.try_into().ok()?)),
            // Groups (3 and 4) were never used in an image.
            _ => return None,
        };
        let whole = begin.get(..begin.len().checked_sub(self.rest.len())?)?;
        Some(Item { number, value, whole })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Item<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let item = self.item();
        if item.is_none() {
            self.rest = &[];
        }
        Some(item.ok_or(Malformed::Message { message: self.message }))
    }
}

impl<'a> Item<'a> {
    /// Hands on each value of this field: one, or several if they are packed.
    pub(crate) fn scalars(
        &self,
        message: &'static Message,
        field: &'static Field,
        mut each: impl FnMut(Scalar<'a>) -> Result<(), Malformed>,
    ) -> Result<(), Malformed> {
        let wrong = || Malformed::WireType { message: message.name, field: field.name };
        match self.value {
            Raw::Bytes(bytes) if !field.kind.is_packable() => each(Scalar::Bytes(bytes)),
            Raw::Bytes(mut bytes) if field.label == crate::schema::Label::Repeated => {
                while !bytes.is_empty() {
                    let raw = match field.kind {
                        Kind::Fixed64 | Kind::Sfixed64 => take(&mut bytes, 8)
                            .and_then(|b| b.try_into().ok())
                            .map(u64::from_le_bytes)
                            .map(Raw::Fixed64),
                        Kind::Fixed32 | Kind::Sfixed32 => take(&mut bytes, 4)
                            .and_then(|b| b.try_into().ok())
                            .map(u32::from_le_bytes)
                            .map(Raw::Fixed32),
                        _ => varint(&mut bytes).map(Raw::Varint),
                    };
                    each(raw.and_then(|raw| scalar(field.kind, raw)).ok_or_else(wrong)?)?;
                }
                Ok(())
            }
            raw => each(scalar(field.kind, raw).ok_or_else(wrong)?),
        }
    }
}

/// A number as its type has it; like every protobuf decoder, of too large a number the low bits are taken.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
fn scalar(kind: Kind, raw: Raw<'_>) -> Option<Scalar<'_>> {
    Some(match (kind, raw) {
        (Kind::Int32 | Kind::Enum(_), Raw::Varint(value)) => Scalar::Signed(i64::from(value as i32)),
        (Kind::Int64, Raw::Varint(value)) => Scalar::Signed(value as i64),
        (Kind::Uint32, Raw::Varint(value)) => Scalar::Unsigned(u64::from(value as u32)),
        (Kind::Uint64, Raw::Varint(value)) => Scalar::Unsigned(value),
        (Kind::Sint32, Raw::Varint(value)) => {
            let value = value as u32;
            Scalar::Signed(i64::from((value >> 1) as i32 ^ -((value & 1) as i32)))
        }
        (Kind::Sint64, Raw::Varint(value)) => Scalar::Signed((value >> 1) as i64 ^ -((value & 1) as i64)),
        (Kind::Bool, Raw::Varint(value)) => Scalar::Bool(value != 0),
        (Kind::Fixed64, Raw::Fixed64(value)) => Scalar::Unsigned(value),
        (Kind::Sfixed64, Raw::Fixed64(value)) => Scalar::Signed(value as i64),
        (Kind::Fixed32, Raw::Fixed32(value)) => Scalar::Unsigned(u64::from(value)),
        (Kind::Sfixed32, Raw::Fixed32(value)) => Scalar::Signed(i64::from(value as i32)),
        _ => return None,
    })
}

fn take<'a>(bytes: &mut &'a [u8], size: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(size)?;
    *bytes = rest;
    Some(head)
}

#[inline]
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    // Most are of one byte.
    if let Some((&byte, rest)) = bytes.split_first().filter(|(byte, _)| **byte < 0x80) {
        *bytes = rest;
        return Some(byte.into());
    }
    let mut value = 0_u64;
    for shift in (0..70).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// A negative number as it is encoded: its bits.
#[allow(clippy::cast_sign_loss)]
pub(crate) fn bits(value: i64) -> u64 {
    value as u64
}

/// Appends a varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, value: u64) {
    prost::encoding::encode_varint(value, out);
}

/// Appends the tag of a field.
pub(crate) fn put_tag(out: &mut Vec<u8>, number: u32, wire_type: u8) {
    put_varint(out, u64::from(number) << 3 | u64::from(wire_type));
}

/// Appends a field of bytes with its tag.
pub(crate) fn put_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_tag(out, number, 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}
