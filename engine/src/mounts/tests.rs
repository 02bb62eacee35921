//! Namespaces that are made, dumped, made again from the images, and compared.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use standstill_images::{Images, MemoryStore};

use super::dump::{Mounts, Namespace};
use super::restore::{self, Made, Owners};
use super::table::{Mount, Table};
use crate::options::Options;
use crate::proc::mountinfo;
use crate::sys::mount;

const NS: u32 = 11;

/// A namespace whose root is `root`, in which `build` was run; it lives until this is dropped.
struct Held {
    tid: i32,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Held {
    fn new(root: &Path, build: impl FnOnce() + Send + 'static) -> Held {
        let (ready, wait) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        let root = root.to_path_buf();
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            mount::enter_private_copy().unwrap();
            rustix::mount::mount_bind(&root, &root).unwrap();
            std::env::set_current_dir(&root).unwrap();
            rustix::process::pivot_root(".", ".").unwrap();
            rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH).unwrap();
            build();
            ready.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            let _ = stopped.recv();
        });
        Held { tid: wait.recv().expect("the namespace could not be made"), stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIP: mounts need root");
    }
    root
}

fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("standstill-mounts-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn options(root: &Path) -> Options {
    Options { root: Some(root.to_path_buf()), ..Options::default() }
}

fn tmpfs(at: &str, data: &std::ffi::CStr) {
    std::fs::create_dir_all(at).unwrap();
    rustix::mount::mount("none", at, "tmpfs", MountFlags::empty(), data).unwrap();
}

fn change(at: &str, to: MountPropagationFlags) {
    rustix::mount::mount_change(at, to).unwrap();
}

fn bind(from: &str, to: &str) {
    if Path::new(from).is_dir() {
        std::fs::create_dir_all(to).unwrap();
    } else {
        std::fs::write(to, "").unwrap();
    }
    rustix::mount::mount_bind(from, to).unwrap();
}

fn dump(opts: &Options, held: &Held, images: &Images) -> Mounts {
    let mut mounts = Mounts::read(opts, &[Namespace { id: NS, pid: held.tid, own_cgroups: false }]).unwrap();
    mounts.write(images).unwrap();
    mounts
}

fn remake(opts: &Options, images: &Images) -> Made {
    let table = restore::read(opts, images, &[NS]).unwrap();
    let mut made = restore::make(opts, images, table, &Owners::default()).unwrap();
    made.settle().unwrap();
    made
}

/// The mounts of a namespace, as the kernel says them.
fn seen(namespace: &OwnedFd) -> Table {
    let text = mount::apart(|| {
        let own = rustix::fs::open("/proc/thread-self", OFlags::PATH, Mode::empty()).unwrap();
        mount::enter(namespace.as_fd())?;
        let info = rustix::fs::openat(&own, "mountinfo", OFlags::RDONLY, Mode::empty()).unwrap();
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(info), &mut text).unwrap();
        Ok(text)
    })
    .unwrap();
    let mut table = Table::default();
    let mounts = mountinfo::parse(&text).unwrap();
    table.add(NS, mounts.iter().map(|m| Mount::from_proc(NS, m, &[]).unwrap()).collect()).unwrap();
    table
}

/// Compares by place: ids, devices and numbers of groups are others now, but what is the same must be the same again.
fn compare(before: &Table, after: &Table) {
    fn paths<'t>(t: &'t Table, m: &'t Mount, name: String, out: &mut Vec<(String, &'t Mount)>) {
        out.push((name.clone(), m));
        let mut children = t.children(m);
        children.sort_by(|a, b| a.point.cmp(&b.point));
        for c in children {
            paths(t, c, format!("{name}>{}", String::from_utf8_lossy(&c.point)), out);
        }
    }
    let list = |t: &'_ Table| {
        let mut out = Vec::new();
        paths(t, t.root(NS).unwrap(), String::new(), &mut out);
        out.into_iter().map(|(name, m)| (name, m.clone())).collect::<Vec<_>>()
    };
    let (a, b) = (list(before), list(after));
    let names = |l: &[(String, Mount)]| l.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for ((name, x), (_, y)) in a.iter().zip(&b) {
        let options = |m: &Mount| String::from_utf8_lossy(&m.options).replace(",newinstance", "");
        assert_eq!(x.flags, y.flags, "flags of {name}: {:x} {:x}", x.flags, y.flags);
        assert_eq!(options(x), options(y), "options of {name}");
        assert_eq!((x.kind, x.sb_flags, x.deleted, &x.source), (y.kind, y.sb_flags, y.deleted, &y.source), "{name}");
        assert_eq!(String::from_utf8_lossy(&x.root), String::from_utf8_lossy(&y.root), "root of {name}");
    }
    for i in 0..a.len() {
        for j in 0..a.len() {
            let same = |l: &[(String, Mount)], f: fn(&Mount, &Mount) -> bool| f(&l[i].1, &l[j].1);
            for (what, f) in [
                ("peers", (|x, y| x.shared == y.shared) as fn(&Mount, &Mount) -> bool),
                ("masters", |x, y| x.master == y.master),
                ("slaves", |x, y| x.shared != 0 && x.shared == y.master),
                ("file systems", |x, y| x.dev == y.dev),
            ] {
                assert_eq!(same(&a, f), same(&b, f), "{what} of {} and {}", a[i].0, a[j].0);
            }
        }
    }
}

/// What a mount that no path leads to has in a file.
fn read_in(made: &Made, id: u32, name: &str) -> String {
    let fd = rustix::fs::openat(&made.mounts[&id], name, OFlags::RDONLY, Mode::empty()).unwrap();
    std::io::read_to_string(std::fs::File::from(fd)).unwrap()
}

/// Goes after the namespaces: who removes a folder unmounts what is on it anywhere.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn there_and_back(name: &str, build: impl FnOnce() + Send + 'static) -> Option<(Table, Made, Folder)> {
    if !is_root() {
        return None;
    }
    let root = folder(name);
    let held = Held::new(&root, build);
    let opts = options(&root);
    let images = Images::new(MemoryStore::new());
    let before = dump(&opts, &held, &images).table.clone();
    let made = remake(&opts, &images);
    compare(&before, &seen(&made.namespaces[&NS]));
    drop(held);
    Some((before, made, Folder(root)))
}

#[test]
fn content_binds_and_flags() {
    let made = there_and_back("binds", || {
        tmpfs("/t", c"size=1m,mode=1750");
        std::fs::create_dir_all("/t/sub/deep").unwrap();
        std::fs::write("/t/sub/file", "content").unwrap();
        bind("/t/sub", "/bound");
        bind("/t/sub/file", "/file");
        tmpfs("/t/sub/deep", c"");
        std::fs::write("/t/sub/deep/inner", "inner").unwrap();
        std::fs::create_dir_all("/plain/below").unwrap();
        bind("/plain/below", "/of-root");
        let flags =
            MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
        std::fs::create_dir_all("/ro").unwrap();
        rustix::mount::mount("none", "/ro", "tmpfs", flags, c"").unwrap();
        bind("/t/sub", "/bound-ro");
        rustix::mount::mount_remount("/bound-ro", MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
        std::fs::create_dir_all("/proc").unwrap();
        rustix::mount::mount("proc", "/proc", "proc", MountFlags::NOSUID, c"hidepid=invisible").unwrap();
        std::fs::create_dir_all("/pts").unwrap();
        rustix::mount::mount("devpts", "/pts", "devpts", MountFlags::empty(), c"newinstance,mode=620,ptmxmode=666")
            .unwrap();
    });
    let Some((before, made, _folder)) = made else { return };
    let id = |point: &[u8]| before.of(NS).find(|m| m.point == point).unwrap().id;
    assert_eq!(read_in(&made, id(b"/bound"), "file"), "content");
    assert_eq!(read_in(&made, id(b"/t/sub/deep"), "inner"), "inner");
    let root = &made.roots[&NS];
    let fd = rustix::fs::openat(root, "t/sub/deep/inner", OFlags::RDONLY, Mode::empty()).unwrap();
    assert_eq!(std::io::read_to_string(std::fs::File::from(fd)).unwrap(), "inner");
}

#[test]
fn hidden_mounts() {
    let made = there_and_back("hidden", || {
        tmpfs("/a", c"");
        std::fs::write("/a/lower", "lower").unwrap();
        tmpfs("/a/b", c"");
        std::fs::write("/a/b/beside", "beside").unwrap();
        tmpfs("/a", c"");
        std::fs::write("/a/upper", "upper").unwrap();
        tmpfs("/x/y", c"");
        std::fs::write("/x/y/under", "under").unwrap();
        // on the folder above, beside the first: hides it without being on it
        rustix::mount::mount("none", "/x", "tmpfs", MountFlags::empty(), c"").unwrap();
        tmpfs("/unbindable", c"");
        std::fs::write("/unbindable/u", "u").unwrap();
        change("/unbindable", MountPropagationFlags::UNBINDABLE);
    });
    let Some((before, made, _folder)) = made else { return };
    let find = |point: &[u8], hidden: bool| {
        before.of(NS).find(|m| m.point == point && before.is_hidden(m) == hidden).unwrap().id
    };
    assert_eq!(read_in(&made, find(b"/a", true), "lower"), "lower");
    assert_eq!(read_in(&made, find(b"/a/b", true), "beside"), "beside");
    assert_eq!(read_in(&made, find(b"/a", false), "upper"), "upper");
    assert_eq!(read_in(&made, find(b"/x/y", true), "under"), "under");
    assert_eq!(read_in(&made, find(b"/unbindable", false), "u"), "u");
}

#[test]
fn sharing() {
    there_and_back("sharing", || {
        tmpfs("/s", c"");
        change("/s", MountPropagationFlags::SHARED);
        bind("/s", "/peer");
        bind("/s", "/slave");
        change("/slave", MountPropagationFlags::DOWNSTREAM);
        bind("/slave", "/both");
        change("/both", MountPropagationFlags::SHARED);
        bind("/both", "/both-peer");
        bind("/both", "/slave-of-slave");
        change("/slave-of-slave", MountPropagationFlags::DOWNSTREAM);
        // this one comes to all of them
        tmpfs("/s/in", c"");
        bind("/s/in", "/private");
        change("/private", MountPropagationFlags::PRIVATE);
    });
}

#[test]
fn deleted_roots() {
    let made = there_and_back("deleted", || {
        tmpfs("/t", c"");
        std::fs::create_dir_all("/t/gone/deeper").unwrap();
        std::fs::write("/t/file", "").unwrap();
        bind("/t/gone/deeper", "/folder");
        bind("/t/file", "/file");
        std::fs::remove_dir_all("/t/gone").unwrap();
        std::fs::remove_file("/t/file").unwrap();
    });
    let Some((before, made, _folder)) = made else { return };
    assert_eq!(before.of(NS).filter(|m| m.deleted).count(), 2);
    let t = before.of(NS).find(|m| m.point == b"/t").unwrap().id;
    let dir = rustix::fs::openat(&made.mounts[&t], ".", OFlags::RDONLY, Mode::empty()).unwrap();
    let left = rustix::fs::Dir::read_from(dir).unwrap().count();
    assert_eq!(left, 2, "only . and ..");
}

#[test]
fn from_outside() {
    if !is_root() {
        return;
    }
    let root = folder("outside");
    let volume = folder("outside-volume");
    std::fs::write(volume.join("data"), "data").unwrap();
    let held = Held::new(&root, || tmpfs("/data", c""));
    let images = Images::new(MemoryStore::new());
    let mut opts = options(&root);
    opts.add_external("mnt[/data]:volume").unwrap();
    let mounts = dump(&opts, &held, &images);
    let dev = mounts.table.of(NS).find(|m| m.point == b"/data").unwrap().dev;
    assert!(!images.exists(standstill_images::ImageKind::TmpfsDev, dev).unwrap());
    let mut again = options(&root);
    let e = restore::read(&again, &images, &[NS]).unwrap_err().to_string();
    assert!(e.contains("No mapping for"), "{e}");
    again.add_external(&format!("mnt[volume]:{}", volume.display())).unwrap();
    let made = remake(&again, &images);
    let fd = rustix::fs::openat(&made.roots[&NS], "data/data", OFlags::RDONLY, Mode::empty()).unwrap();
    assert_eq!(std::io::read_to_string(std::fs::File::from(fd)).unwrap(), "data");
    drop((held, made));
    let _ = (std::fs::remove_dir_all(&root), std::fs::remove_dir_all(&volume));
}

/// Two namespaces with peers in both.
#[test]
fn nested() {
    if !is_root() {
        return;
    }
    let root = folder("nested");
    let (send, get) = mpsc::channel();
    let (end, ended) = mpsc::channel::<()>();
    let held = Held::new(&root, move || {
        tmpfs("/s", c"");
        std::fs::write("/s/f", "f").unwrap();
        change("/s", MountPropagationFlags::SHARED);
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            tmpfs("/only-here", c"");
            std::fs::write("/only-here/g", "g").unwrap();
            send.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            let _ = ended.recv();
        });
    });
    let inner = get.recv().unwrap();
    let opts = options(&root);
    let images = Images::new(MemoryStore::new());
    let both = [(NS, held.tid), (NS + 1, inner)].map(|(id, pid)| Namespace { id, pid, own_cgroups: false });
    let mut mounts = Mounts::read(&opts, &both).unwrap();
    mounts.write(&images).unwrap();
    let table = restore::read(&opts, &images, &[NS, NS + 1]).unwrap();
    let made = restore::make(&opts, &images, table, &Owners::default()).unwrap();
    for (ns, name, text) in [(NS, "s/f", "f"), (NS + 1, "s/f", "f"), (NS + 1, "only-here/g", "g")] {
        let fd = rustix::fs::openat(&made.roots[&ns], name, OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(std::io::read_to_string(std::fs::File::from(fd)).unwrap(), text);
    }
    let (first, second) = (seen(&made.namespaces[&NS]), seen(&made.namespaces[&(NS + 1)]));
    let group = |t: &Table| t.of(NS).find(|m| m.point == b"/s").unwrap().shared;
    assert!(group(&first) != 0);
    assert_eq!(group(&first), group(&second));
    drop(end);
    drop(held);
    let _ = std::fs::remove_dir_all(&root);
}

#[test]
fn what_cannot_be_carried() {
    if !is_root() {
        return;
    }
    let root = folder("refused");
    let held = Held::new(&root, || {
        std::fs::create_dir_all("/r").unwrap();
        rustix::mount::mount("none", "/r", "ramfs", MountFlags::empty(), c"").unwrap();
    });
    let read = |opts: &Options| Mounts::read(opts, &[Namespace { id: NS, pid: held.tid, own_cgroups: false }]);
    let mut opts = options(&root);
    let e = read(&opts).unwrap_err().chain();
    assert!(e.contains("FS mnt ./r") && e.contains("ramfs"), "{e}");
    opts.enable_fs = vec!["xfs,ramfs".into()];
    read(&opts).unwrap();
    opts.enable_fs.clear();
    opts.skip_mnt = vec!["/r/".into()];
    assert_eq!(read(&opts).unwrap().table.mounts.len(), 1);
    drop(held);
    let _ = std::fs::remove_dir_all(&root);
}

/// An archive goes there and back with all that it can hold, and GNU tar reads and writes the same.
#[test]
fn archives() {
    use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
    if !is_root() {
        return;
    }
    let (from, to, by_tar) = (folder("archive"), folder("archive-to"), folder("archive-tar"));
    let long = "n".repeat(120);
    std::fs::create_dir_all(from.join("d").join(&long)).unwrap();
    std::fs::write(from.join("d").join(&long).join("file"), vec![7; 5000]).unwrap();
    std::fs::hard_link(from.join("d").join(&long).join("file"), from.join("link")).unwrap();
    symlink("x".repeat(150), from.join("symbolic")).unwrap();
    std::fs::write(from.join("setuid"), "s").unwrap();
    std::os::unix::fs::chown(from.join("setuid"), Some(3_000_000_000), Some(12)).unwrap();
    std::fs::set_permissions(from.join("setuid"), std::fs::Permissions::from_mode(0o6751)).unwrap();
    let sparse = std::fs::File::create(from.join("sparse")).unwrap();
    for at in 0..9u64 {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", at << 20).unwrap();
    }
    sparse.set_len(20 << 20).unwrap();
    std::fs::File::create(from.join("hole")).unwrap().set_len(1 << 20).unwrap();
    std::fs::write(from.join("empty"), "").unwrap();
    let node = |name: &str, kind, dev| {
        rustix::fs::mknodat(rustix::fs::CWD, from.join(name), kind, Mode::from_raw_mode(0o640), dev).unwrap();
    };
    node("fifo", rustix::fs::FileType::Fifo, 0);
    node("char", rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(300, 70_000));
    let attributed =
        rustix::fs::setxattr(from.join("empty"), "trusted.x", b"\0value\n", rustix::fs::XattrFlags::empty());
    let open = |p: &Path| rustix::fs::open(p, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();

    let mut archive = Vec::new();
    super::tmpfs::write_archive(open(&from).as_fd(), &mut archive).unwrap();
    assert!(archive.len() < 1 << 20, "holes are not data: {}", archive.len());
    super::tmpfs::read_archive(&archive[..], open(&to).as_fd()).unwrap();
    std::fs::write(by_tar.join("a.tar"), &archive).unwrap();
    std::fs::create_dir(by_tar.join("x")).unwrap();
    let tar = |args: &[&std::ffi::OsStr]| std::process::Command::new("tar").args(args).status().unwrap().success();
    let arg = |p: &Path| p.as_os_str().to_owned();
    assert!(tar(&["-xf".as_ref(), &arg(&by_tar.join("a.tar")), "-C".as_ref(), &arg(&by_tar.join("x"))]));

    let same = |other: &Path| {
        for name in ["link", "setuid", "sparse", "hole", "empty", "fifo", "char", "d", "symbolic", "."] {
            let (a, b) = (from.join(name).symlink_metadata().unwrap(), other.join(name).symlink_metadata().unwrap());
            let all =
                |m: &std::fs::Metadata| (m.mode(), m.uid(), m.gid(), m.rdev(), m.nlink(), m.mtime(), m.mtime_nsec());
            assert_eq!(all(&a), all(&b), "{name}");
            if a.is_file() {
                assert!(std::fs::read(from.join(name)).unwrap() == std::fs::read(other.join(name)).unwrap(), "{name}");
            }
        }
        assert_eq!(std::fs::read_link(other.join("symbolic")).unwrap().as_os_str().len(), 150);
    };
    same(&to);
    same(&by_tar.join("x"));
    let blocks = to.join("sparse").metadata().unwrap().blocks();
    assert!(blocks < 400, "{blocks}");
    if attributed.is_ok() {
        let mut value = [0; 32];
        let n = rustix::fs::getxattr(to.join("empty"), "trusted.x", &mut value).unwrap();
        assert_eq!(&value[..n], b"\0value\n");
    }

    // and what CRIU's tar writes
    let theirs = by_tar.join("b.tar");
    let flags = ["--create", "--sparse", "--numeric-owner", "-f"].map(std::ffi::OsStr::new);
    assert!(tar(&[&flags[..], &[&arg(&theirs), "-C".as_ref(), &arg(&from), ".".as_ref()]].concat()));
    let again = folder("archive-again");
    super::tmpfs::read_archive(&std::fs::read(&theirs).unwrap()[..], open(&again).as_fd()).unwrap();
    for name in ["sparse", "link", "setuid"] {
        assert!(std::fs::read(from.join(name)).unwrap() == std::fs::read(again.join(name)).unwrap(), "{name}");
    }
    assert_eq!(again.join("setuid").metadata().unwrap().uid(), 3_000_000_000);

    // one that wants out
    let mut bad = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..9].copy_from_slice(b"../escape");
    header.set_size(0);
    header.set_cksum();
    bad.append(&header, &[][..]).unwrap();
    let bad = bad.into_inner().unwrap();
    assert!(super::tmpfs::read_archive(&bad[..], open(&again).as_fd()).is_err());
    for dir in [from, to, by_tar, again] {
        let _ = std::fs::remove_dir_all(dir);
    }
}
