//! signalfd(2): signals that are read.
//!
//! The open file is a set of signals and nothing more: reading takes from whichever task reads. `fdinfo` shows the set. A
//! [`SignalfdEntry`] of `files.img` is one open file. The engine makes it; where an epoll watches it, the task that adds
//! it there is the one whose signals are waited for, which `epoll` sees to by adding it in the task.
//!
//! Pending signals are not here: they belong to tasks and threads.
//!
//! Man page: signalfd(2).

use std::os::fd::{AsFd, OwnedFd};

use standstill_images::proto::{FdTypes, FileEntry, SignalfdEntry};

use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::Result;
use crate::plan::Plan;
use crate::proc::fdinfo::FdDetail;
use crate::sys::calls;

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, _cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let FdDetail::Signalfd(sigmask) = d.info.detail else {
        return Err(d.refused("a signalfd whose set the kernel does not show", "mount a /proc that shows it"));
    };
    let sgfd = SignalfdEntry { id, flags: d.flags, fown: d.fown, sigmask };
    Ok(FileEntry { r#type: FdTypes::Signalfd as i32, id, sgfd: Some(sgfd), ..Default::default() })
}

/// Opens one.
pub fn open(e: &SignalfdEntry, _cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let fd = calls::signalfd(e.sigmask, libc::SFD_CLOEXEC)?;
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Nothing is left for the task: the set is all there is.
pub fn in_task(_e: &SignalfdEntry, _fd: i32, _plan: &mut Plan) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{descriptor, dump, open};
    use super::*;
    use crate::options::Options;

    #[test]
    fn set_and_flags_come_back() {
        // SIGUSR1, SIGTERM and the last realtime signal
        let mask = 1 << 9 | 1 << 14 | 1 << 63;
        let fd = calls::signalfd(mask, libc::SFD_NONBLOCK).unwrap();
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&fd]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let again = descriptor(open(&mut files, ids[0]));
        assert_eq!(again.info.detail, FdDetail::Signalfd(mask));
        assert_eq!(again.flags, descriptor(&fd).flags);
    }
}
