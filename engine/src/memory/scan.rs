//! Which pages of an area hold something that is not elsewhere: PAGEMAP_SCAN (kernel 6.7, Documentation/admin-guide/mm/
//! pagemap.rst), or /proc/PID/pagemap where that is not known.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::PAGE;
use crate::error::{Call, Error, Result};
use crate::sys::calls;

const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;
const GUARD: u64 = 1 << 8;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const BATCH: usize = 1024;

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
        map.knows_guards = map.scan(0, PAGE, [0, GUARD, 0], |_, _, _| {}).is_ok() && !map.old_kernel;
        Ok(map)
    }

    /// False if only single areas can be looked at: a range with gaps would be read as if there were none.
    pub fn sees_gaps(&self) -> bool {
        !self.old_kernel
    }

    /// Ranges of private pages with content, and those that MADV_GUARD_INSTALL made inaccessible: first address, bytes, and
    /// whether it is a guard. The zero page, and pages of the file behind the area, are no content. One range can belong to
    /// several areas that touch. Kernels before 6.15 do not tell guards, and have none that count as swapped.
    pub fn survey(&mut self, start: u64, end: u64, take: impl FnMut(u64, u64, bool)) -> Result<()> {
        let guard = if self.knows_guards { GUARD } else { 0 };
        let nothing = PFNZERO | FILE;
        self.scan(start, end, [nothing, nothing, PRESENT | SWAPPED | guard], take)
    }

    fn scan(
        &mut self,
        start: u64,
        end: u64,
        [inverted, mask, any]: [u64; 3],
        mut take: impl FnMut(u64, u64, bool),
    ) -> Result<()> {
        let mut at = start;
        // what was told is not told again, whatever the kernel's walk_end says: it can lie before the last range told
        let mut seen = start;
        while at < end {
            if self.old_kernel {
                return self.read(at, end, take);
            }
            let told = if self.knows_guards { GUARD } else { FILE };
            // struct pm_scan_arg
            let words =
                [96, 0, at, end, 0, self.regions.as_mut_ptr() as u64, BATCH as u64, 0, inverted, mask, any, told];
            let mut arg: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let n = match calls::ioctl(self.file.as_fd(), "ioctl(PAGEMAP_SCAN)", PAGEMAP_SCAN, &mut arg) {
                Ok(n) => usize::try_from(n).unwrap_or(0).min(BATCH),
                Err(e) if e.errno() == libc::ENOTTY => {
                    self.old_kernel = true;
                    continue;
                }
                Err(e) => return Err(e),
            };
            for region in self.regions.chunks_exact(24).take(n) {
                let (from, to, kind) = (word(region, 0).max(seen), word(region, 1), word(region, 2));
                if from < to {
                    take(from, to - from, kind & GUARD != 0);
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

    /// Kernels before 6.7: a word a page; bit 63 present, 62 swapped, 61 of a file.
    fn read(&mut self, start: u64, end: u64, mut take: impl FnMut(u64, u64, bool)) -> Result<()> {
        let mut run: Option<u64> = None;
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE).min(self.regions.len() as u64 / 8);
            let bytes = usize::try_from(pages * 8).unwrap_or(0);
            let buf = self.regions.get_mut(..bytes).unwrap_or_default();
            self.file.read_exact_at(buf, at / PAGE * 8).call("read(/proc/PID/pagemap)")?;
            for entry in buf.chunks_exact(8) {
                let content = word(entry, 0) >> 61 & 7;
                if matches!(content, 4 | 2 | 6) {
                    run.get_or_insert(at);
                } else if let Some(from) = run.take() {
                    take(from, at - from, false);
                }
                at += PAGE;
            }
        }
        if let Some(from) = run {
            take(from, at - from, false);
        }
        Ok(())
    }
}

fn word(bytes: &[u8], n: usize) -> u64 {
    bytes.get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}
