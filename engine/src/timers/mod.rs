//! Timers of a process: the three interval timers and its POSIX timers. (timerfd is a file: `files/timerfd.rs`.)
//!
//! Interval timers are asked for with getitimer(2). POSIX timers are listed by /proc/PID/timers, their rest by
//! timer_gettime(2). Both are armed again with what was left at the dump. Image: `core-N.img` (`timers`). What is not
//! kept: that a timer was armed with an absolute time.

use standstill_images::proto::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use standstill_restorer::plan::{Code, Expect};

use crate::error::{Error, Result};
use crate::plan::{Arg, Data, Plan};
use crate::proc::timers::{Notify, PosixTimer};
use crate::tracee::Answers;

/// What was asked of a process's timers.
#[derive(Debug)]
pub struct Asked {
    intervals: Data,
    posix: Data,
    overruns: Vec<crate::plan::At>,
}

/// Asks for interval timers and the POSIX timers in `list`.
pub fn ask(list: &[PosixTimer], plan: &mut Plan) -> Asked {
    let intervals = plan.room(3 * 32);
    for which in 0..3u64 {
        let at = Arg::Data(intervals.offset + which * 32);
        plan.call("interval timer", libc::SYS_getitimer, &[which.into(), at]);
    }
    let posix = plan.room(list.len() * 32);
    let mut overruns = Vec::new();
    for (i, timer) in list.iter().enumerate() {
        let at = Arg::Data(posix.offset + i as u64 * 32);
        plan.call("POSIX timer", libc::SYS_timer_gettime, &[timer.id.into(), at]);
        overruns.push(plan.ask("overrun of a POSIX timer", libc::SYS_timer_getoverrun, &[timer.id.into()]));
    }
    Asked { intervals, posix, overruns }
}

/// The answers, as an image entry. `tid_of` translates a thread id to the task's own pid namespace.
pub fn entry(list: &[PosixTimer], asked: &Asked, answers: &Answers, tid_of: impl Fn(i32) -> i32) -> TaskTimersEntry {
    let interval = |which: usize| {
        let word = |n| answers.u64(asked.intervals, which * 4 + n);
        ItimerEntry { isec: word(0), iusec: word(1), vsec: word(2), vusec: word(3) }
    };
    let posix = list.iter().enumerate().map(|(i, timer)| {
        let word = |n| answers.u64(asked.posix, i * 4 + n);
        PosixTimerEntry {
            it_id: timer.id as u32,
            clock_id: timer.clock_id as u32,
            si_signo: timer.signal as u32,
            it_sigev_notify: sigev_notify(timer),
            sival_ptr: timer.value,
            overrun: asked.overruns.get(i).map_or(0, |&at| u32::try_from(answers.result(at)).unwrap_or(0)),
            isec: word(0),
            insec: word(1),
            vsec: word(2),
            vnsec: word(3),
            notify_thread_id: timer.to_thread.then(|| tid_of(timer.pid)),
        }
    });
    TaskTimersEntry { real: interval(0), virt: interval(1), prof: interval(2), posix: posix.collect() }
}

/// `sigev_notify` of timer_create(2).
fn sigev_notify(timer: &PosixTimer) -> u32 {
    const SIGEV_THREAD_ID: u32 = 4;
    let how = match timer.notify {
        Notify::Signal => 0,
        Notify::None => 1,
        Notify::Thread => 2,
    };
    if timer.to_thread {
        SIGEV_THREAD_ID
    } else {
        how
    }
}

/// Makes the POSIX timers, with their ids, disarmed. Runs in the group leader once all threads exist.
pub fn restore_posix(timers: &TaskTimersEntry, plan: &mut Plan) -> Result<()> {
    const MANY: u32 = 1 << 20;
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    let mut list: Vec<_> = timers.posix.iter().collect();
    list.sort_by_key(|t| t.it_id);
    for pair in list.windows(2) {
        if pair[0].it_id == pair[1].it_id {
            return Err(Error::lie("core", format!("timer {} is there twice", pair[0].it_id)));
        }
    }
    if list.is_empty() {
        return Ok(());
    }
    // where the kernel knows it (6.15), timer_create takes the id that it is given
    plan.ask(
        "timers with given ids",
        libc::SYS_prctl,
        &[PR_TIMER_CREATE_RESTORE_IDS.into(), 1.into(), 0.into(), 0.into(), 0.into()],
    );
    for t in list {
        if t.it_id > MANY {
            return Err(Error::refused(
                format!("a POSIX timer with id {}", t.it_id),
                "the kernel counts timer ids one by one up to it",
            ));
        }
        // struct sigevent: value, signal, notify, thread id
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&t.sival_ptr.to_le_bytes());
        event[8..12].copy_from_slice(&t.si_signo.to_le_bytes());
        event[12..16].copy_from_slice(&t.it_sigev_notify.to_le_bytes());
        event[16..20].copy_from_slice(&t.notify_thread_id.unwrap_or(0).to_le_bytes());
        let data = plan.bytes(&event);
        let args = [Arg::from(t.clock_id as i32), data.into(), t.it_id.into()];
        plan.op(Code::TimerCreate, 0, &args, Expect::NonNegative, [0; 2], "POSIX timer");
    }
    plan.ask(
        "timers with new ids",
        libc::SYS_prctl,
        &[PR_TIMER_CREATE_RESTORE_IDS.into(), 0.into(), 0.into(), 0.into(), 0.into()],
    );
    Ok(())
}

/// Arms everything; the last thing before the program runs.
///
/// Between this and the program's first instruction lie registers to set and tasks to let go. Timers that count real
/// time get `grace` microseconds more, so that none is over before the program is back: it may just be about to begin the
/// wait that the signal is to end. A timer may be late, never early.
pub fn arm(timers: &TaskTimersEntry, grace: u64, plan: &mut Plan) -> Result<()> {
    for (which, t) in [&timers.real, &timers.virt, &timers.prof].into_iter().enumerate() {
        if (t.isec, t.iusec, t.vsec, t.vusec) == (0, 0, 0, 0) {
            continue;
        }
        if t.iusec >= 1_000_000 || t.vusec >= 1_000_000 || (t.isec | t.vsec) >> 63 != 0 {
            return Err(Error::lie("core", format!("interval timer {which} has no time")));
        }
        let (mut vsec, mut vusec) = if (t.vsec, t.vusec) == (0, 0) { (t.isec, t.iusec) } else { (t.vsec, t.vusec) };
        if which == 0 {
            let all = vusec + grace;
            (vsec, vusec) = (vsec.saturating_add(all / 1_000_000), all % 1_000_000);
        }
        let data = plan.words(&[t.isec, t.iusec, vsec, vusec]);
        plan.call("interval timer", libc::SYS_setitimer, &[which.into(), data.into(), 0.into()]);
    }
    for t in &timers.posix {
        let (vsec, vnsec) = if (t.vsec, t.vnsec) == (0, 0) { (t.isec, t.insec) } else { (t.vsec, t.vnsec) };
        if (vsec, vnsec) == (0, 0) {
            continue;
        }
        if t.insec >= 1_000_000_000 || vnsec >= 1_000_000_000 || (t.isec | vsec) >> 63 != 0 {
            return Err(Error::lie("core", format!("timer {} has no time", t.it_id)));
        }
        // CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME and their alarms; the others count CPU time
        let real = matches!(t.clock_id, 0 | 1 | 7..=11);
        let all = vnsec + if real { grace * 1000 } else { 0 };
        let (vsec, vnsec) = (vsec.saturating_add(all / 1_000_000_000), all % 1_000_000_000);
        let data = plan.words(&[t.isec, t.insec, vsec, vnsec]);
        plan.call("POSIX timer", libc::SYS_timer_settime, &[t.it_id.into(), 0.into(), data.into(), 0.into()]);
    }
    Ok(())
}
