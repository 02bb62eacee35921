//! Tasks in the engine's hands, as types: [`Stopped`] (seized, its registers known) and [`Infected`] (the executor is in
//! it). Each consumes the one before. Dropping one cures what was done to it and lets it go: the program runs on.
//!
//! The order in which a task is entered and left is what keeps a program alive whose engine is killed at any request:
//! - in: memory first, then the general registers, then the signal mask;
//! - out: the extended state, the signal mask, then the general registers, then the detach.
//!
//! Wherever the engine dies in between, the task either runs its own code, or code that finds the way back by itself.

mod copied;
mod infected;
mod stopped;

pub use copied::{Copied, NAME as COPY_NAME};
pub use infected::{write_control, Answers, Area, Infected, AREA_NAME, BLOB};
pub use stopped::{undo_winding, Held, Stopped};

use std::time::Duration;

use standstill_restorer::arch::Registers;

use crate::error::{Error, Result};
use crate::sys::ptrace::{self, Stop};

/// How long a seized task may take to stop.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);
/// All signals that can be blocked.
pub const ALL_SIGNALS: u64 = !0;

/// One system call of a stopped task: `regs` hold its number and operands, and point to a system call instruction, behind
/// which the task is stopped again. All of its signals are blocked then.
pub(crate) fn one_call(tid: i32, regs: &Registers, call: &'static str) -> Result<u64> {
    begin_call(tid, regs)?;
    await_entry(tid)?;
    await_result(tid, call)
}

/// The three steps of [`one_call`], for many tasks: each step is made of all before the next, so that they run side by side.
pub(crate) fn begin_call(tid: i32, regs: &Registers) -> Result<()> {
    ptrace::set_registers(tid, regs)?;
    ptrace::set_signal_mask(tid, ALL_SIGNALS)?;
    ptrace::cont_to_syscall(tid)
}

pub(crate) fn await_entry(tid: i32) -> Result<()> {
    await_syscall(tid)?;
    ptrace::cont_to_syscall(tid)
}

pub(crate) fn await_result(tid: i32, call: &'static str) -> Result<u64> {
    await_syscall(tid)?;
    let result = ptrace::registers(tid)?.ax;
    let error = result as i64;
    if (-4095..0).contains(&error) {
        return Err(Error::Sys {
            call,
            source: std::io::Error::from_raw_os_error(i32::try_from(-error).unwrap_or(libc::EPROTO)),
        });
    }
    Ok(result)
}

fn await_syscall(tid: i32) -> Result<()> {
    loop {
        match ptrace::wait_stop(tid, STOP_LIMIT)? {
            Stop::Syscall => return Ok(()),
            // SIGSTOP cannot be blocked: DETACH of a task in a stopped group stops it again, so nothing is lost
            Stop::Signal(_) | Stop::Group(_) | Stop::Trap => ptrace::cont_to_syscall(tid)?,
        }
    }
}
