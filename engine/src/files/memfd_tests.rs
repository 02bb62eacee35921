//! Tests of `memfd.rs`: memory files of this process go into images, and come back.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;
use standstill_images::proto::{PagemapEntry, PagemapHead};
use standstill_images::{FolderStore, MemoryStore};

use super::super::magic_link;
use super::super::testing::{descriptor, dump as dump_fds, me, open as open_id};
use super::*;
use crate::options::Options;

fn memory(name: &str, flags: MemfdFlags) -> File {
    File::from(rustix::fs::memfd_create(name, flags | MemfdFlags::CLOEXEC).unwrap())
}

fn link_of(fd: &OwnedFd) -> String {
    std::fs::read_link(magic_link(fd.as_fd())).unwrap().to_str().unwrap().to_owned()
}

fn content(fd: &OwnedFd) -> Vec<u8> {
    std::fs::read(magic_link(fd.as_fd())).unwrap()
}

#[test]
fn content_holes_mode_and_seals() {
    let file = memory("a name", MemfdFlags::ALLOW_SEALING);
    file.set_len(3 << 20).unwrap();
    file.write_all_at(&[1; 10_000], 1 << 20).unwrap();
    file.set_len((3 << 20) + 5).unwrap();
    file.write_all_at(b"end", (3 << 20) + 2).unwrap();
    let file = OwnedFd::from(file);
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o640)).unwrap();
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(77)).unwrap();
    let reader = reopen(file.as_fd(), libc::O_RDONLY as u32).unwrap();
    let opts = Options::default();
    let (images, ids) = dump_fds(&opts, &[&file, &reader]).unwrap();
    assert_eq!(rustix::fs::tell(&file).unwrap(), 77);

    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let (new, new_reader) = (open_id(&mut files, ids[0]), open_id(&mut files, ids[1]));
    let area = for_mapping(&mut files, ids[0], libc::O_RDWR as u32).unwrap();
    assert_eq!(rustix::fs::fcntl_getfl(&area).unwrap() & OFlags::ACCMODE, OFlags::RDONLY);
    seal(&mut files).unwrap();
    assert_eq!(rustix::fs::fcntl_get_seals(&new).unwrap(), seals);
    let (a, b) = (rustix::fs::fstat(&file).unwrap(), rustix::fs::fstat(&new).unwrap());
    assert_eq!((a.st_mode, a.st_size, a.st_blocks), (b.st_mode, b.st_size, b.st_blocks));
    assert_eq!(b.st_ino, rustix::fs::fstat(&new_reader).unwrap().st_ino);
    assert_eq!(content(&new), content(&file));
    assert_eq!(link_of(&new), link_of(&file));
    assert_eq!(rustix::fs::tell(&new).unwrap(), 77);
    for (old, new) in [(&file, &new), (&reader, &new_reader)] {
        assert_eq!(descriptor(old).flags, descriptor(new).flags);
    }
}

#[test]
fn shared_anonymous_memory_stays_what_it_was() {
    let memory = Shared::anonymous(16 * 4096).unwrap();
    memory.write(4096, b"shared");
    memory.write(9 * 4096 + 1, b"memory");
    let path = format!("/proc/self/map_files/{:x}-{:x}", memory.address(), memory.address() + memory.len());
    let Ok(file) = File::open(&path) else { return eprintln!("skipped: no right to open {path}") };
    let link = rustix::fs::readlink(&path, Vec::new()).unwrap().into_bytes();
    let stat = rustix::fs::fstat(&file).unwrap();
    assert!(is_one(&link, &stat));
    let images = Images::new(MemoryStore::new());
    let opts = Options::default();
    let mut dumped = DumpFiles::new(&opts, &images, vec![me()], 0);
    let id = mapped(&mut dumped, file.try_clone().unwrap().into(), &link, &stat).unwrap();
    assert_eq!(mapped(&mut dumped, file.into(), &link, &stat).unwrap(), id);
    let todo = jobs(&mut dumped);
    assert_eq!(todo.iter().map(|job| job.run(&images, &Writing::default()).unwrap()).sum::<u64>(), 2 * 4096);
    dumped.finish().unwrap();
    drop(dumped);

    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let new = for_mapping(&mut files, id, libc::O_RDWR as u32).unwrap();
    seal(&mut files).unwrap();
    assert_eq!(link_of(&new), "/dev/zero (deleted)");
    let now = rustix::fs::fstat(&new).unwrap();
    assert_eq!((now.st_mode, now.st_size, now.st_blocks), (stat.st_mode, stat.st_size, stat.st_blocks));
    let again = Shared::map(new.as_fd(), 0, 16 * 4096).unwrap();
    let (mut a, mut b) = (vec![0; 16 * 4096], vec![0; 16 * 4096]);
    memory.read(0, &mut a);
    again.read(0, &mut b);
    assert_eq!(a, b);
}

#[test]
fn the_kernel_copies_between_folder_and_memory() {
    let dir = std::env::temp_dir().join(format!("standstill-memfd-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    let images = Images::new(FolderStore::open(&dir).unwrap());
    let file = memory("folder", MemfdFlags::empty());
    let text: Vec<u8> = (0..3_000_001u32).map(|n| (n % 251) as u8).collect();
    file.write_all_at(&text, 8192).unwrap();
    let file = OwnedFd::from(file);
    let opts = Options::default();
    let mut dumped = DumpFiles::new(&opts, &images, vec![me()], 0);
    let id = dumped.descriptor(&descriptor(&file)).unwrap().id;
    dumped.finish().unwrap();
    drop(dumped);
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let new = open_id(&mut files, id);
    assert_eq!(content(&new), content(&file));
    assert_eq!(rustix::fs::tell(&new).unwrap(), 0);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn writing_stays_possible_where_it_was_mapped_before_the_seal() {
    let file = memory("future", MemfdFlags::ALLOW_SEALING);
    file.set_len(4096).unwrap();
    let file = OwnedFd::from(file);
    rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
    let opts = Options::default();
    let (images, ids) = dump_fds(&opts, &[&file]).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let area = for_mapping(&mut files, ids[0], libc::O_RDWR as u32).unwrap();
    let memory = Shared::map(area.as_fd(), 0, 4096).unwrap();
    seal(&mut files).unwrap();
    memory.write(0, b"still");
    assert!(Shared::map(area.as_fd(), 0, 4096).is_err());
    assert!(content(&open_id(&mut files, ids[0])).starts_with(b"still"));
}

#[test]
fn huge_pages_come_back_where_there_are_any() {
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::ALLOW_SEALING;
    let Ok(file) = rustix::fs::memfd_create("huge", flags) else { return eprintln!("skipped: no hugetlbfs") };
    rustix::fs::ftruncate(&file, 4 << 20).unwrap();
    let Ok(memory) = Shared::map(file.as_fd(), 0, 4 << 20) else { return eprintln!("skipped: no huge pages are free") };
    memory.write(3 << 20, b"huge");
    let opts = Options::default();
    let (images, ids) = dump_fds(&opts, &[&file]).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let new = open_id(&mut files, ids[0]);
    let (a, b) = (rustix::fs::fstat(&file).unwrap(), rustix::fs::fstat(&new).unwrap());
    assert_eq!((a.st_size, a.st_blocks, a.st_dev), (b.st_size, b.st_blocks, b.st_dev));
    let mut text = [0; 4];
    Shared::map(new.as_fd(), 0, 4 << 20).unwrap().read(3 << 20, &mut text);
    assert_eq!(&text, b"huge");
}

#[test]
fn pages_out_of_place_are_a_lie() {
    let run = |start, end| PagemapEntry {
        vaddr: start,
        flags: Some(4),
        nr_pages: Some((end - start) / PAGE),
        ..Default::default()
    };
    let refuse = |runs: &[PagemapEntry]| {
        let images = Images::new(MemoryStore::new());
        let inode =
            MemfdInodeEntry { name: b"x".to_vec(), size: 8192, shmid: 5, seals: 0, inode_id: 1, ..Default::default() };
        images.write_entries(ImageKind::MemfdInode, (), [inode]).unwrap();
        images.write_entries(ImageKind::Files, (), [file_entry(1, 1, 0, 0, no_owner())]).unwrap();
        let mut pagemap = images.create(ImageKind::ShmemPagemap, 5_u32).unwrap();
        pagemap.write(&PagemapHead { pages_id: 1 }).unwrap();
        runs.iter().for_each(|run| pagemap.write(run).unwrap());
        pagemap.finish().unwrap();
        let mut pages = images.create_raw(ImageKind::Pages, 1_u32).unwrap();
        pages.write_all(&[1; 4096]).unwrap();
        pages.finish().unwrap();
        let opts = Options::default();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        files.open(1).map(drop)
    };
    refuse(&[run(4096, 8192)]).unwrap();
    refuse(&[run(4096, 12288)]).unwrap_err();
    refuse(&[run(0, 8192)]).unwrap_err();
    refuse(&[run(4096, 8192), run(0, 4096)]).unwrap_err();
    refuse(&[PagemapEntry { vaddr: 1, ..run(0, 4096) }]).unwrap_err();
    refuse(&[PagemapEntry { nr_pages: Some(u64::MAX), ..run(0, 4096) }]).unwrap_err();
}
