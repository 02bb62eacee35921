//! Which tasks hold a GPU, and what of it can be carried.
//!
//! For now: nothing can be carried, and this crate says so before anything is touched. The caller lists what a task has
//! open and mapped; [`holds`] says which of these are GPUs and what a person can do about each. All of it is pure: no
//! file is opened here.
//!
//! A GPU is known by the major number of its device, which the caller takes from `/proc/devices` with
//! [`CharMajors::parse`], and by its path where the device number is not known. Drivers take their majors when they are
//! loaded, so the table is read once a dump.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod devices;
mod holding;

pub use devices::{CharMajors, DevicesError};
pub use holding::{holds, Accelerator, Holding, Place, Thing, What};
