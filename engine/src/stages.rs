//! The points of a dump or restore at which others are told: action scripts, and the peer of an RPC connection.
//!
//! A script is a program that the caller named (`--action-script`). It gets the stage in `CRTOOLS_SCRIPT_ACTION`, the images'
//! folder in `CRTOOLS_IMAGE_DIR`, and the root's process id in `CRTOOLS_INIT_PID` as soon as there is a root; it runs in the
//! work folder, the latest script that was named first, and what it prints goes to the log. A listener is told first.
//!
//! Order in a dump: `pre-dump` before anything is stopped, `network-lock` and `query-ext-files` when the tree stands still,
//! `post-dump` when the images are complete and nothing has become of the tasks yet: who says no here ends the dump, and the
//! tasks go on. In a restore: `pre-restore` before anything is made; `setup-namespaces`, `post-setup-namespaces`;
//! `orphan-pts-master` with the terminal; `post-restore` when the tree is whole and its connections are still held off: who
//! says no ends the restore; `network-unlock`; `pre-resume` and `post-resume` around the moment at which tasks run, where a no
//! is only logged. `pre-stream` comes before all that, when a streamer is about to be called (`--stream`); `status-ready` belongs
//! to servers.
//!
//! Man page: criu(8).

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::options::Options;
use crate::transfer::source::Pages;

/// A point at which others are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // their names say it
pub enum Stage {
    PreStream,
    PreDump,
    PostDump,
    PreRestore,
    PostRestore,
    NetworkLock,
    NetworkUnlock,
    SetupNamespaces,
    PostSetupNamespaces,
    PreResume,
    PostResume,
    OrphanPtsMaster,
    StatusReady,
    QueryExtFiles,
}

impl Stage {
    /// What scripts and peers know it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreStream => "pre-stream",
            Self::PreDump => "pre-dump",
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::PostRestore => "post-restore",
            Self::NetworkLock => "network-lock",
            Self::NetworkUnlock => "network-unlock",
            Self::SetupNamespaces => "setup-namespaces",
            Self::PostSetupNamespaces => "post-setup-namespaces",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
            Self::OrphanPtsMaster => "orphan-pts-master",
            Self::StatusReady => "status-ready",
            Self::QueryExtFiles => "query-ext-files",
        }
    }
}

/// Someone who is told, and can say no. All calls come from one thread, which need not be the one that asked for the work.
pub trait Listener: Sync {
    /// A stage is reached. `root` is the process id of the tree's root, where there is one.
    fn reached(&self, stage: Stage, root: Option<i32>) -> Result<()>;

    /// The tree stands still: what else belongs to the outside? As `--external` says it.
    fn external_files(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Whether pages that a dump leaves in the tasks (`--lazy-pages`) are given away by this listener, not over a socket of ours.
    fn gives_pages(&self) -> bool {
        false
    }

    /// Gives them away. The tree, of which nobody lets go meanwhile, ends when this returns, or goes on if it is an error; from
    /// when `decide` was called it ends too if we die.
    fn give_pages(&self, _from: &mut (dyn Pages + Send), decide: &dyn Fn() -> Result<()>) -> Result<()> {
        decide()
    }

    /// The other end of a terminal that has nobody; who does not take it refuses.
    fn orphan_master(&self, _master: BorrowedFd<'_>) -> Result<()> {
        Err(nobody())
    }
}

/// All who are told.
pub struct Stages<'a> {
    options: &'a Options,
    listener: Option<&'a dyn Listener>,
    images: OnceLock<File>,
}

impl std::fmt::Debug for Stages<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stages({:?}, listener: {})", self.options.action_scripts, self.listener.is_some())
    }
}

fn refused(stage: Stage, what: String) -> Error {
    Error::Stage { stage: stage.name(), what }
}

fn nobody() -> Error {
    refused(Stage::OrphanPtsMaster, "there is nobody to take the terminal's master".into())
}

impl<'a> Stages<'a> {
    /// The scripts that the options name, and one who listens.
    pub fn new(options: &'a Options, listener: Option<&'a dyn Listener>) -> Stages<'a> {
        Stages { options, listener, images: OnceLock::new() }
    }

    /// Tells that a stage is reached. The first no ends it, but all scripts are run.
    pub fn reach(&self, stage: Stage, root: Option<i32>) -> Result<()> {
        if self.listener.is_none() && self.options.action_scripts.is_empty() {
            return Ok(());
        }
        tracing::debug!("Running {} scripts", stage.name());
        if let Some(listener) = self.listener {
            listener.reached(stage, root)?;
        }
        let mut result = Ok(());
        for script in self.options.action_scripts.iter().rev() {
            let done = self.script(script, stage, root);
            if result.is_ok() {
                result = done;
            }
        }
        result
    }

    /// Tells of a stage at which nothing can be changed any more.
    pub fn announce(&self, stage: Stage, root: Option<i32>) {
        if let Err(e) = self.reach(stage, root) {
            tracing::error!("{e}, too late to matter");
        }
    }

    /// What the listener counts to the outside, now that the tree stands still.
    pub fn external_files(&self) -> Result<Vec<String>> {
        self.listener.map_or(Ok(Vec::new()), Listener::external_files)
    }

    /// The listener that gives pages away, if it does.
    pub fn giver(&self) -> Option<&'a dyn Listener> {
        self.listener.filter(|listener| listener.gives_pages())
    }

    /// Hands over the master of a terminal whose other side is in the tree.
    pub fn orphan_master(&self, master: BorrowedFd<'_>) -> Result<()> {
        self.listener.ok_or_else(nobody)?.orphan_master(master)
    }

    fn script(&self, script: &std::path::Path, stage: Stage, root: Option<i32>) -> Result<()> {
        let shown = script.display();
        tracing::debug!("\t[{shown}]");
        let mut command = Command::new(script);
        command.env("CRTOOLS_SCRIPT_ACTION", stage.name()).current_dir(self.options.work_dir()).stdin(Stdio::null());
        if let Some(folder) = self.images_folder() {
            command.env("CRTOOLS_IMAGE_DIR", folder);
        }
        if let Some(root) = root {
            command.env("CRTOOLS_INIT_PID", root.to_string());
        }
        if let (Some(out), Some(err)) = (crate::log::file(), crate::log::file()) {
            command.stdout(out).stderr(err);
        }
        let status = crate::sys::calls::plain_signals(&mut command).status();
        let status = status.map_err(|e| refused(stage, format!("cannot run {shown}: {e}")))?;
        if status.success() {
            return Ok(());
        }
        Err(refused(stage, format!("{shown} ended with {status}")))
    }

    /// The folder as a path that a script can follow wherever it stands: through our own descriptor.
    fn images_folder(&self) -> Option<String> {
        if !self.options.has_folder() {
            return None;
        }
        if self.images.get().is_none() {
            let folder = File::open(&self.options.images_dir).ok()?;
            let _ = self.images.set(folder);
        }
        let fd = self.images.get()?.as_raw_fd();
        Some(format!("/proc/{}/fd/{fd}", std::process::id()))
    }
}

/// Who keeps packets away from a network namespace was told to do so; dropped, it is told that they may come again.
#[derive(Debug)]
pub struct NetworkLocked<'a> {
    stages: &'a Stages<'a>,
    root: i32,
}

impl<'a> NetworkLocked<'a> {
    /// Tells that the tree of `root` stands still.
    pub fn reach(stages: &'a Stages<'a>, root: i32) -> Result<NetworkLocked<'a>> {
        stages.reach(Stage::NetworkLock, Some(root))?;
        Ok(NetworkLocked { stages, root })
    }

    /// The tree ends: a restore says when packets may come again.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for NetworkLocked<'_> {
    fn drop(&mut self) {
        self.stages.announce(Stage::NetworkUnlock, Some(self.root));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("standstill-stages-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn script(folder: &std::path::Path, name: &str, exit: i32) -> PathBuf {
        let path = folder.join(name);
        let text = format!(
            "#!/bin/sh\necho {name} $CRTOOLS_SCRIPT_ACTION ${{CRTOOLS_INIT_PID-none}} \
             $(test $CRTOOLS_IMAGE_DIR -ef {0} && echo images) $(test . -ef {0} && echo here) >>{0}/said\nexit {exit}\n",
            folder.display()
        );
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn scripts_run_latest_first_and_all_of_them() {
        let folder = folder("order");
        let scripts = vec![script(&folder, "a", 0), script(&folder, "b", 3)];
        let options = Options { action_scripts: scripts, images_dir: folder.clone(), ..Options::default() };
        let stages = Stages::new(&options, None);
        let no = stages.reach(Stage::PreDump, None).expect_err("b says no").to_string();
        assert!(no.starts_with("pre-dump: ") && no.contains("/b ended with exit status: 3"), "{no}");
        stages.announce(Stage::PostResume, Some(7));
        let said = std::fs::read_to_string(folder.join("said")).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(
            lines,
            [
                "b pre-dump none images here",
                "a pre-dump none images here",
                "b post-resume 7 images here",
                "a post-resume 7 images here"
            ]
        );
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_script_that_is_not_there() {
        let options = Options { action_scripts: vec!["/nonexistent/x".into()], ..Options::default() };
        let no = Stages::new(&options, None).reach(Stage::PreRestore, None).expect_err("it is not there");
        assert_eq!(no.to_string(), "pre-restore: cannot run /nonexistent/x: No such file or directory (os error 2)");
        assert!(Stages::new(&Options::default(), None).reach(Stage::PreDump, None).is_ok());
    }
}
