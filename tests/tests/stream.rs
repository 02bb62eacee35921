//! Checkpoints through a pipe: `dump --to`, `restore --from`. Guests that were made for other things; pipes that are cut, full or
//! left; bytes that were changed; either side killed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use standstill_images::store::stream;
use standstill_images::FolderStore;
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process::{self, within};
use standstill_tests::run::Run;

const LIMIT: Duration = Duration::from_secs(60);

/// A dump of the guest into a pipe, whose reader we are.
fn dumping(run: &Run, images: &Path, more: &[&str]) -> Child {
    std::fs::create_dir_all(images).unwrap_or_else(|e| panic!("{e}"));
    let mut command = Engine::ours().command("dump", images, run.options().0);
    command.args(["-t", &run.pid.to_string(), "--to", "-"]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|e| panic!("{e}"))
}

/// How it ended, and what it said and logged. Standard output must be closed or read by then.
fn ended(mut child: Child, images: &Path, log: &str) -> (Option<i32>, String) {
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut text);
    }
    let code = within(LIMIT, || matches!(child.try_wait(), Ok(Some(_))));
    assert!(code, "it did not end:\n{}", process::describe(child.id().try_into().unwrap_or(0)));
    let status = child.wait().unwrap_or_else(|e| panic!("{e}"));
    text += &std::fs::read_to_string(images.join(log)).unwrap_or_default();
    (status.code().or(status.signal().map(|s| 128 + s)), text)
}

/// Dumps the guest into a pipe, and it is dead then: the stream, whose images are in the folder, too.
fn sent(run: &mut Run, images: &Path, more: &[&str]) -> Vec<u8> {
    run.look();
    let mut child = dumping(run, images, more);
    let mut bytes = Vec::new();
    let read = child.stdout.take().map(|mut out| out.read_to_end(&mut bytes));
    assert!(matches!(read, Some(Ok(_))), "{read:?}");
    let (code, text) = ended(child, images, "dump.log");
    assert_eq!(code, Some(0), "{text}");
    let store = FolderStore::open(images).unwrap_or_else(|e| panic!("{e}"));
    let mut rest = bytes.as_slice();
    stream::receive(&mut rest, &store, u64::MAX).unwrap_or_else(|e| panic!("{e}"));
    assert!(rest.is_empty(), "{} bytes are no part of the stream", rest.len());
    assert!(!images.join("stats-dump").exists());
    run.is_dumped(images);
    bytes
}

/// A pipe with a name, into which somebody writes this.
fn fifo_with(run: &Run, bytes: Vec<u8>) -> (std::path::PathBuf, std::thread::JoinHandle<std::io::Result<()>>) {
    let path = run.folder.join("fifo");
    let _ = std::fs::remove_file(&path);
    let made = Command::new("mkfifo").arg(&path).status();
    assert!(made.is_ok_and(|status| status.success()));
    let to = path.clone();
    (path, std::thread::spawn(move || File::options().write(true).open(to)?.write_all(&bytes)))
}

fn through_a_pipe(name: &str, more: &[&str]) {
    let mut run = Run::start(name);
    let images = run.images("images");
    let bytes = sent(&mut run, &images, more);
    let empty = run.images("empty");
    std::fs::create_dir_all(&empty).unwrap_or_else(|e| panic!("{e}"));
    let (path, writer) = fifo_with(&run, bytes);
    run.restore_with(&Engine::ours(), &empty, &["--from", &path.to_string_lossy()]);
    assert!(matches!(writer.join(), Ok(Ok(()))));
    assert!(!empty.join("inventory.img").exists(), "nothing is kept in a folder");
    run.check(How::Restored);
}

macro_rules! through {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                through_a_pipe(stringify!($name), &[]);
            }
        )*
    };
}

through! {
    files_deleted
    memfd
    memory_cow
    memory_private
    memory_shared
    memory_sparse
    mount_tmpfs
    packed_kinds
    pipes_full
    sysv
    threads
    tree
    unix_rights
}

#[test]
fn packed() {
    through_a_pipe("memfd", &["--compress"]);
    through_a_pipe("tree", &["--compress", "--compress-block", "4K"]);
}

/// Every guest, by hand: `cargo test -p standstill-tests --test stream -- --ignored every_guest`.
#[test]
#[ignore = "takes minutes: what is special about streams is tested above"]
fn every_guest() {
    let mut failed = Vec::new();
    for guest in standstill_tests::guests::ALL.iter().filter(|g| g.refused.is_empty()) {
        eprintln!("{}", guest.name);
        if std::panic::catch_unwind(|| through_a_pipe(guest.name, &[])).is_err() {
            failed.push(guest.name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// One side's output is the other's input, and nobody between; in a PID namespace of its own, so that its ids are free.
#[test]
fn from_engine_to_engine() {
    let mut run = Run::start("pid_namespace");
    let (there, pidfile) = (run.images("there"), run.folder.join("pidfile"));
    std::fs::create_dir_all(&there).unwrap_or_else(|e| panic!("{e}"));
    run.look();
    let mut dump = dumping(&run, &run.images("here"), &[]);
    let pipe = dump.stdout.take().map_or(Stdio::null(), Stdio::from);
    let mut command = Engine::ours().command("restore", &there, run.options().1);
    command.args(["--from", "-", "-d", "--pidfile"]).arg(&pidfile);
    let restore = command.stdin(pipe).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let restore = restore.unwrap_or_else(|e| panic!("{e}"));
    let (code, text) = ended(dump, &run.images("here"), "dump.log");
    assert_eq!(code, Some(0), "{text}");
    run.is_dumped(&there);
    let (code, text) = ended(restore, &there, "restore.log");
    assert_eq!(code, Some(0), "{text}");
    let pid = std::fs::read_to_string(&pidfile).unwrap_or_default();
    run.pid = pid.trim().parse().unwrap_or_else(|e| panic!("{pid:?}: {e}"));
    run.check(How::Restored);
}

#[test]
fn the_tree_may_go_on() {
    let mut run = Run::start("tree");
    let images = run.images("images");
    let mut child = dumping(&run, &images, &["-R"]);
    let mut bytes = Vec::new();
    child.stdout.take().map(|mut out| out.read_to_end(&mut bytes));
    let (code, text) = ended(child, &images, "dump.log");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("memory sent"), "{text}");
    let store = standstill_images::MemoryStore::new();
    stream::receive(bytes.as_slice(), &store, u64::MAX).unwrap_or_else(|e| panic!("{e}"));
    run.check(How::Running);
}

/// A restore of this: its exit code and what it said.
fn restored(run: &Run, bytes: &[u8]) -> (Option<i32>, String) {
    let (path, images) = (run.folder.join("stream"), run.images("empty"));
    std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    std::fs::write(&path, bytes).unwrap_or_else(|e| panic!("{e}"));
    let mut command = Engine::ours().command("restore", &images, run.options().1);
    let output = process::run(command.args(["-d", "--from"]).arg(&path), LIMIT);
    let output = output.unwrap_or_else(|e| panic!("{e}"));
    (output.code, output.text)
}

/// Places in a stream: all at which a record begins, if they are few, and some in between.
fn places(bytes: &[u8], most: usize) -> Vec<usize> {
    let mut at = 20;
    let mut all = vec![0, 10, at];
    while let Some(size) = bytes.get(at + 5..at + 9) {
        all.push(at + 4);
        at += 9 + u32::from_le_bytes([size[0], size[1], size[2], size[3]]) as usize;
        all.push(at);
    }
    assert_eq!(all.pop(), Some(bytes.len()));
    let step = all.len().div_ceil(most);
    let mut random = 88_172_645_463_325_252_u64;
    let some = (0..most / 2).map(|_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % bytes.len() as u64).unwrap_or(0)
    });
    all.iter().copied().step_by(step).chain(some).chain([bytes.len() - 1]).collect()
}

/// A stream that ends early, or of which one byte was changed, is one error, and nothing starts.
#[test]
fn a_cut_or_changed_stream_starts_nothing() {
    let mut run = Run::start("pipes");
    let images = run.images("images");
    let bytes = sent(&mut run, &images, &[]);
    for place in places(&bytes, 24) {
        let (code, text) = restored(&run, &bytes[..place]);
        assert!(code == Some(1) && text.contains("the stream ends early"), "cut at {place}: {code:?} {text}");
        assert_eq!(text.lines().filter(|l| l.contains("stream of images")).count(), 1, "{text}");
        let mut changed = bytes.clone();
        changed[place] ^= 1 << (place % 8);
        let (code, text) = restored(&run, &changed);
        assert!(code == Some(1) && text.contains("stream of images"), "changed at {place}: {code:?} {text}");
        assert!(process::wait_gone(&run.tree, LIMIT).is_ok(), "something was started");
    }
    let (path, writer) = fifo_with(&run, bytes);
    run.restore_with(&Engine::ours(), &run.images("empty"), &["--from", &path.to_string_lossy()]);
    assert!(matches!(writer.join(), Ok(Ok(()))));
    run.check(How::Restored);
}

/// Nobody reads, or not any more: an error that says so, and the guest goes on.
#[test]
fn a_reader_that_stops_or_goes() {
    let mut run = Run::start("memory_large");
    let images = run.images("images");
    // holds the pipe open and reads nothing
    let mut child = dumping(&run, &images, &["--timeout", "2"]);
    let full = child.stdout.take();
    let (code, text) = ended(child, &images, "dump.log");
    assert!(code == Some(1) && text.contains("the other side did nothing for 2 s"), "{code:?} {text}");
    drop(full);

    let mut child = dumping(&run, &images, &[]);
    let mut some = vec![0; 100_000];
    child.stdout.take().map(|mut out| out.read_exact(&mut some));
    let (code, text) = ended(child, &images, "dump.log");
    assert!(code == Some(1) && text.contains("Broken pipe"), "{code:?} {text}");

    let mut child = dumping(&run, &images, &[]);
    drop(child.stdout.take());
    let (code, text) = ended(child, &images, "dump.log");
    assert!(code == Some(1) && text.contains("Broken pipe"), "{code:?} {text}");
    run.check(How::Running);
}

/// The engine that dumps is killed, wherever it is: the guest goes on, and what was sent is no stream.
#[test]
fn a_dump_that_is_killed() {
    let mut run = Run::start("memory_large");
    let images = run.images("images");
    for n in 0..12_usize {
        let mut child = dumping(&run, &images, &["-R"]);
        let mut bytes = vec![0; n * n * 200_000];
        if let Some(mut out) = child.stdout.take() {
            let _ = out.read_exact(&mut bytes);
            let _ = child.kill();
            let _ = out.read_to_end(&mut bytes);
        }
        let (code, text) = ended(child, &images, "dump.log");
        let arrived = stream::receive(bytes.as_slice(), &standstill_images::MemoryStore::new(), u64::MAX);
        match code {
            Some(137) => {}
            // it was through already
            Some(0) => assert!(arrived.is_ok()),
            _ => panic!("{n}: {code:?} {text}"),
        }
    }
    run.check(How::Running);
}

/// The engine that restores is killed while it takes the stream, or later: nothing of the guest is left, but all of it if it
/// was let go.
#[test]
fn a_restore_that_is_killed() {
    let mut run = Run::start("tree");
    let (images, empty) = (run.images("images"), run.images("empty"));
    let bytes = sent(&mut run, &images, &[]);
    std::fs::create_dir_all(&empty).unwrap_or_else(|e| panic!("{e}"));
    let parts = 10;
    for part in 0..=parts {
        let mut command = Engine::ours().command("restore", &empty, run.options().1);
        let mut child = command
            .args(["-d", "--from", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{e}"));
        let mut to = child.stdin.take();
        let some = bytes.len() * part / parts;
        let written = to.as_mut().map(|to| to.write_all(&bytes[..some]));
        assert!(matches!(written, Some(Ok(()))), "{written:?}");
        if part == parts {
            // in the middle of it
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let (code, text) = ended(child, &empty, "restore.log");
        assert!(code == Some(137) || (part == parts && code == Some(0)), "{part}: {code:?} {text}");
        if code == Some(137) {
            assert!(process::wait_gone(&run.tree, LIMIT).is_ok(), "{:?}", process::tree(run.pid));
        } else {
            return run.check(How::Restored);
        }
    }
    let (path, writer) = fifo_with(&run, bytes);
    run.restore_with(&Engine::ours(), &empty, &["--from", &path.to_string_lossy()]);
    assert!(matches!(writer.join(), Ok(Ok(()))));
    run.check(How::Restored);
}

/// What cannot be together is refused by name, before anything is touched.
#[test]
fn refused() {
    let mut run = Run::start("pipes");
    let images = run.images("images");
    std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = run.pid.to_string();
    for (verb, options, says) in [
        ("dump", &["--to", "/dev/null", "--track-mem", "-R"] as &[&str], "--track-mem"),
        ("dump", &["--to", "/dev/null", "--prev-images-dir", "../0"], "--prev-images-dir"),
        ("dump", &["--to", "/dev/null", "--page-server", "--port", "1"], "--page-server"),
        ("dump", &["--to", "/dev/null", "--lazy-pages", "--port", "1"], "--lazy-pages"),
        ("dump", &["--to", "/dev/null", "--snapshot", "-R"], "--snapshot"),
        ("dump", &["--to", "/dev/null", "--auto-dedup"], "--auto-dedup"),
        ("dump", &["--to", "/dev/null", "--every", "1s"], "--every"),
        ("dump", &["--to", "/dev/ptmx"], "terminal"),
        ("dump", &["--to", "fd:77"], "descriptor 77"),
        ("dump", &["--to", "fd:x"], "fd:x"),
        ("dump", &["--to", "/dev/full"], "No space left"),
        ("dump", &["--from", "/dev/null"], "--from cannot be used with the dump command"),
        ("pre-dump", &["--to", "/dev/null"], "--to cannot be used with the pre-dump command"),
        ("restore", &["--to", "/dev/null"], "--to cannot be used with the restore command"),
        ("restore", &["--from", "/dev/null", "--lazy-pages"], "--lazy-pages"),
        ("restore", &["--from", "/dev/null", "--auto-dedup"], "--auto-dedup"),
        ("restore", &["--from", "/dev/ptmx"], "terminal"),
        ("restore", &["--from", "/dev/null"], "the stream ends early"),
        ("restore", &["--from", "/dev/zero"], "not a stream of images"),
    ] {
        let mut command = Engine::ours().command(verb, &images, &[]);
        if verb != "restore" {
            command.args(["-t", &pid]);
        }
        let output = process::run(command.args(options), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        let log = std::fs::read_to_string(images.join(format!("{verb}.log"))).unwrap_or_default();
        assert!(output.code == Some(1) && (output.text + &log).contains(says), "{verb} {options:?}: {log}");
    }
    run.check(How::Running);
}
