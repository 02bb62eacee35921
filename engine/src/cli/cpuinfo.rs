//! `cpuinfo dump` and `cpuinfo check`: what this CPU can do, into an image, and compared with one.

use super::unavailable;
use crate::options::Options;

/// Writes the image.
pub fn run_dump(_options: &Options) -> i32 {
    unavailable::run("cpuinfo dump")
}

/// Compares with it.
pub fn run_check(_options: &Options) -> i32 {
    unavailable::run("cpuinfo check")
}
