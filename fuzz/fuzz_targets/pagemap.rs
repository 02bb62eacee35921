//! Two pagemaps, one the parent of the other: no panic, no two places for a page, none outside the pages image. The first
//! two bytes are how many pages the images of pages have, the third says where the second pagemap begins.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_images::pages::{PageChain, PageMap, Place};
use standstill_images::{ImageKind, Images, MemoryStore, MAGIC_COMMON};

const PAGE: u64 = 4096;
static ZEROS: [u8; 512 * 4096] = [0; 512 * 4096];

fn store(body: &[u8]) -> MemoryStore {
    let mut image = MAGIC_COMMON.to_le_bytes().to_vec();
    image.extend_from_slice(&ImageKind::Pagemap.magic().to_le_bytes());
    image.extend_from_slice(body);
    let store = MemoryStore::new();
    store.insert("pagemap-1.img", image).expect("a good name");
    store
}

fuzz_target!(|data: &[u8]| {
    let [pages, pages_high, middle, rest @ ..] = data else { return };
    let (first, second) = rest.split_at(usize::from(*middle).min(rest.len()));
    let len = u64::from(u16::from_le_bytes([*pages, *pages_high]) % 512) * PAGE;

    let last = store(first);
    if let Ok((head, entries)) = Images::new(last.clone()).read_pagemap(ImageKind::Pagemap, 1_u32) {
        if let Ok(map) = PageMap::new("image", &head, &entries, PAGE, Some(len)) {
            let (mut end, mut content) = (0, 0);
            for run in map.runs() {
                assert!(run.pages > 0 && run.address >= end);
                end = run.end(PAGE);
                if let Place::Pages(offset) = run.place {
                    assert_eq!(offset, content);
                    content += run.bytes(PAGE);
                }
            }
            assert!(content <= len && content == map.content());
            assert!(map.in_range(0..u64::MAX).eq(map.runs().iter().copied()));
            for run in map.runs() {
                let part: Vec<_> = map.in_range(run.address..run.address + PAGE).collect();
                assert_eq!((part.len(), part[0].pages, part[0].address), (1, 1, run.address));
            }
        }
    }

    let parent = store(second);
    for store in [&last, &parent] {
        let bytes = &ZEROS[..usize::try_from(len).expect("small")];
        for number in 0..3 {
            store.insert(&format!("pages-{number}.img"), bytes).expect("a good name");
        }
    }
    let images = Images::new(last.on(parent));
    let Ok(chain) = PageChain::open(&images, ImageKind::Pagemap, 1_u32, PAGE) else { return };
    if let Ok(located) = chain.located() {
        let all: u64 = located.iter().map(|part| part.pages).sum();
        let stated: u64 = chain.last().runs().iter().map(|run| run.pages).sum();
        assert_eq!(all, stated);
        for part in located {
            if let Some(offset) = part.offset {
                let pages = chain.pages(part.layer).expect("the image is there");
                assert!(offset + part.pages * PAGE <= pages.len());
            }
        }
    }
});
