//! The first task of a restore: a fresh process with a chosen pid and nothing in it but the executor.
//!
//! The engine may be a guest in a program with many threads, so nothing of Rust runs in the child: clone3(2) with
//! CLONE_VM | CLONE_VFORK, then a function that makes system calls only, on its own stack, and execs a tiny ELF image from
//! a memfd, whose few instructions map the shared memory and jump into it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

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

/// struct clone_args (clone3(2)).
#[repr(C)]
#[derive(Default)]
pub(super) struct CloneArgs {
    pub(super) flags: u64,
    pub(super) pidfd: u64,
    pub(super) child_tid: u64,
    pub(super) parent_tid: u64,
    pub(super) exit_signal: u64,
    pub(super) stack: u64,
    pub(super) stack_size: u64,
    pub(super) tls: u64,
    pub(super) set_tid: u64,
    pub(super) set_tid_size: u64,
    pub(super) cgroup: u64,
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
    /// It has a user namespace of its own, and is to be its root.
    becomes_root: bool,
    /// [`HOLD`] while it must wait, for its maps of ids; [`GIVE_UP`] if they cannot be had.
    hold: AtomicU32,
}

const HOLD: u32 = 1;
const GIVE_UP: u32 = 2;

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
    /// CLONE_NEW flags of namespaces that it is born into. With a new pid namespace, `pid` is its id in there.
    pub namespaces: u64,
    /// What goes into `uid_map` and `gid_map` of a new user namespace.
    pub maps: Option<[String; 2]>,
}

impl<'a> Spawn<'a> {
    /// A process that works for us: with any id, in our namespaces.
    pub fn helper(load_at: u64, boot: Boot, inherit: &'a [BorrowedFd<'a>]) -> Spawn<'a> {
        Spawn { pid: 0, load_at, boot, inherit, sibling: false, namespaces: 0, maps: None }
    }
}

/// First number that [`Spawn::inherit`] gets in the child.
pub const FIRST_FD: i32 = 3;

/// What a child needs until its exec, and who keeps it alive.
struct Prepared {
    errand: Box<Errand>,
    _kept: (File, OwnedFd, Vec<OwnedFd>, Vec<i32>),
    _words: (Box<[*const libc::c_char; 2]>, Box<[*const libc::c_char; 1]>),
}

impl Prepared {
    fn new(s: &Spawn<'_>) -> Result<Prepared> {
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
        let words = (Box::new([c"standstill".as_ptr(), std::ptr::null()]), Box::new([std::ptr::null()]));
        let errand = Box::new(Errand {
            program: program.as_raw_fd(),
            inherit: inherit.as_ptr(),
            count: inherit.len() as i32,
            empty: c"".as_ptr(),
            argv: words.0.as_ptr(),
            envp: words.1.as_ptr(),
            error: 0,
            failed: 0,
            becomes_root: s.maps.is_some(),
            hold: if s.maps.is_some() { HOLD } else { 0 }.into(),
        });
        Ok(Prepared { errand, _kept: (file, program, moved, inherit), _words: words })
    }

    /// What became of the child whose id, or error, this is.
    fn outcome(&self, pid: i64) -> Result<i32> {
        let error = |call, number| Err(Error::Sys { call, source: std::io::Error::from_raw_os_error(number) });
        if pid < 0 {
            return error("clone3", (-pid) as i32);
        }
        // SAFETY: the child, which wrote this, is gone from our memory.
        let (failed, number) = unsafe { ((&raw const self.errand.failed).read_volatile(), self.errand.error) };
        if failed != 0 {
            return error("execveat", number);
        }
        Ok(pid as i32)
    }
}

/// With all signals of this thread blocked, so that no handler of the program runs in a child that has our memory.
pub(super) fn unsignalled<T>(run: impl FnOnce() -> T) -> T {
    let all = !0u64;
    let mut before = 0u64;
    // SAFETY: two words that live across the call.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, &raw mut before, 8) };
    let result = run();
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, 8) };
    result
}

/// Makes the first task; its pid. All of its signals are blocked, its actions are the default.
pub fn spawn(s: &Spawn<'_>) -> Result<i32> {
    let mut prepared = Prepared::new(s)?;
    let mut stack = vec![0u64; 4096];
    let tid = s.pid;
    let mut args = CloneArgs {
        flags: (libc::CLONE_VM | libc::CLONE_VFORK) as u64 | CLONE_CLEAR_SIGHAND | s.namespaces,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: (stack.len() * 8) as u64,
        ..Default::default()
    };
    if s.sibling {
        args.flags |= libc::CLONE_PARENT as u64;
        args.exit_signal = 0;
    }
    if s.pid != 0 {
        args.set_tid = &raw const tid as u64;
        args.set_tid_size = 1;
    }
    let born = AtomicU32::new(0);
    if s.maps.is_some() {
        args.flags |= libc::CLONE_PARENT_SETTID as u64;
        args.parent_tid = born.as_ptr() as u64;
    }
    let errand: *mut Errand = &raw mut *prepared.errand;
    // SAFETY: all signals are blocked meanwhile, so no handler of ours runs in the child; CLONE_VFORK keeps this thread,
    // and with it everything that `errand` points to, until the child has done its exec or is gone.
    let clone = || unsignalled(|| unsafe { clone_child(&args, errand.cast(), child) });
    let mut mapped = Ok(());
    let pid = match &s.maps {
        None => clone(),
        Some(maps) => {
            // SAFETY: an atomic within what `errand` points to.
            let hold = unsafe { &(*errand).hold };
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| give_maps(&born, hold, maps));
                let pid = clone();
                if pid < 0 {
                    born.store(u32::MAX, Ordering::Release);
                }
                mapped = writer.join().unwrap_or(Err(Error::Gone));
                pid
            })
        }
    };
    drop(stack);
    let pid_of = prepared.outcome(pid);
    pid_of.and_then(|pid| mapped.map(|()| pid)).inspect_err(|_| {
        if pid > 0 {
            let _ = super::calls::wait_child(pid as i32, 0);
        }
    })
}

/// Writes the maps of ids of a child that waits for them, as soon as it is there.
fn give_maps(born: &AtomicU32, hold: &AtomicU32, maps: &[String; 2]) -> Result<()> {
    let pid = loop {
        match born.load(Ordering::Acquire) {
            0 => std::thread::yield_now(),
            u32::MAX => return Ok(()),
            pid => break pid,
        }
    };
    let write =
        |name: &str, text: &str| std::fs::write(format!("/proc/{pid}/{name}"), text).call("write(/proc/PID/uid_map)");
    let written = write("uid_map", &maps[0]).and_then(|()| write("gid_map", &maps[1]));
    hold.store(if written.is_ok() { 0 } else { GIVE_UP }, Ordering::Release);
    super::futex::wake(hold);
    written
}

/// A fresh process that nobody sees: it has a keeper for a parent, which shares our memory, waits for it and ends. Neither
/// gives anybody a SIGCHLD, and no `wait` of an embedding program finds them (`exit_signal` 0; an exec would reset that, hence
/// the keeper, which makes none).
#[derive(Debug)]
pub struct Kept {
    keeper: i32,
    keep: *mut Keep,
}

/// What the keeper needs; leaked if the keeper cannot be waited for.
#[repr(C)]
struct Keep {
    errand: *mut Errand,
    args: CloneArgs,
    done: std::sync::atomic::AtomicU32,
    pid: i64,
    prepared: Prepared,
    stacks: [Vec<u64>; 2],
}

/// Makes a process that [`Kept`] tells of; it has a session of its own.
pub fn spawn_kept(s: &Spawn<'_>) -> Result<Kept> {
    let mut prepared = Prepared::new(s)?;
    let mut stacks = [vec![0u64; 4096], vec![0u64; 4096]];
    let mut args = |n: usize, flags: i32, exit_signal: i32| CloneArgs {
        flags: flags as u64 | CLONE_CLEAR_SIGHAND,
        exit_signal: exit_signal as u64,
        stack: stacks[n].as_mut_ptr() as u64,
        stack_size: (stacks[n].len() * 8) as u64,
        ..Default::default()
    };
    let own = args(0, libc::CLONE_VM, 0);
    let childs = args(1, libc::CLONE_VM | libc::CLONE_VFORK, libc::SIGCHLD);
    let errand: *mut Errand = &raw mut *prepared.errand;
    let keep = Box::into_raw(Box::new(Keep { errand, args: childs, done: 0.into(), pid: 0, prepared, stacks }));
    // SAFETY: signals are blocked, for good in the keeper; `keep` stays until the keeper was waited for.
    let keeper = unsignalled(|| unsafe { clone_child(&own, keep.cast(), keeper) });
    if keeper < 0 {
        // SAFETY: nobody else has it.
        drop(unsafe { Box::from_raw(keep) });
        return Err(Error::Sys { call: "clone3", source: std::io::Error::from_raw_os_error((-keeper) as i32) });
    }
    let kept = Kept { keeper: keeper as i32, keep };
    // SAFETY: `keep` lives; the keeper writes `pid` before `done`, and neither after that.
    let (done, pid) = unsafe { (&(*keep).done, &raw const (*keep).pid) };
    while done.load(std::sync::atomic::Ordering::Acquire) == 0 {
        super::futex::wait(done, 0, std::time::Duration::from_millis(10));
        if !super::ptrace::exists(kept.keeper) {
            return Err(Error::Gone);
        }
    }
    // SAFETY: as above.
    unsafe { (*keep).prepared.outcome(pid.read_volatile()) }?;
    Ok(kept)
}

impl Kept {
    /// The process itself.
    pub fn pid(&self) -> i32 {
        // SAFETY: `keep` lives, and nobody writes this any more.
        let pid = unsafe { (&raw const (*self.keep).pid).read_volatile() };
        pid as i32
    }
}

// SAFETY: what it points to belongs to the process, and is touched by its drop only.
unsafe impl Send for Kept {}

impl Drop for Kept {
    /// Waits for the end of the process.
    fn drop(&mut self) {
        if super::calls::wait_child(self.keeper, libc::__WALL).is_ok() {
            // SAFETY: the keeper is gone, and the process never had our memory after its exec.
            drop(unsafe { Box::from_raw(self.keep) });
        }
    }
}

/// CLONE_CLEAR_SIGHAND: all actions are the default.
pub(super) const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// What a child of [`clone_child`] runs.
pub(super) type Entry = unsafe extern "C" fn(*mut libc::c_void) -> !;

/// clone3(2), whose child runs `entry`.
pub(super) unsafe fn clone_child(args: &CloneArgs, with: *mut libc::c_void, entry: Entry) -> i64 {
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
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") 435i64 => r,
            in("rdi") args as *const CloneArgs,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") with,
            in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    r
}

/// A system call that touches no errno.
pub(super) unsafe fn raw(nr: i64, a: [usize; 5]) -> i64 {
    let r: i64;
    // SAFETY: the caller's arguments are those of the system call.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") nr => r, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    r
}

/// Runs in the child, in our memory: system calls only, nothing that allocates, locks or touches errno.
unsafe extern "C" fn child(errand: *mut libc::c_void) -> ! {
    const CLOSE_RANGE_CLOEXEC: usize = 4;
    const AT_EMPTY_PATH: usize = 0x1000;
    // SAFETY: the parent waits in clone3 and keeps all of this alive; the descriptor table is the child's own copy.
    unsafe {
        let e = &mut *errand.cast::<Errand>();
        raw(libc::SYS_close_range, [3, u32::MAX as usize, CLOSE_RANGE_CLOEXEC, 0, 0]);
        // what the engine ignores would be ignored over clone3 and exec
        let default = [0u64; 4];
        for signal in 1..=64 {
            raw(libc::SYS_rt_sigaction, [signal, default.as_ptr() as usize, 0, 8, 0]);
        }
        let hold = &raw const e.hold;
        let mut patience = 0;
        loop {
            match (*hold).load(Ordering::Acquire) {
                0 => break,
                // nobody may be left to say so
                HOLD if patience < 1000 => {
                    let time = [0i64, 10_000_000];
                    let wait = [hold as usize, libc::FUTEX_WAIT as usize, HOLD as usize, time.as_ptr() as usize, 0];
                    raw(libc::SYS_futex, wait);
                    patience += 1;
                }
                _ => loop {
                    raw(libc::SYS_exit, [127, 0, 0, 0, 0]);
                },
            }
        }
        if e.becomes_root {
            raw(libc::SYS_setresgid, [0, 0, 0, 0, 0]);
            raw(libc::SYS_setgroups, [0, 0, 0, 0, 0]);
            raw(libc::SYS_setresuid, [0, 0, 0, 0, 0]);
        }
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

/// Runs in the keeper, in our memory: as [`child`], and it has none of our descriptors.
unsafe extern "C" fn keeper(keep: *mut libc::c_void) -> ! {
    const WALL: usize = 0x4000_0000;
    const EINTR: i64 = -4;
    // SAFETY: `keep` is there until we are waited for; whoever waits for `done` has read `pid` by then or later.
    unsafe {
        let k = keep.cast::<Keep>();
        raw(libc::SYS_setsid, [0; 5]);
        let pid = clone_child(&(*k).args, (*k).errand.cast(), child);
        (&raw mut (*k).pid).write_volatile(pid);
        (*k).done.store(1, std::sync::atomic::Ordering::Release);
        raw(libc::SYS_futex, [(&raw const (*k).done) as usize, libc::FUTEX_WAKE as usize, 1, 0, 0]);
        raw(libc::SYS_close_range, [0, u32::MAX as usize, 0, 0, 0]);
        if pid > 0 {
            while raw(libc::SYS_wait4, [pid as usize, 0, WALL, 0, 0]) == EINTR {}
        }
        loop {
            raw(libc::SYS_exit, [0; 5]);
        }
    }
}
