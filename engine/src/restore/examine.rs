//! All that a restore reads before it makes anything, for who wants to know whether it would come so far (`verify`).
//!
//! The order is that of a restore. What is wrong is told and the rest is read all the same, as far as it does not rest on that.

use standstill_images::proto::{InventoryEntry, SeccompEntry};
use standstill_images::{ImageKind, Images};

use super::{
    birth, check_limits, core, gpu, mount_namespaces, mounts, namespaces, own_namespaces, read_clocks, read_inventory,
    read_networks, registers, release, sysv, At, Error, Options, Own, RestoreFiles, Result, Tree, Users,
};
use crate::cgroups;

/// Larger than the extended state of any CPU.
const XSTATE: usize = 64 << 10;

/// What was read.
pub(crate) struct Examined<'a> {
    /// The inventory.
    pub(crate) inventory: InventoryEntry,
    /// The tree.
    pub(crate) tree: Tree,
    /// Its own namespaces.
    pub(crate) own: Own,
    /// Its open files, none of which is open.
    pub(crate) files: RestoreFiles<'a>,
    /// Filters of system calls.
    pub(crate) filters: SeccompEntry,
}

/// Reads everything; nothing if there is no tree to speak of.
pub(crate) fn examine<'a>(opts: &'a Options, images: &'a Images, wrong: &mut dyn FnMut(Error)) -> Option<Examined<'a>> {
    let inventory = note(read_inventory(opts, images), wrong)?;
    let job = opts.shell_job.then(release::own_session_and_group);
    note(gpu::restore::prepare(opts, images, &inventory), wrong);
    let tree = note(Tree::read(images, job, opts.lazy_pages), wrong)?;
    let own = note(own_namespaces(&inventory, &tree), wrong)?;
    note(cgroups::Restored::read(opts, images, &inventory, &tree), wrong);
    if own.has(namespaces::Kind::Mnt) {
        note(mounts::restore::read(opts, images, &mount_namespaces(&tree)), wrong);
    }
    if let Some(birth) = note(birth(), wrong) {
        note(check_limits(&birth, &tree), wrong);
    }
    let filters = note(images.read_one_if_there(ImageKind::Seccomp, ()).map_err(Error::from), wrong);
    note(read_clocks(images, &inventory, &tree), wrong);
    note(read_networks(opts, images, &inventory, &tree), wrong);
    let mut files = note(RestoreFiles::read(opts, images), wrong)?;
    let own_ipc = own.id(namespaces::Kind::Ipc);
    let ipc_ns = own_ipc.or(inventory.root_ids.as_ref().and_then(|r| r.ipc_ns_id)).unwrap_or(0);
    let areas = tree.alive().flat_map(|(_, _, a)| &a.memory.mm.vmas);
    note(sysv::read(ipc_ns, own_ipc.is_some(), areas, &mut files), wrong);
    if let Some(id) = own.id(namespaces::Kind::User) {
        note(Users::read(id, images), wrong);
    }
    for (_, node, a) in tree.alive() {
        let registers = a.threads.iter().try_for_each(|(tid, entry)| state(entry).task(*tid));
        note(registers.task(node.pid), wrong);
    }
    Some(Examined { inventory, tree, own, files, filters: filters.flatten().unwrap_or_default() })
}

/// Would this CPU take a thread's registers?
fn state(entry: &standstill_images::proto::CoreEntry) -> Result<()> {
    let (info, _) = core::parts(entry)?;
    registers::from_entry(&info.gpregs)?;
    registers::xstate_from_entry(&info.fpregs, vec![0; XSTATE]).map(drop)
}

fn note<T>(result: Result<T>, wrong: &mut dyn FnMut(Error)) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(e) => {
            wrong(e);
            None
        }
    }
}
