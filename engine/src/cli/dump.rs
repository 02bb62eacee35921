//! `dump` and `pre-dump`: the engine does it, this file says how it went.

use super::bars::with_bars;
use super::print;
use crate::options::{Options, Persona};
use std::path::Path;
use std::time::{Duration, Instant};
use tracing::{error, info};

/// Dumps the tree; the result is the exit code.
pub fn run(options: &Options) -> i32 {
    if let Err(e) = options.required_pid() {
        error!("{e}");
        return 1;
    }
    if !super::supported(options) {
        return 1;
    }
    if let Some(every) = options.every {
        return run_series(options, every);
    }
    let start = Instant::now();
    match crate::dump::run(&with_bars(options)) {
        Ok(report) => {
            info!("Dumping finished successfully");
            if options.personality == Persona::Standstill {
                let text = match options.keeps_images() {
                    false => sent(options, &report, start.elapsed()),
                    true => summary(options, start.elapsed()),
                };
                print(&text);
            }
            if options.display_gpus {
                super::print_gpus(options);
            }
            0
        }
        Err(e) => {
            error!("{}", e.chain());
            error!("Dumping FAILED.");
            1
        }
    }
}

/// Dumps the tree again and again.
fn run_series(options: &Options, every: Duration) -> i32 {
    let said = |folder: &Path, report: &crate::DumpReport| {
        let one = Options { images_dir: folder.to_owned(), ..options.clone() };
        print(&summary(&one, report.total));
    };
    match crate::periodic::run(&with_bars(options), every, options.keep, said) {
        Ok(()) => 0,
        Err(e) => {
            error!("{}", e.chain());
            error!("Dumping FAILED.");
            1
        }
    }
}

/// Takes the memory of the tree while it runs.
pub fn run_pre_dump(options: &Options) -> i32 {
    if let Err(e) = options.required_pid() {
        error!("{e}");
        return 1;
    }
    if options.lazy_pages {
        error!("Cannot pre-dump with --lazy-pages");
        return 1;
    }
    if !crate::pre_dump::has_use(options) {
        error!("{}", crate::memory::track::unavailable());
        return 1;
    }
    if !super::supported(options) {
        return 1;
    }
    let start = Instant::now();
    match crate::pre_dump::run(&with_bars(options)) {
        Ok(report) => {
            info!("Pre-dumping finished successfully");
            if options.personality == Persona::Standstill {
                print(&pre_dump_summary(options, &report, start.elapsed()));
            }
            0
        }
        Err(e) => {
            error!("{}", e.chain());
            error!("Pre-dumping FAILED.");
            1
        }
    }
}

/// Frees what newer checkpoints of a chain replace.
pub fn run_dedup(options: &Options) -> i32 {
    let freed = standstill_images::Images::open_folder(&options.images_dir)
        .map_err(crate::Error::from)
        .and_then(crate::memory::dedup::free_in_chain);
    match freed {
        Ok(freed) => {
            if options.personality == Persona::Standstill {
                print(&format!("{} freed\n", human_size(freed)));
            }
            0
        }
        Err(e) => {
            error!("{}", e.chain());
            1
        }
    }
}

/// Ends the tracking of a tree's memory.
pub fn run_untrack(options: &Options) -> i32 {
    let ended = match options.required_pid() {
        Ok(pid) => crate::memory::track::end(pid).map_err(|e| e.chain()),
        Err(e) => Err(e.to_string()),
    };
    match ended {
        Ok(true) => 0,
        Ok(false) => {
            error!("no memory is tracked there");
            1
        }
        Err(e) => {
            error!("{e}");
            1
        }
    }
}

/// What was taken, how long the tree stood still, and what comes next.
fn pre_dump_summary(options: &Options, report: &crate::DumpReport, took: Duration) -> String {
    if options.json {
        let v = serde_json::json!({
            "images": options.images_dir, "pages": report.pages, "pages_in_parent": report.in_parent,
            "seconds": took.as_secs_f64(), "frozen_seconds": report.frozen.as_secs_f64(),
        });
        return format!("{v}\n");
    }
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
    if let (Some(url), false) = (options.to.as_ref().and_then(|to| to.url()), options.json) {
        return format!(
            "{} of memory in {url} after {} (frozen {}); restore with: standstill restore --from {url}\n",
            human_size(pages * crate::memory::PAGE),
            human_time(took),
            human_time(report.frozen)
        );
    }
    if options.json {
        let v = serde_json::json!({
            "pages": pages, "seconds": took.as_secs_f64(), "frozen_seconds": report.frozen.as_secs_f64(),
        });
        return format!("{v}\n");
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
    if options.json {
        let v = serde_json::json!({
            "images": dir, "bytes": folder_size(dir), "seconds": took.as_secs_f64(),
        });
        return format!("{v}\n");
    }
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
