//! Pipes: data, ends, sizes, and modes.

use super::support::*;

pub(super) fn pipe(flags: i32) -> (i32, i32) {
    let mut fds = [0; 2];
    unsafe { sys(libc::pipe2(fds.as_mut_ptr(), flags)) };
    (fds[0], fds[1])
}

pub(super) fn write(fd: i32, bytes: &[u8]) {
    let n = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    check_eq!(n, bytes.len() as isize);
}

pub(super) fn read(fd: i32) -> Result<Vec<u8>, i32> {
    let mut buffer = vec![0u8; 1 << 16];
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    if n < 0 {
        return Err(errno());
    }
    buffer.truncate(n as usize);
    Ok(buffer)
}

/// Pipes with data, between processes, with ends that have copies and flags.
pub(super) fn pipes() {
    let data = pipe(libc::O_NONBLOCK);
    write(data.1, b"in the pipe");
    let empty = pipe(libc::O_CLOEXEC);
    let (to_child, from_child) = (pipe(0), pipe(0));
    let copy = unsafe { sys(libc::fcntl(data.0, libc::F_DUPFD, 300)) };
    let child = fork(|| {
        unsafe { libc::close(to_child.1) };
        loop {
            match read(to_child.0) {
                Ok(bytes) if bytes.is_empty() => return 0,
                Ok(bytes) => write(from_child.1, &bytes),
                Err(_) => return 1,
            }
        }
    });
    unsafe { libc::close(to_child.0) };
    write(to_child.1, b"ping");
    check_eq!(read(from_child.0), Ok(b"ping".to_vec()));
    ready();
    check_eq!(read(copy), Ok(b"in the pipe".to_vec()));
    check_eq!(read(data.0), Err(libc::EAGAIN));
    unsafe {
        check_eq!(libc::fcntl(empty.0, libc::F_GETFD), libc::FD_CLOEXEC);
        check_eq!(libc::fcntl(data.0, libc::F_GETFD), 0);
        check_eq!(libc::fcntl(data.1, libc::F_GETFL), libc::O_WRONLY | libc::O_NONBLOCK);
        check_eq!(libc::fcntl(empty.0, libc::F_GETFL), libc::O_RDONLY);
    }
    write(empty.1, b"after");
    check_eq!(read(empty.0), Ok(b"after".to_vec()));
    write(to_child.1, b"pong");
    check_eq!(read(from_child.0), Ok(b"pong".to_vec()));
    unsafe { libc::close(to_child.1) };
    check_eq!(wait(child), 0);
}

/// A pipe of another size, full to the last byte.
pub(super) fn full() {
    let (out, into) = pipe(libc::O_NONBLOCK);
    let size = unsafe { sys(libc::fcntl(into, libc::F_SETPIPE_SZ, 256 << 10)) };
    let bytes: Vec<u8> = (0..size).map(|i| (i / 11) as u8).collect();
    write(into, &bytes);
    check_eq!(unsafe { libc::write(into, bytes.as_ptr().cast(), 1) }, -1);
    ready();
    check_eq!(unsafe { libc::fcntl(out, libc::F_GETPIPE_SZ) }, size);
    check_eq!(unsafe { libc::write(into, bytes.as_ptr().cast(), 1) }, -1);
    check_eq!(errno(), libc::EAGAIN);
    let mut seen = Vec::new();
    while let Ok(more) = read(out) {
        seen.extend(more);
    }
    check!(seen == bytes);
    write(into, b"again");
    check_eq!(read(out), Ok(b"again".to_vec()));
}

/// Pipes of which one end is closed, with and without data.
pub(super) fn halves() {
    let (out, into) = pipe(0);
    write(into, b"last words");
    unsafe { libc::close(into) };
    let (ended, closed) = pipe(0);
    unsafe { libc::close(closed) };
    let (gone, broken) = pipe(0);
    unsafe { libc::close(gone) };
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    ready();
    check_eq!(read(out), Ok(b"last words".to_vec()));
    check_eq!(read(out), Ok(Vec::new()));
    check_eq!(read(ended), Ok(Vec::new()));
    check_eq!(unsafe { libc::write(broken, b"x".as_ptr().cast(), 1) }, -1);
    check_eq!(errno(), libc::EPIPE);
}

/// A pipe in packet mode: packets stay apart, in the pipe and afterwards.
pub(super) fn packets() {
    let (out, into) = pipe(libc::O_DIRECT | libc::O_NONBLOCK);
    let (single, single_into) = pipe(libc::O_DIRECT | libc::O_NONBLOCK);
    for packet in [&b"first"[..], b"x", &[7; 4096], b"last"] {
        write(into, packet);
    }
    write(single_into, b"alone");
    ready();
    check!(unsafe { libc::fcntl(into, libc::F_GETFL) } & libc::O_DIRECT != 0);
    write(into, b"one");
    write(single_into, b"two");
    check_eq!(read(out), Ok(b"first".to_vec()));
    // what does not fit is thrown away with its packet
    let mut byte = 0u8;
    check_eq!(unsafe { libc::read(out, (&raw mut byte).cast(), 1) }, 1);
    check_eq!(byte, b'x');
    check_eq!(read(out), Ok(vec![7; 4096]));
    check_eq!(read(out), Ok(b"last".to_vec()));
    check_eq!(read(out), Ok(b"one".to_vec()));
    check_eq!(read(out), Err(libc::EAGAIN));
    check_eq!(read(single), Ok(b"alone".to_vec()));
    check_eq!(read(single), Ok(b"two".to_vec()));
}
