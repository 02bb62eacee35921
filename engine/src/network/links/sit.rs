//! Settings of a sit link, a tunnel for IPv6 in IPv4: attributes of its message (IFLA_IPTUN_), and [`SitEntry`].

use standstill_images::proto::SitEntry;

use super::{number, Link};
use crate::sys::netlink::{self, Message};

/// Numbers of attributes of a tunnel, with the fields of the entry.
pub(super) fn entry(link: &Link) -> SitEntry {
    let data = link.data();
    let word = |kind| number(&data, kind).map(u32::from_ne_bytes);
    let half = |kind| number(&data, kind).map(|v| u32::from(u16::from_ne_bytes(v)));
    let byte = |kind| number(&data, kind).map(|[v]: [u8; 1]| u32::from(v));
    let mut entry = SitEntry {
        link: word(1),
        local: word(2).filter(|a| *a != 0).into_iter().collect(),
        remote: word(3).filter(|a| *a != 0).into_iter().collect(),
        ttl: byte(4),
        tos: byte(5),
        flags: half(8),
        proto: byte(9),
        pmtudisc: byte(10).filter(|v| *v != 0).map(|_| true),
        encap_type: half(15),
        encap_flags: half(16),
        encap_sport: half(17),
        encap_dport: half(18),
        ..Default::default()
    };
    if let Some(len) = half(13).filter(|len| *len != 0) {
        entry.rd_prefixlen = Some(len);
        let prefix = data.get(&11).copied().unwrap_or_default();
        entry.rd_prefix = (0..4).filter_map(|i| netlink::word(prefix, i * 4)).collect();
        if let Some(len) = half(14).filter(|len| *len != 0) {
            entry.relay_prefixlen = Some(len);
            entry.relay_prefix = word(12).into_iter().collect();
        }
    }
    entry
}

/// Puts the fields into a message.
pub(super) fn put(message: &mut Message, entry: &SitEntry) {
    let half = |v: u32| u16::try_from(v).unwrap_or(0);
    let byte = |v: u32| [u8::try_from(v).unwrap_or(0)];
    let words = |all: &[u32]| all.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    if let Some(v) = entry.link {
        message.word(1, v);
    }
    for (kind, addresses) in [(2, &entry.local), (3, &entry.remote)] {
        if let [address] = addresses.as_slice() {
            message.word(kind, *address);
        }
    }
    for (kind, value) in [(4, entry.ttl), (5, entry.tos), (9, entry.proto), (10, entry.pmtudisc.map(u32::from))] {
        if let Some(v) = value {
            message.bytes(kind, &byte(v));
        }
    }
    let halves = [
        (8, entry.flags),
        (15, entry.encap_type),
        (16, entry.encap_flags),
        (17, entry.encap_sport),
        (18, entry.encap_dport),
        (13, entry.rd_prefixlen),
        (14, entry.relay_prefixlen),
    ];
    for (kind, value) in halves {
        if let Some(v) = value {
            message.half(kind, half(v));
        }
    }
    if entry.rd_prefixlen.is_some() {
        message.bytes(11, &words(&entry.rd_prefix));
    }
    if entry.relay_prefixlen.is_some() {
        message.bytes(12, &words(&entry.relay_prefix));
    }
}
