//! Netlink sockets, as netlink_diag lists them.
//!
//! Header: linux/netlink_diag.h. Man pages: sock_diag(7), netlink(7).

use super::wire::{u32_of, Attributes, Fields, Malformed, SocketMemory};

/// A netlink socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetlinkSocket {
    /// SOCK_RAW or SOCK_DGRAM.
    pub socket_type: u8,
    /// NETLINK_ROUTE and so on.
    pub protocol: u8,
    /// 0 not connected, 1 connected.
    pub state: u8,
    /// Its own address, or 0.
    pub port: u32,
    /// Default target.
    pub dst_port: u32,
    /// Default target group.
    pub dst_group: u32,
    /// Inode; 0 for the kernel's own.
    pub ino: u32,
    /// A number that no other socket had since boot.
    pub cookie: u64,
    /// Groups it is a member of: group N is bit N-1, as bytes of native words.
    pub groups: Vec<u8>,
    /// NDIAG_FLAG_: 1 a dump is under way, 2 packet info, 4 broadcast errors, 8 no ENOBUFS, 16 all namespaces,
    /// 32 short acknowledgements.
    pub flags: Option<u32>,
    /// Memory.
    pub memory: SocketMemory,
}

/// The question for all protocols.
#[must_use]
pub fn request() -> Vec<u8> {
    const MEMINFO_GROUPS_FLAGS: u32 = 1 | 2 | 8;
    let mut body = vec![16, u8::MAX, 0, 0];
    for field in [0, MEMINFO_GROUPS_FLAGS, u32::MAX, u32::MAX] {
        body.extend(field.to_ne_bytes());
    }
    body
}

/// Reads one message.
///
/// # Errors
/// If a field or attribute that is known is too short.
pub fn parse(message: &[u8]) -> Result<NetlinkSocket, Malformed> {
    let mut fields = Fields::new(message, "a netlink socket");
    let [_family, socket_type, protocol, state] = fields.bytes()?;
    let (port, dst_port, dst_group) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (ino, cookie) = (fields.u32()?, fields.u64()?);
    let mut socket = NetlinkSocket {
        socket_type,
        protocol,
        state,
        port,
        dst_port,
        dst_group,
        ino,
        cookie,
        ..NetlinkSocket::default()
    };
    for attribute in Attributes::new(fields.rest()) {
        let (kind, value) = attribute?;
        match kind {
            0 => socket.memory = SocketMemory::parse(value)?,
            1 => socket.groups = value.to_vec(),
            4 => socket.flags = Some(u32_of(value, "the flags of a netlink socket")?),
            _ => {}
        }
    }
    Ok(socket)
}
