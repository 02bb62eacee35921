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
