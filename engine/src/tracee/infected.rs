//! A process with the executor in it.
//!
//! Nothing of the program is overwritten. The first system calls run from a [trampoline](standstill_restorer::arch) in the
//! zero tail of `[vdso]`; they map the executor's area, shared anonymous memory that the engine then opens through
//! `/proc/PID/map_files`. The area has the blob and, for each thread, machine code that leads back, a control, a stack and
//! room for one plan.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use standstill_restorer::arch::{self, Registers, STUB_SIZE};
use standstill_restorer::plan::{Code, Control, Expect, Owner, LEAVE};

use super::{await_entry, await_result, begin_call, Stopped, ALL_SIGNALS, STOP_LIMIT};
use crate::error::{At, Call, Error, Place, Result};
use crate::guard::{Act, Guard, List};
use crate::plan::{Arg, Plan};
use crate::sys::calls;
use crate::sys::futex::{self, RobustList};
use crate::sys::memory::{self, bytes_of, Shared, SharedWord};
use crate::sys::ptrace::{self, Stop};

/// The executor.
pub const BLOB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/executor.bin"));
/// The name that a leaked area carries, where the kernel can name shared memory.
pub const AREA_NAME: &[u8] = b"standstill";

const PAGE: usize = 4096;
pub(super) const STACK: usize = 4096;
/// Room for a plan in the group leader, and in every other thread.
const LEADER_ROOM: usize = 128 << 10;
const THREAD_ROOM: usize = 2 << 10;
/// For so many threads most of the area will be used, and its pages are asked for at once.
const MANY_THREADS: usize = 16;
/// How long a plan of questions may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Where things lie in the executor's area.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// Address in the task.
    pub address: u64,
    /// Bytes of code.
    pub code: usize,
    /// Bytes in all.
    pub len: usize,
    xsave: usize,
    threads: usize,
}

/// Where things of a copy of the process lie, behind the slots of its threads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spare {
    pub(super) control: usize,
    pub(super) owner: usize,
    pub(super) stack_top: usize,
    pub(super) room: usize,
}

impl Spare {
    const SIZE: usize = 256 + STACK + Self::ROOM;
    pub(super) const ROOM: usize = 2048;
}

impl Area {
    fn of(threads: usize, xsave: usize) -> Area {
        let code = (BLOB.len().next_multiple_of(64) + threads * STUB_SIZE).next_multiple_of(PAGE);
        let mut area = Area { address: 0, code, len: 0, xsave: xsave.next_multiple_of(64), threads };
        area.len = (area.slot(threads) + Spare::SIZE).next_multiple_of(PAGE);
        area
    }
    /// Where it is in the task.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.address..self.address + self.len as u64
    }
    pub(super) fn spare(&self) -> Spare {
        let control = self.slot(self.threads);
        let stack_top = control + 256 + STACK;
        Spare { control, owner: control + 192, stack_top, room: stack_top }
    }
    fn stub(&self, thread: usize) -> usize {
        BLOB.len().next_multiple_of(64) + thread * STUB_SIZE
    }
    /// The owner word is the first thing in the data, the slots follow.
    fn slot(&self, thread: usize) -> usize {
        let first = self.code + 64;
        let size =
            |room: usize| (size_of::<Control>().next_multiple_of(64) + self.xsave + STACK + room).next_multiple_of(64);
        if thread == 0 {
            first
        } else {
            first + size(LEADER_ROOM) + (thread - 1) * size(THREAD_ROOM)
        }
    }
    fn xsave(&self, thread: usize) -> usize {
        self.slot(thread) + size_of::<Control>().next_multiple_of(64)
    }
    fn stack_top(&self, thread: usize) -> usize {
        self.xsave(thread) + self.xsave + STACK
    }
    fn room(&self, thread: usize) -> (usize, usize) {
        (self.stack_top(thread), if thread == 0 { LEADER_ROOM } else { THREAD_ROOM })
    }
}

/// A plan that was asked in one thread, and where its parts lie.
#[derive(Debug)]
struct Question {
    plan: Plan,
    data: usize,
    results: usize,
}

/// What a thread answered.
#[derive(Debug, Default)]
pub struct Answers {
    /// A word an operation.
    pub results: Vec<i64>,
    /// The plan's data, with what the kernel wrote there.
    pub data: Vec<u8>,
}

impl Answers {
    /// A structure of `len` bytes that an operation filled.
    pub fn bytes(&self, at: crate::plan::Data) -> &[u8] {
        let from = usize::try_from(at.offset).unwrap_or(usize::MAX);
        self.data.get(from..from.saturating_add(at.len)).unwrap_or_default()
    }
    /// The `n`th 32-bit word at `at`.
    pub fn u32(&self, at: crate::plan::Data, n: usize) -> u32 {
        self.bytes(at).get(n * 4..n * 4 + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    }
    /// The `n`th 64-bit word at `at`.
    pub fn u64(&self, at: crate::plan::Data, n: usize) -> u64 {
        self.bytes(at).get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
    /// The result of an operation.
    pub fn result(&self, at: crate::plan::At) -> i64 {
        self.results.get(at.0 as usize).copied().unwrap_or(-i64::from(libc::ENOSYS))
    }
}

/// A stopped process whose threads run the executor.
#[derive(Debug)]
pub struct Infected<'a> {
    threads: Vec<Stopped>,
    area: Area,
    shared: Option<Shared>,
    /// The area's memory as a file.
    file: Option<File>,
    robust: &'a RobustList,
    memory: File,
    /// Trampoline in the vdso: address, and the bytes that were there (all zero).
    tail: u64,
    running: bool,
    halting: bool,
    halted: bool,
    asked: Vec<Question>,
    cured: bool,
}

impl<'a> Infected<'a> {
    /// Puts the executor into a stopped process; see [`Infected::prepare`].
    pub fn infect(threads: Vec<Stopped>, codes: &[(u64, &[u8])], robust: &'a RobustList) -> Result<Infected<'a>> {
        let mut infected = Infected::prepare(threads, codes, robust)?;
        Infected::enter(std::slice::from_mut(&mut infected))?;
        Ok(infected)
    }

    /// Gets ready to put the executor into a stopped process; `threads` are all of its threads, the group leader first.
    ///
    /// `codes` are places where it has code, with what is there: `[vdso]` first, then others; the first that ends in enough
    /// zeros is used for the trampoline.
    pub fn prepare(threads: Vec<Stopped>, codes: &[(u64, &[u8])], robust: &'a RobustList) -> Result<Infected<'a>> {
        let Some(leader) = threads.first() else { return Err(Error::Gone) };
        let pid = leader.tid();
        let xsave = threads.iter().map(|t| t.xstate.len()).max().unwrap_or(0).max(4096);
        let memory = memory::open_memory(pid).task(pid)?;
        let tail = codes
            .iter()
            .find_map(|(at, bytes)| tail_of(bytes).map(|offset| at + offset as u64))
            .ok_or_else(|| {
                Error::refused(
                    "a task without [vdso] and without room in its code",
                    "boot with vdso=1 and do not unmap it in the program",
                )
            })
            .task(pid)?;
        Ok(Infected {
            area: Area::of(threads.len(), xsave),
            threads,
            shared: None,
            file: None,
            robust,
            memory,
            tail,
            running: false,
            halting: false,
            halted: false,
            asked: Vec::new(),
            cured: false,
        })
    }

    /// The group leader's id.
    pub fn pid(&self) -> i32 {
        self.threads.first().map_or(0, Stopped::tid)
    }

    /// The threads, leader first.
    pub fn threads(&self) -> &[Stopped] {
        &self.threads
    }

    /// Where the executor is, so that a dump leaves it out.
    pub fn area(&self) -> Area {
        self.area
    }

    /// Adds to the first plan that the area gets its name.
    pub fn name_area(&self, plan: &mut Plan) {
        const PR_SET_VMA: i32 = 0x5356_4d41;
        let name = plan.string(AREA_NAME);
        let args = [PR_SET_VMA.into(), 0.into(), self.area.address.into(), self.area.len.into(), name.into()];
        plan.ask("name of the executor's area", libc::SYS_prctl, &args);
    }

    /// Puts the executor into processes that were prepared, side by side. After an error each of them still is either as it
    /// was or can be cured, which dropping it does.
    pub fn enter(hosts: &mut [Infected<'_>]) -> Result<()> {
        for host in &*hosts {
            let leader = &host.threads[0];
            let stub = arch::trampoline(host.tail, &leader.registers_for_healing(), leader.mask);
            memory::write_at(&host.memory, host.tail, &stub).task(host.pid())?;
        }
        let shared = (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
        let mapped = remote(hosts, libc::SYS_mmap, |h| [0, h.area.len as u64, 5, shared, u64::MAX, 0], "mmap");
        // all that there is, before the first error: what has an address is unmapped again
        for (host, address) in hosts.iter_mut().zip(&mapped) {
            host.area.address = *address.as_ref().unwrap_or(&0);
        }
        mapped.into_iter().try_for_each(|address| address.map(drop))?;
        let data = |h: &Infected<'_>| {
            let (at, code, len) = (h.area.address, h.area.code as u64, h.area.len as u64);
            [at + code, len - code, 3, 0, 0, 0]
        };
        remote(hosts, libc::SYS_mprotect, data, "mprotect").into_iter().try_for_each(|done| done.map(drop))?;
        hosts.iter_mut().try_for_each(|host| host.fill().task(host.pid()))
    }

    /// Fills the area, which is there now.
    fn fill(&mut self) -> Result<()> {
        let (pid, address, code) = (self.pid(), self.area.address, self.area.code as u64);
        let path = format!("/proc/{pid}/map_files/{address:x}-{:x}", address + code);
        let file = File::options().read(true).write(true).open(&path).call("open").at(Place::Path(path.into()))?;
        let shared = Shared::map(file.as_fd(), 0, self.area.len)?;
        if self.threads.len() >= MANY_THREADS {
            shared.populate(self.area.slot(1));
        }
        shared.write(0, BLOB);
        self.robust.own(&shared, self.area.code);
        for (i, thread) in self.threads.iter().enumerate() {
            let at = self.area.stub(i);
            shared.write(at, &arch::way_back(address + at as u64, &thread.registers_for_healing(), thread.mask));
            let control = Control {
                turn: 0.into(),
                done: 0.into(),
                orphan: 0,
                reserved: 0,
                owner: address + self.area.code as u64,
                ops: 0,
                count: 0,
                results: 0,
                base: 0,
                failed: 0.into(),
                at: 0.into(),
                failure: 0.into(),
                xsave: address + self.area.xsave(i) as u64,
                way_back: address + at as u64,
                arena: 0,
            };
            write_control(&shared, self.area.slot(i), &control);
        }
        self.shared = Some(shared);
        self.file = Some(file);
        Ok(())
    }

    /// Registers with which the stopped group leader makes a system call, from the trampoline.
    fn for_call(&self, nr: i64, args: [u64; 6]) -> Registers {
        let mut regs = self.threads[0].registers;
        regs.ip = self.tail;
        regs.ax = nr as u64;
        regs.orig_ax = u64::MAX;
        regs.flags &= !0x100;
        [regs.di, regs.si, regs.dx, regs.r10, regs.r8, regs.r9] = args;
        regs
    }

    fn shared(&self) -> Result<&Shared> {
        self.shared.as_ref().ok_or(Error::Gone)
    }

    /// Starts one plan in each thread (in the order of [`Infected::threads`]); they run side by side.
    pub fn start(&mut self, plans: Vec<Plan>) -> Result<()> {
        let address = self.area.address;
        for (i, plan) in plans.into_iter().enumerate().take(self.threads.len()) {
            plan.check()?;
            let (room, size) = self.area.room(i);
            let ops = plan.ops_bytes();
            let results = ops.len().next_multiple_of(64);
            let data = (results + plan.len() * 8).next_multiple_of(64);
            if data + plan.data_len() > size {
                return Err(Error::Usage { what: format!("a plan of {} operations does not fit", plan.len()) });
            }
            let shared = self.shared()?;
            shared.write(room, &ops);
            shared.write(room + data, plan.data());
            let slot = self.area.slot(i);
            let turn = shared.at::<Control>(slot).turn.load(Ordering::Relaxed);
            let at = |offset: usize| (address + (room + offset) as u64).to_le_bytes();
            shared.write(slot + std::mem::offset_of!(Control, ops), &at(0));
            shared.write(slot + std::mem::offset_of!(Control, count), &(plan.len() as u64).to_le_bytes());
            shared.write(slot + std::mem::offset_of!(Control, results), &at(results));
            shared.write(slot + std::mem::offset_of!(Control, base), &at(data));
            shared.at::<Control>(slot).failed.store(0, Ordering::Relaxed);
            shared.at::<Control>(slot).turn.store(turn + 1, Ordering::Release);
            let question = Question { plan, data: room + data, results: room + results };
            if self.running {
                futex::wake(&self.shared()?.at::<Control>(slot).turn);
            } else {
                self.run_thread(i)?;
                if i == 0 {
                    // the way back lies in the area now, and so does the leader: the tail is as it was until we leave
                    memory::write_at(&self.memory, self.tail, &[0; STUB_SIZE])?;
                }
            }
            match self.asked.get_mut(i) {
                Some(q) => *q = question,
                None => self.asked.push(question),
            }
        }
        self.running = true;
        Ok(())
    }

    fn run_thread(&self, i: usize) -> Result<()> {
        let thread = &self.threads[i];
        let mut regs: Registers = thread.registers;
        regs.ip = self.area.address;
        regs.orig_ax = u64::MAX;
        regs.di = self.area.address + self.area.slot(i) as u64;
        regs.sp = self.area.address + self.area.stack_top(i) as u64;
        regs.flags &= !0x500;
        ptrace::set_registers(thread.tid(), &regs).task(thread.tid())?;
        ptrace::set_signal_mask(thread.tid(), ALL_SIGNALS).task(thread.tid())?;
        ptrace::cont(thread.tid(), 0).task(thread.tid())
    }

    /// Waits for the answers of all plans that were started.
    pub fn finish(&mut self) -> Result<Vec<Answers>> {
        let mut all = Vec::with_capacity(self.asked.len());
        for i in 0..self.asked.len() {
            let tid = self.threads[i].tid();
            self.await_thread(i).task(tid)?;
            let shared = self.shared()?;
            let control: &Control = shared.at(self.area.slot(i));
            let question = &self.asked[i];
            let failed = control.failed.load(Ordering::Acquire);
            if failed != 0 {
                return Err(question.plan.error(failed as usize - 1, control.failure.load(Ordering::Relaxed) as i64))
                    .task(tid);
            }
            let mut answers = Answers { results: Vec::new(), data: vec![0; question.plan.data_len()] };
            shared.read(question.data, &mut answers.data);
            let mut words = vec![0u8; question.plan.len() * 8];
            shared.read(question.results, &mut words);
            answers.results = words.chunks_exact(8).filter_map(|b| b.try_into().ok()).map(i64::from_le_bytes).collect();
            all.push(answers);
        }
        Ok(all)
    }

    /// A descriptor that the system call `nr` makes in the process, for us alone: it is in the process only for the moment
    /// that we need to take a copy, and is closed there even if we die in between.
    pub fn borrow(&mut self, label: &'static str, nr: i64, args: &[Arg]) -> Result<OwnedFd> {
        let mut plan = Plan::new();
        let taken = plan.bytes(&[0; 8]);
        let made = plan.call(label, nr, args);
        let wait = plan.op(Code::Await, 0, &[taken.into()], Expect::Any, [0; 2], "until the engine has it");
        plan.always("the descriptor", libc::SYS_close, &[made.into()]);
        let mut plans = vec![plan];
        plans.resize_with(self.threads.len(), Plan::new);
        self.start(plans)?;
        let (pid, slot) = (self.pid(), self.area.slot(0));
        let (results, data) = self.asked.first().map(|q| (q.results, q.data)).ok_or(Error::Gone)?;
        let began = Instant::now();
        loop {
            let control: &Control = self.shared()?.at(slot);
            let (failed, done) = (control.failed.load(Ordering::Acquire), control.done.load(Ordering::Acquire));
            if failed != 0 || done == control.turn.load(Ordering::Relaxed) {
                // it did not come to the wait: this tells why
                return Err(self.finish().err().unwrap_or(Error::Gone));
            }
            if control.at.load(Ordering::Acquire) == wait.0 {
                break;
            }
            if !ptrace::exists(pid) || began.elapsed() > ANSWER_LIMIT {
                return Err(Error::Gone).task(pid);
            }
            futex::wait(&control.done, done, Duration::from_micros(50));
        }
        let mut number = [0; 8];
        self.shared()?.read(results + 8 * made.0 as usize, &mut number);
        let number = i32::try_from(i64::from_le_bytes(number)).unwrap_or(-1);
        let copy = calls::pidfd_open(pid, 0).and_then(|pidfd| calls::pidfd_getfd(pidfd.as_fd(), number));
        let word: &SharedWord = self.shared()?.at(data + usize::try_from(taken.offset).unwrap_or(0));
        word.0.store(1, Ordering::Release);
        futex::wake(&word.0);
        self.finish()?;
        copy.task(pid)
    }

    fn await_thread(&mut self, i: usize) -> Result<()> {
        let tid = self.threads[i].tid();
        let began = Instant::now();
        loop {
            let control: &Control = self.shared()?.at(self.area.slot(i));
            let (turn, done) = (control.turn.load(Ordering::Relaxed), control.done.load(Ordering::Acquire));
            if done == turn {
                return Ok(());
            }
            futex::wait(&control.done, done, Duration::from_millis(2));
            if control.done.load(Ordering::Acquire) == turn {
                return Ok(());
            }
            match ptrace::stopped(tid)? {
                None if !ptrace::exists(tid) => return Err(Error::Gone),
                None => {}
                Some(Stop::Signal(libc::SIGSTOP)) => {
                    self.threads[i].owe(libc::SIGSTOP);
                    ptrace::cont(tid, 0)?;
                }
                Some(Stop::Signal(signal))
                    if [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS].contains(&signal) =>
                {
                    let at = ptrace::registers(tid)?.ip;
                    return Err(Error::Usage { what: format!("the executor took signal {signal} at {at:#x}") });
                }
                Some(_) => ptrace::cont(tid, 0)?,
            }
            if began.elapsed() > ANSWER_LIMIT {
                return Err(Error::Timeout { what: "the answer of a task", seconds: ANSWER_LIMIT.as_secs() });
            }
        }
    }

    /// Removes the executor; the threads are as they were found, and stopped.
    pub fn cure(mut self) -> Result<Vec<Stopped>> {
        self.remove()?;
        Ok(std::mem::take(&mut self.threads))
    }

    /// From now on threads do not return to their program when the engine is dead, until the guard has put all else in
    /// order, or has killed them.
    pub fn hold(&self, guard: &Guard<'_>) -> Result<()> {
        const HOLD: usize = std::mem::offset_of!(Owner, hold);
        let (shared, file) = (self.shared()?, self.file.as_ref().ok_or(Error::Gone)?);
        let area = guard.hold(file.as_fd())?;
        guard.register(List::Undo, &Act::WriteAt(area, (self.area.code + HOLD) as u64, &[0; 4]))?;
        shared.at::<Owner>(self.area.code).hold.store(1, Ordering::SeqCst);
        Ok(())
    }

    /// Undoes [`Infected::hold`]: all is in order.
    pub fn unhold(&self) -> Result<()> {
        self.shared()?.at::<Owner>(self.area.code).hold.store(0, Ordering::SeqCst);
        Ok(())
    }

    /// Gives up a process that was killed.
    pub fn forget(mut self) {
        self.cured = true;
        if let Some(shared) = &self.shared {
            self.robust.release(shared, self.area.code);
        }
        std::mem::take(&mut self.threads).into_iter().for_each(Stopped::forget);
    }

    /// Stops all threads, which run the executor, and reads what signals wait for them: the last ones came, or were made by
    /// timers, while questions were asked.
    pub fn read_signals(&mut self) -> Result<()> {
        self.halt()?;
        for (i, thread) in self.threads.iter_mut().enumerate() {
            let tid = thread.tid();
            thread.pending = ptrace::pending_signals(tid, false).task(tid)?;
            if i == 0 {
                thread.shared_pending = ptrace::pending_signals(tid, true).task(tid)?;
            }
        }
        Ok(())
    }

    /// Asks all threads to stop, if they run the executor; who has several processes asks all before it waits for one.
    pub fn ask_to_halt(&mut self) -> Result<()> {
        if !self.running || std::mem::replace(&mut self.halting, true) {
            return Ok(());
        }
        self.threads.iter().try_for_each(|thread| ptrace::interrupt(thread.tid()).task(thread.tid()))
    }

    /// Stops all threads, if they run the executor.
    fn halt(&mut self) -> Result<()> {
        self.ask_to_halt()?;
        if !self.running || std::mem::replace(&mut self.halted, true) {
            return Ok(());
        }
        (0..self.threads.len()).try_for_each(|i| self.await_halt(i))
    }

    fn await_halt(&mut self, i: usize) -> Result<()> {
        let tid = self.threads[i].tid();
        loop {
            match ptrace::wait_stop(tid, STOP_LIMIT).task(tid)? {
                Stop::Trap | Stop::Group(_) => return Ok(()),
                Stop::Signal(signal) => {
                    if signal == libc::SIGSTOP {
                        self.threads[i].owe(signal);
                    }
                    ptrace::cont(tid, 0).task(tid)?;
                }
                Stop::Syscall => ptrace::cont(tid, 0).task(tid)?,
            }
        }
    }

    /// Runs one more plan in the group leader, also after all were stopped for their signals.
    pub(super) fn in_leader(&mut self, plan: Plan) -> Result<Answers> {
        let pid = self.pid();
        if self.halted {
            ptrace::cont(pid, 0).task(pid)?;
        }
        let answers = self.start(vec![plan]).and_then(|()| self.finish());
        if self.halted {
            ptrace::interrupt(pid).task(pid)?;
            self.await_halt(0)?;
        }
        answers?.into_iter().next().ok_or(Error::Gone)
    }

    /// The area's memory once more, for what outlives the executor in this process.
    pub(super) fn share(&self) -> Result<Shared> {
        Shared::map(self.file.as_ref().ok_or(Error::Gone)?.as_fd(), 0, self.area.len)
    }

    pub(super) fn robust(&self) -> &'a RobustList {
        self.robust
    }

    fn remove(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.cured, true) {
            return Ok(());
        }
        self.halt()?;
        // everyone back to where it was, the leader last: it unmaps the area, which nobody may be in then
        if self.running {
            for (i, thread) in self.threads.iter().enumerate().skip(1) {
                self.turn_back(i)?;
                self.put_back(thread)?;
            }
            self.turn_back(0)?;
        }
        let pid = self.pid();
        if self.area.address != 0 {
            let leader = &self.threads[0];
            let stub = arch::trampoline(self.tail, &leader.registers_for_healing(), leader.mask);
            memory::write_at(&self.memory, self.tail, &stub).task(pid)?;
            let args = [self.area.address, self.area.len as u64, 0, 0, 0, 0];
            super::one_call(pid, &self.for_call(libc::SYS_munmap, args), "munmap").task(pid)?;
        }
        self.put_back(&self.threads[0])?;
        memory::write_at(&self.memory, self.tail, &[0; STUB_SIZE]).task(pid)?;
        if let Some(shared) = self.shared.take() {
            self.robust.release(&shared, self.area.code);
        }
        Ok(())
    }

    /// Gives a thread that ran the executor its extended state back. Should we die from here on, it is on its way out of the
    /// executor: never in the program with the executor's state, nor the other way round.
    fn turn_back(&self, i: usize) -> Result<()> {
        let thread = &self.threads[i];
        let tid = thread.tid();
        // it may have been stopped before it had saved anything
        self.shared()?.write(self.area.xsave(i), &thread.xstate);
        let mut regs = thread.registers;
        regs.ip = self.area.address + LEAVE;
        regs.orig_ax = u64::MAX;
        regs.bx = self.area.address + self.area.slot(i) as u64;
        regs.flags &= !0x500;
        ptrace::set_registers(tid, &regs).and_then(|()| ptrace::set_xstate(tid, &thread.xstate)).task(tid)
    }

    fn put_back(&self, thread: &Stopped) -> Result<()> {
        let tid = thread.tid();
        ptrace::set_signal_mask(tid, thread.mask).task(tid)?;
        ptrace::set_registers(tid, &thread.registers).task(tid)
    }
}

/// One system call in each of several processes, side by side: what came of it.
fn remote(
    hosts: &[Infected<'_>],
    nr: i64,
    args: impl Fn(&Infected<'_>) -> [u64; 6],
    call: &'static str,
) -> Vec<Result<u64>> {
    // a step is made of all that are left, whatever becomes of others: nobody is left in the middle of a call
    let begun: Vec<Result<()>> =
        hosts.iter().map(|h| begin_call(h.pid(), &h.for_call(nr, args(h))).task(h.pid())).collect();
    let entered: Vec<Result<()>> =
        hosts.iter().zip(begun).map(|(h, before)| before.and_then(|()| await_entry(h.pid()).task(h.pid()))).collect();
    let all = hosts.iter().zip(entered);
    all.map(|(h, before)| before.and_then(|()| await_result(h.pid(), call).task(h.pid()))).collect()
}

impl Drop for Infected<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            if e.errno() != libc::ESRCH {
                tracing::error!("removing the executor from task {}: {e}", self.pid());
            }
        }
        // of a process that is gone, or was not got out of: the word must not stay in our list when its memory goes
        if let Some(shared) = self.shared.take() {
            self.robust.abandon(&shared, self.area.code);
        }
    }
}

/// Writes a control into shared memory.
pub fn write_control(shared: &Shared, offset: usize, control: &Control) {
    let words = [
        (std::mem::offset_of!(Control, orphan), u64::from(control.orphan)),
        (std::mem::offset_of!(Control, owner), control.owner),
        (std::mem::offset_of!(Control, ops), control.ops),
        (std::mem::offset_of!(Control, count), control.count),
        (std::mem::offset_of!(Control, results), control.results),
        (std::mem::offset_of!(Control, base), control.base),
        (std::mem::offset_of!(Control, xsave), control.xsave),
        (std::mem::offset_of!(Control, way_back), control.way_back),
        (std::mem::offset_of!(Control, arena), control.arena),
    ];
    for (at, word) in words {
        shared.write(offset + at, bytes_of(&word));
    }
    let turns: &Control = shared.at(offset);
    turns.turn.store(control.turn.load(Ordering::Relaxed), Ordering::Release);
}

/// Where the zero tail of a vdso begins that is long enough for the trampoline.
fn tail_of(vdso: &[u8]) -> Option<usize> {
    let used = vdso.iter().rposition(|&b| b != 0)? + 1;
    let start = (used + 32).next_multiple_of(16);
    (start + STUB_SIZE <= vdso.len()).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap() {
        let area = Area::of(5, 2700);
        for i in 0..4 {
            let (room, size) = area.room(i);
            assert!(room + size <= area.slot(i + 1));
            assert_eq!(area.xsave(i) % 64, 0);
        }
        assert!(area.stub(4) + STUB_SIZE <= area.code);
        assert!(area.slot(5) <= area.len);
    }

    #[test]
    fn a_full_vdso_has_no_tail() {
        assert_eq!(tail_of(&[1; 8192]), None);
        let mut vdso = vec![0; 8192];
        vdso[5000] = 1;
        assert_eq!(tail_of(&vdso), Some(5040));
    }
}
