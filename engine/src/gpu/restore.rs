//! CUDA tasks in a restore: what can be known is checked before anything is made, and all go back to GPUs before anyone runs.

use std::sync::Arc;

use standstill_gpu::{Driver, Gpu, Management, State, Uuid};
use standstill_images::proto::{InventoryEntry, StandstillGpuEntry};
use standstill_images::{ImageKind, Images};

use super::{running, PLUGIN};
use crate::error::{At, Error, Result};
use crate::options::Options;
use crate::sys::ptrace;

const IMAGE: &str = "standstill-gpu.img";

/// What is to go back to GPUs.
#[derive(Debug)]
pub struct Revival {
    driver: Arc<Driver>,
    pairs: Vec<(Uuid, Uuid)>,
    /// The tasks that had CUDA, by the tree's ids, if that is known.
    tasks: Option<Vec<i32>>,
}

/// Reads what a checkpoint says of GPUs, and compares it with this machine; nothing if it has no CUDA.
pub fn prepare(opts: &Options, images: &Images, inventory: &InventoryEntry) -> Result<Option<Revival>> {
    let plugins = inventory.plugins_entry.as_ref().map_or(&[][..], |p| &p.plugins);
    if !plugins.iter().any(|p| p.as_slice() == PLUGIN) {
        if !opts.gpu_map.is_empty() {
            return Err(Error::Usage {
                what: "--gpu-map, but there is no CUDA in the checkpoint: leave it out".into(),
            });
        }
        return Ok(None);
    }
    let record: Option<StandstillGpuEntry> = images.read_one_if_there(ImageKind::StandstillGpu, ())?;
    let driver = Driver::load()?;
    let gpus = Management::load().and_then(|m| m.gpus());
    let pairs = match &record {
        Some(record) => pairs_of(opts, record, gpus.as_deref())?,
        None => opts.gpu_map.clone(),
    };
    let pid = |pid: u32| i32::try_from(pid).map_err(|_| Error::lie(IMAGE, format!("there is no process {pid}")));
    let tasks = record.map(|r| r.task.iter().map(|t| pid(t.pid)).collect::<Result<_>>()).transpose()?;
    Ok(Some(Revival { driver: Arc::new(driver), pairs, tasks }))
}

fn uuid(text: &[u8]) -> Result<Uuid> {
    let read = std::str::from_utf8(text).ok().and_then(Uuid::parse);
    read.ok_or_else(|| Error::lie(IMAGE, format!("{} is no UUID of a GPU", text.escape_ascii())))
}

/// Which GPU takes whose place: none if all stay, else every one of the checkpoint. `here` are those of this machine, if that is known.
fn pairs_of(opts: &Options, record: &StandstillGpuEntry, here: Option<&[Gpu]>) -> Result<Vec<(Uuid, Uuid)>> {
    let mut known = Vec::new();
    for device in &record.device {
        known.push((uuid(&device.uuid)?, String::from_utf8_lossy(&device.name).into_owned()));
    }
    if let Some((old, _)) = opts.gpu_map.iter().find(|(old, _)| known.iter().all(|(uuid, _)| uuid != old)) {
        let all: Vec<String> = known.iter().map(|(uuid, _)| uuid.to_string()).collect();
        return Err(Error::Usage {
            what: format!("--gpu-map: {old} is not in the checkpoint, which has {}", all.join(", ")),
        });
    }
    let new = |old: Uuid| opts.gpu_map.iter().rev().find(|(from, _)| *from == old).map_or(old, |(_, to)| *to);
    if let Some(here) = here {
        let mut needed: Vec<(Uuid, u64)> = Vec::new();
        for used in record.task.iter().flat_map(|t| &t.r#use) {
            needed.push((uuid(&used.uuid)?, used.bytes.unwrap_or(0)));
        }
        for (old, name) in known.iter().filter(|(old, _)| needed.iter().any(|(used, _)| used == old)) {
            let Some(gpu) = here.iter().find(|gpu| gpu.uuid == new(*old)) else {
                let all: Vec<String> = here.iter().map(|gpu| format!("{} ({})", gpu.uuid, gpu.name)).collect();
                let what = format!(
                    "the checkpoint needs the GPU {} ({name}), and here is {}; say which takes its place with --gpu-map {old}=NEW",
                    new(*old),
                    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
                );
                return Err(Error::Changed { what });
            };
            if gpu.name != *name {
                let what = format!("{old} is a {name}, and {}, which is to take its place, a {}", gpu.uuid, gpu.name);
                return Err(Error::Changed { what });
            }
        }
        for gpu in here {
            let bytes: u64 =
                needed.iter().filter(|(old, _)| new(*old) == gpu.uuid).fold(0, |s, n| s.saturating_add(n.1));
            if bytes > gpu.free {
                let what = format!(
                    "the checkpoint needs {} MiB on the GPU {}, of which {} MiB are free: end what uses it, or choose another with \
                     --gpu-map",
                    bytes >> 20,
                    gpu.uuid,
                    gpu.free >> 20
                );
                return Err(Error::Changed { what });
            }
        }
    }
    let moves = known.iter().any(|(old, _)| new(*old) != *old);
    Ok(if moves { known.iter().map(|(old, _)| (*old, new(*old))).collect() } else { Vec::new() })
}

impl Revival {
    /// Brings tasks back to GPUs: all that have a device, then all are unlocked. They are stopped, in their own code, and traced;
    /// each by its id in the tree, and by ours.
    pub fn go(&self, all: impl Iterator<Item = Result<(i32, i32)>>) -> Result<()> {
        let mut tasks = Vec::new();
        for task in all {
            let (inner, pid) = task?;
            match (self.driver.restore_thread(pid), &self.tasks) {
                (Ok(tid), _) => tasks.push((pid, tid)),
                (Err(e), Some(known)) if known.contains(&inner) => return Err(Error::from(e)).task(pid),
                (Err(_), _) => {}
            }
        }
        let options = ptrace::SYSGOOD | ptrace::EXITKILL;
        let (driver, pairs) = (self.driver.clone(), Arc::new(self.pairs.clone()));
        let restored = running::with_threads(&tasks, options, move |pid| match driver.state(pid)? {
            State::Checkpointed => driver.restore(pid, &pairs),
            _ => Ok(()),
        })?;
        restored.into_iter().collect::<Result<()>>()?;
        let driver = self.driver.clone();
        let unlocked = running::with_threads(&tasks, options, move |pid| driver.bring_back(pid, State::Running))?;
        unlocked.into_iter().collect()
    }
}
