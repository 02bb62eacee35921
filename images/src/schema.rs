//! The messages as data: every field's number, type and manner of being shown, and the check of an entry's bytes.
//!
//! The table is generated from `proto/*.proto` at build time. [`check`] runs before a message is decoded into its Rust
//! type: it finds missing required fields, unknown enum values, wrong types and deep nesting, which a protobuf decoder
//! lets pass or answers with a default. Fields that the table lacks are let pass: later versions may add them.

use crate::error::Malformed;
use crate::wire::{Fields, Scalar};

/// How deep messages may be nested.
pub(crate) const DEPTH: usize = 64;

/// A message type.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) name: &'static str,
    /// By ascending number.
    pub(crate) fields: &'static [Field],
}

/// A field of a message type.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) name: &'static str,
    pub(crate) label: Label,
    pub(crate) kind: Kind,
    pub(crate) packed: bool,
    pub(crate) print: Print,
}

/// How often a field is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Label {
    Optional,
    Required,
    Repeated,
}

/// The type of a field; messages and enums by their place in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code)] // Not every type of protobuf occurs in an image today.
pub(crate) enum Kind {
    Int32,
    Int64,
    Uint32,
    Uint64,
    Sint32,
    Sint64,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
    Bool,
    Text,
    Bytes,
    Enum(usize),
    Message(usize),
}

/// How a field is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Print {
    /// As hexadecimal.
    pub(crate) hex: bool,
    /// As an IP address.
    pub(crate) address: bool,
    /// As major:minor of a device, in the kernel's own encoding.
    pub(crate) dev: bool,
    /// If `dev`: in the encoding that programs see.
    pub(crate) odev: bool,
    /// As names of flags.
    pub(crate) flags: &'static str,
    /// As one of a set of names.
    pub(crate) dict: &'static str,
    /// As another form of text.
    pub(crate) conv: &'static str,
}

/// An enum type.
#[derive(Debug)]
pub(crate) struct Enum {
    #[allow(dead_code)] // For debugging output.
    pub(crate) name: &'static str,
    pub(crate) values: &'static [(&'static str, i32)],
}

mod generated {
    use super::{Enum, Field, Kind, Label, Message, Print};
    include!(concat!(env!("OUT_DIR"), "/schema.rs"));
}

/// The fields of an encoded message that the table does not know, those of messages inside of it included, as
/// `message.number`. What cannot be read ends the list: decoding says why.
pub fn unknown_fields(message: &str, bytes: &[u8]) -> Vec<String> {
    let mut unknown = Vec::new();
    if let Some(message) = self::message(message) {
        collect_unknown(message, bytes, DEPTH, &mut unknown);
    }
    unknown
}

fn collect_unknown(message: &'static Message, bytes: &[u8], depth: usize, unknown: &mut Vec<String>) {
    for item in Fields::new(message.name, bytes) {
        let Ok(item) = item else { return };
        match (message.field(item.number), item.value) {
            (None, _) => unknown.push(format!("{}.{}", message.name, item.number)),
            (Some((_, field)), crate::wire::Raw::Bytes(inner)) if depth > 0 => {
                if let Some(message) = field.kind.message() {
                    collect_unknown(message, inner, depth - 1, unknown);
                }
            }
            (Some(_), _) => {}
        }
    }
}

/// The message type of this name.
pub(crate) fn message(name: &str) -> Option<&'static Message> {
    let place = generated::MESSAGES.binary_search_by(|message| message.name.cmp(name)).ok()?;
    generated::MESSAGES.get(place)
}

impl Message {
    /// The field of this number.
    pub(crate) fn field(&self, number: u32) -> Option<(usize, &'static Field)> {
        let place = self.fields.binary_search_by_key(&number, |field| field.number).ok()?;
        Some((place, self.fields.get(place)?))
    }
}

impl Kind {
    /// The message type that a field of this type holds.
    pub(crate) fn message(self) -> Option<&'static Message> {
        match self {
            Self::Message(place) => generated::MESSAGES.get(place),
            _ => None,
        }
    }

    /// The enum type of a field of this type.
    pub(crate) fn values(self) -> Option<&'static Enum> {
        match self {
            Self::Enum(place) => generated::ENUMS.get(place),
            _ => None,
        }
    }

    /// Whether several values may be packed into one.
    pub(crate) fn is_packable(self) -> bool {
        !matches!(self, Self::Text | Self::Bytes | Self::Message(_))
    }
}

impl Enum {
    /// The name of a value.
    pub(crate) fn name_of(&self, value: i32) -> Option<&'static str> {
        self.values.iter().find(|(_, known)| *known == value).map(|(name, _)| *name)
    }

    /// The value of a name.
    pub(crate) fn value_of(&self, name: &str) -> Option<i32> {
        self.values.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }
}

/// Finds what is wrong with an encoded message.
pub(crate) fn check(message: &'static Message, bytes: &[u8]) -> Result<(), Malformed> {
    check_at(message, bytes, DEPTH)
}

fn check_at(message: &'static Message, bytes: &[u8], depth: usize) -> Result<(), Malformed> {
    let deeper = depth.checked_sub(1).ok_or(Malformed::Depth { limit: DEPTH })?;
    // One bit a field; no message has as many fields as bits (a test holds that).
    let mut seen = 0_u128;
    // Fields mostly come in order, or again.
    let mut last = 0;
    for item in Fields::new(message.name, bytes) {
        let item = item?;
        let guess = [last, last + 1].into_iter().find_map(|place| {
            let field = message.fields.get(place).filter(|field| field.number == item.number)?;
            Some((place, field))
        });
        let Some((place, field)) = guess.or_else(|| message.field(item.number)) else { continue };
        last = place;
        seen |= 1_u128.checked_shl(u32::try_from(place).unwrap_or(u32::MAX)).unwrap_or(0);
        item.scalars(message, field, |scalar| match (scalar, field.kind.message(), field.kind.values()) {
            (Scalar::Bytes(inner), Some(inner_type), _) => check_at(inner_type, inner, deeper),
            (Scalar::Signed(value), _, Some(values)) => {
                let known = i32::try_from(value).ok().filter(|value| values.name_of(*value).is_some());
                match known {
                    Some(_) => Ok(()),
                    None => Err(Malformed::EnumValue {
                        message: message.name,
                        field: field.name,
                        value: i32::try_from(value).unwrap_or(i32::MIN),
                    }),
                }
            }
            _ => Ok(()),
        })?;
    }
    for (place, field) in message.fields.iter().enumerate() {
        let bit = 1_u128.checked_shl(u32::try_from(place).unwrap_or(u32::MAX)).unwrap_or(0);
        if field.label == Label::Required && seen & bit == 0 {
            return Err(Malformed::Required { message: message.name, field: field.name });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_small_enough() {
        assert!(generated::MESSAGES.is_sorted_by_key(|message| message.name));
        for message in &generated::MESSAGES {
            assert!(message.fields.is_sorted_by_key(|field| field.number), "{}", message.name);
            assert!(message.fields.len() <= 128, "{}", message.name);
        }
        for e in &generated::ENUMS {
            assert!(!e.values.is_empty(), "{}", e.name);
        }
    }

    #[test]
    fn missing_and_unknown() {
        let pipe = message("pipe_data_entry").unwrap();
        assert!(check(pipe, &[8, 1, 16, 2]).is_ok());
        assert!(check(pipe, &[8, 1, 16, 2, 0xf8, 0x07, 1]).is_ok(), "an unknown field");
        assert!(matches!(check(pipe, &[8, 1]), Err(Malformed::Required { field: "bytes", .. })));
        assert!(matches!(check(pipe, &[8]), Err(Malformed::Message { .. })));
        assert!(matches!(check(pipe, &[10, 1, 0, 16, 2]), Err(Malformed::WireType { .. })));
        let file = message("fdinfo_entry").unwrap();
        assert!(check(file, &[8, 1, 16, 0, 24, 1, 32, 0]).is_ok());
        assert!(matches!(check(file, &[8, 1, 16, 0, 24, 99, 32, 0]), Err(Malformed::EnumValue { value: 99, .. })));
    }

    #[test]
    fn nesting_is_bounded() {
        let namespaces = message("apparmor_entry").unwrap();
        let mut bytes: Vec<u8> = Vec::new();
        for _ in 0..10_000 {
            let mut outer = vec![10, 0];
            outer.push(0x1a);
            prost::encode_length_delimiter(bytes.len(), &mut outer).unwrap();
            outer.extend_from_slice(&bytes);
            bytes = outer;
        }
        let mut entry = vec![0x0a];
        prost::encode_length_delimiter(bytes.len(), &mut entry).unwrap();
        entry.extend_from_slice(&bytes);
        assert!(matches!(check(namespaces, &entry), Err(Malformed::Depth { .. })));
    }
}
