//! What cannot be carried, or not without an option: the dump says so by name, before it touches anything, and the guest
//! never hears of it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::support::*;

/// A deleted file that is larger than the limit.
pub(super) fn big_ghost() {
    let mut file = did(File::create("gone"));
    did(file.write_all(&[7; 20_000]));
    did(std::fs::remove_file("gone"));
    ready();
    check_eq!(did(file.metadata()).len(), 20_000);
}

/// A lease on a deleted file, which to read would break it.
pub(super) fn lease() {
    did(std::fs::write("leased", b"x"));
    let file = did(File::options().write(true).open("leased"));
    unsafe { sys(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)) };
    did(std::fs::remove_file("leased"));
    ready();
    check_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }, libc::F_WRLCK);
}

/// A lock, without --file-locks.
pub(super) fn lock() {
    let file = did(File::create("locked"));
    unsafe { sys(libc::flock(file.as_raw_fd(), libc::LOCK_EX)) };
    ready();
    let other = did(File::open("locked"));
    check_eq!(unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, -1);
}

/// A connection to a process outside the tree.
pub(super) fn outside_socket() {
    let mut fds = [0; 2];
    unsafe { sys(libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr())) };
    // the first child ends, so the second is nobody's here: it is outside of the tree
    let first = fork(|| {
        fork(|| {
            unsafe {
                libc::close(fds[0]);
                libc::setsid();
            }
            loop {
                match super::pipes::read(fds[1]) {
                    Ok(bytes) if bytes.is_empty() => return 0,
                    Ok(bytes) => super::pipes::write(fds[1], &bytes),
                    Err(_) => return 1,
                }
            }
        });
        0
    });
    check_eq!(wait(first), 0);
    unsafe { libc::close(fds[1]) };
    ready();
    super::pipes::write(fds[0], b"still there");
    check_eq!(super::pipes::read(fds[0]), Ok(b"still there".to_vec()));
}

/// A performance counter.
pub(super) fn perf() {
    let mut attributes = [0u8; 112];
    // PERF_TYPE_SOFTWARE, size, PERF_COUNT_SW_TASK_CLOCK
    attributes[0] = 1;
    attributes[4] = 112;
    attributes[8] = 1;
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) };
    let _file = unsafe { File::from_raw_fd(sys(fd) as i32) };
    ready();
}

/// A child that is being traced.
pub(super) fn traced() {
    let shared = Shared::new();
    let child = fork(|| {
        shared.set(0, 1);
        shared.wait(1, 1);
        0
    });
    shared.wait(0, 1);
    unsafe { sys(libc::ptrace(libc::PTRACE_SEIZE, child, 0, 0)) };
    ready();
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}

fn socket(family: i32, kind: i32, protocol: i32) -> i32 {
    unsafe { sys(libc::socket(family, kind, protocol)) }
}

/// A socket to another virtual machine.
pub(super) fn vsock() {
    let fd = socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
    ready();
    check!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
}

/// Frames past the network stack.
pub(super) fn xdp() {
    let fd = socket(libc::AF_XDP, libc::SOCK_RAW, 0);
    ready();
    check!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
}

/// Multipath TCP.
pub(super) fn mptcp() {
    let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 262);
    sys(unsafe { libc::listen(fd, 3) });
    ready();
    check!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0);
}

/// A datagram that is being put together.
pub(super) fn corked() {
    let to = did(std::net::UdpSocket::bind("127.0.0.1:0"));
    let from = did(std::net::UdpSocket::bind("127.0.0.1:0"));
    did(from.connect(did(to.local_addr())));
    let cork = |on: i32| {
        let r = unsafe { libc::setsockopt(from.as_raw_fd(), 17, 1, (&raw const on).cast(), 4) };
        sys(r);
    };
    cork(1);
    did(from.send(b"one, "));
    ready();
    did(from.send(b"two"));
    cork(0);
    let mut bytes = [0; 16];
    check_eq!(did(to.recv(&mut bytes)), 8);
    check_eq!(&bytes[..8], b"one, two");
}

/// A filter in eBPF, which nobody can read back.
pub(super) fn ebpf_filter() {
    // r0 = 0xffff; exit
    let program: [u64; 2] = [0x0000_ffff_0000_00b7, 0x95];
    let license = c"Dual MIT/GPL";
    let mut attributes = [0u64; 16];
    // BPF_PROG_TYPE_SOCKET_FILTER, two instructions
    (attributes[0], attributes[1], attributes[2]) =
        (1 | 2 << 32, program.as_ptr().addr() as u64, license.as_ptr().addr() as u64);
    let bpf = unsafe { libc::syscall(libc::SYS_bpf, 5, attributes.as_ptr(), 128) };
    let bpf = sys(bpf) as i32;
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    sys(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, 50, (&raw const bpf).cast(), 4) });
    unsafe { libc::close(bpf) };
    ready();
}

/// Data that was sent before anybody accepted.
pub(super) fn unix_early() {
    let listener = did(std::os::unix::net::UnixListener::bind("early"));
    let mut client = did(std::os::unix::net::UnixStream::connect("early"));
    did(client.write_all(b"early"));
    ready();
    let mut bytes = [0; 5];
    did(std::io::Read::read_exact(&mut did(listener.accept()).0, &mut bytes));
    check_eq!(&bytes, b"early");
}

/// An urgent byte.
pub(super) fn unix_urgent() {
    let (a, b) = did(std::os::unix::net::UnixStream::pair());
    let send = |text: &[u8], flags: i32| unsafe {
        sys(libc::send(a.as_raw_fd(), text.as_ptr().cast(), text.len(), flags) as i64);
    };
    send(b"before", 0);
    send(b"!", libc::MSG_OOB);
    ready();
    let mut byte = 0u8;
    check_eq!(unsafe { libc::recv(b.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_OOB) }, 1);
    check_eq!(byte, b'!');
}

/// Credentials in flight: those of the engine would take their place.
pub(super) fn credentials() {
    let (a, b) = did(std::os::unix::net::UnixDatagram::pair());
    let on = 1i32;
    sys(unsafe { libc::setsockopt(b.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, (&raw const on).cast(), 4) });
    did(a.send(b"from me"));
    ready();
    check_eq!(did(b.recv(&mut [0; 16])), 7);
}

/// A connected TCP socket, without --tcp-established.
pub(super) fn connected() {
    let listener = did(std::net::TcpListener::bind("127.0.0.1:0"));
    let mut client = did(std::net::TcpStream::connect(did(listener.local_addr())));
    let mut server = did(listener.accept()).0;
    ready();
    did(client.write_all(b"still there"));
    did(std::io::Read::read_exact(&mut server, &mut [0; 11]));
}

/// Connections that nobody has accepted, without --skip-in-flight.
pub(super) fn in_flight() {
    let listener = did(std::net::TcpListener::bind("127.0.0.1:0"));
    let _client = did(std::net::TcpStream::connect(did(listener.local_addr())));
    ready();
    did(listener.accept());
}

/// A ring for sending that was used.
pub(super) fn sent_ring() {
    let fd = socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0);
    let words = [4096u32, 1, 1024, 4];
    let r = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_TX_RING, words.as_ptr().cast(), 16) };
    sys(r);
    let ring = map_file(0, 4096, RW, libc::MAP_SHARED, fd, 0).cast::<u32>();
    unsafe { ring.add(2).write_volatile(77) };
    ready();
    check_eq!(unsafe { ring.add(2).read_volatile() }, 77);
}

/// The ring of a socket that is closed.
pub(super) fn lonely_ring() {
    let fd = socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0);
    let words = [4096u32, 1, 1024, 4];
    let r = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, words.as_ptr().cast(), 16) };
    sys(r);
    let ring = map_file(0, 4096, RW, libc::MAP_SHARED, fd, 0);
    unsafe { libc::close(fd) };
    ready();
    check_eq!(unsafe { ring.read_volatile() }, 0);
}

/// Memory of the program that it serves itself.
pub(super) fn userfaultfd() {
    const USER_MODE_ONLY: i32 = 1;
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) };
    let _file = unsafe { File::from_raw_fd(sys(fd) as i32) };
    ready();
}

/// A pidfd of a process that stays behind.
pub(super) fn pidfd() {
    let _file = unsafe { File::from_raw_fd(sys(libc::syscall(libc::SYS_pidfd_open, 1, 0)) as i32) };
    ready();
}

/// A deleted file that has another name, and behind it something that is refused: no name is left of the dump.
pub(super) fn link() {
    did(std::fs::write("first", b"two names"));
    let file = did(File::open("first"));
    did(std::fs::hard_link("first", "second"));
    did(std::fs::remove_file("first"));
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) };
    let _refused = unsafe { File::from_raw_fd(sys(fd) as i32) };
    let names = || {
        let mut all: Vec<_> = did(std::fs::read_dir(".")).map(|e| did(e).file_name()).collect();
        all.retain(|name| name != "ready" && name != "check" && name != "check.new");
        all.sort();
        all
    };
    let before = names();
    ready();
    check_eq!(names(), before);
    check_eq!(did(std::io::read_to_string(file)), "two names");
}

/// A pidfd of a child, in flight.
pub(super) fn flying_pidfd() {
    let child = fork(|| loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
    });
    let pidfd = unsafe { sys(libc::syscall(libc::SYS_pidfd_open, child, 0)) } as i32;
    let (a, b) = did(std::os::unix::net::UnixStream::pair());
    let mut byte = *b"x";
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0u64; 4];
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(pidfd);
        check_eq!(libc::sendmsg(a.as_raw_fd(), &raw const message, 0), 1);
        libc::close(pidfd);
    }
    ready();
    unsafe { sys(libc::kill(child, libc::SIGKILL)) };
    check_eq!(wait(child), libc::SIGKILL);
    drop(b);
}

/// A write lease on a file that is mapped too.
pub(super) fn mapped_lease() {
    did(std::fs::write("leased", b"x"));
    let file = did(File::options().read(true).write(true).open("leased"));
    let (protection, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    unsafe {
        sys(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK));
        let at = libc::mmap(std::ptr::null_mut(), 4096, protection, shared, file.as_raw_fd(), 0);
        check!(at != libc::MAP_FAILED);
    }
    ready();
    check_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }, libc::F_WRLCK);
}

/// An interface that a program makes packets for.
pub(super) fn tun() {
    const TUNSETIFF: u64 = 0x4004_54ca;
    let file = did(File::options().read(true).write(true).open("/dev/net/tun"));
    let mut request = [0u8; 40];
    request[..10].copy_from_slice(b"standstill");
    // IFF_TUN, IFF_NO_PI
    request[16..18].copy_from_slice(&0x1001u16.to_ne_bytes());
    sys(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) });
    ready();
    check!(unsafe { libc::if_nametoindex(c"standstill".as_ptr()) } != 0);
}

/// A child in a time namespace of its own.
pub(super) fn time_of_child() {
    use std::os::fd::AsRawFd as _;
    let own = did(File::open("/proc/self/ns/time"));
    unsafe { sys(libc::unshare(0x80)) };
    did(std::fs::write("/proc/self/timens_offsets", "monotonic 1000 0\n"));
    let child = fork(|| loop {
        unsafe { libc::pause() };
    });
    unsafe { sys(libc::setns(own.as_raw_fd(), 0)) };
    ready();
    unsafe { sys(libc::kill(child, libc::SIGKILL)) };
    wait(child);
}

/// A time namespace that only children to come would be in.
pub(super) fn time_for_children() {
    unsafe { sys(libc::unshare(0x80)) };
    ready();
}
