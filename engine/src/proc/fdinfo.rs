//! `/proc/PID/fdinfo/N`: where an open file stands, its locks, and what its kind says of itself.
//!
//! Numbers come in the base that the kernel chose: `flags` and timer flags octal, inotify and fanotify hexadecimal
//! throughout (watch descriptors too), devices there in the kernel's own encoding, 12 bits of major and 20 of minor.
//! The kind itself is told by the descriptor's link (`links.rs`): an epoll that waits for nothing prints nothing of its own,
//! and is [`FdDetail::None`] like a plain file. Lines that this program does not know are kept in
//! [`FdInfo::other`], so that a caller can refuse rather than lose.
//!
//! Man page: proc_pid_fdinfo(5).

use super::io_uring::IoUring;
use super::locks::{lock, Lock};
use super::{hex_bytes, split_once, uint, Lines, ParseError, Place, Problem, Words};

/// What an open file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// Offset.
    pub pos: i64,
    /// Open flags, and O_CLOEXEC of this descriptor.
    pub flags: u32,
    /// Mount, as in mountinfo; internal mounts have numbers that are not there.
    pub mnt_id: i32,
    /// Inode (since 5.14).
    pub ino: Option<u64>,
    /// Locks taken through it.
    pub locks: Vec<Lock>,
    /// What its kind adds.
    pub detail: FdDetail,
    /// Lines that this program does not know.
    pub other: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a kind of file adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum FdDetail {
    /// Nothing.
    #[default]
    None,
    /// eventfd(2).
    Eventfd {
        /// Counter.
        count: u64,
        /// Identity, the same for all descriptors of one eventfd (since 5.2).
        id: Option<i32>,
        /// EFD_SEMAPHORE (since 6.5); none if the kernel does not say.
        semaphore: Option<bool>,
    },
    /// signalfd(2): the set.
    Signalfd(u64),
    /// epoll(7): what it waits for.
    Epoll(Vec<EpollTarget>),
    /// inotify(7): watches, newest first.
    Inotify(Vec<InotifyWatch>),
    /// fanotify(7).
    Fanotify(Fanotify),
    /// timerfd_create(2).
    Timerfd(Timerfd),
    /// pidfd_open(2).
    Pidfd {
        /// Process in the reader's namespace; 0 if not visible, -1 if it has ended and been reaped.
        pid: i32,
        /// In each PID namespace from the reader's on.
        ns_pid: Vec<i32>,
    },
    /// io_uring_setup(2).
    IoUring(Box<IoUring>),
    /// /dev/net/tun: name of the interface, empty if none is attached.
    Tun(Vec<u8>),
    /// A BPF map.
    BpfMap(BpfMap),
    /// A BPF program.
    BpfProgram {
        /// BPF_PROG_TYPE_.
        prog_type: u32,
        /// Identity.
        id: u32,
    },
    /// A BPF link, all that it says.
    BpfLink(Vec<(Vec<u8>, Vec<u8>)>),
    /// A direct rendering device, all that it says.
    Drm(Vec<(Vec<u8>, Vec<u8>)>),
    /// A dma-buf: length, and who exported it.
    DmaBuf {
        /// Length in bytes.
        size: u64,
        /// Exporter.
        exporter: Vec<u8>,
    },
    /// A unix socket: descriptors that are under way to it.
    UnixSocket {
        /// How many.
        scm_fds: u32,
    },
    /// userfaultfd(2).
    Userfaultfd {
        /// Faults that nobody has read.
        pending: u64,
        /// Faults that nobody has answered.
        total: u64,
        /// `API:` as printed: version, features asked for, features there are.
        api: Vec<u8>,
    },
}

/// One file that an epoll waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollTarget {
    /// Descriptor under which it was added: it may be closed by now, or be another file.
    pub tfd: i32,
    /// EPOLL flags, with those that the kernel adds.
    pub events: u32,
    /// What the program gave.
    pub data: u64,
    /// Offset of the file.
    pub pos: i64,
    /// Inode of the file.
    pub ino: u64,
    /// Device of its file system, in the kernel's encoding.
    pub sdev: u32,
}

/// A file handle as name_to_handle_at(2) gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileHandle {
    /// Type.
    pub kind: u32,
    /// Bytes.
    pub bytes: Vec<u8>,
}

/// One inotify watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Watch descriptor.
    pub wd: i32,
    /// Inode.
    pub ino: u64,
    /// Device of its file system, in the kernel's encoding.
    pub sdev: u32,
    /// IN_ flags.
    pub mask: u32,
    /// Always zero.
    pub ignored_mask: u32,
    /// Handle of the file; none where the file system has none.
    pub handle: Option<FileHandle>,
}

/// A fanotify group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fanotify {
    /// Flags of fanotify_init.
    pub flags: u32,
    /// Flags of the descriptors in its events.
    pub event_flags: u32,
    /// Marks.
    pub marks: Vec<FanotifyMark>,
}

/// One fanotify mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FanotifyMark {
    /// On what.
    pub target: FanotifyTarget,
    /// Flags of the mark.
    pub mflags: u32,
    /// Events.
    pub mask: u64,
    /// Events that are ignored.
    pub ignored_mask: u64,
}

/// What a fanotify mark is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FanotifyTarget {
    /// A file or folder.
    Inode {
        /// Inode.
        ino: u64,
        /// Device of its file system, in the kernel's encoding.
        sdev: u32,
        /// Handle of the file.
        handle: Option<FileHandle>,
    },
    /// A mount, with its number.
    Mount(u32),
    /// A file system, with its device in the kernel's encoding.
    Filesystem(u32),
    /// A mount namespace, with its inode (since 6.14).
    MountNamespace(u32),
}

/// A timerfd. Times are seconds and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timerfd {
    /// Clock.
    pub clock_id: i32,
    /// Expirations that nobody has read.
    pub ticks: u64,
    /// TFD_TIMER_ flags.
    pub settime_flags: u32,
    /// Time left.
    pub value: (u64, u32),
    /// Interval.
    pub interval: (u64, u32),
}

/// A BPF map. Fields that the kernel at hand does not print are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BpfMap {
    /// BPF_MAP_TYPE_.
    pub map_type: u32,
    /// Size of a key.
    pub key_size: u32,
    /// Size of a value.
    pub value_size: u32,
    /// Most entries.
    pub max_entries: u32,
    /// BPF_F_ flags.
    pub map_flags: u32,
    /// For the type's own use.
    pub map_extra: u64,
    /// Memory.
    pub memlock: u64,
    /// Identity.
    pub map_id: u32,
    /// Programs may no longer write it.
    pub frozen: bool,
    /// Type of the program that owns a program array.
    pub owner_prog_type: Option<u32>,
    /// That program is compiled.
    pub owner_jited: Option<bool>,
}

/// Reads the file.
///
/// # Errors
/// If a field that is known is malformed, or one that all open files have is missing.
pub fn parse(text: &[u8]) -> Result<FdInfo, ParseError> {
    let mut info = FdInfo::default();
    let (mut pos, mut flags, mut mnt_id) = (None, None, None);
    let mut lines = Lines::new("/proc/PID/fdinfo/N", text);
    for (at, line) in lines.by_ref() {
        if let FdDetail::IoUring(ring) = &mut info.detail {
            ring.line(at, line)?;
            continue;
        }
        let Some((key, value)) = split_line(line) else {
            info.other.push((line.to_vec(), Vec::new()));
            continue;
        };
        match key {
            b"pos" => at.once(&mut pos, at.int(value, "pos")?, "pos")?,
            b"flags" => at.once(&mut flags, at.uint(value, 8, "flags")?, "flags")?,
            b"mnt_id" => at.once(&mut mnt_id, at.int(value, "mnt_id")?, "mnt_id")?,
            b"ino" => at.once(&mut info.ino, at.uint(value, 10, "ino")?, "ino")?,
            b"lock" => info.locks.push(lock(at, value.trim_ascii())?),
            _ => {
                if !info.detail.line(at, key, value, line)? {
                    info.other.push((key.to_vec(), value.trim_ascii().to_vec()));
                }
            }
        }
    }
    let at = lines.place();
    info.pos = pos.ok_or_else(|| at.missing("pos"))?;
    info.flags = flags.ok_or_else(|| at.missing("flags"))?;
    info.mnt_id = mnt_id.ok_or_else(|| at.missing("mnt_id"))?;
    Ok(info)
}

/// Key and value; for `inotify wd:…` and `fanotify …` the first word and the rest.
fn split_line(line: &[u8]) -> Option<(&[u8], &[u8])> {
    match line {
        [b'i', b'n', b'o', b't', b'i', b'f', b'y', b' ', ..]
        | [b'f', b'a', b'n', b'o', b't', b'i', b'f', b'y', b' ', ..] => split_once(line, b' '),
        _ => split_once(line, b':'),
    }
}

/// Gives the value inside `detail` if it is of that kind, and makes it that kind if it is none yet.
macro_rules! of_kind {
    ($detail:expr, $at:expr, $field:expr, $make:expr, $($pattern:pat => $out:expr),+) => {{
        if matches!($detail, FdDetail::None) {
            *$detail = $make;
        }
        match $detail {
            $($pattern => $out,)+
            _ => return Err($at.error(Problem::Trailing($field))),
        }
    }};
}

impl FdDetail {
    /// Takes one line; false if it is not known.
    fn line(&mut self, at: Place, key: &[u8], value: &[u8], line: &[u8]) -> Result<bool, ParseError> {
        if key.starts_with(b"eventfd-") {
            return self.eventfd(at, key, value);
        }
        match key {
            b"sigmask" if matches!(self, Self::None) => *self = Self::Signalfd(at.uint(value, 16, "sigmask")?),
            b"tfd" => of_kind!(self, at, "another kind than epoll", Self::Epoll(Vec::new()),
                Self::Epoll(targets) => targets.push(epoll_target(at, value)?)),
            b"inotify" => of_kind!(self, at, "another kind than inotify", Self::Inotify(Vec::new()),
                Self::Inotify(watches) => watches.push(inotify_watch(at, value)?)),
            b"fanotify" => of_kind!(self, at, "another kind than fanotify", Self::Fanotify(Fanotify::default()),
                Self::Fanotify(group) => fanotify_line(at, value, group)?),
            b"clockid" | b"ticks" | b"settime flags" | b"it_value" | b"it_interval" => {
                of_kind!(self, at, "another kind than timerfd", Self::Timerfd(Timerfd::default()),
                    Self::Timerfd(timer) => timerfd_line(at, key, value, timer)?);
            }
            b"Pid" if matches!(self, Self::None) => {
                *self = Self::Pidfd { pid: at.int(value, "Pid")?, ns_pid: Vec::new() };
            }
            b"NSpid" => match self {
                Self::Pidfd { ns_pid, .. } => {
                    *ns_pid = Words::new(value).map(|word| at.int(word, "NSpid")).collect::<Result<_, _>>()?;
                }
                _ => return Ok(false),
            },
            b"SqMask" => of_kind!(self, at, "another kind than io_uring", Self::IoUring(Box::default()),
                Self::IoUring(ring) => ring.line(at, line)?),
            b"iff" if matches!(self, Self::None) => *self = Self::Tun(value.trim_ascii().to_vec()),
            b"scm_fds" if matches!(self, Self::None) => {
                *self = Self::UnixSocket { scm_fds: at.uint(value, 10, "scm_fds")? };
            }
            b"map_type" if matches!(self, Self::None) => {
                *self = Self::BpfMap(BpfMap { map_type: at.uint(value, 10, "map_type")?, ..BpfMap::default() });
            }
            b"prog_type" if matches!(self, Self::None) => {
                *self = Self::BpfProgram { prog_type: at.uint(value, 10, "prog_type")?, id: 0 };
            }
            b"link_type" if matches!(self, Self::None) => {
                *self = Self::BpfLink(vec![(key.to_vec(), value.trim_ascii().to_vec())]);
            }
            b"size" if matches!(self, Self::None) => {
                *self = Self::DmaBuf { size: at.uint(value, 10, "size")?, exporter: Vec::new() };
            }
            b"pending" if matches!(self, Self::None) => {
                *self = Self::Userfaultfd { pending: at.uint(value, 10, "pending")?, total: 0, api: Vec::new() };
            }
            _ if key.starts_with(b"drm-") && matches!(self, Self::None | Self::Drm(_)) => {
                of_kind!(self, at, "another kind than drm", Self::Drm(Vec::new()),
                    Self::Drm(lines) => lines.push((key.to_vec(), value.trim_ascii().to_vec())));
            }
            _ => return self.more(at, key, value),
        }
        Ok(true)
    }

    /// Lines that mean something only behind the first line of their kind.
    fn more(&mut self, at: Place, key: &[u8], value: &[u8]) -> Result<bool, ParseError> {
        match self {
            Self::BpfMap(map) => return bpf_map_line(at, key, value, map),
            Self::BpfProgram { id, .. } => match key {
                b"prog_id" => *id = at.uint(value, 10, "prog_id")?,
                b"prog_jited" | b"prog_tag" | b"memlock" | b"run_time_ns" | b"run_cnt" | b"recursion_misses"
                | b"verified_insns" => {}
                _ => return Ok(false),
            },
            Self::BpfLink(lines) => lines.push((key.to_vec(), value.trim_ascii().to_vec())),
            Self::DmaBuf { exporter, .. } => match key {
                b"exp_name" => *exporter = value.trim_ascii().to_vec(),
                b"count" | b"name" => {}
                _ => return Ok(false),
            },
            Self::Userfaultfd { total, api, .. } => match key {
                b"total" => *total = at.uint(value, 10, "total")?,
                b"API" => *api = value.trim_ascii().to_vec(),
                _ => return Ok(false),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn eventfd(&mut self, at: Place, key: &[u8], value: &[u8]) -> Result<bool, ParseError> {
        let empty = Self::Eventfd { count: 0, id: None, semaphore: None };
        of_kind!(self, at, "another kind than eventfd", empty,
        Self::Eventfd { count, id, semaphore } => match key {
            b"eventfd-count" => *count = at.uint(value, 16, "eventfd-count")?,
            b"eventfd-id" => *id = Some(at.int(value, "eventfd-id")?),
            b"eventfd-semaphore" => *semaphore = Some(at.flag(value, "eventfd-semaphore")?),
            _ => return Ok(false),
        });
        Ok(true)
    }
}

/// `       4 events: 80000019 data: ffffffffffffffff  pos:0 ino:40e sdev:10`; kernels before 4.13 stop after `data`.
fn epoll_target(at: Place, value: &[u8]) -> Result<EpollTarget, ParseError> {
    let mut words = Words::new(value);
    let tfd = at.next_int(&mut words, "tfd")?;
    let mut target = EpollTarget { tfd, events: 0, data: 0, pos: 0, ino: 0, sdev: 0 };
    while let Some(word) = words.next() {
        match split_once(word, b':') {
            Some((b"events", b"")) => target.events = at.next_uint(&mut words, 16, "events")?,
            Some((b"data", b"")) => target.data = at.next_uint(&mut words, 16, "data")?,
            Some((b"pos", pos)) => target.pos = at.int(pos, "pos")?,
            Some((b"ino", ino)) => target.ino = at.uint(ino, 16, "ino")?,
            Some((b"sdev", sdev)) => target.sdev = at.uint(sdev, 16, "sdev")?,
            _ => return Err(at.malformed("tfd")),
        }
    }
    Ok(target)
}

/// The `key:number` words of an inotify or fanotify line, all hexadecimal but for what the handle says of itself.
#[derive(Default)]
struct NotifyWords {
    wd: Option<i32>,
    ino: Option<u64>,
    sdev: Option<u32>,
    mnt_id: Option<u32>,
    mnt_ns: Option<u32>,
    mflags: Option<u32>,
    mask: Option<u64>,
    ignored_mask: Option<u64>,
    flags: Option<u32>,
    event_flags: Option<u32>,
    handle: Option<FileHandle>,
}

fn notify_words(at: Place, value: &[u8]) -> Result<NotifyWords, ParseError> {
    let mut found = NotifyWords::default();
    let (mut handle_bytes, mut handle_type) = (None::<usize>, None::<u32>);
    for word in Words::new(value) {
        let (key, value) = split_once(word, b':').ok_or_else(|| at.malformed("a mark"))?;
        match key {
            b"wd" => found.wd = Some(at.uint(value, 16, "wd")?),
            b"ino" => found.ino = Some(at.uint(value, 16, "ino")?),
            b"sdev" => found.sdev = Some(at.uint(value, 16, "sdev")?),
            b"mnt_id" => found.mnt_id = Some(at.uint(value, 16, "mnt_id")?),
            b"mnt_ns" => found.mnt_ns = Some(at.uint(value, 10, "mnt_ns")?),
            b"mflags" => found.mflags = Some(at.uint(value, 16, "mflags")?),
            b"mask" => found.mask = Some(at.uint(value, 16, "mask")?),
            b"ignored_mask" => found.ignored_mask = Some(at.uint(value, 16, "ignored_mask")?),
            b"flags" => found.flags = Some(at.uint(value, 16, "flags")?),
            b"event-flags" => found.event_flags = Some(at.uint(value, 16, "event-flags")?),
            b"fhandle-bytes" => handle_bytes = Some(at.uint(value, 16, "fhandle-bytes")?),
            b"fhandle-type" => handle_type = Some(at.uint(value, 16, "fhandle-type")?),
            b"f_handle" => {
                let bytes = hex_bytes(value).ok_or_else(|| at.malformed("f_handle"))?;
                if handle_bytes != Some(bytes.len()) {
                    return Err(at.malformed("fhandle-bytes"));
                }
                let kind = handle_type.ok_or_else(|| at.missing("fhandle-type"))?;
                found.handle = Some(FileHandle { kind, bytes });
            }
            _ => return Err(at.malformed("a mark")),
        }
    }
    Ok(found)
}

fn inotify_watch(at: Place, value: &[u8]) -> Result<InotifyWatch, ParseError> {
    let words = notify_words(at, value)?;
    Ok(InotifyWatch {
        wd: words.wd.ok_or_else(|| at.missing("wd"))?,
        ino: words.ino.ok_or_else(|| at.missing("ino"))?,
        sdev: words.sdev.ok_or_else(|| at.missing("sdev"))?,
        mask: narrow(at, words.mask.ok_or_else(|| at.missing("mask"))?, "mask")?,
        ignored_mask: narrow(at, words.ignored_mask.unwrap_or(0), "ignored_mask")?,
        handle: words.handle,
    })
}

fn narrow(at: Place, number: u64, field: &'static str) -> Result<u32, ParseError> {
    u32::try_from(number).map_err(|_| at.malformed(field))
}

fn fanotify_line(at: Place, value: &[u8], group: &mut Fanotify) -> Result<(), ParseError> {
    let words = notify_words(at, value)?;
    if let Some(flags) = words.flags {
        group.flags = flags;
        group.event_flags = words.event_flags.ok_or_else(|| at.missing("event-flags"))?;
        return Ok(());
    }
    let target = match (words.ino, words.mnt_id, words.mnt_ns, words.sdev) {
        (Some(ino), None, None, Some(sdev)) => FanotifyTarget::Inode { ino, sdev, handle: words.handle },
        (None, Some(id), None, None) => FanotifyTarget::Mount(id),
        (None, None, Some(ns), None) => FanotifyTarget::MountNamespace(ns),
        (None, None, None, Some(sdev)) => FanotifyTarget::Filesystem(sdev),
        _ => return Err(at.malformed("a mark")),
    };
    group.marks.push(FanotifyMark {
        target,
        mflags: words.mflags.ok_or_else(|| at.missing("mflags"))?,
        mask: words.mask.ok_or_else(|| at.missing("mask"))?,
        ignored_mask: words.ignored_mask.ok_or_else(|| at.missing("ignored_mask"))?,
    });
    Ok(())
}

fn timerfd_line(at: Place, key: &[u8], value: &[u8], timer: &mut Timerfd) -> Result<(), ParseError> {
    match key {
        b"clockid" => timer.clock_id = at.int(value, "clockid")?,
        b"ticks" => timer.ticks = at.uint(value, 10, "ticks")?,
        b"settime flags" => timer.settime_flags = at.uint(value, 8, "settime flags")?,
        b"it_value" => timer.value = seconds(at, value, "it_value")?,
        _ => timer.interval = seconds(at, value, "it_interval")?,
    }
    Ok(())
}

/// `(2999, 999935969)`.
fn seconds(at: Place, value: &[u8], field: &'static str) -> Result<(u64, u32), ParseError> {
    let inside = value.trim_ascii().strip_prefix(b"(").and_then(|text| text.strip_suffix(b")"));
    let (seconds, nanos) = inside.and_then(|text| split_once(text, b',')).ok_or_else(|| at.malformed(field))?;
    let nanos = uint(nanos.trim_ascii(), 10).filter(|&n| n < 1_000_000_000).and_then(|n| u32::try_from(n).ok());
    Ok((at.uint(seconds, 10, field)?, nanos.ok_or_else(|| at.malformed(field))?))
}

fn bpf_map_line(at: Place, key: &[u8], value: &[u8], map: &mut BpfMap) -> Result<bool, ParseError> {
    match key {
        b"key_size" => map.key_size = at.uint(value, 10, "key_size")?,
        b"value_size" => map.value_size = at.uint(value, 10, "value_size")?,
        b"max_entries" => map.max_entries = at.uint(value, 10, "max_entries")?,
        b"map_flags" => map.map_flags = at.uint(value, 16, "map_flags")?,
        b"map_extra" => map.map_extra = at.uint(value, 16, "map_extra")?,
        b"memlock" => map.memlock = at.uint(value, 10, "memlock")?,
        b"map_id" => map.map_id = at.uint(value, 10, "map_id")?,
        b"frozen" => map.frozen = at.flag(value, "frozen")?,
        b"owner_prog_type" => map.owner_prog_type = Some(at.uint(value, 10, "owner_prog_type")?),
        b"owner_jited" => map.owner_jited = Some(at.flag(value, "owner_jited")?),
        _ => return Ok(false),
    }
    Ok(true)
}

#[cfg(test)]
#[path = "fdinfo_tests.rs"]
mod tests;
