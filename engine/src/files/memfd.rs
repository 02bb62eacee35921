//! Files that live in memory alone: memfds, and shared anonymous memory, which the kernel makes of the same stuff.
//!
//! An inode of the kernel's own tmpfs (or hugetlbfs) mount; its link reads `/memfd:NAME (deleted)`, that of shared
//! anonymous memory `/dev/zero (deleted)`. Seals are told by F_GET_SEALS, content by what is no hole.
//!
//! Images: [`MemfdInodeEntry`] of `memfd.img`, an inode each; [`MemfdFileEntry`] of `files.img`, an open file each, and one
//! for all areas that map an inode, without flags; `pagemap-shmem-N.img` and a `pages-M.img` with the content, N is the
//! entry's `shmid`. CRIU 4.2 writes shared anonymous memory the same way, under the name `/dev/zero`; here it comes back as
//! what it was, where CRIU makes a memfd of it.
//!
//! The content is read from the file itself once, a hole never, by the kernel alone where it can (sendfile(2)). A dump
//! collects [`Job`]s for that; [`finish`] runs those that nobody took with [`jobs`] to run them in parallel.
//!
//! Ordering: content, owner and mode, then descriptors and mappings of all tasks, then [`seal`]: a writable mapping that is
//! older than F_SEAL_FUTURE_WRITE goes on being writable. The first writable descriptor is the one that memfd_create(2)
//! gave, as only that one leaves the file executable (execveat(2)).
//!
//! Not kept: times; which pages of hugetlb memory were there but zero; that shared memory has nodes or huge pages of its
//! own wish (mbind(2), madvise(2)).
//!
//! Man pages: memfd_create(2), fcntl(2) (F_ADD_SEALS), mmap(2), proc_pid_map_files(5).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{Gid, MemfdFlags, Mode, SealFlags, Stat, Uid};
use rustix::io::Errno;
use standstill_images::pages::{PageChain, PageMapWriter, PageState};
use standstill_images::proto::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, MemfdInodeEntry};
use standstill_images::{ImageKind, ImageOutput, Images};

use super::paths::{place, reopen};
use super::{no_owner, regular, sparse, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Result};
use crate::memory::compress::{self, Part, Stretch, Target};
use crate::memory::{unpack, Writing};
use crate::namespaces::user::Users;
use crate::sys::calls;
use crate::sys::memory::Shared;
use crate::transfer::{client::Client, wire};

const PAGE: u64 = 4096;
const PREFIX: &[u8] = b"/memfd:";
const DELETED: &[u8] = b" (deleted)";
/// The name in images of shared anonymous memory.
const ANONYMOUS: &[u8] = b"/dev/zero";
const SEAL_SEAL: u32 = libc::F_SEAL_SEAL as u32;
const SEAL_WRITE: u32 = libc::F_SEAL_WRITE as u32;
const SEAL_EXEC: u32 = 0x20;
const NOEXEC_SEAL: u32 = 8;
const EXEC: u32 = 16;
const IMAGE: &str = "memfd.img";

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    inodes: HashMap<(u64, u64), u32>,
    entries: Vec<MemfdInodeEntry>,
    mapped: HashMap<u32, u32>,
    shmids: HashSet<u32>,
    jobs: Vec<Job>,
}

/// The content of one inode, to be written.
#[derive(Debug)]
pub struct Job {
    file: OwnedFd,
    size: u64,
    shmid: u32,
    pages_id: u32,
    huge: Option<u64>,
}

/// A mount of the kernel's own that memory files are on.
#[derive(Debug, Clone, Copy)]
struct Mount {
    device: u64,
    huge: Option<Huge>,
}

/// A size of huge pages, and what memfd_create(2) is to be told to use it.
#[derive(Debug, Clone, Copy)]
struct Huge {
    size: u64,
    flag: u32,
}

/// These mounts: the plain one, and one for each size of huge pages.
fn mounts() -> &'static [Mount] {
    static MOUNTS: OnceLock<Vec<Mount>> = OnceLock::new();
    MOUNTS.get_or_init(|| {
        let device = |flags| {
            let file =
                rustix::fs::memfd_create("probe", MemfdFlags::CLOEXEC | MemfdFlags::from_bits_retain(flags)).ok()?;
            rustix::fs::fstat(&file).ok().map(|stat| stat.st_dev)
        };
        let sizes = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
        let huge = sizes.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?.checked_mul(1024)?;
            let flag = MemfdFlags::HUGETLB.bits() | size.trailing_zeros() << 26;
            Some(Mount { device: device(flag)?, huge: Some(Huge { size, flag }) })
        });
        device(0).map(|device| Mount { device, huge: None }).into_iter().chain(huge).collect()
    })
}

/// Is a file with this link, on this device, one that lives in memory alone?
pub fn is_one(link: &[u8], stat: &Stat) -> bool {
    link.ends_with(DELETED) && !link.starts_with(b"/SYSV") && mounts().iter().any(|mount| mount.device == stat.st_dev)
}

/// Dumps an open file.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let inode_id = match cx.memfds.inodes.get(&(d.stat.st_dev, d.stat.st_ino)) {
        Some(&inode) => inode,
        None => {
            // our own open file: looking for holes moves its offset
            let file = reopen(d.copy.as_fd(), libc::O_RDONLY as u32).at(place(&d.link))?;
            inode(cx, file, &d.link, &d.stat).at(place(&d.link))?
        }
    };
    Ok(file_entry(id, inode_id, d.flags, d.info.pos as u64, d.fown))
}

/// The id of a mapped file. `file` must have been opened for this, for reading: its offset moves.
pub fn mapped(cx: &mut DumpFiles<'_>, file: OwnedFd, link: &[u8], stat: &Stat) -> Result<u32> {
    if link.starts_with(b"/SYSV") {
        return Err(Error::refused("System V shared memory", "detach it before the dump"));
    }
    let inode_id = match cx.memfds.inodes.get(&(stat.st_dev, stat.st_ino)) {
        Some(&inode) => inode,
        None => inode(cx, file, link, stat).at(place(link))?,
    };
    if let Some(&id) = cx.memfds.mapped.get(&inode_id) {
        return Ok(id);
    }
    let id = cx.new_id();
    cx.add(file_entry(id, inode_id, 0, 0, no_owner()));
    cx.memfds.mapped.insert(inode_id, id);
    Ok(id)
}

fn file_entry(id: u32, inode_id: u32, flags: u32, pos: u64, fown: FownEntry) -> FileEntry {
    let memfd = MemfdFileEntry { id, flags, pos, fown, inode_id };
    FileEntry { r#type: FdTypes::Memfd as i32, id, memfd: Some(memfd), ..Default::default() }
}

/// A new inode: its entry, and what is left to do.
fn inode(cx: &mut DumpFiles<'_>, file: OwnedFd, link: &[u8], stat: &Stat) -> Result<u32> {
    let name = link.strip_suffix(DELETED).unwrap_or(link);
    let name = name.strip_prefix(PREFIX).unwrap_or(name).to_vec();
    let seals = match rustix::fs::fcntl_get_seals(&file) {
        Ok(seals) => seals.bits(),
        // a kind of memory that has no seals
        Err(Errno::INVAL) => SEAL_SEAL,
        Err(error) => return Err(error).call("fcntl(F_GET_SEALS)"),
    };
    let huge = mounts().iter().find(|mount| mount.device == stat.st_dev).and_then(|mount| mount.huge);
    let size = stat.st_size.unsigned_abs();
    // 32 bits of the inode number, as CRIU; or whatever is free
    let mut shmid = stat.st_ino as u32;
    while !cx.memfds.shmids.insert(shmid) {
        shmid = shmid.wrapping_add(1);
    }
    if size > 0 {
        add_job(cx, file, size, shmid, huge.map(|huge| huge.size));
    }
    let inode_id = u32::try_from(cx.memfds.entries.len() + 1).unwrap_or(u32::MAX);
    cx.memfds.entries.push(MemfdInodeEntry {
        name,
        uid: cx.users.user(stat.st_uid),
        gid: cx.users.group(stat.st_gid),
        size,
        shmid,
        seals,
        inode_id: inode_id.into(),
        hugetlb_flag: huge.map(|huge| huge.flag),
        mode: Some(stat.st_mode),
    });
    cx.memfds.inodes.insert((stat.st_dev, stat.st_ino), inode_id);
    Ok(inode_id)
}

impl Job {
    /// How large it is, holes included.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes the content; returns how many bytes that were.
    pub fn run(&self, images: &Images, how: &Writing) -> Result<u64> {
        if let Some(client) = &how.server {
            return self.send(client, how);
        }
        if how.packed.is_some() {
            return self.run_packed(images, how);
        }
        let mut pagemap = PageMapWriter::create(images, ImageKind::ShmemPagemap, self.shmid, self.pages_id, PAGE)?;
        let mut pages = images.create_raw(ImageKind::Pages, self.pages_id)?;
        let mut written = 0;
        for extent in sparse::extents(self.file.as_fd(), self.size) {
            let (start, len) = extent?;
            // whole pages: what lies behind the end of the file reads as zeros
            let first = start / PAGE * PAGE;
            let last = (start + len).next_multiple_of(PAGE);
            if let Some(huge) = self.huge {
                for at in (first..last).step_by(usize::try_from(huge).unwrap_or(1 << 21)) {
                    written += self.huge_page(at, huge.min(last - at), &mut pagemap, &mut pages)?;
                }
                continue;
            }
            let there = last.min(self.size) - first;
            let sent = match pages.as_file() {
                Some(to) => sparse::send(self.file.as_fd(), first, there, to)?,
                None => 0,
            };
            sparse::each_part(self.file.as_fd(), first + sent, there - sent, |bytes| {
                pages.write_all(bytes).call("write(pages)")
            })?;
            let padding = usize::try_from(last - first - there).unwrap_or(0);
            pages.write_all(&vec![0; padding]).call("write(pages)")?;
            pagemap.add(first, (last - first) / PAGE, PageState::Present)?;
            written += last - first;
            how.counter.add(last - first);
        }
        pages.finish()?;
        pagemap.finish()?;
        Ok(written)
    }

    fn stretches(&self) -> Result<Vec<Stretch>> {
        let mut stretches = Vec::new();
        for extent in sparse::extents(self.file.as_fd(), self.size) {
            let (start, len) = extent?;
            let (address, end) = (start / PAGE * PAGE, (start + len).next_multiple_of(PAGE));
            let state = PageState::Present;
            stretches.push(Stretch { address, bytes: end - address, state, plain: self.huge.is_some() });
        }
        Ok(stretches)
    }

    fn send(&self, client: &Client, how: &Writing) -> Result<u64> {
        let (stretches, file) = (self.stretches()?, File::from(self.file.try_clone().call("dup")?));
        let bytes = stretches.iter().map(|stretch| stretch.bytes).sum();
        let target = wire::Target { kind: ImageKind::ShmemPagemap, id: self.shmid };
        client.send(target, |_| stretches, |parts, buffer| self.read_parts(&file, parts, buffer), &how.counter)?;
        Ok(bytes)
    }

    fn run_packed(&self, images: &Images, how: &Writing) -> Result<u64> {
        let (stretches, file) = (self.stretches()?, File::from(self.file.try_clone().call("dup")?));
        let target = Target { kind: ImageKind::ShmemPagemap, id: self.shmid, pages_id: self.pages_id, how };
        compress::write(images, &target, &stretches, |parts, buffer| self.read_parts(&file, parts, buffer))?;
        Ok(stretches.iter().map(|stretch| stretch.bytes).sum())
    }

    fn read_parts(&self, file: &File, parts: &[Part], buffer: &mut [u8]) -> Result<()> {
        let mut rest = buffer;
        for part in parts {
            let (room, after) = rest.split_at_mut(part.len());
            // what lies behind the end of the file reads as zeros
            let there = usize::try_from(self.size - part.address).unwrap_or(usize::MAX).min(room.len());
            file.read_exact_at(&mut room[..there], part.address).call("pread")?;
            room[there..].fill(0);
            rest = after;
        }
        Ok(())
    }

    /// hugetlbfs knows no holes: a page of zeros is taken for one.
    fn huge_page(
        &self,
        at: u64,
        len: u64,
        pagemap: &mut PageMapWriter,
        pages: &mut Box<dyn ImageOutput>,
    ) -> Result<u64> {
        let mut page = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        sparse::each_part(self.file.as_fd(), at, len, |bytes| {
            page.extend_from_slice(bytes);
            Ok(())
        })?;
        if page.iter().all(|&b| b == 0) {
            return Ok(0);
        }
        pages.write_all(&page).call("write(pages)")?;
        pagemap.add(at, len / PAGE, PageState::Present)?;
        Ok(len)
    }
}

impl Dumped {
    /// Keeps a number of images from being given to a memfd.
    pub fn reserve(&mut self, shmid: u32) {
        self.shmids.insert(shmid);
    }
}

/// The content of other shared memory is written like that of a memfd.
pub fn add_job(cx: &mut DumpFiles<'_>, file: OwnedFd, size: u64, shmid: u32, huge: Option<u64>) {
    let pages_id = cx.next_pages_id();
    cx.memfds.jobs.push(Job { file, size, shmid, pages_id, huge });
}

/// Takes what is left to do, to run it elsewhere.
pub fn jobs(cx: &mut DumpFiles<'_>) -> Vec<Job> {
    std::mem::take(&mut cx.memfds.jobs)
}

/// Writes `memfd.img`, and the content that nobody took.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    for job in jobs(cx) {
        job.run(cx.images, &Writing { packed: cx.opts.pages_per_block(), ..Writing::default() })?;
    }
    if !cx.memfds.entries.is_empty() {
        cx.images.write_entries(ImageKind::MemfdInode, (), cx.memfds.entries.drain(..))?;
    }
    Ok(())
}

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    inodes: BTreeMap<u64, Inode>,
}

#[derive(Debug)]
struct Inode {
    entry: MemfdInodeEntry,
    file: Option<OwnedFd>,
    /// The descriptor that made it is some task's already.
    given: bool,
}

/// Reads and checks `memfd.img`.
pub fn read(cx: &mut RestoreFiles<'_>) -> Result<()> {
    for entry in cx.images.read_entries_if_there::<MemfdInodeEntry>(ImageKind::MemfdInode, ())? {
        let id = entry.inode_id;
        if cx.memfds.inodes.insert(id, Inode { entry, file: None, given: false }).is_some() {
            return Err(Error::lie(IMAGE, format!("inode {id} is there twice")));
        }
    }
    for memfd in cx.entries.values().filter_map(|entry| entry.memfd.as_ref()) {
        if !cx.memfds.inodes.contains_key(&memfd.inode_id.into()) {
            return Err(Error::lie(
                "files.img",
                format!("file {:#x} is of memfd inode {}, which is missing", memfd.id, memfd.inode_id),
            ));
        }
    }
    Ok(())
}

/// Owners are the tree's: from here on, ours.
pub fn translate(users: &Users, cx: &mut Restored) {
    for entry in cx.inodes.values_mut().map(|inode| &mut inode.entry) {
        (entry.uid, entry.gid) = (users.outer_user(entry.uid), users.outer_group(entry.gid));
    }
}

/// Opens one as its entry says.
pub fn open(e: &MemfdFileEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let made = made(cx, e.inode_id.into())?;
    let path = [PREFIX, &made.entry.name].concat();
    if let Some(ours) = cx.opts.inherited_fd(&String::from_utf8_lossy(&path)) {
        return calls::dup_number(ours).at(place(&path));
    }
    let made = self::made(cx, e.inode_id.into())?;
    let writable = e.flags & (libc::O_ACCMODE | libc::O_PATH) as u32 == libc::O_RDWR as u32;
    let file = made.file.as_ref().ok_or(Error::Gone)?;
    let fd = if writable && !std::mem::replace(&mut made.given, true) {
        file.try_clone().call("dup")?
    } else {
        made.given |= writable;
        reopen(file.as_fd(), e.flags).at(place(&path))?
    };
    if e.flags & libc::O_PATH as u32 == 0 {
        regular::finish_opening(fd.as_fd(), e.pos, e.flags).at(place(&path))?;
    }
    Ok(fd)
}

/// A descriptor of it for an area to map, as the area's `fdflags` say.
pub fn for_mapping(cx: &mut RestoreFiles<'_>, id: u32, fdflags: u32) -> Result<OwnedFd> {
    let missing = || Error::lie("files.img", format!("No entry for memfd {id:#x}"));
    let inode = cx.entry(id)?.memfd.as_ref().ok_or_else(missing)?.inode_id;
    let made = made(cx, inode.into())?;
    let file = made.file.as_ref().ok_or(Error::Gone)?;
    // Where F_SEAL_WRITE is, no area can be made writable, whatever its descriptor was; and an area that could be would
    // keep the seal from being set again.
    let writable = fdflags & libc::O_ACCMODE as u32 == libc::O_RDWR as u32 && made.entry.seals & SEAL_WRITE == 0;
    if writable {
        file.try_clone().call("dup")
    } else {
        reopen(file.as_fd(), libc::O_RDONLY as u32).at(place(&made.entry.name))
    }
}

/// Sets the seals. To be called when all tasks have mapped what they had mapped.
pub fn seal(cx: &mut RestoreFiles<'_>) -> Result<()> {
    for inode in cx.memfds.inodes.values() {
        let Some(file) = inode.file.as_ref().filter(|_| inode.entry.seals & !SEAL_SEAL != 0) else { continue };
        let seals = SealFlags::from_bits_retain(inode.entry.seals);
        rustix::fs::fcntl_add_seals(file, seals).call("fcntl(F_ADD_SEALS)").at(place(&inode.entry.name))?;
    }
    Ok(())
}

/// The inode with this number, made and filled if it is not yet.
fn made<'a>(cx: &'a mut RestoreFiles<'_>, id: u64) -> Result<&'a mut Inode> {
    let inode = cx.memfds.inodes.get_mut(&id).ok_or_else(|| Error::lie(IMAGE, format!("inode {id} is missing")))?;
    if inode.file.is_none() {
        let entry = &inode.entry;
        inode.file = Some(make(entry, cx.images).at(place(&entry.name))?);
    }
    Ok(inode)
}

fn make(entry: &MemfdInodeEntry, images: &Images) -> Result<OwnedFd> {
    let file = match anonymous(entry)? {
        Some(file) => file,
        None => create(entry)?,
    };
    if entry.size > 0 {
        rustix::fs::ftruncate(&file, entry.size).call("ftruncate")?;
        fill(&file, entry.shmid, entry.size, entry.hugetlb_flag.is_some(), images)?;
    }
    // (id)-1 is nobody's: chown(2) takes it for "leave as it is"
    let (uid, gid) = ((entry.uid != u32::MAX).then_some(entry.uid), (entry.gid != u32::MAX).then_some(entry.gid));
    rustix::fs::fchown(&file, uid.map(Uid::from_raw), gid.map(Gid::from_raw)).call("fchown")?;
    if let Some(mode) = entry.mode {
        let mode = mode & 0o7777;
        let now = rustix::fs::fstat(&file).call("fstat")?.st_mode & 0o7777;
        // with F_SEAL_EXEC on it even the same mode may be refused
        if now != mode {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).call("fchmod")?;
        }
    }
    Ok(file)
}

/// Shared anonymous memory, as mmap(2) makes it; none if the entry is another kind, or the kernel does not let us have a
/// descriptor of it (that needs CAP_CHECKPOINT_RESTORE).
fn anonymous(entry: &MemfdInodeEntry) -> Result<Option<OwnedFd>> {
    let plain = entry.name == ANONYMOUS && entry.seals == SEAL_SEAL && entry.hugetlb_flag.is_none();
    if !plain || entry.size == 0 || !entry.size.is_multiple_of(PAGE) {
        return Ok(None);
    }
    let too_large = || Error::lie(IMAGE, format!("{} bytes of shared memory", entry.size));
    let memory = Shared::anonymous(usize::try_from(entry.size).map_err(|_| too_large())?)?;
    let (start, end) = (memory.address(), memory.address() + memory.len());
    match File::options().read(true).write(true).open(format!("/proc/self/map_files/{start:x}-{end:x}")) {
        Ok(file) => Ok(Some(file.into())),
        Err(error) => {
            tracing::warn!(%error, "shared anonymous memory comes back as a memfd");
            Ok(None)
        }
    }
}

fn create(entry: &MemfdInodeEntry) -> Result<OwnedFd> {
    let mut flags = libc::MFD_CLOEXEC;
    if entry.seals != SEAL_SEAL {
        flags |= libc::MFD_ALLOW_SEALING;
    }
    flags |= entry.hugetlb_flag.unwrap_or(0) & (MemfdFlags::HUGETLB.bits() | 0x3f << 26);
    let executable = entry.mode.unwrap_or(0o777) & 0o111 != 0;
    let kind = if executable || entry.seals & SEAL_EXEC == 0 { EXEC } else { NOEXEC_SEAL };
    let create = |flags| rustix::fs::memfd_create(entry.name.as_slice(), MemfdFlags::from_bits_retain(flags));
    match create(flags | kind) {
        // kernels before 6.3 know neither
        Err(Errno::INVAL) => create(flags),
        // vm.memfd_noexec forbids even that the mode is set right after
        Err(Errno::ACCESS) if !executable => create(flags),
        result => result,
    }
    .call("memfd_create")
}

/// Fills a file in memory of `size` bytes from its pages.
pub fn fill(file: &OwnedFd, shmid: u32, size: u64, huge: bool, images: &Images) -> Result<()> {
    let chain = PageChain::open(images, ImageKind::ShmemPagemap, shmid, PAGE)?;
    let end = size.next_multiple_of(PAGE);
    let lie = |what: String| Error::lie("pagemap-shmem", format!("{what} (shmid {shmid}, {size} bytes)"));
    let runs = chain.located()?;
    // huge pages are reserved when they are mapped, and there may be none for a file that has none
    let huge = if huge && !runs.is_empty() {
        Some(Shared::map(file.as_fd(), 0, usize::try_from(size).map_err(|_| lie("too large".into()))?)?)
    } else {
        None
    };
    // our own open file: the offset of `file` becomes the program's
    let target = File::from(reopen(file.as_fd(), libc::O_RDWR as u32)?);
    for run in runs {
        let len = run.pages * PAGE;
        if run.address + len > end {
            return Err(lie(format!("pages at {:#x} are out of place", run.address)));
        }
        if run.zero {
            continue;
        }
        let pages = chain.pages(run.layer).zip(run.offset);
        let (pages, offset) = pages.ok_or_else(|| lie(format!("the pages at {:#x} are nowhere", run.address)))?;
        // the last page may be longer than the file
        let used = len.min(size - run.address);
        match &huge {
            None if chain.packed(run.layer).is_some() => {
                let packed = chain.packed(run.layer).ok_or(Error::Gone)?;
                unpack::copy(packed, offset..offset + used, &target, run.address)?;
            }
            Some(memory) => sparse::each_part_of_image(pages, offset, used, |done, bytes| {
                let at = usize::try_from(run.address + done).map_err(|_| lie("too large".into()))?;
                memory.write(at, bytes);
                Ok(())
            })?,
            None => sparse::fill(pages, offset, used, &target, run.address)?,
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "memfd_tests.rs"]
mod tests;
