//! Checkpoints that CRIU 4.2 made are restored by us: tests/fixtures/checkpoints, in new pid and network namespaces.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::process;
use standstill_tests::skip::skip;

/// A program that CRIU has dumped.
struct Fixture {
    /// Its folder below fixtures/checkpoints.
    name: &'static str,
    /// Where the program was when it was dumped; its images name this folder.
    folder: &'static str,
    /// Its first process.
    pid: u32,
    /// Files that must be there, and their modes.
    files: &'static [(&'static str, u32)],
    /// What a restore needs.
    options: &'static str,
}

/// In the new namespaces: restores, asks the program to check itself, and waits for its word.
const SCRIPT: &str = r#"
ip link set lo up 2>/dev/null
"$1" restore -d -D "$2" -o restore.log -v4 $5 || exit 3
kill -TERM "$3" || exit 4
for i in $(seq 3000); do
    [ -s "$4/result" ] && exit 0
    sleep 0.01
done
cat "/proc/$3/status" "/proc/$3/wchan" 2>&1
exit 5
"#;

fn copy(from: &Path, to: &Path, mode: u32) {
    fs::copy(from, to).unwrap_or_else(|e| panic!("{} → {}: {e}", from.display(), to.display()));
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).unwrap_or_else(|e| panic!("{e}"));
}

fn restores(fixture: &Fixture, test: &str) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/checkpoints").join(fixture.name);
    let folder = PathBuf::from(fixture.folder);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{e}"));
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
    for (file, mode) in fixture.files {
        let to = folder.join(Path::new(file).file_name().unwrap_or_default());
        if *file == "fifo" {
            let made = Command::new("mkfifo").args(["-m", "644"]).arg(&to).status();
            assert!(made.is_ok_and(|s| s.success()), "mkfifo");
        } else {
            copy(&from.join(file), &to, *mode);
        }
    }
    let images = process::scratch(test);
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    for entry in fs::read_dir(from.join("images")).unwrap_or_else(|e| panic!("{e}")).flatten() {
        copy(&entry.path(), &images.join(entry.file_name()), 0o600);
    }
    let can = Command::new("unshare").args(["--pid", "--net", "--fork", "--mount-proc", "true"]).status();
    if !can.is_ok_and(|s| s.success()) {
        skip(test, "unshare cannot make pid and network namespaces here");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--net", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SCRIPT, "sh"]);
    command.arg(Engine::ours().path).arg(&images).arg(fixture.pid.to_string()).arg(&folder).arg(fixture.options);
    let output = process::run(&mut command, Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    if !std::is_x86_feature_detected!("avx512f") {
        assert_eq!(output.code, Some(3), "{}", output.text);
        assert!(
            output.text.contains("AVX-512") || output.text.contains("avx512"),
            "the refusal names it: {}",
            output.text
        );
        skip(test, "this CPU has no AVX-512, which the checkpoint uses; the refusal says so");
        return;
    }
    assert_eq!(output.code, Some(0), "{}\n{log}", output.text);
    assert_eq!(fs::read_to_string(folder.join("result")).unwrap_or_default(), "ok");
    let _ = fs::remove_dir_all(&folder);
    let _ = fs::remove_dir_all(&images);
}

#[test]
fn a_checkpoint_of_criu() {
    let fixture = Fixture {
        name: "process",
        folder: "/tmp/standstill-fixture",
        pid: 26692,
        files: &[("guest", 0o755), ("kept", 0o640)],
        options: "",
    };
    restores(&fixture, "a_checkpoint_of_criu");
}

#[test]
fn a_checkpoint_of_sockets() {
    let fixture = Fixture {
        name: "sockets",
        folder: "/tmp/standstill-sockets",
        pid: 27700,
        files: &[("guest", 0o755), ("files/locked", 0o644), ("files/watched", 0o644), ("fifo", 0o644)],
        options: "--tcp-established --file-locks --shell-job",
    };
    restores(&fixture, "a_checkpoint_of_sockets");
}
