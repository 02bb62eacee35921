//! Unix sockets: pairs with data in flight, listening ones, datagrams.

use super::pipes::{read, write};
use super::support::*;

fn pair(kind: i32) -> (i32, i32) {
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

fn bound(kind: i32, path: &str) -> i32 {
    let fd = unsafe { sys(libc::socket(libc::AF_UNIX, kind, 0)) };
    let (a, size) = address(path);
    unsafe { sys(libc::bind(fd, (&raw const a).cast(), size)) };
    fd
}

fn connected(kind: i32, path: &str) -> i32 {
    let fd = unsafe { sys(libc::socket(libc::AF_UNIX, kind, 0)) };
    let (a, size) = address(path);
    unsafe { sys(libc::connect(fd, (&raw const a).cast(), size)) };
    fd
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
