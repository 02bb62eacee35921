//! `verify`: each image of a checkpoint is removed, cut and changed in turn, and named; what a host lacks is said, and nothing is
//! started.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use standstill_images::ImageKind;
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;

const LIMIT: Duration = Duration::from_secs(60);

/// What `verify` ends with: exit code, object, and all that it printed.
fn verify(folder: &Path, more: &[&str]) -> (Option<i32>, Value, String) {
    let mut command = Command::new(Engine::ours().path());
    command.arg("verify").arg(folder).args(more).arg("--json");
    let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let last = output.text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    let object = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}", output.text));
    (output.code, object, output.text)
}

fn list<'a>(object: &'a Value, key: &str) -> Vec<&'a Value> {
    object[key].as_array().map(|all| all.iter().collect()).unwrap_or_default()
}

/// The images that are said to be damaged.
fn damaged(object: &Value) -> Vec<String> {
    list(object, "damaged").iter().map(|fault| fault["image"].as_str().unwrap_or_default().to_owned()).collect()
}

fn lacking(object: &Value) -> String {
    list(object, "lacking").iter().map(|what| what.as_str().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// All is whole, and nothing is lacking but what somebody else took by accident: the ids of the dead are free for everybody.
fn is_fine(code: Option<i32>, object: &Value) -> bool {
    let taken = |what: &&Value| {
        let what = what.as_str().unwrap_or_default();
        what.starts_with("process ids in use here") || what.starts_with("somebody here listens on port")
    };
    let all = list(object, "lacking");
    let expected = if all.is_empty() { 0 } else { 2 };
    code == Some(expected) && damaged(object).is_empty() && all.iter().all(taken)
}

/// The images of a checkpoint that its statistics are not part of.
fn images(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{e}"));
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<String> =
        names.filter(|n| n.ends_with(".img") && ImageKind::from_file_name(n).is_some()).collect();
    names.sort();
    assert!(names.len() > 10, "{names:?}");
    names
}

/// Does something to a file, asks, and puts it back.
fn with(path: &Path, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>, ask: impl FnOnce()) {
    let good = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    match change(good.clone()) {
        Some(bad) => std::fs::write(path, bad),
        None => std::fs::remove_file(path),
    }
    .unwrap_or_else(|e| panic!("{e}"));
    ask();
    std::fs::write(path, good).unwrap_or_else(|e| panic!("{e}"));
}

/// A guest is dumped, each of its images is spoiled in each way, and it comes back from them when they are whole again.
fn matrix(name: &str, options: &[&str]) {
    let mut run = Run::start(name);
    let (engine, folder) = (Engine::ours(), run.images("images"));
    run.dump_with(&engine, &folder, options);
    let (code, object, text) = verify(&folder, options_of_restore(options));
    assert!(is_fine(code, &object), "{name}: {text}");
    assert!(object["files"].as_u64().is_some_and(|n| n >= images(&folder).len() as u64), "{text}");
    let names = |image: &str, how: &str| {
        let (code, object, text) = verify(&folder, options_of_restore(options));
        assert_eq!(code, Some(1), "{name}: {image} {how}: {text}");
        assert!(damaged(&object).iter().any(|known| known == image), "{name}: {image} {how}: {text}");
    };
    for image in images(&folder) {
        let path = folder.join(&image);
        with(&path, |_| None, || names(&image, "removed"));
        let len = std::fs::metadata(&path).map_or(0, |m| m.len());
        if len == 0 {
            // there is nothing to cut
            continue;
        }
        with(&path, |good| Some(good[..good.len() - 1].to_vec()), || names(&image, "without its last byte"));
        with(&path, |good| Some(good[..good.len() / 2].to_vec()), || names(&image, "cut in half"));
        with(&path, |_| Some(Vec::new()), || names(&image, "emptied"));
        // memory has no sum
        if !image.starts_with("pages-") {
            let flip = |mut good: Vec<u8>| {
                good[0] ^= 1;
                Some(good)
            };
            with(&path, flip, || names(&image, "with another first byte"));
        }
    }
    run.restore(&engine, &folder);
    run.check(How::Restored);
}

/// A dump's options that are none of a restore's are left out.
fn options_of_restore<'a>(options: &[&'a str]) -> &'a [&'a str] {
    if options.contains(&"--tcp-established") {
        &["--tcp-established"]
    } else {
        &[]
    }
}

#[test]
fn each_image_of_files() {
    matrix("files_deleted", &[]);
}

#[test]
fn each_image_of_a_tree() {
    matrix("tree", &[]);
}

#[test]
fn each_image_of_sockets() {
    matrix("unix_rights", &[]);
}

#[test]
fn each_image_of_packed_memory() {
    matrix("packed_family", &[]);
}

#[test]
fn each_image_of_shared_memory() {
    matrix("memfd", &[]);
}

/// Any bit of metadata: never a panic or a hang, and the damage is seen.
#[test]
fn any_bit() {
    let mut run = Run::start("pipes");
    let (engine, folder) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &folder);
    for (n, image) in images(&folder).into_iter().enumerate().filter(|(_, image)| !image.starts_with("pages-")) {
        for m in 0..3 {
            let flip = |mut good: Vec<u8>| {
                let at = (n * 7919 + m * 104_729) % good.len().max(1);
                if let Some(byte) = good.get_mut(at) {
                    *byte ^= 1 << ((n + m) % 8);
                }
                Some(good)
            };
            with(&folder.join(&image), flip, || {
                let (code, object, text) = verify(&folder, &[]);
                // the inventory holds the sums of the others, and none of its own
                if image != "inventory.img" {
                    assert_eq!(code, Some(1), "{image}: {text}");
                    assert!(damaged(&object).contains(&image), "{image}: {text}");
                }
                assert!(code.is_some_and(|code| code < 3), "{image}: {text}");
            });
        }
    }
    run.restore(&engine, &folder);
    run.check(How::Restored);
}

/// All is whole, and the program still runs: its ids are taken. Nothing of that is touched.
#[test]
fn what_is_lacking() {
    let mut run = Run::start("inet_listening");
    let (engine, folder) = (Engine::ours(), run.images("images"));
    run.dump_running(&engine, &folder);
    let (code, object, text) = verify(&folder, &[]);
    assert_eq!(code, Some(2), "{text}");
    assert!(object["whole"].as_bool().is_some_and(|whole| whole) && damaged(&object).is_empty(), "{text}");
    let said = lacking(&object);
    assert!(said.contains("process ids in use here") && said.contains(&run.pid.to_string()), "{text}");
    assert!(said.contains("listens on port"), "{text}");
    // as people read it
    let mut command = Command::new(engine.path());
    let output = process::run(command.arg("verify").arg(&folder), LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(output.code, Some(2), "{}", output.text);
    assert!(output.text.contains("lacking here: process ids"), "{}", output.text);
    run.kill(&folder);
    let (code, object, text) = verify(&folder, &[]);
    assert!(is_fine(code, &object), "{text}");
    run.restore(&engine, &folder);
    run.check(How::Restored);
}

/// Files that are gone, or others by now.
#[test]
fn files_of_the_host() {
    let mut run = Run::start("files_offsets");
    let (engine, folder) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &folder);
    let entries = std::fs::read_dir(run.folder.join("files")).unwrap_or_else(|e| panic!("{e}"));
    let mut changed = 0;
    for path in entries.flatten().map(|e| e.path()).filter(|path| path.is_file()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let (before, object, text) = verify(&folder, &[]);
        assert!(is_fine(before, &object), "{text}");
        let longer = |mut good: Vec<u8>| {
            good.push(b'x');
            Some(good)
        };
        with(&path, longer, || {
            let (code, object, text) = verify(&folder, &[]);
            let missed = lacking(&object).contains(&format!("{name} has bad size"));
            assert_eq!(missed, !is_fine(code, &object), "{name}: {text}");
            changed += u32::from(missed);
        });
    }
    assert!(changed > 0, "no file was missed");
    run.restore(&engine, &folder);
    run.check(How::Restored);
}

/// A chain: what the last one builds on is looked at, too.
#[test]
fn chains() {
    let mut run = Run::start("memory_private");
    let (engine, folder) = (Engine::ours(), run.images("2"));
    let pid = run.pid.to_string();
    let first = run.images("1");
    std::fs::create_dir_all(&first).unwrap_or_else(|e| panic!("{e}"));
    let mut command = engine.command("pre-dump", &first, &["-t", &pid]);
    let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(output.code, Some(0), "{}", output.text);
    let (code, object, text) = verify(&first, &[]);
    assert_eq!((code, object["pre_dump"].as_bool()), (Some(0), Some(true)), "{text}");
    run.dump_with(&engine, &folder, &["--prev-images-dir", "../1"]);
    let (code, object, text) = verify(&folder, &[]);
    assert!(is_fine(code, &object) && object["checkpoints"].as_u64() == Some(2), "{text}");
    let entries = std::fs::read_dir(&first).unwrap_or_else(|e| panic!("{e}"));
    for name in entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.ends_with(".img")) {
        with(
            &first.join(&name),
            |_| None,
            || {
                let (code, object, text) = verify(&folder, &[]);
                assert_eq!(code, Some(1), "{name}: {text}");
                assert!(damaged(&object).contains(&format!("parent/{name}")), "{name}: {text}");
            },
        );
    }
    let moved = run.images("elsewhere");
    std::fs::rename(&first, &moved).unwrap_or_else(|e| panic!("{e}"));
    let (code, object, text) = verify(&folder, &[]);
    assert!(code == Some(1) && !damaged(&object).is_empty(), "{text}");
    std::fs::rename(&moved, &first).unwrap_or_else(|e| panic!("{e}"));
    run.restore(&engine, &folder);
    run.check(How::Restored);
}

/// Checkpoints that CRIU made are whole; what of it is not here is said.
#[test]
fn of_criu() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/checkpoints");
    let mut count = 0;
    for entry in std::fs::read_dir(fixtures).unwrap_or_else(|e| panic!("{e}")).flatten() {
        let folder = entry.path().join("images");
        let (code, object, text) = verify(&folder, &["--tcp-established", "--shell-job", "--file-locks"]);
        assert!(matches!(code, Some(0 | 2)), "{}: {text}", folder.display());
        assert!(damaged(&object).is_empty(), "{}: {text}", folder.display());
        count += 1;
    }
    assert!(count > 1);
}
