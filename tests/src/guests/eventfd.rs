//! Event counters.

use super::pipes::{read, write};
use super::support::*;

fn number(fd: i32) -> Result<u64, i32> {
    read(fd).map(|b| b.try_into().map_or(u64::MAX, u64::from_ne_bytes))
}

/// Values and flags.
pub(super) fn eventfd() {
    let new = |value, flags| unsafe { sys(libc::eventfd(value, flags)) };
    let (plain, empty, large) = (new(41, libc::EFD_CLOEXEC), new(0, libc::EFD_NONBLOCK), new(0, libc::EFD_NONBLOCK));
    write(large, &(u64::MAX - 5).to_ne_bytes());
    ready();
    check_eq!(number(plain), Ok(41));
    check_eq!(unsafe { libc::fcntl(plain, libc::F_GETFD) }, libc::FD_CLOEXEC);
    check_eq!(number(empty), Err(libc::EAGAIN));
    check_eq!(number(large), Ok(u64::MAX - 5));
}

/// A semaphore gives one at a time.
pub(super) fn semaphore() {
    let fd = unsafe { sys(libc::eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK)) };
    ready();
    for _ in 0..3 {
        check_eq!(number(fd), Ok(1));
    }
    check_eq!(number(fd), Err(libc::EAGAIN));
}
