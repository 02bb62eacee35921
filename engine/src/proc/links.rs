//! What `readlink` says of `/proc/PID/fd/N`, `map_files/…`, `exe`, `cwd`, `root` and `ns/…`.
//!
//! Nothing is escaped here. `" (deleted)"` behind a path may be part of its name: `stat` through the link (`st_nlink`) and
//! of the path settle that.
//!
//! Man pages: proc_pid_fd(5), namespaces(7).

use super::{uint, ParseError, Place};

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamespaceKind {
    /// Control groups.
    Cgroup,
    /// System V IPC and message queues.
    Ipc,
    /// Mounts.
    Mnt,
    /// Network.
    Net,
    /// Processes.
    Pid,
    /// Clocks.
    Time,
    /// Users.
    User,
    /// Host name.
    Uts,
}

impl NamespaceKind {
    /// All, with the kernel's names.
    pub const ALL: [(Self, &'static str); 8] = [
        (Self::Cgroup, "cgroup"),
        (Self::Ipc, "ipc"),
        (Self::Mnt, "mnt"),
        (Self::Net, "net"),
        (Self::Pid, "pid"),
        (Self::Time, "time"),
        (Self::User, "user"),
        (Self::Uts, "uts"),
    ];
}

/// What an open file is, by the name of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTarget<'a> {
    /// `pipe:[N]`.
    Pipe(u64),
    /// `socket:[N]`.
    Socket(u64),
    /// `net:[N]` and the like.
    Namespace(NamespaceKind, u64),
    /// `anon_inode:[eventfd]` or `anon_inode:inotify`: the name without brackets.
    AnonInode(&'a [u8]),
    /// `/memfd:NAME (deleted)`.
    Memfd(&'a [u8]),
    /// `/SYSVxxxxxxxx (deleted)`: the key.
    SysV(u32),
    /// A path.
    Path {
        /// Without " (deleted)".
        path: &'a [u8],
        /// It was there.
        deleted: bool,
    },
    /// Something of the kernel's that this program does not know.
    Unknown(&'a [u8]),
}

/// Reads the target of a link. Every target is something.
#[must_use]
pub fn parse(target: &[u8]) -> LinkTarget<'_> {
    if let [b'/', ..] = target {
        let Some(path) = target.strip_suffix(b" (deleted)") else {
            return LinkTarget::Path { path: target, deleted: false };
        };
        if let Some(name) = path.strip_prefix(b"/memfd:") {
            return LinkTarget::Memfd(name);
        }
        let key = path.strip_prefix(b"/SYSV").filter(|key| key.len() == 8).and_then(|key| uint(key, 16));
        return match key.and_then(|key| u32::try_from(key).ok()) {
            Some(key) => LinkTarget::SysV(key),
            None => LinkTarget::Path { path, deleted: true },
        };
    }
    if let Some(name) = target.strip_prefix(b"anon_inode:") {
        let inside = name.strip_prefix(b"[").and_then(|name| name.strip_suffix(b"]"));
        return LinkTarget::AnonInode(inside.unwrap_or(name));
    }
    match numbered(target) {
        Some((b"pipe", number)) => LinkTarget::Pipe(number),
        Some((b"socket", number)) => LinkTarget::Socket(number),
        Some((name, number)) => match NamespaceKind::ALL.iter().find(|(_, known)| known.as_bytes() == name) {
            Some((kind, _)) => LinkTarget::Namespace(*kind, number),
            None => LinkTarget::Unknown(target),
        },
        None => LinkTarget::Unknown(target),
    }
}

/// Reads the target of `/proc/PID/ns/…`.
///
/// # Errors
/// If it is no namespace that this program knows.
pub fn parse_namespace(target: &[u8]) -> Result<(NamespaceKind, u64), ParseError> {
    match parse(target) {
        LinkTarget::Namespace(kind, number) => Ok((kind, number)),
        _ => Err(Place::first("/proc/PID/ns/").malformed("the name of a namespace")),
    }
}

/// `name:[number]`.
fn numbered(target: &[u8]) -> Option<(&[u8], u64)> {
    let inside = target.strip_suffix(b"]")?;
    let at = inside.iter().position(|&b| b == b':')?;
    let number = inside.get(at + 1..)?.strip_prefix(b"[")?;
    Some((inside.get(..at)?, uint(number, 10)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        assert_eq!(parse(b"pipe:[29390]"), LinkTarget::Pipe(29390));
        assert_eq!(parse(b"socket:[29379]"), LinkTarget::Socket(29379));
        assert_eq!(parse(b"anon_inode:[eventfd]"), LinkTarget::AnonInode(b"eventfd"));
        assert_eq!(parse(b"anon_inode:inotify"), LinkTarget::AnonInode(b"inotify"));
        assert_eq!(parse(b"anon_inode:bpf-map"), LinkTarget::AnonInode(b"bpf-map"));
        assert_eq!(parse(b"net:[4026531833]"), LinkTarget::Namespace(NamespaceKind::Net, 4_026_531_833));
        assert_eq!(parse(b"/memfd:hello world (deleted)"), LinkTarget::Memfd(b"hello world"));
        assert_eq!(parse(b"/memfd: (deleted) (deleted)"), LinkTarget::Memfd(b" (deleted)"));
        assert_eq!(parse(b"/memfd:x"), LinkTarget::Path { path: b"/memfd:x", deleted: false });
        assert_eq!(parse(b"/SYSV00001234 (deleted)"), LinkTarget::SysV(0x1234));
        assert_eq!(
            parse(b"/tmp/we ird\n\\012x (deleted)"),
            LinkTarget::Path { path: b"/tmp/we ird\n\\012x", deleted: true }
        );
        assert_eq!(parse(b"/"), LinkTarget::Path { path: b"/", deleted: false });
        assert_eq!(parse_namespace(b"pid:[4026531836]"), Ok((NamespaceKind::Pid, 4_026_531_836)));
    }

    #[test]
    fn hostile() {
        for odd in ["", "pipe:[", "pipe:[]", "pipe:[-1]", "pipe:[99999999999999999999]", "new:[1]", "]", ":[]", "x"] {
            assert_eq!(parse(odd.as_bytes()), LinkTarget::Unknown(odd.as_bytes()));
            assert!(parse_namespace(odd.as_bytes()).is_err());
        }
        assert_eq!(parse(b"anon_inode:["), LinkTarget::AnonInode(b"["));
        assert_eq!(parse(b"/\xff"), LinkTarget::Path { path: b"/\xff", deleted: false });
    }

    #[test]
    fn own() {
        for (kind, name) in NamespaceKind::ALL {
            let target = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
            let target = std::os::unix::ffi::OsStrExt::as_bytes(target.as_os_str());
            assert_eq!(parse_namespace(target).unwrap().0, kind);
        }
    }
}
