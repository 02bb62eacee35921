//! `/proc/locks`, and the same lines in `/proc/PID/fdinfo/N` behind `lock:`.
//!
//! Numbers of locks are only good for one reading. In `/proc/locks` a waiter follows what it waits for and has its number;
//! `fdinfo` lists what was taken through that description and knows no waiters. Owners are in the reader's PID namespace:
//! 0 for a task that is not visible there, -1 for a lock of an open file description.
//!
//! Man page: proc_locks(5).

use super::{split_once, Lines, ParseError, Place, Words};

/// Who a lock belongs to, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// fcntl(F_SETLK), of a process.
    Posix,
    /// fcntl(F_OFD_SETLK), of an open file description.
    Ofd,
    /// flock(2).
    Flock,
    /// fcntl(F_SETLEASE).
    Lease,
    /// A delegation of the NFS server.
    Delegation,
    /// Made for a check, and gone at once.
    Access,
}

/// What it keeps others from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockAccess {
    /// F_RDLCK.
    Read,
    /// F_WRLCK.
    Write,
    /// F_UNLCK: a lease that is being given up.
    Unlock,
}

/// The state of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// In force.
    Active,
    /// Somebody wants the file, and the holder was told.
    Breaking,
    /// This is who wants it.
    Breaker,
}

/// One lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Number in this text.
    pub id: u64,
    /// Not a lock but one that waits for it (`->`).
    pub waits: bool,
    /// Kind.
    pub kind: LockKind,
    /// State; for leases and delegations only.
    pub lease: Option<LeaseState>,
    /// `MANDATORY` (kernels before 5.15).
    pub mandatory: bool,
    /// Access.
    pub access: LockAccess,
    /// Owner in the reader's PID namespace.
    pub pid: i32,
    /// Device of the file system, as the super block has it: not always what stat(2) says. None if the file is gone.
    pub device: Option<(u32, u32)>,
    /// Inode of the file.
    pub inode: u64,
    /// First byte.
    pub start: u64,
    /// Last byte; none for all that may follow.
    pub end: Option<u64>,
}

/// Reads `/proc/locks`.
///
/// # Errors
/// At the first line that is not a lock.
pub fn parse(text: &[u8]) -> Result<Vec<Lock>, ParseError> {
    Lines::new("/proc/locks", text).map(|(at, line)| lock(at, line)).collect()
}

/// `1: POSIX  ADVISORY  WRITE 9683 fe:00:10014660 5 14`.
pub(super) fn lock(at: Place, line: &[u8]) -> Result<Lock, ParseError> {
    let (id, rest) = split_once(line, b':').ok_or_else(|| at.missing("the number of a lock"))?;
    let id = at.uint(id, 10, "the number of a lock")?;
    let mut words = Words::new(rest);
    let mut word = at.word(&mut words, "the kind of a lock")?;
    let mut waits = false;
    if word == b"->" {
        waits = true;
        word = at.word(&mut words, "the kind of a lock")?;
    }
    let kind = match word {
        b"POSIX" => LockKind::Posix,
        b"OFDLCK" => LockKind::Ofd,
        b"FLOCK" => LockKind::Flock,
        b"LEASE" => LockKind::Lease,
        b"DELEG" => LockKind::Delegation,
        b"ACCESS" => LockKind::Access,
        _ => return Err(at.malformed("the kind of a lock")),
    };
    let (lease, mandatory) = match at.word(&mut words, "the mode of a lock")? {
        b"ADVISORY" | b"*NOINODE*" | b"MSNFS" => (None, false),
        b"MANDATORY" => (None, true),
        b"ACTIVE" => (Some(LeaseState::Active), false),
        b"BREAKING" => (Some(LeaseState::Breaking), false),
        b"BREAKER" => (Some(LeaseState::Breaker), false),
        _ => return Err(at.malformed("the mode of a lock")),
    };
    let access = match at.word(&mut words, "the access of a lock")? {
        b"READ" => LockAccess::Read,
        b"WRITE" => LockAccess::Write,
        b"UNLCK" => LockAccess::Unlock,
        _ => return Err(at.malformed("the access of a lock")),
    };
    let pid = at.next_int(&mut words, "the owner of a lock")?;
    let (device, inode) = file(at, at.word(&mut words, "the file of a lock")?)?;
    let start = at.next_uint(&mut words, 10, "the start of a lock")?;
    let end = match at.word(&mut words, "the end of a lock")? {
        b"EOF" => None,
        number => Some(at.uint(number, 10, "the end of a lock")?),
    };
    if end.is_some_and(|end| end < start) || words.next().is_some() {
        return Err(at.malformed("the end of a lock"));
    }
    Ok(Lock { id, waits, kind, lease, mandatory, access, pid, device, inode, start, end })
}

/// `fe:00:10014660`, or `<none>:0`.
fn file(at: Place, word: &[u8]) -> Result<(Option<(u32, u32)>, u64), ParseError> {
    const FIELD: &str = "the file of a lock";
    if word == b"<none>:0" {
        return Ok((None, 0));
    }
    let mut parts = word.split(|&b| b == b':');
    let mut part = |radix| at.uint::<u64>(parts.next().unwrap_or_default(), radix, FIELD);
    let (major, minor, inode) = (part(16)?, part(16)?, part(10)?);
    let narrow = |n: u64| u32::try_from(n).map_err(|_| at.malformed(FIELD));
    match parts.next() {
        None => Ok((Some((narrow(major)?, narrow(minor)?)), inode)),
        Some(_) => Err(at.malformed(FIELD)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real() {
        let locks = parse(
            b"1: LEASE  ACTIVE    READ 9683 fe:00:10014084 0 EOF\n\
            2: OFDLCK ADVISORY  READ -1 fe:00:10014660 100 EOF\n\
            3: POSIX  ADVISORY  WRITE 9683 fe:00:10014660 5 14\n\
            3: -> POSIX  ADVISORY  WRITE 9724 fe:00:10014660 5 14\n\
            4: FLOCK  ADVISORY  READ 11695 fe:00:10014084 0 EOF\n\
            5: POSIX  *NOINODE* WRITE 1 <none>:0 0 EOF\n\
            6: DELEG  BREAKING  UNLCK 0 103:ff:1 0 EOF\n",
        )
        .unwrap();
        assert_eq!(locks.len(), 7);
        assert_eq!((locks[0].kind, locks[0].lease), (LockKind::Lease, Some(LeaseState::Active)));
        assert_eq!((locks[1].kind, locks[1].pid, locks[1].start, locks[1].end), (LockKind::Ofd, -1, 100, None));
        assert_eq!((locks[2].device, locks[2].inode), (Some((0xfe, 0)), 10014660));
        assert_eq!((locks[2].start, locks[2].end, locks[2].waits), (5, Some(14), false));
        assert!(locks[3].waits && locks[3].id == 3 && locks[3].access == LockAccess::Write);
        assert_eq!(locks[5].device, None);
        assert_eq!(locks[6].device, Some((0x103, 0xff)));
    }

    #[test]
    fn hostile() {
        assert_eq!(parse(b""), Ok(Vec::new()));
        let line = b"3: -> POSIX  ADVISORY  WRITE 9724 fe:00:10014660 5 14";
        for length in 1..line.len() - 1 {
            assert!(parse(&line[..length]).is_err());
        }
        for bad in [
            "\n",
            "1: NEW ADVISORY READ 1 0:0:0 0 EOF",
            "1: POSIX ADVISORY READ 1 0:0:0:0 0 EOF",
            "1: POSIX ADVISORY READ 1 0:0:0 9 8",
            "1: POSIX ADVISORY READ 1 0:0:0 0 EOF EOF",
        ] {
            assert!(parse(bad.as_bytes()).is_err());
        }
    }
}
