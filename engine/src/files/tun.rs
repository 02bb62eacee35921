//! Open files of /dev/net/tun: programs that are at the other end of a tun or tap link, or have none yet.
//!
//! The link itself belongs to a network namespace ([`crate::network`]): it is made there, persistent, and each file is attached to
//! it again; when one is, the link is as persistent as it was. One of the host's network is not made: it must be persistent, and
//! there.
//!
//! Image: [`TunfileEntry`] in `files.img`. Fields of ours: status flags and owner.
//!
//! Not kept: packets that were not read, as if the link had dropped them; offloads (TUNSETOFFLOAD), without which packets are whole;
//! filters by BPF.
//!
//! Documentation: networking/tuntap.rst. Header: linux/if_tun.h; kernel: drivers/net/tun.c.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Stat};
use standstill_images::proto::{FdTypes, FileEntry, NetDeviceEntry, TunfileEntry};
use standstill_images::ImageKind;

use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::network;
use crate::options::Persona;
use crate::sys::calls;

/// The device (include/uapi/linux/major.h, miscdevice.h).
const NUMBER: (u32, u32) = (10, 200);
const TUNSETPERSIST: u64 = 0x4004_54cb;
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETQUEUE: u64 = 0x4004_54d9;
/// IFF_: of a link, and of one queue of it.
pub const PERSIST: u32 = 0x800;
const DETACH_QUEUE: u32 = 0x400;
/// struct ifreq.
const REQUEST: usize = 40;
const NAME: usize = 16;

/// What a dump remembers: a file of each link, with its network namespace.
#[derive(Debug, Default)]
pub struct Dumped {
    links: Vec<(u32, String, OwnedFd)>,
}

impl Dumped {
    /// A file that is at the other end of a link.
    pub fn of_link(&self, network: u32, name: &str) -> Option<BorrowedFd<'_>> {
        self.links.iter().find(|(id, link, _)| (*id, link.as_str()) == (network, name)).map(|(.., fd)| fd.as_fd())
    }
}

/// Whether a device is this one.
pub fn is_one(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == NUMBER
}

/// The link that a file is attached to, and how; none if there is none.
fn attached(fd: BorrowedFd<'_>) -> Result<Option<(String, u32)>> {
    let mut request = [0; REQUEST];
    match calls::ioctl(fd, "ioctl(TUNGETIFF)", TUNGETIFF, &mut request) {
        Ok(_) => {}
        Err(e) if e.errno() == libc::EBADFD => return Ok(None),
        Err(e) => return Err(e),
    }
    let name: Vec<u8> = request[..NAME].iter().copied().take_while(|b| *b != 0).collect();
    let flags = u16::from_ne_bytes([request[NAME], request[NAME + 1]]);
    Ok(Some((String::from_utf8_lossy(&name).into_owned(), flags.into())))
}

/// How a link of the host's is used. What TUNGETIFF says has IFF_NOFILTER in the place of IFF_NO_PI.
fn flags_of_host(name: &str) -> Result<u32> {
    let gone =
        || Error::Changed { what: format!("there is no tun link {name}, which a file is, or is to be, attached to") };
    network::links::tun_flags(name)?.ok_or_else(gone)
}

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let fd = d.copy.as_fd();
    let elsewhere = || {
        d.refused(
            "a file of a network namespace that is none of the tree's",
            "dump the tree that has the namespace, or close the file before the dump",
        )
    };
    let network = cx.networks.of_socket(fd, cx.net_ns)?.ok_or_else(elsewhere)?;
    let is_own = cx.networks.of_tree().iter().any(|(id, _)| *id == network);
    let mut entry = TunfileEntry {
        id,
        ns_id: Some(network),
        standstill_flags: Some(d.flags),
        standstill_fown: Some(d.fown),
        ..Default::default()
    };
    if let Some((name, flags)) = attached(fd)? {
        if !is_own && (flags & PERSIST == 0 || cx.opts.personality == Persona::Criu) {
            return Err(d.refused(
                &format!("the tun link {name} of the host's network, which ends with its file,"),
                "make the link persistent (ip tuntap add), or give the program a network namespace of its own",
            ));
        }
        entry.detached = (flags & DETACH_QUEUE != 0).then_some(true);
        if cx.tuns.of_link(network, &name).is_none() {
            cx.tuns.links.push((network, name.clone(), fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?));
        }
        entry.netdev = Some(name.into_bytes());
    }
    Ok(FileEntry { id, r#type: FdTypes::Tunf.into(), tunf: Some(entry), ..FileEntry::default() })
}

/// Opens the device.
pub fn device() -> Result<File> {
    const PATH: &str = "/dev/net/tun";
    File::options().read(true).write(true).open(PATH).call("open").at(Place::Path(PATH.into()))
}

/// Attaches a file to a link, which is made if it is not there.
pub fn attach(fd: BorrowedFd<'_>, name: &str, flags: u32) -> Result<()> {
    let mut request = [0; REQUEST];
    if name.len() >= NAME {
        return Err(Error::lie("files.img", format!("a link with the name {name}")));
    }
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[NAME..NAME + 2].copy_from_slice(&u16::try_from(flags & 0xffff).unwrap_or(0).to_ne_bytes());
    calls::ioctl(fd, "ioctl(TUNSETIFF)", TUNSETIFF, &mut request).map(drop)
}

/// How a link was used, by its entry.
fn flags_of_link(network: u32, name: &str, cx: &RestoreFiles<'_>) -> Result<u32> {
    let links: Vec<NetDeviceEntry> = cx.images.read_entries(ImageKind::Netdev, network)?;
    let link = links.iter().find(|link| link.name == name.as_bytes()).and_then(|link| link.tun.as_ref());
    link.map(|tun| tun.flags)
        .ok_or_else(|| Error::lie("files.img", format!("a file of the link {name}, which is not there")))
}

/// Opens it again, in its network namespace.
pub fn open(e: &TunfileEntry, cx: &RestoreFiles<'_>) -> Result<OwnedFd> {
    let _inside = cx.network(e.ns_id)?;
    let file = device()?;
    let fd = file.as_fd();
    if let Some(name) = &e.netdev {
        let name = std::str::from_utf8(name).map_err(|_| Error::lie("files.img", "a link without a name"))?;
        let network = e.ns_id.unwrap_or(cx.net_ns);
        let is_own = cx.networks.of_tree().iter().any(|(id, _)| *id == network);
        let flags = if is_own { flags_of_link(network, name, cx)? } else { flags_of_host(name)? };
        attach(fd, name, flags & !PERSIST)?;
        if e.detached() {
            let mut request = [0; REQUEST];
            request[NAME..NAME + 2].copy_from_slice(&(DETACH_QUEUE as u16).to_ne_bytes());
            calls::ioctl(fd, "ioctl(TUNSETQUEUE)", TUNSETQUEUE, &mut request)?;
        }
        if is_own && flags & PERSIST == 0 {
            calls::ioctl_value(fd, "ioctl(TUNSETPERSIST)", TUNSETPERSIST, 0)?;
        }
    }
    if let Some(flags) = e.standstill_flags {
        set_status_flags(fd, flags)?;
    }
    Ok(file.into())
}
