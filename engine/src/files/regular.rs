//! Files by path: regular files, folders, devices, and whatever is open by O_PATH.
//!
//! The kernel exposes the path in the link of `/proc/PID/fd/N` and `/proc/PID/map_files/A-B`, as it would be found now from
//! our root, with " (deleted)" behind it when that name is gone. Only a look at what the path leads to tells whether it
//! still is this file ([`named`]):
//! - it is: the path goes into the image;
//! - the file has no name left: its content goes along (`ghost.rs`);
//! - it has other names, or NFS renamed it on deletion: with `--link-remap` it gets a name `link_remap.N` near the old one;
//! - it is of a dead task's `/proc/PID`: the restore makes a task with that number for the time of opening.
//!
//! Images: a [`RegFileEntry`] in `files.img`; `remap-fpath.img` says which entries are not simply where their path leads.
//! Mapped files, programs and working folders have entries as well, without flags and offset, shared by all that use
//! them.
//!
//! Ordering at restore: files below `/proc/PID` after all tasks were made, and while helpers for dead ones live
//! ([`opens_late`], [`Restored::dead_pids`]); the rest at any time. Names of `--link-remap` go when all is done ([`done`]).
//!
//! Not kept: O_NOFOLLOW of a deleted file (the flag is not seen by the file), the content of a file that has a name: what
//! differs in size, mode or build-id is an error instead (`validate.rs`).
//!
//! Man pages: open(2), openat2(2), proc_pid_fd(5), proc_pid_map_files(5).

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, CWD};
use rustix::io::Errno;
use standstill_gpu::CharMajors;
use standstill_images::proto::{FdTypes, FileEntry, FownEntry, RegFileEntry, RemapFilePathEntry, RemapType};
use standstill_images::ImageKind;

use super::paths::{nearest, open_below, place, silly, task_of};
use super::{devices, ghost, magic_link, no_owner, validate, Descriptor, DumpFiles};
use crate::error::{At, Call, Error, Result};
use crate::guard::{Act, List};
use crate::namespaces::user;
use crate::options::{FileValidation, Persona};
use crate::sys::mount;

mod restore;

pub use restore::{
    done, exe, folder, is_of_task, is_there, needs_descriptor, open, opened_for_mapping, opens_late, read, Restored,
};
pub(super) use restore::{finish_opening, ghost_of, open_as};

const DELETED: &[u8] = b" (deleted)";
const PROC: u64 = 0x9fa0;
const DEVPTS: u64 = 0x1cd1;
const NFS: u64 = 0x6969;
const OVERLAY: u64 = 0x794c_7630;
const IMAGE: &str = "remap-fpath.img";

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    root: Option<Arc<OwnedFd>>,
    gpus: Option<CharMajors>,
    shared: HashMap<(u64, u64, u64, Vec<u8>), u32>,
    ghosts: HashMap<(u64, u64), u32>,
    linked: HashMap<(u64, u64), u32>,
    dead: BTreeSet<i32>,
    remaps: Vec<RemapFilePathEntry>,
    links: Vec<(OwnedFd, Vec<u8>)>,
}

impl Dumped {
    /// Is this deleted file in the images?
    pub(super) fn has_ghost(&self, inode: (u64, u64)) -> bool {
        self.ghosts.contains_key(&inode)
    }

    /// Paths of the tasks' files are below this folder (by default our root, or that of the first task if it is in
    /// another mount namespace).
    pub fn set_root(&mut self, root: OwnedFd) {
        self.root = Some(Arc::new(root));
    }

    fn remove_links(&mut self) -> Result<()> {
        let mut result = Ok(());
        for (folder, name) in self.links.drain(..) {
            result = result.and(rustix::fs::unlinkat(folder, &name, AtFlags::empty()).call("unlink").at(place(&name)));
        }
        result
    }
}

impl Drop for Dumped {
    fn drop(&mut self) {
        if let Err(error) = self.remove_links() {
            tracing::warn!(%error, "a temporary name could not be removed");
        }
    }
}

/// The tasks go on, so names that `--link-remap` made are of no use. They also go if a dump ends without
/// [`tasks_end`].
pub fn tasks_go_on(cx: &mut DumpFiles<'_>) -> Result<()> {
    cx.regular.remove_links()
}

/// The dump is good and the tasks end: names that `--link-remap` made stay.
pub fn tasks_end(cx: &mut DumpFiles<'_>) {
    cx.regular.links.clear();
}

/// An open or mapped file, as far as its entry needs.
struct Seen<'a> {
    file: BorrowedFd<'a>,
    link: &'a [u8],
    stat: &'a Stat,
    flags: u32,
    pos: u64,
    fown: FownEntry,
}

impl Seen<'_> {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
    fn inode(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }
}

/// Dumps an open file.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    devices::check(&d.link, &d.stat, d.flags, &mut cx.regular.gpus)?;
    let reg = entry(d, id, cx)?;
    Ok(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..Default::default() })
}

/// The entry of an open file by path, for kinds that have one beside their own.
pub fn entry(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<RegFileEntry> {
    // an offset of -1 is "none" in the image, and in fdinfo
    let pos = d.info.pos as u64;
    let seen = Seen { file: d.copy.as_fd(), link: &d.link, stat: &d.stat, flags: d.flags, pos, fown: d.fown };
    describe(&seen, id, cx).at(place(&d.link))
}

/// The id of a file that a task has mapped, runs, or has as its root or working folder. `file` is open in any way, `link`
/// is what its link in `/proc/PID` reads.
pub fn mapped(cx: &mut DumpFiles<'_>, file: impl AsFd, link: &[u8], stat: &Stat) -> Result<u32> {
    let mount = if cx.mounts.is_some() { mount::id_of(file.as_fd())? } else { 0 };
    let key = (mount, stat.st_dev, stat.st_ino, link.to_vec());
    if let Some(&id) = cx.regular.shared.get(&key) {
        return Ok(id);
    }
    devices::check(link, stat, 0, &mut cx.regular.gpus)?;
    if cx.locks.is_leased((stat.st_dev, stat.st_ino)) {
        // the mapping counts as another open file, and the lease could not be taken again
        let what = format!("a write lease on {}, which is mapped too,", String::from_utf8_lossy(link));
        return Err(Error::refused(what, "let the program unmap the file, or give the lease up, before the dump"));
    }
    let id = cx.new_id();
    let seen = Seen { file: file.as_fd(), link, stat, flags: 0, pos: 0, fown: no_owner() };
    let reg = describe(&seen, id, cx).at(place(link))?;
    cx.add(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..Default::default() });
    cx.regular.shared.insert(key, id);
    Ok(id)
}

fn describe(seen: &Seen<'_>, id: u32, cx: &mut DumpFiles<'_>) -> Result<RegFileEntry> {
    let external = external(seen, cx)?;
    let mount = if external.is_some() { None } else { mount_of(seen, cx)? };
    let ext = external.is_some().then_some(true);
    let name = match external {
        Some(name) => name,
        None => named(seen, mount, id, cx)?,
    };
    // a log only grows: its size says nothing
    let log = seen.flags & libc::O_ACCMODE as u32 == libc::O_WRONLY as u32 && seen.flags & libc::O_APPEND as u32 != 0;
    let compared = seen.kind() == FileType::RegularFile && !log;
    let build_id = match cx.opts.file_validation {
        FileValidation::BuildId if compared && !cx.locks.is_leased(seen.inode()) => {
            validate::build_id_of(seen.file, seen.stat)
        }
        FileValidation::BuildId | FileValidation::FileSize => Vec::new(),
    };
    Ok(RegFileEntry {
        id,
        flags: seen.flags,
        pos: seen.pos,
        fown: seen.fown,
        name,
        size: compared.then(|| seen.stat.st_size.unsigned_abs()),
        mode: Some(seen.stat.st_mode),
        build_id,
        ext,
        mnt_id: mount.map(|id| i32::try_from(id).unwrap_or(-1)),
        ..Default::default()
    })
}

/// The id of the mount that a file is on, if the tree has mounts of its own.
fn mount_of(seen: &Seen<'_>, cx: &mut DumpFiles<'_>) -> Result<Option<u32>> {
    let Some(mounts) = &cx.mounts else { return Ok(None) };
    let of = |file: BorrowedFd<'_>| Ok::<_, Error>(u32::try_from(mount::id_of(file)?).unwrap_or(0));
    let id = of(seen.file)?;
    if mounts.table.by_id(id).is_some() {
        return Ok(Some(id));
    }
    if cx.opts.personality == Persona::Standstill && seen.link.starts_with(b"/") {
        // one that was opened before its task got mounts of its own: it is found in there as well, or not at all
        let root = root(cx)?;
        let nofollow = if seen.kind() == FileType::Symlink { libc::O_NOFOLLOW } else { 0 };
        if let Ok(found) = open_below(root.as_fd(), seen.link, (libc::O_PATH | nofollow) as u32) {
            let stat = rustix::fs::fstat(&found).call("fstat")?;
            let id = of(found.as_fd())?;
            let known = cx.mounts.as_ref().is_some_and(|mounts| mounts.table.by_id(id).is_some());
            if (stat.st_dev, stat.st_ino) == seen.inode() && known {
                return Ok(Some(id));
            }
        }
    }
    Err(Error::refused(
        format!(
            "{}, which is on mount {id} outside of the tree's mount namespace,",
            String::from_utf8_lossy(seen.link)
        ),
        "close it before the dump, or say that it is external (--external file[MOUNT:INODE])",
    ))
}

/// From where a path is looked for: from the root, or, if no path leads to its mount, from that.
fn spot(mount: Option<u32>, path: &[u8], cx: &mut DumpFiles<'_>) -> Result<(Arc<OwnedFd>, Vec<u8>)> {
    if let Some((id, mounts)) = mount.zip(cx.mounts.as_mut()) {
        if let Some(m) = mounts.table.by_id(id).filter(|m| mounts.table.is_hidden(m)) {
            if cx.opts.personality == Persona::Criu {
                return Err(Error::refused(
                    format!("{}, open on {}, which another one hides,", String::from_utf8_lossy(path), m.shown()),
                    "Open files on overmounted mounts are not supported yet: close it before the dump",
                ));
            }
            let rest = crate::mounts::table::below(path, &m.point).ok_or(Error::Gone)?;
            let path = [b"/", rest].concat();
            let root = mounts.open(id)?.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?;
            return Ok((Arc::new(root), path));
        }
    }
    Ok((root_for(mount, cx)?, path.to_vec()))
}

/// The root of the namespace that a mount is in.
fn root_for(mount: Option<u32>, cx: &mut DumpFiles<'_>) -> Result<Arc<OwnedFd>> {
    let nested = mount.zip(cx.mounts.as_ref()).and_then(|(id, mounts)| mounts.root(mounts.table.by_id(id)?.ns));
    match nested {
        Some(root) => Ok(Arc::new(root.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?)),
        None => root(cx),
    }
}

/// `file[MOUNT:INODE]`, if the caller said that this file is not ours to carry.
fn external(seen: &Seen<'_>, cx: &DumpFiles<'_>) -> Result<Option<Vec<u8>>> {
    if cx.opts.external_of_kind("file").next().is_none() {
        return Ok(None);
    }
    let wanted = rustix::fs::StatxFlags::MNT_ID;
    let mount = rustix::fs::statx(seen.file, "", AtFlags::EMPTY_PATH, wanted).call("statx")?.stx_mnt_id;
    let key = format!("file[{mount:x}:{:x}]", seen.stat.st_ino);
    Ok(cx.opts.external_has(&key).then(|| key.into_bytes()))
}

/// The path that the file will be found by, after what that needs was noted for the image.
fn named(seen: &Seen<'_>, mount: Option<u32>, id: u32, cx: &mut DumpFiles<'_>) -> Result<Vec<u8>> {
    let path = seen.link;
    let bare = path.strip_suffix(DELETED);
    let shown = || String::from_utf8_lossy(path).into_owned();
    if !path.starts_with(b"/") {
        return Err(Error::refused(
            format!("{}, out of reach of the root folder,", shown()),
            "close it before the dump",
        ));
    }
    // the kernel's own type is signed on some machines
    let fs = rustix::fs::fstatfs(seen.file).call("fstatfs")?.f_type as u64;
    match fs {
        PROC => return procfs(seen, id, cx),
        // gone with its terminal, but no content to carry: the terminal knows
        DEVPTS => return Ok(bare.unwrap_or(path).to_vec()),
        _ => {}
    }
    if seen.stat.st_nlink == 0 {
        let bare = bare.unwrap_or(path);
        return ghostly(seen, id, bare, cx).map(|()| bare.to_vec());
    }
    if fs == NFS && silly(path) {
        return linked(seen, mount, id, path, fs, cx).map(|()| path.to_vec());
    }
    let (from, rest) = spot(mount, path, cx)?;
    let found = look(from.as_fd(), &rest, seen)?;
    if let Found::Same = found {
        return Ok(path.to_vec());
    }
    if let Some(bare) = bare {
        // deleted, and linked to the same place again
        let (from, rest) = spot(mount, bare, cx)?;
        if let Found::Same = look(from.as_fd(), &rest, seen)? {
            return Ok(bare.to_vec());
        }
        // some file systems leave the count of a removed folder at one
        if seen.kind() == FileType::Directory {
            return ghostly(seen, id, bare, cx).map(|()| bare.to_vec());
        }
        return linked(seen, mount, id, bare, fs, cx).map(|()| bare.to_vec());
    }
    match found {
        Found::Other(other)
            if cx.opts.evasive_devices && is_device(seen.kind()) && other.st_rdev == seen.stat.st_rdev =>
        {
            Ok(path.to_vec())
        }
        Found::Other(other) => {
            let what = format!(
                "{}, as something else is there now (device {:x}, inode {}; the file is on {:x}, {}),",
                shown(),
                other.st_dev,
                other.st_ino,
                seen.stat.st_dev,
                seen.stat.st_ino
            );
            Err(Error::refused(what, "close it before the dump, or unmount or move away what hides it"))
        }
        Found::Nothing if seen.kind() == FileType::Directory => Err(Error::refused(
            format!("{}, which its path does not lead to,", shown()),
            "leave the folder before the dump",
        )),
        Found::Nothing | Found::Same => linked(seen, mount, id, path, fs, cx).map(|()| path.to_vec()),
    }
}

/// What a path leads to.
enum Found {
    Same,
    Other(Stat),
    Nothing,
}

fn look(root: BorrowedFd<'_>, path: &[u8], seen: &Seen<'_>) -> Result<Found> {
    let follow = if seen.kind() == FileType::Symlink { libc::O_NOFOLLOW } else { 0 };
    let file = match open_below(root, path, (libc::O_PATH | follow) as u32) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Found::Nothing),
        Err(error) => return Err(error).call("openat2(O_PATH)"),
    };
    let stat = rustix::fs::fstat(&file).call("fstat")?;
    Ok(if (stat.st_dev, stat.st_ino) == seen.inode() { Found::Same } else { Found::Other(stat) })
}

/// Where the tasks' paths begin.
fn root(cx: &mut DumpFiles<'_>) -> Result<Arc<OwnedFd>> {
    if let Some(root) = &cx.regular.root {
        return Ok(root.clone());
    }
    let theirs = cx.tree.first().filter(|pid| mounts_of(&pid.to_string()) != mounts_of("self"));
    let path = theirs.map_or_else(|| "/".to_owned(), |pid| format!("/proc/{pid}/root"));
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = Arc::new(rustix::fs::open(&path, folder, Mode::empty()).call("open").at(place(path.as_bytes()))?);
    cx.regular.root = Some(root.clone());
    Ok(root)
}

fn mounts_of(pid: &str) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()
}

/// A file below /proc: of a task that is gone, or one that will be there.
fn procfs(seen: &Seen<'_>, id: u32, cx: &mut DumpFiles<'_>) -> Result<Vec<u8>> {
    let bare = seen.link.strip_suffix(DELETED);
    let path = bare.unwrap_or(seen.link);
    if let Some(pid) = task_of(path) {
        let dead = bare.is_some() || {
            let folder = format!("/proc/{pid}");
            open_below(root(cx)?.as_fd(), folder.as_bytes(), libc::O_PATH as u32).is_err()
        };
        if dead && cx.regular.dead.insert(pid) {
            let remap = RemapFilePathEntry {
                orig_id: id,
                remap_id: pid.unsigned_abs(),
                remap_type: Some(RemapType::Procfs as i32),
            };
            cx.regular.remaps.push(remap);
        }
    }
    Ok(path.to_vec())
}

fn is_device(kind: FileType) -> bool {
    matches!(kind, FileType::CharacterDevice | FileType::BlockDevice)
}

/// The content goes along.
fn ghostly(seen: &Seen<'_>, id: u32, bare: &[u8], cx: &mut DumpFiles<'_>) -> Result<()> {
    let ghost = match cx.regular.ghosts.get(&seen.inode()) {
        Some(&ghost) => ghost,
        None => {
            let size = u64::try_from(seen.stat.st_blocks).unwrap_or(0).saturating_mul(512);
            if size > cx.opts.ghost_limit {
                let path = String::from_utf8_lossy(bare);
                return Err(Error::Usage {
                    what: format!("Can't dump ghost file {path} of {size} size, increase limit (--ghost-limit)"),
                });
            }
            if cx.locks.is_leased(seen.inode()) {
                let what = format!("a lease on the deleted file {}", String::from_utf8_lossy(bare));
                return Err(Error::refused(
                    what,
                    "let the program give it up before the dump (F_SETLEASE with F_UNLCK)",
                ));
            }
            let ghost = u32::try_from(cx.regular.ghosts.len() + 1).unwrap_or(u32::MAX);
            let mut stat = *seen.stat;
            (stat.st_uid, stat.st_gid) = (cx.users.user(stat.st_uid), cx.users.group(stat.st_gid));
            ghost::write(cx.images, ghost, seen.file, &stat)?;
            cx.regular.ghosts.insert(seen.inode(), ghost);
            ghost
        }
    };
    let remap = RemapFilePathEntry { orig_id: id, remap_id: ghost, remap_type: Some(RemapType::Ghost as i32) };
    cx.regular.remaps.push(remap);
    Ok(())
}

/// The file gets a name near its old one.
fn linked(seen: &Seen<'_>, mount: Option<u32>, id: u32, bare: &[u8], fs: u64, cx: &mut DumpFiles<'_>) -> Result<()> {
    let link = match cx.regular.linked.get(&seen.inode()) {
        Some(&link) => link,
        None => {
            if !cx.opts.link_remap {
                let path = String::from_utf8_lossy(bare);
                return Err(Error::Usage {
                    what: format!("Can't create link remap for {path}. Use --link-remap option."),
                });
            }
            let link = cx.new_id();
            let (folder, mut path) = nearest(root_for(mount, cx)?.as_fd(), bare)?;
            let name = format!("link_remap.{link}").into_bytes();
            if let Some(guard) = cx.guard {
                let held = guard.hold(folder.as_fd())?;
                guard.register(List::Undo, &Act::RemoveIn(held, &name, false))?;
            }
            let give = || rustix::fs::linkat(CWD, magic_link(seen.file), &folder, &name, AtFlags::SYMLINK_FOLLOW);
            let given = match give() {
                Err(Errno::OVERFLOW) if cx.users.are_own() => user::as_its_root(&cx.users, || Ok(give()))?,
                other => other,
            };
            match given {
                Ok(()) => {}
                // from a lower layer: there the count of names is not that of what can be linked
                Err(Errno::NOENT) if fs == OVERLAY => return ghostly(seen, id, bare, cx),
                Err(error) => return Err(error).call("linkat").at(place(&name)),
            }
            if path != b"/" {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            cx.regular.links.push((folder, name));
            let mnt_id = mount.map(|id| i32::try_from(id).unwrap_or(-1));
            let reg = RegFileEntry { id: link, fown: no_owner(), name: path, mnt_id, ..Default::default() };
            cx.add(FileEntry { r#type: FdTypes::Reg as i32, id: link, reg: Some(reg), ..Default::default() });
            cx.regular.linked.insert(seen.inode(), link);
            link
        }
    };
    let remap = RemapFilePathEntry { orig_id: id, remap_id: link, remap_type: Some(RemapType::Linked as i32) };
    cx.regular.remaps.push(remap);
    Ok(())
}

/// Writes `remap-fpath.img`.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    if !cx.regular.remaps.is_empty() {
        cx.images.write_entries(ImageKind::RemapFpath, (), cx.regular.remaps.drain(..))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "regular_tests.rs"]
mod tests;
