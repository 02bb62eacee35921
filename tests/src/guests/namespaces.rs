//! Namespaces of a tree's own.

use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{fchown, MetadataExt as _};

use super::support::*;

/// Names of a host, in a namespace that a child shares.
pub(super) fn uts_namespace() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWUTS) });
    let (host, domain) = (b"standstill-guest", b"example.net");
    sys(unsafe { libc::sethostname(host.as_ptr().cast(), host.len()) });
    sys(unsafe { libc::setdomainname(domain.as_ptr().cast(), domain.len()) });
    let names = || {
        let mut names: libc::utsname = unsafe { std::mem::zeroed() };
        sys(unsafe { libc::uname(&raw mut names) });
        let text =
            |name: &[libc::c_char]| -> Vec<u8> { name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect() };
        (text(&names.nodename), text(&names.domainname))
    };
    let before = std::fs::read_link("/proc/self/ns/uts");
    let (out, into) = super::pipes::pipe(0);
    let child = fork(|| {
        // until the parent has checked
        check_eq!(super::pipes::read(out), Ok(b"x".to_vec()));
        check_eq!(names(), (host.to_vec(), domain.to_vec()));
        sys(unsafe { libc::sethostname(c"other".as_ptr(), 5) });
        0
    });
    ready();
    check!(before.is_ok());
    check_eq!(names(), (host.to_vec(), domain.to_vec()));
    super::pipes::write(into, b"x");
    check_eq!(wait(child), 0);
    check_eq!(names(), (b"other".to_vec(), domain.to_vec()));
}

/// Processes that are known by their ids in the namespace: children, a thread, a group, an owner of signals, a timer of a
/// thread, a zombie, a pidfd.
pub(super) fn pid_namespace() {
    let me = || unsafe { libc::getpid() };
    check_eq!(me(), 1);
    super::signals::mask(libc::SIG_BLOCK, &[libc::SIGIO, libc::SIGUSR1, libc::SIGCHLD]);
    let group = fork(|| {
        sys(unsafe { libc::setpgid(0, 0) });
        loop {
            unsafe { libc::pause() };
        }
    });
    let grandchild = Shared::new();
    let child = fork(|| {
        let own = me();
        let below = fork(|| {
            sys(unsafe { libc::setsid() });
            loop {
                unsafe { libc::pause() };
            }
        });
        grandchild.set(0, below as u64);
        grandchild.wait(1, 1);
        check_eq!((me(), unsafe { libc::getppid() }), (own, 1));
        check_eq!(unsafe { libc::getsid(below) }, below);
        sys(unsafe { libc::kill(below, libc::SIGKILL) });
        check_eq!(wait(below), libc::SIGKILL);
        0
    });
    eventually("a group", || unsafe { libc::getpgid(group) } == group);
    eventually("a session", || {
        let below = grandchild.get(0) as i32;
        below != 0 && unsafe { libc::getsid(below) } == below
    });
    let zombie = fork(|| 7);
    eventually("a zombie", || {
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        sys(unsafe { libc::waitid(libc::P_PID, zombie as u32, &raw mut info, flags) });
        unsafe { info.si_pid() == zombie }
    });
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child, 0) };
    sys(pidfd);
    let (out, into) = super::pipes::pipe(0);
    sys(unsafe { libc::fcntl(out, libc::F_SETOWN, -group) });
    let tid = Shared::new();
    let thread = std::thread::spawn(move || {
        tid.set(0, gettid() as u64);
        let own = gettid();
        tid.wait(1, 1);
        check_eq!(gettid(), own);
    });
    eventually("a thread", || tid.get(0) != 0);
    ready();
    check_eq!(me(), 1);
    check_eq!(unsafe { libc::getsid(0) }, 1);
    check_eq!(unsafe { libc::fcntl(out, libc::F_GETOWN) }, -group);
    check_eq!(unsafe { libc::getpgid(group) }, group);
    check_eq!(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, 0, 0, 0) }, 0);
    tid.set(1, 1);
    check!(thread.join().is_ok());
    check_eq!(wait(zombie), 7 << 8);
    sys(unsafe { libc::kill(group, libc::SIGKILL) });
    check_eq!(wait(group), libc::SIGKILL);
    grandchild.set(1, 1);
    check_eq!(wait(child), 0);
    // ids go on
    let next = fork(|| 0);
    check!(next > child);
    check_eq!(wait(next), 0);
    super::pipes::write(into, b"x");
}

/// Ids of users that are others outside: of tasks, of files that are open without a name, of memory files, of a socket's name,
/// of who set the owner of a descriptor.
pub(super) fn user_namespace() {
    let map = || proc_self("uid_map").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    check_eq!(map(), crate::process::OWN_IDS.split_whitespace().collect::<Vec<_>>());
    let words = |names: &[&str]| -> Vec<String> {
        let lines = status(names);
        lines.iter().flat_map(|line| line.split_whitespace().skip(1).map(str::to_owned)).collect()
    };
    check_eq!(unsafe { libc::getuid() }, 0);
    let deleted = did(std::fs::File::create("deleted"));
    did(fchown(&deleted, Some(5), Some(6)));
    did(std::fs::remove_file("deleted"));
    let memory = unsafe { sys(libc::memfd_create(c"memory".as_ptr(), 0)) };
    sys(unsafe { libc::fchown(memory, 7, 8) });
    let socket = did(std::os::unix::net::UnixListener::bind("socket"));
    did(std::os::unix::fs::chown("socket", Some(9), Some(10)));
    super::signals::mask(libc::SIG_BLOCK, &[libc::SIGIO]);
    let (out, _into) = super::pipes::pipe(0);
    let go = Shared::new();
    let child = fork(|| {
        let groups = [20, 21];
        sys(unsafe { libc::setgroups(2, groups.as_ptr()) });
        sys(unsafe { libc::setresgid(11, 12, 13) });
        sys(unsafe { libc::setresuid(14, 15, 16) });
        go.set(1, 1);
        go.wait(0, 1);
        check_eq!(words(&["Uid", "Gid", "Groups"]), ["14", "15", "16", "15", "11", "12", "13", "12", "20", "21"]);
        0
    });
    go.wait(1, 1);
    sys(unsafe { libc::fcntl(out, libc::F_SETOWN, child) });
    let capabilities = status(&["CapPrm", "CapEff", "CapBnd"]);
    ready();
    check_eq!(map(), crate::process::OWN_IDS.split_whitespace().collect::<Vec<_>>());
    check_eq!(status(&["CapPrm", "CapEff", "CapBnd"]), capabilities);
    check_eq!(words(&["Uid"]), ["0", "0", "0", "0"]);
    let of_deleted = did(deleted.metadata());
    check_eq!((of_deleted.uid(), of_deleted.gid()), (5, 6));
    let of_memory = did(std::fs::metadata(format!("/proc/self/fd/{memory}")));
    check_eq!((of_memory.uid(), of_memory.gid()), (7, 8));
    let of_socket = did(std::fs::metadata("socket"));
    check_eq!((of_socket.uid(), of_socket.gid()), (9, 10));
    check!(socket.as_raw_fd() >= 0);
    let mut ids = [0u32; 2];
    sys(unsafe { libc::fcntl(out, 17, ids.as_mut_ptr()) });
    check_eq!(ids, [0, 0]);
    check_eq!(unsafe { libc::fcntl(out, libc::F_GETOWN) }, child);
    // it is root here, and may become whom it likes
    sys(unsafe { libc::setresuid(0, 0, 0) });
    go.set(0, 1);
    check_eq!(wait(child), 0);
}

/// In a user namespace: a child with mounts and a network of its own, and files of living tasks.
pub(super) fn user_namespace_nested() {
    let mount = |kind: &std::ffi::CStr, at: &std::ffi::CStr| {
        sys(unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) });
    };
    sys(unsafe { libc::unshare(libc::CLONE_NEWNS) });
    let none = std::ptr::null();
    sys(unsafe { libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, std::ptr::null()) });
    mount(c"proc", c"/proc");
    let inode = |path: &str| did(std::fs::metadata(path)).ino();
    let stage = Shared::new();
    did(std::fs::create_dir("own"));
    let own = did(std::path::absolute("own"));
    let child = fork(|| {
        sys(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET) });
        mount(c"tmpfs", c"own");
        did(std::fs::write(own.join("f"), "mine"));
        stage.set(0, 1);
        stage.wait(0, 2);
        check_eq!(std::fs::read_to_string(own.join("f")).ok().as_deref(), Some("mine"));
        check!(inode("/proc/self/ns/net") != inode("/proc/1/ns/net"));
        check!(inode("/proc/self/ns/mnt") != inode("/proc/1/ns/mnt"));
        // it has power over both
        sys(unsafe { libc::umount2(c"own".as_ptr(), libc::MNT_DETACH) });
        let socket = unsafe { sys(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)) };
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        sys(unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request) });
        0
    });
    stage.wait(0, 1);
    let status = did(std::fs::File::open(format!("/proc/{child}/status")));
    let two = [9, 10].map(|_| did(std::fs::File::open(format!("/proc/{child}/comm"))));
    ready();
    check!(!own.join("f").exists());
    let read = |file: &std::fs::File| did(std::io::read_to_string(file));
    check!(read(&status).contains(&format!("\nPid:\t{child}\n")));
    check!(two.iter().all(|file| read(file) == read(&did(std::fs::File::open("/proc/1/comm")))));
    stage.set(0, 2);
    check_eq!(wait(child), 0);
}

/// In a user namespace: leases on files whose owner is not the namespace's root, which only somebody outside may take for others.
pub(super) fn user_namespace_lease() {
    let stage = Shared::new();
    did(std::os::unix::fs::chown(".", Some(5), Some(5)));
    let child = fork(|| {
        sys(unsafe { libc::setresgid(5, 5, 5) });
        sys(unsafe { libc::setresuid(5, 5, 5) });
        did(std::fs::write("leased", "x"));
        let file = did(std::fs::File::open("leased"));
        sys(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) });
        stage.set(0, 1);
        stage.wait(0, 2);
        check_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }, libc::F_RDLCK);
        check_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETOWN) }, unsafe { libc::getpid() });
        0
    });
    stage.wait(0, 1);
    ready();
    stage.set(0, 2);
    check_eq!(wait(child), 0);
}
