//! Everything that a caller can ask of a dump, a restore or one of the smaller verbs, as plain data.
//!
//! The command line, the configuration files, CRIU's RPC and an embedding program all end up here; nothing in this file
//! knows which of them spoke. A field says what was asked, never what follows from it: defaults that depend on the verb
//! or on the kernel are decided where they are used. What cannot be done yet is refused by name, in one place
//! ([`Options::refuse_unsupported`], whose list is in `options/refusals.rs`).
//!
//! Man page: criu(8).

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use standstill_images::store::sealed::Key;

use crate::progress::Listener;
use crate::stores::{Channel, Given};

mod refusals;
mod values;

pub use refusals::{refusal, Refusal, REFUSALS};
pub use values::{
    CgroupMode, CgroupRoot, CpuCap, EmptyNamespaces, External, FileValidation, FinalState, InheritFd, JoinNs,
    NamespaceKind, NetworkLock, OptionError, Persona, PreDumpMode,
};

/// How large a deleted file may be to travel inside an image, if nothing else is said: 1 MiB.
pub const DEFAULT_GHOST_LIMIT: u64 = 1 << 20;
/// How many bytes are packed together, if nothing else is said.
pub const DEFAULT_COMPRESS_BLOCK: u32 = 256 << 10;
/// How many seconds collecting and freezing the tree may take, if nothing else is said.
pub const DEFAULT_TIMEOUT: u32 = 10;
/// The log level if nothing else is said: errors and warnings.
pub const DEFAULT_LOG_LEVEL: u32 = 2;

/// What was asked, by whichever way it was asked.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whose defaults, texts and refusals apply: the name that the program was called by.
    pub personality: Persona,

    // Which tree, and where it is kept.
    /// The root of the tree to dump (`-t`).
    pub pid: Option<i32>,
    /// Where images are (`-D`); the current folder if nothing is said.
    pub images_dir: PathBuf,
    /// Where images are instead of a folder (library only).
    pub store: Option<Given>,
    /// Images are sealed with this key (`--key-file`, `--key-fd`).
    pub key: Option<Key>,
    /// Images go into a stream instead of a folder (`--to`).
    pub to: Option<Channel>,
    /// Images come from a stream instead of a folder (`--from`).
    pub from: Option<Channel>,
    /// How to reach an object storage, keys and values (`--storage-option`).
    pub storage_options: Vec<(String, String)>,
    /// Where logs, pidfile and stats go (`-W`); [`Options::work_dir`] answers with the image folder if this is unset.
    pub work_dir: Option<PathBuf>,
    /// The folder with the checkpoint before this one, relative to the image folder (`--prev-images-dir`).
    pub prev_images_dir: Option<PathBuf>,
    /// Images go through a streaming peer instead of a folder (`--stream`).
    pub stream: bool,
    /// A file for the process id of the restored root, the service or the page server (`--pidfile`), relative to the
    /// work folder.
    pub pidfile: Option<PathBuf>,

    // Logging.
    /// The log file (`-o`), relative to the work folder; `-` is standard output.
    pub log_file: Option<PathBuf>,
    /// 0 nothing, 1 errors, 2 warnings, 3 information, 4 and up everything (`-v`).
    pub log_level: u32,
    /// One log file a restored process (`--log-pid`).
    pub log_pid: bool,
    /// Log to standard error whatever `log_file` says (RPC only).
    pub log_to_stderr: bool,
    /// Print the statistics of a dump or restore when it is done (`--display-stats`).
    pub display_stats: bool,

    // What becomes of the tree, and of us.
    /// What happens to the tasks after a dump, or after a restore.
    pub final_state: FinalState,
    /// Do not wait for the restored tree (`-d`); for a server: run in the background.
    pub restore_detach: bool,
    /// The restored root becomes our sibling instead of our child (`-S`).
    pub restore_sibling: bool,
    /// A command to become after a restore, parent of the restored tree (`--exec-cmd -- …`).
    pub exec_cmd: Vec<OsString>,
    /// The tasks belong to a shell's job: session, group and terminal come from us (`-j`).
    pub shell_job: bool,
    /// Seconds that collecting and freezing the tree may take (`--timeout`); 0: no limit.
    pub timeout: u32,
    /// A freezer cgroup to stop the tree with (`--freeze-cgroup`).
    pub freeze_cgroup: Option<PathBuf>,
    /// Accept what does not work without root (`--unprivileged`).
    pub unprivileged: bool,
    /// Programs to run at the stages of a dump or restore (`--action-script`), in the order they were given; CRIU runs
    /// the latest first.
    pub action_scripts: Vec<PathBuf>,
    /// Stages are announced to an RPC peer instead of scripts (RPC only).
    pub notify_scripts: bool,
    /// The peer wants the master of an orphan terminal (RPC only).
    pub orphan_pts_master: bool,
    /// We serve one RPC peer on an inherited socket (RPC only).
    pub swrk: bool,
    /// The inode of our end of the connection to that peer, which may be in the tree (RPC only).
    pub service_socket: Option<u32>,
    /// A descriptor that gets one zero byte when a server, or a lazy restore, is ready (`--status-fd`).
    pub status_fd: Option<i32>,
    /// Where plugins are (`-L`).
    pub libdir: Option<PathBuf>,

    // Memory.
    /// Note changes of memory from now on, for the next dump (`--track-mem`).
    pub track_mem: bool,
    /// Free what a newer image replaces, or what a restore has read (`--auto-dedup`).
    pub auto_dedup: bool,
    /// How a pre-dump takes pages (`--pre-dump-mode`).
    pub pre_dump_mode: PreDumpMode,
    /// Pages come on demand (`--lazy-pages`).
    pub lazy_pages: bool,
    /// A socket on which pidfds are kept between pre-dumps (RPC only).
    pub pidfd_store_sk: Option<i32>,

    // Page server, and other servers.
    /// Send pages to a server (`--page-server`).
    pub use_page_server: bool,
    /// The server's address, or the service's socket path (`--address`).
    pub address: Option<String>,
    /// The server's port (`--port`).
    pub port: Option<u16>,
    /// A connected or listening socket to use instead of address and port (`--ps-socket`).
    pub ps_socket: Option<i32>,
    /// Encrypt what goes to a server (`--tls`).
    pub tls: bool,
    /// Who may sign the peer's certificate (`--tls-cacert`).
    pub tls_cacert: Option<PathBuf>,
    /// Which certificates are revoked (`--tls-cacrl`).
    pub tls_cacrl: Option<PathBuf>,
    /// Our certificate (`--tls-cert`).
    pub tls_cert: Option<PathBuf>,
    /// Our private key (`--tls-key`).
    pub tls_key: Option<PathBuf>,
    /// Do not compare the peer's name with its certificate (`--tls-no-cn-verify`).
    pub tls_no_cn_verify: bool,

    // Files.
    /// Things outside the tree, by kind and id, in the order they were given (`--external`, `--veth-pair`,
    /// `--ext-mount-map` and the socket inodes of `--ext-unix-sk`).
    pub external: Vec<External>,
    /// Descriptors of ours that stand for files of the image (`--inherit-fd`).
    pub inherit_fds: Vec<InheritFd>,
    /// The other end of a unix socket may be outside the tree (`-x`).
    pub ext_unix_sk: bool,
    /// Locks on files are carried (`-l`).
    pub file_locks: bool,
    /// Deleted files that still have a name elsewhere may be linked back (`--link-remap`).
    pub link_remap: bool,
    /// How large a deleted file may be to travel in an image, in bytes (`--ghost-limit`).
    pub ghost_limit: u64,
    /// Find the holes of deleted files by FIEMAP (`--ghost-fiemap`, on unless negated).
    pub ghost_fiemap: bool,
    /// A device may be opened by any path that leads to it (`--evasive-devices`).
    pub evasive_devices: bool,
    /// Search the file system for the names of watched inodes (`--force-irmap`).
    pub force_irmap: bool,
    /// Where to search for them first (`--irmap-scan-path`).
    pub irmap_scan_paths: Vec<PathBuf>,
    /// How to tell that a file is still the one that was dumped (`--file-validation`).
    pub file_validation: FileValidation,
    /// Do not compare permissions of files (`--skip-file-rwx-check`).
    pub skip_file_rwx_check: bool,
    /// Areas made by uprobes are no reason to refuse (`--allow-uprobes`).
    pub allow_uprobes: bool,

    // Sockets and networks.
    /// Carry established TCP connections (`--tcp-established`).
    pub tcp_established: bool,
    /// Restore TCP connections closed (`--tcp-close`).
    pub tcp_close: bool,
    /// Leave out connections that are half made (`--skip-in-flight`).
    pub tcp_skip_in_flight: bool,
    /// How packets are kept out between dump and restore (`--network-lock`).
    pub network_lock: NetworkLock,
    /// Sysctls that are not there are no error (`--weak-sysctls`).
    pub weak_sysctls: bool,

    // Namespaces and mounts.
    /// The new root folder (`-r`).
    pub root: Option<PathBuf>,
    /// Namespaces to enter instead of making them (`-J`).
    pub join_ns: Vec<JoinNs>,
    /// Namespaces to make without filling them (`--empty-ns`).
    pub empty_ns: EmptyNamespaces,
    /// Bind mounts from outside are found by themselves (`-M auto`, `--external mnt[]`).
    pub autodetect_ext_mounts: bool,
    /// … also if they are shared (`--enable-external-sharing`).
    pub enable_external_sharing: bool,
    /// … also if they have a master outside (`--enable-external-masters`).
    pub enable_external_masters: bool,
    /// Mount points to leave out (`--skip-mnt`).
    pub skip_mnt: Vec<PathBuf>,
    /// File systems to carry by name alone (`--enable-fs`); `all` is one of the names then.
    pub enable_fs: Vec<String>,
    /// Mounts are made the way kernels before 5.15 need (`--mntns-compat-mode`).
    pub mntns_compat_mode: bool,

    // Cgroups.
    /// How much of the cgroups is carried (`--manage-cgroups`).
    pub manage_cgroups: CgroupMode,
    /// New roots for cgroups; the one without a controller is for all others (`--cgroup-root`).
    pub cgroup_roots: Vec<CgroupRoot>,
    /// Properties of controllers, in CRIU's own notation (`--cgroup-props`).
    pub cgroup_props: Option<String>,
    /// … in a file (`--cgroup-props-file`).
    pub cgroup_props_file: Option<PathBuf>,
    /// Carry only these controllers (`--cgroup-dump-controller`).
    pub cgroup_dump_controllers: Vec<String>,
    /// A folder with cgroups already mounted (`--cgroup-yard`).
    pub cgroup_yard: Option<PathBuf>,

    // Security labels and the CPU.
    /// `apparmor:NAME` or `selinux:LABEL` instead of the label in the image (`--lsm-profile`).
    pub lsm_profile: Option<String>,
    /// A new value for `context=` of mounts that have one (`--lsm-mount-context`).
    pub lsm_mount_context: Option<String>,
    /// What about the CPU is written and compared (`--cpu-cap`).
    pub cpu_cap: CpuCap,

    // `check`.
    /// Also features that only some programs need (`--extra`).
    pub check_extra: bool,
    /// Also experimental features (`--experimental`).
    pub check_experimental: bool,
    /// Only this feature (`--feature`).
    pub check_feature: Option<String>,
    /// Accept what CRIU has deprecated (`--deprecated`).
    pub deprecated: bool,

    // What CRIU does not have.
    /// How many threads may work at once; one for each CPU if nothing is said (`--jobs`).
    pub jobs: Option<NonZeroUsize>,
    /// Print the plans instead of running them (`--show-plan`).
    pub show_plan: bool,
    /// Copy memory in the target and let it go on while that is written (`--snapshot`).
    pub snapshot: bool,
    /// Who is told how far the work is (`--progress`).
    pub progress: Listener,
    /// Pack pages with LZ4 (`--compress`), in the form that CRIU has after 4.2; CRIU 4.2 refuses such a checkpoint.
    pub compress: bool,
    /// How many bytes are packed together (`--compress-block`); whole pages, 4 MiB at most.
    pub compress_block: u32,
    /// GPUs that take the place of those of the checkpoint: old and new (`--gpu-map`).
    pub gpu_map: Vec<(standstill_gpu::Uuid, standstill_gpu::Uuid)>,
    /// How many seconds the CUDA work of a task may take until it can be locked; 0: no limit (`--gpu-timeout`).
    pub gpu_timeout: Option<u32>,
    /// Print the GPUs of the checkpoint when it is done (`--display-gpus`).
    pub display_gpus: bool,
    /// Dump again and again, this often (`--every`); the image folder gets a folder for each.
    pub every: Option<std::time::Duration>,
    /// How many of these are kept at least (`--keep`).
    pub keep: u32,
    /// Print results as JSON (`--json`).
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            personality: Persona::default(),
            pid: None,
            images_dir: PathBuf::from("."),
            store: None,
            key: None,
            storage_options: Vec::new(),
            to: None,
            from: None,
            work_dir: None,
            prev_images_dir: None,
            stream: false,
            pidfile: None,
            log_file: None,
            log_level: DEFAULT_LOG_LEVEL,
            log_pid: false,
            log_to_stderr: false,
            display_stats: false,
            final_state: FinalState::default(),
            restore_detach: false,
            restore_sibling: false,
            exec_cmd: Vec::new(),
            shell_job: false,
            timeout: DEFAULT_TIMEOUT,
            freeze_cgroup: None,
            unprivileged: false,
            action_scripts: Vec::new(),
            notify_scripts: false,
            orphan_pts_master: false,
            swrk: false,
            service_socket: None,
            status_fd: None,
            libdir: None,
            track_mem: false,
            auto_dedup: false,
            pre_dump_mode: PreDumpMode::default(),
            lazy_pages: false,
            pidfd_store_sk: None,
            use_page_server: false,
            address: None,
            port: None,
            ps_socket: None,
            tls: false,
            tls_cacert: None,
            tls_cacrl: None,
            tls_cert: None,
            tls_key: None,
            tls_no_cn_verify: false,
            external: Vec::new(),
            inherit_fds: Vec::new(),
            ext_unix_sk: false,
            file_locks: false,
            link_remap: false,
            ghost_limit: DEFAULT_GHOST_LIMIT,
            ghost_fiemap: true,
            evasive_devices: false,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            file_validation: FileValidation::default(),
            skip_file_rwx_check: false,
            allow_uprobes: false,
            tcp_established: false,
            tcp_close: false,
            tcp_skip_in_flight: false,
            network_lock: NetworkLock::default(),
            weak_sysctls: false,
            root: None,
            join_ns: Vec::new(),
            empty_ns: EmptyNamespaces::default(),
            autodetect_ext_mounts: false,
            enable_external_sharing: false,
            enable_external_masters: false,
            skip_mnt: Vec::new(),
            enable_fs: Vec::new(),
            mntns_compat_mode: false,
            manage_cgroups: CgroupMode::default(),
            cgroup_roots: Vec::new(),
            cgroup_props: None,
            cgroup_props_file: None,
            cgroup_dump_controllers: Vec::new(),
            cgroup_yard: None,
            lsm_profile: None,
            lsm_mount_context: None,
            cpu_cap: CpuCap::default(),
            check_extra: false,
            check_experimental: false,
            check_feature: None,
            deprecated: false,
            jobs: None,
            show_plan: false,
            snapshot: false,
            progress: Listener::default(),
            compress: false,
            compress_block: DEFAULT_COMPRESS_BLOCK,
            gpu_map: Vec::new(),
            gpu_timeout: None,
            display_gpus: false,
            every: None,
            keep: crate::periodic::DEFAULT_KEEP,
            json: false,
        }
    }
}

impl Options {
    /// Where logs, pidfile and stats go.
    pub fn work_dir(&self) -> &Path {
        self.work_dir.as_deref().unwrap_or(&self.images_dir)
    }

    /// Images are in a folder, or at least meet there (`--stream`).
    pub fn has_folder(&self) -> bool {
        self.store.is_none() && self.to.is_none() && self.from.is_none()
    }

    /// Images are files of a folder.
    pub fn keeps_images(&self) -> bool {
        self.has_folder() && !self.stream
    }

    /// A path that was given relative to the work folder, as one relative to the current folder. The engine never
    /// changes its current folder (it may be a guest in someone's program), so every such path goes through here.
    pub fn in_work_dir(&self, path: &Path) -> PathBuf {
        self.work_dir().join(path)
    }

    /// Tells whoever waits for a server that it is ready now: one zero byte to `status_fd`, which is closed then. Other verbs
    /// than servers have nothing to say there, as in CRIU.
    pub fn say_ready(&self) -> Result<(), crate::error::Error> {
        self.status_fd.map_or(Ok(()), crate::sys::calls::say_ready)
    }

    /// How many pages are packed together; none if they are not packed.
    pub fn pages_per_block(&self) -> Option<u32> {
        self.compress.then(|| (self.compress_block / 4096).clamp(1, 1024))
    }

    /// Tasks go on after a dump.
    pub fn leave_running(&self) -> bool {
        self.final_state == FinalState::Run
    }

    /// Tasks stay stopped after a dump or a restore.
    pub fn leave_stopped(&self) -> bool {
        self.final_state == FinalState::Stop
    }

    /// The same with more that belongs to the outside, as `--external` says it.
    pub fn with_external(&self, more: &[String]) -> Result<Options, OptionError> {
        let mut options = self.clone();
        for external in more {
            tracing::info!("Adding external object: {external}");
            options.add_external(external)?;
        }
        options.refuse_unsupported()?;
        Ok(options)
    }

    /// What `--external` says: a resource, or by `mnt[]` which mounts are found by themselves.
    pub fn add_external(&mut self, text: &str) -> Result<(), OptionError> {
        let Some(flags) = text.strip_prefix("mnt[]") else {
            self.external.push(External::parse(text));
            return Ok(());
        };
        self.autodetect_ext_mounts = true;
        match flags.strip_prefix(':').unwrap_or("").chars().next() {
            None => {}
            Some('m') => self.enable_external_masters = true,
            Some('s') => self.enable_external_sharing = true,
            Some(_) => return Err(OptionError::Invalid { option: "external", value: text.to_owned() }),
        }
        Ok(())
    }

    /// Why what was asked for cannot be asked for together; `restoring` if it is a restore.
    pub fn conflict(&self, restoring: bool) -> Option<&'static str> {
        let standard_socket = self.ps_socket.is_some_and(|fd| (0..=2).contains(&fd));
        let joins_net = self.join_ns.iter().any(|j| j.kind == NamespaceKind::Net);
        let problems = [
            (
                self.restore_sibling && !self.restore_detach,
                "--restore-sibling only makes sense with --restore-detached",
            ),
            (standard_socket && self.restore_detach, "Standard file descriptors will be closed in daemon mode"),
            (self.mntns_compat_mode && !restoring, "Option --mntns-compat-mode is only valid on restore"),
            (joins_net && self.empty_ns.net, "Conflicting flags: --join-ns and --empty-ns"),
            (!self.inherit_fds.is_empty() && !restoring, "--inherit-fd is restore-only option"),
        ];
        problems.iter().find(|(wrong, _)| *wrong).map(|(_, text)| *text)
    }

    /// Is there an external resource with exactly this key (`unix[4711]`)?
    pub fn external_has(&self, key: &str) -> bool {
        self.external.iter().any(|e| e.key == key)
    }

    /// The value that belongs to a key (`mnt[/data]` → `data`). The latest one given wins, as in CRIU. The outer
    /// `None` means that there is no such key, the inner one that it has no value.
    pub fn external_value(&self, key: &str) -> Option<Option<&str>> {
        self.external.iter().rev().find(|e| e.key == key).map(|e| e.value.as_deref())
    }

    /// All external resources of a kind (`veth`), the latest first, as CRIU walks them.
    pub fn external_of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a External> + 'a {
        self.external.iter().rev().filter(move |e| e.kind() == kind)
    }

    /// The descriptor of ours that stands for a file with this id.
    pub fn inherited_fd(&self, id: &str) -> Option<i32> {
        self.inherit_fds.iter().find(|i| i.id == id).map(|i| i.fd)
    }

    /// The process id to dump, or the error that says that none was given.
    pub fn required_pid(&self) -> Result<i32, OptionError> {
        self.pid.ok_or(OptionError::PidMissing)
    }

    /// An error that names the first thing asked for that cannot be done yet. Nothing has been touched at that time.
    pub fn refuse_unsupported(&self) -> Result<(), OptionError> {
        match REFUSALS.iter().find(|r| (r.asked)(self)) {
            Some(r) => Err(OptionError::Unsupported { option: r.option, reason: r.reason }),
            None => Ok(()),
        }
    }
}
