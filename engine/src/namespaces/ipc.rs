//! An IPC namespace of the tree's own (ipc_namespaces(7)): System V shared memory, semaphores and message queues with their
//! content, and the limits of the namespace (`/proc/sys/kernel/{shm,msg,sem}*`, `/proc/sys/fs/mqueue`).
//!
//! All of it is the namespace's and not a task's, and nobody outside sees it; a thread of the engine goes in. The namespace
//! is gone with its last task, so a failed restore has nothing to take away.
//!
//! Images, N being the namespace's id: `ipcns-var-N.img` has the limits, `ipcns-shm-N.img` the segments (see
//! [`sysv`]), `ipcns-msg-N.img` queues with their messages, `ipcns-sem-N.img` semaphores with their values.
//!
//! Order at restore: the root has just been born into a fresh namespace. Limits come first, since objects must fit into them
//! (for the moment of making it, a queue gets a limit of its own); then objects, each with its number (`*_next_id`), key, owner,
//! creator and mode; limits once more. When all tasks have attached their segments: marks for removal, and
//! `shm_rmid_forced`, which removes what nobody has attached.
//!
//! Not kept: times, and which processes sent, received, attached or changed a value last; adjustments of semaphores that a
//! process's end undoes (SEM_UNDO), which the kernel shows nobody; a queue's limit above that of the namespace, if the
//! one who restores lacks CAP_SYS_RESOURCE. POSIX message queues: [`mqueue`].
//!
//! Man pages: ipc_namespaces(7), sysvipc(7), proc_sys_kernel(5), msgrcv(2).

use standstill_images::proto::{IpcDescEntry, IpcMsg, IpcMsgEntry, IpcSemEntry, IpcVarEntry, StandstillMqueueEntry};
use standstill_images::{ImageKind, Images};

use super::user::Users;
use super::{inside, Kind};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{mqueue, DumpFiles};
use crate::memory::sysv;
use crate::sys::ipc::{self, Perm, Queue, Semaphores};

const NEXT_MESSAGES: &str = "/proc/sys/kernel/msg_next_id";
const NEXT_SEMAPHORES: &str = "/proc/sys/kernel/sem_next_id";
const MOST_BYTES: &str = "/proc/sys/kernel/msgmnb";
const LARGEST: &str = "/proc/sys/kernel/msgmax";
const FORCED: &str = "/proc/sys/kernel/shm_rmid_forced";

/// Type and bytes.
type Message = (i64, Vec<u8>);

/// What a dump finds in the namespace.
#[derive(Debug)]
struct Found {
    vars: IpcVarEntry,
    segments: Vec<sysv::Found>,
    queues: Vec<(Queue, Vec<Message>)>,
    semaphores: Vec<(Semaphores, Vec<u16>)>,
    posix: Option<(u64, Vec<mqueue::Queue>)>,
}

/// Notes what is in the namespace `id` of process `pid`; the content of segments is written with other memory.
pub fn dump(pid: i32, id: u32, cx: &mut DumpFiles<'_>) -> Result<()> {
    let found = inside(pid, Kind::Ipc, find).at(Place::Item("IPC namespace", id.into()))?;
    mqueue::note(id, found.posix, cx)?;
    cx.images.write_one(ImageKind::IpcVar, id, &found.vars)?;
    found.segments.into_iter().for_each(|segment| segment.note(cx));
    if !found.queues.is_empty() {
        let mut image = cx.images.create(ImageKind::IpcnsMsg, id)?;
        for (queue, messages) in &found.queues {
            let entry = IpcMsgEntry {
                desc: describe(queue.id, &queue.perm, &cx.users),
                qbytes: u32::try_from(queue.most).unwrap_or(u32::MAX),
                qnum: u32::try_from(messages.len()).unwrap_or(u32::MAX),
            };
            let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let payload = messages
                .iter()
                .map(|(kind, bytes)| (IpcMsg { mtype: kind.cast_unsigned(), msize: size(bytes) }, bytes.as_slice()));
            image.write_with_payload(&entry, &payload.collect())?;
        }
        image.finish()?;
    }
    if !found.semaphores.is_empty() {
        let mut image = cx.images.create(ImageKind::IpcnsSem, id)?;
        for (set, values) in &found.semaphores {
            let nsems = u32::try_from(values.len()).unwrap_or(u32::MAX);
            image.write_with_payload(&IpcSemEntry { desc: describe(set.id, &set.perm, &cx.users), nsems }, values)?;
        }
        image.finish()?;
    }
    Ok(())
}

fn describe(id: i32, perm: &Perm, users: &Users) -> IpcDescEntry {
    let Perm { key, uid, gid, cuid, cgid, mode } = *perm;
    let mut desc = IpcDescEntry { key, uid, gid, cuid, cgid, mode, id: id.cast_unsigned() };
    to_own(&mut desc, users);
    desc
}

/// Owner and creator as the tree sees them.
pub fn to_own(desc: &mut IpcDescEntry, users: &Users) {
    (desc.uid, desc.gid) = (users.user(desc.uid), users.group(desc.gid));
    (desc.cuid, desc.cgid) = (users.user(desc.cuid), users.group(desc.cgid));
}

/// Owner and creator as we see them.
pub fn to_ours(desc: &mut IpcDescEntry, users: &Users) {
    (desc.uid, desc.gid) = (users.outer_user(desc.uid), users.outer_group(desc.gid));
    (desc.cuid, desc.cgid) = (users.outer_user(desc.cuid), users.outer_group(desc.cgid));
}

fn perm(desc: &IpcDescEntry) -> Perm {
    let IpcDescEntry { key, uid, gid, cuid, cgid, mode, .. } = *desc;
    Perm { key, uid, gid, cuid, cgid, mode }
}

fn find() -> Result<Found> {
    let vars = read_vars()?;
    let forced = vars.shm_rmid_forced != 0;
    let mut queues = Vec::new();
    for queue in ipc::queues()? {
        // the kernel looks at no message that is larger than what may be sent now
        let most = usize::try_from(vars.msg_ctlmax).unwrap_or(usize::MAX >> 8);
        let messages = (0..queue.messages).map(|n| match ipc::message(queue.id, n, most) {
            Err(e) if e.errno() == libc::EINVAL => {
                let what = format!("a message larger than {LARGEST} has become since it was sent");
                Err(Error::refused(what, "raise that limit in the namespace"))
            }
            other => other,
        });
        let messages =
            messages.collect::<Result<_>>().at(Place::Item("message queue", queue.id.unsigned_abs().into()))?;
        queues.push((queue, messages));
    }
    let mut semaphores = Vec::new();
    for set in ipc::semaphores()? {
        let values = ipc::values(&set).at(Place::Item("semaphores", set.id.unsigned_abs().into()))?;
        semaphores.push((set, values));
    }
    Ok(Found { vars, segments: sysv::find(forced)?, queues, semaphores, posix: mqueue::find()? })
}

/// A file of /proc/sys, in one read: a second one would get nothing. None where there is no such file.
fn read_file(path: &str) -> Result<Option<String>> {
    let mut text = Vec::new();
    match crate::proc::read_proc(path.as_ref(), &mut text) {
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(e) => Err(e).call("read").at(Place::Path(path.into())),
        Ok(()) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
    }
}

/// A number of /proc/sys; none where there is no such file.
fn read_number(path: &str) -> Result<Option<u64>> {
    let Some(text) = read_file(path)? else { return Ok(None) };
    // -1 is what nobody has asked for
    let number = text.trim().parse::<u64>().or_else(|_| text.trim().parse::<i64>().map(i64::cast_unsigned));
    let bad = |_| Error::Usage { what: format!("{path} reads {:?}", text.trim()) };
    number.map(Some).map_err(bad)
}

fn read_vars() -> Result<IpcVarEntry> {
    let of = |path: &str| -> Result<u32> {
        Ok(read_number(&format!("/proc/sys/{path}"))?.map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX)))
    };
    let next = |path: &str| Ok::<_, Error>(Some(of(path)?).filter(|&n| n != u32::MAX));
    let long = |path: &str| Ok::<_, Error>(read_number(path)?.unwrap_or(0));
    let sem = read_file("/proc/sys/kernel/sem")?.unwrap_or_default();
    Ok(IpcVarEntry {
        sem_ctls: sem.split_whitespace().filter_map(|n| n.parse().ok()).collect(),
        msg_ctlmax: of("kernel/msgmax")?,
        msg_ctlmnb: of("kernel/msgmnb")?,
        msg_ctlmni: of("kernel/msgmni")?,
        auto_msgmni: of("kernel/auto_msgmni")?,
        shm_ctlmax: long("/proc/sys/kernel/shmmax")?,
        shm_ctlall: long("/proc/sys/kernel/shmall")?,
        shm_ctlmni: of("kernel/shmmni")?,
        shm_rmid_forced: of("kernel/shm_rmid_forced")?,
        mq_queues_max: of("fs/mqueue/queues_max")?,
        mq_msg_max: of("fs/mqueue/msg_max")?,
        mq_msgsize_max: of("fs/mqueue/msgsize_max")?,
        mq_msg_default: Some(of("fs/mqueue/msg_default")?),
        mq_msgsize_default: Some(of("fs/mqueue/msgsize_default")?),
        msg_next_id: next("kernel/msg_next_id")?,
        sem_next_id: next("kernel/sem_next_id")?,
        shm_next_id: next("kernel/shm_next_id")?,
    })
}

/// Sets a limit, if it is another one. Who may not set it goes on with what there is, as with CRIU.
fn write_var(path: &str, value: &str) -> Result<()> {
    let Some(now) = read_file(path)? else { return Ok(()) };
    if now.split_whitespace().eq(value.split_whitespace()) {
        return Ok(());
    }
    match std::fs::write(path, value) {
        Err(e) if [Some(libc::EACCES), Some(libc::EPERM)].contains(&e.raw_os_error()) => {
            tracing::warn!("{path} stays {}: {e}", now.trim());
            Ok(())
        }
        other => other.call("write").at(Place::Path(path.into())),
    }
}

fn write_vars(vars: &IpcVarEntry) -> Result<()> {
    let set = |path: &str, value: u64| write_var(&format!("/proc/sys/{path}"), &value.to_string());
    let sem: Vec<String> = vars.sem_ctls.iter().map(u32::to_string).collect();
    if !sem.is_empty() {
        write_var("/proc/sys/kernel/sem", &sem.join(" "))?;
    }
    set("kernel/msgmax", vars.msg_ctlmax.into())?;
    set("kernel/msgmnb", vars.msg_ctlmnb.into())?;
    set("kernel/auto_msgmni", vars.auto_msgmni.into())?;
    set("kernel/msgmni", vars.msg_ctlmni.into())?;
    set("kernel/shmmax", vars.shm_ctlmax)?;
    set("kernel/shmall", vars.shm_ctlall)?;
    set("kernel/shmmni", vars.shm_ctlmni.into())?;
    // no number stands for a kernel without them
    for (path, value) in [
        ("fs/mqueue/queues_max", Some(vars.mq_queues_max)),
        ("fs/mqueue/msg_max", Some(vars.mq_msg_max)),
        ("fs/mqueue/msgsize_max", Some(vars.mq_msgsize_max)),
        ("fs/mqueue/msg_default", vars.mq_msg_default),
        ("fs/mqueue/msgsize_default", vars.mq_msgsize_default),
    ] {
        if let Some(value) = value.filter(|&v| v != 0) {
            set(path, value.into())?;
        }
    }
    Ok(())
}

/// The images of a namespace.
#[derive(Debug)]
struct Stored {
    vars: IpcVarEntry,
    queues: Vec<(IpcMsgEntry, Vec<Message>)>,
    semaphores: Vec<(IpcSemEntry, Vec<u16>)>,
    posix: Vec<StandstillMqueueEntry>,
}

fn read(id: u32, users: &Users, images: &Images) -> Result<Stored> {
    let vars = images.read_one(ImageKind::IpcVar, id)?;
    let mut queues = Vec::new();
    if let Some(image) = images.open_if_there(ImageKind::IpcnsMsg, id)? {
        for (mut entry, messages) in image.reader()?.all_with_payload::<IpcMsgEntry>()? {
            to_ours(&mut entry.desc, users);
            let messages = messages.into_iter().map(|(m, bytes)| (m.mtype.cast_signed(), bytes.to_vec())).collect();
            queues.push((entry, messages));
        }
    }
    let mut semaphores = Vec::new();
    if let Some(image) = images.open_if_there(ImageKind::IpcnsSem, id)? {
        semaphores = image.reader()?.all_with_payload::<IpcSemEntry>()?;
        semaphores.iter_mut().for_each(|(entry, _)| to_ours(&mut entry.desc, users));
    }
    let posix = mqueue::read(id, users, images)?;
    Ok(Stored { vars, queues, semaphores, posix })
}

/// Fills the fresh namespace that process `pid` was born into from images of namespace `id`. `segments` are those of
/// `ipcns-shm-N.img`.
pub fn restore(
    pid: i32,
    id: u32,
    segments: &sysv::Restored,
    users: &Users,
    images: &Images,
) -> Result<mqueue::Restored> {
    let stored = read(id, users, images)?;
    inside(pid, Kind::Ipc, || {
        write_vars(&stored.vars)?;
        segments.make_all(images)?;
        for (entry, messages) in &stored.queues {
            make_queue(entry, messages, &stored.vars).at(Place::Item("message queue", entry.desc.id.into()))?;
        }
        for (entry, values) in &stored.semaphores {
            make_semaphores(entry, values).at(Place::Item("semaphores", entry.desc.id.into()))?;
        }
        for (path, least) in mqueue::limits(&stored.posix) {
            let path = format!("/proc/sys/{path}");
            if read_number(&path)?.is_some_and(|now| now < least) {
                write_var(&path, &least.to_string())?;
            }
        }
        let posix = mqueue::make(&stored.posix)?;
        write_vars(&stored.vars)?;
        let next = [
            (NEXT_MESSAGES, stored.vars.msg_next_id),
            (NEXT_SEMAPHORES, stored.vars.sem_next_id),
            (sysv::NEXT_ID, stored.vars.shm_next_id),
        ];
        next.into_iter().try_for_each(|(path, n)| n.map_or(Ok(()), |n| write_var(path, &n.to_string())))?;
        Ok(posix)
    })
    .at(Place::Item("IPC namespace", id.into()))
}

/// When all tasks have attached their segments.
pub fn settle(pid: i32, id: u32, segments: &sysv::Restored, images: &Images) -> Result<()> {
    let vars: IpcVarEntry = images.read_one(ImageKind::IpcVar, id)?;
    inside(pid, Kind::Ipc, || {
        segments.mark_removed()?;
        write_var(FORCED, &vars.shm_rmid_forced.to_string())
    })
    .at(Place::Item("IPC namespace", id.into()))
}

fn is_made(wanted: u32, got: i32) -> Result<()> {
    if got.cast_unsigned() == wanted {
        return Ok(());
    }
    Err(Error::refused(format!("its number (the kernel gave {got})"), "restore on a kernel that lets it be chosen"))
}

fn make_queue(entry: &IpcMsgEntry, messages: &[Message], vars: &IpcVarEntry) -> Result<()> {
    std::fs::write(NEXT_MESSAGES, entry.desc.id.cast_signed().to_string()).call("write(msg_next_id)")?;
    // limits may have been lowered since
    let largest = messages.iter().map(|(_, bytes)| bytes.len()).max().unwrap_or(0);
    write_var(LARGEST, &largest.max(vars.msg_ctlmax as usize).to_string())?;
    write_var(MOST_BYTES, &entry.qbytes.max(vars.msg_ctlmnb).to_string())?;
    let perm = perm(&entry.desc);
    let id = ipc::make_queue(&perm)?;
    is_made(entry.desc.id, id)?;
    for (kind, bytes) in messages {
        ipc::send(id, *kind, bytes)?;
    }
    ipc::set_queue(id, &perm, entry.qbytes.into())
}

fn make_semaphores(entry: &IpcSemEntry, values: &[u16]) -> Result<()> {
    std::fs::write(NEXT_SEMAPHORES, entry.desc.id.cast_signed().to_string()).call("write(sem_next_id)")?;
    is_made(entry.desc.id, ipc::make_semaphores(&perm(&entry.desc), values)?)
}
