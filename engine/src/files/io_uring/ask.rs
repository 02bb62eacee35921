//! What the tasks must be asked: who may use a ring, what is registered, and whether requests are under way.
//!
//! None of the questions changes a ring for longer than the executor needs to put it back, whatever becomes of the engine
//! meanwhile.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use standstill_images::proto::{
    FdinfoEntry, StandstillIoUringBuffer, StandstillIoUringEntry, StandstillIoUringFile, StandstillIoUringOverflow,
    StandstillIoUringUser,
};
use standstill_restorer::plan::{Code, Expect};

use super::flight::{self, Seen, PATIENCE};
use super::rings::{Content, Shape};
use super::{Descriptor, DumpFiles, Ring};
use crate::error::{At, Call, Error, Place, Result};
use crate::plan::Plan;
use crate::proc::fdinfo::{self, FdDetail};
use crate::proc::io_uring::IoUring;
use crate::proc::maps::Vma;
use crate::proc::{self, status};
use crate::sys::calls;
use crate::sys::io_uring::{self as sys, code, setup};
use crate::tasks::facts;
use crate::tracee::{Answers, Infected};

/// So many descriptors of rings a thread can register.
const SLOTS: u32 = 16;

/// What is known of a process that may have rings.
#[derive(Debug)]
pub struct Process<'a> {
    /// In our pid namespace.
    pub pid: i32,
    /// Its threads, leader first: as we know them, and as they go into images.
    pub threads: Vec<(i32, u32)>,
    /// Its descriptors.
    pub descriptors: &'a [Descriptor],
    /// Their entries.
    pub entries: &'a [FdinfoEntry],
    /// Its areas.
    pub areas: &'a [Vma],
    /// It has memory pinned.
    pub pinned: bool,
}

impl Process<'_> {
    /// File ids of descriptors that link to `link`, each once.
    fn files(&self, link: &[u8]) -> HashSet<u32> {
        let numbers = self.descriptors.iter().filter(|d| d.link == link).map(|d| d.fd);
        let id = |fd: i32| self.entries.iter().find(|e| i32::try_from(e.fd) == Ok(fd)).map(|e| e.id);
        numbers.filter_map(id).collect()
    }

    /// Is all of this memory there, and the program's to write?
    fn has(&self, address: u64, length: u64) -> bool {
        let (mut at, end) = (address, address.saturating_add(length));
        for area in self.areas.iter().filter(|a| a.end > address && a.read) {
            if area.start > at || at >= end {
                break;
            }
            at = area.end;
        }
        at >= end
    }
}

/// The CPU of a thread that polls for submissions, if it is bound to one. It gets the credentials of the one who restores.
pub(super) fn polling_thread(d: &Descriptor, tid: i32) -> Result<Option<u32>> {
    let read = |path: String| -> Result<status::Status> {
        let mut text = Vec::new();
        proc::read_proc(path.as_ref(), &mut text).call("read").at(Place::Path(path.into()))?;
        Ok(status::parse(&text)?)
    };
    let (theirs, own) = (read(format!("/proc/{}/task/{tid}/status", d.pid)), read("/proc/thread-self/status".into())?);
    let theirs = theirs.map_err(|_| {
        d.refused(
            "an io_uring whose polling thread is of another process",
            "let each process have an io_uring of its own",
        )
    })?;
    let who = |s: &status::Status| (s.uid, s.gid, s.cap_effective);
    if who(&theirs) != who(&own) {
        return Err(d.refused(
            "an io_uring whose polling thread has other credentials than we",
            "dump as that user, or start the program without IORING_SETUP_SQPOLL",
        ));
    }
    let cpus = std::str::from_utf8(&theirs.cpus_allowed_list).ok();
    Ok(cpus.and_then(|list| list.trim().parse().ok()).filter(|_| cpus != Some("0") || sys_has_more_cpus()))
}

fn sys_has_more_cpus() -> bool {
    std::thread::available_parallelism().is_ok_and(|n| n.get() > 1)
}

/// Asks the tasks for what is missing, waits for requests, and puts the entries of all rings into `files.img`.
pub fn complete(hosts: &mut [Infected<'_>], processes: &[Process<'_>], cx: &mut DumpFiles<'_>) -> Result<()> {
    let mut rings = std::mem::take(&mut cx.io_uring.rings);
    for ring in &mut rings {
        let holders = cx.io_uring.holders.get(&ring.ino).cloned().unwrap_or_default();
        let (pid, fd) = *holders.first().ok_or(Error::Gone)?;
        one(ring, &holders, hosts, processes).at(Place::Fd(fd)).task(pid)?;
    }
    users(&mut rings, hosts, processes, cx)?;
    if rings.iter().any(|ring| ring.moved) {
        for process in processes {
            let pidfd = calls::pidfd_open(process.pid, 0)?;
            if !flight::same_files(process.descriptors, &facts::descriptors(process.pid, pidfd.as_fd())?) {
                let what = "requests of an io_uring changed open files while those were read";
                return Err(Error::Moving { what }).task(process.pid);
            }
        }
    }
    for ring in rings {
        cx.set_io_uring(ring.entry);
    }
    Ok(())
}

/// Who brings a ring to where it was: process, thread, and number of the ring there.
#[derive(Debug, Clone, Copy)]
struct Issuer {
    host: usize,
    thread: usize,
    fd: i32,
}

fn one(ring: &mut Ring, holders: &[(i32, i32)], hosts: &mut [Infected<'_>], processes: &[Process<'_>]) -> Result<()> {
    let issuer = issuer(ring, holders, hosts, processes)?;
    let process = processes.iter().find(|p| p.pid == hosts[issuer.host].pid()).ok_or(Error::Gone)?;
    let e = &mut ring.entry;
    let tid = |thread: usize| process.threads.get(thread).map(|t| t.1).ok_or(Error::Gone);
    (e.owner, e.issuer) = (tid(0)?, tid(issuer.thread)?);
    let eventfd = questions(issuer, hosts)?;
    wait(ring, issuer, holders, hosts)?;
    let text = peek(issuer, hosts)?;
    let e = &mut ring.entry;
    let first = Content::map(ring.copy.as_fd(), Shape::of(e))?;
    e.setup = Shape::of(e).by_text(&text, &first.behind());
    Content::map(ring.copy.as_fd(), Shape::of(e))?.into_entry(e);
    if e.setup & setup::SQPOLL != 0 && e.sq_head != e.sq_tail {
        return Err(Error::refused(
            "an io_uring with requests that its polling thread has not taken yet",
            "let the program wake that thread (IORING_ENTER_SQ_WAKEUP)",
        ));
    }
    registered(e, &ring.info, process)?;
    if eventfd {
        let mut candidates = process.files(b"anon_inode:[eventfd]").into_iter();
        e.eventfd = match (candidates.next(), candidates.next()) {
            (Some(id), None) => Some(id),
            _ => {
                return Err(Error::refused(
                    "an io_uring with an eventfd that cannot be told from others",
                    "let the program unregister it before the dump",
                ))
            }
        };
    }
    Ok(())
}

/// The thread that may submit; of a ring that all may use, the first of a process that has pinned its buffers, or polls.
fn issuer(
    ring: &Ring,
    holders: &[(i32, i32)],
    hosts: &mut [Infected<'_>],
    processes: &[Process<'_>],
) -> Result<Issuer> {
    let host_of = |pid: i32, hosts: &[Infected<'_>]| hosts.iter().position(|h| h.pid() == pid).ok_or(Error::Gone);
    if !ring.single {
        let pinned = |pid: i32| processes.iter().any(|p| p.pid == pid && p.pinned);
        let polls = |pid: i32| std::path::Path::new(&format!("/proc/{pid}/task/{}", ring.info.sq_thread)).exists();
        let fits = |&&(pid, _): &&(i32, i32)| match ring.info.sq_thread {
            1.. => polls(pid),
            _ => ring.info.bufs.is_empty() || pinned(pid),
        };
        let &(pid, fd) = holders.iter().find(fits).ok_or_else(|| {
            Error::refused(
                "an io_uring whose owner does not have it open any more",
                "let the process that made it keep it open",
            )
        })?;
        return Ok(Issuer { host: host_of(pid, hosts)?, thread: 0, fd });
    }
    for &(pid, fd) in holders {
        let host = host_of(pid, hosts)?;
        let count = hosts[host].threads().len();
        let mut plans = Vec::with_capacity(count);
        let mut asked = Vec::with_capacity(count);
        for _ in 0..count {
            let mut plan = Plan::new();
            asked.push(ask(&mut plan, fd.cast_unsigned(), code::REGISTER_PROBE));
            plans.push(plan);
        }
        hosts[host].start(plans)?;
        let answers = hosts[host].finish()?;
        let yes = |thread: &usize| answers[*thread].result(asked[*thread]) == -i64::from(libc::EFAULT);
        if let Some(thread) = (0..count).find(yes) {
            return Ok(Issuer { host, thread, fd });
        }
    }
    Err(Error::refused(
        "an io_uring that only a thread which is gone may use",
        "let the program close it before the dump",
    ))
}

/// A question of io_uring_register(2) to which the answer has no room.
fn ask(plan: &mut Plan, ring: u32, code: u32) -> crate::plan::At {
    plan.ask("question to an io_uring", libc::SYS_io_uring_register, &[ring.into(), code.into(), 1.into(), 1.into()])
}

/// Runs a plan in one thread.
fn in_thread(host: &mut Infected<'_>, thread: usize, plan: Plan) -> Result<Answers> {
    let mut plans = Vec::new();
    plans.resize_with(host.threads().len(), Plan::new);
    *plans.get_mut(thread).ok_or(Error::Gone)? = plan;
    host.start(plans)?;
    host.finish()?.into_iter().nth(thread).ok_or(Error::Gone)
}

/// Is there an eventfd? Provided buffers, and memory for waits, are refused.
fn questions(issuer: Issuer, hosts: &mut [Infected<'_>]) -> Result<bool> {
    let mut plan = Plan::new();
    let fd = issuer.fd.cast_unsigned();
    let eventfd = ask(&mut plan, fd, code::REGISTER_EVENTFD);
    let region = ask(&mut plan, fd, code::REGISTER_MEM_REGION);
    let status = plan.room(40);
    let groups =
        plan.op(Code::Groups, 0, &[issuer.fd.into(), status.into()], Expect::Any, [0; 2], "groups of provided buffers");
    let answers = in_thread(&mut hosts[issuer.host], issuer.thread, plan)?;
    if let group @ 0.. = answers.result(groups) {
        return Err(Error::refused(
            format!("an io_uring with provided buffers (group {group})"),
            "let the program take them back before the dump",
        ));
    }
    let busy = -i64::from(libc::EBUSY);
    if answers.result(region) == busy {
        return Err(Error::refused("an io_uring with memory for waits", "let the program close it before the dump"));
    }
    Ok(answers.result(eventfd) == busy)
}

/// Waits until no request is under way. What is to be done in a thread for that is done as its executor makes a system call.
fn wait(ring: &mut Ring, issuer: Issuer, holders: &[(i32, i32)], hosts: &mut [Infected<'_>]) -> Result<()> {
    let began = Instant::now();
    let pid = hosts[issuer.host].pid();
    let mut text = Vec::new();
    loop {
        let mut plan = Plan::new();
        let wake = if ring.info.is_polled_for() { sys::SQ_WAKEUP } else { 0 };
        let args = [issuer.fd.into(), 0.into(), 0.into(), (sys::GETEVENTS | wake).into(), 0.into(), 0.into()];
        plan.ask("completions of an io_uring", libc::SYS_io_uring_enter, &args);
        in_thread(&mut hosts[issuer.host], issuer.thread, plan)?;
        let path = format!("/proc/{pid}/fdinfo/{}", issuer.fd);
        proc::read_proc(path.as_ref(), &mut text).call("read(/proc/PID/fdinfo/N)")?;
        let FdDetail::IoUring(info) = fdinfo::parse(&text)?.detail else { return Err(Error::Gone) };
        ring.moved |= ring.info.completed() != info.completed();
        ring.info = *info;
        let last = began.elapsed() > PATIENCE;
        let shape = Shape::of(&ring.entry);
        let content = Content::map(ring.copy.as_fd(), shape)?;
        let (sqes, cqes) = (content.sqes(), content.cqes());
        let seen = Seen {
            info: &ring.info,
            dropped: content.dropped(),
            lost: content.lost(),
            sqes: (&sqes, shape.sqe_size()),
            cqes: (&cqes, shape.cqe_size()),
        };
        let mut pids: Vec<i32> = holders.iter().map(|h| h.0).collect();
        pids.dedup();
        let workers = pids.into_iter().any(flight::has_busy_worker);
        match seen.under_way(workers, last, flight::timeouts) {
            None => return Ok(()),
            Some(kind) if last => {
                return Err(Error::refused(
                    format!("an io_uring with a request in flight: {kind}"),
                    "let the program wait for its requests, or cancel them, before the dump",
                ))
            }
            Some(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// What the kernel prints of a ring with an entry in each queue.
fn peek(issuer: Issuer, hosts: &mut [Infected<'_>]) -> Result<Vec<u8>> {
    const ROOM: usize = 4096;
    let words = sys::words()?;
    let mut plan = Plan::new();
    let path = plan.string(format!("/proc/self/fdinfo/{}", issuer.fd).as_bytes());
    let room = plan.room(ROOM);
    let at = [words.sq_head, words.sq_tail, words.cq_head, words.cq_tail];
    let at = at.iter().rev().fold(0u64, |all, &word| all << 16 | u64::from(word));
    let args = [issuer.fd.into(), path.into(), room.into(), ROOM.into(), at.into()];
    let read = plan.op(Code::Peek, 0, &args, Expect::Any, [0; 2], "entries of an io_uring");
    // any thread may, and the first has the room
    let answers = in_thread(&mut hosts[issuer.host], 0, plan)?;
    let len = usize::try_from(answers.result(read))
        .map_err(|_| Error::refused("an io_uring of a task that sees no /proc", "mount /proc where the program is"))?;
    Ok(answers.bytes(room).get(..len).unwrap_or_default().to_vec())
}

/// Registered files and buffers, and completions that found no room.
fn registered(e: &mut StandstillIoUringEntry, info: &IoUring, process: &Process<'_>) -> Result<()> {
    e.files = info.user_files.filter(|&n| n > 0);
    e.buffers = info.user_bufs.filter(|&n| n > 0);
    for (slot, path) in &info.files {
        let ids = process.files(path);
        let &file_id = ids.iter().next().filter(|_| ids.len() == 1).ok_or_else(|| {
            let name = String::from_utf8_lossy(path);
            let what = if ids.is_empty() { "is open nowhere else" } else { "cannot be told from others" };
            Error::refused(
                format!("an io_uring whose registered file {slot} ({name}) {what}"),
                "let the program unregister it before the dump, or keep one descriptor of it",
            )
        })?;
        e.file.push(StandstillIoUringFile { slot: *slot, file_id });
    }
    for &(slot, address, length) in &info.bufs {
        if address == 0 || !process.has(address, length) {
            return Err(Error::refused(
                format!("an io_uring whose registered buffer {slot} ({address:x}, {length} bytes) is not mapped"),
                "let the program unregister it before the dump",
            ));
        }
        e.buffer.push(StandstillIoUringBuffer { slot, address, length });
    }
    for o in &info.cq_overflow {
        if o.flags != 0 || e.setup & setup::CQE32 != 0 {
            return Err(Error::refused(
                "an io_uring with completions of an unusual kind that found no room",
                "let the program take its completions before the dump",
            ));
        }
        e.overflow.push(StandstillIoUringOverflow { user_data: o.user_data, res: o.res });
    }
    let names_credentials = |sqe: &[u8]| sqe.get(42..44).is_some_and(|id| id != [0, 0]);
    if e.sqes.chunks(Shape::of(e).sqe_size()).any(names_credentials) {
        return Err(Error::refused(
            "an io_uring with registered credentials",
            "let the program do without IORING_REGISTER_PERSONALITY",
        ));
    }
    Ok(())
}

/// Which threads have registered descriptors of which rings.
fn users(rings: &mut [Ring], hosts: &mut [Infected<'_>], processes: &[Process<'_>], cx: &DumpFiles<'_>) -> Result<()> {
    for process in processes {
        let Some(host) = hosts.iter_mut().find(|h| h.pid() == process.pid) else { continue };
        let of_process = |ino: u64| {
            let holders = cx.io_uring.holders.get(&ino).into_iter().flatten();
            holders.filter(|h| h.0 == process.pid).map(|h| h.1).next()
        };
        let here: Vec<(usize, i32)> =
            rings.iter().enumerate().filter_map(|(n, ring)| Some((n, of_process(ring.ino)?))).collect();
        if here.is_empty() {
            continue;
        }
        let mut plans = Vec::new();
        let mut asked = Vec::new();
        for _ in host.threads() {
            let mut plan = Plan::new();
            let question = code::REGISTER_PROBE | code::USE_REGISTERED_RING;
            asked.push((0..SLOTS).map(|slot| ask(&mut plan, slot, question)).collect::<Vec<_>>());
            plans.push(plan);
        }
        host.start(plans)?;
        let answers = host.finish()?;
        for (thread, (asked, answers)) in asked.iter().zip(&answers).enumerate() {
            let (tid, id) = *process.threads.get(thread).ok_or(Error::Gone)?;
            for (slot, &at) in (0..SLOTS).zip(asked) {
                let [there, of_others] = [libc::EFAULT, libc::EEXIST].map(|e| answers.result(at) == -i64::from(e));
                if !there && !of_others {
                    continue;
                }
                let which = match here.as_slice() {
                    _ if of_others => None,
                    [(only, _)] => Some(*only),
                    many => which(host, thread, slot, many).task(tid)?,
                };
                let ring = which.and_then(|n| rings.get_mut(n)).ok_or_else(|| {
                    Error::refused(
                        format!("the registered descriptor {slot} of an io_uring that cannot be told from others"),
                        "let the thread unregister it before the dump (io_uring_unregister_ring_fd)",
                    )
                });
                ring.task(tid)?.entry.user.push(StandstillIoUringUser { tid: id, slot });
            }
        }
    }
    Ok(())
}

/// The ring that is in a slot of a thread: the one that has an eventfd while the slot's has got one.
fn which(host: &mut Infected<'_>, thread: usize, slot: u32, rings: &[(usize, i32)]) -> Result<Option<usize>> {
    const AT_ONCE: usize = 5;
    let has = |answers: &Answers, at| answers.result(at) == -i64::from(libc::EBUSY);
    let in_slot = |code: u32| code | code::USE_REGISTERED_RING;
    let mut plan = Plan::new();
    let at = ask(&mut plan, slot, in_slot(code::REGISTER_EVENTFD));
    // what is there is never touched: it would be gone
    let is_taken = has(&in_thread(host, thread, plan)?, at);
    let mut found = Vec::new();
    for some in rings.chunks(AT_ONCE) {
        let mut plan = Plan::new();
        let ask_all = |plan: &mut Plan| -> Vec<_> {
            some.iter().map(|&(_, fd)| ask(plan, fd.cast_unsigned(), code::REGISTER_EVENTFD)).collect()
        };
        let before = ask_all(&mut plan);
        let after = if is_taken {
            Vec::new()
        } else {
            let own = plan.call("eventfd", libc::SYS_eventfd2, &[0.into(), libc::O_CLOEXEC.into()]);
            let place = plan.bytes(&[0; 8]);
            plan.op(Code::Store, 0, &[place.into(), own.into()], Expect::Any, [0; 2], "eventfd");
            let set = [slot.into(), in_slot(code::REGISTER_EVENTFD).into(), place.into(), 1.into()];
            plan.ask("eventfd of an io_uring", libc::SYS_io_uring_register, &set);
            let after = ask_all(&mut plan);
            let unset = [slot.into(), in_slot(code::UNREGISTER_EVENTFD).into(), 0.into(), 0.into()];
            plan.always("eventfd of an io_uring", libc::SYS_io_uring_register, &unset);
            plan.always("eventfd", libc::SYS_close, &[own.into()]);
            after
        };
        let answers = in_thread(host, thread, plan)?;
        for (n, &(ring, _)) in some.iter().enumerate() {
            let had = has(&answers, before[n]);
            if after.get(n).map_or(had, |&after| !had && has(&answers, after)) {
                found.push(ring);
            }
        }
    }
    Ok(found.first().copied().filter(|_| found.len() == 1))
}
