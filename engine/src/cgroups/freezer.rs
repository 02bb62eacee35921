//! Stopping a tree by its freezer cgroup (`--freeze-cgroup`): nobody in it runs, so nobody makes a task while it is seized.
//!
//! v1 has `freezer.state` (`THAWED`, `FREEZING`, `FROZEN`), v2 `cgroup.freeze` and `frozen` in `cgroup.events`. Frozen tasks
//! can be seized, and stop when they are thawed, before they run a single instruction. So: freeze, seize, thaw. A group that
//! was frozen before the dump is frozen again before its tasks are let go. Processes in the group that are not of the tree
//! are held, too, until the dump is over.
//!
//! What must never happen is a group that stays frozen. The [guard](crate::guard) puts back what was, should we die; it has
//! been told before we write. A group that we are in ourselves is refused.
//!
//! Kernel: Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst, cgroup-v2.rst.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{At, Call, Error, Place, Result};
use crate::guard::{Act, Choice, Guard, List};
use crate::options::Options;
use crate::sys::futex::RobustList;
use crate::tracee::Held;

/// How long a freeze is waited for if no limit is set.
const LIMIT: Duration = Duration::from_secs(10);
/// How long tasks of a dead engine may take to leave its executor before they are frozen again.
const WAY_BACK: Duration = Duration::from_millis(200);
/// v1 freezes more surely if it is asked more than once.
const AGAIN: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Thawed,
    Freezing,
    Frozen,
}

/// A freezer cgroup. It is as it was found when this is dropped.
#[derive(Debug)]
pub struct Freezer<'r> {
    path: PathBuf,
    v2: bool,
    file: File,
    /// It was not ours to freeze.
    was_frozen: bool,
    /// What it is now.
    frozen: bool,
    limit: Duration,
    guard: Guard<'r>,
    /// Threads that are not of the tree.
    others: Vec<Held>,
    over: bool,
}

impl<'r> Freezer<'r> {
    /// The group that was asked for, if one was.
    pub fn new(opts: &Options, robust: &'r RobustList) -> Result<Option<Freezer<'r>>> {
        let Some(path) = &opts.freeze_cgroup else { return Ok(None) };
        let path = opts.in_work_dir(path);
        Freezer::open(&path, opts, robust).at(Place::Path(path.clone())).map(Some)
    }

    fn open(path: &Path, opts: &Options, robust: &'r RobustList) -> Result<Freezer<'r>> {
        let v2 = match (path.join("freezer.state").exists(), path.join("cgroup.freeze").exists()) {
            (true, _) => false,
            (false, true) => true,
            (false, false) => {
                let what = "Neither a cgroupv1 (freezer.state) or cgroupv2 (cgroup.freeze) control file found.";
                return Err(Error::Usage { what: what.into() });
            }
        };
        let name = if v2 { "cgroup.freeze" } else { "freezer.state" };
        let file = File::options().read(true).write(true).open(path.join(name)).call("open")?;
        let limit = if opts.timeout == 0 { LIMIT } else { Duration::from_secs(opts.timeout.into()) };
        let guard = Guard::new(robust);
        let mut freezer = Freezer {
            path: path.to_owned(),
            v2,
            file,
            was_frozen: false,
            frozen: false,
            limit,
            guard,
            others: Vec::new(),
            over: false,
        };
        if freezer.has_us()? {
            let what = "The criu itself is within the freezer cgroup: start it in another cgroup";
            return Err(Error::Usage { what: what.into() });
        }
        freezer.was_frozen = freezer.state()? != State::Thawed;
        freezer.frozen = freezer.was_frozen;
        let held = freezer.guard.hold(freezer.file.as_fd())?;
        freezer.guard.register(List::Undo, &Act::WriteAt(held, 0, freezer.word(freezer.was_frozen)))?;
        if freezer.was_frozen {
            freezer.guard.register(List::Undo, &Act::Pause(WAY_BACK))?;
        }
        Ok(freezer)
    }

    fn word(&self, frozen: bool) -> &'static [u8] {
        match (self.v2, frozen) {
            (false, false) => b"THAWED",
            (false, true) => b"FROZEN",
            (true, false) => b"0",
            (true, true) => b"1",
        }
    }

    /// As the image of cgroups has it: what the group was.
    pub fn state_before(&self) -> &'static str {
        if self.was_frozen {
            "FROZEN"
        } else {
            "THAWED"
        }
    }

    /// Whether the group was frozen when it was found.
    pub fn was_frozen(&self) -> bool {
        self.was_frozen
    }

    fn write(&mut self, frozen: bool) -> Result<()> {
        self.file.rewind().call("lseek")?;
        let word = self.word(frozen);
        self.file.write_all(word).call(if frozen { "write(freeze)" } else { "write(thaw)" })?;
        self.frozen = frozen;
        Ok(())
    }

    fn state(&mut self) -> Result<State> {
        self.file.rewind().call("lseek")?;
        let mut text = String::new();
        self.file.read_to_string(&mut text).call("read(freezer state)")?;
        Ok(match text.trim() {
            "THAWED" | "0" => State::Thawed,
            "FREEZING" => State::Freezing,
            "FROZEN" => State::Frozen,
            "1" => {
                let events = std::fs::read_to_string(self.path.join("cgroup.events")).call("read(cgroup.events)")?;
                if events.lines().any(|l| l == "frozen 1") {
                    State::Frozen
                } else {
                    State::Freezing
                }
            }
            other => return Err(Error::Usage { what: format!("Unknown freezer state: {other}") }),
        })
    }

    /// The threads in the group, and in those below it.
    fn threads(&self) -> Result<Vec<i32>> {
        let name = if self.v2 { "cgroup.threads" } else { "tasks" };
        let mut all = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            let text = match std::fs::read_to_string(folder.join(name)) {
                Err(e) if folder != self.path && e.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.call("read").at(Place::Path(folder.join(name)))?,
            };
            all.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    folders.push(entry.path());
                }
            }
        }
        Ok(all)
    }

    fn has_us(&self) -> Result<bool> {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        Ok(self.threads()?.contains(&own))
    }

    /// Freezes the group, if it is not frozen.
    pub fn freeze(&mut self) -> Result<()> {
        let path = self.path.clone();
        self.freeze_here().at(Place::Path(path))
    }

    fn freeze_here(&mut self) -> Result<()> {
        let began = Instant::now();
        let mut asked = Instant::now();
        if !self.frozen {
            self.write(true)?;
        }
        let mut pause = Duration::from_micros(200);
        while self.state()? != State::Frozen {
            crate::sys::interrupt::check()?;
            if began.elapsed() > self.limit {
                let what = format!("Unable to freeze cgroup {}", self.path.display());
                tracing::error!("{what}: its tasks are {:?}", self.threads().unwrap_or_default());
                return Err(Error::Usage { what: format!("{what} within {} s", self.limit.as_secs()) });
            }
            if !self.v2 && asked.elapsed() > AGAIN {
                if !self.was_frozen {
                    self.write(false)?;
                    std::thread::sleep(pause);
                }
                self.write(true)?;
                asked = Instant::now();
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Seizes what is in the group and not of the tree.
    pub fn seize_others(&mut self, of_tree: impl Fn(i32) -> bool) -> Result<()> {
        for tid in self.threads()? {
            if of_tree(tid) || self.others.iter().any(|held| held.tid() == tid) {
                continue;
            }
            // what cannot be seized is on its way out, or the kernel's
            if let Ok(held) = Held::seize(tid, 0) {
                tracing::warn!("Unexpected process {tid} in the freezer cgroup");
                self.others.push(held);
            }
        }
        Ok(())
    }

    /// Lets what was seized come to its stop.
    pub fn thaw(&mut self) -> Result<()> {
        if self.frozen {
            self.write(false).at(Place::Path(self.path.clone()))?;
        }
        for held in &mut self.others {
            // who does not come is let go later all the same
            let _ = held.settle(Duration::from_secs(1));
        }
        Ok(())
    }

    /// The tree is about to be let go: the group is frozen again if it was. Not waited for, as the tree is still held.
    pub fn before_release(&mut self) -> Result<()> {
        if self.was_frozen && !self.frozen {
            self.write(true).at(Place::Path(self.path.clone()))?;
        }
        self.over = true;
        self.guard.choose(Choice::Nothing);
        self.others.clear();
        Ok(())
    }

    /// The tree is about to be killed, which nothing must hold up.
    pub fn tree_ends(&mut self) {
        self.over = true;
        self.guard.choose(Choice::Nothing);
        self.others.clear();
    }
}

impl Drop for Freezer<'_> {
    fn drop(&mut self) {
        if !self.over && self.frozen != self.was_frozen {
            if let Err(e) = self.write(self.was_frozen) {
                tracing::error!("the cgroup {} is not as it was: {}", self.path.display(), e.chain());
            }
        }
        self.guard.choose(Choice::Nothing);
        self.others.clear();
    }
}
