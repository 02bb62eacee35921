//! The phases of a dump, in their order: each is a call, none is a system call.
//!
//! find and freeze → read /proc → sort files and areas (what cannot be carried is refused here, before anything is
//! changed) → put the executor in → ask → write metadata while pages are copied → inventory last → take the executor out
//! → kill, stop or let go.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use standstill_images::proto::{
    CoreEntry, FdinfoEntry, FsEntry, InventoryEntry, MmEntry, PluginsEntry, PstreeEntry, SeccompEntry, SeccompFilter,
    TaskKobjIdsEntry, TimensEntry, Timespec, VmaEntry,
};
use standstill_images::{FolderStore, ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::files::{locks, memfd, DumpFiles};
use crate::guard::{Choice, Guard};
use crate::memory::track::{self, Tracking};
use crate::memory::{self, dedup, drain, Writing};
use crate::options::{FinalState, Options, Persona};
use crate::plan::Plan;
use crate::proc::maps::{VmFlags, Vma, VmaName};
use crate::proc::status::Status;
use crate::progress::Verb;
use crate::sockets::netlock::{self, Lock};
use crate::stages::{Stage, Stages};
use crate::stats::Phases;
use crate::sys::futex::RobustList;
use crate::sys::interrupt;
use crate::sys::memory as remote;
use crate::sys::ptrace;
use crate::tasks::facts::{self, Facts};
use crate::tasks::{core, finish, freeze, ids, leftovers, seccomp};
use crate::tracee::{Answers, Infected, Stopped};

/// What a dump did.
#[derive(Debug, Clone, Copy, Default)]
pub struct DumpReport {
    /// How long the tree stood still.
    pub frozen: Duration,
    /// How long it all took.
    pub total: Duration,
    /// Pages of memory written.
    pub pages: u64,
    /// Pages that have not changed since the parent checkpoint, which has them.
    pub in_parent: u64,
    /// Pages of shared memory written.
    pub shared_pages: u64,
    /// Processes dumped.
    pub tasks: usize,
}

/// So many threads are worth being written side by side.
const MANY_THREADS: usize = 64;

/// One process on its way into images.
#[derive(Debug)]
struct Task {
    pid: i32,
    parent: i32,
    stat: crate::proc::stat::Stat,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Dead(i32),
    Alive(Box<Alive>),
}

#[derive(Debug)]
struct Alive {
    facts: Facts,
    ids: TaskKobjIdsEntry,
    mm: MmEntry,
    fs: FsEntry,
    vdso: Option<(u64, Vec<u8>)>,
    chains: Vec<seccomp::Chain>,
}

/// Dumps the tree below `opts.pid` into `opts.images_dir`. Whatever happens, the tree goes on, unless it was to be killed
/// and the checkpoint is complete.
pub fn run(opts: &Options) -> Result<DumpReport> {
    run_with(opts, &Stages::new(opts, None))
}

/// The same, and tells others of its stages.
pub fn run_with(opts: &Options, stages: &Stages<'_>) -> Result<DumpReport> {
    opts.refuse_unsupported().map_err(|e| Error::Usage { what: e.to_string() })?;
    let root = opts.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
    let images = open_images(opts)?;
    with_own_thread(|| dump(opts, stages, root, &images))
}

/// The folder that images go to, linked to the checkpoint that they build on.
pub(crate) fn open_images(opts: &Options) -> Result<Images> {
    let folder = FolderStore::open(&opts.images_dir)?;
    if let Some(parent) = &opts.prev_images_dir {
        // an absolute path stays one when it is joined
        let there = rustix::fs::stat(opts.images_dir.join(parent)).map(|s| (s.st_dev, s.st_ino)).ok();
        let here = rustix::fs::fstat(&folder).call("fstat")?;
        if there == Some((here.st_dev, here.st_ino)) {
            return Err(Error::Usage {
                what: "a checkpoint cannot build on itself: --prev-images-dir is the image folder".into(),
            });
        }
    }
    folder.set_parent(opts.prev_images_dir.as_deref())?;
    let images = Images::new(folder);
    if let (Some(parent), None) = (&opts.prev_images_dir, images.parent()?) {
        let what = format!("there is no checkpoint to build on: {} (seen from the image folder)", parent.display());
        return Err(Error::Usage { what });
    }
    Ok(images)
}

/// Runs `work` in a thread of its own: all of ptrace belongs to one thread, which outlives its tracees.
pub(crate) fn with_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // SIGINT and the like end a dump in order, where that can be seen to; the threads that we start have them blocked, too
    let _interrupts = interrupt::Watch::new()?;
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn dump(opts: &Options, stages: &Stages<'_>, root: i32, images: &Images) -> Result<DumpReport> {
    let mut phases = Phases::start(Verb::Dump, opts)?;
    stages.reach(Stage::PreDump, Some(root))?;
    let workers = Workers::new(opts)?;
    remove_old_images(images)?;
    let robust = RobustList::new()?;
    let guard = Guard::new(&robust);
    let frozen = freeze::freeze(root, Duration::from_secs(u64::from(opts.timeout)))?;
    phases.mark("freezing");
    interrupt::check()?;
    let frozen_at = Instant::now();
    tracing::info!("{} tasks stand still", frozen.len());
    let more = opts.with_external(&stages.external_files()?).map_err(|e| Error::Usage { what: e.to_string() })?;
    let opts = &more;

    let mut threads: Vec<Vec<Stopped>> = Vec::with_capacity(frozen.len());
    let mut heads = Vec::with_capacity(frozen.len());
    for f in frozen {
        heads.push((f.pid, f.parent, f.dead, f.stat));
        threads.push(f.threads);
    }
    let statuses = suspend_seccomp_and_settle(opts, &mut threads, &workers)?;
    let mut tasks = read(&heads, &threads, statuses, &workers)?;
    check_session(opts, &tasks)?;
    let mut numbers = ids::Ids::new()?;
    give_ids(&mut tasks, &mut numbers)?;
    refuse_gpus(&tasks)?;
    refuse_locks(opts, &tasks)?;
    let run = run_id();
    let tracked = is_tracked(root, &tasks)?;
    let mut tracking = begin_tracking(opts, root, heads.first().map(|h| &h.3), images)?;
    // what `files` undoes when it is dropped must be undone before any of these goes on
    let mut infected = Vec::with_capacity(tasks.len());
    let mut files =
        DumpFiles::new(opts, images, heads.iter().map(|h| h.0).collect(), numbers.root.net_ns_id.unwrap_or(0));
    files.memory_is_tracked = tracked;
    files.guard = Some(&guard);
    files.lock = Lock::new(opts.network_lock, &run);
    let fdinfos = dump_files(&mut tasks, &mut files)?;
    phases.mark("reading");
    interrupt::check()?;

    // from here on tasks are changed, and put right again when `infected` is dropped
    let mut asked = Vec::with_capacity(tasks.len());
    for (task, stopped) in tasks.iter().zip(threads) {
        let Kind::Alive(alive) = &task.kind else { continue };
        let other = if alive.vdso.is_some() { Vec::new() } else { code_ends(task.pid, &alive.facts.areas) };
        let codes: Vec<(u64, &[u8])> =
            alive.vdso.iter().chain(&other).map(|(at, bytes)| (*at, bytes.as_slice())).collect();
        let mut host = Infected::infect(stopped, &codes, &robust)?;
        let mut plans = Vec::with_capacity(host.threads().len());
        let mut in_task = None;
        let mut in_threads = Vec::new();
        for i in 0..host.threads().len() {
            let mut plan = Plan::new();
            in_threads.push(core::ask_thread(&mut plan));
            if i == 0 {
                host.name_area(&mut plan);
                leftovers::remove(&alive.facts.areas, &mut plan);
                in_task = Some(core::ask_task(&alive.facts, &mut plan));
            }
            plans.push(plan);
        }
        host.start(plans).task(task.pid)?;
        infected.push(host);
        asked.push((in_task.ok_or(Error::Gone)?, in_threads));
    }
    phases.mark("infecting");
    let mut answers: Vec<Vec<Answers>> = Vec::with_capacity(infected.len());
    for host in &mut infected {
        answers.push(host.finish()?);
        let stat = tasks.iter().find(|t| t.pid == host.pid()).map(|t| &t.stat);
        if let (Some(tracking), Some(stat)) = (&mut tracking, stat) {
            if tracking.needs_watch(host.pid(), stat) {
                tracking.watch(host, stat)?;
            }
        }
        // after the timers were asked: one that is over by now has left a signal, and one of the two is in the images
        host.read_signals()?;
    }
    phases.mark("asking");
    interrupt::check()?;

    let time_ns = tasks.iter().find_map(|t| match &t.kind {
        Kind::Alive(a) => a.ids.time_ns_id,
        Kind::Dead(_) => None,
    });
    let mut filters: Vec<SeccompFilter> = Vec::new();
    let mut written = Written::default();
    let mut planned = plan_memory(&mut tasks, &infected, &workers, tracking.as_mut())?.into_iter();
    let mut live = infected.iter().zip(&asked).zip(&answers);
    let mut drains = Vec::new();
    for task in &mut tasks {
        match &mut task.kind {
            Kind::Dead(code) => {
                let pid = ns_pid(task.pid, None)?;
                images.write_one(ImageKind::Core, pid, &core::dead_entry(*code, &task.stat))?;
                written.pstree.push(pstree_entry(&task.stat, task.pid, task.parent, &[], None));
            }
            Kind::Alive(alive) => {
                let ((host, (in_task, in_threads)), answers) = live.next().ok_or(Error::Gone)?;
                let more = core::more(in_task, answers.first().ok_or(Error::Gone)?);
                written.clocks.get_or_insert((more.monotonic, more.boottime));
                alive.mm.mm_brk = more.brk;
                alive.mm.dumpable = Some(more.dumpable);
                alive.mm.thp_disabled = Some(more.thp_disabled);
                let last_filters = seccomp::add(&alive.chains, &mut filters);
                let stopped = host.threads();
                let write_core = |i: usize| -> Result<()> {
                    let (thread, facts) = (&stopped[i], &alive.facts.threads[i]);
                    let mut entry = core::thread_entry(thread, facts, &in_threads[i], &answers[i], i == 0)?;
                    set_filter(&mut entry, last_filters.get(i).copied().flatten(), &alive.chains);
                    if i == 0 {
                        entry.tc = Some(
                            core::task_entry(thread, &alive.facts, in_task, &answers[0], task.stat.flags)
                                .task(task.pid)?,
                        );
                    }
                    Ok(images.write_one(ImageKind::Core, ns_pid(thread.tid(), Some(&facts.status))?, &entry)?)
                };
                if stopped.len() < MANY_THREADS {
                    (0..stopped.len()).try_for_each(write_core)?;
                } else {
                    let all = (0..stopped.len()).into_par_iter().with_min_len(MANY_THREADS / 4);
                    workers.install(|| all.try_for_each(write_core))?;
                }
                let pid = ns_pid(task.pid, Some(alive.facts.status()))?;
                let drain = planned.next().ok_or(Error::Gone)?;
                images.write_one(ImageKind::Mm, pid, &alive.mm)?;
                images.write_one(ImageKind::Fs, pid, &alive.fs)?;
                images.write_one(ImageKind::Ids, pid, &alive.ids)?;
                drains.push((drain, pid, files.next_pages_id(), alive.vdso.as_ref()));
                written.pstree.push(pstree_entry(
                    &task.stat,
                    task.pid,
                    task.parent,
                    &alive.facts.threads,
                    Some(&alive.facts),
                ));
            }
        }
    }
    for (files_id, entries) in fdinfos {
        images.write_entries(ImageKind::Fdinfo, files_id, entries)?;
    }
    phases.mark("metadata");
    let pages = AtomicU64::new(0);
    let jobs = memfd::jobs(&mut files);
    let private: u64 = drains.iter().map(|d| d.0.pages * memory::PAGE).sum();
    let shared_scanned = jobs.iter().map(|job| job.size().div_ceil(memory::PAGE)).sum::<u64>();
    phases.counter().start("memory", private + shared_scanned * memory::PAGE);
    let writing = Writing { packed: opts.pages_per_block(), counter: phases.counter().clone() };
    workers.each(&drains, |(drain, pid, pages_id, vdso)| {
        pages.fetch_add(drain.pages, Ordering::Relaxed);
        let vdso = vdso.map(|(at, bytes)| (*at, bytes.as_slice()));
        drain.write(images, *pid, *pages_id, vdso, &writing)
    })?;
    let shared = AtomicU64::new(0);
    workers.each(&jobs, |job| {
        let bytes = job.run(images, &writing)?;
        shared.fetch_add(bytes / memory::PAGE, Ordering::Relaxed);
        Ok(())
    })?;
    phases.mark("memory");
    interrupt::check()?;
    if files.changes_sockets() {
        files.prepare_lock(&guard)?;
        // from here on, tasks go on behind a dead engine when sockets are as they were
        infected.iter().try_for_each(|host| host.hold(&guard))?;
    }
    files.finish()?;
    images.write_entries(ImageKind::Pstree, (), written.pstree)?;
    images.write_one(ImageKind::Seccomp, (), &SeccompEntry { seccomp_filters: filters })?;
    write_clocks(images, time_ns, &numbers, written.clocks)?;
    let scanned: u64 = drains.iter().map(|d| d.0.scanned).sum();
    let in_parent: u64 = drains.iter().map(|d| d.0.in_parent).sum();
    drop(drains);
    let mut inventory = inventory(opts, numbers.root, netlock::number(files.lock.method()), &run);
    inventory.dump_uptime = tracking.as_ref().map(|_| track::uptime());
    images.write_one(ImageKind::Inventory, (), &inventory)?;
    images.commit()?;
    if opts.auto_dedup {
        dedup::free_in_parents(images)?;
    }
    phases.mark("inventory");
    stages.reach(Stage::PostDump, Some(root))?;

    let alive: Vec<i32> = infected.iter().map(Infected::pid).collect();
    match opts.final_state {
        FinalState::Kill => {
            finish::decide(&infected, &guard)?;
            files.tasks_end();
            finish::kill(infected)?;
            files.inet.tasks_are_gone();
        }
        state @ (FinalState::Run | FinalState::Stop) => {
            files.tasks_go_on()?;
            infected.iter().try_for_each(Infected::unhold)?;
            guard.choose(Choice::Nothing);
            finish::let_go(infected, state == FinalState::Stop)?;
        }
    }
    let frozen = frozen_at.elapsed();
    phases.mark("ending");
    if let Some(tracking) = tracking {
        tracking.keep(&run)?;
    }
    let (pages, shared_pages) = (pages.into_inner(), shared.into_inner());
    let report = DumpReport { frozen, total: phases.total(), pages, in_parent, shared_pages, tasks: alive.len() };
    crate::stats::write_dump(opts, &phases, &report, scanned, shared_scanned)?;
    phases.finish();
    Ok(report)
}

/// An older checkpoint in the same folder is none any more: its inventory goes first, then all else of it, so that nothing
/// of it can be taken for part of the new one. What is not an image stays.
pub(crate) fn remove_old_images(images: &Images) -> Result<()> {
    images.remove(ImageKind::Inventory, ())?;
    for name in images.store().list()? {
        if name.ends_with(".img") && ImageKind::from_file_name(&name).is_some() {
            images.store().remove(&name)?;
        }
    }
    Ok(())
}

/// The threads that read and copy side by side: rayon's, or as many as `--jobs` says.
pub(crate) struct Workers {
    own: Option<rayon::ThreadPool>,
}

impl Workers {
    pub(crate) fn new(opts: &Options) -> Result<Workers> {
        let make = |n: std::num::NonZeroUsize| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n.get())
                .build()
                .map_err(|e| Error::Usage { what: e.to_string() })
        };
        Ok(Workers { own: opts.jobs.map(make).transpose()? })
    }

    fn install<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match &self.own {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }

    /// One thing is done here, without waking anyone; more are done side by side.
    fn each<T: Sync>(&self, all: &[T], f: impl Fn(&T) -> Result<()> + Sync + Send) -> Result<()> {
        match all {
            [] => Ok(()),
            [one] if self.own.is_none() => f(one),
            _ => self.install(|| all.par_iter().try_for_each(f)),
        }
    }
}

/// Finds the pages of all tasks that must be stored, side by side; in the order of the tasks that live.
fn plan_memory(
    tasks: &mut [Task],
    infected: &[Infected<'_>],
    workers: &Workers,
    mut tracking: Option<&mut Tracking>,
) -> Result<Vec<drain::Drain>> {
    let family = tasks.len() > 1;
    let mut all = Vec::with_capacity(infected.len());
    let alive = tasks.iter_mut().filter_map(|t| match &mut t.kind {
        Kind::Alive(a) => Some((t.pid, a)),
        Kind::Dead(_) => None,
    });
    for ((pid, alive), host) in alive.zip(infected) {
        if let Some(tracking) = &mut tracking {
            tracking.register(pid, &alive.facts.areas).task(pid)?;
        }
        let pointers: Vec<u64> = host.threads().iter().map(|t| t.registers.sp).collect();
        all.push((pid, ns_pid(pid, Some(alive.facts.status()))?, &mut alive.mm.vmas, pointers));
    }
    let tracking = tracking.as_deref();
    let one = |(pid, id, vmas, pointers): &mut (i32, u32, &mut Vec<VmaEntry>, Vec<u64>)| {
        let marks = tracking.map(|t| t.marks(*pid, *id)).transpose()?.flatten();
        let drain = drain::plan(*pid, vmas, pointers, family, marks.as_ref()).task(*pid)?;
        tracking.map_or(Ok(()), |t| t.clear(*pid))?;
        Ok(drain)
    };
    match all.as_mut_slice() {
        [only] => Ok(vec![one(only)?]),
        _ => workers.install(|| all.par_iter_mut().map(one).collect()),
    }
}

/// What goes into images that are written once.
#[derive(Debug, Default)]
struct Written {
    pstree: Vec<PstreeEntry>,
    clocks: Option<((u64, u64), (u64, u64))>,
}

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

type Head = (i32, i32, Option<freeze::Dead>, crate::proc::stat::Stat);

/// Reads /proc of all tasks, side by side.
fn read(heads: &[Head], threads: &[Vec<Stopped>], statuses: Vec<Vec<Status>>, workers: &Workers) -> Result<Vec<Task>> {
    let one = |(head, statuses): (&Head, Vec<Status>)| {
        if head.2.is_some() {
            Ok(None)
        } else {
            Facts::read(head.0, statuses).map(Some)
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

/// A tree whose root does not lead its session belongs to a shell's job.
fn check_session(opts: &Options, tasks: &[Task]) -> Result<()> {
    let Some(root) = tasks.first() else { return Err(Error::Gone) };
    if root.stat.session != root.pid && !opts.shell_job {
        return Err(Error::Usage {
            what: format!("The root process {} is not a session leader. Consider using --shell-job option", root.pid),
        });
    }
    Ok(())
}

fn give_ids(tasks: &mut [Task], numbers: &mut ids::Ids) -> Result<()> {
    for i in 0..tasks.len() {
        let (before, rest) = tasks.split_at_mut(i);
        let Some(task) = rest.first_mut() else { break };
        let Kind::Alive(alive) = &mut task.kind else { continue };
        let parent = before.iter().find(|t| t.pid == task.parent).and_then(|t| match &t.kind {
            Kind::Alive(a) => Some((t.pid, &a.ids)),
            Kind::Dead(_) => None,
        });
        alive.ids = numbers.task(task.pid, parent)?;
    }
    Ok(())
}

/// A task that holds a GPU is refused, by name.
fn refuse_gpus(tasks: &[Task]) -> Result<()> {
    for task in tasks {
        let Kind::Alive(alive) = &task.kind else { continue };
        crate::gpu::refuse(&alive.facts).task(task.pid)?;
    }
    Ok(())
}

/// A task that holds a lock that is not to be carried is refused.
fn refuse_locks(opts: &Options, tasks: &[Task]) -> Result<()> {
    for task in tasks {
        let Kind::Alive(alive) = &task.kind else { continue };
        for d in &alive.facts.descriptors {
            locks::refuse(d, opts).at(Place::Fd(d.fd)).task(task.pid)?;
        }
    }
    Ok(())
}

/// Descriptors, areas, exe, root and working folder, in CRIU's order of ids: areas first.
fn dump_files(tasks: &mut [Task], files: &mut DumpFiles<'_>) -> Result<Vec<(u32, Vec<FdinfoEntry>)>> {
    let mut all: Vec<(u32, Vec<FdinfoEntry>)> = Vec::new();
    for task in tasks {
        let Kind::Alive(alive) = &mut task.kind else { continue };
        let (pid, facts) = (task.pid, &alive.facts);
        let vmas = memory::areas::entries(pid, &facts.areas, files).task(pid)?;
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
            vmas,
            ..Default::default()
        };
    }
    Ok(all)
}

fn set_filter(entry: &mut CoreEntry, last: Option<u32>, chains: &[seccomp::Chain]) {
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

fn pstree_entry(
    stat: &crate::proc::stat::Stat,
    pid: i32,
    parent: i32,
    threads: &[crate::tasks::facts::ThreadFacts],
    facts: Option<&Facts>,
) -> PstreeEntry {
    let last =
        |list: Option<&Vec<i32>>, other: i32| list.and_then(|l| l.last().copied()).unwrap_or(other).max(0) as u32;
    let status = facts.map(Facts::status);
    let mut tids: Vec<u32> = threads.iter().map(|t| last(Some(&t.status.ns_pid), t.status.pid)).collect();
    if tids.is_empty() {
        tids.push(pid as u32);
    }
    PstreeEntry {
        pid: last(status.map(|s| &s.ns_pid), pid),
        ppid: parent.max(0) as u32,
        pgid: last(status.map(|s| &s.ns_pgid), stat.pgrp),
        sid: last(status.map(|s| &s.ns_sid), stat.session),
        threads: tids,
    }
}

/// The clocks that the restored tasks go on from.
fn write_clocks(
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

/// Whether some memory of the tree is under our watch.
fn is_tracked(root: i32, tasks: &[Task]) -> Result<bool> {
    let watched = |t: &Task| match &t.kind {
        Kind::Alive(a) => a.facts.areas.iter().any(|a| a.vm_flags.contains(VmFlags::UFFD_WP)),
        Kind::Dead(_) => false,
    };
    if tasks.iter().any(watched) {
        track::is_ours(root)
    } else {
        Ok(false)
    }
}

/// A pass of dirty tracking, if this dump is one or builds on one.
pub(crate) fn begin_tracking(
    opts: &Options,
    root: i32,
    stat: Option<&crate::proc::stat::Stat>,
    images: &Images,
) -> Result<Option<Tracking>> {
    let Some(stat) = stat.filter(|_| opts.track_mem || opts.prev_images_dir.is_some()) else { return Ok(None) };
    if opts.personality == Persona::Criu && opts.track_mem && track::available().is_none() {
        return Err(track::unavailable());
    }
    let again = opts.track_mem && opts.final_state != FinalState::Kill;
    Tracking::begin(root, stat, images.parent()?, again).map(Some)
}

fn inventory(opts: &Options, root_ids: TaskKobjIdsEntry, network_lock: u32, run: &str) -> InventoryEntry {
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
