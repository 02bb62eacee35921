//! pidfds: of the guest itself, of a child that lives, of one that is a zombie, of several that are gone.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::support::*;

fn open(pid: i32) -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(sys(libc::syscall(libc::SYS_pidfd_open, pid, 0)) as i32) }
}

fn ended(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    unsafe { sys(libc::poll(&raw mut poll, 1, 0)) == 1 }
}

fn signal(fd: &OwnedFd, signal: i32) -> i64 {
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, 0, 0) }
}

fn pid_of(fd: &OwnedFd) -> Option<i32> {
    let text = did(std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())));
    text.lines().find_map(|l| l.strip_prefix("Pid:")).and_then(|n| n.trim().parse().ok())
}

/// Each leads to who it led to.
pub(super) fn processes() {
    let own = open(unsafe { libc::getpid() });
    let up = Shared::new();
    let child = fork(|| {
        up.set(0, 1);
        loop {
            unsafe { libc::pause() };
        }
    });
    up.wait(0, 1);
    let (one, two) = (open(child), open(child));
    let copy = did(one.try_clone());
    let zombie = fork(|| 3);
    let of_zombie = open(zombie);
    eventually("the end of a child", || ended(&of_zombie));
    let gone: Vec<OwnedFd> = (0..3)
        .map(|_| {
            let pid = fork(|| 0);
            let fd = open(pid);
            wait(pid);
            fd
        })
        .collect();
    let all = || [&own, &one, &two, &copy, &of_zombie].map(pid_of);
    let before = all();
    ready();
    check_eq!(all(), before);
    check!(gone.iter().all(|fd| ended(fd) && pid_of(fd) == Some(-1) && signal(fd, 0) == -1));
    check!(!ended(&own) && !ended(&one) && ended(&of_zombie));
    check_eq!(signal(&two, libc::SIGKILL), 0);
    eventually("the end of the other", || ended(&copy));
    check_eq!(wait(child), libc::SIGKILL);
    check_eq!(wait(zombie), 3 << 8);
}
