//! Making the areas of a task again, and filling them.
//!
//! Written as operations of the task's plan: map, read pages straight from `pages-N.img` to where they belong
//! ([`super::fill`]), protect, advise. A child that had shared its parent's pages copy-on-write gets them by being cloned
//! after the parent's areas are filled ([`Inherited`]); only pages that differ are then read again. An area in which no
//! page is its parent's is made anew: what the parent has there would be copied only to be overwritten.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

use standstill_images::pages::packed::PackedPages;
use standstill_images::pages::PageChain;
use standstill_images::proto::{MmEntry, VmaEntry};
use standstill_images::{ImageKind, Images, ReadAt};

use super::fill::{self, Filling, Helpers};
use super::unpack::{Pipes, Request};
use super::{aio, areas, status, sysv, unpack, PAGE};
use crate::error::{At, Call, Error, Place, Result};
use crate::plan::Plan;

mod compare;

pub use compare::Compared;
use compare::{same_area, Difference, Heads};

const READ: u32 = libc::PROT_READ as u32;
const WRITE: u32 = libc::PROT_WRITE as u32;

/// An area as it is in a task while that is being rebuilt.
#[derive(Debug, Clone)]
pub struct Present {
    entry: VmaEntry,
    prot: u32,
}

/// What a child finds when it is cloned: the areas of its parent that were made before.
#[derive(Debug, Clone, Default)]
pub struct Inherited {
    areas: Vec<Present>,
}

impl Inherited {
    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.areas.is_empty()
    }
}

/// The memory of one task, from its images.
pub struct Memory {
    /// `mm-N.img`.
    pub mm: MmEntry,
    chain: PageChain,
    content: Vec<Content>,
    /// What comes later.
    late: Vec<std::ops::Range<u64>>,
    vdso: Vec<u8>,
    heads: OnceLock<Option<Heads>>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("mm", &self.mm).finish_non_exhaustive()
    }
}

/// Descriptors that plans use: numbers in the tasks.
#[derive(Debug, Default)]
pub struct Numbers {
    /// The file behind an area, by area's file id and open mode.
    pub areas: HashMap<(u32, u32), i32>,
    /// Pages images, by task and layer of the chain.
    pub pages: HashMap<(u32, usize), i32>,
    /// The pipes of tasks with packed pages.
    pub packed: HashMap<u32, Pipes>,
    /// Segments of System V shared memory, by id.
    pub segments: BTreeMap<u32, sysv::Attach>,
}

/// A run of pages with content, and where it is.
#[derive(Debug, Clone, Copy)]
pub struct Content {
    /// Address of the first page.
    pub address: u64,
    /// All of them.
    pub bytes: u64,
    /// In which source of the chain their content is.
    pub layer: usize,
    /// Where in that source.
    pub offset: u64,
}

impl Memory {
    /// Reads and checks the images of task `pid`.
    /// With `lazy`, what the last pagemap says may come when it is first touched is left out: someone else brings it.
    pub fn read(images: &Images, pid: u32, lazy: bool) -> Result<Memory> {
        let mm: MmEntry = images.read_one(ImageKind::Mm, pid)?;
        let chain = PageChain::open(images, ImageKind::Pagemap, pid, PAGE)?;
        let mut content = Vec::new();
        let mut late = Vec::new();
        let mut located = Vec::new();
        if lazy {
            for run in chain.last().runs() {
                let range = run.address..run.end(PAGE);
                if run.lazy {
                    late.push(range);
                } else {
                    located.extend(chain.located_in(range)?);
                }
            }
        } else {
            located = chain.located()?;
        }
        for l in unpack::without_zeros(located, &mm.vmas) {
            let Some(offset) = l.offset else {
                let place = Place::Area(l.address, l.address + l.pages * PAGE);
                return Err(Error::refused(
                    "memory that is not in the images",
                    "it was dumped with --lazy-pages: restore it so, too",
                ))
                .at(place);
            };
            content.push(Content { address: l.address, bytes: l.pages * PAGE, layer: l.layer, offset });
        }
        let mut memory = Memory { mm, chain, content, late, vdso: Vec::new(), heads: OnceLock::new() };
        memory.validate()?;
        memory.vdso = memory.read_vdso()?;
        Ok(memory)
    }

    fn validate(&self) -> Result<()> {
        let lie = |what: String| Err(Error::lie("mm", what));
        let mut last = 0;
        for e in &self.mm.vmas {
            if e.start >= e.end || e.start % PAGE != 0 || e.end % PAGE != 0 {
                return lie(format!("an area {:x}-{:x}", e.start, e.end));
            }
            if e.status & status::GUARD != 0 || e.status & status::VSYSCALL != 0 {
                continue;
            }
            if e.end > TASK_SIZE {
                return lie(format!("an area {:x}-{:x} past the end of user memory", e.start, e.end));
            }
            if e.start < last {
                return lie(format!("area {:x}-{:x} overlaps the one before it", e.start, e.end));
            }
            last = e.end;
            let refuse = |what: &str| {
                Err(Error::refused(what, "this area cannot be restored yet")).at(Place::Area(e.start, e.end))
            };
            for (bit, what) in [
                (status::SHSTK, "a shadow stack"),
                (status::ANON_SHARED, "shared anonymous memory without a file"),
                (status::UPROBES, "an area of uprobes"),
            ] {
                let sysv = bit == status::ANON_SHARED && e.status & status::SYSVIPC != 0;
                if e.status & bit != 0 && !sysv {
                    return refuse(what);
                }
            }
            // as large as fs.aio-max-nr lets it be, and more
            if e.status & status::AIORING != 0 && e.end - e.start > 1 << 30 {
                return lie(format!("an AIO ring {:x}-{:x}", e.start, e.end));
            }
            if e.status & !ALL_KNOWN != 0 {
                return refuse("an area of unknown kind");
            }
            if e.status
                & (status::ANON_PRIVATE
                    | status::FILE_PRIVATE
                    | status::SYSVIPC
                    | status::AIORING
                    | status::IO_URING
                    | OPENED_LAST)
                == 0
            {
                return lie(format!("area {:x}-{:x} is of no kind", e.start, e.end));
            }
        }
        if self.mm.mm_saved_auxv.len() > 512 {
            return lie(format!("an auxiliary vector of {} words", self.mm.mm_saved_auxv.len()));
        }
        let mut private = self.mm.vmas.iter().filter(|e| areas::has_pages(e)).peekable();
        for run in self.chain.last().runs() {
            let (mut at, end) = (run.address, run.address + run.pages * PAGE);
            while at < end {
                while private.peek().is_some_and(|e| e.end <= at) {
                    private.next();
                }
                match private.peek() {
                    Some(e) if e.start <= at => at = e.end,
                    _ => {
                        return Err(Error::lie(
                            "pagemap",
                            format!("a page at {at:x}, where the task has no private area"),
                        ))
                    }
                }
            }
        }
        Ok(())
    }

    /// Areas whose place a rebuild must keep free of its own things.
    pub fn occupied(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.mm.vmas.iter().map(|e| (e.start, e.end))
    }

    /// Files behind areas: id and how to open, each once.
    pub fn files(&self) -> Vec<(u32, u32)> {
        let mut all: Vec<_> = self.mm.vmas.iter().filter(|e| has_file(e)).map(file_key).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// About how many operations' room filling it takes.
    pub fn operations(&self) -> usize {
        self.content.len() * 2 + fill::operations(self.content.iter().map(|c| c.bytes).sum())
    }

    /// Sources of pages: pages images, and what was packed in them.
    pub fn layers(&self) -> usize {
        self.chain.sources()
    }

    /// A pages image.
    pub fn layer(&self, n: usize) -> Option<&dyn ReadAt> {
        self.chain.pages(n).filter(|_| self.packed(n).is_none())
    }

    /// What was packed in a pages image.
    pub fn packed(&self, n: usize) -> Option<&PackedPages> {
        self.chain.packed(n)
    }

    /// Are there pages that the engine must unpack?
    pub fn is_packed(&self) -> bool {
        self.content.iter().any(|c| self.packed(c.layer).is_some())
    }

    /// The vdso's and vvar's places.
    pub fn vdso(&self) -> super::vdso::Layout {
        let mut l = super::vdso::Layout::default();
        for e in &self.mm.vmas {
            if e.status & status::VDSO != 0 {
                (l.vdso, l.vdso_end) = (e.start, e.end);
            } else if e.status & status::VVAR != 0 {
                (l.vvar, l.vvar_end) = (e.start, e.end);
            }
        }
        l
    }

    /// Areas with pages that come when they are first touched.
    pub fn late_areas(&self) -> Vec<(u64, u64)> {
        let is_late = |e: &&VmaEntry| {
            let at = self.late.partition_point(|range| range.end <= e.start);
            self.late.get(at).is_some_and(|range| range.start < e.end)
        };
        self.private().filter(is_late).map(|e| (e.start, e.end)).collect()
    }

    /// The vdso's bytes; none if the task has no vdso.
    pub fn vdso_bytes(&self) -> &[u8] {
        &self.vdso
    }

    fn read_vdso(&self) -> Result<Vec<u8>> {
        const MOST: u64 = 1 << 20;
        let l = self.vdso();
        if l.vdso_end - l.vdso > MOST {
            return Err(Error::lie("mm", format!("a vdso of {} bytes", l.vdso_end - l.vdso)));
        }
        self.bytes(l.vdso, l.vdso_end)
    }

    /// How large the rings of AIO contexts are.
    pub fn rings(&self) -> impl Iterator<Item = &VmaEntry> {
        self.mm.vmas.iter().filter(|e| e.status & status::AIORING != 0)
    }

    /// What lies between two addresses.
    fn bytes(&self, start: u64, end: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        for run in self.content(start, end) {
            let from = usize::try_from(run.address - start).unwrap_or(0);
            let len = usize::try_from(run.bytes).unwrap_or(0);
            if let (Some(pages), Some(room)) = (self.chain.pages(run.layer), bytes.get_mut(from..from + len)) {
                pages.read_exact_at(room, run.offset).call("read(pages)")?;
            }
        }
        Ok(bytes)
    }

    /// Runs of pages with content between two addresses.
    fn content(&self, start: u64, end: u64) -> impl Iterator<Item = Content> + '_ {
        let first = self.content.partition_point(|c| c.address + c.bytes <= start);
        let cut = move |c: &Content| {
            let (from, to) = (c.address.max(start), (c.address + c.bytes).min(end));
            Content { address: from, bytes: to - from, layer: c.layer, offset: c.offset + (from - c.address) }
        };
        self.content[first..].iter().take_while(move |c| c.address < end).map(cut)
    }

    fn private(&self) -> impl Iterator<Item = &VmaEntry> {
        self.mm.vmas.iter().filter(|e| {
            areas::is_private(e) && e.status & (status::VDSO | status::VVAR | status::VSYSCALL | status::GUARD) == 0
        })
    }

    /// True if a child of this task can have shared pages with it: some private area is the same in both.
    pub fn shares_with(&self, child: &Memory) -> bool {
        if self.mm.exe_file_id != child.mm.exe_file_id {
            return false;
        }
        let mine: HashMap<u64, &VmaEntry> = self.private().map(|e| (e.start, e)).collect();
        child.private().any(|e| mine.get(&e.start).is_some_and(|m| same_area(m, e)))
    }

    /// Makes and fills the private areas. `found` is what the task has from its parent, and what differs there; all
    /// else in it but `keep` is unmapped first. Areas stay writable where that is needed until [`Memory::settle`].
    #[allow(clippy::too_many_arguments)]
    pub fn make_private(
        &self,
        pid: u32,
        found: Option<(&Inherited, &Compared)>,
        keep: (u64, u64),
        numbers: &Numbers,
        helpers: &mut Helpers,
        plan: &mut Plan,
        figures: &mut Figures,
    ) -> Result<Inherited> {
        let mut kept: HashMap<u64, (&Present, &Difference)> = HashMap::new();
        if let Some((inherited, compared)) = found {
            for present in &inherited.areas {
                if let Some(difference) = compared.areas.get(&present.entry.start) {
                    kept.insert(present.entry.start, (present, difference));
                }
            }
            figures.compared += compared.figures.compared;
            figures.shared += compared.figures.shared;
            unmap_all_but(kept.values().map(|(p, _)| (p.entry.start, p.entry.end)).chain([keep]), plan);
        }
        let mut made = Inherited { areas: Vec::with_capacity(self.mm.vmas.len()) };
        let mut filling = Filling::default();
        let mut packed = Vec::new();
        for e in self.private() {
            let mut prot = e.prot;
            match kept.get(&e.start) {
                Some((present, k)) => {
                    prot = present.prot;
                    if !k.reads.is_empty() && prot & WRITE == 0 {
                        prot = e.prot | WRITE | READ;
                        protect(e, prot, plan);
                    }
                    for &(start, bytes) in &k.drops {
                        plan.call(
                            "page that only the parent has",
                            libc::SYS_madvise,
                            &[start.into(), bytes.into(), libc::MADV_DONTNEED.into()],
                        );
                    }
                    for run in &k.reads {
                        figures.pages += run.bytes / PAGE;
                        self.fill(pid, run, numbers, &mut filling, &mut packed)?;
                    }
                }
                None => {
                    let mut bytes = 0;
                    for run in self.content(e.start, e.end) {
                        bytes += run.bytes;
                        self.fill(pid, &run, numbers, &mut filling, &mut packed)?;
                    }
                    figures.pages += bytes / PAGE;
                    if bytes != 0 {
                        prot |= WRITE | READ;
                    }
                    map(e, prot, numbers, plan).at(Place::Area(e.start, e.end))?;
                }
            }
            made.areas.push(Present { entry: *e, prot });
        }
        filling.finish(helpers, plan);
        if !packed.is_empty() {
            unpack::ask(pid, *numbers.packed.get(&pid).ok_or(Error::Gone)?, plan);
            figures.packed.push(Request { pid, content: packed });
        }
        Ok(made)
    }

    /// Notes how a run gets to where it belongs: the task reads it, or the engine unpacks it.
    fn fill(
        &self,
        pid: u32,
        run: &Content,
        numbers: &Numbers,
        filling: &mut Filling,
        packed: &mut Vec<Content>,
    ) -> Result<()> {
        if self.packed(run.layer).is_some() {
            packed.push(*run);
            return Ok(());
        }
        let fd = *numbers.pages.get(&(pid, run.layer)).ok_or(Error::Gone)?;
        filling.add(fd, run.offset, run.address, run.bytes);
        Ok(())
    }

    /// Makes the shared areas, and gives all areas their protection, advice and locks. After this, nothing is cloned.
    pub fn settle(&self, made: &Inherited, keep: (u64, u64), numbers: &Numbers, plan: &mut Plan) -> Result<()> {
        for e in self.mm.vmas.iter().filter(|e| e.status & OPENED_LAST != 0 && e.status & status::GUARD == 0) {
            map(e, e.prot, numbers, plan).at(Place::Area(e.start, e.end))?;
        }
        for e in self.rings() {
            let ring = self.bytes(e.start, e.end).and_then(|bytes| aio::restore(e, &bytes, plan));
            ring.at(Place::Area(e.start, e.end))?;
        }
        sysv::attach(&self.mm.vmas, &numbers.segments, keep, plan)?;
        for p in &made.areas {
            if p.prot != p.entry.prot {
                protect(&p.entry, p.entry.prot, plan);
            }
        }
        for e in &self.mm.vmas {
            let len = e.end - e.start;
            if e.status & status::GUARD != 0 {
                const MADV_GUARD_INSTALL: i32 = 102;
                plan.call("guard pages", libc::SYS_madvise, &[e.start.into(), len.into(), MADV_GUARD_INSTALL.into()]);
                continue;
            }
            if e.status & (status::VDSO | status::VVAR | status::VSYSCALL | status::IO_URING) != 0 {
                continue;
            }
            for advice in (0..64).filter(|n| e.madv.unwrap_or(0) >> n & 1 == 1) {
                let args = [e.start.into(), len.into(), advice.into()];
                // a kernel without huge pages or KSM knows no such advice, and needs none
                plan.call_or("advice", libc::SYS_madvise, &args, [libc::EINVAL, libc::EINVAL]);
            }
            if e.flags & libc::MAP_LOCKED as u32 != 0 {
                plan.call_or(
                    "locked memory",
                    libc::SYS_mlock,
                    &[e.start.into(), len.into()],
                    [libc::ENOMEM, libc::EAGAIN],
                );
            }
        }
        Ok(())
    }
}

/// What was done, for the stats image.
#[derive(Debug, Default, Clone)]
pub struct Figures {
    /// Pages read from images.
    pub pages: u64,
    /// Pages compared with the parent's.
    pub compared: u64,
    /// Of these, equal.
    pub shared: u64,
    /// What the engine must unpack for tasks.
    pub packed: Vec<Request>,
}

/// First address behind user memory (four-level paging; an area beyond needs five, and says so by its address).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;
const ALL_KNOWN: u32 = status::REGULAR
    | 1 << 1
    | status::VSYSCALL
    | status::VDSO
    | 1 << 4
    | status::HEAP
    | status::FILE_PRIVATE
    | status::FILE_SHARED
    | status::ANON_PRIVATE
    | status::VVAR
    | status::MEMFD
    | status::ANON_SHARED
    | status::SYSVIPC
    | status::AIORING
    | status::SOCKET
    | status::GUARD
    | status::IO_URING;
/// Areas without pages of the task's own, which are made when all tasks exist.
const OPENED_LAST: u32 = status::FILE_SHARED | status::SOCKET;

fn has_file(e: &VmaEntry) -> bool {
    e.status & (status::FILE_PRIVATE | OPENED_LAST) != 0
}

/// Id and open mode of the file behind an area.
fn file_key(e: &VmaEntry) -> (u32, u32) {
    let guess = if e.prot & WRITE != 0 && e.status & status::FILE_SHARED != 0 { libc::O_RDWR } else { libc::O_RDONLY };
    (u32::try_from(e.shmid).unwrap_or(u32::MAX), e.fdflags.unwrap_or(guess as u32) & libc::O_ACCMODE as u32)
}

fn map(e: &VmaEntry, prot: u32, numbers: &Numbers, plan: &mut Plan) -> Result<()> {
    let huge = libc::MAP_HUGETLB as u32 | 0x3f << 26;
    let kept =
        (libc::MAP_SHARED | libc::MAP_PRIVATE | 0x8 | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE)
            as u32;
    let mut flags = e.flags & kept | libc::MAP_FIXED as u32;
    if e.flags & libc::MAP_HUGETLB as u32 != 0 && !has_file(e) {
        flags |= e.flags & huge;
    }
    let fd = if has_file(e) {
        flags &= !(libc::MAP_ANONYMOUS as u32);
        let (id, mode) = file_key(e);
        *numbers
            .areas
            .get(&(id, mode))
            .ok_or_else(|| Error::lie("mm", format!("an area of file {id:#x}, which is not there")))?
    } else {
        -1
    };
    let offset = if has_file(e) { e.pgoff } else { 0 };
    let args = [e.start.into(), (e.end - e.start).into(), prot.into(), flags.into(), fd.into(), offset.into()];
    plan.call_exact("area", libc::SYS_mmap, &args, e.start as i64);
    Ok(())
}

fn protect(e: &VmaEntry, prot: u32, plan: &mut Plan) {
    plan.call("protection of an area", libc::SYS_mprotect, &[e.start.into(), (e.end - e.start).into(), prot.into()]);
}

/// Unmaps everything below the end of user memory that is in none of `keep`.
pub fn unmap_all_but(keep: impl Iterator<Item = (u64, u64)>, plan: &mut Plan) {
    let mut ranges: Vec<_> = keep.collect();
    ranges.sort_unstable();
    let mut at = 0;
    for (start, end) in ranges.into_iter().chain([(TASK_SIZE, TASK_SIZE)]) {
        if at < start {
            plan.call("areas that are not the task's", libc::SYS_munmap, &[at.into(), (start - at).into()]);
        }
        at = at.max(end);
    }
}
