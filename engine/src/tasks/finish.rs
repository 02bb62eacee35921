//! What becomes of the tasks when their checkpoint is complete.

use crate::cgroups::freezer::Freezer;
use crate::error::{At, Result};
use crate::gpu::dump::Cuda;
use crate::guard::{Choice, Guard, List};
use crate::sys::calls;
use crate::tasks::release;
use crate::tracee::{Infected, Stopped};

/// From here on everyone is killed, whatever becomes of us: one store, if there is more than one process or something that
/// would be undone otherwise. A kill of a single process happens or does not, but if it is `not_yet` to come.
pub fn decide(infected: &[Infected<'_>], guard: &Guard<'_>, not_yet: bool) -> Result<()> {
    if infected.len() > 1 || guard.is_running() || not_yet {
        for host in infected {
            guard.register_kill(List::End, host.pid())?;
        }
        // nobody goes on for the moment that the guard may need
        for host in infected {
            host.hold(guard)?;
        }
        guard.choose(Choice::End);
    }
    Ok(())
}

/// Kills everyone, which was decided; the root may be the `init` of a pid namespace.
pub fn kill(infected: Vec<Infected<'_>>, init: bool) -> Result<()> {
    let mut ends = Vec::new();
    for host in infected.iter().rev() {
        ends.extend(host.threads().iter().rev().map(Stopped::tid));
        match calls::kill(host.pid(), libc::SIGKILL) {
            // somebody else did
            Err(e) if e.errno() == libc::ESRCH => {}
            other => other.task(host.pid())?,
        }
    }
    infected.into_iter().for_each(Infected::forget);
    // as their tracer we are told of each thread's end first; the parent hears of the process after that
    match init {
        true => release::wait_for_ends(ends, None),
        false => ends.into_iter().for_each(release::wait_for_end),
    }
    Ok(())
}

/// Lets everyone go on as if nothing had happened; `stop` leaves them stopped (SIGSTOP), a freezer that was frozen is again.
/// CUDA tasks are back on their GPUs before anyone runs.
pub fn let_go(
    infected: Vec<Infected<'_>>,
    stop: bool,
    freezer: Option<&mut Freezer<'_>>,
    cuda: Option<&mut Cuda>,
) -> Result<()> {
    let mut all = Vec::with_capacity(infected.len());
    for host in infected {
        all.push(host.cure()?);
    }
    cuda.map_or(Ok(()), |cuda| cuda.resume(&mut all))?;
    freezer.map_or(Ok(()), Freezer::before_release)?;
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
