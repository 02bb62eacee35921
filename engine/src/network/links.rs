//! Links of a network namespace: loopback, veth, bridge, macvlan, tun and tap, sit, and those that others move in.
//!
//! The kernel lists them by RTM_GETLINK. Image: `netdev-N.img`, one entry a link, with its number, which addresses and routes
//! name it by, and its settings ([`super::sysctl`]). A link in another namespace than its peer says so by that namespace's
//! number in its own (IFLA_LINK_NETNSID), which `netns-N.img` translates.
//!
//! What stands for the other end of a link that leaves the tree is told at restore, in CRIU's words: `--external
//! veth[NAME]:OUTER[@BRIDGE]` (or `--veth-pair`), where OUTER is made in our namespace and put into BRIDGE; `--external
//! netdev[NAME]:LINK`, a link of ours that is moved in; `--external macvlan[NAME]:LINK`, the link of ours below a macvlan. A
//! macvlan on a link of the same namespace needs none of that.
//!
//! A link is made down, gets its settings and its bridge, and only then comes up: the kernel gives it its IPv6 address then.
//! For the restore, `accept_dad` is off, since the program's addresses were known to be free; its value is set at the end.
//!
//! Not kept: settings of bridges, queueing disciplines, statistics. A kind that is not listed above is refused by name.
//!
//! Man pages: rtnetlink(7), veth(4), ip-link(8). Header: linux/if_link.h.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use standstill_images::proto::{MacvlanLinkEntry, NdType, NetDeviceEntry, NetnsEntry, SysctlEntry};

use super::sysctl::{self, IPV4, IPV6};
use crate::error::{At, Error, Place, Result};
use crate::options::Options;
use crate::sys::netlink::{self, Message, Netlink, CREATE, HEADER};

mod sit;
mod tun;

const NEWLINK: u16 = 16;
const GETLINK: u16 = 18;
const SETLINK: u16 = 19;
const BODY: usize = 16;

const PACKET: u8 = 17;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_NEW_IFINDEX: u16 = 49;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const VETH_PEER: u16 = 1;
const MACVLAN_MODE: u16 = 1;
const MACVLAN_FLAGS: u16 = 2;

const IFF_UP: u32 = 1;
/// Flags that are set from outside: UP, DEBUG, NOTRAILERS, NOARP, PROMISC, ALLMULTI, MULTICAST, PORTSEL, AUTOMEDIA, DYNAMIC.
const SETTABLE: u32 = 0xf1a5 & !0x40;

const ARPHRD_LOOPBACK: u16 = 772;
/// Links that a kernel with the module has in every namespace, whether anybody wants them or not.
const FALLBACKS: [&str; 12] = [
    "sit0",
    "gre0",
    "gretap0",
    "erspan0",
    "tunl0",
    "ip6tnl0",
    "ip6gre0",
    "ip6_vti0",
    "ip_vti0",
    "ip6erspan0",
    "teql0",
    "ip6gretap0",
];

/// A link as the kernel says it is.
#[derive(Debug, Default)]
struct Link {
    index: u32,
    hardware: u16,
    flags: u32,
    name: String,
    mtu: u32,
    address: Option<Vec<u8>>,
    below: Option<u32>,
    below_in: Option<i32>,
    master: Option<u32>,
    kind: String,
    data: Vec<u8>,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

impl Link {
    fn parse(message: &[u8]) -> Option<Link> {
        let word = |at| netlink::word(message, HEADER + at);
        let all = netlink::attributes(message.get(HEADER + BODY..)?);
        let number = |kind| netlink::find(&all, kind).and_then(|v| netlink::word(v, 0));
        let info = netlink::attributes(netlink::find(&all, IFLA_LINKINFO).unwrap_or_default());
        Some(Link {
            hardware: u16::from_ne_bytes(message.get(HEADER + 2..HEADER + 4)?.try_into().ok()?),
            index: word(4)?,
            flags: word(8)?,
            name: text(netlink::find(&all, IFLA_IFNAME)?),
            mtu: number(IFLA_MTU)?,
            address: netlink::find(&all, IFLA_ADDRESS).map(<[u8]>::to_vec),
            below: number(IFLA_LINK),
            below_in: number(IFLA_LINK_NETNSID).map(u32::cast_signed),
            master: number(IFLA_MASTER),
            kind: netlink::find(&info, INFO_KIND).map(text).unwrap_or_default(),
            data: netlink::find(&info, INFO_DATA).unwrap_or_default().to_vec(),
        })
    }

    fn kind(&self) -> Result<NdType> {
        Ok(match self.kind.as_str() {
            _ if self.hardware == ARPHRD_LOOPBACK => NdType::Loopback,
            "veth" => NdType::Veth,
            "tun" => NdType::Tun,
            "bridge" => NdType::Bridge,
            "macvlan" => NdType::Macvlan,
            "sit" => NdType::Sit,
            kind => {
                let kind = if kind.is_empty() { "a device" } else { kind };
                return Err(Error::refused(
                    format!("the network link {} ({kind}, type {})", self.name, self.hardware),
                    "remove it, or move it out of the network namespace, before the dump",
                ));
            }
        })
    }

    fn data(&self) -> BTreeMap<u16, &[u8]> {
        netlink::attributes(&self.data).into_iter().collect()
    }
}

fn all_links(netlink: &mut Netlink) -> Result<Vec<Link>> {
    let mut body = [0; BODY];
    body[0] = PACKET;
    let all = netlink.list(&Message::new(GETLINK, 0, &body))?;
    let links = all.iter().filter(|m| netlink::kind_of(m) == Some(NEWLINK));
    links.map(|m| Link::parse(m).ok_or(Error::Changed { what: "a network link cannot be read".into() })).collect()
}

/// IFF_ flags of a tun or tap link of the network namespace that we are in, as its files are attached with them.
pub fn tun_flags(name: &str) -> Result<Option<u32>> {
    let links = all_links(&mut Netlink::open(netlink::ROUTE)?)?;
    let link = links.iter().find(|link| link.name == name && link.kind == "tun");
    Ok(link.map(tun::flags_of))
}

/// Asks for all links, so that the namespaces at their other ends have numbers here.
pub fn give_numbers(netlink: &mut Netlink) -> Result<()> {
    all_links(netlink).map(drop)
}

/// Writes down the links of the namespace `id`, which we are in; `known` has numbers of other namespaces here, and ids.
pub fn dump(
    netlink: &mut Netlink,
    id: u32,
    known: &[(i32, u32)],
    tuns: &crate::files::tun::Dumped,
) -> Result<Vec<NetDeviceEntry>> {
    let mut entries = Vec::new();
    for link in all_links(netlink)? {
        let is_fallback = FALLBACKS.contains(&link.name.as_str()) && link.flags & IFF_UP == 0;
        if is_fallback && (link.kind.is_empty() || link.kind != "veth") {
            tracing::info!("the link {} comes with the kernel", link.name);
            continue;
        }
        let kind = link.kind()?;
        let peer_ns = match link.below_in {
            None => Some(id),
            Some(number) => known.iter().find(|(n, _)| *n == number).map(|(_, id)| *id),
        };
        if peer_ns.is_none() {
            tracing::info!("the other end of {} is outside", link.name);
        }
        let mut entry = NetDeviceEntry {
            r#type: kind as i32,
            ifindex: link.index,
            mtu: link.mtu,
            flags: link.flags,
            name: link.name.clone().into_bytes(),
            address: link.address.clone().filter(|_| kind != NdType::Loopback),
            master: link.master,
            peer_ifindex: Some(link.below.unwrap_or(link.index)),
            peer_nsid: peer_ns,
            conf4: sysctl::read(&sysctl::folder("ipv4", &link.name), &IPV4)?,
            conf6: sysctl::read(&sysctl::folder("ipv6", &link.name), &IPV6)?,
            ..Default::default()
        };
        match kind {
            NdType::Tun => entry.tun = Some(tun::entry(&link, tuns.of_link(id, &link.name))?),
            NdType::Macvlan => entry.macvlan = Some(macvlan_entry(&link)?),
            NdType::Sit => entry.sit = Some(sit::entry(&link)),
            NdType::Loopback | NdType::Veth | NdType::Bridge | NdType::Extlink | NdType::Venet => {}
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn number<const N: usize>(data: &BTreeMap<u16, &[u8]>, kind: u16) -> Option<[u8; N]> {
    data.get(&kind)?.get(..N)?.try_into().ok()
}

fn macvlan_entry(link: &Link) -> Result<MacvlanLinkEntry> {
    const MODE_SOURCE: u32 = 16;
    let data = link.data();
    let mode = number(&data, MACVLAN_MODE).map(u32::from_ne_bytes);
    let mode = mode.ok_or_else(|| Error::Changed { what: format!("the macvlan {} has no mode", link.name) })?;
    if mode == MODE_SOURCE {
        return Err(Error::refused(
            format!("the network link {} (macvlan in source mode)", link.name),
            "its list of sources is lost; use another mode",
        ));
    }
    Ok(MacvlanLinkEntry { mode, flags: number(&data, MACVLAN_FLAGS).map(|f| u16::from_ne_bytes(f).into()) })
}

/// A link on its way back.
#[derive(Debug)]
pub struct Planned {
    entry: NetDeviceEntry,
    kind: NdType,
    name: String,
    made: bool,
}

impl Planned {
    /// From an image.
    pub fn new(entry: NetDeviceEntry) -> Result<Planned> {
        let name = String::from_utf8(entry.name.clone()).ok().filter(|n| !n.is_empty() && n.len() < 16);
        let name = name.filter(|n| !n.contains('/') && n != "." && n != "..");
        let name = name.ok_or_else(|| {
            Error::lie("netdev", format!("a link with the name {}", String::from_utf8_lossy(&entry.name)))
        })?;
        let kind = NdType::try_from(entry.r#type)
            .map_err(|_| Error::lie("netdev", format!("the link {name} of type {}", entry.r#type)))?;
        if entry.ifindex == 0 || i32::try_from(entry.ifindex).is_err() {
            return Err(Error::lie("netdev", format!("the link {name} with number {}", entry.ifindex)));
        }
        if kind == NdType::Venet {
            return Err(Error::refused(format!("the network link {name} (venet)"), "only kernels of OpenVZ have it"));
        }
        Ok(Planned { entry, kind, name, made: false })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Has it been made?
    pub fn is_made(&self) -> bool {
        self.made
    }

    /// The number of its bridge.
    pub fn master(&self) -> Option<u32> {
        self.entry.master
    }

    /// Its own number.
    pub fn index(&self) -> u32 {
        self.entry.ifindex
    }
}

fn body(index: u32, flags: u32, change: u32) -> [u8; BODY] {
    let mut body = [0; BODY];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&change.to_ne_bytes());
    body
}

/// A link of the namespace that `netlink` is of, by its name.
pub fn index_of(netlink: &mut Netlink, name: &str) -> Result<u32> {
    let mut message = Message::new(GETLINK, 0, &body(0, 0, 0));
    message.text(IFLA_IFNAME, name);
    let answer = netlink.get(message).at(Place::Step("a network link")).map_err(|e| match e.errno() {
        libc::ENODEV => Error::Usage { what: format!("there is no network link {name} here") },
        _ => e,
    })?;
    answer.and_then(|m| netlink::word(&m, HEADER + 4)).ok_or(Error::Gone)
}

/// All namespaces of a restore, as links need them.
pub struct Spaces<'a> {
    /// Namespace by id.
    pub all: &'a [(u32, BorrowedFd<'a>)],
    /// Netlink in our own namespace.
    pub host: &'a mut Netlink,
    /// Our own namespace.
    pub host_fd: BorrowedFd<'a>,
    /// What stands for what is outside.
    pub opts: &'a Options,
}

impl Spaces<'_> {
    fn fd(&self, id: u32) -> Option<i32> {
        self.all.iter().find(|(n, _)| *n == id).map(|(_, fd)| fd.as_raw_fd())
    }

    fn external(&self, kind: &str, name: &str) -> Option<String> {
        let of_kind = self.opts.external_of_kind(kind);
        of_kind.into_iter().find(|e| e.key == format!("{kind}[{name}]")).and_then(|e| e.value.clone())
    }
}

/// Makes one link in the namespace `id`, which `netlink` is of; it stays down. `others` are all links of all namespaces, as
/// far as they are not made yet; what is made with it is marked there.
pub fn make(
    link: &mut Planned,
    id: u32,
    netlink: &mut Netlink,
    others: &mut [(u32, &mut Planned)],
    spaces: &mut Spaces<'_>,
) -> Result<()> {
    let name = link.name.clone();
    let entry = &link.entry;
    match link.kind {
        NdType::Loopback => {
            // whatever it is called, and whatever its number is: there is one
            set(link, netlink, None)?;
        }
        NdType::Extlink => set(link, netlink, None)?,
        NdType::Venet => return Err(Error::lie("netdev", format!("the link {name}"))),
        NdType::Veth => {
            if let Some(ours) = spaces.external("netdev", &name) {
                move_in(link, &ours, spaces, id)?;
            } else {
                make_veth(link, id, netlink, others, spaces)?;
            }
        }
        NdType::Tun => {
            tun::make(entry, &name)?;
            set(link, netlink, Some(entry.ifindex))?;
        }
        NdType::Bridge => {
            let mut message = new_link(entry, &name);
            message.nested(IFLA_LINKINFO, &[], |m| {
                m.text(INFO_KIND, "bridge");
            });
            netlink.change(message)?;
        }
        NdType::Macvlan => make_macvlan(link, id, netlink, spaces)?,
        NdType::Sit => {
            let settings =
                entry.sit.as_ref().ok_or_else(|| Error::lie("netdev", format!("{name} lacks its tunnel")))?;
            let mut message = new_link(entry, &name);
            message.nested(IFLA_LINKINFO, &[], |m| {
                m.text(INFO_KIND, "sit").nested(INFO_DATA, &[], |m| sit::put(m, settings));
            });
            netlink.change(message).map_err(|e| match e.errno() {
                libc::EOPNOTSUPP => {
                    Error::refused(format!("the network link {name} (sit)"), "this kernel lacks CONFIG_IPV6_SIT")
                }
                _ => e,
            })?;
        }
    }
    link.made = true;
    Ok(())
}

/// The start of a message for a new link, down.
fn new_link(entry: &NetDeviceEntry, name: &str) -> Message {
    let mut message = Message::new(NEWLINK, CREATE | 0x200, &body(entry.ifindex, 0, 0));
    message.text(IFLA_IFNAME, name).word(IFLA_MTU, entry.mtu);
    if let Some(address) = &entry.address {
        message.bytes(IFLA_ADDRESS, address);
    }
    message
}

/// Gives a link that is there what it is to have; `index` tells which, or else its name.
fn set(link: &Planned, netlink: &mut Netlink, index: Option<u32>) -> Result<()> {
    let mut message = Message::new(SETLINK, 0, &body(index.unwrap_or(0), 0, 0));
    message.text(IFLA_IFNAME, &link.name).word(IFLA_MTU, link.entry.mtu);
    // a tun link has none, and one of a tap is not refused
    if let Some(address) = link.entry.address.as_ref().filter(|a| !a.is_empty()) {
        message.bytes(IFLA_ADDRESS, address);
    }
    netlink.change(message)
}

fn move_in(link: &Planned, ours: &str, spaces: &mut Spaces<'_>, id: u32) -> Result<()> {
    let index = index_of(spaces.host, ours)?;
    let mut message = Message::new(NEWLINK, 0, &body(index, 0, 0));
    message.text(IFLA_IFNAME, &link.name).word(IFLA_MTU, link.entry.mtu).word(IFLA_NEW_IFINDEX, link.entry.ifindex);
    if let Some(address) = &link.entry.address {
        message.bytes(IFLA_ADDRESS, address);
    }
    message.signed(IFLA_NET_NS_FD, spaces.fd(id).ok_or(Error::Gone)?);
    spaces.host.change(message)
}

fn make_veth(
    link: &Planned,
    id: u32,
    netlink: &mut Netlink,
    others: &mut [(u32, &mut Planned)],
    spaces: &mut Spaces<'_>,
) -> Result<()> {
    let (entry, name) = (&link.entry, &link.name);
    let mut message = new_link(entry, name);
    let veth = |message: &mut Message, index: u32, more: &mut dyn FnMut(&mut Message)| {
        message.nested(IFLA_LINKINFO, &[], |m| {
            m.text(INFO_KIND, "veth").nested(INFO_DATA, &[], |m| {
                m.nested(VETH_PEER, &body(index, 0, 0), |m| more(m));
            });
        });
    };
    if let Some(outer) = spaces.external("veth", name) {
        let host = spaces.host_fd.as_raw_fd();
        let outer = outer.split('@').next().unwrap_or_default();
        veth(&mut message, 0, &mut |m| {
            m.text(IFLA_IFNAME, outer).signed(IFLA_NET_NS_FD, host);
        });
        return netlink.change(message);
    }
    let peer_index = entry.peer_ifindex.filter(|i| *i != 0).unwrap_or(entry.ifindex);
    let peer = others.iter_mut().find(|(ns, p)| {
        Some(*ns) == entry.peer_nsid && p.entry.ifindex == peer_index && p.kind == NdType::Veth && !p.made
    });
    let Some((ns, peer)) = peer else {
        return Err(Error::Usage {
            what: format!(
                "the other end of the network link {name} (veth) was outside: say what it is to be, with --external \
                 veth[{name}]:NAME, or --external netdev[{name}]:LINK for a link that is there"
            ),
        });
    };
    let fd = if *ns == id { None } else { Some(spaces.fd(*ns).ok_or(Error::Gone)?) };
    veth(&mut message, peer_index, &mut |m| {
        m.text(IFLA_IFNAME, &peer.name).word(IFLA_MTU, peer.entry.mtu);
        if let Some(address) = &peer.entry.address {
            m.bytes(IFLA_ADDRESS, address);
        }
        if let Some(fd) = fd {
            m.signed(IFLA_NET_NS_FD, fd);
        }
    });
    netlink.change(message)?;
    peer.made = true;
    Ok(())
}

fn make_macvlan(link: &Planned, id: u32, netlink: &mut Netlink, spaces: &mut Spaces<'_>) -> Result<()> {
    let (entry, name) = (&link.entry, &link.name);
    let macvlan =
        entry.macvlan.as_ref().ok_or_else(|| Error::lie("netdev", format!("{name} lacks what a macvlan has")))?;
    let fill = |message: &mut Message| {
        message.nested(IFLA_LINKINFO, &[], |m| {
            m.text(INFO_KIND, "macvlan").nested(INFO_DATA, &[], |m| {
                m.word(MACVLAN_MODE, macvlan.mode);
                if let Some(flags) = macvlan.flags {
                    m.half(MACVLAN_FLAGS, u16::try_from(flags).unwrap_or(0));
                }
            });
        });
    };
    let mut message = new_link(entry, name);
    if let Some(below) = spaces.external("macvlan", name) {
        let below = index_of(spaces.host, &below)?;
        message.word(IFLA_LINK, below).signed(IFLA_NET_NS_FD, spaces.fd(id).ok_or(Error::Gone)?);
        fill(&mut message);
        return spaces.host.change(message);
    }
    match entry.peer_ifindex.filter(|i| entry.peer_nsid == Some(id) && *i != entry.ifindex) {
        Some(below) => {
            message.word(IFLA_LINK, below);
            fill(&mut message);
            netlink.change(message)
        }
        None => Err(Error::Usage {
            what: format!("a macvlan parent for {name} is required: name it with --external macvlan[{name}]:LINK"),
        }),
    }
}

/// The number of the link that this one lies upon in the same namespace.
pub fn needs(link: &Planned, id: u32, opts: &Options) -> Option<u32> {
    let own = &link.entry;
    let outside = || opts.external_of_kind("macvlan").any(|e| e.key == format!("macvlan[{}]", link.name));
    let is_here = link.kind == NdType::Macvlan && own.peer_nsid == Some(id) && !outside();
    own.peer_ifindex.filter(|i| is_here && *i != own.ifindex)
}

/// Gives a link that was made its settings and its bridge. Two come in [`settle`]: `accept_dad`, which is off until then, and
/// IPv6's `mtu`, which begins anew when a link comes up.
pub fn configure(link: &Planned, netns: &NetnsEntry, netlink: &mut Netlink, weak: bool) -> Result<()> {
    let (entry, name) = (&link.entry, &link.name);
    // the loopback link is older than what `default` says
    let is_new = link.kind != NdType::Loopback;
    let default = |conf: &'_ [SysctlEntry]| is_new.then(|| conf.to_vec());
    if entry.conf4.is_empty() && !entry.conf.is_empty() {
        let old = default(&sysctl::from_old(&netns.def_conf));
        sysctl::write(&sysctl::folder("ipv4", name), &IPV4, &sysctl::from_old(&entry.conf), old.as_deref(), weak)?;
    } else {
        let default = default(&netns.def_conf4);
        sysctl::write(&sysctl::folder("ipv4", name), &IPV4, &entry.conf4, default.as_deref(), weak)?;
    }
    let folder = sysctl::folder("ipv6", name);
    let default = default(&netns.def_conf6);
    for (key, value) in sysctl::planned(&IPV6, &entry.conf6, default.as_deref())? {
        if !["accept_dad", sysctl::MTU].contains(&key) {
            sysctl::write_one(&folder, key, &value, weak)?;
        }
    }
    sysctl::write_one(&folder, "accept_dad", b"0", true)?;
    if let Some(master) = entry.master {
        let mut message = Message::new(SETLINK, 0, &body(entry.ifindex, 0, 0));
        message.word(IFLA_MASTER, master);
        netlink.change(message).at(Place::Step("putting a link into its bridge"))?;
    }
    Ok(())
}

/// Gives a link its flags: it comes up, if it was up.
pub fn raise(link: &Planned, netlink: &mut Netlink) -> Result<()> {
    let index = if matches!(link.kind, NdType::Loopback | NdType::Extlink) { 0 } else { link.entry.ifindex };
    let mut message = Message::new(SETLINK, 0, &body(index, link.entry.flags & SETTABLE, SETTABLE));
    if index == 0 {
        message.text(IFLA_IFNAME, &link.name);
    }
    netlink.change(message)
}

/// Sets what [`configure`] did not, when addresses are there.
pub fn settle(link: &Planned, default: &[SysctlEntry], weak: bool) -> Result<()> {
    let own = sysctl::planned(&IPV6, &link.entry.conf6, None)?;
    if let Some((key, value)) = own.iter().find(|(key, _)| *key == sysctl::MTU) {
        sysctl::write_one(&sysctl::folder("ipv6", &link.name), key, value, weak)?;
    }
    let value = own.into_iter().find(|(key, _)| *key == "accept_dad").map(|(_, value)| value);
    let of_default = || sysctl::planned(&IPV6, default, None).ok()?.into_iter().find(|(k, _)| *k == "accept_dad");
    match value.or_else(|| of_default().map(|(_, value)| value)) {
        Some(value) => sysctl::write_one(&sysctl::folder("ipv6", &link.name), "accept_dad", &value, weak),
        None => Ok(()),
    }
}

/// Puts the outer ends of veth links into bridges of ours (`--external veth[NAME]:OUTER@BRIDGE`), and up.
pub fn join_bridges(host: &mut Netlink, opts: &Options) -> Result<()> {
    for external in opts.external_of_kind("veth") {
        let Some((outer, bridge)) = external.value.as_deref().and_then(|v| v.split_once('@')) else { continue };
        let (index, master) = (index_of(host, outer)?, index_of(host, bridge)?);
        let mut message = Message::new(SETLINK, 0, &body(index, IFF_UP, IFF_UP));
        message.word(IFLA_MASTER, master);
        host.change(message).at(Place::Step("putting a link into a bridge"))?;
    }
    Ok(())
}
