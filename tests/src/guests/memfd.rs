//! Files in memory.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::FileExt as _;

use super::support::*;

fn new(name: &std::ffi::CStr, flags: u32) -> File {
    unsafe { File::from_raw_fd(sys(libc::memfd_create(name.as_ptr(), flags))) }
}

/// With content, holes, a mapping, two descriptions, and a child that has it too.
pub(super) fn memfd() {
    let shared = Shared::new();
    let file = new(c"guest", libc::MFD_CLOEXEC);
    did(file.set_len(8 << 20));
    did(file.write_all_at(b"in memory", 5 << 20));
    let area = map_file(0, 8192, RW, libc::MAP_SHARED, file.as_raw_fd(), 5 << 20);
    let again = did(File::open(format!("/proc/self/fd/{}", file.as_raw_fd())));
    let link = did(std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())));
    let child = fork(|| {
        shared.set(0, 1);
        shared.wait(1, 1);
        did(file.write_all_at(b"IN", 5 << 20));
        0
    });
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(child), 0);
    let mut text = [0u8; 9];
    did(again.read_exact_at(&mut text, 5 << 20));
    check_eq!(&text, b"IN memory");
    check_eq!(unsafe { area.add(1).read_volatile() }, b'N');
    check_eq!(did(again.metadata()).len(), 8 << 20);
    check_eq!(did(std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))), link);
    did(again.read_exact_at(&mut text, 1 << 20));
    check_eq!(text, [0u8; 9]);
}

/// Seals hold.
pub(super) fn sealed() {
    let file = new(c"sealed", libc::MFD_ALLOW_SEALING);
    did(file.write_all_at(b"for good", 0));
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    unsafe { sys(libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals)) };
    let open = new(c"open", libc::MFD_ALLOW_SEALING);
    ready();
    check_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }, seals);
    check!(file.write_at(b"x", 0).is_err());
    check!(file.set_len(1).is_err());
    let mut text = [0u8; 8];
    did(file.read_exact_at(&mut text, 0));
    check_eq!(&text, b"for good");
    check_eq!(unsafe { libc::fcntl(open.as_raw_fd(), libc::F_GET_SEALS) }, 0);
    did(open.write_all_at(b"x", 0));
}

/// Executable and not, of huge pages if there are some, mapped by two who write to each other, sealed for the future only.
pub(super) fn kinds() {
    const NOEXEC_SEAL: u32 = 8;
    const EXEC: u32 = 16;
    const F_SEAL_EXEC: i32 = 0x20;
    let exec = new(c"exec", EXEC);
    did(exec.write_all_at(&did(std::fs::read("/bin/true")), 0));
    let noexec = new(c"noexec", NOEXEC_SEAL);
    let huge = unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB) };
    let huge = (huge >= 0).then(|| unsafe { File::from_raw_fd(huge) });
    let huge_area = huge.as_ref().and_then(|file| {
        did(file.set_len(4 << 20));
        let area = unsafe { libc::mmap(std::ptr::null_mut(), 4 << 20, RW, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        (area != libc::MAP_FAILED).then_some(area.cast::<u8>())
    });
    if let Some(area) = huge_area {
        unsafe { area.add(3 << 20).write(9) };
    }
    let future = new(c"future", libc::MFD_ALLOW_SEALING);
    did(future.set_len(8192));
    let area = map_file(0, 8192, RW, libc::MAP_SHARED, future.as_raw_fd(), 0);
    unsafe { sys(libc::fcntl(future.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE)) };
    let up = Shared::new();
    let child = fork(|| {
        up.set(0, 1);
        eventually("the parent's word", || unsafe { area.read_volatile() } == 1);
        unsafe { area.add(4096).write_volatile(2) };
        0
    });
    up.wait(0, 1);
    let modes = || [&exec, &noexec].map(|f| std::os::unix::fs::MetadataExt::mode(&did(f.metadata())));
    let before = modes();
    ready();
    check_eq!(modes(), before);
    check!(unsafe { libc::fcntl(noexec.as_raw_fd(), libc::F_GET_SEALS) } & F_SEAL_EXEC != 0);
    check!(future.write_at(b"x", 0).is_err());
    unsafe { area.write_volatile(1) };
    check_eq!(wait(child), 0);
    check_eq!(unsafe { area.add(4096).read_volatile() }, 2);
    if let Some(area) = huge_area {
        check_eq!(unsafe { (area.read(), area.add(3 << 20).read()) }, (0, 9));
    }
    let run = fork(|| {
        let arguments = [c"true".as_ptr(), std::ptr::null()];
        unsafe { libc::fexecve(exec.as_raw_fd(), arguments.as_ptr(), [std::ptr::null()].as_ptr()) };
        1
    });
    check_eq!(wait(run), 0);
}
