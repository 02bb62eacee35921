//! Internet sockets: TCP, UDP, UDP-Lite, raw and ping sockets over IPv4 and IPv6.
//!
//! What a socket is, where it is bound and connected to, it says itself (getsockname(2), getpeername(2), TCP_INFO). The kernel's
//! list (inet_diag) adds what was shut down and how long a UDP queue is; what is neither bound nor connected is not in it.
//!
//! Image: [`InetSkEntry`] in `files.img`. Addresses are words as they lie in memory. `backlog` is that of a listening socket.
//! For a TCP connection, also `tcp-stream-N.img`: see [`tcp`]. Multicast groups: [`groups`].
//!
//! Ports are taken in this order: all sockets bind, with SO_REUSEADDR on each, so that connections and what listens share a
//! port; then those that listen do; then connections are made; at the end each gets its own SO_REUSEADDR. What the image says
//! of SO_REUSEPORT is set before a socket binds: it makes the group that shares a port.
//!
//! Not kept: datagrams that were not received (as with any restart of a host), connections that were not accepted
//! (`--skip-in-flight` must be given), which interface IP_MULTICAST_IF named by number,
//! TCP_WINDOW_CLAMP, UDP_ENCAP, BPF programs of a reuseport group. Refused: multipath TCP, kernel TLS and other upper
//! layers, TCP-MD5 keys, corked UDP.
//!
//! Man pages: ip(7), ipv6(7), tcp(7), udp(7), udplite(7), raw(7), icmp(7).

use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use standstill_images::proto::{FdTypes, FileEntry, InetSkEntry, IpOptsEntry, IpOptsRawEntry, TcpOptsEntry};

use super::options::{self, Opt};
use super::{netlock, tcp, CLOSE, ESTABLISHED, LISTEN};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{Descriptor, DumpFiles};
use crate::options::Options;
use crate::sys::diag::inet::{InetFamily, InetProtocol, InetSocket};
use crate::sys::diag::{Diag, DiagError};

mod groups;
mod restore;

pub use restore::{connections, guard, open, repair_ends, Restored};

const IPPROTO_UDPLITE: u32 = 136;
const IPPROTO_MPTCP: u32 = 262;
const TCP: u32 = libc::IPPROTO_TCP as u32;
const UDP: u32 = libc::IPPROTO_UDP as u32;
const ICMP: u32 = libc::IPPROTO_ICMP as u32;
const ICMPV6: u32 = libc::IPPROTO_ICMPV6 as u32;
const STREAM: u32 = libc::SOCK_STREAM as u32;
const DGRAM: u32 = libc::SOCK_DGRAM as u32;
const RAW: u32 = libc::SOCK_RAW as u32;

const PEERNAME: Opt = Opt::new(libc::SOL_SOCKET, libc::SO_PEERNAME, "SO_PEERNAME");
const UDP_CORK: Opt = Opt::new(libc::IPPROTO_UDP, 1, "UDP_CORK");
const TCP_NODELAY: Opt = Opt::new(libc::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY");
const TCP_CORK: Opt = Opt::new(libc::SOL_TCP, libc::TCP_CORK, "TCP_CORK");
const TCP_ULP: Opt = Opt::new(libc::SOL_TCP, libc::TCP_ULP, "TCP_ULP");
const IP_FREEBIND: Opt = Opt::new(libc::SOL_IP, libc::IP_FREEBIND, "IP_FREEBIND");
const IP_PKTINFO: Opt = Opt::new(libc::SOL_IP, libc::IP_PKTINFO, "IP_PKTINFO");
const IP_TOS: Opt = Opt::new(libc::SOL_IP, libc::IP_TOS, "IP_TOS");
const IP_TTL: Opt = Opt::new(libc::SOL_IP, libc::IP_TTL, "IP_TTL");
const IP_HDRINCL: Opt = Opt::new(libc::SOL_IP, libc::IP_HDRINCL, "IP_HDRINCL");
const IP_NODEFRAG: Opt = Opt::new(libc::SOL_IP, 22, "IP_NODEFRAG");
const IPV6_V6ONLY: Opt = Opt::new(libc::SOL_IPV6, libc::IPV6_V6ONLY, "IPV6_V6ONLY");
const IPV6_FREEBIND: Opt = Opt::new(libc::SOL_IPV6, 78, "IPV6_FREEBIND");
const IPV6_RECVPKTINFO: Opt = Opt::new(libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO");
const IPV6_HDRINCL: Opt = Opt::new(libc::SOL_IPV6, 36, "IPV6_HDRINCL");
const ICMP_FILTER: Opt = Opt::new(255, 1, "ICMP_FILTER");
const ICMPV6_FILTER: Opt = Opt::new(libc::IPPROTO_ICMPV6, 1, "ICMPV6_FILTER");

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    /// The kernel's list of one network namespace, family and protocol, by inode.
    listed: HashMap<(u32, InetFamily, InetProtocol), HashMap<u32, InetSocket>>,
    /// Connections whose image is to be written, when nobody can use them any more.
    connections: Vec<(InetSkEntry, OwnedFd)>,
    /// Connections in repair mode: they go on when this goes.
    repaired: Vec<tcp::Repair>,
    /// Multicast groups of the namespace.
    groups: groups::Groups,
}

impl Dumped {
    /// What the kernel's list says of a socket, if it is there.
    fn find(
        &mut self,
        network: u32,
        family: InetFamily,
        protocol: InetProtocol,
        ino: u32,
    ) -> Result<Option<InetSocket>> {
        let key = (network, family, protocol);
        if let Entry::Vacant(unknown) = self.listed.entry(key) {
            let sockets = match Diag::open().and_then(|mut diag| diag.inet(family, protocol)) {
                // a kernel that cannot say more
                Err(DiagError::Unsupported { .. }) => Vec::new(),
                other => super::listed(other)?,
            };
            unknown.insert(sockets.into_iter().map(|s| (s.inode, s)).collect());
        }
        Ok(self.listed.get(&key).and_then(|sockets| sockets.get(&ino)).cloned())
    }

    /// Connections that [`finish`] writes.
    pub fn connections(&self) -> &[(InetSkEntry, OwnedFd)] {
        &self.connections
    }

    /// The tasks are about to go on, and so are their connections: in repair mode, what they send would fail.
    pub fn tasks_go_on(&mut self) -> Result<()> {
        self.repaired.drain(..).try_for_each(tcp::Repair::resume)
    }

    /// The tasks are gone: their connections end without a word to the other side. Without this, dropping it lets them go on.
    pub fn tasks_are_gone(&mut self) {
        self.repaired.drain(..).for_each(tcp::Repair::abandon);
    }
}

/// How messages call a socket.
fn called(e: &InetSkEntry) -> String {
    let protocol = match (e.r#type, e.proto) {
        (RAW, _) => "raw",
        (_, TCP | IPPROTO_MPTCP) => "TCP",
        (_, UDP) => "UDP",
        (_, IPPROTO_UDPLITE) => "UDP-Lite",
        (_, ICMP | ICMPV6) => "ping",
        _ => "IP",
    };
    let (from, to) = (address(&e.src_addr, e.src_port), address(&e.dst_addr, e.dst_port));
    match (from, to) {
        (Some(from), Some(to)) if e.dst_port != 0 || !to.ip().is_unspecified() => {
            format!("{protocol} socket {} ({from} to {to})", e.ino)
        }
        (Some(from), _) => format!("{protocol} socket {} ({from})", e.ino),
        _ => format!("{protocol} socket {}", e.ino),
    }
}

/// An address of an image.
fn address(words: &[u32], port: u32) -> Option<SocketAddr> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
    let ip = v4.or(<[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from)).ok()?;
    Some(SocketAddr::new(ip, u16::try_from(port).ok()?))
}

/// Where a socket is connected to, or asks to be (SO_PEERNAME says that, getpeername(2) does not).
fn peer(fd: BorrowedFd<'_>, family: i32) -> Result<Option<SocketAddr>> {
    let (mut name, is_v6) = ([0; 28], family == libc::AF_INET6);
    // this option wants no more room than it needs
    let len = if is_v6 { name.len() } else { 16 };
    match PEERNAME.read(fd, &mut name[..len]) {
        Err(e) if e.errno() == libc::ENOTCONN => return Ok(None),
        other => other?,
    };
    let port = u16::from_be_bytes([name[2], name[3]]);
    let mut v6 = [0; 16];
    v6.copy_from_slice(&name[8..24]);
    let v4 = [name[4], name[5], name[6], name[7]];
    Ok(Some(SocketAddr::new(if is_v6 { v6.into() } else { v4.into() }, port)).filter(|at| at.port() != 0))
}

/// Raw and ping sockets may be connected to an address alone, and then do not say so themselves.
fn connected_to_address(e: &mut InetSkEntry, listed: Option<&InetSocket>) -> Result<()> {
    if e.dst_port != 0 {
        return Ok(());
    }
    let family = i32::try_from(e.family).unwrap_or(0);
    if e.r#type == RAW {
        if let Some(socket) = listed {
            e.dst_addr = words(family, Some(SocketAddr::new(socket.destination, 0))).0;
        }
    } else if [ICMP, ICMPV6].contains(&e.proto) {
        let name = if family == libc::AF_INET6 { "icmp6" } else { "icmp" };
        let path = std::path::PathBuf::from(format!("/proc/thread-self/net/{name}"));
        let mut text = Vec::new();
        crate::proc::read_proc(&path, &mut text).call("read").at(Place::Path(path))?;
        let found = crate::proc::net::parse_ping(&text)?.into_iter().find(|s| s.inode == u64::from(e.ino));
        e.dst_addr = found.map(|s| s.peer).filter(|peer| peer.len() == e.dst_addr.len()).unwrap_or(e.dst_addr.clone());
    }
    Ok(())
}

/// An address for an image, in the family of the socket.
fn words(family: i32, at: Option<SocketAddr>) -> (Vec<u32>, u32) {
    let words = |bytes: &[u8]| bytes.chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect();
    let port = at.map_or(0, |at| at.port().into());
    match at.map(|at| at.ip()) {
        Some(IpAddr::V4(ip)) => (words(&ip.octets()), port),
        Some(IpAddr::V6(ip)) => (words(&ip.octets()), port),
        None => (vec![0; if family == libc::AF_INET6 { 4 } else { 1 }], 0),
    }
}

/// Dumps a socket; a connection stays in repair mode.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let fd = d.copy.as_fd();
    let ino = u32::try_from(d.stat.st_ino).unwrap_or(u32::MAX);
    let family = i32::try_from(options::DOMAIN.get(fd)?).unwrap_or(0);
    let (kind, proto) = (options::TYPE.get(fd)?, options::PROTOCOL.get(fd)?);
    let own = rustix::net::getsockname(fd).call("getsockname")?;
    let own = SocketAddr::try_from(own).ok();
    let peer = peer(fd, family)?;
    let ((src_addr, src_port), (dst_addr, dst_port)) = (words(family, own), words(family, peer));
    let mut e = InetSkEntry {
        id,
        ino,
        family: u32::try_from(family).unwrap_or(0),
        r#type: kind,
        proto,
        state: if peer.is_some() { ESTABLISHED } else { CLOSE },
        src_port,
        dst_port,
        flags: d.flags,
        backlog: 0,
        src_addr,
        dst_addr,
        fown: d.fown,
        ns_id: Some(cx.net_ns),
        tcp_opts: Some(TcpOptsEntry::default()),
        ..InetSkEntry::default()
    };
    let protocol = supported(&e)?;
    if matches!(protocol, Some(InetProtocol::Udp | InetProtocol::Udplite)) && UDP_CORK.is_on(fd)? {
        return Err(Error::refused(format!("{}, corked,", called(&e)), "Can't dump corked dgram socket"));
    }
    if family == libc::AF_INET6 {
        e.v6only = Some(IPV6_V6ONLY.is_on(fd)?);
        if let Some(SocketAddr::V6(v6)) = own.filter(|own| own.port() != 0) {
            if v6.scope_id() != 0 {
                let name = rustix::net::netdevice::index_to_name(fd, v6.scope_id()).call("ioctl(SIOCGIFNAME)")?;
                e.ifname = Some(name.into_bytes());
            }
        }
    }
    let listed = match protocol {
        Some(protocol) => {
            let family = if family == libc::AF_INET6 { InetFamily::V6 } else { InetFamily::V4 };
            cx.inet.find(cx.net_ns, family, protocol, ino)?
        }
        None => None,
    };
    connected_to_address(&mut e, listed.as_ref())?;
    let shutdown = listed.as_ref().and_then(|s| s.shutdown).map(i32::from);
    e.shutdown = shutdown.filter(|&bits| bits != 0);
    if let Some(lost) = listed.as_ref().filter(|s| kind == DGRAM && s.rqueue != 0) {
        tracing::warn!("{} bytes of datagrams that {} has not received are not carried", lost.rqueue, called(&e));
    }
    e.ip_opts = Some(ip_options(fd, &e)?);
    if kind != STREAM {
        e.standstill_groups = cx.inet.groups.of(fd, &e)?;
    }
    e.opts = options::dump(fd, false)?;
    if protocol == Some(InetProtocol::Tcp) {
        tcp_state(fd, &mut e, listed.as_ref(), cx)?;
    }
    Ok(FileEntry { id, r#type: FdTypes::Inetsk.into(), isk: Some(e), ..FileEntry::default() })
}

/// The list that a socket is in, if there is one, or a refusal.
fn supported(e: &InetSkEntry) -> Result<Option<InetProtocol>> {
    match (e.r#type, e.proto) {
        (RAW, _) => Ok(Some(InetProtocol::Raw)),
        (STREAM, TCP) => Ok(Some(InetProtocol::Tcp)),
        (DGRAM, UDP) => Ok(Some(InetProtocol::Udp)),
        (DGRAM, IPPROTO_UDPLITE) => Ok(Some(InetProtocol::Udplite)),
        (DGRAM, ICMP | ICMPV6) => Ok(None),
        (STREAM, IPPROTO_MPTCP) => {
            let advice = "use plain TCP; for Go programs, consider using \"GODEBUG=multipathtcp=0\" to disable MPTCP";
            Err(Error::refused(format!("multipath {}", called(e)), advice))
        }
        (kind, proto) => {
            let what = format!("{} of type {kind} and protocol {proto}", called(e));
            Err(Error::refused(what, "close it before the dump"))
        }
    }
}

/// What TCP says of a socket; a connection goes to its own image.
fn tcp_state(
    fd: BorrowedFd<'_>,
    e: &mut InetSkEntry,
    listed: Option<&InetSocket>,
    cx: &mut DumpFiles<'_>,
) -> Result<()> {
    let some = |value: u32| Some(value).filter(|&value| value != 0);
    e.tcp_opts = Some(TcpOptsEntry {
        cork: Some(TCP_CORK.is_on(fd)?).filter(|&on| on),
        nodelay: Some(TCP_NODELAY.is_on(fd)?).filter(|&on| on),
        keepcnt: some(options::TCP_KEEPCNT.get(fd)?),
        keepidle: some(options::TCP_KEEPIDLE.get(fd)?),
        keepintvl: some(options::TCP_KEEPINTVL.get(fd)?),
    });
    let mut layer = [0; 16];
    if matches!(TCP_ULP.read(fd, &mut layer), Ok(len) if len > 0 && layer[0] != 0) {
        return Err(Error::refused(format!("{} with kernel TLS or the like", called(e)), "close it before the dump"));
    }
    if listed.is_some_and(|s| s.has_md5) {
        return Err(Error::refused(format!("{} with TCP-MD5 keys", called(e)), "close it before the dump"));
    }
    let info = tcp::Info::read(fd)?;
    e.state = info.state;
    match e.state {
        LISTEN => {
            e.backlog = info.backlog;
            if info.waiting != 0 && !cx.opts.tcp_skip_in_flight {
                return Err(Error::refused(
                    format!("{} with {} connections in flight", called(e), info.waiting),
                    "In-flight connections can be ignored with the --skip-in-flight option.",
                ));
            }
            Ok(())
        }
        CLOSE | tcp::BOUND_INACTIVE => {
            e.state = CLOSE;
            if listed.is_none() {
                e.shutdown = unconnected_shutdown(fd)?;
            }
            if e.dst_port != 0 && info.state == CLOSE && is_still_known(fd, e, cx.opts)? {
                cx.inet.connections.push((e.clone(), fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?));
                return Ok(());
            }
            // it still says where it was connected to, and is connected no more
            (e.dst_addr, e.dst_port) = words(i32::try_from(e.family).unwrap_or(0), None);
            Ok(())
        }
        ESTABLISHED
        | tcp::SYN_SENT
        | tcp::FIN_WAIT1
        | tcp::FIN_WAIT2
        | tcp::CLOSE_WAIT
        | tcp::LAST_ACK
        | tcp::CLOSING => {
            if cx.opts.tcp_close {
                return Ok(());
            }
            if !cx.opts.tcp_established {
                let advice = "Connected TCP socket, consider using --tcp-established option.";
                return Err(Error::refused(called(e), advice));
            }
            cx.inet.connections.push((e.clone(), fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?));
            Ok(())
        }
        other => Err(Error::refused(format!("{} in state {other}", called(e)), "try again when it is connected")),
    }
}

/// Writes the images of connections, which stay locked and in repair mode.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    for (mut e, fd) in std::mem::take(&mut cx.inet.connections) {
        let place = Place::Item("socket", e.ino.into());
        if e.state != CLOSE {
            cx.lock.add(ends(&e)?).at(place.clone())?;
            if !as_it_is_now(fd.as_fd(), &mut e, cx).at(place.clone())? {
                continue;
            }
        }
        let repair = tcp::dump(fd.as_fd(), &e, cx.images, cx.guard)
            .at(Place::Step("TCP connection"))
            .map_err(|e| Error::In { place, source: Box::new(e) })?;
        cx.inet.repaired.push(repair);
    }
    Ok(())
}

/// What came before packets were kept away may have moved a connection on since its entry was made: what its peer said at last
/// came, or an answer to our own last word. Is it still one that has an image?
fn as_it_is_now(fd: BorrowedFd<'_>, e: &mut InetSkEntry, cx: &mut DumpFiles<'_>) -> Result<bool> {
    let state = tcp::Info::read(fd)?.state;
    if state == e.state {
        return Ok(true);
    }
    tracing::debug!("{} went from state {} to {state}", called(e), e.state);
    e.state = state;
    let lasts = state != CLOSE || is_still_known(fd, e, cx.opts)?;
    if !lasts {
        (e.dst_addr, e.dst_port) = words(i32::try_from(e.family).unwrap_or(0), None);
    }
    cx.inet_changed(e);
    Ok(lasts)
}

/// It is over. Is there still something to read, or does the caller want connections, whose ends such a one still says?
fn is_still_known(fd: BorrowedFd<'_>, e: &mut InetSkEntry, opts: &Options) -> Result<bool> {
    let known = !opts.tcp_close && (opts.tcp_established || tcp::unread(fd)? != 0);
    if known {
        e.standstill_error = has_error(fd)?.then_some(true);
    }
    Ok(known)
}

/// The ends of a connection.
pub fn ends(e: &InetSkEntry) -> Result<netlock::Ends> {
    let own = address(&e.src_addr, e.src_port);
    own.zip(address(&e.dst_addr, e.dst_port))
        .ok_or_else(|| Error::lie("files.img", format!("socket {} has no addresses", e.ino)))
}

/// What poll(2) says now.
fn polled(fd: BorrowedFd<'_>) -> Result<rustix::event::PollFlags> {
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::RDHUP)];
    rustix::event::poll(&mut poll, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).call("poll")?;
    Ok(poll[0].revents())
}

/// What was shut down on a TCP socket that is not connected.
fn unconnected_shutdown(fd: BorrowedFd<'_>) -> Result<Option<i32>> {
    use rustix::event::PollFlags;
    Ok(polled(fd)?.contains(PollFlags::HUP | PollFlags::RDHUP).then_some(1))
}

/// Is there an error that the next call says (SO_ERROR, which asking would take away)?
fn has_error(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(polled(fd)?.contains(rustix::event::PollFlags::ERR))
}

/// Options of IP; those that are as in a new socket have no field.
fn ip_options(fd: BorrowedFd<'_>, e: &InetSkEntry) -> Result<IpOptsEntry> {
    let on = |option: Opt| Ok::<_, Error>(Some(option.is_on(fd)?).filter(|&on| on));
    let some = |option: Opt| Ok::<_, Error>(Some(option.get(fd)?).filter(|&value| value != 0));
    let v6 = e.family == libc::AF_INET6 as u32;
    let raw = match e.r#type {
        RAW => {
            let filter = match (v6, e.proto) {
                (true, ICMPV6) => Some((ICMPV6_FILTER, 32)),
                (false, ICMP) => Some((ICMP_FILTER, 4)),
                _ => None,
            };
            let mut icmpv_filter = Vec::new();
            if let Some((option, len)) = filter {
                let mut bytes = vec![0; len];
                option.read(fd, &mut bytes)?;
                icmpv_filter = bytes.chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect();
            }
            let nodefrag = if v6 { None } else { on(IP_NODEFRAG)? };
            Some(IpOptsRawEntry {
                hdrincl: on(if v6 { IPV6_HDRINCL } else { IP_HDRINCL })?,
                nodefrag,
                checksum: None,
                icmpv_filter,
            })
        }
        _ => None,
    };
    Ok(match v6 {
        true => IpOptsEntry { freebind: on(IPV6_FREEBIND)?, raw, pktinfo: on(IPV6_RECVPKTINFO)?, tos: None, ttl: None },
        false => IpOptsEntry {
            freebind: on(IP_FREEBIND)?,
            raw,
            pktinfo: on(IP_PKTINFO)?,
            tos: some(IP_TOS)?,
            ttl: some(IP_TTL)?,
        },
    })
}

/// Does it wait for connections of TCP?
pub(crate) fn listens(e: &InetSkEntry) -> bool {
    e.proto == TCP && e.r#type == STREAM && e.state == LISTEN
}

/// Which files of an image are connections: their image's number.
pub(crate) fn is_connection(e: &InetSkEntry) -> bool {
    e.proto == TCP && e.r#type == STREAM && e.dst_port != 0
}

/// A socket that holds what an entry says, not bound.
fn new(e: &InetSkEntry) -> Result<OwnedFd> {
    use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};
    let lie = || {
        Error::lie(
            "files.img",
            format!("socket {} of family {}, type {}, protocol {}", e.ino, e.family, e.r#type, e.proto),
        )
    };
    let family = match i32::try_from(e.family).map_err(|_| lie())? {
        libc::AF_INET if e.src_addr.len() == 1 && e.dst_addr.len() == 1 => AddressFamily::INET,
        libc::AF_INET6 if e.src_addr.len() == 4 && e.dst_addr.len() == 4 => AddressFamily::INET6,
        _ => return Err(lie()),
    };
    let kind = match e.r#type {
        STREAM => SocketType::STREAM,
        DGRAM => SocketType::DGRAM,
        RAW => SocketType::RAW,
        _ => return Err(lie()),
    };
    let protocol = std::num::NonZeroU32::new(e.proto).map(Protocol::from_raw);
    let make = || rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, protocol);
    match make() {
        Err(rustix::io::Errno::ACCESS) if [ICMP, ICMPV6].contains(&e.proto) => as_a_pinger(make).call("socket"),
        other => other.call("socket"),
    }
}

/// Runs something in a thread that is in a group whose members may ask whether hosts are there, if there is one here.
fn as_a_pinger<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    crate::sys::thread::as_another(|| {
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default();
        let mut ends = range.split_whitespace().filter_map(|n| n.parse::<u32>().ok());
        if let (Some(first), Some(last)) = (ends.next(), ends.next()) {
            // of this thread alone; a failure says the same as what comes
            if first <= last {
                let _ = crate::sys::calls::set_effective_group(first);
            }
        }
        work()
    })
}

#[cfg(test)]
mod tests;
