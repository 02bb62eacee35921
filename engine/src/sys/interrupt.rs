//! SIGINT, SIGTERM, SIGHUP and SIGQUIT while a dump has tasks in its hands: blocked, so that they do not end us between two
//! requests, and looked for between the phases. Only in a program that is ours alone ([`super::ptrace::alone`]); in an
//! embedding program signals are the program's business.

use crate::error::{Error, Result};
use crate::sys::calls::BlockedSignals;
use crate::sys::ptrace;

const SIGNALS: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

fn mask() -> u64 {
    SIGNALS.iter().fold(0, |m, s| m | 1 << (s - 1))
}

/// Signals that would end us are blocked in this thread, and those that it starts, for as long as this lives.
#[derive(Debug)]
pub struct Watch {
    blocked: Option<BlockedSignals>,
}

impl Watch {
    /// Begins to watch.
    pub fn new() -> Result<Watch> {
        Ok(Watch { blocked: if ptrace::is_alone() { Some(BlockedSignals::new(mask())?) } else { None } })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.blocked.is_some() {
            // a dump that was interrupted says so itself, one that came through is not to look like a failure
            let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let mask = mask();
            // SAFETY: mask and time live across the call; no siginfo is asked for.
            while unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &raw const mask, 0, &raw const zero, 8) } > 0 {}
        }
    }
}

/// An error once one of the signals has come.
pub fn check() -> Result<()> {
    if !ptrace::is_alone() {
        return Ok(());
    }
    let mut pending = 0u64;
    // SAFETY: a place for one word.
    unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut pending, 8) };
    if pending & mask() != 0 {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}
