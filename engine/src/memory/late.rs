//! A restore whose memory comes later (`restore --lazy-pages`): what it has to do with whoever brings it.
//!
//! Pages that the last pagemap marks as lazy are not filled. When all areas of a task are made, and before anything but the
//! executor runs in it, the task makes a userfaultfd, the engine takes that, registers the areas, and gives it away: over
//! `lazy-pages.socket` in the work folder, as CRIU has it. For each process of the tree four bytes come, the id of a task as it is
//! in the images, then one byte with the descriptor; of a zombie the negative id, and nothing else. When the
//! tree runs, four bytes say so. Either side may be CRIU's.
//!
//! If a restore fails, the connection ends without a word.
//!
//! Man pages: userfaultfd(2), unix(7).

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType};

use crate::error::{Call, Error, Result};
use crate::options::Options;
use crate::plan::{Arg, Plan};
use crate::sys::calls;
use crate::sys::uffd_lazy::{self, Uffd};

/// The socket's name.
pub const SOCKET: &str = "lazy-pages.socket";
/// "RSTF": the tree runs.
pub const FINISHED: u32 = 0x5253_5446;

/// Where a task makes its userfaultfd.
#[derive(Debug, Clone, Copy)]
pub struct Door {
    /// Its number, for a while.
    pub number: i32,
    /// The number of /dev/userfaultfd, if it is made by that: who is root in a user namespace only may not make one that holds
    /// the kernel's own faults.
    pub device: Option<i32>,
}

impl Door {
    /// Makes it, for the engine to take.
    pub fn make(&self, plan: &mut Plan) {
        const WHAT: &str = "memory that comes later";
        let made = match self.device {
            Some(device) => {
                let args = [device.into(), uffd_lazy::NEW.into(), uffd_lazy::FLAGS.into()];
                plan.call(WHAT, libc::SYS_ioctl, &args)
            }
            None => plan.call(WHAT, libc::SYS_userfaultfd, &[uffd_lazy::FLAGS.into()]),
        };
        let args = [Arg::Result(made.0), self.number.into(), libc::O_CLOEXEC.into()];
        plan.call_exact(WHAT, libc::SYS_dup3, &args, self.number.into());
        plan.call(WHAT, libc::SYS_close, &[Arg::Result(made.0)]);
    }

    /// The engine has it.
    pub fn made(&self, plan: &mut Plan) {
        plan.call("memory that comes later", libc::SYS_close, &[self.number.into()]);
    }
}

/// A connection to whoever brings memory.
#[derive(Debug)]
pub struct Daemon {
    socket: OwnedFd,
}

impl Daemon {
    /// Connects, before anything is made.
    pub fn connect(opts: &Options) -> Result<Daemon> {
        let path = opts.in_work_dir(SOCKET.as_ref());
        let failed = |e: rustix::io::Errno| Error::Usage {
            what: format!("connect to {} failed: {e}; is there a lazy-pages daemon?", path.display()),
        };
        let folder = std::fs::File::open(opts.work_dir()).call("open(work folder)")?;
        // however long the path of the folder is
        let short = format!("/proc/self/fd/{}/{SOCKET}", std::os::fd::AsRawFd::as_raw_fd(&folder));
        let address = SocketAddrUnix::new(short).map_err(failed)?;
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).call("socket")?;
        let began = Instant::now();
        loop {
            match rustix::net::connect(&socket, &address) {
                Ok(()) => break,
                // a daemon whose socket has a name listens in a moment
                Err(rustix::io::Errno::CONNREFUSED) if began.elapsed() < Duration::from_millis(500) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(Daemon { socket })
    }

    /// /dev/userfaultfd, if it is there.
    pub fn device() -> Option<OwnedFd> {
        let file = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
        Some(file.into())
    }

    /// Takes the userfaultfd of a task, has it watch these areas, and gives it away. `id` is the task's in the images.
    pub fn take(&self, id: i32, pid: i32, number: i32, areas: &[(u64, u64)]) -> Result<()> {
        let fd = calls::pidfd_open(pid, 0).and_then(|pidfd| calls::pidfd_getfd(pidfd.as_fd(), number))?;
        let uffd = Uffd::new(fd)?;
        for &(start, end) in areas {
            uffd.register(start, end)?;
        }
        self.say(id)?;
        let fds = [uffd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(&self.socket, &[IoSlice::new(&[0])], &mut rights, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|e| gone(&e.into()))
    }

    /// A zombie, which has no memory.
    pub fn dead(&self, id: i32) -> Result<()> {
        self.say(-id)
    }

    fn say(&self, word: i32) -> Result<()> {
        let sent = rustix::net::send(&self.socket, &word.to_ne_bytes(), SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|e| gone(&e.into()))
    }

    /// The tree runs.
    pub fn finished(&self) {
        if let Err(e) = rustix::net::send(&self.socket, &FINISHED.to_ne_bytes(), SendFlags::NOSIGNAL) {
            tracing::error!("Failed sending restore finished indication: {e}");
        }
    }
}

fn gone(e: &std::io::Error) -> Error {
    Error::Peer { what: format!("the lazy-pages daemon is gone: {e}") }
}
