//! What depends on the CPU: machine code to enter and leave a task.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the executor knows x86_64 only; another architecture is one more file in restorer/src/arch");
