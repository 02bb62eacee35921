//! Terminal pairs: controlling terminals under their own name and as /dev/tty, and data under way.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::support::*;

/// A master and its slave.
fn pair() -> (File, File) {
    unsafe {
        let master = sys(libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY));
        sys(libc::unlockpt(master));
        let mut name = [0; 64];
        check_eq!(libc::ptsname_r(master, name.as_mut_ptr(), name.len()), 0);
        let slave = sys(libc::open(name.as_ptr(), libc::O_RDWR | libc::O_NOCTTY));
        (File::from_raw_fd(master), File::from_raw_fd(slave))
    }
}

fn modes(file: &File) -> libc::termios {
    unsafe {
        let mut modes: libc::termios = std::mem::zeroed();
        sys(libc::tcgetattr(file.as_raw_fd(), &raw mut modes));
        modes
    }
}

fn set_modes(file: &File, change: impl FnOnce(&mut libc::termios)) {
    let mut new = modes(file);
    change(&mut new);
    unsafe { sys(libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &raw const new)) };
}

fn waiting(file: &File) -> i32 {
    let mut n = 0;
    unsafe { sys(libc::ioctl(file.as_raw_fd(), libc::FIONREAD, &raw mut n)) };
    n
}

fn read(mut file: &File) -> String {
    let mut buffer = [0; 8192];
    let n = did(file.read(&mut buffer));
    String::from_utf8_lossy(&buffer[..n]).into_owned()
}

fn write(mut file: &File, text: &str) {
    did(file.write_all(text.as_bytes()));
}

fn flags(m: &libc::termios) -> (u32, u32, u32, u32) {
    (m.c_iflag, m.c_oflag, m.c_cflag, m.c_lflag)
}

/// Data in both directions: whole lines, half of one, bytes that would mean something; echo happens once.
pub(super) fn data() {
    let (lines, lines_slave) = pair();
    let (raw, raw_slave) = pair();
    let (packets, packets_slave) = pair();
    set_modes(&raw_slave, |m| unsafe { libc::cfmakeraw(m) });
    write(&lines, "first\nsecond\nhal");
    write(&lines_slave, "out\n");
    write(&raw, "\x03\x04\x1a\n\r");
    write(&raw_slave, &"x".repeat(3000));
    let on = 1;
    unsafe { sys(libc::ioctl(packets.as_raw_fd(), libc::TIOCPKT, &raw const on)) };
    write(&packets_slave, "packet");
    eventually("all has arrived", || {
        (waiting(&lines_slave), waiting(&raw_slave), waiting(&raw)) == (13, 5, 3000) && waiting(&lines) >= 21
    });
    let echoed = waiting(&lines);
    let before = [&lines_slave, &raw_slave, &packets_slave].map(|f| flags(&modes(f)));
    ready();
    check_eq!([&lines_slave, &raw_slave, &packets_slave].map(|f| flags(&modes(f))), before);
    check_eq!(waiting(&lines), echoed);
    check_eq!(read(&lines_slave), "first\n");
    check_eq!(read(&lines_slave), "second\n");
    write(&lines, "f\n");
    check_eq!(read(&lines_slave), "half\n");
    // echo comes in its own time
    let mut out = String::new();
    while !out.ends_with("f\r\n") {
        out.push_str(&read(&lines));
    }
    check_eq!(out.replace("out\r\n", ""), "first\r\nsecond\r\nhalf\r\n");
    check_eq!(read(&raw_slave), "\x03\x04\x1a\n\r");
    check_eq!(read(&raw), "x".repeat(3000));
    check_eq!(read(&packets), "\0packet");
    drop(packets);
}

/// The terminal of a session: its leader's child has it too, and /dev/tty leads to it, by two descriptors of one open file.
pub(super) fn controlling() {
    let shared = Shared::new();
    let (master, slave) = pair();
    let leader = fork(|| {
        unsafe {
            sys(libc::setsid());
            sys(libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0));
        }
        let tty = did(File::options().read(true).write(true).open("/dev/tty"));
        let other = fork(|| {
            unsafe { sys(libc::setpgid(0, 0)) };
            shared.set(0, 1);
            shared.wait(1, 1);
            write(&tty, "by the child\n");
            // by its own name it has it, too
            let again = did(File::options().write(true).open("/dev/tty"));
            let group = unsafe { libc::tcgetpgrp(again.as_raw_fd()) };
            i32::from(group != unsafe { libc::getppid() })
        });
        shared.wait(1, 1);
        check_eq!(wait(other), 0);
        let session = unsafe { libc::tcgetsid(tty.as_raw_fd()) };
        check_eq!(session, unsafe { libc::getpid() });
        write(&tty, "by the leader\n");
        0
    });
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(leader), 0);
    let mut text = String::new();
    while !text.contains("leader") {
        text.push_str(&read(&master));
    }
    check_eq!(text, "by the child\r\nby the leader\r\n");
}

/// Virtual consoles, if this machine has some: opened by a name of the guest's own.
pub(super) fn consoles() {
    let node = |name: &CStr, minor: u32| -> Option<File> {
        unsafe {
            sys(libc::mknod(name.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(4, minor)));
            let fd = libc::open(name.as_ptr(), libc::O_RDONLY | libc::O_NOCTTY | libc::O_NONBLOCK);
            (fd >= 0).then(|| File::from_raw_fd(fd))
        }
    };
    let consoles = [node(c"first", 61), node(c"second", 62)];
    let before: Vec<_> = consoles.iter().flatten().map(|f| flags(&modes(f))).collect();
    let link = |f: &File| did(std::fs::read_link(format!("/proc/self/fd/{}", f.as_raw_fd())));
    let links: Vec<_> = consoles.iter().flatten().map(link).collect();
    ready();
    check_eq!(consoles.iter().flatten().map(|f| flags(&modes(f))).collect::<Vec<_>>(), before);
    check_eq!(consoles.iter().flatten().map(link).collect::<Vec<_>>(), links);
}
