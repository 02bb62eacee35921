//! Character devices: which ones can be carried by their path alone.
//!
//! What a driver keeps for an open file is not seen from outside, so only those that keep nothing are let through, and a
//! refusal says what kind of device it was. Block devices keep no more than an offset; terminals have a kind of their own.
//!
//! Man pages: null(4), random(4), proc_devices(5).

use rustix::fs::{FileType, Stat};
use standstill_gpu::{CharMajors, Holding, Thing, What};

use crate::error::{Error, Result};

/// Memory devices: null, zero, full, random, urandom, kmsg. They have no state.
const MEMORY_DEVICES: u32 = 1;

/// Refuses a device that has state of its own. `gpus` is read when it is first needed.
pub(super) fn check(link: &[u8], stat: &Stat, flags: u32, gpus: &mut Option<CharMajors>) -> Result<()> {
    if flags & libc::O_PATH as u32 != 0 || FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return Ok(());
    }
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    if major == MEMORY_DEVICES {
        return Ok(());
    }
    let gpus = match gpus {
        Some(gpus) => gpus,
        none @ None => {
            let table = std::fs::read("/proc/devices").ok();
            none.insert(table.and_then(|table| CharMajors::parse(&table).ok()).unwrap_or_default())
        }
    };
    let thing = Thing { place: standstill_gpu::Place::Mapping(0), path: link, what: What::Character { major, minor } };
    let advice = match standstill_gpu::holds(gpus, [thing]).first() {
        Some(Holding::Nvidia { .. }) => {
            "only CUDA is carried, whose driver lets go of its devices: end other use of the GPU (NVML, graphics)"
        }
        Some(Holding::AmdKfd { .. }) => "end the ROCm work first",
        Some(Holding::DrmRender { .. }) => "let the program close it, or run it with software rendering",
        Some(Holding::DrmDisplay { .. }) => {
            "a display server cannot be carried; its clients can once they are disconnected"
        }
        Some(Holding::Accel { .. }) | None => "let the program close it before the dump",
    };
    Err(Error::refused(format!("the character device {} ({major}:{minor})", String::from_utf8_lossy(link)), advice))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_no_state_passes() {
        let mut gpus = None;
        let stat = |major, minor| {
            let mut stat = rustix::fs::stat("/dev/null").unwrap();
            stat.st_rdev = rustix::fs::makedev(major, minor);
            stat
        };
        check(b"/dev/zero", &stat(1, 5), 0, &mut gpus).unwrap();
        check(b"/dev/fuse", &stat(10, 229), libc::O_PATH as u32, &mut gpus).unwrap();
        let fuse = check(b"/dev/fuse", &stat(10, 229), 0, &mut gpus).unwrap_err().to_string();
        assert!(fuse.contains("/dev/fuse (10:229)"), "{fuse}");
        let gpu = check(b"/dev/nvidia0", &stat(195, 0), 0, &mut gpus).unwrap_err().to_string();
        assert!(gpu.contains("CUDA"), "{gpu}");
    }
}
