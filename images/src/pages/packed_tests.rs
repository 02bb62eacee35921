//! Packed pages: there and back in any parts, in chains, and lies.

use super::super::{PageChain, PageMap, Place, PE_PARENT, PE_PRESENT};
use super::*;
use crate::store::{MemoryStore, Store};

const SIZE: u64 = 4096;

/// Bytes that do not shrink.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

fn text(len: usize) -> Vec<u8> {
    b"all work and no play makes a dull program. ".iter().copied().cycle().take(len).collect()
}

/// Writes runs of pages, packed in blocks of 4 pages, into a store of their own.
fn written(runs: &[(u64, Vec<u8>)]) -> MemoryStore {
    let store = MemoryStore::new();
    let images = Images::new(store.clone());
    let mut map = PackedWriter::create(&images, ImageKind::Pagemap, 7_u32, 5, SIZE, 4).unwrap();
    let mut pages = Vec::new();
    for (address, content) in runs {
        let mut sizes = Vec::new();
        for block in content.chunks(4 * 4096) {
            sizes.push(pack(block, &mut pages));
        }
        map.add_blocks(*address, content.len() as u64 / SIZE, PageState::Present, &sizes).unwrap();
        map.cut().unwrap();
    }
    map.finish().unwrap();
    store.insert("pages-5.img", pages).unwrap();
    store
}

#[test]
fn what_comes_back_is_what_went_in() {
    let mut content = text(5 * 4096);
    content.extend(vec![0; 7 * 4096]);
    content.extend(noise(9 * 4096, 1));
    content.extend(text(2 * 4096));
    let store = written(&[(0x10000, content.clone())]);
    let chain = PageChain::open(&Images::new(store.clone()), ImageKind::Pagemap, 7_u32, SIZE).unwrap();
    assert_eq!((chain.last().runs().len(), chain.sources()), (1, 2));
    assert!(store.read("pages-5.img").unwrap().len() < 11 * 4096);
    for part in [0..content.len() as u64, 4096..8192, 0x3000..0x5000, 0x4fff..0x5001, 0x6800..0x6801, 0x14fff..0x15000]
    {
        let mut read = vec![1; usize::try_from(part.end - part.start).unwrap()];
        chain.pages(1).unwrap().read_exact_at(&mut read, part.start).unwrap();
        let wanted = &content[usize::try_from(part.start).unwrap()..usize::try_from(part.end).unwrap()];
        assert!(read == wanted, "{part:?}");
    }
    let mut one = [0];
    chain.pages(1).unwrap().read_exact_at(&mut one, content.len() as u64).unwrap_err();
    let located = chain.located().unwrap();
    let zeros: u64 = located.iter().filter(|part| part.zero).map(|part| part.pages).sum();
    assert_eq!((zeros, located.iter().map(|part| part.pages).sum::<u64>()), (4, 23));
    let part = chain.located_in(0x11000..0x13000).unwrap();
    assert_eq!((part.len(), part[0].address, part[0].pages, part[0].offset), (1, 0x11000, 2, Some(0x1000)));
}

#[test]
fn json_gives_the_same_bytes() {
    use crate::json::{decode, encode_text, to_text, Style};
    let store = written(&[(0x10000, text(9 * 4096)), (0x20000, vec![0; 4096]), (0x30000, noise(4096, 2))]);
    let bytes = store.read("pagemap-7.img").unwrap();
    let image = decode("pagemap-7.img", &bytes, Style { pretty: true, payload: true }).unwrap();
    assert_eq!(image["entries"][2]["blocks"]["block_sizes"][0], 0);
    assert!(encode_text("json", to_text(&image, true).as_bytes()).unwrap() == bytes);
}

#[test]
fn raw_runs_begin_at_a_page() {
    let store = MemoryStore::new();
    let images = Images::new(store.clone());
    let mut map = PackedWriter::create(&images, ImageKind::Pagemap, 7_u32, 5, SIZE, 4).unwrap();
    map.add_blocks(0x1000, 4, PageState::Present, &[100]).unwrap();
    map.add_blocks(0x5000, 1, PageState::Present, &[10]).unwrap();
    // the last block was not whole: an entry of its own
    map.add_blocks(0x6000, 1, PageState::Present, &[10]).unwrap();
    assert_eq!(map.add(0x7000, 2, PageState::Present).unwrap(), 4096 - 120);
    assert_eq!(map.add(0x9000, 1, PageState::Present).unwrap(), 0);
    assert_eq!(map.add(0xa000, 1, PageState::Parent).unwrap(), 0);
    map.add_blocks(0xb000, 1, PageState::PresentLazy, &[0]).unwrap();
    assert!(map.add_blocks(0xb000, 1, PageState::Present, &[0]).is_err());
    map.finish().unwrap();
    store.insert("pages-5.img", vec![0; 4 * 4096]).unwrap();
    let map = PageMap::read(&images, ImageKind::Pagemap, 7_u32, SIZE).unwrap();
    let places: Vec<_> = map.runs().iter().map(|run| (run.address, run.pages, run.place)).collect();
    assert_eq!(
        places,
        [
            (0x1000, 5, Place::Packed(0)),
            (0x6000, 1, Place::Packed(0x5000)),
            (0x7000, 3, Place::Pages(0x1000)),
            (0xa000, 1, Place::Parent),
            (0xb000, 1, Place::Packed(0x6000)),
        ]
    );
    assert_eq!((map.content(), map.blocks().list().len()), (4 * 4096, 4));
}

#[test]
fn every_layer_may_be_packed_or_not() {
    let parent = written(&[(0x1000, text(8 * 4096)), (0x20000, noise(2 * 4096, 3))]);
    let store = MemoryStore::new();
    let images = Images::new(store.clone());
    let mut map = PackedWriter::create(&images, ImageKind::Pagemap, 7_u32, 5, SIZE, 4).unwrap();
    map.add(0x2000, 4, PageState::Parent).unwrap();
    let mut pages = Vec::new();
    let size = pack(&text(4096), &mut pages);
    map.add_blocks(0x6000, 1, PageState::Present, &[size]).unwrap();
    map.add(0x21000, 1, PageState::Parent).unwrap();
    map.finish().unwrap();
    store.insert("pages-5.img", pages).unwrap();
    let chain = PageChain::open(&Images::new(store.on(parent)), ImageKind::Pagemap, 7_u32, SIZE).unwrap();
    // the pages images of both, then what the blocks of each unpack to
    let found: Vec<_> = chain.located().unwrap().iter().map(|l| (l.address, l.layer, l.offset.unwrap())).collect();
    assert_eq!(found, [(0x2000, 3, 0x1000), (0x6000, 2, 0), (0x21000, 3, 0x9000)]);
    let mut page = vec![0; 4096];
    chain.pages(3).unwrap().read_exact_at(&mut page, 0x9000).unwrap();
    assert!(page == noise(2 * 4096, 3)[4096..]);
}

fn fault(pages: u64, flags: u32, blocks: PagemapBlocks, len: u64) -> PagesFault {
    let entry = PagemapEntry {
        vaddr: 0x1000,
        compat_nr_pages: 0,
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(pages),
        blocks: Some(blocks),
    };
    match PageMap::new("test", &PagemapHead { pages_id: 1 }, &[entry], SIZE, Some(len)).unwrap_err() {
        Error::Malformed { source: Malformed::Pages { reason, .. }, .. } => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn lying_sizes_are_found() {
    let blocks = |sizes: &[u32], total, pages| PagemapBlocks {
        block_sizes: sizes.to_vec(),
        total_payload_size: total,
        pages_per_block: pages,
    };
    assert_eq!(fault(1, PE_PRESENT, blocks(&[1], 1, 0), SIZE), PagesFault::Blocks);
    assert_eq!(fault(1, PE_PRESENT, blocks(&[1], 1, 1025), SIZE), PagesFault::Blocks);
    assert_eq!(fault(1, PE_PARENT, blocks(&[1], 1, 1), SIZE), PagesFault::Blocks);
    assert_eq!(fault(1, PE_PARENT | PE_PAYLOAD_ALIGNED, blocks(&[1], 1, 1), SIZE), PagesFault::Flags);
    assert_eq!(fault(2, PE_PRESENT, blocks(&[1], 1, 1), SIZE), PagesFault::BlockCount);
    assert_eq!(fault(1 << 40, PE_PRESENT, blocks(&[1], 1, 1024), SIZE), PagesFault::BlockCount);
    assert_eq!(fault(1, PE_PRESENT, blocks(&[4097], 4097, 4), 2 * SIZE), PagesFault::BlockSize);
    assert_eq!(fault(5, PE_PRESENT, blocks(&[0, 4097], 4097, 4), 2 * SIZE), PagesFault::BlockSize);
    assert_eq!(fault(1, PE_PRESENT, blocks(&[7], 8, 1), SIZE), PagesFault::BlockSum);
    assert_eq!(fault(1, PE_PRESENT, blocks(&[7], 7, 1), 6), PagesFault::PagesImage);
}

#[test]
fn a_block_that_lies_is_named() {
    let store = written(&[(0x1000, text(8 * 4096))]);
    let good = store.read("pages-5.img").unwrap();
    for (at, wrong) in [(0, 0xff), (20, 0xff), (good.len() / 2, 0)] {
        let mut bytes = good.to_vec();
        bytes[at] = wrong;
        store.insert("pages-5.img", bytes).unwrap();
        let chain = PageChain::open(&Images::new(store.clone()), ImageKind::Pagemap, 7_u32, SIZE).unwrap();
        let mut page = vec![0; 8 * 4096];
        // what is changed may also unpack to as many other bytes, which nothing here can tell
        if let Err(error) = chain.pages(1).unwrap().read_exact_at(&mut page, 0) {
            let text = error.to_string();
            assert!(text.contains("pages-5.img, entry"), "{text}");
        }
    }
    // a pagemap that lies is named with the place of its entry
    let images = Images::new(store.clone());
    store.insert("pages-5.img", vec![0]).unwrap();
    let error = PageMap::read(&images, ImageKind::Pagemap, 7_u32, SIZE).unwrap_err();
    assert!(matches!(error, Error::Malformed { entry: 1, offset: 14, .. }), "{error:?}");
}
