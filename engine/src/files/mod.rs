//! Descriptors: what a task has open, how that goes into images, and how it comes back.
//!
//! One file a kind. Each has a `dump` that turns a [`Descriptor`] into a file entry, and an `open` that turns the entry
//! into a descriptor of the engine's own, which the tasks then inherit. What only a task itself can do, with its own
//! numbers, ids or clocks, is left to `in_task`, which adds operations to the plan of the first task that has the file.
//!
//! Images: `files.img` (one [`FileEntry`] an open file), `fdinfo-N.img` (the numbers of one descriptor table), and those
//! that the kinds name themselves.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use standstill_images::proto::{FdTypes, FdinfoEntry, FileEntry, FownEntry, InetSkEntry};
use standstill_images::{ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::guard::{Act, Guard, List};
use crate::namespaces::user::Users;
use crate::network::doors::{Doors, Inside};
use crate::options::Options;
use crate::plan::Plan;
use crate::proc::fdinfo::{self, FdDetail, FdInfo};
use crate::sys::calls;
use crate::tasks::pids::{Hosts, Inner};

mod devices;
pub mod epoll;
pub mod eventfd;
pub mod fanotify;
pub mod fifo;
pub mod fsnotify;
pub mod ghost;
pub mod inotify;
pub mod io_uring;
mod lease;
pub mod locks;
pub mod memfd;
pub mod mqueue;
pub mod nsfile;
mod paths;
pub mod pidfd;
pub mod pipe;
pub mod regular;
pub mod signalfd;
mod sparse;
#[cfg(test)]
mod testing;
pub mod timerfd;
pub mod tty;
pub mod tun;
mod validate;

use crate::sockets;

/// One descriptor of a task that is being dumped.
#[derive(Debug)]
pub struct Descriptor {
    /// The task, in our pid namespace.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// The same open file, in our hands (pidfd_getfd(2)). Reading from it takes from the program: peek only.
    pub copy: OwnedFd,
    /// What /proc/PID/fd/N points to, with " (deleted)" as the kernel prints it.
    pub link: Vec<u8>,
    /// /proc/PID/fdinfo/N.
    pub info: FdInfo,
    /// fstat(2) of it.
    pub stat: rustix::fs::Stat,
    /// Its status and access flags (F_GETFL).
    pub flags: u32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// Who gets SIGIO.
    pub fown: FownEntry,
}

impl Descriptor {
    /// Reads all there is to know about descriptor `fd` of `pid`, from outside.
    pub fn read(pid: i32, pidfd: BorrowedFd<'_>, fd: i32, buffer: &mut Vec<u8>) -> Result<Descriptor> {
        let link = rustix::fs::readlink(format!("/proc/{pid}/fd/{fd}"), Vec::new())
            .call("readlink(/proc/PID/fd/N)")?
            .into_bytes();
        let mut read = || -> Result<FdInfo> {
            let path = format!("/proc/{pid}/fdinfo/{fd}");
            crate::proc::read_proc(path.as_ref(), buffer).call("read(/proc/PID/fdinfo/N)")?;
            Ok(fdinfo::parse(buffer)?)
        };
        let mut info = read()?;
        // of a ring that it has locked for something of its own, the kernel says nothing (io_uring/fdinfo.c)
        for _ in 0..100 {
            if link != io_uring::LINK || matches!(info.detail, FdDetail::IoUring(_)) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            info = read()?;
        }
        let copy = calls::pidfd_getfd(pidfd, fd)?;
        let stat = rustix::fs::fstat(&copy).call("fstat")?;
        let cloexec = info.flags & libc::O_CLOEXEC as u32 != 0;
        let flags = info.flags & !(libc::O_CLOEXEC as u32);
        let fown = if flags & libc::O_PATH as u32 != 0 { no_owner() } else { calls::file_owner(copy.as_fd())? };
        Ok(Descriptor { pid, fd, copy, link, info, stat, flags, cloexec, fown })
    }

    /// It is no task's, but was in a message that nobody received yet: the engine has it.
    pub fn in_flight(&self) -> bool {
        u32::try_from(self.pid) == Ok(std::process::id())
    }

    /// A refusal of this descriptor, by kind.
    pub fn refused(&self, kind: &str, advice: &'static str) -> Error {
        Error::refused(format!("{kind} ({})", String::from_utf8_lossy(&self.link)), advice)
    }
}

/// Nobody gets SIGIO.
pub fn no_owner() -> FownEntry {
    FownEntry { uid: 0, euid: 0, signum: 0, pid_type: 0, pid: 0 }
}

/// What open files of a dump have in common: ids, sameness, and the images they go to.
#[derive(Debug)]
pub struct DumpFiles<'a> {
    /// What the caller asked for.
    pub opts: &'a Options,
    /// Where images go.
    pub images: &'a Images,
    /// All tasks of the tree.
    pub tree: Vec<i32>,
    /// How the tree sees their ids.
    pub pids: Inner,
    /// How it sees the ids of users.
    pub users: Users,
    /// Sockets, pipes … by what a kind must remember: each its own.
    pub pipes: pipe::Dumped,
    /// Regular files that others map or have open, ghosts, remaps.
    pub regular: regular::Dumped,
    /// FIFOs by their inode.
    pub fifos: fifo::Dumped,
    /// memfd inodes.
    pub memfds: memfd::Dumped,
    /// Unix sockets.
    pub unix: sockets::unix::Dumped,
    /// What keeps packets away from connections.
    pub lock: sockets::netlock::Lock,
    /// Internet sockets.
    pub inet: sockets::inet::Dumped,
    /// Packet sockets.
    pub packet: sockets::packet::Dumped,
    /// Terminals.
    pub ttys: tty::Dumped,
    /// Files of tun links.
    pub tuns: tun::Dumped,
    /// Locks.
    pub locks: locks::Dumped,
    /// Memory of the tree is under the watch of an earlier pass of ours.
    pub memory_is_tracked: bool,
    /// What inotify and fanotify watch.
    pub fsnotify: fsnotify::Dumped,
    /// Rings.
    pub io_uring: io_uring::Dumped,
    /// Segments of System V shared memory.
    pub sysv: crate::memory::sysv::Dumped,
    /// POSIX message queues.
    pub mqueues: mqueue::Dumped,
    /// Id of the IPC namespace that they are in.
    pub ipc_ns: u32,
    /// Id of the network namespace that the last socket was in, at first that of the tree's root (as in the ids image).
    pub net_ns: u32,
    /// Network namespaces: ours, and those of the tree.
    pub networks: Rc<Doors>,
    /// Undoes what is changed outside of the engine, should that die.
    pub guard: Option<&'a Guard<'a>>,
    /// Mounts of the tree, if it has a namespace of its own.
    pub mounts: Option<crate::mounts::dump::Mounts>,
    entries: Vec<FileEntry>,
    next: u32,
    pages: u32,
    same: HashMap<SameKey, Vec<(i32, i32, u32, FdTypes)>>,
}

/// Open files that may be the same: compared with kcmp(2) only within a key.
type SameKey = (u64, u64, u32, u32, i64);

impl<'a> DumpFiles<'a> {
    /// No files yet.
    pub fn new(opts: &'a Options, images: &'a Images, tree: Vec<i32>, net_ns: u32) -> DumpFiles<'a> {
        DumpFiles {
            opts,
            images,
            tree,
            pids: Inner::default(),
            users: Users::default(),
            pipes: Default::default(),
            regular: Default::default(),
            fifos: Default::default(),
            memfds: Default::default(),
            unix: Default::default(),
            lock: sockets::netlock::Lock::new(opts.network_lock, ""),
            inet: Default::default(),
            packet: Default::default(),
            ttys: Default::default(),
            tuns: Default::default(),
            locks: Default::default(),
            memory_is_tracked: false,
            fsnotify: Default::default(),
            io_uring: Default::default(),
            sysv: Default::default(),
            mqueues: Default::default(),
            ipc_ns: 0,
            net_ns,
            networks: Rc::new(Doors::ours(net_ns)),
            guard: None,
            mounts: None,
            entries: Vec::new(),
            next: 1,
            pages: 0,
            same: HashMap::new(),
        }
    }

    /// A new file id.
    pub fn new_id(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    /// The number of a new `pages-N.img`.
    pub fn next_pages_id(&mut self) -> u32 {
        self.pages += 1;
        self.pages
    }

    /// The id of the file behind /proc/PID/exe, /proc/PID/cwd or /proc/PID/root.
    pub fn link(&mut self, pid: i32, name: &str) -> Result<u32> {
        let path = format!("/proc/{pid}/{name}");
        let target =
            rustix::fs::readlink(&path, Vec::new()).call("readlink").at(Place::Path(path.clone().into()))?.into_bytes();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let file =
            rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).call("open").at(Place::Path(path.into()))?;
        let stat = rustix::fs::fstat(&file).call("fstat")?;
        regular::mapped(self, file, &target, &stat)
    }

    /// Undoes what only makes sense for tasks that are killed: names that were made for files without one.
    pub fn tasks_go_on(&mut self) -> Result<()> {
        self.lock.lift()?;
        self.inet.tasks_go_on()?;
        regular::tasks_go_on(self)
    }

    /// Will [`DumpFiles::finish`] change something about sockets for a while?
    pub fn changes_sockets(&self) -> bool {
        self.lock.is_of_namespace() || !self.inet.connections().is_empty() || self.unix.has_queues()
    }

    /// Gets ready to keep packets away from connections, if there are some or may be some in flight.
    pub fn prepare_lock(&mut self, guard: &Guard<'_>) -> Result<()> {
        let may_be_some = self.opts.tcp_established && self.unix.has_queues();
        if self.lock.is_of_namespace() || !self.inet.connections().is_empty() || may_be_some {
            self.lock.prepare(guard)?;
        }
        Ok(())
    }

    /// Keeps these names: the images are complete and the tasks are about to end. Without this they go with `self`.
    pub fn tasks_end(&mut self) {
        regular::tasks_end(self);
        self.lock.keep();
    }

    /// Adds an entry to `files.img`.
    pub fn add(&mut self, entry: FileEntry) {
        self.entries.push(entry);
    }

    /// Can this file only be opened at restore when all tasks are there?
    pub fn opens_late(&self, id: u32) -> bool {
        let late = |e: &FileEntry| {
            pidfd::opens_late(e) || io_uring::opens_late(e) || e.reg.as_ref().is_some_and(regular::is_of_task)
        };
        self.entries.iter().any(|e| e.id == id && late(e))
    }

    /// The entry of an internet socket says something else by now.
    pub fn inet_changed(&mut self, now: &InetSkEntry) {
        if let Some(entry) = self.entries.iter_mut().find(|e| e.id == now.id) {
            entry.isk = Some(now.clone());
        }
    }

    /// What is known of a ring now that its tasks were asked.
    pub(crate) fn set_io_uring(&mut self, ring: standstill_images::proto::StandstillIoUringEntry) {
        for entry in self.entries.iter_mut().filter(|e| e.id == ring.id) {
            entry.standstill_io_uring = Some(ring.clone());
        }
    }

    /// Dumps a descriptor, or recognizes the open file that it shares with an earlier one.
    pub fn descriptor(&mut self, d: &Descriptor) -> Result<FdinfoEntry> {
        let key = (d.stat.st_dev, d.stat.st_ino, d.flags, d.stat.st_rdev as u32, d.info.pos);
        let mut known = None;
        for &(pid, fd, id, kind) in self.same.get(&key).into_iter().flatten() {
            if calls::same_file(pid, fd, d.pid, d.fd)? {
                known = Some((id, kind));
                break;
            }
        }
        let (id, kind) = match known {
            Some(known) => known,
            None => {
                let reserved = sockets::packet::reserved(d, self).or_else(|| io_uring::reserved(d, self));
                let id = reserved.unwrap_or_else(|| self.new_id());
                let entry = self.dump(d, id)?;
                let kind = entry.r#type();
                self.add(entry);
                self.same.entry(key).or_default().push((d.pid, d.fd, id, kind));
                (id, kind)
            }
        };
        let fd = u32::try_from(d.fd).unwrap_or(u32::MAX);
        Ok(FdinfoEntry { id, flags: u32::from(d.cloexec), r#type: kind as i32, fd, xattr_security_selinux: None })
    }

    /// Dispatches by what the descriptor is.
    fn dump(&mut self, d: &Descriptor, id: u32) -> Result<FileEntry> {
        use rustix::fs::FileType;
        let path_only = d.flags & libc::O_PATH as u32 != 0;
        match FileType::from_raw_mode(d.stat.st_mode) {
            FileType::Socket if d.link.starts_with(b"socket:[") => sockets::dump(d, id, self),
            FileType::Fifo if d.link.starts_with(b"pipe:[") => pipe::dump(d, id, self),
            FileType::Fifo if !path_only => fifo::dump(d, id, self),
            FileType::CharacterDevice if !path_only && tty::is_tty(d.stat.st_rdev) => tty::dump(d, id, self),
            FileType::CharacterDevice if !path_only && tun::is_one(&d.stat) => tun::dump(d, id, self),
            FileType::RegularFile if memfd::is_one(&d.link, &d.stat) => memfd::dump(d, id, self),
            FileType::RegularFile if !path_only && mqueue::is_one(d) => mqueue::dump(d, id, self),
            FileType::RegularFile
            | FileType::Directory
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Fifo
            | FileType::Symlink
            | FileType::Socket
                if d.link.starts_with(b"/") || d.link.starts_with(b"(unreachable)") =>
            {
                regular::dump(d, id, self)
            }
            _ => match d.link.as_slice() {
                b"anon_inode:[eventfd]" => eventfd::dump(d, id, self),
                b"anon_inode:[eventpoll]" => epoll::dump(d, id, self),
                b"anon_inode:[signalfd]" => signalfd::dump(d, id, self),
                b"anon_inode:[timerfd]" => timerfd::dump(d, id, self),
                b"anon_inode:inotify" => inotify::dump(d, id, self),
                b"anon_inode:[pidfd]" => pidfd::dump(d, id, self),
                link if link.starts_with(b"pidfd:[") => pidfd::dump(d, id, self),
                io_uring::LINK => io_uring::dump(d, id, self),
                b"anon_inode:[userfaultfd]" => {
                    Err(d.refused("a userfaultfd", "end the program's userfaultfd handling before the dump"))
                }
                b"anon_inode:[fanotify]" => fanotify::dump(d, id, self),
                b"anon_inode:[perf_event]" => Err(d.refused("a perf event", "end the profiling before the dump")),
                b"anon_inode:bpf-map" | b"anon_inode:bpf-prog" | b"anon_inode:bpf_link" => {
                    Err(d.refused("a BPF object", "close it before the dump"))
                }
                link if nsfile::kind_of(link).is_some() => nsfile::dump(d, id, self),
                _ => Err(d.refused("a descriptor of an unknown kind", "close it before the dump")),
            },
        }
    }

    /// Writes `files.img` and what the kinds kept for the end.
    pub fn finish(&mut self) -> Result<()> {
        sockets::unix::finish(self)?;
        sockets::inet::finish(self)?;
        pipe::finish(self)?;
        fifo::finish(self)?;
        memfd::finish(self)?;
        tty::finish(self)?;
        locks::finish(self)?;
        regular::finish(self)?;
        crate::memory::sysv::finish(self)?;
        mqueue::finish(self)?;
        let entries = sockets::unix::peers_first(std::mem::take(&mut self.entries));
        self.images.write_entries(ImageKind::Files, (), entries)?;
        Ok(())
    }
}

/// What open files of a restore have in common.
#[derive(Debug)]
pub struct RestoreFiles<'a> {
    /// What the caller asked for.
    pub opts: &'a Options,
    /// Where images come from.
    pub images: &'a Images,
    /// Which ids the processes of the tree have with us.
    pub hosts: Hosts,
    /// Which ids its users have with us.
    pub users: Users,
    /// Entries of `files.img`, by id.
    pub entries: HashMap<u32, FileEntry>,
    /// Open files, by id, as far as they are open.
    pub opened: BTreeMap<u32, OwnedFd>,
    /// Leases that the engine takes for tasks.
    pub leases: RefCell<Vec<locks::Held>>,
    /// Pipes by their id.
    pub pipes: pipe::Restored,
    /// Ghosts and remaps.
    pub regular: regular::Restored,
    /// FIFOs by their id.
    pub fifos: fifo::Restored,
    /// memfd inodes.
    pub memfds: memfd::Restored,
    /// Unix sockets.
    pub unix: sockets::unix::Restored,
    /// Internet sockets.
    pub inet: sockets::inet::Restored,
    /// Terminals.
    pub ttys: tty::Restored,
    /// Locks.
    pub locks: locks::Restored,
    /// Marks of fanotify.
    pub fanotify: fanotify::Restored,
    /// Who makes rings.
    pub io_uring: io_uring::Restored,
    /// Segments of System V shared memory.
    pub sysv: crate::memory::sysv::Restored,
    /// POSIX message queues.
    pub mqueues: mqueue::Restored,
    /// Network namespaces: ours, and those of the tree.
    pub networks: Rc<Doors>,
    /// Id of that of the tree's root.
    pub net_ns: u32,
    /// Names that must be removed if the restore fails.
    pub litter: std::cell::RefCell<Vec<PathBuf>>,
    /// Removes them, should the engine die.
    pub guard: Option<&'a Guard<'a>>,
    /// Mounts of the tree, if it has a namespace of its own.
    pub mounts: Option<crate::mounts::restore::Made>,
    /// Our /proc, as a number in the tasks: theirs need not have one, or not yet.
    pub proc_at: i32,
    opening: HashSet<u32>,
    in_flight: HashSet<u32>,
}

impl<'a> RestoreFiles<'a> {
    /// Reads `files.img`; opens nothing.
    pub fn read(opts: &'a Options, images: &'a Images) -> Result<RestoreFiles<'a>> {
        let mut entries = HashMap::new();
        for entry in images.read_entries_if_there::<FileEntry>(ImageKind::Files, ())? {
            let id = entry.id;
            if entries.insert(id, entry).is_some() {
                return Err(Error::lie("files.img", format!("file {id:#x} is there twice")));
            }
        }
        let mut files = RestoreFiles {
            opts,
            images,
            hosts: Hosts::default(),
            users: Users::default(),
            entries,
            opened: BTreeMap::new(),
            leases: RefCell::default(),
            pipes: Default::default(),
            regular: Default::default(),
            fifos: Default::default(),
            memfds: Default::default(),
            unix: Default::default(),
            inet: Default::default(),
            ttys: Default::default(),
            locks: Default::default(),
            fanotify: Default::default(),
            io_uring: Default::default(),
            sysv: Default::default(),
            mqueues: Default::default(),
            networks: Rc::new(Doors::ours(0)),
            net_ns: 0,
            litter: Default::default(),
            guard: None,
            mounts: None,
            proc_at: libc::AT_FDCWD,
            opening: HashSet::new(),
            in_flight: HashSet::new(),
        };
        regular::read(&mut files)?;
        fifo::read(&mut files)?;
        memfd::read(&mut files)?;
        pipe::read(&mut files)?;
        tty::read(&mut files)?;
        locks::read(&mut files)?;
        Ok(files)
    }

    /// The tree has ids of users of its own: owners in the entries become ours.
    pub fn set_users(&mut self, users: Users) {
        memfd::translate(&users, &mut self.memfds);
        tty::translate(&users, &mut self.ttys);
        if self.sysv.is_own() {
            self.sysv.translate(&users);
        }
        for perms in self.entries.values_mut().filter_map(|entry| entry.usk.as_mut()?.file_perms.as_mut()) {
            (perms.uid, perms.gid) = (users.outer_user(perms.uid), users.outer_group(perms.gid));
        }
        self.users = users;
    }

    /// The entry of a file.
    pub fn entry(&self, id: u32) -> Result<&FileEntry> {
        self.entries.get(&id).ok_or_else(|| Error::lie("files.img", format!("file {id:#x} is missing")))
    }

    /// Goes into the network namespace that a socket is to be in: that of the tree's root, if the image does not say.
    pub fn network(&self, id: Option<u32>) -> Result<Inside> {
        let id = id.unwrap_or(self.net_ns);
        if self.networks.are_many() && self.networks.get(id).is_none() {
            return Err(Error::lie("files.img", format!("a socket in network namespace {id}")));
        }
        self.networks.enter(id)
    }

    /// The file with this id, opened if it is not yet.
    pub fn open(&mut self, id: u32) -> Result<BorrowedFd<'_>> {
        if !self.opened.contains_key(&id) {
            if !self.opening.insert(id) {
                return Err(Error::lie("files.img", format!("file {id:#x} needs itself")));
            }
            let entry = self.entry(id)?.clone();
            let fd = self.make(&entry).at(Place::File(id))?;
            self.opening.remove(&id);
            // a socket pair or a pipe may have brought it along
            self.opened.entry(id).or_insert(fd);
        }
        self.opened.get(&id).map(AsFd::as_fd).ok_or(Error::Gone)
    }

    /// Files that are open and that no task has: they are in messages between sockets.
    pub fn in_flight(&self, tables: &HashMap<u32, Vec<FdinfoEntry>>) -> Vec<u32> {
        let had: HashSet<u32> = tables.values().flatten().map(|e| e.id).collect();
        let sent = self.opened.keys().copied().filter(|id| !had.contains(id));
        sent.filter(|id| self.entries.get(id).is_some_and(|e| !sockets::is_socket(e))).collect()
    }

    /// Has epolls in flight watch what they watched: files of the tasks, by number.
    pub fn settle_in_flight(&mut self, sent: &[u32], tables: &HashMap<u32, Vec<FdinfoEntry>>) -> Result<()> {
        for &id in sent {
            let Some(e) = self.entry(id)?.epfd.clone() else { continue };
            let mut targets = Vec::with_capacity(e.tfd.len());
            for t in &e.tfd {
                let of_number = || tables.values().flatten().filter(|f| f.fd == t.tfd).map(|f| f.id);
                let same = |id: &u32| self.entries.get(id).and_then(sockets::inode) == t.inode;
                let target = of_number().find(same).or_else(|| of_number().next());
                targets.push(target.ok_or_else(|| {
                    Error::lie("files.img", format!("epoll {id:#x} watches descriptor {}, which no task has", t.tfd))
                })?);
            }
            for &target in &targets {
                self.open(target)?;
            }
            let opened = |id: &u32| self.opened.get(id).map(AsFd::as_fd).ok_or(Error::Gone);
            let files = targets.iter().map(opened).collect::<Result<Vec<_>>>()?;
            epoll::in_flight(&e, opened(&id)?, &files).at(Place::File(id))?;
            self.in_flight.insert(id);
        }
        Ok(())
    }

    /// True for files that can be opened only when the tasks exist: below /proc/PID, and pidfds.
    pub fn opens_late(&self, id: u32) -> Result<bool> {
        let entry = self.entry(id)?;
        let of_task = pidfd::opens_late(entry) || io_uring::opens_late(entry);
        Ok(of_task || regular::opens_late(self, id) || tty::opens_late(id, self))
    }

    /// A name is about to be made that a restore which fails, or whose engine is killed, must not leave behind.
    pub fn makes_name(&self, path: PathBuf) -> Result<()> {
        if let Some(guard) = self.guard {
            guard.register(List::Undo, &Act::Remove(&path))?;
        }
        self.litter.borrow_mut().push(path);
        Ok(())
    }

    /// If the restore worked, takes away names of linked files, which were for it alone; if not, all names that it made.
    pub fn clean(&mut self, worked: bool) -> Result<()> {
        if worked {
            return regular::done(self);
        }
        remove_names(&self.litter.take());
        Ok(())
    }

    /// Dispatches by type; an entry without the part that its type promises is a lie.
    fn make(&mut self, entry: &FileEntry) -> Result<OwnedFd> {
        let id = entry.id;
        let missing = || Error::lie("files.img", format!("file {id:#x} lacks the entry of its type"));
        match entry.r#type() {
            FdTypes::Reg => regular::open(entry.reg.as_ref().ok_or_else(missing)?, self),
            FdTypes::Pipe => pipe::open(entry.pipe.as_ref().ok_or_else(missing)?, self),
            FdTypes::Fifo => fifo::open(entry.fifo.as_ref().ok_or_else(missing)?, self),
            FdTypes::Eventfd => eventfd::open(entry.efd.as_ref().ok_or_else(missing)?, self),
            FdTypes::Eventpoll => epoll::open(entry.epfd.as_ref().ok_or_else(missing)?, self),
            FdTypes::Signalfd => signalfd::open(entry.sgfd.as_ref().ok_or_else(missing)?, self),
            FdTypes::Timerfd => timerfd::open(entry.tfd.as_ref().ok_or_else(missing)?, self),
            FdTypes::Inotify => inotify::open(entry.ify.as_ref().ok_or_else(missing)?, self),
            FdTypes::Fanotify => fanotify::open(entry.ffy.as_ref().ok_or_else(missing)?, self),
            FdTypes::Pidfd => pidfd::open(entry.pidfd.as_ref().ok_or_else(missing)?, self),
            FdTypes::Memfd => memfd::open(entry.memfd.as_ref().ok_or_else(missing)?, self),
            FdTypes::Tty => tty::open(entry.tty.as_ref().ok_or_else(missing)?, self),
            FdTypes::Unixsk => sockets::unix::open(entry.usk.as_ref().ok_or_else(missing)?, self),
            FdTypes::Inetsk => sockets::inet::open(entry.isk.as_ref().ok_or_else(missing)?, self),
            FdTypes::Netlinksk => sockets::netlink::open(entry.nlsk.as_ref().ok_or_else(missing)?, self),
            FdTypes::Packetsk => sockets::packet::open(entry.psk.as_ref().ok_or_else(missing)?, self),
            FdTypes::StandstillIoUring => io_uring::open(entry.standstill_io_uring.as_ref().ok_or_else(missing)?, self),
            FdTypes::StandstillMqueue => mqueue::open(entry.standstill_mqueue.as_ref().ok_or_else(missing)?, self),
            FdTypes::Tunf => tun::open(entry.tunf.as_ref().ok_or_else(missing)?, self),
            FdTypes::Ns => nsfile::open(entry.nsf.as_ref().ok_or_else(missing)?, self),
            kind @ (FdTypes::Und | FdTypes::Ext | FdTypes::Bpfmap | FdTypes::CtlTty | FdTypes::AutofsPipe) => {
                Err(Error::refused(
                    format!("an open file of type {}", kind.as_str_name()),
                    "this kind cannot be restored yet",
                ))
            }
        }
    }

    /// Adds to `plan` what the first task that has the file, at number `fd`, must do itself once all of its
    /// descriptors are in place.
    pub fn in_task(&self, id: u32, fd: i32, plan: &mut Plan) -> Result<()> {
        let entry = self.entry(id)?;
        if let Some(e) = entry.epfd.as_ref().filter(|_| !self.in_flight.contains(&id)) {
            epoll::in_task(e, fd, plan)?;
        }
        if let Some(e) = &entry.tfd {
            timerfd::in_task(e, fd, plan)?;
        }
        if let Some(e) = &entry.sgfd {
            signalfd::in_task(e, fd, plan)?;
        }
        if let Some(e) = &entry.tty {
            tty::in_task(e, fd, self, plan)?;
        }
        if let Some(fifo) = &entry.fifo {
            own(&fifo::path_of(fifo, self)?.fown, fd, plan);
        } else if let Some(owner) = owner_of(entry) {
            own(owner, fd, plan);
        }
        Ok(())
    }
}

/// Removes names that a restore made which failed.
pub fn remove_names(made: &[PathBuf]) {
    for path in made.iter().rev() {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!("{} was made and cannot be removed: {e}", path.display());
            }
            _ => {}
        }
    }
}

/// The part of an entry that says who gets SIGIO.
fn owner_of(entry: &FileEntry) -> Option<&FownEntry> {
    None.or(entry.reg.as_ref().map(|e| &e.fown))
        .or(entry.pipe.as_ref().map(|e| &e.fown))
        .or(entry.efd.as_ref().map(|e| &e.fown))
        .or(entry.epfd.as_ref().map(|e| &e.fown))
        .or(entry.sgfd.as_ref().map(|e| &e.fown))
        .or(entry.tfd.as_ref().map(|e| &e.fown))
        .or(entry.ify.as_ref().map(|e| &e.fown))
        .or(entry.ffy.as_ref().map(|e| &e.fown))
        .or(entry.pidfd.as_ref().map(|e| &e.fown))
        .or(entry.memfd.as_ref().map(|e| &e.fown))
        .or(entry.tty.as_ref().map(|e| &e.fown))
        .or(entry.usk.as_ref().map(|e| &e.fown))
        .or(entry.isk.as_ref().map(|e| &e.fown))
        .or(entry.nlsk.as_ref().map(|e| &e.fown))
        .or(entry.psk.as_ref().map(|e| &e.fown))
        .or(entry.standstill_io_uring.as_ref().map(|e| &e.fown))
        .or(entry.tunf.as_ref().and_then(|e| e.standstill_fown.as_ref()))
        .or(entry.standstill_mqueue.as_ref().map(|e| &e.fown))
}

/// F_SETSIG and F_SETOWN_EX, with the ids that the owner had when it was set (fcntl(2)).
fn own(owner: &FownEntry, fd: i32, plan: &mut Plan) {
    const F_SETOWN_EX: i32 = 15;
    const F_SETSIG: i32 = 10;
    if owner.signum != 0 {
        plan.call("signal of a descriptor", libc::SYS_fcntl, &[fd.into(), F_SETSIG.into(), owner.signum.into()]);
    }
    if owner.pid != 0 {
        let who = plan.bytes(&[owner.pid_type.to_le_bytes(), owner.pid.to_le_bytes()].concat());
        let changes = (owner.uid, owner.euid) != (0, 0);
        let keep = u64::from(u32::MAX);
        if changes {
            plan.call("owner's ids", libc::SYS_setresuid, &[owner.uid.into(), owner.euid.into(), keep.into()]);
        }
        plan.call("owner of a descriptor", libc::SYS_fcntl, &[fd.into(), F_SETOWN_EX.into(), who.into()]);
        if changes {
            plan.call("ids after the owner's", libc::SYS_setresuid, &[0.into(), 0.into(), keep.into()]);
        }
    }
}

/// Brings status flags (O_APPEND, O_ASYNC, O_NONBLOCK, O_DIRECT, O_NOATIME) of a new descriptor to those of the image.
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<()> {
    let changeable = (libc::O_APPEND | libc::O_ASYNC | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME) as u32;
    let now = rustix::fs::fcntl_getfl(fd).call("fcntl(F_GETFL)")?.bits();
    let wanted = (now & !changeable) | (flags & changeable);
    if now != wanted {
        rustix::fs::fcntl_setfl(fd, rustix::fs::OFlags::from_bits_retain(wanted)).call("fcntl(F_SETFL)")?;
    }
    Ok(())
}

/// `/proc/self/fd/N`, to open a file once more with other flags.
pub fn magic_link(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
