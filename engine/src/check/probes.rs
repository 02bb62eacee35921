//! The questions that safe code can ask, one function a feature.
//!
//! Those about mounts and networks run in a thread that has left for a namespace of its own, which ends with it.

use super::netlink::{ask, attribute, dump_request, message, request};
use super::{Found, Lack};
use crate::sys::probe::{self, Traced};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::sys::socket::{
    bind, connect, getsockname, listen, shutdown, socket, AddressFamily, Backlog, Shutdown, SockFlag, SockProtocol,
    SockType, SockaddrIn,
};
use nix::unistd::{access, AccessFlags};
use std::fs::{read_to_string, File};
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
const SOL_TCP: i32 = libc::IPPROTO_TCP;
const TCP_REPAIR: i32 = 19;

/// Runs a question in a thread of its own, away from the process's mounts or networks.
fn apart(flags: CloneFlags, question: fn() -> Found) -> Found {
    let thread = std::thread::spawn(move || -> Found {
        unshare(flags)?;
        if flags.contains(CloneFlags::CLONE_NEWNS) {
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
            mount(Some("standstill"), "/tmp", Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        }
        question()
    });
    thread.join().unwrap_or(Err(Lack(Errno::EFAULT)))
}

fn found(yes: bool) -> Found {
    if yes {
        Ok(())
    } else {
        Err(Lack::ABSENT)
    }
}

fn accessible(path: &str, how: AccessFlags) -> Found {
    Ok(access(path, how)?)
}

fn has_file(path: &str) -> Found {
    accessible(path, AccessFlags::F_OK)
}

fn fdinfo_has(fd: BorrowedFd<'_>, what: &str) -> Found {
    // a thread with a descriptor table of its own has its own fdinfo
    let path = format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd());
    found(read_to_string(path)?.contains(what))
}

fn socket_of(family: AddressFamily, kind: SockType) -> Result<OwnedFd, Errno> {
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None)
}

pub(super) fn map_files() -> Found {
    accessible("/proc/self/map_files", AccessFlags::R_OK)
}

pub(super) fn ns_last_pid() -> Found {
    accessible("/proc/sys/kernel/ns_last_pid", AccessFlags::W_OK)
}

pub(super) fn ipc() -> Found {
    if !nix::unistd::geteuid().is_root() {
        return Ok(()); // access() asks without the capability that would do
    }
    accessible("/proc/sys/kernel/sem_next_id", AccessFlags::R_OK | AccessFlags::W_OK)
}

pub(super) fn kcmp() -> Found {
    Ok(probe::kcmp()?)
}

pub(super) fn tid_address() -> Found {
    Ok(probe::tid_address()?)
}

pub(super) fn mm_map() -> Found {
    Ok(probe::set_mm_map()?)
}

pub(super) fn owner_uids() -> Found {
    Ok(probe::owner_uids(File::open("/proc/self/comm")?.as_fd())?)
}

pub(super) fn proc_stat() -> Found {
    // the last of the 52 fields came with Linux 3.5
    let stat = read_to_string("/proc/self/stat")?;
    found(stat.rsplit(')').next().is_some_and(|rest| rest.split_ascii_whitespace().count() >= 50))
}

pub(super) fn peek_off() -> Found {
    let sk = socket_of(AddressFamily::Unix, SockType::Datagram)?;
    let value: [u8; 4] = probe::socket_option(sk.as_fd(), SOL_SOCKET, libc::SO_PEEK_OFF)?;
    found(i32::from_ne_bytes(value) == -1)
}

pub(super) fn socket_gets() -> Found {
    let sk = socket_of(AddressFamily::Inet, SockType::Datagram)?;
    probe::socket_option::<0>(sk.as_fd(), SOL_SOCKET, libc::SO_ATTACH_FILTER)?;
    probe::socket_option::<16>(sk.as_fd(), SOL_SOCKET, libc::SO_BINDTODEVICE)?;
    Ok(())
}

pub(super) fn fdinfo() -> Found {
    use nix::sys::{epoll, eventfd, inotify, signal, signalfd};
    let event = eventfd::EventFd::from_value_and_flags(13, eventfd::EfdFlags::EFD_CLOEXEC)?;
    fdinfo_has(event.as_fd(), "eventfd-count:")?;
    let poll = epoll::Epoll::new(epoll::EpollCreateFlags::EPOLL_CLOEXEC)?;
    poll.add(&event, epoll::EpollEvent::new(epoll::EpollFlags::EPOLLIN, 0))?;
    fdinfo_has(poll.0.as_fd(), "tfd:")?;
    let mut set = signal::SigSet::empty();
    set.add(signal::Signal::SIGUSR1);
    let signals = signalfd::SignalFd::with_flags(&set, signalfd::SfdFlags::SFD_CLOEXEC)?;
    fdinfo_has(signals.as_fd(), "sigmask:")?;
    let watch = inotify::Inotify::init(inotify::InitFlags::IN_CLOEXEC)?;
    watch.add_watch("/", inotify::AddWatchFlags::IN_ATTRIB)?;
    fdinfo_has(watch.as_fd(), "inotify wd:")
}

pub(super) fn file_handles() -> Found {
    use nix::sys::inotify;
    let watch = inotify::Inotify::init(inotify::InitFlags::IN_CLOEXEC)?;
    watch.add_watch("/", inotify::AddWatchFlags::IN_ATTRIB)?;
    fdinfo_has(watch.as_fd(), "fhandle-type:")
}

pub(super) fn vmsplice() -> Found {
    let (_read, write) = nix::unistd::pipe()?;
    let byte = [0u8];
    nix::fcntl::vmsplice(&write, &[std::io::IoSlice::new(&byte)], nix::fcntl::SpliceFFlags::SPLICE_F_NONBLOCK)?;
    Ok(())
}

pub(super) fn locked_pty() -> Found {
    const TIOCSPTLCK: libc::c_ulong = 0x4004_5431;
    let master = File::options().read(true).write(true).open("/dev/ptmx")?;
    probe::ioctl_number(master.as_fd(), TIOCSPTLCK, 1)?;
    Ok(())
}

pub(super) fn tcp_repair() -> Found {
    let sk = socket_of(AddressFamily::Inet, SockType::Stream)?;
    probe::set_socket_option(sk.as_fd(), SOL_TCP, TCP_REPAIR, 1)?;
    probe::socket_option::<4>(sk.as_fd(), SOL_TCP, libc::TCP_TIMESTAMP)?;
    Ok(())
}

pub(super) fn tcp_window() -> Found {
    let sk = socket_of(AddressFamily::Inet, SockType::Stream)?;
    probe::set_socket_option(sk.as_fd(), SOL_TCP, TCP_REPAIR, 1)?;
    probe::socket_option::<20>(sk.as_fd(), SOL_TCP, 29)?;
    Ok(())
}

pub(super) fn tcp_half_closed() -> Found {
    let server = socket_of(AddressFamily::Inet, SockType::Stream)?;
    bind(server.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    listen(&server, Backlog::new(1)?)?;
    let client = socket_of(AddressFamily::Inet, SockType::Stream)?;
    connect(client.as_raw_fd(), &getsockname::<SockaddrIn>(server.as_raw_fd())?)?;
    shutdown(client.as_raw_fd(), Shutdown::Write)?;
    Ok(probe::set_socket_option(client.as_fd(), SOL_TCP, TCP_REPAIR, 1)?)
}

pub(super) fn sigqueueinfo() -> Found {
    Ok(probe::queue_signal()?)
}

pub(super) fn peeksiginfo() -> Found {
    Ok(Traced::new(false)?.signals()?)
}

pub(super) fn seccomp_suspend() -> Found {
    Ok(Traced::new(false)?.suspend_seccomp()?)
}

pub(super) fn seccomp_filters() -> Found {
    Ok(Traced::new(true)?.seccomp_filter()?)
}

pub(super) fn rseq() -> Found {
    Ok(Traced::new(false)?.rseq()?)
}

pub(super) fn syscall_info() -> Found {
    Ok(Traced::new(false)?.syscall_info()?)
}

#[cfg(target_arch = "x86_64")]
pub(super) fn breakpoints() -> Found {
    Ok(Traced::new(false)?.breakpoint()?)
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn breakpoints() -> Found {
    Ok(())
}

pub(super) fn move_vdso() -> Found {
    let maps = read_to_string("/proc/self/maps")?;
    let special = ["[vvar]", "[vvar_vclock]", "[vdso]", "[sigpage]"];
    let areas: Option<Vec<(usize, usize)>> = maps
        .lines()
        .filter(|l| special.iter().any(|name| l.ends_with(name)))
        .map(|l| {
            let (start, end) = l.split(' ').next()?.split_once('-')?;
            let start = usize::from_str_radix(start, 16).ok()?;
            Some((start, usize::from_str_radix(end, 16).ok()?.checked_sub(start)?))
        })
        .collect();
    Ok(probe::move_vdso(&areas.ok_or(Lack(Errno::EINVAL))?)?)
}

pub(super) fn can_map_vdso() -> Found {
    Ok(probe::map_vdso()?)
}

pub(super) fn mem_dirty_track() -> Found {
    if crate::memory::track::available() == Some(crate::memory::scan::Marks::Protection) {
        return Ok(());
    }
    Ok(probe::soft_dirty()?)
}

pub(super) fn posix_timers() -> Found {
    accessible("/proc/self/timers", AccessFlags::R_OK)
}

pub(super) fn timer_ids() -> Found {
    Ok(probe::timer_ids()?)
}

pub(super) fn timerfd() -> Found {
    use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    fdinfo_has(timer.as_fd(), "clockid:")
}

pub(super) fn mnt_id() -> Found {
    fdinfo_has(File::open("/proc/self/comm")?.as_fd(), "mnt_id:")
}

pub(super) fn fdinfo_lock() -> Found {
    // CRIU locks /proc/locks too: any file will do, and this one is always there
    let file = Flock::lock(File::open("/proc/locks")?, FlockArg::LockSharedNonblock).map_err(|(_, e)| e)?;
    fdinfo_has(file.as_fd(), "lock:")
}

pub(super) fn aio_remap() -> Found {
    Ok(probe::move_aio_ring()?)
}

pub(super) fn cgroup_namespace() -> Found {
    has_file("/proc/self/ns/cgroup")
}

pub(super) fn user_namespace() -> Found {
    has_file("/proc/self/ns/user")?;
    mm_map()
}

pub(super) fn time_namespace() -> Found {
    has_file("/proc/self/timens_offsets")
}

pub(super) fn ns_pid() -> Found {
    found(read_to_string("/proc/self/status")?.contains("\nNSpid:"))
}

pub(super) fn loginuid() -> Found {
    // a thread's login uid is its own: whatever happens ends with it
    let thread = std::thread::spawn(|| -> Found {
        let path = "/proc/thread-self/loginuid";
        let now = read_to_string(path)?;
        for value in ["4294967295", now.trim()] {
            File::options().write(true).open(path)?.write_all(value.as_bytes())?;
        }
        Ok(())
    });
    thread.join().unwrap_or(Err(Lack(Errno::EFAULT)))
}

const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6; // fork, remap, remove, unmap

pub(super) fn uffd() -> Found {
    probe::userfaultfd_features(false)?;
    Ok(())
}

pub(super) fn uffd_noncoop() -> Found {
    found(probe::userfaultfd_features(false)? & EVENTS == EVENTS)
}

pub(super) fn uffd_user_mode() -> Found {
    probe::userfaultfd_features(true)?;
    Ok(())
}

pub(super) fn uffd_wp_async() -> Found {
    found(probe::userfaultfd_features(true)? & (1 << 15) != 0)
}

pub(super) fn pagemap_scan() -> Found {
    Ok(probe::pagemap_scan(File::open("/proc/self/pagemap")?.as_fd(), 1 << 3)?)
}

pub(super) fn pagemap_guards() -> Found {
    Ok(probe::pagemap_scan(File::open("/proc/self/pagemap")?.as_fd(), 1 << 3 | 1 << 8)?)
}

pub(super) fn socket_namespace() -> Found {
    let sk = socket_of(AddressFamily::Inet, SockType::Datagram)?;
    probe::ioctl_for_fd(sk.as_fd(), 0x894c)?;
    Ok(())
}

pub(super) fn unix_file() -> Found {
    let sk = socket_of(AddressFamily::Unix, SockType::Datagram)?;
    match probe::ioctl_for_fd(sk.as_fd(), 0x89e0) {
        // this socket has no file, and the kernel knows what was asked
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn kcmp_epoll() -> Found {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    let (read, _write) = nix::unistd::pipe()?;
    let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    poll.add(&read, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    Ok(probe::kcmp_epoll(poll.0.as_fd(), read.as_fd())?)
}

pub(super) fn clone3_set_tid() -> Found {
    Ok(probe::clone_set_tid()?)
}

pub(super) fn pidfd_store() -> Found {
    use rustix::process::{getpid, pidfd_getfd, pidfd_open, PidfdFlags, PidfdGetfdFlags};
    let (read, _write) = nix::unistd::pipe()?;
    let me = pidfd_open(getpid(), PidfdFlags::empty()).map_err(std::io::Error::from)?;
    pidfd_getfd(&me, read.as_raw_fd(), PidfdGetfdFlags::empty()).map_err(std::io::Error::from)?;
    Ok(())
}

pub(super) fn buf_lock() -> Found {
    let sk = socket_of(AddressFamily::Inet, SockType::Stream)?;
    probe::socket_option::<4>(sk.as_fd(), SOL_SOCKET, 72)?;
    Ok(())
}

pub(super) fn ipv6_freebind() -> Found {
    let sk = socket_of(AddressFamily::Inet6, SockType::Datagram)?;
    Ok(probe::set_socket_option(sk.as_fd(), libc::IPPROTO_IPV6, 78, 1)?)
}

pub(super) fn memfd_hugetlb() -> Found {
    use rustix::fs::{memfd_create, MemfdFlags};
    memfd_create("standstill", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).map_err(std::io::Error::from)?;
    Ok(())
}

pub(super) fn openat2() -> Found {
    use rustix::fs::{openat2, Mode, OFlags, ResolveFlags, CWD};
    openat2(CWD, "/", OFlags::PATH, Mode::empty(), ResolveFlags::empty()).map_err(std::io::Error::from)?;
    Ok(())
}

pub(super) fn membarrier() -> Found {
    found(probe::membarrier_commands()? & (1 << 9) != 0)
}

pub(super) fn io_uring() -> Found {
    Ok(probe::io_uring()?)
}

/// A driver that can checkpoint; it is not started.
pub(super) fn cuda() -> Found {
    match standstill_gpu::driver::find() {
        Ok(found) if found.checkpoints => Ok(()),
        Ok(_) | Err(_) => Err(super::Lack::ABSENT),
    }
}

pub(super) fn tun() -> Found {
    const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    Ok(probe::ioctl_number(tun.as_fd(), TUNSETIFINDEX, 13)?)
}

pub(super) fn tun_namespace() -> Found {
    probe::ioctl_for_fd(File::open("/dev/net/tun")?.as_fd(), 0x894c)?;
    Ok(())
}

pub(super) fn apparmor_stacking() -> Found {
    let domain = Path::new("/sys/kernel/security/apparmor/features/domain");
    let stack = read_to_string(domain.join("stack"))?;
    let version = read_to_string(domain.join("version"))?;
    let newer =
        version.trim().split_once('.').and_then(|(a, b)| Some((a.parse::<u32>().ok()?, b.parse::<u32>().ok()?)));
    found(stack.trim() == "yes" && newer.is_some_and(|(major, minor)| major >= 1 && minor >= 2))
}

pub(super) fn legacy_iptables() -> Found {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let legacy = |family: &str| {
        std::env::split_paths(&path).any(|dir| {
            let links_to_legacy =
                |name: &str| std::fs::canonicalize(dir.join(name)).is_ok_and(|p| !p.to_string_lossy().contains("nft"));
            dir.join(format!("{family}-legacy-save")).exists() || links_to_legacy(&format!("{family}-save"))
        })
    };
    found(legacy("iptables") && (legacy("ip6tables") || !Path::new("/proc/sys/net/ipv6").exists()))
}

/// The sockets of one family and protocol, or the error that the kernel has instead.
fn diag(body: &[u8]) -> Result<(), Errno> {
    ask(SockProtocol::NetlinkSockDiag, &dump_request(20, body), |_, _| {})
}

fn inet_diag(family: u8, protocol: u8) -> Result<(), Errno> {
    let mut body = vec![family, protocol, 0, 0];
    body.extend(u32::MAX.to_ne_bytes());
    body.resize(56, 0);
    diag(&body)
}

pub(super) fn sock_diag() -> Found {
    let mut unix = vec![1u8, 0, 0, 0];
    unix.extend(u32::MAX.to_ne_bytes());
    unix.resize(24, 0);
    diag(&unix)?;
    for (family, protocol) in [(2, 6), (2, 17), (10, 6), (10, 17)] {
        match inet_diag(family, protocol) {
            Ok(()) => {}
            // no such protocol here (IPv6 may be off): no such sockets either
            Err(Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

pub(super) fn net_diag_raw() -> Found {
    inet_diag(2, 255)?;
    Ok(inet_diag(10, 255)?)
}

pub(super) fn new_ifindex() -> Found {
    // no such device; but a negative index is refused first where the field is known
    let mut body = vec![0u8; 16];
    body.extend(attribute(49, &(-1i32).to_ne_bytes()));
    body.extend(attribute(3, b"standstill0\0"));
    match ask(SockProtocol::NetlinkRoute, &request(19, 0, &body), |_, _| {}) {
        Err(Errno::ERANGE) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(()) => Err(Lack::ABSENT),
    }
}

pub(super) fn nsid() -> Found {
    let mut body = vec![0u8; 4];
    body.extend(attribute(2, &std::process::id().to_ne_bytes()));
    let mut known = false;
    // the answer itself comes first, then the acknowledgement
    ask(SockProtocol::NetlinkRoute, &request(90, 0, &body), |_, _| known = true)?;
    found(known)
}

pub(super) fn link_nsid() -> Found {
    apart(CloneFlags::CLONE_NEWNET, || {
        let other = File::open("/proc/thread-self/ns/net")?;
        unshare(CloneFlags::CLONE_NEWNET)?;
        let fd = u32::try_from(other.as_raw_fd()).unwrap_or(u32::MAX);
        let mut peer = vec![0u8; 16];
        peer.extend(attribute(28, &fd.to_ne_bytes()));
        let data = attribute(2, &attribute(1, &peer));
        let kind = attribute(1, b"veth");
        let mut body = vec![0u8; 16];
        body.extend(attribute(3, b"ask0\0"));
        body.extend(attribute(18, &[kind, data].concat()));
        ask(SockProtocol::NetlinkRoute, &request(16, 0x400 | 0x200, &body), |_, _| {})?;
        let mut known = false;
        let look = |_: u16, link: &[u8]| known |= has_attribute(link, 16, 37);
        ask(SockProtocol::NetlinkRoute, &dump_request(18, &[0; 16]), look)?;
        found(known)
    })
}

/// Does a message have an attribute after its fixed part?
fn has_attribute(message: &[u8], fixed: usize, wanted: u16) -> bool {
    let mut rest = message.get(fixed..).unwrap_or_default();
    while let Some([a, b, c, d]) = rest.first_chunk::<4>() {
        if u16::from_ne_bytes([*c, *d]) & 0x3fff == wanted {
            return true;
        }
        let len = usize::from(u16::from_ne_bytes([*a, *b])).max(4).next_multiple_of(4);
        rest = rest.get(len..).unwrap_or_default();
    }
    false
}

pub(super) fn nftables() -> Found {
    apart(CloneFlags::CLONE_NEWNET, || {
        // a table in a namespace that is about to end; begin and end of a batch are messages 16 and 17
        let generic = |family: u8, resource: u8| [family, 0, 0, resource];
        let mut table = generic(1, 0).to_vec();
        table.extend(attribute(1, b"standstill\0"));
        let batch =
            [message(16, 1, 1, &generic(0, 10)), request(10 << 8, 0x400, &table), message(17, 1, 3, &generic(0, 10))];
        Ok(ask(SockProtocol::NetlinkNetFilter, &batch.concat(), |_, _| {})?)
    })
}

pub(super) fn set_mount_group() -> Found {
    apart(CloneFlags::CLONE_NEWNS, || {
        mount(None::<&str>, "/tmp", None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
        std::fs::create_dir("/tmp/in")?;
        mount(Some("/tmp/in"), "/tmp/in", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        mount(None::<&str>, "/tmp", None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
        Ok(probe::set_mount_group(c"/tmp", c"/tmp/in")?)
    })
}

pub(super) fn overlayfs_maps() -> Found {
    apart(CloneFlags::CLONE_NEWNS, || {
        use std::os::unix::fs::MetadataExt as _;
        for dir in ["/tmp/lower", "/tmp/upper", "/tmp/work", "/tmp/all"] {
            std::fs::create_dir(dir)?;
        }
        let layers = "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work";
        match mount(Some("standstill"), "/tmp/all", Some("overlay"), MsFlags::empty(), Some(layers)) {
            Err(Errno::ENODEV) => return Ok(()), // no overlayfs, no such programs
            result => result?,
        }
        let file = File::options().read(true).write(true).create(true).truncate(true).open("/tmp/all/f")?;
        file.set_len(4096)?;
        let line = probe::maps_line(file.as_fd())?.ok_or(Lack(Errno::ENOENT))?;
        let inode = line.split_ascii_whitespace().nth(4).and_then(|i| i.parse::<u64>().ok());
        found(inode == Some(file.metadata()?.ino()))
    })
}

pub(super) fn autofs() -> Found {
    apart(CloneFlags::CLONE_NEWNS, || {
        let (_read, write) = nix::unistd::pipe()?;
        std::fs::create_dir("/tmp/auto")?;
        let group = nix::unistd::getpgrp();
        let options = format!("fd={},pgrp={group},minproto=5,maxproto=5,direct", write.as_raw_fd());
        mount(Some("standstill"), "/tmp/auto", Some("autofs"), MsFlags::empty(), Some(options.as_str()))?;
        let mounts = read_to_string("/proc/thread-self/mountinfo")?;
        found(mounts.lines().any(|l| l.contains(" autofs ") && l.contains("pipe_ino=")))
    })
}
