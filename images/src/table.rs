//! The one table of image kinds: name, file name, magic, entry message, and what follows an entry.
//!
//! An image begins with one of two common magics and then its own (little-endian u32 each); the inventory has its own
//! alone. Then entries follow: a u32 size and a protobuf message, and for some kinds raw bytes after each (see
//! [`Payload`]). Raw images (pages, archives, dumps of other tools) are bytes without a header.

use std::fmt;

use crate::error::{Error, Result};

/// First magic of nearly all images.
pub const MAGIC_COMMON: u32 = 0x5456_4319;
/// First magic of images that are no part of a checkpoint (statistics, caches).
pub const MAGIC_SERVICE: u32 = 0x5510_5940;

/// How an image begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Header {
    /// [`MAGIC_COMMON`], then its own magic.
    Common,
    /// [`MAGIC_SERVICE`], then its own magic.
    Service,
    /// Its own magic only.
    Own,
    /// No header: the image is raw bytes.
    Raw,
}

/// What follows an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Payload {
    /// Nothing.
    None,
    /// The first entry is a `pagemap_head`, all others are of the kind's entry type.
    Pagemap,
    /// `bytes` bytes of a pipe's content.
    PipeData,
    /// `length` bytes of one packet.
    SocketQueue,
    /// `size` bytes of a segment, padded to 4, unless they are in a pagemap of their own.
    IpcShm,
    /// `qnum` messages, each a sized `ipc_msg` and its bytes, padded to 8.
    IpcMsg,
    /// `nsems` values of 16 bits, padded to 8 bytes.
    IpcSem,
    /// The content of a file: to the end of the image, or as chunks, each a sized `ghost_chunk_entry` and its bytes.
    Ghost,
    /// `inq_len` bytes of input, then `outq_len` of output.
    TcpStream,
    /// `keys_bytes` bytes of keys, then `values_bytes` of values.
    BpfMap,
}

/// What an image's name has in it where its template has a place for a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Id(pub Option<u64>);

impl From<()> for Id {
    fn from((): ()) -> Self {
        Self(None)
    }
}

impl From<u32> for Id {
    fn from(number: u32) -> Self {
        Self(Some(number.into()))
    }
}

impl From<u64> for Id {
    fn from(number: u64) -> Self {
        Self(Some(number))
    }
}

macro_rules! images {
    ($($kind:ident, $name:literal, $template:literal, $magic:literal, $header:ident, $entry:literal, $payload:ident;)*) => {
        /// A kind of image.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ImageKind {
            $(#[doc = concat!("`", $template, "`")] $kind,)*
        }

        impl ImageKind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            const fn row(self) -> Row {
                match self {
                    $(Self::$kind => Row {
                        name: $name,
                        template: $template,
                        magic: $magic,
                        header: Header::$header,
                        entry: $entry,
                        payload: Payload::$payload,
                    },)*
                }
            }
        }
    };
}

struct Row {
    name: &'static str,
    template: &'static str,
    magic: u32,
    header: Header,
    entry: &'static str,
    payload: Payload,
}

images! {
    Inventory, "INVENTORY", "inventory.img", 0x5831_3116, Own, "inventory_entry", None;
    Fdinfo, "FDINFO", "fdinfo-%u.img", 0x5621_3732, Common, "fdinfo_entry", None;
    Pagemap, "PAGEMAP", "pagemap-%lu.img", 0x5608_4025, Common, "pagemap_entry", Pagemap;
    ShmemPagemap, "SHMEM_PAGEMAP", "pagemap-shmem-%lu.img", 0x5608_4025, Common, "pagemap_entry", Pagemap;
    RegFiles, "REG_FILES", "reg-files.img", 0x5036_3636, Common, "reg_file_entry", None;
    ExtFiles, "EXT_FILES", "ext-files.img", 0x5925_5641, Common, "ext_file_entry", None;
    NsFiles, "NS_FILES", "ns-files.img", 0x6139_4011, Common, "ns_file_entry", None;
    EventfdFile, "EVENTFD_FILE", "eventfd.img", 0x4452_3722, Common, "eventfd_file_entry", None;
    EventpollFile, "EVENTPOLL_FILE", "eventpoll.img", 0x4502_3858, Common, "eventpoll_file_entry", None;
    EventpollTfd, "EVENTPOLL_TFD", "eventpoll-tfd.img", 0x4443_3746, Common, "eventpoll_tfd_entry", None;
    Signalfd, "SIGNALFD", "signalfd.img", 0x5732_3820, Common, "signalfd_entry", None;
    InotifyFile, "INOTIFY_FILE", "inotify.img", 0x4842_4431, Common, "inotify_file_entry", None;
    InotifyWd, "INOTIFY_WD", "inotify-wd.img", 0x5456_2009, Common, "inotify_wd_entry", None;
    FanotifyFile, "FANOTIFY_FILE", "fanotify.img", 0x5509_6122, Common, "fanotify_file_entry", None;
    FanotifyMark, "FANOTIFY_MARK", "fanotify-mark.img", 0x5650_6035, Common, "fanotify_mark_entry", None;
    Core, "CORE", "core-%u.img", 0x5505_3847, Common, "core_entry", None;
    Ids, "IDS", "ids-%u.img", 0x5443_2030, Common, "task_kobj_ids_entry", None;
    Mm, "MM", "mm-%u.img", 0x5749_2820, Common, "mm_entry", None;
    Vmas, "VMAS", "vmas-%u.img", 0x5412_3737, Common, "vma_entry", None;
    Pipes, "PIPES", "pipes.img", 0x5651_3555, Common, "pipe_entry", None;
    PipesData, "PIPES_DATA", "pipes-data.img", 0x5645_3709, Common, "pipe_data_entry", PipeData;
    Fifo, "FIFO", "fifo.img", 0x5836_4939, Common, "fifo_entry", None;
    FifoData, "FIFO_DATA", "fifo-data.img", 0x5933_3054, Common, "pipe_data_entry", PipeData;
    Pstree, "PSTREE", "pstree.img", 0x5027_3030, Common, "pstree_entry", None;
    Sigact, "SIGACT", "sigacts-%u.img", 0x5534_4201, Common, "sa_entry", None;
    Unixsk, "UNIXSK", "unixsk.img", 0x5437_3943, Common, "unix_sk_entry", None;
    Inetsk, "INETSK", "inetsk.img", 0x5644_3851, Common, "inet_sk_entry", None;
    Packetsk, "PACKETSK", "packetsk.img", 0x6045_4618, Common, "packet_sock_entry", None;
    NetlinkSk, "NETLINK_SK", "netlinksk.img", 0x5800_5614, Common, "netlink_sk_entry", None;
    SkQueues, "SK_QUEUES", "sk-queues.img", 0x5626_4026, Common, "sk_packet_entry", SocketQueue;
    Itimers, "ITIMERS", "itimers-%u.img", 0x5746_4056, Common, "itimer_entry", None;
    PosixTimers, "POSIX_TIMERS", "posix-timers-%u.img", 0x5260_3957, Common, "posix_timer_entry", None;
    Creds, "CREDS", "creds-%u.img", 0x5402_3547, Common, "creds_entry", None;
    Utsns, "UTSNS", "utsns-%u.img", 0x5447_3203, Common, "utsns_entry", None;
    IpcVar, "IPC_VAR", "ipcns-var-%u.img", 0x5311_5007, Common, "ipc_var_entry", None;
    IpcnsShm, "IPCNS_SHM", "ipcns-shm-%u.img", 0x4628_3044, Common, "ipc_shm_entry", IpcShm;
    IpcnsMsg, "IPCNS_MSG", "ipcns-msg-%u.img", 0x5545_3737, Common, "ipc_msg_entry", IpcMsg;
    IpcnsSem, "IPCNS_SEM", "ipcns-sem-%u.img", 0x5957_3019, Common, "ipc_sem_entry", IpcSem;
    Fs, "FS", "fs-%u.img", 0x5140_3912, Common, "fs_entry", None;
    RemapFpath, "REMAP_FPATH", "remap-fpath.img", 0x5913_3954, Common, "remap_file_path_entry", None;
    GhostFile, "GHOST_FILE", "ghost-file-%x.img", 0x5258_3605, Common, "ghost_file_entry", Ghost;
    MemfdInode, "MEMFD_INODE", "memfd.img", 0x4845_3499, Common, "memfd_inode_entry", None;
    TcpStream, "TCP_STREAM", "tcp-stream-%x.img", 0x5146_5506, Common, "tcp_stream_entry", TcpStream;
    Mnts, "MNTS", "mountpoints-%u.img", 0x5556_3928, Common, "mnt_entry", None;
    Netdev, "NETDEV", "netdev-%u.img", 0x5737_3951, Common, "net_device_entry", None;
    Netns, "NETNS", "netns-%u.img", 0x5593_3752, Common, "netns_entry", None;
    Ifaddr, "IFADDR", "ifaddr-%u.img", 0, Raw, "", None;
    Route, "ROUTE", "route-%u.img", 0, Raw, "", None;
    Route6, "ROUTE6", "route6-%u.img", 0, Raw, "", None;
    Rule, "RULE", "rule-%u.img", 0, Raw, "", None;
    Iptables, "IPTABLES", "iptables-%u.img", 0, Raw, "", None;
    Ip6tables, "IP6TABLES", "ip6tables-%u.img", 0, Raw, "", None;
    Nftables, "NFTABLES", "nftables-%u.img", 0, Raw, "", None;
    TmpfsImg, "TMPFS_IMG", "tmpfs-%u.tar.gz.img", 0, Raw, "", None;
    TmpfsDev, "TMPFS_DEV", "tmpfs-dev-%u.tar.gz.img", 0, Raw, "", None;
    Autofs, "AUTOFS", "autofs-%u.img", 0x4935_3943, Common, "autofs_entry", None;
    BinfmtMisc, "BINFMT_MISC", "binfmt-misc.img", 0x6734_3323, Common, "binfmt_misc_entry", None;
    BinfmtMiscOld, "BINFMT_MISC_OLD", "binfmt-misc-%u.img", 0x6734_3323, Common, "binfmt_misc_entry", None;
    TtyFiles, "TTY_FILES", "tty.img", 0x5943_3025, Common, "tty_file_entry", None;
    TtyInfo, "TTY_INFO", "tty-info.img", 0x5945_3036, Common, "tty_info_entry", None;
    TtyData, "TTY_DATA", "tty-data.img", 0x5941_3026, Common, "tty_data_entry", None;
    FileLocks, "FILE_LOCKS", "filelocks.img", 0x5432_3616, Common, "file_lock_entry", None;
    Rlimit, "RLIMIT", "rlimit-%u.img", 0x5711_3925, Common, "rlimit_entry", None;
    Pages, "PAGES", "pages-%u.img", 0, Raw, "", None;
    Signal, "SIGNAL", "signal-s-%u.img", 0x5925_5647, Common, "siginfo_entry", None;
    Psignal, "PSIGNAL", "signal-p-%u.img", 0x5925_5647, Common, "siginfo_entry", None;
    Tunfile, "TUNFILE", "tunfile.img", 0x5714_3751, Common, "tunfile_entry", None;
    Cgroup, "CGROUP", "cgroup.img", 0x5938_3330, Common, "cgroup_entry", None;
    Timerfd, "TIMERFD", "timerfd.img", 0x5049_3712, Common, "timerfd_entry", None;
    Cpuinfo, "CPUINFO", "cpuinfo.img", 0x6140_4013, Common, "cpuinfo_entry", None;
    Seccomp, "SECCOMP", "seccomp.img", 0x6441_3049, Common, "seccomp_entry", None;
    Userns, "USERNS", "userns-%u.img", 0x5547_4906, Common, "userns_entry", None;
    NetnfCt, "NETNF_CT", "netns-ct-%u.img", 0, Raw, "", None;
    NetnfExp, "NETNF_EXP", "netns-exp-%u.img", 0, Raw, "", None;
    Files, "FILES", "files.img", 0x5630_3138, Common, "file_entry", None;
    Timens, "TIMENS", "timens-%u.img", 0x4311_4433, Common, "timens_entry", None;
    Pidns, "PIDNS", "pidns-%u.img", 0x6115_7326, Common, "pidns_entry", None;
    BpfmapFile, "BPFMAP_FILE", "bpfmap-file.img", 0x5750_6142, Common, "bpfmap_file_entry", None;
    BpfmapData, "BPFMAP_DATA", "bpfmap-data.img", 0x6432_4033, Common, "bpfmap_data_entry", BpfMap;
    Apparmor, "APPARMOR", "apparmor.img", 0x5942_3047, Common, "apparmor_entry", None;
    Pidfd, "PIDFD", "pidfd.img", 0x5443_5556, Common, "pidfd_entry", None;
    StandstillGpu, "STANDSTILL_GPU", "standstill-gpu.img", 0x4750_5531, Common, "standstill_gpu_entry", None;
    StandstillMqueue, "STANDSTILL_MQUEUE", "standstill-mqueue-%u.img", 0x4d51_5531, Common, "standstill_mqueue_entry", None;
    StatsDump, "STATS", "stats-dump", 0x5709_3306, Service, "stats_entry", None;
    StatsRestore, "STATS", "stats-restore", 0x5709_3306, Service, "stats_entry", None;
    IrmapCache, "IRMAP_CACHE", "irmap-cache.img", 0x5700_4059, Service, "irmap_cache_entry", None;
}

impl ImageKind {
    /// The name that the image format knows it by, as in `"magic"` of its JSON form.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Template of its file name, with `%u`, `%lu` (decimal) or `%x` (hexadecimal) for a number.
    #[must_use]
    pub const fn template(self) -> &'static str {
        self.row().template
    }

    /// Its own magic; 0 if it is raw.
    #[must_use]
    pub const fn magic(self) -> u32 {
        self.row().magic
    }

    /// How it begins.
    #[must_use]
    pub const fn header(self) -> Header {
        self.row().header
    }

    /// Name of its entries' message (in a pagemap: of all but the first), or none if it is raw.
    #[must_use]
    pub const fn entry(self) -> Option<&'static str> {
        let entry = self.row().entry;
        if entry.is_empty() {
            None
        } else {
            Some(entry)
        }
    }

    /// What follows an entry.
    #[must_use]
    pub const fn payload(self) -> Payload {
        self.row().payload
    }

    /// Whether it is bytes without a header and entries.
    #[must_use]
    pub const fn is_raw(self) -> bool {
        matches!(self.header(), Header::Raw)
    }

    /// Its file name.
    ///
    /// # Errors
    /// If the template has a place for a number and there is none, or the other way round.
    pub fn file_name(self, id: impl Into<Id>) -> Result<String> {
        let template = self.template();
        match (place(template), id.into().0) {
            (None, None) => Ok(template.to_owned()),
            (Some((before, radix, after)), Some(number)) => Ok(match radix {
                16 => format!("{before}{number:x}{after}"),
                _ => format!("{before}{number}{after}"),
            }),
            (place, _) => Err(Error::Id { template, wanted: place.is_some() }),
        }
    }

    /// The kind whose file name this is, and the number in it.
    #[must_use]
    pub fn from_file_name(file: &str) -> Option<(Self, Id)> {
        Self::ALL.iter().find_map(|kind| {
            let Some((before, radix, after)) = place(kind.template()) else {
                return (kind.template() == file).then_some((*kind, Id(None)));
            };
            let digits = file.strip_prefix(before)?.strip_suffix(after)?;
            let number = u64::from_str_radix(digits, radix).ok()?;
            // Only one spelling of a number is ever written.
            (kind.file_name(number).ok()? == file).then_some((*kind, Id(Some(number))))
        })
    }

    /// The kind with this magic of its own. Where two kinds share one, their content is the same, and the first is meant.
    #[must_use]
    pub fn from_magic(magic: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| !kind.is_raw() && kind.magic() == magic)
    }

    /// The kind with this name; of two with one name, the first.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is before and after the number in a template, and the number's radix.
fn place(template: &str) -> Option<(&str, u32, &str)> {
    let (before, rest) = template.split_once('%')?;
    let rest = rest.strip_prefix('l').unwrap_or(rest);
    let radix = if rest.starts_with('x') { 16 } else { 10 };
    Some((before, radix, rest.get(1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    #[test]
    fn names_go_both_ways() {
        for kind in ImageKind::ALL {
            let id = Id(place(kind.template()).map(|_| 0x1f));
            let name = kind.file_name(id).unwrap();
            assert_eq!(ImageKind::from_file_name(&name), Some((*kind, id)), "{name}");
        }
        assert_eq!(ImageKind::GhostFile.file_name(0x1d6ba4_u32).unwrap(), "ghost-file-1d6ba4.img");
        assert_eq!(ImageKind::from_file_name("core-007.img"), None);
        assert_eq!(ImageKind::from_file_name("core-+7.img"), None);
        assert_eq!(ImageKind::from_file_name("core-.img"), None);
        assert!(ImageKind::Core.file_name(()).is_err());
        assert!(ImageKind::Inventory.file_name(1_u32).is_err());
    }

    #[test]
    fn every_entry_is_a_message() {
        for kind in ImageKind::ALL {
            match kind.entry() {
                Some(entry) => assert!(schema::message(entry).is_some(), "{entry}"),
                None => assert!(kind.is_raw()),
            }
        }
    }

    #[test]
    fn kinds_that_share_a_magic_share_their_content() {
        for kind in ImageKind::ALL.iter().filter(|kind| !kind.is_raw()) {
            let first = ImageKind::from_magic(kind.magic()).unwrap();
            assert_eq!((first.entry(), first.payload()), (kind.entry(), kind.payload()));
            assert_eq!(first.header(), kind.header());
        }
    }
}
