//! fanotify(7): groups, and their marks on files, mounts and file systems.
//!
//! `fdinfo` shows the flags of a group, those of the files in its events, and each mark: what it is on, which events, and which
//! are ignored. A [`FanotifyFileEntry`] of `files.img` is one group. An inode is found as for inotify ([`super::fsnotify`]), a
//! mount by its mount point, a file system by any mount of it. CRIU has no marks on file systems: these are in a list of
//! our own, which it skips.
//!
//! Ordering: groups are made when files are opened, and marked when all files of the restore are in place ([`mark`]), so that
//! they hear nothing of it.
//!
//! Not kept: events that nobody has read (named in the log, as with CRIU), the order of marks of different kinds, and the account: marks count
//! for the user who restores. Refused: groups that decide about accesses (FAN_OPEN_PERM and the like), since whoever touches
//! their files waits for them, Standstill too; marks on mount namespaces.
//!
//! Man pages: fanotify(7), fanotify_init(2), fanotify_mark(2).

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use standstill_images::proto::{
    FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry, FdTypes, FileEntry, MarkType,
};

use super::fsnotify::{self, Object};
use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::proc::fdinfo::{Fanotify, FanotifyMark, FanotifyTarget, FdDetail};
use crate::proc::mountinfo::Mount;
use crate::sys::calls;

/// FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS.
const DECIDES: u64 = 0x1_0000 | 0x2_0000 | 0x4_0000 | 0x10_0000;
const ADD: u32 = 1;
const MOUNT: u32 = 0x10;
const FILESYSTEM: u32 = 0x100;
const IGNORED_MASK: u32 = 0x20;
const SURVIVES_MODIFY: u32 = 0x40;
const EVICTABLE: u32 = 0x200;
const IGNORE: u32 = 0x400;

/// A mark to be made.
#[derive(Debug)]
struct Mark {
    group: u32,
    flags: u32,
    mask: u64,
    target: OwnedFd,
}

/// Marks of a restore.
#[derive(Debug, Default)]
pub struct Restored {
    marks: Vec<Mark>,
}

fn group(d: &Descriptor) -> Fanotify {
    match &d.info.detail {
        FdDetail::Fanotify(group) => group.clone(),
        _ => Fanotify::default(),
    }
}

/// Refuses a group that decides about accesses; before any file is touched.
pub fn refuse(d: &Descriptor) -> Result<()> {
    if group(d).marks.iter().any(|mark| mark.mask & DECIDES != 0) {
        return Err(d.refused("a fanotify group that decides about accesses", "let the program remove these marks"));
    }
    Ok(())
}

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let group = group(d);
    let waiting = rustix::io::ioctl_fionread(&d.copy).call("ioctl(FIONREAD)")?;
    if waiting > 0 {
        tracing::warn!(pid = d.pid, fd = d.fd, bytes = waiting, "unread fanotify events will be dropped");
    }
    let mounts = if group.marks.is_empty() { Vec::new() } else { fsnotify::mounts()? };
    let mut ffy = FanotifyFileEntry {
        id,
        flags: d.flags,
        fown: d.fown,
        faflags: group.flags,
        evflags: group.event_flags,
        ..Default::default()
    };
    for mark in &group.marks {
        let entry = dump_mark(d, id, mark, &mounts, cx)?;
        match mark.target {
            FanotifyTarget::Filesystem(_) => ffy.standstill_filesystem.push(entry),
            _ => ffy.mark.push(entry),
        }
    }
    Ok(FileEntry { r#type: FdTypes::Fanotify as i32, id, ffy: Some(ffy), ..Default::default() })
}

fn dump_mark(
    d: &Descriptor,
    id: u32,
    mark: &FanotifyMark,
    mounts: &[Mount],
    cx: &mut DumpFiles<'_>,
) -> Result<FanotifyMarkEntry> {
    let narrow = |mask: u64| {
        u32::try_from(mask).map_err(|_| d.refused("a fanotify mark with an unknown event", "let the program remove it"))
    };
    let mut entry = FanotifyMarkEntry {
        id,
        r#type: MarkType::Mount as i32,
        mflags: mark.mflags,
        mask: narrow(mark.mask)?,
        ignored_mask: narrow(mark.ignored_mask)?,
        ..Default::default()
    };
    let unseen =
        |what: String| Error::refused(what, "let the program remove it, or run Standstill where it is mounted");
    match &mark.target {
        FanotifyTarget::Inode { ino, sdev, handle } => {
            let object = Object { what: "a fanotify mark", ino: *ino, sdev: *sdev, handle: handle.as_ref() };
            let f_handle = fsnotify::find(&object, mounts, cx).at(Place::Item("fanotify mark on inode", *ino))?;
            entry.r#type = MarkType::Inode as i32;
            entry.s_dev = *sdev;
            entry.ie = Some(FanotifyInodeMarkEntry { i_ino: *ino, f_handle });
        }
        FanotifyTarget::Mount(mnt_id) => {
            let of_tree = cx.mounts.as_ref().and_then(|all| {
                let m = all.table.by_id(*mnt_id)?;
                (!all.table.is_hidden(m)).then_some(m)
            });
            if let Some(m) = of_tree {
                entry.s_dev = m.dev;
                entry.me = Some(FanotifyMountMarkEntry { mnt_id: *mnt_id, path: Some(m.point.clone()) });
                return Ok(entry);
            }
            let mount = mounts.iter().find(|m| i64::from(m.id) == i64::from(*mnt_id) && is_reached(m));
            let mount =
                mount.ok_or_else(|| unseen(format!("a fanotify mark on mount {mnt_id}, which no path leads to,")))?;
            let path = Some(path_of(mount));
            entry.s_dev = device(mount);
            entry.me = Some(FanotifyMountMarkEntry { mnt_id: *mnt_id, path });
        }
        FanotifyTarget::Filesystem(sdev) => {
            let of = |m: &&Mount| m.device == fsnotify::device(*sdev) && is_reached(m);
            let mount = mounts.iter().find(of);
            let mount =
                mount.ok_or_else(|| unseen("a fanotify mark on a file system that no path leads to,".into()))?;
            entry.s_dev = *sdev;
            entry.me = Some(FanotifyMountMarkEntry { mnt_id: mount.id.unsigned_abs(), path: Some(path_of(mount)) });
        }
        FanotifyTarget::MountNamespace(_) => {
            return Err(d.refused("a fanotify mark on a mount namespace", "let the program remove it"))
        }
    }
    Ok(entry)
}

fn path_of(mount: &Mount) -> Vec<u8> {
    mount.mount_point.clone()
}

/// Device of a mount, in the kernel's encoding.
fn device(mount: &Mount) -> u32 {
    let (major, minor) = mount.device;
    major << 20 | minor
}

/// Does the path of a mount lead to it, or to another one that lies over it?
fn is_reached(mount: &Mount) -> bool {
    let found = rustix::fs::statx(rustix::fs::CWD, mount.mount_point.as_slice(), AtFlags::empty(), StatxFlags::MNT_ID);
    found.is_ok_and(|s| i64::try_from(s.stx_mnt_id) == Ok(i64::from(mount.id)))
}

/// Makes a group, and finds what its marks are on.
pub fn open(e: &FanotifyFileEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    // the kernel shows FAN_CLOEXEC and FAN_NONBLOCK as they were then, whatever the descriptor has become
    let fd = calls::fanotify_init(e.faflags, e.evflags)?;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).call("fcntl(F_SETFD)")?;
    set_status_flags(fd.as_fd(), e.flags)?;
    // the kernel lists the newest first
    let marks = e.mark.iter().rev().map(|mark| (mark, false));
    for (mark, filesystem) in marks.chain(e.standstill_filesystem.iter().rev().map(|mark| (mark, true))) {
        let target = target(mark, cx)?;
        let on = match (filesystem, mark.r#type()) {
            (true, _) => FILESYSTEM,
            (false, MarkType::Mount) => MOUNT,
            (false, MarkType::Inode) => 0,
        };
        let kept = mark.mflags & EVICTABLE;
        let ignore = if mark.mflags & IGNORE != 0 { IGNORE } else { IGNORED_MASK } | mark.mflags & SURVIVES_MODIFY;
        for (flags, mask) in [(ADD | on | kept, mark.mask), (ADD | on | kept | ignore, mark.ignored_mask)] {
            if mask != 0 {
                let target = target.try_clone().call("dup")?;
                cx.fanotify.marks.push(Mark { group: e.id, flags, mask: mask.into(), target });
            }
        }
    }
    Ok(fd)
}

fn target(mark: &FanotifyMarkEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if let Some(inode) = &mark.ie {
        let found = fsnotify::target(&inode.f_handle, inode.i_ino, mark.s_dev, cx);
        return found.at(Place::Item("fanotify mark on inode", inode.i_ino));
    }
    let path = mark.me.as_ref().and_then(|mount| mount.path.as_ref());
    let path = path.ok_or_else(|| Error::lie("files.img", "a fanotify mark on nothing"))?;
    if let Some(made) = &cx.mounts {
        let id = mark.me.as_ref().map_or(0, |mount| mount.mnt_id);
        let root = match made.table.by_id(id) {
            Some(m) => made.root_of(m.ns)?,
            None => made.root()?,
        };
        let found = super::paths::open_below(root, path, libc::O_PATH as u32);
        return found.call("open").at(Place::Path(std::ffi::OsString::from_vec(path.clone()).into()));
    }
    let file = rustix::fs::open(path.as_slice(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    file.call("open").at(Place::Path(std::ffi::OsString::from_vec(path.clone()).into()))
}

/// Makes the marks; to be called when nothing is opened or written any more, and before any task runs.
pub fn mark(cx: &mut RestoreFiles<'_>) -> Result<()> {
    for mark in std::mem::take(&mut cx.fanotify.marks) {
        let group = cx.opened.get(&mark.group).ok_or(Error::Gone)?;
        let path = super::magic_link(mark.target.as_fd());
        let done = calls::fanotify_mark(group.as_fd(), mark.flags, mark.mask, path.as_os_str().as_bytes());
        done.at(Place::File(mark.group))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{descriptor, dump, open};
    use super::*;
    use crate::options::Options;
    use std::os::fd::BorrowedFd;

    fn marks(fd: BorrowedFd<'_>) -> Fanotify {
        group(&descriptor(fd))
    }

    #[test]
    fn marks_come_back_when_all_else_is_there() {
        let folder = std::env::temp_dir().join(format!("standstill-fanotify-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let fd = match calls::fanotify_init(2, libc::O_RDONLY as u32) {
            Ok(fd) => fd,
            Err(e) => return eprintln!("skipped: {e}"),
        };
        let add = |flags, mask, path: &std::path::Path| {
            calls::fanotify_mark(fd.as_fd(), ADD | flags, mask, path.as_os_str().as_bytes()).unwrap();
        };
        let (modify, open_close, on_dir) = (0x2, 0x38, 0x4000_0000);
        add(0, modify | on_dir, &folder);
        add(IGNORED_MASK | SURVIVES_MODIFY, 0x20, &folder);
        add(MOUNT, open_close, std::path::Path::new("/proc"));
        add(FILESYSTEM, modify, std::path::Path::new("/proc"));
        let before = marks(fd.as_fd());
        assert_eq!(before.marks.len(), 3);
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&fd]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let again = open(&mut files, ids[0]);
        assert!(marks(again.as_fd()).marks.is_empty());
        mark(&mut files).unwrap();
        let mut now = marks(again.as_fd());
        let order = |mark: &FanotifyMark| format!("{mark:?}");
        now.marks.sort_by_key(order);
        let mut before = before;
        before.marks.sort_by_key(order);
        assert_eq!(now.marks, before.marks);
        assert_eq!(now.event_flags, before.event_flags);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
