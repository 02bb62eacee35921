//! Finding out that a task holds a GPU: such a task is refused by name, before anything is touched.

use rustix::fs::FileType;
use standstill_gpu::{holds, CharMajors, Place, Thing, What};

use crate::error::{Error, Result};
use crate::proc::maps::VmaName;
use crate::tasks::facts::Facts;

/// Refuses a task that has a GPU open or mapped, naming the device; `checkpointed` if its driver has let go of what it knows.
pub fn refuse(facts: &Facts, checkpointed: bool) -> Result<()> {
    let devices: Vec<_> = facts
        .descriptors
        .iter()
        .filter(|d| {
            FileType::from_raw_mode(d.stat.st_mode) == FileType::CharacterDevice && d.link.starts_with(b"/dev/")
        })
        .map(|d| Thing {
            place: Place::Descriptor(d.fd),
            path: &d.link,
            what: What::Character {
                major: rustix::fs::major(d.stat.st_rdev),
                minor: rustix::fs::minor(d.stat.st_rdev),
            },
        })
        .collect();
    let areas = facts.areas.iter().filter_map(|a| match a.name() {
        VmaName::File(path) if path.starts_with(b"/dev/") => {
            Some(Thing { place: Place::Mapping(a.start), path, what: What::Unknown })
        }
        _ => None,
    });
    let things: Vec<Thing<'_>> = devices.into_iter().chain(areas).collect();
    if things.is_empty() {
        return Ok(());
    }
    let majors = CharMajors::parse(&std::fs::read("/proc/devices").unwrap_or_default()).unwrap_or_default();
    match holds(&majors, things).first() {
        Some(held) => {
            let advice = if checkpointed {
                "the driver has left it behind in its checkpoint: end its other use (NVML, graphics, a fork without exec)"
            } else if matches!(held, standstill_gpu::Holding::Nvidia { .. }) {
                "CUDA does not answer for it: it began only now (try again), or it is other use of the GPU, which is not carried"
            } else {
                "GPU state is not carried yet: end its use in the program first"
            };
            Err(Error::refused(held.to_string(), advice))
        }
        None => Ok(()),
    }
}
