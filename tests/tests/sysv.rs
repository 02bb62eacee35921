//! System V shared memory whose segment is not what it was when its checkpoint is restored.

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;

/// A dumped guest, and the key of its segment, which has survived.
fn dumped() -> (Run, std::path::PathBuf, i32, i32) {
    let mut run = Run::start("sysv");
    let (images, key) = (run.images("images"), 0x5300_0000 | run.pid);
    run.dump(&Engine::ours(), &images);
    let id = process::segment(key).unwrap_or_else(|| panic!("the segment is gone"));
    (run, images, key, id)
}

fn fails(run: &Run, images: &std::path::Path, word: &str) {
    match Engine::ours().restore(images, &[]) {
        Ok(_) => panic!("it was restored"),
        Err(e) => assert!(e.text.contains(word), "nothing about {word:?} in {e}"),
    }
    assert!(run.tree.iter().all(|&pid| !process::exists(pid)), "half of it is left");
}

#[test]
fn a_segment_that_is_gone_is_made_again() {
    let (mut run, images, key, id) = dumped();
    process::remove_segment(id);
    assert_eq!(process::segment(key), None);
    run.restore(&Engine::ours(), &images);
    assert_eq!(process::segment(key), Some(id));
    run.check(How::Restored);
}

#[test]
fn a_failed_restore_removes_what_it_made_and_leaves_what_survived() {
    let (mut run, images, key, id) = dumped();
    let gone = run.folder.join("files.away");
    let away = |there: bool| {
        let (from, to) =
            if there { (run.folder.join("files"), &gone) } else { (gone.clone(), &run.folder.join("files")) };
        std::fs::rename(from, to).unwrap_or_else(|e| panic!("{e}"));
    };
    away(true);
    fails(&run, &images, "No such file");
    assert_eq!(process::segment(key), Some(id));
    process::remove_segment(id);
    fails(&run, &images, "No such file");
    assert_eq!(process::segment(key), None);
    away(false);
    run.restore(&Engine::ours(), &images);
    run.check(How::Restored);
}

#[test]
fn keys_and_ids_of_others_are_left_alone() {
    let (mut run, images, key, id) = dumped();
    process::remove_segment(id);
    let (other, at) = process::make_segment(key, 4096);
    fails(&run, &images, "another segment");
    assert_eq!(process::segment(key), Some(other));
    assert!(!at.is_null());
    process::remove_segment(other);
    run.restore(&Engine::ours(), &images);
    run.check(How::Restored);
}

#[test]
fn criu_refuses_the_hosts() {
    let mut run = Run::start("sysv_removed");
    let images = run.images("images");
    let name = run.folder.join("criu");
    std::os::unix::fs::symlink(Engine::ours().path(), &name).unwrap_or_else(|e| panic!("{e}"));
    std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let mut command = std::process::Command::new(&name);
    command.args(["dump", "-R", "-t", &run.pid.to_string(), "-D"]).arg(&images);
    let output = process::run(&mut command, std::time::Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(output.code, Some(1), "{}", output.text);
    assert!(output.text.contains("doesn't live in IPC ns"), "{}", output.text);
    run.check(How::Running);
}

#[test]
fn packed() {
    for name in ["sysv", "sysv_removed", "sysv_huge", "sysv_pieces", "aio"] {
        let mut run = Run::start(name);
        let images = run.images("images");
        run.dump_with(&Engine::ours(), &images, &["--compress"]);
        run.restore(&Engine::ours(), &images);
        run.check(How::Restored);
    }
}

#[test]
fn a_segment_that_others_use_keeps_what_they_wrote() {
    let (mut run, images, _, id) = dumped();
    let at = process::attach_segment(id);
    // beyond what the guest looks at
    let word = |write: Option<u8>| process::byte_of_segment(at, 6 << 20, write);
    assert_eq!(word(Some(42)), 42);
    run.restore(&Engine::ours(), &images);
    assert_eq!(word(None), 42, "the segment is ours, too");
    process::detach_segment(at);
    process::remove_segment(id);
    drop(run);
}
