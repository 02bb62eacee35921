//! CUDA: what tasks have on GPUs comes into their own memory before a dump, and goes back behind it and at a restore.
//!
//! **What there is.** A CUDA process has device files open and mapped, memory on a device, and a thread of its driver that
//! does what the driver's checkpoint interface is asked for ([`standstill_gpu::Driver`]). Once it is *checkpointed*, it holds
//! no device, and is a process as any other.
//!
//! **Dump**, in this order: CUDA tasks are found and *locked* while they run, side by side (work that was submitted ends
//! first, which may take as long as `--gpu-timeout` says); the tree is frozen; each one's restore thread alone is let run, and
//! the tasks are *checkpointed*; their threads are looked at again, and /proc is read only then. If the tree goes on, they are
//! *restored* and *unlocked* while all else stands still. **Restore**: when all is in place and nothing of the tree runs yet,
//! all are restored, then all are unlocked, in which again only their restore threads run.
//!
//! **Failures.** [`dump::Cuda`] brings every task back into the state that it was found in when it is dropped; if the engine is
//! killed, its guard does that, by the internal verb `gpu-release` of this program ([`guard`]): tasks run then, and their CUDA
//! calls wait until it is done, as with NVIDIA's own tool.
//!
//! **Images.** The inventory names CRIU's plugin, `cuda_plugin`, with which CRIU restores such a checkpoint, and without which
//! it refuses it; `standstill-gpu.img`, which CRIU does not look at, has the GPUs, and each task's use of them. A checkpoint
//! of CRIU has no such image: then all tasks are asked for. As CRIU, a restore ends with all tasks *running*, whatever state
//! they were found in.
//!
//! **Not kept**: what the driver does not keep. Device memory travels as memory of its process (no custom storage).
//!
//! Sources: CUDA Driver API, "CUDA Checkpointing"; the page of NVIDIA/cuda-checkpoint.

mod devices;
pub mod dump;
pub mod guard;
pub mod restore;
mod running;

pub use devices::refuse;

use standstill_images::proto::StandstillGpuEntry;
use standstill_images::{ImageKind, Images};
use std::fmt::Write as _;

use crate::error::Result;

/// The name that a checkpoint with CUDA has in its inventory.
pub const PLUGIN: &[u8] = b"cuda_plugin";

/// The GPUs of a checkpoint and who uses them, for people; nothing if it has none.
pub fn describe(images: &Images) -> Result<String> {
    let Some(entry) = images.read_one_if_there::<StandstillGpuEntry>(ImageKind::StandstillGpu, ())? else {
        return Ok(String::new());
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let mut out = String::new();
    let driver = entry.driver.as_deref().map_or(String::new(), |v| format!("driver {}, ", text(v)));
    let _ = writeln!(out, "{driver}CUDA {}.{}", entry.cuda / 1000, entry.cuda % 1000 / 10);
    for device in &entry.device {
        let _ = writeln!(out, "GPU {} {} {}", text(&device.uuid), text(&device.name), mib(device.bytes));
    }
    for task in &entry.task {
        let state = standstill_gpu::State::of(task.state);
        let _ = writeln!(out, "task {} {state}, restore thread {}", task.pid, task.restore_tid);
        for used in &task.r#use {
            let bytes = used.bytes.map_or("unknown".to_owned(), mib);
            let _ = writeln!(out, "  {bytes} on {}", text(&used.uuid));
        }
    }
    Ok(out)
}
