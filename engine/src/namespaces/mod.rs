//! Namespaces: which of them a tree has of its own, how to work inside them, and how they are made again.
//!
//! The kernel shows a task's namespaces as links in /proc/PID/ns (namespaces(7)). Ids of images say which tasks share one
//! (`ids-N.img`); the inventory has those of the engine that dumped. What the tree's root has and that engine had not is a
//! namespace of the tree's own: the root is born into a new one by clone3(2), and what it holds comes from an image that is
//! named by the namespace's id (`utsns-N.img`, `netns-N.img`, `mountpoints-N.img`, …). All other tasks must be in the root's;
//! nested ones are refused by those who read ids.
//!
//! A thread of the engine goes in by setns(2), does its work and ends: the engine's other threads stay where they are.

use nix::sched::CloneFlags;
use standstill_images::proto::TaskKobjIdsEntry;
use standstill_images::Images;

use crate::error::{Call, Error, Result};
use crate::sys::thread;

pub mod companion;
pub mod ipc;
pub mod outside;
pub mod user;
pub mod uts;

/// A kind of namespace that a tree can have of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // their names say it
pub enum Kind {
    Pid,
    Net,
    Ipc,
    Uts,
    Mnt,
    User,
    Cgroup,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [Self::Pid, Self::Net, Self::Ipc, Self::Uts, Self::Mnt, Self::User, Self::Cgroup];

    /// Its file in /proc/PID/ns.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Mnt => "mnt",
            Self::User => "user",
            Self::Cgroup => "cgroup",
        }
    }

    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pid => "PID",
            Self::Net => "network",
            Self::Ipc => "IPC",
            Self::Uts => "UTS",
            Self::Mnt => "mount",
            Self::User => "user",
            Self::Cgroup => "cgroup",
        }
    }

    /// The flag of clone(2), unshare(2) and setns(2).
    #[must_use]
    pub fn flag(self) -> i32 {
        match self {
            Self::Pid => libc::CLONE_NEWPID,
            Self::Net => libc::CLONE_NEWNET,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Mnt => libc::CLONE_NEWNS,
            Self::User => libc::CLONE_NEWUSER,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
        }
    }

    /// The number that images have for a task's.
    #[must_use]
    pub fn id(self, ids: &TaskKobjIdsEntry) -> Option<u32> {
        match self {
            Self::Pid => ids.pid_ns_id,
            Self::Net => ids.net_ns_id,
            Self::Ipc => ids.ipc_ns_id,
            Self::Uts => ids.uts_ns_id,
            Self::Mnt => ids.mnt_ns_id,
            Self::User => ids.user_ns_id,
            Self::Cgroup => ids.cgroup_ns_id,
        }
    }
}

/// The namespaces that a tree has of its own, with their numbers in images.
#[derive(Debug, Clone, Default)]
pub struct Own(Vec<(Kind, u32)>);

impl Own {
    /// What `root` of the tree has and the engine that dumps, or dumped, has not.
    #[must_use]
    pub fn of(root: &TaskKobjIdsEntry, engine: &TaskKobjIdsEntry) -> Own {
        let own = |kind: Kind| Some((kind, kind.id(root).filter(|id| Some(*id) != kind.id(engine))?));
        Own(Kind::ALL.into_iter().filter_map(own).collect())
    }

    /// It has not one of this kind after all.
    pub fn remove(&mut self, kind: Kind) {
        self.0.retain(|(k, _)| *k != kind);
    }

    /// It has one of this kind, with this number.
    pub fn add(&mut self, kind: Kind, id: u32) {
        self.remove(kind);
        self.0.push((kind, id));
    }

    /// The number of the tree's own namespace of a kind.
    #[must_use]
    pub fn id(&self, kind: Kind) -> Option<u32> {
        self.0.iter().find(|(k, _)| *k == kind).map(|(_, id)| *id)
    }

    /// Whether the tree has one of its own.
    #[must_use]
    pub fn has(&self, kind: Kind) -> bool {
        self.id(kind).is_some()
    }

    /// The kinds.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> + '_ {
        self.0.iter().map(|(kind, _)| *kind)
    }

    /// Refuses a task, with these ids, that is in a namespace that the root, with those, is not in. It may be in a network
    /// namespace of its own, and in a mount namespace, if the root is in one.
    pub fn refuse_nested(&self, ids: &TaskKobjIdsEntry, of_root: &TaskKobjIdsEntry) -> Result<()> {
        let may = |kind: Kind| kind == Kind::Net || kind == Kind::Mnt && self.has(kind);
        match Kind::ALL.into_iter().find(|kind| !may(*kind) && kind.id(ids) != kind.id(of_root)) {
            Some(kind) => Err(Error::refused(
                format!("a nested {} namespace", kind.name()),
                "all tasks of a tree must be in that of its root",
            )),
            None => Ok(()),
        }
    }

    /// What clone3 makes the root with. A cgroup namespace is not among them: its root is where the task is when it is made,
    /// and so it comes when the task is in its group.
    #[must_use]
    pub fn clone_flags(&self) -> u64 {
        let born_with = self.kinds().filter(|kind| *kind != Kind::Cgroup);
        born_with.fold(0, |flags, kind| flags | u64::from(kind.flag() as u32))
    }
}

/// Fills the namespaces that process `pid` was born into.
pub fn fill(pid: i32, own: &Own, images: &Images) -> Result<()> {
    if let Some(id) = own.id(Kind::Uts) {
        uts::restore(pid, id, images)?;
    }
    Ok(())
}

/// Writes what the tree's own namespaces hold; process `pid` is its root.
pub fn dump(pid: i32, own: &Own, users: &user::Users, images: &Images) -> Result<()> {
    if let Some(id) = own.id(Kind::User) {
        user::dump(users, id, images)?;
    }
    if let Some(id) = own.id(Kind::Uts) {
        uts::dump(pid, id, images)?;
    }
    Ok(())
}

/// Runs `work` in a thread of its own that is in a namespace of process `pid`.
pub fn inside<T: Send>(pid: i32, kind: Kind, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    use rustix::fs::{Mode, OFlags};
    let path = format!("/proc/{pid}/ns/{}", kind.file());
    let door = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).call("open(/proc/PID/ns)")?;
    thread::apart(|| {
        nix::sched::setns(&door, CloneFlags::from_bits_retain(kind.flag())).call("setns")?;
        work()
    })
}
