//! The log, in the shape that CRIU's callers search: `(00.012345) Error (file:line): text`.
//!
//! The engine itself only emits `tracing` events and works as well where nobody listens. The command-line program installs
//! this subscriber; a program that embeds the library installs its own, or none. Levels: 1 errors, 2 warnings,
//! 3 information, 4 debugging, 5 and up also traces. Times are printed from level 3 on. Events with a field `pid` carry
//! that number in front, as CRIU's restored tasks do; other fields follow the text.
//!
//! What is said before the log file is known is kept and written once it is, or to standard error at the end if it never
//! is.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// From this level on, lines begin with the time.
const TIMES_FROM: u32 = 3;
/// How much is kept while there is no log yet; more than that is a loop, not a log.
const EARLY_LIMIT: usize = 4096;

static LOG: OnceLock<Log> = OnceLock::new();

/// Where the log goes.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// A file, or `-` for standard output; standard error if nothing is said.
    pub file: Option<PathBuf>,
    /// Lines of a restored process go to `FILE.PID`.
    pub per_pid: bool,
    /// Errors go to standard error as well, if the log goes elsewhere.
    pub mirror_errors: bool,
}

#[derive(Debug)]
struct Log {
    start: Instant,
    level: AtomicU32,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Early(Vec<Line>),
    Open { sink: Sink, target: Target, by_pid: Vec<(i64, File)> },
}

#[derive(Debug)]
enum Sink {
    Stdout,
    Stderr,
    File(File),
}

#[derive(Debug)]
struct Line {
    level: u32,
    pid: Option<i64>,
    since_start: Duration,
    text: String,
}

/// Begins to listen to the engine. Once a process; a second call changes nothing.
pub fn install(level: u32) {
    let log = Log { start: Instant::now(), level: AtomicU32::new(level), state: Mutex::new(State::Early(Vec::new())) };
    if LOG.set(log).is_ok() {
        // someone else's subscriber may be there already; then the events are theirs
        let _ = tracing::subscriber::set_global_default(Listener);
    }
}

/// How much is said.
pub fn level() -> u32 {
    LOG.get().map_or(0, |log| log.level.load(Ordering::Relaxed))
}

/// Changes how much is said. What was kept so far is judged by the level that holds when the log is opened.
pub fn set_level(level: u32) {
    if let Some(log) = LOG.get() {
        log.level.store(level, Ordering::Relaxed);
    }
}

/// Opens the log, and writes what was kept for it.
pub fn open(target: Target) -> io::Result<()> {
    let Some(log) = LOG.get() else { return Ok(()) };
    let sink = match target.file.as_deref() {
        None => Sink::Stderr,
        Some(path) if path == Path::new("-") => Sink::Stdout,
        Some(path) => Sink::File(create(path)?),
    };
    let mut state = log.lock();
    let kept = match std::mem::replace(&mut *state, State::Open { sink, target, by_pid: Vec::new() }) {
        State::Early(lines) => lines,
        State::Open { .. } => Vec::new(),
    };
    let level = log.level.load(Ordering::Relaxed);
    for line in kept.iter().filter(|l| l.level <= level) {
        state.write(line, level);
    }
    drop(state);
    tracing::callsite::rebuild_interest_cache();
    Ok(())
}

/// A restored process begins: its own log is there from now on, with something in it or not.
pub fn begin(pid: i32) {
    if let Some(log) = LOG.get() {
        log.lock().of_pid(pid.into());
    }
}

/// The log file, for a program whose output belongs there; nothing if the log is not a file.
pub fn file() -> Option<File> {
    match &*LOG.get()?.lock() {
        State::Open { sink: Sink::File(file), .. } => file.try_clone().ok(),
        State::Open { .. } | State::Early(_) => None,
    }
}

/// Writes what was kept to standard error if no log was ever opened. The last thing a program does.
pub fn finish() {
    if LOG.get().is_some_and(|log| matches!(*log.lock(), State::Early(_))) {
        let _ = open(Target::default());
    }
}

fn create(path: &Path) -> io::Result<File> {
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_APPEND | libc::O_CLOEXEC)
        .open(path)
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The log of a process, if each has one.
    fn of_pid(&mut self, pid: i64) -> Option<&mut File> {
        let Self::Open { target, by_pid, .. } = self else { return None };
        let file = target.file.as_deref().filter(|_| target.per_pid)?;
        if !by_pid.iter().any(|(p, _)| *p == pid) {
            let mut name = file.as_os_str().to_owned();
            name.push(format!(".{pid}"));
            by_pid.push((pid, create(Path::new(&name)).ok()?));
        }
        by_pid.iter_mut().find(|(p, _)| *p == pid).map(|(_, file)| file)
    }

    fn write(&mut self, line: &Line, level: u32) {
        let Self::Open { target, .. } = self else { return };
        let text = line.render(level, target.per_pid);
        if let Some(file) = line.pid.and_then(|pid| self.of_pid(pid)) {
            let _ = file.write_all(text.as_bytes());
            return;
        }
        let Self::Open { sink, target, .. } = self else { return };
        // a log that cannot be written is no reason to stop the work
        let _ = match sink {
            Sink::File(file) => file.write_all(text.as_bytes()),
            Sink::Stdout => io::stdout().write_all(text.as_bytes()),
            Sink::Stderr => io::stderr().write_all(text.as_bytes()),
        };
        if line.level == 1 && target.mirror_errors && matches!(sink, Sink::File(_)) {
            let _ = io::stderr().write_all(line.render(0, false).as_bytes());
        }
    }
}

impl Line {
    /// The line as it is written at a log level: two digits of seconds and six of microseconds, cut to that width.
    fn render(&self, level: u32, per_pid: bool) -> String {
        let mut out = String::with_capacity(self.text.len() + 24);
        if level >= TIMES_FROM {
            let _ = write!(out, "({:02}.{:06}", self.since_start.as_secs(), self.since_start.subsec_micros());
            out.truncate(10);
            out.push_str(") ");
        }
        if let (Some(pid), false) = (self.pid, per_pid) {
            let _ = write!(out, "{pid:6}: ");
        }
        out.push_str(&self.text);
        if !out.ends_with('\n') {
            out.push('\n');
        }
        out
    }
}

#[derive(Debug)]
struct Listener;

fn number_of(level: &Level) -> u32 {
    match *level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

impl Listener {
    fn wants(metadata: &Metadata<'_>) -> bool {
        LOG.get().is_some_and(|log| {
            let level = number_of(metadata.level());
            level <= log.level.load(Ordering::Relaxed) || (level < 5 && matches!(*log.lock(), State::Early(_)))
        })
    }
}

impl Subscriber for Listener {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // while the level may still change, ask each time; afterwards a line that is off costs one comparison
        match LOG.get() {
            Some(log) if matches!(*log.lock(), State::Early(_)) => Interest::sometimes(),
            _ if Self::wants(metadata) => Interest::always(),
            _ => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        Self::wants(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let log = LOG.get()?;
        let level = log.level.load(Ordering::Relaxed);
        Some(match level {
            _ if matches!(*log.lock(), State::Early(_)) => LevelFilter::TRACE,
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    fn event(&self, event: &Event<'_>) {
        let Some(log) = LOG.get() else { return };
        let line = line_of(event, log.start.elapsed());
        let level = log.level.load(Ordering::Relaxed);
        let mut state = log.lock();
        match &mut *state {
            State::Early(lines) if lines.len() < EARLY_LIMIT => lines.push(line),
            State::Early(_) => {}
            State::Open { .. } => state.write(&line, level),
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn line_of(event: &Event<'_>, since_start: Duration) -> Line {
    let metadata = event.metadata();
    let level = number_of(metadata.level());
    let mut fields = Fields::default();
    event.record(&mut fields);
    let (file, at) = (metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
    let place = match level {
        1 => format!("Error ({file}:{at}): "),
        2 => format!("Warn  ({file}:{at}): "),
        _ => String::new(),
    };
    Line { level, pid: fields.pid, since_start, text: format!("{place}{}{}", fields.message, fields.others) }
}

#[derive(Default)]
struct Fields {
    message: String,
    pid: Option<i64>,
    others: String,
}

impl Visit for Fields {
    fn record_i64(&mut self, field: &Field, value: i64) {
        match field.name() {
            "pid" => self.pid = Some(value),
            _ => self.record_debug(field, &value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match (field.name(), i64::try_from(value)) {
            ("pid", Ok(pid)) => self.pid = Some(pid),
            _ => self.record_debug(field, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.others, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: u32, pid: Option<i64>, micros: u64, text: &str) -> Line {
        Line { level, pid, since_start: Duration::from_micros(micros), text: text.to_owned() }
    }

    #[test]
    fn shape() {
        assert_eq!(line(1, None, 12_345, "Error (a.rs:3): x").render(4, false), "(00.012345) Error (a.rs:3): x\n");
        assert_eq!(line(1, None, 12_345, "Error (a.rs:3): x").render(2, false), "Error (a.rs:3): x\n");
        assert_eq!(line(3, Some(71), 1_000_000, "y\n").render(3, false), "(01.000000)     71: y\n");
        assert_eq!(line(3, Some(71), 1_000_000, "y").render(3, true), "(01.000000) y\n");
        assert_eq!(line(3, None, 123_456_789_000, "z").render(3, false), "(123456.78) z\n");
    }

    #[test]
    fn kept_then_written_by_level_and_pid() {
        let dir = std::env::temp_dir().join(format!("standstill-log-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder for the test");
        let file = dir.join("x.log");
        install(2);
        tracing::info!("early info");
        tracing::warn!(pid = 7, "early warning");
        set_level(3);
        open(Target { file: Some(file.clone()), per_pid: true, mirror_errors: false }).expect("a log file");
        tracing::debug!("not this");
        tracing::error!(size = 5, "late {}", "error");
        let text = std::fs::read_to_string(&file).expect("the log");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with(") early info"), "{text}");
        assert!(lines[1].contains(") Error (") && lines[1].ends_with("): late error size=5"), "{text}");
        assert_eq!(lines.len(), 2, "{text}");
        let of_pid = std::fs::read_to_string(dir.join("x.log.7")).expect("the log of pid 7");
        assert!(of_pid.contains(") Warn  (") && of_pid.ends_with("): early warning\n"), "{of_pid}");
        std::fs::remove_dir_all(&dir).expect("the folder goes");
    }
}
