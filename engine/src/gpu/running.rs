//! Driver calls about tasks that stand still, of which one thread each must run meanwhile.

use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant};

use standstill_gpu::DriverError;

use crate::error::{At, Error, Result};
use crate::sys::ptrace::{self, Stop};
use crate::tracee::{ALL_SIGNALS, STOP_LIMIT};

/// How long a call may go on about a process that is dead.
const DEAD_LIMIT: Duration = Duration::from_secs(2);
/// How often we look after threads that run.
const TURN: Duration = Duration::from_millis(1);

/// Threads of stopped tasks that run, with all signals blocked; dropping it stops them again, as they were.
struct Awake {
    threads: Vec<(i32, u64)>,
}

impl Awake {
    /// `options` are their PTRACE_O_* from now on: filters of seccomp are no longer held off.
    fn new(tids: &[i32], options: usize) -> Result<Awake> {
        let mut awake = Awake { threads: Vec::with_capacity(tids.len()) };
        for &tid in tids {
            let mask = ptrace::signal_mask(tid).task(tid)?;
            ptrace::set_options(tid, options).task(tid)?;
            ptrace::set_signal_mask(tid, ALL_SIGNALS).task(tid)?;
            awake.threads.push((tid, mask));
            ptrace::cont(tid, 0).task(tid)?;
        }
        Ok(awake)
    }

    /// Whoever stopped, by a signal that cannot be blocked or by job control, goes on.
    fn tend(&self) -> Result<()> {
        for (tid, _) in &self.threads {
            match ptrace::stopped(*tid).task(*tid)? {
                None => {}
                Some(Stop::Signal(signal)) => ptrace::cont(*tid, signal).task(*tid)?,
                Some(Stop::Trap | Stop::Group(_) | Stop::Syscall) => ptrace::cont(*tid, 0).task(*tid)?,
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let mut result = Ok(());
        let threads = std::mem::take(&mut self.threads);
        for (tid, _) in &threads {
            if let Err(e) = ptrace::interrupt(*tid) {
                result = result.and(Err(e).task(*tid));
            }
        }
        for (tid, mask) in threads {
            let stopped = match ptrace::wait_quietly(tid, STOP_LIMIT) {
                Ok(Some(_)) => ptrace::set_signal_mask(tid, mask),
                Ok(None) => Err(Error::Gone),
                Err(e) => Err(e),
            };
            result = result.and(stopped.task(tid));
        }
        result
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::error!("stopping a restore thread again: {}", e.chain());
        }
    }
}

/// Makes one call for each of these processes, all at once, in threads of their own; how each of them ended.
///
/// A call about a process that died may never end: then it is left alone.
pub(super) fn side_by_side(
    pids: &[i32],
    call: impl Fn(i32) -> Result<(), DriverError> + Clone + Send + 'static,
    mut tend: impl FnMut() -> Result<()>,
) -> Vec<Result<()>> {
    let (send, receive) = channel();
    let mut results: Vec<Option<Result<()>>> = Vec::with_capacity(pids.len());
    for (i, &pid) in pids.iter().enumerate() {
        let (send, call) = (send.clone(), call.clone());
        let started = std::thread::Builder::new().name(format!("gpu-{pid}")).spawn(move || {
            let _ = send.send((i, call(pid)));
        });
        results.push(started.err().map(|source| Err(Error::Sys { call: "clone", source }).task(pid)));
    }
    let mut dead: Vec<Option<Instant>> = vec![None; pids.len()];
    let mut tending = Ok(());
    while results.iter().any(Option::is_none) {
        match receive.recv_timeout(TURN) {
            Ok((i, result)) => {
                if let (Some(slot), Some(pid)) = (results.get_mut(i), pids.get(i)) {
                    *slot = Some(result.map_err(Error::from).task(*pid));
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        for ((slot, since), pid) in results.iter_mut().zip(&mut dead).zip(pids) {
            if slot.is_some() || ptrace::exists(*pid) {
                *since = None;
            } else if since.get_or_insert_with(Instant::now).elapsed() > DEAD_LIMIT {
                *slot = Some(Err(Error::Gone).task(*pid));
            }
        }
        if tending.is_ok() {
            tending = tend();
        }
    }
    let mut all: Vec<Result<()>> = results.into_iter().flatten().collect();
    if let (Err(e), Some(last)) = (tending, all.last_mut()) {
        if last.is_ok() {
            *last = Err(e);
        }
    }
    all
}

/// The same about processes that stand still, of which these threads run meanwhile: process, and thread.
pub(super) fn with_threads(
    tasks: &[(i32, i32)],
    options: usize,
    call: impl Fn(i32) -> Result<(), DriverError> + Clone + Send + 'static,
) -> Result<Vec<Result<()>>> {
    let pids: Vec<i32> = tasks.iter().map(|t| t.0).collect();
    let tids: Vec<i32> = tasks.iter().map(|t| t.1).collect();
    let mut awake = Awake::new(&tids, options)?;
    let results = side_by_side(&pids, call, || awake.tend());
    let stopped = awake.stop();
    // what the driver said tells more than that a thread is gone
    if results.iter().all(Result::is_ok) {
        stopped?;
    }
    Ok(results)
}
