//! How long it takes: tests/soak/storage.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use standstill_tests::engine::Engine;
use standstill_tests::process::{self, within};
use standstill_tests::s3::{ACCESS_KEY, S3};

/// Fills memory, half of it with what does not shrink; says when it is done, and what it has when it is asked.
const PROGRAM: &str = r#"
import hashlib, os, sys, time
mib, folder = int(sys.argv[1]), sys.argv[2]
parts = [bytearray(os.urandom(1 << 20)) if n % 2 else bytearray((b"%07d\n" % n) * (1 << 17)) for n in range(mib)]
def tell(name):
    digest = hashlib.md5()
    for part in parts:
        digest.update(part)
    with open(os.path.join(folder, name + ".new"), "w") as file:
        file.write(digest.hexdigest())
    os.rename(os.path.join(folder, name + ".new"), os.path.join(folder, name))
tell("before")
asked = 0
while True:
    time.sleep(0.02)
    if os.path.exists(os.path.join(folder, "ask%d" % asked)):
        tell("answer%d" % asked)
        asked += 1
"#;

fn timed(command: &mut Command) -> Duration {
    let begun = Instant::now();
    let output = command.output().unwrap_or_else(|e| panic!("{e}"));
    let took = begun.elapsed();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    took
}

fn bytes_of(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|m| m.len().min(m.blocks() * 512)).sum()
}

#[test]
#[ignore = "takes gigabytes: tests/soak/storage"]
fn figures() {
    process::adopt();
    std::env::set_var("AWS_ACCESS_KEY_ID", ACCESS_KEY);
    std::env::set_var("AWS_SECRET_ACCESS_KEY", "test-secret");
    let mib = std::env::var("STANDSTILL_STORAGE_MIB").unwrap_or_else(|_| "1024".into());
    let folder = process::scratch("storage-figures");
    std::fs::create_dir_all(folder.join("images")).unwrap_or_else(|e| panic!("{e}"));
    let key = folder.join("key").display().to_string();
    timed(Command::new(Engine::ours().path()).args(["keygen", &key]));
    let mut command = Command::new("python3");
    command.args(["-c", PROGRAM, &mib]).arg(&folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // waited for when it is dead
    #[allow(clippy::zombie_processes)]
    let child = process::in_own_session(&mut command).spawn().unwrap_or_else(|e| panic!("{e}"));
    let pid = i32::try_from(child.id()).unwrap_or(0);
    assert!(within(Duration::from_secs(120), || folder.join("before").exists()), "it does not get ready");
    let before = std::fs::read_to_string(folder.join("before")).unwrap_or_default();
    println!("| where | dump s | restore s | bytes |\n| --- | ---: | ---: | ---: |");
    for (asked, (name, storage, words)) in [
        ("folder", false, &[][..]),
        ("folder, packed", false, &["--compress"]),
        ("folder, sealed", false, &["--key-file", &key]),
        ("folder, packed and sealed", false, &["--compress", "--key-file", &key]),
        ("S3", true, &[]),
        ("S3, packed and sealed", true, &["--compress", "--key-file", &key]),
    ]
    .into_iter()
    .enumerate()
    {
        let server = S3::start();
        let images = folder.join(format!("images{asked}"));
        std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        let options: Vec<String> = server
            .options()
            .into_iter()
            .flat_map(|(option, value)| ["--storage-option".to_owned(), format!("{option}={value}")])
            .collect();
        let pid_text = pid.to_string();
        let command = |verb: &str, more: &[&str]| {
            let mut command = Engine::ours().command(verb, &images, more);
            if storage {
                command.arg(if verb == "dump" { "--to" } else { "--from" }).arg("s3://bucket/it").args(&options);
            }
            command
        };
        let dump = timed(command("dump", &["-t", &pid_text]).args(words));
        let _ = process::wait_gone(&[pid], Duration::from_secs(10));
        let size = if storage { server.objects().values().map(|o| o.len() as u64).sum() } else { bytes_of(&images) };
        let keys: Vec<&str> = words.iter().copied().filter(|word| *word != "--compress").collect();
        let restore = timed(command("restore", &["-d"]).args(&keys).stdin(Stdio::null()));
        std::fs::write(folder.join(format!("ask{asked}")), "").unwrap_or_else(|e| panic!("{e}"));
        let answer = folder.join(format!("answer{asked}"));
        assert!(within(Duration::from_secs(60), || answer.exists()), "it does not answer");
        assert_eq!(std::fs::read_to_string(&answer).unwrap_or_default(), before, "its memory is another one");
        println!("| {name} | {:.2} | {:.2} | {} MiB |", dump.as_secs_f64(), restore.as_secs_f64(), size >> 20);
        if asked == 0 {
            let copy = timed(Command::new("cp").arg("-r").arg(&images).arg(folder.join("copy")));
            println!("| plain copy of that folder | {:.2} | | {} MiB |", copy.as_secs_f64(), size >> 20);
            let _ = std::fs::remove_dir_all(folder.join("copy"));
        }
        let _ = std::fs::remove_dir_all(&images);
    }
    process::end(&[pid]);
    let _ = std::fs::remove_dir_all(&folder);
}
