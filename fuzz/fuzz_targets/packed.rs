//! Packed pages. What is packed unpacks to itself, in whole and in parts; and no pagemap and no block, whatever they say,
//! lead to a panic, or to memory in proportion to what they say. The first two bytes are where the pages image begins, the
//! third is how many pages a block has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_images::pages::packed::{pack, PackedWriter};
use standstill_images::pages::{PageChain, PageState};
use standstill_images::{ImageKind, Images, MemoryStore, ReadAt, MAGIC_COMMON};

const PAGE: u64 = 4096;
/// Of what a lying pagemap says, no more is looked at.
const LOOKED_AT: usize = 1 << 20;

fn lies(body: &[u8], pages: &[u8]) {
    let mut image = MAGIC_COMMON.to_le_bytes().to_vec();
    image.extend_from_slice(&ImageKind::Pagemap.magic().to_le_bytes());
    image.extend_from_slice(body);
    let store = MemoryStore::new();
    store.insert("pagemap-1.img", image).expect("a good name");
    for number in 0..3 {
        store.insert(&format!("pages-{number}.img"), pages.to_vec()).expect("a good name");
    }
    let Ok(chain) = PageChain::open(&Images::new(store), ImageKind::Pagemap, 1_u32, PAGE) else { return };
    let Ok(located) = chain.located() else { return };
    let stated: u64 = chain.last().runs().iter().map(|run| run.pages).sum();
    assert_eq!(located.iter().map(|part| part.pages).sum::<u64>(), stated);
    let mut left = LOOKED_AT;
    for part in located {
        let (Some(offset), Some(source)) = (part.offset, chain.pages(part.layer)) else { continue };
        assert!(offset + part.pages * PAGE <= source.len());
        let len = usize::try_from(part.pages * PAGE).unwrap_or(usize::MAX).min(left);
        let mut whole = vec![1; len];
        let mut page = [2; PAGE as usize];
        let read = source.read_exact_at(&mut whole, offset);
        for (n, expected) in whole.chunks(page.len()).enumerate().filter(|(_, page)| page.len() == PAGE as usize) {
            if source.read_exact_at(&mut page, offset + n as u64 * PAGE).is_ok() && read.is_ok() {
                assert!(page == expected && (!part.zero || page == [0; PAGE as usize]));
            }
        }
        left -= len;
    }
}

fn truth(content: &[u8], pages_per_block: u32) {
    let mut content = content.to_vec();
    content.resize(content.len().next_multiple_of(PAGE as usize).max(PAGE as usize), 0);
    let store = MemoryStore::new();
    let images = Images::new(store.clone());
    let block = pages_per_block as usize * PAGE as usize;
    let (mut pages, mut sizes) = (Vec::new(), Vec::new());
    for block in content.chunks(block) {
        sizes.push(pack(block, &mut pages));
    }
    let number = content.len() as u64 / PAGE;
    let mut map = PackedWriter::create(&images, ImageKind::Pagemap, 1_u32, 1, PAGE, pages_per_block).expect("memory");
    map.add_blocks(0x1000, number, PageState::Present, &sizes).expect("in order");
    map.finish().expect("memory");
    store.insert("pages-1.img", pages).expect("a good name");
    let chain = PageChain::open(&images, ImageKind::Pagemap, 1_u32, PAGE).expect("what we wrote");
    let packed = chain.packed(1).expect("packed");
    let mut read = vec![1; content.len()];
    packed.read_exact_at(&mut read, 0).expect("what we wrote");
    assert!(read == content);
    let (from, to) = (content.len() / 3, content.len() / 2);
    packed.read_exact_at(&mut read[from..to], from as u64).expect("what we wrote");
    assert!(read == content);
}

fuzz_target!(|data: &[u8]| {
    let [middle, middle_high, pages_per_block, rest @ ..] = data else { return };
    let middle = usize::from(u16::from_le_bytes([*middle, *middle_high])).min(rest.len());
    lies(&rest[..middle], &rest[middle..]);
    truth(rest, u32::from(*pages_per_block % 8) + 1);
});
