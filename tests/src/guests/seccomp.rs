//! Seccomp: filters, of all threads and of one, inherited; strict mode.

use super::pipes::{pipe, read, write};
use super::support::*;

/// Answers one system call with an error, allows all others.
fn refuse(call: i64, error: u32, flags: u64) {
    let load = |k| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k };
    let mut code = [
        load(0),
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: call as u32 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x0005_0000 | error },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 },
    ];
    let program = libc::sock_fprog { len: 4, filter: code.as_mut_ptr() };
    unsafe { sys(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) };
    sys(unsafe { libc::syscall(libc::SYS_seccomp, 1, flags, &raw const program) });
}

/// How a call without arguments ends.
fn answer(call: i64) -> i32 {
    let r = unsafe { libc::syscall(call, 0, 0, 0, 0, 0) };
    if r < 0 {
        errno()
    } else {
        0
    }
}

const FACTS: &[&str] = &["Seccomp", "Seccomp_filters", "NoNewPrivs"];

/// Three filters, one above the other; the process may also not use a call that a checkpoint needs.
pub(super) fn filters() {
    refuse(libc::SYS_getuid, 201, 0);
    refuse(libc::SYS_getgid, 202, 0);
    refuse(libc::SYS_geteuid, 203, 0);
    refuse(libc::SYS_prctl, 204, 0);
    let before = status(FACTS);
    ready();
    check_eq!(status(FACTS), before);
    let calls = [libc::SYS_getuid, libc::SYS_getgid, libc::SYS_geteuid, libc::SYS_prctl, libc::SYS_getpid];
    check_eq!(calls.map(answer), [201, 202, 203, 204, 0]);
}

/// A filter that a child has inherited, one that only it has, one that only its parent has.
pub(super) fn child() {
    let shared = Shared::new();
    refuse(libc::SYS_getuid, 201, 0);
    let child = fork(|| {
        refuse(libc::SYS_getgid, 202, 0);
        let before = status(FACTS);
        shared.set(0, 1);
        shared.wait(1, 1);
        check_eq!(status(FACTS), before);
        check_eq!([libc::SYS_getuid, libc::SYS_getgid, libc::SYS_geteuid].map(answer), [201, 202, 0]);
        0
    });
    shared.wait(0, 1);
    refuse(libc::SYS_geteuid, 203, 0);
    let before = status(FACTS);
    ready();
    check_eq!(status(FACTS), before);
    check_eq!([libc::SYS_getuid, libc::SYS_getgid, libc::SYS_geteuid].map(answer), [201, 0, 203]);
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}

/// One filter for all threads (TSYNC), one for a single thread.
pub(super) fn threads() {
    let shared = Shared::new();
    let plain = std::thread::spawn(move || {
        shared.add(0);
        shared.wait(1, 1);
        check_eq!([libc::SYS_getuid, libc::SYS_getgid].map(answer), [201, 0]);
    });
    shared.wait(0, 1);
    refuse(libc::SYS_getuid, 201, 1);
    let strict = std::thread::spawn(move || {
        refuse(libc::SYS_getgid, 202, 0);
        shared.add(0);
        shared.wait(1, 1);
        check_eq!([libc::SYS_getuid, libc::SYS_getgid].map(answer), [201, 202]);
    });
    shared.wait(0, 2);
    ready();
    check_eq!([libc::SYS_getuid, libc::SYS_getgid].map(answer), [201, 0]);
    shared.set(1, 1);
    check!(plain.join().is_ok() && strict.join().is_ok());
}

/// A child that may read, write and end, and nothing else.
pub(super) fn strict() {
    let (to_child, from_child) = (pipe(0), pipe(0));
    let child = fork(|| {
        unsafe { sys(libc::prctl(libc::PR_SET_SECCOMP, 1, 0, 0, 0)) };
        let mut byte = 0u8;
        loop {
            unsafe {
                if libc::read(to_child.0, (&raw mut byte).cast(), 1) != 1 || byte == b'.' {
                    libc::syscall(libc::SYS_exit, 6);
                }
                libc::write(from_child.1, (&raw const byte).cast(), 1);
            }
        }
    });
    write(to_child.1, b"a");
    check_eq!(read(from_child.0), Ok(b"a".to_vec()));
    ready();
    let text = did(std::fs::read_to_string(format!("/proc/{child}/status")));
    check!(text.contains("Seccomp:\t1"));
    write(to_child.1, b"b");
    check_eq!(read(from_child.0), Ok(b"b".to_vec()));
    write(to_child.1, b".");
    check_eq!(libc::WEXITSTATUS(wait(child)), 6);
}
