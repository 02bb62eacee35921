//! userfaultfd(2): memory that comes when it is first touched.
//!
//! A descriptor that was made in a task stands for the memory of that task wherever it is used. Faults of registered areas wait
//! until pages are put there; forks, and areas that are moved, unmapped or given back, are told and wait until they have been
//! read. While one of these is not read, nothing can be put anywhere (EAGAIN).
//!
//! Man pages: userfaultfd(2), ioctl_userfaultfd(2).

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use super::calls;
use super::uffd::{request, words};
use crate::error::{Call, Result};

const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_POISON: u64 = 0xc020_aa08;
const MODE_MISSING: u64 = 1;
/// UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE, _UNMAP.
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
/// UFFD_FEATURE_POISON (kernel 6.6).
const POISON: u64 = 1 << 14;
/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// O_CLOEXEC | O_NONBLOCK: faults of the kernel itself wait, too.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
/// USERFAULTFD_IOC_NEW of /dev/userfaultfd.
pub const NEW: u64 = 0xaa00;

/// What has happened.
#[derive(Debug)]
pub enum Event {
    /// A page is waited for.
    Fault(u64),
    /// There is a child with a copy of everything.
    Fork(Uffd),
    /// An area has moved: from, to, how many bytes.
    Remap(u64, u64, u64),
    /// Pages are gone: from, to.
    Remove(u64, u64),
    /// Something else.
    Unknown(u8),
}

/// How far it went.
#[derive(Debug)]
pub struct Put {
    /// Bytes that are there now.
    pub done: u64,
    /// Why not all; an errno.
    pub errno: Option<i32>,
}

/// A userfaultfd for missing pages.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Sets a new userfaultfd up.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_PTRACE, EINVAL from a kernel before 4.11.
    pub fn new(fd: OwnedFd) -> Result<Uffd> {
        if request(fd.as_fd(), EVENTS | POISON).is_err() {
            request(fd.as_fd(), EVENTS)?;
        }
        Ok(Uffd(fd))
    }

    /// Takes one that is set up.
    pub fn from_fd(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }

    /// Registers an area.
    ///
    /// # Errors
    /// EBUSY for an area that another userfaultfd watches, EINVAL for one of a kind that cannot be.
    pub fn register(&self, start: u64, end: u64) -> Result<()> {
        let mut words = words(&[start, end - start, MODE_MISSING, 0]);
        calls::ioctl(self.0.as_fd(), "ioctl(UFFDIO_REGISTER)", UFFDIO_REGISTER, &mut words).map(drop)
    }

    /// Puts pages where there are none, and wakes who waits for them.
    pub fn copy(&self, address: u64, pages: &[u8]) -> Put {
        // the kernel reads from the slice, which lives across the call
        let mut words = words(&[address, pages.as_ptr() as u64, pages.len() as u64, 0, 0]);
        let done = calls::ioctl(self.0.as_fd(), "ioctl(UFFDIO_COPY)", UFFDIO_COPY, &mut words);
        put(done, words.get(32..40))
    }

    /// The same with a page of zeros.
    pub fn zero(&self, address: u64, bytes: u64) -> Put {
        let mut words = words(&[address, bytes, 0, 0]);
        let done = calls::ioctl(self.0.as_fd(), "ioctl(UFFDIO_ZEROPAGE)", UFFDIO_ZEROPAGE, &mut words);
        put(done, words.get(24..32))
    }

    /// Who touches these pages gets SIGBUS, for ever.
    pub fn poison(&self, address: u64, bytes: u64) -> Put {
        let mut words = words(&[address, bytes, 0, 0]);
        let done = calls::ioctl(self.0.as_fd(), "ioctl(UFFDIO_POISON)", UFFDIO_POISON, &mut words);
        put(done, words.get(24..32))
    }

    /// Wakes who waits for these pages, which are there.
    pub fn wake(&self, address: u64, bytes: u64) {
        let mut words = words(&[address, bytes]);
        // nobody may be there any more
        let _ = calls::ioctl(self.0.as_fd(), "ioctl(UFFDIO_WAKE)", UFFDIO_WAKE, &mut words);
    }

    /// What has happened, as much as there is at once.
    pub fn events(&self) -> Result<Vec<Event>> {
        let mut buffer = [0u8; MESSAGE * 16];
        match rustix::io::read(&self.0, &mut buffer) {
            Ok(n) => Ok(buffer[..n.min(buffer.len())].chunks_exact(MESSAGE).map(event).collect()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(e) => Err(e).call("read(userfaultfd)"),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn put(done: Result<i64>, field: Option<&[u8]>) -> Put {
    let value = field.and_then(|b| b.try_into().ok()).map_or(0, i64::from_le_bytes);
    // a negative number is an errno, the same that the call says
    Put { done: u64::try_from(value).unwrap_or(0), errno: done.err().map(|e| e.errno()) }
}

fn event(message: &[u8]) -> Event {
    const FAULT: u8 = 0x12;
    const FORK: u8 = 0x13;
    const REMAP: u8 = 0x14;
    const REMOVE: u8 = 0x15;
    const UNMAP: u8 = 0x16;
    let word = |n: usize| message.get(n..n + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    match message.first().copied().unwrap_or(0) {
        FAULT => Event::Fault(word(16)),
        FORK => {
            let number = (word(8) & 0xffff_ffff) as i32;
            // SAFETY: the kernel has just made this descriptor for us, with the message that was read once.
            Event::Fork(Uffd(unsafe { OwnedFd::from_raw_fd(number) }))
        }
        REMAP => Event::Remap(word(8), word(16), word(24)),
        REMOVE | UNMAP => Event::Remove(word(8), word(16)),
        other => Event::Unknown(other),
    }
}
