//! What inotify and fanotify watch: an inode, by its file system and its handle (name_to_handle_at(2)).
//!
//! A path is found for it: the handle is opened on a mount of that file system, and the kernel says by which name. The
//! path goes into the image with the handle, since another mount, or another host, has other handles. Where a file system
//! has no handles to open (overlayfs), the folders of `--irmap-scan-path` and a few that daemons watch are searched; with
//! `--force-irmap` also for a file whose handle can be opened while no path leads to it. A deleted file has no path in the
//! image: at restore it is the ghost with its device and inode, so it must be open in the tree ([`check`]).
//!
//! Man pages: open_by_handle_at(2), proc_pid_mountinfo(5).

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use standstill_images::proto::FhEntry;

use super::{magic_link, regular, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::proc::fdinfo::FileHandle;
use crate::proc::mountinfo::{self, Mount};
use crate::sys::calls;

/// Words of a handle, at least, that CRIU writes and wants.
const HANDLE_WORDS: usize = 16;
/// Folders that are searched for a file whose handle cannot be opened.
const WATCHED_OFTEN: [&str; 6] =
    ["/etc", "/var/spool", "/var/log", "/usr/share/dbus-1/system-services", "/usr/share/polkit-1", "/lib/udev"];
/// Names that are looked at before a search is given up.
const SEARCH: usize = 1_000_000;

/// What is watched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Object<'a> {
    /// By what, for messages.
    pub(super) what: &'static str,
    /// Inode.
    pub(super) ino: u64,
    /// Device of its file system, in the kernel's encoding.
    pub(super) sdev: u32,
    /// Its handle; none where the file system has none.
    pub(super) handle: Option<&'a FileHandle>,
}

/// Deleted files that are watched: device, inode, last name, by what.
#[derive(Debug, Default)]
pub struct Dumped {
    deleted: Vec<(u64, u64, Vec<u8>, &'static str)>,
}

/// The mounts that we see.
pub(super) fn mounts() -> Result<Vec<Mount>> {
    let mut text = Vec::new();
    crate::proc::read_proc("/proc/self/mountinfo".as_ref(), &mut text).call("read(/proc/self/mountinfo)")?;
    Ok(mountinfo::parse(&text)?)
}

/// Handle and path for the image.
pub(super) fn find(object: &Object<'_>, mounts: &[Mount], cx: &mut DumpFiles<'_>) -> Result<FhEntry> {
    let searched = |cx: &DumpFiles<'_>| {
        search(object, cx).ok_or_else(|| {
            let what = format!("{} on inode {} of device {}", object.what, object.ino, device_text(object.sdev));
            Error::refused(
                what,
                "its file system does not open files by handle: name a folder above it by --irmap-scan-path",
            )
        })
    };
    let mut mnt_id = None;
    let found = match of_tree(object, cx)? {
        Some((found, id)) => {
            mnt_id = Some(id);
            found
        }
        None => by_handle(object, mounts)?,
    };
    let path = match found {
        Found::Path(path) => Some(path),
        Found::Unnamed if cx.opts.force_irmap => Some(searched(cx)?),
        Found::Unnamed => None,
        Found::Deleted(dev, ino, name) => {
            cx.fsnotify.deleted.push((dev, ino, name, object.what));
            None
        }
        Found::Nothing => Some(searched(cx)?),
    };
    let is_path = path.is_some();
    let handle = object.handle.cloned().unwrap_or_default();
    let mut words: Vec<u64> = handle.bytes.chunks(8).map(word).collect();
    words.resize(words.len().max(HANDLE_WORDS), 0);
    Ok(FhEntry {
        bytes: u32::try_from(handle.bytes.len()).unwrap_or(0),
        r#type: handle.kind,
        handle: words,
        path: path.map(|path| path.into_os_string().into_vec()),
        mnt_id: mnt_id.filter(|_| is_path),
    })
}

/// When all files of all tasks are known: a deleted file that is watched must be one of them.
pub fn check(cx: &DumpFiles<'_>) -> Result<()> {
    for (dev, ino, name, what) in &cx.fsnotify.deleted {
        if !cx.regular.has_ghost((*dev, *ino)) {
            let what = format!("{what} on {}", String::from_utf8_lossy(name));
            return Err(Error::refused(what, "nobody in the tree has the file open: let the program stop watching it"));
        }
    }
    Ok(())
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}

/// Major and minor of a device as the kernel has it.
pub(super) fn device(sdev: u32) -> (u32, u32) {
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
    /// A file without a name, on this device and with this inode; its last name.
    Deleted(u64, u64, Vec<u8>),
    /// A file that is covered, or that we cannot see, but whose handle opens it wherever its file system is mounted.
    Unnamed,
    /// No file: there is no handle, or it cannot be opened.
    Nothing,
}

/// Finds the path by the handle.
fn by_handle(object: &Object<'_>, mounts: &[Mount]) -> Result<Found> {
    let Some(handle) = object.handle else { return Ok(Found::Nothing) };
    let mut opened = false;
    for mount in mounts.iter().filter(|m| m.device == device(object.sdev)) {
        let Some(file) = open_on(mount, handle) else { continue };
        let link =
            rustix::fs::readlink(magic_link(file.as_fd()), Vec::new()).call("readlink(/proc/self/fd/N)")?.into_bytes();
        let stat = rustix::fs::fstat(&file).call("fstat")?;
        if stat.st_nlink == 0 {
            return Ok(Found::Deleted(stat.st_dev, stat.st_ino, link));
        }
        opened = true;
        let path = PathBuf::from(std::ffi::OsString::from_vec(link));
        if leads_to(&path, object) {
            return Ok(Found::Path(path));
        }
    }
    // Inodes of these have other numbers when they are mounted again.
    let volatile = mounts
        .iter()
        .any(|m| m.device == device(object.sdev) && matches!(m.fs_type.as_slice(), b"tmpfs" | b"devtmpfs"));
    if opened && volatile {
        let what = format!("{} on inode {} of a tmpfs, which no path leads to", object.what, object.ino);
        return Err(Error::refused(what, "unmount what covers it, or let the program stop watching it"));
    }
    Ok(if opened { Found::Unnamed } else { Found::Nothing })
}

/// Finds the path by the handle, on a mount of a tree that has its own; the mount's id.
fn of_tree(object: &Object<'_>, cx: &mut DumpFiles<'_>) -> Result<Option<(Found, u32)>> {
    let (Some(handle), Some(mounts)) = (object.handle, cx.mounts.as_mut()) else { return Ok(None) };
    let mut all: Vec<(bool, usize, u32)> = Vec::new();
    for m in mounts.table.mounts.iter().filter(|m| m.dev == object.sdev) {
        all.push((mounts.table.is_hidden(m), m.root.len(), m.id));
    }
    // one that can be seen, and the widest of those
    all.sort_unstable();
    for (.., id) in all {
        let root = mounts.open(id)?;
        let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let Ok(root) = rustix::fs::openat(root, c".", folder, Mode::empty()) else { continue };
        let Ok(file) = calls::open_by_handle(root.as_fd(), handle.kind, &handle.bytes) else { continue };
        let link =
            rustix::fs::readlink(magic_link(file.as_fd()), Vec::new()).call("readlink(/proc/self/fd/N)")?.into_bytes();
        let stat = rustix::fs::fstat(&file).call("fstat")?;
        if stat.st_nlink == 0 {
            return Ok(Some((Found::Deleted(stat.st_dev, stat.st_ino, link), id)));
        }
        // the root is that of a clone: paths begin there, and what is not below it has none
        let beneath = rustix::fs::ResolveFlags::BENEATH;
        let rest = link.strip_prefix(b"/").filter(|rest| !rest.is_empty()).unwrap_or(b".");
        let again = rustix::fs::openat2(&root, rest, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty(), beneath);
        let Ok(again) = again.and_then(rustix::fs::fstat) else { continue };
        if (again.st_dev, again.st_ino) != (stat.st_dev, stat.st_ino) {
            continue;
        }
        let m = mounts.table.by_id(id).ok_or(Error::Gone)?;
        let mut path = PathBuf::from(OsStr::from_bytes(&m.point));
        if rest != b"." {
            path.push(OsStr::from_bytes(rest));
        }
        return Ok(Some((Found::Path(path), id)));
    }
    Ok(None)
}

/// Opens a handle on a mount; none if that cannot be done.
fn open_on(mount: &Mount, handle: &FileHandle) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let folder = rustix::fs::open(mount.mount_point.as_slice(), flags, Mode::empty()).ok()?;
    calls::open_by_handle(folder.as_fd(), handle.kind, &handle.bytes).ok()
}

/// Is the file with this path the one that is watched?
fn leads_to(path: &Path, object: &Object<'_>) -> bool {
    let is = |s: rustix::fs::Stat| s.st_ino == object.ino && same_device(s.st_dev, object.sdev);
    path.is_absolute() && rustix::fs::lstat(path).is_ok_and(is)
}

pub(super) fn same_device(dev: u64, sdev: u32) -> bool {
    (rustix::fs::major(dev), rustix::fs::minor(dev)) == device(sdev)
}

/// Looks for an inode by its number, in the folders that the caller names and in a few more, breadth first.
fn search(object: &Object<'_>, cx: &DumpFiles<'_>) -> Option<PathBuf> {
    let mut folders: VecDeque<PathBuf> =
        cx.opts.irmap_scan_paths.iter().cloned().chain(WATCHED_OFTEN.map(PathBuf::from)).collect();
    let mut left = SEARCH;
    if let Some(found) = folders.iter().find(|path| leads_to(path, object)) {
        return Some(found.clone());
    }
    while let Some(folder) = folders.pop_front() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            left = left.checked_sub(1)?;
            let path = entry.path();
            if leads_to(&path, object) {
                return Some(path);
            }
            let below = rustix::fs::lstat(&path).is_ok_and(|s| {
                FileType::from_raw_mode(s.st_mode) == FileType::Directory && same_device(s.st_dev, object.sdev)
            });
            if below {
                folders.push_back(path);
            }
        }
    }
    None
}

/// The file that was watched: by path, or the ghost that it is, or by handle.
pub(super) fn target(f: &FhEntry, ino: u64, sdev: u32, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if let (Some(path), Some(made)) = (&f.path, &cx.mounts) {
        let (from, path) = match f.mnt_id.filter(|id| made.table.by_id(*id).is_some()) {
            Some(id) => made.place(id, path)?,
            None => (made.root()?, path.as_slice()),
        };
        let path = if path.is_empty() { b"/" } else { path };
        let found = super::paths::open_below(from, path, (libc::O_PATH | libc::O_NOFOLLOW) as u32);
        return found.call("open").at(Place::Path(OsStr::from_bytes(path).into()));
    }
    if let Some(path) = &f.path {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        return rustix::fs::open(path.as_slice(), flags, Mode::empty())
            .call("open")
            .at(Place::Path(OsStr::from_bytes(path).into()));
    }
    if let Some(ghost) = regular::ghost_of(sdev, ino, cx)? {
        return Ok(ghost);
    }
    let mut bytes: Vec<u8> = f.handle.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(f.bytes as usize);
    let handle = FileHandle { kind: f.r#type, bytes };
    let mounts = mounts()?;
    let found = mounts.iter().filter(|m| m.device == device(sdev)).find_map(|m| open_on(m, &handle));
    found.ok_or_else(|| Error::Changed {
        what: format!("inode {} of device {}, which was watched, is not there now", ino, device_text(sdev)),
    })
}
