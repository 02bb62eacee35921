//! `--json` and `--metrics`: how a verb ended, for programs and for Prometheus.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process::{self, within};
use standstill_tests::run::Run;

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a verb; its exit code, and the object that it ends with.
fn verb(name: &str, images: &Path, options: &[&str]) -> (Option<i32>, Value) {
    std::fs::create_dir_all(images).unwrap_or_else(|e| panic!("{e}"));
    let mut command = Engine::ours().command(name, images, options);
    let output = process::run(command.arg("--json"), LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let last = output.text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    let object: Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{name}: {e}: {}", output.text));
    assert_eq!(object["verb"], name, "{object}");
    assert_eq!(object["result"], if output.code == Some(0) { "done" } else { "failed" }, "{object}");
    (output.code, object)
}

/// The samples of a file, which all have a family with a type.
fn samples(path: &Path) -> BTreeMap<String, f64> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut all = BTreeMap::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap_or_default().to_owned();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(name.starts_with(&format!("{family}{{verb=\"")) && name.ends_with('}'), "{line} in {family}");
            let value = value.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
            assert!(all.insert(name.to_owned(), value).is_none(), "{line} is there twice");
        }
    }
    all
}

fn sample(all: &BTreeMap<String, f64>, name: &str) -> f64 {
    all.get(name).copied().unwrap_or_else(|| panic!("no {name} in {all:#?}"))
}

fn metrics(run: &Run) -> PathBuf {
    run.folder.join("standstill.prom")
}

#[test]
fn dumps_and_restores() {
    let mut run = Run::start("memory_private");
    let (pid, path) = (run.pid.to_string(), metrics(&run));
    let file = path.to_string_lossy().into_owned();
    let first = run.images("1");
    let (code, object) = verb("pre-dump", &first, &["-t", &pid, "--metrics", &file]);
    assert_eq!(code, Some(0), "{object}");
    assert!(object["pages"].as_u64().is_some_and(|n| n > 0) && object["phases"]["memory"].is_number(), "{object}");

    let second = run.images("2");
    let (code, object) = verb("dump", &second, &["-t", &pid, "-R", "--prev-images-dir", "../1", "--metrics", &file]);
    assert_eq!(code, Some(0), "{object}");
    let number = |key: &str| object[key].as_f64().unwrap_or_else(|| panic!("no {key} in {object}"));
    assert!(number("frozen_seconds") > 0.0 && number("seconds") >= number("frozen_seconds"), "{object}");
    assert!(number("bytes") > 4096.0 && number("tasks") >= 1.0, "{object}");
    for phase in ["freezing", "reading", "infecting", "asking", "metadata", "memory", "inventory", "ending"] {
        assert!(object["phases"][phase].is_number(), "no {phase} in {object}");
    }
    assert_eq!(object["images"].as_str(), second.to_str());
    let all = samples(&path);
    assert!((sample(&all, "standstill_success{verb=\"dump\"}") - 1.0).abs() < f64::EPSILON);
    assert!((sample(&all, "standstill_frozen_seconds{verb=\"dump\"}") - number("frozen_seconds")).abs() < 1e-5);
    assert!(sample(&all, "standstill_phase_duration_seconds{verb=\"dump\",phase=\"freezing\"}") > 0.0);
    assert!(sample(&all, "standstill_pages{verb=\"pre-dump\"}") > 0.0);
    let success = sample(&all, "standstill_last_success_timestamp_seconds{verb=\"dump\"}");

    // nobody has this id
    let (code, object) = verb("dump", &run.images("3"), &["-t", "2147483647", "--metrics", &file]);
    assert_eq!(code, Some(1), "{object}");
    let error = object["error"].as_array().cloned().unwrap_or_default();
    assert!(error.iter().any(|link| link.as_str().is_some_and(|l| l.contains("there is no process"))), "{object}");
    let all = samples(&path);
    assert!(sample(&all, "standstill_success{verb=\"dump\"}").abs() < f64::EPSILON);
    let still = sample(&all, "standstill_last_success_timestamp_seconds{verb=\"dump\"}");
    assert!((success - still).abs() < 1e-3, "{success} {still}");
    for result in ["done", "failed"] {
        let count = sample(&all, &format!("standstill_runs_total{{verb=\"dump\",result=\"{result}\"}}"));
        assert!((count - 1.0).abs() < f64::EPSILON, "{result}: {count}");
    }

    run.kill(&second);
    let (code, object) = verb("restore", &second, &["-d", "--metrics", &file]);
    assert_eq!(code, Some(0), "{object}");
    assert_eq!(object["pid"].as_i64(), Some(run.pid.into()), "{object}");
    assert!(object["phases"]["forking"].is_number(), "{object}");
    let all = samples(&path);
    assert!(sample(&all, "standstill_bytes{verb=\"restore\"}") >= 4096.0);
    // it is there already
    let (code, object) = verb("restore", &second, &["-d", "--metrics", &file]);
    assert_eq!(code, Some(1), "{object}");
    let all = samples(&path);
    assert!(sample(&all, "standstill_success{verb=\"restore\"}").abs() < f64::EPSILON);
    run.check(How::Restored);
}

/// Who waits for the program tells of the restore when that is done, not when the program has ended.
#[test]
fn told_when_it_runs() {
    let mut run = Run::start("pipes");
    let images = run.images("images");
    run.dump(&Engine::ours(), &images);
    let path = metrics(&run);
    let mut command = Engine::ours().command("restore", &images, &["--json", "--metrics"]);
    command.arg(&path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
    assert!(within(LIMIT, || path.exists() && process::alive(run.pid)), "no metrics while it runs");
    let all = samples(&path);
    assert!((sample(&all, "standstill_success{verb=\"restore\"}") - 1.0).abs() < f64::EPSILON);
    // it is a child of the engine, which is the one who hears of its end
    let (new, check) = (run.file("check.new"), run.file("check"));
    std::fs::write(&new, "restored").and_then(|()| std::fs::rename(&new, &check)).unwrap_or_else(|e| panic!("{e}"));
    let output = child.wait_with_output().unwrap_or_else(|e| panic!("{e}"));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((object["result"].as_str(), object["exit_code"].as_i64()), (Some("done"), Some(0)), "{object}");
    let result = std::fs::read_to_string(run.file("result")).unwrap_or_default();
    assert_eq!(result, "ok");
    assert!((sample(&samples(&path), "standstill_runs_total{verb=\"restore\",result=\"done\"}") - 1.0).abs() < 0.5);
}

#[test]
fn each_of_a_series() {
    let mut run = Run::start("pipes");
    let (images, path, pid) = (run.images("series"), metrics(&run), run.pid.to_string());
    std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let mut command = Engine::ours().command("dump", &images, &["-t", &pid, "--every", "50ms", "--json", "--metrics"]);
    command.arg(&path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
    let name = "standstill_runs_total{verb=\"dump\",result=\"done\"}";
    // the figures come before the object: when those of the fourth are there, the object of the third is
    let four = || path.exists() && samples(&path).get(name).is_some_and(|count| *count >= 4.0);
    assert!(within(LIMIT, four), "no four dumps");
    let _ = child.kill();
    let output = child.wait_with_output().unwrap_or_else(|e| panic!("{e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let whole = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let done: Vec<Value> = whole.filter(|object| object["result"] == "done").collect();
    assert!(done.len() >= 3, "{text}");
    assert!(done.iter().all(|object| object["images"].as_str().is_some_and(|d| d.contains("series/0000"))), "{text}");
    run.check(How::Running);
}

#[test]
fn smaller_verbs() {
    let mut run = Run::start("memory_private");
    let pid = run.pid.to_string();
    let (first, second) = (run.images("1"), run.images("2"));
    assert_eq!(verb("pre-dump", &first, &["-t", &pid]).0, Some(0));
    assert_eq!(verb("dump", &second, &["-t", &pid, "-R", "--track-mem", "--prev-images-dir", "../1"]).0, Some(0));
    let (code, object) = verb("dedup", &second, &[]);
    assert!(code == Some(0) && object["freed"].is_number(), "{object}");
    let (code, object) = verb("untrack", &second, &["-t", &pid]);
    assert!(code == Some(0) && object["pid"].as_i64() == Some(run.pid.into()), "{object}");
    // who held it may take a moment to be gone
    let nothing_left = || {
        let (code, object) = verb("untrack", &second, &["-t", &pid]);
        code == Some(1) && object["error"][0] == "no memory is tracked there"
    };
    assert!(within(LIMIT, nothing_left), "it is still tracked");
    let (code, object) = verb("dump", &second, &[]);
    assert!(code == Some(1) && object["error"].is_array(), "{object}");
    run.check(How::Running);
}
