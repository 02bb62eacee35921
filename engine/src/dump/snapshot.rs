//! A snapshot (`--snapshot`): a dump of a tree that goes on, for which it stands still as shortly as can be.
//!
//! Memory is copied ahead, while the tree runs, by the passes of a pre-dump: into folders `snapshot-N.pre` in the folder of
//! the images, which build on each other, and the snapshot on the last of them, by the link `parent` that CRIU has for
//! that. Whoever copies or removes the folder has all of it. What was written since the last pass is copied in the freeze. If
//! that is much, since the program writes faster than we can copy, each task is copied on write instead ([`Infected::copy`]), let go, and
//! its copy is what is read.
//!
//! Shared memory is copied in the freeze: a copy on write does not protect it, and others may write it through descriptors.
//! So are areas that the program keeps out of its children (MADV_DONTFORK, MADV_WIPEONFORK).
//!
//! Not kept, when the tree was not tracked before: the marks of the passes. Their watch ends with the snapshot, or with us.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use standstill_images::{FolderStore, ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::memory::dedup;
use crate::memory::drain::Drain;
use crate::memory::track::{self, Tracking};
use crate::options::Options;
use crate::pre_dump::{self, Pass};
use crate::proc::maps::{VmFlags, Vma};
use crate::progress::Counter;
use crate::sys::futex::RobustList;
use crate::tasks::facts::Facts;
use crate::tasks::{finish, flags, freeze};
use crate::tracee::{Copied, Infected};

/// So few pages are copied in the freeze: 8 MiB.
pub(super) const FEW: u64 = (8 << 20) / crate::memory::PAGE;
/// More passes than this do not help a program that writes all the time.
const PASSES: usize = 4;
const SUFFIX: &str = ".pre";
const PREFIX: &str = "snapshot-";

/// Memory that was copied ahead. Unless it is [kept](Ahead::keep), it is removed.
pub(super) struct Ahead {
    folders: Vec<PathBuf>,
    images_dir: PathBuf,
    /// Its marks, which say what has been written since.
    tracking: Option<Tracking>,
    /// Flags of areas, unless they are to be read in the freeze.
    pub(super) flags: Option<flags::Ahead>,
    /// How long the tree stood still for it.
    pub(super) frozen: Duration,
    /// Pages that were copied.
    pub(super) pages: u64,
    /// Pages that a checkpoint before this one has.
    pub(super) in_parent: u64,
    last: Option<Images>,
    tracked_before: bool,
}

impl Ahead {
    /// Copies the memory of the tree below `root`, until little enough of it is written meanwhile. Flags of areas are read
    /// last, if they are to be read ahead.
    pub(super) fn copy(opts: &Options, root: i32, flags: bool, counter: &Counter) -> Result<Ahead> {
        let mut ahead = Ahead {
            folders: Vec::new(),
            images_dir: opts.images_dir.clone(),
            tracking: None,
            flags: None,
            frozen: Duration::ZERO,
            pages: 0,
            in_parent: 0,
            last: None,
            tracked_before: track::is_ours(root)?,
        };
        if track::available().is_none() {
            return Ok(ahead);
        }
        let mut last = Vec::new();
        for _ in 0..PASSES {
            let Pass { mut tracking, report, processes, .. } = ahead.pass(opts, root, counter)?;
            last = processes;
            ahead.frozen += report.frozen;
            ahead.pages += report.pages;
            if ahead.folders.len() == 1 {
                ahead.in_parent = report.in_parent;
            }
            tracking.follow(ahead.last.clone(), true);
            let written = tracking.written();
            ahead.tracking = Some(tracking);
            // half of what was copied is written again already: the next pass would gain too little
            if written.is_none_or(|written| written <= FEW || written > report.pages / 2) {
                break;
            }
        }
        ahead.flags = flags.then(|| flags::Ahead::read(&last));
        Ok(ahead)
    }

    fn pass(&mut self, opts: &Options, root: i32, counter: &Counter) -> Result<Pass> {
        let name = format!("{PREFIX}{}{SUFFIX}", self.folders.len() + 1);
        let path = self.images_dir.join(&name);
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.call("mkdir").at(Place::Path(path.clone()))?;
        let parent = match self.folders.last().and_then(|f| f.file_name()) {
            Some(last) => Some(Path::new("..").join(last)),
            None => opts.prev_images_dir.as_ref().map(|p| Path::new("..").join(p)),
        };
        self.folders.push(path.clone());
        let folder = FolderStore::open(&path)?;
        folder.set_parent(parent.as_deref())?;
        let images = Images::new(folder);
        let opts = Options { track_mem: true, images_dir: path, prev_images_dir: parent, ..opts.clone() };
        let pass = pre_dump::pass(&opts, root, &images, self.tracking.take(), None, counter, &mut |_| {})?;
        FolderStore::open(&self.images_dir)?.set_parent(Some(Path::new(&name)))?;
        self.last = Some(images);
        Ok(pass)
    }

    /// An error if a flag of these tasks, which run again, may not have been what was written.
    pub(super) fn confirm(&self, pids: &[i32]) -> Result<()> {
        match self.flags.as_ref().and_then(|flags| pids.iter().find(|pid| !flags.still_so(**pid))) {
            Some(pid) => {
                Err(Error::Moving { what: "the flags of memory areas changed while the snapshot was taken" }).task(*pid)
            }
            None => Ok(()),
        }
    }

    /// The marks, for the dump that builds on this. They are set again only for who wants them afterwards.
    pub(super) fn tracking(&mut self, opts: &Options) -> Option<Tracking> {
        let again = opts.track_mem || self.tracked_before;
        let mut tracking = self.tracking.take()?;
        tracking.follow(self.last.clone(), again);
        Some(tracking)
    }

    /// The snapshot is complete. What of this was copied again later is freed.
    pub(super) fn keep(&mut self, images: &Images) -> Result<()> {
        let own = self.folders.len();
        let mut newer = images.clone();
        for before in (1..=own).rev() {
            dedup::free_in_some_parents(&newer, before)?;
            let Some(parent) = newer.parent()? else { break };
            newer = parent;
        }
        self.folders.clear();
        Ok(())
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if self.folders.is_empty() {
            return;
        }
        if let Ok(folder) = FolderStore::open(&self.images_dir) {
            let _ = folder.set_parent(None);
        }
        for folder in &self.folders {
            if let Err(e) = remove(folder) {
                tracing::warn!("removing {}: {e}", folder.display());
            }
        }
    }
}

/// Copies on write, of some tasks of a tree. They are ended when this is dropped.
pub(super) struct Copies<'r> {
    opts: &'r Options,
    root: i32,
    robust: &'r RobustList,
    copies: Vec<Copied<'r>>,
}

impl<'r> Copies<'r> {
    /// No copies yet, of the tree below `root`.
    pub(super) fn new(opts: &'r Options, root: i32, robust: &'r RobustList) -> Self {
        Copies { opts, root, robust, copies: Vec::new() }
    }

    /// Has `drain` read from a copy of its task, if that can be made; else it is read in the freeze.
    pub(super) fn make(&mut self, host: &mut Infected<'r>, facts: &Facts, drain: &mut Drain) -> bool {
        // nobody holds filters off in a copy
        let filtered = facts.threads.iter().any(|t| t.status.seccomp.unwrap_or(0) != 0);
        let kept_out =
            |a: &Vma| a.vm_flags.intersects(VmFlags::DONT_COPY) || a.vm_flags.intersects(VmFlags::WIPE_ON_FORK);
        if filtered || drain.copies_from(&facts.areas, kept_out) {
            return false;
        }
        let copy = host.copy().and_then(|copy| {
            let pid = copy.pid;
            self.copies.push(copy);
            drain.read_from(pid)
        });
        copy.inspect_err(|e| tracing::warn!("process {} cannot be copied on write: {}", facts.pid, e.chain())).is_ok()
    }

    /// Ends all copies. How long the tree stood still for that.
    pub(super) fn end(&mut self) -> Result<Duration> {
        let copies = std::mem::take(&mut self.copies);
        if copies.is_empty() {
            return Ok(Duration::ZERO);
        }
        copies.iter().for_each(Copied::release_memory);
        let frozen = freeze::freeze(self.root, Duration::from_secs(u64::from(self.opts.timeout)), None)?;
        let began = Instant::now();
        let (ours, theirs): (Vec<_>, Vec<_>) = frozen.into_iter().partition(|f| copies.iter().any(|c| c.pid == f.pid));
        // what we trace, nobody else can wait for
        for thread in ours.into_iter().flat_map(|f| f.threads) {
            thread.release()?;
        }
        copies.iter().for_each(Copied::kill);
        let mut infected = Vec::new();
        for f in theirs {
            let Some(copy) = copies.iter().find(|c| c.parent == f.pid).filter(|_| f.dead.is_none()) else { continue };
            let areas = flags::areas(f.pid, "maps")?;
            let mut host = pre_dump::infect(self.opts, &areas, f.threads, &[], self.robust)?;
            host.wait_for(copy)?;
            infected.push(host);
        }
        finish::let_go(infected, false, None, None)?;
        Ok(began.elapsed())
    }
}

impl Drop for Copies<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::warn!("ending a copy on write: {}", e.chain());
        }
    }
}

/// Removes what an older snapshot in the same folder has copied ahead. What is not of us stays.
pub(super) fn remove_old(images_dir: &Path) -> Result<()> {
    for n in 1..=PASSES {
        let folder = images_dir.join(format!("{PREFIX}{n}{SUFFIX}"));
        if !folder.is_dir() {
            break;
        }
        remove(&folder).at(Place::Path(folder))?;
    }
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    let store = FolderStore::open(folder)?;
    store.set_parent(None)?;
    let images = Images::new(store);
    for name in images.store().list()? {
        if ImageKind::from_file_name(&name).is_some() {
            images.store().remove(&name)?;
        }
    }
    std::fs::remove_dir(folder).call("rmdir")
}
