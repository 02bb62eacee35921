//! Tables of nftables by netlink: one kind of table, that drops the packets of TCP connections in its sets.
//!
//! Messages come in batches, which the kernel takes as a whole or not at all. Numbers in attributes are in network order,
//! but for what is compared with data of the kernel.
//!
//! The table, as `nft list ruleset` shows it:
//!
//! ```text
//! table inet NAME {
//!     set conns4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; }
//!     set conns6 { type ipv6_addr . inet_service . ipv6_addr . inet_service; }
//!     chain output {
//!         type filter hook output priority filter; policy accept;
//!         meta mark 0x0000c114 accept
//!         ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop
//!         ip6 saddr . tcp sport . ip6 daddr . tcp dport @conns6 drop
//!     }
//!     chain input { … the same … }
//! }
//! ```
//!
//! Man pages: netlink(7), nft(8). Headers: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvFlags, SendFlags};

use crate::error::{Call, Error, Result};

const NETLINK_NETFILTER: i32 = 12;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NFPROTO_INET: u8 = 1;
const NESTED: u16 = 0x8000;
const LIST_ELEM: u16 = 1;
const HEADER: usize = 16;

/// Packets with this mark pass.
pub const MARK: u32 = 0xc114;

/// Who hears from the kernel how long a message may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// Messages that the kernel takes together.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    next: u32,
}

impl Batch {
    fn new() -> Batch {
        let mut batch = Batch { bytes: Vec::new(), next: 1 };
        batch.frame(BATCH_BEGIN, 0, 0, NFNL_SUBSYS_NFTABLES, |_| {});
        batch
    }

    fn frame(&mut self, kind: u16, flags: u16, family: u8, resource: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        let at = self.bytes.len();
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend(self.next.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.next += 1;
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        body(&mut Attributes(&mut self.bytes));
        let len = u32::try_from(self.bytes.len() - at).unwrap_or(u32::MAX);
        self.bytes[at..at + 4].copy_from_slice(&len.to_ne_bytes());
    }

    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Attributes<'_>)) {
        self.frame(NFNL_SUBSYS_NFTABLES << 8 | kind, flags | NLM_F_ACK, NFPROTO_INET, 0, body);
    }

    fn end(mut self) -> Batch {
        self.frame(BATCH_END, 0, 0, NFNL_SUBSYS_NFTABLES, |_| {});
        self
    }

    /// As it is sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many answers come if all goes well.
    fn answers(&self) -> usize {
        usize::try_from(self.next).unwrap_or(usize::MAX).saturating_sub(3)
    }
}

/// Attributes of a message, or of another attribute.
struct Attributes<'b>(&'b mut Vec<u8>);

impl Attributes<'_> {
    fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn nested(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) -> &mut Self {
        let at = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        inner(&mut Attributes(self.0));
        let len = u16::try_from(self.0.len() - at).unwrap_or(u16::MAX);
        self.0[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// An expression of a rule.
    fn expression(&mut self, name: &str, inner: impl FnOnce(&mut Attributes<'_>)) -> &mut Self {
        self.nested(LIST_ELEM, |e| {
            e.string(1, name).nested(2, inner);
        })
    }

    /// Loads what the kernel knows of a packet into the first register, and compares.
    fn is(&mut self, key: u32, value: &[u8]) -> &mut Self {
        self.expression("meta", |e| {
            e.number(1, 1).number(2, key);
        });
        self.expression("cmp", |e| {
            e.number(1, 1).number(2, 0).nested(3, |d| {
                d.bytes(1, value);
            });
        })
    }

    /// Loads a part of a packet into a register.
    fn payload(&mut self, register: u32, base: u32, offset: u32, len: u32) -> &mut Self {
        self.expression("payload", |e| {
            e.number(1, register).number(2, base).number(3, offset).number(4, len);
        })
    }

    fn verdict(&mut self, code: u32) -> &mut Self {
        self.expression("immediate", |e| {
            e.number(1, 0).nested(2, |d| {
                d.nested(2, |v| {
                    v.number(1, code);
                });
            });
        })
    }
}

const SETS: [(&str, u32); 2] = [("conns4", 4), ("conns6", 16)];

const HOOKS: [(&str, u32); 2] = [("output", 3), ("input", 1)];
const ACCEPT: u32 = 1;
const DROP: u32 = 0;
const META_MARK: u32 = 3;

impl Batch {
    /// A chain that sees packets at a hook, and lets marked ones pass.
    fn chain(&mut self, table: &str, (chain, hook): (&str, u32), policy: u32) {
        self.message(NEWCHAIN, NLM_F_CREATE, |a| {
            a.string(1, table).string(3, chain);
            a.nested(4, |h| {
                h.number(1, hook).number(2, 0);
            });
            a.number(5, policy).string(7, "filter");
        });
        self.rule(table, chain, &|e| {
            e.is(META_MARK, &MARK.to_ne_bytes()).verdict(ACCEPT);
        });
    }

    fn rule(&mut self, table: &str, chain: &str, expressions: &dyn Fn(&mut Attributes<'_>)) {
        self.message(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |a| {
            a.string(1, table).string(2, chain).nested(4, |e| expressions(e));
        });
    }

    fn table(&mut self, table: &str, flags: u16) {
        self.message(NEWTABLE, NLM_F_CREATE | flags, |a| {
            a.string(1, table).number(2, 0);
        });
    }
}

/// Makes a table that drops every packet without our mark; an error if there is one of that name.
pub fn create_for_all(table: &str) -> Batch {
    let mut batch = Batch::new();
    batch.table(table, NLM_F_EXCL);
    for chain in HOOKS {
        batch.chain(table, chain, DROP);
    }
    batch.end()
}

/// Makes the table, with nothing in its sets.
pub fn create(table: &str) -> Batch {
    const NFPROTO: u32 = 15;
    const L4PROTO: u32 = 16;
    // types of a set's key as nft(8) writes them: six bits each
    const SERVICE: u32 = 13;
    let concatenated = |address: u32| ((address << 6 | SERVICE) << 6 | address) << 6 | SERVICE;
    let mut batch = Batch::new();
    batch.table(table, 0);
    for (n, (set, address)) in (1..).zip(SETS) {
        let kind = concatenated(if address == 4 { 7 } else { 8 });
        batch.message(NEWSET, NLM_F_CREATE, |a| {
            a.string(1, table).string(2, set).number(3, 0).number(4, kind).number(5, 2 * (address + 4)).number(10, n);
        });
    }
    for hook in HOOKS {
        batch.chain(table, hook, ACCEPT);
        for (set, len) in SETS {
            let (family, source) = if len == 4 { (libc::NFPROTO_IPV4, 12) } else { (libc::NFPROTO_IPV6, 8) };
            let words = len / 4;
            // registers of four bytes, one after the other
            let first = 8;
            batch.rule(table, hook.0, &|e| {
                e.is(NFPROTO, &[family as u8]).is(L4PROTO, &[libc::IPPROTO_TCP as u8]);
                e.payload(first, 1, source, len).payload(first + words, 2, 0, 2);
                e.payload(first + words + 1, 1, source + len, len).payload(first + 2 * words + 1, 2, 2, 2);
                e.expression("lookup", |l| {
                    l.string(1, set).number(2, first);
                });
                e.verdict(DROP);
            });
        }
    }
    batch.end()
}

/// Adds connections, both ways each.
pub fn add(table: &str, connections: &[(SocketAddr, SocketAddr)]) -> Batch {
    let mut batch = Batch::new();
    let key = |from: SocketAddr, to: SocketAddr| {
        let mut key = Vec::with_capacity(40);
        for end in [from, to] {
            match end.ip().to_canonical() {
                IpAddr::V4(ip) => key.extend(ip.octets()),
                IpAddr::V6(ip) => key.extend(ip.octets()),
            }
            key.extend(end.port().to_be_bytes());
            key.extend([0; 2]);
        }
        key
    };
    for &(a, b) in connections {
        let (set, _) = SETS[usize::from(a.ip().to_canonical().is_ipv6())];
        batch.message(NEWSETELEM, NLM_F_CREATE, |m| {
            m.string(1, table).string(2, set).nested(3, |list| {
                for (from, to) in [(a, b), (b, a)] {
                    list.nested(LIST_ELEM, |element| {
                        element.nested(1, |value| {
                            value.bytes(1, &key(from, to));
                        });
                    });
                }
            });
        });
    }
    batch.end()
}

/// Removes the table.
pub fn delete(table: &str) -> Batch {
    let mut batch = Batch::new();
    batch.message(DELTABLE, 0, |a| {
        a.string(1, table);
    });
    batch.end()
}

/// A way to the kernel.
#[derive(Debug)]
pub struct Nftables {
    socket: OwnedFd,
}

impl Nftables {
    /// Of the network that this thread is in.
    pub fn open() -> Result<Nftables> {
        use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};
        let protocol = std::num::NonZeroU32::new(NETLINK_NETFILTER as u32).map(Protocol::from_raw);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
            .call("socket(NETLINK_NETFILTER)")?;
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(PATIENCE))
            .call("setsockopt(SO_RCVTIMEO)")?;
        let kernel = rustix::net::netlink::SocketAddrNetlink::new(0, 0);
        rustix::net::connect(&socket, &kernel).call("connect(AF_NETLINK)")?;
        Ok(Nftables { socket })
    }

    /// The socket, which is connected to the kernel.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a batch, and waits for what comes of it.
    pub fn run(&self, batch: &Batch) -> Result<()> {
        rustix::net::send(&self.socket, batch.bytes(), SendFlags::NOSIGNAL).call("send(AF_NETLINK)")?;
        let mut buffer = vec![0; 64 << 10];
        let mut answers = 0;
        let mut failed = 0;
        while answers < batch.answers() {
            let len = match rustix::net::recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.call("recv(AF_NETLINK)")?.0,
            };
            for error in errors(buffer.get(..len).unwrap_or_default()) {
                answers += 1;
                if failed == 0 {
                    failed = error;
                }
            }
            // one that fails may end the batch, and not all have answers then
            if failed != 0 {
                break;
            }
        }
        match failed {
            0 => Ok(()),
            error => {
                Err(Error::Sys { call: "nftables", source: std::io::Error::from_raw_os_error(error.saturating_neg()) })
            }
        }
    }
}

/// The numbers of all answers in a datagram, 0 for what went well.
pub fn errors(datagram: &[u8]) -> Vec<i32> {
    let mut all = Vec::new();
    let mut rest = datagram;
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    while let (Some(len), Some(kind)) = (word(rest, 0).map(u32::from_ne_bytes), rest.get(4..6)) {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len < HEADER || len > rest.len() {
            break;
        }
        if kind == NLMSG_ERROR.to_ne_bytes() {
            if let Some(error) = word(rest, HEADER).filter(|_| len >= HEADER + 4) {
                all.push(i32::from_ne_bytes(error));
            }
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn answers_are_read_and_broken_ones_end_the_list() {
        let answer = |error: i32| {
            let mut bytes = Vec::new();
            bytes.extend(36u32.to_ne_bytes());
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(error.to_ne_bytes());
            bytes.resize(36, 0);
            bytes
        };
        let two = [answer(0), answer(-2)].concat();
        assert_eq!(errors(&two), [0, -2]);
        assert_eq!(errors(&two[..70]), [0]);
        assert_eq!(errors(&[255; 64]), [] as [i32; 0]);
        assert_eq!(errors(&[0; 64]), [] as [i32; 0]);
    }

    #[test]
    fn a_table_is_made_filled_and_removed() {
        std::thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                return;
            }
            let nftables = Nftables::open().unwrap();
            match nftables.run(&create("standstill-test")) {
                Err(e) if [libc::EOPNOTSUPP, libc::EPROTONOSUPPORT].contains(&e.errno()) => return,
                other => other.unwrap(),
            }
            let v4 = ("127.0.0.1:80".parse().unwrap(), "127.0.0.1:4000".parse().unwrap());
            let v6 = ("[::1]:80".parse().unwrap(), "[::1]:4000".parse().unwrap());
            nftables.run(&add("standstill-test", &[v4, v6, v4])).unwrap();
            nftables.run(&delete("standstill-test")).unwrap();
            assert_eq!(nftables.run(&delete("standstill-test")).unwrap_err().errno(), libc::ENOENT);
        })
        .join()
        .unwrap();
    }
}
