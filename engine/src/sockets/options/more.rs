//! Options that CRIU's entries have no place for: `standstill_options` of `sk_opts_entry`, which CRIU skips.
//!
//! Only what differs from a new socket of the same kind is written, so that a checkpoint says nothing of most sockets.
//! [`TABLE`] is all that can be there: an image that names another option is a lie. Options are set last, in the order of the
//! table; one that this kernel does not take is warned about.
//!
//! Of a pair that is one setting with two layouts (SO_TIMESTAMP_NEW, SO_TIMESTAMP_OLD) the kernel tells the old one for
//! both, so the new one stands first.
//!
//! Man pages: socket(7), ip(7), ipv6(7), tcp(7), udp(7), netlink(7), packet(7).

use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};
use standstill_images::proto::SkOptionEntry;

use super::{Opt, DOMAIN, PROTOCOL, TYPE};
use crate::error::{Call, Error, Result};

/// Which sockets have an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    All,
    Unix,
    /// IPv4, and IPv6 sockets that speak it.
    Inet,
    Inet6,
    /// Both of these, if they can speak to many; a connection that was accepted has other things there.
    Many,
    Many6,
    Tcp,
    /// TCP that is not connected.
    Quiet,
    Udp,
    UdpLite,
    Raw6,
    Netlink,
    Packet,
}

/// One option: whose, its level, number, name, length of its value, what a new socket says.
type Row = (Of, i32, i32, &'static str, usize, u32);

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
const SOL_IP: i32 = libc::SOL_IP;
const SOL_IPV6: i32 = libc::SOL_IPV6;
const SOL_TCP: i32 = libc::SOL_TCP;
const SOL_UDP: i32 = 17;
const SOL_UDPLITE: i32 = 136;
const SOL_RAW: i32 = 255;
const SOL_NETLINK: i32 = libc::SOL_NETLINK;
const SOL_PACKET: i32 = libc::SOL_PACKET;

const TABLE: &[Row] = &[
    (Of::All, SOL_SOCKET, 63, "SO_TIMESTAMP_NEW", 4, 0),
    (Of::All, SOL_SOCKET, 29, "SO_TIMESTAMP", 4, 0),
    (Of::All, SOL_SOCKET, 64, "SO_TIMESTAMPNS_NEW", 4, 0),
    (Of::All, SOL_SOCKET, 35, "SO_TIMESTAMPNS", 4, 0),
    (Of::All, SOL_SOCKET, 65, "SO_TIMESTAMPING_NEW", 8, 0),
    (Of::All, SOL_SOCKET, 37, "SO_TIMESTAMPING", 8, 0),
    (Of::All, SOL_SOCKET, 40, "SO_RXQ_OVFL", 4, 0),
    (Of::All, SOL_SOCKET, 41, "SO_WIFI_STATUS", 4, 0),
    (Of::All, SOL_SOCKET, 43, "SO_NOFCS", 4, 0),
    (Of::All, SOL_SOCKET, 45, "SO_SELECT_ERR_QUEUE", 4, 0),
    (Of::All, SOL_SOCKET, 46, "SO_BUSY_POLL", 4, 0),
    (Of::All, SOL_SOCKET, 47, "SO_MAX_PACING_RATE", 8, u32::MAX),
    (Of::All, SOL_SOCKET, 60, "SO_ZEROCOPY", 4, 0),
    (Of::All, SOL_SOCKET, 61, "SO_TXTIME", 8, 0),
    (Of::All, SOL_SOCKET, 69, "SO_PREFER_BUSY_POLL", 4, 0),
    (Of::All, SOL_SOCKET, 70, "SO_BUSY_POLL_BUDGET", 4, 0),
    (Of::All, SOL_SOCKET, 74, "SO_TXREHASH", 4, 1),
    (Of::All, SOL_SOCKET, 75, "SO_RCVMARK", 4, 0),
    (Of::All, SOL_SOCKET, 82, "SO_RCVPRIORITY", 4, 0),
    (Of::Unix, SOL_SOCKET, 76, "SO_PASSPIDFD", 4, 0),
    (Of::Unix, SOL_SOCKET, 83, "SO_PASSRIGHTS", 4, 1),
    (Of::Unix, SOL_SOCKET, 84, "SO_INQ", 4, 0),
    (Of::Inet, SOL_IP, 4, "IP_OPTIONS", 0, 0),
    (Of::Inet, SOL_IP, 6, "IP_RECVOPTS", 4, 0),
    (Of::Inet, SOL_IP, 7, "IP_RETOPTS", 4, 0),
    (Of::Inet, SOL_IP, 10, "IP_MTU_DISCOVER", 4, 1),
    (Of::Inet, SOL_IP, 11, "IP_RECVERR", 4, 0),
    (Of::Inet, SOL_IP, 12, "IP_RECVTTL", 4, 0),
    (Of::Inet, SOL_IP, 13, "IP_RECVTOS", 4, 0),
    (Of::Inet, SOL_IP, 18, "IP_PASSSEC", 4, 0),
    (Of::Inet, SOL_IP, 19, "IP_TRANSPARENT", 4, 0),
    (Of::Inet, SOL_IP, 20, "IP_RECVORIGDSTADDR", 4, 0),
    (Of::Inet, SOL_IP, 21, "IP_MINTTL", 4, 0),
    (Of::Inet, SOL_IP, 23, "IP_CHECKSUM", 4, 0),
    (Of::Inet, SOL_IP, 24, "IP_BIND_ADDRESS_NO_PORT", 4, 0),
    (Of::Inet, SOL_IP, 25, "IP_RECVFRAGSIZE", 4, 0),
    (Of::Inet, SOL_IP, 26, "IP_RECVERR_RFC4884", 4, 0),
    (Of::Many, SOL_IP, 32, "IP_MULTICAST_IF", 4, 0),
    (Of::Many, SOL_IP, 33, "IP_MULTICAST_TTL", 4, 1),
    (Of::Many, SOL_IP, 34, "IP_MULTICAST_LOOP", 4, 1),
    (Of::Many, SOL_IP, 49, "IP_MULTICAST_ALL", 4, 1),
    (Of::Inet, SOL_IP, 50, "IP_UNICAST_IF", 4, 0),
    (Of::Inet, SOL_IP, 51, "IP_LOCAL_PORT_RANGE", 4, 0),
    (Of::Inet6, SOL_IP, 1, "IP_TOS", 4, 0),
    (Of::Inet6, SOL_IP, 2, "IP_TTL", 4, 64),
    (Of::Inet6, SOL_IPV6, 16, "IPV6_UNICAST_HOPS", 4, 64),
    (Of::Many6, SOL_IPV6, 17, "IPV6_MULTICAST_IF", 4, 0),
    (Of::Many6, SOL_IPV6, 18, "IPV6_MULTICAST_HOPS", 4, 1),
    (Of::Many6, SOL_IPV6, 19, "IPV6_MULTICAST_LOOP", 4, 1),
    (Of::Inet6, SOL_IPV6, 23, "IPV6_MTU_DISCOVER", 4, 1),
    (Of::Inet6, SOL_IPV6, 25, "IPV6_RECVERR", 4, 0),
    (Of::Many6, SOL_IPV6, 29, "IPV6_MULTICAST_ALL", 4, 1),
    (Of::Inet6, SOL_IPV6, 31, "IPV6_RECVERR_RFC4884", 4, 0),
    (Of::Inet6, SOL_IPV6, 33, "IPV6_FLOWINFO_SEND", 4, 0),
    (Of::Inet6, SOL_IPV6, 51, "IPV6_RECVHOPLIMIT", 4, 0),
    (Of::Inet6, SOL_IPV6, 60, "IPV6_RECVPATHMTU", 4, 0),
    (Of::Inet6, SOL_IPV6, 62, "IPV6_DONTFRAG", 4, 0),
    (Of::Inet6, SOL_IPV6, 66, "IPV6_RECVTCLASS", 4, 0),
    (Of::Inet6, SOL_IPV6, 67, "IPV6_TCLASS", 4, 0),
    (Of::Inet6, SOL_IPV6, 70, "IPV6_AUTOFLOWLABEL", 4, 1),
    (Of::Inet6, SOL_IPV6, 72, "IPV6_ADDR_PREFERENCES", 4, 2),
    (Of::Inet6, SOL_IPV6, 73, "IPV6_MINHOPCOUNT", 4, 0),
    (Of::Inet6, SOL_IPV6, 74, "IPV6_RECVORIGDSTADDR", 4, 0),
    (Of::Inet6, SOL_IPV6, 75, "IPV6_TRANSPARENT", 4, 0),
    (Of::Inet6, SOL_IPV6, 76, "IPV6_UNICAST_IF", 4, 0),
    (Of::Inet6, SOL_IPV6, 77, "IPV6_RECVFRAGSIZE", 4, 0),
    (Of::Raw6, SOL_RAW, 7, "IPV6_CHECKSUM", 4, u32::MAX),
    (Of::Quiet, SOL_TCP, 2, "TCP_MAXSEG", 4, 536),
    (Of::Tcp, SOL_TCP, 7, "TCP_SYNCNT", 4, 6),
    (Of::Tcp, SOL_TCP, 8, "TCP_LINGER2", 4, 60),
    (Of::Tcp, SOL_TCP, 9, "TCP_DEFER_ACCEPT", 4, 0),
    (Of::Tcp, SOL_TCP, 13, "TCP_CONGESTION", 0, 0),
    (Of::Tcp, SOL_TCP, 16, "TCP_THIN_LINEAR_TIMEOUTS", 4, 0),
    (Of::Tcp, SOL_TCP, 18, "TCP_USER_TIMEOUT", 4, 0),
    (Of::Tcp, SOL_TCP, 23, "TCP_FASTOPEN", 4, 0),
    (Of::Tcp, SOL_TCP, 25, "TCP_NOTSENT_LOWAT", 4, 0),
    (Of::Tcp, SOL_TCP, 27, "TCP_SAVE_SYN", 4, 0),
    (Of::Tcp, SOL_TCP, 30, "TCP_FASTOPEN_CONNECT", 4, 0),
    (Of::Tcp, SOL_TCP, 34, "TCP_FASTOPEN_NO_COOKIE", 4, 0),
    (Of::Tcp, SOL_TCP, 36, "TCP_INQ", 4, 0),
    (Of::Tcp, SOL_TCP, 37, "TCP_TX_DELAY", 4, 0),
    (Of::Tcp, SOL_TCP, 44, "TCP_RTO_MAX_MS", 4, 120_000),
    (Of::Udp, SOL_UDP, 101, "UDP_NO_CHECK6_TX", 4, 0),
    (Of::Udp, SOL_UDP, 102, "UDP_NO_CHECK6_RX", 4, 0),
    (Of::Udp, SOL_UDP, 103, "UDP_SEGMENT", 4, 0),
    (Of::Udp, SOL_UDP, 104, "UDP_GRO", 4, 0),
    (Of::UdpLite, SOL_UDPLITE, 10, "UDPLITE_SEND_CSCOV", 4, 0),
    (Of::UdpLite, SOL_UDPLITE, 11, "UDPLITE_RECV_CSCOV", 4, 0),
    (Of::Netlink, SOL_NETLINK, 3, "NETLINK_PKTINFO", 4, 0),
    (Of::Netlink, SOL_NETLINK, 4, "NETLINK_BROADCAST_ERROR", 4, 0),
    (Of::Netlink, SOL_NETLINK, 5, "NETLINK_NO_ENOBUFS", 4, 0),
    (Of::Netlink, SOL_NETLINK, 8, "NETLINK_LISTEN_ALL_NSID", 4, 0),
    (Of::Netlink, SOL_NETLINK, 10, "NETLINK_CAP_ACK", 4, 0),
    (Of::Netlink, SOL_NETLINK, 11, "NETLINK_EXT_ACK", 4, 0),
    (Of::Netlink, SOL_NETLINK, 12, "NETLINK_GET_STRICT_CHK", 4, 0),
    (Of::Packet, SOL_PACKET, 19, "PACKET_TX_HAS_OFF", 4, 0),
    (Of::Packet, SOL_PACKET, 20, "PACKET_QDISC_BYPASS", 4, 0),
    (Of::Packet, SOL_PACKET, 23, "PACKET_IGNORE_OUTGOING", 4, 0),
    (Of::Packet, SOL_PACKET, 24, "PACKET_VNET_HDR_SZ", 4, 0),
    // what was looked at is still there where queues are kept
    (Of::All, SOL_SOCKET, 42, "SO_PEEK_OFF", 4, u32::MAX),
    // nothing after this changes a filter
    (Of::All, SOL_SOCKET, 44, "SO_LOCK_FILTER", 4, 0),
];

/// What a socket is.
#[derive(Clone, Copy, Debug)]
struct Kind {
    family: i32,
    kind: u32,
    protocol: u32,
}

impl Kind {
    fn of(fd: BorrowedFd<'_>) -> Result<Kind> {
        let family = i32::try_from(DOMAIN.get(fd)?).unwrap_or(0);
        Ok(Kind { family, kind: TYPE.get(fd)?, protocol: PROTOCOL.get(fd)? })
    }

    fn has(self, of: Of, fd: BorrowedFd<'_>) -> bool {
        let inet = self.family == libc::AF_INET || self.family == libc::AF_INET6;
        let is = |kind: i32, protocol: u32| inet && self.kind == kind as u32 && self.protocol == protocol;
        match of {
            Of::All => true,
            Of::Unix => self.family == libc::AF_UNIX,
            Of::Inet => inet,
            Of::Inet6 => self.family == libc::AF_INET6,
            Of::Many => inet && self.kind != libc::SOCK_STREAM as u32,
            Of::Many6 => self.has(Of::Many, fd) && self.family == libc::AF_INET6,
            Of::Tcp => is(libc::SOCK_STREAM, libc::IPPROTO_TCP as u32),
            Of::Quiet => {
                self.has(Of::Tcp, fd)
                    && matches!(super::super::tcp::Info::read(fd), Ok(i) if i.state == super::super::LISTEN)
            }
            Of::Udp => is(libc::SOCK_DGRAM, libc::IPPROTO_UDP as u32),
            Of::UdpLite => is(libc::SOCK_DGRAM, 136),
            Of::Raw6 => self.family == libc::AF_INET6 && self.kind == libc::SOCK_RAW as u32,
            Of::Netlink => self.family == libc::AF_NETLINK,
            Of::Packet => self.family == libc::AF_PACKET && self.kind != 10,
        }
    }

    /// A new one.
    fn socket(self) -> Result<std::os::fd::OwnedFd> {
        let family = AddressFamily::from_raw(u16::try_from(self.family).unwrap_or(0));
        let protocol = std::num::NonZeroU32::new(self.protocol).map(Protocol::from_raw);
        rustix::net::socket_with(family, SocketType::from_raw(self.kind), SocketFlags::CLOEXEC, protocol).call("socket")
    }
}

fn option(row: &Row) -> Opt {
    Opt::new(row.1, row.2, row.3)
}

/// What a socket says; `None` if the kernel does not know the option for it.
fn read(row: &Row, fd: BorrowedFd<'_>) -> Option<Vec<u8>> {
    let mut value = vec![0; if row.4 == 0 { 40 } else { row.4 }];
    let len = option(row).read(fd, &mut value).ok()?;
    value.truncate(len);
    if row.3 == "TCP_CONGESTION" {
        value.truncate(value.iter().position(|&b| b == 0).unwrap_or(value.len()));
    }
    Some(value)
}

/// Is it what most new sockets say?
fn usual(row: &Row, value: &[u8]) -> bool {
    let word = row.5.to_ne_bytes();
    match row.3 {
        "TCP_CONGESTION" => value == b"cubic",
        "SO_MAX_PACING_RATE" => value.iter().all(|&b| b == 0xff),
        _ => value.iter().enumerate().all(|(i, &b)| b == word.get(i).copied().unwrap_or(0)),
    }
}

/// What the old layout of an option says is what the new one said already.
fn is_said(row: &Row, said: &[SkOptionEntry]) -> bool {
    let newer = match row.3 {
        "SO_TIMESTAMP" => 63,
        "SO_TIMESTAMPNS" => 64,
        "SO_TIMESTAMPING" => 65,
        _ => return false,
    };
    said.iter().any(|o| (o.level, o.name) == (SOL_SOCKET as u32, newer))
}

/// All that a socket has and a new one has not.
pub(super) fn dump(fd: BorrowedFd<'_>) -> Result<Vec<SkOptionEntry>> {
    let kind = Kind::of(fd)?;
    let mut all = Vec::new();
    let mut new = None;
    for row in TABLE.iter().filter(|row| kind.has(row.0, fd)) {
        let Some(value) = read(row, fd).filter(|value| !usual(row, value)) else { continue };
        if is_said(row, &all) {
            continue;
        }
        // this host may have another usual value
        if new.is_none() {
            new = Some(kind.socket()?);
        }
        if new.as_ref().and_then(|new| read(row, new.as_fd())).as_ref() != Some(&value) {
            all.push(SkOptionEntry { level: row.1.unsigned_abs(), name: row.2.unsigned_abs(), value });
        }
    }
    Ok(all)
}

/// Sets them; those of packet sockets that must be there before rings are, only if `early`.
pub(super) fn restore(fd: BorrowedFd<'_>, options: &[SkOptionEntry], early: bool) -> Result<()> {
    for o in options {
        let row = TABLE.iter().find(|row| (row.1.unsigned_abs(), row.2.unsigned_abs()) == (o.level, o.name));
        let row = row.filter(|row| if row.4 == 0 { o.value.len() <= 40 } else { o.value.len() <= row.4 });
        let row = row.ok_or_else(|| {
            Error::lie("files.img", format!("option {} of level {} with {} bytes", o.name, o.level, o.value.len()))
        })?;
        if early != (row.0 == Of::Packet) || read(row, fd).as_ref() == Some(&o.value) {
            continue;
        }
        if let Err(e) = option(row).write(fd, &o.value) {
            tracing::warn!("a socket does not have its {} again: {e}", row.3);
        }
    }
    Ok(())
}
