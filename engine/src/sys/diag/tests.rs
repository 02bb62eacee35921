//! Tests of the client against sockets that they open themselves, and of the readers with broken answers.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use super::unix::UnixAddress;
use super::*;

fn ino(fd: impl AsFd) -> u32 {
    u32::try_from(rustix::fs::fstat(fd).unwrap().st_ino).unwrap()
}

#[test]
fn unix_sockets() {
    let path = std::env::temp_dir().join(format!("standstill-diag-{}", std::process::id()));
    let bound = UnixDatagram::bind(&path).unwrap();
    let name = [b"abs\n\0".as_slice(), &std::process::id().to_ne_bytes()].concat();
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let waiting = UnixStream::connect_addr(&listener.local_addr().unwrap()).unwrap();
    let (mut left, right) = UnixStream::pair().unwrap();
    left.write_all(b"12345").unwrap();
    right.shutdown(std::net::Shutdown::Write).unwrap();

    let sockets = Diag::open().unwrap().unix().unwrap();
    let find = |wanted| sockets.iter().find(|s| s.ino == wanted).unwrap();
    let file = rustix::fs::stat(&path).unwrap();
    std::fs::remove_file(&path).unwrap();

    let socket = find(ino(&bound));
    assert_eq!(socket.address(), UnixAddress::Path(path.as_os_str().as_encoded_bytes()));
    assert_eq!(
        (socket.socket_type, socket.state, u64::from(socket.vfs_ino.unwrap())),
        (2, 7, file.st_ino & 0xffff_ffff)
    );
    let socket = find(ino(&listener));
    assert_eq!((socket.address(), socket.state), (UnixAddress::Abstract(&name), 10));
    assert_eq!((&socket.pending[..], socket.rqueue), (&[ino(&waiting)][..], 1));
    let (a, b) = (find(ino(&left)), find(ino(&right)));
    assert_eq!((a.peer, b.peer), (Some(ino(&right)), Some(ino(&left))));
    assert_eq!((b.rqueue, a.rqueue, b.shutdown, a.shutdown), (5, 0, 2, 1));
    assert!(a.memory.send_buffer > 0 && a.uid.is_some() && a.name.is_none() && a.vfs_ino.is_none());
}

#[test]
fn ip_sockets() {
    let mut diag = Diag::open().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"123").unwrap();
    let mut peek = [0; 3];
    while client.peek(&mut peek).unwrap() < 3 {}
    let tcp = diag.inet(InetFamily::V4, InetProtocol::Tcp).unwrap();
    let find = |wanted| tcp.iter().find(|s| s.inode == wanted).unwrap();
    let socket = find(ino(&client));
    assert_eq!((socket.state, socket.rqueue, socket.source, socket.interface), (1, 3, Ipv4Addr::LOCALHOST.into(), 0));
    assert_eq!(socket.destination_port, listener.local_addr().unwrap().port());
    assert_eq!((socket.shutdown, socket.v6only, socket.has_md5), (Some(0), None, false));
    assert!(socket.congestion.is_some() && socket.tcp_info.is_some() && socket.memory.is_some());
    assert_eq!((find(ino(&listener)).state, find(ino(&listener)).source_port), (10, socket.destination_port));

    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let list = diag.inet(InetFamily::V4, InetProtocol::Udp).unwrap();
    assert_eq!(list.iter().find(|s| s.inode == ino(&udp)).unwrap().state, 7);
    if let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        let list = diag.inet(InetFamily::V6, InetProtocol::Tcp).unwrap();
        let socket = list.iter().find(|s| s.inode == ino(&listener)).unwrap();
        assert_eq!((socket.source, socket.v6only), (Ipv6Addr::LOCALHOST.into(), Some(true)));
    } else {
        println!("skipped: no IPv6 here");
    }
    for protocol in [InetProtocol::Udplite, InetProtocol::Raw, InetProtocol::Mptcp] {
        for family in [InetFamily::V4, InetFamily::V6] {
            match diag.inet(family, protocol) {
                Ok(_) => {}
                Err(error @ DiagError::Unsupported { .. }) => println!("skipped: {error}"),
                Err(error) => panic!("{protocol:?}: {error:?}"),
            }
        }
    }
}

#[test]
fn netlink_sockets() {
    let mut diag = Diag::open().unwrap();
    let kobject = Some(rustix::net::netlink::KOBJECT_UEVENT);
    let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::DGRAM, kobject).unwrap();
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 1)).unwrap();
    let list = diag.netlink().unwrap();
    let found = list.iter().find(|s| s.ino == ino(&socket)).unwrap();
    assert_eq!((found.protocol, found.socket_type, found.groups.first()), (15, 2, Some(&1)));
    assert!(found.port != 0);
    // The asking socket is among them, with a dump under way.
    assert!(list.iter().any(|s| s.ino == ino(&diag.socket) && s.flags.is_some_and(|flags| flags & 1 == 1)));
}

#[test]
fn packet_sockets() {
    let mut diag = Diag::open().unwrap();
    let all = rustix::net::Protocol::from_raw(rustix::net::RawProtocol::new(0x0300).unwrap());
    let Ok(socket) = rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, Some(all)) else {
        println!("skipped: packet sockets need CAP_NET_RAW");
        return;
    };
    let list = diag.packet().unwrap();
    let found = list.iter().find(|s| s.ino == ino(&socket)).unwrap();
    assert_eq!((found.socket_type, found.protocol, found.rx_ring, found.fanout), (3, 3, None, None));
    assert_eq!(found.info.unwrap().flags & 1, 1);

    // Block size, blocks, frame size, frames; then fanout 7 of type 1.
    set_packet_option(&socket, libc::PACKET_RX_RING, &[4096, 2, 2048, 4]);
    rustix::net::bind(&socket, &packet_address()).unwrap();
    set_packet_option(&socket, libc::PACKET_FANOUT, &[1 << 16 | 7]);
    let list = diag.packet().unwrap();
    let found = list.iter().find(|s| s.ino == ino(&socket)).unwrap();
    let ring =
        packet::PacketRing { block_size: 4096, block_count: 2, frame_size: 2048, frame_count: 4, ..Default::default() };
    assert_eq!((found.rx_ring, found.tx_ring, found.fanout), (Some(ring), None, Some(1 << 16 | 7)));
    assert_eq!(found.info.unwrap().index, 1);
}

/// All protocols, on the loopback interface, which is the first of every network namespace.
fn packet_address() -> rustix::net::SocketAddrAny {
    // SAFETY: a sockaddr_ll is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = 0x0300;
    address.sll_ifindex = 1;
    let length = u32::try_from(std::mem::size_of_val(&address)).unwrap();
    // SAFETY: the pointer is to a live, initialised socket address of this length, which is copied.
    unsafe { rustix::net::SocketAddrAny::read((&raw const address).cast(), length) }
}

fn set_packet_option(socket: &OwnedFd, option: i32, value: &[u32]) {
    let length = u32::try_from(std::mem::size_of_val(value)).unwrap();
    // SAFETY: the kernel only reads `length` bytes, all of which belong to `value`.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            libc::SOL_PACKET,
            option,
            value.as_ptr().cast(),
            length,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn many_sockets_take_more_than_one_datagram() {
    let pairs: Vec<_> = (0..500).map(|_| UnixStream::pair().unwrap()).collect();
    let list = Diag::open().unwrap().unix().unwrap();
    assert!(pairs.iter().all(|(a, b)| list.iter().any(|s| s.ino == ino(a) && s.peer == Some(ino(b)))));
}

/// Frames one message as the kernel does.
fn framed(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend(body);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

#[test]
fn framing() {
    let read = |text: &[u8]| {
        let mut sockets = Vec::new();
        wire::parse_datagram(text, 7, unix::parse, &mut sockets).map(|answer| (answer, sockets))
    };
    let mut body = vec![1, 1, 1, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0];
    body.extend([5, 0, 6, 0, 3, 0, 0, 0]);
    let one = framed(20, 2, 7, &body);
    let (answer, sockets) = read(&[&one[..], &framed(3, 2, 7, &0i32.to_ne_bytes())].concat()).unwrap();
    assert_eq!((answer, sockets.len()), (Answer::Done { interrupted: false }, 1));
    assert_eq!((sockets[0].ino, sockets[0].shutdown, sockets[0].cookie), (9, 3, 0x2_0000_0001));
    let stale = framed(20, 2, 6, &body);
    assert_eq!(read(&stale), Ok((Answer::More { interrupted: false }, Vec::new())));
    let changed = framed(20, 0x12, 7, &body);
    assert_eq!(read(&changed).unwrap().0, Answer::More { interrupted: true });
    assert_eq!(read(&framed(2, 0, 7, &(-2i32).to_ne_bytes())).unwrap().0, Answer::Error(2));
    assert_eq!(read(&framed(3, 0, 7, &(-2i32).to_ne_bytes())).unwrap().0, Answer::Error(2));
    assert_eq!(read(&framed(2, 0, 7, &i32::MIN.to_ne_bytes())).unwrap().0, Answer::Error(i32::MAX));
    for length in 1..one.len() {
        assert!(read(&one[..length]).is_err(), "{length}");
    }
    assert!(read(&framed(20, 0, 7, &body[..15])).is_err());
    assert!(read(&framed(99, 0, 7, &body)).is_err());
    assert!(read(&[0; 16]).is_err());
    assert!(read(&[u8::MAX; 16]).is_err());
    let mut zero_length = body.clone();
    zero_length.splice(16..18, [0, 0]);
    assert!(read(&framed(20, 0, 7, &zero_length)).is_err());
}
