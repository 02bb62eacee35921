//! What a child has in common with its parent: pages that both images have at the same address with the same bytes were
//! shared copy-on-write, and come back so ([`super::Inherited`]).

use std::collections::HashMap;

use standstill_images::proto::VmaEntry;
use standstill_images::ReadAt;

use super::{has_file, Content, Figures, Memory};
use crate::error::{At, Call, Error, Place, Result};
use crate::memory::PAGE;

/// What an area of a child has in common with its parent's.
#[derive(Debug, Default)]
pub struct Compared {
    pub(super) areas: HashMap<u64, Difference>,
    pub(super) figures: Figures,
}

/// Where an area that is kept differs from the parent's.
#[derive(Debug)]
pub(super) struct Difference {
    /// Pages to read because they differ.
    pub(super) reads: Vec<Content>,
    /// Pages that the parent has alone.
    pub(super) drops: Vec<(u64, u64)>,
}

/// Bytes of images that are read and compared together: a call for each page would cost more than the bytes of the page.
const TOGETHER: u64 = 64 << 10;
/// Most pages that differ do so in their first bytes.
pub(super) const HEAD: usize = 64;
/// Of more pages than these the heads are not kept.
const MOST_HEADS: u64 = 1 << 16;

/// The first bytes of each page of a task, by address.
pub(super) type Heads = HashMap<u64, [u8; HEAD]>;

/// Compares pages of images. Where the one before differed, the first bytes of the next are looked at first: a page that is
/// not read costs little. Where it did not, the next ones are read in one piece.
#[derive(Default)]
struct Comparison {
    a: Vec<u8>,
    b: Vec<u8>,
    differed: bool,
}

impl Comparison {
    /// Compares the next pages of two images, of which there are `bytes` bytes: how many bytes were compared, and whether each
    /// page is the same. `head` is that of the first page of `y`.
    fn next(
        &mut self,
        (x, at_x): (&dyn ReadAt, u64),
        (y, at_y): (&dyn ReadAt, u64),
        head: Option<&[u8; HEAD]>,
        bytes: u64,
    ) -> std::io::Result<(u64, Vec<bool>)> {
        let mut bytes = bytes.min(TOGETHER);
        if self.differed {
            bytes = PAGE;
            let (mut a, mut b) = ([0; HEAD], [0; HEAD]);
            x.read_exact_at(&mut a, at_x)?;
            match head {
                Some(head) => b = *head,
                None => y.read_exact_at(&mut b, at_y)?,
            }
            if a != b {
                return Ok((PAGE, vec![false]));
            }
        }
        for (room, source, at) in [(&mut self.a, x, at_x), (&mut self.b, y, at_y)] {
            room.resize(usize::try_from(bytes).unwrap_or(0), 0);
            source.read_exact_at(room, at)?;
        }
        let pages = |room| <[u8]>::chunks_exact(room, PAGE as usize);
        let same: Vec<bool> = pages(&self.a).zip(pages(&self.b)).map(|(a, b)| a == b).collect();
        self.differed = same.last() == Some(&false);
        Ok((bytes, same))
    }
}

/// Goes through runs of pages.
struct Cursor<'a> {
    now: Option<Content>,
    rest: std::slice::Iter<'a, Content>,
}

impl<'a> Cursor<'a> {
    fn new(runs: &'a [Content]) -> Cursor<'a> {
        let mut rest = runs.iter();
        Cursor { now: rest.next().copied(), rest }
    }

    /// Goes on by so many bytes of the run that it stands in.
    fn skip(&mut self, bytes: u64) {
        let Some(run) = &mut self.now else { return };
        (run.address, run.offset, run.bytes) = (run.address + bytes, run.offset + bytes, run.bytes - bytes);
        if run.bytes == 0 {
            self.now = self.rest.next().copied();
        }
    }
}

impl Memory {
    /// The heads of its pages, if they can be had: all children of a task are compared with the same.
    fn heads(&self) -> Option<&Heads> {
        let read = || {
            let pages = self.content.iter().map(|c| c.bytes / PAGE).sum::<u64>();
            let mut heads = Heads::with_capacity(usize::try_from(pages).ok().filter(|_| pages <= MOST_HEADS)?);
            for c in &self.content {
                let source = self.chain.pages(c.layer)?;
                for at in (0..c.bytes).step_by(PAGE as usize) {
                    let mut head = [0; HEAD];
                    source.read_exact_at(&mut head, c.offset + at).ok()?;
                    heads.insert(c.address + at, head);
                }
            }
            Some(heads)
        };
        self.heads.get_or_init(read).as_ref()
    }

    /// Compares the areas that this task can have from its parent with the parent's.
    pub fn compare(&self, parent: &Memory) -> Result<Compared> {
        let mut compared = Compared::default();
        if self.mm.exe_file_id != parent.mm.exe_file_id {
            return Ok(compared);
        }
        let theirs: HashMap<u64, &VmaEntry> = parent.private().map(|e| (e.start, e)).collect();
        for e in self.private() {
            if !theirs.get(&e.start).is_some_and(|p| same_area(p, e)) {
                continue;
            }
            let own: Vec<Content> = self.content(e.start, e.end).collect();
            let of_parent: Vec<Content> = parent.content(e.start, e.end).collect();
            let mut here = Figures::default();
            let difference = self.differences(parent, &of_parent, &own, &mut here).at(Place::Area(e.start, e.end))?;
            compared.figures.compared += here.compared;
            compared.figures.shared += here.shared;
            if here.shared != 0 || of_parent.is_empty() {
                compared.areas.insert(e.start, difference);
            }
        }
        Ok(compared)
    }

    /// Which pages of an area must be read because they differ from the parent's, and which the parent has alone.
    fn differences(
        &self,
        parent: &Memory,
        theirs: &[Content],
        content: &[Content],
        figures: &mut Figures,
    ) -> Result<Difference> {
        let mut reads: Vec<Content> = Vec::new();
        let mut drops: Vec<(u64, u64)> = Vec::new();
        let mut pages = Comparison::default();
        let heads = parent.heads();
        let (mut own, mut other) = (Cursor::new(content), Cursor::new(theirs));
        loop {
            match (own.now, other.now) {
                (None, None) => break,
                (Some(o), t) if t.is_none_or(|t| o.address < t.address) => {
                    let alone = t.map_or(o.bytes, |t| o.bytes.min(t.address - o.address));
                    push_run(&mut reads, Content { bytes: alone, ..o });
                    own.skip(alone);
                }
                (o, Some(t)) if o.is_none_or(|o| t.address < o.address) => {
                    let alone = o.map_or(t.bytes, |o| t.bytes.min(o.address - t.address));
                    match drops.last_mut() {
                        Some((start, bytes)) if *start + *bytes == t.address => *bytes += alone,
                        _ => drops.push((t.address, alone)),
                    }
                    other.skip(alone);
                }
                (Some(o), Some(t)) => {
                    let (Some(x), Some(y)) = (self.chain.pages(o.layer), parent.chain.pages(t.layer)) else {
                        return Err(Error::Gone);
                    };
                    let head = heads.and_then(|heads| heads.get(&t.address));
                    let (both, said) =
                        pages.next((x, o.offset), (y, t.offset), head, o.bytes.min(t.bytes)).call("read(pages)")?;
                    for (at, equal) in (0..).step_by(PAGE as usize).zip(said) {
                        figures.compared += 1;
                        if equal {
                            figures.shared += 1;
                        } else {
                            let (address, offset) = (o.address + at, o.offset + at);
                            push_run(&mut reads, Content { address, bytes: PAGE, offset, ..o });
                        }
                    }
                    own.skip(both);
                    other.skip(both);
                }
                (Some(_), None) | (None, Some(_)) => break,
            }
        }
        Ok(Difference { reads, drops })
    }
}

pub(super) fn same_area(a: &VmaEntry, b: &VmaEntry) -> bool {
    const KEEP: u32 = (libc::MAP_GROWSDOWN | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB) as u32;
    (a.start, a.end, a.flags & KEEP, a.pgoff) == (b.start, b.end, b.flags & KEEP, b.pgoff)
        && a.flags & libc::MAP_HUGETLB as u32 == 0
        && has_file(a) == has_file(b)
        && (!has_file(a) || a.shmid == b.shmid)
}

fn push_run(runs: &mut Vec<Content>, run: Content) {
    match runs.last_mut() {
        Some(r) if r.address + r.bytes == run.address && r.layer == run.layer && r.offset + r.bytes == run.offset => {
            r.bytes += run.bytes
        }
        _ => runs.push(run),
    }
}
