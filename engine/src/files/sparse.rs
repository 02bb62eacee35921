//! Files with holes: where data is, and copying it without reading it into a program more often than needed.
//!
//! lseek(2) with SEEK_DATA and SEEK_HOLE answers for every file system; one that knows no holes says that all is data.
//! It moves the offset of the open file, so what is walked here must have been opened for it (`/proc/self/fd/N` again),
//! never be the program's own.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use standstill_images::ReadAt;

use crate::error::{Call, Error, Result};

/// Bytes that are copied at once where a buffer is needed: large enough that calls cost nothing, small enough for the cache.
const BUFFER: usize = 256 << 10;
/// The most that one sendfile(2) is asked for.
const AT_ONCE: u64 = 1 << 30;

/// The ranges of a file that hold data, as offset and length.
#[derive(Debug)]
pub(super) struct Extents<'a> {
    file: BorrowedFd<'a>,
    at: u64,
    size: u64,
}

/// Walks over the data of the first `size` bytes.
pub(super) fn extents(file: BorrowedFd<'_>, size: u64) -> Extents<'_> {
    Extents { file, at: 0, size }
}

impl Extents<'_> {
    fn find(&mut self) -> Result<Option<(u64, u64)>> {
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) if start < self.size => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL) => self.at,
            Err(error) => return Err(error).call("lseek(SEEK_DATA)"),
        };
        let end = match rustix::fs::seek(self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(self.size),
            Err(Errno::INVAL | Errno::NXIO) => self.size,
            Err(error) => return Err(error).call("lseek(SEEK_HOLE)"),
        };
        self.at = end;
        Ok((start < end).then(|| (start, end - start)))
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.size {
            return None;
        }
        let found = self.find();
        if !matches!(found, Ok(Some(_))) {
            self.at = self.size;
        }
        found.transpose()
    }
}

/// Lets the kernel move `len` bytes of `from` at `offset` to where `to` stands. Says how many it moved: fewer, or none,
/// where these two files do not allow it.
pub(super) fn send(from: BorrowedFd<'_>, offset: u64, len: u64, to: &File) -> Result<u64> {
    let (mut at, end) = (offset, offset.saturating_add(len));
    while at < end {
        let count = usize::try_from((end - at).min(AT_ONCE)).unwrap_or(BUFFER);
        match rustix::fs::sendfile(to, from, Some(&mut at), count) {
            Ok(0) | Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => break,
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error).call("sendfile"),
        }
    }
    Ok(at - offset)
}

/// Reads `len` bytes of `from` at `offset`, a buffer at a time.
pub(super) fn each_part(
    from: BorrowedFd<'_>,
    offset: u64,
    len: u64,
    mut part: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(BUFFER).min(BUFFER)];
    let (mut at, end) = (offset, offset.saturating_add(len));
    while at < end {
        let room = usize::try_from(end - at).unwrap_or(BUFFER).min(buffer.len());
        match rustix::io::pread(from, &mut buffer[..room], at) {
            Ok(0) => {
                return Err(Error::Changed { what: format!("the file ended at {at} while it was copied to {end}") })
            }
            Ok(n) => {
                part(&buffer[..n])?;
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).call("pread"),
        }
    }
    Ok(())
}

/// Writes `bytes` at `offset`.
pub(super) fn write_at(to: BorrowedFd<'_>, mut bytes: &[u8], mut offset: u64) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(to, bytes, offset) {
            Ok(0) => return Err(rustix::io::Errno::NOSPC).call("pwrite"),
            Ok(n) => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).call("pwrite"),
        }
    }
    Ok(())
}

/// Writes `len` bytes of an image at `offset` to `to` at `at`, whose own offset moves.
pub(super) fn fill(from: &dyn ReadAt, offset: u64, len: u64, to: &File, at: u64) -> Result<()> {
    let mut done = 0;
    if let Some(image) = from.as_file() {
        rustix::fs::seek(to, SeekFrom::Start(at)).call("lseek")?;
        done = send(image.as_fd(), offset, len, to)?;
    }
    each_part_of_image(from, offset + done, len - done, |gone, bytes| write_at(to.as_fd(), bytes, at + done + gone))
}

/// Reads `len` bytes of an image at `offset`, a buffer at a time; `part` also gets how many came before.
pub(super) fn each_part_of_image(
    from: &dyn ReadAt,
    offset: u64,
    len: u64,
    mut part: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(BUFFER).min(BUFFER)];
    let mut done = 0;
    while done < len {
        let room = usize::try_from(len - done).unwrap_or(BUFFER).min(buffer.len());
        from.read_exact_at(&mut buffer[..room], offset + done).call("read(pages)")?;
        part(done, &buffer[..room])?;
        done += room as u64;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn memory() -> File {
        File::from(rustix::fs::memfd_create("sparse", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn data_is_found_between_holes() {
        let file = memory();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(b"x", 1 << 20).unwrap();
        file.write_all_at(b"y", (10 << 20) - 1).unwrap();
        let found: Vec<_> = extents(file.as_fd(), 10 << 20).map(Result::unwrap).collect();
        assert_eq!(found, [(1 << 20, 4096), ((10 << 20) - 4096, 4096)]);
        assert_eq!(extents(file.as_fd(), 1 << 20).count(), 0);
        assert_eq!(extents(file.as_fd(), 0).count(), 0);
    }

    #[test]
    fn the_kernel_copies_or_we_do() {
        let (a, b) = (memory(), memory());
        a.write_all_at(&[7; 300_000], 0).unwrap();
        assert_eq!(send(a.as_fd(), 1, 299_999, &b).unwrap(), 299_999);
        let mut copy = Vec::new();
        each_part(b.as_fd(), 0, 299_999, |bytes| {
            copy.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
        assert_eq!(copy, [7; 299_999]);
        assert!(each_part(b.as_fd(), 0, 300_000, |_| Ok(())).is_err());
    }
}
