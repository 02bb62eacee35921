//! Is a file the one that was dumped? Its size, its mode, and the build-id of an ELF file say so.
//!
//! A build-id is the description of a note of type 3 (NT_GNU_BUILD_ID) in a PT_NOTE segment, looked for in the first
//! 1 MiB of the file and kept as 32-bit words in this machine's order, the last one padded with zeros. The texts of what
//! differs are CRIU's. Content is not compared: only what these three can tell is told.
//!
//! Man page: elf(5).

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{FileType, Stat};
use standstill_images::proto::RegFileEntry;

use super::paths::reopen;
use crate::error::{Error, Result};
use crate::options::{FileValidation, Options};

/// How far into a file its build-id may be.
const REACH: u64 = 1 << 20;
/// The longest build-id there is.
const LONGEST: u32 = 512;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The first part of a file.
struct Head<'a> {
    file: BorrowedFd<'a>,
    len: u64,
}

impl Head<'_> {
    fn bytes(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        if offset.checked_add(len as u64)? > self.len {
            return None;
        }
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match rustix::io::pread(self.file, &mut bytes[done..], offset + done as u64) {
                Ok(0) | Err(_) => return None,
                Ok(n) => done += n,
            }
        }
        Some(bytes)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The build-id of a regular file that is open for reading; no words if it has none.
pub(super) fn build_id(file: BorrowedFd<'_>, size: u64) -> Vec<u32> {
    let head = Head { file, len: size.min(REACH) };
    let Some(id) = find(&head) else { return Vec::new() };
    id.chunks(4)
        .map(|part| {
            let mut word = [0; 4];
            word[..part.len()].copy_from_slice(part);
            u32::from_ne_bytes(word)
        })
        .collect()
}

fn find(head: &Head<'_>) -> Option<Vec<u8>> {
    let start = head.bytes(0, 52)?;
    if !start.starts_with(b"\x7fELF") {
        return None;
    }
    let (wide, offset, size_of_each, count) = match start.get(4)? {
        1 => (false, u64::from(u32_at(&start, 28)?), 32, u16_at(&start, 44)?),
        2 => (true, u64_at(&start, 32)?, 56, u16_at(&head.bytes(0, 64)?, 56)?),
        _ => return None,
    };
    // what lies beyond our reach is not there, as if the file ended
    let reachable = head.len.checked_sub(offset)? / size_of_each as u64;
    let count = usize::from(count).min(usize::try_from(reachable).ok()?);
    let segments = head.bytes(offset, count * size_of_each)?;
    segments.chunks_exact(size_of_each).find_map(|segment| {
        if u32_at(segment, 0)? != PT_NOTE {
            return None;
        }
        let (at, len) = match wide {
            true => (u64_at(segment, 8)?, u64_at(segment, 32)?),
            false => (u64::from(u32_at(segment, 4)?), u64::from(u32_at(segment, 16)?)),
        };
        let len = usize::try_from(len.min(head.len.checked_sub(at)?)).ok()?;
        note(&head.bytes(at, len)?)
    })
}

/// The description of the first note of the right type.
fn note(mut notes: &[u8]) -> Option<Vec<u8>> {
    loop {
        let name = u32_at(notes, 0)?;
        let description = u32_at(notes, 4)?;
        let kind = u32_at(notes, 8)?;
        let begin = usize::try_from(name).ok()?.checked_next_multiple_of(4)?.checked_add(12)?;
        let len = usize::try_from(description).ok()?;
        if kind == NT_GNU_BUILD_ID {
            let found = notes.get(begin..begin.checked_add(len)?)?;
            return (1..=LONGEST).contains(&description).then(|| found.to_vec());
        }
        notes = notes.get(begin.checked_add(len.checked_next_multiple_of(4)?)?..)?;
    }
}

/// The build-id of a file that may be open in any way.
pub(super) fn build_id_of(file: BorrowedFd<'_>, stat: &Stat) -> Vec<u32> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_size < 5 {
        return Vec::new();
    }
    match reopen(file, libc::O_RDONLY as u32) {
        Ok(file) => build_id(file.as_fd(), stat.st_size.unsigned_abs()),
        Err(error) => {
            tracing::warn!(%error, "no build-id, as the file cannot be read");
            Vec::new()
        }
    }
}

/// Compares an open file with what the image says of it.
pub(super) fn check(file: BorrowedFd<'_>, stat: &Stat, entry: &RegFileEntry, opts: &Options) -> Result<()> {
    let changed = |what: String| {
        let name = entry.name.strip_prefix(b"/").filter(|name| !name.is_empty()).unwrap_or(b".");
        Err(Error::Changed { what: format!("File {} has bad {what}", String::from_utf8_lossy(name)) })
    };
    if let Some(size) = entry.size {
        if size != stat.st_size.unsigned_abs() {
            return changed(format!("size {} (expect {size})", stat.st_size));
        }
        if opts.file_validation == FileValidation::BuildId && !entry.build_id.is_empty() {
            let found = build_id_of(file, stat);
            if found.is_empty() {
                tracing::info!(path = %String::from_utf8_lossy(&entry.name), "the file could only be validated by its size");
            } else if found.len() != entry.build_id.len() {
                return changed(format!("build-ID length {} (expect {})", found.len() * 4, entry.build_id.len() * 4));
            } else if found != entry.build_id {
                return changed("build-ID".into());
            }
        }
    }
    if let Some(mode) = entry.mode {
        let compared = if opts.skip_file_rwx_check { !0o777 } else { !0 };
        if mode & compared != stat.st_mode & compared {
            return changed(format!(
                "mode 0{:o} (expect 0{mode:o})\nFile r/w/x checks can be skipped with the --skip-file-rwx-check option",
                stat.st_mode
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn file(bytes: &[u8]) -> File {
        let file = File::from(rustix::fs::memfd_create("elf", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn elf(id: &[u8], kind: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..5].copy_from_slice(b"\x7fELF\x02");
        bytes[32..40].copy_from_slice(&64u64.to_ne_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_ne_bytes());
        bytes[64..68].copy_from_slice(&PT_NOTE.to_ne_bytes());
        bytes[72..80].copy_from_slice(&120u64.to_ne_bytes());
        bytes[96..104].copy_from_slice(&1000u64.to_ne_bytes());
        for word in [5u32, 4, 1] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(b"other\0\0\0\x01\x02\x03\x04");
        for word in [4, id.len() as u32, kind] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(b"GNU\0");
        bytes.extend(id);
        bytes
    }

    #[test]
    fn an_id_is_found_behind_other_notes_and_padded() {
        let bytes = elf(b"\x01\x02\x03\x04\x05", 3);
        assert_eq!(
            build_id(file(&bytes).as_fd(), bytes.len() as u64),
            [u32::from_ne_bytes([1, 2, 3, 4]), u32::from_ne_bytes([5, 0, 0, 0])]
        );
    }

    #[test]
    fn hostile() {
        let whole = elf(b"12345678", 3);
        for len in 0..whole.len() {
            build_id(file(&whole[..len]).as_fd(), len as u64);
        }
        let bytes = elf(b"1234", 2);
        assert!(build_id(file(&bytes).as_fd(), bytes.len() as u64).is_empty());
        let mut far = whole.clone();
        far[32..40].copy_from_slice(&u64::MAX.to_ne_bytes());
        assert!(build_id(file(&far).as_fd(), far.len() as u64).is_empty());
        let long = elf(&[1; 513], 3);
        assert!(build_id(file(&long).as_fd(), long.len() as u64).is_empty());
    }

    #[test]
    fn what_differs_is_told_in_crius_words() {
        let f = file(b"0123456789");
        let stat = rustix::fs::fstat(&f).unwrap();
        let mut entry =
            RegFileEntry { name: b"/tmp/kept".to_vec(), size: Some(9), mode: Some(stat.st_mode), ..Default::default() };
        let mut opts = Options::default();
        let said = check(f.as_fd(), &stat, &entry, &opts).unwrap_err().to_string();
        assert_eq!(said, "File tmp/kept has bad size 10 (expect 9)");
        entry.size = Some(10);
        check(f.as_fd(), &stat, &entry, &opts).unwrap();
        entry.mode = Some(stat.st_mode ^ 0o1);
        assert!(check(f.as_fd(), &stat, &entry, &opts).unwrap_err().to_string().contains("--skip-file-rwx-check"));
        opts.skip_file_rwx_check = true;
        check(f.as_fd(), &stat, &entry, &opts).unwrap();
    }
}
