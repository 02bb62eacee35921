//! Entries of images that several kinds of resources have a part in.

use standstill_images::proto::{
    CoreEntry, FdinfoEntry, FsEntry, InventoryEntry, MmEntry, PluginsEntry, PstreeEntry, TaskKobjIdsEntry, TimensEntry,
    Timespec,
};
use standstill_images::{ImageKind, Images};

use super::{living, Kind, Task};
use crate::error::{At, Error, Place, Result};
use crate::files::{fsnotify, io_uring, locks, DumpFiles};
use crate::memory;
use crate::options::Options;
use crate::sockets::packet;
use crate::tasks::pids::Inner;
use crate::tasks::{ids, seccomp};
use crate::tracee::Infected;

/// Descriptors, areas, exe, root and working folder, in CRIU's order of ids: areas first.
pub(super) fn dump_files(tasks: &mut [Task], files: &mut DumpFiles<'_>) -> Result<Vec<(u32, Vec<FdinfoEntry>)>> {
    let mut all: Vec<(u32, Vec<FdinfoEntry>)> = Vec::new();
    for task in &*tasks {
        let Kind::Alive(alive) = &task.kind else { continue };
        memory::sysv::reserve(&alive.facts.areas, files);
        locks::note(&alive.facts.descriptors, files);
        io_uring::note(&alive.facts.descriptors, files);
    }
    let mut known = memory::areas::Known::default();
    for task in tasks {
        let Kind::Alive(alive) = &mut task.kind else { continue };
        let (pid, facts) = (task.pid, &alive.facts);
        memory::aio::wait_for_requests(&facts.areas, &facts.descriptors);
        let vmas = memory::areas::entries(pid, &facts.areas, &mut known, files).task(pid)?;
        if !all.iter().any(|(id, _)| *id == alive.ids.files_id) {
            let own = ns_pid(pid, Some(facts.status()))?;
            let mut entries = Vec::with_capacity(facts.descriptors.len());
            for d in &facts.descriptors {
                let entry = files.descriptor(d).at(Place::Fd(d.fd)).task(pid)?;
                locks::dump(d, entry.id, own, files).at(Place::Fd(d.fd)).task(pid)?;
                entries.push(entry);
            }
            all.push((alive.ids.files_id, entries));
        }
        let exe = files.link(pid, "exe").task(pid)?;
        alive.fs = FsEntry {
            cwd_id: files.link(pid, "cwd").task(pid)?,
            root_id: files.link(pid, "root").task(pid)?,
            umask: facts.status().umask,
        };
        let s = &task.stat;
        alive.mm = MmEntry {
            mm_start_code: s.startcode,
            mm_end_code: s.endcode,
            mm_start_data: s.start_data,
            mm_end_data: s.end_data,
            mm_start_stack: s.startstack,
            mm_start_brk: s.start_brk,
            mm_brk: s.start_brk,
            mm_arg_start: s.arg_start,
            mm_arg_end: s.arg_end,
            mm_env_start: s.env_start,
            mm_env_end: s.env_end,
            exe_file_id: exe,
            // CRIU has room for 44 words
            mm_saved_auxv: facts.auxv.iter().take(44).copied().collect(),
            aios: vmas.iter().filter_map(memory::aio::entry).collect(),
            vmas,
            ..Default::default()
        };
    }
    fsnotify::check(files)?;
    packet::check_rings(files)?;
    io_uring::check(files)?;
    Ok(all)
}

/// Asks tasks about their rings, and waits for requests that are under way.
pub(super) fn complete_rings(
    tasks: &[Task],
    tables: &[(u32, Vec<FdinfoEntry>)],
    hosts: &mut [Infected<'_>],
    files: &mut DumpFiles<'_>,
) -> Result<()> {
    if files.io_uring.is_empty() {
        return Ok(());
    }
    let mut processes = Vec::with_capacity(tasks.len());
    for (task, alive) in living(tasks) {
        let facts = &alive.facts;
        let id = |status: &crate::proc::status::Status| Ok((status.pid, ns_pid(status.pid, Some(status))?));
        processes.push(io_uring::Process {
            pid: task.pid,
            threads: facts.threads.iter().map(|t| id(&t.status)).collect::<Result<_>>()?,
            descriptors: &facts.descriptors,
            entries: tables.iter().find(|(id, _)| *id == alive.ids.files_id).map_or(&[][..], |t| &t.1),
            areas: &facts.areas,
            pinned: facts.status().pins(),
        });
    }
    io_uring::complete(hosts, &processes, files)
}

pub(super) fn set_filter(entry: &mut CoreEntry, last: Option<u32>, chains: &[seccomp::Chain]) {
    let Some(core) = &mut entry.thread_core else { return };
    if core.seccomp_mode == Some(seccomp::FILTER) {
        core.seccomp_filter = last;
        // the leader's filters are synchronized to this thread
        if last.is_none() && chains.len() > 1 {
            core.seccomp_mode = None;
        }
    }
}

/// The id in the innermost pid namespace of the task.
pub(crate) fn ns_pid(pid: i32, status: Option<&crate::proc::status::Status>) -> Result<u32> {
    let id = status.and_then(|s| s.ns_pid.last().copied()).unwrap_or(pid);
    u32::try_from(id).map_err(|_| Error::Gone)
}

pub(super) fn pstree_entry(
    stat: &crate::proc::stat::Stat,
    pid: i32,
    parent: i32,
    threads: &[crate::tasks::facts::ThreadFacts],
    pids: &Inner,
) -> PstreeEntry {
    let mut tids: Vec<u32> = threads.iter().map(|t| pids.unsigned(t.status.pid)).collect();
    if tids.is_empty() {
        tids.push(pids.unsigned(pid));
    }
    PstreeEntry {
        pid: pids.unsigned(pid),
        ppid: if parent == 0 { 0 } else { pids.unsigned(parent) },
        pgid: pids.unsigned(stat.pgrp),
        sid: pids.unsigned(stat.session),
        threads: tids,
    }
}

/// The clocks that the restored tasks go on from.
pub(super) fn write_clocks(
    images: &Images,
    own: Option<u32>,
    numbers: &ids::Ids,
    clocks: Option<((u64, u64), (u64, u64))>,
) -> Result<()> {
    let Some((monotonic, boottime)) = clocks else { return Ok(()) };
    let id = if own == numbers.root.time_ns_id { 0 } else { own.unwrap_or(0) };
    let time = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    images.write_one(ImageKind::Timens, id, &TimensEntry { monotonic: time(monotonic), boottime: time(boottime) })?;
    Ok(())
}

pub(super) fn inventory(opts: &Options, root_ids: TaskKobjIdsEntry, network_lock: u32, run: &str) -> InventoryEntry {
    InventoryEntry {
        // 3: pages may be packed
        img_version: if opts.compress { 3 } else { 2 },
        compress: opts.compress.then_some(1),
        fdinfo_per_id: Some(true),
        root_ids: Some(root_ids),
        ns_per_id: Some(true),
        root_cg_set: Some(1),
        lsmtype: Some(0),
        tcp_close: opts.tcp_close.then_some(true),
        network_lock_method: Some(network_lock),
        plugins_entry: Some(PluginsEntry::default()),
        dump_criu_run_id: Some(run.as_bytes().to_vec()),
        ..Default::default()
    }
}

/// A name that no other dump has.
pub(crate) fn run_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid").map(|s| s.trim().to_owned()).unwrap_or_default()
}
