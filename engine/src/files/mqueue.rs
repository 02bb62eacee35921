//! POSIX message queues (mq_overview(7)): those of an IPC namespace of the tree's own with their messages, and descriptors of them.
//!
//! A queue is a file of the namespace's own file system (mqueue), which is mounted for a moment to see the names; queues without
//! one are found by their descriptors. mq_getattr says how many messages there may be and are; the file itself, read, who is to
//! be told of the next one. A message can be seen only by receiving it. So, when all stands still, a process of ours
//! ([`spawn::spawn_kept`]) receives all messages of a queue and sends them again, in the order in which they were there:
//! highest priority first, then the oldest. That is one plan, whose operations are all made even if one of them fails or the
//! engine dies.
//!
//! Images: `standstill-mqueue-N.img`, N being the namespace's id, has an entry a queue; a descriptor is a
//! [`StandstillMqueueFileEntry`] in `files.img`. CRIU skips the former and does not know the latter.
//!
//! Order at restore: the queues are made when the namespace has its limits, each as its owner, since the kernel counts what a user
//! has; those without a name first. Descriptors are opened through the engine's own.
//!
//! A tree in the host's IPC namespace has the host's queues open, which stay when the tree ends; the descriptors are opened
//! by name again, and nothing is looked at.
//!
//! Not kept: times, and through which mount one was opened. Refused: who is to be notified (mq_notify(3): what its signal
//! carries is shown to nobody), queues of other namespaces, nameless ones of the host's.
//!
//! Man pages: mq_overview(7), mq_getattr(3), mq_notify(3). Kernel: ipc/mqueue.c.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{fsconfig_create, fsmount, fsopen, FsMountFlags, FsOpenFlags, MountAttrFlags};
use standstill_images::proto::{
    FdTypes, FileEntry, StandstillMqueueEntry, StandstillMqueueFileEntry, StandstillMqueueMessage,
};
use standstill_images::{ImageKind, Images};
use standstill_restorer::plan::{Code, Expect};

use super::{magic_link, set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::namespaces::user::Users;
use crate::plan::arena::Arena;
use crate::plan::Plan;
use crate::sys::futex::RobustList;
use crate::sys::mqueue::{self, Attributes};
use crate::sys::spawn::{self, Spawn, FIRST_FD};
use crate::sys::{calls, ptrace, shm, thread};

const MQUEUE_MAGIC: i64 = 0x1980_0202;
/// Where the helper's memory lies: there is nothing else.
const BASE: u64 = 0x10_0000_0000;
const LIMIT: Duration = Duration::from_secs(60);
const LARGEFILE: u32 = 0o100_000;
/// As much room for messages as we take.
const MOST_ROOM: usize = 256 << 20;

/// A queue of the tree's own namespace.
#[derive(Debug)]
pub struct Queue {
    name: Vec<u8>,
    nameless: bool,
    ino: u64,
    fd: OwnedFd,
}

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    /// The tree's own namespace, and the device of its queues.
    own: Option<(u32, u64)>,
    queues: Vec<Queue>,
}

/// What a restore has made, by the inodes of images.
#[derive(Debug, Default)]
pub struct Restored {
    made: HashMap<u64, OwnedFd>,
}

/// The file system of queues in this thread's IPC namespace: its root. None if the kernel has no queues.
fn root() -> Result<Option<OwnedFd>> {
    let context = match fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(rustix::io::Errno::NODEV) => return Ok(None),
        other => other.call("fsopen(mqueue)")?,
    };
    fsconfig_create(&context).call("fsconfig(mqueue)")?;
    let files = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).call("fsmount(mqueue)")?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&files, ".", flags, Mode::empty()).call("open(mqueue)").map(Some)
}

/// All queues with names of this thread's namespace, and the device that they are on.
pub fn find() -> Result<Option<(u64, Vec<Queue>)>> {
    let Some(root) = root()? else { return Ok(None) };
    let dev = rustix::fs::fstat(&root).call("fstat")?.st_dev;
    let mut all = Vec::new();
    for entry in rustix::fs::Dir::read_from(&root).call("getdents")? {
        let entry = entry.call("getdents")?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&root, name, flags, Mode::empty()).call("open(mqueue)")?;
        let ino = rustix::fs::fstat(&fd).call("fstat")?.st_ino;
        all.push(Queue { name: name.to_bytes().to_vec(), nameless: false, ino, fd });
    }
    Ok(Some((dev, all)))
}

impl Queue {
    fn called(&self) -> String {
        format!("the POSIX message queue /{}", self.name.escape_ascii())
    }

    /// What must not be touched is refused.
    fn refuse(&self) -> Result<Attributes> {
        let mut text = [0; 128];
        let len = rustix::io::pread(&self.fd, &mut text, 0).call("read")?;
        if let Some(pid) = notified(text.get(..len).unwrap_or_default()) {
            let what = format!("{}, of whose next message process {pid} is to be notified,", self.called());
            return Err(Error::refused(what, "take the notification back (mq_notify) before the dump"));
        }
        let attributes = mqueue::attributes(self.fd.as_fd())?;
        if room(&attributes) > MOST_ROOM {
            let what =
                format!("{} with {} messages of up to {} bytes", self.called(), attributes.count, attributes.size);
            return Err(Error::refused(what, "let the program receive them before the dump"));
        }
        Ok(attributes)
    }
}

fn room(attributes: &Attributes) -> usize {
    let number = |n: libc::c_long| usize::try_from(n).unwrap_or(usize::MAX);
    number(attributes.count).saturating_mul(number(attributes.size))
}

/// Who is to be notified, as the text of a queue says it.
fn notified(text: &[u8]) -> Option<i32> {
    let text = String::from_utf8_lossy(text);
    let pid = text.split_whitespace().find_map(|word| word.strip_prefix("NOTIFY_PID:"))?;
    pid.parse().ok().filter(|&pid| pid != 0)
}

/// Notes the queues of the tree's own namespace `id`.
pub fn note(id: u32, found: Option<(u64, Vec<Queue>)>, cx: &mut DumpFiles<'_>) -> Result<()> {
    let Some((dev, queues)) = found else { return Ok(()) };
    queues.iter().try_for_each(|queue| queue.refuse().map(drop))?;
    cx.mqueues = Dumped { own: Some((id, dev)), queues };
    Ok(())
}

/// Is it a descriptor of a queue?
pub fn is_one(d: &Descriptor) -> bool {
    rustix::fs::fstatfs(&d.copy).is_ok_and(|fs| fs.f_type == MQUEUE_MAGIC)
}

/// Dumps a descriptor.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let (path, nameless) = match d.link.strip_suffix(b" (deleted)") {
        Some(path) => (path, true),
        None => (d.link.as_slice(), false),
    };
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_vec();
    let elsewhere = || Err(d.refused("a POSIX message queue of another IPC namespace", "close it before the dump"));
    match cx.mqueues.own {
        Some((_, dev)) if dev != d.stat.st_dev => return elsewhere(),
        Some(_) if cx.mqueues.queues.iter().any(|queue| queue.ino == d.stat.st_ino) => {}
        Some(_) => {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd =
                rustix::fs::open(magic_link(d.copy.as_fd()), flags, Mode::empty()).call("open(/proc/self/fd/N)")?;
            let queue = Queue { name: name.clone(), nameless: true, ino: d.stat.st_ino, fd };
            queue.refuse()?;
            cx.mqueues.queues.push(queue);
        }
        None => {
            let dev = root()?.map(|root| rustix::fs::fstat(&root).call("fstat")).transpose()?.map(|s| s.st_dev);
            if dev != Some(d.stat.st_dev) {
                return elsewhere();
            }
            if nameless {
                return Err(d.refused("a POSIX message queue that was removed", "close it before the dump"));
            }
        }
    }
    let ino = d.stat.st_ino;
    // which open(2) sets and mq_open(2) does not; it means nothing here
    let flags = d.flags & !LARGEFILE;
    let entry = StandstillMqueueFileEntry { id, flags, fown: d.fown, ino, name };
    let kind = FdTypes::StandstillMqueue.into();
    Ok(FileEntry { id, r#type: kind, standstill_mqueue: Some(entry), ..FileEntry::default() })
}

/// Writes the queues with their messages.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    let Some((id, _)) = cx.mqueues.own else { return Ok(()) };
    let mut queues = std::mem::take(&mut cx.mqueues.queues);
    // the kernel lists the newest first
    queues.sort_by(|a, b| (a.nameless, &a.name, a.ino).cmp(&(b.nameless, &b.name, b.ino)));
    if queues.is_empty() {
        return Ok(());
    }
    let mut image = cx.images.create(ImageKind::StandstillMqueue, id)?;
    for queue in &queues {
        let place = Place::Step("a POSIX message queue");
        let attributes = queue.refuse().at(place.clone())?;
        let stat = rustix::fs::fstat(&queue.fd).call("fstat")?;
        let message = read_all(queue.fd.as_fd(), &attributes).at(place)?;
        image.write(&StandstillMqueueEntry {
            ino: queue.ino,
            name: queue.name.clone(),
            nameless: Some(queue.nameless).filter(|&nameless| nameless),
            mode: stat.st_mode & 0o7777,
            uid: cx.users.user(stat.st_uid),
            gid: cx.users.group(stat.st_gid),
            most: attributes.most.unsigned_abs(),
            size: attributes.size.unsigned_abs(),
            message,
        })?;
    }
    Ok(image.finish()?)
}

/// The messages of a queue, which are in there again afterwards.
fn read_all(queue: BorrowedFd<'_>, attributes: &Attributes) -> Result<Vec<StandstillMqueueMessage>> {
    let number = |n: libc::c_long| usize::try_from(n).unwrap_or(0);
    let (count, size) = (number(attributes.count), number(attributes.size));
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut plan = Plan::new();
    let number = FIRST_FD + 1;
    let mut places = Vec::with_capacity(count);
    for _ in 0..count {
        let (place, priority) = (plan.room(size), plan.room(8));
        let args = [number.into(), place.into(), size.into(), priority.into(), 0.into()];
        places.push((plan.always("receiving a message", libc::SYS_mq_timedreceive, &args), place, priority));
    }
    let mut sent = Vec::with_capacity(count);
    for &(received, place, priority) in &places {
        let of = plan.op(Code::Load, 0, &[priority.into(), 0.into()], Expect::Any, [0; 2], "priority");
        plan.even_if_orphaned();
        let args = [number.into(), place.into(), received.into(), of.into(), 0.into()];
        sent.push(plan.always("sending it again", libc::SYS_mq_timedsend, &args));
    }
    // the executor watches a thread, and this one does not end before it
    thread::apart(|| {
        let robust = RobustList::new()?;
        let len = Arena::size_for(1, plan.len(), plan.data_len());
        let mut arena = Arena::new(Arena::base_in(BASE), len, &robust)?;
        let slot = arena.slot()?;
        arena.load(slot, 0, plan)?;
        let inherit = [arena.fd(), queue];
        let helper = spawn::spawn_kept(&Spawn::helper(arena.load_at(), arena.boot(slot), &inherit))?;
        let pid = helper.pid();
        let alive = || if ptrace::exists(pid) { Ok(()) } else { Err(Error::Gone) };
        let done = arena.finish(slot, LIMIT, alive);
        calls::kill(pid, libc::SIGKILL)?;
        drop(helper);
        done?;
        let failed = |call, result: i64| {
            let number = i32::try_from(-result).unwrap_or(libc::EPROTO);
            Err(Error::Sys { call, source: std::io::Error::from_raw_os_error(number) })
        };
        let mut all = Vec::with_capacity(count);
        for (&(received, place, priority), &sent) in places.iter().zip(&sent) {
            let (len, again) = (arena.result(slot, received), arena.result(slot, sent));
            if len < 0 {
                return failed("mq_timedreceive", len);
            }
            if again < 0 {
                return failed("mq_timedsend", again);
            }
            let mut data = arena.answer(slot, place);
            data.truncate(usize::try_from(len).unwrap_or(0));
            let bytes = arena.answer(slot, priority);
            let priority = bytes.iter().take(4).rev().fold(0, |n, &byte| n << 8 | u32::from(byte));
            all.push(StandstillMqueueMessage { priority, data });
        }
        Ok(all)
    })
}

fn name_of(name: &[u8]) -> Result<CString> {
    CString::new(name).map_err(|_| Error::lie("standstill-mqueue", "a name with a zero in it"))
}

/// The queues of images of namespace `id`, with our ids of users.
pub fn read(id: u32, users: &Users, images: &Images) -> Result<Vec<StandstillMqueueEntry>> {
    let mut all: Vec<StandstillMqueueEntry> = images.read_entries_if_there(ImageKind::StandstillMqueue, id)?;
    for queue in &mut all {
        (queue.uid, queue.gid) = (users.outer_user(queue.uid), users.outer_group(queue.gid));
    }
    // a name may have been given anew
    all.sort_by_key(|queue| queue.nameless != Some(true));
    Ok(all)
}

/// What the limits of the namespace must be for them: queues, messages, bytes of one.
pub fn limits(queues: &[StandstillMqueueEntry]) -> [(&'static str, u64); 3] {
    let most = |of: fn(&StandstillMqueueEntry) -> u64| queues.iter().map(of).max().unwrap_or(0);
    [
        ("fs/mqueue/queues_max", u64::try_from(queues.len()).unwrap_or(u64::MAX)),
        ("fs/mqueue/msg_max", most(|queue| queue.most)),
        ("fs/mqueue/msgsize_max", most(|queue| queue.size)),
    ]
}

/// Makes them in this thread's namespace.
pub fn make(queues: &[StandstillMqueueEntry]) -> Result<Restored> {
    let mut restored = Restored::default();
    for queue in queues {
        let name = name_of(&queue.name)?;
        let place = Place::Path([b"/", queue.name.as_slice()].concat().escape_ascii().to_string().into());
        let long = |n: u64| libc::c_long::try_from(n).unwrap_or(libc::c_long::MAX);
        let make = || -> Result<OwnedFd> {
            let new = || mqueue::create(&name, queue.mode, long(queue.most), long(queue.size));
            let fd = shm::as_creator(queue.uid, queue.gid, new)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(queue.mode)).call("fchmod")?;
            for message in &queue.message {
                mqueue::send(fd.as_fd(), &message.data, message.priority)?;
            }
            if queue.nameless == Some(true) {
                mqueue::remove(&name)?;
            }
            Ok(fd)
        };
        restored.made.insert(queue.ino, make().at(place)?);
    }
    Ok(restored)
}

/// Opens a descriptor.
pub fn open(e: &StandstillMqueueFileEntry, cx: &RestoreFiles<'_>) -> Result<OwnedFd> {
    let flags = e.flags & (libc::O_ACCMODE | libc::O_NONBLOCK) as u32;
    let fd = match cx.mqueues.made.get(&e.ino) {
        Some(made) => {
            let flags = OFlags::from_bits_retain(flags) | OFlags::CLOEXEC;
            rustix::fs::open(magic_link(made.as_fd()), flags, Mode::empty()).call("open(/proc/self/fd/N)")?
        }
        None => {
            let shown = Place::Path([b"/", e.name.as_slice()].concat().escape_ascii().to_string().into());
            mqueue::open(&name_of(&e.name)?, flags.cast_signed()).at(shown)?
        }
    };
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn who_is_notified() {
        assert_eq!(notified(b"QSIZE:129        NOTIFY:0     SIGNO:0     NOTIFY_PID:0     \n"), None);
        assert_eq!(notified(b"QSIZE:0          NOTIFY:0     SIGNO:10    NOTIFY_PID:8260  \n"), Some(8260));
        assert_eq!(notified(b""), None);
    }

    #[test]
    fn messages_are_still_there() {
        let name = CString::new(format!("standstill-test-{}", std::process::id())).unwrap();
        let queue = match mqueue::create(&name, 0o600, 5, 100) {
            Ok(queue) => queue,
            Err(e) => return eprintln!("SKIPPED: no message queues here: {}", e.chain()),
        };
        mqueue::remove(&name).unwrap();
        let wanted = [(&b"last"[..], 1), (b"first", 9), (b"", 3), (b"after it", 3)];
        for (text, priority) in wanted {
            mqueue::send(queue.as_fd(), text, priority).unwrap();
        }
        let attributes = mqueue::attributes(queue.as_fd()).unwrap();
        assert_eq!((attributes.most, attributes.size, attributes.count), (5, 100, 4));
        for _ in 0..3 {
            let all = read_all(queue.as_fd(), &attributes).unwrap();
            let all: Vec<_> = all.iter().map(|m| (m.data.as_slice(), m.priority)).collect();
            assert_eq!(all, [(&b"first"[..], 9), (b"", 3), (b"after it", 3), (b"last", 1)]);
        }
        assert_eq!(mqueue::attributes(queue.as_fd()).unwrap(), attributes);
    }
}
