//! Which tasks hold a GPU, what of it can be carried, and NVIDIA's driver, which carries it.
//!
//! The caller lists what a task has open and mapped; [`holds`] says which of these are GPUs and what a person can do about
//! each. That is pure: no file is opened there. A GPU is known by the major number of its device, which the caller takes from
//! `/proc/devices` with [`CharMajors::parse`], and by its path where the device number is not known. Drivers take their majors
//! when they are loaded, so the table is read once a dump.
//!
//! [`Driver`] is the checkpoint interface of NVIDIA's driver, [`Management`] knows GPUs and who uses them. Both libraries are
//! loaded when they are needed; a machine without them builds and runs all of this.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod devices;
pub mod driver;
mod holding;

pub use devices::{CharMajors, DevicesError};
pub use driver::{Driver, DriverError, Gpu, Management, State, Step, Use, Uuid};
pub use holding::{holds, Accelerator, Holding, Place, Thing, What};
