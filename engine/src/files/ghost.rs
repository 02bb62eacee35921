//! Deleted files that travel in images: their content, owner, mode and times, and how they come back without a name.
//!
//! Image: `ghost-file-N.img` (N in hexadecimal): one [`GhostFileEntry`]; of a regular file below 12288 bytes its bytes follow
//! as they are, of a larger one a [`GhostChunkEntry`] and the bytes for each range that is no hole.
//!
//! How one comes back: it is made under the name that it had, opened there by O_PATH, and unlinked at once. That open
//! file keeps both the inode and the name, so every later open through `/proc/self/fd` gives a descriptor whose link reads
//! "NAME (deleted)", as before. An inode that was open under several names is linked to each for that moment. So nothing
//! is left over, whether the restore succeeds or not. Missing folders on the way are made and removed with it. A name that
//! somebody took meanwhile is not touched: the ghost gets the suffix `.cr_link` then, as with CRIU.
//!
//! A file that never had a name (O_TMPFILE) is made so again, so that the program can still give it one.
//!
//! Not kept: times of inode change and birth, extended attributes and access control lists, and the times of the folder
//! that the name was in.
//!
//! Man pages: open(2), linkat(2), utimensat(2), inode(7).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{major, minor, AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, CWD};
use rustix::io::Errno;
use standstill_images::proto::{GhostChunkEntry, GhostFileEntry, Timeval};
use standstill_images::{GhostContent, ImageKind, Images};

use super::paths::{open_below, place, reopen, split};
use super::{magic_link, sparse};
use crate::error::{At, Call, Error, Result};
use crate::guard::{Act, Guard, List};
use crate::namespaces::user::Users;

/// Regular files from this size on are written in chunks.
const CHUNKS_FROM: u64 = 3 * 4096;
const IMAGE: &str = "ghost-file";

/// Writes the image of a deleted file.
pub(super) fn write(images: &Images, id: u32, file: BorrowedFd<'_>, stat: &Stat) -> Result<()> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    let size = stat.st_size.unsigned_abs();
    let chunks = kind == FileType::RegularFile && size >= CHUNKS_FROM;
    let target = match kind {
        FileType::Symlink => Some(rustix::fs::readlinkat(file, "", Vec::new()).call("readlinkat")?.into_bytes()),
        _ => None,
    };
    let mut image = images.create(ImageKind::GhostFile, id)?;
    image.write(&GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        // 32 bits are what the image has, and what the kernel's own encoding needs
        // in the kernel's encoding, as that of a watch
        dev: Some(major(stat.st_dev) << 20 | minor(stat.st_dev)),
        ino: Some(stat.st_ino),
        rdev: device.then_some(stat.st_rdev as u32),
        atim: Some(Timeval { tv_sec: stat.st_atime as u64, tv_usec: stat.st_atime_nsec / 1000 }),
        mtim: Some(Timeval { tv_sec: stat.st_mtime as u64, tv_usec: stat.st_mtime_nsec / 1000 }),
        chunks: chunks.then_some(true),
        size: chunks.then_some(size),
        symlnk_target: target,
    })?;
    if kind == FileType::RegularFile {
        let file = reopen(file, libc::O_RDONLY as u32)?;
        if chunks {
            for extent in sparse::extents(file.as_fd(), size) {
                let (off, len) = extent?;
                image.write(&GhostChunkEntry { len, off })?;
                let sent = match image.as_file()? {
                    Some(to) => sparse::send(file.as_fd(), off, len, to)?,
                    None => 0,
                };
                sparse::each_part(file.as_fd(), off + sent, len - sent, |bytes| Ok(image.write_raw(bytes)?))?;
            }
        } else {
            sparse::each_part(file.as_fd(), 0, size, |bytes| Ok(image.write_raw(bytes)?))?;
        }
    }
    Ok(image.finish()?)
}

/// Device, in the kernel's encoding, and inode of the file that became ghost `id`.
pub(super) fn origin(images: &Images, id: u32) -> Result<Option<(u32, u64)>> {
    let image = images.open(ImageKind::GhostFile, id)?;
    let (entry, _) = image.reader()?.ghost()?;
    Ok(entry.dev.zip(entry.ino))
}

/// A name of a file that comes back for a moment.
#[derive(Debug)]
pub(super) struct Placed {
    /// Below the root that all are made in.
    pub(super) path: Vec<u8>,
    /// The mounts through which it is open, if there are mounts: from where, and by which path, each finds it.
    pub(super) views: Vec<(Arc<OwnedFd>, Vec<u8>)>,
}

/// Makes ghost `id` again. Returns, for each of its `names`, an O_PATH descriptor of it by that name, which is gone again
/// by then: one for each view, or one. `unnamed`: it came from O_TMPFILE.
pub(super) fn make(
    images: &Images,
    guard: Option<&Guard<'_>>,
    root: BorrowedFd<'_>,
    id: u32,
    names: &[Placed],
    unnamed: bool,
    users: &Users,
) -> Result<Vec<Vec<OwnedFd>>> {
    let image = images.open(ImageKind::GhostFile, id)?;
    let (mut entry, content) = image.reader()?.ghost()?;
    (entry.uid, entry.gid) = (users.outer_user(entry.uid), users.outer_group(entry.gid));
    let kind = FileType::from_raw_mode(entry.mode);
    let Some((first, others)) = names.split_first() else { return Ok(Vec::new()) };

    let mut spot = Spot::find(root, &first.path, id, guard).at(place(&first.path))?;
    if unnamed && others.is_empty() && first.views.len() < 2 && kind == FileType::RegularFile {
        match nameless(&spot, &first.views, &entry, &content) {
            Err(error) if [libc::EOPNOTSUPP, libc::EISDIR, libc::ENOENT].contains(&error.errno()) => {}
            made => return made.at(place(&first.path)).map(|fd| vec![vec![fd]]),
        }
    }
    let own = make_named(&mut spot, kind, &entry, &content).at(place(&first.path))?;
    if kind == FileType::Directory && !others.is_empty() {
        return Err(Error::lie(IMAGE, format!("folder {id:x} has {} names", names.len())));
    }
    let mut made = vec![spot.seen(&first.views)?];
    let mut spots = vec![spot];
    for name in others {
        let (fds, spot) = link(root, own.as_fd(), name, id, guard).at(place(&name.path))?;
        made.push(fds);
        spots.push(spot);
    }
    spots.into_iter().try_for_each(Spot::clear)?;
    Ok(made)
}

/// An O_PATH descriptor of the inode behind `source`, which is below the same root, by a name that is gone again.
pub(super) fn relink(
    root: BorrowedFd<'_>,
    source: BorrowedFd<'_>,
    name: &Placed,
    id: u32,
    guard: Option<&Guard<'_>>,
) -> Result<OwnedFd> {
    let (mut fds, spot) = link(root, source, name, id, guard)?;
    spot.clear()?;
    fds.pop().ok_or(Error::Gone)
}

fn link<'g>(
    root: BorrowedFd<'_>,
    source: BorrowedFd<'_>,
    name: &Placed,
    id: u32,
    guard: Option<&'g Guard<'g>>,
) -> Result<(Vec<OwnedFd>, Spot<'g>)> {
    let mut spot = Spot::find(root, &name.path, id, guard)?;
    spot.put(|folder, name| rustix::fs::linkat(CWD, magic_link(source), folder, name, AtFlags::SYMLINK_FOLLOW))
        .call("linkat")?;
    Ok((spot.seen(&name.views)?, spot))
}

/// A regular file without a name, which can still get one.
fn nameless(
    spot: &Spot<'_>,
    views: &[(Arc<OwnedFd>, Vec<u8>)],
    entry: &GhostFileEntry,
    content: &GhostContent<'_>,
) -> Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let seen = views.first().and_then(|(from, path)| {
        open_below(from.as_fd(), split(path).0, (libc::O_PATH | libc::O_DIRECTORY) as u32).ok()
    });
    let folder = seen.as_ref().unwrap_or(&spot.folder);
    let file = File::from(rustix::fs::openat(folder, ".", flags, Mode::RUSR | Mode::WUSR).call("open(O_TMPFILE)")?);
    fill(&file, entry, content)?;
    let handle = reopen(file.as_fd(), libc::O_PATH as u32)?;
    describe(handle.as_fd(), FileType::RegularFile, entry)?;
    Ok(handle)
}

fn make_named(
    spot: &mut Spot<'_>,
    kind: FileType,
    entry: &GhostFileEntry,
    content: &GhostContent<'_>,
) -> Result<OwnedFd> {
    let private = Mode::RUSR | Mode::WUSR;
    let handle = match kind {
        FileType::RegularFile => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(
                spot.put(|folder, name| rustix::fs::openat(folder, name, flags, private)).call("open(O_CREAT)")?,
            );
            fill(&file, entry, content)?;
            reopen(file.as_fd(), libc::O_PATH as u32)?
        }
        FileType::Directory => {
            spot.is_folder = true;
            spot.put(|folder, name| rustix::fs::mkdirat(folder, name, Mode::RWXU)).call("mkdir")?;
            spot.open()?
        }
        FileType::Symlink => {
            let target = entry.symlnk_target.as_ref();
            let target = target.ok_or_else(|| Error::lie(IMAGE, "a symbolic link without its target"))?;
            spot.put(|folder, name| rustix::fs::symlinkat(target, folder, name)).call("symlink")?;
            spot.open()?
        }
        FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {
            let device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
            let number = match entry.rdev {
                Some(number) if device => u64::from(number),
                None if device => return Err(Error::lie(IMAGE, "a device without its number")),
                _ => 0,
            };
            spot.put(|folder, name| rustix::fs::mknodat(folder, name, kind, private, number)).call("mknod")?;
            spot.open()?
        }
        FileType::Unknown => return Err(Error::lie(IMAGE, format!("mode {:o} is of no kind of file", entry.mode))),
    };
    describe(handle.as_fd(), kind, entry)?;
    Ok(handle)
}

/// Writes the content of a regular file.
fn fill(file: &File, entry: &GhostFileEntry, content: &GhostContent<'_>) -> Result<()> {
    match content {
        GhostContent::Whole(bytes) => sparse::write_at(file.as_fd(), bytes, 0),
        GhostContent::Chunks(chunks) => {
            let size = entry.size.ok_or_else(|| Error::lie(IMAGE, "chunks without a size"))?;
            file.set_len(size).call("ftruncate")?;
            for (chunk, bytes) in chunks {
                if chunk.off.checked_add(chunk.len).is_none_or(|end| end > size) {
                    return Err(Error::lie(IMAGE, format!("a chunk at {} ends after {size}", chunk.off)));
                }
                sparse::write_at(file.as_fd(), bytes, chunk.off)?;
            }
            Ok(())
        }
    }
}

/// Owner, then mode (which a new owner changes), then times.
fn describe(file: BorrowedFd<'_>, kind: FileType, entry: &GhostFileEntry) -> Result<()> {
    // (id)-1 is nobody's: chown(2) takes it for "leave as it is"
    let (uid, gid) = ((entry.uid != u32::MAX).then_some(entry.uid), (entry.gid != u32::MAX).then_some(entry.gid));
    rustix::fs::chownat(file, "", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)
        .call("fchownat")?;
    if kind != FileType::Symlink {
        let mode = Mode::from_raw_mode(entry.mode & 0o7777);
        rustix::fs::chmodat(CWD, magic_link(file), mode, AtFlags::empty()).call("fchmodat")?;
    }
    if let (Some(accessed), Some(modified)) = (entry.atim, entry.mtim) {
        let time = |t: Timeval| Timespec {
            tv_sec: t.tv_sec as i64,
            tv_nsec: i64::try_from(t.tv_usec % 1_000_000).unwrap_or(0) * 1000,
        };
        let times = Timestamps { last_access: time(accessed), last_modification: time(modified) };
        rustix::fs::utimensat(file, "", &times, AtFlags::EMPTY_PATH).call("utimensat")?;
    }
    Ok(())
}

/// A name in a folder for a moment: what was put there, and the folders that were missing, go when this is dropped.
#[derive(Debug)]
struct Spot<'g> {
    guard: Option<&'g Guard<'g>>,
    folder: OwnedFd,
    name: Vec<u8>,
    id: u32,
    taken: bool,
    is_folder: bool,
    made: Vec<(OwnedFd, Vec<u8>)>,
}

impl<'g> Spot<'g> {
    /// Finds the folder of `path` below `root`, and makes what is missing of it.
    fn find(root: BorrowedFd<'_>, path: &[u8], id: u32, guard: Option<&'g Guard<'g>>) -> Result<Spot<'g>> {
        let (mut upper, name) = split(path);
        if name.is_empty() || name == b"." || name == b".." {
            return Err(Error::lie(
                "files.img",
                format!("{} cannot be the name of a deleted file", String::from_utf8_lossy(path)),
            ));
        }
        let flags = (libc::O_PATH | libc::O_DIRECTORY) as u32;
        let mut missing = Vec::new();
        let (folder, fits) = loop {
            match open_below(root, upper, flags) {
                Ok(folder) => break (folder, true),
                Err(error) if error == Errno::NOENT && upper != b"/" => {
                    let (above, name) = split(upper);
                    missing.push(name);
                    upper = above;
                }
                // something else has the name of a folder on the way: then as near as possible
                Err(error) if error == Errno::NOTDIR && upper != b"/" => {
                    missing.clear();
                    upper = split(upper).0;
                    if let Ok(folder) = open_below(root, upper, flags) {
                        break (folder, false);
                    }
                }
                Err(error) => return Err(error).call("openat2"),
            }
        };
        if !fits {
            tracing::warn!(path = %String::from_utf8_lossy(path), "the folder of a deleted file is none now: its name changes");
        }
        let mut spot =
            Spot { guard, folder, name: name.to_vec(), id, taken: false, is_folder: false, made: Vec::new() };
        for name in missing.into_iter().rev() {
            spot.guards(&spot.folder, name, true)?;
            rustix::fs::mkdirat(&spot.folder, name, Mode::from_raw_mode(0o777)).call("mkdir")?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let inner = rustix::fs::openat(&spot.folder, name, flags, Mode::empty()).call("open")?;
            let outer = std::mem::replace(&mut spot.folder, inner);
            spot.made.push((outer, name.to_vec()));
        }
        Ok(spot)
    }

    /// A name that is free is to be made: it goes if the engine dies.
    fn guards(&self, folder: &OwnedFd, name: &[u8], is_folder: bool) -> Result<()> {
        let free = || rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).is_err_and(|e| e == Errno::NOENT);
        if let Some(guard) = self.guard.filter(|_| free()) {
            let held = guard.hold(folder.as_fd())?;
            guard.register(List::Undo, &Act::RemoveIn(held, name, is_folder))?;
        }
        Ok(())
    }

    /// Puts something there, under another name if this one is taken.
    fn put<T>(&mut self, mut put: impl FnMut(BorrowedFd<'_>, &[u8]) -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        let suffixes = [String::new(), ".cr_link".into(), format!(".cr.{:x}.ghost", self.id)];
        for suffix in suffixes {
            let name = [self.name.as_slice(), suffix.as_bytes()].concat();
            // what was a folder has another way to be removed, so both are tried
            for is_folder in [false, true] {
                self.guards(&self.folder, &name, is_folder).map_err(|e| Errno::from_raw_os_error(e.errno()))?;
            }
            match put(self.folder.as_fd(), &name) {
                Err(Errno::EXIST) => {}
                other => {
                    self.taken = other.is_ok();
                    if !suffix.is_empty() {
                        tracing::warn!(name = %String::from_utf8_lossy(&name), "a deleted file gets this name, as its own is taken");
                    }
                    self.name = name;
                    return other;
                }
            }
        }
        Err(Errno::EXIST)
    }

    /// Opens what was put there.
    fn open(&self) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty()).call("open(O_PATH)")
    }

    /// The same through each of the views, or as it is if there are none.
    fn seen(&self, views: &[(Arc<OwnedFd>, Vec<u8>)]) -> Result<Vec<OwnedFd>> {
        if views.is_empty() {
            return Ok(vec![self.open()?]);
        }
        let see = |(from, path): &(Arc<OwnedFd>, Vec<u8>)| {
            let own = self.open()?;
            let path = [split(path).0, b"/", &self.name].concat();
            let seen = open_below(from.as_fd(), &path, (libc::O_PATH | libc::O_NOFOLLOW) as u32);
            let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino));
            match seen {
                Ok(seen) if inode(&seen) == inode(&own) => Ok(seen),
                _ => {
                    tracing::warn!(path = %String::from_utf8_lossy(&path), "what is mounted now hides a file's place: it is on no mount");
                    Ok(own)
                }
            }
        };
        views.iter().map(see).collect()
    }

    /// Takes everything away again.
    fn clear(mut self) -> Result<()> {
        self.remove().call("unlink")
    }

    fn remove(&mut self) -> rustix::io::Result<()> {
        let mut result = Ok(());
        if std::mem::take(&mut self.taken) {
            let flags = if self.is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            result = rustix::fs::unlinkat(&self.folder, &self.name, flags);
        }
        for (folder, name) in self.made.drain(..).rev() {
            match rustix::fs::unlinkat(&folder, &name, AtFlags::REMOVEDIR) {
                // somebody else uses it already
                Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }
}

impl Drop for Spot<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(name = %String::from_utf8_lossy(&self.name), %error, "a temporary name could not be removed");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use standstill_images::MemoryStore;
    use std::io::{Read, Seek};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    fn names(paths: &[&[u8]]) -> Vec<Placed> {
        paths.iter().map(|path| Placed { path: path.to_vec(), views: Vec::new() }).collect()
    }

    fn root() -> OwnedFd {
        rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("standstill-ghost-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        path
    }

    fn link_of(fd: impl AsFd) -> String {
        std::fs::read_link(magic_link(fd.as_fd())).unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn two_names_one_inode_and_nothing_left() {
        let images = Images::new(MemoryStore::new());
        let dir = folder("names");
        let path = dir.join("old");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", 1 << 20).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o4751)).unwrap();
        std::fs::remove_file(&path).unwrap();
        write(&images, 7, file.as_fd(), &rustix::fs::fstat(&file).unwrap()).unwrap();

        let (a, b) = (format!("{}/a", dir.display()), format!("{}/gone/b", dir.display()));
        let made =
            make(&images, None, root().as_fd(), 7, &names(&[a.as_bytes(), b.as_bytes()]), false, &Users::default())
                .unwrap()
                .into_iter()
                .flatten()
                .collect::<Vec<_>>();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        assert_eq!(link_of(&made[0]), format!("{a} (deleted)"));
        assert_eq!(link_of(&made[1]), format!("{b} (deleted)"));
        let mut again = File::from(reopen(made[1].as_fd(), libc::O_RDWR as u32).unwrap());
        let (old, new) = (file.metadata().unwrap(), again.metadata().unwrap());
        assert_eq!(
            (old.mode(), old.len(), old.mtime(), old.blocks()),
            (new.mode(), new.len(), new.mtime(), new.blocks())
        );
        let mut content = Vec::new();
        again.rewind().unwrap();
        again.read_to_end(&mut content).unwrap();
        assert!(content.starts_with(b"begin\0") && content.ends_with(b"\0end"));
        std::fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn folders_fifos_and_links_come_back() {
        let images = Images::new(MemoryStore::new());
        let dir = folder("kinds");
        let path = dir.join("x");
        std::fs::create_dir(&path).unwrap();
        let open = || rustix::fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
        let a = open();
        std::fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink("to here", &path).unwrap();
        let b = open();
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
        let c = open();
        std::fs::remove_file(&path).unwrap();
        for (id, fd) in [(1, &a), (2, &b), (3, &c)] {
            let old = rustix::fs::fstat(fd).unwrap();
            write(&images, id, fd.as_fd(), &old).unwrap();
            let made = make(
                &images,
                None,
                root().as_fd(),
                id,
                &names(&[path.as_os_str().as_bytes()]),
                false,
                &Users::default(),
            )
            .unwrap();
            let new = rustix::fs::fstat(&made[0][0]).unwrap();
            assert_eq!((old.st_mode, old.st_mtime), (new.st_mode, new.st_mtime));
            assert_eq!(link_of(&made[0][0]), format!("{} (deleted)", path.display()));
            if id == 2 {
                assert_eq!(rustix::fs::readlinkat(&made[0][0], "", Vec::new()).unwrap().to_bytes(), b"to here");
            }
        }
        std::fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn a_taken_name_is_left_alone() {
        let images = Images::new(MemoryStore::new());
        let dir = folder("taken");
        let path = dir.join("log");
        std::fs::write(&path, "old").unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        write(&images, 1, file.as_fd(), &rustix::fs::fstat(&file).unwrap()).unwrap();
        std::fs::write(&path, "new").unwrap();
        let made =
            make(&images, None, root().as_fd(), 1, &names(&[path.as_os_str().as_bytes()]), false, &Users::default())
                .unwrap()
                .into_iter()
                .flatten()
                .collect::<Vec<_>>();
        assert!(link_of(&made[0]).ends_with("/log.cr_link (deleted)"));
        assert_eq!(std::fs::read(magic_link(made[0].as_fd())).unwrap(), b"old");
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_never_had_a_name_can_get_one() {
        let images = Images::new(MemoryStore::new());
        let dir = folder("tmpfile");
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        let Ok(file) = rustix::fs::open(&dir, flags, Mode::RUSR) else {
            return eprintln!("skipped: no O_TMPFILE here");
        };
        write(&images, 1, file.as_fd(), &rustix::fs::fstat(&file).unwrap()).unwrap();
        let name = format!("{}/#12", dir.display());
        let made = make(&images, None, root().as_fd(), 1, &names(&[name.as_bytes()]), true, &Users::default())
            .unwrap()
            .into_iter()
            .flatten()
            .collect::<Vec<_>>();
        rustix::fs::linkat(CWD, magic_link(made[0].as_fd()), CWD, dir.join("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
