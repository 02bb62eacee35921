//! Cgroups: the modes of `--manage-cgroups`, other roots, properties, failures that leave nothing, freezer cgroups.
//!
//! Groups are in named hierarchies, which need no controllers; freezers in the machine's own, if it has one.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use standstill_tests::cgroup::{group_of, Hierarchy};
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

/// Hierarchies come and go; who mounts one while another goes would have to wait for it.
static ALONE: Mutex<()> = Mutex::new(());

const GROUPS: [&str; 3] = ["a", "a/b", "a/empty"];

/// The guest `cgroup`, dumped. `NAME` in options stands for its hierarchy.
struct Dumped {
    run: Run,
    name: String,
    hierarchy: Hierarchy,
    images: std::path::PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Dumped {
    fn new(options: &[&str]) -> Dumped {
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut run = Run::start("cgroup");
        let name = format!("name=standstill-guest-{}", run.pid);
        let hierarchy = Hierarchy::mount(&name).unwrap_or_else(|e| panic!("{e}"));
        let images = run.images("images");
        let options: Vec<String> = options.iter().map(|o| o.replace("NAME", &name)).collect();
        run.dump_with(&Engine::ours(), &images, &options.iter().map(String::as_str).collect::<Vec<_>>());
        Dumped { run, name, hierarchy, images, _alone: alone }
    }

    fn remove(&self) {
        self.hierarchy.clear(&GROUPS);
        assert!(!self.hierarchy.path("a").exists());
    }

    fn restore(&self, options: &[&str]) -> Result<String, standstill_tests::engine::Failure> {
        Engine::ours().restore(&self.images, options)
    }

    fn fails(&self, options: &[&str], word: &str) {
        match self.restore(options) {
            Ok(_) => panic!("{options:?}: it was restored"),
            Err(e) => assert!(e.text.contains(word), "{options:?}: nothing about {word:?} in {e}"),
        }
        assert!(self.run.tree.iter().all(|&pid| !process::exists(pid)), "half of it is left");
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.hierarchy.path(path)).unwrap_or_else(|e| panic!("{path}: {e}")).trim().to_owned()
    }

    fn check(self) {
        let Dumped { mut run, hierarchy, _alone: alone, .. } = self;
        // the guest waits for the end of its hierarchy, which a mount would put off
        drop(hierarchy);
        run.check(How::Restored);
        drop(alone);
    }
}

#[test]
fn groups_that_are_gone_are_made_again() {
    for options in [&[][..], &["--manage-cgroups"], &["--manage-cgroups=full"], &["--manage-cgroups=strict"]] {
        // groups of other hierarchies are there
        let dumped = Dumped::new(&["--cgroup-dump-controller", "NAME"]);
        dumped.remove();
        if let Err(e) = dumped.restore(options) {
            panic!("{options:?}: {e}");
        }
        dumped.check();
    }
}

#[test]
fn groups_must_be_there_for_these() {
    for mode in ["--manage-cgroups=none", "--manage-cgroups=props"] {
        let dumped = Dumped::new(&[]);
        dumped.remove();
        dumped.fails(&[mode], "doesn't exist");
        assert!(!dumped.hierarchy.path("a").exists());
        dumped.restore(&[]).unwrap_or_else(|e| panic!("{e}"));
        dumped.check();
    }
}

#[test]
fn groups_must_not_be_there_for_strict() {
    let dumped = Dumped::new(&[]);
    dumped.fails(&["--manage-cgroups=strict"], "Abort restore of existing cgroups");
    assert_eq!(dumped.read("a/notify_on_release"), "1");
    dumped.restore(&["--manage-cgroups=none"]).unwrap_or_else(|e| panic!("{e}"));
    dumped.check();
}

#[test]
fn settings_of_groups_that_are_there() {
    for (mode, kept) in [("none", true), ("soft", true), ("props", false), ("full", false)] {
        let dumped = Dumped::new(&[]);
        fs::write(dumped.hierarchy.path("a/notify_on_release"), "0").unwrap_or_else(|e| panic!("{e}"));
        dumped.restore(&[&format!("--manage-cgroups={mode}")]).unwrap_or_else(|e| panic!("{mode}: {e}"));
        assert_eq!(dumped.read("a/notify_on_release"), if kept { "0" } else { "1" }, "{mode}");
        fs::write(dumped.hierarchy.path("a/notify_on_release"), "1").unwrap_or_else(|e| panic!("{e}"));
        dumped.check();
    }
}

#[test]
fn ignored() {
    let dumped = Dumped::new(&[]);
    dumped.remove();
    dumped.restore(&["--manage-cgroups=ignore"]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(group_of(dumped.run.pid, &dumped.name), Some("/".into()));
    assert!(!dumped.hierarchy.path("a").exists());
    process::end(&dumped.run.tree);
}

#[test]
fn another_root() {
    let dumped = Dumped::new(&[]);
    dumped.remove();
    let root = format!("{}:/other/place", dumped.name);
    dumped.restore(&["--cgroup-root", &root]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(group_of(dumped.run.pid, &dumped.name), Some("/other/place".into()));
    let child = process::children(dumped.run.pid)[0];
    assert_eq!(group_of(child, &dumped.name), Some("/other/place/b".into()));
    assert!(dumped.hierarchy.path("other/place/empty").exists() && !dumped.hierarchy.path("a").exists());
    process::end(&[child, dumped.run.pid]);
    dumped.hierarchy.clear(&["other", "other/place", "other/place/b", "other/place/empty"]);
}

#[test]
fn a_failed_restore_removes_what_it_made() {
    let dumped = Dumped::new(&[]);
    dumped.remove();
    let (files, away) = (dumped.run.folder.join("files"), dumped.run.folder.join("away"));
    fs::rename(&files, &away).unwrap_or_else(|e| panic!("{e}"));
    dumped.fails(&[], "No such file");
    assert!(!dumped.hierarchy.path("a").exists(), "its groups are left");
    fs::rename(&away, &files).unwrap_or_else(|e| panic!("{e}"));
    dumped.restore(&[]).unwrap_or_else(|e| panic!("{e}"));
    dumped.check();
}

#[test]
fn only_what_is_asked_for() {
    let dumped = Dumped::new(&["--cgroup-dump-controller", "cpu"]);
    dumped.remove();
    dumped.restore(&[]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(group_of(dumped.run.pid, &dumped.name), Some("/".into()));
    assert!(!dumped.hierarchy.path("a").exists());
    process::end(&dumped.run.tree);
}

#[test]
fn properties_that_cannot_be_read_are_an_error() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut run = Run::start("eventfd");
    let images = run.images("images");
    for (props, word) in [("cpu", "controller name"), ("\"cpu\":\n - \"strategy\": \"odd\"", "odd")] {
        match Engine::ours().dump(run.pid, &images, &["--cgroup-props", props]) {
            Ok(_) => panic!("{props}: it was dumped"),
            Err(e) => assert!(e.text.contains(word), "{e}"),
        }
    }
    run.check(How::Running);
}

/// A freezer cgroup with a guest in it, of either version.
struct Cold {
    run: Run,
    hierarchy: Hierarchy,
    group: String,
    /// The file that freezes it, and the words for that.
    file: &'static str,
    words: [&'static str; 2],
    _alone: MutexGuard<'static, ()>,
}

impl Cold {
    fn all(test: &str, guest: &str, mut check: impl FnMut(&mut Cold)) {
        for (name, file, words) in
            [("freezer", "freezer.state", ["THAWED", "FROZEN"]), ("", "cgroup.freeze", ["0", "1"])]
        {
            let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let hierarchy = match Hierarchy::mount(name) {
                Ok(hierarchy) => hierarchy,
                Err(e) => {
                    skip(test, &format!("no hierarchy {name:?} here: {e}"));
                    continue;
                }
            };
            let run = Run::start(guest);
            let group = format!("standstill-test-{}", run.pid);
            hierarchy.make(&group).unwrap_or_else(|e| panic!("{e}"));
            for &pid in &run.tree {
                hierarchy.enter(&group, pid).unwrap_or_else(|e| panic!("{e}"));
            }
            let mut cold = Cold { run, hierarchy, group, file, words, _alone: alone };
            check(&mut cold);
        }
    }

    /// Where the engine finds it: it has no mount that others see.
    fn path(&self) -> String {
        let own = self.hierarchy.path(&self.group).display().to_string();
        own.replace("/proc/self/", &format!("/proc/{}/", std::process::id()))
    }

    fn state(&self) -> String {
        let path = self.hierarchy.path(&format!("{}/{}", self.group, self.file));
        fs::read_to_string(path).unwrap_or_default().trim().to_owned()
    }

    fn set(&self, frozen: bool) {
        let path = self.hierarchy.path(&format!("{}/{}", self.group, self.file));
        fs::write(path, self.words[usize::from(frozen)]).unwrap_or_else(|e| panic!("{e}"));
    }

    fn is(&self, frozen: bool) -> bool {
        let began = Instant::now();
        while self.state() != self.words[usize::from(frozen)] {
            if began.elapsed() > Duration::from_secs(5) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        self.set(false);
        process::end(&self.run.tree);
        self.hierarchy.clear(&[&self.group]);
    }
}

#[test]
fn a_freezer_stops_the_tree() {
    Cold::all("a_freezer_stops_the_tree", "tree", |cold| {
        let images = cold.run.images("images");
        let path = cold.path();
        for _ in 0..3 {
            if let Err(e) = Engine::ours().dump(cold.run.pid, &images, &["-R", "--freeze-cgroup", &path]) {
                panic!("{e}");
            }
            assert!(cold.is(false), "it is {}", cold.state());
        }
        cold.run.check(How::Running);
    });
}

#[test]
fn a_frozen_tree_stays_frozen() {
    Cold::all("a_frozen_tree_stays_frozen", "tree", |cold| {
        let images = cold.run.images("images");
        let path = cold.path();
        cold.set(true);
        assert!(cold.is(true));
        if let Err(e) = Engine::ours().dump(cold.run.pid, &images, &["-R", "--freeze-cgroup", &path]) {
            panic!("{e}");
        }
        assert!(cold.is(true), "it is {}", cold.state());
        cold.set(false);
        cold.run.check(How::Running);
    });
}

#[test]
fn a_freezer_that_has_the_engine_is_refused() {
    Cold::all("a_freezer_that_has_the_engine_is_refused", "eventfd", |cold| {
        let images = cold.run.images("images");
        fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        let (path, pid) = (cold.path(), cold.run.pid.to_string());
        match Engine::ours().dump(cold.run.pid, &images, &["-R", "--freeze-cgroup", "/proc"]) {
            Ok(_) => panic!("it was dumped"),
            Err(e) => assert!(e.text.contains("Neither"), "{e}"),
        }
        let dump = Engine::ours().command("dump", &images, &["-R", "-t", &pid, "--freeze-cgroup", &path]);
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("echo $$ > {path}/cgroup.procs && exec \"$@\""), "sh"]);
        shell.arg(dump.get_program()).args(dump.get_args());
        let output = process::run(&mut shell, Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(1), "{}", output.text);
        assert!(output.text.contains("within the freezer cgroup"), "{}", output.text);
        assert!(cold.is(false), "it is {}", cold.state());
        cold.run.check(How::Running);
    });
}

/// The engine is killed at each of its writes and of its requests to ptrace: nobody stays frozen, nobody is harmed.
#[test]
fn a_killed_engine_leaves_nobody_frozen() {
    let test = "a_killed_engine_leaves_nobody_frozen";
    let tried = Command::new("strace").args(["-e", "trace=none", "true"]).stderr(Stdio::null()).status();
    if !tried.is_ok_and(|s| s.success()) {
        skip(test, "strace cannot trace here");
        return;
    }
    Cold::all(test, "threads", |cold| {
        let images = cold.run.images("images");
        fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        let (path, pid) = (cold.path(), cold.run.pid.to_string());
        let options = ["-R", "-t", &pid, "--freeze-cgroup", &path];
        let dump = Engine::ours().command("dump", &images, &options);
        let mut kills = 0;
        for calls in ["write", "ptrace", "lseek,read"] {
            let mut n = 0;
            let most = if calls == "ptrace" { 30 } else { 20 };
            while n < most {
                n += 1;
                if !killed_at(calls, n, &dump, &cold.run.folder.join("strace")) {
                    break;
                }
                kills += 1;
                assert!(cold.is(false), "killed at {calls} {n}: it is {}", cold.state());
                assert!(process::alive(cold.run.pid), "killed at {calls} {n}: the guest is dead");
            }
        }
        assert!(kills > 30, "only {kills} kills");
        cold.run.check(How::Running);
    });
}

/// Runs the engine under strace; it is killed at its `n`th such call, and true says that it was.
fn killed_at(calls: &str, n: u32, engine: &Command, trace: &Path) -> bool {
    let mut command = Command::new("strace");
    command.args(["-f", "-q", "-b", "execve", "-e", &format!("trace={calls}")]);
    command.args(["-e", &format!("inject={calls}:signal=KILL:when={n}"), "-o"]);
    command.arg(trace).arg(engine.get_program()).args(engine.get_args());
    let output = process::run(&mut command, Duration::from_secs(60)).unwrap_or_else(|e| panic!("strace: {e}"));
    match output.code {
        Some(0) => false,
        Some(137) => true,
        other => panic!("{calls} {n}: the engine ended with {other:?}:\n{}", output.text),
    }
}
