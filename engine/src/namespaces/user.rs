//! User namespaces: which ids of users and groups stand for which outside (`userns-N.img`, user_namespaces(7)).
//!
//! /proc/PID/uid_map and gid_map say it, with the outer ids as the reader's namespace has them. Images have the tree's own
//! ids; what the engine asks the kernel for, and does, is in its own. An id that is not mapped is `u32::MAX` in images, which
//! stands for nobody: chown(2) leaves an owner alone then.
//!
//! A user namespace comes first: all others of the tree belong to it. Its maps are written by another thread of the engine
//! while the root is on its way to its exec ([`crate::sys::spawn`]), since who has no user there loses its capabilities in
//! one. The root must have a user 0.
//!
//! What needs a capability outside of it is done by the engine ([`powers`]): limits above its own, a lower oom_score_adj.

use standstill_images::proto::{UidGidExtent, UsernsEntry};
use standstill_images::{ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::proc;
use crate::proc::simple::{self, IdRange};
use crate::sys::{calls, thread};
use crate::tasks::revive::Birth;
use crate::tasks::tree::Alive;

/// Ids of a tree's own, and ours.
#[derive(Debug, Default, Clone)]
pub struct Users {
    /// Empty: the tree has our ids.
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

impl Users {
    /// Those of the namespace of process `pid`.
    pub fn of_task(pid: i32) -> Result<Users> {
        let mut buffer = Vec::new();
        let mut map = |name: &str| -> Result<Vec<IdRange>> {
            let path = format!("/proc/{pid}/{name}");
            proc::read_proc(path.as_ref(), &mut buffer).call("read").at(Place::Path(path.into()))?;
            Ok(simple::id_map(&buffer)?)
        };
        Ok(Users { users: map("uid_map")?, groups: map("gid_map")? })
    }

    /// Those that an image says.
    pub fn read(id: u32, images: &Images) -> Result<Users> {
        let entry: UsernsEntry = images.read_one(ImageKind::Userns, id)?;
        let ranges = |list: &[UidGidExtent]| -> Result<Vec<IdRange>> {
            let range = |e: &UidGidExtent| {
                let fits = e.count != 0 && [e.first, e.lower_first].iter().all(|f| f.checked_add(e.count).is_some());
                let range = IdRange { inside: e.first, outside: e.lower_first, count: e.count };
                fits.then_some(range)
                    .ok_or_else(|| Error::lie("userns", format!("ids {} and {} more", e.first, e.count)))
            };
            list.iter().map(range).collect()
        };
        let users = Users { users: ranges(&entry.uid_map)?, groups: ranges(&entry.gid_map)? };
        if inner(&users.users, 0, |r| (r.inside, r.outside)).is_none() {
            return Err(Error::refused("a user namespace without a user 0", "map 0 in it"));
        }
        Ok(users)
    }

    /// As an image entry.
    fn entry(&self) -> UsernsEntry {
        let extents = |list: &[IdRange]| {
            list.iter().map(|r| UidGidExtent { first: r.inside, lower_first: r.outside, count: r.count }).collect()
        };
        UsernsEntry { uid_map: extents(&self.users), gid_map: extents(&self.groups) }
    }

    /// Whether the tree has ids of its own.
    #[must_use]
    pub fn are_own(&self) -> bool {
        !self.users.is_empty()
    }

    /// The tree's id of a user.
    #[must_use]
    pub fn user(&self, id: u32) -> u32 {
        self.own(&self.users, id, |r| (r.outside, r.inside))
    }

    /// The tree's id of a group.
    #[must_use]
    pub fn group(&self, id: u32) -> u32 {
        self.own(&self.groups, id, |r| (r.outside, r.inside))
    }

    /// Our id of a user of the tree's.
    #[must_use]
    pub fn outer_user(&self, id: u32) -> u32 {
        self.own(&self.users, id, |r| (r.inside, r.outside))
    }

    /// Our id of a group of the tree's.
    #[must_use]
    pub fn outer_group(&self, id: u32) -> u32 {
        self.own(&self.groups, id, |r| (r.inside, r.outside))
    }

    fn own(&self, ranges: &[IdRange], id: u32, from_to: impl Fn(&IdRange) -> (u32, u32)) -> u32 {
        if self.are_own() {
            inner(ranges, id, from_to).unwrap_or(u32::MAX)
        } else {
            id
        }
    }

    /// What goes into uid_map and gid_map of a new namespace.
    #[must_use]
    pub fn maps(&self) -> [String; 2] {
        let text = |list: &[IdRange]| {
            list.iter().map(|r| format!("{} {} {}\n", r.inside, r.outside, r.count)).collect::<String>()
        };
        [text(&self.users), text(&self.groups)]
    }
}

/// Gives process `pid` (ours) what it cannot take for itself from inside: limits, its score for the one who ends processes
/// when memory is short.
pub fn powers(pid: i32, task: &Alive, birth: &Birth) -> Result<()> {
    let Some((_, leader)) = task.threads.first() else { return Ok(()) };
    let Some(tc) = &leader.tc else { return Ok(()) };
    let write = |name: &str, value: String| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::write(&path, value).call("write").at(Place::Path(path.into()))
    };
    if let Some(score) = tc.oom_score_adj.filter(|&score| score != birth.oom_score_adj) {
        write("oom_score_adj", score.to_string())?;
    }
    for (n, limit) in tc.rlimits.iter().flat_map(|all| &all.rlimits).enumerate().take(16) {
        // the task has done what it could; so do we
        match calls::set_limit(pid, n as u32, limit.cur, limit.max) {
            Err(e) if e.errno() == libc::EPERM => {}
            other => other?,
        }
    }
    Ok(())
}

/// Runs `work` in a thread that is the tree's user 0 for files, with all of our capabilities: in a file system that belongs to a
/// user namespace, nobody whom that does not know can make a name.
pub fn as_its_root<T: Send>(users: &Users, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::as_another(|| {
        let all = rustix::thread::capabilities(None).call("capget")?;
        nix::unistd::setfsgid(users.outer_group(0).into());
        nix::unistd::setfsuid(users.outer_user(0).into());
        // capabilities for files go with the user
        rustix::thread::set_capabilities(None, all).call("capset")?;
        work()
    })
}

fn inner(ranges: &[IdRange], id: u32, from_to: impl Fn(&IdRange) -> (u32, u32)) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let (from, to) = from_to(range);
        id.checked_sub(from).filter(|at| *at < range.count).map(|at| to + at)
    })
}

/// Writes the maps.
pub fn dump(users: &Users, id: u32, images: &Images) -> Result<()> {
    Ok(images.write_one(ImageKind::Userns, id, &users.entry())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_both_ways() {
        let range = |inside, outside, count| IdRange { inside, outside, count };
        let users = Users { users: vec![range(0, 1000, 10), range(10, 70_000, 5)], groups: vec![range(0, 5, 1)] };
        assert_eq!(
            [users.user(1003), users.user(70_004), users.user(70_005), users.user(0)],
            [3, 14, u32::MAX, u32::MAX]
        );
        assert_eq!([users.outer_user(0), users.outer_user(10), users.outer_user(15)], [1000, 70_000, u32::MAX]);
        assert_eq!([users.group(5), users.group(6), users.outer_group(0)], [0, u32::MAX, 5]);
        assert_eq!(users.maps(), ["0 1000 10\n10 70000 5\n".to_owned(), "0 5 1\n".to_owned()]);
        let same = Users::default();
        assert!(!same.are_own() && same.user(7) == 7 && same.outer_group(8) == 8);
    }
}
