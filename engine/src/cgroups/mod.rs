//! Control groups: which groups tasks and threads are in, and what those groups are (cgroups(7)).
//!
//! The kernel shows the groups of a thread in `/proc/PID/task/TID/cgroup`: a path in each hierarchy, v1 with controllers, v1
//! with a name, v2. Groups are folders of a file system, settings are files in them. A cgroup namespace
//! (cgroup_namespaces(7)) makes some groups the roots of what a task sees.
//!
//! Images: `cgroup.img` is one [`CgroupEntry`](standstill_images::proto::CgroupEntry). A *set* is a combination of groups
//! that some thread is in; `cg_set` in core entries names it, and `root_cg_set` of the inventory is the one that the engine
//! was in. A path's `cgns_prefix` is how much of it is the root of the tree's cgroup namespace. A *controller* is a hierarchy:
//! with the groups that belong to the tree (those of its threads and all below), their owners, modes and
//! [properties](props). Without the image the tree was where its engine was.
//!
//! Order at restore. Groups are made before the first task is born, with those settings that must be there before a task may
//! enter. The root enters its groups from outside before it has memory, and makes its namespace half-way: when it is in the
//! groups that are to be the namespace's roots. Children are born in the groups of their parents, and move when all exist;
//! threads move when they exist. The other settings follow when all is made, and whether a group is frozen right before all
//! goes. A failed restore removes the groups that it made, and so does the [guard](crate::guard).
//!
//! `--manage-cgroups` says how much of this is done:
//!
//! | mode | missing groups | groups that are there | tasks |
//! |---|---|---|---|
//! | `ignore` | | | stay with the engine |
//! | `none` | an error | stay as they are | move |
//! | `props` | an error | get their settings | move |
//! | `soft`, if nothing is said | are made | get owner and mode, keep settings | move |
//! | `full` | are made | get their settings | move |
//! | `strict` | are made | an error | move |
//!
//! Not kept, and other than CRIU: groups below the root of a hierarchy when a task is in that root itself, since they are
//! other programs' (CRIU carries all of them); memory that a task used before its parent's children moved is charged to the
//! parent's group; event files, pressure triggers, eBPF programs of a group; of v2's controllers, whatever is more than one
//! line (`io.max`). CRIU knows no settings of v2's controllers, so `criu` carries none.
//!
//! Man pages: cgroups(7), cgroup_namespaces(7), criu(8). Kernel: Documentation/admin-guide/cgroup-v2.rst.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::error::{At, Call, Place, Result};

mod dump;
pub mod freezer;
pub mod image;
pub mod props;
mod restore;
pub mod roots;

pub use dump::Dumped;
pub use restore::Restored;

/// Is a hierarchy with these controllers the one that is called this in /proc/PID/cgroup?
fn is_of(controllers: &[String], name: &str) -> bool {
    match controllers {
        [] => false,
        [only] if only.is_empty() => name.is_empty(),
        all => all.iter().all(|c| name.split(',').any(|n| n == c)),
    }
}

/// The folder of a hierarchy in a yard (`--cgroup-yard`).
fn open_yard(yard: &Path, controllers: &[String]) -> Result<OwnedFd> {
    let name = |n: &String| if n.is_empty() { "unified".to_owned() } else { n.replace("name=", "") };
    let path = yard.join(controllers.iter().map(name).collect::<Vec<_>>().join(","));
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, Mode::empty()).call("open").at(Place::Path(path))
}

#[cfg(test)]
mod tests {
    use super::is_of;

    #[test]
    fn hierarchies_have_their_names() {
        let list = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        assert!(is_of(&list(&[""]), "") && !is_of(&list(&[""]), "cpu") && !is_of(&list(&["cpu"]), ""));
        assert!(is_of(&list(&["cpu", "cpuacct"]), "cpuacct,cpu") && !is_of(&list(&["cpu", "cpuacct"]), "cpu"));
        assert!(is_of(&list(&["cpu"]), "cpu,name=x") && !is_of(&list(&["cpu"]), "cpuset"));
        assert!(!is_of(&[], ""));
    }
}
