//! Standstill: checkpoint and restore of Linux process trees, in CRIU's image format.

pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
pub mod dump;
pub mod error;
pub mod files;
pub mod gpu;
pub mod log;
pub mod memory;
pub mod options;
pub mod plan;
pub mod proc;
pub mod restore;
pub mod signals;
pub mod sockets;
pub mod stats;
pub mod sys;
pub mod tasks;
pub mod timers;
pub mod tracee;

pub use error::{Error, Result};
