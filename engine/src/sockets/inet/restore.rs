//! Making internet sockets again, all at once: see the order in [`super`].

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use standstill_images::proto::{InetSkEntry, IpOptsEntry, TcpOptsEntry};

use super::super::netlock::Ends;
use super::super::tcp::{self, Reconnected, Repair};
use super::super::{options, shutdown_how, CLOSE, LISTEN};
use super::{address, called, groups, is_connection, new, ICMP, ICMPV6, RAW, STREAM, TCP};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{set_status_flags, RestoreFiles};
use crate::options::Persona;

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    made: bool,
    /// Connections in repair mode, and their network namespaces; if this is dropped, they end without a word to their peers.
    repaired: Vec<(Option<u32>, Repair)>,
}

/// One of the sockets that were made, when it is first asked for.
pub fn open(e: &InetSkEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    if !cx.inet.made {
        cx.inet.made = true;
        make(cx)?;
    }
    cx.opened.remove(&e.id).ok_or_else(|| Error::lie("files.img", format!("{} is there twice", called(e))))
}

/// The ends of all connections that are made again.
pub fn connections(cx: &RestoreFiles<'_>) -> Result<Vec<Ends>> {
    let sockets = cx.entries.values().filter_map(|entry| entry.isk.as_ref());
    sockets.filter(|e| is_connection(e) && e.state != CLOSE).map(super::ends).collect()
}

/// Before [`repair_ends`]: should the engine die, the guard takes all connections back.
pub fn guard(cx: &RestoreFiles<'_>) -> Result<()> {
    let Some(guard) = cx.guard else { return Ok(()) };
    cx.inet.repaired.iter().try_for_each(|(_, repair)| repair.guarded(guard))
}

/// Lets all connections go on, until what comes back is dropped: after the network is open, before the first task runs.
pub fn repair_ends(cx: &mut RestoreFiles<'_>) -> Result<Vec<Reconnected>> {
    let mut going = Vec::new();
    for (network, repair) in std::mem::take(&mut cx.inet.repaired) {
        let _inside = cx.network(network)?;
        going.push(repair.end()?);
    }
    Ok(going)
}

/// A socket on its way.
struct Making {
    e: InetSkEntry,
    fd: OwnedFd,
    repair: Option<Repair>,
}

fn make(cx: &mut RestoreFiles<'_>) -> Result<()> {
    let mut entries: Vec<InetSkEntry> = cx.entries.values().filter_map(|entry| entry.isk.clone()).collect();
    entries.sort_by_key(|e| e.id);
    // whoever shares a port that way had said so when it was bound, and may have taken that back since
    let shared: HashSet<u32> =
        entries.iter().filter(|e| e.opts.so_reuseport == Some(true)).map(|e| e.src_port).collect();
    let mut sockets = Vec::with_capacity(entries.len());
    for e in entries {
        let place = Place::Item("socket", e.ino.into());
        let shared = shared.contains(&e.src_port);
        sockets.push(bound(e, shared, cx).at(place)?);
    }
    type Phase = fn(&mut Making, &RestoreFiles<'_>) -> Result<()>;
    let phases: [Phase; 3] = [listens, connects, last];
    for phase in phases {
        for socket in &mut sockets {
            cx.network(socket.e.ns_id)
                .and_then(|_inside| phase(socket, cx))
                .map_err(|e| Error::In { place: Place::Item("socket", socket.e.ino.into()), source: Box::new(e) })?;
        }
    }
    for Making { e, fd, repair } in sockets {
        cx.opened.insert(e.id, fd);
        cx.inet.repaired.extend(repair.map(|repair| (e.ns_id, repair)));
    }
    Ok(())
}

/// A new socket with all that its port depends on, and with its port.
fn bound(e: InetSkEntry, shared: bool, cx: &RestoreFiles<'_>) -> Result<Making> {
    let _inside = cx.network(e.ns_id)?;
    let fd = new(&e)?;
    let mut making = Making { e, fd, repair: None };
    let (e, fd) = (&making.e, making.fd.as_fd());
    if e.v6only == Some(true) {
        super::IPV6_V6ONLY.set(fd, 1)?;
    }
    options::bind_to_device(fd, &e.opts)?;
    if shared {
        options::REUSEPORT.set(fd, 1)?;
    }
    if is_connection(e) {
        if cx.opts.tcp_close {
            return Ok(making);
        }
        // one that is over disturbs nobody; CRIU asks all the same
        if !cx.opts.tcp_established && (e.state != CLOSE || cx.opts.personality == Persona::Criu) {
            return Err(Error::refused(
                called(e),
                "Connected TCP socket in image: consider using --tcp-established or --tcp-close",
            ));
        }
        making.repair = Some(Repair::of_new(fd, e)?);
    } else {
        options::REUSEADDR.set(fd, 1)?;
    }
    if making.e.src_port != 0 {
        match bind(making.fd.as_fd(), &making.e).at(Place::Step("bind")) {
            // it is closed already, and what its connection has left on the host has the port for a while
            Err(e) if cx.opts.tcp_close && was_closed(&making.e) => tracing::warn!("{e}"),
            other => other?,
        }
    }
    Ok(making)
}

/// A TCP socket whose connection is over.
fn was_closed(e: &InetSkEntry) -> bool {
    (e.r#type, e.proto, e.state) == (STREAM, TCP, CLOSE) && e.shutdown.is_some()
}

fn bind(fd: BorrowedFd<'_>, e: &InetSkEntry) -> Result<()> {
    let mut at = own(e)?;
    if let (SocketAddr::V6(v6), Some(name)) = (&mut at, &e.ifname) {
        v6.set_scope_id(
            rustix::net::netdevice::name_to_index(fd, &String::from_utf8_lossy(name)).call("ioctl(SIOCGIFINDEX)")?,
        );
    }
    // an IPv6 address may be new, and not checked yet
    let v6 = at.is_ipv6();
    let wanted = e.ip_opts.as_ref().and_then(|o| o.freebind) == Some(true);
    let freebind = if v6 { super::IPV6_FREEBIND } else { super::IP_FREEBIND };
    if wanted || v6 {
        freebind.bring(fd, 1)?;
    }
    match rustix::net::bind(fd, &at) {
        // who may use ping sockets is a setting of the system; the number is not what counts there
        Err(_) if e.r#type != RAW && [ICMP, ICMPV6].contains(&e.proto) => {
            tracing::warn!("{} has another number now", called(e))
        }
        Err(Errno::ADDRINUSE) => {
            return Err(Error::Changed { what: format!("the port of {} is in use", called(e)) });
        }
        Err(Errno::ADDRNOTAVAIL) => {
            return Err(Error::Changed { what: format!("the address of {} is not one of this host", called(e)) });
        }
        other => other.call("bind")?,
    }
    if !wanted && v6 {
        freebind.bring(fd, 0)?;
    }
    Ok(())
}

fn own(e: &InetSkEntry) -> Result<SocketAddr> {
    let port = if e.r#type == RAW { 0 } else { e.src_port };
    address(&e.src_addr, port).ok_or_else(|| Error::lie("files.img", format!("socket {} has no own address", e.ino)))
}

fn listens(socket: &mut Making, _cx: &RestoreFiles<'_>) -> Result<()> {
    let e = &socket.e;
    if e.state != LISTEN {
        return Ok(());
    }
    if (e.r#type, e.proto) != (STREAM, TCP) {
        return Err(Error::lie("files.img", format!("{} listens and cannot", called(e))));
    }
    rustix::net::listen(&socket.fd, i32::try_from(e.backlog).unwrap_or(i32::MAX)).call("listen")
}

fn connects(socket: &mut Making, cx: &RestoreFiles<'_>) -> Result<()> {
    let e = &socket.e;
    let to_address = e.r#type == RAW || [ICMP, ICMPV6].contains(&e.proto);
    if e.dst_port == 0 && !(to_address && e.dst_addr.iter().any(|&word| word != 0)) {
        return Ok(());
    }
    let lie = || Error::lie("files.img", format!("socket {} has no address that it is connected to", e.ino));
    let mut to = address(&e.dst_addr, e.dst_port).ok_or_else(lie)?;
    if let (SocketAddr::V6(v6), Some(name)) = (&mut to, &e.ifname) {
        let fd = socket.fd.as_fd();
        v6.set_scope_id(
            rustix::net::netdevice::name_to_index(fd, &String::from_utf8_lossy(name)).call("ioctl(SIOCGIFINDEX)")?,
        );
    }
    match &mut socket.repair {
        Some(repair) => {
            if !tcp::restore(repair, e, &own(e)?, &to, cx.images).at(Place::Step("TCP connection"))? {
                tracing::warn!("{} does not say its other end any more", called(e));
                socket.repair.take().map_or(Ok(()), tcp::Repair::resume)?;
            }
            Ok(())
        }
        None if is_connection(e) => match rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Both) {
            // it counts all the same: what is read from it ends
            Err(Errno::NOTCONN) => Ok(()),
            other => other.call("shutdown"),
        },
        None => rustix::net::connect(&socket.fd, &to).call("connect"),
    }
}

/// Options, status flags, and what was shut down.
fn last(socket: &mut Making, _cx: &RestoreFiles<'_>) -> Result<()> {
    let (e, fd) = (&socket.e, socket.fd.as_fd());
    if let Some(ip) = &e.ip_opts {
        ip_options(fd, e, ip)?;
    }
    options::restore(fd, &e.opts)?;
    groups::restore(fd, e)?;
    if socket.repair.is_none() {
        options::REUSEADDR.bring_if(fd, e.opts.reuseaddr)?;
    }
    options::REUSEPORT.bring(fd, u32::from(e.opts.so_reuseport == Some(true)))?;
    if let Some(tcp) = e.tcp_opts.as_ref().filter(|_| (e.r#type, e.proto) == (STREAM, TCP)) {
        tcp_options(fd, tcp)?;
    }
    // a connection sees to its own
    if let Some(how) = shutdown_how(e.shutdown).filter(|_| socket.repair.is_none()) {
        match rustix::net::shutdown(fd, how) {
            // the kernel notes it, and says this
            Err(Errno::NOTCONN) => {}
            other => other.call("shutdown")?,
        }
    }
    set_status_flags(fd, e.flags)
}

fn ip_options(fd: BorrowedFd<'_>, e: &InetSkEntry, o: &IpOptsEntry) -> Result<()> {
    let v6 = e.src_addr.len() == 4;
    if v6 {
        super::IPV6_FREEBIND.bring_if(fd, o.freebind)?;
        super::IPV6_RECVPKTINFO.bring_if(fd, o.pktinfo)?;
    } else {
        super::IP_FREEBIND.bring_if(fd, o.freebind)?;
        super::IP_PKTINFO.bring_if(fd, o.pktinfo)?;
        super::IP_TOS.bring_if(fd, o.tos)?;
        super::IP_TTL.bring_if(fd, o.ttl)?;
    }
    let Some(raw) = o.raw.as_ref().filter(|_| e.r#type == RAW) else { return Ok(()) };
    if !raw.icmpv_filter.is_empty() {
        let bytes: Vec<u8> = raw.icmpv_filter.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let filter = if v6 { super::ICMPV6_FILTER } else { super::ICMP_FILTER };
        filter.write(fd, &bytes)?;
    }
    super::IP_NODEFRAG.bring_if(fd, raw.nodefrag.filter(|_| !v6))?;
    let hdrincl = if v6 { super::IPV6_HDRINCL } else { super::IP_HDRINCL };
    hdrincl.bring_if(fd, raw.hdrincl)
}

fn tcp_options(fd: BorrowedFd<'_>, o: &TcpOptsEntry) -> Result<()> {
    super::TCP_NODELAY.bring_if(fd, o.nodelay)?;
    super::TCP_CORK.bring_if(fd, o.cork)?;
    options::TCP_KEEPCNT.bring_if(fd, o.keepcnt)?;
    options::TCP_KEEPIDLE.bring_if(fd, o.keepidle)?;
    options::TCP_KEEPINTVL.bring_if(fd, o.keepintvl)
}
