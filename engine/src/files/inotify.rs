//! inotify(7): watches on files and folders.
//!
//! `fdinfo` shows each watch: its number, the inode and its file system, and the handle of the file
//! (name_to_handle_at(2)). An [`InotifyFileEntry`] of `files.img` is one instance with its watches. A watch is on an inode,
//! so its path is found again ([`super::fsnotify`]).
//!
//! At restore the engine makes the instance and adds the watches in the order of their numbers, each with its number
//! (INOTIFY_IOC_SETNEXTWD, or by adding until it comes). What the restore itself does is seen by the watches: [`settle`]
//! throws that away when all files are there.
//!
//! A name that `--link-remap` makes for a moment is seen by a program that watches its folder and is left running.
//!
//! Not kept: events that nobody has read (named in the log, as with CRIU), the cursor from which numbers go on if the
//! highest ones were removed, and the account: watches count for the user who restores.
//!
//! Man pages: inotify(7), inotify_add_watch(2), open_by_handle_at(2).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify;
use standstill_images::proto::{FdTypes, FileEntry, InotifyFileEntry, InotifyWdEntry};

use super::fsnotify::{self, Object};
use super::{magic_link, set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::proc::fdinfo::{FdDetail, InotifyWatch};
use crate::proc::mountinfo::Mount;
use crate::sys::calls;

/// What of a mask may be asked for again: IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT.
const MASK: u32 = libc::IN_ALL_EVENTS | 0x0400_0000 | 0x8000_0000;

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let watches: &[InotifyWatch] = match &d.info.detail {
        FdDetail::Inotify(watches) => watches,
        _ => &[],
    };
    let waiting = rustix::io::ioctl_fionread(&d.copy).call("ioctl(FIONREAD)")?;
    if waiting > 0 {
        tracing::warn!(pid = d.pid, fd = d.fd, bytes = waiting, "unread inotify events will be dropped");
    }
    let mounts = if watches.is_empty() { Vec::new() } else { fsnotify::mounts()? };
    let mut wd = Vec::with_capacity(watches.len());
    for watch in watches {
        let entry = dump_watch(watch, &mounts, cx);
        wd.push(entry.at(Place::Item("inotify watch", watch.wd.unsigned_abs().into()))?);
    }
    let ify = InotifyFileEntry { id, flags: d.flags, fown: d.fown, wd };
    Ok(FileEntry { r#type: FdTypes::Inotify as i32, id, ify: Some(ify), ..Default::default() })
}

fn dump_watch(watch: &InotifyWatch, mounts: &[Mount], cx: &mut DumpFiles<'_>) -> Result<InotifyWdEntry> {
    let object = Object { what: "an inotify watch", ino: watch.ino, sdev: watch.sdev, handle: watch.handle.as_ref() };
    Ok(InotifyWdEntry {
        id: 0,
        i_ino: watch.ino,
        mask: watch.mask,
        ignored_mask: watch.ignored_mask,
        s_dev: watch.sdev,
        wd: watch.wd.unsigned_abs(),
        f_handle: fsnotify::find(&object, mounts, cx)?,
    })
}

/// Opens one, with its watches.
pub fn open(e: &InotifyFileEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC).call("inotify_init1")?;
    let mut watches: Vec<&InotifyWdEntry> = e.wd.iter().collect();
    watches.sort_by_key(|watch| watch.wd);
    for watch in watches {
        add(fd.as_fd(), watch, cx).at(Place::Item("inotify watch", watch.wd.into()))?;
    }
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Adds a watch with the number it had.
fn add(fd: BorrowedFd<'_>, watch: &InotifyWdEntry, cx: &mut RestoreFiles<'_>) -> Result<()> {
    const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
    let number =
        i32::try_from(watch.wd).ok().filter(|&n| n > 0).ok_or_else(|| Error::lie("files.img", "its number is none"))?;
    let file = fsnotify::target(&watch.f_handle, watch.i_ino, watch.s_dev, cx)?;
    let numbered = match calls::ioctl_value(fd, "ioctl(INOTIFY_IOC_SETNEXTWD)", INOTIFY_IOC_SETNEXTWD, watch.wd.into())
    {
        Ok(_) => true,
        // A kernel without CONFIG_CHECKPOINT_RESTORE counts up from 1.
        Err(e) if e.errno() == libc::ENOTTY => false,
        Err(e) => return Err(e),
    };
    let mask = inotify::WatchFlags::from_bits_retain(watch.mask & MASK);
    loop {
        let got = inotify::add_watch(fd, magic_link(file.as_fd()), mask).call("inotify_add_watch")?;
        if got == number {
            return Ok(());
        }
        if numbered || got > number {
            let path = watch.f_handle.path.as_deref().map_or_else(|| "its file".into(), String::from_utf8_lossy);
            return Err(Error::Changed {
                what: format!("{path} got watch {got}: it is the same file as that of another watch"),
            });
        }
        inotify::remove_watch(fd, got).call("inotify_rm_watch")?;
    }
}

/// Throws away the events that the restore itself caused; to be called when nothing is opened or written any more, and
/// before any task runs.
pub fn settle(cx: &RestoreFiles<'_>) -> Result<()> {
    for (id, fd) in cx.opened.iter().filter(|(id, _)| cx.entries.get(id).is_some_and(|e| e.ify.is_some())) {
        loop {
            let waiting = rustix::io::ioctl_fionread(fd).call("ioctl(FIONREAD)").at(Place::File(*id))?;
            if waiting == 0 {
                break;
            }
            let mut events = vec![0; usize::try_from(waiting).unwrap_or(4096).max(4096)];
            rustix::io::read(fd, &mut events[..]).call("read(inotify)").at(Place::File(*id))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{descriptor, dump, open};
    use super::*;
    use crate::options::Options;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

    fn watches(fd: &OwnedFd) -> Vec<InotifyWatch> {
        match descriptor(fd).info.detail {
            FdDetail::Inotify(watches) => watches,
            other => panic!("{other:?}"),
        }
    }

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("standstill-inotify-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn waiting(fd: &OwnedFd) -> u64 {
        rustix::io::ioctl_fionread(fd).unwrap()
    }

    #[test]
    fn watches_come_back_with_their_numbers() {
        let (a, b) = (folder("a"), folder("b"));
        let link = a.join("link");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&b, &link).unwrap();
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        let gone = inotify::add_watch(&fd, "/", inotify::WatchFlags::MODIFY).unwrap();
        inotify::add_watch(&fd, &a, inotify::WatchFlags::CREATE | inotify::WatchFlags::EXCL_UNLINK).unwrap();
        inotify::remove_watch(&fd, gone).unwrap();
        inotify::add_watch(&fd, &b, inotify::WatchFlags::ALL_EVENTS | inotify::WatchFlags::ONESHOT).unwrap();
        inotify::add_watch(&fd, &link, inotify::WatchFlags::ATTRIB | inotify::WatchFlags::DONT_FOLLOW).unwrap();
        let opts = Options::default();
        let (images, ids) = match dump(&opts, &[&fd]) {
            Err(e) if !rustix::process::geteuid().is_root() => {
                eprintln!("skipped: handles are for the administrator ({e})");
                return;
            }
            other => other.unwrap(),
        };
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let path = files
            .entry(ids[0])
            .unwrap()
            .ify
            .as_ref()
            .unwrap()
            .wd
            .iter()
            .find_map(|w| (w.wd == 2).then(|| w.f_handle.path.clone()));
        assert_eq!(path.flatten().unwrap(), a.as_os_str().as_bytes());
        let again = open(&mut files, ids[0]);
        assert_eq!(watches(&again), watches(&fd));
        assert_eq!(descriptor(&again).flags, descriptor(&fd).flags);

        // what happens before the end of the restore is not seen by the program
        std::fs::write(a.join("made"), "").unwrap();
        assert!(waiting(&again) > 0);
        settle(&files).unwrap();
        assert_eq!(waiting(&again), 0);
        std::fs::write(a.join("made later"), "").unwrap();
        assert!(waiting(&again) > 0);
        for folder in [a, b] {
            std::fs::remove_dir_all(folder).unwrap();
        }
    }

    #[test]
    fn a_deleted_file_must_be_open_somewhere() {
        let path = folder("deleted").join("file");
        std::fs::write(&path, "").unwrap();
        let held = std::fs::File::open(&path).unwrap();
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&fd, &path, inotify::WatchFlags::MODIFY).unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = dump(&Options::default(), &[&fd]).unwrap_err();
        assert_eq!(error.errno(), libc::ENOTSUP, "{error:?}");
        // its content goes along if somebody has it open
        let held = OwnedFd::from(held);
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&fd, &held]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let again = open(&mut files, ids[0]);
        assert_eq!(watches(&again).len(), 1);
    }

    #[test]
    fn a_file_without_handle_is_found_by_search() {
        let path = folder("searched");
        let inside = path.join("x").join("y");
        std::fs::create_dir_all(&inside).unwrap();
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&fd, &inside, inotify::WatchFlags::MODIFY).unwrap();
        let watch = InotifyWatch { handle: None, ..watches(&fd)[0].clone() };
        let opts = Options { irmap_scan_paths: vec![path.clone()], ..Options::default() };
        let images = standstill_images::Images::new(standstill_images::MemoryStore::new());
        let mut cx = DumpFiles::new(&opts, &images, Vec::new(), 0);
        assert_eq!(dump_watch(&watch, &[], &mut cx).unwrap().f_handle.path.unwrap(), inside.as_os_str().as_bytes());
        std::fs::remove_dir_all(path).unwrap();
    }
}
