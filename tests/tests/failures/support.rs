//! A program that counts, what is done to it, and that nothing of it is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::process;
use standstill_tests::program::{eventually, folder, program, Program, LIMIT};

/// A program that has done `code`, in Perl, and counts.
pub(crate) fn counting(code: &str) -> Program {
    counting_as("perl", code, |_| {})
}

/// The same, started in a special way.
pub(crate) fn counting_as(name: &str, code: &str, change: impl FnOnce(&mut Command)) -> Program {
    let perl = program("perl").unwrap_or_else(|| panic!("no perl"));
    let at = folder(name);
    let mut command = Command::new(perl);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/count.pl")).arg(code);
    change(&mut command);
    let program = Program::start(name, at, &mut command);
    begun(&program);
    program
}

/// Waits until it counts.
pub(crate) fn begun(program: &Program) {
    eventually("the program", || {
        assert!(process::alive(program.pid), "it has ended");
        program.count() > 0
    });
}

/// The folder of its images.
pub(crate) fn images(program: &Program) -> PathBuf {
    let path = program.folder.join("images");
    fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{e}"));
    path
}

/// Runs the engine, which must fail as it should: exit code 1.
pub(crate) fn fails(command: &mut Command, log: &Path) -> String {
    let output = process::run(command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let text = format!("{}\n{}", fs::read_to_string(log).unwrap_or_default(), output.text);
    assert_eq!(output.code, Some(1), "{text}");
    text
}

/// A dump that must fail: the program goes on, and there is no checkpoint.
pub(crate) fn dump_fails(program: &Program, options: &[&str]) -> String {
    dump_of_fails(program, program.pid, options, |_| {})
}

/// A dump of any task, by an engine that is started in a special way.
pub(crate) fn dump_of_fails(
    program: &Program,
    pid: i32,
    options: &[&str],
    change: impl FnOnce(&mut Command),
) -> String {
    let images = images(program);
    let pid = pid.to_string();
    let mut command = Engine::ours().command("dump", &images, &[&["-t", &pid], options].concat());
    change(&mut command);
    let names = names(&program.folder);
    let text = fails(&mut command, &images.join("dump.log"));
    assert!(!images.join("inventory.img").exists(), "a checkpoint of a dump that failed");
    assert_eq!(names, self::names(&program.folder), "names were left behind");
    program.moves(20);
    text
}

/// A dump that must work now, and the program comes back and goes on.
pub(crate) fn carried(program: &mut Program, options: &[&str]) {
    program.dump(options);
    program.restore_restless(options);
    program.moves(20);
}

/// A restore that must fail: nothing is left of it, and the images are as they were.
pub(crate) fn restore_fails(program: &Program, options: &[&str]) -> String {
    restore_of_fails(program, options, |_| {})
}

/// The same, by an engine that is started in a special way.
pub(crate) fn restore_of_fails(program: &Program, options: &[&str], change: impl FnOnce(&mut Command)) -> String {
    let images = images(program);
    let mut command = Engine::ours().command("restore", &images, &[&["-d"], options].concat());
    change(&mut command);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (names, before) = (names(&program.folder), contents(&images));
    let there: BTreeSet<i32> = program.tree.iter().copied().filter(|&p| process::exists(p)).collect();
    let text = fails(&mut command, &images.join("restore.log"));
    std::thread::sleep(Duration::from_millis(20));
    for &pid in &program.tree {
        process::reap(pid);
    }
    let now: BTreeSet<i32> = program.tree.iter().copied().filter(|&p| process::exists(p)).collect();
    assert_eq!(there, now, "tasks were left behind");
    assert_eq!(names, self::names(&program.folder), "names were left behind");
    assert!(before == contents(&images), "the images are no longer as they were");
    let now = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let new: Vec<&str> = now.lines().filter(|l| !mounts.contains(l) && l.contains("standstill-images")).collect();
    assert!(new.is_empty(), "mounts were left behind: {new:?}");
    text
}

/// What is in the program's folder, but for the images.
fn names(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    entries.filter(|p| !["count.new", "count", "images", "engine"].iter().any(|n| p.ends_with(n))).collect()
}

/// Names and contents of images.
fn contents(images: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(images).into_iter().flatten().flatten().map(|e| e.path());
    let mut all: Vec<_> = entries
        .filter(|p| p.extension().is_some_and(|e| e == "img"))
        .map(|p| (p.clone(), fs::read(&p).unwrap_or_default()))
        .collect();
    all.sort();
    all
}

/// The same command, started by `setpriv` with these options.
pub(crate) fn with_less_power(command: &mut Command, options: &[&str]) {
    wrapped(command, &[&["setpriv"], options, &["--"]].concat());
}

/// The same command by somebody else, with a copy of the engine that everyone may start.
pub(crate) fn as_nobody(command: &mut Command, copy: &Path) {
    fs::copy(Path::new(command.get_program()), copy).unwrap_or_else(|e| panic!("{e}"));
    let mut new = Command::new(copy);
    new.args(command.get_args());
    *command = new;
    with_less_power(command, NOBODY);
}

/// The same command, with these words before it.
pub(crate) fn wrapped(command: &mut Command, words: &[&str]) {
    let mut new = Command::new(words[0]);
    new.args(&words[1..]).arg(command.get_program()).args(command.get_args());
    *command = new;
}

/// All capabilities gone, root or not.
pub(crate) const POWERLESS: &[&str] = &["--inh-caps=-all", "--bounding-set=-all"];
/// Somebody else.
pub(crate) const NOBODY: &[&str] = &["--reuid=65534", "--regid=65534", "--clear-groups"];
