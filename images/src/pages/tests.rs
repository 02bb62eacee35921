//! Pagemaps that lie, of both forms, there and back, and in chains.

use super::*;
use crate::store::{MemoryStore, Store};

const SIZE: u64 = 4096;

fn entry(vaddr: u64, pages: u64, flags: u32) -> PagemapEntry {
    PagemapEntry { vaddr, compat_nr_pages: 0, in_parent: None, flags: Some(flags), nr_pages: Some(pages), blocks: None }
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
    assert_eq!(fault(&[entry(0x1000, 1, 20)], len), PagesFault::Flags);
}

#[test]
fn both_forms_are_read() {
    let old = |vaddr, in_parent| PagemapEntry {
        vaddr,
        compat_nr_pages: 2,
        in_parent,
        flags: None,
        nr_pages: None,
        blocks: None,
    };
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
    let found: Vec<_> = open("3").unwrap().located().unwrap().iter().map(|l| (l.address, l.layer, l.offset)).collect();
    assert_eq!(found, [(0x1000, 2, Some(0)), (0x2000, 1, Some(0)), (0x3000, 2, Some(0x2000)), (0x9000, 0, Some(0))]);
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
