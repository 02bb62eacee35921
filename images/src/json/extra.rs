//! What follows an entry, as JSON and back.

use prost::Name as _;
use serde_json::{Map, Value};

use super::decode::fields;
use super::encode::{put_typed, raw_bytes};
use super::{encoding, json, known, Part, EXTRA};
use crate::error::JsonFault;
use crate::payload::WithPayload;
use crate::proto::{
    BpfmapDataEntry, IpcMsg, IpcMsgEntry, IpcSemEntry, IpcShmEntry, PipeDataEntry, SkPacketEntry, TcpStreamEntry,
};
use crate::schema;

/// What follows an entry, as JSON.
pub(super) trait Extra: WithPayload {
    /// The payload as JSON.
    fn show(&self, payload: &Self::Payload<'_>) -> Part<Value>;
    /// How large it is.
    fn size(&self, payload: &Self::Payload<'_>) -> u64;
    /// Appends the payload that the JSON means.
    fn put(&self, extra: &Value, out: &mut Vec<u8>) -> Part<()>;
}

/// Appends a payload, which must be of the size that the entry says.
fn put_payload<T: WithPayload>(entry: &T, payload: &T::Payload<'_>, out: &mut Vec<u8>) -> Part<()> {
    entry
        .write_payload(payload, out)
        .map_err(|_| json(EXTRA, JsonFault::Wanted("a payload of the size that the entry says")))
}

macro_rules! plain_extra {
    ($($entry:ty),*) => {
        $(impl Extra for $entry {
            fn show(&self, payload: &&[u8]) -> Part<Value> {
                Ok(encoding::base64(payload).into())
            }

            fn size(&self, payload: &&[u8]) -> u64 {
                payload.len() as u64
            }

            fn put(&self, extra: &Value, out: &mut Vec<u8>) -> Part<()> {
                put_payload(self, &raw_bytes(extra)?.as_slice(), out)
            }
        })*
    };
}

plain_extra!(PipeDataEntry, SkPacketEntry, IpcShmEntry);

impl Extra for BpfmapDataEntry {
    fn show(&self, payload: &Self::Payload<'_>) -> Part<Value> {
        Ok(encoding::base64(&[payload.0, payload.1].concat()).into())
    }

    fn size(&self, payload: &Self::Payload<'_>) -> u64 {
        payload.0.len() as u64 + payload.1.len() as u64
    }

    fn put(&self, extra: &Value, out: &mut Vec<u8>) -> Part<()> {
        let bytes = raw_bytes(extra)?;
        let keys = usize::try_from(self.keys_bytes).unwrap_or(usize::MAX).min(bytes.len());
        put_payload(self, &bytes.split_at(keys), out)
    }
}

impl Extra for TcpStreamEntry {
    fn show(&self, payload: &Self::Payload<'_>) -> Part<Value> {
        let mut queues = Map::new();
        queues.insert("inq".to_owned(), encoding::base64(payload.0).into());
        queues.insert("outq".to_owned(), encoding::base64(payload.1).into());
        Ok(queues.into())
    }

    fn size(&self, payload: &Self::Payload<'_>) -> u64 {
        payload.0.len() as u64 + payload.1.len() as u64
    }

    fn put(&self, extra: &Value, out: &mut Vec<u8>) -> Part<()> {
        let queue = |name| raw_bytes(extra.get(name).unwrap_or(&Value::Null));
        put_payload(self, &(queue("inq")?.as_slice(), queue("outq")?.as_slice()), out)
    }
}

impl Extra for IpcSemEntry {
    fn show(&self, payload: &Vec<u16>) -> Part<Value> {
        Ok(payload.clone().into())
    }

    fn size(&self, payload: &Vec<u16>) -> u64 {
        payload.len() as u64 * 2
    }

    fn put(&self, extra: &Value, out: &mut Vec<u8>) -> Part<()> {
        let wanted = || json(EXTRA, JsonFault::Wanted("an array of 16-bit numbers"));
        let values = match extra {
            Value::Null => &[],
            extra => extra.as_array().ok_or_else(wanted)?.as_slice(),
        };
        let values = values.iter().map(|value| value.as_u64().and_then(|value| u16::try_from(value).ok()));
        put_payload(self, &values.collect::<Option<Vec<u16>>>().ok_or_else(wanted)?, out)
    }
}

impl Extra for IpcMsgEntry {
    fn show(&self, payload: &Self::Payload<'_>) -> Part<Value> {
        let mut shown = Vec::new();
        for (message, text) in payload {
            let bytes = prost::Message::encode_to_vec(message);
            shown.push(fields(known(Some(IpcMsg::NAME))?, &bytes, false, false, schema::DEPTH)?.into());
            shown.push(encoding::base64(text).into());
        }
        Ok(Value::Array(shown))
    }

    fn size(&self, payload: &Self::Payload<'_>) -> u64 {
        payload.iter().map(|(message, text)| prost::Message::encoded_len(message) as u64 + text.len() as u64).sum()
    }

    fn put(&self, extra: &Value, out: &mut Vec<u8>) -> Part<()> {
        let wanted = || json(EXTRA, JsonFault::Wanted("an array of messages, each with its text"));
        let shown = match extra {
            Value::Null => &[],
            extra => extra.as_array().ok_or_else(wanted)?.as_slice(),
        };
        let mut messages = Vec::new();
        for pair in shown.chunks(2) {
            let [message, text] = pair else { return Err(wanted()) };
            let message: IpcMsg = put_typed(message, &mut Vec::new())?;
            messages.push((message, raw_bytes(text)?));
        }
        let payload: Vec<(IpcMsg, &[u8])> =
            messages.iter().map(|(message, text)| (*message, text.as_slice())).collect();
        put_payload(self, &payload, out)
    }
}
