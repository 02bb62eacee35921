//! The values that options take: small closed types, each with the parser for the way a person writes it.
//!
//! Numbers are read as CRIU reads them (C's `atoi`: leading digits count, the rest is ignored) only where a caller could
//! depend on it; everything else is strict, and the error names option and value.

use std::fmt;
use std::path::PathBuf;

/// Whose behaviour is asked for: that of CRIU 4.2 in every default and text, or our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Persona {
    /// Called by the name `criu`.
    Criu,
    /// Called by any other name, or used as a library.
    #[default]
    Standstill,
}

impl Persona {
    /// From the name that the program was called by: its last component decides.
    pub fn from_program_name(argv0: &std::ffi::OsStr) -> Self {
        match std::path::Path::new(argv0).file_name() {
            Some(name) if name == "criu" => Self::Criu,
            _ => Self::Standstill,
        }
    }

    /// The name to call ourselves by in usage texts.
    pub fn program(self) -> &'static str {
        match self {
            Self::Criu => "criu",
            Self::Standstill => "standstill",
        }
    }
}

/// What happens to the tasks once a dump, or a restore, is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FinalState {
    /// After a dump they are killed; after a restore they run. This is what happens if nothing is said.
    #[default]
    Kill,
    /// They are left stopped (`-s`).
    Stop,
    /// They go on (`-R`).
    Run,
}

/// How a pre-dump takes pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreDumpMode {
    /// From inside the target, while it is stopped.
    #[default]
    Splice,
    /// From outside, after it goes on.
    Read,
}

/// How packets are kept away from connections while their owner does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkLock {
    /// Rules of iptables.
    #[default]
    Iptables,
    /// A table of nftables.
    Nftables,
    /// Not at all: someone else does it.
    Skip,
}

/// How to tell that a file is still the one that was dumped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileValidation {
    /// By its size.
    FileSize,
    /// By its build-id where it has one, by its size where it has none.
    #[default]
    BuildId,
}

/// How much of the cgroups is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupMode {
    /// Pretend that there are none.
    Ignore,
    /// The groups must be there; nothing is set.
    None,
    /// The groups must be there; properties are set.
    Props,
    /// Missing groups are made, and only those get their properties.
    #[default]
    Soft,
    /// Groups are made where needed, all get their properties.
    Full,
    /// No group may be there yet.
    Strict,
}

/// What about the CPU is written at dump and compared at restore; the numbers are those of CRIU's RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuCap(pub u32);

impl CpuCap {
    /// Nothing at all.
    pub const NONE: Self = Self(0);
    /// The FPU's state must fit.
    pub const FPU: Self = Self(1);
    /// The CPU must be the same in every flag.
    pub const CPU: Self = Self(2);
    /// The CPU must have all instructions.
    pub const INS: Self = Self(4);
    /// The CPU is written to, or read from, an image.
    pub const IMAGE: Self = Self(8);
    /// FPU, CPU and instructions.
    pub const ALL: Self = Self(7);

    /// Is all of `other` asked for?
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    fn with(self, other: Self, on: bool) -> Self {
        Self(if on { self.0 | other.0 } else { self.0 & !other.0 })
    }

    /// Applies what `--cpu-cap` says to what was asked so far: names with commas, `^` before a name takes it away.
    pub fn parse(self, text: Option<&str>) -> Result<Self, OptionError> {
        let Some(text) = text else {
            return Ok(self.with(Self::ALL, true).with(Self::IMAGE, true));
        };
        let (mut caps, mut rest, mut add) = (self, text, true);
        while let Some(first) = rest.chars().next() {
            if first == '^' {
                (add, rest) = (!add, &rest[1..]);
                continue;
            }
            if first == ',' {
                (add, rest) = (true, &rest[1..]);
                continue;
            }
            let names = [("fpu", Self::FPU), ("all", Self::ALL), ("cpu", Self::CPU), ("ins", Self::INS)];
            if let Some((name, cap)) = names.into_iter().find(|(name, _)| rest.starts_with(name)) {
                (caps, rest) = (caps.with(cap, add), &rest[name.len()..]);
            } else if let Some(after) = rest.strip_prefix("none") {
                (caps, rest) = (if add { Self::NONE } else { Self::ALL }, after);
            } else {
                return Err(OptionError::CpuCap(rest.to_owned()));
            }
        }
        Ok(if caps == Self::NONE { caps } else { caps.with(Self::IMAGE, true) })
    }
}

impl Default for CpuCap {
    fn default() -> Self {
        Self(Self::FPU.0 | Self::INS.0)
    }
}

/// Something outside the tree, as `--external KIND[ID]:VALUE` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// `KIND[ID]`, the way CRIU looks it up.
    pub key: String,
    /// What follows the colon after the key.
    pub value: Option<String>,
}

impl External {
    /// Splits at the colon after the closing bracket. Anything is accepted, as in CRIU: what nobody asks for is ignored.
    pub fn parse(text: &str) -> Self {
        let end = match (text.find('['), text.find(':')) {
            (Some(open), colon) if colon.is_none_or(|c| open < c) => {
                text.find("]:").map(|i| i + 1).or(if text.ends_with(']') { None } else { colon })
            }
            (_, colon) => colon,
        };
        match end {
            Some(i) => Self { key: text[..i].to_owned(), value: Some(text[i + 1..].to_owned()) },
            None => Self { key: text.to_owned(), value: None },
        }
    }

    /// From the parts that other options (`--veth-pair`, `--ext-mount-map`) give.
    pub fn new(kind: &str, id: &str, value: &str) -> Self {
        Self { key: format!("{kind}[{id}]"), value: Some(value.to_owned()) }
    }

    /// What comes before the bracket.
    pub fn kind(&self) -> &str {
        self.key.split_once('[').map_or("", |(kind, _)| kind)
    }

    /// What is in the brackets.
    pub fn id(&self) -> &str {
        self.key.split_once('[').map_or("", |(_, id)| id.strip_suffix(']').unwrap_or(id))
    }
}

impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}:{value}", self.key),
            None => f.write_str(&self.key),
        }
    }
}

/// A descriptor of ours that stands for a file of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritFd {
    /// Our descriptor's number.
    pub fd: i32,
    /// The file: `pipe:[1234]`, `tty[8801:5]`, `socket:[77]`, `file[1a:2b]`, a path, or a name given by `--external`.
    pub id: String,
}

impl InheritFd {
    /// Reads `fd[NUM]:ID`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let bad = || OptionError::InheritFd(text.to_owned());
        let (number, id) = text.strip_prefix("fd[").and_then(|rest| rest.split_once("]:")).ok_or_else(bad)?;
        let fd = number.parse::<i32>().ok().filter(|fd| *fd >= 0).ok_or_else(bad)?;
        if id.is_empty() {
            return Err(bad());
        }
        Ok(Self { fd, id: id.to_owned() })
    }
}

/// A kind of namespace that `--join-ns` can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // their names are the kernel's
pub enum NamespaceKind {
    Net,
    Uts,
    Time,
    Ipc,
    User,
    Mnt,
}

impl NamespaceKind {
    /// The name under /proc/PID/ns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Uts => "uts",
            Self::Time => "time",
            Self::Ipc => "ipc",
            Self::User => "user",
            Self::Mnt => "mnt",
        }
    }
}

/// A namespace to enter instead of making it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinNs {
    /// Which kind.
    pub kind: NamespaceKind,
    /// `/proc/PID/ns/KIND` if a process id was given, else the path that was given.
    pub path: PathBuf,
    /// User and group to become in a user namespace.
    pub ids: Option<(u32, u32)>,
}

impl JoinNs {
    /// Reads `KIND:{PID|FILE}[,UID,GID]`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let (kind, rest) =
            text.split_once(':').ok_or_else(|| OptionError::Invalid { option: "join-ns", value: text.to_owned() })?;
        let (place, extra) = match rest.split_once(',') {
            Some((place, extra)) => (place, Some(extra)),
            None => (rest, None),
        };
        Self::new(kind, place, extra)
    }

    /// From the three parts, as RPC gives them.
    pub fn new(kind: &str, place: &str, extra: Option<&str>) -> Result<Self, OptionError> {
        let kind = match kind {
            "net" => NamespaceKind::Net,
            "uts" => NamespaceKind::Uts,
            "time" => NamespaceKind::Time,
            "ipc" => NamespaceKind::Ipc,
            "user" => NamespaceKind::User,
            "mnt" => NamespaceKind::Mnt,
            "pid" => return Err(OptionError::JoinPidNs),
            other => return Err(OptionError::NamespaceKind(other.to_owned())),
        };
        let ids = match (kind, extra) {
            (NamespaceKind::User, Some(extra)) => {
                let ids = extra.split_once(',').and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
                Some(ids.ok_or_else(|| OptionError::UserNamespaceIds(extra.to_owned()))?)
            }
            _ => None,
        };
        let path = match place.parse::<u32>() {
            Ok(pid) => PathBuf::from(format!("/proc/{pid}/ns/{}", kind.name())),
            Err(_) => PathBuf::from(place),
        };
        Ok(Self { kind, path, ids })
    }
}

/// Namespaces to make without filling them; only the network namespace can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EmptyNamespaces {
    /// The network namespace.
    pub net: bool,
}

/// A new place for what is in a controller's cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupRoot {
    /// For which controller; `None`: for all that are not named.
    pub controller: Option<String>,
    /// The new root.
    pub path: String,
}

impl CgroupRoot {
    /// Reads `[CONTROLLER:]PATH`.
    pub fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((controller, path)) => Self { controller: Some(controller.to_owned()), path: path.to_owned() },
            None => Self { controller: None, path: text.to_owned() },
        }
    }
}

/// What is wrong with what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum OptionError {
    #[error("pid not specified")]
    PidMissing,
    #[error("invalid argument for --{option}: {value}")]
    Invalid { option: &'static str, value: String },
    #[error("Unknown FPU mode `{0}' selected")]
    CpuCap(String),
    #[error("Unknown cgroups mode `{0}' selected")]
    CgroupMode(String),
    #[error("Unknown file validation method `{0}' selected")]
    FileValidation(String),
    #[error("Unable to parse value of --pre-dump-mode")]
    PreDumpMode,
    #[error("Invalid value for --network-lock: {0}")]
    NetworkLock(String),
    #[error("Unsupported empty namespace: {0}")]
    EmptyNamespace(String),
    #[error("Invalid inherit fd argument: {0}")]
    InheritFd(String),
    #[error("join-ns pid namespace not supported")]
    JoinPidNs,
    #[error("invalid namespace type {0}")]
    NamespaceKind(String),
    #[error("invalid user namespace extra_opts {0}")]
    UserNamespaceIds(String),
    #[error("Can't parse unix socket inode from optarg: {0}")]
    UnixSocketInode(String),
    #[error("Unable to parse a value of --status-fd")]
    StatusFd,
    #[error(transparent)]
    Key(crate::stores::keys::KeyError),
    #[error("--{option} is not supported: {reason}")]
    Unsupported { option: &'static str, reason: &'static str },
}
