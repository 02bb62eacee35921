//! Processes, as the one who watches them sees them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::SocketAddrV6;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

/// How long a test waits. Time in which the machine itself stood still, as a virtual one may, does not count: nobody could
/// have done anything in it.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
    looked: Instant,
}

impl Patience {
    /// Who waits longer than a step between two looks did not run.
    const STEP: Duration = Duration::from_millis(500);

    /// From now on.
    pub fn of(limit: Duration) -> Patience {
        Patience { left: limit, looked: Instant::now() }
    }

    /// Whether it is at its end; to be asked often.
    pub fn over(&mut self) -> bool {
        let now = Instant::now();
        self.left = self.left.saturating_sub((now - self.looked).min(Self::STEP));
        self.looked = now;
        self.left.is_zero()
    }
}

/// Waits until something holds; whether it came to hold in time.
pub fn within(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let mut patience = Patience::of(limit);
    while !holds() {
        if patience.over() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// From now on processes whose parent ends become our children, so that their ends can be seen, and their ids are free
/// when we have seen them.
pub fn adopt() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: changes a flag of this process.
        let r = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        assert_eq!(r, 0, "PR_SET_CHILD_SUBREAPER");
    });
}

/// From now on this thread, and the processes that it starts, have a network of their own, in which they reach themselves.
///
/// # Panics
/// If that cannot be had.
pub fn private_network() {
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16..18].copy_from_slice(&(libc::IFF_UP as u16).to_ne_bytes());
    // SAFETY: the request is a struct ifreq: a name, then flags.
    let r = unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNET), 0, "unshare(CLONE_NEWNET): {}", io::Error::last_os_error());
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let r = libc::ioctl(socket, libc::SIOCSIFFLAGS as _, request.as_mut_ptr());
        libc::close(socket);
        r
    };
    assert_eq!(r, 0, "SIOCSIFFLAGS: {}", io::Error::last_os_error());
}

/// Begins a connection from one address to another, and does not wait for it.
pub fn connect_from(from: SocketAddrV6, to: SocketAddrV6) -> io::Result<OwnedFd> {
    let raw = |at: SocketAddrV6| libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as u16,
        sin6_port: at.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: at.ip().octets() },
        sin6_scope_id: 0,
    };
    let (from, to, size) = (raw(from), raw(to), size_of::<libc::sockaddr_in6>() as u32);
    // SAFETY: the addresses live over the calls; the new descriptor is nobody else's.
    unsafe {
        let fd = libc::socket(libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let begun = libc::bind(fd.as_raw_fd(), (&raw const from).cast(), size) == 0
            && (libc::connect(fd.as_raw_fd(), (&raw const to).cast(), size) == 0
                || io::Error::last_os_error().raw_os_error() == Some(libc::EINPROGRESS));
        if begun {
            Ok(fd)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// Whether there is a process of this id, be it a zombie.
pub fn exists(pid: i32) -> bool {
    fs::metadata(format!("/proc/{pid}")).is_ok()
}

/// Takes the status of all children that ended and were of a session: those, too, that their parent left behind.
pub fn reap_session(session: i32) {
    for child in own_children() {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().take(4).collect();
        if fields.first() == Some(&"Z") && fields.get(3).and_then(|s| s.parse().ok()) == Some(session) {
            reap(child);
        }
    }
}

/// The letter of a process's state, if there is one.
pub fn state(pid: i32) -> Option<char> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text.rsplit(')').next()?.trim().chars().next()
}

/// Whether a process can still run.
pub fn alive(pid: i32) -> bool {
    !matches!(state(pid), None | Some('Z' | 'X'))
}

/// A process, its children, their children, …
pub fn tree(pid: i32) -> Vec<i32> {
    let mut all = vec![pid];
    let mut n = 0;
    while n < all.len() {
        for child in children(all[n]) {
            if !all.contains(&child) {
                all.push(child);
            }
        }
        n += 1;
    }
    all
}

/// The children of all threads of a process.
pub fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let texts = threads.filter_map(|t| fs::read_to_string(t.path().join("children")).ok());
    texts.flat_map(|t| t.split_whitespace().filter_map(|w| w.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// The ids of all threads of a process.
pub fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// Takes the status of a child that ended.
pub fn reap(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a place for one int.
    let r = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG | libc::__WALL) };
    (r == pid).then_some(status)
}

/// Waits until none of these processes is there; the status of the first, if it was our child.
///
/// # Errors
/// Those that are still there.
pub fn wait_gone(pids: &[i32], limit: Duration) -> Result<Option<i32>, Vec<i32>> {
    let mut patience = Patience::of(limit);
    let mut first = None;
    loop {
        for (n, &pid) in pids.iter().enumerate() {
            if let Some(status) = reap(pid) {
                if n == 0 {
                    first = Some(status);
                }
            }
        }
        let left: Vec<i32> = pids.iter().copied().filter(|&p| exists(p)).collect();
        if left.is_empty() {
            return Ok(first);
        }
        if patience.over() {
            return Err(left);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a signal; whether there was somebody to get it.
pub fn signal(pid: i32, signal: i32) -> bool {
    // SAFETY: no memory is involved.
    pid > 1 && unsafe { libc::kill(pid, signal) } == 0
}

/// Ends processes, and waits until they are gone.
pub fn end(pids: &[i32]) {
    for &pid in pids {
        signal(pid, libc::SIGKILL);
    }
    let _ = wait_gone(pids, Duration::from_secs(10));
}

/// What a program said, and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Its exit code, or the signal that ended it, as a shell has it (128 + signal); `None` after the time limit.
    pub code: Option<i32>,
    /// Standard output and standard error.
    pub text: String,
}

/// Ends a tree that a test has started, and removes its folder unless the test failed. `known` are processes of it that may
/// have another parent by now.
pub fn clean_up(root: i32, known: &mut Vec<i32>, folder: &std::path::Path) {
    known.extend(tree(root));
    known.sort_unstable();
    known.dedup();
    end(known);
    if std::thread::panicking() {
        eprintln!("its files are kept in {}", folder.display());
    } else {
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// The program will lead a session of its own.
pub fn in_own_session(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: between fork and exec only these system calls are made.
    unsafe {
        command.pre_exec(|| {
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        })
    }
}

/// The ids of users that a program has in a user namespace of its own: root is root.
pub const OWN_IDS: &str = "0 0 1\n1 70001 999\n";

/// Starts a program in new namespaces, as the init of one of PIDs: its id with us. Whoever adopts ([`adopt`]) becomes its
/// parent.
///
/// # Errors
/// If it cannot be started.
pub fn spawn_in_namespaces(command: &mut Command, namespaces: i32) -> io::Result<i32> {
    use std::io::Read as _;
    use std::os::unix::process::CommandExt as _;
    let (mut out, into) = io::pipe()?;
    let report = into.as_raw_fd();
    let start = move || -> io::Result<()> {
        let (mut held, held_by) = io::pipe()?;
        // SAFETY: as fork(2), with new namespaces; the child goes on with a copy of everything.
        let child = unsafe { libc::syscall(libc::SYS_clone, namespaces | libc::SIGCHLD, 0, 0, 0, 0) };
        if child < 0 {
            return Err(io::Error::last_os_error());
        }
        if child > 0 {
            if namespaces & libc::CLONE_NEWUSER != 0 {
                fs::write(format!("/proc/{child}/uid_map"), OWN_IDS)?;
                fs::write(format!("/proc/{child}/gid_map"), OWN_IDS)?;
            }
            let text = (child as i32).to_ne_bytes();
            // SAFETY: four bytes that live across the call; then the end of this process, which runs nothing more.
            unsafe {
                libc::write(report, text.as_ptr().cast(), text.len());
                libc::_exit(0);
            }
        }
        drop(held_by);
        // until it has its ids
        let _ = held.read(&mut [0]);
        // SAFETY: no memory is involved.
        match unsafe { libc::setresuid(0, 0, 0) | libc::setsid() } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the program that forks has one thread that allocates, this one.
    unsafe { command.pre_exec(start) };
    let mut between = command.spawn()?;
    drop(into);
    between.wait()?;
    let mut pid = [0; 4];
    out.read_exact(&mut pid)?;
    Ok(i32::from_ne_bytes(pid))
}

/// Runs a program. What it prints goes through a file, which nobody it leaves behind can keep us waiting with.
///
/// # Errors
/// If it cannot be started.
pub fn run(command: &mut Command, limit: Duration) -> io::Result<Output> {
    let path = scratch("output");
    let file = fs::File::create(&path)?;
    let mut child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
    let mut patience = Patience::of(limit);
    let mut late = String::new();
    let code = loop {
        if let Some(status) = child.try_wait()? {
            use std::os::unix::process::ExitStatusExt as _;
            break status.code().or(status.signal().map(|s| 128 + s));
        }
        if patience.over() {
            late = format!("\nnot in time; then it was doing:\n{}", describe(child.id().try_into().unwrap_or(0)));
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_micros(500));
    };
    let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned() + &late;
    fs::remove_file(&path)?;
    Ok(Output { code, text })
}

/// A path that nobody else uses.
pub fn scratch(what: &str) -> std::path::PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("standstill-{}-{n}-{what}", std::process::id()))
}

/// Our children now, to see later who has been left behind.
pub fn own_children() -> HashSet<i32> {
    children(std::process::id().try_into().unwrap_or(0)).into_iter().collect()
}

/// What each thread of a process is doing, for a report.
pub fn describe(pid: i32) -> String {
    let mut text = String::new();
    for tid in threads(pid) {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{name}")).unwrap_or_default();
        let status = read("status");
        let facts: Vec<&str> = status
            .lines()
            .filter(|l| ["Name", "State", "TracerPid", "SigPnd", "ShdPnd", "SigBlk"].iter().any(|n| l.starts_with(n)))
            .collect();
        text.push_str(&format!(
            "  {tid}: {} | {} | {}\n",
            facts.join(", ").replace('\t', " "),
            read("wchan").trim(),
            read("syscall").trim()
        ));
        for line in read("stack").lines() {
            text.push_str(&format!("      {line}\n"));
        }
    }
    text
}

/// All numbers of more than three digits in a text.
pub fn numbers(text: &str) -> HashSet<i32> {
    let words = text.split(|c: char| !c.is_ascii_digit());
    words.filter(|w| w.len() > 3).filter_map(|w| w.parse().ok()).collect()
}

/// Which processes and threads have one of these ids, as their own, their group's or their session's: for a report.
pub fn users(ids: &HashSet<i32>) -> String {
    let mut text = String::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        for tid in threads(pid) {
            let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().take(4).collect();
            let own = [pid, tid].into_iter().chain(fields.iter().filter_map(|f| f.parse().ok()));
            if own.into_iter().any(|id| ids.contains(&id)) {
                text.push_str(&format!("  {pid}/{tid}: {}\n", stat.trim()));
            }
        }
    }
    text
}

/// The id of the System V shared memory with this key, if there is one.
pub fn segment(key: i32) -> Option<i32> {
    let text = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let mut found = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    found.find(|words| words.first() == Some(&key.to_string().as_str())).and_then(|words| words.get(1)?.parse().ok())
}

/// Makes System V shared memory with this key, and stays attached to it: its id, and where it is.
pub fn make_segment(key: i32, size: usize) -> (i32, *mut u8) {
    // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
    unsafe {
        let id = libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | 0o600);
        assert!(id >= 0, "shmget: {}", io::Error::last_os_error());
        (id, libc::shmat(id, std::ptr::null(), 0).cast())
    }
}

/// Removes System V shared memory.
pub fn remove_segment(id: i32) {
    // SAFETY: no memory of ours is touched.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
}

/// Attaches System V shared memory.
pub fn attach_segment(id: i32) -> usize {
    // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    assert!(at as isize != -1, "shmat: {}", io::Error::last_os_error());
    at as usize
}

/// A byte of what was attached, after it was written if it is to be.
pub fn byte_of_segment(at: usize, offset: usize, write: Option<u8>) -> u8 {
    // SAFETY: the caller gives an offset within the segment that it attached.
    unsafe {
        let at = at as *mut u8;
        if let Some(byte) = write {
            at.add(offset).write_volatile(byte);
        }
        at.add(offset).read_volatile()
    }
}

/// Detaches it again.
pub fn detach_segment(at: usize) {
    // SAFETY: what was attached, into which nobody keeps a reference.
    unsafe { libc::shmdt(at as *const libc::c_void) };
}
