//! Pipes.
//!
//! A pipe is an inode with a ring of buffers, and open files that read it, write it, or (by `/proc/PID/fd`) both. A
//! [`PipeEntry`] of `files.img` is one open file; entries of one pipe share `pipe_id`, its inode number. What is in the
//! pipe, and how large its ring is, goes to `pipes-data.img`, once a pipe.
//!
//! Nothing is taken from the program's pipe: tee(2) gives the same buffers to a pipe of ours. Where the tree has only
//! the writing end, a reading end is opened beside it for that moment; the frozen program cannot notice.
//!
//! At restore the engine makes the pipe when its first end is asked for, writes the data, and gives the ends that
//! pipe(2) returned to one reader and one writer among the entries; the others are opened through `/proc/self/fd`, which
//! the kernel marks with O_LARGEFILE, as it does for the program. `--inherit-fd fd[N]:pipe:[ID]` puts a descriptor of the
//! caller's in the place of a whole pipe.
//!
//! Not kept: that an end was outside the tree (the pipe comes back without it: a reader finds the end of file, a writer
//! gets SIGPIPE, as with CRIU), and which bytes lay together in a buffer, but for packets (O_DIRECT): each is read by
//! itself, as a reader would get it, and written by itself again. Their lengths are in a field of our own; CRIU refuses such pipes.
//!
//! Man pages: pipe(7), pipe(2), tee(2), fcntl(2) (F_SETPIPE_SZ).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size, tee, PipeFlags, SpliceFlags};
use standstill_images::proto::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};
use standstill_images::ImageKind;

use super::{magic_link, set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::options::Persona;
use crate::sys::calls;

const O_WRONLY: u32 = libc::O_WRONLY as u32;
/// As the kernel has it: libc's is 0 where all files are large.
const O_LARGEFILE: u32 = 0o100_000;
/// What may be given to open(2) from an image: access, and the flags that stay.
const OPEN_FLAGS: u32 = (libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND) as u32 | O_LARGEFILE;

/// Ring size and content of a pipe.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    /// Size of the ring in bytes, if it is known.
    pub size: Option<u32>,
    /// What is in it.
    pub bytes: Vec<u8>,
    /// Lengths of packets, if it is more than one.
    pub packets: Vec<u32>,
}

impl Content {
    pub(super) fn of(entry: &PipeDataEntry, bytes: &[u8]) -> Result<Content> {
        let sum: u64 = entry.standstill_packets.iter().map(|&n| u64::from(n)).sum();
        if !entry.standstill_packets.is_empty() && sum != bytes.len() as u64 {
            return Err(Error::lie("pipes-data.img", format!("packets of {sum} bytes in all, of {}", bytes.len())));
        }
        Ok(Content { size: entry.size, bytes: bytes.to_vec(), packets: entry.standstill_packets.clone() })
    }
}

/// What a dump remembers: pipes, by `pipe_id`.
#[derive(Debug, Default)]
pub struct Dumped {
    pipes: BTreeMap<u32, Seen>,
    packet_mode: HashSet<u32>,
}

#[derive(Debug)]
enum Seen {
    /// A reading end was there.
    Read(Content),
    /// Only writing ends so far: one of them.
    WriteOnly(OwnedFd),
}

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    content: HashMap<u32, Content>,
    made: HashMap<u32, Made>,
}

/// A pipe that is there again.
#[derive(Debug)]
struct Made {
    reader: OwnedFd,
    writer: OwnedFd,
    /// The entries that get these two; all others are opened anew.
    first_reader: Option<u32>,
    first_writer: Option<u32>,
}

/// Dumps one end.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    if d.flags & libc::O_PATH as u32 != 0 {
        return Err(d.refused("a pipe that was opened with O_PATH", "close it before the dump"));
    }
    let packets = d.flags & libc::O_DIRECT as u32 != 0;
    if packets && cx.opts.personality == Persona::Criu {
        let advice =
            "The packetized mode for pipes is not supported yet; let the program use a SOCK_SEQPACKET socket pair";
        return Err(d.refused("a pipe with O_DIRECT", advice));
    }
    let pipe_id = pipe_id(d)?;
    if packets {
        cx.pipes.packet_mode.insert(pipe_id);
    }
    if d.flags & O_WRONLY == 0 {
        if !matches!(cx.pipes.pipes.get(&pipe_id), Some(Seen::Read(_))) {
            let content = peek(d.copy.as_fd())?;
            cx.pipes.pipes.insert(pipe_id, Seen::Read(content));
        }
    } else if let std::collections::btree_map::Entry::Vacant(place) = cx.pipes.pipes.entry(pipe_id) {
        place.insert(Seen::WriteOnly(d.copy.try_clone().call("dup")?));
    }
    let pipe = PipeEntry { id, pipe_id, flags: d.flags, fown: d.fown };
    Ok(FileEntry { r#type: FdTypes::Pipe as i32, id, pipe: Some(pipe), ..Default::default() })
}

/// The images' number for a pipe or FIFO: its inode.
pub(super) fn pipe_id(d: &Descriptor) -> Result<u32> {
    u32::try_from(d.stat.st_ino).map_err(|_| {
        d.refused("a pipe whose inode number has more than 32 bits", "the image format has no room for it")
    })
}

/// Ring size and content, by the reading end; nothing is taken out.
pub(super) fn peek(reader: BorrowedFd<'_>) -> Result<Content> {
    let size = fcntl_getpipe_size(reader).call("fcntl(F_GETPIPE_SZ)")?;
    let filled = rustix::io::ioctl_fionread(reader).call("ioctl(FIONREAD)")?;
    let (mut bytes, mut packets) = (Vec::new(), Vec::new());
    if filled > 0 {
        let (ours, to) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).call("pipe2")?;
        // A ring of the same size takes all buffers; where it may not grow, the count below tells.
        let _ = resize(to.as_fd(), size);
        let got = match tee(reader, &to, size.max(4096), SpliceFlags::NONBLOCK) {
            Ok(n) => n,
            Err(rustix::io::Errno::AGAIN) => 0,
            Err(e) => return Err(e).call("tee"),
        };
        if (got as u64) < filled {
            let advice =
                "this user may not make one as large: give CAP_SYS_RESOURCE, or raise /proc/sys/fs/pipe-max-size \
                          and pipe-user-pages-soft";
            return Err(Error::refused(format!("a pipe with {filled} bytes in it"), advice));
        }
        drop(to);
        bytes.resize(got, 0);
        let mut at = 0;
        while at < got {
            match rustix::io::read(&ours, &mut bytes[at..]) {
                Ok(0) => return Err(Error::Gone),
                // all that there is, or one packet
                Ok(n) => {
                    at += n;
                    packets.push(u32::try_from(n).unwrap_or(u32::MAX));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).call("read(pipe)"),
            }
        }
    }
    let size = u32::try_from(size).ok();
    Ok(Content { size, bytes, packets })
}

/// F_SETPIPE_SZ; a ring that is large enough already may stay as it is where growing is not allowed.
fn resize(pipe: BorrowedFd<'_>, size: usize) -> Result<()> {
    if fcntl_getpipe_size(pipe).call("fcntl(F_GETPIPE_SZ)")? == size {
        return Ok(());
    }
    match fcntl_setpipe_size(pipe, size) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::PERM) if fcntl_getpipe_size(pipe).call("fcntl(F_GETPIPE_SZ)")? >= size => Ok(()),
        Err(e) => Err(e).call("fcntl(F_SETPIPE_SZ)"),
    }
}

/// Gives an empty pipe or FIFO its size and content, by the writing end, which comes out with O_NONBLOCK set.
pub(super) fn fill(writer: BorrowedFd<'_>, content: &Content) -> Result<()> {
    if let Some(size) = content.size {
        resize(writer, size as usize)?;
    }
    let packets = if content.packets.is_empty() { 0 } else { libc::O_DIRECT };
    set_status_flags(writer, (libc::O_NONBLOCK | packets) as u32)?;
    let mut lengths = content.packets.iter();
    let mut rest = content.bytes.as_slice();
    while !rest.is_empty() {
        let now = lengths.next().map_or(rest.len(), |&n| (n as usize).min(rest.len()));
        match rustix::io::write(writer, &rest[..now]) {
            Ok(n) => rest = &rest[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                return Err(Error::lie(
                    "pipes-data.img",
                    format!("{} bytes do not fit into a pipe", content.bytes.len()),
                ));
            }
            Err(e) => return Err(e).call("write(pipe)"),
        }
    }
    Ok(())
}

/// Writes `pipes-data.img`.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    let Dumped { pipes, packet_mode } = std::mem::take(&mut cx.pipes);
    if pipes.is_empty() {
        return Ok(());
    }
    let mut image = cx.images.create(ImageKind::PipesData, ())?;
    for (pipe_id, seen) in pipes {
        let mut content = match seen {
            Seen::Read(content) => content,
            Seen::WriteOnly(writer) => match read_beside(writer.as_fd()).at(Place::Item("pipe", pipe_id.into()))? {
                Some(content) => content,
                None => continue,
            },
        };
        let bytes = u32::try_from(content.bytes.len()).map_err(|_| {
            Error::refused(format!("a pipe with {} bytes in it", content.bytes.len()), "let it be read first")
        })?;
        if content.packets.len() == 1 && !packet_mode.contains(&pipe_id) {
            content.packets.clear();
        }
        let entry = PipeDataEntry { pipe_id, bytes, size: content.size, standstill_packets: content.packets };
        image.write_with_payload(&entry, &content.bytes.as_slice())?;
    }
    image.finish()?;
    Ok(())
}

/// What is in a pipe of which we have a writing end only; none if this user may not open it for reading.
fn read_beside(writer: BorrowedFd<'_>) -> Result<Option<Content>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::open(magic_link(writer), flags, Mode::empty()) {
        Ok(reader) => peek(reader.as_fd()).map(Some),
        Err(rustix::io::Errno::ACCESS) => Ok(None),
        Err(e) => Err(e).call("open(/proc/self/fd/N)"),
    }
}

/// Reads `pipes-data.img`.
pub fn read(cx: &mut RestoreFiles<'_>) -> Result<()> {
    let Some(image) = cx.images.open_if_there(ImageKind::PipesData, ())? else { return Ok(()) };
    for (entry, bytes) in image.reader()?.all_with_payload::<PipeDataEntry>()? {
        let pipe_id = entry.pipe_id;
        if !cx.entries.values().filter_map(|e| e.pipe.as_ref()).any(|p| p.pipe_id == pipe_id) {
            return Err(Error::lie("pipes-data.img", format!("no open file is of pipe {pipe_id}")));
        }
        let content = Content::of(&entry, bytes)?;
        if cx.pipes.content.insert(pipe_id, content).is_some() {
            return Err(Error::lie("pipes-data.img", format!("pipe {pipe_id} is there twice")));
        }
    }
    Ok(())
}

/// Opens one end.
pub fn open(e: &PipeEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if let Some(fd) = cx.opts.inherited_fd(&format!("pipe:[{}]", e.pipe_id)) {
        return stand_in(e, fd);
    }
    if !cx.pipes.made.contains_key(&e.pipe_id) {
        let made = make(e.pipe_id, cx).at(Place::Item("pipe", e.pipe_id.into()))?;
        cx.pipes.made.insert(e.pipe_id, made);
    }
    let made = cx.pipes.made.get(&e.pipe_id).ok_or(Error::Gone)?;
    let end = if e.flags & O_WRONLY == 0 { &made.reader } else { &made.writer };
    let fd = if [made.first_reader, made.first_writer].contains(&Some(e.id)) {
        end.try_clone().call("dup")?
    } else {
        let flags = OFlags::from_bits_retain(e.flags & OPEN_FLAGS) | OFlags::CLOEXEC;
        rustix::fs::open(magic_link(end.as_fd()), flags, Mode::empty()).call("open(/proc/self/fd/N)")?
    };
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Makes a pipe with what was in it.
fn make(pipe_id: u32, cx: &mut RestoreFiles<'_>) -> Result<Made> {
    let first = |end: u32| {
        let of_pipe = cx.entries.values().filter_map(|e| e.pipe.as_ref()).filter(|p| p.pipe_id == pipe_id);
        of_pipe.filter(|p| p.flags & (libc::O_ACCMODE as u32 | O_LARGEFILE) == end).map(|p| p.id).min()
    };
    let (first_reader, first_writer) = (first(libc::O_RDONLY as u32), first(O_WRONLY));
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).call("pipe2")?;
    if let Some(content) = cx.pipes.content.get(&pipe_id) {
        fill(writer.as_fd(), content)?;
    }
    Ok(Made { reader, writer, first_reader, first_writer })
}

/// A descriptor of the caller's in the place of a pipe's end, opened anew with the end's flags. What cannot be opened
/// anew (a socket, a file that is gone for this user) is passed on as it is.
fn stand_in(e: &PipeEntry, number: i32) -> Result<OwnedFd> {
    let ours = calls::dup_number(number).at(Place::Item("--inherit-fd", u64::from(number.unsigned_abs())))?;
    let flags = OFlags::from_bits_retain(e.flags & OPEN_FLAGS) | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match rustix::fs::open(magic_link(ours.as_fd()), flags, Mode::empty()) {
        Ok(fd) => {
            set_status_flags(fd.as_fd(), e.flags)?;
            Ok(fd)
        }
        Err(rustix::io::Errno::NXIO | rustix::io::Errno::ACCESS) => Ok(ours),
        Err(e) => Err(e).call("open(/proc/self/fd/N)"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::super::testing::{dump, open};
    use super::*;
    use crate::options::{InheritFd, Options};

    fn flags(fd: &OwnedFd) -> u32 {
        rustix::fs::fcntl_getfl(fd).unwrap().bits()
    }

    fn read_all(fd: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let n = rustix::io::read(fd, &mut bytes[..]).unwrap();
        bytes.truncate(n);
        bytes
    }

    #[test]
    fn both_ends_come_back_with_data_size_and_flags() {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        fcntl_setpipe_size(&writer, 16384).unwrap();
        let again = rustix::fs::open(
            magic_link(reader.as_fd()),
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        let text: Vec<u8> = (0..9000u32).map(|n| n as u8).collect();
        rustix::io::write(&writer, &text).unwrap();
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&writer, &reader, &again]).unwrap();
        assert_eq!(read_all(&reader), text, "the program still has its data");
        drop((reader, writer));

        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let writer = open(&mut files, ids[0]);
        let reader = open(&mut files, ids[1]);
        let both = open(&mut files, ids[2]);
        drop(files);
        assert_eq!(flags(&both), flags(&again));
        assert_eq!(flags(&reader), libc::O_RDONLY as u32);
        assert_eq!(flags(&writer), O_WRONLY);
        assert_eq!(fcntl_getpipe_size(&reader).unwrap(), 16384);
        assert_eq!(read_all(&reader), text);
        drop((writer, both));
        assert_eq!(read_all(&reader), b"", "nothing else holds the writing end");
    }

    #[test]
    fn a_pipe_with_only_its_writer_keeps_data() {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::write(&writer, b"on its way").unwrap();
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&writer]).unwrap();
        assert_eq!(read_all(&reader), b"on its way");
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let restored = open(&mut files, ids[0]);
        assert_eq!(rustix::io::ioctl_fionread(&restored).unwrap(), 10);
        drop(files);
        let error = rustix::io::write(&restored, b"x").unwrap_err();
        assert_eq!(error, rustix::io::Errno::PIPE);
    }

    #[test]
    fn a_full_pipe_comes_back_full() {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        fcntl_setpipe_size(&writer, 8192).unwrap();
        assert_eq!(rustix::io::write(&writer, &[7; 10000]).unwrap(), 8192);
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&reader, &writer]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let writer = open(&mut files, ids[1]);
        assert_eq!(rustix::io::write(&writer, b"x").unwrap_err(), rustix::io::Errno::AGAIN);
        assert_eq!(read_all(&open(&mut files, ids[0])), [7; 8192]);
    }

    #[test]
    fn packets_stay_apart() {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::DIRECT | PipeFlags::NONBLOCK).unwrap();
        for packet in [&b"one"[..], b"two"] {
            rustix::io::write(&writer, packet).unwrap();
        }
        let criu = Options { personality: Persona::Criu, ..Options::default() };
        let text = dump(&criu, &[&reader, &writer]).unwrap_err().to_string();
        assert!(text.contains("The packetized mode for pipes is not supported yet"), "{text}");
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[&reader, &writer]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let (reader, writer) = (open(&mut files, ids[0]), open(&mut files, ids[1]));
        assert_eq!((read_all(&reader), read_all(&reader)), (b"one".to_vec(), b"two".to_vec()));
        assert_ne!(flags(&writer) & libc::O_DIRECT as u32, 0);
        let lie = PipeDataEntry { pipe_id: 1, bytes: 3, size: None, standstill_packets: vec![2] };
        assert!(Content::of(&lie, b"abc").is_err());
    }

    #[test]
    fn an_inherited_descriptor_takes_the_place_of_a_pipe() {
        let (_reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (ours, stand_in) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (images, ids) = dump(&Options::default(), &[&writer]).unwrap();
        let id = format!("pipe:[{}]", rustix::fs::fstat(&writer).unwrap().st_ino);
        let opts = Options { inherit_fds: vec![InheritFd { fd: stand_in.as_raw_fd(), id }], ..Options::default() };
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        rustix::io::write(files.open(ids[0]).unwrap(), b"through").unwrap();
        assert_eq!(read_all(&ours), b"through");
    }
}
