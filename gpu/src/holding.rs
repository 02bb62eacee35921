//! From what a task has open and mapped to which accelerators it holds.

use std::fmt;

use crate::CharMajors;

/// A kind of accelerator, by its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// NVIDIA: `/dev/nvidia*`, with nvidia-uvm and nvidia-caps.
    Nvidia,
    /// AMD compute: `/dev/kfd`.
    AmdKfd,
    /// Direct rendering, of any maker: `/dev/dri/*`.
    Drm,
    /// The kernel's compute accelerators: `/dev/accel/*`.
    Accel,
}

/// Where in a task a thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A descriptor.
    Descriptor(i32),
    /// An area of memory, by its first address.
    Mapping(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Mapping(start) => write!(f, "area {start:x}"),
        }
    }
}

/// What is known of a file without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A character device, with its number.
    Character {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Anything else: whatever its path, it is no accelerator.
    NotCharacter,
    /// Not known; the path decides.
    Unknown,
}

/// Something that a task has open or mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thing<'a> {
    /// Where.
    pub place: Place,
    /// Its path, as the link says.
    pub path: &'a [u8],
    /// What `stat` says.
    pub what: What,
}

/// An accelerator that a task holds, and so a reason to refuse. The message says what a person can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Holding {
    /// An NVIDIA device.
    #[error(
        "{place}, the NVIDIA device {}, whose state is on the GPU,",
        device.escape_ascii()
    )]
    Nvidia {
        /// Where.
        place: Place,
        /// Path of the device.
        device: Vec<u8>,
    },
    /// AMD's compute device.
    #[error(
        "{place} is the AMD compute device {}, whose queues and memory cannot be saved here; end the ROCm work first",
        device.escape_ascii()
    )]
    AmdKfd {
        /// Where.
        place: Place,
        /// Path of the device.
        device: Vec<u8>,
    },
    /// A direct rendering node that computes.
    #[error(
        "{place} is the rendering device {}, whose contexts and buffers cannot be saved here; \
         let the program close it, or run it with software rendering",
        device.escape_ascii()
    )]
    DrmRender {
        /// Where.
        place: Place,
        /// Path of the device.
        device: Vec<u8>,
    },
    /// A direct rendering node that drives a display.
    #[error(
        "{place} is the display device {}, whose modes and buffers cannot be saved here; \
         a display server cannot be carried, its clients can once they are disconnected",
        device.escape_ascii()
    )]
    DrmDisplay {
        /// Where.
        place: Place,
        /// Path of the device.
        device: Vec<u8>,
    },
    /// A compute accelerator.
    #[error(
        "{place} is the compute accelerator {}, whose state cannot be saved here; let the program close it",
        device.escape_ascii()
    )]
    Accel {
        /// Where.
        place: Place,
        /// Path of the device.
        device: Vec<u8>,
    },
}

/// Says which of these things are accelerators, in the order given.
///
/// A major number that [`CharMajors`] knows decides; then a path does, unless the thing is known to be no character device.
#[must_use]
pub fn holds<'a>(majors: &CharMajors, things: impl IntoIterator<Item = Thing<'a>>) -> Vec<Holding> {
    things.into_iter().filter_map(|thing| one(majors, thing)).collect()
}

fn one(majors: &CharMajors, thing: Thing<'_>) -> Option<Holding> {
    let by_path = || accelerator_of_path(thing.path);
    let (kind, minor) = match thing.what {
        What::NotCharacter => return None,
        What::Unknown => (by_path()?, None),
        What::Character { major, minor } => (majors.accelerator(major).or_else(by_path)?, Some(minor)),
    };
    let (place, device) = (thing.place, thing.path.to_vec());
    Some(match kind {
        Accelerator::Nvidia => Holding::Nvidia { place, device },
        Accelerator::AmdKfd => Holding::AmdKfd { place, device },
        Accelerator::Accel => Holding::Accel { place, device },
        Accelerator::Drm if is_render(minor, thing.path) => Holding::DrmRender { place, device },
        Accelerator::Drm => Holding::DrmDisplay { place, device },
    })
}

/// Render nodes have minors from 128 to 191. From 192 on, new kernels put what found no room in the ranges of each kind,
/// so there only the name tells.
fn is_render(minor: Option<u32>, path: &[u8]) -> bool {
    match minor {
        Some(minor @ 0..192) => minor >= 128,
        Some(_) | None => path.strip_prefix(b"/dev/dri/").is_some_and(|name| name.starts_with(b"render")),
    }
}

fn accelerator_of_path(path: &[u8]) -> Option<Accelerator> {
    let name = path.strip_prefix(b"/dev/")?;
    if name.starts_with(b"nvidia") {
        Some(Accelerator::Nvidia)
    } else if name == b"kfd" {
        Some(Accelerator::AmdKfd)
    } else if name.starts_with(b"dri/") {
        Some(Accelerator::Drm)
    } else if name.starts_with(b"accel/") {
        Some(Accelerator::Accel)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn majors() -> CharMajors {
        CharMajors::parse(b"Character devices:\n195 nvidia\n226 drm\n235 kfd\n507 nvidia-uvm\n").unwrap()
    }

    fn fd(path: &str, what: What) -> Thing<'_> {
        Thing { place: Place::Descriptor(7), path: path.as_bytes(), what }
    }

    #[test]
    fn by_number_and_path() {
        let number = |major, minor| What::Character { major, minor };
        let found = holds(
            &majors(),
            [
                fd("/dev/null", number(1, 3)),
                fd("/dev/nvidia0", number(195, 0)),
                fd("/somewhere/else", number(507, 1)),
                fd("/dev/nvidia-caps/nvidia-cap1", number(240, 1)),
                fd("/dev/kfd", What::Unknown),
                fd("/dev/dri/renderD128", number(226, 128)),
                fd("/dev/dri/card0", number(226, 0)),
                fd("/dev/dri/renderD129", What::Unknown),
                fd("/dev/accel/accel0", What::Unknown),
                fd("/dev/nvidia0", What::NotCharacter),
                fd("/home/dev/nvidia0", What::Unknown),
                fd("socket:[1]", What::NotCharacter),
            ],
        );
        let place = Place::Descriptor(7);
        let device = |path: &str| path.as_bytes().to_vec();
        assert_eq!(
            found,
            [
                Holding::Nvidia { place, device: device("/dev/nvidia0") },
                Holding::Nvidia { place, device: device("/somewhere/else") },
                Holding::Nvidia { place, device: device("/dev/nvidia-caps/nvidia-cap1") },
                Holding::AmdKfd { place, device: device("/dev/kfd") },
                Holding::DrmRender { place, device: device("/dev/dri/renderD128") },
                Holding::DrmDisplay { place, device: device("/dev/dri/card0") },
                Holding::DrmRender { place, device: device("/dev/dri/renderD129") },
                Holding::Accel { place, device: device("/dev/accel/accel0") },
            ]
        );
    }

    #[test]
    fn messages() {
        let area = Thing { place: Place::Mapping(0x7f00_0000_0000), path: b"/dev/nvidia\xff", what: What::Unknown };
        let message = holds(&majors(), [area]).first().unwrap().to_string();
        assert!(message.starts_with("area 7f0000000000, the NVIDIA device /dev/nvidia\\xff, whose state"), "{message}");
    }
}
