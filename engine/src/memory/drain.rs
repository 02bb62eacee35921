//! Copying the pages of a stopped task into `pagemap-N.img` and `pages-N.img`.
//!
//! Where each page goes is known from the scan, so the ranges are cut into pieces that any thread can copy: out of the
//! task with process_vm_readv(2) into a buffer that stays in the CPU's cache, and to its place in the file.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;
use standstill_images::proto::{PagemapEntry, PagemapHead, VmaEntry};
use standstill_images::{ImageKind, Images};

use super::scan::{Pagemap, Protect};
use super::track::TaskMarks;
use super::{areas, compress, page, status, Writing, PAGE};
use crate::error::{At, Call, Error, Place, Result};
use crate::proc::maps::Vma;
use crate::sys::memory as remote;

/// Bytes that one job copies.
const PIECE: u64 = 4 << 20;
/// Bytes that are copied at once: what is read is still in the processor's own cache when it is written.
const BUFFER: usize = 128 << 10;

/// Pages to copy, and where they go.
#[derive(Debug)]
pub struct Drain {
    pid: i32,
    /// Other tasks may share its pages copy-on-write: process_vm_readv(2) would give it copies of its own, since it pins
    /// what it reads (kernel 5.19); /proc/PID/mem does not.
    family: Option<File>,
    pub(super) runs: Vec<Run>,
    /// The task runs while its pages are copied: what it has taken away meanwhile reads as zeros. No mark says of such
    /// a page that it has not changed since, so the next dump does not take it from this one.
    running: bool,
    /// A copy of the task is read.
    copied: bool,
    /// Pages to copy.
    pub pages: u64,
    /// Pages that the parent has.
    pub in_parent: u64,
    /// Pages looked at.
    pub scanned: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) address: u64,
    pub(super) bytes: u64,
    pub(super) readable: bool,
    pub(super) lazy: bool,
    /// Of huge pages, which CRIU restores only if they are not packed.
    pub(super) huge: bool,
    /// It has not changed since the parent, which has it.
    pub(super) in_parent: bool,
    /// It goes into no image: who restores asks us for it.
    pub(super) left: bool,
}

impl Run {
    fn end(&self) -> u64 {
        self.address + self.bytes
    }

    fn is_stored(&self) -> bool {
        !self.in_parent && !self.left
    }
}

/// An area to be looked at.
#[derive(Debug)]
struct Area {
    run: Run,
    /// It can be told what was written.
    marked: bool,
    of_file: bool,
    /// Memory without a file, and much of it: a look at that alone is cheaper.
    alone: bool,
}

/// Bytes, and areas, from which on they are much.
const MUCH: u64 = 1 << 20;
const MANY_AREAS: usize = 256;

/// Finds the pages of `entries` that must be stored, and adds the pseudo entries of guard regions.
/// `vdso` is what the vdso held before we touched it: a copy of it is stored whole.
/// `family`: other tasks of the tree may share its pages.
/// `marks` tell which pages have changed; if it is said to them, pages are protected again.
/// `ours` is where the executor is, between areas of the program.
pub fn plan(
    pid: i32,
    entries: &mut Vec<VmaEntry>,
    stack_pointers: &[u64],
    family: bool,
    marks: Option<&TaskMarks<'_>>,
    ours: Range<u64>,
) -> Result<Drain> {
    let family = if family { Some(remote::open_memory(pid)?) } else { None };
    let mut drain =
        Drain { pid, family, runs: Vec::new(), running: false, copied: false, pages: 0, in_parent: 0, scanned: 0 };
    let mut map = Pagemap::open(pid)?;
    let mut guards = Vec::new();
    // areas between which nothing lies that is not to be looked at: one look serves them all
    let mut group: Vec<Area> = Vec::new();
    let many = entries.len() >= MANY_AREAS;
    let look = |map: &mut Pagemap, group: &mut Vec<Area>, runs: &mut Vec<Run>, guards: &mut Vec<(u64, u64)>| {
        survey(map, group, marks, runs, guards)
    };
    for e in entries.iter() {
        if !areas::has_pages(e) || e.status & status::VVAR != 0 || e.flags & 0xf == 0x8 {
            look(&mut map, &mut group, &mut drain.runs, &mut guards)?;
            continue;
        }
        drain.scanned += (e.end - e.start) / PAGE;
        let readable = e.prot & libc::PROT_READ as u32 != 0;
        let lazy = e.flags & libc::MAP_ANONYMOUS as u32 != 0
            && e.flags & (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u32 == 0
            && e.status & (status::VDSO | status::AIORING) == 0
            && !stack_pointers.iter().any(|sp| (e.start..e.end).contains(sp));
        let huge = e.flags & libc::MAP_HUGETLB as u32 != 0;
        let run = Run { address: e.start, bytes: e.end - e.start, readable, lazy, huge, in_parent: false, left: false };
        if e.status & (status::VDSO | status::AIORING) != 0 {
            look(&mut map, &mut group, &mut drain.runs, &mut guards)?;
            drain.runs.push(run);
            continue;
        }
        let marked = marks.is_some_and(|m| m.cover(e.start, e.end));
        // pages of huge memory that was only read are its file's, too
        let of_file = huge || e.status & status::FILE_PRIVATE != 0;
        let alone = !of_file && (run.bytes >= MUCH || many);
        let over_us = |a: &Area| a.run.address < ours.start && e.start >= ours.end;
        let apart = |a: &Area| (a.marked, a.alone) != (marked, alone) || over_us(a);
        if !map.sees_gaps() || group.last().is_some_and(apart) {
            look(&mut map, &mut group, &mut drain.runs, &mut guards)?;
        }
        group.push(Area { run, marked, of_file, alone });
    }
    look(&mut map, &mut group, &mut drain.runs, &mut guards)?;
    for (start, end) in guards {
        entries.push(VmaEntry { start, end, status: status::GUARD, fd: -1, ..Default::default() });
    }
    let sum = |in_parent| drain.runs.iter().filter(|r| r.in_parent == in_parent).map(|r| r.bytes / PAGE).sum();
    (drain.pages, drain.in_parent) = (sum(false), sum(true));
    Ok(drain)
}

/// Looks at a group of areas, in order, and empties it: what they hold goes to `runs`, guard regions to `guards`. Where pages
/// are marked, what has not changed is taken from the parent, if it has it, and what has changed is marked again if there
/// is to be a next pass.
fn survey(
    map: &mut Pagemap,
    group: &mut Vec<Area>,
    marks: Option<&TaskMarks<'_>>,
    runs: &mut Vec<Run>,
    guards: &mut Vec<(u64, u64)>,
) -> Result<()> {
    let (Some(first), Some(last)) = (group.first(), group.last()) else { return Ok(()) };
    let (start, end) = (first.run.address, last.run.end());
    let marks = marks.filter(|_| first.marked);
    let protect = marks.map_or(Protect::No, TaskMarks::protect);
    let mut at = 0;
    let files = group.iter().any(|a| a.of_file);
    let found = map.survey((start, end), files, marks.map(|m| m.marks), protect, |found| {
        let to = found.from + found.bytes;
        while group.get(at).is_some_and(|a| a.run.end() <= found.from) {
            at += 1;
        }
        for area in group[at..].iter().take_while(|a| a.run.address < to) {
            let (from, to) = (found.from.max(area.run.address), to.min(area.run.end()));
            let mut add = |address, bytes, in_parent| runs.push(Run { address, bytes, in_parent, ..area.run });
            match marks {
                _ if found.guard => guards.push((from, to)),
                Some(_) if found.written || (area.of_file && found.swapped) => add(from, to - from, false),
                Some(marks) => marks.split(from, to - from, add),
                None => add(from, to - from, false),
            }
        }
    });
    found.at(Place::Area(start, end))?;
    group.clear();
    Ok(())
}

impl Drain {
    /// The task goes on, and this one has its memory as it was.
    pub fn read_from(&mut self, copy: i32) -> Result<()> {
        // pages are shared with the task
        self.family = Some(remote::open_memory(copy)?);
        self.pid = copy;
        self.copied = true;
        Ok(())
    }

    /// What can come when it is first touched is left in the task, for who restores to ask for; how many pages.
    pub fn leave_lazy(&mut self) -> u64 {
        let mut left = 0;
        for run in self.runs.iter_mut().filter(|run| run.lazy && !run.in_parent) {
            run.left = true;
            left += run.bytes / PAGE;
        }
        self.pages -= left;
        left
    }

    /// Fills a buffer with what was left in the task from an address on, as far as there is no gap; how many bytes.
    pub fn read_left(&self, address: u64, buffer: &mut [u8]) -> Result<usize> {
        let (mut at, mut done) = (address, 0);
        let first = self.runs.partition_point(|run| run.end() <= address);
        for run in self.runs.iter().skip(first) {
            if done == buffer.len() || run.address > at || !run.left {
                break;
            }
            let there = usize::try_from(run.end() - at).unwrap_or(usize::MAX);
            let n = there.min(buffer.len() - done);
            self.read(at, run.readable, &mut buffer[done..done + n], None)?;
            (at, done) = (at + n as u64, done + n);
        }
        Ok(done)
    }

    /// Whose pages they are.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether a copy of the task is read, which may go on.
    pub fn can_wait(&self) -> bool {
        self.copied
    }

    /// Whether areas with something to copy are of a kind.
    pub fn copies_from(&self, areas: &[Vma], is_of_kind: impl Fn(&Vma) -> bool) -> bool {
        let mut at = 0;
        self.runs.iter().filter(|run| !run.in_parent).any(|run| {
            while areas.get(at).is_some_and(|a| a.end <= run.address) {
                at += 1;
            }
            areas.get(at..).unwrap_or_default().iter().take_while(|a| a.start < run.end()).any(&is_of_kind)
        })
    }

    /// The task runs from now on.
    pub fn released(&mut self) {
        self.running = true;
    }

    /// Writes `pagemap-<id>.img`, and copies the pages to `pages-<pages_id>.img`.
    pub fn write(
        &self,
        images: &Images,
        id: u32,
        pages_id: u32,
        vdso: Option<(u64, &[u8])>,
        how: &Writing,
    ) -> Result<()> {
        if let Some(client) = &how.server {
            return compress::send_drain(self, images, id, vdso, client, how);
        }
        if how.packed.is_some() {
            return compress::write_drain(self, images, id, pages_id, vdso, how);
        }
        let mut image = images.create(ImageKind::Pagemap, id)?;
        image.write(&PagemapHead { pages_id })?;
        let mut last: Option<(u64, u64, u32)> = None;
        for run in &self.runs {
            let flags = match (run.in_parent, run.lazy) {
                _ if run.left => page::LAZY,
                (true, _) => page::PARENT,
                (false, true) => page::PRESENT | page::LAZY,
                (false, false) => page::PRESENT,
            };
            match &mut last {
                Some((start, bytes, f)) if *start + *bytes == run.address && *f == flags => *bytes += run.bytes,
                _ => {
                    if let Some((start, bytes, f)) = last {
                        image.write(&entry(start, bytes, f))?;
                    }
                    last = Some((run.address, run.bytes, flags));
                }
            }
        }
        if let Some((start, bytes, flags)) = last {
            image.write(&entry(start, bytes, flags))?;
        }
        image.finish()?;
        let mut output = images.create_raw(ImageKind::Pages, pages_id)?;
        match output.as_file() {
            Some(file) => self.copy(file, vdso, how)?,
            None => {
                let mut buf = vec![0; BUFFER];
                self.each_piece(PIECE, |run, _| {
                    let mut done = 0;
                    while done < run.bytes {
                        let n = usize::try_from((run.bytes - done).min(BUFFER as u64)).unwrap_or(BUFFER);
                        self.read(run.address + done, run.readable, &mut buf[..n], vdso)?;
                        std::io::Write::write_all(&mut output, &buf[..n]).call("write")?;
                        done += n as u64;
                    }
                    how.counter.add(run.bytes);
                    Ok(())
                })?;
            }
        }
        output.finish()?;
        Ok(())
    }

    /// Calls `f` with every run, cut into pieces of at most `piece` bytes, and its place in the file.
    fn each_piece(&self, piece: u64, mut f: impl FnMut(Run, u64) -> Result<()>) -> Result<()> {
        let mut offset = 0;
        for run in self.runs.iter().filter(|r| r.is_stored()) {
            let mut done = 0;
            while done < run.bytes {
                let bytes = (run.bytes - done).min(piece);
                f(Run { address: run.address + done, bytes, ..*run }, offset)?;
                done += bytes;
                offset += bytes;
            }
        }
        Ok(())
    }

    fn copy(&self, file: &File, vdso: Option<(u64, &[u8])>, how: &Writing) -> Result<()> {
        // pages of zeros at the end are not written either
        rustix::fs::ftruncate(file, self.pages * PAGE).call("ftruncate")?;
        // batches of about PIECE bytes: many small runs make one batch, a large run makes many
        let mut batches: Vec<(Vec<Run>, u64, u64)> = Vec::new();
        self.each_piece(PIECE, |run, offset| {
            match batches.last_mut() {
                Some((runs, _, bytes)) if *bytes + run.bytes <= PIECE => {
                    runs.push(run);
                    *bytes += run.bytes;
                }
                _ => batches.push((vec![run], offset, run.bytes)),
            }
            Ok(())
        })?;
        let one = |buf: &mut Vec<u8>, (runs, offset, bytes): &(Vec<Run>, u64, u64)| {
            self.copy_batch(file, runs, *offset, buf, vdso)?;
            how.counter.add(*bytes);
            Ok(())
        };
        if batches.len() < 2 {
            let mut buf = Vec::new();
            return batches.iter().try_for_each(|b| one(&mut buf, b));
        }
        batches.par_iter().try_for_each_init(Vec::new, |buf, b| one(buf, b))
    }

    fn copy_batch(
        &self,
        file: &File,
        runs: &[Run],
        mut offset: u64,
        buf: &mut Vec<u8>,
        vdso: Option<(u64, &[u8])>,
    ) -> Result<()> {
        let total: u64 = runs.iter().map(|r| r.bytes).sum();
        let size = usize::try_from(total).unwrap_or(BUFFER).min(BUFFER);
        if buf.len() < size {
            buf.resize(size, 0);
        }
        let mut filled = 0usize;
        let mut ranges: Vec<(u64, usize)> = Vec::new();
        crate::sys::interrupt::check()?;
        let mut flush = |ranges: &mut Vec<(u64, usize)>, filled: &mut usize, buf: &mut Vec<u8>| -> Result<()> {
            if *filled == 0 {
                return Ok(());
            }
            self.read_ranges(ranges, &mut buf[..*filled])?;
            write_content(file, &buf[..*filled], offset)?;
            offset += *filled as u64;
            *filled = 0;
            ranges.clear();
            Ok(())
        };
        for run in runs {
            let special = !run.readable || vdso.is_some_and(|(at, _)| at == run.address);
            let mut done = 0;
            while done < run.bytes {
                if filled == size || ranges.len() == 512 || (special && filled > 0) {
                    flush(&mut ranges, &mut filled, buf)?;
                }
                let n = usize::try_from(run.bytes - done).unwrap_or(usize::MAX).min(size - filled);
                if special {
                    self.read(run.address + done, run.readable, &mut buf[..n], vdso)?;
                    filled = n;
                    ranges.clear();
                    // already read: written by the next flush without ranges
                    flush(&mut ranges, &mut filled, buf)?;
                } else {
                    ranges.push((run.address + done, n));
                    filled += n;
                }
                done += n as u64;
            }
        }
        flush(&mut ranges, &mut filled, buf)
    }

    pub(super) fn read_ranges(&self, ranges: &[(u64, usize)], buf: &mut [u8]) -> Result<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        if let Some(memory) = &self.family {
            let mut at = 0;
            for &(address, len) in ranges {
                let room = &mut buf[at..at + len];
                match remote::read_at(memory, address, room) {
                    Err(_) if self.running => self.read_what_is_there(address, room),
                    result => result.at(Place::Area(address, address + len as u64))?,
                }
                at += len;
            }
            return Ok(());
        }
        match remote::read_remote_ranges(self.pid, ranges, buf) {
            Ok(n) if n == buf.len() => return Ok(()),
            Err(e) if !self.running => return Err(e),
            Ok(_) | Err(_) => {}
        }
        // a page that cannot be read in the ordinary way (its file was truncated, a memory error): one range at a time, by force
        let mut at = 0;
        for &(address, len) in ranges {
            let room = &mut buf[at..at + len];
            if remote::read_remote(self.pid, address, room).ok() != Some(len) {
                if self.running {
                    self.read_what_is_there(address, room);
                } else {
                    self.read_forced(address, room)?;
                }
            }
            at += len;
        }
        Ok(())
    }

    pub(super) fn read(&self, address: u64, readable: bool, buf: &mut [u8], vdso: Option<(u64, &[u8])>) -> Result<()> {
        if let Some((at, content)) = vdso {
            let from = usize::try_from(address.wrapping_sub(at)).unwrap_or(usize::MAX);
            if let Some(bytes) = content.get(from..from.saturating_add(buf.len())) {
                buf.copy_from_slice(bytes);
                return Ok(());
            }
        }
        if readable && remote::read_remote(self.pid, address, buf).ok() == Some(buf.len()) {
            return Ok(());
        }
        if self.running {
            self.read_what_is_there(address, buf);
            return Ok(());
        }
        self.read_forced(address, buf)
    }

    /// Reads memory of a running task, page by page; what is not there is zero, and so is all of a task that has ended.
    fn read_what_is_there(&self, address: u64, buf: &mut [u8]) {
        let memory = remote::open_memory(self.pid).ok();
        for (at, page) in (address..).step_by(PAGE as usize).zip(buf.chunks_mut(PAGE as usize)) {
            if memory.as_ref().is_none_or(|memory| remote::read_at(memory, at, page).is_err()) {
                page.fill(0);
            }
        }
    }

    /// Reads what has no PROT_READ, as a debugger does.
    fn read_forced(&self, address: u64, buf: &mut [u8]) -> Result<()> {
        let mem = remote::open_memory(self.pid)?;
        remote::read_at(&mem, address, buf).at(Place::Area(address, address + buf.len() as u64)).map_err(|e| {
            match e.errno() {
                libc::EIO => Error::refused(
                    "memory that cannot be read",
                    "its file was truncated under it, or the hardware failed",
                ),
                _ => e,
            }
        })
    }
}

/// Writes pages, but for those of zeros, which stay holes in the file.
pub(crate) fn write_content(file: &File, pages: &[u8], offset: u64) -> Result<()> {
    const SIZE: usize = PAGE as usize;
    static ZEROS: [u8; SIZE] = [0; SIZE];
    // most pages differ in their first bytes
    let is_zero = |n: usize| pages[n * SIZE..(n + 1) * SIZE] == ZEROS[..];
    let count = pages.len() / SIZE;
    let mut from = 0;
    while from < count {
        if is_zero(from) {
            from += 1;
            continue;
        }
        let to = (from + 1..count).find(|n| is_zero(*n)).unwrap_or(count);
        file.write_all_at(&pages[from * SIZE..to * SIZE], offset + (from * SIZE) as u64).call("write")?;
        from = to;
    }
    Ok(())
}

fn entry(vaddr: u64, bytes: u64, flags: u32) -> PagemapEntry {
    PagemapEntry {
        vaddr,
        compat_nr_pages: 0,
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(bytes / PAGE),
        blocks: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_stay_holes() {
        let file = File::from(crate::sys::spawn::memfd(c"test", 0).unwrap());
        let mut pages = vec![0; 6 * PAGE as usize];
        for n in [1, 2, 4] {
            pages[n * PAGE as usize + 7] = n as u8;
        }
        rustix::fs::ftruncate(&file, 8 * PAGE).unwrap();
        write_content(&file, &pages, 2 * PAGE).unwrap();
        let mut back = vec![1; 8 * PAGE as usize];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back[2 * PAGE as usize..], pages);
        use std::os::unix::fs::MetadataExt;
        assert_eq!(file.metadata().unwrap().blocks(), 3 * PAGE / 512);
    }
}
