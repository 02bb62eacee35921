//! Engines that die in the middle of a dump, or of a restore, of what they must touch: nothing of it is lost, and nothing
//! happens twice.

use std::process::Stdio;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;

/// Kills engines at moments all over a dump; the guest's own check tells.
fn killed_all_over(name: &str) {
    let mut run = Run::start(name);
    std::fs::write(run.file("engines-die"), "").unwrap_or_else(|e| panic!("{e}"));
    let (engine, images) = (Engine::ours(), run.images("images"));
    std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = run.pid.to_string();
    for n in 0..80u64 {
        let mut command = engine.command("dump", &images, &["-R", "-t", &pid, "--file-locks", "--link-remap"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_micros(n * 397 % 24_000));
        let _ = child.kill();
        child.wait().unwrap_or_else(|e| panic!("{e}"));
        assert!(process::alive(run.pid), "{name} is dead after dump {n}");
    }
    // who was in the executor is back in its program by then
    std::thread::sleep(Duration::from_millis(100));
    run.check(How::Running);
}

/// Kills engines at moments all over a restore: it is as if they had not been there, or the guest is.
fn restore_killed_all_over(name: &str) {
    let mut run = Run::start(name);
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump_with(&engine, &images, &["--file-locks", "--link-remap"]);
    let mut whole = 0;
    for n in 0..40u64 {
        let mut command = engine.command("restore", &images, &["-d", "--file-locks", "--link-remap"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_micros(n * 1_597 % 60_000));
        let _ = child.kill();
        child.wait().unwrap_or_else(|e| panic!("{e}"));
        if process::wait_gone(&run.tree, Duration::from_secs(1)).is_err() {
            // it had been let go: then all of it is there
            let now = process::tree(run.pid);
            assert!(run.tree.iter().all(|pid| now.contains(pid)), "{name} is half there after restore {n}: {now:?}");
            run.kill(&images);
            whole += 1;
        }
    }
    assert!(whole < 40, "none was killed early");
    run.restore_with(&engine, &images, &["--file-locks", "--link-remap"]);
    run.check(How::Restored);
}

macro_rules! killed {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                killed_all_over(stringify!($name));
            }
        )*
        mod restores {
            $(
                #[test]
                fn $name() {
                    crate::restore_killed_all_over(stringify!($name));
                }
            )*
        }
    };
}

killed! {
    aio
    fanotify
    inotify
    lease
    lease_breaking
    locks_flock
    locks_ofd
    locks_posix
    pipes_packets
    sysv
    tty_controlling
    tty_data
}
