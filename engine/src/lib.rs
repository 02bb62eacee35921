//! Standstill: checkpoint and restore of Linux process trees, in CRIU's image format.
//!
//! [`Dump`] writes a running process tree into a folder of images and kills it, or lets it go on; [`Restore`] makes the same
//! tree again, with the same process ids, and it goes on where it stood; [`Check`] says what the running kernel can do.
//!
//! ```no_run
//! use standstill::{Dump, Restore};
//!
//! let report = Dump::new(4711).images_dir("/var/lib/checkpoints/4711").run()?;
//! println!("{} tasks, {} pages; they stood still for {:?}", report.tasks, report.pages, report.frozen);
//!
//! let report = Restore::new("/var/lib/checkpoints/4711").detached().run()?;
//! println!("process {} is back after {:?}", report.pid, report.total);
//! # Ok::<(), standstill::Error>(())
//! ```
//!
//! # What a host can rely on
//!
//! - A dump that fails, or whose process is killed, leaves the program running. It is killed only after its images are
//!   complete. A restore that fails leaves nothing of the tree.
//! - What cannot be carried is an [`Error::Refused`] that names it and says what can be done, before the tree is touched.
//! - The host's working folder, umask, signal handlers, environment and standard output stay as they are; no other program
//!   is started, but for action scripts if there are any. A pool of worker threads (rayon's) may stay.
//! - The host may have threads, a SIGCHLD handler and a `waitpid(-1)`.
//! - Images are the program's memory, secrets included. They are created with mode 0600.
//!
//! # Layers
//!
//! Messages go to [`tracing`]; [`log`] is a subscriber for the command line, which nobody has to install. Images are read and
//! written by the crate `standstill-images`. Everything below [`dump`] and [`restore`] is public for tests and fuzz targets
//! and may change with any version; [`Dump`], [`Restore`], [`Check`], [`options`] and [`Error`] are what to build on.
//!
//! Features: `cli` (on unless turned off) has the command-line program's part, [`cli`]. Linux on x86-64 only.

pub mod api;
pub mod cgroups;
pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
pub mod cpu;
pub mod dump;
pub mod error;
pub mod files;
pub mod gpu;
pub mod guard;
pub mod keep;
pub mod log;
pub mod memory;
pub mod migrate;
pub mod mounts;
pub mod namespaces;
pub mod needs;
pub mod network;
pub mod options;
pub mod periodic;
pub mod plan;
pub mod pre_dump;
pub mod proc;
pub mod progress;
pub mod restore;
pub mod rpc;
pub mod signals;
pub mod sockets;
pub mod stages;
pub mod stats;
pub mod stores;
pub mod sys;
pub mod tasks;
pub mod timers;
pub mod tracee;
pub mod transfer;
pub mod verify;

pub use api::{Check, Dump, Restore};
pub use dump::DumpReport;
pub use error::{Error, Result};
pub use restore::RestoreReport;
pub use standstill_images::store::sealed::Key;
pub use standstill_images::Store;
