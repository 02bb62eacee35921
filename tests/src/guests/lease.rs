//! Leases on files: in force, and while somebody waits for the file.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use super::support::*;

const F_SETSIG: i32 = 10;
const SIGNAL: i32 = 40;

static TOLD: AtomicUsize = AtomicUsize::new(0);
static LAST: AtomicI32 = AtomicI32::new(-1);

extern "C" fn told(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // si_fd lies behind si_band
    let fd = unsafe { info.cast::<i32>().add(6).read() };
    LAST.store(fd, Ordering::SeqCst);
    TOLD.fetch_add(1, Ordering::SeqCst);
}

fn listen() {
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = told as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        sys(libc::sigaction(SIGNAL, &action, std::ptr::null_mut()));
    }
}

fn lease(file: &File, kind: i32) {
    unsafe {
        sys(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind));
        sys(libc::fcntl(file.as_raw_fd(), F_SETSIG, SIGNAL));
    }
}

fn leased(file: &File) -> i32 {
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }
}

fn open(name: &str, flags: i32) -> Result<File, i32> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let (read, write) = (flags & libc::O_ACCMODE != libc::O_WRONLY, flags & libc::O_ACCMODE != libc::O_RDONLY);
    let mut options = File::options();
    options.read(read).write(write).custom_flags(libc::O_NONBLOCK);
    options.open(name).map_err(|e| e.raw_os_error().unwrap_or(0))
}

/// Reading, writing, with a dup, on a file that another process has; and their holder is told when they are broken.
pub(super) fn in_force() {
    listen();
    for name in ["read", "write", "inherited"] {
        did(std::fs::write(name, b"some text, to have a size"));
    }
    let reads = [did(File::open("read")), did(File::open("read"))];
    reads.iter().for_each(|file| lease(file, libc::F_RDLCK));
    let writes = did(File::options().append(true).open("write"));
    lease(&writes, libc::F_WRLCK);
    let copy = did(writes.try_clone());
    let inherited = did(File::options().read(true).write(true).open("inherited"));
    lease(&inherited, libc::F_WRLCK);
    let shared = Shared::new();
    let child = fork(|| {
        shared.set(1, 1);
        shared.wait(0, 1);
        i32::from(leased(&inherited) != libc::F_WRLCK)
    });
    shared.wait(1, 1);
    ready();
    check_eq!(TOLD.load(Ordering::SeqCst), 0);
    check!(reads.iter().all(|file| leased(file) == libc::F_RDLCK));
    check_eq!((leased(&writes), leased(&copy)), (libc::F_WRLCK, libc::F_WRLCK));
    shared.set(0, 1);
    check_eq!(wait(child), 0);
    check_eq!(open("write", libc::O_RDONLY).err(), Some(libc::EWOULDBLOCK));
    eventually("the signal", || TOLD.load(Ordering::SeqCst) == 1);
    check_eq!(LAST.load(Ordering::SeqCst), writes.as_raw_fd());
    check_eq!(leased(&writes), libc::F_RDLCK);
    unsafe { sys(libc::fcntl(writes.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK)) };
    check!(open("write", libc::O_RDONLY).is_ok());
    check_eq!(open("read", libc::O_WRONLY).err(), Some(libc::EWOULDBLOCK));
    eventually("two more signals", || TOLD.load(Ordering::SeqCst) == 3);
}

/// Being broken: to nothing, to a lease for reading, of two processes at once. Nobody is told a second time.
pub(super) fn breaking() {
    listen();
    for name in ["gone", "less", "both"] {
        did(std::fs::write(name, b"some text, to have a size"));
    }
    let gone = did(File::options().write(true).open("gone"));
    lease(&gone, libc::F_WRLCK);
    let less = did(File::open("less"));
    lease(&less, libc::F_WRLCK);
    let shared = Shared::new();
    let both = did(File::open("both"));
    lease(&both, libc::F_RDLCK);
    let child = fork(|| {
        drop(both);
        let both = did(File::open("both"));
        lease(&both, libc::F_RDLCK);
        shared.set(0, 1);
        shared.wait(1, 1);
        let good = TOLD.load(Ordering::SeqCst) == 1 && leased(&both) == libc::F_UNLCK;
        i32::from(!good)
    });
    let both = did(File::open("both"));
    lease(&both, libc::F_RDLCK);
    shared.wait(0, 1);
    check_eq!(open("gone", libc::O_WRONLY).err(), Some(libc::EWOULDBLOCK));
    check_eq!(open("less", libc::O_RDONLY).err(), Some(libc::EWOULDBLOCK));
    check_eq!(open("both", libc::O_WRONLY).err(), Some(libc::EWOULDBLOCK));
    eventually("the signals", || TOLD.load(Ordering::SeqCst) == 3);
    let before = [&gone, &less, &both].map(leased);
    check_eq!(before, [libc::F_UNLCK, libc::F_RDLCK, libc::F_UNLCK]);
    ready();
    check_eq!([&gone, &less, &both].map(leased), before);
    check_eq!(TOLD.load(Ordering::SeqCst), 3);
    shared.set(1, 1);
    check_eq!(wait(child), 0);
    check_eq!(open("less", libc::O_RDONLY).err(), Some(libc::EWOULDBLOCK));
    unsafe { sys(libc::fcntl(less.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK)) };
    check!(open("less", libc::O_RDONLY).is_ok());
    check_eq!(open("less", libc::O_WRONLY).err(), Some(libc::EWOULDBLOCK));
    eventually("one more signal", || TOLD.load(Ordering::SeqCst) == 4);
}
