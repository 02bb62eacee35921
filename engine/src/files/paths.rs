//! Paths: opening them so that nothing on the way leads out of a root folder, and opening once more what is open.
//!
//! Man pages: openat2(2), proc_pid_fd(5).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::magic_link;
use crate::error::{Call, Place, Result};

/// The bit that O_TMPFILE has beside O_DIRECTORY.
pub(super) const NAMELESS: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;
/// O_LARGEFILE as the kernel has it; libc's is 0 on 64-bit machines. openat2(2) does not add it.
const LARGE: u32 = 0o100_000;

/// How a path is shown and put into an error.
pub(super) fn place(path: &[u8]) -> Place {
    Place::Path(std::ffi::OsStr::from_bytes(path).into())
}

/// The folder of a path, and the name in it.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(0) => (b"/", &path[1..]),
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"/", path),
    }
}

/// The lowest folder on the way to `path` that is there.
pub(super) fn nearest(root: BorrowedFd<'_>, path: &[u8]) -> Result<(OwnedFd, Vec<u8>)> {
    let mut upper = split(path).0;
    loop {
        match open_below(root, upper, (libc::O_PATH | libc::O_DIRECTORY) as u32) {
            Ok(folder) => return Ok((folder, upper.to_vec())),
            Err(Errno::NOENT | Errno::NOTDIR) if upper != b"/" => upper = split(upper).0,
            Err(error) => return Err(error).call("openat2"),
        }
    }
}

/// The task whose folder in /proc a path is below.
pub(super) fn task_of(path: &[u8]) -> Option<i32> {
    let number = path.strip_prefix(b"/proc/")?.split(|&b| b == b'/').next()?;
    std::str::from_utf8(number).ok()?.parse().ok().filter(|&pid| pid > 0)
}

/// Task and descriptor of a path such as `/proc/77/fdinfo/4`, which exists only while that descriptor does.
pub(super) fn descriptor_of(path: &[u8]) -> Option<(i32, i32)> {
    let mut parts = path.split(|&b| b == b'/').skip(3);
    let number = match (parts.next()?, parts.next()?, parts.next()) {
        (b"fdinfo", number, None) => std::str::from_utf8(number).ok()?.parse().ok()?,
        _ => return None,
    };
    (number >= 0).then_some((task_of(path)?, number))
}

/// `.nfs` and 24 hexadecimal digits: what NFS renames an open file to that is deleted. It goes with its last user.
pub(super) fn silly(path: &[u8]) -> bool {
    let digits = split(path).1.strip_prefix(b".nfs");
    digits.is_some_and(|digits| digits.len() >= 24 && digits[..24].iter().all(u8::is_ascii_hexdigit))
}

/// Flags of an image as open(2) takes them for a file that exists.
fn existing(flags: u32) -> OFlags {
    let mut flags = flags & !((libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC) as u32);
    if flags & NAMELESS != 0 {
        flags &= !(libc::O_TMPFILE as u32);
    }
    if flags & libc::O_PATH as u32 != 0 {
        flags &= (libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW) as u32;
    } else {
        flags |= libc::O_NOCTTY as u32 | LARGE;
    }
    OFlags::from_bits_retain(flags | libc::O_CLOEXEC as u32)
}

/// Opens a path below a root folder that nothing on the way leads out of.
pub(crate) fn open_below(root: BorrowedFd<'_>, path: &[u8], flags: u32) -> rustix::io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(root, path, existing(flags), Mode::empty(), ResolveFlags::IN_ROOT) {
            // something was renamed or mounted meanwhile
            Err(Errno::AGAIN | Errno::INTR) if tries < 100 => tries += 1,
            result => return result,
        }
    }
}

/// Opens what a descriptor stands for once more, with other flags: the new one has the same name as this.
pub(super) fn reopen(file: BorrowedFd<'_>, flags: u32) -> Result<OwnedFd> {
    let both = (libc::O_PATH | libc::O_NOFOLLOW) as u32;
    if flags & both == both {
        // opening the link in /proc so would give that link; these descriptors have no state that could be shared
        return rustix::io::fcntl_dupfd_cloexec(file, 3).call("dup");
    }
    let flags = existing(flags) - OFlags::NOFOLLOW;
    rustix::fs::open(magic_link(file), flags, Mode::empty()).call("open")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn names() {
        assert_eq!(split(b"/a/b"), (&b"/a"[..], &b"b"[..]));
        assert_eq!(split(b"/a"), (&b"/"[..], &b"a"[..]));
        assert_eq!(split(b"/"), (&b"/"[..], &b""[..]));
        assert_eq!(task_of(b"/proc/17/maps"), Some(17));
        assert_eq!(task_of(b"/proc/17"), Some(17));
        for none in [&b"/proc"[..], b"/proc/", b"/proc/sys/x", b"/proc/-1/x", b"/process/1", b"/proc/99999999999"] {
            assert_eq!(task_of(none), None);
        }
        assert!(silly(b"/mnt/.nfs000000000012abcd00000001"));
        assert!(!silly(b"/mnt/.nfs0000"));
        assert!(!silly(b"/mnt/.nfsx00000000012abcd00000001"));
    }

    #[test]
    fn a_root_keeps_links_in() {
        let dir = std::env::temp_dir().join(format!("standstill-paths-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.join("link")).unwrap();
        let root = rustix::fs::open(&dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        std::fs::write(dir.join("etc/inside"), "").unwrap();
        open_below(root.as_fd(), b"/link/inside", 0).unwrap();
        open_below(root.as_fd(), b"/../../link/inside", 0).unwrap();
        assert_eq!(open_below(root.as_fd(), b"/link/passwd", 0).unwrap_err(), Errno::NOENT);
        assert_eq!(nearest(root.as_fd(), b"/link/inside/x/y").unwrap().1, b"/link");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
