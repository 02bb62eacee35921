//! Verbs that CRIU has and we do not have yet: refused by name.

use crate::options::Options;
use std::ffi::OsString;
use tracing::error;

/// Says so.
pub fn run(verb: &'static str) -> i32 {
    error!("{verb} is not supported yet");
    1
}

/// The worker of a library: `swrk FD`.
pub fn swrk(rest: &[OsString], _options: Options) -> i32 {
    if rest.len() != 1 {
        eprintln!("Usage: criu swrk <fd>");
        return 1;
    }
    run("swrk")
}
