//! Links of tun and tap, which are made with ioctl(2) on /dev/net/tun.
//!
//! Only a persistent one is carried here: another one ends with the open file that made it. Documentation:
//! networking/tuntap.rst. Header: linux/if_tun.h.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use standstill_images::proto::{NetDeviceEntry, TunLinkEntry};

use super::{number, Link};
use crate::error::{At, Call, Error, Place, Result};
use crate::sys::calls;

const TUNSETPERSIST: u64 = 0x4004_54cb;
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETOWNER: u64 = 0x4004_54cc;
const TUNSETGROUP: u64 = 0x4004_54ce;
const TUNGETSNDBUF: u64 = 0x8004_54d3;
const TUNSETSNDBUF: u64 = 0x4004_54d4;
const TUNGETVNETHDRSZ: u64 = 0x8004_54d7;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETIFINDEX: u64 = 0x4004_54da;
const TUNGETFILTER: u64 = 0x8010_54db;
/// IFF_: kinds of link, and how it is used.
const TAP: u32 = 2;
const NO_PI: u32 = 0x1000;
const VNET_HDR: u32 = 0x4000;
const MULTI_QUEUE: u32 = 0x100;
const PERSIST: u32 = 0x800;

/// What an open description of a link says of it. With a name and flags, it is attached for that.
fn tun_settings(fd: BorrowedFd<'_>, flags: u32) -> Result<(u32, u32)> {
    let word = |call, request| -> Result<u32> {
        let mut value = [0; 4];
        calls::ioctl(fd, call, request, &mut value)?;
        Ok(u32::from_ne_bytes(value))
    };
    if flags & TAP != 0 {
        let mut filter = [0; 16];
        calls::ioctl(fd, "ioctl(TUNGETFILTER)", TUNGETFILTER, &mut filter)?;
        if filter[..2] != [0; 2] {
            return Err(Error::refused("a filter on a tap link", "detach it before the dump"));
        }
    }
    Ok((word("ioctl(TUNGETSNDBUF)", TUNGETSNDBUF)?, word("ioctl(TUNGETVNETHDRSZ)", TUNGETVNETHDRSZ)?))
}

fn open_tun(name: &str, index: Option<u32>, flags: u32) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .call("open")
        .at(Place::Path("/dev/net/tun".into()))?;
    if let Some(index) = index {
        calls::ioctl(file.as_fd(), "ioctl(TUNSETIFINDEX)", TUNSETIFINDEX, &mut index.to_ne_bytes())?;
    }
    let mut request = [0; 40];
    if name.len() >= 16 {
        return Err(Error::lie("netdev", format!("a link with the name {name}")));
    }
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&u16::try_from(flags & 0xffff).unwrap_or(0).to_ne_bytes());
    calls::ioctl(file.as_fd(), "ioctl(TUNSETIFF)", TUNSETIFF, &mut request)?;
    Ok(file)
}

/// What there is to say of one: settings that the kernel lists, and those that only an open description says.
pub(super) fn entry(link: &Link) -> Result<TunLinkEntry> {
    const NO_FILTER: u32 = 0x1000;
    const _: () = assert!(NO_FILTER == NO_PI);
    let data = link.data();
    let id = |kind| number(&data, kind).map_or(-1, i32::from_ne_bytes);
    let byte = |kind: u16| number(&data, kind).map_or(0, |[v]: [u8; 1]| u32::from(v));
    // 3: IFF_TUN or IFF_TAP, 4: has a head, 5: has a head of virtio, 6: persistent, 7: several queues
    let mut flags = byte(3);
    for (set, flag) in [(byte(4) == 0, NO_PI), (byte(5) != 0, VNET_HDR), (byte(7) != 0, MULTI_QUEUE)] {
        flags |= if set { flag } else { 0 };
    }
    let persistent = byte(6) != 0;
    if !persistent {
        return Err(Error::refused(
            format!("the network link {} (tun, which ends with its open file)", link.name),
            "make it persistent (ip tuntap add) before the dump",
        ));
    }
    let file = open_tun(&link.name, None, flags).map_err(|e| match e.errno() {
        libc::EBUSY => Error::refused(
            format!("the network link {} (tun, in use by an open file)", link.name),
            "close what has /dev/net/tun open before the dump",
        ),
        _ => e,
    })?;
    let (sndbuf, vnethdr) = tun_settings(file.as_fd(), flags)?;
    Ok(TunLinkEntry { flags: flags | PERSIST, owner: id(1), group: id(2), vnethdr, sndbuf })
}

/// Makes one, persistent.
pub(super) fn make(entry: &NetDeviceEntry, name: &str) -> Result<()> {
    let tun = entry.tun.as_ref().ok_or_else(|| Error::lie("netdev", format!("the tun link {name} lacks its entry")))?;
    let file = open_tun(name, Some(entry.ifindex), tun.flags & !PERSIST)?;
    let fd = file.as_fd();
    for (call, request, value) in
        [("ioctl(TUNSETOWNER)", TUNSETOWNER, tun.owner), ("ioctl(TUNSETGROUP)", TUNSETGROUP, tun.group)]
    {
        if value != -1 {
            calls::ioctl_value(fd, call, request, u64::from(value.cast_unsigned()))?;
        }
    }
    calls::ioctl(fd, "ioctl(TUNSETSNDBUF)", TUNSETSNDBUF, &mut tun.sndbuf.to_ne_bytes())?;
    calls::ioctl(fd, "ioctl(TUNSETVNETHDRSZ)", TUNSETVNETHDRSZ, &mut tun.vnethdr.to_ne_bytes())?;
    calls::ioctl_value(fd, "ioctl(TUNSETPERSIST)", TUNSETPERSIST, 1)?;
    Ok(())
}
