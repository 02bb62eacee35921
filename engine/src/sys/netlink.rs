//! Speaking netlink: messages with attributes, to the kernel of the network namespace that the calling thread is in.
//!
//! A message is a header (length, kind, flags, sequence, port: 16 bytes), a body that depends on its kind, and attributes
//! (length, kind, value), which may hold attributes themselves; all of it is padded to four bytes, and numbers are in the CPU's
//! order but where the kind says otherwise. The kernel answers a change with an error or 0 (NLMSG_ERROR), and a question for
//! a list with many messages (NLM_F_DUMP), each of which says if the list changed meanwhile.
//!
//! A socket stays in the namespace that it was opened in.
//!
//! Man pages: netlink(7), rtnetlink(7).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};

use crate::error::{Call, Error, Result};
use crate::sys::calls;

/// NETLINK_ROUTE: links, addresses, routes, rules.
pub const ROUTE: u32 = 0;
/// NETLINK_NETFILTER: connection tracking, nftables.
pub const NETFILTER: u32 = 12;

/// Length of the header of a message.
pub const HEADER: usize = 16;
/// A flag of a change: what is not there is made.
pub const CREATE: u16 = 0x400;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const DUMP_INTERRUPTED: u16 = 0x10;
const ANSWER_CAPPED: u16 = 0x100;
const ANSWER_HAS_TEXT: u16 = 0x200;
const NESTED: u16 = 0x8000;
const KIND_MASK: u16 = 0x3fff;
const KIND_ERROR: u16 = 2;
const KIND_DONE: u16 = 3;
const TEXT: u16 = 1;
const SOL_NETLINK: i32 = 270;
const EXT_ACK: i32 = 11;

/// How often a list that changed is asked for.
const TRIES: u32 = 10;
/// The kernel answers while it is asked, or nearly so.
const PATIENCE: Duration = Duration::from_secs(30);

/// A message that is being written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message(Vec<u8>);

impl Message {
    /// With the body of its kind, before attributes.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Message {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend_from_slice(body);
        let mut message = Message(bytes);
        message.pad();
        message
    }

    /// One that the kernel gave us, to be given back: its kind and all behind its header are kept.
    pub fn again(message: &[u8], flags: u16) -> Option<Message> {
        let kind = kind_of(message)?;
        Some(Message::new(kind, flags, message.get(HEADER..)?))
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Message {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.pad();
        self
    }

    /// A text, with the zero at its end.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Message {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// A number.
    pub fn word(&mut self, kind: u16, value: u32) -> &mut Message {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A number with a sign: descriptors, ids.
    pub fn signed(&mut self, kind: u16, value: i32) -> &mut Message {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A number of 16 bits.
    pub fn half(&mut self, kind: u16, value: u16) -> &mut Message {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// One that holds others, behind `body` if that is not empty.
    pub fn nested(&mut self, kind: u16, body: &[u8], inner: impl FnOnce(&mut Message)) -> &mut Message {
        let at = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        self.0.extend_from_slice(body);
        self.pad();
        inner(self);
        let len = u16::try_from(self.0.len() - at).unwrap_or(u16::MAX);
        self.0[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    fn sealed(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let flags = u16::from_ne_bytes([self.0[6], self.0[7]]) | flags | REQUEST;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// A way to ask one subsystem of one network namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What a datagram of answers ends with.
enum End {
    NotYet,
    Done,
    Error(i32, Option<String>),
}

impl Netlink {
    /// For the namespace that the calling thread is in.
    pub fn open(protocol: u32) -> Result<Netlink> {
        let protocol = std::num::NonZeroU32::new(protocol).map(rustix::net::Protocol::from_raw);
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::NETLINK,
            rustix::net::SocketType::RAW,
            rustix::net::SocketFlags::CLOEXEC,
            protocol,
        )
        .call("socket(AF_NETLINK)")?;
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(PATIENCE))
            .call("setsockopt(SO_RCVTIMEO)")?;
        // texts of errors; an older kernel has none
        let _ = calls::setsockopt(socket.as_fd(), SOL_NETLINK, EXT_ACK, &1u32.to_ne_bytes());
        Ok(Netlink { socket, sequence: 0, buffer: vec![0; 64 << 10] })
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Makes a change, and waits until it is made.
    pub fn change(&mut self, message: Message) -> Result<()> {
        self.ask(message, ACK).map(drop)
    }

    /// Asks for one thing.
    pub fn get(&mut self, message: Message) -> Result<Option<Vec<u8>>> {
        Ok(self.ask(message, ACK)?.0.into_iter().next())
    }

    /// Asks for a list: whole messages, with their headers.
    pub fn list(&mut self, message: &Message) -> Result<Vec<Vec<u8>>> {
        for _ in 0..TRIES {
            let (all, changed) = self.ask(message.clone(), DUMP)?;
            if !changed {
                return Ok(all);
            }
        }
        Err(Error::Changed { what: format!("a list of the network changed while it was read, {TRIES} times") })
    }

    fn ask(&mut self, message: Message, flags: u16) -> Result<(Vec<Vec<u8>>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.sealed(flags, self.sequence);
        rustix::net::send(&self.socket, &bytes, SendFlags::NOSIGNAL).call("send(AF_NETLINK)")?;
        let mut all = Vec::new();
        let mut changed = false;
        loop {
            let len = match rustix::net::recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.call("recv(AF_NETLINK)")?.1,
            };
            let datagram = self.buffer.get(..len).ok_or_else(broken)?;
            let (end, interrupted) = parse(datagram, self.sequence, &mut all)?;
            changed |= interrupted;
            match end {
                End::NotYet => {}
                End::Done => return Ok((all, changed)),
                End::Error(number, text) => {
                    if let Some(text) = text {
                        tracing::info!("the kernel says: {text}");
                    }
                    let source = std::io::Error::from_raw_os_error(number);
                    return Err(Error::Sys { call: "netlink", source });
                }
            }
        }
    }
}

fn broken() -> Error {
    Error::Changed { what: "an answer of the kernel's network cannot be read".into() }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// A number of 32 bits at a place.
pub fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The kind of a message.
pub fn kind_of(message: &[u8]) -> Option<u16> {
    half(message, 4)
}

/// Cuts bytes into messages, without the padding between them.
pub fn messages(bytes: &[u8]) -> Result<Vec<&[u8]>> {
    let mut all = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let len = word(rest, 0).and_then(|len| usize::try_from(len).ok()).filter(|len| *len >= HEADER);
        let message = len.and_then(|len| rest.get(..len)).ok_or_else(broken)?;
        all.push(message);
        rest = rest.get(message.len().next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(all)
}

fn parse(datagram: &[u8], sequence: u32, all: &mut Vec<Vec<u8>>) -> Result<(End, bool)> {
    let mut interrupted = false;
    for message in messages(datagram)? {
        let (Some(kind), Some(flags), Some(number)) = (kind_of(message), half(message, 6), word(message, 8)) else {
            return Err(broken());
        };
        // of a question that was given up
        if number != sequence {
            continue;
        }
        interrupted |= flags & DUMP_INTERRUPTED != 0;
        match kind {
            KIND_DONE => {
                let error = word(message, HEADER).map_or(0, u32::cast_signed);
                return Ok((if error < 0 { End::Error(-error, None) } else { End::Done }, interrupted));
            }
            KIND_ERROR => {
                let error = word(message, HEADER).ok_or_else(broken)?.cast_signed();
                let end =
                    if error == 0 { End::Done } else { End::Error(error.saturating_neg(), error_text(message, flags)) };
                return Ok((end, interrupted));
            }
            _ => all.push(message.to_vec()),
        }
    }
    Ok((End::NotYet, interrupted))
}

/// What the kernel says of an error in words, if it does.
fn error_text(message: &[u8], flags: u16) -> Option<String> {
    if flags & ANSWER_HAS_TEXT == 0 {
        return None;
    }
    let asked = usize::try_from(word(message, HEADER + 4)?).ok()?;
    let at = HEADER + 4 + if flags & ANSWER_CAPPED != 0 { HEADER } else { asked.next_multiple_of(4) };
    let attributes = attributes(message.get(at..)?);
    let (_, text) = attributes.iter().find(|(kind, _)| *kind == TEXT)?;
    Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
}

/// The attributes in some bytes, as far as they make sense.
pub fn attributes(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut all = Vec::new();
    let mut rest = bytes;
    while let (Some(len), Some(kind)) = (half(rest, 0), half(rest, 2)) {
        let Some(value) = rest.get(4..usize::from(len)) else { break };
        all.push((kind & KIND_MASK, value));
        rest = rest.get(usize::from(len).next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

/// The first attribute of a kind.
pub fn find<'a>(attributes: &[(u16, &'a [u8])], kind: u16) -> Option<&'a [u8]> {
    attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn attributes_go_there_and_back() {
        let mut message = Message::new(16, CREATE, &[1; 5]);
        message.text(3, "lo").nested(18, &[], |m| {
            m.text(1, "veth").nested(2, &[7; 4], |m| {
                m.word(4, 1500);
            });
        });
        let bytes = message.clone().sealed(ACK, 9);
        assert_eq!(messages(&bytes).unwrap(), [bytes.as_slice()]);
        assert_eq!(
            (kind_of(&bytes), half(&bytes, 6), word(&bytes, 8)),
            (Some(16), Some(CREATE | ACK | REQUEST), Some(9))
        );
        let outer = attributes(&bytes[HEADER + 8..]);
        assert_eq!(find(&outer, 3), Some(b"lo\0".as_slice()));
        let info = attributes(find(&outer, 18).unwrap());
        assert_eq!(find(&info, 1), Some(b"veth\0".as_slice()));
        let data = find(&info, 2).unwrap();
        assert_eq!(find(&attributes(&data[4..]), 4).and_then(|v| word(v, 0)), Some(1500));
        assert_eq!(Message::again(&bytes, CREATE).unwrap().0[HEADER..], bytes[HEADER..]);
    }

    #[test]
    fn what_is_broken_is_no_panic() {
        assert!(messages(&[1, 0, 0, 0]).is_err());
        assert!(messages(&[0; 16]).is_err());
        assert!(messages(&[255; 64]).is_err());
        assert_eq!(attributes(&[3, 0, 1, 0, 9]), [] as [(u16, &[u8]); 0]);
        assert_eq!(attributes(&[4, 0, 1]), [] as [(u16, &[u8]); 0]);
        let mut all = Vec::new();
        let short = Message::new(KIND_ERROR, 0, &[]).sealed(0, 1);
        assert!(parse(&short, 1, &mut all).is_err());
        let lies = Message::new(KIND_ERROR, ANSWER_HAS_TEXT, &[255; 8]).sealed(0, 1);
        assert!(matches!(parse(&lies, 1, &mut all).unwrap(), (End::Error(1, None), false)));
    }

    #[test]
    fn the_kernel_lists_its_links() {
        let mut netlink = Netlink::open(ROUTE).unwrap();
        let links = netlink.list(&Message::new(18, 0, &[0; 16])).unwrap();
        let names = links.iter().filter_map(|l| find(&attributes(l.get(32..)?), 3));
        assert!(names.into_iter().any(|name| name == b"lo\0"));
        let mut wrong = Message::new(19, 0, &[0; 16]);
        wrong.text(3, "no-such-link");
        assert_eq!(netlink.change(wrong).unwrap_err().errno(), libc::ENODEV);
    }
}
