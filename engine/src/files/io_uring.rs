//! io_uring(7): rings for asynchronous requests, with nothing under way.
//!
//! The kernel shows heads and tails, registered files and buffers, and requests that wait in poll (`fdinfo`); what is in the
//! rings is memory, which the engine maps. What neither tells is asked ([`ask`]): what kind of ring it is, who may submit
//! to it, which threads have registered its descriptor, whether there is an eventfd. A [`StandstillIoUringEntry`] of
//! `files.img` is one ring, of the type `STANDSTILL_IO_URING`; its mapped memory are areas with
//! [`status::IO_URING`](crate::memory::status::IO_URING), whose `shmid` is the file id of the ring. CRIU knows neither, and
//! dumps none; called as `criu`, this program refuses rings too.
//!
//! Requests in flight are not carried. They are waited for, for a second, while the task's threads run the executor, so that
//! what the kernel has to do in a thread is done. A ring is idle when nothing waits in poll, no worker is at work, and as many
//! requests are completed as were submitted, which is how a timeout shows, which nothing else tells. A program that leaves out
//! completions (IOSQE_CQE_SKIP_SUCCESS) has more of the former: then no ring of the machine may have a timeout.
//!
//! Requests change open files too, and open and close some, while their program stands still: by workers and polling threads of
//! the kernel at any time, and in a thread that runs the executor. So descriptors of who has a ring are read until they stay
//! the same ([`settled`]), and once more when all requests were waited for and some of them had not been completed before: a
//! difference ends this attempt of the dump ([`Error::Moving`]).
//!
//! Order at restore ([`restore`]): the owner makes the ring when all processes exist; the engine takes it from there, and
//! everyone who has it takes it from the engine. Its rings are mapped with the descriptors. When all threads are there, the one
//! that may submit brings the ring to where it was (requests that do nothing move heads and tails, in the kernel too), then
//! registers what was registered.
//!
//! Not kept: IORING_SETUP_COOP_TASKRUN, ATTACH_WQ, the time after which a polling thread sleeps (one second again), limits and
//! CPUs of workers, the clock of waits (IORING_REGISTER_CLOCK), tags of registered files and buffers, the range for
//! direct descriptors; IORING_SETUP_SUBMIT_ALL is always set. IORING_SETUP_NO_SQARRAY is a ring with an array that nobody
//! changes. Registered credentials are refused where the kernel shows them, or where an SQE names some. Refused: rings in the
//! program's own memory (IORING_SETUP_NO_MMAP), rings with restrictions, provided buffers, memory for waits, busy polling
//! of the network, a registered file or eventfd that cannot be told from others, a polling thread with other credentials than
//! ours, a ring that is mapped and open nowhere.
//!
//! Man pages: io_uring(7), io_uring_setup(2), io_uring_register(2), io_uring_enter(2). Kernel: io_uring/fdinfo.c.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use standstill_images::proto::{FdTypes, FileEntry, StandstillIoUringEntry};

use super::{Descriptor, DumpFiles};
use crate::error::{Call, Error, Result};
use crate::options::Persona;
use crate::proc::fdinfo::FdDetail;
use crate::proc::io_uring::IoUring;
use crate::proc::maps::{Vma, VmaName};
use crate::sys::io_uring::{self as sys, code, setup};

mod ask;
mod flight;
mod restore;
mod rings;

pub use ask::{complete, Process};
pub use flight::settled;
pub use restore::{make, map_areas, open, opens_late, plan_owners, room, Restored, Thread};

/// What /proc/PID/fd/N points to.
pub const LINK: &[u8] = b"anon_inode:[io_uring]";

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    /// File ids of rings that are mapped, by inode, and whether the ring was there too.
    mapped: HashMap<u64, (u32, bool)>,
    /// Who has a ring open, by inode: task and number.
    holders: HashMap<u64, Vec<(i32, i32)>>,
    rings: Vec<Ring>,
}

/// A ring on its way into images.
#[derive(Debug)]
struct Ring {
    ino: u64,
    copy: OwnedFd,
    info: IoUring,
    entry: StandstillIoUringEntry,
    /// Only one thread may use it.
    single: bool,
    /// Since it was read, requests were completed.
    moved: bool,
}

impl Dumped {
    /// Are there any?
    pub fn is_empty(&self) -> bool {
        self.rings.is_empty()
    }
}

/// Notes who has rings open; before areas and descriptors.
pub fn note(descriptors: &[Descriptor], cx: &mut DumpFiles<'_>) {
    for d in descriptors.iter().filter(|d| d.link == LINK) {
        cx.io_uring.holders.entry(d.stat.st_ino).or_default().push((d.pid, d.fd));
    }
}

/// The file id of a ring that is mapped; areas come before descriptors.
pub fn mapped(area: &Vma, cx: &mut DumpFiles<'_>) -> Result<u32> {
    if cx.opts.personality == Persona::Criu {
        return Err(Error::refused("a mapping of [io_uring]", "let the program unmap it before the dump"));
    }
    if !cx.io_uring.holders.contains_key(&area.inode) {
        return Err(Error::refused(
            "a ring of an io_uring that no task has open",
            "let the program keep the io_uring open while its rings are mapped",
        ));
    }
    if ![sys::OFF_SQ_RING, sys::OFF_CQ_RING, sys::OFF_SQES].contains(&area.offset) {
        return Err(Error::refused(
            format!("a part of an io_uring's memory, at {:#x}", area.offset),
            "let the program unmap provided buffers, and map rings as a whole",
        ));
    }
    if let Some(&(id, _)) = cx.io_uring.mapped.get(&area.inode) {
        return Ok(id);
    }
    let id = cx.new_id();
    cx.io_uring.mapped.insert(area.inode, (id, false));
    Ok(id)
}

/// Is it memory of a ring?
pub fn is_ring(area: &Vma) -> bool {
    area.name() == VmaName::AnonInode(b"[io_uring]")
}

/// The id that a ring has been given for the sake of its memory.
pub fn reserved(d: &Descriptor, cx: &mut DumpFiles<'_>) -> Option<u32> {
    let (id, seen) = cx.io_uring.mapped.get_mut(&d.stat.st_ino).filter(|_| d.link == LINK)?;
    *seen = true;
    Some(*id)
}

/// Notes a ring, and refuses what can be seen to be impossible; the rest is [`complete`]d when tasks can be asked.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    if cx.opts.personality == Persona::Criu {
        return Err(d.refused("an io_uring", "let the program close its rings before the dump"));
    }
    let FdDetail::IoUring(info) = &d.info.detail else {
        return Err(d.refused("an io_uring that the kernel does not describe", "mount a /proc that shows its fdinfo"));
    };
    let refused = |what: &str, advice| Err(d.refused(what, advice));
    let entries = |mask: u32| mask.checked_add(1).filter(|n| n.is_power_of_two() && *n <= 1 << 20);
    let (Some(sq_entries), Some(cq_entries)) = (entries(info.sq_mask), entries(info.cq_mask)) else {
        return refused("an io_uring of unknown size", "let the program close it before the dump");
    };
    if info.napi {
        return refused(
            "an io_uring with busy polling of the network",
            "let the program unregister it before the dump",
        );
    }
    if !info.personalities.is_empty() {
        return refused("an io_uring with registered credentials", "let the program unregister them before the dump");
    }
    let copy = d.copy.as_fd();
    let asked = sys::ask(copy, code::REGISTER_PROBE);
    if asked == libc::EACCES {
        return refused("an io_uring with restrictions", "let the program close it before the dump");
    }
    let single = asked == libc::EEXIST;
    let mut flags = setup::CQSIZE | setup::SUBMIT_ALL;
    match sys::enter(copy) {
        libc::EBADFD => flags |= setup::R_DISABLED,
        libc::EEXIST => flags |= setup::SINGLE_ISSUER | setup::DEFER_TASKRUN | setup::TASKRUN_FLAG,
        _ if single => flags |= setup::SINGLE_ISSUER,
        _ => {}
    }
    if sys::polls(copy) {
        flags |= setup::IOPOLL;
    }
    let mut sq_thread_cpu = None;
    if info.sq_thread > 0 {
        flags |= setup::SQPOLL;
        sq_thread_cpu = ask::polling_thread(d, info.sq_thread)?;
        if sq_thread_cpu.is_some() {
            flags |= setup::SQ_AFF;
        }
    }
    let shape = rings::Shape { flags, sq_entries, cq_entries };
    flags = shape.by_size(copy).ok_or_else(|| {
        d.refused(
            "an io_uring whose rings are in the program's own memory",
            "start the program without IORING_SETUP_NO_MMAP",
        )
    })?;
    let entry = StandstillIoUringEntry {
        id,
        flags: d.flags,
        fown: d.fown,
        setup: flags,
        sq_entries,
        cq_entries,
        sq_thread_cpu,
        ..Default::default()
    };
    let file = FileEntry {
        r#type: FdTypes::StandstillIoUring as i32,
        id,
        standstill_io_uring: Some(entry.clone()),
        ..Default::default()
    };
    let copy = copy.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?;
    cx.io_uring.rings.push(Ring { ino: d.stat.st_ino, copy, info: (**info).clone(), entry, single, moved: false });
    Ok(file)
}

/// After all descriptors: is there memory of a ring without the ring?
pub fn check(cx: &DumpFiles<'_>) -> Result<()> {
    match cx.io_uring.mapped.iter().find(|(_, (_, seen))| !seen) {
        Some((ino, _)) => Err(Error::refused(
            format!("rings of io_uring {ino}, which no task has open"),
            "let the program keep the io_uring open while its rings are mapped",
        )),
        None => Ok(()),
    }
}
