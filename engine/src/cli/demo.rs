//! `demo`: a program is brought to a standstill and started again, before the reader's eyes.
//!
//! The program is this one, started once more with a verb that no usage text lists: it leads a session of its own, has
//! a child, threads and pipes with tokens and unread data in them, stamps some 64 MiB of memory over and over, and checks
//! all of that itself. It says how it is in one line of a file, which always has the same length, so the file is still
//! the one that was dumped when the program comes back.

use super::dump::{human_size, human_time};
use super::{capabilities, print, Verb};
use crate::error::{Error, Result};
use crate::options::Options;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tracing::error;

mod guest;

/// How long the sample program may take for anything that is asked of it.
const PATIENCE: Duration = Duration::from_secs(20);
/// How far it should count before, and after.
const STEPS: u64 = 40;

/// Runs with the options after the verb.
pub fn run(args: &[OsString]) -> i32 {
    let words: Vec<&str> = args.iter().map(|a| a.to_str().unwrap_or_default()).collect();
    let keep = match words.as_slice() {
        ["--guest", state] => return guest::run(Path::new(state)),
        ["--guest-child"] => return guest::run_child(),
        [] => false,
        ["--keep"] => true,
        _ => {
            print("Usage: standstill demo [--keep]\n  --keep  leave the folder with the checkpoint\n");
            return i32::from(words != ["--help"] && words != ["-h"]);
        }
    };
    let program = std::env::args_os().next().unwrap_or_default();
    if !capabilities::enough(Verb::Dump, &Options::default(), &program) {
        return 1;
    }
    match Stage::build(keep).and_then(|mut stage| stage.play()) {
        Ok(()) => 0,
        Err(e) => {
            error!("{}", e.chain());
            print("\nThe demo did not work; the reason is in the error line.\n");
            1
        }
    }
}

/// The folder, and the program that plays in it. Both go when it goes.
struct Stage {
    folder: PathBuf,
    keep: bool,
    began: Instant,
    pid: i32,
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.lives() {
            let _ = self.signal(nix::sys::signal::SIGKILL);
        }
        let _ = self.reap();
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

impl Stage {
    /// Starts the program.
    fn build(keep: bool) -> Result<Stage> {
        use std::os::unix::fs::DirBuilderExt as _;
        let began = Instant::now();
        let folder = std::env::temp_dir().join(format!("standstill-demo-{}", std::process::id()));
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700).create(&folder).map_err(io("mkdir"))?;
        // who ends is ours to wait for, also if its parent has ended before it: until then its id is in use
        nix::sys::prctl::set_child_subreaper(true).map_err(|e| io("prctl(PR_SET_CHILD_SUBREAPER)")(e.into()))?;
        // from here on the folder is removed whatever happens
        let mut stage = Stage { folder, keep, began, pid: 0 };
        builder.create(stage.images()).map_err(io("mkdir"))?;
        let child = Command::new(std::env::current_exe().map_err(io("readlink(/proc/self/exe)"))?)
            .args(["demo", "--guest"])
            .arg(stage.state_file())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(io("execve"))?;
        stage.pid = i32::try_from(child.id()).map_err(|_| Error::Gone)?;
        Ok(stage)
    }

    /// The five steps.
    fn play(&mut self) -> Result<()> {
        print(&format!(
            "Standstill {}: a running program is brought to a standstill and started again.\n\n",
            env!("CARGO_PKG_VERSION")
        ));
        let pid = self.pid;

        let first = self.counts_to(1)?;
        let then = self.counts_to(first.counter + STEPS)?;
        self.tell("1 run", &describe(pid));
        self.tell("", &format!("64 MiB of memory; its counter was {}, then {}", first.counter, then.counter));

        let images = self.images();
        let dump = Options { pid: Some(pid), images_dir: images.clone(), ..Options::default() };
        let start = Instant::now();
        let report = crate::dump::run(&dump)?;
        let took = start.elapsed();
        let size = human_size(size_of(&images));
        self.tell("2 dump", &format!("{size} in {} after {}", images.display(), human_time(took)));
        self.tell("", &format!("it stood still for {}; then its processes were killed", human_time(report.frozen)));

        self.reap()?;
        if self.lives() {
            return failed(format!("process {pid} is still there after the dump"));
        }
        let last = self.state()?;
        std::thread::sleep(Duration::from_millis(250));
        if self.state()?.counter != last.counter {
            return failed("the counter goes on although nobody should be there to count".to_owned());
        }
        self.tell("3 dead", &format!("there is no process {pid}; the counter stays at {}", last.counter));

        let restore = Options { images_dir: images, restore_detach: true, ..Options::default() };
        let start = Instant::now();
        crate::restore::run(&restore)?;
        self.tell("4 restore", &format!("from these files after {}", human_time(start.elapsed())));
        if !self.lives() {
            return failed(format!("there is no process {pid} after the restore"));
        }
        self.tell("", &describe(pid));

        let after = self.counts_to(last.counter + STEPS)?;
        self.tell(
            "5 check",
            &format!("its counter was {}, is {}: it went on where it stood", last.counter, after.counter),
        );
        self.signal(nix::sys::signal::SIGTERM)?;
        let end = self.wait_for("the sample program's verdict", |s| s.verdict != guest::RUNS)?;
        self.tell("", "it looked at all of its memory, threads, pipes and its child: ok");
        self.reap()?;

        let (folder, kept) = (self.folder.display(), if self.keep { "kept" } else { "removed" });
        print(&format!("\nIt works: {} steps counted, none lost. {folder} is {kept}.\n", end.counter));
        Ok(())
    }

    fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    fn state_file(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// A line for the reader: when, which step, what.
    fn tell(&self, step: &str, what: &str) {
        let at = self.began.elapsed();
        let at = if step.is_empty() { String::new() } else { format!("{}.{:03} s", at.as_secs(), at.subsec_millis()) };
        print(&format!("{at:>9}  {step:<10} {what}\n"));
    }

    /// Is the program there, and no zombie?
    fn lives(&self) -> bool {
        let stat = std::fs::read(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        use crate::proc::status::TaskState::{Dead, Zombie};
        crate::proc::stat::parse(&stat).is_ok_and(|s| !matches!(s.state, Zombie | Dead))
    }

    fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal).map_err(|e| io("kill")(e.into()))
    }

    /// Waits for the ends of all processes of the program. A dump that killed them may have waited for some already.
    fn reap(&self) -> Result<()> {
        use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
        self.wait_until("the end of the sample program", |_| loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return Ok(None),
                Ok(_) => {}
                Err(_) => return Ok(Some(())),
            }
        })
    }

    fn state(&self) -> Result<guest::State> {
        self.wait_until("a line of the sample program", |stage| Ok(guest::State::read(&stage.state_file())))
    }

    fn counts_to(&self, n: u64) -> Result<guest::State> {
        self.wait_for("the sample program's counter", |s| s.counter >= n)
    }

    /// Waits for a line that is as it should be; a line that says what is wrong is an error.
    fn wait_for(&self, what: &'static str, good: impl Fn(&guest::State) -> bool) -> Result<guest::State> {
        self.wait_until(what, |stage| {
            let state = guest::State::read(&stage.state_file());
            match state {
                Some(s) if s.verdict != guest::RUNS && s.verdict != guest::OK => {
                    failed(format!("the sample program says: {}", s.verdict))
                }
                Some(s) if good(&s) => Ok(Some(s)),
                _ if !stage.lives() => failed("the sample program has ended".to_owned()),
                _ => Ok(None),
            }
        })
    }

    fn wait_until<T>(&self, what: &'static str, mut look: impl FnMut(&Stage) -> Result<Option<T>>) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            if start.elapsed() > PATIENCE {
                return Err(Error::Timeout { what, seconds: PATIENCE.as_secs() });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A process as /proc has it: "process 71 and its child 72, 9 threads, 15 pipe ends".
fn describe(pid: i32) -> String {
    let list = |what: &str, pid: i32| std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    let pipes = |pid: i32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|l| l.as_os_str().as_encoded_bytes().starts_with(b"pipe:"))
            .count()
    };
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<i32> = children.split_whitespace().filter_map(|c| c.parse().ok()).collect();
    let all = || std::iter::once(pid).chain(children.iter().copied());
    let (threads, ends) = (all().map(|p| list("task", p)).sum::<usize>(), all().map(pipes).sum::<usize>());
    let child = children.first().map_or(String::new(), |c| format!(" and its child {c}"));
    format!("process {pid}{child}: {threads} threads, {ends} ends of pipes")
}

/// The bytes of a folder's files.
fn size_of(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum()
}

fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Sys { call, source }
}

fn failed<T>(what: String) -> Result<T> {
    Err(Error::Changed { what })
}
