//! Verbs that CRIU has and we do not have yet: refused by name.

use tracing::error;

/// Says so.
pub fn run(verb: &'static str) -> i32 {
    error!("{verb} is not supported yet");
    1
}
