//! A pre-dump: the private memory of a tree, taken while it runs, for a later dump to build on.
//!
//! freeze → find the pages that were written since the last pass, and mark all → let go → copy pages while the program
//! runs → inventory last → keep the marks. What the program writes after the marks were set is written, whatever of it was
//! copied, and the next pass takes it again. A pre-dump cannot be restored by itself.
//!
//! In the images: pagemap and pages of each process, the inventory with `pre_dump_mode`, `stats-dump`, the link `parent`.
//! Descriptors and everything else are not looked at: what cannot be carried is refused by the dump.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use standstill_images::proto::InventoryEntry;
use standstill_images::{ImageKind, Images};

use crate::dump::{self, DumpReport};
use crate::error::{At, Call, Error, Place, Result};
use crate::memory::track::{self, Tracking};
use crate::memory::{areas, drain, Writing, PAGE};
use crate::options::{FinalState, Options, Persona, PreDumpMode};
use crate::plan::Plan;
use crate::proc::maps::Vma;
use crate::progress::Verb;
use crate::stats::Phases;
use crate::sys::futex::RobustList;
use crate::sys::interrupt;
use crate::tasks::freeze::{self, Frozen};
use crate::tasks::{finish, ids, leftovers, release};
use crate::tracee::{Infected, Stopped};

/// Takes the memory of the tree below `opts.pid`, which goes on.
pub fn run(opts: &Options) -> Result<DumpReport> {
    let opts = &Options { track_mem: true, final_state: FinalState::Run, ..opts.clone() };
    opts.refuse_unsupported().map_err(|e| Error::Usage { what: e.to_string() })?;
    let root = opts.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
    let images = dump::open_images(opts)?;
    dump::with_own_thread(|| pre_dump(opts, root, &images))
}

/// One process: where its memory is, and its id in the images.
struct Task {
    pid: i32,
    id: u32,
    stat: crate::proc::stat::Stat,
    areas: Vec<Vma>,
}

fn pre_dump(opts: &Options, root: i32, images: &Images) -> Result<DumpReport> {
    let mut phases = Phases::start(Verb::PreDump, opts)?;
    dump::remove_old_images(images)?;
    let robust = RobustList::new()?;
    let frozen = freeze::freeze(root, Duration::from_secs(u64::from(opts.timeout)))?;
    phases.mark("freezing");
    interrupt::check()?;
    let frozen_at = Instant::now();
    let (tasks, threads) = read(frozen)?;
    phases.mark("reading");
    let stat = tasks.first().map(|t| &t.stat);
    let mut tracking = dump::begin_tracking(opts, root, stat, images)?.ok_or(Error::Gone)?;
    let drains = scan(opts, &tasks, threads, &mut tracking, &robust)?;
    let frozen = frozen_at.elapsed();
    phases.mark("marking");

    let mut drains = drains;
    let pages = AtomicU64::new(0);
    drains.iter_mut().for_each(|(drain, ..)| drain.released());
    phases.counter().start("memory", drains.iter().map(|d| d.0.pages * PAGE).sum());
    let writing = Writing { packed: opts.pages_per_block(), counter: phases.counter().clone() };
    drains.par_iter().try_for_each(|(drain, id, pages_id)| {
        pages.fetch_add(drain.pages, Ordering::Relaxed);
        drain.write(images, *id, *pages_id, None, &writing)
    })?;
    phases.mark("memory");
    interrupt::check()?;
    release::still_there(root)?;
    let run = dump::run_id();
    images.write_one(ImageKind::Inventory, (), &inventory(opts, &run)?)?;
    images.commit()?;
    if opts.auto_dedup {
        crate::memory::dedup::free_in_parents(images)?;
    }
    tracking.keep(&run)?;
    phases.mark("inventory");
    let report = DumpReport {
        frozen,
        total: phases.total(),
        pages: pages.into_inner(),
        in_parent: drains.iter().map(|d| d.0.in_parent).sum(),
        shared_pages: 0,
        tasks: tasks.len(),
    };
    crate::stats::write_dump(opts, &phases, &report, drains.iter().map(|d| d.0.scanned).sum(), 0);
    phases.finish();
    Ok(report)
}

/// The areas of all living processes, side by side.
fn read(frozen: Vec<Frozen>) -> Result<(Vec<Task>, Vec<Vec<Stopped>>)> {
    let one = |f: Frozen| {
        let mut buffer = Vec::new();
        let pid = f.pid;
        let mut file = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            crate::proc::read_proc(path.as_ref(), &mut buffer).call("read").at(Place::Path(path.into())).task(pid)?;
            Ok::<_, Error>(std::mem::take(&mut buffer))
        };
        let status = crate::proc::status::parse(&file("status")?).task(pid)?;
        let areas = crate::proc::maps::parse(&file("maps")?).task(pid)?;
        let id = dump::ns_pid(pid, Some(&status))?;
        Ok((Task { pid, id, stat: f.stat, areas }, f.threads))
    };
    frozen.into_iter().filter(|f| f.dead.is_none()).map(one).collect()
}

/// What is to be copied of each task. All tasks run again when this is done, however it ended.
fn scan(
    opts: &Options,
    tasks: &[Task],
    mut threads: Vec<Vec<Stopped>>,
    tracking: &mut Tracking,
    robust: &RobustList,
) -> Result<Vec<(drain::Drain, u32, u32)>> {
    for task in tasks {
        tracking.register(task.pid, &task.areas).task(task.pid)?;
    }
    let mut infected = Vec::new();
    let mut free = Vec::new();
    for (task, stopped) in tasks.iter().zip(threads.iter_mut()) {
        let stopped = std::mem::take(stopped);
        if tracking.needs_watch(task.pid, &task.stat) {
            infected.push((task, infect(opts, task, stopped, robust)?));
        } else {
            free.extend(stopped);
        }
    }
    for (task, host) in &mut infected {
        tracking.watch(host, &task.stat)?;
        tracking.register(task.pid, &task.areas).task(task.pid)?;
    }
    let mut drains = Vec::with_capacity(tasks.len());
    for (n, task) in tasks.iter().enumerate() {
        let mut entries = task.areas.iter().filter_map(areas::outline).collect();
        let marks = tracking.marks(task.pid, task.id)?;
        let pages_id = u32::try_from(n + 1).map_err(|_| Error::Gone)?;
        let drain = drain::plan(task.pid, &mut entries, &[], tasks.len() > 1, marks.as_ref()).task(task.pid)?;
        tracking.clear(task.pid)?;
        drains.push((drain, task.id, pages_id));
    }
    finish::let_go(infected.into_iter().map(|(_, host)| host).collect(), false)?;
    free.into_iter().try_for_each(Stopped::release)?;
    Ok(drains)
}

/// The executor, for what only the task itself can make.
fn infect<'r>(opts: &Options, task: &Task, stopped: Vec<Stopped>, robust: &'r RobustList) -> Result<Infected<'r>> {
    let mut all = [stopped];
    dump::suspend_seccomp_and_settle(opts, &mut all, &dump::Workers::new(opts)?)?;
    let [stopped] = all;
    leftovers::check_areas(&task.areas, &stopped).task(task.pid)?;
    let vdso = dump::read_vdso(task.pid, &task.areas, &stopped).task(task.pid)?;
    let other = if vdso.is_some() { Vec::new() } else { dump::code_ends(task.pid, &task.areas) };
    let codes: Vec<(u64, &[u8])> = vdso.iter().chain(&other).map(|(at, bytes)| (*at, bytes.as_slice())).collect();
    let mut host = Infected::infect(stopped, &codes, robust)?;
    let mut plans = Vec::new();
    plans.resize_with(host.threads().len(), Plan::new);
    if let Some(plan) = plans.first_mut() {
        host.name_area(plan);
        leftovers::remove(&task.areas, plan);
    }
    host.start(plans).task(task.pid)?;
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
