//! Every guest: left running, restored, restored twice, from us to CRIU, from CRIU to us; or refused.

use standstill_tests::{guests, run};

macro_rules! guests {
    ($($name:ident)*) => {
        $(
            mod $name {
                #[test]
                fn running() {
                    crate::run::running(stringify!($name));
                }
                #[test]
                fn restored() {
                    crate::run::restored(stringify!($name));
                }
                #[test]
                fn twice() {
                    crate::run::twice(stringify!($name));
                }
                #[test]
                fn to_criu() {
                    crate::run::to_criu(stringify!($name));
                }
                #[test]
                fn from_criu() {
                    crate::run::from_criu(stringify!($name));
                }
            }
        )*
        const CARRIED: &[&str] = &[$(stringify!($name)),*];
    };
}

macro_rules! refused {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                run::refused(stringify!($name));
            }
        )*
        const REFUSED: &[&str] = &[$(stringify!($name)),*];
    };
}

guests! {
    aio
    cgroup
    cgroup_namespace
    cgroup_threads
    clocks
    creds
    creds_bits
    creds_threads
    cwd
    cwd_deleted
    cwd_renamed
    cwd_root
    cwd_shared
    devices
    epoll
    eventfd
    eventfd_semaphore
    fanotify
    fanotify_filesystem
    fifo
    files_append
    files_deleted
    files_dirs
    files_high
    files_holes
    files_many
    files_offsets
    files_owner
    files_path_only
    files_shared
    files_table
    inet_bound
    inet_device
    inet_filters
    inet_groups
    inet_listening
    inet_options
    inet_over
    inet_raw
    inet_udp
    inotify
    inotify_deleted
    io_uring
    io_uring_busy
    io_uring_counts
    io_uring_issuers
    io_uring_polled
    io_uring_registered
    io_uring_shapes
    io_uring_writes
    ipc
    ipc_posix
    lease
    lease_breaking
    limits
    limits_sched
    locks_flock
    locks_inherited
    locks_many
    locks_ofd
    locks_posix
    locks_waiting
    membarrier
    memfd
    memfd_kinds
    memfd_sealed
    memory_advice
    memory_brk
    memory_cow
    memory_file
    memory_file_deleted
    memory_fragmented
    memory_large
    memory_layout
    memory_private
    memory_shared
    memory_sparse
    memory_stack
    mount_hidden
    mount_kinds
    mount_nameless
    mount_nested
    mount_shared
    mount_sockets
    mount_tmpfs
    netlink
    network_namespace
    network_namespaces
    network_tun_outside
    network_tuns
    outside
    outside_datagrams
    packed_family
    packed_kinds
    packet
    packet_more
    packet_rings
    personality
    personality_names
    moving_family
    moving_words
    pidfd
    pid_namespace
    pid_namespace_threads
    pipes
    pipes_full
    pipes_halves
    pipes_packets
    proc_self
    registers
    registers_base
    registers_leader
    robust
    rpc_self
    rseq
    seccomp_child
    seccomp_filters
    seccomp_strict
    seccomp_threads
    signalfd
    signals_actions
    signals_handler
    signals_pending
    signals_stack
    storm
    sysv
    sysv_huge
    sysv_pieces
    sysv_removed
    tcp_asked
    tcp_closed
    tcp_echo
    tcp_states
    tcp_streams
    tcp_waiting
    threads
    threads_500
    timerfd
    timers_interval
    timers_posix
    track_exec
    track_file
    track_flood
    track_forked
    track_given_back
    track_huge
    track_moved
    track_pinned
    track_stacks
    track_words
    tree
    tree_100
    tree_orphan_of_session
    tree_orphans
    tree_sessions
    tree_stopped
    tree_vforks
    tree_zombies
    tty_consoles
    tty_controlling
    tty_data
    user_namespace
    user_namespace_lease
    user_namespace_nested
    uts_namespace
    unix_dgram
    unix_listening
    unix_names
    unix_options
    unix_pairs
    unix_path_only
    unix_peercred
    unix_peercred_within
    unix_rights
    unix_waiting
    waits
    waits_alarm
    waits_sockets
}

refused! {
    refused_big_ghost
    refused_time_for_children
    refused_time_of_child
    refused_users
    refused_fanotify
    refused_connected
    refused_corked
    refused_credentials
    refused_ebpf_filter
    refused_flying_pidfd
    refused_in_flight
    refused_io_uring_buffers
    refused_io_uring_file
    refused_io_uring_memory
    refused_io_uring_open
    refused_io_uring_poll
    refused_io_uring_timeout
    refused_posix_notify
    refused_lease
    refused_link
    refused_lock
    refused_lonely_ring
    refused_mapped_lease
    refused_mptcp
    refused_outside_pipe
    refused_perf
    refused_sent_ring
    refused_traced
    refused_tun
    refused_unix_early
    refused_unix_urgent
    refused_vsock
    refused_xdp
    refused_pidfd
    refused_userfaultfd
}

/// A guest without a test would test nothing.
#[test]
fn every_guest_has_its_tests() {
    let mut listed: Vec<&str> = CARRIED.iter().chain(REFUSED).copied().collect();
    let mut all: Vec<&str> = guests::ALL.iter().map(|g| g.name).collect();
    listed.sort_unstable();
    all.sort_unstable();
    assert_eq!(listed, all);
    for guest in guests::ALL {
        assert_eq!(guest.refused.is_empty(), CARRIED.contains(&guest.name), "{}", guest.name);
    }
}
