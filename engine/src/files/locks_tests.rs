//! Tests of `locks.rs`: locks of this process go into images in memory, and come back.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use standstill_images::{FolderStore, Images, MemoryStore};

use super::super::testing::{descriptor, me};
use super::*;
use crate::sys::calls;

/// A file that goes away with the test.
struct File(PathBuf);

impl File {
    fn new(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("standstill-locks-{name}-{}", std::process::id()));
        std::fs::write(&path, b"0123456789").unwrap();
        File(path)
    }
    fn open(&self) -> OwnedFd {
        std::fs::File::options().read(true).write(true).open(&self.0).unwrap().into()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn take(fd: &OwnedFd, how: How, kind: u32, start: i64, len: i64) -> Result<()> {
    let e = FileLockEntry { flag: how as u32, r#type: kind, pid: me(), fd: fd.as_raw_fd(), start, len };
    run(&[e])
}

fn run(locks: &[FileLockEntry]) -> Result<()> {
    let mut plan = Plan::new();
    super::take(locks, &mut plan)?;
    plan.check()?;
    calls::run_here(&plan).map(drop)
}

/// What `dump` makes of descriptors, each with the file id beside it.
fn dumped(fds: &[(&Descriptor, u32, u32)]) -> Vec<FileLockEntry> {
    let (opts, images) = (Options::default(), Images::new(MemoryStore::new()));
    let mut files = DumpFiles::new(&opts, &images, vec![me()], 0);
    for &(d, id, pid) in fds {
        dump(d, id, pid, &mut files).unwrap();
    }
    finish(&mut files).unwrap();
    images.read_entries_if_there(ImageKind::FileLocks, ()).unwrap()
}

fn shape(e: &FileLockEntry) -> (u32, u32, i64, i64) {
    (e.flag, e.r#type, e.start, e.len)
}

/// A descriptor with these lines, which need not be true.
fn with_lines(fd: &OwnedFd, lines: &str) -> Descriptor {
    let mut d = descriptor(fd);
    let text: String = lines.lines().map(|line| format!("lock:\t{}\n", line.trim())).collect();
    d.info.locks =
        crate::proc::fdinfo::parse(format!("pos:\t0\nflags:\t02\nmnt_id:\t1\n{text}").as_bytes()).unwrap().locks;
    d
}

fn table(id: u32, fds: &[u32]) -> HashMap<u32, Vec<FdinfoEntry>> {
    let entry = |&fd: &u32| FdinfoEntry { id: 1, flags: 0, r#type: 1, fd, xattr_security_selinux: None };
    HashMap::from([(id, fds.iter().map(entry).collect())])
}

#[test]
fn locks_of_open_files_come_back() {
    let file = File::new("open");
    let (fd, other) = (file.open(), file.open());
    take(&fd, How::Flock, READ, 0, 0).unwrap();
    take(&fd, How::Ofd, WRITE, 2, 3).unwrap();
    take(&fd, How::Ofd, READ, 100, 0).unwrap();
    let entries = dumped(&[(&descriptor(&fd), 1, 7)]);
    let shapes: Vec<_> = entries.iter().map(shape).collect();
    assert_eq!(shapes, [(2, 0, 0, 0), (4, 1, 2, 3), (4, 0, 100, 0)]);
    assert!(entries.iter().all(|e| (e.pid, e.fd) == (7, fd.as_raw_fd())));
    drop(fd);

    let again = file.open();
    let moved: Vec<_> = entries.iter().map(|e| FileLockEntry { fd: again.as_raw_fd(), ..*e }).collect();
    run(&moved).unwrap();
    assert_eq!(dumped(&[(&descriptor(&again), 1, 7)]), moved);
    for (how, start) in [(How::Flock, 0), (How::Ofd, 4), (How::Ofd, 1 << 40)] {
        assert_eq!(take(&other, how, WRITE, start, 1).unwrap_err().errno(), libc::EAGAIN, "{how:?}");
    }
    take(&other, How::Ofd, WRITE, 5, 95).unwrap();
    take(&other, How::Ofd, READ, 100, 1).unwrap();
    take(&other, How::Flock, READ, 0, 0).unwrap();
}

#[test]
fn locks_of_a_process_come_back() {
    let file = File::new("process");
    let fd = file.open();
    take(&fd, How::Posix, WRITE, 2, 3).unwrap();
    take(&fd, How::Posix, READ, 9, 0).unwrap();
    // the copy in a Descriptor is of this very process: when it is closed, the locks are gone
    let entries = dumped(&[(&descriptor(&fd), 1, 7)]);
    assert_eq!(entries.iter().map(shape).collect::<Vec<_>>(), [(1, 1, 2, 3), (1, 0, 9, 0)]);
    assert_eq!(dumped(&[(&descriptor(&fd), 1, 7)]), []);
    run(&entries).unwrap();
    assert_eq!(dumped(&[(&descriptor(&fd), 1, 7)]), entries);
}

#[test]
fn another_holder_is_an_error_that_names_the_descriptor() {
    let file = File::new("conflict");
    let (fd, other) = (file.open(), file.open());
    take(&other, How::Ofd, WRITE, 0, 1).unwrap();
    let e = take(&fd, How::Ofd, READ, 0, 0).unwrap_err();
    let wanted = format!("lock through descriptor {}, from byte 0 on (fcntl) failed in the task", fd.as_raw_fd());
    assert_eq!((e.to_string(), e.errno()), (wanted, libc::EAGAIN));
}

#[test]
fn each_lock_is_written_once() {
    let file = File::new("once");
    let (a, b) = (file.open(), file.open());
    let lines = "1: FLOCK  ADVISORY  WRITE 77 fe:00:1 0 EOF
        2: POSIX  ADVISORY  WRITE 77 fe:00:1 2 4
        3: OFDLCK ADVISORY  READ -1 fe:00:1 8 EOF
        4: -> POSIX  ADVISORY  WRITE 78 fe:00:1 2 4";
    let (first, copy, inherited) = (with_lines(&a, lines), with_lines(&b, lines), with_lines(&a, lines));
    let entries = dumped(&[(&first, 1, 7), (&copy, 1, 7), (&inherited, 1, 8), (&copy, 2, 8)]);
    let seen: Vec<_> = entries.iter().map(|e| (e.flag, e.pid, e.fd)).collect();
    let (a, b) = (a.as_raw_fd(), b.as_raw_fd());
    // another process has its own POSIX locks on the open file; another open file has its own of everything
    assert_eq!(seen, [(2, 7, a), (1, 7, a), (4, 7, a), (1, 8, a), (2, 8, b), (1, 8, b), (4, 8, b)]);
    assert_eq!(shape(&entries[1]), (1, 1, 2, 3));
}

#[test]
fn no_locks_no_image() {
    let (opts, images) = (Options::default(), Images::new(MemoryStore::new()));
    finish(&mut DumpFiles::new(&opts, &images, vec![me()], 0)).unwrap();
    assert!(!images.exists(ImageKind::FileLocks, ()).unwrap());
}

#[test]
fn refusals() {
    let file = File::new("refusals");
    let fd = file.open();
    let (without, with) = (Options::default(), Options { file_locks: true, ..Options::default() });
    let posix = with_lines(&fd, "1: POSIX  ADVISORY  WRITE 77 fe:00:1 2 4");
    let text = "Some file locks are hold by dumping tasks! You can try --file-locks to dump them.";
    assert_eq!(refuse(&posix, &without).unwrap_err().to_string(), text);
    refuse(&posix, &with).unwrap();
    refuse(&with_lines(&fd, "1: -> POSIX  ADVISORY  WRITE 77 fe:00:1 2 4"), &without).unwrap();
    let lease = with_lines(&fd, "1: LEASE  ACTIVE    READ 77 fe:00:1 0 EOF");
    assert_eq!(refuse(&lease, &without).unwrap_err().to_string(), text);
    refuse(&lease, &with).unwrap();
    let delegation = with_lines(&fd, "1: DELEG  ACTIVE    READ 77 fe:00:1 0 EOF");
    assert!(refuse(&delegation, &with).unwrap_err().to_string().starts_with("a delegation of a file ("));
}

#[test]
fn images_that_lie() {
    let good = FileLockEntry { flag: 1, r#type: 1, pid: 7, fd: 3, start: 2, len: 3 };
    check(&good).unwrap();
    for bad in [
        FileLockEntry { flag: 0, ..good },
        FileLockEntry { flag: 3, ..good },
        FileLockEntry { flag: 8, r#type: 2, ..good },
        FileLockEntry { flag: 8, r#type: 8, ..good },
        FileLockEntry { r#type: 2, ..good },
        FileLockEntry { start: -1, ..good },
        FileLockEntry { len: -1, ..good },
        FileLockEntry { start: i64::MAX, ..good },
    ] {
        assert!(check(&bad).is_err(), "{bad:?}");
    }
    let locks = Restored { entries: vec![good] };
    let of = |pid: i32| (pid == 7).then_some(5);
    assert_eq!(locks.by_table(of, &table(5, &[3])).unwrap(), HashMap::from([(5, vec![Held { entry: good, file: 1 }])]));
    assert!(locks.by_table(of, &table(5, &[4])).unwrap_err().to_string().contains("descriptor 3"));
    assert!(locks.by_table(of, &table(6, &[3])).is_err());
    assert!(locks.by_table(|_| None, &table(5, &[3])).unwrap_err().to_string().contains("task 7"));
}

#[test]
fn as_criu_writes_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/checkpoints/sockets/images");
    let images = Images::new(FolderStore::open(&folder).unwrap());
    let theirs: Vec<FileLockEntry> = images.read_entries(ImageKind::FileLocks, ()).unwrap();
    for e in &theirs {
        check(e).unwrap();
    }
    // what its guest did: a write lock on bytes 2 to 4, and a shared flock on another descriptor
    let file = File::new("criu");
    let (a, b) = (file.open(), file.open());
    let mut posix = with_lines(&a, "1: POSIX  ADVISORY  WRITE 27700 fe:00:1 2 4");
    let mut flock = with_lines(&b, "1: FLOCK  ADVISORY  READ 27700 fe:00:1 0 EOF");
    (posix.fd, flock.fd) = (29, 30);
    assert_eq!(dumped(&[(&posix, 1, 27700), (&flock, 2, 27700)]), theirs);
}
