//! `/proc/PID/mountinfo`: the mounts that a task can reach from its root.
//!
//! Space, tab, newline, backslash and (since 5.19) `#` are escaped as three octal digits everywhere in a line, so names
//! read back exactly. What lies outside the task's root is left out; a mount point may still be `/` twice.
//!
//! Man page: proc_pid_mountinfo(5).

use super::{split_once, unescape_octal, Lines, ParseError, Place, Words};

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Identity, reused after unmounting.
    pub id: i32,
    /// Mount that it is on; its own for the root, or one that is not listed.
    pub parent: i32,
    /// Device of the file system.
    pub device: (u32, u32),
    /// What of the file system is mounted; for a namespace file its name, such as `net:[4026531833]`.
    pub root: Vec<u8>,
    /// That this folder of the file system was removed: its root had `//deleted` behind it.
    pub root_deleted: bool,
    /// Where, seen from the task's root.
    pub mount_point: Vec<u8>,
    /// Options of the mount, as printed.
    pub options: Vec<u8>,
    /// Peer group.
    pub shared: Option<i32>,
    /// Group that it gets propagation from.
    pub master: Option<i32>,
    /// Nearest dominant group under the same root.
    pub propagate_from: Option<i32>,
    /// Cannot be bound.
    pub unbindable: bool,
    /// Type, with a subtype behind a dot.
    pub fs_type: Vec<u8>,
    /// What was given as source.
    pub source: Vec<u8>,
    /// Options of the file system, as printed but for octal escapes.
    pub super_options: Vec<u8>,
}

/// Reads the file.
///
/// # Errors
/// At the first line that is not a mount.
pub fn parse(text: &[u8]) -> Result<Vec<Mount>, ParseError> {
    Lines::new("/proc/PID/mountinfo", text).map(|(at, line)| mount(at, line)).collect()
}

/// `27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw`. Fields end at single spaces: a source may be empty.
fn mount(at: Place, line: &[u8]) -> Result<Mount, ParseError> {
    let mut words = Words::new(line);
    let id = at.next_int(&mut words, "the number of a mount")?;
    let parent = at.next_int(&mut words, "the parent of a mount")?;
    let device = at.word(&mut words, "the device of a mount")?;
    let (major, minor) = split_once(device, b':').ok_or_else(|| at.malformed("the device of a mount"))?;
    let device = (at.uint(major, 10, "the device of a mount")?, at.uint(minor, 10, "the device of a mount")?);
    let root = unescape_octal(at.word(&mut words, "the root of a mount")?);
    let live = root.strip_suffix(b"//deleted").map(<[u8]>::to_vec);
    let mut mount = Mount {
        id,
        parent,
        device,
        root_deleted: live.is_some(),
        root: live.unwrap_or(root),
        mount_point: unescape_octal(at.word(&mut words, "the place of a mount")?),
        options: at.word(&mut words, "the options of a mount")?.to_vec(),
        ..Mount::default()
    };
    loop {
        let word = at.word(&mut words, "the end of the optional fields of a mount")?;
        match (word, split_once(word, b':')) {
            (b"-", _) => break,
            (b"unbindable", _) => mount.unbindable = true,
            (_, Some((b"shared", group))) => mount.shared = Some(at.int(group, "shared")?),
            (_, Some((b"master", group))) => mount.master = Some(at.int(group, "master")?),
            (_, Some((b"propagate_from", group))) => mount.propagate_from = Some(at.int(group, "propagate_from")?),
            _ => return Err(at.malformed("an optional field of a mount")),
        }
    }
    mount.fs_type = unescape_octal(at.word(&mut words, "the type of a mount")?);
    let rest = words.exact_rest().strip_prefix(b" ").ok_or_else(|| at.missing("the source of a mount"))?;
    let (source, options) = split_once(rest, b' ').ok_or_else(|| at.missing("the options of a file system"))?;
    mount.source = unescape_octal(source);
    mount.super_options = unescape_octal(options);
    Ok(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real() {
        let mounts = parse(
            b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
              27 1 254:0 / / rw,relatime shared:1 master:2 propagate_from:3 unbindable - ext4 /dev/vda rw,discard,resuid=65534\n\
              40 31 0:37 /a\\040b//deleted /we\\040ird\\012\\134x rw - fuse.sshfs a\\040b rw\n\
              41 31 0:4 net:[4026531833] /run/netns/x rw shared:7 - nsfs nsfs rw\n\
              42 31 0:37 / /empty rw - tmpfs  rw\n",
        )
        .unwrap();
        assert_eq!((mounts[0].id, mounts[0].parent, mounts[0].device), (22, 27, (0, 21)));
        assert_eq!((mounts[1].shared, mounts[1].master, mounts[1].propagate_from), (Some(1), Some(2), Some(3)));
        assert!(mounts[1].unbindable);
        assert_eq!(mounts[1].super_options, b"rw,discard,resuid=65534");
        assert_eq!((&mounts[2].root[..], mounts[2].root_deleted), (&b"/a b"[..], true));
        assert_eq!(mounts[2].mount_point, b"/we ird\n\\x");
        assert_eq!(mounts[2].fs_type, b"fuse.sshfs");
        assert_eq!(mounts[3].root, b"net:[4026531833]");
        assert_eq!((&mounts[4].source[..], &mounts[4].super_options[..]), (&b""[..], &b"rw"[..]));
    }

    #[test]
    fn own() {
        let mut buffer = Vec::new();
        crate::proc::read_proc(std::path::Path::new("/proc/self/mountinfo"), &mut buffer).unwrap();
        assert!(parse(&buffer).unwrap().iter().any(|mount| mount.mount_point == b"/proc"));
    }

    #[test]
    fn hostile() {
        assert_eq!(parse(b""), Ok(Vec::new()));
        let line = b"27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw";
        for length in 1..line.len() - 2 {
            assert!(parse(&line[..length]).is_err(), "{length}");
        }
        for bad in ["\n", "1 2 3 / / rw - a b c", "1 2 3:4 / / rw new:1 - a b c", "99999999999 2 3:4 / / rw - a b c"] {
            assert!(parse(bad.as_bytes()).is_err());
        }
    }
}
