//! Mounts at restore: super blocks, clones of them, trees, sharing, the way out of the old root.
//!
//! All is done by one thread with a root of its own:
//! 1. in a private copy of our namespace, so that what a killed engine leaves goes with the thread: each file system's
//!    origin is mounted on a yard there, filled, and cloned for each of its mounts;
//! 2. in each namespace of the tree: its root is put on top of what is there, the others on it, parents first, beside each
//!    other deeper ones first; then the new root takes the old one's place, which goes with all that is on it;
//! 3. sharing, when all is in place: until then all mounts are private, so nothing propagates. A group's first mount is a
//!    peer of the group of masters for a moment, then its slave (MOVE_MOUNT_SET_GROUP);
//! 4. what must not be bound says so, and names of deleted roots go.
//!
//! A file system that others use too (sysfs without a network namespace of its own, cgroups, mqueue) is mounted as it is:
//! its options are never changed.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::CloneFlags;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, UnmountFlags};
use standstill_images::proto::{Fstype, MntEntry};
use standstill_images::{ImageKind, Images};

use super::order::{can_copy, groups, origin_of, Group, Origin};
use super::table::{
    below, name_of, split_options, Mount, Table, AUTODETECTED, EXTERNAL_DEVICE, SUPER_FLAGS, UNBINDABLE,
};
use super::terminals::Terminals;
use super::tmpfs;
use crate::error::{At, Call, Error, Place, Result};
use crate::namespaces::{Kind, Own};
use crate::options::{Options, Persona};
use crate::proc::{self, mountinfo};
use crate::sys::mount::{self, propagation};

const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// The kernel takes no longer value of an option at a time.
const LONGEST: usize = 255;

/// Namespaces of the root task that decide what a mounted file system shows.
#[derive(Debug, Default)]
pub struct Owners {
    /// The mount namespaces to fill, the root task's first; new ones where there are none.
    pub mounts: Vec<OwnedFd>,
    /// For proc; ours if there is none.
    pub pids: Option<OwnedFd>,
    /// For sysfs, mqueue and cgroups, with the kind of each.
    pub others: Vec<(OwnedFd, CloneFlags)>,
}

impl Owners {
    /// Those that process `pid` was born into; the others are ours.
    pub fn of(pid: i32, own: &Own) -> Result<Owners> {
        let open = |kind: Kind| {
            let path = format!("/proc/{pid}/ns/{}", kind.file());
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).call("open(/proc/PID/ns)")
        };
        let mut owners = Owners { mounts: vec![open(Kind::Mnt)?], ..Owners::default() };
        if own.has(Kind::Pid) {
            owners.pids = Some(open(Kind::Pid)?);
        }
        for kind in [Kind::Net, Kind::Ipc, Kind::Cgroup] {
            if own.has(kind) {
                owners.others.push((open(kind)?, CloneFlags::from_bits_retain(kind.flag())));
            }
        }
        Ok(owners)
    }
}

/// What was made.
#[derive(Debug, Default)]
pub struct Made {
    /// All mounts.
    pub table: Table,
    /// A descriptor of the root of each, by id.
    pub mounts: HashMap<u32, OwnedFd>,
    /// Mount namespaces by id.
    pub namespaces: HashMap<u32, OwnedFd>,
    /// The root folder of each.
    pub roots: HashMap<u32, OwnedFd>,
    /// File systems by themselves, by the place in the table of the mount that stands for each.
    sources: HashMap<usize, Source>,
    /// Those that become read-only when all files are there.
    writable: Vec<usize>,
    /// Terminals that are mounted somewhere, until files are opened.
    pub terminals: Terminals,
}

impl Made {
    /// The root of the first namespace.
    pub fn root(&self) -> Result<BorrowedFd<'_>> {
        let first = self.table.namespaces.first().and_then(|ns| self.roots.get(ns));
        first.map(AsFd::as_fd).ok_or(Error::Gone)
    }

    /// The root of a namespace.
    pub fn root_of(&self, ns: u32) -> Result<BorrowedFd<'_>> {
        self.roots.get(&ns).map(AsFd::as_fd).ok_or(Error::Gone)
    }

    /// The namespaces that are not the root task's.
    pub fn nested(&self) -> impl Iterator<Item = (u32, &OwnedFd)> {
        let first = self.table.namespaces.first().copied();
        self.namespaces.iter().filter(move |(id, _)| Some(**id) != first).map(|(id, fd)| (*id, fd))
    }

    /// The file system of a mount by itself, with nothing mounted on it, and a path of that mount as it is in there: files of all
    /// mounts of a file system can be linked to each other there.
    pub fn bare(&self, id: u32, path: &[u8]) -> Result<(BorrowedFd<'_>, Vec<u8>)> {
        let lie = || Error::lie("files.img", format!("{} is not on mount {id}", String::from_utf8_lossy(path)));
        let m = self.table.by_id(id).ok_or_else(lie)?;
        let source = self.sources.get(&origin_of(&self.table, m)?.mount()).ok_or(Error::Gone)?;
        let root = below(&m.root, &source.root).ok_or_else(lie)?;
        let rest = below(path, &m.point).ok_or_else(lie)?;
        let slash: &[u8] = if root.is_empty() { b"" } else { b"/" };
        Ok((source.fd.as_fd(), [slash, root, b"/", rest].concat()))
    }

    /// Makes read-only what is to be: all files are there.
    pub fn settle(&mut self) -> Result<()> {
        for at in self.writable.drain(..) {
            let source = self.sources.get(&at).ok_or(Error::Gone)?;
            read_only(source.fd.as_fd())?;
        }
        Ok(())
    }

    /// From where a file is found, and by which path: from the root of its namespace, or from its mount, if that is hidden.
    pub fn place<'p>(&self, id: u32, path: &'p [u8]) -> Result<(BorrowedFd<'_>, &'p [u8])> {
        let lie = |what: &str| Error::lie("files.img", format!("{} is {what}", String::from_utf8_lossy(path)));
        let m = self.table.by_id(id).ok_or_else(|| lie("on a mount that is not there"))?;
        if !self.table.is_hidden(m) {
            return Ok((self.roots.get(&m.ns).ok_or(Error::Gone)?.as_fd(), path));
        }
        let mount = self.mounts.get(&id).ok_or(Error::Gone)?.as_fd();
        Ok((mount, below(path, &m.point).ok_or_else(|| lie("not below its mount"))?))
    }
}

/// Reads the images of all mount namespaces; the first is the root task's.
pub fn read(opts: &Options, images: &Images, namespaces: &[u32]) -> Result<Table> {
    let mut table = Table::default();
    for &ns in namespaces {
        let entries: Vec<MntEntry> = images.read_entries(ImageKind::Mnts, ns)?;
        let mut mounts = Vec::with_capacity(entries.len());
        for e in &entries {
            let mut m = Mount::from_entry(ns, e)?;
            if let Some(context) = &opts.lsm_mount_context {
                m.options = with_context(&m.options, context.as_bytes());
            }
            mounts.push(m);
        }
        table.add(ns, mounts)?;
    }
    table.validate()?;
    for m in &table.mounts {
        outside(opts, m)?;
    }
    Ok(table)
}

/// Where a mount from outside is found; none if it is not from there.
fn outside(opts: &Options, m: &Mount) -> Result<Option<Vec<u8>>> {
    let Some(key) = m.outside() else { return Ok(None) };
    let point = String::from_utf8_lossy(&m.point);
    if key == AUTODETECTED {
        if !opts.autodetect_ext_mounts {
            return Err(Error::Usage {
                what: format!(
                    "Mount {}:.{point} is autodetected external mount. Try \"--ext-mount-map auto\" to allow them.",
                    m.id
                ),
            });
        }
        return Ok(Some(m.source.clone()));
    }
    match opts.external_value(&format!("mnt[{}]", String::from_utf8_lossy(key))) {
        // CRIU is in the root folder by then
        Some(Some(path)) if opts.personality == Persona::Criu && !path.starts_with('/') => {
            Ok(Some(format!("/{path}").into_bytes()))
        }
        Some(Some(path)) => Ok(Some(path.as_bytes().to_vec())),
        _ => Err(Error::Usage { what: format!("No mapping for {}:.{point} mountpoint", m.id) }),
    }
}

/// Replaces the label of a file system, if it has one.
fn with_context(options: &[u8], context: &[u8]) -> Vec<u8> {
    let replaced = split_options(options).into_iter().map(|option| {
        if option.starts_with(b"context=") {
            [b"context=\"", context, b"\""].concat()
        } else {
            option.to_vec()
        }
    });
    replaced.collect::<Vec<_>>().join(&b","[..])
}

/// Makes all mounts of all namespaces.
pub fn make(opts: &Options, images: &Images, table: Table, owners: &Owners) -> Result<Made> {
    let root = match (&opts.root, opts.personality) {
        (Some(root), _) => root.clone(),
        (None, Persona::Standstill) => "/".into(),
        (None, Persona::Criu) => {
            return Err(Error::Usage { what: "The --root option is required to restore a mount namespace".into() })
        }
    };
    let mut masters = HashMap::new();
    let groups = groups(&table)?;
    for group in groups.iter().filter(|g| g.master != 0 && g.parent.is_none()) {
        if let std::collections::hash_map::Entry::Vacant(free) = masters.entry(group.master) {
            let m = group.mounts.first().and_then(|&at| table.mounts.get(at)).ok_or(Error::Gone)?;
            let path = match table.wider(m).find(|o| o.outside().is_some()) {
                Some(external) => outside(opts, external)?.ok_or(Error::Gone)?,
                None => root.as_os_str().as_encoded_bytes().to_vec(),
            };
            free.insert(mount_of(&path).at(place(&path))?);
        }
    }
    mount::apart(|| {
        let own = rustix::fs::open(c"/proc/thread-self", FOLDER, Mode::empty()).call("open(/proc/thread-self)")?;
        let mut maker = Maker {
            opts,
            images,
            table: &table,
            owners,
            root: root.as_os_str().as_encoded_bytes().to_vec(),
            yard: None,
            origins: HashMap::new(),
            made: HashMap::new(),
            deleted: Vec::new(),
            terminals: Terminals::default(),
        };
        mount::enter_private_copy()?;
        maker.clones()?;
        let mut result = Made::default();
        for (at, &ns) in table.namespaces.iter().enumerate() {
            let namespace = match owners.mounts.get(at) {
                Some(given) => {
                    mount::enter(given.as_fd())?;
                    mount::make_private()?;
                    given.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?
                }
                None => {
                    mount::enter_private_copy()?;
                    let read = OFlags::RDONLY | OFlags::CLOEXEC;
                    rustix::fs::openat(&own, c"ns/mnt", read, Mode::empty()).call("open(ns/mnt)")?
                }
            };
            result.namespaces.insert(ns, namespace);
            result.roots.insert(ns, maker.assemble(ns)?);
        }
        maker.share(&groups, &masters, &result.namespaces)?;
        maker.settle(&result.namespaces)?;
        result.mounts = maker.made;
        let is_read_only = |m: &Mount| m.kind == Fstype::Tmpfs && m.sb_flags & libc::MS_RDONLY as u32 != 0;
        for (&at, source) in &maker.origins {
            let m = table.mounts.get(at).ok_or(Error::Gone)?;
            if is_read_only(m) && source.is_new {
                result.writable.push(at);
            }
        }
        result.sources = maker.origins;
        result.terminals = maker.terminals;
        result.table = table.clone();
        Ok(result)
    })
}

fn place(path: &[u8]) -> Place {
    use std::os::unix::ffi::OsStrExt;
    Place::Path(std::ffi::OsStr::from_bytes(path).into())
}

fn on<T>(m: &Mount, result: Result<T>) -> Result<T> {
    result.map_err(|e| Error::In { place: Place::Path(m.shown().into()), source: Box::new(e) })
}

/// The root of the mount of ours that a path is on.
fn mount_of(path: &[u8]) -> Result<OwnedFd> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).call("open")?;
    let id = mount::id_of(fd.as_fd())?;
    let mut buffer = Vec::new();
    proc::read_proc(std::path::Path::new("/proc/self/mountinfo"), &mut buffer).call("read(mountinfo)")?;
    let found = mountinfo::parse(&buffer)?.into_iter().find(|m| u64::try_from(m.id) == Ok(id)).ok_or(Error::Gone)?;
    rustix::fs::open(found.mount_point.as_slice(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).call("open")
}

/// An origin on the yard.
#[derive(Debug)]
struct Source {
    fd: OwnedFd,
    root: Vec<u8>,
    /// We have made the file system.
    is_new: bool,
}

struct Maker<'m> {
    opts: &'m Options,
    images: &'m Images,
    table: &'m Table,
    owners: &'m Owners,
    root: Vec<u8>,
    yard: Option<OwnedFd>,
    origins: HashMap<usize, Source>,
    made: HashMap<u32, OwnedFd>,
    /// Names that were made for deleted roots: a folder, the name in it, whether it is a folder.
    deleted: Vec<(OwnedFd, Vec<u8>, bool)>,
    terminals: Terminals,
}

impl Maker<'_> {
    /// Makes all mounts, each apart from the others.
    fn clones(&mut self) -> Result<()> {
        let yard = new_fs(b"tmpfs", b"yard", &[], 0, None)?;
        let here = rustix::fs::open(c"/", FOLDER, Mode::empty()).call("open(/)")?;
        mount::attach(yard.as_fd(), here.as_fd())?;
        self.yard = Some(yard);
        for (ns, kind) in &self.owners.others {
            nix::sched::setns(ns, *kind).call("setns")?;
        }
        let table = self.table;
        for &ns in &table.namespaces {
            let mut waiting = vec![table.root(ns).ok_or(Error::Gone)?];
            while let Some(m) = waiting.pop() {
                let fd = on(m, self.one(m))?;
                self.made.insert(m.id, fd);
                waiting.extend(table.children(m));
            }
        }
        Ok(())
    }

    /// A mount, attached nowhere.
    fn one(&mut self, m: &Mount) -> Result<OwnedFd> {
        let origin = origin_of(self.table, m)?;
        if !self.origins.contains_key(&origin.mount()) {
            let source = self.origin(&origin)?;
            self.origins.insert(origin.mount(), source);
        }
        let source = self.origins.get(&origin.mount()).ok_or(Error::Gone)?;
        let rest = below(&m.root, &source.root).ok_or(Error::Gone)?;
        let is_terminal = matches!(origin, Origin::New(_)) && self.terminals.make(m, rest, source.fd.as_fd())?;
        if m.deleted && !is_terminal {
            let made = self.make_deleted(m, source, rest)?;
            self.deleted.extend(made);
        }
        let source = self.origins.get(&origin.mount()).ok_or(Error::Gone)?;
        let fd = if rest.is_empty() {
            mount::clone_tree(source.fd.as_fd(), b"").call("open_tree(OPEN_TREE_CLONE)")?
        } else {
            let inside = inside(source.fd.as_fd(), rest).at(place(&m.root))?;
            mount::clone_tree(inside.as_fd(), b"").call("open_tree(OPEN_TREE_CLONE)")?
        };
        mount::set_propagation(fd.as_fd(), propagation::PRIVATE, false)?;
        let (set, clear) = attributes(m.flags);
        mount::set_attributes(fd.as_fd(), set, clear)?;
        Ok(fd)
    }

    /// Puts an origin on the yard.
    fn origin(&self, origin: &Origin) -> Result<Source> {
        let m = self.table.mounts.get(origin.mount()).ok_or(Error::Gone)?;
        let outer = |path: &[u8]| {
            let fd =
                rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).call("open").at(place(path))?;
            mount::clone_tree(fd.as_fd(), b"").call("open_tree(OPEN_TREE_CLONE)").at(place(path))
        };
        let fd = match origin {
            Origin::Top(_) => outer(&self.root)?,
            Origin::Outside(_) => outer(&outside(self.opts, m)?.ok_or(Error::Gone)?)?,
            Origin::New(_) => self.new_fs(m)?,
        };
        mount::set_propagation(fd.as_fd(), propagation::PRIVATE, false)?;
        let spot = self.spot(&m.id.to_string(), is_folder(fd.as_fd())?)?;
        mount::attach(fd.as_fd(), spot.as_fd())?;
        if let Origin::New(_) = origin {
            self.fill(m, fd.as_fd())?;
        }
        Ok(Source { fd, root: m.root.clone(), is_new: matches!(origin, Origin::New(_)) })
    }

    /// A new name on the yard.
    fn spot(&self, name: &str, folder: bool) -> Result<OwnedFd> {
        let yard = self.yard.as_ref().ok_or(Error::Gone)?;
        if folder {
            rustix::fs::mkdirat(yard, name, Mode::RWXU).call("mkdirat")?;
        } else {
            rustix::fs::mknodat(yard, name, FileType::RegularFile, Mode::RUSR, 0).call("mknodat")?;
        }
        rustix::fs::openat(yard, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).call("openat")
    }

    /// Mounts a file system anew.
    fn new_fs(&self, m: &Mount) -> Result<OwnedFd> {
        let name = if m.kind == Fstype::Auto { m.fs_name.as_slice() } else { name_of(m.kind) };
        let mut source = m.source.clone();
        if m.external.as_deref() == Some(EXTERNAL_DEVICE) {
            let key = String::from_utf8_lossy(&m.source).into_owned();
            match self.opts.external_value(&key) {
                Some(Some(path)) => source = path.as_bytes().to_vec(),
                _ => return Err(Error::Usage { what: format!("No {key} external device: add --external {key}:PATH") }),
            }
        }
        let options: Vec<&[u8]> = split_options(&m.options).into_iter().filter(|o| *o != b"newinstance").collect();
        // what is filled becomes read-only afterwards; what others have too does not
        let keep = if m.kind == Fstype::Tmpfs || is_shared(m.kind) { 0 } else { m.sb_flags };
        let pids = self.owners.pids.as_ref().filter(|_| m.kind == Fstype::Proc);
        if options.iter().any(|o| o.len() > LONGEST) || source.len() > LONGEST {
            let spot = self.spot(&format!("{}-place", m.id), true)?;
            let path = crate::files::magic_link(spot.as_fd());
            let data = std::ffi::CString::new(options.join(&b","[..])).map_err(|_| Error::Gone)?;
            let flags = MountFlags::from_bits_retain(keep);
            rustix::mount::mount(source.as_slice(), &path, name, flags, Some(data.as_c_str())).call("mount")?;
            let yard = self.yard.as_ref().ok_or(Error::Gone)?;
            let made = rustix::fs::openat(yard, format!("{}-place", m.id), FOLDER, Mode::empty()).call("openat")?;
            return mount::clone_tree(made.as_fd(), b"").call("open_tree(OPEN_TREE_CLONE)");
        }
        new_fs(name, &source, &options, keep, pids.map(AsFd::as_fd))
    }

    /// What is in it.
    fn fill(&self, m: &Mount, fd: BorrowedFd<'_>) -> Result<()> {
        if m.kind != Fstype::Tmpfs {
            return Ok(());
        }
        if !tmpfs::restore(self.images, m.dev, m.id, fd)? {
            return Err(Error::lie("tmpfs-dev.tar.gz.img", format!("there is none for device {:#x}", m.dev)));
        }
        Ok(())
    }

    /// Makes the name of a deleted root for a moment, a folder or a file like the place that it is mounted on.
    fn make_deleted(&self, m: &Mount, source: &Source, rest: &[u8]) -> Result<Vec<(OwnedFd, Vec<u8>, bool)>> {
        let parent = self.table.by_id(m.parent).ok_or(Error::Gone)?;
        let on = self.made.get(&parent.id).ok_or(Error::Gone)?;
        let rel = below(&m.point, &parent.point).ok_or(Error::Gone)?;
        let folder = rel.is_empty() || is_folder(inside(on.as_fd(), rel)?.as_fd())?;
        let parts: Vec<&[u8]> = rest.split(|&b| b == b'/').filter(|p| !p.is_empty()).collect();
        let mut at = source.fd.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?;
        let mut made = Vec::new();
        for (n, part) in parts.iter().enumerate() {
            let last = n + 1 == parts.len();
            let is_dir = !last || folder;
            let result = if is_dir {
                rustix::fs::mkdirat(&at, *part, Mode::RWXU)
            } else {
                rustix::fs::mknodat(&at, *part, FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0)
            };
            match result {
                Ok(()) => made.push((at.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?, part.to_vec(), is_dir)),
                Err(rustix::io::Errno::EXIST) if !last => {}
                Err(e) => return Err(e).call("mkdirat").at(place(&m.root)),
            }
            if !last {
                at = inside(at.as_fd(), part)?;
            }
        }
        Ok(made)
    }

    /// Puts the tree of a namespace together, and leaves the old root.
    fn assemble(&self, ns: u32) -> Result<OwnedFd> {
        let top = self.table.root(ns).ok_or(Error::Gone)?;
        let root = self.made.get(&top.id).ok_or(Error::Gone)?;
        let old = rustix::fs::open(c"/", FOLDER, Mode::empty()).call("open(/)")?;
        mount::attach(root.as_fd(), old.as_fd())?;
        let mut waiting = vec![top];
        while let Some(parent) = waiting.pop() {
            let on_it = self.table.children(parent);
            for m in &on_it {
                on(m, self.place(parent, m))?;
            }
            waiting.extend(on_it);
        }
        rustix::process::fchdir(root).call("fchdir")?;
        rustix::process::pivot_root(c".", c".").call("pivot_root")?;
        // the old root is on top of ours now, with what was on top of it
        let mut highest = top;
        while let Some(next) = self.table.children(highest).into_iter().find(|m| m.point == highest.point) {
            highest = next;
        }
        let wanted = mount::id_of(self.made.get(&highest.id).ok_or(Error::Gone)?.as_fd())?;
        loop {
            // a way up at the root leads to what is on top of it
            let up = rustix::fs::open(c"/..", FOLDER, Mode::empty()).call("open(/..)")?;
            if mount::id_of(up.as_fd())? == wanted {
                break;
            }
            rustix::mount::unmount(c".", UnmountFlags::DETACH).call("umount2(MNT_DETACH)")?;
        }
        rustix::fs::open(c"/", FOLDER, Mode::empty()).call("open(/)")
    }

    fn place(&self, parent: &Mount, m: &Mount) -> Result<()> {
        let on = self.made.get(&parent.id).ok_or(Error::Gone)?;
        let fd = self.made.get(&m.id).ok_or(Error::Gone)?;
        let rest = below(&m.point, &parent.point).ok_or(Error::Gone)?;
        if rest.is_empty() {
            return mount::attach(fd.as_fd(), on.as_fd());
        }
        let spot = inside(on.as_fd(), rest)?;
        mount::attach(fd.as_fd(), spot.as_fd())
    }

    /// Gives groups their peers and masters.
    fn share(
        &self,
        groups: &[Group],
        masters: &HashMap<u32, OwnedFd>,
        namespaces: &HashMap<u32, OwnedFd>,
    ) -> Result<()> {
        let get = |at: usize| {
            let m = self.table.mounts.get(at).ok_or(Error::Gone)?;
            Ok::<_, Error>((m, self.made.get(&m.id).ok_or(Error::Gone)?.as_fd()))
        };
        for group in groups {
            let mut ready: Vec<usize> = Vec::new();
            for &at in &group.mounts {
                let (m, fd) = get(at)?;
                let peer = ready.iter().copied().find(|&r| can_copy(&self.table.mounts[r], m));
                if let Some(peer) = peer {
                    on(m, mount::copy_sharing(get(peer)?.1, fd))?;
                    ready.push(at);
                    continue;
                }
                if !ready.is_empty() && (group.shared != 0 || group.parent.is_some()) {
                    return Err(Error::refused(
                        format!("{}, a peer of mounts whose roots do not contain its own,", m.shown()),
                        "make one of them private before the dump",
                    ));
                }
                mount::enter(namespaces.get(&m.ns).ok_or(Error::Gone)?.as_fd())?;
                on(m, self.begin_group(group, groups, masters, m, fd))?;
                ready.push(at);
            }
        }
        Ok(())
    }

    /// The first mount of a group.
    fn begin_group(
        &self,
        group: &Group,
        groups: &[Group],
        masters: &HashMap<u32, OwnedFd>,
        m: &Mount,
        fd: BorrowedFd<'_>,
    ) -> Result<()> {
        if group.master != 0 {
            let from = match group.parent {
                Some(parent) => {
                    let masters = &groups.get(parent).ok_or(Error::Gone)?.mounts;
                    let wide = masters.iter().filter_map(|&at| self.table.mounts.get(at)).find(|o| can_copy(o, m));
                    let wide = wide.ok_or_else(|| {
                        Error::refused(
                            format!("{}, a slave of mounts whose roots do not contain its own,", m.shown()),
                            "make it private before the dump",
                        )
                    })?;
                    self.made.get(&wide.id).ok_or(Error::Gone)?.as_fd()
                }
                None => masters.get(&group.master).ok_or(Error::Gone)?.as_fd(),
            };
            mount::copy_sharing(from, fd)?;
            mount::set_propagation(fd, propagation::SLAVE, false)?;
        }
        if group.shared != 0 {
            mount::set_propagation(fd, propagation::SHARED, false)?;
        }
        Ok(())
    }

    /// What could be done only when nothing is bound any more.
    fn settle(&self, namespaces: &HashMap<u32, OwnedFd>) -> Result<()> {
        for m in self.table.mounts.iter().filter(|m| m.flags & UNBINDABLE != 0) {
            mount::enter(namespaces.get(&m.ns).ok_or(Error::Gone)?.as_fd())?;
            let fd = self.made.get(&m.id).ok_or(Error::Gone)?;
            on(m, mount::set_propagation(fd.as_fd(), propagation::UNBINDABLE, false))?;
        }
        for (folder, name, is_dir) in self.deleted.iter().rev() {
            let flags = if *is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rustix::fs::unlinkat(folder, name.as_slice(), flags).call("unlinkat").at(place(name))?;
        }
        Ok(())
    }
}

fn read_only(fs: BorrowedFd<'_>) -> Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let picked = rustix::mount::fspick(fs, c"", flags).call("fspick")?;
    rustix::mount::fsconfig_set_flag(picked.as_fd(), c"ro").call("fsconfig(ro)")?;
    rustix::mount::fsconfig_reconfigure(picked.as_fd()).call("fsconfig(FSCONFIG_CMD_RECONFIGURE)")
}

/// A place in a mount, not in one that is on it.
fn inside(mount: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(mount, path, flags, Mode::empty(), resolve).call("openat2").at(place(path))
}

fn is_folder(fd: BorrowedFd<'_>) -> Result<bool> {
    let stat = rustix::fs::statat(fd, c"", AtFlags::EMPTY_PATH).call("fstatat")?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// File systems that exist once for all, or once for a namespace.
fn is_shared(kind: Fstype) -> bool {
    match kind {
        Fstype::Sysfs
        | Fstype::Devtmpfs
        | Fstype::BinfmtMisc
        | Fstype::Pstore
        | Fstype::Securityfs
        | Fstype::Fusectl
        | Fstype::Debugfs
        | Fstype::Tracefs
        | Fstype::Cgroup
        | Fstype::Cgroup2
        | Fstype::Mqueue => true,
        Fstype::Unsupported
        | Fstype::Proc
        | Fstype::Tmpfs
        | Fstype::Devpts
        | Fstype::Simfs
        | Fstype::Aufs
        | Fstype::Fuse
        | Fstype::Auto
        | Fstype::Overlayfs
        | Fstype::Autofs => false,
    }
}

/// Mounts a file system; `pids` is the PID namespace of a proc.
fn new_fs(name: &[u8], source: &[u8], options: &[&[u8]], flags: u32, pids: Option<BorrowedFd<'_>>) -> Result<OwnedFd> {
    let fs = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC).call("fsopen")?;
    let fs = fs.as_fd();
    if !source.is_empty() {
        rustix::mount::fsconfig_set_string(fs, c"source", source).call("fsconfig(source)")?;
    }
    if let Some(pids) = pids {
        rustix::mount::fsconfig_set_fd(fs, c"pidns", pids).call("fsconfig(pidns)")?;
    }
    for option in options {
        let set = match option.iter().position(|&b| b == b'=') {
            Some(at) => rustix::mount::fsconfig_set_string(fs, &option[..at], unquoted(&option[at + 1..])),
            None => rustix::mount::fsconfig_set_flag(fs, *option),
        };
        set.call("fsconfig").at(place(option))?;
    }
    for (name, flag) in SUPER_FLAGS {
        if flags & flag != 0 {
            rustix::mount::fsconfig_set_flag(fs, name).call("fsconfig").at(place(name))?;
        }
    }
    rustix::mount::fsconfig_create(fs).call("fsconfig(FSCONFIG_CMD_CREATE)")?;
    rustix::mount::fsmount(fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).call("fsmount")
}

/// A label stands in quotes where the kernel shows it.
fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value)
}

/// MOUNT_ATTR_* to set and to clear for flags of mount(2).
fn attributes(flags: u32) -> (u64, u64) {
    const PAIRS: [(u64, u32); 6] = [
        (0x1, libc::MS_RDONLY as u32),
        (0x2, libc::MS_NOSUID as u32),
        (0x4, libc::MS_NODEV as u32),
        (0x8, libc::MS_NOEXEC as u32),
        (0x80, libc::MS_NODIRATIME as u32),
        (0x20_0000, 256),
    ];
    const NOATIME: u64 = 0x10;
    const STRICTATIME: u64 = 0x20;
    const ATIME: u64 = 0x70;
    let (mut set, mut clear) = (0, ATIME);
    for (attribute, flag) in PAIRS {
        if flags & flag != 0 {
            set |= attribute;
        } else {
            clear |= attribute;
        }
    }
    if flags & libc::MS_NOATIME as u32 != 0 {
        set |= NOATIME;
    } else if flags & libc::MS_STRICTATIME as u32 != 0 {
        set |= STRICTATIME;
    }
    (set, clear)
}
