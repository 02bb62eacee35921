//! eventfd(2): a counter in the kernel.
//!
//! `fdinfo` has the counter, and since Linux 6.5 whether it is a semaphore (EFD_SEMAPHORE), which no call can ask or set
//! later. An [`EventfdFileEntry`] of `files.img` is one open file. CRIU 4.2 loses the semaphore; here it is the field
//! `standstill_semaphore`, which CRIU skips, and which is written only where it is true.
//!
//! Not kept: the kernel's own number for it (`eventfd-id`), and who else signals it (KVM, vhost, AIO, VFIO).
//!
//! Man pages: eventfd(2), proc_pid_fdinfo(5).

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{eventfd, EventfdFlags};
use standstill_images::proto::{EventfdFileEntry, FdTypes, FileEntry};

use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{Call, Error, Result};
use crate::proc::fdinfo::FdDetail;

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, _cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let FdDetail::Eventfd { count, semaphore, .. } = d.info.detail else {
        return Err(d.refused("an eventfd whose counter the kernel does not show", "mount a /proc that shows it"));
    };
    if semaphore.is_none() {
        tracing::debug!("this kernel does not say whether an eventfd is a semaphore; it comes back as a plain counter");
    }
    let efd = EventfdFileEntry {
        id,
        flags: d.flags,
        fown: d.fown,
        counter: count,
        standstill_semaphore: semaphore.filter(|&semaphore| semaphore),
    };
    Ok(FileEntry { r#type: FdTypes::Eventfd as i32, id, efd: Some(efd), ..Default::default() })
}

/// Opens one.
pub fn open(e: &EventfdFileEntry, _cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if e.counter == u64::MAX {
        return Err(Error::lie("files.img", "an eventfd has overflown"));
    }
    let kind = if e.standstill_semaphore() { EventfdFlags::SEMAPHORE } else { EventfdFlags::empty() };
    let fd = eventfd(0, kind | EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).call("eventfd2")?;
    if e.counter != 0 {
        rustix::io::write(&fd, &e.counter.to_ne_bytes()).call("write(eventfd)")?;
    }
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{dump, open};
    use super::*;
    use crate::options::Options;

    fn restored(fd: &OwnedFd) -> OwnedFd {
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[fd]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        open(&mut files, ids[0])
    }

    fn read(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn counter_and_flags_come_back() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let most = u64::MAX - 1;
        rustix::io::write(&fd, &most.to_ne_bytes()).unwrap();
        let again = restored(&fd);
        assert_eq!(rustix::fs::fcntl_getfl(&again).unwrap(), rustix::fs::fcntl_getfl(&fd).unwrap());
        assert_eq!(read(&again), most);
        assert_eq!(rustix::io::read(&again, &mut [0; 8]).unwrap_err(), rustix::io::Errno::AGAIN);
        assert_eq!(read(&fd), most, "the program's is as it was");
    }

    #[test]
    fn a_semaphore_stays_one() {
        let fd = eventfd(3, EventfdFlags::SEMAPHORE).unwrap();
        if !matches!(super::super::testing::descriptor(&fd).info.detail, FdDetail::Eventfd { semaphore: Some(_), .. }) {
            eprintln!("skipped: this kernel does not show eventfd-semaphore");
            return;
        }
        let again = restored(&fd);
        assert_eq!([read(&again), read(&again), read(&again)], [1, 1, 1]);
    }

    #[test]
    fn a_plain_counter_has_no_field_of_ours() {
        let fd = eventfd(3, EventfdFlags::empty()).unwrap();
        let (images, _) = dump(&Options::default(), &[&fd]).unwrap();
        let entries: Vec<FileEntry> = images.read_entries(standstill_images::ImageKind::Files, ()).unwrap();
        assert_eq!(entries[0].efd.as_ref().unwrap().standstill_semaphore, None);
    }
}
