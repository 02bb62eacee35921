//! A connection over which pages go: a stream socket, encrypted or not.
//!
//! Both directions can be used at the same time, each by one thread. Whoever waits looks every now and then whether the
//! work is to end. A peer that is gone without a word (its host died) is noticed within half a minute: TCP_USER_TIMEOUT
//! for what was sent, keep-alive for what is waited for.
//!
//! Man pages: tcp(7), socket(7), send(2), recv(2).

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustls::Connection;

use super::tls;
use super::wire::{Message, LEN};
use crate::error::{Call, Error, Result};
use crate::options::Options;
use crate::sys::interrupt;

/// How long the other side may say nothing at all.
const SILENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether the work is to end.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// How long a wait takes that is not for long.
const BRIEFLY: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// Bytes that are read from an encrypted connection at once.
const CHUNK: usize = 64 << 10;

/// One side of a connection.
pub struct Link {
    socket: OwnedFd,
    tls: Option<Tls>,
    patience: Option<Duration>,
}

struct Tls {
    connection: Mutex<Connection>,
    /// What was received and not decrypted yet; held by who receives.
    incoming: Mutex<(Vec<u8>, usize)>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Link({:?}, encrypted: {})", self.socket, self.tls.is_some())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn usage(what: String) -> Error {
    Error::Usage { what }
}

/// Which side of a connection one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// The server that the options name.
pub fn connect(opts: &Options) -> Result<Link> {
    if let Some(fd) = opts.ps_socket {
        tracing::info!("Reusing ps socket {fd}");
        return Link::new(crate::sys::calls::dup_number(fd)?, opts, Side::Client);
    }
    let (host, port) = (opts.address.as_deref().unwrap_or("127.0.0.1"), opts.port.unwrap_or(0));
    let all = (host, port).to_socket_addrs();
    let mut failed = all.as_ref().err().map(|e| io::Error::new(e.kind(), e.to_string()));
    for address in all.into_iter().flatten() {
        tracing::info!("Connecting to server {address}");
        match TcpStream::connect(address) {
            Ok(stream) => return Link::new(stream.into(), opts, Side::Client),
            Err(e) => {
                tracing::info!("Can't connect to server {address}: {e}");
                failed = Some(e);
            }
        }
    }
    let why = failed.map_or_else(String::new, |e| format!(": {e}"));
    Err(usage(format!("Failed to connect to the page server {host}:{port}{why}")))
}

/// The socket that others connect to, and its port.
pub fn listen(opts: &Options) -> Result<(TcpListener, u16)> {
    let host: IpAddr = match &opts.address {
        None => IpAddr::from([0, 0, 0, 0]),
        Some(text) => text.parse().map_err(|_| {
            usage(format!("Invalid server address \"{text}\". The address must be in IPv4 or IPv6 format."))
        })?,
    };
    let wanted = SocketAddr::new(host, opts.port.unwrap_or(0));
    tracing::info!("Starting page server on port {}", wanted.port());
    let listener = TcpListener::bind(wanted).map_err(|e| usage(format!("Can't bind page server to {wanted}: {e}")))?;
    let port = listener.local_addr().call("getsockname")?.port();
    if wanted.port() == 0 {
        tracing::info!("Using {port} port");
    }
    Ok((listener, port))
}

/// The next one who connects.
pub fn accept(listener: BorrowedFd<'_>, opts: &Options) -> Result<Link> {
    loop {
        wait(listener, PollFlags::IN, None).call("poll")?;
        match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => return Link::new(socket, opts, Side::Server),
            Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => {}
            Err(e) => return Err(e).call("accept"),
        }
    }
}

/// Waits until something can be done with a socket, or the work is to end; not for longer than a patience.
fn wait(fd: BorrowedFd<'_>, what: PollFlags, patience: Option<Duration>) -> io::Result<()> {
    let began = Instant::now();
    loop {
        interrupt::check().map_err(|_| io::Error::other("interrupted"))?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, what)], Some(&LOOK)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        if let Some(patience) = patience.filter(|patience| began.elapsed() > *patience) {
            let verb = if what == PollFlags::IN { "said" } else { "taken" };
            let what = format!("the other side has {verb} nothing for {} s", patience.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
    }
}

/// The socket alone.
struct Raw<'a>(&'a Link);

impl Raw<'_> {
    /// What is there at once; none if nothing is.
    fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::net::recv(&self.0.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((n, _)) => return Ok(Some(n)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read_now(buffer)? {
                Some(n) => return Ok(n),
                None => self.0.wait(PollFlags::IN)?,
            }
        }
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::net::send(&self.0.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => return Ok(n),
                Err(Errno::AGAIN) => self.0.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link {
    /// Over a connected socket; encrypted, if the options want that.
    pub fn new(socket: OwnedFd, opts: &Options, side: Side) -> Result<Link> {
        Link::patient(socket, opts, side, None)
    }

    /// The same, with another side that is not waited for longer than this.
    pub fn patient(socket: OwnedFd, opts: &Options, side: Side, patience: Option<Duration>) -> Result<Link> {
        use rustix::net::sockopt;
        // a socket that is no TCP socket has none of these, and needs none
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let _ = sockopt::set_socket_keepalive(&socket, true);
        let _ = sockopt::set_tcp_keepidle(&socket, SILENCE / 3);
        let _ = sockopt::set_tcp_keepintvl(&socket, SILENCE / 6);
        let _ = sockopt::set_tcp_keepcnt(&socket, 4);
        let _ = sockopt::set_tcp_user_timeout(&socket, u32::try_from(SILENCE.as_millis()).unwrap_or(30_000));
        let mut link = Link { socket, tls: None, patience };
        if opts.tls {
            let mut connection = tls::connection(opts, side)?;
            connection.set_buffer_limit(None);
            let mut raw = link.raw();
            while connection.is_handshaking() {
                let done = connection.complete_io(&mut raw);
                done.map_err(|e| Error::Peer { what: format!("TLS handshake failed: {e}") })?;
            }
            tracing::info!("TLS handshake completed");
            link.tls = Some(Tls { connection: Mutex::new(connection), incoming: Mutex::default() });
        }
        Ok(link)
    }

    fn raw(&self) -> Raw<'_> {
        Raw(self)
    }

    fn wait(&self, what: PollFlags) -> io::Result<()> {
        wait(self.socket.as_fd(), what, self.patience)
    }

    /// Waits until something comes, but not for long.
    pub fn wait_briefly(&self) {
        // an error shows when it is read
        let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&BRIEFLY));
    }

    /// Sends all of it.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        self.send_all(bytes).map_err(|e| self.lost(e, "Can't write to the other side"))
    }

    /// The same, for who has errors of its own.
    pub fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = &self.tls else { return self.raw().write_all(bytes) };
        let mut connection = lock(&tls.connection);
        for part in bytes.chunks(CHUNK) {
            connection.writer().write_all(part)?;
            while connection.wants_write() {
                connection.write_tls(&mut self.raw())?;
            }
        }
        Ok(())
    }

    /// Sends all of it, cut at these places if it is encrypted: CRIU's server takes a message, and each 64 KiB of pages behind
    /// it, to be in TLS records of their own.
    pub fn send_cut(&self, bytes: &[u8], cuts: &[usize]) -> Result<()> {
        if self.tls.is_none() {
            return self.send(bytes);
        }
        let mut done = 0;
        for &cut in cuts.iter().chain(&[bytes.len()]) {
            self.send(bytes.get(done..cut).unwrap_or_default())?;
            done = cut;
        }
        Ok(())
    }

    /// Receives what is there, at least one byte; 0: the other side is done.
    pub fn some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.some_now(buffer)? {
                Some(n) => return Ok(n),
                None => self.wait(PollFlags::IN)?,
            }
        }
    }

    /// The same without waiting; none if nothing is there.
    pub fn some_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(tls) = &self.tls else { return self.raw().read_now(buffer) };
        let mut incoming = lock(&tls.incoming);
        let (bytes, used) = &mut *incoming;
        loop {
            {
                let mut connection = lock(&tls.connection);
                match connection.reader().read(buffer) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done.map(Some),
                }
                if *used < bytes.len() {
                    let mut rest = &bytes[*used..];
                    *used += connection.read_tls(&mut rest)?;
                    connection.process_new_packets().map_err(io::Error::other)?;
                    while connection.wants_write() {
                        connection.write_tls(&mut self.raw())?;
                    }
                    continue;
                }
            }
            bytes.resize(CHUNK, 0);
            *used = 0;
            let got = self.raw().read_now(bytes);
            bytes.truncate(got.as_ref().map_or(0, |got| got.unwrap_or(0)));
            match got? {
                None => return Ok(None),
                // without a farewell: someone may have cut it short
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(_) => {}
            }
        }
    }

    /// Fills a buffer; `false` if the other side was done before the first byte.
    pub fn receive_or_end(&self, buffer: &mut [u8]) -> Result<bool> {
        let mut done = 0;
        while done < buffer.len() {
            match self.some(&mut buffer[done..]) {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(Error::Peer { what: "A socket was closed unexpectedly".into() }),
                Ok(n) => done += n,
                Err(e) => return Err(self.lost(e, "Can't read from the other side")),
            }
        }
        Ok(true)
    }

    /// Fills a buffer.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<()> {
        match self.receive_or_end(buffer)? {
            true => Ok(()),
            false => Err(Error::Peer { what: "The other side closed the connection".into() }),
        }
    }

    /// The next message, or nothing if there is no more.
    pub fn message(&self) -> Result<Option<Message>> {
        let mut bytes = [0; LEN];
        if !self.receive_or_end(&mut bytes)? {
            return Ok(None);
        }
        Message::decode(&bytes).map(Some).map_err(|e| Error::Peer { what: e.to_string() })
    }

    /// Says farewell. The peer's own is not waited for.
    pub fn end(&self) {
        if let Some(tls) = &self.tls {
            let mut connection = lock(&tls.connection);
            connection.send_close_notify();
            while connection.wants_write() && connection.write_tls(&mut self.raw()).is_ok() {}
        }
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
    }

    /// Ends both directions: who waits for the other side does so no more.
    pub fn cut(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Waits until the other side closes its end, so that ours is not the one that lingers.
    pub fn wait_for_end(&self) {
        let mut byte = [0; 64];
        for _ in 0..64 {
            if !matches!(self.raw().read(&mut byte), Ok(1..)) {
                break;
            }
        }
    }

    fn lost(&self, e: io::Error, what: &str) -> Error {
        if interrupt::check().is_err() {
            return Error::Interrupted;
        }
        Error::Peer { what: format!("{what}: {e}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::wire::{Command, Target};

    fn pair() -> (Link, Link) {
        let (a, b) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let opts = Options::default();
        (Link::new(a, &opts, Side::Client).unwrap(), Link::new(b, &opts, Side::Server).unwrap())
    }

    #[test]
    fn messages_and_the_end() {
        let (a, b) = pair();
        let message = Message::about(Command::Open(true), Target::task(7));
        a.send(&message.encode()).unwrap();
        assert_eq!(b.message().unwrap(), Some(message));
        a.send(&message.encode()[..9]).unwrap();
        a.end();
        assert!(matches!(b.message(), Err(Error::Peer { .. })));
        let (a, b) = pair();
        drop(a);
        assert_eq!(b.message().unwrap(), None);
        assert!(b.receive(&mut [0; 4]).is_err());
    }

    #[test]
    fn much_goes_through() {
        let (a, b) = pair();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        std::thread::scope(|s| {
            s.spawn(|| a.send(&bytes).unwrap());
            let mut back = vec![0; bytes.len()];
            b.receive(&mut back).unwrap();
            assert_eq!(back, bytes);
        });
    }
}
