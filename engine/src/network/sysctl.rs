//! The settings below /proc/sys/net of a namespace and of its links.
//!
//! What the kernel exposes depends on who looks: a thread sees those of the network namespace that it is in. In the images
//! (`netns-N.img`, and each link of `netdev-N.img`) a setting has no name: its place in a list is its name, and the lists
//! below are in the order that CRIU's images have. What a kernel lacks has no value there.
//!
//! Before a value is written it is read: most are as they are to be, and some cannot be written at all. `accept_redirects`
//! comes last, because `forwarding` changes it; `all` before `default`, and both before links, which take on what those say. A
//! setting that is not there is an error, or with `--weak-sysctls` none.
//!
//! Documentation: the kernel's networking/ip-sysctl.rst.

use std::path::PathBuf;

use standstill_images::proto::{SysctlEntry, SysctlType};

use crate::error::{At, Call, Error, Place, Result};

/// Settings of IPv4, of a link, `default` and `all`.
pub const IPV4: [&str; 30] = [
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bootp_relay",
    "disable_policy",
    "disable_xfrm",
    "force_igmp_version",
    "forwarding",
    "igmpv2_unsolicited_report_interval",
    "igmpv3_unsolicited_report_interval",
    "log_martians",
    "medium_id",
    "promote_secondaries",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
    "tag",
    "ignore_routes_with_linkdown",
    "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
];

/// Settings of IPv6, of a link, `default` and `all`.
pub const IPV6: [&str; 42] = [
    "accept_dad",
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_source_route",
    "autoconf",
    "dad_transmits",
    "disable_ipv6",
    "drop_unicast_in_l2_multicast",
    "drop_unsolicited_na",
    "force_mld_version",
    "force_tllao",
    "forwarding",
    "hop_limit",
    "ignore_routes_with_linkdown",
    "keep_addr_on_down",
    "max_addresses",
    "max_desync_factor",
    "mldv1_unsolicited_report_interval",
    "mldv2_unsolicited_report_interval",
    "mtu",
    "ndisc_notify",
    "optimistic_dad",
    "proxy_ndp",
    "regen_max_retry",
    "router_probe_interval",
    "router_solicitation_delay",
    "router_solicitation_interval",
    "router_solicitations",
    "stable_secret",
    "suppress_frag_ndisc",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_oif_addrs_only",
    "use_optimistic",
    "use_tempaddr",
];

/// Settings of unix sockets.
pub const UNIX: [&str; 1] = ["max_dgram_qlen"];

/// Settings of IPv4 as a whole.
pub const OF_IPV4: [&str; 1] = ["ping_group_range"];

/// The settings that are texts.
const TEXTS: [&str; 2] = ["stable_secret", "ping_group_range"];

/// The last to be written.
const LAST: &str = "accept_redirects";
/// Not like others: it follows the link's, so that of `default` says nothing of it.
pub const MTU: &str = "mtu";

/// Where the settings of a protocol for `of` (a link, `default`, `all`) are.
pub fn folder(protocol: &str, of: &str) -> String {
    format!("net/{protocol}/conf/{of}")
}

fn path(folder: &str, name: &str) -> PathBuf {
    // a name of a link has no slash; CRIU and the kernel agree on that much
    PathBuf::from(format!("/proc/sys/{folder}/{name}"))
}

fn read_text(path: &PathBuf) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(text)),
        // EIO: it was never set
        Err(e) if [Some(libc::ENOENT), Some(libc::EIO)].contains(&e.raw_os_error()) => Ok(None),
        Err(e) => Err(e).call("read").at(Place::Path(path.clone())),
    }
}

fn number(text: &[u8]) -> Option<i32> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

/// Reads settings, in the order of their names.
pub fn read(folder: &str, names: &[&str]) -> Result<Vec<SysctlEntry>> {
    let one = |name: &&str| {
        let path = path(folder, name);
        let text = read_text(&path)?;
        if TEXTS.contains(name) {
            return Ok(SysctlEntry { r#type: SysctlType::CtlStr as i32, iarg: None, sarg: text });
        }
        let iarg = text.as_deref().map(|t| number(t).ok_or_else(|| unreadable(&path))).transpose()?;
        Ok(SysctlEntry { r#type: SysctlType::Ctl32 as i32, iarg, sarg: None })
    };
    names.iter().map(one).collect()
}

fn unreadable(path: &std::path::Path) -> Error {
    Error::Changed { what: format!("{} is not a number", path.display()) }
}

/// What is to be written of settings: a text for each name that has a value and is not what `default` says.
pub fn planned<'n>(
    names: &[&'n str],
    entries: &[SysctlEntry],
    default: Option<&[SysctlEntry]>,
) -> Result<Vec<(&'n str, Vec<u8>)>> {
    let lie = |what: String| Error::lie("netns", what);
    if entries.len() > names.len() {
        tracing::warn!("{} settings of the network are unknown, and are not restored", entries.len() - names.len());
    }
    let mut all = Vec::new();
    for (i, (name, entry)) in names.iter().zip(entries).enumerate() {
        let text = match (SysctlType::try_from(entry.r#type), entry.iarg, &entry.sarg) {
            (Ok(SysctlType::Ctl32), Some(value), _) => value.to_string().into_bytes(),
            (Ok(SysctlType::CtlStr), _, Some(text)) => text.clone(),
            (Ok(_), ..) => continue,
            (Err(_), ..) => return Err(lie(format!("a setting {name} of type {}", entry.r#type))),
        };
        if *name != MTU && default.and_then(|d| d.get(i)).is_some_and(|d| d == entry) {
            continue;
        }
        all.push((*name, text));
    }
    all.sort_by_key(|(name, _)| *name == LAST);
    Ok(all)
}

/// Sets one.
pub fn write_one(folder: &str, name: &str, text: &[u8], weak: bool) -> Result<()> {
    let path = path(folder, name);
    match read_text(&path)? {
        Some(now) if now.trim_ascii() == text.trim_ascii() => return Ok(()),
        None if weak && !path.exists() => {
            tracing::warn!("there is no {}: it is not restored", path.display());
            return Ok(());
        }
        _ => {}
    }
    std::fs::write(&path, text).call("write").at(Place::Path(path))
}

/// Sets those that have a value. A setting that `default` has with the same value is left alone.
pub fn write(
    folder: &str,
    names: &[&str],
    entries: &[SysctlEntry],
    default: Option<&[SysctlEntry]>,
    weak: bool,
) -> Result<()> {
    planned(names, entries, default)?.into_iter().try_for_each(|(name, text)| write_one(folder, name, &text, weak))
}

/// As older images have the settings of IPv4: numbers, and -1 for what the kernel lacks.
pub fn from_old(values: &[i32]) -> Vec<SysctlEntry> {
    let one = |value: &i32| SysctlEntry {
        r#type: SysctlType::Ctl32 as i32,
        iarg: (*value != -1).then_some(*value),
        sarg: None,
    };
    values.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn word(value: i32) -> SysctlEntry {
        SysctlEntry { r#type: 6, iarg: Some(value), sarg: None }
    }

    #[test]
    fn redirects_come_last_and_what_default_says_is_left_out() {
        let entries: Vec<_> = (0..30).map(word).collect();
        let all = planned(&IPV4, &entries, None).unwrap();
        assert_eq!((all.len(), all[29].0), (30, "accept_redirects"));
        assert_eq!(all[0], ("accept_local", b"0".to_vec()));
        let mut default = entries.clone();
        default[1] = word(7);
        assert_eq!(planned(&IPV4, &entries, Some(&default)).unwrap(), [("accept_redirects", b"1".to_vec())]);
        let six: Vec<_> = (0..42).map(word).collect();
        assert_eq!(planned(&IPV6, &six, Some(&six)).unwrap(), [("mtu", b"26".to_vec())]);
    }

    #[test]
    fn what_has_no_value_is_left_out_and_lies_are_told() {
        assert_eq!(planned(&IPV4, &from_old(&[-1, 5]), None).unwrap(), [("accept_redirects", b"5".to_vec())]);
        let lie = SysctlEntry { r#type: 1, iarg: Some(1), sarg: None };
        assert!(planned(&UNIX, &[lie], None).is_err());
        assert!(planned(&UNIX, &[word(1), word(2)], None).unwrap().len() == 1);
    }

    #[test]
    fn ours_are_read() {
        let all = read(&folder("ipv4", "lo"), &IPV4).unwrap();
        assert!(all[12].iarg.is_some());
        assert!(read(&folder("ipv4", "no-such-link"), &IPV4).unwrap().iter().all(|e| e.iarg.is_none()));
    }
}
