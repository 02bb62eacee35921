//! A guest under test, and what is done to each of them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::compare;
use crate::engine::{programs, Engine};
use crate::guests::support::How;
use crate::guests::{self, Criu, Guest};
use crate::process::{self, Patience};
use crate::skip::skip;

/// How long a guest may take to get ready, and to check itself.
const LIMIT: Duration = Duration::from_secs(60);
const CAP_SYS_RESOURCE: u32 = 24;

static IDS: Mutex<()> = Mutex::new(());

/// A guest that runs. When this goes away, so does the guest, and unless the test failed its folder too.
#[derive(Debug)]
pub struct Run {
    guest: &'static Guest,
    /// Held by guests with System V shared memory, terminals or cgroups, of whose numbers there is one set: one that a dumped guest
    /// is to get back must not be given to another meanwhile. By guests with timeouts of rings, too, and those that cannot be
    /// told from such ones.
    _ids: Option<MutexGuard<'static, ()>>,
    /// Its files, and the images of it.
    pub folder: PathBuf,
    /// Its first process.
    pub pid: i32,
    /// All of its processes, as they were when it was last looked at.
    pub tree: Vec<i32>,
    /// How many of them lived before the last dump.
    lived: usize,
}

impl Run {
    /// Starts a guest, and waits until its state stands.
    pub fn start(name: &str) -> Run {
        process::adopt();
        let ids = ["sysv", "tty", "cgroup", "io_uring_counts", "refused_io_uring_timeout"]
            .iter()
            .any(|kind| name.starts_with(kind))
            .then(|| IDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        let Some(guest) = guests::find(name) else { panic!("there is no guest {name}") };
        if guest.alone_in_network {
            process::private_network();
        }
        let folder = process::scratch(name);
        let files = folder.join("files");
        std::fs::create_dir_all(&files).unwrap_or_else(|e| panic!("{}: {e}", files.display()));
        let mut command = Command::new(programs().join("guest"));
        command.arg(name).arg(&files);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // waited for where all that we adopt is
        #[allow(clippy::zombie_processes)]
        let pid = if guest.namespaces != 0 {
            process::spawn_in_namespaces(&mut command, guest.namespaces)
        } else {
            command.spawn().map(|child| i32::try_from(child.id()).unwrap_or(0))
        };
        let pid = pid.unwrap_or_else(|e| panic!("starting the guest: {e}"));
        let mut run = Run { guest, _ids: ids, folder, pid, tree: vec![pid], lived: 1 };
        let mut patience = Patience::of(LIMIT);
        while !run.file("ready").exists() {
            if let Ok(why) = std::fs::read_to_string(run.file("result")) {
                panic!("{name} could not build its state: {why}");
            }
            assert!(process::alive(pid), "{name} ended before it was ready");
            assert!(!patience.over(), "{name} was not ready in time");
            std::thread::sleep(Duration::from_millis(1));
        }
        run.look();
        run
    }

    /// One of the guest's own files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join("files").join(name)
    }

    /// Whether it is the guest of this name.
    pub fn is(&self, name: &str) -> bool {
        self.guest.name == name
    }

    /// What its dump, and its restore, must be told.
    pub fn options(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (self.guest.dump, self.guest.restore)
    }

    /// A folder for images.
    pub fn images(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Learns which processes there are.
    pub fn look(&mut self) {
        self.tree = process::tree(self.pid);
        self.lived = self.tree.iter().filter(|pid| process::alive(**pid)).count();
    }

    /// Dumps the guest, which goes on.
    pub fn dump_running(&self, engine: &Engine, images: &Path) {
        let mut options = self.guest.dump.to_vec();
        options.push("-R");
        if let Err(e) = engine.dump(self.pid, images, &options) {
            panic!("{e}");
        }
    }

    /// Dumps the guest, which is dead then.
    pub fn dump(&mut self, engine: &Engine, images: &Path) {
        self.dump_with(engine, images, &[]);
    }

    /// Dumps the guest with more options, and it is dead then.
    pub fn dump_with(&mut self, engine: &Engine, images: &Path, more: &[&str]) {
        self.look();
        let options = [self.guest.dump, more].concat();
        if let Err(e) = engine.dump(self.pid, images, &options) {
            panic!("{e}");
        }
        self.is_dumped(images);
    }

    /// Waits until the guest is dead, of which `images` are.
    pub fn is_dumped(&mut self, images: &Path) {
        if let Err(left) = process::wait_gone(&self.tree, LIMIT) {
            let texts: Vec<String> = left.iter().map(|p| process::describe(*p)).collect();
            panic!("after the dump {left:?} are still there:\n{}", texts.concat());
        }
        // who was made after we looked, and who ended before the dump
        process::reap_session(self.pid);
        self.tree.retain(|pid| images.join(format!("core-{pid}.img")).exists());
    }

    /// Kills the guest, of which `images` are.
    pub fn kill(&mut self, images: &Path) {
        // whoever is stopped makes no children
        let mut before = 0;
        self.look();
        while self.tree.len() != before {
            before = self.tree.len();
            for &pid in &self.tree {
                process::signal(pid, libc::SIGSTOP);
            }
            std::thread::sleep(Duration::from_millis(2));
            self.look();
        }
        for &pid in &self.tree {
            process::signal(pid, libc::SIGKILL);
        }
        self.is_dumped(images);
    }

    /// Restores the guest.
    pub fn restore(&mut self, engine: &Engine, images: &Path) {
        self.restore_with(engine, images, &[]);
    }

    /// Restores the guest with more options.
    pub fn restore_with(&mut self, engine: &Engine, images: &Path, more: &[&str]) {
        let pidfile = self.folder.join("pidfile");
        let _ = std::fs::remove_file(&pidfile);
        let mut options = [self.guest.restore, more].concat();
        let path = pidfile.to_string_lossy();
        if self.guest.has_own_ids() {
            options.extend(["--pidfile", &path]);
        }
        if let Err(e) = engine.restore(images, &options) {
            // what is half made must not be left behind
            let left: Vec<i32> = self.tree.iter().copied().filter(|&p| process::exists(p)).collect();
            panic!("{e}left behind: {left:?}");
        }
        if self.guest.has_own_ids() {
            // what its ids are with us is new
            let text = std::fs::read_to_string(&pidfile).unwrap_or_else(|e| panic!("{path}: {e}"));
            self.pid = text.trim().parse().unwrap_or_else(|e| panic!("{path}: {e}"));
            self.tree = process::tree(self.pid);
            let live = self.tree.iter().filter(|pid| process::alive(**pid)).count();
            assert!(live == self.lived || self.guest.restless, "{live} processes live, {} did", self.lived);
            return;
        }
        if !process::alive(self.pid) && !self.file("result").exists() {
            let status = process::reap(self.pid);
            panic!("the restored process {} is not there (status {status:?})", self.pid);
        }
        let now = process::tree(self.pid);
        let lacks = |p: &i32| !self.guest.restless && !now.contains(p);
        let lacking: Vec<i32> = self.tree.iter().copied().filter(lacks).collect();
        assert!(lacking.is_empty(), "processes {lacking:?} were not restored");
    }

    /// Has the guest check itself, which ends it.
    pub fn check(&mut self, how: How) {
        self.look();
        let word = match how {
            How::Running => "running",
            How::Restored => "restored",
        };
        let (new, check) = (self.file("check.new"), self.file("check"));
        let done = std::fs::write(&new, word).and_then(|()| std::fs::rename(&new, &check));
        done.unwrap_or_else(|e| panic!("{}: {e}", check.display()));
        let mut patience = Patience::of(LIMIT);
        let mut ended = None;
        let result = loop {
            if let Ok(result) = std::fs::read_to_string(self.file("result")) {
                break result;
            }
            if let Some(status) = ended {
                panic!("{} ended with status {status:#x} and no result", self.guest.name);
            }
            ended = process::reap(self.pid);
            if patience.over() {
                let texts: Vec<String> = self.tree.iter().map(|p| process::describe(*p)).collect();
                panic!("{} did not check itself in time:\n{}", self.guest.name, texts.concat());
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(result, "ok", "{}", self.guest.name);
        match process::wait_gone(&self.tree, LIMIT) {
            Ok(status) => assert_eq!(status.or(ended).unwrap_or(0), 0, "{} ended badly", self.guest.name),
            Err(left) => panic!("{} is done, {left:?} are still there", self.guest.name),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        process::clean_up(self.pid, &mut self.tree, &self.folder);
    }
}

/// Dumps that leave the guest running: it never hears of them.
pub fn running(name: &str) {
    let mut run = Run::start(name);
    let engine = Engine::ours();
    for n in 0..run.guest.dumps {
        let images = run.images(&format!("images-{n}"));
        run.dump_running(&engine, &images);
    }
    run.check(How::Running);
}

/// Dump, death, restore, check.
pub fn restored(name: &str) {
    let mut run = Run::start(name);
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &images);
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// Dump, restore, dump: the two checkpoints say the same; and the second one restores too.
pub fn twice(name: &str) {
    let mut run = Run::start(name);
    let (engine, first, second) = (Engine::ours(), run.images("first"), run.images("second"));
    run.dump(&engine, &first);
    run.restore(&engine, &first);
    run.dump(&engine, &second);
    run.restore(&engine, &second);
    run.check(How::Restored);
    if let Some(why) = run.guest.changes {
        eprintln!("the two checkpoints of {name} are not compared: {why}");
        return;
    }
    let differences = compare::checkpoints(&first, &second);
    assert!(differences.is_empty(), "the checkpoints differ:\n{}", differences.join("\n"));
}

/// Our images, restored by CRIU.
pub fn to_criu(name: &str) {
    let Some(criu) = criu_for(name, "to_criu", false) else { return };
    let mut run = Run::start(name);
    let images = run.images("images");
    run.dump(&Engine::ours(), &images);
    run.restore(&criu, &images);
    run.check(How::Restored);
}

/// CRIU's images, restored by us.
pub fn from_criu(name: &str) {
    let Some(criu) = criu_for(name, "from_criu", true) else { return };
    let mut run = Run::start(name);
    let images = run.images("images");
    run.dump(&criu, &images);
    run.restore(&Engine::ours(), &images);
    run.check(How::Restored);
}

/// A guest that cannot be carried: the refusal names what it must, and the guest goes on.
pub fn refused(name: &str) {
    let mut run = Run::start(name);
    let images = run.images("images");
    let engine = Engine::ours();
    for _ in 0..3 {
        match engine.dump(run.pid, &images, run.guest.dump) {
            Ok(_) => panic!("{name} was dumped"),
            Err(e) => {
                assert_eq!(e.code, Some(1), "{e}");
                let texts: Vec<&str> = e.text.lines().filter(|l| l.contains("Error")).collect();
                for word in run.guest.refused {
                    assert!(texts.iter().any(|t| t.contains(word)), "nothing about {word:?} in:\n{e}");
                }
            }
        }
        assert!(!images.join("inventory.img").exists(), "a refused dump left an inventory");
    }
    run.check(How::Running);
}

fn has_sys_resource() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap_or("0").trim();
    u64::from_str_radix(set, 16).unwrap_or(0) & (1 << CAP_SYS_RESOURCE) != 0
}

/// CRIU, if there is one and it can carry this guest.
fn criu_for(name: &str, test: &str, dumps: bool) -> Option<Engine> {
    let Some(guest) = guests::find(name) else { panic!("there is no guest {name}") };
    let why = match guest.criu {
        Criu::Cannot(why) => Some(why),
        Criu::RestoresOnly(why) if dumps => Some(why),
        Criu::DumpsOnly(why) if !dumps => Some(why),
        Criu::WithSysResource(why) if !has_sys_resource() => Some(why),
        Criu::Carries | Criu::WithSysResource(_) | Criu::RestoresOnly(_) | Criu::DumpsOnly(_) => None,
    };
    let found = match why {
        Some(why) => Err(why.to_owned()),
        None => Engine::criu(),
    };
    found.inspect_err(|why| skip(&format!("{name}::{test}"), why)).ok()
}
