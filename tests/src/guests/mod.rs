//! The programs under test: one file a resource, with the name of its file in the engine.
//!
//! A guest that needs an option, or that CRIU cannot carry, says so in [`ALL`], with the reason.

#[macro_use]
pub mod support;

mod aio;
mod cgroup;
mod clocks;
mod creds;
mod cwd;
mod devices;
mod epoll;
mod eventfd;
mod fanotify;
mod fifo;
mod files;
mod inet;
mod inet_groups;
mod inet_options;
mod inotify;
mod io_uring;
mod ipc;
mod lease;
mod limits;
mod locks;
mod membarrier;
mod memfd;
mod memory;
mod mounts;
mod namespaces;
mod netlink;
mod network_namespace;
mod outside;
mod packed;
mod packet;
mod peercred;
mod personality;
mod pidfd;
mod pipes;
mod proc_self;
mod refused;
mod registers;
mod robust;
mod rpc;
mod rseq;
mod seccomp;
mod signalfd;
mod signals;
mod storm;
mod sysv;
mod tcp;
mod threads;
mod timerfd;
mod timers;
mod track;
mod tree;
mod tty;
mod unix;
mod waits;

use std::path::PathBuf;

/// Whether CRIU 4 can carry a guest too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Criu {
    /// It can.
    Carries,
    /// It can where it has CAP_SYS_RESOURCE, for this reason.
    WithSysResource(&'static str),
    /// It cannot, for this reason.
    Cannot(&'static str),
    /// It cannot dump it, for this reason, but restores our images of it.
    RestoresOnly(&'static str),
    /// It cannot restore it, for this reason, but we restore its images.
    DumpsOnly(&'static str),
}

/// A program that builds up state and checks it.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// Its name, and that of its tests.
    pub name: &'static str,
    /// What it does, from its beginning to its last check.
    pub run: fn(),
    /// What a dump of it needs besides the usual options.
    pub dump: &'static [&'static str],
    /// What a restore of it needs.
    pub restore: &'static [&'static str],
    /// What CRIU can do with it.
    pub criu: Criu,
    /// CLONE_NEW flags of namespaces that it is started in.
    pub namespaces: i32,
    /// It cannot be carried at all; the refusal names these.
    pub refused: &'static [&'static str],
    /// Two checkpoints of it differ in ways that no list can hold, for this reason.
    pub changes: Option<&'static str>,
    /// It has a network namespace with nobody else in it, and so have those who dump and restore it.
    pub alone_in_network: bool,
    /// How many dumps in a row it is to survive when it is left running.
    pub dumps: u32,
    /// Its processes come and go: who is missing may have ended.
    pub restless: bool,
}

const fn guest(name: &'static str, run: fn()) -> Guest {
    Guest {
        name,
        run,
        dump: &[],
        restore: &[],
        criu: Criu::Carries,
        refused: &[],
        changes: None,
        alone_in_network: false,
        namespaces: 0,
        dumps: 2,
        restless: false,
    }
}

impl Guest {
    const fn dump(self, dump: &'static [&'static str]) -> Guest {
        Guest { dump, ..self }
    }
    const fn restore(self, restore: &'static [&'static str]) -> Guest {
        Guest { restore, ..self }
    }
    const fn criu(self, criu: Criu) -> Guest {
        Guest { criu, ..self }
    }
    const fn refused(self, refused: &'static [&'static str]) -> Guest {
        Guest { refused, ..self }
    }
    const fn changes(self, why: &'static str) -> Guest {
        Guest { changes: Some(why), ..self }
    }
    const fn alone_in_network(self) -> Guest {
        Guest { alone_in_network: true, ..self }
    }
    const fn within(self, namespaces: i32) -> Guest {
        Guest { namespaces, ..self }
    }
    /// Whether its processes have other ids with us than with each other.
    pub const fn has_own_ids(&self) -> bool {
        self.namespaces & libc::CLONE_NEWPID != 0
    }
    const fn restless(self) -> Guest {
        Guest { restless: true, ..self }
    }
    const fn dumps(self, dumps: u32) -> Guest {
        Guest { dumps, ..self }
    }
}

const FLAG: &str = "CRIU 4.2 restores folders without O_DIRECTORY";
const MOUNTS: &str = "mounts have other ids, which files name";
const BEFORE: &str = "CRIU 4.2 does not carry what was opened before its task got mounts of its own";
const EINTR: &str = "CRIU 4.2 ends waits with EINTR when it dumps";
const NUMBERS: &str = "sequence numbers, and images that are called by inodes";
const WRITES: &str = "it goes on writing";
const BREAKS: &str = "CRIU 4.2 does not restore it on Linux 6.18";
const HOST_IPC: &str = "CRIU 4.2 refuses System V memory of the host's IPC namespace";
const PACKED: &str = "CRIU 4.2 knows no packed pages";
const OTHER_USER: &str = "CRIU 4.2 dumps tasks of other users only with CAP_SYS_RESOURCE";

const URING: Criu = Criu::Cannot("CRIU 4.2 refuses io_uring");

/// Connections, kept.
const CONNECTED: &[&str] = &["--tcp-established", "--network-lock", "nftables"];

/// Locks on files, which CRIU leaves out without the option at restore.
const fn locks(name: &'static str, run: fn()) -> Guest {
    guest(name, run).dump(&["--file-locks"]).restore(&["--file-locks"])
}

/// All guests.
pub const ALL: &[Guest] = &[
    guest("aio", aio::contexts),
    guest("cgroup", cgroup::groups),
    guest("cgroup_namespace", cgroup::namespace),
    guest("cgroup_threads", cgroup::threads),
    guest("clocks", clocks::clocks),
    guest("creds", creds::creds).criu(Criu::WithSysResource(OTHER_USER)),
    guest("creds_bits", creds::bits),
    guest("creds_threads", creds::threads).criu(Criu::WithSysResource(OTHER_USER)),
    guest("cwd", cwd::folders),
    guest("cwd_deleted", cwd::deleted),
    guest("cwd_renamed", cwd::renamed).criu(Criu::DumpsOnly(FLAG)),
    guest("cwd_root", cwd::root),
    guest("cwd_shared", cwd::shared).criu(Criu::Cannot("CRIU 4.2 refuses CLONE_FS between processes")),
    guest("devices", devices::devices),
    guest("epoll", epoll::epoll),
    guest("eventfd", eventfd::eventfd).criu(Criu::DumpsOnly("CRIU 4.2 cuts counters to 32 bits")),
    guest("eventfd_semaphore", eventfd::semaphore).criu(Criu::Cannot("CRIU 4.2 loses EFD_SEMAPHORE")),
    guest("fanotify", fanotify::groups).criu(Criu::DumpsOnly("CRIU 4.2 lets the program hear of the restore")),
    guest("fanotify_filesystem", fanotify::filesystem).criu(Criu::Cannot("CRIU 4.2 loses marks on file systems")),
    guest("fifo", fifo::fifo),
    guest("files_append", files::append),
    guest("files_deleted", files::deleted),
    guest("files_dirs", files::dirs).criu(Criu::DumpsOnly(FLAG)),
    guest("files_high", files::high).criu(Criu::DumpsOnly("CRIU 4.2 needs numbers of its own above all others")),
    guest("files_holes", files::holes),
    guest("files_many", files::many),
    guest("files_offsets", files::offsets),
    guest("files_owner", files::owner),
    guest("files_path_only", files::path_only).criu(Criu::DumpsOnly(FLAG)),
    guest("files_shared", files::shared),
    guest("files_table", files::table),
    guest("inet_listening", inet::listening),
    guest("inet_bound", inet_options::bound)
        .alone_in_network()
        .criu(Criu::DumpsOnly("CRIU 4.2 binds before it sets IP_FREEBIND")),
    guest("inet_device", inet_options::device),
    guest("inet_filters", inet_options::filters).criu(Criu::Cannot("CRIU 4.2 does not lock filters")),
    guest("inet_groups", inet_groups::groups).criu(Criu::Cannot("CRIU 4.2 leaves all multicast groups")),
    guest("inet_options", inet_options::options).criu(Criu::Cannot("CRIU 4.2 keeps a few of these options")),
    guest("inet_raw", inet_options::raw)
        .alone_in_network()
        .criu(Criu::Cannot("CRIU 4.2 does not connect raw and ping sockets")),
    guest("inet_over", inet::over)
        .dump(CONNECTED)
        .restore(CONNECTED)
        .changes(NUMBERS)
        .criu(Criu::Cannot("CRIU 4.2 loses what was not read of a connection that is over")),
    guest("inet_udp", inet::udp),
    guest("ipc", ipc::namespace).criu(Criu::Cannot("CRIU 4.2 sends no message that is larger than 8192 bytes")),
    guest("ipc_posix", ipc::posix).criu(Criu::Cannot("CRIU 4.2 leaves POSIX message queues out")),
    locks("lease", lease::in_force).criu(Criu::DumpsOnly(BREAKS)),
    locks("lease_breaking", lease::breaking).criu(Criu::Cannot("CRIU 4.2 fails at it on Linux 6.18")),
    guest("inotify", inotify::watches).criu(Criu::DumpsOnly("CRIU 4.2 lets the program hear of the restore")),
    guest("io_uring", io_uring::rings).criu(URING),
    guest("io_uring_busy", io_uring::busy).changes("it goes on").criu(URING).dumps(10),
    guest("io_uring_counts", io_uring::counts).criu(URING),
    guest("io_uring_issuers", io_uring::issuers).criu(URING),
    guest("io_uring_polled", io_uring::polled).criu(URING),
    guest("io_uring_registered", io_uring::registered).criu(URING),
    guest("io_uring_shapes", io_uring::shapes).criu(URING),
    guest("io_uring_writes", io_uring::writes).changes("it goes on").criu(URING).dumps(10),
    guest("inotify_deleted", inotify::deleted)
        .dump(&["--link-remap"])
        .restore(&["--link-remap"])
        .changes("a deleted file gets another inode")
        .criu(Criu::DumpsOnly("CRIU 4.2 lets the program hear of the restore")),
    guest("limits", limits::limits),
    guest("limits_sched", limits::sched),
    locks("locks_flock", locks::whole),
    locks("locks_inherited", locks::inherited).criu(Criu::RestoresOnly("CRIU 4.2 loses a child's locks there")),
    locks("locks_many", locks::many),
    locks("locks_ofd", locks::open_files),
    locks("locks_posix", locks::ranges),
    locks("locks_waiting", locks::waiting),
    guest("membarrier", membarrier::registrations),
    guest("memfd", memfd::memfd),
    guest("memfd_kinds", memfd::kinds),
    guest("memfd_sealed", memfd::sealed),
    guest("memory_advice", memory::advice),
    guest("memory_brk", memory::brk),
    guest("memory_cow", memory::cow),
    guest("memory_file", memory::file),
    guest("memory_file_deleted", memory::file_deleted),
    guest("memory_fragmented", memory::fragmented),
    guest("memory_large", memory::large),
    guest("memory_layout", memory::layout),
    guest("memory_private", memory::private),
    guest("memory_shared", memory::shared),
    guest("memory_sparse", memory::sparse),
    guest("memory_stack", memory::stack),
    guest("mount_hidden", mounts::hidden).changes(MOUNTS).criu(Criu::Cannot(BEFORE)),
    guest("mount_kinds", mounts::kinds).changes(MOUNTS).criu(Criu::Cannot(BEFORE)),
    guest("mount_nested", mounts::nested).changes(MOUNTS).criu(Criu::Cannot(BEFORE)),
    guest("mount_nameless", mounts::nameless)
        .dump(&["--link-remap"])
        .changes("names for links have numbers")
        .criu(Criu::Cannot(BEFORE)),
    guest("mount_sockets", mounts::sockets_and_watches).changes(MOUNTS).criu(Criu::Cannot(BEFORE)),
    guest("mount_shared", mounts::shared).changes(MOUNTS).criu(Criu::Cannot(BEFORE)),
    guest("mount_tmpfs", mounts::tmpfs).changes(MOUNTS).criu(Criu::Cannot(BEFORE)),
    guest("netlink", netlink::netlink),
    guest("network_namespace", network_namespace::namespace).dump(CONNECTED).restore(CONNECTED).changes(NUMBERS),
    guest("network_namespaces", network_namespace::several).dump(CONNECTED).restore(CONNECTED).changes(NUMBERS),
    guest("network_tun_outside", network_namespace::tun_outside)
        .alone_in_network()
        .criu(Criu::Cannot("CRIU 4.2 needs a network namespace of the tree's for it")),
    guest("network_tuns", network_namespace::tuns)
        .changes(NUMBERS)
        .criu(Criu::Cannot("CRIU 4.2 does not keep O_NONBLOCK of tun files")),
    guest("outside", outside::outside),
    guest("outside_datagrams", outside::datagrams).dump(&["--ext-unix-sk"]).restore(&["--ext-unix-sk"]),
    guest("packed_family", packed::family).dump(&["--compress"]).criu(Criu::Cannot(PACKED)),
    guest("packed_kinds", packed::kinds).dump(&["--compress"]).criu(Criu::Cannot(PACKED)),
    guest("packet", packet::packet).alone_in_network(),
    guest("packet_more", packet::more).alone_in_network().criu(Criu::Cannot("CRIU 4.2 does not keep these options")),
    guest("packet_rings", packet::rings).alone_in_network().criu(Criu::Cannot("CRIU 4.2 starts rings anew")),
    guest("personality", personality::personality).criu(Criu::DumpsOnly("CRIU 4.2 does not restore the persona")),
    guest("personality_names", personality::names),
    // for tests of migration: ids of their own, so that they can be on two sides of one host
    guest("moving_family", track::forked)
        .changes(WRITES)
        .restless()
        .within(libc::CLONE_NEWPID)
        .criu(Criu::DumpsOnly("CRIU 4.2 gives out ids from the lowest on")),
    guest("moving_words", track::words)
        .changes(WRITES)
        .within(libc::CLONE_NEWPID)
        .criu(Criu::DumpsOnly("CRIU 4.2 gives out ids from the lowest on")),
    guest("pidfd", pidfd::processes),
    guest("pid_namespace", namespaces::pid_namespace)
        .within(libc::CLONE_NEWPID)
        .criu(Criu::DumpsOnly("CRIU 4.2 gives out ids from the lowest on")),
    // its last thread ends only when all others were waited for
    guest("pid_namespace_threads", threads::threads)
        .within(libc::CLONE_NEWPID)
        .criu(Criu::DumpsOnly("CRIU 4.2 gives out ids from the lowest on")),
    guest("pipes", pipes::pipes),
    guest("pipes_full", pipes::full),
    guest("pipes_halves", pipes::halves),
    guest("pipes_packets", pipes::packets).criu(Criu::Cannot("CRIU 4.2 refuses pipes in packet mode")),
    guest("proc_self", proc_self::proc_self),
    guest("registers", registers::registers),
    guest("registers_base", registers::base),
    guest("registers_leader", registers::leader),
    guest("robust", robust::robust),
    guest("rpc_self", rpc::asks_for_itself),
    guest("rseq", rseq::rseq),
    guest("seccomp_child", seccomp::child),
    guest("seccomp_filters", seccomp::filters),
    guest("seccomp_strict", seccomp::strict),
    guest("seccomp_threads", seccomp::threads),
    guest("signalfd", signalfd::signalfd),
    guest("signals_actions", signals::actions),
    guest("signals_handler", signals::handler),
    guest("signals_pending", signals::pending),
    guest("signals_stack", signals::stack),
    guest("storm", storm::storm).changes("signals come and go").dumps(20).criu(Criu::RestoresOnly(EINTR)),
    guest("sysv", sysv::shared).criu(Criu::Cannot(HOST_IPC)),
    guest("sysv_huge", sysv::huge).criu(Criu::Cannot(HOST_IPC)),
    guest("sysv_pieces", sysv::pieces).criu(Criu::Cannot(HOST_IPC)),
    guest("sysv_removed", sysv::removed).criu(Criu::Cannot(HOST_IPC)),
    guest("tcp_asked", inet_options::asked)
        .dump(CONNECTED)
        .restore(&["--tcp-established"])
        .alone_in_network()
        .changes(NUMBERS),
    guest("tcp_closed", inet_options::closed)
        .dump(&["--tcp-close"])
        .restore(&["--tcp-close"])
        .alone_in_network()
        .changes("connections are closed at the first restore"),
    guest("tcp_echo", inet_options::echo)
        .dump(CONNECTED)
        .restore(&["--tcp-established"])
        .alone_in_network()
        .criu(Criu::RestoresOnly(EINTR)),
    guest("tcp_states", inet_options::states)
        .dump(CONNECTED)
        .restore(&["--tcp-established"])
        .alone_in_network()
        .changes(NUMBERS),
    guest("tcp_streams", tcp::streams)
        .dump(&["--tcp-established", "--network-lock", "nftables"])
        .restore(&["--tcp-established"])
        .changes("data goes on")
        .dumps(10)
        .alone_in_network()
        .criu(Criu::Cannot("CRIU 4.2 leaves connections with segments of 524 bytes")),
    guest("tcp_waiting", inet_options::waiting)
        .dump(&["--tcp-established", "--skip-in-flight", "--network-lock", "skip"])
        .restore(&["--tcp-established"])
        .alone_in_network()
        .changes(NUMBERS),
    guest("threads", threads::threads),
    guest("threads_500", threads::many),
    guest("timerfd", timerfd::timerfd),
    guest("timers_interval", timers::interval),
    guest("timers_posix", timers::posix),
    guest("track_exec", track::exec).changes(WRITES),
    guest("track_file", track::of_file).changes(WRITES),
    guest("track_flood", track::flood).changes(WRITES),
    guest("track_forked", track::forked).changes(WRITES).restless(),
    guest("track_given_back", track::given_back).changes(WRITES),
    guest("track_huge", track::huge).changes(WRITES),
    guest("track_moved", track::moved).changes(WRITES),
    guest("track_pinned", track::pinned).changes(WRITES).criu(URING),
    guest("track_stacks", track::stacks).changes(WRITES),
    guest("track_words", track::words).changes(WRITES),
    guest("tree", tree::tree),
    guest("tree_100", tree::hundred),
    guest("tree_orphan_of_session", tree::orphan_of_session)
        .changes("children are in another order, and with them the numbers of what they have")
        .criu(Criu::DumpsOnly("CRIU 4.2 gives one of them to another parent")),
    guest("tree_orphans", tree::orphans)
        .changes("orphans are taken in in another order")
        .criu(Criu::DumpsOnly("CRIU 4.2 gives one of them to another parent")),
    guest("tree_sessions", tree::sessions),
    guest("tree_stopped", tree::stopped),
    guest("tree_vforks", tree::vforks)
        .changes("they go on")
        .restless()
        .dumps(20)
        .criu(Criu::RestoresOnly("CRIU 4.2 may find a child that shares memory")),
    guest("tree_zombies", tree::zombies),
    guest("tty_consoles", tty::consoles).criu(Criu::Cannot("CRIU 4.2 takes two consoles for one")),
    guest("tty_controlling", tty::controlling)
        .criu(Criu::Cannot("CRIU 4.2 gives children of a session's leader no terminal")),
    guest("tty_data", tty::data).criu(Criu::Cannot("CRIU 4.2 lets lines run together")),
    guest("user_namespace", namespaces::user_namespace)
        .within(libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWUTS)
        .criu(Criu::Cannot("CRIU 4.2 needs a /proc of the tree's own in a user namespace")),
    guest("user_namespace_lease", namespaces::user_namespace_lease)
        .dump(&["--file-locks"])
        .restore(&["--file-locks"])
        .within(libc::CLONE_NEWUSER | libc::CLONE_NEWPID)
        .criu(Criu::Cannot("CRIU 4.2 needs a /proc of the tree's own in a user namespace")),
    guest("user_namespace_nested", namespaces::user_namespace_nested)
        .within(libc::CLONE_NEWUSER | libc::CLONE_NEWPID)
        .changes(MOUNTS)
        .criu(Criu::Cannot(BEFORE)),
    guest("uts_namespace", namespaces::uts_namespace),
    guest("unix_dgram", unix::dgram),
    guest("unix_listening", unix::listening),
    guest("unix_names", unix::names).criu(Criu::Cannot("CRIU 4.2 does not know names that were moved")),
    guest("unix_options", unix::options).criu(Criu::Cannot("CRIU 4.2 keeps a few of these options")),
    guest("unix_pairs", unix::pairs),
    guest("unix_path_only", unix::path_only).criu(Criu::Cannot("CRIU 4.2 takes the path of a socket for the socket")),
    guest("unix_peercred", peercred::peers).criu(Criu::Cannot("CRIU 4.2 does not know who peers are")),
    guest("unix_peercred_within", peercred::peers)
        .criu(Criu::Cannot("CRIU 4.2 does not know who peers are"))
        .within(libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNET),
    guest("unix_rights", unix::rights).criu(Criu::DumpsOnly("CRIU 4.2 cannot arm a timer in flight")),
    guest("unix_waiting", unix::waiting),
    guest("waits", waits::waits).changes("its threads end one by one").dumps(4).criu(Criu::RestoresOnly(EINTR)),
    guest("waits_alarm", waits::alarm)
        .changes("signals come and go")
        .dumps(20)
        .criu(Criu::Cannot("CRIU 4.2 hangs a read that an alarm was to end")),
    guest("waits_sockets", waits::sockets)
        .changes("its threads end one by one")
        .dumps(4)
        .criu(Criu::RestoresOnly(EINTR)),
    guest("refused_users", namespaces::user_namespace)
        .within(libc::CLONE_NEWUSER)
        .refused(&["user namespace", "PID namespace"]),
    guest("refused_big_ghost", refused::big_ghost).dump(&["--ghost-limit", "4096"]).refused(&["ghost-limit"]),
    guest("refused_time_for_children", refused::time_for_children).refused(&["time namespace for children"]),
    guest("refused_time_of_child", refused::time_of_child).refused(&["time namespace"]),
    guest("refused_fanotify", fanotify::deciding).refused(&["decides about accesses"]),
    guest("refused_connected", refused::connected).refused(&["TCP socket", "--tcp-established"]),
    guest("refused_corked", refused::corked).refused(&["UDP socket", "corked"]),
    guest("refused_credentials", refused::credentials).refused(&["credentials in flight"]),
    guest("refused_ebpf_filter", refused::ebpf_filter).refused(&["eBPF filter"]),
    guest("refused_flying_pidfd", refused::flying_pidfd).refused(&["in flight", "pidfd"]),
    guest("refused_mapped_lease", refused::mapped_lease)
        .dump(&["--file-locks"])
        .refused(&["a write lease on", "mapped too"]),
    guest("refused_tun", refused::tun).alone_in_network().refused(&["/dev/net/tun"]),
    guest("refused_in_flight", refused::in_flight).refused(&["TCP socket", "--skip-in-flight"]).dump(CONNECTED),
    guest("refused_io_uring_buffers", io_uring::provided).refused(&["io_uring", "provided buffers"]),
    guest("refused_io_uring_file", io_uring::hidden_file).refused(&["io_uring", "registered file 0", "hidden"]),
    guest("refused_io_uring_memory", io_uring::own_memory).refused(&["io_uring", "own memory"]),
    guest("refused_io_uring_open", io_uring::open_in_flight).refused(&["io_uring", "in flight", "worker"]),
    guest("refused_io_uring_poll", io_uring::poll_in_flight).refused(&["io_uring", "in flight", "a poll"]),
    guest("refused_io_uring_timeout", io_uring::timeout_in_flight).refused(&["io_uring", "in flight", "a timeout"]),
    guest("refused_posix_notify", ipc::posix_notify).refused(&[
        "POSIX message queue /standstill",
        "is to be notified",
        "mq_notify",
    ]),
    guest("refused_lease", refused::lease).dump(&["--file-locks"]).refused(&["a lease on the deleted file"]),
    guest("refused_link", refused::link).dump(&["--link-remap"]).refused(&["a userfaultfd"]),
    guest("refused_lock", refused::lock).refused(&["--file-locks"]),
    guest("refused_lonely_ring", refused::lonely_ring).refused(&["ring of packet socket"]),
    guest("refused_mptcp", refused::mptcp).refused(&["multipath TCP"]),
    guest("refused_outside_pipe", refused::outside_socket).refused(&["socket"]),
    guest("refused_perf", refused::perf).refused(&["perf_event"]),
    guest("refused_sent_ring", refused::sent_ring).refused(&["packet socket", "ring for sending"]),
    guest("refused_traced", refused::traced).refused(&["traces"]),
    guest("refused_unix_early", refused::unix_early).refused(&["unix socket", "before the connection was accepted"]),
    guest("refused_unix_urgent", refused::unix_urgent).refused(&["urgent byte", "unix stream"]),
    guest("refused_vsock", refused::vsock).refused(&["vsock"]),
    guest("refused_xdp", refused::xdp).refused(&["XDP"]),
    guest("refused_pidfd", refused::pidfd).refused(&["a pidfd of process 1"]),
    guest("refused_userfaultfd", refused::userfaultfd).refused(&["a userfaultfd"]),
];

/// Programs that one test starts by itself: they are no guests, since they check nothing.
const HELPERS: &[(&str, fn())] = &[("tree_vfork_stopped", tree::vfork_stopped)];

/// The guest of this name.
pub fn find(name: &str) -> Option<&'static Guest> {
    ALL.iter().find(|g| g.name == name)
}

/// Runs one guest, in this process; it never comes back.
pub fn main(name: &str, folder: PathBuf) -> ! {
    if let Some((_, run)) = HELPERS.iter().find(|h| h.0 == name) {
        run();
        std::process::exit(0);
    }
    let Some(guest) = find(name) else {
        eprintln!("there is no guest {name}");
        std::process::exit(2);
    };
    std::panic::set_hook(Box::new(|panic| support::fail(panic)));
    support::begin(folder);
    (guest.run)();
    support::succeed()
}
