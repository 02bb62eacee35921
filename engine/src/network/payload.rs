//! Addresses, routes and rules: what the kernel says of them, as it says it.
//!
//! Images: `ifaddr-N.img`, `route-N.img`, `route6-N.img`, `rule-N.img`. Each is a magic number and the kernel's own messages
//! (RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWRULE), which is the format of `ip addr save` and the like. They are given back to the
//! kernel as they are, but for what only it may say (that a next hop is dead). Links in them are numbers, so links come
//! first, with theirs.
//!
//! - Routes that follow from addresses (table 255) and cached ones are not in there; those of other tables than the main one
//!   are, which `ip route save` leaves out. Routes are made in rounds, since one may need another to reach its gateway.
//! - Rules for IPv6 are in there if they are not the two that every namespace is born with.
//! - Next hops that are objects of their own (`ip nexthop`) are refused.
//! - An IPv6 address is not asked for on its link again: the program had it already. See `links.rs`. One that was still being
//!   asked for is, from the start.
//!
//! Not kept: neighbours that were learned, statistics.
//!
//! Man pages: rtnetlink(7), ip-address(8), ip-route(8), ip-rule(8). Headers: linux/rtnetlink.h, linux/fib_rules.h.

use standstill_images::{ImageKind, Images};

use crate::error::{At, Error, Place, Result};
use crate::sys::netlink::{self, Message, Netlink, CREATE, HEADER};

const ADDRESSES: u32 = 0x4736_1222;
const ROUTES: u32 = 0x4531_1224;
const RULES: u32 = 0x7170_6986;

const NEWADDR: u16 = 20;
const DELADDR: u16 = 21;
const GETADDR: u16 = 22;
const NEWROUTE: u16 = 24;
const GETROUTE: u16 = 26;
const NEWRULE: u16 = 32;
const DELRULE: u16 = 33;
const GETRULE: u16 = 34;
const NEWNEXTHOP: u16 = 104;
const GETNEXTHOP: u16 = 106;

const INET: u8 = 2;
const INET6: u8 = 10;
/// Of multicast routing, whose rules are not ours.
const FAMILIES: [u8; 2] = [INET, INET6];

/// Lengths of bodies.
const ADDRESS_BODY: usize = 8;
const ROUTE_BODY: usize = 12;
const RULE_BODY: usize = 12;

const TABLE_LOCAL: u32 = 255;
const TABLE_MAIN: u32 = 254;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const FRA_PRIORITY: u16 = 6;
/// RTM_F_CLONED: made by the kernel on the way.
const CLONED: u32 = 0x200;
/// RTNH_F_: dead, offloaded, link is down, trapped.
const SAID_BY_KERNEL: u8 = 1 | 8 | 16 | 64;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_DADFAILED: u32 = 8;

/// Writes the images of the namespace that we are in.
pub fn dump(netlink: &mut Netlink, images: &Images, id: u32) -> Result<()> {
    let hops = netlink.list(&Message::new(GETNEXTHOP, 0, &[0; 8])).or_else(|e| match e.errno() {
        libc::EOPNOTSUPP | libc::EINVAL => Ok(Vec::new()),
        _ => Err(e),
    })?;
    if hops.iter().any(|h| netlink::kind_of(h) == Some(NEWNEXTHOP)) {
        return Err(Error::refused("a next hop object (ip nexthop)", "write gateways into the routes themselves"));
    }
    let addresses = netlink.list(&Message::new(GETADDR, 0, &[0; ADDRESS_BODY]))?;
    write(images, ImageKind::Ifaddr, id, ADDRESSES, addresses.iter().filter(|m| is(m, NEWADDR)))?;
    for (family, kind) in [(INET, ImageKind::Route), (INET6, ImageKind::Route6)] {
        let mut body = [0; ROUTE_BODY];
        body[0] = family;
        let routes = match netlink.list(&Message::new(GETROUTE, 0, &body)) {
            Err(e) if family == INET6 && e.errno() == libc::EOPNOTSUPP => continue,
            other => other?,
        };
        let ours = |m: &&Vec<u8>| {
            is(m, NEWROUTE) && m.get(HEADER) == Some(&family) && table(m) != Some(TABLE_LOCAL) && !is_cloned(m)
        };
        let routes: Vec<_> = routes.iter().filter(ours).map(|r| without_state(r)).collect();
        write(images, kind, id, ROUTES, routes.iter())?;
    }
    let mut rules = rules(netlink, INET)?;
    let six = rules_if_any(netlink, INET6)?;
    if !is_born_with(&six) {
        rules.extend(six);
    }
    write(images, ImageKind::Rule, id, RULES, rules.iter())
}

fn is(message: &[u8], kind: u16) -> bool {
    netlink::kind_of(message) == Some(kind)
}

/// The table of a route or rule.
fn table(message: &[u8]) -> Option<u32> {
    let all = netlink::attributes(message.get(HEADER + ROUTE_BODY..)?);
    netlink::find(&all, RTA_TABLE).and_then(|v| netlink::word(v, 0)).or(message.get(HEADER + 4).map(|&t| t.into()))
}

fn is_cloned(message: &[u8]) -> bool {
    netlink::word(message, HEADER + 8).is_some_and(|flags| flags & CLONED != 0)
}

fn rules(netlink: &mut Netlink, family: u8) -> Result<Vec<Vec<u8>>> {
    let mut body = [0; RULE_BODY];
    body[0] = family;
    let all = netlink.list(&Message::new(GETRULE, 0, &body))?;
    Ok(all.into_iter().filter(|m| is(m, NEWRULE) && m.get(HEADER) == Some(&family)).collect())
}

fn rules_if_any(netlink: &mut Netlink, family: u8) -> Result<Vec<Vec<u8>>> {
    rules(netlink, family).or_else(|e| if e.errno() == libc::EOPNOTSUPP { Ok(Vec::new()) } else { Err(e) })
}

/// The two rules that are there for IPv6 when a namespace is made, or none, where the kernel has no rules.
fn is_born_with(rules: &[Vec<u8>]) -> bool {
    let plain = |rule: &[u8], wanted: u32, priority: u32| {
        let Some(rest) = rule.get(HEADER + RULE_BODY..) else { return false };
        let all = netlink::attributes(rest);
        let number = |kind| netlink::find(&all, kind).and_then(|v| netlink::word(v, 0)).unwrap_or(0);
        // nothing that selects: destination, source, mark, links, …
        let selects = all.iter().any(|(kind, _)| [1, 2, 3, 10, 17, 20, 22, 23, 24].contains(kind));
        table(rule) == Some(wanted)
            && number(FRA_PRIORITY) == priority
            && !selects
            && rule[HEADER + 1..HEADER + 4] == [0; 3]
    };
    match rules {
        [] => true,
        [first, second] => plain(first, TABLE_LOCAL, 0) && plain(second, TABLE_MAIN, 32766),
        _ => false,
    }
}

fn write<'m>(
    images: &Images,
    kind: ImageKind,
    id: u32,
    magic: u32,
    messages: impl Iterator<Item = &'m Vec<u8>>,
) -> Result<()> {
    let mut image = images.create(kind, id)?;
    image.write_raw(&magic.to_le_bytes())?;
    for message in messages {
        let mut bytes = message.clone();
        // neither our port nor the number of our question
        bytes[8..HEADER].fill(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        image.write_raw(&bytes)?;
    }
    Ok(image.finish()?)
}

/// The messages of an image, none if there is no image or nothing in it.
fn read(images: &Images, kind: ImageKind, id: u32, magic: u32, message: u16, body: usize) -> Result<Vec<Vec<u8>>> {
    let Some(image) = images.open_if_there(kind, id)? else { return Ok(Vec::new()) };
    if image.bytes().is_empty() {
        return Ok(Vec::new());
    }
    let lie = |what: &str| Error::Changed { what: format!("{}: {what}", image.name()) };
    let (head, rest) = image.bytes().split_at_checked(4).ok_or_else(|| lie("it ends early"))?;
    if head != magic.to_le_bytes() {
        return Err(lie("it does not begin with the magic of iproute2"));
    }
    let all = netlink::messages(rest).map_err(|_| lie("a message cannot be read"))?;
    if all.iter().any(|m| !is(m, message) || m.len() < HEADER + body) {
        return Err(lie("a message is of another kind"));
    }
    Ok(all.into_iter().map(<[u8]>::to_vec).collect())
}

fn again(message: &[u8]) -> Result<Message> {
    Message::again(message, CREATE).ok_or(Error::Gone)
}

/// An error that means that it is there already is none.
fn or_there(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if e.errno() == libc::EEXIST => Ok(()),
        other => other,
    }
}

/// All that is read from images before anything is made.
#[derive(Debug, Default)]
pub struct Payload {
    addresses: Vec<Vec<u8>>,
    routes: Vec<Vec<u8>>,
    rules: Vec<Vec<u8>>,
}

impl Payload {
    /// Reads and checks the images of a namespace.
    pub fn read(images: &Images, id: u32) -> Result<Payload> {
        let mut routes = read(images, ImageKind::Route, id, ROUTES, NEWROUTE, ROUTE_BODY)?;
        routes.extend(read(images, ImageKind::Route6, id, ROUTES, NEWROUTE, ROUTE_BODY)?);
        Ok(Payload {
            addresses: read(images, ImageKind::Ifaddr, id, ADDRESSES, NEWADDR, ADDRESS_BODY)?,
            routes,
            rules: read(images, ImageKind::Rule, id, RULES, NEWRULE, RULE_BODY)?,
        })
    }

    /// Makes everything in the namespace that we are in, whose links are there and up.
    pub fn restore(&self, netlink: &mut Netlink) -> Result<()> {
        for address in self.addresses.iter().filter(|a| !is_unready(a)) {
            or_there(netlink.change(again(address)?)).at(Place::Step("an address"))?;
        }
        self.restore_routes(netlink)?;
        for family in FAMILIES {
            let mut ours = self.rules.iter().filter(|r| r.get(HEADER) == Some(&family)).peekable();
            if ours.peek().is_none() {
                continue;
            }
            for old in rules(netlink, family)? {
                let delete = Message::new(DELRULE, 0, old.get(HEADER..).unwrap_or_default());
                netlink.change(delete).at(Place::Step("a rule that is there"))?;
            }
            for rule in ours {
                or_there(netlink.change(again(rule)?)).at(Place::Step("a rule of routing"))?;
            }
        }
        Ok(())
    }

    fn restore_routes(&self, netlink: &mut Netlink) -> Result<()> {
        let mut left: Vec<Vec<u8>> = self.routes.iter().map(|r| without_state(r)).collect();
        while !left.is_empty() {
            let mut later = Vec::new();
            let mut error = None;
            let before = left.len();
            for route in left {
                if let Err(e) = or_there(netlink.change(again(&route)?)) {
                    error.get_or_insert(e);
                    later.push(route);
                }
            }
            if let Some(e) = error.filter(|_| later.len() == before) {
                return Err(e).at(Place::Step("a route"));
            }
            left = later;
        }
        Ok(())
    }

    /// Takes away the addresses that the kernel gave to links when they came up, and that were not ready to use before.
    pub fn remove_others(&self, netlink: &mut Netlink) -> Result<()> {
        let known: Vec<_> = self.addresses.iter().filter(|a| !is_unready(a)).map(|a| identity(a)).collect();
        for address in netlink.list(&Message::new(GETADDR, 0, &[0; ADDRESS_BODY]))? {
            if is(&address, NEWADDR) && !known.contains(&identity(&address)) {
                let delete = Message::new(DELADDR, 0, address.get(HEADER..).unwrap_or_default());
                netlink.change(delete).at(Place::Step("an address that the kernel gave"))?;
            }
        }
        Ok(())
    }

    /// Begins to ask for the IPv6 addresses that the program could not use yet, since it was not known whether they are taken.
    pub fn ask_for_unready(&self, netlink: &mut Netlink) -> Result<()> {
        for address in self.addresses.iter().filter(|a| is_unready(a)) {
            or_there(netlink.change(again(address)?)).at(Place::Step("an address"))?;
        }
        Ok(())
    }
}

/// What tells one address from others: family and length, link, the address itself.
fn identity(address: &[u8]) -> (Option<&[u8]>, Option<u32>, Vec<&[u8]>) {
    let all = netlink::attributes(address.get(HEADER + ADDRESS_BODY..).unwrap_or_default());
    let own = [IFA_ADDRESS, IFA_LOCAL].iter().filter_map(|kind| netlink::find(&all, *kind)).collect();
    (address.get(HEADER..HEADER + 2), netlink::word(address, HEADER + 4), own)
}

/// How many IPv6 addresses here cannot be used yet.
pub fn unready(netlink: &mut Netlink) -> Result<usize> {
    let mut body = [0; ADDRESS_BODY];
    body[0] = INET6;
    let all = netlink.list(&Message::new(GETADDR, 0, &body))?;
    Ok(all.iter().filter(|a| is_unready(a)).count())
}

fn is_unready(address: &[u8]) -> bool {
    let flags = || {
        let all = netlink::attributes(address.get(HEADER + ADDRESS_BODY..)?);
        netlink::find(&all, IFA_FLAGS).and_then(|v| netlink::word(v, 0)).or(address.get(HEADER + 2).map(|&f| f.into()))
    };
    address.get(HEADER) == Some(&INET6)
        && flags().is_some_and(|flags| flags & IFA_F_TENTATIVE != 0 && flags & IFA_F_DADFAILED == 0)
}

/// A route without what only the kernel says of it.
fn without_state(route: &[u8]) -> Vec<u8> {
    let mut route = route.to_vec();
    if let Some(flags) = route.get_mut(HEADER + 8) {
        *flags &= !SAID_BY_KERNEL;
    }
    let mut at = HEADER + ROUTE_BODY;
    while let (Some(len), Some(kind)) = (half(&route, at), half(&route, at + 2)) {
        if kind == RTA_MULTIPATH {
            let end = (at + usize::from(len)).min(route.len());
            let mut hop = at + 4;
            // length, flags, weight, link; attributes follow
            while let Some(len) = half(&route, hop).filter(|&len| len >= 8 && hop < end) {
                if let Some(flags) = route.get_mut(hop + 2) {
                    *flags &= !SAID_BY_KERNEL;
                }
                hop += usize::from(len).next_multiple_of(4);
            }
        }
        if len < 4 {
            break;
        }
        at += usize::from(len).next_multiple_of(4);
    }
    route
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_the_kernel_says_of_hops_is_taken_away() {
        let mut route = vec![0; HEADER + ROUTE_BODY];
        route[HEADER + 8] = 1 | 4 | 16;
        // two next hops of 8 bytes
        route.extend([20, 0, 9, 0]);
        route.extend([8, 0, 1 | 4, 0, 2, 0, 0, 0]);
        route.extend([8, 0, 16, 0, 3, 0, 0, 0]);
        let clean = without_state(&route);
        assert_eq!(clean[HEADER + 8], 4);
        assert_eq!((clean[HEADER + ROUTE_BODY + 6], clean[HEADER + ROUTE_BODY + 14]), (4, 0));
        // lengths that lie end it
        let mut lie = vec![0; HEADER + ROUTE_BODY];
        lie.extend([255, 255, 9, 0, 0, 0, 0, 0]);
        assert_eq!(without_state(&lie), lie);
    }
}
