//! The network namespaces of a restore: where each comes from, and who is told which is which.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use standstill_images::proto::InventoryEntry;
use standstill_images::Images;

use super::opening::Transfer;
use crate::error::{Call, Error, Result};
use crate::files::RestoreFiles;
use crate::network::doors::Doors;
use crate::network::{self, Networks};
use crate::options::{NamespaceKind, Options};
use crate::sockets::{inet, netlock};
use crate::tasks::tree::Tree;

/// Those of a tree.
#[derive(Debug)]
pub(super) struct Network {
    networks: Networks,
    /// Of the engine, as the images call it.
    ours: u32,
    /// Of the root, if that is not ours.
    root: Option<u32>,
    /// The root's, if it is there already.
    outside: Option<OwnedFd>,
}

/// Reads the images of all network namespaces of the tree, and finds those that come from outside.
pub(super) fn read_networks(
    opts: &Options,
    images: &Images,
    inventory: &InventoryEntry,
    tree: &Tree,
) -> Result<Network> {
    let joined = opts.join_ns.iter().any(|j| j.kind == NamespaceKind::Net);
    // who joins another one has left what was ours at the dump
    let ours = inventory.root_ids.as_ref().and_then(|r| r.net_ns_id).filter(|_| !joined).unwrap_or(0);
    let mut ids: Vec<u32> = Vec::new();
    for (_, _, a) in tree.alive() {
        let id = a.ids.net_ns_id.unwrap_or(ours);
        if id != ours && !ids.contains(&id) {
            ids.push(id);
        }
    }
    let of_root = tree.alive().next().and_then(|(_, _, a)| a.ids.net_ns_id);
    let root = of_root.filter(|id| ids.contains(id));
    if opts.empty_ns.net && ids.len() > 1 {
        return Err(Error::Usage { what: "only one network namespace may be empty (--empty-ns net)".into() });
    }
    let networks = Networks::read(images, opts, &ids, joined)?;
    let outside = root.map(|id| networks.outside(id, opts)).transpose()?.flatten();
    Ok(Network { networks, ours, root, outside })
}

impl Network {
    /// Has the tree any of its own?
    pub(super) fn is_some(&self) -> bool {
        self.networks.ids().next().is_some()
    }

    /// The root is born in this one, which is there.
    pub(super) fn outside(&self) -> Option<BorrowedFd<'_>> {
        self.outside.as_ref().map(AsFd::as_fd)
    }

    /// … and then into no new one.
    pub(super) fn outside_flags(&self) -> u64 {
        if self.outside.is_some() {
            u64::from(libc::CLONE_NEWNET.cast_unsigned())
        } else {
            0
        }
    }

    /// The root's, which a dump has locked as a whole.
    pub(super) fn locked(&self) -> Option<BorrowedFd<'_>> {
        self.root.and_then(|id| self.networks.get(id))
    }

    /// Opens those that this restore has made and locked, the root's excepted, which the dump may have locked as well.
    pub(super) fn unlock_nested(&self, inventory: &InventoryEntry, connections: bool) -> Result<()> {
        for id in self.networks.ids().filter(|id| connections && Some(*id) != self.root) {
            if let Some(namespace) = self.networks.get(id) {
                network::inside(namespace, || netlock::unlock_here(inventory))?;
            }
        }
        Ok(())
    }

    /// How many there are beside the root's that do not come from outside.
    pub(super) fn to_make(&self, opts: &Options) -> Result<usize> {
        let mut count = 0;
        for id in self.networks.ids().filter(|id| self.root != Some(*id)) {
            count += usize::from(self.networks.outside(id, opts)?.is_none());
        }
        Ok(count)
    }

    /// Makes them, now that the root, `pid`, is there, and fills them. `new` are used before others are made.
    pub(super) fn fill(
        &mut self,
        opts: &Options,
        pid: i32,
        new: Vec<OwnedFd>,
        inventory: &InventoryEntry,
        files: &mut RestoreFiles<'_>,
    ) -> Result<()> {
        let ids: Vec<u32> = self.networks.ids().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let mut all = Vec::new();
        let mut new = new.into_iter();
        for id in ids {
            let namespace = match self.networks.outside(id, opts)? {
                Some(namespace) => namespace,
                None if self.root == Some(id) => network::of_task(pid)?,
                None => new.next().map_or_else(network::create, Ok)?,
            };
            all.push((id, namespace.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?));
            self.networks.set(id, namespace);
        }
        files.networks = Rc::new(Doors::new(self.ours, all)?);
        files.net_ns = self.root.unwrap_or(self.ours);
        let connections = !inet::connections(files)?.is_empty();
        let lock = || if connections { netlock::lock_here(inventory) } else { Ok(()) };
        self.networks.prepare(opts, &lock)?;
        self.networks.fill(opts, &lock)
    }

    /// Where tasks find their namespaces, by id, if they are in several.
    pub(super) fn doors_for_tasks(
        &self,
        tree: &Tree,
        doors: &Doors,
        transfer: &mut Transfer,
    ) -> Result<Vec<(u32, usize)>> {
        let mut ids: Vec<u32> = tree.alive().filter_map(|(_, _, a)| a.ids.net_ns_id).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() < 2 {
            return Ok(Vec::new());
        }
        let mut all = Vec::new();
        for id in ids {
            if let Some(fd) = doors.get(id) {
                all.push((id, transfer.add(fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?)));
            }
        }
        Ok(all)
    }
}
