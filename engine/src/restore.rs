//! The phases of a restore, in their order: each is a call.
//!
//! read and check all images → start the first task, fill its namespaces → open files → plan → it makes the others → stages →
//! registers → remove executors → go. Any failure before "go" kills the half-made tree and takes away what was made outside it.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use standstill_images::proto::{FdinfoEntry, InventoryEntry, SeccompEntry, TimensEntry};
use standstill_images::{ImageKind, Images};

use crate::cgroups;
use crate::cpu;
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{fanotify, inotify, io_uring, locks, memfd, remove_names, tty, RestoreFiles};
use crate::gpu;
use crate::guard::{Choice, Guard, List};
use crate::memory::late::{Daemon, Door};
use crate::memory::rebuild::{Figures, Numbers};
use crate::memory::sysv;
use crate::memory::unpack::{Pipes, TaskEnds, Unpacker};
use crate::memory::vdso::Layout;
use crate::mounts;
use crate::namespaces::outside::Outside;
use crate::namespaces::user::{self, Users};
use crate::namespaces::{self, companion, Own};
use crate::network;
use crate::options::{FinalState, Options};
use crate::periodic;
use crate::plan::arena::{Arena, Slot};
use crate::plan::Plan;
use crate::proc;
use crate::progress::Verb;
use crate::sockets::netlock::Lifted;
use crate::sockets::tcp::Reconnected;
use crate::sockets::{inet, unix};
use crate::stages::{Stage, Stages};
use crate::stats::Phases;
use crate::stores;
use crate::sys::futex::RobustList;
use crate::sys::{calls, ptrace, spawn, thread};
use crate::tasks::pids::Hosts;
use crate::tasks::revive::{Birth, Script, Table, Vdso, BEFORE_CREDS, FILLED, FORKED, POWERLESS, READY};
use crate::tasks::tree::{Alive, Kind, Tree};
use crate::tasks::{core, registers, release};

pub(crate) mod examine;
mod network_of;
mod opening;
mod preamble;

use network_of::{read_networks, Network};
use opening::{open_files, open_late, read_tables, send, Transfer};
use preamble::Clocks;

/// How long tasks may take for one stage.
const STAGE_LIMIT: Duration = Duration::from_secs(600);

/// How long killed threads may take to end.
const REAP_LIMIT: Duration = Duration::from_secs(5);

/// What a restore did.
#[derive(Debug, Clone, Copy, Default)]
pub struct RestoreReport {
    /// The restored root, in our pid namespace.
    pub pid: i32,
    /// How long it took until the program ran.
    pub total: Duration,
    /// The program's own exit code, if we stayed and waited: 128 + N for signal N.
    pub exit_code: Option<i32>,
}

/// Restores the checkpoint in its [store](crate::stores). Without `opts.restore_detach` it returns when the program has ended.
pub fn run(opts: &Options) -> Result<RestoreReport> {
    run_with(opts, &Stages::new(opts, None))
}

/// The same, and tells others of its stages.
pub fn run_with(opts: &Options, stages: &Stages<'_>) -> Result<RestoreReport> {
    opts.refuse_unsupported().map_err(|e| Error::Usage { what: e.to_string() })?;
    let of_series = periodic::instead(opts);
    let opts = of_series.as_ref().unwrap_or(opts);
    let images = stores::for_restore(opts, stages)?;
    let report = thread::apart(|| restore(opts, stages, &images))?;
    // what was held in memory, and who is asked for images, is not needed while the program runs
    drop(images);
    if opts.restore_detach || opts.restore_sibling || !opts.exec_cmd.is_empty() {
        return Ok(report);
    }
    let exit_code = Some(release::wait(report.pid)?);
    Ok(RestoreReport { exit_code, ..report })
}

/// A tree that is being made: killed when dropped before it is let go.
struct Nursery {
    root: i32,
    sibling: bool,
    pids: Vec<i32>,
    /// Threads that we trace: their process is not over before we have seen their ends.
    seized: Vec<i32>,
    finished: bool,
    /// Its PID namespace is there without it.
    shares_ids: bool,
}

impl Drop for Nursery {
    fn drop(&mut self) {
        if self.finished || self.root == 0 {
            return;
        }
        if self.shares_ids {
            self.pids = release::descendants(self.root);
        }
        // the root last: its death would give its children to others, not end them
        for &pid in self.pids.iter().rev() {
            if release::is_descendant(pid, self.root) {
                let _ = calls::kill(pid, libc::SIGKILL);
            }
        }
        let _ = calls::kill(self.root, libc::SIGKILL);
        release::wait_for_ends(self.seized.iter().copied().filter(|tid| !self.pids.contains(tid)), Some(REAP_LIMIT));
        if !self.sibling {
            release::wait_for_end(self.root);
        }
    }
}

fn restore(opts: &Options, stages: &Stages<'_>, images: &Images) -> Result<RestoreReport> {
    let mut outside = Outside::enter(opts)?;
    let mut phases = Phases::start(Verb::Restore, opts)?;
    let pager = if opts.lazy_pages { Some(Daemon::connect(opts)?) } else { None };
    let inventory = read_inventory(opts, images)?;
    cpu::check_if_wanted(opts, images)?;
    let job = opts.shell_job.then(release::own_session_and_group);
    let revival = gpu::restore::prepare(opts, images, &inventory)?;
    let tree = Tree::read(images, job, opts.lazy_pages)?;
    let mut own = own_namespaces(&inventory, &tree)?;
    let had_ipc = own.id(namespaces::Kind::Ipc);
    outside.find(opts, images, &tree, &mut own)?;
    let mut cgroups = cgroups::Restored::read(opts, images, &inventory, &tree)?;
    let mounts = own.id(namespaces::Kind::Mnt).map(|_| mounts::restore::read(opts, images, &mount_namespaces(&tree)));
    let mounts = mounts.transpose()?;
    let birth = birth()?;
    if opts.personality == crate::options::Persona::Standstill {
        check_limits(&birth, &tree)?;
    }
    let filters: SeccompEntry = images.read_one_if_there(ImageKind::Seccomp, ())?.unwrap_or_default();
    let clocks: Option<TimensEntry> = read_clocks(images, &inventory, &tree)?;
    phases.mark("reading");

    let mut networks = read_networks(opts, images, &inventory, &tree)?;
    let mut files = RestoreFiles::read(opts, images)?;
    let own_ipc = own.id(namespaces::Kind::Ipc);
    let ipc_ns = had_ipc.or(inventory.root_ids.as_ref().and_then(|r| r.ipc_ns_id)).unwrap_or(0);
    sysv::read(ipc_ns, own_ipc.is_some(), tree.alive().flat_map(|(_, _, a)| &a.memory.mm.vmas), &mut files)?;
    if let Some(id) = own.id(namespaces::Kind::User) {
        files.set_users(Users::read(id, images)?);
    }
    let tree = tree.with_dead(&files.regular.dead_pids);
    let robust = RobustList::new()?;
    let guard = Guard::new(&robust);
    files.guard = Some(&guard);
    let result = build(
        opts,
        stages,
        images,
        &inventory,
        &own,
        &outside,
        revival.as_ref(),
        &mut networks,
        mounts,
        &tree,
        &birth,
        &filters,
        clocks,
        &mut files,
        cgroups.as_mut(),
        pager.as_ref(),
        &robust,
        &mut phases,
    );
    // ghosts and links are taken away again, however it ended; and nobody's pipe may have another end with us
    let mut cleaned = files.clean(result.is_ok());
    if result.is_ok() {
        cleaned = cleaned.and_then(|()| inotify::settle(&files)).and_then(|()| fanotify::mark(&mut files));
    }
    let names = files.litter.take();
    let segments = files.sysv.take_made();
    drop(files);
    let poised = result?;
    let report = cleaned
        .and_then(|()| poised.go(opts, stages, &guard, cgroups.as_ref(), &mut phases))
        .inspect_err(|_| remove_names(&names))?;
    segments.keep();
    if let Some(cgroups) = cgroups {
        cgroups.keep();
    }
    if let Some(pager) = &pager {
        pager.finished();
    }
    if opts.auto_dedup && pager.is_none() {
        // the program runs: that its images still take room is no reason to fail
        if let Err(e) = crate::memory::dedup::free_all(images) {
            tracing::warn!("pages that were restored could not be freed: {e}");
        }
    }
    Ok(report)
}

/// A tree that is whole and held: all that is left is to let it go.
///
/// If it is dropped instead, the fields go in this order: connections are locked, then taken back, then their owners end.
struct Poised<'a> {
    lifted: Lifted,
    connections: Vec<Reconnected>,
    nursery: Nursery,
    held: release::Seized,
    arena: Arena<'a>,
    stops: Vec<(i32, i32)>,
    figures: Figures,
}

impl Poised<'_> {
    fn go(
        mut self,
        opts: &Options,
        stages: &Stages<'_>,
        guard: &Guard<'_>,
        cgroups: Option<&cgroups::Restored<'_>>,
        phases: &mut Phases,
    ) -> Result<RestoreReport> {
        let pid = self.nursery.root;
        if let Some(path) = &opts.pidfile {
            write_pidfile(opts, path, pid)?;
        }
        for &(pid, signal) in &self.stops {
            calls::kill(pid, signal).task(pid)?;
        }
        stages.announce(Stage::PreResume, Some(pid));
        self.held.unbind()?;
        // the one store that decides
        guard.choose(Choice::Nothing);
        self.nursery.finished = true;
        self.lifted.done();
        self.connections.into_iter().for_each(Reconnected::keep);
        cgroups.inspect(|c| c.set_states());
        self.held.go()?;
        self.arena.release();
        phases.mark("going");
        let report = RestoreReport { pid, total: phases.total(), exit_code: None };
        crate::stats::write_restore(opts, phases, report.total, &self.figures);
        phases.finish();
        stages.announce(Stage::PostResume, Some(pid));
        Ok(report)
    }
}

#[allow(clippy::too_many_arguments)]
fn build<'r>(
    opts: &Options,
    stages: &Stages<'_>,
    images: &Images,
    inventory: &InventoryEntry,
    own: &Own,
    outside: &Outside,
    revival: Option<&gpu::restore::Revival>,
    networks: &mut Network,
    mounts: Option<mounts::table::Table>,
    tree: &Tree,
    birth: &Birth,
    filters: &SeccompEntry,
    clocks: Option<TimensEntry>,
    files: &mut RestoreFiles<'_>,
    mut cgroups: Option<&mut cgroups::Restored<'_>>,
    pager: Option<&Daemon>,
    robust: &'r RobustList,
    phases: &mut Phases,
) -> Result<Poised<'r>> {
    stages.reach(Stage::PreRestore, None)?;
    if let (Some(cgroups), Some(guard)) = (&mut cgroups, files.guard) {
        cgroups.prepare(guard).at(Place::Step("making cgroups"))?;
    }
    let mut draft = read_tables(images, tree)?;
    let count = tree.nodes.len() + tree.alive().map(|(_, _, a)| a.threads.len()).sum::<usize>();
    let len = arena_size(tree, &draft.tables, files.locks.len(), io_uring::room(files), count) + unix::room(files);
    let start = free_address(tree, Arena::span(len))?;
    let mut arena = Arena::new(Arena::base_in(start), len, robust)?;
    let mut slots: Vec<Slot> = Vec::with_capacity(tree.nodes.len());
    let mut threads = HashMap::new();
    for node in &tree.nodes {
        slots.push(arena.slot()?);
        if let Kind::Alive(a) = &node.kind {
            for (tid, _) in a.threads.iter().skip(1) {
                threads.insert(*tid, arena.slot()?);
            }
        }
    }

    let (ours, theirs) = socket_pair()?;
    let sibling = opts.restore_sibling && opts.restore_detach;
    let root = tree.root().pid;
    for (_, node, a) in tree.alive() {
        crate::log::begin(node.pid);
        tracing::info!(pid = node.pid, "comes back, with {} threads", a.threads.len());
    }
    let mut nursery =
        Nursery { root: 0, sibling, pids: Vec::new(), seized: Vec::new(), finished: false, shares_ids: false };
    // an empty plan first: when it is done, the task is out of its exec, whose end clone3 does not wait for
    arena.load(slots[0], root, Plan::new())?;
    let birth_of_root = spawn::Spawn {
        pid: root,
        load_at: arena.load_at(),
        boot: arena.boot(slots[0]),
        inherit: &[arena.fd(), theirs.as_fd()],
        sibling,
        namespaces: own.clone_flags() & !networks.outside_flags() & !outside.flags(),
        maps: files.users.are_own().then(|| files.users.maps()),
    };
    let make = || network::born_in(networks.outside(), || release::when_reaped(root, || spawn::spawn(&birth_of_root)));
    let pid = outside
        .born_in(make)
        .map_err(|e| match e {
            Error::Sys { call: "clone3", source } => Error::no_task(root, source),
            e => e,
        })
        .task(root)?;
    nursery.root = pid;
    nursery.shares_ids = outside.has_pids();
    nursery.pids = if own.has(namespaces::Kind::Pid) {
        // a namespace ends with its init, if it is one of the tree's own
        files.hosts = Hosts::of_root(root, pid);
        vec![pid]
    } else {
        tree.nodes.iter().map(|n| n.pid).collect()
    };
    drop(theirs);
    let alive = || release::still_there(pid);
    arena.finish(slots[0], STAGE_LIMIT, alive).task(pid)?;
    if own.kinds().next().is_some() || networks.is_some() {
        stages.reach(Stage::SetupNamespaces, Some(pid))?;
        namespaces::fill(pid, own, images)?;
        let is_owner = files.users.are_own();
        let nested =
            if is_owner { companion::make(pid, namespaces::Kind::Net, networks.to_make(opts)?)? } else { Vec::new() };
        networks.fill(opts, pid, nested, inventory, files)?;
        if let Some(id) = own.id(namespaces::Kind::Ipc) {
            files.mqueues = namespaces::ipc::restore(pid, id, &files.sysv, &files.users, images)?;
        }
        if let Some(table) = mounts {
            let mut owners = mounts::restore::Owners::of(pid, own)?;
            if is_owner {
                let nested = table.namespaces.len().saturating_sub(1);
                owners.mounts.extend(companion::make(pid, namespaces::Kind::Mnt, nested)?);
            }
            let made = mounts::restore::make(opts, images, table, &owners)?;
            files.regular.set_root(made.root()?.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?);
            files.mounts = Some(made);
        }
        stages.reach(Stage::PostSetupNamespaces, Some(pid))?;
    }
    let of_root;
    let birth = if files.users.are_own() {
        of_root = birth.inside(pid, &files.users)?;
        &of_root
    } else {
        birth
    };
    phases.mark("birth");

    sysv::prepare(files)?;
    let own_root = unix::Root {
        pid: root,
        host: pid,
        status: &birth.status,
        in_namespace: own.has(namespaces::Kind::Pid),
        run: Box::new(|plan, fds, answer| {
            arena.load(slots[0], root, plan)?;
            send(&ours, fds, &alive)?;
            arena.finish(slots[0], STAGE_LIMIT, alive).task(root)?;
            Ok(arena.answer(slots[0], answer))
        }),
    };
    unix::make_with(files, Some(own_root))?;
    let mut transfer = open_files(opts, tree, files, &mut draft)?;
    for master in std::mem::take(&mut files.ttys.orphan_masters) {
        stages.orphan_master(master.as_fd())?;
    }
    // a placeholder holds the number of each file that can be opened only when the tasks exist
    // behind what is still added to the transfer: a pipe for each task with packed pages, a socket, doors of namespaces
    let spaces = tree.alive().count() + own.kinds().count();
    let own_numbers =
        draft.base + i32::try_from(transfer.list.len() + tree.nodes.len() * 2 + spaces * 2 + 8).unwrap_or(0);
    let job = opts.shell_job.then(|| tree.root().pid);
    let member = |sid: u32| {
        let of = |pid: i32| u32::try_from(pid) == Ok(sid);
        tree.alive().find(|(_, n, _)| of(n.sid)).map(|(_, n, _)| n.pid).or(job)
    };
    tty::plan_controlling(&draft.late_ids, own_numbers, member, files)?;
    // behind one for each of those, which are fewer
    let ring_numbers = own_numbers + i32::try_from(draft.late_ids.len()).unwrap_or(0);
    let is_task = |pid: i32| tree.alive().any(|(_, node, _)| node.pid == pid);
    io_uring::plan_owners(ring_numbers, is_task, files)?;
    let placeholder = File::open("/dev/null").call("open(/dev/null)")?;
    let mut late: HashMap<u32, OwnedFd> = HashMap::new();
    for id in draft.late_ids.drain(..) {
        late.insert(id, placeholder.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?.into());
    }
    let engine = calls::pidfd_open(i32::try_from(std::process::id()).unwrap_or(0), 0)?;
    let engine = transfer.add(engine);
    let folder = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", folder, rustix::fs::Mode::empty()).call("open(/proc)")?;
    files.proc_at = draft.base + transfer.add(proc) as i32;
    let joined_time = match outside.time() {
        Some(fd) => {
            let fd = fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?;
            Some(draft.base + transfer.add(fd) as i32)
        }
        None => None,
    };
    // who opens it does not matter: it is of the namespace of whoever writes
    let last_id = if own.has(namespaces::Kind::Pid) && !outside.has_pids() {
        let file = File::options().write(true).open("/proc/sys/kernel/ns_last_pid").ok();
        file.map(|file| transfer.add(file.into()))
    } else {
        None
    };
    let mut mount_doors = HashMap::new();
    for (id, door) in files.mounts.iter().flat_map(|made| made.nested()) {
        let door = door.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?;
        mount_doors.insert(id, draft.base + transfer.add(door) as i32);
    }
    let mut late_senders: HashMap<i32, OwnedFd> = HashMap::new();
    let mut late_doors = HashMap::new();
    if files.users.are_own() && !late.is_empty() {
        for (_, node, _) in tree.alive() {
            let (to, from) = socket_pair()?;
            late_senders.insert(node.pid, to);
            late_doors.insert(node.pid, draft.base + transfer.add(from) as i32);
        }
    }
    let doors = networks.doors_for_tasks(tree, &files.networks, &mut transfer)?;
    let device = match pager.filter(|_| files.users.are_own()) {
        Some(_) => Daemon::device().map(|device| draft.base + transfer.add(device) as i32),
        None => None,
    };
    let (unpacker, packed) = unpacker(tree, draft.base, &mut transfer)?;
    phases.mark("opening");

    let parked = birth.vdso.layout.moved(arena.parking());
    let base = draft.base;
    let spare = ring_numbers - base + i32::try_from(files.io_uring.count()).unwrap_or(0) + 1;
    let late_memory = if pager.is_some() { memory_doors(tree, base + spare + 1, device) } else { HashMap::new() };
    let last = spare + 1 + i32::try_from(late_memory.len()).unwrap_or(0);
    if transfer.list.len() >= usize::try_from(draft.room).unwrap_or(0) || last >= draft.room {
        return Err(Error::Usage { what: "more descriptors than numbers for them".into() });
    }
    let table = Table {
        base,
        room: draft.room,
        files: draft.files.iter().map(|(&id, &i)| (id, base + i as i32)).collect(),
        in_flight: draft.in_flight.iter().map(|&(id, i)| (id, base + i as i32)).collect(),
        late: late.iter().map(|(&id, fd)| (id, fd.as_raw_fd())).collect(),
        engine: base + engine as i32,
        late_doors,
        spare: base + spare,
        wanted: Default::default(),
        numbers: Numbers {
            areas: draft.areas.iter().map(|(&k, &i)| (k, base + i as i32)).collect(),
            pages: draft.pages.iter().map(|(&k, &i)| (k, base + i as i32)).collect(),
            packed,
            segments: files.sysv.sizes(),
        },
        late_memory,
        exes: draft.exes.iter().map(|(&id, &i)| (id, base + i as i32)).collect(),
        terminals: draft.terminals.iter().map(|(&pid, &(i, group))| (pid, (base + i as i32, group))).collect(),
        mounts: mount_doors,
        networks: doors.into_iter().map(|(id, i)| (id, base + i as i32)).collect(),
        folders: draft.folders.iter().map(|(&id, &i)| (id, base + i as i32)).collect(),
        tables: draft.tables,
        fs: draft.fs,
        own_root: draft.own_root,
        restore: files,
    };
    let jobs = opts.jobs.map(std::num::NonZeroUsize::get);
    let script = Script { tree, birth, table: &table, filters, slots: slots.clone(), threads, parked, jobs };
    let (root_plan, figures) = script.write(&mut arena)?;
    if opts.show_plan {
        eprintln!("{}task {}\n{root_plan}", arena.describe(), tree.root().pid);
    }
    drop(script);
    let wanted = table.wanted.take();
    drop(table);
    expect(tree, files, &mut arena);
    phases.mark("planning");

    let mut preamble = preamble::write(
        &arena,
        birth,
        parked,
        base,
        transfer.list.len(),
        match (&clocks, joined_time) {
            (_, Some(fd)) => Clocks::Join(fd),
            (Some(clocks), None) => Clocks::GoOn(clocks, files.proc_at),
            (None, None) => Clocks::Stay,
        },
        pid,
    )?;
    if let Some(at) = last_id {
        go_on_counting(base + at as i32, tree, &mut preamble);
    }
    arena.load(slots[0], pid, preamble)?;
    send(&ours, &transfer.list, &alive)?;
    arena.finish(slots[0], STAGE_LIMIT, alive).task(pid)?;
    if let (Some(cgroups), Kind::Alive(a)) = (&cgroups, &tree.root().kind) {
        let unshare = || {
            let mut plan = Plan::new();
            plan.call("cgroup namespace", libc::SYS_unshare, &[libc::CLONE_NEWCGROUP.into()]);
            arena.load(slots[0], pid, plan)?;
            arena.finish(slots[0], STAGE_LIMIT, alive)
        };
        cgroups.born(pid, a, unshare).task(pid)?;
    }
    arena.load(slots[0], pid, root_plan)?;
    let memories = tree.alive().map(|(_, n, a)| (u32::try_from(n.pid).unwrap_or(0), &a.memory)).collect();
    phases.counter().start("forking", figures.pages * crate::memory::PAGE);
    let in_namespace = own.has(namespaces::Kind::Pid);
    let host = |id: i32| {
        if !in_namespace {
            return Ok(id);
        }
        let mut hosts = Hosts::of_root(root, pid);
        hosts.learn(pid)?;
        hosts.id(id)
    };
    unpacker.serve(&figures.packed, &memories, host, phases.counter(), || arena.gather(FORKED, STAGE_LIMIT, alive))?;
    files.hosts.learn(pid)?;
    phases.mark("forking");
    drop(transfer);
    open_late(files, &late)?;
    files.mounts.as_mut().map_or(Ok(()), mounts::restore::Made::settle)?;
    cgroups.as_ref().map_or(Ok(()), |c| c.forked(tree, |pid| files.hosts.id(pid)))?;
    if let Some(pager) = pager {
        let mut numbers = base + spare + 1..;
        for node in &tree.nodes {
            match &node.kind {
                Kind::Alive(a) => {
                    let number = numbers.next().ok_or(Error::Gone)?;
                    pager.take(node.pid, files.hosts.id(node.pid)?, number, &a.memory.late_areas()).task(node.pid)?;
                }
                Kind::Dead { .. } => pager.dead(node.pid)?,
                Kind::Helper => {}
            }
        }
    }
    arena.go(FORKED);
    for (of, id) in wanted {
        let (to, fd) = late_senders.get(&of).zip(late.get(&id)).ok_or(Error::Gone)?;
        send(to, &[fd.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?], &alive).task(of)?;
    }
    arena.gather(FILLED, STAGE_LIMIT, alive)?;
    phases.mark("filling");
    memfd::seal(files)?;
    locks::take_leases_for_tasks(files)?;
    // threads, too
    files.hosts.learn(pid)?;
    if let Some(cgroups) = &cgroups {
        cgroups.threads(tree, |tid| files.hosts.id(tid))?;
    }
    arena.go(FILLED);
    arena.gather(BEFORE_CREDS, STAGE_LIMIT, alive)?;
    drop(late);
    let hosts = &files.hosts;
    if outside.has_pids() {
        nursery.pids = tree.alive().map(|(_, node, _)| hosts.id(node.pid)).collect::<Result<_>>()?;
    }
    let mut held = release::Seized::default();
    for (_, _, a) in tree.alive() {
        for (tid, entry) in &a.threads {
            let (_, core) = core::parts(entry)?;
            let tid = hosts.id(*tid)?;
            nursery.seized.push(tid);
            held.seize(tid, core.seccomp_mode.unwrap_or(0) != 0 || filters_come_by_sync(a))?;
        }
    }
    if files.users.are_own() {
        for (_, node, a) in tree.alive() {
            user::powers(hosts.id(node.pid)?, a, birth).task(node.pid)?;
        }
    }
    arena.go(BEFORE_CREDS);
    arena.gather(POWERLESS, STAGE_LIMIT, alive)?;
    arena.go(POWERLESS);
    arena.gather(READY, STAGE_LIMIT, alive)?;
    phases.mark("settling");

    held.stop()?;
    let mut arenas = Vec::new();
    for (_, node, a) in tree.alive() {
        set_registers(a, hosts).task(node.pid)?;
        arenas.push((hosts.id(node.pid)?, arena.leftovers(keeps_parked(a, birth))));
    }
    held.remove_executors(arena.syscall_address()?, &arenas)?;
    tree.alive().try_for_each(|(_, node, a)| set_leader(a, hosts).task(node.pid))?;
    if let Some(revival) = revival {
        let pids = tree.alive().map(|(_, node, _)| Ok((node.pid, hosts.id(node.pid)?)));
        revival.go(pids).at(Place::Step("CUDA"))?;
    }
    let stops = tree.alive().filter_map(|(_, n, a)| stop_signal(a, opts).map(|signal| Ok((hosts.id(n.pid)?, signal))));
    let stops = stops.collect::<Result<_>>()?;
    let connections = inet::connections(files)?;
    if let Some(guard) = files.guard {
        bind_by_guard(guard, &nursery.pids, !connections.is_empty())?;
    }
    cgroups.map_or(Ok(()), cgroups::Restored::set_properties)?;
    // connections are held off until here: who says no now breaks none
    stages.reach(Stage::PostRestore, Some(pid))?;
    if networks.locked().is_some() {
        stages.announce(Stage::NetworkUnlock, Some(pid));
    }
    networks.unlock_nested(inventory, !connections.is_empty())?;
    inet::guard(files)?;
    let lifted = Lifted::lift(inventory, connections, files.guard, networks.locked())?;
    let connections = inet::repair_ends(files)?;
    sysv::settle(files)?;
    if let Some(id) = own.id(namespaces::Kind::Ipc) {
        namespaces::ipc::settle(pid, id, &files.sysv, images)?;
    }
    phases.mark("registers");
    Ok(Poised { lifted, connections, nursery, held, arena, stops, figures })
}

/// What descriptors go through.
fn socket_pair() -> Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).call("socketpair")
}

/// The guard kills the tree, should we die before it is let go. The kernel does that too (PTRACE_O_EXITKILL), but task by
/// task, and so it is taken off: for one process, that happens or does not.
fn bind_by_guard(guard: &Guard<'_>, pids: &[i32], needed: bool) -> Result<()> {
    if pids.len() == 1 && !guard.is_running() && !needed {
        return Ok(());
    }
    for &pid in pids {
        match guard.register_kill(List::Undo, pid) {
            // it was there for a moment only
            Err(e) if e.errno() == libc::ESRCH => {}
            other => other?,
        }
    }
    Ok(())
}

/// The pipes through which tasks have their packed pages written; tasks without any get none.
fn unpacker(tree: &Tree, base: i32, transfer: &mut Transfer) -> Result<(Unpacker, HashMap<u32, Pipes>)> {
    let packed = tree.alive().filter(|(_, _, a)| a.memory.is_packed());
    let pids: Vec<u32> = packed.map(|(_, n, _)| u32::try_from(n.pid).unwrap_or(0)).collect();
    let (unpacker, TaskEnds { ask, waits }) = Unpacker::new(&pids)?;
    let mut pipes = HashMap::new();
    if !waits.is_empty() {
        let ask = base + transfer.add(ask) as i32;
        for (pid, wait) in waits {
            pipes.insert(pid, Pipes { ask, wait: base + transfer.add(wait) as i32 });
        }
    }
    Ok((unpacker, pipes))
}

/// Each living task makes a userfaultfd, at a number of its own.
fn memory_doors(tree: &Tree, first: i32, device: Option<i32>) -> HashMap<i32, Door> {
    tree.alive().zip(first..).map(|((_, node, _), number)| (node.pid, Door { number, device })).collect()
}

fn filters_come_by_sync(a: &Alive) -> bool {
    a.threads.iter().any(|(_, e)| e.thread_core.as_ref().is_some_and(|c| c.seccomp_mode.unwrap_or(0) != 0))
}

fn read_inventory(opts: &Options, images: &Images) -> Result<InventoryEntry> {
    let inventory: InventoryEntry = images.read_one(ImageKind::Inventory, ())?;
    let lie = |what: &str| Error::lie("inventory.img", what.to_owned());
    if !matches!(inventory.img_version, 1..=3) {
        return Err(lie(&format!("Not supported images version {}", inventory.img_version)));
    }
    if let Some(method @ 2..) = inventory.compress {
        return Err(lie(&format!("pages are packed in an unknown way ({method})")));
    }
    if inventory.fdinfo_per_id != Some(true) {
        return Err(lie("Too old image, no longer supported"));
    }
    if inventory.pre_dump_mode.is_some() && !images.exists(ImageKind::Files, ())? {
        return Err(Error::refused(
            "a pre-dump",
            "it holds memory only: make a full dump on top of it and restore that",
        ));
    }
    if inventory.tcp_close == Some(true) && !opts.tcp_close {
        return Err(Error::Usage { what: "Need to set the --tcp-close options.".into() });
    }
    if inventory.allow_uprobes == Some(true) && !opts.allow_uprobes {
        return Err(Error::Usage { what: "Dumped with --allow-uprobes. Need to set it on restore as well.".into() });
    }
    let others = |plugin: &&Vec<u8>| plugin.as_slice() != gpu::PLUGIN;
    if let Some(plugin) = inventory.plugins_entry.as_ref().and_then(|p| p.plugins.iter().find(others)) {
        return Err(Error::refused(
            format!("a checkpoint that needs the plugin {}", String::from_utf8_lossy(plugin)),
            "there are no plugins",
        ));
    }
    Ok(inventory)
}

/// The namespaces that the tree is to have of its own.
fn own_namespaces(inventory: &InventoryEntry, tree: &Tree) -> Result<Own> {
    let Some(engine) = &inventory.root_ids else { return Err(Error::lie("inventory.img", "no ids")) };
    let Some(of_root) = tree.alive().next().map(|(_, _, a)| a.ids) else { return Ok(Own::default()) };
    let own = Own::of(&of_root, engine);
    tree.alive().try_for_each(|(_, node, a)| own.refuse_nested(&a.ids, &of_root).task(node.pid))?;
    Ok(own)
}

/// The mount namespaces of the tree, that of its root first.
fn mount_namespaces(tree: &Tree) -> Vec<u32> {
    let mut all = Vec::new();
    for id in tree.alive().filter_map(|(_, _, a)| a.ids.mnt_ns_id) {
        if !all.contains(&id) {
            all.push(id);
        }
    }
    all
}

/// Limits above those of the one who restores can be had with a capability only. CRIU leaves them as they are. So do we with
/// the two that the kernel computes from the memory of a machine, if nobody sets them: they differ from one to the next.
fn check_limits(birth: &Birth, tree: &Tree) -> Result<()> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    if birth.status.cap_effective & CAP_SYS_RESOURCE != 0 {
        return Ok(());
    }
    for (_, node, a) in tree.alive() {
        let Some((_, leader)) = a.threads.first() else { continue };
        let limits = leader.tc.as_ref().and_then(|tc| tc.rlimits.as_ref()).map_or(&[][..], |r| &r.rlimits);
        let of_machine = |name: &str| ["Max processes", "Max pending signals"].contains(&name);
        let mut all = limits.iter().zip(&birth.limits).zip(proc::limits::NAMES);
        let above = all.find(|((l, own), name)| l.max > own.maximum && !of_machine(name));
        if let Some(((limit, own), name)) = above {
            let number = |n: u64| if n == proc::limits::UNLIMITED { "unlimited".into() } else { n.to_string() };
            let what = format!(
                "its limit \"{name}\" is {}, and ours {}: raise the hard limit (ulimit -H) of the one who restores, or give it \
                 CAP_SYS_RESOURCE",
                number(limit.max),
                number(own.maximum)
            );
            return Err(Error::Changed { what }).task(node.pid);
        }
    }
    Ok(())
}

fn read_clocks(images: &Images, inventory: &InventoryEntry, tree: &Tree) -> Result<Option<TimensEntry>> {
    let own = inventory.root_ids.as_ref().and_then(|r| r.time_ns_id);
    let theirs = tree.alive().next().and_then(|(_, _, a)| a.ids.time_ns_id);
    let id = if theirs == own { 0 } else { theirs.unwrap_or(0) };
    Ok(images.read_one_if_there(ImageKind::Timens, id)?)
}

/// What tasks of ours are born with.
fn birth() -> Result<Birth> {
    let mut buf = Vec::new();
    let mut read = |path: &str| -> Result<Vec<u8>> {
        proc::read_proc(path.as_ref(), &mut buf).call("read").at(Place::Path(path.into()))?;
        Ok(buf.clone())
    };
    let status = proc::status::parse(&read("/proc/thread-self/status")?)?;
    let (_, policy, _) = calls::scheduling(0)?;
    let limits = proc::limits::parse(&read("/proc/self/limits")?)?.to_vec();
    let oom_score_adj = proc::simple::signed("/proc/PID/oom_score_adj", &read("/proc/self/oom_score_adj")?)?;
    let loginuid = read("/proc/self/loginuid")
        .ok()
        .map(|t| proc::simple::loginuid(&t))
        .transpose()?
        .map(|u| u.unwrap_or(u32::MAX));
    let personality = proc::simple::hex("/proc/PID/personality", &read("/proc/self/personality")?)?;
    let areas = proc::maps::parse(&read("/proc/self/maps")?)?;
    let layout = Layout::of(&areas);
    use proc::maps::VmaName;
    let pieces = areas
        .iter()
        .filter(|a| matches!(a.name(), VmaName::Vdso | VmaName::Vvar | VmaName::VvarVclock))
        .map(|a| (a.start, a.size()))
        .collect();
    let bytes = crate::memory::vdso::own()?.to_vec();
    Ok(Birth { status, policy, limits, oom_score_adj, loginuid, vdso: Vdso { layout, pieces, bytes }, personality })
}

fn arena_size(
    tree: &Tree,
    tables: &HashMap<u32, Vec<FdinfoEntry>>,
    locks: usize,
    io_urings: (usize, usize),
    tasks: usize,
) -> usize {
    let areas: usize = tree.alive().map(|(_, _, a)| a.memory.mm.vmas.len() * 8 + a.memory.operations()).sum();
    let fds: usize = tables.values().map(|t| t.len() * 12).sum::<usize>() * tree.nodes.len().min(4);
    let rings: u64 = tree.alive().flat_map(|(_, _, a)| a.memory.rings()).map(|e| e.end - e.start + (16 << 10)).sum();
    let rings = usize::try_from(rings).unwrap_or(usize::MAX >> 8);
    let data = (64 << 10) * tasks + locks * 32 + rings + io_urings.1 + (8 << 20);
    Arena::size_for(tasks, areas + fds + locks + tasks * 256 + rings / 16 + io_urings.0, data)
}

/// A gap of `len` bytes that no task uses, nor a fresh process.
fn free_address(tree: &Tree, len: u64) -> Result<u64> {
    const LOWEST: u64 = 0x1_0000_0000;
    const HIGHEST: u64 = 0x5000_0000_0000;
    let mut taken: Vec<(u64, u64)> =
        tree.alive().flat_map(|(_, _, a)| a.memory.occupied().collect::<Vec<_>>()).collect();
    taken.sort_unstable();
    let mut at = LOWEST;
    for (start, end) in taken {
        if start > at && start - at >= len + (1 << 20) {
            break;
        }
        at = at.max(end);
    }
    let at = (at + (1 << 20)).next_multiple_of(1 << 16);
    if at + len > HIGHEST {
        return Err(Error::Usage { what: "no address is free in all tasks".into() });
    }
    Ok(at)
}

/// Who comes to which stage.
fn expect(tree: &Tree, files: &RestoreFiles<'_>, arena: &mut Arena<'_>) {
    let alive = tree.alive().count() as u32;
    let threads: u32 = tree.alive().map(|(_, _, a)| a.threads.len() as u32).sum();
    let helpers = tree.nodes.iter().filter(|n| matches!(n.kind, Kind::Helper)).count() as u32;
    arena.expect(FORKED, tree.nodes.len() as u32);
    // threads that have something to do for rings wait for files
    let others = tree.alive().flat_map(|(_, _, a)| a.threads.iter().skip(1));
    let with_rings =
        others.filter(|(tid, _)| io_uring::Thread { tid: *tid, table: &[] }.has_work(files)).count() as u32;
    arena.expect(FILLED, alive + helpers + with_rings);
    arena.expect(BEFORE_CREDS, threads);
    arena.expect(POWERLESS, threads);
    arena.expect(READY, threads);
}

/// In a new PID namespace ids are given out from the highest of the tree on, not from 1: nobody gets the id of someone whose
/// end has been forgotten a moment ago (proc(5), ns_last_pid).
fn go_on_counting(fd: i32, tree: &Tree, plan: &mut Plan) {
    let highest = tree.ids().into_iter().max().unwrap_or(1).to_string();
    let text = plan.bytes(highest.as_bytes());
    plan.ask("the last id", libc::SYS_write, &[fd.into(), text.into(), highest.len().into()]);
}

/// Sets everything by ptrace that a task cannot set for itself, and that is stopped; the leader's general registers come
/// last.
fn set_registers(a: &Alive, hosts: &Hosts) -> Result<()> {
    // what the image does not say of the state is the same in all threads, which have run nothing but the executor
    let fresh = ptrace::xstate(hosts.id(a.threads[0].0)?)?;
    for (tid, entry) in &a.threads {
        let tid = &hosts.id(*tid)?;
        let (info, core) = core::parts(entry)?;
        let state = registers::xstate_from_entry(&info.fpregs, fresh.clone()).task(*tid)?;
        ptrace::set_xstate(*tid, &state).task(*tid)?;
        if entry.tc.is_none() {
            ptrace::set_signal_mask(*tid, core.blk_sigset.unwrap_or(0)).task(*tid)?;
            ptrace::set_registers(*tid, &registers::from_entry(&info.gpregs)?).task(*tid)?;
        }
    }
    Ok(())
}

/// The leader's mask and registers, once it is out of the executor.
fn set_leader(a: &Alive, hosts: &Hosts) -> Result<()> {
    let (tid, entry) = &a.threads[0];
    let tid = &hosts.id(*tid)?;
    let (info, core) = core::parts(entry)?;
    let mask = core.blk_sigset.or(entry.tc.as_ref().map(|t| t.blk_sigset)).unwrap_or(0);
    ptrace::set_signal_mask(*tid, mask)?;
    ptrace::set_registers(*tid, &registers::from_entry(&info.gpregs)?)
}

/// True if the running kernel's vdso stays where it was parked, because the task's old one jumps into it.
fn keeps_parked(a: &Alive, birth: &Birth) -> bool {
    a.memory.vdso().vdso != 0 && a.memory.vdso_bytes() != birth.vdso.bytes
}

fn stop_signal(a: &Alive, opts: &Options) -> Option<i32> {
    let tc = a.threads[0].1.tc.as_ref()?;
    if tc.task_state == core::STOPPED {
        let signal = i32::try_from(tc.stop_signo.unwrap_or(0)).unwrap_or(0);
        let known = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal);
        return Some(if known { signal } else { libc::SIGSTOP });
    }
    let waits = crate::signals::stops(tc.signals_s.as_ref());
    (waits || opts.final_state == FinalState::Stop).then_some(libc::SIGSTOP)
}

/// The root's pid, for the caller; the file must not exist.
fn write_pidfile(opts: &Options, path: &std::path::Path, pid: i32) -> Result<()> {
    use std::io::Write;
    let path = opts.in_work_dir(path);
    let mut file =
        File::options().write(true).create_new(true).open(&path).call("open").at(Place::Path(path.clone()))?;
    file.write_all(pid.to_string().as_bytes()).call("write").at(Place::Path(path))
}
