//! Open namespace files (`/proc/PID/ns/net` and the like).
//!
//! Carried when the namespace is one that the restored tasks have anyway: that of the engine, or a network namespace of the tree. Image: `files.img`
//! (`ns_file_entry`: which kind, by its CLONE_NEW flag, and which namespace, by its id in the ids images).
//! Man page: namespaces(7).

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use standstill_images::proto::{FdTypes, FileEntry, NsFileEntry};

use super::{Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};

/// Names below /proc/PID/ns, and their CLONE_NEW flags.
const KINDS: [(&str, u32); 8] = [
    ("pid", 0x2000_0000),
    ("net", 0x4000_0000),
    ("ipc", 0x0800_0000),
    ("uts", 0x0400_0000),
    ("time", 0x80),
    ("mnt", 0x0002_0000),
    ("user", 0x1000_0000),
    ("cgroup", 0x0200_0000),
];

/// The kind that a link like `net:[4026531833]` names, if it names one.
pub fn kind_of(link: &[u8]) -> Option<(&'static str, u32, u32)> {
    let text = std::str::from_utf8(link).ok()?;
    let (name, _) = text.split_once(":[")?;
    let position = KINDS.iter().position(|(kind, _)| *kind == name)?;
    let (name, flag) = KINDS[position];
    Some((name, flag, u32::try_from(position).ok()? + 1))
}

/// Dumps one; a namespace that is not the engine's is refused.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let Some((name, flag, ns_id)) = kind_of(&d.link) else {
        return Err(d.refused("a namespace file", "close it before the dump"));
    };
    let number = d.link.split(|b| *b == b'[').nth(1).and_then(|n| std::str::from_utf8(n.strip_suffix(b"]")?).ok());
    let network = number.and_then(|n| n.parse().ok()).filter(|_| name == "net").and_then(|n| cx.networks.id_of(n));
    if let Some(ns_id) = network {
        let nsf = NsFileEntry { id, ns_id, ns_cflag: flag, flags: d.flags };
        return Ok(FileEntry { r#type: FdTypes::Ns as i32, id, nsf: Some(nsf), ..Default::default() });
    }
    let own = rustix::fs::readlink(format!("/proc/self/ns/{name}"), Vec::new()).call("readlink(/proc/self/ns)")?;
    if own.as_bytes() != d.link {
        return Err(d.refused("a file of another namespace", "close it before the dump"));
    }
    let nsf = NsFileEntry { id, ns_id, ns_cflag: flag, flags: d.flags };
    Ok(FileEntry { r#type: FdTypes::Ns as i32, id, nsf: Some(nsf), ..Default::default() })
}

/// Opens the engine's own namespace of that kind.
pub fn open(e: &NsFileEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let kind = KINDS.iter().position(|(_, flag)| *flag == e.ns_cflag);
    let Some(position) = kind else {
        return Err(Error::lie("files.img", format!("a namespace of kind {:#x}", e.ns_cflag)));
    };
    if let Some(fd) = cx.networks.get(e.ns_id).filter(|_| KINDS[position].0 == "net") {
        return fd.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)");
    }
    if e.ns_id as usize != position + 1 {
        return Err(Error::refused("a file of another namespace", "namespaces cannot be restored yet"));
    }
    let path = format!("/proc/self/ns/{}", KINDS[position].0);
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).call("open").at(Place::Path(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_crius_numbers() {
        assert_eq!(kind_of(b"net:[4026531833]"), Some(("net", 0x4000_0000, 2)));
        assert_eq!(kind_of(b"cgroup:[1]").map(|k| k.2), Some(8));
        assert_eq!(kind_of(b"pipe:[1]"), None);
    }
}
