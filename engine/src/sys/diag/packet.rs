//! Packet sockets, as packet_diag lists them.
//!
//! The filter is there only for a reader with CAP_NET_ADMIN over the namespace.
//!
//! Header: linux/packet_diag.h. Man pages: sock_diag(7), packet(7).

use super::wire::{u32_of, Attributes, Fields, Malformed, SocketMemory};

/// A packet socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketSocket {
    /// SOCK_RAW, SOCK_DGRAM or SOCK_PACKET.
    pub socket_type: u8,
    /// Ethernet protocol, in host order.
    pub protocol: u16,
    /// Inode.
    pub ino: u32,
    /// A number that no other socket had since boot.
    pub cookie: u64,
    /// How it is set up.
    pub info: Option<PacketInfo>,
    /// Memberships.
    pub multicast: Vec<PacketMembership>,
    /// Ring for receiving.
    pub rx_ring: Option<PacketRing>,
    /// Ring for sending.
    pub tx_ring: Option<PacketRing>,
    /// Fanout: identity in the lower 16 bits, type in the upper.
    pub fanout: Option<u32>,
    /// User who made it.
    pub uid: Option<u32>,
    /// Memory.
    pub memory: SocketMemory,
    /// Attached filter: instructions of classic BPF, eight bytes each.
    pub filter: Vec<u8>,
}

/// Set-up of a packet socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketInfo {
    /// Interface, or 0.
    pub index: u32,
    /// PACKET_VERSION.
    pub version: u32,
    /// PACKET_RESERVE.
    pub reserve: u32,
    /// PACKET_COPY_THRESH.
    pub copy_threshold: u32,
    /// PACKET_TIMESTAMP.
    pub timestamp: u32,
    /// PDI_: 1 running, 2 auxiliary data, 4 original device, 8 virtio header, 16 loss.
    pub flags: u32,
}

/// A membership of a packet socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketMembership {
    /// Interface.
    pub index: u32,
    /// How often it was added.
    pub count: u32,
    /// PACKET_MR_.
    pub kind: u16,
    /// Length of the address.
    pub address_length: u16,
    /// Address.
    pub address: [u8; 32],
}

/// A ring of a packet socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketRing {
    /// Size of a block.
    pub block_size: u32,
    /// Blocks.
    pub block_count: u32,
    /// Size of a frame.
    pub frame_size: u32,
    /// Frames.
    pub frame_count: u32,
    /// Time until a block is given over.
    pub retire_timeout: u32,
    /// Private data in a block.
    pub private_size: u32,
    /// TP_FT_.
    pub features: u32,
}

/// The question for all of them, with all that the kernel knows.
#[must_use]
pub fn request() -> Vec<u8> {
    const SHOW_ALL: u32 = 0x3f;
    let mut body = vec![17, 0, 0, 0];
    for field in [0, SHOW_ALL, u32::MAX, u32::MAX] {
        body.extend(field.to_ne_bytes());
    }
    body
}

/// Reads one message.
///
/// # Errors
/// If a field or attribute that is known is too short.
pub fn parse(message: &[u8]) -> Result<PacketSocket, Malformed> {
    let mut fields = Fields::new(message, "a packet socket");
    let [_family, socket_type] = fields.bytes()?;
    let (protocol, ino, cookie) = (fields.u16()?, fields.u32()?, fields.u64()?);
    let mut socket = PacketSocket { socket_type, protocol, ino, cookie, ..PacketSocket::default() };
    for attribute in Attributes::new(fields.rest()) {
        let (kind, value) = attribute?;
        match kind {
            0 => socket.info = Some(info(value)?),
            1 => socket.multicast = value.chunks(44).map(membership).collect::<Result<_, _>>()?,
            2 => socket.rx_ring = Some(ring(value)?),
            3 => socket.tx_ring = Some(ring(value)?),
            4 => socket.fanout = Some(u32_of(value, "the fanout of a packet socket")?),
            5 => socket.uid = Some(u32_of(value, "the user of a packet socket")?),
            6 => socket.memory = SocketMemory::parse(value)?,
            7 => socket.filter = value.to_vec(),
            _ => {}
        }
    }
    Ok(socket)
}

fn info(value: &[u8]) -> Result<PacketInfo, Malformed> {
    let mut fields = Fields::new(value, "the set-up of a packet socket");
    Ok(PacketInfo {
        index: fields.u32()?,
        version: fields.u32()?,
        reserve: fields.u32()?,
        copy_threshold: fields.u32()?,
        timestamp: fields.u32()?,
        flags: fields.u32()?,
    })
}

fn membership(value: &[u8]) -> Result<PacketMembership, Malformed> {
    let mut fields = Fields::new(value, "a membership of a packet socket");
    Ok(PacketMembership {
        index: fields.u32()?,
        count: fields.u32()?,
        kind: fields.u16()?,
        address_length: fields.u16()?,
        address: fields.bytes()?,
    })
}

fn ring(value: &[u8]) -> Result<PacketRing, Malformed> {
    let mut fields = Fields::new(value, "a ring of a packet socket");
    Ok(PacketRing {
        block_size: fields.u32()?,
        block_count: fields.u32()?,
        frame_size: fields.u32()?,
        frame_count: fields.u32()?,
        retire_timeout: fields.u32()?,
        private_size: fields.u32()?,
        features: fields.u32()?,
    })
}
