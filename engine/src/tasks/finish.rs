//! What becomes of the tasks when their checkpoint is complete.

use crate::error::{At, Result};
use crate::sys::calls;
use crate::tracee::{Infected, Stopped};

/// Kills everyone. First all are bound to end with us, so that from the first kill on there is no way back to half a tree.
pub fn kill(mut infected: Vec<Infected<'_>>) -> Result<()> {
    for host in &mut infected {
        host.bind()?;
    }
    let mut ends = Vec::new();
    for host in &infected {
        ends.extend(host.threads().iter().rev().map(Stopped::tid));
        calls::kill(host.pid(), libc::SIGKILL).task(host.pid())?;
    }
    infected.into_iter().for_each(Infected::forget);
    // as their tracer we are told of each thread's end first; the parent hears of the process after that
    for tid in ends {
        while let Ok(Some((_, status))) = calls::wait_child(tid, libc::__WALL) {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                break;
            }
        }
    }
    Ok(())
}

/// Lets everyone go on as if nothing had happened; `stop` leaves them stopped (SIGSTOP).
pub fn let_go(infected: Vec<Infected<'_>>, stop: bool) -> Result<()> {
    let mut all = Vec::with_capacity(infected.len());
    for host in infected {
        all.push(host.cure()?);
    }
    for threads in all {
        if let Some(leader) = threads.first().filter(|_| stop) {
            calls::kill(leader.tid(), libc::SIGSTOP).task(leader.tid())?;
        }
        for thread in threads {
            thread.release()?;
        }
    }
    Ok(())
}
