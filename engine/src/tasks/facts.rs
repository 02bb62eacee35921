//! What /proc says of a stopped process: read from outside, in parallel, before anything is put into it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rayon::prelude::*;

use crate::error::{At, Call, Error, Place, Result};
use crate::files::{io_uring, Descriptor};
use crate::proc::{self, limits::Limit, maps::Vma, status::Status, timers::PosixTimer};
use crate::sys::calls;

/// A thread, by its own files.
#[derive(Debug)]
pub struct ThreadFacts {
    /// /proc/PID/task/TID/status.
    pub status: Status,
    /// Its name, whole.
    pub comm: Vec<u8>,
    /// Nice value, policy and real-time priority.
    pub sched: (i32, u32, u32),
    /// Head and length of its robust futex list.
    pub robust: (u64, u64),
}

/// A process.
#[derive(Debug)]
pub struct Facts {
    /// In our pid namespace.
    pub pid: i32,
    /// Keeps the pid from being used again.
    pub pidfd: OwnedFd,
    /// Threads, leader first.
    pub threads: Vec<ThreadFacts>,
    /// Memory areas, in order.
    pub areas: Vec<Vma>,
    /// Open descriptors, in order of number.
    pub descriptors: Vec<Descriptor>,
    /// Resource limits by number.
    pub limits: Vec<Limit>,
    /// Auxiliary vector, as words.
    pub auxv: Vec<u64>,
    /// POSIX timers.
    pub timers: Vec<PosixTimer>,
    /// Execution domain flags (personality(2)).
    pub personality: u32,
    /// Adjustment of the out-of-memory score.
    pub oom_score_adj: i32,
    /// Login uid; `None` where the kernel keeps none.
    pub loginuid: Option<u32>,
}

impl Facts {
    /// The leader's status.
    pub fn status(&self) -> &Status {
        &self.threads[0].status
    }

    /// Reads everything that `statuses` do not say; these are of all threads, leader first. `areas` are the process's, with
    /// their flags, if someone knows them.
    pub fn read(pid: i32, statuses: Vec<Status>, areas: Option<Vec<Vma>>) -> Result<Facts> {
        Facts::read_here(pid, statuses, areas).task(pid)
    }

    fn read_here(pid: i32, statuses: Vec<Status>, areas: Option<Vec<Vma>>) -> Result<Facts> {
        let mut buf = Vec::with_capacity(64 << 10);
        let pidfd = calls::pidfd_open(pid, 0)?;
        let mut threads = Vec::with_capacity(statuses.len());
        for status in statuses {
            let tid = status.pid;
            threads.push(thread(tid, status).task(tid)?);
        }
        if threads.is_empty() {
            return Err(Error::Gone);
        }
        let file = |name: &str, buf: &mut Vec<u8>| {
            proc::read_proc(format!("/proc/{pid}/{name}").as_ref(), buf)
                .call("read")
                .at(Place::Path(format!("/proc/{pid}/{name}").into()))
        };
        let areas = match areas {
            Some(areas) => areas,
            None => self::areas(pid).at(Place::Path(format!("/proc/{pid}/smaps").into()))?,
        };
        file("limits", &mut buf)?;
        let limits = proc::limits::parse(&buf)?.to_vec();
        file("auxv", &mut buf)?;
        let auxv = proc::auxv::parse(&buf)?.words();
        file("timers", &mut buf)?;
        let timers = proc::timers::parse(&buf)?;
        file("personality", &mut buf)?;
        let personality = proc::simple::hex("/proc/PID/personality", &buf)?;
        file("oom_score_adj", &mut buf)?;
        let oom_score_adj = proc::simple::signed("/proc/PID/oom_score_adj", &buf)?;
        let loginuid = match file("loginuid", &mut buf) {
            Ok(()) => Some(proc::simple::loginuid(&buf)?.unwrap_or(u32::MAX)),
            Err(e) if e.errno() == libc::ENOENT => None,
            Err(e) => return Err(e),
        };
        let mut descriptors = descriptors(pid, pidfd.as_fd())?;
        if descriptors.iter().any(|d| d.link == io_uring::LINK) || areas.iter().any(io_uring::is_ring) {
            descriptors = io_uring::settled(pid, descriptors, || self::descriptors(pid, pidfd.as_fd()))?;
        }
        Ok(Facts {
            pid,
            pidfd,
            threads,
            areas,
            descriptors,
            limits,
            auxv,
            timers,
            personality,
            oom_score_adj,
            loginuid,
        })
    }
}

/// All descriptors of a task, in order of number.
pub fn descriptors(pid: i32, pidfd: BorrowedFd<'_>) -> Result<Vec<Descriptor>> {
    let mut numbers: Vec<i32> = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).call("open(/proc/PID/fd)")? {
        let entry = entry.call("getdents(/proc/PID/fd)")?;
        numbers.extend(entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    let mut buffer = Vec::with_capacity(1024);
    numbers.into_iter().map(|fd| Descriptor::read(pid, pidfd, fd, &mut buffer).at(Place::Fd(fd))).collect()
}

/// Memory areas, from /proc/PID/smaps. Of many areas the text is long, and the kernel takes its time for each of them: what is
/// there is parsed while the next part is made.
fn areas(pid: i32) -> Result<Vec<Vma>> {
    const LONG: usize = 1 << 20;
    const PIECE: usize = 256 << 10;
    let file = File::open(format!("/proc/{pid}/smaps")).call("open")?;
    let mut text = Vec::with_capacity(64 << 10);
    let more = read_more(&file, &mut text, LONG)?;
    if !more {
        return Ok(proc::maps::parse(&text)?);
    }
    std::thread::scope(|scope| {
        let (pieces, to_parse) = std::sync::mpsc::sync_channel::<Vec<u8>>(4);
        let parser = scope.spawn(move || -> Result<Vec<Vma>> {
            let mut areas = Vec::new();
            for piece in to_parse {
                proc::maps::parse_each(&piece, |area| areas.push(area))?;
            }
            Ok(areas)
        });
        let mut more = more;
        while more {
            let rest = text.split_off(proc::maps::whole_areas(&text));
            // a parser that found an error takes no more, and says so below
            if pieces.send(std::mem::replace(&mut text, rest)).is_err() {
                break;
            }
            text.reserve(PIECE + text.len());
            more = read_more(&file, &mut text, PIECE)?;
        }
        let _ = pieces.send(text);
        drop(pieces);
        parser.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Reads at least `bytes` more bytes; false at the end.
fn read_more(file: &File, text: &mut Vec<u8>, bytes: usize) -> Result<bool> {
    let enough = text.len() + bytes;
    while text.len() < enough {
        if text.capacity() - text.len() < 4096 {
            text.reserve(text.capacity().clamp(16 << 10, 1 << 20));
        }
        match rustix::io::read(file, rustix::buffer::spare_capacity(text)) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).call("read"),
        }
    }
    Ok(true)
}

/// What /proc/TID/status says of each thread: of many, read side by side.
pub fn statuses(tids: &[i32]) -> Result<Vec<Status>> {
    const MANY: usize = 64;
    let one = |buf: &mut Vec<u8>, &tid: &i32| -> Result<Status> {
        proc::read_proc(format!("/proc/{tid}/status").as_ref(), buf).map_err(|_| Error::Gone).task(tid)?;
        proc::status::parse(buf).map_err(Error::from).task(tid)
    };
    if tids.len() < MANY {
        let mut buf = Vec::new();
        return tids.iter().map(|tid| one(&mut buf, tid)).collect();
    }
    tids.par_iter().with_min_len(MANY / 4).map_init(Vec::new, one).collect()
}

fn thread(tid: i32, status: Status) -> Result<ThreadFacts> {
    let robust = calls::robust_list(tid)?;
    let sched = calls::scheduling(tid)?;
    let comm = status.name.clone();
    Ok(ThreadFacts { status, comm, sched, robust })
}
