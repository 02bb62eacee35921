//! What the kernel says of its sockets: a client of NETLINK_SOCK_DIAG.
//!
//! One request a kind, made when it is asked for, answers for the whole network namespace of the thread that called
//! [`Diag::open`]. What an answer is made of is read by the pure functions in the modules below, which are fuzzed.
//!
//! Not in any answer: sockets that are neither bound nor connected (TCP, UDP), ICMP sockets (`ping`), and the kinds whose
//! diag module the kernel lacks ([`DiagError::Unsupported`]; `proc/net.rs` is the second choice for some). A question may
//! make the kernel load such a module, if the asker's namespaces allow it.
//!
//! Man page: sock_diag(7). Headers: linux/{sock,unix,inet,netlink,packet}_diag.h.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{sockopt, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

pub mod inet;
pub mod netlink;
pub mod packet;
pub mod unix;
pub mod wire;

use inet::{InetFamily, InetProtocol, InetSocket};
use netlink::NetlinkSocket;
use packet::PacketSocket;
use unix::UnixSocket;
use wire::{Answer, Malformed};

/// Why the kernel's sockets are not known.
#[derive(Debug, thiserror::Error)]
pub enum DiagError {
    /// No socket, or the kernel did not take the question.
    #[error("{call} for NETLINK_SOCK_DIAG")]
    Call {
        /// The system call.
        call: &'static str,
        /// What it said.
        #[source]
        source: Errno,
    },
    /// The kernel has no module for this kind.
    #[error("this kernel does not list {kind} sockets: it needs {config}, built in or as a module that is loaded")]
    Unsupported {
        /// The kind.
        kind: &'static str,
        /// The option of the kernel's configuration.
        config: &'static str,
    },
    /// The kernel answered with an error.
    #[error("the list of {kind} sockets")]
    Refused {
        /// The kind.
        kind: &'static str,
        /// What it said.
        #[source]
        source: Errno,
    },
    /// The list changed while it was made, every time.
    #[error("the list of {kind} sockets changed while it was read, {TRIES} times; stop what opens and closes sockets")]
    Changing {
        /// The kind.
        kind: &'static str,
    },
    /// The answer is not what this program understands.
    #[error("the list of {kind} sockets")]
    Malformed {
        /// The kind.
        kind: &'static str,
        /// Where.
        #[source]
        source: Malformed,
    },
    /// The answer did not come, or not whole.
    #[error("the list of {kind} sockets ends early")]
    Short {
        /// The kind.
        kind: &'static str,
    },
}

/// How often a list that changed is asked for.
const TRIES: u32 = 5;

/// The kernel's answers are no larger than this for a reader that offers as much.
const BUFFER: usize = 64 << 10;

/// A way to ask about the sockets of one network namespace.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

/// One kind of question.
struct Kind<T> {
    name: &'static str,
    config: &'static str,
    read: fn(&[u8]) -> Result<T, Malformed>,
}

impl Diag {
    /// For the network namespace that the calling thread is in now.
    ///
    /// # Errors
    /// If the kernel gives no such socket.
    pub fn open() -> Result<Self, DiagError> {
        let call = |call| move |source| DiagError::Call { call, source };
        let protocol = Some(rustix::net::netlink::SOCK_DIAG);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
            .map_err(call("socket"))?;
        // The kernel answers while it is asked. Should it ever not, this is an error and not a standstill of ours.
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(30)))
            .map_err(call("setsockopt"))?;
        Ok(Self { socket, buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// All unix sockets.
    ///
    /// # Errors
    /// See [`DiagError`].
    pub fn unix(&mut self) -> Result<Vec<UnixSocket>, DiagError> {
        self.ask(&unix::request(), Kind { name: "unix", config: "CONFIG_UNIX_DIAG", read: unix::parse })
    }

    /// All sockets of one IP protocol and family, but those in TIME_WAIT, which belong to nobody.
    ///
    /// # Errors
    /// See [`DiagError`].
    pub fn inet(&mut self, family: InetFamily, protocol: InetProtocol) -> Result<Vec<InetSocket>, DiagError> {
        let (name, config) = protocol.names();
        self.ask(&inet::request(family, protocol), Kind { name, config, read: inet::parse })
    }

    /// All netlink sockets, of every protocol; those of the kernel have inode 0 or none that a task holds.
    ///
    /// # Errors
    /// See [`DiagError`].
    pub fn netlink(&mut self) -> Result<Vec<NetlinkSocket>, DiagError> {
        self.ask(&netlink::request(), Kind { name: "netlink", config: "CONFIG_NETLINK_DIAG", read: netlink::parse })
    }

    /// All packet sockets.
    ///
    /// # Errors
    /// See [`DiagError`].
    pub fn packet(&mut self) -> Result<Vec<PacketSocket>, DiagError> {
        self.ask(&packet::request(), Kind { name: "packet", config: "CONFIG_PACKET_DIAG", read: packet::parse })
    }

    fn ask<T>(&mut self, body: &[u8], kind: Kind<T>) -> Result<Vec<T>, DiagError> {
        for _ in 0..TRIES {
            let mut sockets = Vec::new();
            self.sequence = self.sequence.wrapping_add(1);
            let request = wire::dump_request(self.sequence, body);
            let kernel = SocketAddrNetlink::new(0, 0);
            rustix::net::sendto(&self.socket, &request, SendFlags::empty(), &kernel)
                .map_err(|source| DiagError::Call { call: "sendto", source })?;
            if !self.receive(&kind, &mut sockets)? {
                return Ok(sockets);
            }
        }
        Err(DiagError::Changing { kind: kind.name })
    }

    /// Reads to the end of one answer; true if the list changed meanwhile.
    fn receive<T>(&mut self, kind: &Kind<T>, sockets: &mut Vec<T>) -> Result<bool, DiagError> {
        let mut changed = false;
        loop {
            let received = rustix::net::recvfrom(&self.socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC);
            let (_, length, sender) = match received {
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(DiagError::Short { kind: kind.name }),
                other => other.map_err(|source| DiagError::Call { call: "recvfrom", source })?,
            };
            let from_kernel = sender.is_some_and(|s| SocketAddrNetlink::try_from(s).is_ok_and(|s| s.pid() == 0));
            if !from_kernel {
                continue;
            }
            let datagram = self.buffer.get(..length).ok_or(DiagError::Short { kind: kind.name })?;
            let answer = wire::parse_datagram(datagram, self.sequence, kind.read, sockets)
                .map_err(|source| DiagError::Malformed { kind: kind.name, source })?;
            match answer {
                Answer::More { interrupted } => changed |= interrupted,
                Answer::Done { interrupted } => return Ok(changed | interrupted),
                Answer::Error(libc::ENOENT) => {
                    return Err(DiagError::Unsupported { kind: kind.name, config: kind.config });
                }
                Answer::Error(number) => {
                    return Err(DiagError::Refused { kind: kind.name, source: Errno::from_raw_os_error(number) });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
