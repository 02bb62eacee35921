//! TCP, UDP, UDP-Lite, raw and MPTCP sockets over IPv4 and IPv6, as inet_diag lists them.
//!
//! The mark is there only for a reader with CAP_NET_ADMIN over the namespace. Queues of a listening TCP socket are the
//! connections that wait and the backlog; of others, bytes.
//!
//! Header: linux/inet_diag.h. Man pages: sock_diag(7), tcp(7), udp(7), raw(7).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::wire::{u32_of, u8_of, Attributes, Fields, Malformed, SocketMemory};

/// Family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InetFamily {
    /// AF_INET.
    V4,
    /// AF_INET6, with the IPv4 connections of such sockets.
    V6,
}

impl InetFamily {
    fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }
}

/// Protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InetProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// UDP-Lite.
    Udplite,
    /// SOCK_RAW of every protocol.
    Raw,
    /// Multipath TCP.
    Mptcp,
}

impl InetProtocol {
    /// What messages call it, and what the kernel needs for it.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Tcp => ("TCP", "CONFIG_INET_TCP_DIAG"),
            Self::Udp => ("UDP", "CONFIG_INET_UDP_DIAG"),
            Self::Udplite => ("UDP-Lite", "CONFIG_INET_UDP_DIAG and UDP-Lite itself"),
            Self::Raw => ("raw", "CONFIG_INET_RAW_DIAG"),
            Self::Mptcp => ("MPTCP", "CONFIG_INET_MPTCP_DIAG"),
        }
    }
}

/// An IP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// Family.
    pub family: InetFamily,
    /// TCP_ state: 1 established … 10 listen, 11 closing, 12 a request, 13 bound only (since 6.8). UDP: 1 or 7.
    pub state: u8,
    /// Timer: 0 none, 1 retransmit, 2 keepalive, 3 time-wait, 4 zero-window probe.
    pub timer: u8,
    /// Retransmits or probes so far.
    pub retransmits: u8,
    /// Own port; of a raw socket its protocol.
    pub source_port: u16,
    /// Peer's port, or 0.
    pub destination_port: u16,
    /// Own address.
    pub source: IpAddr,
    /// Peer's address.
    pub destination: IpAddr,
    /// Interface it is bound to, or 0.
    pub interface: u32,
    /// A number that no other socket had since boot.
    pub cookie: u64,
    /// Until the timer fires, in milliseconds.
    pub expires_ms: u32,
    /// Bytes to be read, or connections that wait.
    pub rqueue: u32,
    /// Bytes that the peer has not acknowledged, or the backlog.
    pub wqueue: u32,
    /// User who made it.
    pub uid: u32,
    /// Inode; 0 if no task has it (not accepted, or closed and lingering).
    pub inode: u32,
    /// 1 no more receiving, 2 no more sending.
    pub shutdown: Option<u8>,
    /// IPV6_V6ONLY; the kernel turns it on, too, when the socket is bound to one IPv6 address.
    pub v6only: Option<bool>,
    /// SO_MARK.
    pub mark: Option<u32>,
    /// IP_TOS.
    pub tos: Option<u8>,
    /// IPV6_TCLASS.
    pub traffic_class: Option<u8>,
    /// Congestion control.
    pub congestion: Option<Vec<u8>>,
    /// Memory.
    pub memory: Option<SocketMemory>,
    /// Protocol of a raw socket.
    pub protocol: Option<u8>,
    /// `struct tcp_info`, as long as this kernel makes it.
    pub tcp_info: Option<Vec<u8>>,
    /// Flags of INET_DIAG_SOCKOPT: the two bytes of its bit fields.
    pub options: Option<[u8; 2]>,
    /// cgroup v2.
    pub cgroup_id: Option<u64>,
    /// It has TCP-MD5 keys.
    pub has_md5: bool,
    /// Upper-layer protocol ("tls", "mptcp", "espintcp").
    pub upper_layer: Option<Vec<u8>>,
}

/// The question for all of one family and protocol.
#[must_use]
pub fn request(family: InetFamily, protocol: InetProtocol) -> Vec<u8> {
    const RAW: u8 = 255;
    const MPTCP: u32 = 262;
    const NOT_TIME_WAIT: u32 = !(1 << 6);
    // INFO, CONG, TOS, TCLASS, SKMEMINFO, SHUTDOWN: each is the bit before its number.
    const EXTENSIONS: u8 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7;
    let number = match protocol {
        InetProtocol::Tcp => 6,
        InetProtocol::Udp => 17,
        InetProtocol::Udplite => 136,
        InetProtocol::Raw | InetProtocol::Mptcp => RAW,
    };
    let mut body = vec![family.number(), number, EXTENSIONS, 0];
    body.extend(NOT_TIME_WAIT.to_ne_bytes());
    body.extend([0; 40]);
    body.extend([u8::MAX; 8]);
    if protocol == InetProtocol::Mptcp {
        // The number does not fit the field, so it comes as an attribute.
        body.extend(8u16.to_ne_bytes());
        body.extend(3u16.to_ne_bytes());
        body.extend(MPTCP.to_ne_bytes());
    }
    body
}

/// Reads one message.
///
/// # Errors
/// If the family is another, or a field or attribute that is known is too short.
pub fn parse(message: &[u8]) -> Result<InetSocket, Malformed> {
    let mut fields = Fields::new(message, "an IP socket");
    let [family, state, timer, retransmits] = fields.bytes()?;
    let family = match family {
        2 => InetFamily::V4,
        10 => InetFamily::V6,
        _ => return Err(Malformed("the family of an IP socket")),
    };
    let (source_port, destination_port) = (fields.u16_network()?, fields.u16_network()?);
    let (source, destination) = (address(family, fields.bytes()?), address(family, fields.bytes()?));
    let (interface, cookie) = (fields.u32()?, fields.u64()?);
    let (expires_ms, rqueue, wqueue) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (uid, inode) = (fields.u32()?, fields.u32()?);
    let mut socket = InetSocket {
        family,
        state,
        timer,
        retransmits,
        source_port,
        destination_port,
        source,
        destination,
        interface,
        cookie,
        expires_ms,
        rqueue,
        wqueue,
        uid,
        inode,
        shutdown: None,
        v6only: None,
        mark: None,
        tos: None,
        traffic_class: None,
        congestion: None,
        memory: None,
        protocol: None,
        tcp_info: None,
        options: None,
        cgroup_id: None,
        has_md5: false,
        upper_layer: None,
    };
    for attribute in Attributes::new(fields.rest()) {
        let (kind, value) = attribute?;
        extension(&mut socket, kind, value)?;
    }
    Ok(socket)
}

fn extension(socket: &mut InetSocket, kind: u16, value: &[u8]) -> Result<(), Malformed> {
    match kind {
        2 => socket.tcp_info = Some(value.to_vec()),
        4 => socket.congestion = Some(value.strip_suffix(b"\0").unwrap_or(value).to_vec()),
        5 => socket.tos = Some(u8_of(value, "the TOS of an IP socket")?),
        6 => socket.traffic_class = Some(u8_of(value, "the traffic class of an IP socket")?),
        7 => socket.memory = Some(SocketMemory::parse(value)?),
        8 => socket.shutdown = Some(u8_of(value, "the shutdown of an IP socket")?),
        10 => socket.protocol = Some(u8_of(value, "the protocol of an IP socket")?),
        11 => socket.v6only = Some(u8_of(value, "IPV6_V6ONLY")? != 0),
        15 => socket.mark = Some(u32_of(value, "the mark of an IP socket")?),
        18 => socket.has_md5 = true,
        19 => {
            for nested in Attributes::new(value) {
                if let (1, name) = nested? {
                    socket.upper_layer = Some(name.strip_suffix(b"\0").unwrap_or(name).to_vec());
                }
            }
        }
        21 => socket.cgroup_id = Some(Fields::new(value, "the cgroup of an IP socket").u64()?),
        22 => socket.options = Some(Fields::new(value, "the options of an IP socket").bytes()?),
        _ => {}
    }
    Ok(())
}

fn address(family: InetFamily, bytes: [u8; 16]) -> IpAddr {
    match family {
        InetFamily::V4 => {
            let [a, b, c, d, ..] = bytes;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        InetFamily::V6 => IpAddr::V6(Ipv6Addr::from(bytes)),
    }
}
