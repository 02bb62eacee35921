//! Locks on files: flock(2), and both kinds of fcntl(2).
//!
//! `fdinfo` lists, behind `lock:`, what is held through an open file: locks of the open file itself (flock, and those that
//! fcntl calls OFD), and of those that belong to a process (POSIX) the ones of the table that the descriptor is in. Who
//! only waits for a lock is not there: its call is made again when it goes on. Others' locks on the same file are not
//! there either.
//!
//! A [`FileLockEntry`] of `filelocks.img` is one lock: how it was made, what it keeps others from, and a task (pid in its own
//! namespace) and descriptor through which to take it again. An open file that has many descriptors has its own locks
//! written once, with the first of them; a process has its locks on it written once, too. CRIU 4.2 loses the POSIX locks of
//! a task on an open file that an earlier task has as well. Without locks there is no such image, as with CRIU.
//!
//! Order: a process loses its POSIX locks on a file when it closes any descriptor of it, so locks come back after the last
//! of ours is closed, and before credentials and filters. A table that processes share (CLONE_FILES) gets them from the one
//! that sets it up. They are taken without waiting: if another program has one by now, the restore fails.
//!
//! A dump of a task that holds locks needs `--file-locks`, as the tasks would find themselves without if they come back where
//! others have taken them. A restore does not: what an image holds is not dropped in silence.
//!
//! Leases are in the same image: see [`super::lease`].
//!
//! Not kept: who made a lock of an open file, as /proc/locks shows it; which of the processes that share a table made a
//! POSIX lock; the order of those who wait. Delegations, which are a file server's, are refused by name.
//!
//! Man pages: flock(2), fcntl(2), fcntl_locking(2), proc_locks(5), proc_pid_fdinfo(5).

use std::collections::{HashMap, HashSet};

use standstill_images::proto::{FdinfoEntry, FileLockEntry};
use standstill_images::ImageKind;

use super::{lease, memfd, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::plan::Plan;
use crate::proc::locks::{LeaseState, Lock, LockAccess, LockKind};

/// How a lock was made: `flag` of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum How {
    Posix = 1,
    Flock = 2,
    Ofd = 4,
    Lease = 8,
}

impl How {
    fn read(flag: u32) -> Option<How> {
        [How::Posix, How::Flock, How::Ofd, How::Lease].into_iter().find(|&how| how as u32 == flag)
    }
}

/// `type` of an entry.
const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;

/// Locks of a dump.
#[derive(Debug, Default)]
pub struct Dumped {
    entries: Vec<FileLockEntry>,
    files: HashSet<u32>,
    processes: HashSet<(u32, u32)>,
    leased: HashSet<(u64, u64)>,
}

impl Dumped {
    /// Does a program have a lease on this inode that would be broken by reading the file?
    pub fn is_leased(&self, inode: (u64, u64)) -> bool {
        self.leased.contains(&inode)
    }
}

/// Notes on which files there are leases, before any file is looked at.
pub fn note(descriptors: &[Descriptor], cx: &mut DumpFiles<'_>) {
    // to read what is leased for reading breaks nothing
    let reads = |l: &Lock| l.access == LockAccess::Read && l.lease == Some(LeaseState::Active);
    let leased = |d: &&Descriptor| held(&d.info.locks).any(|l| l.kind == LockKind::Lease && !reads(l));
    cx.locks.leased.extend(descriptors.iter().filter(leased).map(|d| (d.stat.st_dev, d.stat.st_ino)));
}

/// A lock, and the id of the open file that it is taken through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// From the image.
    pub entry: FileLockEntry,
    /// In `files.img`.
    pub file: u32,
}

/// Locks of a restore.
#[derive(Debug, Default)]
pub struct Restored {
    entries: Vec<FileLockEntry>,
}

/// Refuses a descriptor with a lock, unless locks are to be carried.
pub fn refuse(d: &Descriptor, opts: &Options) -> Result<()> {
    for lock in held(&d.info.locks) {
        match lock.kind {
            LockKind::Lease if memfd::is_one(&d.link, &d.stat) => {
                return Err(d.refused("a lease on a file in memory", GIVE_UP))
            }
            LockKind::Posix | LockKind::Ofd | LockKind::Flock | LockKind::Lease if opts.file_locks => {}
            LockKind::Posix | LockKind::Ofd | LockKind::Flock | LockKind::Lease => {
                return Err(Error::Usage {
                    what: "Some file locks are hold by dumping tasks! You can try --file-locks to dump them.".into(),
                })
            }
            LockKind::Delegation => return Err(d.refused("a delegation of a file", GIVE_UP)),
            LockKind::Access => return Err(d.refused("a lock of an unknown kind", GIVE_UP)),
        }
    }
    Ok(())
}

const GIVE_UP: &str = "let the program give it up before the dump (F_SETLEASE with F_UNLCK)";

/// Dumps what is held through descriptor `d`, which is open file `id`, of the process that is `pid` in its own namespace.
pub fn dump(d: &Descriptor, id: u32, pid: u32, cx: &mut DumpFiles<'_>) -> Result<()> {
    if d.info.locks.is_empty() {
        return Ok(());
    }
    let file_is_new = cx.locks.files.insert(id);
    let process_is_new = cx.locks.processes.insert((pid, id));
    for lock in held(&d.info.locks) {
        let (how, new) = match lock.kind {
            LockKind::Posix => (How::Posix, process_is_new),
            LockKind::Flock => (How::Flock, file_is_new),
            LockKind::Ofd => (How::Ofd, file_is_new),
            LockKind::Lease => (How::Lease, file_is_new),
            // `refuse` was here before
            LockKind::Delegation | LockKind::Access => continue,
        };
        if new {
            cx.locks.entries.push(entry(lock, how, pid, d)?);
        }
    }
    Ok(())
}

fn held(locks: &[Lock]) -> impl Iterator<Item = &Lock> {
    locks.iter().filter(|lock| !lock.waits)
}

fn entry(lock: &Lock, how: How, pid: u32, d: &Descriptor) -> Result<FileLockEntry> {
    let odd = || d.refused("a lock that the kernel shows with impossible bytes", "unlock it before the dump");
    let number = |n: u64| i64::try_from(n).map_err(|_| odd());
    let breaking = matches!(lock.lease, Some(LeaseState::Breaking | LeaseState::Breaker));
    let kind = match lock.access {
        LockAccess::Read => READ,
        LockAccess::Write => WRITE,
        LockAccess::Unlock if breaking => libc::F_UNLCK as u32,
        LockAccess::Unlock => return Err(odd()),
    } | if breaking { lease::BREAKING } else { 0 };
    Ok(FileLockEntry {
        flag: how as u32,
        r#type: kind,
        pid: i32::try_from(pid).map_err(|_| Error::Gone)?,
        fd: d.fd,
        start: number(lock.start)?,
        // 0: all that may follow
        len: lock.end.map_or(Ok(0), |end| number(end - lock.start + 1))?,
    })
}

/// Writes `filelocks.img`, if there is a lock.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    if cx.locks.entries.is_empty() {
        return Ok(());
    }
    Ok(cx.images.write_entries(ImageKind::FileLocks, (), cx.locks.entries.drain(..))?)
}

/// Reads `filelocks.img`.
pub fn read(cx: &mut RestoreFiles<'_>) -> Result<()> {
    let entries: Vec<FileLockEntry> = cx.images.read_entries_if_there(ImageKind::FileLocks, ())?;
    for e in &entries {
        check(e)?;
    }
    cx.locks.entries = entries;
    Ok(())
}

fn check(e: &FileLockEntry) -> Result<()> {
    let at = || format!("descriptor {} of task {}", e.fd, e.pid);
    match How::read(e.flag) {
        Some(How::Posix | How::Flock | How::Ofd) => {}
        Some(How::Lease) if lease::is_type(e.r#type) => return Ok(()),
        Some(How::Lease) => return Err(Error::lie(IMAGE, format!("a lease of type {} ({})", e.r#type, at()))),
        None => return Err(Error::lie(IMAGE, format!("a lock of kind {} ({})", e.flag, at()))),
    }
    if !matches!(e.r#type, READ | WRITE) {
        return Err(Error::lie(IMAGE, format!("a lock of type {} ({})", e.r#type, at())));
    }
    if e.start < 0 || e.len < 0 || e.start.checked_add(e.len).is_none() {
        return Err(Error::lie(IMAGE, format!("a lock on {} bytes from {} on ({})", e.len, e.start, at())));
    }
    Ok(())
}

const IMAGE: &str = "filelocks.img";

impl Restored {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True without locks.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The locks of each descriptor table, by the table's id; a lock of nobody, or through a descriptor that is not there, is
    /// a lie.
    pub fn by_table(
        &self,
        table_of: impl Fn(i32) -> Option<u32>,
        tables: &HashMap<u32, Vec<FdinfoEntry>>,
    ) -> Result<HashMap<u32, Vec<Held>>> {
        let mut sorted: HashMap<u32, Vec<Held>> = HashMap::new();
        let mut open: HashMap<u32, HashMap<u32, u32>> = HashMap::new();
        for e in &self.entries {
            let table = table_of(e.pid)
                .ok_or_else(|| Error::lie(IMAGE, format!("a lock of task {}, which is missing", e.pid)))?;
            let open = open.entry(table).or_insert_with(|| {
                tables.get(&table).into_iter().flatten().map(|entry| (entry.fd, entry.id)).collect()
            });
            let Some(&file) = u32::try_from(e.fd).ok().and_then(|fd| open.get(&fd)) else {
                let what = format!("a lock through descriptor {} of task {}, which is missing", e.fd, e.pid);
                return Err(Error::lie(IMAGE, what));
            };
            sorted.entry(table).or_default().push(Held { entry: *e, file });
        }
        Ok(sorted)
    }
}

/// Takes these leases again, in a task that has all of its own descriptors.
pub fn take_leases(locks: &[Held], cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
    lease::take(&leases(locks), cx, plan)
}

/// Takes what [`take_leases`] has left to the engine, between that and [`restore`].
pub fn take_leases_for_tasks(cx: &RestoreFiles<'_>) -> Result<()> {
    lease::take_for_tasks(cx)
}

fn leases(locks: &[Held]) -> Vec<Held> {
    locks.iter().filter(|held| held.entry.flag == How::Lease as u32).copied().collect()
}

/// Takes these locks again, in a task that has all of its own descriptors and none of ours, and breaks leases again that
/// were broken: all tasks have taken theirs.
pub fn restore(locks: &[Held], cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
    lease::break_again(&leases(locks), cx, plan)?;
    let entries: Vec<FileLockEntry> = locks.iter().map(|held| held.entry).collect();
    take(&entries, plan)
}

fn take(locks: &[FileLockEntry], plan: &mut Plan) -> Result<()> {
    for e in locks {
        let how = How::read(e.flag).ok_or_else(|| Error::lie(IMAGE, format!("a lock of kind {}", e.flag)))?;
        match how {
            How::Flock => {
                let wanted = if e.r#type == READ { libc::LOCK_SH } else { libc::LOCK_EX };
                let args = [e.fd.into(), (wanted | libc::LOCK_NB).into()];
                plan.call(format!("lock through descriptor {}", e.fd), libc::SYS_flock, &args);
            }
            How::Posix => fcntl(e, libc::F_SETLK, plan),
            How::Ofd => fcntl(e, libc::F_OFD_SETLK, plan),
            How::Lease => {}
        }
    }
    Ok(())
}

fn fcntl(e: &FileLockEntry, command: i32, plan: &mut Plan) {
    let bytes = match e.len {
        0 => format!("lock through descriptor {}, from byte {} on", e.fd, e.start),
        len => format!("lock through descriptor {}, bytes {} to {}", e.fd, e.start, e.start + (len - 1)),
    };
    // struct flock: l_type and l_whence (SEEK_SET) in the first word, l_start, l_len, l_pid
    let lock = plan.words(&[u64::from(e.r#type), e.start.unsigned_abs(), e.len.unsigned_abs(), 0]);
    plan.call(bytes, libc::SYS_fcntl, &[e.fd.into(), command.into(), lock.into()]);
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
