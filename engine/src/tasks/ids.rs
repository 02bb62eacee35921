//! Which kernel objects tasks share (`ids-N.img`): descriptor tables, file system state, namespaces.
//!
//! Compared with kcmp(2) and by the links in /proc/PID/ns. Ids are small numbers; 1 stands for the engine's own, which is
//! how an image says "as the one that restores it". Sharing memory or signal handlers between processes is refused.

use std::collections::HashMap;

use standstill_images::proto::TaskKobjIdsEntry;

use crate::error::{At, Call, Error, Result};
use crate::namespaces::Own;
use crate::sys::calls::{self, Kcmp};

/// Kinds in the order in which ids are given out.
const NAMESPACES: [&str; 8] = ["pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup"];

/// Of tasks: one that was restored has a namespace of time more than before, and otherwise the same numbers.
const TIME_LAST: [&str; 8] = ["pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time"];

/// Gives out ids.
#[derive(Debug)]
pub struct Ids {
    namespaces: HashMap<Vec<u8>, u32>,
    /// The engine's own.
    pub root: TaskKobjIdsEntry,
    /// Those of the tree's root, once they are known.
    pub tree: Option<TaskKobjIdsEntry>,
    next_object: u32,
}

fn namespace(pid: i32, kind: &str) -> Result<Option<Vec<u8>>> {
    match rustix::fs::readlink(format!("/proc/{pid}/ns/{kind}"), Vec::new()) {
        Ok(link) => Ok(Some(link.into_bytes())),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(e) => Err(e).call("readlink(/proc/PID/ns)"),
    }
}

impl Ids {
    /// Numbers the engine's own objects.
    pub fn new() -> Result<Ids> {
        let root = TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, ..Default::default() };
        let mut ids = Ids { namespaces: HashMap::new(), root, tree: None, next_object: 2 };
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        ids.root = ids.with_namespaces(own, root, NAMESPACES)?;
        Ok(ids)
    }

    fn with_namespaces(&mut self, pid: i32, mut e: TaskKobjIdsEntry, order: [&str; 8]) -> Result<TaskKobjIdsEntry> {
        for kind in order {
            let Some(link) = namespace(pid, kind)? else { continue };
            let next = u32::try_from(self.namespaces.len()).unwrap_or(0) + 1;
            let id = Some(*self.namespaces.entry(link).or_insert(next));
            match kind {
                "pid" => e.pid_ns_id = id,
                "net" => e.net_ns_id = id,
                "ipc" => e.ipc_ns_id = id,
                "uts" => e.uts_ns_id = id,
                "time" => e.time_ns_id = id,
                "mnt" => e.mnt_ns_id = id,
                "user" => e.user_ns_id = id,
                _ => e.cgroup_ns_id = id,
            }
        }
        Ok(e)
    }

    /// The namespaces that the tree has of its own; none before its root has ids.
    pub fn own(&self) -> Own {
        self.tree.as_ref().map(|tree| Own::of(tree, &self.root)).unwrap_or_default()
    }

    /// The ids of a task; `parent` has those of its parent in the tree.
    pub fn task(&mut self, pid: i32, parent: Option<(i32, &TaskKobjIdsEntry)>) -> Result<TaskKobjIdsEntry> {
        let own = self.next_object;
        self.next_object += 1;
        if let (Some(now), Some(later)) = (namespace(pid, "time")?, namespace(pid, "time_for_children")?) {
            if now != later {
                return Err(Error::refused(
                    "a time namespace for children that the task itself is not in",
                    "let it make its children, and end, before the dump",
                ));
            }
        }
        let mut e = TaskKobjIdsEntry { vm_id: own, files_id: own, fs_id: own, sighand_id: own, ..Default::default() };
        if let Some((parent, ids)) = parent {
            for (what, kind) in [("memory", Kcmp::Vm), ("signal handlers", Kcmp::Sighand)] {
                if calls::same(parent, pid, kind)? {
                    return Err(Error::refused(
                        format!("{what} shared with process {parent}"),
                        "use threads instead of clone() with CLONE_VM or CLONE_SIGHAND",
                    ));
                }
            }
            if calls::same(parent, pid, Kcmp::Files)? {
                e.files_id = ids.files_id;
            }
            if calls::same(parent, pid, Kcmp::Fs)? {
                e.fs_id = ids.fs_id;
            }
        }
        let e = self.with_namespaces(pid, e, TIME_LAST)?;
        let of_tree = *self.tree.get_or_insert(e);
        Own::of(&of_tree, &self.root).refuse_nested(&e, &of_tree).task(pid)?;
        Ok(e)
    }
}
