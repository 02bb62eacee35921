//! What the peer of a connection that is half-closed, or over, had sent last: its FIN, that it has seen ours, a reset.
//!
//! There is no way to tell the kernel that these came, so they come: one packet, as the peer would send it, through a raw
//! socket to ourselves. It has the mark that CRIU gives to such packets, for rules that keep all others away.
//!
//! Man pages: raw(7), tcp(7). RFC 9293.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, Protocol, SendFlags, SocketFlags, SocketType};

use super::super::options::Opt;
use super::Info;
use crate::error::{Call, Error, Result};

const MARK: Opt = Opt::new(libc::SOL_SOCKET, libc::SO_MARK, "SO_MARK");
/// What CRIU marks its packets with.
const MARK_OF_RESTORE: u32 = 0xc114;
/// How long a packet to ourselves may take.
const SECONDS: u64 = 5;

/// FIN of the TCP header.
pub(super) const FIN: u8 = 1;
/// RST of the TCP header.
pub(super) const RST: u8 = 4;
/// ACK of the TCP header.
pub(super) const ACK: u8 = 16;

/// A packet of the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    /// Its flags.
    pub(super) flags: u8,
    /// Where it is in what the peer sent.
    pub(super) seq: u32,
    /// What the peer has of ours.
    pub(super) ack: u32,
    /// How much the peer would take, not scaled.
    pub(super) window: u16,
}

/// Sends a packet from `peer` to our socket `fd` at `own`, and waits until that is in one of these states.
pub(super) fn receive(
    fd: impl AsFd,
    own: &SocketAddr,
    peer: &SocketAddr,
    packet: Packet,
    states: &[u32],
) -> Result<()> {
    let (to, bytes) = bytes(own, peer, packet)?;
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let protocol = std::num::NonZeroU32::new(libc::IPPROTO_RAW as u32).map(Protocol::from_raw);
    let raw =
        rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, protocol).call("socket(SOCK_RAW)")?;
    MARK.set(raw.as_fd(), MARK_OF_RESTORE)?;
    rustix::net::sendto(&raw, &bytes, SendFlags::NOSIGNAL, &SocketAddr::new(to, 0)).call("sendto(SOCK_RAW)")?;
    let begin = Instant::now();
    while !states.contains(&Info::read(fd.as_fd())?.state) {
        if begin.elapsed() > Duration::from_secs(SECONDS) {
            return Err(Error::Timeout { what: "the end of a TCP connection that its peer closed", seconds: SECONDS });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The packet with its IP header, and where it goes.
fn bytes(own: &SocketAddr, peer: &SocketAddr, packet: Packet) -> Result<(IpAddr, Vec<u8>)> {
    let mut tcp = [
        &peer.port().to_be_bytes()[..],
        &own.port().to_be_bytes(),
        &packet.seq.to_be_bytes(),
        &packet.ack.to_be_bytes(),
    ]
    .concat();
    tcp.extend([5 << 4, packet.flags]);
    tcp.extend(packet.window.to_be_bytes());
    tcp.extend([0; 4]);
    // IPv4 connections of IPv6 sockets go as what they are
    let (to, addresses, header) = match (own.ip().to_canonical(), peer.ip().to_canonical()) {
        (IpAddr::V4(own), IpAddr::V4(peer)) => {
            let addresses = [peer.octets(), own.octets()].concat();
            let length = [0, 40];
            let header = [&[0x45, 0][..], &length, &[0; 4], &[64, 6, 0, 0], &addresses].concat();
            (IpAddr::from(own), addresses, header)
        }
        (IpAddr::V6(own), IpAddr::V6(peer)) => {
            let addresses = [peer.octets(), own.octets()].concat();
            let length = [0, 20];
            let header = [&[0x60, 0, 0, 0][..], &length, &[6, 64], &addresses].concat();
            (IpAddr::from(own), addresses, header)
        }
        _ => return Err(Error::lie("files.img", format!("a connection from {own} to {peer}"))),
    };
    let checksum = sum(&[&addresses[..], &[0, 6, 0, 20], &tcp].concat());
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    Ok((to, [header, tcp].concat()))
}

/// The checksum of the Internet protocols, of an even number of bytes.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn packets_check_out() {
        for (own, peer, header) in [
            ("10.0.0.1:80", "10.0.0.2:4000", 20),
            ("[fe80::1]:80", "[fe80::2]:4000", 40),
            ("[::ffff:1.2.3.4]:1", "[::ffff:4.3.2.1]:2", 20),
        ] {
            let packet = Packet { flags: FIN | ACK, seq: 0xdead_beef, ack: 0x1234_5678, window: 99 };
            let (to, bytes) = bytes(&own.parse().unwrap(), &peer.parse().unwrap(), packet).unwrap();
            assert_eq!((bytes.len(), to.is_ipv4()), (header + 20, header == 20));
            // with its checksum in place, a packet sums up to nothing
            let addresses = if header == 20 { &bytes[12..20] } else { &bytes[8..40] };
            assert_eq!(sum(&[addresses, &[0, 6, 0, 20], &bytes[header..]].concat()), 0);
        }
        assert!(bytes(
            &"1.2.3.4:1".parse().unwrap(),
            &"[::2]:1".parse().unwrap(),
            Packet { flags: 0, seq: 0, ack: 0, window: 0 }
        )
        .is_err());
    }
}
