//! Which pages of an area hold something that is not elsewhere: PAGEMAP_SCAN (kernel 6.7, Documentation/admin-guide/mm/
//! pagemap.rst), or /proc/PID/pagemap where that is not known.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::PAGE;
use crate::error::{Call, Error, Result};
use crate::sys::calls;

const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;
const SOFT_DIRTY: u64 = 1 << 7;
const GUARD: u64 = 1 << 8;
/// PM_SCAN_WP_MATCHING: pages that are told and were written are protected, in one step.
const PROTECT: u64 = 1;
/// PM_SCAN_CHECK_WPASYNC: an area that cannot be protected is an error. Without it such areas are left out.
const ALL: u64 = 2;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// No more ranges at once than the kernel collects in one go: when it needs a second one that comes to the end, it says that
/// it stopped where the first one did (6.7 to 6.18 at least), and the same ranges would come again.
const BATCH: usize = 512;

/// What tells the pages that were written since a pass from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// Asynchronous write protection: whoever was written has none any more.
    Protection,
    /// The soft-dirty bit.
    SoftDirty,
}

/// Whether pages that were written are protected again while they are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protect {
    /// They are not.
    No,
    /// All of them: nobody changes the areas meanwhile.
    All,
    /// The task runs. What it mapped anew since its areas were registered is left out: nothing says of it that it was not
    /// written, so the next pass takes it.
    WhatIsWatched,
}

/// A range of pages.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// Address of the first.
    pub from: u64,
    /// How many bytes they are.
    pub bytes: u64,
    /// They are inaccessible, by MADV_GUARD_INSTALL.
    pub guard: bool,
    /// They were written since the last pass, if marks were asked for.
    pub written: bool,
    /// They are not in memory, if marks were asked for. In an area of a file such a page may be none: MADV_DONTNEED
    /// leaves a note of its protection there, and the content is the file's again.
    pub swapped: bool,
}

/// What is asked of PAGEMAP_SCAN: categories that are inverted, that all must be there, of which one must be there, and that
/// are told.
#[derive(Debug, Clone, Copy, Default)]
struct Query {
    flags: u64,
    inverted: u64,
    mask: u64,
    any: u64,
    told: u64,
}

/// The page table of a task.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<u8>,
    old_kernel: bool,
    knows_guards: bool,
}

impl Pagemap {
    /// Opens /proc/PID/pagemap.
    pub fn open(pid: i32) -> Result<Pagemap> {
        let file = File::open(format!("/proc/{pid}/pagemap")).call("open(/proc/PID/pagemap)")?;
        let mut map = Pagemap { file, regions: vec![0; BATCH * 24], old_kernel: false, knows_guards: true };
        map.knows_guards =
            map.scan(0, PAGE, Query { mask: GUARD, told: GUARD, ..Query::default() }, |_, _, _| {}).is_ok()
                && !map.old_kernel;
        Ok(map)
    }

    /// False if only single areas can be looked at: a range with gaps would be read as if there were none.
    pub fn sees_gaps(&self) -> bool {
        !self.old_kernel
    }

    /// Ranges of private pages with content, and those that MADV_GUARD_INSTALL made inaccessible. The zero page, and pages
    /// of the file behind the area, are no content. One range can belong to several areas that touch. Kernels before 6.15 do
    /// not tell guards, and have none that count as swapped. With `protect`, no write is lost between what is told of a page
    /// and its protection.
    ///
    /// Without `files` none of the areas has a file behind it. To tell whose a page is costs the kernel a look at the page
    /// itself, ten times as much as the look at the page table.
    pub fn survey(
        &mut self,
        (start, end): (u64, u64),
        files: bool,
        marks: Option<Marks>,
        protect: Protect,
        mut take: impl FnMut(Found),
    ) -> Result<()> {
        let guard = if self.knows_guards { GUARD } else { 0 };
        let nothing = if files { PFNZERO | FILE } else { PFNZERO };
        let mark = match marks {
            Some(Marks::Protection) => WRITTEN | SWAPPED,
            Some(Marks::SoftDirty) => SOFT_DIRTY | SWAPPED,
            None => 0,
        };
        // of what is told there must be something
        let told = if guard | mark == 0 { PFNZERO } else { guard | mark };
        let flags = match protect {
            Protect::No => 0,
            Protect::All => PROTECT | ALL,
            Protect::WhatIsWatched => PROTECT,
        };
        let query = Query { flags, inverted: nothing, mask: nothing, any: PRESENT | SWAPPED | guard, told };
        self.scan(start, end, query, |from, bytes, categories| {
            take(Found {
                from,
                bytes,
                guard: categories & GUARD != 0,
                written: categories & (WRITTEN | SOFT_DIRTY) != 0,
                swapped: categories & SWAPPED != 0,
            });
        })
    }

    /// How many pages were written since the last pass, about: those of files count too.
    pub fn written(&mut self, start: u64, end: u64) -> Result<u64> {
        let query =
            Query { flags: 0, inverted: PFNZERO, mask: PFNZERO | WRITTEN, any: PRESENT | SWAPPED, told: WRITTEN };
        let mut bytes = 0;
        self.scan(start, end, query, |_, n, _| bytes += n)?;
        Ok(bytes / PAGE)
    }

    /// Calls `take` with ranges and what is told of them.
    fn scan(&mut self, start: u64, end: u64, query: Query, mut take: impl FnMut(u64, u64, u64)) -> Result<()> {
        let mut at = start;
        // what was told is not told again, whatever the kernel says
        let mut seen = start;
        while at < end {
            if self.old_kernel {
                return self.read(at, end, query.told, take);
            }
            let vector = self.regions.as_mut_ptr() as u64;
            // struct pm_scan_arg
            let words = [
                96,
                query.flags,
                at,
                end,
                0,
                vector,
                BATCH as u64,
                0,
                query.inverted,
                query.mask,
                query.any,
                query.told,
            ];
            let mut arg: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let n = match calls::ioctl(self.file.as_fd(), "ioctl(PAGEMAP_SCAN)", PAGEMAP_SCAN, &mut arg) {
                Ok(n) => usize::try_from(n).unwrap_or(0).min(BATCH),
                Err(e) if e.errno() == libc::ENOTTY && query.flags == 0 => {
                    self.old_kernel = true;
                    continue;
                }
                Err(e) => return Err(e),
            };
            for region in self.regions.chunks_exact(24).take(n) {
                let (from, to, kind) = (word(region, 0).max(seen), word(region, 1), word(region, 2));
                if from < to {
                    take(from, to - from, kind);
                    seen = to;
                }
            }
            if n < BATCH {
                return Ok(());
            }
            let walked = word(&arg, 4).max(seen);
            if walked <= at {
                return Err(Error::Timeout { what: "the end of a page table scan", seconds: 0 });
            }
            at = walked;
        }
        Ok(())
    }

    /// Kernels before 6.7: a word a page; bit 63 present, 62 swapped, 61 of a file, 55 soft-dirty.
    fn read(&mut self, start: u64, end: u64, told: u64, mut take: impl FnMut(u64, u64, u64)) -> Result<()> {
        let mut run: Option<(u64, u64)> = None;
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE).min(self.regions.len() as u64 / 8);
            let bytes = usize::try_from(pages * 8).unwrap_or(0);
            let buf = self.regions.get_mut(..bytes).unwrap_or_default();
            self.file.read_exact_at(buf, at / PAGE * 8).call("read(/proc/PID/pagemap)")?;
            for entry in buf.chunks_exact(8) {
                let entry = word(entry, 0);
                let dirty = if entry >> 55 & 1 == 0 { 0 } else { SOFT_DIRTY };
                let now = matches!(entry >> 61 & 7, 4 | 2 | 6).then_some(dirty & told);
                if let Some((from, categories)) = run.filter(|(_, c)| Some(*c) != now) {
                    take(from, at - from, categories);
                    run = None;
                }
                if let (None, Some(categories)) = (run, now) {
                    run = Some((at, categories));
                }
                at += PAGE;
            }
        }
        if let Some((from, categories)) = run {
            take(from, at - from, categories);
        }
        Ok(())
    }
}

/// Does this kernel have PAGEMAP_SCAN?
pub fn knows_scan() -> bool {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    Pagemap::open(own).is_ok_and(|map| !map.old_kernel)
}

fn word(bytes: &[u8], n: usize) -> u64 {
    bytes.get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}
