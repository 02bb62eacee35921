//! Regular files and folders: offsets, modes, owners of signals, shared descriptors, deleted files.

use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};

use super::support::*;

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

/// Mode, offset and flags of a descriptor, in the kernel's own words.
fn fdinfo(fd: i32) -> Vec<String> {
    let text = did(std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")));
    text.lines().filter(|l| l.starts_with("pos") || l.starts_with("flags")).map(str::to_owned).collect()
}

fn flag(fd: i32) -> i32 {
    unsafe { sys(libc::fcntl(fd, libc::F_GETFD)) }
}

/// Offsets and modes.
pub(super) fn offsets() {
    did(std::fs::write("data", b"0123456789"));
    let mut reads = did(File::open("data"));
    did(reads.seek(SeekFrom::Start(4)));
    let mut writes = did(File::options().write(true).open("data"));
    did(writes.seek(SeekFrom::Start(7)));
    let mut far = did(File::options().read(true).write(true).open("data"));
    did(far.seek(SeekFrom::Start(5 << 40)));
    let flags = libc::O_NONBLOCK | libc::O_NOATIME | libc::O_SYNC;
    let modes = did(File::options().read(true).write(true).custom_flags(flags).open("data"));
    let zero = did(File::options().write(true).open("/dev/zero"));
    let high = unsafe { sys(libc::fcntl(reads.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 900)) };
    let fds = [reads.as_raw_fd(), writes.as_raw_fd(), far.as_raw_fd(), modes.as_raw_fd(), zero.as_raw_fd(), high];
    let before: Vec<_> = fds.map(|fd| (fdinfo(fd), flag(fd))).into();
    ready();
    check_eq!(Vec::from(fds.map(|fd| (fdinfo(fd), flag(fd)))), before);
    let mut rest = String::new();
    did(reads.read_to_string(&mut rest));
    check_eq!(rest, "456789");
    did(writes.write_all(b"X"));
    check_eq!(did(std::fs::read("data")), b"0123456X89");
    // a copy has the offset in common with what it was copied from
    check_eq!(fdinfo(high)[0], "pos:\t10");
}

/// Files that are written at their end.
pub(super) fn append() {
    did(std::fs::write("log", b"one "));
    let mut log = did(File::options().append(true).open("log"));
    did(log.write_all(b"two "));
    let before = fdinfo(log.as_raw_fd());
    ready();
    check_eq!(fdinfo(log.as_raw_fd()), before);
    did(log.seek(SeekFrom::Start(0)));
    did(log.write_all(b"three"));
    check_eq!(did(std::fs::read("log")), b"one two three");
}

/// Descriptions that several descriptors and processes have in common, and some that only look so.
pub(super) fn shared() {
    let shared = Shared::new();
    did(std::fs::write("data", vec![b'.'; 1000]));
    let mut common = did(File::options().read(true).write(true).open("data"));
    let mut other = did(File::options().read(true).write(true).open("data"));
    let copy = unsafe { sys(libc::dup(common.as_raw_fd())) };
    did(common.seek(SeekFrom::Start(100)));
    let child = fork(|| {
        unsafe { libc::close(copy) };
        let mut own = did(File::open("data"));
        did(own.seek(SeekFrom::Start(50)));
        shared.set(0, 1);
        shared.wait(1, 1);
        did(common.seek(SeekFrom::Start(300)));
        check_eq!(did(own.stream_position()), 50);
        shared.set(0, 2);
        0
    });
    shared.wait(0, 1);
    ready();
    let mut copy = unsafe { File::from_raw_fd(copy) };
    check_eq!(did(common.stream_position()), 100);
    check_eq!(did(copy.stream_position()), 100);
    did(copy.seek(SeekFrom::Start(200)));
    check_eq!(did(common.stream_position()), 200);
    shared.set(1, 1);
    shared.wait(0, 2);
    check_eq!(did(common.stream_position()), 300);
    check_eq!(did(other.stream_position()), 0);
    check_eq!(wait(child), 0);
}

/// A child that has its table of descriptors in common with its parent.
pub(super) fn table() {
    let shared = Shared::new();
    let null = did(File::open("/dev/null"));
    let none = std::ptr::null_mut::<u8>();
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    let child = sys(unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) });
    if child == 0 {
        shared.set(0, 1);
        shared.wait(1, 1);
        let new = unsafe { sys(libc::fcntl(null.as_raw_fd(), libc::F_DUPFD, 77)) };
        shared.set(2, new as u64);
        unsafe { libc::_exit(0) }
    }
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(child as i32), 0);
    check_eq!(shared.get(2), 77);
    check!(flag(77) >= 0);
}

/// Files without a name: in one process, in two, with holes, behind another file of the same name.
pub(super) fn deleted() {
    let shared = Shared::new();
    let new = |name: &str, bytes: &[u8]| {
        did(std::fs::write(name, bytes));
        let file = did(File::options().read(true).write(true).open(name));
        did(std::fs::remove_file(name));
        file
    };
    let mut plain = new("plain", b"no name");
    did(plain.seek(SeekFrom::Start(3)));
    let again = did(File::open(format!("/proc/self/fd/{}", plain.as_raw_fd())));
    let holes = new("holes", b"");
    did(holes.write_all_at(b"far", 700 << 10));
    let behind = new("behind", b"the old one");
    did(std::fs::write("behind", b"the new one"));
    unsafe { sys(libc::fchmod(plain.as_raw_fd(), 0o640)) };
    unsafe { sys(libc::fchown(plain.as_raw_fd(), 12, 34)) };
    let temporary = did(File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open("."));
    did(temporary.write_all_at(b"never had one", 0));
    let child = fork(|| {
        shared.set(0, 1);
        shared.wait(1, 1);
        check_eq!(did(plain.write_at(b"NO", 0)), 2);
        0
    });
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(child), 0);
    let text = |file: &File| {
        let mut bytes = vec![0; 64];
        let n = did(file.read_at(&mut bytes, 0));
        bytes.truncate(n);
        bytes
    };
    check_eq!(text(&plain), b"NO name");
    check_eq!(text(&again), b"NO name");
    check_eq!(did(plain.stream_position()), 3);
    let facts = did(plain.metadata());
    check_eq!((facts.nlink(), facts.mode() & 0o7777, facts.uid(), facts.gid()), (0, 0o640, 12, 34));
    check_eq!(did(again.metadata()).ino(), facts.ino());
    let facts = did(holes.metadata());
    check_eq!(facts.len(), (700 << 10) + 3);
    check!(facts.blocks() <= 32);
    check_eq!(text(&behind), b"the old one");
    check_eq!(did(std::fs::read("behind")), b"the new one");
    check_eq!(text(&temporary), b"never had one");
    for gone in ["plain", "holes"] {
        check!(!std::path::Path::new(gone).exists());
    }
}

/// Open folders, one read half way.
pub(super) fn dirs() {
    did(std::fs::create_dir("inside"));
    for n in 0..50 {
        did(std::fs::write(format!("inside/file-{n}"), b""));
    }
    let open = |flags| did(File::options().read(true).custom_flags(libc::O_DIRECTORY | flags).open("inside"));
    let (plain, half) = (open(0), open(libc::O_NOATIME));
    let mut read = vec![0u8; 512];
    let names = |buffer: &mut Vec<u8>| {
        let n = unsafe { libc::syscall(libc::SYS_getdents64, half.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
        sys(n)
    };
    check!(names(&mut read) > 0);
    let before = fdinfo(half.as_raw_fd());
    ready();
    check_eq!(fdinfo(half.as_raw_fd()), before);
    let at = unsafe { libc::openat(plain.as_raw_fd(), c"file-7".as_ptr(), libc::O_RDONLY) };
    sys(at);
    let mut more = 0;
    while names(&mut read) > 0 {
        more += 1;
    }
    check!(more > 1);
}

/// Who gets a file's signals, and which.
pub(super) fn owner() {
    let (out, into) = super::pipes::pipe(0);
    let me = std::process::id() as i32;
    unsafe {
        sys(libc::fcntl(out, libc::F_SETOWN, me));
        sys(libc::fcntl(out, 10 /* F_SETSIG */, libc::SIGRTMIN() + 4));
        sys(libc::fcntl(into, libc::F_SETOWN, -libc::getpgrp()));
    }
    super::signals::mask(libc::SIG_BLOCK, &[libc::SIGRTMIN() + 4]);
    unsafe { sys(libc::fcntl(out, libc::F_SETFL, libc::O_ASYNC)) };
    ready();
    unsafe {
        check_eq!(libc::fcntl(out, libc::F_GETOWN), me);
        check_eq!(libc::fcntl(out, 11 /* F_GETSIG */), libc::SIGRTMIN() + 4);
        check_eq!(libc::fcntl(out, libc::F_GETFL) & libc::O_ASYNC, libc::O_ASYNC);
    }
    super::pipes::write(into, b"x");
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let limit = libc::timespec { tv_sec: 5, tv_nsec: 0 };
    unsafe {
        libc::sigaddset(&raw mut set, libc::SIGRTMIN() + 4);
        check_eq!(libc::sigtimedwait(&raw const set, &raw mut info, &raw const limit), libc::SIGRTMIN() + 4);
    }
}

/// Descriptors that are paths only (O_PATH): of a file, of a folder.
pub(super) fn path_only() {
    did(std::fs::write("data", b"by path"));
    did(std::fs::create_dir("inside"));
    let open = |name: &str, flags| did(File::options().read(true).custom_flags(libc::O_PATH | flags).open(name));
    let (file, folder) = (open("data", 0), open("inside", libc::O_DIRECTORY));
    let before = [fdinfo(file.as_raw_fd()), fdinfo(folder.as_raw_fd())];
    ready();
    check_eq!([fdinfo(file.as_raw_fd()), fdinfo(folder.as_raw_fd())], before);
    check_eq!(did(std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd()))), b"by path");
    sys(unsafe { libc::mkdirat(folder.as_raw_fd(), c"new".as_ptr(), 0o755) });
    check!(std::path::Path::new("inside/new").is_dir());
}

/// A thousand descriptors, with gaps.
pub(super) fn many() {
    did(std::fs::write("data", b"0123456789"));
    let file = did(File::open("data"));
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
    unsafe { sys(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)) };
    let all: Vec<i32> =
        (0..1000).map(|n| unsafe { sys(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 10 + n * 3)) }).collect();
    ready();
    for fd in all {
        check_eq!(flag(fd), 0);
    }
    check_eq!(unsafe { libc::fcntl(11, libc::F_GETFD) }, -1);
}

/// The highest numbers that the limit allows, as valgrind and some servers keep theirs.
pub(super) fn high() {
    let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
    unsafe { sys(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit)) };
    limit.rlim_cur = limit.rlim_max;
    unsafe { sys(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)) };
    let top = i32::try_from(limit.rlim_max).unwrap_or(1 << 20).min(1 << 20);
    did(std::fs::write("data", b"0123456789"));
    let file = did(File::open("data"));
    let all: Vec<i32> = (1..=8).map(|n| unsafe { sys(libc::dup2(file.as_raw_fd(), top - n)) }).collect();
    // one whose number is given while tasks live: a pidfd
    let shared = Shared::new();
    let child = fork(|| {
        // from here on, nothing about it is still being made
        shared.set(0, 1);
        loop {
            unsafe { libc::pause() };
        }
    });
    shared.wait(0, 1);
    let pidfd = sys(unsafe { libc::syscall(libc::SYS_pidfd_open, child, 0) }) as i32;
    ready();
    for fd in all {
        check_eq!(unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) }, 0);
    }
    let open = did(std::fs::read_dir("/proc/self/fd")).count();
    // three standard ones, the file, its copies, the pidfd, and the folder that is read here
    check_eq!(open, 3 + 1 + 8 + 1 + 1);
    let null = std::ptr::null::<u8>();
    sys(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, libc::SIGKILL, null, 0) });
    check_eq!(wait(child), libc::SIGKILL);
}

/// A deleted file with holes: at its beginning, in the middle, at its end; much longer than what is in it.
pub(super) fn holes() {
    let file = did(File::options().read(true).write(true).create_new(true).open("holes"));
    did(file.set_len(6 << 30));
    for at in [1 << 20, (1 << 20) + 8192, 3 << 30, (6 << 30) - 5000] {
        did(file.write_all_at(b"something", at));
    }
    did(std::fs::remove_file("holes"));
    let before = did(file.metadata());
    ready();
    let now = did(file.metadata());
    check_eq!((now.len(), now.nlink()), (before.len(), 0));
    check!(now.blocks() <= before.blocks() + 64);
    let mut text = [0u8; 9];
    for at in [1 << 20, (1 << 20) + 8192, 3 << 30, (6 << 30) - 5000] {
        did(file.read_exact_at(&mut text, at));
        check_eq!(&text, b"something");
    }
    for at in [0, (1 << 20) + 4096, 2 << 30, (6 << 30) - 9] {
        did(file.read_exact_at(&mut text, at));
        check_eq!(text, [0u8; 9]);
    }
}
