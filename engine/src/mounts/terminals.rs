//! Terminals that are mounted somewhere, as `/dev/console` of a container is.
//!
//! Such a mount has a name in a devpts as its root (`/0`), and a devpts that is made anew has none: the terminal is made before
//! the mount. Its master keeps the name alive until files are opened, where whoever has the terminal open gets it
//! (`files/tty/pair.rs`). One that nobody has open goes then, and its mount is of a deleted name, as it is outside of
//! checkpoints.
//!
//! Man page: pts(4).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use standstill_images::proto::Fstype;

use super::table::Mount;
use crate::error::{Call, Result};
use crate::files::tty::pair;

/// Terminals that were made so that their slaves can be mounted.
#[derive(Debug, Default)]
pub struct Terminals(Vec<Terminal>);

#[derive(Debug)]
struct Terminal {
    /// The device of its devpts, as it is in images.
    dev: u32,
    /// Its number there.
    index: u32,
    master: OwnedFd,
}

impl Terminals {
    /// Makes the terminal that mount `m` shows, in its devpts, where it is called `name`; false if it shows something else.
    pub fn make(&mut self, m: &Mount, name: &[u8], devpts: BorrowedFd<'_>) -> Result<bool> {
        let Some(index) = number(m.kind, name) else { return Ok(false) };
        if !self.0.iter().any(|t| (t.dev, t.index) == (m.dev, index)) {
            let master = pair::make_master(index, libc::O_RDWR as u32, b"/ptmx", devpts)?;
            self.0.push(Terminal { dev: m.dev, index, master });
        }
        Ok(true)
    }

    /// The master of terminal `index` of the devpts that `beside` lies in, if it was made with the mounts.
    pub fn take(&mut self, index: u32, beside: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
        let dev = rustix::fs::fstat(beside).call("fstat")?.st_dev;
        for (at, terminal) in self.0.iter().enumerate() {
            if terminal.index == index && rustix::fs::fstat(terminal.master.as_fd()).call("fstat")?.st_dev == dev {
                return Ok(Some(self.0.swap_remove(at).master));
            }
        }
        Ok(None)
    }
}

/// The number of a terminal, by its name in a devpts.
fn number(kind: Fstype, name: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(name).ok().filter(|_| kind == Fstype::Devpts)?;
    text.parse().ok().filter(|index: &u32| index.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(number(Fstype::Devpts, b"12"), Some(12));
        assert_eq!(number(Fstype::Tmpfs, b"12"), None);
        for other in [&b""[..], b"ptmx", b"012", b"+1", b"1/2", b"99999999999"] {
            assert_eq!(number(Fstype::Devpts, other), None);
        }
    }
}
