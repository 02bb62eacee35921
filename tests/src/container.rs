//! Containers for tests of container engines: a root file system from a static busybox, the program in it, and a folder in
//! front of PATH in which `criu` is ours.
//!
//! The program counts: a shell writes numbers into a pipe, another one takes them out and appends them to `/data/count`. It
//! holds a listening socket, and a file on a tmpfs. On SIGTERM it writes `/data/bye` and exits with [`EXIT`].

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::engine::Engine;
use crate::process::{self, Output, Patience};
use crate::program;
use crate::skip::skip;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(60);
/// What the program exits with.
pub const EXIT: i32 = 7;

const WORK: &str = r#"#!/bin/sh
trap 'echo bye > /data/bye; exit 7' TERM
httpd -f -p 127.0.0.1:8080 -h /data &
echo kept > /dev/shm/kept
n=0
{ while :; do n=$((n+1)); echo $n; sleep 0.02; done | while read n; do echo $n >> /data/count; done; } &
wait
"#;

/// Where an engine works: a folder of its own, and nothing else in it.
#[derive(Debug)]
pub struct Place {
    /// The folder.
    pub folder: PathBuf,
    /// The root file system of containers.
    pub rootfs: PathBuf,
}

impl Place {
    /// A place for a test that needs these programs; none, and the test is skipped, if one is missing.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(test: &str, programs: &[&str]) -> Option<Place> {
        for name in programs {
            program::program(name)?;
        }
        let busybox = program::program("busybox")?;
        let folder = process::scratch(test);
        let place = Place { rootfs: folder.join("rootfs"), folder };
        for name in ["bin", "dev", "etc", "data", "proc", "sys", "tmp", "run"] {
            made(fs::create_dir_all(place.rootfs.join(name)), name);
        }
        let inside = place.rootfs.join("bin/busybox");
        made(fs::copy(busybox, &inside), "busybox");
        let mut command = Command::new("chroot");
        command.arg(&place.rootfs).args(["/bin/busybox", "--install", "-s", "/bin"]);
        let output = made(process::run(&mut command, LIMIT), "chroot");
        if output.code != Some(0) {
            skip(test, "busybox is not a static one (Debian's busybox-static)");
            let _ = fs::remove_dir_all(&place.folder);
            return None;
        }
        place.script("work.sh", WORK);
        let engine = Engine::ours().path;
        made(fs::create_dir(place.folder.join("criu")), "criu");
        made(symlink(engine, place.folder.join("criu/criu")), "criu");
        Some(place)
    }

    /// A script in the root file system.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn script(&self, name: &str, text: &str) {
        let path = self.rootfs.join(name);
        made(fs::write(&path, text), name);
        made(fs::set_permissions(&path, fs::Permissions::from_mode(0o755)), name);
    }

    /// A command that finds our `criu`.
    pub fn command(&self, program: &str) -> Command {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let ours = std::iter::once(self.folder.join("criu"));
        let rest = std::env::split_paths(&path);
        let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        let all = std::env::join_paths(ours.chain(rest).chain(system)).unwrap_or_default();
        let mut command = Command::new(program);
        command.env("PATH", all).stdin(Stdio::null()).current_dir(&self.folder);
        command
    }

    /// Runs a command; what it prints, if it exits with 0.
    ///
    /// # Errors
    /// What it printed.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String, Output> {
        let mut command = self.command(program);
        let output = made(process::run(command.args(args), LIMIT), program);
        match output.code {
            Some(0) => Ok(output.text),
            _ => Err(output),
        }
    }

    /// The numbers that the program has written.
    pub fn counted(&self) -> Vec<u64> {
        let text = fs::read_to_string(self.rootfs.join("data/count")).unwrap_or_default();
        // the last line may be half there
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Waits until it has counted on.
    ///
    /// # Panics
    /// If it does not.
    pub fn counts(&self) {
        let before = self.counted().len();
        let on = process::within(LIMIT, || self.counted().len() >= before + 3);
        assert!(on, "it does not count: {before} numbers, and no more");
    }

    /// It has counted without a gap, and no number twice.
    ///
    /// # Panics
    /// If there is one.
    pub fn counted_all(&self) {
        let all = self.counted();
        let right = all.iter().zip(1..).all(|(&is, should)| is == should);
        assert!(right && !all.is_empty(), "numbers are lost or there twice: {all:?}");
    }

    /// Waits for what it writes when it ends.
    ///
    /// # Panics
    /// If it does not.
    pub fn said_bye(&self) {
        let path = self.rootfs.join("data/bye");
        assert!(process::within(LIMIT, || path.exists()), "it does not end when it is asked to");
    }

    /// A file of ours as text, for a report.
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("its files are kept in {}", self.folder.display());
            return;
        }
        let mut patience = Patience::of(Duration::from_secs(5));
        while fs::remove_dir_all(&self.folder).is_err() && !patience.over() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn made<T, E: std::fmt::Display>(result: Result<T, E>, what: &str) -> T {
    result.unwrap_or_else(|e| panic!("{what}: {e}"))
}

/// The lines of a log that say what went wrong.
pub fn errors(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("Error") || line.contains("Warn")).collect();
    format!("{}:\n{}", log.display(), lines.join("\n"))
}
