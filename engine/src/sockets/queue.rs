//! What was sent to a unix socket and not received yet.
//!
//! The program's queue is never read from, only looked at. A stream with no descriptors in it, or only at its end, is seen
//! with one MSG_PEEK. To see past the first message, and past descriptors in a stream, SO_PEEK_OFF must be set, which
//! belongs to the open file that the program has too: [`PeekOffset`] sets it back, whatever happens.
//!
//! Image: `sk-queues.img`, a [`SkPacketEntry`] a message, in the order they were sent, then its bytes. `id_for` is the file id
//! of the receiver. Descriptors in flight are files of `files.img`, by id. A stream has no messages: an entry goes on until
//! after the message that descriptors came with, or to the end.
//!
//! Not kept: where in such a part of a stream its descriptors were (the kernel shows them with each byte before; they come
//! with the first byte afterwards); an empty datagram behind another that was looked at before, by SO_PEEK_OFF; the name
//! of a datagram's sender (the image has no place; the sender that restores it is the socket connected to the receiver, if
//! there is one). Refused: credentials in flight, since those of the engine would take their place, and an urgent byte.
//!
//! Man pages: unix(7), socket(7), recv(2), cmsg(3).

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use standstill_images::proto::SkPacketEntry;
use standstill_images::{ImageKind, Images};

use super::options::{self, Guarded};
use crate::error::{Call, Error, Result};
use crate::guard::Guard;

/// The most descriptors that one message carries (SCM_MAX_FD).
const MOST_FDS: usize = 253;
/// Room for them, and for what the kernel may add.
const CONTROL: usize = rustix::cmsg_space!(ScmRights(MOST_FDS), ScmCredentials(1));
/// More than an unchanged limit lets a datagram be; a larger one is asked for again.
const USUAL: usize = 256 << 10;

/// One message, or a part of a stream.
#[derive(Debug)]
pub struct Message {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Descriptors sent with it, now ours too.
    pub rights: Vec<OwnedFd>,
}

/// A message of an image.
#[derive(Debug)]
pub struct Stored {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Ids of the files sent with it.
    pub rights: Vec<u32>,
}

/// SO_PEEK_OFF while it is ours: the program's value returns when this goes, or, by the guard, when the engine dies.
pub(super) struct PeekOffset<'fd> {
    fd: BorrowedFd<'fd>,
    guarded: Option<Guarded<'fd>>,
    before: u32,
    set: bool,
}

impl<'fd> PeekOffset<'fd> {
    /// As it is now.
    pub(super) fn of(fd: BorrowedFd<'fd>, guarded: Option<Guarded<'fd>>) -> Result<Self> {
        Ok(PeekOffset { fd, guarded, before: options::PEEK_OFF.get(fd)?, set: false })
    }

    /// As it is now, of a socket that the guard does not have yet.
    fn guarded(fd: BorrowedFd<'fd>, guard: Option<&'fd Guard<'fd>>) -> Result<Self> {
        Self::of(fd, guard.map(|guard| Guarded::new(guard, fd)).transpose()?)
    }

    /// The program uses it itself.
    pub(super) fn in_use(&self) -> bool {
        i32::from_ne_bytes(self.before.to_ne_bytes()) >= 0
    }

    /// What is looked at next.
    pub(super) fn set(&mut self, offset: usize) -> Result<()> {
        if let Some(guarded) = self.guarded.take() {
            guarded.resets(options::PEEK_OFF, self.before)?;
        }
        self.set = true;
        options::PEEK_OFF.set(self.fd, u32::try_from(offset).unwrap_or(u32::MAX >> 1))
    }

    /// Gives it back.
    pub(super) fn end(mut self) -> Result<()> {
        self.set = false;
        options::PEEK_OFF.bring(self.fd, self.before)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if self.set {
            if let Err(e) = options::PEEK_OFF.set(self.fd, self.before) {
                tracing::error!("SO_PEEK_OFF of a socket of the program stays changed: {e}");
            }
        }
    }
}

/// Would reading not wait: because something is there, or because nothing can come?
pub fn is_readable(fd: BorrowedFd<'_>) -> Result<bool> {
    let readable = rustix::event::PollFlags::IN;
    let mut poll = [rustix::event::PollFd::new(&fd, readable)];
    rustix::event::poll(&mut poll, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).call("poll")?;
    Ok(poll[0].revents().contains(readable))
}

/// What waits in the queue of a connected or unconnected unix socket. `stream`: it has no message boundaries; `ended`: its
/// end looks like an empty message, since it is a sequence of packets that was shut down for receiving.
pub fn peek<'fd>(
    fd: BorrowedFd<'fd>,
    stream: bool,
    ended: bool,
    guard: Option<&'fd Guard<'fd>>,
) -> Result<Vec<Message>> {
    if !is_readable(fd)? {
        return Ok(Vec::new());
    }
    let waiting = usize::try_from(rustix::io::ioctl_fionread(fd).call("ioctl(SIOCINQ)")?).unwrap_or(0);
    if waiting == 0 && (stream || ended) {
        // what poll means is that reading would return 0
        return Ok(Vec::new());
    }
    if options::passes_credentials(fd)? {
        return Err(Error::refused(
            "credentials in flight to a unix socket",
            "let the program receive before the dump",
        ));
    }
    if stream {
        peek_stream(fd, waiting, guard)
    } else {
        peek_messages(fd, waiting, ended, guard)
    }
}

/// One look, at the whole length of a message; `None` if nothing is there.
fn look(fd: BorrowedFd<'_>, stream: bool, buffer: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = if stream { RecvFlags::empty() } else { RecvFlags::TRUNC };
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC | length;
    let got = loop {
        match recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            other => break other.call("recvmsg(MSG_PEEK)")?,
        }
    };
    let mut rights = Vec::new();
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(fds) => rights.extend(fds),
            _ => {
                return Err(Error::refused(
                    "a control message in flight to a unix socket",
                    "let the program receive before the dump",
                ))
            }
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Error::refused(
            "a message with more descriptors than the engine may open, or a security label",
            "raise the limit of open files (RLIMIT_NOFILE)",
        ));
    }
    Ok(Some((got.bytes, rights)))
}

fn peek_stream<'fd>(fd: BorrowedFd<'fd>, waiting: usize, guard: Option<&'fd Guard<'fd>>) -> Result<Vec<Message>> {
    if rustix::net::recv(fd, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::OOB).is_ok() {
        return Err(Error::refused(
            "an urgent byte in flight on a unix stream",
            "let the program receive before the dump",
        ));
    }
    let mut buffer = vec![0; waiting];
    if !PeekOffset::of(fd, None)?.in_use() {
        if let Some((got, rights)) = look(fd, true, &mut buffer)? {
            if got == waiting {
                return Ok(vec![Message { bytes: buffer, rights }]);
            }
        }
    }
    let mut offset = PeekOffset::guarded(fd, guard)?;
    let (mut messages, mut at) = (Vec::new(), 0);
    while at < waiting {
        offset.set(at)?;
        let Some((got, rights)) = look(fd, true, &mut buffer[..waiting - at])? else { break };
        if got == 0 {
            break;
        }
        messages.push(Message { bytes: buffer[..got].to_vec(), rights });
        at += got;
    }
    offset.end()?;
    if at != waiting {
        return Err(Error::Changed { what: format!("{at} bytes in the queue of a unix socket, of {waiting}") });
    }
    Ok(messages)
}

fn peek_messages<'fd>(
    fd: BorrowedFd<'fd>,
    waiting: usize,
    ended: bool,
    guard: Option<&'fd Guard<'fd>>,
) -> Result<Vec<Message>> {
    let mut offset = PeekOffset::guarded(fd, guard)?;
    let (mut messages, mut at) = (Vec::new(), 0);
    let mut buffer = vec![0; USUAL];
    offset.set(0)?;
    while let Some((len, rights)) = look(fd, false, &mut buffer)? {
        if len > buffer.len() {
            buffer.resize(len, 0);
            offset.set(at)?;
            continue;
        }
        if len == 0 && ended && at >= waiting {
            // the end of a sequence of packets looks like an empty packet
            break;
        }
        messages.push(Message { bytes: buffer[..len].to_vec(), rights });
        at += len;
    }
    offset.end()?;
    Ok(messages)
}

/// Sends one message; it must fit the receiver's queue now.
pub fn send(fd: BorrowedFd<'_>, stream: bool, bytes: &[u8], rights: &[OwnedFd]) -> Result<()> {
    let rights: Vec<BorrowedFd<'_>> = rights.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&rights)) {
        return Err(Error::lie("sk-queues.img", format!("{} descriptors in one message", rights.len())));
    }
    let mut left = bytes;
    loop {
        match sendmsg(fd, &[IoSlice::new(left)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => continue,
            Ok(sent) if stream && sent < left.len() => {
                left = &left[sent..];
                control = SendAncillaryBuffer::default();
            }
            other => return other.map(drop).call("sendmsg"),
        }
    }
}

/// All of `sk-queues.img`, by receiver.
pub fn read(images: &Images) -> Result<HashMap<u32, Vec<Stored>>> {
    let mut queues: HashMap<u32, Vec<Stored>> = HashMap::new();
    let Some(image) = images.open_if_there(ImageKind::SkQueues, ())? else { return Ok(queues) };
    for (entry, bytes) in image.reader()?.all_with_payload::<SkPacketEntry>()? {
        let mut rights = Vec::new();
        for scm in &entry.scm {
            if scm.r#type != libc::SCM_RIGHTS as u32 {
                return Err(Error::lie(
                    "sk-queues.img",
                    format!("control message {} for file {:#x}", scm.r#type, entry.id_for),
                ));
            }
            rights.extend_from_slice(&scm.rights);
        }
        queues.entry(entry.id_for).or_default().push(Stored { bytes: bytes.to_vec(), rights });
    }
    Ok(queues)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::net::{recv, socketpair, AddressFamily, Shutdown, SocketFlags, SocketType};

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn texts(messages: &[Message]) -> Vec<(&[u8], usize)> {
        messages.iter().map(|m| (m.bytes.as_slice(), m.rights.len())).collect()
    }

    fn peek_offset(fd: &OwnedFd) -> i32 {
        options::PEEK_OFF.get(fd.as_fd()).unwrap() as i32
    }

    #[test]
    fn a_stream_is_seen_whole_and_stays() {
        let (a, b) = pair(SocketType::STREAM);
        assert!(peek(b.as_fd(), true, false, None).unwrap().is_empty());
        let long = vec![b'x'; 100_000];
        send(a.as_fd(), true, b"begin ", &[]).unwrap();
        send(a.as_fd(), true, &long, &[]).unwrap();
        let seen = peek(b.as_fd(), true, false, None).unwrap();
        assert_eq!((seen.len(), seen[0].bytes.len()), (1, 100_006));
        assert_eq!(peek_offset(&b), -1);
        let mut head = [0; 6];
        recv(&b, &mut head, RecvFlags::empty()).unwrap();
        assert_eq!(&head, b"begin ");
    }

    #[test]
    fn descriptors_part_a_stream() {
        let (a, b) = pair(SocketType::STREAM);
        let file = || vec![OwnedFd::from(std::fs::File::open("/dev/null").unwrap())];
        send(a.as_fd(), true, b"before", &[]).unwrap();
        send(a.as_fd(), true, b"with", &file()).unwrap();
        send(a.as_fd(), true, b"after", &[]).unwrap();
        send(a.as_fd(), true, b"!", &file()).unwrap();
        send(a.as_fd(), true, b"end", &[]).unwrap();
        let seen = peek(b.as_fd(), true, false, None).unwrap();
        assert_eq!(texts(&seen), [(&b"beforewith"[..], 1), (b"after!", 1), (b"end", 0)]);
        assert_eq!(peek_offset(&b), -1);
    }

    #[test]
    fn messages_keep_their_boundaries() {
        for kind in [SocketType::DGRAM, SocketType::SEQPACKET] {
            let (a, b) = pair(kind);
            for text in [&b"one"[..], b"", b"three", &[b'l'; 70_000]] {
                send(a.as_fd(), false, text, &[]).unwrap();
            }
            let seen = peek(b.as_fd(), false, false, None).unwrap();
            assert_eq!(texts(&seen), [(&b"one"[..], 0), (b"", 0), (b"three", 0), (&[b'l'; 70_000], 0)]);
            assert_eq!(peek_offset(&b), -1);
        }
    }

    #[test]
    fn an_end_is_no_message() {
        let (a, b) = pair(SocketType::SEQPACKET);
        send(a.as_fd(), false, b"one", &[]).unwrap();
        rustix::net::shutdown(&a, Shutdown::Write).unwrap();
        assert_eq!(texts(&peek(b.as_fd(), false, true, None).unwrap()), [(&b"one"[..], 0)]);
    }

    #[test]
    fn the_programs_own_peek_offset_stays() {
        let (a, b) = pair(SocketType::STREAM);
        send(a.as_fd(), true, b"0123456789", &[]).unwrap();
        options::PEEK_OFF.set(b.as_fd(), 4).unwrap();
        assert_eq!(texts(&peek(b.as_fd(), true, false, None).unwrap()), [(&b"0123456789"[..], 0)]);
        assert_eq!(peek_offset(&b), 4);
    }

    #[test]
    fn credentials_and_urgent_bytes_are_refused() {
        let (a, b) = pair(SocketType::STREAM);
        send(a.as_fd(), true, b"x", &[]).unwrap();
        options::PASSCRED.set(b.as_fd(), 1).unwrap();
        assert!(matches!(peek(b.as_fd(), true, false, None), Err(Error::Refused { .. })));
        options::PASSCRED.set(b.as_fd(), 0).unwrap();
        assert!(peek(b.as_fd(), true, false, None).is_ok());
        if rustix::net::send(&a, b"!", SendFlags::OOB).is_ok() {
            assert!(matches!(peek(b.as_fd(), true, false, None), Err(Error::Refused { .. })));
        }
    }
}
