//! The netlink framing of a dump: request header, datagrams of messages, attributes. Pure.
//!
//! Numbers are in the CPU's own byte order, except where a socket address has them in the network's. Messages and
//! attributes are padded to four bytes.
//!
//! Man page: netlink(7).

/// An answer does not read as what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot be read")]
pub struct Malformed(pub &'static str);

/// What one datagram was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Sockets, and there may be more.
    More {
        /// The kernel says that the list changed under it.
        interrupted: bool,
    },
    /// The end of the list.
    Done {
        /// As above.
        interrupted: bool,
    },
    /// An error, as a positive number.
    Error(i32),
}

const HEADER: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// The request for a list, with the body that says of what.
#[must_use]
pub fn dump_request(sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut request = Vec::with_capacity(HEADER + body.len());
    request.extend(length.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend(sequence.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend_from_slice(body);
    request
}

/// Reads the messages of one datagram. Those of another sequence belong to a question that was given up, and are skipped.
///
/// # Errors
/// If framing is broken or `read` fails.
pub fn parse_datagram<T>(
    datagram: &[u8],
    sequence: u32,
    read: fn(&[u8]) -> Result<T, Malformed>,
    sockets: &mut Vec<T>,
) -> Result<Answer, Malformed> {
    let mut rest = datagram;
    let mut interrupted = false;
    while !rest.is_empty() {
        let mut header = Fields::new(rest, "a message header");
        let length = usize::try_from(header.u32()?).map_err(|_| Malformed("a message length"))?;
        let (kind, flags, number) = (header.u16()?, header.u16()?, header.u32()?);
        let body = rest.get(HEADER..length).ok_or(Malformed("a message length"))?;
        rest = rest.get(padded(length)..).unwrap_or_default();
        if number != sequence {
            continue;
        }
        interrupted |= flags & NLM_F_DUMP_INTR != 0;
        match kind {
            NLMSG_NOOP => {}
            NLMSG_ERROR => match Fields::new(body, "an error number").i32()? {
                0 => {}
                error => return Ok(Answer::Error(error.saturating_neg())),
            },
            NLMSG_DONE => match body.get(..4) {
                Some(number) if Fields::new(number, "an error number").i32()? < 0 => {
                    return Ok(Answer::Error(Fields::new(number, "an error number").i32()?.saturating_neg()));
                }
                _ => return Ok(Answer::Done { interrupted }),
            },
            SOCK_DIAG_BY_FAMILY => sockets.push(read(body)?),
            _ => return Err(Malformed("a message type")),
        }
    }
    Ok(Answer::More { interrupted })
}

fn padded(length: usize) -> usize {
    length.saturating_add(3) & !3
}

/// The attributes behind the fixed part of a message: type and value.
pub(super) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// Starts at the first; `text` is the message from there on.
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self { rest: text }
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let mut header = Fields::new(self.rest, "an attribute header");
        let parts = header.u16().and_then(|length| Ok((usize::from(length), header.u16()?)));
        let found = parts.and_then(|(length, kind)| {
            let value = self.rest.get(4..length).ok_or(Malformed("an attribute length"))?;
            // The two high bits say "nested" and "network byte order".
            Ok((length, (kind & 0x3fff, value)))
        });
        match found {
            Ok((length, attribute)) => {
                self.rest = self.rest.get(padded(length)..).unwrap_or_default();
                Some(Ok(attribute))
            }
            Err(error) => {
                self.rest = &[];
                Some(Err(error))
            }
        }
    }
}

/// Fixed fields, one after the other.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    /// `what` is what an error will name.
    pub(super) fn new(text: &'a [u8], what: &'static str) -> Self {
        Self { rest: text, what }
    }

    /// The next `N` bytes.
    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed(self.what))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Malformed> {
        self.bytes::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.bytes().map(u16::from_ne_bytes)
    }

    pub(super) fn u16_network(&mut self) -> Result<u16, Malformed> {
        self.bytes().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.bytes().map(u32::from_ne_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, Malformed> {
        self.bytes().map(i32::from_ne_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.bytes().map(u64::from_ne_bytes)
    }

    /// What is left.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

/// Reads an attribute that is one number.
pub(super) fn u8_of(value: &[u8], what: &'static str) -> Result<u8, Malformed> {
    Fields::new(value, what).u8()
}

/// Reads an attribute that is one number.
pub(super) fn u32_of(value: &[u8], what: &'static str) -> Result<u32, Malformed> {
    Fields::new(value, what).u32()
}

/// Reads an attribute that is a list of numbers.
pub(super) fn u32s_of(value: &[u8], what: &'static str) -> Result<Vec<u32>, Malformed> {
    let chunks = value.chunks(4);
    chunks.map(|chunk| u32_of(chunk, what)).collect()
}

/// SK_MEMINFO: memory of a socket, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketMemory {
    /// Used for receiving.
    pub receive_used: u32,
    /// SO_RCVBUF.
    pub receive_buffer: u32,
    /// Used for sending.
    pub send_used: u32,
    /// SO_SNDBUF.
    pub send_buffer: u32,
    /// Written and not sent.
    pub write_queued: u32,
    /// For options.
    pub options: u32,
    /// Received while the owner held the lock.
    pub backlog: u32,
    /// Datagrams that were dropped.
    pub drops: u32,
}

impl SocketMemory {
    pub(super) fn parse(value: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(value, "the memory of a socket");
        let (receive_used, receive_buffer) = (fields.u32()?, fields.u32()?);
        let (send_used, send_buffer) = (fields.u32()?, fields.u32()?);
        fields.u32()?;
        let write_queued = fields.u32()?;
        // Later kernels added the rest one by one.
        let mut later = || if fields.rest().is_empty() { Ok(0) } else { fields.u32() };
        let (options, backlog, drops) = (later()?, later()?, later()?);
        Ok(Self { receive_used, receive_buffer, send_used, send_buffer, write_queued, options, backlog, drops })
    }
}
