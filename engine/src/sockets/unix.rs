//! Unix sockets: streams, datagrams, sequences of packets.
//!
//! The kernel lists them (unix_diag) with their names, peers, queue lengths and, for one that listens, who waits. SIOCUNIXFILE
//! opens the file that a socket is bound to, gone or not.
//!
//! Image: [`UnixSkEntry`] in `files.img`; `name` as in `sun_path` (a path ends with NUL, an abstract name begins with one),
//! `name_dir` what a relative path is relative to, `standstill_moved` where the file is if it was moved since, `peer` the inode of the other end. What is in flight: [`queue`]. A
//! socket that is connected and was not accepted yet has the listening one as its peer. A peer outside the tree is an entry
//! of its own with [`EXTERN`] and a name, which is connected to at restore.
//!
//! Queues are looked at when all descriptors are known ([`finish`]): what is in flight may be a file that a task has, or a
//! socket whose queue has files in turn.
//!
//! Who the peer is, as SO_PEERCRED says it: [`peer`].
//!
//! Not kept: options without a field ([`options`]), a pending error (SO_ERROR), and that a socket outside the tree waits to be
//! accepted. Refused: in flight, what can only be opened when a
//! task of the tree is there (its pidfd, a file below /proc/PID).
//!
//! Man pages: unix(7), sock_diag(7).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::net::SocketType;
use standstill_images::proto::{FdTypes, FileEntry, FilePermsEntry, ScmEntry, SkPacketEntry, UnixSkEntry};
use standstill_images::ImageKind;

use super::{options, queue, CLOSE, ESTABLISHED, LISTEN};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{no_owner, Descriptor, DumpFiles};
use crate::mounts::table::{self, Mount};
use crate::network::doors::Doors;
use crate::sys::diag::unix::{UnixAddress, UnixSocket};
use crate::sys::diag::Diag;
use crate::sys::{calls, mount};

mod connect;
mod name;
mod peer;
mod restore;

pub use peer::{room, Root};
pub use restore::{make, make_with, open, Restored};

/// `uflags`: the peer of one of ours, outside the tree.
pub const EXTERN: u32 = 1;
/// `uflags`: it was connected to the service that dumped it.
pub const SERVICE: u32 = 2;
/// `uflags`: a plugin makes it.
pub const CALLBACK: u32 = 4;

const SIOCUNIXFILE: u64 = 0x89e0;

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    /// All of our and the tree's network namespaces, by inode, as they were when the first was dumped.
    listed: Option<HashMap<u32, UnixSocket>>,
    /// Those in the images.
    ours: BTreeMap<u32, Ours>,
    /// Those whose queue is to be looked at, by inode.
    queues: VecDeque<(u32, OwnedFd)>,
    /// What was in flight, held so that no number is used twice.
    in_flight: Vec<OwnedFd>,
}

#[derive(Debug)]
struct Ours {
    id: u32,
    kind: SocketType,
}

impl Dumped {
    /// Is there something to be looked at?
    pub fn has_queues(&self) -> bool {
        !self.queues.is_empty()
    }

    /// What the kernel says of a socket.
    fn find(&mut self, ino: u32, networks: &Rc<Doors>) -> Result<UnixSocket> {
        if self.listed.is_none() {
            let mut all = HashMap::new();
            for id in networks.ids() {
                let _inside = networks.enter(id)?;
                let sockets = super::listed(Diag::open().and_then(|mut diag| diag.unix()))?;
                all.extend(sockets.into_iter().map(|s| (s.ino, s)));
            }
            self.listed = Some(all);
        }
        self.known(ino).cloned().ok_or_else(|| {
            let what = format!("unix socket {ino}, which is in another network namespace");
            Error::refused(what, "close it before the dump")
        })
    }

    fn known(&self, ino: u32) -> Option<&UnixSocket> {
        self.listed.as_ref().and_then(|sockets| sockets.get(&ino))
    }

    /// The listening socket that this one waits at.
    fn waits_at(&self, ino: u32) -> Option<u32> {
        self.listed.as_ref()?.values().find(|s| s.pending.contains(&ino)).map(|s| s.ino)
    }
}

/// How messages call a socket.
fn called(socket: &UnixSocket) -> String {
    match socket.address() {
        UnixAddress::Unnamed => format!("unix socket {}", socket.ino),
        UnixAddress::Path(path) => format!("unix socket {} ({})", socket.ino, path.escape_ascii()),
        UnixAddress::Abstract(name) => format!("unix socket {} (@{})", socket.ino, name.escape_ascii()),
    }
}

/// The type of a socket, if it is one that can be carried.
fn kind_of(number: u32) -> Option<SocketType> {
    let kinds = [SocketType::STREAM, SocketType::DGRAM, SocketType::SEQPACKET];
    kinds.into_iter().find(|kind| kind.as_raw() == number)
}

/// Dumps a unix socket but for its queue.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let ino = u32::try_from(d.stat.st_ino).unwrap_or(u32::MAX);
    let socket = cx.unix.find(ino, &cx.networks)?;
    let kind = kind_of(socket.socket_type.into()).ok_or_else(|| {
        Error::refused(
            format!("{} of type {}", called(&socket), socket.socket_type),
            "only stream, dgram and seqpacket are supported",
        )
    })?;
    let state = u32::from(socket.state);
    if ![ESTABLISHED, CLOSE, LISTEN].contains(&state) {
        return Err(Error::refused(format!("{} in state {state}", called(&socket)), "try again when it is connected"));
    }
    let mut entry = UnixSkEntry {
        id,
        ino,
        r#type: kind.as_raw(),
        state,
        flags: d.flags,
        uflags: 0,
        backlog: socket.wqueue,
        peer: socket.peer.unwrap_or(0),
        fown: d.fown,
        opts: options::dump(d.copy.as_fd(), true)?,
        name: socket.name.clone().unwrap_or_default(),
        shutdown: Some(i32::from(socket.shutdown)).filter(|&bits| bits != 0),
        file_perms: None,
        name_dir: None,
        deleted: None,
        ns_id: Some(cx.net_ns),
        mnt_id: None,
        standstill_moved: None,
        standstill_peer: peer::dump(d.copy.as_fd(), cx)?,
        standstill_connector: None,
    };
    if let UnixAddress::Path(path) = socket.address() {
        bound_file(d, &socket, path, &mut entry, cx)?;
    }
    let to_us = entry.peer != 0 && cx.opts.service_socket == Some(entry.peer);
    if to_us {
        // the one who asked for this dump is in the tree: at restore it finds our answer in place of us
        entry.state = CLOSE;
        entry.peer = 0;
        entry.uflags = SERVICE;
        entry.standstill_peer = None;
    } else if state == LISTEN {
        pending(&socket, cx)?;
    } else if queue::is_readable(d.copy.as_fd())? {
        cx.unix.queues.push_back((ino, d.copy.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?));
    }
    if entry.peer == 0 && !to_us && state == ESTABLISHED && kind != SocketType::DGRAM {
        entry.peer = other_end(&socket, cx)?;
        if entry.peer != 0 && !d.in_flight() {
            entry.standstill_connector = Some(peer::of_task(d.pid, cx)?);
        }
    }
    cx.unix.ours.insert(ino, Ours { id, kind });
    Ok(FileEntry { id, r#type: FdTypes::Unixsk.into(), usk: Some(entry), ..FileEntry::default() })
}

/// Those that wait to be accepted must be there still.
fn pending(socket: &UnixSocket, cx: &DumpFiles<'_>) -> Result<()> {
    if socket.pending.contains(&0) {
        let what = format!("a connection to {} that was closed before it was accepted", called(socket));
        return Err(Error::refused(what, "let the program accept before the dump"));
    }
    for ino in &socket.pending {
        if cx.unix.known(*ino).is_none() {
            tracing::warn!("{} is waited for from outside; that connection is lost", called(socket));
        }
    }
    Ok(())
}

/// What a connected socket whose peer has no inode is connected to: the listening one it waits at, or nothing any more.
fn other_end(socket: &UnixSocket, cx: &DumpFiles<'_>) -> Result<u32> {
    match cx.unix.waits_at(socket.ino) {
        Some(_) if socket.wqueue != 0 => Err(Error::refused(
            format!("data of {} that was sent before the connection was accepted", called(socket)),
            "let the program accept before the dump",
        )),
        Some(listening) => Ok(listening),
        None if socket.shutdown == 3 => Ok(0),
        None => Err(Error::refused(format!("{}, connected to nothing", called(socket)), "close it before the dump")),
    }
}

/// The file that a socket is bound to: its owner, its mode, whether it is gone or was moved, and what its name is relative to.
fn bound_file(
    d: &Descriptor,
    socket: &UnixSocket,
    path: &[u8],
    entry: &mut UnixSkEntry,
    cx: &DumpFiles<'_>,
) -> Result<()> {
    let users = &cx.users;
    let mut on = None;
    let (stat, link) = match calls::ioctl_value(d.copy.as_fd(), "ioctl(SIOCUNIXFILE)", SIOCUNIXFILE, 0) {
        Ok(fd) => {
            let fd = i32::try_from(fd).unwrap_or(-1);
            let file = format!("/proc/self/fd/{fd}");
            let looked = rustix::fs::stat(&file).call("stat(/proc/self/fd/N)");
            let link = rustix::fs::readlink(&file, Vec::new()).call("readlink(/proc/self/fd/N)");
            on = cx.mounts.as_ref().map(|mounts| Ok::<_, Error>((mounts, mount::of_number(fd)?))).transpose()?;
            nix::unistd::close(fd).call("close")?;
            (Some(looked?), link?.into_bytes())
        }
        // a user without CAP_NET_ADMIN looks where the task would
        Err(e) if e.errno() == libc::EPERM => (None, Vec::new()),
        Err(e) => return Err(e),
    };
    let here = ["cwd", "root"].into_iter().find_map(|from| {
        let folder = format!("/proc/{}/{from}", d.pid);
        let full = [folder.as_bytes(), b"/", path].concat();
        let found = rustix::fs::stat(full).ok().filter(|s| Some(s.st_ino as u32) == socket.vfs_ino)?;
        Some((found, rustix::fs::readlink(folder, Vec::new()).ok()?.into_bytes()))
    });
    let (link, deleted) = match link.strip_suffix(b" (deleted)") {
        Some(link) => (link, true),
        None => (link.as_slice(), stat.is_none() && here.is_none()),
    };
    // one that is not the tree's says nothing at restore. A restore has bound a hidden one by way of its file system, on no mount
    let full = if path.starts_with(b"/") { path } else { link.strip_suffix(b" (deleted)").unwrap_or(link) };
    let on = on.and_then(|(mounts, id)| {
        let dev = stat.as_ref().map(|s| rustix::fs::major(s.st_dev) << 20 | rustix::fs::minor(s.st_dev) & 0xf_ffff);
        let above = |m: &&Mount| Some(m.dev) == dev && table::below(full, &m.point).is_some();
        let known = mounts.table.by_id(u32::try_from(id).ok()?);
        known.or_else(|| mounts.table.mounts.iter().filter(above).max_by_key(|m| m.point.len()))
    });
    entry.mnt_id = on.and_then(|m| i32::try_from(m.id).ok());
    entry.deleted = Some(deleted).filter(|&deleted| deleted);
    entry.file_perms = stat.as_ref().or(here.as_ref().map(|(stat, _)| stat)).map(|stat| FilePermsEntry {
        mode: stat.st_mode,
        uid: users.user(stat.st_uid),
        gid: users.group(stat.st_gid),
    });
    let absolute = path.starts_with(b"/");
    let mut folder = link.strip_suffix(path).and_then(|folder| folder.strip_suffix(b"/")).map(<[u8]>::to_vec);
    let is_hidden = link == path;
    if !deleted
        && !is_hidden
        && stat.is_some()
        && here.is_none()
        && (absolute || folder.is_none())
        && socket.vfs_ino.is_some()
    {
        entry.standstill_moved = Some(link.to_vec());
        // its name may have been relative to another one; this will do
        folder = link.iter().rposition(|&b| b == b'/').map(|at| link[..at.max(1)].to_vec());
    }
    if !absolute {
        let folder = folder.or(here.map(|(_, folder)| folder));
        entry.name_dir = Some(folder.ok_or_else(|| {
            Error::refused(format!("{}, whose folder is not known", called(socket)), "bind it to a full path")
        })?);
    }
    Ok(())
}

/// Ends a dump: what is in flight, then the peers that no task of the tree has.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    let mut messages = Vec::new();
    while let Some((ino, fd)) = cx.unix.queues.pop_front() {
        in_flight(ino, fd.as_fd(), cx, &mut messages).at(Place::Item("queue of socket", ino.into()))?;
    }
    if !messages.is_empty() {
        let mut image = cx.images.create(ImageKind::SkQueues, ())?;
        for (entry, bytes) in &messages {
            image.write_with_payload(entry, &bytes.as_slice())?;
        }
        image.finish()?;
    }
    external(cx)?;
    cx.unix.in_flight.clear();
    Ok(())
}

/// The queue of one socket.
fn in_flight(
    ino: u32,
    fd: BorrowedFd<'_>,
    cx: &mut DumpFiles<'_>,
    messages: &mut Vec<(SkPacketEntry, Vec<u8>)>,
) -> Result<()> {
    let (Some(ours), Some(socket)) = (cx.unix.ours.get(&ino), cx.unix.known(ino)) else { return Ok(()) };
    let ended = ours.kind == SocketType::SEQPACKET && socket.shutdown & 1 != 0;
    let (id_for, stream) = (ours.id, ours.kind == SocketType::STREAM);
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    for message in queue::peek(fd, stream, ended, cx.guard)? {
        let mut rights = Vec::new();
        for file in message.rights {
            // held for the rest of the dump, so it is told from all other files by our own number of it
            let pidfd = calls::pidfd_open(me, 0)?;
            let mut d = Descriptor::read(me, pidfd.as_fd(), file.as_raw_fd(), &mut Vec::new())?;
            cx.pids.translate(&mut d.fown);
            let fdinfo = cx.descriptor(&d).at(Place::Step("a file in flight"))?;
            if cx.opens_late(fdinfo.id) {
                // queues are filled before there are tasks
                let what = format!("in flight: {}", String::from_utf8_lossy(&d.link));
                return Err(Error::refused(
                    what,
                    "it belongs to a process of the tree: let the program receive it before the dump",
                ));
            }
            rights.push(fdinfo.id);
            cx.unix.in_flight.push(file);
        }
        let length = u32::try_from(message.bytes.len()).unwrap_or(u32::MAX);
        let scm =
            if rights.is_empty() { Vec::new() } else { vec![ScmEntry { r#type: libc::SCM_RIGHTS as u32, rights }] };
        messages.push((SkPacketEntry { id_for, length, scm }, message.bytes));
    }
    Ok(())
}

/// Peers outside the tree: an entry for each that can be connected to again, an error for the others.
fn external(cx: &mut DumpFiles<'_>) -> Result<()> {
    let mut peers: BTreeMap<u32, UnixSocket> = BTreeMap::new();
    for ino in cx.unix.ours.keys() {
        let Some(socket) = cx.unix.known(*ino) else { continue };
        let Some(peer) = socket.peer.filter(|&peer| peer != 0) else { continue };
        if cx.opts.service_socket == Some(peer) {
            continue;
        }
        let Some(other) = cx.unix.known(peer) else {
            let what = format!("{} without its peer {peer}", called(socket));
            return Err(Error::refused(what, "dump the task that has the peer, too"));
        };
        if other.peer != Some(*ino) && other.address() == UnixAddress::Unnamed {
            let what = format!("{} with unreachable peer {peer}", called(socket));
            return Err(Error::refused(what, "only a peer with a name can be connected to again"));
        }
        if !cx.unix.ours.contains_key(&peer) {
            may_be_external(socket, other, cx)?;
            peers.insert(peer, other.clone());
        }
    }
    for (ino, peer) in peers {
        let id = cx.new_id();
        let entry = UnixSkEntry {
            id,
            ino,
            r#type: SocketType::DGRAM.as_raw(),
            state: LISTEN,
            uflags: EXTERN,
            name: peer.name.unwrap_or_default(),
            fown: no_owner(),
            opts: options::unknown(),
            ..UnixSkEntry::default()
        };
        cx.add(FileEntry { id, r#type: FdTypes::Unixsk.into(), usk: Some(entry), ..FileEntry::default() });
    }
    Ok(())
}

/// The order in which CRIU takes them: it looks for a socket's peer among those that came before, unless that peer has the
/// socket as its own.
pub fn peers_first(entries: Vec<FileEntry>) -> Vec<FileEntry> {
    let sockets = entries.iter().enumerate().filter_map(|(n, e)| Some((e.usk.as_ref()?.ino, n)));
    let places: HashMap<u32, usize> = sockets.collect();
    let peer = |n: usize| {
        let socket = entries.get(n)?.usk.as_ref()?;
        let at = *places.get(&socket.peer)?;
        Some(at).filter(|&at| entries[at].usk.as_ref().is_some_and(|other| other.peer != socket.ino))
    };
    let (mut order, mut taken) = (Vec::with_capacity(entries.len()), vec![false; entries.len()]);
    for n in 0..entries.len() {
        let from = order.len();
        let mut next = Some(n).filter(|&n| !taken[n]);
        while let Some(n) = next {
            taken[n] = true;
            order.push(n);
            next = peer(n).filter(|&n| !taken[n]);
        }
        order[from..].reverse();
    }
    let mut entries: Vec<Option<FileEntry>> = entries.into_iter().map(Some).collect();
    order.into_iter().filter_map(|n| entries[n].take()).collect()
}

fn may_be_external(socket: &UnixSocket, peer: &UnixSocket, cx: &DumpFiles<'_>) -> Result<()> {
    if cx.opts.external_has(&format!("unix[{}]", socket.ino)) {
        return Ok(());
    }
    let connected = format!("{}, connected to {} outside the tree,", called(socket), called(peer));
    if !cx.opts.ext_unix_sk {
        return Err(Error::refused(connected, "External socket is used. Consider using --ext-unix-sk option."));
    }
    if kind_of(peer.socket_type.into()) != Some(SocketType::DGRAM) {
        return Err(Error::refused(connected, "Can't dump half of stream unix connection."));
    }
    if peer.address() == UnixAddress::Unnamed {
        return Err(Error::refused(connected, "Can't dump name-less external socket."));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
