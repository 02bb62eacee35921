//! TCP connections: sequence numbers, windows, options and both queues, by repair mode.
//!
//! In repair mode (TCP_REPAIR, CAP_NET_ADMIN) a socket sends nothing, not even when it is closed, and shows and takes what a
//! connection is made of. At dump it stays on until the tasks are gone, or is ended if they go on; [`Repair`] sees to that.
//! At restore it stays on until the network is open again, just before the tasks run: [`Repair::end`], which also sends what
//! had never been sent. If a restore fails, sockets are closed in repair mode, and the checkpoint can be tried again.
//!
//! Who keeps packets away meanwhile (`--network-lock`) is not decided here.
//!
//! Image: `tcp-stream-N.img` (N: inode, hexadecimal), one [`TcpStreamEntry`], then what was received and not read, then what
//! was sent and not acknowledged, and at the end of that `unsq_len` bytes that were never sent. `inq_seq` is what comes
//! next from the peer, `outq_seq` what the program would write next.
//!
//! A connection that one side has closed: both sequence numbers count that side's FIN, the lengths do not. The peer's FIN, and
//! its answer to ours, come as packets ([`fin`]); ours is sent when repair mode ends, if the peer had not answered it.
//!
//! A connection that is over, by a reset or by FINs of both, and has left something to read, is made as one that is
//! established, and its peer's reset comes as a packet.
//!
//! Not kept: congestion state, round-trip times, urgent data; which side closed first, if both did.
//!
//! Man page: tcp(7). Header: linux/tcp.h.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use standstill_images::proto::{InetSkEntry, SkOptsEntry, TcpStreamEntry};
use standstill_images::{ImageKind, Images};

use super::options::Guarded;
use super::options::{self, Opt};
use super::queue::PeekOffset;
use super::{CLOSE, ESTABLISHED};
use crate::error::{Call, Error, Result};
use crate::guard::Guard;
use crate::sys::calls;

mod fin;

/// A SYN was sent.
pub const SYN_SENT: u32 = 2;
/// We closed; neither is acknowledged.
pub const FIN_WAIT1: u32 = 4;
/// We closed, which is acknowledged.
pub const FIN_WAIT2: u32 = 5;
/// The peer closed.
pub const CLOSE_WAIT: u32 = 8;
/// The peer closed, then we.
pub const LAST_ACK: u32 = 9;
/// Both closed.
pub const CLOSING: u32 = 11;
/// Bound, and neither listening nor connected (6.8).
pub const BOUND_INACTIVE: u32 = 13;

const REPAIR: Opt = Opt::new(libc::SOL_TCP, libc::TCP_REPAIR, "TCP_REPAIR");
const REPAIR_QUEUE: Opt = Opt::new(libc::SOL_TCP, libc::TCP_REPAIR_QUEUE, "TCP_REPAIR_QUEUE");
const QUEUE_SEQ: Opt = Opt::new(libc::SOL_TCP, libc::TCP_QUEUE_SEQ, "TCP_QUEUE_SEQ");
const REPAIR_OPTIONS: Opt = Opt::new(libc::SOL_TCP, libc::TCP_REPAIR_OPTIONS, "TCP_REPAIR_OPTIONS");
const REPAIR_WINDOW: Opt = Opt::new(libc::SOL_TCP, 29, "TCP_REPAIR_WINDOW");
const TIMESTAMP: Opt = Opt::new(libc::SOL_TCP, libc::TCP_TIMESTAMP, "TCP_TIMESTAMP");
const MAXSEG: Opt = Opt::new(libc::SOL_TCP, libc::TCP_MAXSEG, "TCP_MAXSEG");
const ERROR: Opt = Opt::new(libc::SOL_SOCKET, libc::SO_ERROR, "SO_ERROR");
const INFO: Opt = Opt::new(libc::SOL_TCP, libc::TCP_INFO, "TCP_INFO");

const NO_QUEUE: u32 = 0;
const RECV_QUEUE: u32 = 1;
const SEND_QUEUE: u32 = 2;

const SIOCINQ: u64 = 0x541b;
const SIOCOUTQ: u64 = 0x5411;
const SIOCOUTQNSD: u64 = 0x894b;

/// Bits of `opt_mask`: TCPI_OPT_.
const OPT_TIMESTAMPS: u32 = 1;
const OPT_SACK: u32 = 2;
const OPT_WSCALE: u32 = 4;

/// Options of the TCP header.
const TCPOPT_MAXSEG: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERM: u32 = 4;
const TCPOPT_TIMESTAMP: u32 = 8;

/// What TCP_INFO says, of what is needed here.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// TCP_ state.
    pub state: u32,
    /// TCPI_OPT_.
    options: u32,
    /// Window scales, ours and the peer's.
    scales: (u32, u32),
    /// Of a listening socket: connections that nobody accepted yet.
    pub waiting: u32,
    /// Of a listening socket: how many may wait.
    pub backlog: u32,
}

impl Info {
    /// Of a socket.
    pub fn read(fd: BorrowedFd<'_>) -> Result<Info> {
        let mut info = [0; 104];
        INFO.read(fd, &mut info)?;
        let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        Ok(Info {
            state: info[0].into(),
            options: info[5].into(),
            scales: ((info[6] & 15).into(), (info[6] >> 4).into()),
            waiting: word(24),
            backlog: word(28),
        })
    }
}

/// A socket in repair mode.
#[derive(Debug)]
pub struct Repair {
    fd: OwnedFd,
    /// Its options: repair mode changes SO_REUSEADDR, and filling queues the sizes of buffers.
    opts: SkOptsEntry,
    /// The connection goes on if this is dropped.
    resumes: bool,
    /// What is still to be sent.
    unsent: Vec<u8>,
    /// Whether a FIN is, after that.
    closes: bool,
    /// How many bytes the peer may still send, by what it was told.
    promised: u32,
    /// It is over: what its peer said at last, from whom to whom, and whether the program has yet to hear of it.
    over: Option<(fin::Packet, SocketAddr, SocketAddr, bool)>,
}

/// We have closed.
fn closed(state: u32) -> bool {
    [FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING].contains(&state)
}

/// The peer has closed.
fn peer_closed(state: u32) -> bool {
    [CLOSE_WAIT, LAST_ACK, CLOSING].contains(&state)
}

impl Repair {
    fn begin(fd: BorrowedFd<'_>, e: &InetSkEntry, resumes: bool) -> Result<Repair> {
        let fd = fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?;
        REPAIR.set(fd.as_fd(), 1)?;
        Ok(Repair { fd, opts: e.opts.clone(), resumes, unsent: Vec::new(), closes: false, promised: 0, over: None })
    }

    /// Turns repair mode on for a new socket, before it is bound: it may share its port with what listens there.
    pub fn of_new(fd: BorrowedFd<'_>, e: &InetSkEntry) -> Result<Repair> {
        Repair::begin(fd, e, false)
    }

    /// Should the engine die, the guard takes the connection back: it is in repair mode again when its last owner is gone.
    pub fn guarded(&self, guard: &Guard<'_>) -> Result<()> {
        Guarded::new(guard, self.fd.as_fd())?.resets(REPAIR, 1)
    }

    /// Lets the connection go on, until what comes back is dropped.
    pub fn end(self) -> Result<Reconnected> {
        let socket = Reconnected(Some(self.fd.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?));
        self.leave()?;
        Ok(socket)
    }

    fn leave(mut self) -> Result<()> {
        self.resumes = false;
        if let Some((packet, own, peer, error)) = self.over {
            // its last packet comes before repair mode ends, so that it never speaks to anybody
            fin::receive(&self.fd, &own, &peer, packet, &[CLOSE])?;
            if !error {
                ERROR.get(self.fd.as_fd())?;
            }
            return self.off();
        }
        options::keep_promise(self.fd.as_fd(), &self.opts, self.promised)?;
        self.off()?;
        let mut rest = self.unsent.as_slice();
        if !rest.is_empty() {
            // not the other buffer: what goes out now would promise the peer all of it
            options::enlarge_sending(self.fd.as_fd())?;
        }
        while !rest.is_empty() {
            match rustix::net::send(&self.fd, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                sent => rest = &rest[sent.call("send")?..],
            }
        }
        if self.closes {
            rustix::net::shutdown(&self.fd, Shutdown::Write).call("shutdown")?;
        }
        if self.unsent.is_empty() {
            Ok(())
        } else {
            options::restore_sending(self.fd.as_fd(), &self.opts)
        }
    }

    /// Lets a connection that was dumped go on.
    pub fn resume(mut self) -> Result<()> {
        self.resumes = false;
        self.off()
    }

    /// Ends a connection without a word to the peer, when nobody else has the socket any more.
    pub fn abandon(mut self) {
        self.resumes = false;
    }

    fn off(&self) -> Result<()> {
        REPAIR.set(self.fd.as_fd(), 0)?;
        options::REUSEADDR.bring_if(self.fd.as_fd(), self.opts.reuseaddr)
    }
}

/// A connection that goes on. If this is dropped, that is taken back: it ends without a word to its peer when its last owner
/// is gone, and has its place free for another restore.
pub struct Reconnected(Option<OwnedFd>);

impl Reconnected {
    /// It goes on for good.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Reconnected {
    fn drop(&mut self) {
        if let Some(fd) = &self.0 {
            // a connection that ended meanwhile has nothing to take back
            let _ = REPAIR.set(fd.as_fd(), 1);
        }
    }
}

impl Drop for Repair {
    fn drop(&mut self) {
        if self.resumes {
            if let Err(e) = self.off() {
                tracing::error!("a TCP connection stays in repair mode: {e}");
            }
        }
    }
}

/// Writes a connection to its image. It goes on when what comes back is dropped.
pub fn dump(fd: BorrowedFd<'_>, e: &InetSkEntry, images: &Images, guard: Option<&Guard<'_>>) -> Result<Repair> {
    let socket = guard.map(|guard| Guarded::new(guard, fd)).transpose()?;
    if let Some(socket) = &socket {
        // the last is done first
        socket.resets(options::REUSEADDR, u32::from(e.opts.reuseaddr.unwrap_or_default()))?;
        socket.resets(REPAIR, 0)?;
    }
    let repair = Repair::begin(fd, e, true)?;
    let info = Info::read(fd)?;
    if info.state != e.state {
        return Err(Error::Changed {
            what: format!("TCP connection {} went from state {} to {}", e.ino, e.state, info.state),
        });
    }
    let mut entry = TcpStreamEntry {
        inq_len: unread(fd)?,
        outq_len: length(fd, SIOCOUTQ, "ioctl(SIOCOUTQ)")?,
        unsq_len: Some(length(fd, SIOCOUTQNSD, "ioctl(SIOCOUTQNSD)")?),
        opt_mask: info.options,
        mss_clamp: MAXSEG.get(fd)?,
        ..TcpStreamEntry::default()
    };
    if e.state == SYN_SENT || e.state == CLOSE {
        // the SYN itself counts as a byte; what a connection that is over would have sent goes nowhere
        (entry.outq_len, entry.unsq_len) = (0, Some(0));
    } else if closed(e.state) {
        // and so does a FIN
        entry.outq_len = entry.outq_len.saturating_sub(1);
        entry.unsq_len = entry.unsq_len.map(|len| len.saturating_sub(1));
    }
    if info.options & OPT_WSCALE != 0 {
        (entry.snd_wscale, entry.rcv_wscale) = (info.scales.0, Some(info.scales.1));
    }
    if info.options & OPT_TIMESTAMPS != 0 {
        entry.timestamp = Some(TIMESTAMP.get(fd)?);
    }
    let mut window = [0; 20];
    REPAIR_WINDOW.read(fd, &mut window)?;
    let mut words = window.chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
    let mut next = || words.next();
    (entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup) =
        (next(), next(), next(), next(), next());
    let (received, sent);
    (entry.inq_seq, received) = queue(fd, socket.as_ref(), RECV_QUEUE, entry.inq_len)?;
    (entry.outq_seq, sent) = queue(fd, socket.as_ref(), SEND_QUEUE, entry.outq_len)?;
    let mut image = images.create(ImageKind::TcpStream, e.ino)?;
    image.write_with_payload(&entry, &(received.as_slice(), sent.as_slice()))?;
    image.finish()?;
    Ok(repair)
}

/// Bytes that were received and not read.
pub fn unread(fd: BorrowedFd<'_>) -> Result<u32> {
    length(fd, SIOCINQ, "ioctl(SIOCINQ)")
}

fn length(fd: BorrowedFd<'_>, request: u64, call: &'static str) -> Result<u32> {
    let mut value = [0; 4];
    calls::ioctl(fd, call, request, &mut value)?;
    Ok(u32::from_ne_bytes(value))
}

/// The end of a queue, and what is in it.
fn queue(fd: BorrowedFd<'_>, guard: Option<&Guarded<'_>>, which: u32, len: u32) -> Result<(u32, Vec<u8>)> {
    REPAIR_QUEUE.set(fd, which)?;
    let end = QUEUE_SEQ.get(fd)?;
    if len == 0 {
        return Ok((end, Vec::new()));
    }
    let mut offset = PeekOffset::of(fd, guard.copied())?;
    if offset.in_use() {
        offset.set(0)?;
    }
    // room for one byte more tells whether there is more
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0) + 1];
    let (got, _) =
        rustix::net::recv(fd, bytes.as_mut_slice(), RecvFlags::PEEK | RecvFlags::DONTWAIT).call("recv(MSG_PEEK)")?;
    offset.end()?;
    if got + 1 != bytes.len() {
        return Err(Error::Changed { what: format!("{got} bytes in queue {which} of a TCP connection, of {len}") });
    }
    bytes.truncate(got);
    Ok((end, bytes))
}

/// Makes a connection of a socket that is bound and in repair mode. False: it is over and everything of it was read, and
/// what is left of it on this host has its place; it is as it was but does not say its other end.
pub fn restore(
    repair: &mut Repair,
    e: &InetSkEntry,
    own: &SocketAddr,
    peer: &SocketAddr,
    images: &Images,
) -> Result<bool> {
    let fd = repair.fd.as_fd();
    let image = images.open(ImageKind::TcpStream, e.ino)?;
    let mut reader = image.reader()?;
    let lie = |what: &str| Error::lie("tcp-stream", format!("TCP connection {} {what}", e.ino));
    let (entry, (received, sent)) = reader.next_with_payload::<TcpStreamEntry>()?.ok_or_else(|| lie("has no entry"))?;
    if ![ESTABLISHED, SYN_SENT, CLOSE_WAIT, CLOSE].contains(&e.state) && !closed(e.state) {
        return Err(lie(&format!("is in state {}", e.state)));
    }
    let unsent =
        usize::try_from(entry.unsq_len.ok_or_else(|| lie("does not say what was not sent"))?).unwrap_or(usize::MAX);
    let (sent, unsent) = sent
        .split_at_checked(sent.len().wrapping_sub(unsent))
        .ok_or_else(|| lie("has not sent more than was written"))?;
    options::enlarge(fd)?;
    // without what counts as a byte and is none
    let received_to = entry.inq_seq.wrapping_sub(peer_closed(e.state).into());
    let written_to = entry.outq_seq.wrapping_sub((closed(e.state) || e.state == SYN_SENT).into());
    let acknowledged = written_to.wrapping_sub(entry.outq_len);
    REPAIR_QUEUE.set(fd, RECV_QUEUE)?;
    QUEUE_SEQ.set(fd, received_to.wrapping_sub(entry.inq_len))?;
    REPAIR_QUEUE.set(fd, SEND_QUEUE)?;
    QUEUE_SEQ.set(fd, acknowledged)?;
    if e.state == SYN_SENT {
        // asks again, with the number that it asked with before
        REPAIR.set(fd, 0)?;
        let asked = rustix::net::connect(fd, peer);
        REPAIR.set(fd, 1)?;
        return match asked {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(true),
            Err(e) => Err(e).call("connect"),
        };
    }
    match rustix::net::connect(fd, peer) {
        Err(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE) if e.state == CLOSE && received.is_empty() => return Ok(false),
        Err(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE) => {
            return Err(Error::Changed { what: format!("the connection from {own} to {peer} is somebody else's now") });
        }
        other => other.call("connect")?,
    }
    let mut negotiated = vec![(TCPOPT_MAXSEG, entry.mss_clamp)];
    if entry.opt_mask & OPT_SACK != 0 {
        negotiated.push((TCPOPT_SACK_PERM, 0));
    }
    if entry.opt_mask & OPT_WSCALE != 0 {
        let ours = entry.rcv_wscale.ok_or_else(|| lie("lacks a window scale"))?;
        negotiated.push((TCPOPT_WINDOW, entry.snd_wscale | ours << 16));
    }
    if entry.opt_mask & OPT_TIMESTAMPS != 0 {
        negotiated.push((TCPOPT_TIMESTAMP, 0));
    }
    let pairs: Vec<u8> =
        negotiated.iter().flat_map(|(code, value)| [code.to_ne_bytes(), value.to_ne_bytes()]).flatten().collect();
    REPAIR_OPTIONS.write(fd, &pairs)?;
    let is_v4 = match own {
        SocketAddr::V4(_) => true,
        SocketAddr::V6(own) => own.ip().to_ipv4_mapped().is_some(),
    };
    options::compute_segment_size(fd, is_v4)?;
    if entry.opt_mask & OPT_TIMESTAMPS != 0 {
        TIMESTAMP.set(fd, entry.timestamp.ok_or_else(|| lie("lacks a timestamp"))?)?;
    }
    put(fd, RECV_QUEUE, received)?;
    put(fd, SEND_QUEUE, sent)?;
    if let (Some(wl1), Some(snd), Some(max), Some(rcv), Some(wup)) =
        (entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup)
    {
        let fin = u32::from(peer_closed(e.state));
        let (rcv, wup) = (rcv.wrapping_add(fin), wup.wrapping_sub(fin));
        let window: Vec<u8> = [wl1, snd, max, rcv, wup].iter().flat_map(|w| w.to_ne_bytes()).collect();
        REPAIR_WINDOW.write(fd, &window)?;
        // what is left of the window, unless the peer sent more than that
        let left = wup.wrapping_add(rcv).wrapping_sub(received_to);
        repair.promised = if left > i32::MAX.cast_unsigned() { 0 } else { left };
    }
    REPAIR_QUEUE.set(fd, NO_QUEUE)?;
    let window =
        u16::try_from(entry.snd_wnd.unwrap_or(u32::MAX).checked_shr(entry.snd_wscale).unwrap_or(0)).unwrap_or(u16::MAX);
    let packet = fin::Packet { flags: fin::ACK, seq: received_to, ack: acknowledged, window };
    if e.state == FIN_WAIT2 {
        // in this queue, a FIN counts as sent
        REPAIR_QUEUE.set(fd, SEND_QUEUE)?;
        rustix::net::shutdown(fd, Shutdown::Write).call("shutdown")?;
        REPAIR_QUEUE.set(fd, NO_QUEUE)?;
        let packet = fin::Packet { ack: entry.outq_seq, ..packet };
        fin::receive(fd, own, peer, packet, &[FIN_WAIT2])?;
    }
    if peer_closed(e.state) {
        let packet = fin::Packet { flags: fin::FIN | fin::ACK, ..packet };
        fin::receive(fd, own, peer, packet, &[CLOSE_WAIT])?;
    }
    if e.state == CLOSE {
        repair.over =
            Some((fin::Packet { flags: fin::RST | fin::ACK, ..packet }, *own, *peer, e.standstill_error == Some(true)));
        return Ok(true);
    }
    if e.shutdown.is_some_and(|bits| bits & 1 != 0) {
        rustix::net::shutdown(fd, Shutdown::Read).call("shutdown")?;
    }
    repair.closes = closed(e.state) && e.state != FIN_WAIT2;
    repair.unsent = unsent.to_vec();
    Ok(true)
}

/// Puts bytes into a queue. The kernel makes one buffer of what it is given at once, so pieces get smaller where that fails.
fn put(fd: BorrowedFd<'_>, which: u32, mut bytes: &[u8]) -> Result<()> {
    REPAIR_QUEUE.set(fd, which)?;
    let mut most = 64 << 10;
    while !bytes.is_empty() {
        match rustix::net::send(fd, &bytes[..bytes.len().min(most)], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(put) => bytes = &bytes[put..],
            Err(Errno::INTR) => {}
            Err(Errno::NOMEM | Errno::NOBUFS) if most > 1024 => most /= 2,
            Err(e) => return Err(e).call("send(TCP_REPAIR_QUEUE)"),
        }
    }
    Ok(())
}
