//! Multicast groups that an internet socket is in, and which sources it hears there.
//!
//! The kernel says which groups somebody is in, on each interface (/proc/net/igmp, /proc/net/igmp6), and of a socket, if it is asked
//! for one group on one interface, whether it is in it and what it hears (MCAST_MSFILTER). So a socket is asked for all.
//!
//! Image: an [`InetGroupEntry`] for each, with the interface by its name.
//!
//! Ordering at restore: last, when the socket is bound: a group is joined, then it gets its sources.
//!
//! Not kept: by which address of its interface an IPv4 socket had joined, which a program that leaves by an address must
//! name again: the interface's first is taken. Anycast addresses (IPV6_JOIN_ANYCAST).
//!
//! Man pages: ip(7), ipv6(7). RFC 3678.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use rustix::net::netdevice::{index_to_name, name_to_index};
use standstill_images::proto::{InetGroupEntry, InetSkEntry};

use super::super::options::Opt;
use super::{called, RAW};
use crate::error::{At, Call, Error, Place, Result};
use crate::proc::net::{parse_igmp, parse_igmp6, Group};

const IP_ADD_MEMBERSHIP: Opt = Opt::new(libc::SOL_IP, libc::IP_ADD_MEMBERSHIP, "IP_ADD_MEMBERSHIP");
const IPV6_ADD_MEMBERSHIP: Opt = Opt::new(libc::SOL_IPV6, libc::IPV6_ADD_MEMBERSHIP, "IPV6_ADD_MEMBERSHIP");
const MSFILTER: Opt = Opt::new(libc::SOL_IP, 48, "MCAST_MSFILTER");
const MSFILTER6: Opt = Opt::new(libc::SOL_IPV6, 48, "MCAST_MSFILTER");

/// `struct group_filter`: interface, group, mode, number of sources; then sources.
const FILTER: usize = 144;
const MODE: usize = 136;
const COUNT: usize = 140;
/// `struct sockaddr_storage`.
const ADDRESS: usize = 128;
/// MCAST_EXCLUDE.
const EXCLUDE: u32 = 0;
const INCLUDE: u32 = 1;

/// All groups that somebody in this network namespace is in.
#[derive(Debug, Default)]
pub(super) struct Groups(Option<Vec<Group>>);

impl Groups {
    fn all(&mut self) -> Result<&[Group]> {
        if self.0.is_none() {
            let mut all = Vec::new();
            for (name, parse) in [
                ("igmp", parse_igmp as fn(&[u8]) -> Result<Vec<Group>, crate::proc::ParseError>),
                ("igmp6", parse_igmp6),
            ] {
                let path = PathBuf::from(format!("/proc/thread-self/net/{name}"));
                let mut text = Vec::new();
                match crate::proc::read_proc(&path, &mut text) {
                    // a kernel without multicast, or without IPv6
                    Err(rustix::io::Errno::NOENT) => continue,
                    other => other.call("read").at(Place::Path(path))?,
                }
                all.extend(parse(&text)?);
            }
            self.0 = Some(all);
        }
        Ok(self.0.as_deref().unwrap_or_default())
    }

    /// Those that a socket is in. A stream is in none.
    pub(super) fn of(&mut self, fd: BorrowedFd<'_>, e: &InetSkEntry) -> Result<Vec<InetGroupEntry>> {
        let is_v6 = e.family == libc::AF_INET6 as u32;
        let mut found = Vec::new();
        for group in self.all()? {
            let asked = match group.address {
                IpAddr::V4(_) => !is_v6 || e.r#type != RAW,
                IpAddr::V6(_) => is_v6,
            };
            if !asked {
                continue;
            }
            if let Some((exclude, sources)) = heard(fd, group)? {
                found.push(InetGroupEntry {
                    ifname: index_to_name(fd, group.interface).call("ioctl(SIOCGIFNAME)")?.into_bytes(),
                    group: octets(group.address),
                    exclude,
                    sources: sources.into_iter().map(octets).collect(),
                });
            }
        }
        Ok(found)
    }
}

/// What a socket hears of a group, if it is in it: all but these sources, or these.
fn heard(fd: BorrowedFd<'_>, group: &Group) -> Result<Option<(bool, Vec<IpAddr>)>> {
    let mut room = 16;
    loop {
        let mut bytes = filter(group.interface, group.address, EXCLUDE, &[]);
        bytes[COUNT..FILTER].copy_from_slice(&u32::try_from(room).unwrap_or(u32::MAX).to_ne_bytes());
        bytes.resize(FILTER + room * ADDRESS, 0);
        let option = if group.address.is_ipv4() { MSFILTER } else { MSFILTER6 };
        match option.read(fd, &mut bytes) {
            Err(e) if e.errno() == libc::EADDRNOTAVAIL => return Ok(None),
            other => other?,
        };
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let count = usize::try_from(word(COUNT)).unwrap_or(usize::MAX);
        if count <= room {
            let sources = bytes[FILTER..].chunks_exact(ADDRESS).take(count);
            return Ok(Some((word(MODE) == EXCLUDE, sources.map(|at| address(at, group.address.is_ipv4())).collect())));
        }
        room = count;
    }
}

/// Joins the groups of an image.
pub(super) fn restore(fd: BorrowedFd<'_>, e: &InetSkEntry) -> Result<()> {
    // the kernel lists the last one first
    for group in e.standstill_groups.iter().rev() {
        let lie = || Error::lie("files.img", format!("a multicast group of {}", called(e)));
        let address = from_octets(&group.group).ok_or_else(lie)?;
        let sources: Vec<IpAddr> =
            group.sources.iter().map(|s| from_octets(s).ok_or_else(lie)).collect::<Result<_>>()?;
        if sources.iter().any(|s| s.is_ipv4() != address.is_ipv4()) {
            return Err(lie());
        }
        let name = String::from_utf8_lossy(&group.ifname);
        let interface = name_to_index(fd, &name).map_err(|_| Error::Changed {
            what: format!("the interface {name} of the multicast group {address}, which {} is in, is gone", called(e)),
        })?;
        match address {
            IpAddr::V4(group_address) => {
                let by = first_address(&name).unwrap_or(Ipv4Addr::UNSPECIFIED);
                let request = [group_address.octets(), by.octets(), interface.to_ne_bytes()].concat();
                IP_ADD_MEMBERSHIP.write(fd, &request)?;
            }
            IpAddr::V6(group) => {
                IPV6_ADD_MEMBERSHIP.write(fd, &[&group.octets()[..], &interface.to_ne_bytes()].concat())?;
            }
        }
        if !group.exclude || !sources.is_empty() {
            let mode = if group.exclude { EXCLUDE } else { INCLUDE };
            let option = if address.is_ipv4() { MSFILTER } else { MSFILTER6 };
            option.write(fd, &filter(interface, address, mode, &sources))?;
        }
    }
    Ok(())
}

fn first_address(interface: &str) -> Option<Ipv4Addr> {
    let all = nix::ifaddrs::getifaddrs().ok()?;
    let of_it = all.filter(|a| a.interface_name == interface);
    of_it.filter_map(|a| a.address?.as_sockaddr_in().map(|a| a.ip())).next()
}

/// A `group_filter`.
fn filter(interface: u32, group: IpAddr, mode: u32, sources: &[IpAddr]) -> Vec<u8> {
    let count = u32::try_from(sources.len()).unwrap_or(u32::MAX);
    let mut bytes = [&interface.to_ne_bytes()[..], &[0; 4], &storage(group)].concat();
    bytes.extend([mode.to_ne_bytes(), count.to_ne_bytes()].concat());
    bytes.extend(sources.iter().flat_map(|&source| storage(source)));
    bytes
}

/// A `sockaddr_storage`.
fn storage(address: IpAddr) -> [u8; ADDRESS] {
    let mut bytes = [0; ADDRESS];
    match address {
        IpAddr::V4(v4) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            bytes[4..8].copy_from_slice(&v4.octets());
        }
        IpAddr::V6(v6) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            bytes[8..24].copy_from_slice(&v6.octets());
        }
    }
    bytes
}

fn address(storage: &[u8], is_v4: bool) -> IpAddr {
    if is_v4 {
        Ipv4Addr::new(storage[4], storage[5], storage[6], storage[7]).into()
    } else {
        let mut octets = [0; 16];
        octets.copy_from_slice(&storage[8..24]);
        Ipv6Addr::from(octets).into()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn from_octets(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or(<[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}
