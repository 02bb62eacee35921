//! Every option there is, once: how it is written, what it sets, what the usage text says of it.
//!
//! The order of the lines is the order in which an ambiguous prefix lists its candidates. Options that CRIU does not have
//! are known under our own name only, so that a prefix means under the name `criu` what it means there. What is refused
//! is not said here but in `options/refusals.rs`, which RPC and the library obey too.

use super::getopt::{Arg, Spelling};
use super::values::{atoi, number, path, size, text};
use crate::options::{
    CgroupMode, CgroupRoot, External, FileValidation, FinalState, InheritFd, JoinNs, NetworkLock, OptionError, Options,
    Persona, PreDumpMode,
};
use crate::progress::Listener;
use crate::stores::{keys, Channel};
use std::ffi::OsStr;

/// Where the usage text lists an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the usage text has their headings
pub enum Section {
    Generic,
    External,
    Special,
    Check,
    Logging,
    Memory,
    Server,
    Config,
    Ours,
    Other,
}

type Value = fn(&mut Options, &OsStr) -> Result<(), OptionError>;
type Maybe = fn(&mut Options, Option<&OsStr>) -> Result<(), OptionError>;

/// What an option does.
#[derive(Debug, Clone, Copy)]
pub enum Effect {
    /// Turns something on or off.
    Switch(fn(&mut Options) -> &mut bool),
    /// Says something without a value.
    Say(fn(&mut Options)),
    /// Needs a value.
    Value(Value),
    /// May have a value.
    Maybe(Maybe),
    /// Close a descriptor of ours right now.
    Close,
    /// The words after `--` are a command to become.
    ExecCmd,
    /// A configuration file; read before all others.
    Config,
    /// No default configuration files; looked at before all others.
    NoDefaultConfig,
    /// What CRIU once had and now refuses.
    Gone(&'static str),
    /// The version, and no more.
    Version,
    /// The usage text, and no more.
    Help,
}

/// One option.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// How it is written.
    pub spelling: Spelling,
    /// What it does.
    pub effect: Effect,
    /// What its value is called in the usage text.
    pub meta: &'static str,
    /// Where the usage text lists it.
    pub section: Section,
    /// What the usage text says.
    pub help: &'static str,
}

impl Opt {
    /// Known under the name `criu` too?
    pub fn is_crius(&self) -> bool {
        self.section != Section::Ours
    }
}

const fn opt(long: &'static str, arg: Arg, effect: Effect, meta: &'static str, s: Section, help: &'static str) -> Opt {
    Opt { spelling: Spelling { long, short: None, arg, negatable: false }, effect, meta, section: s, help }
}

/// A switch that `no-` turns off.
const fn switch(long: &'static str, field: fn(&mut Options) -> &mut bool, s: Section, help: &'static str) -> Opt {
    let mut o = opt(long, Arg::No, Effect::Switch(field), "", s, help);
    o.spelling.negatable = true;
    o
}

const fn say(long: &'static str, effect: fn(&mut Options), s: Section, help: &'static str) -> Opt {
    opt(long, Arg::No, Effect::Say(effect), "", s, help)
}

const fn value(long: &'static str, meta: &'static str, set: Value, s: Section, help: &'static str) -> Opt {
    opt(long, Arg::Required, Effect::Value(set), meta, s, help)
}

const fn maybe(long: &'static str, meta: &'static str, set: Maybe, s: Section, help: &'static str) -> Opt {
    opt(long, Arg::Optional, Effect::Maybe(set), meta, s, help)
}

const fn short(letter: u8, mut o: Opt) -> Opt {
    o.spelling.short = Some(letter);
    o
}

use Section::{Check, Config, Generic, Logging, Memory, Other, Ours, Server, Special};

fn set_verbosity(o: &mut Options, v: Option<&OsStr>) -> Result<(), OptionError> {
    o.log_level = match v.map(OsStr::as_encoded_bytes) {
        None => o.log_level.saturating_add(1),
        Some(b @ [b'v', ..]) => {
            o.log_level.saturating_add(u32::try_from(b.len()).unwrap_or(u32::MAX)).saturating_add(1)
        }
        Some(b) => u32::try_from(atoi(b)).unwrap_or(u32::MAX),
    };
    Ok(())
}

fn set_ext_unix_sk(o: &mut Options, v: Option<&OsStr>) -> Result<(), OptionError> {
    if let Some(v) = v {
        let list = text("ext-unix-sk", v)?;
        for inode in list.split(',').filter(|i| !i.is_empty()) {
            let bad = || OptionError::UnixSocketInode(list.to_owned());
            let inode = inode.parse::<u32>().ok().filter(|i| *i != 0).ok_or_else(bad)?;
            o.external.push(External { key: format!("unix[{inode}]"), value: None });
        }
    }
    o.ext_unix_sk = true;
    Ok(())
}

fn set_manage_cgroups(o: &mut Options, v: Option<&OsStr>) -> Result<(), OptionError> {
    o.manage_cgroups = match v.map(|v| text("manage-cgroups", v)).transpose()? {
        None | Some("soft") => CgroupMode::Soft,
        Some("none") => CgroupMode::None,
        Some("props") => CgroupMode::Props,
        Some("full") => CgroupMode::Full,
        Some("strict") => CgroupMode::Strict,
        Some("ignore") => CgroupMode::Ignore,
        Some(other) => return Err(OptionError::CgroupMode(other.to_owned())),
    };
    Ok(())
}

fn set_external(o: &mut Options, v: &OsStr) -> Result<(), OptionError> {
    o.add_external(text("external", v)?)
}

fn set_mount_map(o: &mut Options, v: &OsStr) -> Result<(), OptionError> {
    match text("ext-mount-map", v)? {
        "auto" => o.autodetect_ext_mounts = true,
        pair => o.external.push(pair_of("mnt", "ext-mount-map", pair, ':')?),
    }
    Ok(())
}

fn pair_of(kind: &str, option: &'static str, pair: &str, by: char) -> Result<External, OptionError> {
    let (id, value) = pair.split_once(by).ok_or_else(|| OptionError::Invalid { option, value: pair.to_owned() })?;
    Ok(External::new(kind, id, value))
}

fn set_network_lock(o: &mut Options, v: &OsStr) -> Result<(), OptionError> {
    o.network_lock = match text("network-lock", v)? {
        "iptables" => NetworkLock::Iptables,
        "nftables" => NetworkLock::Nftables,
        "skip" | "none" => NetworkLock::Skip,
        other => return Err(OptionError::NetworkLock(other.to_owned())),
    };
    Ok(())
}

fn set_progress(o: &mut Options, v: &OsStr) -> Result<(), OptionError> {
    let bad = |v: &str| OptionError::Invalid { option: "progress", value: v.to_owned() };
    o.progress = match text("progress", v)? {
        "bar" => Listener::Bars,
        "none" => Listener::Nobody,
        "json" => Listener::Json(None),
        other => {
            let fd = other.strip_prefix("json:").and_then(|fd| fd.parse::<i32>().ok()).filter(|fd| *fd >= 0);
            Listener::Json(Some(fd.ok_or_else(|| bad(other))?))
        }
    };
    Ok(())
}

fn channel(option: &'static str, v: &OsStr) -> Result<Channel, OptionError> {
    Channel::parse(v).ok_or_else(|| OptionError::Invalid { option, value: v.to_string_lossy().into_owned() })
}

fn set_gpu_map(o: &mut Options, v: &OsStr) -> Result<(), OptionError> {
    let v = text("gpu-map", v)?;
    let bad = || OptionError::Invalid { option: "gpu-map", value: v.to_owned() };
    let (old, new) = v.split_once('=').ok_or_else(bad)?;
    let uuid = |text: &str| standstill_gpu::Uuid::parse(text).ok_or_else(bad);
    o.gpu_map.push((uuid(old)?, uuid(new)?));
    Ok(())
}

fn positive(o: &Options, option: &'static str, v: &OsStr) -> Result<i32, OptionError> {
    let n = number(o.personality, option, v)?;
    let bad = || OptionError::Invalid { option, value: v.to_string_lossy().into_owned() };
    if n > 0 {
        Ok(n)
    } else {
        Err(bad())
    }
}

/// All options.
#[rustfmt::skip]
pub const TABLE: &[Opt] = &[
    short(b't', value("tree", "PID", |o, v| { o.pid = Some(positive(o, "tree", v)?); Ok(()) }, Generic,
        "root of the process tree to dump")),
    short(b's', say("leave-stopped", |o| o.final_state = FinalState::Stop, Generic,
        "tasks stay stopped afterwards")),
    short(b'R', say("leave-running", |o| o.final_state = FinalState::Run, Generic,
        "tasks go on after the dump")),
    short(b'd', switch("restore-detached", |o| &mut o.restore_detach, Generic,
        "do not wait for the restored tree")),
    short(b'S', switch("restore-sibling", |o| &mut o.restore_sibling, Generic,
        "the restored root is a sibling of ours (with -d)")),
    switch("daemon", |o| &mut o.restore_detach, Server,
        "a server goes into the background once its socket is there"),
    short(b'D', value("images-dir", "DIR", |o, v| { o.images_dir = path(v); Ok(()) }, Generic,
        "where images are")),
    short(b'W', value("work-dir", "DIR", |o, v| { o.work_dir = Some(path(v)); Ok(()) }, Generic,
        "where log, pidfile and stats go (as --images-dir)")),
    short(b'o', value("log-file", "FILE", |o, v| { o.log_file = Some(path(v)); Ok(()) }, Logging,
        "log into FILE, \"-\" is standard output")),
    short(b'J', value("join-ns", "NS:{PID|FILE}[,UID,GID]",
        |o, v| { o.join_ns.push(JoinNs::parse(text("join-ns", v)?)?); Ok(()) }, Section::External,
        "enter a namespace instead of making it")),
    short(b'r', value("root", "PATH", |o, v| { o.root = Some(path(v)); Ok(()) }, Special,
        "new root of the file system")),
    short(b'x', maybe("ext-unix-sk", "INODE,...", set_ext_unix_sk, Section::External,
        "unix sockets may have their other end outside")),
    short(b'h', opt("help", Arg::No, Effect::Help, "", Other, "this text")),
    switch("tcp-established", |o| &mut o.tcp_established, Special, "carry established TCP connections"),
    opt("close", Arg::Required, Effect::Close, "FD", Other, "close a descriptor before anything else"),
    switch("log-pid", |o| &mut o.log_pid, Logging, "one log file a restored process, FILE.PID"),
    short(b'V', opt("version", Arg::No, Effect::Version, "", Other, "the version")),
    switch("evasive-devices", |o| &mut o.evasive_devices, Special, "open a device by any path that leads to it"),
    value("pidfile", "FILE", |o, v| { o.pidfile = Some(path(v)); Ok(()) }, Generic,
        "write the pid of the restored root, or of a server"),
    value("veth-pair", "IN=OUT",
        |o, v| { o.external.push(pair_of("veth", "veth-pair", text("veth-pair", v)?, '=')?); Ok(()) },
        Section::External, "outer name of a virtual network device"),
    value("action-script", "FILE", |o, v| { o.action_scripts.push(path(v)); Ok(()) }, Special,
        "a program to run at the stages of the work"),
    switch("link-remap", |o| &mut o.link_remap, Special, "link deleted files back where they have another name"),
    short(b'j', switch("shell-job", |o| &mut o.shell_job, Special, "session and terminal come from outside")),
    short(b'l', switch("file-locks", |o| &mut o.file_locks, Special, "carry locks on files")),
    switch("page-server", |o| &mut o.use_page_server, Memory, "send pages to a page server"),
    value("address", "ADDR", |o, v| { o.address = Some(text("address", v)?.to_owned()); Ok(()) }, Server,
        "address of a server, or socket path of the service"),
    value("port", "PORT", |o, v| {
        let port = u16::try_from(positive(o, "port", v)?);
        o.port = Some(port.map_err(|_| OptionError::Invalid { option: "port", value: v.to_string_lossy().into_owned() })?);
        Ok(())
    }, Server, "port of a page server"),
    value("prev-images-dir", "DIR", |o, v| { o.prev_images_dir = Some(path(v)); Ok(()) }, Memory,
        "the checkpoint before this one, seen from --images-dir"),
    opt("ms", Arg::No, Effect::Gone("--ms is deprecated; see \"Check options\" of criu --help"), "", Other,
        "gone; it was a mode of check"),
    switch("track-mem", |o| &mut o.track_mem, Memory, "note changes of memory for the next dump"),
    switch("auto-dedup", |o| &mut o.auto_dedup, Memory, "free pages that are not needed any more"),
    short(b'L', value("libdir", "DIR", |o, v| { o.libdir = Some(path(v)); Ok(()) }, Special, "where plugins are")),
    maybe("cpu-cap", "CAP,...",
        |o, v| { o.cpu_cap = o.cpu_cap.parse(v.map(|v| text("cpu-cap", v)).transpose()?)?; Ok(()) }, Generic,
        "what must fit about the CPU: cpu, fpu, ins, all, none; ^CAP takes away"),
    switch("force-irmap", |o| &mut o.force_irmap, Special, "search the file system for names of watched files"),
    short(b'M', value("ext-mount-map", "KEY:VALUE", set_mount_map, Section::External,
        "a mount from outside, or \"auto\"")),
    opt("exec-cmd", Arg::No, Effect::ExecCmd, "", Generic, "become the command after \"--\" once all is restored"),
    maybe("manage-cgroups", "MODE", set_manage_cgroups, Special,
        "cgroups: none, props, soft (default), full, strict, ignore"),
    value("cgroup-root", "[CTRL:]PATH",
        |o, v| { o.cgroup_roots.push(CgroupRoot::parse(text("cgroup-root", v)?)); Ok(()) }, Special,
        "new root for cgroups of one controller, or of all"),
    value("inherit-fd", "fd[N]:RES",
        |o, v| { o.inherit_fds.push(InheritFd::parse(text("inherit-fd", v)?)?); Ok(()) }, Section::External,
        "our descriptor N stands for a file of the image (restore)"),
    value("feature", "NAME", |o, v| { o.check_feature = Some(text("feature", v)?.to_owned()); Ok(()) }, Check,
        "look at one feature only"),
    value("skip-mnt", "PATH", |o, v| { o.skip_mnt.push(path(v)); Ok(()) }, Section::External,
        "leave a mount point out"),
    value("enable-fs", "FS,...",
        |o, v| { o.enable_fs.extend(text("enable-fs", v)?.split(',').map(str::to_owned)); Ok(()) }, Section::External,
        "carry file systems by name alone, or \"all\""),
    say("enable-external-sharing", |o| o.enable_external_sharing = true, Section::External,
        "with -M auto: also mounts that are shared with the outside"),
    say("enable-external-masters", |o| o.enable_external_masters = true, Section::External,
        "with -M auto: also mounts that follow a master outside"),
    value("freeze-cgroup", "PATH", |o, v| { o.freeze_cgroup = Some(path(v)); Ok(()) }, Generic,
        "stop the tree by this freezer cgroup"),
    value("ghost-limit", "SIZE", |o, v| { o.ghost_limit = size(o.personality, "ghost-limit", v)?; Ok(()) }, Special,
        "largest deleted file to carry, with K, M or G (1M)"),
    value("irmap-scan-path", "PATH", |o, v| { o.irmap_scan_paths.push(path(v)); Ok(()) }, Special,
        "where to search for watched files first"),
    value("lsm-profile", "TYPE:NAME", |o, v| { o.lsm_profile = Some(text("lsm-profile", v)?.to_owned()); Ok(()) },
        Special, "security profile to restore under: apparmor:NAME, selinux:LABEL"),
    value("timeout", "SECONDS",
        |o, v| { o.timeout = u32::try_from(number(o.personality, "timeout", v)?).unwrap_or(u32::MAX); Ok(()) }, Generic,
        "how long freezing the tree may take (10); 0: no limit"),
    value("external", "KIND[ID]:VALUE", set_external, Section::External, "something outside the tree, by kind and id"),
    value("empty-ns", "net", |o, v| match text("empty-ns", v)? {
        "net" => { o.empty_ns.net = true; Ok(()) }
        other => Err(OptionError::EmptyNamespace(other.to_owned())),
    }, Section::External, "make the namespace, leave filling it to a script"),
    say("lazy-pages", |o| o.lazy_pages = true, Memory, "pages come on demand"),
    switch("extra", |o| &mut o.check_extra, Check, "also what only some programs need"),
    switch("experimental", |o| &mut o.check_experimental, Check, "also what is experimental"),
    say("all", |o| { o.check_extra = true; o.check_experimental = true; }, Check, "both of these"),
    value("cgroup-props", "YAML", |o, v| { o.cgroup_props = Some(text("cgroup-props", v)?.to_owned()); Ok(()) },
        Special, "properties of cgroup controllers to carry"),
    value("cgroup-props-file", "FILE", |o, v| { o.cgroup_props_file = Some(path(v)); Ok(()) }, Special,
        "the same, from a file"),
    value("cgroup-dump-controller", "NAME",
        |o, v| { o.cgroup_dump_controllers.push(text("cgroup-dump-controller", v)?.to_owned()); Ok(()) }, Special,
        "carry this controller only (may be repeated)"),
    switch("skip-in-flight", |o| &mut o.tcp_skip_in_flight, Special, "leave out TCP connections that are half made"),
    switch("deprecated", |o| &mut o.deprecated, Other, "accept what is deprecated"),
    switch("display-stats", |o| &mut o.display_stats, Logging, "print statistics at the end"),
    switch("weak-sysctls", |o| &mut o.weak_sysctls, Special, "sysctls that are not there are no error"),
    value("status-fd", "FD", |o, v| {
        let n = number(o.personality, "status-fd", v).ok().filter(|_| v.as_encoded_bytes().iter().any(u8::is_ascii_digit));
        o.status_fd = Some(n.ok_or(OptionError::StatusFd)?);
        Ok(())
    }, Server, "write one zero byte to FD when ready"),
    switch("tcp-close", |o| &mut o.tcp_close, Special, "restore TCP connections closed"),
    short(b'v', maybe("verbosity", "NUM", set_verbosity, Logging,
        "0 nothing, 1 errors, 2 warnings (default), 3 information, 4 all")),
    value("ps-socket", "FD", |o, v| { o.ps_socket = Some(number(o.personality, "ps-socket", v)?); Ok(()) }, Server,
        "a socket of ours instead of address and port"),
    switch("stream", |o| &mut o.stream, Memory, "images go through a streaming peer"),
    opt("config", Arg::Required, Effect::Config, "FILE", Config, "read this file instead of the default ones"),
    opt("no-default-config", Arg::No, Effect::NoDefaultConfig, "", Config, "do not read the default files"),
    value("tls-cacert", "FILE", |o, v| { o.tls_cacert = Some(path(v)); Ok(()) }, Server, "who may sign certificates"),
    value("tls-cacrl", "FILE", |o, v| { o.tls_cacrl = Some(path(v)); Ok(()) }, Server, "certificates that are revoked"),
    value("tls-cert", "FILE", |o, v| { o.tls_cert = Some(path(v)); Ok(()) }, Server, "our certificate"),
    value("tls-key", "FILE", |o, v| { o.tls_key = Some(path(v)); Ok(()) }, Server, "our private key"),
    switch("tls", |o| &mut o.tls, Server, "encrypt the connection"),
    say("tls-no-cn-verify", |o| o.tls_no_cn_verify = true, Server, "do not compare the peer's name"),
    value("cgroup-yard", "PATH", |o, v| { o.cgroup_yard = Some(path(v)); Ok(()) }, Special,
        "a folder with cgroups already mounted"),
    value("pre-dump-mode", "MODE", |o, v| match text("pre-dump-mode", v)? {
        "read" => { o.pre_dump_mode = PreDumpMode::Read; Ok(()) }
        "splice" => Ok(()),
        _ => Err(OptionError::PreDumpMode),
    }, Memory, "take pages from inside (splice) or outside (read)"),
    value("file-validation", "METHOD", |o, v| {
        o.file_validation = match text("file-validation", v)? {
            "filesize" => FileValidation::FileSize,
            "buildid" => FileValidation::BuildId,
            other => return Err(OptionError::FileValidation(other.to_owned())),
        };
        Ok(())
    }, Special, "how to know a file again: filesize, buildid (default)"),
    switch("skip-file-rwx-check", |o| &mut o.skip_file_rwx_check, Special, "do not compare permissions of files"),
    value("lsm-mount-context", "CONTEXT",
        |o, v| { o.lsm_mount_context = Some(text("lsm-mount-context", v)?.to_owned()); Ok(()) }, Special,
        "new security context for mounts that have one"),
    value("network-lock", "METHOD", set_network_lock, Special, "keep packets out by nftables (default; of criu: iptables), iptables, skip"),
    switch("mntns-compat-mode", |o| &mut o.mntns_compat_mode, Special, "make mounts as old kernels need it"),
    switch("unprivileged", |o| &mut o.unprivileged, Generic, "accept what does not work without root"),
    switch("ghost-fiemap", |o| &mut o.ghost_fiemap, Special, "find holes of deleted files by FIEMAP (default)"),
    switch("allow-uprobes", |o| &mut o.allow_uprobes, Special, "areas made by uprobes are no reason to refuse"),
    value("jobs", "N", |o, v| {
        let n = usize::try_from(positive(o, "jobs", v)?).ok().and_then(std::num::NonZeroUsize::new);
        o.jobs = n;
        Ok(())
    }, Ours, "how many threads may work at once"),
    switch("show-plan", |o| &mut o.show_plan, Ours, "print what would be done in the tasks, and do nothing"),
    switch("snapshot", |o| &mut o.snapshot, Ours, "let the tree go on while its memory is written"),
    value("progress", "HOW", set_progress, Ours, "bar (default on a terminal), none, json, or json:FD"),
    switch("compress", |o| &mut o.compress, Ours, "pack pages with LZ4 (CRIU 4.2 does not restore them)"),
    value("compress-block", "SIZE", |o, v| {
        let bad = || OptionError::Invalid { option: "compress-block", value: v.to_string_lossy().into_owned() };
        let bytes = u32::try_from(size(o.personality, "compress-block", v)?).map_err(|_| bad())?;
        if bytes == 0 || bytes > 4 << 20 || bytes % 4096 != 0 {
            return Err(bad());
        }
        o.compress_block = bytes;
        Ok(())
    }, Ours, "how much is packed together, with K or M (256K)"),
    value("gpu-map", "OLD=NEW", set_gpu_map, Ours, "restore what was on one GPU to another, by UUIDs"),
    value("gpu-timeout", "SECONDS", |o, v| {
        o.gpu_timeout = Some(u32::try_from(number(o.personality, "gpu-timeout", v)?).unwrap_or(u32::MAX));
        Ok(())
    }, Ours, "how long CUDA work may take until it can be locked (as --timeout)"),
    switch("display-gpus", |o| &mut o.display_gpus, Ours, "print the GPUs of the checkpoint, and who uses them"),
    value("every", "DURATION", |o, v| {
        let bad = || OptionError::Invalid { option: "every", value: v.to_string_lossy().into_owned() };
        o.every = Some(crate::periodic::parse_duration(text("every", v)?).ok_or_else(bad)?);
        Ok(())
    }, Ours, "dump this often (30s, 5m, 1h), until the tree ends, into folders of --images-dir"),
    value("keep", "N", |o, v| { o.keep = u32::try_from(positive(o, "keep", v)?).unwrap_or(1); Ok(()) }, Ours,
        "with --every: how many checkpoints are kept (2)"),
    switch("json", |o| &mut o.json, Ours, "print results as JSON"),
    value("key-file", "FILE", |o, v| {
        o.key = Some(keys::of_file(&path(v)).map_err(OptionError::Key)?);
        Ok(())
    }, Ours, "images are sealed with the key in FILE: 32 bytes or 64 hexadecimal digits"),
    value("key-fd", "FD", |o, v| {
        o.key = Some(keys::of_fd(number(o.personality, "key-fd", v)?).map_err(OptionError::Key)?);
        Ok(())
    }, Ours, "images are sealed with the key that the descriptor gives"),
    value("to", "-|fd:N|FILE|URL", |o, v| { o.to = Some(channel("to", v)?); Ok(()) }, Ours,
        "dump: images go out as one stream, or to object storage, instead of into a folder"),
    value("from", "-|fd:N|FILE|URL", |o, v| { o.from = Some(channel("from", v)?); Ok(()) }, Ours,
        "restore: images come in as one stream, or from object storage"),
    value("storage-option", "KEY=VALUE", |o, v| {
        let v = text("storage-option", v)?;
        // the value may be a secret: it is not in an error
        let bad = || OptionError::Invalid { option: "storage-option", value: "KEY=VALUE is wanted".to_owned() };
        let (key, value) = v.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(bad)?;
        o.storage_options.push((key.to_owned(), value.to_owned()));
        Ok(())
    }, Ours, "how to reach object storage: endpoint, region, allow_http, timeout, retries and others"),
];

/// The options that are known under a name, with their spellings in the same order.
pub fn known(persona: Persona) -> (Vec<&'static Opt>, Vec<Spelling>) {
    let opts: Vec<_> = TABLE.iter().filter(|o| persona == Persona::Standstill || o.is_crius()).collect();
    let spellings = opts.iter().map(|o| o.spelling).collect();
    (opts, spellings)
}
