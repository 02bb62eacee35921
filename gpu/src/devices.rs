//! `/proc/devices`: which driver has which major number.
//!
//! Man page: proc_devices(5).

use crate::Accelerator;

/// `/proc/devices` does not read as a table of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("/proc/devices, line {line}: no number and name of a driver")]
pub struct DevicesError {
    /// The line, counted from one.
    pub line: usize,
}

/// Major numbers of character devices that drive GPUs and other accelerators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CharMajors {
    majors: Vec<(u32, Accelerator)>,
}

impl CharMajors {
    /// Reads `/proc/devices`. Names of drivers that are not for accelerators are passed over.
    ///
    /// # Errors
    /// If a line is neither a head line nor a number and a name.
    pub fn parse(text: &[u8]) -> Result<Self, DevicesError> {
        let mut majors = Vec::new();
        let mut characters = false;
        for (number, line) in text.split(|&b| b == b'\n').enumerate() {
            let line = line.trim_ascii();
            match line {
                b"" => continue,
                b"Character devices:" => characters = true,
                b"Block devices:" => characters = false,
                _ => {
                    let entry = split(line).ok_or(DevicesError { line: number.saturating_add(1) })?;
                    if let (true, (major, name)) = (characters, entry) {
                        majors.extend(driver(name).map(|kind| (major, kind)));
                    }
                }
            }
        }
        Ok(Self { majors })
    }

    /// What drives this major number, if it is an accelerator.
    #[must_use]
    pub fn accelerator(&self, major: u32) -> Option<Accelerator> {
        self.majors.iter().find(|(known, _)| *known == major).map(|(_, kind)| *kind)
    }
}

/// `195 nvidia`.
fn split(line: &[u8]) -> Option<(u32, &[u8])> {
    let at = line.iter().position(|&b| b == b' ')?;
    let digits = line.get(..at)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let major = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let name = line.get(at..)?.trim_ascii();
    (!name.is_empty()).then_some((major, name))
}

/// The drivers' own names: `nvidia`, `nvidia-frontend`, `nvidiactl`, `nvidia-uvm`, `nvidia-caps`, `nvidia-nvswitch`, …
fn driver(name: &[u8]) -> Option<Accelerator> {
    match name {
        b"drm" => Some(Accelerator::Drm),
        b"kfd" => Some(Accelerator::AmdKfd),
        b"accel" => Some(Accelerator::Accel),
        _ if name.starts_with(b"nvidia") => Some(Accelerator::Nvidia),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let majors = CharMajors::parse(
            b"Character devices:\n  1 mem\n  4 /dev/vc/0\n195 nvidia\n195 nvidiactl\n226 drm\n234 nvidia-caps\n236 kfd\n\
              261 accel\n507 nvidia-uvm\n\nBlock devices:\n  7 loop\n226 drm-of-blocks\n",
        )
        .unwrap();
        for major in [195, 234, 507] {
            assert_eq!(majors.accelerator(major), Some(Accelerator::Nvidia));
        }
        assert_eq!(majors.accelerator(226), Some(Accelerator::Drm));
        assert_eq!(majors.accelerator(236), Some(Accelerator::AmdKfd));
        assert_eq!(majors.accelerator(261), Some(Accelerator::Accel));
        assert_eq!((majors.accelerator(1), majors.accelerator(7)), (None, None));
    }

    #[test]
    fn hostile() {
        assert_eq!(CharMajors::parse(b""), Ok(CharMajors::default()));
        for bad in ["x", "1", "-1 drm", "4294967296 drm", "1\u{e4} drm"] {
            assert_eq!(CharMajors::parse(bad.as_bytes()), Err(DevicesError { line: 1 }), "{bad}");
        }
        assert_eq!(CharMajors::parse(b"Character devices:\n\xff\xfe\n").unwrap_err().line, 2);
    }

    #[test]
    fn own() {
        CharMajors::parse(&std::fs::read("/proc/devices").unwrap()).unwrap();
    }
}
