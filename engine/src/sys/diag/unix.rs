//! Unix sockets, as unix_diag lists them.
//!
//! Header: linux/unix_diag.h. Man pages: sock_diag(7), unix(7).

use super::wire::{u32_of, u32s_of, u8_of, Attributes, Fields, Malformed, SocketMemory};

/// A unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode. The kernel sends 32 bits, and has no more for sockets.
    pub ino: u32,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub socket_type: u8,
    /// TCP_ESTABLISHED (1), TCP_CLOSE (7) or TCP_LISTEN (10).
    pub state: u8,
    /// A number that no other socket had since boot.
    pub cookie: u64,
    /// Its name as bound, raw; see [`UnixSocket::address`].
    pub name: Option<Vec<u8>>,
    /// Inode of the file it is bound to: the lower 32 bits, and all the kernel sends.
    pub vfs_ino: Option<u32>,
    /// Device of that file's system, in the kernel's encoding (12 bits of major, 20 of minor).
    pub vfs_dev: Option<u32>,
    /// Inode of what it is connected to: the peer of a stream, the default target of datagrams. 0 if that has no inode
    /// (nobody accepted it yet).
    pub peer: Option<u32>,
    /// For one that listens: inodes of the sockets that wait to be accepted, as their makers hold them.
    pub pending: Vec<u32>,
    /// Bytes in the receive queue (of the first datagram, for those), or connections that wait.
    pub rqueue: u32,
    /// Bytes sent and not received, or the backlog that was asked for.
    pub wqueue: u32,
    /// Memory.
    pub memory: SocketMemory,
    /// 1 no more receiving, 2 no more sending.
    pub shutdown: u8,
    /// User who made it (since 5.3).
    pub uid: Option<u32>,
}

/// What a unix socket is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnixAddress<'a> {
    /// Nothing.
    Unnamed,
    /// A path, as it was given to bind(2): perhaps relative to where that task stood.
    Path(&'a [u8]),
    /// A name without a file, without the NUL that leads it.
    Abstract(&'a [u8]),
}

impl UnixSocket {
    /// What it is bound to.
    #[must_use]
    pub fn address(&self) -> UnixAddress<'_> {
        match self.name.as_deref() {
            None | Some([]) => UnixAddress::Unnamed,
            Some([0, name @ ..]) => UnixAddress::Abstract(name),
            Some(path) => UnixAddress::Path(path.strip_suffix(b"\0").unwrap_or(path)),
        }
    }
}

/// The question for all of them, with all that the kernel knows.
#[must_use]
pub fn request() -> Vec<u8> {
    const SHOW_ALL: u32 = 0x7f;
    let mut body = vec![1, 0, 0, 0];
    for field in [u32::MAX, 0, SHOW_ALL, u32::MAX, u32::MAX] {
        body.extend(field.to_ne_bytes());
    }
    body
}

/// Reads one message.
///
/// # Errors
/// If a field or attribute that is known is too short.
pub fn parse(message: &[u8]) -> Result<UnixSocket, Malformed> {
    let mut fields = Fields::new(message, "a unix socket");
    let [_family, socket_type, state, _] = fields.bytes()?;
    let (ino, cookie) = (fields.u32()?, fields.u64()?);
    let mut socket = UnixSocket { ino, socket_type, state, cookie, ..UnixSocket::default() };
    for attribute in Attributes::new(fields.rest()) {
        let (kind, value) = attribute?;
        match kind {
            0 => socket.name = Some(value.to_vec()),
            1 => {
                let mut vfs = Fields::new(value, "the file of a unix socket");
                socket.vfs_ino = Some(vfs.u32()?);
                socket.vfs_dev = Some(vfs.u32()?);
            }
            2 => socket.peer = Some(u32_of(value, "the peer of a unix socket")?),
            3 => socket.pending = u32s_of(value, "the waiting connections of a unix socket")?,
            4 => {
                let mut lengths = Fields::new(value, "the queues of a unix socket");
                (socket.rqueue, socket.wqueue) = (lengths.u32()?, lengths.u32()?);
            }
            5 => socket.memory = SocketMemory::parse(value)?,
            6 => socket.shutdown = u8_of(value, "the shutdown of a unix socket")?,
            7 => socket.uid = Some(u32_of(value, "the user of a unix socket")?),
            _ => {}
        }
    }
    Ok(socket)
}
