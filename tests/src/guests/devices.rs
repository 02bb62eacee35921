//! Devices that hold nothing: the kernel's own.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;

use super::support::*;

/// null, zero, full, random, urandom, also mapped, and by a name of the guest's own.
pub(super) fn devices() {
    let open = |name: &str| did(File::options().read(true).write(true).open(name));
    let names = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
    let files = names.map(open);
    unsafe { sys(libc::mknod(c"mine".as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3))) };
    let mine = open("mine");
    let private = map_file(0, 8192, RW, libc::MAP_PRIVATE, files[1].as_raw_fd(), 0);
    unsafe { private.write(7) };
    let facts = |f: &File| {
        let meta = did(f.metadata());
        let link = did(std::fs::read_link(format!("/proc/self/fd/{}", f.as_raw_fd())));
        (meta.mode(), meta.rdev(), link, unsafe { libc::fcntl(f.as_raw_fd(), libc::F_GETFL) })
    };
    let before: Vec<_> = files.iter().chain([&mine]).map(facts).collect();
    ready();
    check_eq!(files.iter().chain([&mine]).map(facts).collect::<Vec<_>>(), before);
    let mut bytes = [1u8; 16];
    check_eq!(did((&files[0]).read(&mut bytes)), 0);
    did((&files[1]).read_exact(&mut bytes));
    check_eq!(bytes, [0; 16]);
    check_eq!((&files[2]).write(b"x").map_err(|e| e.raw_os_error()), Err(Some(libc::ENOSPC)));
    for file in &files[3..] {
        did((&*file).read_exact(&mut bytes));
    }
    did((&mine).write_all(b"x"));
    check_eq!(unsafe { (private.read(), private.add(4096).read()) }, (7, 0));
}
