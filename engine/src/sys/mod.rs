//! The raw interfaces of the kernel that no library here has: unsafe code lives in this folder, each block with the
//! invariant that makes it sound.
#![allow(unsafe_code)]

pub mod alias;
pub mod calls;
pub mod cgroupfs;
pub mod cpu;
pub mod diag;
pub mod futex;
pub mod interrupt;
pub mod io_uring;
pub mod ipc;
pub mod memory;
pub mod mount;
pub mod mqueue;
pub mod netlink;
pub mod nftables;
pub mod probe;
pub mod ptrace;
pub mod shm;
pub mod spawn;
pub mod thread;
pub mod uffd;
pub mod uffd_lazy;
