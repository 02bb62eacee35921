//! `core-N.img`: what a task and its threads are to the kernel, apart from memory and files.

use standstill_images::proto::{
    core_entry, CoreEntry, RlimitEntry, RseqEntry, TaskCoreEntry, TaskRlimitsEntry, ThreadCoreEntry, ThreadInfoX86,
    UserDescT,
};

use super::facts::{Facts, ThreadFacts};
use super::{creds, registers};
use crate::error::{At as _, Error, Result};
use crate::namespaces::user::Users;
use crate::plan::{At, Data, Plan};
use crate::tracee::{Answers, Stopped};
use crate::{signals, timers};

const PR_GET_DUMPABLE: i32 = 3;
const PR_GET_PDEATHSIG: i32 = 2;
const PR_GET_CHILD_SUBREAPER: i32 = 37;
const PR_GET_TID_ADDRESS: i32 = 40;
const PR_GET_THP_DISABLE: i32 = 42;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;

/// `task_state` of a running task.
pub const ALIVE: u32 = 1;
/// `task_state` of a zombie.
pub const DEAD: u32 = 2;
/// `task_state` of a task that job control stopped.
pub const STOPPED: u32 = 3;

/// What is asked in each thread.
#[derive(Debug)]
pub struct ThreadAsked {
    stack: Data,
    tid_address: Data,
    death_signal: Data,
    securebits: At,
}

/// What is asked in the group leader besides.
#[derive(Debug)]
pub struct TaskAsked {
    actions: Data,
    timers: timers::Asked,
    dumpable: At,
    thp_disabled: At,
    subreaper: Data,
    brk: At,
    membarrier: At,
    clocks: Data,
}

/// Questions for the thread that runs `plan`.
pub fn ask_thread(plan: &mut Plan) -> ThreadAsked {
    let stack = signals::ask_stack(plan);
    let tid_address = plan.room(8);
    plan.call("address for the thread's end", libc::SYS_prctl, &[PR_GET_TID_ADDRESS.into(), tid_address.into()]);
    let death_signal = plan.room(8);
    plan.call("parent's death signal", libc::SYS_prctl, &[PR_GET_PDEATHSIG.into(), death_signal.into()]);
    let securebits = creds::ask(plan);
    ThreadAsked { stack, tid_address, death_signal, securebits }
}

/// Questions for the group leader.
pub fn ask_task(facts: &Facts, plan: &mut Plan) -> TaskAsked {
    let actions = signals::ask_actions(plan);
    let timers = timers::ask(&facts.timers, plan);
    let zero = || crate::plan::Arg::from(0);
    let dumpable = plan.call("dumpable", libc::SYS_prctl, &[PR_GET_DUMPABLE.into()]);
    let thp_disabled =
        plan.ask("huge pages", libc::SYS_prctl, &[PR_GET_THP_DISABLE.into(), zero(), zero(), zero(), zero()]);
    let subreaper = plan.room(8);
    plan.call("subreaper", libc::SYS_prctl, &[PR_GET_CHILD_SUBREAPER.into(), subreaper.into(), zero(), zero(), zero()]);
    let brk = plan.call("break", libc::SYS_brk, &[zero()]);
    let membarrier = plan.ask(
        "membarrier registrations",
        libc::SYS_membarrier,
        &[MEMBARRIER_CMD_GET_REGISTRATIONS.into(), zero(), zero()],
    );
    let clocks = plan.room(32);
    for (i, clock) in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].into_iter().enumerate() {
        let at = crate::plan::Arg::Data(clocks.offset + i as u64 * 16);
        plan.call("clock", libc::SYS_clock_gettime, &[clock.into(), at]);
    }
    TaskAsked { actions, timers, dumpable, thp_disabled, subreaper, brk, membarrier, clocks }
}

/// Answers that go into other images than `core`.
#[derive(Debug, Clone, Copy, Default)]
pub struct MoreAnswers {
    /// PR_GET_DUMPABLE.
    pub dumpable: i32,
    /// PR_GET_THP_DISABLE.
    pub thp_disabled: bool,
    /// The program break.
    pub brk: u64,
    /// CLOCK_MONOTONIC of the task's time namespace, seconds and nanoseconds.
    pub monotonic: (u64, u64),
    /// CLOCK_BOOTTIME.
    pub boottime: (u64, u64),
}

/// The answers that other images need.
pub fn more(asked: &TaskAsked, a: &Answers) -> MoreAnswers {
    MoreAnswers {
        dumpable: a.result(asked.dumpable) as i32,
        thp_disabled: a.result(asked.thp_disabled) & 1 == 1,
        brk: a.result(asked.brk) as u64,
        monotonic: (a.u64(asked.clocks, 0), a.u64(asked.clocks, 1)),
        boottime: (a.u64(asked.clocks, 2), a.u64(asked.clocks, 3)),
    }
}

/// The part of an entry that every thread has.
pub fn thread_entry(
    thread: &Stopped,
    facts: &ThreadFacts,
    asked: &ThreadAsked,
    a: &Answers,
    leader: bool,
    users: &Users,
) -> Result<CoreEntry> {
    let tid = thread.tid();
    let (nice, policy, priority) = facts.sched;
    let rseq = thread.rseq;
    let death_signal = a.u32(asked.death_signal, 0);
    let core = ThreadCoreEntry {
        futex_rla: facts.robust.0,
        futex_rla_len: u32::try_from(facts.robust.1).unwrap_or(0),
        sched_nice: Some(nice),
        sched_policy: Some(policy),
        sched_prio: (matches!(policy & 0xff, 1 | 2)).then_some(priority),
        blk_sigset: (!leader).then_some(thread.mask),
        sas: Some(signals::stack(a, asked.stack)),
        pdeath_sig: (death_signal != 0).then_some(death_signal),
        signals_p: Some(signals::queue(&thread.pending)),
        creds: Some(creds::entry(&facts.status, asked.securebits, a, users)),
        seccomp_mode: facts.status.seccomp.filter(|&m| m != 0).and_then(|m| i32::try_from(m).ok()),
        seccomp_filter: None,
        comm: Some(facts.comm.clone()),
        blk_sigset_extended: None,
        rseq_entry: Some(RseqEntry {
            rseq_abi_pointer: rseq.address,
            rseq_abi_size: rseq.size,
            signature: rseq.signature,
            rseq_cs_pointer: None,
        }),
        cg_set: Some(1),
    };
    let info = ThreadInfoX86 {
        clear_tid_addr: a.u64(asked.tid_address, 0),
        gpregs: registers::to_entry(&thread.registers_for_image()),
        fpregs: registers::xstate_to_entry(&thread.xstate).task(tid)?,
        tls: (12..15).map(empty_descriptor).collect(),
    };
    Ok(CoreEntry {
        mtype: core_entry::March::X8664 as i32,
        thread_info: Some(info),
        thread_core: Some(core),
        ..Default::default()
    })
}

/// A slot of the GDT that a 64-bit task does not use.
fn empty_descriptor(entry_number: u32) -> UserDescT {
    UserDescT { entry_number, read_exec_only: true, seg_not_present: true, ..Default::default() }
}

/// The part that only the group leader has.
pub fn task_entry(
    leader: &Stopped,
    facts: &Facts,
    asked: &TaskAsked,
    a: &Answers,
    flags: u64,
) -> Result<TaskCoreEntry> {
    let registrations = a.result(asked.membarrier);
    Ok(TaskCoreEntry {
        task_state: if leader.group_stop.is_some() { STOPPED } else { ALIVE },
        exit_code: 0,
        personality: facts.personality,
        flags: flags as u32,
        blk_sigset: leader.mask,
        comm: facts.threads[0].comm.clone(),
        timers: Some(timers::entry(&facts.timers, &asked.timers, a, |tid| in_own_namespace(facts, tid))),
        rlimits: Some(TaskRlimitsEntry {
            rlimits: facts.limits.iter().map(|l| RlimitEntry { cur: l.current, max: l.maximum }).collect(),
        }),
        cg_set: None,
        signals_s: Some(signals::queue(&leader.shared_pending)),
        old_seccomp_mode: None,
        old_seccomp_filter: None,
        loginuid: facts.loginuid,
        oom_score_adj: Some(facts.oom_score_adj),
        sigactions: signals::actions(a, asked.actions),
        child_subreaper: Some(a.u32(asked.subreaper, 0) != 0),
        blk_sigset_extended: None,
        stop_signo: leader.group_stop.and_then(|s| u32::try_from(s).ok()),
        membarrier_registration_mask: u32::try_from(registrations).ok().filter(|&m| m != 0),
    })
}

/// The id that a thread has in its own, innermost pid namespace.
pub fn in_own_namespace(facts: &Facts, tid: i32) -> i32 {
    facts.threads.iter().find(|t| t.status.pid == tid).and_then(|t| t.status.ns_pid.last().copied()).unwrap_or(tid)
}

/// A zombie's entry.
pub fn dead_entry(exit_code: i32, stat: &crate::proc::stat::Stat) -> CoreEntry {
    let tc = TaskCoreEntry {
        task_state: DEAD,
        exit_code: exit_code as u32,
        comm: stat.comm.clone(),
        flags: stat.flags as u32,
        ..Default::default()
    };
    CoreEntry { mtype: core_entry::March::X8664 as i32, tc: Some(tc), ..Default::default() }
}

/// The parts of an entry that a restore of a living thread cannot do without.
pub fn parts(core: &CoreEntry) -> Result<(&ThreadInfoX86, &ThreadCoreEntry)> {
    if core.mtype != core_entry::March::X8664 as i32 {
        return Err(Error::refused(
            "a task of another CPU architecture",
            "restore it on the kind of machine that it was dumped on",
        ));
    }
    let lie = |what| Error::lie("core", what);
    Ok((
        core.thread_info.as_ref().ok_or_else(|| lie("a living thread without registers"))?,
        core.thread_core.as_ref().ok_or_else(|| lie("a living thread without its part"))?,
    ))
}
