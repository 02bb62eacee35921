//! Opening files by path again: where an entry leads, what stands in for it, and what is checked of it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use standstill_images::proto::{RegFileEntry, RemapFilePathEntry, RemapType};
use standstill_images::ImageKind;

use super::IMAGE;
use crate::error::{At, Call, Error, Place, Result};
use crate::files::paths::{descriptor_of, open_below, place, reopen, split, task_of, NAMELESS};
use crate::files::{ghost, set_status_flags, validate, RestoreFiles};
use crate::sys::calls;

/// Where an entry leads that is not simply where its path does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remap {
    Ghost(u32),
    Linked(u32),
}

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    /// Tasks that must be there, with nothing but their number, while files that [`opens_late`] names are opened.
    pub dead_pids: BTreeSet<i32>,
    root: Option<Arc<OwnedFd>>,
    remaps: HashMap<u32, Remap>,
    handles: HashMap<u32, OwnedFd>,
    checked: HashSet<u32>,
}

impl Restored {
    /// Paths are looked for below this folder (by default `--root`, or our root).
    pub fn set_root(&mut self, root: OwnedFd) {
        self.root = Some(Arc::new(root));
    }
}

/// Reads and checks `remap-fpath.img` and the names of all files.
pub fn read(cx: &mut RestoreFiles<'_>) -> Result<()> {
    for reg in cx.entries.values().filter_map(|entry| entry.reg.as_ref()) {
        let good = reg.ext == Some(true) || reg.name.starts_with(b"/");
        if !good || reg.name.contains(&0) {
            return Err(Error::lie("files.img", format!("file {:#x} has no path", reg.id)));
        }
    }
    for remap in cx.images.read_entries_if_there::<RemapFilePathEntry>(ImageKind::RemapFpath, ())? {
        let has = |id: u32| cx.entries.get(&id).is_some_and(|entry| entry.reg.is_some());
        let (orig, to) = (remap.orig_id, remap.remap_id);
        if !has(orig) {
            return Err(Error::lie(IMAGE, format!("Remap for non existing file {orig:#x}")));
        }
        const OLD_GHOST: u32 = 1 << 31;
        let (kind, to) = match remap.remap_type {
            Some(_) => (remap.remap_type(), to),
            None if to & OLD_GHOST != 0 => (RemapType::Ghost, to & !OLD_GHOST),
            None => (RemapType::Linked, to),
        };
        let remap = match kind {
            RemapType::Ghost => Remap::Ghost(to),
            RemapType::Linked if has(to) && to != orig => Remap::Linked(to),
            RemapType::Linked => return Err(Error::lie(IMAGE, format!("Can't find target file {to:x}"))),
            RemapType::Procfs => {
                let pid = i32::try_from(to).ok().filter(|&pid| pid > 0);
                cx.regular.dead_pids.insert(pid.ok_or_else(|| Error::lie(IMAGE, format!("task {to} cannot be")))?);
                continue;
            }
        };
        if cx.regular.remaps.insert(orig, remap).is_some_and(|before| before != remap) {
            return Err(Error::lie(IMAGE, format!("file {orig:#x} leads to two places")));
        }
    }
    Ok(())
}

/// True for files below a task's folder in /proc. They can be opened only when all tasks are there, and helpers for
/// [`Restored::dead_pids`].
pub fn opens_late(cx: &RestoreFiles<'_>, id: u32) -> bool {
    let reg = cx.entries.get(&id).and_then(|entry| entry.reg.as_ref());
    reg.is_some_and(is_of_task)
}

/// Is it a file below a task's folder in /proc?
pub fn is_of_task(e: &RegFileEntry) -> bool {
    e.ext != Some(true) && task_of(&e.name).is_some()
}

/// The descriptor that must be there, in which task, before a file can be opened.
pub fn needs_descriptor(cx: &RestoreFiles<'_>, id: u32) -> Option<(i32, i32)> {
    descriptor_of(&cx.entries.get(&id)?.reg.as_ref()?.name)
}

/// The deleted file that had this inode, if the tree has it open.
pub(in crate::files) fn ghost_of(sdev: u32, ino: u64, cx: &mut RestoreFiles<'_>) -> Result<Option<OwnedFd>> {
    let ghosts: Vec<(u32, u32)> = cx
        .regular
        .remaps
        .iter()
        .filter_map(|(&file, &remap)| match remap {
            Remap::Ghost(id) => Some((file, id)),
            Remap::Linked(_) => None,
        })
        .collect();
    for (file, id) in ghosts {
        if ghost::origin(cx.images, id)? == Some((sdev, ino)) {
            let entry = by_id(cx, file)?;
            return handle(cx, &entry, Remap::Ghost(id))?.try_clone_to_owned().call("dup").map(Some);
        }
    }
    Ok(None)
}

/// Opens a file as its entry says.
pub fn open(e: &RegFileEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if e.mode.is_some_and(|mode| FileType::from_raw_mode(mode) == FileType::Socket) {
        // the file of the dump goes when its socket is bound again
        crate::sockets::unix::make(cx)?;
    }
    let fd = open_as(cx, e, e.flags)?;
    // one that stands for it is as it was given
    if stand_in(cx, e).is_none() && e.flags & libc::O_PATH as u32 == 0 {
        finish_opening(fd.as_fd(), e.pos, e.flags).at(place(&e.name))?;
    }
    Ok(fd)
}

/// Offset and flags of a file that was just opened.
pub(in crate::files) fn finish_opening(fd: BorrowedFd<'_>, pos: u64, flags: u32) -> Result<()> {
    if pos != 0 && pos != u64::MAX {
        rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(pos)).call("lseek")?;
    }
    set_status_flags(fd, flags)
}

/// Would [`open`] find the file, and the one that it was? Nothing is opened for long, and nothing is made.
pub fn is_there(cx: &RestoreFiles<'_>, e: &RegFileEntry) -> Result<()> {
    if let Some(ours) = stand_in(cx, e) {
        return calls::dup_number(ours).map(drop).at(place(&e.name));
    }
    if e.ext == Some(true) {
        return given(cx, e).map(drop);
    }
    // the one of a socket goes when that is bound again; what is below a task comes with it
    let is_socket = e.mode.is_some_and(|mode| FileType::from_raw_mode(mode) == FileType::Socket);
    if is_socket || is_of_task(e) || cx.regular.remaps.contains_key(&e.id) {
        return Ok(());
    }
    let nofollow = e.flags & libc::O_NOFOLLOW as u32;
    let file = open_below(restore_root(cx)?.as_fd(), &e.name, libc::O_PATH as u32 | nofollow);
    let file = file.call("open").at(place(&e.name))?;
    let stat = rustix::fs::fstat(&file).call("fstat").at(place(&e.name))?;
    validate::check(file.as_fd(), &stat, e, cx.opts)
}

/// The descriptor that stands for a file from outside.
fn given(cx: &RestoreFiles<'_>, e: &RegFileEntry) -> Result<i32> {
    let id = String::from_utf8_lossy(&e.name);
    let advice =
        || Error::Usage { what: format!("{id} is external: say which file it is with --inherit-fd fd[N]:{id}") };
    cx.opts.inherited_fd(&id).ok_or_else(advice)
}

/// Opens a mapped file, for reading or for both as the area's `fdflags` say.
pub fn opened_for_mapping(cx: &mut RestoreFiles<'_>, id: u32, fdflags: u32) -> Result<OwnedFd> {
    open_as(cx, &by_id(cx, id)?, fdflags)
}

/// Opens the program of a task, as PR_SET_MM_EXE_FILE wants it.
pub fn exe(cx: &mut RestoreFiles<'_>, id: u32) -> Result<OwnedFd> {
    open_as(cx, &by_id(cx, id)?, libc::O_RDONLY as u32)
}

/// Opens a working or root folder, as fchdir(2) wants it.
pub fn folder(cx: &mut RestoreFiles<'_>, id: u32) -> Result<OwnedFd> {
    open_as(cx, &by_id(cx, id)?, (libc::O_PATH | libc::O_DIRECTORY) as u32)
}

pub(super) fn by_id(cx: &RestoreFiles<'_>, id: u32) -> Result<RegFileEntry> {
    let missing = || Error::lie("files.img", format!("No entry for reg-file-ID {id:#x}"));
    cx.entry(id)?.reg.clone().ok_or_else(missing)
}

/// The descriptor that the caller gave for the path of a file, which CRIU calls without its first `/`.
fn stand_in(cx: &RestoreFiles<'_>, e: &RegFileEntry) -> Option<i32> {
    let path = String::from_utf8_lossy(&e.name);
    let given =
        || cx.opts.inherited_fd(path.strip_prefix('/').unwrap_or(&path)).or_else(|| cx.opts.inherited_fd(&path));
    if e.ext == Some(true) {
        None
    } else {
        given()
    }
}

/// Opens a file with other flags than its entry has; offset and status flags stay as they are.
pub(in crate::files) fn open_as(cx: &mut RestoreFiles<'_>, e: &RegFileEntry, flags: u32) -> Result<OwnedFd> {
    if let Some(ours) = stand_in(cx, e) {
        return calls::dup_number(ours).at(place(&e.name));
    }
    let fd = if e.ext == Some(true) {
        reopen(calls::dup_number(given(cx, e)?)?.as_fd(), flags)
    } else if let Some(&remap) = cx.regular.remaps.get(&e.id) {
        handle(cx, e, remap).and_then(|handle| reopen(handle, flags))
    } else {
        let (root, name) = place_of(cx, e)?;
        open_below(root.as_fd(), &name, flags).call("open")
    };
    let fd = fd.at(place(&e.name))?;
    if cx.regular.checked.insert(e.id) {
        let stat = rustix::fs::fstat(&fd).call("fstat").at(place(&e.name))?;
        validate::check(fd.as_fd(), &stat, e, cx.opts)?;
    }
    Ok(fd)
}

/// An O_PATH descriptor of a file whose name is gone, or was another one.
fn handle<'a>(cx: &'a mut RestoreFiles<'_>, e: &RegFileEntry, remap: Remap) -> Result<BorrowedFd<'a>> {
    if !cx.regular.handles.contains_key(&e.id) {
        match remap {
            Remap::Linked(to) => {
                let (root, name) = bare_place_of(cx, &by_id(cx, to)?)?;
                let flags = (libc::O_PATH | libc::O_NOFOLLOW) as u32;
                let source = open_below(root.as_fd(), &name, flags).call("open").at(place(&name))?;
                let own = placed(cx, e)?;
                let handle = ghost::relink(root.as_fd(), source.as_fd(), &own, to, cx.guard)?;
                cx.regular.handles.insert(e.id, handle);
            }
            Remap::Ghost(id) => {
                let ghosts = cx.regular.remaps.iter().filter(|(_, to)| **to == remap);
                let mut users: Vec<_> = ghosts.filter_map(|(id, _)| cx.entries.get(id)?.reg.as_ref()).collect();
                users.sort_by_key(|user| user.id);
                // by name below the root of the file system, and by mount
                let mut names: Vec<ghost::Placed> = Vec::new();
                let mut places: Vec<(usize, usize)> = Vec::new();
                let mut mounts: Vec<Vec<Option<i32>>> = Vec::new();
                for user in &users {
                    let own = placed(cx, user)?;
                    let n = match names.iter().position(|name| name.path == own.path) {
                        Some(n) => n,
                        None => {
                            names.push(ghost::Placed { path: own.path, views: Vec::new() });
                            mounts.push(Vec::new());
                            names.len() - 1
                        }
                    };
                    let view = match mounts[n].iter().position(|mount| *mount == user.mnt_id) {
                        Some(view) => view,
                        None => {
                            mounts[n].push(user.mnt_id);
                            names[n].views.extend(own.views);
                            mounts[n].len() - 1
                        }
                    };
                    places.push((n, if names[n].views.is_empty() { 0 } else { view }));
                }
                let (root, _) = bare_place_of(cx, e)?;
                let unnamed = users.iter().any(|user| user.flags & NAMELESS != 0);
                let made = ghost::make(cx.images, cx.guard, root.as_fd(), id, &names, unnamed, &cx.users)?;
                for (user, (n, view)) in users.iter().zip(places) {
                    let made = made.get(n).and_then(|views| views.get(view)).ok_or(Error::Gone)?;
                    cx.regular.handles.insert(user.id, made.try_clone().call("dup")?);
                }
            }
        }
    }
    cx.regular.handles.get(&e.id).map(AsFd::as_fd).ok_or(Error::Gone)
}

/// Where a file without its name is made: below what [`bare_place_of`] says, and as its mount shows it.
fn placed(cx: &RestoreFiles<'_>, e: &RegFileEntry) -> Result<ghost::Placed> {
    let (_, path) = bare_place_of(cx, e)?;
    let views = if on_mount(cx, e).is_some() { vec![place_of(cx, e)?] } else { Vec::new() };
    Ok(ghost::Placed { path, views })
}

/// The mount that a file is on, if the tree has mounts of its own.
fn on_mount<'c>(cx: &'c RestoreFiles<'_>, e: &RegFileEntry) -> Option<(&'c crate::mounts::restore::Made, u32)> {
    cx.mounts.as_ref().zip(e.mnt_id.and_then(|id| u32::try_from(id).ok()))
}

/// The root of a file's file system, with nothing mounted on it, and its path there.
fn bare_place_of(cx: &RestoreFiles<'_>, e: &RegFileEntry) -> Result<(Arc<OwnedFd>, Vec<u8>)> {
    match on_mount(cx, e) {
        Some((made, id)) => {
            let (from, path) = made.bare(id, &e.name)?;
            Ok((Arc::new(from.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?), path))
        }
        None => place_of(cx, e),
    }
}

/// From where a file is opened, and by which path.
fn place_of(cx: &RestoreFiles<'_>, e: &RegFileEntry) -> Result<(Arc<OwnedFd>, Vec<u8>)> {
    if let Some((made, id)) = on_mount(cx, e) {
        let (from, rest) = made.place(id, &e.name)?;
        let from = from.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?;
        return Ok((Arc::new(from), if rest.starts_with(b"/") { rest.to_vec() } else { [b"/", rest].concat() }));
    }
    Ok((restore_root(cx)?, e.name.clone()))
}

fn restore_root(cx: &RestoreFiles<'_>) -> Result<Arc<OwnedFd>> {
    if let Some(root) = &cx.regular.root {
        return Ok(root.clone());
    }
    let path = cx.opts.root.as_deref().unwrap_or("/".as_ref());
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, folder, Mode::empty()).call("open").at(Place::Path(path.into()))?;
    Ok(Arc::new(root))
}

/// The restore worked: removes the names that `--link-remap` made.
pub fn done(cx: &mut RestoreFiles<'_>) -> Result<()> {
    let linked = |to: &Remap| if let Remap::Linked(id) = to { Some(*id) } else { None };
    let links: BTreeSet<u32> = cx.regular.remaps.values().filter_map(linked).collect();
    for id in links {
        let (root, path) = bare_place_of(cx, &by_id(cx, id)?)?;
        let (folder, name) = split(&path);
        let gone = open_below(root.as_fd(), folder, (libc::O_PATH | libc::O_DIRECTORY) as u32)
            .and_then(|folder| rustix::fs::unlinkat(folder, name, AtFlags::empty()));
        match gone {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error).call("unlink").at(place(&path)),
        }
    }
    Ok(())
}
