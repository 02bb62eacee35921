//! Dumps that fail, or are interrupted: the guest never hears of them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

/// A small file system of its own for images, so that they do not fit.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, size: &str) -> Option<Small> {
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{e}"));
        let options = format!("size={size}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(&path).status();
        status.is_ok_and(|s| s.success()).then_some(Small(path))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn no_space_for_images() {
    for (name, sizes) in [("memory_private", ["8k", "64k", "1m", "6m"]), ("tree", ["8k", "32k", "100k", "200k"])] {
        let mut run = Run::start(name);
        for size in sizes {
            let Some(small) = Small::mount(run.images(size), size) else {
                skip("no_space_for_images", "a tmpfs cannot be mounted here");
                return;
            };
            match Engine::ours().dump(run.pid, &small.0, &[]) {
                Ok(_) => panic!("{name} fits into {size}"),
                Err(e) => {
                    assert_eq!(e.code, Some(1), "{e}");
                    assert!(e.text.contains("No space left on device"), "{size}: {e}");
                }
            }
            assert!(!small.0.join("inventory.img").exists(), "an inventory without a checkpoint");
        }
        run.check(How::Running);
    }
}

#[test]
fn no_folder_for_images() {
    let mut run = Run::start("threads");
    let missing = run.images("missing");
    let pid = run.pid.to_string();
    let output = process::run(&mut Engine::ours().command("dump", &missing, &["-t", &pid]), Duration::from_secs(60));
    let output = output.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(output.code, Some(1));
    assert!(output.text.contains("missing"), "{}", output.text);
    run.check(How::Running);
}

/// SIGINT, SIGTERM, SIGHUP at moments all over a dump.
#[test]
fn signals_to_the_engine() {
    let mut run = Run::start("storm");
    fs::write(run.file("engines-die"), "").unwrap_or_else(|e| panic!("{e}"));
    let (engine, images) = (Engine::ours(), run.images("images"));
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = run.pid.to_string();
    let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE];
    for n in 0..120u64 {
        let mut command = engine.command("dump", &images, &["-R", "-t", &pid]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_micros(n * 397 % 25_000));
        let signal = signals[(n % 4) as usize];
        process::signal(i32::try_from(child.id()).unwrap_or(0), signal);
        let status = child.wait().unwrap_or_else(|e| panic!("{e}"));
        if let Ok(why) = fs::read_to_string(run.file("result")) {
            panic!("signal {signal}, dump {n} ({status}): {why}");
        }
        assert!(process::alive(run.pid), "signal {signal}, dump {n} ({status}): the guest is dead");
    }
    run.dump_running(&engine, &images);
    run.check(How::Running);
}

/// Nobody reads what the engine says.
#[test]
fn nobody_listens() {
    let mut run = Run::start("threads");
    let images = run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = run.pid.to_string();
    let engine = Engine::ours();
    for _ in 0..3 {
        let mut command = Command::new(&engine.path);
        command.args(["dump", "-R", "-v4", "-t", &pid, "-D"]).arg(&images);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        drop((child.stdout.take(), child.stderr.take()));
        let _ = child.wait().unwrap_or_else(|e| panic!("{e}"));
        assert!(process::alive(run.pid));
    }
    run.check(How::Running);
}

/// A restore of images that are not whole says so, and leaves nothing.
#[test]
fn half_a_checkpoint() {
    let mut run = Run::start("tree");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &images);
    let children = process::own_children();
    let names: Vec<String> = fs::read_dir(&images)
        .unwrap_or_else(|e| panic!("{e}"))
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| {
            ["core", "mm", "pagemap", "pages", "fs", "pstree", "files", "inventory", "fdinfo"]
                .iter()
                .any(|k| n.starts_with(k))
        })
        .collect();
    for name in &names {
        let (path, kept) = (images.join(name), images.join("kept"));
        fs::rename(&path, &kept).unwrap_or_else(|e| panic!("{e}"));
        let failed = engine.restore(&images, &[]);
        fs::rename(&kept, &path).unwrap_or_else(|e| panic!("{e}"));
        match failed {
            Ok(_) => panic!("restored without {name}"),
            Err(e) => assert!(e.code == Some(1) && e.text.contains("Error"), "without {name}: {e}"),
        }
    }
    std::thread::sleep(Duration::from_millis(20));
    let left: Vec<i32> =
        process::own_children().difference(&children).copied().filter(|&c| process::reap(c).is_none()).collect();
    let left: Vec<i32> = left.into_iter().filter(|p| run.tree.contains(p)).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// A restore that fails when its guard is there already, and a plan's memory too.
#[test]
fn ids_in_use_beside_deleted_files() {
    let mut run = Run::start("files_deleted");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump_running(&engine, &images);
    match engine.restore(&images, &[]) {
        Ok(_) => panic!("restored beside itself"),
        Err(e) => assert!(e.code == Some(1) && e.text.contains("Can't fork for"), "{e}"),
    }
    run.check(How::Running);
}

/// Ids that are taken: the restore says which, and the images are as they were.
#[test]
fn ids_in_use() {
    let mut run = Run::start("tree");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump_running(&engine, &images);
    match engine.restore(&images, &[]) {
        Ok(_) => panic!("restored beside itself"),
        Err(e) => assert!(e.text.contains(&run.pid.to_string()), "{e}"),
    }
    assert!(process::alive(run.pid));
    run.dump(&engine, &images);
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// What the one who restores ignores (nohup(1)) is not what the program ignores.
#[test]
fn an_engine_that_ignores_signals() {
    let mut run = Run::start("tree");
    let images = run.images("images");
    let ignored = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().find(|l| l.starts_with("SigIgn")).map(str::to_owned)
    };
    let before: Vec<_> = run.tree.iter().map(|p| (*p, ignored(*p))).filter(|(_, mask)| mask.is_some()).collect();
    run.dump(&Engine::ours(), &images);
    let restore = Engine::ours().command("restore", &images, &["-d"]);
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' HUP USR1 USR2; exec \"$0\" \"$@\""])
        .arg(restore.get_program())
        .args(restore.get_args());
    let output = process::run(&mut command, Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(output.code, Some(0), "{}", output.text);
    for (pid, mask) in before.into_iter().filter(|(pid, _)| process::alive(*pid)) {
        assert_eq!(ignored(pid), mask, "task {pid}");
    }
    run.look();
    run.check(How::Restored);
}
