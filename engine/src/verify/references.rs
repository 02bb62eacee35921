//! Images among each other: each id leads to something, and each image that is named by an id belongs to something.

use std::collections::{BTreeMap, BTreeSet};

use standstill_images::proto::{
    FdTypes, FdinfoEntry, FileEntry, FsEntry, MemfdInodeEntry, PstreeEntry, RemapFilePathEntry, RemapType, TtyInfoEntry,
};
use standstill_images::{Id, ImageKind, Images};

use super::{is_damage, Report};
use crate::error::{Error, Result};
use crate::namespaces::Kind;
use crate::restore::examine::Examined;
use crate::sockets;
use crate::tasks::seccomp;
use crate::tasks::tree::Alive;

/// Numbers by kind of image: what somebody refers to.
#[derive(Default)]
struct Wanted(BTreeMap<ImageKind, BTreeSet<u64>>);

impl Wanted {
    fn add(&mut self, kind: ImageKind, id: impl Into<u64>) {
        self.0.entry(kind).or_default().insert(id.into());
    }
}

/// Follows all ids; what cannot be read has been told of.
pub(super) fn check(images: &Images, examined: &Examined<'_>, report: &mut Report) {
    let mut wanted = Wanted::default();
    tasks(images, examined, &mut wanted, report);
    files(images, examined, &mut wanted, report);
    namespaces(examined, &mut wanted);
    for (kind, ids) in &wanted.0 {
        for id in ids {
            if matches!(images.exists(*kind, *id), Ok(false)) {
                let name = kind.file_name(*id).unwrap_or_default();
                if !report.damaged.contains_key(&name) {
                    report.damage(name, "it is missing");
                }
            }
        }
    }
    // only what each of them must belong to: others may be left out, and be there all the same
    const OWNED: &[(ImageKind, &str)] = &[
        (ImageKind::Core, "pstree.img has no such thread"),
        (ImageKind::Mm, "pstree.img has no such process"),
        (ImageKind::Fs, "pstree.img has no such process"),
        (ImageKind::Ids, "pstree.img has no such process"),
        (ImageKind::Pagemap, "pstree.img has no such process"),
        (ImageKind::Fdinfo, "no process has this table"),
        (ImageKind::GhostFile, "remap-fpath.img leads nobody to it"),
    ];
    for name in images.store().list().unwrap_or_default() {
        let Some((kind, Id(Some(id)))) = ImageKind::from_file_name(&name) else { continue };
        let Some((_, why)) = OWNED.iter().find(|(owned, _)| *owned == kind) else { continue };
        if !wanted.0.get(&kind).is_some_and(|ids| ids.contains(&id)) {
            report.damage(name, *why);
        }
    }
}

fn read<T>(result: Result<T, standstill_images::Error>, report: &mut Report) -> Option<T> {
    match result.map_err(Error::from) {
        Ok(value) => Some(value),
        Err(e) => {
            debug_assert!(is_damage(&e));
            report.add(&e);
            None
        }
    }
}

fn tasks(images: &Images, examined: &Examined<'_>, wanted: &mut Wanted, report: &mut Report) {
    let pstree: Vec<PstreeEntry> = read(images.read_entries(ImageKind::Pstree, ()), report).unwrap_or_default();
    for entry in &pstree {
        let alive = examined.tree.alive().any(|(_, node, _)| u32::try_from(node.pid) == Ok(entry.pid));
        // the dead have no threads
        let threads = if alive { entry.threads.as_slice() } else { &[] };
        threads.iter().chain([&entry.pid]).for_each(|tid| wanted.add(ImageKind::Core, *tid));
        for kind in [ImageKind::Mm, ImageKind::Fs, ImageKind::Ids, ImageKind::Pagemap] {
            // … and may have left some of these
            if alive || matches!(images.exists(kind, entry.pid), Ok(true)) {
                wanted.add(kind, entry.pid);
            }
        }
    }
    let filters = examined.filters.seccomp_filters.len();
    for (_, node, alive) in examined.tree.alive() {
        let pid = u32::try_from(node.pid).unwrap_or(0);
        wanted.add(ImageKind::Fdinfo, alive.ids.files_id);
        has_files(images, examined, pid, alive, report);
        for (tid, core) in &alive.threads {
            let Some(core) = &core.thread_core else { continue };
            let filter = core.seccomp_filter.and_then(|n| usize::try_from(n).ok());
            if core.seccomp_mode == Some(seccomp::FILTER) && filter.is_some_and(|n| n >= filters) {
                report.damage("seccomp.img", format!("thread {tid} has filter {}, of {filters}", filter.unwrap_or(0)));
            }
        }
    }
}

/// A process's descriptors, folders, program and mapped files.
fn has_files(images: &Images, examined: &Examined<'_>, pid: u32, alive: &Alive, report: &mut Report) {
    let entries = &examined.files.entries;
    let table = format!("fdinfo-{}.img", alive.ids.files_id);
    let list: Option<Vec<FdinfoEntry>> = read(images.read_entries(ImageKind::Fdinfo, alive.ids.files_id), report);
    for fd in list.unwrap_or_default() {
        match entries.get(&fd.id) {
            None => report
                .damage("files.img", format!("descriptor {} in {table} is file {:#x}, which is missing", fd.fd, fd.id)),
            Some(file) if file.r#type != fd.r#type => {
                let (here, there) = (fd.r#type().as_str_name(), file.r#type().as_str_name());
                report.damage(&table, format!("descriptor {} is {here}, and in files.img {there}", fd.fd));
            }
            Some(_) => {}
        }
    }
    let is_regular = |id: u32| entries.get(&id).is_some_and(|file| file.reg.is_some());
    let fs: Option<FsEntry> = read(images.read_one(ImageKind::Fs, pid), report);
    for (what, id) in fs.iter().flat_map(|fs| [("working folder", fs.cwd_id), ("root folder", fs.root_id)]) {
        if !is_regular(id) {
            report.damage("files.img", format!("the {what} of process {pid} is file {id:#x}, which is missing"));
        }
    }
    let exe = alive.memory.mm.exe_file_id;
    if !is_regular(exe) {
        report.damage("files.img", format!("the program of process {pid} is file {exe:#x}, which is missing"));
    }
    for (id, _) in alive.memory.files() {
        let known = entries.get(&id).is_some_and(|f| f.reg.is_some() || f.memfd.is_some() || f.psk.is_some());
        if !known {
            report.damage("files.img", format!("process {pid} maps file {id:#x}, which is missing"));
        }
    }
}

/// Has an entry the part that its type promises?
fn is_complete(file: &FileEntry) -> bool {
    match file.r#type() {
        FdTypes::Reg => file.reg.is_some(),
        FdTypes::Pipe => file.pipe.is_some(),
        FdTypes::Fifo => file.fifo.is_some(),
        FdTypes::Eventfd => file.efd.is_some(),
        FdTypes::Eventpoll => file.epfd.is_some(),
        FdTypes::Signalfd => file.sgfd.is_some(),
        FdTypes::Timerfd => file.tfd.is_some(),
        FdTypes::Inotify => file.ify.is_some(),
        FdTypes::Fanotify => file.ffy.is_some(),
        FdTypes::Pidfd => file.pidfd.is_some(),
        FdTypes::Memfd => file.memfd.is_some(),
        FdTypes::Tty => file.tty.is_some(),
        FdTypes::Unixsk => file.usk.is_some(),
        FdTypes::Inetsk => file.isk.is_some(),
        FdTypes::Netlinksk => file.nlsk.is_some(),
        FdTypes::Packetsk => file.psk.is_some(),
        FdTypes::StandstillIoUring => file.standstill_io_uring.is_some(),
        FdTypes::StandstillMqueue => file.standstill_mqueue.is_some(),
        FdTypes::Ns => file.nsf.is_some(),
        FdTypes::Tunf => file.tunf.is_some(),
        FdTypes::Ext => file.ext.is_some(),
        FdTypes::Bpfmap => file.bpf.is_some(),
        FdTypes::Und | FdTypes::CtlTty | FdTypes::AutofsPipe => true,
    }
}

/// What open files refer to.
fn files(images: &Images, examined: &Examined<'_>, wanted: &mut Wanted, report: &mut Report) {
    let entries = &examined.files.entries;
    let ttys: Vec<TtyInfoEntry> =
        read(images.read_entries_if_there(ImageKind::TtyInfo, ()), report).unwrap_or_default();
    for file in entries.values() {
        let id = file.id;
        if !is_complete(file) {
            report.damage("files.img", format!("file {id:#x} lacks the entry of its type"));
        }
        if let Some(tty) = file.tty.as_ref().filter(|tty| !ttys.iter().any(|info| info.id == tty.tty_info_id)) {
            report.damage("tty-info.img", format!("file {id:#x} is of terminal {}, which is missing", tty.tty_info_id));
        }
        let others = file.tty.as_ref().and_then(|tty| tty.regf_id).into_iter();
        for other in others.chain(file.fifo.as_ref().and_then(|fifo| fifo.regf_id)) {
            if entries.get(&other).is_none_or(|file| file.reg.is_none()) {
                report.damage("files.img", format!("file {id:#x} has the path of {other:#x}, which is missing"));
            }
        }
        if let Some(socket) = file.isk.as_ref().filter(|e| sockets::inet::is_connection(e)) {
            if socket.state != sockets::CLOSE && examined.inventory.tcp_close != Some(true) {
                wanted.add(ImageKind::TcpStream, socket.ino);
            }
        }
    }
    let memfds: Vec<MemfdInodeEntry> =
        read(images.read_entries_if_there(ImageKind::MemfdInode, ()), report).unwrap_or_default();
    for memfd in memfds.iter().filter(|memfd| memfd.size > 0) {
        wanted.add(ImageKind::ShmemPagemap, memfd.shmid);
    }
    let remaps: Vec<RemapFilePathEntry> =
        read(images.read_entries_if_there(ImageKind::RemapFpath, ()), report).unwrap_or_default();
    for remap in remaps {
        const OLD_GHOST: u32 = 1 << 31;
        match remap.remap_type.map(|_| remap.remap_type()) {
            Some(RemapType::Ghost) => wanted.add(ImageKind::GhostFile, remap.remap_id),
            None if remap.remap_id & OLD_GHOST != 0 => wanted.add(ImageKind::GhostFile, remap.remap_id & !OLD_GHOST),
            Some(RemapType::Linked | RemapType::Procfs) | None => {}
        }
    }
}

/// What must be there of namespaces; their readers have told of the rest.
fn namespaces(examined: &Examined<'_>, wanted: &mut Wanted) {
    for (kind, image) in
        [(Kind::Uts, ImageKind::Utsns), (Kind::Ipc, ImageKind::IpcVar), (Kind::User, ImageKind::Userns)]
    {
        if let Some(id) = examined.own.id(kind) {
            wanted.add(image, id);
        }
    }
}
