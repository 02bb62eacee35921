//! Which mount is made from which, and which groups share.
//!
//! A file system has one origin: the new root folder, a place outside, or a new super block. All of its mounts are clones of
//! that (open_tree(2)), each without what is below it. Groups of peers come after their masters, since a slave is made of a
//! peer of its master.

use standstill_images::proto::Fstype;

use super::table::{below, Mount, Table};
use crate::error::{Error, Result};

/// Where the file system of a mount comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The folder that becomes the root; the number is the mount's place in the table, as below.
    Top(usize),
    /// A place outside.
    Outside(usize),
    /// A file system that is mounted anew.
    New(usize),
}

impl Origin {
    /// The mount that stands for the origin: its root is the origin's.
    pub fn mount(&self) -> usize {
        match self {
            Origin::Top(at) | Origin::Outside(at) | Origin::New(at) => *at,
        }
    }
}

/// The origin of a mount.
pub fn origin_of(table: &Table, m: &Mount) -> Result<Origin> {
    let at = |m: &Mount| table.position(m.id).ok_or(Error::Gone);
    if m.outside().is_some() {
        return Ok(Origin::Outside(at(m)?));
    }
    if let Some(top) = table.top() {
        if table.is_of_top(m) {
            return Ok(Origin::Top(at(top)?));
        }
    }
    if let Some(wider) = table.wider(m).find(|o| o.outside().is_some()) {
        return Ok(Origin::Outside(at(wider)?));
    }
    let whole = |o: &&Mount| o.is_whole() && o.kind != Fstype::Unsupported;
    match table.wider(m).find(whole) {
        Some(whole) => Ok(Origin::New(at(whole)?)),
        None => Err(Error::refused(
            format!("{}, which doesn't have a proper root mount,", m.shown()),
            "say where it comes from (--external mnt[NAME]:PATH)",
        )),
    }
}

/// Mounts with the same peers and the same master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Id of the peers, or 0.
    pub shared: u32,
    /// Id of the master's group, or 0.
    pub master: u32,
    /// Which mounts, by their place in the table; the first has the widest root.
    pub mounts: Vec<usize>,
    /// The group of masters, by its place in the list, if it is inside.
    pub parent: Option<usize>,
}

/// All groups, masters before slaves.
pub fn groups(table: &Table) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for (at, m) in table.mounts.iter().enumerate().filter(|(_, m)| m.shared != 0 || m.master != 0) {
        match groups.iter_mut().find(|g| g.shared == m.shared && g.master == m.master) {
            Some(group) => group.mounts.push(at),
            None => groups.push(Group { shared: m.shared, master: m.master, mounts: vec![at], parent: None }),
        }
    }
    for group in &mut groups {
        group.mounts.sort_by_key(|&at| table.mounts[at].root.len());
    }
    // in the order of the tree of groups
    let mut sorted: Vec<Group> = Vec::with_capacity(groups.len());
    while !groups.is_empty() {
        let is_master = |list: &[Group], id: u32| list.iter().position(|g| g.shared != 0 && g.shared == id);
        let ready = groups.iter().position(|g| g.master == 0 || is_master(&groups, g.master).is_none());
        let Some(ready) = ready else {
            return Err(Error::lie("mountpoints.img", format!("group {} is its own master", groups[0].shared)));
        };
        let mut group = groups.remove(ready);
        group.parent = if group.master == 0 { None } else { is_master(&sorted, group.master) };
        sorted.push(group);
    }
    Ok(sorted)
}

/// Whether sharing can be copied from one mount to another: the kernel wants the first's root to be wider.
pub fn can_copy(from: &Mount, to: &Mount) -> bool {
    below(&to.root, &from.root).is_some()
}
