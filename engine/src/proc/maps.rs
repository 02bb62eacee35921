//! `/proc/PID/maps` and `/proc/PID/smaps`: the areas of an address space.
//!
//! One parser reads both; what only `smaps` says is zero or empty for `maps`. `smaps` walks page tables, so ask for it only
//! when [`Vma::vm_flags`] is needed; it is, in a dump.
//!
//! The kernel escapes only the newline in a path (as `\012`), and not the backslash: a file whose name really contains the
//! four characters `\012` cannot be told from one with a newline, nor one really named "x (deleted)" from a deleted "x".
//! `readlink` of `/proc/PID/map_files/START-END` settles the first, `stat` through it the second.
//!
//! Areas are given as the kernel prints them. While another task that shares the address space runs, they may overlap.
//!
//! Man pages: proc_pid_maps(5), proc_pid_smaps(5).

use std::fmt;

use super::{split_once, uint, Lines, ParseError, Place};

/// One area.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// PROT_READ.
    pub read: bool,
    /// PROT_WRITE.
    pub write: bool,
    /// PROT_EXEC.
    pub exec: bool,
    /// May be written to what backs it: MAP_SHARED (or a shared mapping that was opened for reading).
    pub shared: bool,
    /// Where in the file it starts, in bytes.
    pub offset: u64,
    /// Device of the file, as `stat` through the area's file system gives it.
    pub dev_major: u32,
    /// See `dev_major`.
    pub dev_minor: u32,
    /// Inode of the file; zero for anonymous memory.
    pub inode: u64,
    /// Path of the file or the kernel's name for it, without " (deleted)".
    pub path: Option<Vec<u8>>,
    /// The path ended in " (deleted)".
    pub deleted: bool,
    /// `VmFlags` of `smaps`.
    pub vm_flags: VmFlags,
    /// Flags that this program does not know, as two letters each. A dump must refuse them or know why not.
    pub unknown_flags: Vec<[u8; 2]>,
    /// Size of a page there: 4, or that of huge pages.
    pub kernel_page_size_kb: u64,
    /// Present memory.
    pub rss_kb: u64,
    /// Present memory that belongs to no file.
    pub anonymous_kb: u64,
    /// Memory in swap.
    pub swap_kb: u64,
    /// Locked memory.
    pub locked_kb: u64,
    /// Present huge pages (hugetlb), shared.
    pub shared_hugetlb_kb: u64,
    /// Present huge pages (hugetlb), private.
    pub private_hugetlb_kb: u64,
    /// Memory protection key, where the CPU has them.
    pub protection_key: Option<u32>,
}

/// What an area is, by the name that the kernel gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaName<'a> {
    /// No name: private anonymous memory.
    Anonymous,
    /// `[heap]`: it touches the break.
    Heap,
    /// `[stack]`: the main thread's, or what it has become.
    Stack,
    /// `[vdso]`.
    Vdso,
    /// `[vvar]`.
    Vvar,
    /// `[vvar_vclock]`, since 6.13.
    VvarVclock,
    /// `[vsyscall]`: not a real area.
    Vsyscall,
    /// `[uprobes]`.
    Uprobes,
    /// `[anon:NAME]`: named by prctl(PR_SET_VMA_ANON_NAME).
    NamedAnonymous(&'a [u8]),
    /// `[anon_shmem:NAME]`: the same for shared memory.
    NamedSharedAnonymous(&'a [u8]),
    /// `/dev/zero (deleted)`: shared anonymous memory. Told from a deleted file of that name by its file system only.
    SharedAnonymous,
    /// `/SYSVxxxxxxxx (deleted)`: System V shared memory with its key; the inode is the identifier.
    SysV(u32),
    /// `/memfd:NAME (deleted)`.
    Memfd(&'a [u8]),
    /// `/anon_hugepage (deleted)`: MAP_ANONYMOUS | MAP_HUGETLB.
    AnonymousHuge,
    /// `/[aio] (deleted)`: the ring of an AIO context.
    AioRing,
    /// `anon_inode:NAME`: a mapping of io_uring, perf_event and the like.
    AnonInode(&'a [u8]),
    /// `socket:[N]`: the ring of a packet socket.
    Socket(u64),
    /// Another name in brackets: a special mapping that this program does not know.
    UnknownSpecial(&'a [u8]),
    /// A file.
    File(&'a [u8]),
}

impl Vma {
    /// Bytes from start to end.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// What its name says it is.
    #[must_use]
    pub fn name(&self) -> VmaName<'_> {
        let Some(path) = self.path.as_deref() else { return VmaName::Anonymous };
        match path {
            b"[heap]" => VmaName::Heap,
            b"[stack]" => VmaName::Stack,
            b"[vdso]" => VmaName::Vdso,
            b"[vvar]" => VmaName::Vvar,
            b"[vvar_vclock]" => VmaName::VvarVclock,
            b"[vsyscall]" => VmaName::Vsyscall,
            b"[uprobes]" => VmaName::Uprobes,
            b"/dev/zero" if self.deleted => VmaName::SharedAnonymous,
            b"/anon_hugepage" | b"//anon_hugepage" if self.deleted => VmaName::AnonymousHuge,
            b"/[aio]" if self.deleted => VmaName::AioRing,
            [b'/', ..] if self.deleted => deleted_name(path),
            [b'/', ..] => VmaName::File(path),
            _ => unrooted_name(path),
        }
    }
}

/// The name of a deleted file, which may be one of the kernel's own.
fn deleted_name(path: &[u8]) -> VmaName<'_> {
    if let Some(name) = path.strip_prefix(b"/memfd:") {
        return VmaName::Memfd(name);
    }
    let key = path.strip_prefix(b"/SYSV").filter(|key| key.len() == 8).and_then(|key| uint(key, 16));
    match key.and_then(|key| u32::try_from(key).ok()) {
        Some(key) => VmaName::SysV(key),
        None => VmaName::File(path),
    }
}

/// A name that is no path.
fn unrooted_name(path: &[u8]) -> VmaName<'_> {
    fn inside<'a>(path: &'a [u8], before: &[u8]) -> Option<&'a [u8]> {
        path.strip_prefix(before)?.strip_suffix(b"]")
    }
    if let Some(name) = inside(path, b"[anon:") {
        VmaName::NamedAnonymous(name)
    } else if let Some(name) = inside(path, b"[anon_shmem:") {
        VmaName::NamedSharedAnonymous(name)
    } else if let Some(name) = path.strip_prefix(b"anon_inode:") {
        VmaName::AnonInode(name)
    } else if let Some(number) = inside(path, b"socket:[").and_then(|n| uint(n, 10)) {
        VmaName::Socket(number)
    } else if path.first() == Some(&b'[') {
        VmaName::UnknownSpecial(path)
    } else {
        VmaName::File(path)
    }
}

macro_rules! vm_flags {
    ($($(#[$doc:meta])* $name:ident = $letters:literal, $bit:literal;)*) => {
        impl VmFlags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// The flag of these two letters.
            #[must_use]
            pub fn from_letters(letters: [u8; 2]) -> Option<Self> {
                $(if letters == *$letters { return Some(Self::$name); })*
                None
            }

            /// Every flag that is known, with its letters.
            pub const ALL: &'static [(Self, &'static [u8; 2])] = &[$((Self::$name, $letters)),*];
        }
    };
}

/// The set of flags that `smaps` prints as pairs of letters.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VmFlags(u64);

vm_flags! {
    /// Readable.
    READ = b"rd", 0;
    /// Writable.
    WRITE = b"wr", 1;
    /// Executable.
    EXEC = b"ex", 2;
    /// Shared.
    SHARED = b"sh", 3;
    /// May become readable.
    MAY_READ = b"mr", 4;
    /// May become writable.
    MAY_WRITE = b"mw", 5;
    /// May become executable.
    MAY_EXEC = b"me", 6;
    /// May be shared.
    MAY_SHARE = b"ms", 7;
    /// MAP_GROWSDOWN: a stack.
    GROWS_DOWN = b"gd", 8;
    /// Pure page frame numbers: a device.
    PFN_MAP = b"pf", 9;
    /// The file must not be written elsewhere (old kernels).
    DENY_WRITE = b"dw", 10;
    /// mlock.
    LOCKED = b"lo", 11;
    /// Memory of a device.
    IO = b"io", 12;
    /// MADV_SEQUENTIAL.
    SEQUENTIAL = b"sr", 13;
    /// MADV_RANDOM.
    RANDOM = b"rr", 14;
    /// MADV_DONTFORK.
    DONT_COPY = b"dc", 15;
    /// mremap may not enlarge it.
    DONT_EXPAND = b"de", 16;
    /// MLOCK_ONFAULT.
    LOCK_ON_FAULT = b"lf", 17;
    /// Counts as committed memory.
    ACCOUNT = b"ac", 18;
    /// MAP_NORESERVE.
    NO_RESERVE = b"nr", 19;
    /// hugetlb pages.
    HUGETLB = b"ht", 20;
    /// MAP_SYNC.
    SYNC = b"sf", 21;
    /// Non-linear (old kernels).
    NONLINEAR = b"nl", 22;
    /// For the architecture's own use; on x86 PAT.
    ARCH_1 = b"ar", 23;
    /// MADV_WIPEONFORK.
    WIPE_ON_FORK = b"wf", 24;
    /// MADV_DONTDUMP.
    DONT_DUMP = b"dd", 25;
    /// Soft-dirty: written, or new, since clear_refs.
    SOFT_DIRTY = b"sd", 26;
    /// Mixed page frames: a device.
    MIXED_MAP = b"mm", 27;
    /// MADV_HUGEPAGE.
    HUGEPAGE = b"hg", 28;
    /// MADV_NOHUGEPAGE.
    NO_HUGEPAGE = b"nh", 29;
    /// MADV_MERGEABLE.
    MERGEABLE = b"mg", 30;
    /// Memory tagging (arm64).
    MTE = b"mt", 31;
    /// Branch target identification (arm64).
    BTI = b"bt", 32;
    /// Watched by userfaultfd for missing pages.
    UFFD_MISSING = b"um", 33;
    /// Watched by userfaultfd for writes.
    UFFD_WP = b"uw", 34;
    /// Watched by userfaultfd for minor faults.
    UFFD_MINOR = b"ui", 35;
    /// Shadow stack.
    SHADOW_STACK = b"ss", 36;
    /// mseal.
    SEALED = b"sl", 37;
    /// MAP_DROPPABLE.
    DROPPABLE = b"dp", 38;
    /// Intel MPX (old kernels).
    MPX = b"mp", 39;
    /// Parts may be guarded (MADV_GUARD_INSTALL).
    MAYBE_GUARD = b"gu", 40;
}

impl VmFlags {
    /// No flag.
    #[must_use]
    pub const fn empty() -> Self {
        Self(0)
    }

    /// True if none is set, as for an area from `maps`.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True if all of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// All but those of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// True if one of `other` is set.
    #[must_use]
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOr for VmFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl fmt::Debug for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmFlags(")?;
        let mut before = "";
        for (flag, letters) in Self::ALL {
            if self.contains(*flag) {
                write!(f, "{before}{}", String::from_utf8_lossy(*letters))?;
                before = " ";
            }
        }
        write!(f, ")")
    }
}

/// Reads `/proc/PID/maps` or `/proc/PID/smaps`.
///
/// # Errors
/// At the first line that is neither an area nor, in `smaps`, a fact about one.
pub fn parse(text: &[u8]) -> Result<Vec<Vma>, ParseError> {
    let mut areas = Vec::new();
    parse_each(text, |area| areas.push(area))?;
    Ok(areas)
}

/// How much of the beginning of a `smaps` is areas that are there to their last line, `VmFlags`: what can be parsed before the
/// rest is read. Zero if there is none.
#[must_use]
pub fn whole_areas(text: &[u8]) -> usize {
    const LAST: &[u8] = b"\nVmFlags:";
    let mut end = text.len();
    while let Some(at) = text[..end].windows(LAST.len()).rposition(|w| w == LAST) {
        if let Some(line) = text[at + 1..].iter().position(|&b| b == b'\n') {
            return at + 1 + line + 1;
        }
        end = at;
    }
    0
}

/// Like [`parse`], and hands each area over when it is complete.
///
/// # Errors
/// As [`parse`]; areas before the bad line have been handed over.
pub fn parse_each(text: &[u8], mut take: impl FnMut(Vma)) -> Result<(), ParseError> {
    let mut current: Option<Vma> = None;
    for (place, line) in Lines::new("/proc/PID/smaps", text) {
        match (line.first(), current.as_mut()) {
            (Some(b'0'..=b'9' | b'a'..=b'f'), _) => {
                if let Some(done) = current.replace(header(place, line)?) {
                    take(done);
                }
            }
            (Some(b'A'..=b'Z'), Some(area)) => fact(place, line, area)?,
            _ => return Err(place.malformed("the line of an area")),
        }
    }
    if let Some(done) = current {
        take(done);
    }
    Ok(())
}

/// `7f..-7f.. rw-p 00000000 fe:00 18504     /path`.
fn header(place: Place, line: &[u8]) -> Result<Vma, ParseError> {
    let (start, rest) = split_once(line, b'-').ok_or_else(|| place.malformed("the start of an area"))?;
    let (end, rest) = split_once(rest, b' ').ok_or_else(|| place.malformed("the end of an area"))?;
    let (perms, rest) = split_once(rest, b' ').ok_or_else(|| place.malformed("the permissions of an area"))?;
    let (offset, rest) = split_once(rest, b' ').ok_or_else(|| place.malformed("the offset of an area"))?;
    let (device, rest) = split_once(rest, b' ').ok_or_else(|| place.malformed("the device of an area"))?;
    let (major, minor) = split_once(device, b':').ok_or_else(|| place.malformed("the device of an area"))?;
    let (inode, rest) = split_once(rest, b' ').unwrap_or((rest, &[]));
    let &[r @ (b'r' | b'-'), w @ (b'w' | b'-'), x @ (b'x' | b'-'), s @ (b's' | b'p')] = perms else {
        return Err(place.malformed("the permissions of an area"));
    };
    let mut area = Vma {
        start: place.uint(start, 16, "the start of an area")?,
        end: place.uint(end, 16, "the end of an area")?,
        read: r == b'r',
        write: w == b'w',
        exec: x == b'x',
        shared: s == b's',
        offset: place.uint(offset, 16, "the offset of an area")?,
        dev_major: place.uint(major, 16, "the device of an area")?,
        dev_minor: place.uint(minor, 16, "the device of an area")?,
        inode: place.uint(inode, 10, "the inode of an area")?,
        ..Vma::default()
    };
    if area.start >= area.end {
        return Err(place.malformed("the end of an area"));
    }
    let padding = rest.iter().take_while(|&&b| b == b' ').count();
    let name = rest.get(padding..).unwrap_or_default();
    if !name.is_empty() {
        let live = name.strip_suffix(b" (deleted)");
        area.deleted = live.is_some();
        let name = live.unwrap_or(name);
        area.path = Some(if name.contains(&b'\\') { unescape_newline(name) } else { name.to_vec() });
    }
    Ok(area)
}

/// Only the newline is escaped in these files, so only that is turned back.
fn unescape_newline(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let [first, tail @ ..] = rest {
        match rest.strip_prefix(b"\\012") {
            Some(after) => {
                out.push(b'\n');
                rest = after;
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// `Rss:    12 kB`, `VmFlags: rd wr`, and those that are of no interest.
fn fact(place: Place, line: &[u8], area: &mut Vma) -> Result<(), ParseError> {
    let (key, value) = split_once(line, b':').ok_or_else(|| place.malformed("a fact about an area"))?;
    let size = |field| place.uint(value.strip_suffix(b" kB").unwrap_or(value), 10, field);
    match key {
        b"KernelPageSize" => area.kernel_page_size_kb = size("KernelPageSize")?,
        b"Rss" => area.rss_kb = size("Rss")?,
        b"Anonymous" => area.anonymous_kb = size("Anonymous")?,
        b"Swap" => area.swap_kb = size("Swap")?,
        b"Locked" => area.locked_kb = size("Locked")?,
        b"Shared_Hugetlb" => area.shared_hugetlb_kb = size("Shared_Hugetlb")?,
        b"Private_Hugetlb" => area.private_hugetlb_kb = size("Private_Hugetlb")?,
        b"ProtectionKey" => area.protection_key = Some(place.uint(value, 10, "ProtectionKey")?),
        b"VmFlags" => {
            for word in value.split(|&b| b == b' ').filter(|word| !word.is_empty()) {
                let letters = <[u8; 2]>::try_from(word).map_err(|_| place.malformed("VmFlags"))?;
                match VmFlags::from_letters(letters) {
                    Some(flag) => area.vm_flags = area.vm_flags | flag,
                    None => area.unknown_flags.push(letters),
                }
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
#[path = "maps_tests.rs"]
mod tests;
