//! fanotify: marks on files, mounts and file systems.

use std::ffi::CString;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::support::*;

fn group(flags: u32) -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(sys(libc::fanotify_init(flags | libc::FAN_NONBLOCK, libc::O_RDONLY as u32))) }
}

fn mark(fd: &OwnedFd, flags: u32, mask: u64, path: &str) {
    let path = did(CString::new(path));
    let flags = flags | libc::FAN_MARK_ADD;
    unsafe { sys(libc::fanotify_mark(fd.as_raw_fd(), flags, mask, libc::AT_FDCWD, path.as_ptr())) };
}

/// Masks of the events that wait.
fn events(fd: &OwnedFd) -> Vec<u64> {
    let mut buffer = [0u64; 1024];
    let n = loop {
        let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), 8192) };
        match errno() {
            _ if n >= 0 => break n,
            // a file of a process that is gone by now
            libc::ESRCH | libc::ENOENT => {}
            error => {
                check_eq!(error, libc::EAGAIN);
                return Vec::new();
            }
        }
    };
    let (mut at, mut all) = (0, Vec::new());
    while at < n as usize / 8 {
        // length, version and offset; mask; descriptor and process
        all.push(buffer[at + 1]);
        let event = (buffer[at + 2] & 0xffff_ffff) as i32;
        if event >= 0 {
            unsafe { libc::close(event) };
        }
        at += (buffer[at] & 0xffff_ffff) as usize / 8;
    }
    all
}

/// What fdinfo says, without the order of marks.
fn marks(fd: &OwnedFd) -> Vec<String> {
    let text = did(std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())));
    let mut all: Vec<String> = text.lines().filter(|l| l.starts_with("fanotify")).map(str::to_owned).collect();
    all.sort();
    all
}

/// On files, and on a mount.
pub(super) fn groups() {
    did(std::fs::create_dir("folder"));
    did(std::fs::write("file", "x"));
    let fd = group(libc::FAN_CLASS_NOTIF | libc::FAN_UNLIMITED_QUEUE);
    mark(&fd, 0, libc::FAN_CLOSE_WRITE | libc::FAN_EVENT_ON_CHILD, "folder");
    mark(&fd, 0, libc::FAN_OPEN | libc::FAN_CLOSE, "file");
    mark(&fd, libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY, libc::FAN_CLOSE_NOWRITE, "file");
    let mount = group(libc::FAN_CLASS_NOTIF);
    mark(&mount, libc::FAN_MARK_MOUNT, libc::FAN_MODIFY, "/proc");
    let before = [&fd, &mount].map(marks);
    check_eq!((before[0].len(), before[1].len()), (3, 2));
    events(&fd);
    events(&mount);
    ready();
    check_eq!([&fd, &mount].map(marks), before);
    check!(events(&fd).is_empty());
    drop(did(std::fs::File::open("file")));
    check_eq!(events(&fd), [libc::FAN_OPEN]);
    did(std::fs::write("folder/new", "x"));
    check_eq!(events(&fd), [libc::FAN_CLOSE_WRITE]);
    events(&mount);
    did(std::fs::write("/proc/self/comm", "guest"));
    check!(events(&mount).contains(&libc::FAN_MODIFY));
}

/// On a file system, with handles instead of descriptors.
pub(super) fn filesystem() {
    let fd = group(libc::FAN_CLASS_NOTIF | libc::FAN_REPORT_FID);
    mark(&fd, libc::FAN_MARK_FILESYSTEM, libc::FAN_MODIFY, ".");
    let before = marks(&fd);
    check_eq!(before.len(), 2);
    ready();
    check_eq!(marks(&fd), before);
    events(&fd);
    did(std::fs::write("file", "x"));
    check!(events(&fd).contains(&libc::FAN_MODIFY));
}

/// One that is asked before a file is opened: nobody else could open it while the group stands still.
pub(super) fn deciding() {
    did(std::fs::write("asked", "x"));
    let fd = group(libc::FAN_CLASS_CONTENT);
    mark(&fd, 0, libc::FAN_OPEN_PERM, "asked");
    let before = marks(&fd);
    ready();
    check_eq!(marks(&fd), before);
}
