//! `--metrics FILE`: figures of a run in Prometheus' text exposition format, for the textfile collector of its node exporter.
//!
//! The file is replaced as a whole, so that nobody reads half of it. What earlier runs left in it of other verbs stays; of the same
//! verb, how many there were and when the last one succeeded. Figures of a run that failed are those that it came to.
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{At as _, Call as _, Place, Result};

/// A file of ours is never larger.
const LARGEST: u64 = 1 << 20;

/// Every family of samples: name, type, what it says.
const FAMILIES: &[(&str, &str, &str)] = &[
    (RUNS, "counter", "Runs by how they ended."),
    ("standstill_success", "gauge", "Whether the last run succeeded."),
    ("standstill_last_run_timestamp_seconds", "gauge", "When the last run ended."),
    (LAST_SUCCESS, "gauge", "When a run succeeded last."),
    ("standstill_duration_seconds", "gauge", "How long the last run took."),
    ("standstill_frozen_seconds", "gauge", "How long the tree stood still in the last run."),
    ("standstill_phase_duration_seconds", "gauge", "How long a phase of the last run took."),
    ("standstill_pages", "gauge", "Pages of memory that the last run wrote or read."),
    ("standstill_pages_in_parent", "gauge", "Pages that the checkpoint before has."),
    ("standstill_bytes", "gauge", "Bytes on the disk, on the way, or of memory read, in the last run."),
    ("standstill_tasks", "gauge", "Processes in the last run."),
];

const RUNS: &str = "standstill_runs_total";
const LAST_SUCCESS: &str = "standstill_last_success_timestamp_seconds";

/// Figures of one run.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// How long it took.
    pub total: Duration,
    /// How long the tree stood still.
    pub frozen: Option<Duration>,
    /// How long each phase took.
    pub phases: Vec<(&'static str, Duration)>,
    /// Pages written or read.
    pub pages: Option<u64>,
    /// Pages that the checkpoint before has.
    pub in_parent: Option<u64>,
    /// How much that is where it was put.
    pub bytes: Option<u64>,
    /// Processes.
    pub tasks: Option<u64>,
}

/// Samples by family, each with its labels.
type Samples = BTreeMap<&'static str, Vec<(String, String)>>;

/// The samples of ours in a text; what is not one is left out.
fn parse(text: &str) -> Samples {
    let mut all = Samples::new();
    for line in text.lines() {
        let Some((name, rest)) = line.split_once('{') else { continue };
        let Some((labels, value)) = rest.split_once("} ") else { continue };
        let Some((family, ..)) = FAMILIES.iter().find(|(family, ..)| *family == name) else { continue };
        if labels.starts_with("verb=\"") && value.parse::<f64>().is_ok() {
            all.entry(family).or_default().push((labels.to_owned(), value.to_owned()));
        }
    }
    all
}

/// The text after one more run of a verb.
fn after(old: &str, verb: &str, well: bool, figures: &Figures, now: Duration) -> String {
    let own = format!("verb=\"{verb}\"");
    let mut all = parse(old);
    let result = |well: bool| format!("{own},result=\"{}\"", if well { "done" } else { "failed" });
    let count = |all: &Samples, labels: &str| {
        let known = all.get(RUNS).and_then(|samples| samples.iter().find(|(known, _)| known == labels));
        known.and_then(|(_, value)| value.parse::<u64>().ok()).unwrap_or(0)
    };
    let runs = [true, false].map(|kind| (result(kind), count(&all, &result(kind)) + u64::from(kind == well)));
    let is_own = |labels: &str| labels.strip_prefix(&own).is_some_and(|rest| rest.is_empty() || rest.starts_with(','));
    let success = all.get(LAST_SUCCESS).and_then(|samples| samples.iter().find(|(labels, _)| is_own(labels)).cloned());
    all.values_mut().for_each(|samples| samples.retain(|(labels, _)| !is_own(labels)));

    let seconds = |d: Duration| format!("{:.6}", d.as_secs_f64());
    let mut add = |family: &'static str, labels: &str, value: Option<String>| {
        all.entry(family).or_default().extend(value.map(|value| (labels.to_owned(), value)));
    };
    for (labels, count) in &runs {
        add(RUNS, labels, Some(count.to_string()));
    }
    add("standstill_success", &own, Some(u8::from(well).to_string()));
    add("standstill_last_run_timestamp_seconds", &own, Some(format!("{:.3}", now.as_secs_f64())));
    let success = if well { Some(format!("{:.3}", now.as_secs_f64())) } else { success.map(|(_, value)| value) };
    add(LAST_SUCCESS, &own, success);
    add("standstill_duration_seconds", &own, Some(seconds(figures.total)));
    add("standstill_frozen_seconds", &own, figures.frozen.map(seconds));
    for (phase, took) in &figures.phases {
        add("standstill_phase_duration_seconds", &format!("{own},phase=\"{phase}\""), Some(seconds(*took)));
    }
    add("standstill_pages", &own, figures.pages.map(|n| n.to_string()));
    add("standstill_pages_in_parent", &own, figures.in_parent.map(|n| n.to_string()));
    add("standstill_bytes", &own, figures.bytes.map(|n| n.to_string()));
    add("standstill_tasks", &own, figures.tasks.map(|n| n.to_string()));

    let mut text = String::new();
    for (family, kind, help) in FAMILIES {
        let Some(samples) = all.get(family).filter(|samples| !samples.is_empty()) else { continue };
        text.push_str(&format!("# HELP {family} {help}\n# TYPE {family} {kind}\n"));
        for (labels, value) in samples {
            text.push_str(&format!("{family}{{{labels}}} {value}\n"));
        }
    }
    text
}

/// Adds a run of a verb to the file, and warns if that does not work: what was done is done.
pub fn tell(path: &Path, verb: &str, well: bool, figures: &Figures) {
    if let Err(e) = write(path, verb, well, figures) {
        tracing::warn!("the metrics of this run could not be written: {}", e.chain());
    }
}

/// Adds a run of a verb to the file.
///
/// # Errors
/// If it cannot be written. It is as it was then.
pub fn write(path: &Path, verb: &str, well: bool, figures: &Figures) -> Result<()> {
    let place = || Place::Path(path.to_owned());
    let mut old = String::new();
    if let Ok(file) = File::open(path) {
        // what is not text of ours is replaced
        let _ = file.take(LARGEST).read_to_string(&mut old);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = after(&old, verb, well, figures, now);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let replace = || -> std::io::Result<()> {
        // the exporter is somebody else
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    replace().inspect_err(|_| drop(std::fs::remove_file(&new))).call("write").at(place())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(text: &str, of: &str) -> Option<String> {
        text.lines().find_map(|line| line.strip_prefix(of)).map(|rest| rest.trim().to_owned())
    }

    #[test]
    fn runs_add_up() {
        let figures = Figures {
            total: Duration::from_millis(1500),
            frozen: Some(Duration::from_millis(7)),
            phases: vec![("freezing", Duration::from_micros(12)), ("memory", Duration::from_secs(1))],
            pages: Some(3),
            bytes: Some(12_345),
            ..Figures::default()
        };
        let first = after("", "dump", true, &figures, Duration::from_secs(100));
        assert_eq!(sample(&first, "standstill_runs_total{verb=\"dump\",result=\"done\"}").as_deref(), Some("1"));
        assert_eq!(sample(&first, "standstill_runs_total{verb=\"dump\",result=\"failed\"}").as_deref(), Some("0"));
        assert_eq!(sample(&first, "standstill_duration_seconds{verb=\"dump\"}").as_deref(), Some("1.500000"));
        let phase = "standstill_phase_duration_seconds{verb=\"dump\",phase=\"freezing\"}";
        assert_eq!(sample(&first, phase).as_deref(), Some("0.000012"));
        assert_eq!(sample(&first, "standstill_tasks"), None);

        let other = after(&first, "pre-dump", true, &Figures::default(), Duration::from_secs(150));
        assert_eq!(sample(&other, phase).as_deref(), Some("0.000012"), "of another verb nothing is lost");
        let failed = after(&other, "dump", false, &Figures::default(), Duration::from_secs(200));
        assert_eq!(sample(&failed, "standstill_success{verb=\"dump\"}").as_deref(), Some("0"));
        assert_eq!(sample(&failed, "standstill_success{verb=\"pre-dump\"}").as_deref(), Some("1"));
        let success = "standstill_last_success_timestamp_seconds{verb=\"dump\"}";
        assert_eq!(sample(&failed, success).as_deref(), Some("100.000"));
        assert_eq!(sample(&failed, phase), None);
        let last = after(&failed, "dump", true, &figures, Duration::from_secs(300));
        assert_eq!(sample(&last, "standstill_runs_total{verb=\"dump\",result=\"done\"}").as_deref(), Some("2"));
        assert_eq!(sample(&last, "standstill_runs_total{verb=\"dump\",result=\"failed\"}").as_deref(), Some("1"));
        assert_eq!(sample(&last, success).as_deref(), Some("300.000"));
        // each family once, its samples together
        for (family, ..) in FAMILIES {
            assert!(last.matches(&format!("# TYPE {family} ")).count() <= 1);
        }
        assert!(!after("nonsense{ } x\n\u{1}{verb=\"", "dump", true, &figures, Duration::ZERO).contains("nonsense"));
    }

    #[test]
    fn the_file_is_replaced() {
        let folder = crate::keep::testing::scratch("metrics");
        let path = folder.join("standstill.prom");
        write(&path, "dump", true, &Figures::default()).unwrap();
        write(&path, "dump", false, &Figures::default()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("standstill_runs_total{verb=\"dump\",result=\"failed\"} 1\n"), "{text}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        assert!(write(&folder.join("no/file"), "dump", true, &Figures::default()).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
