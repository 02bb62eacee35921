//! A process in a user namespace of the tree's, for what nobody outside of that can make.
//!
//! A namespace belongs to the user namespace of who made it, and only who has power there can enter it: so are those that a
//! restore makes for tasks beside the root's. In a copy of a mount namespace that belongs to another user namespace than the
//! original, all mounts are locked: none can be taken away to see what it hides. The engine has threads, and cannot enter a
//! user namespace (setns(2)); a fresh process with nothing in it but the executor can.
//!
//! Man pages: mount_namespaces(7), setns(2).

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::error::{At, Call, Error, Place, Result};
use crate::namespaces::Kind;
use crate::plan::arena::Arena;
use crate::plan::Plan;
use crate::sys::futex::RobustList;
use crate::sys::spawn::{self, Spawn, FIRST_FD};
use crate::sys::{calls, ptrace, thread};

/// Where its memory lies: there is nothing else.
const BASE: u64 = 0x10_0000_0000;
const LIMIT: Duration = Duration::from_secs(10);

/// Has process `pid` another user namespace than we?
pub fn is_elsewhere(pid: i32) -> Result<bool> {
    let inode = |path: String| rustix::fs::stat(&path).call("stat").at(Place::Path(path.into()));
    Ok(inode(format!("/proc/{pid}/ns/user"))?.st_ino != inode("/proc/thread-self/ns/user".into())?.st_ino)
}

fn open(pid: i32, kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/{kind}");
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).call("open").at(Place::Path(path.into()))
}

/// New namespaces of a kind, which belong to the user namespace of process `pid`. Mount namespaces are copies of that process's.
pub fn make(pid: i32, kind: Kind, count: usize) -> Result<Vec<OwnedFd>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let (user, mounts) = (open(pid, "user")?, open(pid, "mnt")?);
    // the executor watches a thread, and this one does not end before it
    thread::apart(|| {
        let what = "a namespace within a user namespace";
        let robust = RobustList::new()?;
        let mut arena = Arena::new(Arena::base_in(BASE), Arena::size_for(1, 8 * count, 4096 * count), &robust)?;
        let slot = arena.slot()?;
        let mut plan = Plan::new();
        plan.call(what, libc::SYS_setns, &[(FIRST_FD + 1).into(), libc::CLONE_NEWUSER.into()]);
        if kind == Kind::Mnt {
            plan.call(what, libc::SYS_setns, &[(FIRST_FD + 2).into(), libc::CLONE_NEWNS.into()]);
        }
        arena.load(slot, pid, plan)?;
        let inherit = [arena.fd(), user.as_fd(), mounts.as_fd()];
        let companion = spawn::spawn_kept(&Spawn::helper(arena.load_at(), arena.boot(slot), &inherit))?;
        let own = companion.pid();
        let alive = || if ptrace::exists(own) { Ok(()) } else { Err(Error::Gone) };
        let mut made = Vec::with_capacity(count);
        let mut work = || {
            arena.finish(slot, LIMIT, alive)?;
            while made.len() < count {
                let mut plan = Plan::new();
                plan.call(what, libc::SYS_unshare, &[kind.flag().into()]);
                arena.load(slot, pid, plan)?;
                arena.finish(slot, LIMIT, alive)?;
                made.push(open(own, kind.file())?);
            }
            Ok(())
        };
        let worked = work();
        calls::kill(own, libc::SIGKILL)?;
        drop(companion);
        worked.map(|()| made)
    })
}
