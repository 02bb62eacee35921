//! Chains of checkpoints: pre-dumps, a dump on top of them, and what holds the tracking of memory in between.
//!
//! $STANDSTILL_PASSES says how many pre-dumps a chain has (5).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

/// One command; its log, or a panic.
fn command(engine: &Engine, verb: &str, images: &Path, options: &[&str]) -> String {
    fs::create_dir_all(images).unwrap_or_else(|e| panic!("{e}"));
    let output = process::run(&mut engine.command(verb, images, options), Duration::from_secs(60));
    let output = output.unwrap_or_else(|e| panic!("{verb}: {e}"));
    let log = fs::read_to_string(images.join(format!("{verb}.log"))).unwrap_or_default();
    assert_eq!(output.code, Some(0), "{verb}:\n{log}\n{}", output.text);
    log
}

/// Whether this kernel can tell which pages were written.
fn can_track(test: &str) -> bool {
    let output =
        std::process::Command::new(Engine::ours().path()).args(["check", "--feature", "mem_dirty_track"]).output();
    let can = output.is_ok_and(|o| o.status.success());
    if !can {
        skip(test, "this kernel tracks no memory");
    }
    can
}

fn passes() -> u32 {
    std::env::var("STANDSTILL_PASSES").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// A guest, and the chain of its checkpoints.
struct Chain {
    run: Run,
    engine: Engine,
    last: Option<PathBuf>,
    count: u32,
}

impl Chain {
    fn of(guest: &str) -> Chain {
        Chain { run: Run::start(guest), engine: Engine::ours(), last: None, count: 0 }
    }

    /// Adds a checkpoint to the chain.
    fn add(&mut self, verb: &str, options: &[&str]) -> String {
        self.count += 1;
        let images = self.run.images(&format!("{}", self.count));
        let pid = self.run.pid.to_string();
        let mut all = vec!["-t", &pid];
        let parent;
        if let Some(last) = &self.last {
            parent = format!("../{}", last.file_name().and_then(|n| n.to_str()).unwrap_or(""));
            all.extend(["--prev-images-dir", &parent]);
        }
        all.extend(options);
        let log = command(&self.engine, verb, &images, &all);
        self.last = Some(images);
        log
    }

    /// The program writes for a while.
    fn wait(&self) {
        std::thread::sleep(Duration::from_millis(40));
    }

    /// The dump on top; the program is dead then.
    fn dump(&mut self, options: &[&str]) -> String {
        self.run.look();
        let log = self.add("dump", options);
        let images = self.last.clone().unwrap_or_default();
        self.run.is_dumped(&images);
        log
    }

    /// The program is dead, and was not dumped for that.
    fn kill(&mut self) {
        let images = self.last.clone().unwrap_or_default();
        self.run.kill(&images);
    }

    fn restore(&mut self, engine: &Engine) {
        let images = self.last.clone().unwrap_or_default();
        self.run.restore(engine, &images);
        self.run.check(How::Restored);
    }
}

/// How many pages a checkpoint has, and how many its parents have.
fn pages(images: &Path) -> (u64, u64) {
    let bytes = fs::read(images.join("stats-dump")).unwrap_or_else(|e| panic!("{e}"));
    let style = standstill_images::json::Style { pretty: false, payload: false };
    let value = standstill_images::json::decode("stats-dump", &bytes, style).unwrap_or_else(|e| panic!("{e}"));
    let dump = &value["entries"][0]["dump"];
    let number = |name: &str| dump[name].as_u64().unwrap_or_else(|| panic!("{name} in {dump}"));
    (number("pages_written"), number("pages_skipped_parent"))
}

/// The processes that hold the tracking of a program.
fn holders() -> Vec<i32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse().ok());
    let ours = |pid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "standstill-mem" && process::alive(*pid)
    };
    pids.filter(ours).collect()
}

macro_rules! chains {
    ($($guest:ident)*) => {
        $(
            mod $guest {
                use super::*;

                /// Pre-dumps one after the other, then the dump.
                #[test]
                fn pre_dumps() {
                    if !can_track(concat!(stringify!($guest), "::pre_dumps")) { return; }
                    let mut chain = Chain::of(stringify!($guest));
                    for _ in 0..passes() {
                        chain.add("pre-dump", &[]);
                        chain.wait();
                    }
                    chain.dump(&[]);
                    chain.restore(&Engine::ours());
                }

                /// Every second one packed.
                #[test]
                fn packed() {
                    if !can_track(concat!(stringify!($guest), "::packed")) {
                        return;
                    }
                    let mut chain = Chain::of(stringify!($guest));
                    for n in 0..4 {
                        chain.add("pre-dump", if n % 2 == 0 { &["--compress"] } else { &[] });
                        chain.wait();
                    }
                    chain.dump(&["--compress"]);
                    chain.restore(&Engine::ours());
                }

                /// Whole checkpoints of a program that goes on, each of which could be the last.
                #[test]
                fn snapshots() {
                    if !can_track(concat!(stringify!($guest), "::snapshots")) { return; }
                    let mut chain = Chain::of(stringify!($guest));
                    for _ in 0..passes() {
                        chain.add("dump", &["-R", "--track-mem", "--auto-dedup"]);
                        chain.wait();
                    }
                    chain.dump(&["--track-mem"]);
                    chain.restore(&Engine::ours());
                }

                /// Snapshots with a short freeze, one after the other; the program is killed, and the last one restored.
                #[test]
                fn short() {
                    let mut chain = Chain::of(stringify!($guest));
                    for n in 0..3 {
                        chain.last = None;
                        chain.add("dump", if n == 1 { &["-R", "--snapshot", "--compress"] } else { &["-R", "--snapshot"] });
                        chain.wait();
                    }
                    chain.kill();
                    chain.restore(&Engine::ours());
                }
            }
        )*
    };
}

chains! {
    track_exec
    track_file
    track_flood
    track_forked
    track_given_back
    track_huge
    track_moved
    track_pinned
    track_stacks
    track_words
    memory_cow
    memory_shared
    memory_private
    storm
    threads
    tree
}

/// CRIU restores our chains.
mod to_criu {
    use super::*;

    fn chain(guest: &str) {
        let name = format!("to_criu::{guest}");
        if !can_track(&name) {
            return;
        }
        let criu = match Engine::criu() {
            Ok(criu) => criu,
            Err(why) => return skip(&name, &why),
        };
        let mut chain = Chain::of(guest);
        for _ in 0..3 {
            chain.add("pre-dump", &[]);
            chain.wait();
        }
        chain.dump(&[]);
        chain.restore(&criu);
    }

    #[test]
    fn words() {
        chain("track_words");
    }

    #[test]
    fn given_back() {
        chain("track_given_back");
    }

    #[test]
    fn moved() {
        chain("track_moved");
    }

    #[test]
    fn forked() {
        chain("track_forked");
    }

    #[test]
    fn of_file() {
        chain("track_file");
    }

    #[test]
    fn cow() {
        chain("memory_cow");
    }
}

/// The second pass takes what was written only; the program sees nothing of the tracking, which ends with it.
#[test]
fn what_has_not_changed_is_not_taken_again() {
    if !can_track("what_has_not_changed_is_not_taken_again") {
        return;
    }
    let mut chain = Chain::of("memory_private");
    let before = process::threads(chain.run.pid).len();
    let descriptors = || {
        let all = fs::read_dir(format!("/proc/{}/fd", chain.run.pid)).into_iter().flatten().flatten();
        let links = all.filter_map(|e| fs::read_link(e.path()).ok());
        links.map(|l| l.display().to_string()).collect::<Vec<_>>()
    };
    let open = descriptors();
    let ours = holders();
    chain.add("pre-dump", &[]);
    let (whole, none) = pages(&chain.run.images("1"));
    assert!(whole > 1000 && none == 0, "{whole} pages, {none} in no parent");
    let opened = {
        let all = fs::read_dir(format!("/proc/{}/fd", chain.run.pid)).into_iter().flatten().flatten();
        all.count()
    };
    assert_eq!(opened, open.len(), "the program has other descriptors than before");
    assert_eq!(process::threads(chain.run.pid).len(), before);
    let holder: Vec<i32> = holders().into_iter().filter(|p| !ours.contains(p)).collect();
    chain.add("pre-dump", &[]);
    let (written, parent) = pages(&chain.run.images("2"));
    assert!(written < 100 && parent > whole - 100, "{written} pages of {whole} again, {parent} in the parent");
    chain.dump(&[]);
    let (written, parent) = pages(&chain.run.images("3"));
    assert!(written < 200 && parent > whole - 200, "{written} pages of {whole} again, {parent} in the parent");
    let gone = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        !holder.iter().any(|p| process::alive(*p))
    });
    assert!(gone, "{holder:?} outlive the program");
    chain.restore(&Engine::ours());
}

/// Marks are not believed if they do not mean "since the parent": a pass in between, a holder that was killed, a dump that
/// failed. The dump is whole then, and right.
#[test]
fn marks_of_another_pass() {
    if !can_track("marks_of_another_pass") {
        return;
    }
    for case in ["pass in between", "untracked", "killed"] {
        let mut chain = Chain::of("track_words");
        let before = holders();
        chain.add("pre-dump", &[]);
        let first = chain.last.clone();
        chain.wait();
        match case {
            "pass in between" => {
                chain.add("pre-dump", &[]);
                chain.last = first;
            }
            "untracked" => {
                let pid = chain.run.pid.to_string();
                command(&chain.engine, "untrack", &chain.run.images("1"), &["-t", &pid]);
            }
            _ => {
                // of several tests' holders that of this program: the one that polls for its end
                for pid in holders().into_iter().filter(|p| !before.contains(p)) {
                    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/5")).unwrap_or_default();
                    if info.lines().any(|l| l == format!("Pid:\t{}", chain.run.pid)) {
                        process::signal(pid, libc::SIGKILL);
                    }
                }
            }
        }
        std::thread::sleep(Duration::from_millis(30));
        let log = chain.dump(&[]);
        let (_, parent) = pages(chain.last.as_deref().unwrap_or(Path::new("")));
        assert!(parent == 0 && log.contains("the dump is whole"), "{case}: {parent} pages from the parent\n{log}");
        chain.restore(&Engine::ours());
    }
}

/// A program that writes faster than can be copied is copied on write; it goes on unharmed, and nothing of that stays.
#[test]
fn flooded() {
    let mut chain = Chain::of("track_flood");
    let before = process::threads(chain.run.pid).len();
    // whether it outruns a pass is the scheduler's to say, once
    let flooded = (0..50).any(|_| {
        chain.last = None;
        chain.count = 0;
        let log = chain.add("dump", &["-R", "--snapshot"]);
        assert_eq!(process::threads(chain.run.pid).len(), before);
        log.contains("phase copying")
    });
    assert!(flooded, "it never had more than a few pages left at the freeze");
    assert!(process::children(chain.run.pid).is_empty());
    let images = chain.last.clone().unwrap_or_default();
    assert!(images.join("snapshot-1.pre").join("inventory.img").exists());
    // an image folder that is used again keeps nothing of the snapshot
    chain.last = None;
    chain.count = 0;
    chain.add("dump", &["-R"]);
    assert!(!images.join("snapshot-1.pre").exists() && !images.join("parent").exists());
    chain.run.check(How::Running);
}

/// Snapshots of a tree whose memory is tracked: the marks go on with them.
#[test]
fn snapshots_in_a_chain() {
    if !can_track("snapshots_in_a_chain") {
        return;
    }
    let mut chain = Chain::of("memory_private");
    chain.add("pre-dump", &[]);
    let (whole, _) = pages(&chain.run.images("1"));
    for n in ["2", "3"] {
        chain.add("dump", &["-R", "--snapshot"]);
        let (written, parent) = pages(&chain.run.images(n));
        assert!(written < 400 && parent > whole - 400, "{written} pages of {whole} again, {parent} in the parent");
    }
    chain.kill();
    chain.restore(&Engine::ours());
}

/// A pre-dump is no checkpoint, and a parent that is not there is none either.
#[test]
fn refusals() {
    if !can_track("refusals") {
        return;
    }
    let mut chain = Chain::of("track_words");
    chain.add("pre-dump", &[]);
    let images = chain.run.images("1");
    let refused = chain.engine.restore(&images, &[]).map_or_else(|e| e.text, |t| panic!("restored: {t}"));
    assert!(refused.contains("a pre-dump"), "{refused}");
    let refused = chain.engine.dump(chain.run.pid, &chain.run.images("2"), &["--prev-images-dir", "../none"]);
    let refused = refused.map_or_else(|e| e.text, |t| panic!("dumped: {t}"));
    assert!(refused.contains("no checkpoint to build on"), "{refused}");
    let refused = chain.engine.dump(chain.run.pid, &images, &["--prev-images-dir", "."]);
    let refused = refused.map_or_else(|e| e.text, |t| panic!("dumped: {t}"));
    assert!(refused.contains("itself"), "{refused}");
    chain.run.check(How::Running);
}

/// `dedup` frees in parents what newer checkpoints have.
#[test]
fn dedup_frees_what_is_replaced() {
    use std::os::unix::fs::MetadataExt as _;
    if !can_track("dedup_frees_what_is_replaced") {
        return;
    }
    let mut chain = Chain::of("track_words");
    for _ in 0..3 {
        chain.add("pre-dump", &[]);
        std::thread::sleep(Duration::from_millis(200));
    }
    chain.dump(&[]);
    let blocks = |n: u32| {
        let folder = fs::read_dir(chain.run.images(&n.to_string())).into_iter().flatten().flatten();
        let pages = folder.filter(|f| f.file_name().to_string_lossy().starts_with("pages-"));
        pages.filter_map(|f| f.metadata().ok()).map(|m| m.blocks()).sum::<u64>()
    };
    let before: Vec<u64> = (1..=4).map(blocks).collect();
    command(&chain.engine, "dedup", &chain.run.images("4"), &[]);
    let after: Vec<u64> = (1..=4).map(blocks).collect();
    assert!(after[0] < before[0] && after[1] < before[1] && after[3] == before[3], "{before:?} {after:?}");
    chain.restore(&Engine::ours());
}
