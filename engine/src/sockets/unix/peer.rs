//! Who the other end of a unix socket is, as SO_PEERCRED, SO_PEERGROUPS and SO_PEERPIDFD say it.
//!
//! The kernel keeps process, effective ids and groups of who made a pair, connected, or listened: who connects is told of who
//! listened last, and the accepted end of who connected. A socket that listens answers with what it tells others. Nothing but
//! listen(2) changes it later; so sockets are made again by processes that are who they are to say ([`alias`]): listen(2) once
//! more for each client that was told of another one, then connect(2), socketpair(2).
//!
//! The tree's root has its id already, so it makes its calls itself, by plans.
//!
//! Image: `standstill_peer` of [`UnixSkEntry`](standstill_images::proto::UnixSkEntry), and `standstill_connector` of one
//! that was not accepted yet, whose other end nobody can ask: it is the task that has it, with the ids that it has now. Images
//! without these give sockets
//! that say the engine.
//!
//! Not kept: the id of a peer that the tree does not see, or that somebody else has now (the socket says one that is gone);
//! SO_PEERPIDFD, but for what the root did, is of a process that is gone; SO_PEERSEC.
//!
//! Man pages: unix(7), listen(2).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::net::SocketType;
use standstill_images::proto::{StandstillCredentialsEntry, UnixSkEntry};
use standstill_restorer::plan::{Code, Expect};

use super::super::options::Opt;
use super::name::{self, Name};
use crate::error::{Call, Error, Result};
use crate::files::{magic_link, DumpFiles, RestoreFiles};
use crate::namespaces::user::Users;
use crate::plan::{Data, Plan};
use crate::proc;
use crate::proc::status::Status;
use crate::sys::alias::{self, Deed, Done, Who};
use crate::sys::calls;
use crate::sys::spawn::FIRST_FD;
use crate::tasks::creds;

const PEERCRED: Opt = Opt::new(libc::SOL_SOCKET, libc::SO_PEERCRED, "SO_PEERCRED");
const PEERGROUPS: Opt = Opt::new(libc::SOL_SOCKET, 59, "SO_PEERGROUPS");
/// NGROUPS_MAX.
const MOST_GROUPS: usize = 65_536;

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|word| word.iter().rev().fold(0, |n, &byte| n << 8 | u32::from(byte)))
}

/// What a socket says of its peer; nothing if it has none.
pub(super) fn dump(fd: BorrowedFd<'_>, cx: &DumpFiles<'_>) -> Result<Option<StandstillCredentialsEntry>> {
    let mut bytes = [0; 12];
    PEERCRED.read(fd, &mut bytes)?;
    let mut ids = words(&bytes);
    let (pid, uid, gid) = (ids.next().unwrap_or(0), ids.next().unwrap_or(0), ids.next().unwrap_or(0));
    if (pid, uid, gid) == (0, u32::MAX, u32::MAX) {
        return Ok(None);
    }
    let mut groups = vec![0; 64 * 4];
    let len = match PEERGROUPS.read(fd, &mut groups) {
        Err(e) if e.errno() == libc::ERANGE => {
            groups.resize(MOST_GROUPS * 4, 0);
            PEERGROUPS.read(fd, &mut groups)?
        }
        // before Linux 4.13
        Err(e) if e.errno() == libc::ENOPROTOOPT => 0,
        other => other?,
    };
    let groups: Vec<u32> = words(groups.get(..len).unwrap_or_default()).collect();
    let pid = i32::try_from(pid).unwrap_or(0);
    let mut entry = entry(cx, pid, uid, gid, &groups);
    if let (0, 1.., Some(root)) = (entry.pid, pid, cx.tree.first()) {
        // it is gone, maybe since an earlier restore, or outside
        let path = format!("/proc/{root}/ns/pid");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = rustix::fs::open(path, flags, Mode::empty()).call("open(/proc/PID/ns/pid)")?;
        entry.pid = alias::peer_within(fd, namespace.as_fd())?.unsigned_abs();
    }
    Ok(Some(entry))
}

/// Who a task is, if that is what nobody else can say.
pub(super) fn of_task(pid: i32, cx: &DumpFiles<'_>) -> Result<StandstillCredentialsEntry> {
    let mut buffer = Vec::new();
    proc::read_proc(format!("/proc/{pid}/status").as_ref(), &mut buffer).call("read(/proc/PID/status)")?;
    let status = proc::status::parse(&buffer)?;
    Ok(entry(cx, pid, status.uid.effective, status.gid.effective, &status.groups))
}

/// With the tree's own ids.
fn entry(cx: &DumpFiles<'_>, pid: i32, uid: u32, gid: u32, groups: &[u32]) -> StandstillCredentialsEntry {
    StandstillCredentialsEntry {
        pid: cx.pids.unsigned(pid),
        uid: cx.users.user(uid),
        gid: cx.users.group(gid),
        groups: groups.iter().map(|&id| cx.users.group(id)).collect(),
    }
}

/// Runs a plan with these descriptors, which get the numbers from [`ROOT_FD`] on, and gives what lies in its data then.
pub(super) type Run<'r> = Box<dyn FnMut(Plan, &[BorrowedFd<'_>], Data) -> Result<Vec<u8>> + 'r>;

const ROOT_FD: i32 = FIRST_FD + 13;

/// The first task of the tree.
pub struct Root<'r> {
    /// Its id in the tree.
    pub pid: i32,
    /// Its id with us.
    pub host: i32,
    /// What it is, in its own words.
    pub status: &'r Status,
    /// It has a PID namespace of its own.
    pub in_namespace: bool,
    /// Who runs its plans.
    pub run: Run<'r>,
}

/// Room for the plans of the root that make these sockets.
pub fn room(cx: &RestoreFiles<'_>) -> usize {
    cx.entries.values().filter(|e| e.usk.as_ref().is_some_and(|e| e.standstill_peer.is_some())).count() * (12 << 10)
}

/// Who makes calls.
pub(super) struct Makers<'r> {
    root: Option<Root<'r>>,
    namespace: Option<OwnedFd>,
    users: Users,
    proc: Option<OwnedFd>,
    warned: bool,
}

impl<'r> Makers<'r> {
    pub(super) fn new(root: Option<Root<'r>>, users: &Users) -> Result<Makers<'r>> {
        let namespace = match root.as_ref().filter(|root| root.in_namespace) {
            Some(root) => {
                let path = format!("/proc/{}/ns/pid", root.host);
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                Some(rustix::fs::open(path, flags, Mode::empty()).call("open(/proc/PID/ns/pid)")?)
            }
            None => None,
        };
        Ok(Makers { root, namespace, users: users.clone(), proc: None, warned: false })
    }

    /// Has a socket listen; again, if it does already.
    pub(super) fn listen(
        &mut self,
        fd: BorrowedFd<'_>,
        backlog: i32,
        who: Option<&StandstillCredentialsEntry>,
    ) -> Result<()> {
        let Some(who) = who else { return rustix::net::listen(fd, backlog).call("listen") };
        if let Some(root) = self.root.as_mut().filter(|root| is(root, who)) {
            let listen = |plan: &mut Plan| {
                plan.call("a socket that listens", libc::SYS_listen, &[ROOT_FD.into(), backlog.into()]);
                NOTHING
            };
            return root.act(who, &[fd], listen).map(drop);
        }
        self.act(who, Deed::Listen(fd, backlog)).map(drop)
    }

    /// Connects a socket to one that listens, as [`name::connect`].
    pub(super) fn connect(
        &mut self,
        fd: BorrowedFd<'_>,
        to: &UnixSkEntry,
        node: Option<BorrowedFd<'_>>,
        who: Option<&StandstillCredentialsEntry>,
    ) -> Result<()> {
        let address = |name: &[u8]| [&(libc::AF_UNIX as u16).to_ne_bytes(), name].concat();
        let (Some(who), name) = (who, Name::of(to)?) else { return name::connect(fd, to, node) };
        let by_root = self.root.as_ref().is_some_and(|root| is(root, who));
        let path = match (node, name) {
            (Some(_), _) if by_root => format!("self/fd/{}\0", ROOT_FD + 1).into_bytes(),
            (Some(node), _) => format!("{}\0", magic_link(node).display()).into_bytes(),
            (None, Name::Abstract(name)) => [b"\0", name].concat(),
            (None, Name::None | Name::Path(..)) => return name::connect(fd, to, node),
        };
        let address = address(&path);
        let Some(root) = self.root.as_mut().filter(|_| by_root) else {
            return self.act(who, Deed::Connect(fd, &address)).map(drop);
        };
        if self.proc.is_none() {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            self.proc = Some(rustix::fs::open("/proc", flags, Mode::empty()).call("open(/proc)")?);
        }
        let mut fds = vec![fd];
        if let (Some(node), Some(proc)) = (node, &self.proc) {
            // its own view of files may have no /proc
            fds.extend([node, proc.as_fd()]);
        }
        let by_node = fds.len() > 1;
        let connect = |plan: &mut Plan| {
            if by_node {
                // where it works is set later
                plan.call("the way to a socket", libc::SYS_fchdir, &[(ROOT_FD + 2).into()]);
            }
            let place = plan.bytes(&address);
            plan.call("a connection", libc::SYS_connect, &[ROOT_FD.into(), place.into(), address.len().into()]);
            NOTHING
        };
        root.act(who, &fds, connect).map(drop)
    }

    /// Makes a pair, in the network namespace that we are in; is that the root's?
    pub(super) fn pair(
        &mut self,
        kind: SocketType,
        who: &StandstillCredentialsEntry,
        of_root: bool,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let kind = i32::try_from(kind.as_raw()).unwrap_or(0);
        if let Some(root) = self.root.as_mut().filter(|root| of_root && is(root, who)) {
            let pair = |plan: &mut Plan| {
                let room = plan.room(8);
                let kind = kind | libc::SOCK_NONBLOCK;
                let args = [libc::AF_UNIX.into(), kind.into(), 0.into(), room.into()];
                plan.call("a pair of sockets", libc::SYS_socketpair, &args);
                room
            };
            let numbers = root.act(who, &[], pair)?;
            let pidfd = calls::pidfd_open(root.host, 0)?;
            let mut ends = words(&numbers).map(|fd| calls::pidfd_getfd(pidfd.as_fd(), fd.cast_signed()));
            let mut end = || ends.next().unwrap_or(Err(Error::Gone));
            return Ok((end()?, end()?));
        }
        self.act(who, Deed::Pair(kind))?.pair.ok_or(Error::Gone)
    }

    /// Has a process do it that is not there otherwise.
    fn act(&mut self, who: &StandstillCredentialsEntry, deed: Deed<'_>) -> Result<Done> {
        let users = &self.users;
        let groups = who.groups.iter().map(|&id| users.outer_group(id)).filter(|&id| id != u32::MAX);
        let who = Who {
            pid: i32::try_from(who.pid).unwrap_or(0),
            uid: users.outer_user(who.uid),
            gid: users.outer_group(who.gid),
            groups: groups.collect(),
        };
        let done = alias::act(&who, deed, self.namespace.as_ref().map(AsFd::as_fd))?;
        if !done.has_credentials && !self.warned {
            self.warned = true;
            tracing::warn!(
                "unix sockets say of their peers that they are user {} (SO_PEERCRED): without CAP_SETUID and CAP_SETGID we \
                 cannot have them say {}",
                rustix::process::geteuid().as_raw(),
                who.uid
            );
        }
        Ok(done)
    }
}

fn is(root: &Root<'_>, who: &StandstillCredentialsEntry) -> bool {
    i32::try_from(who.pid) == Ok(root.pid)
}

/// No answer.
const NOTHING: Data = Data { offset: 0, len: 0 };

impl Root<'_> {
    /// Has it do something, with these descriptors, as the one that it is to be; where the answer lies is what `deed` gives.
    fn act(
        &mut self,
        who: &StandstillCredentialsEntry,
        fds: &[BorrowedFd<'_>],
        deed: impl FnOnce(&mut Plan) -> Data,
    ) -> Result<Vec<u8>> {
        const LABEL: &str = "who makes a socket";
        const CAP_SETGID_AND_SETUID: u64 = 0b11 << 6;
        let own = self.status;
        let mut plan = Plan::new();
        // of the call before
        plan.call("our descriptors", libc::SYS_close_range, &[(FIRST_FD + 2).into(), u32::MAX.into(), 0.into()]);
        if !fds.is_empty() {
            let args = [(FIRST_FD + 1).into(), ROOT_FD.into(), fds.len().into()];
            let count = i64::try_from(fds.len()).unwrap_or(0);
            plan.op(Code::ReceiveFds, 0, &args, Expect::Exact, [count, 0], "descriptors");
        }
        let groups: Vec<u32> = who.groups.iter().copied().filter(|&id| id != u32::MAX).collect();
        let changes = (who.uid, who.gid) != (own.uid.effective, own.gid.effective) || groups != own.groups;
        let may = own.cap_effective & CAP_SETGID_AND_SETUID == CAP_SETGID_AND_SETUID;
        let same = u32::MAX;
        let set_groups = |plan: &mut Plan, groups: &[u32]| {
            let list = plan.bytes(&groups.iter().flat_map(|id| id.to_ne_bytes()).collect::<Vec<u8>>());
            plan.call(LABEL, libc::SYS_setgroups, &[groups.len().into(), list.into()]);
        };
        if changes && may {
            set_groups(&mut plan, &groups);
            plan.call(LABEL, libc::SYS_setresgid, &[same.into(), who.gid.into(), same.into()]);
            plan.call(LABEL, libc::SYS_setresuid, &[same.into(), who.uid.into(), same.into()]);
            // they went with user 0, and a socket need not be one that this user may write to
            creds::take_permitted(own, &mut plan);
        }
        let answer = deed(&mut plan);
        if changes && may {
            plan.call(LABEL, libc::SYS_setresuid, &[same.into(), own.uid.effective.into(), same.into()]);
            plan.call(LABEL, libc::SYS_setresgid, &[same.into(), own.gid.effective.into(), same.into()]);
            set_groups(&mut plan, &own.groups);
            creds::take_permitted(own, &mut plan);
            // which it is not any more, having been somebody else (prctl(2))
            plan.call("dumpable", libc::SYS_prctl, &[libc::PR_SET_DUMPABLE.into(), 1.into()]);
        }
        (self.run)(plan, fds, answer)
    }
}
