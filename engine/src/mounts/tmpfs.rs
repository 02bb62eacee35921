//! What is in a tmpfs, as CRIU keeps it: a tar archive (GNU's, with its sparse files), packed by gzip, of everything from the
//! root folder `./` on.
//!
//! Extended attributes, fractions of seconds, the time of the last access and long names are in headers of pax, which tar
//! programs read as well. A file with more names than one is there once, then as links. Sockets are left out: who has one
//! bound makes its name again.
//!
//! Not kept: the time of change (ctime), flags of inodes, which blocks were allocated but never written.
//!
//! Sources: tar(5) of libarchive, the GNU tar manual on sparse formats, pax(1p), xattr(7), tmpfs(5).

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use flate2::Compression;
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use standstill_images::store::ReadAt;
use standstill_images::{ImageKind, Images};

use super::archive::{Archive, Entry};
use crate::error::{At, Call, Error, Place, Result};

const BLOCK: usize = 512;
const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const XATTR: &str = "SCHILY.xattr.";

/// Writes what is in the tmpfs whose root folder is `root`.
pub fn dump(images: &Images, dev: u32, root: BorrowedFd<'_>) -> Result<()> {
    let out = images.create_raw(ImageKind::TmpfsDev, dev)?;
    let mut packed = GzEncoder::new(std::io::BufWriter::new(Raw(out)), Compression::fast());
    write_archive(root, &mut packed)?;
    let buffer = packed.finish().call("write")?;
    let raw = buffer.into_inner().map_err(std::io::IntoInnerError::into_error).call("write")?;
    raw.0.finish()?;
    Ok(())
}

/// Fills the tmpfs whose root folder is `root`; false if there is no archive for it.
pub fn restore(images: &Images, dev: u32, id: u32, root: BorrowedFd<'_>) -> Result<bool> {
    let (kind, id) = if images.exists(ImageKind::TmpfsDev, dev)? {
        (ImageKind::TmpfsDev, dev)
    } else if images.exists(ImageKind::TmpfsImg, id)? {
        (ImageKind::TmpfsImg, id)
    } else {
        return Ok(false);
    };
    let image = images.open_raw(kind, id)?;
    let reader = std::io::BufReader::with_capacity(1 << 16, Stream { image: image.as_ref(), at: 0 });
    read_archive(MultiGzDecoder::new(reader), root)?;
    Ok(true)
}

/// An image as a stream.
struct Raw(Box<dyn standstill_images::store::ImageOutput>);

impl Write for Raw {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

struct Stream<'i> {
    image: &'i dyn ReadAt,
    at: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.image.len().saturating_sub(self.at)).unwrap_or(usize::MAX);
        let n = buffer.len().min(left);
        self.image.read_exact_at(&mut buffer[..n], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

fn name_place(path: &[u8]) -> Place {
    use std::os::unix::ffi::OsStrExt;
    Place::Path(std::ffi::OsStr::from_bytes(path).into())
}

/// Writes the archive, unpacked.
pub fn write_archive(root: BorrowedFd<'_>, out: &mut impl Write) -> Result<()> {
    // one with a position of its own, which may list the folder
    let root = rustix::fs::openat(root, c".", OFlags::RDONLY | FOLDER, Mode::empty()).call("openat")?;
    let stat = rustix::fs::fstat(&root).call("fstat")?;
    let mut writer = Writer { out, links: HashMap::new(), dev: stat.st_dev };
    writer.folder(root, b"./".to_vec(), &stat)?;
    writer.out.write_all(&[0; 2 * BLOCK]).call("write")
}

struct Writer<'o, W> {
    out: &'o mut W,
    links: HashMap<u64, Vec<u8>>,
    dev: u64,
}

impl<W: Write> Writer<'_, W> {
    /// A folder and all that is in it; `path` ends with a slash.
    fn folder(&mut self, fd: OwnedFd, path: Vec<u8>, stat: &Stat) -> Result<()> {
        let head = Head::new(tar::EntryType::Directory, stat);
        self.header(&path, head, &xattrs(&fd_path(fd.as_fd(), None))?, &[], stat)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd).call("getdents64")? {
            let name = entry.call("getdents64")?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.sort_unstable();
        for name in names {
            let mut below = path.clone();
            below.extend_from_slice(&name);
            self.one(fd.as_fd(), &name, below.clone()).at(name_place(&below))?;
        }
        Ok(())
    }

    fn one(&mut self, folder: BorrowedFd<'_>, name: &[u8], mut path: Vec<u8>) -> Result<()> {
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).call("fstatat")?;
        if stat.st_dev != self.dev {
            return Ok(());
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let fd = rustix::fs::openat(folder, name, OFlags::RDONLY | FOLDER, Mode::empty()).call("openat")?;
            path.push(b'/');
            return self.folder(fd, path, &stat);
        }
        if kind == FileType::Socket {
            tracing::debug!("{}: a socket, which whoever bound it makes again", String::from_utf8_lossy(&path));
            return Ok(());
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                let first = first.clone();
                return self.header(&path, Head::new(tar::EntryType::Link, &stat), &[], &first, &stat);
            }
            self.links.insert(stat.st_ino, path.clone());
        }
        let attributes = xattrs(&fd_path(folder, Some(name)))?;
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOATIME;
                let file = rustix::fs::openat(folder, name, flags, Mode::empty()).call("openat")?;
                self.file(&file, &path, &attributes, &stat)
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(folder, name, Vec::new()).call("readlinkat")?.into_bytes();
                self.header(&path, Head::new(tar::EntryType::Symlink, &stat), &attributes, &target, &stat)
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                let block = kind == FileType::BlockDevice;
                let kind = if block { tar::EntryType::Block } else { tar::EntryType::Char };
                let mut head = Head::new(kind, &stat);
                head.device = Some((rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)));
                self.header(&path, head, &attributes, &[], &stat)
            }
            FileType::Fifo => self.header(&path, Head::new(tar::EntryType::Fifo, &stat), &attributes, &[], &stat),
            FileType::Socket | FileType::Directory | FileType::Unknown => Ok(()),
        }
    }

    fn file(&mut self, file: &OwnedFd, path: &[u8], attributes: &[(String, Vec<u8>)], stat: &Stat) -> Result<()> {
        let size = stat.st_size.unsigned_abs();
        let pieces = pieces(file.as_fd(), size)?;
        let data: u64 = pieces.iter().map(|(_, len)| len).sum();
        let sparse = data < size;
        let mut head = Head::new(if sparse { tar::EntryType::GNUSparse } else { tar::EntryType::Regular }, stat);
        head.size = data;
        head.sparse = sparse.then_some((size, pieces.as_slice()));
        self.header(path, head, attributes, &[], stat)?;
        let mut buffer = vec![0; 1 << 17];
        for &(start, len) in &pieces {
            let mut at = start;
            while at < start + len {
                let n = buffer.len().min(usize::try_from(start + len - at).unwrap_or(usize::MAX));
                let n = rustix::io::pread(file, &mut buffer[..n], at).call("pread")?;
                if n == 0 {
                    return Err(Error::Changed { what: "the file became shorter while it was read".into() });
                }
                self.out.write_all(&buffer[..n]).call("write")?;
                at += n as u64;
            }
        }
        self.pad(data)
    }

    fn pad(&mut self, len: u64) -> Result<()> {
        let over = (len % BLOCK as u64) as usize;
        if over != 0 {
            self.out.write_all(&[0; BLOCK][over..]).call("write")?;
        }
        Ok(())
    }

    /// A header, behind one of pax with what it has no room for.
    fn header(
        &mut self,
        path: &[u8],
        head: Head<'_>,
        attributes: &[(String, Vec<u8>)],
        link: &[u8],
        stat: &Stat,
    ) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        let mut pax = Vec::new();
        let gnu = header.as_gnu_mut().ok_or(Error::Gone)?;
        if path.len() <= gnu.name.len() {
            gnu.name[..path.len()].copy_from_slice(path);
        } else {
            record(&mut pax, "path", path);
            let len = gnu.name.len();
            gnu.name.copy_from_slice(&path[..len]);
        }
        if link.len() <= gnu.linkname.len() {
            gnu.linkname[..link.len()].copy_from_slice(link);
        } else {
            record(&mut pax, "linkpath", link);
            let len = gnu.linkname.len();
            gnu.linkname.copy_from_slice(&link[..len]);
        }
        for (key, sec, nsec) in
            [("mtime", stat.st_mtime, stat.st_mtime_nsec), ("atime", stat.st_atime, stat.st_atime_nsec)]
        {
            record(&mut pax, key, decimal(sec, nsec).as_bytes());
        }
        for (name, value) in attributes {
            record(&mut pax, &format!("{XATTR}{name}"), value);
        }
        if let Some((real, pieces)) = head.sparse {
            gnu.set_real_size(real);
            for (place, &(start, len)) in gnu.sparse.iter_mut().zip(&with_end(pieces, real)) {
                place.set_offset(start);
                place.set_length(len);
            }
            gnu.set_is_extended(with_end(pieces, real).len() > gnu.sparse.len());
        }
        header.set_entry_type(head.kind);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(stat.st_mtime.max(0).unsigned_abs());
        header.set_size(head.size);
        if let Some((major, minor)) = head.device {
            header.set_device_major(major).call("tar")?;
            header.set_device_minor(minor).call("tar")?;
        }
        header.set_cksum();
        self.extended(&pax)?;
        self.out.write_all(header.as_bytes()).call("write")?;
        if let Some((real, pieces)) = head.sparse {
            let all = with_end(pieces, real);
            let mut rest = all.get(4..).unwrap_or_default();
            while !rest.is_empty() {
                let mut more = tar::GnuExtSparseHeader::new();
                let n = rest.len().min(more.sparse().len());
                for (place, &(start, len)) in more.sparse_mut().iter_mut().zip(rest) {
                    place.set_offset(start);
                    place.set_length(len);
                }
                rest = &rest[n..];
                more.set_is_extended(!rest.is_empty());
                self.out.write_all(more.as_bytes()).call("write")?;
            }
        }
        Ok(())
    }

    fn extended(&mut self, pax: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_path("PaxHeaders/x").call("tar")?;
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(pax.len() as u64);
        header.set_cksum();
        self.out.write_all(header.as_bytes()).call("write")?;
        self.out.write_all(pax).call("write")?;
        self.pad(pax.len() as u64)
    }
}

/// What a header says beside what stat does.
struct Head<'p> {
    kind: tar::EntryType,
    size: u64,
    device: Option<(u32, u32)>,
    sparse: Option<(u64, &'p [(u64, u64)])>,
}

impl Head<'_> {
    fn new(kind: tar::EntryType, _: &Stat) -> Self {
        Head { kind, size: 0, device: None, sparse: None }
    }
}

/// Pieces, and one of no length at the end, if there is a hole.
fn with_end(pieces: &[(u64, u64)], size: u64) -> Vec<(u64, u64)> {
    let mut all = pieces.to_vec();
    if all.last().is_none_or(|(start, len)| start + len < size) {
        all.push((size, 0));
    }
    all
}

/// Where a file has data.
fn pieces(file: BorrowedFd<'_>, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(vec![(0, size)]),
            Err(e) => return Err(e).call("lseek(SEEK_DATA)"),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).call("lseek(SEEK_HOLE)")?.min(size);
        if start % BLOCK as u64 != 0 || end <= start {
            return Ok(vec![(0, size)]);
        }
        all.push((start, end - start));
        at = end;
    }
    Ok(all)
}

/// `len key=value\n`, where `len` counts itself.
fn record(pax: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    pax.extend_from_slice(format!("{len} {key}=").as_bytes());
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

fn decimal(sec: i64, nsec: u64) -> String {
    let total = i128::from(sec) * 1_000_000_000 + i128::from(nsec);
    let sign = if total < 0 { "-" } else { "" };
    let total = total.unsigned_abs();
    format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000)
}

fn time(text: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(text).ok()?;
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
    let (sec, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let sec: i64 = sec.parse().ok()?;
    let nsec: i128 = format!("{:0<9}", fraction.get(..9.min(fraction.len()))?).parse().ok()?;
    let total = sign * (i128::from(sec) * 1_000_000_000 + nsec);
    Some(Timespec {
        tv_sec: i64::try_from(total.div_euclid(1_000_000_000)).ok()?,
        tv_nsec: i64::try_from(total.rem_euclid(1_000_000_000)).ok()?,
    })
}

/// The path of an open folder, or of a name in it, for calls that take paths only.
fn fd_path(fd: BorrowedFd<'_>, name: Option<&[u8]>) -> Vec<u8> {
    let mut path = format!("/proc/thread-self/fd/{}/", fd.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.unwrap_or(b"."));
    path
}

/// Extended attributes, those of links themselves.
fn xattrs(path: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; 1 << 16];
    let n = match rustix::fs::llistxattr(path, &mut names) {
        Ok(n) => n,
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => 0,
        Err(e) => return Err(e).call("llistxattr"),
    };
    let mut all = Vec::new();
    for name in names[..n].split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let n = rustix::fs::lgetxattr(path, name, &mut value).call("lgetxattr")?;
        value.truncate(n);
        all.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    Ok(all)
}

/// Makes what an archive says below `root`, and nothing anywhere else.
pub fn read_archive(from: impl Read, root: BorrowedFd<'_>) -> Result<()> {
    let mut archive = Archive::new(from);
    let mut folders = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        one(&mut archive, &entry, root, &mut folders).at(name_place(&entry.path))?;
        archive.skip_rest()?;
    }
    // a folder's times change with what is made in it
    for (fd, what) in folders.into_iter().rev() {
        what.put(fd.as_fd(), b".", FileType::Directory)?;
    }
    Ok(())
}

/// What a file has beside its content.
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    times: Timestamps,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Attributes {
    fn of(entry: &Entry) -> Result<Attributes> {
        let number = |n: u64| u32::try_from(n).map_err(|_| Error::lie(super::archive::IMAGE, "an id that cannot be"));
        let header = &entry.header;
        let seconds = Timespec { tv_sec: i64::try_from(header.mtime().call("tar")?).unwrap_or(0), tv_nsec: 0 };
        let of = |key: &str| entry.pax.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_slice());
        let id = |key: &str, other: u64| {
            let said = of(key).and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
            number(said.unwrap_or(other))
        };
        let xattr = |(key, value): &(String, Vec<u8>)| Some((key.strip_prefix(XATTR)?.to_owned(), value.clone()));
        Ok(Attributes {
            mode: header.mode().call("tar")? & 0o7777,
            uid: id("uid", header.uid().call("tar")?)?,
            gid: id("gid", header.gid().call("tar")?)?,
            times: Timestamps {
                last_access: of("atime").and_then(time).unwrap_or(seconds),
                last_modification: of("mtime").and_then(time).unwrap_or(seconds),
            },
            xattrs: entry.pax.iter().filter_map(xattr).collect(),
        })
    }

    /// Owner before mode, and both before attributes: a change of owner takes capabilities and set-id bits away.
    fn put(&self, folder: BorrowedFd<'_>, name: &[u8], kind: FileType) -> Result<()> {
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        let owner = (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)));
        rustix::fs::chownat(folder, name, owner.0, owner.1, nofollow).call("fchownat")?;
        if kind != FileType::Symlink {
            rustix::fs::chmodat(folder, name, Mode::from_raw_mode(self.mode), AtFlags::empty()).call("fchmodat")?;
        }
        let path = fd_path(folder, Some(name));
        for (attribute, value) in &self.xattrs {
            rustix::fs::lsetxattr(&path, attribute.as_str(), value, rustix::fs::XattrFlags::empty())
                .call("lsetxattr")?;
        }
        rustix::fs::utimensat(folder, name, &self.times, nofollow).call("utimensat")
    }
}

fn one<R: Read>(
    archive: &mut Archive<R>,
    entry: &Entry,
    root: BorrowedFd<'_>,
    folders: &mut Vec<(OwnedFd, Attributes)>,
) -> Result<()> {
    let lie = |what: &str| Error::lie(super::archive::IMAGE, what.to_owned());
    let kind = entry.header.entry_type();
    let what = Attributes::of(entry)?;
    let (folder, name) = locate(root, &entry.path)?;
    let folder = folder.as_fd();
    let node = |kind: FileType, device: u64| {
        rustix::fs::mknodat(folder, &name, kind, Mode::from_raw_mode(0o600), device).call("mknodat")?;
        what.put(folder, &name, kind)
    };
    match kind {
        tar::EntryType::Directory => {
            match rustix::fs::mkdirat(folder, &name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e).call("mkdirat"),
            }
            let fd = rustix::fs::openat(folder, &name, OFlags::RDONLY | FOLDER, Mode::empty()).call("openat")?;
            // nobody has so many open files: the attributes of those come at once, times apart
            if folders.len() < 512 {
                folders.push((fd, what));
                return Ok(());
            }
            what.put(folder, &name, FileType::Directory)
        }
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(folder, &name, flags, Mode::RUSR | Mode::WUSR).call("openat")?;
            content(archive, entry, &file)?;
            drop(file);
            what.put(folder, &name, FileType::RegularFile)
        }
        tar::EntryType::Symlink => {
            rustix::fs::symlinkat(entry.link.as_slice(), folder, &name).call("symlinkat")?;
            what.put(folder, &name, FileType::Symlink)
        }
        tar::EntryType::Link => {
            let (from, old) = locate(root, &entry.link)?;
            rustix::fs::linkat(from, &old, folder, &name, AtFlags::empty()).call("linkat")
        }
        tar::EntryType::Char | tar::EntryType::Block => {
            let header = &entry.header;
            let device = (header.device_major().call("tar")?, header.device_minor().call("tar")?);
            let device = rustix::fs::makedev(device.0.unwrap_or(0), device.1.unwrap_or(0));
            let block = kind == tar::EntryType::Block;
            node(if block { FileType::BlockDevice } else { FileType::CharacterDevice }, device)
        }
        tar::EntryType::Fifo => node(FileType::Fifo, 0),
        _ => Err(lie("an entry of unknown type")),
    }
}

/// The folder that a path of an archive is in, and its name there. Nothing on the way may be a link.
fn locate(root: BorrowedFd<'_>, path: &[u8]) -> Result<(OwnedFd, Vec<u8>)> {
    let parts: Vec<&[u8]> = path.split(|&b| b == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if path.starts_with(b"/") || parts.contains(&&b".."[..]) || path.contains(&0) {
        return Err(Error::lie(super::archive::IMAGE, "a path that leads out of it"));
    }
    let (name, folders) = parts.split_last().map_or((&b"."[..], &[][..]), |(name, folders)| (*name, folders));
    let mut folder = folders.join(&b"/"[..]);
    if folder.is_empty() {
        folder.push(b'.');
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | FOLDER;
    let folder = rustix::fs::openat2(root, &folder, flags, Mode::empty(), resolve).call("openat2")?;
    Ok((folder, name.to_vec()))
}

/// Copies, and leaves holes where there are only zeros.
fn content<R: Read>(archive: &mut Archive<R>, entry: &Entry, file: &OwnedFd) -> Result<()> {
    const PIECE: usize = 4096;
    let mut buffer = vec![0; 1 << 17];
    for &(start, len) in &entry.pieces {
        let (mut at, end) = (start, start + len);
        while at < end {
            let n = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            archive.read_data(&mut buffer[..n])?;
            for piece in buffer[..n].chunks(PIECE) {
                let mut done = if piece.iter().all(|&b| b == 0) { piece.len() } else { 0 };
                while done < piece.len() {
                    done += rustix::io::pwrite(file, &piece[done..], at + done as u64).call("pwrite")?;
                }
                at += piece.len() as u64;
            }
        }
    }
    rustix::fs::ftruncate(file, entry.size).call("ftruncate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        let mut pax = Vec::new();
        record(&mut pax, "a", b"b");
        record(&mut pax, "path", &[b'x'; 90]);
        record(&mut pax, "path", &[b'x'; 91]);
        let first = b"6 a=b\n";
        assert_eq!(&pax[..6], first);
        let mut at = 0;
        for _ in 0..3 {
            let len: usize =
                pax[at..].split(|&b| b == b' ').next().map(String::from_utf8_lossy).unwrap().parse().unwrap();
            assert_eq!(pax[at + len - 1], b'\n');
            at += len;
        }
        assert_eq!(at, pax.len());
    }

    #[test]
    fn times() {
        for (sec, nsec) in [(0, 0), (1, 5), (1_700_000_000, 999_999_999), (-5, 250_000_000)] {
            let back = time(decimal(sec, nsec).as_bytes()).unwrap();
            assert_eq!((back.tv_sec, back.tv_nsec), (sec, nsec as i64), "{}", decimal(sec, nsec));
        }
        for bad in [&b"x"[..], b"1.x", b"", b"\xff", b"99999999999999999999"] {
            assert!(time(bad).is_none());
        }
    }
}
