//! Every message and enum of the images and of the RPC, generated from `proto/*.proto`, all in one flat module.
//!
//! Text in images is `Vec<u8>` (names that the kernel keeps need not be UTF-8); text in RPC messages (`Criu…`) is
//! `String`. Enum fields are `i32` with typed getters; an entry that was read through this crate holds known values only.

#![allow(missing_docs, unreachable_pub)]
#![allow(clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/_.rs"));
