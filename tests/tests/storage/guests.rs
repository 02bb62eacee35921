//! Guests dumped to storage and restored from it, sealed too; servers that fail while a guest stands still; an engine that
//! is killed while it sends.

use std::process::{Command, Stdio};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process::{self, within};
use standstill_tests::run::Run;
use standstill_tests::s3::{Fault, ACCESS_KEY, S3};

const LIMIT: Duration = Duration::from_secs(60);
const URL: &str = "s3://bucket/guest";

/// What the engine is told on its command line; credentials are in its environment.
fn words(server: &S3) -> Vec<String> {
    let pairs = server.options().into_iter().filter(|(key, _)| !key.contains("access_key"));
    let mut words: Vec<String> =
        pairs.flat_map(|(key, value)| ["--storage-option".to_owned(), format!("{key}={value}")]).collect();
    words.extend(["--timeout".to_owned(), "30".to_owned()]);
    words
}

/// The credentials are those of all tests in this program.
fn credentials() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::env::set_var("AWS_ACCESS_KEY_ID", ACCESS_KEY);
        std::env::set_var("AWS_SECRET_ACCESS_KEY", "test-secret");
    });
}

fn with<'a>(words: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    words.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

fn there_and_back(name: &str, more: &[&str]) {
    credentials();
    let (server, mut run) = (S3::start(), Run::start(name));
    let (engine, images, words) = (Engine::ours(), run.images("images"), words(&server));
    run.dump_with(&engine, &images, &with(&words, &[&["--to", URL][..], more].concat()));
    assert!(server.objects().contains_key("guest/inventory.img"));
    assert!(!images.join("inventory.img").exists());
    let keys: Vec<&str> = more.iter().copied().filter(|word| *word != "--compress").collect();
    run.restore_with(&engine, &images, &with(&words, &[&["--from", URL][..], &keys].concat()));
    run.check(How::Restored);
}

#[test]
fn memory() {
    there_and_back("memory_private", &[]);
}

#[test]
fn trees_and_deleted_files() {
    there_and_back("tree", &[]);
    there_and_back("memory_file_deleted", &[]);
}

#[test]
fn a_folder_by_its_url() {
    let mut run = Run::start("memory_shared");
    let (engine, images) = (Engine::ours(), run.images("images"));
    let url = format!("file://{}", run.images("objects").display());
    run.dump_with(&engine, &images, &["--to", &url]);
    assert!(run.images("objects").join("manifest.json").exists());
    run.restore_with(&engine, &images, &["--from", &url]);
    run.check(How::Restored);
}

#[test]
fn sealed_and_packed() {
    let folder = process::scratch("storage-key");
    std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{e}"));
    let key = folder.join("key").display().to_string();
    let made = Command::new(Engine::ours().path()).args(["keygen", &key]).output();
    assert!(made.is_ok_and(|output| output.status.success()));
    there_and_back("memory_private", &["--key-file", &key, "--compress"]);
    let _ = std::fs::remove_dir_all(&folder);
}

#[test]
#[ignore = "takes long where much else runs: tests/soak/storage"]
fn a_server_that_fails_leaves_the_guest_running() {
    credentials();
    let always = usize::MAX;
    for (method, part, fault) in [
        ("PUT", "pages-", Fault::Status(503)),
        ("PUT", "core-", Fault::Status(403)),
        ("PUT", "mm-", Fault::Cut),
        ("PUT", "inventory", Fault::Status(500)),
        ("PUT", "pages-", Fault::Shorter),
        ("GET", "list-type", Fault::Status(503)),
    ] {
        let (server, mut run) = (S3::start(), Run::start("memory_private"));
        server.fail(method, part, 0, always, fault);
        let words = words(&server);
        let dumped = Engine::ours().dump(run.pid, &run.images("images"), &with(&words, &["--to", URL]));
        let error = dumped.err().unwrap_or_else(|| panic!("{method} {part} {fault:?} was not noticed"));
        assert_eq!(error.code, Some(1), "{error}");
        assert!(error.text.contains("Dumping FAILED."), "{error}");
        assert!(server.objects().is_empty() && server.uploads() == 0, "{:?}", server.objects().keys());
        run.check(How::Running);
    }
}

#[test]
#[ignore = "takes long where much else runs: tests/soak/storage"]
fn an_engine_that_is_killed_while_it_sends() {
    credentials();
    for (method, part) in [("PUT", "pages-"), ("PUT", "core-"), ("PUT", "manifest.json"), ("PUT", "inventory.img")] {
        let (server, mut run) = (S3::start(), Run::start("threads"));
        let (engine, images, words) = (Engine::ours(), run.images("images"), words(&server));
        std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        server.fail(method, part, 0, usize::MAX, Fault::Status(503));
        // it tries again and again: it is killed while it does
        let pid = run.pid.to_string();
        let mut command = engine.command("dump", &images, &with(&words, &["-t", &pid, "--to", URL]));
        command.args(["--storage-option", "retries=20"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        let asked = || server.requests().iter().any(|r| r.starts_with(method) && r.contains(part));
        assert!(within(LIMIT, asked), "it never sent {part}");
        child.kill().unwrap_or_else(|e| panic!("{e}"));
        let _ = child.wait();
        assert!(!server.objects().contains_key("guest/inventory.img"));
        let none = engine.restore(&images, &with(&words, &["--from", URL]));
        assert!(none.is_err_and(|e| e.code == Some(1)));
        run.check(How::Running);
        // the next one to the same place is whole
        server.heal();
        let mut run = Run::start("memory_private");
        let images = run.images("images");
        run.dump_with(&engine, &images, &with(&words, &["--to", URL]));
        run.restore_with(&engine, &images, &with(&words, &["--from", URL]));
        run.check(How::Restored);
    }
}

#[test]
#[ignore = "takes long where much else runs: tests/soak/storage"]
fn nothing_is_started_from_what_was_changed() {
    credentials();
    let (server, mut run) = (S3::start(), Run::start("memory_private"));
    let (engine, images, words) = (Engine::ours(), run.images("images"), words(&server));
    run.dump_with(&engine, &images, &with(&words, &["--to", URL]));
    for (name, content) in server.objects() {
        let mut changed = content.to_vec();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        server.set(&name, Some(changed));
        let error = engine.restore(&images, &with(&words, &["--from", URL])).err();
        let error = error.unwrap_or_else(|| panic!("{name} was changed, and nobody said so"));
        assert!(error.text.contains("Restoring FAILED.") && !process::exists(run.pid), "{name}: {error}");
        server.set(&name, Some(content.to_vec()));
    }
    run.restore_with(&engine, &images, &with(&words, &["--from", URL]));
    run.check(How::Restored);
}
