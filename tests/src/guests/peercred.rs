//! Who the peers of unix sockets are (SO_PEERCRED, SO_PEERGROUPS): tasks, users that they were when they listened or connected,
//! processes that are gone.

use super::support::*;
use super::unix::{accept, bound, connected, pair};

/// What a socket says of its peer: process, user, group, groups.
fn peer(fd: i32) -> (i32, u32, u32, Vec<u32>) {
    let mut ids = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let (mut groups, mut size) = ([0u32; 32], 12);
    let r = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut ids).cast(), &raw mut size) };
    sys(r);
    size = 128;
    let at = groups.as_mut_ptr().cast();
    let r = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, at, &raw mut size) };
    sys(r);
    (ids.pid, ids.uid, ids.gid, groups[..size as usize / 4].to_vec())
}

/// Does something with these effective ids and groups.
fn as_user<T>(uid: u32, gid: u32, groups: &[u32], work: impl FnOnce() -> T) -> T {
    let same = u32::MAX;
    let mut before = [0; 64];
    unsafe {
        let count = sys(libc::getgroups(64, before.as_mut_ptr())) as usize;
        sys(libc::setgroups(groups.len(), groups.as_ptr()));
        sys(libc::setresgid(same, gid, same));
        sys(libc::setresuid(same, uid, same));
        let done = work();
        sys(libc::setresuid(same, 0, same));
        sys(libc::setresgid(same, 0, same));
        sys(libc::setgroups(count, before.as_ptr()));
        done
    }
}

/// A socket that everyone may connect to.
fn open_to_all(kind: i32, path: &str) -> i32 {
    use std::os::unix::fs::PermissionsExt as _;
    let fd = bound(kind, path);
    did(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)));
    fd
}

fn listen(fd: i32) {
    unsafe { sys(libc::listen(fd, 9)) };
}

/// A tree in which one listens, several connect, some have made pairs, and one of those is gone.
pub(super) fn peers() {
    let groups = peer(pair(libc::SOCK_STREAM).0).3;
    let abstract_name = format!("\0standstill-peer-{}", folder().display());
    let (stream, packets) = (libc::SOCK_STREAM, libc::SOCK_SEQPACKET);
    // the first process, as itself and as somebody else
    let own = pair(stream);
    let other = as_user(111, 222, &[3, 4, 5], || pair(packets));
    let datagrams = as_user(70, 71, &[], || pair(libc::SOCK_DGRAM));
    let (ours, by_name) = (open_to_all(stream, "ours"), bound(packets, &abstract_name));
    as_user(33, 44, &[55], || listen(ours));
    listen(by_name);
    // one that passes its sockets on and ends
    let made = pair(stream);
    let gone = fork(|| {
        let pair = as_user(66, 77, &[88, 99], || pair(stream));
        super::unix::send(made.0, b"a pair", &[pair.0, pair.1]);
        0
    });
    let (_, passed) = super::unix::receive(made.1);
    check_eq!(wait(gone), 0);
    // one that lives, and listens and connects as others
    let theirs = open_to_all(stream, "theirs");
    let shared = Shared::new();
    let child = fork(|| {
        as_user(500, 600, &[], || listen(theirs));
        // whoever connects now is told of another one than those before
        let first = as_user(501, 601, &[7], || connected(packets, &abstract_name));
        shared.set(0, 1);
        shared.wait(1, 1);
        as_user(502, 602, &[], || listen(theirs));
        let waiting = connected(stream, "ours");
        let pair = pair(stream);
        let before = [first, waiting, pair.0, pair.1, theirs].map(peer);
        shared.set(0, 2);
        shared.wait(1, 2);
        let now = [first, waiting, pair.0, pair.1, theirs].map(peer);
        for (now, before) in now.iter().zip(&before) {
            check_eq!(now, before);
        }
        check_eq!(before[2].0, std::process::id() as i32);
        0
    });
    shared.wait(0, 1);
    let to_them = [connected(stream, "theirs"), as_user(9, 10, &[11], || connected(stream, "theirs"))];
    shared.set(1, 1);
    shared.wait(0, 2);
    let later = connected(stream, "theirs");
    let mut all = vec![own.0, own.1, other.0, other.1, datagrams.0, datagrams.1, passed[0], passed[1], ours, by_name];
    all.extend(to_them);
    all.push(later);
    all.extend((0..3).map(|_| accept(theirs)));
    all.push(accept(by_name));
    let before: Vec<_> = all.iter().map(|fd| peer(*fd)).collect();
    let me = std::process::id() as i32;
    check_eq!(before[0].0, me);
    check_eq!(before[2], (me, 111, 222, vec![3, 4, 5]));
    check_eq!((before[6].0, before[6].1), (gone, 66));
    check_eq!(before[8], (me, 33, 44, vec![55]));
    check_eq!((before[10].0, before[10].1, before[12].1), (child, 500, 502));
    check_eq!(before[14], (me, 9, 10, vec![11]));
    check_eq!(before[16], (child, 501, 601, vec![7]));
    ready();
    for (n, (fd, before)) in all.iter().zip(&before).enumerate() {
        let mut now = peer(*fd);
        if before.0 == gone {
            // somebody else may have its id by now
            now.0 = gone;
        }
        if now != *before {
            fail(format_args!("socket {n} says {now:?}, not {before:?}"));
        }
    }
    // it is accepted only now; and whoever connects now is told who listens
    check_eq!(peer(accept(ours)), (child, 0, 0, groups));
    check_eq!(peer(connected(stream, "ours")), before[8]);
    check_eq!(peer(connected(stream, "theirs")), before[12]);
    check_eq!(peer(connected(packets, &abstract_name)), before[9]);
    shared.set(1, 2);
    check_eq!(wait(child), 0);
}
