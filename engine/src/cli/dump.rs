//! `dump` and `pre-dump`: the engine does it, this file says how it went.

use super::metrics::Figures;
use super::outcome::Run;
use super::print;
use crate::error::{Error, Result};
use crate::options::{Options, Persona};
use crate::DumpReport;
use serde_json::json;
use std::path::Path;
use std::time::Duration;
use tracing::{error, info};

/// Dumps the tree; the result is the exit code.
pub fn run(options: &Options) -> i32 {
    let run = Run::begin("dump", options);
    if lacks_pid(options, &run) || run.is_refused() {
        return 1;
    }
    if let Some(every) = options.every {
        return run_series(options, &run, every);
    }
    match crate::dump::run(&run.options()) {
        Ok(report) => {
            let took = run.took();
            info!("Dumping finished successfully");
            if options.personality == Persona::Standstill && !options.json {
                let text = match options.keeps_images() {
                    false => sent(options, &report, took),
                    true => summary(options, took),
                };
                print(&text);
            }
            if options.display_gpus {
                super::print_gpus(options);
            }
            told(&run, &report, options.keeps_images().then_some(&*options.images_dir));
            0
        }
        Err(e) => {
            run.failed(&e);
            error!("Dumping FAILED.");
            1
        }
    }
}

/// No process was named.
fn lacks_pid(options: &Options, run: &Run<'_>) -> bool {
    let named = options.required_pid();
    named.inspect_err(|e| run.failed(&Error::Usage { what: e.to_string() })).is_err()
}

/// Says what a dump did to those who asked for that.
fn told(run: &Run<'_>, report: &DumpReport, folder: Option<&Path>) {
    let figures = Figures { bytes: folder.map(folder_size), ..figures(report) };
    run.done(figures, json!({ "images": folder, "shared_pages": report.shared_pages }));
}

fn figures(report: &DumpReport) -> Figures {
    Figures {
        total: report.total,
        frozen: Some(report.frozen),
        pages: Some(report.pages),
        in_parent: Some(report.in_parent),
        tasks: u64::try_from(report.tasks).ok(),
        ..Figures::default()
    }
}

/// Dumps the tree again and again.
fn run_series(options: &Options, run: &Run<'_>, every: Duration) -> i32 {
    let said = |folder: &Path, result: std::result::Result<&DumpReport, &Error>| {
        match result {
            Ok(report) => {
                let one = Options { images_dir: folder.to_owned(), ..options.clone() };
                if !options.json {
                    print(&summary(&one, report.total));
                }
                told(run, report, Some(folder));
            }
            Err(e) => run.failed_as_said(e),
        }
        run.again();
    };
    match crate::periodic::run(&run.options(), every, options.keep, said) {
        Ok(()) => 0,
        Err(e) => {
            run.failed(&e);
            error!("Dumping FAILED.");
            1
        }
    }
}

/// Takes the memory of the tree while it runs.
pub fn run_pre_dump(options: &Options) -> i32 {
    let run = Run::begin("pre-dump", options);
    if lacks_pid(options, &run) {
        return 1;
    }
    if options.lazy_pages {
        run.failed(&Error::Usage { what: "Cannot pre-dump with --lazy-pages".into() });
        return 1;
    }
    if !crate::pre_dump::has_use(options) {
        run.failed(&crate::memory::track::unavailable());
        return 1;
    }
    if run.is_refused() {
        return 1;
    }
    match crate::pre_dump::run(&run.options()) {
        Ok(report) => {
            let took = run.took();
            info!("Pre-dumping finished successfully");
            if options.personality == Persona::Standstill && !options.json {
                print(&pre_dump_summary(options, &report, took));
            }
            let figures = Figures { bytes: Some(folder_size(&options.images_dir)), ..figures(&report) };
            run.done(figures, json!({}));
            0
        }
        Err(e) => {
            run.failed(&e);
            error!("Pre-dumping FAILED.");
            1
        }
    }
}

/// Frees what newer checkpoints of a chain replace.
pub fn run_dedup(options: &Options) -> i32 {
    let run = Run::begin("dedup", options);
    let freed = standstill_images::Images::open_folder(&options.images_dir)
        .map_err(Error::from)
        .and_then(crate::memory::dedup::free_in_chain);
    match freed {
        Ok(freed) => {
            if options.personality == Persona::Standstill && !options.json {
                print(&format!("{} freed\n", human_size(freed)));
            }
            run.done(Figures::default(), json!({ "freed": freed }));
            0
        }
        Err(e) => {
            run.failed(&e);
            1
        }
    }
}

/// Ends the tracking of a tree's memory.
pub fn run_untrack(options: &Options) -> i32 {
    let run = Run::begin("untrack", options);
    let end = || -> Result<i32> {
        let pid = options.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
        match crate::memory::track::end(pid)? {
            true => Ok(pid),
            false => Err(Error::Usage { what: "no memory is tracked there".into() }),
        }
    };
    match end() {
        Ok(pid) => {
            run.done(Figures::default(), json!({ "pid": pid }));
            0
        }
        Err(e) => {
            run.failed(&e);
            1
        }
    }
}

/// What was taken, how long the tree stood still, and what comes next.
fn pre_dump_summary(options: &Options, report: &DumpReport, took: Duration) -> String {
    format!(
        "{} written, {} unchanged, in {} (frozen {}); next: standstill dump -t {} --prev-images-dir {} -D DIR\n",
        human_size(report.pages * crate::memory::PAGE),
        human_size(report.in_parent * crate::memory::PAGE),
        human_time(took),
        human_time(report.frozen),
        options.pid.unwrap_or(0),
        options.images_dir.display(),
    )
}

/// What went into a stream.
fn sent(options: &Options, report: &crate::DumpReport, took: Duration) -> String {
    let pages = report.pages + report.shared_pages;
    if let Some(url) = options.to.as_ref().and_then(|to| to.url()) {
        return format!(
            "{} of memory in {url} after {} (frozen {}); restore with: standstill restore --from {url}\n",
            human_size(pages * crate::memory::PAGE),
            human_time(took),
            human_time(report.frozen)
        );
    }
    format!(
        "{} of memory sent after {} (frozen {}); whether they arrived, the reader knows\n",
        human_size(pages * crate::memory::PAGE),
        human_time(took),
        human_time(report.frozen)
    )
}

/// Size, time, and how to restore.
fn summary(options: &Options, took: Duration) -> String {
    let dir = &options.images_dir;
    let job = if options.shell_job { " -j" } else { "" };
    let size = human_size(folder_size(dir));
    format!(
        "{size} in {} after {}; restore with: standstill restore -D {}{job}\n",
        dir.display(),
        human_time(took),
        dir.display()
    )
}

/// The bytes of a folder's images, holes not counted.
fn folder_size(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let images = files.filter(|f| f.path().extension().is_some_and(|e| e == "img"));
    images.filter_map(|f| f.metadata().ok()).map(|m| m.len().min(m.blocks() * 512)).sum()
}

/// A size as a person reads it: three digits and a unit.
pub fn human_size(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        0..1024 => return format!("{bytes} bytes"),
        1024..0x10_0000 => ("KiB", 10),
        0x10_0000..0x4000_0000 => ("MiB", 20),
        _ => ("GiB", 30),
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    if tenths < 100 {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    } else {
        format!("{} {unit}", tenths / 10)
    }
}

/// A time as a person reads it.
pub fn human_time(took: Duration) -> String {
    match took.as_micros() {
        micros @ 0..10_000 => format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
        micros @ 10_000..10_000_000 => format!("{} ms", micros / 1000),
        micros => format!("{}.{} s", micros / 1_000_000, micros % 1_000_000 / 100_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_people() {
        assert_eq!(human_size(999), "999 bytes");
        assert_eq!(human_size(1536), "1.5 KiB");
        assert_eq!(human_size(200 << 20), "200 MiB");
        assert_eq!(human_size(3 << 30), "3.0 GiB");
        assert_eq!(human_time(Duration::from_micros(7_340)), "7.3 ms");
        assert_eq!(human_time(Duration::from_millis(1234)), "1234 ms");
        assert_eq!(human_time(Duration::from_millis(12_340)), "12.3 s");
    }
}
