//! Which pages were written since the last pass: for `pre-dump`, and for `dump --track-mem`.
//!
//! Two marks can tell. *Write protection* (kernel 6.7): a userfaultfd in asynchronous mode, made in each task and taken out
//! of it at once, watches the task's private areas. A pass asks PAGEMAP_SCAN which pages were written, and protects those
//! again. What the kernel does not protect counts as written: pages that came after the pass (touched, or untouched before;
//! after munmap and mmap; after MADV_DONTNEED), areas that moved (mremap takes the watch off), the memory of a process that
//! forked or called exec. *Soft-dirty* (where the kernel was built with it): `/proc/PID/clear_refs` clears a bit that each
//! write sets again. Where there is neither, each dump is whole, and says so.
//!
//! The marks mean "since the last pass". So they are believed only by a dump whose parent, by its `dump_criu_run_id`, is
//! that last pass; the [holder] knows which it was. A pass that fails in the middle leaves marks that nobody
//! believes. A page is taken from the parent only if the parent has it.
//!
//! Memory that is pinned (VmPin) is written by others without a fault: the memory of such a process is whole in each pass.
//!
//! Shared memory has no marks: others may write it, too. It is not in a pre-dump and whole in each dump, and so are
//! hugetlb areas.
//!
//! What the program can see: a write to a page for the first time since a pass takes a little longer, and its own
//! UFFDIO_REGISTER of an area that is watched here fails with EBUSY. Areas that the program's own userfaultfd watches are
//! refused by a dump.
//!
//! Sources: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/pagemap.rst, soft-dirty.rst.

pub mod holder;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;

use standstill_images::pages::PageMap;
use standstill_images::proto::InventoryEntry;
use standstill_images::{ImageKind, Images};

use super::scan::{Marks, Protect};
use super::PAGE;
use crate::error::{At, Call, Error, Result};
use crate::proc::maps::{VmFlags, Vma, VmaName};
use crate::proc::stat::Stat;
use crate::sys::probe;
use crate::sys::uffd::{self, Uffd};
use crate::tracee::Infected;
use holder::Holder;

/// The passes over one tree.
#[derive(Debug)]
pub struct Tracking {
    root: (i32, u64),
    marks: Option<Marks>,
    holder: Option<Holder>,
    watched: HashMap<i32, Watched>,
    /// Processes whose pages devices or the kernel may write, which no mark tells.
    pinned: HashSet<i32>,
    /// What the parent has, by pid in its images; `None` when the marks do not mean "since the parent".
    parent: Option<Images>,
    /// Pages are marked again, for the next pass.
    again: bool,
    /// The tasks run while their pages are looked at.
    running: bool,
    grown: bool,
}

/// The memory of one process, watched.
#[derive(Debug)]
struct Watched {
    start: u64,
    uffd: Uffd,
    areas: Vec<Range<u64>>,
}

/// What a drain needs to know of one task.
#[derive(Debug)]
pub struct TaskMarks<'a> {
    /// What tells written pages from others.
    pub marks: Marks,
    areas: Option<&'a [Range<u64>]>,
    parent: Option<PageMap>,
    protect: Protect,
}

/// Ends the tracking of the tree whose root is `pid`; whether there was one.
pub fn end(pid: i32) -> Result<bool> {
    Ok(Holder::find(pid)?.map(Holder::end).is_some())
}

/// A watch that is found on an area is one that an earlier pass of ours set, if there was one.
pub fn is_ours(root: i32) -> Result<bool> {
    Ok(Holder::find(root)?.is_some())
}

/// The marks that this kernel can give; it is asked once.
pub fn available() -> Option<Marks> {
    static KNOWN: OnceLock<Option<Marks>> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        if uffd::knows_asynchronous() && super::scan::knows_scan() {
            return Some(Marks::Protection);
        }
        probe::soft_dirty().is_ok().then_some(Marks::SoftDirty)
    })
}

impl Tracking {
    /// Begins a pass over the stopped tree below `root`. `parent` are the images that the pass builds on; `again` marks
    /// pages for a next pass.
    pub fn begin(root: i32, stat: &Stat, parent: Option<Images>, again: bool) -> Result<Tracking> {
        let marks = available();
        if marks.is_none() {
            tracing::warn!("this kernel can tell no written pages from others: the dump is whole");
        }
        let mut holder = if marks == Some(Marks::Protection) { Holder::find(root)? } else { None };
        let mut watched = HashMap::new();
        if let Some(holder) = &holder {
            for (pid, start, fd) in holder.processes() {
                watched.insert(pid, Watched { start, uffd: Uffd::from_fd(holder.descriptor(fd)?), areas: Vec::new() });
            }
        }
        let mut trusted = None;
        if let (Some(images), Some(marks)) = (parent, marks) {
            let inventory: InventoryEntry = images.read_one(ImageKind::Inventory, ())?;
            let last = inventory.dump_criu_run_id.unwrap_or_default();
            let follows = match marks {
                Marks::Protection => holder.as_ref().is_some_and(|h| !last.is_empty() && h.run().as_bytes() == last),
                // nobody noted whose pass it was; a task that began after the parent cannot be in it
                Marks::SoftDirty => inventory.dump_uptime.is_some_and(|up| started(stat) < up),
            };
            if follows {
                trusted = Some(images);
            } else {
                tracing::warn!("no memory was tracked since the parent checkpoint: the dump is whole");
            }
        }
        // from here on no mark means what it meant
        if let Some(holder) = holder.as_mut().filter(|_| again) {
            holder.set_run("")?;
        }
        Ok(Tracking {
            root: (root, stat.starttime),
            marks,
            holder,
            watched,
            pinned: HashSet::new(),
            parent: trusted,
            again,
            running: false,
            grown: false,
        })
    }

    /// Whether a page is looked at and marked in one step, so that the tasks can run meanwhile.
    pub fn marks_at_once(&self) -> bool {
        self.marks != Some(Marks::SoftDirty)
    }

    /// Whether the tasks run from now on.
    pub fn tasks_run(&mut self, running: bool) {
        self.running = running;
    }

    /// A pass is complete, and these are its images: the next one builds on them. `again` marks pages for one after that.
    pub fn follow(&mut self, images: Option<Images>, again: bool) {
        self.parent = images.filter(|_| self.marks.is_some());
        self.again = again;
    }

    /// How many pages were written since the last pass, of those that are watched; `None` if only a stopped tree can tell.
    pub fn written(&self) -> Option<u64> {
        let Some(Marks::Protection) = self.marks else { return None };
        let one = |(pid, watched): (&i32, &Watched)| {
            let mut map = super::scan::Pagemap::open(*pid).ok()?;
            watched.areas.iter().map(|area| map.written(area.start, area.end).ok()).sum::<Option<u64>>()
        };
        // who is gone by now has nothing to copy
        Some(self.watched.iter().filter_map(one).sum())
    }

    /// Whether an earlier pass of ours set a watch that still is.
    pub fn has_watch(&self) -> bool {
        self.holder.is_some() || !self.watched.is_empty()
    }

    /// The process has memory pinned (registered buffers of an io_uring, RDMA): who has it pinned writes it without a fault, so
    /// no mark is believed, and none is set. A pin that comes after a pass is a write of its own.
    pub fn distrust(&mut self, pid: i32) {
        self.grown |= self.watched.remove(&pid).is_some();
        if self.pinned.insert(pid) {
            tracing::info!("task {pid} has memory pinned: it is dumped whole");
        }
    }

    /// The next pass finds out anew who has memory pinned.
    pub fn trust_again(&mut self) {
        self.pinned.clear();
    }

    /// Whether the memory of a process can be watched only after [`Tracking::watch`].
    pub fn needs_watch(&self, pid: i32, stat: &Stat) -> bool {
        self.again
            && self.marks == Some(Marks::Protection)
            && !self.pinned.contains(&pid)
            && self.watched.get(&pid).is_none_or(|w| w.start != stat.starttime)
    }

    /// Makes the watch of a process, with the executor in it.
    pub fn watch(&mut self, host: &mut Infected<'_>, stat: &Stat) -> Result<()> {
        let args = [uffd::FLAGS.into()];
        let made = host.borrow("watch over memory", libc::SYS_userfaultfd, &args).and_then(Uffd::asynchronous);
        match made {
            Ok(uffd) => {
                self.grown = true;
                self.watched.insert(host.pid(), Watched { start: stat.starttime, uffd, areas: Vec::new() });
            }
            // the memory of this one is dumped whole each time: no descriptor is free in it, or something forbids it
            Err(e) if !matches!(e.errno(), 0 | libc::ESRCH) => {
                tracing::warn!("memory of task {} cannot be tracked: {e}", host.pid());
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Puts the areas of a process under its watch; those that were are again.
    pub fn register(&mut self, pid: i32, areas: &[Vma]) -> Result<()> {
        let Some(watched) = self.watched.get_mut(&pid) else { return Ok(()) };
        watched.areas.clear();
        for area in areas.iter().filter(|a| can_be_watched(a)) {
            match watched.uffd.register(area.start, area.end) {
                Ok(()) => watched.areas.push(area.start..area.end),
                // the process has called exec: another address space, which has no watch yet
                Err(e) if e.errno() == libc::ESRCH => {
                    self.watched.remove(&pid);
                    self.grown = true;
                    break;
                }
                Err(e) => tracing::debug!("area {:x}-{:x} of task {pid} is not tracked: {e}", area.start, area.end),
            }
        }
        Ok(())
    }

    /// What is known of the pages of one task; `id` is its pid in the images.
    pub fn marks(&self, pid: i32, id: u32) -> Result<Option<TaskMarks<'_>>> {
        let Some(marks) = self.marks.filter(|_| !self.pinned.contains(&pid)) else { return Ok(None) };
        let areas = match marks {
            Marks::Protection => match self.watched.get(&pid) {
                Some(watched) => Some(watched.areas.as_slice()),
                None => return Ok(None),
            },
            Marks::SoftDirty => None,
        };
        let parent = match &self.parent {
            Some(images) if images.exists(ImageKind::Pagemap, id)? => {
                Some(PageMap::read(images, ImageKind::Pagemap, id, PAGE)?)
            }
            // its pages went to a server
            Some(images) => crate::transfer::client::noted(images, id)?,
            None => None,
        };
        let protect = match (marks, self.again, self.running) {
            (Marks::SoftDirty, ..) | (_, false, _) => Protect::No,
            (Marks::Protection, true, false) => Protect::All,
            (Marks::Protection, true, true) => Protect::WhatIsWatched,
        };
        Ok(Some(TaskMarks { marks, areas, parent, protect }))
    }

    /// Clears the soft-dirty bits of a task, all at once.
    pub fn clear(&self, pid: i32) -> Result<()> {
        if self.again && self.marks == Some(Marks::SoftDirty) {
            let path = format!("/proc/{pid}/clear_refs");
            std::fs::write(path, "4").call("write(/proc/PID/clear_refs)").task(pid)?;
        }
        Ok(())
    }

    /// The pass is complete, and its images have this name. What it marked is kept until the next one.
    pub fn keep(self, run: &str) -> Result<()> {
        if !self.again || self.marks != Some(Marks::Protection) {
            return Ok(());
        }
        match self.holder {
            Some(mut holder) if !self.grown => holder.set_run(run),
            old => {
                let processes: Vec<_> = self.watched.iter().map(|(pid, w)| (*pid, w.start, &w.uffd)).collect();
                Holder::start(self.root, run, &processes)?;
                if let Some(old) = old {
                    old.end();
                }
                Ok(())
            }
        }
    }
}

impl TaskMarks<'_> {
    /// Whether pages of an area can be told apart.
    pub fn cover(&self, start: u64, end: u64) -> bool {
        let known = |areas: &[Range<u64>]| {
            let at = areas.partition_point(|a| a.end <= start);
            areas.get(at).is_some_and(|a| a.start <= start && end <= a.end)
        };
        self.areas.is_none_or(known)
    }

    /// Calls `take` with the parts of a range of pages that were not written: those that the parent has, and those that it
    /// has not.
    pub fn split(&self, address: u64, bytes: u64, mut take: impl FnMut(u64, u64, bool)) {
        let (mut at, end) = (address, address + bytes);
        let runs = self.parent.iter().flat_map(|map| map.in_range(address..end));
        for run in runs {
            if run.address > at {
                take(at, run.address - at, false);
            }
            take(run.address, run.bytes(PAGE), true);
            at = run.end(PAGE);
        }
        if at < end {
            take(at, end - at, false);
        }
    }

    /// Whether pages are to be protected again.
    pub fn protect(&self) -> Protect {
        self.protect
    }
}

/// Private memory, but for what the kernel puts there and for hugetlb pages.
fn can_be_watched(area: &Vma) -> bool {
    let special = matches!(
        area.name(),
        VmaName::Vdso
            | VmaName::Vvar
            | VmaName::VvarVclock
            | VmaName::Vsyscall
            | VmaName::Uprobes
            | VmaName::AnonymousHuge
    );
    !area.shared && !special && !area.vm_flags.contains(VmFlags::HUGETLB) && !area.vm_flags.contains(VmFlags::DROPPABLE)
}

/// When a process began, in microseconds after boot.
fn started(stat: &Stat) -> u64 {
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    stat.starttime.saturating_mul(1_000_000) / ticks
}

/// The time since boot, as an inventory has it.
pub fn uptime() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// The refusal, in CRIU's words, where nothing can be tracked.
pub fn unavailable() -> Error {
    Error::Usage { what: "Tracking memory is not available. Consider omitting --track-mem option.".into() }
}
