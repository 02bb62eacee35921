//! inotify: watches on folders, files, links, and on a file that is deleted but open.

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::support::*;

pub(super) fn watch(fd: &OwnedFd, path: &str, mask: u32) -> i32 {
    let path = did(CString::new(path));
    unsafe { sys(libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask)) }
}

/// Watch and mask of each event that waits.
pub(super) fn events(fd: &OwnedFd) -> Vec<(i32, u32)> {
    let mut buffer = [0u32; 1024];
    let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), 4096) };
    if n < 0 {
        check_eq!(errno(), libc::EAGAIN);
        return Vec::new();
    }
    let (mut at, mut all) = (0, Vec::new());
    while at < n as usize / 4 {
        all.push((buffer[at] as i32, buffer[at + 1]));
        at += 4 + buffer[at + 3] as usize / 4;
    }
    all
}

pub(super) fn instance() -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(sys(libc::inotify_init1(libc::IN_NONBLOCK))) }
}

/// Numbers, masks, and what comes after; nothing that the restore does is heard.
pub(super) fn watches() {
    did(std::fs::create_dir("folder"));
    did(std::fs::write("file", "x"));
    did(std::os::unix::fs::symlink("file", "link"));
    let fd = instance();
    let first = watch(&fd, ".", libc::IN_CREATE);
    unsafe { sys(libc::inotify_rm_watch(fd.as_raw_fd(), first)) };
    let folder = watch(&fd, "folder", libc::IN_CREATE | libc::IN_ONLYDIR);
    let file = watch(&fd, "file", libc::IN_MODIFY | libc::IN_ATTRIB | libc::IN_OPEN);
    let link = watch(&fd, "link", libc::IN_DELETE_SELF | libc::IN_DONT_FOLLOW);
    events(&fd);
    ready();
    check!(events(&fd).is_empty());
    did(std::fs::write("folder/new", "x"));
    check_eq!(events(&fd), [(folder, libc::IN_CREATE)]);
    let mut open = did(File::options().append(true).open("file"));
    did(open.write_all(b"y"));
    check_eq!(events(&fd), [(file, libc::IN_OPEN), (file, libc::IN_MODIFY)]);
    did(std::fs::remove_file("link"));
    check_eq!(events(&fd), [(link, libc::IN_DELETE_SELF), (link, libc::IN_IGNORED)]);
}

/// On files that are deleted but open, in a folder that is watched too.
pub(super) fn deleted() {
    did(std::fs::create_dir("folder"));
    let mut open = did(File::create("folder/gone"));
    did(std::fs::write("kept", "x"));
    let kept = did(File::open("kept"));
    did(std::fs::hard_link("kept", "other"));
    did(std::fs::remove_file("kept"));
    let fd = instance();
    let gone = watch(&fd, "folder/gone", libc::IN_MODIFY | libc::IN_CLOSE_WRITE);
    let folder = watch(&fd, "folder", libc::IN_CREATE | libc::IN_DELETE);
    did(std::fs::remove_file("folder/gone"));
    events(&fd);
    ready();
    check!(events(&fd).is_empty());
    did(open.write_all(b"y"));
    drop(open);
    let now = events(&fd);
    check_eq!(now.get(..2), Some(&[(gone, libc::IN_MODIFY), (gone, libc::IN_CLOSE_WRITE)][..]));
    did(std::fs::write("folder/gone", "x"));
    check_eq!(events(&fd), [(folder, libc::IN_CREATE)]);
    check_eq!(did(std::io::read_to_string(kept)), "x");
}
