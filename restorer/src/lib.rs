//! Plans, and the executor that runs them inside a task.
//!
//! A *plan* is a flat list of [`plan::Op`]s: a system call with its operands and the result that is expected, a copy,
//! a clone, a wait for a stage. The engine writes plans; the executor, a position-independent blob that knows nothing of
//! files, sockets or memory areas, runs them in the task that is dumped or rebuilt. This library has what both sides
//! share: the layout of plans, and the machine code ([`arch`]) that enters and leaves a task.
#![no_std]
#![deny(unsafe_code)]

pub mod arch;
pub mod plan;
