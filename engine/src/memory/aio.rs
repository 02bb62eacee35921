//! Contexts of asynchronous input and output (io_setup(2)).
//!
//! A context is known to its program by the address of its ring, which the kernel maps there (`/[aio]` in maps): a head and
//! a tail, and between them the events of completed requests that nobody has fetched. The kernel writes the tail, the
//! program may move the head, and the events are plain memory. Children do not inherit contexts.
//!
//! Images: an area with the status AIORING, its pages in `pagemap-N.img`, and an [`AioRingEntry`] of `mm-N.img`.
//!
//! Ordering at restore: a context is made when the task's memory stands. As many writes to /dev/null as it takes move
//! its tail to where it was, and fetching some of their events moves the head; then it is moved to its address, and its
//! events are written over those. Its number in the kernel, the first word of the ring, stays the new one.
//!
//! Requests in flight are shown nowhere. Those of a disk are waited for: when it has none under way (`inflight` of sysfs), there
//! are none of the program, which stands still. Not kept: an IOCB_CMD_POLL that waits, which nobody can see; after a
//! restore it never completes. A machine with so many CPUs that the kernel makes the ring larger fails.
//!
//! Man pages: io_setup(2), io_submit(2), io_getevents(2), mremap(2).

use std::time::{Duration, Instant};

use rustix::fs::{major, minor, FileType};
use standstill_images::proto::{AioRingEntry, VmaEntry};
use standstill_restorer::plan::{Code, Expect};

use super::{status, PAGE};
use crate::error::{Error, Result};
use crate::files::Descriptor;
use crate::plan::{Arg, Plan};
use crate::proc::maps::{Vma, VmaName};

/// Of the ring: number, size, head, tail, magic, two words of features, its own length; then events.
const HEADER: usize = 32;
const EVENT: usize = 32;
const MAGIC: u32 = 0xa10a_10a1;
/// Requests that are submitted at once.
const BATCH: u32 = 64;
/// How long requests of a disk may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// The entry of a ring's area.
pub fn entry(area: &VmaEntry) -> Option<AioRingEntry> {
    if area.status & status::AIORING == 0 {
        return None;
    }
    let len = area.end - area.start;
    let ring_len = u32::try_from(len).ok()?;
    // the kernel makes room for twice as many and two more, in whole pages
    let room = (ring_len / PAGE as u32 * PAGE as u32).checked_sub(HEADER as u32)? / EVENT as u32;
    Some(AioRingEntry { id: area.start, nr_req: room.checked_sub(2)? / 2, ring_len })
}

/// Waits until requests of a stopped task that has contexts are done, as far as that can be known.
pub fn wait_for_requests(areas: &[Vma], descriptors: &[Descriptor]) {
    if !areas.iter().any(|area| area.name() == VmaName::AioRing) {
        return;
    }
    let direct = descriptors.iter().filter(|d| d.flags & libc::O_DIRECT as u32 != 0);
    let mut disks: Vec<u64> = direct
        .filter_map(|d| match FileType::from_raw_mode(d.stat.st_mode) {
            FileType::RegularFile => Some(d.stat.st_dev),
            FileType::BlockDevice => Some(d.stat.st_rdev),
            _ => None,
        })
        .collect();
    disks.sort_unstable();
    disks.dedup();
    for disk in disks {
        let path = format!("/sys/dev/block/{}:{}/inflight", major(disk), minor(disk));
        let began = Instant::now();
        // none at all, once, is enough: the task makes no new ones
        while std::fs::read_to_string(&path).is_ok_and(|text| text.split_whitespace().any(|n| n != "0")) {
            if began.elapsed() > PATIENCE {
                tracing::warn!("{path} never was zero: asynchronous requests may be under way");
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// A ring as an image has it.
struct Ring<'a> {
    nr: u32,
    head: u32,
    tail: u32,
    bytes: &'a [u8],
}

impl Ring<'_> {
    fn read(bytes: &[u8]) -> Option<Ring<'_>> {
        let word = |n: usize| bytes.get(4 * n..4 * n + 4)?.try_into().ok().map(u32::from_le_bytes);
        let ring = Ring { nr: word(1)?, head: word(2)?, tail: word(3)?, bytes };
        let room = u32::try_from(bytes.len().checked_sub(HEADER)? / EVENT).ok()?;
        let sane = word(4)? == MAGIC && word(7)? == HEADER as u32;
        (sane && ring.nr == room && ring.head < ring.nr && ring.tail < ring.nr).then_some(ring)
    }
}

/// Makes a context again whose ring lies at `area`, and held `bytes`.
pub fn restore(area: &VmaEntry, bytes: &[u8], plan: &mut Plan) -> Result<()> {
    let lie = || Error::lie("mm", format!("an AIO ring at {:x} that is none", area.start));
    let ring = Ring::read(bytes).ok_or_else(lie)?;
    let requests = entry(area).ok_or_else(lie)?.nr_req;
    let what = format!("AIO context for {requests} requests");
    let place = plan.room(8);
    plan.call(what.clone(), libc::SYS_io_setup, &[requests.into(), place.into()]);
    let context = plan.op(Code::Load, 0, &[place.into(), 0.into()], Expect::Any, [0; 2], what.clone());
    // size and head, which is zero
    let size = i64::from(ring.nr);
    plan.op(Code::Load, 0, &[context.into(), 4.into()], Expect::Exact, [size, 0], format!("{what}: its size"));
    if (ring.head, ring.tail) != (0, 0) {
        turn(&ring, context.into(), &what, plan);
    }
    let len = area.end - area.start;
    const MAYMOVE_FIXED: u32 = 3;
    let args = [context.into(), len.into(), len.into(), MAYMOVE_FIXED.into(), area.start.into()];
    plan.call_exact(what.clone(), libc::SYS_mremap, &args, area.start.cast_signed());
    let events = plan.bytes(&ring.bytes[HEADER..]);
    let args = [(area.start + HEADER as u64).into(), events.into(), events.len.into()];
    plan.op(Code::Copy, 0, &args, Expect::Any, [0; 2], what);
    Ok(())
}

/// Brings head and tail of a new context to where they were.
fn turn(ring: &Ring<'_>, context: Arg, what: &str, plan: &mut Plan) {
    let path = plan.string(b"/dev/null");
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    let null =
        plan.call(what.to_owned(), libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), flags.into(), 0.into()]);
    // struct iocb: key, opcode and priority in the third word (IOCB_CMD_PWRITE), the descriptor behind them
    let iocb = plan.words(&[0, 0, 1, 0, 0, 0, 0, 0]);
    plan.op(Code::Store, 0, &[Arg::Data(iocb.offset + 20), null.into()], Expect::Any, [0; 2], "descriptor");
    plan.pointer(iocb, 24, path);
    // one byte, whichever
    plan.op(Code::Store, 0, &[Arg::Data(iocb.offset + 32), 1.into()], Expect::Any, [0; 2], "length");
    let list = plan.room(8 * BATCH as usize);
    (0..BATCH).for_each(|n| plan.pointer(list, 8 * u64::from(n), iocb));
    let events = plan.room(EVENT * BATCH as usize);
    let at_once = plan.words(&[0, 0]);
    // a tail before the head has been all the way round
    let total = if ring.tail < ring.head { ring.nr + ring.tail } else { ring.tail };
    let (mut submitted, mut fetched) = (0, 0);
    while submitted < total {
        let now = BATCH.min(total - submitted);
        plan.call_exact(what.to_owned(), libc::SYS_io_submit, &[context, now.into(), list.into()], now.into());
        submitted += now;
        let ready = ring.head.min(submitted) - fetched;
        if ready > 0 {
            let args = [context, ready.into(), ready.into(), events.into(), at_once.into()];
            plan.call_exact(what.to_owned(), libc::SYS_io_getevents, &args, ready.into());
            fetched += ready;
        }
    }
    plan.call(what.to_owned(), libc::SYS_close, &[null.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(len: u64) -> VmaEntry {
        VmaEntry { start: 0x7000_0000, end: 0x7000_0000 + len, status: status::AIORING, ..Default::default() }
    }

    #[test]
    fn requests_are_those_that_make_a_ring_of_that_size() {
        for pages in 1..40u32 {
            let e = entry(&area(u64::from(pages) * PAGE)).unwrap();
            let events = e.nr_req * 2 + 2;
            assert_eq!((HEADER as u32 + events * EVENT as u32).div_ceil(PAGE as u32), pages);
        }
    }

    #[test]
    fn rings_that_are_none() {
        let mut ring = vec![0u8; PAGE as usize];
        let words = [0u32, 127, 3, 5, MAGIC, 1, 0, HEADER as u32];
        for (n, word) in words.iter().enumerate() {
            ring[4 * n..4 * n + 4].copy_from_slice(&word.to_le_bytes());
        }
        let mut plan = Plan::new();
        restore(&area(PAGE), &ring, &mut plan).unwrap();
        plan.check().unwrap();
        for (at, value) in [(1, 126), (2, 127), (3, 200), (4, 1), (7, 0)] {
            let mut bad = ring.clone();
            bad[4 * at..4 * at + 4].copy_from_slice(&u32::to_le_bytes(value));
            assert!(restore(&area(PAGE), &bad, &mut Plan::new()).is_err(), "{at}");
        }
        assert!(restore(&area(PAGE), &[0; 8], &mut Plan::new()).is_err());
    }
}
