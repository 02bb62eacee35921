//! What follows entries: raw bytes whose size the entry tells.

use crate::error::Malformed;
use crate::framing::Entry;
use crate::proto::{
    BpfmapDataEntry, IpcMsg, IpcMsgEntry, IpcSemEntry, IpcShmEntry, PipeDataEntry, SkPacketEntry, TcpStreamEntry,
};
use crate::schema;

type Part<T> = std::result::Result<T, Malformed>;
/// The size that an entry states, and the one that was given.
type Sizes<T> = std::result::Result<T, (u64, u64)>;

/// A message that raw bytes follow.
pub trait WithPayload: Entry {
    /// What follows.
    type Payload<'a>;

    /// Reads what follows this entry.
    ///
    /// # Errors
    /// If less is there than the entry says.
    fn read_payload<'a>(&self, bytes: &mut Cursor<'a>) -> Part<Self::Payload<'a>>;

    /// Appends what follows this entry.
    ///
    /// # Errors
    /// If it is not as long as the entry says: with both numbers, the stated one first.
    fn write_payload(&self, payload: &Self::Payload<'_>, out: &mut Vec<u8>) -> Sizes<()>;
}

/// Bytes that are taken from the front.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes were taken.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at as u64
    }

    /// The bytes that are left.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or(&[])
    }

    /// Takes `size` bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn take(&mut self, size: u64) -> Part<&'a [u8]> {
        let rest = self.rest();
        let taken = usize::try_from(size).ok().and_then(|size| rest.get(..size));
        let taken = taken.ok_or(Malformed::Truncated { wanted: size, left: rest.len() as u64 })?;
        self.at += taken.len();
        Ok(taken)
    }

    /// Takes `size` bytes and the padding after them, to a multiple of `unit` (a power of two).
    fn take_padded(&mut self, size: u64, unit: u64) -> Part<&'a [u8]> {
        let padding = padding(size, unit);
        let taken = self.take(size)?;
        self.take(padding)?;
        Ok(taken)
    }

    pub(crate) fn take_u32(&mut self) -> Part<u32> {
        let bytes = self.take(4)?;
        Ok(bytes.try_into().map(u32::from_le_bytes).unwrap_or(0))
    }

    /// Takes all that is left.
    pub(crate) fn take_rest(&mut self) -> &'a [u8] {
        let rest = self.rest();
        self.at += rest.len();
        rest
    }

    /// Takes a size and as many bytes.
    pub(crate) fn take_sized(&mut self) -> Part<&'a [u8]> {
        let size = self.take_u32()?;
        self.take(size.into())
    }

    fn take_message<T: Entry>(&mut self) -> Part<T> {
        decode(self.take_sized()?)
    }
}

/// Checks and decodes one message.
pub(crate) fn decode<T: Entry>(bytes: &[u8]) -> Part<T> {
    if let Some(message) = schema::message(T::NAME) {
        schema::check(message, bytes)?;
    }
    Ok(T::decode(bytes)?)
}

/// Appends the size of a message, and the message.
pub(crate) fn put_message<T: Entry>(message: &T, out: &mut Vec<u8>) {
    let size = message.encoded_len();
    // A message larger than 4 GiB does not fit into memory structures that were read from a kernel.
    out.extend_from_slice(&u32::try_from(size).unwrap_or(u32::MAX).to_le_bytes());
    out.reserve(size);
    message.encode_raw(out);
}

fn padding(size: u64, unit: u64) -> u64 {
    size.wrapping_neg() & (unit - 1)
}

fn put_padded(bytes: &[u8], unit: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(bytes);
    out.extend((0..padding(bytes.len() as u64, unit)).map(|_| 0));
}

fn same_size(stated: u64, bytes: &[u8]) -> Sizes<()> {
    let given = bytes.len() as u64;
    if stated == given {
        Ok(())
    } else {
        Err((stated, given))
    }
}

macro_rules! plain_payload {
    ($entry:ty, $size:ident) => {
        impl WithPayload for $entry {
            type Payload<'a> = &'a [u8];

            fn read_payload<'a>(&self, bytes: &mut Cursor<'a>) -> Part<&'a [u8]> {
                bytes.take(self.$size.into())
            }

            fn write_payload(&self, payload: &&[u8], out: &mut Vec<u8>) -> Sizes<()> {
                same_size(self.$size.into(), payload)?;
                out.extend_from_slice(payload);
                Ok(())
            }
        }
    };
}

plain_payload!(PipeDataEntry, bytes);
plain_payload!(SkPacketEntry, length);

impl IpcShmEntry {
    /// How many bytes follow the entry.
    fn inline_size(&self) -> u64 {
        if self.in_pagemaps.unwrap_or(false) {
            0
        } else {
            self.size
        }
    }
}

impl WithPayload for IpcShmEntry {
    /// Nothing if `in_pagemaps` is set.
    type Payload<'a> = &'a [u8];

    fn read_payload<'a>(&self, bytes: &mut Cursor<'a>) -> Part<&'a [u8]> {
        bytes.take_padded(self.inline_size(), 4)
    }

    fn write_payload(&self, payload: &&[u8], out: &mut Vec<u8>) -> Sizes<()> {
        same_size(self.inline_size(), payload)?;
        put_padded(payload, 4, out);
        Ok(())
    }
}

impl WithPayload for IpcMsgEntry {
    type Payload<'a> = Vec<(IpcMsg, &'a [u8])>;

    fn read_payload<'a>(&self, bytes: &mut Cursor<'a>) -> Part<Self::Payload<'a>> {
        let mut messages = Vec::new();
        for _ in 0..self.qnum {
            let message: IpcMsg = bytes.take_message()?;
            let text = bytes.take_padded(message.msize.into(), 8)?;
            messages.push((message, text));
        }
        Ok(messages)
    }

    fn write_payload(&self, payload: &Self::Payload<'_>, out: &mut Vec<u8>) -> Sizes<()> {
        let given = payload.len() as u64;
        if u64::from(self.qnum) != given {
            return Err((self.qnum.into(), given));
        }
        for (message, text) in payload {
            same_size(message.msize.into(), text)?;
            put_message(message, out);
            put_padded(text, 8, out);
        }
        Ok(())
    }
}

impl WithPayload for IpcSemEntry {
    type Payload<'a> = Vec<u16>;

    fn read_payload(&self, bytes: &mut Cursor<'_>) -> Part<Vec<u16>> {
        let values = bytes.take_padded(u64::from(self.nsems) * 2, 8)?;
        Ok(values.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect())
    }

    fn write_payload(&self, payload: &Vec<u16>, out: &mut Vec<u8>) -> Sizes<()> {
        let bytes: Vec<u8> = payload.iter().flat_map(|value| value.to_le_bytes()).collect();
        same_size(u64::from(self.nsems) * 2, &bytes)?;
        put_padded(&bytes, 8, out);
        Ok(())
    }
}

impl WithPayload for TcpStreamEntry {
    /// What was received and not read, and what was sent and not acknowledged or not sent yet.
    type Payload<'a> = (&'a [u8], &'a [u8]);

    fn read_payload<'a>(&self, bytes: &mut Cursor<'a>) -> Part<Self::Payload<'a>> {
        Ok((bytes.take(self.inq_len.into())?, bytes.take(self.outq_len.into())?))
    }

    fn write_payload(&self, payload: &Self::Payload<'_>, out: &mut Vec<u8>) -> Sizes<()> {
        same_size(self.inq_len.into(), payload.0)?;
        same_size(self.outq_len.into(), payload.1)?;
        out.extend_from_slice(payload.0);
        out.extend_from_slice(payload.1);
        Ok(())
    }
}

impl WithPayload for BpfmapDataEntry {
    /// Keys and values.
    type Payload<'a> = (&'a [u8], &'a [u8]);

    fn read_payload<'a>(&self, bytes: &mut Cursor<'a>) -> Part<Self::Payload<'a>> {
        Ok((bytes.take(self.keys_bytes.into())?, bytes.take(self.values_bytes.into())?))
    }

    fn write_payload(&self, payload: &Self::Payload<'_>, out: &mut Vec<u8>) -> Sizes<()> {
        same_size(self.keys_bytes.into(), payload.0)?;
        same_size(self.values_bytes.into(), payload.1)?;
        out.extend_from_slice(payload.0);
        out.extend_from_slice(payload.1);
        Ok(())
    }
}
