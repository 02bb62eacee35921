//! inotify(7): watches on files and folders.
//!
//! `fdinfo` shows each watch: its number, the inode and its file system, and the handle of the file
//! (name_to_handle_at(2)). An [`InotifyFileEntry`] of `files.img` is one instance with its watches. A watch is on an inode,
//! so its path is found again: the handle is opened on a mount of that file system, and the kernel says by which name. The
//! path goes into the image with the handle, since another mount, or another host, has other handles. Where a file system
//! has no handles to open (overlayfs), the folders of `--irmap-scan-path` and a few that daemons watch are searched.
//!
//! At restore the engine makes the instance and adds the watches in the order of their numbers, each with its number
//! (INOTIFY_IOC_SETNEXTWD, or by adding until it comes). What the restore itself does is seen by the watches: [`settle`]
//! throws that away when all files are there.
//!
//! Not kept: events that nobody has read (named in the log, as with CRIU), the cursor from which numbers go on if the
//! highest ones were removed, and the account: watches count for the user who restores. Refused: files without a name.
//!
//! Man pages: inotify(7), inotify_add_watch(2), open_by_handle_at(2).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{inotify, FileType, Mode, OFlags};
use standstill_images::proto::{FdTypes, FhEntry, FileEntry, InotifyFileEntry, InotifyWdEntry};

use super::{magic_link, set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::proc::fdinfo::{FdDetail, FileHandle, InotifyWatch};
use crate::proc::mountinfo::{self, Mount};
use crate::sys::calls;

/// Words of a handle, at least, that CRIU writes and wants.
const HANDLE_WORDS: usize = 16;
/// What of a mask may be asked for again: IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT.
const MASK: u32 = libc::IN_ALL_EVENTS | 0x0400_0000 | 0x8000_0000;
/// Folders that are searched for a file whose handle cannot be opened.
const WATCHED_OFTEN: [&str; 6] =
    ["/etc", "/var/spool", "/var/log", "/usr/share/dbus-1/system-services", "/usr/share/polkit-1", "/lib/udev"];
/// Names that are looked at before a search is given up.
const SEARCH: usize = 1_000_000;

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
    let mut mounts = Vec::new();
    if !watches.is_empty() {
        let mut text = Vec::new();
        crate::proc::read_proc("/proc/self/mountinfo".as_ref(), &mut text).call("read(/proc/self/mountinfo)")?;
        mounts = mountinfo::parse(&text)?;
    }
    let wd = watches
        .iter()
        .map(|watch| dump_watch(watch, &mounts, cx).at(Place::Item("inotify watch", watch.wd.unsigned_abs().into())));
    let ify = InotifyFileEntry { id, flags: d.flags, fown: d.fown, wd: wd.collect::<Result<_>>()? };
    Ok(FileEntry { r#type: FdTypes::Inotify as i32, id, ify: Some(ify), ..Default::default() })
}

fn dump_watch(watch: &InotifyWatch, mounts: &[Mount], cx: &DumpFiles<'_>) -> Result<InotifyWdEntry> {
    let path = match by_handle(watch, mounts)? {
        Found::Path(path) => Some(path),
        Found::Unnamed => None,
        Found::Nothing => Some(search(watch, cx).ok_or_else(|| {
            let what = format!("an inotify watch on inode {} of device {}", watch.ino, device_text(watch.sdev));
            Error::refused(
                what,
                "its file system does not open files by handle: name a folder above it by --irmap-scan-path",
            )
        })?),
    };
    let handle = watch.handle.clone().unwrap_or_default();
    let mut words: Vec<u64> = handle.bytes.chunks(8).map(word).collect();
    words.resize(words.len().max(HANDLE_WORDS), 0);
    Ok(InotifyWdEntry {
        id: 0,
        i_ino: watch.ino,
        mask: watch.mask,
        ignored_mask: watch.ignored_mask,
        s_dev: watch.sdev,
        wd: watch.wd.unsigned_abs(),
        f_handle: FhEntry {
            bytes: u32::try_from(handle.bytes.len()).unwrap_or(0),
            r#type: handle.kind,
            handle: words,
            path: path.map(|path| path.into_os_string().into_vec()),
            mnt_id: None,
        },
    })
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}

/// Major and minor of a device as the kernel has it.
fn device(sdev: u32) -> (u32, u32) {
    (sdev >> 20, sdev & 0xf_ffff)
}

fn device_text(sdev: u32) -> String {
    let (major, minor) = device(sdev);
    format!("{major}:{minor}")
}

/// What a handle leads to.
enum Found {
    /// A file with this path.
    Path(PathBuf),
    /// A file that is covered, or that we cannot see, but whose handle opens it wherever its file system is mounted.
    Unnamed,
    /// No file: there is no handle, or it cannot be opened.
    Nothing,
}

/// Finds the path by the handle.
fn by_handle(watch: &InotifyWatch, mounts: &[Mount]) -> Result<Found> {
    let Some(handle) = &watch.handle else { return Ok(Found::Nothing) };
    let mut opened = false;
    for mount in mounts.iter().filter(|m| m.device == device(watch.sdev)) {
        let Some(file) = open_on(mount, handle) else { continue };
        let link =
            rustix::fs::readlink(magic_link(file.as_fd()), Vec::new()).call("readlink(/proc/self/fd/N)")?.into_bytes();
        if rustix::fs::fstat(&file).call("fstat")?.st_nlink == 0 {
            let what = format!("an inotify watch on the deleted file {}", String::from_utf8_lossy(&link));
            return Err(Error::refused(what, "let the program remove the watch"));
        }
        opened = true;
        let path = PathBuf::from(std::ffi::OsString::from_vec(link));
        if leads_to(&path, watch) {
            return Ok(Found::Path(path));
        }
    }
    // Inodes of these have other numbers when they are mounted again.
    let volatile =
        mounts.iter().any(|m| m.device == device(watch.sdev) && matches!(m.fs_type.as_slice(), b"tmpfs" | b"devtmpfs"));
    if opened && volatile {
        let what = format!("an inotify watch on inode {} of a tmpfs, which no path leads to", watch.ino);
        return Err(Error::refused(what, "unmount what covers it, or let the program remove the watch"));
    }
    Ok(if opened { Found::Unnamed } else { Found::Nothing })
}

/// Opens a handle on a mount; none if that cannot be done.
fn open_on(mount: &Mount, handle: &FileHandle) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let folder = rustix::fs::open(mount.mount_point.as_slice(), flags, Mode::empty()).ok()?;
    calls::open_by_handle(folder.as_fd(), handle.kind, &handle.bytes).ok()
}

/// Is the file with this path the one that is watched?
fn leads_to(path: &Path, watch: &InotifyWatch) -> bool {
    let is = |s: rustix::fs::Stat| s.st_ino == watch.ino && same_device(s.st_dev, watch.sdev);
    path.is_absolute() && rustix::fs::lstat(path).is_ok_and(is)
}

fn same_device(dev: u64, sdev: u32) -> bool {
    (rustix::fs::major(dev), rustix::fs::minor(dev)) == device(sdev)
}

/// Looks for an inode by its number, in the folders that the caller names and in a few more, breadth first.
fn search(watch: &InotifyWatch, cx: &DumpFiles<'_>) -> Option<PathBuf> {
    let mut folders: VecDeque<PathBuf> =
        cx.opts.irmap_scan_paths.iter().cloned().chain(WATCHED_OFTEN.map(PathBuf::from)).collect();
    let mut left = SEARCH;
    if let Some(found) = folders.iter().find(|path| leads_to(path, watch)) {
        return Some(found.clone());
    }
    while let Some(folder) = folders.pop_front() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            left = left.checked_sub(1)?;
            let path = entry.path();
            if leads_to(&path, watch) {
                return Some(path);
            }
            let below = rustix::fs::lstat(&path).is_ok_and(|s| {
                FileType::from_raw_mode(s.st_mode) == FileType::Directory && same_device(s.st_dev, watch.sdev)
            });
            if below {
                folders.push_back(path);
            }
        }
    }
    None
}

/// Opens one, with its watches.
pub fn open(e: &InotifyFileEntry, _cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC).call("inotify_init1")?;
    let mut watches: Vec<&InotifyWdEntry> = e.wd.iter().collect();
    watches.sort_by_key(|watch| watch.wd);
    for watch in watches {
        add(fd.as_fd(), watch).at(Place::Item("inotify watch", watch.wd.into()))?;
    }
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Adds a watch with the number it had.
fn add(fd: BorrowedFd<'_>, watch: &InotifyWdEntry) -> Result<()> {
    const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
    let number =
        i32::try_from(watch.wd).ok().filter(|&n| n > 0).ok_or_else(|| Error::lie("files.img", "its number is none"))?;
    let file = target(watch)?;
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

/// The file that was watched: by path, or by handle where the image has no path.
fn target(watch: &InotifyWdEntry) -> Result<OwnedFd> {
    if let Some(path) = &watch.f_handle.path {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        return rustix::fs::open(path.as_slice(), flags, Mode::empty())
            .call("open")
            .at(Place::Path(std::ffi::OsStr::from_bytes(path).into()));
    }
    let mut bytes: Vec<u8> = watch.f_handle.handle.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(watch.f_handle.bytes as usize);
    let handle = FileHandle { kind: watch.f_handle.r#type, bytes };
    let mut text = Vec::new();
    crate::proc::read_proc("/proc/self/mountinfo".as_ref(), &mut text).call("read(/proc/self/mountinfo)")?;
    let mounts = mountinfo::parse(&text)?;
    let found = mounts.iter().filter(|m| m.device == device(watch.s_dev)).find_map(|m| open_on(m, &handle));
    found.ok_or_else(|| Error::Changed {
        what: format!(
            "inode {} of device {}, which was watched, is not there now",
            watch.i_ino,
            device_text(watch.s_dev)
        ),
    })
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
    fn a_deleted_file_is_refused() {
        let path = folder("deleted").join("file");
        std::fs::write(&path, "").unwrap();
        let held = std::fs::File::open(&path).unwrap();
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&fd, &path, inotify::WatchFlags::MODIFY).unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = dump(&Options::default(), &[&fd]).unwrap_err();
        assert_eq!(error.errno(), libc::ENOTSUP, "{error:?}");
        drop(held);
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
        let cx = DumpFiles::new(&opts, &images, Vec::new(), 0);
        assert_eq!(dump_watch(&watch, &[], &cx).unwrap().f_handle.path.unwrap(), inside.as_os_str().as_bytes());
        std::fs::remove_dir_all(path).unwrap();
    }
}
