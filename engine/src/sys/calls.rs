//! Single system calls that nix and rustix lack.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use standstill_images::proto::FownEntry;

use crate::error::{Call, Error, Result};

fn answer(call: &'static str, r: libc::c_long) -> Result<i64> {
    if r < 0 {
        Err(Error::last(call))
    } else {
        Ok(r)
    }
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32, flags: u32) -> Result<OwnedFd> {
    // SAFETY: integers only; the new descriptor is ours alone.
    unsafe {
        let fd = answer("pidfd_open", libc::syscall(libc::SYS_pidfd_open, pid, flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// pidfd_getfd(2): our own descriptor of another task's open file.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd> {
    // SAFETY: integers only; the new descriptor is ours alone.
    unsafe {
        let fd = answer("pidfd_getfd", libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// prlimit(2): sets a resource limit of another process.
pub fn set_limit(pid: i32, resource: u32, current: u64, maximum: u64) -> Result<()> {
    let limit = [current, maximum];
    // SAFETY: struct rlimit64 is these two words; nothing is written to us.
    let r = unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, limit.as_ptr(), 0) };
    answer("prlimit", r).map(drop)
}

/// What kcmp(2) compares.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Kcmp {
    File = 0,
    Vm = 1,
    Files = 2,
    Fs = 3,
    Sighand = 4,
    Io = 5,
    Sysvsem = 6,
}

/// kcmp(2): do two tasks share a kernel object?
pub fn same(a: i32, b: i32, what: Kcmp) -> Result<bool> {
    // SAFETY: integers only.
    Ok(answer("kcmp", unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) })? == 0)
}

/// kcmp(2): are two descriptors one open file?
pub fn same_file(a: i32, fd_a: i32, b: i32, fd_b: i32) -> Result<bool> {
    // SAFETY: integers only.
    Ok(answer("kcmp(KCMP_FILE)", unsafe { libc::syscall(libc::SYS_kcmp, a, b, Kcmp::File as i32, fd_a, fd_b) })? == 0)
}

/// kcmp(2): is the first (a task and its number) the open file that an epoll (likewise) watches as number `target`, as the `nth`
/// one of that number?
pub fn same_epoll_target(file: (i32, i32), epoll: (i32, i32), target: i32, nth: u32) -> Result<bool> {
    let slot = [epoll.1 as u32, target as u32, nth];
    // SAFETY: `slot` is the struct kcmp_epoll_slot that the call reads.
    let same = unsafe { libc::syscall(libc::SYS_kcmp, file.0, epoll.0, 7, file.1, slot.as_ptr()) };
    Ok(answer("kcmp(KCMP_EPOLL_TFD)", same)? == 0)
}

/// Who gets SIGIO for an open file: F_GETOWN_EX, F_GETSIG, F_GETOWNER_UIDS (fcntl(2)).
pub fn file_owner(fd: BorrowedFd<'_>) -> Result<FownEntry> {
    const F_GETSIG: i32 = 11;
    const F_GETOWN_EX: i32 = 16;
    const F_GETOWNER_UIDS: i32 = 17;
    let mut owner = [0i32; 2];
    let mut ids = [0u32; 2];
    // SAFETY: both arrays are as large as what the requests write.
    unsafe {
        let signal = answer("fcntl(F_GETSIG)", libc::fcntl(fd.as_raw_fd(), F_GETSIG).into())?;
        answer("fcntl(F_GETOWN_EX)", libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()).into())?;
        if owner[1] == 0 {
            return Ok(FownEntry { uid: 0, euid: 0, signum: signal as u32, pid_type: 0, pid: 0 });
        }
        answer("fcntl(F_GETOWNER_UIDS)", libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, ids.as_mut_ptr()).into())?;
        Ok(FownEntry {
            uid: ids[0],
            euid: ids[1],
            signum: signal as u32,
            pid_type: owner[0] as u32,
            pid: owner[1] as u32,
        })
    }
}

/// get_robust_list(2) of a thread: head and length.
pub fn robust_list(tid: i32) -> Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: two places for two words.
    answer("get_robust_list", unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// An ioctl with a buffer that the kernel reads and writes.
pub fn ioctl(fd: BorrowedFd<'_>, call: &'static str, request: u64, buffer: &mut [u8]) -> Result<i64> {
    debug_assert!((request >> 16 & 0x3fff) as usize <= buffer.len() || request >> 30 == 0);
    // SAFETY: the caller sizes the buffer for the request, whose size field says how much the kernel touches.
    answer(call, unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, buffer.as_mut_ptr()) }.into())
}

/// An ioctl with a plain value.
pub fn ioctl_value(fd: BorrowedFd<'_>, call: &'static str, request: u64, value: u64) -> Result<i64> {
    // SAFETY: requests with a value read no memory.
    answer(call, unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, value) }.into())
}

/// getsockopt(2) into raw bytes; how many were written.
pub fn getsockopt(fd: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> Result<usize> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: `len` is the size of `buffer`.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut len) };
    answer("getsockopt", r.into())?;
    Ok(len as usize)
}

/// setsockopt(2) from raw bytes.
pub fn setsockopt(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: the length is that of `value`.
    answer(
        "setsockopt",
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t) }
            .into(),
    )
    .map(drop)
}

/// bind(2) with an address as the kernel has it, for families that no crate knows.
pub fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    let len = address.len() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes at the address, which are there.
    if unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), len) } < 0 {
        return Err(Error::last("bind"));
    }
    Ok(())
}

/// sendto(2) with such an address; does not wait.
pub fn send_to(fd: BorrowedFd<'_>, bytes: &[u8], address: &[u8]) -> Result<()> {
    let (at, len) = (bytes.as_ptr().cast(), address.len() as libc::socklen_t);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads both ranges, which are there.
    if unsafe { libc::sendto(fd.as_raw_fd(), at, bytes.len(), flags, address.as_ptr().cast(), len) } < 0 {
        return Err(Error::last("sendto"));
    }
    Ok(())
}

/// A wait status, raw, of a child that changed its state; `None` if none did.
pub fn wait_child(pid: i32, flags: i32) -> Result<Option<(i32, i32)>> {
    let mut status = 0;
    loop {
        // SAFETY: a place for one int.
        let r = unsafe { libc::waitpid(pid, &raw mut status, flags) };
        match r {
            0 => return Ok(None),
            r if r > 0 => return Ok(Some((r, status))),
            _ if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => return Err(Error::last("waitpid")),
        }
    }
}

/// fcntl(F_SETLEASE).
pub fn set_lease(file: BorrowedFd<'_>, kind: i32) -> Result<()> {
    // SAFETY: integers only.
    answer("fcntl(F_SETLEASE)", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }.into()).map(drop)
}

/// Puts the calling thread, and no other, into a group.
pub fn set_effective_group(group: u32) -> Result<()> {
    let same = u32::MAX;
    // SAFETY: integers only; the bare call is for one thread.
    answer("setresgid", unsafe { libc::syscall(libc::SYS_setresgid, same, group, same) }).map(drop)
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: integers only.
    answer("kill", unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Nice value, policy (with SCHED_RESET_ON_FORK) and real-time priority of a thread: sched_getattr(2), getpriority(2).
pub fn scheduling(tid: i32) -> Result<(i32, u32, u32)> {
    /// `struct sched_attr`, in its first version.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        rest: [u64; 3],
    }
    const SIZE: usize = 48;
    const _: () = assert!(size_of::<Attributes>() == SIZE);
    let mut a = Attributes::default();
    // SAFETY: the kernel writes at most SIZE bytes, and `a` has as many.
    let answered = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut a, SIZE, 0) };
    answer("sched_getattr", answered)?;
    let reset = if a.flags & libc::SCHED_FLAG_RESET_ON_FORK as u64 != 0 { libc::SCHED_RESET_ON_FORK as u32 } else { 0 };
    // of a real-time thread, the nice value that it will have when it is none any more is not told there
    let nice = match a.policy as i32 {
        libc::SCHED_OTHER | libc::SCHED_BATCH => a.nice,
        _ => {
            // SAFETY: integers only. The raw getpriority gives 20 - nice, never negative.
            let answered = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
            20 - answer("getpriority", answered)? as i32
        }
    };
    Ok((nice, a.policy | reset, a.priority))
}

/// Our own descriptor of a number that the caller named: a duplicate, closed on exec.
pub fn dup_number(fd: i32) -> Result<OwnedFd> {
    // SAFETY: integers only; the new descriptor is ours alone.
    unsafe {
        let fd = answer("fcntl(F_DUPFD_CLOEXEC)", libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3).into())?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// What this process writes to standard output goes to standard error from now on; what was standard output is returned.
pub fn set_stdout_aside() -> Result<OwnedFd> {
    let aside = dup_number(1)?;
    // SAFETY: integers only; whoever writes to 1 goes on with another file.
    answer("dup2", unsafe { libc::dup2(2, 1) }.into())?;
    Ok(aside)
}

/// Our own descriptor of an open file, with a number above `number`.
pub fn dup_above(fd: BorrowedFd<'_>, number: i32) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, number.saturating_add(1)).call("fcntl(F_DUPFD_CLOEXEC)")
}

/// For a thread with a descriptor table of its own: has `epoll` watch a file by this number, whatever else that was.
pub fn epoll_add_as(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>, number: i32, events: u32, data: u64) -> Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the number is of a table that nobody else has, where nothing owns it; `event` lives over the call.
    unsafe {
        answer("dup3", libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC).into())?;
        answer("epoll_ctl", libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, number, &raw mut event).into())?;
    }
    Ok(())
}

/// Writes one zero byte to a descriptor that the caller gave us by number, and closes it.
pub fn say_ready(fd: i32) -> Result<()> {
    let copy = dup_number(fd)?;
    let written = rustix::io::write(&copy, &[0]);
    // SAFETY: the caller gave the number away; nobody in this process uses it after this.
    unsafe { libc::close(fd) };
    match written {
        Ok(_) => Ok(()),
        Err(errno) => Err(Error::Sys { call: "write(status fd)", source: errno.into() }),
    }
}

/// signalfd4(2), with the set as the kernel has it: bit n-1 is signal n.
pub fn signalfd(mask: u64, flags: i32) -> Result<OwnedFd> {
    // SAFETY: the kernel reads the eight bytes of `mask`; the new descriptor is ours alone.
    unsafe {
        let fd = answer("signalfd4", libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// The other end of a terminal pair, by its master (TIOCGPTPEER of ioctl_tty(2)); closed on exec.
///
/// That is said of the descriptor afterwards: the kernel would keep O_CLOEXEC among the flags of the open file, and
/// /proc/PID/fdinfo would show it for every descriptor of it.
pub fn open_pty_peer(master: BorrowedFd<'_>, flags: u32) -> Result<OwnedFd> {
    const TIOCGPTPEER: u64 = 0x5441;
    let flags = u64::from(flags & !(libc::O_CLOEXEC as u32));
    let fd = ioctl_value(master, "ioctl(TIOCGPTPEER)", TIOCGPTPEER, flags)?;
    // SAFETY: the new descriptor is ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).call("fcntl(F_SETFD)")?;
    Ok(fd)
}

/// fanotify_init(2).
pub fn fanotify_init(flags: u32, event_flags: u32) -> Result<OwnedFd> {
    // SAFETY: no memory is touched; the new descriptor is ours alone.
    unsafe {
        let fd = answer("fanotify_init", libc::syscall(libc::SYS_fanotify_init, flags, event_flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// fanotify_mark(2) of what a path leads to.
pub fn fanotify_mark(group: BorrowedFd<'_>, flags: u32, mask: u64, path: &[u8]) -> Result<()> {
    let path = std::ffi::CString::new(path).map_err(|_| Error::Gone)?;
    // SAFETY: the path is a string that lives until the call returns.
    let done = unsafe {
        libc::syscall(libc::SYS_fanotify_mark, group.as_raw_fd(), flags, mask, libc::AT_FDCWD, path.as_ptr())
    };
    answer("fanotify_mark", done).map(drop)
}

/// open_by_handle_at(2) with O_PATH: the file of a handle, on the file system that `mount` is on.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: u32, handle: &[u8]) -> Result<OwnedFd> {
    // struct file_handle: length, type, bytes.
    let mut raw = Vec::with_capacity(8 + handle.len());
    raw.extend_from_slice(&(handle.len() as u32).to_ne_bytes());
    raw.extend_from_slice(&kind.to_ne_bytes());
    raw.extend_from_slice(handle);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the first word says how many bytes follow the two; the new descriptor is ours alone.
    unsafe {
        let fd = answer(
            "open_by_handle_at",
            libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), raw.as_ptr(), flags),
        )?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Runs `work` with the id of a child of ours that is dead and not reaped, and reaps it afterwards. Nobody gets SIGCHLD
/// for it, and no `wait` of an embedding program finds it.
pub fn with_dead_child<T>(work: impl FnOnce(i32) -> Result<T>) -> Result<T> {
    // SAFETY: without CLONE_VM the child has a copy of our memory, and makes system calls only, so that locks held by
    // other threads do not matter; CLONE_VFORK lets us go on once it is gone. Exit signal 0.
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::CLONE_VFORK, 0, 0, 0, 0);
        if pid == 0 {
            loop {
                libc::syscall(libc::SYS_exit_group, 0);
            }
        }
        answer("clone", pid)? as i32
    };
    let result = work(pid);
    let reaped = wait_child(pid, libc::__WALL);
    let value = result?;
    reaped.map(|_| value)
}

/// Runs a plan's system calls in this very thread.
#[cfg(test)]
pub(crate) fn run_here(plan: &crate::plan::Plan) -> Result<Vec<i64>> {
    use standstill_restorer::plan::{Code, Expect, Kind, Op};
    let bytes = plan.ops_bytes();
    let mut data = vec![0u64; plan.data_len().div_ceil(8) + 8];
    for (i, byte) in plan.data().iter().enumerate() {
        data[i / 8] |= u64::from(*byte) << (8 * (i % 8));
    }
    let base = data.as_mut_ptr() as u64;
    let mut results = Vec::new();
    for (index, op) in bytes.chunks_exact(size_of::<Op>()).enumerate() {
        // SAFETY: the plan wrote whole operations, which are plain numbers.
        let op: Op = unsafe { std::ptr::read_unaligned(op.as_ptr().cast()) };
        assert_eq!(op.code, Code::Syscall as u32, "only system calls are run here");
        let args: Vec<u64> = (0..6)
            .map(|i| match op.kinds[i] {
                k if k == Kind::PlanAddr as u8 => base + op.args[i],
                k if k == Kind::Slot as u8 => results[op.args[i] as usize] as u64,
                _ => op.args[i],
            })
            .collect();
        // SAFETY: what a plan's call touches is its own data, which outlives it.
        let r = unsafe { libc::syscall(op.nr.into(), args[0], args[1], args[2], args[3], args[4], args[5]) };
        let r = if r < 0 { -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { r };
        let good = match op.expect {
            e if e == Expect::Any as u8 => true,
            e if e == Expect::NonNegative as u8 => r >= 0,
            e if e == Expect::Exact as u8 => r == op.want[0],
            _ => r >= 0 || op.want.contains(&r),
        };
        if !good {
            return Err(plan.error(index, r));
        }
        results.push(r);
    }
    drop(data);
    Ok(results)
}

/// dup3(2): `place` becomes another descriptor of `fd`'s open file; its number stays.
pub fn replace(fd: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both are open; the owner of `place` keeps owning its number.
    answer("dup3", unsafe { libc::dup3(fd.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) }.into()).map(drop)
}

/// The limit of open files that this process was started with, if it has another one now.
static LIMIT_OF_FILES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// From now on this process may have as many files open as it may allow itself: those of all tasks go through its hands.
/// For a program of our own; a library does not change its host's limits.
pub fn raise_limit_of_files() {
    use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let (Some(soft), Ok(())) = (limit.current, setrlimit(Resource::Nofile, raised)) {
        LIMIT_OF_FILES.store(soft, std::sync::atomic::Ordering::Relaxed);
    }
}

/// The program will have no signal blocked, whatever is held off here, and the limit of open files that we were given.
pub fn plain_signals(command: &mut std::process::Command) -> &mut std::process::Command {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: between fork and exec there are only system calls, on words that live across them.
    unsafe {
        command.pre_exec(|| {
            let none = 0u64;
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, 8);
            let given = LIMIT_OF_FILES.load(std::sync::atomic::Ordering::Relaxed);
            let mut limit: libc::rlimit = std::mem::zeroed();
            if given != 0 && libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
                limit.rlim_cur = given;
                libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
            }
            Ok(())
        })
    }
}

/// The program will have this descriptor, under the same number.
pub fn inheriting<'a>(command: &'a mut std::process::Command, fd: BorrowedFd<'_>) -> &'a mut std::process::Command {
    use std::os::unix::process::CommandExt as _;
    let number = fd.as_raw_fd();
    // SAFETY: between fork and exec there is one system call with integers; a number that is closed by then is an error.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    }
}

/// Signals that are blocked in this thread for as long as this lives.
#[derive(Debug)]
pub struct BlockedSignals {
    before: u64,
}

impl BlockedSignals {
    /// Blocks the signals of `mask` (bit n - 1 for signal n) besides those that are.
    pub fn new(mask: u64) -> Result<BlockedSignals> {
        let mut before = 0u64;
        // SAFETY: two words that live across the call.
        let r =
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const mask, &raw mut before, 8) };
        answer("rt_sigprocmask", r)?;
        Ok(BlockedSignals { before })
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the word lives across the call.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const self.before, 0, 8) };
    }
}
