//! Sealed checkpoints: guests that were made for other things, in folders and streams; keys; and one byte that was changed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use standstill_tests::engine::{Engine, Failure};
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;

fn key(run: &Run, name: &str) -> String {
    let path = run.folder.join(name).display().to_string();
    let made = Command::new(Engine::ours().path()).args(["keygen", &path]).output();
    assert!(made.is_ok_and(|output| output.status.success()));
    path
}

fn restored(name: &str, more: &[&str]) {
    let mut run = Run::start(name);
    let (engine, images, key) = (Engine::ours(), run.images("images"), key(&run, "key"));
    run.dump_with(&engine, &images, &[&["--key-file", &key], more].concat());
    run.restore_with(&engine, &images, &["--key-file", &key]);
    run.check(How::Restored);
}

macro_rules! sealed {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                restored(stringify!($name), &[]);
            }
        )*
    };
}

sealed! {
    memfd
    memory_cow
    memory_file_deleted
    memory_private
    memory_shared
    memory_sparse
    pipes
    threads
    tree
}

#[test]
fn packed_first() {
    for name in ["packed_kinds", "memory_private"] {
        restored(name, &["--compress"]);
    }
}

fn refused(result: Result<String, Failure>, said: &str) {
    let error = result.err().unwrap_or_else(|| panic!("not refused: {said}"));
    assert!(error.code == Some(1) && error.text.contains(said), "{said}: {error}");
}

#[test]
fn keys() {
    let mut run = Run::start("memory_private");
    let (engine, images) = (Engine::ours(), run.images("images"));
    let (key, other) = (key(&run, "key"), key(&run, "other"));
    let password = run.folder.join("password").display().to_string();
    std::fs::write(&password, "secret\n").unwrap_or_else(|e| panic!("{e}"));
    refused(engine.dump(run.pid, &images, &["--key-file", &password]), "is no key");
    refused(engine.dump(run.pid, &images, &["--key-file", "/nonexistent"]), "cannot read the key");
    for refused_with in ["--snapshot", "--lazy-pages", "--page-server", "--auto-dedup"] {
        let dumped = engine.dump(run.pid, &images, &["--key-file", &key, "-R", refused_with]);
        refused(dumped, "does not go with a key");
    }
    run.dump_with(&engine, &images, &["--key-file", &key]);
    refused(engine.restore(&images, &[]), "it is sealed");
    refused(engine.restore(&images, &["--key-file", &other]), "another key");
    assert!(!process::exists(run.pid));
    // by a descriptor
    let file = std::fs::File::open(&key).unwrap_or_else(|e| panic!("{e}"));
    let mut command = engine.command("restore", &images, &["-d", "--key-fd", "0"]);
    let status = command.stdin(Stdio::from(file)).stdout(Stdio::null()).status();
    assert!(status.is_ok_and(|status| status.success()));
    // a checkpoint that is not sealed takes the place of one that is, and is not taken for one
    run.dump_with(&engine, &images, &[]);
    refused(engine.restore(&images, &["--key-file", &key]), "not sealed");
    run.restore(&engine, &images);
    run.check(How::Restored);
}

fn images_of(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{e}"));
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "img")).collect()
}

#[test]
fn one_byte_that_was_changed_or_an_image_that_is_gone() {
    let mut run = Run::start("memory_private");
    let (engine, images, key) = (Engine::ours(), run.images("images"), key(&run, "key"));
    run.dump_with(&engine, &images, &["--key-file", &key]);
    let all = images_of(&images);
    assert!(all.len() > 8, "{all:?}");
    for path in &all {
        let whole = std::fs::read(path).unwrap_or_else(|e| panic!("{e}"));
        for place in [3, 20, 40, 70, 85, whole.len() / 2, whole.len() - 1] {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            std::fs::write(path, &changed).unwrap_or_else(|e| panic!("{e}"));
            refused(engine.restore(&images, &["--key-file", &key]), "cannot be opened with this key");
            assert!(!process::exists(run.pid), "{}: something was started", path.display());
        }
        std::fs::remove_file(path).unwrap_or_else(|e| panic!("{e}"));
        refused(engine.restore(&images, &["--key-file", &key]), "cannot be opened with this key");
        std::fs::write(path, &whole).unwrap_or_else(|e| panic!("{e}"));
    }
    // nothing of the program can be read
    let marks = all.iter().filter(|path| {
        let bytes = std::fs::read(path).unwrap_or_default();
        bytes.windows(8).any(|part| part == b"LD_PRELO" || part == b"memory_p")
    });
    assert_eq!(marks.count(), 0);
    run.restore_with(&engine, &images, &["--key-file", &key]);
    run.check(How::Restored);
}

#[test]
fn chains() {
    let mut run = Run::start("track_words");
    let (engine, key, other) = (Engine::ours(), key(&run, "key"), key(&run, "other"));
    let (first, second) = (run.images("1"), run.images("2"));
    let pid = run.pid.to_string();
    std::fs::create_dir_all(&first).unwrap_or_else(|e| panic!("{e}"));
    std::fs::create_dir_all(&second).unwrap_or_else(|e| panic!("{e}"));
    let status = engine.command("pre-dump", &first, &["-t", &pid, "--key-file", &key]).stdout(Stdio::null()).status();
    assert!(status.is_ok_and(|status| status.success()), "pre-dump");
    let on = ["--prev-images-dir", "../1"];
    refused(engine.dump(run.pid, &second, &on), "it is sealed");
    refused(engine.dump(run.pid, &second, &[&on[..], &["--key-file", &other]].concat()), "another key");
    run.dump_with(&engine, &second, &[&on[..], &["--key-file", &key]].concat());
    // what is below was changed
    let pages = images_of(&first).into_iter().find(|path| path.to_string_lossy().contains("pages-"));
    let pages = pages.unwrap_or_else(|| panic!("no pages"));
    let whole = std::fs::read(&pages).unwrap_or_else(|e| panic!("{e}"));
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    std::fs::write(&pages, &changed).unwrap_or_else(|e| panic!("{e}"));
    refused(engine.restore(&second, &["--key-file", &key]), "cannot be opened with this key");
    std::fs::write(&pages, &whole).unwrap_or_else(|e| panic!("{e}"));
    run.restore_with(&engine, &second, &["--key-file", &key]);
    run.check(How::Restored);
}
#[test]
fn streams() {
    let mut run = Run::start("memory_private");
    let (engine, images, key) = (Engine::ours(), run.images("images"), key(&run, "key"));
    let stream = run.folder.join("stream").display().to_string();
    run.dump_with(&engine, &images, &["--to", &stream, "--key-file", &key]);
    refused(engine.restore(&images, &["--from", &stream]), "it is sealed");
    run.restore_with(&engine, &images, &["--from", &stream, "--key-file", &key]);
    run.check(How::Restored);
}
