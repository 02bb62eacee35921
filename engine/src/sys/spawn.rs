//! The first task of a restore: a fresh process with a chosen pid and nothing in it but the executor.
//!
//! The engine may be a guest in a program with many threads, so nothing of Rust runs in the child: clone3(2) with
//! CLONE_VM | CLONE_VFORK, then a function that makes system calls only, on its own stack, and execs a tiny ELF image from
//! a memfd, whose few instructions map the shared memory and jump into it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use standstill_restorer::arch::{self, Boot};

use crate::error::{Call, Error, Result};

/// The least that an ELF file needs (elf(5)): header, one segment to load, no executable stack; then the code.
fn elf(load_at: u64, code: &[u8]) -> Vec<u8> {
    const CODE_AT: u64 = 0x1000;
    let mut f = Vec::with_capacity(8192);
    f.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        f.extend_from_slice(&half.to_le_bytes());
    }
    f.extend_from_slice(&1u32.to_le_bytes());
    for word in [load_at + CODE_AT, 64, 0] {
        f.extend_from_slice(&word.to_le_bytes());
    }
    f.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        f.extend_from_slice(&half.to_le_bytes());
    }
    let segment = |kind: u32, flags: u32, offset: u64, at: u64, size: u64, align: u64| {
        let mut s = Vec::with_capacity(56);
        s.extend_from_slice(&kind.to_le_bytes());
        s.extend_from_slice(&flags.to_le_bytes());
        for word in [offset, at, at, size, size, align] {
            s.extend_from_slice(&word.to_le_bytes());
        }
        s
    };
    f.extend(segment(1, 5, 0, load_at, CODE_AT + code.len() as u64, 0x1000));
    f.extend(segment(0x6474_e551, 6, 0, 0, 0, 16));
    f.resize(CODE_AT as usize, 0);
    f.extend_from_slice(code);
    f
}

/// A memfd, closed on exec.
pub fn memfd(name: &std::ffi::CStr, flags: u32) -> Result<OwnedFd> {
    // SAFETY: the name is a C string; the new descriptor is ours alone.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags);
        if fd < 0 {
            return Err(Error::last("memfd_create"));
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// What the child needs, in memory that it shares with us until it execs.
#[repr(C)]
struct Errand {
    program: i32,
    inherit: *const i32,
    count: i32,
    empty: *const libc::c_char,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
    error: i32,
    failed: i32,
}

/// How to make the first task.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Its pid; 0 for any.
    pub pid: i32,
    /// Where the little program is loaded: free of everything else.
    pub load_at: u64,
    /// What it maps and where it goes on. `fd` is set here.
    pub boot: Boot,
    /// The shared memory and other descriptors that it keeps, at numbers from 3 on, in this order.
    pub inherit: &'a [BorrowedFd<'a>],
    /// Make it our sibling instead of our child.
    pub sibling: bool,
    /// Nobody gets a signal when it ends, and only `__WALL` waits for it.
    pub quiet: bool,
}

/// First number that [`Spawn::inherit`] gets in the child.
pub const FIRST_FD: i32 = 3;

/// Makes the first task; its pid. All of its signals are blocked, its actions are the default.
pub fn spawn(s: &Spawn<'_>) -> Result<i32> {
    let program = memfd(c"standstill", 0)?;
    let mut boot = s.boot;
    boot.fd = FIRST_FD as u64;
    let mut file = File::from(program);
    file.write_all(&elf(s.load_at, &arch::boot(&boot))).call("write(memfd)")?;
    // numbers high enough that moving one does not overwrite the next
    let above = FIRST_FD + i32::try_from(s.inherit.len()).unwrap_or(i32::MAX / 2).max(61);
    let copy = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, above).call("fcntl(F_DUPFD_CLOEXEC)");
    let moved: Vec<OwnedFd> = s.inherit.iter().map(|fd| copy(*fd)).collect::<Result<_>>()?;
    let inherit: Vec<i32> = moved.iter().map(AsRawFd::as_raw_fd).collect();
    let program = rustix::io::fcntl_dupfd_cloexec(&file, above).call("fcntl(F_DUPFD_CLOEXEC)")?;
    let name = c"standstill";
    let argv = [name.as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null()];
    let mut errand = Errand {
        program: program.as_raw_fd(),
        inherit: inherit.as_ptr(),
        count: inherit.len() as i32,
        empty: c"".as_ptr(),
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        error: 0,
        failed: 0,
    };
    let mut stack = vec![0u64; 4096];
    let tid = s.pid;
    let mut args = CloneArgs {
        flags: (libc::CLONE_VM | libc::CLONE_VFORK) as u64 | 1 << 32,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: (stack.len() * 8) as u64,
        ..Default::default()
    };
    if s.sibling {
        args.flags |= libc::CLONE_PARENT as u64;
    }
    if s.sibling || s.quiet {
        args.exit_signal = 0;
    }
    if s.pid != 0 {
        args.set_tid = &raw const tid as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: all signals are blocked meanwhile, so no handler of ours runs in the child; CLONE_VFORK keeps this thread,
    // and with it everything that `errand` points to, until the child has done its exec or is gone.
    let pid = unsafe {
        let all = !0u64;
        let mut before = 0u64;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8);
        let pid = clone_child(&args, &raw mut errand);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8);
        pid
    };
    drop(stack);
    if pid < 0 {
        return Err(Error::Sys { call: "clone3", source: std::io::Error::from_raw_os_error((-pid) as i32) });
    }
    if errand.failed != 0 {
        let _ = super::calls::wait_child(pid as i32, 0);
        return Err(Error::Sys { call: "execveat", source: std::io::Error::from_raw_os_error(errand.error) });
    }
    Ok(pid as i32)
}

unsafe fn clone_child(args: &CloneArgs, errand: *mut Errand) -> i64 {
    let r: i64;
    // SAFETY: the child starts on its own stack and never comes back into this function.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "and rsp, -16",
            "call {child}",
            "ud2",
            "2:",
            child = sym child,
            inlateout("rax") 435i64 => r,
            in("rdi") args as *const CloneArgs,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") errand,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    r
}

unsafe fn raw(nr: i64, a: [usize; 5]) -> i64 {
    let r: i64;
    // SAFETY: the caller's arguments are those of the system call.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") nr => r, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    r
}

/// Runs in the child, in our memory: system calls only, nothing that allocates, locks or touches errno.
unsafe extern "C" fn child(errand: *mut Errand) -> ! {
    const CLOSE_RANGE_CLOEXEC: usize = 4;
    const AT_EMPTY_PATH: usize = 0x1000;
    // SAFETY: the parent waits in clone3 and keeps all of this alive; the descriptor table is the child's own copy.
    unsafe {
        let e = &mut *errand;
        raw(libc::SYS_close_range, [3, u32::MAX as usize, CLOSE_RANGE_CLOEXEC, 0, 0]);
        let mut i = 0;
        while i < e.count {
            raw(libc::SYS_dup3, [*e.inherit.add(i as usize) as usize, (FIRST_FD + i) as usize, 0, 0, 0]);
            i += 1;
        }
        let r = raw(
            libc::SYS_execveat,
            [e.program as usize, e.empty as usize, e.argv as usize, e.envp as usize, AT_EMPTY_PATH],
        );
        e.error = (-r) as i32;
        e.failed = 1;
        loop {
            raw(libc::SYS_exit, [127, 0, 0, 0, 0]);
        }
    }
}
