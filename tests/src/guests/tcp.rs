//! TCP connections with data in flight in both directions, and messages in flight between unix sockets: nothing is lost,
//! nothing comes twice, and nobody finds a socket in a mode that is the engine's.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::storm::counters;
use super::support::*;

static STOP: AtomicBool = AtomicBool::new(false);
/// Bytes that a sender may be ahead of its receiver.
const AHEAD: u64 = 200_000;

fn going() -> bool {
    !STOP.load(Ordering::Relaxed)
}

/// What the engine changes while it looks is as the program had it.
fn untouched(fd: i32, tcp: bool) {
    let option = |level: i32, name: i32| {
        let (mut value, mut size) = (0i32, 4);
        sys(unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut size) });
        value
    };
    check_eq!(option(libc::SOL_SOCKET, libc::SO_PEEK_OFF), -1);
    if tcp {
        check_eq!(option(libc::SOL_TCP, libc::TCP_REPAIR), 0);
    }
}

/// Numbers through a connection, in one direction; `beats` are the counters of who sends and who receives.
fn pump(mut from: TcpStream, mut to: TcpStream, beats: [usize; 2]) -> Vec<std::thread::JoinHandle<()>> {
    static RECEIVED: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
    let received = &RECEIVED[beats[1]];
    let counters = counters();
    let sends = std::thread::spawn(move || {
        let mut n = 0u64;
        while going() {
            counters[beats[0]].fetch_add(1, Ordering::Relaxed);
            if n * 8 > received.load(Ordering::Relaxed) * 8 + AHEAD {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            let numbers: Vec<u8> = (n..n + 500).flat_map(u64::to_ne_bytes).collect();
            did(from.write_all(&numbers));
            n += 500;
            untouched(from.as_raw_fd(), true);
        }
        did(from.shutdown(std::net::Shutdown::Write));
    });
    let receives = std::thread::spawn(move || {
        let mut expected = 0u64;
        let mut bytes = [0u8; 8];
        while to.read_exact(&mut bytes).is_ok() {
            check_eq!(u64::from_ne_bytes(bytes), expected);
            expected += 1;
            received.store(expected, Ordering::Relaxed);
            counters[beats[1]].fetch_add(1, Ordering::Relaxed);
            if expected.is_multiple_of(1000) {
                untouched(to.as_raw_fd(), true);
                std::thread::sleep(Duration::from_micros(500));
            }
        }
        // whole numbers, and a good end
        check_eq!(did(to.read(&mut bytes)), 0);
        check_eq!(expected % 500, 0);
    });
    vec![sends, receives]
}

/// Runs until it is asked to check, however often it is dumped.
pub(super) fn streams() {
    let counters = counters();
    let listener = did(TcpListener::bind("127.0.0.1:0"));
    let client = did(TcpStream::connect(did(listener.local_addr())));
    let (server, _) = did(listener.accept());
    let ends = [did(client.try_clone()), did(server.try_clone())];
    let mut all = pump(did(client.try_clone()), did(server.try_clone()), [0, 1]);
    all.extend(pump(server, client, [2, 3]));
    let (from, to) = did(UnixDatagram::pair());
    let outstanding = std::sync::Arc::new(AtomicU64::new(0));
    let ahead = outstanding.clone();
    all.push(std::thread::spawn(move || {
        let mut n = 0u64;
        while going() {
            if ahead.load(Ordering::Relaxed) < 6 {
                ahead.fetch_add(1, Ordering::Relaxed);
                check_eq!(did(from.send(&n.to_ne_bytes())), 8);
                n += 1;
            } else {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }));
    all.push(std::thread::spawn(move || {
        let mut expected = 0u64;
        let mut bytes = [0u8; 16];
        while going() {
            if outstanding.load(Ordering::Relaxed) > 4 {
                untouched(to.as_raw_fd(), false);
                check_eq!(did(to.recv(&mut bytes)), 8);
                check_eq!(bytes[..8], expected.to_ne_bytes());
                expected += 1;
                outstanding.fetch_sub(1, Ordering::Relaxed);
                counters[4].fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }));
    let sizes = || ends.each_ref().map(|end| segment_size(end.as_raw_fd()));
    let before = sizes();
    ready();
    // what the kernel has for a peer that says nothing is a hundredth of what loopback takes
    check!(sizes().iter().zip(before).all(|(now, before)| *now > 4096.min(before / 2)));
    STOP.store(true, Ordering::Relaxed);
    for thread in all {
        check!(thread.join().is_ok());
    }
}

/// How long the segments are that a connection sends (tcpi_snd_mss).
fn segment_size(fd: i32) -> u32 {
    let mut info = [0u8; 104];
    let mut len = 104u32;
    sys(unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len) });
    info[16..20].try_into().map_or(0, u32::from_ne_bytes)
}
