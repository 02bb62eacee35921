//! Which processes a tree has, so that it can be told later whether they still are: a number alone may have gone to another
//! process, a number with the time at which its process began has not, as long as the machine has not started anew.
//!
//! Sources: `/proc/PID/stat` (field 22, proc(5)), `/proc/PID/task/TID/children`, `/proc/sys/kernel/random/boot_id`.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::proc::status::TaskState;
use crate::proc::{self, simple, stat};
use crate::sys::calls;

/// How often is looked whether somebody is gone.
const LOOK: Duration = Duration::from_millis(2);

/// One process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its number, as seen from where we are.
    pub pid: i32,
    /// When it began, in clock ticks since the machine did.
    pub start: u64,
}

/// The processes of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Members {
    boot: String,
    all: Vec<Member>,
}

/// What is left of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// All of them live.
    Whole,
    /// Some of them live.
    Part,
    /// None of them lives.
    Gone,
}

impl Member {
    /// A process that lives: neither gone nor a zombie.
    pub fn of(pid: i32) -> Option<Member> {
        let mut text = Vec::new();
        proc::read_proc(format!("/proc/{pid}/stat").as_ref(), &mut text).ok()?;
        let stat = stat::parse(&text).ok()?;
        (!matches!(stat.state, TaskState::Zombie | TaskState::Dead)).then_some(Member { pid, start: stat.starttime })
    }

    /// Whether it still lives.
    pub fn lives(&self) -> bool {
        Member::of(self.pid).as_ref() == Some(self)
    }
}

/// The children of a process, of all its threads.
pub fn children(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut text = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        if proc::read_proc(&thread.path().join("children"), &mut text).is_ok() {
            found.extend(simple::children(&text).unwrap_or_default());
        }
    }
    found
}

fn boot() -> String {
    let text = std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id")).unwrap_or_default();
    text.trim().to_owned()
}

impl Members {
    /// The tree below a process; exact if it stands still.
    pub fn of_tree(root: i32) -> Members {
        let (mut all, mut next) = (Vec::new(), vec![root]);
        while let Some(pid) = next.pop() {
            all.extend(Member::of(pid));
            next.extend(children(pid));
        }
        Members { boot: boot(), all }
    }

    /// These processes.
    pub fn of(pids: impl IntoIterator<Item = i32>) -> Members {
        Members { boot: boot(), all: pids.into_iter().filter_map(Member::of).collect() }
    }

    /// The first of them; 0 if there is none.
    pub fn root(&self) -> i32 {
        self.all.first().map_or(0, |m| m.pid)
    }

    /// Whether one of them has this number.
    pub fn has(&self, pid: i32) -> bool {
        self.all.iter().any(|m| m.pid == pid)
    }

    /// What is left of them.
    pub fn standing(&self) -> Standing {
        let living = if self.boot == boot() { self.all.iter().filter(|m| m.lives()).count() } else { 0 };
        match living {
            0 => Standing::Gone,
            n if n == self.all.len() => Standing::Whole,
            _ => Standing::Part,
        }
    }

    /// Waits until none lives; false if that takes longer.
    pub fn wait_gone(&self, limit: Duration) -> bool {
        let began = Instant::now();
        while self.standing() != Standing::Gone {
            if began.elapsed() > limit {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// Kills those that still live, and waits until none does.
    pub fn end(&self, limit: Duration) -> Result<()> {
        if self.boot == boot() {
            for member in &self.all {
                // the number is looked at after it is held: it cannot change hands any more
                let Ok(held) = calls::pidfd_open(member.pid, 0) else { continue };
                if member.lives() {
                    let _ = rustix::process::pidfd_send_signal(&held, rustix::process::Signal::KILL);
                }
            }
        }
        match self.wait_gone(limit) {
            true => Ok(()),
            false => Err(Error::Timeout { what: "the end of what is left of the tree", seconds: limit.as_secs() }),
        }
    }

    /// The same, with their children and theirs, as far as they can be found from those.
    pub fn end_with_children(&self, limit: Duration) -> Result<()> {
        if self.boot != boot() {
            return Ok(());
        }
        let alive = self.all.iter().filter(|member| member.lives());
        let mut all: Vec<Member> = alive.copied().collect();
        let mut at = 0;
        while let Some(member) = all.get(at) {
            // who stands still has no more children
            let _ = calls::kill(member.pid, libc::SIGSTOP);
            let found = children(member.pid).into_iter().filter_map(Member::of).filter(|child| !all.contains(child));
            all.extend(found.collect::<Vec<_>>());
            at += 1;
        }
        Members { boot: self.boot.clone(), all }.end(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_tree_is_told_from_what_is_left_of_it() {
        let mut shell = Command::new("sh").args(["-c", "sleep 100 & sleep 100 & wait"]).spawn().unwrap();
        let root = i32::try_from(shell.id()).unwrap();
        let began = Instant::now();
        while children(root).len() < 2 {
            assert!(began.elapsed() < Duration::from_secs(60));
        }
        let members = Members::of_tree(root);
        assert_eq!((members.all.len(), members.standing()), (3, Standing::Whole));
        assert!(members.has(root) && !members.has(1));
        calls::kill(children(root)[0], libc::SIGKILL).unwrap();
        while members.standing() == Standing::Whole {
            assert!(began.elapsed() < Duration::from_secs(60));
        }
        assert_eq!(members.standing(), Standing::Part);
        members.end(Duration::from_secs(60)).unwrap();
        assert_eq!(members.standing(), Standing::Gone);
        shell.wait().unwrap();
        // of another start of the machine
        let other = Members { boot: "another".into(), ..Members::of([i32::try_from(std::process::id()).unwrap()]) };
        assert_eq!((other.all.len(), other.standing()), (1, Standing::Gone));
        other.end(Duration::ZERO).unwrap();
    }
}
