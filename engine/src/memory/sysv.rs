//! System V shared memory (shmget(2), shmat(2)): of the IPC namespace that Standstill and the program live in, or of one that
//! is the tree's own (`namespaces/ipc.rs`), all of whose segments are carried, attached or not.
//!
//! `maps` shows an attached segment as `/SYSVkkkkkkkk (deleted)`; the inode is its id, and IPC_STAT has the rest. A segment is
//! the namespace's and not a task's: other programs may have it attached, and it stays when the tree is dead, unless it was
//! marked to be removed.
//!
//! Images: an area has the status SYSVIPC, the id in `shmid`, and in `fdflags` whether it was attached for reading only; an
//! [`IpcShmEntry`] of `ipcns-shm-N.img` is one segment, N the id of the IPC namespace; its content is in
//! `pagemap-shmem-ID.img` and a `pages-M.img`. CRIU has the same images, for IPC namespaces only: it refuses the host's, and
//! so does Standstill under its name. Two fields of our own tell at restore whether a segment is the one that was dumped.
//!
//! Ordering at restore. A segment that survived is attached: if nobody has it, with the content of the dump, which is put
//! back when all tasks are whole ([`settle`]); if somebody has, with what it holds now, since it is theirs too.
//! One that is gone is made again before the tasks attach it, with its id (`/proc/sys/kernel/shm_next_id`), key, owner,
//! creator, mode and content; if the restore fails it is removed ([`Made`]). Marks for removal come when all have attached it.
//! The id must be free, and so must the key.
//!
//! Not kept: the ids of the processes that made it and that used it last, times; who waits for nothing but the key of a
//! segment that it has not attached (the segment stays where it is, but not across a reboot); where memory policy puts pages.
//!
//! Man pages: shmget(2), shmat(2), shmctl(2), proc_sys_kernel(5).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::FallocateFlags;
use standstill_images::proto::{IpcDescEntry, IpcShmEntry, VmaEntry};
use standstill_images::{ImageKind, Images};

use super::{status, PAGE};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{memfd, DumpFiles, RestoreFiles};
use crate::guard::{Act, Guard, List};
use crate::namespaces::{ipc, user::Users};
use crate::options::Persona;
use crate::plan::Plan;
use crate::proc::maps::{Vma, VmaName};
use crate::sys::shm::{self, Segment};

/// Of `shm_perm.mode`: it is removed when nobody has it attached any more.
const SHM_DEST: u32 = 0o1000;
/// Flags of shmget(2): huge pages, and the logarithm of their size.
const SHM_HUGETLB: u32 = 0o4000;
const HUGE_SHIFT: u32 = 26;
/// The number of the next segment (proc_sys_kernel(5)).
pub const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";
const IMAGE: &str = "ipcns-shm";
const ELSEWHERE: &str = "restore in another IPC namespace, or remove what has it (ipcrm -m ID, ipcrm -M KEY)";

/// Segments of a dump, by id.
#[derive(Debug, Default)]
pub struct Dumped {
    segments: BTreeMap<u32, IpcShmEntry>,
    /// They are of an IPC namespace of the tree's own, all of whose segments are known already.
    own: bool,
}

/// A segment of a namespace that belongs to a tree.
#[derive(Debug)]
pub struct Found {
    id: u32,
    segment: Segment,
    huge: Option<u64>,
    size: u64,
    file: OwnedFd,
}

/// All segments of this thread's IPC namespace. `forced`: who is not attached is removed (`shm_rmid_forced`).
pub fn find(forced: bool) -> Result<Vec<Found>> {
    const HUGETLBFS: i64 = 0x9584_58f6;
    const HUGE: [u64; 2] = [2 << 20, 1 << 30];
    let mut all = Vec::new();
    for (id, segment) in shm::all()? {
        let at = Place::Item("System V shared memory", id.unsigned_abs().into());
        if segment.attached == 0 && (forced || segment.mode & SHM_DEST != 0) {
            // looking at it would remove it
            let what = "a segment that nobody has attached, and that is gone with its maker";
            return Err(Error::refused(what, "attach it, or turn shm_rmid_forced off")).at(at);
        }
        let open = |page: u64| shm::open(id, segment.size.next_multiple_of(page));
        let mut file = open(PAGE);
        for page in HUGE {
            if file.as_ref().is_err_and(|e| e.errno() == libc::ENOENT) {
                file = open(page);
            }
        }
        let file = file.at(at)?;
        let size = rustix::fs::fstat(&file).call("fstat")?.st_size.unsigned_abs();
        let system = rustix::fs::fstatfs(&file).call("fstatfs")?;
        let huge = (system.f_type == HUGETLBFS).then_some(system.f_bsize.unsigned_abs());
        all.push(Found { id: id.unsigned_abs(), segment, huge, size, file });
    }
    Ok(all)
}

impl Found {
    /// The segment goes into images.
    pub fn note(self, cx: &mut DumpFiles<'_>) {
        cx.memfds.reserve(self.id);
        cx.sysv.own = true;
        let mut entry = entry(self.id, &self.segment, self.huge);
        ipc::to_own(&mut entry.desc, &cx.users);
        cx.sysv.segments.insert(self.id, entry);
        memfd::add_job(cx, self.file, self.size, self.id, self.huge);
    }
}

/// The id of an attached segment.
fn id_of(area: &Vma) -> Option<u32> {
    matches!(area.name(), VmaName::SysV(_)).then_some(area.inode).and_then(|id| u32::try_from(id).ok())
}

/// Keeps the numbers of these segments from being given to other shared memory.
pub fn reserve(areas: &[Vma], cx: &mut DumpFiles<'_>) {
    areas.iter().filter_map(id_of).for_each(|id| cx.memfds.reserve(id));
}

/// Dumps one area, whose entry has all that is not special to it.
pub fn area(pid: i32, area: &Vma, cx: &mut DumpFiles<'_>, e: &mut VmaEntry) -> Result<()> {
    if cx.opts.personality == Persona::Criu && !cx.sysv.own {
        let what = format!("Task {pid} with SysVIPC shmem map @{:x} doesn't live in IPC ns", area.start);
        return Err(Error::Usage { what });
    }
    let id = id_of(area).ok_or(Error::Gone)?;
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end);
    let writable = rustix::fs::lstat(&link).call("lstat(/proc/PID/map_files)")?.st_mode & 0o200 != 0;
    e.fdflags = Some(if writable { libc::O_RDWR as u32 } else { libc::O_RDONLY as u32 });
    e.pgoff = area.offset;
    e.shmid = u64::from(id);
    e.status = status::REGULAR | status::ANON_SHARED | status::SYSVIPC;
    e.flags |= libc::MAP_ANONYMOUS as u32;
    if cx.sysv.segments.contains_key(&id) {
        return Ok(());
    }
    let foreign = || {
        let what = format!("System V shared memory {id}, which this IPC namespace does not have,");
        Error::refused(what, "run Standstill in the IPC namespace that the segment is of")
    };
    let segment = shm::stat(id.cast_signed()).map_err(|_| foreign())?;
    let file = File::open(&link).call("open(/proc/PID/map_files)")?;
    let size = rustix::fs::fstat(&file).call("fstat")?.st_size.unsigned_abs();
    let page = if area.kernel_page_size_kb > 4 { area.kernel_page_size_kb * 1024 } else { PAGE };
    if size.next_multiple_of(page) != segment.size.next_multiple_of(page) {
        return Err(foreign());
    }
    let huge = (page > PAGE).then_some(page);
    cx.sysv.segments.insert(id, entry(id, &segment, huge));
    memfd::add_job(cx, file.into(), size, id, huge);
    Ok(())
}

fn entry(id: u32, s: &Segment, huge: Option<u64>) -> IpcShmEntry {
    let Segment { key, uid, gid, cuid, cgid, mode, size, .. } = *s;
    IpcShmEntry {
        desc: IpcDescEntry { key, uid, gid, cuid, cgid, mode, id },
        size,
        in_pagemaps: Some(true),
        hugetlb_flag: huge.map(|size| SHM_HUGETLB | libc::MAP_HUGETLB as u32 | size.trailing_zeros() << HUGE_SHIFT),
        standstill_changed: Some(s.changed),
        standstill_creator: Some(s.creator),
    }
}

/// Writes `ipcns-shm-N.img`, if there is a segment.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    if cx.sysv.segments.is_empty() {
        return Ok(());
    }
    let mut image = cx.images.create(ImageKind::IpcnsShm, cx.ipc_ns)?;
    for segment in cx.sysv.segments.values() {
        image.write_with_payload(segment, &&[][..])?;
    }
    Ok(image.finish()?)
}

/// Segments of a restore, by id.
#[derive(Debug, Default)]
pub struct Restored {
    segments: BTreeMap<u32, IpcShmEntry>,
    /// They are of an IPC namespace of the tree's own.
    own: bool,
    /// Segments that survived, and that nobody had.
    stale: Vec<u32>,
    made: Made,
}

/// Segments that a restore has made. Removed when this is dropped, unless they are to stay.
#[derive(Debug, Default)]
pub struct Made(Vec<i32>);

impl Made {
    /// The restore worked.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for &id in &self.0 {
            match shm::remove(id) {
                Err(e) if ![libc::EINVAL, libc::EIDRM].contains(&e.errno()) => {
                    tracing::error!("System V shared memory {id} was made and cannot be removed: {e}");
                }
                _ => {}
            }
        }
    }
}

impl Restored {
    /// How much memory a task gets that attaches a segment, by id.
    pub fn sizes(&self) -> BTreeMap<u32, Attach> {
        self.segments.iter().map(|(&id, e)| (id, Attach { bytes: whole_size(e), page: page_size(e) })).collect()
    }

    /// Are they of an IPC namespace of the tree's own?
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// The tree has ids of users of its own: owners become ours.
    pub fn translate(&mut self, users: &Users) {
        self.segments.values_mut().for_each(|e| ipc::to_ours(&mut e.desc, users));
    }

    /// Makes all of them, in this thread's IPC namespace, which is new.
    pub fn make_all(&self, images: &Images) -> Result<()> {
        let mut made = Made::default();
        for e in self.segments.values() {
            let at = Place::Item("System V shared memory", e.desc.id.into());
            make(e, None, &mut made).and_then(|()| fill(e, images)).at(at)?;
        }
        made.keep();
        Ok(())
    }

    /// All have attached what they have: marks for removal.
    pub fn mark_removed(&self) -> Result<()> {
        for e in self.segments.values().filter(|e| e.desc.mode & SHM_DEST != 0) {
            shm::remove(e.desc.id.cast_signed()).at(Place::Item("System V shared memory", e.desc.id.into()))?;
        }
        Ok(())
    }

    /// What has been made so far: to be removed if the restore fails after all.
    pub fn take_made(&mut self) -> Made {
        std::mem::take(&mut self.made)
    }
}

/// What attaching a segment takes.
#[derive(Debug, Clone, Copy)]
pub struct Attach {
    bytes: u64,
    page: u64,
}

fn page_size(e: &IpcShmEntry) -> u64 {
    // an image may say anything
    let shift = e.hugetlb_flag.map_or(PAGE.trailing_zeros(), |flag| flag >> HUGE_SHIFT & 0x3f);
    1 << shift.clamp(PAGE.trailing_zeros(), 34)
}

fn whole_size(e: &IpcShmEntry) -> u64 {
    e.size.checked_next_multiple_of(page_size(e)).unwrap_or(u64::MAX)
}

/// Reads `ipcns-shm-N.img` and checks what the tasks have attached.
///
/// `own`: the namespace is the tree's.
pub fn read<'v>(
    ns: u32,
    own: bool,
    areas: impl Iterator<Item = &'v VmaEntry>,
    cx: &mut RestoreFiles<'_>,
) -> Result<()> {
    let mut attached = areas.filter(|e| e.status & status::SYSVIPC != 0).peekable();
    cx.sysv.own = own;
    if attached.peek().is_none() && !(own && cx.images.exists(ImageKind::IpcnsShm, ns)?) {
        return Ok(());
    }
    let image = cx.images.open(ImageKind::IpcnsShm, ns)?;
    for (e, _) in image.reader()?.all_with_payload::<IpcShmEntry>()? {
        if e.in_pagemaps != Some(true) {
            return Err(Error::refused("System V shared memory of an old image", "dump the program again"));
        }
        if e.size == 0 || whole_size(&e) > super::rebuild::TASK_SIZE || i32::try_from(e.desc.id).is_err() {
            return Err(Error::lie(IMAGE, format!("segment {} of {} bytes", e.desc.id, e.size)));
        }
        if cx.sysv.segments.insert(e.desc.id, e).is_some() {
            return Err(Error::lie(IMAGE, format!("segment {} is there twice", e.desc.id)));
        }
    }
    for area in attached {
        let segment = u32::try_from(area.shmid).ok().and_then(|id| cx.sysv.segments.get(&id));
        let end = area.pgoff.checked_add(area.end - area.start);
        if !segment.is_some_and(|s| end.is_some_and(|end| end <= whole_size(s)) && area.start >= area.pgoff) {
            let what = format!("an area of segment {}, which has no such part", area.shmid);
            return Err(Error::lie("mm", what)).at(Place::Area(area.start, area.end));
        }
    }
    Ok(())
}

/// Finds the segments that survived, and makes the others again.
pub fn prepare(cx: &mut RestoreFiles<'_>) -> Result<()> {
    if cx.sysv.own {
        return Ok(());
    }
    for e in cx.sysv.segments.values() {
        let id = e.desc.id;
        let at = Place::Item("System V shared memory", id.into());
        match shm::stat(id.cast_signed()) {
            Ok(now) if is_same(e, &now) => {
                if now.attached == 0 {
                    cx.sysv.stale.push(id);
                } else {
                    tracing::warn!("System V shared memory {id} is in use by others: its content stays as it is");
                }
            }
            Ok(_) => return Err(Error::refused("an id that another segment has by now", ELSEWHERE)).at(at),
            Err(e) if e.errno() != libc::EINVAL && e.errno() != libc::EIDRM => return Err(e).at(at),
            Err(_) => make(e, cx.guard, &mut cx.sysv.made).and_then(|()| fill(e, cx.images)).at(at)?,
        }
    }
    Ok(())
}

/// Is this the segment that was dumped, which has survived?
fn is_same(e: &IpcShmEntry, now: &Segment) -> bool {
    let d = &e.desc;
    (d.key, e.size, d.cuid, d.cgid) == (now.key, now.size, now.cuid, now.cgid)
        && e.standstill_changed == Some(now.changed)
        && e.standstill_creator == Some(now.creator)
}

fn make(e: &IpcShmEntry, guard: Option<&Guard<'_>>, made: &mut Made) -> Result<()> {
    let d = &e.desc;
    let id = d.id.cast_signed();
    std::fs::write(NEXT_ID, id.to_string()).call("write(/proc/sys/kernel/shm_next_id)")?;
    if let Some(guard) = guard {
        guard.register(List::Undo, &Act::RemoveSegment(id))?;
    }
    let huge = e.hugetlb_flag.unwrap_or(0) & (SHM_HUGETLB | 0x3f << HUGE_SHIFT);
    let flags = (huge | d.mode & 0o777).cast_signed();
    let size = usize::try_from(e.size).map_err(|_| Error::lie(IMAGE, format!("{} bytes", e.size)))?;
    let got = match shm::create_as(d.cuid, d.cgid, d.key, size, flags) {
        // huge pages are for the administrator and for a group
        Err(error) if error.errno() == libc::EPERM => shm::create(d.key, size, flags),
        other => other,
    };
    let got = got.map_err(|error| match error.errno() {
        libc::EEXIST => Error::refused(format!("key {:#x}, which another segment has by now,", d.key), ELSEWHERE),
        _ => error,
    })?;
    made.0.push(got);
    if got != id {
        let what = format!("its number (the kernel gave {got})");
        return Err(Error::refused(what, "restore in another IPC namespace"));
    }
    shm::set(id, d.uid, d.gid, d.mode)
}

/// Puts the content of the dump into a segment.
fn fill(e: &IpcShmEntry, images: &Images) -> Result<()> {
    let file = shm::open(e.desc.id.cast_signed(), whole_size(e))?;
    let size = rustix::fs::fstat(&file).call("fstat")?.st_size.unsigned_abs();
    memfd::fill(&file, e.desc.id, size, e.hugetlb_flag.is_some(), images)
}

/// When all tasks are whole and none runs: the content of segments that survived, marks for removal.
pub fn settle(cx: &mut RestoreFiles<'_>) -> Result<()> {
    for id in std::mem::take(&mut cx.sysv.stale) {
        let e = cx.sysv.segments.get(&id).ok_or(Error::Gone)?;
        let again = || {
            let file = shm::open(id.cast_signed(), whole_size(e))?;
            let size = whole_size(e);
            let all = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, all, 0, size).call("fallocate(FALLOC_FL_PUNCH_HOLE)")?;
            fill(e, cx.images)
        };
        again().at(Place::Item("System V shared memory", id.into()))?;
    }
    if cx.sysv.own {
        return Ok(());
    }
    cx.sysv.mark_removed()
}

/// Attaches a task's segments; all else of its memory is there already, but what lies in `keep` is not its own.
pub fn attach(vmas: &[VmaEntry], sizes: &BTreeMap<u32, Attach>, keep: (u64, u64), plan: &mut Plan) -> Result<()> {
    // the pieces of one attachment: it may be cut by mprotect(2), munmap(2), mremap(2)
    let mut all: BTreeMap<(u32, u64, bool), Vec<&VmaEntry>> = BTreeMap::new();
    for e in vmas.iter().filter(|e| e.status & status::SYSVIPC != 0) {
        let id = u32::try_from(e.shmid).map_err(|_| Error::Gone)?;
        let read_only = e.fdflags == Some(libc::O_RDONLY as u32);
        all.entry((id, e.start - e.pgoff, read_only)).or_default().push(e);
    }
    for ((id, base, read_only), pieces) in all {
        let &Attach { bytes, page } = sizes.get(&id).ok_or(Error::Gone)?;
        let exec = pieces.iter().any(|e| e.prot & libc::PROT_EXEC as u32 != 0);
        let mut flags = if read_only { libc::SHM_RDONLY } else { 0 };
        if exec {
            flags |= libc::SHM_EXEC;
        }
        let of_piece: u64 = pieces.iter().map(|e| e.end - e.start).sum();
        let whole = of_piece == bytes;
        let at = if whole { base } else { gap(vmas, keep, bytes, page)? };
        let args = [id.into(), at.into(), flags.into()];
        plan.call_exact(format!("System V shared memory {id}"), libc::SYS_shmat, &args, at.cast_signed());
        let mut prot = libc::PROT_READ as u32;
        if !read_only {
            prot |= libc::PROT_WRITE as u32;
        }
        if exec {
            prot |= libc::PROT_EXEC as u32;
        }
        let mut done = 0;
        for e in pieces {
            let len = e.end - e.start;
            if !whole {
                const MAYMOVE_FIXED: u32 = 3;
                unmap(at, done, e.pgoff, plan);
                done = e.pgoff + len;
                let args = [(at + e.pgoff).into(), len.into(), len.into(), MAYMOVE_FIXED.into(), e.start.into()];
                plan.call_exact("part of a segment", libc::SYS_mremap, &args, e.start.cast_signed());
            }
            if e.prot != prot {
                let args = [e.start.into(), len.into(), e.prot.into()];
                plan.call("protection of a segment", libc::SYS_mprotect, &args);
            }
        }
        if !whole {
            unmap(at, done, bytes, plan);
        }
    }
    Ok(())
}

fn unmap(at: u64, from: u64, to: u64, plan: &mut Plan) {
    if from < to {
        plan.call("part of a segment", libc::SYS_munmap, &[(at + from).into(), (to - from).into()]);
    }
}

/// An address with room for `bytes` that nothing of the task is at.
fn gap(vmas: &[VmaEntry], keep: (u64, u64), bytes: u64, page: u64) -> Result<u64> {
    const LOWEST: u64 = 0x1_0000_0000;
    let mut taken: Vec<(u64, u64)> = vmas.iter().map(|e| (e.start, e.end)).chain([keep]).collect();
    taken.sort_unstable();
    let mut at = LOWEST;
    for (start, end) in taken {
        if start >= at && start - at >= bytes {
            break;
        }
        at = at.max(end).next_multiple_of(page);
    }
    if at.checked_add(bytes).is_none_or(|end| end > super::rebuild::TASK_SIZE) {
        return Err(Error::Usage { what: "no address is free for a segment of System V shared memory".into() });
    }
    Ok(at)
}
