//! pidfd_open(2): descriptors of processes.
//!
//! `fdinfo` shows the process in the pid namespaces that the reader sees; -1 when it has ended and been reaped. A
//! [`PidfdEntry`] of `files.img` is one open file: `nspid` is the process as the innermost namespace has it, `ino` tells
//! which pidfds of dead processes were of one process.
//!
//! A pidfd of a living process (or of a zombie of the tree) can only be opened once that process is there again, which is
//! after all other files: see [`opens_late`]. For a dead one the engine makes a child that ends at once, opens all pidfds
//! of that `ino`, and reaps it: they poll as ended, as before.
//!
//! Not kept: how a dead process ended (PIDFD_GET_INFO). Refused: processes outside the tree, and threads (PIDFD_THREAD),
//! as CRIU 4.2 does.
//!
//! Man pages: pidfd_open(2), proc_pid_fdinfo(5).

use std::os::fd::{AsFd, OwnedFd};

use standstill_images::proto::{FdTypes, FileEntry, PidfdEntry};

use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Error, Place, Result};
use crate::proc::fdinfo::FdDetail;
use crate::sys::calls;

/// PIDFD_THREAD, an open flag.
const THREAD: u32 = libc::O_EXCL as u32;

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let FdDetail::Pidfd { pid, ns_pid } = &d.info.detail else {
        return Err(d.refused("a pidfd whose process the kernel does not show", "mount a /proc that shows it"));
    };
    if d.flags & THREAD != 0 {
        return Err(
            d.refused("a pidfd of a thread", "PIDFD_THREAD flag is currently not supported; close it before the dump")
        );
    }
    if *pid != -1 && !cx.tree.contains(pid) {
        let what = format!("a pidfd of process {pid}, which is not a part of process tree");
        return Err(Error::refused(what, "close it before the dump, or dump both")).at(Place::Fd(d.fd));
    }
    let nspid = if *pid == -1 { -1 } else { ns_pid.last().copied().unwrap_or(*pid) };
    let pidfd = PidfdEntry {
        id,
        // What pidfs numbers is wider than what images have room for; it need only tell the dead apart.
        ino: (d.stat.st_ino & u64::from(u32::MAX)) as u32,
        flags: d.flags & !(libc::O_RDWR as u32),
        nspid,
        fown: d.fown,
    };
    Ok(FileEntry { r#type: FdTypes::Pidfd as i32, id, pidfd: Some(pidfd), ..Default::default() })
}

/// Can this one be opened only when all tasks are there?
pub fn opens_late(e: &FileEntry) -> bool {
    e.pidfd.as_ref().is_some_and(|e| e.nspid != -1)
}

/// Opens one. The process of a living one must be there, with the id it has in our pid namespace.
pub fn open(e: &PidfdEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if e.nspid != -1 {
        return of(cx.hosts.id(e.nspid)?, e);
    }
    let same = |f: &&PidfdEntry| f.nspid == -1 && f.ino == e.ino && f.id != e.id;
    let others: Vec<&PidfdEntry> = cx.entries.values().filter_map(|e| e.pidfd.as_ref()).filter(same).collect();
    let (fd, opened) = calls::with_dead_child(|pid| {
        let others: Result<Vec<_>> = others.iter().map(|other| Ok((other.id, of(pid, other)?))).collect();
        Ok((of(pid, e)?, others?))
    })?;
    cx.opened.extend(opened);
    Ok(fd)
}

fn of(pid: i32, e: &PidfdEntry) -> Result<OwnedFd> {
    let fd = calls::pidfd_open(pid, 0).task(pid)?;
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use rustix::event::{poll, PollFd, PollFlags, Timespec};

    use super::super::testing::{descriptor, dump, me, open};
    use super::*;
    use crate::options::Options;

    fn ended(fd: &OwnedFd) -> bool {
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    fn inode(fd: &OwnedFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    #[test]
    fn one_of_the_living_comes_back() {
        let fd = calls::pidfd_open(me(), libc::O_NONBLOCK as u32).unwrap();
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&fd]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        assert!(opens_late(files.entry(ids[0]).unwrap()));
        let again = open(&mut files, ids[0]);
        assert_eq!(descriptor(&again).info.detail, descriptor(&fd).info.detail);
        assert_eq!(descriptor(&again).flags, descriptor(&fd).flags);
    }

    #[test]
    fn those_of_the_dead_come_back_as_ended() {
        let dead =
            || calls::with_dead_child(|pid| Ok([calls::pidfd_open(pid, 0)?, calls::pidfd_open(pid, 0)?])).unwrap();
        let ([a, b], [c, _]) = (dead(), dead());
        assert!(ended(&a));
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&a, &b, &c]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        assert!(!opens_late(files.entry(ids[0]).unwrap()));
        let again: Vec<OwnedFd> = ids.iter().map(|&id| open(&mut files, id)).collect();
        assert!(again.iter().all(ended));
        assert!(matches!(descriptor(&again[0]).info.detail, FdDetail::Pidfd { pid: -1, .. }));
        if inode(&a) != inode(&c) {
            assert_eq!(inode(&again[0]), inode(&again[1]));
            assert_ne!(inode(&again[0]), inode(&again[2]));
        }
    }

    #[test]
    fn one_of_a_process_outside_is_refused() {
        let fd = calls::pidfd_open(1, 0).unwrap();
        let error = dump(&Options::default(), &[&fd]).unwrap_err();
        assert_eq!(error.errno(), libc::ENOTSUP, "{error:?}");
    }
}
