//! Names of unix sockets: binding one again, and reaching it.
//!
//! A name is kept by the kernel as it was given, so a relative path must be bound from its own folder. The current folder of
//! the process stays: a thread of its own leaves the shared one (CLONE_FS) and goes there.
//!
//! A file that was moved after it was bound is moved again. A path whose file was gone is bound all the same, and its file removed again; what stands there meanwhile is put aside.
//!
//! A tree with mounts of its own has its socket's file on one of them (`mnt_id`). If the path does not lead there now, since
//! something hides that or it is in another namespace, the socket is bound where it does: in a small tree of folders that ends in a
//! symbolic link to the right one.
//!
//! Man pages: unix(7), unshare(2).

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use standstill_images::proto::UnixSkEntry;

use crate::error::{At, Call, Error, Place, Result};
use crate::files::{magic_link, RestoreFiles};
use crate::sys::mount;

/// What an entry is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name<'e> {
    /// Nothing.
    None,
    /// A name without a file.
    Abstract(&'e [u8]),
    /// A path, and the folder that it is relative to.
    Path(&'e Path, Option<&'e Path>),
}

impl<'e> Name<'e> {
    /// Of an entry.
    pub(super) fn of(e: &'e UnixSkEntry) -> Result<Name<'e>> {
        let lie = || Error::lie("files.img", format!("the name of unix socket {} has {} bytes", e.ino, e.name.len()));
        match e.name.as_slice() {
            name if name.len() > 108 => Err(lie()),
            [] => Ok(Name::None),
            [0, name @ ..] => Ok(Name::Abstract(name)),
            path => {
                let path = path.strip_suffix(b"\0").unwrap_or(path);
                let folder = e.name_dir.as_deref().map(|dir| Path::new(OsStr::from_bytes(dir)));
                if path.contains(&0) {
                    Err(lie())
                } else {
                    Ok(Name::Path(Path::new(OsStr::from_bytes(path)), folder))
                }
            }
        }
    }
}

/// Runs something with the current folder of a thread of its own.
/// A tree with mounts of its own has another root too.
fn in_folder<T: Send>(
    root: Option<BorrowedFd<'_>>,
    folder: Option<&Path>,
    run: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    if root.is_none() && folder.is_none() {
        return run();
    }
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).call("unshare(CLONE_FS)")?;
                if let Some(root) = root {
                    rustix::process::fchdir(root).call("fchdir")?;
                    rustix::process::chroot(".").call("chroot")?;
                }
                if let Some(folder) = folder {
                    rustix::process::chdir(folder).call("chdir").at(Place::Path(folder.to_owned()))?;
                }
                run()
            })
            .join()
    });
    result.unwrap_or(Err(Error::Gone))
}

/// Binds a socket. What comes back opens the file that it is bound to, if it is one.
/// If nothing had its name, that goes when the restore fails.
pub(super) fn bind(fd: BorrowedFd<'_>, e: &UnixSkEntry, cx: &RestoreFiles<'_>) -> Result<Option<OwnedFd>> {
    let own_mount = on_mount(e, cx)?;
    let root = match &own_mount {
        Some(Where::Root(root)) => Some(root.as_fd()),
        _ => cx.mounts.as_ref().map(crate::mounts::restore::Made::root).transpose()?,
    };
    if let (Name::Path(path, folder), None) = (Name::of(e)?, root) {
        let full = folder.map_or_else(|| path.to_owned(), |folder| folder.join(path));
        let full = std::path::absolute(&full).call("getcwd").at(Place::Path(full))?;
        let full = e.standstill_moved.as_deref().map_or(full, |to| PathBuf::from(OsStr::from_bytes(to)));
        if rustix::fs::lstat(&full).is_err_and(|e| e == Errno::NOENT) {
            cx.makes_name(full)?;
        }
    }
    match Name::of(e)? {
        Name::None => Ok(None),
        Name::Abstract(name) => {
            let address = SocketAddrUnix::new_abstract_name(name).call("bind")?;
            rustix::net::bind(fd, &address).call("bind").at(Place::Path(shown(name)))?;
            Ok(None)
        }
        Name::Path(path, _) => in_place(own_mount.as_ref(), root, Name::of(e)?, || {
            if e.deleted == Some(true) {
                let _aside = Aside::of(path)?;
                let node = bind_path(fd, path, e)?;
                rustix::fs::unlink(path).call("unlink")?;
                Ok(Some(node))
            } else if let Some(to) = e.standstill_moved.as_deref().map(|to| Path::new(OsStr::from_bytes(to))) {
                let _aside = Aside::of(path)?;
                let node = bind_path(fd, path, e)?;
                // the old socket is there still; anything else stays and is in the way
                match rustix::fs::lstat(to) {
                    Ok(s) if FileType::from_raw_mode(s.st_mode) != FileType::Socket => {
                        rustix::fs::unlink(path).call("unlink")?;
                        return Err(Errno::EXIST).call("rename").at(Place::Path(to.to_owned()));
                    }
                    _ => rustix::fs::rename(path, to).call("rename").at(Place::Path(to.to_owned()))?,
                }
                Ok(Some(node))
            } else {
                // a socket that is there is the old one, or nobody's; anything else stays and is in the way
                if rustix::fs::lstat(path).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Socket) {
                    rustix::fs::unlink(path).call("unlink")?;
                }
                bind_path(fd, path, e).map(Some)
            }
        })
        .at(Place::Path(path.to_owned())),
    }
}

/// Where the file of a socket is, in a tree with mounts of its own.
enum Where {
    /// Its path leads there from this root.
    Root(OwnedFd),
    /// It does not; this is the folder that the file is in.
    Folder(OwnedFd),
}

fn on_mount(e: &UnixSkEntry, cx: &RestoreFiles<'_>) -> Result<Option<Where>> {
    let mount = cx.mounts.as_ref().zip(e.mnt_id.and_then(|id| u32::try_from(id).ok()));
    let (Some((made, id)), Name::Path(path, folder)) = (mount, Name::of(e)?) else { return Ok(None) };
    let lie = || Error::lie("files.img", format!("unix socket {} is on mount {id}, which is not there", e.ino));
    let m = made.table.by_id(id).ok_or_else(lie)?;
    let root = made.root_of(m.ns)?.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?;
    let full = clean(&Path::new("/").join(folder.unwrap_or_else(|| Path::new(""))).join(path));
    let leads = made.table.resolve(m.ns, full.as_os_str().as_bytes()).is_some_and(|(found, _)| found.id == id);
    let parent = full.parent().unwrap_or_else(|| Path::new("/"));
    if leads || e.standstill_moved.is_some() {
        return Ok(Some(Where::Root(root)));
    }
    let parent = parent.as_os_str().as_bytes();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |from: BorrowedFd<'_>, path: &[u8]| {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(from, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_XDEV)
    };
    let on_itself = crate::mounts::table::below(parent, &m.point).zip(made.mounts.get(&id));
    let found = match on_itself.map(|(rest, mount)| open(mount.as_fd(), rest)) {
        Some(Ok(folder)) => Ok(folder),
        // a mount on the way hides the folder: then by way of the file system itself
        _ => made.bare(id, parent).and_then(|(from, path)| open(from, &path).call("openat2")),
    };
    match found {
        Ok(folder) => Ok(Some(Where::Folder(folder))),
        Err(e) => {
            tracing::warn!("{} cannot be reached on its mount: {e}", full.display());
            Ok(Some(Where::Root(root)))
        }
    }
}

/// An absolute path without `.` and `..`.
fn clean(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::ParentDir => drop(clean.pop()),
            Component::Normal(name) => clean.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Runs something where the name of a socket leads to the folder of its file.
fn in_place<T: Send>(
    own: Option<&Where>,
    root: Option<BorrowedFd<'_>>,
    name: Name<'_>,
    run: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let (Some(Where::Folder(target)), Name::Path(path, folder)) = (own, name) else {
        let folder = if let Name::Path(_, folder) = name { folder } else { None };
        return in_folder(root, folder, run);
    };
    let upper: Vec<&OsStr> = path
        .parent()
        .into_iter()
        .flat_map(Path::components)
        .filter_map(|part| if let std::path::Component::Normal(name) = part { Some(name) } else { None })
        .collect();
    mount::apart(|| {
        let Some((last, others)) = upper.split_last() else {
            // the name alone
            rustix::process::fchdir(target).call("fchdir")?;
            return if path.is_absolute() {
                rustix::process::chroot(c".").call("chroot").and_then(|()| run())
            } else {
                run()
            };
        };
        mount::enter_private_copy()?;
        const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
        let proc = rustix::fs::open(c"/proc", FOLDER, Mode::empty()).call("open(/proc)")?;
        let proc = mount::clone_tree(proc.as_fd(), b"").call("open_tree(OPEN_TREE_CLONE)")?;
        let here = rustix::fs::open(c"/", FOLDER, Mode::empty()).call("open(/)")?;
        let tree = mount::scratch()?;
        mount::attach(tree.as_fd(), here.as_fd())?;
        let mut at = tree.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?;
        for name in others {
            rustix::fs::mkdirat(&at, *name, Mode::RWXU).call("mkdirat")?;
            at = rustix::fs::openat(&at, *name, FOLDER, Mode::empty()).call("openat")?;
        }
        // no program calls a folder so, and if one did, only this restore would fail
        const DOOR: &str = ".standstill-proc";
        rustix::fs::mkdirat(&tree, DOOR, Mode::RWXU).call("mkdirat")?;
        let door = rustix::fs::openat(&tree, DOOR, FOLDER, Mode::empty()).call("openat")?;
        mount::attach(proc.as_fd(), door.as_fd())?;
        let to = format!("/{DOOR}/thread-self/fd/{}", target.as_raw_fd());
        rustix::fs::symlinkat(to, &at, *last).call("symlinkat")?;
        rustix::process::fchdir(&tree).call("fchdir")?;
        rustix::process::chroot(c".").call("chroot")?;
        run()
    })
    .at(Place::Path(folder.map_or_else(|| path.to_owned(), |folder| folder.join(path))))
}

fn bind_path(fd: BorrowedFd<'_>, path: &Path, e: &UnixSkEntry) -> Result<OwnedFd> {
    let address = SocketAddrUnix::new(path).call("bind")?;
    rustix::net::bind(fd, &address).call("bind")?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::open(path, flags, Mode::empty()).call("open(O_PATH)")?;
    if let Some(perms) = &e.file_perms {
        let now = rustix::fs::fstat(&node).call("fstat")?;
        if (now.st_uid, now.st_gid) != (perms.uid, perms.gid) {
            let (uid, gid) = (Uid::from_raw(perms.uid), Gid::from_raw(perms.gid));
            rustix::fs::chownat(&node, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH).call("fchownat")?;
        }
        if now.st_mode & 0o7777 != perms.mode & 0o7777 {
            // not by way of /proc, which need not be there
            rustix::fs::chmod(path, Mode::from_raw_mode(perms.mode & 0o7777)).call("chmod")?;
        }
    }
    Ok(node)
}

/// Connects a socket to one of the restored, by the file that it is bound to or by its abstract name.
pub(super) fn connect(fd: BorrowedFd<'_>, to: &UnixSkEntry, node: Option<BorrowedFd<'_>>) -> Result<()> {
    match (node, Name::of(to)?) {
        (Some(node), _) => {
            let address = SocketAddrUnix::new(magic_link(node)).call("connect")?;
            rustix::net::connect(fd, &address).call("connect")
        }
        (None, Name::Abstract(name)) => {
            let address = SocketAddrUnix::new_abstract_name(name).call("connect")?;
            rustix::net::connect(fd, &address).call("connect").at(Place::Path(shown(name)))
        }
        (None, Name::Path(path, folder)) => in_folder(None, folder, || {
            let address = SocketAddrUnix::new(path).call("connect")?;
            rustix::net::connect(fd, &address).call("connect")
        })
        .at(Place::Path(path.to_owned())),
        (None, Name::None) => Err(Error::lie("files.img", format!("unix socket {} has no name to connect to", to.ino))),
    }
}

/// An abstract name as messages show it.
fn shown(name: &[u8]) -> PathBuf {
    PathBuf::from(format!("@{}", name.escape_ascii()))
}

/// A path that is free for a moment: what was there is put aside, folders that are missing are made, and all of that is
/// undone at the end.
struct Aside {
    path: PathBuf,
    parked: Option<PathBuf>,
    made: Vec<PathBuf>,
}

impl Aside {
    fn of(path: &Path) -> Result<Aside> {
        let mut aside = Aside { path: path.to_owned(), parked: None, made: Vec::new() };
        let missing: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .take_while(|folder| {
                !folder.as_os_str().is_empty() && rustix::fs::access(*folder, rustix::fs::Access::EXISTS).is_err()
            })
            .collect();
        for folder in missing.into_iter().rev() {
            rustix::fs::mkdir(folder, Mode::from_raw_mode(0o755)).call("mkdir").at(Place::Path(folder.to_owned()))?;
            aside.made.push(folder.to_owned());
        }
        let mut parked = path.as_os_str().to_owned();
        parked.push(format!(".standstill-{}", std::process::id()));
        match rustix::fs::rename(path, &parked) {
            Ok(()) => aside.parked = Some(parked.into()),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).call("rename"),
        }
        Ok(aside)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some(parked) = &self.parked {
            if let Err(e) = rustix::fs::rename(parked, &self.path) {
                tracing::error!("{} is now called {}: {e}", self.path.display(), parked.display());
            }
        }
        for folder in self.made.iter().rev() {
            if let Err(e) = rustix::fs::rmdir(folder) {
                tracing::warn!("{} was made for a socket and cannot be removed: {e}", folder.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn entry(name: &[u8]) -> UnixSkEntry {
        UnixSkEntry { name: name.to_vec(), ..UnixSkEntry::default() }
    }

    #[test]
    fn names() {
        assert_eq!(Name::of(&entry(b"")).unwrap(), Name::None);
        assert_eq!(Name::of(&entry(b"\0a\0b")).unwrap(), Name::Abstract(b"a\0b"));
        assert_eq!(Name::of(&entry(b"/x\0")).unwrap(), Name::Path(Path::new("/x"), None));
        assert!(Name::of(&entry(b"/x\0y\0")).is_err());
        assert!(Name::of(&entry(&[b'x'; 109])).is_err());
    }

    #[test]
    fn another_folder_is_only_there_for_a_moment() {
        let here = std::env::current_dir().unwrap();
        let there = in_folder(None, Some(Path::new("/proc")), || std::env::current_dir().call("getcwd")).unwrap();
        assert_eq!(there, Path::new("/proc"));
        assert_eq!(std::env::current_dir().unwrap(), here);
        assert!(in_folder(None, Some(Path::new("/nowhere")), || Ok(())).is_err());
    }

    #[test]
    fn what_was_put_aside_returns() {
        let folder = std::env::temp_dir().join(format!("standstill-aside-{}", std::process::id()));
        let path = folder.join("deep/er/sock");
        drop(Aside::of(&path).unwrap());
        assert!(!folder.exists());
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("file");
        std::fs::write(&path, "kept").unwrap();
        let aside = Aside::of(&path).unwrap();
        assert!(!path.exists());
        drop(aside);
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
