//! Descriptors that signals are read from.

use super::pipes::read;
use super::signals::mask;
use super::support::*;

/// The mask stays, and the signal that is pending is read.
pub(super) fn signalfd() {
    let signals = [libc::SIGUSR1, libc::SIGRTMIN() + 9];
    mask(libc::SIG_BLOCK, &signals);
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for s in signals {
        unsafe { libc::sigaddset(&raw mut set, s) };
    }
    let fd = unsafe { sys(libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)) };
    let value = libc::sigval { sival_ptr: 99 as *mut libc::c_void };
    unsafe { sys(libc::sigqueue(libc::getpid(), signals[1], value)) };
    ready();
    let first = did(read(fd).map_err(|e| e.to_string()));
    check_eq!(first.len(), 128);
    check_eq!(u32::from_ne_bytes([first[0], first[1], first[2], first[3]]), signals[1] as u32);
    check_eq!(first[44], 99);
    check_eq!(read(fd), Err(libc::EAGAIN));
    unsafe { sys(libc::raise(libc::SIGUSR1)) };
    check_eq!(did(read(fd).map_err(|e| e.to_string()))[0], libc::SIGUSR1 as u8);
    check_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, libc::FD_CLOEXEC);
}
