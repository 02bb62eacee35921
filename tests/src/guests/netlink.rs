//! Netlink sockets: with a number, in groups, connected; nothing in their queues.

use super::support::*;

fn socket(protocol: i32) -> i32 {
    unsafe { sys(libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol)) }
}

fn address(port: u32, groups: u32) -> libc::sockaddr_nl {
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    (address.nl_family, address.nl_pid, address.nl_groups) = (libc::AF_NETLINK as u16, port, groups);
    address
}

const SIZE: u32 = size_of::<libc::sockaddr_nl>() as u32;

/// Own number, groups, and the number that it is connected to.
fn seen(fd: i32) -> [u32; 3] {
    let (mut own, mut peer, mut size) = (address(0, 0), address(0, 0), SIZE);
    unsafe {
        sys(libc::getsockname(fd, (&raw mut own).cast(), &raw mut size));
        libc::getpeername(fd, (&raw mut peer).cast(), &raw mut size);
    }
    [own.nl_pid, own.nl_groups, peer.nl_pid]
}

pub(super) fn netlink() {
    let plain = socket(libc::NETLINK_ROUTE);
    let bound = socket(libc::NETLINK_USERSOCK);
    let port = std::process::id() + 0x4000_0000;
    let (own, peer) = (address(port, 1 << 3), address(port, 0));
    unsafe {
        sys(libc::bind(bound, (&raw const own).cast(), SIZE));
        // a group that an address has no room for
        let group = 3i32;
        sys(libc::setsockopt(bound, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, (&raw const group).cast(), 4));
    }
    let connected = socket(libc::NETLINK_USERSOCK);
    unsafe { sys(libc::connect(connected, (&raw const peer).cast(), SIZE)) };
    let before = [plain, bound, connected].map(seen);
    check_eq!(before[1][..2], [port, 1 << 3 | 1 << 2]);
    ready();
    check_eq!([plain, bound, connected].map(seen), before);
    // a message from one to the other, with its header
    let text = [20u32.to_ne_bytes(), [0; 4], [0; 4], [0; 4], *b"text"].concat();
    let mut got = [0u8; 64];
    unsafe {
        check_eq!(libc::send(connected, text.as_ptr().cast(), text.len(), 0), 20);
        check_eq!(libc::recv(bound, got.as_mut_ptr().cast(), got.len(), libc::MSG_DONTWAIT), 20);
    }
    check_eq!(got[..20], text[..]);
}
