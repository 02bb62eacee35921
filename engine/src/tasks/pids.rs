//! Ids of processes as a tree with a pid namespace of its own sees them, and as we do (pid_namespaces(7)).
//!
//! Images have the tree's own numbers. The kernel answers the engine with the engine's, in /proc and in system calls alike,
//! and says of each task in `status` which ids it has in the namespaces below (NSpid, NSpgid, NSsid). What is outside of the
//! namespace has the number 0 there. A namespace begins with its init and ends with it: the tree's root must be that, unless the
//! namespace is somebody else's ([`crate::namespaces::outside`]).

use std::collections::{HashMap, HashSet};

use standstill_images::proto::FownEntry;

use super::facts::Facts;
use super::freeze;
use crate::error::{At, Call, Error, Result};
use crate::proc::stat::Stat;
use crate::proc::{self, status};

/// What ids are below (proc(5), pid_max); none if the kernel does not say.
#[must_use]
pub fn limit() -> Option<i32> {
    std::fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse().ok()
}

/// Whether a process or a thread has this id.
#[must_use]
pub fn in_use(id: i32) -> bool {
    std::path::Path::new(&format!("/proc/{id}")).exists()
}

/// The highest id below `below` that is not `taken`, and that nobody has now.
#[must_use]
pub fn unused(below: i32, taken: &HashSet<i32>) -> Option<i32> {
    (1000..below).rev().find(|id| !taken.contains(id) && !in_use(*id))
}

/// The tree's numbers by ours, at a dump.
#[derive(Debug, Default)]
pub struct Inner {
    /// None: the tree is in our namespace, and sees what we see.
    known: Option<HashMap<i32, i32>>,
}

impl Inner {
    /// What a tree in a namespace of its own sees; of each task its id, what /proc says, and nothing more if it is dead.
    /// `shared`: its root need not be the init.
    pub fn of<'a>(tasks: impl Iterator<Item = (i32, &'a Stat, Option<&'a Facts>)>, shared: bool) -> Result<Inner> {
        let mut known = HashMap::new();
        let mut buffer = Vec::new();
        let innermost = |ids: &[i32]| ids.last().copied().unwrap_or(0);
        for (n, (pid, stat, facts)) in tasks.enumerate() {
            let dead;
            let status = match facts {
                Some(facts) => facts.status(),
                None => {
                    proc::read_proc(format!("/proc/{pid}/status").as_ref(), &mut buffer)
                        .call("read(/proc/PID/status)")
                        .task(pid)?;
                    dead = status::parse(&buffer).task(pid)?;
                    &dead
                }
            };
            if n == 0 && innermost(&status.ns_pid) != 1 && !shared {
                return Err(Error::refused(
                    "a tree whose root is not the init of its PID namespace",
                    "dump the whole namespace, from its init; or name it as external (--external pid[INODE]:KEY)",
                ))
                .task(pid);
            }
            known.insert(pid, innermost(&status.ns_pid));
            known.insert(stat.pgrp, innermost(&status.ns_pgid));
            known.insert(stat.session, innermost(&status.ns_sid));
            for thread in facts.iter().flat_map(|facts| &facts.threads) {
                known.insert(thread.status.pid, innermost(&thread.status.ns_pid));
            }
        }
        Ok(Inner { known: Some(known) })
    }

    /// The tree's number for what is `id` with us; 0 if it is outside.
    #[must_use]
    pub fn id(&self, id: i32) -> i32 {
        match &self.known {
            None => id,
            Some(known) => known.get(&id).copied().unwrap_or(0),
        }
    }

    /// The same of an unsigned number, as images have them.
    #[must_use]
    pub fn unsigned(&self, id: i32) -> u32 {
        u32::try_from(self.id(id)).unwrap_or(0)
    }

    /// The number that we have for one of the tree's.
    #[must_use]
    pub fn host(&self, id: i32) -> Option<i32> {
        match &self.known {
            None => Some(id),
            Some(known) => known.iter().find(|(_, inner)| **inner == id).map(|(host, _)| *host),
        }
    }

    /// Puts the tree's number into the owner of a descriptor.
    pub fn translate(&self, owner: &mut FownEntry) {
        owner.pid = self.unsigned(i32::try_from(owner.pid).unwrap_or(0));
    }
}

/// Our numbers by the tree's, at a restore.
#[derive(Debug, Default)]
pub struct Hosts {
    /// None: the tree is in our namespace.
    known: Option<HashMap<i32, i32>>,
}

impl Hosts {
    /// Those of a tree in a namespace of its own, of which only the root is there yet.
    #[must_use]
    pub fn of_root(inner: i32, host: i32) -> Hosts {
        Hosts { known: Some(HashMap::from([(inner, host)])) }
    }

    /// Learns of all processes below `root` (ours), and of their threads.
    pub fn learn(&mut self, root: i32) -> Result<()> {
        let Some(known) = &mut self.known else { return Ok(()) };
        let mut buffer = Vec::new();
        let mut waiting = vec![root];
        while let Some(pid) = waiting.pop() {
            let tids = freeze::threads_of(pid);
            for &tid in &tids {
                let path = format!("/proc/{pid}/task/{tid}/status");
                if proc::read_proc(path.as_ref(), &mut buffer).is_ok() {
                    let status = status::parse(&buffer).task(tid)?;
                    known.extend(status.ns_pid.last().map(|inner| (*inner, tid)));
                }
            }
            waiting.extend(freeze::children_of(pid, &tids, &mut buffer)?);
        }
        Ok(())
    }

    /// Our number for the tree's `id`.
    pub fn id(&self, id: i32) -> Result<i32> {
        match &self.known {
            None => Ok(id),
            Some(known) => known.get(&id).copied().ok_or(Error::Gone).task(id),
        }
    }
}
