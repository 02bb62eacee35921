//! Packing pages while they are written.
//!
//! The form is that of [`standstill_images::pages::packed`]. Pages are read as they are without packing, a piece of
//! [`PIECE`] bytes a job, and packed by the same pool; where a piece goes in the image is known only when all before it are
//! packed, so pieces are packed in windows, and one window is written while the next one is packed. Blocks never have pages
//! of two areas. A piece in which no block shrinks is written as it is, from a page on: it can be read without us. Pages of
//! zeros are not written.
//!
//! How they get back into a task: [`super::unpack`].
//!
//! Not kept: which anonymous pages of zeros were there.
//!
//! Man pages: process_vm_readv(2).

use rayon::prelude::*;
use standstill_images::pages::packed::{pack, PackedWriter};
use standstill_images::pages::PageState;
use standstill_images::{ImageKind, ImageOutput, Images};

use super::drain::{Drain, Run};
use super::{Writing, PAGE};
use crate::error::{Call, Error, Result};
use crate::sys::interrupt;
use crate::transfer::{self, client::Client};

/// Bytes that one job packs.
const PIECE: u64 = 1 << 20;
/// A part must be as long to be written as it is, from a page on: what is left out before it is lost.
const PLAIN_FROM: u64 = 64 << 10;
/// Pieces of a window, for each thread.
const WINDOW: usize = 4;

/// Where packed pages go.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Kind of the pagemap.
    pub kind: ImageKind,
    /// Its number.
    pub id: u32,
    /// Number of the pages image.
    pub pages_id: u32,
    /// How they are written.
    pub how: &'a Writing,
}

impl Target<'_> {
    fn pages_per_block(&self) -> u32 {
        self.how.packed.unwrap_or(1).max(1)
    }
}

/// Pages one after another, of one area.
#[derive(Debug, Clone, Copy)]
pub struct Stretch {
    /// Address of the first.
    pub address: u64,
    /// All of them.
    pub bytes: u64,
    /// What they are written as.
    pub state: PageState,
    /// They are not to be packed.
    pub plain: bool,
}

/// A piece of a stretch.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Address of the first page.
    pub address: u64,
    /// Which stretch it is of.
    pub of: usize,
    bytes: u64,
    first: bool,
}

impl Part {
    /// Its size.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(usize::MAX)
    }
}

/// What becomes of a part.
enum Form {
    /// It is elsewhere.
    Elsewhere,
    /// Written as it is.
    Plain,
    /// Written in blocks of these sizes.
    Blocks(Vec<u32>),
}

/// Parts that were read together, and what is to be written of them.
#[derive(Default)]
struct Packed {
    forms: Vec<Form>,
    bytes: Vec<u8>,
}

/// Writes a pagemap and its pages. `read` fills a buffer with the parts, one after another.
pub fn write<F>(images: &Images, to: &Target<'_>, stretches: &[Stretch], read: F) -> Result<()>
where
    F: Fn(&[Part], &mut [u8]) -> Result<()> + Sync,
{
    let mut map = PackedWriter::create(images, to.kind, to.id, to.pages_id, PAGE, to.pages_per_block())?;
    let mut pages = images.create_raw(ImageKind::Pages, to.pages_id)?;
    let batches = batches(stretches, to.pages_per_block());
    let one = |buffer: &mut Vec<u8>, batch: &Vec<Part>| {
        let packed = pack_batch(batch, stretches, to.pages_per_block(), buffer, &read)?;
        to.how.counter.add(batch.iter().map(|part| part.bytes).sum());
        Ok(packed)
    };
    let pack_all = |window: &[Vec<Part>]| match window {
        [] => Ok(Vec::new()),
        [only] => Ok(vec![one(&mut Vec::new(), only)?]),
        many => many.par_iter().map_init(Vec::new, one).collect::<Result<Vec<Packed>>>(),
    };
    let window = WINDOW * rayon::current_num_threads();
    let mut windows = batches.chunks(window).peekable();
    let mut packed = pack_all(windows.peek().copied().unwrap_or_default())?;
    while let Some(this) = windows.next() {
        let mut put = || {
            this.iter()
                .zip(&packed)
                .try_for_each(|(parts, packed)| put_batch(parts, stretches, packed, &mut map, pages.as_mut()))
        };
        packed = match windows.peek() {
            Some(next) => {
                let (put, next) = rayon::join(put, || pack_all(next));
                put?;
                next?
            }
            None => {
                put()?;
                Vec::new()
            }
        };
    }
    map.finish()?;
    pages.finish()?;
    Ok(())
}

/// Stretches, cut into parts and put together again to about [`PIECE`] bytes.
pub(crate) fn batches(stretches: &[Stretch], pages_per_block: u32) -> Vec<Vec<Part>> {
    // whole blocks, so that only the last one of a stretch is shorter
    let piece = PIECE.next_multiple_of(u64::from(pages_per_block.max(1)) * PAGE);
    let mut batches: Vec<Vec<Part>> = Vec::new();
    let mut filled = piece;
    for (of, stretch) in stretches.iter().enumerate() {
        let mut done = 0;
        while done < stretch.bytes {
            let bytes = (stretch.bytes - done).min(piece);
            let part = Part { address: stretch.address + done, of, bytes, first: done == 0 };
            match batches.last_mut() {
                Some(batch) if filled + bytes <= piece => batch.push(part),
                _ => {
                    batches.push(vec![part]);
                    filled = 0;
                }
            }
            filled += bytes;
            done += bytes;
        }
    }
    batches
}

pub(crate) fn is_stored(state: PageState) -> bool {
    match state {
        PageState::Present | PageState::PresentLazy => true,
        PageState::Parent | PageState::Lazy => false,
    }
}

fn pack_batch(
    parts: &[Part],
    stretches: &[Stretch],
    pages_per_block: u32,
    buffer: &mut Vec<u8>,
    read: &(impl Fn(&[Part], &mut [u8]) -> Result<()> + Sync),
) -> Result<Packed> {
    interrupt::check()?;
    let stretch = |part: &Part| stretches.get(part.of).copied().ok_or(Error::Gone);
    let mut stored = Vec::with_capacity(parts.len());
    for part in parts {
        if is_stored(stretch(part)?.state) {
            stored.push(*part);
        }
    }
    let bytes: usize = stored.iter().map(Part::len).sum();
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    let buffer = &mut buffer[..bytes];
    read(&stored, buffer)?;
    let mut packed = Packed::default();
    let mut rest = &*buffer;
    for part in parts {
        let stretch = stretch(part)?;
        if !is_stored(stretch.state) {
            packed.forms.push(Form::Elsewhere);
            continue;
        }
        let (content, after) = rest.split_at(part.len());
        rest = after;
        packed.forms.push(pack_part(content, stretch.plain, pages_per_block, &mut packed.bytes));
    }
    Ok(packed)
}

fn pack_part(content: &[u8], plain: bool, pages_per_block: u32, out: &mut Vec<u8>) -> Form {
    if plain {
        out.extend_from_slice(content);
        return Form::Plain;
    }
    let block = usize::try_from(u64::from(pages_per_block) * PAGE).unwrap_or(1 << 18).max(1);
    let (mut sizes, mut shrunk) = (Vec::with_capacity(content.len() / block + 1), false);
    for block in content.chunks(block) {
        let size = pack(block, out);
        shrunk |= u64::from(size) < block.len() as u64;
        sizes.push(size);
    }
    if shrunk || (content.len() as u64) < PLAIN_FROM {
        Form::Blocks(sizes)
    } else {
        Form::Plain
    }
}

fn put_batch(
    parts: &[Part],
    stretches: &[Stretch],
    packed: &Packed,
    map: &mut PackedWriter,
    pages: &mut dyn ImageOutput,
) -> Result<()> {
    let mut rest = packed.bytes.as_slice();
    // what is to be written at once
    let mut ready = 0;
    for (part, form) in parts.iter().zip(&packed.forms) {
        let state = stretches.get(part.of).ok_or(Error::Gone)?.state;
        if part.first {
            map.cut()?;
        }
        match form {
            Form::Elsewhere => {
                map.add(part.address, part.bytes / PAGE, state)?;
            }
            Form::Plain => {
                let padding = map.add(part.address, part.bytes / PAGE, state)?;
                if padding > 0 {
                    let (before, after) = rest.split_at(ready);
                    pages.write_all(before).call("write(pages)")?;
                    pages.write_all(&vec![0; usize::try_from(padding).unwrap_or(0)]).call("write(pages)")?;
                    (rest, ready) = (after, 0);
                }
                ready += part.len();
            }
            Form::Blocks(sizes) => {
                map.add_blocks(part.address, part.bytes / PAGE, state, sizes)?;
                ready += sizes.iter().map(|&size| size as usize).sum::<usize>();
            }
        }
    }
    pages.write_all(&rest[..ready]).call("write(pages)")
}

/// Writes the pages of a task.
pub fn write_drain(
    drain: &Drain,
    images: &Images,
    id: u32,
    pages_id: u32,
    vdso: Option<(u64, &[u8])>,
    how: &Writing,
) -> Result<()> {
    let to = Target { kind: ImageKind::Pagemap, id, pages_id, how };
    write(images, &to, &stretches(drain, true), |parts, buffer| read_parts(drain, parts, vdso, buffer))
}

/// The runs of a task. Without a parent everything is stored.
fn stretches(drain: &Drain, has_parent: bool) -> Vec<Stretch> {
    let stretch = |run: &Run| Stretch {
        address: run.address,
        bytes: run.bytes,
        state: match (run.in_parent && has_parent, run.lazy) {
            (true, _) => PageState::Parent,
            (false, true) => PageState::PresentLazy,
            (false, false) => PageState::Present,
        },
        plain: run.huge,
    };
    drain.runs.iter().map(stretch).collect()
}

/// Sends the pages of a task to a server.
pub fn send_drain(
    drain: &Drain,
    images: &Images,
    id: u32,
    vdso: Option<(u64, &[u8])>,
    client: &Client,
    how: &Writing,
) -> Result<()> {
    let target = transfer::wire::Target::task(id);
    let read = |parts: &[Part], buffer: &mut [u8]| read_parts(drain, parts, vdso, buffer);
    let sent = client.send(target, |has_parent| stretches(drain, has_parent), read, &how.counter)?;
    client.note(images, id, &sent)
}

/// Reads parts: as many in one call as can be.
fn read_parts(drain: &Drain, parts: &[Part], vdso: Option<(u64, &[u8])>, buffer: &mut [u8]) -> Result<()> {
    let mut ranges: Vec<(u64, usize)> = Vec::new();
    let mut rest = buffer;
    let mut begun = 0;
    for part in parts {
        let readable = drain.runs.get(part.of).is_some_and(|run| run.readable);
        let in_vdso = vdso.is_some_and(|(at, bytes)| (at..at + bytes.len() as u64).contains(&part.address));
        if readable && !in_vdso && ranges.len() < 512 {
            ranges.push((part.address, part.len()));
            begun += part.len();
            continue;
        }
        let (before, after) = std::mem::take(&mut rest).split_at_mut(begun);
        drain.read_ranges(&ranges, before)?;
        ranges.clear();
        begun = 0;
        if readable && !in_vdso {
            ranges.push((part.address, part.len()));
            begun = part.len();
            rest = after;
            continue;
        }
        let (room, after) = after.split_at_mut(part.len());
        drain.read(part.address, readable, room, vdso)?;
        rest = after;
    }
    drain.read_ranges(&ranges, rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use standstill_images::pages::PageChain;
    use standstill_images::MemoryStore;

    fn content(address: u64) -> u8 {
        match address / PAGE % 5 {
            0 => 0,
            1 => (address % 7) as u8,
            _ => (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8,
        }
    }

    #[test]
    fn windows_of_pieces_come_back() {
        let images = Images::new(MemoryStore::new());
        let state = PageState::Present;
        let mut stretches: Vec<Stretch> = (0..300)
            .map(|n| Stretch { address: 0x1000_0000 + n * 0x4000, bytes: 0x1000 * (n % 3 + 1), state, plain: n == 7 })
            .collect();
        stretches.push(Stretch { address: 0x4000_0000, bytes: 9 << 20, state, plain: false });
        let how = Writing { packed: Some(5), ..Writing::default() };
        let to = Target { kind: ImageKind::Pagemap, id: 1, pages_id: 1, how: &how };
        write(&images, &to, &stretches, |parts, buffer| {
            let bytes = parts.iter().flat_map(|part| part.address..part.address + part.bytes).map(content);
            buffer.iter_mut().zip(bytes).for_each(|(byte, value)| *byte = value);
            Ok(())
        })
        .unwrap();
        let chain = PageChain::open(&images, ImageKind::Pagemap, 1_u32, PAGE).unwrap();
        let located = chain.located().unwrap();
        let all: u64 = stretches.iter().map(|stretch| stretch.bytes / PAGE).sum();
        assert_eq!(located.iter().map(|pages| pages.pages).sum::<u64>(), all);
        for pages in located {
            let mut bytes = vec![0; usize::try_from(pages.pages * PAGE).unwrap()];
            chain.pages(pages.layer).unwrap().read_exact_at(&mut bytes, pages.offset.unwrap()).unwrap();
            assert!(bytes.iter().zip(pages.address..).all(|(&byte, address)| byte == content(address)));
        }
    }
}
