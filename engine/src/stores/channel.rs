//! A checkpoint through a pipe: `dump --to`, `restore --from`.
//!
//! What goes through is the stream of [`standstill_images::store::stream`]: all images, then an end record with a sum of all
//! bytes. [`Channel`] says where it goes: standard output or input, another descriptor, or a file.
//!
//! The writer. The tree stands still while its images are written, so nobody may keep us waiting for ever: if for as
//! long as `--timeout` says nothing is taken, that is an error ([`Outlet`]), as is a pipe whose reader is gone; the tree goes
//! on then. To see that without a change to a description that others share (O_NONBLOCK would be one), a pipe is opened
//! once more through `/proc/self/fd`; of a socket each message asks for it (MSG_DONTWAIT). A pipe that may not be
//! opened again gets what surely fits.
//!
//! A tree that is to be killed is killed only after the end record was written as a whole. That it was written does not mean
//! that it was read: what is in a pipe is lost if its reader ends, and nobody says so. Who needs to know uses `migrate`.
//!
//! The reader takes all images into memory ([`HeldStore`]), and starts nothing before the end record was checked.
//!
//! Man pages: pipe(7), poll(2), send(2), fcntl(2) on pipes.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::SendFlags;
use standstill_images::store::held::HeldStore;
use standstill_images::store::stream::{self, StreamStore};
use standstill_images::Store;

use super::storage;
use crate::error::{At, Call, Error, Place, Result};
use crate::options::Options;
use crate::sys::{calls, interrupt};

/// Where a stream goes to or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channel {
    /// Standard output of a dump, standard input of a restore: `-`.
    Standard,
    /// A descriptor of ours: `fd:N`.
    Fd(RawFd),
    /// A file.
    Path(PathBuf),
    /// No stream but object storage, by its URL.
    Storage(String),
}

/// How often a writer that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// What fits into a pipe that has room at all (pipe(7), `PIPE_BUF`).
const SURE: usize = 4096;
/// What we ask the kernel to keep in a pipe, so that writer and reader need not take turns.
const ROOM: usize = 1 << 20;

impl Channel {
    /// Reads `-`, `fd:N`, or a path.
    pub fn parse(text: &std::ffi::OsStr) -> Option<Channel> {
        match text.to_str() {
            Some("") => None,
            Some("-") => Some(Channel::Standard),
            Some(text) if text.starts_with("fd:") => {
                text[3..].parse().ok().filter(|fd: &RawFd| *fd >= 0).map(Channel::Fd)
            }
            Some(text) if storage::is_url(text) => Some(Channel::Storage(text.to_owned())),
            _ => Some(Channel::Path(text.into())),
        }
    }

    /// The URL of a storage.
    pub fn url(&self) -> Option<&str> {
        match self {
            Channel::Storage(url) => Some(url),
            Channel::Standard | Channel::Fd(_) | Channel::Path(_) => None,
        }
    }

    /// Begins a stream.
    pub(super) fn send(&self, opts: &Options) -> Result<Arc<dyn Store>> {
        let file = match self {
            Channel::Standard => own(1)?,
            Channel::Fd(fd) => own(*fd)?,
            Channel::Path(path) => {
                let mut how = File::options();
                how.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NOCTTY);
                how.open(path).call("open").at(Place::Path(path.clone()))?
            }
            Channel::Storage(url) => return storage::create(url, opts),
        };
        if file.is_terminal() {
            return Err(usage("images are not for a terminal: let a program or a file take them (dump --to - | ...)"));
        }
        let outlet = Outlet::new(file, limit(opts))?;
        Ok(Arc::new(StreamStore::new(io::BufWriter::with_capacity(256 << 10, outlet))?))
    }

    /// Takes a whole stream into memory.
    pub(super) fn receive(&self, opts: &Options) -> Result<Arc<dyn Store>> {
        let file = match self {
            Channel::Standard => own(0)?,
            Channel::Fd(fd) => own(*fd)?,
            Channel::Path(path) => File::open(path).call("open").at(Place::Path(path.clone()))?,
            Channel::Storage(url) => return storage::open(url, opts),
        };
        if file.is_terminal() {
            return Err(usage("images do not come from a terminal: let a program or a file give them"));
        }
        let store = HeldStore::new();
        let memory = rustix::system::sysinfo();
        let most = memory.totalram.saturating_add(memory.totalswap).saturating_mul(memory.mem_unit.into());
        let arrived = stream::receive(io::BufReader::with_capacity(256 << 10, Retrying(file)), &store, most)?;
        tracing::info!("{} images of {} bytes arrived", arrived.images, arrived.bytes);
        Ok(Arc::new(store))
    }
}

fn usage(what: &str) -> Error {
    Error::Usage { what: what.into() }
}

/// How long nothing may be taken while a tree stands still.
pub(super) fn limit(opts: &Options) -> Option<Duration> {
    (opts.timeout > 0).then(|| Duration::from_secs(opts.timeout.into()))
}

/// A descriptor that was named by its number, for us.
fn own(fd: RawFd) -> Result<File> {
    calls::dup_number(fd).map(File::from).at(Place::Fd(fd))
}

/// A file whose reads nobody interrupts.
struct Retrying(File);

impl Read for Retrying {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // a description that somebody else made non-blocking
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let _ = rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None);
                }
                read => return read,
            }
        }
    }
}

/// A writer that does not wait for ever.
pub(super) struct Outlet {
    to: File,
    kind: Kind,
    limit: Option<Duration>,
    /// After an error nothing is written any more: what follows would be no part of a stream.
    ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Never blocks.
    Ready,
    /// Takes so much at most, when it says that there is room.
    Careful,
    Socket,
    /// A file: takes everything.
    File,
}

impl Outlet {
    pub(super) fn new(to: File, limit: Option<Duration>) -> Result<Outlet> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&to).call("fstat")?.st_mode);
        let (to, kind) = match kind {
            FileType::Fifo => match again(to.as_fd()) {
                Ok(own) => (own, Kind::Ready),
                Err(_) => (to, Kind::Careful),
            },
            FileType::Socket => (to, Kind::Socket),
            _ => (to, Kind::File),
        };
        if matches!(kind, Kind::Ready | Kind::Careful) {
            let _ = rustix::pipe::fcntl_setpipe_size(&to, ROOM);
        }
        Ok(Outlet { to, kind, limit, ended: false })
    }

    /// Of a pipe that does not block.
    pub(super) fn of_pipe(to: File, limit: Option<Duration>) -> Outlet {
        let _ = rustix::pipe::fcntl_setpipe_size(&to, ROOM);
        Outlet { to, kind: Kind::Ready, limit, ended: false }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.kind {
            Kind::Ready | Kind::File => (&self.to).write(bytes),
            Kind::Socket => Ok(rustix::net::send(&self.to, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?),
            Kind::Careful => {
                if wait(self.to.as_fd(), PollFlags::OUT, Duration::ZERO)? {
                    (&self.to).write(bytes.get(..SURE).unwrap_or(bytes))
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                }
            }
        }
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let done = patiently(self.to.as_fd(), PollFlags::OUT, self.limit, || self.try_write(bytes));
        self.ended = done.is_err();
        done
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens what a pipe is once more, for writes that do not wait.
fn again(pipe: BorrowedFd<'_>) -> io::Result<File> {
    use std::os::fd::AsRawFd as _;
    let mut how = File::options();
    how.write(true).custom_flags(libc::O_NONBLOCK);
    how.open(format!("/proc/self/fd/{}", pipe.as_raw_fd()))
}

/// Waits until a descriptor is ready, or something is wrong with it.
fn wait(fd: BorrowedFd<'_>, what: PollFlags, limit: Duration) -> io::Result<bool> {
    let limit = rustix::time::Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    match rustix::event::poll(&mut [PollFd::new(&fd, what)], Some(&limit)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Nobody took or gave anything.
#[derive(Debug, thiserror::Error)]
#[error("the other side did nothing for {0} s (--timeout)")]
struct Idle(u64);

/// The user wants it to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Asked;

/// Tries something that would block until it is done, the limit is over, or we are told to end.
pub(super) fn patiently<T>(
    fd: BorrowedFd<'_>,
    what: PollFlags,
    limit: Option<Duration>,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let began = Instant::now();
    loop {
        match attempt() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
        interrupt::check().map_err(|_| io::Error::other(Asked))?;
        if let Some(limit) = limit.filter(|limit| began.elapsed() > *limit) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, Idle(limit.as_secs())));
        }
        wait(fd, what, LOOK)?;
    }
}
