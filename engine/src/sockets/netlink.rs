//! Netlink sockets.
//!
//! The kernel lists them (netlink_diag) with their own number, the groups they listen to, and where they are connected to.
//!
//! Image: [`NetlinkSkEntry`] in `files.img`; `groups` as words, group N is bit N-1; `dst_group` is a number of a group, `state`
//! 1 if connected, else 7.
//!
//! Their numbers are taken before tasks run; another socket may have one by then, as those the kernel gives are the
//! pids of whoever asks first.
//!
//! Not kept: whether it is SOCK_RAW or SOCK_DGRAM, which is the same. Refused: messages that were not received, and an answer that is not complete.
//!
//! Man page: netlink(7).

use std::os::fd::{AsFd, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};
use standstill_images::proto::{FdTypes, FileEntry, NetlinkSkEntry};

use super::options::{self, Opt};
use super::queue;
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::sys::diag::netlink::NetlinkSocket;
use crate::sys::diag::Diag;

const ADD_MEMBERSHIP: Opt = Opt::new(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, "NETLINK_ADD_MEMBERSHIP");
/// NETLINK_CONNECTED; TCP_CLOSE is the state of all others.
const CONNECTED: u32 = 1;
/// NDIAG_FLAG_CB_RUNNING.
const ANSWERING: u32 = 1;

/// Dumps a socket.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let fd = d.copy.as_fd();
    let ino = u32::try_from(d.stat.st_ino).unwrap_or(u32::MAX);
    let sockets = super::listed(Diag::open().and_then(|mut diag| diag.netlink()))?;
    // the kernel does not list one that has no number yet and is in no group
    let new = NetlinkSocket {
        protocol: u8::try_from(options::PROTOCOL.get(fd)?).unwrap_or(u8::MAX),
        state: super::CLOSE as u8,
        ..NetlinkSocket::default()
    };
    let socket = sockets.into_iter().find(|s| s.ino == ino).unwrap_or(new);
    if queue::is_readable(fd)? || socket.flags.is_some_and(|flags| flags & ANSWERING != 0) {
        return Err(d.refused("a netlink socket with messages in its queue", "The socket has data to read"));
    }
    let groups: Vec<u32> =
        socket.groups.chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect();
    let used = groups.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
    let entry = NetlinkSkEntry {
        id,
        ino,
        protocol: socket.protocol.into(),
        state: socket.state.into(),
        flags: d.flags,
        portid: socket.port,
        groups: groups.into_iter().take(used).collect(),
        dst_portid: socket.dst_port,
        dst_group: socket.dst_group,
        fown: d.fown,
        opts: options::dump(fd, true)?,
        ns_id: Some(cx.net_ns),
    };
    Ok(FileEntry { id, r#type: FdTypes::Netlinksk.into(), nlsk: Some(entry), ..FileEntry::default() })
}

/// Makes it again.
pub fn open(e: &NetlinkSkEntry, cx: &RestoreFiles<'_>) -> Result<OwnedFd> {
    cx.network(e.ns_id).and_then(|_inside| make(e)).at(Place::Item("netlink socket", e.ino.into()))
}

fn make(e: &NetlinkSkEntry) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = std::num::NonZeroU32::new(e.protocol).map(Protocol::from_raw);
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol).call("socket")?;
    let fd = socket.as_fd();
    if e.portid != 0 {
        match rustix::net::bind(fd, &SocketAddrNetlink::new(e.portid, 0)) {
            Err(rustix::io::Errno::ADDRINUSE) => {
                return Err(Error::Changed { what: format!("its number {} is in use", e.portid) });
            }
            other => other.call("bind")?,
        }
    }
    for (n, word) in (0u32..).zip(&e.groups) {
        for bit in (0..32).filter(|bit| word & 1 << bit != 0) {
            ADD_MEMBERSHIP.set(fd, n * 32 + bit + 1)?;
        }
    }
    match e.state {
        0 | super::CLOSE => {}
        CONNECTED => {
            let group = match e.dst_group {
                0 => 0,
                n @ 1..=32 => 1 << (n - 1),
                n => return Err(Error::lie("files.img", format!("it is connected to group {n}"))),
            };
            rustix::net::connect(fd, &SocketAddrNetlink::new(e.dst_portid, group)).call("connect")?;
        }
        state => return Err(Error::lie("files.img", format!("it is in state {state}"))),
    }
    options::restore(fd, &e.opts)?;
    set_status_flags(fd, e.flags)?;
    Ok(socket)
}
