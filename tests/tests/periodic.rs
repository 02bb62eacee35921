//! `dump --every`: a training loop is dumped again and again, dies, and goes on from the last whole checkpoint; so does one
//! whose engine died in the middle of a dump.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::process::{self, within};
use standstill_tests::skip::skip;

const LIMIT: Duration = Duration::from_secs(60);

struct Training {
    folder: PathBuf,
    pid: i32,
    known: Vec<i32>,
}

/// The one that Debian's packages, numpy among them, are for.
fn interpreter() -> &'static str {
    let debian = "/usr/bin/python3";
    if Path::new(debian).exists() {
        debian
    } else {
        "python3"
    }
}

fn python(folder: &Path, more: &[&str]) -> Command {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/train.py");
    let mut command = Command::new(interpreter());
    command.arg(program).arg(folder).args(more).env("OPENBLAS_NUM_THREADS", "2").env("PYTHONDONTWRITEBYTECODE", "1");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

impl Training {
    fn start(test: &str) -> Option<Training> {
        process::adopt();
        if Command::new(interpreter()).arg("--version").output().is_err() {
            skip(test, "there is no python3 here");
            return None;
        }
        let folder = process::scratch(test);
        for sub in ["files", "images", "reference"] {
            std::fs::create_dir_all(folder.join(sub)).unwrap_or_else(|e| panic!("{e}"));
        }
        let mut command = python(&folder.join("files"), &[]);
        // SAFETY: setsid(2) takes nothing, and is safe behind a fork.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        #[allow(clippy::zombie_processes)]
        let child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let training = Training { folder, pid, known: vec![pid] };
        training.goes_on();
        Some(training)
    }

    fn steps(&self) -> u64 {
        std::fs::metadata(self.folder.join("files/steps")).map_or(0, |m| m.len())
    }

    fn goes_on(&self) {
        let before = self.steps();
        let on = within(LIMIT, || self.steps() != before && self.steps() > 2);
        assert!(on, "it does not go on: {}", process::describe(self.pid));
    }

    fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    fn series(&self, more: &[&str]) -> Child {
        let pid = self.pid.to_string();
        let mut command = Engine::ours().command("dump", &self.images(), &["-t", &pid]);
        command.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap_or_else(|e| panic!("{e}"))
    }

    /// The numbers of the folders, and whether each has an inventory with something in it.
    fn checkpoints(&self) -> Vec<(u32, bool)> {
        let entries = std::fs::read_dir(self.images()).into_iter().flatten().flatten();
        let one = |e: std::fs::DirEntry| {
            let whole = std::fs::metadata(e.path().join("inventory.img")).is_ok_and(|m| m.len() > 0);
            Some((e.file_name().to_str()?.parse().ok()?, whole))
        };
        let mut all: Vec<(u32, bool)> = entries.filter_map(one).collect();
        all.sort_unstable();
        all
    }

    fn last_whole(&self) -> u32 {
        self.checkpoints().iter().filter(|(_, whole)| *whole).map(|(n, _)| *n).max().unwrap_or(0)
    }

    fn kill(&mut self) {
        self.known.extend(process::tree(self.pid));
        process::end(&self.known);
    }

    fn restore(&mut self) {
        let output = Engine::ours().restore(&self.images(), &[]);
        output.unwrap_or_else(|e| panic!("{e}"));
        self.goes_on();
    }

    /// It has learned what it would have, had nobody touched it.
    fn check(&self) {
        std::fs::write(self.folder.join("files/check"), "").unwrap_or_else(|e| panic!("{e}"));
        let losses = self.folder.join("files/losses");
        assert!(within(LIMIT, || losses.exists()), "no losses: {}", process::describe(self.pid));
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{e}"));
        let losses = read(&losses);
        let steps = (losses.lines().count() - 1).to_string();
        let reference = self.folder.join("reference");
        let output = process::run(&mut python(&reference, &[&steps]), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(0), "{}", output.text);
        assert!(losses.lines().count() > 4);
        assert_eq!(losses, read(&reference.join("losses")), "other losses");
        if losses.starts_with("python") {
            eprintln!("without numpy");
        }
    }
}

impl Drop for Training {
    fn drop(&mut self) {
        process::clean_up(self.pid, &mut self.known, &self.folder);
    }
}

fn end(mut engine: Child) {
    let _ = engine.kill();
    engine.wait().unwrap_or_else(|e| panic!("{e}"));
}

/// A series with these options; the program is killed, and goes on from the last.
fn series(test: &str, more: &[&str], most: usize) {
    let Some(mut training) = Training::start(test) else { return };
    let mut engine = training.series(&[&["--every", "50ms", "--keep", "2"], more].concat());
    assert!(within(LIMIT, || training.last_whole() >= 6), "no series: {:?}", training.checkpoints());
    let all = training.checkpoints();
    assert!(all.len() <= most, "more than are to be kept: {all:?}");
    training.kill();
    // it ends with the tree, and all is well
    let mut code = None;
    let ended = within(LIMIT, || {
        code = engine.try_wait().unwrap_or_else(|e| panic!("{e}"));
        code.is_some()
    });
    assert!(ended, "the series goes on without a tree");
    assert!(code.is_some_and(|c| c.success()), "{code:?}");
    let all = training.checkpoints();
    assert!(all.iter().all(|(_, whole)| *whole) && all.len() <= most, "{all:?}");
    training.restore();
    training.check();
}

#[test]
fn whole_dumps() {
    // one more while it is being made
    series("whole_dumps", &[], 3);
}

#[test]
fn chains() {
    series("chains", &["--track-mem"], 5);
}

/// Engines that are killed at moments all over a series: there is always a whole checkpoint, half a one is never taken, and
/// the next series removes it.
#[test]
fn killed_series() {
    let Some(mut training) = Training::start("killed_series") else { return };
    let engine = training.series(&["--every", "1h"]);
    assert!(within(LIMIT, || training.last_whole() >= 1), "no checkpoint");
    end(engine);
    let mut halves = 0;
    let mut n = 0u64;
    // how often a dump is met depends on what else the machine does
    while n < 16 || halves == 0 && n < 200 {
        let last = training.last_whole();
        let engine = training.series(&["--every", "20ms", "--track-mem"]);
        std::thread::sleep(Duration::from_millis(10 + n * 7 % 112));
        end(engine);
        n += 1;
        training.goes_on();
        assert!(training.last_whole() >= last, "the last whole checkpoint is gone: {:?}", training.checkpoints());
        halves += usize::from(training.checkpoints().iter().any(|(_, whole)| !whole));
    }
    assert!(halves > 0, "no engine was killed in a dump");
    training.kill();
    training.restore();
    let engine = training.series(&["--every", "1h"]);
    let before = training.last_whole();
    assert!(within(LIMIT, || training.last_whole() > before), "no checkpoint");
    end(engine);
    let all = training.checkpoints();
    assert!(all.iter().all(|(_, whole)| *whole), "{all:?}");
    training.check();
}

#[test]
fn what_makes_no_sense() {
    let Some(training) = Training::start("what_makes_no_sense") else { return };
    let pid = training.pid.to_string();
    let cases = [
        (&["--every", "0"][..], "every"),
        (&["--every", "soon"], "every"),
        (&["--every", "1s", "--keep", "0"], "keep"),
        (&["--every", "1s", "-s"], "leave out --leave-stopped"),
        (&["--every", "1s", "--prev-images-dir", "x"], "makes its own chains"),
    ];
    for (options, word) in cases {
        let mut command = Engine::ours().command("dump", &training.images(), &["-t", &pid]);
        let output = process::run(command.args(options), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(1), "{options:?}: {}", output.text);
        assert!(output.text.contains(word), "{options:?}: {}", output.text);
    }
    assert!(training.checkpoints().is_empty());
    // a folder without a whole checkpoint is none
    std::fs::create_dir(training.images().join("000001")).unwrap_or_else(|e| panic!("{e}"));
    let failed = Engine::ours().restore(&training.images(), &[]);
    assert!(failed.is_err_and(|e| e.text.contains("inventory")), "it restored something");
    training.check();
}
