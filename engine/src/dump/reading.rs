//! What is learned of stopped tasks before anything is put into them.

use rayon::prelude::*;

use super::{Alive, Kind, Task, Workers};
use crate::error::{At, Error, Result};
use crate::memory;
use crate::options::{Options, Persona};
use crate::proc::maps::{Vma, VmaName};
use crate::proc::status::Status;
use crate::sys::memory as remote;
use crate::sys::ptrace;
use crate::tasks::facts::{self, Facts};
use crate::tasks::{flags, freeze, leftovers, seccomp};
use crate::tracee::Stopped;

/// Filters are held off while the executor runs. The result is what /proc says of each thread.
pub(crate) fn suspend_seccomp_and_settle(
    opts: &Options,
    threads: &mut [Vec<Stopped>],
    workers: &Workers,
) -> Result<Vec<Vec<Status>>> {
    let tids: Vec<i32> = threads.iter().flatten().map(Stopped::tid).collect();
    let mut statuses = workers.install(|| facts::statuses(&tids))?.into_iter();
    let mut all = Vec::with_capacity(threads.len());
    for task in threads {
        let of_task: Vec<Status> = statuses.by_ref().take(task.len()).collect();
        for (thread, status) in task.iter_mut().zip(&of_task) {
            let tid = thread.tid();
            if status.seccomp.unwrap_or(0) != 0 {
                ptrace::set_options(tid, ptrace::SYSGOOD | ptrace::SUSPEND_SECCOMP).task(tid)?;
            }
            let trap = 1u64 << (libc::SIGTRAP - 1);
            if opts.personality == Persona::Criu && (status.sig_pending | status.shared_pending) & trap != 0 {
                return Err(Error::Usage { what: format!("Can't dump the {tid} thread with a pending SIGTRAP.") });
            }
            leave_sequence(thread).task(tid)?;
        }
        all.push(of_task);
    }
    Ok(all)
}

/// A thread inside a restartable sequence is moved to its abort handler, as a preemption would have done.
fn leave_sequence(thread: &mut Stopped) -> Result<()> {
    let rseq = thread.rseq;
    if rseq.address == 0 {
        return Ok(());
    }
    let mut pointer = [0u8; 8];
    if remote::read_remote(thread.tid(), rseq.address + 8, &mut pointer)? != 8 || pointer == [0; 8] {
        return Ok(());
    }
    let mut cs = [0u8; 32];
    if remote::read_remote(thread.tid(), u64::from_le_bytes(pointer), &mut cs).ok() != Some(32) {
        return Ok(());
    }
    let word = |n: usize| cs.get(n..n + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    thread.abort_sequence(word(8), word(16), word(24));
    Ok(())
}

pub(super) type Head = (i32, i32, Option<freeze::Dead>, crate::proc::stat::Stat);

/// Reads /proc of all tasks, side by side. Flags of areas that were read ahead are not read again.
pub(super) fn read(
    heads: &[Head],
    threads: &[Vec<Stopped>],
    statuses: Vec<Vec<Status>>,
    ahead: Option<&flags::Ahead>,
    workers: &Workers,
) -> Result<Vec<Task>> {
    let one = |(head, statuses): (&Head, Vec<Status>)| {
        if head.2.is_some() {
            Ok(None)
        } else {
            let areas = ahead.map(|flags| flags.of(head.0, head.3.starttime)).transpose()?.flatten();
            Facts::read(head.0, statuses, areas).map(Some)
        }
    };
    let facts: Vec<Option<Facts>> = if heads.len() == 1 {
        heads.iter().zip(statuses).map(one).collect::<Result<_>>()?
    } else {
        workers.install(|| heads.par_iter().zip(statuses).map(one).collect::<Result<_>>())?
    };
    let mut tasks = Vec::with_capacity(heads.len());
    for ((head, facts), threads) in heads.iter().zip(facts).zip(threads) {
        let (pid, parent, dead, stat) = head.clone();
        let kind = match (dead, facts) {
            (Some(dead), _) => Kind::Dead(dead.exit_code),
            (None, Some(facts)) => {
                let mut chains = Vec::new();
                for (thread, f) in threads.iter().zip(&facts.threads) {
                    let filtered = f.status.seccomp == Some(seccomp::FILTER as u32);
                    chains.push(if filtered { seccomp::read(thread.tid()).task(thread.tid())? } else { Vec::new() });
                }
                leftovers::check_areas(&facts.areas, threads).task(pid)?;
                let vdso = read_vdso(pid, &facts.areas, threads).task(pid)?;
                Kind::Alive(Box::new(Alive {
                    facts,
                    ids: Default::default(),
                    mm: Default::default(),
                    fs: Default::default(),
                    vdso,
                    chains,
                    cgroups: Vec::new(),
                }))
            }
            (None, None) => return Err(Error::Gone).task(pid),
        };
        tasks.push(Task { pid, parent, stat, kind });
    }
    Ok(tasks)
}

/// The vdso of a task, as the kernel made it: what an engine that was killed left in its zero tail is not part of it.
pub(crate) fn read_vdso(pid: i32, areas: &[Vma], threads: &[Stopped]) -> Result<Option<(u64, Vec<u8>)>> {
    let Some(area) = areas.iter().find(|a| a.name() == VmaName::Vdso) else { return Ok(None) };
    let mut bytes = vec![0; usize::try_from(area.size()).unwrap_or(0)];
    if remote::read_remote(pid, area.start, &mut bytes)? != bytes.len() {
        return Err(Error::Gone);
    }
    let own = memory::vdso::own()?;
    let used = own.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    if bytes.len() == own.len() && bytes[..used] == own[..used] && bytes[used..] != own[used..] {
        let tail = area.start + used as u64..area.end;
        for thread in threads {
            leftovers::none_in(thread, &tail)?;
        }
        bytes[used..].fill(0);
    }
    Ok(Some((area.start, bytes)))
}

/// The last page of each piece of code that is mapped from a file: linkers fill them up with zeros.
pub(crate) fn code_ends(pid: i32, areas: &[Vma]) -> Vec<(u64, Vec<u8>)> {
    let code = areas.iter().filter(|a| a.exec && a.read && !a.shared && matches!(a.name(), VmaName::File(_)));
    code.filter_map(|a| {
        let mut page = vec![0; memory::PAGE as usize];
        let at = a.end - memory::PAGE;
        (remote::read_remote(pid, at, &mut page).ok()? == page.len()).then_some((at, page))
    })
    .collect()
}
