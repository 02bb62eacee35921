//! The plan of each task and thread of a restore: everything that only the task itself can do, in the order in which it
//! must be done.
//!
//! | stage | reached when | then the engine |
//! |---|---|---|
//! | 1 | every process exists, and private memory is filled | opens files that need living tasks (/proc/PID, pidfds) |
//! | 2 | groups are joined, threads exist, files are in place | seals memfds, waits for zombies |
//! | 3 | only what takes away power is left: seccomp, credentials | seizes all, holds filters off |
//! | 4 | everyone has its credentials, each change of which made the process undumpable | |
//! | 5 | nothing is left | sets registers, unmaps the executor, lets go |

use std::cell::RefCell;
use std::collections::HashMap;

use rayon::prelude::*;
use standstill_images::proto::{FdinfoEntry, FsEntry, SeccompEntry, ThreadCoreEntry};
use standstill_restorer::plan::{Code, Expect};

mod layout;

use super::tree::{Alive, Kind, Node, Tree};
use super::{core, creds, seccomp};
use crate::error::{At, Call, Error, Result};
use crate::files::locks::{self, Held};
use crate::files::{io_uring, regular, tty, RestoreFiles};
use crate::memory::fill::Helpers;
use crate::memory::late;
use crate::memory::rebuild::{Compared, Figures, Inherited, Memory, Numbers};
use crate::memory::vdso::Layout;
use crate::namespaces::user::Users;
use crate::plan::arena::{Arena, Slot};
use crate::plan::{Arg, Plan};
use crate::proc::status::Status;
use crate::{signals, timers};

/// Every process exists.
pub const FORKED: usize = 1;
/// Files are in place.
pub const FILLED: usize = 2;
/// Only seccomp and credentials are left.
pub const BEFORE_CREDS: usize = 3;
/// Everyone has its credentials.
pub const POWERLESS: usize = 4;
/// Nothing is left.
pub const READY: usize = 5;

/// The engine's own state, which tasks are born with.
#[derive(Debug)]
pub struct Birth {
    /// Credentials.
    pub status: Status,
    /// Scheduling policy.
    pub policy: u32,
    /// Resource limits.
    pub limits: Vec<crate::proc::limits::Limit>,
    /// /proc/self/oom_score_adj.
    pub oom_score_adj: i32,
    /// /proc/self/loginuid.
    pub loginuid: Option<u32>,
    /// Our vdso: its pieces as the kernel maps them, and its bytes.
    pub vdso: Vdso,
    /// timens offsets are made by the root.
    pub personality: u32,
}

impl Birth {
    /// The same of a root that was born into a user namespace with these ids, as process `pid` of ours.
    pub fn inside(&self, pid: i32, users: &Users) -> Result<Birth> {
        let mut buffer = Vec::new();
        crate::proc::read_proc(format!("/proc/{pid}/status").as_ref(), &mut buffer).call("read(/proc/PID/status)")?;
        let status = creds::inside(crate::proc::status::parse(&buffer)?, users);
        let (limits, vdso) = (self.limits.clone(), self.vdso.clone());
        Ok(Birth { status, limits, vdso, ..*self })
    }
}

/// The running kernel's vdso.
#[derive(Debug, Clone)]
pub struct Vdso {
    /// As laid out in this process.
    pub layout: Layout,
    /// Each area: first address, length.
    pub pieces: Vec<(u64, u64)>,
    /// The code.
    pub bytes: Vec<u8>,
}

/// Descriptors as numbers in the tasks, and what belongs to whom.
#[derive(Debug)]
pub struct Table<'a> {
    /// Numbers from here on are ours until the end…
    pub base: i32,
    /// … as many as this.
    pub room: i32,
    /// By file id.
    pub files: HashMap<u32, i32>,
    /// Files that no task has, in messages between sockets: file id, number.
    pub in_flight: Vec<(u32, i32)>,
    /// Files that are opened late: number in the engine, by id.
    pub late: HashMap<u32, i32>,
    /// A pidfd of the engine, to take late files with.
    pub engine: i32,
    /// In a user namespace of its own a task may not take from the engine: sockets that the engine sends late files to, by pid.
    pub late_doors: HashMap<i32, i32>,
    /// A number for a late file that came so.
    pub spare: i32,
    /// Who wants which late files through its socket, in this order.
    pub wanted: RefCell<Vec<(i32, u32)>>,
    /// Behind areas, and pages images.
    pub numbers: Numbers,
    /// Who brings memory later, by pid.
    pub late_memory: HashMap<i32, late::Door>,
    /// Executables by file id.
    pub exes: HashMap<u32, i32>,
    /// The terminal that a session leader takes, and its foreground group, by pid.
    pub terminals: HashMap<i32, (i32, u32)>,
    /// Network namespaces by id, if the tree has several.
    pub networks: HashMap<u32, i32>,
    /// Mount namespaces by id, but for that of the root.
    pub mounts: HashMap<u32, i32>,
    /// Folders by file id.
    pub folders: HashMap<u32, i32>,
    /// Descriptor tables by id.
    pub tables: HashMap<u32, Vec<FdinfoEntry>>,
    /// cwd, root and umask by pid.
    pub fs: HashMap<i32, FsEntry>,
    /// File ids of folders that are the root which tasks have anyway: no chroot needed.
    pub own_root: Vec<u32>,
    /// The files themselves.
    pub restore: &'a RestoreFiles<'a>,
}

impl Table<'_> {
    /// Lets task `pid` take a late file: its number there, for a moment. None if it is not one of them.
    pub fn take(&self, pid: i32, id: u32, what: &'static str, plan: &mut Plan) -> Option<Arg> {
        let &number = self.late.get(&id)?;
        let Some(&door) = self.late_doors.get(&pid) else {
            let got = plan.call(what, libc::SYS_pidfd_getfd, &[self.engine.into(), number.into(), 0.into()]);
            return Some(Arg::Result(got.0));
        };
        self.wanted.borrow_mut().push((pid, id));
        let args = [door.into(), self.spare.into(), 1.into()];
        plan.op(Code::ReceiveFds, 0, &args, Expect::Exact, [1, 0], what);
        Some(self.spare.into())
    }
}

/// All that plans are made from.
#[derive(Debug)]
pub struct Script<'a> {
    /// Who there is.
    pub tree: &'a Tree,
    /// What tasks are born with.
    pub birth: &'a Birth,
    /// Descriptors.
    pub table: &'a Table<'a>,
    /// seccomp.img.
    pub filters: &'a SeccompEntry,
    /// Slots by node.
    pub slots: Vec<Slot>,
    /// Slots by thread id, group leaders left out.
    pub threads: HashMap<i32, Slot>,
    /// Where the vdso waits.
    pub parked: Layout,
    /// How many may fill memory at once (`--jobs`).
    pub jobs: Option<usize>,
}

impl Script<'_> {
    /// Writes all plans, but that of the root into `root` instead of the arena: it has a preamble to run first.
    pub fn write(&self, arena: &mut Arena<'_>) -> Result<(Plan, Figures)> {
        let mut figures = Figures::default();
        let mut helpers = Helpers::new(self.jobs, self.tree.ids());
        let compared = self.compare()?;
        let mut made: HashMap<usize, Inherited> = HashMap::new();
        let mut root = None;
        let mut seen_tables = HashMap::new();
        let mut first_holder: HashMap<u32, (usize, i32)> = HashMap::new();
        for (i, node, _) in self.tree.alive() {
            for entry in self.entries(i)? {
                first_holder.entry(entry.id).or_insert((i, entry.fd as i32));
            }
            seen_tables.entry(self.files_id(i)).or_insert(node.pid);
        }
        let locks = self.locks()?;
        for i in 0..self.tree.nodes.len() {
            let node = &self.tree.nodes[i];
            let plan = match &node.kind {
                Kind::Helper => self.helper(node, arena)?,
                Kind::Dead { status, comm } => self.dead(node, *status, comm, arena)?,
                Kind::Alive(alive) => {
                    let inherited = self.tree.memory_parent(i).and_then(|p| made.get(&p));
                    let owns_table = seen_tables.get(&self.files_id(i)) == Some(&node.pid);
                    let locks = owns_table.then(|| locks.get(&self.files_id(i)).map_or(&[][..], Vec::as_slice));
                    let (plan, areas) = self
                        .process(
                            i,
                            node,
                            alive,
                            inherited,
                            compared.get(&i),
                            locks,
                            &first_holder,
                            arena,
                            &mut helpers,
                            &mut figures,
                        )
                        .task(node.pid)?;
                    made.insert(i, areas);
                    for (tid, entry) in alive.threads.iter().skip(1) {
                        let slot = *self.threads.get(tid).ok_or(Error::Gone)?;
                        let mut plan = Plan::new();
                        let (info, core) = core::parts(entry)?;
                        let rings = io_uring::Thread { tid: *tid, table: self.entries(i)? };
                        if rings.has_work(self.table.restore) {
                            stage(FILLED, &mut plan);
                            rings.work(self.table.restore, &mut plan).task(*tid)?;
                        }
                        self.thread(node, core, info.clear_tid_addr, *tid, &mut plan).task(*tid)?;
                        arena.load(slot, *tid, plan)?;
                    }
                    plan
                }
            };
            if i == 0 {
                root = Some(plan);
            } else {
                arena.load(self.slots[i], node.pid, plan)?;
            }
        }
        Ok((root.ok_or(Error::Gone)?, figures))
    }

    /// Compares the memory of each task with that of the one that it is cloned from, all tasks side by side.
    fn compare(&self) -> Result<HashMap<usize, Compared>> {
        let mut pairs = Vec::new();
        for (i, node, alive) in self.tree.alive() {
            let parent = self.tree.memory_parent(i).map(|p| &self.tree.nodes[p].kind);
            if let Some(Kind::Alive(parent)) = parent {
                pairs.push((i, node.pid, &alive.memory, &parent.memory));
            }
        }
        let one = |(i, pid, own, parent): (usize, i32, &Memory, &Memory)| Ok((i, own.compare(parent).task(pid)?));
        if pairs.len() < 2 || self.jobs == Some(1) {
            return pairs.into_iter().map(one).collect();
        }
        pairs.into_par_iter().map(one).collect()
    }

    /// About how long it takes, in microseconds, from arming timers to letting everyone go.
    fn grace(&self) -> u64 {
        let threads = self.tree.nodes.len() + self.threads.len();
        (3_000 + 50 * threads as u64).min(200_000)
    }

    fn files_id(&self, i: usize) -> u32 {
        match &self.tree.nodes[i].kind {
            Kind::Alive(a) => a.ids.files_id,
            Kind::Dead { .. } | Kind::Helper => 0,
        }
    }

    /// Locks by the descriptor table of the task that holds them.
    fn locks(&self) -> Result<HashMap<u32, Vec<Held>>> {
        let locks = &self.table.restore.locks;
        if locks.is_empty() {
            return Ok(HashMap::new());
        }
        let of: HashMap<i32, u32> = self.tree.alive().map(|(_, node, a)| (node.pid, a.ids.files_id)).collect();
        locks.by_table(|pid| of.get(&pid).copied(), &self.table.tables)
    }

    fn entries(&self, i: usize) -> Result<&[FdinfoEntry]> {
        Ok(self.table.tables.get(&self.files_id(i)).map_or(&[], Vec::as_slice))
    }

    /// A helper holds its place until everyone is in its group or session.
    fn helper(&self, node: &Node, arena: &Arena<'_>) -> Result<Plan> {
        let mut plan = Plan::new();
        self.join(node, &mut plan);
        for &c in &node.children {
            self.clone_child(None, c, arena, &mut plan)?;
        }
        stage(FORKED, &mut plan);
        stage(FILLED, &mut plan);
        plan.op(Code::Exit, 0, &[0.into()], Expect::Any, [0; 2], "the helper's end");
        Ok(plan)
    }

    /// A zombie ends as it had ended.
    fn dead(&self, node: &Node, status: i32, comm: &[u8], arena: &Arena<'_>) -> Result<Plan> {
        let mut plan = Plan::new();
        self.join(node, &mut plan);
        for &c in &node.children {
            self.clone_child(None, c, arena, &mut plan)?;
        }
        stage(FORKED, &mut plan);
        if node.pgid != node.pid && node.pgid != 0 {
            plan.call("process group", libc::SYS_setpgid, &[0.into(), node.pgid.into()]);
        }
        name(comm, &mut plan);
        let signal = status & 0x7f;
        if signal == 0 {
            plan.op(Code::Exit, 0, &[(status >> 8 & 0xff).into()], Expect::Any, [0; 2], "a zombie's end");
        } else {
            // no core file, and no handler: a fresh task has the default action
            let none = plan.words(&[0, 0]);
            plan.call("no core file", libc::SYS_prlimit64, &[0.into(), 4.into(), none.into(), 0.into()]);
            plan.call("no core file", libc::SYS_prctl, &[4.into(), 0.into()]);
            let mask = plan.words(&[!(1u64 << (signal - 1))]);
            plan.call("signal of a zombie", libc::SYS_kill, &[node.pid.into(), signal.into()]);
            plan.call("a zombie's end", libc::SYS_rt_sigprocmask, &[2.into(), mask.into(), 0.into(), 8.into()]);
        }
        Ok(plan)
    }

    /// Session and own group; children that must be born before are the caller's.
    fn join(&self, node: &Node, plan: &mut Plan) {
        if node.sid == node.pid {
            plan.call("session", libc::SYS_setsid, &[]);
        } else if node.pgid == node.pid {
            plan.call("own group", libc::SYS_setpgid, &[0.into(), 0.into()]);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn process(
        &self,
        i: usize,
        node: &Node,
        alive: &Alive,
        inherited: Option<&Inherited>,
        compared: Option<&Compared>,
        locks: Option<&[Held]>,
        first_holder: &HashMap<u32, (usize, i32)>,
        arena: &mut Arena<'_>,
        helpers: &mut Helpers,
        figures: &mut Figures,
    ) -> Result<(Plan, Inherited)> {
        let mut plan = Plan::new();
        let memory = &alive.memory;
        let pid = u32::try_from(node.pid).unwrap_or(0);
        let network = |n: &Node| match &n.kind {
            Kind::Alive(a) => a.ids.net_ns_id,
            Kind::Dead { .. } | Kind::Helper => None,
        };
        // the root is born in its own, and a child of who is there as well; in a user namespace it may be that nobody can enter it
        let is_there =
            node.parent.is_none_or(|p| network(&self.tree.nodes[p]).is_some_and(|id| Some(id) == alive.ids.net_ns_id));
        let network = self.table.networks.get(&alive.ids.net_ns_id.unwrap_or(0)).filter(|_| !is_there);
        if let Some(&fd) = network {
            plan.call("network namespace", libc::SYS_setns, &[fd.into(), libc::CLONE_NEWNET.into()]);
        }
        let empty = Inherited::default();
        let found = compared.map(|c| (inherited.unwrap_or(&empty), c));
        let shared_with_children = self.tree.heirs(i).iter().any(|&c| match &self.tree.nodes[c].kind {
            Kind::Alive(a) => memory.shares_with(&a.memory),
            Kind::Dead { .. } | Kind::Helper => false,
        });
        let keep = arena.range();
        // what a child is to share must be there when it is cloned; what it would find by chance must be known
        let early = shared_with_children || (!node.children.is_empty() && inherited.is_some_and(|i| !i.is_empty()));
        let mut areas = Inherited::default();
        if early {
            areas = memory.make_private(pid, found, keep, &self.table.numbers, helpers, &mut plan, figures)?;
        }
        for &c in node.children.iter().filter(|&&c| self.tree.before_session(i, c)) {
            self.clone_child(Some(alive), c, arena, &mut plan)?;
        }
        self.join(node, &mut plan);
        if let Some(&(fd, _)) = self.table.terminals.get(&node.pid) {
            tty::take_control(fd, &mut plan);
        }
        for &c in node.children.iter().filter(|&&c| !self.tree.before_session(i, c)) {
            self.clone_child(Some(alive), c, arena, &mut plan)?;
        }
        let for_children = areas.clone();
        if !early {
            areas = memory.make_private(pid, found, keep, &self.table.numbers, helpers, &mut plan, figures)?;
        }
        memory.settle(&areas, keep, &self.table.numbers, &mut plan)?;
        if self.tree.adopts(i) {
            plan.call("taking in orphans", libc::SYS_prctl, &[36.into(), 1.into(), 0.into(), 0.into(), 0.into()]);
        }
        self.before_late_files(node, &mut plan);
        tty::open_controlling(node.pid, self.table.restore, &mut plan)?;
        io_uring::make(node.pid, self.table.restore, &mut plan);
        let late = self.table.late_memory.get(&node.pid);
        if let Some(late) = late {
            late.make(&mut plan);
        }
        stage(FORKED, &mut plan);
        if let Some(late) = late {
            late.made(&mut plan);
        }
        if node.pgid != node.pid && node.pgid != 0 {
            plan.call("process group", libc::SYS_setpgid, &[0.into(), node.pgid.into()]);
        }
        for (tid, _) in alive.threads.iter().skip(1) {
            let slot = *self.threads.get(tid).ok_or(Error::Gone)?;
            self.clone_thread(*tid, slot, arena, &mut plan);
        }
        if locks.is_some() {
            self.descriptors(i, first_holder, &mut plan)?;
        }
        let parked = self.birth.vdso.pieces.iter().map(|&(start, len)| (self.parked_at(start), len));
        let ours: Vec<_> =
            [(keep.0, arena.parking())].into_iter().chain(parked.map(|(at, len)| (at, at + len))).collect();
        let take = |id: u32, plan: &mut Plan| self.table.take(node.pid, id, "io_uring", plan);
        io_uring::map_areas(&memory.mm.vmas, &ours, &take, &mut plan)?;
        self.place_vdso(alive, &mut plan)?;
        self.describe_memory(alive, &mut plan)?;
        let (info, thread_core) = core::parts(&alive.threads[0].1)?;
        let tc = alive.threads[0].1.tc.as_ref().ok_or_else(|| Error::lie("core", "a process without its part"))?;
        self.write_self(
            "/proc/self/oom_score_adj",
            tc.oom_score_adj.filter(|&v| v != self.birth.oom_score_adj),
            &mut plan,
        );
        let loginuid = tc.loginuid.filter(|&v| v != u32::MAX && Some(v) != self.birth.loginuid);
        self.write_self("/proc/self/loginuid", loginuid, &mut plan);
        if let Some(user) = loginuid.filter(|_| self.table.restore.users.are_own()) {
            // nobody may do it for another task; it is refused if there is one already
            self.say_who_logged_in(user, &mut plan);
        }
        self.folders(node, &mut plan)?;
        stage(FILLED, &mut plan);
        io_uring::Thread { tid: node.pid, table: self.entries(i)? }.work(self.table.restore, &mut plan)?;
        self.await_children(node, &mut plan);
        if let Some(&(fd, group)) = self.table.terminals.get(&node.pid) {
            tty::set_foreground(fd, group, &mut plan);
        }
        // inherited actions are all default: nobody sets them before its children exist
        signals::restore_actions(&tc.sigactions, &mut plan)?;
        if let Some(t) = &tc.timers {
            timers::restore_posix(t, &mut plan)?;
        }
        for bit in (0..32).filter(|b| tc.membarrier_registration_mask.unwrap_or(0) >> b & 1 == 1) {
            plan.call("membarrier registration", libc::SYS_membarrier, &[(1u32 << bit).into(), 0.into(), 0.into()]);
        }
        self.limits(tc.rlimits.as_ref().map_or(&[], |r| &r.rlimits), &mut plan);
        if let Some(p) = personality_of(tc.personality).filter(|&p| p != self.birth.personality) {
            plan.call("personality", libc::SYS_personality, &[p.into()]);
        }
        if tc.child_subreaper == Some(true) || self.tree.adopts(i) {
            let on = u32::from(tc.child_subreaper == Some(true));
            plan.call("subreaper", libc::SYS_prctl, &[36.into(), on.into(), 0.into(), 0.into(), 0.into()]);
        }
        signals::restore_queue(tc.signals_s.as_ref(), node.pid, None, &mut plan)?;
        self.thread_state(node, thread_core, info.clear_tid_addr, node.pid, &mut plan)?;
        self.lose_power(thread_core, locks, &mut plan)?;
        dumpable(alive.memory.mm.dumpable, &mut plan);
        if let Some(t) = &tc.timers {
            timers::arm(t, self.grace(), &mut plan)?;
        }
        stage(READY, &mut plan);
        Ok((plan, for_children))
    }

    /// The plan of a thread that is not the leader.
    fn thread(&self, node: &Node, core: &ThreadCoreEntry, tid_address: u64, tid: i32, plan: &mut Plan) -> Result<()> {
        self.thread_state(node, core, tid_address, tid, plan)?;
        self.lose_power(core, None, plan)?;
        stage(READY, plan);
        Ok(())
    }

    /// What every thread has of its own, and keeps its power for.
    fn thread_state(
        &self,
        node: &Node,
        core: &ThreadCoreEntry,
        tid_address: u64,
        tid: i32,
        plan: &mut Plan,
    ) -> Result<()> {
        plan.call("address for the thread's end", libc::SYS_set_tid_address, &[tid_address.into()]);
        if let Some(comm) = &core.comm {
            name(comm, plan);
        }
        signals::restore_stack(core.sas.as_ref(), plan);
        if core.futex_rla != 0 {
            plan.call("robust futexes", libc::SYS_set_robust_list, &[core.futex_rla.into(), core.futex_rla_len.into()]);
        }
        if let Some(r) = core.rseq_entry.as_ref().filter(|r| r.rseq_abi_pointer != 0 && r.rseq_abi_size != 0) {
            let args = [r.rseq_abi_pointer.into(), r.rseq_abi_size.into(), 0.into(), r.signature.into()];
            plan.call("restartable sequences", libc::SYS_rseq, &args);
        }
        let (policy, nice) = (core.sched_policy.unwrap_or(0), core.sched_nice.unwrap_or(0));
        // a task is born with the engine's own
        if policy != 0 || self.birth.policy != 0 {
            let priority = plan.words(&[u64::from(core.sched_prio.unwrap_or(0))]);
            plan.call("scheduling policy", libc::SYS_sched_setscheduler, &[0.into(), policy.into(), priority.into()]);
        }
        plan.call("nice value", libc::SYS_setpriority, &[0.into(), 0.into(), nice.into()]);
        signals::restore_queue(core.signals_p.as_ref(), node.pid, Some(tid), plan)?;
        Ok(())
    }

    /// Locks, seccomp and credentials: after this, little is allowed. Only the one who sets a table up has `locks`.
    fn lose_power(&self, core: &ThreadCoreEntry, locks: Option<&[Held]>, plan: &mut Plan) -> Result<()> {
        const PR_SET_PDEATHSIG: i32 = 1;
        locks::take_leases(locks.unwrap_or_default(), self.table.restore, plan)?;
        stage(BEFORE_CREDS, plan);
        if let Some(locks) = locks {
            // those that share the table are done with our descriptors, too, when they come to this stage
            let (base, last) = (self.table.base, self.table.base + self.table.room - 1);
            plan.call("our descriptors", libc::SYS_close_range, &[base.into(), last.into(), 0.into()]);
            // a process that closes any descriptor of a file loses its locks on it
            locks::restore(locks, self.table.restore, plan)?;
        }
        seccomp::restore(core, self.filters, plan)?;
        if let Some(c) = &core.creds {
            creds::restore(c, &self.birth.status, plan)?;
        }
        if let Some(signal) = core.pdeath_sig {
            plan.call("parent's death signal", libc::SYS_prctl, &[PR_SET_PDEATHSIG.into(), signal.into()]);
        }
        stage(POWERLESS, plan);
        Ok(())
    }

    fn clone_child(&self, maker: Option<&Alive>, c: usize, arena: &Arena<'_>, plan: &mut Plan) -> Result<()> {
        let child = &self.tree.nodes[c];
        let mut flags = 0u64;
        if let (Kind::Alive(a), Some(alive)) = (&child.kind, maker) {
            if a.ids.files_id == alive.ids.files_id {
                flags |= libc::CLONE_FILES as u64;
            }
            if a.ids.fs_id == alive.ids.fs_id {
                flags |= libc::CLONE_FS as u64;
            }
        }
        let slot = self.slots[c];
        let args = clone_args(flags, libc::SIGCHLD as u64, child.pid, arena.stack(slot), plan);
        let control = arena.control(slot);
        plan.op(
            Code::Clone,
            0,
            &[args.into(), 88.into(), control.into()],
            Expect::Exact,
            [child.pid.into(), 0],
            format!("child {}", child.pid),
        );
        Ok(())
    }

    fn clone_thread(&self, tid: i32, slot: Slot, arena: &Arena<'_>, plan: &mut Plan) {
        let flags = (libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM) as u64;
        let args = clone_args(flags, 0, tid, arena.stack(slot), plan);
        let control = arena.control(slot);
        plan.op(
            Code::Clone,
            0,
            &[args.into(), 88.into(), control.into()],
            Expect::Exact,
            [tid.into(), 0],
            format!("thread {tid}"),
        );
    }

    /// What must be there when the engine opens files of living tasks: something in the place of a descriptor that such a
    /// file is about; the real one comes later, if it was there.
    fn before_late_files(&self, node: &Node, plan: &mut Plan) {
        let files = self.table.late.keys().filter_map(|&id| regular::needs_descriptor(self.table.restore, id));
        let mut numbers: Vec<i32> = files.filter(|&(pid, _)| pid == node.pid).map(|(_, fd)| fd).collect();
        numbers.sort_unstable();
        for fd in numbers.into_iter().filter(|&fd| fd < self.table.base) {
            plan.call("place of a descriptor", libc::SYS_dup3, &[self.table.engine.into(), fd.into(), 0.into()]);
        }
    }

    /// Puts every descriptor at its number, then lets the kinds do what needs all of them.
    fn descriptors(&self, i: usize, first_holder: &HashMap<u32, (usize, i32)>, plan: &mut Plan) -> Result<()> {
        let entries = self.entries(i)?;
        let pid = self.tree.nodes[i].pid;
        for &id in self.table.late.keys() {
            match regular::needs_descriptor(self.table.restore, id) {
                Some((of, fd)) if of == pid && !entries.iter().any(|e| i64::from(e.fd) == i64::from(fd)) => {
                    plan.ask("place of a descriptor", libc::SYS_close, &[fd.into()]);
                }
                _ => {}
            }
        }
        let mut holder = Vec::new();
        for e in entries {
            let fd = i32::try_from(e.fd)
                .ok()
                .filter(|&f| f >= 0 && !(self.table.base..self.table.base + self.table.room).contains(&f))
                .ok_or_else(|| Error::lie("fdinfo", format!("descriptor {}", e.fd)))?;
            let cloexec = if e.flags & 1 != 0 { libc::O_CLOEXEC } else { 0 };
            if let Some(&ours) = self.table.files.get(&e.id) {
                plan.call_exact("descriptor", libc::SYS_dup3, &[ours.into(), fd.into(), cloexec.into()], fd.into());
            } else if let Some(got) = self.table.take(pid, e.id, "late descriptor", plan) {
                // the number that it got may be one that another is to have
                let (dup, up) = (libc::F_DUPFD_CLOEXEC, self.table.base);
                let high = plan.call("late descriptor", libc::SYS_fcntl, &[got, dup.into(), up.into()]);
                plan.call("late descriptor", libc::SYS_close, &[got]);
                let args = [Arg::Result(high.0), fd.into(), cloexec.into()];
                plan.call_exact("late descriptor", libc::SYS_dup3, &args, fd.into());
                plan.call("late descriptor", libc::SYS_close, &[Arg::Result(high.0)]);
            } else {
                let what = format!("descriptor {fd} is of file {:#x}, which is missing", e.id);
                return Err(Error::lie("fdinfo", what));
            }
            if first_holder.get(&e.id) == Some(&(i, fd)) {
                holder.push((e.id, fd));
            }
        }
        // what is in flight is nobody's, and so it is the root's for now; epolls have their targets already
        let sent = self.table.in_flight.iter().filter(|_| self.tree.nodes[i].pid == self.tree.root().pid);
        for &(id, fd) in holder.iter().chain(sent) {
            self.table.restore.in_task(id, fd, plan)?;
        }
        Ok(())
    }

    /// Children that ended are waited for without reaping, helpers are reaped, and the signals of both are swallowed.
    fn await_children(&self, node: &Node, plan: &mut Plan) {
        const P_PID: i32 = 1;
        const WEXITED_WNOWAIT: u32 = 4 | 0x0100_0000;
        let mut any = false;
        for &c in &node.children {
            let child = &self.tree.nodes[c];
            match child.kind {
                Kind::Dead { .. } => {
                    let args = [P_PID.into(), child.pid.into(), 0.into(), WEXITED_WNOWAIT.into(), 0.into()];
                    plan.call("the end of a zombie", libc::SYS_waitid, &args);
                    any = true;
                }
                Kind::Helper => {
                    plan.op(
                        Code::Reap,
                        0,
                        &[child.pid.into(), 0.into()],
                        Expect::NonNegative,
                        [0; 2],
                        "the end of a helper",
                    );
                    any = true;
                }
                Kind::Alive(_) => {}
            }
        }
        if any {
            let set = plan.words(&[1 << (libc::SIGCHLD - 1)]);
            let at_once = plan.words(&[0, 0]);
            plan.ask("signal of a child", libc::SYS_rt_sigtimedwait, &[set.into(), 0.into(), at_once.into(), 8.into()]);
        }
    }

    fn write_self(&self, path: &str, value: Option<impl ToString>, plan: &mut Plan) {
        // in a user namespace of its own it has not the power to; the engine has
        let Some(value) = value.filter(|_| !self.table.restore.users.are_own()) else { return };
        let at = plan.string(path.trim_start_matches("/proc/").as_bytes());
        let text = plan.bytes(value.to_string().as_bytes());
        let fd = plan.call(
            path.to_owned(),
            libc::SYS_openat,
            &[self.table.restore.proc_at.into(), at.into(), libc::O_WRONLY.into(), 0.into()],
        );
        plan.call(path.to_owned(), libc::SYS_write, &[Arg::Result(fd.0), text.into(), text.len.into()]);
        plan.call(path.to_owned(), libc::SYS_close, &[Arg::Result(fd.0)]);
    }

    /// In a user namespace, whose ids are others.
    fn say_who_logged_in(&self, user: u32, plan: &mut Plan) {
        let inner = Some(self.table.restore.users.user(user)).filter(|&inner| inner != u32::MAX).unwrap_or(user);
        let path = plan.string(b"self/loginuid");
        let text = plan.bytes(inner.to_string().as_bytes());
        let what = "the user who logged in";
        let args = [self.table.restore.proc_at.into(), path.into(), libc::O_WRONLY.into(), 0.into()];
        let fd = plan.ask(what, libc::SYS_openat, &args);
        plan.ask(what, libc::SYS_write, &[Arg::Result(fd.0), text.into(), text.len.into()]);
        plan.ask(what, libc::SYS_close, &[Arg::Result(fd.0)]);
    }

    /// Root, then working folder, then umask; a task that shares them with its parent leaves them alone.
    fn folders(&self, node: &Node, plan: &mut Plan) -> Result<()> {
        let fs_id = |n: &Node| match &n.kind {
            Kind::Alive(a) => Some(a.ids.fs_id),
            Kind::Dead { .. } | Kind::Helper => None,
        };
        if node.parent.is_some_and(|p| fs_id(&self.tree.nodes[p]) == fs_id(node)) {
            return Ok(());
        }
        let Some(fs) = self.table.fs.get(&node.pid) else { return Ok(()) };
        // true: it is to be closed
        let folder = |id: u32, plan: &mut Plan| -> Result<(Arg, bool)> {
            if let Some(got) = self.table.take(node.pid, id, "late folder", plan) {
                return Ok((got, true));
            }
            let fd = self.table.folders.get(&id).copied();
            fd.map(|fd| (fd.into(), false)).ok_or_else(|| Error::lie("fs", format!("folder {id:#x} is missing")))
        };
        if let Kind::Alive(a) = &node.kind {
            if let Some(&fd) = self.table.mounts.get(&a.ids.mnt_ns_id.unwrap_or(0)) {
                plan.call("mount namespace", libc::SYS_setns, &[fd.into(), libc::CLONE_NEWNS.into()]);
            }
        }
        let enter = |(at, closed): (Arg, bool), what: &'static str, plan: &mut Plan| {
            plan.call(what, libc::SYS_fchdir, &[at]);
            if closed {
                plan.call(what, libc::SYS_close, &[at]);
            }
        };
        if !self.table.own_root.contains(&fs.root_id) {
            let at = folder(fs.root_id, plan)?;
            enter(at, "root folder", plan);
            let here = plan.string(b".");
            plan.call("root folder", libc::SYS_chroot, &[here.into()]);
        }
        let at = folder(fs.cwd_id, plan)?;
        enter(at, "working folder", plan);
        if let Some(umask) = fs.umask {
            plan.call("umask", libc::SYS_umask, &[umask.into()]);
        }
        Ok(())
    }

    fn limits(&self, limits: &[standstill_images::proto::RlimitEntry], plan: &mut Plan) {
        for (n, l) in limits.iter().enumerate().take(16) {
            if self.birth.limits.get(n).is_some_and(|b| (b.current, b.maximum) == (l.cur, l.max)) && n != 7 {
                continue;
            }
            let data = plan.words(&[l.cur, l.max]);
            // without CAP_SYS_RESOURCE a limit above ours cannot be had; CRIU goes on then, too
            plan.call_or(
                "resource limit",
                libc::SYS_prlimit64,
                &[0.into(), n.into(), data.into(), 0.into()],
                [libc::EPERM, libc::EPERM],
            );
        }
    }
}

/// What a CRIU image says of the personality: CRIU reads the kernel's hexadecimal digits as decimal ones.
fn personality_of(raw: u32) -> Option<u32> {
    if raw & 0xff <= 0x10 {
        return Some(raw);
    }
    u32::from_str_radix(&raw.to_string(), 16).ok()
}

/// 0 and 1 are set; 2 cannot be, it comes from changing credentials as it came before (prctl(2)).
fn dumpable(wanted: Option<i32>, plan: &mut Plan) {
    const PR_SET_DUMPABLE: i32 = 4;
    if let Some(d @ (0 | 1)) = wanted {
        plan.call("dumpable", libc::SYS_prctl, &[PR_SET_DUMPABLE.into(), d.into()]);
    }
}

fn name(comm: &[u8], plan: &mut Plan) {
    const PR_SET_NAME: i32 = 15;
    let text = plan.string(comm.get(..15).unwrap_or(comm));
    plan.call("name", libc::SYS_prctl, &[PR_SET_NAME.into(), text.into()]);
}

fn stage(n: usize, plan: &mut Plan) {
    plan.op(Code::Stage, 0, &[n.into()], Expect::NonNegative, [0; 2], "stage");
}

/// struct clone_args (clone3(2)).
fn clone_args(flags: u64, exit_signal: u64, pid: i32, stack: (u64, u64), plan: &mut Plan) -> crate::plan::Data {
    let pids = plan.bytes(&pid.to_le_bytes());
    let words = [flags, 0, 0, 0, exit_signal, stack.0, stack.1, 0, 0, 1, 0];
    let args = plan.words(&words);
    plan.pointer(args, 64, pids);
    args
}
