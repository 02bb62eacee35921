//! Which page of a memory is where.
//!
//! A pagemap is a list of runs of pages, by ascending address. The content of those that are present is in the pages
//! image of the same number, one run after another, without gaps; so where a run lies there follows from all before it.
//! A page can also be said to be in the parent: the checkpoint that this one builds on. [`PageMap`] is one checked pagemap,
//! [`PageChain`] is one and all of its parents, and [`PageMapWriter`] writes one.
//!
//! Content can be packed in blocks ([`packed`]); the pages image then holds blocks and, at the start of a page each, runs that
//! are as they were.
//!
//! The number of pages moved from one field to another (`compat_nr_pages`, `nr_pages`), and flags came after
//! `in_parent`: both forms are read, the later is written.

use std::ops::Range;

use crate::error::{Error, Malformed, PagesFault, Result};
use crate::images::{ImageWriter, Images};
use crate::proto::{PagemapEntry, PagemapHead};
use crate::store::ReadAt;
use crate::table::{Id, ImageKind};

pub mod packed;

use packed::{Blocks, PackedPages};

/// Flag: the content is in the parent.
pub const PE_PARENT: u32 = 1 << 0;
/// Flag: the page may be brought in when it is first touched.
pub const PE_LAZY: u32 = 1 << 1;
/// Flag: the content is in the pages image.
pub const PE_PRESENT: u32 = 1 << 2;

/// Flag: the content begins at the next page of the pages image.
pub const PE_PAYLOAD_ALIGNED: u32 = 1 << 3;

/// How many checkpoints may build on each other.
const LONGEST_CHAIN: usize = 1024;

/// Where the content of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the pages image, from this byte on.
    Pages(u64),
    /// In blocks, from this byte on of what all of them unpack to.
    Packed(u64),
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
    blocks: Blocks,
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
        let mut map =
            Self { pages_id: head.pages_id, page_size, runs: Vec::new(), content: 0, blocks: Blocks::default() };
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
        let image = images.open(kind, id)?;
        let (head, entries) = image.reader()?.pagemap()?;
        let pages_len = match images.open_raw(ImageKind::Pages, head.pages_id) {
            Ok(pages) => pages.len(),
            // Without an image, nothing can be in it.
            Err(error) if error.is_missing() => 0,
            Err(error) => return Err(error),
        };
        Self::new(image.name(), &head, &entries, page_size, Some(pages_len)).map_err(|error| match error {
            Error::Malformed { image: name, entry, source, .. } => {
                let offset = image.reader().and_then(|mut reader| reader.offset_of(entry)).unwrap_or(0);
                Error::Malformed { image: name, entry, offset, source }
            }
            other => other,
        })
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
        if flags & !(PE_PARENT | PE_LAZY | PE_PRESENT | PE_PAYLOAD_ALIGNED) != 0 {
            return Err(PagesFault::Flags);
        }
        let present = flags & PE_PRESENT != 0;
        if !present && flags & PE_PAYLOAD_ALIGNED != 0 {
            return Err(PagesFault::Flags);
        }
        if !present && entry.blocks.is_some() {
            return Err(PagesFault::Blocks);
        }
        let place = match (present, flags & PE_PARENT != 0, flags & PE_LAZY != 0) {
            (true, false, _) => {
                let mut begin = self.content;
                if flags & PE_PAYLOAD_ALIGNED != 0 {
                    begin = begin.checked_next_multiple_of(self.page_size).ok_or(PagesFault::Overflow)?;
                }
                let (place, payload) = match &entry.blocks {
                    None => (Place::Pages(begin), bytes),
                    Some(blocks) => {
                        let unpacked = self.blocks.len();
                        (Place::Packed(unpacked), self.blocks.add(blocks, pages, self.page_size, begin)?)
                    }
                };
                self.content = begin.checked_add(payload).ok_or(PagesFault::Overflow)?;
                if pages_len.is_some_and(|len| self.content > len) {
                    return Err(PagesFault::PagesImage);
                }
                place
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

    /// The blocks that its packed runs are in.
    #[must_use]
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
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
            Place::Packed(offset) => Place::Packed(offset + (address - self.address)),
            place @ (Place::Parent | Place::Elsewhere) => place,
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
    /// Which source of the chain has them ([`PageChain::pages`]): 0 is the pages image of the last checkpoint, 1 that of
    /// the one it builds on, and so on; what the blocks of these unpack to comes after all of them.
    pub layer: usize,
    /// Where in that source; none if they are in no image.
    pub offset: Option<u64>,
    /// They are known to be zeros, which is not stored.
    pub zero: bool,
    /// Whether they may be brought in when they are first touched.
    pub lazy: bool,
}

/// A pagemap and those of all checkpoints that it builds on.
pub struct PageChain {
    name: String,
    layers: Vec<Layer>,
    sources: Vec<Source>,
}

struct Layer {
    map: PageMap,
    /// The source that its blocks unpack to.
    unpacked: Option<usize>,
}

enum Source {
    None,
    Pages(Box<dyn ReadAt>),
    Packed(PackedPages),
}

impl PageChain {
    /// Opens a pagemap and, as long as there is a parent that has it too, that of the parent.
    ///
    /// # Errors
    /// If an image cannot be read or is malformed, or the checkpoints build on each other in a ring.
    pub fn open(images: &Images, kind: ImageKind, id: impl Into<Id>, page_size: u64) -> Result<Self> {
        let id = id.into();
        let mut chain = Self { name: kind.file_name(id)?, layers: Vec::new(), sources: Vec::new() };
        let mut packed = Vec::new();
        packed.extend(chain.push(images, kind, id, page_size)?);
        let mut next = images.parent()?;
        while let Some(images) = next {
            if chain.layers.len() >= LONGEST_CHAIN {
                let source = std::io::Error::from(std::io::ErrorKind::TooManyLinks);
                return Err(Error::Io { image: chain.name, operation: "follow the parents of", source });
            }
            if !images.exists(kind, id)? {
                break;
            }
            packed.extend(chain.push(&images, kind, id, page_size)?);
            next = images.parent()?;
        }
        for (layer, pages) in packed {
            let source = chain.sources.len();
            chain.sources.push(Source::Packed(pages));
            if let Some(layer) = chain.layers.get_mut(layer) {
                layer.unpacked = Some(source);
            }
        }
        Ok(chain)
    }

    /// Adds one more checkpoint; returns its number and what its blocks unpack to, if it has any.
    fn push(
        &mut self,
        images: &Images,
        kind: ImageKind,
        id: Id,
        page_size: u64,
    ) -> Result<Option<(usize, PackedPages)>> {
        let map = PageMap::read(images, kind, id, page_size)?;
        let open = || images.open_raw(ImageKind::Pages, map.pages_id);
        self.sources.push(match open() {
            Ok(pages) => Source::Pages(pages),
            Err(error) if error.is_missing() => Source::None,
            Err(error) => return Err(error),
        });
        let packed = match map.blocks.len() {
            0 => None,
            _ => {
                let name = ImageKind::Pages.file_name(map.pages_id)?;
                let pages = match open() {
                    // a map of zeros alone needs no image
                    Err(error) if error.is_missing() => Box::new(bytes::Bytes::new()),
                    pages => pages?,
                };
                Some((self.layers.len(), PackedPages::new(name, pages, map.blocks.clone())))
            }
        };
        self.layers.push(Layer { map, unpacked: None });
        Ok(packed)
    }

    /// The pagemap of the last checkpoint.
    #[must_use]
    pub fn last(&self) -> &PageMap {
        // There always is a first layer; an empty pagemap would be as true.
        static EMPTY: PageMap =
            PageMap { pages_id: 0, page_size: 4096, runs: Vec::new(), content: 0, blocks: Blocks::EMPTY };
        self.layers.first().map_or(&EMPTY, |layer| &layer.map)
    }

    /// A source of pages, if it is there: the pages image of a layer, or what its blocks unpack to.
    #[must_use]
    pub fn pages(&self, source: usize) -> Option<&dyn ReadAt> {
        match self.sources.get(source)? {
            Source::None => None,
            Source::Pages(pages) => Some(pages.as_ref()),
            Source::Packed(pages) => Some(pages),
        }
    }

    /// How many sources there are.
    #[must_use]
    pub fn sources(&self) -> usize {
        self.sources.len()
    }

    /// A source that is packed.
    #[must_use]
    pub fn packed(&self, source: usize) -> Option<&PackedPages> {
        match self.sources.get(source)? {
            Source::None | Source::Pages(_) => None,
            Source::Packed(pages) => Some(pages),
        }
    }

    /// Puts what a packed source unpacks to in its place.
    pub fn unpacked(&mut self, source: usize, pages: Box<dyn ReadAt>) {
        if let Some(packed @ Source::Packed(_)) = self.sources.get_mut(source) {
            *packed = Source::Pages(pages);
        }
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
        let found =
            |offset| Located { address: run.address, pages: run.pages, layer, offset, zero: false, lazy: run.lazy };
        match run.place {
            Place::Packed(offset) => {
                let Some(Layer { map, unpacked: Some(source) }) = self.layers.get(layer) else { return Ok(()) };
                for (at, bytes, zero) in map.blocks.stretches(offset..offset + run.bytes(size)) {
                    let address = run.address + (at - offset);
                    located.push(Located { address, pages: bytes / size, layer: *source, zero, ..found(Some(at)) });
                }
            }
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
                    blocks: None,
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
mod tests;
