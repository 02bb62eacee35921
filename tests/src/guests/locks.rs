//! Locks on files: of the process (POSIX), of the open file (flock, OFD).

use std::fs::File;
use std::os::fd::AsRawFd as _;

use super::support::*;

fn record(kind: i32, from: i64, length: i64) -> libc::flock {
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = from;
    lock.l_len = length;
    lock
}

/// Whether another process could have this lock.
fn free(file: &File, kind: i32, from: i64, length: i64) -> bool {
    let mut lock = record(kind, from, length);
    unsafe { sys(libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock)) };
    i32::from(lock.l_type) == libc::F_UNLCK
}

/// They hold afterwards too, against another process, and end with what held them.
pub(super) fn locks() {
    let shared = Shared::new();
    let open = |name: &str| did(File::options().read(true).write(true).create(true).truncate(false).open(name));
    let (posix, flock, reader) = (open("posix"), open("flock"), open("reader"));
    let lock = |kind, from, length| {
        let lock = record(kind, from, length);
        unsafe { sys(libc::fcntl(posix.as_raw_fd(), libc::F_SETLK, &raw const lock)) };
    };
    lock(libc::F_WRLCK, 0, 100);
    lock(libc::F_RDLCK, 200, 0);
    unsafe { sys(libc::flock(flock.as_raw_fd(), libc::LOCK_EX)) };
    unsafe { sys(libc::flock(reader.as_raw_fd(), libc::LOCK_SH)) };
    let ofd = open("ofd");
    let range = record(libc::F_WRLCK, 10, 20);
    unsafe { sys(libc::fcntl(ofd.as_raw_fd(), libc::F_OFD_SETLK, &raw const range)) };
    // the other process asks; what it has inherited would not be refused to it
    let asks = fork(|| {
        unsafe { libc::close_range(3, u32::MAX, 0) };
        shared.set(0, 1);
        shared.wait(1, 1);
        let (posix, flock, reader, ofd) = (open("posix"), open("flock"), open("reader"), open("ofd"));
        check!(!free(&posix, libc::F_RDLCK, 99, 1) && free(&posix, libc::F_WRLCK, 100, 100));
        check!(free(&posix, libc::F_RDLCK, 500, 5) && !free(&posix, libc::F_WRLCK, 500, 5));
        check_eq!(unsafe { libc::flock(flock.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) }, -1);
        check_eq!(unsafe { libc::flock(reader.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, -1);
        check_eq!(unsafe { libc::flock(reader.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) }, 0);
        check!(!free(&ofd, libc::F_RDLCK, 29, 1) && free(&ofd, libc::F_WRLCK, 30, 1));
        shared.set(2, 1);
        shared.wait(1, 2);
        check!(free(&posix, libc::F_WRLCK, 0, 0) && free(&ofd, libc::F_WRLCK, 0, 0));
        check_eq!(unsafe { libc::flock(flock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
        0
    });
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    eventually("the other process", || shared.get(2) == 1);
    drop((posix, flock, ofd));
    shared.set(1, 2);
    check_eq!(wait(asks), 0);
}
