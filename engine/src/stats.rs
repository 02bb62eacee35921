//! Figures: how long each phase took, and the stats images that CRIU's callers read (`stats-dump`, `stats-restore`).

use std::time::{Duration, Instant};

use standstill_images::proto::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};
use standstill_images::{FolderStore, ImageKind, Images};

use crate::dump::DumpReport;
use crate::error::Result;
use crate::options::Options;

/// Phases of a run, each with the time at its end.
#[derive(Debug)]
pub struct Phases {
    began: Instant,
    last: Instant,
    marks: Vec<(&'static str, Duration)>,
}

impl Phases {
    /// Starts the clock.
    pub fn start() -> Phases {
        let now = Instant::now();
        Phases { began: now, last: now, marks: Vec::new() }
    }

    /// Ends a phase.
    pub fn mark(&mut self, phase: &'static str) {
        let now = Instant::now();
        self.marks.push((phase, now - self.last));
        tracing::info!("phase {phase}: {} us", (now - self.last).as_micros());
        self.last = now;
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

fn micros(d: Duration) -> u32 {
    u32::try_from(d.as_micros()).unwrap_or(u32::MAX)
}

/// Writes `stats-dump` into the work folder.
pub fn write_dump(opts: &Options, phases: &Phases, report: &DumpReport, scanned: u64) -> Result<()> {
    let dump = DumpStatsEntry {
        freezing_time: micros(phases.of("freezing")),
        frozen_time: micros(report.frozen),
        memdump_time: micros(phases.of("memory")),
        memwrite_time: micros(phases.of("memory")),
        pages_scanned: scanned,
        pages_skipped_parent: report.in_parent,
        pages_written: report.pages,
        irmap_resolve: None,
        pages_lazy: 0,
        // CRIU counts its own machinery here; ours has none
        page_pipes: Some(0),
        page_pipe_bufs: Some(0),
        shpages_scanned: Some(report.shared_pages),
        shpages_skipped_parent: Some(0),
        shpages_written: Some(report.shared_pages),
    };
    if opts.display_stats {
        println!("Displaying dump stats:");
        for (what, micros) in [
            ("Freezing time", dump.freezing_time),
            ("Frozen time", dump.frozen_time),
            ("Memory dump time", dump.memdump_time),
            ("Memory write time", dump.memwrite_time),
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
    write(opts, ImageKind::StatsDump, StatsEntry { dump: Some(dump), restore: None })
}

/// Writes `stats-restore` into the work folder.
pub fn write_restore(
    opts: &Options,
    forking: Duration,
    total: Duration,
    pages: u64,
    compared: u64,
    shared: u64,
) -> Result<()> {
    let restore = RestoreStatsEntry {
        pages_compared: compared,
        pages_skipped_cow: shared,
        forking_time: micros(forking),
        restore_time: micros(total),
        pages_restored: Some(pages),
    };
    if opts.display_stats {
        println!("Displaying restore stats:");
        println!("Pages compared: {compared} ({compared:#x})");
        println!("Pages skipped COW: {shared} ({shared:#x})");
        println!("Pages restored: {pages} ({pages:#x})");
        println!("Restore time: {} us", restore.restore_time);
        println!("Forking time: {} us", restore.forking_time);
    }
    write(opts, ImageKind::StatsRestore, StatsEntry { dump: None, restore: Some(restore) })
}

fn write(opts: &Options, kind: ImageKind, entry: StatsEntry) -> Result<()> {
    let images = Images::new(FolderStore::open(opts.work_dir())?);
    images.write_one(kind, (), &entry)?;
    Ok(())
}
