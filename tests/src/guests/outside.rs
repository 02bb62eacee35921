//! Files whose other ends, or whose contents, are outside of the tree: a connection, a terminal, a pipe, a file.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::time::Duration;

use super::support::*;

/// Sends back what comes.
fn echo<T>(ends: &T)
where
    for<'a> &'a T: std::io::Read + std::io::Write,
{
    let mut bytes = [0; 4096];
    if let Ok(n) = (&*ends).read(&mut bytes) {
        let _ = (&*ends).write_all(&bytes[..n]);
    }
}

/// Sends back what comes by a connection to `socket` and from the file that `attach` names; says in `attached` that it has it,
/// and at the end in `last` what `data` has, which is mapped, too.
pub(super) fn outside() {
    did(fs::write("data", "inside"));
    let data = did(File::open("data"));
    let mapped = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, data.as_raw_fd(), 0).cast::<u8>()
    };
    let listener = did(UnixListener::bind("socket"));
    did(listener.set_nonblocking(true));
    say_ready();
    let (mut stream, mut attached) = (None, None);
    while asked(&folder().join("check")).is_none() {
        if let (None, Ok((new, _))) = (&stream, listener.accept()) {
            did(new.set_nonblocking(true));
            stream = Some(new);
            did(fs::write("connected", ""));
        }
        if let (None, Ok(path)) = (&attached, fs::read_to_string("attach")) {
            let options = libc::O_NONBLOCK | libc::O_NOCTTY;
            attached =
                Some(did(File::options().read(true).write(!path.contains("/fd/")).custom_flags(options).open(path)));
            did(fs::write("attached", ""));
        }
        if let Some(stream) = &stream {
            echo(stream);
        }
        if let Some(file) = &attached {
            let mut bytes = [0; 4096];
            if let Ok(n @ 1..) = (&*file).read(&mut bytes) {
                let mut heard = did(File::options().create(true).append(true).open("heard"));
                did(heard.write_all(&bytes[..n]));
                let _ = (&*file).write_all(b"echo");
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut bytes = [0; 64];
    let n = did(data.read_at(&mut bytes, 0));
    let page = unsafe { std::slice::from_raw_parts(mapped, n) };
    check_eq!(page, &bytes[..n]);
    did(fs::write("last", &bytes[..n]));
}

/// A datagram socket that sends to somebody outside of the tree: a process that no longer has a parent here.
pub(super) fn datagrams() {
    let at = folder().join("outside");
    let outside = did(UnixDatagram::bind(&at));
    let between = fork(|| {
        let holder = unsafe { libc::fork() };
        if holder == 0 {
            unsafe { libc::setsid() };
            let _ = outside.set_read_timeout(Some(Duration::from_secs(90)));
            let mut bytes = [0; 64];
            while let Ok((n, _)) = outside.recv_from(&mut bytes) {
                if &bytes[..n] == b"end" {
                    return 0;
                }
                let _ = fs::write(folder().join("got.new"), &bytes[..n]);
                let _ = fs::rename(folder().join("got.new"), folder().join("got"));
            }
            return 1;
        }
        0
    });
    check_eq!(wait(between), 0);
    drop(outside);
    let socket = did(UnixDatagram::unbound());
    did(socket.connect(&at));
    let got = |word: &[u8]| fs::read("got").is_ok_and(|got| got == word);
    did(socket.send(b"before"));
    eventually("the first datagram", || got(b"before"));
    ready();
    did(socket.send(b"after"));
    eventually("the second datagram", || got(b"after"));
    did(socket.send(b"end"));
}
