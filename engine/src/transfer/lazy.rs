//! The daemon that brings memory when it is first touched (`lazy-pages`), for a restore that leaves it out
//! (`restore --lazy-pages`, [`crate::memory::late`]).
//!
//! Pages come from the images, or from a server elsewhere (`--page-server`): `page-server --lazy-pages`, or a dump that
//! waits with the rest of its memory (`dump --lazy-pages`). One thread hears of all events: forks, areas that move or go;
//! it alone changes what is known of where pages belong. Workers answer faults, and when the tree runs and nobody waits, they bring the rest.
//! When everything is there the daemon goes, and nothing of it stays in the tree.
//!
//! Which pages are late is read from the images, as the restore does it: those that the last pagemap marks as lazy. Any other
//! page of a registered area that is touched is one of zeros.
//!
//! If pages cannot be had any more (the other host is gone), whoever touches what is missing gets SIGBUS (UFFDIO_POISON, kernel
//! 6.6): no task goes on with zeros in their place. If the daemon is killed, the kernel lets tasks go on with zeros; that
//! is so with CRIU, too.
//!
//! Man pages: userfaultfd(2), ioctl_userfaultfd(2).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use standstill_images::proto::PstreeEntry;
use standstill_images::{FolderStore, ImageKind, Images};

use crate::error::{Call, Error, Result};
use crate::memory::late::FINISHED;
use crate::options::Options;
use crate::sys::uffd_lazy::{Event, Uffd};

pub mod remote;
pub mod space;

use remote::Remote;
use space::{Source, Space};

/// How many workers there are at least; with a server elsewhere most of them wait.
const WORKERS: usize = 2;
const REMOTE_WORKERS: usize = 8;
/// How long the daemon waits for something to happen before it looks around.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Somebody who sees to it that no task goes on with zeros when we die. Its calls come from the thread that serves.
pub trait Keeper {
    /// A userfaultfd, before its task can do anything with what it lacks: a copy of it lets whoever touches that wait.
    fn keep(&self, uffd: BorrowedFd<'_>) -> Result<()>;

    /// All memory is there, and whoever it came from still has it.
    fn all_there(&self) -> Result<()>;
}

/// Nobody.
struct Nobody;

impl Keeper for Nobody {
    fn keep(&self, _: BorrowedFd<'_>) -> Result<()> {
        Ok(())
    }

    fn all_there(&self) -> Result<()> {
        Ok(())
    }
}

/// What the daemon needs before anyone connects.
#[derive(Debug)]
pub struct Ready {
    images: Images,
    processes: usize,
    remote: Option<Arc<Remote>>,
}

/// Reads what it takes, and connects to the server, if there is one.
pub fn prepare(opts: &Options) -> Result<Ready> {
    let remote = if opts.use_page_server { Some(Remote::connect(opts)?) } else { None };
    prepare_with(opts, remote)
}

/// The same, with a server that is connected to.
pub fn prepare_with(opts: &Options, remote: Option<Remote>) -> Result<Ready> {
    let images = Images::new(FolderStore::open(&opts.images_dir)?);
    let processes = images.read_entries::<PstreeEntry>(ImageKind::Pstree, ())?.len();
    Ok(Ready { images, processes, remote: remote.map(Arc::new) })
}

/// Serves the restore that connects to this socket, until all of its memory is there.
pub fn serve(ready: Ready, listener: BorrowedFd<'_>) -> Result<()> {
    serve_with(ready, listener, &Nobody)
}

/// The same, with somebody who looks after the tasks.
pub fn serve_with(ready: Ready, listener: BorrowedFd<'_>, keeper: &dyn Keeper) -> Result<()> {
    let restore = loop {
        match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => break socket,
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(e) => return Err(e).call("accept"),
        }
    };
    let Ready { images, processes, remote } = ready;
    let mut spaces = Vec::new();
    for _ in 0..processes {
        let Some((id, uffd)) = receive(restore.as_fd())? else { continue };
        keeper.keep(uffd.as_fd())?;
        let source = match &remote {
            Some(remote) => Source::Remote(remote.clone(), id),
            None => Source::local(&images, id)?,
        };
        let space = Space::read(&images, id, uffd, source)?;
        tracing::debug!("task {id}: {} pages to be handled", space.left() / crate::memory::PAGE);
        spaces.push(Arc::new(space));
    }
    let workers = match &remote {
        Some(_) => REMOTE_WORKERS,
        None => std::thread::available_parallelism().map_or(WORKERS, |n| n.get().clamp(WORKERS, 8)),
    };
    let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).call("eventfd")?;
    let work = Work { state: Mutex::new(State { spaces, ..State::default() }), changed: Condvar::new(), bell };
    let served = std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| work.worker());
        }
        let heard = work.listen(restore, keeper);
        if let Err(e) = &heard {
            work.fail(e.chain());
        }
        work.stop();
        heard
    });
    let served = served.and_then(|()| keeper.all_there());
    if let Some(remote) = &remote {
        remote.finish(served.is_ok());
    }
    served
}

/// A task and its userfaultfd; nothing for a zombie.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<(u32, Uffd)>> {
    let mut word = [0; 4];
    read_exact(socket, &mut word)?;
    let Ok(id) = u32::try_from(i32::from_ne_bytes(word)) else { return Ok(None) };
    let fd = descriptor(socket)?;
    tracing::debug!("Received PID: {id}");
    Ok(Some((id, Uffd::from_fd(fd))))
}

fn read_exact(socket: BorrowedFd<'_>, mut room: &mut [u8]) -> Result<()> {
    while !room.is_empty() {
        match rustix::net::recv(socket, &mut *room, rustix::net::RecvFlags::empty()) {
            Ok((0, _)) => return Err(closed()),
            Ok((n, _)) => room = &mut std::mem::take(&mut room)[n..],
            Err(Errno::INTR) => {}
            Err(e) => return Err(e).call("recv"),
        }
    }
    Ok(())
}

fn descriptor(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    loop {
        let mut room = [std::io::IoSliceMut::new(&mut byte)];
        match recvmsg(socket, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e).call("recvmsg"),
        }
    }
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.ok_or_else(closed)
}

fn closed() -> Error {
    Error::Peer { what: "Restorer unexpectedly closed the connection".into() }
}

/// What there is to do, for all threads.
struct Work {
    state: Mutex<State>,
    changed: Condvar,
    /// Rung when the one who listens is to look.
    bell: OwnedFd,
}

#[derive(Default)]
struct State {
    spaces: Vec<Arc<Space>>,
    faults: VecDeque<(Arc<Space>, u64)>,
    /// The tree runs.
    restored: bool,
    /// Whose turn it is.
    turn: usize,
    stop: bool,
    failed: Option<String>,
}

enum Task {
    Fault(Arc<Space>, u64),
    Rest(Arc<Space>, space::Piece),
}

impl State {
    fn next(&mut self) -> Option<Task> {
        if let Some((space, address)) = self.faults.pop_front() {
            return Some(Task::Fault(space, address));
        }
        if !self.restored {
            return None;
        }
        let n = self.spaces.len();
        for at in (0..n).map(|i| (self.turn + i) % n.max(1)) {
            if let Some(piece) = self.spaces[at].next() {
                self.turn = at;
                return Some(Task::Rest(self.spaces[at].clone(), piece));
            }
        }
        None
    }

    fn is_done(&self) -> bool {
        self.restored && self.faults.is_empty() && self.spaces.iter().all(|space| space.is_done())
    }
}

impl Work {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // full is as good
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn stop(&self) {
        self.state().stop = true;
        self.changed.notify_all();
    }

    /// Pages cannot be had: whoever needs them is told by the kernel.
    fn fail(&self, why: String) {
        let mut state = self.state();
        if state.failed.is_none() {
            for space in &state.spaces {
                space.poison();
            }
            state.failed = Some(why);
        }
        drop(state);
        self.ring();
    }

    fn worker(&self) {
        let mut buffer = Vec::new();
        loop {
            let task = {
                let mut state = self.state();
                loop {
                    if state.stop || state.failed.is_some() {
                        return;
                    }
                    if let Some(task) = state.next() {
                        break task;
                    }
                    if state.is_done() {
                        self.ring();
                    }
                    let limit = Duration::from_millis(100);
                    let waited = self.changed.wait_timeout(state, limit);
                    state = waited.map_or_else(|e| e.into_inner().0, |(state, _)| state);
                }
            };
            let done = match task {
                Task::Fault(space, address) => space.fault(address, &mut buffer),
                Task::Rest(space, piece) => space.bring(piece, &mut buffer),
            };
            match done {
                Ok(()) => self.changed.notify_one(),
                Err(e) => return self.fail(e.chain()),
            }
        }
    }

    /// Hears of everything, until all memory is there.
    fn listen(&self, restore: OwnedFd, keeper: &dyn Keeper) -> Result<()> {
        let mut restore = Some(restore);
        loop {
            let spaces: Vec<Arc<Space>> = {
                let mut state = self.state();
                if let Some(why) = &state.failed {
                    return Err(Error::Peer { what: why.clone() });
                }
                if state.is_done() {
                    return Ok(());
                }
                if state.restored {
                    state.spaces.retain(|space| !space.is_done());
                }
                state.spaces.iter().filter(|space| !space.is_gone()).cloned().collect()
            };
            let mut fds = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
            fds.extend(spaces.iter().map(|space| PollFd::from_borrowed_fd(space.uffd.as_fd(), PollFlags::IN)));
            fds.extend(restore.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
            match poll(&mut fds, Some(&LOOK)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e).call("poll"),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready.first() == Some(&true) {
                let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            }
            for (space, _) in spaces.iter().zip(ready.iter().skip(1)).filter(|(_, ready)| **ready) {
                self.hear(space, keeper)?;
            }
            if ready.get(spaces.len() + 1) == Some(&true) {
                if let Some(fd) = restore.take() {
                    self.hear_restore(fd.as_fd())?;
                }
            }
        }
    }

    fn hear_restore(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let mut word = [0; 4];
        read_exact(fd, &mut word)?;
        if u32::from_ne_bytes(word) != FINISHED {
            return Err(Error::Peer { what: format!("Unexpected response: {:x}", u32::from_ne_bytes(word)) });
        }
        self.state().restored = true;
        self.changed.notify_all();
        Ok(())
    }

    fn hear(&self, space: &Arc<Space>, keeper: &dyn Keeper) -> Result<()> {
        for event in space.uffd.events()? {
            match event {
                Event::Fault(address) => {
                    self.state().faults.push_back((space.clone(), address));
                    self.changed.notify_one();
                }
                Event::Fork(uffd) => {
                    keeper.keep(uffd.as_fd())?;
                    let child = Arc::new(space.fork(uffd));
                    self.state().spaces.push(child);
                    self.changed.notify_all();
                }
                Event::Remap(from, to, bytes) => space.moved(from, to, bytes),
                Event::Remove(from, to) => space.removed(from, to),
                Event::Unknown(n) => {
                    return Err(Error::Peer { what: format!("unexpected uffd event {n}") });
                }
            }
        }
        Ok(())
    }
}
