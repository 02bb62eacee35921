//! Self-checking programs ([`guests`]), and what dumps, restores and asks them ([`run`]).
//!
//! A guest builds up state, says that it is ready, waits, and then checks that all of it is still there. It is started
//! by a test as a process of its own, in a session of its own, with a folder to itself. The files of that folder are
//! the whole protocol: the guest writes `ready`; the test does what it tests, and writes `check` (`running`, or
//! `restored` if the guest was dead in between); the guest writes `result`: `ok`, or the check that failed.

#[allow(unsafe_code)]
pub mod cgroup;
pub mod compare;
pub mod container;
pub mod engine;
#[allow(unsafe_code, clippy::undocumented_unsafe_blocks, clippy::not_unsafe_ptr_arg_deref)]
// a guest is its system calls; nothing else runs in it
pub mod guests;
#[allow(unsafe_code)]
pub mod process;
pub mod program;
#[allow(unsafe_code)]
pub mod rpc;
pub mod run;
pub mod s3;
pub mod skip;
