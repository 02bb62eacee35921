//! CRIU's image format: every message, one table of image kinds, framing, pages, stores, and JSON as crit prints it.
//!
//! - [`proto`]: the messages.
//! - [`ImageKind`]: the table.
//! - [`Reader`], [`Writer`]: one image's bytes, as entries and payloads, and back.
//! - [`Store`]: where images are: a folder, memory; [`store::stream`] carries all of them over one connection,
//!   [`store::sealed`] encrypts them.
//! - [`Images`]: the images of a store, by kind.
//! - [`pages`]: which page is where.
//! - [`json`], [`explore`]: images for people and their tools.
//!
//! Images may come from anywhere, so nothing in them is believed: no size is allocated before the bytes are there, no
//! nesting is followed without bound, and what is wrong is an [`Error`] that names the image, the entry and the byte.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod error;
pub mod explore;
mod framing;
mod images;
pub mod json;
pub mod pages;
mod payload;
pub mod proto;
mod schema;
pub mod store;
mod sums;
mod table;
mod wire;

pub use error::{Error, JsonFault, Malformed, PagesFault, RecordFault, Result, SealFault};
pub use framing::{Entry, GhostContent, Reader, Writer};
pub use images::{Image, ImageWriter, Images};
pub use payload::{Cursor, WithPayload};
pub use schema::unknown_fields;
pub use store::{FolderStore, ImageOutput, MemoryStore, ReadAt, Store};
pub use sums::crc_of;
pub use table::{Header, Id, ImageKind, Payload, MAGIC_COMMON, MAGIC_SERVICE};
