//! Tasks in the engine's hands, as types: [`Stopped`] (seized, its registers known) and [`Infected`] (the executor is in
//! it). Each consumes the one before. Dropping one cures what was done to it and lets it go: the program runs on.
//!
//! The order in which a task is entered and left is what keeps a program alive whose engine is killed at any request:
//! - in: memory first, then the general registers, then the signal mask;
//! - out: the extended state, the signal mask, then the general registers, then the detach.
//!
//! Wherever the engine dies in between, the task either runs its own code, or code that finds the way back by itself.

mod infected;
mod stopped;

pub use infected::{write_control, Answers, Area, Infected, AREA_NAME, BLOB};
pub use stopped::{undo_winding, Held, Stopped};

use std::time::Duration;

/// How long a seized task may take to stop.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);
/// All signals that can be blocked.
pub const ALL_SIGNALS: u64 = !0;
