//! Dump, then restore, of sockets that this very process holds.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use standstill_images::{Images, MemoryStore};

use super::*;
use crate::files::RestoreFiles;
use crate::options::Options;
use crate::sockets::tcp::Reconnected;
use crate::sys::calls;

fn established() -> Options {
    Options { tcp_established: true, ..Options::default() }
}

/// Dumps; the entries, and the file ids in the order given.
fn try_dump(opts: &Options, images: &Images, fds: &[&OwnedFd], gone: bool) -> Result<Vec<u32>> {
    let me = std::process::id() as i32;
    let pidfd = calls::pidfd_open(me, 0)?;
    let mut cx = DumpFiles::new(opts, images, vec![me], 1);
    let mut ids = Vec::new();
    for fd in fds {
        let d = Descriptor::read(me, pidfd.as_fd(), fd.as_raw_fd(), &mut Vec::new())?;
        ids.push(cx.descriptor(&d)?.id);
    }
    cx.finish()?;
    if gone {
        cx.inet.tasks_are_gone();
    }
    Ok(ids)
}

/// Dumps these, closes them, makes them again, and checks that they would be dumped the same.
fn again<const N: usize>(opts: &Options, fds: [OwnedFd; N]) -> [OwnedFd; N] {
    let entries = |images: &Images| -> Vec<InetSkEntry> {
        let all = images.read_entries::<FileEntry>(standstill_images::ImageKind::Files, ()).unwrap();
        let mut all: Vec<InetSkEntry> = all.into_iter().map(|e| InetSkEntry { ino: 0, ..e.isk.unwrap() }).collect();
        // bind(2) to one address turns this on, connect(2) does not
        all.iter_mut().filter(|e| e.dst_port != 0).for_each(|e| e.v6only = None);
        all
    };
    let images = Images::new(MemoryStore::new());
    let ids = try_dump(opts, &images, &fds.each_ref(), true).unwrap();
    drop(fds);
    let made: [OwnedFd; N] = super::super::once_free(|| {
        let mut cx = RestoreFiles::read(opts, &images)?;
        let mut made = Vec::new();
        for id in &ids {
            made.push(cx.open(*id)?.try_clone_to_owned().unwrap());
        }
        repair_ends(&mut cx)?.into_iter().for_each(Reconnected::keep);
        Ok(made.try_into().unwrap())
    });
    let second = Images::new(MemoryStore::new());
    try_dump(opts, &second, &made.each_ref(), false).unwrap();
    let (before, mut after) = (entries(&images), entries(&second));
    for (before, after) in before.iter().zip(&mut after).filter(|(e, _)| e.dst_port != 0) {
        // what the peer was promised may take more room than it did (keep_promise)
        assert!(after.opts.so_rcvbuf >= before.opts.so_rcvbuf);
        after.opts.so_rcvbuf = before.opts.so_rcvbuf;
    }
    assert_eq!(before, after);
    made
}

#[test]
fn listening() {
    let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = v4.local_addr().unwrap().port();
    let v6 = TcpListener::bind(("::1", 0)).unwrap();
    let fd: OwnedFd = v4.into();
    super::super::options::REUSEPORT.set(fd.as_fd(), 1).unwrap();
    super::IP_TTL.set(fd.as_fd(), 33).unwrap();
    super::TCP_NODELAY.set(fd.as_fd(), 1).unwrap();
    options::TCP_KEEPIDLE.set(fd.as_fd(), 77).unwrap();
    rustix::net::listen(&fd, 9).unwrap();
    let [v4, _v6] = again(&Options::default(), [fd, v6.into()]);
    let listener = TcpListener::from(v4);
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.write_all(b"x").unwrap();
    listener.set_nonblocking(false).unwrap();
    let mut byte = [0];
    listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn two_listen_on_one_port() {
    let first: OwnedFd = TcpListener::bind("127.0.0.1:0").unwrap().into();
    let port = TcpListener::from(first.try_clone().unwrap()).local_addr().unwrap().port();
    drop(first);
    let listen = || {
        let fd = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
        options::REUSEPORT.set(fd.as_fd(), 1).unwrap();
        rustix::net::bind(&fd, &SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
        rustix::net::listen(&fd, 4).unwrap();
        fd
    };
    again(&Options::default(), [listen(), listen()]);
}

#[test]
fn connections_in_flight() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let fd: OwnedFd = listener.into();
    let images = Images::new(MemoryStore::new());
    assert!(matches!(try_dump(&Options::default(), &images, &[&fd], false), Err(Error::In { .. })));
    let skips = Options { tcp_skip_in_flight: true, ..Options::default() };
    assert!(try_dump(&skips, &images, &[&fd], false).is_ok());
}

#[test]
fn datagrams() {
    let (a, b, c) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("[::1]:0").unwrap(),
    );
    let (at_a, at_b) = (a.local_addr().unwrap(), b.local_addr().unwrap());
    a.connect(at_b).unwrap();
    a.set_broadcast(true).unwrap();
    let unbound = rustix::net::socket(rustix::net::AddressFamily::INET6, rustix::net::SocketType::DGRAM, None).unwrap();
    let [a, b, c, _unbound] = again(&Options::default(), [a.into(), b.into(), c.into(), unbound]);
    let (a, b, c) = (UdpSocket::from(a), UdpSocket::from(b), UdpSocket::from(c));
    assert_eq!((a.local_addr().unwrap(), a.peer_addr().unwrap()), (at_a, at_b));
    a.send(b"hello").unwrap();
    let mut buffer = [0; 16];
    assert_eq!(b.recv_from(&mut buffer).unwrap(), (5, at_a));
    assert!(c.local_addr().unwrap().ip().is_loopback());
}

#[test]
fn not_connected() {
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let socket = |family| rustix::net::socket_with(family, rustix::net::SocketType::STREAM, flags, None).unwrap();
    let (plain, bound) = (socket(rustix::net::AddressFamily::INET), socket(rustix::net::AddressFamily::INET6));
    super::IPV6_V6ONLY.set(bound.as_fd(), 1).unwrap();
    // a port that the kernel gives to nobody else meanwhile
    let port = 20_000 + std::process::id() % 10_000;
    rustix::net::bind(&bound, &format!("[::1]:{port}").parse::<SocketAddr>().unwrap()).unwrap();
    let before = rustix::net::getsockname(&bound).unwrap();
    let [_plain, bound] = again(&Options::default(), [plain, bound]);
    assert_eq!(rustix::net::getsockname(&bound).unwrap(), before);
}

#[test]
fn raw() {
    let icmp = std::num::NonZeroU32::new(ICMP).map(rustix::net::Protocol::from_raw);
    let Ok(fd) = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::RAW, icmp) else {
        println!("skipped: no CAP_NET_RAW");
        return;
    };
    super::ICMP_FILTER.write(fd.as_fd(), &0x0000_00f0u32.to_ne_bytes()).unwrap();
    super::IP_HDRINCL.set(fd.as_fd(), 1).unwrap();
    again(&Options::default(), [fd]);
}

/// Two ends of a connection over the loopback, and who listens.
fn connection(at: &str) -> Option<(TcpListener, TcpStream, TcpStream)> {
    let listener = TcpListener::bind(at).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let server = listener.accept().unwrap().0;
    let fd: OwnedFd = client.try_clone().unwrap().into();
    match tcp::Repair::of_new(fd.as_fd(), &InetSkEntry::default()) {
        Ok(repair) => repair.end().unwrap().keep(),
        Err(_) => {
            println!("skipped: no CAP_NET_ADMIN");
            return None;
        }
    }
    Some((listener, client, server))
}

#[test]
fn a_connection_is_made_again() {
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let Some((listener, mut client, mut server)) = connection(at) else { return };
        let long = vec![b'l'; 200_000];
        client.write_all(b"to the server").unwrap();
        server.write_all(&long).unwrap();
        let names = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let [_listener, client, server] = again(&established(), [listener.into(), client.into(), server.into()]);
        let (mut client, mut server) = (TcpStream::from(client), TcpStream::from(server));
        assert_eq!((client.local_addr().unwrap(), client.peer_addr().unwrap()), names);
        let mut text = vec![0; long.len()];
        client.read_exact(&mut text).unwrap();
        assert_eq!(text, long);
        server.read_exact(&mut text[..13]).unwrap();
        assert_eq!(&text[..13], b"to the server");
        client.write_all(b"more").unwrap();
        server.read_exact(&mut text[..4]).unwrap();
        assert_eq!(&text[..4], b"more");
        drop(client);
        assert_eq!(server.read(&mut text).unwrap(), 0);
    }
}

#[test]
fn what_was_never_sent_is_sent() {
    let Some((listener, mut client, server)) = connection("127.0.0.1:0") else { return };
    client.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(n) = client.write(&[7; 65_536]) {
        written += n;
    }
    let [_listener, client, server] = again(&established(), [listener.into(), client.into(), server.into()]);
    // the peer is promised no more than there is room for: it would send it, and be refused
    let mut info = [0; 240];
    Opt::new(libc::SOL_TCP, libc::TCP_INFO, "TCP_INFO").read(server.as_fd(), &mut info).unwrap();
    let promised = u32::from_ne_bytes(info[228..232].try_into().unwrap());
    let room = Opt::new(libc::SOL_SOCKET, libc::SO_RCVBUF, "SO_RCVBUF").get(client.as_fd()).unwrap();
    assert!(promised <= room, "{promised} bytes are promised, there is room for {room}");
    let mut server = TcpStream::from(server);
    server.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut text = vec![0; written];
    server.read_exact(&mut text).unwrap();
    assert!(text.iter().all(|&b| b == 7));
}

#[test]
fn half_closed_connections() {
    for at in ["127.0.0.1:0", "[::1]:0"] {
        // FIN_WAIT2 and CLOSE_WAIT
        let Some((listener, mut client, mut server)) = connection(at) else { return };
        client.write_all(b"last words").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        server.write_all(b"answer").unwrap();
        let [_listener, client, server] = again(&established(), [listener.into(), client.into(), server.into()]);
        assert_eq!(tcp::Info::read(client.as_fd()).unwrap().state, tcp::FIN_WAIT2);
        assert_eq!(tcp::Info::read(server.as_fd()).unwrap().state, tcp::CLOSE_WAIT);
        let (mut client, mut server, mut text) = (TcpStream::from(client), TcpStream::from(server), Vec::new());
        server.read_to_end(&mut text).unwrap();
        assert_eq!(text, b"last words");
        assert!(client.write(b"x").is_err());
        server.write_all(b" and more").unwrap();
        drop(server);
        text.clear();
        client.read_to_end(&mut text).unwrap();
        assert_eq!(text, b"answer and more");
    }
}

#[test]
fn closed_with_much_to_send() {
    // FIN_WAIT1: the FIN waits behind what the peer has no room for
    let Some((listener, mut client, server)) = connection("127.0.0.1:0") else { return };
    client.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(n) = client.write(&[7; 65_536]) {
        written += n;
    }
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(tcp::Info::read(client.as_fd()).unwrap().state, tcp::FIN_WAIT1);
    let [_listener, _client, server] = again(&established(), [listener.into(), client.into(), server.into()]);
    let (mut server, mut text) = (TcpStream::from(server), Vec::new());
    server.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    server.read_to_end(&mut text).unwrap();
    assert_eq!(text.len(), written);
}

#[test]
fn a_connection_goes_on_after_a_dump() {
    let Some((_listener, mut client, server)) = connection("127.0.0.1:0") else { return };
    client.write_all(b"before").unwrap();
    let (fd, images): (OwnedFd, _) = (server.try_clone().unwrap().into(), Images::new(MemoryStore::new()));
    assert!(try_dump(&Options::default(), &images, &[&fd], false).is_err());
    try_dump(&established(), &images, &[&fd], false).unwrap();
    assert_eq!(Opt::new(libc::SOL_TCP, libc::TCP_REPAIR, "TCP_REPAIR").get(fd.as_fd()).unwrap(), 0);
    let (mut server, mut text) = (server, [0; 12]);
    client.write_all(b" after").unwrap();
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"before after");
}

/// Between the list of descriptors and the lock on their connections, packets still come.
#[test]
fn what_comes_before_the_lock() {
    for reset in [false, true] {
        let Some((listener, mut client, server)) = connection("127.0.0.1:0") else { return };
        let (fds, opts, images) =
            ([OwnedFd::from(listener), server.into()], established(), Images::new(MemoryStore::new()));
        let me = std::process::id() as i32;
        let pidfd = calls::pidfd_open(me, 0).unwrap();
        let mut cx = DumpFiles::new(&opts, &images, vec![me], 1);
        let read = |fd: &OwnedFd| Descriptor::read(me, pidfd.as_fd(), fd.as_raw_fd(), &mut Vec::new()).unwrap();
        let ids = fds.each_ref().map(|fd| cx.descriptor(&read(fd)).unwrap().id);
        client.write_all(b"last words").unwrap();
        if reset {
            rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
            drop(client);
        } else {
            client.shutdown(std::net::Shutdown::Write).unwrap();
        }
        cx.finish().unwrap();
        cx.inet.tasks_are_gone();
        drop((cx, fds));
        let made: OwnedFd = super::super::once_free(|| {
            let mut cx = RestoreFiles::read(&opts, &images)?;
            let state = cx.entry(ids[1])?.isk.as_ref().unwrap().state;
            assert_eq!(state, if reset { CLOSE } else { tcp::CLOSE_WAIT });
            let made = cx.open(ids[1])?.try_clone_to_owned().unwrap();
            repair_ends(&mut cx)?.into_iter().for_each(Reconnected::keep);
            Ok(made)
        });
        let (mut server, mut text) = (TcpStream::from(made), [0; 10]);
        server.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"last words");
        let last = server.read(&mut text).map_err(|e| e.kind());
        assert_eq!(last, if reset { Err(std::io::ErrorKind::ConnectionReset) } else { Ok(0) });
    }
}

#[test]
fn closed_instead() {
    let Some((_listener, client, _server)) = connection("127.0.0.1:0") else { return };
    let opts = Options { tcp_close: true, ..Options::default() };
    let images = Images::new(MemoryStore::new());
    let fd: OwnedFd = client.into();
    let ids = try_dump(&opts, &images, &[&fd], false).unwrap();
    let mut cx = RestoreFiles::read(&opts, &images).unwrap();
    let mut closed = TcpStream::from(cx.open(ids[0]).unwrap().try_clone_to_owned().unwrap());
    assert_eq!(closed.read(&mut [0; 4]).unwrap(), 0);
    assert!(closed.write(b"x").is_err());
}

#[test]
fn lying_entries() {
    let good = InetSkEntry {
        family: 2,
        r#type: STREAM,
        proto: TCP,
        src_addr: vec![0],
        dst_addr: vec![0],
        ..InetSkEntry::default()
    };
    assert!(new(&good).is_ok());
    for bad in [
        InetSkEntry { src_addr: vec![], ..good.clone() },
        InetSkEntry { family: 10, ..good.clone() },
        InetSkEntry { family: 77, ..good.clone() },
        InetSkEntry { r#type: 9, ..good },
    ] {
        assert!(matches!(new(&bad), Err(Error::Lie { .. })));
    }
}
