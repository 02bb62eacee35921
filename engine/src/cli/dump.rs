//! `dump` and `pre-dump`: the engine does it, this file says how it went.

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
    let start = Instant::now();
    match crate::dump::run(options) {
        Ok(_) => {
            info!("Dumping finished successfully");
            if options.personality == Persona::Standstill {
                print(&summary(options, start.elapsed()));
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
    super::unavailable::run("pre-dump")
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
