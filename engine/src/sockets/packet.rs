//! Packet sockets: frames of network interfaces, read and sent one by one or through rings that the program has mapped.
//!
//! The kernel lists them (packet_diag) with protocol, interface, options, memberships, rings and fanout. Fanout flags, and
//! options that are not in the list, the socket says itself.
//!
//! Image: [`PacketSockEntry`] in `files.img`; `protocol` as socket(2) takes it, in the order of the network. A ring that is
//! mapped is an area with [`status::SOCKET`](crate::memory::status::SOCKET) whose `shmid` is the file id of its socket.
//!
//! A socket gets its protocol and interface after its rings and filters, so that nothing that it was not to receive is in
//! its rings. Then come memberships, and then fanout, which wants a socket that runs.
//!
//! Not kept: what was received and not read, as if the interface had dropped it; statistics; extended fanout arguments
//! (`max_num_members`). Where in a ring the kernel goes on to receive is kept: [`ring`]. Refused: fanout by a BPF program,
//! which the kernel does not give back; a socket whose interface is gone; a ring whose socket is open in no task; unless called as
//! `criu`, a ring for sending that was used, since nobody can tell which frame the kernel would send next.
//!
//! Man pages: packet(7), sock_diag(7). Header: linux/if_packet.h.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use standstill_images::proto::{FdTypes, FileEntry, PacketMclist, PacketRing as RingEntry, PacketSockEntry};

use super::options::{self, Opt};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::options::Persona;
use crate::sys::calls;
use crate::sys::diag::packet::{PacketRing, PacketSocket};
use crate::sys::diag::Diag;

mod ring;

const SOL_PACKET: i32 = libc::SOL_PACKET;
const ADD_MEMBERSHIP: Opt = Opt::new(SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, "PACKET_ADD_MEMBERSHIP");
const RX_RING: Opt = Opt::new(SOL_PACKET, libc::PACKET_RX_RING, "PACKET_RX_RING");
const TX_RING: Opt = Opt::new(SOL_PACKET, libc::PACKET_TX_RING, "PACKET_TX_RING");
const FANOUT: Opt = Opt::new(SOL_PACKET, libc::PACKET_FANOUT, "PACKET_FANOUT");
const VERSION: Opt = Opt::new(SOL_PACKET, libc::PACKET_VERSION, "PACKET_VERSION");
const RESERVE: Opt = Opt::new(SOL_PACKET, libc::PACKET_RESERVE, "PACKET_RESERVE");
const TIMESTAMP: Opt = Opt::new(SOL_PACKET, libc::PACKET_TIMESTAMP, "PACKET_TIMESTAMP");
const COPY_THRESH: Opt = Opt::new(SOL_PACKET, libc::PACKET_COPY_THRESH, "PACKET_COPY_THRESH");
const AUXDATA: Opt = Opt::new(SOL_PACKET, libc::PACKET_AUXDATA, "PACKET_AUXDATA");
const ORIGDEV: Opt = Opt::new(SOL_PACKET, libc::PACKET_ORIGDEV, "PACKET_ORIGDEV");
const VNET_HDR: Opt = Opt::new(SOL_PACKET, libc::PACKET_VNET_HDR, "PACKET_VNET_HDR");
const LOSS: Opt = Opt::new(SOL_PACKET, libc::PACKET_LOSS, "PACKET_LOSS");

/// PDI_: bits of what packet_diag says.
const PDI_AUXDATA: u32 = 2;
const PDI_ORIGDEV: u32 = 4;
const PDI_VNETHDR: u32 = 8;
const PDI_LOSS: u32 = 16;

/// PACKET_FANOUT_CBPF and _EBPF.
const FANOUT_BPF: [u32; 2] = [6, 7];
/// The longest address of an interface (MAX_ADDR_LEN).
const LONGEST_ADDRESS: usize = 32;

/// What a dump remembers.
#[derive(Debug, Default)]
pub struct Dumped {
    /// All of a network namespace, by inode.
    listed: HashMap<u32, HashMap<u32, PacketSocket>>,
    /// File ids of sockets whose rings are mapped, by inode, and whether the socket was there too.
    mapped: HashMap<u64, (u32, bool)>,
}

impl Dumped {
    fn find(&mut self, network: u32, ino: u32) -> Result<Option<PacketSocket>> {
        if let std::collections::hash_map::Entry::Vacant(unknown) = self.listed.entry(network) {
            let sockets = super::listed(Diag::open().and_then(|mut diag| diag.packet()))?;
            unknown.insert(sockets.into_iter().map(|s| (s.ino, s)).collect());
        }
        Ok(self.listed.get(&network).and_then(|sockets| sockets.get(&ino)).cloned())
    }
}

/// The file id of a socket whose ring is mapped; areas come before descriptors.
pub fn mapped(ino: u64, cx: &mut DumpFiles<'_>) -> u32 {
    if let Some(&(id, _)) = cx.packet.mapped.get(&ino) {
        return id;
    }
    let id = cx.new_id();
    cx.packet.mapped.insert(ino, (id, false));
    id
}

/// The id that a socket has been given for the sake of its ring.
pub fn reserved(d: &Descriptor, cx: &mut DumpFiles<'_>) -> Option<u32> {
    let (id, seen) = cx.packet.mapped.get_mut(&d.stat.st_ino).filter(|_| d.link.starts_with(b"socket:["))?;
    *seen = true;
    Some(*id)
}

/// After all descriptors: is there a ring without its socket?
pub fn check_rings(cx: &DumpFiles<'_>) -> Result<()> {
    match cx.packet.mapped.iter().find(|(_, (_, seen))| !seen) {
        Some((ino, _)) => Err(Error::refused(
            format!("the ring of packet socket {ino}, which no task has open"),
            "let the program keep the socket open while its ring is mapped",
        )),
        None => Ok(()),
    }
}

/// Dumps a socket.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let fd = d.copy.as_fd();
    let ino = u32::try_from(d.stat.st_ino).unwrap_or(u32::MAX);
    let gone = || Error::Changed { what: format!("packet socket {ino} is not in the kernel's list") };
    let socket = cx.packet.find(cx.net_ns, ino)?.ok_or_else(gone)?;
    let info = socket.info.ok_or_else(gone)?;
    if i32::try_from(info.index).is_err() {
        return Err(d.refused("a packet socket whose interface is gone", "close it before the dump"));
    }
    let fanout = match socket.fanout {
        Some(plain) if FANOUT_BPF.contains(&(plain >> 16 & 0xff)) => {
            return Err(d.refused("a packet socket with fanout by a BPF program", "let it leave the group"));
        }
        // the flags are not in the list
        Some(plain) => Some(FANOUT.get(fd).unwrap_or(plain)),
        None => None,
    };
    let mut mclist = Vec::new();
    for m in &socket.multicast {
        let address = m.address.get(..usize::from(m.address_length)).unwrap_or(&m.address);
        let one = PacketMclist { index: m.index, r#type: m.kind.into(), addr: address.to_vec() };
        mclist.extend(std::iter::repeat_n(one, usize::try_from(m.count).unwrap_or(1)));
    }
    let on = |bit: u32| info.flags & bit != 0;
    let mut entry = PacketSockEntry {
        id,
        r#type: socket.socket_type.into(),
        protocol: socket.protocol.to_be().into(),
        flags: d.flags,
        ifindex: info.index,
        fown: d.fown,
        opts: options::dump(fd, false)?,
        version: info.version,
        reserve: info.reserve,
        aux_data: on(PDI_AUXDATA),
        orig_dev: on(PDI_ORIGDEV),
        vnet_hdr: on(PDI_VNETHDR),
        loss: on(PDI_LOSS),
        timestamp: info.timestamp,
        copy_thresh: info.copy_threshold,
        mclist,
        fanout,
        rx_ring: socket.rx_ring.as_ref().map(ring_entry),
        tx_ring: socket.tx_ring.as_ref().map(ring_entry),
        ns_id: Some(cx.net_ns),
        standstill_rx_next: None,
    };
    if entry.rx_ring.is_some() || entry.tx_ring.is_some() {
        let rings = ring::Rings::map(fd, &entry)?;
        entry.standstill_rx_next = rings.next().filter(|&next| next != 0);
        if rings.was_sent_from() {
            if cx.opts.personality != Persona::Criu {
                let advice =
                    "let the program close it before the dump: which frame comes next is known to the kernel alone";
                return Err(d.refused("a packet socket whose ring for sending was used", advice));
            }
            tracing::warn!("the ring for sending of packet socket {ino} starts anew");
        }
    }
    Ok(FileEntry { id, r#type: FdTypes::Packetsk.into(), psk: Some(entry), ..FileEntry::default() })
}

fn ring_entry(r: &PacketRing) -> RingEntry {
    RingEntry {
        block_size: r.block_size,
        block_nr: r.block_count,
        frame_size: r.frame_size,
        frame_nr: r.frame_count,
        retire_tmo: r.retire_timeout,
        sizeof_priv: r.private_size,
        features: r.features,
    }
}

/// Makes it again.
pub fn open(e: &PacketSockEntry, cx: &RestoreFiles<'_>) -> Result<OwnedFd> {
    let _inside = cx.network(e.ns_id)?;
    let kind = SocketType::from_raw(e.r#type);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let lie = |what: String| Error::lie("files.img", format!("packet socket, file {:#x}: {what}", e.id));
    let old = kind == OLD;
    if !old && kind != SocketType::RAW && kind != SocketType::DGRAM {
        return Err(lie(format!("type {}", e.r#type)));
    }
    let protocol = u16::try_from(e.protocol).map_err(|_| lie(format!("protocol {:#x}", e.protocol)))?;
    // one of the old kind takes its protocol here or never
    let first = std::num::NonZeroU32::new(if old { e.protocol } else { 0 }).map(rustix::net::Protocol::from_raw);
    let socket = rustix::net::socket_with(AddressFamily::PACKET, kind, flags, first).call("socket(AF_PACKET)")?;
    let fd = socket.as_fd();
    if old {
        options::restore(fd, &e.opts)?;
        if e.ifindex != 0 {
            let name = rustix::net::netdevice::index_to_name(fd, e.ifindex).map_err(|_| no_interface(e.ifindex))?;
            bound(fd, &old_address(name.as_bytes()), e.ifindex)?;
        }
        set_status_flags(fd, e.flags)?;
        return Ok(socket);
    }
    VERSION.bring(fd, e.version)?;
    for (option, value) in [
        (RESERVE, e.reserve),
        (TIMESTAMP, e.timestamp),
        (COPY_THRESH, e.copy_thresh),
        (AUXDATA, e.aux_data.into()),
        (ORIGDEV, e.orig_dev.into()),
        (VNET_HDR, e.vnet_hdr.into()),
        (LOSS, e.loss.into()),
    ] {
        if value != 0 {
            option.set(fd, value)?;
        }
    }
    options::before_rings(fd, &e.opts)?;
    for (option, ring) in [(RX_RING, &e.rx_ring), (TX_RING, &e.tx_ring)] {
        if let Some(r) = ring {
            let words = [r.block_size, r.block_nr, r.frame_size, r.frame_nr, r.retire_tmo, r.sizeof_priv, r.features];
            // the shorter form is what versions without blocks take
            let used = if e.version == ring::V3 { 7 } else { 4 };
            option.write(fd, &words[..used].map_bytes())?;
        }
    }
    if let Some(next) = e.standstill_rx_next {
        ring::advance(fd, e, next).at(Place::Step("the ring for receiving"))?;
    }
    options::restore(fd, &e.opts)?;
    if e.ifindex != 0 || protocol != 0 {
        bound(fd, &address(protocol, e.ifindex), e.ifindex)?;
    }
    for m in &e.mclist {
        ADD_MEMBERSHIP.write(fd, &membership(m).ok_or_else(|| lie("the address of a membership".to_owned()))?)?;
    }
    if let Some(fanout) = e.fanout {
        FANOUT.set(fd, fanout)?;
    }
    set_status_flags(fd, e.flags)?;
    Ok(socket)
}

/// SOCK_PACKET.
const OLD: SocketType = SocketType::from_raw(10);

fn no_interface(index: u32) -> Error {
    Error::Changed {
        what: format!("there is no network interface with number {index}, which a packet socket is bound to"),
    }
}

fn bound(fd: BorrowedFd<'_>, address: &[u8], index: u32) -> Result<()> {
    match calls::bind(fd, address) {
        Err(e) if e.errno() == libc::ENODEV => Err(no_interface(index)),
        other => other,
    }
}

/// `struct sockaddr_ll`: protocol (in the order of the network) and interface.
fn address(protocol: u16, index: u32) -> Vec<u8> {
    let family = (libc::AF_PACKET as u16).to_ne_bytes();
    [&family[..], &protocol.to_ne_bytes(), &index.to_ne_bytes(), &[0; 12]].concat()
}

/// `struct sockaddr_pkt` without its protocol: the name of an interface.
fn old_address(name: &[u8]) -> Vec<u8> {
    let mut name = name.to_vec();
    name.resize(14, 0);
    [&(libc::AF_PACKET as u16).to_ne_bytes()[..], &name].concat()
}

/// `struct packet_mreq` with room for a long address.
fn membership(m: &PacketMclist) -> Option<Vec<u8>> {
    let (kind, len) = (u16::try_from(m.r#type).ok()?, u16::try_from(m.addr.len()).ok()?);
    let mut address = m.addr.clone();
    (address.len() <= LONGEST_ADDRESS).then(|| address.resize(LONGEST_ADDRESS, 0))?;
    Some([&m.index.to_ne_bytes()[..], &kind.to_ne_bytes(), &len.to_ne_bytes(), &address].concat())
}

/// Words as the kernel reads them.
trait MapBytes {
    fn map_bytes(&self) -> Vec<u8>;
}

impl MapBytes for [u32] {
    fn map_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }
}
