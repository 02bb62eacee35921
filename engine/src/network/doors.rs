//! In and out of network namespaces: a thread of the engine goes into the one that a socket is in, or is to be made in, and
//! comes back.
//!
//! Man pages: network_namespaces(7), setns(2).

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::sched::{setns, CloneFlags};

use super::inode;
use crate::error::{Call, Result};
use crate::sys::calls;

const SIOCGSKNS: u64 = 0x894c;

/// The network namespaces of a tree, and ours, by their ids in images.
#[derive(Debug)]
pub struct Doors {
    /// Where this thread is.
    here: Cell<u32>,
    own: u32,
    all: Vec<(u32, u64, OwnedFd)>,
}

impl Doors {
    /// Ours alone, which has this id.
    pub fn ours(id: u32) -> Doors {
        Doors { here: Cell::new(id), own: id, all: Vec::new() }
    }

    /// Ours, and these.
    pub fn new(own: u32, others: impl IntoIterator<Item = (u32, OwnedFd)>) -> Result<Doors> {
        let mut doors = Doors::ours(own);
        for (id, fd) in others.into_iter().filter(|(id, _)| *id != own) {
            doors.all.push((id, inode(fd.as_fd())?, fd));
        }
        if !doors.all.is_empty() {
            let own = super::own()?;
            doors.all.push((doors.own, inode(own.as_fd())?, own));
        }
        Ok(doors)
    }

    /// Has the tree one of its own?
    pub fn are_many(&self) -> bool {
        !self.all.is_empty()
    }

    /// All of them, ours too; just ours if the tree has none.
    pub fn ids(&self) -> Vec<u32> {
        if self.all.is_empty() {
            return vec![self.own];
        }
        self.all.iter().map(|(id, ..)| *id).collect()
    }

    /// Those of the tree, with their ids.
    pub fn of_tree(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        self.all.iter().filter(|(id, ..)| *id != self.own).map(|(id, _, fd)| (*id, fd.as_fd())).collect()
    }

    /// The namespace with this id; none for ours if there are no others.
    pub fn get(&self, id: u32) -> Option<BorrowedFd<'_>> {
        self.all.iter().find(|(n, ..)| *n == id).map(|(.., fd)| fd.as_fd())
    }

    /// The id of the namespace with this inode.
    pub fn id_of(&self, number: u64) -> Option<u32> {
        self.all.iter().find(|(_, inode, _)| *inode == number).map(|(id, ..)| *id)
    }

    /// The namespace that a socket was made in, where it stays, wherever its task is; none if that is none of these.
    /// `usual`: which to believe in, if that may not be asked.
    pub fn of_socket(&self, socket: BorrowedFd<'_>, usual: u32) -> Result<Option<u32>> {
        let fd = match calls::ioctl_value(socket, "ioctl(SIOCGSKNS)", SIOCGSKNS, 0) {
            Ok(fd) => i32::try_from(fd).unwrap_or(-1),
            // without CAP_NET_ADMIN this cannot be known; the lists of sockets tell for most
            Err(e) if e.errno() == libc::EPERM => return Ok(Some(usual)),
            Err(e) => return Err(e),
        };
        let theirs = rustix::fs::stat(format!("/proc/thread-self/fd/{fd}")).call("stat(/proc/thread-self/fd/N)");
        nix::unistd::close(fd).call("close")?;
        let theirs = theirs?.st_ino;
        if self.all.is_empty() {
            let ours = rustix::fs::stat("/proc/thread-self/ns/net").call("stat(/proc/thread-self/ns/net)")?;
            return Ok((theirs == ours.st_ino).then_some(self.own));
        }
        Ok(self.id_of(theirs))
    }

    /// Goes in, until what comes back is dropped. One that is not known is ours.
    pub fn enter(self: &Rc<Self>, id: u32) -> Result<Inside> {
        let before = self.here.get();
        if before != id && self.get(id).is_some() {
            self.go(id)?;
        }
        Ok(Inside { doors: Rc::clone(self), before })
    }

    fn go(&self, id: u32) -> Result<()> {
        if let Some(fd) = self.get(id) {
            setns(fd, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
            self.here.set(id);
        }
        Ok(())
    }
}

/// This thread is in a network namespace.
#[derive(Debug)]
#[must_use]
pub struct Inside {
    doors: Rc<Doors>,
    before: u32,
}

impl Drop for Inside {
    fn drop(&mut self) {
        if self.doors.here.get() != self.before {
            if let Err(e) = self.doors.go(self.before) {
                tracing::error!("the way back into our network namespace is lost: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn in_and_out() {
        let Ok(other) = super::super::create() else { return };
        std::thread::spawn(move || {
            let here = || rustix::fs::stat("/proc/thread-self/ns/net").unwrap().st_ino;
            let (ours, theirs) = (here(), inode(other.as_fd()).unwrap());
            let doors = Rc::new(Doors::new(1, [(2, other)]).unwrap());
            let socket = {
                let _in = doors.enter(2).unwrap();
                assert_eq!(here(), theirs);
                {
                    let _out = doors.enter(1).unwrap();
                    assert_eq!(here(), ours);
                    let _there = doors.enter(1).unwrap();
                }
                assert_eq!(here(), theirs);
                std::net::UdpSocket::bind("0.0.0.0:0").unwrap()
            };
            assert_eq!(here(), ours);
            assert_eq!(doors.of_socket(socket.as_fd(), 9).unwrap(), Some(2));
            assert_eq!(Doors::ours(5).of_socket(socket.as_fd(), 9).unwrap(), None);
            let own = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            assert_eq!(doors.of_socket(own.as_fd(), 9).unwrap(), Some(1));
            assert_eq!(Doors::ours(5).of_socket(own.as_fd(), 9).unwrap(), Some(5));
        })
        .join()
        .unwrap();
    }
}
