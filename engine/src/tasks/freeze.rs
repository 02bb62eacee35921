//! Finding a process tree and stopping all of it, with PTRACE_SEIZE and PTRACE_INTERRUPT.
//!
//! A running task can make others, so the tree is scanned until two scans agree: after that, everyone who could make a
//! task is stopped. What was stopped and then found unfit is let go when the error drops it.
//!
//! A thread in vfork(2) stops only when its child has its own program or is gone, so that child must run on until then: it
//! is left alone as long as it has its parent's memory, and is caught by the next scan.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use crate::cgroups::freezer::Freezer;
use crate::error::{At, Call, Error, Result};
use crate::proc::simple::{self, SyscallState};
use crate::proc::{self, stat::Stat, status::TaskState};
use crate::sys::calls::{self, Kcmp};
use crate::sys::{memory, ptrace};
use crate::tracee::{Held, Stopped};

/// So many threads are not asked for their children while they run.
const MANY: usize = 16;

/// A task that ended and that its parent has not waited for.
#[derive(Debug, Clone)]
pub struct Dead {
    /// Its status as waitpid gives it.
    pub exit_code: i32,
}

/// A stopped process, or a zombie.
#[derive(Debug)]
pub struct Frozen {
    /// In our pid namespace.
    pub pid: i32,
    /// Its parent; 0 for the root.
    pub parent: i32,
    /// All threads, the group leader first; none for a zombie.
    pub threads: Vec<Stopped>,
    /// It is a zombie.
    pub dead: Option<Dead>,
    /// /proc/PID/stat.
    pub stat: Stat,
}

/// A process while the tree is being stopped.
#[derive(Debug)]
struct Seized {
    parent: i32,
    held: Vec<Held>,
    dead: Option<Dead>,
    children: Vec<i32>,
}

fn read_stat(pid: i32, buffer: &mut Vec<u8>) -> Result<Option<Stat>> {
    match proc::read_proc(format!("/proc/{pid}/stat").as_ref(), buffer) {
        Ok(()) => Ok(Some(proc::stat::parse(buffer)?)),
        Err(e) if matches!(e.raw_os_error(), libc::ENOENT | libc::ESRCH) => Ok(None),
        Err(e) => Err(e).call("read(/proc/PID/stat)"),
    }
}

/// The threads of a process, in ascending order; empty when it is gone.
pub(crate) fn threads_of(pid: i32) -> Vec<i32> {
    let mut tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    tids.sort_unstable();
    tids
}

/// The children of these threads of a process.
pub(crate) fn children_of(pid: i32, tids: &[i32], buffer: &mut Vec<u8>) -> Result<Vec<i32>> {
    let mut all = Vec::new();
    for tid in tids {
        if proc::read_proc(format!("/proc/{pid}/task/{tid}/children").as_ref(), buffer).is_ok() {
            all.extend(simple::children(buffer)?);
        }
    }
    Ok(all)
}

/// Stops the tree below `root`, itself included; in the order of a depth-first walk, a parent before its children.
/// `limit` of zero means no limit. With a freezer nobody runs while the tree is first scanned and seized.
pub fn freeze(root: i32, limit: Duration, mut freezer: Option<&mut Freezer<'_>>) -> Result<Vec<Frozen>> {
    let limit = if limit.is_zero() { Duration::from_secs(3600) } else { limit };
    let mut tree: BTreeMap<i32, Seized> = BTreeMap::new();
    let seized = seize_tree(root, limit, &mut tree, freezer.as_deref_mut());
    if let Err(e) = seized {
        // nobody who is frozen comes to a stop, which those who are let go have to
        if let Some(freezer) = freezer {
            let _ = freezer.thaw();
        }
        return Err(e);
    }
    let mut frozen = Vec::with_capacity(tree.len());
    collect(root, &mut tree, &mut frozen, &mut Vec::new(), limit)?;
    Ok(frozen)
}

fn seize_tree(
    root: i32,
    limit: Duration,
    tree: &mut BTreeMap<i32, Seized>,
    mut freezer: Option<&mut Freezer<'_>>,
) -> Result<()> {
    let began = Instant::now();
    let mut buffer = Vec::new();
    let Some(stat) = read_stat(root, &mut buffer).task(root)? else {
        return Err(Error::NoProcess { pid: root });
    };
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    if crate::tasks::release::is_descendant(own, root) {
        let what = format!("The criu itself is within dumped tree: process {root} started it, start it elsewhere");
        return Err(Error::Usage { what });
    }
    if stat.flags & 0x20_0000 != 0 {
        return Err(Error::refused("a kernel thread", "name a process")).task(root);
    }
    if let Some(process) = process_of(root, &mut buffer).filter(|&p| p != root) {
        let what = format!("{root} is a thread of process {process}: name the process");
        return Err(Error::Usage { what });
    }
    if let Some(freezer) = &mut freezer {
        freezer.freeze()?;
    }
    tree.insert(root, Seized { parent: 0, held: Vec::new(), dead: None, children: Vec::new() });
    let mut known: HashSet<i32> = HashSet::new();
    loop {
        let mut news = false;
        let mut queue = vec![root];
        let mut seen = HashSet::from([root]);
        while let Some(pid) = queue.pop() {
            let tids = threads_of(pid);
            let mut fresh = 0;
            for &tid in &tids {
                fresh += usize::from(seize(pid, tid, tree, &mut known, &mut buffer)?);
            }
            news |= fresh > 0;
            // each thread has children of its own: of many that may still make some, none is asked before they stand still
            let children = match tree.get(&pid) {
                Some(seized) if fresh > MANY => seized.children.clone(),
                _ => children_of(pid, &tids, &mut buffer).task(pid)?,
            };
            for &child in &children {
                if !tree.contains_key(&child) && is_awaited(pid, &tids, child, &mut buffer) {
                    news = true;
                } else if seen.insert(child) {
                    tree.entry(child).or_insert_with(|| {
                        news = true;
                        Seized { parent: pid, held: Vec::new(), dead: None, children: Vec::new() }
                    });
                    queue.push(child);
                }
            }
            if let Some(seized) = tree.get_mut(&pid) {
                if seized.children != children {
                    seized.children = children;
                    news = true;
                }
            }
        }
        // who is gone, or went to another parent, is no longer ours
        tree.retain(|pid, _| seen.contains(pid));
        if let Some(freezer) = freezer.take() {
            freezer.seize_others(|tid| known.contains(&tid))?;
            freezer.thaw()?;
        }
        if !news {
            return Ok(());
        }
        if began.elapsed() > limit {
            return Err(Error::Timeout { what: "the tree's coming to a standstill", seconds: limit.as_secs() });
        }
        for held in tree.values_mut().flat_map(|seized| &mut seized.held) {
            let settled = held.settle(limit.saturating_sub(began.elapsed()));
            settled.map_err(|e| in_kernel(e, limit)).task(held.tid())?;
        }
    }
}

/// Is `child` one that a thread of `pid` waits for in vfork(2), or clone(2) with CLONE_VFORK?
fn is_awaited(pid: i32, tids: &[i32], child: i32, buffer: &mut Vec<u8>) -> bool {
    const CLONE_VFORK: u64 = 0x4000;
    if !calls::same(pid, child, Kcmp::Vm).unwrap_or(false) {
        return false;
    }
    tids.iter().any(|tid| {
        if proc::read_proc(format!("/proc/{pid}/task/{tid}/syscall").as_ref(), buffer).is_err() {
            return false;
        }
        let Ok(SyscallState::InSyscall { number, arguments, .. }) = simple::syscall(buffer) else { return false };
        match number {
            libc::SYS_vfork => true,
            libc::SYS_clone => arguments[0] & CLONE_VFORK != 0,
            libc::SYS_clone3 => {
                let mut flags = [0; 8];
                let read = memory::read_remote(pid, arguments[0], &mut flags);
                read.is_ok_and(|n| n == 8 && u64::from_ne_bytes(flags) & CLONE_VFORK != 0)
            }
            _ => false,
        }
    })
}

/// Seizes one thread, unless it is ours already or dead; true when that is news.
fn seize(
    pid: i32,
    tid: i32,
    tree: &mut BTreeMap<i32, Seized>,
    known: &mut HashSet<i32>,
    buffer: &mut Vec<u8>,
) -> Result<bool> {
    if known.contains(&tid) {
        return Ok(false);
    }
    let Some(seized) = tree.get_mut(&pid) else { return Ok(false) };
    if tid != pid && is_kernels(pid, tid, buffer) {
        return Ok(false);
    }
    match Held::seize(tid, 0) {
        Ok(held) => {
            known.insert(tid);
            seized.held.push(held);
            Ok(true)
        }
        Err(e) => {
            let state = if tid == pid {
                read_stat(pid, buffer).task(pid)?
            } else {
                match proc::read_proc(format!("/proc/{pid}/task/{tid}/stat").as_ref(), buffer) {
                    Ok(()) => Some(proc::stat::parse(buffer).task(tid)?),
                    Err(_) => None,
                }
            };
            match state {
                None => Ok(false),
                Some(stat) if matches!(stat.state, TaskState::Zombie | TaskState::Dead) => {
                    if tid == pid {
                        let news = seized.dead.is_none();
                        seized.dead = Some(Dead { exit_code: stat.exit_code });
                        return Ok(news);
                    }
                    Ok(false)
                }
                Some(_) => {
                    if e.errno() == libc::EPERM {
                        if let Some(tracer) = tracer_of(tid) {
                            return Err(Error::refused(
                                format!("a task that process {tracer} traces"),
                                "detach the debugger first",
                            ))
                            .task(tid);
                        }
                    }
                    Err(e)
                }
            }
        }
    }
}

/// Is it a thread that the kernel has put into the process, to carry out requests of an io_uring or to poll for them? Such a
/// one has no code of the program, and a stop would end what it waits for. Its name does not tell: it has that of the thread
/// that made it until it runs for the first time.
pub(crate) fn is_kernels(pid: i32, tid: i32, buffer: &mut Vec<u8>) -> bool {
    const PF_IO_WORKER: u64 = 0x10;
    proc::read_proc(format!("/proc/{pid}/task/{tid}/stat").as_ref(), buffer).is_ok()
        && proc::stat::parse(buffer).is_ok_and(|stat| stat.flags & PF_IO_WORKER != 0)
}

/// A task that does not stop in time, in words for people.
fn in_kernel(error: Error, limit: Duration) -> Error {
    let what = "its stop (it is in a system call that no signal interrupts: a dead file server, a child of vfork)";
    match error {
        Error::Timeout { .. } => Error::Timeout { what, seconds: limit.as_secs() },
        error => error,
    }
}

/// The process that a thread is of.
fn process_of(tid: i32, buffer: &mut Vec<u8>) -> Option<i32> {
    proc::read_proc(format!("/proc/{tid}/status").as_ref(), buffer).ok()?;
    proc::status::parse(buffer).ok().map(|s| s.tgid)
}

fn tracer_of(tid: i32) -> Option<i32> {
    let mut buffer = Vec::new();
    proc::read_proc(format!("/proc/{tid}/status").as_ref(), &mut buffer).ok()?;
    proc::status::parse(&buffer).ok().map(|s| s.tracer_pid).filter(|&t| t != 0)
}

fn collect(
    pid: i32,
    tree: &mut BTreeMap<i32, Seized>,
    out: &mut Vec<Frozen>,
    buffer: &mut Vec<u8>,
    limit: Duration,
) -> Result<()> {
    let mut stack = vec![pid];
    while let Some(pid) = stack.pop() {
        let Some(seized) = tree.remove(&pid) else { continue };
        let stat = read_stat(pid, buffer).task(pid)?.ok_or(Error::Gone).task(pid)?;
        if seized.dead.is_some() && !seized.held.is_empty() {
            return Err(Error::refused(
                "a process whose first thread has ended while others run",
                "end the remaining threads, or keep the main thread alive in the program",
            ))
            .task(pid);
        }
        if seized.dead.is_some() && out.is_empty() {
            return Err(Error::refused("a root task that is dead", "name a living process")).task(pid);
        }
        let mut threads = Vec::with_capacity(seized.held.len());
        let mut held: Vec<Held> = seized.held;
        held.sort_by_key(|h| (h.tid() != pid, h.tid()));
        let mut gone = false;
        for h in held {
            let tid = h.tid();
            match h.wait(limit) {
                Ok(t) => threads.push(t),
                // a thread that was on its way out when it was seized
                Err(_) if tid != pid && !ptrace::exists(tid) => {}
                Err(_) if !ptrace::exists(pid) => gone = true,
                Err(e) => return Err(e),
            }
        }
        let dead = if gone { Some(Dead { exit_code: stat.exit_code }) } else { seized.dead };
        if dead.is_none() && threads.first().map(Stopped::tid) != Some(pid) {
            return Err(Error::Gone).task(pid);
        }
        stack.extend(seized.children.iter().rev());
        out.push(Frozen { pid, parent: seized.parent, threads, dead, stat });
    }
    Ok(())
}
