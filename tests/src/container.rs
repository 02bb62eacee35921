//! Containers for tests of container engines: a root file system from a static busybox, the program in it, and a folder in
//! front of PATH in which `criu` is ours.
//!
//! The program counts: a shell writes numbers into a pipe, another one takes them out and appends them to `/data/count`. It
//! holds a listening socket, and a file on a tmpfs. On SIGTERM it writes `/data/bye` and exits with [`EXIT`].

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
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
    /// A name that nobody else has, for containers and their cgroups.
    pub name: String,
}

impl Place {
    /// A place for a test that needs these programs; none, and the test is skipped, if one is missing.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(test: &str, programs: &[&str]) -> Option<Place> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for name in programs {
            program::program(name)?;
        }
        let busybox = program::program("busybox")?;
        let folder = process::scratch(test);
        let name = format!("standstill-{}-{}e", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let place = Place { rootfs: folder.join("rootfs"), folder, name };
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

    /// The root file system as a tar archive.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn tar(&self) -> PathBuf {
        let (path, rootfs) = (self.folder.join("rootfs.tar"), self.rootfs.display().to_string());
        let args = ["-C", &rootfs, "-cf", &path.display().to_string(), "."];
        self.run("tar", &args).unwrap_or_else(|o| panic!("tar: {}", o.text));
        path
    }

    /// The root file system as an image, in the form that `docker save` has.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn image(&self, name: &str) -> PathBuf {
        let image = self.folder.join("image");
        made(fs::create_dir_all(&image), "image");
        made(fs::rename(self.tar(), image.join("layer.tar")), "layer.tar");
        let sum = self.run("sha256sum", &["image/layer.tar"]).unwrap_or_else(|o| panic!("sha256sum: {}", o.text));
        let sum = sum.split_whitespace().next().unwrap_or_default();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{sum}")]}, "history": [{"created_by": "a test"}]
        });
        let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
        made(fs::write(image.join("config.json"), config.to_string()), "config.json");
        made(fs::write(image.join("manifest.json"), manifest.to_string()), "manifest.json");
        let path = self.folder.join("image.tar");
        let args = ["-C", "image", "-cf", &path.display().to_string(), "manifest.json", "config.json", "layer.tar"];
        self.run("tar", &args).unwrap_or_else(|o| panic!("tar: {}", o.text));
        path
    }

    /// Ends what is left of processes that work for or in this place: those whose arguments name its folder, and those in its
    /// cgroups. Unmounts what is mounted below it, and removes the cgroups.
    fn clear(&self) {
        let folder = self.folder.display().to_string();
        let has = |path: PathBuf, word: &str| fs::read(path).is_ok_and(|t| String::from_utf8_lossy(&t).contains(word));
        let left = || -> Vec<i32> {
            let own = i32::try_from(std::process::id()).unwrap_or(0);
            let all = fs::read_dir("/proc").into_iter().flatten().flatten();
            let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()).filter(|&pid| pid != own);
            pids.filter(|pid| {
                let of = Path::new("/proc").join(pid.to_string());
                process::alive(*pid) && (has(of.join("cmdline"), &folder) || has(of.join("cgroup"), &self.name))
            })
            .collect()
        };
        let gone = process::within(Duration::from_secs(10), || {
            let left = left();
            for &pid in &left {
                process::signal(pid, libc::SIGKILL);
                process::reap(pid);
            }
            left.is_empty()
        });
        if !gone {
            eprintln!("processes {:?} do not end", left());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&folder));
        for point in points.collect::<Vec<_>>().iter().rev() {
            let _ = Command::new("umount").args(["-l", point]).status();
        }
        let below =
            |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
        let hierarchies = [vec![PathBuf::from("/sys/fs/cgroup")], below(Path::new("/sys/fs/cgroup"))].concat();
        for group in hierarchies.iter().flat_map(|path| below(path)) {
            if !group.file_name().is_some_and(|name| name.to_string_lossy().ends_with(&self.name)) {
                continue;
            }
            // the kernel needs a moment to see that a group is empty
            process::within(Duration::from_secs(2), || {
                remove_groups(&group);
                !group.exists()
            });
        }
    }
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
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

/// A daemon; it ends with this.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts one, which writes to `daemon.log`, and waits until `ready` succeeds.
    ///
    /// # Errors
    /// What it wrote, if it ends or does not become ready.
    pub fn start(place: &Place, program: &str, args: &[&str], ready: &[&str]) -> Result<Daemon, String> {
        let log = made(fs::File::create(place.folder.join("daemon.log")), "daemon.log");
        let mut command = place.command(program);
        command.args(args).stdout(made(log.try_clone(), "daemon.log")).stderr(log);
        let child = command.spawn().map_err(|e| format!("{program}: {e}"))?;
        let mut daemon = Daemon { child };
        let mut ended = false;
        let is_ready = process::within(LIMIT, || {
            ended = daemon.child.try_wait().is_ok_and(|status| status.is_some());
            ended || place.run(ready[0], &ready[1..]).is_ok()
        });
        if is_ready && !ended {
            return Ok(daemon);
        }
        let text = fs::read_to_string(place.folder.join("daemon.log")).unwrap_or_default();
        let last = text.lines().rev().find(|line| line.contains("level=fatal") || line.contains("failed"));
        Err(last.or(text.lines().last()).unwrap_or("it says nothing").to_owned())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        process::signal(i32::try_from(self.child.id()).unwrap_or(0), libc::SIGTERM);
        if !process::within(Duration::from_secs(15), || self.child.try_wait().is_ok_and(|status| status.is_some())) {
            let _ = self.child.kill();
            let _ = self.child.wait();
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
