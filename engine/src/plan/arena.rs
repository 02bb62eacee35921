//! The memory that all tasks of a restore share: the executor's code, and for each task or thread a control, a stack and a
//! plan. It lies at one address that is free in every task, followed by room to park the vdso while areas are made.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use standstill_restorer::plan::{self as shared, Control};

use super::{Data, Plan};
use crate::error::{At, Call, Error, Result};
use crate::sys::futex::{self, RobustList};
use crate::sys::memory::Shared;
use crate::sys::spawn;
use crate::tracee::{write_control, BLOB};

const PAGE: u64 = 4096;
const STACK: usize = 8 << 10;
/// Room for the first code of a fresh process, below the arena.
const BOOT_ROOM: u64 = 64 << 10;
/// Room for vdso and vvar, above the arena.
pub const PARKING: u64 = 64 << 10;

/// Who runs a plan: where its control lies, and what to call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    control: usize,
    stack: usize,
}

/// The shared memory, while its plans are written and run.
#[derive(Debug)]
pub struct Arena<'r> {
    fd: OwnedFd,
    memory: Shared,
    base: u64,
    code: usize,
    next: usize,
    len: usize,
    runs: Vec<(Slot, i32, Plan, [usize; 2])>,
    expected: [u32; shared::STAGES],
    robust: &'r RobustList,
}

impl<'r> Arena<'r> {
    /// Makes an arena of `len` bytes (sparse: only what is written costs memory) to lie at `base` in all tasks.
    pub fn new(base: u64, len: usize, robust: &'r RobustList) -> Result<Arena<'r>> {
        let fd = spawn::memfd(c"standstill-arena", 0)?;
        rustix::fs::ftruncate(&fd, len as u64).call("ftruncate")?;
        let memory = Shared::map(fd.as_fd(), 0, len)?;
        let code = BLOB.len().next_multiple_of(PAGE as usize);
        memory.write(0, BLOB);
        robust.own(&memory, code + 128);
        let (next, runs, expected) = (code + 192, Vec::new(), [0; shared::STAGES]);
        Ok(Arena { fd, memory, base, code, next, len, runs, expected, robust })
    }

    /// Bytes that an arena for `threads` and `ops` operations with `data` bytes needs, generously.
    pub fn size_for(threads: usize, ops: usize, data: usize) -> usize {
        (256 << 10) + threads * (STACK + 4096) + ops * 128 + data * 2
    }

    /// Room that an arena of `len` bytes takes from the address space, with what lies around it.
    pub fn span(len: usize) -> u64 {
        BOOT_ROOM + (len as u64).next_multiple_of(PAGE) + PARKING
    }

    /// Where the arena lies in a span that begins at `start`.
    pub fn base_in(start: u64) -> u64 {
        start + BOOT_ROOM
    }

    /// Addresses that belong to the arena and the parking in every task.
    pub fn range(&self) -> (u64, u64) {
        (self.base, self.parking() + PARKING)
    }

    /// What is to be unmapped at the end: address and length; `parked` leaves the parking.
    pub fn leftovers(&self, parked: bool) -> (u64, u64) {
        let end = if parked { self.parking() } else { self.parking() + PARKING };
        (self.base, end - self.base)
    }

    /// Address of a system call instruction in the executor: good for the call that unmaps it, too, since the engine
    /// stops the task behind it.
    pub fn syscall_address(&self) -> Result<u64> {
        let at = BLOB.windows(2).position(|w| w == [0x0f, 0x05]).ok_or(Error::Gone)?;
        Ok(self.base + at as u64)
    }

    /// Where the vdso waits.
    pub fn parking(&self) -> u64 {
        self.base + (self.len as u64).next_multiple_of(PAGE)
    }

    fn take(&mut self, bytes: usize, align: usize) -> Result<usize> {
        let at = self.next.next_multiple_of(align);
        if at + bytes > self.len {
            return Err(Error::Usage { what: "the plans do not fit into their memory".into() });
        }
        self.next = at + bytes;
        Ok(at)
    }

    /// Room for one more task or thread.
    pub fn slot(&mut self) -> Result<Slot> {
        let control = self.take(size_of::<Control>(), 64)?;
        let stack = self.take(STACK, 64)?;
        // a task that enters before it has a plan waits for one
        write_control(&self.memory, control, &self.blank());
        Ok(Slot { control, stack })
    }

    /// A control without a plan.
    fn blank(&self) -> Control {
        Control {
            turn: 0.into(),
            done: 0.into(),
            orphan: 1,
            reserved: 0,
            owner: self.base + self.code as u64 + 128,
            ops: 0,
            count: 0,
            results: 0,
            base: 0,
            failed: 0.into(),
            at: 0.into(),
            failure: 0.into(),
            xsave: 0,
            way_back: 0,
            arena: self.base + self.code as u64,
        }
    }

    /// Address of a slot's control, in the tasks.
    pub fn control(&self, slot: Slot) -> u64 {
        self.base + slot.control as u64
    }

    /// Lowest address and size of a slot's stack, in the tasks.
    pub fn stack(&self, slot: Slot) -> (u64, u64) {
        (self.base + slot.stack as u64, STACK as u64)
    }

    /// Writes a plan for a slot; it is run when the task enters the executor, or now, if it is there already.
    pub fn load(&mut self, slot: Slot, pid: i32, plan: Plan) -> Result<()> {
        plan.check()?;
        let ops = plan.ops_bytes();
        let at_ops = self.take(ops.len(), 64)?;
        let at_results = self.take(plan.len() * 8, 64)?;
        let at_data = self.take(plan.data_len(), 64)?;
        self.memory.write(at_ops, &ops);
        self.memory.write(at_data, plan.data());
        let before: &Control = self.memory.at(slot.control);
        let turn = before.turn.load(Ordering::Relaxed) + 1;
        before.failed.store(0, Ordering::Relaxed);
        let control = Control {
            turn: turn.into(),
            ops: self.base + at_ops as u64,
            count: plan.len() as u64,
            results: self.base + at_results as u64,
            base: self.base + at_data as u64,
            ..self.blank()
        };
        write_control(&self.memory, slot.control, &control);
        futex::wake(&self.memory.at::<Control>(slot.control).turn);
        self.runs.retain(|(s, ..)| *s != slot);
        self.runs.push((slot, pid, plan, [at_data, at_results]));
        Ok(())
    }

    /// How a fresh process enters the executor with this slot.
    pub fn boot(&self, slot: Slot) -> standstill_restorer::arch::Boot {
        standstill_restorer::arch::Boot {
            fd: 0,
            address: self.base,
            code: self.code as u64,
            data: (self.len as u64).next_multiple_of(PAGE) - self.code as u64,
            entry: self.base,
            control: self.control(slot),
            stack: self.base + (slot.stack + STACK) as u64,
        }
    }

    /// Where the fresh process is loaded.
    pub fn load_at(&self) -> u64 {
        self.base - BOOT_ROOM
    }

    /// The memory's descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Waits until a slot's plan is done.
    pub fn finish(&self, slot: Slot, limit: Duration, alive: impl Fn() -> Result<()>) -> Result<()> {
        let control: &Control = self.memory.at(slot.control);
        let began = Instant::now();
        loop {
            let done = control.done.load(Ordering::Acquire);
            self.failure()?;
            if done == control.turn.load(Ordering::Relaxed) {
                return Ok(());
            }
            futex::wait(&control.done, done, Duration::from_millis(20));
            if began.elapsed() > Duration::from_millis(20) {
                alive()?;
            }
            if began.elapsed() > limit {
                return Err(Error::Timeout { what: "the end of a plan", seconds: limit.as_secs() });
            }
        }
    }

    /// What lies in the data of the plan that a slot has run.
    pub fn answer(&self, slot: Slot, data: Data) -> Vec<u8> {
        let mut bytes = vec![0; data.len];
        if let Some((.., [at, _])) = self.runs.iter().find(|(s, ..)| *s == slot) {
            self.memory.read(at + usize::try_from(data.offset).unwrap_or(usize::MAX), &mut bytes);
        }
        bytes
    }

    /// What an operation of the plan that a slot has run came to.
    pub fn result(&self, slot: Slot, of: super::At) -> i64 {
        let mut word = [0; 8];
        if let Some((.., [_, at])) = self.runs.iter().find(|(s, ..)| *s == slot) {
            self.memory.read(at + 8 * of.0 as usize, &mut word);
        }
        i64::from_ne_bytes(word)
    }

    /// Says how many will come to a stage.
    pub fn expect(&mut self, stage: usize, count: u32) {
        self.expected[stage] = count;
    }

    /// Waits until all have come to a stage.
    pub fn gather(&self, stage: usize, limit: Duration, alive: impl Fn() -> Result<()>) -> Result<()> {
        let arena: &shared::Arena = self.memory.at(self.code);
        let began = Instant::now();
        loop {
            let news = arena.news.load(Ordering::Acquire);
            self.failure()?;
            if arena.arrived[stage].load(Ordering::SeqCst) >= self.expected[stage] {
                return Ok(());
            }
            futex::wait(&arena.news, news, Duration::from_millis(50));
            if began.elapsed() > Duration::from_millis(50) {
                self.failure()?;
                alive()?;
            }
            if began.elapsed() > limit {
                return Err(Error::Timeout { what: "the arrival of all tasks at a stage", seconds: limit.as_secs() });
            }
        }
    }

    /// Lets everyone leave the stages up to `stage`.
    pub fn go(&self, stage: usize) {
        let arena: &shared::Arena = self.memory.at(self.code);
        arena.go.store(stage as u32, Ordering::SeqCst);
        futex::wake(&arena.go);
    }

    /// Everyone is to exit.
    pub fn cancel(&self) {
        let arena: &shared::Arena = self.memory.at(self.code);
        arena.failed.store(1, Ordering::SeqCst);
        arena.go.store(arena.go.load(Ordering::SeqCst) | 1 << 31, Ordering::SeqCst);
        futex::wake(&arena.go);
    }

    /// The first failure of a plan, with its task.
    fn failure(&self) -> Result<()> {
        for (slot, pid, plan, _) in &self.runs {
            let control: &Control = self.memory.at(slot.control);
            let failed = control.failed.load(Ordering::Acquire);
            let result = control.failure.load(Ordering::Relaxed) as i64;
            if failed != 0 && result != -i64::from(libc::ECANCELED) {
                return Err(plan.error(failed as usize - 1, result)).task(*pid);
            }
        }
        let arena: &shared::Arena = self.memory.at(self.code);
        if arena.failed.load(Ordering::SeqCst) != 0 {
            return Err(Error::Gone);
        }
        Ok(())
    }

    /// Prints all plans, for people.
    pub fn describe(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for (_, pid, plan, _) in &self.runs {
            let _ = writeln!(text, "task {pid}\n{plan}");
        }
        text
    }

    /// Ends the engine's ownership: nobody minds its death any more.
    pub fn release(&self) {
        self.robust.release(&self.memory, self.code + 128);
    }
}

impl Drop for Arena<'_> {
    // the list would lead into memory that is gone
    fn drop(&mut self) {
        self.release();
    }
}
