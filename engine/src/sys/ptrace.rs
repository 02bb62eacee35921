//! ptrace(2), as far as a dump and a restore need it. All requests must come from the thread that seized the task.
//!
//! A stop is not learned from `wait`, which another thread of the program may have taken, but asked for: a stopped
//! tracee answers PTRACE_GETSIGINFO, a running one says ESRCH.

use std::io;
use std::time::{Duration, Instant};

use standstill_restorer::arch::Registers;

use crate::error::{Error, Result};

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_EVENT_STOP: i32 = 128;
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

/// PTRACE_O_EXITKILL.
pub const EXITKILL: usize = 0x10_0000;
/// PTRACE_O_SUSPEND_SECCOMP.
pub const SUSPEND_SECCOMP: usize = 0x20_0000;
/// PTRACE_O_TRACESYSGOOD.
pub const SYSGOOD: usize = 1;

fn request(call: &'static str, req: u32, tid: i32, addr: usize, data: usize) -> Result<i64> {
    // SAFETY: each caller below passes buffers that are as large as the request says and live across the call.
    let r = unsafe { libc::syscall(libc::SYS_ptrace, req as libc::c_long, tid as libc::c_long, addr, data) };
    if r < 0 {
        return Err(Error::last(call));
    }
    Ok(r)
}

/// Attaches without stopping; `options` are PTRACE_O_*.
pub fn seize(tid: i32, options: usize) -> Result<()> {
    request("ptrace(PTRACE_SEIZE)", libc::PTRACE_SEIZE, tid, 0, options).map(drop)
}

/// Changes the PTRACE_O_* of a stopped task.
pub fn set_options(tid: i32, options: usize) -> Result<()> {
    request("ptrace(PTRACE_SETOPTIONS)", libc::PTRACE_SETOPTIONS, tid, 0, options).map(drop)
}

/// Asks a seized task to stop.
pub fn interrupt(tid: i32) -> Result<()> {
    request("ptrace(PTRACE_INTERRUPT)", libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped task run, with `signal` delivered (0: none).
pub fn cont(tid: i32, signal: i32) -> Result<()> {
    request("ptrace(PTRACE_CONT)", libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// As [`cont`], up to the next system call's entry or exit.
pub fn cont_to_syscall(tid: i32) -> Result<()> {
    request("ptrace(PTRACE_SYSCALL)", libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Lets go of a stopped task.
pub fn detach(tid: i32, signal: i32) -> Result<()> {
    request("ptrace(PTRACE_DETACH)", libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The general registers.
pub fn registers(tid: i32) -> Result<Registers> {
    let mut regs = Registers::default();
    let mut iov = libc::iovec { iov_base: (&raw mut regs).cast(), iov_len: size_of::<Registers>() };
    request("ptrace(PTRACE_GETREGSET)", libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize)?;
    if iov.iov_len != size_of::<Registers>() {
        return Err(Error::refused(
            "a 32-bit task",
            "Standstill carries 64-bit x86 tasks only; build the program for x86-64",
        ));
    }
    Ok(regs)
}

/// Sets the general registers.
pub fn set_registers(tid: i32, regs: &Registers) -> Result<()> {
    let mut copy = *regs;
    let mut iov = libc::iovec { iov_base: (&raw mut copy).cast(), iov_len: size_of::<Registers>() };
    request("ptrace(PTRACE_SETREGSET)", libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize).map(drop)
}

/// The whole extended state, in XSAVE's standard format.
pub fn xstate(tid: i32) -> Result<Vec<u8>> {
    let mut buf = [0u8; 16 << 10];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(
        "ptrace(PTRACE_GETREGSET, NT_X86_XSTATE)",
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )?;
    Ok(buf.get(..iov.iov_len).unwrap_or_default().to_vec())
}

/// Sets the whole extended state.
pub fn set_xstate(tid: i32, state: &[u8]) -> Result<()> {
    let mut iov = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    request(
        "ptrace(PTRACE_SETREGSET, NT_X86_XSTATE)",
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut iov as usize,
    )
    .map(drop)
}

/// The blocked signals.
pub fn signal_mask(tid: i32) -> Result<u64> {
    let mut mask = 0u64;
    request("ptrace(PTRACE_GETSIGMASK)", PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals.
pub fn set_signal_mask(tid: i32, mask: u64) -> Result<()> {
    request("ptrace(PTRACE_SETSIGMASK)", PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// What PTRACE_GET_RSEQ_CONFIGURATION says of a thread's restartable sequences.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rseq {
    /// Address of the thread's `struct rseq`; 0 when it has none.
    pub address: u64,
    /// Its size.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

/// A thread's registration of restartable sequences; all zero where the kernel has none.
pub fn rseq(tid: i32) -> Result<Rseq> {
    let mut r = Rseq::default();
    match request(
        "ptrace(PTRACE_GET_RSEQ_CONFIGURATION)",
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<Rseq>(),
        &raw mut r as usize,
    ) {
        Ok(_) => Ok(r),
        Err(e) if matches!(e.errno(), libc::EIO | libc::EINVAL) => Ok(Rseq::default()),
        Err(e) => Err(e),
    }
}

/// The `n`th seccomp filter of a thread, newest first, as classic BPF instructions of 8 bytes, and its flags.
/// `None` past the last one.
pub fn seccomp_filter(tid: i32, n: usize) -> Result<Option<(Vec<u8>, u64)>> {
    const CALL: &str = "ptrace(PTRACE_SECCOMP_GET_FILTER)";
    let count = match request(CALL, PTRACE_SECCOMP_GET_FILTER, tid, n, 0) {
        Ok(c) => usize::try_from(c).unwrap_or(0),
        Err(e) if e.errno() == libc::ENOENT => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut code = vec![0u8; count * 8];
    request(CALL, PTRACE_SECCOMP_GET_FILTER, tid, n, code.as_mut_ptr() as usize)?;
    let mut meta = [n as u64, 0];
    request("ptrace(PTRACE_SECCOMP_GET_METADATA)", PTRACE_SECCOMP_GET_METADATA, tid, 16, meta.as_mut_ptr() as usize)?;
    Ok(Some((code, meta[1])))
}

/// Signals waiting for the thread, or, with `shared`, for its process: raw 128-byte siginfo structures.
pub fn pending_signals(tid: i32, shared: bool) -> Result<Vec<[u8; 128]>> {
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut buf = [[0u8; 128]; BATCH];
        #[repr(C)]
        struct Args {
            off: u64,
            flags: u32,
            nr: i32,
        }
        let args = Args { off: all.len() as u64, flags: u32::from(shared), nr: BATCH as i32 };
        let n = request(
            "ptrace(PTRACE_PEEKSIGINFO)",
            PTRACE_PEEKSIGINFO,
            tid,
            &raw const args as usize,
            buf.as_mut_ptr() as usize,
        )?;
        let n = usize::try_from(n).unwrap_or(0).min(BATCH);
        all.extend_from_slice(&buf[..n]);
        if n < BATCH {
            return Ok(all);
        }
    }
}

/// Why a task is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By [`interrupt`].
    Trap,
    /// By job control, with this signal; it stays stopped when it is let go.
    Group(i32),
    /// About to take this signal, which must be passed on by [`cont`] or [`detach`].
    Signal(i32),
    /// At the entry or the exit of a system call.
    Syscall,
}

/// Why `tid` is stopped, or `None` while it runs.
pub fn stopped(tid: i32) -> Result<Option<Stop>> {
    let mut info = [0i32; 32];
    match request("ptrace(PTRACE_GETSIGINFO)", libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize) {
        Ok(_) => {}
        Err(e) if e.errno() == libc::ESRCH => return Ok(None),
        Err(e) => return Err(e),
    }
    let (signal, code) = (info[0], info[2]);
    Ok(Some(if code >> 8 == PTRACE_EVENT_STOP {
        if signal == libc::SIGTRAP {
            Stop::Trap
        } else {
            Stop::Group(signal)
        }
    } else if code == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(signal)
    }))
}

/// Takes what `wait` has to say of `tid`, so that it does not pile up; true when it said that the task ended.
fn reaped(tid: i32) -> bool {
    let mut status = 0;
    // SAFETY: `status` is a place for one int.
    let r = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG | libc::__WNOTHREAD) };
    r == tid && (libc::WIFEXITED(status) || libc::WIFSIGNALED(status))
}

static ALONE: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// For a program that knows that no other thread of it waits for children or wants SIGCHLD: blocks that signal in this
/// thread and those that it starts, so that stops can be slept for instead of being asked for again and again.
pub fn alone() {
    let set = child_signal();
    // SAFETY: a set of signals that lives across the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    ALONE.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// True after [`alone`].
pub fn is_alone() -> bool {
    ALONE.load(std::sync::atomic::Ordering::Relaxed)
}

fn child_signal() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, filled by the two calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        set
    }
}

/// Waits until `tid` is stopped.
pub fn wait_stop(tid: i32, limit: Duration) -> Result<Stop> {
    // where nobody waits for children, nobody is surprised by what `wait` would say of this one
    let alone = is_alone();
    if let Some(stop) = stopped(tid)? {
        let _ = alone || reaped(tid);
        return Ok(stop);
    }
    let began = Instant::now();
    let mut turns = 0u32;
    loop {
        if let Some(stop) = stopped(tid)? {
            let _ = alone || reaped(tid);
            return Ok(stop);
        }
        if turns % 16 == 15 && (reaped(tid) || !exists(tid)) {
            return Err(Error::Gone);
        }
        if began.elapsed() > limit {
            return Err(Error::Timeout { what: "the stop of a task", seconds: limit.as_secs() });
        }
        if alone {
            // a stop that came since we asked has left the signal pending, so nothing is missed
            let set = child_signal();
            let patience = libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 };
            // SAFETY: set and patience live across the call.
            unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const patience) };
        } else {
            match turns {
                0..8 => std::hint::spin_loop(),
                8..256 => std::thread::sleep(Duration::from_micros(5)),
                _ => std::thread::sleep(Duration::from_micros(500)),
            }
        }
        turns += 1;
    }
}

/// Whether a task of this id can still run (neither gone nor a zombie).
pub fn exists(tid: i32) -> bool {
    match std::fs::read(format!("/proc/{tid}/stat")) {
        Ok(text) => {
            let state = text.iter().rposition(|&b| b == b')').and_then(|i| text.get(i + 2)).copied();
            !matches!(state, Some(b'X' | b'x' | b'Z') | None)
        }
        Err(e) => e.kind() != io::ErrorKind::NotFound && e.raw_os_error() != Some(libc::ESRCH),
    }
}

/// Waits until a seized task is stopped or gone (`None`); signals that come first are passed on.
pub fn wait_quietly(tid: i32, limit: Duration) -> Result<Option<Stop>> {
    loop {
        match wait_stop(tid, limit) {
            Ok(Stop::Signal(signal)) => cont(tid, signal)?,
            Ok(Stop::Syscall) => cont(tid, 0)?,
            Ok(stop @ (Stop::Trap | Stop::Group(_))) => return Ok(Some(stop)),
            Err(Error::Gone) => return Ok(None),
            Err(e) if e.errno() == libc::ESRCH => return Ok(None),
            Err(e) => return Err(e),
        }
    }
}
