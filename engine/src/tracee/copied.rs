//! A copy of a process, which keeps its memory as it is while the process itself goes on.
//!
//! The group leader forks, by the executor, without a signal for the end of the child: neither signals nor ordinary waits
//! (without `__WALL` or `__WCLONE`, wait(2)) tell the program of it. The child closes its copies of descriptors before its
//! parent goes on, and sleeps. At the end it gives its memory back while the parent runs, and is killed and waited for, in the
//! parent, while that is stopped. If the engine dies, the child ends by itself; its zombie has the name [`NAME`] and is waited for
//! by the next dump.
//!
//! A copy has no areas with MADV_DONTFORK, zeros for those with MADV_WIPEONFORK, and shares shared ones.
//!
//! Man pages: clone3(2) (`exit_signal`), wait(2).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use standstill_restorer::plan::{Code, Control, Expect};

use super::infected::{write_control, Infected, Spare};
use crate::error::{At, Error, Result};
use crate::plan::Plan;
use crate::proc;
use crate::sys::calls;
use crate::sys::futex::{self, RobustList};
use crate::sys::memory::{Shared, SharedWord};
use crate::tasks::freeze;

/// What a copy is called (/proc/PID/comm).
pub const NAME: &[u8] = b"standstill-copy";
/// The end of a task's addresses, without its last page.
const TOP: u64 = (1 << 47) - 4096;
const LIMIT: Duration = Duration::from_secs(10);

/// The copy of a process. Whoever drops it kills it; the zombie is its parent's.
#[derive(Debug)]
pub struct Copied<'a> {
    /// Its id, in our pid namespace.
    pub pid: i32,
    /// Its id in its parent's pid namespace.
    pub pid_in_parent: i32,
    /// The process that it is a copy of.
    pub parent: i32,
    pidfd: OwnedFd,
    memory: Shared,
    robust: &'a RobustList,
    spare: Spare,
    released: usize,
    parked: u32,
}

impl<'a> Infected<'a> {
    /// Makes a copy of the process.
    ///
    /// # Errors
    /// What clone3(2) says, if there is no room for one more process or its memory. The process is as it was.
    pub fn copy(&mut self) -> Result<Copied<'a>> {
        let (area, spare, robust) = (self.area(), self.area().spare(), self.robust());
        let memory = self.share()?;
        let at = |offset: usize| area.address + offset as u64;

        let mut plan = Plan::new();
        let released = plan.bytes(&[0; 8]);
        let name = plan.string(NAME);
        // also if the engine is gone by now: it is known by that
        plan.always("its name", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
        plan.ask("its descriptors", libc::SYS_close_range, &[0.into(), u64::from(u32::MAX).into(), 0.into()]);
        let wait = plan.op(Code::Await, 0, &[released.into()], Expect::Any, [0; 2], "while its memory is read");
        let (below, above) = (area.address, area.address + area.len as u64);
        plan.ask("memory below the executor", libc::SYS_munmap, &[0.into(), below.into()]);
        plan.ask("memory above the executor", libc::SYS_munmap, &[above.into(), (TOP - above).into()]);
        let parked = plan.op(Code::Park, 0, &[], Expect::Any, [0; 2], "its end");
        plan.check()?;
        let ops = plan.ops_bytes();
        let results = spare.room + ops.len();
        let data = (results + plan.len() * 8).next_multiple_of(64);
        if data + plan.data_len() > spare.room + Spare::ROOM {
            return Err(Error::Usage { what: "the plan of a copy does not fit".into() });
        }
        memory.write(spare.room, &ops);
        memory.write(data, plan.data());
        robust.own(&memory, spare.owner);
        let control = Control {
            turn: 1.into(),
            done: 0.into(),
            orphan: 1,
            reserved: 0,
            owner: at(spare.owner),
            ops: at(spare.room),
            count: plan.len() as u64,
            results: at(results),
            base: at(data),
            failed: 0.into(),
            at: 0.into(),
            failure: 0.into(),
            xsave: 0,
            way_back: 0,
            arena: 0,
        };
        write_control(&memory, spare.control, &control);

        let parent = self.pid();
        let children = || freeze::children_of(parent, &[parent], &mut Vec::new());
        let before = children()?;
        let mut fork = Plan::new();
        let stack = spare.stack_top - super::infected::STACK;
        // no flags, and no signal at its end
        let args = fork.words(&[0, 0, 0, 0, 0, at(stack), super::infected::STACK as u64, 0, 0, 0, 0]);
        let child = [args.into(), 88.into(), at(spare.control).into()];
        let made = fork.op(Code::Clone, 0, &child, Expect::NonNegative, [0; 2], "a copy of the process");
        let answers = match self.in_leader(fork) {
            Ok(answers) => answers,
            Err(e) => {
                robust.abandon(&memory, spare.owner);
                return Err(e);
            }
        };
        let pid_in_parent = i32::try_from(answers.result(made)).unwrap_or(-1);
        let found = children().unwrap_or_default().into_iter();
        let found = found.filter(|pid| !before.contains(pid)).find(|pid| innermost(*pid) == Some(pid_in_parent));
        let opened = found.ok_or(Error::Gone).and_then(|pid| Ok((pid, calls::pidfd_open(pid, 0)?)));
        let (pid, pidfd) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                robust.abandon(&memory, spare.owner);
                return Err(e).task(parent);
            }
        };
        let released = data + usize::try_from(released.offset).unwrap_or(0);
        let copied = Copied { pid, pid_in_parent, parent, pidfd, memory, robust, spare, released, parked: parked.0 };
        copied.reach(wait.0).task(pid)?;
        Ok(copied)
    }
}

impl Infected<'_> {
    /// Waits for the end of a copy that was killed.
    pub fn wait_for(&mut self, copy: &Copied<'_>) -> Result<()> {
        let mut plan = Plan::new();
        let args = [copy.pid_in_parent.into(), 0.into(), libc::__WALL.into(), 0.into()];
        plan.ask("the end of the copy", libc::SYS_wait4, &args);
        self.in_leader(plan).map(drop)
    }
}

impl Copied<'_> {
    fn control(&self) -> &Control {
        self.memory.at(self.spare.control)
    }

    /// Waits until it runs an operation of its plan.
    fn reach(&self, operation: u32) -> Result<()> {
        let began = Instant::now();
        while self.control().at.load(Ordering::Acquire) < operation {
            if !crate::sys::ptrace::exists(self.pid) || began.elapsed() > LIMIT {
                return Err(Error::Gone);
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// Its memory is not needed any more; when this returns it is gone, so that its end will be quick.
    pub fn release_memory(&self) {
        let word: &SharedWord = self.memory.at(self.released);
        word.0.store(1, Ordering::Release);
        futex::wake(&word.0);
        if let Err(e) = self.reach(self.parked) {
            tracing::debug!("copy {} of process {}: {e}", self.pid, self.parent);
        }
    }

    /// Kills it.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.as_fd(), rustix::process::Signal::KILL);
    }
}

impl Drop for Copied<'_> {
    fn drop(&mut self) {
        self.kill();
        self.robust.abandon(&self.memory, self.spare.owner);
    }
}

/// The id of a process in the innermost pid namespace that it is in.
fn innermost(pid: i32) -> Option<i32> {
    let mut buffer = Vec::new();
    proc::read_proc(format!("/proc/{pid}/status").as_ref(), &mut buffer).ok()?;
    proc::status::parse(&buffer).ok()?.ns_pid.last().copied()
}
