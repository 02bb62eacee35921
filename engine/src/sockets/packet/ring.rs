//! Rings of packet sockets: where the kernel goes on.
//!
//! The program remembers which frame (TPACKET_V1, V2) or block (V3) it reads next, and so does the kernel, which does not say.
//! But the ring shows it: of what waits to be read the oldest, or else what comes behind the newest; frames have times,
//! blocks have numbers. A new ring starts at its beginning, so a restore lets the kernel fill it up to there: with frames of
//! an experimental type that it sends itself through the loopback interface, and takes out again.
//!
//! Of a ring for sending nothing like that can be told; one that is all zeros was never used.
//!
//! Kernel documentation: networking/packet_mmap. Header: linux/if_packet.h.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use standstill_images::proto::{PacketRing, PacketSockEntry};

use super::address;
use crate::error::{Call, Error, Result};
use crate::sys::calls;
use crate::sys::memory::Shared;

/// TPACKET_V3.
pub(super) const V3: u32 = 2;
const V1: u32 = 0;
/// TP_STATUS_USER: it is the program's.
const USER: u32 = 1;
/// A type of Ethernet frames for experiments (IEEE 802), in the order of the network.
const EXPERIMENT: u16 = 0x88b5_u16.to_be();
/// The loopback interface of every network namespace.
const LOOPBACK: u32 = 1;
/// How long the kernel may take for one frame, or to close a block.
const SECONDS: u64 = 10;
/// What a frame through the loopback interface may have.
const LARGE: usize = 60_000;

/// The rings of a socket, mapped.
#[derive(Debug)]
pub(super) struct Rings {
    memory: Shared,
    version: u32,
    rx: Option<PacketRing>,
    tx: Option<PacketRing>,
}

fn size(r: &PacketRing) -> Option<usize> {
    usize::try_from(u64::from(r.block_size) * u64::from(r.block_nr)).ok()
}

/// Where frame `i` begins.
fn frame(r: &PacketRing, i: u32) -> usize {
    let in_block = (r.block_size / r.frame_size.max(1)).max(1);
    let at = u64::from(i / in_block) * u64::from(r.block_size) + u64::from(i % in_block) * u64::from(r.frame_size);
    usize::try_from(at).unwrap_or(usize::MAX)
}

impl Rings {
    /// Maps what the kernel says that there is.
    pub(super) fn map(fd: BorrowedFd<'_>, e: &PacketSockEntry) -> Result<Rings> {
        let lie = || Error::lie("files.img", format!("a ring of packet socket, file {:#x}", e.id));
        let sizes = e.rx_ring.iter().chain(&e.tx_ring).map(size);
        let total = sizes.sum::<Option<usize>>().filter(|&total| total != 0).ok_or_else(lie)?;
        for r in e.rx_ring.iter().chain(&e.tx_ring) {
            let fits = |r: &PacketRing| {
                r.block_nr != 0 && r.frame_size != 0 && r.frame_nr.div_ceil(r.block_nr) <= r.block_size / r.frame_size
            };
            if !fits(r) {
                return Err(lie());
            }
        }
        Ok(Rings { memory: Shared::map(fd, 0, total)?, version: e.version, rx: e.rx_ring, tx: e.tx_ring })
    }

    fn word(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(at, &mut bytes);
        u32::from_ne_bytes(bytes)
    }

    /// Frames or blocks of the ring for receiving.
    fn parts(&self) -> u32 {
        self.rx.as_ref().map_or(0, |r| if self.version == V3 { r.block_nr } else { r.frame_nr })
    }

    /// Where part `i` of the ring for receiving begins.
    fn part(&self, i: u32) -> usize {
        match &self.rx {
            Some(r) if self.version == V3 => {
                usize::try_from(u64::from(r.block_size) * u64::from(i)).unwrap_or(usize::MAX)
            }
            Some(r) => frame(r, i),
            None => 0,
        }
    }

    fn status_at(&self, i: u32) -> usize {
        self.part(i) + if self.version == V3 { 8 } else { 0 }
    }

    fn is_users(&self, i: u32) -> bool {
        self.word(self.status_at(i)) & USER != 0
    }

    /// What was filled later has more.
    fn age(&self, i: u32) -> u64 {
        let at = self.part(i);
        let (high, low) = match self.version {
            V3 => (self.word(at + 28), self.word(at + 24)),
            V1 => (self.word(at + 20), self.word(at + 24)),
            _ => (self.word(at + 16), self.word(at + 20)),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    /// What the program reads next.
    pub(super) fn next(&self) -> Option<u32> {
        self.rx.as_ref()?;
        let parts = self.parts();
        let ages: Vec<(u64, bool)> = (0..parts).map(|i| (self.age(i), self.is_users(i))).collect();
        Some(next(&ages, self.version == V3))
    }

    /// Was something ever sent through the ring for that?
    pub(super) fn was_sent_from(&self) -> bool {
        let Some(tx) = &self.tx else { return false };
        let begin = self.rx.as_ref().and_then(size).unwrap_or(0);
        (0..tx.frame_nr).any(|i| {
            let mut head = [0; 16];
            self.memory.read(begin + frame(tx, i), &mut head);
            head != [0; 16]
        })
    }
}

/// The part that is read next; `blocks`: one of them is always being filled, and has the highest number.
fn next(ages: &[(u64, bool)], blocks: bool) -> u32 {
    let before = |i: usize| ages[(i + ages.len() - 1) % ages.len()];
    let place = |i: usize| u32::try_from(i).unwrap_or(0);
    // of several that came at the same time, the one behind something else is the first
    let oldest =
        (0..ages.len()).filter(|&i| ages[i].1).min_by_key(|&i| (ages[i].0, before(i).1 && before(i).0 == ages[i].0));
    if let Some(i) = oldest {
        return place(i);
    }
    let newest = ages.iter().map(|a| a.0).max().unwrap_or(0);
    if newest == 0 {
        return 0;
    }
    let after = |i: usize| ages[(i + 1) % ages.len()];
    let last = (0..ages.len()).find(|&i| ages[i].0 == newest && after(i).0 != newest).unwrap_or(0);
    place(if blocks { last } else { (last + 1) % ages.len() })
}

/// Has the kernel go on at part `to` of the ring for receiving of a socket that has no protocol yet.
pub(super) fn advance(fd: BorrowedFd<'_>, e: &PacketSockEntry, to: u32) -> Result<()> {
    let rings = Rings::map(fd, e)?;
    if to >= rings.parts() {
        let what = format!("part {to} of a ring of {} is next in packet socket, file {:#x}", rings.parts(), e.id);
        return Err(Error::lie("files.img", what));
    }
    calls::bind(fd, &address(EXPERIMENT, LOOPBACK))?;
    let flags = SocketFlags::CLOEXEC;
    let sender =
        rustix::net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, None).call("socket(AF_PACKET)")?;
    let send = |len: usize| match calls::send_to(sender.as_fd(), &vec![0; len], &address(EXPERIMENT, LOOPBACK)) {
        Err(e) if [libc::ENOBUFS, libc::EAGAIN].contains(&e.errno()) => Ok(()),
        other => other,
    };
    for i in 0..to {
        let last = i + 1 == to;
        let begin = Instant::now();
        // one frame makes the kernel close a block in a while, many at once
        send(1)?;
        let mut arrived = None;
        while !rings.is_users(i) {
            if begin.elapsed() > Duration::from_secs(SECONDS) {
                return Err(Error::Timeout { what: "frames through the loopback interface", seconds: SECONDS });
            }
            // one after the other, so that none is left when the last block is closed
            let frames = (e.version == V3 && !last).then(|| rings.word(rings.part(i) + 12));
            if frames.is_some() && frames != arrived {
                send(LARGE.min(usize::try_from(e.rx_ring.map_or(0, |r| r.block_size)).unwrap_or(0) / 2))?;
                arrived = frames;
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
    // nothing more of this kind; what is there goes
    calls::bind(fd, &address(0xffff, LOOPBACK))?;
    for i in 0..to {
        rings.memory.write(rings.status_at(i), &0u32.to_ne_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::next;

    #[test]
    fn the_oldest_that_waits_is_next() {
        assert_eq!(next(&[(0, false), (0, false), (0, false)], false), 0);
        assert_eq!(next(&[(5, true), (6, true), (0, false)], false), 0);
        assert_eq!(next(&[(5, false), (6, true), (7, true)], false), 1);
        // it has come around
        assert_eq!(next(&[(8, true), (9, true), (7, true)], false), 2);
        // all at the same time
        assert_eq!(next(&[(7, true), (7, false), (7, true)], false), 2);
    }

    #[test]
    fn behind_the_newest_if_none_waits() {
        assert_eq!(next(&[(5, false), (6, false), (0, false)], false), 2);
        assert_eq!(next(&[(8, false), (9, false), (7, false)], false), 2);
        assert_eq!(next(&[(8, false), (9, false), (10, false)], false), 0);
        assert_eq!(next(&[(9, false), (9, false), (7, false)], false), 2);
        assert_eq!(next(&[(8, false), (9, false), (7, false)], true), 1);
    }
}
