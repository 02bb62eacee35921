//! A program with many threads that dumps and restores a child by the library, again and again, and finds itself unchanged.
//!
//! The host is as inconvenient as hosts are: threads that keep busy, a SIGCHLD handler, and a thread that sits in
//! `waitpid(-1)` and would take whatever the engine left to be taken. After each round the child must have gone on counting
//! where it stood; at the end the host's working folder, umask, signal handlers, environment, descriptors and standard
//! output must be what they were, and none of its processes may be left.
//!
//! ```text
//! cargo run --release --example embed            # as root; the number of rounds may follow
//! ```
#![allow(unsafe_code)] // signal handlers and waitpid(-1) are what this is about

use standstill::{Dump, Restore};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How often the handler ran.
static SIGCHLDS: AtomicU64 = AtomicU64::new(0);
/// Nothing here takes this long.
const PATIENCE: Duration = Duration::from_secs(20);

extern "C" fn on_sigchld(_: i32) {
    SIGCHLDS.fetch_add(1, Ordering::Relaxed);
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--guest", file] => guest(Path::new(file)),
        [] => host(10),
        [rounds] => rounds.parse().map_err(Into::into).and_then(host),
        _ => Err("usage: embed [ROUNDS]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("embed: {e}");
            let mut cause = e.source();
            while let Some(e) = cause {
                eprintln!("  {e}");
                cause = e.source();
            }
            ExitCode::FAILURE
        }
    }
}

/// The child: counts in a file, in a line that always has the same length, so that the file stays the one that was dumped.
fn guest(file: &Path) -> Fallible<()> {
    nix::unistd::setsid()?;
    let open: Vec<i32> =
        std::fs::read_dir("/proc/self/fd")?.flatten().filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        let _ = nix::unistd::close(fd);
    }
    let file = File::options().write(true).open(file)?;
    for n in 1u64.. {
        file.write_all_at(format!("{n:020}").as_bytes(), 0)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn host(rounds: u32) -> Fallible<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err("dumping and restoring needs root".into());
    }
    let folder = Folder::make()?;
    // what the library writes to standard output is caught in a file
    let mut out = File::from(nix::unistd::dup(std::io::stdout())?);
    let caught = File::create(folder.0.join("stdout"))?;
    // SAFETY: both descriptors are open, and nobody else uses standard output yet.
    if unsafe { libc::dup2(caught.as_raw_fd(), 1) } != 1 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the handler only adds to an atomic number.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigchld as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_NOCLDSTOP;
        if libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    let busy = Busy::start(4);
    let waiter = Waiter::start();

    let images = folder.0.join("images");
    std::fs::create_dir(&images)?;
    let counter = folder.0.join("counter");
    File::create(&counter)?.write_all(&[b'0'; 20])?;
    let child = Command::new(std::env::current_exe()?)
        .arg("--guest")
        .arg(&counter)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = i32::try_from(child.id())?;
    let _guard = Kill(pid);
    wait_for("the child's first steps", || Ok(count(&counter)? > 10))?;

    let before = Host::look()?;
    let (mut stood, mut dumping, mut restoring) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for round in 0..rounds {
        let n = busy.steps();
        let start = Instant::now();
        let report = Dump::new(pid).images_dir(&images).run()?;
        dumping += start.elapsed();
        stood += report.frozen;
        wait_for("the child's end", || Ok(waiter.ended(pid) || !exists(pid)))?;
        let last = count(&counter)?;

        let start = Instant::now();
        let report = Restore::new(&images).detached().run()?;
        restoring += start.elapsed();
        if report.pid != pid {
            return Err(format!("process {} came back instead of {pid}", report.pid).into());
        }
        waiter.forget(pid);
        wait_for("the child's going on", || {
            if waiter.ended(pid) {
                Err("the restored child ended".into())
            } else {
                Ok(count(&counter)? > last + 10)
            }
        })?;
        if count(&counter)? > last + 10_000 || busy.steps() == n {
            return Err(format!("round {round}: the child or the host did not go on as it should").into());
        }
    }
    let after = Host::look()?;
    before.compare(&after)?;
    let written = caught.metadata()?.len();
    if written != 0 {
        return Err(format!("the library wrote {written} bytes to standard output").into());
    }
    busy.end()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL)?;
    wait_for("the end of the restored child", || Ok(waiter.ended(pid)))?;
    let left = children()?;
    if !left.is_empty() {
        return Err(format!("processes are left behind: {left:?}").into());
    }
    let per = |d: Duration| d.as_secs_f64() * 1e3 / f64::from(rounds.max(1));
    writeln!(
        out,
        "ok: {rounds} rounds; a dump took {:.1} ms (the child stood still for {:.1} ms), a restore {:.1} ms; {} SIGCHLD",
        per(dumping),
        per(stood),
        per(restoring),
        SIGCHLDS.load(Ordering::Relaxed)
    )?;
    Ok(())
}

/// A folder for one run, which goes with it.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Fallible<Folder> {
        let path = std::env::temp_dir().join(format!("standstill-embed-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Kills the child however this ends.
struct Kill(i32);

impl Drop for Kill {
    fn drop(&mut self) {
        if exists(self.0) && std::fs::read_link(format!("/proc/{}/exe", self.0)).ok() == std::env::current_exe().ok() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), nix::sys::signal::SIGKILL);
        }
    }
}

fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn count(file: &Path) -> Fallible<u64> {
    Ok(std::fs::read_to_string(file)?.parse().unwrap_or(0))
}

fn wait_for(what: &str, mut there: impl FnMut() -> Fallible<bool>) -> Fallible<()> {
    let start = Instant::now();
    while !there()? {
        if start.elapsed() > PATIENCE {
            return Err(format!("{what} did not come").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// All children, of whichever thread.
fn children() -> Fallible<Vec<i32>> {
    let mut all = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")?.flatten() {
        // a thread that ended meanwhile has none
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.extend(text.split_whitespace().filter_map(|c| c.parse::<i32>().ok()));
    }
    Ok(all)
}

/// Threads that allocate and count without pause.
struct Busy {
    end: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<bool>>,
}

impl Busy {
    fn start(n: usize) -> Busy {
        let (end, steps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = |seed: usize| {
            let (end, steps) = (Arc::clone(&end), Arc::clone(&steps));
            std::thread::spawn(move || {
                while !end.load(Ordering::Relaxed) {
                    let many: Vec<usize> = (0..997).map(|i| i ^ seed).collect();
                    if many.iter().enumerate().any(|(i, v)| *v != i ^ seed) {
                        return false;
                    }
                    steps.fetch_add(1, Ordering::Relaxed);
                    std::thread::yield_now();
                }
                true
            })
        };
        let threads = (0..n).map(thread).collect();
        Busy { end, steps, threads }
    }

    fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    fn end(self) -> Fallible<()> {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads {
            if !thread.join().map_err(|_| "a busy thread panicked")? {
                return Err("a busy thread found its memory changed".into());
            }
        }
        Ok(())
    }
}

/// A thread that takes every end of a child that it can get, as many programs have one.
struct Waiter(Arc<(Mutex<HashMap<i32, i32>>, Condvar)>);

impl Waiter {
    fn start() -> Waiter {
        let ends = Arc::new((Mutex::new(HashMap::new()), Condvar::new()));
        let shared = Arc::clone(&ends);
        std::thread::spawn(move || loop {
            let mut status = 0;
            // SAFETY: the status is a place for the answer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
            if pid < 0 {
                // no child at the moment
                std::thread::sleep(Duration::from_micros(200));
            } else if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                shared.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, status);
                shared.1.notify_all();
            }
        });
        Waiter(ends)
    }

    fn ended(&self, pid: i32) -> bool {
        self.0 .0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&pid)
    }

    fn forget(&self, pid: i32) {
        self.0 .0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }
}

/// What a library must leave alone.
#[derive(Debug)]
struct Host {
    folder: PathBuf,
    root: PathBuf,
    umask: String,
    environment: BTreeMap<OsString, OsString>,
    /// Signal, handler, flags and mask.
    handlers: Vec<(i32, usize, i32, u64)>,
    /// Blocked signals of this thread.
    mask: String,
    /// What descriptors are open, and to what; standard output by inode and flags.
    descriptors: BTreeMap<i32, PathBuf>,
    stdout: (u64, u64, i32),
    limits: String,
    subreaper: bool,
}

impl Host {
    fn look() -> Fallible<Host> {
        let status = std::fs::read_to_string("/proc/thread-self/status")?;
        let line = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap_or_default().to_owned();
        let mut handlers = Vec::new();
        for signal in 1..=64 {
            // SAFETY: sigaction is plain data, the call only writes to it, and a sigset_t is longer than a word.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0 {
                    // the kernel knows 64 signals; what the C library has behind them is not initialized
                    let mask = (&raw const action.sa_mask).cast::<u64>().read();
                    handlers.push((signal, action.sa_sigaction, action.sa_flags, mask));
                }
            }
        }
        let mut descriptors = BTreeMap::new();
        for fd in std::fs::read_dir("/proc/self/fd")?.flatten() {
            let number = fd.file_name().to_str().and_then(|n| n.parse().ok()).unwrap_or(-1);
            let Ok(target) = std::fs::read_link(fd.path()) else { continue };
            // the folder that is being read
            if !target.starts_with("/proc") {
                descriptors.insert(number, target);
            }
        }
        // SAFETY: descriptor 1 is open as long as this program runs, and is not closed by the one who borrows it here.
        let stdout = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
        let data = stdout.metadata()?;
        // SAFETY: F_GETFL only looks.
        let flags = unsafe { libc::fcntl(1, libc::F_GETFL) };
        Ok(Host {
            folder: std::env::current_dir()?,
            root: std::fs::read_link("/proc/self/root")?,
            umask: line("Umask:"),
            environment: std::env::vars_os().collect(),
            handlers,
            mask: line("SigBlk:"),
            descriptors,
            stdout: (data.dev(), data.ino(), flags),
            limits: std::fs::read_to_string("/proc/self/limits")?,
            subreaper: nix::sys::prctl::get_child_subreaper()?,
        })
    }

    fn compare(&self, after: &Host) -> Fallible<()> {
        let parts = [
            ("the working folder", self.folder == after.folder),
            ("the root folder", self.root == after.root),
            ("the umask", self.umask == after.umask),
            ("the environment", self.environment == after.environment),
            ("the signal mask", self.mask == after.mask),
            ("standard output", self.stdout == after.stdout),
            ("limits", self.limits == after.limits),
            ("the subreaper flag", self.subreaper == after.subreaper),
        ];
        if let Some((what, _)) = parts.iter().find(|(_, same)| !same) {
            return Err(format!("the library changed {what}").into());
        }
        if let Some((a, b)) = self.handlers.iter().zip(&after.handlers).find(|(a, b)| a != b) {
            return Err(format!("the action of signal {} was {:x?} and is {:x?}", a.0, a, b).into());
        }
        if self.descriptors != after.descriptors {
            return Err(format!("descriptors were {:?} and are {:?}", self.descriptors, after.descriptors).into());
        }
        Ok(())
    }
}
