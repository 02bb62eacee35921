//! How far the work is: the one table of phases, and those who are told.
//!
//! A dump or restore goes through its phases in the order of the table. At the end of each its time is known; a phase that moves
//! memory also tells how much, some ten times a second. Who is told is a matter of [`Options::progress`]: nobody, a
//! [`Hook`], or whoever reads a descriptor (`--progress json`), one JSON object a line:
//!
//! `{"verb":"dump","event":"phase","phase":"memory","bytes":1048576,"total":268435456,"us":5123}`
//!
//! `event` is `start` (a phase that moves memory begins), `progress` (some of it is moved), `phase` (a phase has ended), and
//! last `done` or `failed`; `us` counts from the beginning, and `phase_us`, at the end of a phase, from that of the phase.

use std::fmt;
use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::options::Options;
use crate::sys::calls;

/// All phases: of what, name, and what happens in it. Logs, statistics and progress have their names from here.
pub const PHASES: &[(Verb, &str, &str)] = &[
    (Verb::Dump, "ahead", "copy memory while the tree runs (--snapshot)"),
    (Verb::Dump, "freezing", "find the tasks and stop them"),
    (Verb::Dump, "gpus", "bring memory of GPUs into the tasks"),
    (Verb::Dump, "reading", "read /proc, sort files and areas"),
    (Verb::Dump, "infecting", "put the executor in"),
    (Verb::Dump, "asking", "ask the tasks"),
    (Verb::Dump, "metadata", "write all but memory"),
    (Verb::Dump, "copying", "copy tasks on write (--snapshot, much written)"),
    (Verb::Dump, "memory", "copy memory"),
    (Verb::Dump, "inventory", "complete the images"),
    (Verb::Dump, "ending", "take the executor out, end the tasks or let them go"),
    (Verb::PreDump, "freezing", "find the tasks and stop them"),
    (Verb::PreDump, "reading", "read their areas"),
    (Verb::PreDump, "marking", "find what was written, mark all again, let go"),
    (Verb::PreDump, "memory", "copy memory"),
    (Verb::PreDump, "inventory", "complete the images"),
    (Verb::Restore, "reading", "read and check the images"),
    (Verb::Restore, "birth", "the first task, and what is in its namespaces"),
    (Verb::Restore, "opening", "open files, sockets, terminals"),
    (Verb::Restore, "planning", "write plans"),
    (Verb::Restore, "forking", "make the tasks and their memory"),
    (Verb::Restore, "filling", "threads, descriptors, folders"),
    (Verb::Restore, "settling", "signals, timers, credentials"),
    (Verb::Restore, "registers", "set registers, take the executor out"),
    (Verb::Restore, "going", "let the tasks go"),
];

/// How often at most those who listen are told.
const PERIOD: Duration = Duration::from_millis(100);

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // their names are the verbs
pub enum Verb {
    Dump,
    PreDump,
    Restore,
}

impl Verb {
    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Dump => "dump",
            Verb::PreDump => "pre-dump",
            Verb::Restore => "restore",
        }
    }
}

/// What happens in a phase, for people.
pub fn explain(verb: Verb, phase: &str) -> &'static str {
    PHASES.iter().find(|(v, name, _)| *v == verb && *name == phase).map_or("", |(.., what)| what)
}

/// What an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A phase that moves memory begins.
    Start,
    /// Some of it is moved.
    Progress,
    /// A phase has ended, after this time.
    Phase(Duration),
    /// Everything has.
    Done,
    /// It came to an error.
    Failed,
}

/// How far the work is.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// What is done.
    pub verb: Verb,
    /// What this says.
    pub step: Step,
    /// Which phase: a name of [`PHASES`].
    pub phase: &'static str,
    /// Bytes of memory moved in this phase.
    pub bytes: u64,
    /// Bytes to be moved in it; 0 where none are.
    pub total: u64,
    /// Time since the beginning.
    pub since: Duration,
}

/// Someone who is told. Called from threads of the engine, one at a time; must be quick.
#[derive(Clone)]
pub struct Hook(pub Arc<dyn Fn(&Event) + Send + Sync>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

/// Who is told (`--progress`).
#[derive(Debug, Clone, Default)]
pub enum Listener {
    /// Nothing was said: the command line shows bars where standard error is a terminal, the library tells nobody.
    #[default]
    Unsaid,
    /// Nobody.
    Nobody,
    /// Bars on the terminal that standard error is; only the command line has these.
    Bars,
    /// JSON, on a descriptor of ours or on standard error.
    Json(Option<i32>),
    /// Someone in this process.
    Hook(Hook),
}

impl Listener {
    /// Who is told, if anybody is.
    ///
    /// # Errors
    /// If a descriptor is not open.
    pub fn hook(&self) -> Result<Option<Hook>> {
        Ok(match self {
            Listener::Unsaid | Listener::Nobody | Listener::Bars => None,
            Listener::Json(fd) => Some(json(*fd)?),
            Listener::Hook(hook) => Some(hook.clone()),
        })
    }
}

/// Counts what is moved, and tells how far that is.
#[derive(Debug, Clone, Default)]
pub struct Counter(Option<Arc<Teller>>);

struct Teller {
    verb: Verb,
    began: Instant,
    hook: Hook,
    bytes: AtomicU64,
    total: AtomicU64,
    state: Mutex<State>,
}

struct State {
    phase: &'static str,
    told: Instant,
}

impl fmt::Debug for Teller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Teller").field("verb", &self.verb).finish_non_exhaustive()
    }
}

impl Counter {
    /// For the listener that was asked for.
    pub fn new(verb: Verb, opts: &Options) -> Result<Counter> {
        let Some(hook) = opts.progress.hook()? else { return Ok(Counter(None)) };
        let now = Instant::now();
        Ok(Counter(Some(Arc::new(Teller {
            verb,
            began: now,
            hook,
            bytes: AtomicU64::new(0),
            total: AtomicU64::new(0),
            state: Mutex::new(State { phase: "", told: now }),
        }))))
    }

    /// A phase begins that moves so many bytes.
    pub fn start(&self, phase: &'static str, total: u64) {
        let Some(teller) = &self.0 else { return };
        teller.bytes.store(0, Ordering::Relaxed);
        teller.total.store(total, Ordering::Relaxed);
        let mut state = teller.lock();
        state.phase = phase;
        teller.tell(&state, Step::Start);
    }

    /// So many more bytes are moved.
    pub fn add(&self, bytes: u64) {
        let Some(teller) = &self.0 else { return };
        teller.bytes.fetch_add(bytes, Ordering::Relaxed);
        // whoever comes while another one tells has nothing to add
        if let Ok(mut state) = teller.state.try_lock() {
            if state.told.elapsed() >= PERIOD {
                state.told = Instant::now();
                teller.tell(&state, Step::Progress);
            }
        }
    }

    /// A phase has ended; all that it was to move is moved.
    pub fn end(&self, phase: &'static str, took: Duration) {
        let Some(teller) = &self.0 else { return };
        let mut state = teller.lock();
        if state.phase != phase {
            state.phase = phase;
            teller.total.store(0, Ordering::Relaxed);
        }
        teller.bytes.store(teller.total.load(Ordering::Relaxed), Ordering::Relaxed);
        teller.tell(&state, Step::Phase(took));
    }

    /// Everything has ended, well or not.
    pub fn finish(&self, well: bool) {
        let Some(teller) = &self.0 else { return };
        teller.tell(&teller.lock(), if well { Step::Done } else { Step::Failed });
    }
}

impl Teller {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, state: &State, step: Step) {
        let total = self.total.load(Ordering::Relaxed);
        (self.hook.0)(&Event {
            verb: self.verb,
            step,
            phase: state.phase,
            bytes: self.bytes.load(Ordering::Relaxed).min(total),
            total,
            since: self.began.elapsed(),
        });
    }
}

/// An event as an object of one line.
pub fn to_json(event: &Event) -> String {
    let step = match event.step {
        Step::Start => "start",
        Step::Progress => "progress",
        Step::Phase(_) => "phase",
        Step::Done => "done",
        Step::Failed => "failed",
    };
    let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    let mut object = serde_json::json!({
        "verb": event.verb.name(), "event": step, "phase": event.phase, "bytes": event.bytes, "total": event.total,
        "us": micros(event.since),
    });
    if let (Step::Phase(took), Some(fields)) = (event.step, object.as_object_mut()) {
        fields.insert("phase_us".into(), micros(took).into());
    }
    object.to_string()
}

/// Writes events; whoever does not read on is no reason to stop the work.
fn json(fd: Option<i32>) -> Result<Hook> {
    let Some(fd) = fd else {
        return Ok(Hook(Arc::new(|event| {
            let _ = std::io::stderr().write_all(format!("{}\n", to_json(event)).as_bytes());
        })));
    };
    let copy = calls::dup_number(fd)
        .map_err(|_| Error::Usage { what: format!("--progress json:{fd}: descriptor {fd} is not open") })?;
    let file = std::fs::File::from(copy);
    Ok(Hook(Arc::new(move |event| {
        let _ = (&file).write_all(format!("{}\n", to_json(event)).as_bytes());
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_in_order() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&told);
        let hook = Hook(Arc::new(move |event: &Event| {
            list.lock().unwrap_or_else(PoisonError::into_inner).push((
                event.step,
                event.phase,
                event.bytes,
                event.total,
            ))
        }));
        let opts = Options { progress: Listener::Hook(hook), ..Options::default() };
        let counter = Counter::new(Verb::Dump, &opts).unwrap_or_default();
        counter.end("freezing", Duration::ZERO);
        counter.start("memory", 8192);
        counter.add(4096);
        counter.end("memory", Duration::ZERO);
        counter.end("inventory", Duration::ZERO);
        counter.finish(true);
        let told = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let end = Step::Phase(Duration::ZERO);
        assert_eq!(
            told.iter().filter(|t| t.0 != Step::Progress).copied().collect::<Vec<_>>(),
            [
                (end, "freezing", 0, 0),
                (Step::Start, "memory", 0, 8192),
                (end, "memory", 8192, 8192),
                (end, "inventory", 0, 0),
                (Step::Done, "inventory", 0, 0),
            ]
        );
    }

    #[test]
    fn one_object_a_line() {
        let event = Event {
            verb: Verb::Restore,
            step: Step::Phase(Duration::from_micros(7)),
            phase: "forking",
            bytes: 1,
            total: 2,
            since: Duration::from_micros(9),
        };
        let text = r#"{"verb":"restore","event":"phase","phase":"forking","bytes":1,"total":2,"us":9,"phase_us":7}"#;
        assert_eq!(to_json(&event), text);
        assert_eq!(explain(Verb::PreDump, "memory"), "copy memory");
    }
}
