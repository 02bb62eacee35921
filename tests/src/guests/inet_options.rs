//! Options of internet sockets, of the less usual kinds of them, and filters.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::support::*;

fn get(fd: i32, level: i32, name: i32) -> Vec<u8> {
    let (mut value, mut size) = ([0u8; 64], 64);
    sys(unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut size) });
    value[..size as usize].to_vec()
}

fn set_bytes(fd: i32, level: i32, name: i32, value: &[u8]) {
    let r = unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as u32) };
    sys(r);
}

fn set(fd: i32, level: i32, name: i32, value: i32) {
    set_bytes(fd, level, name, &value.to_ne_bytes());
}

fn socket(family: i32, kind: i32, protocol: i32) -> i32 {
    unsafe { sys(libc::socket(family, kind | libc::SOCK_NONBLOCK, protocol)) }
}

const UDPLITE: i32 = 136;
/// Options with values that no new socket has: socket, level, name.
type Asked = Vec<(i32, i32, i32)>;

fn various() -> Asked {
    let mut asked = Vec::new();
    let mut with = |fd: i32, options: &[(i32, i32, i32)]| {
        for &(level, name, value) in options {
            set(fd, level, name, value);
            asked.push((fd, level, name));
        }
    };
    let (socket_level, ip, ipv6, tcp) = (libc::SOL_SOCKET, libc::SOL_IP, libc::SOL_IPV6, libc::SOL_TCP);
    with(
        socket(libc::AF_INET, libc::SOCK_DGRAM, 0),
        &[
            (socket_level, libc::SO_TIMESTAMPNS, 1),
            (socket_level, libc::SO_RXQ_OVFL, 1),
            (socket_level, libc::SO_PRIORITY, 5),
            (socket_level, libc::SO_MARK, 7),
            (socket_level, libc::SO_NO_CHECK, 1),
            (socket_level, libc::SO_RCVLOWAT, 3),
            (ip, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
            (ip, libc::IP_RECVERR, 1),
            (ip, libc::IP_RECVTTL, 1),
            (ip, libc::IP_RECVTOS, 1),
            (ip, libc::IP_TRANSPARENT, 1),
            (ip, libc::IP_MULTICAST_TTL, 9),
            (ip, libc::IP_MULTICAST_LOOP, 0),
            (ip, libc::IP_TOS, 0x10),
            (ip, libc::IP_TTL, 77),
            (libc::SOL_UDP, 103, 1200),
            (libc::SOL_UDP, 104, 1),
        ],
    );
    with(
        socket(libc::AF_INET6, libc::SOCK_DGRAM, 0),
        &[
            (ipv6, libc::IPV6_TCLASS, 0x20),
            (ipv6, libc::IPV6_UNICAST_HOPS, 9),
            (ipv6, libc::IPV6_MULTICAST_HOPS, 8),
            (ipv6, libc::IPV6_RECVHOPLIMIT, 1),
            (ipv6, libc::IPV6_RECVTCLASS, 1),
            (ipv6, libc::IPV6_RECVPKTINFO, 1),
            (ipv6, libc::IPV6_DONTFRAG, 1),
            (ipv6, 70, 0),
            (ip, libc::IP_TOS, 0x08),
        ],
    );
    let stream = socket(libc::AF_INET6, libc::SOCK_STREAM, 0);
    set_bytes(stream, tcp, libc::TCP_CONGESTION, b"reno");
    with(
        stream,
        &[
            (socket_level, libc::SO_ZEROCOPY, 1),
            (tcp, libc::TCP_USER_TIMEOUT, 12_345),
            (tcp, libc::TCP_DEFER_ACCEPT, 3),
            (tcp, libc::TCP_SYNCNT, 2),
            (tcp, libc::TCP_LINGER2, 11),
            (tcp, libc::TCP_NOTSENT_LOWAT, 4096),
            (tcp, libc::TCP_FASTOPEN, 5),
            (tcp, libc::TCP_KEEPIDLE, 55),
        ],
    );
    with(
        socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6),
        &[(socket_level, libc::SO_RCVBUF, 20_000), (ipv6, libc::IPV6_MULTICAST_LOOP, 0)],
    );
    if unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, UDPLITE) } >= 0 {
        with(socket(libc::AF_INET, libc::SOCK_DGRAM, UDPLITE), &[(UDPLITE, 10, 8), (UDPLITE, 11, 8)]);
    }
    asked.push((stream, tcp, libc::TCP_CONGESTION));
    asked
}

/// Every option, on sockets of many kinds.
pub(super) fn options() {
    let asked = various();
    let before: Vec<Vec<u8>> = asked.iter().map(|&(fd, level, name)| get(fd, level, name)).collect();
    ready();
    for (&(fd, level, name), before) in asked.iter().zip(&before) {
        let now = get(fd, level, name);
        if now != *before {
            fail(format_args!("option {name} of level {level} is {now:?}, not {before:?}"));
        }
    }
}

/// Two that share a port, an address that is not there yet, both families at one port, a socket of one interface.
pub(super) fn bound() {
    let (level, one) = (libc::SOL_SOCKET, 1);
    let bind = |fd: i32, address: &[u8]| {
        let r = unsafe { libc::bind(fd, address.as_ptr().cast(), address.len() as u32) };
        sys(r);
    };
    let v4 = |ip: Ipv4Addr, port: u16| {
        [&(libc::AF_INET as u16).to_ne_bytes()[..], &port.to_be_bytes(), &ip.octets(), &[0; 8]].concat()
    };
    let v6 = |ip: Ipv6Addr, port: u16| {
        [&(libc::AF_INET6 as u16).to_ne_bytes()[..], &port.to_be_bytes(), &[0; 4], &ip.octets(), &[0; 4]].concat()
    };
    let shared = [socket(libc::AF_INET, libc::SOCK_STREAM, 0), socket(libc::AF_INET, libc::SOCK_STREAM, 0)];
    for fd in shared {
        set(fd, level, libc::SO_REUSEPORT, one);
        bind(fd, &v4(Ipv4Addr::LOCALHOST, 7001));
        sys(unsafe { libc::listen(fd, 16) });
    }
    let free = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    set(free, libc::SOL_IP, libc::IP_FREEBIND, one);
    bind(free, &v4(Ipv4Addr::new(192, 0, 2, 7), 7002));
    let free6 = socket(libc::AF_INET6, libc::SOCK_STREAM, 0);
    set(free6, libc::SOL_IPV6, 78, one);
    bind(free6, &v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 7003));
    let only6 = socket(libc::AF_INET6, libc::SOCK_STREAM, 0);
    set(only6, libc::SOL_IPV6, libc::IPV6_V6ONLY, one);
    bind(only6, &v6(Ipv6Addr::UNSPECIFIED, 7004));
    let only4 = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    bind(only4, &v4(Ipv4Addr::UNSPECIFIED, 7004));
    for fd in [only4, only6] {
        sys(unsafe { libc::listen(fd, 1) });
    }
    let device = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    set_bytes(device, level, libc::SO_BINDTODEVICE, b"lo");
    bind(device, &v4(Ipv4Addr::LOCALHOST, 7005));
    ready();
    let taken = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    let address = v4(Ipv4Addr::LOCALHOST, 7001);
    check_eq!(unsafe { libc::bind(taken, address.as_ptr().cast(), 16) }, -1);
    set(taken, level, libc::SO_REUSEPORT, one);
    bind(taken, &address);
    for _ in 0..4 {
        let _client = did(TcpStream::connect((Ipv4Addr::LOCALHOST, 7001)));
        let accepts = |fd: i32| (unsafe { libc::accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) }) >= 0;
        eventually("one of two that share a port", || shared.into_iter().any(accepts));
    }
    let local = |fd: i32| unsafe {
        let socket = std::mem::ManuallyDrop::new(UdpSocket::from_raw_fd(fd));
        did(socket.local_addr()).to_string()
    };
    check_eq!(local(free), "192.0.2.7:7002");
    check_eq!(local(free6), "[2001:db8::1]:7003");
    for (at, fd) in [("127.0.0.1:7004", only4), ("[::1]:7004", only6)] {
        let _client = did(TcpStream::connect(at));
        let accepted = || unsafe { libc::accept(fd, std::ptr::null_mut(), std::ptr::null_mut()) };
        eventually("its own family", || accepted() >= 0);
    }
    check_eq!(get(device, level, libc::SO_BINDTODEVICE), b"lo\0");
}

/// A filter that takes datagrams beginning with `a`, and one that cannot be taken off any more.
pub(super) fn filters() {
    // ldb [8]: behind the UDP header; jeq #'a'; ret all; ret none
    let program = [
        libc::sock_filter { code: 0x30, jt: 0, jf: 0, k: 8 },
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: 'a' as u32 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: u32::MAX },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 },
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_ptr().cast_mut() };
    let sockets = [did(UdpSocket::bind("127.0.0.1:0")), did(UdpSocket::bind("127.0.0.1:0"))];
    for socket in &sockets {
        did(socket.set_nonblocking(true));
        let r = unsafe {
            let (at, size) = ((&raw const filter).cast(), size_of_val(&filter) as u32);
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, size)
        };
        sys(r);
    }
    set(sockets[1].as_raw_fd(), libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1);
    ready();
    let sender = did(UdpSocket::bind("127.0.0.1:0"));
    for socket in &sockets {
        for text in [b"b: no", b"a: ok"] {
            did(sender.send_to(text, did(socket.local_addr())));
        }
        let mut bytes = [0u8; 16];
        eventually("what the filter lets through", || socket.recv(&mut bytes).is_ok());
        check_eq!(&bytes[..5], b"a: ok");
        check!(socket.recv(&mut bytes).is_err());
    }
    let detach = |socket: &UdpSocket| unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DETACH_FILTER, (&raw const filter).cast(), 4)
    };
    check_eq!((detach(&sockets[0]), detach(&sockets[1])), (0, -1));
}

/// Raw sockets and, where a user may have them, ping sockets.
pub(super) fn raw() {
    did(std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0"));
    let ping = socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP);
    let raw = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP);
    set(raw, libc::SOL_IP, libc::IP_HDRINCL, 1);
    // nothing but echo replies
    set(raw, 255, 1, !1);
    let raw6 = socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6);
    let filter: Vec<u8> = (0..32).collect();
    set_bytes(raw6, libc::IPPROTO_ICMPV6, 1, &filter);
    let to = [&(libc::AF_INET as u16).to_ne_bytes()[..], &[0; 2], &[127, 0, 0, 1], &[0; 8]].concat();
    sys(unsafe { libc::connect(ping, to.as_ptr().cast(), 16) });
    ready();
    check_eq!(get(raw, libc::SOL_IP, libc::IP_HDRINCL), 1i32.to_ne_bytes());
    check_eq!(get(raw, 255, 1), (!1i32).to_ne_bytes());
    check_eq!(get(raw6, libc::IPPROTO_ICMPV6, 1), filter);
    let echo = [8u8, 0, 0, 0, 0, 0, 0, 1, b'p', b'i', b'n', b'g'];
    let mut bytes = [0u8; 64];
    eventually("an echo", || unsafe {
        libc::send(ping, echo.as_ptr().cast(), echo.len(), 0);
        std::thread::sleep(std::time::Duration::from_millis(2));
        libc::recv(ping, bytes.as_mut_ptr().cast(), 64, 0) == 12
    });
    check_eq!(&bytes[8..12], b"ping");
    check_eq!(bytes[0], 0);
    // the raw one hears it too
    eventually("an echo reply", || unsafe { libc::recv(raw, bytes.as_mut_ptr().cast(), 64, 0) } == 32);
}

/// Connections that are half-closed, or on their way to the end, with data in their queues; both ends are here.
pub(super) fn states() {
    let mut all = Vec::new();
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let listener = did(TcpListener::bind(at));
        let address = did(listener.local_addr());
        let pair = || {
            let client = did(TcpStream::connect(address));
            (client, did(listener.accept()).0)
        };
        let (mut a, mut b) = pair();
        did(a.write_all(b"there"));
        did(b.write_all(b"and back"));
        let ends = format!("{} {}", did(a.local_addr()), did(a.peer_addr()));
        did(std::fs::write("ends", ends));
        // the client has closed its half, with something on the way both ways
        let (mut half, mut other) = pair();
        did(half.write_all(b"last words"));
        did(half.shutdown(std::net::Shutdown::Write));
        did(other.write_all(b"not yet read"));
        // it has closed, and its end waits behind what nobody reads: FIN_WAIT1, then LAST_ACK
        let full = |from: &mut TcpStream| {
            did(from.set_nonblocking(true));
            let mut sum = 0;
            let mut stuck = 0;
            while stuck < 3 {
                match from.write(&[b'x'; 65_536]) {
                    Ok(n) => (sum, stuck) = (sum + n, 0),
                    Err(_) => {
                        stuck += 1;
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                }
            }
            did(from.set_nonblocking(false));
            sum
        };
        let (mut first, first_peer) = pair();
        let first_sum = full(&mut first);
        did(first.shutdown(std::net::Shutdown::Write));
        let (mut last, last_peer) = pair();
        did(last_peer.shutdown(std::net::Shutdown::Write));
        check_eq!(did(last.read(&mut [0; 8])), 0);
        let last_sum = full(&mut last);
        did(last.shutdown(std::net::Shutdown::Write));
        // reset, with something unread
        let (reset, mut peer) = pair();
        did(peer.write_all(b"unread"));
        did((&reset).write_all(b"never read"));
        eventually("what is to be lost", || peer.peek(&mut [0; 16]).is_ok_and(|n| n == 10));
        drop(peer);
        eventually("a reset", || state(&reset) == 7);
        let (ended, mut peer) = pair();
        did(peer.write_all(b"unread too"));
        drop(peer);
        eventually("its end", || state(&ended) == 8);
        did(ended.shutdown(std::net::Shutdown::Write));
        eventually("the end of both", || state(&ended) == 7);
        all.push((a, b, half, other, (first, first_peer, first_sum), (last, last_peer, last_sum), reset, ended));
        check_eq!(all.last().map(|c| [state(&c.2), state(&c.3), state(&c.4 .0), state(&c.5 .0)]), Some([5, 8, 4, 9]));
    }
    ready();
    for (
        mut a,
        mut b,
        mut half,
        mut other,
        (first, mut first_peer, first_sum),
        (last, mut last_peer, last_sum),
        mut reset,
        mut ended,
    ) in all
    {
        let text = |from: &mut TcpStream, n: usize| {
            let mut bytes = vec![0; n];
            did(from.read_exact(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        };
        check_eq!(text(&mut b, 5), "there");
        check_eq!(text(&mut a, 8), "and back");
        did(a.write_all(b"again"));
        check_eq!(text(&mut b, 5), "again");
        check_eq!([state(&half), state(&other)], [5, 8]);
        check_eq!(text(&mut half, 12), "not yet read");
        check_eq!(text(&mut other, 10), "last words");
        check_eq!(did(other.read(&mut [0; 8])), 0);
        check!(half.write(b"x").is_err());
        did(other.write_all(b"one way"));
        check_eq!(text(&mut half, 7), "one way");
        check_eq!([state(&first), state(&last)], [4, 9]);
        for (peer, sum) in [(&mut first_peer, first_sum), (&mut last_peer, last_sum)] {
            let mut bytes = Vec::new();
            check_eq!(did(peer.read_to_end(&mut bytes)), sum);
            check!(bytes.iter().all(|&b| b == b'x'));
        }
        did(first_peer.write_all(b"answer"));
        check_eq!(text(&mut { first }, 6), "answer");
        check_eq!(text(&mut reset, 6), "unread");
        check!(reset.write(b"x").is_err());
        check_eq!(text(&mut ended, 10), "unread too");
        check_eq!(did(ended.read(&mut [0; 8])), 0);
        drop(last);
    }
}

/// TCP_INFO's state.
fn state(stream: &TcpStream) -> u8 {
    get(stream.as_raw_fd(), libc::SOL_TCP, libc::TCP_INFO)[0]
}

/// A connection that has been asked for and not been answered: a filter keeps it from the one that listens.
pub(super) fn asked() {
    let nothing = [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }];
    let filter = libc::sock_fprog { len: 1, filter: nothing.as_ptr().cast_mut() };
    let listener = did(TcpListener::bind("127.0.0.1:0"));
    let address = did(listener.local_addr());
    let of_listener = |name: i32| unsafe {
        let (at, size) = ((&raw const filter).cast(), size_of_val(&filter) as u32);
        sys(libc::setsockopt(listener.as_raw_fd(), libc::SOL_SOCKET, name, at, size));
    };
    of_listener(libc::SO_ATTACH_FILTER);
    let client = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    let family = (libc::AF_INET as u16).to_ne_bytes();
    let to = [&family[..], &address.port().to_be_bytes(), &[127, 0, 0, 1], &[0; 8]].concat();
    check_eq!(unsafe { libc::connect(client, to.as_ptr().cast(), 16) }, -1);
    check_eq!(errno(), libc::EINPROGRESS);
    let mut client = unsafe { TcpStream::from_raw_fd(client) };
    check_eq!(state(&client), 2);
    ready();
    check_eq!(state(&client), 2);
    of_listener(libc::SO_DETACH_FILTER);
    let (mut server, _) = did(listener.accept());
    did(client.set_nonblocking(false));
    did(client.write_all(b"at last"));
    let mut bytes = [0; 7];
    did(server.read_exact(&mut bytes));
    check_eq!(&bytes, b"at last");
}

/// Dumped with --tcp-close: connections are closed, what listens goes on.
pub(super) fn closed() {
    let listener = did(TcpListener::bind("127.0.0.1:0"));
    let mut client = did(TcpStream::connect(did(listener.local_addr())));
    let (mut server, _) = did(listener.accept());
    did(client.write_all(b"text"));
    if ready() == How::Restored {
        check_eq!(did(server.read(&mut [0; 8])), 0);
        check_eq!(did(client.read(&mut [0; 8])), 0);
    } else {
        check_eq!(did(server.read(&mut [0; 8])), 4);
    }
    let _again = did(TcpStream::connect(did(listener.local_addr())));
    did(listener.accept());
}

/// Connections that nobody has accepted: dumped with --skip-in-flight, they are gone.
pub(super) fn waiting() {
    let listener = did(TcpListener::bind("127.0.0.1:0"));
    let client = did(TcpStream::connect(did(listener.local_addr())));
    let how = ready();
    did(listener.set_nonblocking(how == How::Restored));
    check_eq!(listener.accept().is_ok(), how == How::Running);
    drop(client);
    let again = std::thread::spawn({
        let address = did(listener.local_addr());
        move || did(TcpStream::connect(address))
    });
    did(listener.set_nonblocking(false));
    did(listener.accept());
    check!(again.join().is_ok());
}

/// Sends back what a client sends, who may be outside of the tree; if nobody came, it is its own client in the end.
pub(super) fn echo() {
    let listener = did(TcpListener::bind("127.0.0.1:0"));
    let address = did(listener.local_addr());
    let talking = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let came = talking.clone();
    let accepts = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let runs = accepts.clone();
    let thread = std::thread::spawn(move || {
        runs.store(true, std::sync::atomic::Ordering::SeqCst);
        let (mut stream, _) = did(listener.accept());
        came.store(true, std::sync::atomic::Ordering::SeqCst);
        let mut bytes = vec![0; 100_000];
        loop {
            let n = did(stream.read(&mut bytes));
            if n == 0 {
                return did(stream.shutdown(std::net::Shutdown::Write));
            }
            did(stream.write_all(&bytes[..n]));
        }
    });
    eventually("a thread that accepts", || accepts.load(std::sync::atomic::Ordering::SeqCst));
    did(std::fs::write("port", address.port().to_string()));
    ready();
    if !talking.load(std::sync::atomic::Ordering::SeqCst) {
        let mut client = did(TcpStream::connect(address));
        did(client.write_all(b"echo"));
        did(client.shutdown(std::net::Shutdown::Write));
        let mut bytes = Vec::new();
        did(client.read_to_end(&mut bytes));
        check_eq!(bytes, b"echo");
    }
    check!(thread.join().is_ok());
}

/// A socket of an interface that may not be there one day: the one that a test has made, or else the loopback interface.
pub(super) fn device() {
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    let made = c"standstill0";
    let name = if unsafe { libc::if_nametoindex(made.as_ptr()) } == 0 { c"lo" } else { made };
    set_bytes(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, name.to_bytes_with_nul());
    ready();
    check_eq!(get(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE), name.to_bytes_with_nul());
}
