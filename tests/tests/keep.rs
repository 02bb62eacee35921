//! `list` and `prune`: a guest is dumped again and again, what can go goes, and from what is kept it comes back.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;

const LIMIT: Duration = Duration::from_secs(60);

/// A verb of ours with its own options: exit code and what it printed.
fn verb(words: &[&str], folder: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(Engine::ours().path());
    command.args(words).arg(folder).args(more);
    let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    (output.code, output.text)
}

/// The object that it ends with.
fn object(words: &[&str], folder: &Path, more: &[&str]) -> Value {
    let (code, text) = verb(words, folder, &[more, &["--json"]].concat());
    assert_eq!(code, Some(0), "{words:?}: {text}");
    let last = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{words:?}: {e}: {text}"))
}

/// Names and states of all checkpoints.
fn states(folder: &Path) -> Vec<(String, String)> {
    let found = object(&["list"], folder, &[]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rows = found["checkpoints"].as_array().cloned().unwrap_or_default();
    rows.iter().map(|row| (text(&row["name"]), text(&row["state"]))).collect()
}

/// Dumps a guest, which goes on, into folders of a series: two chains of two, and one by itself.
fn series(run: &Run) -> std::path::PathBuf {
    let engine = Engine::ours();
    let folder = run.images("series");
    for (name, parent) in
        [("000001", None), ("000002", Some("../000001")), ("000003", None), ("000004", Some("../000003")), ("5", None)]
    {
        let mut options = vec!["-R", "--track-mem"];
        options.extend(parent.iter().flat_map(|parent| ["--prev-images-dir", parent]));
        engine.dump(run.pid, &folder.join(name), &options).unwrap_or_else(|e| panic!("{e}"));
    }
    folder
}

#[test]
fn what_is_there() {
    let run = Run::start("pipes");
    let folder = series(&run);
    let found = object(&["list"], &folder, &[]);
    assert_eq!((found["verb"].as_str(), found["result"].as_str()), (Some("list"), Some("done")));
    let rows = found["checkpoints"].as_array().cloned().unwrap_or_default();
    assert_eq!(rows.len(), 5, "{found}");
    for row in &rows {
        assert_eq!(row["state"], "whole", "{row}");
        assert_eq!(row["root"].as_i64(), Some(run.pid.into()), "{row}");
        assert_eq!(row["command"], "guest", "{row}");
        assert_eq!(row["tasks"].as_u64(), Some(run.tree.len() as u64), "{row}");
        assert!(row["bytes"].as_u64().is_some_and(|bytes| bytes > 4096), "{row}");
        assert!(row["when"].as_str().is_some_and(|when| when.starts_with("20") && when.ends_with('Z')), "{row}");
        assert_eq!((row["compressed"].as_bool(), row["gpu"].as_bool()), (Some(false), Some(false)));
        assert_eq!(row["namespaces"], Value::Array(Vec::new()));
    }
    // "5" comes behind "000004": names are numbers
    assert_eq!((rows[3]["parent"].as_str(), rows[4]["name"].as_str()), (Some("../000003"), Some("5")));
    let (code, table) = verb(&["list"], &folder, &[]);
    assert_eq!((code, table.lines().count()), (Some(0), 6), "{table}");
    assert!(table.lines().nth(2).is_some_and(|line| line.contains("whole") && line.contains("../000001")), "{table}");
    // one by itself, with what it builds on
    assert_eq!(states(&folder.join("000002")).len(), 2);
    let (code, text) = verb(&["list"], &folder.join("nothing"), &["--json"]);
    assert_eq!(code, Some(1), "{text}");
    let last: Value = serde_json::from_str(text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default())
        .unwrap_or_default();
    assert_eq!(last["result"], "failed", "{text}");
    let mut run = run;
    run.check(How::Running);
}

#[test]
fn what_goes_and_what_stays() {
    let mut run = Run::start("pipes");
    let folder = series(&run);
    let all = states(&folder);
    let tried = object(&["prune"], &folder, &["--keep", "2", "--dry-run"]);
    assert_eq!(tried["removed"], serde_json::json!(["000002", "000001"]), "{tried}");
    assert_eq!(states(&folder), all, "a dry run removed something");
    let done = object(&["prune"], &folder, &["--keep", "2"]);
    assert_eq!((&done["removed"], &done["kept"]), (&tried["removed"], &serde_json::json!(["000003", "000004", "5"])));
    assert!(done["bytes"].as_u64().is_some_and(|bytes| bytes > 4096), "{done}");
    let left: Vec<String> = states(&folder).into_iter().map(|(name, _)| name).collect();
    assert_eq!(left, ["000003", "000004", "5"]);
    for (more, word) in [(&["--keep", "0"][..], "keep"), (&[], "--keep")] {
        let (code, text) = verb(&["prune"], &folder, more);
        assert!(code != Some(0) && text.contains(word), "{more:?}: {text}");
    }
    let (code, text) = verb(&["prune"], &folder.join("000004"), &["--keep", "1"]);
    assert!(code == Some(1) && text.contains("is a checkpoint itself"), "{text}");
    let (code, text) = verb(&["prune"], &run.folder.join("files"), &["--keep", "1"]);
    assert!(code == Some(1) && text.contains("is no series"), "{text}");
    // an earlier one, which builds on another
    let earlier = folder.join("000004");
    run.kill(&earlier);
    run.restore(&Engine::ours(), &earlier);
    run.check(How::Restored);
}

/// Whoever removes is killed at moments all over it: what is left is whole, or has no inventory.
#[test]
fn killed_on_the_way() {
    let mut run = Run::start("pipes");
    let whole = series(&run);
    let copy = run.images("copy");
    let refill = || {
        let _ = std::fs::remove_dir_all(&copy);
        let done = Command::new("cp").arg("-a").arg(&whole).arg(&copy).status();
        assert!(done.is_ok_and(|status| status.success()), "cp");
    };
    let prune = || {
        let mut command = Command::new(Engine::ours().path());
        command.arg("prune").arg(&copy).args(["--keep", "1"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap_or_else(|e| panic!("{e}"))
    };
    refill();
    let began = Instant::now();
    let status = prune().wait();
    assert!(status.is_ok_and(|status| status.success()));
    let took = began.elapsed();
    for n in 0..20 {
        refill();
        let mut child = prune();
        std::thread::sleep(took * n / 20);
        let _ = child.kill();
        let _ = child.wait();
        for (name, state) in states(&copy) {
            let has = copy.join(&name).join("inventory.img").exists();
            assert!(state == "whole" || !has, "round {n}: {name} is {state} and has an inventory");
        }
        assert!(states(&copy).contains(&("5".to_owned(), "whole".to_owned())), "round {n}: the last one is gone");
        // and the next one ends what this one began
        let removed = object(&["prune"], &copy, &["--keep", "1"]);
        assert_eq!(removed["kept"], serde_json::json!(["5"]), "round {n}");
        assert_eq!(states(&copy), [("5".to_owned(), "whole".to_owned())], "round {n}");
    }
    run.kill(&copy.join("5"));
    run.restore(&Engine::ours(), &copy.join("5"));
    run.check(How::Restored);
}

/// What a snapshot copies ahead is part of its checkpoint, which is whole.
#[test]
fn snapshots() {
    let mut run = Run::start("memory_private");
    let folder = run.images("series");
    for name in ["000001", "000002"] {
        Engine::ours().dump(run.pid, &folder.join(name), &["-R", "--snapshot"]).unwrap_or_else(|e| panic!("{e}"));
    }
    let whole = |name: &str| (name.to_owned(), "whole".to_owned());
    assert_eq!(states(&folder), [whole("000001"), whole("000002")]);
    let done = object(&["prune"], &folder, &["--keep", "1"]);
    assert_eq!(done["removed"], serde_json::json!(["000001"]), "{done}");
    assert_eq!(states(&folder), [whole("000002")]);
    run.kill(&folder.join("000002"));
    // the last whole one of the series
    run.restore(&Engine::ours(), &folder);
    run.check(How::Restored);
}

/// CRIU knows none of these verbs.
#[test]
fn not_as_criu() {
    let folder = process::scratch("not_as_criu");
    std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{e}"));
    let criu = folder.join("criu");
    std::os::unix::fs::symlink(Engine::ours().path(), &criu).unwrap_or_else(|e| panic!("{e}"));
    for word in ["list", "prune", "verify"] {
        let mut command = Command::new(&criu);
        let output = process::run(command.args([word, "."]), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(1), "{word}: {}", output.text);
        assert!(output.text.contains(&format!("unknown command: {word}")), "{word}: {}", output.text);
    }
    let _ = std::fs::remove_dir_all(&folder);
}
