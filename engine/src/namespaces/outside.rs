//! Namespaces that are there already, in which a tree comes to be instead of in new ones.
//!
//! A PID namespace that is somebody else's (that of a pod): `--external pid[INODE]:KEY` at the dump says so, and the tree's root need not
//! be its init; `--inherit-fd fd[N]:KEY` at the restore says which one it is then. Image: `pidns-N.img` has the key. The engine's
//! thread enters it for the moment in which the root is made (setns(2): it is children who are born in there). Since the
//! namespace does not end with the tree, whoever was made is killed one by one if the restore fails.
//!
//! `--join-ns` for IPC, UTS and time: the thread that restores is in the first two from its beginning, so that the tree finds what it
//! had of the engine's, or of its own, in there. What images hold of such a namespace is not put into it: it is not
//! the tree's alone, and a restore that fails could not take it away. CRIU sets host names there, and makes System V objects. A
//! time namespace is entered by the root. Network namespaces: [`crate::network`].
//!
//! Man pages: setns(2), pid_namespaces(7), time_namespaces(7).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{setns, CloneFlags};
use rustix::fs::{Mode, OFlags};
use standstill_images::proto::PidnsEntry;
use standstill_images::{ImageKind, Images};

use super::{Kind, Own};
use crate::error::{At, Call, Error, Place, Result};
use crate::options::{NamespaceKind, Options};
use crate::sys::calls;
use crate::tasks::tree::Tree;

fn open(path: &std::path::Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .call("open")
        .at(Place::Path(path.to_owned()))
}

/// The key by which the PID namespace of process `pid` was said to be somebody else's, if it was.
pub fn external_key(opts: &Options, pid: i32) -> Result<Option<&str>> {
    if opts.external_of_kind("pid").next().is_none() {
        return Ok(None);
    }
    let path = format!("/proc/{pid}/ns/pid");
    let inode = rustix::fs::stat(&path).call("stat").at(Place::Path(path.into()))?.st_ino;
    Ok(opts.external_value(&format!("pid[{inode}]")).flatten())
}

/// Writes the key for namespace `id`, that of process `pid`, if it has one.
pub fn dump(opts: &Options, pid: i32, id: u32, images: &Images) -> Result<()> {
    if let Some(key) = external_key(opts, pid)? {
        images.write_one(ImageKind::Pidns, id, &PidnsEntry { ext_key: Some(key.as_bytes().to_vec()) })?;
    }
    Ok(())
}

/// Namespaces of a restore that are there already.
#[derive(Debug, Default)]
pub struct Outside {
    pids: Option<OwnedFd>,
    time: Option<OwnedFd>,
    entered: Vec<Kind>,
}

impl Outside {
    /// Enters what this thread, which restores and ends then, is to be in.
    pub fn enter(opts: &Options) -> Result<Outside> {
        let mut outside = Outside::default();
        for join in &opts.join_ns {
            let kind = match join.kind {
                NamespaceKind::Ipc => Kind::Ipc,
                NamespaceKind::Uts => Kind::Uts,
                NamespaceKind::Time => {
                    outside.time = Some(open(&join.path)?);
                    continue;
                }
                // these are refused, or done elsewhere
                NamespaceKind::Net | NamespaceKind::User | NamespaceKind::Mnt => continue,
            };
            let flag = CloneFlags::from_bits_retain(kind.flag());
            setns(open(&join.path)?, flag).call("setns").at(Place::Path(join.path.clone()))?;
            outside.entered.push(kind);
        }
        Ok(outside)
    }

    /// Finds the PID namespace, and says what the tree has of its own now.
    pub fn find(&mut self, opts: &Options, images: &Images, tree: &Tree, own: &mut Own) -> Result<()> {
        self.entered.iter().for_each(|kind| own.remove(*kind));
        let Some(id) = tree.alive().next().and_then(|(_, _, a)| a.ids.pid_ns_id) else { return Ok(()) };
        let entry: Option<PidnsEntry> = images.read_one_if_there(ImageKind::Pidns, id)?;
        let Some(key) = entry.and_then(|entry| entry.ext_key) else { return Ok(()) };
        let key = String::from_utf8_lossy(&key);
        if tree.root().pid == 1 {
            return Err(Error::Usage { what: "Unable to restore into an empty PID namespace".into() });
        }
        let number = opts.inherited_fd(&key).ok_or_else(|| Error::Usage {
            what: format!("Unable to find an external pidns: {key}; say which with --inherit-fd fd[N]:{key}"),
        })?;
        if own.has(Kind::User) {
            return Err(Error::refused(
                "a user namespace of the tree's own within a PID namespace that is not its own",
                "nobody inside may choose ids in there; restore into a new one",
            ));
        }
        self.pids = Some(calls::dup_number(number)?);
        own.add(Kind::Pid, id);
        Ok(())
    }

    /// Is the tree's PID namespace one that others have as well?
    pub fn has_pids(&self) -> bool {
        self.pids.is_some()
    }

    /// What the root is not made with.
    pub fn flags(&self) -> u64 {
        if self.has_pids() {
            u64::from(libc::CLONE_NEWPID.cast_unsigned())
        } else {
            0
        }
    }

    /// The time namespace that the root is to enter.
    pub fn time(&self) -> Option<BorrowedFd<'_>> {
        self.time.as_ref().map(AsFd::as_fd)
    }

    /// Makes the root, in the PID namespace if there is one. No threads are made in there: the kernel lets nobody.
    pub fn born_in<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(pids) = &self.pids else { return work() };
        let own = open("/proc/thread-self/ns/pid".as_ref())?;
        setns(pids, CloneFlags::CLONE_NEWPID).call("setns(CLONE_NEWPID)")?;
        let result = work();
        setns(&own, CloneFlags::CLONE_NEWPID).call("setns(CLONE_NEWPID)")?;
        result
    }
}
