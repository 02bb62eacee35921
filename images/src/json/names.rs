//! Names for numbers: flags, states, socket families.

/// Names of bits.
type Bits = &'static [(&'static str, u64)];
/// Names of values.
type Values = &'static [(u64, &'static str)];

const PROT: Bits = &[("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)];

const MAP: Bits =
    &[("MAP_SHARED", 0x1), ("MAP_PRIVATE", 0x2), ("MAP_DROPPABLE", 0x8), ("MAP_ANON", 0x20), ("MAP_GROWSDOWN", 0x100)];

const AREA: Bits = &[
    ("VMA_AREA_NONE", 0),
    ("VMA_AREA_REGULAR", 1 << 0),
    ("VMA_AREA_STACK", 1 << 1),
    ("VMA_AREA_VSYSCALL", 1 << 2),
    ("VMA_AREA_VDSO", 1 << 3),
    ("VMA_AREA_HEAP", 1 << 5),
    ("VMA_FILE_PRIVATE", 1 << 6),
    ("VMA_FILE_SHARED", 1 << 7),
    ("VMA_ANON_SHARED", 1 << 8),
    ("VMA_ANON_PRIVATE", 1 << 9),
    ("VMA_AREA_SYSVIPC", 1 << 10),
    ("VMA_AREA_SOCKET", 1 << 11),
    ("VMA_AREA_VVAR", 1 << 12),
    ("VMA_AREA_AIORING", 1 << 13),
    ("VMA_AREA_MEMFD", 1 << 14),
    ("VMA_AREA_SHSTK", 1 << 15),
    ("VMA_AREA_UPROBES", 1 << 17),
    ("VMA_UNSUPP", 1 << 31),
];

const OPEN: Bits = &[
    ("O_WRONLY", 0o1),
    ("O_RDWR", 0o2),
    ("O_CREAT", 0o100),
    ("O_EXCL", 0o200),
    ("O_NOCTTY", 0o400),
    ("O_TRUNC", 0o1000),
    ("O_APPEND", 0o2000),
    ("O_NONBLOCK", 0o4000),
    ("O_DSYNC", 0o1_0000),
    ("FASYNC", 0o2_0000),
    ("O_DIRECT", 0o4_0000),
    ("O_LARGEFILE", 0o10_0000),
    ("O_DIRECTORY", 0o20_0000),
    ("O_NOFOLLOW", 0o40_0000),
    ("O_NOATIME", 0o100_0000),
    ("O_CLOEXEC", 0o200_0000),
];

const SEALS: Bits = &[
    ("F_SEAL_SEAL", 0x1),
    ("F_SEAL_SHRINK", 0x2),
    ("F_SEAL_GROW", 0x4),
    ("F_SEAL_WRITE", 0x8),
    ("F_SEAL_FUTURE_WRITE", 0x10),
];

const PAGES: Bits = &[("PE_PARENT", 1), ("PE_LAZY", 2), ("PE_PRESENT", 4), ("PE_PAYLOAD_ALIGNED", 8)];

const TASK_STATE: Values = &[(1, "Alive"), (3, "Zombie"), (6, "Stopped")];

const FAMILY: Values = &[(1, "UNIX"), (2, "INET"), (10, "INET6"), (16, "NETLINK"), (17, "PACKET")];

const SOCKET_TYPE: Values = &[(1, "STREAM"), (2, "DGRAM"), (3, "RAW"), (5, "SEQPACKET"), (10, "PACKET")];

const SOCKET_STATE: Values = &[
    (1, "ESTABLISHED"),
    (2, "SYN_SENT"),
    (3, "SYN_RECV"),
    (4, "FIN_WAIT1"),
    (5, "FIN_WAIT2"),
    (6, "TIME_WAIT"),
    (7, "CLOSE"),
    (8, "CLOSE_WAIT"),
    (9, "LAST_ACK"),
    (10, "LISTEN"),
];

const PROTOCOL: Values = &[(0, "IP"), (6, "TCP"), (17, "UDP"), (136, "UDPLITE")];

/// The bits that a field's `flags` option means.
pub(super) fn bits(option: &str) -> Option<Bits> {
    Some(match option {
        "mmap.prot" => PROT,
        "mmap.flags" => MAP,
        "mmap.status" => AREA,
        "rfile.flags" => OPEN,
        "seals.flags" => SEALS,
        "pmap.flags" => PAGES,
        _ => return None,
    })
}

/// The values that a field's `dict` option means; they depend on the field's name too.
pub(super) fn values(option: &str, field: &str) -> Option<Values> {
    Some(match (option, field) {
        ("gen", "task_state") => TASK_STATE,
        ("sk", "family") => FAMILY,
        ("sk", "type") => SOCKET_TYPE,
        ("sk", "state") => SOCKET_STATE,
        ("sk", "proto") => PROTOCOL,
        _ => return None,
    })
}

/// Flags by name; bits without a name as a number at the end.
pub(super) fn flags(value: u64, bits: Bits) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut left = value;
    for (name, bit) in bits {
        if value & bit != 0 {
            parts.push((*name).to_owned());
            left &= !bit;
        }
    }
    if left != 0 {
        parts.push(format!("{left:#x}"));
    }
    parts.join(" | ")
}

/// The value of flags by name.
pub(super) fn from_flags(text: &str, bits: Bits) -> Result<u64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    text.split('|').map(str::trim).try_fold(0_u64, |value, part| {
        let bit = bits.iter().find(|(name, _)| *name == part).map(|(_, bit)| *bit);
        let bit = bit.or_else(|| number(part).and_then(|number| u64::try_from(number).ok()));
        Ok(value | bit.ok_or_else(|| part.to_owned())?)
    })
}

/// A number as people write it: decimal, or with `0x`, `0o`, `0b` before it.
pub(super) fn number(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    if !digits.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let (radix, digits) = match digits.get(..2) {
        Some("0x" | "0X") => (16, digits.get(2..)?),
        Some("0o" | "0O") => (8, digits.get(2..)?),
        Some("0b" | "0B") => (2, digits.get(2..)?),
        _ => (10, digits),
    };
    // Parsed as unsigned, so that no second sign gets through.
    let value = i128::from(u64::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'))?);
    Some(if negative { -value } else { value })
}

/// Bits of a minor number in the kernel's own encoding of a device.
const MINOR_BITS: u32 = 20;

/// A device as major:minor. `user` tells the encoding that programs see from the kernel's own.
pub(super) fn device(value: u64, user: bool) -> String {
    let (major, minor) = if user {
        ((value >> 8 & 0xfff) | (value >> 32 & !0xfff), (value & 0xff) | (value >> 12 & 0xffff_ff00))
    } else {
        (value >> MINOR_BITS, value & ((1 << MINOR_BITS) - 1))
    };
    format!("{major}:{minor}")
}

/// The number of a device that is given as major:minor.
pub(super) fn from_device(text: &str, user: bool) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let (major, minor) = (u64::from(major.parse::<u32>().ok()?), u64::from(minor.parse::<u32>().ok()?));
    Some(if user {
        (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12 | (major & !0xfff) << 32
    } else {
        major << MINOR_BITS | minor
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        assert_eq!(flags(0x23, MAP), "MAP_SHARED | MAP_PRIVATE | MAP_ANON");
        assert_eq!(flags(0x8003, PROT), "PROT_READ | PROT_WRITE | 0x8000");
        assert_eq!(from_flags("PROT_READ|PROT_WRITE | 0x8000", PROT), Ok(0x8003));
        assert_eq!(from_flags("PROT_FLY", PROT), Err("PROT_FLY".to_owned()));
        assert_eq!(from_flags("", PROT), Ok(0));
        for value in [0, 1, 0x10_0003, 0x8800_0001, 0xfff0_00ff] {
            for user in [false, true] {
                assert_eq!(from_device(&device(value, user), user), Some(value), "{value:#x} {user}");
            }
        }
        assert_eq!(device(0x801, true), "8:1");
        assert_eq!(device(0x80_0001, false), "8:1");
        assert_eq!(number("-0x1"), Some(-1));
        assert_eq!(number("0xffffffffffffffff"), Some(u64::MAX.into()));
        for wrong in ["", "-", "0x", "0x-1", "+1", "0x+1", "1_0", "x", "99999999999999999999999"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
    }
}
