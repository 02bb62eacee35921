//! Working folder, root, and umask.

use super::support::*;

fn cwd() -> std::path::PathBuf {
    did(std::fs::read_link("/proc/self/cwd"))
}

fn umask() -> u32 {
    let mask = unsafe { libc::umask(0) };
    unsafe { libc::umask(mask) };
    mask
}

/// A folder of its own, and another one in a child.
pub(super) fn folders() {
    let shared = Shared::new();
    for name in ["inside", "deeper"] {
        did(std::fs::create_dir(name));
        did(std::env::set_current_dir(name));
    }
    unsafe { libc::umask(0o137) };
    let child = fork(|| {
        did(std::env::set_current_dir(".."));
        unsafe { libc::umask(0o7) };
        let before = cwd();
        shared.set(0, 1);
        shared.wait(1, 1);
        check_eq!((cwd(), umask()), (before, 0o7));
        0
    });
    shared.wait(0, 1);
    let before = cwd();
    ready();
    check_eq!((cwd(), umask()), (before, 0o137));
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}

/// Folders that were renamed: the working one, and one that is open.
pub(super) fn renamed() {
    use std::os::fd::AsRawFd as _;
    did(std::fs::create_dir_all("before/inside"));
    did(std::fs::create_dir("open"));
    let open = did(std::fs::File::open("open"));
    let file = did(std::fs::File::create("before/inside/file"));
    did(std::env::set_current_dir("before/inside"));
    did(std::fs::rename(folder().join("open"), folder().join("open-after")));
    did(std::fs::rename(folder().join("before"), folder().join("after")));
    ready();
    let link = |fd: i32| did(std::fs::read_link(format!("/proc/self/fd/{fd}")));
    check_eq!(cwd(), did(folder().canonicalize()).join("after/inside"));
    check!(link(open.as_raw_fd()).ends_with("open-after"));
    check!(link(file.as_raw_fd()).ends_with("after/inside/file"));
    sys(unsafe { libc::mkdirat(open.as_raw_fd(), c"new".as_ptr(), 0o755) });
    check!(folder().join("open-after/new").is_dir());
}

/// A working folder that was deleted.
pub(super) fn deleted() {
    did(std::fs::create_dir("gone"));
    did(std::env::set_current_dir("gone"));
    did(std::fs::remove_dir("../gone"));
    ready();
    check!(cwd().to_string_lossy().contains("gone"));
    check!(std::fs::write("file", b"").is_err());
    check!(!folder().join("gone").exists());
}

/// Another root in a child.
pub(super) fn root() {
    let shared = Shared::new();
    did(std::fs::create_dir_all("root/inside"));
    let child = fork(|| {
        did(std::os::unix::fs::chroot("root"));
        did(std::env::set_current_dir("/inside"));
        shared.set(0, 1);
        shared.wait(1, 1);
        check_eq!(did(std::env::current_dir()).as_os_str(), "/inside");
        check!(std::fs::read_dir("/").is_ok_and(|d| d.count() == 1));
        0
    });
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}

/// A child that has folder and umask in common with its parent (CLONE_FS).
pub(super) fn shared() {
    let shared = Shared::new();
    did(std::fs::create_dir("inside"));
    let none = std::ptr::null_mut::<u8>();
    let child = sys(unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FS | libc::SIGCHLD, none, none, none, none) });
    if child == 0 {
        shared.set(0, 1);
        shared.wait(1, 1);
        let done = std::env::set_current_dir("inside").is_ok();
        unsafe {
            libc::umask(0o123);
            libc::_exit(i32::from(!done))
        }
    }
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(child as i32), 0);
    check_eq!(umask(), 0o123);
    check_eq!(cwd(), folder().join("inside"));
}
