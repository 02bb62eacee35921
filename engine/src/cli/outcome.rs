//! How a verb ended, for programs (`--json`): one object on standard output, the last line that is printed.
//!
//! `verb` and `result` (`done` or `failed`) are in each, the facts of the verb beside them; of a failure `error` is the chain of
//! causes, the outermost first. Errors are in the log, or on standard error, as without `--json`.

use super::bars::with_bars;
use super::metrics::{self, Figures};
use super::print;
use crate::error::Error;
use crate::options::Options;
use crate::progress::{self, Event, Hook, Listener, Step};
use serde_json::{json, Map, Value};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::error;

/// The object of a verb that came to its end.
pub fn done(verb: &str, facts: Value) -> Value {
    object(verb, "done", facts)
}

/// The object of a verb that did not.
pub fn failed(verb: &str, error: &Error) -> Value {
    object(verb, "failed", json!({ "error": error.links() }))
}

/// The object of a verb that ended so.
pub(super) fn object(verb: &str, result: &str, facts: Value) -> Value {
    let mut all = Map::new();
    all.insert("verb".into(), verb.into());
    all.insert("result".into(), result.into());
    if let Value::Object(facts) = facts {
        all.extend(facts);
    }
    all.into()
}

/// Prints an object, on a line of its own.
pub fn say(object: &Value) {
    print(&format!("{object}\n"));
}

/// What comes from images and names of files does nothing to a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A moment, as people and programs read it: RFC 3339, UTC, whole seconds.
pub fn moment(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // days since 0000-03-01, in eras of 400 years (a leap day is the last of its year then)
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z", era * 400 + year + next)
}

/// One run of a verb: what is told of it at its end, to programs (`--json`) and to Prometheus (`--metrics`).
pub struct Run<'a> {
    verb: &'static str,
    options: &'a Options,
    began: Instant,
    seen: Arc<Seen>,
}

/// What was seen of a run while it went on.
struct Seen {
    verb: &'static str,
    metrics: Option<PathBuf>,
    told: AtomicBool,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    phases: Vec<(&'static str, Duration)>,
    bytes: u64,
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: &Event) {
        let mut noted = self.lock();
        match event.step {
            Step::Start => noted.bytes += event.total,
            Step::Phase(took) => match noted.phases.iter_mut().find(|(phase, _)| *phase == event.phase) {
                // once more, as memory in a snapshot
                Some((_, sum)) => *sum += took,
                None => noted.phases.push((event.phase, took)),
            },
            // who restores may stay for as long as the program runs: what there is to say of the restore is said now
            Step::Done if event.verb == progress::Verb::Restore => {
                let figures = Figures {
                    total: event.since,
                    phases: noted.phases.clone(),
                    bytes: Some(noted.bytes),
                    pages: Some(noted.bytes / crate::memory::PAGE),
                    ..Figures::default()
                };
                drop(noted);
                self.tell(true, &figures);
            }
            Step::Done | Step::Failed | Step::Progress => {}
        }
    }

    /// Once a run. What was done is done, also if nobody can be told.
    fn tell(&self, well: bool, figures: &Figures) {
        let Some(path) = &self.metrics else { return };
        if !self.told.swap(true, Ordering::Relaxed) {
            metrics::tell(path, self.verb, well, figures);
        }
    }
}

impl<'a> Run<'a> {
    /// It begins.
    pub fn begin(verb: &'static str, options: &'a Options) -> Run<'a> {
        let metrics = options.metrics.as_ref().map(|path| options.in_work_dir(path));
        let seen = Seen { verb, metrics, told: AtomicBool::new(false), noted: Mutex::default() };
        Run { verb, options, began: Instant::now(), seen: Arc::new(seen) }
    }

    /// The options to run with: whoever is told of the progress is, and so is this.
    pub fn options(&self) -> Options {
        let mut options = with_bars(self.options);
        if !options.json && options.metrics.is_none() {
            return options;
        }
        // what is wrong with it the engine says
        let Ok(other) = options.progress.hook() else { return options };
        let seen = Arc::clone(&self.seen);
        options.progress = Listener::Hook(Hook(Arc::new(move |event: &Event| {
            seen.note(event);
            if let Some(Hook(other)) = &other {
                other(event);
            }
        })));
        options
    }

    /// Another run of a series begins.
    pub fn again(&self) {
        *self.seen.lock() = Noted::default();
        self.seen.told.store(false, Ordering::Relaxed);
    }

    /// How long it has taken.
    pub fn took(&self) -> Duration {
        self.began.elapsed()
    }

    /// It came to its end. What is not known of the figures is what was seen; `facts` are added to the object.
    pub fn done(&self, figures: Figures, facts: Value) {
        let figures = self.complete(figures);
        self.seen.tell(true, &figures);
        if self.options.json {
            say(&done(self.verb, self.object(&figures, facts)));
        }
    }

    /// It did not. Says why on the log, too.
    pub fn failed(&self, error: &Error) {
        error!("{}", error.chain());
        self.failed_as_said(error);
    }

    /// It did not, and that has been said.
    pub fn failed_as_said(&self, error: &Error) {
        let figures = self.complete(Figures::default());
        self.seen.tell(false, &figures);
        if self.options.json {
            let facts = self.object(&figures, json!({ "error": error.links() }));
            say(&object(self.verb, "failed", facts));
        }
    }

    /// The options ask for what cannot be done yet: says so.
    pub fn is_refused(&self) -> bool {
        let refused = self.options.refuse_unsupported();
        refused.inspect_err(|e| self.failed(&Error::Usage { what: e.to_string() })).is_err()
    }

    fn complete(&self, mut figures: Figures) -> Figures {
        if figures.total.is_zero() {
            figures.total = self.took();
        }
        figures.phases.clone_from(&self.seen.lock().phases);
        figures
    }

    fn object(&self, figures: &Figures, facts: Value) -> Value {
        let mut all = Map::new();
        all.insert("images".into(), json!(self.options.images_dir));
        all.insert("seconds".into(), json!(figures.total.as_secs_f64()));
        if !figures.phases.is_empty() {
            let phases = figures.phases.iter().map(|(phase, took)| ((*phase).to_owned(), json!(took.as_secs_f64())));
            all.insert("phases".into(), Value::Object(phases.collect()));
        }
        let mut add = |key: &str, value: Option<Value>| all.extend(value.map(|value| (key.to_owned(), value)));
        add("frozen_seconds", figures.frozen.map(|frozen| json!(frozen.as_secs_f64())));
        add("pages", figures.pages.map(Value::from));
        add("pages_in_parent", figures.in_parent.map(Value::from));
        add("bytes", figures.bytes.map(Value::from));
        add("tasks", figures.tasks.map(Value::from));
        if let Value::Object(facts) = facts {
            all.extend(facts);
        }
        all.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(moment(seconds), text);
        }
    }

    #[test]
    fn objects() {
        let said = done("list", json!({ "folder": "x" }));
        assert_eq!(said.to_string(), r#"{"verb":"list","result":"done","folder":"x"}"#);
        let error = Error::Usage { what: "no".into() };
        assert_eq!(failed("list", &error).to_string(), r#"{"verb":"list","result":"failed","error":["no"]}"#);
    }
}
