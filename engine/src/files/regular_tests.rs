//! Tests of `regular.rs`: files of this process go into images in memory, and come back.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use standstill_images::{Images, MemoryStore};

use super::super::testing::{descriptor, dump as dump_fds, me, open as open_id};
use super::restore::by_id;
use super::*;
use crate::files::RestoreFiles;
use crate::options::{External, InheritFd, Options};

/// A folder of its own for a test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir()
            .canonicalize()
            .unwrap()
            .join(format!("standstill-regular-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn opened(path: &Path, flags: OFlags) -> OwnedFd {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn link_of(fd: &OwnedFd) -> String {
    std::fs::read_link(magic_link(fd.as_fd())).unwrap().to_str().unwrap().to_owned()
}

fn pos(fd: &OwnedFd) -> u64 {
    rustix::fs::tell(fd).unwrap()
}

fn flags(fd: &OwnedFd) -> u32 {
    descriptor(fd).flags
}

#[test]
fn a_file_comes_back_with_offset_and_flags() {
    let dir = Folder::new("plain");
    let path = dir.file("kept", b"0123456789");
    let a = opened(&path, OFlags::RDWR | OFlags::APPEND | OFlags::NONBLOCK);
    let b = opened(&path, OFlags::WRONLY);
    let c = opened(&path, OFlags::PATH);
    let d = opened(&dir.0, OFlags::RDONLY | OFlags::DIRECTORY);
    let e = opened("/dev/null".as_ref(), OFlags::RDWR);
    rustix::fs::seek(&a, rustix::fs::SeekFrom::Start(7)).unwrap();
    rustix::fs::seek(&b, rustix::fs::SeekFrom::Start(1 << 40)).unwrap();
    let opts = Options::default();
    let all = [&a, &b, &c, &d, &e];
    let (images, ids) = dump_fds(&opts, &all).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let reg = files.entry(ids[0]).unwrap().reg.clone().unwrap();
    assert_eq!((reg.size, reg.mode, reg.mnt_id), (Some(10), Some(rustix::fs::fstat(&a).unwrap().st_mode), None));
    for (id, old) in ids.iter().zip(all) {
        let new = open_id(&mut files, *id);
        assert_eq!(flags(&new), flags(old));
        assert_eq!(link_of(&new), link_of(old));
    }
    assert_eq!(pos(&open_id(&mut files, ids[0])), 7);
    assert_eq!(pos(&open_id(&mut files, ids[1])), 1 << 40);
}

#[test]
fn descriptors_of_a_deleted_file_share_its_inode() {
    let dir = Folder::new("ghost");
    let path = dir.file("old name", b"deleted content");
    let a = opened(&path, OFlags::RDWR);
    let b = opened(&path, OFlags::RDONLY);
    let other = dir.path("second");
    std::fs::hard_link(&path, &other).unwrap();
    let c = opened(&other, OFlags::WRONLY);
    rustix::fs::seek(&a, rustix::fs::SeekFrom::Start(8)).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&other).unwrap();
    let opts = Options::default();
    let all = [&a, &b, &c];
    let (images, ids) = dump_fds(&opts, &all).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let new: Vec<_> = ids.iter().map(|id| open_id(&mut files, *id)).collect();
    assert!(dir.names().is_empty());
    for (old, new) in all.into_iter().zip(&new) {
        assert_eq!(link_of(new), link_of(old));
        assert_eq!(flags(new), flags(old));
        assert_eq!(rustix::fs::fstat(new).unwrap().st_nlink, 0);
    }
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    assert!(new.iter().all(|fd| inode(fd) == inode(&new[0])));
    assert_eq!(pos(&new[0]), 8);
    rustix::io::pwrite(&new[2], b"rewrites", 0).unwrap();
    let mut text = [0; 15];
    rustix::io::pread(&new[1], &mut text[..], 0).unwrap();
    assert_eq!(&text, b"rewritescontent");
}

#[test]
fn a_ghost_over_the_limit_is_refused() {
    let dir = Folder::new("limit");
    let path = dir.file("big", &vec![1; 2 << 20]);
    let fd = opened(&path, OFlags::RDONLY);
    std::fs::remove_file(&path).unwrap();
    let error = format!("{:?}", dump_fds(&Options::default(), &[&fd]).unwrap_err());
    assert!(error.contains("Can't dump ghost file") && error.contains("of 2097152 size, increase limit"), "{error}");
    let opts = Options { ghost_limit: 4 << 20, ..Options::default() };
    let (images, ids) = dump_fds(&opts, &[&fd]).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    assert_eq!(rustix::fs::fstat(open_id(&mut files, ids[0])).unwrap().st_size, 2 << 20);
}

#[test]
fn a_name_that_looks_deleted_is_a_name() {
    let dir = Folder::new("suffix");
    let path = dir.file("x (deleted)", b"here");
    let fd = opened(&path, OFlags::RDONLY);
    let again = dir.file("y", b"again");
    let relinked = opened(&again, OFlags::RDONLY);
    std::fs::hard_link(&again, dir.path("z")).unwrap();
    std::fs::remove_file(&again).unwrap();
    std::fs::hard_link(dir.path("z"), &again).unwrap();
    let opts = Options::default();
    let (images, ids) = dump_fds(&opts, &[&fd, &relinked]).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    assert_eq!(link_of(&open_id(&mut files, ids[0])), path.to_str().unwrap());
    assert_eq!(link_of(&open_id(&mut files, ids[1])), again.to_str().unwrap());
}

#[test]
fn a_lost_name_needs_link_remap() {
    let dir = Folder::new("link");
    let path = dir.file("old", b"linked");
    std::fs::hard_link(&path, dir.path("elsewhere")).unwrap();
    let fd = opened(&path, OFlags::RDONLY);
    std::fs::remove_file(&path).unwrap();
    let error = format!("{:?}", dump_fds(&Options::default(), &[&fd]).unwrap_err());
    assert!(error.contains("Can't create link remap for") && error.contains("Use --link-remap option."), "{error}");

    let opts = Options { link_remap: true, ..Options::default() };
    // a dump that fails, or whose tasks go on, leaves no name
    dump_fds(&opts, &[&fd]).unwrap();
    assert_eq!(dir.names(), ["elsewhere"]);

    let images = Images::new(MemoryStore::new());
    let mut dumped = DumpFiles::new(&opts, &images, vec![me()], 0);
    let id = dumped.descriptor(&descriptor(&fd)).unwrap().id;
    dumped.finish().unwrap();
    dumped.tasks_end();
    drop(dumped);
    assert_eq!(dir.names().len(), 2);
    std::fs::write(&path, "somebody else's").unwrap();
    for _ in 0..2 {
        // only a restore that worked takes the name away
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let new = open_id(&mut files, id);
        assert!(link_of(&new).ends_with("old.cr_link (deleted)"));
        assert_eq!(rustix::fs::fstat(&new).unwrap().st_ino, rustix::fs::fstat(&fd).unwrap().st_ino);
    }
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    done(&mut files).unwrap();
    assert_eq!(dir.names(), ["elsewhere", "old"]);
}

#[test]
fn a_path_that_leads_elsewhere_is_found() {
    let dir = Folder::new("over");
    let path = dir.file("inner", b"1");
    let fd = opened(&path, OFlags::RDONLY);
    // the kernel follows a rename; only a look at the root that the paths are for can differ
    let images = Images::new(MemoryStore::new());
    let opts = Options::default();
    let mut files = DumpFiles::new(&opts, &images, vec![me()], 0);
    let root = dir.path("root");
    std::fs::create_dir_all(root.join(path.parent().unwrap().strip_prefix("/").unwrap())).unwrap();
    std::fs::write(root.join(path.strip_prefix("/").unwrap()), "another").unwrap();
    files.regular.set_root(opened(&root, OFlags::PATH | OFlags::DIRECTORY));
    let error = format!("{:?}", files.descriptor(&descriptor(&fd)).unwrap_err());
    assert!(error.contains("something else is there now"), "{error}");
}

#[test]
fn what_changed_is_an_error_and_flags_say_which() {
    let dir = Folder::new("changed");
    let path = dir.file("file", b"0123456789");
    let log = opened(&dir.file("log", b"a line"), OFlags::WRONLY | OFlags::APPEND);
    let fd = opened(&path, OFlags::RDONLY);
    let opts = Options::default();
    let (images, ids) = dump_fds(&opts, &[&fd, &log]).unwrap();
    std::fs::write(&path, "longer than it was").unwrap();
    std::fs::write(dir.path("log"), "a line and another one").unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let error = format!("{:?}", files.open(ids[0]).unwrap_err());
    assert!(error.contains("has bad size 18 (expect 10)"), "{error}");
    open_id(&mut files, ids[1]);
}

#[test]
fn mapped_files_share_ids_and_open_as_the_area_needs() {
    let dir = Folder::new("mapped");
    let path = dir.file("lib", b"code");
    let fd = opened(&path, OFlags::PATH);
    let stat = rustix::fs::fstat(&fd).unwrap();
    let images = Images::new(MemoryStore::new());
    let opts = Options::default();
    let mut dumped = DumpFiles::new(&opts, &images, vec![me()], 0);
    let name = path.as_os_str().as_bytes();
    let id = mapped(&mut dumped, &fd, name, &stat).unwrap();
    assert_eq!(mapped(&mut dumped, &fd, name, &stat).unwrap(), id);
    let exe = dumped.link(me(), "exe").unwrap();
    let cwd = dumped.link(me(), "cwd").unwrap();
    dumped.finish().unwrap();
    drop(dumped);
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let both = opened_for_mapping(&mut files, id, libc::O_RDWR as u32).unwrap();
    assert_eq!(rustix::fs::fcntl_getfl(&both).unwrap() & OFlags::ACCMODE, OFlags::RDWR);
    let program = super::exe(&mut files, exe).unwrap();
    assert_eq!(link_of(&program), std::env::current_exe().unwrap().to_str().unwrap());
    assert!(!by_id(&files, exe).unwrap().build_id.is_empty() || cfg!(not(target_env = "gnu")));
    let here = folder(&mut files, cwd).unwrap();
    assert_eq!(link_of(&here), std::env::current_dir().unwrap().to_str().unwrap());
    assert!(folder(&mut files, id).is_err());
}

#[test]
fn files_of_tasks_open_late() {
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let dead = i32::try_from(child.id()).unwrap();
    let gone = opened(format!("/proc/{dead}/status").as_ref(), OFlags::RDONLY);
    let folder = opened(format!("/proc/{dead}").as_ref(), OFlags::RDONLY);
    child.kill().unwrap();
    child.wait().unwrap();
    let alive = opened(format!("/proc/{}/status", me()).as_ref(), OFlags::RDONLY);
    let general = opened("/proc/version".as_ref(), OFlags::RDONLY);
    let opts = Options::default();
    let (images, ids) = dump_fds(&opts, &[&gone, &folder, &alive, &general]).unwrap();
    let files = RestoreFiles::read(&opts, &images).unwrap();
    assert_eq!(files.regular.dead_pids.iter().copied().collect::<Vec<_>>(), [dead]);
    assert_eq!(ids.iter().map(|id| opens_late(&files, *id)).collect::<Vec<_>>(), [true, true, true, false]);
    assert_eq!(by_id(&files, ids[1]).unwrap().name, format!("/proc/{dead}").into_bytes());
}

#[test]
fn the_caller_can_stand_in() {
    let dir = Folder::new("inherit");
    let fd = opened(&dir.file("a", b"first"), OFlags::RDWR);
    let stand_in = File::options().read(true).write(true).open(dir.file("b", b"other")).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&stand_in);
    let mount = rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::MNT_ID).unwrap().stx_mnt_id;
    let key = format!("file[{mount:x}:{:x}]", rustix::fs::fstat(&fd).unwrap().st_ino);
    let outside = External { key: key.clone(), value: None };
    let opts = Options { external: vec![outside], ..Options::default() };
    let (images, ids) = dump_fds(&opts, &[&fd]).unwrap();
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    assert!(format!("{:?}", files.open(ids[0]).unwrap_err()).contains("--inherit-fd"));

    let inherit_fds = vec![InheritFd { fd: number, id: key }];
    let opts = Options { inherit_fds, file_validation: FileValidation::FileSize, ..Options::default() };
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let new = File::from(open_id(&mut files, ids[0]));
    assert_eq!(new.metadata().unwrap().ino(), stand_in.metadata().unwrap().ino());
    let mut text = [0; 5];
    new.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"other");
}

#[test]
fn lies_are_told() {
    let lie = |name: &[u8], remap: RemapFilePathEntry| {
        let images = Images::new(MemoryStore::new());
        let reg = RegFileEntry { id: 1, name: name.to_vec(), fown: no_owner(), ..Default::default() };
        let entry = FileEntry { r#type: FdTypes::Reg as i32, id: 1, reg: Some(reg), ..Default::default() };
        images.write_entries(ImageKind::Files, (), [entry]).unwrap();
        images.write_entries(ImageKind::RemapFpath, (), [remap]).unwrap();
        let opts = Options::default();
        let result = RestoreFiles::read(&opts, &images).map(|mut files| files.open(1).map(drop));
        result.and_then(|r| r).unwrap_err()
    };
    let ghost = RemapFilePathEntry { orig_id: 1, remap_id: 1, remap_type: Some(RemapType::Ghost as i32) };
    lie(b"relative", ghost);
    lie(b"/tmp/\0", ghost);
    lie(b"/tmp/x", ghost);
    lie(b"/tmp/x", RemapFilePathEntry { orig_id: 2, ..ghost });
    lie(b"/tmp/x", RemapFilePathEntry { remap_type: Some(RemapType::Linked as i32), ..ghost });
    lie(b"/tmp/x", RemapFilePathEntry { remap_type: Some(RemapType::Linked as i32), remap_id: 3, ..ghost });
    lie(b"/tmp/x", RemapFilePathEntry { remap_type: Some(RemapType::Procfs as i32), remap_id: 0, ..ghost });
}
