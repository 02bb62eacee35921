//! FIFOs that have a name.
//!
//! The pipe behind the name is there as long as some task has it open, and so is what was written and not read. It has
//! two entries in `files.img`: a [`FifoEntry`], and the path, flags and owner as those of a regular file, which also says
//! what to do if the name is gone. Ring size and content go to `fifo-data.img`, once a FIFO, and are read by tee(2), which
//! takes nothing (`pipe.rs`).
//!
//! At restore a descriptor for both reading and writing is open beside for a moment, so that neither end waits for the
//! other; the first entry of a FIFO brings its content. Opened by O_PATH it is a file like any other (`regular.rs`).
//!
//! Not kept: content that has only writers in the tree, as its readers are elsewhere; readers outside the tree that wait
//! for a writer. Two FIFOs of equal inode numbers get numbers of their own.
//!
//! Man pages: fifo(7), mkfifo(3), tee(2).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use standstill_images::proto::{FdTypes, FifoEntry, FileEntry, PipeDataEntry, RegFileEntry};
use standstill_images::ImageKind;

use super::paths::{place, reopen};
use super::pipe::{self, Content};
use super::{regular, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Error, Result};

const IMAGE: &str = "fifo-data.img";

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    numbers: HashMap<(u64, u64), u32>,
    contents: BTreeMap<u32, Content>,
}

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    contents: HashMap<u32, Content>,
    filled: HashSet<u32>,
}

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let inode = (d.stat.st_dev, d.stat.st_ino);
    let pipe_id = match cx.fifos.numbers.get(&inode) {
        Some(&number) => number,
        None => {
            // 32 bits of the inode number, as CRIU; or whatever is free
            let mut number = d.stat.st_ino as u32;
            while cx.fifos.numbers.values().any(|taken| *taken == number) {
                number = number.wrapping_add(1);
            }
            cx.fifos.numbers.insert(inode, number);
            number
        }
    };
    let regf_id = cx.new_id();
    let reg = regular::entry(d, regf_id, cx)?;
    cx.add(FileEntry { r#type: FdTypes::Reg as i32, id: regf_id, reg: Some(reg), ..Default::default() });
    let reads = d.flags & libc::O_ACCMODE as u32 != libc::O_WRONLY as u32;
    if reads && !cx.fifos.contents.contains_key(&pipe_id) {
        let content = pipe::peek(d.copy.as_fd()).at(place(&d.link))?;
        cx.fifos.contents.insert(pipe_id, content);
    }
    let fifo = FifoEntry { id, pipe_id, regf_id: Some(regf_id) };
    Ok(FileEntry { r#type: FdTypes::Fifo as i32, id, fifo: Some(fifo), ..Default::default() })
}

/// Writes `fifo-data.img`.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    let contents = std::mem::take(&mut cx.fifos.contents);
    if contents.is_empty() {
        return Ok(());
    }
    let mut image = cx.images.create(ImageKind::FifoData, ())?;
    for (pipe_id, content) in contents {
        // a ring of 4 GiB is more than the kernel makes
        let bytes = u32::try_from(content.bytes.len()).unwrap_or(u32::MAX);
        let standstill_packets = if content.packets.len() > 1 { content.packets } else { Vec::new() };
        let entry = PipeDataEntry { pipe_id, bytes, size: content.size, standstill_packets };
        image.write_with_payload(&entry, &content.bytes.as_slice())?;
    }
    Ok(image.finish()?)
}

/// Reads `fifo-data.img`.
pub fn read(cx: &mut RestoreFiles<'_>) -> Result<()> {
    let Some(image) = cx.images.open_if_there(ImageKind::FifoData, ())? else { return Ok(()) };
    let known: HashSet<u32> = cx.entries.values().filter_map(|entry| Some(entry.fifo.as_ref()?.pipe_id)).collect();
    for (entry, bytes) in image.reader()?.all_with_payload::<PipeDataEntry>()? {
        let pipe_id = entry.pipe_id;
        if !known.contains(&pipe_id) {
            return Err(Error::lie(IMAGE, format!("no open file is of FIFO {pipe_id}")));
        }
        let content = Content::of(&entry, bytes)?;
        if cx.fifos.contents.insert(pipe_id, content).is_some() {
            return Err(Error::lie(IMAGE, format!("FIFO {pipe_id} is there twice")));
        }
    }
    Ok(())
}

/// The entry that has path, flags and owner.
pub fn path_of<'a>(e: &FifoEntry, cx: &'a RestoreFiles<'_>) -> Result<&'a RegFileEntry> {
    // older images have it under the same id
    let reg = cx.entry(e.regf_id.unwrap_or(e.id))?.reg.as_ref();
    reg.ok_or_else(|| Error::lie("files.img", format!("FIFO {:#x} has no path", e.id)))
}

/// Opens one.
pub fn open(e: &FifoEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let reg = path_of(e, cx)?.clone();
    let both = regular::open_as(cx, &reg, (libc::O_RDWR | libc::O_NONBLOCK) as u32)?;
    if cx.fifos.filled.insert(e.pipe_id) {
        if let Some(content) = cx.fifos.contents.get(&e.pipe_id) {
            pipe::fill(both.as_fd(), content).at(place(&reg.name))?;
        }
    }
    let fd = reopen(both.as_fd(), reg.flags).at(place(&reg.name))?;
    super::set_status_flags(fd.as_fd(), reg.flags).at(place(&reg.name))?;
    Ok(fd)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::testing::{dump, open};
    use super::*;
    use crate::options::Options;
    use rustix::fs::{FileType, Mode, OFlags, CWD};

    fn fifo(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("standstill-fifo-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
        path
    }

    fn there_and_back(name: &str, gone: bool) {
        let path = fifo(name);
        let opened =
            |flags| rustix::fs::open(&path, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let (reader, writer) = (opened(OFlags::RDONLY), opened(OFlags::WRONLY));
        rustix::io::write(&writer, b"unread").unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, 16384).unwrap();
        if gone {
            std::fs::remove_file(&path).unwrap();
        }
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&writer, &reader]).unwrap();
        let mut buffer = [0; 64];
        assert_eq!(rustix::io::read(&reader, &mut buffer[..]).unwrap(), 6, "the program still has its data");
        drop((reader, writer));

        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let (writer, reader) = (open(&mut files, ids[0]), open(&mut files, ids[1]));
        drop(files);
        assert_eq!(path.exists(), !gone);
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&reader).unwrap(), 16384);
        assert_eq!(rustix::io::read(&reader, &mut buffer[..]).unwrap(), 6);
        assert_eq!(&buffer[..6], b"unread");
        let stat = rustix::fs::fstat(&reader).unwrap();
        assert_eq!(stat.st_mode & 0o7777, 0o640);
        assert_eq!(rustix::fs::fcntl_getfl(&writer).unwrap() & OFlags::ACCMODE, OFlags::WRONLY);
        rustix::io::write(&writer, b"more").unwrap();
        drop(writer);
        assert_eq!(rustix::io::read(&reader, &mut buffer[..]).unwrap(), 4);
        assert_eq!(rustix::io::read(&reader, &mut buffer[..]).unwrap(), 0, "nothing else holds the writing end");
        let _ = std::fs::remove_file(&path);
    }

    #[test]
    fn both_ends_and_what_is_between() {
        there_and_back("named", false);
    }

    #[test]
    fn its_name_may_be_gone() {
        there_and_back("deleted", true);
    }
}
