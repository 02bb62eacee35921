//! Checkpoints in object storage: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage, and folders in the
//! same form (`file://`).
//!
//! [`ObjectStorage`] is a [`Store`](standstill_images::Store): an image is an object below the prefix that the URL names. The
//! protocols and credentials are those of the `object_store` crate, with what its environment variables say and with
//! [`Settings::options`] on top. It is asynchronous; here it has a thread of its own, which exists as long as the storage does,
//! and in which all signals are blocked.
//!
//! **Writing.** Small images are put in one request, larger ones in parts ([`PART`]), several side by side; no more than
//! [`IN_FLIGHT`] parts are on their way, and who writes waits for one of them. Requests of an image that was finished go
//! on while others are written; [`commit`](standstill_images::Store::commit) waits for all of them, compares what the storage
//! has with what was sent, and then writes `manifest.json` and, last of all, the inventory. So
//! a prefix without an inventory has no checkpoint, nor has one without a manifest.
//! Before anything else `unfinished` is written, which shows that writing is allowed, and is removed at the end.
//! Storage that is dropped before it is committed aborts its uploads and removes what it wrote, as far as the other
//! side lets it within [`CLEAN_UP`]. What a killed process had begun stays: the next dump to the same prefix replaces
//! objects, but an upload in parts that was begun stays at the provider until a rule there ends it.
//!
//! **Reading.** `manifest.json` has the size of each image and the SHA-256 of each [`PIECE`] of it. Pieces are fetched by ranges and
//! compared; one that is wrong is fetched once more.
//!
//! **Checksums on the way.** S3 gets the SHA-256 of each request's body and compares it, unless `checksum_algorithm` is set to
//! something else.
//!
//! **Retries.** A request that fails with 5xx, 429, a lost connection or no answer in time is tried again, [`RETRIES`] times
//! and for [`RETRY_FOR`] at most.
//!
//! Not done: parents of checkpoints; locks against two who write to the same prefix.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::time::Duration;

mod connect;
mod manifest;
mod reading;
mod runtime;
mod writing;

pub use connect::{ConnectError, Settings};
pub use writing::ObjectStorage;

/// The list of images, written before the inventory.
pub const MANIFEST: &str = "manifest.json";
/// Says that a checkpoint is being written.
const MARKER: &str = "unfinished";
/// The image that makes the others a checkpoint.
const INVENTORY: &str = "inventory.img";

/// Bytes that are checked together.
pub const PIECE: usize = 4 << 20;
/// Bytes that are sent together. The protocol of S3 has at most 10,000 parts: an image has at most 156 GiB.
pub const PART: usize = 16 << 20;
/// Parts that are on their way.
pub const IN_FLIGHT: usize = 6;
/// How often a request is tried again.
pub const RETRIES: usize = 5;
/// How long a request is tried again.
pub const RETRY_FOR: Duration = Duration::from_secs(30);
/// How long a storage that was not committed takes to clean up.
pub const CLEAN_UP: Duration = Duration::from_secs(10);

type Sum = [u8; 32];

fn sum(bytes: &[u8]) -> Sum {
    let mut sum = [0; 32];
    sum.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    sum
}

#[cfg(test)]
mod tests;
