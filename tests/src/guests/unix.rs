//! Unix sockets: pairs with data in flight, listening ones, datagrams.

use super::pipes::{read, write};
use super::support::*;

pub(super) fn pair(kind: i32) -> (i32, i32) {
    let mut fds = [0; 2];
    unsafe { sys(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr())) };
    (fds[0], fds[1])
}

fn option(fd: i32, name: i32) -> i32 {
    let (mut value, mut size) = (0i32, 4);
    let r = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut size) };
    sys(r);
    value
}

fn set_option(fd: i32, name: i32, value: i32) {
    let r = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, (&raw const value).cast(), 4) };
    sys(r);
}

/// Pairs of the three kinds, with data both ways, one half closed, one with an end in a child.
pub(super) fn pairs() {
    let nonblocking = libc::SOCK_NONBLOCK;
    let stream = pair(libc::SOCK_STREAM | nonblocking);
    let packets = pair(libc::SOCK_SEQPACKET | nonblocking | libc::SOCK_CLOEXEC);
    let datagrams = pair(libc::SOCK_DGRAM | nonblocking);
    write(stream.0, b"there");
    write(stream.1, b"and back");
    for word in [&b"one"[..], b"two", b"three"] {
        write(packets.0, word);
        write(datagrams.1, word);
    }
    let ended = pair(libc::SOCK_STREAM | nonblocking);
    write(ended.0, b"last");
    unsafe { sys(libc::shutdown(ended.0, libc::SHUT_WR)) };
    let lonely = pair(libc::SOCK_STREAM | nonblocking);
    write(lonely.0, b"left behind");
    unsafe { libc::close(lonely.0) };
    set_option(stream.0, libc::SO_SNDBUF, 30_000);
    let buffer = option(stream.0, libc::SO_SNDBUF);
    let talk = pair(libc::SOCK_STREAM);
    set_option(talk.0, libc::SO_PASSCRED, 1);
    let child = fork(|| {
        unsafe { libc::close(talk.0) };
        while let Ok(bytes) = read(talk.1) {
            if bytes.is_empty() {
                return 0;
            }
            write(talk.1, &bytes);
        }
        1
    });
    unsafe { libc::close(talk.1) };
    write(talk.0, b"ping");
    check_eq!(read(talk.0), Ok(b"ping".to_vec()));
    ready();
    check_eq!(read(stream.1), Ok(b"there".to_vec()));
    check_eq!(read(stream.0), Ok(b"and back".to_vec()));
    check_eq!(read(stream.0), Err(libc::EAGAIN));
    for word in [&b"one"[..], b"two", b"three"] {
        check_eq!(read(packets.1), Ok(word.to_vec()));
        check_eq!(read(datagrams.0), Ok(word.to_vec()));
    }
    check_eq!(read(packets.1), Err(libc::EAGAIN));
    check_eq!(read(ended.1), Ok(b"last".to_vec()));
    check_eq!(read(ended.1), Ok(Vec::new()));
    write(ended.1, b"one way");
    check_eq!(read(ended.0), Ok(b"one way".to_vec()));
    check_eq!(read(lonely.1), Ok(b"left behind".to_vec()));
    check_eq!(read(lonely.1), Ok(Vec::new()));
    check_eq!((option(stream.0, libc::SO_SNDBUF), option(talk.0, libc::SO_PASSCRED)), (buffer, 1));
    check_eq!(unsafe { libc::fcntl(packets.0, libc::F_GETFD) }, libc::FD_CLOEXEC);
    write(stream.0, b"new");
    check_eq!(read(stream.1), Ok(b"new".to_vec()));
    write(talk.0, b"pong");
    check_eq!(read(talk.0), Ok(b"pong".to_vec()));
    unsafe { libc::close(talk.0) };
    check_eq!(wait(child), 0);
}

fn address(path: &str) -> (libc::sockaddr_un, u32) {
    let mut a: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    a.sun_family = libc::AF_UNIX as u16;
    for (to, from) in a.sun_path.iter_mut().zip(path.bytes()) {
        *to = from as libc::c_char;
    }
    // a name that begins with a zero has no zero at its end
    (a, (2 + path.len() + usize::from(!path.starts_with('\0'))) as u32)
}

pub(super) fn bound(kind: i32, path: &str) -> i32 {
    let fd = unsafe { sys(libc::socket(libc::AF_UNIX, kind, 0)) };
    let (a, size) = address(path);
    unsafe { sys(libc::bind(fd, (&raw const a).cast(), size)) };
    fd
}

pub(super) fn connected(kind: i32, path: &str) -> i32 {
    let fd = unsafe { sys(libc::socket(libc::AF_UNIX, kind, 0)) };
    let (a, size) = address(path);
    unsafe { sys(libc::connect(fd, (&raw const a).cast(), size)) };
    fd
}

pub(super) fn accept(listener: i32) -> i32 {
    unsafe { sys(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut())) }
}

/// Listening, by a name in the file system and by one that is not, and a connection that one of them took.
pub(super) fn listening() {
    let abstract_name = format!("\0standstill-guest-{}", std::process::id());
    let stream = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    let names = ["socket".to_owned(), abstract_name];
    let mut all = Vec::new();
    for name in &names {
        let listener = bound(stream, name);
        unsafe { sys(libc::listen(listener, 17)) };
        let client = connected(stream, name);
        let server = unsafe { sys(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut())) };
        write(client, b"hello");
        all.push((listener, client, server));
    }
    ready();
    for (name, (listener, client, server)) in names.iter().zip(all) {
        check_eq!(read(server), Ok(b"hello".to_vec()));
        write(server, b"answer");
        check_eq!(read(client), Ok(b"answer".to_vec()));
        check_eq!(unsafe { libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) }, -1);
        check_eq!(errno(), libc::EAGAIN);
        let late = connected(stream, name);
        let server = unsafe { sys(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut())) };
        write(late, b"late");
        check_eq!(read(server), Ok(b"late".to_vec()));
    }
}

/// Datagrams that wait at a named socket, and a sender that is connected to it.
pub(super) fn dgram() {
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK;
    let receiver = bound(kind, "inbox");
    let sender = connected(kind, "inbox");
    write(sender, b"first");
    write(sender, b"second");
    ready();
    check_eq!(read(receiver), Ok(b"first".to_vec()));
    check_eq!(read(receiver), Ok(b"second".to_vec()));
    check_eq!(read(receiver), Err(libc::EAGAIN));
    write(sender, b"third");
    check_eq!(read(receiver), Ok(b"third".to_vec()));
    let late = connected(kind, "inbox");
    write(late, b"fourth");
    check_eq!(read(receiver), Ok(b"fourth".to_vec()));
}

/// Names whose file is gone, or was moved, or is relative to a folder that was left since.
pub(super) fn names() {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    did(std::fs::create_dir("below"));
    did(std::env::set_current_dir("below"));
    let relative = bound(kind, "relative");
    let moved = bound(kind, "moved");
    let unlinked = bound(kind, "unlinked");
    let replaced = bound(kind, "replaced");
    for fd in [relative, moved, unlinked, replaced] {
        unsafe { sys(libc::listen(fd, 3)) };
    }
    did(std::env::set_current_dir(".."));
    let client = connected(kind, "below/unlinked");
    let server = unsafe { sys(libc::accept(unlinked, std::ptr::null_mut(), std::ptr::null_mut())) };
    did(std::fs::rename("below/moved", "below/elsewhere"));
    did(std::fs::remove_file("below/unlinked"));
    did(std::fs::remove_file("below/replaced"));
    did(std::fs::write("below/replaced", "a file now"));
    ready();
    check_eq!([relative, moved, unlinked, replaced].map(name), ["relative", "moved", "unlinked", "replaced"]);
    check!(!folder().join("below/unlinked").exists());
    check_eq!(did(std::fs::read_to_string("below/replaced")), "a file now");
    check!(!folder().join("below/moved").exists());
    for (path, listener) in [("below/relative", relative), ("below/elsewhere", moved)] {
        let client = connected(kind, path);
        let server = unsafe { sys(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut())) };
        write(client, b"by its name");
        check_eq!(read(server), Ok(b"by its name".to_vec()));
    }
    write(server, b"without one");
    check_eq!(read(client), Ok(b"without one".to_vec()));
}

fn name(fd: i32) -> String {
    let (mut a, mut size) = address("");
    size = size.max(size_of_val(&a) as u32);
    unsafe { sys(libc::getsockname(fd, (&raw mut a).cast(), &raw mut size)) };
    let bytes = a.sun_path.iter().take(size as usize - 2).map(|&c| c as u8 as char).collect::<String>();
    bytes.trim_end_matches('\0').to_owned()
}

/// Connections that were not accepted yet, in their order.
pub(super) fn waiting() {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    let listener = bound(kind, "door");
    unsafe { sys(libc::listen(listener, 5)) };
    let clients: Vec<i32> = (0..3).map(|_| connected(kind, "door")).collect();
    ready();
    for (n, client) in clients.into_iter().enumerate() {
        let server = unsafe { sys(libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut())) };
        write(client, &[n as u8; 3]);
        check_eq!(read(server), Ok(vec![n as u8; 3]));
        write(server, b"in");
        check_eq!(read(client), Ok(b"in".to_vec()));
    }
    check_eq!(unsafe { libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) }, -1);
}

/// Sends descriptors with a text.
pub(super) fn send(fd: i32, text: &[u8], rights: &[i32]) {
    let mut control = [0u64; 16];
    let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of_val(rights) as u32) as usize;
        let head = libc::CMSG_FIRSTHDR(&raw const message);
        ((*head).cmsg_level, (*head).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        (*head).cmsg_len = libc::CMSG_LEN(size_of_val(rights) as u32) as usize;
        std::ptr::copy_nonoverlapping(rights.as_ptr(), libc::CMSG_DATA(head).cast(), rights.len());
        sys(libc::sendmsg(fd, &raw const message, 0) as i64);
    }
}

/// Receives a text and descriptors.
pub(super) fn receive(fd: i32) -> (Vec<u8>, Vec<i32>) {
    let (mut text, mut control) = ([0u8; 64], [0u64; 16]);
    let mut part = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        let n = sys(libc::recvmsg(fd, &raw mut message, 0) as i64);
        let head = libc::CMSG_FIRSTHDR(&raw const message);
        let mut rights = Vec::new();
        if !head.is_null() && (*head).cmsg_type == libc::SCM_RIGHTS {
            let count = ((*head).cmsg_len - libc::CMSG_LEN(0) as usize) / 4;
            rights = (0..count).map(|i| libc::CMSG_DATA(head).cast::<i32>().add(i).read_unaligned()).collect();
        }
        (text[..n as usize].to_vec(), rights)
    }
}

/// Descriptors in flight: of files, of sockets that have descriptors in flight themselves, epolls, timers, in all kinds of queues.
pub(super) fn rights() {
    let nonblocking = libc::SOCK_NONBLOCK;
    let outer = pair(libc::SOCK_STREAM | nonblocking);
    let inner = pair(libc::SOCK_DGRAM | nonblocking);
    let innermost = pair(libc::SOCK_SEQPACKET | nonblocking);
    did(std::fs::write("sent", "what is in it"));
    let open = |path: &str| unsafe {
        let path = did(std::ffi::CString::new(path));
        sys(libc::open(path.as_ptr(), libc::O_RDONLY))
    };
    let file = open("sent");
    check_eq!(read_some(file, 5), b"what ");
    send(innermost.0, b"a file", &[file, file]);
    send(inner.0, b"a socket", &[innermost.1]);
    write(inner.0, b"and a word");
    // an epoll that waits for what a task has, and a timer that is over at once
    let wakes = unsafe { sys(libc::eventfd(0, nonblocking)) };
    let epoll = unsafe { sys(libc::epoll_create1(0)) };
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0x1234_5678_9abc };
    sys(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, wakes, &raw mut event) });
    let timer = unsafe { sys(libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK)) };
    let soon = [0i64, 1_000_000, 0, 1_000_000];
    sys(unsafe { libc::timerfd_settime(timer, 0, soon.as_ptr().cast(), std::ptr::null_mut()) });
    send(outer.0, b"a socket, an epoll, a timer", &[inner.1, epoll, timer]);
    write(outer.0, b"!");
    for fd in [file, innermost.1, inner.1, epoll, timer] {
        unsafe { libc::close(fd) };
    }
    ready();
    let (text, fds) = receive(outer.1);
    check_eq!((text.as_slice(), fds.len()), (&b"a socket, an epoll, a timer"[..], 3));
    check_eq!(read(outer.1), Ok(b"!".to_vec()));
    let (text, more) = receive(fds[0]);
    check_eq!((text.as_slice(), more.len()), (&b"a socket"[..], 1));
    check_eq!(read(fds[0]), Ok(b"and a word".to_vec()));
    let (text, files) = receive(more[0]);
    check_eq!((text.as_slice(), files.len()), (&b"a file"[..], 2));
    // one open file: what one reads the other does not
    check_eq!(read_some(files[0], 3), b"is ");
    check_eq!(read_some(files[1], 5), b"in it");
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 4];
    check_eq!(unsafe { libc::epoll_wait(fds[1], events.as_mut_ptr(), 4, 0) }, 0);
    write(wakes, &1u64.to_ne_bytes());
    check_eq!(unsafe { libc::epoll_wait(fds[1], events.as_mut_ptr(), 4, 1000) }, 1);
    check_eq!({ events[0].u64 }, 0x1234_5678_9abc);
    sys(unsafe { libc::epoll_ctl(fds[1], libc::EPOLL_CTL_DEL, wakes, std::ptr::null_mut()) });
    eventually("a timer that was in flight", || read(fds[2]).is_ok_and(|bytes| bytes.len() == 8));
}

fn read_some(fd: i32, n: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; n];
    let got = unsafe { sys(libc::read(fd, bytes.as_mut_ptr().cast(), n) as i64) };
    bytes.truncate(got as usize);
    bytes
}

/// SO_PEEK_OFF, SO_PASSCRED, SO_PASSPIDFD, timestamps: as they were, and what they do.
pub(super) fn options() {
    let nonblocking = libc::SOCK_NONBLOCK;
    let stream = pair(libc::SOCK_STREAM | nonblocking);
    write(stream.0, b"0123456789");
    set_option(stream.1, libc::SO_PEEK_OFF, 4);
    let datagrams = pair(libc::SOCK_DGRAM | nonblocking);
    set_option(datagrams.1, libc::SO_PASSCRED, 1);
    set_option(datagrams.1, libc::SO_TIMESTAMP, 1);
    let pidfds = pair(libc::SOCK_SEQPACKET | nonblocking);
    const SO_PASSPIDFD: i32 = 76;
    set_option(pidfds.0, SO_PASSPIDFD, 1);
    let owned = pair(libc::SOCK_STREAM);
    unsafe {
        sys(libc::fcntl(owned.0, libc::F_SETOWN, libc::getpid()));
        sys(libc::fcntl(owned.0, 10, libc::SIGUSR1));
    }
    ready();
    check_eq!(option(stream.1, libc::SO_PEEK_OFF), 4);
    let mut bytes = [0u8; 16];
    check_eq!(unsafe { libc::recv(stream.1, bytes.as_mut_ptr().cast(), 3, libc::MSG_PEEK) }, 3);
    check_eq!(&bytes[..3], b"456");
    check_eq!(read(stream.1), Ok(b"0123456789".to_vec()));
    check_eq!((option(datagrams.1, libc::SO_PASSCRED), option(datagrams.1, libc::SO_TIMESTAMP)), (1, 1));
    check_eq!((option(datagrams.0, libc::SO_PASSCRED), option(pidfds.0, SO_PASSPIDFD)), (0, 1));
    check_eq!(unsafe { libc::fcntl(owned.0, libc::F_GETOWN) }, unsafe { libc::getpid() });
    check_eq!(unsafe { libc::fcntl(owned.0, 11) }, libc::SIGUSR1);
}

/// The files of sockets, open as paths only: one of its own, whose number comes before that of the socket, and one of nobody.
pub(super) fn path_only() {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::os::unix::net::{UnixListener, UnixStream};
    drop(did(UnixListener::bind("nobody")));
    let listener = did(UnixListener::bind("listening"));
    let open = |name: &str| did(std::fs::File::options().read(true).custom_flags(libc::O_PATH).open(name));
    let (early, nobody) = (open("listening"), open("nobody"));
    // the path before the socket
    let socket = sys(unsafe { libc::fcntl(listener.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 50) });
    drop(listener);
    let late = open("listening");
    ready();
    for file in [&early, &late, &nobody] {
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        sys(unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) });
        check_eq!(stat.st_mode & libc::S_IFMT, libc::S_IFSOCK);
        check_eq!(stat.st_nlink, 1);
        let reached = UnixStream::connect(format!("/proc/self/fd/{}", file.as_raw_fd()));
        check_eq!(reached.is_ok(), file.as_raw_fd() != nobody.as_raw_fd());
        if reached.is_ok() {
            let accepted = sys(unsafe { libc::accept(socket, std::ptr::null_mut(), std::ptr::null_mut()) });
            unsafe { libc::close(accepted) };
        }
    }
}
