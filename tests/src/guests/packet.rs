//! Packet sockets: options, memberships, fanout, the old kind; and rings, in which the kernel goes on where the program reads
//! next.

use super::support::*;

/// A type of Ethernet frames for experiments.
const TYPE: u16 = 0x88b6;
const LOOPBACK: i32 = 1;
const QDISC_BYPASS: i32 = 20;
const IGNORE_OUTGOING: i32 = 23;

fn socket(kind: i32, protocol: u16) -> i32 {
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind | libc::SOCK_NONBLOCK, protocol.to_be().into()) };
    sys(fd)
}

fn address(protocol: u16) -> libc::sockaddr_ll {
    let mut a: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (a.sll_family, a.sll_protocol, a.sll_ifindex) = (libc::AF_PACKET as u16, protocol.to_be(), LOOPBACK);
    a
}

const SIZE: u32 = size_of::<libc::sockaddr_ll>() as u32;

fn bind(fd: i32, protocol: u16) {
    let a = address(protocol);
    sys(unsafe { libc::bind(fd, (&raw const a).cast(), SIZE) });
}

fn name(fd: i32) -> (u16, i32) {
    let (mut a, mut size) = (address(0), SIZE);
    sys(unsafe { libc::getsockname(fd, (&raw mut a).cast(), &raw mut size) });
    (u16::from_be(a.sll_protocol), a.sll_ifindex)
}

fn set(fd: i32, name: i32, value: &[u32]) {
    let r = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, name, value.as_ptr().cast(), size_of_val(value) as u32) };
    sys(r);
}

fn get(fd: i32, name: i32) -> u32 {
    let (mut value, mut size) = (0u32, 4);
    sys(unsafe { libc::getsockopt(fd, libc::SOL_PACKET, name, (&raw mut value).cast(), &raw mut size) });
    value
}

/// struct packet_mreq: the loopback interface, a kind, an address of `len` zeros.
fn member(fd: i32, how: i32, kind: u16, len: u16) -> i32 {
    let mut m = [0u8; 16];
    m[..4].copy_from_slice(&LOOPBACK.to_ne_bytes());
    m[4..6].copy_from_slice(&kind.to_ne_bytes());
    m[6..8].copy_from_slice(&len.to_ne_bytes());
    unsafe { libc::setsockopt(fd, libc::SOL_PACKET, how, m.as_ptr().cast(), 16) }
}

fn send(sender: i32, protocol: u16, bytes: &[u8]) {
    let a = address(protocol);
    let (at, to) = (bytes.as_ptr().cast(), (&raw const a).cast());
    sys(unsafe { libc::sendto(sender, at, bytes.len(), 0, to, SIZE) } as i64);
}

/// What CRIU carries, too.
pub(super) fn packet() {
    several(false);
}

/// And what it does not: PACKET_IGNORE_OUTGOING, PACKET_QDISC_BYPASS, a membership twice.
pub(super) fn more() {
    several(true);
}

fn several(more: bool) {
    let plain = socket(libc::SOCK_DGRAM, 0);
    bind(plain, TYPE);
    let all = socket(libc::SOCK_RAW, libc::ETH_P_ALL as u16);
    for (option, value) in [(libc::PACKET_AUXDATA, 1), (libc::PACKET_RESERVE, 8), (libc::PACKET_VERSION, 1)] {
        set(all, option, &[value]);
    }
    sys(member(all, libc::PACKET_ADD_MEMBERSHIP, libc::PACKET_MR_PROMISC as u16, 0));
    if more {
        set(all, IGNORE_OUTGOING, &[1]);
        set(all, QDISC_BYPASS, &[1]);
        sys(member(all, libc::PACKET_ADD_MEMBERSHIP, libc::PACKET_MR_PROMISC as u16, 0));
    }
    sys(member(plain, libc::PACKET_ADD_MEMBERSHIP, libc::PACKET_MR_UNICAST as u16, 6));
    let fans = [socket(libc::SOCK_DGRAM, TYPE + 1), socket(libc::SOCK_DGRAM, TYPE + 1)];
    for fd in fans {
        bind(fd, TYPE + 1);
        // in turn, and, what CRIU forgets, on to the next if one is full
        set(fd, libc::PACKET_FANOUT, &[77 | 1 << 16 | u32::from(more) << 28]);
    }
    let fanout = get(fans[0], libc::PACKET_FANOUT);
    let old = unsafe { sys(libc::socket(libc::AF_PACKET, 10, (TYPE + 2).to_be().into())) };
    let mut lo = [0u8; 16];
    lo[..4].copy_from_slice(&[libc::AF_PACKET as u8, 0, b'l', b'o']);
    sys(unsafe { libc::bind(old, lo.as_ptr().cast(), 16) });
    let idle = socket(libc::SOCK_DGRAM, 0);
    let names = [plain, all, fans[0], idle].map(name);
    ready();
    check_eq!([plain, all, fans[0], idle].map(name), names);
    check_eq!(get(all, libc::PACKET_AUXDATA), 1);
    check_eq!(get(all, libc::PACKET_RESERVE), 8);
    check_eq!(get(all, libc::PACKET_VERSION), 1);
    check_eq!((get(all, IGNORE_OUTGOING), get(all, QDISC_BYPASS)), (more.into(), more.into()));
    check_eq!(fans.map(|fd| get(fd, libc::PACKET_FANOUT)), [fanout; 2]);
    sys(member(plain, libc::PACKET_DROP_MEMBERSHIP, libc::PACKET_MR_UNICAST as u16, 6));
    let sender = socket(libc::SOCK_DGRAM, 0);
    send(sender, TYPE, b"frame");
    let mut bytes = [0u8; 64];
    eventually("a frame", || unsafe { libc::recv(plain, bytes.as_mut_ptr().cast(), 64, 0) } == 5);
    check_eq!(&bytes[..5], b"frame");
    for text in [b"one", b"two"] {
        send(sender, TYPE + 1, text);
    }
    for fd in fans {
        eventually("its share", || unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), 64, 0) } == 3);
    }
    let mut got = [0u8; 16];
    let mut size = 16;
    sys(unsafe { libc::getsockname(old, got.as_mut_ptr().cast(), &raw mut size) });
    check_eq!(&got[2..5], b"lo\0");
}

/// A ring that a program reads.
struct Ring {
    memory: *mut u8,
    parts: usize,
    size: usize,
    next: usize,
    blocks: bool,
}

impl Ring {
    fn new(fd: i32, version: u32, parts: usize) -> Ring {
        set(fd, libc::PACKET_VERSION, &[version]);
        let blocks = version == 2;
        let (size, count) = if blocks { (4096, parts) } else { (1024, parts / 4) };
        // blocks are closed after 5 ms
        let words = [4096, count as u32, size as u32, (count * 4096 / size) as u32, 5, 0, 0];
        set(fd, libc::PACKET_RX_RING, if blocks { &words } else { &words[..4] });
        let memory = map_file(0, count * 4096, RW, libc::MAP_SHARED, fd, 0);
        Ring { memory, parts, size, next: 0, blocks }
    }

    fn word(&self, at: usize) -> u32 {
        unsafe { self.memory.add(self.next * self.size + at).cast::<u32>().read_volatile() }
    }

    /// The first byte of each frame of what comes next, if something does.
    fn read(&mut self, version: u32) -> Vec<u8> {
        let status = if self.blocks { 8 } else { 0 };
        if self.word(status) & 1 == 0 {
            return Vec::new();
        }
        let mut all = Vec::new();
        if self.blocks {
            let mut at = self.word(16) as usize;
            for _ in 0..self.word(12) {
                let net = self.word(at + 24) >> 16;
                all.push(self.word((at + net as usize) & !3).to_ne_bytes()[(at + net as usize) & 3]);
                at += self.word(at) as usize;
            }
        } else {
            let net = (self.word(if version == 0 { 16 } else { 12 }) >> 16) as usize;
            all.push(self.word(net & !3).to_ne_bytes()[net & 3]);
        }
        unsafe { self.memory.add(self.next * self.size + status).cast::<u32>().write_volatile(0) };
        self.next = (self.next + 1) % self.parts;
        all
    }

    #[track_caller]
    fn expect(&mut self, version: u32, byte: u8) {
        let mut got = Vec::new();
        eventually("a frame in a ring", || {
            got = self.read(version);
            !got.is_empty()
        });
        check_eq!(got, vec![byte]);
    }
}

/// All versions, each in the middle of its ring; an unused ring for sending beside one of them.
pub(super) fn rings() {
    let sender = socket(libc::SOCK_DGRAM, 0);
    let mut all = Vec::new();
    for version in 0..3u32 {
        let protocol = TYPE + 8 + version as u16;
        let fd = socket(libc::SOCK_DGRAM, 0);
        let mut ring = Ring::new(fd, version, 8);
        bind(fd, protocol);
        for n in 0..11 {
            send(sender, protocol, &[n; 40]);
            ring.expect(version, n);
        }
        check_eq!(ring.next, 3);
        all.push((protocol, ring, version));
    }
    // two rings, mapped one behind the other
    let both = socket(libc::SOCK_RAW, 0);
    set(both, libc::PACKET_VERSION, &[1]);
    set(both, libc::PACKET_RX_RING, &[4096, 2, 2048, 4]);
    set(both, libc::PACKET_TX_RING, &[8192, 1, 2048, 4]);
    let memory = map_file(0, 16384, RW, libc::MAP_SHARED, both, 0);
    let child = fork(|| {
        let shared = folder().join("child");
        while !shared.exists() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        // it has the rings too
        i32::from(unsafe { memory.add(12288).read_volatile() } != 0)
    });
    ready();
    for (protocol, ring, version) in &mut all {
        for n in 100..120 {
            send(sender, *protocol, &[n; 40]);
            ring.expect(*version, n);
        }
    }
    // a frame to be sent: TP_STATUS_SEND_REQUEST, length, Ethernet header
    bind(both, TYPE + 20);
    let listener = socket(libc::SOCK_DGRAM, TYPE + 20);
    bind(listener, TYPE + 20);
    unsafe {
        let frame = memory.add(8192);
        // behind struct tpacket2_hdr
        frame.add(32 + 12).cast::<u16>().write_volatile((TYPE + 20).to_be());
        frame.add(32 + 14).write_volatile(b'!');
        frame.add(4).cast::<u32>().write_volatile(60);
        frame.cast::<u32>().write_volatile(1);
        sys(libc::send(both, std::ptr::null(), 0, 0) as i64);
    }
    let mut bytes = [0u8; 64];
    eventually("what was sent", || unsafe { libc::recv(listener, bytes.as_mut_ptr().cast(), 64, 0) } > 0);
    check_eq!(bytes[0], b'!');
    did(std::fs::write(folder().join("child"), ""));
    check_eq!(wait(child), 0);
}
