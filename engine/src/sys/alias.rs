//! System calls made by a process with another id and other credentials than ours, of which the kernel remembers who made
//! them.
//!
//! A unix socket keeps who listened, connected, or made the pair: process, effective ids, groups (net/unix/af_unix.c,
//! `init_peercred`). Nothing changes that later but another listen(2). So it is a process with these that makes the call:
//! clone3(2) with a chosen id and CLONE_VM | CLONE_FILES | CLONE_VFORK, in which nothing but a few system calls runs, on its own
//! stack. It is gone when the call is made, and its id is free for the task that is to have it. The kernel goes on to say that
//! number (`pid_nr_ns` does not ask whether anybody has it).
//!
//! It gives nobody a SIGCHLD, and no `wait` of an embedding program finds it (`exit_signal` 0).
//!
//! Man pages: clone(2), credentials(7), unix(7).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::spawn::{clone_child, raw, unsignalled, CloneArgs, CLONE_CLEAR_SIGHAND};
use super::{calls, thread};
use crate::error::{Call, Error, Result};

/// Who makes a call. An id of `u32::MAX` stands for our own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Who {
    /// The process; 0 for any.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

/// A call.
#[derive(Clone, Copy, Debug)]
pub enum Deed<'d> {
    /// listen(2) with this backlog.
    Listen(BorrowedFd<'d>, i32),
    /// connect(2) to a `struct sockaddr`.
    Connect(BorrowedFd<'d>, &'d [u8]),
    /// socketpair(2) of unix sockets of this type.
    Pair(i32),
}

/// What became of it.
#[derive(Debug)]
pub struct Done {
    /// The sockets of a pair.
    pub pair: Option<(OwnedFd, OwnedFd)>,
    /// The process had the id that it was to have.
    pub has_id: bool,
    /// It had the users and groups.
    pub has_credentials: bool,
}

/// What the process needs, in memory that it shares with us.
#[repr(C)]
struct Errand {
    nr: i64,
    args: [usize; 5],
    uid: u32,
    gid: u32,
    groups: *const u32,
    count: usize,
    changes: bool,
    /// What changing the credentials came to.
    changed: i64,
    result: i64,
}

/// Has a process make a call: one in this PID namespace, if it is given.
pub fn act(who: &Who, deed: Deed<'_>, namespace: Option<BorrowedFd<'_>>) -> Result<Done> {
    let Some(namespace) = namespace else { return act_here(who, deed) };
    // a thread that makes children elsewhere can make no threads any more
    thread::apart(|| {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWPID).call("setns(CLONE_NEWPID)")?;
        act_here(who, deed)
    })
}

fn act_here(who: &Who, deed: Deed<'_>) -> Result<Done> {
    let mut fds = [-1i32; 2];
    let unix = libc::AF_UNIX as usize;
    let (call, nr, args) = match deed {
        Deed::Listen(fd, backlog) => ("listen", libc::SYS_listen, [fd.as_raw_fd() as usize, backlog as usize, 0, 0, 0]),
        Deed::Connect(fd, to) => {
            ("connect", libc::SYS_connect, [fd.as_raw_fd() as usize, to.as_ptr() as usize, to.len(), 0, 0])
        }
        Deed::Pair(kind) => {
            let kind = (kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as usize;
            ("socketpair", libc::SYS_socketpair, [unix, kind, 0, fds.as_mut_ptr() as usize, 0])
        }
    };
    let own = |id: u32, own: u32| id == u32::MAX || id == own;
    let same_ids =
        own(who.uid, rustix::process::geteuid().as_raw()) && own(who.gid, rustix::process::getegid().as_raw());
    let groups = rustix::process::getgroups().call("getgroups")?;
    let changes = !same_ids || !groups.iter().map(|g| g.as_raw()).eq(who.groups.iter().copied());
    let mut errand = Errand {
        nr,
        args,
        uid: who.uid,
        gid: who.gid,
        groups: who.groups.as_ptr(),
        count: who.groups.len(),
        changes,
        changed: 0,
        result: -i64::from(libc::ECHILD),
    };
    let (mut pid, mut has_id) = (run(who.pid, &mut errand), true);
    if pid < 0 && who.pid != 0 {
        // somebody has that id, or we have not the power to choose
        (pid, has_id) = (run(0, &mut errand), false);
    }
    let error = |call, number: i64| {
        let number = i32::try_from(-number).unwrap_or(libc::EPROTO);
        Err(Error::Sys { call, source: std::io::Error::from_raw_os_error(number) })
    };
    if pid < 0 {
        return error("clone3", pid);
    }
    if errand.result < 0 {
        return error(call, errand.result);
    }
    // SAFETY: the child has written them, through an address.
    let pair = match unsafe { (&raw const fds).read_volatile() } {
        // SAFETY: they were just made, for us.
        [a, b] if a >= 0 && b >= 0 => Some(unsafe { (OwnedFd::from_raw_fd(a), OwnedFd::from_raw_fd(b)) }),
        _ => None,
    };
    Ok(Done { pair, has_id: has_id && who.pid != 0, has_credentials: errand.changed >= 0 })
}

/// The process that SO_PEERCRED says to those in a PID namespace: of one that is gone nobody else can tell which number it had there.
pub fn peer_within(fd: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> Result<i32> {
    thread::apart(|| {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWPID).call("setns(CLONE_NEWPID)")?;
        let (mut ids, mut size) = ([0u32; 3], 12u32);
        let (level, name) = (libc::SOL_SOCKET as usize, libc::SO_PEERCRED as usize);
        let (at, length) = (ids.as_mut_ptr() as usize, &raw mut size as usize);
        let args = [fd.as_raw_fd() as usize, level, name, at, length];
        let (groups, result) = (std::ptr::null(), -i64::from(libc::ECHILD));
        let nr = libc::SYS_getsockopt;
        let mut errand = Errand { nr, args, uid: 0, gid: 0, groups, count: 0, changes: false, changed: 0, result };
        let pid = run(0, &mut errand);
        let failed =
            if pid < 0 { Some(("clone3", pid)) } else { Some(("getsockopt", errand.result)).filter(|e| e.1 < 0) };
        if let Some((call, number)) = failed {
            let number = i32::try_from(-number).unwrap_or(libc::EPROTO);
            return Err(Error::Sys { call, source: std::io::Error::from_raw_os_error(number) });
        }
        // SAFETY: the child has written it, through an address.
        let [pid, ..] = unsafe { (&raw const ids).read_volatile() };
        Ok(pid.cast_signed())
    })
}

/// Has a process with this id, or any if it is 0, do an errand; its id with us, or a negative errno. It is gone then.
fn run(id: i32, errand: &mut Errand) -> i64 {
    let mut stack = vec![0u64; 2048];
    let mut args = CloneArgs {
        flags: (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES) as u64 | CLONE_CLEAR_SIGHAND,
        stack: stack.as_mut_ptr() as u64,
        stack_size: (stack.len() * 8) as u64,
        ..Default::default()
    };
    if id != 0 {
        args.set_tid = &raw const id as u64;
        args.set_tid_size = 1;
    }
    let errand: *mut Errand = errand;
    // SAFETY: all signals are blocked meanwhile, so no handler of ours runs in the child; CLONE_VFORK keeps this thread, and with
    // it everything that `errand` points to, until the child is gone.
    let pid = unsignalled(|| unsafe { clone_child(&args, errand.cast(), child) });
    if let Ok(pid @ 1..) = i32::try_from(pid) {
        // its id is taken until then; if somebody else has waited for it, that is as good
        let _ = calls::wait_child(pid, libc::__WALL);
    }
    pid
}

/// Runs in the child, in our memory and with our descriptors: system calls only, nothing that allocates, locks or touches errno.
unsafe extern "C" fn child(errand: *mut libc::c_void) -> ! {
    const VERSION_3: u32 = 0x2008_0522;
    const SAME: usize = u32::MAX as usize;
    let (get_dumpable, set_dumpable) = (libc::PR_GET_DUMPABLE as usize, libc::PR_SET_DUMPABLE as usize);
    // SAFETY: the parent waits in clone3 and keeps all of this alive.
    unsafe {
        let e = &mut *errand.cast::<Errand>();
        if e.changes {
            let header = [VERSION_3, 0];
            // effective, permitted, inheritable; once more for those from 32 on
            let mut caps = [0u32; 6];
            let caps = caps.as_mut_ptr();
            let (header, data) = (header.as_ptr() as usize, caps as usize);
            let dumpable = raw(libc::SYS_prctl, [get_dumpable, 0, 0, 0, 0]);
            let known = raw(libc::SYS_capget, [header, data, 0, 0, 0]);
            let (uid, gid) = (e.uid as usize, e.gid as usize);
            let all = [
                raw(libc::SYS_setgroups, [e.count, e.groups as usize, 0, 0, 0]),
                raw(libc::SYS_setresgid, [SAME, gid, SAME, 0, 0]),
                raw(libc::SYS_setresuid, [SAME, uid, SAME, 0, 0]),
            ];
            for result in all {
                if result < e.changed {
                    e.changed = result;
                }
            }
            if known == 0 {
                // they went with user 0, and a socket need not be one that this user may write to
                caps.write_volatile(caps.add(1).read_volatile());
                caps.add(3).write_volatile(caps.add(4).read_volatile());
                raw(libc::SYS_capset, [header, data, 0, 0, 0]);
            }
            // the memory is ours, too
            if dumpable == 1 {
                raw(libc::SYS_prctl, [set_dumpable, 1, 0, 0, 0]);
            }
        }
        e.result = raw(e.nr, e.args);
        loop {
            raw(libc::SYS_exit, [0; 5]);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tasks::pids;
    use std::os::fd::AsFd;

    fn peer(fd: BorrowedFd<'_>) -> libc::ucred {
        let mut bytes = [0; 12];
        calls::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        libc::ucred { pid: word(0) as i32, uid: word(4), gid: word(8) }
    }

    #[test]
    fn a_pair_is_of_the_one_that_made_it() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root has a process be another user");
            return;
        }
        let free = pids::unused(pids::limit().unwrap(), &Default::default()).unwrap();
        let who = Who { pid: free, uid: 4321, gid: 1234, groups: vec![7, 9] };
        let done = act(&who, Deed::Pair(libc::SOCK_STREAM), None).unwrap();
        let (a, b) = done.pair.unwrap();
        assert!(done.has_credentials);
        for end in [&a, &b] {
            let of = peer(end.as_fd());
            assert_eq!((of.uid, of.gid), (4321, 1234));
            assert_eq!(of.pid == free, done.has_id);
            let mut groups = [0; 16];
            let len = calls::getsockopt(end.as_fd(), libc::SOL_SOCKET, 59, &mut groups).unwrap();
            assert_eq!(groups[..len], [7u32, 9].map(u32::to_ne_bytes).concat());
        }
        assert!(rustix::process::geteuid().is_root());
        // somebody has the id: the call is made all the same
        let who = Who { pid: std::process::id() as i32, ..who };
        let done = act(&who, Deed::Pair(libc::SOCK_SEQPACKET), None).unwrap();
        assert!(!done.has_id);
        assert_eq!(peer(done.pair.unwrap().0.as_fd()).uid, 4321);
    }

    #[test]
    fn errors_are_those_of_the_call() {
        let (a, _b) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let who = Who { uid: u32::MAX, gid: u32::MAX, ..Who::default() };
        let e = act(&who, Deed::Listen(a.as_fd(), 1), None).unwrap_err();
        assert_eq!(e.errno(), libc::EINVAL);
    }
}
