//! Locks on files, of open files and of processes: another process finds them as they were.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::support::*;

const R: i32 = libc::F_RDLCK;
const W: i32 = libc::F_WRLCK;

fn open(name: &str) -> File {
    did(File::options().read(true).write(true).create(true).truncate(false).open(name))
}

fn request(kind: i32, start: i64, len: i64) -> libc::flock {
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (kind as i16, start, len);
    lock
}

/// Takes or gives up a lock of fcntl; what it fails with.
fn set(file: &File, command: i32, kind: i32, start: i64, len: i64) -> i32 {
    let lock = request(kind, start, len);
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) } {
        0 => 0,
        _ => errno(),
    }
}

/// Who keeps `file` from a lock: type, start, length, process.
fn holder(file: &File, command: i32, kind: i32, start: i64, len: i64) -> Option<(i32, i64, i64, i32)> {
    let mut lock = request(kind, start, len);
    sys(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) });
    let held = i32::from(lock.l_type) != libc::F_UNLCK;
    held.then_some((lock.l_type.into(), lock.l_start, lock.l_len, lock.l_pid))
}

fn flock(file: &File, operation: i32) -> i32 {
    match unsafe { libc::flock(file.as_raw_fd(), operation) } {
        0 => 0,
        _ => errno(),
    }
}

/// Checks in a process that has no locks.
#[track_caller]
fn elsewhere(checks: impl FnOnce()) {
    let child = fork(|| {
        checks();
        0
    });
    check_eq!(wait(child), 0);
}

/// flock(2): exclusive and shared; by way of copies, in two processes.
pub(super) fn whole() {
    let shared = Shared::new();
    let (exclusive, both, none) = (open("exclusive"), open("both"), open("none"));
    let copy = unsafe { File::from_raw_fd(sys(libc::dup(exclusive.as_raw_fd()))) };
    check_eq!(flock(&exclusive, libc::LOCK_EX), 0);
    check_eq!(flock(&both, libc::LOCK_SH), 0);
    let other = open("both");
    check_eq!(flock(&other, libc::LOCK_SH), 0);
    // this one is in the hands of a child when its opener has closed it
    let kept = open("kept");
    check_eq!(flock(&kept, libc::LOCK_EX), 0);
    let child = fork(|| {
        // only that one is to live on here
        for file in [&exclusive, &copy, &both, &other] {
            unsafe { sys(libc::close(file.as_raw_fd())) };
        }
        shared.set(0, 1);
        shared.wait(0, 2);
        0
    });
    drop(kept);
    shared.wait(0, 1);
    ready();
    elsewhere(|| {
        for (name, operation, result) in [
            ("exclusive", libc::LOCK_SH, libc::EWOULDBLOCK),
            ("both", libc::LOCK_EX, libc::EWOULDBLOCK),
            ("both", libc::LOCK_SH, 0),
            ("kept", libc::LOCK_SH, libc::EWOULDBLOCK),
            ("none", libc::LOCK_EX, 0),
        ] {
            check_eq!((name, operation, flock(&open(name), operation | libc::LOCK_NB)), (name, operation, result));
        }
    });
    check_eq!(flock(&none, libc::LOCK_EX | libc::LOCK_NB), 0);
    // each of the two holds its own
    drop(other);
    check_eq!(flock(&open("both"), libc::LOCK_EX | libc::LOCK_NB), libc::EWOULDBLOCK);
    check_eq!(flock(&both, libc::LOCK_UN), 0);
    check_eq!(flock(&open("both"), libc::LOCK_EX | libc::LOCK_NB), 0);
    // one lock, whichever descriptor is used
    drop(exclusive);
    check_eq!(flock(&open("exclusive"), libc::LOCK_SH | libc::LOCK_NB), libc::EWOULDBLOCK);
    check_eq!(flock(&copy, libc::LOCK_SH), 0);
    check_eq!(flock(&open("exclusive"), libc::LOCK_SH | libc::LOCK_NB), 0);
    shared.set(0, 2);
    check_eq!(wait(child), 0);
    check_eq!(flock(&open("kept"), libc::LOCK_EX | libc::LOCK_NB), 0);
}

/// Locks of a process on parts of a file that it has open more than once.
pub(super) fn ranges() {
    let file = open("file");
    let copy = unsafe { File::from_raw_fd(sys(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 50))) };
    let other = open("file");
    let me = std::process::id() as i32;
    check_eq!(set(&file, libc::F_SETLK, W, 2, 3), 0);
    check_eq!(set(&other, libc::F_SETLK, R, 10, 1), 0);
    check_eq!(set(&copy, libc::F_SETLK, R, 1 << 40, 0), 0);
    let whole = open("whole");
    check_eq!(set(&whole, libc::F_SETLK, W, 0, 0), 0);
    ready();
    elsewhere(|| {
        let mine = open("file");
        check_eq!(holder(&mine, libc::F_GETLK, W, 0, 0), Some((W, 2, 3, me)));
        check_eq!(holder(&mine, libc::F_GETLK, R, 0, 0), Some((W, 2, 3, me)));
        check_eq!(holder(&mine, libc::F_GETLK, W, 5, 0), Some((R, 10, 1, me)));
        check_eq!(holder(&mine, libc::F_GETLK, R, 5, 0), None);
        check_eq!(holder(&mine, libc::F_GETLK, W, 11, 0), Some((R, 1 << 40, 0, me)));
        check_eq!(holder(&mine, libc::F_GETLK, W, 11, 1000), None);
        check_eq!(set(&mine, libc::F_SETLK, W, 0, 3), libc::EAGAIN);
        check_eq!(set(&mine, libc::F_SETLK, W, 5, 5), 0);
        check_eq!(holder(&open("whole"), libc::F_GETLK, R, 77, 1), Some((W, 0, 0, me)));
    });
    // they go with any descriptor of the file
    drop(other);
    elsewhere(|| check_eq!(set(&open("file"), libc::F_SETLK, W, 0, 0), 0));
    elsewhere(|| check_eq!(set(&open("whole"), libc::F_SETLK, W, 0, 0), libc::EAGAIN));
}

/// Locks that a process has on a file which it has from its parent; its parent has others there.
pub(super) fn inherited() {
    let shared = Shared::new();
    let file = open("file");
    let me = std::process::id() as i32;
    let child = fork(|| {
        check_eq!(set(&file, libc::F_SETLK, W, 100, 10), 0);
        shared.set(0, 1);
        shared.wait(0, 2);
        check_eq!(set(&file, libc::F_SETLK, W, 0, 10), libc::EAGAIN);
        0
    });
    check_eq!(set(&file, libc::F_SETLK, W, 0, 10), 0);
    shared.wait(0, 1);
    ready();
    elsewhere(|| {
        check_eq!(holder(&file, libc::F_GETLK, W, 0, 50), Some((W, 0, 10, me)));
        check_eq!(holder(&file, libc::F_GETLK, W, 50, 0), Some((W, 100, 10, child)));
    });
    shared.set(0, 2);
    check_eq!(wait(child), 0);
    check_eq!(set(&file, libc::F_SETLK, W, 0, 0), 0);
}

/// Locks of open files on parts of them.
pub(super) fn open_files() {
    let (first, second) = (open("file"), open("file"));
    check_eq!(set(&first, libc::F_OFD_SETLK, W, 2, 3), 0);
    check_eq!(set(&first, libc::F_OFD_SETLK, R, 20, 0), 0);
    check_eq!(set(&second, libc::F_OFD_SETLK, R, 30, 5), 0);
    let copy = unsafe { File::from_raw_fd(sys(libc::dup(first.as_raw_fd()))) };
    ready();
    elsewhere(|| {
        let mine = open("file");
        check_eq!(holder(&mine, libc::F_OFD_GETLK, R, 0, 0), Some((W, 2, 3, -1)));
        check_eq!(holder(&mine, libc::F_OFD_GETLK, W, 5, 20), Some((R, 20, 0, -1)));
        check_eq!(set(&mine, libc::F_OFD_SETLK, W, 4, 1), libc::EAGAIN);
        check_eq!(set(&mine, libc::F_OFD_SETLK, R, 5, 0), 0);
        check_eq!(set(&mine, libc::F_SETLK, R, 0, 3), libc::EAGAIN);
        // it is the open file's, and this process has that too
        check_eq!(set(&copy, libc::F_OFD_SETLK, W, 2, 3), 0);
    });
    check_eq!(set(&second, libc::F_OFD_SETLK, W, 2, 1), libc::EAGAIN);
    drop(first);
    check_eq!(set(&second, libc::F_OFD_SETLK, W, 2, 1), libc::EAGAIN);
    check_eq!(set(&copy, libc::F_OFD_SETLK, W, 30, 1), libc::EAGAIN);
    check_eq!(set(&second, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0), 0);
    check_eq!(set(&copy, libc::F_OFD_SETLK, W, 30, 1), 0);
}

/// More locks than a page of text has room for.
pub(super) fn many() {
    const COUNT: i64 = 3000;
    let file = open("file");
    for n in 0..COUNT {
        check_eq!(set(&file, libc::F_SETLK, if n % 3 == 0 { W } else { R }, n * 10, 1 + n % 7), 0);
    }
    let me = std::process::id() as i32;
    ready();
    elsewhere(|| {
        let mine = open("file");
        for n in 0..COUNT {
            let kind = if n % 3 == 0 { W } else { R };
            check_eq!(holder(&mine, libc::F_GETLK, W, n * 10, 10), Some((kind, n * 10, 1 + n % 7, me)));
        }
        check_eq!(holder(&mine, libc::F_GETLK, W, COUNT * 10, 0), None);
    });
}

/// Processes that wait for locks that others hold: they do not have them yet, and get them in the end.
pub(super) fn waiting() {
    let shared = Shared::new();
    let (ranges, whole) = (open("ranges"), open("whole"));
    check_eq!(set(&ranges, libc::F_SETLK, W, 0, 10), 0);
    check_eq!(flock(&whole, libc::LOCK_EX), 0);
    let waits = |n: usize, wait: &dyn Fn() -> i32| {
        fork(|| {
            shared.set(n, 1);
            check_eq!(wait(), 0);
            shared.set(n, 2);
            shared.wait(9, 1);
            0
        })
    };
    let first = waits(0, &|| set(&open("ranges"), libc::F_SETLKW, W, 5, 10));
    let second = waits(1, &|| {
        let own = open("whole");
        let result = flock(&own, libc::LOCK_EX);
        std::mem::forget(own);
        result
    });
    shared.wait(0, 1);
    shared.wait(1, 1);
    std::thread::sleep(std::time::Duration::from_millis(50));
    ready();
    check_eq!((shared.get(0), shared.get(1)), (1, 1));
    // nobody has what the first waits for
    elsewhere(|| check_eq!(set(&open("ranges"), libc::F_SETLK, W, 10, 5), 0));
    check_eq!(set(&ranges, libc::F_SETLK, libc::F_UNLCK, 0, 0), 0);
    check_eq!(flock(&whole, libc::LOCK_UN), 0);
    shared.wait(0, 2);
    shared.wait(1, 2);
    check_eq!(flock(&whole, libc::LOCK_SH | libc::LOCK_NB), libc::EWOULDBLOCK);
    shared.set(9, 1);
    check_eq!((wait(first), wait(second)), (0, 0));
}
