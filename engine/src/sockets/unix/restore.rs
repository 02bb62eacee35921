//! Making unix sockets again, all at once: sockets and names, connections, what is in flight, and at the end options and
//! what was shut down.
//!
//! A socket that was accepted has the name of the one that listened. So it is accepted again: from that one if it is there,
//! from one that is bound for the moment if not.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use standstill_images::proto::{StandstillCredentialsEntry, UnixSkEntry};

use super::super::queue::{self, Stored};
use super::super::{options, shutdown_how, CLOSE, ESTABLISHED, LISTEN};
use super::name::{self, Name};
use super::peer::{Makers, Root};
use super::{connect, kind_of, CALLBACK, EXTERN, SERVICE};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{set_status_flags, RestoreFiles};
use crate::sys::calls;

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    made: bool,
}

/// One of the sockets that were made, when it is first asked for.
pub fn open(e: &UnixSkEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    make(cx)?;
    cx.opened
        .remove(&e.id)
        .ok_or_else(|| Error::lie("files.img", format!("unix socket {} belongs to nobody in the tree", e.ino)))
}

/// Makes all of them, if they are not there yet: with them come the files that they are bound to.
pub fn make(cx: &mut RestoreFiles<'_>) -> Result<()> {
    make_with(cx, None)
}

/// The same, when the first task of the tree is there.
pub fn make_with(cx: &mut RestoreFiles<'_>, root: Option<Root<'_>>) -> Result<()> {
    if cx.unix.made {
        return Ok(());
    }
    cx.unix.made = true;
    let mut makers = Makers::new(root, &cx.users)?;
    All::read(cx)?.make(cx, &mut makers)
}

/// What one socket is to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The caller has it.
    Given(i32),
    /// It listens, or is not connected.
    Alone,
    /// Connected to the one that is connected to it.
    Pair(usize),
    /// The other end was closed.
    Severed,
    /// Connected to one that has not accepted it.
    Waits(usize),
    /// Datagrams go to this one.
    Sends(usize),
    /// Connected to one outside the tree, by its place among those.
    Outside(usize),
}

/// All unix sockets of the images.
struct All {
    sockets: Vec<UnixSkEntry>,
    outside: Vec<UnixSkEntry>,
    roles: Vec<Role>,
    queues: HashMap<u32, Vec<Stored>>,
    /// What a bound one can be reached by.
    nodes: HashMap<usize, OwnedFd>,
    /// Other ends that fill a queue and go.
    ghosts: HashMap<usize, OwnedFd>,
    /// Sockets that listen for a moment.
    listening: Vec<(UnixSkEntry, OwnedFd, Option<OwnedFd>)>,
    /// Who those that listen tell others that they are now, if that is not what they are to say in the end.
    said: HashMap<usize, StandstillCredentialsEntry>,
}

fn kind(e: &UnixSkEntry) -> Result<SocketType> {
    let lie = || Error::lie("files.img", format!("unix socket {} has type {}", e.ino, e.r#type));
    kind_of(e.r#type).ok_or_else(lie)
}

fn is_stream(e: &UnixSkEntry) -> bool {
    e.r#type == SocketType::STREAM.as_raw()
}

fn is_dgram(e: &UnixSkEntry) -> bool {
    e.r#type == SocketType::DGRAM.as_raw()
}

/// The same name of the same file.
fn same_name(a: &UnixSkEntry, b: &UnixSkEntry) -> bool {
    let gone = |e: &UnixSkEntry| e.deleted == Some(true);
    // abstract names are those of a network namespace
    let network = |e: &UnixSkEntry| e.ns_id.filter(|_| e.name.first() == Some(&0));
    (&a.name, &a.name_dir, gone(a), a.r#type, network(a)) == (&b.name, &b.name_dir, gone(b), b.r#type, network(b))
}

impl All {
    /// Checks all entries and what they are to each other; makes nothing.
    fn read(cx: &RestoreFiles<'_>) -> Result<All> {
        let entries = cx.entries.values().filter_map(|entry| entry.usk.clone());
        let (mut outside, mut sockets): (Vec<_>, Vec<_>) = entries.partition(|e| e.uflags & EXTERN != 0);
        sockets.sort_by_key(|e| e.id);
        outside.sort_by_key(|e| e.id);
        let mut all = All {
            sockets,
            outside,
            roles: Vec::new(),
            queues: queue::read(cx.images)?,
            nodes: HashMap::new(),
            ghosts: HashMap::new(),
            listening: Vec::new(),
            said: HashMap::new(),
        };
        let mut by_ino = HashMap::new();
        for (n, e) in all.sockets.iter().enumerate() {
            if by_ino.insert(e.ino, n).is_some() {
                return Err(Error::lie("files.img", format!("unix socket {} is there twice", e.ino)));
            }
        }
        let roles = (0..all.sockets.len()).map(|n| all.role(n, &by_ino, cx).at(all.place(n)));
        all.roles = roles.collect::<Result<_>>()?;
        let receivers: Vec<u32> = all.sockets.iter().map(|e| e.id).collect();
        if let Some(id) = all.queues.keys().find(|id| !receivers.contains(id)) {
            return Err(Error::lie("sk-queues.img", format!("a message for file {id:#x}, which is no unix socket")));
        }
        Ok(all)
    }

    fn place(&self, n: usize) -> Place {
        Place::Item("unix socket", self.sockets.get(n).map_or(0, |e| e.ino.into()))
    }

    fn role(&self, n: usize, by_ino: &HashMap<u32, usize>, cx: &RestoreFiles<'_>) -> Result<Role> {
        let e = &self.sockets[n];
        let lie = |what: &str| Err(Error::lie("files.img", format!("unix socket {} {what}", e.ino)));
        let dgram = kind(e)? == SocketType::DGRAM;
        let named = Name::of(e)? != Name::None;
        let given = |e: &UnixSkEntry| cx.opts.inherited_fd(&format!("socket:[{}]", e.ino));
        if let Some(fd) = given(e) {
            return Ok(Role::Given(fd));
        }
        if e.uflags & CALLBACK != 0 {
            let what = format!("unix socket {}, which is made by a plugin,", e.ino);
            return Err(Error::refused(what, "there are no plugins"));
        }
        if e.uflags & SERVICE != 0 {
            return if dgram { lie("asked for a dump by datagrams") } else { Ok(Role::Severed) };
        }
        match (e.state, e.peer) {
            (LISTEN, 0) if !dgram && named => return Ok(Role::Alone),
            (LISTEN, _) => return lie("listens and cannot"),
            (CLOSE, 0) => return Ok(Role::Alone),
            (ESTABLISHED, 0) if dgram && named => return Ok(Role::Alone),
            (ESTABLISHED, 0) => return Ok(Role::Severed),
            (ESTABLISHED, _) => {}
            _ if dgram && e.state == CLOSE => {}
            _ => return lie("is in a state that it cannot be in"),
        }
        if let Some(&peer) = by_ino.get(&e.peer) {
            let other = &self.sockets[peer];
            let mutual = other.peer == e.ino;
            let thirds = || {
                self.sockets
                    .iter()
                    .any(|s| s.ino != e.ino && s.ino != other.ino && [e.ino, other.ino].contains(&s.peer))
            };
            return match () {
                () if other.r#type != e.r#type => lie("is connected to one of another type"),
                () if other.state == LISTEN => Ok(Role::Waits(peer)),
                () if mutual && peer != n && given(other).is_some() && !dgram => {
                    let what = format!("unix socket {}, whose other end {} is given,", e.ino, other.ino);
                    Err(Error::refused(what, "give both ends of a connection, or none"))
                }
                () if mutual && peer != n && !(dgram && (thirds() || given(other).is_some())) => Ok(Role::Pair(peer)),
                () if dgram => Ok(Role::Sends(peer)),
                () => lie("is connected to one that is not connected to it"),
            };
        }
        match self.outside.iter().position(|o| o.ino == e.peer) {
            Some(_) if !cx.opts.ext_unix_sk => Err(Error::refused(
                format!("unix socket {}, connected to one outside the tree,", e.ino),
                "External socket found in image. Consider using the --ext-unix-sk option to allow restoring it.",
            )),
            Some(peer) => Ok(Role::Outside(peer)),
            None => lie(&format!("is connected to {}, which is missing", e.peer)),
        }
    }

    /// Makes all of them.
    fn make(&mut self, cx: &mut RestoreFiles<'_>, makers: &mut Makers<'_>) -> Result<()> {
        let all = 0..self.sockets.len();
        // a name whose file is gone before the one whose file stays
        let mut first: Vec<usize> = all.clone().collect();
        first.sort_by_key(|&n| self.sockets[n].deleted != Some(true));
        for n in first {
            self.single(n, cx, makers).at(self.place(n))?;
        }
        for n in all.clone() {
            self.connected(n, cx, makers).at(self.place(n))?;
        }
        self.listening.clear();
        for n in all.clone() {
            self.pair_queue(n, cx).at(self.place(n))?;
        }
        self.datagrams(cx)?;
        self.late(cx, makers)?;
        for &n in self.said.keys() {
            let e = &self.sockets[n];
            makers.listen(self.fd(n, cx)?, backlog(e), e.standstill_peer.as_ref()).at(self.place(n))?;
        }
        self.ghosts.clear();
        for n in all {
            self.last(n, cx).at(self.place(n))?;
        }
        Ok(())
    }

    fn keep(&self, n: usize, fd: OwnedFd, cx: &mut RestoreFiles<'_>) {
        cx.opened.insert(self.sockets[n].id, fd);
    }

    fn fd<'cx>(&self, n: usize, cx: &'cx RestoreFiles<'_>) -> Result<BorrowedFd<'cx>> {
        cx.opened.get(&self.sockets[n].id).map(AsFd::as_fd).ok_or(Error::Gone)
    }

    /// Who connects to a datagram socket first, if anybody does.
    fn sender(&self, n: usize) -> Option<usize> {
        self.roles.iter().position(|&role| role == Role::Sends(n))
    }

    /// Those that need no other end to be made.
    fn single(&mut self, n: usize, cx: &mut RestoreFiles<'_>, makers: &mut Makers<'_>) -> Result<()> {
        let e = &self.sockets[n];
        let fd = match self.roles[n] {
            Role::Given(fd) => {
                let me = calls::pidfd_open(i32::try_from(std::process::id()).unwrap_or(0), 0)?;
                self.queues.remove(&e.id);
                calls::pidfd_getfd(me.as_fd(), fd)?
            }
            Role::Pair(_) | Role::Severed => return Ok(()),
            Role::Sends(_) | Role::Alone | Role::Outside(_)
                if is_dgram(e) && self.queues.contains_key(&e.id) && self.sender(n).is_none() =>
            {
                // its messages come from another end; without a peer of its own, others can connect to it
                let (fd, ghost) = pair(e, cx, makers)?;
                rustix::net::connect_unspec(&fd).call("connect(AF_UNSPEC)")?;
                self.ghosts.insert(n, ghost);
                fd
            }
            Role::Alone | Role::Sends(_) | Role::Waits(_) | Role::Outside(_) => socket(e, cx)?,
        };
        if !matches!(self.roles[n], Role::Given(_)) {
            if let Some(node) = name::bind(fd.as_fd(), e, cx)? {
                self.nodes.insert(n, node);
            }
            if e.state == LISTEN {
                makers.listen(fd.as_fd(), backlog(e), e.standstill_peer.as_ref())?;
            }
        }
        self.keep(n, fd, cx);
        Ok(())
    }

    /// Pairs, and those whose other end is gone.
    fn connected(&mut self, n: usize, cx: &mut RestoreFiles<'_>, makers: &mut Makers<'_>) -> Result<()> {
        match self.roles[n] {
            Role::Pair(other) if other > n => {
                let (a, b) = (self.sockets[n].clone(), self.sockets[other].clone());
                let (fd, peer) = if is_dgram(&a) {
                    let (fd, peer) = pair(&a, cx, makers)?;
                    name::bind(fd.as_fd(), &a, cx)?;
                    name::bind(peer.as_fd(), &b, cx)?;
                    (fd, peer)
                } else if self.listener(&b).is_some() && self.listener(&a).is_none() || a.name.is_empty() {
                    let (peer, fd) = self.accepted(&b, Some(&a), cx, makers)?;
                    (fd, peer)
                } else {
                    self.accepted(&a, Some(&b), cx, makers)?
                };
                self.keep(n, fd, cx);
                self.keep(other, peer, cx);
            }
            Role::Severed => {
                let e = self.sockets[n].clone();
                let (fd, ghost) = self.accepted(&e, None, cx, makers)?;
                if e.uflags & SERVICE != 0 {
                    let answer = crate::rpc::wire::encode(crate::rpc::answer::dumped_and_restored());
                    rustix::net::send(&ghost, &answer, rustix::net::SendFlags::NOSIGNAL).call("send")?;
                }
                self.ghosts.insert(n, ghost);
                self.keep(n, fd, cx);
            }
            Role::Given(_) | Role::Pair(_) | Role::Alone | Role::Waits(_) | Role::Sends(_) | Role::Outside(_) => {}
        }
        Ok(())
    }

    /// The socket that listens at the name of this one.
    fn listener(&self, e: &UnixSkEntry) -> Option<usize> {
        let listens =
            |(other, role): (&UnixSkEntry, &Role)| *role == Role::Alone && other.state == LISTEN && same_name(other, e);
        self.sockets.iter().zip(&self.roles).position(listens)
    }

    /// Has one that listens tell who connects next that it is whom `client` was told of.
    fn say(&mut self, n: usize, client: &UnixSkEntry, cx: &RestoreFiles<'_>, makers: &mut Makers<'_>) -> Result<()> {
        let (e, Some(wanted)) = (&self.sockets[n], &client.standstill_peer) else { return Ok(()) };
        if self.said.get(&n).or(e.standstill_peer.as_ref()) != Some(wanted) {
            makers.listen(self.fd(n, cx)?, backlog(e), Some(wanted))?;
            self.said.insert(n, wanted.clone());
        }
        Ok(())
    }

    /// Two connected sockets, the first with the name of `e` as one that was accepted has it, the second bound as `other`.
    fn accepted(
        &mut self,
        e: &UnixSkEntry,
        other: Option<&UnixSkEntry>,
        cx: &RestoreFiles<'_>,
        makers: &mut Makers<'_>,
    ) -> Result<(OwnedFd, OwnedFd)> {
        if e.name.is_empty() {
            return pair(e, cx, makers);
        }
        let from = socket(e, cx)?;
        if let Some(other) = other {
            name::bind(from.as_fd(), other, cx)?;
        }
        let (listening, node) = match self.listener(e) {
            Some(n) => {
                if let Some(other) = other {
                    self.say(n, other, cx, makers)?;
                }
                (self.fd(n, cx)?, self.nodes.get(&n))
            }
            None => {
                let at = match self.listening.iter().position(|(there, ..)| same_name(there, e)) {
                    Some(at) => at,
                    None => {
                        let fd = socket(e, cx)?;
                        let node = name::bind(fd.as_fd(), e, cx)?;
                        rustix::net::listen(&fd, 1).call("listen")?;
                        self.listening.push((e.clone(), fd, node));
                        self.listening.len() - 1
                    }
                };
                let (_, fd, node) = &self.listening[at];
                if let Some(who) = other.and_then(|other| other.standstill_peer.as_ref()) {
                    makers.listen(fd.as_fd(), 1, Some(who))?;
                }
                (fd.as_fd(), node.as_ref())
            }
        };
        makers.connect(from.as_fd(), e, node.map(AsFd::as_fd), e.standstill_peer.as_ref())?;
        let to = rustix::net::accept_with(listening, SocketFlags::CLOEXEC).call("accept4")?;
        Ok((to, from))
    }

    /// What is in flight to a connected socket, from its other end.
    fn pair_queue(&mut self, n: usize, cx: &mut RestoreFiles<'_>) -> Result<()> {
        match self.roles[n] {
            Role::Pair(other) => self.fill(n, Some(other), cx),
            Role::Severed => self.fill(n, None, cx),
            Role::Given(_) | Role::Alone | Role::Waits(_) | Role::Sends(_) | Role::Outside(_) => Ok(()),
        }
    }

    /// Connects datagram sockets, each when its own queue is filled.
    fn datagrams(&mut self, cx: &mut RestoreFiles<'_>) -> Result<()> {
        let targets: Vec<Option<usize>> =
            self.roles.iter().map(|role| if let Role::Sends(to) = role { Some(*to) } else { None }).collect();
        let mut connected = HashSet::new();
        for n in connect::order(&targets)? {
            let connect = |cx: &RestoreFiles<'_>, to: usize| {
                name::connect(self.fd(n, cx)?, &self.sockets[to], self.nodes.get(&to).map(AsFd::as_fd))
            };
            let done = match self.roles[n] {
                Role::Sends(to) if to == n || targets[to] == Some(n) => {
                    connect(cx, to).at(self.place(n))?;
                    connected.insert(n);
                    match connected.contains(&to) {
                        true => self.fill(to, Some(n), cx).and_then(|()| self.fill(n, Some(to), cx)),
                        false => Ok(()),
                    }
                }
                // after its own connect, it would take messages from its peer alone
                Role::Sends(to) => self.fill(n, self.sender(n), cx).and_then(|()| {
                    name::connect(self.fd(n, cx)?, &self.sockets[to], self.nodes.get(&to).map(AsFd::as_fd))
                }),
                Role::Alone => self.fill(n, self.sender(n), cx),
                Role::Outside(to) if is_dgram(&self.sockets[n]) => self
                    .fill(n, self.sender(n), cx)
                    .and_then(|()| name::connect(self.fd(n, cx)?, &self.outside[to], None)),
                Role::Outside(to) => name::connect(self.fd(n, cx)?, &self.outside[to], None),
                Role::Given(_) | Role::Pair(_) | Role::Severed | Role::Waits(_) => Ok(()),
            };
            done.at(self.place(n))?;
        }
        Ok(())
    }

    /// Connections that were not accepted yet, in the order in which their sockets were made.
    fn late(&mut self, cx: &mut RestoreFiles<'_>, makers: &mut Makers<'_>) -> Result<()> {
        let mut waiting: Vec<(usize, usize)> = self
            .roles
            .iter()
            .enumerate()
            .filter_map(|(n, role)| if let Role::Waits(at) = role { Some((n, *at)) } else { None })
            .collect();
        waiting.sort_by_key(|&(n, _)| self.sockets[n].ino);
        for (n, at) in waiting {
            let client = self.sockets[n].clone();
            self.say(at, &client, cx, makers).at(self.place(at))?;
            let node = self.nodes.get(&at).map(AsFd::as_fd);
            let who = client.standstill_connector.as_ref();
            makers.connect(self.fd(n, cx)?, &self.sockets[at], node, who).at(self.place(n))?;
        }
        Ok(())
    }

    /// Fills the queue of a socket from another, or from its ghost.
    fn fill(&mut self, n: usize, from: Option<usize>, cx: &mut RestoreFiles<'_>) -> Result<()> {
        let e = &self.sockets[n];
        let Some(messages) = self.queues.remove(&e.id) else { return Ok(()) };
        let sender = match (from, self.ghosts.get(&n)) {
            (_, Some(ghost)) => ghost.try_clone(),
            (Some(from), None) => self.fd(from, cx)?.try_clone_to_owned(),
            (None, None) => {
                return Err(Error::lie("sk-queues.img", format!("nobody can have sent to unix socket {}", e.ino)))
            }
        };
        let sender = sender.call("fcntl(F_DUPFD_CLOEXEC)")?;
        options::enlarge(sender.as_fd())?;
        for message in messages {
            let open = |id: &u32| cx.open(*id).and_then(|fd| fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)"));
            let rights: Vec<OwnedFd> = message.rights.iter().map(open).collect::<Result<_>>()?;
            queue::send(sender.as_fd(), is_stream(e), &message.bytes, &rights)?;
        }
        Ok(())
    }

    /// Options, status flags, and what was shut down.
    fn last(&mut self, n: usize, cx: &RestoreFiles<'_>) -> Result<()> {
        if matches!(self.roles[n], Role::Given(_)) {
            return Ok(());
        }
        let (e, fd) = (&self.sockets[n], self.fd(n, cx)?);
        if let Some(left) = self.queues.get(&e.id) {
            let what = format!("{} messages for unix socket {}, which receives nothing", left.len(), e.ino);
            return Err(Error::lie("sk-queues.img", what));
        }
        options::restore(fd, &e.opts)?;
        if let Some(how) = shutdown_how(e.shutdown) {
            rustix::net::shutdown(fd, how).call("shutdown")?;
        }
        set_status_flags(fd, e.flags)
    }
}

/// A new socket, which does not block until it is done.
fn socket(e: &UnixSkEntry, cx: &RestoreFiles<'_>) -> Result<OwnedFd> {
    let _inside = cx.network(e.ns_id)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, kind(e)?, flags, None).call("socket")
}

fn pair(e: &UnixSkEntry, cx: &RestoreFiles<'_>, makers: &mut Makers<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let _inside = cx.network(e.ns_id)?;
    if let Some(who) = &e.standstill_peer {
        let of_root = !cx.networks.are_many() || e.ns_id.is_none_or(|id| id == cx.net_ns);
        return makers.pair(kind(e)?, who, of_root);
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, kind(e)?, flags, None).call("socketpair")
}

fn backlog(e: &UnixSkEntry) -> i32 {
    i32::try_from(e.backlog).unwrap_or(i32::MAX)
}
