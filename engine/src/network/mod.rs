//! What is in a network namespace: settings, links, addresses, routes, rules, the firewall, tracked connections.
//!
//! The kernel says and takes all of it by netlink and in /proc/sys/net, each for the namespace that the calling thread is in. So
//! the work is done in threads of our own that enter it ([`inside`]) and end there. Sockets are files, and elsewhere
//! (`sockets/`); they are made in the namespace when it is whole.
//!
//! Image of the namespace as such: `netns-N.img` ([`NetnsEntry`]): settings of `all` and `default`, numbers that other
//! namespaces have here, or, of a namespace that the tree did not bring but was put into (`--external net[INODE]:KEY`), only
//! its key. The files below write the others. Of an empty one (`--empty-ns net`), whose content others make, only tracked
//! connections are carried.
//!
//! Order of a restore: settings of the whole, numbers of others, links (in rounds: a bridge before its ports, a link before
//! the macvlan on it), their settings, up, addresses, routes, rules, firewall, connections. Before links come up, the
//! namespace is locked if connections are to come back: a packet that comes before its socket is there would be answered by a
//! reset. The lock goes when they go on (`sockets/netlock.rs`).
//!
//! Man pages: network_namespaces(7), rtnetlink(7).

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sched::{setns, unshare, CloneFlags};
use rustix::fs::{Mode, OFlags};
use standstill_images::proto::{NetDeviceEntry, NetnsEntry, NetnsId};
use standstill_images::{ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::files::tun;
use crate::options::{NamespaceKind, Options};
use crate::sys::netlink::{self, Message, Netlink, HEADER};
use crate::sys::{calls, thread};

pub mod doors;
pub mod firewall;
pub mod links;
pub mod payload;
pub mod sysctl;
#[cfg(test)]
mod tests;

use links::{Planned, Spaces};

const NEWNSID: u16 = 88;
const GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const NSID_BODY: [u8; 4] = [0; 4];

/// How long IPv6 addresses may take to be usable.
const READY: Duration = Duration::from_secs(5);

/// Is a task in the network namespace that we are in?
pub fn is_ours(pid: i32) -> Result<bool> {
    Ok(inode(of_task(pid).task(pid)?.as_fd())? == inode(own()?.as_fd())?)
}

/// Does something in this thread, in a network namespace: what it starts is born there.
pub fn born_in<T>(namespace: Option<BorrowedFd<'_>>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(namespace) = namespace else { return work() };
    let own = own()?;
    setns(namespace, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
    let result = work();
    setns(&own, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
    result
}

/// Does something in a network namespace, in a thread that is never anywhere else again.
pub fn inside<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::apart(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
        work()
    })
}

/// The network namespace of the calling thread.
pub fn own() -> Result<OwnedFd> {
    open("/proc/thread-self/ns/net")
}

/// The network namespace of a task.
pub fn of_task(pid: i32) -> Result<OwnedFd> {
    open(&format!("/proc/{pid}/ns/net"))
}

fn open(path: &str) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).call("open").at(Place::Path(path.into()))
}

/// A new network namespace.
pub fn create() -> Result<OwnedFd> {
    thread::apart(|| {
        unshare(CloneFlags::CLONE_NEWNET).call("unshare(CLONE_NEWNET)")?;
        own()
    })
}

/// Its inode, by which options name it.
pub fn inode(namespace: BorrowedFd<'_>) -> Result<u64> {
    Ok(rustix::fs::fstat(namespace).call("fstat")?.st_ino)
}

/// The key that stands for a namespace from outside (`--external net[INODE]:KEY`), if it is one.
pub fn external_key(opts: &Options, inode: u64) -> Option<&str> {
    let wanted = format!("net[{inode}]");
    opts.external_of_kind("net").find(|e| e.key == wanted).and_then(|e| e.value.as_deref())
}

/// Writes the images of all network namespaces of a tree.
pub fn dump_all(images: &Images, opts: &Options, doors: &doors::Doors, tuns: &tun::Dumped) -> Result<()> {
    let all = doors.of_tree();
    all.iter().try_for_each(|(id, _)| dump(images, opts, *id, &all, tuns))
}

/// Writes the images of a namespace of the tree. `others`: all namespaces of the tree, this one too, by their ids.
pub fn dump(
    images: &Images,
    opts: &Options,
    id: u32,
    others: &[(u32, BorrowedFd<'_>)],
    tuns: &tun::Dumped,
) -> Result<()> {
    let namespace = others.iter().find(|(n, _)| *n == id).ok_or(Error::Gone)?.1;
    let key = external_key(opts, inode(namespace)?);
    inside(namespace, || match key {
        Some(key) => {
            let entry = NetnsEntry { ext_key: Some(key.as_bytes().to_vec()), ..Default::default() };
            Ok(images.write_one(ImageKind::Netns, id, &entry)?)
        }
        None => dump_here(images, opts, id, others, tuns),
    })
    .at(Place::Item("network namespace", id.into()))
}

fn dump_here(
    images: &Images,
    opts: &Options,
    id: u32,
    others: &[(u32, BorrowedFd<'_>)],
    tuns: &tun::Dumped,
) -> Result<()> {
    if opts.empty_ns.net {
        if others.len() > 1 {
            return Err(Error::Usage { what: "Unable to dump more than one netns if the --emptyns is set".into() });
        }
        return firewall::dump_tracked(images, id);
    }
    let mut netlink = Netlink::open(netlink::ROUTE)?;
    links::give_numbers(&mut netlink)?;
    let known = numbers(&mut netlink, others)?;
    let links = links::dump(&mut netlink, id, &known, tuns)?;
    images.write_entries(ImageKind::Netdev, id, links)?;
    payload::dump(&mut netlink, images, id)?;
    firewall::dump_rules(images, id, opts.personality)?;
    images.write_one(ImageKind::Netns, id, &conf(&known)?)?;
    firewall::dump_tracked(images, id)
}

/// Numbers that namespaces have in the one that we are in, with their ids.
fn numbers(netlink: &mut Netlink, others: &[(u32, BorrowedFd<'_>)]) -> Result<Vec<(i32, u32)>> {
    use std::os::fd::AsRawFd;
    let mut all = Vec::new();
    for (id, fd) in others {
        let mut message = Message::new(GETNSID, 0, &NSID_BODY);
        message.signed(NETNSA_FD, fd.as_raw_fd());
        let answer = netlink.get(message)?.ok_or(Error::Gone)?;
        let attributes = netlink::attributes(answer.get(HEADER + 4..).unwrap_or_default());
        let number = netlink::find(&attributes, NETNSA_NSID).and_then(|v| netlink::word(v, 0)).map(u32::cast_signed);
        // -1: it has none
        all.extend(number.filter(|n| *n >= 0).map(|n| (n, *id)));
    }
    Ok(all)
}

/// The settings of the namespace that we are in.
fn conf(known: &[(i32, u32)]) -> Result<NetnsEntry> {
    use sysctl::{folder, read, IPV4, IPV6, OF_IPV4, UNIX};
    let mut of_ipv4 = read("net/ipv4", &OF_IPV4)?;
    for entry in &mut of_ipv4 {
        // nobody may: so it is in every new one
        let text = entry.sarg.as_deref().and_then(|t| std::str::from_utf8(t).ok()).unwrap_or_default();
        if text.split_whitespace().eq(["1", "0"]) {
            entry.sarg = None;
        }
    }
    Ok(NetnsEntry {
        def_conf4: read(&folder("ipv4", "default"), &IPV4)?,
        all_conf4: read(&folder("ipv4", "all"), &IPV4)?,
        def_conf6: read(&folder("ipv6", "default"), &IPV6)?,
        all_conf6: read(&folder("ipv6", "all"), &IPV6)?,
        nsids: known.iter().map(|&(number, id)| NetnsId { target_ns_id: id, netnsid_value: number }).collect(),
        unix_conf: read("net/unix", &UNIX)?,
        ipv4_sysctl: of_ipv4,
        ..Default::default()
    })
}

/// What the images say of one namespace.
#[derive(Debug)]
struct Space {
    id: u32,
    netns: NetnsEntry,
    links: Vec<NetDeviceEntry>,
    payload: payload::Payload,
    firewall: firewall::Saved,
}

impl Space {
    fn read(images: &Images, opts: &Options, id: u32) -> Result<Space> {
        let netns: NetnsEntry = images.read_one_if_there(ImageKind::Netns, id)?.unwrap_or_default();
        let is_ours = netns.ext_key.is_none() && !opts.empty_ns.net;
        let links = if is_ours { images.read_entries_if_there(ImageKind::Netdev, id)? } else { Vec::new() };
        let payload = if is_ours { payload::Payload::read(images, id)? } else { payload::Payload::default() };
        let mut firewall = firewall::Saved::read(images, id)?;
        if !is_ours {
            firewall = firewall.only_tracked(netns.ext_key.is_none());
        }
        Ok(Space { id, netns, links, payload, firewall })
    }
}

/// All network namespaces of a restore.
#[derive(Debug, Default)]
pub struct Networks {
    spaces: Vec<Space>,
    planned: Vec<(u32, Planned)>,
    /// The links, in the order in which they were made.
    order: Vec<usize>,
    fds: HashMap<u32, OwnedFd>,
    joined: bool,
}

impl Networks {
    /// Reads and checks the images of namespaces, by their ids. With `--join-ns net:` the root's, which comes first, is one
    /// that is there, and nothing is put into it.
    pub fn read(images: &Images, opts: &Options, ids: &[u32], joined: bool) -> Result<Networks> {
        let mut networks = Networks { joined, ..Networks::default() };
        for &id in ids {
            let space = Space::read(images, opts, id).at(Place::Item("network namespace", id.into()))?;
            for link in &space.links {
                networks.planned.push((id, Planned::new(link.clone())?));
            }
            networks.spaces.push(space);
        }
        if networks.joined {
            networks.planned.clear();
        }
        Ok(networks)
    }

    /// The namespace from outside that stands for an id: what `--join-ns net:` names for the root's, or, for one that was
    /// outside before, what `--inherit-fd fd[N]:KEY` does.
    pub fn outside(&self, id: u32, opts: &Options) -> Result<Option<OwnedFd>> {
        let Some(space) = self.spaces.iter().find(|s| s.id == id) else { return Ok(None) };
        let is_first = self.spaces.first().is_some_and(|first| first.id == id);
        if let Some(join) = opts.join_ns.iter().find(|j| j.kind == NamespaceKind::Net && is_first && self.joined) {
            let path = &join.path;
            let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
            return file.call("open").at(Place::Path(path.clone())).map(Some);
        }
        let Some(key) = &space.netns.ext_key else { return Ok(None) };
        let key = String::from_utf8_lossy(key);
        let number = opts.inherited_fd(&key).ok_or_else(|| Error::Usage {
            what: format!("Unable to find an external netns: {key}; say which with --inherit-fd fd[N]:{key}"),
        })?;
        calls::dup_number(number).map(Some)
    }

    /// Says which namespace stands for an id.
    pub fn set(&mut self, id: u32, namespace: OwnedFd) {
        self.fds.insert(id, namespace);
    }

    /// The namespace for an id.
    pub fn get(&self, id: u32) -> Option<BorrowedFd<'_>> {
        self.fds.get(&id).map(AsFd::as_fd)
    }

    /// The ids, the root's first.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.spaces.iter().map(|s| s.id)
    }

    fn enter(&self, id: u32) -> Result<()> {
        let fd = self.get(id).ok_or(Error::Gone)?;
        setns(fd, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")
    }

    /// Makes settings and links. `lock` locks a namespace, before links come up.
    pub fn prepare(&mut self, opts: &Options, lock: &(dyn Fn() -> Result<()> + Sync)) -> Result<()> {
        if self.joined {
            return Ok(());
        }
        let host = own()?;
        let mut planned = std::mem::take(&mut self.planned);
        let work = || -> Result<Vec<usize>> {
            let mut host_netlink = Netlink::open(netlink::ROUTE)?;
            let mut sockets = HashMap::new();
            for space in &self.spaces {
                self.enter(space.id)?;
                let mut netlink = Netlink::open(netlink::ROUTE)?;
                if space.netns.ext_key.is_none() {
                    if !opts.empty_ns.net {
                        self.restore_conf(space, &mut netlink, opts)
                            .at(Place::Item("network namespace", space.id.into()))?;
                    }
                    lock()?;
                }
                sockets.insert(space.id, netlink);
            }
            let all: Vec<_> = self.fds.iter().map(|(id, fd)| (*id, fd.as_fd())).collect();
            let mut spaces = Spaces { all: &all, host: &mut host_netlink, host_fd: host.as_fd(), opts };
            let order = self.make_links(&mut planned, &mut sockets, &mut spaces)?;
            setns(&host, CloneFlags::CLONE_NEWNET).call("setns(CLONE_NEWNET)")?;
            links::join_bridges(&mut host_netlink, opts)?;
            Ok(order)
        };
        self.order = thread::apart(work)?;
        self.planned = planned;
        Ok(())
    }

    fn make_links(
        &self,
        planned: &mut [(u32, Planned)],
        sockets: &mut HashMap<u32, Netlink>,
        spaces: &mut Spaces<'_>,
    ) -> Result<Vec<usize>> {
        let mut order = Vec::new();
        loop {
            let before = order.len();
            for i in 0..planned.len() {
                if order.contains(&i) {
                    continue;
                }
                let (id, link) = &planned[i];
                let id = *id;
                let mut needed = link.master().into_iter().chain(links::needs(link, id, spaces.opts));
                let is_made = |index| planned.iter().any(|(n, l)| *n == id && l.index() == index && l.is_made());
                if !needed.all(is_made) {
                    continue;
                }
                order.push(i);
                if link.is_made() {
                    continue;
                }
                let (head, tail) = planned.split_at_mut(i);
                let Some(((_, link), tail)) = tail.split_first_mut() else { continue };
                let mut others: Vec<(u32, &mut Planned)> =
                    head.iter_mut().chain(tail).map(|(n, link)| (*n, link)).collect();
                self.enter(id)?;
                let netlink = sockets.get_mut(&id).ok_or(Error::Gone)?;
                links::make(link, id, netlink, &mut others, spaces).at(Place::Network(link.name().to_owned()))?;
            }
            if order.len() == planned.len() {
                break;
            }
            if order.len() == before {
                return Err(Error::lie("netdev", "links that need each other, or one that is not there"));
            }
        }
        for &i in &order {
            let (id, link) = &planned[i];
            let space = self.spaces.iter().find(|s| s.id == *id).ok_or(Error::Gone)?;
            self.enter(*id)?;
            let netlink = sockets.get_mut(id).ok_or(Error::Gone)?;
            links::configure(link, &space.netns, netlink, spaces.opts.weak_sysctls)
                .at(Place::Network(link.name().to_owned()))?;
        }
        for &i in &order {
            let (id, link) = &planned[i];
            let netlink = sockets.get_mut(id).ok_or(Error::Gone)?;
            links::raise(link, netlink).at(Place::Network(link.name().to_owned()))?;
        }
        Ok(order)
    }

    fn restore_conf(&self, space: &Space, netlink: &mut Netlink, opts: &Options) -> Result<()> {
        use std::os::fd::AsRawFd;
        use sysctl::{folder, from_old, write, IPV4, IPV6, OF_IPV4, UNIX};
        let (e, weak) = (&space.netns, opts.weak_sysctls);
        let four = |new: &[_], old: &[i32]| if new.is_empty() { from_old(old) } else { new.to_vec() };
        write(&folder("ipv4", "all"), &IPV4, &four(&e.all_conf4, &e.all_conf), None, weak)?;
        write(&folder("ipv4", "default"), &IPV4, &four(&e.def_conf4, &e.def_conf), None, weak)?;
        for (key, value) in sysctl::planned(&IPV6, &e.all_conf6, None)? {
            // off until addresses are there
            if key != "accept_dad" {
                sysctl::write_one(&folder("ipv6", "all"), key, &value, weak)?;
            }
        }
        write(&folder("ipv6", "default"), &IPV6, &e.def_conf6, None, weak)?;
        write("net/unix", &UNIX, &e.unix_conf, None, weak)?;
        write("net/ipv4", &OF_IPV4, &e.ipv4_sysctl, None, weak)?;
        for other in &e.nsids {
            let target = self.get(other.target_ns_id).ok_or_else(|| {
                Error::lie("netns", format!("a number for the network namespace {}", other.target_ns_id))
            })?;
            let mut message = Message::new(NEWNSID, 0, &NSID_BODY);
            message.signed(NETNSA_FD, target.as_raw_fd()).signed(NETNSA_NSID, other.netnsid_value);
            netlink.change(message).at(Place::Step("the number of a network namespace"))?;
        }
        Ok(())
    }

    /// Puts addresses, routes, rules, the firewall and connections into them.
    /// `lock` locks a namespace again, as rules that come back may have lifted that.
    pub fn fill(&self, opts: &Options, lock: &(dyn Fn() -> Result<()> + Sync)) -> Result<()> {
        if self.joined {
            return Ok(());
        }
        for space in &self.spaces {
            let fd = self.get(space.id).ok_or(Error::Gone)?;
            inside(fd, || self.fill_here(space, opts, lock)).at(Place::Item("network namespace", space.id.into()))?;
        }
        Ok(())
    }

    fn fill_here(&self, space: &Space, opts: &Options, lock: &(dyn Fn() -> Result<()> + Sync)) -> Result<()> {
        let mut netlink = Netlink::open(netlink::ROUTE)?;
        space.payload.restore(&mut netlink)?;
        if space.firewall.restore_rules()? {
            lock()?;
        }
        space.firewall.restore_tracked()?;
        if space.netns.ext_key.is_some() || opts.empty_ns.net {
            return Ok(());
        }
        let started = Instant::now();
        while payload::unready(&mut netlink)? > 0 {
            if started.elapsed() > READY {
                tracing::warn!("an IPv6 address is not ready after {} s", READY.as_secs());
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if !space.links.is_empty() {
            space.payload.remove_others(&mut netlink)?;
        }
        for &i in &self.order {
            let Some((id, link)) = self.planned.get(i) else { continue };
            if *id == space.id {
                links::settle(link, &space.netns.def_conf6, opts.weak_sysctls)?;
            }
        }
        space.payload.ask_for_unready(&mut netlink)?;
        for (key, value) in sysctl::planned(&sysctl::IPV6, &space.netns.all_conf6, None)? {
            if key == "accept_dad" {
                sysctl::write_one(&sysctl::folder("ipv6", "all"), key, &value, opts.weak_sysctls)?;
            }
        }
        Ok(())
    }
}
