//! Users, groups, capabilities, and what limits them.

use super::support::*;

const FACTS: &[&str] = &["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];

/// Anyone may write results into the guest's folder.
fn open_folder() {
    use std::os::unix::fs::PermissionsExt as _;
    did(std::fs::set_permissions(folder(), std::fs::Permissions::from_mode(0o777)));
}

fn capset(effective: u64, permitted: u64, inheritable: u64) {
    let header = [0x2008_0522u32, 0];
    let low = |set: u64| set as u32;
    let high = |set: u64| (set >> 32) as u32;
    let data = [low(effective), low(permitted), low(inheritable), high(effective), high(permitted), high(inheritable)];
    sys(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) });
}

fn prctl(option: i32, argument: u64) {
    unsafe { sys(libc::prctl(option, argument, 0, 0, 0)) };
}

/// Another user, with three different ids of each kind, groups, and a few capabilities.
pub(super) fn creds() {
    open_folder();
    let groups = [5u32, 18_943, 100_000];
    unsafe { sys(libc::setgroups(3, groups.as_ptr())) };
    unsafe { sys(libc::setresgid(18_944, 18_945, 18_946)) };
    prctl(libc::PR_SET_KEEPCAPS, 1);
    unsafe { sys(libc::setresuid(18_943, 18_947, 18_948)) };
    // CAP_CHOWN, CAP_NET_BIND_SERVICE, CAP_SYS_NICE, of which one is inheritable, and ambient
    let some = (1 << 0) | (1 << 10) | (1 << 23);
    capset(1 << 10, some, 1 << 10);
    unsafe { sys(libc::prctl(libc::PR_CAP_AMBIENT, 2, 10, 0, 0)) };
    prctl(libc::PR_SET_DUMPABLE, 1);
    let before = status(FACTS);
    let fs = fs_ids();
    ready();
    check_eq!(status(FACTS), before);
    check_eq!(fs_ids(), fs);
    check_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }, 1);
}

/// The ids that files are judged by.
fn fs_ids() -> (i32, i32) {
    unsafe { (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX)) }
}

/// Root with less: bounding set, securebits, no_new_privs.
pub(super) fn bits() {
    for cap in [13, 20, 25] {
        prctl(libc::PR_CAPBSET_DROP, cap);
    }
    // KEEP_CAPS_LOCKED, NO_SETUID_FIXUP, NOROOT
    prctl(libc::PR_SET_SECUREBITS, (1 << 5) | (1 << 2) | 1);
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1);
    let before = status(FACTS);
    ready();
    check_eq!(status(FACTS), before);
    let now = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    check_eq!(now, (1 << 5) | (1 << 2) | 1);
}

/// Threads that are different users.
pub(super) fn threads() {
    open_folder();
    let shared = Shared::new();
    let all: Vec<_> = (0..3u32)
        .map(|n| {
            std::thread::spawn(move || {
                // the raw calls: the library's would change all threads
                let id = 20_000 + n;
                sys(unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) });
                sys(unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) });
                let before = status(FACTS);
                shared.add(0);
                shared.wait(1, 1);
                check_eq!(status(FACTS), before);
            })
        })
        .collect();
    shared.wait(0, 3);
    prctl(libc::PR_SET_DUMPABLE, 1);
    let before = status(FACTS);
    ready();
    check_eq!(status(FACTS), before);
    check_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }, 1);
    shared.set(1, 1);
    for thread in all {
        check!(thread.join().is_ok());
    }
}
