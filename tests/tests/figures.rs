//! What dumps and restores say of themselves: progress, statistics, logs of each process.

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::run::Run;

fn output(engine: &Engine, verb: &str, images: &Path, options: &[&str]) -> Output {
    std::fs::create_dir_all(images).unwrap_or_else(|e| panic!("{}: {e}", images.display()));
    let output = engine.command(verb, images, options).output();
    output.unwrap_or_else(|e| panic!("{}: {e}", engine.path.display()))
}

/// The same program, by the other name.
fn as_criu(run: &Run) -> Engine {
    let path = run.folder.join("criu");
    let ours = Engine::ours();
    std::os::unix::fs::symlink(&ours.path, &path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Engine { path, ..ours }
}

/// Events, each a line; what they must all have is looked at.
fn events(text: &[u8], verb: &str) -> Vec<Value> {
    let text = String::from_utf8_lossy(text);
    let events: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}"))).collect();
    let mut before = 0;
    for event in &events {
        assert_eq!(event["verb"], verb, "{text}");
        let (bytes, total, at) = (event["bytes"].as_u64(), event["total"].as_u64(), event["us"].as_u64());
        assert!(bytes <= total && at >= Some(before), "{text}");
        before = at.unwrap_or(0);
    }
    events
}

fn phases(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|e| e["event"] == "phase").filter_map(|e| e["phase"].as_str()).collect()
}

#[test]
fn events_of_a_dump_and_a_restore() {
    for packed in ["--compress", "--no-compress"] {
        let mut run = Run::start("memory_private");
        let (engine, images) = (Engine::ours(), run.images("images"));
        let pid = run.pid.to_string();
        let dumped = output(&engine, "dump", &images, &["-t", &pid, "--progress", "json", packed]);
        let dump = events(&dumped.stderr, "dump");
        assert!(dumped.status.success(), "{dump:?}");
        let order = ["freezing", "reading", "infecting", "asking", "metadata", "memory", "inventory", "ending"];
        assert_eq!(phases(&dump), order);
        let memory: Vec<&Value> = dump.iter().filter(|e| e["phase"] == "memory").collect();
        assert_eq!(memory.first().map(|e| &e["event"]), Some(&Value::from("start")));
        let end = memory.iter().find(|e| e["event"] == "phase").map(|e| (e["bytes"].as_u64(), e["total"].as_u64()));
        assert!(end.is_some_and(|(bytes, total)| bytes == total && bytes > Some(4 << 20)), "{memory:?}");
        assert_eq!(dump.last().map(|e| &e["event"]), Some(&Value::from("done")));

        run.tree = vec![run.pid];
        let _ = standstill_tests::process::wait_gone(&run.tree, std::time::Duration::from_secs(10));
        let restored = output(&engine, "restore", &images, &["-d", "--progress", "json:2"]);
        let restore = events(&restored.stderr, "restore");
        assert!(restored.status.success(), "{restore:?}");
        let order = ["reading", "birth", "opening", "planning", "forking", "filling", "settling", "registers", "going"];
        assert_eq!(phases(&restore), order);
        assert_eq!(restore.last().map(|e| &e["event"]), Some(&Value::from("done")));
        run.check(How::Restored);
    }
}

#[test]
fn an_error_is_the_last_event() {
    let run = Run::start("limits");
    let images = run.images("images");
    let failed = output(&Engine::ours(), "restore", &images, &["-d", "--progress", "json"]);
    assert!(!failed.status.success());
    let lines = String::from_utf8_lossy(&failed.stderr).into_owned();
    let last = lines.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
    assert!(last.contains(r#""event":"failed""#), "{lines}");
    let pid = run.pid.to_string();
    let closed = output(&Engine::ours(), "dump", &images, &["-t", &pid, "--progress", "json:99"]);
    assert!(!closed.status.success() && String::from_utf8_lossy(&closed.stderr).contains("descriptor 99 is not open"));
    run_on(run);
}

fn run_on(mut run: Run) {
    run.check(How::Running);
}

/// Where no terminal is, no bar is; and CRIU's name knows none of it.
#[test]
fn no_bars_in_files() {
    let run = Run::start("limits");
    let pid = run.pid.to_string();
    for options in [&["-t", &pid, "-R"][..], &["-t", &pid, "-R", "--progress", "bar"]] {
        let dumped = output(&Engine::ours(), "dump", &run.images("images"), options);
        assert!(dumped.status.success() && dumped.stderr.is_empty(), "{}", String::from_utf8_lossy(&dumped.stderr));
    }
    let refused = output(&as_criu(&run), "dump", &run.images("images"), &["-t", &pid, "-R", "--progress", "json"]);
    assert!(!refused.status.success());
    run_on(run);
}

fn names(text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    text.lines().map(|line| line.split(": ").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn statistics_as_criu_prints_them() {
    let mut run = Run::start("memory_private");
    let (criu, images, pid) = (as_criu(&run), run.images("images"), run.pid.to_string());
    let dumped = output(&criu, "dump", &images, &["-t", &pid, "--display-stats", "--status-fd", "2"]);
    assert_eq!(
        names(&dumped.stdout),
        [
            "Displaying dump stats:",
            "Freezing time",
            "Frozen time",
            "Memory dump time",
            "Memory write time",
            "IRMAP resolve time",
            "Memory pages scanned",
            "Memory pages skipped from parent",
            "Memory pages written",
            "Lazy memory pages",
        ]
    );
    let _ = standstill_tests::process::wait_gone(&run.tree, std::time::Duration::from_secs(10));
    let restored = output(&criu, "restore", &images, &["-d", "--display-stats"]);
    assert_eq!(
        names(&restored.stdout),
        [
            "Displaying restore stats:",
            "Pages compared",
            "Pages skipped COW",
            "Pages restored",
            "Restore time",
            "Forking time",
        ]
    );
    run.check(How::Restored);
}

/// Every restored process has a log of its own, which says more from the third level on.
#[test]
fn a_log_for_each_process() {
    let mut run = Run::start("tree");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &images);
    if let Err(e) = engine.restore(&images, &["--log-pid"]) {
        panic!("{e}");
    }
    for pid in run.tree.iter().filter(|pid| standstill_tests::process::alive(**pid)) {
        let log = std::fs::read_to_string(images.join(format!("restore.log.{pid}"))).unwrap_or_default();
        assert!(log.contains("comes back"), "{pid}: {log:?}");
    }
    run.check(How::Restored);
}
