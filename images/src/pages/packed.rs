//! Pages that are packed with LZ4, in the form that CRIU's development branch gives them (images of version 3).
//!
//! An entry of a pagemap is cut into blocks of the same number of pages, the last one as long as what is left. The entry has
//! a list of the blocks' sizes in the pages image: 0 is a block of zeros, which is stored nowhere; the size of its pages is a
//! block that did not shrink and is stored as it is; any other is one raw LZ4 block (no frame, no size before it). So each
//! page is found without unpacking what is before it.
//!
//! [`Blocks`] are the checked blocks of a pagemap. What all of them unpack to, one after another, is [`PackedPages`]: it can
//! be read like a pages image, in any parts. [`pack`] makes a block, [`PackedWriter`] the pagemap of packed pages. No size is
//! believed: a list of sizes is as long as its image, and what a block unpacks to has 4 MiB at most.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Malformed, PagesFault, Result};
use crate::images::{ImageWriter, Images};
use crate::proto::{PagemapBlocks, PagemapEntry, PagemapHead};
use crate::store::ReadAt;
use crate::table::{Id, ImageKind};

use super::{PageState, PE_PAYLOAD_ALIGNED};

/// What a block unpacks to has at most as many bytes.
pub const LARGEST_BLOCK: u64 = 4 << 20;

/// One block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Where it begins in what all blocks unpack to.
    pub at: u64,
    /// How long it is there.
    pub bytes: u32,
    /// Where it begins in the pages image.
    pub offset: u64,
    /// How long it is there; 0: it is zeros, and not there.
    pub size: u32,
}

/// The checked blocks of a pagemap, in order and without gaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blocks {
    list: Vec<Block>,
}

impl Blocks {
    pub(super) const EMPTY: Self = Self { list: Vec::new() };

    /// How many bytes they unpack to.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.list.last().map_or(0, |block| block.at + u64::from(block.bytes))
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> &[Block] {
        &self.list
    }

    /// Checks and adds those of an entry whose content begins at `offset`; returns how long that is.
    pub(super) fn add(
        &mut self,
        blocks: &PagemapBlocks,
        pages: u64,
        page_size: u64,
        offset: u64,
    ) -> std::result::Result<u64, PagesFault> {
        let pages_per_block = u64::from(blocks.pages_per_block);
        if pages_per_block == 0 || pages_per_block > LARGEST_BLOCK / page_size {
            return Err(PagesFault::Blocks);
        }
        if pages.div_ceil(pages_per_block) != blocks.block_sizes.len() as u64 {
            return Err(PagesFault::BlockCount);
        }
        let mut at = self.len();
        // what they unpack to must have an end
        at.checked_add(pages.checked_mul(page_size).ok_or(PagesFault::Overflow)?).ok_or(PagesFault::Overflow)?;
        let mut left = pages;
        let mut sum = 0_u64;
        for &size in &blocks.block_sizes {
            let bytes = left.min(pages_per_block) * page_size;
            left -= left.min(pages_per_block);
            let bytes = u32::try_from(bytes).map_err(|_| PagesFault::Blocks)?;
            if size > bytes {
                return Err(PagesFault::BlockSize);
            }
            let begin = offset.checked_add(sum).ok_or(PagesFault::Overflow)?;
            self.list.push(Block { at, bytes, offset: begin, size });
            at += u64::from(bytes);
            sum = sum.checked_add(size.into()).ok_or(PagesFault::Overflow)?;
        }
        if sum != blocks.total_payload_size {
            return Err(PagesFault::BlockSum);
        }
        Ok(sum)
    }

    /// The number of the block with this byte of what they unpack to.
    fn find(&self, at: u64) -> usize {
        self.list.partition_point(|block| block.at + u64::from(block.bytes) <= at)
    }

    /// A range of what they unpack to, as pieces that are zeros and pieces that are not: begin, length, whether zeros.
    pub(super) fn stretches(&self, range: Range<u64>) -> Vec<(u64, u64, bool)> {
        let mut stretches: Vec<(u64, u64, bool)> = Vec::new();
        for block in self.list.iter().skip(self.find(range.start)).take_while(|block| block.at < range.end) {
            let begin = block.at.max(range.start);
            let bytes = (block.at + u64::from(block.bytes)).min(range.end) - begin;
            match stretches.last_mut() {
                Some((_, before, zero)) if *zero == (block.size == 0) => *before += bytes,
                _ => stretches.push((begin, bytes, block.size == 0)),
            }
        }
        stretches
    }
}

/// What the blocks of a pages image unpack to.
pub struct PackedPages {
    name: String,
    pages: Box<dyn ReadAt>,
    blocks: Blocks,
    /// The block that was unpacked last for a part of it: who reads page by page reads on in it.
    last: Mutex<Option<(usize, Vec<u8>)>>,
}

impl PackedPages {
    /// The blocks of an image; `name` is for errors only.
    #[must_use]
    pub fn new(name: String, pages: Box<dyn ReadAt>, blocks: Blocks) -> Self {
        Self { name, pages, blocks, last: Mutex::new(None) }
    }

    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks.list
    }

    /// Unpacks a block into `into`, which must be as long as its pages.
    ///
    /// # Errors
    /// If there is no such block, or it cannot be read, or is not what it should be.
    pub fn unpack(&self, number: usize, into: &mut [u8]) -> io::Result<()> {
        let block = self.blocks.list.get(number).ok_or(io::ErrorKind::UnexpectedEof)?;
        if into.len() as u64 != u64::from(block.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match block.size {
            0 => into.fill(0),
            size if size == block.bytes => self.pages.read_exact_at(into, block.offset)?,
            // checked to be smaller than its pages, which are 4 MiB at most
            size => {
                let mut packed = vec![0; usize::try_from(size).unwrap_or(0)];
                self.pages.read_exact_at(&mut packed, block.offset)?;
                if lz4_flex::block::decompress_into(&packed, into).ok() != Some(into.len()) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, self.fault(number, block)));
                }
            }
        }
        Ok(())
    }

    fn fault(&self, number: usize, block: &Block) -> Error {
        let source = Malformed::Packed { size: block.size, pages_size: block.bytes };
        Error::Malformed { image: self.name.clone(), entry: number, offset: block.offset, source }
    }

    /// A part of a block.
    fn part(&self, number: usize, bytes: usize, from: usize, into: &mut [u8]) -> io::Result<()> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|(kept, _)| *kept != number) {
            let (_, mut buffer) = last.take().unwrap_or_default();
            buffer.resize(bytes, 0);
            self.unpack(number, &mut buffer)?;
            *last = Some((number, buffer));
        }
        let part = last.as_ref().and_then(|(_, buffer)| buffer.get(from..from + into.len()));
        into.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for PackedPages {
    fn len(&self) -> u64 {
        self.blocks.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut at, mut rest) = (offset, buffer);
        let mut number = self.blocks.find(at);
        while !rest.is_empty() {
            let block = self.blocks.list.get(number).ok_or(io::ErrorKind::UnexpectedEof)?;
            let bytes = usize::try_from(block.bytes).unwrap_or(0);
            let from = usize::try_from(at - block.at).unwrap_or(bytes);
            let (into, after) = rest.split_at_mut(rest.len().min(bytes - from));
            if into.len() == bytes {
                self.unpack(number, into)?;
            } else {
                self.part(number, bytes, from, into)?;
            }
            at += into.len() as u64;
            rest = after;
            number += 1;
        }
        Ok(())
    }

    fn as_file(&self) -> Option<&std::fs::File> {
        None
    }
}

/// Packs a block, and adds what is to be stored of it to `out`. Returns how long that is: 0 for zeros, as long as the block
/// if it does not shrink by an eighth at least.
pub fn pack(block: &[u8], out: &mut Vec<u8>) -> u32 {
    if is_zero(block) {
        return 0;
    }
    let begin = out.len();
    out.resize(begin + lz4_flex::block::get_maximum_output_size(block.len()), 0);
    let packed = out.get_mut(begin..).map(|room| lz4_flex::block::compress_into(block, room));
    let size = match packed {
        Some(Ok(size)) if size < block.len() / 8 * 7 => size,
        _ => {
            out.truncate(begin);
            out.extend_from_slice(block);
            block.len()
        }
    };
    out.truncate(begin + size);
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// Whether these are zeros. The end is looked at first: much memory begins with zeros, little ends with them.
fn is_zero(bytes: &[u8]) -> bool {
    const STEP: usize = 64;
    let (chunks, rest) = bytes.as_chunks::<STEP>();
    chunks.last().is_none_or(|last| *last == [0; STEP])
        && rest.iter().all(|&byte| byte == 0)
        && chunks.iter().all(|chunk| *chunk == [0; STEP])
}

/// Writes the pagemap of packed pages. What goes into the pages image is the caller's business, in the same order.
#[must_use = "an image is complete only when it is finished"]
pub struct PackedWriter {
    image: ImageWriter,
    name: String,
    page_size: u64,
    pages_per_block: u32,
    entries: usize,
    end: u64,
    content: u64,
    last: Option<Last>,
}

struct Last {
    entry: PagemapEntry,
    state: PageState,
}

impl PackedWriter {
    /// Begins a pagemap whose content goes to the pages image of number `pages_id`, in blocks of so many pages.
    ///
    /// # Errors
    /// If the image cannot be created.
    pub fn create(
        images: &Images,
        kind: ImageKind,
        id: impl Into<Id>,
        pages_id: u32,
        page_size: u64,
        pages_per_block: u32,
    ) -> Result<Self> {
        let id = id.into();
        let mut image = images.create(kind, id)?;
        image.write(&PagemapHead { pages_id })?;
        let name = kind.file_name(id)?;
        Ok(Self { image, name, page_size, pages_per_block, entries: 0, end: 0, content: 0, last: None })
    }

    /// Ends the entry: what comes next does not become one with it. So that no block has pages of two areas.
    ///
    /// # Errors
    /// If the image cannot be written.
    pub fn cut(&mut self) -> Result<()> {
        if let Some(Last { entry, .. }) = self.last.take() {
            self.image.write(&entry)?;
            self.entries += 1;
        }
        Ok(())
    }

    /// Adds pages in blocks of these sizes. All but the last call for an entry must be for whole blocks.
    ///
    /// # Errors
    /// If they are not after those before, or the image cannot be written.
    pub fn add_blocks(&mut self, address: u64, pages: u64, state: PageState, sizes: &[u32]) -> Result<()> {
        let pages_per_block = self.pages_per_block;
        let whole = u64::from(pages_per_block.max(1));
        let joins = self.last.as_ref().is_some_and(|last| {
            let pages = last.entry.nr_pages.unwrap_or(0);
            last.state == state && last.entry.blocks.is_some() && self.end == address && pages.is_multiple_of(whole)
        });
        let last = self.extend(address, pages, state, joins)?;
        let blocks = last.entry.blocks.get_or_insert(PagemapBlocks { pages_per_block, ..Default::default() });
        blocks.block_sizes.extend_from_slice(sizes);
        let sum: u64 = sizes.iter().copied().map(u64::from).sum();
        blocks.total_payload_size += sum;
        self.content += sum;
        Ok(())
    }

    /// Adds pages that are stored as they are, or elsewhere. Returns how many bytes of the pages image must be left out before
    /// them, so that they begin at a page.
    ///
    /// # Errors
    /// If they are not after those before, or the image cannot be written.
    pub fn add(&mut self, address: u64, pages: u64, state: PageState) -> Result<u64> {
        let stored = matches!(state, PageState::Present | PageState::PresentLazy);
        let joins = self
            .last
            .as_ref()
            .is_some_and(|last| last.state == state && last.entry.blocks.is_none() && self.end == address);
        let page_size = self.page_size;
        let last = self.extend(address, pages, state, joins)?;
        if !stored {
            return Ok(0);
        }
        last.entry.flags = Some(state.flags() | PE_PAYLOAD_ALIGNED);
        let begin = self.content.next_multiple_of(page_size);
        let padding = begin - self.content;
        self.content = begin + pages * page_size;
        Ok(padding)
    }

    /// The entry that pages are added to, the last one or a new one.
    fn extend(&mut self, address: u64, pages: u64, state: PageState, joins: bool) -> Result<&mut Last> {
        let fault = |reason| Error::Malformed {
            image: self.name.clone(),
            entry: self.entries + 1,
            offset: 0,
            source: Malformed::Pages { address, reason },
        };
        if pages == 0 {
            return Err(fault(PagesFault::Empty));
        }
        if !address.is_multiple_of(self.page_size) {
            return Err(fault(PagesFault::Unaligned));
        }
        if address < self.end {
            return Err(fault(PagesFault::Overlap));
        }
        let bytes = pages.checked_mul(self.page_size);
        let end = bytes.and_then(|bytes| address.checked_add(bytes)).ok_or_else(|| fault(PagesFault::Overflow))?;
        if !joins {
            self.cut()?;
        }
        self.end = end;
        let last = self.last.get_or_insert_with(|| Last {
            entry: PagemapEntry {
                vaddr: address,
                compat_nr_pages: 0,
                in_parent: None,
                flags: Some(state.flags()),
                nr_pages: Some(0),
                blocks: None,
            },
            state,
        });
        last.entry.nr_pages = last.entry.nr_pages.map(|before| before.saturating_add(pages));
        Ok(last)
    }

    /// Ends the pagemap.
    ///
    /// # Errors
    /// If it cannot be written as a whole.
    pub fn finish(mut self) -> Result<()> {
        self.cut()?;
        self.image.finish()
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
