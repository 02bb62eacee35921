//! Which page of a memory is where.
//!
//! A pagemap is a list of runs of pages, by ascending address. The content of those that are present is in the pages
//! image of the same number, one run after another, without gaps; so where a run lies there follows from all before it.
//! A page can also be said to be in the parent: the checkpoint that this one builds on. [`PageMap`] is one checked pagemap,
//! [`PageChain`] is one and all of its parents, and [`PageMapWriter`] writes one.
//!
//! The number of pages moved from one field to another (`compat_nr_pages`, `nr_pages`), and flags came after
//! `in_parent`: both forms are read, the later is written.

use std::ops::Range;

use crate::error::{Error, Malformed, PagesFault, Result};
use crate::images::{ImageWriter, Images};
use crate::proto::{PagemapEntry, PagemapHead};
use crate::store::ReadAt;
use crate::table::{Id, ImageKind};

/// Flag: the content is in the parent.
pub const PE_PARENT: u32 = 1 << 0;
/// Flag: the page may be brought in when it is first touched.
pub const PE_LAZY: u32 = 1 << 1;
/// Flag: the content is in the pages image.
pub const PE_PRESENT: u32 = 1 << 2;

/// How many checkpoints may build on each other.
const LONGEST_CHAIN: usize = 1024;

/// Where the content of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the pages image, from this byte on.
    Pages(u64),
    /// In the parent.
    Parent,
    /// In no image: whoever serves lazy pages has it.
    Elsewhere,
}

/// Pages one after another, whose content lies one after another too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first page (in shared memory: its offset there).
    pub address: u64,
    /// How many they are.
    pub pages: u64,
    /// Where their content is.
    pub place: Place,
    /// Whether they may be brought in when they are first touched.
    pub lazy: bool,
}

/// A checked pagemap: its runs are ascending, do not overlap, and have their content where they say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageMap {
    pages_id: u32,
    page_size: u64,
    runs: Vec<PageRun>,
    content: u64,
}

impl PageMap {
    /// Checks a pagemap. `name` is for errors only; `pages_len` is how long the pages image is, if that is known.
    ///
    /// # Errors
    /// If an entry cannot be.
    pub fn new(
        name: &str,
        head: &PagemapHead,
        entries: &[PagemapEntry],
        page_size: u64,
        pages_len: Option<u64>,
    ) -> Result<Self> {
        let mut map = Self { pages_id: head.pages_id, page_size, runs: Vec::new(), content: 0 };
        let mut last = 0;
        for (place, entry) in entries.iter().enumerate() {
            let run = map.add(entry, &mut last, pages_len).map_err(|reason| Error::Malformed {
                image: name.to_owned(),
                entry: place + 1,
                offset: 0,
                source: Malformed::Pages { address: entry.vaddr, reason },
            })?;
            map.runs.push(run);
        }
        Ok(map)
    }

    /// Reads and checks a pagemap, against its pages image if there is one.
    ///
    /// # Errors
    /// If an image cannot be read, or is malformed, or an entry cannot be.
    pub fn read(images: &Images, kind: ImageKind, id: impl Into<Id>, page_size: u64) -> Result<Self> {
        let id = id.into();
        let (head, entries) = images.read_pagemap(kind, id)?;
        let pages_len = match images.open_raw(ImageKind::Pages, head.pages_id) {
            Ok(pages) => pages.len(),
            // Without an image, nothing can be in it.
            Err(error) if error.is_missing() => 0,
            Err(error) => return Err(error),
        };
        Self::new(&kind.file_name(id)?, &head, &entries, page_size, Some(pages_len))
    }

    fn add(
        &mut self,
        entry: &PagemapEntry,
        last: &mut u64,
        pages_len: Option<u64>,
    ) -> std::result::Result<PageRun, PagesFault> {
        if !self.page_size.is_power_of_two() || !(4096..=1 << 20).contains(&self.page_size) {
            return Err(PagesFault::PageSize);
        }
        let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        if pages == 0 {
            return Err(PagesFault::Empty);
        }
        let address = entry.vaddr;
        if !address.is_multiple_of(self.page_size) {
            return Err(PagesFault::Unaligned);
        }
        let bytes = pages.checked_mul(self.page_size).ok_or(PagesFault::Overflow)?;
        let end = address.checked_add(bytes).ok_or(PagesFault::Overflow)?;
        if address < *last {
            return Err(PagesFault::Overlap);
        }
        let flags = entry.flags.unwrap_or(if entry.in_parent.unwrap_or(false) { PE_PARENT } else { PE_PRESENT });
        if flags & !(PE_PARENT | PE_LAZY | PE_PRESENT) != 0 {
            return Err(PagesFault::Flags);
        }
        let place = match (flags & PE_PRESENT != 0, flags & PE_PARENT != 0, flags & PE_LAZY != 0) {
            (true, false, _) => {
                let begin = self.content;
                self.content = begin.checked_add(bytes).ok_or(PagesFault::Overflow)?;
                if pages_len.is_some_and(|len| self.content > len) {
                    return Err(PagesFault::PagesImage);
                }
                Place::Pages(begin)
            }
            (false, true, _) => Place::Parent,
            (false, false, true) => Place::Elsewhere,
            (true, true, _) | (false, false, false) => return Err(PagesFault::Flags),
        };
        *last = end;
        Ok(PageRun { address, pages, place, lazy: flags & PE_LAZY != 0 })
    }

    /// The number of the pages image.
    #[must_use]
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// The size of a page.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// All runs, by address.
    #[must_use]
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// How many bytes of the pages image belong to it.
    #[must_use]
    pub fn content(&self) -> u64 {
        self.content
    }

    /// The runs in a range of addresses, cut to it.
    pub fn in_range(&self, range: Range<u64>) -> impl Iterator<Item = PageRun> + '_ {
        let size = self.page_size;
        let first = self.runs.partition_point(|run| run.end(size) <= range.start);
        let after = self.runs.iter().skip(first).take_while({
            let end = range.end;
            move |run| run.address < end
        });
        after.filter_map(move |run| run.cut(&range, size))
    }
}

impl PageRun {
    /// The address after its last page.
    #[must_use]
    pub fn end(&self, page_size: u64) -> u64 {
        // A checked pagemap has no run that ends past the last address.
        self.address.saturating_add(self.bytes(page_size))
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self, page_size: u64) -> u64 {
        self.pages.saturating_mul(page_size)
    }

    /// The part of it in a range, which is widened to whole pages.
    fn cut(&self, range: &Range<u64>, page_size: u64) -> Option<Self> {
        let address = self.address.max(range.start & !(page_size - 1));
        let end = self.end(page_size).min(range.end.checked_next_multiple_of(page_size).unwrap_or(u64::MAX));
        let pages = end.checked_sub(address)? / page_size;
        let place = match self.place {
            Place::Pages(offset) => Place::Pages(offset + (address - self.address)),
            place => place,
        };
        (pages > 0).then_some(Self { address, pages, place, lazy: self.lazy })
    }
}

/// Pages with the place of their content in a chain of checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    /// Address of the first page.
    pub address: u64,
    /// How many they are.
    pub pages: u64,
    /// Which checkpoint has them: 0 is the last one, 1 the one it builds on, and so on.
    pub layer: usize,
    /// Where in that checkpoint's pages image; none if they are in no image.
    pub offset: Option<u64>,
    /// Whether they may be brought in when they are first touched.
    pub lazy: bool,
}

/// A pagemap and those of all checkpoints that it builds on.
pub struct PageChain {
    name: String,
    layers: Vec<Layer>,
}

struct Layer {
    map: PageMap,
    pages: Option<Box<dyn ReadAt>>,
}

impl PageChain {
    /// Opens a pagemap and, as long as there is a parent that has it too, that of the parent.
    ///
    /// # Errors
    /// If an image cannot be read or is malformed, or the checkpoints build on each other in a ring.
    pub fn open(images: &Images, kind: ImageKind, id: impl Into<Id>, page_size: u64) -> Result<Self> {
        let id = id.into();
        let name = kind.file_name(id)?;
        let mut layers = vec![Layer::open(images, kind, id, page_size)?];
        let mut next = images.parent()?;
        while let Some(images) = next {
            if layers.len() >= LONGEST_CHAIN {
                let source = std::io::Error::from(std::io::ErrorKind::TooManyLinks);
                return Err(Error::Io { image: name, operation: "follow the parents of", source });
            }
            if !images.exists(kind, id)? {
                break;
            }
            layers.push(Layer::open(&images, kind, id, page_size)?);
            next = images.parent()?;
        }
        Ok(Self { name, layers })
    }

    /// The pagemap of the last checkpoint.
    #[must_use]
    pub fn last(&self) -> &PageMap {
        // There always is a first layer; an empty pagemap would be as true.
        static EMPTY: PageMap = PageMap { pages_id: 0, page_size: 4096, runs: Vec::new(), content: 0 };
        self.layers.first().map_or(&EMPTY, |layer| &layer.map)
    }

    /// The pages image of a layer, if it has one.
    #[must_use]
    pub fn pages(&self, layer: usize) -> Option<&dyn ReadAt> {
        self.layers.get(layer).and_then(|layer| layer.pages.as_deref())
    }

    /// All pages, each where its content is.
    ///
    /// # Errors
    /// If a page is said to be in a parent, and none has it.
    pub fn located(&self) -> Result<Vec<Located>> {
        self.located_in(0..u64::MAX)
    }

    /// The pages in a range of addresses, each where its content is.
    ///
    /// # Errors
    /// If a page is said to be in a parent, and none has it.
    pub fn located_in(&self, range: Range<u64>) -> Result<Vec<Located>> {
        let mut located = Vec::new();
        for run in self.last().in_range(range) {
            self.locate(0, run, &mut located)?;
        }
        Ok(located)
    }

    fn locate(&self, layer: usize, run: PageRun, located: &mut Vec<Located>) -> Result<()> {
        let size = self.last().page_size;
        let found = |offset| Located { address: run.address, pages: run.pages, layer, offset, lazy: run.lazy };
        match run.place {
            Place::Pages(offset) => located.push(found(Some(offset))),
            Place::Elsewhere => located.push(found(None)),
            Place::Parent => {
                let missing = |address| Error::Malformed {
                    image: self.name.clone(),
                    entry: 0,
                    offset: 0,
                    source: Malformed::Pages { address, reason: PagesFault::NoParent },
                };
                let mut at = run.address;
                let parent = self.layers.get(layer + 1).ok_or_else(|| missing(at))?;
                for part in parent.map.in_range(run.address..run.end(size)) {
                    if part.address != at {
                        return Err(missing(at));
                    }
                    at = part.end(size);
                    // As deep as the chain is long.
                    self.locate(layer + 1, part, located)?;
                }
                if at != run.end(size) {
                    return Err(missing(at));
                }
            }
        }
        Ok(())
    }
}

impl Layer {
    fn open(images: &Images, kind: ImageKind, id: Id, page_size: u64) -> Result<Self> {
        let map = PageMap::read(images, kind, id, page_size)?;
        let pages = match images.open_raw(ImageKind::Pages, map.pages_id) {
            Ok(pages) => Some(pages),
            Err(error) if error.is_missing() => None,
            Err(error) => return Err(error),
        };
        Ok(Self { map, pages })
    }
}

/// What a run of pages is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// In the pages image.
    Present,
    /// In the pages image, and may be brought in when first touched.
    PresentLazy,
    /// In the parent.
    Parent,
    /// With whoever serves lazy pages.
    Lazy,
}

impl PageState {
    fn flags(self) -> u32 {
        match self {
            Self::Present => PE_PRESENT,
            Self::PresentLazy => PE_PRESENT | PE_LAZY,
            Self::Parent => PE_PARENT,
            Self::Lazy => PE_LAZY,
        }
    }
}

/// Writes a pagemap. Runs that continue the one before become one with it.
#[must_use = "an image is complete only when it is finished"]
pub struct PageMapWriter {
    image: ImageWriter,
    name: String,
    page_size: u64,
    entries: usize,
    end: u64,
    last: Option<(PagemapEntry, PageState)>,
}

impl PageMapWriter {
    /// Begins a pagemap whose content goes to the pages image of number `pages_id`.
    ///
    /// # Errors
    /// If the image cannot be created.
    pub fn create(images: &Images, kind: ImageKind, id: impl Into<Id>, pages_id: u32, page_size: u64) -> Result<Self> {
        let id = id.into();
        let mut image = images.create(kind, id)?;
        image.write(&PagemapHead { pages_id })?;
        Ok(Self { image, name: kind.file_name(id)?, page_size, entries: 0, end: 0, last: None })
    }

    /// Adds pages. The content of those that are present goes to the pages image in the same order.
    ///
    /// # Errors
    /// If they are not after those before, or the image cannot be written.
    pub fn add(&mut self, address: u64, pages: u64, state: PageState) -> Result<()> {
        let fault = |reason| Error::Malformed {
            image: self.name.clone(),
            entry: self.entries + 1,
            offset: 0,
            source: Malformed::Pages { address, reason },
        };
        if pages == 0 {
            return Ok(());
        }
        if !address.is_multiple_of(self.page_size) {
            return Err(fault(PagesFault::Unaligned));
        }
        if address < self.end {
            return Err(fault(PagesFault::Overlap));
        }
        let bytes = pages.checked_mul(self.page_size);
        let end = bytes.and_then(|bytes| address.checked_add(bytes)).ok_or_else(|| fault(PagesFault::Overflow))?;
        match &mut self.last {
            Some((entry, same)) if *same == state && address == self.end => {
                entry.nr_pages = entry.nr_pages.map(|before| before.saturating_add(pages));
            }
            _ => {
                self.put_last()?;
                let entry = PagemapEntry {
                    vaddr: address,
                    compat_nr_pages: 0,
                    in_parent: None,
                    flags: Some(state.flags()),
                    nr_pages: Some(pages),
                };
                self.last = Some((entry, state));
            }
        }
        self.end = end;
        Ok(())
    }

    fn put_last(&mut self) -> Result<()> {
        if let Some((entry, _)) = self.last.take() {
            self.image.write(&entry)?;
            self.entries += 1;
        }
        Ok(())
    }

    /// Ends the pagemap.
    ///
    /// # Errors
    /// If it cannot be written as a whole.
    pub fn finish(mut self) -> Result<()> {
        self.put_last()?;
        self.image.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryStore, Store};

    const SIZE: u64 = 4096;

    fn entry(vaddr: u64, pages: u64, flags: u32) -> PagemapEntry {
        PagemapEntry { vaddr, compat_nr_pages: 0, in_parent: None, flags: Some(flags), nr_pages: Some(pages) }
    }

    fn fault(entries: &[PagemapEntry], len: u64) -> PagesFault {
        match PageMap::new("test", &PagemapHead { pages_id: 1 }, entries, SIZE, Some(len)).unwrap_err() {
            Error::Malformed { source: Malformed::Pages { reason, .. }, .. } => reason,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn lies_are_found() {
        let len = 16 * SIZE;
        assert_eq!(fault(&[entry(0x1000, 0, 4)], len), PagesFault::Empty);
        assert_eq!(fault(&[entry(0x1001, 1, 4)], len), PagesFault::Unaligned);
        assert_eq!(fault(&[entry(0x1000, u64::MAX, 4)], len), PagesFault::Overflow);
        assert_eq!(fault(&[entry(0x1000, 1 << 52, 1)], len), PagesFault::Overflow);
        assert_eq!(fault(&[entry(0x2000, 1, 4), entry(0x1000, 1, 4)], len), PagesFault::Overlap);
        assert_eq!(fault(&[entry(0x1000, 2, 4), entry(0x2000, 1, 4)], len), PagesFault::Overlap);
        assert_eq!(fault(&[entry(0x1000, 17, 4)], len), PagesFault::PagesImage);
        assert_eq!(fault(&[entry(0x1000, 1, 5)], len), PagesFault::Flags);
        assert_eq!(fault(&[entry(0x1000, 1, 0)], len), PagesFault::Flags);
        assert_eq!(fault(&[entry(0x1000, 1, 12)], len), PagesFault::Flags);
    }

    #[test]
    fn both_forms_are_read() {
        let old = |vaddr, in_parent| PagemapEntry { vaddr, compat_nr_pages: 2, in_parent, flags: None, nr_pages: None };
        let map = PageMap::new(
            "test",
            &PagemapHead { pages_id: 1 },
            &[
                old(0x1000, None),
                old(0x3000, Some(true)),
                entry(0x8000, 1, PE_PRESENT | PE_LAZY),
                entry(0x9000, 1, PE_LAZY),
            ],
            SIZE,
            None,
        )
        .unwrap();
        let places: Vec<_> = map.runs().iter().map(|run| (run.pages, run.place, run.lazy)).collect();
        assert_eq!(
            places,
            [
                (2, Place::Pages(0), false),
                (2, Place::Parent, false),
                (1, Place::Pages(0x2000), true),
                (1, Place::Elsewhere, true)
            ]
        );
        let cut: Vec<_> = map.in_range(0x2000..0x3001).collect();
        assert_eq!(cut.len(), 2);
        assert_eq!(cut[0], PageRun { address: 0x2000, pages: 1, place: Place::Pages(0x1000), lazy: false });
        assert_eq!(cut[1], PageRun { address: 0x3000, pages: 1, place: Place::Parent, lazy: false });
        assert_eq!(map.in_range(0x5000..0x8000).count(), 0);
    }

    #[test]
    fn written_as_read() {
        let store = MemoryStore::new();
        store.insert("pages-5.img", vec![0; 4 * 4096]).unwrap();
        let images = Images::new(store.clone());
        let mut out = PageMapWriter::create(&images, ImageKind::Pagemap, 7_u32, 5, SIZE).unwrap();
        out.add(0x1000, 1, PageState::Present).unwrap();
        out.add(0x2000, 2, PageState::Present).unwrap();
        out.add(0x4000, 1, PageState::Parent).unwrap();
        out.add(0x5000, 0, PageState::Parent).unwrap();
        out.add(0x6000, 1, PageState::Present).unwrap();
        assert!(out.add(0x6000, 1, PageState::Present).is_err());
        out.finish().unwrap();
        let map = PageMap::read(&images, ImageKind::Pagemap, 7_u32, SIZE).unwrap();
        assert_eq!((map.runs().len(), map.content(), map.pages_id()), (3, 4 * SIZE, 5));
        store.remove("pages-5.img").unwrap();
        assert!(PageMap::read(&images, ImageKind::Pagemap, 7_u32, SIZE).is_err());
    }

    #[test]
    fn pages_are_found_in_parents() {
        let base = std::env::temp_dir().join(format!("standstill-images-chain-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&base);
        let make = |name: &str, runs: &[(u64, u64, PageState)]| {
            let folder = base.join(name);
            std::fs::create_dir_all(&folder).unwrap();
            let images = Images::open_folder(&folder).unwrap();
            let mut out = PageMapWriter::create(&images, ImageKind::Pagemap, 7_u32, 1, SIZE).unwrap();
            let mut content = 0;
            for (address, pages, state) in runs {
                out.add(*address, *pages, *state).unwrap();
                content += if *state == PageState::Present { *pages } else { 0 };
            }
            out.finish().unwrap();
            std::fs::write(folder.join("pages-1.img"), vec![0; usize::try_from(content * SIZE).unwrap()]).unwrap();
        };
        make("1", &[(0x1000, 4, PageState::Present), (0x8000, 1, PageState::Present)]);
        make("2", &[(0x1000, 1, PageState::Parent), (0x2000, 1, PageState::Present), (0x3000, 2, PageState::Parent)]);
        make("3", &[(0x1000, 4, PageState::Parent), (0x9000, 1, PageState::Present)]);
        let link = |name: &str, parent: &str| {
            let folder = crate::store::FolderStore::open(base.join(name)).unwrap();
            folder.set_parent(Some(std::path::Path::new(parent))).unwrap();
        };
        link("2", "../1");
        link("3", "../2");
        let open = |name: &str| {
            let images = Images::open_folder(base.join(name)).unwrap();
            PageChain::open(&images, ImageKind::Pagemap, 7_u32, SIZE)
        };
        let found: Vec<_> =
            open("3").unwrap().located().unwrap().iter().map(|l| (l.address, l.layer, l.offset)).collect();
        assert_eq!(
            found,
            [(0x1000, 2, Some(0)), (0x2000, 1, Some(0)), (0x3000, 2, Some(0x2000)), (0x9000, 0, Some(0))]
        );
        // A ring of parents.
        link("1", "../3");
        assert!(matches!(open("3"), Err(Error::Io { .. })));
        // A parent that lacks the page.
        link("3", "../1");
        std::fs::remove_file(base.join("1/parent")).unwrap();
        make("3", &[(0x4000, 2, PageState::Parent)]);
        let error = open("3").unwrap().located().unwrap_err();
        assert!(matches!(
            error,
            Error::Malformed { source: Malformed::Pages { address: 0x5000, reason: PagesFault::NoParent }, .. }
        ));
        std::fs::remove_dir_all(&base).unwrap();
    }
}
