//! Tests that cannot run here say so, and are counted.

use std::io::Write as _;

/// The file that names every skipped test, one a line, if the runner asked for one.
const FILE: &str = "STANDSTILL_SKIPPED";

/// Says that a test was skipped, and why.
pub fn skip(test: &str, why: &str) {
    eprintln!("SKIPPED {test}: {why}");
    let Some(path) = std::env::var_os(FILE) else { return };
    if let Ok(mut file) = std::fs::File::options().append(true).create(true).open(path) {
        // one write: tests run side by side
        let _ = file.write_all(format!("{test}: {why}\n").as_bytes());
    }
}
