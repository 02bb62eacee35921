//! Dump, restore and check for programs that embed the engine.
//!
//! These are [`Options`] with a name for what most callers ask; [`Dump::options`] and [`Restore::options`] lead to the rest.
//! Nothing is touched before `run`. A call that fails leaves the tree as it was: after a dump the program goes on, after a
//! restore nothing of it is left.
//!
//! All work with ptrace is done by a thread of its own that lives as long as the call. The engine changes no working
//! folder, umask, signal handler, environment variable or standard stream of its host, starts no other program than the
//! action scripts that it is given, and waits for the processes of the tree and for those alone. What the host must know:
//! - A child of the host that is dumped and killed has ended. Who learns of that, the engine or a `waitpid` of the host's,
//!   is open: `ECHILD` from the host's own `waitpid` for it means that the engine was first.
//! - A tree that was restored with [`Restore::detached`] has the host as its parent until the host ends. The host waits for
//!   it, as for any other child.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use standstill_images::store::sealed::Key;
use standstill_images::Store;

use crate::check::{self, Category, Found};
use crate::dump::DumpReport;
use crate::error::Result;
use crate::options::{FinalState, NetworkLock, Options};
use crate::progress::{Event, Hook, Listener};
use crate::restore::RestoreReport;
use crate::stores::Given;

/// Brings a process tree to a standstill, into images.
///
/// ```no_run
/// let report = standstill::Dump::new(4711).images_dir("/var/lib/checkpoints/4711").leave_running().run()?;
/// println!("it stood still for {:?}", report.frozen);
/// # Ok::<(), standstill::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing happens before run()"]
pub struct Dump {
    options: Options,
}

impl Dump {
    /// Of the tree whose root is `pid`. Images go to the current folder, and the tree is killed when they are complete.
    pub fn new(pid: i32) -> Dump {
        Dump { options: Options { pid: Some(pid), network_lock: NetworkLock::Nftables, ..Options::default() } }
    }

    /// Where images go; the folder must be there.
    pub fn images_dir(mut self, dir: impl Into<PathBuf>) -> Dump {
        self.options.images_dir = dir.into();
        self
    }

    /// Images go to this store instead of a folder: to another host, to memory, encrypted. Each is written once, the inventory last,
    /// and the store is committed before a tree that is to be killed is killed. `stats-dump` is written only if there is a
    /// work folder.
    pub fn to_store(mut self, store: Arc<dyn Store>) -> Dump {
        self.options.store = Some(Given(store));
        self
    }

    /// Images are sealed with this key: [`standstill_images::store::sealed`].
    pub fn key(mut self, key: Key) -> Dump {
        self.options.key = Some(key);
        self
    }

    /// Where `stats-dump` goes, if not to the images.
    pub fn work_dir(mut self, dir: impl Into<PathBuf>) -> Dump {
        self.options.work_dir = Some(dir.into());
        self
    }

    /// The checkpoint to build on: only what was written since is stored. A relative path starts at the images folder.
    pub fn on_top_of(mut self, parent: impl Into<PathBuf>) -> Dump {
        self.options.prev_images_dir = Some(parent.into());
        self
    }

    /// Notes from now on what is written, for a next dump on top of this one.
    pub fn track_memory(mut self) -> Dump {
        self.options.track_mem = true;
        self
    }

    /// Takes memory only, while the tree runs, for a dump on top of it.
    ///
    /// # Errors
    /// As [`Dump::run`].
    pub fn pre_dump(self) -> Result<DumpReport> {
        crate::pre_dump::run(&self.options)
    }

    /// The tree goes on when the images are complete.
    pub fn leave_running(mut self) -> Dump {
        self.options.final_state = FinalState::Run;
        self
    }

    /// The tree is left stopped (SIGSTOP) when the images are complete.
    pub fn leave_stopped(mut self) -> Dump {
        self.options.final_state = FinalState::Stop;
        self
    }

    /// Session and terminal of the tree belong to a shell outside of it.
    pub fn shell_job(mut self) -> Dump {
        self.options.shell_job = true;
        self
    }

    /// Established TCP connections are carried.
    pub fn tcp_established(mut self) -> Dump {
        self.options.tcp_established = true;
        self
    }

    /// Locks on files are carried.
    pub fn file_locks(mut self) -> Dump {
        self.options.file_locks = true;
        self
    }

    /// Unix sockets may have their other end outside of the tree.
    pub fn external_unix_sockets(mut self) -> Dump {
        self.options.ext_unix_sk = true;
        self
    }

    /// How long freezing the tree may take, in whole seconds (10 if nothing is said); none means no limit.
    pub fn timeout(mut self, limit: Option<Duration>) -> Dump {
        self.options.timeout = limit.map_or(0, |l| u32::try_from(l.as_secs().max(1)).unwrap_or(u32::MAX));
        self
    }

    /// Memory is packed with LZ4; CRIU 4.2 does not restore such a checkpoint.
    pub fn compress(mut self) -> Dump {
        self.options.compress = true;
        self
    }

    /// Calls `told` at the end of each phase, and while memory is moved, some ten times a second.
    pub fn on_progress(mut self, told: impl Fn(&Event) + Send + Sync + 'static) -> Dump {
        self.options.progress = Listener::Hook(Hook(Arc::new(told)));
        self
    }

    /// How many threads may work at once.
    pub fn jobs(mut self, jobs: NonZeroUsize) -> Dump {
        self.options.jobs = Some(jobs);
        self
    }

    /// Everything else that can be asked.
    pub fn options(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Does it.
    pub fn run(&self) -> Result<DumpReport> {
        crate::dump::run(&self.options)
    }
}

/// Starts a process tree again from its images.
///
/// ```no_run
/// let report = standstill::Restore::new("/var/lib/checkpoints/4711").detached().run()?;
/// println!("process {} is back", report.pid);
/// # Ok::<(), standstill::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing happens before run()"]
pub struct Restore {
    options: Options,
}

impl Restore {
    /// From the images in `dir`. [`Restore::run`] returns when the program has ended, unless told otherwise.
    pub fn new(dir: impl Into<PathBuf>) -> Restore {
        Restore { options: Options { images_dir: dir.into(), ..Options::default() } }
    }

    /// From the images in this store. What has no file behind it is gathered into memory, which takes as much of it as the
    /// images are long until the program runs.
    pub fn from_store(store: Arc<dyn Store>) -> Restore {
        Restore { options: Options { store: Some(Given(store)), ..Options::default() } }
    }

    /// The key that the images were sealed with.
    pub fn key(mut self, key: Key) -> Restore {
        self.options.key = Some(key);
        self
    }

    /// Where `stats-restore` and the pidfile go, if not to the images.
    pub fn work_dir(mut self, dir: impl Into<PathBuf>) -> Restore {
        self.options.work_dir = Some(dir.into());
        self
    }

    /// [`Restore::run`] returns as soon as the program runs.
    pub fn detached(mut self) -> Restore {
        self.options.restore_detach = true;
        self
    }

    /// The root becomes a child of the host's parent; with [`Restore::detached`].
    pub fn sibling(mut self) -> Restore {
        self.options.restore_sibling = true;
        self
    }

    /// The tree is left stopped (SIGSTOP).
    pub fn leave_stopped(mut self) -> Restore {
        self.options.final_state = FinalState::Stop;
        self
    }

    /// Session, process group and terminal are the host's.
    pub fn shell_job(mut self) -> Restore {
        self.options.shell_job = true;
        self
    }

    /// Established TCP connections are carried.
    pub fn tcp_established(mut self) -> Restore {
        self.options.tcp_established = true;
        self
    }

    /// Locks on files come back. They do without this, too: an image with locks says that they are wanted.
    pub fn file_locks(mut self) -> Restore {
        self.options.file_locks = true;
        self
    }

    /// Unix sockets may have their other end outside of the tree.
    pub fn external_unix_sockets(mut self) -> Restore {
        self.options.ext_unix_sk = true;
        self
    }

    /// A file for the root's process id, relative to the work folder; it must not be there yet.
    pub fn pidfile(mut self, path: impl Into<PathBuf>) -> Restore {
        self.options.pidfile = Some(path.into());
        self
    }

    /// Where the images are.
    pub fn images_dir(&self) -> &Path {
        &self.options.images_dir
    }

    /// Calls `told` at the end of each phase, and while memory is moved, some ten times a second.
    pub fn on_progress(mut self, told: impl Fn(&Event) + Send + Sync + 'static) -> Restore {
        self.options.progress = Listener::Hook(Hook(Arc::new(told)));
        self
    }

    /// Everything else that can be asked.
    pub fn options(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Does it.
    pub fn run(&self) -> Result<RestoreReport> {
        crate::restore::run(&self.options)
    }
}

/// What the running kernel can do, by asking it.
///
/// ```no_run
/// for line in standstill::Check::new().missing() {
///     println!("{} is missing ({}): {}", line.feature.name, line.feature.cost, line.feature.remedy);
/// }
/// ```
#[derive(Debug)]
pub struct Check {
    lines: Vec<check::Line>,
}

impl Check {
    /// Asks for everything; this takes some milliseconds.
    #[allow(clippy::new_without_default)] // it does work
    pub fn new() -> Check {
        Check { lines: check::report() }
    }

    /// All answers.
    pub fn lines(&self) -> &[check::Line] {
        &self.lines
    }

    /// What was not found.
    pub fn missing(&self) -> impl Iterator<Item = &check::Line> {
        self.lines.iter().filter(|l| l.found.is_err())
    }

    /// Is all there that every program needs?
    pub fn is_enough(&self) -> bool {
        self.missing().all(|l| l.feature.category != Category::Required)
    }

    /// The answer for one feature; nothing if there is no feature of that name.
    pub fn feature(&self, name: &str) -> Option<Found> {
        self.lines.iter().find(|l| l.feature.name == name).map(|l| l.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_in_the_options() {
        let mut dump = Dump::new(7).images_dir("/i").leave_running().timeout(None).tcp_established();
        dump.options().ghost_limit = 9;
        let o = &dump.options;
        assert_eq!((o.pid, o.images_dir.as_path(), o.final_state), (Some(7), Path::new("/i"), FinalState::Run));
        assert_eq!((o.timeout, o.tcp_established, o.ghost_limit), (0, true, 9));
        assert_eq!(Dump::new(7).timeout(Some(Duration::from_millis(10))).options.timeout, 1);

        let restore = Restore::new("/i").work_dir("/w").pidfile("pid").detached().sibling();
        assert_eq!(restore.images_dir(), Path::new("/i"));
        assert!(restore.options.restore_detach && restore.options.restore_sibling);
        assert_eq!(restore.options.in_work_dir(Path::new("pid")), Path::new("/w/pid"));
    }
}
