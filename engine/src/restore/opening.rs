//! What the engine opens for the tasks of a restore, and how they get it: one list of descriptors, sent to the first task,
//! from which all others inherit it (SCM_RIGHTS, unix(7)). What only a living task can be the object of is opened later.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use standstill_images::proto::{FdinfoEntry, FsEntry};
use standstill_images::{ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::files::{memfd, regular, tty, RestoreFiles};
use crate::options::Options;
use crate::sys::calls;
use crate::tasks::tree::Tree;

/// Descriptors that go to the first task, in order.
#[derive(Debug, Default)]
pub(super) struct Transfer {
    pub(super) list: Vec<OwnedFd>,
}

impl Transfer {
    pub(super) fn add(&mut self, fd: OwnedFd) -> usize {
        self.list.push(fd);
        self.list.len() - 1
    }
    fn add_copy(&mut self, fd: BorrowedFd<'_>) -> Result<usize> {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, 3).call("fcntl(F_DUPFD_CLOEXEC)")?;
        Ok(self.add(copy))
    }
}

/// What the images say of descriptors, with the place of each file in the transfer.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) base: i32,
    /// How many numbers are ours from there on.
    pub(super) room: i32,
    pub(super) files: HashMap<u32, usize>,
    pub(super) late_ids: Vec<u32>,
    pub(super) in_flight: Vec<(u32, usize)>,
    pub(super) areas: HashMap<(u32, u32), usize>,
    pub(super) pages: HashMap<(u32, usize), usize>,
    pub(super) exes: HashMap<u32, usize>,
    pub(super) folders: HashMap<u32, usize>,
    pub(super) terminals: HashMap<i32, (usize, u32)>,
    pub(super) tables: HashMap<u32, Vec<FdinfoEntry>>,
    pub(super) fs: HashMap<i32, FsEntry>,
    pub(super) own_root: Vec<u32>,
}

/// What the images say of the tasks' descriptor tables and folders.
pub(super) fn read_tables(images: &Images, tree: &Tree) -> Result<Draft> {
    let mut draft = Draft::default();
    for (_, node, a) in tree.alive() {
        let id = a.ids.files_id;
        if let std::collections::hash_map::Entry::Vacant(free) = draft.tables.entry(id) {
            let entries: Vec<FdinfoEntry> = images.read_entries(ImageKind::Fdinfo, id)?;
            free.insert(entries);
        }
        let fs: FsEntry = images.read_one(ImageKind::Fs, u32::try_from(node.pid).unwrap_or(0))?;
        draft.fs.insert(node.pid, fs);
    }
    Ok(draft)
}

/// Opens what is open in the tasks, mapped, or their executable or folder.
pub(super) fn open_files(
    opts: &Options,
    tree: &Tree,
    files: &mut RestoreFiles<'_>,
    draft: &mut Draft,
) -> Result<Transfer> {
    let mut transfer = Transfer::default();
    let of_tasks: usize = tree.alive().map(|(_, _, a)| a.memory.files().len() + a.memory.layers() + 8).sum();
    let open: usize = draft.tables.values().map(Vec::len).sum();
    let used = draft.tables.values().flatten().map(|e| e.fd).collect();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(1 << 30);
    // a ring is opened late, and has a number of its own until then
    let rings = 2 * files.entries.values().filter(|e| e.standstill_io_uring.is_some()).count();
    (draft.base, draft.room) = numbers(used, of_tasks + open + rings + tree.nodes.len() + 64, limit)?;
    let mut ids: Vec<u32> = draft.tables.values().flatten().map(|e| e.id).collect();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if files.opens_late(id)? {
            draft.late_ids.push(id);
        } else {
            let fd = files.open(id)?;
            let at = transfer.add_copy(fd)?;
            draft.files.insert(id, at);
        }
    }
    let sent = files.in_flight(&draft.tables);
    files.settle_in_flight(&sent, &draft.tables)?;
    for &id in &sent {
        let fd = files.open(id)?;
        let at = transfer.add_copy(fd)?;
        draft.in_flight.push((id, at));
    }
    for node in tree.nodes.iter().filter(|n| n.sid == n.pid) {
        if let Some(c) = tty::controlling(u32::try_from(node.pid).unwrap_or(0), files)? {
            draft.terminals.insert(node.pid, (transfer.add(c.terminal), c.foreground));
        }
    }
    let has_it = files.mounts.is_some() || opts.root.is_none();
    for (_, node, a) in tree.alive() {
        for key @ (id, mode) in a.memory.files() {
            if draft.areas.contains_key(&key) {
                continue;
            }
            let entry = files.entry(id).task(node.pid)?;
            let (is_memfd, is_socket) = (entry.memfd.is_some(), entry.psk.is_some());
            let fd = if is_socket {
                files.open(id).and_then(|fd| fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)"))
            } else if is_memfd {
                memfd::for_mapping(files, id, mode)
            } else {
                regular::opened_for_mapping(files, id, mode)
            };
            draft.areas.insert(key, transfer.add(fd.at(Place::File(id)).task(node.pid)?));
        }
        let exe = a.memory.mm.exe_file_id;
        if let std::collections::hash_map::Entry::Vacant(free) = draft.exes.entry(exe) {
            free.insert(transfer.add(regular::exe(files, exe).at(Place::File(exe)).task(node.pid)?));
        }
        let pid = u32::try_from(node.pid).unwrap_or(0);
        for n in 0..a.memory.layers() {
            let Some(pages) = a.memory.layer(n) else { continue };
            let file = pages
                .as_file()
                .ok_or(Error::Usage { what: "pages are not in a file; restore needs an image folder".into() })?;
            draft.pages.insert((pid, n), transfer.add_copy(file.as_fd())?);
        }
        // the root that it has anyway
        let here = match &files.mounts {
            Some(made) => rustix::fs::fstat(made.root_of(a.ids.mnt_ns_id.unwrap_or(0))?).call("fstat")?,
            None => rustix::fs::stat("/").call("stat(/)")?,
        };
        if let Some(fs) = draft.fs.get(&node.pid) {
            for id in [fs.cwd_id, fs.root_id] {
                if draft.late_ids.contains(&id) {
                    continue;
                }
                if files.opens_late(id)? {
                    draft.late_ids.push(id);
                } else if !draft.folders.contains_key(&id) {
                    let fd = regular::folder(files, id).at(Place::File(id)).task(node.pid)?;
                    let stat = rustix::fs::fstat(&fd).call("fstat")?;
                    if (stat.st_dev, stat.st_ino) == (here.st_dev, here.st_ino) && has_it {
                        draft.own_root.push(id);
                    }
                    draft.folders.insert(id, transfer.add(fd));
                }
            }
        }
    }
    Ok(transfer)
}

/// Numbers for what the tasks get from us: the first, and how many. None of them is one that a task is to have, and all
/// are below the limit, which not everyone may raise. `used` are the numbers of the tasks.
fn numbers(mut used: Vec<u32>, needed: usize, limit: u64) -> Result<(i32, i32)> {
    const FIRST: i64 = 320;
    const LAST: i64 = 1 << 25;
    used.sort_unstable();
    let highest = i64::from(used.last().copied().unwrap_or(0));
    if highest >= 1 << 24 {
        return Err(Error::lie("fdinfo", format!("descriptor {highest}")));
    }
    let limit = i64::try_from(limit).unwrap_or(LAST).min(LAST);
    if !used.is_empty() && highest >= limit {
        let what = format!(
            "descriptor {highest} of the checkpoint is not below {limit}, the limit of open files here: raise the hard limit \
             (ulimit -Hn), and restore again"
        );
        return Err(Error::Changed { what });
    }
    let needed = i64::try_from(needed).unwrap_or(LAST);
    let above = FIRST.max(highest + 64);
    let mut start = if above + needed <= limit { above } else { 0 };
    if start == 0 {
        // below the highest, then, between two of theirs
        start = FIRST;
        for n in used.iter().map(|&n| i64::from(n)) {
            if n >= start && n - start < needed {
                start = n + 1;
            }
        }
    }
    if start + needed > limit {
        let what = format!(
            "{needed} more descriptors are needed for a moment, and the limit of open files here is {limit}: raise the hard \
             limit (ulimit -Hn), and restore again"
        );
        return Err(Error::Changed { what });
    }
    let end = used.iter().map(|&n| i64::from(n)).find(|&n| n >= start).unwrap_or(limit.max(start + needed));
    let number = |n: i64| i32::try_from(n).map_err(|_| Error::lie("fdinfo", format!("descriptor {n}")));
    Ok((number(start)?, number(end - start)?))
}

/// Opens what needs living tasks, at the numbers that the plans know.
pub(super) fn open_late(files: &mut RestoreFiles<'_>, late: &HashMap<u32, OwnedFd>) -> Result<()> {
    for (&id, place) in late {
        let fd = files.open(id)?;
        calls::replace(fd.as_fd(), place.as_fd())?;
    }
    Ok(())
}

/// Sends descriptors in messages of at most 64.
pub(super) fn send(socket: &OwnedFd, list: &[impl AsFd], alive: &impl Fn() -> Result<()>) -> Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    for part in list.chunks(64) {
        let borrowed: Vec<BorrowedFd<'_>> = part.iter().map(AsFd::as_fd).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); 64 * 4 + 64];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(Error::Usage { what: "descriptors do not fit into a message".into() });
        }
        alive()?;
        rustix::net::sendmsg(socket, &[std::io::IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL)
            .call("sendmsg(SCM_RIGHTS)")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_free() {
        assert_eq!(numbers(vec![0, 1, 2], 100, 20_000).unwrap(), (320, 19_680));
        assert_eq!(numbers(vec![1000], 100, 20_000).unwrap().0, 1064);
        // at the upper end, as valgrind has its own
        assert_eq!(numbers(vec![2, 19_988, 19_994], 100, 20_000).unwrap(), (320, 19_668));
        assert_eq!(numbers(vec![400, 19_994], 100, 20_000).unwrap(), (401, 19_593));
        assert!(numbers(vec![500, 900], 600, 1024).unwrap_err().to_string().contains("ulimit"));
        assert!(numbers(vec![1024], 10, 1024).unwrap_err().to_string().contains("descriptor 1024"));
        assert!(numbers(vec![1 << 30], 10, 1 << 40).is_err());
    }
}
