//! TCP sockets that listen, UDP sockets.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;

use super::support::*;

fn option(fd: i32, level: i32, name: i32) -> i32 {
    let (mut value, mut size) = (0i32, 4);
    sys(unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut size) });
    value
}

/// Of both families, with options.
pub(super) fn listening() {
    let plain = did(TcpListener::bind("127.0.0.1:0"));
    let six = did(TcpListener::bind((Ipv6Addr::LOCALHOST, 0)));
    did(plain.set_nonblocking(true));
    let one = 1i32;
    for name in [libc::SO_KEEPALIVE, libc::SO_REUSEPORT] {
        sys(unsafe { libc::setsockopt(plain.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const one).cast(), 4) });
    }
    sys(unsafe {
        libc::setsockopt(plain.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY, (&raw const one).cast(), 4)
    });
    // bound, and not listening
    let quiet = unsafe { sys(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)) };
    let addresses = [did(plain.local_addr()), did(six.local_addr())];
    ready();
    check_eq!([did(plain.local_addr()), did(six.local_addr())], addresses);
    check!(plain.accept().is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
    for (listener, address) in [&plain, &six].into_iter().zip(addresses) {
        let mut client = did(TcpStream::connect(address));
        did(client.write_all(b"hello"));
        did(client.shutdown(std::net::Shutdown::Write));
        let (mut server, _) = did(listener.accept());
        did(server.set_nonblocking(false));
        let mut text = String::new();
        did(server.read_to_string(&mut text));
        check_eq!(text, "hello");
    }
    check_eq!(option(plain.as_raw_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
    check_eq!(option(plain.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR), 1);
    check_eq!(option(plain.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY), 1);
    check_eq!(option(quiet, libc::SOL_SOCKET, libc::SO_TYPE), libc::SOCK_STREAM);
}

/// Bound, connected to another one, with options.
pub(super) fn udp() {
    let server = did(UdpSocket::bind("127.0.0.1:0"));
    let client = did(UdpSocket::bind("127.0.0.1:0"));
    did(client.connect(did(server.local_addr())));
    did(server.set_nonblocking(true));
    did(server.set_broadcast(true));
    let six = did(UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)));
    let addresses = [did(server.local_addr()), did(client.local_addr()), did(six.local_addr())];
    ready();
    check_eq!([did(server.local_addr()), did(client.local_addr()), did(six.local_addr())], addresses);
    check_eq!(did(client.peer_addr()), addresses[0]);
    check!(did(server.broadcast()));
    let mut buffer = [0u8; 64];
    check!(server.recv(&mut buffer).is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
    did(client.send(b"datagram"));
    eventually("a datagram", || server.recv_from(&mut buffer).is_ok_and(|(n, from)| n == 8 && from == addresses[1]));
    check_eq!(&buffer[..8], b"datagram");
}

/// Connections that both ends have closed, which still say their ends: of one everything was read, of the other not.
pub(super) fn over() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    did(std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status());
    let listener = did(std::net::TcpListener::bind("127.0.0.1:0"));
    let at = did(listener.local_addr());
    let peer = |socket: &std::net::TcpStream| {
        let (mut name, mut len): (libc::sockaddr_in, _) = (unsafe { std::mem::zeroed() }, 16);
        let room = (&raw mut name).cast();
        sys(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, 28, room, &raw mut len) });
        u16::from_be(name.sin_port)
    };
    let connections: Vec<_> = (0..2)
        .map(|n| {
            let mut client = did(std::net::TcpStream::connect(at));
            let (mut server, _) = did(listener.accept());
            if n == 1 {
                did(client.write_all(b"last"));
                did(server.write_all(b"words"));
            }
            did(client.shutdown(std::net::Shutdown::Write));
            did(server.shutdown(std::net::Shutdown::Write));
            let ports = (did(client.local_addr()).port(), did(server.local_addr()).port());
            let is_over = |socket: &std::net::TcpStream| {
                let (mut info, mut len) = ([0u8; 8], 8);
                let room = info.as_mut_ptr().cast();
                let fd = socket.as_raw_fd();
                sys(unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, room, &raw mut len) });
                info[0] == 7
            };
            eventually("both to be over", || is_over(&client) && is_over(&server));
            (client, server, ports)
        })
        .collect();
    drop(listener);
    ready();
    for (n, (mut client, mut server, ports)) in connections.into_iter().enumerate() {
        check_eq!((peer(&server), peer(&client)), ports);
        check_eq!(did(client.local_addr()).port(), ports.0);
        for (socket, words) in [(&mut server, "last"), (&mut client, "words")] {
            let mut bytes = Vec::new();
            did(socket.read_to_end(&mut bytes));
            check_eq!(bytes, if n == 1 { words.as_bytes() } else { b"" });
            check!(socket.write(b"x").is_err());
        }
    }
}
