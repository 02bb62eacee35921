//! POSIX message queues: the system calls behind mq_open(3) and its like, which take names without a slash.
//!
//! Man pages: mq_overview(7), mq_getsetattr(2), mq_timedsend(3).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result};

/// `struct mq_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// O_NONBLOCK, or nothing.
    pub flags: libc::c_long,
    /// How many messages there may be.
    pub most: libc::c_long,
    /// How long each may be.
    pub size: libc::c_long,
    /// How many there are.
    pub count: libc::c_long,
    reserved: [libc::c_long; 4],
}

/// Of a queue.
pub fn attributes(queue: BorrowedFd<'_>) -> Result<Attributes> {
    let mut now = Attributes::default();
    // SAFETY: a place for one structure.
    let r = unsafe { libc::syscall(libc::SYS_mq_getsetattr, queue.as_raw_fd(), 0, &raw mut now) };
    if r < 0 {
        return Err(Error::last("mq_getsetattr"));
    }
    Ok(now)
}

/// One that is there.
pub fn open(name: &CStr, flags: i32) -> Result<OwnedFd> {
    open_with(name, flags & !libc::O_CREAT, 0, std::ptr::null())
}

/// A new one, open for both.
pub fn create(name: &CStr, mode: u32, most: libc::c_long, size: libc::c_long) -> Result<OwnedFd> {
    let wanted = Attributes { most, size, ..Attributes::default() };
    open_with(name, libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK, mode, &raw const wanted)
}

fn open_with(name: &CStr, flags: i32, mode: u32, wanted: *const Attributes) -> Result<OwnedFd> {
    // SAFETY: the name ends with a zero; the structure, if there is one, lives across the call; the new descriptor is ours alone.
    unsafe {
        let fd = libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags | libc::O_CLOEXEC, mode, wanted);
        match i32::try_from(fd) {
            Ok(fd @ 0..) => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(Error::last("mq_open")),
        }
    }
}

/// Takes a name away.
pub fn remove(name: &CStr) -> Result<()> {
    // SAFETY: the name ends with a zero.
    match unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last("mq_unlink")),
    }
}

/// Sends a message.
pub fn send(queue: BorrowedFd<'_>, bytes: &[u8], priority: u32) -> Result<()> {
    // SAFETY: the bytes live across the call.
    let r = unsafe {
        libc::syscall(libc::SYS_mq_timedsend, queue.as_raw_fd(), bytes.as_ptr(), bytes.len(), priority, 0usize)
    };
    if r < 0 {
        return Err(Error::last("mq_timedsend"));
    }
    Ok(())
}
