//! Questions to the kernel that need raw calls: each asks for one feature and leaves nothing behind.
//!
//! Questions that would change the asking process are asked by a short-lived child, made by fork, that does nothing but
//! system calls until it ends; so they may be asked in a process with many threads. Everything that safe code can ask is
//! in `check/probes.rs` instead.
//!
//! Man pages: ptrace(2), prctl(2), clone(2), kcmp(2), userfaultfd(2), io_setup(2), PAGEMAP_SCAN in the kernel's
//! admin-guide/mm/pagemap.rst.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::ffi::{c_int, c_long, c_ulong};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

type Answer<T = ()> = Result<T, Errno>;

/// A raw call with integers only. Every use below names a request that reads or writes no memory of ours, or memory that
/// the caller owns and that lives until the call is over.
///
/// # Safety
/// The call must not write to, or keep, memory that Rust code holds references to.
unsafe fn call(number: c_long, a: [usize; 5]) -> Answer<usize> {
    // SAFETY: the caller answers for what this call does to memory
    let result = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4]) };
    usize::try_from(result).map_err(|_| Errno::last())
}

/// The address of a value, for a call that writes to it.
fn address_of<T>(value: &mut T) -> usize {
    ptr::from_mut(value).expose_provenance()
}

/// PR_SET_MM_MAP_SIZE: can all fields of a memory descriptor be set in one go?
pub fn set_mm_map() -> Answer {
    let mut size: u32 = 0;
    // SAFETY: the kernel writes four bytes to `size`, which lives here
    unsafe { call(libc::SYS_prctl, [35, 15, address_of(&mut size), 0, 0]) }.map(drop)
}

/// PR_GET_TID_ADDRESS: can clear_child_tid be read?
pub fn tid_address() -> Answer {
    let mut address: usize = 0;
    // SAFETY: the kernel writes one pointer to `address`, which lives here
    unsafe { call(libc::SYS_prctl, [40, address_of(&mut address), 0, 0, 0]) }.map(drop)
}

/// PR_TIMER_CREATE_RESTORE_IDS: can POSIX timers be made with a given id?
pub fn timer_ids() -> Answer {
    // SAFETY: no memory is involved
    unsafe { call(libc::SYS_prctl, [77, 2, 0, 0, 0]) }.map(drop)
}

/// Is there a kcmp call at all?
pub fn kcmp() -> Answer {
    let me = std::process::id() as usize;
    // SAFETY: no memory is involved: the request is invalid on purpose
    match unsafe { call(libc::SYS_kcmp, [me, usize::MAX, usize::MAX, usize::MAX, usize::MAX]) } {
        Err(Errno::ENOSYS) => Err(Errno::ENOSYS),
        _ => Ok(()),
    }
}

/// KCMP_EPOLL_TFD: can a descriptor be compared with the target of an epoll?
pub fn kcmp_epoll(epoll: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Answer {
    #[repr(C)]
    struct Slot {
        epoll: u32,
        target: u32,
        offset: u32,
    }
    let me = std::process::id() as usize;
    let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX);
    let mut slot = Slot { epoll: number(epoll), target: number(target), offset: 0 };
    // SAFETY: the kernel reads twelve bytes of `slot`, which lives here
    unsafe { call(libc::SYS_kcmp, [me, me, 7, slot.target as usize, address_of(&mut slot)]) }.map(drop)
}

/// clone3 with set_tid: EINVAL for a list of ids that cannot be, E2BIG if the field is not known.
pub fn clone_set_tid() -> Answer {
    let mut arguments = [0u64; 11];
    arguments[8] = u64::MAX;
    // SAFETY: the kernel reads 88 bytes of `arguments`; the bad list (no ids at a bad address) makes it refuse to clone
    match unsafe { call(libc::SYS_clone3, [address_of(&mut arguments), 88, 0, 0, 0]) } {
        Err(Errno::EINVAL) => Ok(()),
        Err(e) => Err(e),
        Ok(_) => Err(Errno::EINVAL),
    }
}

/// F_GETOWNER_UIDS: can the owner of a descriptor's signals be read with its users?
pub fn owner_uids(fd: BorrowedFd<'_>) -> Answer {
    let mut uids = [0u32; 2];
    // SAFETY: the kernel writes eight bytes to `uids`, which lives here
    unsafe { call(libc::SYS_fcntl, [raw(fd), 17, address_of(&mut uids), 0, 0]) }.map(drop)
}

fn raw(fd: BorrowedFd<'_>) -> usize {
    usize::try_from(fd.as_raw_fd()).unwrap_or(usize::MAX)
}

/// Reads a socket option of `N` bytes.
pub fn socket_option<const N: usize>(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> Answer<[u8; N]> {
    let mut value = [0u8; N];
    let mut len = libc::socklen_t::try_from(N).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes to `value`; both live here
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len) };
    Errno::result(r).map(|_| value)
}

/// Sets a socket option that is a number.
pub fn set_socket_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> Answer {
    let len = libc::socklen_t::try_from(size_of::<c_int>()).unwrap_or(0);
    // SAFETY: the kernel reads four bytes of `value`, which lives here
    let r = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, ptr::from_ref(&value).cast(), len) };
    Errno::result(r).map(drop)
}

/// A request that gives a descriptor (SIOCUNIXFILE, SIOCGSKNS).
pub fn ioctl_for_fd(fd: BorrowedFd<'_>, request: c_ulong) -> Answer<OwnedFd> {
    // SAFETY: these requests use no memory
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request) };
    // SAFETY: a number that is not negative is a descriptor made for us right now
    Errno::result(r).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A request that reads or writes one number (TUNSETIFINDEX, TIOCSPTLCK).
pub fn ioctl_number(fd: BorrowedFd<'_>, request: c_ulong, value: c_int) -> Answer {
    let mut value = value;
    // SAFETY: these requests use four bytes at `value`, which lives here
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, ptr::from_mut(&mut value)) };
    Errno::result(r).map(drop)
}

/// PAGEMAP_SCAN of nothing, with bits that a kernel may not know.
pub fn pagemap_scan(pagemap: BorrowedFd<'_>, return_mask: u64) -> Answer {
    const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
    // size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any-of mask, return mask
    let mut request: [u64; 12] = [96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, return_mask];
    // SAFETY: the kernel reads and writes 96 bytes of `request`, which lives here; the range to scan is empty
    let r = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, request.as_mut_ptr()) };
    Errno::result(r).map(drop)
}

/// The features of userfaultfd.
pub fn userfaultfd_features(user_mode_only: bool) -> Answer<u64> {
    const UFFDIO_API: c_ulong = 0xc018_aa3f;
    let flags = usize::from(user_mode_only);
    // SAFETY: no memory is involved
    let fd = unsafe { call(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0]) }?;
    let fd = c_int::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the descriptor was made for us right now
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // api, features, ioctls
    let mut api: [u64; 3] = [0xaa, 0, 0];
    // SAFETY: the kernel reads and writes 24 bytes of `api`, which lives here
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    Errno::result(r).map(|_| api[1])
}

/// MOVE_MOUNT_SET_GROUP: can a mount be put into the group of another? The paths are absolute and end with a zero.
pub fn set_mount_group(from: &std::ffi::CStr, to: &std::ffi::CStr) -> Answer {
    let here = usize::MAX - 99; // AT_FDCWD
    let args = [here, from.as_ptr().expose_provenance(), here, to.as_ptr().expose_provenance(), 0x100];
    // SAFETY: the kernel reads two paths that end with a zero
    unsafe { call(libc::SYS_move_mount, args) }.map(drop)
}

/// Which membarrier commands there are.
pub fn membarrier_commands() -> Answer<usize> {
    // SAFETY: no memory is involved
    unsafe { call(libc::SYS_membarrier, [0, 0, 0, 0, 0]) }
}

/// Can an io_uring be made?
pub fn io_uring() -> Answer {
    let mut parameters = [0u8; 120];
    // SAFETY: the kernel reads and writes 120 bytes of `parameters`, which lives here
    let fd = unsafe { call(libc::SYS_io_uring_setup, [1, address_of(&mut parameters), 0, 0, 0]) }?;
    let fd = c_int::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the descriptor was made for us right now, and is closed here
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// Which file does the kernel say is mapped, for a shared mapping of `fd`? The line of /proc/self/maps.
pub fn maps_line(fd: BorrowedFd<'_>) -> Answer<Option<String>> {
    // SAFETY: a new mapping at an address of the kernel's choice; it is only looked at by address and unmapped below
    let at = unsafe { libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let line = maps_line_at(at.expose_provenance());
    // SAFETY: the mapping made above, to which nothing points
    unsafe { libc::munmap(at, 4096) };
    Ok(line)
}

fn maps_line_at(address: usize) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let begin = format!("{address:x}-");
    maps.lines().find(|l| l.trim_start_matches('0').starts_with(&begin)).map(str::to_owned)
}

/// Can the ring of an AIO context be moved, as a restore has to?
pub fn move_aio_ring() -> Answer {
    let mut context: usize = 0;
    // SAFETY: the kernel writes one word to `context`, which lives here
    unsafe { call(libc::SYS_io_setup, [16, address_of(&mut context), 0, 0, 0]) }?;
    let moved = move_ring(context);
    // SAFETY: the context made above, or where it went; nobody else knows it
    let _ = unsafe { call(libc::SYS_io_destroy, [moved.unwrap_or(context), 0, 0, 0, 0]) };
    moved.map(drop)
}

fn move_ring(context: usize) -> Answer<usize> {
    let line = maps_line_at(context).filter(|l| l.contains("/[aio]")).ok_or(Errno::ENOENT)?;
    let range = line.split(' ').next().and_then(|r| r.split_once('-')).ok_or(Errno::EINVAL)?;
    let end = usize::from_str_radix(range.1, 16).map_err(|_| Errno::EINVAL)?;
    let len = end.saturating_sub(context);
    let (rw, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice, only there to be replaced
    let place = unsafe { libc::mmap(ptr::null_mut(), len, rw, private, -1, 0) };
    if place == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let fixed = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as usize;
    let place = place.expose_provenance();
    // SAFETY: the ring goes over the mapping made above; no Rust code looks at either
    unsafe { call(libc::SYS_mremap, [context, len, len, fixed, place]) }?;
    // SAFETY: no events are asked for, so none are written
    match unsafe { call(libc::SYS_io_getevents, [place, 0, 1, 0, 0]) } {
        // with no timeout and no minimum it returns at once
        Ok(_) => Ok(place),
        Err(e) => Err(e),
    }
}

/// What a child can do.
type Work = fn(&[usize]) -> c_int;

/// Runs `work` in a child; zero is yes.
fn in_child(work: Work, data: &[usize]) -> Answer {
    let parent = std::process::id();
    // SAFETY: the child only makes system calls (each `Work` below keeps to that) and ends by _exit
    match unsafe { libc::fork() } {
        -1 => Err(Errno::last()),
        0 => {
            end_with(parent);
            let code = work(data);
            // SAFETY: ends the child without running anything else of this program
            unsafe { libc::_exit(code) }
        }
        pid => match wait(pid, 0)? {
            0 => Ok(()),
            // an exit code is an errno
            status if status & 0x7f == 0 => Err(Errno::from_raw(status >> 8)),
            _ => Err(Errno::EFAULT),
        },
    }
}

/// In a child: it does not outlive who waits for it, whatever becomes of that one.
fn end_with(parent: u32) {
    // SAFETY: two system calls of the calling process about itself
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if u32::try_from(libc::getppid()) != Ok(parent) {
            libc::_exit(0);
        }
    }
}

fn wait(pid: c_int, options: c_int) -> Answer<c_int> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes four bytes to `status`, which lives here
        match Errno::result(unsafe { libc::waitpid(pid, &mut status, options | libc::__WALL) }) {
            Err(Errno::EINTR) => {}
            result => return result.map(|_| status),
        }
    }
}

/// The errno of the last call, as the exit code of a child.
fn code() -> c_int {
    Errno::last_raw().clamp(1, 255)
}

/// ARCH_MAP_VDSO: can a vdso be mapped where it is wanted?
pub fn map_vdso() -> Answer {
    in_child(
        |_| {
            // SAFETY: the child has nothing that a second vdso could hurt
            match unsafe { call(libc::SYS_arch_prctl, [0x2002, 0, 0, 0, 0]) } {
                Ok(_) | Err(Errno::EEXIST) => 0,
                Err(_) => code(),
            }
        },
        &[],
    )
}

/// Can a signal be queued to oneself with the sender's code of choice?
pub fn queue_signal() -> Answer {
    in_child(
        |_| {
            let mut info = [0u32; 32];
            info[2] = 1; // si_code
                         // SAFETY: the child ignores the signal, then the kernel reads 128 bytes of `info`
            let sent = unsafe {
                libc::signal(libc::SIGUSR1, libc::SIG_IGN);
                let me = usize::try_from(libc::getpid()).unwrap_or(0);
                call(libc::SYS_rt_sigqueueinfo, [me, libc::SIGUSR1 as usize, address_of(&mut info), 0, 0])
            };
            sent.map_or_else(|_| code(), |_| 0)
        },
        &[],
    )
}

/// Soft-dirty tracking: is a page that was written since a reset marked?
pub fn soft_dirty() -> Answer {
    in_child(
        |_| {
            // SAFETY: calls with constant paths and with memory of this child only
            unsafe {
                let rw = libc::PROT_READ | libc::PROT_WRITE;
                let page = libc::mmap(ptr::null_mut(), 4096, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
                let reset = libc::open(c"/proc/self/clear_refs".as_ptr(), libc::O_WRONLY);
                if page == libc::MAP_FAILED || libc::write(reset, c"4".as_ptr().cast(), 1) != 1 {
                    return code();
                }
                page.cast::<u8>().write_volatile(0);
                let pagemap = libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY);
                let mut entry = 0u64;
                let at = i64::try_from(page.addr() / 4096 * 8).unwrap_or(0);
                if libc::pread(pagemap, ptr::from_mut(&mut entry).cast(), 8, at) != 8 {
                    return code();
                }
                if entry & (1 << 55) != 0 {
                    0
                } else {
                    libc::ENOTSUP
                }
            }
        },
        &[],
    )
}

/// Do signals still return after the vdso and its data moved? `areas` are start and length of each.
pub fn move_vdso(areas: &[(usize, usize)]) -> Answer {
    extern "C" fn nothing(_: c_int) {}
    let flat: Vec<usize> = areas.iter().flat_map(|(start, len)| [*start, *len]).collect();
    in_child(
        |areas| {
            let total = areas.chunks_exact(2).map(|a| a[1]).sum();
            let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: the child moves its own vdso and uses nothing of it afterwards but what the kernel does for signals
            unsafe {
                libc::signal(libc::SIGUSR1, nothing as extern "C" fn(c_int) as libc::sighandler_t);
                let place = libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, private, -1, 0);
                if place == libc::MAP_FAILED {
                    return code();
                }
                let mut place = place.expose_provenance();
                let fixed = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as usize;
                for area in areas.chunks_exact(2) {
                    if call(libc::SYS_mremap, [area[0], area[1], area[1], fixed, place]).is_err() {
                        return code();
                    }
                    place += area[1];
                }
                let me = usize::try_from(libc::getpid()).unwrap_or(0);
                let _ = call(libc::SYS_kill, [me, libc::SIGUSR1 as usize, 0, 0, 0]);
            }
            0
        },
        &flat,
    )
}

/// A child that is traced, stopped, and gone when this is dropped.
#[derive(Debug)]
pub struct Traced(c_int);

impl Traced {
    /// Makes one, with a seccomp filter if that is wanted.
    pub fn new(with_filter: bool) -> Answer<Self> {
        let parent = std::process::id();
        // SAFETY: the child only makes system calls and never returns from here
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            end_with(parent);
            // SAFETY: as above; the breakpoint's target is a function without effects
            unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                if with_filter && !set_filter() {
                    libc::_exit(code());
                }
                libc::kill(libc::getpid(), libc::SIGSTOP);
                breakpoint_target();
                libc::_exit(0)
            }
        }
        let child = Self(Errno::result(pid)?);
        match wait(pid, 0)? {
            status if libc::WIFSTOPPED(status) => Ok(child),
            status if libc::WIFEXITED(status) => Err(Errno::from_raw(libc::WEXITSTATUS(status))),
            _ => Err(Errno::ECHILD),
        }
    }

    fn ptrace(&self, request: usize, address: usize, data: usize) -> Answer<usize> {
        let pid = usize::try_from(self.0).unwrap_or(0);
        // SAFETY: each request below names its memory, which lives as long as the call
        unsafe { call(libc::SYS_ptrace, [request, pid, address, data, 0]) }
    }

    /// PTRACE_PEEKSIGINFO and PTRACE_GETSIGMASK: can pending and blocked signals be read?
    pub fn signals(&self) -> Answer {
        let mut from = [0u64, 1]; // offset; flags and count
        from[1] <<= 32;
        let mut info = [0u64; 16];
        self.ptrace(0x4209, address_of(&mut from), address_of(&mut info))?;
        let mut mask = 0u64;
        self.ptrace(0x420a, 8, address_of(&mut mask)).map(drop)
    }

    /// PTRACE_O_SUSPEND_SECCOMP.
    pub fn suspend_seccomp(&self) -> Answer {
        self.ptrace(0x4200, 0, 1 << 21).map(drop)
    }

    /// PTRACE_SECCOMP_GET_FILTER, of a child with a filter.
    pub fn seccomp_filter(&self) -> Answer {
        self.ptrace(0x420c, 0, 0).map(drop)
    }

    /// PTRACE_GET_RSEQ_CONFIGURATION.
    pub fn rseq(&self) -> Answer {
        let mut configuration = [0u64; 3];
        self.ptrace(0x420f, size_of_val(&configuration), address_of(&mut configuration)).map(drop)
    }

    /// PTRACE_GET_SYSCALL_INFO.
    pub fn syscall_info(&self) -> Answer {
        let mut info = [0u64; 12];
        self.ptrace(0x420e, size_of_val(&info), address_of(&mut info)).map(drop)
    }

    /// Does a hardware breakpoint stop the child?
    #[cfg(target_arch = "x86_64")]
    pub fn breakpoint(&self) -> Answer {
        const DEBUG_REGISTERS: usize = std::mem::offset_of!(libc::user, u_debugreg);
        let target = breakpoint_target as extern "C" fn();
        self.ptrace(6, DEBUG_REGISTERS, (target as *const ()).expose_provenance())?;
        self.ptrace(6, DEBUG_REGISTERS + 7 * 8, 1)?;
        self.ptrace(7, 0, 0)?;
        let status = wait(self.0, 0)?;
        if libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP {
            Ok(())
        } else {
            Err(Errno::ENOTSUP)
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // SAFETY: our own child, not reaped yet
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        while let Ok(status) = wait(self.0, 0) {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                break;
            }
        }
    }
}

#[inline(never)]
extern "C" fn breakpoint_target() {
    std::hint::black_box(());
}

/// A filter that allows everything but ptrace; only called in a child.
fn set_filter() -> bool {
    let statement = |code: u16, jt: u8, jf: u8, k: u32| libc::sock_filter { code, jt, jf, k };
    let ptrace = u32::try_from(libc::SYS_ptrace).unwrap_or(u32::MAX);
    let mut filter = [
        statement(0x20, 0, 0, 0),           // load the number of the call
        statement(0x15, 0, 1, ptrace),      // if it is ptrace
        statement(0x06, 0, 0, 0),           // kill
        statement(0x06, 0, 0, 0x7fff_0000), // else allow
    ];
    let mut program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies four instructions from `filter`, which lives here
    unsafe { call(libc::SYS_prctl, [22, 2, address_of(&mut program), 0, 0]) }.is_ok()
}
