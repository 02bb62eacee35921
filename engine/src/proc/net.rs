//! `/proc/net/unix`, `/proc/net/netlink`, `/proc/net/packet`: sockets where the kernel lacks the diag modules;
//! `/proc/net/icmp`: ping sockets, for which it has none; `/proc/net/igmp`, `/proc/net/igmp6`: multicast groups.
//!
//! `sys/diag.rs` says more and says it exactly; these are the second choice. In `unix`, NUL bytes of an abstract name are
//! printed as `@` and newlines are not escaped: [`parse_unix`] takes a line that is no socket for the rest of the name
//! before it. Addresses of kernel objects are hidden from most readers and not kept.
//!
//! Man pages: unix(7), netlink(7), packet(7).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{uint, Lines, ParseError, Words};

/// A unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// References.
    pub ref_count: u32,
    /// It listens (`__SO_ACCEPTCON`).
    pub listening: bool,
    /// SOCK_STREAM and so on.
    pub socket_type: u32,
    /// SS_ state: 1 unconnected, 3 connected.
    pub state: u32,
    /// Inode; 0 for one that was not accepted yet.
    pub inode: u64,
    /// Name as printed.
    pub name: Option<Vec<u8>>,
}

/// A netlink socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetlinkSocket {
    /// NETLINK_ROUTE and so on.
    pub protocol: u32,
    /// Its own address; 0 for the kernel's or an unbound one.
    pub port: u32,
    /// The first 32 groups.
    pub groups: u32,
    /// A dump is under way.
    pub dumping: bool,
    /// Dropped messages.
    pub drops: u32,
    /// Inode.
    pub inode: u64,
}

/// A packet socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketSocket {
    /// SOCK_RAW, SOCK_DGRAM, SOCK_PACKET.
    pub socket_type: u32,
    /// Ethernet protocol.
    pub protocol: u16,
    /// Interface, or 0.
    pub interface: u32,
    /// It receives.
    pub running: bool,
    /// Memory in its receive queue.
    pub receive_memory: u32,
    /// User who made it.
    pub uid: u32,
    /// Inode.
    pub inode: u64,
}

/// Reads `/proc/net/unix`.
///
/// # Errors
/// If the head line is missing, or the first line behind it is no socket.
pub fn parse_unix(text: &[u8]) -> Result<Vec<UnixSocket>, ParseError> {
    let mut lines = Lines::new("/proc/net/unix", text);
    lines.next().filter(|(_, line)| line.starts_with(b"Num ")).ok_or_else(|| lines.place().missing("the head line"))?;
    let mut sockets: Vec<UnixSocket> = Vec::new();
    for (at, line) in lines {
        if let Some(socket) = unix_line(line) {
            sockets.push(socket);
            continue;
        }
        let before =
            sockets.last_mut().and_then(|socket| socket.name.as_mut()).ok_or_else(|| at.malformed("a socket"))?;
        before.push(b'\n');
        before.extend_from_slice(line);
    }
    Ok(sockets)
}

/// `00000000dcc0595f: 00000003 00000000 00000000 0001 03  1206 @name`.
fn unix_line(line: &[u8]) -> Option<UnixSocket> {
    let mut words = Words::new(line);
    let address = words.next()?.strip_suffix(b":")?;
    uint(address, 16).filter(|_| address.len() >= 8)?;
    let mut hex = |length: usize| {
        let word = words.next().filter(|word| word.len() == length)?;
        u32::try_from(uint(word, 16)?).ok()
    };
    let (ref_count, _protocol, flags) = (hex(8)?, hex(8)?, hex(8)?);
    let (socket_type, state) = (hex(4)?, hex(2)?);
    let inode = uint(words.next()?, 10)?;
    let name = words.exact_rest().strip_prefix(b" ").map(<[u8]>::to_vec);
    Some(UnixSocket { ref_count, listening: flags & 0x1_0000 != 0, socket_type, state, inode, name })
}

/// Reads `/proc/net/netlink`.
///
/// # Errors
/// At the first line that is no socket.
pub fn parse_netlink(text: &[u8]) -> Result<Vec<NetlinkSocket>, ParseError> {
    let mut lines = Lines::new("/proc/net/netlink", text);
    lines.next().filter(|(_, line)| line.starts_with(b"sk ")).ok_or_else(|| lines.place().missing("the head line"))?;
    lines
        .map(|(at, line)| {
            let mut words = Words::new(line);
            at.word(&mut words, "sk")?;
            let protocol = at.next_uint(&mut words, 10, "Eth")?;
            let port = at.next_uint(&mut words, 10, "Pid")?;
            let groups = at.next_uint(&mut words, 16, "Groups")?;
            at.next_int::<i64>(&mut words, "Rmem")?;
            at.next_int::<i64>(&mut words, "Wmem")?;
            let dumping = at.flag(at.word(&mut words, "Dump")?, "Dump")?;
            at.next_int::<i64>(&mut words, "Locks")?;
            let drops = at.next_uint(&mut words, 10, "Drops")?;
            let inode = at.next_uint(&mut words, 10, "Inode")?;
            Ok(NetlinkSocket { protocol, port, groups, dumping, drops, inode })
        })
        .collect()
}

/// Reads `/proc/net/packet`.
///
/// # Errors
/// At the first line that is no socket.
pub fn parse_packet(text: &[u8]) -> Result<Vec<PacketSocket>, ParseError> {
    let mut lines = Lines::new("/proc/net/packet", text);
    lines.next().filter(|(_, line)| line.starts_with(b"sk ")).ok_or_else(|| lines.place().missing("the head line"))?;
    lines
        .map(|(at, line)| {
            let mut words = Words::new(line);
            at.word(&mut words, "sk")?;
            at.next_int::<i64>(&mut words, "RefCnt")?;
            Ok(PacketSocket {
                socket_type: at.next_uint(&mut words, 10, "Type")?,
                protocol: at.next_uint(&mut words, 16, "Proto")?,
                interface: at.next_uint(&mut words, 10, "Iface")?,
                running: at.flag(at.word(&mut words, "R")?, "R")?,
                receive_memory: at.next_uint(&mut words, 10, "Rmem")?,
                uid: at.next_uint(&mut words, 10, "User")?,
                inode: at.next_uint(&mut words, 10, "Inode")?,
            })
        })
        .collect()
}

/// A ping socket, which no diag module lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PingSocket {
    /// The address that it is connected to, as words in memory: one, or four of IPv6.
    pub peer: Vec<u32>,
    /// Inode.
    pub inode: u64,
}

/// Reads `/proc/net/icmp` and `/proc/net/icmp6`.
///
/// # Errors
/// At the first line that is no socket.
pub fn parse_ping(text: &[u8]) -> Result<Vec<PingSocket>, ParseError> {
    let mut lines = Lines::new("/proc/net/icmp", text);
    let head = lines.next().filter(|(_, line)| line.trim_ascii_start().starts_with(b"sl "));
    head.ok_or_else(|| lines.place().missing("the head line"))?;
    lines
        .map(|(at, line)| {
            let mut words = Words::new(line);
            at.word(&mut words, "sl")?;
            at.word(&mut words, "local_address")?;
            let peer = at.word(&mut words, "rem_address")?.split(|&b| b == b':').next().unwrap_or_default();
            let peer: Vec<u32> =
                peer.chunks(8).map(|word| at.uint(word, 16, "rem_address")).collect::<Result<_, _>>()?;
            if ![1, 4].contains(&peer.len()) {
                return Err(at.missing("rem_address"));
            }
            for name in ["st", "tx_queue:rx_queue", "tr:tm->when", "retrnsmt", "uid", "timeout"] {
                at.word(&mut words, name)?;
            }
            Ok(PingSocket { peer, inode: at.next_uint(&mut words, 10, "inode")? })
        })
        .collect()
}

/// A multicast group that somebody is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// On which interface.
    pub interface: u32,
    /// The group.
    pub address: IpAddr,
}

/// Parses `/proc/net/igmp`.
///
/// # Errors
/// At the first line that is neither an interface nor a group of one.
pub fn parse_igmp(text: &[u8]) -> Result<Vec<Group>, ParseError> {
    let mut lines = Lines::new("/proc/net/igmp", text);
    let head = lines.next().filter(|(_, line)| line.starts_with(b"Idx"));
    head.ok_or_else(|| lines.place().missing("the head line"))?;
    let (mut of, mut all) = (None, Vec::new());
    for (at, line) in lines {
        let mut words = Words::new(line);
        if line.starts_with(b"\t") {
            let interface = of.ok_or_else(|| at.missing("Idx"))?;
            let group: u32 = at.uint(at.word(&mut words, "Group")?, 16, "Group")?;
            all.push(Group { interface, address: Ipv4Addr::from(group.to_ne_bytes()).into() });
        } else {
            of = Some(at.next_uint(&mut words, 10, "Idx")?);
        }
    }
    Ok(all)
}

/// Parses `/proc/net/igmp6`.
///
/// # Errors
/// At the first line that is no group.
pub fn parse_igmp6(text: &[u8]) -> Result<Vec<Group>, ParseError> {
    Lines::new("/proc/net/igmp6", text)
        .map(|(at, line)| {
            let mut words = Words::new(line);
            let interface = at.next_uint(&mut words, 10, "index")?;
            at.word(&mut words, "interface")?;
            let group = at.word(&mut words, "group")?;
            let octets = super::hex_bytes(group).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
            let address = Ipv6Addr::from(octets.ok_or_else(|| at.malformed("group"))?).into();
            Ok(Group { interface, address })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups() {
        let all = parse_igmp(
            b"Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\
              \t\t\t\t010000E0     1 0:00000000\t\t0\n2\teth0      :     1      V3\n\t\t\t\tFB0000E0     2 0:0\t\t0\n",
        );
        let group = |interface, address: &str| Group { interface, address: address.parse().unwrap() };
        assert_eq!(all, Ok(vec![group(1, "224.0.0.1"), group(2, "224.0.0.251")]));
        assert!(parse_igmp(b"").is_err());
        assert!(parse_igmp(b"Idx\n\t\t010000E0\n").is_err());
        let all = parse_igmp6(b"1    lo              ff020000000000000000000000000001     1 0000000C 0\n");
        assert_eq!(all, Ok(vec![group(1, "ff02::1")]));
        assert!(parse_igmp6(b"1 lo ff02 1\n").is_err());
    }

    #[test]
    fn ping() {
        let sockets = parse_ping(
            b"   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
               7: 00000000:0007 0100007F:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 000000007f05b535 0\n",
        );
        assert_eq!(sockets, Ok(vec![PingSocket { peer: vec![0x0100_007f], inode: 4711 }]));
        assert!(parse_ping(b"").is_err());
        assert!(parse_ping(b" sl \n 7: 0:0 01:0 07\n").is_err());
        assert!(parse_ping(b" sl \n 7: 0:0 0100007F0100007F:0 07 0:0 0:0 0 0 0 1\n").is_err());
    }

    #[test]
    fn unix() {
        let sockets = parse_unix(
            b"Num       RefCount Protocol Flags    Type St Inode Path\n\
              00000000d73cab53: 00000003 00000000 00000000 0001 03  1205\n\
              000000007f05b535: 00000002 00000000 00010000 0001 01 29406 @abs\nx\n\n\
              00000000dcc0595f: 00000003 00000000 00000000 0005 03 1206  /tmp/ a\n",
        )
        .unwrap();
        assert_eq!(sockets.len(), 3);
        assert_eq!((sockets[0].inode, sockets[0].state, &sockets[0].name), (1205, 3, &None));
        assert_eq!((sockets[1].listening, sockets[1].name.as_deref()), (true, Some(&b"@abs\nx\n"[..])));
        assert_eq!((sockets[2].socket_type, sockets[2].name.as_deref()), (5, Some(&b" /tmp/ a"[..])));
    }

    #[test]
    fn netlink() {
        let sockets = parse_netlink(
            b"sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
              000000000fe4e5f4 0   4711       80000001 0        -1       1     2        3        4       \n",
        );
        let socket = NetlinkSocket { protocol: 0, port: 4711, groups: 0x8000_0001, dumping: true, drops: 3, inode: 4 };
        assert_eq!(sockets, Ok(vec![socket]));
    }

    #[test]
    fn packet() {
        let sockets = parse_packet(
            b"sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n\
              00000000f5aa1b5e 3      3    0003   2     1 0      1000   30219 \n",
        )
        .unwrap();
        assert_eq!((sockets[0].socket_type, sockets[0].protocol, sockets[0].interface), (3, 3, 2));
        assert_eq!((sockets[0].running, sockets[0].uid, sockets[0].inode), (true, 1000, 30219));
    }

    #[test]
    fn hostile() {
        assert!(parse_unix(b"").is_err() && parse_netlink(b"").is_err() && parse_packet(b"").is_err());
        assert!(parse_unix(b"Num \nx\n").is_err());
        assert!(parse_unix(b"Num \n00000000d73cab53: 00000003 00000000 00000000 0001 03\n").is_err());
        assert_eq!(parse_unix(b"Num "), Ok(Vec::new()));
        for line in ["", "\n", "x", "0 1", "0 1 -1 0 0 0 0 0 0 0", "0 1 99999999999 0 0 0 0 0 0 0"] {
            let text = format!("sk \n{line}\n");
            assert!(parse_netlink(text.as_bytes()).is_err());
            assert!(parse_packet(text.as_bytes()).is_err());
        }
    }

    #[test]
    fn own() {
        let mut buffer = Vec::new();
        crate::proc::read_proc(std::path::Path::new("/proc/self/net/unix"), &mut buffer).unwrap();
        parse_unix(&buffer).unwrap();
        crate::proc::read_proc(std::path::Path::new("/proc/self/net/netlink"), &mut buffer).unwrap();
        assert!(!parse_netlink(&buffer).unwrap().is_empty());
        crate::proc::read_proc(std::path::Path::new("/proc/self/net/packet"), &mut buffer).unwrap();
        parse_packet(&buffer).unwrap();
    }
}
