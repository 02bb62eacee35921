//! Multicast groups: any source, all but one, some only; IPv4 and IPv6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use super::support::*;

const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;

fn storage(address: IpAddr) -> Vec<u8> {
    let mut bytes = match address {
        IpAddr::V4(v4) => [&(libc::AF_INET as u16).to_ne_bytes()[..], &[0; 2], &v4.octets()].concat(),
        IpAddr::V6(v6) => [&(libc::AF_INET6 as u16).to_ne_bytes()[..], &[0; 6], &v6.octets()].concat(),
    };
    bytes.resize(128, 0);
    bytes
}

fn loopback() -> u32 {
    unsafe { libc::if_nametoindex(c"lo".as_ptr()) }
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() {
        libc::SOL_IP
    } else {
        libc::SOL_IPV6
    }
}

fn set(socket: &UdpSocket, level: i32, name: i32, value: &[u8]) {
    sys(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as u32) });
}

/// One source of a group: heard, or not heard.
fn source(socket: &UdpSocket, name: i32, group: IpAddr, source: IpAddr) {
    let request = [&loopback().to_ne_bytes()[..], &[0; 4], &storage(group), &storage(source)].concat();
    set(socket, level(group), name, &request);
}

/// What a socket hears of a group, as the kernel says it.
fn heard(socket: &UdpSocket, group: IpAddr) -> Vec<u8> {
    let mut bytes = [&loopback().to_ne_bytes()[..], &[0; 4], &storage(group), &[0; 4], &8u32.to_ne_bytes()].concat();
    bytes.resize(144 + 8 * 128, 0);
    let mut len = bytes.len() as u32;
    let at = bytes.as_mut_ptr();
    sys(unsafe { libc::getsockopt(socket.as_raw_fd(), level(group), MCAST_MSFILTER, at.cast(), &raw mut len) });
    bytes.truncate(len as usize);
    bytes
}

pub(super) fn groups() {
    let v4 = |text: &str| -> Ipv4Addr { did(text.parse()) };
    let v6 = |text: &str| -> Ipv6Addr { did(text.parse()) };
    let (plain, chosen, plain6, chosen6) = (v4("239.77.1.1"), v4("232.77.1.2"), v6("ff02::7777"), v6("ff32::7778"));
    let socket = did(UdpSocket::bind("0.0.0.0:0"));
    let port = did(socket.local_addr()).port();
    did(socket.join_multicast_v4(&plain, &Ipv4Addr::LOCALHOST));
    source(&socket, MCAST_BLOCK_SOURCE, plain.into(), v4("127.0.0.5").into());
    source(&socket, MCAST_JOIN_SOURCE_GROUP, chosen.into(), v4("127.0.0.1").into());
    source(&socket, MCAST_JOIN_SOURCE_GROUP, chosen.into(), v4("127.0.0.9").into());
    let socket6 = did(UdpSocket::bind("[::]:0"));
    did(socket6.join_multicast_v6(&plain6, loopback()));
    source(&socket6, MCAST_JOIN_SOURCE_GROUP, chosen6.into(), v6("::1").into());
    // an IPv6 socket may be in an IPv4 group
    did(socket6.join_multicast_v4(&chosen, &Ipv4Addr::LOCALHOST));
    let none = did(UdpSocket::bind("127.0.0.1:0"));
    let all: [(&UdpSocket, IpAddr); 5] = [
        (&socket, plain.into()),
        (&socket, chosen.into()),
        (&socket6, plain6.into()),
        (&socket6, chosen6.into()),
        (&socket6, chosen.into()),
    ];
    let before = all.map(|(socket, group)| heard(socket, group));
    check_eq!(before[1].len(), 144 + 2 * 128);
    ready();
    check_eq!(all.map(|(socket, group)| heard(socket, group)), before);
    did(socket.set_read_timeout(Some(Duration::from_secs(10))));
    let send = |from: &str, to: Ipv4Addr, word: &[u8]| {
        let sender = did(UdpSocket::bind((v4(from), 0)));
        set(&sender, libc::SOL_IP, libc::IP_MULTICAST_IF, &Ipv4Addr::LOCALHOST.octets());
        did(sender.send_to(word, (to, port)));
    };
    send("127.0.0.5", plain, b"blocked");
    send("127.0.0.7", chosen, b"not chosen");
    send("127.0.0.9", chosen, b"chosen");
    send("127.0.0.1", plain, b"plain");
    let mut bytes = [0; 16];
    for word in [&b"chosen"[..], b"plain"] {
        let n = did(socket.recv(&mut bytes));
        check_eq!(&bytes[..n], word);
    }
    did(socket.leave_multicast_v4(&plain, &Ipv4Addr::LOCALHOST));
    did(socket6.leave_multicast_v6(&plain6, loopback()));
    drop(none);
}
