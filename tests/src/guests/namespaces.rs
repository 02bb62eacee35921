//! Namespaces of a tree's own.

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
