//! Keys that checkpoints are sealed with: `--key-file`, `--key-fd`, `keygen`.
//!
//! A key is 32 bytes, or 64 hexadecimal digits; anything else is refused, since it is most often a password or the wrong file.
//! It is read once, when the option is read, so a descriptor may be a pipe. A file that others may read
//! is used, with a warning.
//!
//! Man pages: open(2), fstat(2).

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::RawFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use standstill_images::store::sealed::Key;
use zeroize::Zeroizing;

use crate::error::{At, Call, Error, Place, Result};
use crate::sys::calls;

/// Longer than any key.
const LONG: u64 = 100;

/// Why there is no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("cannot read the key from {from}: {reason}")]
    Read {
        /// The file or descriptor.
        from: String,
        /// What the system said.
        reason: String,
    },
    /// It is none.
    #[error("{from} is no key: 32 bytes or 64 hexadecimal digits are wanted (standstill keygen FILE makes one)")]
    Form {
        /// The file or descriptor.
        from: String,
    },
}

/// The key in a file.
pub fn of_file(path: &Path) -> Result<Key, KeyError> {
    let from = path.display().to_string();
    match File::options().read(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open(path) {
        Ok(file) => read(file, from),
        Err(e) => Err(KeyError::Read { from, reason: e.to_string() }),
    }
}

/// The key that a descriptor of ours gives. It stays open.
pub fn of_fd(fd: RawFd) -> Result<Key, KeyError> {
    let from = format!("descriptor {fd}");
    match calls::dup_number(fd) {
        Ok(own) => read(File::from(own), from),
        Err(e) => Err(KeyError::Read { from, reason: e.to_string() }),
    }
}

fn read(file: File, from: String) -> Result<Key, KeyError> {
    let metadata = match file.metadata() {
        Ok(metadata) => metadata,
        Err(e) => return Err(KeyError::Read { from, reason: e.to_string() }),
    };
    if metadata.is_file() && metadata.mode() & 0o077 != 0 {
        tracing::warn!("others than its owner can read the key in {from}: chmod 600 it");
    }
    // no buffer grows: what is left behind by one that does is not erased
    let mut text = Zeroizing::new(Vec::with_capacity(2 * LONG as usize));
    if let Err(e) = file.take(LONG).read_to_end(&mut text) {
        return Err(KeyError::Read { from, reason: e.to_string() });
    }
    Key::parse(&text).ok_or(KeyError::Form { from })
}

/// Makes a file with a new key, which must not be there yet.
pub fn generate(path: &Path) -> Result<()> {
    let text = Key::generate()?;
    let failed = || Place::Path(path.to_owned());
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path).call("open").at(failed())?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).call("write").at(failed())
}

/// Which of the options do not go with a key.
pub(super) fn refuse(asked: &[(bool, &'static str, &'static str)]) -> Result<()> {
    match asked.iter().find(|(asked, ..)| *asked) {
        Some((_, name, why)) => Err(Error::Usage { what: format!("{name} does not go with a key: {why}") }),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn files_and_descriptors() {
        let folder = std::env::temp_dir().join(format!("standstill-keys-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("key");
        generate(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(generate(&path).is_err(), "an old key is not lost");
        of_file(&path).unwrap();
        let file = File::open(&path).unwrap();
        of_fd(file.as_raw_fd()).unwrap();
        for bad in [&b"short"[..], &[0; 33], &[0; 2 << 20], b""] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(of_file(&path), Err(KeyError::Form { .. })));
        }
        assert!(matches!(of_file(&folder.join("none")), Err(KeyError::Read { .. })));
        assert!(matches!(of_file(&folder), Err(KeyError::Read { .. })));
        assert!(matches!(of_fd(-1), Err(KeyError::Read { .. })));
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(&[7; 32]).unwrap();
        drop(write);
        of_fd(read.as_raw_fd()).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
