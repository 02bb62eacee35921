//! Sockets: one file a family.
//!
//! All sockets of a family that are in the images are made together, at the first that is asked for: which end of a
//! connection is made first, and when a name or port is taken, depends on all of them.
//!
//! Man pages: socket(7), unix(7), ip(7), tcp(7), udp(7), raw(7), packet(7).

use std::os::fd::AsFd;

use standstill_images::proto::FileEntry;

use crate::error::{At, Error, Place, Result};
use crate::files::{Descriptor, DumpFiles};
use crate::sys::diag::DiagError;

pub mod inet;
pub mod netlink;
pub mod netlock;
pub mod options;
pub mod packet;
pub mod queue;
pub mod tcp;
pub mod unix;

/// TCP_ESTABLISHED: the states of TCP are used for all families.
pub const ESTABLISHED: u32 = 1;
/// TCP_CLOSE: not connected.
pub const CLOSE: u32 = 7;
/// TCP_LISTEN.
pub const LISTEN: u32 = 10;

/// Dispatches by family.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let place = Place::Item("socket", d.stat.st_ino);
    let Some(network) = cx.networks.of_socket(d.copy.as_fd(), cx.net_ns).at(place.clone())? else {
        return Err(d.refused("a socket of another network namespace", "close it before the dump"));
    };
    let _inside = cx.networks.enter(network).at(place.clone())?;
    cx.net_ns = network;
    let family = options::DOMAIN.get(d.copy.as_fd()).at(place.clone())?;
    match i32::try_from(family).unwrap_or(-1) {
        libc::AF_UNIX => unix::dump(d, id, cx),
        libc::AF_INET | libc::AF_INET6 => inet::dump(d, id, cx),
        libc::AF_NETLINK => netlink::dump(d, id, cx),
        libc::AF_PACKET => packet::dump(d, id, cx),
        libc::AF_VSOCK => Err(d.refused("a vsock socket", "close it before the dump")),
        libc::AF_ALG => Err(d.refused("a socket of the kernel's crypto", "close it before the dump")),
        libc::AF_BLUETOOTH => Err(d.refused("a bluetooth socket", "close it before the dump")),
        libc::AF_XDP => Err(d.refused("an XDP socket", "close it before the dump")),
        libc::AF_TIPC => Err(d.refused("a TIPC socket", "close it before the dump")),
        libc::AF_CAN => Err(d.refused("a CAN socket", "close it before the dump")),
        other => Err(d.refused(&format!("a socket of family {other}"), "close it before the dump")),
    }
    .at(place)
}

/// Is it a socket?
pub fn is_socket(e: &FileEntry) -> bool {
    inode(e).is_some() || e.psk.is_some()
}

/// The inode that a socket had.
pub fn inode(e: &FileEntry) -> Option<u64> {
    let unix = e.usk.as_ref().map(|e| e.ino);
    let ino = unix.or(e.isk.as_ref().map(|e| e.ino)).or(e.nlsk.as_ref().map(|e| e.ino));
    ino.map(u64::from)
}

/// Puts what the kernel's list of sockets said into our words.
fn listed<T>(result: Result<T, DiagError>) -> Result<T> {
    result.map_err(|e| match e {
        DiagError::Call { call, source } => Error::Sys { call, source: source.into() },
        DiagError::Refused { source, .. } => Error::Sys { call: "NETLINK_SOCK_DIAG", source: source.into() },
        e @ DiagError::Unsupported { .. } => Error::refused(e.to_string(), "load the module that this needs"),
        e @ (DiagError::Changing { .. } | DiagError::Malformed { .. } | DiagError::Short { .. }) => {
            Error::Changed { what: e.to_string() }
        }
    })
}

/// What shutdown(2) is to be called with, for the two bits of an image.
fn shutdown_how(bits: Option<i32>) -> Option<rustix::net::Shutdown> {
    match bits {
        Some(1) => Some(rustix::net::Shutdown::Read),
        Some(2) => Some(rustix::net::Shutdown::Write),
        Some(3) => Some(rustix::net::Shutdown::Both),
        _ => None,
    }
}

/// For tests: makes sockets again whose names are in use as long as a child that another test just forked has the old ones.
#[cfg(test)]
fn once_free<T>(mut make: impl FnMut() -> crate::error::Result<T>) -> T {
    let began = std::time::Instant::now();
    loop {
        match make() {
            Ok(made) => return made,
            Err(e) if e.chain().contains("in use") && began.elapsed().as_secs() < 10 => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            Err(e) => panic!("{}", e.chain()),
        }
    }
}
