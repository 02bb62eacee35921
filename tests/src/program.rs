//! A program that people run, under test: it is not a guest, but what it writes says whether it is right.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::engine::{Engine, Failure};
use crate::process;
use crate::skip::skip;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A program under test; it ends with this.
#[derive(Debug)]
pub struct Program {
    /// Where it runs.
    pub folder: PathBuf,
    /// Its first process.
    pub pid: i32,
    /// All of its processes, as they were at the last dump.
    pub tree: Vec<i32>,
}

impl Program {
    /// Starts a program in a session of its own, with nothing of ours open.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(name: &str, folder: PathBuf, command: &mut Command) -> Program {
        process::adopt();
        command.current_dir(&folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // waited for where all that we adopt is
        #[allow(clippy::zombie_processes)]
        let child = process::in_own_session(command).spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        let pid = i32::try_from(child.id()).unwrap_or(0);
        Program { folder, pid, tree: vec![pid] }
    }

    /// Dumps it, and it is dead then.
    pub fn dump(&mut self, options: &[&str]) {
        if let Err(e) = self.try_dump(options) {
            panic!("{e}");
        }
    }

    /// Dumps it, and it is dead then, or goes on.
    ///
    /// # Errors
    /// What the engine said.
    pub fn try_dump(&mut self, options: &[&str]) -> Result<(), Failure> {
        self.tree = process::tree(self.pid);
        Engine::ours().dump(self.pid, &self.folder.join("images"), options)?;
        if let Err(left) = process::wait_gone(&self.tree, LIMIT) {
            panic!("after the dump {left:?} are still there");
        }
        // who was made after we looked, and keeps ids in use
        for &pid in &self.tree {
            process::reap_session(pid);
        }
        Ok(())
    }

    /// Restores it; its processes may come and go.
    pub fn restore_restless(&self, options: &[&str]) {
        if let Err(e) = Engine::ours().restore(&self.folder.join("images"), options) {
            panic!("{e}");
        }
    }

    /// Restores it, with all of its processes.
    pub fn restore(&self, options: &[&str]) {
        self.restore_restless(options);
        let now = process::tree(self.pid);
        let lacking: Vec<i32> = self.tree.iter().copied().filter(|p| !now.contains(p)).collect();
        assert!(lacking.is_empty(), "processes {lacking:?} were not restored");
    }

    /// Kills the engine at a moment by chance, in a dump that would leave the program running and in a restore, as often as
    /// `STANDSTILL_PROGRAM_KILLS` says (1): the program goes on, or nothing of it is there and it can be restored.
    pub fn survive(&mut self, options: &[&str], mut moves: impl FnMut(&Program)) {
        let kills = std::env::var("STANDSTILL_PROGRAM_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
        let engine = Engine::ours();
        let images = self.folder.join("images");
        fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        let pid = self.pid.to_string();
        let (mut dumping, mut restoring) = (Duration::from_millis(60), Duration::from_millis(60));
        for turn in 0..kills {
            let mut dump = engine.command("dump", &images, &[&["-t", &pid, "-R"], options].concat());
            killed(&mut dump, &mut dumping, turn);
            moves(self);
            self.dump(options);
            let mut restore = engine.command("restore", &images, &[&["-d"], options].concat());
            killed(&mut restore, &mut restoring, turn);
            let began = Instant::now();
            // all of it, or nothing
            while process::exists(self.pid) && process::reap(self.pid).is_none() && began.elapsed() < LIMIT {
                if began.elapsed() > Duration::from_millis(500) && process::alive(self.pid) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            if !process::alive(self.pid) {
                let _ = process::wait_gone(&self.tree, Duration::from_secs(5));
                for &pid in &self.tree {
                    process::reap_session(pid);
                }
                self.restore_restless(options);
            }
            moves(self);
        }
    }

    /// Dumps it `dumps` times while it works, the last time to death, and restores it. `moves` is asked in between; it sees
    /// to it that the program goes on.
    pub fn carry(&mut self, dumps: u32, options: &[&str], mut moves: impl FnMut()) {
        let images = self.folder.join("images");
        let mut running = options.to_vec();
        running.push("-R");
        for _ in 1..dumps {
            if let Err(e) = Engine::ours().dump(self.pid, &images, &running) {
                panic!("{e}");
            }
            moves();
        }
        self.dump(options);
        self.restore_restless(options);
        moves();
    }

    /// The number in its file `count`, which it writes anew all the time; a text there says what is wrong.
    pub fn count(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join("count")).unwrap_or_default();
        if text.is_empty() {
            return 0;
        }
        text.trim().parse().unwrap_or_else(|_| panic!("it found something wrong: {text}"))
    }

    /// Waits until its count has grown.
    pub fn moves(&self, by: u64) {
        let before = self.count();
        eventually("its count", || {
            let states = || self.tree.iter().map(|p| process::describe(*p)).collect::<String>();
            assert!(process::alive(self.pid), "it is dead:\n{}", states());
            self.count() >= before + by
        });
    }

    /// It is to end by itself now.
    pub fn gone(&mut self) {
        for pid in process::tree(self.pid) {
            if !self.tree.contains(&pid) {
                self.tree.push(pid);
            }
        }
        if let Err(left) = process::wait_gone(&self.tree, LIMIT) {
            panic!("{left:?} do not end:\n{}", left.iter().map(|p| process::describe(*p)).collect::<String>());
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        process::clean_up(self.pid, &mut self.tree, &self.folder);
    }
}

/// Starts the engine, and kills it after a part of the time that it took when it was not killed.
fn killed(command: &mut Command, takes: &mut Duration, turn: u32) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let began = Instant::now();
    let mut engine = command.spawn().unwrap_or_else(|e| panic!("{e}"));
    // parts that lie apart from each other, and another first one each time
    let part = (u64::from(turn) * 618 + u64::from(engine.id()) * 7919) % 1000;
    std::thread::sleep(*takes * u32::try_from(part).unwrap_or(0) / 1000);
    let ended = engine.try_wait().ok().flatten().is_some();
    let _ = engine.kill();
    let _ = engine.wait();
    if ended {
        *takes = began.elapsed();
    } else {
        // it may take longer than was thought
        *takes = *takes * 11 / 10;
    }
}

/// A folder for a program.
pub fn folder(name: &str) -> PathBuf {
    let folder = process::scratch(name);
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    folder
}

/// Where a program is, or a test that is skipped.
pub fn program(name: &str) -> Option<PathBuf> {
    let folders = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/bin"];
    let found = folders.iter().map(|f| Path::new(f).join(name)).find(|p| p.is_file());
    if found.is_none() {
        skip(name, "it is not installed (tests/run installs it)");
    }
    found
}

/// A port that nobody listens at.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
    listener.local_addr().unwrap_or_else(|e| panic!("{e}")).port()
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    assert!(process::within(LIMIT, &mut holds), "{what}: not in time");
}
