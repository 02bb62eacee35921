//! Making a ring again, and bringing it to where it was.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use standstill_images::proto::{FdinfoEntry, FileEntry, StandstillIoUringEntry, VmaEntry};
use standstill_restorer::plan::{Code, Expect};

use super::rings::Shape;
use crate::error::{At, Error, Place, Result};
use crate::files::{set_status_flags, RestoreFiles};
use crate::memory::rebuild::TASK_SIZE;
use crate::memory::status;
use crate::plan::{Arg, Data, Plan};
use crate::sys::calls;
use crate::sys::io_uring::{self as sys, code, setup};

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    /// Who makes a ring, and its number there, by file id.
    owners: HashMap<u32, (i32, i32)>,
}

impl Restored {
    /// How many rings are made.
    pub fn count(&self) -> usize {
        self.owners.len()
    }
}

/// A ring is made by its owner.
pub fn opens_late(e: &FileEntry) -> bool {
    e.standstill_io_uring.is_some()
}

fn lie(id: u32, what: &str) -> Error {
    Error::lie("files.img", format!("io_uring {id:#x}: {what}"))
}

fn check(e: &StandstillIoUringEntry) -> Result<()> {
    const KNOWN: u32 = setup::IOPOLL
        | setup::SQPOLL
        | setup::SQ_AFF
        | setup::CQSIZE
        | setup::R_DISABLED
        | setup::SUBMIT_ALL
        | setup::TASKRUN_FLAG
        | setup::SQE128
        | setup::CQE32
        | setup::SINGLE_ISSUER
        | setup::DEFER_TASKRUN
        | setup::NO_SQARRAY;
    let shape = Shape::of(e);
    let good = |n: u32| n.is_power_of_two() && n <= 1 << 20;
    if !good(e.sq_entries) || !good(e.cq_entries) || e.setup & !KNOWN != 0 {
        return Err(lie(e.id, "no kernel has such a one"));
    }
    let array = if e.setup & setup::NO_SQARRAY != 0 { 0 } else { e.sq_entries as usize * 4 };
    if (e.cqes.len(), e.sqes.len(), e.sq_array.len()) != (shape.cqes(), shape.sqes(), array) {
        return Err(lie(e.id, "its rings are not as large as its queues"));
    }
    let slots = 1 << 20;
    let files = e.file.iter().all(|f| f.slot < e.files()) && e.files() <= slots;
    if !files || !e.buffer.iter().all(|b| b.slot < e.buffers()) || e.buffers() > slots {
        return Err(lie(e.id, "something is registered past the end"));
    }
    let disabled = e.setup & setup::R_DISABLED != 0;
    if (disabled && (e.sq_head, e.cq_tail) != (0, 0)) || e.overflow.len() as u64 > u64::from(u32::MAX) {
        return Err(lie(e.id, "it was used before it was enabled"));
    }
    Ok(())
}

/// Notes who makes which ring; numbers from `number` on are free there.
pub fn plan_owners(mut number: i32, is_task: impl Fn(i32) -> bool, cx: &mut RestoreFiles<'_>) -> Result<()> {
    let mut rings: Vec<_> = cx.entries.values().filter_map(|e| e.standstill_io_uring.as_ref()).collect();
    rings.sort_unstable_by_key(|e| e.id);
    for e in rings {
        check(e)?;
        let owner = i32::try_from(e.owner).ok().filter(|&pid| is_task(pid));
        let owner = owner.ok_or_else(|| lie(e.id, "its owner is no task"))?;
        cx.io_uring.owners.insert(e.id, (owner, number));
        number += 1;
    }
    Ok(())
}

fn rings<'a>(cx: &'a RestoreFiles<'_>) -> impl Iterator<Item = &'a StandstillIoUringEntry> {
    let mut all: Vec<_> = cx.entries.values().filter_map(|e| e.standstill_io_uring.as_ref()).collect();
    all.sort_unstable_by_key(|e| e.id);
    all.into_iter()
}

/// Makes the rings that task `pid` owns, at their numbers for a while: the engine takes them from there.
pub fn make(pid: i32, cx: &RestoreFiles<'_>, plan: &mut Plan) {
    for e in rings(cx) {
        let Some(&(_, number)) = cx.io_uring.owners.get(&e.id).filter(|(owner, _)| *owner == pid) else { continue };
        let mut flags = e.setup;
        if flags & setup::SINGLE_ISSUER != 0 {
            // the thread that may use it says so when it is there
            flags |= setup::R_DISABLED;
        }
        let mut parameters = [0u32; 30];
        (parameters[1], parameters[2], parameters[3]) = (e.cq_entries, flags, e.sq_thread_cpu());
        let parameters = plan.bytes(&parameters.map(u32::to_le_bytes).concat());
        let what = format!("io_uring for {} requests", e.sq_entries);
        let fd = plan.call(what.clone(), libc::SYS_io_uring_setup, &[e.sq_entries.into(), parameters.into()]);
        let args = [fd.into(), number.into(), libc::O_CLOEXEC.into()];
        plan.call_exact(what.clone(), libc::SYS_dup3, &args, number.into());
        plan.call(what, libc::SYS_close, &[fd.into()]);
    }
}

/// Takes a ring from the one who made it.
pub fn open(e: &StandstillIoUringEntry, cx: &RestoreFiles<'_>) -> Result<OwnedFd> {
    let &(pid, number) = cx.io_uring.owners.get(&e.id).ok_or(Error::Gone)?;
    let fd = calls::pidfd_open(cx.hosts.id(pid)?, 0)
        .and_then(|pidfd| calls::pidfd_getfd(pidfd.as_fd(), number))
        .task(pid)?;
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Maps rings at their places. `take` adds what gives the task a late file; `keep` is what we have mapped there.
///
/// The kernel takes no address for a ring, neither of mmap(2) nor of mremap(2): it takes the one gap that there is. So all
/// gaps are filled for a moment, and one after the other is given back.
pub fn map_areas(
    areas: &[VmaEntry],
    keep: &[(u64, u64)],
    take: &dyn Fn(u32, &mut Plan) -> Option<Arg>,
    plan: &mut Plan,
) -> Result<()> {
    let of_rings = || areas.iter().filter(|e| e.status & status::IO_URING != 0);
    if of_rings().next().is_none() {
        return Ok(());
    }
    // the vdso comes to its place later
    let others = areas.iter().filter(|e| e.status & (status::IO_URING | status::VDSO | status::VVAR) == 0);
    let gaps =
        gaps(others.map(|e| (e.start, e.end)).chain(keep.iter().copied()).chain(of_rings().map(|e| (e.start, e.end))));
    let mut fill = |start: u64, end: u64| {
        const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | MAP_FIXED_NOREPLACE;
        let args = [start.into(), (end - start).into(), 0.into(), flags.into(), (-1).into(), 0.into()];
        plan.call_exact("room between areas", libc::SYS_mmap, &args, start.cast_signed());
    };
    gaps.iter().for_each(|&(start, end)| fill(start, end));
    of_rings().for_each(|e| fill(e.start, e.end));
    for e in of_rings() {
        let fd = u32::try_from(e.shmid)
            .ok()
            .and_then(|id| take(id, plan))
            .ok_or_else(|| Error::lie("mm", format!("an area of io_uring {:#x}, which is not there", e.shmid)))
            .at(Place::Area(e.start, e.end))?;
        let len = e.end - e.start;
        plan.call("area", libc::SYS_munmap, &[e.start.into(), len.into()]);
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let args = [0.into(), len.into(), e.prot.into(), flags.into(), fd, e.pgoff.into()];
        plan.call_exact(format!("area {:x} of an io_uring", e.start), libc::SYS_mmap, &args, e.start.cast_signed());
        plan.call("io_uring", libc::SYS_close, &[fd]);
        advise_area(e, plan);
    }
    for (start, end) in gaps {
        plan.call("room between areas", libc::SYS_munmap, &[start.into(), (end - start).into()]);
    }
    Ok(())
}

/// What lies between ranges, as far as a program can have memory there.
fn gaps(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    /// More than vm.mmap_min_addr.
    const LOWEST: u64 = 0x1_0000;
    let mut ranges: Vec<_> = ranges.filter(|r| r.1 <= TASK_SIZE).collect();
    ranges.sort_unstable();
    let mut at = LOWEST;
    let mut gaps = Vec::new();
    for (start, end) in ranges.into_iter().chain([(TASK_SIZE, TASK_SIZE)]) {
        if at < start {
            gaps.push((at, start));
        }
        at = at.max(end);
    }
    gaps
}

fn advise_area(e: &VmaEntry, plan: &mut Plan) {
    for advice in (0..64).filter(|n| e.madv.unwrap_or(0) >> n & 1 == 1) {
        let args = [e.start.into(), (e.end - e.start).into(), advice.into()];
        plan.call_or("advice", libc::SYS_madvise, &args, [libc::EINVAL, libc::EINVAL]);
    }
}

/// What a thread has to do for rings.
#[derive(Debug, Clone, Copy)]
pub struct Thread<'a> {
    /// As in images.
    pub tid: i32,
    /// The descriptors of its process.
    pub table: &'a [FdinfoEntry],
}

impl Thread<'_> {
    fn is(&self, id: u32) -> bool {
        u32::try_from(self.tid) == Ok(id)
    }

    fn number(&self, ring: u32, id: u32) -> Result<i32> {
        let fd = self.table.iter().find(|e| e.id == id).and_then(|e| i32::try_from(e.fd).ok());
        fd.ok_or_else(|| lie(ring, &format!("its owner does not have file {id:#x}")))
    }

    /// Has it anything to do?
    pub fn has_work(&self, cx: &RestoreFiles<'_>) -> bool {
        rings(cx).any(|e| self.is(e.issuer) || e.user.iter().any(|user| self.is(user.tid)))
    }

    /// Brings its rings to where they were, registers what was registered, and their descriptors.
    pub fn work(&self, cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
        for e in rings(cx).filter(|e| self.is(e.issuer)) {
            self.issue(e, plan)?;
        }
        for e in rings(cx) {
            for user in e.user.iter().filter(|user| self.is(user.tid)) {
                let fd = self.number(e.id, e.id)?;
                let update = plan.words(&[u64::from(user.slot), u64::from(fd.cast_unsigned())]);
                let args = [fd.into(), code::REGISTER_RING_FDS.into(), update.into(), 1.into()];
                plan.call_exact("registered descriptor of an io_uring", libc::SYS_io_uring_register, &args, 1);
            }
        }
        Ok(())
    }

    fn issue(&self, e: &StandstillIoUringEntry, plan: &mut Plan) -> Result<()> {
        let fd = self.number(e.id, e.id)?;
        let what = format!("io_uring {fd}");
        let disabled = e.setup & setup::R_DISABLED != 0;
        if e.setup & setup::SINGLE_ISSUER != 0 && !disabled {
            let args = [fd.into(), code::ENABLE_RINGS.into(), 0.into(), 0.into()];
            plan.call(what.clone(), libc::SYS_io_uring_register, &args);
        }
        turn(e, fd, &what, plan)?;
        if let Some(count) = e.files {
            let mut fds = vec![-1; count as usize];
            for f in &e.file {
                fds[f.slot as usize] = self.number(e.id, f.file_id)?;
            }
            let fds: Vec<u8> = fds.into_iter().flat_map(i32::to_le_bytes).collect();
            let fds = plan.bytes(&fds);
            register(fd, code::REGISTER_FILES2, count, fds, format!("files of {what}"), plan);
        }
        if let Some(count) = e.buffers {
            let mut vectors = vec![0; 2 * count as usize];
            for b in &e.buffer {
                let at = 2 * b.slot as usize;
                (vectors[at], vectors[at + 1]) = (b.address, b.length);
            }
            let vectors = plan.words(&vectors);
            register(fd, code::REGISTER_BUFFERS2, count, vectors, format!("buffers of {what}"), plan);
        }
        if let Some(id) = e.eventfd {
            let eventfd = plan.bytes(&self.number(e.id, id)?.to_le_bytes());
            let args = [fd.into(), code::REGISTER_EVENTFD.into(), eventfd.into(), 1.into()];
            plan.call(format!("eventfd of {what}"), libc::SYS_io_uring_register, &args);
        }
        Ok(())
    }
}

/// `struct io_uring_rsrc_register`: number, flags, reserved, data, no tags.
fn register(fd: i32, code: u32, count: u32, data: Data, what: String, plan: &mut Plan) {
    let all = plan.words(&[count.into(), 0, 0, 0]);
    plan.pointer(all, 16, data);
    let args = [fd.into(), code.into(), all.into(), all.len.into()];
    plan.call(what, libc::SYS_io_uring_register, &args);
}

/// Heads and tails, and what is in the rings.
fn turn(e: &StandstillIoUringEntry, fd: i32, what: &str, plan: &mut Plan) -> Result<()> {
    let words = sys::words()?;
    let shape = Shape::of(e);
    let (bytes, sqe_bytes) = (shape.rings(&words), shape.sqes().next_multiple_of(4096));
    let mut map = |len: usize, offset: u64| -> Arg {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let args = [0.into(), len.into(), 3.into(), flags.into(), fd.into(), offset.into()];
        plan.call(what.to_owned(), libc::SYS_mmap, &args).into()
    };
    let (rings, sqes) = (map(bytes, sys::OFF_SQ_RING), map(sqe_bytes, sys::OFF_SQES));
    let path = plan.string(b"/dev/null");
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    let args = [libc::AT_FDCWD.into(), path.into(), flags.into(), 0.into()];
    let null = plan.call(what.to_owned(), libc::SYS_openat, &args);
    let overflow = u32::try_from(e.overflow.len()).unwrap_or(u32::MAX);
    let steps = Steps::to(e.sq_head.wrapping_sub(overflow), e.cq_tail);
    let array = shape.array(&words);
    let go = |steps: Steps, overflow: u32, list: Option<Data>, plan: &mut Plan| {
        let polled = u32::from(e.setup & setup::SQPOLL != 0);
        let at = array.and_then(|(at, _)| u32::try_from(at).ok()).unwrap_or(0);
        let size = u32::try_from(shape.sqe_size()).unwrap_or(0);
        let fields = [
            fd.cast_unsigned(),
            e.sq_entries,
            size,
            polled,
            at,
            words.sq_head,
            words.sq_tail,
            words.cq_head,
            words.cq_tail,
            steps.alone,
            steps.taken,
            steps.quiet,
            overflow,
            0,
            0,
            0,
        ];
        let turn = plan.bytes(&fields.map(u32::to_le_bytes).concat());
        if let Some(list) = list {
            plan.pointer(turn, 56, list);
        }
        let args = [turn.into(), rings, sqes, null.into()];
        plan.op(Code::Turn, 0, &args, Expect::NonNegative, [0; 2], what.to_owned());
    };
    let place = |to: Arg, offset: usize, bytes: &[u8], plan: &mut Plan| {
        let data = plan.bytes(bytes);
        let args = [to, offset.into(), data.into(), data.len.into()];
        plan.op(Code::Place, 0, &args, Expect::Any, [0; 2], what.to_owned());
    };
    let word = |at: u32, value: u32, plan: &mut Plan| place(rings, at as usize, &value.to_le_bytes(), plan);
    if e.setup & setup::R_DISABLED == 0 {
        go(steps, 0, None, plan);
    }
    place(rings, words.cqes as usize, &e.cqes, plan);
    word(words.cq_head, e.cq_head, plan);
    if overflow > 0 {
        if e.cq_tail.wrapping_sub(e.cq_head) != e.cq_entries {
            return Err(lie(e.id, "completions found no room, and there was some"));
        }
        let list: Vec<u64> = e.overflow.iter().flat_map(|o| [o.user_data, i64::from(o.res).cast_unsigned()]).collect();
        let list = plan.words(&list);
        go(Steps::default(), overflow, Some(list), plan);
    }
    word(words.cq_overflow, e.cq_overflow, plan);
    word(words.cq_flags, e.cq_flags, plan);
    word(words.sq_dropped, e.sq_dropped, plan);
    if let Some((at, _)) = array {
        place(rings, at, &e.sq_array, plan);
    }
    place(sqes, 0, &e.sqes, plan);
    word(words.sq_tail, e.sq_tail, plan);
    plan.call(what.to_owned(), libc::SYS_munmap, &[rings, bytes.into()]);
    plan.call(what.to_owned(), libc::SYS_munmap, &[sqes, sqe_bytes.into()]);
    plan.call(what.to_owned(), libc::SYS_close, &[null.into()]);
    Ok(())
}

/// Which requests, and how many, bring a new ring to where another one was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Steps {
    alone: u32,
    taken: u32,
    quiet: u32,
}

impl Steps {
    fn to(submitted: u32, completed: u32) -> Steps {
        let ahead = completed.wrapping_sub(submitted);
        match ahead.cast_signed() {
            1.. => Steps { alone: ahead, taken: submitted, quiet: 0 },
            _ => Steps { alone: 0, taken: completed, quiet: submitted.wrapping_sub(completed) },
        }
    }
}

/// About how much room the plans of rings take: operations, and bytes of data.
pub fn room(cx: &RestoreFiles<'_>) -> (usize, usize) {
    rings(cx).fold((0, 0), |(ops, data), e| {
        let table = e.files() as usize * 4 + e.buffers() as usize * 16 + e.overflow.len() * 16;
        (ops + 48 + e.user.len(), data + e.cqes.len() + e.sqes.len() + e.sq_array.len() + table + 4096)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_lead_there() {
        for (sq, cq) in [(0, 0), (5, 5), (7, 3), (3, 7), (2, u32::MAX), (u32::MAX, 1)] {
            let s = Steps::to(sq, cq);
            assert_eq!(s.taken.wrapping_add(s.quiet), sq, "{sq} {cq}");
            assert_eq!(s.taken.wrapping_add(s.alone), cq, "{sq} {cq}");
        }
    }

    #[test]
    fn gaps_are_what_is_left() {
        let ranges = [(0x30000, 0x40000), (0x20000, 0x30000), (0x50000, 0x60000), (1 << 63, u64::MAX)];
        let found = gaps(ranges.into_iter());
        assert_eq!(found, [(0x10000, 0x20000), (0x40000, 0x50000), (0x60000, TASK_SIZE)]);
    }

    #[test]
    fn lies_are_found() {
        let good = StandstillIoUringEntry {
            sq_entries: 2,
            cq_entries: 4,
            cqes: vec![0; 64],
            sqes: vec![0; 128],
            sq_array: vec![0; 8],
            ..Default::default()
        };
        check(&good).unwrap();
        let bad = |change: fn(&mut StandstillIoUringEntry)| {
            let mut e = good.clone();
            change(&mut e);
            check(&e).is_err()
        };
        assert!(bad(|e| e.sq_entries = 3));
        assert!(bad(|e| e.cq_entries = 1 << 30));
        assert!(bad(|e| e.sqes.clear()));
        assert!(bad(|e| e.setup = 1 << 14));
        assert!(bad(|e| e.file.push(Default::default())));
        assert!(bad(|e| e.files = Some(u32::MAX)));
        assert!(bad(|e| (e.setup, e.sq_head) = (setup::R_DISABLED, 1)));
    }
}
