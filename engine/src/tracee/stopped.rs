//! A thread that was seized and stopped.

use std::time::Duration;

use standstill_restorer::arch::Registers;

use crate::error::{At, Error, Result};
use crate::sys::ptrace::{self, Rseq, Stop};

/// A stopped thread; it goes on when this is dropped.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    /// General registers as found; a call that only our stop interrupted is wound back.
    pub registers: Registers,
    /// Blocked signals as found.
    pub mask: u64,
    /// The job control signal that had stopped it before we came.
    pub group_stop: Option<i32>,
    /// Extended state, in XSAVE's standard format.
    pub xstate: Vec<u8>,
    /// Its restartable sequences.
    pub rseq: Rseq,
    /// Signals that wait for this thread, raw.
    pub pending: Vec<[u8; 128]>,
    /// Signals that wait for its process, raw; the group leader's alone.
    pub shared_pending: Vec<[u8; 128]>,
    /// Its tracer let go (or it was killed): nothing to do when dropped.
    released: bool,
    /// A signal that only its stop tells of (SIGSTOP meant for a task that runs the executor).
    owed: i32,
}

const EINTR: i64 = -(libc::EINTR as i64);
const ERESTART_RESTARTBLOCK: i64 = -516;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOHAND: i64 = -514;

/// System calls that end with EINTR at any stop (signal(7)), and that have done nothing then.
fn interrupted_by_stops(nr: i64) -> bool {
    matches!(
        nr,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_io_getevents
            | IO_PGETEVENTS
            | libc::SYS_io_uring_enter
            | libc::SYS_semtimedop
            | libc::SYS_semop
            // sockets with a limit (SO_RCVTIMEO, SO_SNDTIMEO), and what is read and written with it
            | libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_accept
            | libc::SYS_accept4
    )
}

/// Does this call, which the kernel would go on with by what it remembers (ERESTART_RESTARTBLOCK), mean the same when it
/// begins again? A limit is waited for anew then, as the limits of all other waits are. A sleep that has told the program
/// what is left of it begins again only where that is what it asks for, too; else it ends with EINTR, and the program knows.
fn begins_again(r: &Registers) -> bool {
    match r.orig_ax as i64 {
        libc::SYS_poll => true,
        // without a limit it is restarted as other calls are
        libc::SYS_futex => r.r10 != 0,
        libc::SYS_nanosleep => r.si == 0 || r.si == r.di,
        libc::SYS_clock_nanosleep => r.si & libc::TIMER_ABSTIME as u64 == 0 && (r.r10 == 0 || r.r10 == r.dx),
        _ => false,
    }
}

/// A call that was wound back in an image, as the kernel had it: it decides, when the thread is let go, whether the call
/// begins again or a handler makes it end with EINTR. Which of its codes it was follows from the call.
pub fn undo_winding(mut r: Registers) -> Registers {
    let nr = r.ax as i64;
    r.orig_ax = r.ax;
    let only_without_handler = interrupted_by_stops(nr)
        && !matches!(nr, libc::SYS_read | libc::SYS_readv | libc::SYS_write | libc::SYS_writev)
        || matches!(
            nr,
            libc::SYS_pause
                | libc::SYS_rt_sigsuspend
                | libc::SYS_select
                | libc::SYS_pselect6
                | libc::SYS_ppoll
                | libc::SYS_clock_nanosleep
                | libc::SYS_msgrcv
                | libc::SYS_msgsnd
        )
        || begins_again(&r);
    r.ax = (if only_without_handler { ERESTARTNOHAND } else { ERESTARTSYS }) as u64;
    r.ip = r.ip.wrapping_add(2);
    r
}

/// io_pgetevents(2), which libc does not name on every architecture.
const IO_PGETEVENTS: i64 = 333;

/// A seized thread whose stop was asked for and not yet seen.
#[derive(Debug)]
pub struct Held {
    tid: i32,
    done: bool,
    /// The stop, if it was seen already.
    seen: Option<Stop>,
}

impl Held {
    /// Seizes a thread and asks it to stop. It does not end with its tracer.
    pub fn seize(tid: i32, options: usize) -> Result<Held> {
        ptrace::seize(tid, ptrace::SYSGOOD | options).task(tid)?;
        let held = Held { tid, done: false, seen: None };
        ptrace::interrupt(tid).task(tid)?;
        Ok(held)
    }

    /// The thread's id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Waits until it is stopped or gone, without looking at why.
    pub fn settle(&mut self, limit: Duration) -> Result<()> {
        if self.seen.is_none() {
            self.seen = ptrace::wait_quietly(self.tid, limit)?;
        }
        Ok(())
    }

    /// Waits for the stop; signals that come first are passed on.
    pub fn wait(mut self, limit: Duration) -> Result<Stopped> {
        let tid = self.tid;
        let mut stop = self.seen;
        let group_stop = loop {
            match stop.take().map_or_else(|| ptrace::wait_stop(tid, limit), Ok).task(tid)? {
                Stop::Trap => break None,
                Stop::Group(signal) => break Some(signal),
                Stop::Signal(signal) => ptrace::cont(tid, signal).task(tid)?,
                Stop::Syscall => ptrace::cont(tid, 0).task(tid)?,
            }
        };
        self.done = true;
        let mut stopped = Stopped {
            tid,
            registers: Registers::default(),
            mask: 0,
            group_stop,
            xstate: Vec::new(),
            rseq: Rseq::default(),
            pending: Vec::new(),
            shared_pending: Vec::new(),
            released: false,
            owed: 0,
        };
        stopped.registers = ptrace::registers(tid).task(tid)?;
        if stopped.registers.cs != 0x33 {
            return Err(Error::refused(
                "a 32-bit task",
                "Standstill carries 64-bit x86 tasks only; run a 64-bit build of the program",
            ))
            .task(tid);
        }
        // at once: whoever kills us from here on leaves a call behind that goes on
        if stopped.wind_back_wait() {
            ptrace::set_registers(tid, &stopped.registers).task(tid)?;
        }
        stopped.mask = ptrace::signal_mask(tid).task(tid)?;
        stopped.xstate = ptrace::xstate(tid).task(tid)?;
        stopped.rseq = ptrace::rseq(tid).task(tid)?;
        Ok(stopped)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // who does not stop soon is let go by the kernel, when this thread ends
        if !self.done && ptrace::wait_stop(self.tid, Duration::from_secs(1)).is_ok() {
            let signal = match ptrace::stopped(self.tid) {
                Ok(Some(Stop::Signal(signal))) => signal,
                _ => 0,
            };
            let _ = ptrace::detach(self.tid, signal);
        }
    }
}

impl Stopped {
    /// The thread's id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets a wait go on that returned EINTR only because of our stop. The kernel decides when the thread is let go: with a
    /// handler to run it is EINTR, else the call begins again, and the program never hears of the stop. True if there was one.
    fn wind_back_wait(&mut self) -> bool {
        let r = &mut self.registers;
        let interrupted = r.ax as i64 == EINTR && i64::try_from(r.orig_ax).is_ok_and(interrupted_by_stops);
        if interrupted {
            r.ax = ERESTARTNOHAND as u64;
        }
        interrupted
    }

    /// If the thread is inside a restartable sequence, moves it to the sequence's abort handler, as the kernel would have
    /// done at this preemption. `critical` is the `struct rseq_cs` that the thread's rseq area points to.
    pub fn abort_sequence(&mut self, start: u64, length: u64, abort: u64) {
        if self.registers.ip.wrapping_sub(start) < length {
            self.registers.ip = abort;
        }
    }

    /// Registers for the image: a call to restart is wound back; one that only the kernel's memory could resume
    /// (ERESTART_RESTARTBLOCK) begins again where that is right, or ends with EINTR (CRIU: always).
    pub fn registers_for_image(&self) -> Registers {
        let mut r = self.registers;
        if r.orig_ax as i64 >= 0 {
            match r.ax as i64 {
                ERESTARTNOHAND | ERESTARTSYS | ERESTARTNOINTR => {
                    r.ax = r.orig_ax;
                    r.ip = r.ip.wrapping_sub(2);
                }
                ERESTART_RESTARTBLOCK if begins_again(&r) => {
                    r.ax = r.orig_ax;
                    r.ip = r.ip.wrapping_sub(2);
                }
                ERESTART_RESTARTBLOCK => r.ax = EINTR as u64,
                _ => {}
            }
        }
        r
    }

    /// Registers for a program whose engine is dead and that returns without the kernel's help: every restart is made
    /// by the code itself, with restart_syscall(2) where the kernel still remembers the rest.
    pub fn registers_for_healing(&self) -> Registers {
        let mut r = self.registers_for_image();
        if self.registers.orig_ax as i64 >= 0 && self.registers.ax as i64 == ERESTART_RESTARTBLOCK {
            r.ax = libc::SYS_restart_syscall as u64;
            r.ip = self.registers.ip.wrapping_sub(2);
        }
        r
    }

    /// Reads what a thread has become that was let run, and stopped again, since it was found. Its mask is what it was.
    pub fn read_again(&mut self) -> Result<()> {
        let tid = self.tid;
        self.registers = ptrace::registers(tid).task(tid)?;
        if self.wind_back_wait() {
            ptrace::set_registers(tid, &self.registers).task(tid)?;
        }
        self.xstate = ptrace::xstate(tid).task(tid)?;
        self.rseq = ptrace::rseq(tid).task(tid)?;
        Ok(())
    }

    /// A signal to pass on when the thread is let go.
    pub fn owe(&mut self, signal: i32) {
        self.owed = signal;
    }

    /// Lets the thread go with registers as found.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    /// The thread was killed or is somebody else's to let go.
    pub fn forget(mut self) {
        self.released = true;
    }

    fn let_go(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        // only what changed needs to be put back: a thread that was not infected differs by a wound-back wait at most
        let done = ptrace::set_registers(self.tid, &self.registers).and_then(|()| ptrace::detach(self.tid, self.owed));
        match done {
            // it was killed while it was stopped
            Err(e) if e.errno() == libc::ESRCH => Ok(()),
            other => other.task(self.tid),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(e) = self.let_go() {
            tracing::error!("letting go: {e}");
        }
    }
}
