//! The end of a restore: holding everyone by ptrace, taking the executor out, letting go; and waiting for the program.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::freeze;
use crate::error::{At, Call, Error, Result};
use crate::sys::ptrace::Stop;
use crate::sys::{calls, ptrace};
use crate::tracee::{await_entry, await_result, begin_call, STOP_LIMIT};

/// Threads that were seized and must be let go; while they are here they end with us.
#[derive(Debug, Default)]
pub struct Seized {
    threads: HashMap<i32, bool>,
}

impl Seized {
    /// Seizes a thread, which goes on running; with `filters`, its seccomp filters are held off.
    pub fn seize(&mut self, tid: i32, filters: bool) -> Result<()> {
        let suspend = if filters { ptrace::SUSPEND_SECCOMP } else { 0 };
        ptrace::seize(tid, ptrace::EXITKILL | ptrace::SYSGOOD | suspend).task(tid)?;
        self.threads.insert(tid, false);
        Ok(())
    }

    /// Stops all seized threads: first all are asked, then all are waited for.
    pub fn stop(&mut self) -> Result<()> {
        for &tid in self.threads.keys() {
            ptrace::interrupt(tid).task(tid)?;
        }
        for (&tid, stopped) in &mut self.threads {
            loop {
                match ptrace::wait_stop(tid, STOP_LIMIT).task(tid)? {
                    Stop::Trap | Stop::Group(_) => break,
                    Stop::Signal(signal) => {
                        return Err(Error::Usage { what: format!("the executor took signal {signal}") }).task(tid)
                    }
                    Stop::Syscall => ptrace::cont(tid, 0).task(tid)?,
                }
            }
            *stopped = true;
        }
        Ok(())
    }

    /// Unmaps the arena, in processes whose threads are all stopped and, but for the leader, out of it; side by side. `call` is
    /// the address of a system call instruction; each process comes with address and length.
    pub fn remove_executors(&mut self, call: u64, arenas: &[(i32, (u64, u64))]) -> Result<()> {
        let each = |f: &dyn Fn(i32, (u64, u64)) -> Result<()>| {
            arenas.iter().try_for_each(|&(pid, arena)| f(pid, arena).task(pid))
        };
        each(&|pid, arena| {
            let mut regs = ptrace::registers(pid)?;
            regs.ip = call;
            regs.ax = libc::SYS_munmap as u64;
            regs.orig_ax = u64::MAX;
            (regs.di, regs.si) = arena;
            begin_call(pid, &regs)
        })?;
        each(&|pid, _| await_entry(pid))?;
        each(&|pid, _| {
            await_result(pid, "munmap")?;
            // once more, on the way to user mode: from such a stop the kernel restarts a system call if there is one
            ptrace::interrupt(pid)?;
            ptrace::cont(pid, 0)
        })?;
        each(&|pid, _| match ptrace::wait_stop(pid, STOP_LIMIT)? {
            Stop::Trap | Stop::Group(_) => Ok(()),
            Stop::Syscall | Stop::Signal(_) => Err(Error::Usage { what: "the executor did not leave".into() }),
        })
    }

    /// Nobody is bound to us any more, but all are stopped. If we die meanwhile, the kernel ends some: one process or none,
    /// but of several all that are still bound.
    pub fn unbind(&self) -> Result<()> {
        for &tid in self.threads.keys() {
            ptrace::set_options(tid, ptrace::SYSGOOD)
                .or_else(|e| if e.errno() == libc::EINVAL { Ok(()) } else { Err(e) })
                .task(tid)?;
        }
        Ok(())
    }

    /// Lets everyone go.
    pub fn go(mut self) -> Result<()> {
        for (tid, _) in self.threads.drain() {
            ptrace::detach(tid, 0).task(tid)?;
        }
        Ok(())
    }
}

/// Session and process group of the engine; 0 for those of another pid namespace.
pub fn own_session_and_group() -> (i32, i32) {
    use nix::unistd::{getpgrp, getsid};
    (getsid(None).map_or(0, nix::unistd::Pid::as_raw), getpgrp().as_raw())
}

/// An error once the first task is gone.
pub fn still_there(pid: i32) -> Result<()> {
    if ptrace::exists(pid) {
        Ok(())
    } else {
        Err(Error::Gone).task(pid)
    }
}

fn has_ended(status: i32) -> bool {
    libc::WIFEXITED(status) || libc::WIFSIGNALED(status)
}

/// Is told the end of a task that was killed.
pub fn wait_for_end(tid: i32) {
    while let Ok(Some((_, status))) = calls::wait_child(tid, libc::__WALL) {
        if has_ended(status) {
            break;
        }
    }
}

/// Is told the ends of tasks that were killed, in whatever order they come, for as long as `limit`: the last thread of a pid
/// namespace's init does not end before all others there were waited for, those of its own process that are traced too
/// (pid_namespaces(7), kernel/pid_namespace.c).
pub fn wait_for_ends(tids: impl IntoIterator<Item = i32>, limit: Option<Duration>) {
    let began = Instant::now();
    let mut left: VecDeque<i32> = tids.into_iter().collect();
    let mut alive = 0;
    while let Some(tid) = left.pop_front() {
        match calls::wait_child(tid, libc::__WALL | libc::WNOHANG) {
            Ok(Some((_, status))) if has_ended(status) => alive = 0,
            Ok(_) => {
                left.push_back(tid);
                alive += 1;
            }
            // it is none of ours any more
            Err(_) => alive = 0,
        }
        if alive > 0 && alive >= left.len() {
            if limit.is_some_and(|limit| began.elapsed() > limit) {
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
            alive = 0;
        }
    }
}

/// Makes a task with a pid that may still be in use: by the dumped tasks, dead and not yet waited for, as process, group or
/// session. Whoever has to wait for them gets a few seconds for that, as long as no living process has the id.
pub fn when_reaped(pid: i32, mut make: impl FnMut() -> Result<i32>) -> Result<i32> {
    const LIMIT: Duration = Duration::from_secs(5);
    let began = Instant::now();
    loop {
        match make() {
            Err(e) if e.errno() == libc::EEXIST && began.elapsed() < LIMIT && !lives(pid) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// True if a process that is not dead has `id` as its own id, group or session.
fn lives(id: i32) -> bool {
    let mut buffer = Vec::new();
    let pids = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let mut used = ptrace::exists(id);
    for pid in pids {
        if used {
            break;
        }
        if crate::proc::read_proc(format!("/proc/{pid}/stat").as_ref(), &mut buffer).is_ok() {
            if let Ok(stat) = crate::proc::stat::parse(&buffer) {
                use crate::proc::status::TaskState;
                let dead = matches!(stat.state, TaskState::Zombie | TaskState::Dead);
                used = !dead && (stat.pgrp == id || stat.session == id);
            }
        }
    }
    used
}

/// All that descend from `root` now, parents before their children; without `root` itself.
pub fn descendants(root: i32) -> Vec<i32> {
    let (mut all, mut buffer, mut at) = (vec![root], Vec::new(), 0);
    while let Some(&pid) = all.get(at) {
        all.extend(freeze::children_of(pid, &freeze::threads_of(pid), &mut buffer).unwrap_or_default());
        at += 1;
    }
    all.remove(0);
    all
}

/// True if `pid` descends from `root`: nobody else's process is ever killed.
pub fn is_descendant(pid: i32, root: i32) -> bool {
    let mut at = pid;
    let mut buffer = Vec::new();
    for _ in 0..1 << 16 {
        if at == root {
            return true;
        }
        if at <= 1 || crate::proc::read_proc(format!("/proc/{at}/stat").as_ref(), &mut buffer).is_err() {
            return false;
        }
        match crate::proc::stat::parse(&buffer) {
            Ok(stat) => at = stat.ppid,
            Err(_) => return false,
        }
    }
    false
}

/// Signals that are meant for the program while we wait for it in its parent's place.
const PASSED_ON: [i32; 10] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGCONT,
    libc::SIGWINCH,
    libc::SIGTSTP,
];

/// Waits for the restored program, whose parent we are, and passes signals on to it; its exit code, or 128 + N for signal N.
///
/// Signals are taken in this thread only, and only while it waits. A program in our own process group has those of the
/// terminal from the terminal.
pub fn wait(pid: i32) -> Result<i32> {
    let pidfd = calls::pidfd_open(pid, 0)?;
    let same_group = own_session_and_group().1 == group_of(pid);
    let from_terminal = [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP, libc::SIGWINCH];
    let mask = PASSED_ON.iter().fold(0u64, |m, s| m | 1 << (s - 1));
    let blocked = calls::BlockedSignals::new(mask)?;
    let signals = calls::signalfd(mask, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)?;
    let code = loop {
        if let Some((_, status)) = calls::wait_child(pid, libc::__WALL | libc::WNOHANG)? {
            if libc::WIFEXITED(status) {
                break libc::WEXITSTATUS(status);
            }
            if libc::WIFSIGNALED(status) {
                break 128 + libc::WTERMSIG(status);
            }
        }
        use rustix::event::{poll, PollFd, PollFlags};
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).call("poll"),
        }
        let mut info = [0u8; 128];
        while rustix::io::read(&signals, &mut info).is_ok_and(|n| n == info.len()) {
            let signal = i32::from_le_bytes([info[0], info[1], info[2], info[3]]);
            if !(same_group && from_terminal.contains(&signal)) {
                let _ = calls::kill(pid, signal);
            }
        }
    };
    drop(blocked);
    Ok(code)
}

fn group_of(pid: i32) -> i32 {
    nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid))).map_or(0, nix::unistd::Pid::as_raw)
}
