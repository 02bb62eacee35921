//! userfaultfd(2): write protection of another task's memory, by a descriptor that was made in that task.
//!
//! In asynchronous mode (kernel 6.7) nobody is asked when a protected page is written: the kernel takes the protection off,
//! and PAGEMAP_SCAN shows the page as written. When the last descriptor is closed, all protection is gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::calls;
use crate::error::{Error, Result};

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const API: u64 = 0xaa;
const MODE_WP: u64 = 2;
/// UFFD_FEATURE_WP_ASYNC, and what it builds on: WP_UNPOPULATED, WP_HUGETLBFS_SHMEM.
const ASYNC: u64 = 1 << 15 | 1 << 13 | 1 << 12;

/// O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY: what any task may ask for. The last is no limit in asynchronous mode,
/// where no fault waits for anyone.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

/// A userfaultfd in asynchronous mode.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Sets a new userfaultfd to asynchronous write protection.
    ///
    /// # Errors
    /// EINVAL from a kernel before 6.7.
    pub fn asynchronous(fd: OwnedFd) -> Result<Uffd> {
        api(fd.as_fd(), ASYNC)?;
        Ok(Uffd(fd))
    }

    /// Takes one that was set up before.
    pub fn from_fd(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }

    /// Registers an area, whole; again is no error.
    ///
    /// # Errors
    /// EBUSY for an area that another userfaultfd watches, ESRCH when the address space is gone.
    pub fn register(&self, start: u64, end: u64) -> Result<()> {
        let mut words = words(&[start, end - start, MODE_WP, 0]);
        calls::ioctl(self.0.as_fd(), "ioctl(UFFDIO_REGISTER)", UFFDIO_REGISTER, &mut words).map(drop)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Does this kernel have asynchronous write protection? Asked of a userfaultfd of our own that watches nothing.
pub fn knows_asynchronous() -> bool {
    // SAFETY: a new descriptor, which is ours alone.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, FLAGS);
        if fd < 0 {
            return false;
        }
        <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32)
    };
    api(fd.as_fd(), ASYNC).is_ok()
}

fn api(fd: BorrowedFd<'_>, features: u64) -> Result<()> {
    request(fd, features)
}

/// Asks a new userfaultfd for features (UFFDIO_API).
pub(super) fn request(fd: BorrowedFd<'_>, features: u64) -> Result<()> {
    let mut words = words(&[API, features, 0]);
    calls::ioctl(fd, "ioctl(UFFDIO_API)", UFFDIO_API, &mut words)?;
    let granted = words.get(8..16).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    if granted & features == features {
        Ok(())
    } else {
        Err(Error::Sys { call: "ioctl(UFFDIO_API)", source: std::io::Error::from_raw_os_error(libc::EINVAL) })
    }
}

pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}
