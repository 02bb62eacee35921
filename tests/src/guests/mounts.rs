//! Mount namespaces of a tree's own.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::support::*;

fn c(path: impl AsRef<Path>) -> CString {
    CString::new(path.as_ref().as_os_str().as_encoded_bytes()).unwrap_or_default()
}

/// Mounts of our own, which nobody else sees changed.
fn private() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWNS) });
    change(Path::new("/"), libc::MS_REC | libc::MS_PRIVATE);
}

fn change(at: &Path, flags: libc::c_ulong) {
    let none = std::ptr::null();
    sys(unsafe { libc::mount(none, c(at).as_ptr(), none, flags, none.cast()) });
}

fn mount(kind: &str, at: &Path, flags: libc::c_ulong, data: &str) {
    check!(fs::create_dir_all(at).is_ok());
    let (name, data) = (c(kind), c(data));
    sys(unsafe { libc::mount(name.as_ptr(), c(at).as_ptr(), name.as_ptr(), flags, data.as_ptr().cast()) });
}

fn bind(from: &Path, to: &Path) {
    if from.is_dir() {
        check!(fs::create_dir_all(to).is_ok());
    } else {
        check!(fs::write(to, "").is_ok());
    }
    let none = std::ptr::null();
    sys(unsafe { libc::mount(c(from).as_ptr(), c(to).as_ptr(), none, libc::MS_BIND, none.cast()) });
}

fn unmount(at: &Path) {
    sys(unsafe { libc::umount2(c(at).as_ptr(), 0) });
}

fn place(name: &str) -> PathBuf {
    folder().join(name)
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| format!("{}: {e}", path.display()))
}

fn inode(path: &Path) -> (u64, u64) {
    fs::metadata(path).map_or((0, 0), |m| (m.dev(), m.ino()))
}

/// Options of the mount that a path leads to, as the kernel says them.
fn options(at: &Path) -> String {
    let all = text(Path::new("/proc/self/mountinfo"));
    let line = all.lines().rfind(|line| line.split(' ').nth(4).map(Path::new) == Some(at));
    line.and_then(|line| line.split(' ').nth(5)).unwrap_or("none").to_owned()
}

/// A tmpfs with files that are open, mapped, deleted, linked twice, and someone's working folder; binds of it, one of them
/// read-only.
pub(super) fn tmpfs() {
    private();
    let t = place("t");
    mount("tmpfs", &t, libc::MS_NOSUID | libc::MS_NODEV, "size=4m,mode=750");
    check!(fs::create_dir_all(t.join("sub/work")).is_ok());
    check!(fs::write(t.join("sub/file"), "content").is_ok());
    check!(fs::hard_link(t.join("sub/file"), t.join("second")).is_ok());
    let big = fs::File::create(t.join("big"));
    check!(big.is_ok_and(|f| f.write_all_at(b"end", 3 << 20).is_ok()));
    bind(&t.join("sub"), &place("bound"));
    bind(&t.join("sub/file"), &place("one-file"));
    bind(&t, &place("read-only"));
    change(&place("read-only"), libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOEXEC);
    let Ok(open) = fs::File::options().read(true).write(true).open(place("bound").join("file")) else {
        fail("a file is not there")
    };
    sys(unsafe { libc::lseek(open.as_raw_fd(), 3, libc::SEEK_SET) });
    let gone = fs::File::options().read(true).write(true).create_new(true).open(t.join("gone"));
    let Ok(gone) = gone else { fail("a file cannot be made") };
    check!(gone.write_all_at(b"gone", 0).is_ok() && fs::remove_file(t.join("gone")).is_ok());
    let flags = libc::MAP_SHARED;
    let map = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, open.as_raw_fd(), 0)
    };
    check!(map != libc::MAP_FAILED);
    let before = (options(&t), options(&place("bound")), options(&place("read-only")));
    let child = fork(|| {
        check!(std::env::set_current_dir(t.join("sub/work")).is_ok());
        wait_for_check();
        check_eq!(std::env::current_dir().ok(), Some(t.join("sub/work")));
        check_eq!(text(Path::new("../file")), "Content");
        0
    });
    eventually("a working folder", || {
        fs::read_link(format!("/proc/{child}/cwd")).is_ok_and(|cwd| cwd.ends_with("sub/work"))
    });
    unsafe { map.cast::<u8>().write(b'C') };
    ready();
    check_eq!((options(&t), options(&place("bound")), options(&place("read-only"))), before);
    check_eq!(wait(child), 0);
    for path in [t.join("sub/file"), t.join("second"), place("bound/file"), place("one-file")] {
        check_eq!(text(&path), "Content");
        check_eq!(inode(&path), inode(&t.join("second")));
    }
    check_eq!(unsafe { libc::lseek(open.as_raw_fd(), 0, libc::SEEK_CUR) }, 3);
    check!(open.write_all_at(b"w", 1).is_ok());
    check_eq!(text(&t.join("second")), "Cwntent");
    check_eq!(unsafe { map.cast::<u8>().add(1).read() }, b'w');
    let mut bytes = [0; 4];
    check!(gone.read_exact_at(&mut bytes, 0).is_ok());
    check_eq!(&bytes, b"gone");
    check_eq!(gone.metadata().map(|m| m.nlink()).ok(), Some(0));
    let big = fs::metadata(t.join("big"));
    check!(big.is_ok_and(|m| m.len() == (3 << 20) + 3 && m.blocks() < 64));
    check!(fs::write(place("read-only").join("x"), "x").is_err());
    check!(fs::write(t.join("x"), "x").is_ok());
    check_eq!(text(&place("read-only").join("x")), "x");
}

/// Files that are open on mounts which others hide, by one on top and by one on a folder above.
pub(super) fn hidden() {
    private();
    let a = place("a");
    mount("tmpfs", &a, 0, "");
    check!(fs::write(a.join("lower"), "lower").is_ok());
    mount("tmpfs", &a.join("below"), 0, "");
    check!(fs::write(a.join("below/f"), "below").is_ok());
    let lower = fs::File::options().read(true).write(true).open(a.join("lower"));
    let below = fs::File::open(a.join("below/f"));
    let (Ok(lower), Ok(below)) = (lower, below) else { fail("no files") };
    mount("tmpfs", &a, 0, "");
    check!(fs::write(a.join("upper"), "upper").is_ok());
    mount("tmpfs", &place("x/y"), 0, "");
    check!(fs::write(place("x/y/under"), "under").is_ok());
    let Ok(under) = fs::File::open(place("x/y/under")) else { fail("no file") };
    // beside the first, on the folder above it
    mount("tmpfs", &place("x"), 0, "");
    ready();
    let read = |file: &fs::File| {
        let mut bytes = [0; 5];
        check!(file.read_exact_at(&mut bytes, 0).is_ok());
        String::from_utf8_lossy(&bytes).into_owned()
    };
    check_eq!((read(&lower), read(&below), read(&under)), ("lower".into(), "below".into(), "under".into()));
    check!(!place("x/y").exists());
    check_eq!(text(&a.join("upper")), "upper");
    check!(lower.write_all_at(b"L", 0).is_ok());
    let of = |file: &fs::File| file.metadata().map_or((0, 0), |m| (m.dev(), m.ino()));
    unmount(&a);
    check_eq!(text(&a.join("lower")), "Lower");
    check_eq!(inode(&a.join("lower")), of(&lower));
    check_eq!(inode(&a.join("below/f")), of(&below));
    unmount(&place("x"));
    check_eq!(inode(&place("x/y/under")), of(&under));
    // busy: the descriptors hold them
    check!(unsafe { libc::umount2(c(place("x/y")).as_ptr(), 0) } != 0);
    drop(under);
    unmount(&place("x/y"));
}

/// Peers, slaves, and slaves that have peers of their own: what is mounted on one comes to those that it should.
pub(super) fn shared() {
    private();
    let (s, peer, slave, both, private) = (place("s"), place("peer"), place("slave"), place("both"), place("private"));
    mount("tmpfs", &s, 0, "");
    change(&s, libc::MS_SHARED);
    bind(&s, &peer);
    bind(&s, &slave);
    change(&slave, libc::MS_SLAVE);
    bind(&slave, &both);
    change(&both, libc::MS_SHARED);
    bind(&s, &private);
    change(&private, libc::MS_PRIVATE);
    for name in ["before", "after", "up"] {
        check!(fs::create_dir(s.join(name)).is_ok());
    }
    mount("tmpfs", &s.join("before"), 0, "");
    check!(fs::write(s.join("before/f"), "f").is_ok());
    let seen = |name: &str| [&s, &peer, &slave, &both, &private].map(|at| at.join(name).join("f").exists());
    let wanted = [true, true, true, true, false];
    check_eq!(seen("before"), wanted);
    ready();
    check_eq!(seen("before"), wanted);
    mount("tmpfs", &peer.join("after"), 0, "");
    check!(fs::write(peer.join("after/f"), "f").is_ok());
    check_eq!(seen("after"), wanted);
    mount("tmpfs", &slave.join("up"), 0, "");
    check!(fs::write(slave.join("up/f"), "f").is_ok());
    check_eq!(seen("up"), [false, false, true, false, false]);
    unmount(&s.join("before"));
    check_eq!(seen("before"), [false; 5]);
}

/// A child with mounts of its own, some of which are peers of its parent's.
pub(super) fn nested() {
    private();
    let (s, own) = (place("s"), place("own"));
    mount("tmpfs", &s, 0, "");
    change(&s, libc::MS_SHARED);
    for name in ["before", "after", "back"] {
        check!(fs::create_dir(s.join(name)).is_ok());
    }
    let child = fork(|| {
        sys(unsafe { libc::unshare(libc::CLONE_NEWNS) });
        mount("tmpfs", &own, 0, "");
        check!(fs::write(own.join("f"), "mine").is_ok());
        let Ok(file) = fs::File::options().read(true).write(true).open(own.join("f")) else { fail("no file") };
        check!(std::env::set_current_dir(&own).is_ok());
        mount("tmpfs", &s.join("before"), 0, "");
        let namespace = fs::read_link("/proc/self/ns/mnt").ok();
        check!(
            namespace.is_some()
                && namespace != fs::read_link(format!("/proc/{}/ns/mnt", unsafe { libc::getppid() })).ok()
        );
        check!(fs::write(s.join("before/f"), "both").is_ok());
        wait_for_check();
        eventually("what the parent mounts", || s.join("after/f").exists());
        check_eq!(text(Path::new("f")), "mine");
        check!(file.write_all_at(b"M", 0).is_ok());
        check_eq!(text(&own.join("f")), "Mine");
        check_eq!(text(&s.join("before/f")), "both");
        mount("tmpfs", &s.join("back"), 0, "");
        check!(fs::write(s.join("back/f"), "").is_ok());
        0
    });
    eventually("what the child mounts", || s.join("before/f").exists());
    ready();
    check!(!own.join("f").exists());
    check_eq!(text(&s.join("before/f")), "both");
    mount("tmpfs", &s.join("after"), 0, "");
    check!(fs::write(s.join("after/f"), "").is_ok());
    check_eq!(wait(child), 0);
    check!(s.join("back/f").exists());
}

/// File systems that the kernel fills; a root whose folder is gone; and one that cannot be bound.
pub(super) fn kinds() {
    private();
    mount("proc", &place("proc"), libc::MS_RDONLY, "");
    mount("devpts", &place("pts"), 0, "newinstance,ptmxmode=0666,mode=620");
    mount("tmpfs", &place("t"), 0, "");
    check!(fs::create_dir_all(place("t/gone/deep")).is_ok());
    bind(&place("t/gone/deep"), &place("deleted"));
    check!(fs::remove_dir_all(place("t/gone")).is_ok());
    mount("tmpfs", &place("unbindable"), 0, "");
    change(&place("unbindable"), libc::MS_UNBINDABLE);
    let folder = unsafe { libc::open(c(place("deleted")).as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY) };
    sys(folder);
    let folder = unsafe { OwnedFd::from_raw_fd(folder) };
    drop(folder);
    ready();
    let me = std::process::id().to_string();
    check!(text(&place("proc/self/stat")).starts_with(&me));
    check!(fs::write(place("proc/self/comm"), "x").is_err());
    check!(place("pts/ptmx").exists());
    check!(fs::write(place("deleted/x"), "").is_err());
    check!(!place("t/gone").exists());
    let none = std::ptr::null();
    check!(fs::create_dir(place("to")).is_ok());
    let (from, to) = (c(place("unbindable")), c(place("to")));
    check!(unsafe { libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()) } != 0);
}

/// Files without a name, one that is open through two mounts of its file system, of which one is read-only, under the same
/// name, and one with a name in another mount; with `--link-remap`.
pub(super) fn nameless() {
    private();
    let (a, b, d) = (place("a"), place("b"), place("d"));
    mount("tmpfs", &a, 0, "");
    bind(&a, &b);
    bind(&a, &d);
    let keep = |name: &str, bytes: &str| check!(fs::write(a.join(name), bytes).is_ok());
    keep("gone", "gone");
    keep("linked", "linked");
    check!(fs::create_dir(a.join("names")).is_ok());
    check!(fs::hard_link(a.join("linked"), a.join("names/other")).is_ok());
    let open = |path: PathBuf| fs::File::open(path).unwrap_or_else(|e| fail(e));
    let files = [open(a.join("gone")), open(b.join("gone")), open(d.join("linked"))];
    for name in ["gone", "linked"] {
        check!(fs::remove_file(a.join(name)).is_ok());
    }
    change(&b, libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY);
    let mount_of = |file: &fs::File| {
        let info = proc_self(&format!("fdinfo/{}", file.as_raw_fd()));
        info.lines().find_map(|line| line.strip_prefix("mnt_id:").map(|id| id.trim().to_owned()))
    };
    let link = |file: &fs::File| fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
    let before: Vec<_> = files.iter().map(&link).collect();
    ready();
    check_eq!(files.iter().map(&link).collect::<Vec<_>>(), before);
    let of = |file: &fs::File| file.metadata().map_or((0, 0), |m| (m.dev(), m.ino()));
    check_eq!(of(&files[0]), of(&files[1]));
    check_eq!(inode(&a.join("names/other")), of(&files[2]));
    check!(mount_of(&files[0]) != mount_of(&files[1]));
    check!(files[..2].iter().all(|file| mount_of(file) != mount_of(&files[2])));
    let read = |file: &fs::File| {
        let mut bytes = [0; 8];
        let n = file.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    };
    check_eq!(files.iter().map(read).collect::<Vec<_>>(), ["gone", "gone", "linked"]);
    check!(fs::write(b.join("x"), "").is_err());
    check_eq!(fs::read_dir(&a).map_or(9, Iterator::count), 1);
    check_eq!(fs::read_dir(a.join("names")).map_or(9, Iterator::count), 1);
}

/// A socket whose name is under what was mounted on its folder, one in a child's mounts, and watches on files there.
pub(super) fn sockets_and_watches() {
    use std::os::unix::net::UnixDatagram;
    private();
    let (s, own) = (place("s"), place("own"));
    mount("tmpfs", &place("t"), 0, "");
    let bind = |path: &Path| UnixDatagram::bind(path).unwrap_or_else(|e| fail(e));
    check!(fs::create_dir(&s).is_ok());
    let covered = bind(&s.join("name"));
    mount("tmpfs", &s, 0, "");
    let watch = |path: &Path| {
        let fd = super::inotify::instance();
        super::inotify::watch(&fd, &path.display().to_string(), libc::IN_CREATE);
        fd
    };
    let created = |fd: &OwnedFd| {
        let mut bytes = [0u8; 64];
        unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), 64) > 0 }
    };
    let stage = Shared::new();
    let child = fork(|| {
        sys(unsafe { libc::unshare(libc::CLONE_NEWNS) });
        mount("tmpfs", &own, 0, "");
        let there = bind(&own.join("name"));
        let watched = watch(&own);
        stage.set(0, 1);
        stage.wait(0, 2);
        let sender = UnixDatagram::unbound().unwrap_or_else(|e| fail(e));
        check!(sender.send_to(b"child", own.join("name")).is_ok());
        let mut bytes = [0; 9];
        check_eq!(there.recv(&mut bytes).ok(), Some(5));
        check!(!created(&watched));
        check!(fs::write(own.join("new"), "").is_ok());
        check!(created(&watched));
        0
    });
    stage.wait(0, 1);
    let watched = watch(&place("t"));
    ready();
    check!(fs::write(place("t/new"), "").is_ok());
    check!(created(&watched));
    check!(!own.join("name").exists());
    // nothing of the socket is in what covers it
    check_eq!(fs::read_dir(&s).map_or(9, Iterator::count), 0);
    unmount(&s);
    let sender = UnixDatagram::unbound().unwrap_or_else(|e| fail(e));
    check!(sender.send_to(b"parent", s.join("name")).is_ok());
    let mut bytes = [0; 9];
    check_eq!(covered.recv(&mut bytes).ok(), Some(6));
    stage.set(0, 2);
    check_eq!(wait(child), 0);
}
