//! What is done about CUDA tasks whose engine was killed: a program is started that asks the driver.
//!
//! The [guard](crate::guard) makes system calls and no others, so it becomes the program `standstill gpu-release`: the very
//! file that runs as the engine, or, in a program that embeds the library, `standstill` on PATH (a warning says so if it is
//! not there). It is told each process with the time of its start, the state to bring it back to, its restore thread and
//! what that blocked, since the engine may have died while that thread ran with all signals blocked.

use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use standstill_gpu::{Driver, State};

use super::dump::{self, Task};
use crate::error::{Error, Result};
use crate::guard::Guard;
use crate::sys::ptrace;
use crate::tracee::{Held, ALL_SIGNALS};

/// The internal verb.
pub const VERB: &str = "gpu-release";
/// How long the kernel, or what the engine left in a task, may take until a thread can be seized.
const SEIZE_LIMIT: Duration = Duration::from_secs(5);

/// From here on these tasks are brought back if we die. To be called before anything is done with them.
pub(super) fn register(guard: &Guard<'_>, tasks: &[Task]) -> Result<()> {
    let mut words = vec![VERB.to_owned()];
    for t in tasks {
        words.push(format!("{}:{}:{}:{}:{:x}", t.pid, t.started, t.found.number(), t.tid, t.mask));
    }
    let environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
    if !guard.register_own_program(&words, &environment)? {
        tracing::warn!("there is no standstill on PATH, which would bring CUDA back if this program is killed");
        return Ok(());
    }
    // it is their turn until they end, or become the program and that ends
    tasks.iter().try_for_each(|t| guard.hold(t.turn.as_fd()).map(drop))
}

struct Job {
    pid: i32,
    started: u64,
    state: State,
    tid: i32,
    mask: u64,
}

fn parse(word: &str) -> Option<Job> {
    let mut parts = word.split(':');
    let mut next = || parts.next();
    let pid = next()?.parse().ok()?;
    let started = next()?.parse().ok()?;
    let state = State::of(next()?.parse().ok()?);
    let tid = next()?.parse().ok()?;
    let mask = u64::from_str_radix(next()?, 16).ok()?;
    Some(Job { pid, started, state, tid, mask })
}

/// The internal verb: its exit code.
pub fn run(words: &[OsString]) -> i32 {
    let Some(jobs) = words.iter().map(|w| parse(w.to_str()?)).collect::<Option<Vec<Job>>>() else { return 2 };
    let Ok(driver) = Driver::load() else { return 1 };
    let results = std::thread::scope(|scope| {
        let all: Vec<_> = jobs.iter().map(|job| scope.spawn(|| release(&driver, job))).collect();
        all.into_iter().map(|one| one.join().unwrap_or(Err(Error::Gone))).collect::<Vec<_>>()
    });
    i32::from(results.iter().any(Result::is_err))
}

fn release(driver: &Driver, job: &Job) -> Result<()> {
    if dump::started(job.pid)? != job.started {
        return Ok(());
    }
    unblock(job)?;
    Ok(driver.bring_back_from_the_dead(job.pid, job.state)?)
}

/// The restore thread blocks what it blocked before.
fn unblock(job: &Job) -> Result<()> {
    let began = Instant::now();
    let stopped = loop {
        // the dead engine may still trace it
        match Held::seize(job.tid, 0).and_then(|held| held.wait(SEIZE_LIMIT)) {
            Ok(stopped) => break stopped,
            Err(e) if began.elapsed() > SEIZE_LIMIT || !ptrace::exists(job.pid) => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    // all that can be blocked: not SIGKILL, not SIGSTOP
    let all = ALL_SIGNALS & !(1 << (libc::SIGKILL - 1)) & !(1 << (libc::SIGSTOP - 1));
    if stopped.mask & all == all {
        ptrace::set_signal_mask(job.tid, job.mask)?;
    }
    stopped.release()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        let job = parse("12:3456:0:13:fffffffe7ffbfeff").unwrap();
        assert_eq!((job.pid, job.started, job.state, job.tid), (12, 3456, State::Running, 13));
        for bad in ["", "1:2:3:4", "x:2:0:4:5", "1:2:0:4:zz"] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
