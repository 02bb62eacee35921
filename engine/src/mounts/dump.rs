//! Mounts at dump: reading namespaces, what comes from outside, opening what is hidden, writing images.
//!
//! A mount is looked at through a clone of it (open_tree(2)), which has nothing mounted on it. Where no path leads to a
//! mount, or it must not be cloned, a thread takes away what hides it in a copy of the namespace. That copy must belong to the
//! same user namespace (`namespaces/companion.rs`). Where a mount that hides another is older than the user namespace, nobody in
//! there can take it away; but then the other is one of ours, too. The tree's own namespaces are never changed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;
use standstill_images::proto::{Fstype, MntEntry};
use standstill_images::{ImageKind, Images};

use super::table::{below, Mount, Table, AUTODETECTED, EXTERNAL_DEVICE};
use super::tmpfs;
use crate::error::{At, Call, Error, Place, Result};
use crate::namespaces::{companion, Kind};
use crate::options::Options;
use crate::proc::{self, mountinfo};
use crate::sys::mount;

const PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A mount namespace of the tree.
#[derive(Clone, Copy, Debug)]
pub struct Namespace {
    /// Its id in images.
    pub id: u32,
    /// A task in it, whose root is the namespace's.
    pub pid: i32,
    /// That task has a cgroup namespace of its own, from which cgroup mounts look whole.
    pub own_cgroups: bool,
}

/// The mounts of a tree that is being dumped.
#[derive(Debug)]
pub struct Mounts {
    /// All of them.
    pub table: Table,
    namespaces: Vec<Namespace>,
    opened: HashMap<u32, OwnedFd>,
    roots: HashMap<u32, OwnedFd>,
}

impl Mounts {
    /// Reads and checks the mounts of all namespaces; the first one is the root task's. Nothing is changed.
    pub fn read(opts: &Options, namespaces: &[Namespace]) -> Result<Mounts> {
        let mut table = Table::default();
        let mut roots = HashMap::new();
        for ns in namespaces {
            roots.insert(ns.id, root_of(ns.pid).task(ns.pid)?);
            let mounts = read_one(opts, *ns).task(ns.pid)?;
            table.add(ns.id, mounts).task(ns.pid)?;
        }
        resolve_external(opts, &mut table)?;
        table.validate()?;
        Ok(Mounts { table, namespaces: namespaces.to_vec(), opened: HashMap::new(), roots })
    }

    /// The root of a namespace.
    pub fn root(&self, ns: u32) -> Option<BorrowedFd<'_>> {
        self.roots.get(&ns).map(AsFd::as_fd)
    }

    /// Writes `mountpoints-N.img` and what is in file systems that end with the tree.
    pub fn write(&mut self, images: &Images) -> Result<()> {
        let mut written = Vec::new();
        for at in 0..self.table.mounts.len() {
            let m = &self.table.mounts[at];
            let carried = matches!(m.kind, Fstype::Tmpfs | Fstype::Pstore);
            if !carried || self.table.external_of(m).is_some() || self.table.is_of_top(m) || written.contains(&m.dev) {
                continue;
            }
            written.push(m.dev);
            let (kind, dev, shown) = (m.kind, m.dev, m.shown());
            // any whole mount will do: one that can be seen, if there is one
            let mut whole: Vec<&Mount> = self.table.wider(m).filter(|o| o.is_whole()).collect();
            whole.sort_by_key(|m| self.table.is_hidden(m));
            let id = whole.first().map_or(m.id, |m| m.id);
            let root = self.open(id)?;
            if kind == Fstype::Tmpfs {
                tmpfs::dump(images, dev, root).at(Place::Item("tmpfs of mount", id.into()))?;
            } else if !is_empty(root)? {
                return Err(Error::refused(
                    format!("{shown}, which is not empty,"),
                    "empty it, or leave it out (--skip-mnt)",
                ));
            }
        }
        for ns in &self.namespaces {
            let entries: Vec<MntEntry> = self.table.of(ns.id).map(Mount::entry).collect();
            images.write_entries(ImageKind::Mnts, ns.id, entries)?;
        }
        Ok(())
    }

    /// A mount's root, with nothing mounted on or below it.
    pub fn open(&mut self, id: u32) -> Result<BorrowedFd<'_>> {
        if !self.opened.contains_key(&id) {
            let m = self.table.by_id(id).ok_or(Error::Gone)?;
            let pid = self.namespaces.iter().find(|ns| ns.id == m.ns).ok_or(Error::Gone)?.pid;
            let shown = m.shown();
            let opened = open_clean(&self.table, m, pid);
            let fd = opened.map_err(|e| Error::In { place: Place::Path(shown.into()), source: Box::new(e) })?;
            self.opened.insert(id, fd);
        }
        self.opened.get(&id).map(AsFd::as_fd).ok_or(Error::Gone)
    }
}

/// The root folder of a task, which must be its namespace's.
fn root_of(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    let link = rustix::fs::readlink(&path, Vec::new()).call("readlink(/proc/PID/root)")?;
    if link.as_bytes() != b"/" {
        let what = format!("The root task has another root than mntns: {}", link.to_string_lossy());
        return Err(Error::refused(what, "dump a tree whose first task is at the root of its mount namespace"));
    }
    rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .call("open(/proc/PID/root)")
}

/// The list is kept from the last to the first, as in images of CRIU.
fn read_one(opts: &Options, ns: Namespace) -> Result<Vec<Mount>> {
    let mut buffer = Vec::new();
    proc::read_proc(Path::new(&format!("/proc/{}/mountinfo", ns.pid)), &mut buffer).call("read(mountinfo)")?;
    let own_terminals =
        rustix::fs::stat("/dev/pts").ok().map(|s| (rustix::fs::major(s.st_dev), rustix::fs::minor(s.st_dev)));
    let mut mounts = Vec::new();
    for m in mountinfo::parse(&buffer)?.iter().rev() {
        let skipped = opts.skip_mnt.iter().any(|path| same_path(path, &m.mount_point));
        // the kernel mounts it by itself below debugfs
        if skipped || m.fs_type == b"tracefs" {
            tracing::info!("mount {} at {} is left out", m.id, String::from_utf8_lossy(&m.mount_point));
            continue;
        }
        let mut new = Mount::from_proc(ns.id, m, &opts.enable_fs)?;
        match new.kind {
            Fstype::Devpts if own_terminals != Some(m.device) => {
                if !new.options.is_empty() {
                    new.options.push(b',');
                }
                new.options.extend_from_slice(b"newinstance");
            }
            Fstype::Cgroup | Fstype::Cgroup2 if ns.own_cgroups => new.root = b"/".to_vec(),
            _ => {}
        }
        mounts.push(new);
    }
    Ok(mounts)
}

fn same_path(a: &Path, b: &[u8]) -> bool {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> {
        path.split(|&b| b == b'/').filter(|p| !matches!(*p, b"" | b".")).map(<[u8]>::to_vec).collect()
    };
    parts(a.as_os_str().as_bytes()) == parts(b)
}

/// Says of each mount whether it comes from outside: by its place, by its device, or by what is mounted where we are.
fn resolve_external(opts: &Options, table: &mut Table) -> Result<()> {
    let first = table.namespaces.first().copied();
    let mut ours = Vec::new();
    if opts.autodetect_ext_mounts {
        let mut buffer = Vec::new();
        proc::read_proc(Path::new("/proc/self/mountinfo"), &mut buffer).call("read(mountinfo)")?;
        for m in mountinfo::parse(&buffer)? {
            // what we have ourselves needs not be something that can be carried
            if let Ok(m) = Mount::from_proc(0, &m, &[]) {
                ours.push(m);
            }
        }
    }
    for at in 0..table.mounts.len() {
        if table.mounts[at].is_root_of(table) {
            continue;
        }
        let m = &mut table.mounts[at];
        if Some(m.ns) == first {
            let key = format!("mnt[{}]", String::from_utf8_lossy(&m.point));
            if let Some(Some(name)) = opts.external_value(&key) {
                m.external = Some(name.as_bytes().to_vec());
                continue;
            }
        }
        if m.kind == Fstype::Unsupported && m.is_whole() {
            let key = format!("dev[{}/{}]", m.dev >> 20, m.dev & 0xf_ffff);
            if let Some(Some(name)) = opts.external_value(&key) {
                m.external = Some(EXTERNAL_DEVICE.to_vec());
                m.kind = Fstype::Auto;
                m.source = format!("dev[{name}]").into_bytes();
                continue;
            }
        }
        detect(opts, m, &ours);
    }
    Ok(())
}

/// Finds a mount of ours that this one could be bound from.
fn detect(opts: &Options, m: &mut Mount, ours: &[Mount]) {
    let same = |o: &&Mount| {
        o.dev == m.dev
            && o.source == m.source
            && o.kind == m.kind
            && o.options == m.options
            && below(&m.root, &o.root).is_some()
    };
    let mut found = None;
    for other in ours.iter().rev().filter(same) {
        found = Some(other);
        // one in the same group is the right one, of several
        if m.shared != 0 && m.shared == other.shared || m.master != 0 && m.master == other.shared {
            break;
        }
    }
    let Some(found) = found else { return };
    if m.shared != 0 {
        if !opts.enable_external_sharing {
            return;
        }
        m.internal_sharing = m.shared != found.shared;
    }
    if m.master != 0 && (!opts.enable_external_masters || m.master != found.shared && m.master != found.master) {
        return;
    }
    let rest = below(&m.root, &found.root).unwrap_or_default();
    let mut path = found.point.clone();
    if !rest.is_empty() {
        if !path.ends_with(b"/") {
            path.push(b'/');
        }
        path.extend_from_slice(rest);
    }
    tracing::info!("{} comes from outside: {}", m.shown(), String::from_utf8_lossy(&path));
    m.external = Some(AUTODETECTED.to_vec());
    m.source = path;
}

fn is_empty(root: BorrowedFd<'_>) -> Result<bool> {
    let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(root, c".", folder, Mode::empty()).call("openat")?;
    for entry in rustix::fs::Dir::read_from(&fd).call("getdents64")? {
        if !matches!(entry.call("getdents64")?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn open_clean(table: &Table, m: &Mount, pid: i32) -> Result<OwnedFd> {
    let read = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace =
        rustix::fs::open(format!("/proc/{pid}/ns/mnt"), read, Mode::empty()).call("open(/proc/PID/ns/mnt)")?;
    let seen = mount::apart(|| {
        mount::enter(namespace.as_fd())?;
        if let Ok(seen) = rustix::fs::open(m.point.as_slice(), PATH, Mode::empty()) {
            if mount::id_of(seen.as_fd())? == u64::from(m.id) {
                match mount::clone_tree(seen.as_fd(), b"") {
                    Ok(fd) => return Ok(Some(fd)),
                    Err(e) => tracing::debug!("{}: {e}, so a copy of all is taken apart", m.shown()),
                }
            }
        }
        Ok(None)
    })?;
    if let Some(seen) = seen {
        return Ok(seen);
    }
    let is_elsewhere = companion::is_elsewhere(pid)?;
    let copy = if is_elsewhere { companion::make(pid, Kind::Mnt, 1)?.pop() } else { None };
    let found = mount::apart(|| {
        let own = own_folder()?;
        match &copy {
            Some(copy) => {
                mount::enter(copy.as_fd())?;
                mount::make_private()?;
            }
            None => {
                mount::enter(namespace.as_fd())?;
                mount::enter_private_copy()?;
            }
        }
        uncover(&copied(own.as_fd(), m.ns)?, m.ns, &way(table, m))
    });
    match found {
        Err(e) if is_elsewhere && e.errno() == libc::EINVAL => mount::apart(|| {
            let own = own_folder()?;
            mount::enter_private_copy()?;
            let ours = copied(own.as_fd(), m.ns)?;
            let same = ours.mounts.iter().find(|o| Table::same_fs(o, m) && o.root == m.root && o.options == m.options);
            uncover(&ours, m.ns, &way(&ours, same.ok_or(e)?))
        }),
        found => found,
    }
}

/// What is below this folder says what holds for this thread, wherever it goes.
fn own_folder() -> Result<OwnedFd> {
    rustix::fs::open(c"/proc/thread-self", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .call("open(/proc/thread-self)")
}

/// The mounts that the thread with this folder has.
fn copied(own: BorrowedFd<'_>, ns: u32) -> Result<Table> {
    let read = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut text = Vec::new();
    let info = rustix::fs::openat(own, c"mountinfo", read, Mode::empty()).call("open(mountinfo)")?;
    std::io::Read::read_to_end(&mut std::fs::File::from(info), &mut text).call("read(mountinfo)")?;
    let mut copy = Vec::new();
    for line in mountinfo::parse(&text)? {
        copy.push(Mount { id: line.id.unsigned_abs(), ..Mount::from_proc(ns, &line, &[])? });
    }
    let mut copied = Table::default();
    copied.add(ns, copy)?;
    Ok(copied)
}

/// The mount points from the root's to a mount's own.
fn way(table: &Table, m: &Mount) -> Vec<Vec<u8>> {
    let (mut at, mut way) = (m, Vec::new());
    while let Some(parent) = table.by_id(at.parent).filter(|_| !at.is_root_of(table)) {
        way.push(at.point.clone());
        at = parent;
    }
    way.reverse();
    way
}

/// Takes away what is on the mounts of a way from the root, as far as it hides the next, and all that is on the last. `copied` are
/// the mounts here, which are ours to change.
fn uncover(copied: &Table, ns: u32, way: &[Vec<u8>]) -> Result<OwnedFd> {
    let mut chain = vec![copied.root(ns).ok_or(Error::Gone)?];
    for point in way {
        let from = chain.last().ok_or(Error::Gone)?;
        let next = copied.children(from).into_iter().find(|m| m.point == *point);
        chain.push(next.ok_or_else(|| Error::Changed { what: format!("{} is not there any more", from.shown()) })?);
    }
    let wanted = *chain.last().ok_or(Error::Gone)?;
    let clear = |place: &Mount, keeps: &dyn Fn(&Mount) -> bool| loop {
        let (fd, whole) = as_far_as_possible(&place.point)?;
        let id = mount::id_of(fd.as_fd())?;
        let top = copied.mounts.iter().find(|m| u64::from(m.id) == id).ok_or(Error::Gone)?;
        if whole && keeps(top) {
            return Ok::<_, Error>(fd);
        }
        if chain.iter().any(|m| m.id == top.id) {
            return Err(Error::Changed { what: format!("no path leads to {}", wanted.shown()) });
        }
        unmount(top)?;
    };
    for (at, m) in chain.iter().enumerate() {
        clear(m, &|top| chain[at..].iter().any(|next| next.id == top.id))?;
    }
    for child in copied.children(wanted).into_iter().rev() {
        clear(child, &|top| top.id == wanted.id)?;
    }
    clear(wanted, &|top| top.id == wanted.id)
}

/// What a path leads to, or the way to it as far as it is there; whether that is all of it.
fn as_far_as_possible(path: &[u8]) -> Result<(OwnedFd, bool)> {
    use rustix::io::Errno;
    let mut end = path.len();
    loop {
        let part = if end == 0 { b"/" } else { &path[..end] };
        match rustix::fs::open(part, PATH, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) if end > 0 => {
                end = path[..end].iter().rposition(|&b| b == b'/').unwrap_or(0);
            }
            found => {
                return Ok((
                    found.call("open").at(Place::Path(PathBuf::from(OsStr::from_bytes(part))))?,
                    end == path.len(),
                ))
            }
        }
    }
}

fn unmount(m: &Mount) -> Result<()> {
    rustix::mount::unmount(m.point.as_slice(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .call("umount2(MNT_DETACH)")
        .map_err(|e| Error::In { place: Place::Path(m.shown().into()), source: Box::new(e) })
}
