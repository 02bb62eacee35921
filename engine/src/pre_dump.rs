//! A pre-dump: the private memory of a tree, taken while it runs, for a later dump to build on.
//!
//! freeze → put all areas under watch → let go → find the pages that were written since the last pass, and mark all →
//! copy pages while the program runs → inventory last → keep the marks. What the program writes after a page was marked is
//! written, whatever of it was copied, and the next pass takes it again. (Soft-dirty bits are cleared for a whole task at
//! once, so with those it is let go only after they are.) A pre-dump cannot be restored by itself.
//!
//! In the images: pagemap and pages of each process, the inventory with `pre_dump_mode`, `stats-dump`, the link `parent`.
//! Descriptors and everything else are not looked at: what cannot be carried is refused by the dump.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use standstill_images::proto::InventoryEntry;
use standstill_images::{ImageKind, Images};

use crate::cgroups::freezer::Freezer;
use crate::dump::{self, DumpReport};
use crate::error::{At, Call, Error, Place, Result};
use crate::memory::track::{self, Tracking};
use crate::memory::{areas as vmas, drain, Writing, PAGE};
use crate::options::{FinalState, Options, Persona, PreDumpMode};
use crate::plan::Plan;
use crate::proc::maps::Vma;
use crate::progress::{Counter, Verb};
use crate::stages::Stages;
use crate::stats::Phases;
use crate::sys::futex::RobustList;
use crate::sys::interrupt;
use crate::tasks::freeze::Frozen;
use crate::tasks::leftovers::{self, Copy};
use crate::tasks::{finish, flags, ids, release};
use crate::tracee::{Infected, Stopped};
use crate::transfer::client::Client;

/// Takes the memory of the tree below `opts.pid`, which goes on.
pub fn run(opts: &Options) -> Result<DumpReport> {
    let opts = &Options { track_mem: true, final_state: FinalState::Run, ..opts.clone() };
    opts.refuse_unsupported().map_err(|e| Error::Usage { what: e.to_string() })?;
    let root = opts.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
    if opts.to.is_some() {
        return Err(Error::Usage { what: "a pre-dump goes to a folder: no dump could find it in a stream".into() });
    }
    let images = crate::stores::for_dump(opts, &Stages::new(opts, None))?;
    dump::with_own_thread(|| pre_dump(opts, root, &images))
}

/// One process: where its memory is, and its id in the images.
struct Task {
    pid: i32,
    id: u32,
    stat: crate::proc::stat::Stat,
    areas: Vec<Vma>,
    pinned: bool,
}

/// Memory to be copied, the task's pid and the number of its pages in images.
type Draining = (drain::Drain, u32, u32);

/// What one pass over the memory of a running tree has left.
pub(crate) struct Pass {
    /// Its marks.
    pub(crate) tracking: Tracking,
    /// The name of its images.
    pub(crate) run: String,
    /// How long the tree stood still, and what was copied.
    pub(crate) report: DumpReport,
    /// Its processes: pid, and when each began.
    pub(crate) processes: Vec<(i32, u64)>,
    scanned: u64,
}

fn pre_dump(opts: &Options, root: i32, images: &Images) -> Result<DumpReport> {
    let mut phases = Phases::start(Verb::PreDump, opts)?;
    dump::remove_old_images(opts, images)?;
    let counter = phases.counter().clone();
    let server = Client::connect(opts, true)?.map(Arc::new);
    let mut pass = pass(opts, root, images, None, server.as_ref(), &counter, &mut |phase| phases.mark(phase))?;
    if opts.auto_dedup && !opts.use_page_server {
        crate::memory::dedup::free_in_parents(images)?;
    }
    pass.tracking.keep(&pass.run)?;
    phases.mark("inventory");
    pass.report.total = phases.total();
    crate::stats::write_dump(opts, &phases, &pass.report, pass.scanned, 0);
    phases.finish();
    Ok(pass.report)
}

/// Copies the memory that was written since the pass that `tracking` is of, or, without one, since the one that these images
/// build on. Pages go to a server, if there is one.
pub(crate) fn pass(
    opts: &Options,
    root: i32,
    images: &Images,
    tracking: Option<Tracking>,
    server: Option<&Arc<Client>>,
    counter: &Counter,
    mark: &mut dyn FnMut(&'static str),
) -> Result<Pass> {
    let began = Instant::now();
    let robust = RobustList::new()?;
    let mut freezer = Freezer::new(opts, &robust)?;
    let (frozen, copies) = leftovers::freeze(root, Duration::from_secs(u64::from(opts.timeout)), freezer.as_mut())?;
    mark("freezing");
    interrupt::check()?;
    let frozen_at = Instant::now();
    let (tasks, threads) = read(frozen)?;
    mark("reading");
    let stat = tasks.first().map(|t| &t.stat);
    let mut tracking = match tracking {
        Some(tracking) => tracking,
        None => dump::begin_tracking(opts, root, stat, images)?.ok_or(Error::Gone)?,
    };
    tracking.trust_again();
    tasks.iter().filter(|t| t.pinned).for_each(|task| tracking.distrust(task.pid));
    let (mut drains, frozen) =
        scan(opts, &tasks, threads, &copies, &mut tracking, (&robust, freezer.as_mut()), frozen_at)?;
    mark("marking");

    let pages = AtomicU64::new(0);
    drains.iter_mut().for_each(|(drain, ..)| drain.released());
    counter.start("memory", drains.iter().map(|d| d.0.pages * PAGE).sum());
    let writing = Writing { packed: opts.pages_per_block(), server: server.cloned(), counter: counter.clone() };
    let write = |(drain, id, pages_id): &Draining| {
        pages.fetch_add(drain.pages, Ordering::Relaxed);
        drain.write(images, *id, *pages_id, None, &writing)
    };
    match server {
        Some(server) => {
            drains.iter().try_for_each(write)?;
            server.finish().at(Place::Step("page server"))?;
        }
        None => drains.par_iter().try_for_each(write)?,
    }
    mark("memory");
    interrupt::check()?;
    release::still_there(root)?;
    let run = dump::run_id();
    images.write_one(ImageKind::Inventory, (), &inventory(opts, &run)?)?;
    images.commit()?;
    let report = DumpReport {
        frozen,
        total: began.elapsed(),
        pages: pages.into_inner(),
        in_parent: drains.iter().map(|d| d.0.in_parent).sum(),
        shared_pages: 0,
        tasks: tasks.len(),
    };
    let processes = tasks.iter().map(|t| (t.pid, t.stat.starttime)).collect();
    Ok(Pass { tracking, run, report, processes, scanned: drains.iter().map(|d| d.0.scanned).sum() })
}

/// The areas of all living processes, side by side.
fn read(frozen: Vec<Frozen>) -> Result<(Vec<Task>, Vec<Vec<Stopped>>)> {
    let one = |f: Frozen| {
        let mut buffer = Vec::new();
        let pid = f.pid;
        let path = format!("/proc/{pid}/status");
        crate::proc::read_proc(path.as_ref(), &mut buffer).call("read").at(Place::Path(path.into())).task(pid)?;
        let status = crate::proc::status::parse(&buffer).task(pid)?;
        let areas = flags::areas(pid, "maps")?;
        let id = dump::ns_pid(pid, Some(&status))?;
        Ok((Task { pid, id, stat: f.stat, areas, pinned: status.pins() }, f.threads))
    };
    frozen.into_iter().filter(|f| f.dead.is_none()).map(one).collect()
}

/// What is to be copied of each task, and how long the tree stood still. All tasks run again when this is done, however it
/// ended. They do so before their pages are looked at, if looking at a page and marking it are one step.
fn scan(
    opts: &Options,
    tasks: &[Task],
    mut threads: Vec<Vec<Stopped>>,
    copies: &[Copy],
    tracking: &mut Tracking,
    (robust, freezer): (&RobustList, Option<&mut Freezer<'_>>),
    frozen_at: Instant,
) -> Result<(Vec<Draining>, Duration)> {
    let mut infected = Vec::new();
    let mut free = Vec::new();
    for (task, stopped) in tasks.iter().zip(threads.iter_mut()) {
        let stopped = std::mem::take(stopped);
        tracking.register(task.pid, &task.areas).task(task.pid)?;
        if tracking.needs_watch(task.pid, &task.stat) {
            infected.push((task, infect(opts, &task.areas, stopped, copies, robust)?));
        } else {
            free.extend(stopped);
        }
    }
    for (task, host) in &mut infected {
        tracking.watch(host, &task.stat)?;
        tracking.register(task.pid, &task.areas).task(task.pid)?;
    }
    let release = |infected: Vec<(&Task, Infected<'_>)>, free: Vec<Stopped>| {
        finish::let_go(infected.into_iter().map(|(_, host)| host).collect(), false, freezer, None)?;
        free.into_iter().try_for_each(Stopped::release)?;
        Ok::<_, Error>(frozen_at.elapsed())
    };
    if tracking.marks_at_once() {
        let frozen = release(infected, free)?;
        tracking.tasks_run(true);
        let drains = look(tasks, tracking);
        tracking.tasks_run(false);
        return Ok((drains?, frozen));
    }
    let drains = look(tasks, tracking)?;
    Ok((drains, release(infected, free)?))
}

/// Finds the pages to copy, and marks all; tasks side by side.
fn look(tasks: &[Task], tracking: &Tracking) -> Result<Vec<Draining>> {
    let one = |(n, task): (usize, &Task)| {
        let mut entries = task.areas.iter().filter_map(vmas::outline).collect();
        let marks = tracking.marks(task.pid, task.id)?;
        let pages_id = u32::try_from(n + 1).map_err(|_| Error::Gone)?;
        match drain::plan(task.pid, &mut entries, &[], tasks.len() > 1, marks.as_ref(), 0..0) {
            Ok(drain) => {
                tracking.clear(task.pid)?;
                Ok(Some((drain, task.id, pages_id)))
            }
            // it has ended since it was let go
            Err(e) if e.errno() == libc::ESRCH || release::still_there(task.pid).is_err() => Ok(None),
            Err(e) => Err(e).task(task.pid),
        }
    };
    let all: Result<Vec<_>> = match tasks {
        [only] => Ok(vec![one((0, only))?]),
        _ => tasks.par_iter().enumerate().map(one).collect(),
    };
    Ok(all?.into_iter().flatten().collect())
}

/// The executor, for what only the task itself can make.
pub(crate) fn infect<'r>(
    opts: &Options,
    areas: &[Vma],
    stopped: Vec<Stopped>,
    copies: &[Copy],
    robust: &'r RobustList,
) -> Result<Infected<'r>> {
    let pid = stopped.first().map_or(0, Stopped::tid);
    let mut all = [stopped];
    dump::suspend_seccomp_and_settle(opts, &mut all, &dump::Workers::new(opts)?)?;
    let [stopped] = all;
    leftovers::check_areas(areas, &stopped).task(pid)?;
    let vdso = dump::read_vdso(pid, areas, &stopped).task(pid)?;
    let other = if vdso.is_some() { Vec::new() } else { dump::code_ends(pid, areas) };
    let codes: Vec<(u64, &[u8])> = vdso.iter().chain(&other).map(|(at, bytes)| (*at, bytes.as_slice())).collect();
    let mut host = Infected::infect(stopped, &codes, robust)?;
    let mut plans = Vec::new();
    plans.resize_with(host.threads().len(), Plan::new);
    if let Some(plan) = plans.first_mut() {
        host.name_area(plan);
        leftovers::remove(pid, areas, copies, plan);
    }
    host.start(plans).task(pid)?;
    host.finish()?;
    Ok(host)
}

fn inventory(opts: &Options, run: &str) -> Result<InventoryEntry> {
    Ok(InventoryEntry {
        // 3: pages may be packed
        img_version: if opts.compress { 3 } else { 2 },
        compress: opts.compress.then_some(1),
        fdinfo_per_id: Some(true),
        root_ids: Some(ids::Ids::new()?.root),
        ns_per_id: Some(true),
        lsmtype: Some(0),
        dump_uptime: Some(track::uptime()),
        pre_dump_mode: Some(match opts.pre_dump_mode {
            PreDumpMode::Splice => 1,
            PreDumpMode::Read => 2,
        }),
        dump_criu_run_id: Some(run.as_bytes().to_vec()),
        ..Default::default()
    })
}

/// Whether a pre-dump has any use here: as `criu`, one that could track nothing is refused.
pub fn has_use(opts: &Options) -> bool {
    opts.personality == Persona::Standstill || track::available().is_some()
}
