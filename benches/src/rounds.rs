//! One round: a fresh guest, dumped, dead, restored, and right.

use crate::guests::Guest;
use crate::machine::{warm, Dir};
use crate::programs::Program;
use anyhow::{bail, ensure, Context as _, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;
use standstill_images::proto::StatsEntry;
use standstill_images::{ImageKind, Images};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Nothing here takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a round took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// The whole command.
    pub(crate) dump: Duration,
    /// How long the tree stood still, by the program's own account.
    pub(crate) frozen: Option<Duration>,
    /// The whole command.
    pub(crate) restore: Duration,
}

/// All rounds of a case: a list for each program, in their order. The first round only makes everyone warm.
pub(crate) fn run(case: Guest, programs: &[&Program], rounds: usize, dir: &Dir) -> Vec<Vec<Result<Sample>>> {
    let mut samples: Vec<Vec<Result<Sample>>> = programs.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        for turn in 0..programs.len() {
            let which = (round + turn) % programs.len();
            let sample = once(case, programs[which], dir.path());
            // a program that failed will fail again
            if samples[which].iter().any(Result::is_err) || (round == 0 && sample.is_ok()) {
                continue;
            }
            samples[which].push(sample);
        }
    }
    samples
}

/// Removes all that an earlier round has left.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    for old in std::fs::read_dir(dir)?.flatten() {
        let old = old.path();
        let _ = if old.is_dir() { std::fs::remove_dir_all(old) } else { std::fs::remove_file(old) };
    }
    Ok(())
}

fn once(case: Guest, program: &Program, dir: &Path) -> Result<Sample> {
    let images = dir.join("images");
    clear(dir)?;
    std::fs::create_dir(&images)?;
    let mut guest = Running::start(case, dir)?;
    let content = case.bytes() + case.overhead();

    warm(content);
    let dump = command(program, &images, "dump", &["-t", &guest.pid.to_string()]);
    guest.reap();
    let dump = dump?;
    ensure!(!guest.lives(), "the guest lives after its dump");
    let frozen = stats(&images).context("stats-dump")?;

    warm(content);
    let restore = command(program, &images, "restore", &["-d"])?;
    guest.check(dir)?;
    Ok(Sample { dump, frozen, restore })
}

/// Runs a verb, and says how long that took.
pub(crate) fn command(program: &Program, images: &Path, verb: &str, more: &[&str]) -> Result<Duration> {
    let log = images.join(format!("{verb}.out"));
    let out = File::create(&log)?;
    let mut command = Command::new(&program.path);
    command.arg(verb).arg("-D").arg(images).args(more).current_dir("/");
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let start = Instant::now();
    let status = command.status().with_context(|| program.path.display().to_string())?;
    let took = start.elapsed();
    if !status.success() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("Error")).take(4).collect();
        bail!("{} {verb}: {status}: {}", program.name, lines.join("; "));
    }
    Ok(took)
}

/// How long the tree stood still.
pub(crate) fn stats(images: &Path) -> Result<Option<Duration>> {
    let stats: StatsEntry = Images::open_folder(images)?.read_one(ImageKind::StatsDump, ())?;
    Ok(stats.dump.map(|d| Duration::from_micros(d.frozen_time.into())))
}

/// A guest. It does not outlive this.
pub(crate) struct Running {
    pub(crate) pid: Pid,
}

impl Running {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(case: Guest, dir: &Path) -> Result<Running> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--guest", case.name()]).arg(dir).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().context("the guest does not start")?;
        let guest = Running { pid: Pid::from_raw(i32::try_from(child.id())?) };
        wait_until("the guest's being ready", || Ok(dir.join("ready").exists()), || guest.lives())?;
        // its last steps into sleep
        std::thread::sleep(Duration::from_millis(20));
        Ok(guest)
    }

    pub(crate) fn lives(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    /// Has it check itself, which ends it.
    pub(crate) fn check(&mut self, dir: &Path) -> Result<()> {
        kill(self.pid, Signal::SIGTERM).context("no guest after its restore")?;
        wait_until("the guest's check of itself", || Ok(dir.join("ok").exists()), || self.lives())?;
        wait_until("the guest's end", || Ok(!self.lives()), || true)?;
        self.reap();
        Ok(())
    }

    /// Has it write to its memory, to one page of a hundred or to all; how long that took.
    pub(crate) fn write(&self, all: bool, dir: &Path) -> Result<Duration> {
        let done = dir.join("written");
        let _ = std::fs::remove_file(&done);
        kill(self.pid, if all { Signal::SIGUSR2 } else { Signal::SIGUSR1 }).context("the guest is gone")?;
        wait_until("the guest's writing", || Ok(done.exists()), || self.lives())?;
        Ok(Duration::from_nanos(std::fs::read_to_string(&done)?.parse()?))
    }

    /// Waits for all of our children that have ended: it, and what it left behind.
    pub(crate) fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                _ => {}
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.lives() {
            // the session is its own, and so is the group
            let _ = nix::sys::signal::killpg(self.pid, Signal::SIGKILL);
            std::thread::sleep(Duration::from_millis(50));
        }
        self.reap();
    }
}

pub(crate) fn wait_until(what: &str, mut there: impl FnMut() -> Result<bool>, hope: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    loop {
        let hoped = hope();
        if there()? {
            return Ok(());
        }
        ensure!(hoped && start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}
