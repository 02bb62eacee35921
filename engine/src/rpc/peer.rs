//! Who is at the other end of a connection, and being no more than that one.
//!
//! The service's socket is open to everyone, so a worker becomes its client before it reads a request: user, groups and
//! capabilities are the client's, and from then on the kernel itself says what may be traced, read, written and made. What the
//! service adds is CAP_CHECKPOINT_RESTORE, which gives power over nobody whom the client could not trace (it opens
//! `/proc/PID/map_files` of those, and lets a restore choose its process ids). The bounding set shrinks with the others, so
//! that an exec as uid 0 brings nothing back. A client that has all that the service has is served as the service is.
//!
//! User and groups come from the socket, as they were when the client connected (SO_PEERCRED, SO_PEERGROUPS). Capabilities
//! cannot be had like that, only as they are now, and by now a client may have become another program by an exec that gives
//! some: so only those of uid 0 count, to whom an exec gives no more than it has a right to. They are asked for while a pidfd
//! of the socket (SO_PEERPIDFD, Linux 6.5) says that the process is the same. All other clients count as ones without
//! any, and so does one in another user namespace.
//!
//! Not applied: security modules' labels, seccomp filters, and limits of the client.
//!
//! Man pages: unix(7), capabilities(7), pidfd_open(2), ptrace(2) "Ptrace access mode checking".

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::{Gid, Uid};
use rustix::event::{PollFd, PollFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::request::Client;
use super::Fault;
use crate::sys::calls;

const SO_PEERGROUPS: i32 = 59;
const SO_PEERPIDFD: i32 = 77;
/// As many groups as the kernel lets a process have.
const GROUPS: usize = 1 << 16;

fn lost(what: &str, e: impl std::fmt::Display) -> Fault {
    Fault::plain(format!("{what}: {e}"))
}

/// Who connected, or made the pair of sockets.
pub fn client(socket: BorrowedFd<'_>, is_parent: bool) -> Result<Client, Fault> {
    let of = nix::sys::socket::getsockopt(&socket, PeerCredentials);
    let of = of.map_err(|e| lost("Can't get socket options", e))?;
    Ok(Client { pid: of.pid(), is_parent })
}

/// The capabilities of a client, as far as it is certain that they are its own and mean the same here.
fn capabilities(socket: BorrowedFd<'_>, pid: i32) -> Option<CapabilitySet> {
    let mut number = [0; 4];
    calls::getsockopt(socket, libc::SOL_SOCKET, SO_PEERPIDFD, &mut number).ok()?;
    let number = i32::from_ne_bytes(number);
    let pidfd: OwnedFd = calls::dup_number(number).ok()?;
    nix::unistd::close(number).ok()?;
    let theirs = std::fs::read_link(format!("/proc/{pid}/ns/user")).ok()?;
    let ours = std::fs::read_link("/proc/self/ns/user").ok()?;
    let found = rustix::thread::capabilities(rustix::process::Pid::from_raw(pid)).ok()?;
    // it is alive still, so what was read was its own
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    let alive = rustix::event::poll(&mut ended, Some(&now)) == Ok(0);
    (alive && theirs == ours).then_some(found.effective)
}

fn groups(socket: BorrowedFd<'_>) -> Result<Vec<Gid>, Fault> {
    let mut bytes = vec![0; GROUPS * 4];
    let len = calls::getsockopt(socket, libc::SOL_SOCKET, SO_PEERGROUPS, &mut bytes);
    let len = len.map_err(|e| lost("Can't get the client's groups", e))?;
    let words = bytes.get(..len).unwrap_or_default().chunks_exact(4);
    Ok(words.filter_map(|w| w.try_into().ok()).map(u32::from_ne_bytes).map(Gid::from_raw).collect())
}

/// Makes this process what its client is. For a program of one thread, before it does anything for that client.
pub fn become_client(socket: BorrowedFd<'_>) -> Result<(), Fault> {
    let of = nix::sys::socket::getsockopt(&socket, PeerCredentials).map_err(|e| lost("Can't get socket options", e))?;
    let own = rustix::thread::capabilities(None).map_err(|e| lost("capget", e))?;
    let theirs = if of.uid() == 0 { capabilities(socket, of.pid()) } else { None };
    let theirs = theirs.unwrap_or(CapabilitySet::empty());
    if of.uid() == nix::unistd::geteuid().as_raw() && theirs.contains(own.effective) {
        return Ok(());
    }
    let allowed = own.permitted & (theirs | CapabilitySet::CHECKPOINT_RESTORE);
    let (uid, gid) = (Uid::from_raw(of.uid()), Gid::from_raw(of.gid()));
    let groups = groups(socket)?;
    let failed = |e: nix::errno::Errno| lost("cannot become the client", e.desc());
    let refused = |e: rustix::io::Errno| lost("cannot become the client", e);
    for capability in (CapabilitySet::all() - allowed).iter() {
        // those that the kernel does not know are none
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        if uid.is_root() && rustix::thread::capability_is_in_bounding_set(capability) == Ok(true) {
            return Err(Fault::plain("cannot become the client: CAP_SETPCAP is missing".into()));
        }
    }
    rustix::thread::set_keep_capabilities(true).map_err(refused)?;
    let changes = own.effective.contains(CapabilitySet::SETGID);
    if changes {
        nix::unistd::setgroups(&groups).map_err(failed)?;
    }
    nix::unistd::setresgid(gid, gid, gid).map_err(failed)?;
    nix::unistd::setresuid(uid, uid, uid).map_err(failed)?;
    let sets = CapabilitySets { effective: allowed, permitted: allowed, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(refused)?;
    // our own files below /proc are ours again; the kernel still keeps those out who have fewer capabilities
    let dumpable = rustix::process::DumpableBehavior::Dumpable;
    rustix::process::set_dumpable_behavior(dumpable).map_err(refused)?;
    tracing::info!("serving uid {uid} gid {gid} with its own rights, capabilities {:#x}", allowed.bits());
    Ok(())
}
