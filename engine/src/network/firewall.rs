//! Rules of the firewall, and the connections that it tracks.
//!
//! nftables are saved as `nft list ruleset` says them (`nftables-N.img`), the tables of iptables's older half as
//! `iptables-save` and `ip6tables-save` do (`iptables-N.img`, `ip6tables-N.img`): no library has all of their languages, so these
//! programs are run, inside the namespace, and only where the kernel says that there is something. What iptables itself keeps
//! in nftables is in the former.
//!
//! Tracked connections (`netns-ct-N.img`) and expected ones (`netns-exp-N.img`) are the kernel's own messages. A connection of
//! TCP is taken up again with less strict checks of its numbers: its ends are silent between dump and restore, and not quite
//! as the kernel last saw them.
//!
//! Not kept: sets of ipset(8), ipvs, traffic control. They are in nobody's images.
//!
//! Man pages: nft(8), iptables-save(8), iptables-restore(8). Headers: linux/netfilter/nfnetlink_conntrack.h.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use standstill_images::{ImageKind, Images};

use crate::error::{At, Call, Error, Place, Result};
use crate::options::Persona;
use crate::sockets::netlock;
use crate::sys::calls;
use crate::sys::netlink::{self, Message, Netlink, CREATE, HEADER};

const SUBSYSTEM_TRACKED: u16 = 1 << 8;
const SUBSYSTEM_EXPECTED: u16 = 2 << 8;
const GET: u16 = 1;
const NFT_GETTABLE: u16 = 10 << 8 | 1;
/// Family, version, resource.
const BODY: usize = 4;

const CTA_PROTOINFO: u16 = 4;
const PROTOINFO_TCP: u16 = 1;
/// Flags that were seen from either side, each with a mask.
const TCP_FLAGS: [u16; 2] = [4, 5];
const BE_LIBERAL: u8 = 8;

/// The two halves of iptables: where the kernel lists its tables, the image, and names of programs.
const HALVES: [(&str, ImageKind, &str); 2] = [
    ("/proc/thread-self/net/ip_tables_names", ImageKind::Iptables, "iptables"),
    ("/proc/thread-self/net/ip6_tables_names", ImageKind::Ip6tables, "ip6tables"),
];

/// Writes the rules of the namespace that we are in.
pub fn dump_rules(images: &Images, id: u32, persona: Persona) -> Result<()> {
    for (list, kind, name) in HALVES {
        let tables = std::fs::read(list).unwrap_or_default();
        if tables.trim_ascii().is_empty() {
            continue;
        }
        let text = match legacy(name, "save") {
            Some(program) => run(&program, &["-c"], None)?,
            None if persona == Persona::Criu => {
                tracing::warn!("there are tables of {name}, and no {name}-legacy-save to save them");
                continue;
            }
            None => {
                return Err(Error::refused(
                    format!("a firewall of {name}"),
                    "install iptables with its older half (iptables-legacy-save)",
                ))
            }
        };
        write(images, kind, id, &text)?;
    }
    if has_nftables()? {
        let program = find("nft").ok_or_else(|| Error::refused("a firewall of nftables", "install nft"))?;
        write(images, ImageKind::Nftables, id, &run(&program, &["list", "ruleset"], None)?)?;
    }
    Ok(())
}

fn has_nftables() -> Result<bool> {
    let mut netlink = Netlink::open(netlink::NETFILTER)?;
    match netlink.list(&Message::new(NFT_GETTABLE, 0, &[0; BODY])) {
        Ok(tables) => Ok(!tables.is_empty()),
        // a kernel without them
        Err(e) if [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOENT].contains(&e.errno()) => Ok(false),
        Err(e) => Err(e),
    }
}

fn write(images: &Images, kind: ImageKind, id: u32, text: &[u8]) -> Result<()> {
    let mut image = images.create(kind, id)?;
    image.write_raw(text)?;
    Ok(image.finish()?)
}

fn find(name: &str) -> Option<PathBuf> {
    netlock::find(name)
}

/// The program that speaks of the older tables: by its own name, or by the common one where that is it.
fn legacy(name: &str, verb: &str) -> Option<PathBuf> {
    find(&format!("{name}-legacy-{verb}")).or_else(|| {
        let common = find(&format!("{name}-{verb}"))?;
        let version = run(&common, &["-V"], None).ok()?;
        (!version.windows(9).any(|w| w == b"nf_tables")).then_some(common)
    })
}

/// Runs a program in our namespace: what it says.
fn run(program: &PathBuf, arguments: &[&str], input: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let at = || Place::Path(program.clone());
    let mut child = calls::plain_signals(&mut command).spawn().call("execve").at(at())?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || match (stdin, input) {
            (Some(mut stdin), Some(input)) => stdin.write_all(input),
            _ => Ok(()),
        });
        let output = child.wait_with_output();
        // what it did not want to read is told by its exit code
        let _ = writer.join();
        output
    })
    .call("wait")
    .at(at())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
    Err(Error::Usage { what: format!("{} failed ({}): {said}", program.display(), output.status) })
}

/// Writes the connections that are tracked in the namespace that we are in.
pub fn dump_tracked(images: &Images, id: u32) -> Result<()> {
    let mut netlink = Netlink::open(netlink::NETFILTER)?;
    for (subsystem, kind) in [(SUBSYSTEM_TRACKED, ImageKind::NetnfCt), (SUBSYSTEM_EXPECTED, ImageKind::NetnfExp)] {
        let all = match netlink.list(&Message::new(subsystem | GET, 0, &[0; BODY])) {
            Err(e) if [libc::EINVAL, libc::EOPNOTSUPP].contains(&e.errno()) => continue,
            other => other?,
        };
        if all.is_empty() {
            continue;
        }
        let mut image = images.create(kind, id)?;
        for mut message in all {
            message[8..HEADER].fill(0);
            message.resize(message.len().next_multiple_of(4), 0);
            image.write_raw(&message)?;
        }
        image.finish()?;
    }
    Ok(())
}

/// All that is read from images before anything is made.
#[derive(Debug, Default)]
pub struct Saved {
    iptables: [Vec<u8>; 2],
    nftables: Vec<u8>,
    tracked: Vec<Vec<u8>>,
}

impl Saved {
    /// Reads and checks the images of a namespace.
    pub fn read(images: &Images, id: u32) -> Result<Saved> {
        let text = |kind| -> Result<Vec<u8>> {
            Ok(images.open_if_there(kind, id)?.map(|i| i.bytes().to_vec()).unwrap_or_default())
        };
        let mut tracked = Vec::new();
        for kind in [ImageKind::NetnfCt, ImageKind::NetnfExp] {
            let Some(image) = images.open_if_there(kind, id)? else { continue };
            let lie = || Error::Changed { what: format!("{}: not what the kernel says of connections", image.name()) };
            for message in netlink::messages(image.bytes()).map_err(|_| lie())? {
                let kind = netlink::kind_of(message).ok_or_else(lie)?;
                if ![SUBSYSTEM_TRACKED, SUBSYSTEM_EXPECTED].contains(&kind) || message.len() < HEADER + BODY {
                    return Err(lie());
                }
                tracked.push(message.to_vec());
            }
        }
        Ok(Saved {
            iptables: [text(ImageKind::Iptables)?, text(ImageKind::Ip6tables)?],
            nftables: text(ImageKind::Nftables)?,
            tracked,
        })
    }

    /// Without rules: others make them. `tracked`: whether connections are restored.
    pub fn only_tracked(self, tracked: bool) -> Saved {
        Saved { tracked: if tracked { self.tracked } else { Vec::new() }, ..Saved::default() }
    }

    /// Makes the rules in the namespace that we are in; true if there were some.
    pub fn restore_rules(&self) -> Result<bool> {
        let is_empty = |text: &Vec<u8>| text.trim_ascii().is_empty();
        for ((_, _, name), text) in HALVES.iter().zip(&self.iptables) {
            if is_empty(text) {
                continue;
            }
            let program = legacy(name, "restore").ok_or_else(|| Error::Usage {
                what: format!(
                    "the firewall of {name} needs {name}-legacy-restore, which is not here: install iptables"
                ),
            })?;
            run(&program, &["-w", "-c"], Some(text))?;
        }
        if !is_empty(&self.nftables) {
            let program = find("nft").ok_or_else(|| Error::Usage {
                what: "the firewall of nftables needs nft, which is not here: install it".into(),
            })?;
            run(&program, &["-f", "-"], Some(&self.nftables))?;
        }
        Ok(!self.iptables.iter().all(is_empty) || !is_empty(&self.nftables))
    }

    /// Makes what is tracked.
    pub fn restore_tracked(&self) -> Result<()> {
        if self.tracked.is_empty() {
            return Ok(());
        }
        let mut netlink = Netlink::open(netlink::NETFILTER)?;
        for message in &self.tracked {
            let message = Message::again(&liberal(message), CREATE).ok_or(Error::Gone)?;
            match netlink.change(message) {
                Err(e) if e.errno() == libc::EEXIST => {}
                other => other.at(Place::Step("a tracked connection"))?,
            }
        }
        Ok(())
    }
}

/// Where an attribute of a kind is in `bytes`, between two places: its value.
fn inside(bytes: &[u8], from: usize, to: usize, kind: u16) -> Option<(usize, usize)> {
    let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let mut at = from;
    while at + 4 <= to {
        let len = usize::from(half(at)?);
        if len < 4 || at + len > to {
            return None;
        }
        if half(at + 2)? & 0x3fff == kind {
            return Some((at + 4, at + len));
        }
        at += len.next_multiple_of(4);
    }
    None
}

/// A tracked connection whose numbers are checked less.
fn liberal(message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let tcp = inside(&message, HEADER + BODY, message.len(), CTA_PROTOINFO)
        .and_then(|(from, to)| inside(&message, from, to, PROTOINFO_TCP));
    let Some((from, to)) = tcp else { return message };
    for kind in TCP_FLAGS {
        if let Some((at, end)) = inside(&message, from, to, kind).filter(|(at, end)| end - at >= 2) {
            let [flags, mask] = &mut message[at..end.min(at + 2)] else { continue };
            *flags |= BE_LIBERAL;
            // the kernel says flags without a mask, and takes those only that are in it
            *mask |= *flags;
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_become_liberal() {
        let mut message = vec![0; HEADER + BODY];
        message.extend([8, 0, 3, 0, 0, 0, 0, 1]);
        message.extend([16, 0, 4, 128, 12, 0, 1, 128, 6, 0, 4, 0, 1, 0, 0, 0]);
        let made = liberal(&message);
        assert_eq!(made[HEADER + BODY + 8 + 12..][..2], [9, 9]);
        // others, and broken ones, stay as they are
        let udp = message[..HEADER + BODY + 8].to_vec();
        assert_eq!(liberal(&udp), udp);
        let broken = [&message[..HEADER + BODY + 8], &[255, 255, 4, 128, 0, 0]].concat();
        assert_eq!(liberal(&broken), broken);
    }
}
