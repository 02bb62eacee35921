//! A checkpoint that CRIU 4.2 made is restored by us: tests/fixtures/checkpoints/process, in a new pid namespace.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::process;
use standstill_tests::skip::skip;

/// Where the program was when it was dumped; its images name this folder.
const FOLDER: &str = "/tmp/standstill-fixture";

/// Its first process.
const PID: u32 = 26692;

/// In the new namespace: restores, asks the program to check itself, and waits for its word.
const SCRIPT: &str = r#"
"$1" restore -d -D "$2" -o restore.log -v4 || exit 3
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

#[test]
fn a_checkpoint_of_criu() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/checkpoints/process");
    let folder = PathBuf::from(FOLDER);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{e}"));
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
    copy(&fixture.join("guest"), &folder.join("guest"), 0o755);
    copy(&fixture.join("kept"), &folder.join("kept"), 0o640);
    let images = process::scratch("fixture");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    for entry in fs::read_dir(fixture.join("images")).unwrap_or_else(|e| panic!("{e}")).flatten() {
        copy(&entry.path(), &images.join(entry.file_name()), 0o600);
    }
    let can = Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).status();
    if !can.is_ok_and(|s| s.success()) {
        skip("a_checkpoint_of_criu", "unshare cannot make a pid namespace here");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SCRIPT, "sh"]);
    command.arg(Engine::ours().path).arg(&images).arg(PID.to_string()).arg(&folder);
    let output = process::run(&mut command, Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    if !std::is_x86_feature_detected!("avx512f") {
        assert_eq!(output.code, Some(3), "{}", output.text);
        assert!(
            output.text.contains("AVX-512") || output.text.contains("avx512"),
            "the refusal names it: {}",
            output.text
        );
        skip("a_checkpoint_of_criu", "this CPU has no AVX-512, which the checkpoint uses; the refusal says so");
        return;
    }
    assert_eq!(output.code, Some(0), "{}\n{log}", output.text);
    assert_eq!(fs::read_to_string(folder.join("result")).unwrap_or_default(), "ok");
    let _ = fs::remove_dir_all(&folder);
    let _ = fs::remove_dir_all(&images);
}
