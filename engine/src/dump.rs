//! The phases of a dump, in their order: each is a call, none is a system call.
//!
//! find and freeze → read /proc → sort files and areas (what cannot be carried is refused here, before anything is
//! changed) → put the executor in → ask → write metadata while pages are copied → inventory last → take the executor out
//! → kill, stop or let go.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use standstill_images::proto::{
    FsEntry, InventoryEntry, MmEntry, PluginsEntry, PstreeEntry, SeccompEntry, SeccompFilter, TaskKobjIdsEntry,
    VmaEntry,
};
use standstill_images::{ImageKind, Images};

use crate::cgroups::{self, freezer::Freezer};
use crate::cpu;
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{fanotify, locks, memfd, DumpFiles};
use crate::gpu;
use crate::guard::{Choice, Guard};
use crate::memory::track::{self, Tracking};
use crate::memory::{self, dedup, drain, Writing};
use crate::mounts::{self, dump::Mounts};
use crate::namespaces;
use crate::namespaces::user::Users;
use crate::network::{self, doors::Doors};
use crate::options::{FinalState, Options, Persona};
use crate::plan::Plan;
use crate::proc::maps::VmFlags;
use crate::progress::Verb;
use crate::sockets::netlock::{self, Lock};
use crate::stages::{NetworkLocked, Stage, Stages};
use crate::stats::Phases;
use crate::stores;
use crate::sys::futex::RobustList;
use crate::sys::interrupt;
use crate::tasks::facts::Facts;
use crate::tasks::pids::Inner;
use crate::tasks::{core, finish, ids, leftovers, seccomp};
use crate::tracee::{Answers, Infected, Stopped};
use crate::transfer::{self, client::Client};

mod entries;
mod reading;
mod setup;
mod snapshot;

use entries::{complete_rings, dump_files, inventory, pstree_entry, set_filter, write_clocks};
pub(crate) use entries::{ns_pid, run_id};
use reading::read;
pub(crate) use reading::{code_ends, read_vdso, suspend_seccomp_and_settle};
pub(crate) use setup::{remove_old_images, with_own_thread, Workers};
use snapshot::{Ahead, Copies};

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
/// How often a dump begins anew because what had been read changed.
const MOST_TRIES: u32 = 5;

/// Memory to be copied, the task's pid and the number of its pages in images, and its vdso as the kernel made it.
type Draining = (drain::Drain, u32, u32, Option<(u64, Vec<u8>)>);

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
    /// The set of cgroups of each thread.
    cgroups: Vec<u32>,
}

/// Dumps the tree below `opts.pid` into its [store](crate::stores). Whatever happens, the tree goes on, unless it was to be killed
/// and the checkpoint is complete.
pub fn run(opts: &Options) -> Result<DumpReport> {
    run_with(opts, &Stages::new(opts, None))
}

/// The same, and tells others of its stages.
pub fn run_with(opts: &Options, stages: &Stages<'_>) -> Result<DumpReport> {
    opts.refuse_unsupported().map_err(|e| Error::Usage { what: e.to_string() })?;
    let root = opts.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
    if opts.snapshot && opts.final_state != FinalState::Run {
        return Err(Error::Usage { what: "--snapshot is of a tree that goes on: add --leave-running".into() });
    }
    if opts.snapshot && opts.freeze_cgroup.is_some() {
        return Err(Error::Usage { what: "--snapshot stops the tree by itself: leave out --freeze-cgroup".into() });
    }
    if opts.snapshot && opts.use_page_server {
        return Err(Error::Usage { what: "--snapshot copies into the image folder: leave out --page-server".into() });
    }
    if opts.lazy_pages && (opts.snapshot || opts.use_page_server) {
        return Err(Error::Usage {
            what: "--lazy-pages leaves pages in the tree: leave out --snapshot and --page-server".into(),
        });
    }
    let images = stores::for_dump(opts, stages)?;
    // what was sent already cannot be taken back
    let most = if opts.keeps_images() { MOST_TRIES } else { 0 };
    with_own_thread(|| {
        let mut tries = 0;
        loop {
            match dump(opts, stages, root, &images, tries == 0) {
                Err(e) if matches!(e.cause(), Error::Moving { .. }) && tries < most => {
                    tracing::info!("{e}: once more, with all read in the freeze");
                    tries += 1;
                }
                result => return result,
            }
        }
    })
}

/// `ahead`: a snapshot may read flags of areas before the freeze.
fn dump(opts: &Options, stages: &Stages<'_>, root: i32, images: &Images, ahead: bool) -> Result<DumpReport> {
    let mut phases = Phases::start(Verb::Dump, opts)?;
    stages.reach(Stage::PreDump, Some(root))?;
    let workers = Workers::new(opts)?;
    let mut cgroups = cgroups::Dumped::new(opts)?;
    remove_old_images(opts, images)?;
    cpu::dump_if_wanted(opts, images)?;
    let server = Client::connect(opts, opts.track_mem)?.map(Arc::new);
    let giver = stages.giver().filter(|_| opts.lazy_pages);
    let waiting = if opts.lazy_pages && giver.is_none() { Some(transfer::server::socket(opts)?.0) } else { None };
    let mut ahead = if opts.snapshot { Some(Ahead::copy(opts, root, ahead, phases.counter())?) } else { None };
    if ahead.is_some() {
        phases.mark("ahead");
    }
    let robust = RobustList::new()?;
    let guard = Guard::new(&robust);
    // dropped behind those that are frozen: it asks tasks that run
    let gpu_guard = Guard::new(&robust);
    let mut cuda = gpu::dump::Cuda::lock(opts, root, &gpu_guard)?;
    if cuda.is_some() && opts.snapshot {
        return Err(Error::refused("CUDA in a snapshot", "leave out --snapshot")).task(root);
    }
    let mut freezer = Freezer::new(opts, &robust)?;
    let (mut frozen, leftover) =
        leftovers::freeze(root, Duration::from_secs(u64::from(opts.timeout)), freezer.as_mut())?;
    phases.mark("freezing");
    interrupt::check()?;
    let frozen_at = Instant::now();
    tracing::info!("{} tasks stand still", frozen.len());
    if let Some(cuda) = &mut cuda {
        cuda.checkpoint(&mut frozen)?;
        phases.mark("gpus");
    }
    // it is told of the lock before there is one, and of its end when there is none any more
    let locked = if network::is_ours(root)? { None } else { Some(NetworkLocked::reach(stages, root)?) };
    let more = opts.with_external(&stages.external_files()?).map_err(|e| Error::Usage { what: e.to_string() })?;
    let opts = &more;

    let mut threads: Vec<Vec<Stopped>> = Vec::with_capacity(frozen.len());
    let mut heads = Vec::with_capacity(frozen.len());
    for f in frozen {
        heads.push((f.pid, f.parent, f.dead, f.stat));
        threads.push(f.threads);
    }
    let statuses = suspend_seccomp_and_settle(opts, &mut threads, &workers)?;
    let mut tasks = read(&heads, &threads, statuses, ahead.as_ref().and_then(|a| a.flags.as_ref()), &workers)?;
    check_session(opts, &tasks)?;
    let mut numbers = ids::Ids::new()?;
    give_ids(&mut tasks, &mut numbers)?;
    let own = numbers.own();
    refuse_users_without_pids(&tasks, &own)?;
    refuse_several_times(&tasks)?;
    let users = if own.has(namespaces::Kind::User) { Users::of_task(root)? } else { Users::default() };
    let shared = namespaces::outside::external_key(opts, root)?.is_some();
    let pids = owners_of(&mut tasks, &own, &users, shared)?;
    cgroups.freezer_state = freezer.as_ref().map(Freezer::state_before);
    cgroups.own_namespace = own.has(namespaces::Kind::Cgroup);
    find_cgroups(&mut tasks, &mut cgroups)?;
    refuse_gpus(&tasks, cuda.as_ref())?;
    refuse_locks(opts, &tasks)?;
    let run = run_id();
    let mut tracking = match ahead.as_mut().and_then(|ahead| ahead.tracking(opts)) {
        Some(tracking) => Some(tracking),
        None => begin_tracking(opts, root, heads.first().map(|h| &h.3), images)?,
    };
    let tracked = match &tracking {
        Some(tracking) => tracking.has_watch(),
        None => is_tracked(root, &tasks)?,
    };
    if let Some(tracking) = &mut tracking {
        tracking.trust_again();
        living(&tasks).filter(|(_, a)| a.facts.status().pins()).for_each(|(task, _)| tracking.distrust(task.pid));
    }
    // what `files` undoes when it is dropped must be undone before any of these goes on
    let mut infected = Vec::with_capacity(tasks.len());
    let mut files =
        DumpFiles::new(opts, images, heads.iter().map(|h| h.0).collect(), numbers.root.net_ns_id.unwrap_or(0));
    (files.pids, files.users) = (pids, users);
    if own.has(namespaces::Kind::Mnt) {
        let own_cgroups = own.has(namespaces::Kind::Cgroup);
        let mut all: Vec<mounts::dump::Namespace> = Vec::new();
        for (task, alive) in living(&tasks) {
            let id = alive.ids.mnt_ns_id.unwrap_or(0);
            if all.iter().all(|ns| ns.id != id) {
                all.push(mounts::dump::Namespace { id, pid: task.pid, own_cgroups });
            }
        }
        files.mounts = Some(Mounts::read(opts, &all)?);
    }
    files.ipc_ns = own.id(namespaces::Kind::Ipc).or(numbers.root.ipc_ns_id).unwrap_or(0);
    files.memory_is_tracked = tracked;
    files.guard = Some(&guard);
    files.lock = Lock::new(opts.network_lock, &run);
    find_networks(&tasks, &numbers, own.id(namespaces::Kind::Net), &mut files)?;
    if let Some(id) = own.id(namespaces::Kind::Ipc) {
        namespaces::ipc::dump(root, id, &mut files)?;
    }
    let fdinfos = dump_files(&mut tasks, &mut files)?;
    if let Some(mounts) = &mut files.mounts {
        // after the files: names that those without one got are in there
        mounts.write(images)?;
    }
    phases.mark("reading");
    interrupt::check()?;

    // from here on tasks are changed, and put right again when `infected` is dropped
    for (task, stopped) in tasks.iter().zip(threads) {
        let Kind::Alive(alive) = &task.kind else { continue };
        let other = if alive.vdso.is_some() { Vec::new() } else { code_ends(task.pid, &alive.facts.areas) };
        let codes: Vec<(u64, &[u8])> =
            alive.vdso.iter().chain(&other).map(|(at, bytes)| (*at, bytes.as_slice())).collect();
        infected.push(Infected::prepare(stopped, &codes, &robust)?);
    }
    Infected::enter(&mut infected)?;
    let mut asked = Vec::with_capacity(tasks.len());
    for ((task, alive), host) in living(&tasks).zip(&mut infected) {
        let mut plans = Vec::with_capacity(host.threads().len());
        let mut in_task = None;
        let mut in_threads = Vec::new();
        for i in 0..host.threads().len() {
            let mut plan = Plan::new();
            in_threads.push(core::ask_thread(&mut plan));
            if i == 0 {
                host.name_area(&mut plan);
                leftovers::remove(task.pid, &alive.facts.areas, &leftover, &mut plan);
                in_task = Some(core::ask_task(&alive.facts, &mut plan));
            }
            plans.push(plan);
        }
        host.start(plans).task(task.pid)?;
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
    }
    complete_rings(&tasks, &fdinfos, &mut infected, &mut files)?;
    infected.iter_mut().try_for_each(|host| files.ttys.read_queues(host))?;
    infected.iter_mut().try_for_each(Infected::ask_to_halt)?;
    for host in &mut infected {
        // after the timers were asked: one that is over by now has left a signal, and one of the two is in the images
        host.read_signals()?;
    }
    phases.mark("asking");
    interrupt::check()?;

    let time_ns = living(&tasks).find_map(|(_, alive)| alive.ids.time_ns_id);
    let pid_ns = living(&tasks).find_map(|(_, alive)| alive.ids.pid_ns_id).unwrap_or(0);
    let mut filters: Vec<SeccompFilter> = Vec::new();
    let mut written = Written::default();
    let mut lazy_pages = 0;
    let mut planned = plan_memory(&mut tasks, &infected, &workers, tracking.as_mut())?.into_iter();
    let mut live = infected.iter().zip(&asked).zip(&answers);
    let mut drains: Vec<Draining> = Vec::new();
    for task in &mut tasks {
        match &mut task.kind {
            Kind::Dead(code) => {
                images.write_one(
                    ImageKind::Core,
                    files.pids.unsigned(task.pid),
                    &core::dead_entry(*code, &task.stat),
                )?;
                written.pstree.push(pstree_entry(&task.stat, task.pid, task.parent, &[], &files.pids));
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
                    let mut entry =
                        core::thread_entry(thread, facts, &in_threads[i], &answers[i], i == 0, &files.users)?;
                    if let Some(core) = &mut entry.thread_core {
                        core.cg_set = alive.cgroups.get(i).copied();
                    }
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
                let mut drain = planned.next().ok_or(Error::Gone)?;
                if opts.lazy_pages {
                    lazy_pages += drain.leave_lazy();
                }
                images.write_one(ImageKind::Mm, pid, &alive.mm)?;
                images.write_one(ImageKind::Fs, pid, &alive.fs)?;
                images.write_one(ImageKind::Ids, pid, &alive.ids)?;
                drains.push((drain, pid, files.next_pages_id(), alive.vdso.take()));
                let entry = pstree_entry(&task.stat, task.pid, task.parent, &alive.facts.threads, &files.pids);
                written.pstree.push(entry);
            }
        }
    }
    for (files_id, entries) in fdinfos {
        images.write_entries(ImageKind::Fdinfo, files_id, entries)?;
    }
    phases.mark("metadata");
    let mut copies = Copies::new(opts, root, &robust);
    if ahead.is_some() && drains.iter().map(|d| d.0.pages).sum::<u64>() > snapshot::FEW {
        for ((host, (_, alive)), (drain, ..)) in infected.iter_mut().zip(living(&tasks)).zip(&mut drains) {
            copies.make(host, &alive.facts, drain);
        }
        phases.mark("copying");
    }
    let pages = AtomicU64::new(0);
    let jobs = memfd::jobs(&mut files);
    let private: u64 = drains.iter().map(|d| d.0.pages * memory::PAGE).sum();
    let shared_scanned = jobs.iter().map(|job| job.size().div_ceil(memory::PAGE)).sum::<u64>();
    phases.counter().start("memory", private + shared_scanned * memory::PAGE);
    let writing = Writing { packed: opts.pages_per_block(), server: server.clone(), counter: phases.counter().clone() };
    let write = |(drain, pid, pages_id, vdso): &&Draining| {
        pages.fetch_add(drain.pages, Ordering::Relaxed);
        let vdso = vdso.as_ref().map(|(at, bytes)| (*at, bytes.as_slice()));
        drain.write(images, *pid, *pages_id, vdso, &writing)
    };
    let (late, now): (Vec<_>, Vec<_>) = drains.iter().partition(|d| d.0.can_wait());
    let shared = AtomicU64::new(0);
    let write_job = |job: &memfd::Job| {
        let bytes = job.run(images, &writing)?;
        shared.fetch_add(bytes / memory::PAGE, Ordering::Relaxed);
        Ok(())
    };
    match &server {
        // one connection: one after another, each by all threads
        Some(_) => now.iter().try_for_each(write).and_then(|()| jobs.iter().try_for_each(write_job))?,
        None => workers.each(&now, write).and_then(|()| workers.each(&jobs, write_job))?,
    }
    phases.mark("memory");
    interrupt::check()?;
    // before there is a lock, which is none of its
    network::dump_all(images, opts, &files.networks, &files.tuns)?;
    if files.changes_sockets() {
        files.prepare_lock(&guard)?;
        // from here on, tasks go on behind a dead engine when sockets are as they were
        infected.iter().try_for_each(|host| host.hold(&guard))?;
    }
    files.finish()?;
    images.write_entries(ImageKind::Pstree, (), written.pstree)?;
    cgroups.finish(images)?;
    images.write_one(ImageKind::Seccomp, (), &SeccompEntry { seccomp_filters: filters })?;
    write_clocks(images, time_ns, &numbers, written.clocks)?;
    namespaces::dump(root, &own, &files.users, images)?;
    namespaces::outside::dump(opts, root, pid_ns, images)?;
    let scanned: u64 = drains.iter().map(|d| d.0.scanned).sum();
    let mut in_parent: u64 = drains.iter().map(|d| d.0.in_parent).sum();
    cuda.as_ref().map_or(Ok(()), |cuda| cuda.write(images, &files.pids))?;
    let plugins = cuda.iter().map(|_| gpu::PLUGIN.to_vec()).collect();
    let inventory = InventoryEntry {
        plugins_entry: Some(PluginsEntry { plugins }),
        dump_uptime: tracking.as_ref().map(|_| track::uptime()),
        ..inventory(opts, numbers.root, netlock::number(files.lock.method()), &run)
    };
    if let Some(server) = &server {
        server.finish().at(Place::Step("page server"))?;
    }
    if ahead.is_none() {
        complete(opts, images, &inventory)?;
        phases.mark("inventory");
        stages.reach(Stage::PostDump, Some(root))?;
    }

    if let Some(socket) = waiting {
        stages.reach(Stage::StatusReady, Some(root))?;
        opts.say_ready()?;
        tracing::info!("Starting lazy pages server, for {lazy_pages} pages");
        transfer::server::run_for(socket, opts, &mut Left { drains: &drains })?;
        phases.mark("serving");
    }
    if let Some(giver) = giver {
        tracing::info!("{lazy_pages} pages are given away");
        let decide = || finish::decide(&infected, &guard, true);
        if let Err(e) = giver.give_pages(&mut Left { drains: &drains }, &decide) {
            guard.choose(Choice::Undo);
            return Err(e);
        }
        phases.mark("serving");
    }
    let alive: Vec<i32> = infected.iter().map(Infected::pid).collect();
    match opts.final_state {
        FinalState::Kill => {
            if giver.is_none() {
                finish::decide(&infected, &guard, false)?;
            }
            if let Some(freezer) = &mut freezer {
                freezer.tree_ends();
            }
            files.tasks_end();
            finish::kill(infected, own.has(namespaces::Kind::Pid))?;
            if let Some(cuda) = &mut cuda {
                cuda.tasks_end();
            }
            files.inet.tasks_are_gone();
            if let Some(locked) = locked {
                locked.keep();
            }
        }
        state @ (FinalState::Run | FinalState::Stop) => {
            files.tasks_go_on()?;
            infected.iter().try_for_each(Infected::unhold)?;
            guard.choose(Choice::Nothing);
            finish::let_go(infected, state == FinalState::Stop, freezer.as_mut(), cuda.as_mut())?;
            drop(locked);
        }
    }
    let mut frozen = frozen_at.elapsed();
    phases.mark("ending");
    if let Some(ahead) = &ahead {
        if !late.is_empty() {
            workers.each(&late, write)?;
            interrupt::check()?;
            phases.mark("memory");
            frozen += copies.end()?;
        }
        ahead.confirm(&alive)?;
        complete(opts, images, &inventory)?;
        phases.mark("inventory");
        stages.reach(Stage::PostDump, Some(root))?;
    }
    if let Some(tracking) = tracking {
        tracking.keep(&run)?;
    }
    let (mut pages, shared_pages) = (pages.into_inner(), shared.into_inner());
    if let Some(mut ahead) = ahead {
        ahead.keep(images)?;
        (frozen, pages, in_parent) = (frozen + ahead.frozen, pages + ahead.pages, ahead.in_parent);
    }
    let report = DumpReport { frozen, total: phases.total(), pages, in_parent, shared_pages, tasks: alive.len() };
    crate::stats::write_dump(opts, &phases, &report, scanned, shared_scanned);
    phases.finish();
    Ok(report)
}

/// The processes that live, in order.
fn living(tasks: &[Task]) -> impl Iterator<Item = (&Task, &Alive)> {
    tasks.iter().filter_map(|task| match &task.kind {
        Kind::Alive(alive) => Some((task, &**alive)),
        Kind::Dead(_) => None,
    })
}

/// From here on the images are a checkpoint.
fn complete(opts: &Options, images: &Images, inventory: &InventoryEntry) -> Result<()> {
    let inventory = InventoryEntry { standstill_images: images.written()?, ..inventory.clone() };
    images.write_one(ImageKind::Inventory, (), &inventory)?;
    images.commit()?;
    // a server frees in its own folder
    if opts.auto_dedup && !opts.use_page_server {
        dedup::free_in_parents(images)?;
    }
    Ok(())
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
        all.push((pid, ns_pid(pid, Some(alive.facts.status()))?, &mut alive.mm.vmas, pointers, host.area().range()));
    }
    let tracking = tracking.as_deref();
    let one = |(pid, id, vmas, pointers, ours): &mut (i32, u32, &mut Vec<VmaEntry>, Vec<u64>, Range<u64>)| {
        let marks = tracking.map(|t| t.marks(*pid, *id)).transpose()?.flatten();
        let drain = drain::plan(*pid, vmas, pointers, family, marks.as_ref(), ours.clone()).task(*pid)?;
        tracking.map_or(Ok(()), |t| t.clear(*pid))?;
        Ok(drain)
    };
    match all.as_mut_slice() {
        [only] => Ok(vec![one(only)?]),
        _ => workers.install(|| all.par_iter_mut().map(one).collect()),
    }
}

/// Pages that were left in the tasks, which stand still.
struct Left<'a> {
    drains: &'a [Draining],
}

impl transfer::source::Pages for Left<'_> {
    fn read(&mut self, id: u32, address: u64, buffer: &mut [u8]) -> Result<usize> {
        let of_task = self.drains.iter().find(|(_, pid, ..)| *pid == id);
        of_task.map_or(Ok(0), |(drain, ..)| drain.read_left(address, buffer).task(drain.pid()))
    }
}

/// What goes into images that are written once.
#[derive(Debug, Default)]
struct Written {
    pstree: Vec<PstreeEntry>,
    clocks: Option<((u64, u64), (u64, u64))>,
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

/// A tree is restored in one time namespace, which images have clocks of.
fn refuse_several_times(tasks: &[Task]) -> Result<()> {
    let first = living(tasks).next().and_then(|(_, alive)| alive.ids.time_ns_id);
    match living(tasks).find(|(_, alive)| alive.ids.time_ns_id != first) {
        Some((task, _)) => Err(Error::refused(
            "a task in another time namespace than the root's",
            "images have clocks of one: start the whole tree in it",
        ))
        .task(task.pid),
        None => Ok(()),
    }
}

/// Who is root in a user namespace may choose ids in the PID namespaces that belong to it, and in no others (clone(2)).
fn refuse_users_without_pids(tasks: &[Task], own: &namespaces::Own) -> Result<()> {
    let threads: usize = living(tasks).map(|(_, alive)| alive.facts.threads.len()).sum();
    if own.has(namespaces::Kind::User) && !own.has(namespaces::Kind::Pid) && (threads > 1 || tasks.len() > 1) {
        return Err(Error::refused(
            "several tasks in a user namespace of their own, but not in a PID namespace of their own,",
            "nobody inside may choose their ids; start them in both (unshare --user --pid)",
        ));
    }
    Ok(())
}

/// How the tree sees the ids of its processes; the owners of its descriptors are as it sees them from here on.
fn owners_of(tasks: &mut [Task], own: &namespaces::Own, users: &Users, shared: bool) -> Result<Inner> {
    let of_tasks = tasks.iter().map(|task| {
        let facts = match &task.kind {
            Kind::Alive(alive) => Some(&alive.facts),
            Kind::Dead(_) => None,
        };
        (task.pid, &task.stat, facts)
    });
    let pids = if own.has(namespaces::Kind::Pid) { Inner::of(of_tasks, shared)? } else { Inner::default() };
    for task in tasks {
        if let Kind::Alive(alive) = &mut task.kind {
            for d in &mut alive.facts.descriptors {
                pids.translate(&mut d.fown);
                (d.fown.uid, d.fown.euid) = (users.user(d.fown.uid), users.user(d.fown.euid));
            }
        }
    }
    Ok(pids)
}

/// Finds the network namespaces of the tree. If its root has one of its own, that is what will be locked.
fn find_networks(tasks: &[Task], numbers: &ids::Ids, own: Option<u32>, files: &mut DumpFiles<'_>) -> Result<()> {
    let ours = numbers.root.net_ns_id.unwrap_or(0);
    let mut found: Vec<(u32, OwnedFd)> = Vec::new();
    for (task, alive) in living(tasks) {
        let Some(id) = alive.ids.net_ns_id.filter(|id| *id != ours) else { continue };
        if !found.iter().any(|(known, _)| *known == id) {
            found.push((id, network::of_task(task.pid).task(task.pid)?));
        }
    }
    files.networks = Rc::new(Doors::new(ours, found)?);
    let Some(namespace) = own.and_then(|id| files.networks.get(id)) else { return Ok(()) };
    files.lock.set_namespace(namespace.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?);
    files.net_ns = own.unwrap_or(ours);
    Ok(())
}

/// Where all threads are in cgroups; those of one tree are few.
fn find_cgroups(tasks: &mut [Task], cgroups: &mut cgroups::Dumped<'_>) -> Result<()> {
    for task in tasks {
        let Kind::Alive(alive) = &mut task.kind else { continue };
        for thread in &alive.facts.threads {
            let tid = thread.status.pid;
            alive.cgroups.push(cgroups.thread(task.pid, tid).task(tid)?);
        }
    }
    Ok(())
}

/// A task that holds a GPU is refused, by name.
fn refuse_gpus(tasks: &[Task], cuda: Option<&gpu::dump::Cuda>) -> Result<()> {
    for (task, alive) in living(tasks) {
        let checkpointed = cuda.is_some_and(|cuda| cuda.has(task.pid));
        gpu::refuse(&alive.facts, checkpointed).task(task.pid)?;
    }
    Ok(())
}

/// A task that holds a lock that is not to be carried is refused, and one that decides about accesses.
fn refuse_locks(opts: &Options, tasks: &[Task]) -> Result<()> {
    for (task, alive) in living(tasks) {
        for d in &alive.facts.descriptors {
            locks::refuse(d, opts).and_then(|()| fanotify::refuse(d)).at(Place::Fd(d.fd)).task(task.pid)?;
        }
    }
    Ok(())
}

/// Whether some memory of the tree is under our watch.
fn is_tracked(root: i32, tasks: &[Task]) -> Result<bool> {
    let mut areas = living(tasks).flat_map(|(_, alive)| &alive.facts.areas);
    if areas.any(|a| a.vm_flags.contains(VmFlags::UFFD_WP)) {
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
    let parent = images.parent()?;
    let Some(stat) = stat.filter(|_| opts.track_mem || parent.is_some()) else { return Ok(None) };
    if opts.personality == Persona::Criu && opts.track_mem && track::available().is_none() {
        return Err(track::unavailable());
    }
    let again = opts.track_mem && opts.final_state != FinalState::Kill;
    Tracking::begin(root, stat, parent, again).map(Some)
}
