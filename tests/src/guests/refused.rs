//! What cannot be carried, or not without an option: the dump says so by name, before it touches anything, and the guest
//! never hears of it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::support::*;

/// A deleted file that is larger than the limit.
pub(super) fn big_ghost() {
    let mut file = did(File::create("gone"));
    did(file.write_all(&[7; 20_000]));
    did(std::fs::remove_file("gone"));
    ready();
    check_eq!(did(file.metadata()).len(), 20_000);
}

/// A ring for asynchronous input and output.
pub(super) fn io_uring() {
    let mut parameters = [0u32; 30];
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    if fd < 0 {
        // switched off on this machine: something else that nobody carries
        perf();
        return;
    }
    ready();
}

/// A lease on a deleted file, which to read would break it.
pub(super) fn lease() {
    did(std::fs::write("leased", b"x"));
    let file = did(File::options().write(true).open("leased"));
    unsafe { sys(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)) };
    did(std::fs::remove_file("leased"));
    ready();
    check_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }, libc::F_WRLCK);
}

/// A lock, without --file-locks.
pub(super) fn lock() {
    let file = did(File::create("locked"));
    unsafe { sys(libc::flock(file.as_raw_fd(), libc::LOCK_EX)) };
    ready();
    let other = did(File::open("locked"));
    check_eq!(unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, -1);
}

/// A connection to a process outside the tree.
pub(super) fn outside_socket() {
    let mut fds = [0; 2];
    unsafe { sys(libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr())) };
    // the first child ends, so the second is nobody's here: it is outside of the tree
    let first = fork(|| {
        fork(|| {
            unsafe {
                libc::close(fds[0]);
                libc::setsid();
            }
            loop {
                match super::pipes::read(fds[1]) {
                    Ok(bytes) if bytes.is_empty() => return 0,
                    Ok(bytes) => super::pipes::write(fds[1], &bytes),
                    Err(_) => return 1,
                }
            }
        });
        0
    });
    check_eq!(wait(first), 0);
    unsafe { libc::close(fds[1]) };
    ready();
    super::pipes::write(fds[0], b"still there");
    check_eq!(super::pipes::read(fds[0]), Ok(b"still there".to_vec()));
}

/// A performance counter.
pub(super) fn perf() {
    let mut attributes = [0u8; 112];
    // PERF_TYPE_SOFTWARE, size, PERF_COUNT_SW_TASK_CLOCK
    attributes[0] = 1;
    attributes[4] = 112;
    attributes[8] = 1;
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) };
    let _file = unsafe { File::from_raw_fd(sys(fd) as i32) };
    ready();
}

/// A child that is being traced.
pub(super) fn traced() {
    let shared = Shared::new();
    let child = fork(|| {
        shared.set(0, 1);
        shared.wait(1, 1);
        0
    });
    shared.wait(0, 1);
    unsafe { sys(libc::ptrace(libc::PTRACE_SEIZE, child, 0, 0)) };
    ready();
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}

/// Memory of the program that it serves itself.
pub(super) fn userfaultfd() {
    const USER_MODE_ONLY: i32 = 1;
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) };
    let _file = unsafe { File::from_raw_fd(sys(fd) as i32) };
    ready();
}

/// A pidfd of a process that stays behind.
pub(super) fn pidfd() {
    let _file = unsafe { File::from_raw_fd(sys(libc::syscall(libc::SYS_pidfd_open, 1, 0)) as i32) };
    ready();
}

/// A deleted file that has another name, and behind it something that is refused: no name is left of the dump.
pub(super) fn link() {
    did(std::fs::write("first", b"two names"));
    let file = did(File::open("first"));
    did(std::fs::hard_link("first", "second"));
    did(std::fs::remove_file("first"));
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) };
    let _refused = unsafe { File::from_raw_fd(sys(fd) as i32) };
    let names = || {
        let mut all: Vec<_> = did(std::fs::read_dir(".")).map(|e| did(e).file_name()).collect();
        all.retain(|name| name != "ready" && name != "check" && name != "check.new");
        all.sort();
        all
    };
    let before = names();
    ready();
    check_eq!(names(), before);
    check_eq!(did(std::io::read_to_string(file)), "two names");
}
