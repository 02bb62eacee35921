//! Figures: how long each phase took, and the stats images that CRIU's callers read (`stats-dump`, `stats-restore`).

use std::time::{Duration, Instant};

use standstill_images::proto::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};
use standstill_images::{FolderStore, ImageKind, Images};

use crate::dump::DumpReport;
use crate::error::Result;
use crate::memory::rebuild::Figures;
use crate::options::{Options, Persona};
use crate::progress::{explain, Counter, Verb};

/// Phases of a run, each with the time at its end. The only clock of all figures: the log, the stats images, what
/// `--display-stats` prints and what those are told who listen come from here.
#[derive(Debug)]
pub struct Phases {
    verb: Verb,
    began: Instant,
    last: Instant,
    marks: Vec<(&'static str, Duration)>,
    counter: Counter,
    finished: bool,
}

impl Phases {
    /// Starts the clock.
    pub fn start(verb: Verb, opts: &Options) -> Result<Phases> {
        let now = Instant::now();
        let counter = Counter::new(verb, opts)?;
        Ok(Phases { verb, began: now, last: now, marks: Vec::new(), counter, finished: false })
    }

    /// What counts the memory that is moved.
    pub fn counter(&self) -> &Counter {
        &self.counter
    }

    /// Ends a phase.
    pub fn mark(&mut self, phase: &'static str) {
        let now = Instant::now();
        let took = now - self.last;
        self.marks.push((phase, took));
        tracing::info!("phase {phase}: {} us", took.as_micros());
        self.counter.end(phase, took);
        self.last = now;
    }

    /// Everything came to a good end.
    pub fn finish(&mut self) {
        self.finished = true;
        self.counter.finish(true);
    }

    /// All phases with their times, for people.
    fn table(&self) -> String {
        let mut text = format!("{:12} {:>12}\n", "phase", "ms");
        let line = |name: &str, time: Duration, what: &str| {
            format!("{name:12} {:>8}.{:03}  {what}\n", time.as_millis(), time.as_micros() % 1000)
        };
        for (name, time) in &self.marks {
            text += &line(name, *time, explain(self.verb, name));
        }
        text + &line("all", self.marks.iter().map(|(_, time)| *time).sum(), "")
    }

    /// How long a phase took.
    pub fn of(&self, phase: &str) -> Duration {
        self.marks.iter().filter(|(name, _)| *name == phase).map(|(_, d)| *d).sum()
    }

    /// Time since the start.
    pub fn total(&self) -> Duration {
        self.began.elapsed()
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        if !self.finished {
            self.counter.finish(false);
        }
    }
}

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}

/// Pages as people read them.
fn pages(count: u64) -> String {
    let kib = count * 4;
    match kib {
        0..10_240 => format!("{count} pages, {kib} KiB"),
        _ => format!("{count} pages, {} MiB", kib / 1024),
    }
}

/// Writes `stats-dump` into the work folder.
/// Looked at for it were so many pages, and so many shared ones.
pub fn write_dump(opts: &Options, phases: &Phases, report: &DumpReport, scanned: u64, shared: u64) {
    warn(try_write_dump(opts, phases, report, scanned, shared));
}

/// What was measured cannot be written: no reason to say that what was done has failed.
fn warn(written: Result<()>) {
    if let Err(e) = written {
        tracing::warn!("the figures of this run could not be written: {}", e.chain());
    }
}

fn try_write_dump(opts: &Options, phases: &Phases, report: &DumpReport, scanned: u64, shared: u64) -> Result<()> {
    let dump = DumpStatsEntry {
        freezing_time: micros(phases.of("freezing")),
        frozen_time: micros(report.frozen),
        memdump_time: micros(phases.of("memory")),
        memwrite_time: micros(phases.of("memory")),
        pages_scanned: scanned,
        pages_skipped_parent: report.in_parent,
        pages_written: report.pages,
        // files that are watched are found by their handles, which takes no search
        irmap_resolve: Some(0),
        pages_lazy: 0,
        // CRIU counts its own machinery here; ours has none
        page_pipes: Some(0),
        page_pipe_bufs: Some(0),
        shpages_scanned: Some(shared),
        shpages_skipped_parent: Some(0),
        shpages_written: Some(report.shared_pages),
    };
    if opts.display_stats {
        match opts.personality {
            Persona::Criu => print_dump(&dump),
            Persona::Standstill => {
                print!("{}", phases.table());
                println!(
                    "the tree stood still for {}.{:03} ms",
                    report.frozen.as_millis(),
                    report.frozen.as_micros() % 1000
                );
                println!("memory written: {} of {scanned} that were looked at", pages(report.pages));
                println!("shared memory written: {}", pages(report.shared_pages));
            }
        }
    }
    write(opts, ImageKind::StatsDump, StatsEntry { dump: Some(dump), restore: None })
}

/// As CRIU prints it.
fn print_dump(dump: &DumpStatsEntry) {
    println!("Displaying dump stats:");
    for (what, micros) in [
        ("Freezing time", dump.freezing_time),
        ("Frozen time", dump.frozen_time),
        ("Memory dump time", dump.memdump_time),
        ("Memory write time", dump.memwrite_time),
        ("IRMAP resolve time", dump.irmap_resolve.unwrap_or(0)),
    ] {
        println!("{what}: {micros} us");
    }
    for (what, pages) in [
        ("Memory pages scanned", dump.pages_scanned),
        ("Memory pages skipped from parent", dump.pages_skipped_parent),
        ("Memory pages written", dump.pages_written),
        ("Lazy memory pages", dump.pages_lazy),
    ] {
        println!("{what}: {pages} ({pages:#x})");
    }
}

/// Writes `stats-restore` into the work folder.
pub fn write_restore(opts: &Options, phases: &Phases, total: Duration, figures: &Figures) {
    warn(try_write_restore(opts, phases, total, figures));
}

fn try_write_restore(opts: &Options, phases: &Phases, total: Duration, figures: &Figures) -> Result<()> {
    let Figures { pages: restored, compared, shared, .. } = figures;
    let restore = RestoreStatsEntry {
        pages_compared: *compared,
        pages_skipped_cow: *shared,
        forking_time: micros(phases.of("forking")),
        restore_time: micros(total),
        pages_restored: Some(*restored),
    };
    if opts.display_stats {
        match opts.personality {
            Persona::Criu => {
                println!("Displaying restore stats:");
                println!("Pages compared: {compared} ({compared:#x})");
                println!("Pages skipped COW: {shared} ({shared:#x})");
                println!("Pages restored: {restored} ({restored:#x})");
                println!("Restore time: {} us", restore.restore_time);
                println!("Forking time: {} us", restore.forking_time);
            }
            Persona::Standstill => {
                print!("{}", phases.table());
                println!("memory read: {}", pages(*restored));
                println!("compared with that of a parent: {}; the same: {}", pages(*compared), pages(*shared));
            }
        }
    }
    write(opts, ImageKind::StatsRestore, StatsEntry { dump: None, restore: Some(restore) })
}

fn write(opts: &Options, kind: ImageKind, entry: StatsEntry) -> Result<()> {
    if !opts.has_folder() && opts.work_dir.is_none() {
        return Ok(());
    }
    let images = Images::new(FolderStore::open(opts.work_dir())?);
    images.write_one(kind, (), &entry)?;
    Ok(())
}
