//! `/proc/PID/cgroup`: where a task is in each hierarchy.
//!
//! Paths are seen from the reader's cgroup namespace: `/../x` lies outside its root. `" (deleted)"` is appended when the
//! group is gone (its tasks are zombies then).
//!
//! Man page: cgroups(7).

use super::{split_once, Lines, ParseError};

/// Membership in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Number of the hierarchy: 0 for cgroup v2.
    pub hierarchy: u32,
    /// Controllers of a v1 hierarchy, and `name=…`; empty for v2.
    pub controllers: Vec<Vec<u8>>,
    /// The group.
    pub path: Vec<u8>,
    /// The group is gone.
    pub deleted: bool,
}

/// Reads the file.
///
/// # Errors
/// At the first line that is not `number:controllers:/path`.
pub fn parse(text: &[u8]) -> Result<Vec<Membership>, ParseError> {
    Lines::new("/proc/PID/cgroup", text)
        .map(|(at, line)| {
            let (hierarchy, rest) = split_once(line, b':').ok_or_else(|| at.missing("a hierarchy"))?;
            let (controllers, path) = split_once(rest, b':').ok_or_else(|| at.missing("a path"))?;
            let controllers = controllers.split(|&b| b == b',').filter(|name| !name.is_empty());
            let live = path.strip_suffix(b" (deleted)");
            if path.first() != Some(&b'/') {
                return Err(at.malformed("a path"));
            }
            Ok(Membership {
                hierarchy: at.uint(hierarchy, 10, "a hierarchy")?,
                controllers: controllers.map(<[u8]>::to_vec).collect(),
                path: live.unwrap_or(path).to_vec(),
                deleted: live.is_some(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real() {
        let groups =
            parse(b"9:name=systemd:/\n4:memory:/process_api/ce1e\n2:cpu,cpuacct:/a:b,c (deleted)\n0::/../x\n").unwrap();
        assert_eq!(groups.len(), 4);
        assert_eq!(groups[0].controllers, [b"name=systemd"]);
        assert_eq!(groups[1].path, b"/process_api/ce1e");
        assert_eq!((&groups[2].path[..], groups[2].deleted), (&b"/a:b,c"[..], true));
        assert_eq!(groups[2].controllers, [&b"cpu"[..], b"cpuacct"]);
        assert_eq!((groups[3].hierarchy, groups[3].controllers.len(), &groups[3].path[..]), (0, 0, &b"/../x"[..]));
    }

    #[test]
    fn hostile() {
        assert_eq!(parse(b""), Ok(Vec::new()));
        for bad in ["\n", "0", "0:", "0::", "0::x", ":a:/", "4294967296::/", "-1::/"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
