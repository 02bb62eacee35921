//! Signals: actions, masks, what is pending, alternate stacks.
//!
//! Actions belong to the process and are asked for one by one with rt_sigaction(2); masks come with the registers
//! (PTRACE_GETSIGMASK); queues are read without taking from them (PTRACE_PEEKSIGINFO) and filled with
//! rt_sigqueueinfo(2), which lets a task send itself any si_code. Images: `core-N.img` (`sigactions`, `signals_s`,
//! `signals_p`, `blk_sigset`, `sas`). What is not kept: the order between the queue of a thread and that of its process.

use standstill_images::proto::{SaEntry, SiginfoEntry, SignalQueueEntry, ThreadSasEntry};

use crate::error::{Error, Result};
use crate::plan::{Arg, Data, Plan};
use crate::tracee::Answers;

const SIGKILL: u32 = 9;
const SIGSTOP: u32 = 19;
const SIGNALS: u32 = 64;
const SIGINFO: usize = 128;

/// Signals whose action can be anything but the default.
fn settable() -> impl Iterator<Item = u32> {
    (1..=SIGNALS).filter(|s| *s != SIGKILL && *s != SIGSTOP)
}

/// Asks for all actions.
pub fn ask_actions(plan: &mut Plan) -> Data {
    let room = plan.room(62 * 32);
    for (i, signal) in settable().enumerate() {
        let at = Arg::Data(room.offset + i as u64 * 32);
        plan.call("signal action", libc::SYS_rt_sigaction, &[signal.into(), 0.into(), at, 8.into()]);
    }
    room
}

/// The answers to [`ask_actions`]: 62 entries, without SIGKILL and SIGSTOP.
pub fn actions(answers: &Answers, room: Data) -> Vec<SaEntry> {
    (0..62)
        .map(|i| SaEntry {
            sigaction: answers.u64(room, i * 4),
            flags: answers.u64(room, i * 4 + 1),
            restorer: answers.u64(room, i * 4 + 2),
            mask: answers.u64(room, i * 4 + 3),
            compat_sigaction: Some(false),
            mask_extended: None,
        })
        .collect()
}

/// Sets the actions that are not the default, which all tasks have until then: their parents set theirs after they were made.
pub fn restore_actions(wanted: &[SaEntry], plan: &mut Plan) -> Result<()> {
    if !wanted.is_empty() && wanted.len() != 62 {
        return Err(Error::lie("core", format!("{} signal actions instead of 62", wanted.len())));
    }
    for (signal, action) in settable().zip(wanted) {
        if action.compat_sigaction == Some(true) {
            return Err(Error::refused("a signal action of a 32-bit task", "Standstill restores 64-bit tasks only"));
        }
        let words = [action.sigaction, action.flags, action.restorer, action.mask];
        if words == [0; 4] {
            continue;
        }
        let data = plan.words(&words);
        plan.call("signal action", libc::SYS_rt_sigaction, &[signal.into(), data.into(), 0.into(), 8.into()]);
    }
    Ok(())
}

/// Raw siginfo structures as an image entry.
pub fn queue(pending: &[[u8; SIGINFO]]) -> SignalQueueEntry {
    SignalQueueEntry { signals: pending.iter().map(|s| SiginfoEntry { siginfo: s.to_vec() }).collect() }
}

/// Fills a queue: that of the process (`thread` is `None`) or of one of its threads.
pub fn restore_queue(queue: Option<&SignalQueueEntry>, pid: i32, thread: Option<i32>, plan: &mut Plan) -> Result<()> {
    for info in queue.iter().flat_map(|q| &q.signals) {
        if info.siginfo.len() != SIGINFO {
            return Err(Error::lie("core", format!("a pending signal of {} bytes instead of 128", info.siginfo.len())));
        }
        let signal = i32::from_le_bytes([info.siginfo[0], info.siginfo[1], info.siginfo[2], info.siginfo[3]]);
        // these act at once, whatever is blocked: the engine sends SIGSTOP when all is done (`stops`)
        if signal == SIGSTOP as i32 || signal == SIGKILL as i32 {
            continue;
        }
        let data = plan.bytes(&info.siginfo);
        match thread {
            None => plan.call("pending signal", libc::SYS_rt_sigqueueinfo, &[pid.into(), signal.into(), data.into()]),
            Some(tid) => plan.call(
                "pending signal of a thread",
                libc::SYS_rt_tgsigqueueinfo,
                &[pid.into(), tid.into(), signal.into(), data.into()],
            ),
        };
    }
    Ok(())
}

/// True if a SIGSTOP waits in a queue: the task is about to stop.
pub fn stops(queue: Option<&SignalQueueEntry>) -> bool {
    queue.iter().flat_map(|q| &q.signals).any(|s| s.siginfo.get(..4) == Some(&SIGSTOP.to_le_bytes()))
}

/// Asks for the alternate stack of the thread that runs the plan.
pub fn ask_stack(plan: &mut Plan) -> Data {
    let room = plan.room(24);
    plan.call("alternate stack", libc::SYS_sigaltstack, &[0.into(), room.into()]);
    room
}

/// The answer to [`ask_stack`].
pub fn stack(answers: &Answers, room: Data) -> ThreadSasEntry {
    ThreadSasEntry { ss_sp: answers.u64(room, 0), ss_flags: answers.u32(room, 2), ss_size: answers.u64(room, 2) }
}

/// Sets the alternate stack. SS_ONSTACK in the image says where the thread was, not what to set.
pub fn restore_stack(sas: Option<&ThreadSasEntry>, plan: &mut Plan) {
    const SS_ONSTACK: u32 = 1;
    const SS_DISABLE: u32 = 2;
    let Some(sas) = sas.filter(|s| s.ss_flags & SS_DISABLE == 0) else { return };
    let data = plan.words(&[sas.ss_sp, u64::from(sas.ss_flags & !SS_ONSTACK), sas.ss_size]);
    plan.call("alternate stack", libc::SYS_sigaltstack, &[data.into(), 0.into()]);
}
