//! Tasks: the tree, its threads, and what each of them is to the kernel.

pub mod core;
pub mod creds;
pub mod facts;
pub mod finish;
pub mod flags;
pub mod freeze;
pub mod ids;
pub mod leftovers;
pub mod pids;
pub mod registers;
pub mod release;
pub mod revive;
pub mod seccomp;
pub mod tree;
