//! The memory of one task, part of which is still to come.
//!
//! What is missing is known by where it is in the task now, and by where it was at the dump, which is what the source knows it
//! by. Pages are read without any lock, since what the source has does not change; they are put in place under the layout lock, which
//! whoever moves things holds alone. Between an event of the kernel and our reading of it nothing can be put anywhere (EAGAIN), so what
//! is known is true whenever something is put.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use standstill_images::pages::PageChain;
use standstill_images::proto::MmEntry;
use standstill_images::{ImageKind, Images};

use super::remote::Remote;
use crate::error::{Error, Result};
use crate::memory::PAGE;
use crate::sys::uffd_lazy::{Put, Uffd};
use crate::transfer::source::read_chain;

/// Bytes that are brought at once when nobody waits for them.
const PIECE: u64 = 256 << 10;
/// Bytes that are brought for one who waits for a page: it will want the next ones.
const AHEAD: u64 = 32 << 10;
/// The same from elsewhere.
const AHEAD_REMOTE: u64 = 4 * PAGE;

/// Where pages come from.
#[derive(Clone)]
pub enum Source {
    /// Images.
    Local(Arc<PageChain>),
    /// A server, which knows the task by this id.
    Remote(Arc<Remote>, u32),
}

impl Source {
    /// The images of a task.
    pub fn local(images: &Images, id: u32) -> Result<Source> {
        Ok(Source::Local(Arc::new(PageChain::open(images, ImageKind::Pagemap, id, PAGE)?)))
    }

    /// Reads pages into a buffer, as many as can be had at once.
    fn read(&self, image: u64, bytes: u64, buffer: &mut Vec<u8>) -> Result<()> {
        match self {
            Source::Local(chain) => {
                buffer.resize(usize::try_from(bytes).unwrap_or(0), 0);
                let n = read_chain(chain, image, buffer)?;
                buffer.truncate(n);
            }
            Source::Remote(remote, id) => *buffer = remote.read(*id, image, bytes)?,
        }
        match buffer.len() {
            0 => Err(Error::refused(
                "memory that is not in the images",
                "it was dumped with --lazy-pages: name the host that has it (--page-server, --address, --port)",
            )),
            _ => Ok(()),
        }
    }

    fn ahead(&self) -> u64 {
        match self {
            Source::Local(_) => AHEAD,
            Source::Remote(..) => AHEAD_REMOTE,
        }
    }
}

/// Pages by where they were at the dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    image: u64,
    bytes: u64,
}

/// What is missing.
#[derive(Debug, Clone, Default)]
struct Missing {
    /// By where it is now: how many bytes, and where it was at the dump.
    ranges: BTreeMap<u64, Piece>,
    /// What someone brings at this moment, without being asked.
    flying: Vec<Piece>,
    /// Where the next of these begins.
    next: u64,
}

impl Missing {
    /// The piece that begins at a page, if that is missing.
    fn at(&self, address: u64, most: u64) -> Option<Piece> {
        let (start, range) = self.ranges.range(..=address).next_back()?;
        let skip = address - start;
        (skip < range.bytes).then(|| Piece { image: range.image + skip, bytes: (range.bytes - skip).min(most) })
    }

    /// The parts of a piece that are missing, and where they are now.
    fn find(&self, piece: Piece) -> Vec<(u64, Piece)> {
        let end = piece.image + piece.bytes;
        let cut = |(address, range): (&u64, &Piece)| {
            let (from, to) = (range.image.max(piece.image), (range.image + range.bytes).min(end));
            (from < to).then(|| (address + (from - range.image), Piece { image: from, bytes: to - from }))
        };
        // most areas never move
        let first = self.ranges.range(..=piece.image).next_back();
        if let Some(found) = first.filter(|(address, range)| **address == range.image).and_then(cut) {
            if found.1 == piece {
                return vec![found];
            }
        }
        self.ranges.iter().filter_map(cut).collect()
    }

    /// Takes a range of addresses out, and hands it back in parts.
    fn take(&mut self, from: u64, to: u64) -> Vec<(u64, Piece)> {
        let mut taken = Vec::new();
        let first = self.ranges.range(..from).next_back().map(|(start, _)| *start);
        let starts: Vec<u64> = first.into_iter().chain(self.ranges.range(from..to).map(|(start, _)| *start)).collect();
        for start in starts {
            let Some(range) = self.ranges.remove(&start) else { continue };
            let end = start + range.bytes;
            let (cut, stop) = (start.max(from), end.min(to));
            if cut >= stop {
                self.ranges.insert(start, range);
                continue;
            }
            let part = |a: u64, b: u64| Piece { image: range.image + (a - start), bytes: b - a };
            if start < cut {
                self.ranges.insert(start, part(start, cut));
            }
            if stop < end {
                self.ranges.insert(stop, part(stop, end));
            }
            taken.push((cut, part(cut, stop)));
        }
        taken
    }

    /// What to bring next, unasked.
    fn next(&mut self) -> Option<Piece> {
        let overlaps = |a: &Piece, b: &Piece| a.image < b.image + b.bytes && b.image < a.image + a.bytes;
        for from in [self.next, 0] {
            let before = self.ranges.range(..from).next_back();
            for (start, range) in before.into_iter().chain(self.ranges.range(from..)) {
                let mut at = (*start).max(from);
                while at < start + range.bytes {
                    let image = range.image + (at - start);
                    let piece = Piece { image, bytes: (start + range.bytes - at).min(PIECE) };
                    if !self.flying.iter().any(|other| overlaps(other, &piece)) {
                        self.next = at + piece.bytes;
                        self.flying.push(piece);
                        return Some(piece);
                    }
                    at += piece.bytes;
                }
            }
        }
        None
    }
}

/// The memory of one task.
pub struct Space {
    /// Its userfaultfd.
    pub uffd: Uffd,
    source: Source,
    layout: RwLock<()>,
    missing: Mutex<Missing>,
    gone: AtomicBool,
}

impl Space {
    /// What is to come of a task, by its images.
    pub fn read(images: &Images, id: u32, uffd: Uffd, source: Source) -> Result<Space> {
        let mm: MmEntry = images.read_one(ImageKind::Mm, id)?;
        let chain;
        let map = match &source {
            Source::Local(chain) => chain.last(),
            Source::Remote(..) => {
                chain = PageChain::open(images, ImageKind::Pagemap, id, PAGE)?;
                chain.last()
            }
        };
        let mut missing = Missing::default();
        for area in &mm.vmas {
            for run in map.in_range(area.start..area.end).filter(|run| run.lazy) {
                missing.ranges.insert(run.address, Piece { image: run.address, bytes: run.bytes(PAGE) });
            }
        }
        Ok(Space::new(uffd, source, missing))
    }

    fn new(uffd: Uffd, source: Source, missing: Missing) -> Space {
        Space { uffd, source, layout: RwLock::new(()), missing: Mutex::new(missing), gone: AtomicBool::new(false) }
    }

    fn missing(&self) -> MutexGuard<'_, Missing> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are missing.
    pub fn left(&self) -> u64 {
        self.missing().ranges.values().map(|range| range.bytes).sum()
    }

    /// Whether the task has ended.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether nothing is missing.
    pub fn is_done(&self) -> bool {
        self.is_gone() || self.missing().ranges.is_empty()
    }

    /// What to bring next, unasked.
    pub fn next(&self) -> Option<Piece> {
        if self.is_gone() {
            return None;
        }
        self.missing().next()
    }

    /// A child has a copy of everything that is there, and misses the rest, too.
    pub fn fork(&self, uffd: Uffd) -> Space {
        let _alone = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let missing = Missing { flying: Vec::new(), ..self.missing().clone() };
        Space::new(uffd, self.source.clone(), missing)
    }

    /// An area has moved.
    pub fn moved(&self, from: u64, to: u64, bytes: u64) {
        let _alone = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let mut missing = self.missing();
        let taken = missing.take(from, from.saturating_add(bytes));
        for (address, piece) in taken {
            missing.ranges.insert(to.wrapping_add(address - from), piece);
        }
    }

    /// Pages are not wanted any more.
    pub fn removed(&self, from: u64, to: u64) {
        let _alone = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        self.missing().take(from, to);
    }

    /// Someone waits for a page.
    pub fn fault(&self, address: u64, buffer: &mut Vec<u8>) -> Result<()> {
        let page = address & !(PAGE - 1);
        while !self.is_gone() {
            let piece = self.missing().at(page, self.source.ahead());
            if let Some(piece) = piece {
                self.source.read(piece.image, piece.bytes, buffer)?;
                self.put(piece.image, buffer)?;
                // it may have been someone else who put it
                self.uffd.wake(page, PAGE);
                return Ok(());
            }
            let Put { done, errno } = {
                let _held = self.layout.read().unwrap_or_else(PoisonError::into_inner);
                if self.missing().at(page, PAGE).is_some() {
                    continue;
                }
                self.uffd.zero(page, PAGE)
            };
            match errno {
                _ if done > 0 => return Ok(()),
                Some(libc::EAGAIN) => std::thread::sleep(Duration::from_micros(50)),
                Some(libc::EEXIST) => {
                    self.uffd.wake(page, PAGE);
                    return Ok(());
                }
                Some(libc::ESRCH | libc::ENOSPC) => self.gone.store(true, Ordering::Release),
                // it is not there any more
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Brings a piece that nobody has asked for.
    pub fn bring(&self, piece: Piece, buffer: &mut Vec<u8>) -> Result<()> {
        let brought = self.source.read(piece.image, piece.bytes, buffer).and_then(|()| self.put(piece.image, buffer));
        self.missing().flying.retain(|other| *other != piece);
        brought
    }

    /// Puts pages where they belong now, as far as they are still missing.
    fn put(&self, image: u64, pages: &[u8]) -> Result<()> {
        let piece = Piece { image, bytes: pages.len() as u64 };
        while !self.is_gone() {
            let again = {
                let _held = self.layout.read().unwrap_or_else(PoisonError::into_inner);
                let parts = self.missing().find(piece);
                let mut again = false;
                for (address, part) in parts {
                    let from = usize::try_from(part.image - image).unwrap_or(0);
                    let to = from + usize::try_from(part.bytes).unwrap_or(0);
                    again |= !self.put_part(address, pages.get(from..to).unwrap_or_default())?;
                }
                again
            };
            if !again {
                break;
            }
            // an event waits to be heard
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Puts pages at an address; whether that is done with. The layout is held.
    fn put_part(&self, mut address: u64, mut pages: &[u8]) -> Result<bool> {
        const SIZE: usize = PAGE as usize;
        // areas may have been cut by now: then page by page
        let mut most = pages.len();
        while !pages.is_empty() {
            let now = &pages[..most.min(pages.len())];
            let Put { done, errno } = self.uffd.copy(address, now);
            let n = usize::try_from(done).unwrap_or(0).min(now.len());
            let n = match errno {
                _ if n > 0 => n,
                None => now.len(),
                Some(libc::EAGAIN) => return Ok(false),
                Some(libc::EEXIST | libc::ENOENT | libc::EINVAL) if now.len() > SIZE => {
                    most = SIZE;
                    continue;
                }
                Some(libc::EEXIST) => {
                    self.uffd.wake(address, PAGE);
                    SIZE
                }
                // it is not there any more
                Some(libc::ENOENT | libc::EINVAL) => SIZE,
                Some(libc::ESRCH | libc::ENOSPC) => {
                    self.gone.store(true, Ordering::Release);
                    return Ok(true);
                }
                Some(errno) => {
                    let source = std::io::Error::from_raw_os_error(errno);
                    return Err(Error::Sys { call: "ioctl(UFFDIO_COPY)", source });
                }
            };
            self.missing().take(address, address + n as u64);
            (address, pages) = (address + n as u64, &pages[n..]);
        }
        Ok(true)
    }

    /// What is missing will never come.
    pub fn poison(&self) {
        let _held = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        for (&address, piece) in &self.missing().ranges {
            let (mut at, end) = (address, address + piece.bytes);
            while at < end {
                let Put { done, errno } = self.uffd.poison(at, end - at);
                at += done.min(end - at);
                match errno {
                    None => break,
                    Some(libc::EEXIST) => at += PAGE,
                    Some(_) if done > 0 => {}
                    Some(_) => break,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(ranges: &[(u64, u64)]) -> Missing {
        let ranges = ranges.iter().map(|&(at, pages)| (at * PAGE, Piece { image: at * PAGE, bytes: pages * PAGE }));
        Missing { ranges: ranges.collect(), ..Missing::default() }
    }

    fn piece(image: u64, pages: u64) -> Piece {
        Piece { image: image * PAGE, bytes: pages * PAGE }
    }

    #[test]
    fn ranges_are_cut_and_moved() {
        let mut m = missing(&[(10, 10), (30, 5)]);
        assert_eq!(m.take(12 * PAGE, 14 * PAGE), [(12 * PAGE, piece(12, 2))]);
        assert_eq!(m.take(18 * PAGE, 32 * PAGE), [(18 * PAGE, piece(18, 2)), (30 * PAGE, piece(30, 2))]);
        let left: Vec<_> = m.ranges.iter().map(|(at, p)| (at / PAGE, p.image / PAGE, p.bytes / PAGE)).collect();
        assert_eq!(left, [(10, 10, 2), (14, 14, 4), (32, 32, 3)]);
        assert_eq!(m.at(13 * PAGE, PIECE), None);
        assert_eq!(m.at(15 * PAGE, 2 * PAGE), Some(piece(15, 2)));
        // what has moved is found by where it was
        for (at, p) in m.take(14 * PAGE, 18 * PAGE) {
            m.ranges.insert(at + 100 * PAGE, p);
        }
        assert_eq!(m.find(piece(13, 3)), [(114 * PAGE, piece(14, 2))]);
        assert_eq!(m.find(piece(32, 3)), [(32 * PAGE, piece(32, 3))]);
        assert_eq!(m.find(piece(0, 10)), []);
    }

    #[test]
    fn pieces_are_given_once() {
        let pages = PIECE / PAGE;
        let mut m = missing(&[(0, pages + 1), (1000, 3)]);
        let given: Vec<_> = std::iter::from_fn(|| m.next()).collect();
        assert_eq!(given, [piece(0, pages), piece(pages, 1), piece(1000, 3)]);
        m.flying.clear();
        assert_eq!(m.next(), Some(piece(0, pages)));
    }
}
