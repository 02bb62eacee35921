//! Links of tun and tap, which are made with ioctl(2) on /dev/net/tun.
//!
//! One that is not persistent ends with the open files that are attached to it, which must be the tree's ([`crate::files::tun`]): it is made
//! persistent, and they change that when they are attached again. Documentation: networking/tuntap.rst. Header: linux/if_tun.h.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use standstill_images::proto::{NetDeviceEntry, TunLinkEntry};

use super::{number, Link};
use crate::error::{Error, Result};
use crate::files::tun;
use crate::sys::calls;

const TUNSETPERSIST: u64 = 0x4004_54cb;
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
    let file = tun::device()?;
    if let Some(index) = index {
        calls::ioctl(file.as_fd(), "ioctl(TUNSETIFINDEX)", TUNSETIFINDEX, &mut index.to_ne_bytes())?;
    }
    tun::attach(file.as_fd(), name, flags)?;
    Ok(file)
}

/// IFF_ flags of a link.
pub(super) fn flags_of(link: &Link) -> u32 {
    let data = link.data();
    let byte = |kind: u16| number(&data, kind).map_or(0, |[v]: [u8; 1]| u32::from(v));
    // 3: IFF_TUN or IFF_TAP, 4: has a head, 5: has a head of virtio, 6: persistent, 7: several queues
    let mut flags = byte(3);
    let bits =
        [(byte(4) == 0, NO_PI), (byte(5) != 0, VNET_HDR), (byte(6) != 0, tun::PERSIST), (byte(7) != 0, MULTI_QUEUE)];
    for (set, flag) in bits {
        flags |= if set { flag } else { 0 };
    }
    flags
}

/// What there is to say of one: settings that the kernel lists, and those that only an open description says, the tree's if it
/// has one.
pub(super) fn entry(link: &Link, attached: Option<BorrowedFd<'_>>) -> Result<TunLinkEntry> {
    let data = link.data();
    let id = |kind| number(&data, kind).map_or(-1, i32::from_ne_bytes);
    let flags = flags_of(link);
    let persistent = flags & tun::PERSIST != 0;
    if !persistent && attached.is_none() {
        return Err(Error::refused(
            format!("the network link {} (tun, which ends with an open file that no task of the tree has)", link.name),
            "make it persistent (ip tuntap add) before the dump",
        ));
    }
    let (sndbuf, vnethdr) = match attached {
        Some(fd) => tun_settings(fd, flags)?,
        None => {
            let file = open_tun(&link.name, None, flags).map_err(|e| match e.errno() {
                libc::EBUSY => Error::refused(
                    format!(
                        "the network link {} (tun, in use by an open file that no task of the tree has)",
                        link.name
                    ),
                    "close what has /dev/net/tun open before the dump",
                ),
                _ => e,
            })?;
            tun_settings(file.as_fd(), flags)?
        }
    };
    Ok(TunLinkEntry { flags, owner: id(1), group: id(2), vnethdr, sndbuf })
}

/// Makes one, persistent.
pub(super) fn make(entry: &NetDeviceEntry, name: &str) -> Result<()> {
    let settings =
        entry.tun.as_ref().ok_or_else(|| Error::lie("netdev", format!("the tun link {name} lacks its entry")))?;
    let file = open_tun(name, Some(entry.ifindex), settings.flags & !tun::PERSIST)?;
    let fd = file.as_fd();
    for (call, request, value) in
        [("ioctl(TUNSETOWNER)", TUNSETOWNER, settings.owner), ("ioctl(TUNSETGROUP)", TUNSETGROUP, settings.group)]
    {
        if value != -1 {
            calls::ioctl_value(fd, call, request, u64::from(value.cast_unsigned()))?;
        }
    }
    calls::ioctl(fd, "ioctl(TUNSETSNDBUF)", TUNSETSNDBUF, &mut settings.sndbuf.to_ne_bytes())?;
    calls::ioctl(fd, "ioctl(TUNSETVNETHDRSZ)", TUNSETVNETHDRSZ, &mut settings.vnethdr.to_ne_bytes())?;
    calls::ioctl_value(fd, "ioctl(TUNSETPERSIST)", TUNSETPERSIST, 1)?;
    Ok(())
}
