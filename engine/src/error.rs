//! The engine's one error type: where, what was tried, what the kernel or an image said, and what a person can do.
//!
//! An error is a chain. Each link has its own facts only: a [`Place`] (a task, a descriptor, an area, a file), then the
//! operation, then its cause. The command line prints the chain once.

use std::fmt;
use std::path::PathBuf;

/// Short for results of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A task or thread, by its id in our pid namespace (dump) or in the image (restore).
    Task(i32),
    /// A descriptor of the task named before it in the chain.
    Fd(i32),
    /// A memory area, start and end.
    Area(u64, u64),
    /// A file or folder.
    Path(PathBuf),
    /// A file object of an image, by its id.
    File(u32),
    /// A link of a network namespace.
    Network(String),
    /// A part of the work, in words that need no more facts.
    Step(&'static str),
    /// A part of the work, with a number that tells which one (timer id, signal, namespace id …).
    Item(&'static str, u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Task(pid) => write!(f, "task {pid}"),
            Place::Fd(fd) => write!(f, "descriptor {fd}"),
            Place::Area(start, end) => write!(f, "area {start:x}-{end:x}"),
            Place::Path(path) => write!(f, "{}", path.display()),
            Place::File(id) => write!(f, "file {id:#x}"),
            Place::Network(name) => write!(f, "network link {name}"),
            Place::Step(what) => f.write_str(what),
            Place::Item(what, n) => write!(f, "{what} {n}"),
        }
    }
}

/// Why a dump or restore did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something below this place failed.
    #[error("{place}")]
    In {
        /// Where.
        place: Place,
        /// What.
        #[source]
        source: Box<Error>,
    },
    /// The kernel said no.
    #[error("{call}")]
    Sys {
        /// The system call, and its request where one call has many.
        call: &'static str,
        /// Its errno.
        #[source]
        source: std::io::Error,
    },
    /// A text of /proc was not what it should be.
    #[error("unreadable")]
    Proc(#[from] crate::proc::ParseError),
    /// An image was not what it should be.
    #[error(transparent)]
    Image(#[from] standstill_images::Error),
    /// This state cannot be carried.
    #[error("{what} cannot be carried: {advice}")]
    Refused {
        /// The kind of state, with its name.
        what: String,
        /// What the caller can do about it.
        advice: &'static str,
    },
    /// An image says something that no dump writes.
    #[error("{image}: {what}")]
    Lie {
        /// File name of the image.
        image: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// An operation of a plan failed inside a task.
    #[error("{operation} ({call}) failed in the task")]
    Plan {
        /// What the operation was for.
        operation: String,
        /// The system call's name.
        call: &'static str,
        /// Its errno.
        #[source]
        source: std::io::Error,
    },
    /// There is nothing to dump.
    #[error("there is no process {pid}")]
    NoProcess {
        /// Which one was asked for.
        pid: i32,
    },
    /// A process id that the checkpoint needs belongs to someone.
    #[error("Can't fork for {pid}: File exists; the id is in use, restore in a new PID namespace")]
    IdInUse {
        /// Which one.
        pid: i32,
    },
    /// A script, or the peer of an RPC connection, said no.
    #[error("{stage}: {what}")]
    Stage {
        /// At which stage.
        stage: &'static str,
        /// How.
        what: String,
    },
    /// A task ended or fled while it was worked on.
    #[error("the task ended meanwhile")]
    Gone,
    /// What had been read is not so any more: it is to be read once more.
    #[error("{what}")]
    Moving {
        /// What changed.
        what: &'static str,
    },
    /// Something took longer than it may.
    #[error("{what} did not happen within {seconds} s")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long, in seconds.
        seconds: u64,
    },
    /// The caller's options make no sense or cannot be met.
    #[error("{what}")]
    Usage {
        /// Why.
        what: String,
    },
    /// A file of the running system differs from what the checkpoint needs.
    #[error("{what}")]
    Changed {
        /// How it differs.
        what: String,
    },
    /// The other side of a connection broke it, or said what it should not.
    #[error("{what}")]
    Peer {
        /// How.
        what: String,
    },
    /// NVIDIA's driver said no.
    #[error(transparent)]
    Gpu(#[from] standstill_gpu::DriverError),
    /// A migration is neither here nor there.
    #[error(
        "{what}; the tree has ended here, and the destination has it, held or in images: decide with migrate --resume {}",
        folder.display()
    )]
    InDoubt {
        /// Where the source's journal is.
        folder: PathBuf,
        /// Why.
        what: String,
    },
    /// The caller or a signal asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// The errno of the last operation that this error is about, if any; 0 else.
    pub fn errno(&self) -> i32 {
        match self {
            Error::In { source, .. } => source.errno(),
            Error::Sys { source, .. } | Error::Plan { source, .. } => source.raw_os_error().unwrap_or(0),
            Error::Refused { .. } => libc::ENOTSUP,
            Error::Gone | Error::NoProcess { .. } => libc::ESRCH,
            Error::IdInUse { .. } => libc::EEXIST,
            Error::Stage { .. } => libc::ECANCELED,
            Error::Timeout { .. } => libc::ETIMEDOUT,
            Error::Peer { .. } => libc::EPIPE,
            Error::Interrupted => libc::EINTR,
            Error::Moving { .. } => libc::EAGAIN,
            Error::Gpu(_) => libc::EIO,
            Error::InDoubt { .. } => libc::EINPROGRESS,
            Error::Proc(_) | Error::Image(_) | Error::Lie { .. } | Error::Usage { .. } | Error::Changed { .. } => {
                libc::EINVAL
            }
        }
    }

    /// The error and its causes, each in its own words; the system's in the C library's.
    pub fn links(&self) -> Vec<String> {
        let mut links = vec![self.to_string()];
        let mut cause = std::error::Error::source(self);
        while let Some(e) = cause {
            let os = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
            links.push(match os {
                Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
                None => e.to_string(),
            });
            cause = e.source();
        }
        links
    }

    /// The error and its causes, in one line.
    pub fn chain(&self) -> String {
        self.links().join(": ")
    }

    /// What it is about in the end, without the places.
    pub fn cause(&self) -> &Error {
        match self {
            Error::In { source, .. } => source.cause(),
            other => other,
        }
    }

    /// A refusal.
    pub fn refused(what: impl Into<String>, advice: &'static str) -> Error {
        Error::Refused { what: what.into(), advice }
    }

    /// A task could not be made with its id.
    pub fn no_task(pid: i32, source: std::io::Error) -> Error {
        let changed = |what: String| Error::Changed { what };
        match source.raw_os_error() {
            Some(libc::EEXIST) => Error::IdInUse { pid },
            Some(libc::EINVAL) => changed(format!(
                "Can't fork for {pid}: Invalid argument; ids end before it here, raise /proc/sys/kernel/pid_max"
            )),
            Some(libc::EAGAIN) => changed(format!(
                "Can't fork for {pid}: no more tasks may be made here, raise the limit of the user (ulimit -u), of the \
                 cgroup (pids.max), or /proc/sys/kernel/threads-max"
            )),
            Some(libc::EPERM) => changed(format!(
                "Can't fork for {pid}: Operation not permitted; ids can be chosen only with CAP_CHECKPOINT_RESTORE or \
                 CAP_SYS_ADMIN"
            )),
            _ => Error::Sys { call: "clone3", source },
        }
    }

    /// A lying image.
    pub fn lie(image: &'static str, what: impl Into<String>) -> Error {
        Error::Lie { image, what: what.into() }
    }

    /// The last errno of this thread, for `call`.
    pub fn last(call: &'static str) -> Error {
        Error::Sys { call, source: std::io::Error::last_os_error() }
    }
}

/// Says where a result came from.
pub trait At<T> {
    /// Adds a place to the chain of the error, if it is one.
    fn at(self, place: Place) -> Result<T>;
    /// Adds a task to the chain.
    fn task(self, pid: i32) -> Result<T>;
}

impl<T, E: Into<Error>> At<T> for Result<T, E> {
    fn at(self, place: Place) -> Result<T> {
        self.map_err(|e| Error::In { place, source: Box::new(e.into()) })
    }
    fn task(self, pid: i32) -> Result<T> {
        self.at(Place::Task(pid))
    }
}

/// Names the call behind an error of the standard library, nix or rustix.
pub trait Call<T> {
    /// Adds the call's name.
    fn call(self, call: &'static str) -> Result<T>;
}

impl<T> Call<T> for std::io::Result<T> {
    fn call(self, call: &'static str) -> Result<T> {
        self.map_err(|source| Error::Sys { call, source })
    }
}

impl<T> Call<T> for nix::Result<T> {
    fn call(self, call: &'static str) -> Result<T> {
        self.map_err(|e| Error::Sys { call, source: e.into() })
    }
}

impl<T> Call<T> for rustix::io::Result<T> {
    fn call(self, call: &'static str) -> Result<T> {
        self.map_err(|e| Error::Sys { call, source: e.into() })
    }
}
