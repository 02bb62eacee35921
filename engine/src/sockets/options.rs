//! Options that every socket has: `sk_opts_entry`.
//!
//! The kernel doubles the sizes of buffers that it is given, and says the doubled size when it is asked: half of what an
//! image says is what is set, past the limits of the system where the engine may (SO_SNDBUFFORCE, SO_RCVBUFFORCE), within
//! them elsewhere. Setting a size also locks it (SO_BUF_LOCK), so the lock comes after the sizes.
//!
//! Options come last: while queues are filled, buffers are as large as they can be, and a socket that passes credentials
//! would add the engine's to what is sent to it. SO_REUSEADDR and SO_REUSEPORT of internet sockets depend on the other
//! sockets of a port and are left to those.
//!
//! What the entry has no place for is in a field of ours: [`more`]. Not kept: SO_INCOMING_CPU, SO_RESERVE_MEM, SO_ERROR.
//!
//! Man pages: socket(7), unix(7), tcp(7), bpf(2).

use std::os::fd::BorrowedFd;

use standstill_images::proto::SkOptsEntry;

use crate::error::{At, Error, Place, Result};
use crate::guard::{Act, Guard, Held, List};
use crate::sys::calls;

mod more;

/// An option, with the name that messages call it by.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    level: i32,
    number: i32,
    name: &'static str,
}

impl Opt {
    /// An option of a level.
    pub const fn new(level: i32, number: i32, name: &'static str) -> Opt {
        Opt { level, number, name }
    }

    const fn socket(number: i32, name: &'static str) -> Opt {
        Opt::new(libc::SOL_SOCKET, number, name)
    }

    /// Its bytes; how many are there.
    pub fn read(self, fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
        calls::getsockopt(fd, self.level, self.number, buffer).at(Place::Step(self.name))
    }

    /// Sets its bytes.
    pub fn write(self, fd: BorrowedFd<'_>, value: &[u8]) -> Result<()> {
        calls::setsockopt(fd, self.level, self.number, value).at(Place::Step(self.name))
    }

    /// The value of an option that is an `int`.
    pub fn get(self, fd: BorrowedFd<'_>) -> Result<u32> {
        let mut value = [0; 4];
        self.read(fd, &mut value)?;
        Ok(u32::from_ne_bytes(value))
    }

    /// Sets an option that is an `int`.
    pub fn set(self, fd: BorrowedFd<'_>, value: u32) -> Result<()> {
        self.write(fd, &value.to_ne_bytes())
    }

    /// An option that is on or off.
    pub fn is_on(self, fd: BorrowedFd<'_>) -> Result<bool> {
        Ok(self.get(fd)? != 0)
    }

    /// Brings an option that is an `int` to this value, unless it has it.
    pub fn bring(self, fd: BorrowedFd<'_>, value: u32) -> Result<()> {
        if self.get(fd)? == value {
            Ok(())
        } else {
            self.set(fd, value)
        }
    }

    /// As [`Opt::bring`], if an image says something.
    pub fn bring_if(self, fd: BorrowedFd<'_>, value: Option<impl Into<u32>>) -> Result<()> {
        value.map_or(Ok(()), |value| self.bring(fd, value.into()))
    }
}

/// A socket of the program whose options the engine changes for a while, and the guard that puts them back should the engine
/// die.
#[derive(Clone, Copy, Debug)]
pub struct Guarded<'g> {
    guard: &'g Guard<'g>,
    socket: Held,
}

impl<'g> Guarded<'g> {
    /// Gives the guard its copy of the socket.
    pub fn new(guard: &'g Guard<'g>, fd: BorrowedFd<'_>) -> Result<Guarded<'g>> {
        Ok(Guarded { guard, socket: guard.hold(fd)? })
    }

    /// This value is what the option gets then.
    pub fn resets(&self, option: Opt, value: u32) -> Result<()> {
        let act = Act::SocketOption(self.socket, option.level, option.number, &value.to_ne_bytes());
        self.guard.register(List::Undo, &act)
    }
}

/// SO_TYPE.
pub const TYPE: Opt = Opt::socket(libc::SO_TYPE, "SO_TYPE");
/// SO_PROTOCOL.
pub const PROTOCOL: Opt = Opt::socket(libc::SO_PROTOCOL, "SO_PROTOCOL");
/// SO_DOMAIN.
pub const DOMAIN: Opt = Opt::socket(libc::SO_DOMAIN, "SO_DOMAIN");
/// SO_REUSEADDR.
pub const REUSEADDR: Opt = Opt::socket(libc::SO_REUSEADDR, "SO_REUSEADDR");
/// SO_REUSEPORT.
pub const REUSEPORT: Opt = Opt::socket(libc::SO_REUSEPORT, "SO_REUSEPORT");
/// SO_PEEK_OFF.
pub const PEEK_OFF: Opt = Opt::socket(libc::SO_PEEK_OFF, "SO_PEEK_OFF");
/// SO_PASSCRED.
pub const PASSCRED: Opt = Opt::socket(libc::SO_PASSCRED, "SO_PASSCRED");
/// SO_PASSPIDFD (6.5).
pub const PASSPIDFD: Opt = Opt::socket(76, "SO_PASSPIDFD");
const SNDBUF: Opt = Opt::socket(libc::SO_SNDBUF, "SO_SNDBUF");
const RCVBUF: Opt = Opt::socket(libc::SO_RCVBUF, "SO_RCVBUF");
const SNDBUFFORCE: Opt = Opt::socket(libc::SO_SNDBUFFORCE, "SO_SNDBUFFORCE");
const RCVBUFFORCE: Opt = Opt::socket(libc::SO_RCVBUFFORCE, "SO_RCVBUFFORCE");
/// How much memory is used, and may be, for what is received, and more words of which nothing is needed.
const MEMINFO: Opt = Opt::socket(55, "SO_MEMINFO");
const IP_OPTIONS: Opt = Opt::new(libc::SOL_IP, libc::IP_OPTIONS, "IP_OPTIONS");
const IPV6_RTHDR: Opt = Opt::new(libc::SOL_IPV6, 57, "IPV6_RTHDR");
const BUF_LOCK: Opt = Opt::socket(72, "SO_BUF_LOCK");
const SNDTIMEO: Opt = Opt::socket(libc::SO_SNDTIMEO, "SO_SNDTIMEO");
const RCVTIMEO: Opt = Opt::socket(libc::SO_RCVTIMEO, "SO_RCVTIMEO");
const PRIORITY: Opt = Opt::socket(libc::SO_PRIORITY, "SO_PRIORITY");
const RCVLOWAT: Opt = Opt::socket(libc::SO_RCVLOWAT, "SO_RCVLOWAT");
const MARK: Opt = Opt::socket(libc::SO_MARK, "SO_MARK");
const PASSSEC: Opt = Opt::socket(libc::SO_PASSSEC, "SO_PASSSEC");
const DONTROUTE: Opt = Opt::socket(libc::SO_DONTROUTE, "SO_DONTROUTE");
const NO_CHECK: Opt = Opt::socket(libc::SO_NO_CHECK, "SO_NO_CHECK");
const BROADCAST: Opt = Opt::socket(libc::SO_BROADCAST, "SO_BROADCAST");
const KEEPALIVE: Opt = Opt::socket(libc::SO_KEEPALIVE, "SO_KEEPALIVE");
const OOBINLINE: Opt = Opt::socket(libc::SO_OOBINLINE, "SO_OOBINLINE");
const LINGER: Opt = Opt::socket(libc::SO_LINGER, "SO_LINGER");
const BINDTODEVICE: Opt = Opt::socket(libc::SO_BINDTODEVICE, "SO_BINDTODEVICE");
const FILTER: Opt = Opt::socket(libc::SO_ATTACH_FILTER, "SO_ATTACH_FILTER");
/// TCP_KEEPIDLE.
pub const TCP_KEEPIDLE: Opt = Opt::new(libc::SOL_TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE");
/// TCP_KEEPINTVL.
pub const TCP_KEEPINTVL: Opt = Opt::new(libc::SOL_TCP, libc::TCP_KEEPINTVL, "TCP_KEEPINTVL");
/// TCP_KEEPCNT.
pub const TCP_KEEPCNT: Opt = Opt::new(libc::SOL_TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT");

/// The most instructions that the kernel takes for a filter.
const LONGEST_FILTER: usize = 4096;

/// Half of the largest buffer.
const LARGEST: u32 = i32::MAX as u32 / 2;

/// What an image says of a socket that it knows nothing of (one outside the tree).
pub fn unknown() -> SkOptsEntry {
    SkOptsEntry::default()
}

/// Does this socket add credentials, or a pidfd, to what it receives?
pub fn passes_credentials(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(PASSCRED.is_on(fd)? || supported(PASSPIDFD.is_on(fd))?.unwrap_or(false))
}

/// All options of a socket. `credentials`: it is of a family that can pass them (unix, netlink).
pub fn dump(fd: BorrowedFd<'_>, credentials: bool) -> Result<SkOptsEntry> {
    let (so_snd_tmo_sec, so_snd_tmo_usec) = timeout(SNDTIMEO, fd)?;
    let (so_rcv_tmo_sec, so_rcv_tmo_usec) = timeout(RCVTIMEO, fd)?;
    let mut linger = [0; 8];
    LINGER.read(fd, &mut linger)?;
    let (lingers, so_linger) = halves(linger);
    let mark = MARK.get(fd)?;
    Ok(SkOptsEntry {
        so_sndbuf: SNDBUF.get(fd)?,
        so_rcvbuf: RCVBUF.get(fd)?,
        so_snd_tmo_sec,
        so_snd_tmo_usec,
        so_rcv_tmo_sec,
        so_rcv_tmo_usec,
        reuseaddr: Some(REUSEADDR.is_on(fd)?),
        so_priority: Some(PRIORITY.get(fd)?),
        so_rcvlowat: Some(RCVLOWAT.get(fd)?),
        so_mark: Some(mark).filter(|&mark| mark != 0),
        so_passcred: if credentials { Some(PASSCRED.is_on(fd)?) } else { None },
        so_passsec: if credentials { Some(PASSSEC.is_on(fd)?) } else { None },
        so_dontroute: Some(DONTROUTE.is_on(fd)?),
        so_no_check: Some(NO_CHECK.is_on(fd)?),
        so_bound_dev: bound_device(fd)?,
        so_filter: filter(fd)?,
        so_reuseport: Some(REUSEPORT.is_on(fd)?),
        so_broadcast: Some(BROADCAST.is_on(fd)?),
        so_keepalive: Some(KEEPALIVE.is_on(fd)?),
        tcp_keepcnt: None,
        tcp_keepidle: None,
        tcp_keepintvl: None,
        so_oobinline: Some(OOBINLINE.get(fd)?),
        so_linger: Some(so_linger).filter(|_| lingers != 0),
        so_buf_lock: supported(BUF_LOCK.get(fd))?,
        standstill_options: more::dump(fd)?,
    })
}

/// Brings a new socket to the options of an image; all but SO_REUSEADDR and SO_REUSEPORT.
pub fn restore(fd: BorrowedFd<'_>, e: &SkOptsEntry) -> Result<()> {
    buffer(fd, SNDBUF, SNDBUFFORCE, e.so_sndbuf)?;
    buffer(fd, RCVBUF, RCVBUFFORCE, e.so_rcvbuf)?;
    if let Some(lock) = e.so_buf_lock {
        // a kernel before 5.14 has no such option, and locks what was set
        supported(BUF_LOCK.bring(fd, lock))?;
    }
    PRIORITY.bring_if(fd, e.so_priority)?;
    RCVLOWAT.bring_if(fd, e.so_rcvlowat)?;
    MARK.bring_if(fd, e.so_mark)?;
    // what is off in a new socket needs no word: not every family takes it
    for (option, value) in [
        (PASSCRED, e.so_passcred),
        (PASSSEC, e.so_passsec),
        (DONTROUTE, e.so_dontroute),
        (NO_CHECK, e.so_no_check),
        (BROADCAST, e.so_broadcast),
        (OOBINLINE, e.so_oobinline.map(|v| v != 0)),
        (KEEPALIVE, e.so_keepalive),
    ] {
        option.bring_if(fd, value)?;
    }
    if let Some(seconds) = e.so_linger {
        LINGER.write(fd, &[1u32.to_ne_bytes(), seconds.to_ne_bytes()].concat())?;
    }
    // images before CRIU 3.18 have these here
    TCP_KEEPCNT.bring_if(fd, e.tcp_keepcnt)?;
    TCP_KEEPIDLE.bring_if(fd, e.tcp_keepidle)?;
    TCP_KEEPINTVL.bring_if(fd, e.tcp_keepintvl)?;
    set_timeout(SNDTIMEO, fd, e.so_snd_tmo_sec, e.so_snd_tmo_usec)?;
    set_timeout(RCVTIMEO, fd, e.so_rcv_tmo_sec, e.so_rcv_tmo_usec)?;
    bind_to_device(fd, e)?;
    attach(fd, &e.so_filter)?;
    more::restore(fd, &e.standstill_options, false)
}

/// What a packet socket must have before it has rings.
pub fn before_rings(fd: BorrowedFd<'_>, e: &SkOptsEntry) -> Result<()> {
    more::restore(fd, &e.standstill_options, true)
}

/// SO_BINDTODEVICE, which a name or a port may depend on.
pub fn bind_to_device(fd: BorrowedFd<'_>, e: &SkOptsEntry) -> Result<()> {
    match e.so_bound_dev.as_deref().map(without_nul) {
        // a second time needs CAP_NET_RAW
        Some(name) if bound_device(fd)?.as_deref() != Some(name) => BINDTODEVICE.write(fd, name),
        _ => Ok(()),
    }
}

/// The interface that a socket is bound to.
pub fn bound_device(fd: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    let mut name = [0; libc::IFNAMSIZ];
    let len = BINDTODEVICE.read(fd, &mut name)?;
    Ok(name.get(..len).map(without_nul).filter(|name| !name.is_empty()).map(<[u8]>::to_vec))
}

/// Makes the buffers of a socket as large as they can be, to fill queues. [`restore`] brings the right size.
pub fn enlarge(fd: BorrowedFd<'_>) -> Result<()> {
    buffer(fd, SNDBUF, SNDBUFFORCE, LARGEST & !1)?;
    buffer(fd, RCVBUF, RCVBUFFORCE, LARGEST & !1)
}

/// The same for what is sent. [`restore_sending`] brings the right size.
pub fn enlarge_sending(fd: BorrowedFd<'_>) -> Result<()> {
    buffer(fd, SNDBUF, SNDBUFFORCE, LARGEST & !1)
}

/// Takes [`enlarge_sending`] back.
pub fn restore_sending(fd: BorrowedFd<'_>, e: &SkOptsEntry) -> Result<()> {
    buffer(fd, SNDBUF, SNDBUFFORCE, e.so_sndbuf)?;
    if let Some(lock) = e.so_buf_lock {
        supported(BUF_LOCK.bring(fd, lock))?;
    }
    Ok(())
}

/// Makes the receive buffer of a connection larger if what is in it leaves no room for what the peer was promised: the kernel
/// would take the promise back, and each side could refuse the other's acknowledgements from then on. What was put into the
/// queue by us may take more memory than what came as packets.
pub fn keep_promise(fd: BorrowedFd<'_>, e: &SkOptsEntry, promised: u32) -> Result<()> {
    let mut info = [0; 8];
    MEMINFO.read(fd, &mut info)?;
    let (used, size) = info.split_at(4);
    let word = |b: &[u8]| b.try_into().map_or(0, u32::from_ne_bytes);
    let (used, size) = (word(used), word(size));
    if used.saturating_add(promised) <= size {
        return Ok(());
    }
    let needed = promised.saturating_mul(2).saturating_add(used).min(LARGEST) & !1;
    buffer(fd, RCVBUF, RCVBUFFORCE, needed)?;
    if let Some(lock) = e.so_buf_lock {
        supported(BUF_LOCK.bring(fd, lock))?;
    }
    Ok(())
}

/// Has a connection compute the size of its segments anew, for which the kernel had a default before it was told the peer's:
/// an option of its packets, which is not there, is taken away. Of the options that do so, this needs no rights.
pub fn compute_segment_size(fd: BorrowedFd<'_>, is_v4: bool) -> Result<()> {
    let option = if is_v4 { IP_OPTIONS } else { IPV6_RTHDR };
    if option.read(fd, &mut [0; 256])? == 0 {
        option.write(fd, &[])?;
    }
    Ok(())
}

/// A size as the kernel says it, which is twice what it is told.
fn buffer(fd: BorrowedFd<'_>, plain: Opt, force: Opt, size: u32) -> Result<()> {
    if plain.get(fd)? == size {
        return Ok(());
    }
    match force.set(fd, size / 2) {
        Err(e) if e.errno() == libc::EPERM => {
            plain.set(fd, size / 2)?;
            let now = plain.get(fd)?;
            if now < size && size != LARGEST & !1 {
                tracing::warn!("{} is {now} instead of {size}: more needs CAP_NET_ADMIN", plain.name);
            }
            Ok(())
        }
        other => other,
    }
}

/// Tells "this kernel has no such option" from a failure.
fn supported<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(e) if matches!(e.errno(), libc::ENOPROTOOPT | libc::EOPNOTSUPP) => Ok(None),
        other => other.map(Some),
    }
}

fn halves(bytes: [u8; 8]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// A `struct timeval`.
fn timeout(option: Opt, fd: BorrowedFd<'_>) -> Result<(u64, u64)> {
    let (mut seconds, mut all) = ([0; 8], [0; 16]);
    option.read(fd, &mut all)?;
    let (low, high) = all.split_at(8);
    seconds.copy_from_slice(low);
    let mut micros = [0; 8];
    micros.copy_from_slice(high);
    Ok((u64::from_ne_bytes(seconds), u64::from_ne_bytes(micros)))
}

fn set_timeout(option: Opt, fd: BorrowedFd<'_>, seconds: u64, micros: u64) -> Result<()> {
    if timeout(option, fd)? == (seconds, micros) {
        return Ok(());
    }
    option.write(fd, &[seconds.to_ne_bytes(), micros.to_ne_bytes()].concat())
}

fn without_nul(name: &[u8]) -> &[u8] {
    name.split(|&b| b == 0).next().unwrap_or_default()
}

/// A classic BPF program, an instruction a word: code, jt, jf, k from the top.
fn filter(fd: BorrowedFd<'_>) -> Result<Vec<u64>> {
    let asked = FILTER.read(fd, &mut []).and_then(|count| match count {
        0 => Ok((0, Vec::new())),
        _ => {
            let mut program = vec![0; count.min(LONGEST_FILTER) * 8];
            FILTER.read(fd, &mut program).map(|count| (count, program))
        }
    });
    let (count, program) = match asked {
        Err(e) if e.errno() == libc::EACCES => {
            return Err(Error::refused("a socket with an eBPF filter", "detach it (SO_DETACH_BPF) before the dump"));
        }
        other => other?,
    };
    let instructions = program.chunks_exact(8).take(count);
    Ok(instructions
        .map(|i| {
            let code = u16::from_ne_bytes([i[0], i[1]]);
            let k = u32::from_ne_bytes([i[4], i[5], i[6], i[7]]);
            u64::from(code) << 48 | u64::from(i[2]) << 40 | u64::from(i[3]) << 32 | u64::from(k)
        })
        .collect())
}

fn attach(fd: BorrowedFd<'_>, filter: &[u64]) -> Result<()> {
    if filter.is_empty() {
        return Ok(());
    }
    let len = u16::try_from(filter.len()).ok().filter(|&len| usize::from(len) <= LONGEST_FILTER);
    let len =
        len.ok_or_else(|| Error::lie("files.img", format!("a socket filter of {} instructions", filter.len())))?;
    let program: Vec<u8> = filter
        .iter()
        .flat_map(|&word| {
            let [c0, c1, jt, jf, k @ ..] = word.to_be_bytes();
            let (code, k) = (u16::from_be_bytes([c0, c1]).to_ne_bytes(), u32::from_be_bytes(k).to_ne_bytes());
            [code[0], code[1], jt, jf, k[0], k[1], k[2], k[3]]
        })
        .collect();
    // struct sock_fprog: a length, padding, and where the program lies, which is read before the call returns
    let mut value = [0; 16];
    value[..2].copy_from_slice(&len.to_ne_bytes());
    value[8..].copy_from_slice(&(program.as_ptr().addr() as u64).to_ne_bytes());
    FILTER.write(fd, &value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::net::{socket, socketpair, AddressFamily, SocketFlags, SocketType};
    use std::os::fd::AsFd;

    #[test]
    fn all_come_back() {
        let (a, _b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let fd = a.as_fd();
        SNDBUF.set(fd, 50_000).unwrap();
        RCVBUF.set(fd, 40_000).unwrap();
        for option in [PASSCRED, BROADCAST, KEEPALIVE, OOBINLINE, DONTROUTE] {
            option.set(fd, 1).unwrap();
        }
        PRIORITY.set(fd, 3).unwrap();
        RCVLOWAT.set(fd, 7).unwrap();
        LINGER.write(fd, &[1u32.to_ne_bytes(), 9u32.to_ne_bytes()].concat()).unwrap();
        set_timeout(RCVTIMEO, fd, 3, 500_000).unwrap();
        // ld #65535; ret a; and a jump, so that each field counts
        let program = vec![0x0015_0102_0000_0001, 0x0000_0000_0000_ffff, 0x0016_0000_0000_0000, 0x0006_0000_0000_ffff];
        attach(fd, &program).unwrap();
        let e = dump(fd, true).unwrap();
        assert_eq!((e.so_sndbuf, e.so_rcvbuf, e.so_linger), (100_000, 80_000, Some(9)));
        assert_eq!((e.so_rcv_tmo_sec, e.so_rcv_tmo_usec), (3, 500_000));
        assert_eq!(e.so_filter, program);
        let (c, _d) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        enlarge(c.as_fd()).unwrap();
        restore(c.as_fd(), &e).unwrap();
        assert_eq!(dump(c.as_fd(), true).unwrap(), e);
    }

    #[test]
    fn defaults_stay_defaults() {
        for family in [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6] {
            let (a, b) =
                (socket(family, SocketType::DGRAM, None).unwrap(), socket(family, SocketType::DGRAM, None).unwrap());
            let e = dump(a.as_fd(), family == AddressFamily::UNIX).unwrap();
            enlarge(b.as_fd()).unwrap();
            restore(b.as_fd(), &e).unwrap();
            assert_eq!(dump(b.as_fd(), family == AddressFamily::UNIX).unwrap(), e);
        }
    }

    #[test]
    fn an_endless_filter_is_a_lie() {
        let a = socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
        assert!(matches!(attach(a.as_fd(), &vec![0; 70_000]), Err(Error::Lie { .. })));
    }
}
