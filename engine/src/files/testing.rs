//! What the tests of this folder share: this very process is the target, memory holds the images, and a small
//! interpreter runs the operations that are meant for a task.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use standstill_images::{Images, MemoryStore};

use super::{Descriptor, DumpFiles, RestoreFiles};
use crate::error::Result;
use crate::options::Options;
use crate::plan::Plan;
use crate::sys::calls;

/// This process.
pub(super) fn me() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

/// All there is to know about a descriptor of this process.
pub(super) fn descriptor(fd: impl AsFd) -> Descriptor {
    let pidfd = calls::pidfd_open(me(), 0).unwrap();
    Descriptor::read(me(), pidfd.as_fd(), fd.as_fd().as_raw_fd(), &mut Vec::new()).unwrap()
}

/// Dumps descriptors of this process: the images, and the file ids.
pub(super) fn dump(opts: &Options, fds: &[&OwnedFd]) -> Result<(Images, Vec<u32>)> {
    let images = Images::new(MemoryStore::new());
    let mut files = DumpFiles::new(opts, &images, vec![me()], 0);
    let mut ids = Vec::new();
    for fd in fds {
        ids.push(files.descriptor(&descriptor(fd))?.id);
    }
    super::fsnotify::check(&files)?;
    files.finish()?;
    Ok((images, ids))
}

/// Opens a file of a restore; the descriptor is the test's own.
pub(super) fn open(files: &mut RestoreFiles<'_>, id: u32) -> OwnedFd {
    files.open(id).unwrap().try_clone_to_owned().unwrap()
}

/// Runs here what the first task that has the file would run.
pub(super) fn in_task(files: &RestoreFiles<'_>, id: u32, fd: &OwnedFd) {
    let mut plan = Plan::new();
    files.in_task(id, fd.as_raw_fd(), &mut plan).unwrap();
    plan.check().unwrap();
    calls::run_here(&plan).unwrap();
}
